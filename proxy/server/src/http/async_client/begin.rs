//! A call until there is a stream that stands: a host, a connection, and where there are retries, the response head.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use waystation_filter_api::client::CallError;
use waystation_filter_api::http::LocalFuture;
use waystation_http::{Headers, Known};
use waystation_route::{RetryHostPredicate, RetryPolicy};
use waystation_upstream::admission::Resource;
use waystation_upstream::load_balancer::PreviousPriorities;
use waystation_upstream::{Host, PickContext, Priority};

use super::attempt::{Attempt, Between};
use super::{Options, status_of};
use crate::http::end::ResetReason;
use crate::http::retry::{Admission, Decision, Outcome, Retries};
use crate::http::stream::Event;

/// The first part of a call.
pub(super) struct Beginning {
    between: Option<Rc<Between>>,
    future: LocalFuture<Result<Begun, CallError>>,
}

/// A call that has a stream.
pub(super) struct Begun {
    pub(super) attempt: Box<Attempt>,
    /// The response head, and whether it is all, where that was waited for.
    pub(super) head: Option<(Headers, bool)>,
}

impl Beginning {
    pub(super) fn new(options: Options) -> Self {
        let Options { worker, local, head, body, retries, hash, timeout } = options;
        worker.shared.async_client.rq_total().inc();
        let Some(cluster) = local.get() else {
            return Self { between: None, future: Box::pin(async { Err(CallError::NoCluster) }) };
        };
        let internal = head.get(Known::XEnvoyInternal) == Some(b"true");
        let between = Rc::new(Between { worker, local, cluster, internal });
        let future = Box::pin(begin(Rc::clone(&between), head, body, retries, hash, timeout));
        Self { between: Some(between), future }
    }

    pub(super) fn poll(&mut self, task: &mut Context<'_>) -> Poll<Result<Begun, CallError>> {
        self.future.as_mut().poll(task)
    }

    pub(super) fn time_out(self) {
        if let Some(between) = &self.between {
            between.cluster.stats.upstream_rq_timeout().inc();
            between.count(504);
        }
    }
}

async fn begin(
    between: Rc<Between>,
    mut head: Headers,
    body: Option<Bytes>,
    policy: Option<Arc<RetryPolicy>>,
    hash: Option<u64>,
    timeout: Option<Duration>,
) -> Result<Begun, CallError> {
    let (worker, cluster) = (&between.worker, &between.cluster);
    if between.local.extras(worker, cluster).maintenance.contains(worker.random()) {
        cluster.stats.upstream_rq_maintenance_mode().inc();
        between.count(503);
        return Err(CallError::Maintenance);
    }
    // What is said on an open request can't be said again.
    let policy = policy.as_deref().filter(|_| body.is_some());
    let extras = between.local.extras(worker, cluster);
    let base = || Duration::from_millis(extras.base_back_off.get().max(1));
    let mut retries = Retries::new(policy, &mut head, base);
    let end = body.as_ref().is_some_and(Bytes::is_empty);
    let mut tried = Tried::new(policy);
    let mut permit = None;
    let start = Instant::now();
    loop {
        if let Some(timeout) = timeout.filter(|_| tried.attempts > 0) {
            let left = timeout.saturating_sub(start.elapsed()).as_millis();
            head.set_number(Known::XEnvoyExpectedRqTimeoutMs, u64::try_from(left).unwrap_or(u64::MAX));
        }
        let pool = match tried.pick(&between, &head, hash) {
            Ok(pool) => pool,
            Err(error) => {
                between.count(503);
                return Err(error);
            }
        };
        let mut attempt = match Attempt::begin(Rc::clone(&between), pool, &mut head, end).await {
            Ok(attempt) => attempt,
            Err(reason) => {
                let outcome = Outcome::Reset(reason, false);
                if let Some(delay) = decide(&between, &mut retries, &tried, &mut permit, outcome) {
                    tokio::time::sleep(delay).await;
                    cluster.stats.upstream_rq_retry().inc();
                    continue;
                }
                between.count(status_of(reason));
                return Err(match reason {
                    ResetReason::Overflow => CallError::Overflow,
                    reason if reason.is_connect_failure() => CallError::Connect,
                    _ => CallError::Reset { begun: false },
                });
            }
        };
        if let Some(body) = &body {
            attempt.send(body.clone());
            attempt.finish(None);
        }
        if !retries.is_enabled() {
            return Ok(Begun { attempt, head: None });
        }
        let mut received = Headers::new();
        let answered = response(&mut attempt, &mut received, tried.per_try()).await;
        let outcome = match answered {
            Some(Ok(_)) => Outcome::Response(&received),
            Some(Err(reason)) => Outcome::Reset(reason, true),
            None => {
                cluster.stats.upstream_rq_per_try_timeout().inc();
                attempt.too_slow();
                Outcome::PerTryTimeout
            }
        };
        let decided = decide(&between, &mut retries, &tried, &mut permit, outcome);
        match (decided, answered) {
            (Some(delay), answered) => {
                if let Some(Ok(_)) = answered {
                    let status = received.status().unwrap_or(0);
                    between.local.extras(worker, cluster).retry().record(status);
                }
                drop(attempt);
                tokio::time::sleep(delay).await;
                cluster.stats.upstream_rq_retry().inc();
            }
            (None, Some(Ok(end))) => {
                attempt.count(received.status().unwrap_or(0));
                attempt.state_time(&mut received);
                return Ok(Begun { attempt, head: Some((received, end)) });
            }
            (None, Some(Err(reason))) => {
                attempt.count(status_of(reason));
                return Err(CallError::Reset { begun: false });
            }
            (None, None) => {
                attempt.count(504);
                return Err(CallError::Timeout);
            }
        }
    }
}

