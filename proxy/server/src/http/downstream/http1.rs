//! A downstream HTTP/1 connection: one task, one stream at a time, buffers only while something is under way.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWrite as _;
use tokio_util::io::poll_read_buf;
use waystation_filter_api::stream::{Bytes as ByteCounts, Protocol};
use waystation_http::h1::{self, After, Framing, Received, RequestHead, ServerConn, Version};
use waystation_http::{Headers, Known};

use super::{Cut, Downstream, FORCED_GOAWAY, HeadFacts, OpenCodec, Piece};
use crate::http::ConnCx;
use crate::http::end::StreamEnd;
use crate::http::outbox::{Outbox, fields_size, first_line, header_lines};
use crate::http::stream::{self, Begin};
use crate::http::timer::{Timer, after, earliest};
use crate::overload::{Dispatch, Overload};
use crate::transport::Transport;
use crate::worker::Worker;

/// Room that a read should find.
const READ_ROOM: usize = 4 * 1024;

/// Bytes of pipelined requests read ahead while a response is under way.
const PIPELINE: usize = 64 * 1024;

/// The connection.
pub(crate) struct Http1 {
    transport: Transport,
    codec: ServerConn,
    input: BytesMut,
    out: Outbox,
    worker: Rc<Worker>,
    bytes: ByteCounts,
    /// Bytes on the wire that are not in the statistics yet.
    wire_in: u64,
    wire_out: u64,
    /// How much of `input` was there before the request under way, and is in the statistics.
    carried: u64,
    /// How much was read while a complete request was being answered.
    ahead: u64,
    /// The client has closed its side.
    eof: bool,
    /// The connection is of no further use.
    broken: bool,
    buffer_limit: usize,
    /// The overload manager, where it bears on this connection.
    overload: Option<Arc<Overload>>,
    /// The next response is to be the last.
    drain: bool,
}

/// Why waiting for a request ended.
enum Next {
    Head(RequestHead),
    Refused(h1::Error),
    /// The head did not come in time.
    Late(StreamEnd),
    /// The overload manager refuses to look at it.
    Aborted,
    /// It ends the connection where it stands.
    ForcedClose,
    Idle,
    MaxDuration,
    /// The drain time is over.
    Drained,
    Closed,
}

