//! Reads rule programs (`layout::rule`).

use super::rule_bytes;
use crate::layout::rule;
use crate::table::string;

/// One operation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Required,
    Skip,
    IgnoreEmpty,
    NumConst(u64),
    NumIn(List),
    NumNotIn(List),
    NumRange { flags: u8, low: u64, high: u64 },
    DurationConst(Span),
    DurationIn(List),
    DurationNotIn(List),
    DurationRange { flags: u8, low: Span, high: Span },
    StrConst(&'static str),
    StrChars { low: u64, high: u64 },
    StrBytes { low: u64, high: u64 },
    StrPattern { index: u32, text: &'static str, quoted: &'static str },
    StrPrefix(&'static str),
    StrSuffix(&'static str),
    StrContains(&'static str),
    StrNotContains(&'static str),
    StrIn(List),
    StrNotIn(List),
    StrForm(u8),
    EnumDefined,
    ItemsCount { low: u64, high: u64 },
    ItemsUnique,
    Items(u32),
    PairsCount { low: u64, high: u64 },
    MapKeys(u32),
    MapValues(u32),
    AnyIn(List),
    AnyNotIn(List),
}

/// Seconds and nanoseconds.
pub(super) type Span = (i64, i32);

/// A list of operands in the program.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    bytes: &'static [u8],
    width: usize,
}

impl List {
    pub(super) fn numbers(self) -> impl Iterator<Item = u64> {
        self.bytes.chunks_exact(self.width).map(|bytes| Cursor(bytes).u64())
    }

    pub(super) fn spans(self) -> impl Iterator<Item = Span> {
        self.bytes.chunks_exact(self.width).map(|bytes| Cursor(bytes).span())
    }

    pub(super) fn texts(self) -> impl Iterator<Item = &'static str> {
        self.bytes.chunks_exact(self.width).map(|bytes| string(Cursor(bytes).u32()))
    }
}

/// The operations of the program at `offset`.
pub(super) fn ops(offset: u32) -> Ops {
    Ops(Cursor(rule_bytes(offset)))
}

/// The program for the items of a list, 0 for none.
pub(super) fn items(offset: u32) -> u32 {
    ops(offset).find_map(|op| if let Op::Items(program) = op { Some(program) } else { None }).unwrap_or(0)
}

/// The programs for the keys and the values of a map, 0 for none.
pub(super) fn map_sides(offset: u32) -> (u32, u32) {
    let (mut keys, mut values) = (0, 0);
    for op in ops(offset) {
        match op {
            Op::MapKeys(program) => keys = program,
            Op::MapValues(program) => values = program,
            _ => {}
        }
    }
    (keys, values)
}

pub(super) struct Ops(Cursor);

impl Iterator for Ops {
    type Item = Op;

    fn next(&mut self) -> Option<Op> {
        let at = &mut self.0;
        Some(match at.u8() {
            rule::END => return None,
            rule::REQUIRED => Op::Required,
            rule::SKIP => Op::Skip,
            rule::IGNORE_EMPTY => Op::IgnoreEmpty,
            rule::NUM_CONST => Op::NumConst(at.u64()),
            rule::NUM_IN => Op::NumIn(at.list(8)),
            rule::NUM_NOT_IN => Op::NumNotIn(at.list(8)),
            rule::NUM_RANGE => Op::NumRange { flags: at.u8(), low: at.u64(), high: at.u64() },
            rule::DURATION_CONST => Op::DurationConst(at.span()),
            rule::DURATION_IN => Op::DurationIn(at.list(12)),
            rule::DURATION_NOT_IN => Op::DurationNotIn(at.list(12)),
            rule::DURATION_RANGE => Op::DurationRange { flags: at.u8(), low: at.span(), high: at.span() },
            rule::STR_CONST => Op::StrConst(at.text()),
            rule::STR_CHARS => Op::StrChars { low: at.u64(), high: at.u64() },
            rule::STR_BYTES => Op::StrBytes { low: at.u64(), high: at.u64() },
            rule::STR_PATTERN => Op::StrPattern { index: at.u32(), text: at.text(), quoted: at.text() },
            rule::STR_PREFIX => Op::StrPrefix(at.text()),
            rule::STR_SUFFIX => Op::StrSuffix(at.text()),
            rule::STR_CONTAINS => Op::StrContains(at.text()),
            rule::STR_NOT_CONTAINS => Op::StrNotContains(at.text()),
            rule::STR_IN => Op::StrIn(at.list(4)),
            rule::STR_NOT_IN => Op::StrNotIn(at.list(4)),
            rule::STR_FORM => Op::StrForm(at.u8()),
            rule::ENUM_DEFINED => Op::EnumDefined,
            rule::ITEMS_COUNT => Op::ItemsCount { low: at.u64(), high: at.u64() },
            rule::ITEMS_UNIQUE => Op::ItemsUnique,
            rule::ITEMS => Op::Items(at.u32()),
            rule::PAIRS_COUNT => Op::PairsCount { low: at.u64(), high: at.u64() },
            rule::MAP_KEYS => Op::MapKeys(at.u32()),
            rule::MAP_VALUES => Op::MapValues(at.u32()),
            rule::ANY_IN => Op::AnyIn(at.list(4)),
            rule::ANY_NOT_IN => Op::AnyNotIn(at.list(4)),
            other => unreachable!("the build script writes no operation {other}"),
        })
    }
}

struct Cursor(&'static [u8]);

impl Cursor {
    fn take(&mut self, len: usize) -> &'static [u8] {
        let (head, rest) = self.0.split_at(len);
        self.0 = rest;
        head
    }

    fn u8(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("take returns four bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("take returns eight bytes"))
    }

    fn span(&mut self) -> Span {
        (self.u64() as i64, self.u32() as i32)
    }

    fn text(&mut self) -> &'static str {
        string(self.u32())
    }

    fn list(&mut self, width: usize) -> List {
        let count = self.u32() as usize;
        List { bytes: self.take(count * width), width }
    }
}
