//! A client whose bytes may be the end of its session (`envoy.load_shed_points.tcp_proxy_on_data`).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::overload::Point;
use crate::transport::Transport;
use crate::worker::Worker;

/// The downstream of a session.
pub(super) struct Shedding<'a> {
    inner: &'a mut Transport,
    point: Option<&'a Point>,
    worker: &'a Worker,
    /// The bytes that ended the session, once some have.
    pub(super) shed: Option<u64>,
}

impl<'a> Shedding<'a> {
    pub(super) fn new(inner: &'a mut Transport, point: Option<&'a Point>, worker: &'a Worker) -> Self {
        Self { inner, point, worker, shed: None }
    }
}

impl AsyncRead for Shedding<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut *this.inner).poll_read(cx, buffer))?;
        let count = buffer.filled().len() - before;
        if count > 0 && this.point.is_some_and(|point| point.sheds(|| this.worker.random())) {
            buffer.set_filled(before);
            this.shed = Some(count as u64);
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Shedding<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.get_mut().inner).poll_write(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().inner).poll_shutdown(cx)
    }
}
