//! Latencies in log-linear bins of two significant digits, as Envoy's, counted without locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Microseconds below 100 have a bin each; of each decade from there to 1000 seconds there are 90.
const DECADES: usize = 7;
const BINS: usize = 100 + 90 * DECADES;

/// The samples since they were taken last.
#[derive(Debug)]
pub(super) struct Latencies {
    bins: Box<[AtomicU64]>,
    count: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { bins: (0..BINS).map(|_| AtomicU64::new(0)).collect(), count: AtomicU64::new(0) }
    }
}

impl Latencies {
    /// Adds a sample, and tells how many there are.
    pub(super) fn add(&self, latency: Duration) -> u64 {
        self.bins[bin(latency)].fetch_add(1, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// The quantile of all samples, which are forgotten. What is added meanwhile belongs to these or to the next.
    pub(super) fn take(&self, quantile: f64) -> Option<Duration> {
        self.count.store(0, Ordering::Relaxed);
        let counts: Vec<u64> = self.bins.iter().map(|bin| bin.swap(0, Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let rank = quantile * total as f64;
        let mut below = 0.0;
        for (index, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            let count = count as f64;
            if below + count >= rank {
                // Spread evenly within the bin.
                let (lower, width) = bounds(index);
                return Some(Duration::from_secs_f64((lower + width * (rank - below) / count) / 1e6));
            }
            below += count;
        }
        None
    }
}

fn bin(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    let (mut value, mut decade) = (micros, 0);
    while value >= 100 {
        value /= 10;
        decade += 1;
    }
    match decade {
        // Below 100.
        0 => value as usize,
        decade => (100 + 90 * (decade - 1) + (value as usize - 10)).min(BINS - 1),
    }
}

/// Where a bin begins and how wide it is, in microseconds.
fn bounds(bin: usize) -> (f64, f64) {
    match bin.checked_sub(100) {
        None => (bin as f64, 1.0),
        Some(rest) => {
            // There are fewer decades than an i32 can count.
            let width = 10_f64.powi((rest / 90) as i32 + 1);
            ((rest % 90 + 10) as f64 * width, width)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_have_two_digits() {
        for micros in [0, 1, 99, 100, 101, 109, 110, 999, 1_000, 12_345, 999_999, 5_000_000, 999_000_000] {
            let (lower, width) = bounds(bin(Duration::from_micros(micros)));
            let micros = micros as f64;
            assert!(lower <= micros && micros < lower + width, "{micros}: {lower} + {width}");
            assert!(width <= (micros / 10.0).max(1.0), "{micros}: {width}");
        }
        assert_eq!(bin(Duration::MAX), BINS - 1);
    }

    #[test]
    fn quantiles_of_what_was_added() {
        let latencies = Latencies::default();
        assert_eq!(latencies.take(0.5), None);
        for millis in 1..=100 {
            assert_eq!(latencies.add(Duration::from_millis(millis)), millis);
        }
        let median = latencies.take(0.5).unwrap();
        assert!((50..=52).contains(&median.as_millis()), "{median:?}");
        assert!(latencies.is_empty());
        assert_eq!(latencies.take(0.5), None);
        latencies.add(Duration::from_millis(7));
        assert_eq!(latencies.take(1.0).map(|all| all.as_micros()), Some(7_100));
    }
}
