//! Request out, response in: the loop that moves both ways of one attempt at once, with back-pressure.

use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use waystation_filter_api::http::LocalReply;
use waystation_upstream::cluster::ClusterRef;

use super::Stream;
use super::chain::Stopped;
use super::outbound::{Failed, Outbound};
use super::upstream::Event;
use crate::http::downstream::Downstream;
use crate::http::end::{ResetReason, StreamEnd};
use crate::http::stats::HcmStats;
use crate::http::timer::{after, earliest};

/// One attempt to have the request answered.
pub(super) struct Attempt {
    pub(super) upstream: Outbound,
    /// How much of `heads.kept` has been sent.
    pub(super) replayed: usize,
    pub(super) request_sent: bool,
    /// What follows the head is a tunnel's, and upstream has not agreed to one: sent now, it would be the next request
    /// to an upstream that declines.
    pub(super) tunnel_held: bool,
    /// The final head has come.
    pub(super) head_seen: bool,
    pub(super) response_done: bool,
    /// Keep what is read, for a further attempt.
    pub(super) keep: bool,
    /// Bytes kept beyond this end the possibility of a further attempt.
    pub(super) keep_limit: usize,
    pub(super) limits: Limits,
    pub(super) flow: Flow,
}

/// Who of an attempt is not read because the other one takes nothing; each change is counted.
pub(super) struct Flow {
    cluster: Rc<ClusterRef>,
    downstream_paused: bool,
    upstream_paused: bool,
}

impl Flow {
    pub(super) fn new(cluster: &Rc<ClusterRef>) -> Self {
        Self { cluster: Rc::clone(cluster), downstream_paused: false, upstream_paused: false }
    }

    /// Upstream takes no more of the request, or does again.
    #[inline]
    fn pause_downstream(&mut self, paused: bool, hcm: &HcmStats) {
        if self.downstream_paused == paused {
            return;
        }
        self.downstream_paused = paused;
        if paused {
            self.cluster.stats.upstream_flow_control_backed_up_total().inc();
            hcm.downstream_flow_control_paused_reading_total().inc();
        } else {
            self.cluster.stats.upstream_flow_control_drained_total().inc();
            hcm.downstream_flow_control_resumed_reading_total().inc();
        }
    }

    /// Downstream takes no more of the response, or does again.
    #[inline]
    fn pause_upstream(&mut self, paused: bool) {
        if self.upstream_paused == paused {
            return;
        }
        self.upstream_paused = paused;
        match paused {
            true => self.cluster.stats.upstream_flow_control_paused_reading_total().inc(),
            false => self.cluster.stats.upstream_flow_control_resumed_reading_total().inc(),
        }
    }
}

/// The deadlines of one attempt.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Limits {
    /// When `per_try_timeout` is over: counted from the end of the request, until the response head.
    pub(super) per_try: Option<Instant>,
    pub(super) per_try_timeout: Option<Duration>,
    /// `per_try_idle_timeout`, and when the attempt began: the silence of an earlier one is none of its own.
    pub(super) per_try_idle: Option<(Duration, Instant)>,
    /// `max_stream_duration` of the cluster.
    pub(super) max_duration: Option<Instant>,
    pub(super) alternative: bool,
}

impl Limits {
    /// The time of the try is over, and it goes on.
    pub(super) fn end_tries(&mut self) {
        (self.per_try, self.per_try_timeout, self.per_try_idle) = (None, None, None);
    }
}

/// What the attempt has come to.
pub(super) enum Step {
    /// A 1xx head in `heads.response`.
    Informational,
    /// The response head is in `heads.response`.
    Head { end: bool },
    /// The response went out to its end.
    Finished,
    /// The upstream stream is gone.
    Reset(ResetReason),
    /// A per-try timeout; whether it was the idle one.
    PerTry { idle: bool },
    /// A filter has answered.
    Reply(Box<LocalReply>),
    /// The stream is over.
    End(StreamEnd),
}

