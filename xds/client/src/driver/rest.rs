use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;

use super::{Report, Transport};
use crate::{RestSource, StreamId};

/// Largest response body.
const MAX_BODY: usize = 256 << 20;

/// One poll.
pub(super) async fn run(
    stream: StreamId,
    rest: Arc<RestSource>,
    endpoint: &'static str,
    request: Bytes,
    transport: Transport,
    reports: mpsc::Sender<Report>,
) {
    let polling = poll(&rest, endpoint, &request, &transport);
    let result = match tokio::time::timeout(rest.request_timeout, polling).await {
        Ok(result) => result,
        Err(_) => Err("request timeout".to_owned()),
    };
    // The client is gone only when this task is being aborted, too.
    let _ = reports.send(Report::Fetched(stream, result)).await;
}

async fn poll(
    rest: &RestSource,
    endpoint: &str,
    request: &[u8],
    transport: &Transport,
) -> Result<Bytes, String> {
    let json = transport.codec.request_to_json(request)?;
    let io = transport.connect.connect(&rest.target, false).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(|error| error.to_string())?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(endpoint)
        .header(header::HOST, &*rest.target)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .body(Full::new(Bytes::from(json)))
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        if response.status() != StatusCode::OK {
            return Err(format!("unexpected status {}", response.status().as_u16()));
        }
        let body = Limited::new(response.into_body(), MAX_BODY);
        body.collect().await.map(|body| body.to_bytes()).map_err(|error| error.to_string())
    };
    // The connection must be polled for the exchange to go on; its own end or error shows in the exchange.
    tokio::pin!(exchange, connection);
    let mut closed = false;
    let body = loop {
        tokio::select! {
            result = &mut exchange => break result?,
            _ = &mut connection, if !closed => closed = true,
        }
    };
    transport.codec.response_from_json(&body)
}
