//! The upstream side of one attempt: getting a connection, and the stream on it.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use waystation_filter_api::stream::{Bytes as ByteCounts, Protocol};
use waystation_http::Headers;
use waystation_http::h1::{self, Received};
use waystation_tls::ClientOptions;
use waystation_upstream::Priority;
use waystation_upstream::admission::{Place, Resource};
use waystation_upstream::cluster::{ClusterRef, HttpOptions, UpstreamProtocol};
use waystation_upstream::jitter::spread;

use crate::http::end::ResetReason;
use crate::pool::connect::PastLimit;
use crate::pool::http1::Http1;
use crate::pool::http2::{Http2, Http2Stream};
use crate::pool::tcp::Tcp;
use crate::pool::{Bound, ConnectError, ConnectOptions, HostPool, Takes, TlsName, UpstreamConnInfo, connect};
use crate::worker::Worker;

/// A stream on an upstream connection.
pub(in crate::http) enum Upstream {
    Http1(Box<Http1>),
    Http2(Box<Http2Stream>),
    /// A CONNECT that ends here.
    Tcp(Box<Tcp>),
}

/// What a connection is wanted for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::http) enum Carried {
    /// A request that came by this protocol.
    Http(Protocol),
    /// The payload of a CONNECT.
    Raw,
}

/// What upstream says next.
#[derive(Debug)]
pub(crate) enum Event {
    /// A 1xx head other than 101, in the map that was passed in.
    Informational,
    /// The response head, in the map that was passed in.
    Head {
        end: bool,
    },
    Data(Bytes),
    /// In the map that was passed in; nothing follows.
    Trailers,
    End,
}

/// Why there is no stream to send the request on.
#[derive(Debug)]
pub(in crate::http) struct NoStream {
    pub(in crate::http) reason: ResetReason,
    pub(in crate::http) transport: Option<Box<str>>,
}

/// A unit of `max_requests` and its gauge, given back on drop.
pub(in crate::http) struct RequestPermit {
    cluster: Rc<ClusterRef>,
    priority: Priority,
}

/// A unit of `max_pending_requests`, likewise.
struct PendingPermit<'a> {
    cluster: &'a ClusterRef,
    priority: Priority,
}

impl RequestPermit {
    /// Nothing when `max_requests` is reached.
    pub(in crate::http) fn acquire(cluster: &Rc<ClusterRef>, priority: Priority) -> Option<Self> {
        if !cluster.admission.try_acquire(priority, Resource::Requests) {
            cluster.stats.upstream_rq_active_overflow().inc();
            return None;
        }
        cluster.stats.upstream_rq_total().inc();
        cluster.stats.upstream_rq_active().inc();
        Some(Self { cluster: Rc::clone(cluster), priority })
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.cluster.stats.upstream_rq_active().dec();
        self.cluster.admission.release(self.priority, Resource::Requests);
    }
}

impl Drop for PendingPermit<'_> {
    fn drop(&mut self) {
        self.cluster.stats.upstream_rq_pending_active().dec();
        self.cluster.admission.release(self.priority, Resource::Pending);
    }
}

/// A connection that is ready at once: the usual case, without a future.
#[inline]
pub(in crate::http) fn ready(
    pool: &Rc<HostPool>,
    cluster: &ClusterRef,
    carried: Carried,
    now: Instant,
) -> Option<Upstream> {
    let wanted = wanted(cluster, pool, carried);
    match wanted {
        Wanted::Raw => None,
        Wanted::Http1 => pool.take_idle(now).map(Upstream::Http1),
        Wanted::Http2 | Wanted::Either => {
            let stream = pool
                .least_loaded()
                .map(|connection| Upstream::Http2(Box::new(Http2Stream::reserve(connection))));
            match wanted {
                Wanted::Http2 => stream,
                _ => stream.or_else(|| pool.take_idle(now).map(Upstream::Http1)),
            }
        }
    }
}

