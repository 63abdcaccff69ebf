//! A downstream HTTP/2 connection: the `h2` crate below, one local task per stream.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future as _;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;
use waystation_filter_api::stream::{Bytes as ByteCounts, Protocol};
use waystation_http::h1::Underscores;
use waystation_http::h2::{Flood, FrameGuard};
use waystation_http::{Headers, Known, Name, h2 as convert};

use super::{Cut, Downstream, HeadFacts, OpenCodec, Piece, refused};
use crate::http::ConnCx;
use crate::http::end::StreamEnd;
use crate::http::frames::{FIELD_LIMIT, TOO_LARGE, Watch, Watched, cut_off};
use crate::http::stream::{self, Begin};
use crate::http::timer::{Timer, after, earliest};
use crate::pool::http2::{FRAME_HEADER, poll_send};
use crate::transport::Transport;

mod streams;

pub(crate) use streams::PrematureResets;
use streams::{Active, Streams};

/// Bytes of response that may wait for flow control before upstream is read further, where the listener does not want fewer.
const HIGH_WATER: usize = 64 * 1024;

/// Room for what is read and thrown away.
const READ_ROOM: usize = 4 * 1024;

/// How soon a connection whose drain time is over looks again whether its streams are.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Streams that may be reset before the library has handed them out, which it does at every turn.
const PENDING_RESETS: usize = 1000;

/// What HPACK counts for the fields of a head beyond their bytes (RFC 7541 section 4.1), and Envoy does not.
const OVERHEAD: u32 = 32 * 1024;

/// Serves a connection to its end; `input` was read while the codec was found out.
pub(crate) async fn serve(cx: Rc<ConnCx>, transport: Transport, input: BytesMut) {
    let hcm = cx.hcm.clone();
    let stats = &hcm.stats.hcm;
    let mut open =
        OpenCodec::new(stats, stats.downstream_cx_http2_total(), stats.downstream_cx_http2_active());
    let codec = cx.worker.shared.codecs.http2().clone();
    let guard = FrameGuard::server(hcm.http2.frame_limits);
    let watch = Watch::new(guard, codec, !hcm.http2.stream_error_on_invalid_message);
    let streams = Streams::new(cx.info.start, &watch);
    let transport = Rc::new(RefCell::new(transport));
    let io = Counted { transport: Rc::clone(&transport), prefix: input.freeze(), cx: Rc::clone(&cx) };
    let (end, refused) = serve_streams(&cx, &watch, &streams, io).await;
    let active = refused || streams.are_active();
    open.by_peer = match end {
        End::ByClient => true,
        End::AtOnce => false,
        End::Delayed => linger(&cx, &transport).await,
    };
    if active {
        stats.downstream_cx_destroy_active_rq().inc();
        match open.by_peer {
            true => stats.downstream_cx_destroy_remote_active_rq().inc(),
            false => stats.downstream_cx_destroy_local_active_rq().inc(),
        }
    }
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    /// The client has ended it.
    ByClient,
    /// We do, for want of life at the other end.
    AtOnce,
    /// We do, and the client has a moment to read what it was sent.
    Delayed,
}

/// Waits until the client is gone, or for `delayed_close_timeout`; whether it has gone. What it sends is read, or the
/// kernel would reset the connection over it, and what it has not read yet might be lost.
async fn linger(cx: &ConnCx, transport: &RefCell<Transport>) -> bool {
    let until = after(Instant::now(), cx.hcm.timeouts.delayed_close);
    let mut timer = Timer::default();
    let mut unread = BytesMut::with_capacity(READ_ROOM);
    let gone = std::future::poll_fn(|task| {
        let mut transport = transport.borrow_mut();
        if until.is_some() {
            loop {
                unread.clear();
                match poll_read_buf(Pin::new(&mut *transport), task, &mut unread) {
                    Poll::Ready(Ok(count)) if count > 0 => {}
                    Poll::Ready(_) => return Poll::Ready(true),
                    Poll::Pending => break,
                }
            }
            ready!(timer.poll(task, until));
            cx.hcm.stats.hcm.downstream_cx_delayed_close_timeout().inc();
        }
        // TLS says goodbye; whether it gets through is no longer of interest.
        let _ = Pin::new(&mut *transport).poll_shutdown(task);
        Poll::Ready(false)
    });
    gone.await
}

