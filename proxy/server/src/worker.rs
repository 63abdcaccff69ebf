//! One worker: an OS thread with its own connections, pools, randomness and view of the clusters.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use waystation_filter_api::cell::{self, Held, Local};
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::runtime::{Fraction, RuntimeFraction, RuntimeInteger};
use waystation_stats::{Gauge, ResponseStats, Scope};
use waystation_upstream::admission::{Permit, Resource};
use waystation_upstream::cluster::{ClusterRef, Discovery};
use waystation_upstream::host::HealthFlag;
use waystation_upstream::load_balancer::{LocalLb, PreviousPriorities, PriorityLoad};
use waystation_upstream::{Cluster, Host, HostRef, NoHost, PickContext, Priority, Snapshot};

use crate::context::Shared;
use crate::http::retry::BASE_MILLIS;
use crate::http::stream::Scratch;
use crate::overload::{self, Waits};
use crate::pool::{HostPool, TlsName};

/// How often idle connections are looked after.
const SWEEP: Duration = Duration::from_millis(500);

/// The size of a read buffer: a head and a small body in one `read`.
const BUFFER: usize = 16 * 1024;

/// Buffers kept for the next connection that becomes active.
const SPARE_BUFFERS: usize = 64;

/// Stream states kept for the next request.
const SPARE_STREAMS: usize = 64;

/// Connection ids are taken from the process in blocks.
const ID_BLOCK: u64 = 1024;

/// What one worker thread owns. Never leaves its thread.
pub struct Worker {
    /// The worker's number, from 0.
    pub index: u32,
    /// The process.
    pub shared: Arc<Shared>,
    /// Our own address, written to `x-forwarded-for` in place of a loopback peer.
    pub(crate) node_ip: IpAddr,
    random: RefCell<fastrand::Rng>,
    /// By cell id.
    clusters: RefCell<Vec<Option<Rc<LocalCluster>>>>,
    /// Where in `clusters` those are that requests name themselves. A place may be another's by now.
    named: RefCell<HashMap<Box<str>, usize>>,
    buffers: RefCell<Vec<BytesMut>>,
    #[expect(
        clippy::vec_box,
        reason = "states move in and out with each request; a pointer is what should move"
    )]
    streams: RefCell<Vec<Box<Scratch>>>,
    ids: Cell<(u64, u64)>,
    date: RefCell<Date>,
    wall: Cell<(Instant, SystemTime)>,
    /// Tasks whose deadlines depend on the overload manager.
    pub(crate) overload_waits: Rc<Waits>,
    /// `thread_local_cluster_manager.worker_<n>.clusters_inflated`: clusters that this worker has something of.
    inflated: Gauge,
}

/// The `date` header, rendered once a second.
#[derive(Debug)]
struct Date {
    until: Instant,
    text: [u8; 29],
}

/// Pools that are not everyone's.
type NamedPools = HashMap<PoolKey, Rc<HostPool>>;

#[derive(Clone, Eq, Hash, PartialEq)]
struct PoolKey {
    host: u64,
    downstream: Option<u64>,
    tls_name: Option<TlsName<Box<str>>>,
}

/// With whom a request may share its connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sharing<'a> {
    /// With those of the same TLS name: what was verified was that name.
    pub tls_name: Option<TlsName<&'a str>>,
    /// With those of the same downstream connection, when the cluster asks for that.
    pub downstream: Option<&'a Rc<ConnectionInfo>>,
    /// Whether upstream may be told of the downstream connection.
    pub stated: bool,
    /// As what its pool counts among the cluster's `max_connection_pools`.
    pub counted: Priority,
}

/// One worker's view of one cluster.
pub struct LocalCluster {
    cell: Arc<cell::Cell<Cluster>>,
    view: RefCell<View>,
    pools: RefCell<HashMap<u64, Rc<HostPool>, BuildHasherDefault<IdHasher>>>,
    /// Pools of connections whose TLS names come from requests.
    named_pools: RefCell<NamedPools>,
    /// The hosts that the last sweep saw.
    swept: RefCell<std::sync::Weak<Snapshot>>,
    /// The hosts that connections were made to, where others end all of them.
    members: RefCell<Option<Held<Snapshot>>>,
    extras: OnceCell<Extras>,
}

