//! Evaluates rule programs.

use std::collections::HashSet;
use std::sync::OnceLock;

use regex::bytes::{Regex, RegexBuilder};

use super::forms;
use super::program::{Op, Span, ops};
use super::violation::{Fault, Number};
use crate::layout::rule;
use crate::message::{Field, Kind, Message, Type};
use crate::render::{any_parts, time_parts};
use crate::table::section::PATTERN_COUNT;
use crate::wire::{Raw, Reader, unzigzag};

/// The patterns of all rules, each compiled when it is first needed.
static PATTERNS: [OnceLock<Regex>; PATTERN_COUNT] = [const { OnceLock::new() }; PATTERN_COUNT];

/// Up to this length a list is compared pairwise, which needs no memory.
const PAIRWISE_LIMIT: usize = 32;

/// What the rules say of a message.
pub(super) struct Verdict {
    pub(super) fault: Option<Fault>,
    /// Do not look into it.
    pub(super) skip: bool,
}

/// Checks a message that is set: a duration, a wrapper, an `Any`, or one of ours.
pub(super) fn check_message(program: u32, message: Message, bytes: &[u8]) -> Verdict {
    let mut verdict = Verdict { fault: None, skip: false };
    match message.kind() {
        Kind::Wrapper => {
            let field = message.field_at(0);
            let raw = super::last_value(bytes, 1).ok().flatten();
            verdict.fault = check_scalar(program, field, raw.unwrap_or_else(|| default_raw(field.ty())));
        }
        Kind::Duration | Kind::Timestamp => {
            // Bytes that do not read are found by the walk itself.
            if let Ok(span) = time_parts(bytes) {
                verdict.fault = ops(program).find_map(|op| duration_fault(op, span));
            }
        }
        Kind::Any => {
            if let Ok((url, _)) = any_parts(bytes) {
                verdict.fault = ops(program).find_map(|op| match op {
                    Op::AnyIn(list) if !list.texts().any(|item| item == url) => {
                        Some(Fault::StrIn { list, not: false })
                    }
                    Op::AnyNotIn(list) if list.texts().any(|item| item == url) => {
                        Some(Fault::StrIn { list, not: true })
                    }
                    _ => None,
                });
            }
        }
        _ => verdict.skip = ops(program).any(|op| matches!(op, Op::Skip)),
    }
    verdict
}

/// Checks a field that is not set.
pub(super) fn check_absent(field: Field) -> Option<Fault> {
    if field.has_presence() {
        ops(field.rules()).any(|op| matches!(op, Op::Required)).then_some(Fault::Required)
    } else {
        check_scalar(field.rules(), field, default_raw(field.ty()))
    }
}

/// Checks the size of a list or map, and that its items differ.
pub(super) fn check_list(field: Field, bytes: &[u8], present: bool) -> Option<Fault> {
    let mut ignore_empty = false;
    for op in ops(field.rules()) {
        let (low, high, unit) = match op {
            Op::IgnoreEmpty => {
                ignore_empty = true;
                continue;
            }
            Op::ItemsCount { low, high } => (low, high, "item(s)"),
            Op::PairsCount { low, high } => (low, high, "pair(s)"),
            Op::ItemsUnique if present && !all_differ(field, bytes) => return Some(Fault::Unique),
            _ => continue,
        };
        if !present && ignore_empty {
            continue;
        }
        if present && low <= 1 && high == u64::MAX {
            continue;
        }
        let count = if present { count(field, bytes) } else { 0 };
        if !(low..=high).contains(&count) {
            return Some(Fault::Count { low, high, unit });
        }
    }
    None
}

/// Checks a number, boolean, enum, string or bytes.
pub(super) fn check_scalar(program: u32, field: Field, raw: Raw<'_>) -> Option<Fault> {
    if program == 0 {
        return None;
    }
    match raw {
        Raw::Bytes(bytes) => check_text(program, field.ty() == Type::String, bytes),
        raw => check_number(program, field, raw),
    }
}

/// The value of a scalar that is not set.
pub(super) fn default_raw(ty: Type) -> Raw<'static> {
    match ty {
        Type::Double | Type::Fixed64 | Type::Sfixed64 => Raw::Fixed64(0),
        Type::Float | Type::Fixed32 | Type::Sfixed32 => Raw::Fixed32(0),
        Type::String | Type::Bytes | Type::Message => Raw::Bytes(&[]),
        _ => Raw::Varint(0),
    }
}

