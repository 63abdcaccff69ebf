//! Circuit breakers: who may open a connection, queue, send a request or retry.
//!
//! Counts are exact across workers: a permit is taken by a compare-and-swap bounded by the threshold in force and given
//! back when it is dropped, so that there is never one too many. Envoy's are approximate. They are the name's, not one
//! configuration's: when a cluster is replaced, what its predecessor has under way counts, and only the thresholds are new.

mod line;
mod window;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use parking_lot::Mutex;
use waystation_filter_api::runtime::{Runtime, RuntimeDouble, RuntimeInteger};
use waystation_filter_api::wire::{duration, u32_value};
use waystation_schema::{At, ConfigError};
use waystation_stats::{Gauge, GaugeRef, Scope};

pub(crate) use line::Line;
pub use line::Place;
use window::Window;

use crate::stats::{ClusterStats, RemainingDefaultStats, RemainingHighStats};

/// `envoy.config.core.v3.RoutingPriority`.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Priority {
    /// Ordinary requests.
    #[default]
    Default,
    /// Requests of routes with `priority: HIGH`.
    High,
}

/// What a threshold bounds.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Resource {
    /// Upstream connections.
    Connections,
    /// Requests that wait for a connection.
    Pending,
    /// Requests in flight.
    Requests,
    /// Retries in flight.
    Retries,
    /// Connection pools.
    Pools,
}

/// How often a gauge is written again because another worker wrote meanwhile.
const ATTEMPTS: usize = 8;

const RESOURCES: [Resource; 5] =
    [Resource::Connections, Resource::Pending, Resource::Requests, Resource::Retries, Resource::Pools];

const PRIORITIES: [Priority; 2] = [Priority::Default, Priority::High];

/// The circuit breakers of one cluster.
#[derive(Debug)]
pub struct Admission {
    counts: Arc<Counts>,
    /// Its number among the configurations that share the counts.
    version: u64,
    priorities: [Breakers; 2],
    /// `per_host_thresholds` of the default priority: connections per host.
    max_connections_per_host: Option<u32>,
}

/// What all configurations of a cluster count together.
#[derive(Debug, Default)]
struct Counts {
    limits: [[Limit; 5]; 2],
    versions: AtomicU64,
    /// The version whose thresholds the gauges go by.
    in_force: AtomicU64,
    newest: Mutex<Weak<Admission>>,
    /// Who waits for a connection, by priority. Made when somebody first does: idle clusters are to be small.
    lines: OnceLock<Box<[Line; 2]>>,
}

struct Breakers {
    /// Made when the cluster is first used: ten runtime keys for each of thousands of idle clusters would be a burden.
    in_force: OnceLock<Box<InForce>>,
    configured: Configured,
    cluster: Arc<str>,
    runtime: Runtime,
    remaining: Option<Box<Remaining>>,
    stats: ClusterStats,
    priority: Priority,
    /// `retry_budget.budget_interval`: the requests that count.
    recent: Option<Box<Window>>,
}

/// `track_remaining`: in the order of [`Resource`].
type Remaining = [Gauge; 5];

/// A count, and whether it has reached its bound.
#[derive(Debug, Default)]
struct Limit {
    count: AtomicU32,
    open: AtomicBool,
}

/// The thresholds of the configuration.
#[derive(Debug)]
struct Configured {
    max: [u64; 5],
    bounds_connections: bool,
    /// `retry_budget`: percent and minimum.
    retry_budget: Option<(f64, u32)>,
}

/// The thresholds as the runtime may override them.
#[derive(Debug)]
struct InForce {
    max: [RuntimeInteger; 5],
    retry_budget: Option<(RuntimeDouble, RuntimeInteger)>,
}

/// A unit of a resource, given back on drop.
#[derive(Debug)]
#[must_use = "the unit is given back at once when the permit is dropped"]
pub struct Permit {
    admission: Arc<Admission>,
    priority: Priority,
    resource: Resource,
}

