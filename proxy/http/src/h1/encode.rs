//! Writing heads and body framing.

use bytes::{BufMut, BytesMut};

use super::{Config, HeaderCase, Version};
use crate::headers::Headers;
use crate::known::Known;
use crate::reason::reason_phrase;

/// A body on its way out.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// No head has been written.
    Idle,
    Length(u64),
    Chunked,
    /// Delimited by the connection's end: responses to HTTP/1.0.
    UntilClose,
    Tunnel,
    /// The message has no body on the wire whatever its head says: HEAD, 204, 304.
    Discard,
    Done,
}

/// The bytes around a piece of body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFrame {
    prefix: [u8; 18],
    prefix_len: u8,
    take: usize,
    suffix: &'static [u8],
}

impl DataFrame {
    /// What to write before the piece.
    #[inline]
    pub fn prefix(&self) -> &[u8] {
        &self.prefix[..usize::from(self.prefix_len)]
    }

    /// How many bytes of the piece to write: fewer than it has when the message is to have no body, or less.
    #[inline]
    pub fn take(&self) -> usize {
        self.take
    }

    /// What to write behind the piece.
    #[inline]
    pub fn suffix(&self) -> &'static [u8] {
        self.suffix
    }

    pub(super) fn write(&self, data: &[u8], out: &mut BytesMut) {
        out.reserve(usize::from(self.prefix_len) + self.take + self.suffix.len());
        out.put_slice(self.prefix());
        out.put_slice(&data[..self.take]);
        out.put_slice(self.suffix);
    }

    fn bare(take: usize) -> Self {
        Self { prefix: [0; 18], prefix_len: 0, take, suffix: b"" }
    }

    /// A chunk: its size in hexadecimal, CRLF, the data, CRLF.
    fn chunk(len: usize) -> Self {
        let mut frame = Self { take: len, suffix: b"\r\n", ..Self::bare(0) };
        let digits = (usize::BITS - len.leading_zeros()).div_ceil(4).max(1) as usize;
        for (place, slot) in frame.prefix[..digits].iter_mut().rev().enumerate() {
            *slot = b"0123456789abcdef"[len >> (4 * place) & 0xf];
        }
        frame.prefix[digits..digits + 2].copy_from_slice(b"\r\n");
        frame.prefix_len = digits as u8 + 2;
        frame
    }
}

impl Outgoing {
    pub(super) fn frame(&mut self, len: usize) -> DataFrame {
        match self {
            // An empty chunk would end the body.
            Outgoing::Chunked if len == 0 => DataFrame::bare(0),
            Outgoing::Chunked => DataFrame::chunk(len),
            Outgoing::UntilClose | Outgoing::Tunnel => DataFrame::bare(len),
            // More than was declared would be read as the next message.
            Outgoing::Length(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(len);
                *left -= take as u64;
                DataFrame::bare(take)
            }
            Outgoing::Idle | Outgoing::Discard | Outgoing::Done => DataFrame::bare(0),
        }
    }

    /// Ends the body. `false`: fewer bytes were sent than declared, so only closing the connection ends the message.
    pub(super) fn finish(
        &mut self,
        trailers: Option<&Headers>,
        preserve_case: bool,
        out: &mut BytesMut,
    ) -> bool {
        match std::mem::replace(self, Outgoing::Done) {
            Outgoing::Chunked => {
                out.extend_from_slice(b"0\r\n");
                if let Some(trailers) = trailers {
                    fields(trailers, Start::Trailers, preserve_case, out);
                }
                out.extend_from_slice(b"\r\n");
                true
            }
            Outgoing::Length(left) => left == 0,
            Outgoing::UntilClose | Outgoing::Tunnel => false,
            Outgoing::Idle | Outgoing::Discard | Outgoing::Done => true,
        }
    }
}

