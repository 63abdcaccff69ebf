//! Histograms as Envoy keeps them: log-linear bins of two significant decimal digits (circllhist).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::shard::{Sharded, zeroed};

/// What a histogram's values are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unit {
    /// A plain number.
    Unspecified,
    /// Bytes.
    Bytes,
    /// Microseconds.
    Microseconds,
    /// Milliseconds.
    Milliseconds,
    /// A fraction of 1, recorded times [`Unit::PERCENT_SCALE`].
    Percent,
}

impl Unit {
    /// What a [`Unit::Percent`] value is multiplied by to be recorded as an integer.
    pub const PERCENT_SCALE: u64 = 1_000_000;

    /// The power of ten that a recorded integer is to be divided by.
    fn decimals(self) -> i32 {
        match self {
            Self::Percent => 6,
            Self::Unspecified | Self::Bytes | Self::Microseconds | Self::Milliseconds => 0,
        }
    }
}

/// Envoy's default upper bounds (milliseconds, but used for every unit).
pub(crate) const DEFAULT_BUCKETS: [f64; 19] = [
    0.5, 1., 5., 10., 25., 50., 100., 250., 500., 1_000., 2_500., 5_000., 10_000., 30_000., 60_000.,
    300_000., 600_000., 1_800_000., 3_600_000.,
];

/// The quantiles that Envoy reports, in percent.
pub(crate) const QUANTILES: [f64; 10] = [0., 25., 50., 75., 90., 95., 99., 99.5, 99.9, 100.];

/// What a histogram looked like at the last flush.
#[derive(Clone, Debug)]
pub struct Summary {
    /// What was recorded between the last two flushes.
    pub interval: Bins,
    /// What was recorded since the start.
    pub cumulative: Bins,
    /// The upper bounds to report, ascending.
    pub buckets: Arc<[f64]>,
    /// The histogram's unit.
    pub unit: Unit,
}

impl Summary {
    /// A histogram that nothing was recorded in.
    pub(crate) fn empty(buckets: Arc<[f64]>) -> Self {
        Self { interval: Bins::default(), cumulative: Bins::default(), buckets, unit: Unit::Unspecified }
    }
}

/// Non-empty bins in ascending order.
#[derive(Clone, Debug, Default)]
pub struct Bins(Vec<Bin>);

/// Values between `lower` and `lower + width`.
#[derive(Clone, Copy, Debug)]
pub struct Bin {
    /// The least value of the bin.
    pub lower: f64,
    /// The width; zero for the bin of the value zero.
    pub width: f64,
    /// How many values were recorded.
    pub count: u64,
}

impl Bins {
    /// The quantiles that Envoy reports: [`QUANTILES`].
    pub(crate) fn reported_quantiles(&self) -> [f64; QUANTILES.len()] {
        self.quantiles(QUANTILES.map(|percent| percent / 100.))
    }

    /// The bins.
    pub fn iter(&self) -> impl Iterator<Item = &Bin> {
        self.0.iter()
    }

    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|bin| bin.count).sum()
    }

    /// Their sum, taking each for the harmonic mean of its bin's ends, which keeps the relative error of a
    /// log-linear bin even.
    pub fn sum(&self) -> f64 {
        let middle = |bin: &Bin| {
            let (lower, upper) = (bin.lower, bin.lower + bin.width);
            if lower == 0. { 0. } else { 2. * lower * upper / (lower + upper) }
        };
        self.0.iter().fold(0., |sum, bin| sum + middle(bin) * bin.count as f64)
    }

    /// How many are not above `bound`, a bin that begins there included: integers equal to the bound are not above it.
    pub fn count_up_to(&self, bound: f64) -> u64 {
        self.0.iter().take_while(|bin| bin.lower <= bound).map(|bin| bin.count).sum()
    }

    /// The `q`-quantiles for ascending `q` in `0..=1`, NaN when there are no values.
    ///
    /// The value of rank `ceil(q * n)`, the values of a bin being spread evenly within it.
    pub fn quantiles<const N: usize>(&self, q: [f64; N]) -> [f64; N] {
        let total = self.count() as f64;
        let mut bins = self.0.iter();
        let Some(mut bin) = bins.next() else { return [f64::NAN; N] };
        let mut below = 0.;
        q.map(|q| {
            let rank = (q * total).ceil().clamp(1., total);
            while below + (bin.count as f64) < rank {
                let Some(next) = bins.next() else { break };
                below += bin.count as f64;
                bin = next;
            }
            bin.lower + bin.width * (rank - below) / (bin.count as f64 + 1.)
        })
    }
}

