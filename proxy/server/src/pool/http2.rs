//! An upstream HTTP/2 connection, and one stream on it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future as _;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use tokio::sync::Notify;
use waystation_filter_api::stream::Bytes as ByteCounts;
use waystation_http::h2::FrameGuard;
use waystation_http::{Headers, Known, h2 as convert};
use waystation_upstream::cluster::HttpOptions;

use super::HostPool;
use super::connect::{ConnectionGuard, UpstreamConnInfo};
use crate::http::end::ResetReason;
use crate::http::frames::{FIELD_LIMIT, Watch, Watched};
use crate::http::stream::Event;
use crate::transport::Transport;

/// Bytes of request that may wait for flow control before more is taken in, where the cluster's `per_connection_buffer_limit_bytes` does not want fewer.
const HIGH_WATER: usize = 64 * 1024;

/// What stands before the payload of every frame (RFC 9113 section 4.1).
pub(crate) const FRAME_HEADER: u64 = 9;

/// What the library may hold of a head beyond twice what is accepted.
const SLACK: u32 = 256 * 1024;

/// Bounds of the heads of responses, and of their trailers.
#[derive(Clone, Copy)]
struct Limits {
    fields: usize,
    bytes: usize,
}

/// A connection that carries many streams; a task of its own drives it.
pub(crate) struct Http2 {
    sender: RefCell<SendRequest<Bytes>>,
    pool: Weak<HostPool>,
    info: Rc<UpstreamConnInfo>,
    active: Cell<u32>,
    begun: Cell<u32>,
    max_streams: u32,
    max_requests: Option<u32>,
    expires: Option<Instant>,
    /// Takes no further stream: GOAWAY, its end, or a limit.
    closing: Cell<bool>,
    idle_since: Cell<Instant>,
    /// Tells the connection's task to end once no stream is left, or when the upstream has broken the protocol.
    close: Notify,
    broken: Cell<bool>,
    limits: Limits,
    /// Bytes of a request that may wait for flow control before more is taken in.
    high_water: usize,
    /// Whether a malformed response ends only its stream.
    lenient: bool,
    watch: Rc<Watch>,
}

