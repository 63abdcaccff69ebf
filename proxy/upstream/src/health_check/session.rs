//! The checks of one host, decided without clock or socket.

use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::Settings;
use crate::host::HealthFlag;

/// What came of a check, or what traffic says of the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// As expected.
    Healthy {
        /// It says that it is degraded (`x-envoy-degraded`).
        degraded: bool,
    },
    /// Not as expected, or none.
    Failed(Failure),
}

/// Why a check failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Failure {
    /// The host's answer says so.
    Active {
        /// One such answer is not enough (`retriable_statuses`).
        retriable: bool,
        /// The host takes itself out (`x-envoy-immediate-health-check-fail`).
        excluded: bool,
        /// The HTTP status, zero when it was none that failed it.
        status: u16,
    },
    /// An ordinary response said that the host is to get no more (`x-envoy-immediate-health-check-fail`).
    Passive,
    /// No connection, or none any more.
    Network,
    /// No answer in time.
    Timeout,
}

/// What is worth a line of the event log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// The host has become unhealthy.
    EjectUnhealthy(Failure),
    /// The host has become healthy.
    AddHealthy {
        /// By its first check.
        first_check: bool,
    },
    /// A check failed.
    Failure {
        /// Why.
        failure: Failure,
        /// It was the first.
        first_check: bool,
    },
    /// A check succeeded.
    Success,
    /// The host has become degraded.
    Degraded,
    /// The host is no longer degraded.
    NoLongerDegraded,
}

/// What an answer does to the host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Verdict {
    pub(crate) set: u32,
    pub(crate) clear: u32,
    /// Whether the hosts are to be balanced anew.
    pub changed: bool,
    /// What happened, in order.
    pub events: SmallVec<[Event; 2]>,
}

/// The checks of one host.
#[derive(Debug)]
pub struct Session {
    first_check: bool,
    healthy: u32,
    unhealthy: u32,
    due: Instant,
}

/// How an answer bears on a host's state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Transition {
    Unchanged,
    /// The threshold is not reached yet.
    Pending,
    Changed,
}

impl Session {
    /// The checks of a host begin: at once, or within `initial_jitter`.
    pub fn new(settings: &Settings, random: &mut fastrand::Rng, now: Instant) -> Self {
        let wait = match settings.initial_jitter {
            Duration::ZERO => Duration::ZERO,
            jitter => settings.jittered(Duration::ZERO, jitter, random),
        };
        Self { first_check: true, healthy: 0, unhealthy: 0, due: now + wait }
    }

    /// When a check is to be begun; while one is under way, when it is to be given up.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// A check is under way.
    pub fn begin(&mut self, settings: &Settings, now: Instant) {
        self.due = now + settings.timeout;
    }

    /// Decides on the answer to a check. `flags` are the host's; `traffic` says whether its cluster has ever had a
    /// connection.
    pub fn answered(
        &mut self,
        settings: &Settings,
        answer: Answer,
        flags: u32,
        traffic: bool,
        random: &mut fastrand::Rng,
        now: Instant,
    ) -> Verdict {
        let (mut verdict, transition) = match answer {
            Answer::Healthy { degraded } => self.succeeded(settings, degraded, flags),
            Answer::Failed(failure) => self.failed(settings, failure, flags),
        };
        let healthy = matches!(answer, Answer::Healthy { .. });
        verdict.changed = transition == Transition::Changed;
        self.due = now + settings.next(healthy, transition, traffic, random);
        verdict
    }

    /// Decides on what traffic says. The next check comes when it would have come anyway.
    pub fn failed_by_traffic(&mut self, settings: &Settings, flags: u32) -> Verdict {
        let (mut verdict, transition) = self.failed(settings, Failure::Passive, flags);
        verdict.changed = transition == Transition::Changed;
        verdict.set |= HealthFlag::ExcludedViaImmediateHcFail as u32;
        verdict
    }

