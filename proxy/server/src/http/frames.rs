//! The transport of an HTTP/2 connection, with the frames that go by watched: limits that the HTTP/2 library does not
//! have, requests that it refuses by itself, and what it does not count.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use waystation_http::h2::{Flood, Frame, FrameGuard};
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::stats::Http2CodecStats;

use crate::http::end::StreamEnd;

/// The error code that stands for a malformed message (RFC 9113 section 8.1.1).
const PROTOCOL_ERROR: u32 = 1;

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
    /// The answer to a malformed message was held back, and the connection is to end.
    broken: Cell<bool>,
    ended: Cell<bool>,
    /// Streams of requests that the library refused, and why.
    refused: RefCell<Vec<(u32, StreamEnd)>>,
    peer_goes_away: Cell<bool>,
    /// The client resets too many streams before they have a response.
    resets: Cell<bool>,
}

impl Watch {
    pub(crate) fn new(guard: FrameGuard, stats: Http2CodecStats, strict: bool) -> Rc<Self> {
        Rc::new(Self {
            guard: RefCell::new(guard),
            stats,
            strict,
            flood: Cell::new(None),
            broken: Cell::new(false),
            ended: Cell::new(false),
            refused: RefCell::default(),
            peer_goes_away: Cell::new(false),
            resets: Cell::new(false),
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
        let untaken = self.guard.borrow().untaken();
        let end = || if malformed { self::malformed() } else { StreamEnd::DownstreamGone };
        refused.chain((0..untaken).map(|_| end())).collect()
    }

    /// Whether the answer to a malformed message was held back.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Ends the connection without another byte to the peer.
    pub(crate) fn end(&self) {
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

    /// Refuses to write the answer to a malformed message where the connection is to end instead.
    fn check<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
        if self.ended.get() {
            return Err(io::Error::other("ended"));
        }
        if self.strict && self.guard.borrow().would_refuse(pieces, PROTOCOL_ERROR) {
            // The library asks once more when it is told of the failure.
            if !self.broken.replace(true) {
                self.stats.rx_messaging_error().inc();
            }
            return Err(io::Error::other("malformed message"));
        }
        Ok(())
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
            Frame::Refusal { .. } | Frame::Trailers => {}
        });
    }
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
        this.watch.check([data])?;
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
        this.watch.check(slices.iter().map(|slice| &**slice))?;
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