/// Serves the streams of a connection until it is over, and tells whether requests that were not handed out were left.
async fn serve_streams(
    cx: &Rc<ConnCx>,
    watch: &Rc<Watch>,
    streams: &Rc<Streams>,
    io: Counted,
) -> (End, bool) {
    let hcm = &cx.hcm;
    let stats = &hcm.stats.hcm;
    let options = &hcm.http2;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(options.initial_stream_window_size)
        .initial_connection_window_size(options.initial_connection_window_size)
        .max_concurrent_streams(options.max_concurrent_streams)
        .header_table_size(options.hpack_table_size)
        // What is refused is ours to refuse: the library would answer it unlogged.
        .max_header_list_size(hcm.http1.max_head_bytes.saturating_mul(2).saturating_add(OVERHEAD))
        .max_send_buffer_size(HIGH_WATER * 4)
        // So that it is `PrematureResets` that judges them, as far as they are that many.
        .max_pending_accept_reset_streams(PENDING_RESETS);
    if options.allow_connect {
        builder.enable_connect_protocol();
    }
    let expires = hcm.timeouts.connection_end(cx.info.start, cx.worker.random());
    let mut timer = Timer::default();
    let preface_by = earliest(after(cx.info.start, hcm.timeouts.idle), expires);
    let mut preface = pin!(builder.handshake::<_, Bytes>(Watched::downstream(io, Rc::clone(watch))));
    let preface = std::future::poll_fn(|task| match preface.as_mut().poll(task) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => timer.poll(task, preface_by).map(|()| None),
    });
    let mut connection = match preface.await {
        Some(Ok(connection)) => connection,
        Some(Err(error)) if error.is_io() => return (End::ByClient, false),
        Some(Err(_)) => {
            stats.downstream_cx_protocol_error().inc();
            return (End::Delayed, false);
        }
        None => {
            match expires.is_some_and(|expires| Instant::now() >= expires) {
                true => stats.downstream_cx_max_duration_reached().inc(),
                false => stats.downstream_cx_idle_timeout().inc(),
            }
            return (End::AtOnce, false);
        }
    };
    let idle_end = || after_opt(streams.idle_since(), hcm.timeouts.idle);
    let drain_end = |now| hcm.timeouts.drain_end(now, cx.worker.random()).or(Some(now));
    let mut ping = connection.ping_pong();
    let mut pinging: Option<Instant> = None;
    let mut next_ping = after(cx.info.start, options.keepalive_interval);
    let mut drain = cx.drain.waiter();
    // Since GOAWAY: when to look whether the streams are over.
    let mut draining: Option<Instant> = None;
    let mut served = 0_u32;
    loop {
        enum Next {
            Stream(Box<(http::Request<RecvStream>, SendResponse<Bytes>)>),
            Error(h2::Error),
            /// The library has refused a request.
            Refused(StreamEnd),
            /// The client sends what carries nothing.
            Flood,
            /// The client resets its streams before they have a response.
            Resets,
            /// A response that is the connection's last.
            Last,
            Closed,
            Timer,
        }
        let next = std::future::poll_fn(|task| {
            // GOAWAY goes before the response that says why.
            if draining.is_none() && streams.last.get() {
                return Poll::Ready(Next::Last);
            }
            match connection.poll_accept(task) {
                Poll::Ready(Some(Ok(stream))) => return Poll::Ready(Next::Stream(Box::new(stream))),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Next::Error(error)),
                Poll::Ready(None) => return Poll::Ready(Next::Closed),
                Poll::Pending => {}
            }
            if let Some(end) = watch.take_refused() {
                return Poll::Ready(Next::Refused(end));
            }
            if watch.flood().is_some() {
                return Poll::Ready(Next::Flood);
            }
            if watch.has_reset_too_often() {
                return Poll::Ready(Next::Resets);
            }
            if pinging.is_some()
                && let Some(ping) = &mut ping
                && let Poll::Ready(Ok(_)) = ping.poll_pong(task)
            {
                pinging = None;
            }
            let pong = after_opt(pinging, options.keepalive_timeout);
            let end = match draining {
                Some(until) => Some(until),
                None => earliest(earliest(idle_end(), expires), drain.due(task.waker(), cx.info.id)),
            };
            // Each of these is acted upon below when it has come: one that were not would spin.
            timer.poll(task, earliest(earliest(next_ping, pong), end)).map(|()| Next::Timer)
        })
        .await;
        match next {
            Next::Stream(stream) => {
                let (request, respond) = *stream;
                watch.taken(request.body().stream_id().as_u32());
                served += 1;
                let now = timer.now();
                let full = hcm.max_requests_per_connection.is_some_and(|max| served >= max);
                if draining.is_none() && (full || cx.drain.should_close(now, cx.worker.random())) {
                    match full {
                        true => stats.downstream_cx_max_requests_reached().inc(),
                        false => stats.downstream_cx_drain_close().inc(),
                    }
                    connection.graceful_shutdown();
                    draining = drain_end(now);
                }
                let active = Active::new(streams);
                let cx = Rc::clone(cx);
                // Boxed: the runtime moves what is spawned several times, and a stream's state is kilobytes.
                tokio::task::spawn_local(Box::pin(serve_stream(cx, active, now, request, respond)));
            }
            Next::Refused(end) => {
                Box::pin(refused::log(cx, end)).await;
                streams.ended(None, Duration::ZERO, &hcm.premature_resets);
            }
            Next::Error(error) => {
                let broken = watch.is_cut() || !error.is_io() && !error.is_remote();
                if broken {
                    stats.downstream_cx_protocol_error().inc();
                    watch.cut();
                }
                let refused = watch.take_all_refused(broken);
                let any = watch.is_cut_by_request() || !refused.is_empty();
                for end in refused {
                    Box::pin(refused::log(cx, end)).await;
                }
                // The library has queued GOAWAY; polling on writes it out.
                let end = std::future::poll_fn(|task| connection.poll_closed(task));
                let _ = tokio::time::timeout(Duration::from_secs(1), end).await;
                return (if broken { End::Delayed } else { End::ByClient }, any);
            }
            Next::Flood => return (End::Delayed, false),
            Next::Last => {
                connection.graceful_shutdown();
                draining = drain_end(timer.now());
            }
            Next::Resets => {
                stats.downstream_rq_too_many_premature_resets().inc();
                stats.downstream_cx_protocol_error().inc();
                return (End::AtOnce, false);
            }
            // After our GOAWAY it is the library that ends it, once no stream is left.
            Next::Closed => {
                for end in watch.take_all_refused(false) {
                    Box::pin(refused::log(cx, end)).await;
                }
                return (if draining.is_some() { End::Delayed } else { End::ByClient }, false);
            }
            Next::Timer => {
                let now = timer.now();
                if pinging.zip(options.keepalive_timeout).is_some_and(|(sent, limit)| now >= sent + limit) {
                    watch.stats.keepalive_timeout().inc();
                    return (End::AtOnce, false);
                }
                if next_ping.is_some_and(|due| now >= due) {
                    next_ping = after(now, options.keepalive_interval);
                    if let Some(ping) = &mut ping
                        && ping.send_ping(h2::Ping::opaque()).is_ok()
                    {
                        pinging.get_or_insert(now);
                    }
                }
                match &mut draining {
                    // A client that has not acknowledged GOAWAY, or has streams that go on.
                    Some(until) if now >= *until => match streams.idle_since() {
                        Some(_) => return (End::Delayed, false),
                        None => *until = now + LOOK_AGAIN,
                    },
                    Some(_) => {}
                    None => {
                        let has_come = |due: Option<Instant>| due.is_some_and(|due| now >= due);
                        if has_come(expires) {
                            stats.downstream_cx_max_duration_reached().inc();
                        } else if has_come(cx.drain.go_away_at(cx.info.id)) {
                            stats.downstream_cx_drain_close().inc();
                        } else if has_come(idle_end()) {
                            stats.downstream_cx_idle_timeout().inc();
                        } else {
                            continue;
                        }
                        connection.graceful_shutdown();
                        draining = drain_end(now);
                    }
                }
            }
        }
    }
}

