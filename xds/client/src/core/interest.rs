use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use smallvec::SmallVec;

use super::SubId;

/// The name that stands for "everything" once other names are asked for beside it.
pub(super) const WILDCARD: &str = "*";

/// The subscribers of one name; mostly one.
pub(super) type Subscribers = SmallVec<[SubId; 2]>;

/// Who wants what of one type on one stream, and what of it the server has not been told yet.
#[derive(Debug, Default)]
pub(super) struct Interests {
    wildcards: Vec<SubId>,
    namespaces: Vec<(SubId, Arc<str>)>,
    names: BTreeMap<Arc<str>, Subscribers>,
    added: BTreeSet<Arc<str>>,
    removed: BTreeSet<Arc<str>>,
}

impl Interests {
    pub(super) fn add_wildcard(&mut self, sub: SubId) {
        if self.wildcards.is_empty() {
            self.note_added(WILDCARD.into());
        }
        self.wildcards.push(sub);
    }

    pub(super) fn add_namespace(&mut self, sub: SubId, prefix: Arc<str>) {
        self.namespaces.push((sub, prefix));
    }

    pub(super) fn add_name(&mut self, sub: SubId, name: &Arc<str>) {
        let subscribers = self.names.entry(name.clone()).or_default();
        let first = subscribers.is_empty();
        if !subscribers.contains(&sub) {
            subscribers.push(sub);
        }
        if first {
            self.note_added(name.clone());
        }
    }

    pub(super) fn remove_name(&mut self, sub: SubId, name: &Arc<str>) {
        let Some(subscribers) = self.names.get_mut(name) else { return };
        subscribers.retain(|other| *other != sub);
        if subscribers.is_empty() {
            self.names.remove(name);
            self.note_removed(name.clone());
        }
    }

    /// Takes a subscriber's wildcard or namespace back, if it has one.
    pub(super) fn remove_broad(&mut self, sub: SubId) -> bool {
        let before = self.wildcards.len() + self.namespaces.len();
        let was_wildcard = self.is_wildcard();
        self.namespaces.retain(|(other, _)| *other != sub);
        self.wildcards.retain(|other| *other != sub);
        if was_wildcard && self.wildcards.is_empty() {
            self.note_removed(WILDCARD.into());
        }
        self.wildcards.len() + self.namespaces.len() < before
    }

    pub(super) fn wildcards(&self) -> &[SubId] {
        &self.wildcards
    }

    pub(super) fn is_wildcard(&self) -> bool {
        !self.wildcards.is_empty()
    }

    /// Whether there is anything to ask for. A namespace alone counts: VHDS opens with an empty request.
    pub(super) fn is_empty(&self) -> bool {
        self.wildcards.is_empty() && self.namespaces.is_empty() && self.names.is_empty()
    }

    /// Asked for by name, not only by a wildcard.
    pub(super) fn is_explicit(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn wants(&self, name: &str) -> bool {
        self.is_wildcard()
            || self.names.contains_key(name)
            || self.namespaces.iter().any(|(_, prefix)| in_namespace(prefix, name))
    }

    /// Whether `sub` wants `name`.
    pub(super) fn is_wanted_by(&self, sub: SubId, name: &str) -> bool {
        self.wildcards.contains(&sub) || self.named_subscribers(name).contains(&sub)
    }

    /// Those who want `name`, but for the wildcards.
    pub(super) fn named_subscribers(&self, name: &str) -> Subscribers {
        let mut all = self.names.get(name).cloned().unwrap_or_default();
        for (sub, prefix) in &self.namespaces {
            if in_namespace(prefix, name) && !all.contains(sub) {
                all.push(*sub);
            }
        }
        all
    }

    pub(super) fn names(&self) -> impl Iterator<Item = (&Arc<str>, &Subscribers)> {
        self.names.iter()
    }

    /// Every subscriber of the type, each once.
    pub(super) fn everyone(&self) -> BTreeSet<SubId> {
        let namespaces = self.namespaces.iter().map(|(sub, _)| sub);
        self.wildcards.iter().chain(namespaces).chain(self.names.values().flatten()).copied().collect()
    }

    // === What goes on the wire ===

    /// A new stream knows nothing: all is to be asked for again.
    pub(super) fn restart(&mut self) {
        self.removed.clear();
        self.added = self.names.keys().cloned().collect();
        if self.is_wildcard() {
            self.added.insert(WILDCARD.into());
        }
    }

    pub(super) fn has_news(&self) -> bool {
        !self.added.is_empty() || !self.removed.is_empty()
    }

    /// Whether the only thing wanted is everything: then the first request of a stream names nothing (the legacy
    /// form, understood by all servers).
    pub(super) fn is_only_wildcard(&self) -> bool {
        self.is_wildcard() && self.names.is_empty()
    }

    /// All that is wanted now, for a state-of-the-world request.
    pub(super) fn all(&self) -> Vec<String> {
        let wildcard = self.is_wildcard().then(|| WILDCARD.to_owned());
        wildcard.into_iter().chain(self.names.keys().map(|name| name.to_string())).collect()
    }

    /// What was added and removed since the last request.
    pub(super) fn news(&self) -> (Vec<String>, Vec<String>) {
        let texts = |names: &BTreeSet<Arc<str>>| names.iter().map(|name| name.to_string()).collect();
        (texts(&self.added), texts(&self.removed))
    }

    /// The same, and from here on the server knows.
    pub(super) fn take_news(&mut self) -> (BTreeSet<Arc<str>>, BTreeSet<Arc<str>>) {
        (std::mem::take(&mut self.added), std::mem::take(&mut self.removed))
    }

    /// Whether the server still believes that `name` is wanted.
    pub(super) fn awaits_unsubscribe(&self, name: &str) -> bool {
        self.removed.contains(name)
    }

    fn note_added(&mut self, name: Arc<str>) {
        if !self.removed.remove(&name) {
            self.added.insert(name);
        }
    }

    fn note_removed(&mut self, name: Arc<str>) {
        if !self.added.remove(&name) {
            self.removed.insert(name);
        }
    }
}

fn in_namespace(prefix: &str, name: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn only_the_first_and_the_last_subscriber_are_news() {
        let mut interests = Interests::default();
        let (one, two) = (SubId(1), SubId(2));
        interests.add_name(one, &"a".into());
        interests.add_name(two, &"a".into());
        interests.add_name(two, &"b".into());
        assert_eq!(interests.take_news(), (set(&["a", "b"]), set(&[])));
        interests.remove_name(one, &"a".into());
        assert!(!interests.has_news());
        interests.remove_name(two, &"a".into());
        assert_eq!(interests.take_news(), (set(&[]), set(&["a"])));
    }

    #[test]
    fn a_change_that_is_undone_before_it_was_told_is_no_news() {
        let mut interests = Interests::default();
        interests.add_name(SubId(1), &"a".into());
        let _ = interests.take_news();
        interests.remove_name(SubId(1), &"a".into());
        assert!(interests.awaits_unsubscribe("a"));
        interests.add_name(SubId(2), &"a".into());
        assert!(!interests.has_news());
    }

    #[test]
    fn a_namespace_wants_what_is_below_it() {
        let mut interests = Interests::default();
        interests.add_namespace(SubId(1), "rc".into());
        assert!(interests.wants("rc/host") && !interests.wants("rc") && !interests.wants("rcx/host"));
        assert!(!interests.has_news() && !interests.is_empty());
    }
}