/// Serves a connection to its end.
pub(crate) async fn serve(cx: &ConnCx, transport: Transport, input: BytesMut) {
    let hcm = &cx.hcm;
    let stats = &hcm.stats.hcm;
    let (total, active) = (stats.downstream_cx_http1_total(), stats.downstream_cx_http1_active());
    let mut open = OpenCodec::new(stats, total, active);
    let mut connection = Http1 {
        transport,
        codec: ServerConn::new(Arc::clone(&hcm.http1)),
        wire_in: input.len() as u64,
        input,
        out: Outbox::new(hcm.buffer_limit),
        worker: Rc::clone(&cx.worker),
        bytes: ByteCounts::default(),
        wire_out: 0,
        carried: 0,
        ahead: 0,
        eof: false,
        broken: false,
        buffer_limit: PIPELINE,
        overload: hcm.overload.clone(),
        drain: false,
    };
    let mut timer = Timer::default();
    let expires = hcm.timeouts.connection_end(cx.info.start, cx.worker.random());
    // The task stays the same for the life of the connection.
    let _wait = cx.wait_for_overload().await;
    let mut served = 0_u32;
    // Since the connection is idle or old: until when a request that is on its way is still answered.
    let mut draining = None;
    loop {
        let mut scratch = None;
        let next = match draining {
            None => connection.next_request(cx, &mut timer, &mut scratch, expires, false).await,
            Some(until) => connection.next_request(cx, &mut timer, &mut scratch, until, true).await,
        };
        let mut scratch = match scratch {
            Some(scratch) => scratch,
            None => cx.worker.take_scratch(),
        };
        let now = timer.now();
        let begin = match next {
            Next::Head(head) => {
                served += 1;
                if head.dropped_headers > 0 {
                    let codec = cx.worker.shared.codecs.http1();
                    codec.dropped_headers_with_underscores().add(head.dropped_headers.into());
                }
                let facts = HeadFacts {
                    protocol: match head.version {
                        Version::Http10 => Protocol::Http10,
                        Version::Http11 => Protocol::Http11,
                    },
                    end: head.framing.is_end_stream(),
                    tunnel: matches!(head.framing, Framing::Tunnel),
                    expect_continue: head.expect_continue,
                };
                Begin { start: now, facts, refused: None }
            }
            Next::Refused(error) => {
                match error {
                    h1::Error::HeadersTooLarge | h1::Error::TooManyHeaders => {
                        stats.downstream_rq_too_large().inc();
                    }
                    h1::Error::UnexpectedUnderscore => {
                        let codec = cx.worker.shared.codecs.http1();
                        codec.requests_rejected_with_underscores_in_headers().inc();
                    }
                    _ => {}
                }
                let refused = match error {
                    h1::Error::LowVersion => StreamEnd::LowVersion,
                    error => StreamEnd::Codec {
                        status: error.status(),
                        body: error.body(),
                        details: error.details(),
                    },
                };
                // Nobody has seen the request, and nobody reads on.
                scratch.request.clear();
                connection.input.clear();
                Begin::refused(now, refused)
            }
            Next::Late(end) => {
                if matches!(end, StreamEnd::RequestHeaderTimeout) {
                    stats.downstream_rq_header_timeout().inc();
                }
                Begin::refused(now, end)
            }
            Next::Aborted => {
                scratch.request.clear();
                connection.input.clear();
                Begin::refused(now, StreamEnd::DispatchAborted)
            }
            Next::ForcedClose => break,
            Next::Idle | Next::MaxDuration => {
                match next {
                    Next::Idle => stats.downstream_cx_idle_timeout().inc(),
                    _ => stats.downstream_cx_max_duration_reached().inc(),
                }
                draining = Some(hcm.timeouts.drain_end(now, cx.worker.random()).or(Some(now)));
                cx.worker.give_scratch(scratch);
                continue;
            }
            Next::Drained => {
                connection.close(cx, &mut timer, true).await;
                break;
            }
            // A request whose head never came whole is still a request to the access log.
            Next::Closed if !connection.input.is_empty() => Begin::refused(now, StreamEnd::DownstreamGone),
            Next::Closed => break,
        };
        let refused = begin.refused.is_some();
        let drain_close = cx.drain.should_close(now, cx.worker.random());
        let full = hcm.max_requests_per_connection.is_some_and(|max| served >= max);
        if full {
            stats.downstream_cx_max_requests_reached().inc();
        }
        if drain_close {
            stats.downstream_cx_drain_close().inc();
        }
        if drain_close || full || refused || draining.is_some() || connection.drain {
            connection.codec.close_after_response();
        }
        // The stream's state is most of what a connection would hold: an idle one does without it, for one allocation of
        // a size that the allocator has at hand.
        Box::pin(stream::serve(cx, &mut connection, &mut timer, &mut scratch, begin)).await;
        cx.worker.give_scratch(scratch);
        connection.count_bytes(cx);
        if connection.broken || connection.codec.after_message() == After::Close || refused {
            let delayed = refused || connection.broken || !connection.codec.is_request_complete();
            connection.close(cx, &mut timer, delayed).await;
            break;
        }
        // Nothing is owed to anyone: the buffers serve other connections.
        if connection.input.is_empty() {
            cx.worker.give_buffer(std::mem::take(&mut connection.input));
        }
        if connection.out.is_empty() {
            cx.worker.give_buffer(connection.out.take_buffer());
        }
    }
    connection.count_bytes(cx);
    open.by_peer = connection.eof;
}

