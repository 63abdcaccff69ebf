//! The worker threads: one runtime each, traffic only.

use std::convert::Infallible;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::LocalSet;

use crate::context::Shared;
use crate::listener::accept::{Handover, Listeners};
use crate::manager::listeners::Order;
use crate::worker::Worker;

/// Orders a worker may be behind; beyond it the main thread waits for the worker.
const QUEUE: usize = 1024;

/// How long the end of the process waits for the workers' ends.
const FINISH: Duration = Duration::from_secs(1);

/// The threads and the queues to them.
#[derive(Debug, Default)]
pub struct Workers {
    queues: Vec<Sender<Order>>,
    threads: Vec<JoinHandle<()>>,
    /// Hangs up when the last thread has ended; nothing is ever sent.
    running: Option<Receiver<Infallible>>,
    shared: Option<Arc<Shared>>,
}

impl Workers {
    /// No threads yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts `count` threads.
    pub fn start(&mut self, count: u32, shared: &Arc<Shared>) -> io::Result<()> {
        self.shared = Some(Arc::clone(shared));
        let (handovers, receivers): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::channel(QUEUE)).unzip();
        let handovers: Arc<[Sender<Handover>]> = handovers.into();
        let (runs, running) = mpsc::channel(1);
        self.running = Some(running);
        for (index, handed) in (0..count).zip(receivers) {
            let (sender, orders) = mpsc::channel(QUEUE);
            let shared = Arc::clone(shared);
            let (handovers, runs) = (Arc::clone(&handovers), runs.clone());
            let thread = thread::Builder::new().name(format!("wrk:worker_{index}")).spawn(move || {
                let _runs = runs;
                run(index, shared, orders, handed, handovers);
            })?;
            self.queues.push(sender);
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Gives the orders to every worker.
    pub fn send(&self, orders: Vec<Order>) {
        for order in orders {
            for queue in &self.queues {
                let mut order = order.clone();
                // A worker takes its orders between two polls of its connections: waiting here is waiting for
                // microseconds, and keeps the order of the orders.
                while let Err(TrySendError::Full(back)) = queue.try_send(order) {
                    order = back;
                    thread::yield_now();
                }
            }
        }
    }

    /// Has the threads end, and their connections with them, so that these are logged before the logs are flushed.
    pub async fn finish(&mut self) {
        self.queues.clear();
        let Some(mut running) = self.running.take() else { return };
        if tokio::time::timeout(FINISH, running.recv()).await.is_err() {
            return tracing::warn!(target: "main", "a worker does not end");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(target: "main", "a worker has panicked");
            }
        }
    }

    /// Downstream connections of all workers.
    pub fn connections(&self) -> u64 {
        self.shared.as_ref().map_or(0, |shared| shared.connections())
    }
}

fn run(
    index: u32,
    shared: Arc<Shared>,
    orders: Receiver<Order>,
    handed: Receiver<Handover>,
    handovers: Arc<[Sender<Handover>]>,
) {
    let _shard = shared.stats.register_worker(index);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(target: "main", critical = true, "worker {index} has no runtime: {error}");
            return;
        }
    };
    let local = LocalSet::new();
    local.block_on(&runtime, async move {
        let worker = Worker::new(index, shared, None);
        Listeners::new(Rc::clone(&worker), handovers).run(orders, handed).await;
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::Workers;
    use crate::context::tests::shared;

    #[tokio::test]
    async fn the_end_waits_for_every_worker() {
        let shared = shared();
        let mut workers = Workers::new();
        workers.start(3, &shared).unwrap();
        workers.finish().await;
        assert!(workers.threads.is_empty());
        drop(workers);
        assert_eq!(Arc::strong_count(&shared), 1, "no worker is left that holds it");
    }
}
