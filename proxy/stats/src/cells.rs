//! The storage of one scope entry: a group, a single stat, or a family of response codes.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::codes::{CodeCounts, CodeLeaf};
use crate::config::StatsMatcher;
use crate::group::GroupDef;
use crate::histogram::{HistogramCells, Summary};
use crate::scope::ScopeNode;
use crate::shard::{Sharded, zeroed};
use crate::store::{Kind, Value};
use crate::tags::View;

/// What an entry is made of.
#[derive(Debug)]
pub(crate) enum Layout {
    Group(&'static GroupDef),
    Single(Kind, Box<str>),
    /// Response codes under a leaf prefix; whether their sum is listed with them.
    Codes {
        prefix: &'static str,
        completed: bool,
    },
}

/// A stat within an entry: its position among the entry's leaves. Counters, then gauges, then histograms; for response
/// codes see [`CodeLeaf::from_index`].
pub(crate) type Leaf = usize;

impl Layout {
    fn counters(&self) -> usize {
        match self {
            Self::Group(def) => def.counters.len(),
            Self::Single(kind, _) => usize::from(*kind == Kind::Counter),
            Self::Codes { .. } => 0,
        }
    }

    fn gauges(&self) -> usize {
        match self {
            Self::Group(def) => def.gauges.len(),
            Self::Single(kind, _) => usize::from(*kind == Kind::Gauge),
            Self::Codes { .. } => 0,
        }
    }

    fn histograms(&self) -> usize {
        match self {
            Self::Group(def) => def.histograms.len(),
            Self::Single(kind, _) => usize::from(matches!(kind, Kind::Histogram(_))),
            Self::Codes { .. } => 0,
        }
    }

    /// The index, within its kind, of the stat that a group declares under `name`.
    pub(crate) fn declared(&self, kind: Kind, name: &str) -> Option<usize> {
        let Self::Group(def) = self else { return None };
        match kind {
            Kind::Counter => def.counters.iter().position(|counter| *counter == name),
            Kind::Gauge => def.gauges.iter().position(|gauge| *gauge == name),
            Kind::Histogram(_) => def.histograms.iter().position(|(histogram, _)| *histogram == name),
            Kind::TextReadout => None,
        }
    }
}

/// The values of an entry.
pub(crate) struct Cells {
    scope: Arc<ScopeNode>,
    layout: Layout,
    counters: usize,
    /// Per shard: counters, gauges, then one "was written" bit per gauge.
    scalars: Sharded<[AtomicU64]>,
    histograms: Box<[OnceLock<Box<HistogramCells>>]>,
    /// What only few entries have.
    extra: Extra,
    /// Leaves that the stats matcher rejects, while it accepts others of this entry.
    hidden: Option<Box<[bool]>>,
    /// Counter values at the last reset.
    reset: OnceLock<Box<[AtomicU64]>>,
    /// How the user's tag regexes see the leaves, found out by the first scrape that asks.
    pub(crate) views: OnceLock<Box<[View]>>,
}

#[derive(Debug)]
enum Extra {
    None,
    Codes(Box<CodeCounts>),
    Text(Box<Mutex<Option<String>>>),
}

impl Cells {
    pub(crate) fn new(scope: Arc<ScopeNode>, layout: Layout) -> Self {
        let config = &scope.store.config;
        let workers = config.workers as usize;
        let (counters, gauges) = (layout.counters(), layout.gauges());
        let mut cells = Self {
            counters,
            scalars: if counters + gauges == 0 { Sharded::discarding() } else { Sharded::new(workers) },
            histograms: (0..layout.histograms()).map(|_| OnceLock::new()).collect(),
            extra: match &layout {
                Layout::Codes { .. } => Extra::Codes(Box::new(CodeCounts(Sharded::new(workers)))),
                Layout::Single(Kind::TextReadout, _) => Extra::Text(Box::default()),
                Layout::Group(_) | Layout::Single(..) => Extra::None,
            },
            hidden: None,
            reset: OnceLock::new(),
            views: OnceLock::new(),
            scope,
            layout,
        };
        cells.apply_matcher();
        cells
    }