fn after_opt(from: Option<Instant>, timeout: Option<Duration>) -> Option<Instant> {
    from.and_then(|from| after(from, timeout))
}

/// What of a head is more than Envoy's codec takes.
fn too_large(cx: &ConnCx, watch: &Watch, head: &Headers) -> Option<StreamEnd> {
    let limits = &cx.hcm.http1;
    if head.len() > limits.max_headers as usize {
        watch.stats.header_overflow().inc();
        return Some(StreamEnd::HeadRefused("http2.too_many_headers"));
    }
    // The memory it takes is more than its size but for the names that are known, and known without a walk.
    let limit = limits.max_head_bytes as usize;
    if head.capacity_bytes() + head.len() * Known::LONGEST <= limit.min(FIELD_LIMIT) {
        return None;
    }
    if head.iter().any(|(name, value)| name.as_bytes().len().max(value.len()) > FIELD_LIMIT) {
        watch.end();
        return Some(cut_off());
    }
    (head.byte_size() > limit).then(|| {
        watch.stats.header_list_size_too_large().inc();
        StreamEnd::HeadRefused(TOO_LARGE)
    })
}

/// `headers_with_underscores_action`, which the library knows nothing of.
fn underscores(cx: &ConnCx, watch: &Watch, head: &mut Headers) -> Option<StreamEnd> {
    let action = cx.hcm.http1.underscores;
    if action == Underscores::Allow {
        return None;
    }
    let offends = |name: Name<'_>| name.as_bytes().contains(&b'_');
    let found = head.iter().filter(|(name, _)| offends(*name)).count();
    if found == 0 {
        return None;
    }
    if action == Underscores::Reject {
        watch.stats.requests_rejected_with_underscores_in_headers().inc();
        return Some(StreamEnd::HeadRefused("http2.unexpected_underscore"));
    }
    watch.stats.dropped_headers_with_underscores().add(found as u64);
    head.retain(|name, _| !offends(name));
    None
}

