//! The hosts of one cluster under check.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;
use tokio_util::task::AbortOnDropHandle;
use waystation_upstream::cluster::Discovery;
use waystation_upstream::health_check::{Answer, Failure, HealthCheck, Session, Verdict};
use waystation_upstream::host::HealthFlag;
use waystation_upstream::{Cluster, Host};

use super::checker::Checker;
use super::probe::{Connection, Target};
use super::{Ends, events};

/// Publishing hosts may take this part of the thread's time: with many hosts and costly balancers, changes gather.
const PUBLISHING: u32 = 20;

/// Checks of many hosts begin together on ticks of at most this length: to be woken costs more than to check.
const LONGEST_TICK: u64 = 16;

/// A cluster under check.
pub(super) struct Watch {
    cluster: Arc<Cluster>,
    checker: Arc<Checker>,
    ends: Ends,
    random: RefCell<fastrand::Rng>,
    /// How many hosts of the first assignment have not been checked; nothing before it.
    unchecked: Cell<Option<usize>>,
    /// The first round is published, and all that comes after it is an update.
    is_warm: Cell<bool>,
    /// Hosts have changed, which is to be published.
    changed: Notify,
}

/// A host under check.
struct Member {
    host: RefCell<Arc<Host>>,
    session: RefCell<Session>,
    is_first_round: Cell<bool>,
    watch: Weak<Watch>,
    /// As what the gauges have it: whether healthy, whether degraded.
    counted: Cell<(bool, bool)>,
}

struct Running {
    member: Rc<Member>,
    _task: AbortOnDropHandle<()>,
}

impl Watch {
    pub(super) fn new(cluster: Arc<Cluster>, checker: Arc<Checker>, ends: Ends) -> Rc<Self> {
        Rc::new(Self {
            cluster,
            checker,
            ends,
            random: RefCell::default(),
            unchecked: Cell::new(None),
            is_warm: Cell::new(false),
            changed: Notify::new(),
        })
    }

    /// Follows the hosts for as long as it is polled.
    pub(super) async fn run(self: Rc<Self>) {
        let Some(check) = self.cluster.health_check.as_deref() else { return };
        let mut members = HashMap::new();
        let publishing = self.publish();
        tokio::pin!(publishing);
        loop {
            let endpoints = self.cluster.endpoints();
            if endpoints.initialized() || matches!(self.cluster.discovery, Discovery::Static) {
                self.follow(check, &mut members);
            }
            for id in check.take_failed() {
                if let Some(Running { member, .. }) = members.get(&id) {
                    member.failed_by_traffic(&self, check);
                }
            }
            tokio::select! {
                () = check.attention() => {}
                () = &mut publishing => {}
            }
        }
    }

    /// Begins to check hosts that have come, and ends it for those that have gone.
    fn follow(self: &Rc<Self>, check: &HealthCheck, members: &mut HashMap<u64, Running>) {
        let snapshot = self.cluster.endpoints().snapshot();
        let mut before = std::mem::take(members);
        let is_first = self.unchecked.get().is_none();
        for host in snapshot.hosts().filter(|host| !host.is_unchecked()) {
            let running = match before.remove(&host.id()) {
                Some(running) => {
                    *running.member.host.borrow_mut() = Arc::clone(host);
                    running
                }
                // An address may be listed in two priorities.
                None if members.contains_key(&host.id()) => continue,
                None => self.begin(check, host, is_first),
            };
            members.insert(host.id(), running);
        }
        if is_first {
            self.unchecked.set(Some(members.len() + 1));
            self.checked_one();
        }
        for running in before.into_values() {
            let member = &running.member;
            if member.is_first_round.get() {
                self.checked_one();
            }
        }
    }

    fn begin(self: &Rc<Self>, check: &HealthCheck, host: &Arc<Host>, is_first_round: bool) -> Running {
        let session = Session::new(&check.settings, &mut self.random.borrow_mut(), Instant::now());
        let member = Rc::new(Member {
            host: RefCell::new(Arc::clone(host)),
            session: RefCell::new(session),
            is_first_round: Cell::new(is_first_round),
            watch: Rc::downgrade(self),
            counted: Cell::default(),
        });
        member.count(check, judged(host));
        let task = tokio::task::spawn_local(Rc::clone(&member).run());
        Running { member, _task: AbortOnDropHandle::new(task) }
    }

    /// One of the hosts that the cluster waits for has been checked, or is gone.
    fn checked_one(&self) {
        let Some(left) = self.unchecked.get().filter(|left| *left > 0) else { return };
        self.unchecked.set(Some(left - 1));
        if left == 1
            && let Some(check) = &self.cluster.health_check
        {
            // The cluster serves with the hosts as they are now.
            self.cluster.refresh();
            self.changed.notify_one();
            check.end_first_round();
            // The main thread hangs up when the process ends.
            let _ = self.ends.rounds.send(self.cluster.name().into());
        }
    }

