//! `/stats/prometheus`: samples grouped by metric.
//!
//! The samples of one metric are spread over all scopes of a kind, so the listing is turned on its side: entries that
//! look alike without their tags (10 000 clusters) form a class; a class knows its metrics from one table; and each
//! metric is written by walking the members of its classes. What is held is one small record and one string of labels
//! per entry, not per stat.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::ops::Range;
use std::sync::Arc;

use super::{BucketMode, Options, numbers};
use crate::cells::{Cells, Layout, Leaf};
use crate::histogram::{QUANTILES, Summary};
use crate::store::{Kind, StoreInner};
use crate::tags::{Tag, View, ViewName};

pub(super) struct Prometheus {
    options: Options,
    store: Arc<StoreInner>,
    classes: Vec<Class>,
    /// The labels of all members, end to end, without braces.
    labels: String,
    metrics: std::vec::IntoIter<Metric>,
    current: Option<Cursor>,
    default_bounds: Bounds,
    /// Scratch.
    full_name: String,
}

/// Entries that differ only in their tags.
#[derive(Default)]
struct Class {
    members: Vec<Member>,
}

struct Member {
    cells: Arc<Cells>,
    labels: Range<usize>,
    /// The leaves that belong here, when not all do.
    only: Option<Box<[Leaf]>>,
}

/// What makes two entries alike: the prefix without tags, and what is below it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum ClassKey {
    /// By the address of the table.
    Group(String, usize),
    Codes(String, &'static str),
    /// One metric by its whole name.
    Metric(u8, String),
}

/// All samples under one `# TYPE` line.
struct Metric {
    name: String,
    kind: Kind,
    sources: Vec<Source>,
}

struct Source {
    class: usize,
    leaves: Leaves,
}

/// The leaves of each member that are samples of a metric.
enum Leaves {
    /// These, with the labels that their own names carry.
    These(Vec<(Leaf, String)>),
    /// Those in `Member::only`.
    OfMember,
    /// Response codes, or classes.
    Codes(Range<Leaf>),
}

/// Where the walk over the samples of a metric stands.
struct Cursor {
    metric: Metric,
    source: usize,
    member: usize,
    has_samples: bool,
}

/// Upper bounds as `le` shows them.
struct Bounds {
    bounds: Arc<[f64]>,
    texts: Vec<String>,
}

type Metrics = BTreeMap<(u8, String), (Kind, Vec<Source>)>;

impl Prometheus {
    pub(super) fn new(store: &Arc<StoreInner>, options: Options) -> Self {
        let mut index = Index::default();
        for node in store.live_scopes() {
            for cells in node.live() {
                if !cells.is_discarding() {
                    cells.each_view(|view| index.add(&cells, view, &options));
                }
            }
        }
        let metrics = index.metrics.into_iter().map(|((_, name), (kind, sources))| Metric {
            name: metric_name(store, &name),
            kind,
            sources,
        });
        Self {
            options,
            store: store.clone(),
            classes: index.classes,
            labels: index.labels,
            metrics: metrics.collect::<Vec<_>>().into_iter(),
            current: None,
            default_bounds: Bounds::new(store.default_buckets.clone()),
            full_name: String::new(),
        }
    }

