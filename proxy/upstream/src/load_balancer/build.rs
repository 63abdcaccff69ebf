//! Building a snapshot's balancers: done off the workers, whenever hosts, their weights or their health change.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::hashing::HashTable;
use super::policy::{HashPolicy, Kind, LbPolicy, LocalityPolicy, ZoneAware};
use super::priority::{self, Distribution, LevelHealth};
use super::subset::{Fallback, SelectorFallback, SubsetConfig, Subsets};
use crate::host::{Health, Host, Locality};
use crate::host_set::{AssignmentPolicy, HostSet, LocalityHosts, Snapshot, Source, level_health};
use crate::stats::ClusterStats;

/// No list.
pub(crate) const NO_SOURCE: u32 = u32::MAX;

/// A balancer over the priority levels of a cluster or of one of its subsets.
#[derive(Debug, Default)]
pub(crate) struct PriorityLb {
    pub(crate) levels: Box<[Level]>,
    pub(crate) distribution: Distribution,
    pub(crate) health: Box<[LevelHealth]>,
}

/// One priority level. Lists are indices of [`Snapshot::sources`].
#[derive(Debug)]
pub(crate) struct Level {
    pub(crate) all: u32,
    pub(crate) healthy: u32,
    pub(crate) degraded: u32,
    pub(crate) routing: Routing,
    /// With a hashing policy, the table over the hosts in use.
    pub(crate) table: Option<Box<HashTable>>,
}

/// How a level's load is divided between localities.
#[derive(Debug)]
pub(crate) enum Routing {
    /// Not at all.
    Flat,
    /// By weight.
    Weighted(Box<[Option<WeightedLocalities>; 2]>),
    /// All to the local locality.
    Direct { healthy: u32, degraded: u32 },
    /// What the local locality can take, and the rest by residual capacity.
    Residual(Box<Residual>),
    /// The proxies themselves are in panic: routing by locality would follow a distorted picture.
    LocalPanic,
}

/// Localities with their effective weights, for healthy or degraded hosts.
#[derive(Debug)]
pub(crate) struct WeightedLocalities {
    /// The worker's schedule.
    pub(crate) schedule: u32,
    pub(crate) weights: Box<[f64]>,
    pub(crate) sources: Box<[u32]>,
}

/// Zone-aware routing when the local locality cannot take all.
#[derive(Debug)]
pub(crate) struct Residual {
    /// In hundredths of a percent.
    pub(crate) local_share: u64,
    /// Running sums of the capacity left in each locality.
    pub(crate) capacity: Box<[u64]>,
    pub(crate) healthy: Box<[u32]>,
    pub(crate) degraded: Box<[u32]>,
}

/// The healthy hosts of the cluster that this proxy belongs to, by locality.
#[derive(Debug, Default)]
pub(crate) struct LocalZones {
    pub(crate) by_locality: HashMap<Arc<Locality>, u64>,
    pub(crate) total: u64,
    pub(crate) panic: bool,
}

