//! Request mirroring: a copy goes to another cluster as it comes, and nobody waits for the answer.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use waystation_filter_api::stream::Protocol;
use waystation_http::{Headers, Known};
use waystation_route::{MirrorPolicy, Route, RouteAction};
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::outlier::LocalOrigin;
use waystation_upstream::{PickContext, Priority};

use super::Stream;
use super::request::{format_context, is_grpc};
use super::router::outlier;
use super::upstream::{self, Carried, Event, NoStream, RequestPermit, Upstream};
use crate::http::downstream::Downstream;
use crate::http::end::ResetReason;
use crate::pool::TlsName;
use crate::worker::{LocalCluster, Sharing, Worker};

/// Where the request puts the copies of its body. Dropped before its end, it takes the mirror with it.
pub(super) struct Feed {
    queue: Rc<RefCell<Queue>>,
    cluster: Rc<ClusterRef>,
    limit: usize,
}

/// The mirror's end of a [`Feed`].
struct Reader(Rc<RefCell<Queue>>);

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    state: State,
    trailers: Option<Headers>,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    #[default]
    Open,
    Ended,
    /// The request went away, or the mirror was too slow.
    Abandoned,
}

/// What a mirror sends next.
enum Copied {
    Data(Bytes),
    End(Option<Headers>),
    Abandoned,
}

impl<D: Downstream> Stream<'_, D> {
    /// Sends copies of the request to the clusters that mirror it, its body as it comes.
    pub(super) fn start_mirrors(
        &mut self,
        mirrors: &[MirrorPolicy],
        route: &Route,
        action: &RouteAction,
        cluster: &Rc<ClusterRef>,
    ) {
        for mirror in mirrors {
            if self.facts.tunnel || !mirror.fraction.contains(self.random) {
                continue;
            }
            let Some(local) = self.local_cluster(mirror.cluster(&self.heads.request)) else { continue };
            let mut request = self.heads.request.clone();
            if !mirror.mutations.is_empty() {
                mirror.mutations.apply_to_request(&mut request, &format_context(&self.info, None, None));
            }
            let host = match &mirror.host_rewrite {
                Some(host) => host.as_bytes().to_vec(),
                None if mirror.append_shadow_suffix => shadow_host(request.authority().unwrap_or_default()),
                None => request.authority().unwrap_or_default().to_vec(),
            };
            request.set(Known::Authority, host);
            // Envoy's side client says who it is.
            request.set(Known::XEnvoyInternal, "true");
            let own = self.cx.worker.node_ip.to_string();
            request.append_joined(Known::XForwardedFor, ",", own.as_bytes());
            let feed = Feed::new(Rc::clone(cluster), self.keep_limit(route));
            for data in &self.heads.kept {
                feed.push(data);
            }
            let worker = Rc::clone(&self.cx.worker);
            tokio::task::spawn_local(send(worker, local, request, feed.reader(), action.timeout));
            self.mirrors.push(feed);
        }
        if self.request_passed() {
            self.end_mirrors();
        }
    }

    /// The request has been read to its end: so have its copies.
    pub(super) fn end_mirrors(&mut self) {
        for feed in self.mirrors.drain(..) {
            feed.end(Some(&self.heads.request_trailers).filter(|_| self.request_has_trailers));
        }
    }
}

impl Feed {
    /// A feed of a request to `cluster`, whose copy may be `limit` bytes behind it.
    fn new(cluster: Rc<ClusterRef>, limit: usize) -> Self {
        Self { queue: Rc::default(), cluster, limit }
    }

    fn reader(&self) -> Reader {
        Reader(Rc::clone(&self.queue))
    }

    pub(super) fn push(&self, data: &Bytes) {
        let mut queue = self.queue.borrow_mut();
        if queue.state != State::Open {
            return;
        }
        queue.bytes += data.len();
        if queue.bytes > self.limit {
            // The request must not wait for its copy, nor memory grow with it.
            self.cluster.stats.retry_or_shadow_abandoned().inc();
            queue.close(State::Abandoned);
        } else {
            queue.pieces.push_back(data.clone());
            queue.wake();
        }
    }

    fn end(&self, trailers: Option<&Headers>) {
        let mut queue = self.queue.borrow_mut();
        if queue.state == State::Open {
            queue.trailers = trailers.cloned();
            queue.state = State::Ended;
            queue.wake();
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut queue = self.queue.borrow_mut();
        if queue.state == State::Open {
            queue.close(State::Abandoned);
        }
    }
}

impl Queue {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn close(&mut self, state: State) {
        self.state = state;
        self.pieces.clear();
        self.wake();
    }
}

impl Reader {
    /// Whether the request is complete and has no body.
    fn is_bodiless(&self) -> bool {
        let queue = self.0.borrow();
        queue.state == State::Ended && queue.pieces.is_empty() && queue.trailers.is_none()
    }

