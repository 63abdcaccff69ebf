//! Scopes: interned name prefixes with their tags.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::cells::{Cells, Layout};
use crate::codes::ResponseCodes;
use crate::group::{Group, GroupCells};
use crate::handles::{Counter, Gauge, Histogram, TextReadout};
use crate::histogram::Unit;
use crate::store::{Kind, StoreInner};

/// A name prefix whose segments know whether they are tags.
///
/// Scopes are interned: asking twice for the same prefix gives the same scope. A scope lists nothing by itself and
/// disappears with its last handle.
#[derive(Clone, Debug)]
pub struct Scope {
    node: Arc<ScopeNode>,
}

impl Scope {
    pub(crate) fn new(node: Arc<ScopeNode>) -> Self {
        Self { node }
    }

    /// The scope `<self>.<segment>`; the segment may hold dots. An empty one is this scope itself.
    pub fn scope(&self, segment: &str) -> Self {
        let segment = sanitize(segment);
        if segment.is_empty() {
            return self.clone();
        }
        let prefix = format!("{}{segment}.", self.node.prefix);
        self.intern(prefix, || self.node.tags.to_vec())
    }

    /// The scope `<self>.<value>`, where `value` is also the value of the default tag `tag` (`envoy.cluster_name`).
    ///
    /// With `use_all_default_tags: false` the value is a mere segment unless the configuration names the tag.
    pub fn tag(&self, tag: &'static str, value: &str) -> Self {
        let value = sanitize(value);
        if value.is_empty() {
            return self.clone();
        }
        let start = self.node.prefix.len();
        let prefix = format!("{}{value}.", self.node.prefix);
        let enabled = self.node.store.default_tag_enabled(tag);
        let end = prefix.len() - 1;
        self.intern(prefix, || {
            let mut tags = self.node.tags.to_vec();
            if enabled {
                tags.push(TagSpan::new(Cow::Borrowed(tag), start..end + 1, start..end));
            }
            tags
        })
    }

    /// The scope `<self>.worker_<index>`, which Prometheus sees as `worker` with a label `envoy_worker_id`.
    pub fn worker(&self, index: u32) -> Self {
        let prefix = format!("{}worker_{index}.", self.node.prefix);
        let underscore = self.node.prefix.len() + "worker".len();
        let end = prefix.len() - 1;
        self.intern(prefix, || {
            let mut tags = self.node.tags.to_vec();
            if self.node.store.default_tag_enabled(WORKER_TAG) {
                tags.push(TagSpan::new(Cow::Borrowed(WORKER_TAG), underscore..end, underscore + 1..end));
            }
            tags
        })
    }

    /// The scope `<self>.<name>.<value>` of which Prometheus sees only the label `name="value"`: how dimensions are
    /// attached to a metric (`istio_requests_total`).
    pub fn label(&self, name: &str, value: &str) -> Self {
        let (name, value) = (sanitize(name), sanitize(value));
        let start = self.node.prefix.len();
        let prefix = format!("{}{name}.{value}.", self.node.prefix);
        let end = prefix.len() - 1;
        self.intern(prefix, || {
            let mut tags = self.node.tags.to_vec();
            let label = TagSpan::new(Cow::Owned(name.to_string()), start..end + 1, end - value.len()..end);
            tags.push(TagSpan { is_label: true, ..label });
            tags
        })
    }

    /// The full name of this scope, without a dot at its end.
    pub fn name(&self) -> &str {
        self.node.prefix.strip_suffix('.').unwrap_or(&self.node.prefix)
    }

    /// How many workers the store is for.
    pub fn workers(&self) -> u32 {
        self.node.store.config.workers
    }

    /// The counter `<self>.<name>`. An empty name is the scope's own name.
    pub fn counter(&self, name: &str) -> Counter {
        let (cells, slot) = self.single(Kind::Counter, name);
        Counter { cells, slot }
    }

    /// The gauge `<self>.<name>`.
    pub fn gauge(&self, name: &str) -> Gauge {
        let (cells, index) = self.single(Kind::Gauge, name);
        Gauge { cells, index }
    }

    /// The histogram `<self>.<name>`.
    pub fn histogram(&self, name: &str, unit: Unit) -> Histogram {
        let (cells, index) = self.single(Kind::Histogram(unit), name);
        Histogram { cells, index }
    }

    /// The text readout `<self>.<name>`.
    pub fn text_readout(&self, name: &str) -> TextReadout {
        TextReadout { cells: self.single(Kind::TextReadout, name).0 }
    }

    /// The group `G` in this scope.
    pub fn group<G: Group>(&self) -> G {
        G::from_cells(GroupCells(self.cells(EntryKey::group(G::DEF), || Layout::Group(G::DEF))))
    }

    /// The family `<self>.<prefix>NNN`, `<prefix>Nxx`, `<prefix>completed` counted per HTTP status code; `prefix` is
    /// `upstream_rq_` for clusters. Each is listed once seen. Where a group of this scope declares `<prefix>completed`,
    /// that counter is the group's to keep.
    pub fn response_codes(&self, prefix: &'static str) -> ResponseCodes {
        let completed = self.node.declared(Kind::Counter, &format!("{prefix}completed")).is_none();
        ResponseCodes { cells: self.cells(EntryKey::Codes(prefix), || Layout::Codes { prefix, completed }) }
    }

    fn intern(&self, prefix: String, tags: impl FnOnce() -> Vec<TagSpan>) -> Self {
        Self { node: self.node.store.intern_scope(prefix, tags) }
    }

