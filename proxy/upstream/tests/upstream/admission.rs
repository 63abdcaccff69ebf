//! Circuit breakers are exact.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::LbPolicy;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::{Layer, Runtime};
use waystation_filter_api::value::Value;
use waystation_upstream::Priority;
use waystation_upstream::admission::Resource;
use waystation_upstream::cluster::Environment;

use crate::support::{Rig, cluster, compile_after, percent};

fn with(thresholds: pb::circuit_breakers::Thresholds) -> pb::Cluster {
    let mut proto = cluster(LbPolicy::RoundRobin, Vec::new());
    proto.circuit_breakers =
        Some(pb::CircuitBreakers { thresholds: vec![thresholds], ..pb::CircuitBreakers::default() });
    proto
}

fn limit(value: u32) -> Option<wkt::UInt32Value> {
    Some(wkt::UInt32Value { value })
}

#[test]
fn eight_threads_never_hold_one_too_many() {
    const LIMIT: u64 = 5;
    let rig = Rig::new(&with(pb::circuit_breakers::Thresholds {
        max_requests: limit(LIMIT as u32),
        track_remaining: true,
        ..Default::default()
    }));
    let held = AtomicU64::new(0);
    let granted = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            let admission = Arc::clone(&rig.cluster.admission);
            let (held, granted) = (&held, &granted);
            scope.spawn(move || {
                for _ in 0..20_000 {
                    if let Some(permit) = admission.reserve(Priority::Default, Resource::Requests) {
                        assert!(held.fetch_add(1, Ordering::SeqCst) < LIMIT);
                        granted.fetch_add(1, Ordering::Relaxed);
                        held.fetch_sub(1, Ordering::SeqCst);
                        drop(permit);
                    }
                }
            });
        }
    });
    assert!(granted.load(Ordering::Relaxed) > 20_000);
    assert_eq!(rig.cluster.admission.in_use(Priority::Default, Resource::Requests), 0);
    assert_eq!(rig.cluster.admission.active_requests(), 0);
    assert_eq!(rig.stat("circuit_breakers.default.rq_open"), 0);
    assert_eq!(rig.stat("circuit_breakers.default.remaining_rq"), LIMIT);
}

#[test]
fn gauges_show_open_breakers() {
    let rig = Rig::new(&with(pb::circuit_breakers::Thresholds {
        max_connections: limit(1),
        max_pending_requests: limit(0),
        ..Default::default()
    }));
    let admission = &rig.cluster.admission;
    let open = |name: &str| rig.stat(&format!("circuit_breakers.default.{name}"));
    assert!(admission.reserve(Priority::Default, Resource::Pending).is_none());
    assert_eq!((open("cx_open"), open("rq_pending_open")), (0, 0), "nothing was counted yet");
    let permit = admission.reserve(Priority::Default, Resource::Connections);
    assert!(permit.is_some());
    assert_eq!(open("cx_open"), 1);
    assert!(admission.reserve(Priority::Default, Resource::Connections).is_none());
    assert!(admission.reserve(Priority::High, Resource::Connections).is_some(), "priorities are apart");
    drop(admission.reserve_anyway(Priority::Default, Resource::Connections));
    assert_eq!(open("cx_open"), 1);
    drop(permit);
    assert_eq!(open("cx_open"), 0);
}

#[test]
fn what_remains_is_never_less_than_nothing() {
    let rig = Rig::new(&with(pb::circuit_breakers::Thresholds {
        max_connections: limit(1),
        retry_budget: Some(pb::circuit_breakers::thresholds::RetryBudget::default()),
        track_remaining: true,
        ..Default::default()
    }));
    let admission = &rig.cluster.admission;
    let remaining = |name: &str| rig.stat(&format!("circuit_breakers.default.remaining_{name}"));
    assert_eq!((remaining("cx"), remaining("cx_pools"), remaining("retries")), (1, u64::MAX, 3));
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(admission.reserve_anyway(Priority::Default, Resource::Connections));
        assert_eq!(remaining("cx"), 0);
    }
    for expected in [0, 1] {
        held.pop();
        assert_eq!(remaining("cx"), expected);
    }
    let retry = admission.reserve(Priority::Default, Resource::Retries);
    assert_eq!((retry.is_some(), remaining("retries")), (true, 0), "a budget has no fixed rest");
}

#[test]
fn defaults_are_envoys() {
    let rig = Rig::new(&cluster(LbPolicy::RoundRobin, Vec::new()));
    for priority in [Priority::Default, Priority::High] {
        let max = |resource| rig.cluster.admission.max(priority, resource);
        let found = [
            Resource::Connections,
            Resource::Pending,
            Resource::Requests,
            Resource::Retries,
            Resource::Pools,
        ]
        .map(max);
        assert_eq!(found, [1024, 1024, 1024, 3, u64::MAX]);
    }
}

