//! The transport of an HTTP/2 connection, with the frames that go by watched: limits that the HTTP/2 library does not
//! have, requests that it refuses by itself, and what it does not count.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use waystation_http::h2::{Flood, Frame, FrameGuard, Refusing};
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::stats::Http2CodecStats;

use crate::http::end::StreamEnd;

/// The error code that stands for a malformed message (RFC 9113 section 8.1.1).
const PROTOCOL_ERROR: u32 = 1;

/// That of a stream beyond `max_concurrent_streams`.
const REFUSED_STREAM: u32 = 7;

/// A header name or value beyond this ends the connection: the bound of Envoy's codec.
pub(crate) const FIELD_LIMIT: usize = 64 * 1024;

/// The details of a head that is larger than `max_request_headers_kb`.
pub(crate) const TOO_LARGE: &str = "http2.header_list_size_too_large";

/// The library does not say what was wrong with a request that it refused; nearly always, and with every header field that
/// a client could want to smuggle, it is a field.
fn malformed() -> StreamEnd {
    StreamEnd::DownstreamViolation("http2.invalid.header.field")
}

/// What the frames of one connection have come to.
pub(crate) struct Watch {
    guard: RefCell<FrameGuard>,
    pub(crate) stats: Http2CodecStats,
    /// Whether a malformed message ends the connection, without an answer.
    strict: bool,
    flood: Cell<Option<Flood>>,
    /// The answer to the malformed message on this stream was held back, and the connection is to end.
    broken: Cell<Option<u32>>,
    /// The connection is to end because of what the peer has sent.
    cut: Cell<bool>,
    /// Nothing more is written.
    ended: Cell<bool>,
    /// Streams of requests that the library refused, and why.
    refused: RefCell<Vec<(u32, StreamEnd)>>,
    peer_goes_away: Cell<bool>,
    /// The client resets too many streams before they have a response.
    resets: Cell<bool>,
    /// Requests that were not handed out when the end of the peer's bytes was seen last.
    untaken_at_end: Cell<usize>,
}

impl Watch {
    pub(crate) fn new(guard: FrameGuard, stats: Http2CodecStats, strict: bool) -> Rc<Self> {
        Rc::new(Self {
            guard: RefCell::new(guard),
            stats,
            strict,
            flood: Cell::new(None),
            broken: Cell::new(None),
            cut: Cell::new(false),
            ended: Cell::new(false),
            refused: RefCell::default(),
            peer_goes_away: Cell::new(false),
            resets: Cell::new(false),
            untaken_at_end: Cell::new(usize::MAX),
        })
    }

    /// The library has handed out the request on this stream.
    pub(crate) fn taken(&self, stream: u32) {
        if !self.guard.borrow_mut().taken(stream) {
            // It does so after it has reset it, too, when what was wrong came behind the head.
            self.refused.borrow_mut().retain(|(refused, _)| *refused != stream);
        }
    }

    /// A request that the library has refused; to be asked when it has none to hand out.
    pub(crate) fn take_refused(&self) -> Option<StreamEnd> {
        self.refused.borrow_mut().pop().map(|(_, end)| end)
    }

    /// The same for all once the connection is over: those that will not be handed out any more count too. They are
    /// malformed when that is why it is over; else the client has left before its request was looked at.
    pub(crate) fn take_all_refused(&self, malformed: bool) -> Vec<StreamEnd> {
        let refused = self.refused.take().into_iter().map(|(_, end)| end);
        let guard = self.guard.borrow();
        let end = |stream| match self.broken.get() {
            // The others on the connection only go down with it.
            Some(broken) if broken != stream => cut_off(),
            _ if malformed => self::malformed(),
            _ => StreamEnd::DownstreamGone,
        };
        let (first, others): (Vec<u32>, _) =
            guard.untaken().partition(|stream| self.broken.get() == Some(*stream));
        refused.chain(first.into_iter().chain(others).map(end)).collect()
    }

    /// Whether the end of the peer's bytes must wait: told of it, the library hands out no request that came before. It
    /// waits as long as they become fewer; what never comes whole is not waited for.
    fn holds_end(&self) -> bool {
        let untaken = self.guard.borrow().untaken().len();
        untaken > 0 && untaken < self.untaken_at_end.replace(untaken)
    }

    /// Whether it is a request that ends the connection.
    pub(crate) fn is_cut_by_request(&self) -> bool {
        self.ended.get() || self.broken.get().is_some()
    }