impl Admission {
    /// Compiles `circuit_breakers` of the cluster `name`; a missing message means the defaults. What is under way in the
    /// configuration `previous` counts; see [`Admission::take_over`].
    ///
    /// # Errors
    /// When a field is out of range or not supported.
    pub fn compile(
        proto: Option<&pb::CircuitBreakers>,
        name: &str,
        runtime: &Runtime,
        scope: &Scope,
        stats: &ClusterStats,
        previous: Option<&Self>,
    ) -> Result<Self, ConfigError> {
        let counts = previous.map(|previous| Arc::clone(&previous.counts)).unwrap_or_default();
        let version = counts.versions.fetch_add(1, Ordering::Relaxed) + 1;
        if previous.is_none() {
            counts.in_force.store(version, Ordering::Relaxed);
        }
        let thresholds = proto.map_or(&[][..], |proto| &proto.thresholds);
        let cluster: Arc<str> = name.into();
        let of = |priority: Priority| {
            let wanted = match priority {
                Priority::Default => core::RoutingPriority::Default,
                Priority::High => core::RoutingPriority::High,
            };
            let found = thresholds.iter().position(|threshold| threshold.priority == wanted as i32);
            let threshold = found.map(|index| &thresholds[index]);
            Breakers::compile(threshold, &cluster, priority, runtime, scope, stats)
                .at(|| format!("thresholds[{}]", found.unwrap_or_default()))
        };
        let mut max_connections_per_host = None;
        for (i, threshold) in proto.iter().flat_map(|proto| proto.per_host_thresholds.iter().enumerate()) {
            // Envoy reads only max_connections here and refuses the others likewise.
            let others = threshold.max_pending_requests.is_some()
                || threshold.max_requests.is_some()
                || threshold.max_retries.is_some()
                || threshold.retry_budget.is_some()
                || threshold.track_remaining
                || threshold.max_connection_pools.is_some();
            if others {
                return Err(ConfigError::new("per_host_thresholds can only specify max_connections")
                    .at(format!("per_host_thresholds[{i}]")));
            }
            if threshold.priority == core::RoutingPriority::Default as i32 {
                max_connections_per_host = u32_value(threshold.max_connections.as_ref());
            }
        }
        let priorities = [of(Priority::Default)?, of(Priority::High)?];
        let admission = Self { counts, version, priorities, max_connections_per_host };
        if previous.is_none() {
            admission.show_configured();
        }
        Ok(admission)
    }

    /// Makes the thresholds those that the gauges go by: the cluster has come into force.
    pub fn take_over(self: &Arc<Self>) {
        *self.counts.newest.lock() = Arc::downgrade(self);
        if self.counts.in_force.swap(self.version, Ordering::SeqCst) == self.version {
            return;
        }
        self.show_configured();
        for (priority, resource) in PRIORITIES.iter().flat_map(|p| RESOURCES.map(|r| (*p, r))) {
            // What nobody uses is left alone, as a new breaker is.
            if self.in_use(priority, resource) > 0
                || self.limit(priority, resource).open.load(Ordering::SeqCst)
            {
                self.changed(priority, resource, self.priorities[priority as usize].max(self, resource));
            }
        }
    }

    /// As in Envoy a breaker is shut until something has been counted, even one with a threshold of zero.
    fn show_configured(&self) {
        for breakers in &self.priorities {
            let gauges = breakers.remaining.as_deref().into_iter().flatten();
            for (gauge, max) in gauges.zip(breakers.configured.max) {
                gauge.set(max);
            }
        }
    }

    fn limit(&self, priority: Priority, resource: Resource) -> &Limit {
        &self.counts.limits[priority as usize][resource as usize]
    }

    /// Brings the gauges in line with a count. What streams of a replaced configuration do is seen by its successor.
    fn changed(&self, priority: Priority, resource: Resource, max: u64) {
        if self.counts.in_force.load(Ordering::Relaxed) == self.version {
            self.priorities[priority as usize].changed(self.limit(priority, resource), resource, max);
        } else {
            self.tell_newest(priority, resource);
        }
    }

