//! Upstream connections of one worker: made, kept, shared out and closed.
//!
//! A pool belongs to one host. HTTP/1 connections are handed out newest first, so that the surplus of a burst goes idle
//! and is closed; HTTP/2 connections carry streams up to their limit, the least loaded first. Admission (circuit
//! breakers) is decided before anything waits.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Instant;

use waystation_filter_api::connection::ConnectionInfo;
use waystation_stats::ResponseStats;
use waystation_upstream::admission::Permit;
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::{Cluster, Host, HostRef};

pub mod connect;
mod happy_eyeballs;
pub(crate) mod http1;
pub(crate) mod http2;
pub(crate) mod tcp;
mod tls_name;

pub use connect::{ConnectError, ConnectOptions, ConnectionGuard, UpstreamConnInfo, UpstreamSocket, connect};

pub use tls_name::TlsName;

use crate::transport::Liveness;
use crate::worker::{Sharing, Worker};
use http1::Http1;
use http2::Http2;

/// What a request that waits can use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Takes {
    pub(crate) http1: bool,
    pub(crate) http2: bool,
}

/// The connections of one worker to one host.
pub struct HostPool {
    host: RefCell<Rc<HostRef>>,
    /// Its place among the pools of the cluster.
    _place: Option<Permit>,
    /// The downstream connection whose requests alone it serves; what is idle goes with it.
    downstream: Option<Weak<ConnectionInfo>>,
    /// Whether upstream is told of it.
    stated: bool,
    /// By what name its connections are made.
    tls_name: Option<TlsName<Box<str>>>,
    /// Idle HTTP/1 connections, the one used last at the end.
    #[expect(
        clippy::vec_box,
        reason = "connections move in and out with each request; a pointer is what should move"
    )]
    idle: RefCell<Vec<Box<Http1>>>,
    http2: RefCell<Vec<Rc<Http2>>>,
    /// HTTP/1 connections of this pool, idle or not.
    http1_open: Cell<u32>,
    /// A connection that will speak HTTP/2, or may, is being made; further streams wait for it.
    pub(crate) http2_connecting: Cell<bool>,
    /// Connections that carry the payload of a CONNECT.
    raw_open: Cell<u32>,
    /// What ALPN agreed on last, for clusters that let it decide.
    pub(crate) negotiated_http1: Cell<bool>,
    waiting: RefCell<VecDeque<Rc<Waiter>>>,
    /// `zone.<ours>.<the host's>`, where both are known.
    zone: OnceCell<Option<Rc<ResponseStats>>>,
}

/// A request that waits for a connection of this pool.
pub(crate) struct Waiter {
    takes: Takes,
    waker: RefCell<Option<Waker>>,
    given: RefCell<Option<Box<Http1>>>,
    woken: Cell<bool>,
}

/// A waiter's place in the queue; leaves it when dropped.
pub(crate) struct Waiting<'a> {
    pool: &'a HostPool,
    waiter: Rc<Waiter>,
    /// Its turn has come and was taken.
    done: bool,
}

impl HostPool {
    pub(crate) fn new(host: &Arc<Host>, place: Option<Permit>, sharing: Sharing<'_>) -> Self {
        Self {
            host: RefCell::new(Rc::new(HostRef(Arc::clone(host)))),
            _place: place,
            downstream: sharing.downstream.map(Rc::downgrade),
            stated: sharing.stated,
            tls_name: sharing.tls_name.map(TlsName::to_owned),
            idle: RefCell::default(),
            http2: RefCell::default(),
            http1_open: Cell::new(0),
            raw_open: Cell::new(0),
            http2_connecting: Cell::new(false),
            negotiated_http1: Cell::new(false),
            waiting: RefCell::default(),
            zone: OnceCell::new(),
        }
    }

    /// What responses from the host count in by its zone, when it and this proxy have one.
    pub(crate) fn zone_stats(&self, worker: &Worker, cluster: &Cluster) -> Option<Rc<ResponseStats>> {
        let stats = self.zone.get_or_init(|| {
            let (from, to) = (&worker.shared.node.zone, self.host().locality().zone.clone());
            let both = !from.is_empty() && !to.is_empty();
            both.then(|| Rc::new(ResponseStats::new(cluster.scope().scope("zone").scope(from).scope(&to))))
        });
        stats.clone()
    }

