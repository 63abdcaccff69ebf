//! Outlier detection: hosts that fail unlike the others are taken out for a while.
//!
//! Workers count what becomes of requests in a `Monitor` on the host, shared by all of them: an answer that is no error
//! costs one relaxed addition and two loads. When a count of consecutive errors reaches its threshold, they tell the main
//! thread by a [`Crossing`]. The main thread alone decides, by [`Detector::on_crossing`] and, each interval, by
//! [`Detector::on_interval`]: both take the hosts, the time and the randomness, and return what has changed. What is
//! known of a host stays with it for as long as the endpoint is in the cluster, and when the cluster is replaced.
//!
//! The rules are those of Envoy's `outlier_detection`, with one difference: a host that two rules of one interval find is
//! ejected once, where Envoy counts it twice in `ejections_active` and never takes the second one back.

mod event;
mod monitor;
mod settings;
mod stats;

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use parking_lot::Mutex;
use waystation_filter_api::runtime::Runtime;
use waystation_schema::ConfigError;
use waystation_stats::Scope;

pub use event::Event;
pub(crate) use monitor::Monitor;
pub use settings::Value;
pub use stats::OutlierStats;

use crate::host::{HealthFlag, Host};
use event::Kind as EventKind;
use monitor::{Rates, Record};
use settings::{InForce, Settings};

/// Why a host is ejected: `envoy.data.cluster.v3.OutlierEjectionType`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Ejection {
    /// `consecutive_5xx`.
    Consecutive5xx,
    /// `consecutive_gateway_failure`.
    ConsecutiveGatewayFailure,
    /// `success_rate_*`.
    SuccessRate,
    /// `consecutive_local_origin_failure`.
    ConsecutiveLocalOriginFailure,
    /// `success_rate_*` of connecting.
    SuccessRateLocalOrigin,
    /// `failure_percentage_*`.
    FailurePercentage,
    /// `failure_percentage_*` of connecting.
    FailurePercentageLocalOrigin,
    /// `detect_degraded_hosts`: not an ejection, but decided like one.
    Degraded,
}

/// What the main thread is told of a host.
#[derive(Clone, Debug)]
pub struct Crossing {
    /// The cluster.
    pub cluster: Arc<str>,
    /// The host's id, as the worker knew it.
    pub host: u64,
    /// What counted: the cluster may have been replaced meanwhile, and then the host has another id.
    monitor: Arc<Monitor>,
    /// What is told.
    pub cause: Cause,
}

/// Why the main thread has something to decide of a host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// A count has reached its threshold.
    Counted(Ejection),
    /// An active health check of an ejected host has passed.
    CheckPassed,
}

/// Brings a crossing to the main thread. Of one host there is one of each kind on its way at most.
pub type Report = dyn Fn(Crossing) + Send + Sync;

/// What became of a request or connection before upstream said anything itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LocalOrigin {
    /// There is a connection; what comes of the request on it is told apart.
    Connected,
    /// There is a connection, and nothing more will be told of it (TCP).
    ConnectedFinally,
    /// No connection, or it broke.
    ConnectFailed,
    /// Nothing came in time; the client is answered with this status.
    TimedOut(u16),
}

/// What decisions have come to.
#[derive(Debug, Default)]
#[must_use = "who changed a host's health publishes the hosts anew, and events are for the log"]
pub struct Decided {
    /// Whether a host's health has changed.
    pub changed: bool,
    /// For the event log, in order.
    pub events: Vec<Event>,
}

/// `outlier_detection` of one cluster.
pub struct Detector {
    cluster: Arc<str>,
    settings: Settings,
    /// Made when it is first asked for anything: see [`Settings::resolve`].
    in_force: OnceLock<Box<InForce>>,
    runtime: Runtime,
    stats: OutlierStats,
    report: Arc<Report>,
    /// Of the last interval: responses, and connecting.
    rates: Mutex<[Rates; 2]>,
}

/// What success rates are taken of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Origin {
    External,
    Local,
}