    #[cold]
    fn tell_newest(&self, priority: Priority, resource: Resource) {
        let newest = self.counts.newest.lock().upgrade();
        if let Some(newest) = newest.filter(|newest| newest.version != self.version) {
            let breakers = &newest.priorities[priority as usize];
            breakers.changed(newest.limit(priority, resource), resource, breakers.max(&newest, resource));
        }
    }

    /// Takes one unit, or `None` when the breaker is open. Takes a shared reference: see [`Admission::try_acquire`] for
    /// callers that keep the cluster alive themselves.
    pub fn reserve(self: &Arc<Self>, priority: Priority, resource: Resource) -> Option<Permit> {
        self.try_acquire(priority, resource).then(|| Permit {
            admission: Arc::clone(self),
            priority,
            resource,
        })
    }

    /// Takes one unit that the caller gives back with [`Admission::release`]; `false` when the breaker is open.
    pub fn try_acquire(&self, priority: Priority, resource: Resource) -> bool {
        let breakers = &self.priorities[priority as usize];
        let max = breakers.max(self, resource);
        let count = &self.limit(priority, resource).count;
        let taken = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
            (u64::from(count) < max).then_some(count + 1)
        });
        if taken.is_err() {
            return false;
        }
        if resource == Resource::Requests
            && let Some(recent) = &breakers.recent
        {
            recent.add(Instant::now());
        }
        self.changed(priority, resource, max);
        true
    }

    /// Takes one unit even past the bound: so that a host can never become unreachable through the breaker alone, as in
    /// Envoy.
    pub fn reserve_anyway(self: &Arc<Self>, priority: Priority, resource: Resource) -> Permit {
        self.limit(priority, resource).count.fetch_add(1, Ordering::SeqCst);
        self.changed(priority, resource, self.priorities[priority as usize].max(self, resource));
        Permit { admission: Arc::clone(self), priority, resource }
    }

    /// Gives back one unit.
    pub fn release(&self, priority: Priority, resource: Resource) {
        self.limit(priority, resource).count.fetch_sub(1, Ordering::SeqCst);
        self.changed(priority, resource, self.priorities[priority as usize].max(self, resource));
    }

    /// Units in use.
    pub fn in_use(&self, priority: Priority, resource: Resource) -> u64 {
        self.limit(priority, resource).used()
    }

    /// The bound in force; with a retry budget that of retries moves with the requests in flight.
    pub fn max(&self, priority: Priority, resource: Resource) -> u64 {
        let breakers = &self.priorities[priority as usize];
        breakers.clear_budgeted(resource);
        // An admin page must not make every idle cluster a user of the runtime.
        match breakers.in_force.get() {
            Some(in_force) => breakers.bound(self, in_force, resource),
            None => breakers.bound(self, &breakers.resolve(), resource),
        }
    }

    /// Whether `max_connections` is a bound that the configuration sets. The default is a guard that no worker is kept from
    /// a host by.
    pub fn bounds_connections(&self, priority: Priority) -> bool {
        self.priorities[priority as usize].configured.bounds_connections
    }

    /// A place among those who wait until `max_connections` of the priority leaves room again.
    pub fn stand_in_line(&self, priority: Priority) -> Place {
        self.counts.lines.get_or_init(Box::default)[priority as usize].stand()
    }

    /// Whether somebody waits so: idle connections are in their way.
    pub fn are_connections_wanted(&self, priority: Priority) -> bool {
        self.counts.lines.get().is_some_and(|lines| !lines[priority as usize].is_empty())
    }

    /// A connection has ended, and all that it held is given back. Of any priority: to a host that has no other now, one may
    /// be made past the bound.
    pub fn connection_ended(&self) {
        if let Some(lines) = self.counts.lines.get() {
            lines.iter().for_each(Line::call);
        }
    }

    /// `per_host_thresholds[].max_connections`.
    pub fn max_connections_per_host(&self) -> Option<u32> {
        self.max_connections_per_host
    }

    /// Requests in flight over both priorities, for bounded-load hashing.
    pub fn active_requests(&self) -> u64 {
        self.in_use(Priority::Default, Resource::Requests) + self.in_use(Priority::High, Resource::Requests)
    }
}