    /// Publishes changes of hosts, those of one turn together.
    async fn publish(&self) {
        loop {
            self.changed.notified().await;
            tokio::task::yield_now().await;
            let start = Instant::now();
            self.cluster.refresh();
            self.cluster.drop_removed();
            match self.unchecked.get() {
                Some(0) if self.is_warm.get() => self.ends.updated.inc(),
                left => self.is_warm.set(left == Some(0)),
            }
            let pause = start.elapsed() * PUBLISHING;
            if pause > Duration::from_millis(1) {
                tokio::time::sleep(pause).await;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(watch) = self.member.watch.upgrade()
            && let Some(check) = &watch.cluster.health_check
        {
            self.member.count(check, (false, false));
        }
    }
}

/// When a check that is due begins: up to a thirtieth of the wait later, on a tick that all checks of such waits share.
fn on_tick(now: Instant, due: Instant) -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let share = millis(due.saturating_duration_since(now)) / 32;
    // Powers of two, so that ticks of different lengths meet.
    let Some(tick) = share.min(LONGEST_TICK).checked_ilog2().map(|power| 1 << power) else { return due };
    let start = *START.get_or_init(|| now);
    let since = millis(due.saturating_duration_since(start));
    start + Duration::from_millis(since.next_multiple_of(tick))
}

fn judged(host: &Host) -> (bool, bool) {
    (!host.has_flag(HealthFlag::FailedActiveHc), host.has_flag(HealthFlag::DegradedActiveHc))
}

impl Member {
    async fn run(self: Rc<Self>) {
        // What is checked outlives its checks: the watch owns the task.
        let Some(watch) = self.watch.upgrade() else { return };
        let Watch { cluster, checker, .. } = &*watch;
        let Some(check) = cluster.health_check.as_deref() else { return };
        let mut connection = Connection::default();
        loop {
            let due = self.session.borrow().due();
            let answer = tokio::select! {
                biased;
                () = sleep_until(on_tick(Instant::now(), due).into()) => None,
                // Between two checks a TCP peer may say by closing that it is gone.
                () = connection.lost() => Some(Answer::Failed(Failure::Network)),
            };
            let answer = match answer {
                Some(answer) => answer,
                None => {
                    self.session.borrow_mut().begin(&check.settings, Instant::now());
                    check.stats.attempt().inc();
                    let due = self.session.borrow().due();
                    let host = Arc::clone(&self.host.borrow());
                    let target = Target { cluster, checker, host: &host, check };
                    let answered = tokio::time::timeout_at(due.into(), connection.check(&target)).await;
                    answered.unwrap_or_else(|_| {
                        connection.drop_now();
                        Answer::Failed(Failure::Timeout)
                    })
                }
            };
            self.answered(&watch, check, answer);
        }
    }

    fn answered(&self, watch: &Watch, check: &HealthCheck, answer: Answer) {
        let host = Arc::clone(&self.host.borrow());
        // Envoy looks at a cluster without connections rarely, for it may never be used.
        let traffic = watch.cluster.stats.upstream_cx_total().value() > 0;
        let verdict = self.session.borrow_mut().answered(
            &check.settings,
            answer,
            host.flags(),
            traffic,
            &mut watch.random.borrow_mut(),
            Instant::now(),
        );
        self.judge(watch, check, &host, answer, &verdict);
    }

    fn count(&self, check: &HealthCheck, now: (bool, bool)) {
        check.stats.follow(self.counted.replace(now), now);
    }

    fn failed_by_traffic(&self, watch: &Watch, check: &HealthCheck) {
        let host = Arc::clone(&self.host.borrow());
        let verdict = self.session.borrow_mut().failed_by_traffic(&check.settings, host.flags());
        self.judge(watch, check, &host, Answer::Failed(Failure::Passive), &verdict);
    }

    fn judge(&self, watch: &Watch, check: &HealthCheck, host: &Host, answer: Answer, verdict: &Verdict) {
        host.judge(verdict, Instant::now());
        if matches!(answer, Answer::Healthy { .. })
            && !host.has_flag(HealthFlag::FailedActiveHc)
            && let Some(detector) = &watch.cluster.outlier_detection
        {
            detector.check_passed(host);
        }
        check.stats.count(answer);
        self.count(check, judged(host));
        if !verdict.events.is_empty() && !watch.checker.events.is_empty() {
            events::write(&watch.checker, watch.cluster.name(), host, &verdict.events);
        }
        let is_over =
            host.has_flag(HealthFlag::PendingDynamicRemoval) && host.has_flag(HealthFlag::FailedActiveHc);
        if verdict.changed || is_over {
            watch.changed.notify_one();
        }
        if self.is_first_round.replace(false) {
            watch.checked_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::on_tick;
    use std::time::{Duration, Instant};

    #[test]
    fn checks_meet_on_ticks() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        // The clock of ticks starts with the first look at it.
        assert_eq!(on_tick(start, start), start);
        let origin = on_tick(start, at(1000)) - Duration::from_millis(1008);
        let ticks = |now, due| (on_tick(at(now), at(due)) - origin).as_millis();
        assert_eq!([ticks(0, 1001), ticks(3, 1007), ticks(3, 1009)], [1008, 1008, 1024]);
        assert_eq!([ticks(0, 20), ticks(0, 33), ticks(0, 70)], [20, 33, 70], "short waits are kept");
        assert_eq!([ticks(0, 129), ticks(500, 630)], [132, 632]);
    }
}
