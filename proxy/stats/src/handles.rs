//! What users hold: owned handles, and the borrowed ones that groups give out.

use std::sync::Arc;

use crate::cells::Cells;

/// A value that only grows.
#[derive(Clone, Debug)]
pub struct Counter {
    pub(crate) cells: Arc<Cells>,
    pub(crate) slot: usize,
}

/// A [`Counter`] borrowed from a group.
#[derive(Clone, Copy, Debug)]
pub struct CounterRef<'a> {
    pub(crate) cells: &'a Arc<Cells>,
    pub(crate) slot: usize,
}

impl CounterRef<'_> {
    /// Adds one.
    #[inline]
    pub fn inc(self) {
        self.add(1);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(self, n: u64) {
        self.cells.add_counter(self.slot, n);
    }

    /// The sum over all workers since the start or the last reset.
    pub fn value(self) -> u64 {
        self.cells.counter(self.slot).0
    }

    /// A handle that outlives the group's borrow.
    pub fn to_owned(self) -> Counter {
        Counter { cells: self.cells.clone(), slot: self.slot }
    }
}

impl Counter {
    /// Adds one.
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.cells.add_counter(self.slot, n);
    }

    /// The sum over all workers since the start or the last reset.
    pub fn value(&self) -> u64 {
        self.cells.counter(self.slot).0
    }
}

/// A value that goes up and down.
#[derive(Clone, Debug)]
pub struct Gauge {
    pub(crate) cells: Arc<Cells>,
    pub(crate) index: usize,
}

/// A [`Gauge`] borrowed from a group.
#[derive(Clone, Copy, Debug)]
pub struct GaugeRef<'a> {
    pub(crate) cells: &'a Arc<Cells>,
    pub(crate) index: usize,
}

impl GaugeRef<'_> {
    /// Adds one.
    #[inline]
    pub fn inc(self) {
        self.add(1);
    }

    /// Subtracts one.
    #[inline]
    pub fn dec(self) {
        self.sub(1);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(self, n: u64) {
        self.cells.add_gauge(self.index, n);
    }

    /// Subtracts `n`; any worker may take back what another one added.
    #[inline]
    pub fn sub(self, n: u64) {
        self.cells.add_gauge(self.index, n.wrapping_neg());
    }

    /// Makes the value `value`. For gauges with one writer at a time: a concurrent `add` may be lost.
    pub fn set(self, value: u64) {
        self.cells.set_gauge(self.index, value);
    }

    /// The sum over all workers.
    pub fn value(self) -> u64 {
        self.cells.gauge(self.index).0
    }

    /// A handle that outlives the group's borrow.
    pub fn to_owned(self) -> Gauge {
        Gauge { cells: self.cells.clone(), index: self.index }
    }
}

impl Gauge {
    fn borrowed(&self) -> GaugeRef<'_> {
        GaugeRef { cells: &self.cells, index: self.index }
    }

    /// Adds one.
    #[inline]
    pub fn inc(&self) {
        self.borrowed().inc();
    }

    /// Subtracts one.
    #[inline]
    pub fn dec(&self) {
        self.borrowed().dec();
    }

    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.borrowed().add(n);
    }

    /// Subtracts `n`; any worker may take back what another one added.
    #[inline]
    pub fn sub(&self, n: u64) {
        self.borrowed().sub(n);
    }

    /// Makes the value `value`. For gauges with one writer at a time: a concurrent `add` may be lost.
    pub fn set(&self, value: u64) {
        self.borrowed().set(value);
    }

    /// The sum over all workers.
    pub fn value(&self) -> u64 {
        self.borrowed().value()
    }
}

/// A distribution of values.
#[derive(Clone, Debug)]
pub struct Histogram {
    pub(crate) cells: Arc<Cells>,
    pub(crate) index: usize,
}

/// A [`Histogram`] borrowed from a group.
#[derive(Clone, Copy, Debug)]
pub struct HistogramRef<'a> {
    pub(crate) cells: &'a Arc<Cells>,
    pub(crate) index: usize,
}

impl HistogramRef<'_> {
    /// Records one value, in the histogram's unit (percentages scaled by
    /// [`Unit::PERCENT_SCALE`](crate::Unit::PERCENT_SCALE)).
    #[inline]
    pub fn record(self, value: u64) {
        self.cells.record(self.index, value);
    }

    /// A handle that outlives the group's borrow.
    pub fn to_owned(self) -> Histogram {
        Histogram { cells: self.cells.clone(), index: self.index }
    }
}

impl Histogram {
    /// Records one value, in the histogram's unit (percentages scaled by
    /// [`Unit::PERCENT_SCALE`](crate::Unit::PERCENT_SCALE)).
    #[inline]
    pub fn record(&self, value: u64) {
        self.cells.record(self.index, value);
    }
}

/// A string shown among the stats.
#[derive(Clone, Debug)]
pub struct TextReadout {
    pub(crate) cells: Arc<Cells>,
}

impl TextReadout {
    /// Replaces the text.
    pub fn set(&self, text: &str) {
        self.cells.set_text(text);
    }

    /// The current text.
    pub fn value(&self) -> String {
        self.cells.text().unwrap_or_default()
    }
}
