//! The driver against a real tonic server, over TCP.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::{Request, Response, Status, Streaming};

use super::harness::{CDS, EDS, LDS, Seen, Toy, brief, delta, options, sotw, spec, toy, wrapped};
use crate::driver::raw_codec::RawCodec;
use crate::{
    BoxedIo, Client, ConfigCodec, Connect, Event, GrpcService, GrpcSource, Interest, Options, Protocol,
    Source, SubscriptionSpec, Transport,
};

/// Connects to wherever the server is at the moment.
pub(super) struct Dial(pub(super) Arc<Mutex<SocketAddr>>);

impl Connect for Dial {
    fn connect(&self, _: &str, _: bool) -> Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>> {
        let address = *self.0.lock();
        Box::pin(async move { TcpStream::connect(address).await.map(|stream| Box::new(stream) as BoxedIo) })
    }
}

/// "Files" and REST bodies of these tests are encoded already.
pub(super) struct Plain;

impl ConfigCodec for Plain {
    fn decode_file(&self, _: &Path, content: &[u8]) -> Result<Bytes, String> {
        if content == b"broken" { Err("not a config".into()) } else { Ok(Bytes::copy_from_slice(content)) }
    }

    fn request_to_json(&self, request: &[u8]) -> Result<String, String> {
        Ok(request.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn response_from_json(&self, json: &[u8]) -> Result<Bytes, String> {
        Ok(Bytes::copy_from_slice(json))
    }
}

/// One stream, from the server's side.
struct ServerStream {
    path: String,
    headers: http::HeaderMap,
    requests: Streaming<Bytes>,
    responses: mpsc::Sender<Result<Bytes, Status>>,
    protocol: Protocol,
}

impl ServerStream {
    async fn request(&mut self) -> Seen {
        let message = self.requests.message().await.expect("no error").expect("no end");
        Seen::decode(self.protocol, &message)
    }

    async fn brief(&mut self) -> String {
        brief(&self.request().await)
    }

    async fn respond(&self, message: Bytes) {
        self.responses.send(Ok(message)).await.expect("the stream is up");
    }
}

#[derive(Clone)]
struct Service {
    streams: mpsc::Sender<ServerStream>,
    protocol: Protocol,
}

struct Accept {
    service: Service,
    path: String,
    headers: http::HeaderMap,
}

impl tonic::server::StreamingService<Bytes> for Accept {
    type Response = Bytes;
    type ResponseStream = BoxStream<'static, Result<Bytes, Status>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let (responses, receiver) = mpsc::channel(8);
        let stream = ServerStream {
            path: self.path.clone(),
            headers: self.headers.clone(),
            requests: request.into_inner(),
            responses,
            protocol: self.service.protocol,
        };
        let streams = self.service.streams.clone();
        Box::pin(async move {
            streams.send(stream).await.map_err(|_| Status::unavailable("no test"))?;
            let responses = futures_util::stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|message| (message, receiver))
            });
            Ok(Response::new(Box::pin(responses) as Self::ResponseStream))
        })
    }
}

impl tower_service::Service<http::Request<hyper::body::Incoming>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<hyper::body::Incoming>) -> Self::Future {
        let accept = Accept {
            service: self.clone(),
            path: request.uri().path().to_owned(),
            headers: request.headers().clone(),
        };
        let request = request.map(|body| body.map_err(|error| Status::internal(error.to_string())));
        let mut grpc = tonic::server::Grpc::new(RawCodec);
        Box::pin(async move { Ok(grpc.streaming(accept, request).await) })
    }
}

struct Server {
    streams: mpsc::Receiver<ServerStream>,
    address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

impl Server {
    async fn start(protocol: Protocol) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (sender, streams) = mpsc::channel(8);
        let service = Service { streams: sender, protocol };
        let task = tokio::spawn(async move {
            // Connections end with the server.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let service = hyper_util::service::TowerToHyperService::new(service.clone());
                let executor = hyper_util::rt::TokioExecutor::new();
                let io = hyper_util::rt::TokioIo::new(socket);
                connections.spawn(async move {
                    let _ = hyper::server::conn::http2::Builder::new(executor)
                        .serve_connection(io, service)
                        .await;
                });
            }
        });
        Self { streams, address, _task: AbortOnDropHandle::new(task) }
    }

    async fn stream(&mut self) -> ServerStream {
        self.streams.recv().await.expect("the server runs")
    }
}

