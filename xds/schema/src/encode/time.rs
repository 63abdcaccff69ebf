//! Durations and timestamps in their JSON form, both ways.

use std::fmt::{self, Write};

/// The bounds of `google.protobuf.Duration`.
const MAX_SECONDS: i64 = 315_576_000_000;
/// 0001-01-01T00:00:00Z.
const MIN_TIMESTAMP: i64 = -62_135_596_800;
/// 9999-12-31T23:59:59Z.
const MAX_TIMESTAMP: i64 = 253_402_300_799;

/// `1.5s` as seconds and nanoseconds, both with the sign.
pub(super) fn parse_duration(text: &str) -> Result<(i64, i32), &'static str> {
    let number = text.strip_suffix('s').ok_or("a duration must end with `s`, as in 1.5s")?;
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number),
    };
    let (seconds, nanos) = match number.split_once('.') {
        Some((seconds, fraction)) => (seconds, parse_fraction(fraction)?),
        None => (number, 0),
    };
    if seconds.is_empty() || !seconds.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("a duration must be a number of seconds, as in 1.5s");
    }
    let seconds: i64 = seconds.parse().map_err(|_| "the duration is out of range")?;
    if seconds > MAX_SECONDS {
        return Err("the duration is out of range");
    }
    Ok(if negative { (-seconds, -nanos) } else { (seconds, nanos) })
}

/// RFC 3339 as seconds since 1970 and nanoseconds.
pub(super) fn parse_timestamp(text: &str) -> Result<(i64, i32), &'static str> {
    const SHAPE: &str = "expected a time as in 2024-01-31T12:00:00.5Z";
    let bytes = text.as_bytes();
    let separators = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if bytes.len() < 20 || separators.iter().any(|&(at, byte)| bytes[at] != byte) || !text.is_ascii() {
        return Err(SHAPE);
    }
    let number = |from: usize, to: usize| -> Result<i64, &'static str> {
        bytes[from..to].iter().try_fold(0, |value, byte| {
            if byte.is_ascii_digit() { Ok(value * 10 + i64::from(byte - b'0')) } else { Err(SHAPE) }
        })
    };
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let mut rest = &text[19..];
    let mut nanos = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let end = fraction.find(|digit: char| !digit.is_ascii_digit()).unwrap_or(fraction.len());
        nanos = parse_fraction(&fraction[..end])?;
        rest = &fraction[end..];
    }
    let offset = match rest.as_bytes() {
        [b'Z'] => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let at = text.len() - 5;
            let (hours, minutes) = (number(at, at + 2)?, number(at + 3, at + 5)?);
            if hours > 23 || minutes > 59 {
                return Err(SHAPE);
            }
            let seconds = hours * 3600 + minutes * 60;
            if *sign == b'-' { -seconds } else { seconds }
        }
        _ => return Err(SHAPE),
    };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days_of_month = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return Err("the time does not exist"),
    };
    if year == 0 || day == 0 || day > days_of_month || hour > 23 || minute > 59 || second > 59 {
        return Err("the time does not exist");
    }
    let seconds = days_from_civil(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset;
    if (MIN_TIMESTAMP..=MAX_TIMESTAMP).contains(&seconds) {
        Ok((seconds, nanos))
    } else {
        Err("the time is out of range")
    }
}

/// Writes `1.500s`; false when the value is out of range.
pub(crate) fn format_duration(seconds: i64, nanos: i32, out: &mut dyn Write) -> Result<bool, fmt::Error> {
    let mixed = (seconds > 0 && nanos < 0) || (seconds < 0 && nanos > 0);
    if seconds.unsigned_abs() > MAX_SECONDS as u64 || nanos.unsigned_abs() > 999_999_999 || mixed {
        return Ok(false);
    }
    if seconds < 0 || nanos < 0 {
        out.write_char('-')?;
    }
    write!(out, "{}", seconds.unsigned_abs())?;
    format_fraction(nanos.unsigned_abs(), out)?;
    out.write_char('s')?;
    Ok(true)
}

