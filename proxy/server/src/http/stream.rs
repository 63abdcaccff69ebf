//! The life of one request: head rules, route, filters, router, response, log.
//!
//! The engine is generic over the downstream codec and holds the upstream stream as an enum, so that HTTP/1 to HTTP/1
//! runs in one task without a channel, a spawn or a boxed future.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::stream::{Bytes as ByteCounts, Protocol, StreamInfo};
use waystation_format::AccessLogType;
use waystation_http::{Headers, Known};
use waystation_route::{Action, Lookup, Route};

use super::config::Hcm;
use super::downstream::{Cut, Downstream, HeadFacts};
use super::end::StreamEnd;
use super::timer::Timer;
use super::{ConnCx, Table, millis};

mod chain;
mod exchange;
mod local_reply;
mod log;
mod mirror;
mod outbound;
mod redirect;
pub(super) mod request;
mod response;
pub(super) mod router;
pub(super) mod upstream;

use chain::Chain;
use log::AttemptLog;
use request::format_context;
pub(crate) use upstream::Event;

/// Memory of a stream that the worker keeps for the next one.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub(crate) request: Headers,
    pub(crate) request_trailers: Headers,
    pub(crate) response: Headers,
    pub(crate) response_trailers: Headers,
    /// The request body as far as it was read, while it may have to be sent again or has not been sent yet.
    pub(crate) kept: Vec<Bytes>,
    /// For streams that have a task of their own.
    pub(crate) timer: Timer,
    /// A chain without filters, between two streams.
    chain: Chain,
    /// Pieces of a response on their way to the HTTP/2 library.
    pub(crate) pending: VecDeque<Bytes>,
}

/// A head beyond this is not kept.
const KEEP: usize = 8 * 1024;

impl Scratch {
    pub(crate) fn recycle(&mut self) {
        self.kept.clear();
        self.pending.clear();
        self.pending.shrink_to(16);
        self.timer.hand_over();
        for headers in
            [&mut self.request, &mut self.request_trailers, &mut self.response, &mut self.response_trailers]
        {
            headers.clear();
            if headers.capacity_bytes() > KEEP {
                headers.shrink_to(KEEP);
            }
        }
    }
}

/// How a stream begins.
#[derive(Debug)]
pub(crate) struct Begin {
    pub(crate) start: Instant,
    pub(crate) facts: HeadFacts,
    /// The codec or a timeout has already decided.
    pub(crate) refused: Option<StreamEnd>,
}

impl Begin {
    /// A request that is answered without looking at it.
    pub(crate) fn refused(start: Instant, end: StreamEnd) -> Self {
        let facts =
            HeadFacts { protocol: Protocol::Http11, end: false, tunnel: false, expect_continue: false };
        Self { start, facts, refused: Some(end) }
    }
}

/// When things are due. `None` is never.
#[derive(Clone, Copy, Debug, Default)]
struct Deadlines {
    /// The route timeout, from the end of the request.
    route: Option<Instant>,
    /// `request_timeout`, until the request is complete.
    request: Option<Instant>,
    /// `max_stream_duration`.
    max_duration: Option<Instant>,
    /// `max_stream_duration` of the cluster, of attempts beside the current one.
    parked: Option<Instant>,
    /// The stream idle timeout; counted from `last_activity`.
    idle: Option<Duration>,
    /// `access_log_flush_interval`.
    log: Option<Instant>,
}

impl Deadlines {
    /// Those of a stream that begins at `start`, with a complete request and no route yet.
    fn new(hcm: &Hcm, start: Instant) -> Self {
        Self {
            max_duration: super::timer::after(start, hcm.timeouts.max_stream_duration),
            idle: hcm.timeouts.stream_idle,
            log: super::timer::after(start, hcm.log_interval),
            ..Self::default()
        }
    }
}

