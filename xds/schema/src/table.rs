//! Reads the blob: offsets in, numbers and strings out. No heap, no start-up work.

/// Offsets and counts that the build script found.
pub(crate) mod section {
    include!(concat!(env!("OUT_DIR"), "/sections.rs"));
}

/// The whole schema.
pub(crate) static BLOB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));

/// Word `word` of record `index` in the section at `base` with `width` words per record.
#[inline]
pub(crate) fn word(base: usize, width: usize, index: usize, word: usize) -> u32 {
    u32_at(base + (index * width + word) * 4)
}

/// The string at `offset` of the pool.
#[inline]
pub(crate) fn string(offset: u32) -> &'static str {
    std::str::from_utf8(string_bytes(offset)).expect("the build script wrote strings")
}

/// The bytes of the string at `offset` of the pool.
#[inline]
pub(crate) fn string_bytes(offset: u32) -> &'static [u8] {
    let at = section::STRINGS + offset as usize;
    let len = usize::from(u16::from_le_bytes([BLOB[at], BLOB[at + 1]]));
    &BLOB[at + 2..at + 2 + len]
}

/// Finds `name` among `count` pairs (string, ordinal), sorted by string, from entry `first` of the name index.
pub(crate) fn find_name(first: usize, count: usize, name: &[u8]) -> Option<usize> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        let entry = string_bytes(word(section::NAMES, 2, first + middle, 0));
        match entry.cmp(name) {
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
            std::cmp::Ordering::Equal => {
                return Some(word(section::NAMES, 2, first + middle, 1) as usize);
            }
        }
    }
    None
}

/// Finds the record called `name` among `count` records sorted by the string in their first word.
pub(crate) fn find_record(base: usize, width: usize, count: usize, name: &[u8]) -> Option<usize> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match string_bytes(word(base, width, middle, 0)).cmp(name) {
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
            std::cmp::Ordering::Equal => return Some(middle),
        }
    }
    None
}

#[inline]
pub(crate) fn u32_at(at: usize) -> u32 {
    u32::from_le_bytes(BLOB[at..at + 4].try_into().expect("the slice has four bytes"))
}
