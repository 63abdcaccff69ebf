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

pub use connect::{
    Bound, ConnectError, ConnectOptions, ConnectionGuard, UpstreamConnInfo, UpstreamSocket, connect,
};

pub use tls_name::TlsName;

use crate::transport::Liveness;
use crate::worker::{Sharing, Worker};
use http1::Http1;
use http2::Http2;

/// What a request that waits can use; nothing of it when it wants a connection of its own, for the payload of a CONNECT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Takes {
    pub(crate) http1: bool,
    pub(crate) http2: bool,
}

/// The connections of one worker to one host.
pub struct HostPool {
    host: RefCell<Rc<HostRef>>,
    /// Its place among the pools of the cluster.
    _place: Permit,
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
    /// Connections of either kind that are being made: HTTP/1, and for the payload of a CONNECT.
    connecting: [Cell<u32>; 2],
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
    pub(crate) fn new(host: &Arc<Host>, place: Permit, sharing: Sharing<'_>) -> Self {
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
            connecting: Default::default(),
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
        // Others wait for the room that it takes, and those who wait here go behind them.
        if connection.guard.is_room_wanted() {
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
        if self.has(Takes { http1: true, http2: false }) {
            self.vacated();
        } else {
            // None will come back: all who wait for one go for connections of their own, or into line for them.
            self.wake_all();
        }
    }

    fn opened_http1(&self) {
        self.http1_open.set(self.http1_open.get() + 1);
    }

    /// A connection for the payload of a CONNECT was made.
    fn opened_raw(&self) {
        self.raw_open.set(self.raw_open.get() + 1);
    }

    /// It was dropped.
    fn closed_raw(&self) {
        self.raw_open.set(self.raw_open.get().saturating_sub(1));
        self.vacated();
    }

    /// Whether there are connections of a kind that such a request may wait for; to Envoy each kind is a pool of its own.
    pub(crate) fn has(&self, takes: Takes) -> bool {
        let Takes { http1, http2 } = takes;
        let raw = !(http1 || http2);
        (http1 && self.http1_open.get() + self.connecting[0].get() > 0)
            || (http2 && self.http2.borrow().iter().any(|connection| connection.is_open()))
            || (raw && self.raw_open.get() + self.connecting[1].get() > 0)
    }

    /// A connection that is not shared is being made, or is not any more.
    pub(crate) fn count_connecting(&self, raw: bool, begins: bool) {
        let count = &self.connecting[usize::from(raw)];
        count.set(if begins { count.get() + 1 } else { count.get().saturating_sub(1) });
    }

    /// Whether requests of all clients share it, as far as this worker has them.
    pub(crate) fn is_common(&self) -> bool {
        self.downstream.is_none() && self.tls_name.is_none()
    }

    /// There is room for another connection: for the first of those with none to wait for any more, whom nobody else would
    /// wake, or else for the first of all. Those who wait for one that is being made hear of it then.
    pub(crate) fn vacated(&self) {
        let connecting = self.http2_connecting.get();
        let looks = |takes: Takes| !(takes.http2 && connecting);
        if !self.wake_first(|takes| looks(takes) && !self.has(takes)) {
            self.wake_first(looks);
        }
    }

    fn first_waiting(&self, wanted: impl Fn(Takes) -> bool) -> Option<Rc<Waiter>> {
        let mut waiting = self.waiting.borrow_mut();
        let place = waiting.iter().position(|waiter| wanted(waiter.takes))?;
        waiting.remove(place)
    }

    /// Lets the first look again who can use what has become free; whether there is one.
    pub(crate) fn wake_first(&self, wanted: impl Fn(Takes) -> bool) -> bool {
        let Some(waiter) = self.first_waiting(wanted) else { return false };
        waiter.woken.set(true);
        if let Some(waker) = waiter.waker.borrow_mut().take() {
            waker.wake();
        }
        true
    }

    /// Lets all who wait look again.
    pub(crate) fn wake_all(&self) {
        while self.wake_first(|_| true) {}
    }

    /// The least loaded HTTP/2 connection that takes another stream.
    #[inline]
    pub(crate) fn least_loaded(&self) -> Option<Rc<Http2>> {
        let connections = self.http2.borrow();
        connections.iter().filter(|c| c.has_room()).min_by_key(|c| c.active()).cloned()
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
            !expired && alive && !connection.guard.is_room_wanted()
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
            // Woken while the request was going away, for an idle connection, a stream, or room for a connection: whichever
            // it was is another's. A look in vain costs little, one that nobody takes can hold others up for ever.
            let Takes { http1, http2 } = self.waiter.takes;
            if http1 {
                self.pool.wake_first(|takes| takes.http1);
            }
            if http2 {
                self.pool.wake_first(|takes| takes.http2);
            }
            self.pool.vacated();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::tests::{cluster, shared};
    use waystation_upstream::Priority;
    use waystation_upstream::admission::Resource;

    const HTTP1: Takes = Takes { http1: true, http2: false };
    const HTTP2: Takes = Takes { http1: false, http2: true };
    const EITHER: Takes = Takes { http1: true, http2: true };
    const RAW: Takes = Takes { http1: false, http2: false };

    fn pool() -> HostPool {
        let cluster = cluster(&shared());
        let snapshot = cluster.endpoints().snapshot();
        let host = snapshot.hosts().next().unwrap();
        let place = cluster.admission.reserve_anyway(Priority::Default, Resource::Pools);
        HostPool::new(host, place, Sharing::default())
    }

    fn woken(waiting: &[Waiting<'_>]) -> Vec<bool> {
        waiting.iter().map(|waiting| waiting.waiter.woken.get()).collect()
    }

    #[test]
    fn each_kind_waits_for_its_own_connections() {
        let pool = pool();
        let has = || [HTTP1, HTTP2, EITHER, RAW].map(|takes| pool.has(takes));
        assert_eq!(has(), [false; 4]);
        pool.opened_raw();
        assert_eq!(has(), [false, false, false, true]);
        pool.opened_http1();
        assert_eq!(has(), [true, false, true, true]);
        pool.closed_raw();
        assert_eq!(has(), [true, false, true, false]);
    }

    #[test]
    fn room_for_a_connection_is_for_who_has_none_to_wait_for() {
        let pool = pool();
        pool.opened_http1();
        pool.opened_raw();
        pool.opened_raw();
        let waiting = [HTTP1, RAW, HTTP1, RAW].map(|takes| pool.wait(takes));
        pool.closed_raw();
        assert_eq!(woken(&waiting), [true, false, false, false], "another raw one is there");
        pool.closed_raw();
        assert_eq!(woken(&waiting), [true, true, false, false], "only one may come of the room of one");
        // The second could not be made.
        pool.vacated();
        assert_eq!(woken(&waiting), [true, true, false, true]);
        pool.vacated();
        assert_eq!(woken(&waiting), [true; 4]);
    }

    #[test]
    fn who_waits_for_one_that_is_being_made_is_left_alone() {
        let pool = pool();
        pool.opened_http1();
        pool.http2_connecting.set(true);
        let waiting = [HTTP2, EITHER, HTTP1].map(|takes| pool.wait(takes));
        pool.vacated();
        assert_eq!(woken(&waiting), [false, false, true]);
        pool.vacated();
        assert_eq!(woken(&waiting), [false, false, true]);
        pool.wake_all();
        assert_eq!(woken(&waiting), [true; 3]);
    }

    #[test]
    fn what_was_meant_for_a_request_that_goes_away_is_not_lost() {
        // Room for a connection is of use to any kind.
        for gone in [HTTP1, HTTP2, EITHER, RAW] {
            for next in [HTTP1, HTTP2, EITHER, RAW] {
                let pool = pool();
                let first = pool.wait(gone);
                let waiting = [pool.wait(next)];
                pool.vacated();
                assert_eq!(woken(&waiting), [false]);
                drop(first);
                assert_eq!(woken(&waiting), [true], "{gone:?} {next:?}");
            }
        }
        // A stream is so only to the one behind that takes it.
        let pool = pool();
        pool.opened_http1();
        let first = pool.wait(EITHER);
        let waiting = [HTTP1, HTTP1, HTTP2].map(|takes| pool.wait(takes));
        pool.wake_first(|takes| takes.http2);
        drop(first);
        assert!(waiting[2].waiter.woken.get());
    }

    #[tokio::test]
    async fn what_was_looked_at_or_not_meant_for_anyone_is_not_passed_on() {
        let pool = pool();
        let [mut first, second, third] = [HTTP1; 3].map(|takes| pool.wait(takes));
        pool.vacated();
        assert!(first.done().await.is_none());
        drop(first);
        drop(second);
        assert_eq!(woken(&[third]), [false]);
        assert!(pool.waiting.borrow().is_empty());
    }
}
