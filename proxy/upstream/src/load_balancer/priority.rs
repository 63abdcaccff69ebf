//! How load is divided between priority levels: spill-over, panic mode and degraded hosts.
//!
//! The arithmetic is Envoy's, integer by integer, so that the tables of its documentation come out.

/// What a priority level contributes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct LevelHealth {
    /// All hosts.
    pub(crate) hosts: u64,
    /// Hosts that do not count.
    pub(crate) excluded: u64,
    /// Healthy hosts.
    pub(crate) healthy: u64,
    /// Degraded hosts.
    pub(crate) degraded: u64,
    /// Sums of weights in place of the above when `weighted_priority_health` is set: all, healthy, degraded.
    pub(crate) weights: Option<(u64, u64, u64)>,
}

/// The share of each priority level, in percent.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PriorityLoad {
    /// To healthy hosts.
    pub healthy: Box<[u32]>,
    /// To degraded hosts.
    pub degraded: Box<[u32]>,
}

/// Loads, and which levels are in panic.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Distribution {
    pub(crate) load: PriorityLoad,
    pub(crate) panic: Box<[bool]>,
}

impl PriorityLoad {
    /// The level for a request that drew `hash`, and whether it goes to degraded hosts.
    pub(crate) fn choose(&self, hash: u64) -> (usize, bool) {
        let draw = (hash % 100 + 1) as u32;
        let mut sum = 0;
        let shares = self.healthy.iter().enumerate().map(|(level, share)| (level, false, share));
        let degraded = self.degraded.iter().enumerate().map(|(level, share)| (level, true, share));
        for (level, is_degraded, share) in shares.chain(degraded) {
            sum += share;
            if draw <= sum {
                return (level, is_degraded);
            }
        }
        // The shares add up to 100; a load that a retry has emptied falls back to the first level.
        (0, false)
    }
}

impl LevelHealth {
    fn counted(&self) -> u64 {
        self.hosts - self.excluded.min(self.hosts)
    }

    /// Availability of healthy and degraded hosts, each capped at 100.
    fn availability(&self, overprovisioning: u32) -> (u32, u32) {
        let counted = self.counted();
        let (total, healthy, degraded) = self.weights.unwrap_or((counted, self.healthy, self.degraded));
        if counted == 0 || total == 0 {
            return (0, 0);
        }
        let share = |part: u64| (u64::from(overprovisioning) * part / total).min(100) as u32;
        (share(healthy), share(degraded))
    }

    fn in_panic(&self, threshold: u64) -> bool {
        let counted = self.counted();
        let percent = |part: u64| if counted == 0 { 0.0 } else { 100.0 * part as f64 / counted as f64 };
        percent(self.healthy) + percent(self.degraded) < threshold as f64
    }
}

/// Whether so few hosts of the level are available that all are used.
pub(crate) fn in_panic(level: &LevelHealth, threshold: u64) -> bool {
    level.in_panic(threshold.min(100))
}

/// Divides the load.
pub(crate) fn distribute(
    levels: &[LevelHealth],
    overprovisioning: u32,
    panic_threshold: u64,
) -> Distribution {
    let availability: Vec<(u32, u32)> =
        levels.iter().map(|level| level.availability(overprovisioning)).collect();
    let total = availability.iter().map(|(healthy, degraded)| healthy + degraded).sum::<u32>().min(100);
    let mut healthy = vec![0; levels.len()];
    let mut degraded = vec![0; levels.len()];
    if total > 0 {
        let (first_healthy, rest) = spread(&mut healthy, availability.iter().map(|pair| pair.0), 100, total);
        let (first_degraded, rest) =
            spread(&mut degraded, availability.iter().map(|pair| pair.1), rest, total);
        // What is left is rounding.
        match (first_healthy, first_degraded) {
            (Some(level), _) => healthy[level] += rest,
            (None, Some(level)) => degraded[level] += rest,
            (None, None) => {}
        }
    }

    let threshold = panic_threshold.min(100);
    let mut panic = vec![false; levels.len()];
    if threshold == 0 && total == 0 {
        // Nobody is available and panic is off: all load goes to a level where it will find no host.
        if let Some(first) = healthy.first_mut() {
            *first = 100;
        }
    } else {
        // With enough availability over all, no single level panics.
        if total < 100 {
            for (flag, level) in panic.iter_mut().zip(levels) {
                *flag = level.in_panic(threshold);
            }
        }
        if panic.iter().all(|flag| *flag) {
            total_panic(levels, &mut healthy, &mut degraded);
        }
    }
    Distribution {
        load: PriorityLoad { healthy: healthy.into(), degraded: degraded.into() },
        panic: panic.into(),
    }
}

