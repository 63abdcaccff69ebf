//! Who calls: what runtime says of the cluster that a request names in `x-envoy-downstream-service-cluster`, and what is
//! counted for it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use waystation_filter_api::runtime::{Fraction, Runtime, RuntimeFraction, RuntimeInteger};
use waystation_http::{Headers, Known};
use waystation_stats::{Counter, Scope};

/// So many callers are known. Those that come later are treated as nameless: who makes up names must not have runtime, which
/// is behind a lock, asked for each of them.
const MAX_KNOWN: usize = 1024;

/// The callers of one filter.
pub(super) struct Callers {
    /// Below which the callers have theirs.
    scope: Scope,
    runtime: Runtime,
    /// Read by each request that names its cluster and that the filter concerns, hence not behind the lock.
    known: ArcSwap<HashMap<Box<[u8]>, Arc<Caller>>>,
    learning: Mutex<()>,
}

/// One downstream cluster.
pub(super) struct Caller {
    pub(super) delay_percent: RuntimeFraction,
    pub(super) delay_ms: RuntimeInteger,
    pub(super) abort_percent: RuntimeFraction,
    pub(super) http_status: RuntimeInteger,
    pub(super) grpc_status: RuntimeInteger,
    /// Nothing is counted for a cluster without a name.
    scope: Option<Scope>,
    aborts: OnceLock<Counter>,
    delays: OnceLock<Counter>,
}

impl Callers {
    pub(super) fn new(scope: Scope, runtime: Runtime) -> Self {
        Self { scope, runtime, known: ArcSwap::default(), learning: Mutex::default() }
    }

    /// The caller that a request names, unless there are too many.
    pub(super) fn of(&self, head: &Headers) -> Option<Arc<Caller>> {
        let name = head.get(Known::XEnvoyDownstreamServiceCluster)?;
        let known = self.known.load();
        if let Some(known) = known.get(name) {
            return Some(Arc::clone(known));
        }
        if known.len() >= MAX_KNOWN {
            return None;
        }
        let _one_at_a_time = self.learning.lock();
        let known = self.known.load();
        if let Some(known) = known.get(name) {
            return Some(Arc::clone(known));
        }
        if known.len() >= MAX_KNOWN {
            return None;
        }
        let caller = Arc::new(self.caller(&String::from_utf8_lossy(name)));
        let mut more = HashMap::clone(&known);
        more.insert(name.into(), Arc::clone(&caller));
        self.known.store(Arc::new(more));
        Some(caller)
    }

    fn caller(&self, name: &str) -> Caller {
        let runtime = &self.runtime;
        let integer = |leaf| runtime.integer(&format!("fault.http.{name}.{leaf}"), 0);
        let fraction = |leaf| runtime.fraction(&format!("fault.http.{name}.{leaf}"), Fraction::NEVER);
        Caller {
            delay_percent: fraction("delay.fixed_delay_percent"),
            delay_ms: integer("delay.fixed_duration_ms"),
            abort_percent: fraction("abort.abort_percent"),
            http_status: integer("abort.http_status"),
            grpc_status: integer("abort.grpc_status"),
            scope: (!name.is_empty()).then(|| self.scope.tag("envoy.fault_downstream_cluster", name)),
            aborts: OnceLock::new(),
            delays: OnceLock::new(),
        }
    }
}

impl Caller {
    pub(super) fn count_abort(&self) {
        self.count(&self.aborts, "aborts_injected");
    }

    pub(super) fn count_delay(&self) {
        self.count(&self.delays, "delays_injected");
    }

    fn count(&self, counter: &OnceLock<Counter>, name: &str) {
        if let Some(scope) = &self.scope {
            counter.get_or_init(|| scope.counter(name)).inc();
        }
    }
}

impl fmt::Debug for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callers").field("known", &self.known.load().len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{Callers, MAX_KNOWN};
    use waystation_filter_api::runtime::Runtime;
    use waystation_http::{Headers, Known};
    use waystation_stats::Store;

    #[test]
    fn so_many_are_remembered_and_no_more() {
        let store = Store::default();
        let callers = Callers::new(store.root().scope("http.in.fault"), Runtime::new());
        let of = |name: &str| {
            let mut head = Headers::new();
            head.append(Known::XEnvoyDownstreamServiceCluster, name);
            callers.of(&head)
        };
        assert!(callers.of(&Headers::new()).is_none());
        of("").unwrap().count_delay();
        for i in 0..MAX_KNOWN - 1 {
            of(&i.to_string()).unwrap().count_abort();
        }
        assert!(of("one more").is_none());
        of("0").unwrap().count_abort();
        assert_eq!(callers.known.load().len(), MAX_KNOWN);
        assert_eq!(store.find("http.in.fault.0.aborts_injected"), Some(2));
        assert_eq!(store.find("http.in.fault.delays_injected"), None);
    }
}
