//! Every extension of this binary, by category: what the xDS node and `/server_info` announce.
//!
//! A type that is not here is refused where it is used, with its path.

use envoy_types::pb::envoy::config::core::v3 as core;

/// One extension.
#[derive(Debug)]
pub struct Extension {
    /// Envoy's category.
    pub category: &'static str,
    /// Envoy's name.
    pub name: &'static str,
    /// The messages that configure it, without `type.googleapis.com/`.
    pub types: &'static [&'static str],
}

const fn extension(category: &'static str, name: &'static str, types: &'static [&'static str]) -> Extension {
    Extension { category, name, types }
}

/// Sorted by category and name.
pub const EXTENSIONS: &[Extension] = &[
    extension(
        "envoy.access_loggers",
        "envoy.access_loggers.file",
        &["envoy.extensions.access_loggers.file.v3.FileAccessLog"],
    ),
    extension(
        "envoy.access_loggers",
        "envoy.access_loggers.http_grpc",
        &["envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig"],
    ),
    extension(
        "envoy.access_loggers",
        "envoy.access_loggers.stderr",
        &["envoy.extensions.access_loggers.stream.v3.StderrAccessLog"],
    ),
    extension(
        "envoy.access_loggers",
        "envoy.access_loggers.stdout",
        &["envoy.extensions.access_loggers.stream.v3.StdoutAccessLog"],
    ),
    extension(
        "envoy.access_loggers",
        "envoy.access_loggers.tcp_grpc",
        &["envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig"],
    ),
    extension("envoy.clusters", "envoy.cluster.dns", &["envoy.extensions.clusters.dns.v3.DnsCluster"]),
    extension("envoy.clusters", "envoy.cluster.eds", &[]),
    extension("envoy.clusters", "envoy.cluster.logical_dns", &[]),
    extension("envoy.clusters", "envoy.cluster.original_dst", &[]),
    extension("envoy.clusters", "envoy.cluster.static", &[]),
    extension("envoy.clusters", "envoy.cluster.strict_dns", &[]),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.adaptive_concurrency",
        &["envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency"],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.admission_control",
        &["envoy.extensions.filters.http.admission_control.v3.AdmissionControl"],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.bandwidth_limit",
        &["envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit"],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.buffer",
        &[
            "envoy.extensions.filters.http.buffer.v3.Buffer",
            "envoy.extensions.filters.http.buffer.v3.BufferPerRoute",
        ],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.composite",
        &[
            "envoy.extensions.filters.http.composite.v3.Composite",
            "envoy.extensions.filters.http.composite.v3.CompositePerRoute",
        ],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.ext_authz",
        &[
            "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
        ],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.fault",
        &["envoy.extensions.filters.http.fault.v3.HTTPFault"],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.header_mutation",
        &[
            "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
            "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute",
        ],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.health_check",
        &["envoy.extensions.filters.http.health_check.v3.HealthCheck"],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.local_ratelimit",
        &["envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.match_delegate",
        &[
            "envoy.extensions.common.matching.v3.ExtensionWithMatcher",
            "envoy.extensions.common.matching.v3.ExtensionWithMatcherPerRoute",
        ],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.on_demand",
        &[
            "envoy.extensions.filters.http.on_demand.v3.OnDemand",
            "envoy.extensions.filters.http.on_demand.v3.PerRouteConfig",
        ],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.rbac",
        &["envoy.extensions.filters.http.rbac.v3.RBAC", "envoy.extensions.filters.http.rbac.v3.RBACPerRoute"],
    ),
    extension(
        "envoy.filters.http",
        "envoy.filters.http.router",
        &["envoy.extensions.filters.http.router.v3.Router"],
    ),
    extension(
        "envoy.filters.http.upstream",
        "envoy.filters.http.admission_control",
        &["envoy.extensions.filters.http.admission_control.v3.AdmissionControl"],
    ),
    extension(
        "envoy.filters.http.upstream",
        "envoy.filters.http.buffer",
        &["envoy.extensions.filters.http.buffer.v3.Buffer"],
    ),
    extension(
        "envoy.filters.http.upstream",
        "envoy.filters.http.header_mutation",
        &["envoy.extensions.filters.http.header_mutation.v3.HeaderMutation"],
    ),
    extension(
        "envoy.filters.http.upstream",
        "envoy.filters.http.upstream_codec",
        &["envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec"],
    ),
    extension(
        "envoy.filters.listener",
        "envoy.filters.listener.http_inspector",
        &["envoy.extensions.filters.listener.http_inspector.v3.HttpInspector"],
    ),
    extension(
        "envoy.filters.listener",
        "envoy.filters.listener.local_ratelimit",
        &["envoy.extensions.filters.listener.local_ratelimit.v3.LocalRateLimit"],
    ),
    extension(
        "envoy.filters.listener",
        "envoy.filters.listener.original_dst",
        &["envoy.extensions.filters.listener.original_dst.v3.OriginalDst"],
    ),
    extension(
        "envoy.filters.listener",
        "envoy.filters.listener.proxy_protocol",
        &["envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol"],
    ),
    extension(
        "envoy.filters.listener",
        "envoy.filters.listener.tls_inspector",
        &["envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"],
    ),
    extension(
        "envoy.filters.network",
        "envoy.filters.network.connection_limit",
        &["envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit"],
    ),
    extension(
        "envoy.filters.network",
        "envoy.filters.network.direct_response",
        &["envoy.extensions.filters.network.direct_response.v3.Config"],
    ),
    extension(
        "envoy.filters.network",
        "envoy.filters.network.echo",
        &["envoy.extensions.filters.network.echo.v3.Echo"],
    ),
    extension(
        "envoy.filters.network",
        "envoy.filters.network.http_connection_manager",
        &["envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"],
    ),
    extension(
        "envoy.filters.network",
        "envoy.filters.network.local_ratelimit",
        &["envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit"],
    ),
    extension(
        "envoy.filters.network",
        "envoy.filters.network.rbac",
        &["envoy.extensions.filters.network.rbac.v3.RBAC"],
    ),
    extension(
        "envoy.filters.network",
        "envoy.filters.network.tcp_proxy",
        &["envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"],
    ),
    extension(
        "envoy.health_check.event_sinks",
        "envoy.health_check.event_sink.file",
        &["envoy.extensions.health_check.event_sinks.file.v3.HealthCheckEventFileSink"],
    ),
    extension(
        "envoy.health_checkers",
        "envoy.health_checkers.grpc",
        &["envoy.config.core.v3.HealthCheck.GrpcHealthCheck"],
    ),
    extension(
        "envoy.health_checkers",
        "envoy.health_checkers.http",
        &["envoy.config.core.v3.HealthCheck.HttpHealthCheck"],
    ),
    extension(
        "envoy.health_checkers",
        "envoy.health_checkers.tcp",
        &["envoy.config.core.v3.HealthCheck.TcpHealthCheck"],
    ),
    extension(
        "envoy.http.original_ip_detection",
        "envoy.http.original_ip_detection.custom_header",
        &["envoy.extensions.http.original_ip_detection.custom_header.v3.CustomHeaderConfig"],
    ),
    extension(
        "envoy.http.original_ip_detection",
        "envoy.http.original_ip_detection.xff",
        &["envoy.extensions.http.original_ip_detection.xff.v3.XffConfig"],
    ),
    extension(
        "envoy.load_balancing_policies",
        "envoy.load_balancing_policies.least_request",
        &["envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest"],
    ),
    extension(
        "envoy.load_balancing_policies",
        "envoy.load_balancing_policies.maglev",
        &["envoy.extensions.load_balancing_policies.maglev.v3.Maglev"],
    ),
    extension(
        "envoy.load_balancing_policies",
        "envoy.load_balancing_policies.random",
        &["envoy.extensions.load_balancing_policies.random.v3.Random"],
    ),
    extension(
        "envoy.load_balancing_policies",
        "envoy.load_balancing_policies.ring_hash",
        &["envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash"],
    ),
    extension(
        "envoy.load_balancing_policies",
        "envoy.load_balancing_policies.round_robin",
        &["envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"],
    ),
    extension(
        "envoy.load_balancing_policies",
        "envoy.load_balancing_policies.subset",
        &["envoy.extensions.load_balancing_policies.subset.v3.Subset"],
    ),
    extension(
        "envoy.load_balancing_policies",
        "envoy.load_balancing_policies.wrr_locality",
        &["envoy.extensions.load_balancing_policies.wrr_locality.v3.WrrLocality"],
    ),
    extension("envoy.matching.action", "envoy.filters.rbac.action", &["envoy.config.rbac.v3.Action"]),
    extension(
        "envoy.path.match",
        "envoy.path.match.uri_template.uri_template_matcher",
        &["envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig"],
    ),
    extension(
        "envoy.path.rewrite",
        "envoy.path.rewrite.uri_template.uri_template_rewriter",
        &["envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig"],
    ),
    extension(
        "envoy.rbac.principals",
        "envoy.rbac.principals.mtls_authenticated",
        &["envoy.extensions.rbac.principals.mtls_authenticated.v3.Config"],
    ),
    extension(
        "envoy.request_id",
        "envoy.request_id.uuid",
        &["envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig"],
    ),
    extension(
        "envoy.transport_sockets.downstream",
        "envoy.transport_sockets.raw_buffer",
        &["envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"],
    ),
    extension(
        "envoy.transport_sockets.downstream",
        "envoy.transport_sockets.tls",
        &["envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"],
    ),
    extension(
        "envoy.transport_sockets.upstream",
        "envoy.transport_sockets.raw_buffer",
        &["envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"],
    ),
    extension(
        "envoy.transport_sockets.upstream",
        "envoy.transport_sockets.tls",
        &["envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"],
    ),
    extension(
        "envoy.transport_sockets.upstream",
        "envoy.transport_sockets.upstream_proxy_protocol",
        &["envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport"],
    ),
    extension(
        "envoy.upstream_options",
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        &["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"],
    ),
];

/// Whether `category/name` is one of them.
pub fn is_known(extension: &str) -> bool {
    EXTENSIONS.iter().any(|known| {
        extension.strip_prefix(known.category).and_then(|rest| rest.strip_prefix('/')) == Some(known.name)
    })
}

/// The list for the xDS node.
pub fn extensions() -> Vec<core::Extension> {
    let announce = |extension: &Extension| core::Extension {
        name: extension.name.to_owned(),
        category: extension.category.to_owned(),
        type_urls: extension.types.iter().map(|name| (*name).to_owned()).collect(),
        ..core::Extension::default()
    };
    EXTENSIONS.iter().map(announce).collect()
}

#[cfg(test)]
mod tests {
    use super::EXTENSIONS;
    use waystation_schema::{Message, ledger};

    #[test]
    fn every_type_exists_and_the_ledger_accepts_it() {
        assert!(EXTENSIONS.is_sorted_by_key(|extension| (extension.category, extension.name)));
        for name in EXTENSIONS.iter().flat_map(|extension| extension.types) {
            let message = Message::find(name).unwrap_or_else(|| panic!("{name}"));
            let state = ledger::message_state(message);
            assert!(!matches!(state, ledger::State::Rejected(_)), "{name}: {state:?}");
        }
    }
}
