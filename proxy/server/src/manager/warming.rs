//! Who waits for what to come into force. A listener or cluster is looked at when it is added, when something has happened
//! to it and when the last of what it refers to has come, and never because of another one: with all of a large
//! configuration warming at once, each event costs the same.

use std::collections::{BTreeMap, HashMap, HashSet};

/// Who waits for which needs, by name and key.
#[derive(Debug, Default)]
pub(super) struct Waits {
    by_need: HashMap<String, HashSet<String>>,
    /// For how many needs. Too low where one is counted that is not waited for any more: whoever is told that none is left
    /// looks, and waits again for what still is.
    left: HashMap<String, usize>,
}

impl Waits {
    /// From now on `name` waits for these needs.
    pub(super) fn wait(&mut self, name: &str, needs: impl IntoIterator<Item = String>) {
        // Two filter chains may need the same: it comes once.
        let needs: HashSet<String> = needs.into_iter().collect();
        match needs.len() {
            0 => self.forget(name),
            count => drop(self.left.insert(name.to_owned(), count)),
        }
        for need in needs {
            self.by_need.entry(need).or_default().insert(name.to_owned());
        }
    }

    /// `name` waits for nothing.
    pub(super) fn forget(&mut self, name: &str) {
        self.left.remove(name);
    }

    pub(super) fn is_waiting(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    /// A need has settled, or nobody holds it any more: gives those for whom it was the last.
    pub(super) fn settled(&mut self, need: &str) -> Vec<String> {
        let mut waiting = self.by_need.remove(need).unwrap_or_default();
        waiting.retain(|name| match self.left.get_mut(name) {
            Some(left) if *left > 1 => {
                *left -= 1;
                false
            }
            _ => self.left.remove(name).is_some(),
        });
        waiting.into_iter().collect()
    }
}

/// What is warming, by name.
#[derive(Debug, Default)]
pub(super) struct Warming {
    /// Whether start-up waits for it.
    names: BTreeMap<String, bool>,
    awaited: usize,
    /// To be looked at.
    touched: Vec<String>,
    waits: Waits,
}

impl Warming {
    /// Something begins to warm, or another one of its name takes its place.
    pub(super) fn insert(&mut self, name: &str, awaited: bool) {
        self.remove(name);
        self.names.insert(name.to_owned(), awaited);
        self.awaited += usize::from(awaited);
        self.touched.push(name.to_owned());
    }

    /// It is warm, or gone.
    pub(super) fn remove(&mut self, name: &str) {
        self.waits.forget(name);
        if let Some(awaited) = self.names.remove(name) {
            self.awaited -= usize::from(awaited);
        }
    }

    /// Something has happened to it.
    pub(super) fn touch(&mut self, name: &str) {
        if self.names.contains_key(name) {
            self.touched.push(name.to_owned());
        }
    }

    /// Something may have happened to any of them.
    pub(super) fn touch_all(&mut self) {
        self.touched = self.names.keys().cloned().collect();
    }

    /// It was looked at and waits for these needs.
    pub(super) fn wait(&mut self, name: &str, needs: impl IntoIterator<Item = String>) {
        self.waits.wait(name, needs);
    }

    /// A need has settled, or nobody holds it any more.
    pub(super) fn settled(&mut self, need: &str) {
        for name in self.waits.settled(need) {
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

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn who_waits_is_told_once_when_the_last_need_has_settled() {
        let mut waits = Waits::default();
        waits.wait("l", needs(&["a", "b"]));
        waits.wait("m", needs(&["b"]));
        assert!(waits.settled("a").is_empty() && waits.is_waiting("l"));
        let mut told = waits.settled("b");
        told.sort();
        assert_eq!(told, ["l", "m"]);
        assert!(waits.settled("b").is_empty() && !waits.is_waiting("l"));
    }

    #[test]
    fn what_is_needed_twice_comes_once() {
        let mut waits = Waits::default();
        waits.wait("l", needs(&["a", "b", "a"]));
        assert!(waits.settled("a").is_empty());
        assert_eq!(waits.settled("b"), ["l"]);
    }

    #[test]
    fn a_need_of_an_earlier_form_at_most_costs_a_look() {
        let mut waits = Waits::default();
        waits.wait("l", needs(&["old"]));
        waits.wait("l", needs(&["new"]));
        assert_eq!(waits.settled("old"), ["l"]);
        // It looks, and waits again for what is missing.
        waits.wait("l", needs(&["new"]));
        assert_eq!(waits.settled("new"), ["l"]);
        waits.wait("l", needs(&["a"]));
        waits.forget("l");
        assert!(waits.settled("a").is_empty());
    }
}
