//! A proxy on one thread, raw upstreams, raw clients.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterProto;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager as HcmProto;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::LocalSet;
use waystation::cli::options::{self, Command, Options};
use waystation::config_source::Backing;
use waystation::context::{CompileContext, Shared};
use waystation::drain::DrainHandle;
use waystation::http::{Hcm, serve_connection};
use waystation::transport::Transport;
use waystation::worker::Worker;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::Held;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::http::{HttpFilterFactory, NodeInfo};
use waystation_schema::{Message, TextOptions, yaml_to_wire};
use waystation_stats::Store;
use waystation_upstream::Cluster;
use waystation_upstream::cluster::Environment;

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a test on a runtime like a worker's.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bounded = async { tokio::time::timeout(PATIENCE, test).await.expect("the test hangs") };
    LocalSet::new().block_on(&runtime, bounded);
}

pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    seen: Rc<RefCell<Vec<u8>>>,
}

impl Upstream {
    async fn listen() -> (TcpListener, Self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, Self { address, seen: Rc::default() })
    }

    /// Answers each request head (and its declared body) with the same bytes.
    pub(crate) async fn answering(answer: &'static str) -> Self {
        Self::script(vec![answer]).await
    }

    /// Answers each request with the next of `answers`, the last one for ever.
    pub(crate) async fn script(answers: Vec<&'static str>) -> Self {
        let (listener, upstream) = Self::listen().await;
        let seen = Rc::clone(&upstream.seen);
        let next = Rc::new(Cell::new(0));
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (seen, next, answers) = (Rc::clone(&seen), Rc::clone(&next), answers.clone());
                tokio::task::spawn_local(async move {
                    while let Some((head, body)) = read_request(&mut stream).await {
                        seen.borrow_mut().extend_from_slice(head.as_bytes());
                        seen.borrow_mut().extend_from_slice(&body);
                        let answer = answers[next.get().min(answers.len() - 1)];
                        next.set(next.get() + 1);
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        upstream
    }

    /// Answers with the request's body.
    pub(crate) async fn echo() -> Self {
        let (listener, upstream) = Self::listen().await;
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(async move {
                    while let Some((_, body)) = read_request(&mut stream).await {
                        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                        stream.write_all(head.as_bytes()).await.unwrap();
                        stream.write_all(&body).await.unwrap();
                    }
                });
            }
        });
        upstream
    }

    /// A port where nobody listens.
    pub(crate) async fn refusing() -> Self {
        Self::listen().await.1
    }

    /// Accepts and reads, and never answers.
    pub(crate) async fn silent() -> Self {
        let (listener, upstream) = Self::listen().await;
        tokio::task::spawn_local(async move {
            let mut held = Vec::new();
            loop {
                held.push(listener.accept().await.unwrap());
            }
        });
        upstream
    }

    /// Closes each connection once a request has come.
    pub(crate) async fn closing() -> Self {
        let (listener, upstream) = Self::listen().await;
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(async move {
                    read_request(&mut stream).await;
                });
            }
        });
        upstream
    }

    /// Answers with these bytes, which may be less than they promise, and closes.
    pub(crate) async fn cutting(answer: &'static str) -> Self {
        let (listener, upstream) = Self::listen().await;
        let seen = Rc::clone(&upstream.seen);
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let seen = Rc::clone(&seen);
                tokio::task::spawn_local(async move {
                    let Some((head, _)) = read_request(&mut stream).await else { return };
                    seen.borrow_mut().extend_from_slice(head.as_bytes());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                });
            }
        });
        upstream
    }

    /// Switches protocols and echoes.
    pub(crate) async fn websocket() -> Self {
        let (listener, upstream) = Self::listen().await;
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(async move {
                    let Some((_, rest)) = read_request(&mut stream).await else { return };
                    let head = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
                    stream.write_all(head.as_bytes()).await.unwrap();
                    stream.write_all(&rest).await.unwrap();
                    let mut buffer = [0; 100];
                    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                        stream.write_all(&buffer[..count]).await.unwrap();
                    }
                });
            }
        });
        upstream
    }

    /// Accepts a CONNECT and echoes what comes through it.
    pub(crate) async fn tunnel() -> Self {
        let (listener, upstream) = Self::listen().await;
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(async move {
                    let Some((_, early)) = read_request(&mut stream).await else { return };
                    assert!(early.is_empty(), "nothing comes before the tunnel is accepted");
                    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                    let mut buffer = [0; 100];
                    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                        stream.write_all(&buffer[..count]).await.unwrap();
                    }
                });
            }
        });
        upstream
    }

    /// HTTP/2, answering with the request's body.
    pub(crate) async fn http2_echo() -> Self {
        let (listener, upstream) = Self::listen().await;
        tokio::task::spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        tokio::task::spawn_local(async move {
                            let mut body = request.into_body();
                            let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                            while let Some(Ok(data)) = body.data().await {
                                let _ = body.flow_control().release_capacity(data.len());
                                send.send_data(data, false).unwrap();
                            }
                            send.send_data(Bytes::new(), true).unwrap();
                        });
                    }
                });
            }
        });
        upstream
    }

    /// HTTP/2. The first connection says GOAWAY at its first request, which it answers once the second connection has
    /// had one. Tells when GOAWAY has been read.
    pub(crate) async fn http2_leaving() -> (Self, Rc<Notify>) {
        let (listener, upstream) = Self::listen().await;
        let (left, other) = (Rc::new(Notify::new()), Rc::new(Notify::new()));
        let told = Rc::clone(&left);
        tokio::task::spawn_local(async move {
            for first in [true, false] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (left, other) = (Rc::clone(&left), Rc::clone(&other));
                tokio::task::spawn_local(async move {
                    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
                    const GOAWAY: &[u8] = b"\0\0\x08\x07\0\0\0\0\0\x7f\xff\xff\xff\0\0\0\0";
                    const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0abcdefgh";
                    // `:status: 204`, and nothing more.
                    const ANSWER: &[u8] = b"\0\0\x01\x01\x05\0\0\0\x01\x89";
                    stream.write_all(SETTINGS).await.unwrap();
                    let mut preface = [0; 24];
                    stream.read_exact(&mut preface).await.unwrap();
                    let mut head = [0; 9];
                    while stream.read_exact(&mut head).await.is_ok() {
                        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
                        stream.read_exact(&mut payload).await.unwrap();
                        match (head[3], first) {
                            (1, true) => stream.write_all(&[GOAWAY, PING].concat()).await.unwrap(),
                            // The acknowledged PING came behind GOAWAY.
                            (6, true) => {
                                left.notify_one();
                                other.notified().await;
                                stream.write_all(ANSWER).await.unwrap();
                            }
                            (1, false) => {
                                stream.write_all(ANSWER).await.unwrap();
                                other.notify_one();
                            }
                            _ => {}
                        }
                    }
                });
            }
        });
        (upstream, told)
    }

    /// Everything that was received.
    pub(crate) fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.borrow()).into_owned()
    }
}