/// How soon after its first byte a head must be complete, and how its request ends otherwise. To Envoy it is a stream from
/// that byte on, which has not been active since.
fn late_head(cx: &ConnCx) -> Option<(Duration, StreamEnd)> {
    let timeouts = &cx.hcm.timeouts;
    let request_complete = false;
    let limits = [
        (timeouts.request_headers, StreamEnd::RequestHeaderTimeout),
        (cx.stream_idle_timeout(), StreamEnd::StreamIdleTimeout { request_complete }),
        (timeouts.request, StreamEnd::RequestTimeout),
        (timeouts.max_stream_duration, StreamEnd::MaxStreamDuration { request_complete }),
    ];
    limits.into_iter().filter_map(|(limit, end)| Some((limit?, end))).min_by_key(|(limit, _)| *limit)
}

impl Http1 {
    /// Waits for the next request head, no longer than until `expires`: the end of the connection's days or, if it is
    /// `draining`, of the drain time. The stream's memory is taken only once something has arrived. Draining does not
    /// end the wait: a request may be on its way, and HTTP/1 has no other notice than a response with `connection: close`.
    /// Who stays silent is closed with the listener.
    async fn next_request(
        &mut self,
        cx: &ConnCx,
        timer: &mut Timer,
        scratch: &mut Option<Box<stream::Scratch>>,
        expires: Option<Instant>,
        draining: bool,
    ) -> Next {
        let since = timer.now();
        let mut head_by = None;
        // What came with the connection, or behind the request before, is dispatched now.
        let mut fresh = !self.input.is_empty();
        self.bytes = ByteCounts::default();
        std::future::poll_fn(|task| {
            loop {
                if std::mem::take(&mut fresh)
                    && let Some(next) = self.dispatch()
                {
                    return Poll::Ready(next);
                }
                if !self.input.is_empty() {
                    let scratch = scratch.get_or_insert_with(|| cx.worker.take_scratch());
                    let (waiting, line) = (self.input.len(), first_line(&self.input));
                    match self.codec.receive(&mut self.input, &mut scratch.request) {
                        Ok(Received::Head(head)) => {
                            // With what the codec has taken off, or made a pseudo-header of.
                            let request = &scratch.request;
                            let chunked = usize::from(head.framing == Framing::Chunked);
                            let host = usize::from(request.contains(Known::Authority));
                            let fields = request.iter_regular().len() + host + chunked;
                            let size = waiting - self.input.len();
                            self.bytes.header_received = fields_size(size, line, fields);
                            return Poll::Ready(Next::Head(head));
                        }
                        // Between messages there is nothing else that could be complete.
                        Ok(_) => {}
                        Err(error) => return Poll::Ready(Next::Refused(error)),
                    }
                    if head_by.is_none() {
                        head_by = late_head(cx).and_then(|(limit, _)| after(timer.now(), Some(limit)));
                    }
                }
                match self.poll_fill(task) {
                    Poll::Ready(Ok(true)) => {
                        fresh = true;
                        continue;
                    }
                    Poll::Ready(_) => return Poll::Ready(Next::Closed),
                    Poll::Pending => {}
                }
                if self.input.is_empty() {
                    self.worker.give_buffer(std::mem::take(&mut self.input));
                }
                let expires = if draining { expires } else { cx.connection_end(expires) };
                let idle = after(since, cx.idle_timeout()).filter(|_| !draining);
                let waiting_by = if self.input.is_empty() { earliest(idle, expires) } else { head_by };
                if timer.poll(task, waiting_by).is_pending() {
                    return Poll::Pending;
                }
                let late = late_head(cx).filter(|_| !self.input.is_empty());
                return Poll::Ready(if let Some((_, end)) = late {
                    Next::Late(end)
                } else if draining {
                    Next::Drained
                } else if expires.is_some_and(|expires| Instant::now() >= expires) {
                    Next::MaxDuration
                } else {
                    Next::Idle
                });
            }
        })
        .await
    }