    /// Rejected stats are not listed; an entry of which nothing is listed keeps no values either.
    fn apply_matcher(&mut self) {
        let rejects_all = match &self.scope.store.config.matcher {
            StatsMatcher::AcceptAll => return,
            StatsMatcher::RejectAll => true,
            StatsMatcher::Keep(keep) => {
                let mut name = String::new();
                let leaves = match self.layout {
                    // The codes that will come are not known yet; they are tested when listed.
                    Layout::Codes { .. } => return,
                    _ => self.fixed_leaves(),
                };
                let hidden: Box<[bool]> = (0..leaves)
                    .map(|leaf| {
                        name.clear();
                        self.write_name(leaf, &mut name);
                        !keep(&name)
                    })
                    .collect();
                let all = hidden.iter().all(|hidden| *hidden);
                if !all && hidden.contains(&true) {
                    self.hidden = Some(hidden);
                }
                all
            }
        };
        if rejects_all {
            self.scalars = Sharded::discarding();
            self.histograms = Box::default();
            self.extra = Extra::None;
        }
    }

    pub(crate) fn scope(&self) -> &ScopeNode {
        &self.scope
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    #[inline]
    pub(crate) fn add_counter(&self, slot: usize, n: u64) {
        if let Some((shard, writer)) = self.scalars.mine(|| self.zeroed_scalars()) {
            writer.add(&shard[slot], n);
        }
    }

    #[inline]
    pub(crate) fn add_gauge(&self, index: usize, n: u64) {
        if let Some((shard, writer)) = self.scalars.mine(|| self.zeroed_scalars()) {
            writer.add(&shard[self.counters + index], n);
            let (word, bit) = self.gauge_mark(index);
            writer.mark(&shard[word], bit);
        }
    }

    pub(crate) fn set_gauge(&self, index: usize, value: u64) {
        self.add_gauge(index, value.wrapping_sub(self.gauge(index).0));
    }

    #[inline]
    pub(crate) fn record(&self, index: usize, value: u64) {
        let Some(histogram) = self.histograms.get(index) else { return };
        histogram.get_or_init(|| Box::new(self.new_histogram(index))).record(value);
    }

    #[inline]
    pub(crate) fn record_code(&self, status: u16) {
        if let Extra::Codes(codes) = &self.extra {
            codes.record(status);
        }
    }

    pub(crate) fn set_text(&self, text: &str) {
        if let Extra::Text(current) = &self.extra {
            *current.lock() = Some(text.to_owned());
        }
    }

    pub(crate) fn text(&self) -> Option<String> {
        match &self.extra {
            Extra::Text(current) => current.lock().clone(),
            Extra::None | Extra::Codes(_) => None,
        }
    }

    /// A counter's value and whether it was ever incremented.
    pub(crate) fn counter(&self, slot: usize) -> (u64, bool) {
        let total = self.raw(slot);
        (total.wrapping_sub(self.reset_base(slot)), total != 0)
    }

    /// A gauge's value and whether it was ever written.
    pub(crate) fn gauge(&self, index: usize) -> (u64, bool) {
        let (word, bit) = self.gauge_mark(index);
        let used = self.scalars.written().any(|shard| shard[word].load(Relaxed) & bit != 0);
        (self.raw(self.counters + index), used)
    }

    pub(crate) fn summary(&self, index: usize) -> Option<Arc<Summary>> {
        self.histograms.get(index)?.get()?.summary()
    }

    pub(crate) fn kind(&self, leaf: Leaf) -> Kind {
        match &self.layout {
            Layout::Single(kind, _) => *kind,
            Layout::Codes { .. } => Kind::Counter,
            Layout::Group(def) => {
                let gauge = leaf.checked_sub(def.counters.len());
                match gauge.and_then(|gauge| gauge.checked_sub(def.gauges.len())) {
                    Some(histogram) => Kind::Histogram(def.histograms[histogram].1),
                    None if gauge.is_some() => Kind::Gauge,
                    None => Kind::Counter,
                }
            }
        }
    }

    /// The name within the scope.
    pub(crate) fn leaf_name(&self, leaf: Leaf) -> Cow<'_, str> {
        match &self.layout {
            Layout::Single(_, name) => Cow::Borrowed(name),
            Layout::Group(def) => Cow::Borrowed(def.name(leaf)),
            Layout::Codes { prefix, .. } => Cow::Owned(match CodeLeaf::from_index(leaf) {
                CodeLeaf::Completed => format!("{prefix}completed"),
                CodeLeaf::Class(class) => format!("{prefix}{class}xx"),
                CodeLeaf::Code(code) => format!("{prefix}{code}"),
            }),
        }
    }

