use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::sync::{mpsc, watch};
use tonic::metadata::{AsciiMetadataKey, BinaryMetadataKey, BinaryMetadataValue, MetadataMap};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::raw_codec::RawCodec;
use super::{BoxedIo, Connect, Report};
use crate::{GrpcService, StreamId};

/// Flow-control windows: a full configuration in few round trips, and still a bound on what an idle consumer
/// lets pile up.
const STREAM_WINDOW: u32 = 4 << 20;

/// Bounds the connection attempt where the service has no timeout of its own.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs one stream from the connection attempt to its end.
pub(super) async fn run(
    stream: StreamId,
    service: Arc<GrpcService>,
    method: &'static str,
    connect: Arc<dyn Connect>,
    reports: mpsc::Sender<Report>,
    requests: mpsc::Receiver<Bytes>,
    may_read: watch::Receiver<bool>,
) {
    let status = match talk(stream, &service, method, connect, &reports, requests, may_read).await {
        Ok(()) => Status::ok(""),
        Err(status) => status,
    };
    // The client is gone only when this task is being aborted, too.
    let _ = reports.send(Report::Closed(stream, status.code().into(), status.message().to_owned())).await;
}

async fn talk(
    stream: StreamId,
    service: &GrpcService,
    method: &'static str,
    connect: Arc<dyn Connect>,
    reports: &mpsc::Sender<Report>,
    requests: mpsc::Receiver<Bytes>,
    mut may_read: watch::Receiver<bool>,
) -> Result<(), Status> {
    let GrpcChannel { mut grpc, metadata } = GrpcChannel::open(service, connect).await?;
    // Many servers send their headers together with the first response, so the stream counts as open now: the
    // first request must not wait for them.
    let _ = reports.send(Report::Opened(stream)).await;
    let outgoing = futures_util::stream::unfold(
        (requests, reports.clone()),
        move |(mut requests, reports)| async move {
            let message = requests.recv().await?;
            let _ = reports.send(Report::Sent(stream)).await;
            Some((message, (requests, reports)))
        },
    );
    let mut request = Request::new(outgoing);
    *request.metadata_mut() = metadata;
    let response = grpc.streaming(request, PathAndQuery::from_static(method), RawCodec).await?;
    let mut incoming = response.into_inner();
    loop {
        // The client side is gone only when this task is being aborted, too.
        let _ = may_read.wait_for(|may_read| *may_read).await;
        match incoming.message().await? {
            Some(message) => {
                let _ = reports.send(Report::Message(stream, message)).await;
            }
            None => return Ok(()),
        }
    }
}

/// A connection to a service that takes a stream of requests and has nothing to say to them.
#[derive(Debug)]
pub struct GrpcChannel {
    grpc: tonic::client::Grpc<Channel>,
    metadata: MetadataMap,
}

impl GrpcChannel {
    /// Connects. The error says why that failed.
    pub async fn connect(service: &GrpcService, connect: Arc<dyn Connect>) -> Result<Self, String> {
        Self::open(service, connect).await.map_err(|status| status.message().to_owned())
    }

    /// Sends the requests of one stream to `method`, as the service takes them, until they or the stream end; why it ended.
    pub async fn send(mut self, method: &'static str, requests: mpsc::Receiver<Bytes>) -> String {
        let outgoing = futures_util::stream::unfold(requests, async move |mut requests| {
            let message = requests.recv().await?;
            Some((message, requests))
        });
        let mut request = Request::new(outgoing);
        *request.metadata_mut() = self.metadata;
        let method = PathAndQuery::from_static(method);
        let status = match self.grpc.client_streaming(request, method, RawCodec).await {
            Ok(_) => Status::ok(""),
            Err(status) => status,
        };
        format!("{}: {}", i32::from(status.code()), status.message())
    }

    async fn open(service: &GrpcService, connect: Arc<dyn Connect>) -> Result<Self, Status> {
        let mut metadata = MetadataMap::new();
        for (name, value) in &service.initial_metadata {
            add_metadata(&mut metadata, name, value)?;
        }
        let limit = service.timeout.unwrap_or(CONNECT_TIMEOUT);
        let endpoint = endpoint(service)?;
        let connecting =
            endpoint.connect_with_connector(Connector { connect, target: service.target.clone() });
        let channel: Channel = tokio::time::timeout(limit, connecting)
            .await
            .map_err(|_| Status::unavailable("connection timeout"))?
            .map_err(|error| Status::unavailable(with_causes(&error)))?;
        let mut grpc = tonic::client::Grpc::new(channel)
            .max_decoding_message_size(service.max_message_bytes)
            .max_encoding_message_size(usize::MAX);
        grpc.ready().await.map_err(|error| Status::unavailable(with_causes(&error)))?;
        Ok(Self { grpc, metadata })
    }
}

fn endpoint(service: &GrpcService) -> Result<Endpoint, Status> {
    let authority = service.authority.as_ref().unwrap_or(&service.target);
    // A cluster's name may have characters that no authority has.
    let uri = Uri::builder().scheme("http").authority(&**authority).path_and_query("/").build();
    let uri = match (uri, &service.authority) {
        (Ok(uri), _) => uri,
        (Err(error), Some(_)) => {
            return Err(Status::invalid_argument(format!("authority {authority}: {error}")));
        }
        (Err(_), None) => Uri::from_static("http://xds"),
    };
    let mut endpoint = Endpoint::from(uri)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(STREAM_WINDOW)
        .keep_alive_timeout(service.keepalive_timeout);
    if let Some(interval) = service.keepalive_interval {
        endpoint = endpoint.http2_keep_alive_interval(interval).keep_alive_while_idle(true);
    }
    Ok(endpoint)
}

fn add_metadata(metadata: &mut MetadataMap, name: &str, value: &str) -> Result<(), Status> {
    let invalid = || Status::invalid_argument(format!("initial metadata {name} is not valid"));
    if name.ends_with("-bin") {
        let key = BinaryMetadataKey::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
        metadata.append_bin(key, BinaryMetadataValue::from_bytes(value.as_bytes()));
    } else {
        let key = AsciiMetadataKey::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
        metadata.append(key, value.parse().map_err(|_| invalid())?);
    }
    Ok(())
}

/// The error and what is behind it: "transport error" alone helps nobody.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// [`Connect`] in the shape that tonic wants.
struct Connector {
    connect: Arc<dyn Connect>,
    target: Arc<str>,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<BoxedIo>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<BoxedIo>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connecting = self.connect.connect(&self.target, true);
        Box::pin(async move { connecting.await.map(TokioIo::new) })
    }
}