    /// Appends the samples of the next entry; false at the end.
    pub(super) fn step(&mut self, out: &mut Vec<u8>) -> bool {
        let Some(mut cursor) = self.current.take().or_else(|| self.metrics.next().map(Cursor::new)) else {
            return false;
        };
        if let Some(source) = cursor.metric.sources.get(cursor.source) {
            match self.classes[source.class].members.get(cursor.member) {
                Some(member) => {
                    cursor.member += 1;
                    let mut samples = Samples {
                        out,
                        metric: &cursor.metric.name,
                        kind: cursor.metric.kind,
                        labels: &self.labels[member.labels.clone()],
                        has_samples: cursor.has_samples,
                        options: &self.options,
                        default_bounds: &self.default_bounds,
                        full_name: &mut self.full_name,
                    };
                    match &source.leaves {
                        Leaves::These(leaves) => {
                            for (leaf, own_labels) in leaves {
                                let rejected = !member.cells.is_listed(*leaf)
                                    || member.only.as_ref().is_some_and(|only| !only.contains(leaf));
                                if !rejected {
                                    samples.write(&member.cells, *leaf, own_labels);
                                }
                            }
                        }
                        Leaves::OfMember => {
                            for leaf in member.only.iter().flatten() {
                                let name = member.cells.leaf_name(*leaf);
                                samples.write(&member.cells, *leaf, &own_labels(&self.store, &name));
                            }
                        }
                        Leaves::Codes(range) => {
                            for leaf in member.cells.listed().into_iter().filter(|leaf| range.contains(leaf))
                            {
                                let name = member.cells.leaf_name(leaf);
                                let rejected = member.only.as_ref().is_some_and(|only| !only.contains(&leaf));
                                if !rejected {
                                    samples.write(&member.cells, leaf, &own_labels(&self.store, &name));
                                }
                            }
                        }
                    }
                    cursor.has_samples = samples.has_samples;
                }
                None => {
                    cursor.source += 1;
                    cursor.member = 0;
                }
            }
            self.current = Some(cursor);
        }
        true
    }
}

impl Cursor {
    fn new(metric: Metric) -> Self {
        Self { metric, source: 0, member: 0, has_samples: false }
    }
}

/// The classes and metrics under construction.
#[derive(Default)]
struct Index {
    classes: Vec<Class>,
    by_key: HashMap<ClassKey, usize>,
    metrics: Metrics,
    labels: String,
}

impl Index {
    fn add(&mut self, cells: &Arc<Cells>, view: &View, options: &Options) {
        let store = cells.scope().store.clone();
        let wanted = |kind: Kind| kind != Kind::TextReadout || options.text_readouts;
        let (key, only) = match (&view.name, cells.layout()) {
            (ViewName::Prefix(prefix), Layout::Group(def)) => {
                (ClassKey::Group(prefix.clone(), std::ptr::from_ref(*def).addr()), view.leaves.clone())
            }
            (ViewName::Prefix(prefix), Layout::Codes { prefix: codes, .. }) => {
                (ClassKey::Codes(prefix.clone(), codes), view.leaves.clone())
            }
            (ViewName::Prefix(prefix), Layout::Single(kind, leaf)) if wanted(*kind) => {
                let leaf = store.leaf_tag(leaf).map_or_else(|| leaf.to_string(), |tag| tag.without(leaf));
                (ClassKey::Metric(kind.section(), format!("{prefix}{leaf}")), Some(Box::from([0])))
            }
            (ViewName::Exact(name), _) => {
                let leaves = view.leaves.clone().unwrap_or_else(|| cells.listed().into());
                let Some(kind) = leaves.first().map(|leaf| cells.kind(*leaf)).filter(|kind| wanted(*kind))
                else {
                    return;
                };
                (ClassKey::Metric(kind.section(), name.clone()), Some(leaves))
            }
            (ViewName::Prefix(_), Layout::Single(..)) => return,
        };
        let class = match self.by_key.get(&key) {
            Some(class) => *class,
            None => {
                let class = self.classes.len();
                self.classes.push(Class::default());
                let leaf = only.as_ref().and_then(|only| only.first().copied());
                self.add_metrics(class, &key, cells, leaf.unwrap_or(0));
                self.by_key.insert(key, class);
                class
            }
        };
        let labels = self.write_labels(&view.tags);
        self.classes[class].members.push(Member { cells: cells.clone(), labels, only });
    }