fn check_number(program: u32, field: Field, raw: Raw<'_>) -> Option<Fault> {
    let ty = field.ty();
    let value = match (ty, raw) {
        (Type::Double, Raw::Fixed64(bits)) => Number::Float(f64::from_bits(bits)),
        (Type::Float, Raw::Fixed32(bits)) => Number::Float(f64::from(f32::from_bits(bits))),
        (Type::Int32 | Type::Enum, Raw::Varint(bits)) => Number::Signed(i64::from(bits as i32)),
        (Type::Int64, Raw::Varint(bits)) => Number::Signed(bits as i64),
        (Type::Sint32 | Type::Sint64, Raw::Varint(bits)) => Number::Signed(unzigzag(bits)),
        (Type::Uint32, Raw::Varint(bits)) => Number::Unsigned(u64::from(bits as u32)),
        (Type::Bool, Raw::Varint(bits)) => Number::Unsigned(u64::from(bits != 0)),
        (_, Raw::Varint(bits)) => Number::Unsigned(bits),
        (Type::Sfixed32, Raw::Fixed32(bits)) => Number::Signed(i64::from(bits as i32)),
        (_, Raw::Fixed32(bits)) => Number::Unsigned(u64::from(bits)),
        (Type::Sfixed64, Raw::Fixed64(bits)) => Number::Signed(bits as i64),
        (_, Raw::Fixed64(bits)) => Number::Unsigned(bits),
        (_, Raw::Bytes(_) | Raw::Group) => return None,
    };
    let is_zero = matches!(value, Number::Signed(0) | Number::Unsigned(0)) || value == Number::Float(0.0);
    for op in ops(program) {
        let fault = match op {
            Op::IgnoreEmpty if is_zero => return None,
            Op::NumConst(bits) => {
                let wanted = Number::operand(ty, bits);
                let fault = match ty {
                    Type::Bool => Fault::BoolConst(bits != 0),
                    _ => Fault::NumConst(wanted),
                };
                (value != wanted).then_some(fault)
            }
            Op::NumRange { flags, low, high } => {
                let (low, high) = (Number::operand(ty, low), Number::operand(ty, high));
                (!in_range(flags, &value, &low, &high)).then_some(Fault::NumRange { flags, low, high })
            }
            Op::NumIn(list) => (!list.numbers().any(|bits| Number::operand(ty, bits) == value))
                .then_some(Fault::NumIn { list, field, not: false }),
            Op::NumNotIn(list) => list
                .numbers()
                .any(|bits| Number::operand(ty, bits) == value)
                .then_some(Fault::NumIn { list, field, not: true }),
            Op::EnumDefined => {
                let Number::Signed(number) = value else { continue };
                let item = field.enumeration()?;
                item.value(number as i32).is_none().then_some(Fault::EnumDefined)
            }
            _ => None,
        };
        if fault.is_some() {
            return fault;
        }
    }
    None
}

fn check_text(program: u32, is_string: bool, bytes: &[u8]) -> Option<Fault> {
    for op in ops(program) {
        let (good, fault) = match op {
            Op::IgnoreEmpty if bytes.is_empty() => return None,
            Op::StrConst(text) => (bytes == text.as_bytes(), Fault::StrConst(text)),
            Op::StrChars { low, high } => {
                let fault = Fault::Length { low, high, unit: "characters" };
                (length_in(bytes, low, high), fault)
            }
            Op::StrBytes { low, high } => {
                ((low..=high).contains(&(bytes.len() as u64)), Fault::Length { low, high, unit: "bytes" })
            }
            Op::StrPattern { index, text, quoted } => {
                (pattern(index, text).is_match(bytes), Fault::Pattern(quoted))
            }
            Op::StrPrefix(text) => (bytes.starts_with(text.as_bytes()), Fault::Prefix(text)),
            Op::StrSuffix(text) => (bytes.ends_with(text.as_bytes()), Fault::Suffix(text)),
            Op::StrContains(text) => (contains(bytes, text), Fault::Contains(text)),
            Op::StrNotContains(text) => (!contains(bytes, text), Fault::NotContains(text)),
            Op::StrIn(list) => {
                (list.texts().any(|item| item.as_bytes() == bytes), Fault::StrIn { list, not: false })
            }
            Op::StrNotIn(list) => {
                (!list.texts().any(|item| item.as_bytes() == bytes), Fault::StrIn { list, not: true })
            }
            Op::StrForm(kind) => (forms::matches(kind, bytes, is_string), Fault::Form(kind)),
            _ => continue,
        };
        if !good {
            return Some(fault);
        }
    }
    None
}

fn duration_fault(op: Op, value: Span) -> Option<Fault> {
    match op {
        Op::DurationConst(wanted) => (value != wanted).then_some(Fault::DurationConst(wanted)),
        Op::DurationRange { flags, low, high } => {
            (!in_range(flags, &value, &low, &high)).then_some(Fault::DurationRange { flags, low, high })
        }
        Op::DurationIn(list) => {
            (!list.spans().any(|span| span == value)).then_some(Fault::DurationIn { list, not: false })
        }
        Op::DurationNotIn(list) => {
            list.spans().any(|span| span == value).then_some(Fault::DurationIn { list, not: true })
        }
        _ => None,
    }
}

