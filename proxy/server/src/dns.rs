//! What runs on the main thread for the endpoints of clusters: DNS, and the clean-up of ORIGINAL_DST hosts.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use waystation_stats::Counter;
use waystation_upstream::cluster::{Cluster, Discovery};
use waystation_upstream::discovery::{HickoryResolver, drive};

/// Answers that the main thread may be behind; beyond it a cluster's task waits.
const QUEUE: usize = 256;

/// A cluster got endpoints.
#[derive(Debug)]
pub struct DnsEvent {
    /// The cluster's name.
    pub cluster: Arc<str>,
}

/// One task for each cluster that needs one.
#[derive(Debug)]
pub struct DnsTasks {
    tasks: HashMap<*const Cluster, AbortHandle>,
    sender: mpsc::Sender<DnsEvent>,
    receiver: mpsc::Receiver<DnsEvent>,
    /// An event found the queue full.
    missed: Arc<AtomicBool>,
    /// `cluster_manager.cluster_updated`.
    updated: Counter,
}

impl DnsTasks {
    /// No tasks. `updated` counts the changes after a cluster's first endpoints.
    pub fn new(updated: Counter) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self { tasks: HashMap::new(), sender, receiver, missed: Arc::default(), updated }
    }

    /// Looks after the cluster's endpoints until [`Self::stop`].
    pub fn start(&mut self, cluster: &Arc<Cluster>) {
        let task = match &cluster.discovery {
            Discovery::Dns(settings) => {
                let resolver = match HickoryResolver::new(&settings.resolver) {
                    Ok(resolver) => resolver,
                    Err(error) => {
                        tracing::error!(target: "dns", "cluster '{}' has no resolver: {error:?}", cluster.name());
                        // It must not keep the process from starting.
                        cluster.assignment_timed_out();
                        return;
                    }
                };
                let cluster = Arc::clone(cluster);
                let (sender, missed) = (self.sender.clone(), Arc::clone(&self.missed));
                let (name, updated): (Arc<str>, _) = (cluster.name().into(), self.updated.clone());
                let mut has_endpoints = false;
                tokio::spawn(async move {
                    // The cluster is changed already; the main thread only learns that it may be warm. When its queue
                    // is full it is told to look at all of them.
                    drive(&cluster, &resolver, |applied| {
                        if std::mem::replace(&mut has_endpoints, true) && applied.rebuilt {
                            updated.inc();
                        }
                        if sender.try_send(DnsEvent { cluster: Arc::clone(&name) }).is_err() {
                            missed.store(true, Ordering::Relaxed);
                        }
                    })
                    .await;
                })
            }
            Discovery::OriginalDst(destination) => {
                let mut ticks = tokio::time::interval(destination.cleanup_interval);
                let cluster = Arc::clone(cluster);
                tokio::spawn(async move {
                    loop {
                        ticks.tick().await;
                        if let Discovery::OriginalDst(destination) = &cluster.discovery {
                            destination.clean_up(&cluster);
                        }
                    }
                })
            }
            Discovery::Static | Discovery::Eds(_) => return,
        };
        self.tasks.insert(Arc::as_ptr(cluster), task.abort_handle());
    }

    /// The cluster is replaced or gone.
    pub fn stop(&mut self, cluster: &Arc<Cluster>) {
        if let Some(task) = self.tasks.remove(&Arc::as_ptr(cluster)) {
            task.abort();
        }
    }

    /// Whether, since it was asked, a cluster got endpoints without an event.
    pub fn missed(&self) -> bool {
        self.missed.swap(false, Ordering::Relaxed)
    }

    /// The next cluster that got endpoints.
    pub async fn next(&mut self) -> Option<DnsEvent> {
        self.receiver.recv().await
    }
}
