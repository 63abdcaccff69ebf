//! Listeners in process: the manager's orders, carried out by a worker on this thread, and raw clients. Time is what a test
//! tells the manager.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterProto;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerProto;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use waystation::cli::options::{self, Command, Mode};
use waystation::config_source::Backing;
use waystation::context::Shared;
use waystation::listener::accept;
use waystation::manager::listeners::{Graceful, Listeners, Order};
use waystation::manager::needs::Needs;
use waystation::manager::offered::Offered;
use waystation::worker::Worker;
use waystation::xds_transport;
use waystation_filter_api::cell::Cell;
use waystation_filter_api::http::NodeInfo;
use waystation_schema::{ConfigError, Message, TextOptions, yaml_to_wire};
use waystation_stats::Store;
use waystation_upstream::Cluster;
use waystation_upstream::cluster::Environment;
use waystation_xds::Client;

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longer than `--drain-time-s`.
const DRAINED: Duration = Duration::from_secs(601);

const DIRECT: &str = "{name: d, typed_config: {'@type': type.googleapis.com/\
    envoy.extensions.filters.network.direct_response.v3.Config, response: {inline_string: ";

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bounded = async { tokio::time::timeout(PATIENCE, test).await.expect("the test hangs") };
    LocalSet::new().block_on(&runtime, bounded);
}

fn parse<M: prost::Message + Default>(name: &str, yaml: &str) -> M {
    M::decode(&*encode(name, yaml)).unwrap()
}

fn encode(name: &str, yaml: &str) -> Vec<u8> {
    let message = Message::find(name).unwrap();
    let encoded = yaml_to_wire(message, yaml, TextOptions::default());
    encoded.unwrap_or_else(|error| panic!("{error}: {yaml}")).wire
}

/// A network filter that proxies to the upstream `up`.
fn proxy(prefix: &str) -> String {
    format!(
        "{{name: p, typed_config: {{'@type': type.googleapis.com/\
         envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: {prefix}, cluster: up}}}}"
    )
}

/// A network filter that says `text`.
fn says(text: &str) -> String {
    format!("{DIRECT}{text}}}}}}}")
}

/// The manager on one side, workers on the other.
struct House {
    shared: Arc<Shared>,
    listeners: Listeners,
    needs: Needs,
    client: Client,
    orders: Vec<mpsc::Sender<Order>>,
    now: Instant,
    _cluster: Arc<Cell<Cluster>>,
}

impl House {
    async fn new() -> Self {
        Self::with_workers(1).await
    }

    async fn with_workers(workers: u32) -> Self {
        let args = ["waystation".into(), "--config-yaml".into(), "{}".into()];
        let options = match options::parse(args) {
            Ok(Command::Run(options)) => options,
            _ => panic!("the command line is valid"),
        };
        let shared = Shared::new(Store::default(), NodeInfo::default(), Backing::default(), &options);
        let (handovers, handed): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(64)).unzip();
        let handovers: Arc<[_]> = handovers.into();
        let start = |(index, handed)| {
            let (orders, to_obey) = mpsc::channel(64);
            let worker = Worker::new(index, Arc::clone(&shared), Some(1));
            let at_work = accept::Listeners::new(worker, Arc::clone(&handovers));
            tokio::task::spawn_local(at_work.run(to_obey, handed));
            orders
        };
        let orders = (0..).zip(handed).map(start).collect();
        let client = Client::new(
            waystation_xds::Options { node: Default::default(), ads: None, seed: 1, unix_ms: 0 },
            xds_transport::transport(&shared),
        );
        Self {
            _cluster: cluster(&shared, echo().await),
            listeners: Listeners::new(&shared, workers, Mode::Serve),
            shared,
            needs: Needs::default(),
            client,
            orders,
            now: Instant::now(),
        }
    }

    fn add(&mut self, yaml: &str) -> Result<(), ConfigError> {
        let wire = encode("envoy.config.listener.v3.Listener", yaml);
        let proto = ListenerProto::decode(&*wire).unwrap();
        let version = Arc::from("1");
        let offered = Offered { proto: &proto, wire: wire.into(), version: &version, dynamic: true };
        self.listeners.add(offered, &mut self.needs, &mut self.client)
    }

    async fn send(&mut self, orders: Vec<Order>) {
        for order in orders {
            for worker in &self.orders {
                worker.send(order.clone()).await.unwrap();
            }
        }
    }

    /// Lets the worker do what the manager orders now.
    async fn settle(&mut self) {
        let orders = self.listeners.activate(self.now, &self.needs);
        self.send(orders).await;
        let orders = self.listeners.expire(self.now, &mut self.needs, &mut self.client);
        self.send(orders).await;
        while self.orders.iter().any(|worker| worker.capacity() < worker.max_capacity()) {
            tokio::task::yield_now().await;
        }
    }

    /// Adds a listener that is valid, and has it serve.
    async fn serve(&mut self, yaml: &str) -> SocketAddr {
        self.add(yaml).unwrap();
        self.settle().await;
        let name = yaml.split(&[':', ','][..]).nth(1).unwrap().trim();
        let running = self.listeners.active().find(|running| *running.listener.name == *name).unwrap();
        running.addresses[0].ip().unwrap()
    }

    fn remove(&mut self, name: &str) -> Vec<Order> {
        self.listeners.remove(name, self.now, &mut self.needs, &mut self.client)
    }

    fn stat(&self, name: &str) -> u64 {
        self.shared.stats.find(name).unwrap_or_default()
    }
}

