//! What a cluster's health check sends and expects, compiled.

use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterProto;
use envoy_types::pb::envoy::config::core::v3 as pb;
use envoy_types::pb::envoy::config::core::v3::health_check::HealthChecker;
use waystation_filter_api::value::{Metadata, Value, struct_from_proto};
use waystation_filter_api::wire::{type_name, unpack};
use waystation_format::EventLog;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;
use waystation_upstream::Cluster;
use waystation_upstream::cluster::{TransportFactory, UpstreamProtocol};

use super::probe::{GrpcProbe, HttpProbe, Probe, TcpProbe};
use crate::context::Shared;

/// A compiled `envoy.config.core.v3.HealthCheck` but for its times and thresholds.
#[derive(Debug)]
pub struct Checker {
    pub(super) probe: Probe,
    /// `tls_options.alpn_protocols`.
    pub(super) alpn: Box<[Box<[u8]>]>,
    /// The transport socket of `transport_socket_match_criteria`, in place of the hosts' own.
    pub(super) transport: Option<TransportFactory>,
    pub(super) events: Box<[EventLog]>,
}

/// The metadata namespace that `transport_socket_matches` look at.
const SOCKET_MATCH: &str = "envoy.transport_socket_match";

impl Checker {
    /// Compiles the check of a cluster, if it has one.
    ///
    /// # Errors
    /// When a field is invalid or not supported.
    #[expect(deprecated, reason = "configurations still use event_log_path")]
    pub fn compile(
        proto: &ClusterProto,
        cluster: &Cluster,
        scope: &Scope,
        shared: &Shared,
    ) -> Result<Option<Arc<Self>>, ConfigError> {
        let Some(check) = proto.health_checks.first() else { return Ok(None) };
        let compile = || {
            let probe = match &check.health_checker {
                None => return Err(ConfigError::field("health_checker", "is required")),
                Some(HealthChecker::HttpHealthCheck(http)) => {
                    HttpProbe::compile(http, &shared.runtime).map(Probe::Http).at(|| "http_health_check")?
                }
                Some(HealthChecker::TcpHealthCheck(tcp)) => {
                    TcpProbe::compile(tcp, scope).map(Probe::Tcp).at(|| "tcp_health_check")?
                }
                Some(HealthChecker::GrpcHealthCheck(grpc)) => {
                    if cluster.http.protocol != UpstreamProtocol::Http2 {
                        return Err(ConfigError::new(format!(
                            "{} cluster must support HTTP/2 for gRPC healthchecking",
                            proto.name
                        )));
                    }
                    GrpcProbe::compile(grpc).map(Probe::Grpc).at(|| "grpc_health_check")?
                }
                Some(HealthChecker::CustomHealthCheck(custom)) => {
                    return Err(ConfigError::field(
                        "custom_health_check",
                        format!("Didn't find a registered implementation for '{}'", custom.name),
                    ));
                }
            };
            let mut events = Vec::new();
            if !check.event_log_path.is_empty() {
                let log = EventLog::open(&check.event_log_path, &shared.access_logs);
                events.push(log.at(|| "event_log_path")?);
            }
            for (i, logger) in check.event_logger.iter().enumerate() {
                events.push(event_logger(logger, shared).at(|| format!("event_logger[{i}]"))?);
            }
            let criteria = check.transport_socket_match_criteria.as_ref();
            let transport = criteria.map(|criteria| {
                let mut metadata = Metadata::default();
                metadata.filter.insert(SOCKET_MATCH.into(), Value::Struct(struct_from_proto(criteria)));
                cluster.transport_matching(&metadata)
            });
            let alpn = check.tls_options.iter().flat_map(|options| &options.alpn_protocols);
            Ok(Arc::new(Self {
                probe,
                alpn: alpn.map(|protocol| protocol.as_bytes().into()).collect(),
                transport,
                events: events.into(),
            }))
        };
        compile().at(|| "health_checks[0]").map(Some)
    }
}

fn event_logger(proto: &pb::TypedExtensionConfig, shared: &Shared) -> Result<EventLog, ConfigError> {
    use envoy_types::pb::envoy::extensions::health_check::event_sinks::file::v3 as file;
    let any = proto.typed_config.as_ref().ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
    match type_name(any) {
        "envoy.extensions.health_check.event_sinks.file.v3.HealthCheckEventFileSink" => {
            let file::HealthCheckEventFileSink { event_log_path } = unpack(any).at(|| "typed_config")?;
            EventLog::open(&event_log_path, &shared.access_logs).at(|| "typed_config")
        }
        other => Err(ConfigError::new(format!(
            "Didn't find a registered implementation for '{}' with type URL: '{other}'",
            proto.name
        ))),
    }
}
