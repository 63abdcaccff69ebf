//! An upstream HTTP/1 connection.

use std::fmt;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use std::pin::Pin;
use tokio_util::io::poll_read_buf;
use waystation_filter_api::stream::Bytes as ByteCounts;
use waystation_http::Headers;
use waystation_http::h1::{self, After, ClientConn, Framing, Received, ResponseHead};

use super::HostPool;
use super::connect::{ConnectionGuard, UpstreamConnInfo};
use crate::http::end::ResetReason;
use crate::http::outbox::{Outbox, fields_size, first_line, header_lines};
use crate::transport::{Liveness, Transport};
use crate::worker::Worker;

/// Room that a read should find; below it the buffer grows or is replaced.
const READ_ROOM: usize = 4 * 1024;

/// One connection, carrying one request at a time. The task of the downstream stream drives it itself.
pub(crate) struct Http1 {
    pub(crate) transport: Transport,
    codec: ClientConn,
    input: BytesMut,
    out: Outbox,
    pub(crate) info: Rc<UpstreamConnInfo>,
    pub(crate) guard: ConnectionGuard,
    pub(crate) idle_since: Instant,
    /// Requests begun.
    pub(crate) requests: u32,
    /// `max_connection_duration`.
    expires: Option<Instant>,
    /// Bytes of header lines of the exchange under way.
    header_received: u64,
    header_sent: u64,
    /// The head of the response under way has been read.
    began: bool,
    /// It was an upgrade's or an accepted CONNECT's: what follows is the tunnel's.
    tunnel: bool,
    pool: Weak<HostPool>,
}

impl Http1 {
    pub(crate) fn new(
        transport: Transport,
        info: UpstreamConnInfo,
        guard: ConnectionGuard,
        config: Arc<h1::Config>,
        expires: Option<Instant>,
        pool: &Rc<HostPool>,
    ) -> Self {
        pool.opened_http1();
        Self {
            transport,
            codec: ClientConn::new(config),
            input: BytesMut::new(),
            out: Outbox::new(guard.cluster().buffer_limit),
            info: Rc::new(info),
            idle_since: guard.start(),
            guard,
            requests: 0,
            expires,
            header_received: 0,
            header_sent: 0,
            began: false,
            tunnel: false,
            pool: Rc::downgrade(pool),
        }
    }

    /// Whether an idle connection can take a request.
    #[inline]
    pub(crate) fn is_usable(&mut self, now: Instant) -> bool {
        if self.expires.is_some_and(|expires| now >= expires) {
            self.guard.cluster().stats.upstream_cx_max_duration_reached().inc();
            return false;
        }
        let alive = self.transport.liveness() == Liveness::Idle;
        self.guard.remote = !alive;
        alive
    }

    #[inline]
    pub(crate) fn send_head(&mut self, worker: &Worker, headers: &Headers, end: bool) {
        self.requests += 1;
        self.guard.active = true;
        self.began = false;
        self.out.give_buffer(|| worker.take_buffer());
        let codec = &mut self.codec;
        let sent = self.out.with_buffer(|buffer| {
            let before = buffer.len();
            codec.send_head(headers, end, buffer);
            header_lines(&buffer[before..])
        });
        (self.header_sent, self.header_received) = (sent, 0);
    }

    /// Header bytes and bytes on the wire of the exchange under way.
    pub(crate) fn bytes(&self) -> ByteCounts {
        let (received, sent) = self.guard.bytes();
        ByteCounts {
            header_received: self.header_received,
            header_sent: self.header_sent,
            wire_received: received,
            wire_sent: sent + self.out.waiting() as u64,
            ..ByteCounts::default()
        }
    }

    pub(crate) fn send_data(&mut self, data: Bytes) {
        let frame = self.codec.frame_data(data.len());
        self.out.push_framed(&frame, data);
    }

    pub(crate) fn send_end(&mut self, trailers: Option<&Headers>) {
        let codec = &mut self.codec;
        self.out.with_buffer(|buffer| match trailers {
            Some(trailers) => codec.send_trailers(trailers, buffer),
            None => codec.send_end(buffer),
        });
    }