fn cluster(shared: &Arc<Shared>, upstream: SocketAddr) -> Arc<Cell<Cluster>> {
    let yaml = format!(
        "{{name: up, type: STATIC, connect_timeout: 1s, load_assignment: {{cluster_name: up, endpoints: [{{lb_endpoints: \
         [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]}}]}}}}",
        upstream.port()
    );
    let proto: ClusterProto = parse("envoy.config.cluster.v3.Cluster", &yaml);
    let environment = Environment::new(shared.runtime.clone());
    let root = shared.stats.root();
    let scope = root.scope("cluster").scope("up");
    let context = waystation::context::CompileContext::new(shared);
    let transport = |socket: &_| waystation::upstream_socket::compile(socket, &scope, &context);
    let compiled = Cluster::compile(
        &proto,
        &waystation_upstream::CompileContext {
            environment: &environment,
            stats: &root,
            transport: &transport,
            route_policies: &|_| Ok(None),
            upstream_filters: &|_| Ok(None),
            added_via_api: false,
            previous: None,
            now: Instant::now(),
        },
    );
    let cell = shared.clusters.cell("up");
    cell.set(Some(Arc::new(compiled.unwrap())));
    cell
}

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::task::spawn_local(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

/// Whether bytes still come back.
async fn is_echoed(stream: &mut TcpStream) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"ping").await.is_ok() && stream.read_exact(&mut back).await.is_ok() && back == *b"ping"
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 16]).await, Ok(0) | Err(_))
}

async fn what_is_said(address: SocketAddr) -> String {
    let mut text = String::new();
    TcpStream::connect(address).await.unwrap().read_to_string(&mut text).await.unwrap();
    text
}