async fn serve_stream(
    cx: Rc<ConnCx>,
    active: Active,
    start: Instant,
    request: http::Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let Active(streams) = &active;
    let watch = &streams.watch;
    let cx = &*cx;
    let mut scratch = cx.worker.take_scratch();
    let (parts, receive) = request.into_parts();
    let protocol = parts.extensions.get::<h2::ext::Protocol>().map(h2::ext::Protocol::as_str);
    convert::read_request(&parts, protocol, &mut scratch.request);
    // RFC 8441: inside the proxy an extended CONNECT is what an HTTP/1.1 upgrade is, as in Envoy.
    let upgrade = protocol.is_some();
    if let Some(protocol) = protocol {
        let head = &mut scratch.request;
        head.set(Known::Method, "GET");
        head.remove(Known::Protocol);
        head.set(Known::Upgrade, protocol);
        head.set(Known::Connection, "upgrade");
    }
    let underscore = underscores(cx, watch, &mut scratch.request);
    let head = &scratch.request;
    let facts = HeadFacts {
        protocol: Protocol::Http2,
        end: receive.is_end_stream(),
        tunnel: upgrade || head.method() == Some(b"CONNECT"),
        expect_continue: head
            .get(Known::Expect)
            .is_some_and(|expect| expect.eq_ignore_ascii_case(b"100-continue")),
    };
    let refused = if let Some(end) = too_large(cx, watch, head) {
        Some(end)
    } else if !head.contains(Known::Authority) && !head.contains(Known::Host) {
        Some(StreamEnd::DownstreamViolation("http2.violation.of.messaging.rule"))
    } else {
        underscore
    };
    let header_received = head.byte_size() as u64;
    let mut down = Http2 {
        receive,
        respond,
        send: None,
        pending: std::mem::take(&mut scratch.pending),
        pending_bytes: 0,
        high_water: HIGH_WATER.min(cx.hcm.buffer_limit),
        ended: false,
        trailers: None,
        data_done: facts.end,
        finished: false,
        upgrade,
        bytes: ByteCounts {
            header_received,
            wire_received: header_received + FRAME_HEADER,
            ..ByteCounts::default()
        },
        streams: Rc::clone(streams),
    };
    let mut timer = std::mem::take(&mut scratch.timer);
    let begin = Begin { start, facts, refused };
    let code = stream::serve(cx, &mut down, &mut timer, &mut scratch, begin).await;
    streams.ended(code, timer.now().saturating_duration_since(start), &cx.hcm.premature_resets);
    // If the client has not sent its request to the end, the library tells it not to once the response is out.
    scratch.timer = timer;
    scratch.pending = down.pending;
    cx.worker.give_scratch(scratch);
}

