//! The header map.

use std::borrow::Cow;
use std::fmt;

use crate::known::Known;
use crate::name::Name;

mod iter;
mod set;
mod spelling;
mod value;

pub use iter::{GetAll, Iter};
pub use set::KnownSet;
use spelling::Spelling;
pub use value::is_valid_value;
pub(crate) use value::parse_decimal;
use value::safe_value;

/// An ordered multimap of lower-case names to byte values: a request head, a response head, or trailers.
///
/// All text lives in one arena beside a list of 16-byte entries, so a map costs two allocations, and none once it has
/// been [cleared](Self::clear) and refilled: connections keep their maps from one message to the next. Pseudo-headers
/// (`:method`, `:status`, ...) are ordinary entries that stand first. A bit set of the [`Known`] names present
/// answers most look-ups of the many optional `x-envoy-*` headers without touching the entries.
///
/// Values hold no NUL, CR or LF: whoever takes them from outside checks with [`is_valid_value`] first. A name is at
/// most 65 535 bytes and a map at most 4 GiB; both codecs enforce far smaller limits, and an entry beyond them is not
/// stored.
#[derive(Clone, Default)]
pub struct Headers {
    arena: Vec<u8>,
    entries: Vec<Entry>,
    present: KnownSet,
    /// Bytes of the arena that no entry refers to any more.
    wasted: usize,
    /// Nothing unless the codec that read the message is configured to pass it on.
    spelling: Option<Box<Spelling>>,
}

#[derive(Clone, Copy)]
struct Entry {
    name_off: u32,
    value_off: u32,
    value_len: u32,
    name_len: u16,
    /// The known id, or 0: then the lower-case name is `name_len` bytes at `name_off`.
    id: u8,
    flags: u8,
}

const _: () = assert!(size_of::<Entry>() == 16, "four entries to a cache line");

/// The arena also holds the name as the peer spelled it: at `name_off` for a known name, else right after the
/// lower-case copy.
const ORIGINAL_CASE: u8 = 1;

/// Below this an arena is not worth compacting.
const MIN_WASTE: usize = 512;

impl Headers {
    /// An empty map, without allocating.
    #[inline]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty map with room for `entries` headers of together `bytes` bytes.
    pub fn with_capacity(entries: usize, bytes: usize) -> Self {
        Self { arena: Vec::with_capacity(bytes), entries: Vec::with_capacity(entries), ..Self::default() }
    }

    /// Removes all entries and keeps the memory.
    #[inline]
    pub fn clear(&mut self) {
        self.arena.clear();
        self.entries.clear();
        self.present = KnownSet::default();
        self.wasted = 0;
        self.spelling = None;
    }

    /// Gives back memory above `bytes`, so that one huge head does not stay with its connection for life.
    pub fn shrink_to(&mut self, bytes: usize) {
        self.arena.shrink_to(bytes);
        self.entries.shrink_to(bytes / 32);
    }

    /// The number of entries, pseudo-headers included.
    #[inline]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The sum of all name and value lengths: Envoy's `HeaderMap::byteSize`.
    pub fn byte_size(&self) -> usize {
        self.iter().map(|(name, value)| name.as_bytes().len() + value.len()).sum()
    }

    /// The bytes of memory held, used or not.
    pub fn capacity_bytes(&self) -> usize {
        self.arena.capacity() + self.entries.capacity() * size_of::<Entry>()
    }

