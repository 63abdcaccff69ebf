//! HTTP/2 frames by hand, in both roles. A library would refuse to send half of what the cases need.

use httlib_hpack::Decoder;

use super::{Conn, latin1};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const ERRORS: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

/// The name of an error code.
pub(crate) fn error_name(code: u32) -> String {
    ERRORS.get(code as usize).map_or_else(|| format!("{code:#x}"), |n| (*n).to_owned())
}

/// The code of an error name (`CANCEL` when unknown).
pub(crate) fn error_code(name: &str) -> u32 {
    ERRORS.iter().position(|n| *n == name).map_or(8, |i| i as u32)
}

/// One frame as it was read.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

/// Encodes a frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(9 + payload.len());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.push(kind);
    out.push(flags);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// A header block of literals without indexing: no state shared with the peer, any bytes allowed.
pub(crate) fn block(fields: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.push(0);
        string(&mut out, name);
        string(&mut out, value);
    }
    out
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    let mut n = bytes.len();
    if n < 127 {
        out.push(n as u8);
    } else {
        out.push(127);
        n -= 127;
        while n >= 128 {
            out.push((n % 128 + 128) as u8);
            n /= 128;
        }
        out.push(n as u8);
    }
    out.extend_from_slice(bytes);
}

/// The frames of a header block, split where it exceeds the default frame size.
pub(crate) fn header_frames(stream: u32, fields: &[(Vec<u8>, Vec<u8>)], end_stream: bool) -> Vec<u8> {
    let block = block(fields);
    let mut out = Vec::new();
    let mut parts = block.chunks(16_384).peekable();
    let mut kind = HEADERS;
    while let Some(part) = parts.next() {
        let mut flags = if kind == HEADERS && end_stream { END_STREAM } else { 0 };
        if parts.peek().is_none() {
            flags |= END_HEADERS;
        }
        out.extend_from_slice(&frame(kind, flags, stream, part));
        kind = CONTINUATION;
    }
    out
}

/// DATA frames for a body.
pub(crate) fn data_frames(stream: u32, body: &[u8], end_stream: bool) -> Vec<u8> {
    if body.is_empty() {
        return frame(DATA, if end_stream { END_STREAM } else { 0 }, stream, b"");
    }
    let mut out = Vec::new();
    let mut parts = body.chunks(16_384).peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none() && end_stream;
        out.extend_from_slice(&frame(DATA, if last { END_STREAM } else { 0 }, stream, part));
    }
    out
}

/// What came, decoded as far as the rig cares.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Headers {
        stream: u32,
        fields: Vec<String>,
        end: bool,
    },
    Data {
        stream: u32,
        body: Vec<u8>,
        end: bool,
    },
    Reset {
        stream: u32,
        code: u32,
    },
    GoAway {
        code: u32,
    },
    Settings,
    SettingsAck,
    Pong,
    /// The stream of bytes ended.
    Closed,
}

/// Reads frames, answers SETTINGS and PING, gives window back, and decodes header blocks.
pub(crate) struct Reader {
    hpack: Decoder<'static>,
    partial: Option<(u32, bool, Vec<u8>)>,
}

impl Reader {
    pub(crate) fn new() -> Self {
        Self { hpack: Decoder::with_dynamic_size(65_536), partial: None }
    }

    /// Reads one frame. Nothing is taken before all of it is there, so it may be cancelled.
    pub(crate) async fn frame(conn: &mut Conn) -> Option<Frame> {
        if !conn.need(9).await {
            return None;
        }
        let len = usize::from(conn.buf[0]) << 16 | usize::from(conn.buf[1]) << 8 | usize::from(conn.buf[2]);
        if !conn.need(9 + len).await {
            return None;
        }
        let head = conn.take(9);
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        Some(Frame { kind: head[3], flags: head[4], stream, payload: conn.take(len) })
    }

    /// Reads until something happens that a case could look at.
    pub(crate) async fn next(&mut self, conn: &mut Conn) -> Event {
        loop {
            let Some(frame) = Self::frame(conn).await else { return Event::Closed };
            if let Some(event) = self.on_frame(conn, frame).await {
                return event;
            }
        }
    }

    /// Decodes one frame, answering what wants an answer.
    pub(crate) async fn on_frame(&mut self, conn: &mut Conn, f: Frame) -> Option<Event> {
        let end = f.flags & END_STREAM != 0;
        match f.kind {
            HEADERS => {
                let mut payload = unpad(&f);
                if f.flags & PRIORITY != 0 {
                    payload.drain(..5.min(payload.len()));
                }
                self.partial = Some((f.stream, end, payload));
                self.block_done(f.flags)
            }
            CONTINUATION => {
                if let Some((_, _, block)) = &mut self.partial {
                    block.extend_from_slice(&f.payload);
                }
                self.block_done(f.flags)
            }
            DATA => {
                let n = f.payload.len() as u32;
                if n > 0 {
                    let mut out = frame(WINDOW_UPDATE, 0, 0, &n.to_be_bytes());
                    if !end {
                        out.extend_from_slice(&frame(WINDOW_UPDATE, 0, f.stream, &n.to_be_bytes()));
                    }
                    let _ = conn.send(&out).await;
                }
                Some(Event::Data { stream: f.stream, body: unpad(&f), end })
            }
            SETTINGS if f.flags & ACK != 0 => Some(Event::SettingsAck),
            SETTINGS => {
                let _ = conn.send(&frame(SETTINGS, ACK, 0, b"")).await;
                Some(Event::Settings)
            }
            PING if f.flags & ACK != 0 => Some(Event::Pong),
            PING => {
                let _ = conn.send(&frame(PING, ACK, 0, &f.payload)).await;
                None
            }
            RST_STREAM => Some(Event::Reset { stream: f.stream, code: word(&f.payload, 0) }),
            GOAWAY => Some(Event::GoAway { code: word(&f.payload, 4) }),
            _ => None,
        }
    }

    fn block_done(&mut self, flags: u8) -> Option<Event> {
        if flags & END_HEADERS == 0 {
            return None;
        }
        let (stream, end, mut block) = self.partial.take()?;
        let mut fields = Vec::new();
        if self.hpack.decode(&mut block, &mut fields).is_err() {
            return Some(Event::Closed);
        }
        let fields = fields.iter().map(|(n, v, _)| format!("{}: {}", latin1(n), latin1(v))).collect();
        Some(Event::Headers { stream, fields, end })
    }
}

fn unpad(f: &Frame) -> Vec<u8> {
    if f.flags & PADDED == 0 || f.payload.is_empty() {
        return f.payload.clone();
    }
    let pad = usize::from(f.payload[0]);
    let end = f.payload.len().saturating_sub(pad).max(1);
    f.payload[1..end].to_vec()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0] & 0x7f, b[1], b[2], b[3]]))
}