/// One stream.
struct Http2 {
    receive: RecvStream,
    respond: SendResponse<Bytes>,
    send: Option<SendStream<Bytes>>,
    pending: VecDeque<Bytes>,
    pending_bytes: usize,
    high_water: usize,
    ended: bool,
    trailers: Option<http::HeaderMap>,
    data_done: bool,
    finished: bool,
    /// The request was an extended CONNECT.
    upgrade: bool,
    bytes: ByteCounts,
    streams: Rc<Streams>,
}

impl Downstream for Http2 {
    fn poll_piece(&mut self, cx: &mut Context<'_>, trailers: &mut Headers) -> Poll<Result<Piece, StreamEnd>> {
        if !self.data_done {
            match ready!(self.receive.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Read only when upstream has room: that is the back-pressure.
                    let _ = self.receive.flow_control().release_capacity(data.len());
                    self.bytes.body_received += data.len() as u64;
                    self.bytes.wire_received += data.len() as u64 + FRAME_HEADER;
                    return Poll::Ready(Ok(Piece::Data(data)));
                }
                Some(Err(error)) => return Poll::Ready(Err(lost(&self.streams.watch, &error))),
                None => self.data_done = true,
            }
        }
        match ready!(self.receive.poll_trailers(cx)) {
            Ok(Some(map)) => {
                convert::read_trailers(&map, trailers);
                Poll::Ready(Ok(Piece::Trailers))
            }
            Ok(None) => Poll::Ready(Ok(Piece::End)),
            Err(error) => Poll::Ready(Err(lost(&self.streams.watch, &error))),
        }
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamEnd> {
        let reset = match &mut self.send {
            Some(send) => send.poll_reset(cx),
            None if self.finished => return Poll::Pending,
            None => self.respond.poll_reset(cx),
        };
        match ready!(reset) {
            Ok(_) => Poll::Ready(StreamEnd::DownstreamReset),
            Err(error) => Poll::Ready(lost(&self.streams.watch, &error)),
        }
    }

    fn send_informational(&mut self, head: &Headers) {
        if let Ok(head) = convert::write_response(head) {
            // A stream that is gone says so when the response is sent.
            let _ = self.respond.send_informational(head);
        }
    }