pub(super) fn transport(address: SocketAddr) -> (Transport, Arc<Mutex<SocketAddr>>) {
    let address = Arc::new(Mutex::new(address));
    (Transport { connect: Arc::new(Dial(address.clone())), codec: Arc::new(Plain) }, address)
}

/// The next update; says what else happened before it.
pub(super) async fn next_update(client: &mut Client) -> crate::Update {
    loop {
        if let Event::Update(update) = client.next().await {
            return update;
        }
    }
}

/// Lets the client move on while something else happens; it must have nothing to say.
pub(super) async fn beside<T>(client: &mut Client, what: impl Future<Output = T>) -> T {
    tokio::select! { result = what => result, event = client.next() => panic!("{event:?}") }
}

pub(super) async fn patience<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("this takes milliseconds")
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// A consumer on the client's thread, as the proxy has it; runs until it is dropped.
async fn consume(client: &mut Client, until: impl Fn(&crate::Update) -> bool) -> crate::Update {
    loop {
        let update = next_update(client).await;
        client.applied(update.token, Vec::new());
        if until(&update) {
            return update;
        }
    }
}

#[test]
fn aggregated_state_of_the_world() {
    runtime().block_on(patience(async {
        let mut server = Server::start(Protocol::Sotw).await;
        let (transport, address) = transport(server.address);
        let mut service = GrpcService::new("xds|cluster");
        service.initial_metadata.push(("x-tenant".into(), "blue".into()));
        let source = Arc::new(GrpcSource::new(Protocol::Sotw, service));
        let mut client = Client::new(Options { ads: Some(source), ..options(Protocol::Sotw, 3) }, transport);
        client.subscribe(spec(CDS, Interest::Wildcard)).unwrap();

        let (mut stream, ()) = tokio::join!(server.stream(), async {
            assert!(matches!(client.next().await, Event::Connected { .. }));
        });
        assert_eq!(
            stream.path,
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
        );
        assert_eq!(stream.headers["x-tenant"], "blue");
        assert_eq!(stream.brief().await, "Cluster");
        stream.respond(sotw(&CDS, "1", "n1", &[toy("a", &[], "")])).await;
        let update = next_update(&mut client).await;
        assert_eq!(&*update.resources[0].name, "a");
        // The dependent subscription goes out before the acknowledgement.
        client.subscribe(spec(EDS, Interest::Names(vec!["a".into()]))).unwrap();
        client.applied(update.token, Vec::new());
        let requests = beside(&mut client, async { [stream.brief().await, stream.brief().await] }).await;
        assert_eq!(requests, ["ClusterLoadAssignment [a]", "Cluster v1 n=n1"]);

        // The server goes away and comes back at another address: nothing is lost, versions are kept.
        drop(stream);
        drop(server);
        let mut server = Server::start(Protocol::Sotw).await;
        *address.lock() = server.address;
        let (mut stream, ()) = tokio::join!(server.stream(), async {
            while !matches!(client.next().await, Event::Connected { .. }) {}
        });
        let (requests, _) = tokio::join!(
            async {
                let requests = [stream.brief().await, stream.brief().await];
                stream.respond(sotw(&EDS, "7", "n9", &[toy("a", &[], "endpoints")])).await;
                requests
            },
            consume(&mut client, |update| update.kind == EDS)
        );
        assert_eq!(requests, ["Cluster v1", "ClusterLoadAssignment [a]"]);
        assert_eq!(client.core().held(&EDS).count(), 1);
    }));
}

