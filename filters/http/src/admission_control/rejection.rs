//! The probability that a request is refused.

use super::history::Totals;

/// Refusals are as fine as one in so many.
const ACCURACY: f64 = 10_000.0;

/// What the configuration says of it; shares of 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rejection {
    /// No request is refused while so many succeed.
    pub(super) threshold: f64,
    /// At 1 the probability rises in proportion, above it faster.
    pub(super) aggression: f64,
    pub(super) max: f64,
}

impl Rejection {
    /// `((requests - successes / threshold) / (requests + 1)) ^ (1 / aggression)`, and no more than `max`.
    pub(super) fn probability(&self, Totals { requests, successes }: Totals) -> f64 {
        // The runtime may say anything.
        let threshold = self.threshold.clamp(0.0, 1.0);
        if threshold == 0.0 {
            return 0.0;
        }
        let (requests, successes) = (requests as f64, successes as f64);
        let excess = ((requests - successes / threshold) / (requests + 1.0)).max(0.0);
        let aggression = self.aggression.max(1.0);
        let probability = if aggression == 1.0 { excess } else { excess.powf(1.0 / aggression) };
        probability.min(self.max.clamp(0.0, 1.0))
    }
}

/// Whether it happens this time.
pub(super) fn is_hit(probability: f64, random: u64) -> bool {
    ACCURACY * probability > (random % ACCURACY as u64) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    use crate::admission_control::history::History;

    const DEFAULT: Rejection = Rejection { threshold: 0.95, aggression: 1.0, max: 0.8 };

    #[test]
    fn the_formula() {
        let totals = |requests, successes| Totals { requests, successes };
        for (rejection, totals, expected) in [
            (DEFAULT, totals(0, 0), 0.0),
            (DEFAULT, totals(100, 100), 0.0),
            (DEFAULT, totals(100, 95), 0.0),
            (DEFAULT, totals(99, 0), 0.8),
            (Rejection { max: 1.0, ..DEFAULT }, totals(99, 0), 0.99),
            (Rejection { threshold: 1.0, ..DEFAULT }, totals(99, 49), 0.5),
            (Rejection { threshold: 1.0, aggression: 2.0, max: 1.0 }, totals(99, 74), 0.5),
            (Rejection { aggression: 0.1, threshold: 1.0, ..DEFAULT }, totals(99, 49), 0.5),
            (Rejection { threshold: 0.0, ..DEFAULT }, totals(99, 0), 0.0),
            (Rejection { max: 7.0, threshold: 9.0, ..DEFAULT }, totals(99, 49), 0.5),
            (Rejection { max: -1.0, ..DEFAULT }, totals(99, 0), 0.0),
        ] {
            let probability = rejection.probability(totals);
            assert!((probability - expected).abs() < 1e-9, "{rejection:?} {totals:?}: {probability}");
        }
        assert!(!is_hit(0.0, 0) && is_hit(0.0001, 0) && !is_hit(0.0001, 1));
        assert!(is_hit(1.0, u64::MAX) && !is_hit(0.5, 5_000) && is_hit(0.5, 4_999));
    }

    /// An upstream that can serve half of what is asked of it: with everything let through nearly all would fail.
    #[test]
    fn a_seeded_simulation_finds_what_the_upstream_can_serve() {
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let start = Instant::now();
            let history = History::new(Duration::from_secs(30), start);
            let rejection = Rejection { threshold: 0.9, aggression: 1.0, max: 0.95 };
            let (mut served, mut passed) = (0_u32, 0_u32);
            for second in 0..300_u64 {
                let mut capacity = 50;
                for request in 0..100_u64 {
                    let now = start + Duration::from_millis(second * 1000 + request * 10);
                    let probability = rejection.probability(history.totals(now));
                    if is_hit(probability, random.u64(..)) {
                        continue;
                    }
                    let success = capacity > 0;
                    capacity -= i32::from(success);
                    history.record(success, now);
                    if second >= 100 {
                        passed += 1;
                        served += u32::from(success);
                    }
                }
            }
            let share = f64::from(served) / f64::from(passed);
            // Those that pass succeed about as often as the threshold asks for, and the upstream is busy.
            assert!((0.6..=1.0).contains(&share), "seed {seed}: {share}");
            assert!(f64::from(served) > 0.85 * 200.0 * 50.0, "seed {seed}: {served}");
        }
    }
}