/// Writes RFC 3339; false when the value is out of range.
pub(crate) fn format_timestamp(seconds: i64, nanos: i32, out: &mut dyn Write) -> Result<bool, fmt::Error> {
    if !(MIN_TIMESTAMP..=MAX_TIMESTAMP).contains(&seconds) || !(0..1_000_000_000).contains(&nanos) {
        return Ok(false);
    }
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    write!(out, "{year:04}-{month:02}-{day:02}T")?;
    write!(out, "{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)?;
    format_fraction(nanos.unsigned_abs(), out)?;
    out.write_char('Z')?;
    Ok(true)
}

/// Up to nine digits behind the point, as nanoseconds.
fn parse_fraction(digits: &str) -> Result<i32, &'static str> {
    if digits.is_empty() || digits.len() > 9 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("a fraction has one to nine digits");
    }
    let value: i32 = digits.parse().map_err(|_| "a fraction has one to nine digits")?;
    Ok(value * 10i32.pow(9 - digits.len() as u32))
}

/// Nothing, three, six or nine digits, as the JSON mapping wants.
fn format_fraction(nanos: u32, out: &mut dyn Write) -> fmt::Result {
    if nanos == 0 {
        Ok(())
    } else if nanos.is_multiple_of(1_000_000) {
        write!(out, ".{:03}", nanos / 1_000_000)
    } else if nanos.is_multiple_of(1000) {
        write!(out, ".{:06}", nanos / 1000)
    } else {
        write!(out, ".{nanos:09}")
    }
}

/// Days since 1970-01-01 of a date in the Gregorian calendar (Howard Hinnant's algorithm).
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year - era * 400;
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days - era * 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::{format_duration, format_timestamp, parse_duration, parse_timestamp};

    #[test]
    fn durations() {
        let good = [
            ("1.5s", (1, 500_000_000), "1.500s"),
            ("0s", (0, 0), "0s"),
            ("-0.000000001s", (0, -1), "-0.000000001s"),
            ("-3s", (-3, 0), "-3s"),
            ("315576000000s", (315_576_000_000, 0), "315576000000s"),
        ];
        for (text, value, canonical) in good {
            assert_eq!(parse_duration(text), Ok(value), "{text}");
            let mut out = String::new();
            assert_eq!(format_duration(value.0, value.1, &mut out), Ok(true));
            assert_eq!(out, canonical);
        }
        for text in [
            "1",
            "1.5",
            "s",
            ".5s",
            "1.s",
            "1e3s",
            "+1s",
            "1.0000000001s",
            "315576000001s",
            "1ms",
            " 1s",
            "--1s",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!(format_duration(1, -1, &mut String::new()), Ok(false));
    }

    #[test]
    fn timestamps() {
        let good = [
            ("1970-01-01T00:00:00Z", (0, 0), "1970-01-01T00:00:00Z"),
            ("2024-02-29T12:34:56.789Z", (1_709_210_096, 789_000_000), "2024-02-29T12:34:56.789Z"),
            ("2024-02-29T12:34:56+01:30", (1_709_204_696, 0), "2024-02-29T11:04:56Z"),
            ("0001-01-01T00:00:00Z", (-62_135_596_800, 0), "0001-01-01T00:00:00Z"),
            (
                "9999-12-31T23:59:59.999999999Z",
                (253_402_300_799, 999_999_999),
                "9999-12-31T23:59:59.999999999Z",
            ),
        ];
        for (text, value, canonical) in good {
            assert_eq!(parse_timestamp(text), Ok(value), "{text}");
            let mut out = String::new();
            assert_eq!(format_timestamp(value.0, value.1, &mut out), Ok(true));
            assert_eq!(out, canonical);
        }
        let bad = [
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-01-01 00:00:00Z",
            "2024-01-01T00:00:00",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:00.Z",
            "0000-01-01T00:00:00Z",
            "2024-01-01T00:00:00+1:00",
            "0001-01-01T00:00:00+00:01",
            "2024-01-\u{e9}1T00:00:00Z",
        ];
        for text in bad {
            assert!(parse_timestamp(text).is_err(), "{text}");
        }
    }
}