impl Http2 {
    /// Does the preface on a new connection and starts its task.
    pub(crate) async fn start(
        pool: &Rc<HostPool>,
        transport: Transport,
        info: UpstreamConnInfo,
        guard: ConnectionGuard,
        http: &HttpOptions,
        max_requests: Option<u32>,
        expires: Option<Instant>,
    ) -> Result<Rc<Self>, ResetReason> {
        let options = &http.http2;
        let limits = Limits {
            fields: http.max_headers_count as usize,
            bytes: http.max_response_headers_kb as usize * 1024,
        };
        let mut builder = h2::client::Builder::new();
        builder
            // Beyond what is refused here, for the library resets the stream as if the head were malformed.
            .max_header_list_size(u32::try_from(limits.bytes * 2).unwrap_or(u32::MAX).saturating_add(SLACK))
            .enable_push(false)
            .initial_window_size(options.initial_stream_window_size)
            .initial_connection_window_size(options.initial_connection_window_size)
            .header_table_size(options.hpack_table_size)
            .initial_max_send_streams(options.max_concurrent_streams.min(100) as usize)
            .max_send_buffer_size(HIGH_WATER * 4);
        let cluster = Rc::clone(guard.cluster());
        let high_water = HIGH_WATER.min(cluster.buffer_limit);
        let codec = cluster.traffic().http2().clone();
        let watch = Watch::new(FrameGuard::client(options.frame_limits), codec, false);
        let io = Watched::upstream(transport, Rc::clone(&watch), cluster);
        let (sender, mut connection) =
            builder.handshake::<_, Bytes>(io).await.map_err(|error| reason(&error))?;
        let ping = options.keepalive.clone().zip(connection.ping_pong());
        let this = Rc::new(Self {
            sender: RefCell::new(sender),
            pool: Rc::downgrade(pool),
            info: Rc::new(info),
            active: Cell::new(0),
            begun: Cell::new(0),
            max_streams: options.max_concurrent_streams,
            max_requests,
            expires,
            closing: Cell::new(false),
            idle_since: Cell::new(Instant::now()),
            close: Notify::new(),
            broken: Cell::new(false),
            limits,
            high_water,
            lenient: options.stream_error_on_invalid_message,
            watch,
        });
        let (state, pool) = (Rc::clone(&this), Rc::downgrade(pool));
        tokio::task::spawn_local(async move {
            let mut guard = guard;
            let mut connection = std::pin::pin!(connection);
            let connection = std::future::poll_fn(|cx| {
                let ended = connection.as_mut().poll(cx);
                if ended.is_pending() && state.watch.flood().is_some() {
                    return Poll::Ready(Err(h2::Reason::ENHANCE_YOUR_CALM.into()));
                }
                if ended.is_pending() && !state.closing.get() && state.refuses() {
                    leave(&pool, &state);
                    state.retire();
                }
                ended
            });
            let keepalive = async {
                match ping {
                    Some((settings, ping)) => keepalive(settings.interval, settings.timeout, ping).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                result = connection => match result {
                    Err(error) if !(error.is_remote() || error.is_io()) => state.broken.set(true),
                    _ => guard.remote = true,
                },
                () = state.close.notified() => {}
                () = keepalive => {
                    state.watch.stats.keepalive_timeout().inc();
                }
            }
            if state.broken.get() {
                guard.cluster().stats.upstream_cx_protocol_error().inc();
            }
            if state.watch.peer_goes_away() {
                guard.cluster().stats.upstream_cx_close_notify().inc();
            }
            guard.active = state.active.get() > 0;
            guard.requests = state.begun.get();
            state.closing.set(true);
            leave(&pool, &state);
        });
        Ok(this)
    }

    /// Whether it takes another stream.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        if self.closing.get() || self.refuses() {
            return false;
        }
        let peer = self.sender.borrow().current_max_send_streams();
        (self.active.get() as usize) < (self.max_streams as usize).min(peer.max(1))
    }

    /// Whether a new stream would fail: after GOAWAY, which leaves the streams under way alone, or an error.
    fn refuses(&self) -> bool {
        // Without a stream of its own that waits to be opened, this sender has nothing to wake anybody for.
        let ready = self.sender.borrow_mut().poll_ready(&mut Context::from_waker(Waker::noop()));
        matches!(ready, Poll::Ready(Err(_)))
    }

    /// Ends the connection, for the upstream has broken the protocol.
    fn end_broken(&self) {
        self.broken.set(true);
        self.closing.set(true);
        self.close.notify_one();
    }

    /// Takes no further stream, and ends once the last has.
    pub(crate) fn retire(&self) {
        self.closing.set(true);
        if self.active.get() == 0 {
            self.close.notify_one();
        }
    }

    pub(crate) fn active(&self) -> u32 {
        self.active.get()
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.closing.get()
    }

    /// Ends an idle connection whose time has come.
    pub(crate) fn sweep(&self, idle_timeout: Option<Option<Duration>>, now: Instant) {
        if self.expires.is_some_and(|expires| now >= expires) {
            self.closing.set(true);
        }
        let idle = match idle_timeout {
            None => true,
            Some(None) => false,
            Some(Some(timeout)) => now.saturating_duration_since(self.idle_since.get()) >= timeout,
        };
        if self.active.get() == 0 && (idle || self.closing.get()) {
            self.retire();
        }
    }
}

fn leave(pool: &Weak<HostPool>, connection: &Rc<Http2>) {
    if let Some(pool) = pool.upgrade() {
        pool.remove_http2(connection);
    }
}

/// Returns when a PING is not answered in time.
async fn keepalive(interval: Option<Duration>, timeout: Duration, mut ping: h2::PingPong) {
    let Some(interval) = interval else { return std::future::pending().await };
    loop {
        tokio::time::sleep(interval).await;
        let answer = ping.ping(h2::Ping::opaque());
        tokio::select! {
            answer = answer => if answer.is_err() { return std::future::pending().await },
            () = tokio::time::sleep(timeout) => return,
        }
    }
}

/// One request and its response.
pub(crate) struct Http2Stream {
    connection: Rc<Http2>,
    response: Option<ResponseFuture>,
    /// Kept until the end: it is what resets the stream.
    send: Option<SendStream<Bytes>>,
    /// The request's end has been handed to the library.
    sent: bool,
    receive: Option<RecvStream>,
    pending: VecDeque<Bytes>,
    pending_bytes: usize,
    /// The request's end is queued behind `pending`.
    ended: bool,
    trailers: Option<http::HeaderMap>,
    data_done: bool,
    /// The protocol of an extended CONNECT.
    upgrade: Option<Box<str>>,
    bytes: ByteCounts,
}

impl Http2Stream {
    /// Takes a place on a connection that has room.
    pub(crate) fn reserve(connection: Rc<Http2>) -> Self {
        connection.active.set(connection.active.get() + 1);
        connection.watch.stats.streams_active().inc();
        connection.begun.set(connection.begun.get() + 1);
        if connection.max_requests.is_some_and(|max| connection.begun.get() >= max) {
            connection.closing.set(true);
        }
        Self {
            connection,
            response: None,
            send: None,
            sent: false,
            receive: None,
            pending: VecDeque::new(),
            pending_bytes: 0,
            ended: false,
            trailers: None,
            data_done: false,
            upgrade: None,
            bytes: ByteCounts::default(),
        }
    }