impl Limit {
    fn used(&self) -> u64 {
        self.count.load(Ordering::SeqCst).into()
    }
}

impl Breakers {
    fn compile(
        proto: Option<&pb::circuit_breakers::Thresholds>,
        cluster: &Arc<str>,
        priority: Priority,
        runtime: &Runtime,
        scope: &Scope,
        stats: &ClusterStats,
    ) -> Result<Self, ConfigError> {
        let of = |value: Option<&wkt::UInt32Value>, default: u64| u32_value(value).map_or(default, u64::from);
        let max = match proto {
            None => [1024, 1024, 1024, 3, u64::MAX],
            Some(proto) => [
                of(proto.max_connections.as_ref(), 1024),
                of(proto.max_pending_requests.as_ref(), 1024),
                of(proto.max_requests.as_ref(), 1024),
                of(proto.max_retries.as_ref(), 3),
                of(proto.max_connection_pools.as_ref(), u64::MAX),
            ],
        };
        let mut recent = None;
        let retry_budget = match proto.and_then(|proto| proto.retry_budget.as_ref()) {
            None => None,
            Some(budget) => {
                let interval = duration("budget_interval", budget.budget_interval.as_ref());
                let interval = interval.at(|| "retry_budget")?.filter(|interval| !interval.is_zero());
                recent = interval.map(|interval| Box::new(Window::new(interval)));
                let percent = budget.budget_percent.as_ref().map_or(20.0, |percent| percent.value);
                Some((percent, u32_value(budget.min_retry_concurrency.as_ref()).unwrap_or(3)))
            }
        };
        let bounds_connections = proto.is_some_and(|proto| proto.max_connections.is_some());
        let track = proto.is_some_and(|proto| proto.track_remaining);
        Ok(Self {
            in_force: OnceLock::new(),
            configured: Configured { max, bounds_connections, retry_budget },
            cluster: Arc::clone(cluster),
            runtime: runtime.clone(),
            remaining: track.then(|| Box::new(remaining(scope, priority))),
            stats: stats.clone(),
            priority,
            recent,
        })
    }

    fn max(&self, admission: &Admission, resource: Resource) -> u64 {
        let in_force = self.in_force.get_or_init(|| Box::new(self.resolve()));
        self.bound(admission, in_force, resource)
    }

    fn bound(&self, admission: &Admission, in_force: &InForce, resource: Resource) -> u64 {
        match (&in_force.retry_budget, resource) {
            (Some((percent, minimum)), Resource::Retries) => {
                let of = |resource| admission.limit(self.priority, resource).used();
                let active = match &self.recent {
                    Some(recent) => recent.count(Instant::now()),
                    None => of(Resource::Requests) + of(Resource::Pending),
                };
                let share = (active as f64 * percent.get() / 100.0) as u64;
                share.max(minimum.get())
            }
            _ => in_force.max[resource as usize].get(),
        }
    }

    /// Binds the thresholds to `circuit_breakers.<cluster>.<priority>.*` of the runtime.
    fn resolve(&self) -> InForce {
        const KEYS: [&str; 5] = [
            "max_connections",
            "max_pending_requests",
            "max_requests",
            "max_retries",
            "max_connection_pools",
        ];
        let prefix = format!("circuit_breakers.{}.{}.", self.cluster, self.priority.segment());
        let key = |name: &str| format!("{prefix}{name}");
        let configured = &self.configured;
        InForce {
            max: std::array::from_fn(|i| self.runtime.integer(&key(KEYS[i]), configured.max[i])),
            retry_budget: configured.retry_budget.map(|(percent, minimum)| {
                (
                    self.runtime.double(&key("retry_budget.budget_percent"), percent),
                    self.runtime.integer(&key("retry_budget.min_retry_concurrency"), u64::from(minimum)),
                )
            }),
        }
    }

    fn changed(&self, limit: &Limit, resource: Resource, max: u64) {
        self.show_remaining(limit, resource, max);
        self.reconcile(limit, resource, max);
    }

