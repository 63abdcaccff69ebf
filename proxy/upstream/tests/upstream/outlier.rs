//! Outlier detection by a virtual clock: rule by rule, and at random against a simple model.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::LbPolicy;
use envoy_types::pb::google::protobuf as wkt;
use parking_lot::Mutex;
use waystation_filter_api::runtime::{Layer, Runtime};
use waystation_filter_api::value::Value;
use waystation_upstream::cluster::Environment;
use waystation_upstream::host::HealthFlag;
use waystation_upstream::outlier::{Crossing, Ejection, Event, LocalOrigin};
use waystation_upstream::{Cluster, Host};

use crate::support::{Rig, assignment, cluster, endpoint, locality, seconds};

/// A cluster with detection, and what its workers have reported.
struct Detection {
    rig: Rig,
    reported: Arc<Mutex<Vec<Crossing>>>,
    runtime: Runtime,
    environment: Arc<Environment>,
}

fn number(value: u32) -> Option<wkt::UInt32Value> {
    Some(wkt::UInt32Value { value })
}

fn proto(hosts: u8, detection: pb::OutlierDetection) -> pb::Cluster {
    let mut proto =
        cluster(LbPolicy::RoundRobin, vec![locality("", 0, 0, (0..hosts).map(endpoint).collect())]);
    proto.outlier_detection = Some(detection);
    proto
}

impl Detection {
    fn new(hosts: u8, detection: pb::OutlierDetection) -> Self {
        let reported: Arc<Mutex<Vec<Crossing>>> = Arc::default();
        let queue = Arc::clone(&reported);
        let runtime = Runtime::new();
        let environment = Arc::new(Environment {
            runtime: runtime.clone(),
            locality: Default::default(),
            local_cluster: None,
            bind: None,
            resolver: Default::default(),
            outliers: Arc::new(move |crossing| queue.lock().push(crossing)),
        });
        let rig = Rig::within(&proto(hosts, detection), &environment);
        Self { rig, reported, runtime, environment }
    }

    fn cluster(&self) -> &Cluster {
        &self.rig.cluster
    }

    fn host(&self, index: usize) -> Arc<Host> {
        Arc::clone(&self.rig.hosts()[index])
    }

    fn answers(&self, index: usize, status: u16, times: usize) {
        let host = self.host(index);
        (0..times).for_each(|_| self.cluster().answered(&host, status));
    }

    fn local(&self, index: usize, event: LocalOrigin, times: usize) {
        let host = self.host(index);
        (0..times).for_each(|_| self.cluster().local_origin(&host, event));
    }

    /// The main thread's turn.
    fn decide(&mut self) -> Vec<Event> {
        let crossings = std::mem::take(&mut *self.reported.lock());
        self.rig.cluster.on_outlier_crossings(&crossings, self.rig.now, &mut self.rig.rng)
    }

    fn interval(&mut self, passed: Duration) -> Vec<Event> {
        self.rig.advance(passed);
        self.rig.cluster.on_outlier_interval(self.rig.now, &mut self.rig.rng)
    }

    fn ejected(&self) -> Vec<usize> {
        let hosts = self.rig.hosts();
        (0..hosts.len()).filter(|i| hosts[*i].has_flag(HealthFlag::FailedOutlierCheck)).collect()
    }

    fn stat(&self, name: &str) -> u64 {
        self.rig.stat(&format!("outlier_detection.ejections_{name}"))
    }

    fn set(&self, key: &str, value: f64) {
        let values = [(format!("outlier_detection.{key}"), Value::Number(value))].into();
        self.runtime.set_layers(vec![Layer { name: "test".into(), values }]);
    }
}

