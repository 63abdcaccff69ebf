//! One attempt: a host, a connection, the request out, and what becomes of upstream's response.

use std::rc::Rc;
use std::time::Duration;

use waystation_filter_api::flags::ResponseFlag;
use waystation_http::{Headers, Known, sanitize_response};
use waystation_route::Route;
use waystation_upstream::NoHost;
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::host::{ActiveRequest, Outcome as HostOutcome};
use waystation_upstream::outlier::LocalOrigin;

use super::connect::Unmade;
use super::hedge::{Abandoned, Answer};
use super::{RetryPermit, Routing, outlier};
use crate::http::downstream::Downstream;
use crate::http::end::{ResetReason, StreamEnd};
use crate::http::millis;
use crate::http::retry::{Decision, Outcome, Retries};
use crate::http::stream::Stream;
use crate::http::stream::chain::Stopped;
use crate::http::stream::exchange::{Attempt, Flow, Limits, Step};
use crate::http::stream::outbound::{Failed, Outbound};
use crate::http::stream::upstream::{self, NoStream, RequestPermit, Upstream};
use crate::http::timer::after;
use crate::pool::HostPool;

/// What one attempt has come to.
pub(super) enum Attempted {
    /// The client has its response.
    Answered,
    /// The request is now another one.
    Redirected,
    /// Try again after this.
    Again { after: Duration, rate_limited: bool },
    /// Others that are under way may still answer.
    Left,
    /// One of those answers, and the attempt that was being made is not wanted any more.
    Overtaken(Answer),
    /// The stream is over.
    Over(StreamEnd),
}

/// An attempt that has its stream.
pub(super) struct InFlight {
    pub(super) attempt: Attempt,
    pub(super) pool: Rc<HostPool>,
    /// Until its outcome is told.
    pub(super) active: Option<ActiveRequest>,
    pub(super) _request: RequestPermit,
    /// The request is only a head.
    bodiless: bool,
    /// The host was charged with its slowness.
    charged: bool,
    /// Another was begun in its stead: there will be no second one.
    pub(super) retried: bool,
}