/// A lower bound above the upper one means "outside".
fn in_range<T: PartialOrd>(flags: u8, value: &T, low: &T, high: &T) -> bool {
    let above = || if flags & rule::LOWER_INCLUSIVE != 0 { value >= low } else { value > low };
    let below = || if flags & rule::UPPER_INCLUSIVE != 0 { value <= high } else { value < high };
    match (flags & rule::LOWER != 0, flags & rule::UPPER != 0) {
        (true, true) if low > high => above() || below(),
        (true, true) => above() && below(),
        (true, false) => above(),
        _ => below(),
    }
}

/// Whether a text has between `low` and `high` characters.
fn length_in(bytes: &[u8], low: u64, high: u64) -> bool {
    let len = bytes.len() as u64;
    // A character has one to four bytes.
    if len < low || len.div_ceil(4) > high {
        return false;
    }
    if len.div_ceil(4) >= low && len <= high {
        return true;
    }
    let characters = bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count() as u64;
    (low..=high).contains(&characters)
}

fn contains(bytes: &[u8], text: &str) -> bool {
    text.is_empty() || bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

fn pattern(index: u32, text: &str) -> &'static Regex {
    PATTERNS[index as usize]
        .get_or_init(|| RegexBuilder::new(text).build().expect("a test compiles every pattern of the schema"))
}

/// The number of elements of a list.
fn count(field: Field, bytes: &[u8]) -> u64 {
    let mut count = 0;
    for_each_item(field, bytes, |_| {
        count += 1;
        true
    });
    count
}

/// Whether no two items of a list are equal.
fn all_differ(field: Field, bytes: &[u8]) -> bool {
    if count(field, bytes) as usize > PAIRWISE_LIMIT {
        let mut seen = HashSet::new();
        return for_each_item(field, bytes, |item| seen.insert(Item::of(item)));
    }
    let mut index = 0;
    for_each_item(field, bytes, |item| {
        let mut before = index;
        index += 1;
        for_each_item(field, bytes, |other| {
            if before == 0 {
                return true;
            }
            before -= 1;
            Item::of(other) != Item::of(item)
        })
    })
}

/// Calls `f` with each item until it returns false; true when it never did.
fn for_each_item<'a>(field: Field, bytes: &'a [u8], mut f: impl FnMut(Raw<'a>) -> bool) -> bool {
    let mut reader = Reader::new(bytes);
    while let Ok(Some(record)) = reader.next() {
        if record.number != field.number() {
            continue;
        }
        match record.value {
            Raw::Bytes(packed) if !matches!(field.ty(), Type::String | Type::Bytes | Type::Message) => {
                let mut reader = Reader::new(packed);
                while let Ok(Some(raw)) = super::next_packed(field.ty(), &mut reader) {
                    if !f(raw) {
                        return false;
                    }
                }
            }
            raw => {
                if !f(raw) {
                    return false;
                }
            }
        }
    }
    true
}

/// An item that can be compared.
#[derive(Eq, Hash, PartialEq)]
enum Item<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Item<'a> {
    fn of(raw: Raw<'a>) -> Self {
        match raw {
            Raw::Varint(bits) | Raw::Fixed64(bits) => Self::Number(bits),
            Raw::Fixed32(bits) => Self::Number(u64::from(bits)),
            Raw::Bytes(bytes) => Self::Bytes(bytes),
            Raw::Group => Self::Bytes(&[]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{length_in, ops, pattern};
    use crate::message::Message;
    use crate::walk::program::Op;

    #[test]
    fn every_rule_reads_and_every_pattern_compiles() {
        let mut rules = 0;
        let mut patterns = 0;
        let mut pending: Vec<u32> = Message::all()
            .flat_map(Message::fields)
            .map(|field| field.rules())
            .filter(|&rules| rules != 0)
            .collect();
        while let Some(program) = pending.pop() {
            for op in ops(program) {
                rules += 1;
                match op {
                    Op::Items(inner) | Op::MapKeys(inner) | Op::MapValues(inner) => pending.push(inner),
                    Op::StrPattern { index, text, .. } => {
                        pattern(index, text);
                        patterns += 1;
                    }
                    _ => {}
                }
            }
        }
        assert!(rules > 1000 && patterns >= 5, "{rules} rules, {patterns} patterns");
    }

    #[test]
    fn lengths_count_characters() {
        assert!(length_in("".as_bytes(), 0, 0));
        assert!(!length_in("".as_bytes(), 1, u64::MAX));
        assert!(length_in("\u{e9}\u{e9}".as_bytes(), 2, 2));
        assert!(!length_in("\u{e9}\u{e9}".as_bytes(), 3, 4));
        assert!(length_in("abc".as_bytes(), 1, u64::MAX));
        assert!(!length_in("abc".as_bytes(), 0, 2));
    }
}
