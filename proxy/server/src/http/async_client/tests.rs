use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};
use waystation_filter_api::client::{CallError, Clients, NamedCluster, Request, gather};
use waystation_filter_api::grpc::{self, Stream, frame, unary};
use waystation_upstream::cluster::Environment;

use crate::context::{CompileContext, Shared};
use crate::worker::Worker;

/// What the server of a test does with a call.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Service {
    /// Says each piece of the request again, and then that all is well.
    Echo,
    Silent,
}

/// A gRPC server; `reset` hears of streams that are reset.
async fn serve(listener: TcpListener, service: Service, reset: Rc<Notify>) {
    while let Ok((socket, _)) = listener.accept().await {
        let reset = Rc::clone(&reset);
        spawn_local(async move {
            let mut connection = h2::server::handshake(socket).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let reset = Rc::clone(&reset);
                spawn_local(async move {
                    let mut body = request.into_body();
                    if service == Service::Silent {
                        std::future::poll_fn(|task| respond.poll_reset(task)).await.unwrap();
                        return reset.notify_one();
                    }
                    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                    while let Some(data) = body.data().await {
                        let Ok(data) = data else { return reset.notify_one() };
                        send.send_data(data, false).unwrap();
                    }
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    send.send_trailers(trailers).unwrap();
                });
            }
        });
    }
}

fn http2_cluster(shared: &Arc<Shared>, address: SocketAddr) -> waystation_upstream::Cluster {
    let socket = core::SocketAddress {
        address: address.ip().to_string(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(address.port().into())),
        ..Default::default()
    };
    let address = core::Address { address: Some(core::address::Address::SocketAddress(socket)) };
    let host = endpoint::Endpoint { address: Some(address), ..Default::default() };
    let host = endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(host)),
        ..Default::default()
    };
    let locality = endpoint::LocalityLbEndpoints { lb_endpoints: vec![host], ..Default::default() };
    let assignment = endpoint::ClusterLoadAssignment {
        cluster_name: "side".into(),
        endpoints: vec![locality],
        ..Default::default()
    };
    #[expect(deprecated, reason = "the short way to say HTTP/2")]
    let proto = cluster::Cluster {
        name: "side".into(),
        load_assignment: Some(assignment),
        http2_protocol_options: Some(core::Http2ProtocolOptions::default()),
        ..Default::default()
    };
    let scope = shared.stats.root().scope("cluster").scope("side");
    let context = waystation_upstream::CompileContext {
        environment: &Environment::new(shared.runtime.clone()),
        stats: &shared.stats.root(),
        transport: &|socket| crate::upstream_socket::compile(socket, &scope, &CompileContext::new(shared)),
        route_policies: &|_| Ok(None),
        added_via_api: false,
        upstream_filters: &|_| Ok(None),
        previous: None,
        now: Instant::now(),
    };
    waystation_upstream::Cluster::compile(&proto, &context).unwrap()
}

/// A worker, the side cluster, and what its server says of resets.
struct Side {
    worker: Rc<Worker>,
    cluster: NamedCluster,
    reset: Rc<Notify>,
}

impl Side {
    async fn start(service: Service) -> Self {
        let shared = crate::context::tests::shared();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cell = shared.clusters.cell("side");
        cell.set(Some(Arc::new(http2_cluster(&shared, listener.local_addr().unwrap()))));
        let reset = Rc::new(Notify::new());
        spawn_local(serve(listener, service, Rc::clone(&reset)));
        let worker = Worker::new(0, shared, Some(1));
        Self { worker, cluster: NamedCluster::new("side", cell), reset }
    }

    fn call(&self, body: Option<Bytes>, timeout: Option<Duration>) -> Stream {
        let request = Request {
            cluster: &self.cluster,
            head: grpc::head("side", "/a.B/C", timeout),
            timeout,
            retries: None,
            hash: None,
            internal: true,
            forwarded_for: true,
        };
        let clients: Rc<dyn Clients> = Rc::<Worker>::clone(&self.worker);
        Stream::new(clients.call(request, body), 0)
    }

    fn active(&self) -> u64 {
        let local = self.worker.cluster_named("side").unwrap();
        local.get().unwrap().stats.upstream_rq_active().value()
    }
}

fn message(text: &str) -> Bytes {
    frame(|out| out.extend_from_slice(text.as_bytes()))
}

async fn run<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

#[tokio::test]
async fn a_unary_call_is_answered() {
    run(async {
        let side = Side::start(Service::Echo).await;
        let answer = unary(side.call(Some(message("hello")), None)).await;
        assert_eq!(answer.unwrap(), "hello");
        assert_eq!(side.active(), 0);
    })
    .await;
}

#[tokio::test]
async fn messages_go_both_ways_as_they_come() {
    run(async {
        let side = Side::start(Service::Echo).await;
        let mut stream = side.call(None, None);
        // The first is sent before there is a connection, the others when their answers' forerunners have come.
        for text in ["one", "two", "three"] {
            stream.send(message(text));
            assert_eq!(stream.message().await.unwrap().unwrap(), text);
        }
        assert_eq!(side.active(), 1);
        stream.finish();
        assert_eq!(stream.message().await, Ok(None));
        assert_eq!(side.active(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_call_that_is_dropped_is_reset() {
    run(async {
        let side = Side::start(Service::Silent).await;
        let mut stream = side.call(Some(message("hello")), None);
        let begun = Cell::new(false);
        tokio::select! {
            biased;
            answer = stream.message() => panic!("{answer:?}"),
            () = async {
                while side.active() == 0 {
                    tokio::task::yield_now().await;
                }
                begun.set(true);
            } => {}
        }
        assert!(begun.get());
        drop(stream);
        assert_eq!(side.active(), 0);
        side.reset.notified().await;
    })
    .await;
}

#[tokio::test]
async fn a_silent_service_runs_out_of_time() {
    run(async {
        let side = Side::start(Service::Silent).await;
        let stream = side.call(Some(message("hello")), Some(Duration::from_millis(20)));
        assert_eq!(unary(stream).await.unwrap_err().code, grpc::code::UNAVAILABLE);
        assert_eq!(side.active(), 0);
        side.reset.notified().await;
    })
    .await;
}

#[tokio::test]
async fn what_is_not_there_does_not_answer() {
    run(async {
        let side = Side::start(Service::Echo).await;
        let missing = NamedCluster::new("none", side.worker.shared.clusters.cell("none"));
        // A place that is none is no cluster either.
        for cluster in [missing, NamedCluster::new("none", ())] {
            let request = Request {
                cluster: &cluster,
                head: grpc::head("none", "/", None),
                timeout: None,
                retries: None,
                hash: None,
                internal: false,
                forwarded_for: false,
            };
            let clients: Rc<dyn Clients> = Rc::<Worker>::clone(&side.worker);
            let answered = gather(clients.call(request, Some(Bytes::new())), 1).await;
            assert_eq!(answered.unwrap_err(), CallError::NoCluster);
        }
    })
    .await;
}
