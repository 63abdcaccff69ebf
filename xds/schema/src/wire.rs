//! The protobuf wire format: reading without copying, writing into a buffer.

use std::fmt;

/// Nesting limit of messages, the same as every protobuf implementation's.
pub(crate) const DEPTH_LIMIT: usize = 100;

/// Bytes that are not a protobuf message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum WireError {
    /// The bytes end inside a value.
    Truncated,
    /// A varint longer than ten bytes.
    Varint,
    /// A field number of 0 or beyond 2^29-1, or wire type 6 or 7.
    Tag,
    /// A field whose wire type is not that of its schema type.
    WireType,
    /// A string that is not UTF-8.
    Utf8,
    /// Groups that do not match.
    Group,
    /// Messages nested deeper than a hundred.
    Depth,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the bytes end inside a value",
            Self::Varint => "a varint is longer than ten bytes",
            Self::Tag => "a field tag is invalid",
            Self::WireType => "the wire type does not fit the field",
            Self::Utf8 => "a string is not UTF-8",
            Self::Group => "a group is not closed",
            Self::Depth => "messages are nested too deeply",
        })
    }
}

impl std::error::Error for WireError {}

/// One value as it stands on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Raw<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    /// A group, which no message of the schema has: always unknown.
    Group,
    Fixed32(u32),
}

/// One field of a message on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record<'a> {
    pub(crate) number: u32,
    pub(crate) value: Raw<'a>,
    /// Where the record starts in the message.
    pub(crate) start: usize,
}

/// Splits a message into its records.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Where the next record starts.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// The next record, `None` at the end.
    #[inline]
    pub(crate) fn next(&mut self) -> Result<Option<Record<'a>>, WireError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let start = self.at;
        let (number, wire_type) = self.tag()?;
        let value = match wire_type {
            0 => Raw::Varint(self.varint()?),
            1 => Raw::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| WireError::Truncated)?;
                Raw::Bytes(self.take(len)?)
            }
            3 => {
                self.skip_group(number, 0)?;
                Raw::Group
            }
            4 => return Err(WireError::Group),
            _ => Raw::Fixed32(u32::from_le_bytes(self.array()?)),
        };
        Ok(Some(Record { number, value, start }))
    }

    #[inline]
    pub(crate) fn varint(&mut self) -> Result<u64, WireError> {
        if let Some(&byte) = self.bytes.get(self.at)
            && byte < 0x80
        {
            self.at += 1;
            return Ok(u64::from(byte));
        }
        self.long_varint()
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        Ok(self.take(N)?.try_into().expect("take returns what was asked for"))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    fn long_varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for index in 0..10 {
            let byte = *self.bytes.get(self.at).ok_or(WireError::Truncated)?;
            self.at += 1;
            if index == 9 && byte > 1 {
                return Err(WireError::Varint);
            }
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(WireError::Varint)
    }

    #[inline]
    fn tag(&mut self) -> Result<(u32, u8), WireError> {
        let tag = u32::try_from(self.varint()?).map_err(|_| WireError::Tag)?;
        let (number, wire_type) = (tag >> 3, (tag & 7) as u8);
        if number == 0 || wire_type > 5 { Err(WireError::Tag) } else { Ok((number, wire_type)) }
    }

    #[inline]
    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let end = self.at.checked_add(len).ok_or(WireError::Truncated)?;
        let bytes = self.bytes.get(self.at..end).ok_or(WireError::Truncated)?;
        self.at = end;
        Ok(bytes)
    }

    fn skip_group(&mut self, group: u32, depth: usize) -> Result<(), WireError> {
        if depth > DEPTH_LIMIT {
            return Err(WireError::Depth);
        }
        loop {
            if self.is_empty() {
                return Err(WireError::Truncated);
            }
            let (number, wire_type) = self.tag()?;
            match wire_type {
                0 => {
                    self.varint()?;
                }
                1 => {
                    self.take(8)?;
                }
                2 => {
                    let len = usize::try_from(self.varint()?).map_err(|_| WireError::Truncated)?;
                    self.take(len)?;
                }
                3 => self.skip_group(number, depth + 1)?,
                4 if number == group => return Ok(()),
                4 => return Err(WireError::Group),
                _ => {
                    self.take(4)?;
                }
            }
        }
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_tag(out: &mut Vec<u8>, number: u32, wire_type: u8) {
    put_varint(out, u64::from(number) << 3 | u64::from(wire_type));
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    put_tag(out, number, 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Writes what `content` appends as a length-delimited field.
pub(crate) fn put_nested<E>(
    out: &mut Vec<u8>,
    number: u32,
    content: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    put_tag(out, number, 2);
    put_delimited(out, content)
}

/// Writes what `content` appends behind its length.
pub(crate) fn put_delimited<E>(
    out: &mut Vec<u8>,
    content: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    // One byte is enough for most messages; a longer length moves the content.
    let at = out.len();
    out.push(0);
    content(out)?;
    let len = out.len() - at - 1;
    if len < 0x80 {
        out[at] = len as u8;
    } else {
        let mut prefix = Vec::with_capacity(5);
        put_varint(&mut prefix, len as u64);
        out.splice(at..=at, prefix);
    }
    Ok(())
}

pub(crate) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::{Raw, Reader, WireError, put_nested, put_varint, unzigzag, zigzag};

    #[test]
    fn varints_round_trip() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(Reader::new(&out).varint(), Ok(value));
        }
        assert_eq!(Reader::new(&[0xff; 11]).varint(), Err(WireError::Varint));
        assert_eq!(Reader::new(&[0x80]).varint(), Err(WireError::Truncated));
        for value in [0, -1, 1, i64::MIN, i64::MAX] {
            assert_eq!(unzigzag(zigzag(value)), value);
        }
    }

    #[test]
    fn long_content_moves_behind_its_length() {
        let mut out = Vec::new();
        put_nested(&mut out, 1, |out| {
            out.extend([7; 300]);
            Ok::<_, ()>(())
        })
        .expect("the closure cannot fail");
        let record = Reader::new(&out).next().expect("it is well-formed").expect("it has a record");
        assert!(matches!(record.value, Raw::Bytes(bytes) if bytes == [7; 300]));
    }

    #[test]
    fn groups_are_skipped_and_must_match() {
        // Field 1 as a group that holds field 2 as a varint.
        let mut reader = Reader::new(&[0x0b, 0x10, 0x01, 0x0c]);
        assert!(matches!(reader.next().unwrap().unwrap().value, Raw::Group));
        assert!(reader.next().unwrap().is_none());
        assert_eq!(Reader::new(&[0x0b, 0x14]).next().unwrap_err(), WireError::Group);
        assert_eq!(Reader::new(&[0x0b]).next().unwrap_err(), WireError::Truncated);
        assert_eq!(Reader::new(&[0x0b; 5000]).next().unwrap_err(), WireError::Depth);
    }
}
