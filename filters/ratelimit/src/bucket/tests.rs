use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{BucketConfig, FINEST, TokenBucket};

fn config(max_tokens: u32, tokens_per_fill: u32, fill_interval: Duration) -> BucketConfig {
    BucketConfig { max_tokens, tokens_per_fill, fill_interval }
}

/// The definition: as a fraction whose denominator is the interval, and so without rounding.
struct Model {
    config: BucketConfig,
    /// Tokens times the interval's nanoseconds.
    filled: u128,
    at: u128,
}

impl Model {
    fn new(config: BucketConfig) -> Self {
        let full = u128::from(config.max_tokens) * config.fill_interval.as_nanos();
        Self { config, filled: full, at: 0 }
    }

    fn fill(&mut self, now: u128) {
        let BucketConfig { max_tokens, tokens_per_fill, fill_interval } = self.config;
        let full = u128::from(max_tokens) * fill_interval.as_nanos();
        self.filled = full.min(self.filled + (now - self.at) * u128::from(tokens_per_fill));
        self.at = now;
    }

    fn take(&mut self, now: u128, hits: u64) -> bool {
        self.fill(now);
        let price = u128::from(hits) * self.config.fill_interval.as_nanos();
        let enough = price > 0 && self.filled >= price;
        if enough {
            self.filled -= price;
        }
        enough
    }

    fn remaining(&mut self, now: u128) -> u128 {
        self.fill(now);
        self.filled / self.config.fill_interval.as_nanos()
    }
}

#[test]
fn two_a_minute_come_one_each_half_minute() {
    let start = Instant::now();
    let bucket = TokenBucket::new(config(2, 2, Duration::from_secs(60)), start);
    let at = |seconds| start + Duration::from_secs(seconds);
    assert_eq!((bucket.remaining(start), bucket.next_token(start)), (2, Duration::ZERO));
    assert!(bucket.take(start, 1, 1) && bucket.take(start, 1, 1) && !bucket.take(start, 1, 1));
    assert_eq!((bucket.remaining(start), bucket.next_token(start)), (0, Duration::from_secs(30)));
    assert!(!bucket.take(start + Duration::from_nanos(29_999_999_999), 1, 1));
    assert!(bucket.take(at(30), 1, 1) && !bucket.take(at(30), 1, 1));
    // It never holds more than its maximum.
    assert!(bucket.take(at(10_000), 2, 1) && !bucket.take(at(10_000), 1, 1));
}

#[test]
fn an_empty_bucket_stays_empty_and_nothing_is_never_taken() {
    let start = Instant::now();
    let empty = TokenBucket::new(config(0, 1, Duration::from_secs(1)), start);
    assert!(!empty.take(start + Duration::from_secs(1_000), 1, 1));
    let bucket = TokenBucket::new(config(1, 1, Duration::from_secs(1)), start);
    assert!(!bucket.take(start, 0, 1));
    assert!(!bucket.take(start, u64::MAX, u64::MAX));
    assert_eq!(bucket.remaining(start), 1);
}

#[test]
fn a_share_makes_tokens_dearer_and_what_is_given_back_has_bounds() {
    let start = Instant::now();
    let bucket = TokenBucket::new(config(5, 1, Duration::from_secs(3600)), start);
    assert!(bucket.take(start, 1, 2) && bucket.take(start, 1, 2) && !bucket.take(start, 1, 2));
    assert_eq!(bucket.remaining(start), 1);
    bucket.give(start, 3);
    assert_eq!(bucket.remaining(start), 4);
    bucket.give(start, u64::MAX);
    assert_eq!(bucket.remaining(start), 5);
}

#[test]
fn the_deepest_and_the_slowest_bucket_keep_count() {
    let start = Instant::now();
    let day = Duration::from_secs(24 * 3600);
    let bucket = TokenBucket::new(config(u32::MAX, 1, 100_000 * day), start);
    assert!(bucket.take(start, u64::from(u32::MAX), 1) && !bucket.take(start, 1, 1));
    // A token a year is the least.
    assert!(!bucket.take(start + 364 * day, 1, 1));
    assert!(bucket.take(start + 366 * day, 1, 1));

    let fast = TokenBucket::new(config(u32::MAX, u32::MAX, Duration::from_millis(50)), start);
    assert!(fast.take(start, u64::from(u32::MAX), 1));
    assert!(fast.remaining(start + Duration::from_millis(50)) > u64::from(u32::MAX / 10));
}