    fn succeeded(&mut self, settings: &Settings, degraded: bool, flags: u32) -> (Verdict, Transition) {
        self.unhealthy = 0;
        let first_check = std::mem::replace(&mut self.first_check, false);
        let mut verdict = Verdict::default();
        let mut transition = Transition::Unchanged;
        if flags & HealthFlag::FailedActiveHc as u32 != 0 {
            self.healthy = self.healthy.saturating_add(1);
            // The first answer decides by itself, so that a start does not take as many checks as the threshold.
            if first_check || self.healthy == settings.healthy_threshold {
                verdict.clear |= HealthFlag::FailedActiveHc as u32
                    | HealthFlag::ActiveHcTimeout as u32
                    | HealthFlag::ExcludedViaImmediateHcFail as u32;
                verdict.events.push(Event::AddHealthy { first_check });
                transition = Transition::Changed;
            } else {
                transition = Transition::Pending;
            }
        }
        // To become healthy is an event of its own.
        if settings.log_successes && transition != Transition::Changed {
            verdict.events.push(Event::Success);
        }
        transition = settle_pending(&mut verdict, flags, transition);
        let was_degraded = flags & HealthFlag::DegradedActiveHc as u32 != 0;
        if degraded != was_degraded {
            if degraded {
                verdict.set |= HealthFlag::DegradedActiveHc as u32;
                verdict.events.push(Event::Degraded);
            } else {
                verdict.clear |= HealthFlag::DegradedActiveHc as u32;
                verdict.events.push(Event::NoLongerDegraded);
            }
            transition = Transition::Changed;
        }
        (verdict, transition)
    }

    fn failed(&mut self, settings: &Settings, failure: Failure, flags: u32) -> (Verdict, Transition) {
        self.healthy = 0;
        let first_check = std::mem::replace(&mut self.first_check, false);
        let mut verdict = Verdict::default();
        let mut transition = Transition::Unchanged;
        let mut failing = flags & HealthFlag::FailedActiveHc as u32 != 0;
        if let Failure::Active { excluded: true, .. } = failure {
            verdict.set |= HealthFlag::ExcludedViaImmediateHcFail as u32;
        }
        if !failing {
            // What a host says of itself needs no second word; silence does.
            let certain = matches!(failure, Failure::Active { retriable: false, .. } | Failure::Passive);
            if !certain {
                self.unhealthy = self.unhealthy.saturating_add(1);
            }
            if certain || self.unhealthy == settings.unhealthy_threshold {
                verdict.set |= HealthFlag::FailedActiveHc as u32;
                verdict.events.push(Event::EjectUnhealthy(failure));
                transition = Transition::Changed;
                failing = true;
            } else {
                transition = Transition::Pending;
            }
        }
        if failing && failure == Failure::Timeout {
            verdict.set |= HealthFlag::ActiveHcTimeout as u32;
        } else {
            verdict.clear |= HealthFlag::ActiveHcTimeout as u32;
        }
        transition = settle_pending(&mut verdict, flags, transition);
        if first_check || settings.log_failures {
            verdict.events.push(Event::Failure { failure, first_check });
        }
        (verdict, transition)
    }
}

/// Any answer ends the time of a host that nobody has asked: it counts from now on, as what it is.
fn settle_pending(verdict: &mut Verdict, flags: u32, transition: Transition) -> Transition {
    if flags & HealthFlag::PendingActiveHc as u32 == 0 {
        return transition;
    }
    verdict.clear |= HealthFlag::PendingActiveHc as u32;
    Transition::Changed
}

impl Settings {
    fn next(
        &self,
        healthy: bool,
        transition: Transition,
        traffic: bool,
        random: &mut fastrand::Rng,
    ) -> Duration {
        let edge = transition == Transition::Pending;
        let base = match (traffic, healthy, edge) {
            (false, true, false) => self.no_traffic_healthy_interval,
            (false, ..) => self.no_traffic_interval,
            (true, true, true) => self.healthy_edge_interval,
            (true, true, false) => self.interval,
            (true, false, true) => self.unhealthy_edge_interval,
            (true, false, false) => self.unhealthy_interval,
        };
        self.jittered(base, self.interval_jitter, random)
    }

    /// In milliseconds, as Envoy draws them; at least one, so that a check never follows upon itself.
    fn jittered(&self, base: Duration, jitter: Duration, random: &mut fastrand::Rng) -> Duration {
        let mut wait = millis(base);
        for bound in [u64::from(self.interval_jitter_percent).saturating_mul(wait) / 100, millis(jitter)] {
            if bound > 0 {
                wait = wait.saturating_add(random.u64(..bound));
            }
        }
        let least = self.min_interval.get().max(1);
        // A year is as good as never, and an instant can hold it.
        Duration::from_millis(wait.min(self.max_interval.get()).max(least).min(365 * 24 * 3_600_000))
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
