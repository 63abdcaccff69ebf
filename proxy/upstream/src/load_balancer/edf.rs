//! Earliest deadline first: weighted picks in a smooth sequence, as Envoy's `EdfScheduler`.

use std::cmp::Ordering;

/// A schedule over `0..n`. Weights are asked for again at each pick, so that they may change.
#[derive(Debug)]
pub(crate) struct Edf {
    /// A binary heap, the earliest deadline first.
    heap: Vec<Entry>,
    now: f64,
    next_order: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    deadline: f64,
    /// Entries with equal deadlines keep the order in which they were added.
    order: u64,
    index: u32,
}

impl Entry {
    fn before(&self, other: &Self) -> bool {
        match self.deadline.total_cmp(&other.deadline) {
            Ordering::Less => true,
            Ordering::Equal => self.order < other.order,
            Ordering::Greater => false,
        }
    }
}

impl Edf {
    /// A schedule that has been picked from `picks` times already, so that the schedules of many proxies do not start in
    /// step. Entries without weight are left out.
    pub(crate) fn new(len: u32, picks: u32, weight: impl Fn(u32) -> f64) -> Self {
        let total: f64 = (0..len).map(&weight).filter(|weight| *weight > 0.0).sum();
        let mut heap = Vec::with_capacity(len as usize);
        let (mut now, mut rest) = (0.0_f64, picks);
        for index in 0..len {
            let weight = weight(index);
            if weight <= 0.0 {
                continue;
            }
            // All whole rounds at once; what remains is picked one by one below.
            let rounds = (f64::from(picks) * weight / total).floor();
            rest = rest.saturating_sub(rounds as u32);
            now = now.max(rounds / weight);
            heap.push(Entry { deadline: (rounds + 1.0) / weight, order: u64::from(index), index });
        }
        let mut schedule = Self { heap, now, next_order: u64::from(len) };
        for i in (0..schedule.heap.len() / 2).rev() {
            schedule.sift_down(i);
        }
        for _ in 0..rest {
            schedule.pick(&weight);
        }
        schedule
    }

    /// The next index, scheduled again by its current weight.
    pub(crate) fn pick(&mut self, weight: impl Fn(u32) -> f64) -> Option<u32> {
        let top = self.heap.first_mut()?;
        let index = top.index;
        self.now = top.deadline;
        top.deadline = self.now + 1.0 / weight(index).max(f64::MIN_POSITIVE);
        top.order = self.next_order;
        self.next_order += 1;
        self.sift_down(0);
        Some(index)
    }

    fn sift_down(&mut self, mut at: usize) {
        let len = self.heap.len();
        loop {
            let mut least = at;
            for child in [2 * at + 1, 2 * at + 2] {
                if child < len && self.heap[child].before(&self.heap[least]) {
                    least = child;
                }
            }
            if least == at {
                return;
            }
            self.heap.swap(at, least);
            at = least;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Edf;

    fn sequence(weights: &[f64], picks: u32, count: usize) -> Vec<u32> {
        let weight = |index: u32| weights[index as usize];
        let mut schedule = Edf::new(weights.len() as u32, picks, weight);
        (0..count).filter_map(|_| schedule.pick(weight)).collect()
    }

    #[test]
    fn heavier_entries_come_more_often_and_spread_out() {
        // Deadlines 1, 1/2, 1/3: the sequence of Envoy's scheduler for weights 1, 2, 3.
        assert_eq!(sequence(&[1.0, 2.0, 3.0], 0, 6), [2, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn equal_weights_go_round() {
        assert_eq!(sequence(&[1.0, 1.0, 1.0], 0, 7), [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn an_advanced_start_continues_the_same_proportions() {
        let picked = sequence(&[1.0, 2.0, 5.0], 11, 800);
        for (index, expected) in [(0, 100_usize), (1, 200), (2, 500)] {
            let count = picked.iter().filter(|picked| **picked == index).count();
            assert!(count.abs_diff(expected) <= 1, "{index}: {count}");
        }
    }

    #[test]
    fn weightless_entries_never_come() {
        assert_eq!(sequence(&[0.0, 1.0], 3, 3), [1, 1, 1]);
        assert_eq!(sequence(&[], 3, 3), [] as [u32; 0]);
    }
}