impl Detector {
    /// Compiles `outlier_detection` of the cluster `name`.
    ///
    /// # Errors
    /// When a value is out of range or not supported.
    pub fn compile(
        proto: &pb::OutlierDetection,
        name: &str,
        runtime: &Runtime,
        scope: &Scope,
        report: &Arc<Report>,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            cluster: name.into(),
            settings: Settings::compile(proto)?,
            in_force: OnceLock::new(),
            runtime: runtime.clone(),
            stats: scope.group(),
            report: Arc::clone(report),
            rates: Mutex::default(),
        })
    }

    /// The statistics.
    pub fn stats(&self) -> &OutlierStats {
        &self.stats
    }

    /// The value in force, as the runtime may override it.
    pub fn value(&self, value: Value) -> u64 {
        self.in_force.get_or_init(|| Box::new(self.settings.resolve(&self.runtime))).get(value)
    }

    fn time(&self, value: Value) -> Duration {
        Duration::from_millis(self.value(value))
    }

    /// Until the next [`Detector::on_interval`].
    pub fn interval(&self) -> Duration {
        self.time(Value::Interval).max(Duration::from_millis(1))
    }

    /// `detect_degraded_hosts`: whether answers are to be looked at for `x-envoy-degraded`.
    pub fn detects_degraded(&self) -> bool {
        self.settings.detect_degraded
    }

    /// Upstream has answered with this status; that of gRPC as HTTP has it.
    #[inline]
    pub fn answered(&self, host: &Host, status: u16) {
        let Some(monitor) = host.monitor() else { return };
        if status < 500 {
            return monitor.answered_well();
        }
        let (gateway, any) = monitor.answered_badly((502..=504).contains(&status));
        if gateway.is_some_and(|count| self.reaches(count, Value::ConsecutiveGatewayFailure)) {
            self.crossed(host, Ejection::ConsecutiveGatewayFailure);
        }
        if self.reaches(any, Value::Consecutive5xx) {
            self.crossed(host, Ejection::Consecutive5xx);
        }
    }

    /// Upstream says that it is degraded; its answer is told apart.
    pub fn degraded(&self, host: &Host) {
        if self.settings.detect_degraded && !host.has_flag(HealthFlag::DegradedOutlierDetection) {
            self.crossed(host, Ejection::Degraded);
        }
    }

    /// Something happened on this side. Without `split_external_local_origin_errors` it counts as an answer.
    #[inline]
    pub fn local_origin(&self, host: &Host, event: LocalOrigin) {
        if !self.settings.split_local_origin {
            return match event {
                LocalOrigin::Connected => {}
                LocalOrigin::ConnectedFinally => self.answered(host, 200),
                LocalOrigin::ConnectFailed => self.answered(host, 503),
                LocalOrigin::TimedOut(status) => self.answered(host, status),
            };
        }
        let Some(monitor) = host.monitor() else { return };
        match event {
            LocalOrigin::Connected | LocalOrigin::ConnectedFinally => monitor.connected(),
            LocalOrigin::ConnectFailed | LocalOrigin::TimedOut(_) => {
                if self.reaches(monitor.failed_locally(), Value::ConsecutiveLocalOriginFailure) {
                    self.crossed(host, Ejection::ConsecutiveLocalOriginFailure);
                }
            }
        }
    }

    /// Just this count: of many workers one sees it.
    fn reaches(&self, count: u32, threshold: Value) -> bool {
        u64::from(count) == self.value(threshold)
    }

    /// An active health check of a host has passed.
    pub fn check_passed(&self, host: &Host) {
        if self.settings.uneject_checked && is_ejected(host) {
            self.tell(host, Cause::CheckPassed);
        }
    }

    #[cold]
    fn crossed(&self, host: &Host, kind: Ejection) {
        if host.monitor().is_some_and(|monitor| monitor.report(kind)) {
            self.tell(host, Cause::Counted(kind));
        }
    }

    fn tell(&self, host: &Host, cause: Cause) {
        let Some(monitor) = host.monitor().cloned() else { return };
        (self.report)(Crossing { cluster: Arc::clone(&self.cluster), host: host.id(), monitor, cause });
    }

    /// Something was told of a host.
    pub fn on_crossing(
        &self,
        hosts: &[Arc<Host>],
        crossing: &Crossing,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> Decided {
        let mut decided = Decided::default();
        if let Cause::Counted(kind) = crossing.cause {
            crossing.monitor.reported(kind);
        }
        let hosts = Monitored::of(hosts);
        // It may have left the cluster meanwhile.
        let Some((host, monitor)) = hosts.told_of(crossing) else { return decided };
        let kind = match crossing.cause {
            Cause::Counted(kind) => kind,
            Cause::CheckPassed => {
                if is_ejected(host) {
                    self.uneject(host, monitor, now, &mut decided);
                    self.count_active(hosts.after_return());
                }
                return decided;
            }
        };
        if is_ejected(host) {
            return decided;
        }
        if kind == Ejection::Degraded {
            self.degrade(host, monitor, now, rng, &mut decided);
            return decided;
        }
        self.stats.detected(kind);
        self.eject(&hosts, host, monitor, kind, now, rng, &mut decided);
        if kind == Ejection::Consecutive5xx {
            self.stats.ejections_consecutive_5xx().inc();
        }
        // So that a further bout is seen when this one was not acted on.
        monitor.reset(kind);
        decided
    }

    /// The time of an interval has passed: ends ejections, and compares the hosts.
    pub fn on_interval(&self, hosts: &[Arc<Host>], now: Instant, rng: &mut fastrand::Rng) -> Decided {
        let mut decided = Decided::default();
        let hosts = Monitored::of(hosts);
        for (host, monitor) in &hosts.hosts {
            if self.end_ejection(host, monitor, now, &mut decided) {
                hosts.after_return();
            }
            self.end_degradation(host, monitor, now, &mut decided);
            monitor.next_interval();
        }
        self.compare(&hosts, Origin::External, now, rng, &mut decided);
        self.compare(&hosts, Origin::Local, now, rng, &mut decided);
        let interval = self.interval();
        for (host, monitor) in &hosts.hosts {
            let mut record = monitor.record();
            // Who has been back for an interval is trusted a little more.
            if !is_ejected(host) && is_past(record.unejected, interval, now) {
                record.back_off = record.back_off.saturating_sub(1);
            }
            if !host.has_flag(HealthFlag::DegradedOutlierDetection)
                && is_past(record.undegraded, interval, now)
            {
                record.degraded_back_off = record.degraded_back_off.saturating_sub(1);
            }
        }
        self.count_active(&hosts);
        decided
    }

    /// Ejects who was ejected when the cluster was another, and the other way round.
    pub(crate) fn adopt(&self, hosts: &[Arc<Host>]) -> bool {
        let monitored = hosts.iter().filter_map(|host| Some((host, host.monitor()?)));
        monitored.fold(false, |changed, (host, monitor)| {
            host.set_flag(HealthFlag::FailedOutlierCheck, monitor.is_ejected()) | changed
        })
    }

    /// Of the last interval, in percent: the average success rate of hosts and what they are ejected below, of answers and
    /// then of connecting. Below zero when too few hosts had enough requests.
    pub fn success_rates(&self) -> [(f64, f64); 2] {
        self.rates.lock().map(|rates| (rates.average, rates.threshold))
    }

    /// Brings the gauge of ejected hosts in line with the hosts.
    pub fn count(&self, hosts: &[Arc<Host>]) {
        self.count_active(&Monitored::of(hosts));
    }

    fn count_active(&self, hosts: &Monitored<'_>) {
        let (active, now) = (self.stats.ejections_active(), hosts.ejected.get() as u64);
        // Written once there is something to tell, as Envoy's.
        if active.value() != now {
            active.set(now);
        }
    }

    /// Whether the host is back.
    fn end_ejection(&self, host: &Host, monitor: &Monitor, now: Instant, decided: &mut Decided) -> bool {
        if !is_ejected(host) {
            return false;
        }
        let due = {
            let record = monitor.record();
            is_past(record.ejected, self.out_for(record.back_off) + record.jitter, now)
        };
        if due {
            self.uneject(host, monitor, now, decided);
        }
        due
    }

    fn end_degradation(&self, host: &Host, monitor: &Monitor, now: Instant, decided: &mut Decided) {
        if !host.has_flag(HealthFlag::DegradedOutlierDetection) {
            return;
        }
        let mut record = monitor.record();
        let time = self.out_for(record.degraded_back_off) + record.degraded_jitter;
        if is_past(record.degraded, time, now) {
            host.set_flag(HealthFlag::DegradedOutlierDetection, false);
            record.undegraded = Some(now);
            decided.changed = true;
            decided.events.push(self.event(host, &record, EventKind::Back, record.ejected, now));
        }
    }

    /// How long a host stays out that was taken out so often.
    fn out_for(&self, times: u32) -> Duration {
        self.time(Value::BaseEjectionTime).saturating_mul(times).min(self.time(Value::MaxEjectionTime))
    }

    fn jitter(&self, rng: &mut fastrand::Rng) -> Duration {
        Duration::from_millis(rng.u64(..) % self.value(Value::MaxEjectionTimeJitter).saturating_add(1).max(1))
    }

    /// One more time out, as long as that makes a difference.
    fn longer(&self, times: u32) -> u32 {
        let base = self.time(Value::BaseEjectionTime);
        let grows = base.saturating_mul(times) < self.time(Value::MaxEjectionTime) + base;
        times + u32::from(grows)
    }

    fn uneject(&self, host: &Host, monitor: &Monitor, now: Instant, decided: &mut Decided) {
        host.set_flag(HealthFlag::FailedOutlierCheck, false);
        // A count that was about to cross must not throw it out again at once.
        monitor.reset(Ejection::Consecutive5xx);
        monitor.reset(Ejection::ConsecutiveGatewayFailure);
        monitor.reset(Ejection::ConsecutiveLocalOriginFailure);
        let mut record = monitor.record();
        record.is_ejected = false;
        record.unejected = Some(now);
        decided.changed = true;
        decided.events.push(self.event(host, &record, EventKind::Back, record.ejected, now));
    }

    fn degrade(
        &self,
        host: &Host,
        monitor: &Monitor,
        now: Instant,
        rng: &mut fastrand::Rng,
        decided: &mut Decided,
    ) {
        if !host.set_flag(HealthFlag::DegradedOutlierDetection, true) {
            return;
        }
        self.stats.detected(Ejection::Degraded);
        let mut record = monitor.record();
        record.degraded = Some(now);
        record.degraded_jitter = self.jitter(rng);
        record.degraded_back_off = self.longer(record.degraded_back_off);
        decided.changed = true;
        let kind = EventKind::Consecutive { ejection: Ejection::Degraded, enforced: true };
        decided.events.push(self.event(host, &record, kind, record.unejected, now));
    }

    #[expect(clippy::too_many_arguments, reason = "the decision, its subject and its place in time")]
    fn eject(
        &self,
        hosts: &Monitored<'_>,
        host: &Host,
        monitor: &Monitor,
        ejection: Ejection,
        now: Instant,
        rng: &mut fastrand::Rng,
        decided: &mut Decided,
    ) {
        let ejected = hosts.ejected.get();
        let percent = 100.0 * (ejected + 1) as f64 / hosts.hosts.len() as f64;
        let max = self.value(Value::MaxEjectionPercent).min(100);
        if percent > max as f64 && !(self.settings.always_eject_one && ejected == 0) {
            return self.stats.ejections_overflow().inc();
        }
        if matches!(ejection, Ejection::Consecutive5xx | Ejection::SuccessRate) {
            self.stats.ejections_total().inc();
        }
        let enforced = rng.u64(0..100) < self.value(Value::enforcing(ejection));
        if enforced {
            self.stats.enforced(ejection);
            host.set_flag(HealthFlag::FailedOutlierCheck, true);
            hosts.ejected.set(ejected + 1);
            let mut record = monitor.record();
            record.is_ejected = true;
            record.ejections += 1;
            record.ejected = Some(now);
            record.jitter = self.jitter(rng);
            record.back_off = self.longer(record.back_off);
            decided.changed = true;
        }
        let kind = match ejection {
            Ejection::SuccessRate => EventKind::SuccessRate {
                ejection,
                enforced,
                host: monitor.success_rate(Origin::External),
                rates: self.rates.lock()[Origin::External as usize],
            },
            Ejection::SuccessRateLocalOrigin => EventKind::SuccessRate {
                ejection,
                enforced,
                host: monitor.success_rate(Origin::Local),
                rates: self.rates.lock()[Origin::Local as usize],
            },
            Ejection::FailurePercentage => EventKind::FailurePercentage {
                ejection,
                enforced,
                host: monitor.success_rate(Origin::External),
            },
            Ejection::FailurePercentageLocalOrigin => {
                EventKind::FailurePercentage { ejection, enforced, host: monitor.success_rate(Origin::Local) }
            }
            _ => EventKind::Consecutive { ejection, enforced },
        };
        let record = monitor.record();
        decided.events.push(self.event(host, &record, kind, record.unejected, now));
        self.count_active(hosts);
    }

    fn event(
        &self,
        host: &Host,
        record: &Record,
        kind: EventKind,
        last_action: Option<Instant>,
        now: Instant,
    ) -> Event {
        Event {
            cluster: Arc::clone(&self.cluster),
            address: host.address().clone(),
            ejections: record.ejections,
            since_last_action: last_action.map(|then| now.saturating_duration_since(then)),
            kind,
        }
    }

    /// Ejects by success rates and failure percentages of the interval that has passed.
    fn compare(
        &self,
        hosts: &Monitored<'_>,
        origin: Origin,
        now: Instant,
        rng: &mut fastrand::Rng,
        decided: &mut Decided,
    ) {
        self.rates.lock()[origin as usize] = Rates::default();
        let min_hosts = self.value(Value::SuccessRateMinimumHosts);
        let min_volume = self.value(Value::SuccessRateRequestVolume);
        let failure_min_hosts = self.value(Value::FailurePercentageMinimumHosts);
        let failure_min_volume = self.value(Value::FailurePercentageRequestVolume);
        let count = hosts.hosts.len() as u64;
        if count < min_hosts && count < failure_min_hosts {
            return;
        }
        let (mut by_rate, mut by_failures) = (Vec::new(), Vec::new());
        for (host, monitor) in &hosts.hosts {
            let Some((rate, volume)) = monitor.last_interval(origin).filter(|_| !is_ejected(host)) else {
                continue;
            };
            if volume >= min_volume.min(failure_min_volume) {
                monitor.set_success_rate(origin, rate);
            }
            if volume >= min_volume {
                by_rate.push((*host, *monitor, rate));
            }
            if volume >= failure_min_volume {
                by_failures.push((*host, *monitor, rate));
            }
        }
        let (rate_kind, failure_kind) = match origin {
            Origin::External => (Ejection::SuccessRate, Ejection::FailurePercentage),
            Origin::Local => (Ejection::SuccessRateLocalOrigin, Ejection::FailurePercentageLocalOrigin),
        };
        if !by_rate.is_empty() && by_rate.len() as u64 >= min_hosts {
            let factor = self.value(Value::SuccessRateStdevFactor) as f64 / 1000.0;
            let rates = Rates::of(by_rate.iter().map(|(_, _, rate)| *rate), factor);
            self.rates.lock()[origin as usize] = rates;
            for (host, monitor, _) in by_rate.iter().filter(|(_, _, rate)| *rate < rates.threshold) {
                self.stats.ejections_success_rate().inc();
                self.stats.detected(rate_kind);
                self.eject(hosts, host, monitor, rate_kind, now, rng, decided);
            }
        }
        if !by_failures.is_empty() && by_failures.len() as u64 >= failure_min_hosts {
            let threshold = self.value(Value::FailurePercentageThreshold) as f64;
            for (host, monitor, _) in by_failures.iter().filter(|(_, _, rate)| 100.0 - rate >= threshold) {
                self.stats.detected(failure_kind);
                if !is_ejected(host) {
                    self.eject(hosts, host, monitor, failure_kind, now, rng, decided);
                }
            }
        }
    }
}