/// A request's head and its body as declared; chunked bodies are decoded.
async fn read_request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let mut body = bytes.split_off(end);
    let head = String::from_utf8(bytes).unwrap();
    if let Some(length) = head.split("content-length: ").nth(1) {
        let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
        while body.len() < length {
            if stream.read_buf(&mut body).await.ok()? == 0 {
                return None;
            }
        }
    } else if head.contains("transfer-encoding: chunked") {
        while !body.ends_with(b"0\r\n\r\n") {
            if stream.read_buf(&mut body).await.ok()? == 0 {
                return None;
            }
        }
        let mut decoded = Vec::new();
        let mut rest = &body[..];
        loop {
            let line = rest.windows(2).position(|window| window == b"\r\n").unwrap();
            let size = usize::from_str_radix(str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            if size == 0 {
                break;
            }
            decoded.extend_from_slice(&rest[line + 2..line + 2 + size]);
            rest = &rest[line + 2 + size + 2..];
        }
        body = decoded;
    }
    Some((head, body))
}

pub(crate) struct Proxy {
    address: SocketAddr,
    pub(crate) shared: Arc<Shared>,
    /// Of all connections.
    pub(crate) drain: DrainHandle,
    /// Clusters live in cells that only routes hold.
    clusters: Vec<Arc<waystation_filter_api::cell::Cell<waystation_upstream::Cluster>>>,
}