    /// What the overload manager makes of bytes that have come.
    fn dispatch(&mut self) -> Option<Next> {
        let overload = self.overload.as_deref()?;
        let random = || self.worker.random();
        match overload.dispatch(random) {
            Dispatch::Close => return Some(Next::ForcedClose),
            Dispatch::Drain => self.drain = true,
            Dispatch::Go => {}
        }
        let point = overload.http1_abort_dispatch.as_deref();
        point.is_some_and(|point| point.sheds(random)).then_some(Next::Aborted)
    }

    /// Reads once. `false` is the end.
    #[inline]
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, ()>> {
        if self.input.capacity() == 0 {
            self.input = self.worker.take_buffer();
        }
        self.input.reserve(READ_ROOM);
        match ready!(poll_read_buf(Pin::new(&mut self.transport), cx, &mut self.input)) {
            Ok(0) => {
                self.eof = true;
                Poll::Ready(Ok(false))
            }
            Ok(count) => {
                self.wire_in += count as u64;
                Poll::Ready(Ok(true))
            }
            Err(_) => {
                self.eof = true;
                self.broken = true;
                Poll::Ready(Err(()))
            }
        }
    }

    fn count_bytes(&mut self, cx: &ConnCx) {
        let stats = &cx.hcm.stats.hcm;
        stats.downstream_cx_rx_bytes_total().add(std::mem::take(&mut self.wire_in));
        stats.downstream_cx_tx_bytes_total().add(std::mem::take(&mut self.wire_out));
        self.carried = self.input.len() as u64;
        self.ahead = 0;
    }

    /// Ends the connection. Where the request was read to its end, by shutting the write side down at once; else
    /// `delayed`: the client has a moment (`delayed_close_timeout`) to read the response and to leave by itself. What it
    /// sends meanwhile is read, or the kernel would reset the connection over it, and the response might be lost.
    async fn close(&mut self, cx: &ConnCx, timer: &mut Timer, delayed: bool) {
        if self.eof && self.out.is_empty() {
            return;
        }
        let delay = cx.hcm.timeouts.delayed_close;
        let delayed = delayed && delay.is_some();
        // Whoever is done first has closed it: what the client does in answer to our end does not count.
        let gone = self.eof;
        let mut until = after(Instant::now(), delay);
        let mut shut = false;
        let expired = std::future::poll_fn(|task| {
            let mut sent = 0;
            match self.out.poll_flush(task, &mut self.transport, &mut sent) {
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Ready(Ok(())) if !delayed && !shut => {
                    match Pin::new(&mut self.transport).poll_shutdown(task) {
                        Poll::Ready(Err(_)) => return Poll::Ready(false),
                        Poll::Ready(Ok(())) => shut = true,
                        Poll::Pending => {}
                    }
                }
                _ => {}
            }
            if sent > 0 {
                self.wire_out += sent;
                until = after(Instant::now(), delay);
            }
            if shut && delay.is_none() {
                return Poll::Ready(false);
            }
            loop {
                self.input.clear();
                match self.poll_fill(task) {
                    Poll::Ready(Ok(true)) => {}
                    Poll::Ready(_) => return Poll::Ready(false),
                    Poll::Pending => break,
                }
            }
            timer.poll(task, until).map(|()| true)
        })
        .await;
        if !delayed {
            self.eof = gone;
        } else if expired {
            cx.hcm.stats.hcm.downstream_cx_delayed_close_timeout().inc();
            let _ =
                std::future::poll_fn(|task| Poll::Ready(Pin::new(&mut self.transport).poll_shutdown(task)))
                    .await;
        }
    }
}