/// The worker closes its sockets a moment after the order; it always does.
async fn until_refused(address: SocketAddr) {
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

const ANY_PORT: &str = "socket_address: {address: 127.0.0.1, port_value: 0}";

#[test]
fn the_end_of_a_chains_drain_closes_its_sessions_and_no_others() {
    run(async {
        let mut house = House::new().await;
        // Chain `a` is for clients at 127.0.0.1, chain `b` for the others.
        let listener = |a: &str| {
            let (pa, pb) = (proxy("a"), proxy("b"));
            format!(
                "{{name: l, address: {{{ANY_PORT}}}, filter_chains: [\
                 {{name: a, {a}, filters: [{pa}]}}, {{name: b, filters: [{pb}]}}]}}"
            )
        };
        let of_one =
            "filter_chain_match: {source_prefix_ranges: [{address_prefix: 127.0.0.1, prefix_len: 32}]}";
        let of_two =
            "filter_chain_match: {source_prefix_ranges: [{address_prefix: 127.0.0.0, prefix_len: 31}]}";
        let address = house.serve(&listener(of_one)).await;
        let mut first = TcpStream::connect(address).await.unwrap();
        assert!(is_echoed(&mut first).await);
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut other = socket.connect(address).await.unwrap();
        assert!(is_echoed(&mut other).await);

        // What it matches is part of a chain.
        house.add(&listener(of_two)).unwrap();
        house.settle().await;
        assert_eq!(house.stat("listener_manager.listener_in_place_updated"), 1);
        assert_eq!(house.stat("listener_manager.total_filter_chains_draining"), 1);
        assert!(is_echoed(&mut first).await, "it goes on while it drains");
        assert_eq!(house.listeners.active().next().unwrap().listener.load.total(), 2);

        house.now += DRAINED;
        house.settle().await;
        assert_eq!(house.stat("listener_manager.total_filter_chains_draining"), 0);
        assert!(is_closed(&mut first).await);
        assert!(is_echoed(&mut other).await, "its chain has stayed");
        assert_eq!(house.listeners.active().next().unwrap().listener.load.total(), 1);
        let mut again = TcpStream::connect(address).await.unwrap();
        assert!(is_echoed(&mut again).await);

        // The same for all of it.
        let orders = house.remove("l");
        house.send(orders).await;
        assert!(is_echoed(&mut other).await && is_echoed(&mut again).await);
        house.now += DRAINED;
        house.settle().await;
        assert!(is_closed(&mut other).await && is_closed(&mut again).await);
    });
}

#[test]
fn a_redirected_connection_belongs_to_the_listener_that_serves_it() {
    run(async {
        let mut house = House::new().await;
        let pp = "{name: pp, typed_config: {'@type': type.googleapis.com/\
                  envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol}}";
        let acceptor = format!(
            "{{name: acceptor, address: {{{ANY_PORT}}}, stat_prefix: acceptor, use_original_dst: true, listener_filters: [{pp}], \
             filter_chains: [{{filters: [{}]}}]}}",
            proxy("a")
        );
        let server = format!(
            "{{name: server, address: {{socket_address: {{address: 127.0.0.1, port_value: 9}}}}, stat_prefix: server, \
             bind_to_port: false, filter_chains: [{{filters: [{}]}}]}}",
            proxy("s")
        );
        house.serve(&server).await;
        let address = house.serve(&acceptor).await;
        let mut streams = Vec::new();
        for port in [9, 10] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let header = format!("PROXY TCP4 192.0.2.1 127.0.0.1 1 {port}\r\n");
            stream.write_all(header.as_bytes()).await.unwrap();
            assert!(is_echoed(&mut stream).await);
            streams.push(stream);
        }
        let [mut redirected, mut own] = <[TcpStream; 2]>::try_from(streams).unwrap();
        // Each counts where it is served.
        assert_eq!(house.stat("listener.server.downstream_cx_active"), 1);
        assert_eq!(house.stat("listener.acceptor.downstream_cx_active"), 1);
        assert_eq!(house.stat("listener.acceptor.downstream_cx_total"), 1);

        let orders = house.remove("acceptor");
        house.send(orders).await;
        house.now += DRAINED;
        house.settle().await;
        assert!(is_closed(&mut own).await);
        assert!(is_echoed(&mut redirected).await, "its listener has stayed");

        let orders = house.remove("server");
        house.send(orders).await;
        assert!(is_echoed(&mut redirected).await);
        house.now += DRAINED;
        house.settle().await;
        assert!(is_closed(&mut redirected).await);
    });
}