const ROUTES: &str = r#"
    virtual_hosts:
    - name: all
      domains: ["*"]
      routes:
      - match: {path: /missing, headers: [{name: never}]}
        route: {cluster: up}
      - match: {connect_matcher: {}}
        route: {cluster: up}
      - match: {path: /nocluster}
        route: {cluster: nobody}
      - match: {path: /named}
        route: {cluster_header: x-cluster}
      - match: {path: /notfetched}
        route: {cluster: nobody}
        typed_per_filter_config:
          fetch: {"@type": type.googleapis.com/envoy.extensions.filters.http.on_demand.v3.PerRouteConfig}
      - match: {path: /configured}
        route: {cluster: up}
        typed_per_filter_config:
          own: {"@type": type.googleapis.com/envoy.extensions.filters.http.on_demand.v3.PerRouteConfig}
      - match: {path: /teapot}
        direct_response: {status: 418, body: {inline_string: short}}
      - match: {path: /moved}
        redirect: {host_redirect: other}
      - match: {path: /retry}
        route: {cluster: up, retry_policy: {retry_on: "connect-failure,5xx", num_retries: 2, retry_back_off: {base_interval: 0.001s}}}
      - match: {path: /urgent}
        route: {cluster: up, priority: HIGH}
      - match: {path: /follow}
        route: {cluster: up, internal_redirect_policy: {}}
      - match: {path: /slow}
        route: {cluster: up, timeout: 0.05s}
      - match: {prefix: /, headers: [{name: ":path", string_match: {exact: /missing}, invert_match: true}]}
        route: {cluster: up}
"#;

/// A process with the cluster `up` at `port`, and a connection manager that routes to it.
pub(crate) fn prepare(
    port: u16,
    hcm: &str,
    filters: &str,
    cluster: &str,
    limit: usize,
) -> (Arc<Shared>, Hcm, Arc<waystation_filter_api::cell::Cell<Cluster>>) {
    let shared = Shared::new(Store::default(), NodeInfo::default(), Backing::default(), &options());
    let cell = shared.clusters.cell("up");
    cell.set(Some(compile_cluster(&shared, port, cluster, None)));
    let context = CompileContext::with_buffer_limit(&shared, limit);
    let manager = format!(
        "stat_prefix: in\n{hcm}\nroute_config:\n    validate_clusters: false\n    name: r{ROUTES}\nhttp_filters:{filters}\n- name: router\n  typed_config: \
         {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}\n"
    );
    let proto: HcmProto =
        parse("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", &manager);
    let scope = shared.stats.root().scope("listener").scope("test");
    let hcm = Hcm::compile(&proto, &scope, &context).unwrap_or_else(|error| panic!("{error}"));
    (shared, hcm, cell)
}

/// The cluster `up` at `port` with these fields, in the place of another.
pub(crate) fn compile_cluster(
    shared: &Arc<Shared>,
    port: u16,
    fields: &str,
    previous: Option<&Arc<Cluster>>,
) -> Arc<Cluster> {
    compile_cluster_of(shared, &[port], fields, previous)
}

/// [`compile_cluster`] with several hosts.
pub(crate) fn compile_cluster_of(
    shared: &Arc<Shared>,
    ports: &[u16],
    fields: &str,
    previous: Option<&Arc<Cluster>>,
) -> Arc<Cluster> {
    let endpoint = |port: &u16| {
        format!("{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}")
    };
    let endpoints = ports.iter().map(endpoint).collect::<Vec<_>>().join(", ");
    let yaml = format!(
        "name: up\ntype: STATIC\nconnect_timeout: 1s\nload_assignment: {{cluster_name: up, endpoints: [{{lb_endpoints: \
         [{endpoints}]}}]}}\n{fields}"
    );
    let proto: ClusterProto = parse("envoy.config.cluster.v3.Cluster", &yaml);
    let root = shared.stats.root();
    let scope = root.scope("cluster").scope("up");
    let context = CompileContext::new(shared);
    let transport = |socket: &_| waystation::upstream_socket::compile(socket, &scope, &context);
    let compiled = Cluster::compile(
        &proto,
        &waystation_upstream::CompileContext {
            environment: &Environment::new(shared.runtime.clone()),
            stats: &root,
            transport: &transport,
            route_policies: &|_| Ok(None),
            upstream_filters: &|_| Ok(None),
            added_via_api: false,
            previous,
            now: Instant::now(),
        },
    );
    let cluster = Arc::new(compiled.unwrap());
    cluster.admission.take_over();
    cluster
}