impl<D: Downstream> Stream<'_, D> {
    /// Sends the request to one host and passes its response on, unless that is not the answer.
    pub(super) async fn attempt(
        &mut self,
        routing: &mut Routing<'_>,
        retries: &mut Retries<'_>,
        permit: &mut Option<RetryPermit>,
    ) -> Attempted {
        match self.begin_attempt(routing, retries, permit).await {
            Ok(flight) => self.follow(flight, None, routing, retries, permit).await,
            Err(attempted) => attempted,
        }
    }

    /// Sends the head of the request to one host.
    async fn begin_attempt(
        &mut self,
        routing: &mut Routing<'_>,
        retries: &mut Retries<'_>,
        permit: &mut Option<RetryPermit>,
    ) -> Result<InFlight, Attempted> {
        let now = self.timer.now();
        let cluster = Rc::clone(&routing.cluster);
        let load = routing.priorities.as_mut();
        let load = load.and_then(|previous| routing.local.retry_load(&cluster, previous));
        let pool = match self.pick(routing, load.as_ref(), now) {
            Ok(pool) => pool,
            Err(no_host) => {
                // A host that may have no pool is counted by then.
                if no_host != NoHost::PoolOverflow {
                    cluster.stats.upstream_cx_none_healthy().inc();
                }
                // There was no attempt.
                self.attempt_log = None;
                self.count(routing, 503);
                return Err(Attempted::Over(StreamEnd::NoHealthyUpstream));
            }
        };
        let host = pool.host();
        if routing.retry.is_some_and(|policy| !policy.host_predicates.is_empty()) {
            routing.tried.push(host.id());
        }
        if let Some(priorities) = &mut routing.priorities {
            priorities.attempted(host.priority());
        }
        let previous = self.info.upstream.host.replace(Rc::clone(&host) as _);
        let keep_original = !self.cx.hcm.router.suppress_envoy_headers;
        routing.route.rewrite_host_to_upstream(&mut self.heads.request, host.hostname(), keep_original);
        let priority = routing.action.priority;
        let upstream = match upstream::ready(&pool, &cluster, routing.carried, now) {
            Some(upstream) => Ok(upstream),
            None => self.connect(&pool, &cluster, priority, routing, retries).await,
        };
        let asked = now;
        let now = self.timer.now();
        self.info.timing.pool_ready = Some(now.saturating_duration_since(asked));
        let upstream = match upstream {
            Ok(upstream) => upstream,
            Err(Unmade::Over(end)) => {
                // It counts as under way.
                if let StreamEnd::RouteTimeout { .. } = end {
                    self.count_timeout(routing);
                }
                return Err(Attempted::Over(end));
            }
            Err(Unmade::Overtaken(answer)) => return Err(Attempted::Overtaken(answer)),
            Err(Unmade::Failed(NoStream { reason, transport })) => {
                // An overflow is nobody's: no host was asked.
                if reason == ResetReason::Overflow {
                    self.info.upstream.host = previous;
                } else {
                    self.info.upstream.attempted.extend(previous);
                    cluster.local_origin(&host, LocalOrigin::ConnectFailed);
                }
                self.info.upstream.transport_failure_reason =
                    transport.as_ref().map(|reason| reason.to_string().into());
                let outcome = Outcome::Reset(reason, false);
                return Err(self.after_failure(routing, retries, permit, outcome, reason, transport, None));
            }
        };
        self.info.upstream.attempted.extend(previous);
        let Some(request) = RequestPermit::acquire(&cluster, priority) else {
            // Nothing was sent on it: the next request can be.
            if let Upstream::Http1(connection) = upstream {
                pool.put_idle(connection, &cluster, now);
            }
            let reason = ResetReason::Overflow;
            let outcome = Outcome::Reset(reason, false);
            return Err(self.after_failure(routing, retries, permit, outcome, reason, None, None));
        };
        cluster.local_origin(&host, LocalOrigin::Connected);
        let active = host.begin_request();
        let info = upstream.info();
        self.info.upstream.local_address.clone_from(&info.local_address);
        self.info.upstream.connection_id = Some(info.id);
        self.info.upstream.tls.clone_from(&info.tls);
        self.info.upstream.protocol = upstream.protocol();
        self.info.timing.first_upstream_tx = Some(now);
        self.log_pool_ready(now);
        routing.counted.begin(now, &host, pool.zone_stats(&self.cx.worker, &cluster));
        let timeouts = &routing.timeouts;
        let per_try = Some(timeouts.per_try).filter(|timeout| !timeout.is_zero());
        let mut attempt = Attempt {
            upstream: self.outbound(upstream, &cluster),
            replayed: 0,
            request_sent: false,
            tunnel_held: false,
            head_seen: false,
            response_done: false,
            keep: retries.is_enabled() || routing.action.internal_redirect.is_some(),
            keep_limit: self.keep_limit(routing.route),
            limits: Limits {
                per_try: after(now, per_try.filter(|_| self.request_complete || self.facts.tunnel)),
                per_try_timeout: per_try,
                per_try_idle: Some((timeouts.per_try_idle, now)).filter(|(timeout, _)| !timeout.is_zero()),
                max_duration: after(now, cluster.http.max_stream_duration),
                alternative: routing.alternative,
            },
            flow: Flow::new(&cluster),
        };
        // The body is measured for each attempt, the wire for all of them.
        (self.info.upstream.bytes.body_sent, self.info.upstream.bytes.body_received) = (0, 0);
        // A CONNECT that ends here is accepted by its connection.
        let raw = matches!(attempt.upstream.codec, Upstream::Tcp(_));
        attempt.tunnel_held = self.facts.tunnel && !raw;
        let bodiless = self.request_passed() && self.heads.kept.is_empty() && !self.request_has_trailers;
        attempt.request_sent = bodiless;
        self.info.timing.last_upstream_tx = bodiless.then_some(now);
        let (beside, heads) = self.beside_heads();
        if let Err(failed) = attempt.upstream.send_head(beside, &heads.request, bodiless) {
            let reason = match failed {
                Failed::Reset(reason) => reason,
                Failed::Reply(reply) => {
                    self.release(attempt.upstream, &pool, &cluster, false);
                    // The answer may take its time; it is none of upstream's.
                    drop((request, active));
                    return Err(self.stopped(Stopped::Reply(reply)).await);
                }
            };
            cluster.local_origin(&host, LocalOrigin::ConnectFailed);
            self.lose(attempt.upstream, &cluster, reason);
            let outcome = Outcome::Reset(reason, true);
            return Err(self.after_failure(routing, retries, permit, outcome, reason, None, Some(active)));
        }
        Ok(InFlight {
            attempt,
            pool,
            active: Some(active),
            _request: request,
            bodiless,
            charged: false,
            retried: false,
        })
    }

    /// Passes the response of an attempt on, unless that is not the answer; `said` is what it has said already.
    pub(super) async fn follow(
        &mut self,
        mut flight: InFlight,
        mut said: Option<Step>,
        routing: &mut Routing<'_>,
        retries: &mut Retries<'_>,
        permit: &mut Option<RetryPermit>,
    ) -> Attempted {
        let cluster = Rc::clone(&routing.cluster);
        loop {
            let step = match said.take() {
                Some(step) => step,
                None => {
                    std::future::poll_fn(|task| self.poll_attempts(task, &mut flight, routing, retries)).await
                }
            };
            match step {
                Step::Informational => {
                    let status = self.heads.response.status().unwrap_or(0);
                    self.count(routing, status);
                    // This attempt stands now, and takes its time.
                    retries.disable();
                    self.abandon(routing, &Abandoned::Unwanted);
                    self.interim = true;
                    (flight.attempt.limits.per_try, flight.attempt.limits.per_try_timeout) = (None, None);
                    // Others than 100 are for the hop that sent them, as Envoy has it.
                    if self.cx.hcm.proxy_100_continue && status == 100 {
                        sanitize_response(&mut self.heads.response, false);
                        self.send_informational();
                    }
                    self.heads.response.clear();
                }
                Step::Head { mut end } => {
                    let status = self.heads.response.status().unwrap_or(0);
                    if let Some(log) = &mut self.attempt_log {
                        log.status = status;
                    }
                    let mut details = "via_upstream";
                    if self.is_handshake_failed(&flight.attempt, status) {
                        self.heads.response.remove(Known::ContentLength);
                        self.heads.response.remove(Known::ContentType);
                        flight.attempt.response_done = true;
                        (end, details) = (true, "websocket_handshake_unsuccessful");
                    }
                    let now = self.timer.now();
                    self.info.timing.first_upstream_rx = Some(now);
                    self.info.timing.last_upstream_rx = flight.attempt.response_done.then_some(now);
                    routing.counted.head(&self.heads.response, cluster.request_sizes.is_some());
                    outlier::answered(&cluster, &flight.pool.host(), &self.heads.response, self.is_grpc);
                    if let Some(active) = flight.active.take() {
                        if let Some(check) = &cluster.health_check
                            && self.heads.response.contains(Known::XEnvoyImmediateHealthCheckFail)
                        {
                            check.fail_by_traffic(active.host());
                        }
                        active.finish(if status >= 500 { HostOutcome::Error } else { HostOutcome::Success });
                    }
                    let decision = match flight.retried {
                        // Another is on its way; this one is only asked whether it would do.
                        true if retries.wants(Outcome::Response(&self.heads.response)) => None,
                        true => Some(Decision::Stand),
                        false => Some(self.decide(routing, retries, permit, None)),
                    };
                    let refused = !matches!(decision, Some(Decision::Stand));
                    match decision {
                        Some(Decision::Again { after, rate_limited }) => {
                            if self.cx.hcm.router.dynamic_stats {
                                routing.local.extras(&self.cx.worker, &cluster).retry().record(status);
                            }
                            self.release(flight.attempt.upstream, &flight.pool, &cluster, end);
                            return Attempted::Again { after, rate_limited };
                        }
                        Some(Decision::LimitExceeded) => {
                            self.flag(ResponseFlag::UpstreamRetryLimitExceeded);
                        }
                        Some(Decision::Overflow) => self.flag(ResponseFlag::UpstreamOverflow),
                        Some(Decision::Stand) | None => {}
                    }
                    if let Some(policy) =
                        routing.action.internal_redirect.as_deref().filter(|p| p.handles(status))
                    {
                        let whole = self.request_complete
                            && (flight.attempt.keep && !self.outgrown || flight.bodiless)
                            && !self.facts.tunnel;
                        if whole && self.follow_redirect(policy, status) {
                            cluster.stats.upstream_internal_redirect_succeeded_total().inc();
                            self.count(routing, status);
                            self.release(flight.attempt.upstream, &flight.pool, &cluster, end);
                            self.heads.response.clear();
                            return Attempted::Redirected;
                        }
                        cluster.stats.upstream_internal_redirect_failed_total().inc();
                    }
                    if refused && !routing.parked.is_empty() {
                        self.release(flight.attempt.upstream, &flight.pool, &cluster, false);
                        return Attempted::Left;
                    }
                    *permit = None;
                    // This response stands, even if it breaks off before anything of it went downstream.
                    retries.disable();
                    self.abandon(routing, &Abandoned::Unwanted);
                    // Nothing is sent again; what has not been sent yet still is.
                    self.heads.kept.drain(..flight.attempt.replayed);
                    self.kept_bytes = self.heads.kept.iter().map(bytes::Bytes::len).sum();
                    flight.attempt.replayed = 0;
                    flight.attempt.keep = false;
                    self.last_activity = self.timer.now();
                    match self.on_response_head(routing, end, details) {
                        Ok(()) => self.send_encoded(),
                        Err(stopped) => {
                            self.release(flight.attempt.upstream, &flight.pool, &cluster, false);
                            drop((flight._request, flight.active));
                            self.chain.skip_encode();
                            return self.stopped(stopped).await;
                        }
                    }
                }
                Step::Finished => {
                    self.deadlines.route = None;
                    self.record_time(routing);
                    self.release(
                        flight.attempt.upstream,
                        &flight.pool,
                        &cluster,
                        flight.attempt.request_sent,
                    );
                    return Attempted::Answered;
                }
                Step::Reply(reply) => {
                    self.release(flight.attempt.upstream, &flight.pool, &cluster, false);
                    drop((flight._request, flight.active));
                    if flight.attempt.head_seen {
                        self.chain.skip_encode();
                    }
                    return self.stopped(Stopped::Reply(reply)).await;
                }
                Step::Reset(reason) => {
                    self.flag_attempt(reason.flag());
                    cluster.local_origin(&flight.pool.host(), LocalOrigin::ConnectFailed);
                    self.lose(flight.attempt.upstream, &cluster, reason);
                    if self.response_started {
                        let transport = None;
                        return Attempted::Over(StreamEnd::UpstreamReset {
                            reason,
                            retried: false,
                            begun: true,
                            transport,
                        });
                    }
                    let active = flight.active.take();
                    if flight.retried {
                        return self.fail(routing, reason, None, active);
                    }
                    let outcome = Outcome::Reset(reason, true);
                    return self.after_failure(routing, retries, permit, outcome, reason, None, active);
                }
                Step::PerTry { .. } if routing.timeouts.hedge_on_per_try_timeout => {
                    flight.attempt.limits.end_tries();
                    flight.charged = true;
                    cluster.local_origin(&flight.pool.host(), outlier::timed_out(routing.alternative));
                    self.flag_attempt(ResponseFlag::UpstreamRequestTimeout);
                    if flight.retried || flight.attempt.head_seen || self.interim || !self.may_hedge(retries)
                    {
                        continue;
                    }
                    match self.decide(routing, retries, permit, Some(Outcome::Slow)) {
                        Decision::Again { after, rate_limited } => {
                            routing.timed_out = true;
                            self.park(routing, flight);
                            return Attempted::Again { after, rate_limited };
                        }
                        Decision::LimitExceeded => self.flag(ResponseFlag::UpstreamRetryLimitExceeded),
                        Decision::Overflow => self.flag(ResponseFlag::UpstreamOverflow),
                        Decision::Stand => {}
                    }
                }
                Step::PerTry { idle } => {
                    routing.timed_out = true;
                    self.flag_attempt(ResponseFlag::UpstreamRequestTimeout);
                    if idle {
                        cluster.stats.upstream_rq_per_try_idle_timeout().inc();
                    } else {
                        cluster.stats.upstream_rq_per_try_timeout().inc();
                    }
                    cluster.local_origin(&flight.pool.host(), outlier::timed_out(routing.alternative));
                    self.release(flight.attempt.upstream, &flight.pool, &cluster, false);
                    if let Some(active) = flight.active.take() {
                        active.finish(HostOutcome::Timeout);
                    }
                    let end = match idle {
                        true => StreamEnd::PerTryIdleTimeout,
                        false => StreamEnd::PerTryTimeout { alternative: routing.alternative },
                    };
                    if self.response_started {
                        return Attempted::Over(end);
                    }
                    match self.decide(routing, retries, permit, Some(Outcome::PerTryTimeout)) {
                        Decision::Again { after, rate_limited } => {
                            return Attempted::Again { after, rate_limited };
                        }
                        Decision::LimitExceeded => self.flag(ResponseFlag::UpstreamRetryLimitExceeded),
                        Decision::Overflow => self.flag(ResponseFlag::UpstreamOverflow),
                        Decision::Stand => {}
                    }
                    self.count(routing, 504);
                    return Attempted::Over(end);
                }
                Step::End(end) => {
                    let awaited = !flight.attempt.head_seen && !flight.charged;
                    if matches!(end, StreamEnd::RouteTimeout { .. }) && awaited {
                        cluster.local_origin(&flight.pool.host(), outlier::timed_out(routing.alternative));
                    }
                    let host_outcome = match &end {
                        StreamEnd::RouteTimeout { .. } => {
                            self.count_timeout(routing);
                            HostOutcome::Timeout
                        }
                        StreamEnd::UpstreamMaxStreamDuration => {
                            cluster.stats.upstream_rq_max_duration_reached().inc();
                            let outcome = Outcome::Reset(ResetReason::LocalReset, true);
                            let decision = match self.response_started || flight.retried {
                                true => Decision::Stand,
                                false => self.decide(routing, retries, permit, Some(outcome)),
                            };
                            match decision {
                                Decision::Again { after, rate_limited } => {
                                    self.release(flight.attempt.upstream, &flight.pool, &cluster, false);
                                    if let Some(active) = flight.active.take() {
                                        active.finish(HostOutcome::Timeout);
                                    }
                                    return Attempted::Again { after, rate_limited };
                                }
                                Decision::LimitExceeded => {
                                    self.flag(ResponseFlag::UpstreamRetryLimitExceeded);
                                }
                                Decision::Overflow => self.flag(ResponseFlag::UpstreamOverflow),
                                Decision::Stand => {}
                            }
                            HostOutcome::Timeout
                        }
                        _ => HostOutcome::Cancelled,
                    };
                    let clean = flight.attempt.response_done && flight.attempt.request_sent;
                    self.release(flight.attempt.upstream, &flight.pool, &cluster, clean);
                    if let Some(active) = flight.active.take() {
                        active.finish(host_outcome);
                    }
                    return Attempted::Over(end);
                }
            }
        }
    }

    /// What a filter's verdict makes of an attempt.
    pub(super) async fn stopped(&mut self, stopped: Stopped) -> Attempted {
        match stopped {
            Stopped::End(end) => Attempted::Over(end),
            Stopped::Reply(reply) if self.response_started => {
                Attempted::Over(StreamEnd::LateReply(reply.details))
            }
            Stopped::Reply(reply) => match self.reply(*reply).await {
                Ok(()) => Attempted::Answered,
                Err(end) => Attempted::Over(end),
            },
        }
    }

    /// An attempt that failed without a response.
    #[expect(clippy::too_many_arguments, reason = "one exit for every kind of failure")]
    fn after_failure(
        &mut self,
        routing: &Routing<'_>,
        retries: &mut Retries<'_>,
        permit: &mut Option<RetryPermit>,
        outcome: Outcome<'_>,
        reason: ResetReason,
        transport: Option<Box<str>>,
        active: Option<ActiveRequest>,
    ) -> Attempted {
        match self.decide(routing, retries, permit, Some(outcome)) {
            Decision::Again { after, rate_limited } => {
                if let Some(active) = active {
                    active.finish(HostOutcome::Error);
                }
                self.flag_attempt(reason.flag());
                return Attempted::Again { after, rate_limited };
            }
            Decision::LimitExceeded => self.flag(ResponseFlag::UpstreamRetryLimitExceeded),
            Decision::Overflow => self.flag(ResponseFlag::UpstreamOverflow),
            Decision::Stand => {}
        }
        self.fail(routing, reason, transport, active)
    }

    /// An attempt that failed without a response, and is not retried.
    fn fail(
        &mut self,
        routing: &Routing<'_>,
        reason: ResetReason,
        transport: Option<Box<str>>,
        active: Option<ActiveRequest>,
    ) -> Attempted {
        if let Some(active) = active {
            active.finish(HostOutcome::Error);
        }
        self.flag_attempt(reason.flag());
        let begun = self.interim;
        if !begun {
            self.count(routing, if reason == ResetReason::ProtocolError { 502 } else { 503 });
        }
        if !routing.parked.is_empty() {
            return Attempted::Left;
        }
        let retried = routing.attempts > 1;
        Attempted::Over(StreamEnd::UpstreamReset { reason, retried, begun, transport })
    }

    /// The route timeout is over while an attempt is under way.
    pub(super) fn count_timeout(&self, routing: &Routing<'_>) {
        routing.cluster.stats.upstream_rq_timeout().inc();
        routing.counted.each(|requests| requests.upstream_rq_timeout().inc());
        if !self.response_started && !self.interim {
            self.count(routing, 504);
        }
    }

    /// Passes the response head on.
    fn on_response_head(
        &mut self,
        routing: &mut Routing<'_>,
        end: bool,
        details: &'static str,
    ) -> Result<(), Stopped> {
        let now = self.timer.now();
        let status = self.heads.response.status().unwrap_or(0);
        self.info.details = Some(details.into());
        self.count(routing, status);
        let since = self.info.timing.last_downstream_rx.unwrap_or(self.info.start);
        let elapsed = millis(since, now);
        let switching = self.facts.tunnel && status == 101;
        let head: &mut Headers = &mut self.heads.response;
        sanitize_response(head, switching);
        if !self.cx.hcm.router.suppress_envoy_headers && self.request_complete {
            head.set_number(Known::XEnvoyUpstreamServiceTime, elapsed);
        }
        if routing.response_count {
            head.set_number(Known::XEnvoyAttemptCount, u64::from(routing.attempts));
        }
        for cookie in routing.cookies.drain(..) {
            head.append(Known::SetCookie, cookie);
        }
        self.info.response_code = status;
        self.attempt_count = None;
        self.mutate_response(routing.route, routing.weighted);
        if self.is_tunnel_accepted() {
            self.deadlines.route = None;
        }
        self.begin_encode(end)
    }

    /// Whether an HTTP/1 upstream has said neither yes nor no to a WebSocket: the client gets the head, and as from Envoy
    /// nothing of what follows.
    fn is_handshake_failed(&self, attempt: &Attempt, status: u16) -> bool {
        self.facts.tunnel
            && status != 101
            && status < 400
            && matches!(attempt.upstream.codec, Upstream::Http1(_))
            && (self.heads.request.get(Known::Upgrade))
                .is_some_and(|protocol| protocol.eq_ignore_ascii_case(b"websocket"))
    }

    /// The upstream stream ended before its response did. HTTP/1 has no resets to count, only connections that end.
    pub(super) fn lose(&mut self, upstream: Outbound, cluster: &ClusterRef, reason: ResetReason) {
        let upstream = self.end_filters(upstream);
        self.add_bytes(&upstream);
        upstream.count_loss(cluster, reason);
    }

    pub(in crate::http::stream) fn add_bytes(&mut self, upstream: &Upstream) {
        let (of, bytes) = (upstream.bytes(), &mut self.info.upstream.bytes);
        bytes.header_received += of.header_received;
        bytes.header_sent += of.header_sent;
        bytes.wire_received += of.wire_received;
        bytes.wire_sent += of.wire_sent;
    }

    /// Gives the connection back, or ends the upstream stream; `clean` when both directions have come to their end.
    pub(super) fn release(
        &mut self,
        upstream: Outbound,
        pool: &Rc<HostPool>,
        cluster: &ClusterRef,
        clean: bool,
    ) {
        let upstream = self.end_filters(upstream);
        self.add_bytes(&upstream);
        upstream.release(&self.cx.worker, pool, cluster, clean, self.last_activity);
    }

    /// What a retry or mirror may keep of the request body.
    pub(in crate::http::stream) fn keep_limit(&self, route: &Route) -> usize {
        let of_route =
            route.request_body_buffer_limit.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
        of_route.unwrap_or(self.cx.hcm.buffer_limit)
    }
}
