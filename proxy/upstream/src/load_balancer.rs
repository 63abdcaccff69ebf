//! Picking a host: what a worker does for each attempt of a request.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use waystation_filter_api::address::Address;
use waystation_filter_api::cell::Held;

pub(crate) mod build;
mod edf;
mod hashing;
mod pick;
pub(crate) mod policy;
pub(crate) mod priority;
pub(crate) mod subset;

pub use policy::LbPolicy;
pub use priority::{PreviousPriorities, PriorityLoad};
pub use subset::MetadataMatch;

use crate::cluster::{Cluster, Discovery};
use crate::discovery::OriginalDstCache;
use crate::host::Host;
use crate::host_set::Snapshot;
use edf::Edf;
use pick::Picker;

/// What a request asks of its host.
#[derive(Clone, Copy, Default)]
pub struct PickContext<'a> {
    /// The hash of the route's hash policy.
    pub hash: Option<u64>,
    /// The route's `metadata_match`, merged with that of the weighted cluster.
    pub metadata_match: Option<&'a MetadataMatch>,
    /// A host that a session wants (stateful sessions, `override_host`).
    pub override_host: Option<OverrideHost<'a>>,
    /// Where ORIGINAL_DST clusters go: see [`OriginalDestination`].
    pub original_destination: Option<OriginalDestination<'a>>,
    /// The load of priority levels for a retry (`retry_priority`).
    pub priority_load: Option<&'a PriorityLoad>,
    /// Whether another host should be looked for (`retry_host_predicate`).
    pub reject: Option<&'a dyn Fn(&Host) -> bool>,
    /// `host_selection_retry_max_attempts`: how often to look for another host.
    pub reselections: u32,
}

/// The host that a session wants.
#[derive(Clone, Copy, Debug)]
pub struct OverrideHost<'a> {
    /// Its address.
    pub address: &'a Address,
    /// Whether no other host will do.
    pub strict: bool,
}

/// What the request says of its original destination; the cluster's configuration decides which counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct OriginalDestination<'a> {
    /// The downstream connection's local address, if it was restored (`original_dst` listener filter, PROXY protocol).
    pub local_address: Option<&'a Address>,
    /// The value of the header that the cluster names ([`crate::discovery::OriginalDst::header`]).
    pub header: Option<&'a [u8]>,
    /// The value at the cluster's metadata key.
    pub metadata: Option<&'a str>,
    /// The address in filter state `envoy.network.transport_socket.original_dst_address`.
    pub filter_state: Option<&'a Address>,
}

/// Why there is no host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NoHost {
    /// None is healthy, or there is none at all: 503 `UH`.
    NoHealthyHost,
    /// The session's host is gone and no other will do.
    OverrideHostUnavailable,
    /// An ORIGINAL_DST cluster was given no usable address.
    InvalidOriginalDestination,
    /// `max_connection_pools` allows no pool for the host that was picked.
    PoolOverflow,
}

/// One worker's state of one cluster: the snapshot it picks from, and where it is in each schedule.
#[derive(Default)]
pub struct LocalLb {
    held: Option<(u64, Held<Snapshot>)>,
    cursors: Cursors,
    original: OriginalDstCache,
}

/// Positions in the schedules of a snapshot, made on first use.
#[derive(Default)]
pub(crate) struct Cursors {
    hosts: Vec<Cursor>,
    localities: Vec<Option<Box<Edf>>>,
    scratch: Vec<u32>,
}

#[derive(Default)]
pub(crate) enum Cursor {
    #[default]
    Unset,
    /// Equal weights.
    Next(u32),
    Weighted(Box<Edf>),
}

impl Cluster {
    /// Picks a host. Steady state: one relaxed load to see that the snapshot is still the newest, no lock, no allocation, no
    /// shared reference count. The host lives as long as the worker's snapshot; clone the `Arc` for a new pool only.
    ///
    /// # Errors
    /// When no host can be used.
    pub fn pick<'a>(
        &self,
        local: &'a mut LocalLb,
        cx: &PickContext<'_>,
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Result<&'a Arc<Host>, NoHost> {
        if let Discovery::OriginalDst(destination) = &self.discovery {
            return destination.pick(self, &mut local.original, cx, now);
        }
        local.sync(self);
        let LocalLb { held, cursors, .. } = local;
        let Some((_, snapshot)) = held else { return Err(NoHost::NoHealthyHost) };
        let snapshot: &'a Snapshot = snapshot;
        if let Some(wanted) = cx.override_host {
            let found = snapshot.host_at(wanted.address);
            if let Some(host) =
                found.filter(|host| self.policy.override_statuses >> (host.eds_status() as u32) & 1 == 1)
            {
                return Ok(host);
            }
            if wanted.strict {
                return Err(NoHost::OverrideHostUnavailable);
            }
        }
        let mut picker = Picker { cluster: self, snapshot, cursors, cx, rng, now };
        picker.pick().ok_or(NoHost::NoHealthyHost)
    }
}

impl LocalLb {
    /// The newest snapshot, for callers that look at the cluster's hosts themselves.
    pub fn snapshot(&mut self, cluster: &Cluster) -> Option<&Held<Snapshot>> {
        self.sync(cluster);
        self.held.as_ref().map(|(_, snapshot)| snapshot)
    }

    fn sync(&mut self, cluster: &Cluster) {
        let generation = cluster.endpoints.generation();
        if self.held.as_ref().is_some_and(|(held, _)| *held == generation) {
            return;
        }
        let snapshot = cluster.endpoints.snapshot();
        self.cursors.hosts.clear();
        self.cursors.hosts.resize_with(snapshot.sources.len(), Cursor::default);
        self.cursors.localities.clear();
        self.cursors.localities.resize_with(snapshot.locality_schedules as usize, || None);
        self.held = Some((generation, Held::new(snapshot)));
    }
}

impl fmt::Debug for LocalLb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalLb")
            .field("generation", &self.held.as_ref().map(|(generation, _)| *generation))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PickContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PickContext").field("hash", &self.hash).finish_non_exhaustive()
    }
}
