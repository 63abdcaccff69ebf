//! The live part of a cluster: applying assignments and publishing snapshots.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint_pb;
use parking_lot::Mutex;
use waystation_filter_api::address::Address;
use waystation_filter_api::value::Metadata;
use waystation_schema::ConfigError;
use waystation_stats::Gauge;

use super::outliers::Monitors;
use super::{Cluster, Discovery};
use crate::discovery::{Assignment, EndpointSpec, LocalityAssignment};
use crate::host::{Health, HealthCheckTarget, HealthFlag, Host, HostState, Locality};
use crate::host_set::{AssignmentPolicy, HostSet, LocalityHosts, Snapshot};
use crate::load_balancer::build::{Builder, LocalZones};
use crate::load_balancer::policy::{HashPolicy, Kind, TableKind};
use crate::stats::{MaglevStats, RingHashStats};
use crate::target::Target;

/// What an update did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Whether a new snapshot was published.
    pub rebuilt: bool,
    /// Hosts that came in.
    pub added: Vec<Arc<Host>>,
    /// Hosts that are gone: their pools drain.
    pub removed: Vec<Arc<Host>>,
}

/// The endpoints in force.
#[derive(Debug)]
pub struct Endpoints {
    snapshot: ArcSwap<Snapshot>,
    /// Moves after each publication, so that a worker sees a change by one load.
    generation: AtomicU64,
    initialized: AtomicBool,
    /// Updates are made one after the other.
    updating: Mutex<()>,
    hash_stats: OnceLock<HashStats>,
    subset_duplicates: OnceLock<Box<Gauge>>,
}

#[derive(Debug)]
enum HashStats {
    Ring(RingHashStats),
    Maglev(MaglevStats),
}

/// One priority level under construction.
#[derive(Default)]
struct LevelDraft {
    hosts: Vec<Arc<Host>>,
    localities: Vec<(Arc<Locality>, u32, Vec<Arc<Host>>)>,
}

impl Endpoints {
    pub(super) fn empty() -> Self {
        // Clusters that wait for their endpoints share one empty snapshot.
        static EMPTY: OnceLock<Arc<Snapshot>> = OnceLock::new();
        let empty = EMPTY.get_or_init(|| {
            let policy = AssignmentPolicy::default();
            Arc::new(Snapshot::new(Box::default(), policy, Vec::new(), Default::default(), None, 0))
        });
        Self {
            snapshot: ArcSwap::new(Arc::clone(empty)),
            generation: AtomicU64::new(0),
            initialized: AtomicBool::new(false),
            updating: Mutex::new(()),
            hash_stats: OnceLock::new(),
            subset_duplicates: OnceLock::new(),
        }
    }

    /// The hosts in force. Takes a shared reference: for control code; workers go through
    /// [`LocalLb`](crate::load_balancer::LocalLb).
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Whether there has been an assignment (or a DNS answer), the first step of warming.
    pub fn initialized(&self) -> bool {
        self.initialized.load(Ordering::Acquire)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn publish(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
        // After the store: whoever sees the new number finds the new snapshot.
        self.generation.fetch_add(1, Ordering::Release);
    }
}

impl Cluster {
    /// Applies an EDS assignment.
    ///
    /// # Errors
    /// When it is invalid; the endpoints in force stay, and the error goes into the NACK.
    pub fn apply_eds(
        &self,
        proto: &endpoint_pb::ClusterLoadAssignment,
        now: Instant,
    ) -> Result<Applied, ConfigError> {
        let compiled = Assignment::compile(proto).and_then(|assignment| {
            assignment.require_addresses()?;
            Ok(assignment)
        });
        match compiled {
            Ok(assignment) => Ok(self.apply(&assignment, now)),
            Err(error) => Err(error),
        }
    }

    /// Notes that no assignment came in time: the cluster starts without endpoints, or goes on with the held ones.
    pub fn assignment_timed_out(&self) {
        self.stats.assignment_timeout_received().inc();
        self.endpoints.initialized.store(true, Ordering::Release);
        self.tell_hosts_changed();
    }

    /// Active health checks follow the hosts.
    fn tell_hosts_changed(&self) {
        if let Some(check) = &self.health_check {
            check.tell_hosts_changed();
        }
    }

    /// Drops endpoints that were not refreshed within `endpoint_stale_after`.
    pub fn assignment_stale(&self, now: Instant) -> Applied {
        self.stats.assignment_stale().inc();
        self.apply(&Assignment::default(), now)
    }