/// What only clusters that carry HTTP requests have.
pub(crate) struct Extras {
    scope: Scope,
    internal: OnceCell<ResponseStats>,
    external: OnceCell<ResponseStats>,
    canary: OnceCell<ResponseStats>,
    retry: OnceCell<ResponseStats>,
    /// Runtime `upstream.maintenance_mode.<cluster>`.
    pub(crate) maintenance: RuntimeFraction,
    /// Runtime `upstream.use_retry`.
    pub(crate) use_retry: RuntimeFraction,
    /// Runtime `upstream.base_retry_backoff_ms`.
    pub(crate) base_back_off: RuntimeInteger,
}

impl Extras {
    /// Responses to requests from inside the mesh.
    pub(crate) fn internal(&self) -> &ResponseStats {
        self.internal.get_or_init(|| ResponseStats::new(self.scope.scope("internal")))
    }

    /// Responses to requests from outside.
    pub(crate) fn external(&self) -> &ResponseStats {
        self.external.get_or_init(|| ResponseStats::new(self.scope.scope("external")))
    }

    /// Responses of canaries.
    pub(crate) fn canary(&self) -> &ResponseStats {
        self.canary.get_or_init(|| ResponseStats::new(self.scope.scope("canary")))
    }

    /// Responses that were not passed on: the request was tried again.
    pub(crate) fn retry(&self) -> &ResponseStats {
        self.retry.get_or_init(|| ResponseStats::new(self.scope.scope("retry")))
    }
}

struct View {
    local: Local<Cluster>,
    cluster: Option<Rc<ClusterRef>>,
    lb: LocalLb,
}