    fn poll(&self, task: &mut Context<'_>) -> Poll<Copied> {
        let mut queue = self.0.borrow_mut();
        if queue.state == State::Abandoned {
            return Poll::Ready(Copied::Abandoned);
        }
        if let Some(data) = queue.pieces.pop_front() {
            queue.bytes -= data.len();
            return Poll::Ready(Copied::Data(data));
        }
        if queue.state == State::Ended {
            return Poll::Ready(Copied::End(queue.trailers.take()));
        }
        queue.waker = Some(task.waker().clone());
        Poll::Pending
    }
}

/// Sends a request and reads its response to the end.
async fn send(
    worker: Rc<Worker>,
    local: Rc<LocalCluster>,
    request: Headers,
    body: Reader,
    timeout: Duration,
) {
    let exchange = exchange(&worker, &local, request, body);
    if timeout.is_zero() {
        exchange.await;
    } else {
        tokio::select! {
            () = exchange => {}
            () = tokio::time::sleep(timeout) => {}
        }
    }
}

async fn exchange(worker: &Rc<Worker>, local: &LocalCluster, request: Headers, body: Reader) {
    let Some(cluster) = local.get() else { return };
    let now = Instant::now();
    let priority = Priority::Default;
    let tls_name = TlsName::of(&cluster.http, &request);
    let sharing = Sharing { tls_name, counted: priority, ..Sharing::default() };
    let Ok(pool) = local.pick(worker, &cluster, &PickContext::default(), sharing, now) else { return };
    let stream = match upstream::ready(&pool, &cluster, Carried::Http(Protocol::Http11), now) {
        Some(stream) => Ok(stream),
        None => {
            upstream::acquire(
                Rc::clone(worker),
                Rc::clone(&pool),
                Rc::clone(&cluster),
                priority,
                Carried::Http(Protocol::Http11),
            )
            .await
        }
    };
    let host = pool.host();
    let mut stream = match stream {
        Ok(stream) => stream,
        Err(NoStream { reason: ResetReason::Overflow, .. }) => return,
        Err(_) => return cluster.local_origin(&host, LocalOrigin::ConnectFailed),
    };
    let Some(_permit) = RequestPermit::acquire(&cluster, priority) else { return };
    cluster.local_origin(&host, LocalOrigin::Connected);
    let is_grpc = is_grpc(&request);
    let mut ended = body.is_bodiless();
    if stream.send_head(worker, &request, ended).is_err() {
        return cluster.local_origin(&host, LocalOrigin::ConnectFailed);
    }
    worker.shared.async_client.rq_total().inc();
    // To the mirror's cluster the request comes from inside: from this proxy.
    let (extras, zone) = (local.extras(worker, &cluster), pool.zone_stats(worker, &cluster));
    let categories = || std::iter::once(extras.internal()).chain(zone.as_deref());
    let mut head = Headers::new();
    let done = std::future::poll_fn(|task| {
        while !ended {
            if !stream.has_room() && !matches!(stream.poll_flush(task), Poll::Ready(Ok(()))) {
                break;
            }
            let sent = match body.poll(task) {
                Poll::Pending => break,
                Poll::Ready(Copied::Data(data)) => stream.send_data(data),
                Poll::Ready(Copied::End(trailers)) => {
                    ended = true;
                    stream.send_end(trailers.as_ref())
                }
                Poll::Ready(Copied::Abandoned) => return Poll::Ready(false),
            };
            if sent.is_err() {
                return Poll::Ready(false);
            }
        }
        let _ = stream.poll_flush(task);
        loop {
            match std::task::ready!(stream.poll_event(task, worker, &mut head)) {
                Err(_) => {
                    cluster.local_origin(&host, LocalOrigin::ConnectFailed);
                    return Poll::Ready(false);
                }
                Ok(Event::Head { end }) => {
                    let status = head.status().unwrap_or(0);
                    outlier::answered(&cluster, &host, &head, is_grpc);
                    cluster.count_response(status);
                    categories().for_each(|stats| stats.record(status));
                    if end {
                        return Poll::Ready(ended);
                    }
                }
                Ok(Event::Trailers | Event::End) => return Poll::Ready(ended),
                Ok(Event::Informational | Event::Data(_)) => {}
            }
        }
    })
    .await;
    if done {
        let elapsed = crate::http::millis(now, Instant::now());
        cluster.responses().record_time(elapsed);
        categories().for_each(|stats| stats.record_time(elapsed));
    }
    if let (true, Upstream::Http1(mut connection)) = (done, stream)
        && connection.finish(worker)
    {
        pool.put_idle(connection, &cluster, Instant::now());
    }
}

/// `host:80` becomes `host-shadow:80`.
fn shadow_host(host: &[u8]) -> Vec<u8> {
    let end = match memchr::memrchr(b':', host) {
        Some(colon) if host[colon + 1..].iter().all(u8::is_ascii_digit) => colon,
        _ => host.len(),
    };
    [&host[..end], b"-shadow", &host[end..]].concat()
}
