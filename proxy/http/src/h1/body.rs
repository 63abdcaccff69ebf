//! Finding the end of a body.

use bytes::{Buf, Bytes, BytesMut};

use super::{Config, Error, Framing, Received, head};
use crate::headers::Headers;

/// The most bytes of extensions on one chunk; Envoy has no bound.
const MAX_EXTENSION: u16 = 16 * 1024;

/// A body on its way in.
#[derive(Debug)]
pub(super) enum Body {
    Length(u64),
    Chunked(Chunked),
    /// Responses delimited by the connection's end, and tunnels.
    Unbounded,
}

pub(super) enum Piece {
    NeedMore,
    Data(Bytes),
    /// Trailers were read into the map.
    Trailers,
    End,
}

impl<H> From<Piece> for Received<H> {
    fn from(piece: Piece) -> Self {
        match piece {
            Piece::NeedMore => Received::NeedMore,
            Piece::Data(data) => Received::Data(data),
            Piece::Trailers => Received::Trailers,
            Piece::End => Received::End,
        }
    }
}

impl Body {
    /// The decoder for a framing that has a body.
    pub(super) fn new(framing: Framing) -> Self {
        match framing {
            Framing::None => Body::Length(0),
            Framing::Length(length) => Body::Length(length),
            Framing::Chunked => Body::Chunked(Chunked::Size { size: 0, digits: 0 }),
            Framing::UntilClose | Framing::Tunnel => Body::Unbounded,
        }
    }

    pub(super) fn receive(
        &mut self,
        input: &mut BytesMut,
        trailers: &mut Headers,
        config: &Config,
    ) -> Result<Piece, Error> {
        match self {
            Body::Length(0) => Ok(Piece::End),
            Body::Length(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                if take == 0 {
                    return Ok(Piece::NeedMore);
                }
                *left -= take as u64;
                Ok(Piece::Data(input.split_to(take).freeze()))
            }
            Body::Chunked(chunked) => chunked.receive(input, trailers, config),
            Body::Unbounded if input.is_empty() => Ok(Piece::NeedMore),
            Body::Unbounded => Ok(Piece::Data(input.split().freeze())),
        }
    }

    /// Whether the connection's end is the body's.
    pub(super) fn ends_with_connection(&self) -> bool {
        matches!(self, Body::Unbounded)
    }
}

/// RFC 9112 section 7.1, strictly: a size of hexadecimal digits, CRLF and no other line end.
#[derive(Debug)]
pub(super) enum Chunked {
    Size {
        size: u64,
        digits: u8,
    },
    /// White space that Envoy allows behind the size, then the end of the line or an extension.
    AfterSize {
        size: u64,
        length: u16,
    },
    Extension {
        size: u64,
        length: u16,
    },
    SizeLf {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    /// So many bytes have been searched for the end of the trailers.
    Trailers {
        searched: u32,
    },
}

impl Chunked {
    fn receive(
        &mut self,
        input: &mut BytesMut,
        trailers: &mut Headers,
        config: &Config,
    ) -> Result<Piece, Error> {
        loop {
            let (next, used) = match (&*self, input.first()) {
                (Chunked::Trailers { searched }, _) => {
                    let mut searched = *searched;
                    let piece = head::receive_trailers(input, &mut searched, trailers, config)?;
                    *self = Chunked::Trailers { searched };
                    return Ok(piece);
                }
                (_, None) => return Ok(Piece::NeedMore),
                (&Chunked::Size { size, digits }, Some(byte)) => match (hex_digit(*byte), byte) {
                    (Some(digit), _) if size <= u64::MAX >> 4 => {
                        // Leading zeros may be any number, so the count only has to tell none from some.
                        (Chunked::Size { size: size << 4 | digit, digits: 1 }, 1)
                    }
                    (None, b'\r') if digits > 0 => (Chunked::SizeLf { size }, 1),
                    (None, b';') if digits > 0 => (Chunked::Extension { size, length: 0 }, 1),
                    (None, b' ' | b'\t') if digits > 0 => (Chunked::AfterSize { size, length: 1 }, 1),
                    _ => return Err(Error::Codec),
                },
                (&Chunked::AfterSize { size, length }, Some(byte)) => match byte {
                    b'\r' => (Chunked::SizeLf { size }, 1),
                    b';' => (Chunked::Extension { size, length }, 1),
                    b' ' | b'\t' if length < MAX_EXTENSION => {
                        (Chunked::AfterSize { size, length: length + 1 }, 1)
                    }
                    _ => return Err(Error::Codec),
                },
                (&Chunked::Extension { size, length }, Some(_)) => {
                    let end = memchr::memchr2(b'\r', b'\n', input);
                    let skipped = end.unwrap_or(input.len());
                    let length = u16::try_from(usize::from(length) + skipped)
                        .ok()
                        .filter(|length| *length <= MAX_EXTENSION)
                        .ok_or(Error::Codec)?;
                    match end {
                        Some(end) if input[end] == b'\r' => (Chunked::SizeLf { size }, end + 1),
                        Some(_) => return Err(Error::Codec),
                        None => (Chunked::Extension { size, length }, skipped),
                    }
                }
                (&Chunked::SizeLf { size }, Some(b'\n')) => match size {
                    0 => (Chunked::Trailers { searched: 0 }, 1),
                    left => (Chunked::Data { left }, 1),
                },
                (&Chunked::Data { left }, Some(_)) => {
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    *self = match left - take as u64 {
                        0 => Chunked::DataCr,
                        left => Chunked::Data { left },
                    };
                    return Ok(Piece::Data(input.split_to(take).freeze()));
                }
                (Chunked::DataCr, Some(b'\r')) => (Chunked::DataLf, 1),
                (Chunked::DataLf, Some(b'\n')) => (Chunked::Size { size: 0, digits: 0 }, 1),
                (Chunked::SizeLf { .. } | Chunked::DataCr | Chunked::DataLf, Some(_)) => {
                    return Err(Error::Codec);
                }
            };
            *self = next;
            input.advance(used);
        }
    }
}

fn hex_digit(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}
