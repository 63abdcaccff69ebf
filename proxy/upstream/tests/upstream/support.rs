//! Small constructors of protobuf messages, and a cluster with everything that picking needs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as ep;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::Runtime;
use waystation_schema::ConfigError;
use waystation_stats::Store;
use waystation_upstream::cluster::{Environment, TransportFactory};
use waystation_upstream::{Cluster, CompileContext, Host, LocalLb, NoHost, PickContext};

/// A compiled cluster, one worker's state, and the stats.
pub(crate) struct Rig {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) local: LocalLb,
    pub(crate) rng: fastrand::Rng,
    pub(crate) now: Instant,
    pub(crate) stats: Store,
}

impl Rig {
    pub(crate) fn new(proto: &pb::Cluster) -> Self {
        Self::within(proto, &Environment::new(Runtime::new()))
    }

    pub(crate) fn within(proto: &pb::Cluster, environment: &Arc<Environment>) -> Self {
        let stats = Store::default();
        let now = Instant::now();
        let cluster = compile_at(proto, environment, &stats, now, None).unwrap();
        Self {
            cluster: Arc::new(cluster),
            local: LocalLb::default(),
            rng: fastrand::Rng::with_seed(7),
            now,
            stats,
        }
    }

    pub(crate) fn pick(&mut self, cx: &PickContext<'_>) -> Result<&Arc<Host>, NoHost> {
        self.cluster.pick(&mut self.local, cx, &mut self.rng, self.now)
    }

    /// The last octet of the picked host's address, which tests use as its name.
    pub(crate) fn octet(&mut self, cx: &PickContext<'_>) -> Option<u8> {
        self.pick(cx).ok().map(|host| last_octet(host))
    }

    /// How often each host is picked.
    pub(crate) fn spread(&mut self, cx: &PickContext<'_>, picks: usize) -> BTreeMap<u8, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..picks {
            if let Some(octet) = self.octet(cx) {
                *counts.entry(octet).or_default() += 1;
            }
        }
        counts
    }

    pub(crate) fn stat(&self, name: &str) -> u64 {
        self.stats.find(&format!("cluster.c.{name}")).unwrap()
    }

    pub(crate) fn hosts(&self) -> Vec<Arc<Host>> {
        self.cluster.endpoints().snapshot().hosts().cloned().collect()
    }

    pub(crate) fn advance(&mut self, time: Duration) {
        self.now += time;
    }
}

pub(crate) fn compile(proto: &pb::Cluster) -> Result<Cluster, ConfigError> {
    compile_at(proto, &Environment::new(Runtime::new()), &Store::default(), Instant::now(), None)
}

/// A cluster that is to replace `previous`.
pub(crate) fn compile_after(
    proto: &pb::Cluster,
    environment: &Arc<Environment>,
    stats: &Store,
    now: Instant,
    previous: &Arc<Cluster>,
) -> Cluster {
    compile_at(proto, environment, stats, now, Some(previous)).unwrap()
}

fn compile_at(
    proto: &pb::Cluster,
    environment: &Arc<Environment>,
    stats: &Store,
    now: Instant,
    previous: Option<&Arc<Cluster>>,
) -> Result<Cluster, ConfigError> {
    let transport = |socket: &core::TransportSocket| -> Result<TransportFactory, ConfigError> {
        if socket.name == "broken" {
            return Err(ConfigError::new("no such socket"));
        }
        Ok(Arc::new(socket.name.clone()))
    };
    let root = stats.root();
    Cluster::compile(
        proto,
        &CompileContext {
            environment,
            stats: &root,
            transport: &transport,
            route_policies: &|_| Ok(None),
            upstream_filters: &|_| Ok(None),
            added_via_api: true,
            previous,
            now,
        },
    )
}

pub(crate) fn last_octet(host: &Host) -> u8 {
    match host.address().ip().unwrap().ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[3],
        std::net::IpAddr::V6(ip) => ip.octets()[15],
    }
}

pub(crate) fn cluster(policy: pb::cluster::LbPolicy, endpoints: Vec<ep::LocalityLbEndpoints>) -> pb::Cluster {
    pb::Cluster {
        name: "c".into(),
        lb_policy: policy as i32,
        load_assignment: Some(assignment(endpoints)),
        ..pb::Cluster::default()
    }
}

pub(crate) fn assignment(endpoints: Vec<ep::LocalityLbEndpoints>) -> ep::ClusterLoadAssignment {
    ep::ClusterLoadAssignment { cluster_name: "c".into(), endpoints, ..ep::ClusterLoadAssignment::default() }
}

/// A locality in zone `zone` (empty is none) at `priority` with `weight`.
pub(crate) fn locality(
    zone: &str,
    priority: u32,
    weight: u32,
    endpoints: Vec<ep::LbEndpoint>,
) -> ep::LocalityLbEndpoints {
    ep::LocalityLbEndpoints {
        locality: (!zone.is_empty())
            .then(|| core::Locality { zone: zone.into(), ..core::Locality::default() }),
        priority,
        load_balancing_weight: (weight > 0).then_some(wkt::UInt32Value { value: weight }),
        lb_endpoints: endpoints,
        ..ep::LocalityLbEndpoints::default()
    }
}

/// The endpoint 10.0.0.`octet`:80.
pub(crate) fn endpoint(octet: u8) -> ep::LbEndpoint {
    at(&format!("10.0.0.{octet}"), 80)
}

pub(crate) fn at(address: &str, port: u32) -> ep::LbEndpoint {
    ep::LbEndpoint {
        host_identifier: Some(ep::lb_endpoint::HostIdentifier::Endpoint(ep::Endpoint {
            address: Some(socket_address(address, port)),
            ..ep::Endpoint::default()
        })),
        ..ep::LbEndpoint::default()
    }
}

pub(crate) fn socket_address(address: &str, port: u32) -> core::Address {
    core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: address.into(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port)),
            ..core::SocketAddress::default()
        })),
    }
}

pub(crate) fn weighted(mut endpoint: ep::LbEndpoint, weight: u32) -> ep::LbEndpoint {
    endpoint.load_balancing_weight = Some(wkt::UInt32Value { value: weight });
    endpoint
}

pub(crate) fn status(mut endpoint: ep::LbEndpoint, status: core::HealthStatus) -> ep::LbEndpoint {
    endpoint.health_status = status as i32;
    endpoint
}

/// Metadata of one namespace with string values.
pub(crate) fn with_metadata(
    mut endpoint: ep::LbEndpoint,
    namespace: &str,
    fields: &[(&str, &str)],
) -> ep::LbEndpoint {
    endpoint.metadata = Some(core::Metadata {
        filter_metadata: [(namespace.to_owned(), object(fields))].into(),
        ..core::Metadata::default()
    });
    endpoint
}

pub(crate) fn object(fields: &[(&str, &str)]) -> wkt::Struct {
    let text = |value: &str| wkt::Value { kind: Some(wkt::value::Kind::StringValue(value.to_owned())) };
    wkt::Struct { fields: fields.iter().map(|(key, value)| ((*key).to_owned(), text(value))).collect() }
}

pub(crate) fn percent(value: f64) -> envoy_types::pb::envoy::r#type::v3::Percent {
    envoy_types::pb::envoy::r#type::v3::Percent { value }
}

pub(crate) fn seconds(seconds: i64) -> wkt::Duration {
    wkt::Duration { seconds, nanos: 0 }
}