    /// Whether more of the request may be sent now.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.out.has_room()
    }

    #[inline]
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        if self.out.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let mut sent = 0;
        let flushed = self.out.poll_flush(cx, &mut self.transport, &mut sent);
        self.guard.sent(sent);
        match ready!(flushed) {
            Ok(()) => Poll::Ready(Ok(())),
            // The answer may have come before the connection was closed: the read side says which it is.
            Err(_) => Poll::Ready(Err(ResetReason::ConnectionTermination)),
        }
    }

    /// The next event of the response.
    #[inline]
    pub(crate) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        worker: &Worker,
        headers: &mut Headers,
    ) -> Poll<Result<Received<ResponseHead>, ResetReason>> {
        loop {
            let waiting = self.input.len();
            let line = if self.began { 0 } else { first_line(&self.input) };
            match self.codec.receive(&mut self.input, headers) {
                Ok(Received::NeedMore) => {}
                Ok(received) => {
                    if let Received::Head(head) = &received {
                        let fields = headers.len() - 1 + usize::from(head.framing == Framing::Chunked);
                        self.header_received += fields_size(waiting - self.input.len(), line, fields);
                        self.began = !head.informational;
                        if self.began && !head.keep_alive {
                            self.guard.cluster().stats.upstream_cx_close_notify().inc();
                        }
                        self.tunnel = matches!(head.framing, Framing::Tunnel);
                    }
                    return Poll::Ready(Ok(received));
                }
                Err(_) => {
                    self.guard.cluster().stats.upstream_cx_protocol_error().inc();
                    return Poll::Ready(Err(ResetReason::ProtocolError));
                }
            }
            if self.input.capacity() == 0 {
                self.input = worker.take_buffer();
            }
            self.input.reserve(READ_ROOM);
            match poll_read_buf(Pin::new(&mut self.transport), cx, &mut self.input) {
                Poll::Pending => {
                    if self.input.is_empty() {
                        worker.give_buffer(std::mem::take(&mut self.input));
                    }
                    return Poll::Pending;
                }
                Poll::Ready(Ok(0)) => {
                    self.guard.remote = true;
                    // A head cut short is a violation, like a body; nothing at all is a lost connection. So is the end
                    // of a tunnel: Envoy has no half-close.
                    if self.tunnel {
                        return Poll::Ready(Err(ResetReason::ConnectionTermination));
                    }
                    let began = self.began || !self.input.is_empty();
                    return Poll::Ready(match self.codec.receive_eof() {
                        Ok(Received::NeedMore) => Err(ResetReason::ConnectionTermination),
                        Ok(received) => Ok(received),
                        Err(_) if began => Err(ResetReason::ProtocolError),
                        Err(_) => Err(ResetReason::ConnectionTermination),
                    });
                }
                Poll::Ready(Ok(count)) => self.guard.received(count),
                Poll::Ready(Err(_)) => {
                    self.guard.remote = true;
                    return Poll::Ready(Err(ResetReason::ConnectionTermination));
                }
            }
        }
    }

    /// Ends the exchange; whether the connection can carry another.
    #[inline]
    pub(crate) fn finish(&mut self, worker: &Worker) -> bool {
        self.guard.flush();
        let complete = self.codec.after_message() == After::KeepAlive && self.out.is_empty();
        let keep = complete && self.input.is_empty();
        if complete && !keep {
            // More than was asked for.
            self.guard.cluster().stats.upstream_cx_protocol_error().inc();
        }
        if keep {
            self.guard.active = false;
            worker.give_buffer(std::mem::take(&mut self.input));
            worker.give_buffer(self.out.take_buffer());
        }
        keep
    }

    /// The exchange is over and the response was complete, whatever becomes of the connection.
    pub(crate) fn mark_inactive(&mut self) {
        self.guard.active = false;
    }
}

impl Drop for Http1 {
    fn drop(&mut self) {
        self.guard.requests = self.requests;
        if let Some(pool) = self.pool.upgrade() {
            pool.closed_http1();
        }
    }
}

impl fmt::Debug for Http1 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http1")
            .field("info", &self.info)
            .field("requests", &self.requests)
            .finish_non_exhaustive()
    }
}
