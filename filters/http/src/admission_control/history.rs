//! What became of the requests of a sliding window, counted without locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A window is cut into slots of a second, or of as much longer that there are no more than these.
const MOST_SLOTS: u64 = 3600;

/// A slot's number, its requests and its successes in one word: so no count is lost when a slot begins anew.
const NUMBER: u32 = 20;
const COUNT: u32 = 22;
const MASK: u64 = (1 << COUNT) - 1;

/// Requests, and how many of them succeeded.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Totals {
    pub(super) requests: u64,
    pub(super) successes: u64,
}

#[derive(Debug)]
pub(super) struct History {
    start: Instant,
    slot: Duration,
    slots: Box<[AtomicU64]>,
    /// The number of a slot, and the sum of all others. Never waited for: who finds it taken adds up by itself.
    past: Mutex<Option<(u64, Totals)>>,
}

impl History {
    /// Of a window of whole seconds, at least one.
    pub(super) fn new(window: Duration, now: Instant) -> Self {
        let seconds = window.as_secs() + u64::from(window.subsec_millis() >= 500);
        let slot = seconds.div_ceil(MOST_SLOTS).max(1);
        let count = seconds.div_ceil(slot).max(1);
        Self {
            start: now,
            slot: Duration::from_secs(slot),
            slots: (0..count).map(|_| AtomicU64::new(0)).collect(),
            past: Mutex::new(None),
        }
    }

    /// Counts a request.
    pub(super) fn record(&self, success: bool, now: Instant) {
        let number = self.number(now);
        let tag = tag(number);
        let add = |word: u64| {
            let (of, requests, successes) = unpack(word);
            let (requests, successes) = if of == tag { (requests, successes) } else { (0, 0) };
            // More in one slot are as good as so many.
            (requests < MASK).then(|| pack(tag, requests + 1, successes + u64::from(success)))
        };
        // What the word says is all that there is to agree upon.
        let _ = self.at(number).fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// All of the window.
    pub(super) fn totals(&self, now: Instant) -> Totals {
        let number = self.number(now);
        let others = || self.sum(number, 1..self.slots.len() as u64);
        let past = match self.past.try_lock() {
            None => others(),
            Some(mut past) => match *past {
                Some((of, totals)) if of == number => totals,
                _ => past.insert((number, others())).1,
            },
        };
        let current = self.sum(number, 0..1);
        Totals { requests: past.requests + current.requests, successes: past.successes + current.successes }
    }

    /// The mean since the oldest slot that has any.
    pub(super) fn requests_per_second(&self, now: Instant) -> u64 {
        let number = self.number(now);
        let ages = 0..self.slots.len() as u64;
        let oldest = ages.rev().find(|age| self.sum(number, *age..*age + 1).requests > 0);
        let seconds = oldest.unwrap_or(0) * self.slot.as_secs();
        self.totals(now).requests / seconds.max(1)
    }

    /// Of the slots that are so much older than this one.
    fn sum(&self, number: u64, ages: std::ops::Range<u64>) -> Totals {
        let mut totals = Totals::default();
        for number in ages.map_while(|age| number.checked_sub(age)) {
            let (of, requests, successes) = unpack(self.at(number).load(Ordering::Relaxed));
            if of == tag(number) {
                totals.requests += requests;
                totals.successes += successes;
            }
        }
        totals
    }

    fn number(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs() / self.slot.as_secs()
    }

    fn at(&self, number: u64) -> &AtomicU64 {
        // The remainder is below the length.
        &self.slots[(number % self.slots.len() as u64) as usize]
    }
}

/// A slot's number as far as it is kept. Never 0, which an untouched slot has.
fn tag(number: u64) -> u64 {
    number % ((1 << NUMBER) - 1) + 1
}

fn pack(tag: u64, requests: u64, successes: u64) -> u64 {
    tag << (2 * COUNT) | requests << COUNT | successes
}

fn unpack(word: u64) -> (u64, u64, u64) {
    (word >> (2 * COUNT), word >> COUNT & MASK, word & MASK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn what_is_older_than_the_window_is_forgotten() {
        let start = Instant::now();
        let history = History::new(Duration::from_millis(2600), start);
        let at = |millis| start + Duration::from_millis(millis);
        let totals = |millis| {
            let totals = history.totals(at(millis));
            (totals.requests, totals.successes)
        };
        assert_eq!(totals(0), (0, 0));
        history.record(true, at(0));
        history.record(false, at(999));
        assert_eq!(totals(999), (2, 1));
        history.record(true, at(1500));
        assert_eq!(totals(1500), (3, 2));
        assert_eq!(totals(2999), (3, 2));
        assert_eq!(totals(3000), (1, 1));
        history.record(false, at(3000));
        assert_eq!(totals(3000), (2, 1), "in the place of the first second");
        assert_eq!(totals(60_000), (0, 0));
    }

    #[test]
    fn the_rate_since_the_oldest() {
        let start = Instant::now();
        let history = History::new(Duration::from_secs(30), start);
        for second in 0..10 {
            for _ in 0..5 {
                history.record(true, start + Duration::from_secs(second));
            }
        }
        assert_eq!(history.requests_per_second(start + Duration::from_secs(10)), 5);
        assert_eq!(history.requests_per_second(start + Duration::from_secs(25)), 2);
        assert_eq!(history.requests_per_second(start + Duration::from_secs(90)), 0);
    }

    #[test]
    fn no_count_is_lost_between_threads() {
        let start = Instant::now();
        let history = History::new(Duration::from_secs(1000), start);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for request in 0..10_000_u64 {
                        history.record(request % 2 == 0, start + Duration::from_millis(request));
                    }
                });
            }
        });
        let totals = history.totals(start + Duration::from_secs(10));
        assert_eq!(totals, Totals { requests: 40_000, successes: 20_000 });
    }

    #[test]
    fn a_long_window_has_longer_slots() {
        let start = Instant::now();
        let history = History::new(Duration::from_secs(86_400), start);
        history.record(true, start);
        assert_eq!(history.totals(start + Duration::from_secs(86_399)).requests, 1);
        assert_eq!(history.totals(start + Duration::from_secs(86_400)).requests, 0);
        let none = History::new(Duration::ZERO, start);
        none.record(true, start);
        assert_eq!(none.totals(start).requests, 1);
    }
}
