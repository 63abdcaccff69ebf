//! Transport sockets of upstream connections, compiled.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;
use waystation_tls::ClientContext;
use waystation_upstream::cluster::TransportFactory;

pub mod proxy_protocol;

use crate::context::CompileContext;
use crate::pool::connect::UpstreamSocket;
use proxy_protocol::ProxyProtocol;

/// Compiles a cluster's transport socket; statistics go below `scope` (`cluster.<name>.`).
pub fn compile(
    proto: &core::TransportSocket,
    scope: &Scope,
    context: &CompileContext<'_>,
) -> Result<TransportFactory, ConfigError> {
    socket(proto, scope, context).map(|socket| Arc::new(socket) as _)
}

fn socket(
    proto: &core::TransportSocket,
    scope: &Scope,
    context: &CompileContext<'_>,
) -> Result<UpstreamSocket, ConfigError> {
    let Some(core::transport_socket::ConfigType::TypedConfig(any)) = &proto.config_type else {
        // A cluster without a transport socket asks for raw_buffer by name.
        if proto.name == "envoy.transport_sockets.raw_buffer" {
            return Ok(UpstreamSocket::Plain);
        }
        return Err(ConfigError::field("typed_config", "is required"));
    };
    let compile = || match type_name(any) {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(UpstreamSocket::Plain),
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
            let proto: tls::UpstreamTlsContext = unpack(any)?;
            let tls = ClientContext::compile(&proto, context, scope)?;
            Ok(UpstreamSocket::Tls(Box::new(tls)))
        }
        "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
            let ProxyProtocolUpstreamTransport { config, transport_socket, .. } = unpack(any)?;
            let header = ProxyProtocol::compile(&config.unwrap_or_default(), scope).at(|| "config")?;
            let inner =
                transport_socket.ok_or_else(|| ConfigError::field("transport_socket", "is required"))?;
            let inner = socket(&inner, scope, context).at(|| "transport_socket")?;
            Ok(UpstreamSocket::ProxyProtocol(Box::new((header, inner))))
        }
        other => Err(ConfigError::new(format!("unknown upstream transport socket type '{other}'"))),
    };
    compile().at(|| "typed_config")
}