impl<D: Downstream> Stream<'_, D> {
    /// Moves what can be moved. Ready when somebody has to decide.
    pub(super) fn poll_step(&mut self, task: &mut Context<'_>, attempt: &mut Attempt) -> Poll<Step> {
        let mut moved = false;
        if !attempt.request_sent
            && !attempt.tunnel_held
            && let Some(step) = self.poll_request(task, attempt, &mut moved)
        {
            return Poll::Ready(step);
        }
        // A request that cannot be written may have been answered already: the read side tells.
        let broken = matches!(attempt.upstream.poll_flush(task, self.beside_heads().0), Poll::Ready(Err(_)));
        if !(attempt.response_done && self.response_ended)
            && let Some(step) = self.poll_response(task, attempt, &mut moved)
        {
            return Poll::Ready(step);
        }
        if broken && !attempt.response_done {
            return Poll::Ready(Step::Reset(ResetReason::ConnectionTermination));
        }
        match self.down.poll_flush(task) {
            Poll::Ready(Ok(())) if self.response_ended => return Poll::Ready(Step::Finished),
            Poll::Ready(Err(end)) => return Poll::Ready(Step::End(end)),
            _ => {}
        }
        if (self.request_complete || attempt.tunnel_held)
            && !self.response_ended
            && let Poll::Ready(end) = self.down.poll_gone(task)
        {
            return Poll::Ready(Step::End(end));
        }
        if moved {
            self.last_activity = self.timer.now();
        }
        if self.log_due().is_some_and(|due| self.timer.now() >= due) {
            self.log_periodically(Some(&attempt.upstream.codec));
        }
        self.poll_limits(task, attempt.limits)
    }

    fn poll_request(
        &mut self,
        task: &mut Context<'_>,
        attempt: &mut Attempt,
        moved: &mut bool,
    ) -> Option<Step> {
        loop {
            // Without room the transport's waker is what brings us back: there must be one, or room.
            if !attempt.upstream.has_room(self.cx)
                && !matches!(attempt.upstream.poll_flush(task, self.beside_heads().0), Poll::Ready(Ok(())))
            {
                attempt.flow.pause_downstream(true, &self.cx.hcm.stats.hcm);
                return None;
            }
            attempt.flow.pause_downstream(false, &self.cx.hcm.stats.hcm);
            if let Some(data) = self.heads.kept.get(attempt.replayed) {
                attempt.replayed += 1;
                let data = data.clone();
                if attempt.keep && self.kept_bytes > attempt.keep_limit {
                    attempt.keep = false;
                    self.outgrown = true;
                }
                // Without a further attempt in view nothing needs to be kept.
                if !attempt.keep && attempt.replayed == self.heads.kept.len() {
                    self.heads.kept.clear();
                    self.kept_bytes = 0;
                    attempt.replayed = 0;
                }
                self.info.upstream.bytes.body_sent += data.len() as u64;
                if let Err(failed) = attempt.upstream.send_data(self.beside_heads().0, data) {
                    return Some(failed.into());
                }
            } else if self.request_passed() {
                attempt.request_sent = true;
                if attempt.limits.per_try.is_none() && !attempt.head_seen {
                    attempt.limits.per_try = after(self.timer.now(), attempt.limits.per_try_timeout);
                }
                self.info.timing.last_upstream_tx = Some(self.timer.now());
                let has_trailers = self.request_has_trailers;
                let (beside, heads) = self.beside_heads();
                let trailers = Some(&heads.request_trailers).filter(|_| has_trailers);
                if let Err(failed) = attempt.upstream.send_end(beside, trailers) {
                    return Some(failed.into());
                }
                return None;
            } else {
                match self.poll_decode(task) {
                    Poll::Pending => return None,
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(stopped)) => return Some(stopped.into()),
                }
            }
            *moved = true;
        }
    }

    fn poll_response(
        &mut self,
        task: &mut Context<'_>,
        attempt: &mut Attempt,
        moved: &mut bool,
    ) -> Option<Step> {
        loop {
            if !self.down.has_room() {
                match self.down.poll_flush(task) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(end)) => return Some(Step::End(end)),
                    Poll::Pending => {
                        attempt.flow.pause_upstream(true);
                        return None;
                    }
                }
            }
            attempt.flow.pause_upstream(false);
            if attempt.head_seen {
                // Who lets go may hold the next piece at once: it is asked until it has taken our waker.
                loop {
                    match self.poll_encode(task) {
                        Ok(true) => *moved = true,
                        Ok(false) => break,
                        Err(stopped) => return Some(stopped.into()),
                    }
                }
                self.send_encoded();
            }
            if attempt.response_done || self.encode_is_full() {
                return None;
            }
            let (beside, heads) = self.beside_heads();
            let into = if attempt.head_seen { &mut heads.response_trailers } else { &mut heads.response };
            let event = match attempt.upstream.poll_event(task, beside, into) {
                Poll::Pending => return None,
                Poll::Ready(Err(failed)) => return Some(failed.into()),
                Poll::Ready(Ok(event)) => event,
            };
            *moved = true;
            let passed = match event {
                Event::Informational => return Some(Step::Informational),
                Event::Head { end } => {
                    attempt.limits.per_try = None;
                    attempt.head_seen = true;
                    attempt.tunnel_held &= !self.is_tunnel_accepted();
                    attempt.response_done = end;
                    return Some(Step::Head { end });
                }
                Event::Data(data) => {
                    self.info.upstream.bytes.body_received += data.len() as u64;
                    if self.response_started && self.chain.response_is_clear() {
                        self.down.send_data(data);
                        Ok(())
                    } else {
                        self.encode_data(data, false)
                    }
                }
                Event::Trailers => {
                    attempt.response_done = true;
                    self.info.timing.last_upstream_rx = Some(self.timer.now());
                    self.response_has_trailers = true;
                    self.encode_trailers()
                }
                Event::End => {
                    attempt.response_done = true;
                    self.info.timing.last_upstream_rx = Some(self.timer.now());
                    self.encode_data(bytes::Bytes::new(), true)
                }
            };
            if let Err(stopped) = passed {
                return Some(stopped.into());
            }
        }
    }

    /// Whether the response head in `heads.response` opens the tunnel that the request asks for.
    pub(super) fn is_tunnel_accepted(&self) -> bool {
        self.facts.tunnel && {
            let status = self.heads.response.status().unwrap_or(0);
            let connect = self.heads.request.method() == Some(b"CONNECT");
            status == 101 || connect && (200..300).contains(&status)
        }
    }

    /// The request was read to its end: from here on upstream is waited for.
    pub(super) fn mark_request_complete(&mut self) {
        self.request_complete = true;
        self.deadlines.request = None;
        let now = self.timer.now();
        self.info.timing.last_downstream_rx = Some(now);
        self.deadlines.route = after(now, self.route_timeout);
    }

    fn poll_limits(&mut self, task: &mut Context<'_>, limits: Limits) -> Poll<Step> {
        let try_idle =
            limits.per_try_idle.and_then(|(idle, begun)| after(self.last_activity.max(begun), Some(idle)));
        let own = earliest(earliest(limits.per_try, try_idle), limits.max_duration);
        match self.poll_deadlines(task, own) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(StreamEnd::PerTryTimeout { .. }) => {
                let now = self.timer.now();
                if limits.max_duration.is_some_and(|due| now >= due) {
                    return Poll::Ready(Step::End(StreamEnd::UpstreamMaxStreamDuration));
                }
                Poll::Ready(Step::PerTry { idle: limits.per_try.is_none_or(|due| now < due) })
            }
            Poll::Ready(StreamEnd::RouteTimeout { .. }) => {
                Poll::Ready(Step::End(StreamEnd::RouteTimeout { alternative: limits.alternative }))
            }
            Poll::Ready(end) => Poll::Ready(Step::End(end)),
        }
    }

    /// Ready with the cause when a deadline has passed; `own` is the caller's, reported as a per-try timeout.
    pub(super) fn poll_deadlines(&mut self, task: &mut Context<'_>, own: Option<Instant>) -> Poll<StreamEnd> {
        loop {
            let idle = after(self.last_activity, self.idle_timeout());
            let deadlines = &self.deadlines;
            let others = deadlines.parked;
            let due =
                [own, deadlines.route, deadlines.request, deadlines.max_duration, others, self.log_due()]
                    .into_iter()
                    .fold(idle, earliest);
            if self.timer.poll(task, due).is_pending() {
                return Poll::Pending;
            }
            let now = self.timer.now();
            let passed = |deadline: Option<Instant>| deadline.is_some_and(|deadline| now >= deadline);
            let request_complete = self.request_complete;
            if passed(deadlines.request) {
                return Poll::Ready(StreamEnd::RequestTimeout);
            }
            if passed(deadlines.max_duration) {
                return Poll::Ready(StreamEnd::MaxStreamDuration { request_complete });
            }
            if passed(deadlines.route) {
                return Poll::Ready(StreamEnd::RouteTimeout { alternative: false });
            }
            if passed(others) {
                return Poll::Ready(StreamEnd::UpstreamMaxStreamDuration);
            }
            if passed(own) {
                return Poll::Ready(StreamEnd::PerTryTimeout { alternative: false });
            }
            if passed(idle) {
                return Poll::Ready(StreamEnd::StreamIdleTimeout { request_complete });
            }
            if passed(self.log_due()) {
                self.log_periodically(None);
            }
        }
    }
}

impl From<Failed> for Step {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Reset(reason) => Self::Reset(reason),
            Failed::Reply(reply) => Self::Reply(reply),
        }
    }
}

impl From<Stopped> for Step {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Reply(reply) => Self::Reply(reply),
            Stopped::End(end) => Self::End(end),
        }
    }
}
