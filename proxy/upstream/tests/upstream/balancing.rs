//! Policies, priorities, localities and slow start, against simple models.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::LbPolicy;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::address::Address;
use waystation_filter_api::runtime::Runtime;
use waystation_upstream::cluster::Environment;
use waystation_upstream::host::Locality;
use waystation_upstream::load_balancer::OverrideHost;
use waystation_upstream::{ClusterTable, HostRef, NoHost, PickContext};

use crate::support::{Rig, cluster, endpoint, last_octet, locality, percent, seconds, status, weighted};

const ANY: fn() -> PickContext<'static> = PickContext::default;

fn near(found: usize, expected: f64, tolerance: f64) -> bool {
    (found as f64 - expected).abs() <= expected * tolerance
}

#[test]
fn round_robin_takes_turns() {
    let mut rig =
        Rig::new(&cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, (1..=4).map(endpoint).collect())]));
    let picks: Vec<u8> = (0..8).filter_map(|_| rig.octet(&ANY())).collect();
    assert_eq!(picks[..4], picks[4..]);
    let mut once = picks[..4].to_vec();
    once.sort_unstable();
    assert_eq!(once, [1, 2, 3, 4]);
}

#[test]
fn weighted_round_robin_is_exact_and_smooth() {
    let endpoints = vec![weighted(endpoint(1), 1), weighted(endpoint(2), 2), weighted(endpoint(3), 5)];
    let mut rig = Rig::new(&cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, endpoints)]));
    let spread = rig.spread(&ANY(), 800);
    for (octet, expected) in [(1, 100_usize), (2, 200), (3, 500)] {
        assert!(spread[&octet].abs_diff(expected) <= 1, "{spread:?}");
    }
}

#[test]
fn random_is_even_and_seeded() {
    let proto = cluster(LbPolicy::Random, vec![locality("", 0, 0, (1..=5).map(endpoint).collect())]);
    let spread = Rig::new(&proto).spread(&ANY(), 10_000);
    assert!(spread.values().all(|count| near(*count, 2000.0, 0.1)), "{spread:?}");
    assert_eq!(spread, Rig::new(&proto).spread(&ANY(), 10_000), "the same seed picks the same hosts");
}

#[test]
fn least_request_avoids_busy_hosts() {
    let mut rig =
        Rig::new(&cluster(LbPolicy::LeastRequest, vec![locality("", 0, 0, (1..=4).map(endpoint).collect())]));
    let busy = Rc::new(HostRef(rig.hosts()[0].clone()));
    let requests: Vec<_> = (0..10).map(|_| busy.begin_request()).collect();
    // Two draws of four with replacement: the busy host wins only when both are it.
    let spread = rig.spread(&ANY(), 16_000);
    assert!(near(spread[&1], 1000.0, 0.15), "{spread:?}");
    drop(requests);
    assert_eq!(busy.active_requests(), 0);
    let spread = rig.spread(&ANY(), 16_000);
    assert!(near(spread[&1], 4000.0, 0.1), "{spread:?}");
}

#[test]
fn weighted_least_request_divides_weight_by_load() {
    let endpoints = vec![weighted(endpoint(1), 4), weighted(endpoint(2), 1)];
    let mut rig = Rig::new(&cluster(LbPolicy::LeastRequest, vec![locality("", 0, 0, endpoints)]));
    let spread = rig.spread(&ANY(), 1000);
    assert!(near(spread[&1], 800.0, 0.02), "{spread:?}");
    let busy = Rc::new(HostRef(rig.hosts()[0].clone()));
    let _requests: Vec<_> = (0..3).map(|_| busy.begin_request()).collect();
    // Four over three requests and the next one is a weight of one.
    let spread = rig.spread(&ANY(), 1000);
    assert!(near(spread[&1], 500.0, 0.02), "{spread:?}");
}

#[test]
fn full_scan_finds_the_least_loaded_of_all() {
    let config =
        envoy_types::pb::envoy::extensions::load_balancing_policies::least_request::v3::LeastRequest {
            selection_method: 1,
            ..Default::default()
        };
    let mut proto = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, (1..=50).map(endpoint).collect())]);
    proto.load_balancing_policy = Some(typed("least_request.v3.LeastRequest", &config));
    let mut rig = Rig::new(&proto);
    let hosts: Vec<_> = rig.hosts().into_iter().map(|host| Rc::new(HostRef(host))).collect();
    let _requests: Vec<_> =
        hosts.iter().filter(|host| last_octet(host) != 33).map(|host| host.begin_request()).collect();
    assert_eq!(rig.spread(&ANY(), 20), [(33, 20)].into());
}

