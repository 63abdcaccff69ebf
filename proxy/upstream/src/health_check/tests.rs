use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3 as pb;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::Runtime;

use super::{Answer, Event, Failure, Session, Settings};
use crate::host::HealthFlag;

const FAILED: u32 = HealthFlag::FailedActiveHc as u32;
const PENDING: u32 = HealthFlag::PendingActiveHc as u32;

fn millis(millis: i64) -> Option<wkt::Duration> {
    Some(wkt::Duration { seconds: millis / 1000, nanos: i32::try_from(millis % 1000).unwrap() * 1_000_000 })
}

fn settings(change: impl FnOnce(&mut pb::HealthCheck)) -> Settings {
    let mut proto = pb::HealthCheck {
        timeout: millis(100),
        interval: millis(1000),
        no_traffic_interval: millis(60_000),
        unhealthy_interval: millis(2000),
        unhealthy_edge_interval: millis(200),
        healthy_edge_interval: millis(300),
        unhealthy_threshold: Some(wkt::UInt32Value { value: 3 }),
        healthy_threshold: Some(wkt::UInt32Value { value: 2 }),
        ..pb::HealthCheck::default()
    };
    change(&mut proto);
    Settings::compile(&proto, &Runtime::new()).unwrap()
}

/// A host under check, on a clock of its own.
struct Host {
    settings: Settings,
    session: Session,
    flags: u32,
    random: fastrand::Rng,
    now: Instant,
    traffic: bool,
}

impl Host {
    fn new(settings: Settings, flags: u32, seed: u64) -> Self {
        let (mut random, now) = (fastrand::Rng::with_seed(seed), Instant::now());
        let session = Session::new(&settings, &mut random, now);
        Self { settings, session, flags, random, now, traffic: true }
    }

    /// One check that takes `took`; gives the time until the next and what happened.
    fn check(&mut self, answer: Answer, took: Duration) -> (Duration, Vec<Event>) {
        self.now = self.session.due();
        self.session.begin(&self.settings, self.now);
        assert_eq!(self.session.due(), self.now + self.settings.timeout);
        self.now += took;
        let Self { settings, session, flags, random, now, traffic } = self;
        let verdict = session.answered(settings, answer, *flags, *traffic, random, *now);
        *flags = *flags & !verdict.clear | verdict.set;
        (session.due() - *now, verdict.events.to_vec())
    }

    fn failed(&self) -> bool {
        self.flags & FAILED != 0
    }
}

const GOOD: Answer = Answer::Healthy { degraded: false };
const SILENT: Answer = Answer::Failed(Failure::Timeout);
const BAD: Answer = Answer::Failed(Failure::Active { retriable: false, excluded: false, status: 500 });
const SOON: Duration = Duration::from_millis(5);

#[test]
fn intervals_follow_what_is_known() {
    let mut host = Host::new(settings(|_| ()), FAILED | PENDING, 1);
    let mut wait = |answer, expected: u64| {
        assert_eq!(host.check(answer, SOON).0, Duration::from_millis(expected));
        host.failed()
    };
    assert!(!wait(GOOD, 1000), "the first answer decides");
    assert!(!wait(SILENT, 200));
    assert!(!wait(SILENT, 200));
    assert!(wait(SILENT, 2000));
    assert!(wait(SILENT, 2000));
    assert!(wait(GOOD, 300));
    assert!(wait(SILENT, 2000), "which counts anew");
    assert!(wait(GOOD, 300));
    assert!(!wait(GOOD, 1000));
    assert!(!wait(SILENT, 200));
    assert!(!wait(GOOD, 1000), "a success counts failures anew");
    assert!(wait(BAD, 2000), "what a host says of itself is believed");
    host.traffic = false;
    assert_eq!(host.check(SILENT, SOON).0, Duration::from_secs(60));
}

#[test]
fn a_retriable_answer_is_counted() {
    let again = Answer::Failed(Failure::Active { retriable: true, excluded: false, status: 503 });
    let mut host = Host::new(settings(|_| ()), 0, 1);
    for failed in [false, false, true] {
        host.check(again, SOON);
        assert_eq!(host.failed(), failed);
    }
}

