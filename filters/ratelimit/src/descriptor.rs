//! Descriptors: what a request is counted as, made of it by the `rate_limits` of routes, virtual hosts and filters. Local limits
//! look theirs up by it; a rate limit service is sent them.

mod action;
mod policy;

pub use action::Request;
pub(crate) use policy::Descriptors;
pub use policy::{HitsAddend, Place, Policies, Policy};

use std::fmt::{self, Write as _};

use smallvec::SmallVec;

/// What a request made of one policy: entries of key and value, in order.
///
/// The entries are kept as one run of bytes, which is what they are looked up by: a request's descriptors allocate only when
/// they are long.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Descriptor {
    /// The entries.
    pub entries: Entries,
    /// How many hits it counts for, where that is not one.
    pub hits: Option<u64>,
    /// Whether the hits are given back rather than taken.
    pub gives_back: bool,
    /// A limit other than the rate limit service's.
    pub limit: Option<LimitOverride>,
    /// What it says about `x-ratelimit-*` headers.
    pub headers: HeadersOption,
}

/// The entries of a descriptor, encoded: lengths, then bytes. Equal entries have equal encodings.
#[derive(Clone, Default, Eq, Hash, PartialEq)]
pub struct Entries(SmallVec<[u8; 96]>);

/// `RateLimit.XRateLimitOption`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum HeadersOption {
    /// As the filter says.
    #[default]
    Inherit,
    /// None.
    Off,
    /// `DRAFT_VERSION_03`.
    On,
}

/// `RateLimit.Override`: a limit that comes with the request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LimitOverride {
    /// How many.
    pub requests_per_unit: u32,
    /// In what time: `envoy.type.v3.RateLimitUnit`.
    pub unit: i32,
}

impl Descriptor {
    /// One hit of these entries.
    pub fn of(entries: Entries) -> Self {
        Self { entries, ..Self::default() }
    }
}

impl Entries {
    /// Appends an entry.
    pub fn push(&mut self, key: &[u8], value: &[u8]) {
        for part in [key, value] {
            // A header is far shorter than that, and so is a configured text.
            self.0.extend_from_slice(&(part.len() as u32).to_ne_bytes());
            self.0.extend_from_slice(part);
        }
    }

    /// Appends an entry whose value is printed.
    pub fn push_display(&mut self, key: &[u8], value: impl fmt::Display) {
        self.push(key, b"");
        let start = self.0.len();
        // Nothing here fails.
        let _ = write!(Tail(&mut self.0), "{value}");
        let len = (self.0.len() - start) as u32;
        self.0[start - size_of::<u32>()..start].copy_from_slice(&len.to_ne_bytes());
    }

    /// The encoding.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Keys and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = &self.0[..];
        let mut part = move || {
            let (len, after) = rest.split_first_chunk()?;
            let (part, after) = after.split_at_checked(u32::from_ne_bytes(*len) as usize)?;
            rest = after;
            Some(part)
        };
        std::iter::from_fn(move || Some((part()?, part()?)))
    }
}

/// Prints at the end of bytes.
struct Tail<'a>(&'a mut SmallVec<[u8; 96]>);

impl fmt::Write for Tail<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// `key=value`, joined as Envoy prints them.
impl fmt::Display for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (key, value)) in self.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{}={}", String::from_utf8_lossy(key), String::from_utf8_lossy(value))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

#[cfg(test)]
mod tests;
