//! The server's side of a connection: gRPC streams and REST on one port.

use std::convert::Infallible;
use std::future::Future;
use std::io::Cursor;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::{Request, Response, Status, Streaming};
use waystation_xds::{Protocol, RawCodec, ResourceType};

use crate::core::{Peer, StreamId};
use crate::server::Shared;

mod rest;

/// Connections of one listener; more wait in the system's queue.
const MAX_CONNECTIONS: usize = 4096;

/// For the TLS handshake and the first bytes.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a dead client stays in the status.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// Largest request: the names of a very large subscription.
const MAX_REQUEST: usize = 64 << 20;

/// Runs `connection` for each client, until the future is dropped.
pub(crate) async fn accept<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    connection: impl Fn(TcpStream, SocketAddr) -> F,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((socket, peer)) => {
                    connections.spawn(connection(socket, peer));
                }
                // Out of descriptors, mostly: they come back when connections end.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A connection to the xDS port.
pub(crate) async fn connection(shared: Arc<Shared>, socket: TcpStream, peer: SocketAddr) {
    // Responses are whole messages: nothing to wait for.
    let _ = socket.set_nodelay(true);
    let Some(tls) = shared.tls.clone() else {
        return greet(shared, socket, peer).await;
    };
    match timeout(GREETING_TIMEOUT, tls.accept(socket)).await {
        Ok(Ok(socket)) => greet(shared, socket, peer).await,
        Ok(Err(error)) => shared.say(&format!("{peer}: TLS handshake failed: {error}")),
        Err(_) => {}
    }
}

/// Finds out whether the client speaks HTTP/2 with prior knowledge, and serves it.
async fn greet<S: AsyncRead + AsyncWrite + Send + 'static>(shared: Arc<Shared>, socket: S, peer: SocketAddr) {
    let (mut reader, writer) = tokio::io::split(socket);
    // No method that this server knows begins like the preface.
    let mut start = [0; 3];
    let Ok(Ok(_)) = timeout(GREETING_TIMEOUT, reader.read_exact(&mut start)).await else {
        return;
    };
    let io = TokioIo::new(tokio::io::join(Cursor::new(start).chain(reader), writer));
    let service = TowerToHyperService::new(Service { shared, peer });
    // What ends a connection is the client's business.
    if start == *b"PRI" {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .serve_connection(io, service)
            .await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(io, service)
            .await;
    }
}

#[derive(Clone)]
struct Service {
    shared: Arc<Shared>,
    peer: SocketAddr,
}

impl tower_service::Service<http::Request<Incoming>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Incoming>) -> Self::Future {
        let Some((protocol, kind)) = stream_of(request.uri().path()) else {
            let shared = self.shared.clone();
            return Box::pin(async move { Ok(rest::respond(&shared, request).await) });
        };
        let peer = Peer { address: self.peer.to_string(), protocol, kind };
        let open = Open { shared: self.shared.clone(), peer };
        let request = request.map(|body| body.map_err(|error| Status::internal(error.to_string())));
        let mut grpc = tonic::server::Grpc::new(RawCodec)
            .max_decoding_message_size(MAX_REQUEST)
            .max_encoding_message_size(usize::MAX);
        Box::pin(async move { Ok(grpc.streaming(open, request).await) })
    }
}

/// What a gRPC method serves.
fn stream_of(path: &str) -> Option<(Protocol, Option<ResourceType>)> {
    for protocol in [Protocol::Sotw, Protocol::Delta] {
        if path == protocol.aggregated_method() {
            return Some((protocol, None));
        }
        if let Some(kind) = ResourceType::known().into_iter().find(|kind| kind.method(protocol) == Some(path))
        {
            return Some((protocol, Some(kind)));
        }
    }
    None
}

/// Opens a stream.
struct Open {
    shared: Arc<Shared>,
    peer: Peer,
}

impl tonic::server::StreamingService<Bytes> for Open {
    type Response = Bytes;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let (id, responses) = self.shared.open(self.peer.clone());
        let talk = Talk { id, shared: self.shared.clone(), requests: request.into_inner(), responses };
        let responses = stream::unfold(Some(talk), async |talk| {
            let mut talk = talk?;
            match talk.next().await? {
                Ok(message) => Some((Ok(message), Some(talk))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Box::pin(async move { Ok(Response::new(Box::pin(responses) as Self::ResponseStream)) })
    }
}

/// A stream; dropping it closes it.
struct Talk {
    id: StreamId,
    shared: Arc<Shared>,
    requests: Streaming<Bytes>,
    responses: mpsc::Receiver<Bytes>,
}

impl Talk {
    /// The next response; requests are read meanwhile.
    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            tokio::select! {
                response = self.responses.recv() => {
                    return Some(response.ok_or_else(|| Status::resource_exhausted("responses are not being read")));
                }
                request = self.requests.message() => match request {
                    Ok(Some(request)) => {
                        if let Err(error) = self.shared.request(self.id, request) {
                            return Some(Err(Status::invalid_argument(error.to_string())));
                        }
                    }
                    // The client has finished, or its connection has.
                    Ok(None) | Err(_) => return None,
                },
            }
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.shared.close(self.id);
    }
}
