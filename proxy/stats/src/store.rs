//! The store: every scope by prefix, and what is true for all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::cells::{Cells, Leaf};
use crate::config::{StatsConfig, TagRule};
use crate::histogram::{DEFAULT_BUCKETS, Summary, Unit};
use crate::scope::{Scope, ScopeNode, TagSpan};
use crate::shard::{ShardClaims, WorkerShard};
use crate::tags::View;

/// All stats of a process. Clones share them.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<StoreInner>,
    root: Scope,
}

impl Default for Store {
    fn default() -> Self {
        Self::new(StatsConfig::default())
    }
}

impl Store {
    /// An empty store.
    pub fn new(config: StatsConfig) -> Self {
        let inner = Arc::new(StoreInner::new(config));
        let root = Scope::new(inner.intern_scope(String::new(), Vec::new));
        Self { inner, root }
    }

    /// The scope of names without a prefix.
    pub fn root(&self) -> Scope {
        self.root.clone()
    }

    /// Makes the calling thread worker `index` until the returned claim is dropped: its writes then cost no atomic
    /// read-modify-write. A registered thread must write to stats of this store only.
    pub fn register_worker(&self, index: u32) -> WorkerShard {
        WorkerShard::claim(&self.inner.claims, index as usize)
    }

    /// Declares `namespace` (`wasmcustom`, `istiocustom`): Prometheus shows the stats below it under their own name,
    /// without the namespace and without `envoy_`.
    pub fn register_namespace(&self, namespace: &str) {
        self.inner.namespaces.lock().insert(namespace.into());
    }

    /// The value of the counter or gauge of this full name.
    pub fn find(&self, name: &str) -> Option<u64> {
        match self.lookup(name)? {
            Value::Counter(value) | Value::Gauge(value) => Some(value),
            Value::Histogram(_) | Value::TextReadout(_) => None,
        }
    }

    /// The value of the stat of this full name.
    pub fn lookup(&self, name: &str) -> Option<Value> {
        let splits = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1));
        splits.chain(std::iter::once(name.len() + 1)).find_map(|at| {
            let node = match name.get(..at) {
                Some(prefix) => self.inner.scope_at(prefix)?,
                None => self.inner.scope_at(&format!("{name}."))?,
            };
            let leaf = name.get(at..).unwrap_or_default();
            node.live().into_iter().find_map(|cells| cells.by_name(leaf))
        })
    }

    /// Merges what histograms recorded since the last call: once per `stats_flush_interval`. Until then a histogram
    /// has no recorded values.
    pub fn flush(&self) {
        for node in self.inner.live_scopes() {
            for cells in node.live() {
                cells.flush_histograms();
            }
        }
    }

    /// Sets every counter back to zero (`/reset_counters`); they stay used. Gauges and histograms keep what they have.
    pub fn reset_counters(&self) {
        for node in self.inner.live_scopes() {
            for cells in node.live() {
                cells.reset();
            }
        }
    }

    /// Calls `visit` for every listed stat, scope by scope: for stats sinks.
    pub fn visit(&self, visit: &mut dyn FnMut(Stat<'_>)) {
        let mut name = String::new();
        for node in self.inner.live_scopes() {
            for cells in node.live() {
                let listed = cells.listed();
                cells.each_view(|view| {
                    for leaf in listed.iter().copied().filter(|leaf| view.shows(*leaf)) {
                        name.clear();
                        cells.write_name(leaf, &mut name);
                        let (value, used) = cells.value(leaf);
                        visit(Stat {
                            name: &name,
                            kind: cells.kind(leaf),
                            used,
                            value,
                            cells: &cells,
                            leaf,
                            view,
                        });
                    }
                });
            }
        }
    }

    pub(crate) fn inner(&self) -> &Arc<StoreInner> {
        &self.inner
    }
}

/// What a stat is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram(Unit),
    /// A string.
    TextReadout,
}

impl Kind {
    /// The part of a listing a stat belongs to; two stats of one name may exist only in different parts.
    pub(crate) fn section(self) -> u8 {
        match self {
            Self::TextReadout => 0,
            Self::Counter => 1,
            Self::Gauge => 2,
            Self::Histogram(_) => 3,
        }
    }
}

/// A stat's value at one moment.
#[derive(Clone, Debug)]
pub enum Value {
    /// Sum over all workers since the last reset.
    Counter(u64),
    /// Sum over all workers.
    Gauge(u64),
    /// As of the last [`Store::flush`]; `None` until something was recorded and flushed.
    Histogram(Option<Arc<Summary>>),
    /// The text.
    TextReadout(String),
}

