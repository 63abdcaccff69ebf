//! Hedging: an attempt whose per-try timeout is over goes on beside the next one, and the first response that is good
//! enough is the request's.
//!
//! Only one attempt is current; the router's code knows no other. Those left behind are parked with what is known of them,
//! and are moved along whenever the current one is, or a back-off or a connection is waited for. One that answers takes the
//! place of the current one.

use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use waystation_filter_api::stream::UpstreamInfo;
use waystation_http::Headers;
use waystation_upstream::host::Outcome as HostOutcome;
use waystation_upstream::outlier::LocalOrigin;

use super::attempt::InFlight;
use super::counting::Counted;
use super::{Routing, outlier};
use crate::http::downstream::Downstream;
use crate::http::end::{ResetReason, StreamEnd};
use crate::http::retry::{Outcome, Retries};
use crate::http::stream::Stream;
use crate::http::stream::exchange::{Attempt, Step};
use crate::http::stream::log::AttemptLog;
use crate::http::stream::outbound::Failed;
use crate::http::stream::upstream::Event;
use crate::http::timer::earliest;

/// An attempt that another one was begun beside.
pub(super) struct Parked<'r> {
    flight: InFlight,
    known: Known<'r>,
}

/// What the stream knows of one attempt.
struct Known<'r> {
    response: Headers,
    upstream: UpstreamInfo,
    counted: Counted<'r>,
    log: Option<AttemptLog>,
    first_tx: Option<Instant>,
    last_tx: Option<Instant>,
    pool_ready: Option<Duration>,
}

/// A parked attempt that becomes the current one.
pub(super) struct Answer {
    index: usize,
    /// What it has said.
    said: Option<Step>,
}

/// Why a parked attempt ends.
pub(super) enum Abandoned {
    /// Another has answered, or the stream is over.
    Unwanted,
    /// The route timeout.
    TimedOut,
    /// It has answered, and not well enough.
    Refused,
    /// Its stream was reset.
    Reset(ResetReason),
}

impl Answer {
    /// The last attempt that was parked, which has said nothing yet.
    pub(super) fn awaited(routing: &Routing<'_>) -> Self {
        Self { index: routing.parked.len() - 1, said: None }
    }
}

impl Abandoned {
    /// By the end of the stream.
    pub(super) fn by(end: Option<&StreamEnd>) -> Self {
        match end {
            Some(StreamEnd::RouteTimeout { .. }) => Self::TimedOut,
            _ => Self::Unwanted,
        }
    }
}

