//! When the next attempt, and the next request, may go out.

use std::time::{Duration, Instant};

use crate::{BackoffSpec, RateLimit};

/// Exponential back-off with full jitter, as `JitteredExponentialBackOffStrategy`: each wait is uniform in
/// `[0, interval)`, and the interval doubles up to the maximum.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    spec: BackoffSpec,
    interval: Duration,
}

impl Backoff {
    pub(super) fn new(spec: BackoffSpec) -> Self {
        Self { spec, interval: spec.base }
    }

    pub(super) fn reset(&mut self) {
        self.interval = self.spec.base;
    }

    pub(super) fn next(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let interval = self.interval.min(self.spec.max);
        self.interval = interval.saturating_mul(2).min(self.spec.max);
        jitter(interval, rng)
    }
}

/// Uniform in `[0, limit)`, to the microsecond.
pub(super) fn jitter(limit: Duration, rng: &mut fastrand::Rng) -> Duration {
    let micros = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX);
    Duration::from_micros(if micros == 0 { 0 } else { rng.u64(0..micros) })
}

/// A token bucket, in thousandths of a token.
#[derive(Clone, Debug)]
pub(super) struct TokenBucket {
    spec: RateLimit,
    /// Thousandths of tokens, times a thousand (so that one millisecond at one thousandth each second counts).
    level: u64,
    filled: Option<Instant>,
}

const TOKEN: u64 = 1_000_000;

impl TokenBucket {
    pub(super) fn new(spec: RateLimit) -> Self {
        Self { spec, level: u64::from(spec.max_tokens) * TOKEN, filled: None }
    }

    /// Takes a token, or says when there will be one.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let capacity = u64::from(self.spec.max_tokens.max(1)) * TOKEN;
        let filled = *self.filled.get_or_insert(now);
        let elapsed = now.saturating_duration_since(filled);
        let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        if millis > 0 {
            self.level =
                self.level.saturating_add(millis.saturating_mul(self.spec.fill_millis)).min(capacity);
            self.filled = Some(filled + Duration::from_millis(millis));
        }
        if self.level >= TOKEN {
            self.level -= TOKEN;
            return Ok(());
        }
        let wait = (TOKEN - self.level).div_ceil(self.spec.fill_millis.max(1));
        Err(now + Duration::from_millis(wait.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_doubles_up_to_the_maximum_and_starts_anew() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut backoff =
            Backoff::new(BackoffSpec { base: Duration::from_millis(500), max: Duration::from_secs(30) });
        let mut limit = Duration::from_millis(500);
        for _ in 0..20 {
            assert!(backoff.next(&mut rng) < limit);
            limit = (limit * 2).min(Duration::from_secs(30));
        }
        assert_eq!(backoff.interval, Duration::from_secs(30));
        backoff.reset();
        assert!(backoff.next(&mut rng) < Duration::from_millis(500));
    }

    #[test]
    fn bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(RateLimit { max_tokens: 3, fill_millis: 10_000 });
        assert!((0..3).all(|_| bucket.take(start).is_ok()));
        let at = bucket.take(start).unwrap_err();
        assert_eq!(at - start, Duration::from_millis(100));
        assert!(bucket.take(at).is_ok());
        assert!(bucket.take(at).is_err());
        let later = start + Duration::from_secs(60);
        assert!((0..3).all(|_| bucket.take(later).is_ok()));
        assert!(bucket.take(later).is_err());
    }
}