/// Waits for a connection: a new one, or one that comes back.
pub(in crate::http) async fn acquire(
    worker: Rc<Worker>,
    pool: Rc<HostPool>,
    cluster: Rc<ClusterRef>,
    priority: Priority,
    carried: Carried,
) -> Result<Upstream, NoStream> {
    let stats = &cluster.stats;
    if !cluster.admission.try_acquire(priority, Resource::Pending) {
        stats.upstream_rq_pending_overflow().inc();
        return Err(NoStream { reason: ResetReason::Overflow, transport: None });
    }
    stats.upstream_rq_pending_total().inc();
    stats.upstream_rq_pending_active().inc();
    let _pending = PendingPermit { cluster: &cluster, priority };
    let failed = |reason, transport| {
        stats.upstream_rq_pending_failure_eject().inc();
        Err(NoStream { reason, transport })
    };
    let mut place: Option<(Bound, Place)> = None;
    loop {
        if let Some(upstream) = self::ready(&pool, &cluster, carried, Instant::now()) {
            return Ok(upstream);
        }
        let wanted = wanted(&cluster, &pool, carried);
        // Streams that can share a connection wait for the one that is being made.
        if wanted.is_shared() && pool.http2_connecting.get() {
            if let Some(connection) = pool.wait(wanted.takes()).done().await {
                return Ok(Upstream::Http1(connection));
            }
            continue;
        }
        let point = worker.shared.overload.get().and_then(|overload| overload.new_connection.as_ref());
        if point.is_some_and(|point| point.sheds(|| worker.random())) {
            return Err(NoStream { reason: ResetReason::Overflow, transport: None });
        }
        let alpn: &[&[u8]] = match wanted {
            Wanted::Raw => &[],
            Wanted::Http1 => &[b"http/1.1"],
            Wanted::Http2 => &[b"h2"],
            Wanted::Either => &[b"h2", b"http/1.1"],
        };
        let downstream = pool.downstream();
        let options = ConnectOptions {
            priority,
            past_limit: past_limit(&pool, &cluster, priority, wanted),
            called: place.is_some(),
            downstream: downstream.as_deref(),
            tls: ClientOptions {
                server_name: pool.tls_name().and_then(TlsName::server_name),
                verify_san: pool.tls_name().and_then(TlsName::verify_san),
                alpn,
            },
        };
        let connecting = Connecting::new(&pool, wanted);
        let host = pool.host();
        let made = connect(&worker, &cluster, &host, options).await;
        match made {
            Ok((transport, info, guard)) => {
                if !wanted.is_shared() {
                    connecting.settle();
                }
                let http2 = match wanted {
                    Wanted::Raw => {
                        return Ok(Upstream::Tcp(Box::new(Tcp::new(transport, info, guard, &pool))));
                    }
                    Wanted::Http1 => false,
                    Wanted::Http2 => true,
                    Wanted::Either => info.alpn.as_deref() == Some(b"h2"),
                };
                pool.negotiated_http1.set(wanted == Wanted::Either && !http2);
                let http = &cluster.http;
                let expires = http.max_connection_duration.map(|max| {
                    guard.start() + spread(max, http.max_connection_duration_jitter, worker.random())
                });
                if !http2 {
                    stats.upstream_cx_http1_total().inc();
                    cluster.traffic().http1();
                    let config = http1_config(http);
                    return Ok(Upstream::Http1(Box::new(Http1::new(
                        transport, info, guard, config, expires, &pool,
                    ))));
                }
                stats.upstream_cx_http2_total().inc();
                let made = Http2::start(
                    &pool,
                    transport,
                    info,
                    guard,
                    http,
                    http.max_requests_per_connection,
                    expires,
                )
                .await;
                match made {
                    Ok(connection) => {
                        let stream = Box::new(Http2Stream::reserve(Rc::clone(&connection)));
                        pool.add_http2(connection);
                        return Ok(Upstream::Http2(stream));
                    }
                    Err(reason) => return Err(NoStream { reason, transport: None }),
                }
            }
            Err(ConnectError::Overflow(bound)) => {
                connecting.settle();
                if pool.has(wanted.takes()) {
                    // One of ours will come back, or it is our turn before that.
                    let mut waiting = pool.wait(wanted.takes());
                    let given = match &place {
                        None => waiting.done().await,
                        Some((_, place)) => tokio::select! {
                            given = waiting.done() => given,
                            () = place.called() => None,
                        },
                    };
                    if let Some(connection) = given {
                        return Ok(Upstream::Http1(connection));
                    }
                } else if options.past_limit == PastLimit::First {
                    // One of another worker's will end: those that are idle do now.
                    let place = match place.take_if(|(of, _)| *of == bound) {
                        Some(same) => place.insert(same),
                        // Who stood in the other line leaves it to the next one there, who may fare better.
                        None => {
                            let stands = match bound {
                                Bound::Cluster => cluster.admission.stand_in_line(priority),
                                Bound::Host => host.stand_in_line(),
                            };
                            worker.shared.room_wanted.notify_waiters();
                            place.insert((bound, stands))
                        }
                    };
                    place.1.called().await;
                } else {
                    return failed(ResetReason::Overflow, None);
                }
            }
            Err(ConnectError::Timeout) => return failed(ResetReason::ConnectionTimeout, None),
            Err(ConnectError::Failed { local: true, reason }) => {
                return failed(ResetReason::LocalConnectionFailure, Some(reason));
            }
            Err(ConnectError::Failed { local: false, reason }) => {
                return failed(ResetReason::RemoteConnectionFailure, Some(reason));
            }
        }
    }
}