/// Fills levels in order by their availability; returns the first one available and what is left of the load.
fn spread(
    load: &mut [u32],
    availability: impl Iterator<Item = u32>,
    mut rest: u32,
    total: u32,
) -> (Option<usize>, u32) {
    let mut first = None;
    for (level, (share, available)) in load.iter_mut().zip(availability).enumerate() {
        if first.is_none() && available > 0 {
            first = Some(level);
        }
        *share = rest.min(available * 100 / total);
        rest -= *share;
    }
    (first, rest)
}

/// When every level panics, load follows the number of hosts.
fn total_panic(levels: &[LevelHealth], healthy: &mut [u32], degraded: &mut [u32]) {
    degraded.fill(0);
    let hosts: u64 = levels.iter().map(|level| level.hosts).sum();
    let Some(first) = levels.iter().position(|level| level.hosts > 0) else {
        if let Some(first) = healthy.first_mut() {
            *first = 100;
        }
        return;
    };
    let mut rest = 100;
    for (share, level) in healthy.iter_mut().zip(levels) {
        *share = (100 * level.hosts / hosts) as u32;
        rest -= *share;
    }
    healthy[first] += rest;
}

/// `envoy.retry_priorities.previous_priorities`: retries go to levels that have not been tried.
#[derive(Debug)]
pub struct PreviousPriorities {
    /// How many attempts share one exclusion.
    update_frequency: u32,
    attempted: Vec<u32>,
    /// Levels excluded by now.
    excluded: Vec<bool>,
}

impl PreviousPriorities {
    /// Excludes anew every `update_frequency` (at least 1) attempts.
    pub fn new(update_frequency: u32) -> Self {
        Self { update_frequency: update_frequency.max(1), attempted: Vec::new(), excluded: Vec::new() }
    }

    /// Notes the level of an attempt that failed.
    pub fn attempted(&mut self, priority: u32) {
        self.attempted.push(priority);
    }

    /// The load for the next attempt, when it differs from the ordinary one.
    pub(crate) fn load(&mut self, levels: &[LevelHealth], overprovisioning: u32) -> Option<PriorityLoad> {
        if self.attempted.len() < self.update_frequency as usize {
            return None;
        }
        if self.attempted.len().is_multiple_of(self.update_frequency as usize) {
            self.excluded.resize(levels.len(), false);
            for priority in &self.attempted {
                if let Some(excluded) = self.excluded.get_mut(*priority as usize) {
                    *excluded = true;
                }
            }
        }
        let without = |excluded: &[bool]| {
            let left = levels.iter().enumerate().map(|(level, health)| {
                let out = excluded.get(level).copied().unwrap_or(false);
                if out { LevelHealth::default() } else { *health }
            });
            let left: Vec<LevelHealth> = left.collect();
            let available = left.iter().any(|level| level.availability(overprovisioning) != (0, 0));
            available.then(|| distribute(&left, overprovisioning, 0).load)
        };
        match without(&self.excluded) {
            Some(load) => Some(load),
            None => {
                // Every level has been tried: begin again.
                self.attempted.clear();
                self.excluded.clear();
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LevelHealth, PreviousPriorities, distribute};

    fn level(hosts: u64, healthy: u64, degraded: u64) -> LevelHealth {
        LevelHealth { hosts, healthy, degraded, ..LevelHealth::default() }
    }

    /// The tables of Envoy's documentation, "Priority levels": percentages of healthy hosts to traffic.
    #[test]
    fn documented_spill_over() {
        let two = [
            ((100, 100), [100, 0]),
            ((72, 72), [100, 0]),
            ((71, 71), [99, 1]),
            ((50, 50), [70, 30]),
            ((25, 100), [35, 65]),
            ((0, 100), [0, 100]),
        ];
        for ((p0, p1), expected) in two {
            let found = distribute(&[level(100, p0, 0), level(100, p1, 0)], 140, 0);
            assert_eq!(*found.load.healthy, expected, "{p0} {p1}");
        }
        let three = [
            ((100, 100, 100), [100, 0, 0]),
            ((72, 72, 100), [100, 0, 0]),
            ((71, 71, 100), [99, 1, 0]),
            ((50, 50, 100), [70, 30, 0]),
            ((25, 100, 100), [35, 65, 0]),
            ((25, 25, 100), [35, 35, 30]),
            ((25, 25, 20), [36, 35, 28]),
        ];
        for ((p0, p1, p2), expected) in three {
            let levels = [level(100, p0, 0), level(100, p1, 0), level(100, p2, 0)];
            let found = distribute(&levels, 140, 0).load.healthy;
            let sum: u32 = found.iter().sum();
            assert_eq!(sum, 100);
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.abs_diff(expected) <= 1, "{p0} {p1} {p2}: {found} is not {expected}");
            }
        }
    }