    /// Header bytes as they are without compression, and with them and the frames around all of it the wire's.
    pub(crate) fn bytes(&self) -> ByteCounts {
        self.bytes
    }

    pub(crate) fn info(&self) -> &Rc<UpstreamConnInfo> {
        &self.connection.info
    }

    pub(crate) fn send_head(&mut self, headers: &Headers, end: bool) -> Result<(), ResetReason> {
        let mut request = convert::write_request(headers).map_err(|_| ResetReason::LocalReset)?;
        self.bytes.header_sent = headers.byte_size() as u64;
        self.bytes.wire_sent = self.bytes.header_sent + FRAME_HEADER;
        // RFC 8441: an upgrade becomes an extended CONNECT.
        if let Some(protocol) = headers.get_str(Known::Upgrade) {
            *request.method_mut() = http::Method::CONNECT;
            request.extensions_mut().insert(h2::ext::Protocol::from(protocol));
            self.upgrade = Some(protocol.into());
        }
        // A sender refuses while the stream it began last waits to be opened; a new one queues behind it.
        let mut sender = self.connection.sender.borrow().clone();
        let sent = sender.send_request(request, end);
        let (response, send) = sent.map_err(|error| {
            self.connection.closing.set(true);
            reason(&error)
        })?;
        self.response = Some(response);
        self.send = Some(send);
        self.sent = end;
        Ok(())
    }

    pub(crate) fn send_data(&mut self, data: Bytes) -> Result<(), ResetReason> {
        self.pending_bytes += data.len();
        self.bytes.wire_sent += data.len() as u64 + FRAME_HEADER;
        self.pending.push_back(data);
        Ok(())
    }

    pub(crate) fn send_end(&mut self, trailers: Option<&Headers>) -> Result<(), ResetReason> {
        self.ended = true;
        self.trailers = trailers.and_then(|trailers| convert::write_trailers(trailers).ok());
        Ok(())
    }

    pub(crate) fn has_room(&self) -> bool {
        self.pending_bytes < self.connection.high_water
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        let Some(send) = self.send.as_mut().filter(|_| !self.sent) else { return Poll::Ready(Ok(())) };
        let flushed =
            poll_send(cx, send, &mut self.pending, &mut self.pending_bytes, self.ended, &mut self.trailers);
        match ready!(flushed) {
            Ok(done) => {
                self.sent = done;
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(reason(&error))),
        }
    }

    pub(crate) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        headers: &mut Headers,
    ) -> Poll<Result<Event, ResetReason>> {
        if let Some(response) = &mut self.response {
            if let Poll::Ready(Some(Ok(informational))) = response.poll_informational(cx) {
                convert::read_response(&informational.into_parts().0, headers);
                return Poll::Ready(Ok(Event::Informational));
            }
            let response = match ready!(Pin::new(response).poll(cx)) {
                Ok(response) => response,
                Err(error) => return Poll::Ready(Err(self.lost(&error))),
            };
            self.response = None;
            let (parts, receive) = response.into_parts();
            convert::read_response(&parts, headers);
            self.check(headers)?;
            if let Some(protocol) = &self.upgrade
                && parts.status.is_success()
            {
                headers.set_status(101);
                headers.set(Known::Upgrade, protocol.as_bytes());
                headers.set(Known::Connection, "upgrade");
            }
            self.bytes.header_received = headers.byte_size() as u64;
            self.bytes.wire_received += self.bytes.header_received + FRAME_HEADER;
            let end = receive.is_end_stream();
            self.receive = Some(receive);
            return Poll::Ready(Ok(Event::Head { end }));
        }
        let Some(receive) = &mut self.receive else { return Poll::Ready(Ok(Event::End)) };
        if !self.data_done {
            match ready!(receive.poll_data(cx)) {
                Some(Ok(data)) => {
                    // What is read here goes on at once, or is not read at all: that is the back-pressure.
                    let _ = receive.flow_control().release_capacity(data.len());
                    self.bytes.wire_received += data.len() as u64 + FRAME_HEADER;
                    return Poll::Ready(Ok(Event::Data(data)));
                }
                Some(Err(error)) => return Poll::Ready(Err(self.lost(&error))),
                None => self.data_done = true,
            }
        }
        match ready!(receive.poll_trailers(cx)) {
            Ok(Some(trailers)) => {
                convert::read_trailers(&trailers, headers);
                self.check(headers)?;
                Poll::Ready(Ok(Event::Trailers))
            }
            Ok(None) => Poll::Ready(Ok(Event::End)),
            Err(error) => Poll::Ready(Err(self.lost(&error))),
        }
    }

    fn lost(&self, error: &h2::Error) -> ResetReason {
        if !error.is_reset() {
            self.connection.closing.set(true);
        }
        if self.connection.broken.get() {
            return ResetReason::ProtocolError;
        }
        // Of the library's own resets this is the one for a head; the others are stream errors to Envoy, too.
        let malformed = error.is_reset() && !error.is_remote() && self.receive.is_none();
        if malformed && error.reason() == Some(h2::Reason::PROTOCOL_ERROR) {
            self.connection.watch.stats.rx_messaging_error().inc();
            if !self.connection.lenient {
                self.connection.end_broken();
            }
        }
        reason(error)
    }

    /// Refuses a head or trailers that are more than the cluster takes.
    fn check(&self, headers: &Headers) -> Result<(), ResetReason> {
        let Limits { fields, bytes } = self.connection.limits;
        let stats = &self.connection.watch.stats;
        if headers.len() > fields {
            stats.header_overflow().inc();
            return Err(ResetReason::RemoteReset);
        }
        let size = headers.byte_size();
        // No field is longer than all of them: the usual head is looked at no further.
        if size > FIELD_LIMIT
            && headers.iter().any(|(name, value)| name.as_bytes().len().max(value.len()) > FIELD_LIMIT)
        {
            self.connection.end_broken();
            return Err(ResetReason::ProtocolError);
        }
        if size > bytes {
            stats.header_list_size_too_large().inc();
            return Err(ResetReason::RemoteReset);
        }
        Ok(())
    }
}

