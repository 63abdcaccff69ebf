//! The last answer of upstream to a health check.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Shared by all workers. As in Envoy answers end together, whenever another `cache_time` has passed since the configuration
/// came, so that all workers ask anew at the same time.
#[derive(Debug)]
pub(super) struct Cache {
    time: Duration,
    start: Instant,
    /// The number of the period that it serves for, plus one, then whether it is degraded and the status; zero is none.
    answer: AtomicU64,
}

const STATUS_BITS: u32 = 16;
const DEGRADED: u64 = 1 << STATUS_BITS;

impl Cache {
    pub(super) fn new(time: Duration, start: Instant) -> Self {
        Self { time, start, answer: AtomicU64::new(0) }
    }

    /// The status, and whether the answer said that we are degraded.
    pub(super) fn get(&self, now: Instant) -> Option<(u16, bool)> {
        let answer = self.answer.load(Ordering::Relaxed);
        let is_current = answer >> (STATUS_BITS + 1) == self.period(now);
        is_current.then_some((answer as u16, answer & DEGRADED != 0))
    }

    pub(super) fn set(&self, now: Instant, status: u16, degraded: bool) {
        let degraded = if degraded { DEGRADED } else { 0 };
        let answer = self.period(now) << (STATUS_BITS + 1) | degraded | u64::from(status);
        self.answer.store(answer, Ordering::Relaxed);
    }

    fn period(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.start).as_nanos() / self.time.as_nanos().max(1);
        // Beyond what the bits hold periods repeat, which no process lives to see.
        u64::try_from(passed).unwrap_or(u64::MAX).wrapping_add(1) & (u64::MAX >> (STATUS_BITS + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::Cache;
    use std::time::{Duration, Instant};

    #[test]
    fn answers_end_with_their_period() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let cache = Cache::new(Duration::from_secs(1), start);
        assert_eq!(cache.get(at(0)), None);
        cache.set(at(100), 503, true);
        assert_eq!(cache.get(at(999)), Some((503, true)));
        assert_eq!(cache.get(at(1000)), None);
        cache.set(at(1900), 200, false);
        assert_eq!((cache.get(at(1999)), cache.get(at(2000))), (Some((200, false)), None));
    }
}