impl<D: Downstream> Stream<'_, D> {
    /// Whether a slow attempt may be followed by another: nothing else is in doubt than whether a retry is left.
    pub(super) fn may_hedge(&self, retries: &Retries<'_>) -> bool {
        !self.outgrown && retries.has_conditions()
    }

    /// Leaves the current attempt to itself: another one will be begun.
    pub(super) fn park<'r>(&mut self, routing: &mut Routing<'r>, mut flight: InFlight) {
        flight.retried = true;
        let mut known = Known {
            response: Headers::new(),
            upstream: self.info.upstream.clone(),
            counted: routing.counted.another(),
            log: None,
            first_tx: None,
            last_tx: None,
            pool_ready: None,
        };
        self.exchange_known(routing, &mut known);
        routing.parked.push(Parked { flight, known });
        self.note_parked(routing);
    }

    /// Makes a parked attempt the current one, where there is none.
    pub(super) fn unpark(&mut self, routing: &mut Routing<'_>, answer: Answer) -> (InFlight, Option<Step>) {
        let Parked { flight, mut known } = routing.parked.remove(answer.index);
        self.exchange_known(routing, &mut known);
        self.note_parked(routing);
        (flight, answer.said)
    }

    /// Moves the current attempt and those that are parked. Ready when somebody has to decide about the current one, which
    /// may have become another.
    #[inline]
    pub(super) fn poll_attempts(
        &mut self,
        task: &mut Context<'_>,
        flight: &mut InFlight,
        routing: &mut Routing<'_>,
        retries: &Retries<'_>,
    ) -> Poll<Step> {
        if routing.parked.is_empty() {
            return self.poll_step(task, &mut flight.attempt);
        }
        loop {
            if let Poll::Ready(Answer { index, said: Some(step) }) = self.poll_parked(task, routing, retries)
            {
                let mut parked = routing.parked.remove(index);
                std::mem::swap(flight, &mut parked.flight);
                self.exchange_known(routing, &mut parked.known);
                routing.parked.push(parked);
                return Poll::Ready(step);
            }
            let before = (self.kept_bytes, self.request_passed());
            let step = self.poll_step(task, &mut flight.attempt);
            // What the current attempt has read of the request is the others' as well.
            let behind = routing.parked.iter().any(|parked| !parked.flight.attempt.request_sent);
            if step.is_ready() || !behind || before == (self.kept_bytes, self.request_passed()) {
                return step;
            }
        }
    }

    /// Moves the parked attempts. Ready when one of them has the answer; those that can't have it are ended.
    #[inline]
    pub(super) fn poll_parked(
        &mut self,
        task: &mut Context<'_>,
        routing: &mut Routing<'_>,
        retries: &Retries<'_>,
    ) -> Poll<Answer> {
        let mut index = 0;
        while let Some(Parked { flight, known }) = routing.parked.get_mut(index) {
            let attempt = &mut flight.attempt;
            let event = match self.send_parked(task, attempt) {
                Ok(()) => attempt.upstream.poll_event(task, self.beside_heads().0, &mut known.response),
                Err(failed) => Poll::Ready(Err(failed)),
            };
            match event {
                Poll::Pending => index += 1,
                Poll::Ready(Ok(Event::Informational)) => {
                    return Poll::Ready(Answer { index, said: Some(Step::Informational) });
                }
                Poll::Ready(Ok(Event::Head { end })) => {
                    (attempt.head_seen, attempt.response_done) = (true, end);
                    if retries.wants(Outcome::Response(&known.response)) {
                        self.end_parked(routing, index, &Abandoned::Refused);
                        continue;
                    }
                    return Poll::Ready(Answer { index, said: Some(Step::Head { end }) });
                }
                // Nothing comes before a head.
                Poll::Ready(Ok(_)) => {
                    self.end_parked(routing, index, &Abandoned::Reset(ResetReason::ProtocolError));
                }
                Poll::Ready(Err(Failed::Reset(reason))) => {
                    self.end_parked(routing, index, &Abandoned::Reset(reason));
                }
                Poll::Ready(Err(Failed::Reply(reply))) => {
                    return Poll::Ready(Answer { index, said: Some(Step::Reply(reply)) });
                }
            }
        }
        Poll::Pending
    }

    /// Ends all parked attempts.
    pub(super) fn abandon(&mut self, routing: &mut Routing<'_>, why: &Abandoned) {
        while !routing.parked.is_empty() {
            self.end_parked(routing, 0, why);
        }
    }

    /// Sends what a parked attempt has not sent of the request, which is kept as long as there may be another attempt.
    fn send_parked(&mut self, task: &mut Context<'_>, attempt: &mut Attempt) -> Result<(), Failed> {
        while !attempt.request_sent {
            if self.outgrown {
                return Err(ResetReason::LocalReset.into());
            }
            if !attempt.upstream.has_room(self.cx)
                && !matches!(attempt.upstream.poll_flush(task, self.beside_heads().0), Poll::Ready(Ok(())))
            {
                return Ok(());
            }
            if let Some(data) = self.heads.kept.get(attempt.replayed) {
                attempt.replayed += 1;
                let data = data.clone();
                attempt.upstream.send_data(self.beside_heads().0, data)?;
            } else if self.request_passed() {
                attempt.request_sent = true;
                let has_trailers = self.request_has_trailers;
                let (beside, heads) = self.beside_heads();
                let trailers = Some(&heads.request_trailers).filter(|_| has_trailers);
                attempt.upstream.send_end(beside, trailers)?;
            } else {
                break;
            }
        }
        // A request that cannot be written may have been answered already: the read side tells.
        let _ = attempt.upstream.poll_flush(task, self.beside_heads().0);
        Ok(())
    }

    fn end_parked(&mut self, routing: &mut Routing<'_>, index: usize, why: &Abandoned) {
        let Parked { flight, mut known } = routing.parked.remove(index);
        let InFlight { attempt, pool, mut active, .. } = flight;
        self.exchange_known(routing, &mut known);
        let cluster = std::rc::Rc::clone(&routing.cluster);
        let outcome = match why {
            Abandoned::Unwanted => HostOutcome::Cancelled,
            Abandoned::TimedOut => {
                self.count_timeout(routing);
                HostOutcome::Timeout
            }
            Abandoned::Refused => {
                outlier::answered(&cluster, &pool.host(), &self.heads.response, self.is_grpc);
                if let Some(log) = &mut self.attempt_log {
                    log.status = self.heads.response.status().unwrap_or(0);
                }
                HostOutcome::Error
            }
            Abandoned::Reset(reason) => {
                cluster.local_origin(&pool.host(), LocalOrigin::ConnectFailed);
                self.flag_attempt(reason.flag());
                self.count(routing, if *reason == ResetReason::ProtocolError { 502 } else { 503 });
                HostOutcome::Error
            }
        };
        match why {
            Abandoned::Reset(reason) => self.lose(attempt.upstream, &cluster, *reason),
            _ => self.release(attempt.upstream, &pool, &cluster, false),
        }
        if let Some(active) = active.take() {
            active.finish(outcome);
        }
        self.end_attempt_log();
        self.record_attempt(routing);
        self.exchange_known(routing, &mut known);
        self.note_parked(routing);
    }

    /// Exchanges what is known of the current attempt with what is known of another.
    fn exchange_known<'r>(&mut self, routing: &mut Routing<'r>, known: &mut Known<'r>) {
        use std::mem::swap;
        let (upstream, timing) = (&mut self.info.upstream, &mut self.info.timing);
        swap(&mut self.heads.response, &mut known.response);
        swap(&mut timing.first_upstream_tx, &mut known.first_tx);
        swap(&mut timing.last_upstream_tx, &mut known.last_tx);
        swap(&mut timing.pool_ready, &mut known.pool_ready);
        // How many there were is the stream's.
        known.upstream.attempts = upstream.attempts;
        swap(upstream, &mut known.upstream);
        swap(&mut routing.counted, &mut known.counted);
        swap(&mut self.attempt_log, &mut known.log);
    }

    /// Notes the earliest deadline of the parked attempts.
    fn note_parked(&mut self, routing: &Routing<'_>) {
        let each = routing.parked.iter().map(|parked| parked.flight.attempt.limits.max_duration);
        self.deadlines.parked = each.fold(None, earliest);
    }
}