impl Drop for Http2Stream {
    fn drop(&mut self) {
        // The library would say CANCEL; Envoy says INTERNAL_ERROR.
        let received = self.receive.as_ref().is_some_and(RecvStream::is_end_stream);
        if let Some(send) = self.send.as_mut().filter(|_| !(self.sent && received)) {
            send.send_reset(h2::Reason::INTERNAL_ERROR);
        }
        let connection = &self.connection;
        connection.active.set(connection.active.get() - 1);
        connection.watch.stats.streams_active().dec();
        if connection.active.get() == 0 {
            connection.idle_since.set(Instant::now());
            if connection.closing.get() {
                connection.close.notify_one();
            }
        }
        // The place is another's: with every connection in use, that is what the others wait for.
        if let Some(pool) = connection.pool.upgrade() {
            pool.wake_first(|takes| takes.http2);
        }
    }
}

/// Sends what flow control lets through. Ready with whether the end went out, once nothing waits.
pub(crate) fn poll_send(
    cx: &mut Context<'_>,
    send: &mut SendStream<Bytes>,
    pending: &mut VecDeque<Bytes>,
    pending_bytes: &mut usize,
    ended: bool,
    trailers: &mut Option<http::HeaderMap>,
) -> Poll<Result<bool, h2::Error>> {
    while let Some(front) = pending.front_mut() {
        if front.is_empty() {
            pending.pop_front();
            continue;
        }
        if send.capacity() == 0 {
            send.reserve_capacity((*pending_bytes).min(HIGH_WATER));
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(0)) => continue,
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Err(h2::Reason::CANCEL.into())),
            }
        }
        let take = send.capacity().min(front.len());
        let data = front.split_to(take);
        *pending_bytes -= take;
        if front.is_empty() {
            pending.pop_front();
        }
        let last = ended && pending.is_empty() && trailers.is_none();
        send.send_data(data, last)?;
        if last {
            return Poll::Ready(Ok(true));
        }
    }
    if ended {
        match trailers.take() {
            Some(trailers) => send.send_trailers(trailers)?,
            None => send.send_data(Bytes::new(), true)?,
        }
        return Poll::Ready(Ok(true));
    }
    Poll::Ready(Ok(false))
}

/// Envoy's reset reason for an error of the HTTP/2 library.
fn reason(error: &h2::Error) -> ResetReason {
    match error.reason() {
        Some(h2::Reason::REFUSED_STREAM) => ResetReason::RemoteRefused,
        Some(h2::Reason::CONNECT_ERROR) => ResetReason::ConnectError,
        _ if error.is_reset() && error.is_remote() => ResetReason::RemoteReset,
        _ if error.is_go_away() && error.is_remote() => ResetReason::RemoteReset,
        _ if error.is_io() => ResetReason::ConnectionTermination,
        Some(_) => ResetReason::ProtocolError,
        None => ResetReason::ConnectionTermination,
    }
}
