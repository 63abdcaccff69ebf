//! A downstream HTTP/2 connection: the `h2` crate below, one local task per stream.

use std::cell::{Cell, RefCell};
use std::future::Future as _;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;
use waystation_http::h2::FrameGuard;

use super::{OpenCodec, refused};
use crate::http::ConnCx;
use crate::http::end::StreamEnd;
use crate::http::frames::{Watch, Watched};
use crate::http::timer::{Timer, after, earliest};
use crate::overload::Dispatch;
use crate::transport::Transport;

mod stream;
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
    let greeted = Rc::new(Cell::new(false));
    let io = Counted {
        transport: Rc::clone(&transport),
        prefix: input.freeze(),
        cx: Rc::clone(&cx),
        streams: Rc::clone(&streams),
        greeted: Rc::clone(&greeted),
    };
    let _wait = cx.wait_for_overload().await;
    let (end, refused) = serve_streams(&cx, &watch, &streams, io, &greeted).await;
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
    greeted: &Cell<bool>,
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
    let preface_by = || earliest(after(cx.info.start, cx.idle_timeout()), cx.connection_end(expires));
    let mut preface = pin!(builder.handshake::<_, Bytes>(Watched::downstream(io, Rc::clone(watch))));
    let preface = std::future::poll_fn(|task| match preface.as_mut().poll(task) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => timer.poll(task, preface_by()).map(|()| None),
    });
    let mut connection = match preface.await {
        Some(Ok(connection)) => connection,
        Some(Err(error)) if error.is_io() => return (End::ByClient, false),
        Some(Err(_)) => {
            stats.downstream_cx_protocol_error().inc();
            return (End::Delayed, false);
        }
        None => {
            match cx.connection_end(expires).is_some_and(|expires| Instant::now() >= expires) {
                true => stats.downstream_cx_max_duration_reached().inc(),
                false => stats.downstream_cx_idle_timeout().inc(),
            }
            return (End::AtOnce, false);
        }
    };
    greeted.set(true);
    let idle_end = || after_opt(streams.idle_since(), cx.idle_timeout());
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
            /// A response that is the connection's last, or the overload manager has had enough of it.
            Last,
            /// The overload manager ends it at once.
            Forced,
            Closed,
            Timer,
        }
        let next = std::future::poll_fn(|task| {
            // GOAWAY goes before the response that says why.
            if draining.is_none() && (streams.last.get() || streams.drain.get()) {
                return Poll::Ready(Next::Last);
            }
            if streams.forced.get() {
                return Poll::Ready(Next::Forced);
            }
            match connection.poll_accept(task) {
                Poll::Ready(Some(Ok(stream))) => return Poll::Ready(Next::Stream(Box::new(stream))),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Next::Error(error)),
                Poll::Ready(None) => return Poll::Ready(Next::Closed),
                Poll::Pending if streams.forced.get() => return Poll::Ready(Next::Forced),
                Poll::Pending if draining.is_none() && streams.drain.get() => return Poll::Ready(Next::Last),
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
                None => earliest(
                    earliest(idle_end(), cx.connection_end(expires)),
                    drain.due(task.waker(), cx.info.id),
                ),
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
                    streams.last.set(true);
                    draining = drain_end(now);
                }
                let active = Active::new(streams);
                let cx = Rc::clone(cx);
                // Boxed: the runtime moves what is spawned several times, and a stream's state is kilobytes.
                tokio::task::spawn_local(Box::pin(stream::serve(cx, active, now, request, respond)));
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
            Next::Forced => {
                connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                let end = std::future::poll_fn(|task| connection.poll_closed(task));
                let _ = tokio::time::timeout(Duration::from_secs(1), end).await;
                return (End::Delayed, false);
            }
            Next::Flood => return (End::Delayed, false),
            Next::Last => {
                connection.graceful_shutdown();
                streams.last.set(true);
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
                        if has_come(cx.connection_end(expires)) {
                            stats.downstream_cx_max_duration_reached().inc();
                        } else if has_come(cx.drain.go_away_at(cx.info.id)) {
                            stats.downstream_cx_drain_close().inc();
                        } else if has_come(idle_end()) {
                            stats.downstream_cx_idle_timeout().inc();
                        } else {
                            continue;
                        }
                        connection.graceful_shutdown();
                        streams.last.set(true);
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

/// The transport with what was read ahead, counting bytes for the statistics.
struct Counted {
    transport: Rc<RefCell<Transport>>,
    prefix: Bytes,
    cx: Rc<ConnCx>,
    streams: Rc<Streams>,
    /// The library has had the preface: from here on it can say goodbye.
    greeted: Rc<Cell<bool>>,
}

impl Counted {
    /// Asks the overload manager about bytes that have come. `false` when the library is not to see them.
    fn dispatch(&self) -> bool {
        let Some(overload) = &self.cx.hcm.overload else { return true };
        match overload.dispatch(|| self.cx.worker.random()) {
            Dispatch::Go => {}
            Dispatch::Drain => self.streams.drain.set(true),
            Dispatch::Close => self.streams.forced.set(true),
        }
        !(self.streams.forced.get() && self.greeted.get())
    }
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
        if count > 0 && !this.dispatch() {
            // Whoever polls the connection looks at `forced` next: nobody has to be woken.
            buffer.set_filled(before);
            return Poll::Pending;
        }
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