#[test]
fn degradation_is_beside_health() {
    let mut host = Host::new(settings(|_| ()), FAILED, 1);
    let degraded = Answer::Healthy { degraded: true };
    assert_eq!(host.check(degraded, SOON).1, [Event::AddHealthy { first_check: true }, Event::Degraded]);
    assert_eq!(host.check(degraded, SOON).1, []);
    assert_eq!(host.check(GOOD, SOON).1, [Event::NoLongerDegraded]);
}

#[test]
fn traffic_fails_a_host_at_once_and_moves_no_check() {
    let mut host = Host::new(settings(|_| ()), 0, 1);
    host.check(GOOD, SOON);
    let due = host.session.due();
    let verdict = host.session.failed_by_traffic(&host.settings, host.flags);
    assert!(verdict.changed);
    assert_eq!(verdict.set, FAILED | HealthFlag::ExcludedViaImmediateHcFail as u32);
    assert_eq!(host.session.due(), due);
    host.flags |= verdict.set;
    host.check(GOOD, SOON);
    host.check(GOOD, SOON);
    assert_eq!(host.flags, 0, "passing checks bring it back");
}

#[test]
fn jitter_stays_within_its_bounds() {
    for seed in 0..200 {
        let mut host = Host::new(
            settings(|proto| {
                proto.initial_jitter = millis(500);
                proto.interval_jitter = millis(100);
                proto.interval_jitter_percent = 50;
            }),
            0,
            seed,
        );
        let first = host.session.due() - host.now;
        assert!(first < Duration::from_millis(500), "seed {seed}: {first:?}");
        let wait = host.check(GOOD, SOON).0;
        let (least, most) = (Duration::from_millis(1000), Duration::from_millis(1000 + 499 + 99));
        assert!((least..=most).contains(&wait), "seed {seed}: {wait:?}");
    }
}

/// A simple model of a host: the last answers, looked at anew each time.
#[derive(Default)]
struct Model {
    healthy: bool,
    history: Vec<Answer>,
}

impl Model {
    fn answer(&mut self, answer: Answer, settings: &Settings) {
        self.history.push(answer);
        let last = |wanted: bool| {
            self.history.iter().rev().take_while(|a| matches!(a, Answer::Healthy { .. }) == wanted).count()
        };
        match answer {
            Answer::Healthy { .. } if !self.healthy => {
                self.healthy = self.history.len() == 1 || last(true) >= settings.healthy_threshold as usize;
            }
            Answer::Failed(Failure::Active { retriable: false, .. }) => self.healthy = false,
            Answer::Failed(_) if self.healthy => {
                self.healthy = last(false) < settings.unhealthy_threshold as usize;
            }
            _ => {}
        }
    }
}

#[test]
fn random_answers_agree_with_the_model() {
    let mut changes = 0;
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (up, down) = (random.u32(1..5), random.u32(1..5));
        let settings = settings(|proto| {
            proto.healthy_threshold = Some(wkt::UInt32Value { value: up });
            proto.unhealthy_threshold = Some(wkt::UInt32Value { value: down });
        });
        let mut host = Host::new(settings, FAILED, seed);
        let mut model = Model::default();
        for step in 0..200 {
            let answer = match random.u32(0..10) {
                0..5 => GOOD,
                5 => BAD,
                6 => Answer::Failed(Failure::Network),
                7 => Answer::Failed(Failure::Active { retriable: true, excluded: false, status: 503 }),
                _ => SILENT,
            };
            let took = if answer == SILENT { host.settings.timeout } else { SOON };
            let before = host.failed();
            let (wait, events) = host.check(answer, took);
            model.answer(answer, &host.settings);
            assert_eq!(host.failed(), !model.healthy, "seed {seed} step {step}");
            let told = events
                .iter()
                .filter(|event| matches!(event, Event::AddHealthy { .. } | Event::EjectUnhealthy(_)))
                .count();
            assert_eq!(told, usize::from(before != host.failed()), "seed {seed} step {step}");
            assert!(wait >= Duration::from_millis(200), "seed {seed} step {step}: {wait:?}");
            changes += told;
        }
    }
    assert!(changes > 1000, "{changes}");
}
