//! How many requests were begun lately: `retry_budget.budget_interval`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Into how many steps the interval is divided: what is counted is forgotten step by step, as in Envoy.
const STEPS: u64 = 10;

/// A ring of counts, one for each step. Each holds the low half of its step's number and the count, so that whoever comes
/// to a place that is out of date begins it anew, whatever others do meanwhile.
#[derive(Debug)]
pub(super) struct Window {
    start: Instant,
    step: Duration,
    places: [AtomicU64; STEPS as usize],
}

impl Window {
    pub(super) fn new(interval: Duration) -> Self {
        let step = (interval / STEPS as u32).max(Duration::from_micros(1));
        Self { start: Instant::now(), step, places: Default::default() }
    }

    /// Counts a request that begins.
    pub(super) fn add(&self, now: Instant) {
        let step = self.step_at(now);
        let place = &self.places[(step % STEPS) as usize];
        let update = |held: u64| match held >> 32 == step & MASK {
            true => Some(held + u64::from(held & MASK < MASK)),
            false => Some((step & MASK) << 32 | 1),
        };
        // It always updates.
        let _ = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }

    /// How many were begun in the interval that ends now.
    pub(super) fn count(&self, now: Instant) -> u64 {
        let step = self.step_at(now);
        let is_recent = |held: u64| (step & MASK).wrapping_sub(held >> 32) & MASK < STEPS;
        let held = self.places.iter().map(|place| place.load(Ordering::Relaxed));
        held.filter(|held| is_recent(*held)).map(|held| held & MASK).sum()
    }

    fn step_at(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.start).as_micros() / self.step.as_micros();
        // From the second round on, so that an empty place is of none that counts.
        u64::try_from(passed).unwrap_or(u64::MAX / 2) + STEPS
    }
}

const MASK: u64 = u32::MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_count_for_an_interval() {
        let window = Window::new(Duration::from_millis(100));
        let at = |millis| window.start + Duration::from_millis(millis);
        assert_eq!(window.count(at(0)), 0);
        (0..10).for_each(|_| window.add(at(0)));
        window.add(at(55));
        assert_eq!(window.count(at(0)), 10, "a clock that is behind");
        assert_eq!(window.count(at(99)), 11);
        assert_eq!(window.count(at(100)), 1);
        assert_eq!(window.count(at(149)), 1);
        assert_eq!(window.count(at(150)), 0);
        window.add(at(1000));
        assert_eq!((window.count(at(1000)), window.count(at(100_000))), (1, 0));
    }

    /// Against a list of all requests, forgotten step by step.
    #[test]
    fn any_order_of_times() {
        for seed in 0..100 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let window = Window::new(Duration::from_millis(50));
            let (mut now, mut all) = (0, Vec::new());
            for _ in 0..200 {
                now += rng.u64(0..20);
                if rng.bool() {
                    window.add(window.start + Duration::from_millis(now));
                    all.push(now / 5);
                }
                let expected = all.iter().filter(|step| now / 5 - **step < STEPS).count() as u64;
                assert_eq!(window.count(window.start + Duration::from_millis(now)), expected, "seed {seed}");
            }
        }
    }
}
