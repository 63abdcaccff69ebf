//! Host sets: the hosts of one cluster at one moment, by priority and locality, with the balancers over them.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use waystation_filter_api::address::Address;
use waystation_filter_api::runtime::Fraction;

use crate::host::{Health, Host, Locality};
use crate::load_balancer::build::PriorityLb;
use crate::load_balancer::priority::{LevelHealth, PreviousPriorities, PriorityLoad};
use crate::load_balancer::subset::Subsets;

/// All hosts of a cluster, immutable. A worker keeps the one it picks from.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) sets: Box<[HostSet]>,
    pub(crate) policy: AssignmentPolicy,
    /// Every list that some balancer picks from.
    pub(crate) sources: Box<[Source]>,
    pub(crate) root: PriorityLb,
    pub(crate) subsets: Option<Box<Subsets>>,
    /// Weighted schedules over localities that workers keep.
    pub(crate) locality_schedules: u32,
    /// Hosts by address, made when a session first asks for one.
    by_address: OnceLock<HashMap<Address, (u32, u32)>>,
}

/// The hosts of one priority level.
#[derive(Clone, Debug, Default)]
pub struct HostSet {
    pub(crate) hosts: Arc<[Arc<Host>]>,
    /// The local locality first when there is one, then in the order of localities.
    pub(crate) localities: Box<[LocalityHosts]>,
    pub(crate) has_local: bool,
}

/// The hosts of one locality in a priority level.
#[derive(Clone, Debug)]
pub struct LocalityHosts {
    /// Where.
    pub locality: Arc<Locality>,
    /// `LocalityLbEndpoints.load_balancing_weight`; zero is unset and gets no load.
    pub weight: u32,
    /// The hosts.
    pub hosts: Arc<[Arc<Host>]>,
}

/// A list of hosts that is picked from.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) hosts: Arc<[Arc<Host>]>,
    pub(crate) weights_differ: bool,
}

/// `ClusterLoadAssignment.Policy`.
#[derive(Clone, Debug, PartialEq)]
pub struct AssignmentPolicy {
    /// In percent.
    pub overprovisioning_factor: u32,
    /// Whether priorities follow the weight of healthy hosts, not their number.
    pub weighted_priority_health: bool,
    /// Requests to drop.
    pub drop_overloads: Box<[DropOverload]>,
}

/// `DropOverload`.
#[derive(Clone, Debug, PartialEq)]
pub struct DropOverload {
    /// The category.
    pub category: Box<str>,
    /// The share of requests.
    pub share: Fraction,
}

impl Snapshot {
    pub(crate) fn new(
        sets: Box<[HostSet]>,
        policy: AssignmentPolicy,
        sources: Vec<Source>,
        root: PriorityLb,
        subsets: Option<Box<Subsets>>,
        locality_schedules: u32,
    ) -> Self {
        Self {
            sets,
            policy,
            sources: sources.into(),
            root,
            subsets,
            locality_schedules,
            by_address: OnceLock::new(),
        }
    }

    /// Priority levels in order.
    pub fn priorities(&self) -> &[HostSet] {
        &self.sets
    }

    /// All hosts, level by level.
    pub fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.sets.iter().flat_map(|set| set.hosts.iter())
    }

    /// How many hosts there are.
    pub fn len(&self) -> usize {
        self.sets.iter().map(|set| set.hosts.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sets.iter().all(|set| set.hosts.is_empty())
    }

    /// The assignment's policy.
    pub fn policy(&self) -> &AssignmentPolicy {
        &self.policy
    }

    /// The category in which a request is dropped, if any (`drop_overloads`: 503, flag `DO`).
    pub fn drop_overload(&self, rng: &mut fastrand::Rng) -> Option<&str> {
        let overloads = self.policy.drop_overloads.iter();
        overloads
            .map(|overload| (overload, rng.u64(..)))
            .find_map(|(overload, draw)| overload.share.contains(draw).then_some(&*overload.category))
    }

    /// The load of a retry that avoids priority levels tried before; `None` is the ordinary load.
    pub fn retry_load(&self, previous: &mut PreviousPriorities) -> Option<PriorityLoad> {
        previous.load(&self.root.health, self.policy.overprovisioning_factor)
    }

    /// The host at an address.
    pub fn host_at(&self, address: &Address) -> Option<&Arc<Host>> {
        let index = self.by_address.get_or_init(|| {
            let sets = (0_u32..).zip(&*self.sets);
            sets.flat_map(|(level, set)| {
                (0_u32..).zip(&*set.hosts).map(move |(i, host)| (host.address().clone(), (level, i)))
            })
            .collect()
        });
        let (level, i) = index.get(address)?;
        Some(&self.sets[*level as usize].hosts[*i as usize])
    }
}

impl HostSet {
    /// All hosts.
    pub fn hosts(&self) -> &[Arc<Host>] {
        &self.hosts
    }

    /// By locality.
    pub fn localities(&self) -> &[LocalityHosts] {
        &self.localities
    }

    pub(crate) fn health(&self, weighted: bool) -> LevelHealth {
        level_health(&self.hosts, weighted)
    }
}

/// Counts hosts by health.
pub(crate) fn level_health(hosts: &[Arc<Host>], weighted: bool) -> LevelHealth {
    let mut level = LevelHealth { hosts: hosts.len() as u64, ..LevelHealth::default() };
    let mut weights = (0, 0, 0);
    for host in hosts {
        let weight = u64::from(host.weight());
        weights.0 += weight;
        level.excluded += u64::from(host.excluded());
        match host.health() {
            Health::Healthy => {
                level.healthy += 1;
                weights.1 += weight;
            }
            Health::Degraded => {
                level.degraded += 1;
                weights.2 += weight;
            }
            Health::Unhealthy => {}
        }
    }
    level.weights = weighted.then_some(weights);
    level
}

impl Default for AssignmentPolicy {
    fn default() -> Self {
        Self { overprovisioning_factor: 140, weighted_priority_health: false, drop_overloads: Box::default() }
    }
}
