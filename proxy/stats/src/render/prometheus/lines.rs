//! The lines of one entry for one metric.
//!
//! A scrape of 10 000 clusters writes 1.7 million lines, nearly all of them zero. What such a line is made of is put
//! together beforehand, so that it costs two copies: what stands before the labels of the entry, and those labels with
//! everything that follows.

use std::io::Write as _;
use std::sync::Arc;

use super::super::{BucketMode, Options, numbers};
use super::write_label;
use crate::cells::{Cells, Leaf};
use crate::histogram::{QUANTILES, Summary};
use crate::store::Kind;

/// The end of a line whose value is zero.
pub(super) const ZERO: &str = "} 0\n";

/// Of [`ZERO`], what stands after the labels whatever the value.
const CLOSE: usize = "} ".len();

/// What the lines of a leaf share, whoever's it is.
#[derive(Default)]
pub(super) struct Sample {
    /// The label that the leaf's own name carries, or nothing.
    own_label: String,
    /// The metric, the brace and the own label.
    head: String,
    /// For a histogram: the lines of one that has recorded nothing, cut where the labels of the entry belong.
    empty: Vec<String>,
}

/// Upper bounds as `le` shows them.
pub(super) struct Bounds {
    pub(super) bounds: Arc<[f64]>,
    texts: Vec<String>,
}

/// Where the lines of one entry go, and how.
pub(super) struct Lines<'a> {
    pub(super) out: &'a mut Vec<u8>,
    pub(super) metric: &'a str,
    pub(super) kind: Kind,
    /// Each with a comma before it, and [`ZERO`] at the end.
    pub(super) labels: &'a str,
    /// Whether the metric has its `# TYPE` line.
    pub(super) has_samples: &'a mut bool,
    pub(super) options: &'a Options,
    pub(super) default_bounds: &'a Bounds,
    /// Scratch.
    pub(super) full_name: &'a mut String,
}

impl Sample {
    pub(super) fn new(own_label: String) -> Self {
        Self { own_label, ..Self::default() }
    }

    /// Once the name of the metric is known.
    pub(super) fn complete(&mut self, metric: &str, kind: Kind, bounds: &Bounds) {
        let own = &self.own_label;
        self.head = format!("{metric}{{{own}");
        if matches!(kind, Kind::Histogram(_)) {
            let bucket = format!("{metric}_bucket{{{own}");
            let mut start = bucket.as_str();
            self.empty.clear();
            let mut before = String::new();
            for le in bounds.texts.iter().map(String::as_str).chain(["le=\"+Inf\""]) {
                self.empty.push(before + start);
                before = format!(",{le}{ZERO}");
                start = &bucket;
            }
            self.empty.push(format!("{before}{metric}_sum{{{own}"));
            self.empty.push(format!("{ZERO}{metric}_count{{{own}"));
            self.empty.push(ZERO.to_owned());
        }
    }
}

impl Bounds {
    pub(super) fn new(bounds: Arc<[f64]>) -> Self {
        let texts = bounds.iter().map(|bound| format!("le=\"{}\"", numbers::general(*bound, 32))).collect();
        Self { bounds, texts }
    }
}

