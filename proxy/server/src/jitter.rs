//! Durations spread at random, so that what began together does not end together.

use std::time::Duration;

/// `duration`, lengthened by up to `percent` of itself.
pub(crate) fn spread(duration: Duration, percent: f64, random: u64) -> Duration {
    // 53 bits are what a double holds exactly.
    let fraction = (random >> 11) as f64 / (1_u64 << 53) as f64;
    duration.mul_f64(1.0 + percent / 100.0 * fraction)
}

#[cfg(test)]
mod tests {
    use super::spread;
    use std::time::Duration;

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
