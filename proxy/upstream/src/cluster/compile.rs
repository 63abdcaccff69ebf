//! From `envoy.config.cluster.v3.Cluster` to a [`Cluster`], field by field.

#![expect(deprecated, reason = "control planes still send deprecated fields, and Envoy reads them")]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::extensions::clusters as cluster_types;
use envoy_types::pb::envoy::extensions::upstreams;
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire::{self, bool_value, duration, positive, refuse, type_name, unpack};
use waystation_schema::{At, ConfigError};

use super::{Cluster, CompileContext, Discovery, EdsSettings, Endpoints, TransportSockets, connection, http};
use crate::admission::Admission;
use crate::discovery::{Assignment, DnsSettings, OriginalDst, ResolverSettings};
use crate::health_check::HealthCheck;
use crate::load_balancer::LbPolicy;
use crate::outlier::Detector;
use crate::stats::{ClusterStats, cluster_scope};

pub(super) fn compile(proto: &pb::Cluster, cx: &CompileContext<'_>) -> Result<Cluster, ConfigError> {
    if proto.name.is_empty() {
        return Err(ConfigError::field("name", "must not be empty"));
    }
    refuse_unsupported(proto)?;
    let options = ProtocolOptions::compile(proto)?;
    let stat_name = if proto.alt_stat_name.is_empty() { &proto.name } else { &proto.alt_stat_name };
    let scope = cluster_scope(cx.stats, stat_name);
    let stats: ClusterStats = scope.group();
    let runtime = &cx.environment.runtime;
    let common = proto.common_lb_config.as_ref();
    let track = proto.track_cluster_stats.as_ref();
    let budgets = proto.track_timeout_budgets || track.is_some_and(|track| track.timeout_budgets);
    let sizes = track.is_some_and(|track| track.request_response_sizes);
    let policy = LbPolicy::compile(proto, runtime)?;
    let (discovery, assignment) = discovery(proto, &policy, &cx.environment.resolver)?;
    let sockets = TransportSockets::compile(proto, cx.transport, &scope)?;
    let health_check = HealthCheck::compile(proto, runtime, &scope)?.map(Box::new);
    let original_dst = matches!(discovery, Discovery::OriginalDst(_));
    refuse("health_checks", original_dst && health_check.is_some(), "hosts of ORIGINAL_DST are not checked")?;
    let outlier_detection = match &proto.outlier_detection {
        Some(detection) => {
            let report = &cx.environment.outliers;
            let detector = Detector::compile(detection, &proto.name, runtime, &scope, report);
            Some(Box::new(detector.at(|| "outlier_detection")?))
        }
        None => None,
    };
    let cluster = Cluster {
        name: proto.name.as_str().into(),
        alt_stat_name: (!proto.alt_stat_name.is_empty()).then(|| proto.alt_stat_name.as_str().into()),
        added_via_api: cx.added_via_api,
        connect_timeout: positive("connect_timeout", proto.connect_timeout.as_ref())?
            .unwrap_or(Duration::from_secs(5)),
        buffer_limit: wire::buffer_limit(proto.per_connection_buffer_limit_bytes.as_ref()),
        http: http::compile(proto, options.http.as_ref())?,
        route_policies: match &options.http {
            Some(options) => (cx.route_policies)(options).at(http::typed_path)?,
            None => None,
        },
        upstream_filters: match &options.http {
            Some(options) => (cx.upstream_filters)(options).at(http::typed_path)?,
            None => None,
        },
        connection: connection::compile(
            proto.upstream_connection_options.as_ref(),
            proto.upstream_bind_config.as_ref(),
            cx.environment.bind.as_ref(),
        )?,
        close_connections_on_host_set_change: common
            .is_some_and(|common| common.close_connections_on_host_set_change),
        pool_per_downstream_connection: proto.connection_pool_per_downstream_connection
            || sockets.state_downstream,
        wait_for_warm_on_init: bool_value(proto.wait_for_warm_on_init.as_ref(), true),
        health_check,
        health_watch: proto
            .close_connections_on_host_health_failure
            .then(|| tokio::sync::watch::Sender::new(())),
        admission: Arc::new(
            Admission::compile(
                proto.circuit_breakers.as_ref(),
                &proto.name,
                runtime,
                &scope,
                &stats,
                // Under another name in the statistics the gauges are others.
                cx.previous
                    .filter(|previous| previous.observability_name() == stat_name)
                    .map(|previous| &*previous.admission),
            )
            .at(|| "circuit_breakers")?,
        ),
        previous: cx.previous.filter(|_| outlier_detection.is_some()).map(Arc::downgrade),
        outlier_detection,
        timeout_budget: budgets.then(|| scope.group()),
        request_sizes: sizes.then(|| scope.group()),
        traffic: OnceLock::new(),
        metadata: proto
            .metadata
            .as_ref()
            .map(Metadata::from_proto)
            .filter(|metadata| !metadata.is_empty())
            .map(Box::new),
        policy,
        sockets,
        endpoints: Endpoints::empty(),
        environment: Arc::clone(cx.environment),
        discovery,
        stats,
        scope,
    };
    if let Some(assignment) = assignment {
        cluster.apply(&assignment, cx.now);
    }
    Ok(cluster)
}

