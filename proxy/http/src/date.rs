//! The `date` header.

use std::fmt;
use std::io::Write;
use std::time::{Duration, SystemTime};

/// The text of the `date` header, formatted at most once a second.
#[derive(Clone)]
pub struct DateCache {
    valid_from: SystemTime,
    text: [u8; LEN],
}

/// An IMF-fixdate such as `Sun, 06 Nov 1994 08:49:37 GMT`.
const LEN: usize = 29;

impl DateCache {
    /// The date at `now`, to be asked for as often as one likes.
    pub fn new(now: SystemTime) -> Self {
        let mut cache = Self { valid_from: SystemTime::UNIX_EPOCH, text: [b' '; LEN] };
        cache.refresh(now);
        cache
    }

    /// The value of `date` at `now`.
    #[inline]
    pub fn at(&mut self, now: SystemTime) -> &[u8] {
        let fresh = now.duration_since(self.valid_from).is_ok_and(|age| age < Duration::from_secs(1));
        if !fresh {
            self.refresh(now);
        }
        &self.text
    }

    #[cold]
    fn refresh(&mut self, now: SystemTime) {
        // The format ends with the year 9999, and `httpdate` panics beyond; no clock is right there.
        let last = Duration::from_secs(253_402_300_799);
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().min(last);
        self.valid_from = SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs());
        let mut text = &mut self.text[..];
        let written = write!(text, "{}", httpdate::HttpDate::from(self.valid_from));
        debug_assert!(written.is_ok() && text.is_empty(), "an IMF-fixdate is 29 bytes");
    }
}

impl fmt::Debug for DateCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DateCache({})", self.text.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_with_the_second() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_millis(784_111_777_500);
        let mut cache = DateCache::new(start);
        assert_eq!(cache.at(start), b"Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(cache.at(start + Duration::from_millis(499)), b"Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(cache.at(start + Duration::from_millis(500)), b"Sun, 06 Nov 1994 08:49:38 GMT");
        assert_eq!(cache.at(start), b"Sun, 06 Nov 1994 08:49:37 GMT", "the clock may be set back");
        assert_eq!(cache.at(SystemTime::UNIX_EPOCH), b"Thu, 01 Jan 1970 00:00:00 GMT");
    }
}
