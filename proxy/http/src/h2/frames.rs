//! HTTP/2 frames seen from beside the codec: their heads only, in both directions of one connection.
//!
//! The HTTP/2 library bounds what costs it memory; Envoy also cuts off peers whose frames carry nothing (RFC 9113
//! section 10.5), and counts frames that the library does not report. [`FrameGuard`] sees the bytes go by, looks at nine of
//! each frame and skips the rest.

use std::collections::VecDeque;

/// Frame types (RFC 9113 section 6).
mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const PRIORITY: u8 = 2;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const CONTINUATION: u8 = 9;
}

const END_STREAM: u8 = 1;
const PADDED: u8 = 8;

/// Bytes before the first frame of a client (RFC 9113 section 3.4).
const PREFACE: u32 = 24;

/// Streams that a peer has begun and the library has not handed out. It hands them out as soon as it is asked, so that only
/// those are left which it deals with itself; more than these are forgotten, the oldest first.
const UNTAKEN: usize = 1024;

/// What a peer may send that carries nothing; Envoy's names and defaults.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FrameLimits {
    /// `max_consecutive_inbound_frames_with_empty_payload`.
    pub empty_frames: u32,
    /// `max_inbound_priority_frames_per_stream`.
    pub priority_frames: u32,
    /// `max_inbound_window_update_frames_per_data_frame_sent`.
    pub window_updates: u32,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self { empty_frames: 1, priority_frames: 100, window_updates: 10 }
    }
}

/// A limit that a peer has exceeded.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Flood {
    /// Frames without payload.
    #[error("too many consecutive frames with an empty payload")]
    Empty,
    /// PRIORITY.
    #[error("too many PRIORITY frames")]
    Priority,
    /// WINDOW_UPDATE.
    #[error("too many WINDOW_UPDATE frames")]
    WindowUpdate,
}

/// A frame that somebody counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Frame {
    /// RST_STREAM.
    Reset,
    /// HEADERS of a request that has begun before: its trailers.
    Trailers,
    /// GOAWAY.
    GoAway,
    /// The library resets a request that it has not handed out: it is malformed, or one too many.
    Refusal {
        /// The stream, which may be handed out yet.
        stream: u32,
        /// The error code.
        code: u32,
    },
    /// The library answers such a request itself: its head is far too large.
    Answer {
        /// The stream.
        stream: u32,
    },
}

/// A frame about to be sent that refuses a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Refusing {
    /// The request's stream.
    pub stream: u32,
    /// How many of the bytes come before it.
    pub at: usize,
}

/// Both directions of one connection.
#[derive(Debug)]
pub struct FrameGuard {
    limits: FrameLimits,
    is_server: bool,
    inbound: Scanner,
    outbound: Scanner,
    /// The highest stream that the client has begun, and how many it has.
    last_stream: u32,
    streams: u64,
    empty_frames: u32,
    priority_frames: u64,
    window_updates: u64,
    data_frames_sent: u64,
    untaken: VecDeque<u32>,
}

impl FrameGuard {
    /// The server's end of a connection, from its first byte.
    pub fn server(limits: FrameLimits) -> Self {
        Self::new(limits, true)
    }

    /// The client's end.
    pub fn client(limits: FrameLimits) -> Self {
        Self::new(limits, false)
    }

    fn new(limits: FrameLimits, is_server: bool) -> Self {
        let (inbound, outbound) = if is_server { (PREFACE, 0) } else { (0, PREFACE) };
        Self {
            limits,
            is_server,
            inbound: Scanner::after(inbound),
            outbound: Scanner::after(outbound),
            last_stream: 0,
            streams: 0,
            empty_frames: 0,
            priority_frames: 0,
            window_updates: 0,
            data_frames_sent: 0,
            untaken: VecDeque::new(),
        }
    }

