//! HTTP/2 connections of checks.

use std::future::poll_fn;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use tokio_util::task::AbortOnDropHandle;
use waystation_http::{Headers, h2 as convert};
use waystation_upstream::health_check::Answer;

use super::http::{HttpProbe, Response};
use super::{Connection, NETWORK, Target};

/// A connection between two checks, and the task that drives it.
pub(in crate::health) struct Http2 {
    sender: SendRequest<Bytes>,
    _driver: AbortOnDropHandle<()>,
}

/// A check in flight. Dropped before its end it is reset.
pub(super) struct Exchange {
    send: SendStream<Bytes>,
    pub(super) response: ResponseFuture,
}

impl Http2 {
    /// The connection that is kept, if it takes another request, or a new one.
    async fn ready(kept: Connection, target: &Target<'_>) -> Option<Self> {
        if let Connection::Http2(mut kept) = kept
            && poll_fn(|cx| kept.sender.poll_ready(cx)).await.is_ok()
        {
            return Some(kept);
        }
        let (transport, _) = target.open().await.ok()?;
        let mut builder = h2::client::Builder::new();
        builder.enable_push(false).max_header_list_size(80 * 1024);
        let (sender, connection) = builder.handshake::<_, Bytes>(transport).await.ok()?;
        let driver = tokio::task::spawn_local(async move {
            // How it ends shows in the exchange under way; without one it says nothing about the host.
            let _ = connection.await;
        });
        let mut connection = Self { sender, _driver: AbortOnDropHandle::new(driver) };
        poll_fn(|cx| connection.sender.poll_ready(cx)).await.ok()?;
        Some(connection)
    }

    /// Sends a request over the connection kept, or a new one, which is kept in turn.
    pub(super) async fn send(
        kept: &mut Connection,
        target: &Target<'_>,
        head: &Headers,
        body: Bytes,
    ) -> Option<Exchange> {
        let mut connection = Self::ready(std::mem::take(kept), target).await?;
        let request = convert::write_request(head).ok()?;
        let (response, mut send) = connection.sender.send_request(request, body.is_empty()).ok()?;
        if !body.is_empty() {
            // Beyond the peer's window it waits in the library, which the size of the configured payload bounds.
            send.send_data(body, true).ok()?;
        }
        *kept = Connection::Http2(connection);
        Some(Exchange { send, response })
    }
}

impl Exchange {
    /// Ends a stream of which no more is wanted.
    pub(super) fn reset(mut self) {
        self.send.send_reset(Reason::INTERNAL_ERROR);
    }
}

/// The next piece of a body, whose place in the window is given back; nothing at its end.
pub(super) async fn data(body: &mut RecvStream) -> Option<Result<Bytes, h2::Error>> {
    let data = body.data().await?;
    if let Ok(bytes) = &data {
        // Fails only on a stream that is over, of which the next piece tells.
        let _ = body.flow_control().release_capacity(bytes.len());
    }
    Some(data)
}

impl HttpProbe {
    /// Asks over HTTP/2.
    pub(super) async fn check_http2(&self, kept: &mut Connection, target: &Target<'_>) -> Answer {
        let answer = self.exchange_http2(kept, target).await;
        if !target.check.settings.reuse_connection {
            kept.drop_now();
        }
        answer.unwrap_or(NETWORK)
    }

    async fn exchange_http2(&self, kept: &mut Connection, target: &Target<'_>) -> Option<Answer> {
        let mut head = Headers::new();
        self.write_head(target, &mut head);
        let exchange = Http2::send(kept, target, &head, self.body().clone()).await?;
        let (parts, mut body) = exchange.response.await.ok()?.into_parts();
        convert::read_response(&parts, &mut head);
        let mut response = Response::default();
        self.on_head(parts.status.as_u16(), &head, &mut response);
        while let Some(bytes) = data(&mut body).await {
            self.on_data(&bytes.ok()?, &mut response);
        }
        // Trailers say nothing here, but they may be an error.
        body.trailers().await.ok()?;
        Some(self.decide(response, target))
    }
}
