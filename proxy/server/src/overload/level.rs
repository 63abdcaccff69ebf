//! How strongly something is done, as the main thread last said.

use std::sync::atomic::{AtomicU64, Ordering};

use waystation_stats::stats_group;

/// The state of an action, from 0 (nothing) to 1 (saturated), written by the main thread and read by everyone.
#[derive(Debug, Default)]
pub struct Level(AtomicU64);

impl Level {
    /// The state.
    #[inline]
    pub fn value(&self) -> f64 {
        // One value that guards nothing else.
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Whether it is as high as it gets.
    #[inline]
    pub fn is_saturated(&self) -> bool {
        self.value() >= 1.0
    }

    /// Whether it is done this time: with the state as its probability. `random` is only asked between the extremes.
    #[inline]
    pub fn fires(&self, random: impl FnOnce() -> u64) -> bool {
        let value = self.value();
        value > 0.0 && (value >= 1.0 || unit(random()) < value)
    }

    pub(super) fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

/// Uniform in `[0, 1)`, from the 53 bits that an `f64` holds exactly.
fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}

stats_group! {
    /// `overload.<load-shed point>.`
    pub struct PointStats {
        counters { shed_load_count }
        gauges { scale_percent }
        histograms {}
    }
}

/// A load-shed point.
#[derive(Debug)]
pub struct Point {
    pub(super) level: Level,
    pub(super) stats: PointStats,
}

impl Point {
    /// Whether what has got here goes no further; that is counted.
    #[inline]
    pub fn sheds(&self, random: impl FnOnce() -> u64) -> bool {
        let sheds = self.level.fires(random);
        if sheds {
            self.stats.shed_load_count().inc();
        }
        sheds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_the_probability() {
        let level = Level::default();
        let unasked = || unreachable!("nothing to decide");
        assert!(!level.fires(unasked));
        level.set(1.0);
        assert!(level.fires(unasked));
        assert!(level.is_saturated());
        level.set(0.25);
        assert!(!level.is_saturated());
        let mut random = fastrand::Rng::with_seed(7);
        let fired = (0..10_000).filter(|_| level.fires(|| random.u64(..))).count();
        assert!((2_300..2_700).contains(&fired), "{fired}");
        assert!(level.fires(|| 0));
        assert!(!level.fires(|| u64::MAX));
    }
}