/// Decades of integers below 2^64.
const DECADES: usize = 20;
/// Two significant digits: 10..=99.
const PER_DECADE: usize = 90;

/// One worker's counts: a decade at a time, since latencies spread over two or three.
#[derive(Debug, Default)]
struct HistogramShard {
    zero: AtomicU64,
    decades: [OnceLock<Box<[AtomicU64]>>; DECADES],
}

/// One histogram over all workers.
#[derive(Debug)]
pub(crate) struct HistogramCells {
    shards: Sharded<HistogramShard>,
    merged: Mutex<Merged>,
    unit: Unit,
    buckets: Arc<[f64]>,
}

/// What the last flush saw.
#[derive(Debug, Default)]
struct Merged {
    /// Counts by bin index (0 is the value zero), without the empty ones.
    counts: Vec<(u16, u64)>,
    summary: Option<Arc<Summary>>,
}

impl HistogramCells {
    pub(crate) fn new(workers: usize, unit: Unit, buckets: Arc<[f64]>) -> Self {
        Self { shards: Sharded::new(workers), merged: Mutex::default(), unit, buckets }
    }

    #[inline]
    pub(crate) fn record(&self, value: u64) {
        let Some((shard, writer)) = self.shards.mine(Box::default) else { return };
        let Some(decade) = value.checked_ilog10() else {
            writer.add(&shard.zero, 1);
            return;
        };
        // 10 to 99 for every value: the two leading digits.
        let digits = if decade == 0 { value * 10 } else { value / 10_u64.pow(decade - 1) };
        let bins = shard.decades[decade as usize].get_or_init(|| zeroed(PER_DECADE));
        writer.add(&bins[digits as usize - 10], 1);
    }

    pub(crate) fn buckets(&self) -> &Arc<[f64]> {
        &self.buckets
    }

    pub(crate) fn summary(&self) -> Option<Arc<Summary>> {
        self.merged.lock().summary.clone()
    }

    /// Closes the current interval.
    pub(crate) fn flush(&self) {
        let counts = self.counts();
        let mut merged = self.merged.lock();
        if counts.is_empty() {
            return;
        }
        let before = std::mem::replace(&mut merged.counts, counts);
        let mut earlier = before.into_iter().peekable();
        let interval = merged.counts.iter().map(|&(index, count)| {
            // Both are in order, and a bin once counted stays.
            let before = earlier.next_if(|&(at, _)| at == index).map_or(0, |(_, count)| count);
            (index, count - before)
        });
        let interval = self.bins(interval);
        let cumulative = self.bins(merged.counts.iter().copied());
        let buckets = self.buckets.clone();
        merged.summary = Some(Arc::new(Summary { interval, cumulative, buckets, unit: self.unit }));
    }

    fn counts(&self) -> Vec<(u16, u64)> {
        let sum = |of: &dyn Fn(&HistogramShard) -> u64| self.shards.written().map(of).sum::<u64>();
        let mut counts = vec![(0, sum(&|shard| shard.zero.load(Relaxed)))];
        for decade in 0..DECADES {
            if self.shards.written().all(|shard| shard.decades[decade].get().is_none()) {
                continue;
            }
            counts.extend((0..PER_DECADE).map(|bin| {
                let count =
                    sum(&|shard| shard.decades[decade].get().map_or(0, |bins| bins[bin].load(Relaxed)));
                ((1 + decade * PER_DECADE + bin) as u16, count)
            }));
        }
        counts.retain(|(_, count)| *count != 0);
        counts
    }

    fn bins(&self, counts: impl Iterator<Item = (u16, u64)>) -> Bins {
        let bin = |(index, count): (u16, u64)| {
            let Some(position) = usize::from(index).checked_sub(1) else {
                return Bin { lower: 0., width: 0., count };
            };
            let (decade, digits) = (position / PER_DECADE, position % PER_DECADE + 10);
            let power = power_of_ten(decade as i32 - self.unit.decimals());
            Bin { lower: digits as f64 / 10. * power, width: power / 10., count }
        };
        Bins(counts.filter(|(_, count)| *count != 0).map(bin).collect())
    }
}

/// `10^exponent`, correctly rounded also for negative exponents, which `powi` is not.
fn power_of_ten(exponent: i32) -> f64 {
    const SMALL: [f64; 7] = [1., 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];
    match usize::try_from(-exponent) {
        Ok(negative) if negative < SMALL.len() => SMALL[negative],
        _ => 10_f64.powi(exponent),
    }
}
