//! Calls to clusters beside any request (Envoy's `AsyncClient`): what filters ask of side services, and mirrors. They go
//! over the worker's own pools, as requests do.

use std::collections::VecDeque;
use std::future::Future as _;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use tokio::time::Sleep;
use waystation_filter_api::cell::Cell;
use waystation_filter_api::client::{
    Call, CallError, CallRetries, Clients, Clusters, Event, NamedCluster, Request,
};
use waystation_filter_api::http::LocalFuture;
use waystation_http::{Headers, Known};
use waystation_route::RetryPolicy;
use waystation_schema::ConfigError;
use waystation_upstream::Cluster;

use self::attempt::Attempt;
use self::begin::{Beginning, Begun};
use crate::context::Shared;
use crate::http::end::ResetReason;
use crate::http::stream::Event as Received;
use crate::worker::{LocalCluster, Worker};

mod attempt;
mod begin;
#[cfg(test)]
mod tests;

/// What is kept of a request that is open while there is no connection for it: more waits with who sends it.
const HIGH_WATER: usize = 64 * 1024;

impl Clusters for Shared {
    fn cluster(&self, name: &str) -> NamedCluster {
        NamedCluster::new(name, self.clusters.cell(name))
    }

    fn retry_policy(&self, proto: &core::RetryPolicy) -> Result<CallRetries, ConfigError> {
        Ok(CallRetries::new(Arc::new(RetryPolicy::compile_core(proto)?)))
    }
}

impl Clients for Worker {
    fn call(self: Rc<Self>, request: Request<'_>, body: Option<Bytes>) -> Box<dyn Call> {
        let Request { cluster, mut head, timeout, retries, hash, internal, forwarded_for } = request;
        // Whoever names a cluster got it from this process.
        let Some(cell) = cluster.place::<Arc<Cell<Cluster>>>() else {
            return Box::new(Exchange::failed(CallError::NoCluster));
        };
        let local = self.cluster(cell);
        if internal {
            head.set(Known::XEnvoyInternal, "true");
        }
        if forwarded_for {
            append_own_address(&mut head, &self);
        }
        if let Some(timeout) = timeout {
            let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            head.set_number(Known::XEnvoyExpectedRqTimeoutMs, millis);
        }
        let retries = retries.and_then(CallRetries::policy);
        Box::new(Exchange::new(Options { worker: self, local, head, body, retries, hash, timeout }))
    }

    fn spawn(&self, task: LocalFuture<()>) {
        tokio::task::spawn_local(task);
    }
}

/// Says in `x-forwarded-for` that a request comes from this proxy.
pub(crate) fn append_own_address(head: &mut Headers, worker: &Worker) {
    let own = worker.node_ip.to_string();
    head.append_joined(Known::XForwardedFor, ",", own.as_bytes());
}

/// A call to be.
pub(crate) struct Options {
    pub(crate) worker: Rc<Worker>,
    pub(crate) local: Rc<LocalCluster>,
    pub(crate) head: Headers,
    /// The whole of the body; nothing while the request is open.
    pub(crate) body: Option<Bytes>,
    pub(crate) retries: Option<Arc<RetryPolicy>>,
    pub(crate) hash: Option<u64>,
    pub(crate) timeout: Option<Duration>,
}

/// A request and its response.
pub(crate) struct Exchange {
    state: State,
    timeout: Option<(Duration, Option<Pin<Box<Sleep>>>)>,
    /// The response has begun.
    begun: bool,
    /// Of an open request, what was sent before there was a connection.
    queue: VecDeque<Bytes>,
    queued: usize,
    /// It was ended before that, and with these trailers.
    finished: bool,
    trailers: Option<Headers>,
    received: Headers,
}

enum State {
    Beginning(Beginning),
    Open(Box<Attempt>),
    Over(Option<CallError>),
}

impl Exchange {
    /// Does nothing before it is polled.
    pub(crate) fn new(options: Options) -> Self {
        let timeout = options.timeout.map(|timeout| (timeout, None));
        Self { timeout, ..Self::in_state(State::Beginning(Beginning::new(options))) }
    }

    fn failed(error: CallError) -> Self {
        Self::in_state(State::Over(Some(error)))
    }

    fn in_state(state: State) -> Self {
        Self {
            state,
            timeout: None,
            begun: false,
            queue: VecDeque::new(),
            queued: 0,
            finished: false,
            trailers: None,
            received: Headers::new(),
        }
    }

    /// Ends the request.
    pub(crate) fn end(&mut self, trailers: Option<&Headers>) {
        match &mut self.state {
            State::Beginning(_) => (self.finished, self.trailers) = (true, trailers.cloned()),
            State::Open(attempt) => attempt.finish(trailers),
            State::Over(_) => {}
        }
    }

