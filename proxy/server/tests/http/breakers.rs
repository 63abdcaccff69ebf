//! Circuit breakers at their edges, with several workers on threads of their own.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinSet, LocalSet};
use waystation::context::Shared;
use waystation::drain::DrainHandle;
use waystation::http::{Hcm, serve_connection};
use waystation::transport::Transport;
use waystation::worker::Worker;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::{Cell, Held};
use waystation_filter_api::connection::ConnectionInfo;
use waystation_upstream::admission::Resource;
use waystation_upstream::{Cluster, Priority};

use super::harness::{compile_cluster, compile_cluster_of, prepare, run};

const WORKERS: usize = 4;
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// An upstream that answers when it is let to, and knows how many requests it has at once.
struct Origin {
    address: SocketAddr,
    /// Each answer takes a unit.
    answers: Arc<Semaphore>,
    active: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    seen: watch::Receiver<usize>,
}

impl Origin {
    async fn start(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (count, seen) = watch::channel(0);
        let origin = Self {
            address: listener.local_addr().unwrap(),
            answers: Arc::new(Semaphore::new(0)),
            active: Arc::default(),
            most: Arc::default(),
            seen,
        };
        let (answers, active, most) =
            (Arc::clone(&origin.answers), Arc::clone(&origin.active), Arc::clone(&origin.most));
        let count = Rc::new(count);
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (answers, active, most, count) =
                    (Arc::clone(&answers), Arc::clone(&active), Arc::clone(&most), Rc::clone(&count));
                tokio::task::spawn_local(async move {
                    while read_head(&mut stream).await {
                        most.fetch_max(active.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        count.send_modify(|count| *count += 1);
                        let mut byte = [0];
                        let gone = tokio::select! {
                            unit = answers.acquire() => {
                                unit.unwrap().forget();
                                false
                            }
                            _ = stream.read(&mut byte) => true,
                        };
                        active.fetch_sub(1, Ordering::SeqCst);
                        if gone || stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        origin
    }

    /// Waits until so many requests have come.
    async fn saw(&mut self, count: usize) {
        self.seen.wait_for(|seen| *seen >= count).await.unwrap();
    }

    fn answer(&self, count: usize) {
        self.answers.add_permits(count);
    }
}

async fn read_head(stream: &mut TcpStream) -> bool {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return false,
        }
    }
    true
}

/// Several workers, each on a thread and at an address of its own.
struct Workers {
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
    cell: Arc<Cell<Cluster>>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    fn start(origin: &Origin, cluster: &str) -> Self {
        Self::start_before(&[origin], cluster)
    }

    fn start_before(origins: &[&Origin], cluster: &str) -> Self {
        let ports: Vec<_> = origins.iter().map(|origin| origin.address.port()).collect();
        let (shared, hcm, cell) = prepare(ports[0], "", "", cluster, 1 << 20);
        if ports.len() > 1 {
            cell.set(Some(compile_cluster_of(&shared, &ports, cluster, None)));
        }
        let hcm = Arc::new(hcm);
        let (stop, stopped) = watch::channel(false);
        let mut addresses = Vec::new();
        let threads = (0..WORKERS).map(|index| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            addresses.push(listener.local_addr().unwrap());
            let (shared, hcm, stopped) = (Arc::clone(&shared), Arc::clone(&hcm), stopped.clone());
            std::thread::spawn(move || work(index as u32, &shared, hcm, listener, stopped))
        });
        let threads = threads.collect();
        Self { addresses, shared, cell, stop, threads }
    }

    fn cluster(&self) -> Arc<Cluster> {
        self.cell.get().unwrap()
    }

    fn in_use(&self, resource: Resource) -> u64 {
        self.cluster().admission.in_use(Priority::Default, resource)
    }

    fn stat(&self, name: &str) -> u64 {
        self.shared.stats.find(&format!("cluster.up.{name}")).unwrap_or_default()
    }

    /// Requests to the workers in turn, on connections of their own.
    fn ask(&self, count: usize, path: &'static str) -> JoinSet<String> {
        let mut asked = JoinSet::new();
        for i in 0..count {
            asked.spawn(ask(self.addresses[i % WORKERS], path));
        }
        asked
    }

    /// Waits until nothing is under way: streams end a moment after their clients have what they wanted.
    async fn settle(&self) {
        let resources = [Resource::Pending, Resource::Requests, Resource::Retries];
        while resources.iter().any(|resource| self.in_use(*resource) > 0) {
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "a worker has panicked");
        }
    }
}

fn work(
    index: u32,
    shared: &Arc<Shared>,
    hcm: Arc<Hcm>,
    listener: std::net::TcpListener,
    mut stopped: watch::Receiver<bool>,
) {
    let _shard = shared.stats.register_worker(index);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async move {
        let listener = TcpListener::from_std(listener).unwrap();
        let worker = Worker::new(index, Arc::clone(shared), Some(index.into()));
        let (hcm, drain) = (Held::new(hcm), DrainHandle::new());
        loop {
            let (stream, peer) = tokio::select! {
                accepted = listener.accept() => accepted.unwrap(),
                _ = stopped.wait_for(|stop| *stop) => return,
            };
            let local = Address::Ip(listener.local_addr().unwrap());
            let id = worker.connection_id();
            let info = ConnectionInfo::new(id, Instant::now(), local, Address::Ip(peer));
            let transport = Transport::tcp(stream);
            let served =
                serve_connection(Rc::clone(&worker), hcm.clone(), transport, Rc::new(info), drain.clone());
            tokio::task::spawn_local(served);
        }
    });
}