/// What a head belongs to, as far as its fields depend on it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start {
    Request {
        tunnel: bool,
        /// The method is one that usually has no body, so that its absence need not be said.
        bodiless: bool,
    },
    Response {
        status: u16,
        version: Version,
        /// It answers HEAD.
        head: bool,
        tunnel: bool,
        /// It accepts a CONNECT.
        connect: bool,
        persistence: Persistence,
    },
    Informational,
    Trailers,
}

/// What a response says about the connection beyond its own headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Persistence {
    Unsaid,
    KeepAlive,
    Close,
}

pub(super) fn status_line(version: Version, status: u16, reason: Option<&[u8]>, out: &mut BytesMut) {
    // Nearly every response.
    if status == 200 && version == Version::Http11 && reason.is_none() {
        return out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    }
    out.extend_from_slice(match version {
        Version::Http11 => b"HTTP/1.1 ",
        Version::Http10 => b"HTTP/1.0 ",
    });
    out.extend_from_slice(itoa::Buffer::new().format(status).as_bytes());
    out.put_u8(b' ');
    out.extend_from_slice(reason.unwrap_or_else(|| reason_phrase(status).as_bytes()));
    out.extend_from_slice(b"\r\n");
}

pub(super) fn request_line(method: &[u8], headers: &Headers, config: &Config, out: &mut BytesMut) {
    let authority = headers.authority();
    let connect = method == b"CONNECT";
    let target = if connect { authority } else { headers.path() };
    let target = target.filter(|target| !target.is_empty()).unwrap_or(b"/");
    out.reserve(method.len() + target.len() + 32);
    out.put_slice(method);
    out.put_u8(b' ');
    if config.send_fully_qualified_url && !connect {
        out.extend_from_slice(headers.scheme().unwrap_or(b"http"));
        out.extend_from_slice(b"://");
        out.extend_from_slice(authority.unwrap_or_default());
    }
    out.extend_from_slice(target);
    out.put_slice(b" HTTP/1.1\r\n");
    if let Some(authority) = authority {
        let name = if config.header_case.is_proper() { b"host" } else { headers.authority_name() };
        put_field(name, authority, out);
    }
}

/// Writes the regular fields, without those that say how the message is framed if they could be wrong here.
pub(super) fn fields(headers: &Headers, start: Start, preserve_case: bool, out: &mut BytesMut) {
    out.reserve(headers.arena_len() + headers.len() * 24 + 64);
    // A length that is no number, or a second one, must not stand beside the framing that is chosen.
    let mut lengths = usize::from(headers.content_length().is_none());
    let mut keeps = |known: Option<Known>| match (known, start) {
        (Some(Known::TransferEncoding), _) => false,
        (Some(Known::ContentLength), _) if std::mem::replace(&mut lengths, 1) > 0 => false,
        // RFC 9110 section 8.6: no length in 1xx, 204, or an accepted CONNECT.
        (Some(Known::ContentLength), Start::Response { status, connect, .. }) => {
            !(connect || status < 200 || status == 204)
        }
        (Some(Known::ContentLength), Start::Informational | Start::Trailers) => false,
        (Some(Known::Connection), Start::Response { persistence, .. }) => persistence == Persistence::Unsaid,
        (Some(Known::Host), Start::Request { .. }) => !headers.contains(Known::Authority),
        _ => true,
    };
    if preserve_case {
        let added = headers.spells_added();
        for ((name, value), (spelled, kept)) in headers.iter_regular().zip(headers.iter_original_case()) {
            if keeps(name.known()) {
                let from = out.len();
                put_field(spelled, value, out);
                if added && !kept {
                    spell_names(&mut out[from..from + spelled.len()]);
                }
            }
        }
    } else {
        for (name, value) in headers.iter_regular() {
            if keeps(name.known()) {
                put_field(name.as_bytes(), value, out);
            }
        }
    }
    let from = out.len();
    match start {
        Start::Response { persistence: Persistence::Close, .. } => {
            out.extend_from_slice(b"connection: close\r\n")
        }
        Start::Response { persistence: Persistence::KeepAlive, .. } => {
            out.extend_from_slice(b"connection: keep-alive\r\n")
        }
        _ => {}
    }
    if headers.spells_added() {
        spell_names(&mut out[from..]);
    }
}