impl Worker {
    /// A worker; to be made on its own thread, inside its `LocalSet`. `seed` makes its randomness repeatable.
    pub fn new(index: u32, shared: Arc<Shared>, seed: Option<u64>) -> Rc<Self> {
        let random = seed.map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed);
        let now = Instant::now();
        let scope = shared.stats.root().scope("thread_local_cluster_manager").worker(index);
        let worker = Rc::new(Self {
            inflated: scope.gauge("clusters_inflated"),
            index,
            shared,
            node_ip: local_ip(),
            random: RefCell::new(random),
            clusters: RefCell::default(),
            named: RefCell::default(),
            buffers: RefCell::default(),
            streams: RefCell::default(),
            ids: Cell::default(),
            date: RefCell::new(Date { until: now, text: [0; 29] }),
            wall: Cell::new((now, SystemTime::now())),
            overload_waits: Rc::default(),
        });
        if let Some(overload) = worker.shared.overload.get() {
            overload::follow(overload, &worker.overload_waits);
        }
        tokio::task::spawn_local(sweep(Rc::downgrade(&worker)));
        worker
    }

    /// A number unique to a connection of this process.
    pub fn connection_id(&self) -> u64 {
        let (next, end) = self.ids.get();
        if next < end {
            self.ids.set((next + 1, end));
            return next;
        }
        let start = self.shared.reserve_connection_ids(ID_BLOCK);
        self.ids.set((start + 1, start + ID_BLOCK));
        start
    }

    /// A random number.
    #[inline]
    pub fn random(&self) -> u64 {
        self.random.borrow_mut().u64(..)
    }

    /// The worker's randomness, for a phase that takes it.
    #[inline]
    pub(crate) fn with_random<T>(&self, with: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        with(&mut self.random.borrow_mut())
    }

    /// The wall clock at `now`, from one reading per sweep.
    #[inline]
    pub(crate) fn wall_clock(&self, now: Instant) -> SystemTime {
        let (then, wall) = self.wall.get();
        wall + now.saturating_duration_since(then)
    }

    /// Passes the current `date` value on.
    #[inline]
    pub(crate) fn with_date<T>(&self, now: Instant, with: impl FnOnce(&[u8]) -> T) -> T {
        let mut date = self.date.borrow_mut();
        if now >= date.until {
            let wall = SystemTime::now();
            let text = httpdate::fmt_http_date(wall);
            date.text.copy_from_slice(&text.as_bytes()[..29]);
            let since = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            date.until = now + Duration::from_nanos(1_000_000_000 - u64::from(since.subsec_nanos()));
        }
        with(&date.text)
    }

    /// A buffer to read into or encode to.
    #[inline]
    pub(crate) fn take_buffer(&self) -> BytesMut {
        self.buffers.borrow_mut().pop().unwrap_or_else(|| BytesMut::with_capacity(BUFFER))
    }

    /// Gives a buffer back for others to use.
    #[inline]
    pub(crate) fn give_buffer(&self, mut buffer: BytesMut) {
        let mut spare = self.buffers.borrow_mut();
        if buffer.capacity() == 0 || spare.len() >= SPARE_BUFFERS {
            return;
        }
        buffer.clear();
        // Pieces of it may still be on their way: only a buffer that is ours alone again is worth keeping.
        if buffer.try_reclaim(BUFFER) && buffer.capacity() <= 2 * BUFFER {
            spare.push(buffer);
        }
    }

    /// The state of a new stream; its memory is that of an earlier one.
    #[inline]
    pub(crate) fn take_scratch(&self) -> Box<Scratch> {
        self.streams.borrow_mut().pop().unwrap_or_default()
    }

    /// Keeps the memory of a finished stream.
    #[inline]
    pub(crate) fn give_scratch(&self, mut scratch: Box<Scratch>) {
        scratch.recycle();
        let mut spare = self.streams.borrow_mut();
        if spare.len() < SPARE_STREAMS {
            spare.push(scratch);
        }
    }

    /// This worker's view of the cluster in `cell`.
    #[inline]
    pub fn cluster(&self, cell: &Arc<cell::Cell<Cluster>>) -> Rc<LocalCluster> {
        let index = cell.id() as usize;
        if let Some(Some(found)) = self.clusters.borrow().get(index)
            && Arc::ptr_eq(&found.cell, cell)
        {
            return Rc::clone(found);
        }
        self.add_cluster(cell)
    }

    /// The view of a cluster that a request names (`cluster_header`): by a map of this worker's own, so that the table of
    /// all is asked for the first request only.
    pub fn cluster_named(&self, name: &str) -> Option<Rc<LocalCluster>> {
        if let Some(index) = self.named.borrow().get(name)
            && let Some(Some(found)) = self.clusters.borrow().get(*index)
            && found.cell.name() == name
        {
            return Some(Rc::clone(found));
        }
        let cell = self.shared.clusters.find(name)?;
        self.named.borrow_mut().insert(name.into(), cell.id() as usize);
        Some(self.cluster(&cell))
    }

    #[cold]
    fn add_cluster(&self, cell: &Arc<cell::Cell<Cluster>>) -> Rc<LocalCluster> {
        let mut clusters = self.clusters.borrow_mut();
        let index = cell.id() as usize;
        if clusters.len() <= index {
            clusters.resize_with(index + 1, || None);
        }
        let view = View { local: Local::new(Arc::clone(cell)), cluster: None, lb: LocalLb::default() };
        let local = LocalCluster {
            cell: Arc::clone(cell),
            view: RefCell::new(view),
            pools: RefCell::default(),
            named_pools: RefCell::default(),
            swept: RefCell::default(),
            members: RefCell::default(),
            extras: OnceCell::new(),
        };
        if clusters[index].is_none() {
            self.inflated.inc();
        }
        Rc::clone(clusters[index].insert(Rc::new(local)))
    }

    fn sweep(&self, now: Instant) {
        self.wall.set((now, SystemTime::now()));
        let mut clusters = self.clusters.borrow_mut();
        for slot in clusters.iter_mut() {
            let Some(cluster) = slot else { continue };
            cluster.sweep(now);
            // Who asks for the name again gets it anew. Whether others refer to it cannot be told from the count of the
            // cell: every worker that has seen the cluster holds it.
            if Rc::strong_count(cluster) == 1 && cluster.is_over() {
                *slot = None;
                self.inflated.dec();
            }
        }
        let is_there = |name: &str, index: usize| {
            clusters.get(index).and_then(Option::as_ref).is_some_and(|found| found.cell.name() == name)
        };
        self.named.borrow_mut().retain(|name, index| is_there(name, *index));
    }
}