/// One request and its response.
struct Stream<'a, D: Downstream> {
    cx: &'a ConnCx,
    down: &'a mut D,
    timer: &'a mut Timer,
    heads: &'a mut Scratch,
    info: StreamInfo,
    facts: HeadFacts,
    table: Option<(Rc<Table>, u32)>,
    chain: Chain,
    deadlines: Deadlines,
    last_activity: Instant,
    /// The stable random value of this request: runtime fractions, weighted clusters.
    random: u64,
    /// The route timeout, once the router has resolved it.
    route_timeout: Option<Duration>,
    request_complete: bool,
    request_has_trailers: bool,
    response_has_trailers: bool,
    /// The request body is more than may be kept for a further attempt.
    outgrown: bool,
    /// The response's end is queued for the client.
    response_ended: bool,
    /// Bytes in `heads.kept`.
    kept_bytes: usize,
    /// The response head went out.
    response_started: bool,
    /// Upstream has sent a 1xx head.
    interim: bool,
    is_head: bool,
    is_grpc: bool,
    /// Tells how many attempts there were in a local reply of the router's, if the virtual host wants that.
    attempt_count: Option<u32>,
    /// What the router's log will say of the attempt that is under way, if there is such a log.
    attempt_log: Option<AttemptLog>,
    /// Copies of the request that are still under way.
    mirrors: Vec<mirror::Feed>,
    /// Internal redirects followed, and the routes they left.
    redirects: u32,
    /// Bytes of body that were read before them, and belong to what the request has become as well.
    resent: u64,
    redirected_from: Vec<u32>,
    /// An upgrade or CONNECT that is allowed.
    upgraded: bool,
    /// It has come to its own end.
    is_over: bool,
}

/// Serves one request; the code of its response, if it came to one.
pub(crate) async fn serve<D: Downstream>(
    cx: &ConnCx,
    down: &mut D,
    timer: &mut Timer,
    heads: &mut Scratch,
    begin: Begin,
) -> Option<u16> {
    let Begin { start, facts, refused } = begin;
    let stats = &cx.hcm.stats.hcm;
    stats.downstream_rq_total().inc();
    stats.downstream_rq_active().inc();
    match facts.protocol {
        Protocol::Http2 => stats.downstream_rq_http2_total().inc(),
        _ => stats.downstream_rq_http1_total().inc(),
    }
    let random = cx.worker.random();
    let info = StreamInfo::new(
        random,
        start,
        cx.worker.wall_clock(start),
        Rc::clone(&cx.info),
        Some(facts.protocol),
    );
    let mut stream = Stream {
        down,
        timer,
        info,
        facts,
        table: None,
        chain: std::mem::take(&mut heads.chain),
        deadlines: Deadlines {
            request: super::timer::after(start, cx.hcm.timeouts.request).filter(|_| !facts.end),
            ..Deadlines::new(&cx.hcm, start)
        },
        last_activity: start,
        random,
        route_timeout: None,
        request_complete: facts.end,
        request_has_trailers: false,
        response_has_trailers: false,
        outgrown: false,
        response_ended: false,
        kept_bytes: 0,
        response_started: false,
        interim: false,
        is_head: heads.request.method() == Some(b"HEAD"),
        is_grpc: request::is_grpc(&heads.request),
        attempt_count: None,
        attempt_log: None,
        mirrors: Vec::new(),
        redirects: 0,
        resent: 0,
        redirected_from: Vec::new(),
        upgraded: false,
        is_over: false,
        heads,
        cx,
    };
    stream.info.bytes = stream.down.bytes();
    if facts.end {
        stream.info.timing.last_downstream_rx = Some(start);
    }
    let ended = match refused {
        Some(end) => Err(end),
        None => stream.run().await,
    };
    if let Err(end) = ended {
        stream.end_early(end).await;
    }
    stream.is_over = true;
    Some(stream.info.response_code).filter(|code| *code != 0)
}