    /// Bytes that have arrived.
    ///
    /// # Errors
    /// The limit that they exceed; the connection must be closed.
    #[inline]
    pub fn received(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Frame)) -> Result<(), Flood> {
        while let Some(head) = self.inbound.next(&mut bytes) {
            match head.kind {
                kind::DATA | kind::HEADERS | kind::CONTINUATION => {
                    let is_last = head.kind != kind::CONTINUATION && head.flags & END_STREAM != 0;
                    self.empty_frames = if head.is_empty() && !is_last { self.empty_frames + 1 } else { 0 };
                    if head.kind == kind::HEADERS && self.is_server {
                        if head.stream > self.last_stream {
                            self.begin(head.stream);
                        } else {
                            seen(Frame::Trailers);
                        }
                    }
                    if self.empty_frames > self.limits.empty_frames {
                        return Err(Flood::Empty);
                    }
                }
                kind::PRIORITY => {
                    self.priority_frames += 1;
                    if self.priority_frames > u64::from(self.limits.priority_frames) * (1 + self.streams) {
                        return Err(Flood::Priority);
                    }
                }
                kind::WINDOW_UPDATE => {
                    self.window_updates += 1;
                    let per_data = u64::from(self.limits.window_updates);
                    if self.window_updates > 5 + 2 * (self.streams + per_data * self.data_frames_sent) {
                        return Err(Flood::WindowUpdate);
                    }
                }
                kind::RST_STREAM => {
                    self.taken(head.stream);
                    seen(Frame::Reset);
                }
                kind::GOAWAY => seen(Frame::GoAway),
                _ => {}
            }
        }
        Ok(())
    }

    /// Bytes that have been sent.
    #[inline]
    pub fn sent(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Frame)) {
        while let Some(head) = self.outbound.next(&mut bytes) {
            match head.kind {
                kind::DATA => self.data_frames_sent += 1,
                kind::HEADERS if !self.is_server && head.stream > self.last_stream => {
                    self.last_stream = head.stream;
                    self.streams += 1;
                }
                kind::HEADERS if self.taken(head.stream) => seen(Frame::Answer { stream: head.stream }),
                kind::RST_STREAM => {
                    seen(Frame::Reset);
                    if self.taken(head.stream) {
                        seen(Frame::Refusal { stream: head.stream, code: head.extra });
                    }
                }
                kind::GOAWAY => seen(Frame::GoAway),
                _ => {}
            }
        }
    }

    /// The frame in `pieces`, which are about to be sent, that refuses a request that was not handed out with this error
    /// code, if there is one; they may refuse others with other codes before it.
    #[inline]
    pub fn would_refuse<'a>(
        &self,
        pieces: impl IntoIterator<Item = &'a [u8]>,
        code: u32,
    ) -> Option<Refusing> {
        if self.untaken.is_empty() {
            return None;
        }
        let mut outbound = self.outbound;
        let mut passed = 0;
        for piece in pieces {
            let mut bytes = piece;
            loop {
                // A head that an earlier write has begun is too late to be held back whole.
                let begins = match outbound.have {
                    0 => passed + piece.len() - bytes.len() + bytes.len().min(outbound.skip as usize),
                    have => (passed + piece.len() - bytes.len()).saturating_sub(have),
                };
                let Some(head) = outbound.next(&mut bytes) else { break };
                let is_reset = head.kind == kind::RST_STREAM && head.extra == code;
                if is_reset && self.untaken.contains(&head.stream) {
                    return Some(Refusing { stream: head.stream, at: begins });
                }
            }
            passed += piece.len();
        }
        None
    }

    fn begin(&mut self, stream: u32) {
        self.last_stream = stream;
        self.streams += 1;
        if self.untaken.len() == UNTAKEN {
            self.untaken.pop_front();
        }
        self.untaken.push_back(stream);
    }

    /// The library has handed out the request on this stream, or it is gone. `false` when that was known.
    pub fn taken(&mut self, stream: u32) -> bool {
        let place = self.untaken.iter().position(|untaken| *untaken == stream);
        place.and_then(|place| self.untaken.remove(place)).is_some()
    }

    /// Streams of requests that have begun and were not handed out.
    pub fn untaken(&self) -> impl ExactSizeIterator<Item = u32> {
        self.untaken.iter().copied()
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Head {
    length: u32,
    kind: u8,
    flags: u8,
    stream: u32,
    /// The length of the padding of a padded frame; the code of RST_STREAM.
    extra: u32,
}

impl Head {
    /// Whether there is no payload but padding.
    fn is_empty(self) -> bool {
        match self.kind != kind::CONTINUATION && self.flags & PADDED != 0 {
            true => self.length <= 1 + self.extra,
            false => self.length == 0,
        }
    }

    /// How many bytes of payload [`Head::extra`] needs.
    fn extra_length(kind: u8, flags: u8, length: u32) -> usize {
        match kind {
            kind::RST_STREAM if length == 4 => 4,
            kind::DATA | kind::HEADERS if flags & PADDED != 0 && length > 0 => 1,
            _ => 0,
        }
    }
}

/// Finds the heads of frames in a stream of bytes.
#[derive(Clone, Copy, Debug)]
struct Scanner {
    /// The beginning of a frame, as far as it has come: its head, and what of its payload is looked at.
    start: [u8; Self::HEAD + 4],
    have: usize,
    /// Bytes that are of no interest.
    skip: u32,
}

impl Scanner {
    const HEAD: usize = 9;

    fn after(skip: u32) -> Self {
        Self { start: [0; Self::HEAD + 4], have: 0, skip }
    }

    /// Takes bytes up to and including the next head; `None` when they are used up.
    #[inline]
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        let skip = bytes.len().min(self.skip as usize);
        self.skip -= skip as u32;
        *bytes = &bytes[skip..];
        if !self.fill(Self::HEAD, bytes) {
            return None;
        }
        let [a, b, c, kind, flags, s0, s1, s2, s3, ..] = self.start;
        let length = u32::from_be_bytes([0, a, b, c]);
        let extra_length = Head::extra_length(kind, flags, length);
        if !self.fill(Self::HEAD + extra_length, bytes) {
            return None;
        }
        self.have = 0;
        self.skip = length - extra_length as u32;
        // The first bit is reserved.
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        let [.., e0, e1, e2, e3] = self.start;
        let extra = match extra_length {
            4 => u32::from_be_bytes([e0, e1, e2, e3]),
            1 => u32::from(e0),
            _ => 0,
        };
        Some(Head { length, kind, flags, stream, extra })
    }

    fn fill(&mut self, want: usize, bytes: &mut &[u8]) -> bool {
        let take = want.saturating_sub(self.have).min(bytes.len());
        self.start[self.have..self.have + take].copy_from_slice(&bytes[..take]);
        self.have += take;
        *bytes = &bytes[take..];
        self.have >= want
    }
}

#[cfg(test)]
mod tests;
