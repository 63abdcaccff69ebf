//! Times of day, by `strftime` patterns with Envoy's and Abseil's additions.

use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use waystation_schema::ConfigError;

/// A compiled time pattern, in UTC.
#[derive(Clone, Debug)]
pub(super) enum TimeFormat {
    /// `2016-04-15T20:17:00.310Z`
    Iso,
    Pattern(Box<[Item]>),
}

#[derive(Clone, Debug)]
pub(super) enum Item {
    Literal(Box<str>),
    /// A number of at least `width` digits, padded as C does unless told otherwise.
    Number {
        of: Number,
        width: u8,
        padding: Padding,
    },
    /// Digits of the fraction of a second, cut off, not rounded.
    Fraction(u8),
    /// The fraction without trailing zeros; a dot before it when it is there.
    ShortestFraction {
        dot: bool,
    },
    MonthName {
        full: bool,
    },
    DayName {
        full: bool,
    },
    /// AM or PM.
    Half {
        lower_case: bool,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Padding {
    Zero,
    Space,
    None,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    EpochSeconds,
    Year,
    Century,
    YearOfCentury,
    IsoYear,
    IsoYearOfCentury,
    IsoWeek,
    WeekFromSunday,
    WeekFromMonday,
    Month,
    Day,
    DayOfYear,
    Hour,
    Hour12,
    Minute,
    Second,
    /// 1 is Monday.
    DayFromMonday,
    /// 0 is Sunday.
    DayFromSunday,
}

impl TimeFormat {
    /// Compiles a pattern; the empty one is Envoy's default.
    pub(super) fn compile(pattern: &str) -> Result<Self, ConfigError> {
        if pattern.is_empty() {
            return Ok(Self::Iso);
        }
        let mut compiler = Compiler { items: Vec::new(), literal: String::new() };
        compiler.pattern(pattern)?;
        compiler.flush();
        Ok(Self::Pattern(compiler.items.into()))
    }

    /// Appends `time`.
    pub(super) fn write(&self, time: SystemTime, out: &mut Vec<u8>) {
        let (seconds, micros) = since_epoch(time);
        // Years 1 to 9999; a certificate may claim others.
        let date = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        match self {
            Self::Iso => {
                let (year, month, day) = date.to_calendar_date();
                put_number(out, i64::from(year), 4, Padding::Zero);
                for (before, number) in [
                    (b'-', u8::from(month)),
                    (b'-', day),
                    (b'T', date.hour()),
                    (b':', date.minute()),
                    (b':', date.second()),
                ] {
                    out.extend_from_slice(&[before, b'0' + number / 10, b'0' + number % 10]);
                }
                out.push(b'.');
                put_fraction(out, micros, 3);
                out.push(b'Z');
            }
            Self::Pattern(items) => {
                for item in items {
                    item.write(seconds, micros, date, out);
                }
            }
        }
    }
}

impl Item {
    fn write(&self, seconds: i64, micros: u32, date: OffsetDateTime, out: &mut Vec<u8>) {
        match self {
            Self::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Self::Number { of, width, padding } => {
                put_number(out, of.get(seconds, date), usize::from(*width), *padding);
            }
            Self::Fraction(digits) => put_fraction(out, micros, *digits),
            Self::ShortestFraction { dot } => {
                if micros == 0 {
                    if !dot {
                        out.push(b'0');
                    }
                    return;
                }
                if *dot {
                    out.push(b'.');
                }
                put_fraction(out, micros, 6);
                while out.last() == Some(&b'0') {
                    out.pop();
                }
            }
            Self::MonthName { full } => put_name(out, MONTHS[usize::from(u8::from(date.month()) - 1)], *full),
            Self::DayName { full } => {
                put_name(out, DAYS[usize::from(date.weekday().number_days_from_sunday())], *full)
            }
            Self::Half { lower_case } => out.extend_from_slice(match (date.hour() < 12, lower_case) {
                (true, true) => b"am",
                (true, false) => b"AM",
                (false, true) => b"pm",
                (false, false) => b"PM",
            }),
        }
    }
}

impl Number {
    fn get(self, seconds: i64, date: OffsetDateTime) -> i64 {
        let iso = || date.to_iso_week_date();
        match self {
            Self::EpochSeconds => seconds,
            Self::Year => date.year().into(),
            Self::Century => date.year().div_euclid(100).into(),
            Self::YearOfCentury => date.year().rem_euclid(100).into(),
            Self::IsoYear => iso().0.into(),
            Self::IsoYearOfCentury => iso().0.rem_euclid(100).into(),
            Self::IsoWeek => iso().1.into(),
            Self::WeekFromSunday => date.sunday_based_week().into(),
            Self::WeekFromMonday => date.monday_based_week().into(),
            Self::Month => u8::from(date.month()).into(),
            Self::Day => date.day().into(),
            Self::DayOfYear => date.ordinal().into(),
            Self::Hour => date.hour().into(),
            Self::Hour12 => match date.hour() % 12 {
                0 => 12,
                hour => hour.into(),
            },
            Self::Minute => date.minute().into(),
            Self::Second => date.second().into(),
            Self::DayFromMonday => date.weekday().number_from_monday().into(),
            Self::DayFromSunday => date.weekday().number_days_from_sunday().into(),
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

struct Compiler {
    items: Vec<Item>,
    literal: String,
}

impl Compiler {
    fn flush(&mut self) {
        if !self.literal.is_empty() {
            self.items.push(Item::Literal(std::mem::take(&mut self.literal).into()));
        }
    }

    fn push(&mut self, item: Item) {
        self.flush();
        self.items.push(item);
    }

    fn number(&mut self, of: Number, width: u8, padding: Padding) {
        self.push(Item::Number { of, width, padding });
    }

    fn pattern(&mut self, mut rest: &str) -> Result<(), ConfigError> {
        while let Some(percent) = rest.find('%') {
            self.literal.push_str(&rest[..percent]);
            rest = &rest[percent..];
            let len = self.conversion(&rest[1..])?;
            match len {
                Some(len) => rest = &rest[1 + len..],
                // What C's strftime does not know, it copies.
                None => {
                    self.literal.push('%');
                    rest = &rest[1..];
                }
            }
        }
        self.literal.push_str(rest);
        Ok(())
    }

    /// Compiles the conversion at the start of `text`, after its percent sign, and returns how long it is.
    fn conversion(&mut self, text: &str) -> Result<Option<usize>, ConfigError> {
        let bytes = text.as_bytes();
        let digit = |byte: u8| byte.wrapping_sub(b'0');
        let len = match bytes {
            [n @ b'1'..=b'9', b'f', ..] => {
                self.push(Item::Fraction(digit(*n)));
                2
            }
            [b'E', n @ b'0'..=b'9', b'S', ..] => {
                self.number(Number::Second, 2, Padding::Zero);
                if *n > b'0' {
                    self.literal.push('.');
                    self.push(Item::Fraction(digit(*n)));
                }
                3
            }
            [b'E', n @ b'1'..=b'9', b'f', ..] => {
                self.push(Item::Fraction(digit(*n)));
                3
            }
            [b'E', b'*', b'S', ..] => {
                self.number(Number::Second, 2, Padding::Zero);
                self.push(Item::ShortestFraction { dot: true });
                3
            }
            [b'E', b'*', b'f', ..] => {
                self.push(Item::ShortestFraction { dot: false });
                3
            }
            [b'E', b'4', b'Y', ..] => {
                self.number(Number::Year, 4, Padding::Zero);
                3
            }
            [b'E', b'*', b'z', ..] | [b':', b':', b'z', ..] => {
                self.literal.push_str("+00:00:00");
                3
            }
            [b'E', b'z', ..] | [b':', b'z', ..] => {
                self.literal.push_str("+00:00");
                2
            }
            [b'E', b'T', ..] => {
                self.literal.push('T');
                2
            }
            [b'E', conversion @ (b'c' | b'C' | b'x' | b'X' | b'y' | b'Y'), ..]
            | [
                b'O',
                conversion @ (b'd' | b'e' | b'H' | b'I' | b'm' | b'M' | b'S' | b'u' | b'U' | b'V' | b'w'
                | b'W' | b'y'),
                ..,
            ] => {
                self.plain(*conversion, None)?;
                2
            }
            [flag @ (b'-' | b'_' | b'0'), conversion, ..] => {
                let padding = match flag {
                    b'-' => Padding::None,
                    b'_' => Padding::Space,
                    _ => Padding::Zero,
                };
                return Ok(self.plain(*conversion, Some(padding))?.then_some(2));
            }
            [conversion, ..] => return Ok(self.plain(*conversion, None)?.then_some(1)),
            [] => return Ok(None),
        };
        Ok(Some(len))
    }

    /// Compiles a conversion of one letter; tells whether there is such a one.
    fn plain(&mut self, conversion: u8, padding: Option<Padding>) -> Result<bool, ConfigError> {
        let zero = padding.unwrap_or(Padding::Zero);
        let space = padding.unwrap_or(Padding::Space);
        match conversion {
            b'%' => self.literal.push('%'),
            b't' => self.literal.push('\t'),
            // The text may end up in a header.
            b'n' => {
                return Err(ConfigError::new(
                    "Invalid header configuration. Format string contains newline.",
                ));
            }
            b's' => self.number(Number::EpochSeconds, 1, zero),
            b'f' if padding.is_none() => self.push(Item::Fraction(9)),
            b'Y' => self.number(Number::Year, 1, zero),
            b'C' => self.number(Number::Century, 2, zero),
            b'y' => self.number(Number::YearOfCentury, 2, zero),
            b'G' => self.number(Number::IsoYear, 1, zero),
            b'g' => self.number(Number::IsoYearOfCentury, 2, zero),
            b'V' => self.number(Number::IsoWeek, 2, zero),
            b'U' => self.number(Number::WeekFromSunday, 2, zero),
            b'W' => self.number(Number::WeekFromMonday, 2, zero),
            b'm' => self.number(Number::Month, 2, zero),
            b'd' => self.number(Number::Day, 2, zero),
            b'e' => self.number(Number::Day, 2, space),
            b'j' => self.number(Number::DayOfYear, 3, zero),
            b'H' => self.number(Number::Hour, 2, zero),
            b'k' => self.number(Number::Hour, 2, space),
            b'I' => self.number(Number::Hour12, 2, zero),
            b'l' => self.number(Number::Hour12, 2, space),
            b'M' => self.number(Number::Minute, 2, zero),
            b'S' => self.number(Number::Second, 2, zero),
            b'u' => self.number(Number::DayFromMonday, 1, zero),
            b'w' => self.number(Number::DayFromSunday, 1, zero),
            b'B' => self.push(Item::MonthName { full: true }),
            b'b' | b'h' => self.push(Item::MonthName { full: false }),
            b'A' => self.push(Item::DayName { full: true }),
            b'a' => self.push(Item::DayName { full: false }),
            b'p' => self.push(Item::Half { lower_case: false }),
            b'P' => self.push(Item::Half { lower_case: true }),
            b'z' => self.literal.push_str("+0000"),
            b'Z' => self.literal.push_str("UTC"),
            b'D' | b'x' => self.pattern("%m/%d/%y")?,
            b'F' => self.pattern("%Y-%m-%d")?,
            b'R' => self.pattern("%H:%M")?,
            b'T' | b'X' => self.pattern("%H:%M:%S")?,
            b'r' => self.pattern("%I:%M:%S %p")?,
            b'c' => self.pattern("%a %b %e %H:%M:%S %Y")?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Whole seconds, rounded down, and microseconds: Envoy's system clock knows nothing finer.
fn since_epoch(time: SystemTime) -> (i64, u32) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_micros()),
        Err(error) => {
            let before = error.duration();
            let seconds = -i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            match before.subsec_micros() {
                0 => (seconds, 0),
                micros => (seconds - 1, 1_000_000 - micros),
            }
        }
    }
}

fn put_fraction(out: &mut Vec<u8>, micros: u32, digits: u8) {
    let mut divisor = 100_000;
    for _ in 0..digits {
        // The division keeps it one digit; past the sixth, the divisor is 0.
        out.push(b'0' + micros.checked_div(divisor).map_or(0, |quotient| quotient % 10) as u8);
        divisor /= 10;
    }
}

fn put_number(out: &mut Vec<u8>, number: i64, width: usize, padding: Padding) {
    let mut buffer = itoa::Buffer::new();
    let digits = buffer.format(number);
    if let Some(fill) = match padding {
        Padding::Zero => Some(b'0'),
        Padding::Space => Some(b' '),
        Padding::None => None,
    } {
        out.extend(std::iter::repeat_n(fill, width.saturating_sub(digits.len())));
    }
    out.extend_from_slice(digits.as_bytes());
}

fn put_name(out: &mut Vec<u8>, name: &str, full: bool) {
    out.extend_from_slice(if full { name.as_bytes() } else { &name.as_bytes()[..3] });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn format(pattern: &str, time: SystemTime) -> String {
        let mut out = Vec::new();
        TimeFormat::compile(pattern).unwrap().write(time, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn patterns_as_envoy_writes_them() {
        // Saturday, 2026-11-21T08:57:31.613082Z
        let time = UNIX_EPOCH + Duration::new(1_795_251_451, 613_082_999);
        for (pattern, expected) in [
            ("", "2026-11-21T08:57:31.613Z"),
            ("%s.%3f", "1795251451.613"),
            ("%f %6f %9f", "613082000 613082 613082000"),
            ("%1f %2f %4f %5f %7f %8f", "6 61 6130 61308 6130820 61308200"),
            ("%Y/%m/%dT%H:%M:%S%z %Z", "2026/11/21T08:57:31+0000 UTC"),
            ("%E4S %a %b %e %j %p %I", "31.6130 Sat Nov 21 325 AM 08"),
            (
                "%D %T %F %c %x %y %U %u",
                "11/21/26 08:57:31 2026-11-21 Sat Nov 21 08:57:31 2026 11/21/26 26 46 6",
            ),
            ("%-d %_d %e %k %l %G %V %g %C %h", "21 21 21  8  8 2026 47 26 20 Nov"),
            ("%R %r %Ey %Od %E*S %E3f %E*f", "08:57 08:57:31 AM 26 21 31.613082 613 613082"),
            ("%E#S %Ez %E*z %E4Y %ET %t|", "%E#S +00:00 +00:00:00 2026 T \t|"),
            ("%Q %i %L %N %P %v %+ %W %w", "%Q %i %L %N am %v %+ 46 6"),
            (
                "%m %M %B %A %b %X %::z %E0S %E1f %0f",
                "11 57 November Saturday Nov 08:57:31 +00:00:00 31 6 %0f",
            ),
            ("100%% %", "100% %"),
        ] {
            assert_eq!(format(pattern, time), expected, "{pattern}");
        }
        assert!(TimeFormat::compile("a%n").is_err() && TimeFormat::compile("%-n").is_err());
    }

    #[test]
    fn before_the_epoch_and_beyond_the_calendar() {
        assert_eq!(format("", UNIX_EPOCH - Duration::from_millis(1)), "1969-12-31T23:59:59.999Z");
        assert_eq!(format("%s", UNIX_EPOCH - Duration::from_millis(1500)), "-2");
        let far = UNIX_EPOCH + Duration::from_secs(1 << 60);
        assert_eq!(format("%s", far), (1_i64 << 60).to_string());
        assert_eq!(format("%Y", far), "1970");
    }
}
