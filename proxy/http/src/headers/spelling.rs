//! How a message was written, for the codec that writes it again.

use super::{Headers, ORIGINAL_CASE};
use crate::known::Known;
use crate::name::Name;

/// How a message was written, and is to be written again, beyond the case of its names.
#[derive(Clone, Default)]
pub(super) struct Spelling {
    /// Names that the peer did not spell are written `Like-This`.
    proper_added: bool,
    /// The reason phrase; empty for the standard one.
    reason: Box<[u8]>,
    /// `transfer-encoding` as the peer spelled it, which is no entry of the map; empty when it was not there.
    transfer_encoding: Box<[u8]>,
}

impl Headers {
    /// Adds `:authority` from a `host` header, keeping how the peer spelled that name if `keep_case`.
    pub(crate) fn append_authority(&mut self, spelled: &[u8], value: &[u8], keep_case: bool) {
        // As it was read: whether it is one is the caller's next question.
        self.push_raw(Name::Known(Known::Authority), value);
        if keep_case
            && (spelled != b"host" || self.spells_added())
            && let Some(index) = self.find(Name::Known(Known::Authority), 0)
        {
            let name_off = self.arena.len() as u32;
            self.arena.extend_from_slice(spelled);
            let entry = &mut self.entries[index];
            (entry.name_off, entry.name_len, entry.flags) = (name_off, spelled.len() as u16, ORIGINAL_CASE);
        }
    }

    /// How the peer spelled the `host` header that became `:authority`.
    pub(crate) fn authority_name(&self) -> &[u8] {
        match self.find(Name::Known(Known::Authority), 0).map(|index| self.entries[index]) {
            Some(entry) if entry.flags & ORIGINAL_CASE != 0 => {
                let start = entry.name_off as usize;
                &self.arena[start..start + usize::from(entry.name_len)]
            }
            _ if self.spells_added() => b"Host",
            _ => b"host",
        }
    }

    /// Says how the message is to be written: the phrase that stood behind its status, and whether names that are added
    /// to it are spelled in proper case. To be called before anything is added.
    pub(crate) fn set_spelling(&mut self, proper_added: bool, reason: &[u8]) {
        self.spelling =
            Some(Box::new(Spelling { proper_added, reason: reason.into(), ..Spelling::default() }));
    }

    /// Keeps how the peer spelled `transfer-encoding`.
    pub(crate) fn spell_transfer_encoding(&mut self, spelled: &[u8]) {
        if spelled != b"transfer-encoding" || self.spells_added() {
            self.spelling.get_or_insert_default().transfer_encoding = spelled.into();
        }
    }

    /// How the peer spelled `transfer-encoding`, where that was kept.
    pub(crate) fn transfer_encoding_name(&self) -> Option<&[u8]> {
        let spelled = self.spelling.as_ref().map(|spelling| &*spelling.transfer_encoding);
        spelled.filter(|spelled| !spelled.is_empty())
    }

    /// Whether names that the peer did not spell are written in proper case.
    #[inline]
    pub(crate) fn spells_added(&self) -> bool {
        self.spelling.as_ref().is_some_and(|spelling| spelling.proper_added)
    }

    /// The reason phrase to write in place of the standard one.
    #[inline]
    pub(crate) fn reason(&self) -> Option<&[u8]> {
        self.spelling.as_ref().map(|spelling| &*spelling.reason).filter(|reason| !reason.is_empty())
    }

    /// The regular entries with their names as the peer spelled them, where that was kept, and whether it was.
    pub(crate) fn iter_original_case(&self) -> impl Iterator<Item = (&[u8], bool)> {
        self.entries[self.pseudo_count()..].iter().map(|entry| {
            let kept = entry.flags & ORIGINAL_CASE != 0;
            let name = if kept {
                let lower = if entry.id == 0 { usize::from(entry.name_len) } else { 0 };
                let start = entry.name_off as usize + lower;
                &self.arena[start..start + usize::from(entry.name_len)]
            } else {
                self.name(entry).as_bytes()
            };
            (name, kept)
        })
    }
}
