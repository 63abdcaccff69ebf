//! Sets of known names.

use crate::known::Known;

/// A set of known names: one bit for each id.
#[derive(Clone, Copy, Debug, Default)]
pub struct KnownSet([u64; 4]);

impl KnownSet {
    /// The set of `names`.
    pub const fn of(names: &[Known]) -> Self {
        let mut bits = [0; 4];
        let mut next = 0;
        while next < names.len() {
            let id = names[next].id();
            bits[(id >> 6) as usize] |= 1 << (id & 63);
            next += 1;
        }
        Self(bits)
    }

    /// Whether `known` is one of them.
    #[inline]
    pub fn has(&self, known: Known) -> bool {
        self.has_id(known.id())
    }

    #[inline]
    pub(super) fn has_id(&self, id: u8) -> bool {
        self.0[usize::from(id >> 6)] & (1 << (id & 63)) != 0
    }

    #[inline]
    pub(super) fn insert(&mut self, id: u8) {
        self.0[usize::from(id >> 6)] |= 1 << (id & 63);
    }

    #[inline]
    pub(super) fn remove(&mut self, id: u8) {
        self.0[usize::from(id >> 6)] &= !(1 << (id & 63));
    }

    /// Whether a name is in both.
    #[inline]
    pub(super) fn meets(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).any(|(ours, theirs)| ours & theirs != 0)
    }
}
