//! What is counted of one host, and what has been decided of it.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::{Ejection, Origin};

/// Stands for a rate that there is none of.
const NONE: f64 = -1.0;

/// The counts of a host, written by all workers: a cache line that nothing else is on.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Monitor {
    answers: Tally,
    connects: Tally,
    consecutive_5xx: AtomicU32,
    consecutive_gateway_failure: AtomicU32,
    consecutive_local_origin_failure: AtomicU32,
    /// Which crossings are on their way to the main thread, a bit for each kind.
    reported: AtomicU8,
    record: Mutex<Record>,
    /// What `/clusters` shows.
    success_rates: [Shown; 2],
}

/// A success rate in percent, or -1: the bits of a double.
#[derive(Debug)]
struct Shown(AtomicU64);

/// All since the host came, so that an interval is a difference and nobody has to clear anything.
#[derive(Debug, Default)]
struct Tally {
    total: AtomicU64,
    failed: AtomicU64,
}

/// What the main thread knows of a host.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// Whether the last word on the host was an ejection: a successor of the cluster goes by it.
    pub(super) is_ejected: bool,
    /// `num_ejections`.
    pub(super) ejections: u32,
    pub(super) ejected: Option<Instant>,
    pub(super) unejected: Option<Instant>,
    /// By how much the next time out is longer.
    pub(super) back_off: u32,
    pub(super) jitter: Duration,
    pub(super) degraded: Option<Instant>,
    pub(super) undegraded: Option<Instant>,
    pub(super) degraded_back_off: u32,
    pub(super) degraded_jitter: Duration,
    intervals: [Interval; 2],
}

/// The tallies at the end of the last interval, and how much they have grown in it.
#[derive(Clone, Copy, Debug, Default)]
struct Interval {
    total: u64,
    failed: u64,
    volume: u64,
    failures: u64,
}

/// The success rates of a cluster in one interval, in percent; below zero when there were too few hosts to compare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    pub(super) average: f64,
    /// What hosts are ejected below.
    pub(super) threshold: f64,
}

impl Monitor {
    #[inline]
    pub(super) fn answered_well(&self) {
        self.answers.total.fetch_add(1, Ordering::Relaxed);
        clear(&self.consecutive_5xx);
        clear(&self.consecutive_gateway_failure);
    }

    /// The counts of consecutive gateway failures, when this is one, and of all 5xx.
    pub(super) fn answered_badly(&self, gateway: bool) -> (Option<u32>, u32) {
        self.answers.total.fetch_add(1, Ordering::Relaxed);
        self.answers.failed.fetch_add(1, Ordering::Relaxed);
        let gateway_failures = if gateway {
            Some(grow(&self.consecutive_gateway_failure))
        } else {
            clear(&self.consecutive_gateway_failure);
            None
        };
        (gateway_failures, grow(&self.consecutive_5xx))
    }

    #[inline]
    pub(super) fn connected(&self) {
        self.connects.total.fetch_add(1, Ordering::Relaxed);
        clear(&self.consecutive_local_origin_failure);
    }

    /// The count of consecutive failures.
    pub(super) fn failed_locally(&self) -> u32 {
        self.connects.total.fetch_add(1, Ordering::Relaxed);
        self.connects.failed.fetch_add(1, Ordering::Relaxed);
        grow(&self.consecutive_local_origin_failure)
    }

    /// Whether nobody has said so yet.
    pub(super) fn report(&self, kind: Ejection) -> bool {
        let bit = 1 << kind as u8;
        self.reported.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// The main thread has heard of it.
    pub(super) fn reported(&self, kind: Ejection) {
        self.reported.fetch_and(!(1 << kind as u8), Ordering::Relaxed);
    }

    pub(super) fn reset(&self, kind: Ejection) {
        match kind {
            Ejection::Consecutive5xx => clear(&self.consecutive_5xx),
            Ejection::ConsecutiveGatewayFailure => clear(&self.consecutive_gateway_failure),
            Ejection::ConsecutiveLocalOriginFailure => clear(&self.consecutive_local_origin_failure),
            _ => {}
        }
    }

    pub(super) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock()
    }

    /// Whether the host is to be ejected when the cluster it was ejected from is replaced.
    pub(crate) fn is_ejected(&self) -> bool {
        self.record.lock().is_ejected
    }

    /// Ends an interval: its rates are those of [`Monitor::last_interval`] from now on.
    pub(super) fn next_interval(&self) {
        let mut record = self.record.lock();
        let tallies = [&self.answers, &self.connects];
        for (interval, tally) in record.intervals.iter_mut().zip(tallies) {
            // Failures first: of a request that is being counted no more than the total is seen.
            let failed = tally.failed.load(Ordering::Relaxed);
            let total = tally.total.load(Ordering::Relaxed);
            *interval = Interval {
                total,
                failed,
                volume: total - interval.total,
                failures: (failed - interval.failed).min(total - interval.total),
            };
        }
        self.success_rates.iter().for_each(|shown| shown.set(NONE));
    }

    /// The success rate of the last interval in percent, and of how many; nothing when there were none.
    pub(super) fn last_interval(&self, origin: Origin) -> Option<(f64, u64)> {
        let Interval { volume, failures, .. } = self.record.lock().intervals[origin as usize];
        (volume > 0).then(|| ((volume - failures) as f64 * 100.0 / volume as f64, volume))
    }

    pub(super) fn set_success_rate(&self, origin: Origin, rate: f64) {
        self.success_rates[origin as usize].set(rate);
    }

    /// The rate that `/clusters` shows: -1 is none.
    pub(super) fn success_rate(&self, origin: Origin) -> f64 {
        f64::from_bits(self.success_rates[origin as usize].0.load(Ordering::Relaxed))
    }

    /// Success rates of answers and of connecting.
    pub(crate) fn success_rates(&self) -> (f64, f64) {
        (self.success_rate(Origin::External), self.success_rate(Origin::Local))
    }
}

impl Rates {
    /// Mean and threshold: the mean less `factor` standard deviations.
    pub(super) fn of(rates: impl Iterator<Item = f64> + Clone, factor: f64) -> Self {
        let count = rates.clone().count() as f64;
        let average = rates.clone().sum::<f64>() / count;
        let variance = rates.map(|rate| (rate - average).powi(2)).sum::<f64>() / count;
        Self { average, threshold: average - factor * variance.sqrt() }
    }
}

impl Default for Rates {
    fn default() -> Self {
        Self { average: NONE, threshold: NONE }
    }
}

impl Shown {
    fn set(&self, rate: f64) {
        self.0.store(rate.to_bits(), Ordering::Relaxed);
    }
}

impl Default for Shown {
    fn default() -> Self {
        Self(AtomicU64::new(NONE.to_bits()))
    }
}

/// Writes only where there is something to clear: the line stays shared.
#[inline]
fn clear(count: &AtomicU32) {
    if count.load(Ordering::Relaxed) != 0 {
        count.store(0, Ordering::Relaxed);
    }
}

fn grow(count: &AtomicU32) -> u32 {
    count.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
}