#[test]
fn the_runtime_moves_thresholds() {
    let runtime = Runtime::new();
    let rig = Rig::within(&cluster(LbPolicy::RoundRobin, Vec::new()), &Environment::new(runtime.clone()));
    let admission = &rig.cluster.admission;
    assert!(admission.try_acquire(Priority::Default, Resource::Requests));
    let key = "circuit_breakers.c.default.max_requests".to_owned();
    runtime.set_layers(vec![Layer { name: "test".into(), values: [(key, Value::Number(1.0))].into() }]);
    assert!(!admission.try_acquire(Priority::Default, Resource::Requests));
    assert_eq!(admission.max(Priority::Default, Resource::Requests), 1);
    assert_eq!(admission.max(Priority::High, Resource::Requests), 1024);
}

#[test]
fn a_retry_budget_follows_requests_in_flight() {
    let rig = Rig::new(&with(pb::circuit_breakers::Thresholds {
        retry_budget: Some(pb::circuit_breakers::thresholds::RetryBudget {
            budget_percent: Some(percent(20.0)),
            ..Default::default()
        }),
        ..Default::default()
    }));
    let admission = &rig.cluster.admission;
    assert_eq!(admission.max(Priority::Default, Resource::Retries), 3, "min_retry_concurrency");
    let held: Vec<_> = (0..50).map(|_| admission.reserve(Priority::Default, Resource::Requests)).collect();
    assert_eq!(admission.max(Priority::Default, Resource::Retries), 10);
    let retries: Vec<_> =
        (0..20).filter_map(|_| admission.reserve(Priority::Default, Resource::Retries)).collect();
    assert_eq!(retries.len(), 10);
    drop(held);
    assert!(admission.reserve(Priority::Default, Resource::Retries).is_none());
}

/// A budget against a model of a few lines: requests and retries begin and end in an order drawn at random.
#[test]
fn a_retry_budget_keeps_to_a_simple_model() {
    for seed in 0..200 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (share, minimum) = (rng.u32(0..=100), rng.u32(0..6));
        let rig = Rig::new(&with(pb::circuit_breakers::Thresholds {
            retry_budget: Some(pb::circuit_breakers::thresholds::RetryBudget {
                budget_percent: Some(percent(f64::from(share))),
                min_retry_concurrency: limit(minimum),
                ..Default::default()
            }),
            ..Default::default()
        }));
        let reserve = |resource| rig.cluster.admission.reserve(Priority::Default, resource);
        let (mut requests, mut pending, mut retries) = (Vec::new(), Vec::new(), Vec::new());
        for step in 0..300 {
            let (of, most) = match rng.u8(0..3) {
                0 => ((&mut requests, Resource::Requests), u64::MAX),
                1 => ((&mut pending, Resource::Pending), u64::MAX),
                _ => {
                    let active = (requests.len() + pending.len()) as u64;
                    let most = (active * u64::from(share) / 100).max(u64::from(minimum));
                    ((&mut retries, Resource::Retries), most)
                }
            };
            let (held, resource) = of;
            if rng.bool() && !held.is_empty() {
                let index = rng.usize(..held.len());
                drop(held.swap_remove(index));
                continue;
            }
            let taken = reserve(resource);
            assert_eq!(taken.is_some(), (held.len() as u64) < most, "seed {seed}, step {step}");
            held.extend(taken);
        }
        let in_use = rig.cluster.admission.in_use(Priority::Default, Resource::Retries);
        assert_eq!(in_use, retries.len() as u64, "seed {seed}");
    }
}

/// A cluster is replaced under traffic: what the old one has under way counts, and the gauges follow the new thresholds.
#[test]
fn a_successor_counts_what_is_under_way() {
    let thresholds = |max: u32| {
        with(pb::circuit_breakers::Thresholds {
            max_requests: limit(max),
            track_remaining: true,
            ..Default::default()
        })
    };
    let environment = Environment::new(Runtime::new());
    let mut rig = Rig::within(&thresholds(3), &environment);
    let take = |rig: &Rig| rig.cluster.admission.reserve(Priority::Default, Resource::Requests);
    let shown = |rig: &Rig| {
        let stat = |name: &str| rig.stat(&format!("circuit_breakers.default.{name}"));
        (stat("rq_open"), stat("remaining_rq"))
    };
    let mut held: Vec<_> = (0..3).map(|_| take(&rig).unwrap()).collect();
    assert_eq!(shown(&rig), (1, 0));
    let old = Arc::clone(&rig.cluster);
    let successor = |rig: &Rig, max| {
        let fresh =
            compile_after(&thresholds(max), &environment, &rig.stats, rig.now, &Arc::clone(&rig.cluster));
        Arc::new(fresh)
    };
    // Compiled, not in force: the gauges are still its predecessor's.
    rig.cluster = successor(&rig, 5);
    assert_eq!(shown(&rig), (1, 0));
    rig.cluster.admission.take_over();
    assert_eq!(shown(&rig), (0, 2));
    held.extend([take(&rig).unwrap(), take(&rig).unwrap()]);
    assert!(take(&rig).is_none() && !old.admission.try_acquire(Priority::Default, Resource::Requests));
    assert_eq!(shown(&rig), (1, 0));
    // Fewer than are under way: nothing new until there is room.
    rig.cluster = successor(&rig, 2);
    rig.cluster.admission.take_over();
    assert_eq!(shown(&rig), (1, 0));
    drop(old);
    for left in (0..5).rev() {
        drop(held.remove(0));
        assert_eq!(shown(&rig), (u64::from(left >= 2), 2_u64.saturating_sub(left)), "{left} left");
        assert_eq!(rig.cluster.admission.active_requests(), left);
    }
    assert!(take(&rig).is_some());
}