async fn ask(address: SocketAddr, path: &'static str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn is_ok(answer: &str) -> bool {
    answer.starts_with("HTTP/1.1 200 OK")
}

fn is_overloaded(answer: &str) -> bool {
    answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nx-envoy-overloaded: true\r\n")
}

#[test]
fn requests() {
    run(async {
        let mut origin = Origin::start(OK).await;
        let workers = Workers::start(&origin, "circuit_breakers: {thresholds: [{max_requests: 5}]}");
        let mut asked = workers.ask(5, "/");
        origin.saw(5).await;
        assert_eq!(
            (workers.in_use(Resource::Requests), workers.stat("circuit_breakers.default.rq_open")),
            (5, 1)
        );
        let refused = workers.ask(20, "/").join_all().await;
        assert!(refused.iter().all(|answer| is_overloaded(answer)), "{refused:?}");
        origin.answer(5);
        while let Some(answer) = asked.join_next().await {
            assert!(is_ok(&answer.unwrap()));
        }
        workers.settle().await;
        assert_eq!(origin.most.load(Ordering::SeqCst), 5);
        assert_eq!(workers.stat("circuit_breakers.default.rq_open"), 0);
        assert_eq!(workers.stat("upstream_rq_active_overflow"), 20);
    });
}

#[test]
fn one_connection_is_one_for_all_workers() {
    run(async {
        let mut origin = Origin::start(OK).await;
        let workers = Workers::start(&origin, "circuit_breakers: {thresholds: [{max_connections: 1}]}");
        let mut asked = workers.ask(40, "/");
        origin.saw(1).await;
        assert_eq!(workers.in_use(Resource::Connections), 1);
        origin.answer(40);
        while let Some(answer) = asked.join_next().await {
            let answer = answer.unwrap();
            assert!(is_ok(&answer), "{answer}");
            assert!(workers.in_use(Resource::Connections) <= 1);
        }
        workers.settle().await;
        assert_eq!(origin.most.load(Ordering::SeqCst), 1, "never two requests at once");
    });
}

#[test]
fn one_connection_for_each_host() {
    run(async {
        let mut origin = Origin::start(OK).await;
        let fields = "circuit_breakers: {per_host_thresholds: [{max_connections: 2}]}";
        let workers = Workers::start(&origin, fields);
        let mut asked = workers.ask(40, "/");
        origin.saw(2).await;
        origin.answer(40);
        while let Some(answer) = asked.join_next().await {
            assert!(is_ok(&answer.unwrap()));
        }
        workers.settle().await;
        assert_eq!(origin.most.load(Ordering::SeqCst), 2);
    });
}

/// Who waits for one host holds up nobody who wants another.
#[test]
fn a_host_at_its_bound_holds_up_no_other() {
    run(async {
        let (mut one, mut other) = (Origin::start(OK).await, Origin::start(OK).await);
        for fields in [
            "circuit_breakers: {per_host_thresholds: [{max_connections: 1}]}",
            "circuit_breakers: {thresholds: [{max_connections: 2}], per_host_thresholds: [{max_connections: 1}]}",
        ] {
            let seen = [&one, &other].map(|origin| *origin.seen.borrow());
            let workers = Workers::start_before(&[&one, &other], fields);
            let mut first = workers.ask(1, "/");
            let busy_is_one = tokio::select! {
                () = one.saw(seen[0] + 1) => true,
                () = other.saw(seen[1] + 1) => false,
            };
            let (busy, free) = if busy_is_one { (&one, &other) } else { (&other, &one) };
            // They go to both in turn.
            let mut asked = workers.ask(40, "/");
            free.answer(20);
            for _ in 0..20 {
                assert!(is_ok(&asked.join_next().await.unwrap().unwrap()));
            }
            busy.answer(21);
            while let Some(answer) = asked.join_next().await {
                assert!(is_ok(&answer.unwrap()));
            }
            assert!(is_ok(&first.join_next().await.unwrap().unwrap()));
            workers.settle().await;
            for origin in [&one, &other] {
                assert_eq!(origin.most.load(Ordering::SeqCst), 1);
            }
        }
    });
}

/// Nor does who waits under the bound of one priority those of the other.
#[test]
fn a_priority_at_its_bound_holds_up_no_other() {
    run(async {
        let mut origin = Origin::start(OK).await;
        let fields =
            "circuit_breakers: {thresholds: [{priority: HIGH, max_connections: 1}, {max_connections: 40}]}";
        let workers = Workers::start(&origin, fields);
        let mut urgent = workers.ask(12, "/urgent");
        origin.saw(1).await;
        while workers.stat("upstream_cx_overflow") < 3 {
            tokio::task::yield_now().await;
        }
        // One of the twelve and all of these.
        let mut asked = workers.ask(20, "/");
        origin.saw(21).await;
        origin.answer(32);
        while let Some(answer) = asked.join_next().await {
            assert!(is_ok(&answer.unwrap()));
        }
        while let Some(answer) = urgent.join_next().await {
            assert!(is_ok(&answer.unwrap()));
        }
        workers.settle().await;
    });
}

