//! `/stats/prometheus`: samples grouped by metric.
//!
//! The samples of one metric are spread over all scopes of a kind, so the listing is turned on its side: entries that
//! look alike without their tags (10 000 clusters) form a class; a class knows its metrics from one table; and each
//! metric is written by walking the members of its classes. What is held is one small record and one string of labels
//! per entry, not per stat.

mod lines;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::Options;
use crate::cells::{Cells, Layout, Leaf};
use crate::store::{Kind, StoreInner};
use crate::tags::{Tag, View, ViewName};
use lines::{Bounds, Lines, Sample};

pub(super) struct Prometheus {
    options: Options,
    store: Arc<StoreInner>,
    classes: Vec<Class>,
    /// The labels of all members, end to end, each as [`Lines`] wants them.
    labels: String,
    metrics: Vec<Metric>,
    at: Position,
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
    /// Every leaf of the entry is to be shown.
    whole: bool,
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
    These(Vec<(Leaf, Sample)>),
    /// Those in `Member::only`.
    OfMember,
    /// Response codes, or classes.
    Codes(Range<Leaf>),
}

/// Where the walk over the samples stands: indices of a metric, of one of its sources and of a member of that.
#[derive(Default)]
struct Position {
    metric: usize,
    source: usize,
    member: usize,
    has_samples: bool,
}

type Metrics = BTreeMap<(u8, String), (Kind, Vec<Source>)>;

impl Prometheus {
    pub(super) fn new(store: &Arc<StoreInner>, options: Options) -> Self {
        let mut index = Index::default();
        for node in store.live_scopes().take_while(|_| !options.hidden_only) {
            for cells in node.live() {
                if !cells.is_discarding() {
                    cells.each_view(|view| index.add(&cells, view, &options));
                }
            }
        }
        let default_bounds = Bounds::new(store.default_buckets.clone());
        let metrics = index.metrics.into_iter().map(|((_, name), (kind, mut sources))| {
            let name = metric_name(store, &name);
            for source in &mut sources {
                if let Leaves::These(leaves) = &mut source.leaves {
                    for (_, sample) in leaves {
                        sample.complete(&name, kind, &default_bounds);
                    }
                }
            }
            Metric { name, kind, sources }
        });
        Self {
            options,
            store: store.clone(),
            classes: index.classes,
            labels: index.labels,
            metrics: metrics.collect(),
            at: Position::default(),
            default_bounds,
            full_name: String::new(),
        }
    }

    /// Appends samples until there are `target` bytes; false at the end.
    pub(super) fn fill(&mut self, out: &mut Vec<u8>, target: usize) -> bool {
        let at = &mut self.at;
        while let Some(metric) = self.metrics.get(at.metric) {
            let Some(source) = metric.sources.get(at.source) else {
                *at = Position { metric: at.metric + 1, ..Position::default() };
                continue;
            };
            for member in &self.classes[source.class].members[at.member..] {
                if out.len() >= target {
                    return true;
                }
                at.member += 1;
                let mut lines = Lines {
                    out,
                    metric: &metric.name,
                    kind: metric.kind,
                    labels: &self.labels[member.labels.clone()],
                    has_samples: &mut at.has_samples,
                    options: &self.options,
                    default_bounds: &self.default_bounds,
                    full_name: &mut self.full_name,
                };
                let cells = &member.cells;
                let is_shown = |leaf: Leaf| {
                    member.whole
                        || (cells.is_listed(leaf)
                            && member.only.as_ref().is_none_or(|only| only.contains(&leaf)))
                };
                let own = |leaf: Leaf| {
                    let mut sample = Sample::new(own_label(&self.store, &cells.leaf_name(leaf)));
                    sample.complete(&metric.name, Kind::Counter, &self.default_bounds);
                    sample
                };
                match &source.leaves {
                    Leaves::These(leaves) => {
                        for (leaf, sample) in leaves {
                            if is_shown(*leaf) {
                                lines.write(cells, *leaf, sample);
                            }
                        }
                    }
                    Leaves::OfMember => {
                        for leaf in member.only.iter().flatten() {
                            lines.write(cells, *leaf, &own(*leaf));
                        }
                    }
                    Leaves::Codes(range) => {
                        for leaf in cells.listed().into_iter().filter(|leaf| range.contains(leaf)) {
                            if member.only.as_ref().is_none_or(|only| only.contains(&leaf)) {
                                lines.write(cells, leaf, &own(leaf));
                            }
                        }
                    }
                }
            }
            at.source += 1;
            at.member = 0;
        }
        false
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
        let whole = only.is_none() && cells.lists_everything();
        self.classes[class].members.push(Member { cells: cells.clone(), labels, only, whole });
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
                    let sample = (leaf, Sample::new(own_label(store, name)));
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
        for (tag, value) in tags {
            self.labels.push(',');
            write_label(&mut self.labels, tag, value);
        }
        self.labels.push_str(lines::ZERO);
        start..self.labels.len()
    }
}

/// The label of the tag that a leaf's own name carries, or nothing.
fn own_label(store: &StoreInner, leaf: &str) -> String {
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