    /// Finds or creates a stat of its own; a name that a group of this scope declares is that group's stat.
    fn single(&self, kind: Kind, name: &str) -> (Arc<Cells>, usize) {
        if let Some(found) = self.node.declared(kind, name) {
            return found;
        }
        match name.rsplit_once('.') {
            Some((parent, leaf)) => self.scope(parent).single(kind, leaf),
            None => {
                let key = EntryKey::Single(kind.section(), name.into());
                (self.cells(key, || Layout::Single(kind, name.into())), 0)
            }
        }
    }

    fn cells(&self, key: EntryKey, layout: impl FnOnce() -> Layout) -> Arc<Cells> {
        let mut entries = self.node.entries.lock();
        match entries.binary_search_by(|(existing, _)| existing.cmp(&key)) {
            Ok(at) => {
                if let Some(cells) = entries[at].1.upgrade() {
                    return cells;
                }
                let cells = Arc::new(Cells::new(self.node.clone(), layout()));
                entries[at].1 = Arc::downgrade(&cells);
                cells
            }
            Err(at) => {
                let cells = Arc::new(Cells::new(self.node.clone(), layout()));
                if entries.is_empty() {
                    // Most scopes hold one group for their whole life.
                    entries.reserve_exact(1);
                }
                entries.insert(at, (key, Arc::downgrade(&cells)));
                cells
            }
        }
    }
}

const WORKER_TAG: &str = "envoy.worker_id";

/// A part of a prefix that is a tag.
#[derive(Clone, Debug)]
pub(crate) struct TagSpan {
    pub(crate) name: Cow<'static, str>,
    /// What is left out of the tag-extracted name, with one of the dots around it when it is a whole segment.
    cut: Range<u32>,
    value: Range<u32>,
    /// From [`Scope::label`]: labels are shown in the order in which they were given.
    pub(crate) is_label: bool,
}

impl TagSpan {
    fn new(name: Cow<'static, str>, cut: Range<usize>, value: Range<usize>) -> Self {
        // Names are a few hundred bytes; one of 4 GB could not be listed either.
        let narrow = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        let narrow = |range: Range<usize>| narrow(range.start)..narrow(range.end);
        Self { name, cut: narrow(cut), value: narrow(value), is_label: false }
    }

    pub(crate) fn value_in<'a>(&self, prefix: &'a str) -> &'a str {
        prefix.get(self.value.start as usize..self.value.end as usize).unwrap_or_default()
    }

    /// Whether Envoy's extractor for this tag does not begin with a literal segment.
    pub(crate) fn is_looked_for_everywhere(&self) -> bool {
        !self.is_label && (self.name == WORKER_TAG || self.cut.start == 0)
    }

    pub(crate) fn cut(&self) -> Range<usize> {
        self.cut.start as usize..self.cut.end as usize
    }
}

/// The interned part of a scope.
#[derive(Debug)]
pub(crate) struct ScopeNode {
    pub(crate) store: Arc<StoreInner>,
    /// The full prefix with its final dot, so that the order of prefixes is the order of the names under them.
    pub(crate) prefix: Arc<str>,
    pub(crate) tags: Box<[TagSpan]>,
    /// Sorted by key.
    entries: Mutex<Vec<(EntryKey, Weak<Cells>)>>,
}

impl ScopeNode {
    pub(crate) fn new(store: Arc<StoreInner>, prefix: Arc<str>, tags: Vec<TagSpan>) -> Self {
        Self { store, prefix, tags: tags.into(), entries: Mutex::new(Vec::new()) }
    }

    /// Everything that lives here now. The references leave the lock before any of them can be the last one: dropping
    /// cells locks too.
    pub(crate) fn live(&self) -> Vec<Arc<Cells>> {
        self.entries.lock().iter().filter_map(|(_, cells)| cells.upgrade()).collect()
    }

    /// The stat that a group of this scope declares under `name`.
    fn declared(&self, kind: Kind, name: &str) -> Option<(Arc<Cells>, usize)> {
        self.live()
            .into_iter()
            .find_map(|cells| cells.layout().declared(kind, name).map(|slot| (slot, cells)))
            .map(|(slot, cells)| (cells, slot))
    }

    /// Drops the entry of cells that are going away, unless a successor has taken it.
    pub(crate) fn forget(&self, gone: *const Cells) {
        let mut entries = self.entries.lock();
        entries.retain(|(_, cells)| !std::ptr::eq(cells.as_ptr(), gone));
    }
}

impl Drop for ScopeNode {
    fn drop(&mut self) {
        self.store.forget_scope(&self.prefix, self);
    }
}

/// What identifies an entry within a scope.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum EntryKey {
    /// By the address of its table.
    Group(usize),
    Codes(&'static str),
    Single(u8, Box<str>),
}

impl EntryKey {
    fn group(def: &'static crate::GroupDef) -> Self {
        Self::Group(std::ptr::from_ref(def).addr())
    }
}

/// Envoy's `Utility::sanitizeStatsName`: no dots at either end, and nothing that a name may not hold.
fn sanitize(segment: &str) -> Cow<'_, str> {
    let trimmed = segment.trim_matches('.');
    if !trimmed.contains([':', '\0']) {
        return Cow::Borrowed(trimmed);
    }
    Cow::Owned(trimmed.replace("://", "_").replace(":/", "_").replace([':', '\0'], "_"))
}