fn options() -> Options {
    match options::parse(["waystation".into(), "--config-yaml".into(), "{}".into()]) {
        Ok(Command::Run(options)) => *options,
        _ => panic!("the command line is valid"),
    }
}

fn parse<M: prost::Message + Default>(name: &str, yaml: &str) -> M {
    let message = Message::find(name).unwrap();
    let encoded =
        yaml_to_wire(message, yaml, TextOptions::default()).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    M::decode(&*encoded.wire).unwrap()
}

impl Proxy {
    pub(crate) async fn start(upstream: &Upstream, hcm: &str) -> Self {
        Self::configured(upstream, hcm, "", "").await
    }

    /// With an upstream that speaks HTTP/2.
    pub(crate) async fn start_http2(upstream: &Upstream, hcm: &str) -> Self {
        let cluster = r#"typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    explicit_http_config: {http2_protocol_options: {}}"#;
        Self::configured(upstream, hcm, "", cluster).await
    }

    /// With an upstream that speaks HTTP/2, one connection to it, and one stream at a time.
    pub(crate) async fn start_http2_narrow(upstream: &Upstream) -> Self {
        let cluster = r#"circuit_breakers: {thresholds: [{max_connections: 1}]}
typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    explicit_http_config: {http2_protocol_options: {max_concurrent_streams: 1}}"#;
        Self::configured(upstream, "", "", cluster).await
    }

    /// With these fields of the cluster.
    pub(crate) async fn start_cluster(upstream: &Upstream, cluster: &str) -> Self {
        Self::configured(upstream, "", "", cluster).await
    }

    /// With these filters before the router.
    pub(crate) async fn start_filters(upstream: &Upstream, filters: &str) -> Self {
        Self::configured(upstream, "", filters, "").await
    }

    /// With the header mutation filter.
    pub(crate) async fn start_filtered(upstream: &Upstream) -> Self {
        let filter = r#"
- name: mutate
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
    mutations:
      request_mutations: [{append: {header: {key: x-req, value: "1"}}}]
      response_mutations: [{append: {header: {key: x-resp, value: "2"}}}]"#;
        Self::configured(upstream, "", filter, "").await
    }

    /// With the filter that fetches unknown clusters, and so many bytes to buffer.
    pub(crate) async fn start_on_demand(upstream: &Upstream, limit: usize) -> Self {
        let filter = r#"
- name: fetch
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.on_demand.v3.OnDemand
    odcds: {source: {ads: {}, resource_api_version: V3}, timeout: 2s}"#;
        Self::assembled(upstream, "", filter, "", limit, Vec::new()).await
    }

    /// Has a cluster appear under another name.
    pub(crate) fn add_cluster(&self, name: &str) {
        self.shared.clusters.cell(name).set(self.clusters[0].get());
    }

    /// A client of its own.
    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// With a filter of the test's own, and so many bytes to buffer.
    pub(crate) async fn start_with(
        upstream: &Upstream,
        filter: Arc<dyn HttpFilterFactory>,
        limit: usize,
    ) -> Self {
        Self::assembled(upstream, "", "", "", limit, vec![filter]).await
    }

    /// With several filters of the caller's own.
    pub(crate) async fn start_with_all(
        upstream: &Upstream,
        filters: Vec<Arc<dyn HttpFilterFactory>>,
    ) -> Self {
        Self::assembled(upstream, "", "", "", 1 << 20, filters).await
    }

    async fn configured(upstream: &Upstream, hcm: &str, filters: &str, cluster: &str) -> Self {
        Self::assembled(upstream, hcm, filters, cluster, 1 << 20, Vec::new()).await
    }