impl Lines<'_> {
    #[inline]
    pub(super) fn write(&mut self, cells: &Cells, leaf: Leaf, sample: &Sample) {
        let type_name = match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::TextReadout | Kind::Histogram(_) => return self.write_rare(cells, leaf, sample),
        };
        if (self.options.used_only && !cells.scalar(leaf).1) || !self.wants_name(cells, leaf) {
            return;
        }
        self.type_line(type_name);
        let labels = after(&sample.own_label, self.labels);
        self.out.extend_from_slice(sample.head.as_bytes());
        match cells.scalar_value(leaf) {
            0 => self.out.extend_from_slice(labels.as_bytes()),
            value => {
                self.out.extend_from_slice(&labels.as_bytes()[..labels.len() - ZERO.len() + CLOSE]);
                self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
                self.out.push(b'\n');
            }
        }
    }

    fn write_rare(&mut self, cells: &Cells, leaf: Leaf, sample: &Sample) {
        if (self.options.used_only && !cells.is_used(leaf)) || !self.wants_name(cells, leaf) {
            return;
        }
        if self.kind == Kind::TextReadout {
            self.type_line("gauge");
            let mut label = String::new();
            write_label(&mut label, "text_value", &cells.text().unwrap_or_default());
            self.sample("", sample, &label, "0");
            return;
        }
        let recorded = cells.summary(cells.histogram_index(leaf));
        match recorded {
            _ if self.options.buckets == BucketMode::Summary => self.summary(recorded.as_deref(), sample),
            None if cells.has_default_buckets() && self.labels != ZERO && !sample.empty.is_empty() => {
                self.type_line("histogram");
                let labels = after(&sample.own_label, self.labels);
                let labels = &labels.as_bytes()[..labels.len() - ZERO.len()];
                let mut parts = sample.empty.iter();
                self.out.extend_from_slice(parts.next().map_or(&[], |first| first.as_bytes()));
                for part in parts {
                    self.out.extend_from_slice(labels);
                    self.out.extend_from_slice(part.as_bytes());
                }
            }
            recorded => self.histogram(cells, leaf, recorded.as_deref(), sample),
        }
    }

    /// A summary is about recent values: those of the last interval.
    fn summary(&mut self, recorded: Option<&Summary>, sample: &Sample) {
        self.type_line("summary");
        let empty = Summary::empty(self.default_bounds.bounds.clone());
        let bins = &recorded.unwrap_or(&empty).interval;
        for (percent, value) in QUANTILES.iter().zip(bins.reported_quantiles()) {
            let quantile = format!("quantile=\"{}\"", numbers::general(percent / 100., 6));
            self.sample("", sample, &quantile, &numbers::general(value, 32));
        }
        self.sample("_sum", sample, "", &numbers::general(bins.sum(), 32));
        self.sample("_count", sample, "", itoa::Buffer::new().format(bins.count()));
    }

    fn histogram(&mut self, cells: &Cells, leaf: Leaf, recorded: Option<&Summary>, sample: &Sample) {
        self.type_line("histogram");
        let bounds = cells.buckets(leaf);
        let own_bounds;
        let bounds = if Arc::ptr_eq(&bounds, &self.default_bounds.bounds) {
            self.default_bounds
        } else {
            own_bounds = Bounds::new(bounds);
            &own_bounds
        };
        let bins = recorded.map(|summary| &summary.cumulative);
        let count = bins.map_or(0, |bins| bins.count());
        for (bound, le) in bounds.bounds.iter().zip(&bounds.texts) {
            let below = bins.map_or(0, |bins| bins.count_up_to(*bound));
            self.sample("_bucket", sample, le, itoa::Buffer::new().format(below));
        }
        self.sample("_bucket", sample, "le=\"+Inf\"", itoa::Buffer::new().format(count));
        let sum = bins.map_or_else(|| "0".to_owned(), |bins| numbers::general(bins.sum(), 32));
        self.sample("_sum", sample, "", &sum);
        self.sample("_count", sample, "", itoa::Buffer::new().format(count));
    }

    fn wants_name(&mut self, cells: &Cells, leaf: Leaf) -> bool {
        if self.options.filter.is_none() {
            return true;
        }
        self.full_name.clear();
        cells.write_name(leaf, self.full_name);
        self.options.wants_name(self.full_name)
    }

    /// Before the first sample of a metric.
    fn type_line(&mut self, kind: &str) {
        if !std::mem::replace(self.has_samples, true) {
            writeln!(self.out, "# TYPE {} {kind}", self.metric).expect("a Vec accepts every write");
        }
    }

    /// A line whose suffix, last label or value is not that of the rest.
    fn sample(&mut self, suffix: &str, sample: &Sample, last_label: &str, value: &str) {
        let out = &mut *self.out;
        out.extend_from_slice(self.metric.as_bytes());
        out.extend_from_slice(suffix.as_bytes());
        out.push(b'{');
        let start = out.len();
        let labels = &self.labels[..self.labels.len() - ZERO.len()];
        for labels in [&sample.own_label, labels.strip_prefix(',').unwrap_or(labels), last_label] {
            if !labels.is_empty() {
                out.extend_from_slice(labels.as_bytes());
                out.push(b',');
            }
        }
        if out.len() > start {
            out.pop();
        }
        out.extend_from_slice(b"} ");
        out.extend_from_slice(value.as_bytes());
        out.push(b'\n');
    }
}

/// The labels with their end; without the first comma when nothing stands before it.
#[inline]
fn after<'a>(own_label: &str, labels: &'a str) -> &'a str {
    match labels.strip_prefix(',') {
        Some(labels) if own_label.is_empty() => labels,
        _ => labels,
    }
}