    /// The host, as the newest snapshot describes it.
    #[inline]
    pub fn host(&self) -> Rc<HostRef> {
        Rc::clone(&self.host.borrow())
    }

    /// The downstream connection that upstream is told of.
    pub(crate) fn downstream(&self) -> Option<Rc<ConnectionInfo>> {
        self.downstream.as_ref().filter(|_| self.stated)?.upgrade()
    }

    /// The name that TLS of its connections takes from the requests they are for.
    pub(crate) fn tls_name(&self) -> Option<&TlsName<Box<str>>> {
        self.tls_name.as_ref()
    }

    /// Takes over a new description of the same host.
    #[inline]
    pub(crate) fn update(&self, host: &Arc<Host>) {
        if !Arc::ptr_eq(&self.host.borrow().0, host) {
            *self.host.borrow_mut() = Rc::new(HostRef(Arc::clone(host)));
        }
    }

    /// An idle HTTP/1 connection that is still alive.
    #[inline]
    pub(crate) fn take_idle(&self, now: Instant) -> Option<Box<Http1>> {
        loop {
            let mut connection = self.idle.borrow_mut().pop()?;
            if connection.is_usable(now) {
                return Some(connection);
            }
        }
    }

    /// Gives a connection back: to the first who waits for one like it, or to the idle ones.
    #[inline]
    pub(crate) fn put_idle(&self, mut connection: Box<Http1>, cluster: &Cluster, now: Instant) {
        let max = cluster.http.max_requests_per_connection;
        if max.is_some_and(|max| connection.requests >= max) {
            cluster.stats.upstream_cx_max_requests().inc();
            return;
        }
        connection.idle_since = now;
        while let Some(waiter) = self.first_waiting(|takes| takes.http1) {
            waiter.woken.set(true);
            if let Some(waker) = waiter.waker.borrow_mut().take() {
                *waiter.given.borrow_mut() = Some(connection);
                waker.wake();
                return;
            }
        }
        self.idle.borrow_mut().push(connection);
    }

    /// An HTTP/1 connection was dropped.
    fn closed_http1(&self) {
        self.http1_open.set(self.http1_open.get().saturating_sub(1));
        self.wake_one();
    }

    fn opened_http1(&self) {
        self.http1_open.set(self.http1_open.get() + 1);
    }

    /// Whether this worker has an HTTP/1 connection to the host that will come back.
    pub(crate) fn has_http1(&self) -> bool {
        self.http1_open.get() > 0
    }

    /// A connection for the payload of a CONNECT was made.
    fn opened_raw(&self) {
        self.raw_open.set(self.raw_open.get() + 1);
    }

    /// It was dropped.
    fn closed_raw(&self) {
        self.raw_open.set(self.raw_open.get().saturating_sub(1));
        self.wake_one();
    }

    pub(crate) fn has_raw(&self) -> bool {
        self.raw_open.get() > 0
    }

    fn first_waiting(&self, wanted: impl Fn(Takes) -> bool) -> Option<Rc<Waiter>> {
        let mut waiting = self.waiting.borrow_mut();
        let place = waiting.iter().position(|waiter| wanted(waiter.takes))?;
        waiting.remove(place)
    }

    /// Lets one who waits look again.
    pub(crate) fn wake_one(&self) {
        self.wake_first(|_| true);
    }

    /// The same for one who can use what has become free.
    fn wake_first(&self, wanted: impl Fn(Takes) -> bool) {
        if let Some(waiter) = self.first_waiting(wanted) {
            waiter.woken.set(true);
            if let Some(waker) = waiter.waker.borrow_mut().take() {
                waker.wake();
            }
        }
    }

    /// Lets all who wait look again.
    pub(crate) fn wake_all(&self) {
        let all = self.waiting.borrow().len();
        for _ in 0..all {
            self.wake_one();
        }
    }

    /// The least loaded HTTP/2 connection that takes another stream.
    #[inline]
    pub(crate) fn least_loaded(&self) -> Option<Rc<Http2>> {
        let connections = self.http2.borrow();
        connections.iter().filter(|c| c.has_room()).min_by_key(|c| c.active()).cloned()
    }