impl Upstream {
    /// Counts a stream that ended before its response did. HTTP/1 has no resets to count, only connections that end.
    pub(in crate::http) fn count_loss(&self, cluster: &ClusterRef, reason: ResetReason) {
        let stats = &cluster.stats;
        match reason {
            _ if !matches!(self, Self::Http2(_)) => {}
            ResetReason::RemoteReset => stats.upstream_rq_rx_reset().inc(),
            ResetReason::LocalReset | ResetReason::ProtocolError => stats.upstream_rq_tx_reset().inc(),
            ResetReason::ConnectionTermination => stats.upstream_rq_pending_failure_eject().inc(),
            _ => {}
        }
    }

    /// Gives the connection back, or ends the stream; `clean` when both directions have come to their end.
    pub(in crate::http) fn release(
        self,
        worker: &Worker,
        pool: &Rc<HostPool>,
        cluster: &ClusterRef,
        clean: bool,
        now: Instant,
    ) {
        match self {
            Self::Http1(mut connection) => {
                let keep = connection.finish(worker) && clean;
                if clean {
                    connection.mark_inactive();
                }
                if keep {
                    pool.put_idle(connection, cluster, now);
                }
            }
            // Dropping the stream resets it unless both directions have ended.
            Self::Http2(stream) => {
                if !clean {
                    cluster.stats.upstream_rq_tx_reset().inc();
                }
                drop(stream);
            }
            Self::Tcp(connection) => drop(connection),
        }
    }

    pub(in crate::http) fn protocol(&self) -> Option<Protocol> {
        match self {
            Self::Http1(_) => Some(Protocol::Http11),
            Self::Http2(_) => Some(Protocol::Http2),
            Self::Tcp(_) => None,
        }
    }

    pub(in crate::http) fn info(&self) -> &Rc<UpstreamConnInfo> {
        match self {
            Self::Http1(connection) => &connection.info,
            Self::Http2(stream) => stream.info(),
            Self::Tcp(connection) => &connection.info,
        }
    }

    /// Header bytes and bytes on the wire of this stream so far.
    pub(in crate::http) fn bytes(&self) -> ByteCounts {
        match self {
            Self::Http1(connection) => connection.bytes(),
            Self::Http2(stream) => stream.bytes(),
            Self::Tcp(connection) => connection.bytes(),
        }
    }

    #[inline]
    pub(in crate::http) fn send_head(
        &mut self,
        worker: &Worker,
        headers: &Headers,
        end: bool,
    ) -> Result<(), ResetReason> {
        match self {
            Self::Http1(connection) => {
                connection.send_head(worker, headers, end);
                Ok(())
            }
            Self::Http2(stream) => stream.send_head(headers, end),
            Self::Tcp(_) => Ok(()),
        }
    }

    pub(in crate::http) fn send_data(&mut self, data: Bytes) -> Result<(), ResetReason> {
        match self {
            Self::Http1(connection) => {
                connection.send_data(data);
                Ok(())
            }
            Self::Http2(stream) => stream.send_data(data),
            Self::Tcp(connection) => {
                connection.send_data(data);
                Ok(())
            }
        }
    }

    pub(in crate::http) fn send_end(&mut self, trailers: Option<&Headers>) -> Result<(), ResetReason> {
        match self {
            Self::Http1(connection) => {
                connection.send_end(trailers);
                Ok(())
            }
            Self::Http2(stream) => stream.send_end(trailers),
            Self::Tcp(connection) => {
                connection.send_end();
                Ok(())
            }
        }
    }

    #[inline]
    pub(in crate::http) fn has_room(&self) -> bool {
        match self {
            Self::Http1(connection) => connection.has_room(),
            Self::Http2(stream) => stream.has_room(),
            Self::Tcp(connection) => connection.has_room(),
        }
    }

