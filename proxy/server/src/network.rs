//! Network filters: the driver of those that are not terminal, and two small terminal ones, echo and direct response.

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

pub mod filters;

use crate::transport::Transport;

/// `envoy.filters.network.echo`: what comes in goes back, until the peer closes.
pub async fn echo(mut transport: Transport) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match transport.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                if transport.write_all(&buffer[..count]).await.is_err() || transport.flush().await.is_err() {
                    return;
                }
            }
        }
    }
    // The peer may be gone; there is nobody to tell.
    let _ = transport.shutdown().await;
}

/// `envoy.filters.network.direct_response`: one answer, then the connection is closed.
pub async fn direct_response(mut transport: Transport, body: &Bytes) {
    if transport.write_all(body).await.is_ok() {
        // The peer may be gone; there is nobody to tell.
        let _ = transport.shutdown().await;
    }
}
