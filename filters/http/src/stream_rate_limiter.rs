//! Lets a body go at a pace, as Envoy's `StreamRateLimiter`: what may go goes, the rest waits until the next look.

use std::time::{Duration, Instant};

use waystation_filter_api::http::{BodyData, Flow, StreamCx};

/// Between two looks.
pub const FILL_INTERVAL: Duration = Duration::from_millis(50);

const NANOS: u128 = 1_000_000_000;

/// The bytes that one stream may send: fills continuously, begins with an interval's worth and holds at most a second's.
#[derive(Clone, Debug)]
pub struct StreamRateLimiter {
    bytes_per_second: u128,
    /// In bytes times nanoseconds per second, so that nothing is rounded.
    credit: u128,
    at: Instant,
}

impl StreamRateLimiter {
    /// For so many KiB a second from `now` on.
    pub fn new(kibibytes_per_second: u64, now: Instant) -> Self {
        let bytes_per_second = u128::from(kibibytes_per_second.saturating_mul(1024));
        let first = bytes_per_second * FILL_INTERVAL.as_millis() / 1000;
        Self { bytes_per_second, credit: first * NANOS, at: now }
    }

    /// How many of `wanted` bytes may go now.
    pub fn take(&mut self, wanted: usize, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.at).as_nanos();
        self.at = self.at.max(now);
        let most = self.bytes_per_second * NANOS;
        self.credit = self.credit.saturating_add(self.bytes_per_second.saturating_mul(passed)).min(most);
        let taken = (self.credit / NANOS).min(wanted as u128);
        self.credit -= taken * NANOS;
        // No more than what was wanted.
        taken as usize
    }
}

/// Of the data that a phase is shown, lets the first `allowed` bytes go, and holds the rest until the phase is shown it once
/// more after `interval`.
pub fn let_go(cx: &mut StreamCx<'_>, data: &mut BodyData, allowed: usize, interval: Duration) -> Flow {
    if allowed >= data.as_slice().len() {
        return Flow::Continue;
    }
    cx.pass_on(data.split_to(allowed));
    let pause = cx.driver.sleep(interval);
    Flow::Wait(Box::pin(async {
        pause.await;
        Flow::Again
    }))
}

#[cfg(test)]
mod tests {
    use super::{FILL_INTERVAL, StreamRateLimiter};
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    #[test]
    fn the_first_interval_is_there_at_once_and_the_rest_comes_with_time() {
        let start = Instant::now();
        let mut limiter = StreamRateLimiter::new(1, start);
        assert_eq!(limiter.take(1000, start), 51);
        assert_eq!(limiter.take(1000, start), 0);
        assert_eq!(limiter.take(1000, start + FILL_INTERVAL), 51);
        // 0.2 bytes were left over each time.
        assert_eq!(limiter.take(1000, start + 5 * FILL_INTERVAL), 205);
        assert_eq!(limiter.take(10, start + Duration::from_secs(100)), 10);
        assert_eq!(limiter.take(10_000, start + Duration::from_secs(100)), 1014);
    }

    #[test]
    fn the_highest_rate_lets_everything_go() {
        let start = Instant::now();
        let mut limiter = StreamRateLimiter::new(u64::MAX, start);
        assert_eq!(limiter.take(usize::MAX / 32, start), usize::MAX / 32);
        limiter.take(usize::MAX, start + Duration::from_secs(1 << 40));
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate(
            rate in 1_u64..100,
            looks in prop::collection::vec((0_u64..200, 0_usize..20_000), 1..50),
        ) {
            let start = Instant::now();
            let mut limiter = StreamRateLimiter::new(rate, start);
            let (mut now, mut sent, mut idle) = (start, 0_u64, false);
            for (pause, wanted) in looks {
                now += Duration::from_millis(pause);
                let taken = limiter.take(wanted, now);
                prop_assert!(taken <= wanted);
                sent += taken as u64;
                idle |= taken == wanted;
                let passed = now.duration_since(start).as_millis() as u64;
                let most = rate * 1024 * (passed + 50) / 1000;
                prop_assert!(sent <= most, "{} of {}", sent, most);
                // A stream that always wants more gets all of it, but for the part of a byte.
                prop_assert!(idle || passed > 900 || sent + 1 >= most, "{} of {}", sent, most);
            }
        }
    }
}