/// The hosts of a cluster, each once: one address may be in several priority levels.
struct Monitored<'a> {
    hosts: Vec<(&'a Host, &'a Monitor)>,
    /// How many of them are ejected.
    ejected: Cell<usize>,
}

impl<'a> Monitored<'a> {
    fn of(hosts: &'a [Arc<Host>]) -> Self {
        let mut seen = HashSet::with_capacity(hosts.len());
        let fresh = hosts.iter().filter(|host| seen.insert(host.id()));
        let hosts: Vec<_> = fresh.filter_map(|host| Some((&**host, &**host.monitor()?))).collect();
        let ejected = hosts.iter().filter(|(host, _)| is_ejected(host)).count();
        Self { hosts, ejected: Cell::new(ejected) }
    }

    /// The host itself, or who has taken over from it what is counted.
    fn told_of(&self, crossing: &Crossing) -> Option<(&'a Host, &'a Monitor)> {
        let mut hosts = self.hosts.iter().copied();
        let itself = hosts.clone().find(|(host, _)| host.id() == crossing.host);
        itself.or_else(|| hosts.find(|(_, monitor)| std::ptr::eq(*monitor, &*crossing.monitor)))
    }

    /// One of them is back.
    fn after_return(&self) -> &Self {
        self.ejected.set(self.ejected.get() - 1);
        self
    }
}

fn is_ejected(host: &Host) -> bool {
    host.has_flag(HealthFlag::FailedOutlierCheck)
}

fn is_past(since: Option<Instant>, time: Duration, now: Instant) -> bool {
    since.is_some_and(|since| now.saturating_duration_since(since) >= time)
}

impl fmt::Debug for Detector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detector").field("settings", &self.settings).finish_non_exhaustive()
    }
}