impl LocalCluster {
    /// The cluster in force; nothing while it does not exist.
    #[inline]
    pub fn get(&self) -> Option<Rc<ClusterRef>> {
        let mut view = self.view.borrow_mut();
        let View { local, cluster, lb } = &mut *view;
        let held = local.get();
        match (held, &*cluster) {
            (Some(held), Some(known)) if known.0.same(held) => Some(Rc::clone(known)),
            (Some(held), _) => {
                // Another configuration: its schedules start anew, and what the old one connected is used no more: it may
                // have been made with another TLS context. Streams on it finish.
                *lb = LocalLb::default();
                self.pools.borrow_mut().clear();
                self.named_pools.borrow_mut().clear();
                let fresh = ClusterRef::new(held.clone());
                *cluster = Some(Rc::clone(&fresh));
                Some(fresh)
            }
            (None, _) => {
                *cluster = None;
                None
            }
        }
    }

    /// The load of the priority levels for a retry that avoids those tried before; nothing when it is the ordinary one.
    pub(crate) fn retry_load(
        &self,
        cluster: &Cluster,
        previous: &mut PreviousPriorities,
    ) -> Option<PriorityLoad> {
        self.view.borrow_mut().lb.snapshot(cluster)?.retry_load(previous)
    }

    /// `close_connections_on_host_set_change`: connections to a cluster whose hosts are no longer the same are used no
    /// more; streams on them finish.
    fn drop_pools_of_other_hosts(&self, cluster: &Cluster, lb: &mut LocalLb) {
        let Some(snapshot) = lb.snapshot(cluster) else { return };
        let mut members = self.members.borrow_mut();
        if members.as_ref().is_some_and(|known| known.same(snapshot)) {
            return;
        }
        let ids = |snapshot: &Snapshot| snapshot.hosts().map(|host| host.id()).collect::<HashSet<u64>>();
        if members.replace(snapshot.clone()).is_some_and(|known| ids(&known) != ids(snapshot)) {
            self.pools.borrow_mut().clear();
            self.named_pools.borrow_mut().clear();
        }
    }

    /// Picks a host for a connection that is nobody else's, as those of TCP proxies are: there is no pool of them, and none
    /// that counts among the cluster's.
    pub fn pick_host(
        &self,
        worker: &Worker,
        cluster: &Cluster,
        cx: &PickContext<'_>,
        now: Instant,
    ) -> Result<Rc<HostRef>, NoHost> {
        let lb = &mut self.view.borrow_mut().lb;
        let host = worker.with_random(|random| cluster.pick(lb, cx, random, now))?;
        Ok(Rc::new(HostRef(Arc::clone(host))))
    }