    /// Makes an assignment without names the endpoints in force. Endpoints that stay keep their state: pools, counts and
    /// health; nothing is rebuilt when nothing changed.
    pub fn apply(&self, assignment: &Assignment, now: Instant) -> Applied {
        let _serial = self.endpoints.updating.lock();
        self.endpoints.initialized.store(true, Ordering::Release);
        let old = self.endpoints.snapshot();
        let known: HashMap<&Address, &Arc<Host>> = old.hosts().map(|host| (host.address(), host)).collect();
        let logical = matches!(&self.discovery, Discovery::Dns(settings) if settings.logical);

        let mut applied = Applied::default();
        let mut changed = assignment.policy != *old.policy();
        let mut levels: Vec<LevelDraft> = Vec::new();
        let mut monitors = Monitors::new(self);
        let mut seen: HashMap<(u32, &Address), ()> = HashMap::new();
        for group in &assignment.localities {
            let level = group.priority as usize;
            if levels.len() <= level {
                levels.resize_with(level + 1, LevelDraft::default);
            }
            let mut members = Vec::with_capacity(group.endpoints.len());
            for spec in &group.endpoints {
                let Target::Address(address) = &spec.target else { continue };
                if seen.insert((group.priority, address), ()).is_some() {
                    continue;
                }
                let before = known.get(address).copied().filter(|host| self.is_checked_alike(host, spec));
                // The one host of a LOGICAL_DNS cluster stays itself when its name resolves to another address.
                let state = before.or_else(|| old.hosts().next().filter(|_| logical)).map(|host| &host.state);
                let health_before = state.map(|state| state.flags());
                let state = match state {
                    Some(state) => Arc::clone(state),
                    None => HostState::new(now, monitors.of(address)),
                };
                let is_new = health_before.is_none() || before.is_some_and(|host| host.is_unchecked());
                self.set_unchecked(&state, spec, is_new, now);
                state.set_eds_status(spec.status, now);
                changed |= health_before.is_some_and(|before| before != state.flags());
                let host = match before.filter(|host| describes(host, spec, group.priority, &group.locality))
                {
                    Some(same) => Arc::clone(same),
                    None => {
                        changed = true;
                        let host = self.host(spec, address, group, state);
                        if health_before.is_none() {
                            applied.added.push(Arc::clone(&host));
                        }
                        host
                    }
                };
                members.push(host);
            }
            levels[level].add(&group.locality, group.weight, members);
        }
        drop(seen);
        changed |= self.keep_removed(&old, &mut levels);
        let sets: Box<[HostSet]> =
            levels.into_iter().map(|level| level.finish(&self.environment.locality)).collect();

        changed |= !same_shape(&old.sets, &sets);
        let ids: HashSet<u64> = sets.iter().flat_map(|set| set.hosts.iter().map(|host| host.id())).collect();
        applied.removed = old.hosts().filter(|host| !ids.contains(&host.id())).cloned().collect();
        if !changed && self.endpoints.generation() > 0 {
            self.stats.update_no_rebuild().inc();
            return applied;
        }
        if !applied.added.is_empty() || !applied.removed.is_empty() {
            self.stats.membership_change().inc();
        }
        self.publish(sets, assignment.policy.clone(), &old);
        self.tell_hosts_changed();
        applied.rebuilt = true;
        applied
    }

    /// Whether checks of the known host are checks of the described one: else it is another, about which nothing is known.
    fn is_checked_alike(&self, host: &Host, spec: &EndpointSpec) -> bool {
        let at = |target: Option<&HealthCheckTarget>| target.map(|target| target.address(host.address()));
        let described = spec.details.as_ref().and_then(|details| details.health_check.as_ref());
        self.health_check.is_none()
            || at(host.health_check()).as_ref().unwrap_or(host.address())
                == at(described).as_ref().unwrap_or(host.address())
    }

    /// A host that is to be checked counts as failed until it has been; one that is not has no such flags.
    fn set_unchecked(&self, state: &HostState, spec: &EndpointSpec, is_new: bool, now: Instant) {
        let Some(check) = &self.health_check else { return };
        let target = spec.details.as_ref().and_then(|details| details.health_check.as_ref());
        let disabled = target.is_some_and(|target| target.disabled);
        state.change(0, HealthFlag::PendingDynamicRemoval as u32, now);
        if disabled {
            state.change(0, HealthFlag::ACTIVE, now);
        } else if is_new {
            state.change(check.unchecked(), 0, now);
        }
    }

