//! One pick, by policy and number of hosts.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, criterion_group, criterion_main};
use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::LbPolicy;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as ep;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::Runtime;
use waystation_stats::Store;
use waystation_upstream::cluster::{Environment, TransportFactory};
use waystation_upstream::{Cluster, CompileContext, LocalLb, PickContext};

fn endpoint(index: u32, weight: u32) -> ep::LbEndpoint {
    let address = core::SocketAddress {
        address: format!("10.{}.{}.{}", index >> 16, index >> 8 & 255, index & 255),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(80)),
        ..Default::default()
    };
    ep::LbEndpoint {
        load_balancing_weight: Some(wkt::UInt32Value { value: weight }),
        host_identifier: Some(ep::lb_endpoint::HostIdentifier::Endpoint(ep::Endpoint {
            address: Some(core::Address { address: Some(core::address::Address::SocketAddress(address)) }),
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn cluster(policy: LbPolicy, hosts: u32, weighted: bool) -> Cluster {
    let weight = |index| if weighted { index % 5 + 1 } else { 1 };
    let endpoints = (0..hosts).map(|index| endpoint(index, weight(index))).collect();
    let proto = pb::Cluster {
        name: "bench".into(),
        lb_policy: policy as i32,
        load_assignment: Some(ep::ClusterLoadAssignment {
            endpoints: vec![ep::LocalityLbEndpoints { lb_endpoints: endpoints, ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    };
    let raw: TransportFactory = Arc::new(());
    let store = Store::default();
    let cx = CompileContext {
        environment: &Environment::new(Runtime::new()),
        stats: &store.root(),
        transport: &|_| Ok(Arc::clone(&raw)),
        route_policies: &|_| Ok(None),
        upstream_filters: &|_| Ok(None),
        added_via_api: false,
        previous: None,
        now: Instant::now(),
    };
    Cluster::compile(&proto, &cx).expect("the cluster is valid")
}

fn picks(c: &mut Criterion) {
    let policies = [
        ("round_robin", LbPolicy::RoundRobin, false),
        ("round_robin_weighted", LbPolicy::RoundRobin, true),
        ("least_request", LbPolicy::LeastRequest, false),
        ("least_request_weighted", LbPolicy::LeastRequest, true),
        ("random", LbPolicy::Random, false),
        ("ring_hash", LbPolicy::RingHash, false),
        ("maglev", LbPolicy::Maglev, false),
    ];
    for (name, policy, weighted) in policies {
        for hosts in [10, 10_000] {
            let cluster = cluster(policy, hosts, weighted);
            let (mut local, mut rng, now) = (LocalLb::default(), fastrand::Rng::with_seed(1), Instant::now());
            let mut hash = 0_u64;
            c.bench_function(&format!("pick/{name}/{hosts}"), |bencher| {
                bencher.iter(|| {
                    hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let cx = PickContext { hash: Some(hash), ..PickContext::default() };
                    black_box(cluster.pick(&mut local, &cx, &mut rng, now).map(|host| host.id()))
                });
            });
        }
    }
}

criterion_group!(benches, picks);
criterion_main!(benches);