    /// "Degraded endpoints": healthy and degraded percentages of two levels to traffic by kind.
    #[test]
    fn documented_degraded_load() {
        let table = [
            ((100, 0), (100, 0), [100, 0, 0, 0]),
            ((71, 0), (100, 0), [99, 1, 0, 0]),
            ((25, 65), (25, 75), [35, 35, 30, 0]),
            ((5, 0), (5, 0), [50, 50, 0, 0]),
            ((0, 100), (0, 100), [0, 0, 100, 0]),
        ];
        for (p0, p1, expected) in table {
            let found = distribute(&[level(100, p0.0, p0.1), level(100, p1.0, p1.1)], 140, 0).load;
            let found = [found.healthy[0], found.healthy[1], found.degraded[0], found.degraded[1]];
            assert_eq!(found, expected, "{p0:?} {p1:?}");
        }
    }

    /// "Panic threshold": healthy percentages of two levels, panic flags and traffic.
    #[test]
    fn documented_panic() {
        let table = [
            ((72, 72), [false, false], [100, 0]),
            ((71, 71), [false, false], [99, 1]),
            ((50, 60), [false, false], [70, 30]),
            // Normalised availability below 100: both levels are under the threshold.
            ((25, 100), [false, false], [35, 65]),
            ((25, 25), [true, true], [50, 50]),
            // The documentation rounds to 7 and 93; the rounding rest goes to the first level available.
            ((5, 65), [true, false], [8, 92]),
        ];
        for ((p0, p1), panic, expected) in table {
            let found = distribute(&[level(100, p0, 0), level(100, p1, 0)], 140, 50);
            assert_eq!((&*found.panic, &*found.load.healthy), (&panic[..], &expected[..]), "{p0} {p1}");
        }
    }

    #[test]
    fn empty_clusters_and_excluded_hosts() {
        assert_eq!(*distribute(&[LevelHealth::default()], 140, 50).load.healthy, [100]);
        assert_eq!(*distribute(&[level(4, 0, 0), level(0, 0, 0)], 140, 0).load.healthy, [100, 0]);
        // Half of the hosts are excluded and the rest is healthy.
        let excluded = LevelHealth { excluded: 5, ..level(10, 5, 0) };
        assert_eq!(*distribute(&[excluded, level(1, 1, 0)], 140, 50).load.healthy, [100, 0]);
    }

    #[test]
    fn weights_replace_counts() {
        let weighted = LevelHealth { weights: Some((100, 10, 0)), ..level(2, 1, 0) };
        assert_eq!(*distribute(&[weighted, level(1, 1, 0)], 140, 0).load.healthy, [14, 86]);
    }

    #[test]
    fn every_hash_finds_its_share() {
        let load = distribute(&[level(100, 25, 65), level(100, 25, 75)], 140, 0).load;
        let mut counts = [[0; 2]; 2];
        for hash in 0..1000 {
            let (level, degraded) = load.choose(hash);
            counts[usize::from(degraded)][level] += 1;
        }
        assert_eq!(counts, [[350, 350], [300, 0]]);
    }

    #[test]
    fn retries_go_to_levels_not_tried_yet() {
        let levels = [level(1, 1, 0), level(1, 1, 0)];
        let mut previous = PreviousPriorities::new(1);
        assert_eq!(previous.load(&levels, 140), None);
        previous.attempted(0);
        assert_eq!(previous.load(&levels, 140).map(|load| load.healthy), Some([0, 100].into()));
        previous.attempted(1);
        assert_eq!(previous.load(&levels, 140), None, "all tried: begin again");
    }
}