    fn poll_begun(&mut self, task: &mut Context<'_>) -> Poll<Result<Option<Event>, CallError>> {
        let State::Beginning(beginning) = &mut self.state else { return Poll::Ready(Ok(None)) };
        let Begun { mut attempt, head } = ready!(beginning.poll(task))?;
        for data in self.queue.drain(..) {
            attempt.send(data);
        }
        self.queued = 0;
        if self.finished {
            attempt.finish(self.trailers.as_ref());
        }
        self.state = State::Open(attempt);
        let Some((head, end)) = head else { return Poll::Ready(Ok(None)) };
        // Counted already, by who has decided that it stands.
        self.begun = true;
        if end {
            self.close();
        }
        Poll::Ready(Ok(Some(Event::Head { head, end })))
    }

    fn poll_response(&mut self, task: &mut Context<'_>) -> Poll<Result<Event, CallError>> {
        if let Some(event) = ready!(self.poll_begun(task))? {
            return Poll::Ready(Ok(event));
        }
        loop {
            let attempt = match &mut self.state {
                State::Open(attempt) => attempt,
                State::Over(error) => return Poll::Ready(error.take().map_or(Ok(Event::End), Err)),
                State::Beginning(_) => unreachable!("begun above"),
            };
            let event = match ready!(attempt.poll_event(task, &mut self.received)) {
                Ok(Received::Informational) => continue,
                Ok(Received::Head { end }) => {
                    self.begun = true;
                    attempt.count(self.received.status().unwrap_or(0));
                    let mut head = std::mem::take(&mut self.received);
                    attempt.state_time(&mut head);
                    Event::Head { head, end }
                }
                Ok(Received::Data(data)) => Event::Data(data),
                Ok(Received::Trailers) => Event::Trailers(std::mem::take(&mut self.received)),
                Ok(Received::End) => Event::End,
                Err(reason) => {
                    if !self.begun {
                        attempt.count(status_of(reason));
                    }
                    self.state = State::Over(None);
                    return Poll::Ready(Err(CallError::Reset { begun: self.begun }));
                }
            };
            if matches!(event, Event::Head { end: true, .. } | Event::Trailers(_) | Event::End) {
                self.close();
            }
            return Poll::Ready(Ok(event));
        }
    }

    /// The response is complete.
    fn close(&mut self) {
        if let State::Open(attempt) = &self.state {
            attempt.record_time();
        }
        self.state = State::Over(None);
    }

    fn poll_timeout(&mut self, task: &mut Context<'_>) -> Poll<()> {
        let Some((timeout, sleep)) = &mut self.timeout else { return Poll::Pending };
        sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(*timeout))).as_mut().poll(task)
    }

    fn time_out(&mut self) {
        match std::mem::replace(&mut self.state, State::Over(None)) {
            State::Beginning(beginning) => beginning.time_out(),
            State::Open(mut attempt) => attempt.time_out(self.begun),
            State::Over(_) => {}
        }
    }
}

impl Call for Exchange {
    fn send(&mut self, data: Bytes) {
        match &mut self.state {
            State::Beginning(_) => {
                self.queued += data.len();
                self.queue.push_back(data);
            }
            State::Open(attempt) => attempt.send(data),
            State::Over(_) => {}
        }
    }

    fn finish(&mut self) {
        self.end(None);
    }

    fn is_behind(&self) -> bool {
        match &self.state {
            State::Beginning(_) => self.queued >= HIGH_WATER,
            State::Open(attempt) => attempt.is_behind(),
            State::Over(_) => false,
        }
    }

    fn poll_room(&mut self, task: &mut Context<'_>) -> Poll<()> {
        match &mut self.state {
            // A connection wakes who polls for events.
            State::Beginning(_) if self.queued >= HIGH_WATER => Poll::Pending,
            State::Open(attempt) => attempt.poll_room(task),
            State::Beginning(_) | State::Over(_) => Poll::Ready(()),
        }
    }

    fn poll_event(&mut self, task: &mut Context<'_>) -> Poll<Result<Event, CallError>> {
        match self.poll_response(task) {
            Poll::Ready(Err(error)) => {
                self.state = State::Over(None);
                Poll::Ready(Err(error))
            }
            Poll::Ready(Ok(event)) => Poll::Ready(Ok(event)),
            Poll::Pending => {
                ready!(self.poll_timeout(task));
                self.time_out();
                Poll::Ready(Err(CallError::Timeout))
            }
        }
    }
}

/// With what a request that was reset is counted.
fn status_of(reason: ResetReason) -> u16 {
    if reason == ResetReason::ProtocolError { 502 } else { 503 }
}

/// Since then, in milliseconds.
fn elapsed(since: Instant) -> u64 {
    super::millis(since, Instant::now())
}
