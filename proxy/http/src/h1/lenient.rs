//! The slow path for heads that are not written as RFC 9112 has it: brings one into canonical form, if Envoy's parser
//! would accept it, for the strict parser to read.
//!
//! Accepted as Envoy 1.40 does: bare LF line ends, tabs and repeated blanks between the parts of the first line, CR
//! anywhere in a value (dropped), continuation lines (only the line end is dropped), versions other than 1.0 and 1.1
//! (all count as 1.0), and a missing version. Stricter than Envoy: a bare CR inside `transfer-encoding` or
//! `content-length` is refused, because the next hop might read the value differently.

use super::Error;
use crate::name::is_token_byte;

/// What a head belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Request,
    Response,
    /// No first line.
    Trailers,
}

/// The canonical form of a complete head, from its first byte to its empty line.
pub(super) fn canonical(head: &[u8], kind: Kind) -> Result<Vec<u8>, Error> {
    let mut canonical = Vec::with_capacity(head.len() + 16);
    let mut lines = head.split(|byte| *byte == b'\n');
    if kind != Kind::Trailers {
        let line = lines.next().unwrap_or_default();
        first_line(line.strip_suffix(b"\r").unwrap_or(line), kind, &mut canonical)?;
    }
    // The name of the field that a continuation line would belong to.
    let mut open: Option<&[u8]> = None;
    for line in lines {
        if matches!(line, b"" | b"\r") {
            break;
        }
        let line = trim_end_cr(line);
        match (line.first(), open) {
            // Only carriage returns: neither the end of the head nor a field.
            (None, _) | (Some(b' ' | b'\t'), None) => return Err(Error::Codec),
            (Some(b' ' | b'\t'), Some(name)) => {
                push_value(name, line, &mut canonical)?;
                continue;
            }
            (Some(_), _) => {}
        }
        if open.is_some() {
            canonical.extend_from_slice(b"\r\n");
        }
        let colon = memchr::memchr(b':', line).ok_or(Error::Codec)?;
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if name.iter().any(|byte| matches!(byte, 0..=8 | 0xb | 0xc | 0xe..=0x1f | 0x7f)) {
            return Err(Error::InvalidCharacters);
        }
        if name.is_empty() || !name.iter().all(|byte| is_token_byte(*byte)) {
            return Err(Error::Codec);
        }
        canonical.extend_from_slice(name);
        canonical.push(b':');
        push_value(name, value, &mut canonical)?;
        open = Some(name);
    }
    if open.is_some() {
        canonical.extend_from_slice(b"\r\n");
    }
    canonical.extend_from_slice(b"\r\n");
    Ok(canonical)
}

/// Whether the first line of a head that is not complete yet is wrong already: garbage is answered at once.
pub(super) fn check_first_line(line: &[u8], kind: Kind) -> Result<(), Error> {
    first_line(line.strip_suffix(b"\r").unwrap_or(line), kind, &mut Vec::new())
}

fn first_line(line: &[u8], kind: Kind, out: &mut Vec<u8>) -> Result<(), Error> {
    if line.first().is_none_or(|byte| !is_token_byte(*byte)) || line.contains(&b'\r') {
        return Err(Error::Codec);
    }
    if line.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err(Error::InvalidCharacters);
    }
    let mut parts = line.split(|byte| matches!(byte, b' ' | b'\t')).filter(|part| !part.is_empty());
    let first = parts.next().ok_or(Error::Codec)?;
    let second = parts.next().ok_or(Error::Codec)?;
    match kind {
        Kind::Request => {
            let version = match parts.next() {
                Some(b"HTTP/1.1") => "HTTP/1.1",
                None => "HTTP/1.0",
                Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor])
                    if major.is_ascii_digit() && minor.is_ascii_digit() =>
                {
                    "HTTP/1.0"
                }
                Some(_) => return Err(Error::Codec),
            };
            if parts.next().is_some() {
                return Err(Error::Codec);
            }
            for part in [first, b" ", second, b" ", version.as_bytes(), b"\r\n"] {
                out.extend_from_slice(part);
            }
        }
        Kind::Response | Kind::Trailers => {
            let version = match first {
                b"HTTP/1.1" => "HTTP/1.1",
                [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
                    if major.is_ascii_digit() && minor.is_ascii_digit() =>
                {
                    "HTTP/1.0"
                }
                _ => return Err(Error::Codec),
            };
            // The reason phrase is not passed on, so it is left out here.
            for part in [version.as_bytes(), b" ", second, b"\r\n"] {
                out.extend_from_slice(part);
            }
        }
    }
    Ok(())
}

fn trim_end_cr(mut line: &[u8]) -> &[u8] {
    while let Some(shorter) = line.strip_suffix(b"\r") {
        line = shorter;
    }
    line
}

fn push_value(name: &[u8], value: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
    let frames =
        name.eq_ignore_ascii_case(b"transfer-encoding") || name.eq_ignore_ascii_case(b"content-length");
    if frames && value.contains(&b'\r') {
        return Err(Error::Codec);
    }
    for byte in value {
        match byte {
            b'\r' => {}
            b'\t' => out.push(b'\t'),
            0..=0x1f | 0x7f => return Err(Error::InvalidCharacters),
            byte => out.push(*byte),
        }
    }
    Ok(())
}
