//! Circuit breakers: who may open a connection, queue, send a request or retry.
//!
//! Counts are exact across workers: a permit is taken by a compare-and-swap bounded by the threshold in force and given
//! back when it is dropped, so that there is never one too many. Envoy's are approximate.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::{Runtime, RuntimeDouble, RuntimeInteger};
use waystation_filter_api::wire::{refuse, u32_value};
use waystation_schema::{At, ConfigError};
use waystation_stats::{Gauge, GaugeRef, Scope};

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

/// The circuit breakers of one cluster.
#[derive(Debug)]
pub struct Admission {
    priorities: [Breakers; 2],
    /// `per_host_thresholds` of the default priority: connections per host.
    max_connections_per_host: Option<u32>,
}

struct Breakers {
    limits: [Limit; 5],
    /// Made when the cluster is first used: ten runtime keys for each of thousands of idle clusters would be a burden.
    in_force: OnceLock<Box<InForce>>,
    configured: Configured,
    cluster: Arc<str>,
    runtime: Runtime,
    remaining: Option<Box<Remaining>>,
    stats: ClusterStats,
    priority: Priority,
}

/// `track_remaining`: in the order of [`Resource`].
type Remaining = [Gauge; 5];

/// A count, and whether it has reached its bound.
#[derive(Debug, Default)]
struct Limit {
    count: AtomicU64,
    open: AtomicBool,
}

/// The thresholds of the configuration.
#[derive(Debug)]
struct Configured {
    max: [u64; 5],
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
    /// Compiles `circuit_breakers` of the cluster `name`; a missing message means the defaults.
    ///
    /// # Errors
    /// When a field is out of range or not supported.
    pub fn compile(
        proto: Option<&pb::CircuitBreakers>,
        name: &str,
        runtime: &Runtime,
        scope: &Scope,
        stats: &ClusterStats,
    ) -> Result<Self, ConfigError> {
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
        Ok(Self { priorities: [of(Priority::Default)?, of(Priority::High)?], max_connections_per_host })
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
        let limit = &breakers.limits[resource as usize];
        let max = breakers.max(resource);
        let taken = limit
            .count
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| (count < max).then_some(count + 1));
        if taken.is_ok() {
            breakers.changed(resource, max);
        }
        taken.is_ok()
    }

    /// Takes one unit even past the bound: a worker is always allowed one connection per host so that a host can never
    /// become unreachable through the breaker alone, as in Envoy.
    pub fn reserve_anyway(self: &Arc<Self>, priority: Priority, resource: Resource) -> Permit {
        let breakers = &self.priorities[priority as usize];
        breakers.limits[resource as usize].count.fetch_add(1, Ordering::SeqCst);
        breakers.changed(resource, breakers.max(resource));
        Permit { admission: Arc::clone(self), priority, resource }
    }

    /// Gives back one unit.
    pub fn release(&self, priority: Priority, resource: Resource) {
        let breakers = &self.priorities[priority as usize];
        breakers.limits[resource as usize].count.fetch_sub(1, Ordering::SeqCst);
        breakers.changed(resource, breakers.max(resource));
    }

    /// Units in use.
    pub fn in_use(&self, priority: Priority, resource: Resource) -> u64 {
        self.priorities[priority as usize].limits[resource as usize].count.load(Ordering::SeqCst)
    }

    /// The bound in force; with a retry budget that of retries moves with the requests in flight.
    pub fn max(&self, priority: Priority, resource: Resource) -> u64 {
        let breakers = &self.priorities[priority as usize];
        breakers.clear_budgeted(resource);
        // An admin page must not make every idle cluster a user of the runtime.
        match breakers.in_force.get() {
            Some(in_force) => breakers.bound(in_force, resource),
            None => breakers.bound(&breakers.resolve(), resource),
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
        let retry_budget = match proto.and_then(|proto| proto.retry_budget.as_ref()) {
            None => None,
            Some(budget) => {
                refuse(
                    "budget_interval",
                    budget.budget_interval.is_some(),
                    "budgets follow requests in flight",
                )
                .at(|| "retry_budget")?;
                let percent = budget.budget_percent.as_ref().map_or(20.0, |percent| percent.value);
                Some((percent, u32_value(budget.min_retry_concurrency.as_ref()).unwrap_or(3)))
            }
        };
        let track = proto.is_some_and(|proto| proto.track_remaining);
        let breakers = Self {
            limits: Default::default(),
            in_force: OnceLock::new(),
            configured: Configured { max, retry_budget },
            cluster: Arc::clone(cluster),
            runtime: runtime.clone(),
            remaining: track.then(|| Box::new(remaining(scope, priority))),
            stats: stats.clone(),
            priority,
        };
        // As in Envoy a breaker is shut until something has been counted, even one with a threshold of zero.
        for (gauge, max) in breakers.remaining.as_deref().into_iter().flatten().zip(breakers.configured.max) {
            gauge.set(max);
        }
        Ok(breakers)
    }

    fn max(&self, resource: Resource) -> u64 {
        let in_force = self.in_force.get_or_init(|| Box::new(self.resolve()));
        self.bound(in_force, resource)
    }

    fn bound(&self, in_force: &InForce, resource: Resource) -> u64 {
        match (&in_force.retry_budget, resource) {
            (Some((percent, minimum)), Resource::Retries) => {
                let of = |resource: Resource| self.limits[resource as usize].count.load(Ordering::Relaxed);
                let active = of(Resource::Requests) + of(Resource::Pending);
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

    fn changed(&self, resource: Resource, max: u64) {
        self.show_remaining(resource, max);
        self.reconcile(resource, max);
    }

    /// Writes what is left, and looks again as [`Breakers::reconcile`] does.
    fn show_remaining(&self, resource: Resource, max: u64) {
        let Some(gauges) = &self.remaining else { return };
        if self.clear_budgeted(resource) {
            return;
        }
        let (gauge, limit) = (&gauges[resource as usize], &self.limits[resource as usize]);
        // Others may write meanwhile; whoever writes last has looked last.
        for _ in 0..ATTEMPTS {
            let used = limit.count.load(Ordering::SeqCst);
            let left = max.saturating_sub(used);
            gauge.set(left);
            if gauge.value() == left && limit.count.load(Ordering::SeqCst) == used {
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
    fn reconcile(&self, resource: Resource, max: u64) {
        let limit = &self.limits[resource as usize];
        loop {
            let open = limit.count.load(Ordering::SeqCst) >= max;
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
        f.debug_struct("Breakers")
            .field("limits", &self.limits)
            .field("configured", &self.configured)
            .finish()
    }
}

impl Drop for Breakers {
    /// The gauges outlive a replaced cluster: what this one added is taken back.
    fn drop(&mut self) {
        for resource in RESOURCES {
            if self.limits[resource as usize].open.load(Ordering::SeqCst) {
                self.open_gauge(resource).dec();
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.release(self.priority, self.resource);
    }
}