    /// Picks a host and gives the pool of those that may share its connections.
    pub fn pick(
        &self,
        worker: &Worker,
        cluster: &Cluster,
        cx: &PickContext<'_>,
        sharing: Sharing<'_>,
        now: Instant,
    ) -> Result<Rc<HostPool>, NoHost> {
        let mut view = self.view.borrow_mut();
        if cluster.close_connections_on_host_set_change {
            self.drop_pools_of_other_hosts(cluster, &mut view.lb);
        }
        let host = worker.with_random(|random| cluster.pick(&mut view.lb, cx, random, now))?;
        let downstream = sharing.downstream.filter(|_| cluster.pool_per_downstream_connection);
        if sharing.tls_name.is_some() || downstream.is_some() {
            let mut named = self.named_pools.borrow_mut();
            let key = PoolKey {
                host: host.id(),
                downstream: downstream.map(|info| info.id),
                tls_name: sharing.tls_name.map(TlsName::to_owned),
            };
            if let Some(pool) = named.get(&key) {
                pool.update(host);
                return Ok(Rc::clone(pool));
            }
            // Clients choose these keys: one that is idle makes way, and its connections with it.
            let free = || {
                let idle = named.iter().find(|(_, pool)| pool.is_idle() && Rc::strong_count(pool) == 1);
                if let Some(key) = idle.map(|(key, _)| key.clone()) {
                    named.remove(&key);
                }
            };
            let place = place_for_pool(cluster, sharing.counted, free)?;
            let pool = Rc::new(HostPool::new(host, place, Sharing { downstream, ..sharing }));
            named.insert(key, Rc::clone(&pool));
            return Ok(pool);
        }
        if let Some(pool) = self.pools.borrow().get(&host.id()) {
            pool.update(host);
            return Ok(Rc::clone(pool));
        }
        self.add_pool(cluster, host, sharing.counted)
    }

    /// Made with the first request; a replaced cluster keeps its name, and so these.
    #[inline]
    pub(crate) fn extras(&self, worker: &Worker, cluster: &Cluster) -> &Extras {
        self.extras.get_or_init(|| {
            let scope = cluster.scope();
            let key = format!("upstream.maintenance_mode.{}", cluster.name());
            Extras {
                scope: scope.clone(),
                internal: OnceCell::new(),
                external: OnceCell::new(),
                canary: OnceCell::new(),
                retry: OnceCell::new(),
                maintenance: worker.shared.runtime.fraction(&key, Fraction::NEVER),
                use_retry: worker.shared.runtime.fraction("upstream.use_retry", Fraction::ALWAYS),
                base_back_off: (worker.shared.runtime).integer("upstream.base_retry_backoff_ms", BASE_MILLIS),
            }
        })
    }

    #[cold]
    fn add_pool(
        &self,
        cluster: &Cluster,
        host: &Arc<Host>,
        counted: Priority,
    ) -> Result<Rc<HostPool>, NoHost> {
        // The pool of another host does not make way, idle or not, as in Envoy.
        let place = place_for_pool(cluster, counted, || {})?;
        let pool = Rc::new(HostPool::new(host, place, Sharing::default()));
        self.pools.borrow_mut().insert(host.id(), Rc::clone(&pool));
        Ok(pool)
    }

    /// Whether the cluster is gone, and all that was connected for it.
    fn is_over(&self) -> bool {
        !self.cell.is_set() && self.pools.borrow().is_empty() && self.named_pools.borrow().is_empty()
    }

    /// Closes what is dead or idle for too long, and forgets pools without connections.
    fn sweep(&self, now: Instant) {
        let cluster = self.get();
        if let Some(cluster) = cluster.as_ref().filter(|cluster| cluster.close_connections_on_host_set_change)
        {
            self.drop_pools_of_other_hosts(cluster, &mut self.view.borrow_mut().lb);
        }
        let keep = |pool: &mut Rc<HostPool>| {
            pool.sweep(cluster.as_deref(), now);
            !(pool.is_empty() && Rc::strong_count(pool) == 1)
        };
        self.pools.borrow_mut().retain(|_, pool| keep(pool));
        self.named_pools.borrow_mut().retain(|_, pool| keep(pool));
        self.forget_removed_hosts(cluster.as_deref());
    }