pub(crate) struct Builder<'a> {
    policy: &'a LbPolicy,
    assignment: AssignmentPolicy,
    zones: Option<&'a LocalZones>,
    stats: &'a ClusterStats,
    sources: Vec<Source>,
    schedules: u32,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        policy: &'a LbPolicy,
        assignment: AssignmentPolicy,
        zones: Option<&'a LocalZones>,
        stats: &'a ClusterStats,
    ) -> Self {
        Self { policy, assignment, zones, stats, sources: Vec::new(), schedules: 0 }
    }

    /// Builds all balancers of these sets.
    pub(crate) fn snapshot(mut self, sets: Box<[HostSet]>) -> Snapshot {
        let root = self.balancer(&sets);
        let subsets = self.policy.subset.as_deref().map(|config| Box::new(self.subsets(config, &sets)));
        Snapshot::new(sets, self.assignment, self.sources, root, subsets, self.schedules)
    }

    fn balancer(&mut self, sets: &[HostSet]) -> PriorityLb {
        let weighted = self.assignment.weighted_priority_health;
        let health: Box<[LevelHealth]> = sets.iter().map(|set| set.health(weighted)).collect();
        let threshold = self.policy.panic_threshold.get();
        let distribution = priority::distribute(&health, self.assignment.overprovisioning_factor, threshold);
        let levels =
            sets.iter().zip(&*distribution.panic).map(|(set, panic)| self.level(set, *panic)).collect();
        PriorityLb { levels, distribution, health }
    }

    fn level(&mut self, set: &HostSet, panic: bool) -> Level {
        let all = self.source(&set.hosts);
        let healthy = self.filtered(&set.hosts, all, Health::Healthy);
        let degraded = self.filtered(&set.hosts, all, Health::Degraded);
        let hash = match &self.policy.kind {
            Kind::Hash(policy) => Some(*policy),
            _ => None,
        };
        if let Some(policy) = hash {
            let table = self.table(set, policy, if panic { all } else { healthy }, panic);
            return Level { all, healthy, degraded, routing: Routing::Flat, table: Some(Box::new(table)) };
        }
        let routing = match &self.policy.locality {
            LocalityPolicy::Weighted => {
                let of = |builder: &mut Self, health| builder.weighted(set, health);
                match [of(self, Health::Healthy), of(self, Health::Degraded)] {
                    [None, None] => Routing::Flat,
                    both => Routing::Weighted(Box::new(both)),
                }
            }
            LocalityPolicy::ZoneAware(config) => self.zone_aware(set, config),
            LocalityPolicy::Ignored => Routing::Flat,
        };
        Level { all, healthy, degraded, routing, table: None }
    }

    fn source(&mut self, hosts: &Arc<[Arc<Host>]>) -> u32 {
        if hosts.is_empty() {
            return NO_SOURCE;
        }
        let weights_differ = hosts.iter().any(|host| host.weight() != hosts[0].weight());
        self.sources.push(Source { hosts: Arc::clone(hosts), weights_differ });
        self.sources.len() as u32 - 1
    }

    /// The list of those hosts that have this health; the whole list when all do.
    fn filtered(&mut self, hosts: &Arc<[Arc<Host>]>, all: u32, health: Health) -> u32 {
        let count = hosts.iter().filter(|host| host.health() == health).count();
        if count == hosts.len() {
            return all;
        }
        let list: Arc<[Arc<Host>]> = hosts.iter().filter(|host| host.health() == health).cloned().collect();
        self.source(&list)
    }

    /// One list per locality.
    fn per_locality(&mut self, set: &HostSet, health: Health) -> Vec<u32> {
        let mut sources = Vec::with_capacity(set.localities.len());
        for locality in &set.localities {
            // The list of all hosts is not a source by itself: a filtered one is only made when somebody is left out.
            let whole = locality.hosts.iter().all(|host| host.health() == health);
            let source = if whole {
                self.source(&locality.hosts)
            } else {
                self.filtered(&locality.hosts, NO_SOURCE, health)
            };
            sources.push(source);
        }
        sources
    }

    fn weighted(&mut self, set: &HostSet, health: Health) -> Option<WeightedLocalities> {
        let factor = f64::from(self.assignment.overprovisioning_factor) / 100.0;
        let weights: Box<[f64]> = set
            .localities
            .iter()
            .map(|locality| {
                let excluded = locality.hosts.iter().filter(|host| host.excluded()).count();
                let counted = locality.hosts.len() - excluded;
                if counted == 0 {
                    return 0.0;
                }
                let eligible = locality.hosts.iter().filter(|host| host.health() == health).count();
                let available = eligible as f64 / counted as f64;
                f64::from(locality.weight) * (factor * available).min(1.0)
            })
            .collect();
        if weights.iter().all(|weight| *weight == 0.0) {
            return None;
        }
        let sources = self.per_locality(set, health).into();
        self.schedules += 1;
        Some(WeightedLocalities { schedule: self.schedules - 1, weights, sources })
    }

    fn zone_aware(&mut self, set: &HostSet, config: &ZoneAware) -> Routing {
        let Some(zones) = self.zones else { return Routing::Flat };
        self.stats.lb_recalculate_zone_structures().inc();
        if set.localities.len() < 2 {
            return Routing::Flat;
        }
        if zones.total == 0 {
            self.stats.lb_local_cluster_not_ok().inc();
            return Routing::Flat;
        }
        let healthy = |locality: &LocalityHosts| {
            locality.hosts.iter().filter(|host| host.health() == Health::Healthy).count() as u64
        };
        let total: u64 = set.localities.iter().map(healthy).sum();
        if total < config.min_cluster_size.get() {
            self.stats.lb_zone_cluster_too_small().inc();
            return Routing::Flat;
        }
        let shares: Vec<(u64, u64)> = set
            .localities
            .iter()
            .map(|locality| {
                let local = zones.by_locality.get(&locality.locality).copied().unwrap_or(0);
                (10_000 * local / zones.total, (10_000 * healthy(locality)).checked_div(total).unwrap_or(0))
            })
            .collect();
        if zones.panic {
            return Routing::LocalPanic;
        }
        let healthy_sources = self.per_locality(set, Health::Healthy);
        let degraded_sources = self.per_locality(set, Health::Degraded);
        if set.has_local {
            let (local, upstream) = shares[0];
            let forced = config
                .force_local_min
                .is_some_and(|min| healthy(&set.localities[0]) >= u64::from(min.max(1)));
            if forced || (upstream > 0 && upstream >= local) {
                return Routing::Direct { healthy: healthy_sources[0], degraded: degraded_sources[0] };
            }
        }
        let local_share = match shares[0] {
            (local, upstream) if set.has_local && local > 0 => upstream * 10_000 / local,
            _ => 0,
        };
        let mut sum = 0;
        let capacity = shares
            .iter()
            .enumerate()
            .map(|(i, (local, upstream))| {
                if i > 0 || !set.has_local {
                    sum += upstream.saturating_sub(*local);
                }
                sum
            })
            .collect();
        Routing::Residual(Box::new(Residual {
            local_share,
            capacity,
            healthy: healthy_sources.into(),
            degraded: degraded_sources.into(),
        }))
    }

    /// The table over the hosts in use, weighted by locality if the policy says so.
    fn table(&mut self, set: &HostSet, policy: HashPolicy, source: u32, panic: bool) -> HashTable {
        let by_locality = matches!(self.policy.locality, LocalityPolicy::Weighted)
            && set.localities.iter().any(|locality| locality.weight > 0);
        if !by_locality {
            let hosts: &[Arc<Host>] =
                if source == NO_SOURCE { &[] } else { &self.sources[source as usize].hosts };
            return HashTable::build(policy, source, hosts, normalized(hosts, 1.0));
        }
        let used = |locality: &LocalityHosts| -> Vec<Arc<Host>> {
            locality.hosts.iter().filter(|host| panic || host.health() == Health::Healthy).cloned().collect()
        };
        let localities: Vec<(u32, Vec<Arc<Host>>)> =
            set.localities.iter().map(|locality| (locality.weight, used(locality))).collect();
        let used = localities.iter().filter(|(_, hosts)| !hosts.is_empty());
        let total: u64 = used.map(|(weight, _)| u64::from(*weight)).sum();
        let (mut hosts, mut weights) = (Vec::new(), Vec::new());
        for (weight, list) in
            localities.into_iter().filter(|(weight, hosts)| *weight > 0 && !hosts.is_empty())
        {
            weights.extend(normalized(&list, f64::from(weight) / total as f64));
            hosts.extend(list);
        }
        let hosts: Arc<[Arc<Host>]> = hosts.into();
        let source = self.source(&hosts);
        HashTable::build(policy, source, &hosts, weights)
    }

    fn subsets(&mut self, config: &SubsetConfig, sets: &[HostSet]) -> Subsets {
        let levels: Vec<&[Arc<Host>]> = sets.iter().map(|set| &*set.hosts).collect();
        let (sorted, duplicates) = config.sort(&levels);
        let mut subsets = Subsets::new(duplicates);
        for subset in sorted {
            let sets: Vec<HostSet> = sets
                .iter()
                .zip(subset.levels)
                .map(|(set, hosts)| {
                    let members: HashSet<u64> = hosts.iter().map(|host| host.id()).collect();
                    restrict(config, set, hosts.into(), |host| members.contains(&host.id()))
                })
                .collect();
            let lb = self.balancer(&sets);
            subsets.push(subset.criteria, lb);
        }
        let own_default = config
            .selectors
            .iter()
            .any(|selector| selector.fallback == SelectorFallback::Own(Fallback::DefaultSubset));
        if config.fallback == Fallback::DefaultSubset || own_default {
            let sets: Vec<HostSet> = sets
                .iter()
                .map(|set| {
                    let hosts: Arc<[Arc<Host>]> =
                        set.hosts.iter().filter(|host| config.in_default(host)).cloned().collect();
                    restrict(config, set, hosts, |host| config.in_default(host))
                })
                .collect();
            subsets.default = Some(self.balancer(&sets));
        }
        subsets
    }
}