    /// Hosts that discovery knows no longer stay as long as they pass their checks. Returns whether that is new of one.
    fn keep_removed(&self, old: &Snapshot, levels: &mut Vec<LevelDraft>) -> bool {
        if self.health_check.as_ref().is_none_or(|check| !check.keeps_removed_hosts) {
            return false;
        }
        let listed: HashSet<u64> =
            levels.iter().flat_map(|level| &level.hosts).map(|host| host.id()).collect();
        let addresses: HashSet<Address> =
            levels.iter().flat_map(|level| &level.hosts).map(|host| host.address().clone()).collect();
        let mut changed = false;
        for (priority, set) in old.sets.iter().enumerate() {
            for locality in &set.localities {
                let kept = locality.hosts.iter().filter(|host| {
                    let failed = host.has_flag(HealthFlag::FailedActiveHc)
                        || host.has_flag(HealthFlag::FailedEdsHealth);
                    !failed && !listed.contains(&host.id()) && !addresses.contains(host.address())
                });
                let kept: Vec<Arc<Host>> = kept.cloned().collect();
                if kept.is_empty() {
                    continue;
                }
                for host in &kept {
                    changed |= host.set_flag(HealthFlag::PendingDynamicRemoval, true);
                }
                if levels.len() <= priority {
                    levels.resize_with(priority + 1, LevelDraft::default);
                }
                levels[priority].keep(&locality.locality, locality.weight, kept);
            }
        }
        changed
    }

    /// Lets go of hosts that discovery removed some time ago, and that now fail their checks too.
    pub fn drop_removed(&self) {
        let is_over = |host: &Arc<Host>| {
            host.has_flag(HealthFlag::PendingDynamicRemoval) && host.has_flag(HealthFlag::FailedActiveHc)
        };
        let _serial = self.endpoints.updating.lock();
        let old = self.endpoints.snapshot();
        if !old.hosts().any(is_over) {
            return;
        }
        let levels = old.sets.iter().map(|set| {
            let mut level = LevelDraft::default();
            for locality in &set.localities {
                let members: Vec<_> = locality.hosts.iter().filter(|host| !is_over(host)).cloned().collect();
                if !members.is_empty() {
                    level.add(&locality.locality, locality.weight, members);
                }
            }
            level.finish(&self.environment.locality)
        });
        let sets = levels.collect();
        self.stats.membership_change().inc();
        self.publish(sets, old.policy.clone(), &old);
        self.tell_hosts_changed();
    }

    /// Builds the balancers anew over the same hosts: after health flags changed, or the local cluster did.
    pub fn refresh(&self) {
        let _serial = self.endpoints.updating.lock();
        let old = self.endpoints.snapshot();
        self.publish(old.sets.clone(), old.policy.clone(), &old);
    }

    fn host(
        &self,
        spec: &EndpointSpec,
        address: &Address,
        group: &LocalityAssignment,
        state: Arc<HostState>,
    ) -> Arc<Host> {
        Arc::new(Host {
            state,
            address: address.clone(),
            locality: Arc::clone(&group.locality),
            metadata: spec.metadata.clone(),
            weight: spec.weight,
            priority: group.priority,
            transport: self.transport_for(spec.metadata.as_deref(), group.metadata.as_deref()),
            details: spec.details.clone().map(Box::new),
        })
    }

    /// The transport socket that `transport_socket_match_criteria` choose.
    pub fn transport_matching(&self, criteria: &Metadata) -> super::TransportFactory {
        self.transport_for(Some(criteria), None)
    }

    /// The transport socket of an endpoint with this metadata.
    pub(crate) fn transport_for(
        &self,
        endpoint: Option<&Metadata>,
        locality: Option<&Metadata>,
    ) -> super::TransportFactory {
        let found = self.sockets.matching(endpoint, locality).unwrap_or_else(|| {
            self.stats.socket_match_default().inc();
            self.sockets.default_socket()
        });
        Arc::clone(found)
    }

    fn publish(&self, sets: Box<[HostSet]>, policy: AssignmentPolicy, old: &Snapshot) {
        let zones = self
            .environment
            .local_cluster
            .as_ref()
            .and_then(|cell| cell.get())
            .map(|local| LocalZones::of(&local.endpoints.snapshot(), self.policy.panic_threshold.get()));
        let snapshot = Builder::new(&self.policy, policy, zones.as_ref(), &self.stats).snapshot(sets);
        self.count(&snapshot, old);
        self.endpoints.publish(snapshot);
        if let Some(watch) = &self.health_watch {
            watch.send_replace(());
        }
    }

