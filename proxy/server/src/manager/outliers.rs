//! Outlier detection of all clusters: who is looked at when, what workers report, and the event log.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use envoy_types::pb::envoy::config::bootstrap::v3::cluster_manager as pb;
use tokio::sync::mpsc;
use waystation_filter_api::wire::refuse;
use waystation_format::EventLog;
use waystation_schema::{At as _, ConfigError};
use waystation_upstream::outlier::{Crossing, Event, OutlierStats, Report};

use super::clusters::Clusters;
use crate::context::Shared;

/// The clusters with `outlier_detection`, and what has been reported of their hosts.
pub struct Outliers {
    crossings: mpsc::UnboundedReceiver<Crossing>,
    report: Arc<Report>,
    /// When which cluster is looked at next.
    due: BTreeSet<(Instant, Arc<str>)>,
    watched: HashMap<Arc<str>, (Instant, OutlierStats)>,
    random: fastrand::Rng,
    log: Option<EventLog>,
}

impl Outliers {
    /// Watches nothing yet.
    #[expect(
        clippy::disallowed_methods,
        reason = "the hosts bound the queue: of each there is one crossing of a kind, and one a check"
    )]
    pub fn new(proto: Option<&pb::OutlierDetection>, shared: &Shared) -> Result<Self, ConfigError> {
        let mut log = None;
        if let Some(pb::OutlierDetection { event_log_path, event_service }) = proto {
            refuse("event_service", event_service.is_some(), "events are written to event_log_path")?;
            if !event_log_path.is_empty() {
                log = Some(EventLog::open(event_log_path, &shared.access_logs).at(|| "event_log_path")?);
            }
        }
        let (sender, crossings) = mpsc::unbounded_channel();
        // Nobody listens any more when the process ends.
        let report = Arc::new(move |crossing| drop(sender.send(crossing)));
        Ok(Self {
            crossings,
            report,
            due: BTreeSet::new(),
            watched: HashMap::new(),
            random: fastrand::Rng::new(),
            log,
        })
    }

    /// What workers report by.
    pub fn report(&self) -> Arc<Report> {
        Arc::clone(&self.report)
    }

    /// Looks after a cluster that has come into force, or is gone.
    pub fn watch(&mut self, name: &str, now: Instant, clusters: &Clusters) {
        let cluster = clusters.in_force(name);
        let detector = cluster.and_then(|cluster| cluster.outlier_detection.as_deref());
        if let Some((name, (at, stats))) = self.watched.remove_entry(name) {
            self.due.remove(&(at, name));
            if detector.is_none() {
                stats.ejections_active().sub(stats.ejections_active().value());
            }
        }
        if let (Some(cluster), Some(detector)) = (cluster, detector) {
            cluster.adopt_ejections();
            self.look_again(cluster.name().into(), now + detector.interval(), detector.stats());
        }
    }

    fn look_again(&mut self, name: Arc<str>, at: Instant, stats: &OutlierStats) {
        self.watched.insert(Arc::clone(&name), (at, stats.clone()));
        self.due.insert((at, name));
    }

    /// Looks at the clusters whose interval has passed.
    pub fn tick(&mut self, now: Instant, clusters: &Clusters) {
        while self.due.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, name)) = self.due.pop_first() else { return };
            let Some(cluster) = clusters.in_force(&name) else { continue };
            let Some(detector) = &cluster.outlier_detection else { continue };
            let events = cluster.on_outlier_interval(now, &mut self.random);
            self.publish(&events, clusters);
            self.look_again(name, now + detector.interval(), detector.stats());
        }
    }

    /// When a cluster is to be looked at.
    pub fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// What workers have reported; nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> Vec<Crossing> {
        let Some(first) = self.crossings.recv().await else { return std::future::pending().await };
        let mut all = vec![first];
        while let Ok(crossing) = self.crossings.try_recv() {
            all.push(crossing);
        }
        all
    }

    /// Decides over what workers have reported.
    pub fn decide(&mut self, crossings: Vec<Crossing>, clusters: &Clusters) {
        let mut by_cluster: BTreeMap<Arc<str>, Vec<Crossing>> = BTreeMap::new();
        for crossing in crossings {
            by_cluster.entry(Arc::clone(&crossing.cluster)).or_default().push(crossing);
        }
        let now = Instant::now();
        for (name, crossings) in by_cluster {
            // It may be gone by now.
            let Some(cluster) = clusters.in_force(&name) else { continue };
            let events = cluster.on_outlier_crossings(&crossings, now, &mut self.random);
            self.publish(&events, clusters);
        }
    }

    fn publish(&self, events: &[Event], clusters: &Clusters) {
        if events.is_empty() {
            return;
        }
        clusters.count_update();
        let wall = SystemTime::now();
        for event in events {
            tracing::debug!(target: "upstream", "outlier detection: {} {:?}", event.address(), event.ejection());
            if let Some(log) = &self.log {
                let mut line = event.to_json(wall);
                line.push('\n');
                log.write(line.as_bytes());
            }
        }
    }
}

impl std::fmt::Debug for Outliers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outliers").field("due", &self.due).finish_non_exhaustive()
    }
}