/// Threads take and give back while the cluster is replaced over and over: never more than the largest bound, and none is
/// left over.
#[test]
fn updates_under_load_leak_nothing() {
    let environment = Environment::new(Runtime::new());
    let thresholds =
        |max: u32| with(pb::circuit_breakers::Thresholds { max_requests: limit(max), ..Default::default() });
    let rig = Rig::within(&thresholds(4), &environment);
    let newest = parking_lot::Mutex::new(Arc::clone(&rig.cluster));
    let (held, most) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (newest, held, most) = (&newest, &held, &most);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut permits = Vec::new();
                for _ in 0..5_000 {
                    if rng.bool() {
                        let cluster = Arc::clone(&newest.lock());
                        let permit = cluster.admission.reserve(Priority::Default, Resource::Requests);
                        if let Some(permit) = permit {
                            most.fetch_max(held.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            permits.push(permit);
                        }
                    } else if !permits.is_empty() {
                        held.fetch_sub(1, Ordering::SeqCst);
                        drop(permits.swap_remove(rng.usize(..permits.len())));
                    }
                }
                held.fetch_sub(permits.len() as u64, Ordering::SeqCst);
            });
        }
        for round in 0..200 {
            let before = Arc::clone(&newest.lock());
            let proto = thresholds(4 - round % 3);
            let fresh = Arc::new(compile_after(&proto, &environment, &rig.stats, rig.now, &before));
            fresh.admission.take_over();
            *newest.lock() = fresh;
        }
    });
    assert!(most.load(Ordering::SeqCst) <= 4);
    let newest = newest.into_inner();
    assert_eq!(newest.admission.active_requests(), 0);
    assert_eq!(rig.stat("circuit_breakers.default.rq_open"), 0);
}

/// Every order in which three workers can take two units and give them back, step by step.
#[test]
fn every_interleaving_of_three_workers() {
    let rig = Rig::new(&with(pb::circuit_breakers::Thresholds {
        max_requests: limit(2),
        track_remaining: true,
        ..Default::default()
    }));
    let admission = &rig.cluster.admission;
    // Each worker: take, give back, take, give back. 12 steps of three workers.
    fn orders(left: [u8; 3], done: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
        if left == [0; 3] {
            return all.push(done.clone());
        }
        for worker in 0..3 {
            if left[worker] > 0 {
                let mut next = left;
                next[worker] -= 1;
                done.push(worker);
                orders(next, done, all);
                done.pop();
            }
        }
    }
    let mut all = Vec::new();
    orders([4; 3], &mut Vec::new(), &mut all);
    assert_eq!(all.len(), 34_650);
    for (number, order) in all.into_iter().enumerate() {
        let mut held = [None, None, None];
        let mut steps = [0; 3];
        for worker in order {
            if steps[worker] % 2 == 0 {
                let others = held.iter().flatten().count();
                held[worker] = admission.reserve(Priority::Default, Resource::Requests);
                assert_eq!(held[worker].is_some(), others < 2);
            } else {
                held[worker] = None;
            }
            steps[worker] += 1;
            let used = held.iter().flatten().count() as u64;
            assert_eq!(admission.in_use(Priority::Default, Resource::Requests), used);
            // Looking up names is slow: not each time.
            if number % 50 == 0 {
                assert_eq!(rig.stat("circuit_breakers.default.remaining_rq"), 2 - used);
                assert_eq!(rig.stat("circuit_breakers.default.rq_open"), u64::from(used == 2));
            }
        }
    }
}

/// With an interval a budget counts requests for as long, done or not.
#[test]
fn a_budget_of_an_interval() {
    let rig = Rig::new(&with(pb::circuit_breakers::Thresholds {
        retry_budget: Some(pb::circuit_breakers::thresholds::RetryBudget {
            budget_percent: Some(percent(50.0)),
            min_retry_concurrency: limit(1),
            budget_interval: Some(crate::support::seconds(600)),
        }),
        ..Default::default()
    }));
    let admission = &rig.cluster.admission;
    (0..10).for_each(|_| drop(admission.reserve(Priority::Default, Resource::Requests)));
    assert_eq!(admission.max(Priority::Default, Resource::Retries), 5);
    assert_eq!(admission.max(Priority::High, Resource::Retries), 3, "the other priority has none");
}