fn typed<M: prost::Message>(name: &str, config: &M) -> pb::LoadBalancingPolicy {
    let any = |name: &str, value: Vec<u8>| pb::load_balancing_policy::Policy {
        typed_extension_config: Some(core::TypedExtensionConfig {
            name: name.into(),
            typed_config: Some(wkt::Any { type_url: format!("type.googleapis.com/{name}"), value }),
        }),
    };
    let full = format!("envoy.extensions.load_balancing_policies.{name}");
    // An unknown policy before the one that is meant is skipped.
    pb::LoadBalancingPolicy {
        policies: vec![any("example.Unknown", Vec::new()), any(&full, config.encode_to_vec())],
    }
}

#[test]
fn priorities_spill_over_and_panic() {
    let unhealthy = |octet| status(endpoint(octet), core::HealthStatus::Unhealthy);
    let half = vec![endpoint(1), unhealthy(2)];
    let proto = cluster(
        LbPolicy::RoundRobin,
        vec![locality("", 0, 0, half.clone()), locality("", 1, 0, vec![endpoint(11), endpoint(12)])],
    );
    let mut rig = Rig::new(&proto);
    let spread = rig.spread(&ANY(), 10_000);
    assert!(near(spread[&1], 7000.0, 0.05), "{spread:?}");
    assert_eq!(spread.get(&2), None);
    assert_eq!(rig.stat("membership_healthy"), 3);
    assert_eq!(rig.stat("lb_healthy_panic"), 0);

    let all_down = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, vec![unhealthy(1), unhealthy(2)])]);
    let mut rig = Rig::new(&all_down);
    assert_eq!(rig.spread(&ANY(), 100), [(1, 50), (2, 50)].into(), "panic uses all hosts");
    assert_eq!(rig.stat("lb_healthy_panic"), 100);

    let mut no_panic = all_down;
    no_panic.common_lb_config = Some(pb::cluster::CommonLbConfig {
        healthy_panic_threshold: Some(percent(0.0)),
        ..Default::default()
    });
    assert_eq!(Rig::new(&no_panic).pick(&ANY()).unwrap_err(), NoHost::NoHealthyHost);
}

#[test]
fn degraded_hosts_take_what_healthy_ones_cannot() {
    let degraded = |octet| status(endpoint(octet), core::HealthStatus::Degraded);
    let mut endpoints: Vec<_> = vec![endpoint(1)];
    endpoints.extend([2, 3, 4].map(degraded));
    let mut rig = Rig::new(&cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, endpoints)]));
    // One in four is healthy: 35 % of the load.
    let spread = rig.spread(&ANY(), 10_000);
    assert!(near(spread[&1], 3500.0, 0.06), "{spread:?}");
    assert_eq!(rig.stat("membership_degraded"), 3);
}

#[test]
fn localities_share_by_weight_and_health() {
    let mut proto = cluster(
        LbPolicy::RoundRobin,
        vec![
            locality("a", 0, 1, vec![endpoint(1)]),
            locality("b", 0, 3, vec![endpoint(2), status(endpoint(3), core::HealthStatus::Unhealthy)]),
            locality("c", 0, 0, vec![endpoint(4)]),
        ],
    );
    proto.common_lb_config = Some(pb::cluster::CommonLbConfig {
        locality_config_specifier: Some(
            pb::cluster::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(
                Default::default(),
            ),
        ),
        ..Default::default()
    });
    let spread = Rig::new(&proto).spread(&ANY(), 3100);
    // b has half of its hosts: 3 * 0.5 * 1.4 = 2.1 to 1. A locality without weight gets nothing.
    assert!(near(spread[&1], 1000.0, 0.01) && near(spread[&2], 2100.0, 0.01), "{spread:?}");
    assert_eq!(spread.len(), 2);
}

/// The example of the documentation: callers in two zones, hosts unevenly spread.
#[test]
fn zone_aware_routing_keeps_to_its_zone_as_far_as_it_can() {
    let table = ClusterTable::new();
    let own = table.cell("own");
    let local = cluster(
        LbPolicy::RoundRobin,
        vec![
            locality("a", 0, 0, vec![endpoint(101), endpoint(102)]),
            locality("b", 0, 0, vec![endpoint(103)]),
        ],
    );
    let environment = Arc::new(Environment {
        runtime: Runtime::new(),
        locality: Locality { zone: "a".into(), ..Locality::default() },
        local_cluster: Some(Arc::clone(&own)),
        bind: None,
        resolver: Default::default(),
        outliers: Arc::new(|_| {}),
    });
    own.set(Some(Rig::within(&local, &environment).cluster));

    let zones = |a: std::ops::RangeInclusive<u8>, b: std::ops::RangeInclusive<u8>| {
        cluster(
            LbPolicy::RoundRobin,
            vec![
                locality("b", 0, 0, b.map(endpoint).collect()),
                locality("a", 0, 0, a.map(endpoint).collect()),
            ],
        )
    };
    let in_a = |spread: &std::collections::BTreeMap<u8, usize>| -> usize {
        spread.iter().filter(|(octet, _)| **octet < 50).map(|(_, count)| count).sum()
    };
    // Two thirds of the callers and three quarters of the hosts are here: all stays.
    let mut direct = Rig::within(&zones(1..=6, 51..=52), &environment);
    assert_eq!(in_a(&direct.spread(&ANY(), 600)), 600);
    assert_eq!(direct.stat("lb_zone_routing_all_directly"), 600);
    // Half of the hosts for two thirds of the callers: three quarters stay.
    let mut residual = Rig::within(&zones(1..=3, 51..=53), &environment);
    assert!(near(in_a(&residual.spread(&ANY(), 10_000)), 7500.0, 0.03));
    assert!(residual.stat("lb_zone_routing_cross_zone") > 2000);
    // Small clusters are balanced as a whole.
    let mut small = Rig::within(&zones(1..=1, 51..=51), &environment);
    assert_eq!(in_a(&small.spread(&ANY(), 100)), 50);
    assert_eq!(small.stat("lb_zone_cluster_too_small"), 1);
}