/// A host set of those hosts only that are in a subset.
fn restrict(
    config: &SubsetConfig,
    set: &HostSet,
    hosts: Arc<[Arc<Host>]>,
    member: impl Fn(&Host) -> bool,
) -> HostSet {
    let localities = set
        .localities
        .iter()
        .map(|locality| {
            let hosts: Arc<[Arc<Host>]> =
                locality.hosts.iter().filter(|host| member(host)).cloned().collect();
            let weight = match (config.locality_weight_aware, config.scale_locality_weight) {
                (false, _) => 0,
                (true, false) => locality.weight,
                (true, true) if locality.hosts.is_empty() => 0,
                // Rounded, but never to nothing while there is a host.
                (true, true) => {
                    let scaled =
                        f64::from(locality.weight) * hosts.len() as f64 / locality.hosts.len() as f64;
                    (scaled.round() as u32).max(u32::from(!hosts.is_empty()))
                }
            };
            LocalityHosts { locality: Arc::clone(&locality.locality), weight, hosts }
        })
        .collect();
    HostSet { hosts, localities, has_local: set.has_local }
}

/// Host weights that sum to `share`.
fn normalized(hosts: &[Arc<Host>], share: f64) -> Vec<f64> {
    let sum: u64 = hosts.iter().map(|host| u64::from(host.weight())).sum();
    hosts.iter().map(|host| f64::from(host.weight()) * share / sum as f64).collect()
}

impl LocalZones {
    /// Counts the first priority level of the local cluster.
    pub(crate) fn of(snapshot: &Snapshot, panic_threshold: u64) -> Self {
        let Some(set) = snapshot.sets.first() else { return Self { panic: true, ..Self::default() } };
        let mut zones = Self {
            panic: priority::in_panic(&level_health(&set.hosts, false), panic_threshold),
            ..Self::default()
        };
        for host in set.hosts.iter().filter(|host| host.health() == Health::Healthy) {
            *zones.by_locality.entry(Arc::clone(host.locality())).or_default() += 1;
            zones.total += 1;
        }
        zones
    }
}