    fn count(&self, snapshot: &Snapshot, old: &Snapshot) {
        let stats = &self.stats;
        let (mut healthy, mut degraded, mut excluded, mut weight) = (0, 0, 0, 0);
        for host in snapshot.hosts() {
            healthy += u64::from(host.health() == Health::Healthy);
            degraded += u64::from(host.health() == Health::Degraded);
            excluded += u64::from(host.excluded());
            weight = weight.max(host.weight());
        }
        stats.membership_total().set(snapshot.len() as u64);
        stats.membership_healthy().set(healthy);
        stats.membership_degraded().set(degraded);
        stats.membership_excluded().set(excluded);
        if let Some(detector) = &self.outlier_detection {
            detector.count(&self.members(snapshot));
        }
        // Envoy looks at the weights of what is discovered only.
        if !matches!(self.discovery, Discovery::Static) {
            stats.max_host_weight().set(u64::from(weight));
        }
        if let Some(subsets) = &snapshot.subsets {
            let before = old.subsets.as_deref();
            let created =
                subsets.hashes().filter(|hash| before.is_none_or(|before| !before.has(*hash))).count();
            let removed =
                before.map_or(0, |before| before.hashes().filter(|hash| !subsets.has(*hash)).count());
            // Envoy counts what each worker and its main thread build for themselves.
            let builders = u64::from(self.scope.workers()) + 1;
            stats.lb_subsets_created().add(created as u64 * builders);
            stats.lb_subsets_removed().add(removed as u64 * builders);
            stats.lb_subsets_active().set(subsets.list.len() as u64 * builders);
            let name = "lb_subsets_single_host_per_subset_duplicate";
            let duplicates = &self.endpoints.subset_duplicates;
            duplicates.get_or_init(|| Box::new(self.scope.gauge(name))).set(subsets.duplicates);
        }
        if let Kind::Hash(HashPolicy { table, .. }) = self.policy.kind {
            let built = snapshot.root.levels.iter().filter_map(|level| level.table.as_ref());
            for built in built.filter(|table| table.len() > 0) {
                let stats = self.endpoints.hash_stats.get_or_init(|| match table {
                    TableKind::Ring { .. } => HashStats::Ring(self.scope.scope("ring_hash_lb").group()),
                    TableKind::Maglev { .. } => HashStats::Maglev(self.scope.scope("maglev_lb").group()),
                });
                match stats {
                    HashStats::Ring(stats) => {
                        stats.size().set(built.len() as u64);
                        stats.min_hashes_per_host().set(built.spread.0);
                        stats.max_hashes_per_host().set(built.spread.1);
                    }
                    HashStats::Maglev(stats) => {
                        stats.min_entries_per_host().set(built.spread.0);
                        stats.max_entries_per_host().set(built.spread.1);
                    }
                }
            }
        }
    }
}

impl LevelDraft {
    fn add(&mut self, locality: &Arc<Locality>, weight: u32, members: Vec<Arc<Host>>) {
        self.hosts.extend(members.iter().cloned());
        // An assignment may name a locality twice in one level: one entry, the last weight, as in Envoy.
        match self.localities.iter_mut().find(|(known, ..)| known == locality) {
            Some((_, known_weight, hosts)) => {
                *known_weight = weight;
                hosts.extend(members);
            }
            None => self.localities.push((Arc::clone(locality), weight, members)),
        }
    }

    /// As [`Self::add`], of hosts that are no longer listed: what is listed decides on the weight.
    fn keep(&mut self, locality: &Arc<Locality>, weight: u32, members: Vec<Arc<Host>>) {
        let listed =
            self.localities.iter().find(|(known, ..)| known == locality).map(|(_, weight, _)| *weight);
        self.add(locality, listed.unwrap_or(weight), members);
    }

    fn finish(mut self, own: &Locality) -> HostSet {
        let is_own = |locality: &Locality| !own.is_empty() && locality == own;
        self.localities.sort_by(|(a, ..), (b, ..)| (!is_own(a), a).cmp(&(!is_own(b), b)));
        let has_local = self.localities.first().is_some_and(|(locality, ..)| is_own(locality));
        let hosts: Arc<[Arc<Host>]> = self.hosts.into();
        let single = self.localities.len() == 1;
        let localities = self
            .localities
            .into_iter()
            .map(|(locality, weight, members)| LocalityHosts {
                locality,
                weight,
                hosts: if single { Arc::clone(&hosts) } else { members.into() },
            })
            .collect();
        HostSet { hosts, localities, has_local }
    }
}

/// Whether a host is still described correctly.
fn describes(host: &Host, spec: &EndpointSpec, priority: u32, locality: &Arc<Locality>) -> bool {
    host.weight == spec.weight
        && host.priority == priority
        && host.locality == *locality
        && host.metadata == spec.metadata
        && host.details.as_deref() == spec.details.as_ref()
}

/// Whether both have the same hosts in the same places.
fn same_shape(old: &[HostSet], new: &[HostSet]) -> bool {
    let same_hosts = |a: &[Arc<Host>], b: &[Arc<Host>]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
    };
    old.len() == new.len()
        && old.iter().zip(new).all(|(old, new)| {
            same_hosts(&old.hosts, &new.hosts)
                && old.localities.len() == new.localities.len()
                && old.localities.iter().zip(&new.localities).all(|(old, new)| {
                    old.locality == new.locality
                        && old.weight == new.weight
                        && same_hosts(&old.hosts, &new.hosts)
                })
        })
}
