//! Rendering: the bodies of `/stats` in each format, in chunks.

use regex::Regex;

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
    /// Prometheus: show text readouts as gauges of value 0 with a label `text_value`.
    pub text_readouts: bool,
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
    /// Counts between bounds.
    Disjoint,
    /// Everything, bins included.
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
}