    /// Writes what is left, and looks again as [`Breakers::reconcile`] does.
    fn show_remaining(&self, limit: &Limit, resource: Resource, max: u64) {
        let Some(gauges) = &self.remaining else { return };
        if self.clear_budgeted(resource) {
            return;
        }
        let gauge = &gauges[resource as usize];
        // Others may write meanwhile; whoever writes last has looked last.
        for _ in 0..ATTEMPTS {
            let used = limit.used();
            let left = max.saturating_sub(used);
            gauge.set(left);
            if gauge.value() == left && limit.used() == used {
                return;
            }
        }
    }

    /// What a budget leaves moves with every request: as in Envoy none is shown once somebody has asked for the bound.
    fn clear_budgeted(&self, resource: Resource) -> bool {
        let budgeted = resource == Resource::Retries && self.configured.retry_budget.is_some();
        if let (true, Some(gauges)) = (budgeted, &self.remaining) {
            gauges[resource as usize].set(0);
        }
        budgeted
    }

    /// Brings the `*_open` gauge in line with the count. Whoever flips it looks again, so that of two workers that cross
    /// the bound at once the last one leaves the truth behind.
    fn reconcile(&self, limit: &Limit, resource: Resource, max: u64) {
        loop {
            let open = limit.used() >= max;
            if limit.open.load(Ordering::SeqCst) == open || limit.open.swap(open, Ordering::SeqCst) == open {
                return;
            }
            let gauge = self.open_gauge(resource);
            if open { gauge.inc() } else { gauge.dec() }
        }
    }

    fn open_gauge(&self, resource: Resource) -> GaugeRef<'_> {
        let stats = &self.stats;
        match (self.priority, resource) {
            (Priority::Default, Resource::Connections) => stats.cx_open_default(),
            (Priority::Default, Resource::Pending) => stats.rq_pending_open_default(),
            (Priority::Default, Resource::Requests) => stats.rq_open_default(),
            (Priority::Default, Resource::Retries) => stats.rq_retry_open_default(),
            (Priority::Default, Resource::Pools) => stats.cx_pool_open_default(),
            (Priority::High, Resource::Connections) => stats.cx_open_high(),
            (Priority::High, Resource::Pending) => stats.rq_pending_open_high(),
            (Priority::High, Resource::Requests) => stats.rq_open_high(),
            (Priority::High, Resource::Retries) => stats.rq_retry_open_high(),
            (Priority::High, Resource::Pools) => stats.cx_pool_open_high(),
        }
    }
}

fn remaining(scope: &Scope, priority: Priority) -> Remaining {
    match priority {
        Priority::Default => {
            let stats: RemainingDefaultStats = scope.group();
            [stats.cx(), stats.pending(), stats.rq(), stats.retries(), stats.cx_pools()]
                .map(GaugeRef::to_owned)
        }
        Priority::High => {
            let stats: RemainingHighStats = scope.group();
            [stats.cx(), stats.pending(), stats.rq(), stats.retries(), stats.cx_pools()]
                .map(GaugeRef::to_owned)
        }
    }
}

impl Permit {
    /// Whose breakers count it.
    pub fn priority(&self) -> Priority {
        self.priority
    }
}

impl Priority {
    /// As in names of stats and runtime keys.
    pub fn segment(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::High => "high",
        }
    }
}

impl fmt::Debug for Breakers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Breakers").field("configured", &self.configured).finish_non_exhaustive()
    }
}

impl Drop for Admission {
    /// The gauges outlive the cluster: what it added is taken back, unless a successor has taken that over.
    fn drop(&mut self) {
        if self.counts.in_force.load(Ordering::SeqCst) != self.version {
            return;
        }
        for (breakers, limits) in self.priorities.iter().zip(&self.counts.limits) {
            for (resource, limit) in RESOURCES.into_iter().zip(limits) {
                if limit.open.swap(false, Ordering::SeqCst) {
                    breakers.open_gauge(resource).dec();
                }
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.release(self.priority, self.resource);
    }
}
