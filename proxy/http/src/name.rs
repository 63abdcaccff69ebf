//! Header names: borrowed for look-up and iteration, owned for configuration.

use std::fmt;

use crate::known::Known;

/// A lower-case header name, known by id or spelled out.
///
/// This is both what iteration yields and what look-ups take. Converting from text costs one hash; on the request path
/// pass a [`Known`], or a [`HeaderName`] that was resolved when its configuration was compiled.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Name<'a> {
    /// A name the proxy has an id for.
    Known(Known),
    /// Any other name. Never the text of a known one.
    Other(&'a [u8]),
}

impl<'a> Name<'a> {
    /// The name's bytes, lower-case.
    #[inline]
    pub fn as_bytes(self) -> &'a [u8] {
        match self {
            Name::Known(known) => known.as_str().as_bytes(),
            Name::Other(bytes) => bytes,
        }
    }

    /// The name as text. Names are ASCII by the contract of every setter; should one not be, this is empty.
    #[inline]
    pub fn as_str(self) -> &'a str {
        match self {
            Name::Known(known) => known.as_str(),
            Name::Other(bytes) => str::from_utf8(bytes).unwrap_or_default(),
        }
    }

    /// The id, when the name has one.
    #[inline]
    pub fn known(self) -> Option<Known> {
        match self {
            Name::Known(known) => Some(known),
            Name::Other(_) => None,
        }
    }

    /// Whether this is an HTTP/2 style pseudo-header such as `:path`.
    #[inline]
    pub fn is_pseudo(self) -> bool {
        matches!(self, Name::Known(known) if known.is_pseudo())
    }
}

impl From<Known> for Name<'_> {
    #[inline]
    fn from(known: Known) -> Self {
        Name::Known(known)
    }
}

impl<'a> From<&'a [u8]> for Name<'a> {
    /// `name` must be lower-case already.
    #[inline]
    fn from(name: &'a [u8]) -> Self {
        debug_assert!(!name.iter().any(u8::is_ascii_uppercase), "header names are looked up in lower case");
        match Known::lookup(name) {
            Some(known) => Name::Known(known),
            None => Name::Other(name),
        }
    }
}

impl<'a> From<&'a str> for Name<'a> {
    /// `name` must be lower-case already.
    #[inline]
    fn from(name: &'a str) -> Self {
        Name::from(name.as_bytes())
    }
}

impl<'a> From<&'a String> for Name<'a> {
    /// `name` must be lower-case already.
    #[inline]
    fn from(name: &'a String) -> Self {
        Name::from(name.as_bytes())
    }
}

impl<'a> From<&'a HeaderName> for Name<'a> {
    #[inline]
    fn from(name: &'a HeaderName) -> Self {
        name.as_name()
    }
}

impl fmt::Debug for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_bytes().escape_ascii())
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An owned, validated, lower-case header name, for compiled configuration.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HeaderName(Repr);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Repr {
    Known(Known),
    Other(Box<[u8]>),
}

impl HeaderName {
    /// Lower-cases and checks `name`: a token of RFC 9110 section 5.6.2, or a known pseudo-header.
    pub fn parse(name: &str) -> Result<Self, InvalidName> {
        let lower = name.to_ascii_lowercase();
        match Known::lookup(lower.as_bytes()) {
            Some(known) => Ok(HeaderName(Repr::Known(known))),
            None if is_token(lower.as_bytes()) && lower.len() <= usize::from(u16::MAX) => {
                Ok(HeaderName(Repr::Other(lower.into_bytes().into())))
            }
            None => Err(InvalidName),
        }
    }

    /// The borrowed form that look-ups take.
    #[inline]
    pub fn as_name(&self) -> Name<'_> {
        match &self.0 {
            Repr::Known(known) => Name::Known(*known),
            Repr::Other(bytes) => Name::Other(bytes),
        }
    }

    /// The name as text, lower-case.
    pub fn as_str(&self) -> &str {
        self.as_name().as_str()
    }
}

impl From<Known> for HeaderName {
    fn from(known: Known) -> Self {
        HeaderName(Repr::Known(known))
    }
}

impl fmt::Debug for HeaderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_name().fmt(f)
    }
}

impl fmt::Display for HeaderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A header name with characters that RFC 9110 does not allow, empty, or longer than 65 535 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid header name")]
pub struct InvalidName;

/// Whether `bytes` is a non-empty token (RFC 9110 section 5.6.2).
pub(crate) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|byte| is_token_byte(*byte))
}

#[inline]
pub(crate) fn is_token_byte(byte: u8) -> bool {
    TOKEN[byte as usize]
}

const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = matches!(byte as u8, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~')
            || (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_names_are_lower_cased_and_checked() {
        assert_eq!(HeaderName::parse("X-Foo").unwrap().as_str(), "x-foo");
        assert_eq!(HeaderName::parse("HOST").unwrap(), HeaderName::from(Known::Host));
        assert_eq!(HeaderName::parse(":path").unwrap(), HeaderName::from(Known::Path));
        for bad in ["", "a b", "a:", ":nope", "\u{e9}", "a\n"] {
            assert_eq!(HeaderName::parse(bad), Err(InvalidName), "{bad:?}");
        }
    }
}