#[test]
fn a_new_host_starts_slowly() {
    let mut proto = cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, vec![endpoint(1), endpoint(2)])]);
    proto.lb_config = Some(pb::cluster::LbConfig::RoundRobinLbConfig(pb::cluster::RoundRobinLbConfig {
        slow_start_config: Some(pb::cluster::SlowStartConfig {
            slow_start_window: Some(seconds(100)),
            ..Default::default()
        }),
    }));
    let mut rig = Rig::new(&proto);
    rig.advance(Duration::from_secs(1000));
    let three = crate::support::assignment(vec![locality("", 0, 0, (1..=3).map(endpoint).collect())]);
    rig.cluster.apply_eds(&three, rig.now).unwrap();
    rig.advance(Duration::from_secs(1));
    // 1 % of the window has passed: the minimum of 10 %.
    let spread = rig.spread(&ANY(), 2100);
    assert!(near(spread[&3], 100.0, 0.1), "{spread:?}");
    rig.advance(Duration::from_secs(49));
    let spread = rig.spread(&ANY(), 2500);
    assert!(near(spread[&3], 500.0, 0.1), "{spread:?}");
    rig.advance(Duration::from_secs(60));
    let spread = rig.spread(&ANY(), 3000);
    assert!(near(spread[&3], 1000.0, 0.05), "{spread:?}");
}

#[test]
fn rejected_hosts_are_passed_over() {
    let mut rig =
        Rig::new(&cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, (1..=3).map(endpoint).collect())]));
    let reject = |host: &waystation_upstream::Host| last_octet(host) != 2;
    let cx = PickContext { reject: Some(&reject), reselections: 5, ..ANY() };
    assert_eq!(rig.spread(&cx, 10), [(2, 10)].into());
    let never = |_: &waystation_upstream::Host| true;
    let cx = PickContext { reject: Some(&never), reselections: 2, ..ANY() };
    assert!(rig.pick(&cx).is_ok(), "the last one stands");
}

#[test]
fn a_session_gets_its_host_while_it_may() {
    let endpoints = vec![endpoint(1), status(endpoint(2), core::HealthStatus::Unhealthy), endpoint(3)];
    let mut rig = Rig::new(&cluster(LbPolicy::Random, vec![locality("", 0, 0, endpoints)]));
    let address = |octet| Address::Ip(([10, 0, 0, octet], 80).into());
    let (three, two) = (address(3), address(2));
    let wanted =
        |address, strict| PickContext { override_host: Some(OverrideHost { address, strict }), ..ANY() };
    assert_eq!(rig.spread(&wanted(&three, false), 10), [(3, 10)].into());
    assert!(!rig.spread(&wanted(&two, false), 100).contains_key(&2));
    assert_eq!(rig.pick(&wanted(&two, true)).unwrap_err(), NoHost::OverrideHostUnavailable);
}

#[test]
fn wrr_locality_wraps_another_policy() {
    use envoy_types::pb::envoy::extensions::load_balancing_policies as policies;
    let inner = typed("round_robin.v3.RoundRobin", &policies::round_robin::v3::RoundRobin::default());
    let outer = policies::wrr_locality::v3::WrrLocality { endpoint_picking_policy: Some(inner) };
    let mut proto = cluster(
        LbPolicy::RoundRobin,
        vec![locality("a", 0, 1, vec![endpoint(1)]), locality("b", 0, 4, vec![endpoint(2), endpoint(3)])],
    );
    proto.load_balancing_policy = Some(typed("wrr_locality.v3.WrrLocality", &outer));
    let spread = Rig::new(&proto).spread(&ANY(), 1000);
    assert!(near(spread[&1], 200.0, 0.02) && near(spread[&2], 400.0, 0.02), "{spread:?}");
}
