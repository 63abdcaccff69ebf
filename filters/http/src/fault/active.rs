//! How many faults there are at a time: exact across workers, and across the configurations of one filter that follow each
//! other.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use waystation_filter_api::singletons::Singletons;
use waystation_stats::{Scope, stats_group};

stats_group! {
    /// What the filter counts.
    pub(super) struct FaultStats {
        counters { aborts_injected, delays_injected, faults_overflow, response_rl_injected }
        gauges { active_faults }
    }
}

/// The faults that are now active below one statistics prefix.
#[derive(Debug)]
pub(super) struct Active {
    count: AtomicU64,
    stats: FaultStats,
}

/// One of them. Given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Active>);

/// By the prefix, as long as anyone holds it.
#[derive(Default)]
struct All(Mutex<HashMap<String, Weak<Active>>>);

impl Active {
    /// Those below `scope`.
    pub(super) fn of(scope: &Scope, singletons: &Singletons) -> Arc<Self> {
        let all = singletons.get::<All>();
        let mut all = all.0.lock();
        if let Some(known) = all.get(scope.name()).and_then(Weak::upgrade) {
            return known;
        }
        all.retain(|_, active| active.strong_count() > 0);
        let active = Arc::new(Self { count: AtomicU64::new(0), stats: scope.group() });
        all.insert(scope.name().to_owned(), Arc::downgrade(&active));
        active
    }

    pub(super) fn stats(&self) -> &FaultStats {
        &self.stats
    }

    /// A place, if fewer than `max` are taken.
    pub(super) fn enter(self: &Arc<Self>, max: u64) -> Option<Place> {
        let more = |count| (count < max).then_some(count + 1);
        self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        self.stats.active_faults().inc();
        Some(Place(Arc::clone(self)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::Relaxed);
        self.0.stats.active_faults().dec();
    }
}

#[cfg(test)]
mod tests {
    use super::Active;
    use std::sync::atomic::{AtomicU64, Ordering};
    use waystation_filter_api::singletons::Singletons;
    use waystation_stats::Store;

    #[test]
    fn configurations_that_follow_each_other_count_together() {
        let (store, singletons) = (Store::default(), Singletons::default());
        let of = |name| Active::of(&store.root().scope(name), &singletons);
        let old = of("http.a.fault").enter(1).unwrap();
        assert!(of("http.a.fault").enter(1).is_none());
        assert!(of("http.b.fault").enter(1).is_some());
        drop(old);
        assert!(of("http.a.fault").enter(1).is_some());
        assert!(of("http.a.fault").enter(0).is_none());
    }

    #[test]
    fn never_one_too_many_under_eight_threads_and_none_is_left() {
        const MAX: u64 = 3;
        let store = Store::default();
        let active = Active::of(&store.root().scope("fault"), &Singletons::default());
        let (now, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|threads| {
            for _ in 0..8 {
                threads.spawn(|| {
                    for _ in 0..20_000 {
                        let Some(place) = active.enter(MAX) else { continue };
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        now.fetch_sub(1, Ordering::SeqCst);
                        drop(place);
                    }
                });
            }
        });
        assert!(most.into_inner() <= MAX);
        assert_eq!(active.count.load(Ordering::SeqCst), 0);
        assert_eq!(store.find("fault.active_faults"), Some(0));
    }
}