/// The last thing that happens to a stream, however it ends. Who closes its connection, as the end of a drain does, drops it
/// where it stands.
impl<D: Downstream> Drop for Stream<'_, D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What may have panicked is not asked again: a second panic would end the process.
            if self.upgraded {
                self.cx.hcm.stats.hcm.downstream_cx_upgrades_active().dec();
            }
            return self.cx.hcm.stats.hcm.downstream_rq_active().dec();
        }
        if !self.is_over {
            self.info.flags.set(ResponseFlag::DownstreamConnectionTermination);
            self.info.details = Some("downstream_local_disconnect".into());
        }
        self.complete();
    }
}

impl<D: Downstream> Stream<'_, D> {
    async fn run(&mut self) -> Result<(), StreamEnd> {
        self.check_overload()?;
        self.prepare_head()?;
        let selected = self.select_route();
        if self.cx.hcm.log_on_request {
            self.log(AccessLogType::DownstreamStart, self.timer.now());
        }
        selected?;
        self.check_upgrade()?;
        if self.facts.tunnel {
            self.upgraded = true;
            self.cx.hcm.stats.hcm.downstream_cx_upgrades_total().inc();
            self.cx.hcm.stats.hcm.downstream_cx_upgrades_active().inc();
        }
        // Once more for each internal redirect that is followed.
        while !self.route_once().await? {}
        Ok(())
    }

    /// Before anything is spent on a request, as in Envoy: not even its head is looked at.
    fn check_overload(&self) -> Result<(), StreamEnd> {
        let Some(overload) = &self.cx.hcm.overload else { return Ok(()) };
        if !overload.rejects_request(|| self.cx.worker.random()) {
            return Ok(());
        }
        self.cx.hcm.stats.hcm.downstream_rq_overload_close().inc();
        Err(StreamEnd::Overloaded { told: self.cx.hcm.append_local_overload })
    }

    /// Takes the request through the filters and to its route's action. `false` when it was redirected internally.
    async fn route_once(&mut self) -> Result<bool, StreamEnd> {
        self.build_chain();
        if !self.chain.is_empty() && self.decode_head().await? {
            return Ok(true);
        }
        self.cx.hcm.stats.router.rq_total().inc();
        let Some((table, index)) = self.table.clone() else { return Err(self.no_route()) };
        let Some(route) = table.held.route(index) else { return Err(self.no_route()) };
        match &route.action {
            Action::Route(action) => return self.forward(&table, route, action).await,
            Action::DirectResponse(direct) => {
                self.cx.hcm.stats.router.rq_direct_response().inc();
                let (body, content_type) =
                    direct.body(&format_context(&self.info, Some(&self.heads.request), None));
                // RFC 9110 section 15.3.2 and 15.4: these say where; it is here.
                let location = matches!(direct.status, 201 | 300..400).then(|| own_uri(&self.heads.request));
                self.direct(route, direct.status, body, content_type, location).await?;
            }
            // To Envoy a redirect is a direct response; its `rq_redirect` has stayed at 0 ever since.
            Action::Redirect(_) => {
                self.cx.hcm.stats.router.rq_direct_response().inc();
                let now = self.timer.now();
                let Some((status, location)) = route.redirect(&self.heads.request, &self.info, now) else {
                    return Err(self.no_route());
                };
                self.direct(route, status, Bytes::new(), None, Some(location)).await?;
            }
            Action::NonForwarding => return Err(self.no_route()),
        }
        Ok(true)
    }

    /// Finds the route of the request as it is now.
    fn select_route(&mut self) -> Result<(), StreamEnd> {
        let Some(table) = self.cx.table(&self.heads.request) else {
            // A filter may fetch one.
            self.info.route = None;
            self.table = None;
            return Ok(());
        };
        if !self.info.internal {
            for name in table.held.internal_only_headers() {
                self.heads.request.remove(name);
            }
        }
        let found = match table.held.find(&self.heads.request, &self.info, self.random) {
            Lookup::Route(index, _) => Some(index),
            Lookup::TlsRedirect(_) => {
                self.cx.hcm.stats.router.rq_total().inc();
                self.cx.hcm.stats.router.rq_direct_response().inc();
                let location = waystation_route::tls_redirect_location(&self.heads.request);
                return Err(StreamEnd::TlsRedirect(location.into()));
            }
            Lookup::NoRoute(_) | Lookup::NoVirtualHost { .. } => None,
        };
        self.info.route = found.map(|index| {
            let view: Rc<dyn waystation_filter_api::stream::RouteView> = Rc::clone(&table) as _;
            (view, index)
        });
        self.info.virtual_cluster =
            found.and_then(|index| table.held.virtual_cluster(index, &self.heads.request));
        self.table = found.map(|index| (table, index));
        self.limit_duration();
        Ok(())
    }

    /// The deadlines that the route has a say in.
    fn limit_duration(&mut self) {
        if let Some((table, index)) = &self.table
            && let Some(Route { action: Action::Route(action), .. }) = table.held.route(*index)
        {
            if let Some(idle) = action.idle_timeout {
                self.deadlines.idle = Some(idle).filter(|idle| !idle.is_zero());
            }
            let duration = waystation_route::timeouts::stream_duration(
                action,
                &self.heads.request,
                self.cx.hcm.timeouts.max_stream_duration,
            );
            self.deadlines.max_duration = super::timer::after(self.info.start, duration.max);
            if let Some(max) = duration.max.filter(|_| duration.tells_upstream) {
                waystation_route::timeouts::set_grpc_timeout(&mut self.heads.request, max);
            }
        }
    }

    fn no_route(&self) -> StreamEnd {
        self.cx.hcm.stats.router.no_route().inc();
        StreamEnd::RouteNotFound
    }

    /// Ends a stream for a cause of its own: with a local reply, or by cutting off what had begun.
    async fn end_early(&mut self, end: StreamEnd) {
        let stats = &self.cx.hcm.stats.hcm;
        match &end {
            StreamEnd::StreamIdleTimeout { .. } => stats.downstream_rq_idle_timeout().inc(),
            StreamEnd::MaxStreamDuration { .. } => stats.downstream_rq_max_duration_reached().inc(),
            StreamEnd::RequestTimeout => stats.downstream_rq_timeout().inc(),
            StreamEnd::RequestTooLarge => stats.downstream_rq_too_large().inc(),
            StreamEnd::ResponseTooLarge => stats.rs_too_large().inc(),
            StreamEnd::DispatchAborted => stats.downstream_rq_overload_close().inc(),
            StreamEnd::Codec { .. } | StreamEnd::LowVersion => stats.downstream_cx_protocol_error().inc(),
            StreamEnd::DownstreamReset
            | StreamEnd::DownstreamGone
            | StreamEnd::DownstreamViolation(_)
            | StreamEnd::HeadRefused(_)
                // An HTTP/1 connection goes with its request; HTTP/2 counts its end itself.
                if self.facts.protocol != Protocol::Http2 =>
            {
                stats.downstream_cx_destroy_active_rq().inc();
                stats.downstream_cx_destroy_remote_active_rq().inc();
            }
            _ => {}
        }
        if let Some((flag, details)) = end.silent() {
            if let Some(flag) = flag {
                self.info.flags.set(flag);
            }
            self.info.details = Some(details.into());
            let refused = matches!(end, StreamEnd::HeadRefused(_));
            self.down.reset(if refused { Cut::Failed } else { Cut::Refused });
            return;
        }
        if self.response_started {
            stats.downstream_rq_tx_reset().inc();
            if let StreamEnd::UpstreamReset { reason, .. } = &end {
                self.cx.hcm.stats.router.rq_reset_after_downstream_response_started().inc();
                self.info.flags.set(reason.flag());
            } else if let Some(flag) = end.reply().and_then(|reply| reply.reply.flag) {
                self.info.flags.set(flag);
            }
            self.info.details = Some(end.details_after_start());
            // What is already queued is still the client's. The HTTP/2 library drops what it has not written when a
            // stream is reset, so its connection gets a turn first.
            let _ = self.flush().await;
            tokio::task::yield_now().await;
            let tunnel_lost = self.facts.tunnel && matches!(end, StreamEnd::UpstreamReset { .. });
            self.down.reset(if tunnel_lost { Cut::Tunnel } else { Cut::Failed });
            return;
        }
        let Some(mut reply) = end.reply() else { return };
        if self.cx.hcm.router.suppress_envoy_headers {
            reply.reply.headers.remove(Known::XEnvoyOverloaded);
        }
        // An HTTP/2 connection outlives its requests' errors, save that one in Envoy.
        if reply.close && (self.facts.protocol != Protocol::Http2 || matches!(end, StreamEnd::UpgradeFailed))
        {
            self.down.close_after_response();
        }
        let _ = self.reply(reply.reply).await;
    }

    /// Waits until everything queued is on its way, or the client is gone or too slow.
    async fn flush(&mut self) -> Result<(), StreamEnd> {
        let until = super::timer::after(self.timer.now(), self.flush_timeout());
        let (down, timer) = (&mut *self.down, &mut *self.timer);
        std::future::poll_fn(|task| match down.poll_flush(task) {
            std::task::Poll::Pending => {
                timer.poll(task, until).map(|()| Err(StreamEnd::StreamIdleTimeout { request_complete: true }))
            }
            ready => ready,
        })
        .await
    }

    /// The stream idle timeout, as long as it is at the present pressure.
    fn idle_timeout(&self) -> Option<Duration> {
        let idle = self.deadlines.idle?;
        let overload = self.cx.hcm.overload.as_ref();
        Some(overload.map_or(idle, |overload| overload.reduce_timeouts.stream_idle.of(idle)))
    }

    /// How long a response that has ended may take to leave.
    fn flush_timeout(&self) -> Option<Duration> {
        let Some(flush) = self.cx.hcm.timeouts.flush else { return self.idle_timeout() };
        let overload = self.cx.hcm.overload.as_ref();
        Some(overload.map_or(flush, |overload| overload.reduce_timeouts.stream_flush.of(flush)))
    }

    /// Statistics, filters' completion, access log.
    fn complete(&mut self) {
        // Of an attempt that was dropped where it stood.
        self.end_attempt_log();
        let now = self.timer.now();
        self.info.timing.complete = Some(now);
        self.info.bytes = self.bytes();
        let stats = &self.cx.hcm.stats;
        stats.hcm.downstream_rq_active().dec();
        if self.upgraded {
            stats.hcm.downstream_cx_upgrades_active().dec();
        }
        // Whichever side cuts a stream short, Envoy's codec is told to reset it, and counts that.
        if !(self.request_complete && self.response_ended) {
            stats.hcm.downstream_rq_rx_reset().inc();
        }
        stats.hcm.downstream_rq_time().record(millis(self.info.start, now));
        // The answers to health checks are not what clients get.
        if self.info.response_code != 0 && !self.info.health_check {
            stats.classes.record(self.info.response_code);
            stats.listener_classes.record(self.info.response_code);
        }
        self.complete_chain();
        // Its memory is the next stream's.
        self.chain.recycle();
        std::mem::swap(&mut self.chain, &mut self.heads.chain);
        self.log(AccessLogType::DownstreamEnd, now);
    }

    fn bytes(&self) -> ByteCounts {
        let mut bytes = self.down.bytes();
        bytes.body_received += self.resent;
        bytes
    }

    fn flag(&mut self, flag: ResponseFlag) {
        self.info.flags.set(flag);
    }
}

/// The URI that a request asks for.
fn own_uri(request: &Headers) -> Vec<u8> {
    let scheme = request.get(Known::Scheme).unwrap_or(b"http");
    [scheme, b"://", request.authority().unwrap_or_default(), request.path().unwrap_or_default()].concat()
}