    /// Names the metrics of a new class, taking one member (and its `leaf`, for a class of one metric) for all.
    fn add_metrics(&mut self, class: usize, key: &ClassKey, cells: &Cells, leaf: Leaf) {
        match key {
            ClassKey::Metric(_, name) => {
                let kind = cells.kind(leaf);
                self.sources(name.clone(), kind).push(Source { class, leaves: Leaves::OfMember });
            }
            ClassKey::Codes(prefix, codes) => {
                // `upstream_rq_`: codes are samples of `upstream_rq`, classes of `upstream_rq_xx`.
                let mut add = |name: String, leaves: Leaves| {
                    self.sources(format!("{prefix}{name}"), Kind::Counter).push(Source { class, leaves });
                };
                let tagged = |leaf: String| cells.scope().store.leaf_tag(&leaf).map(|tag| tag.without(&leaf));
                add(format!("{codes}completed"), Leaves::Codes(0..1));
                match tagged(format!("{codes}2xx")) {
                    Some(name) => add(name, Leaves::Codes(1..100)),
                    None => (1..=5)
                        .for_each(|class| add(format!("{codes}{class}xx"), Leaves::Codes(class..class + 1))),
                }
                match tagged(format!("{codes}200")) {
                    Some(name) => add(name, Leaves::Codes(100..600)),
                    None => (100..600)
                        .for_each(|code| add(format!("{codes}{code}"), Leaves::Codes(code..code + 1))),
                }
            }
            ClassKey::Group(prefix, _) => {
                let Layout::Group(def) = cells.layout() else { return };
                let store = &cells.scope().store;
                let leaves = def.counters.len() + def.gauges.len() + def.histograms.len();
                for leaf in 0..leaves {
                    let (kind, name) = (cells.kind(leaf), def.name(leaf));
                    let stripped = store.leaf_tag(name).map(|tag| tag.without(name));
                    let metric = format!("{prefix}{}", stripped.as_deref().unwrap_or(name));
                    let sources = self.sources(metric, kind);
                    let sample = (leaf, own_labels(store, name));
                    match sources.last_mut() {
                        // `rq_2xx` and `rq_4xx` of one class are samples of one metric.
                        Some(Source { class: last, leaves: Leaves::These(leaves) }) if *last == class => {
                            leaves.push(sample);
                        }
                        _ => sources.push(Source { class, leaves: Leaves::These(vec![sample]) }),
                    }
                }
            }
        }
    }

    /// The sources of the metric of this tag-extracted name.
    fn sources(&mut self, name: String, kind: Kind) -> &mut Vec<Source> {
        // A name that ends in a tag keeps the dot before it, and so does a scope that is a stat itself.
        let name = name.strip_suffix('.').map(str::to_owned).unwrap_or(name);
        // Text readouts come after gauges, as in Envoy.
        let section = match kind {
            Kind::Counter => 0,
            Kind::Gauge => 1,
            Kind::TextReadout => 2,
            Kind::Histogram(_) => 3,
        };
        &mut self.metrics.entry((section, name)).or_insert_with(|| (kind, Vec::new())).1
    }

    fn write_labels(&mut self, tags: &[Tag]) -> Range<usize> {
        let start = self.labels.len();
        for (at, (tag, value)) in tags.iter().enumerate() {
            if at != 0 {
                self.labels.push(',');
            }
            write_label(&mut self.labels, tag, value);
        }
        start..self.labels.len()
    }
}

/// Writes the samples of one entry for one metric.
struct Samples<'a> {
    out: &'a mut Vec<u8>,
    metric: &'a str,
    kind: Kind,
    labels: &'a str,
    has_samples: bool,
    options: &'a Options,
    default_bounds: &'a Bounds,
    full_name: &'a mut String,
}

