//! Which transport socket an endpoint is reached through.

use std::fmt;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::value::{Metadata, Struct, Value, struct_from_proto};
use waystation_filter_api::wire::type_name;
use waystation_schema::{At, ConfigError};
use waystation_stats::{Counter, Scope};

use super::{TransportCompiler, TransportFactory};

/// The metadata namespace that `transport_socket_matches` look at.
const NAMESPACE: &str = "envoy.transport_socket_match";

const PROXY_PROTOCOL: &str =
    "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport";

/// `transport_socket` and `transport_socket_matches`.
pub struct TransportSockets {
    default: TransportFactory,
    matches: Box<[SocketMatch]>,
    /// Whether a socket tells upstream whose connection it is made for (PROXY protocol), so that no other's requests can
    /// share it.
    pub(super) state_downstream: bool,
}

struct SocketMatch {
    name: Box<str>,
    criteria: Struct,
    factory: TransportFactory,
    total_match_count: Counter,
}

impl super::Cluster {
    /// The products of the factory for all its transport sockets: those that are matched, then the default one.
    pub fn transports(&self) -> impl Iterator<Item = &TransportFactory> {
        let TransportSockets { matches, default, .. } = &self.sockets;
        matches.iter().map(|matched| &matched.factory).chain([default])
    }
}

impl TransportSockets {
    pub(super) fn compile(
        proto: &pb::Cluster,
        factory: &TransportCompiler<'_>,
        scope: &Scope,
    ) -> Result<Self, ConfigError> {
        let default = match &proto.transport_socket {
            Some(socket) => factory(socket).at(|| "transport_socket")?,
            None => factory(&core::TransportSocket {
                name: "envoy.transport_sockets.raw_buffer".to_owned(),
                config_type: None,
            })?,
        };
        let mut matches = Vec::with_capacity(proto.transport_socket_matches.len());
        for entry in &proto.transport_socket_matches {
            let compiled = SocketMatch::compile(entry, factory, scope)
                .at(|| format!("transport_socket_matches[{}]", entry.name))?;
            matches.push(compiled);
        }
        let of_matches =
            proto.transport_socket_matches.iter().filter_map(|entry| entry.transport_socket.as_ref());
        let state_downstream = proto.transport_socket.iter().chain(of_matches).any(|socket| {
            matches!(&socket.config_type, Some(core::transport_socket::ConfigType::TypedConfig(any))
                if type_name(any) == PROXY_PROTOCOL)
        });
        Ok(Self { default, matches: matches.into(), state_downstream })
    }

    /// The socket of an endpoint: the first entry whose criteria its metadata meets, then its locality's, then
    /// the default. `None` stands for the default, whose matches the caller counts.
    pub(crate) fn matching(
        &self,
        endpoint: Option<&Metadata>,
        locality: Option<&Metadata>,
    ) -> Option<&TransportFactory> {
        let of = |metadata: Option<&'_ Metadata>| -> Option<&SocketMatch> {
            let value = metadata?.filter.get(NAMESPACE)?;
            self.matches.iter().find(|entry| entry.meets(value))
        };
        // Without metadata only an entry without criteria matches.
        let entry = of(endpoint)
            .or_else(|| of(locality))
            .or_else(|| self.matches.iter().find(|entry| entry.criteria.is_empty()))?;
        entry.total_match_count.inc();
        Some(&entry.factory)
    }

    /// The cluster's `transport_socket`.
    pub fn default_socket(&self) -> &TransportFactory {
        &self.default
    }

    /// The socket of the entry `name`, which an active health check may ask for.
    pub fn named(&self, name: &str) -> Option<&TransportFactory> {
        self.matches.iter().find(|entry| &*entry.name == name).map(|entry| &entry.factory)
    }
}

impl SocketMatch {
    fn compile(
        proto: &pb::cluster::TransportSocketMatch,
        factory: &TransportCompiler<'_>,
        scope: &Scope,
    ) -> Result<Self, ConfigError> {
        let socket = proto
            .transport_socket
            .as_ref()
            .ok_or_else(|| ConfigError::field("transport_socket", "must be set"))?;
        Ok(Self {
            name: proto.name.as_str().into(),
            criteria: proto.r#match.as_ref().map(struct_from_proto).unwrap_or_default(),
            factory: factory(socket).at(|| "transport_socket")?,
            total_match_count: scope.scope(&proto.name).counter("total_match_count"),
        })
    }

    fn meets(&self, metadata: &Value) -> bool {
        let Value::Struct(fields) = metadata else { return false };
        self.criteria.iter().all(|(key, wanted)| fields.get(key) == Some(wanted))
    }
}

impl fmt::Debug for TransportSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.matches.iter().map(|entry| &entry.name)).finish()
    }
}