fn always() -> pb::OutlierDetection {
    pb::OutlierDetection { max_ejection_percent: number(100), ..Default::default() }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn the_fifth_5xx_in_a_row_ejects() {
    let mut detection = Detection::new(3, always());
    detection.answers(1, 500, 4);
    detection.answers(1, 404, 1);
    detection.answers(1, 500, 4);
    assert!(detection.decide().is_empty());
    detection.answers(1, 500, 1);
    let events = detection.decide();
    assert_eq!(events[0].ejection(), Some(Ejection::Consecutive5xx));
    assert_eq!(detection.ejected(), [1]);
    assert_eq!(
        (detection.stat("active"), detection.stat("enforced_total"), detection.stat("total")),
        (1, 1, 1)
    );
    assert_eq!(detection.rig.stat("membership_healthy"), 2);
    // Balancers know at once.
    assert_eq!(detection.rig.spread(&Default::default(), 10).into_keys().collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn the_event_log_reads_as_envoys() {
    let mut detection = Detection::new(1, always());
    let wall = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_291_707_741);
    detection.answers(0, 500, 5);
    let ejected = detection.decide();
    assert_eq!(
        ejected[0].to_json(wall),
        r#"{"type":"CONSECUTIVE_5XX","timestamp":"2026-11-21T20:08:27.741Z","cluster_name":"c","upstream_url":"10.0.0.0:80","action":"EJECT","num_ejections":1,"enforced":true,"eject_consecutive_event":{}}"#
    );
    let back = detection.interval(30 * SECOND);
    assert_eq!(
        back[0].to_json(wall),
        r#"{"type":"CONSECUTIVE_5XX","timestamp":"2026-11-21T20:08:27.741Z","secs_since_last_action":"30","cluster_name":"c","upstream_url":"10.0.0.0:80","action":"UNEJECT","num_ejections":1,"enforced":false}"#
    );
}

#[test]
fn rates_of_the_event_log() {
    let mut detection = Detection::new(
        5,
        pb::OutlierDetection {
            success_rate_request_volume: number(4),
            success_rate_stdev_factor: number(1000),
            consecutive_5xx: number(0),
            ..always()
        },
    );
    (0..4).for_each(|host| detection.answers(host, 200, 4));
    detection.answers(4, 500, 2);
    detection.answers(4, 200, 2);
    let events = detection.interval(10 * SECOND);
    // Four times 100 and once 50: mean 90, deviation 20.
    let line = events[0].to_json(SystemTime::UNIX_EPOCH);
    assert!(line.contains(r#""type":"SUCCESS_RATE""#), "{line}");
    assert!(
        line.ends_with(
            r#""eject_success_rate_event":{"host_success_rate":50,"cluster_average_success_rate":90,"cluster_success_rate_ejection_threshold":70}}"#
        ),
        "{line}"
    );
    assert_eq!(detection.ejected(), [4]);
    assert_eq!(detection.host(4).success_rates(), (50.0, -1.0));
    detection.interval(10 * SECOND);
    assert_eq!(detection.host(0).success_rates(), (-1.0, -1.0), "an interval without requests");
}

#[test]
fn gateway_failures_are_of_three_statuses() {
    let settings = pb::OutlierDetection {
        consecutive_gateway_failure: number(3),
        enforcing_consecutive_gateway_failure: number(100),
        consecutive_5xx: number(0),
        ..always()
    };
    let mut detection = Detection::new(4, settings);
    for (host, statuses) in
        [[502, 503, 504], [502, 500, 504], [502, 200, 504], [503, 503, 501]].iter().enumerate()
    {
        statuses.iter().for_each(|status| detection.answers(host, *status, 1));
    }
    let events = detection.decide();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].ejection(), Some(Ejection::ConsecutiveGatewayFailure));
    assert_eq!(detection.ejected(), [0]);
    assert_eq!(detection.stat("total"), 0, "the old counter knows only 5xx and success rates");
}

#[test]
fn what_happens_here_is_an_answer_unless_split() {
    let mut detection = Detection::new(2, always());
    detection.local(0, LocalOrigin::ConnectFailed, 3);
    detection.local(0, LocalOrigin::Connected, 1);
    detection.local(0, LocalOrigin::TimedOut(504), 2);
    detection.local(1, LocalOrigin::ConnectFailed, 4);
    detection.local(1, LocalOrigin::TimedOut(204), 1);
    detection.local(1, LocalOrigin::ConnectFailed, 4);
    detection.local(1, LocalOrigin::ConnectedFinally, 1);
    detection.local(1, LocalOrigin::ConnectFailed, 4);
    let events = detection.decide();
    assert_eq!(events[0].ejection(), Some(Ejection::ConsecutiveGatewayFailure), "which is not enforced");
    assert_eq!(events[1].ejection(), Some(Ejection::Consecutive5xx));
    assert_eq!(detection.ejected(), [0]);

    let split = pb::OutlierDetection { split_external_local_origin_errors: true, ..always() };
    let mut detection = Detection::new(2, split);
    detection.local(0, LocalOrigin::ConnectFailed, 4);
    detection.answers(0, 503, 4);
    detection.local(1, LocalOrigin::ConnectFailed, 4);
    detection.local(1, LocalOrigin::Connected, 1);
    detection.local(1, LocalOrigin::TimedOut(504), 4);
    assert!(detection.decide().is_empty());
    detection.local(0, LocalOrigin::TimedOut(504), 1);
    assert_eq!(detection.decide()[0].ejection(), Some(Ejection::ConsecutiveLocalOriginFailure));
    assert_eq!(detection.ejected(), [0]);
    assert_eq!(detection.stat("enforced_consecutive_local_origin_failure"), 1);
}

#[test]
fn failure_percentages() {
    let settings = pb::OutlierDetection {
        consecutive_5xx: number(0),
        enforcing_failure_percentage: number(100),
        enforcing_success_rate: number(0),
        failure_percentage_minimum_hosts: number(2),
        failure_percentage_request_volume: number(10),
        failure_percentage_threshold: number(50),
        ..always()
    };
    let mut detection = Detection::new(3, settings);
    detection.answers(0, 200, 6);
    detection.answers(0, 503, 4);
    detection.answers(1, 200, 5);
    detection.answers(1, 503, 5);
    detection.answers(2, 503, 9);
    let events = detection.interval(10 * SECOND);
    assert_eq!(events.len(), 1, "one is below the threshold, one had too few requests");
    assert!(
        events[0]
            .to_json(SystemTime::UNIX_EPOCH)
            .ends_with(r#""eject_failure_percentage_event":{"host_success_rate":50}}"#)
    );
    assert_eq!(detection.ejected(), [1]);
}

#[test]
fn two_rules_eject_a_host_once() {
    let settings = pb::OutlierDetection {
        consecutive_5xx: number(0),
        success_rate_minimum_hosts: number(2),
        success_rate_request_volume: number(4),
        success_rate_stdev_factor: number(500),
        enforcing_failure_percentage: number(100),
        failure_percentage_minimum_hosts: number(1),
        failure_percentage_request_volume: number(2),
        failure_percentage_threshold: number(50),
        ..always()
    };
    let mut detection = Detection::new(2, settings);
    detection.answers(0, 500, 8);
    detection.answers(1, 200, 8);
    assert_eq!(detection.interval(SECOND).len(), 1);
    assert_eq!((detection.stat("active"), detection.stat("enforced_total")), (1, 1));
    assert_eq!(
        (detection.stat("detected_success_rate"), detection.stat("detected_failure_percentage")),
        (1, 1)
    );
    detection.interval(30 * SECOND);
    assert_eq!(detection.stat("active"), 0);
}

#[test]
fn no_more_than_the_percentage_and_one_if_asked() {
    let mut detection =
        Detection::new(10, pb::OutlierDetection { max_ejection_percent: number(25), ..always() });
    (0..5).for_each(|host| detection.answers(host, 500, 5));
    detection.decide();
    assert_eq!(detection.ejected(), [0, 1]);
    assert_eq!((detection.stat("overflow"), detection.stat("active")), (3, 2));

    // By default ten percent: of fewer than ten hosts none, unless one always is.
    let mut detection = Detection::new(3, pb::OutlierDetection::default());
    detection.answers(0, 500, 5);
    detection.decide();
    assert_eq!((detection.ejected().len(), detection.stat("overflow")), (0, 1));
    let one = pb::OutlierDetection {
        always_eject_one_host: Some(wkt::BoolValue { value: true }),
        ..Default::default()
    };
    let mut detection = Detection::new(3, one);
    detection.answers(0, 500, 5);
    detection.answers(1, 500, 5);
    detection.decide();
    assert_eq!((detection.ejected(), detection.stat("overflow")), (vec![0], 1));
}

#[test]
fn times_out_grow_and_shrink() {
    let settings = pb::OutlierDetection {
        base_ejection_time: Some(seconds(10)),
        max_ejection_time: Some(seconds(25)),
        interval: Some(seconds(1)),
        ..always()
    };
    let mut detection = Detection::new(1, settings);
    let mut times = Vec::new();
    for _ in 0..4 {
        detection.answers(0, 500, 5);
        detection.decide();
        let mut time = 0;
        while !detection.ejected().is_empty() {
            detection.interval(SECOND);
            time += 1;
        }
        times.push(time);
    }
    assert_eq!(times, [10, 20, 25, 25]);
    // Each interval in peace takes one step back; the first follows its return by an interval.
    (0..3).for_each(|_| drop(detection.interval(SECOND)));
    detection.answers(0, 500, 5);
    detection.decide();
    detection.interval(19 * SECOND);
    assert_eq!(detection.ejected(), [0]);
    detection.interval(SECOND);
    assert!(detection.ejected().is_empty());
}

#[test]
fn jitter_only_adds() {
    let settings = pb::OutlierDetection { max_ejection_time_jitter: Some(seconds(20)), ..always() };
    let mut detection = Detection::new(50, settings);
    (0..50).for_each(|host| detection.answers(host, 500, 5));
    detection.decide();
    detection.interval(Duration::from_millis(29_999));
    assert_eq!(detection.ejected().len(), 50);
    detection.interval(10 * SECOND);
    let left = detection.ejected().len();
    assert!((10..40).contains(&left), "{left}");
    detection.interval(11 * SECOND);
    assert!(detection.ejected().is_empty());
}

#[test]
fn enforcing_is_a_share_and_the_rest_is_logged() {
    let settings = pb::OutlierDetection { enforcing_consecutive_5xx: number(30), ..always() };
    let mut detection = Detection::new(200, settings);
    (0..200).for_each(|host| detection.answers(host, 500, 5));
    assert_eq!(detection.decide().len(), 200);
    let ejected = detection.ejected().len();
    assert!((40..80).contains(&ejected), "{ejected}");
    assert_eq!(detection.stat("detected_consecutive_5xx"), 200);
    assert_eq!(detection.stat("enforced_consecutive_5xx"), ejected as u64);
    // Who was spared starts anew.
    let spared = (0..200).find(|host| !detection.ejected().contains(host)).unwrap();
    detection.answers(spared, 500, 4);
    assert!(detection.decide().is_empty());
    detection.answers(spared, 500, 1);
    assert_eq!(detection.decide().len(), 1);
}

#[test]
fn the_runtime_overrides() {
    let mut detection = Detection::new(2, always());
    detection.set("consecutive_5xx", 2.0);
    detection.answers(0, 500, 2);
    detection.decide();
    assert_eq!(detection.ejected(), [0]);
    detection.set("base_ejection_time_ms", 500.0);
    detection.interval(SECOND / 2);
    assert!(detection.ejected().is_empty());
    detection.set("enforcing_consecutive_5xx", 0.0);
    detection.answers(1, 500, 5);
    assert_eq!((detection.decide().len(), detection.ejected().len()), (1, 0));
    detection.set("interval_ms", 123.0);
    let detector = detection.cluster().outlier_detection.as_ref().unwrap();
    assert_eq!(detector.interval(), Duration::from_millis(123));
}

#[test]
fn degraded_hosts_come_back_by_time() {
    let settings = pb::OutlierDetection {
        detect_degraded_hosts: Some(wkt::BoolValue { value: true }),
        base_ejection_time: Some(seconds(5)),
        ..always()
    };
    let mut detection = Detection::new(2, settings);
    let host = detection.host(0);
    let detector = || detection.rig.cluster.outlier_detection.as_ref().unwrap();
    detector().degraded(&host);
    detector().degraded(&host);
    let events = detection.decide();
    assert_eq!((events.len(), events[0].ejection()), (1, Some(Ejection::Degraded)));
    assert_eq!((detection.stat("detected_degradation"), detection.stat("active")), (1, 0));
    assert_eq!(detection.rig.stat("membership_degraded"), 1);
    detection.interval(4 * SECOND);
    assert_eq!(detection.rig.stat("membership_degraded"), 1);
    detection.interval(SECOND);
    assert_eq!(detection.rig.stat("membership_degraded"), 0);
}

#[test]
fn a_passed_check_ends_an_ejection() {
    let mut detection = Detection::new(2, always());
    detection.answers(0, 500, 5);
    detection.decide();
    let passed = |detection: &Detection| {
        let detector = detection.cluster().outlier_detection.as_ref().unwrap();
        (0..2).for_each(|host| detector.check_passed(&detection.host(host)));
    };
    passed(&detection);
    assert_eq!(detection.decide().len(), 1);
    assert_eq!((detection.ejected().len(), detection.stat("active")), (0, 0));
    let deaf = pb::OutlierDetection {
        successful_active_health_check_uneject_host: Some(wkt::BoolValue { value: false }),
        ..always()
    };
    let mut detection = Detection::new(2, deaf);
    detection.answers(0, 500, 5);
    detection.decide();
    passed(&detection);
    assert!(detection.decide().is_empty());
    assert_eq!(detection.ejected(), [0]);
}

#[test]
fn ejections_outlive_updates() {
    let mut detection = Detection::new(3, always());
    detection.answers(0, 500, 5);
    detection.decide();
    let hosts = |octets: std::ops::Range<u8>| {
        let proto = assignment(vec![locality("", 0, 0, octets.map(endpoint).collect())]);
        waystation_upstream::discovery::Assignment::compile(&proto).unwrap()
    };
    // Another host comes, the ejected one stays.
    detection.cluster().apply(&hosts(0..4), detection.rig.now);
    assert_eq!((detection.ejected(), detection.stat("active")), (vec![0], 1));
    // The cluster is replaced: what its hosts have done goes with them.
    detection.answers(1, 500, 4);
    let old = Arc::clone(&detection.rig.cluster);
    let fresh = crate::support::compile_after(
        &proto(3, pb::OutlierDetection { base_ejection_time: Some(seconds(60)), ..always() }),
        &detection.environment,
        &detection.rig.stats,
        detection.rig.now,
        &old,
    );
    detection.rig.cluster = Arc::new(fresh);
    assert_eq!((detection.ejected(), detection.stat("active")), (vec![0], 1));
    detection.answers(1, 500, 1);
    detection.decide();
    assert_eq!(detection.ejected(), [0, 1]);
    // What was decided between the making of the new one and its coming into force.
    old.on_outlier_interval(detection.rig.now + 30 * SECOND, &mut detection.rig.rng);
    detection.cluster().adopt_ejections();
    assert_eq!(detection.ejected(), [1]);
    // The ejected host leaves.
    detection.answers(2, 500, 5);
    detection.decide();
    assert_eq!(detection.stat("active"), 2);
    detection.cluster().apply(&hosts(0..2), detection.rig.now);
    assert_eq!(detection.stat("active"), 1);
}

#[test]
fn what_is_reported_while_the_cluster_is_replaced_counts() {
    let mut detection = Detection::new(3, always());
    detection.answers(1, 500, 5);
    let fresh = crate::support::compile_after(
        &proto(3, always()),
        &detection.environment,
        &detection.rig.stats,
        detection.rig.now,
        &detection.rig.cluster,
    );
    detection.rig.cluster = Arc::new(fresh);
    assert_eq!(detection.decide().len(), 1);
    assert_eq!(detection.ejected(), [1]);
    // And the next bout is reported again.
    detection.interval(30 * SECOND);
    assert!(detection.ejected().is_empty());
    detection.answers(1, 500, 5);
    detection.decide();
    assert_eq!(detection.ejected(), [1]);
}

#[test]
fn all_ejected_is_panic() {
    let mut detection = Detection::new(2, always());
    (0..2).for_each(|host| detection.answers(host, 500, 5));
    detection.decide();
    assert_eq!(detection.ejected(), [0, 1]);
    assert_eq!(detection.rig.spread(&Default::default(), 10).len(), 2, "then all are used");
    assert!(detection.rig.stat("lb_healthy_panic") > 0);
}

/// Eight threads fail on one host: just one of them reports, and no failure is lost.
#[test]
fn workers_share_the_counts() {
    for round in 0..50 {
        let detection = Detection::new(1, pb::OutlierDetection { consecutive_5xx: number(400), ..always() });
        let (host, cluster) = (detection.host(0), &detection.rig.cluster);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..50).for_each(|_| cluster.answered(&host, 500)));
            }
        });
        assert_eq!(detection.reported.lock().len(), 1, "round {round}");
    }
}