#[test]
fn a_clock_that_is_behind_that_of_another_worker_takes_nothing_from_the_future() {
    let start = Instant::now();
    let bucket = TokenBucket::new(config(1, 1, Duration::from_secs(1)), start);
    let later = start + Duration::from_secs(5);
    assert!(bucket.take(later, 1, 1));
    assert!(!bucket.take(start, 1, 1));
    assert_eq!(bucket.remaining(start), 0);
    assert!(bucket.take(later + Duration::from_secs(1), 1, 1));
}

/// Bucket and steps: how much later, and how many tokens.
fn scenario() -> impl Strategy<Value = (BucketConfig, Vec<(u64, u64)>)> {
    let config = (0..50u32, 1..200u32, 50..5_000u64)
        .prop_map(|(max, fill, interval)| config(max, fill, Duration::from_millis(interval)));
    config.prop_flat_map(|config| {
        let token = config.fill_interval.as_nanos() as u64 / u64::from(config.tokens_per_fill);
        let later = prop_oneof![Just(0), Just(token), Just(token + 1), 0..token * 3, 0..token * 80];
        (Just(config), prop::collection::vec((later, 0..4u64), 1..200))
    })
}

proptest! {
    /// Where a token's time can be told in parts of a nanosecond, every decision is the model's. Elsewhere no token is too
    /// many, and the bucket lags by less than a nanosecond's 58th for each token that was taken.
    #[test]
    fn it_decides_as_the_model((config, steps) in scenario()) {
        let start = Instant::now();
        let bucket = TokenBucket::new(config, start);
        let tokens = u128::from(config.tokens_per_fill);
        let is_exact = tokens / super::gcd(config.fill_interval.as_nanos(), tokens) <= FINEST;
        let mut model = Model::new(config);
        let mut now = 0;
        for (later, hits) in steps {
            now += u128::from(later);
            let at = start + Duration::from_nanos(now as u64);
            if is_exact {
                prop_assert_eq!(bucket.take(at, hits, 1), model.take(now, hits));
                prop_assert_eq!(u128::from(bucket.remaining(at)), model.remaining(now));
            } else if bucket.take(at, hits, 1) {
                prop_assert!(model.take(now, hits), "a token was made");
            }
        }
        if !is_exact {
            let late = start + Duration::from_nanos(now as u64 + 10);
            prop_assert!(u128::from(bucket.remaining(late)) >= model.remaining(now), "fill time was lost");
        }
    }

    /// What is left says when the next token comes: at that time, and not a nanosecond earlier.
    #[test]
    fn the_next_token_comes_when_it_was_said((config, steps) in scenario()) {
        prop_assume!(config.max_tokens > 0);
        let start = Instant::now();
        let bucket = TokenBucket::new(config, start);
        let mut at = start;
        for (later, hits) in steps {
            at += Duration::from_nanos(later);
            bucket.take(at, hits, 1);
            let wait = bucket.next_token(at);
            prop_assert_eq!(bucket.remaining(at) > 0, wait.is_zero());
            prop_assert!(bucket.remaining(at + wait) >= 1);
            if !wait.is_zero() {
                prop_assert_eq!(bucket.remaining(at + wait - Duration::from_nanos(1)), 0);
            }
        }
    }
}

#[test]
fn workers_that_contend_take_what_there_is_and_not_one_more() {
    const WORKERS: usize = 8;
    let start = Instant::now();
    for round in 0..50u32 {
        let max = 1 + round * 37;
        let bucket = TokenBucket::new(config(max, 7, Duration::from_millis(50)), start);
        let barrier = Barrier::new(WORKERS);
        let taken = AtomicU64::new(0);
        // Each goes through the same points in time by itself: the last is 100 ms later, so 14 more come in.
        let last = 1_000u64;
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    barrier.wait();
                    for step in 0..=last {
                        let now = start + Duration::from_nanos(100_000_000 * step / last);
                        let hits = 1 + step % 2;
                        if bucket.take(now, hits, 1) {
                            taken.fetch_add(hits, Ordering::Relaxed);
                        }
                    }
                    while bucket.take(start + Duration::from_millis(100), 1, 1) {
                        taken.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        let taken = taken.into_inner();
        assert!(taken <= u64::from(max) + 14, "{taken} of {max}");
        // All that was there at the start is gone, whoever took it.
        assert!(taken >= u64::from(max), "{taken} of {max}");
        assert_eq!(bucket.remaining(start + Duration::from_millis(100)), 0);
    }
}
