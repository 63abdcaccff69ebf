//! The walk from a request to a host: subset, priority level, locality, host.

use std::sync::Arc;
use std::time::Instant;

use super::build::{Level, NO_SOURCE, PriorityLb, Routing, WeightedLocalities};
use super::edf::Edf;
use super::policy::{Kind, LeastRequest, LocalityPolicy, SlowStart};
use super::priority::PriorityLoad;
use super::subset::{Fallback, Mask, MetadataMatch, SelectorFallback, Subsets};
use super::{Cursor, Cursors, PickContext};
use crate::cluster::Cluster;
use crate::host::{Health, Host, clock_ms};
use crate::host_set::Snapshot;

/// One pick.
pub(super) struct Picker<'s, 'c> {
    pub(super) cluster: &'c Cluster,
    pub(super) snapshot: &'s Snapshot,
    pub(super) cursors: &'c mut Cursors,
    pub(super) cx: &'c PickContext<'c>,
    pub(super) rng: &'c mut fastrand::Rng,
    pub(super) now: Instant,
}

impl<'s> Picker<'s, '_> {
    pub(super) fn pick(&mut self) -> Option<&'s Arc<Host>> {
        match &self.snapshot.subsets {
            None => self.balance(&self.snapshot.root),
            Some(subsets) => self.in_subsets(subsets),
        }
    }

    fn in_subsets(&mut self, subsets: &'s Subsets) -> Option<&'s Arc<Host>> {
        let config = self.cluster.policy.subset.as_deref()?;
        let Some(wanted) = self.cx.metadata_match else { return self.in_subset(subsets, None) };
        if config.fallback_list && !wanted.fallbacks().is_empty() {
            return wanted
                .fallbacks()
                .iter()
                .find_map(|wanted| self.in_subset(subsets, Some((wanted, wanted.all()))));
        }
        self.in_subset(subsets, Some((wanted, wanted.all())))
    }

    fn in_subset(
        &mut self,
        subsets: &'s Subsets,
        wanted: Option<(&MetadataMatch, Mask)>,
    ) -> Option<&'s Arc<Host>> {
        let config = self.cluster.policy.subset.as_deref()?;
        let stats = &self.cluster.stats;
        if let Some((wanted, mask)) = wanted {
            if let Some(subset) = subsets.find(wanted, mask) {
                stats.lb_subsets_selected().inc();
                return self.balance(&subset.lb);
            }
            let selector = config
                .selectors
                .iter()
                .filter(|selector| selector.fallback != SelectorFallback::NotDefined)
                .find(|selector| wanted.has_keys(mask, &selector.keys));
            match selector.map(|selector| &selector.fallback) {
                None | Some(SelectorFallback::NotDefined) => {}
                Some(SelectorFallback::Own(fallback)) => return self.fallback(subsets, *fallback),
                Some(SelectorFallback::Keys(keys)) => {
                    return self.in_subset(subsets, Some((wanted, wanted.only(mask, keys))));
                }
            }
        }
        if config.fallback == Fallback::None {
            return None;
        }
        if let Some(host) = self.fallback(subsets, config.fallback) {
            stats.lb_subsets_fallback().inc();
            return Some(host);
        }
        if !config.panic_mode_any {
            return None;
        }
        let host = self.balance(&self.snapshot.root)?;
        stats.lb_subsets_fallback_panic().inc();
        Some(host)
    }

    fn fallback(&mut self, subsets: &'s Subsets, fallback: Fallback) -> Option<&'s Arc<Host>> {
        match fallback {
            Fallback::None => None,
            Fallback::AnyEndpoint => self.balance(&self.snapshot.root),
            Fallback::DefaultSubset => self.balance(subsets.default.as_ref()?),
        }
    }

    /// Picks until a host is not rejected, at most `reselections` times more; the last one stands.
    fn balance(&mut self, lb: &'s PriorityLb) -> Option<&'s Arc<Host>> {
        let hash = self.cx.hash;
        let hash = hash.filter(|_| self.cluster.policy.hashes()).unwrap_or_else(|| self.rng.u64(..));
        let mut attempt = 0;
        loop {
            let host = if self.cluster.policy.hashes() {
                self.hashed(lb, hash, attempt)
            } else {
                self.scheduled(lb)
            }?;
            let rejected = self.cx.reject.is_some_and(|reject| reject(host));
            if !rejected || attempt == self.cx.reselections {
                return Some(host);
            }
            attempt += 1;
        }
    }

    fn level(&self, lb: &'s PriorityLb, draw: u64) -> Option<(usize, &'s Level, bool)> {
        let load: &PriorityLoad = self.cx.priority_load.unwrap_or(&lb.distribution.load);
        let (level, degraded) = load.choose(draw);
        Some((level, lb.levels.get(level)?, degraded))
    }

    fn hashed(&mut self, lb: &'s PriorityLb, hash: u64, attempt: u32) -> Option<&'s Arc<Host>> {
        let (index, level, _) = self.level(lb, hash)?;
        if lb.distribution.panic[index] && attempt == 0 {
            self.cluster.stats.lb_healthy_panic().inc();
        }
        let table = level.table.as_ref()?;
        if table.source == NO_SOURCE {
            return None;
        }
        let hosts = &self.snapshot.sources[table.source as usize].hosts;
        let active = self.cluster.admission.active_requests();
        let index = table.pick_bounded(hash, attempt, hosts, active, &mut self.cursors.scratch)?;
        Some(&hosts[index as usize])
    }

    fn scheduled(&mut self, lb: &'s PriorityLb) -> Option<&'s Arc<Host>> {
        let source = self.source(lb)?;
        if source == NO_SOURCE {
            return None;
        }
        let snapshot = self.snapshot;
        let hosts = &snapshot.sources[source as usize].hosts;
        match &self.cluster.policy.kind {
            Kind::RoundRobin { slow_start } => {
                let slow_start = slow_start.as_deref();
                let now = self.clock(slow_start);
                let weight = |host: &Host| weight(host, 1.0, slow_start, now);
                match self.weighted(source, slow_start, now, weight) {
                    Ok(host) => host,
                    Err(next) => {
                        let index = *next as usize % hosts.len();
                        *next = (index as u32 + 1) % hosts.len() as u32;
                        Some(&hosts[index])
                    }
                }
            }
            Kind::LeastRequest(config) => self.least_request(source, config),
            Kind::Random | Kind::Hash(_) => Some(&hosts[self.rng.usize(..hosts.len())]),
            Kind::ClusterProvided => None,
        }
    }

    fn least_request(&mut self, source: u32, config: &LeastRequest) -> Option<&'s Arc<Host>> {
        let slow_start = config.slow_start.as_deref();
        let now = self.clock(slow_start);
        let bias = config.bias.get();
        let weight = |host: &Host| {
            let active = host.active_requests() as f64 + 1.0;
            let divisor = if bias == 1.0 { active } else { active.powf(bias) };
            weight(host, 1.0 / divisor, slow_start, now)
        };
        if let Ok(host) = self.weighted(source, slow_start, now, weight) {
            return host;
        }
        let hosts = &self.snapshot.sources[source as usize].hosts;
        if config.full_scan {
            // Ties are drawn: reservoir sampling over the hosts with the fewest requests.
            let mut best = &hosts[0];
            let (mut least, mut ties) = (best.active_requests(), 1_u32);
            for host in &hosts[1..] {
                let active = host.active_requests();
                if active < least {
                    (best, least, ties) = (host, active, 1);
                } else if active == least {
                    ties += 1;
                    if self.rng.u32(..ties) == 0 {
                        best = host;
                    }
                }
            }
            return Some(best);
        }
        let mut best = &hosts[self.rng.usize(..hosts.len())];
        if hosts.len() == 1 {
            return Some(best);
        }
        let mut least = best.active_requests();
        for _ in 1..config.choice_count {
            let host = &hosts[self.rng.usize(..hosts.len())];
            let active = host.active_requests();
            if active < least {
                (best, least) = (host, active);
            }
        }
        Some(best)
    }

    /// A weighted pick, or the plain position when all weights are equal and nobody is warming up.
    fn weighted(
        &mut self,
        source: u32,
        slow_start: Option<&SlowStart>,
        now: u64,
        weight: impl Fn(&Host) -> f64,
    ) -> Result<Option<&'s Arc<Host>>, &mut u32> {
        let list = &self.snapshot.sources[source as usize];
        let cursor = &mut self.cursors.hosts[source as usize];
        let of = |index: u32| weight(&list.hosts[index as usize]);
        if matches!(cursor, Cursor::Unset) {
            let warming =
                slow_start.is_some_and(|config| list.hosts.iter().any(|host| host.ramp(now) < config.window));
            // Many proxies learn of a change at once: each begins somewhere else.
            let start = self.rng.u32(..list.hosts.len() as u32);
            *cursor = if list.weights_differ || warming {
                Cursor::Weighted(Box::new(Edf::new(list.hosts.len() as u32, start, of)))
            } else {
                Cursor::Next(start)
            };
        }
        match cursor {
            Cursor::Weighted(schedule) => Ok(schedule.pick(of).map(|index| &list.hosts[index as usize])),
            Cursor::Next(next) => Err(next),
            Cursor::Unset => Ok(None),
        }
    }

    /// The list of hosts to pick from.
    fn source(&mut self, lb: &'s PriorityLb) -> Option<u32> {
        let draw = self.rng.u64(..);
        let (index, level, degraded) = self.level(lb, draw)?;
        let zones = match &self.cluster.policy.locality {
            LocalityPolicy::ZoneAware(config) => Some(config),
            _ => None,
        };
        let stats = &self.cluster.stats;
        let fail_on_panic = zones.is_some_and(|config| config.fail_traffic_on_panic);
        if lb.distribution.panic[index] {
            stats.lb_healthy_panic().inc();
            return (!fail_on_panic).then_some(level.all);
        }
        let flat = if degraded { level.degraded } else { level.healthy };
        match &level.routing {
            Routing::Flat => Some(flat),
            Routing::Weighted(by_health) => match &by_health[usize::from(degraded)] {
                Some(localities) => self.locality(localities),
                None => Some(flat),
            },
            _ if zones.is_some_and(|config| !config.enabled.contains(self.rng.u64(..))) => Some(flat),
            Routing::LocalPanic => {
                stats.lb_local_cluster_not_ok().inc();
                (!fail_on_panic).then_some(flat)
            }
            Routing::Direct { healthy, degraded: of_degraded } => {
                stats.lb_zone_routing_all_directly().inc();
                Some(if degraded { *of_degraded } else { *healthy })
            }
            Routing::Residual(residual) => {
                let sources = if degraded { &residual.degraded } else { &residual.healthy };
                if self.rng.u64(..10_000) < residual.local_share {
                    stats.lb_zone_routing_sampled().inc();
                    return Some(sources[0]);
                }
                stats.lb_zone_routing_cross_zone().inc();
                let total = residual.capacity.last().copied().unwrap_or(0);
                if total == 0 {
                    // Rounding can leave nothing over.
                    stats.lb_zone_no_capacity_left().inc();
                    return Some(sources[self.rng.usize(..sources.len())]);
                }
                let draw = self.rng.u64(..total);
                Some(sources[residual.capacity.partition_point(|sum| *sum <= draw)])
            }
        }
    }

    fn locality(&mut self, localities: &WeightedLocalities) -> Option<u32> {
        let weight = |index: u32| localities.weights[index as usize];
        let schedule = self.cursors.localities[localities.schedule as usize].get_or_insert_with(|| {
            let len = localities.weights.len() as u32;
            Box::new(Edf::new(len, self.rng.u32(..len.max(1)), weight))
        });
        schedule.pick(weight).map(|index| localities.sources[index as usize])
    }

    /// The clock is read only by policies that follow it.
    fn clock(&self, slow_start: Option<&SlowStart>) -> u64 {
        if slow_start.is_some() { clock_ms(self.now) } else { 0 }
    }
}

/// A host's weight, reduced while it warms up.
fn weight(host: &Host, factor: f64, slow_start: Option<&SlowStart>, now: u64) -> f64 {
    let weight = f64::from(host.weight()) * factor;
    let Some(config) = slow_start else { return weight };
    let elapsed = host.ramp(now);
    if elapsed >= config.window || host.health() != Health::Healthy {
        return weight;
    }
    let passed = (elapsed.as_millis().max(1) as f64) / config.window.as_millis().max(1) as f64;
    let aggression = config.aggression.get();
    let aggression = if aggression > 0.0 { aggression } else { 1.0 };
    let share = if aggression == 1.0 { passed } else { passed.powf(1.0 / aggression) };
    weight * share.max(config.min_weight)
}