#[test]
fn a_redirected_connection_is_balanced_where_it_belongs() {
    run(async {
        let mut house = House::with_workers(2).await;
        let pp = "{name: pp, typed_config: {'@type': type.googleapis.com/\
                  envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol}}";
        let server = format!(
            "{{name: server, address: {{socket_address: {{address: 127.0.0.1, port_value: 9}}}}, stat_prefix: server, \
             bind_to_port: false, connection_balance_config: {{exact_balance: {{}}}}, filter_chains: [{{filters: [{}]}}]}}",
            proxy("s")
        );
        house.serve(&server).await;
        let acceptor = format!(
            "{{name: acceptor, address: {{{ANY_PORT}}}, enable_reuse_port: false, stat_prefix: acceptor, use_original_dst: true, \
             listener_filters: [{pp}], filter_chains: [{{filters: [{}]}}]}}",
            proxy("a")
        );
        house.add(&acceptor).unwrap();
        // Only the first worker accepts.
        for order in house.listeners.activate(house.now, &house.needs) {
            house.orders[0].send(order).await.unwrap();
        }
        let address = house.listeners.active().next().unwrap().addresses[0].ip().unwrap();
        let mut streams = Vec::new();
        for _ in 0..4 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"PROXY TCP4 192.0.2.1 127.0.0.1 1 9\r\nearly").await.unwrap();
            let mut back = [0; 5];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(&back, b"early", "what was read with the header is not lost");
            streams.push(stream);
        }
        for worker in ["worker_0", "worker_1"] {
            assert_eq!(house.stat(&format!("listener.server.{worker}.downstream_cx_active")), 2, "{worker}");
        }
        assert_eq!(house.stat("listener.acceptor.downstream_cx_total"), 0);
        let load = || house.listeners.active().map(|running| running.listener.load.total());
        assert_eq!(load().collect::<Vec<_>>(), [0, 4]);
        drop(streams);
        while load().sum::<u64>() > 0 {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_listener_that_cannot_listen_leaves_its_predecessor_and_the_others_alone() {
    run(async {
        let mut house = House::new().await;
        let listener = |name: &str, ports: &[u16], text: &str| {
            let address = |port: &u16| {
                format!("address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}")
            };
            let (first, more) = ports.split_first().unwrap();
            let more: Vec<_> = more.iter().map(|port| format!("{{{}}}", address(port))).collect();
            format!(
                "{{name: {name}, enable_reuse_port: false, {}, additional_addresses: [{}], filter_chains: [{{filters: [{}]}}]}}",
                address(first),
                more.join(", "),
                says(text)
            )
        };
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (main, taken) = (free(), free());
        house.serve(&listener("l", &[main.port()], "old")).await;
        // The addresses are there when they are bound, and not any more when somebody is to accept.
        house.add(&listener("l", &[main.port(), taken.port()], "new")).unwrap();
        let thief = tokio::net::TcpSocket::new_v4().unwrap();
        thief.set_reuseaddr(true).unwrap();
        thief.bind(taken).unwrap();
        let thief = thief.listen(1).unwrap();
        house.add(&listener("other", &[free().port()], "other")).unwrap();
        house.settle().await;
        assert_eq!(house.stat("listener_manager.listener_create_failure"), 1);
        assert_eq!(house.stat("listener_manager.total_listeners_active"), 2);
        assert_eq!(house.stat("listener_manager.total_listeners_warming"), 0);
        assert_eq!(house.stat("listener_manager.total_listeners_draining"), 0);
        assert_eq!(what_is_said(main).await, "old");
        let dump = house.listeners.dump();
        let entry = dump.entries.iter().find(|entry| entry.name == "l").unwrap();
        let error = &entry.error.as_ref().unwrap().details;
        assert_eq!(*error, format!("cannot listen on '{taken}': Address already in use"));
        // With the address given back it is only to be sent again.
        drop(thief);
        house.add(&listener("l", &[main.port(), taken.port()], "new")).unwrap();
        house.settle().await;
        for address in [main, taken] {
            assert_eq!(what_is_said(address).await, "new");
        }
        assert_eq!(house.stat("listener_manager.total_listeners_active"), 2);
    });
}

#[test]
fn a_graceful_drain_accepts_until_its_time_is_over() {
    run(async {
        let mut house = House::new().await;
        let listener = |name: &str, direction: &str| {
            format!(
                "{{name: {name}, address: {{{ANY_PORT}}}, traffic_direction: {direction}, filter_chains: [{{filters: [{}]}}]}}",
                says(name)
            )
        };
        let inbound = house.serve(&listener("in", "INBOUND")).await;
        let outbound = house.serve(&listener("out", "OUTBOUND")).await;

        let orders = house.listeners.drain_connections(house.now, true, Graceful::ThenStop);
        house.send(orders).await;
        house.settle().await;
        assert_eq!(what_is_said(inbound).await, "in");
        // It is not begun anew.
        house.now += Duration::from_secs(300);
        assert!(house.listeners.drain_connections(house.now, true, Graceful::ThenStop).is_empty());
        assert_eq!(house.stat("listener_manager.listener_stopped"), 0);
        assert!(
            house
                .listeners
                .next_expiry()
                .is_some_and(|at| at <= house.now + DRAINED - Duration::from_secs(300))
        );
        house.now += Duration::from_secs(301);
        house.settle().await;
        until_refused(inbound).await;
        assert_eq!(what_is_said(outbound).await, "out");
        assert_eq!(house.stat("listener_manager.listener_stopped"), 1);
        // Envoy goes on listing and counting it.
        assert_eq!(house.stat("listener_manager.total_listeners_active"), 2);
        assert_eq!(house.listeners.active().count(), 2);

        let orders = house.listeners.drain_connections(house.now, false, Graceful::SkipExit);
        house.send(orders).await;
        house.now += DRAINED;
        house.settle().await;
        assert_eq!(what_is_said(outbound).await, "out");
        let orders = house.listeners.stop(false, false);
        house.send(orders).await;
        until_refused(outbound).await;
        assert_eq!(house.stat("listener_manager.listener_stopped"), 2);
        // The end of the process does not wait for what drains already, nor for what an update replaced.
        assert!(house.listeners.stop(false, false).is_empty());
        let hastened = |orders: Vec<Order>| {
            let at_once =
                |order: &Order| matches!(order, Order::Drain { stop: true, over: Duration::ZERO, .. });
            assert!(orders.iter().all(at_once), "{orders:?}");
            orders.len()
        };
        assert_eq!(hastened(house.listeners.stop(false, true)), 2);
        house.remove("out");
        assert_eq!(hastened(house.listeners.stop(false, true)), 2, "one of them on its way out");
    });
}

#[test]
fn an_address_goes_from_a_removed_listener_to_a_new_one() {
    run(async {
        let mut house = House::new().await;
        let listener = |name: &str, port: u16| {
            format!(
                "{{name: {name}, enable_reuse_port: false, address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}, \
                 filter_chains: [{{filters: [{}]}}]}}",
                says(name)
            )
        };
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = house.serve(&listener("old", port)).await;
        assert_eq!(what_is_said(address).await, "old");
        // The worker has not been told of the removal.
        let orders = house.remove("old");
        house.add(&listener("new", port)).unwrap();
        house.send(orders).await;
        house.settle().await;
        assert_eq!(what_is_said(address).await, "new");
        // It has long been told.
        let orders = house.remove("new");
        house.send(orders).await;
        until_refused(address).await;
        house.serve(&listener("newest", port)).await;
        assert_eq!(what_is_said(address).await, "newest");
    });
}

#[test]
fn a_pipe_among_the_additional_addresses_reports_its_own_path() {
    run(async {
        let mut house = House::new().await;
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let listener = format!(
            "{{name: l, address: {{{ANY_PORT}}}, additional_addresses: [{{address: {{pipe: {{path: '{}'}}}}}}], filter_chains: [\
             {{filters: [{{name: h, typed_config: {{'@type': type.googleapis.com/\
             envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: h, \
             route_config: {{virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200}}}}]}}], \
             response_headers_to_add: [{{header: {{key: x, value: '%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS%'}}}}]}}, \
             http_filters: [{{name: r, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]}}]}}",
            pipe.display(),
        );
        house.serve(&listener).await;
        let mut stream = UnixStream::connect(&pipe).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let path = pipe.display();
        assert!(answer.contains(&format!("\r\nx: {path} {path}\r\n")), "{answer}");
        let listed = house.listeners.active().next().unwrap().addresses[1].to_string();
        assert_eq!(listed, path.to_string());
    });
}

#[test]
fn chains_by_a_matcher_have_names_of_their_own() {
    run(async {
        let mut house = House::new().await;
        let listener = |chains: &str| {
            format!(
                "{{name: l, address: {{{ANY_PORT}}}, filter_chain_matcher: {{on_no_match: {{action: {{name: x, typed_config: \
                 {{'@type': type.googleapis.com/google.protobuf.StringValue, value: b}}}}}}}}, filter_chains: [{chains}]}}"
            )
        };
        let chain =
            |name: &str, says_what: &str| format!("{{name: '{name}', filters: [{}]}}", says(says_what));
        let refused = |house: &mut House, second: &str| {
            let error = house.add(&listener(&format!("{}, {}", chain("b", "one"), chain(second, "two"))));
            error.unwrap_err().to_string()
        };
        let required = "filter_chains[1]: \"name\" field is required when using a listener matcher";
        assert_eq!(refused(&mut house, ""), required);
        let duplicated = "filter_chains[b]: \"name\" field is duplicated with value 'b'";
        assert_eq!(refused(&mut house, "b"), duplicated);
        let chains = format!("{}, {}", chain("a", "one"), chain("b", "two"));
        let address = house.serve(&listener(&chains)).await;
        assert_eq!(what_is_said(address).await, "two");
    });
}

#[test]
fn an_address_belongs_to_one_listener() {
    run(async {
        let mut house = House::new().await;
        let dir = tempfile::tempdir().unwrap();
        let pipe = format!("{{pipe: {{path: '{}'}}}}", dir.path().join("pipe").display());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = |port: u16| format!("{{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}");
        let listener = |name: &str, main: &str, additional: &str, more: &str| {
            format!(
                "{{name: {name}, address: {main}, additional_addresses: [{additional}], {more} filter_chains: [{{filters: [{}]}}]}}",
                says(name)
            )
        };
        let refused = |house: &mut House, yaml: &str| house.add(yaml).unwrap_err().to_string();
        let first = listener("first", &at(port), &format!("{{address: {pipe}}}"), "");
        house.add(&first).unwrap();
        // While the first is warming, and when it serves.
        for _ in 0..2 {
            let error = refused(&mut house, &listener("m", &at(port), "", ""));
            assert_eq!(
                error,
                format!(
                    "error adding listener: 'm' has duplicate address '127.0.0.1:{port}' as existing listener, to check if the \
                     listener has duplicated addresses with other listeners or 'enable_reuse_port' is set to 'false' for the \
                     listener"
                )
            );
            let error = refused(&mut house, &listener("m", &at(0), &format!("{{address: {pipe}}}"), ""));
            assert!(
                error.contains(&format!("'127.0.0.1:0,{}'", dir.path().join("pipe").display())),
                "{error}"
            );
            house.settle().await;
        }
        // Its own are no duplicates.
        house
            .add(&listener("first", &at(port), &format!("{{address: {pipe}}}"), "tcp_backlog_size: 9,"))
            .unwrap();
        house.settle().await;
        // Each gets a port, unless it does not bind.
        let one = house.serve(&listener("one", &at(0), "", "")).await;
        let two = house.serve(&listener("two", &at(0), "", "")).await;
        assert_ne!(one, two);
        house.serve(&listener("unbound", &at(0), "", "bind_to_port: false,")).await;
        assert!(refused(&mut house, &listener("m", &at(0), "", "")).contains("duplicate"));
        let gone = house.remove("unbound");
        house.send(gone).await;
        // Nor do two new ones share what a removed one leaves.
        let mut orders = house.remove("one");
        orders.extend(house.remove("first"));
        let three = house.serve(&listener("three", &at(0), "", "")).await;
        let four = house.serve(&listener("four", &at(0), "", "")).await;
        assert_ne!(three, four);
        // A listener that drains has given its address up.
        house.add(&listener("m", &at(port), "", "")).unwrap();
        house.send(orders).await;
    });
}

#[test]
fn validating_opens_no_sockets() {
    run(async {
        let mut house = House::new().await;
        house.listeners = Listeners::new(&house.shared, 1, Mode::Validate);
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let _serving = std::os::unix::net::UnixListener::bind(&pipe).unwrap();
        let listener = format!(
            "{{name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}, additional_addresses: [\
             {{address: {{pipe: {{path: '{}'}}}}}}], filter_chains: [{{filters: [{}]}}]}}",
            taken.local_addr().unwrap().port(),
            pipe.display(),
            says("l"),
        );
        house.add(&listener).unwrap();
        UnixStream::connect(&pipe).await.expect("its file is still there");
    });
}

#[test]
fn an_address_is_open_only_while_somebody_accepts() {
    run(async {
        let mut house = House::new().await;
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (main, other, last) = (free(), free(), free());
        let listener = |more: &[SocketAddr], text: &str, mode: u32| {
            let more: Vec<_> = more
                .iter()
                .map(|address| {
                    format!(
                        "{{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}",
                        address.port()
                    )
                })
                .collect();
            format!(
                "{{name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}, additional_addresses: [{}], \
                 filter_chains: [{{filters: [{}]}}], stat_prefix: s{mode}}}",
                main.port(),
                more.join(", "),
                says(text)
            )
        };
        let piped = |text: &str, mode: u32| {
            format!(
                "{{name: p, address: {{pipe: {{path: '{}', mode: {mode}}}}}, filter_chains: [{{filters: [{}]}}]}}",
                pipe.display(),
                says(text)
            )
        };
        // It is bound, but warming.
        house.add(&listener(&[other], "old", 0)).unwrap();
        house.add(&piped("old", 0o600)).unwrap();
        assert!(TcpStream::connect(main).await.is_err());
        assert!(UnixStream::connect(&pipe).await.is_err());
        house.settle().await;
        // While the update warms, every connection belongs to the predecessor.
        house.add(&listener(&[last], "new", 1)).unwrap();
        house.add(&piped("new", 0o666)).unwrap();
        assert!(TcpStream::connect(last).await.is_err());
        let mut text = String::new();
        for _ in 0..16 {
            assert_eq!(what_is_said(main).await, "old");
            UnixStream::connect(&pipe).await.unwrap().read_to_string(&mut text).await.unwrap();
        }
        assert_eq!(text, "old".repeat(16));
        house.settle().await;
        until_refused(other).await;
        for address in [main, last] {
            assert_eq!(what_is_said(address).await, "new");
        }
        text.clear();
        UnixStream::connect(&pipe).await.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "new");
    });
}

#[test]
fn what_has_maps_is_the_same_each_time() {
    run(async {
        let mut house = House::new().await;
        let keys =
            |from: u8| (from..from + 8).map(|key| format!("k{key}: {{}}")).collect::<Vec<_>>().join(", ");
        let metadata =
            format!("metadata: {{filter_metadata: {{n: {{a: 1, b: 2, c: 3, d: 4}}, {}}}}}", keys(0));
        let listener = |text: &str| {
            format!(
                "{{name: l, address: {{{ANY_PORT}}}, {metadata}, filter_chains: [\
                 {{name: a, {metadata}, filter_chain_match: {{destination_port: 1}}, filters: [{}]}}, \
                 {{name: b, filters: [{}]}}], default_filter_chain: {{{metadata}, filters: [{}]}}}}",
                says("a"),
                says(text),
                says("d")
            )
        };
        house.serve(&listener("one")).await;
        for _ in 0..20 {
            house.add(&listener("one")).unwrap();
        }
        assert_eq!(house.stat("listener_manager.listener_modified"), 0);
        for (updates, text) in (1..).zip(["two", "three", "four", "five"]) {
            house.serve(&listener(text)).await;
            assert_eq!(house.stat("listener_manager.listener_in_place_updated"), updates);
            assert_eq!(
                house.stat("listener_manager.total_filter_chains_draining"),
                updates,
                "only `b`, each time"
            );
        }
    });
}