/// Refuses what would change traffic or security and is not here. Fields that are neither refused here nor compiled:
/// `upstream_config` of the generic kind is what an unset one means.
fn refuse_unsupported(proto: &pb::Cluster) -> Result<(), ConfigError> {
    refuse("filters", !proto.filters.is_empty(), "upstream network filters")?;
    refuse(
        "transport_socket_matcher",
        proto.transport_socket_matcher.is_some(),
        "use transport_socket_matches",
    )?;
    refuse("stats_matcher", proto.stats_matcher.is_some(), "use the bootstrap's stats_config")?;
    refuse("lrs_server", proto.lrs_server.is_some(), "load reporting")?;
    refuse("lrs_report_endpoint_metrics", !proto.lrs_report_endpoint_metrics.is_empty(), "load reporting")?;
    refuse("preconnect_policy", proto.preconnect_policy.is_some(), "preconnecting")?;
    let queuing =
        proto.queuing_policies.as_ref().is_some_and(|policies| policies.pending_rq_policy.is_some());
    refuse("queuing_policies", queuing, "requests queue first in, first out")?;
    refuse(
        "per_connection_buffer_high_watermark_timeout",
        proto.per_connection_buffer_high_watermark_timeout.is_some(),
        "write timeouts",
    )?;
    let per_endpoint = proto.track_cluster_stats.as_ref().is_some_and(|track| track.per_endpoint_stats);
    refuse("track_cluster_stats.per_endpoint_stats", per_endpoint, "hosts are shown by /clusters")?;
    if let Some(any) = proto.upstream_config.as_ref().and_then(|config| config.typed_config.as_ref()) {
        let generic =
            type_name(any) == "envoy.extensions.upstreams.http.generic.v3.GenericConnectionPoolProto";
        refuse("upstream_config", !generic, "only the generic connection pool")?;
    }
    Ok(())
}

/// `typed_extension_protocol_options`.
struct ProtocolOptions {
    http: Option<upstreams::http::v3::HttpProtocolOptions>,
}

impl ProtocolOptions {
    fn compile(proto: &pb::Cluster) -> Result<Self, ConfigError> {
        let mut options = Self { http: None };
        for (name, any) in &proto.typed_extension_protocol_options {
            let at = || format!("typed_extension_protocol_options[{name}]");
            match type_name(any) {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions" => {
                    options.http = Some(unpack(any).at(at)?);
                }
                "envoy.extensions.upstreams.tcp.v3.TcpProtocolOptions" => {
                    let tcp: upstreams::tcp::v3::TcpProtocolOptions = unpack(any).at(at)?;
                    // Checked, and of no use: no TCP connection is kept idle.
                    duration("idle_timeout", tcp.idle_timeout.as_ref()).at(at)?;
                }
                other => return Err(ConfigError::new(format!("not supported: {other}")).at(at())),
            }
        }
        Ok(options)
    }
}

