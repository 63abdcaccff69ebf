//! The router: the cluster of a request, its timeouts and copies, and attempts until one stands.

use std::rc::Rc;
use std::time::Duration;

use waystation_http::Known;
use waystation_route::timeouts::{self, RequestTimeouts, RouterOptions};
use waystation_route::{
    Action, ClusterPolicies, ClusterRef as RouteCluster, ClusterSpecifier, HashPolicy, RetryPolicy, Route,
    RouteAction, WeightedCluster,
};
use waystation_upstream::admission::Resource;
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::load_balancer::PreviousPriorities;
use waystation_upstream::{MetadataMatch, Priority};

use super::Stream;
use super::chain::Stopped;
use super::upstream::Carried;
use crate::http::Table;
use crate::http::downstream::Downstream;
use crate::http::end::StreamEnd;
use crate::http::filters::STRICT_HEADERS;
use crate::http::retry::{Admission, Decision, Outcome, Retries};
use crate::http::timer::after;
use crate::worker::LocalCluster;

mod attempt;
mod connect;
mod counting;
mod hedge;
pub(in crate::http) mod outlier;

use attempt::Attempted;
use counting::Counted;
use hedge::{Abandoned, Answer, Parked};

/// The conditions of `x-envoy-retry-on`.
const RETRY_ON: [&str; 11] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
];

/// The conditions of `x-envoy-retry-grpc-on`.
const RETRY_GRPC_ON: [&str; 5] =
    ["cancelled", "deadline-exceeded", "resource-exhausted", "unavailable", "internal"];

/// What the attempts of one request share.
struct Routing<'r> {
    route: &'r Route,
    action: &'r RouteAction,
    weighted: Option<&'r WeightedCluster>,
    retry: Option<&'r RetryPolicy>,
    local: Rc<LocalCluster>,
    cluster: Rc<ClusterRef>,
    timeouts: RequestTimeouts,
    options: RouterOptions,
    hash: Option<u64>,
    metadata: Option<&'r MetadataMatch>,
    cookies: Vec<String>,
    alternative: bool,
    carried: Carried,
    /// Hosts tried, where a predicate asks for them.
    tried: Vec<u64>,
    /// `retry_priority`: the levels tried.
    priorities: Option<PreviousPriorities>,
    attempts: u32,
    request_count: bool,
    response_count: bool,
    /// `include_is_timeout_retry_header`.
    timeout_header: bool,
    /// Whether the last attempt ran into a per-try timeout.
    timed_out: bool,
    counted: Counted<'r>,
    /// Attempts that hedging has left behind and that may still answer.
    parked: Vec<Parked<'r>>,
}

/// How a back-off ends.
enum Paused {
    Elapsed,
    /// An earlier attempt has the answer.
    Answered(Answer),
    /// A filter has something to say to what came of the request.
    Stopped(Stopped),
}

/// A unit of `max_retries`, given back on drop.
struct RetryPermit(Rc<ClusterRef>, Priority);

impl Drop for RetryPermit {
    fn drop(&mut self) {
        self.0.admission.release(self.1, Resource::Retries);
    }
}