    /// Whether the connection is to end because of what the peer has sent.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.get()
    }

    /// What the peer has sent ends the connection.
    pub(crate) fn cut(&self) {
        self.cut.set(true);
    }

    /// Ends the connection for that without another byte to the peer.
    pub(crate) fn end(&self) {
        self.cut();
        self.ended.set(true);
    }

    /// The flood that the peer has begun: nothing more is read from it. What came before has still reached the library.
    pub(crate) fn flood(&self) -> Option<Flood> {
        self.flood.get()
    }

    /// The connection is to end, for its client has reset too many streams.
    pub(crate) fn reset_too_often(&self) {
        self.resets.set(true);
    }

    /// Whether that is so.
    pub(crate) fn has_reset_too_often(&self) -> bool {
        self.resets.get()
    }

    /// Whether the peer has sent GOAWAY.
    pub(crate) fn peer_goes_away(&self) -> bool {
        self.peer_goes_away.get()
    }

    fn received(&self, bytes: &[u8]) {
        let received = self.guard.borrow_mut().received(bytes, |frame| match frame {
            Frame::Reset => self.stats.rx_reset().inc(),
            Frame::Trailers => self.stats.trailers().inc(),
            Frame::GoAway => self.peer_goes_away.set(true),
            Frame::Refusal { .. } | Frame::Answer { .. } => {}
        });
        if let Err(flood) = received {
            match flood {
                Flood::Empty => self.stats.inbound_empty_frames_flood(),
                Flood::Priority => self.stats.inbound_priority_frames_flood(),
                Flood::WindowUpdate => self.stats.inbound_window_update_frames_flood(),
            }
            .inc();
            self.flood.set(Some(flood));
        }
    }

    /// Refuses to write the answer to a malformed message where the connection is to end instead; how much may be
    /// written before it.
    fn check<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<Option<usize>> {
        if self.ended.get() {
            return Err(io::Error::other("ended"));
        }
        if !self.strict {
            return Ok(None);
        }
        match self.guard.borrow().would_refuse(pieces, PROTOCOL_ERROR) {
            None => Ok(None),
            Some(Refusing { stream, at: 0 }) => {
                self.cut();
                // The library asks once more when it is told of the failure.
                if self.broken.replace(Some(stream)).is_none() {
                    self.stats.rx_messaging_error().inc();
                }
                Err(io::Error::other("malformed message"))
            }
            Some(Refusing { at, .. }) => Ok(Some(at)),
        }
    }

    fn sent(&self, bytes: &[u8]) {
        self.guard.borrow_mut().sent(bytes, |frame| match frame {
            Frame::Reset => self.stats.tx_reset().inc(),
            Frame::GoAway => self.stats.goaway_sent().inc(),
            Frame::Refusal { stream, code: PROTOCOL_ERROR } => {
                self.stats.rx_messaging_error().inc();
                self.refused.borrow_mut().push((stream, malformed()));
            }
            Frame::Answer { stream } => {
                self.stats.header_list_size_too_large().inc();
                self.refused.borrow_mut().push((stream, StreamEnd::HeadRefused(TOO_LARGE)));
            }
            Frame::Refusal { code: REFUSED_STREAM, .. } => self.stats.stream_refused_errors().inc(),
            Frame::Refusal { .. } | Frame::Trailers => {}
        });
    }
}

/// The end of a stream whose connection is to end because of what the client has sent on another.
pub(crate) fn cut_off() -> StreamEnd {
    StreamEnd::DownstreamViolation("codec_error:The_user_callback_function_failed")
}

/// A transport whose frames are watched.
pub(crate) struct Watched<T> {
    io: T,
    watch: Rc<Watch>,
    /// Whose `upstream_cx_*_bytes_total` count the bytes.
    cluster: Option<Rc<ClusterRef>>,
}

impl<T> Watched<T> {
    pub(crate) fn downstream(io: T, watch: Rc<Watch>) -> Self {
        Self { io, watch, cluster: None }
    }

    pub(crate) fn upstream(io: T, watch: Rc<Watch>, cluster: Rc<ClusterRef>) -> Self {
        Self { io, watch, cluster: Some(cluster) }
    }

    fn count_sent(&self, count: usize) {
        if let Some(cluster) = &self.cluster {
            cluster.stats.upstream_cx_tx_bytes_total().add(count as u64);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Whoever drives the connection sees the flood, and ends it when the library has handed out what it has.
        if this.watch.flood.get().is_some() {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buffer))?;
        let arrived = &buffer.filled()[before..];
        if arrived.is_empty() && this.watch.holds_end() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(cluster) = &this.cluster {
            cluster.stats.upstream_cx_rx_bytes_total().add(arrived.len() as u64);
        }
        this.watch.received(arrived);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let data = match this.watch.check([data])? {
            Some(allowed) => &data[..allowed],
            None => data,
        };
        let count = ready!(Pin::new(&mut this.io).poll_write(cx, data))?;
        this.count_sent(count);
        this.watch.sent(&data[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Some(allowed) = this.watch.check(slices.iter().map(|slice| &**slice))? {
            // So rare that one piece at a time will do; an empty one would look like the end.
            let first = slices.iter().find(|slice| !slice.is_empty());
            let first = first.map_or(&[][..], |slice| &slice[..slice.len().min(allowed)]);
            return Pin::new(this).poll_write(cx, first);
        }
        let count = ready!(Pin::new(&mut this.io).poll_write_vectored(cx, slices))?;
        this.count_sent(count);
        let mut left = count;
        for slice in slices {
            let part = left.min(slice.len());
            this.watch.sent(&slice[..part]);
            left -= part;
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