    /// The first value of `name`.
    #[inline]
    pub fn get<'n>(&self, name: impl Into<Name<'n>>) -> Option<&[u8]> {
        let index = self.find(name.into(), 0)?;
        Some(self.value(&self.entries[index]))
    }

    /// The first value of `name` if it is UTF-8.
    #[inline]
    pub fn get_str<'n>(&self, name: impl Into<Name<'n>>) -> Option<&str> {
        str::from_utf8(self.get(name)?).ok()
    }

    /// All values of `name`, in order.
    #[inline]
    pub fn get_all<'a, 'n>(&'a self, name: impl Into<Name<'n>>) -> GetAll<'a, 'n> {
        GetAll { headers: self, name: name.into(), next: 0 }
    }

    /// All values of `name` joined with `,`: what Envoy's header matchers and `%REQ()%` see of a repeated header.
    pub fn get_joined<'n>(&self, name: impl Into<Name<'n>>) -> Option<Cow<'_, [u8]>> {
        let mut values = self.get_all(name);
        let first = values.next()?;
        let Some(second) = values.next() else { return Some(Cow::Borrowed(first)) };
        let mut joined = first.to_vec();
        for value in std::iter::once(second).chain(values) {
            joined.push(b',');
            joined.extend_from_slice(value);
        }
        Some(Cow::Owned(joined))
    }

    /// Whether `name` is present.
    #[inline]
    pub fn contains<'n>(&self, name: impl Into<Name<'n>>) -> bool {
        match name.into() {
            Name::Known(known) => self.present.has(known),
            name @ Name::Other(_) => self.find(name, 0).is_some(),
        }
    }

    /// Adds an entry at the end; a pseudo-header goes behind the pseudo-headers already there.
    #[inline]
    pub fn append<'n>(&mut self, name: impl Into<Name<'n>>, value: impl AsRef<[u8]>) {
        self.push(name.into(), value.as_ref());
    }

    /// Adds `value` to the first value of `name` behind `delimiter`, or as a new entry: how Envoy treats a repeated
    /// header that it has registered as inline, and its `appendCopy`.
    pub fn append_joined<'n>(&mut self, name: impl Into<Name<'n>>, delimiter: &str, value: impl AsRef<[u8]>) {
        let (name, value) = (name.into(), value.as_ref());
        let Some(index) = self.find(name, 0) else { return self.push(name, value) };
        let value = &*safe_value(name, value);
        let Entry { value_off, value_len, .. } = self.entries[index];
        if value_len == 0 {
            return self.write_value(index, value);
        }
        let (start, len) = (value_off as usize, value_len as usize);
        if !self.has_room(len + delimiter.len() + value.len()) {
            return;
        }
        // The usual case: the entry is the newest, and grows where it stands.
        if start + len == self.arena.len() {
            self.arena.extend_from_slice(delimiter.as_bytes());
            self.arena.extend_from_slice(value);
        } else {
            let new_off = self.arena.len() as u32;
            self.arena.extend_from_within(start..start + len);
            self.arena.extend_from_slice(delimiter.as_bytes());
            self.arena.extend_from_slice(value);
            self.entries[index].value_off = new_off;
            self.wasted += len;
        }
        self.entries[index].value_len = (len + delimiter.len() + value.len()) as u32;
        self.compact_if_wasteful();
    }

    /// Gives `name` the one value `value`: in place of its first entry, dropping any others, or as a new entry.
    pub fn set<'n>(&mut self, name: impl Into<Name<'n>>, value: impl AsRef<[u8]>) {
        let (name, value) = (name.into(), value.as_ref());
        let Some(index) = self.find(name, 0) else { return self.push(name, value) };
        self.write_value(index, &safe_value(name, value));
        while let Some(other) = self.find(name, index + 1) {
            self.remove_at(other);
        }
        self.compact_if_wasteful();
    }

    /// Gives `name` the decimal value `number`, as [`set`](Self::set).
    pub fn set_number<'n>(&mut self, name: impl Into<Name<'n>>, number: u64) {
        self.set(name, itoa::Buffer::new().format(number));
    }

    /// Removes all entries of `name`; tells whether there was one.
    pub fn remove<'n>(&mut self, name: impl Into<Name<'n>>) -> bool {
        let name = name.into();
        let Some(mut index) = self.find(name, 0) else { return false };
        loop {
            self.remove_at(index);
            match self.find(name, index) {
                Some(next) => index = next,
                None => break,
            }
        }
        if let Name::Known(known) = name {
            self.present.remove(known.id());
        }
        self.compact_if_wasteful();
        true
    }

    /// Whether any of `names` is present.
    #[inline]
    pub fn contains_any(&self, names: &KnownSet) -> bool {
        self.present.meets(names)
    }

    /// Removes all entries of all `names`.
    #[inline]
    pub fn remove_all(&mut self, names: &KnownSet) {
        // The usual case: none of the many optional headers is there.
        if self.contains_any(names) {
            self.retain(|name, _| !name.known().is_some_and(|known| names.has(known)));
        }
    }

    /// Keeps the entries for which `keep` says so.
    pub fn retain(&mut self, mut keep: impl FnMut(Name<'_>, &[u8]) -> bool) {
        let mut entries = std::mem::take(&mut self.entries);
        entries.retain(|entry| {
            let kept = keep(self.name(entry), self.value(entry));
            if !kept {
                self.wasted += stored_len(entry);
            }
            kept
        });
        self.entries = entries;
        self.present = KnownSet::default();
        for index in 0..self.entries.len() {
            self.present.insert(self.entries[index].id);
        }
        self.compact_if_wasteful();
    }

    /// The entries in order.
    #[inline]
    pub fn iter(&self) -> Iter<'_> {
        Iter { headers: self, entries: self.entries.iter() }
    }

    /// The entries in order, without pseudo-headers.
    #[inline]
    pub fn iter_regular(&self) -> Iter<'_> {
        Iter { headers: self, entries: self.entries[self.pseudo_count()..].iter() }
    }

    /// The request method.
    #[inline]
    pub fn method(&self) -> Option<&[u8]> {
        self.get(Known::Method)
    }

    /// The request target: path and query, or empty for CONNECT without a path.
    #[inline]
    pub fn path(&self) -> Option<&[u8]> {
        self.get(Known::Path)
    }

    /// The request's host and port.
    #[inline]
    pub fn authority(&self) -> Option<&[u8]> {
        self.get(Known::Authority)
    }

    /// The request's scheme.
    #[inline]
    pub fn scheme(&self) -> Option<&[u8]> {
        self.get(Known::Scheme)
    }

    /// The response status, when it is three digits.
    #[inline]
    pub fn status(&self) -> Option<u16> {
        match self.get(Known::Status)? {
            digits @ [a, b, c] if digits.iter().all(u8::is_ascii_digit) => {
                Some(u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0'))
            }
            _ => None,
        }
    }

    /// Sets the response status.
    #[inline]
    pub fn set_status(&mut self, status: u16) {
        self.set(Known::Status, itoa::Buffer::new().format(status));
    }

    /// The declared body length, when `content-length` is one plain decimal number.
    pub fn content_length(&self) -> Option<u64> {
        parse_decimal(self.get(Known::ContentLength)?)
    }

    // === for the codecs ===

    /// Adds a regular header as a peer spelled it: the name is lower-cased on the way into the arena, and kept in its
    /// original case beside it when `keep_case` and it differs. Returns the known id.
    #[inline]
    pub(crate) fn append_wire(&mut self, name: &[u8], value: &[u8], keep_case: bool) -> Option<Known> {
        if !self.has_room(2 * name.len() + value.len()) || name.len() > usize::from(u16::MAX) {
            return None;
        }
        let name_off = self.arena.len();
        self.arena.extend(name.iter().map(u8::to_ascii_lowercase));
        let known = Known::lookup(&self.arena[name_off..]);
        let mut flags = 0;
        // Where names that are added are spelled otherwise, one that came in lower case must be told from them.
        if keep_case && (self.arena[name_off..] != *name || self.spells_added()) {
            flags = ORIGINAL_CASE;
        }
        if known.is_some() {
            self.arena.truncate(name_off);
        }
        if flags == ORIGINAL_CASE {
            self.arena.extend_from_slice(name);
        }
        let value_off = self.arena.len() as u32;
        self.arena.extend_from_slice(value);
        let id = known.map_or(0, Known::id);
        self.present.insert(id);
        self.entries.push(Entry {
            name_off: name_off as u32,
            value_off,
            value_len: value.len() as u32,
            name_len: name.len() as u16,
            id,
            flags,
        });
        known
    }

    /// Adds a regular header whose value is known to hold no NUL, CR or LF.
    #[inline]
    pub(crate) fn append_safe(&mut self, name: Name<'_>, value: &[u8]) {
        debug_assert!(is_valid_value(value) && !name.is_pseudo(), "the caller's proof does not hold");
        self.push_raw(name, value);
    }

    /// The known names present now.
    #[inline]
    pub(crate) fn bits(&self) -> KnownSet {
        self.present
    }

    /// Takes back the newest entry, which must not be a pseudo-header; a known name stays marked as present only if
    /// another entry has it.
    pub(crate) fn pop(&mut self) {
        let Some(entry) = self.entries.pop() else { return };
        let end = self.arena.len() - stored_len(&entry);
        self.arena.truncate(end);
        if !self.entries.iter().any(|other| other.id == entry.id) {
            self.present.remove(entry.id);
        }
    }

    /// The size of all text held, for sizing an output buffer.
    #[inline]
    pub(crate) fn arena_len(&self) -> usize {
        self.arena.len()
    }

    /// The arena, and each entry's name and the place of its value in it.
    pub(crate) fn parts(&self) -> (&[u8], impl Iterator<Item = (Name<'_>, std::ops::Range<usize>)>) {
        let entries = self.entries.iter().map(|entry| {
            let start = entry.value_off as usize;
            (self.name(entry), start..start + entry.value_len as usize)
        });
        (&self.arena, entries)
    }

    // === internals ===

    #[inline]
    fn name(&self, entry: &Entry) -> Name<'_> {
        match Known::from_id(entry.id) {
            Some(known) => Name::Known(known),
            None => {
                let start = entry.name_off as usize;
                Name::Other(&self.arena[start..start + usize::from(entry.name_len)])
            }
        }
    }

    #[inline]
    fn value(&self, entry: &Entry) -> &[u8] {
        let start = entry.value_off as usize;
        &self.arena[start..start + entry.value_len as usize]
    }

    /// A bit test for the many names that are absent, at the place that asks; the scan is a call.
    #[inline(always)]
    fn find(&self, name: Name<'_>, from: usize) -> Option<usize> {
        match name {
            Name::Known(known) if !self.present.has(known) => None,
            Name::Known(known) => self.scan_known(known.id(), from),
            Name::Other(bytes) => self.scan_other(bytes, from),
        }
    }

    #[inline(never)]
    fn scan_known(&self, id: u8, from: usize) -> Option<usize> {
        Some(from + self.entries[from..].iter().position(|entry| entry.id == id)?)
    }

    fn scan_other(&self, name: &[u8], from: usize) -> Option<usize> {
        let is_it = |entry: &Entry| {
            entry.id == 0 && usize::from(entry.name_len) == name.len() && {
                let start = entry.name_off as usize;
                self.arena[start..start + name.len()] == *name
            }
        };
        Some(from + self.entries[from..].iter().position(is_it)?)
    }

    /// How many entries at the front are pseudo-headers.
    #[inline]
    fn pseudo_count(&self) -> usize {
        let is_pseudo = |entry: &&Entry| entry.id != 0 && entry.id <= Known::Status.id();
        self.entries.iter().take_while(is_pseudo).count()
    }

    fn push(&mut self, name: Name<'_>, value: &[u8]) {
        self.push_raw(name, &safe_value(name, value));
    }

    fn push_raw(&mut self, name: Name<'_>, value: &[u8]) {
        let text = match name {
            Name::Known(_) => &[],
            Name::Other(bytes) => bytes,
        };
        if text.len() > usize::from(u16::MAX) || !self.has_room(text.len() + value.len()) {
            debug_assert!(false, "header entry beyond the map's limits");
            return;
        }
        let name_off = self.arena.len() as u32;
        self.arena.extend_from_slice(text);
        let value_off = self.arena.len() as u32;
        self.arena.extend_from_slice(value);
        let id = name.known().map_or(0, Known::id);
        self.present.insert(id);
        let name_len = name.as_bytes().len() as u16;
        let entry = Entry { name_off, value_off, value_len: value.len() as u32, name_len, id, flags: 0 };
        if name.is_pseudo() {
            self.entries.insert(self.pseudo_count(), entry);
        } else {
            self.entries.push(entry);
        }
    }

    /// Replaces the value of an entry, in its old place when it fits.
    fn write_value(&mut self, index: usize, value: &[u8]) {
        let Entry { value_off, value_len, .. } = self.entries[index];
        let (start, old_len) = (value_off as usize, value_len as usize);
        if value.len() <= old_len {
            self.arena[start..start + value.len()].copy_from_slice(value);
            self.wasted += old_len - value.len();
        } else if self.has_room(value.len()) {
            self.entries[index].value_off = self.arena.len() as u32;
            self.arena.extend_from_slice(value);
            self.wasted += old_len;
        } else {
            return;
        }
        self.entries[index].value_len = value.len() as u32;
    }

    fn remove_at(&mut self, index: usize) {
        let entry = self.entries.remove(index);
        self.wasted += stored_len(&entry);
    }

    #[inline]
    fn has_room(&self, more: usize) -> bool {
        more < (u32::MAX as usize).saturating_sub(self.arena.len())
    }

    /// Filters that rewrite the same header over and over must not grow the arena without end.
    #[inline]
    fn compact_if_wasteful(&mut self) {
        if self.wasted > MIN_WASTE && self.wasted > self.arena.len() / 2 {
            self.compact();
        }
    }

    #[cold]
    fn compact(&mut self) {
        let mut arena = Vec::with_capacity(self.arena.len() - self.wasted.min(self.arena.len()));
        for entry in &mut self.entries {
            let names = stored_len(entry) - entry.value_len as usize;
            let (name_start, value_start) = (entry.name_off as usize, entry.value_off as usize);
            entry.name_off = arena.len() as u32;
            arena.extend_from_slice(&self.arena[name_start..name_start + names]);
            entry.value_off = arena.len() as u32;
            arena.extend_from_slice(&self.arena[value_start..value_start + entry.value_len as usize]);
        }
        self.arena = arena;
        self.wasted = 0;
    }
}

/// The bytes of the arena that belong to an entry.
fn stored_len(entry: &Entry) -> usize {
    let copies = usize::from(entry.id == 0) + usize::from(entry.flags & ORIGINAL_CASE != 0);
    copies * usize::from(entry.name_len) + entry.value_len as usize
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (name, format!("{}", value.escape_ascii()))))
            .finish()
    }
}

/// Same entries in the same order.
impl PartialEq for Headers {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl Eq for Headers {}

#[cfg(test)]
mod tests;