impl<D: Downstream> Stream<'_, D> {
    /// Sends the request where its route says. `false` when the answer was a redirect that is followed here.
    pub(super) async fn forward(
        &mut self,
        table: &Rc<Table>,
        route: &Route,
        action: &RouteAction,
    ) -> Result<bool, StreamEnd> {
        let cx = self.cx;
        let hcm = &cx.hcm;
        let mut cookies = Vec::new();
        let mut hash = self.hash(&action.hash_policies, &mut cookies);
        let (local, picked) = self.target(action, hash);
        let weighted = picked.and_then(|index| match &action.clusters {
            ClusterSpecifier::Weighted(weighted) => weighted.clusters().get(index),
            _ => None,
        });
        let Some((local, cluster)) = local.and_then(|local| local.get().map(|cluster| (local, cluster)))
        else {
            hcm.stats.router.no_cluster().inc();
            return Err(StreamEnd::ClusterNotFound { status: action.cluster_not_found_status });
        };
        self.info.upstream.cluster = Some(Rc::clone(&cluster) as _);
        let point = hcm.overload.as_ref().and_then(|overload| overload.filter_check.as_ref());
        if point.is_some_and(|point| point.sheds(|| cx.worker.random())) {
            hcm.stats.router.rq_overload_local_reply().inc();
            self.info.upstream.attempts = 1;
            return Err(StreamEnd::Overloaded { told: hcm.append_local_overload });
        }
        // Borrowed while the routing keeps the cluster.
        let own = cluster.route_policies.is_some().then(|| Rc::clone(&cluster));
        let own = own.as_deref().and_then(|cluster| ClusterPolicies::of(cluster));
        if let Some(policies) = own.filter(|policies| !policies.hash.is_empty()) {
            cookies.clear();
            hash = self.hash(&policies.hash, &mut cookies);
        }
        let retry = own.and_then(|own| own.retry.as_ref()).or(action.retry_policy.as_deref());
        let mirrors = own.map(|own| &*own.mirrors).filter(|mirrors| !mirrors.is_empty());
        let mirrors = mirrors.unwrap_or(&action.mirrors);
        if hcm.router.strict_headers != 0 {
            self.check_strictly(hcm.router.strict_headers)?;
        }
        let place = self.table.as_ref().map(|(_, index)| *index);
        let counters = place.map_or([None; 2], |route| table.held.counters(route, self.info.virtual_cluster));
        let counted = Counted::new(counters);
        let extras = local.extras(&cx.worker, &cluster);
        if extras.maintenance.contains(cx.worker.random()) {
            cluster.stats.upstream_rq_maintenance_mode().inc();
            self.count_status(&local, &cluster, &counted, 503);
            return Err(StreamEnd::MaintenanceMode);
        }
        let options = RouterOptions {
            insert_expected_timeout: !hcm.router.suppress_envoy_headers,
            respect_expected_timeout: hcm.router.respect_expected_timeout,
        };
        let headers = &mut self.heads.request;
        let timeouts = timeouts::resolve(action, headers, options);
        let alternative = headers.remove(Known::XEnvoyUpstreamRqTimeoutAltResponse);
        headers.remove(Known::XEnvoyUpstreamAltStatName);
        let mut retries =
            Retries::new(retry, headers, || Duration::from_millis(extras.base_back_off.get().max(1)));
        let vhost = self.table.as_ref().and_then(|(_, index)| table.held.virtual_host(*index));
        let request_count = vhost.is_some_and(|vhost| vhost.include_request_attempt_count);
        let response_count = vhost.is_some_and(|vhost| vhost.include_attempt_count_in_response);
        let timeout_header = vhost.is_some_and(|vhost| vhost.include_is_timeout_retry_header);
        if request_count {
            headers.set_number(Known::XEnvoyAttemptCount, 1);
        }
        self.mutate_request(route, weighted);
        let now = self.timer.now();
        let keep_originals = !hcm.router.suppress_envoy_headers;
        route.rewrite(&mut self.heads.request, weighted, &self.info, now, keep_originals);
        self.route_timeout = Some(timeouts.global).filter(|timeout| !timeout.is_zero());
        // The end of a tunnel's request is not waited for.
        if self.request_complete || self.facts.tunnel {
            self.deadlines.route = after(now, self.route_timeout);
        }
        let metadata =
            weighted.map_or(action.metadata_match.as_ref(), |weighted| weighted.metadata_match.as_ref());
        self.start_mirrors(mirrors, route, action, &cluster);
        let mut routing = Routing {
            route,
            action,
            weighted,
            retry,
            local,
            cluster,
            timeouts,
            options,
            hash,
            metadata,
            cookies,
            alternative,
            carried: self.carried(action),
            tried: Vec::new(),
            priorities: retry.and_then(|policy| policy.previous_priorities).map(PreviousPriorities::new),
            attempts: 0,
            request_count,
            response_count,
            timeout_header,
            timed_out: false,
            counted,
            parked: Vec::new(),
        };
        let ended = self.try_until_one_stands(&mut routing, &mut retries).await;
        if !routing.parked.is_empty() {
            self.abandon(&mut routing, &Abandoned::by(ended.as_ref().err()));
        }
        ended
    }

    /// One attempt after the other, or beside it. `false` when the answer was a redirect that is followed here.
    async fn try_until_one_stands(
        &mut self,
        routing: &mut Routing<'_>,
        retries: &mut Retries<'_>,
    ) -> Result<bool, StreamEnd> {
        let mut permit = None;
        loop {
            routing.attempts += 1;
            routing.timed_out = false;
            self.attempt_count = Some(routing.attempts).filter(|_| routing.response_count);
            self.info.upstream.attempts = routing.attempts;
            self.begin_attempt_log(self.timer.now());
            let mut attempted = self.attempt(routing, retries, &mut permit).await;
            let rate_limited = loop {
                self.end_attempt_log();
                self.record_attempt(routing);
                let answer = match attempted {
                    Attempted::Answered => return Ok(true),
                    Attempted::Redirected => return Ok(false),
                    Attempted::Over(end) => return Err(end),
                    Attempted::Again { after, rate_limited } => {
                        match self.pause(after, routing, retries).await? {
                            Paused::Elapsed => break rate_limited,
                            Paused::Answered(answer) => answer,
                            Paused::Stopped(stopped) => {
                                attempted = self.stopped(stopped).await;
                                continue;
                            }
                        }
                    }
                    Attempted::Overtaken(answer) => answer,
                    Attempted::Left => Answer::awaited(routing),
                };
                let (flight, said) = self.unpark(routing, answer);
                attempted = self.follow(flight, said, routing, retries, &mut permit).await;
            };
            self.prepare_retry(routing, rate_limited);
        }
    }

    /// Counts a further attempt, and tells upstream of it.
    fn prepare_retry(&mut self, routing: &Routing<'_>, rate_limited: bool) {
        let stats = &routing.cluster.stats;
        stats.upstream_rq_retry().inc();
        match rate_limited {
            true => stats.upstream_rq_retry_backoff_ratelimited().inc(),
            false => stats.upstream_rq_retry_backoff_exponential().inc(),
        }
        routing.counted.each(|requests| requests.upstream_rq_retry().inc());
        let headers = &mut self.heads.request;
        if routing.request_count {
            headers.set_number(Known::XEnvoyAttemptCount, u64::from(routing.attempts) + 1);
        }
        if routing.timeout_header {
            let timed_out = if routing.timed_out { "true" } else { "false" };
            headers.set(Known::XEnvoyIsTimeoutRetry, timed_out);
        }
        // What a request takes that is still being sent is not upstream's.
        let elapsed = self.info.timing.last_downstream_rx;
        let elapsed = elapsed.map_or(Duration::ZERO, |rx| self.timer.now().saturating_duration_since(rx));
        timeouts::set_headers(&routing.timeouts, headers, elapsed, routing.options, false);
        self.heads.response.clear();
        self.info.upstream.forget_connection();
        (self.info.timing.first_upstream_rx, self.info.timing.last_upstream_rx) = (None, None);
    }

    pub(super) fn hash(&self, policies: &[HashPolicy], cookies: &mut Vec<String>) -> Option<u64> {
        match policies {
            [] => None,
            policies => HashPolicy::hash(policies, &self.heads.request, &self.info, cookies),
        }
    }

    /// What goes upstream: a CONNECT that ends here leaves its payload.
    fn carried(&self, action: &RouteAction) -> Carried {
        let headers = &self.heads.request;
        let connect = headers.method() == Some(b"CONNECT") && !headers.contains(Known::Protocol);
        let ends = connect && action.upgrade(b"connect").is_some_and(|upgrade| upgrade.terminate_connect);
        if ends { Carried::Raw } else { Carried::Http(self.facts.protocol) }
    }

    /// The cluster, and which weighted cluster it is.
    pub(super) fn target(
        &self,
        action: &RouteAction,
        hash: Option<u64>,
    ) -> (Option<Rc<LocalCluster>>, Option<usize>) {
        let target = action.target(&self.heads.request, self.random, || hash);
        let picked = match (&action.clusters, target.weighted) {
            (ClusterSpecifier::Weighted(all), Some(weighted)) => {
                all.clusters().iter().position(|other| std::ptr::eq(other, weighted))
            }
            _ => None,
        };
        (self.local_cluster(target.cluster), picked)
    }

    /// This worker's view of a cluster that a route or mirror names.
    pub(super) fn local_cluster(&self, cluster: RouteCluster<'_>) -> Option<Rc<LocalCluster>> {
        let worker = &self.cx.worker;
        match cluster {
            // The usual case leaves the count that all workers share alone.
            RouteCluster::Cell(cell) => Some(worker.cluster(cell)),
            RouteCluster::Named(name) => worker.cluster_named(str::from_utf8(name).ok()?),
        }
    }

    /// What the log and filters say of the cluster before the router is reached, as Envoy sets it with the route.
    pub(super) fn note_cluster(&mut self) {
        if self.info.upstream.cluster.is_some() {
            return;
        }
        let Some((table, index)) = &self.table else { return };
        let Some(Action::Route(action)) = table.held.route(*index).map(|route| &route.action) else { return };
        let cluster = self.target(action, None).0.and_then(|local| local.get());
        self.info.upstream.cluster = cluster.map(|cluster| cluster as _);
    }

    /// Waits out a back-off, unless an earlier attempt answers meanwhile.
    async fn pause(
        &mut self,
        delay: Duration,
        routing: &mut Routing<'_>,
        retries: &Retries<'_>,
    ) -> Result<Paused, StreamEnd> {
        let until = Some(self.timer.now() + delay);
        let limit = self.keep_limit(routing.route);
        // Our own deadline says so otherwise.
        let mut paused = Paused::Elapsed;
        let ended = std::future::poll_fn(|task| {
            if let std::task::Poll::Ready(said) = self.poll_parked(task, routing, retries) {
                paused = Paused::Answered(said);
                return std::task::Poll::Ready(StreamEnd::PerTryTimeout { alternative: false });
            }
            // The client need not wait, as long as there is room to keep what it sends.
            while !self.request_complete {
                match self.poll_decode(task) {
                    std::task::Poll::Pending => break,
                    std::task::Poll::Ready(Ok(())) => self.last_activity = self.timer.now(),
                    std::task::Poll::Ready(Err(by)) => {
                        paused = Paused::Stopped(by);
                        return std::task::Poll::Ready(StreamEnd::PerTryTimeout { alternative: false });
                    }
                }
                if self.kept_bytes > limit {
                    self.outgrown = true;
                    if routing.parked.is_empty() {
                        routing.cluster.stats.retry_or_shadow_abandoned().inc();
                        return std::task::Poll::Ready(StreamEnd::RetryBufferExceeded);
                    }
                }
            }
            if self.request_complete
                && let std::task::Poll::Ready(end) = self.down.poll_gone(task)
            {
                return std::task::Poll::Ready(end);
            }
            self.poll_deadlines(task, until)
        })
        .await;
        match ended {
            StreamEnd::PerTryTimeout { .. } => Ok(paused),
            end => Err(end),
        }
    }

    /// Asks the retry core, with the response head as the outcome when there is no other.
    fn decide(
        &self,
        routing: &Routing<'_>,
        retries: &mut Retries<'_>,
        permit: &mut Option<RetryPermit>,
        outcome: Option<Outcome<'_>>,
    ) -> Decision {
        let (cluster, priority) = (&routing.cluster, routing.action.priority);
        let (stats, counted) = (&cluster.stats, &routing.counted);
        *permit = None;
        // The request may have outgrown what is kept: then there is nothing to send again.
        if self.outgrown && retries.is_enabled() {
            stats.retry_or_shadow_abandoned().inc();
        }
        if self.outgrown {
            retries.disable();
        }
        let was_retry = routing.attempts > 1 && retries.has_conditions();
        let outcome = outcome.unwrap_or(Outcome::Response(&self.heads.response));
        let mut admitted = None;
        let wall = self.cx.worker.wall_clock(self.timer.now());
        let decision = retries.decide(outcome, wall, self.cx.worker.random(), || {
            if !cluster.admission.try_acquire(priority, Resource::Retries) {
                return Admission::Overflow;
            }
            let taken = RetryPermit(Rc::clone(cluster), priority);
            if !routing.local.extras(&self.cx.worker, cluster).use_retry.contains(self.cx.worker.random()) {
                return Admission::Off;
            }
            admitted = Some(taken);
            Admission::Admitted
        });
        match decision {
            Decision::Again { .. } => *permit = admitted,
            Decision::LimitExceeded => {
                stats.upstream_rq_retry_limit_exceeded().inc();
                counted.each(|requests| requests.upstream_rq_retry_limit_exceeded().inc());
            }
            Decision::Overflow => {
                stats.upstream_rq_retry_overflow().inc();
                counted.each(|requests| requests.upstream_rq_retry_overflow().inc());
            }
            Decision::Stand if was_retry => {
                stats.upstream_rq_retry_success().inc();
                counted.each(|requests| requests.upstream_rq_retry_success().inc());
            }
            Decision::Stand => {}
        }
        decision
    }

    /// `strict_check_headers`: those that are there must be well-formed.
    fn check_strictly(&self, mask: u8) -> Result<(), StreamEnd> {
        for (bit, name) in (0..).zip(STRICT_HEADERS).filter(|(bit, _)| mask & (1 << bit) != 0) {
            let Some(value) = self.heads.request.get(name) else { continue };
            let value = String::from_utf8_lossy(value);
            let all = |known: &[&str]| value.split(',').all(|token| known.contains(&token.trim()));
            let valid = match bit {
                0..3 => value.trim().parse::<u64>().is_ok(),
                3 => all(&RETRY_ON),
                _ => all(&RETRY_GRPC_ON),
            };
            if !valid {
                return Err(StreamEnd::StrictHeaderCheck(name, value.into()));
            }
        }
        Ok(())
    }
}