    async fn assembled(
        upstream: &Upstream,
        hcm: &str,
        filters: &str,
        cluster: &str,
        limit: usize,
        own: Vec<Arc<dyn HttpFilterFactory>>,
    ) -> Self {
        let (shared, mut hcm, cell) = prepare(upstream.address.port(), hcm, filters, cluster, limit);
        for filter in own {
            hcm.push_filter("own", filter);
        }
        let hcm = Held::new(Arc::new(hcm));
        let worker = Worker::new(0, Arc::clone(&shared), Some(1));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let drain = DrainHandle::new();
        let draining = drain.clone();
        tokio::task::spawn_local(async move {
            loop {
                let (stream, peer) = listener.accept().await.unwrap();
                let info = ConnectionInfo::new(
                    worker.connection_id(),
                    Instant::now(),
                    Address::Ip(address),
                    Address::Ip(peer),
                );
                let served = serve_connection(
                    Rc::clone(&worker),
                    hcm.clone(),
                    Transport::tcp(stream),
                    Rc::new(info),
                    draining.clone(),
                );
                tokio::task::spawn_local(served);
            }
        });
        Self { address, shared, drain, clusters: vec![cell] }
    }

    /// Until the proxy has no connection any more.
    pub(crate) async fn until_closed(&self) {
        self.until("http.in.downstream_cx_active", 0).await;
    }

    /// Until a counter or gauge has this value.
    pub(crate) async fn until(&self, name: &str, expected: u64) {
        while self.shared.stats.find(name) != Some(expected) {
            tokio::task::yield_now().await;
        }
    }

    /// Sends `request` on a new connection and reads until the proxy closes it.
    pub(crate) async fn exchange(&self, request: &str) -> String {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let send = async {
            // A proxy that answers early may close before it has read everything.
            let _ = write.write_all(request.as_bytes()).await;
        };
        let mut answer = Vec::new();
        let (_, read) = tokio::join!(send, read.read_to_end(&mut answer));
        read.unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// Sends `request` and reads until `end` has come.
    pub(crate) async fn exchange_some(&self, request: &str, end: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(end.as_bytes()) {
            assert_ne!(
                stream.read_buf(&mut answer).await.unwrap(),
                0,
                "{}",
                String::from_utf8_lossy(&answer)
            );
        }
        String::from_utf8(answer).unwrap()
    }

    /// One request over HTTP/2 with prior knowledge.
    pub(crate) async fn http2(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::task::spawn_local(async move {
            let _ = connection.await;
        });
        let request =
            http::Request::builder().method(method).uri(format!("http://a{path}")).body(()).unwrap();
        let (response, mut send) = sender.send_request(request, body.is_empty()).unwrap();
        if !body.is_empty() {
            send.send_data(Bytes::copy_from_slice(body.as_bytes()), true).unwrap();
        }
        let response = response.await.unwrap();
        let status = response.status().as_u16();
        let mut received = Vec::new();
        let mut body = response.into_body();
        while let Some(data) = body.data().await {
            received.extend_from_slice(&data.unwrap());
        }
        (status, String::from_utf8(received).unwrap())
    }

    /// An extended CONNECT; what comes back of what was sent.
    pub(crate) async fn http2_websocket(&self, text: &str) -> (u16, String) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, mut connection) = h2::client::handshake(stream).await.unwrap();
        // The server's SETTINGS must be in before extended CONNECT may be used.
        std::future::poll_fn(|cx| {
            let _ = Future::poll(std::pin::Pin::new(&mut connection), cx);
            if sender.is_extended_connect_protocol_enabled() {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
        tokio::task::spawn_local(async move {
            let _ = connection.await;
        });
        let mut request = http::Request::builder().method("CONNECT").uri("http://a/chat").body(()).unwrap();
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        let (response, mut send) = sender.send_request(request, false).unwrap();
        let response = response.await.unwrap();
        let status = response.status().as_u16();
        send.send_data(Bytes::copy_from_slice(text.as_bytes()), false).unwrap();
        let mut body = response.into_body();
        let data = body.data().await.unwrap().unwrap();
        (status, String::from_utf8(data.to_vec()).unwrap())
    }

    /// Asserts a counter's or gauge's value.
    #[track_caller]
    pub(crate) fn stat(&self, name: &str, expected: u64) {
        assert_eq!(self.shared.stats.find(name), Some(expected), "{name}");
    }
}