#[test]
fn delta_stream_of_its_own() {
    runtime().block_on(patience(async {
        let mut server = Server::start(Protocol::Delta).await;
        let (transport, _) = transport(server.address);
        let source = Arc::new(GrpcSource::new(Protocol::Delta, GrpcService::new("eds_cluster")));
        let mut client = Client::new(options(Protocol::Delta, 3), transport);
        let own = |name: &str| SubscriptionSpec {
            kind: EDS,
            source: Source::Grpc(Arc::new((*source).clone())),
            interest: Interest::Names(vec![name.into()]),
            init_fetch_timeout: None,
        };
        client.subscribe(own("a")).unwrap();
        client.subscribe(own("b")).unwrap();
        let (mut stream, ()) = tokio::join!(server.stream(), async {
            assert!(matches!(client.next().await, Event::Connected { .. }));
        });
        assert_eq!(stream.path, "/envoy.service.endpoint.v3.EndpointDiscoveryService/DeltaEndpoints");
        assert_eq!(stream.brief().await, "ClusterLoadAssignment +[a,b]");
        let resources =
            vec![wrapped(&EDS, &toy("a", &[], "1"), "1"), wrapped(&EDS, &toy("b", &[], "1"), "1")];
        stream.respond(delta(&EDS, "s1", "n1", resources, &[])).await;
        let first = next_update(&mut client).await;
        client.applied(first.token, Vec::new());
        let second = next_update(&mut client).await;
        let refusal = crate::Rejection { name: "b".into(), reason: "no such locality".into() };
        client.applied(second.token, vec![refusal]);
        let request = beside(&mut client, stream.request()).await;
        assert_eq!((request.nonce.as_str(), request.error.as_deref()), ("n1", Some("no such locality")));
        assert_eq!(client.core().held(&EDS).count(), 1);
    }));
}

#[test]
fn status_of_the_server_is_reported() {
    runtime().block_on(patience(async {
        let mut server = Server::start(Protocol::Sotw).await;
        let (transport, _) = transport(server.address);
        let mut client = Client::new(options(Protocol::Sotw, 3), transport);
        client.subscribe(spec(LDS, Interest::Wildcard)).unwrap();
        let ending = async {
            let stream = server.stream().await;
            let status = Status::permission_denied("not you");
            stream.responses.send(Err(status)).await.expect("the stream is up");
            stream
        };
        let (_stream, event) = tokio::join!(ending, async {
            assert!(matches!(client.next().await, Event::Connected { .. }));
            client.next().await
        });
        let Event::Disconnected { target, code, message, .. } = event else { panic!("{event:?}") };
        assert_eq!((&*target, code, message.as_str()), ("xds_cluster", 7, "not you"));
    }));
}

#[test]
fn dead_connection_is_found_by_pings() {
    runtime().block_on(patience(async {
        // Accepts, completes the HTTP/2 preface, and then says nothing any more.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (transport, _) = transport(listener.local_addr().unwrap());
        let silent = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            // An empty SETTINGS frame and the acknowledgement of the client's.
            tokio::io::AsyncWriteExt::write_all(&mut socket, b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0")
                .await
                .unwrap();
            std::future::pending::<()>().await;
        });
        let _silent = AbortOnDropHandle::new(silent);
        let mut service = GrpcService::new("xds_cluster");
        service.keepalive_interval = Some(Duration::from_millis(30));
        service.keepalive_timeout = Duration::from_millis(30);
        let source = Arc::new(GrpcSource::new(Protocol::Sotw, service));
        let mut client = Client::new(Options { ads: Some(source), ..options(Protocol::Sotw, 3) }, transport);
        client.subscribe(spec(CDS, Interest::Wildcard)).unwrap();
        assert!(matches!(client.next().await, Event::Connected { .. }));
        assert!(matches!(client.next().await, Event::Disconnected { .. }));
    }));
}

#[test]
fn ten_thousand_resources_in_one_message() {
    runtime().block_on(patience(async {
        let mut server = Server::start(Protocol::Sotw).await;
        let (transport, _) = transport(server.address);
        let mut client = Client::new(options(Protocol::Sotw, 3), transport);
        client.subscribe(spec(CDS, Interest::Wildcard)).unwrap();
        let content = "x".repeat(1000);
        let toys: Vec<Toy> = (0..10_000).map(|index| toy(&format!("c{index}"), &[], &content)).collect();
        let (mut stream, ()) = tokio::join!(server.stream(), async {
            assert!(matches!(client.next().await, Event::Connected { .. }));
        });
        assert_eq!(stream.brief().await, "Cluster");
        // 10 MB: more than gRPC's usual limit of 4.
        stream.respond(sotw(&CDS, "1", "n1", &toys)).await;
        let update = consume(&mut client, |_| true).await;
        assert_eq!(update.resources.len(), 10_000);
        assert_eq!(beside(&mut client, stream.brief()).await, "Cluster v1 n=n1");
    }));
}