/// Where endpoints come from, and those that are known already.
fn discovery(
    proto: &pb::Cluster,
    policy: &LbPolicy,
    resolver: &ResolverSettings,
) -> Result<(Discovery, Option<Assignment>), ConfigError> {
    use pb::cluster::{ClusterDiscoveryType, DiscoveryType};
    let kind = match &proto.cluster_discovery_type {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(kind)) => {
            DiscoveryType::try_from(*kind).map_err(|_| ConfigError::field("type", "unknown value"))?
        }
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            return custom_discovery(proto, custom, policy, resolver).at(|| "cluster_type");
        }
    };
    if kind != DiscoveryType::Eds && proto.eds_cluster_config.is_some() {
        return Err(ConfigError::field(
            "eds_cluster_config",
            "cannot be set for a cluster that is not of type EDS",
        ));
    }
    let provided = matches!(policy.kind, crate::load_balancer::policy::Kind::ClusterProvided);
    if provided != (kind == DiscoveryType::OriginalDst) {
        return Err(ConfigError::field(
            "lb_policy",
            "CLUSTER_PROVIDED goes with type ORIGINAL_DST, and ORIGINAL_DST with CLUSTER_PROVIDED",
        ));
    }
    match kind {
        DiscoveryType::Static => {
            let assignment = assignment(proto)?;
            assignment.require_addresses().at(|| "load_assignment")?;
            Ok((Discovery::Static, Some(assignment)))
        }
        DiscoveryType::Eds => {
            let config = proto
                .eds_cluster_config
                .as_ref()
                .ok_or_else(|| ConfigError::field("eds_cluster_config", "must be set for type EDS"))?;
            let source = config
                .eds_config
                .clone()
                .ok_or_else(|| ConfigError::field("eds_cluster_config.eds_config", "must be set"))?;
            let name = if config.service_name.is_empty() { &proto.name } else { &config.service_name };
            let resource_name = name.as_str().into();
            Ok((Discovery::Eds(Box::new(EdsSettings { source, resource_name })), None))
        }
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
            let logical = kind == DiscoveryType::LogicalDns;
            let settings = DnsSettings::compile_legacy(proto, assignment(proto)?, logical, resolver)?;
            Ok((Discovery::Dns(Box::new(settings)), None))
        }
        DiscoveryType::OriginalDst => {
            refuse(
                "load_assignment",
                proto.load_assignment.is_some(),
                "ORIGINAL_DST has no endpoints of its own",
            )?;
            refuse("lb_subset_config", proto.lb_subset_config.is_some(), "ORIGINAL_DST has no subsets")?;
            let config = match &proto.lb_config {
                Some(pb::cluster::LbConfig::OriginalDstLbConfig(config)) => config.clone(),
                _ => pb::cluster::OriginalDstLbConfig::default(),
            };
            let cleanup = positive("cleanup_interval", proto.cleanup_interval.as_ref())?;
            let compiled = OriginalDst::compile(&config, cleanup).at(|| "original_dst_lb_config")?;
            Ok((Discovery::OriginalDst(Box::new(compiled)), None))
        }
    }
}

fn custom_discovery(
    proto: &pb::Cluster,
    custom: &pb::cluster::CustomClusterType,
    policy: &LbPolicy,
    resolver: &ResolverSettings,
) -> Result<(Discovery, Option<Assignment>), ConfigError> {
    let any = custom.typed_config.as_ref().ok_or_else(|| {
        ConfigError::new(format!("not supported: cluster type {} without typed_config", custom.name))
    })?;
    let at = || "typed_config";
    match type_name(any) {
        "envoy.extensions.clusters.dns.v3.DnsCluster" => {
            if matches!(policy.kind, crate::load_balancer::policy::Kind::ClusterProvided) {
                return Err(ConfigError::new("DNS clusters do not provide a load balancer"));
            }
            let config: cluster_types::dns::v3::DnsCluster = unpack(any).at(at)?;
            let settings = DnsSettings::compile(&config, assignment(proto)?, resolver).at(at)?;
            Ok((Discovery::Dns(Box::new(settings)), None))
        }
        "envoy.extensions.clusters.original_dst.v3.OriginalDstCluster" => {
            let cluster_types::original_dst::v3::OriginalDstCluster {
                use_http_header,
                http_header_name,
                upstream_port_override,
                metadata_key,
            } = unpack(any).at(at)?;
            let config = pb::cluster::OriginalDstLbConfig {
                use_http_header,
                http_header_name,
                upstream_port_override,
                metadata_key,
            };
            let cleanup = positive("cleanup_interval", proto.cleanup_interval.as_ref())?;
            Ok((Discovery::OriginalDst(Box::new(OriginalDst::compile(&config, cleanup).at(at)?)), None))
        }
        other => Err(ConfigError::new(format!("not supported: cluster type {other}"))),
    }
}

fn assignment(proto: &pb::Cluster) -> Result<Assignment, ConfigError> {
    match &proto.load_assignment {
        Some(assignment) => Assignment::compile(assignment).at(|| "load_assignment"),
        None => Ok(Assignment::default()),
    }
}