    /// Appends the full name.
    pub(crate) fn write_name(&self, leaf: Leaf, to: &mut String) {
        let name = self.leaf_name(leaf);
        if name.is_empty() {
            to.push_str(self.scope.prefix.strip_suffix('.').unwrap_or(&self.scope.prefix));
        } else {
            to.push_str(&self.scope.prefix);
            to.push_str(&name);
        }
    }

    /// A scalar's value: what Prometheus reads a million times.
    #[inline]
    pub(crate) fn scalar_value(&self, leaf: Leaf) -> u64 {
        match &self.extra {
            Extra::Codes(_) => self.scalar(leaf).0,
            // Gauges lie behind the counters, and are not reset.
            _ if leaf < self.counters => self.raw(leaf).wrapping_sub(self.reset_base(leaf)),
            _ => self.raw(leaf),
        }
    }

    /// A scalar's value and whether it was ever written, without allocating.
    pub(crate) fn scalar(&self, leaf: Leaf) -> (u64, bool) {
        match &self.extra {
            Extra::Codes(codes) => {
                let total = codes.total(CodeLeaf::from_index(leaf));
                (total.wrapping_sub(self.reset_base(leaf)), total != 0)
            }
            _ if leaf < self.counters => self.counter(leaf),
            _ => self.gauge(leaf - self.counters),
        }
    }

    /// Whether a leaf was ever written; for a histogram, whether a flush saw it.
    pub(crate) fn is_used(&self, leaf: Leaf) -> bool {
        match self.kind(leaf) {
            Kind::Counter | Kind::Gauge => self.scalar(leaf).1,
            Kind::Histogram(_) => self.summary(self.histogram_index(leaf)).is_some(),
            Kind::TextReadout => self.text().is_some(),
        }
    }

    /// The index of a histogram leaf among the entry's histograms.
    pub(crate) fn histogram_index(&self, leaf: Leaf) -> usize {
        leaf - self.counters - self.layout.gauges()
    }

    /// The upper bounds of a histogram leaf, recorded in or not.
    pub(crate) fn buckets(&self, leaf: Leaf) -> Arc<[f64]> {
        match self.histograms.get(self.histogram_index(leaf)).and_then(OnceLock::get) {
            Some(histogram) => histogram.buckets().clone(),
            None => self.configured_buckets(leaf),
        }
    }

    /// Whether no histogram has bounds of its own.
    pub(crate) fn has_default_buckets(&self) -> bool {
        self.scope.store.config.buckets.is_empty()
    }

    /// A leaf's value and whether it was ever written.
    pub(crate) fn value(&self, leaf: Leaf) -> (Value, bool) {
        match self.kind(leaf) {
            Kind::Counter => {
                let (value, used) = self.scalar(leaf);
                (Value::Counter(value), used)
            }
            Kind::Gauge => {
                let (value, used) = self.scalar(leaf);
                (Value::Gauge(value), used)
            }
            Kind::Histogram(_) => {
                let summary = self.summary(self.histogram_index(leaf));
                let used = summary.is_some();
                (Value::Histogram(summary), used)
            }
            Kind::TextReadout => {
                let text = self.text();
                let used = text.is_some();
                (Value::TextReadout(text.unwrap_or_default()), used)
            }
        }
    }

    /// The value of the leaf of this name, if it is listed.
    pub(crate) fn by_name(&self, name: &str) -> Option<Value> {
        let leaf = match &self.layout {
            Layout::Codes { prefix, .. } => CodeLeaf::parse(name.strip_prefix(prefix)?)?,
            _ => (0..self.fixed_leaves()).find(|leaf| self.leaf_name(*leaf) == name)?,
        };
        self.listed().contains(&leaf).then(|| self.value(leaf).0)
    }

    /// The leaves to list.
    pub(crate) fn listed(&self) -> Vec<Leaf> {
        match (&self.layout, &self.extra) {
            (Layout::Codes { completed, .. }, Extra::Codes(codes)) => {
                let mut leaves = codes.listed(*completed);
                if let StatsMatcher::Keep(keep) = &self.scope.store.config.matcher {
                    leaves.retain(|leaf| {
                        let mut name = String::new();
                        self.write_name(*leaf, &mut name);
                        keep(&name)
                    });
                }
                leaves
            }
            _ if self.is_discarding() => Vec::new(),
            _ => (0..self.fixed_leaves()).filter(|leaf| self.is_listed(*leaf)).collect(),
        }
    }

