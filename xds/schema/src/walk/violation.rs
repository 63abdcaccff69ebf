//! What a broken rule reads like: the words of `protoc-gen-validate` for C++, as Envoy prints them.

use std::fmt;

use super::program::{List, Span};
use crate::layout::{form, rule};
use crate::message::{Field, Message, Type};

/// A broken rule. [`fmt::Display`] writes
/// `Proto constraint validation failed (ClusterValidationError.ConnectTimeout: value must be greater than 0s)`.
#[derive(Clone, Debug)]
pub struct Violation {
    message: Message,
    subject: Subject,
    fault: Fault,
}

#[derive(Clone, Debug)]
enum Subject {
    Field { field: Field, subscript: Option<String> },
    Oneof(usize),
}

/// What is wrong with a value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    Required,
    BoolConst(bool),
    NumConst(Number),
    NumRange { flags: u8, low: Number, high: Number },
    NumIn { list: List, field: Field, not: bool },
    DurationConst(Span),
    DurationRange { flags: u8, low: Span, high: Span },
    DurationIn { list: List, not: bool },
    StrConst(&'static str),
    Length { low: u64, high: u64, unit: &'static str },
    Pattern(&'static str),
    Prefix(&'static str),
    Suffix(&'static str),
    Contains(&'static str),
    NotContains(&'static str),
    StrIn { list: List, not: bool },
    Form(u8),
    EnumDefined,
    Count { low: u64, high: u64, unit: &'static str },
    Unique,
}

/// A number of the field's type.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(super) enum Number {
    Signed(i64),
    Unsigned(u64),
    Float(f64),
}

impl Number {
    /// An operand of a rule for a field of this type.
    pub(super) fn operand(ty: Type, bits: u64) -> Self {
        match ty {
            Type::Double | Type::Float => Self::Float(f64::from_bits(bits)),
            Type::Uint32 | Type::Uint64 | Type::Fixed32 | Type::Fixed64 | Type::Bool => Self::Unsigned(bits),
            _ => Self::Signed(bits as i64),
        }
    }
}

impl Violation {
    pub(super) fn field(message: Message, field: Field, subscript: Option<String>, fault: Fault) -> Self {
        Self { message, subject: Subject::Field { field, subscript }, fault }
    }

    pub(super) fn oneof(message: Message, oneof: usize) -> Self {
        Self { message, subject: Subject::Oneof(oneof), fault: Fault::Required }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proto constraint validation failed (")?;
        match &self.subject {
            Subject::Oneof(oneof) => {
                write!(f, "field: \"{}\", reason: is required)", self.message.oneof_name(*oneof))
            }
            Subject::Field { field, subscript } => {
                let name = self.message.name();
                let class = name.rfind('.').map_or(name, |dot| &name[dot + 1..]);
                write!(f, "{class}ValidationError.")?;
                write_pascal(field.name(), f)?;
                if let Some(subscript) = subscript {
                    write!(f, "[{subscript}]")?;
                }
                write!(f, ": {})", self.fault)
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Required => f.write_str("value is required"),
            Self::BoolConst(value) => write!(f, "value must equal {value}"),
            Self::NumConst(value) => write!(f, "value must equal {value}"),
            Self::NumRange { flags, low, high } => {
                let reversed = low.partial_cmp(&high).is_some_and(std::cmp::Ordering::is_gt);
                write_range(f, flags, &low, &high, reversed)
            }
            Self::NumIn { list, field, not } => match field.enumeration() {
                Some(item) => {
                    let name = |bits| item.value(bits as i32).map_or("?", |value| value.name());
                    write_list(f, not, list.numbers().map(name))
                }
                None => write_list(f, not, list.numbers().map(|bits| Number::operand(field.ty(), bits))),
            },
            Self::DurationConst(value) => write!(f, "value must equal {}", GoDuration(value)),
            Self::DurationRange { flags, low, high } => {
                write_range(f, flags, &GoDuration(low), &GoDuration(high), low > high)
            }
            Self::DurationIn { list, not } => write_list(f, not, list.spans().map(GoDuration)),
            Self::StrConst(text) => write!(f, "value must equal {text}"),
            Self::Length { low, high, unit } if low == high => {
                write!(f, "value length must be {low} {unit}")
            }
            Self::Length { low, high: u64::MAX, unit } => {
                write!(f, "value length must be at least {low} {unit}")
            }
            Self::Length { low: 0, high, unit } => write!(f, "value length must be at most {high} {unit}"),
            Self::Length { low, high, unit: "characters" } => {
                write!(f, "value must have between {low} and {high} characters inclusive")
            }
            Self::Length { low, high, unit } => {
                write!(f, "value length must be between {low} and {high} {unit}, inclusive")
            }
            Self::Pattern(quoted) => write!(f, "value does not match regex pattern {quoted}"),
            Self::Prefix(text) => write!(f, "value does not have prefix \"{text}\""),
            Self::Suffix(text) => write!(f, "value does not have suffix \"{text}\""),
            Self::Contains(text) => write!(f, "value does not contain substring \"{text}\""),
            Self::NotContains(text) => write!(f, "value contains substring \"{text}\""),
            Self::StrIn { list, not } => write_list(f, not, list.texts()),
            Self::Form(kind) => f.write_str(match kind {
                form::EMAIL => "value must be a valid email address",
                form::HOSTNAME => "value must be a valid hostname",
                form::IP => "value must be a valid IP address",
                form::IPV4 => "value must be a valid IPv4 address",
                form::IPV6 => "value must be a valid IPv6 address",
                form::URI => "value must be a valid URI",
                form::URI_REF => "value must be a valid URI reference",
                form::ADDRESS => "value must be a valid hostname, or ip address",
                form::UUID => "value must be a valid UUID",
                form::HEADER_NAME => "value does not match regex pattern \"^:?[0-9a-zA-Z!#$%&'*+-.^_|~`]+$\"",
                form::HEADER_VALUE => "value does not match regex pattern \"^[^\\x00-\\b\\n-\\x1f\\x7f]*$\"",
                _ => "value does not match regex pattern \"^[^\\x00\\n\\r]*$\"",
            }),
            Self::EnumDefined => f.write_str("value must be one of the defined enum values"),
            Self::Count { low, high, unit } if low == high => {
                write!(f, "value must contain exactly {low} {unit}")
            }
            Self::Count { low, high: u64::MAX, unit } => {
                write!(f, "value must contain at least {low} {unit}")
            }
            Self::Count { low: 0, high, unit } => write!(f, "value must contain no more than {high} {unit}"),
            Self::Count { low, high, unit } => {
                let plural = unit.replace("(s)", "s");
                write!(f, "value must contain between {low} and {high} {plural}, inclusive")
            }
            Self::Unique => f.write_str("repeated value must contain unique items"),
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signed(value) => value.fmt(f),
            Self::Unsigned(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
        }
    }
}

fn write_range(
    f: &mut fmt::Formatter<'_>,
    flags: u8,
    low: &dyn fmt::Display,
    high: &dyn fmt::Display,
    reversed: bool,
) -> fmt::Result {
    let lower = flags & rule::LOWER != 0;
    let upper = flags & rule::UPPER != 0;
    let lower_inclusive = flags & rule::LOWER_INCLUSIVE != 0;
    let upper_inclusive = flags & rule::UPPER_INCLUSIVE != 0;
    match (lower, upper) {
        (true, true) if reversed => {
            let open = if upper_inclusive { '(' } else { '[' };
            let close = if lower_inclusive { ')' } else { ']' };
            write!(f, "value must be outside range {open}{high}, {low}{close}")
        }
        (true, true) => {
            let open = if lower_inclusive { '[' } else { '(' };
            let close = if upper_inclusive { ']' } else { ')' };
            write!(f, "value must be inside range {open}{low}, {high}{close}")
        }
        (true, false) if lower_inclusive => write!(f, "value must be greater than or equal to {low}"),
        (true, false) => write!(f, "value must be greater than {low}"),
        (false, _) if upper_inclusive => write!(f, "value must be less than or equal to {high}"),
        (false, _) => write!(f, "value must be less than {high}"),
    }
}

fn write_list<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    not: bool,
    items: impl Iterator<Item = T>,
) -> fmt::Result {
    f.write_str(if not { "value must not be in list [" } else { "value must be in list [" })?;
    for (index, item) in items.enumerate() {
        if index > 0 {
            f.write_str(" ")?;
        }
        item.fmt(f)?;
    }
    f.write_str("]")
}

/// `connect_timeout` as `ConnectTimeout`, as `protoc-gen-go` does it: an underscore before a digit stays, and a
/// digit begins a word, so that `consecutive_5xx` becomes `Consecutive_5Xx`.
fn write_pascal(name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    use fmt::Write as _;
    let mut begins = true;
    let mut characters = name.chars().peekable();
    while let Some(character) = characters.next() {
        if character == '_' && characters.peek().is_some_and(char::is_ascii_lowercase) {
            begins = true;
        } else if begins || !character.is_ascii_lowercase() {
            f.write_char(character.to_ascii_uppercase())?;
            begins = !character.is_ascii_alphabetic();
        } else {
            f.write_char(character)?;
        }
    }
    Ok(())
}

/// A duration as Go prints it: `5m0s`, `1.5s`, `25ms`.
struct GoDuration(Span);

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.0.0.unsigned_abs(), u64::from(self.0.1.unsigned_abs()));
        if self.0.0 < 0 || self.0.1 < 0 {
            f.write_str("-")?;
        }
        if seconds == 0 {
            return match nanos {
                0 => f.write_str("0s"),
                1..1000 => write!(f, "{nanos}ns"),
                1000..1_000_000 => write!(f, "{}\u{b5}s", nanos as f64 / 1e3),
                _ => write!(f, "{}ms", nanos as f64 / 1e6),
            };
        }
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        write!(f, "{}", seconds % 60)?;
        if nanos > 0 {
            let fraction = format!("{nanos:09}");
            write!(f, ".{}", fraction.trim_end_matches('0'))?;
        }
        f.write_str("s")
    }
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::{GoDuration, write_pascal};

    struct Pascal(&'static str);

    impl fmt::Display for Pascal {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_pascal(self.0, f)
        }
    }

    #[test]
    fn names_and_durations_read_as_in_go() {
        for (name, expected) in [
            ("connect_timeout", "ConnectTimeout"),
            ("consecutive_5xx", "Consecutive_5Xx"),
            ("http2_protocol_options", "Http2ProtocolOptions"),
            ("default_host_for_http_10", "DefaultHostForHttp_10"),
            ("v4_prefix_mask_len", "V4PrefixMaskLen"),
        ] {
            assert_eq!(Pascal(name).to_string(), expected);
        }
        for (span, expected) in [
            ((0, 0), "0s"),
            ((0, 1_500_000), "1.5ms"),
            ((301, 0), "5m1s"),
            ((-1, -500_000_000), "-1.5s"),
            ((4_294_967_296, 0), "1193046h28m16s"),
        ] {
            assert_eq!(GoDuration(span).to_string(), expected);
        }
    }
}
