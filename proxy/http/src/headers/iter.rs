//! A map as a sequence of entries.

use std::fmt;

use super::{Entry, Headers};
use crate::name::Name;

impl<'n, N: Into<Name<'n>>, V: AsRef<[u8]>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(entries: I) -> Self {
        let mut headers = Headers::new();
        headers.extend(entries);
        headers
    }
}

impl<'n, N: Into<Name<'n>>, V: AsRef<[u8]>> Extend<(N, V)> for Headers {
    fn extend<I: IntoIterator<Item = (N, V)>>(&mut self, entries: I) {
        for (name, value) in entries {
            self.append(name, value);
        }
    }
}

impl<'a> IntoIterator for &'a Headers {
    type Item = (Name<'a>, &'a [u8]);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// The entries of a [`Headers`], in order.
#[derive(Clone)]
pub struct Iter<'a> {
    pub(super) headers: &'a Headers,
    pub(super) entries: std::slice::Iter<'a, Entry>,
}

impl<'a> Iterator for Iter<'a> {
    type Item = (Name<'a>, &'a [u8]);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.entries.next()?;
        Some((self.headers.name(entry), self.headers.value(entry)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.entries.size_hint()
    }
}

impl DoubleEndedIterator for Iter<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let entry = self.entries.next_back()?;
        Some((self.headers.name(entry), self.headers.value(entry)))
    }
}

impl ExactSizeIterator for Iter<'_> {}

impl fmt::Debug for Iter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.clone()).finish()
    }
}

/// The values of one name, in order.
#[derive(Clone, Debug)]
pub struct GetAll<'a, 'n> {
    pub(super) headers: &'a Headers,
    pub(super) name: Name<'n>,
    pub(super) next: usize,
}

impl<'a> Iterator for GetAll<'a, '_> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let index = self.headers.find(self.name, self.next)?;
        self.next = index + 1;
        Some(self.headers.value(&self.headers.entries[index]))
    }
}