#[test]
fn who_waits_for_a_connection() {
    run(async {
        let mut origin = Origin::start(OK).await;
        let fields = "circuit_breakers: {thresholds: [{max_connections: 1, max_pending_requests: 3}]}";
        let workers = Workers::start(&origin, fields);
        let mut asked = workers.ask(1, "/");
        origin.saw(1).await;
        // Three find a place, on whichever worker, and all others none.
        let mut more = workers.ask(20, "/");
        let mut refused = Vec::new();
        while refused.len() < 17 {
            refused.push(more.join_next().await.unwrap().unwrap());
        }
        assert!(refused.iter().all(|answer| is_overloaded(answer)), "{refused:?}");
        assert_eq!(
            (workers.in_use(Resource::Pending), workers.stat("upstream_rq_pending_overflow")),
            (3, 17)
        );
        origin.answer(4);
        while let Some(answer) = asked.join_next().await {
            assert!(is_ok(&answer.unwrap()));
        }
        while let Some(answer) = more.join_next().await {
            assert!(is_ok(&answer.unwrap()));
        }
        workers.settle().await;
        assert_eq!(origin.most.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn retries() {
    run(async {
        const BAD: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
        let mut origin = Origin::start(BAD).await;
        let workers = Workers::start(&origin, "circuit_breakers: {thresholds: [{max_retries: 2}]}");
        let mut asked = workers.ask(8, "/retry");
        origin.saw(8).await;
        origin.answer(8);
        // Two are tried again, the others stand.
        for _ in 0..6 {
            let answer = asked.join_next().await.unwrap().unwrap();
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        }
        origin.saw(10).await;
        assert_eq!((workers.in_use(Resource::Retries), workers.stat("upstream_rq_retry_overflow")), (2, 6));
        origin.answer(10);
        asked.join_all().await;
        workers.settle().await;
    });
}

/// Clients that leave while they wait or are served, timeouts, and upstreams that close: all is given back.
#[test]
fn nothing_is_left_over() {
    run(async {
        let mut origin = Origin::start(OK).await;
        let fields = "circuit_breakers: {thresholds: [{max_connections: 2, max_pending_requests: 5, max_requests: 4}]}";
        let workers = Workers::start(&origin, fields);
        for round in 1..=5 {
            let mut asked = workers.ask(10, "/");
            origin.saw(round).await;
            asked.shutdown().await;
            // They end by the route's timeout.
            let slow = workers.ask(4, "/slow").join_all().await;
            assert!(slow.iter().all(|answer| !is_ok(answer)), "{slow:?}");
            workers.settle().await;
        }
        origin.answer(100);
        let answers = workers.ask(4, "/").join_all().await;
        assert!(answers.iter().all(|answer| is_ok(answer)), "{answers:?}");
        workers.settle().await;
        assert!(workers.in_use(Resource::Connections) <= 2);
        for name in ["rq_open", "rq_pending_open", "rq_retry_open"] {
            assert_eq!(workers.stat(&format!("circuit_breakers.default.{name}")), 0, "{name}");
        }
    });
}

/// A bound changes under traffic: streams under way finish, and count.
#[test]
fn thresholds_change_under_streams() {
    run(async {
        let mut origin = Origin::start(OK).await;
        let fields = |max: u32| format!("circuit_breakers: {{thresholds: [{{max_requests: {max}}}]}}");
        let workers = Workers::start(&origin, &fields(3));
        let replace = |max| {
            let port = origin.address.port();
            let fresh = compile_cluster(&workers.shared, port, &fields(max), workers.cell.get().as_ref());
            workers.cell.set(Some(fresh));
        };
        let mut asked = workers.ask(3, "/");
        origin.seen.wait_for(|seen| *seen >= 3).await.unwrap();
        replace(2);
        let refused = workers.ask(8, "/").join_all().await;
        assert!(refused.iter().all(|answer| is_overloaded(answer)), "three are under way: {refused:?}");
        replace(5);
        let mut more = workers.ask(2, "/");
        origin.seen.wait_for(|seen| *seen >= 5).await.unwrap();
        let refused = workers.ask(8, "/").join_all().await;
        assert!(refused.iter().all(|answer| is_overloaded(answer)), "{refused:?}");
        origin.answers.add_permits(5);
        for answer in [asked.join_next().await, more.join_next().await] {
            assert!(is_ok(&answer.unwrap().unwrap()), "no stream is dropped");
        }
        let rest = asked.join_all().await.into_iter().chain(more.join_all().await);
        assert!(rest.into_iter().all(|answer| is_ok(&answer)));
        workers.settle().await;
        assert_eq!(origin.most.load(Ordering::SeqCst), 5);
    });
}
