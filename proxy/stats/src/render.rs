//! Rendering: the bodies of `/stats` in each format, in chunks.
//!
//! A [`Renderer`] is a cursor: each chunk is made when it is asked for, from the values of that moment, so a scrape of a
//! million stats holds one chunk and, for Prometheus, an index of the entries.

mod json;
mod listing;
mod numbers;
mod prometheus;
mod query;
mod text;

use std::sync::Arc;

use bytes::Bytes;
use regex::Regex;

use crate::cells::{Cells, Leaf};
use crate::histogram::Summary;
use crate::store::{Kind, Store, StoreInner};

pub use query::{Query, short_reason};

/// What to show, from the admin query.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Leave out what was never written.
    pub used_only: bool,
    /// Keep the names that match, or with `invert_filter` those that do not.
    pub filter: Option<Regex>,
    /// See `filter`.
    pub invert_filter: bool,
    /// Only this kind; Prometheus ignores it.
    pub only: Option<StatType>,
    /// How histograms are shown.
    pub buckets: BucketMode,
    /// Prometheus: show text readouts, as gauges of value 0 with a label `text_value`.
    pub text_readouts: bool,
    /// Only hidden stats (`hidden=only`): there are none.
    pub hidden_only: bool,
}

/// `type=`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StatType {
    /// `Counters`
    Counters,
    /// `Gauges`
    Gauges,
    /// `Histograms`
    Histograms,
    /// `TextReadouts`
    TextReadouts,
}

/// `histogram_buckets=`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum BucketMode {
    /// Not given: quantiles in text and JSON, cumulative buckets in Prometheus.
    #[default]
    Unset,
    /// Counts up to each bound.
    Cumulative,
    /// Counts between bounds; not for Prometheus.
    Disjoint,
    /// Everything, bins included; not for Prometheus.
    Detailed,
    /// Quantiles.
    Summary,
}

/// `format=`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Format {
    /// `name: value` lines.
    #[default]
    Text,
    /// One JSON object.
    Json,
    /// Prometheus text exposition.
    Prometheus,
    /// The text, for a page around it.
    Html,
    /// The same, for a page that renews itself.
    ActiveHtml,
}

impl Format {
    /// The value of the `content-type` header.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text | Self::Prometheus => "text/plain; charset=UTF-8",
            Self::Json => "application/json",
            Self::Html | Self::ActiveHtml => "text/html; charset=UTF-8",
        }
    }
}

/// A scrape under way. As an iterator it yields chunks of about 64 KiB.
#[derive(Debug)]
pub struct Renderer {
    output: Output,
}

enum Output {
    Text(text::Text),
    Json(json::Json),
    Prometheus(Box<prometheus::Prometheus>),
}

impl Renderer {
    /// Begins a scrape.
    pub fn new(store: &Store, format: Format, options: Options) -> Self {
        let store = store.inner();
        let output = match format {
            Format::Text | Format::Html | Format::ActiveHtml => Output::Text(text::Text::new(store, options)),
            Format::Json => Output::Json(json::Json::new(store, options)),
            Format::Prometheus => Output::Prometheus(Box::new(prometheus::Prometheus::new(store, options))),
        };
        Self { output }
    }

    /// The next part of the body, somewhat longer than `target` bytes unless it is the last; `None` after that.
    pub fn next_chunk(&mut self, target: usize) -> Option<Bytes> {
        let mut chunk = Vec::with_capacity(target + target / 8);
        while chunk.len() < target {
            let more = match &mut self.output {
                Output::Text(text) => text.step(&mut chunk),
                Output::Json(json) => json.step(&mut chunk),
                Output::Prometheus(prometheus) => prometheus.fill(&mut chunk, target),
            };
            if !more {
                break;
            }
        }
        (!chunk.is_empty()).then(|| chunk.into())
    }
}

impl Iterator for Renderer {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        self.next_chunk(64 * 1024)
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Text(_) => "Text",
            Self::Json(_) => "Json",
            Self::Prometheus(_) => "Prometheus",
        })
    }
}

/// The parts of a text or JSON listing, in order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Section {
    TextReadouts,
    Scalars,
    Histograms,
}

impl Section {
    fn holds(self, kind: Kind) -> bool {
        match kind {
            Kind::TextReadout => self == Self::TextReadouts,
            Kind::Counter | Kind::Gauge => self == Self::Scalars,
            Kind::Histogram(_) => self == Self::Histograms,
        }
    }

    fn next(self) -> Option<Self> {
        match self {
            Self::TextReadouts => Some(Self::Scalars),
            Self::Scalars => Some(Self::Histograms),
            Self::Histograms => None,
        }
    }
}

impl Options {
    fn wants_type(&self, kind: Kind) -> bool {
        match self.only {
            _ if self.hidden_only => false,
            None => true,
            Some(StatType::Counters) => kind == Kind::Counter,
            Some(StatType::Gauges) => kind == Kind::Gauge,
            Some(StatType::Histograms) => matches!(kind, Kind::Histogram(_)),
            Some(StatType::TextReadouts) => kind == Kind::TextReadout,
        }
    }

    fn wants_name(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.is_match(name) != self.invert_filter)
    }
}

/// A walk through the three sections that keeps what the options want: what text and JSON share.
struct Walk {
    store: Arc<StoreInner>,
    options: Options,
    section: Option<Section>,
    listing: listing::Listing,
    name: String,
}

impl Walk {
    fn new(store: &Arc<StoreInner>, options: Options) -> Self {
        Self {
            store: store.clone(),
            options,
            section: Some(Section::TextReadouts),
            listing: listing::Listing::new(store),
            name: String::new(),
        }
    }

    /// Visits the next stat, if the options want it, with its full name; false at the end.
    fn step(&mut self, visit: impl FnOnce(&Cells, Leaf, &str)) -> bool {
        let Some(section) = self.section else { return false };
        let (options, name) = (&self.options, &mut self.name);
        let found = self.listing.next(|cells, leaf| {
            let kind = cells.kind(leaf);
            if !section.holds(kind) || !options.wants_type(kind) {
                return;
            }
            if options.used_only && !cells.is_used(leaf) {
                return;
            }
            name.clear();
            cells.write_name(leaf, name);
            if options.wants_name(name) {
                visit(cells, leaf, name);
            }
        });
        if !found {
            self.section = section.next();
            if self.section.is_some() {
                self.listing = listing::Listing::new(&self.store);
            }
        }
        self.section.is_some()
    }
}

/// One bucket of a histogram, as text and JSON show it.
struct Bucket {
    bound: f64,
    interval: u64,
    cumulative: u64,
}

/// The buckets of a histogram, disjoint ones or (for every other mode) cumulative ones.
fn buckets(summary: &Summary, mode: BucketMode) -> impl Iterator<Item = Bucket> {
    let mut below = (0, 0);
    summary.buckets.iter().map(move |&bound| {
        let up_to = (summary.interval.count_up_to(bound), summary.cumulative.count_up_to(bound));
        let bucket = Bucket { bound, interval: up_to.0 - below.0, cumulative: up_to.1 - below.1 };
        if mode == BucketMode::Disjoint {
            below = up_to;
        }
        bucket
    })
}