/// One listed stat.
#[derive(Clone, Debug)]
pub struct Stat<'a> {
    /// Full name.
    pub name: &'a str,
    /// What it is.
    pub kind: Kind,
    /// Whether it was ever written.
    pub used: bool,
    /// Its value now.
    pub value: Value,
    cells: &'a Cells,
    leaf: Leaf,
    view: &'a View,
}

impl Stat<'_> {
    /// The name without its tags, and the tags: for sinks that know tags.
    pub fn tag_extracted(&self) -> (String, Vec<(String, String)>) {
        self.view.tag_extracted(self.cells, self.leaf)
    }
}

/// What scopes and cells refer back to.
pub(crate) struct StoreInner {
    pub(crate) config: StatsConfig,
    pub(crate) claims: Arc<ShardClaims>,
    /// `None`: all of them.
    default_tags: Option<BTreeSet<Box<str>>>,
    /// Whether any tag comes from a user's regex.
    pub(crate) has_tag_regexes: bool,
    pub(crate) default_buckets: Arc<[f64]>,
    scopes: Mutex<BTreeMap<Arc<str>, Weak<ScopeNode>>>,
    pub(crate) namespaces: Mutex<BTreeSet<Box<str>>>,
}

impl StoreInner {
    fn new(config: StatsConfig) -> Self {
        Self {
            claims: Arc::new(ShardClaims::new(config.workers as usize)),
            default_tags: config.enabled_default_tags(),
            has_tag_regexes: config.tags.iter().any(|rule| matches!(rule, TagRule::Extract { .. })),
            default_buckets: Arc::new(DEFAULT_BUCKETS),
            scopes: Mutex::default(),
            namespaces: Mutex::default(),
            config,
        }
    }

    pub(crate) fn default_tag_enabled(&self, tag: &str) -> bool {
        self.default_tags.as_ref().is_none_or(|enabled| enabled.contains(tag))
    }

    pub(crate) fn intern_scope(
        self: &Arc<Self>,
        prefix: String,
        tags: impl FnOnce() -> Vec<TagSpan>,
    ) -> Arc<ScopeNode> {
        let mut scopes = self.scopes.lock();
        if let Some(node) = scopes.get(prefix.as_str()).and_then(Weak::upgrade) {
            return node;
        }
        let prefix: Arc<str> = prefix.into();
        let node = Arc::new(ScopeNode::new(self.clone(), prefix.clone(), tags()));
        scopes.insert(prefix, Arc::downgrade(&node));
        node
    }

    /// Removes a scope that is going away, unless a successor has taken its prefix.
    pub(crate) fn forget_scope(&self, prefix: &str, gone: *const ScopeNode) {
        let mut scopes = self.scopes.lock();
        if scopes.get(prefix).is_some_and(|node| std::ptr::eq(node.as_ptr(), gone)) {
            scopes.remove(prefix);
        }
    }

    fn scope_at(&self, prefix: &str) -> Option<Arc<ScopeNode>> {
        self.scopes.lock().get(prefix)?.upgrade()
    }

    /// The live scopes in the order of their prefixes, taken in batches so that a scrape never holds up
    /// the thread that adds clusters.
    pub(crate) fn live_scopes(self: &Arc<Self>) -> impl Iterator<Item = Arc<ScopeNode>> + Send + use<> {
        const BATCH: usize = 256;
        let store = self.clone();
        let mut last: Option<Arc<str>> = None;
        let mut batch = Vec::new().into_iter();
        let mut seen_all = false;
        std::iter::from_fn(move || {
            loop {
                if let Some(node) = batch.next() {
                    return Some(node);
                }
                if seen_all {
                    return None;
                }
                // The strong references leave the lock before any of them can be dropped: a scope's drop locks too.
                let mut next = Vec::with_capacity(BATCH);
                {
                    let scopes = store.scopes.lock();
                    let from = last.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
                    let mut taken = 0;
                    for (prefix, node) in scopes.range::<str, _>((from, Bound::Unbounded)).take(BATCH) {
                        taken += 1;
                        last = Some(prefix.clone());
                        next.extend(node.upgrade());
                    }
                    seen_all = taken < BATCH;
                }
                batch = next.into_iter();
            }
        })
    }
}

impl fmt::Debug for StoreInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreInner").field("config", &self.config).finish_non_exhaustive()
    }
}