    /// Whether an HTTP/2 connection is open, with room or not.
    pub(crate) fn has_http2(&self) -> bool {
        self.http2.borrow().iter().any(|connection| connection.is_open())
    }

    pub(crate) fn add_http2(&self, connection: Rc<Http2>) {
        self.http2.borrow_mut().push(connection);
        self.wake_all();
    }

    pub(crate) fn remove_http2(&self, connection: &Rc<Http2>) {
        self.http2.borrow_mut().retain(|other| !Rc::ptr_eq(other, connection));
        self.wake_all();
    }

    /// Waits until a connection comes back (and is given, if it is of use), or anything else has changed.
    pub(crate) fn wait(&self, takes: Takes) -> Waiting<'_> {
        let waiter = Rc::new(Waiter {
            takes,
            waker: RefCell::default(),
            given: RefCell::default(),
            woken: Cell::new(false),
        });
        self.waiting.borrow_mut().push_back(Rc::clone(&waiter));
        Waiting { pool: self, waiter, done: false }
    }

    /// Closes what is dead, and what was idle for too long or belongs to a cluster or a downstream that is gone.
    pub(crate) fn sweep(&self, cluster: Option<&ClusterRef>, now: Instant) {
        let orphaned = self.downstream.as_ref().is_some_and(|downstream| downstream.strong_count() == 0);
        let cluster = cluster.filter(|_| !orphaned);
        let timeout = cluster.map(|cluster| cluster.http.idle_timeout);
        self.idle.borrow_mut().retain_mut(|connection| {
            let expired = match timeout {
                None => true,
                Some(None) => false,
                Some(Some(timeout)) => now.saturating_duration_since(connection.idle_since) >= timeout,
            };
            if expired && let Some(cluster) = cluster {
                cluster.stats.upstream_cx_idle_timeout().inc();
            }
            let alive = connection.transport.liveness() == Liveness::Idle;
            connection.guard.remote = !alive;
            !expired && alive
        });
        for connection in self.http2.borrow().iter() {
            connection.sweep(timeout, now);
        }
    }

    /// Whether no request is under way or waits here, though connections may be open.
    pub(crate) fn is_idle(&self) -> bool {
        self.http1_open.get() as usize == self.idle.borrow().len()
            && self.http2.borrow().iter().all(|connection| connection.active() == 0)
            && !self.http2_connecting.get()
            && self.raw_open.get() == 0
            && self.waiting.borrow().is_empty()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.http1_open.get() == 0
            && self.raw_open.get() == 0
            && self.http2.borrow().is_empty()
            && !self.http2_connecting.get()
    }
}

impl Drop for HostPool {
    fn drop(&mut self) {
        // What is idle over HTTP/1 goes with the pool. An HTTP/2 connection is its task's, which has to be told.
        self.http2.get_mut().iter().for_each(|connection| connection.retire());
    }
}

impl Waiting<'_> {
    /// The connection that was given, or nothing when the caller should look again.
    pub(crate) async fn done(&mut self) -> Option<Box<Http1>> {
        std::future::poll_fn(|cx| {
            if self.waiter.woken.get() {
                self.done = true;
                return Poll::Ready(self.waiter.given.borrow_mut().take());
            }
            *self.waiter.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.waiter.woken.get() {
            self.pool.waiting.borrow_mut().retain(|other| !Rc::ptr_eq(other, &self.waiter));
        } else if let Some(connection) = self.waiter.given.borrow_mut().take() {
            // Given while the request was going away: the next one takes it.
            self.pool.idle.borrow_mut().push(connection);
            self.pool.wake_first(|takes| takes.http1);
        } else if !self.done {
            // Woken while the request was going away: what it was woken for is another's who can use the same.
            let Takes { http1, http2 } = self.waiter.takes;
            let of_use = |takes: Takes| takes.http1 == http1 && takes.http2 == http2;
            self.pool.wake_first(of_use);
        }
    }
}

impl fmt::Debug for HostPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostPool")
            .field("host", &self.host.borrow().address())
            .field("http1", &self.http1_open)
            .field("http2", &self.http2.borrow().len())
            .finish_non_exhaustive()
    }
}