    /// Closes the idle connections to hosts that left the cluster, or have come to fail. Streams on others of them finish.
    fn forget_removed_hosts(&self, cluster: Option<&ClusterRef>) {
        let Some(cluster) = cluster.filter(|cluster| !matches!(cluster.discovery, Discovery::OriginalDst(_)))
        else {
            return;
        };
        let snapshot = cluster.endpoints().snapshot();
        // A weak pointer keeps the address from being another snapshot's.
        let this = Arc::downgrade(&snapshot);
        if self.swept.replace(this.clone()).ptr_eq(&this) {
            return;
        }
        // Envoy drains what was connected to a host that fails: where routing was at fault, new connections may fare better.
        let fails = |host: &Host| {
            host.has_flag(HealthFlag::FailedActiveHc) || host.has_flag(HealthFlag::FailedOutlierCheck)
        };
        let hosts: HashSet<u64> =
            snapshot.hosts().filter(|host| !fails(host)).map(|host| host.id()).collect();
        self.pools.borrow_mut().retain(|id, _| hosts.contains(id));
        self.named_pools.borrow_mut().retain(|key, _| hosts.contains(&key.host));
    }
}

/// A place under `max_connection_pools`. At the bound `free` may make room.
fn place_for_pool(cluster: &Cluster, counted: Priority, free: impl FnOnce()) -> Result<Permit, NoHost> {
    let reserve = || cluster.admission.reserve(counted, Resource::Pools);
    let freed = || {
        free();
        reserve()
    };
    reserve().or_else(freed).ok_or_else(|| {
        cluster.stats.upstream_cx_pool_overflow().inc();
        NoHost::PoolOverflow
    })
}

async fn sweep(worker: Weak<Worker>) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let Some(wanted) = worker.upgrade().map(|worker| Arc::clone(&worker.shared)) else { return };
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // Another worker waits for room that idle connections take.
            () = wanted.room_wanted.notified() => {}
        }
        let Some(worker) = worker.upgrade() else { return };
        worker.sweep(Instant::now());
    }
}

/// The address that packets to the outside would carry; no packet is sent to find out.
pub(crate) fn local_ip() -> IpAddr {
    let probe = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        // TEST-NET-1: routed like any other address.
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    probe.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
}

/// Host ids are small numbers that nobody outside chooses.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0 << 8 | u64::from(*byte);
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = id;
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("index", &self.index).finish_non_exhaustive()
    }
}

impl fmt::Debug for LocalCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCluster").field("cell", &self.cell).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_find_clusters_by_name() {
        tokio::task::LocalSet::new()
            .run_until(async {
                let shared = crate::context::tests::shared();
                let worker = Worker::new(0, Arc::clone(&shared), Some(1));
                let [a, b] = ["a", "b"].map(|name| shared.clusters.cell(name));
                for name in ["a", "b", "a", "b"] {
                    assert_eq!(worker.cluster_named(name).unwrap().cell.name(), name);
                }
                assert!(worker.cluster_named("made up").is_none());
                assert_eq!(worker.named.borrow().len(), 2);
                // A name is not its former place, which another cluster has now.
                worker.named.borrow_mut().insert("b".into(), a.id() as usize);
                assert_eq!(worker.cluster_named("b").unwrap().cell.id(), b.id());
                drop((a, b));
                worker.sweep(Instant::now());
                assert!(worker.named.borrow().is_empty() && worker.cluster_named("a").is_none());
            })
            .await;
    }

    #[tokio::test]
    async fn every_worker_lets_a_removed_cluster_go() {
        tokio::task::LocalSet::new()
            .run_until(async {
                let shared = crate::context::tests::shared();
                let workers = [0, 1].map(|index| Worker::new(index, Arc::clone(&shared), Some(1)));
                let cell = shared.clusters.cell("gone");
                let streams = workers.each_ref().map(|worker| worker.cluster(&cell));
                let inflated = || workers.each_ref().map(|worker| worker.inflated.value());
                drop(cell);
                workers.iter().for_each(|worker| worker.sweep(Instant::now()));
                assert_eq!(inflated(), [1, 1], "streams use it");
                drop(streams);
                workers.iter().for_each(|worker| worker.sweep(Instant::now()));
                assert_eq!(inflated(), [0, 0]);
                assert!(shared.clusters.find("gone").is_none());
            })
            .await;
    }
}