    #[inline]
    pub(in crate::http) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        match self {
            Self::Http1(connection) => connection.poll_flush(cx),
            Self::Http2(stream) => stream.poll_flush(cx),
            Self::Tcp(connection) => connection.poll_flush(cx),
        }
    }

    #[inline]
    pub(in crate::http) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        worker: &Worker,
        headers: &mut Headers,
    ) -> Poll<Result<Event, ResetReason>> {
        match self {
            Self::Http1(connection) => {
                connection.poll_event(cx, worker, headers).map_ok(|received| match received {
                    Received::Head(head) if head.informational => Event::Informational,
                    Received::Head(head) => Event::Head { end: head.framing.is_end_stream() },
                    Received::Data(data) => Event::Data(data),
                    Received::Trailers => Event::Trailers,
                    Received::End | Received::NeedMore => Event::End,
                })
            }
            Self::Http2(stream) => stream.poll_event(cx, headers),
            Self::Tcp(connection) => connection.poll_event(cx, headers),
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wanted {
    Http1,
    Http2,
    /// ALPN decides.
    Either,
    /// A connection of its own, without HTTP.
    Raw,
}

impl Wanted {
    /// Whether several streams may come to share the connection.
    fn is_shared(self) -> bool {
        matches!(self, Self::Http2 | Self::Either)
    }

    fn takes(self) -> Takes {
        Takes { http1: matches!(self, Self::Http1 | Self::Either), http2: self.is_shared() }
    }
}

#[inline]
fn wanted(cluster: &ClusterRef, pool: &HostPool, carried: Carried) -> Wanted {
    let Carried::Http(downstream) = carried else { return Wanted::Raw };
    match cluster.http.protocol {
        UpstreamProtocol::Http1 => Wanted::Http1,
        UpstreamProtocol::Http2 => Wanted::Http2,
        UpstreamProtocol::UseDownstream if downstream == Protocol::Http2 => Wanted::Http2,
        UpstreamProtocol::UseDownstream => Wanted::Http1,
        UpstreamProtocol::Auto if pool.negotiated_http1.get() => Wanted::Http1,
        UpstreamProtocol::Auto => Wanted::Either,
    }
}

/// Whether a connection may go past the bounds. A pool is never left without any, as in Envoy; but a bound that the
/// configuration sets holds for all workers together, where they can take turns. Streams of HTTP/2 can't: what is shared
/// does not end between two of them.
fn past_limit(pool: &HostPool, cluster: &ClusterRef, priority: Priority, wanted: Wanted) -> PastLimit {
    let admission = &cluster.admission;
    let bounded = admission.bounds_connections(priority) || admission.max_connections_per_host().is_some();
    if pool.has(wanted.takes()) {
        PastLimit::Never
    } else if bounded && !wanted.is_shared() && pool.is_common() && pool.is_empty() {
        PastLimit::First
    } else {
        PastLimit::Always
    }
}

/// A connection is being made. One that streams can share is waited for by others as long as it is; of any that is not made,
/// the room is for others.
struct Connecting<'a> {
    pool: &'a HostPool,
    wanted: Wanted,
    settled: bool,
}

impl<'a> Connecting<'a> {
    fn new(pool: &'a HostPool, wanted: Wanted) -> Self {
        match wanted {
            Wanted::Http2 | Wanted::Either => pool.http2_connecting.set(true),
            Wanted::Http1 | Wanted::Raw => pool.count_connecting(wanted == Wanted::Raw, true),
        }
        Self { pool, wanted, settled: false }
    }

    /// Ends it where nobody has anything to look for: nobody waited for it, and it has its room, or had none.
    fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        match self.wanted {
            Wanted::Http2 | Wanted::Either => self.pool.http2_connecting.set(false),
            Wanted::Http1 | Wanted::Raw => self.pool.count_connecting(self.wanted == Wanted::Raw, false),
        }
        match (self.settled, self.wanted.is_shared()) {
            (true, _) => {}
            (false, true) => self.pool.wake_all(),
            (false, false) => self.pool.vacated(),
        }
    }
}

fn http1_config(http: &HttpOptions) -> Arc<h1::Config> {
    Arc::new(h1::Config {
        max_headers: http.max_headers_count,
        max_head_bytes: http.max_response_headers_kb.saturating_mul(1024),
        accept_http_10: true,
        enable_trailers: http.http1.enable_trailers,
        allow_chunked_length: http.http1.allow_chunked_length,
        header_case: http.http1.header_case,
        send_fully_qualified_url: http.http1.send_fully_qualified_url,
        ..h1::Config::default()
    })
}
