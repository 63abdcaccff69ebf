//! What is implemented, what is refused and with which path.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as upstream;
use envoy_types::pb::google::protobuf as wkt;
use prost::Message as _;
use waystation_http::h1::HeaderCase;
use waystation_upstream::cluster::{Discovery, UpstreamProtocol};

use crate::support::{Rig, cluster, compile, endpoint, locality, object, seconds, with_metadata};

fn plain() -> pb::Cluster {
    cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, vec![endpoint(1)])])
}

#[test]
fn defaults_are_envoys() {
    let compiled = compile(&plain()).unwrap();
    assert!(matches!(compiled.discovery, Discovery::Static));
    assert_eq!(compiled.connect_timeout, Duration::from_secs(5));
    assert_eq!(compiled.buffer_limit, 1 << 20);
    assert_eq!(compiled.http.protocol, UpstreamProtocol::Http1);
    assert_eq!(compiled.http.idle_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(compiled.http.max_requests_per_connection, None);
    assert_eq!(compiled.policy().name(), "round_robin");
    assert!(compiled.wait_for_warm_on_init && compiled.connection.is_none());
}

#[test]
fn what_is_not_here_is_refused_by_path() {
    let check = |path: &str, change: &dyn Fn(&mut pb::Cluster)| {
        let mut proto = plain();
        change(&mut proto);
        let error = compile(&proto).unwrap_err();
        assert_eq!(error.path(), path, "{error}");
    };
    check("health_checks[0].interval", &|proto| proto.health_checks.push(Default::default()));
    check("outlier_detection.monitors", &|proto| {
        let monitors = vec![core::TypedExtensionConfig::default()];
        proto.outlier_detection = Some(pb::OutlierDetection { monitors, ..Default::default() });
    });
    check("filters", &|proto| proto.filters.push(Default::default()));
    check("lrs_server", &|proto| proto.lrs_server = Some(Default::default()));
    check("preconnect_policy", &|proto| proto.preconnect_policy = Some(Default::default()));
    check("name", &|proto| proto.name.clear());
    check("connect_timeout", &|proto| proto.connect_timeout = Some(seconds(0)));
    check("transport_socket", &|proto| {
        proto.transport_socket = Some(core::TransportSocket { name: "broken".into(), config_type: None });
    });
    check("load_assignment.endpoints[0].lb_endpoints[0].endpoint.address", &|proto| {
        proto.load_assignment = Some(crate::support::assignment(vec![locality(
            "",
            0,
            0,
            vec![crate::support::at("example.com", 80)],
        )]));
    });
    check("load_balancing_policy.policies", &|proto| {
        proto.load_balancing_policy = Some(pb::LoadBalancingPolicy::default());
    });
    check("maglev_lb_config.table_size", &|proto| {
        proto.lb_policy = LbPolicy::Maglev as i32;
        proto.lb_config = Some(pb::cluster::LbConfig::MaglevLbConfig(pb::cluster::MaglevLbConfig {
            table_size: Some(wkt::UInt64Value { value: 100 }),
        }));
    });
    check("circuit_breakers.per_host_thresholds[0]", &|proto| {
        proto.circuit_breakers = Some(pb::CircuitBreakers {
            per_host_thresholds: vec![pb::circuit_breakers::Thresholds {
                max_requests: Some(wkt::UInt32Value { value: 1 }),
                ..Default::default()
            }],
            ..Default::default()
        });
    });
    check("eds_cluster_config", &|proto| {
        proto.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32));
    });
    check("lb_policy", &|proto| proto.lb_policy = LbPolicy::ClusterProvided as i32);
    check("upstream_connection_options.happy_eyeballs_config.first_address_family_version", &|proto| {
        proto.upstream_connection_options = Some(pb::UpstreamConnectionOptions {
            happy_eyeballs_config: Some(pb::upstream_connection_options::HappyEyeballsConfig {
                first_address_family_version: 4,
                ..Default::default()
            }),
            ..Default::default()
        });
    });
}

fn with_http(options: upstream::HttpProtocolOptions) -> pb::Cluster {
    let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let any = wkt::Any { type_url: format!("type.googleapis.com/{name}"), value: options.encode_to_vec() };
    let mut proto = plain();
    proto.typed_extension_protocol_options.insert(name.into(), any);
    proto
}

#[test]
fn http_options_of_both_generations() {
    use upstream::http_protocol_options as kinds;
    let typed = upstream::HttpProtocolOptions {
        common_http_protocol_options: Some(core::HttpProtocolOptions {
            idle_timeout: Some(seconds(0)),
            max_requests_per_connection: Some(wkt::UInt32Value { value: 9 }),
            headers_with_underscores_action: 2,
            ..Default::default()
        }),
        upstream_http_protocol_options: Some(core::UpstreamHttpProtocolOptions {
            auto_sni: true,
            override_auto_sni_header: "X-Host".into(),
            ..Default::default()
        }),
        upstream_protocol_options: Some(kinds::UpstreamProtocolOptions::ExplicitHttpConfig(
            kinds::ExplicitHttpConfig {
                protocol_config: Some(kinds::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(
                    core::Http2ProtocolOptions {
                        max_concurrent_streams: Some(wkt::UInt32Value { value: 100 }),
                        ..Default::default()
                    },
                )),
            },
        )),
        ..Default::default()
    };
    let http = compile(&with_http(typed)).unwrap().http;
    assert_eq!((http.protocol, http.http2.max_concurrent_streams), (UpstreamProtocol::Http2, 100));
    assert_eq!((http.idle_timeout, http.max_requests_per_connection), (None, Some(9)));
    assert_eq!(http.auto_sni_header.as_deref(), Some("x-host"));

    let mut proto = plain();
    proto.http_protocol_options = Some(core::Http1ProtocolOptions {
        header_key_format: Some(core::http1_protocol_options::HeaderKeyFormat {
            header_format: Some(
                core::http1_protocol_options::header_key_format::HeaderFormat::ProperCaseWords(
                    Default::default(),
                ),
            ),
        }),
        ..Default::default()
    });
    proto.protocol_selection = 1;
    let http = compile(&proto).unwrap().http;
    assert_eq!(
        (http.protocol, http.http1.header_case),
        (UpstreamProtocol::UseDownstream, HeaderCase::Proper)
    );
}

#[test]
fn endpoints_choose_their_transport_socket() {
    let socket = |name: &str| Some(core::TransportSocket { name: name.into(), config_type: None });
    let tls = |octet| with_metadata(endpoint(octet), "envoy.transport_socket_match", &[("tlsMode", "istio")]);
    let mut proto = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, vec![endpoint(1), tls(2)])]);
    proto.transport_socket = socket("default");
    proto.transport_socket_matches = vec![
        pb::cluster::TransportSocketMatch {
            name: "tls".into(),
            r#match: Some(object(&[("tlsMode", "istio")])),
            transport_socket: socket("mtls"),
        },
        pb::cluster::TransportSocketMatch {
            name: "any".into(),
            r#match: None,
            transport_socket: socket("plain"),
        },
    ];
    let rig = Rig::new(&proto);
    let names: Vec<String> =
        rig.hosts().iter().map(|host| host.transport().downcast_ref::<String>().unwrap().clone()).collect();
    assert_eq!(names, ["plain", "mtls"]);
    assert_eq!((rig.stat("tls.total_match_count"), rig.stat("any.total_match_count")), (1, 1));
    proto.transport_socket_matches.pop();
    let rig = Rig::new(&proto);
    assert_eq!(rig.hosts()[0].transport().downcast_ref::<String>().unwrap(), "default");
    assert_eq!(rig.stat("default.total_match_count"), 1);
}
