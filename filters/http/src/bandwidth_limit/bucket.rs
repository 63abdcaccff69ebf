//! Bytes that all streams of a configuration share, on whichever worker they are.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const NANOS: u128 = 1_000_000_000;

/// Fills continuously and holds at most a second's worth.
///
/// One word says since when nothing has been taken: what has filled since then is there to be taken, and taking moves it
/// on. So it is exact between threads, and rounding never makes a byte.
#[derive(Debug)]
pub(super) struct Bucket {
    bytes_per_second: u128,
    start: Instant,
    /// Nanoseconds since a second before the start.
    since: AtomicU64,
}

impl Bucket {
    /// With what fills in one interval.
    pub(super) fn new(kibibytes_per_second: u64, interval: Duration, now: Instant) -> Self {
        let first = NANOS - interval.as_nanos().min(NANOS);
        Self {
            bytes_per_second: u128::from(kibibytes_per_second) * 1024,
            start: now,
            // At most a second.
            since: AtomicU64::new(first as u64),
        }
    }

    /// Takes up to so many bytes.
    pub(super) fn take(&self, wanted: usize, now: Instant) -> usize {
        if wanted == 0 || self.bytes_per_second == 0 {
            return 0;
        }
        let now = NANOS + now.saturating_duration_since(self.start).as_nanos();
        let mut taken = 0;
        let moved = |since: u64| {
            let since = u128::from(since).max(now - NANOS);
            let there = now.saturating_sub(since) * self.bytes_per_second / NANOS;
            taken = there.min(wanted as u128);
            let after = since + (taken * NANOS).div_ceil(self.bytes_per_second);
            (taken > 0).then(|| u64::try_from(after).unwrap_or(u64::MAX))
        };
        // Nothing else is agreed upon by it.
        match self.since.fetch_update(Ordering::Relaxed, Ordering::Relaxed, moved) {
            // No more than what was wanted.
            Ok(_) => taken as usize,
            Err(_) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use proptest::prelude::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    #[test]
    fn an_interval_at_once_and_a_second_at_most() {
        let start = Instant::now();
        let bucket = Bucket::new(1, INTERVAL, start);
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(bucket.take(1000, start), 51);
        assert_eq!(bucket.take(1000, start), 0);
        assert_eq!(bucket.take(10, at(50)), 10);
        assert_eq!(bucket.take(1000, at(50)), 41);
        assert_eq!(bucket.take(5000, at(100_000)), 1024);
        assert_eq!(bucket.take(0, at(200_000)), 0);
        assert_eq!(Bucket::new(0, INTERVAL, start).take(1, at(200_000)), 0);
        assert!(Bucket::new(u64::MAX, INTERVAL, start).take(usize::MAX, at(1)) > 1 << 60);
    }

    #[test]
    fn threads_take_no_more_than_there_is() {
        let start = Instant::now();
        let bucket = Bucket::new(1000, INTERVAL, start);
        let taken = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for look in 0..10_000_u64 {
                        let got = bucket.take(700, start + Duration::from_micros(look * 10));
                        taken.fetch_add(got, Ordering::Relaxed);
                    }
                });
            }
        });
        let most = 1000 * 1024 * (100 + 50) / 1000;
        let taken = taken.into_inner();
        assert!(taken <= most, "{taken} of {most}");
        assert!(taken > most * 9 / 10, "{taken} of {most}");
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate(rate in 1_u64..1000, looks in prop::collection::vec((0_u64..300, 0_usize..50_000), 1..50)) {
            let start = Instant::now();
            let bucket = Bucket::new(rate, INTERVAL, start);
            let (mut now, mut sent) = (start, 0);
            for (pause, wanted) in looks {
                now += Duration::from_millis(pause);
                let taken = bucket.take(wanted, now);
                prop_assert!(taken <= wanted);
                sent += taken as u64;
                let passed = now.duration_since(start).as_millis() as u64;
                prop_assert!(sent <= rate * 1024 * (passed + 50) / 1000);
            }
        }
    }
}