    fn send_head(&mut self, head: &mut Headers, end: bool) {
        self.bytes.header_sent += head.byte_size() as u64;
        self.bytes.wire_sent += self.bytes.header_sent + FRAME_HEADER;
        let Ok(mut response) = convert::write_response(head) else {
            self.respond.send_reset(Reason::INTERNAL_ERROR);
            return;
        };
        if self.upgrade && response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
            *response.status_mut() = http::StatusCode::OK;
        }
        if let Ok(send) = self.respond.send_response(response, end) {
            self.finished = end;
            self.send = (!end).then_some(send);
        }
    }

    fn send_data(&mut self, data: Bytes) {
        if self.send.is_some() {
            self.bytes.body_sent += data.len() as u64;
            self.bytes.wire_sent += data.len() as u64 + FRAME_HEADER;
            self.pending_bytes += data.len();
            self.pending.push_back(data);
        }
    }

    fn send_end(&mut self, trailers: Option<&Headers>) {
        self.ended = true;
        self.trailers = trailers.and_then(|trailers| convert::write_trailers(trailers).ok());
    }

    fn has_room(&self) -> bool {
        self.pending_bytes < self.high_water
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamEnd>> {
        let Some(send) = &mut self.send else { return Poll::Ready(Ok(())) };
        let sent =
            poll_send(cx, send, &mut self.pending, &mut self.pending_bytes, self.ended, &mut self.trailers);
        match ready!(sent) {
            Ok(done) => {
                if done {
                    self.finished = true;
                    self.send = None;
                }
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(lost(&self.streams.watch, &error))),
        }
    }

    fn close_after_response(&mut self) {
        // The response wakes the connection's task.
        self.streams.last.set(true);
    }

    fn reset(&mut self, cut: Cut) {
        if !self.finished {
            let reason = match cut {
                Cut::Failed => Reason::INTERNAL_ERROR,
                Cut::Tunnel => Reason::CONNECT_ERROR,
                Cut::Refused => Reason::PROTOCOL_ERROR,
            };
            match &mut self.send {
                Some(send) => send.send_reset(reason),
                None => self.respond.send_reset(reason),
            }
            self.finished = true;
            self.send = None;
        }
    }

    fn bytes(&self) -> ByteCounts {
        self.bytes
    }
}

fn lost(watch: &Watch, error: &h2::Error) -> StreamEnd {
    if let Some(flood) = watch.flood() {
        return StreamEnd::DownstreamViolation(match flood {
            Flood::Empty => "http2.inbound_empty_frames_flood",
            Flood::Priority => "codec_error:Too_many_PRIORITY_frames",
            Flood::WindowUpdate => "codec_error:Too_many_WINDOW_UPDATE_frames",
        });
    }
    if watch.has_reset_too_often() {
        return StreamEnd::ConnectionAborted("too_many_premature_resets");
    }
    match error.is_reset() {
        _ if watch.is_cut() => cut_off(),
        // The library reset the stream over what the client sent, such as data beyond the announced length.
        true if !error.is_remote() => StreamEnd::DownstreamViolation("http2.remote_reset"),
        true => StreamEnd::DownstreamReset,
        false => StreamEnd::DownstreamGone,
    }
}

/// The transport with what was read ahead, counting bytes for the statistics.
struct Counted {
    transport: Rc<RefCell<Transport>>,
    prefix: Bytes,
    cx: Rc<ConnCx>,
}

impl AsyncRead for Counted {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if this.prefix.is_empty() {
            ready!(Pin::new(&mut *this.transport.borrow_mut()).poll_read(cx, buffer))?;
        } else {
            let count = this.prefix.len().min(buffer.remaining());
            buffer.put_slice(&this.prefix.split_to(count));
        }
        let count = buffer.filled().len() - before;
        this.cx.hcm.stats.hcm.downstream_cx_rx_bytes_total().add(count as u64);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        let this = self.get_mut();
        let count = ready!(Pin::new(&mut *this.transport.borrow_mut()).poll_write(cx, data))?;
        this.cx.hcm.stats.hcm.downstream_cx_tx_bytes_total().add(count as u64);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let this = self.get_mut();
        let count = ready!(Pin::new(&mut *this.transport.borrow_mut()).poll_write_vectored(cx, slices))?;
        this.cx.hcm.stats.hcm.downstream_cx_tx_bytes_total().add(count as u64);
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.get_mut().transport.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        // It is closed with the connection, after what was sent has had time to arrive.
        self.poll_flush(cx)
    }
}
