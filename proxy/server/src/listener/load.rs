//! Open connections of a listener: its connection limit and the `exact_balance` over the workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Open connections by the worker that serves them. An in-place update of the listener goes on counting here.
#[derive(Debug)]
pub struct Load(Box<[AtomicUsize]>);

/// A connection's place in the load of its listener, given back when it ends.
#[derive(Debug)]
pub(super) struct Place {
    load: Arc<Load>,
    pub(super) worker: usize,
}

impl Load {
    /// No connections.
    pub fn new(workers: u32) -> Self {
        Self((0..workers).map(|_| AtomicUsize::new(0)).collect())
    }

    /// All connections.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|count| count.load(Ordering::Relaxed) as u64).sum()
    }

    /// The worker with the fewest connections; `own` wins a tie.
    pub(super) fn least(&self, own: usize) -> usize {
        let mut best = own;
        let mut least = self.0[own].load(Ordering::Relaxed);
        for (index, count) in self.0.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count < least {
                (best, least) = (index, count);
            }
        }
        best
    }
}

impl Place {
    /// Counts a connection on a worker.
    pub(super) fn take(load: &Arc<Load>, worker: usize) -> Self {
        load.0[worker].fetch_add(1, Ordering::Relaxed);
        Self { load: Arc::clone(load), worker }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.0[self.worker].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::{Load, Place};
    use std::sync::Arc;

    #[test]
    fn the_least_loaded_worker_is_chosen_and_ties_stay() {
        let load = Arc::new(Load::new(3));
        let mut places = Vec::new();
        let mut choose = |own| {
            let place = Place::take(&load, load.least(own));
            let worker = place.worker;
            places.push(place);
            worker
        };
        assert_eq!([choose(1), choose(1), choose(1)], [1, 0, 2]);
        places.pop();
        assert_eq!((load.least(1), load.total()), (2, 2));
    }
}