/// Decides how the body is delimited, and writes the field that says so, last as Envoy does.
pub(super) fn framing(headers: &Headers, start: Start, end_stream: bool, out: &mut BytesMut) -> Outgoing {
    let from = out.len();
    let outgoing = delimit(headers, start, end_stream, out);
    match headers.transfer_encoding_name() {
        Some(spelled) if out[from..].starts_with(b"transfer-encoding") => {
            out[from..from + spelled.len()].copy_from_slice(spelled);
        }
        _ if headers.spells_added() => spell_names(&mut out[from..]),
        _ => {}
    }
    outgoing
}

fn delimit(headers: &Headers, start: Start, end_stream: bool, out: &mut BytesMut) -> Outgoing {
    // A length that is not a number can't be honoured; the chunks that replace it can't be misread.
    let length = headers.content_length();
    match start {
        Start::Request { tunnel: true, .. } => {
            if end_stream {
                Outgoing::Done
            } else {
                Outgoing::Tunnel
            }
        }
        Start::Request { bodiless, .. } => match length {
            Some(0) if end_stream => Outgoing::Done,
            Some(length) => Outgoing::Length(length),
            None if end_stream => {
                if !bodiless {
                    out.extend_from_slice(b"content-length: 0\r\n");
                }
                Outgoing::Done
            }
            None => chunked(out),
        },
        Start::Response { tunnel: true, .. } => {
            if end_stream {
                Outgoing::Done
            } else {
                Outgoing::Tunnel
            }
        }
        Start::Response { status, .. } if status < 200 || status == 204 || status == 304 => {
            if end_stream {
                Outgoing::Done
            } else {
                Outgoing::Discard
            }
        }
        Start::Response { head: true, version, .. } => {
            // What GET would have been answered, as far as it can be known.
            if length.is_none() && version == Version::Http11 {
                out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            }
            if end_stream { Outgoing::Done } else { Outgoing::Discard }
        }
        Start::Response { version, .. } => match length {
            Some(0) if end_stream => Outgoing::Done,
            Some(length) => Outgoing::Length(length),
            None if end_stream => {
                out.extend_from_slice(b"content-length: 0\r\n");
                Outgoing::Done
            }
            None if version == Version::Http10 => Outgoing::UntilClose,
            None => chunked(out),
        },
        Start::Informational | Start::Trailers => Outgoing::Done,
    }
}

fn chunked(out: &mut BytesMut) -> Outgoing {
    out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    Outgoing::Chunked
}

/// Spells the names of a written head, start line first, as [`HeaderCase::Proper`] asks. A pass of its own: nobody pays
/// for it who does not ask.
pub(super) fn spell_head(case: HeaderCase, head: &mut [u8]) {
    if case.is_proper()
        && let Some(end) = memchr::memchr(b'\n', head)
    {
        spell_names(&mut head[end + 1..]);
    }
}

/// Spells the names of header lines `Like-This`.
fn spell_names(lines: &mut [u8]) {
    let mut in_name = true;
    let mut at_start = true;
    for byte in lines {
        match byte {
            b'\n' => (in_name, at_start) = (true, true),
            b':' => in_name = false,
            _ if in_name => {
                if at_start {
                    byte.make_ascii_uppercase();
                }
                at_start = !byte.is_ascii_alphanumeric();
            }
            _ => {}
        }
    }
}

#[inline]
fn put_field(name: &[u8], value: &[u8], out: &mut BytesMut) {
    out.reserve(name.len() + value.len() + 4);
    out.put_slice(name);
    out.put_slice(b": ");
    out.put_slice(value);
    out.put_slice(b"\r\n");
}