impl Downstream for Http1 {
    fn poll_piece(&mut self, cx: &mut Context<'_>, trailers: &mut Headers) -> Poll<Result<Piece, StreamEnd>> {
        self.ahead = 0;
        loop {
            let received = if self.eof {
                self.codec.receive_eof()
            } else {
                self.codec.receive(&mut self.input, trailers)
            };
            match received {
                Ok(Received::Data(data)) => {
                    self.bytes.body_received += data.len() as u64;
                    return Poll::Ready(Ok(Piece::Data(data)));
                }
                Ok(Received::Trailers) => return Poll::Ready(Ok(Piece::Trailers)),
                Ok(Received::End) => return Poll::Ready(Ok(Piece::End)),
                Ok(Received::NeedMore | Received::Head(_)) if self.eof => {
                    return Poll::Ready(Err(StreamEnd::DownstreamGone));
                }
                Ok(Received::NeedMore | Received::Head(_)) => {}
                Err(_) if self.eof => return Poll::Ready(Err(StreamEnd::DownstreamGone)),
                Err(error) => {
                    return Poll::Ready(Err(StreamEnd::Codec {
                        status: error.status(),
                        body: error.body(),
                        details: error.details(),
                    }));
                }
            }
            if ready!(self.poll_fill(cx)).is_err() {
                return Poll::Ready(Err(StreamEnd::DownstreamGone));
            }
            match self.dispatch() {
                Some(Next::Aborted) => return Poll::Ready(Err(StreamEnd::DispatchAborted)),
                Some(_) => return Poll::Ready(Err(StreamEnd::ConnectionAborted(FORCED_GOAWAY))),
                None => {}
            }
        }
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamEnd> {
        while self.input.len() < self.buffer_limit {
            let before = self.wire_in;
            match self.poll_fill(cx) {
                Poll::Ready(Ok(true)) => self.ahead += self.wire_in - before,
                Poll::Ready(_) => return Poll::Ready(StreamEnd::DownstreamGone),
                Poll::Pending => {
                    if self.input.is_empty() {
                        self.worker.give_buffer(std::mem::take(&mut self.input));
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Pending
    }

    fn send_informational(&mut self, head: &Headers) {
        self.out.give_buffer(|| self.worker.take_buffer());
        let (codec, status) = (&mut self.codec, head.status().unwrap_or(100));
        self.out.with_buffer(|buffer| codec.send_informational(status, head, buffer));
    }

    fn send_head(&mut self, head: &mut Headers, end: bool) {
        self.out.give_buffer(|| self.worker.take_buffer());
        let codec = &mut self.codec;
        let mut closes = false;
        self.bytes.header_sent += self.out.with_buffer(|buffer| {
            let before = buffer.len();
            closes = codec.send_head(head, end, buffer);
            header_lines(&buffer[before..])
        });
        if closes {
            head.set(Known::Connection, "close");
        }
    }

    fn send_data(&mut self, data: Bytes) {
        let frame = self.codec.frame_data(data.len());
        self.bytes.body_sent += frame.take() as u64;
        self.out.push_framed(&frame, data);
    }

    fn send_end(&mut self, trailers: Option<&Headers>) {
        let codec = &mut self.codec;
        self.out.with_buffer(|buffer| match trailers {
            Some(trailers) => codec.send_trailers(trailers, buffer),
            None => codec.send_end(buffer),
        });
    }

    fn has_room(&self) -> bool {
        self.out.has_room()
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamEnd>> {
        if self.out.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let mut sent = 0;
        let flushed = self.out.poll_flush(cx, &mut self.transport, &mut sent);
        self.wire_out += sent;
        match ready!(flushed) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(_) => {
                self.broken = true;
                self.eof = true;
                Poll::Ready(Err(StreamEnd::DownstreamGone))
            }
        }
    }

    fn close_after_response(&mut self) {
        self.codec.close_after_response();
    }

    fn is_last(&self) -> bool {
        self.codec.is_last()
    }

    fn reset(&mut self, _cut: Cut) {
        self.broken = true;
    }

    fn bytes(&self) -> ByteCounts {
        ByteCounts {
            // As in Envoy, what arrived together with a request counts as its own.
            wire_received: (self.carried + self.wire_in).saturating_sub(self.ahead),
            wire_sent: self.wire_out + self.out.waiting() as u64,
            ..self.bytes
        }
    }
}
