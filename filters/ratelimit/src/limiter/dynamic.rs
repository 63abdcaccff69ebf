//! Buckets that are made for what comes up: one for each value of a descriptor's wildcards, as many as there may be.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::Limit;
use crate::bucket::{BucketConfig, TokenBucket};
use crate::descriptor::Entries;

/// The buckets of one descriptor with wildcards. At the bound, the bucket that has not been asked for the longest makes room.
///
/// The lock is taken on the request path: two workers that see a value for the first time must not make a bucket each, and
/// which bucket makes room is one order over all of them. It is held for one look into a map and a few indexes.
#[derive(Debug)]
pub(super) struct DynamicBuckets {
    pattern: Entries,
    bucket: BucketConfig,
    shadow: bool,
    buckets: Mutex<Lru>,
}

/// Buckets in the order in which they were last asked, as a list through their places.
#[derive(Debug)]
struct Lru {
    places: HashMap<Arc<[u8]>, usize>,
    nodes: Vec<Node>,
    /// The place of that which was asked last, and of that which was not for the longest.
    newest: usize,
    oldest: usize,
    max: usize,
}

#[derive(Debug)]
struct Node {
    key: Arc<[u8]>,
    limit: Arc<Limit>,
    newer: usize,
    older: usize,
}

/// No place.
const END: usize = usize::MAX;

impl DynamicBuckets {
    pub(super) fn new(pattern: Entries, bucket: BucketConfig, shadow: bool, max: usize) -> Self {
        let lru = Lru { places: HashMap::new(), nodes: Vec::new(), newest: END, oldest: END, max };
        Self { pattern, bucket, shadow, buckets: Mutex::new(lru) }
    }

    /// Whether the keys are the same, and the values but for those left open.
    pub(super) fn matches(&self, entries: &Entries) -> bool {
        let mut ours = self.pattern.iter();
        let mut theirs = entries.iter();
        loop {
            match (ours.next(), theirs.next()) {
                (None, None) => return true,
                (Some((key, value)), Some((other, found))) if key == other => {
                    if !value.is_empty() && value != found {
                        return false;
                    }
                }
                _ => return false,
            }
        }
    }

    /// The bucket of these values; a full one if they are new or forgotten.
    pub(super) fn get(&self, entries: &Entries, now: Instant) -> Arc<Limit> {
        let make = || Arc::new(Limit { bucket: TokenBucket::new(self.bucket, now), shadow: self.shadow });
        self.buckets.lock().get(entries.as_bytes(), make)
    }
}

impl Lru {
    fn get(&mut self, key: &[u8], make: impl FnOnce() -> Arc<Limit>) -> Arc<Limit> {
        let place = match self.places.get(key) {
            Some(&place) => {
                self.unlink(place);
                place
            }
            None => {
                let node = Node { key: key.into(), limit: make(), newer: END, older: END };
                let place = if self.nodes.len() < self.max {
                    self.nodes.push(node);
                    self.nodes.len() - 1
                } else {
                    let place = self.oldest;
                    self.unlink(place);
                    self.places.remove(&*self.nodes[place].key);
                    self.nodes[place] = node;
                    place
                };
                self.places.insert(Arc::clone(&self.nodes[place].key), place);
                place
            }
        };
        self.link(place);
        Arc::clone(&self.nodes[place].limit)
    }

    fn unlink(&mut self, place: usize) {
        let Node { newer, older, .. } = self.nodes[place];
        match self.nodes.get_mut(newer) {
            Some(node) => node.older = older,
            None => self.newest = older,
        }
        match self.nodes.get_mut(older) {
            Some(node) => node.newer = newer,
            None => self.oldest = newer,
        }
    }

    fn link(&mut self, place: usize) {
        let next = std::mem::replace(&mut self.newest, place);
        (self.nodes[place].newer, self.nodes[place].older) = (END, next);
        match self.nodes.get_mut(next) {
            Some(node) => node.newer = place,
            None => self.oldest = place,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{DynamicBuckets, Entries};
    use crate::bucket::BucketConfig;
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    fn entries(pairs: &[(&str, &str)]) -> Entries {
        let mut entries = Entries::default();
        for (key, value) in pairs {
            entries.push(key.as_bytes(), value.as_bytes());
        }
        entries
    }

    fn buckets(max: usize) -> DynamicBuckets {
        let bucket =
            BucketConfig { max_tokens: 1, tokens_per_fill: 1, fill_interval: Duration::from_secs(3600) };
        DynamicBuckets::new(entries(&[("user", ""), ("plan", "free")]), bucket, false, max)
    }

    #[test]
    fn open_values_match_anything_and_keys_and_other_values_must_be_the_same() {
        let buckets = buckets(1);
        assert!(buckets.matches(&entries(&[("user", "a"), ("plan", "free")])));
        assert!(buckets.matches(&entries(&[("user", ""), ("plan", "free")])));
        assert!(!buckets.matches(&entries(&[("user", "a"), ("plan", "paid")])));
        assert!(!buckets.matches(&entries(&[("plan", "free"), ("user", "a")])));
        assert!(!buckets.matches(&entries(&[("user", "a")])));
        assert!(!buckets.matches(&entries(&[("user", "a"), ("plan", "free"), ("more", "")])));
    }

    /// Against a list that is searched.
    #[test]
    fn what_was_not_asked_for_the_longest_makes_room() {
        let mut random = fastrand::Rng::with_seed(7);
        for max in [1, 2, 3, 20] {
            let buckets = buckets(max);
            let now = Instant::now();
            let mut model: VecDeque<u32> = VecDeque::new();
            for _ in 0..5_000 {
                let user = random.u32(..30);
                let key = entries(&[("user", &user.to_string()), ("plan", "free")]);
                let is_known = model.contains(&user);
                // An empty bucket is a known one.
                assert_eq!(buckets.get(&key, now).bucket.take(now, 1, 1), !is_known, "{max} {user}");
                model.retain(|other| *other != user);
                model.push_front(user);
                model.truncate(max);
                assert!(buckets.buckets.lock().places.len() <= max);
            }
        }
    }

    #[test]
    fn workers_that_see_a_value_for_the_first_time_get_one_bucket() {
        let buckets = buckets(4);
        let now = Instant::now();
        for round in 0..200 {
            let key = entries(&[("user", &round.to_string()), ("plan", "free")]);
            let taken: usize = std::thread::scope(|scope| {
                let workers: Vec<_> = (0..4)
                    .map(|_| scope.spawn(|| usize::from(buckets.get(&key, now).bucket.take(now, 1, 1))))
                    .collect();
                workers.into_iter().map(|worker| worker.join().unwrap()).sum()
            });
            assert_eq!(taken, 1);
            assert!(Arc::strong_count(&buckets.get(&key, now)) >= 2);
        }
    }
}
