//! Request mirroring: a copy goes to another cluster as it comes, and nobody waits for the answer.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use waystation_filter_api::client::{Call as _, Event};
use waystation_http::{Headers, Known};
use waystation_route::{MirrorPolicy, Route, RouteAction};
use waystation_upstream::cluster::ClusterRef;

use super::Stream;
use super::request::format_context;
use crate::http::async_client::{self, Exchange, Options};
use crate::http::downstream::Downstream;

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
        let bodiless = self.request_passed() && self.heads.kept.is_empty() && !self.request_has_trailers;
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
            async_client::append_own_address(&mut request, &self.cx.worker);
            let feed = Feed::new(Rc::clone(cluster), self.keep_limit(route));
            for data in &self.heads.kept {
                feed.push(data);
            }
            let call = Exchange::new(Options {
                worker: Rc::clone(&self.cx.worker),
                local,
                head: request,
                body: bodiless.then(Bytes::new),
                retries: None,
                hash: None,
                timeout: Some(action.timeout).filter(|timeout| !timeout.is_zero()),
            });
            tokio::task::spawn_local(send(call, feed.reader(), bodiless));
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
async fn send(mut call: Exchange, body: Reader, bodiless: bool) {
    let mut ended = bodiless;
    std::future::poll_fn(|task| {
        while !ended {
            if call.is_behind() && call.poll_room(task).is_pending() {
                break;
            }
            match body.poll(task) {
                Poll::Pending => break,
                Poll::Ready(Copied::Data(data)) => call.send(data),
                Poll::Ready(Copied::End(trailers)) => {
                    ended = true;
                    call.end(trailers.as_ref());
                }
                Poll::Ready(Copied::Abandoned) => return Poll::Ready(()),
            }
        }
        loop {
            match std::task::ready!(call.poll_event(task)) {
                Err(_) | Ok(Event::Head { end: true, .. } | Event::Trailers(_) | Event::End) => {
                    return Poll::Ready(());
                }
                Ok(Event::Head { .. } | Event::Data(_)) => {}
            }
        }
    })
    .await;
}

/// `host:80` becomes `host-shadow:80`.
fn shadow_host(host: &[u8]) -> Vec<u8> {
    let end = match memchr::memrchr(b':', host) {
        Some(colon) if host[colon + 1..].iter().all(u8::is_ascii_digit) => colon,
        _ => host.len(),
    };
    [&host[..end], b"-shadow", &host[end..]].concat()
}