impl Samples<'_> {
    #[inline]
    fn write(&mut self, cells: &Cells, leaf: Leaf, own_labels: &str) {
        let type_name = match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::TextReadout | Kind::Histogram(_) => return self.write_rare(cells, leaf, own_labels),
        };
        let (value, used) = cells.scalar(leaf);
        if (used || !self.options.used_only) && self.wants_name(cells, leaf) {
            self.type_line(type_name);
            self.sample("", own_labels, "", itoa::Buffer::new().format(value));
        }
    }

    fn write_rare(&mut self, cells: &Cells, leaf: Leaf, own_labels: &str) {
        if (self.options.used_only && !cells.is_used(leaf)) || !self.wants_name(cells, leaf) {
            return;
        }
        if self.kind == Kind::TextReadout {
            self.type_line("gauge");
            let mut label = String::new();
            write_label(&mut label, "text_value", &cells.text().unwrap_or_default());
            self.sample("", own_labels, &label, "0");
        } else {
            self.histogram(cells, leaf, own_labels);
        }
    }

    fn histogram(&mut self, cells: &Cells, leaf: Leaf, own_labels: &str) {
        let recorded = cells.summary(cells.histogram_index(leaf));
        if self.options.buckets == BucketMode::Summary {
            self.type_line("summary");
            // A summary is about recent values: those of the last interval.
            let empty = Summary::empty(self.default_bounds.bounds.clone());
            let bins = &recorded.as_deref().unwrap_or(&empty).interval;
            for (percent, value) in QUANTILES.iter().zip(bins.reported_quantiles()) {
                let quantile = format!("quantile=\"{}\"", numbers::general(percent / 100., 6));
                self.sample("", own_labels, &quantile, &numbers::general(value, 32));
            }
            self.sample("_sum", own_labels, "", &numbers::general(bins.sum(), 32));
            self.sample("_count", own_labels, "", itoa::Buffer::new().format(bins.count()));
            return;
        }
        self.type_line("histogram");
        let bounds = cells.buckets(leaf);
        let own_bounds;
        let bounds = if Arc::ptr_eq(&bounds, &self.default_bounds.bounds) {
            self.default_bounds
        } else {
            own_bounds = Bounds::new(bounds);
            &own_bounds
        };
        let bins = recorded.as_deref().map(|summary| &summary.cumulative);
        let count = bins.map_or(0, |bins| bins.count());
        for (bound, le) in bounds.bounds.iter().zip(&bounds.texts) {
            let below = bins.map_or(0, |bins| bins.count_up_to(*bound));
            self.sample("_bucket", own_labels, le, itoa::Buffer::new().format(below));
        }
        self.sample("_bucket", own_labels, "le=\"+Inf\"", itoa::Buffer::new().format(count));
        let sum = bins.map_or_else(|| "0".to_owned(), |bins| numbers::general(bins.sum(), 32));
        self.sample("_sum", own_labels, "", &sum);
        self.sample("_count", own_labels, "", itoa::Buffer::new().format(count));
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
        if !std::mem::replace(&mut self.has_samples, true) {
            writeln!(self.out, "# TYPE {} {kind}", self.metric).expect("a Vec accepts every write");
        }
    }

    #[inline]
    fn sample(&mut self, suffix: &str, own_labels: &str, last_label: &str, value: &str) {
        let out = &mut *self.out;
        out.extend_from_slice(self.metric.as_bytes());
        out.extend_from_slice(suffix.as_bytes());
        out.push(b'{');
        let start = out.len();
        for labels in [own_labels, self.labels, last_label] {
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

impl Bounds {
    fn new(bounds: Arc<[f64]>) -> Self {
        let texts = bounds.iter().map(|bound| format!("le=\"{}\"", numbers::general(*bound, 32))).collect();
        Self { bounds, texts }
    }
}

/// The label of the tag that a leaf's own name carries, or nothing.
fn own_labels(store: &StoreInner, leaf: &str) -> String {
    let mut label = String::new();
    if let Some(tag) = store.leaf_tag(leaf) {
        write_label(&mut label, tag.tag, tag.value);
    }
    label
}

fn write_label(to: &mut String, tag: &str, value: &str) {
    push_sanitized(to, tag);
    to.push_str("=\"");
    for character in value.chars() {
        match character {
            '\\' => to.push_str("\\\\"),
            '"' => to.push_str("\\\""),
            '\n' => to.push_str("\\n"),
            other => to.push(other),
        }
    }
    to.push('"');
}

/// `envoy_` and the sanitized name; without either for a name in a registered namespace.
fn metric_name(store: &StoreInner, extracted: &str) -> String {
    let mut name = String::with_capacity("envoy_".len() + extracted.len());
    let custom = extracted
        .split_once('.')
        .filter(|(namespace, _)| store.namespaces.lock().contains(*namespace))
        .map(|(_, rest)| rest);
    match custom {
        Some(rest) => push_sanitized(&mut name, rest),
        None => {
            name.push_str("envoy_");
            push_sanitized(&mut name, extracted);
        }
    }
    name
}

/// What a metric or label may not hold becomes `_`; one that starts with a digit gets one more.
fn push_sanitized(to: &mut String, name: &str) {
    if to.is_empty() && name.starts_with(|first: char| first.is_ascii_digit()) {
        to.push('_');
    }
    to.extend(name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }));
}
