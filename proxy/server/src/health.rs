//! Active health checks: the thread that makes them.
//!
//! They have a thread of their own. On a worker they would take turns from requests; on the main thread a large
//! configuration update would fail hosts by timeouts that are ours, and a thousand answers would hold the update up. There
//! is one task for each host, which sleeps on the runtime's timer wheel between two checks and keeps its connection; what
//! a check needs beyond that (buffers, header maps) is shared by all and held only while an answer is awaited.
//!
//! The thread writes flags of hosts and publishes host sets (`Cluster::refresh`), as the main thread does for discovery.

mod checker;
mod events;
mod probe;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::thread;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, LocalSet};
use waystation_stats::Counter;
use waystation_upstream::Cluster;

pub use checker::Checker;
use watch::Watch;

/// What the main thread says. There are at most two orders for each version of a cluster, so that the queue is bounded by the
/// configuration.
#[derive(Debug)]
enum Order {
    Start(Arc<Cluster>, Arc<Checker>),
    Stop(Arc<Cluster>),
}

/// The main thread's end.
#[derive(Debug)]
pub struct HealthChecks {
    orders: UnboundedSender<Order>,
    /// Until there is something to check and the process serves, there is no thread.
    idle: Option<UnboundedReceiver<Order>>,
    /// One message for each version of a cluster.
    rounds: UnboundedReceiver<Arc<str>>,
    ends: Ends,
}

/// What the thread tells others.
#[derive(Clone, Debug)]
struct Ends {
    /// Clusters all of whose hosts have been checked.
    rounds: UnboundedSender<Arc<str>>,
    /// `cluster_manager.cluster_updated`.
    updated: Counter,
}

impl HealthChecks {
    /// No checks. `updated` counts the changes of hosts that they bring.
    #[expect(
        clippy::disallowed_methods,
        reason = "the configuration bounds both queues: an order is a version of a cluster, and so is its first round"
    )]
    pub fn new(updated: Counter) -> Self {
        let (orders, idle) = unbounded_channel();
        let (told, rounds) = unbounded_channel();
        Self { orders, idle: Some(idle), rounds, ends: Ends { rounds: told, updated } }
    }

    /// Checks the hosts of a cluster until [`Self::stop`].
    pub fn start(&mut self, cluster: &Arc<Cluster>, checker: &Arc<Checker>) {
        self.order(Order::Start(Arc::clone(cluster), Arc::clone(checker)));
    }

    /// The cluster is replaced or gone.
    pub fn stop(&mut self, cluster: &Arc<Cluster>) {
        if cluster.health_check.is_some() {
            self.order(Order::Stop(Arc::clone(cluster)));
        }
    }

    /// The process serves: what is to be checked is checked from now on.
    pub fn run(&mut self) {
        if self.idle.as_ref().is_none_or(UnboundedReceiver::is_empty) {
            return;
        }
        let Some(orders) = self.idle.take() else { return };
        let ends = self.ends.clone();
        let spawned = thread::Builder::new().name("health".to_owned()).spawn(move || check(orders, &ends));
        if let Err(error) = spawned {
            tracing::error!(target: "hc", critical = true, "no thread for health checks: {error}");
        }
    }

    /// The next cluster all of whose hosts have been checked.
    pub async fn next(&mut self) -> Option<Arc<str>> {
        self.rounds.recv().await
    }

    fn order(&self, order: Order) {
        // Without the thread nothing is checked: its end is logged where it happens.
        let _ = self.orders.send(order);
    }
}

fn check(mut orders: UnboundedReceiver<Order>, ends: &Ends) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(target: "hc", critical = true, "health checks have no runtime: {error}");
            return;
        }
    };
    LocalSet::new().block_on(&runtime, async move {
        let mut running: HashMap<*const Cluster, AbortHandle> = HashMap::new();
        while let Some(order) = orders.recv().await {
            match order {
                Order::Start(cluster, checker) => {
                    let key = Arc::as_ptr(&cluster);
                    let watch = Watch::new(cluster, checker, ends.clone());
                    let task = tokio::task::spawn_local(watch.run());
                    running.insert(key, task.abort_handle());
                }
                Order::Stop(cluster) => {
                    if let Some(task) = running.remove(&Arc::as_ptr(&cluster)) {
                        task.abort();
                    }
                }
            }
        }
    });
}