    /// Whether no leaf of a fixed layout is rejected.
    pub(crate) fn lists_everything(&self) -> bool {
        self.hidden.is_none() && !self.is_discarding()
    }

    /// Whether a leaf of a fixed layout is listed.
    pub(crate) fn is_listed(&self, leaf: Leaf) -> bool {
        self.hidden.as_ref().is_none_or(|hidden| !hidden[leaf])
    }

    /// Whether the stats matcher rejected every leaf.
    pub(crate) fn is_discarding(&self) -> bool {
        self.scalars.is_discarding() && self.histograms.is_empty() && matches!(self.extra, Extra::None)
    }

    /// How many leaves there are, response codes aside.
    fn fixed_leaves(&self) -> usize {
        match &self.layout {
            Layout::Group(def) => def.counters.len() + def.gauges.len() + def.histograms.len(),
            Layout::Single(..) => 1,
            Layout::Codes { .. } => 0,
        }
    }

    pub(crate) fn flush_histograms(&self) {
        for histogram in self.histograms.iter().filter_map(OnceLock::get) {
            histogram.flush();
        }
    }

    pub(crate) fn reset(&self) {
        let (leaves, total): (usize, &dyn Fn(usize) -> u64) = match &self.extra {
            Extra::Codes(codes) => (600, &|leaf| match leaf {
                6..100 => 0,
                _ => codes.total(CodeLeaf::from_index(leaf)),
            }),
            _ => (self.counters, &|slot| self.raw(slot)),
        };
        if leaves == 0 || !self.has_values() {
            return;
        }
        let base = self.reset.get_or_init(|| zeroed(leaves));
        for (leaf, base) in base.iter().enumerate() {
            base.store(total(leaf), Relaxed);
        }
    }

    fn has_values(&self) -> bool {
        match &self.extra {
            Extra::Codes(codes) => codes.0.written().next().is_some(),
            _ => self.scalars.written().next().is_some(),
        }
    }

    fn reset_base(&self, slot: usize) -> u64 {
        self.reset.get().map_or(0, |base| base[slot].load(Relaxed))
    }

    #[inline]
    fn raw(&self, slot: usize) -> u64 {
        self.scalars.written().fold(0, |sum, shard| sum.wrapping_add(shard[slot].load(Relaxed)))
    }

    /// The word and bit that tell whether a gauge was written.
    #[inline]
    fn gauge_mark(&self, index: usize) -> (usize, u64) {
        (self.counters + self.layout.gauges() + index / 64, 1 << (index % 64))
    }

    #[cold]
    fn zeroed_scalars(&self) -> Box<[AtomicU64]> {
        let gauges = self.layout.gauges();
        zeroed(self.counters + gauges + gauges.div_ceil(64))
    }

    #[cold]
    fn new_histogram(&self, index: usize) -> HistogramCells {
        let leaf = self.counters + self.layout.gauges() + index;
        let unit = match self.kind(leaf) {
            Kind::Histogram(unit) => unit,
            Kind::Counter | Kind::Gauge | Kind::TextReadout => crate::Unit::Unspecified,
        };
        let workers = self.scope.store.config.workers as usize;
        HistogramCells::new(workers, unit, self.configured_buckets(leaf))
    }

    fn configured_buckets(&self, leaf: Leaf) -> Arc<[f64]> {
        let store = &self.scope.store;
        if !store.config.buckets.is_empty() {
            let mut name = String::new();
            self.write_name(leaf, &mut name);
            if let Some(settings) = store.config.buckets.iter().find(|settings| (settings.matches)(&name)) {
                return settings.buckets.clone();
            }
        }
        store.default_buckets.clone()
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        self.scope.forget(self);
    }
}

impl std::fmt::Debug for Cells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cells")
            .field("prefix", &self.scope.prefix)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl GroupDef {
    /// The name of a leaf: counters, then gauges, then histograms.
    pub(crate) fn name(&self, leaf: Leaf) -> &'static str {
        if let Some(name) = self.counters.get(leaf) {
            return name;
        }
        let leaf = leaf - self.counters.len();
        self.gauges.get(leaf).copied().unwrap_or_else(|| self.histograms[leaf - self.gauges.len()].0)
    }
}
