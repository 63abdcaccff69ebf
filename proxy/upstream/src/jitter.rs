//! Durations spread at random, so that what began together does not end together.

use std::time::Duration;

/// `duration`, lengthened by up to `percent` of itself.
pub fn spread(duration: Duration, percent: f64, random: u64) -> Duration {
    // 53 bits are what a double holds exactly.
    let fraction = (random >> 11) as f64 / (1_u64 << 53) as f64;
    duration.mul_f64(1.0 + percent / 100.0 * fraction)
}

/// Exponential back-off with full jitter before the N-th further attempt: less than `base` doubled N - 1 times, and
/// than `max`.
pub fn back_off(base: Duration, max: Duration, attempt: u32, random: u64) -> Duration {
    let doubled = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
    let ceiling = u64::try_from(base.saturating_mul(doubled).min(max).as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(random % ceiling.max(1))
}

#[cfg(test)]
mod tests {
    use super::{back_off, spread};
    use std::time::Duration;

    #[test]
    fn back_off_doubles_up_to_its_maximum() {
        let (base, max) = (Duration::from_millis(100), Duration::from_millis(350));
        for (attempt, ceiling) in [(1, 100), (2, 200), (3, 350), (40, 350)] {
            for random in [0, ceiling - 1, ceiling, 12_345] {
                let expected = Duration::from_millis(random % ceiling);
                assert_eq!(back_off(base, max, attempt, random), expected, "{attempt} {random}");
            }
        }
        assert_eq!(back_off(Duration::ZERO, Duration::ZERO, 1, 7), Duration::ZERO);
    }

    #[test]
    fn between_the_duration_and_its_percentage() {
        let second = Duration::from_secs(1);
        assert_eq!(spread(second, 0.0, u64::MAX), second);
        assert_eq!(spread(second, 50.0, 0), second);
        assert_eq!(spread(second, 50.0, 1 << 63), Duration::from_millis(1250));
        let most = spread(second, 50.0, u64::MAX);
        assert!(Duration::from_millis(1499) < most && most <= Duration::from_millis(1500));
    }
}