/// What a host is to the model.
#[derive(Clone, Debug, Default)]
struct Model {
    fives: u32,
    gateways: u32,
    locals: u32,
    /// Of this interval: good and bad, answers and connects.
    tally: [[u64; 2]; 2],
    ejected_at: Option<u64>,
    back_at: Option<u64>,
    out: bool,
    times: u64,
}

/// Random traffic, random clock. The model knows nothing of atomics, bits, differences or caches.
#[test]
fn random_traffic_does_what_the_model_does() {
    let seeds = match std::env::var("SEED") {
        Ok(seed) => seed.parse::<u64>().map(|seed| seed..seed + 1).unwrap(),
        Err(_) => 0..300,
    };
    for seed in seeds {
        simulate(seed);
    }
}

fn simulate(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let hosts = random.usize(1..8);
    let split = random.bool();
    let [fives, gateways, locals] = [random.u32(0..5), random.u32(0..5), random.u32(0..5)];
    let max_percent = random.u32(0..=100);
    let one = random.bool();
    let (base, max) = (random.i64(1..20), random.i64(20..60));
    let (min_hosts, volume, factor) = (random.u32(1..4), random.u32(1..10), random.u32(0..2000));
    let threshold = random.u32(1..=100);
    let on = |random: &mut fastrand::Rng| if random.bool() { 100 } else { 0 };
    let enforcing: [u32; 7] = std::array::from_fn(|_| on(&mut random));
    let settings = pb::OutlierDetection {
        consecutive_5xx: number(fives),
        consecutive_gateway_failure: number(gateways),
        consecutive_local_origin_failure: number(locals),
        interval: Some(seconds(1)),
        base_ejection_time: Some(seconds(base)),
        max_ejection_time: Some(seconds(max)),
        max_ejection_percent: number(max_percent),
        always_eject_one_host: Some(wkt::BoolValue { value: one }),
        split_external_local_origin_errors: split,
        success_rate_minimum_hosts: number(min_hosts),
        success_rate_request_volume: number(volume),
        success_rate_stdev_factor: number(factor),
        failure_percentage_minimum_hosts: number(min_hosts),
        failure_percentage_request_volume: number(volume),
        failure_percentage_threshold: number(threshold),
        enforcing_consecutive_5xx: number(enforcing[0]),
        enforcing_consecutive_gateway_failure: number(enforcing[1]),
        enforcing_success_rate: number(enforcing[2]),
        enforcing_consecutive_local_origin_failure: number(enforcing[3]),
        enforcing_local_origin_success_rate: number(enforcing[4]),
        enforcing_failure_percentage: number(enforcing[5]),
        enforcing_failure_percentage_local_origin: number(enforcing[6]),
        ..Default::default()
    };
    let mut detection = Detection::new(hosts as u8, settings);
    let mut model = vec![Model::default(); hosts];
    let mut clock = 0;
    let (mut overflow, mut enforced) = (0, 0);
    let eject = |model: &mut [Model],
                 host: usize,
                 kind: usize,
                 clock: u64,
                 overflow: &mut u64,
                 enforced: &mut u64| {
        if model[host].out {
            return;
        }
        let out = model.iter().filter(|host| host.out).count();
        let share = 100.0 * (out + 1) as f64 / model.len() as f64;
        if share > f64::from(max_percent) && !(one && out == 0) {
            *overflow += 1;
        } else if enforcing[kind] == 100 {
            *enforced += 1;
            let host = &mut model[host];
            host.out = true;
            host.ejected_at = Some(clock);
            if host.times * (base as u64) < (max + base) as u64 {
                host.times += 1;
            }
        }
    };
    for step in 0..400 {
        let at = || format!("seed {seed}, step {step}");
        let host = random.usize(0..hosts);
        let status = [200, 200, 404, 500, 501, 502, 503, 504][random.usize(0..8)];
        let mut crossed = Vec::new();
        let mut answer = |model: &mut [Model], status: u16| {
            let host = &mut model[host];
            if status < 500 {
                (host.fives, host.gateways) = (0, 0);
                host.tally[0][0] += 1;
                return;
            }
            host.tally[0][1] += 1;
            host.gateways = if (502..=504).contains(&status) { host.gateways + 1 } else { 0 };
            if host.gateways > 0 && host.gateways == gateways {
                crossed.push(1);
            }
            host.fives += 1;
            if host.fives == fives {
                crossed.push(0);
            }
        };
        match random.u32(0..20) {
            0..10 => {
                detection.answers(host, status, 1);
                answer(&mut model, status);
            }
            10..17 => {
                let event = [
                    LocalOrigin::Connected,
                    LocalOrigin::ConnectedFinally,
                    LocalOrigin::ConnectFailed,
                    LocalOrigin::TimedOut(504),
                ][random.usize(0..4)];
                detection.local(host, event, 1);
                let good = matches!(event, LocalOrigin::Connected | LocalOrigin::ConnectedFinally);
                if split {
                    let host = &mut model[host];
                    host.tally[1][usize::from(!good)] += 1;
                    host.locals = if good { 0 } else { host.locals + 1 };
                    if !good && host.locals == locals {
                        crossed.push(3);
                    }
                } else {
                    match event {
                        LocalOrigin::Connected => {}
                        LocalOrigin::ConnectedFinally => answer(&mut model, 200),
                        LocalOrigin::ConnectFailed => answer(&mut model, 503),
                        LocalOrigin::TimedOut(status) => answer(&mut model, status),
                    }
                }
            }
            _ => {
                let passed = random.u64(1..15);
                clock += passed;
                detection.interval(Duration::from_secs(passed));
                for host in &mut model {
                    let time = (host.times * base as u64).min(max as u64);
                    if host.out && clock - host.ejected_at.unwrap() >= time {
                        (host.out, host.back_at) = (false, Some(clock));
                        (host.fives, host.gateways, host.locals) = (0, 0, 0);
                    }
                }
                for (origin, kinds) in [(0, [2, 5]), (1, [4, 6])] {
                    if hosts < min_hosts as usize {
                        continue;
                    }
                    let rates: Vec<(usize, f64)> = (0..hosts)
                        .filter(|host| !model[*host].out)
                        .filter_map(|host| {
                            let [good, bad] = model[host].tally[origin];
                            let enough = good + bad >= u64::from(volume).max(1);
                            enough.then(|| (host, good as f64 * 100.0 / (good + bad) as f64))
                        })
                        .collect();
                    if rates.is_empty() || rates.len() < min_hosts as usize {
                        continue;
                    }
                    let count = rates.len() as f64;
                    let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / count;
                    let variance = rates.iter().map(|(_, rate)| (rate - mean).powi(2)).sum::<f64>() / count;
                    let bound = mean - f64::from(factor) / 1000.0 * variance.sqrt();
                    for (host, _) in rates.iter().filter(|(_, rate)| *rate < bound) {
                        eject(&mut model, *host, kinds[0], clock, &mut overflow, &mut enforced);
                    }
                    for (host, _) in rates.iter().filter(|(_, rate)| 100.0 - rate >= f64::from(threshold)) {
                        eject(&mut model, *host, kinds[1], clock, &mut overflow, &mut enforced);
                    }
                }
                for host in &mut model {
                    host.tally = Default::default();
                    if !host.out && host.back_at.is_some_and(|back| clock - back >= 1) {
                        host.times = host.times.saturating_sub(1);
                    }
                }
            }
        }
        detection.decide();
        for kind in crossed {
            if !model[host].out {
                eject(&mut model, host, kind, clock, &mut overflow, &mut enforced);
                match kind {
                    0 => model[host].fives = 0,
                    1 => model[host].gateways = 0,
                    _ => model[host].locals = 0,
                }
            }
        }
        let out: Vec<usize> = (0..hosts).filter(|host| model[*host].out).collect();
        assert_eq!(detection.ejected(), out, "{}", at());
        assert_eq!(detection.stat("active"), out.len() as u64, "{}", at());
        assert_eq!(detection.stat("enforced_total"), enforced, "{}", at());
        assert_eq!(detection.stat("overflow"), overflow, "{}", at());
        assert_eq!(detection.rig.stat("membership_healthy"), (hosts - out.len()) as u64, "{}", at());
    }
}