/// Waits for the response head and says whether it is all; nothing when the try has had its time.
async fn response(
    attempt: &mut Attempt,
    received: &mut Headers,
    per_try: Duration,
) -> Option<Result<bool, ResetReason>> {
    let answered = std::future::poll_fn(|task| {
        loop {
            match std::task::ready!(attempt.poll_event(task, received)) {
                Ok(Event::Head { end }) => return Poll::Ready(Ok(end)),
                Ok(Event::Informational) => received.clear(),
                Ok(_) => return Poll::Ready(Err(ResetReason::ProtocolError)),
                Err(reason) => return Poll::Ready(Err(reason)),
            }
        }
    });
    if per_try.is_zero() { Some(answered.await) } else { tokio::time::timeout(per_try, answered).await.ok() }
}

/// A unit of `max_retries`, given back on drop.
struct RetryPermit(Rc<Between>);

impl Drop for RetryPermit {
    fn drop(&mut self) {
        self.0.cluster.admission.release(Priority::Default, Resource::Retries);
    }
}

/// After how long to try again, if at all.
fn decide(
    between: &Rc<Between>,
    retries: &mut Retries<'_>,
    tried: &Tried<'_>,
    permit: &mut Option<RetryPermit>,
    outcome: Outcome<'_>,
) -> Option<Duration> {
    let (worker, stats) = (&between.worker, &between.cluster.stats);
    *permit = None;
    let was_retry = tried.attempts > 1 && retries.has_conditions();
    let wall = worker.wall_clock(Instant::now());
    let decision = retries.decide(outcome, wall, worker.random(), || {
        if !between.cluster.admission.try_acquire(Priority::Default, Resource::Retries) {
            return Admission::Overflow;
        }
        let taken = RetryPermit(Rc::clone(between));
        if !between.local.extras(worker, &between.cluster).use_retry.contains(worker.random()) {
            return Admission::Off;
        }
        *permit = Some(taken);
        Admission::Admitted
    });
    match decision {
        Decision::Again { after, rate_limited } => {
            if rate_limited {
                stats.upstream_rq_retry_backoff_ratelimited().inc();
            } else {
                stats.upstream_rq_retry_backoff_exponential().inc();
            }
            return Some(after);
        }
        Decision::LimitExceeded => stats.upstream_rq_retry_limit_exceeded().inc(),
        Decision::Overflow => stats.upstream_rq_retry_overflow().inc(),
        Decision::Stand if was_retry => stats.upstream_rq_retry_success().inc(),
        Decision::Stand => {}
    }
    None
}

/// What was tried, and what a further try avoids.
struct Tried<'p> {
    policy: Option<&'p RetryPolicy>,
    attempts: u32,
    hosts: Vec<u64>,
    priorities: Option<PreviousPriorities>,
}

impl<'p> Tried<'p> {
    fn new(policy: Option<&'p RetryPolicy>) -> Self {
        let priorities = policy.and_then(|policy| policy.previous_priorities).map(PreviousPriorities::new);
        Self { policy, attempts: 0, hosts: Vec::new(), priorities }
    }

    fn per_try(&self) -> Duration {
        self.policy.map_or(Duration::ZERO, |policy| policy.per_try_timeout)
    }

    fn pick(
        &mut self,
        between: &Between,
        head: &Headers,
        hash: Option<u64>,
    ) -> Result<Rc<crate::pool::HostPool>, CallError> {
        let load = self.priorities.as_mut();
        let load = load.and_then(|previous| between.local.retry_load(&between.cluster, previous));
        let policy = self.policy.filter(|_| self.attempts > 0);
        let reject = |host: &Host| {
            policy.is_some_and(|policy| {
                policy.host_predicates.iter().any(|predicate| match predicate {
                    RetryHostPredicate::PreviousHosts => self.hosts.contains(&host.id()),
                    RetryHostPredicate::OmitCanary => host.canary(),
                    RetryHostPredicate::OmitMetadata(labels) => labels.match_host(host.metadata()),
                })
            })
        };
        let cx = PickContext {
            hash,
            priority_load: load.as_ref(),
            reject: policy.map(|_| &reject as _),
            reselections: policy.map_or(0, |policy| policy.host_selection_attempts),
            ..PickContext::default()
        };
        let pool = between.pick(head, &cx)?;
        self.attempts += 1;
        if self.policy.is_some() {
            self.hosts.push(pool.host().id());
        }
        if let Some(priorities) = &mut self.priorities {
            priorities.attempted(pool.host().priority());
        }
        Ok(pool)
    }
}
