//! The limit on open downstream connections over all listeners and workers.

use std::fmt;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use waystation_filter_api::runtime::{Runtime, RuntimeInteger};
use waystation_stats::{Scope, stats_group};

/// The monitor that is known by name; Envoy knows it by no other.
pub(super) const DOWNSTREAM_CONNECTIONS: &str = "envoy.resource_monitors.global_downstream_max_connections";

/// Envoy's runtime key for the same limit, in force where no monitor is configured.
const RUNTIME_LIMIT: &str = "overload.global_downstream_max_connections";

stats_group! {
    /// `overload.envoy.resource_monitors.global_downstream_max_connections.`
    pub struct MonitorStats {
        counters { failed_updates }
        gauges {
            /// Always 0, as Envoy's: only monitors that are polled have a pressure.
            pressure,
        }
        histograms {}
    }
}

/// The open downstream connections of the process, and how many there may be.
///
/// A connection is counted before it is served and given back when it is dropped, by one atomic for all workers: the
/// limit holds exactly, at the price of one shared write for each connection.
#[derive(Debug)]
pub struct Connections {
    /// All that are open.
    open: AtomicU64,
    /// Those that count against the limit.
    charged: AtomicU64,
    runtime_limit: RuntimeInteger,
    monitor: OnceLock<Monitor>,
}

/// The limit of `overload_manager`.
#[derive(Clone, Debug)]
struct Monitor {
    limit: u64,
    stats: MonitorStats,
}

/// Whether a connection counts against the limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Admission {
    /// It does.
    Limited,
    /// It does not: its listener has `ignore_global_conn_limit` or `bypass_overload_manager`.
    Exempt,
}

impl Connections {
    /// None open; the limit is what the runtime says.
    pub fn new(runtime: &Runtime) -> Self {
        Self {
            open: AtomicU64::new(0),
            charged: AtomicU64::new(0),
            runtime_limit: runtime.integer(RUNTIME_LIMIT, u64::MAX),
            monitor: OnceLock::new(),
        }
    }

    /// Puts the limit of the bootstrap in force, in place of the runtime's. Once, before anything is served.
    pub fn limit(&self, limit: u64, root: &Scope) {
        let scope = root.scope("overload").scope(DOWNSTREAM_CONNECTIONS);
        // A second call changes nothing: the bootstrap is read once.
        let _ = self.monitor.set(Monitor { limit, stats: scope.group() });
    }

    /// How many are open.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Takes a place for a connection; `None` when there is none left.
    pub fn admit(self: &Arc<Self>, admission: Admission) -> Option<Connection> {
        let charged = admission == Admission::Limited;
        if charged && !self.charge() {
            return None;
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        Some(Connection { connections: Arc::clone(self), charged })
    }

    fn charge(&self) -> bool {
        let limit = match self.monitor.get() {
            Some(monitor) => monitor.limit,
            None => self.runtime_limit.get(),
        };
        // Compare and exchange, not add and take back: a refused connection must not for a moment fill a place that
        // another worker asks for. The count guards nothing but itself, so relaxed is enough.
        let below = |count: u64| (count < limit).then_some(count + 1);
        let admitted = self.charged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below).is_ok();
        if let Some(monitor) = self.monitor.get().filter(|_| !admitted) {
            monitor.stats.failed_updates().inc();
        }
        admitted
    }
}

/// One open downstream connection.
#[must_use = "the connection counts as closed when this is dropped"]
pub struct Connection {
    connections: Arc<Connections>,
    charged: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.connections.open.fetch_sub(1, Ordering::Relaxed);
        if self.charged {
            self.connections.charged.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("charged", &self.charged).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use waystation_filter_api::runtime::Layer;
    use waystation_filter_api::value::Value;
    use waystation_stats::Store;

    use super::*;

    #[test]
    fn no_more_than_the_limit_are_open_and_each_place_comes_back() {
        const LIMIT: usize = 7;
        let store = Store::default();
        let connections = Arc::new(Connections::new(&Runtime::new()));
        connections.limit(LIMIT as u64, &store.root());
        let (open, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        let held: Vec<_> =
                            (0..3).filter_map(|_| connections.admit(Admission::Limited)).collect();
                        let now = open.fetch_add(held.len(), Ordering::SeqCst) + held.len();
                        most.fetch_max(now, Ordering::SeqCst);
                        open.fetch_sub(held.len(), Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(most.into_inner() <= LIMIT);
        assert_eq!(connections.open(), 0);
        let held: Vec<_> = (0..=LIMIT).map_while(|_| connections.admit(Admission::Limited)).collect();
        assert_eq!(held.len(), LIMIT);
        let exempt = connections.admit(Admission::Exempt);
        assert!(exempt.is_some());
        assert_eq!(connections.open(), LIMIT as u64 + 1);
        drop((held, exempt));
        assert!(connections.admit(Admission::Limited).is_some());
    }

    #[test]
    fn the_runtime_limits_where_no_monitor_does() {
        let runtime = Runtime::new();
        let connections = Arc::new(Connections::new(&runtime));
        let first = connections.admit(Admission::Limited);
        assert!(first.is_some());
        let values = [(RUNTIME_LIMIT.to_owned(), Value::Number(1.0))].into();
        runtime.set_layers(vec![Layer { name: "l".to_owned(), values }]);
        assert!(connections.admit(Admission::Limited).is_none());
        connections.limit(2, &Store::default().root());
        assert!(connections.admit(Admission::Limited).is_some());
    }
}
