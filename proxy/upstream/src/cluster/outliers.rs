//! Outlier detection of a cluster: its decisions, put in force.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use waystation_filter_api::address::Address;

use super::{Cluster, Discovery};
use crate::host::Host;
use crate::host_set::Snapshot;
use crate::outlier::{Crossing, Decided, Detector, Event, LocalOrigin, Monitor};

impl Cluster {
    /// Has outlier detection count that `host` has answered with this status; that of gRPC as HTTP has it.
    #[inline]
    pub fn answered(&self, host: &Host, status: u16) {
        if let Some(detector) = &self.outlier_detection {
            detector.answered(host, status);
        }
    }

    /// Has outlier detection count what happened on this side.
    #[inline]
    pub fn local_origin(&self, host: &Host, event: LocalOrigin) {
        if let Some(detector) = &self.outlier_detection {
            detector.local_origin(host, event);
        }
    }

    /// The time of an interval of outlier detection has passed. Returns what the event log is to say.
    pub fn on_outlier_interval(&self, now: Instant, rng: &mut fastrand::Rng) -> Vec<Event> {
        self.decide(|detector, hosts| detector.on_interval(hosts, now, rng))
    }

    /// Counts on hosts have reached their thresholds. The hosts are published once, however many there are.
    pub fn on_outlier_crossings(
        &self,
        crossings: &[Crossing],
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> Vec<Event> {
        self.decide(|detector, hosts| {
            let mut all = Decided::default();
            for crossing in crossings {
                let Decided { changed, events } = detector.on_crossing(hosts, crossing, now, rng);
                all.changed |= changed;
                all.events.extend(events);
            }
            all
        })
    }

    /// Ejects what the predecessor had ejected since this cluster took its hosts over.
    pub fn adopt_ejections(&self) {
        let Some(detector) = &self.outlier_detection else { return };
        if detector.adopt(&self.hosts()) {
            self.refresh();
        }
    }

    fn decide(&self, decide: impl FnOnce(&Detector, &[Arc<Host>]) -> Decided) -> Vec<Event> {
        let Some(detector) = &self.outlier_detection else { return Vec::new() };
        let Decided { changed, events } = decide(detector, &self.hosts());
        // Those of ORIGINAL_DST are picked by their address, well or not, and are in no set.
        if changed && !matches!(self.discovery, Discovery::OriginalDst(_)) {
            self.refresh();
        }
        events
    }

    /// Every host, however it is found.
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        self.members(&self.endpoints.snapshot())
    }

    pub(super) fn members(&self, snapshot: &Snapshot) -> Vec<Arc<Host>> {
        match &self.discovery {
            Discovery::OriginalDst(destination) => destination.hosts(),
            _ => snapshot.hosts().cloned().collect(),
        }
    }

    /// What a new host is counted by.
    pub(crate) fn monitor(&self) -> Option<Arc<Monitor>> {
        self.outlier_detection.is_some().then(Arc::default)
    }
}

/// What new hosts of a cluster are counted by: what they were in its predecessor, for those who were there.
pub(super) struct Monitors<'a> {
    cluster: &'a Cluster,
    inherited: Option<HashMap<Address, Arc<Monitor>>>,
}

impl<'a> Monitors<'a> {
    pub(super) fn new(cluster: &'a Cluster) -> Self {
        Self { cluster, inherited: None }
    }

    pub(super) fn of(&mut self, address: &Address) -> Option<Arc<Monitor>> {
        let fresh = self.cluster.monitor()?;
        let previous = &self.cluster.previous;
        let inherited = self.inherited.get_or_insert_with(|| {
            let previous = previous.as_ref().and_then(Weak::upgrade);
            let hosts = previous.map(|cluster| cluster.hosts()).unwrap_or_default();
            hosts
                .iter()
                .filter_map(|host| Some((host.address().clone(), Arc::clone(host.monitor()?))))
                .collect()
        });
        Some(inherited.get(address).cloned().unwrap_or(fresh))
    }
}
