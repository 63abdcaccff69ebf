//! Which clusters are warming, and which of them something has happened to. A cluster is looked at when it is added, when
//! its endpoints have come and when what it refers to has come, and never because of another one: with all clusters of a
//! large configuration warming at once, each event costs the same.

use std::collections::{BTreeMap, HashMap, HashSet};

/// Warming clusters by name.
#[derive(Debug, Default)]
pub(super) struct Warming {
    /// Whether start-up waits for it.
    names: BTreeMap<String, bool>,
    awaited: usize,
    /// To be looked at.
    touched: Vec<String>,
    /// By the key of a need that has not settled: who waits for it.
    by_need: HashMap<String, HashSet<String>>,
}

impl Warming {
    /// A cluster begins to warm, or another one of its name takes its place.
    pub(super) fn insert(&mut self, name: &str, awaited: bool) {
        self.remove(name);
        self.names.insert(name.to_owned(), awaited);
        self.awaited += usize::from(awaited);
        self.touched.push(name.to_owned());
    }

    /// A cluster is warm, or gone.
    pub(super) fn remove(&mut self, name: &str) {
        if let Some(awaited) = self.names.remove(name) {
            self.awaited -= usize::from(awaited);
        }
    }

    /// Something has happened to a cluster.
    pub(super) fn touch(&mut self, name: &str) {
        if self.names.contains_key(name) {
            self.touched.push(name.to_owned());
        }
    }

    /// Something may have happened to any of them.
    pub(super) fn touch_all(&mut self) {
        self.touched = self.names.keys().cloned().collect();
    }

    /// A cluster was looked at and waits for these needs.
    pub(super) fn wait(&mut self, name: &str, needs: impl IntoIterator<Item = String>) {
        for need in needs {
            self.by_need.entry(need).or_default().insert(name.to_owned());
        }
    }

    /// A need has settled, or nobody holds it any more.
    pub(super) fn settled(&mut self, need: &str) {
        for name in self.by_need.remove(need).unwrap_or_default() {
            self.touch(&name);
        }
    }

    /// Those to be looked at.
    pub(super) fn take_touched(&mut self) -> Vec<String> {
        std::mem::take(&mut self.touched)
    }

    /// Whether start-up waits for one.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited > 0
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }
}
