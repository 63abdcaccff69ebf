//! Codec AUTO without ALPN: the first bytes tell HTTP/2's preface from anything else.

use std::pin::Pin;

use bytes::BytesMut;
use tokio_util::io::poll_read_buf;

use super::ConnCx;
use super::timer::{Timer, after};
use crate::transport::Transport;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) enum Sniffed {
    Http1,
    Http2,
}

/// Reads until it is clear which codec it is. Nothing when the connection ends or stays silent before that.
pub(crate) async fn sniff(cx: &ConnCx, mut transport: Transport) -> Option<(Sniffed, Transport, BytesMut)> {
    let mut input = BytesMut::new();
    let mut timer = Timer::default();
    let until = after(cx.info.start, cx.hcm.timeouts.idle);
    let read = std::future::poll_fn(|task| {
        loop {
            if input.capacity() == 0 {
                input = cx.worker.take_buffer();
            }
            match poll_read_buf(Pin::new(&mut transport), task, &mut input) {
                std::task::Poll::Ready(Ok(count)) if count > 0 => {
                    let seen = input.len().min(PREFACE.len());
                    if input[..seen] != PREFACE[..seen] {
                        return std::task::Poll::Ready(Some(Sniffed::Http1));
                    }
                    if seen == PREFACE.len() {
                        return std::task::Poll::Ready(Some(Sniffed::Http2));
                    }
                }
                std::task::Poll::Ready(_) => return std::task::Poll::Ready(None),
                std::task::Poll::Pending => {
                    if input.is_empty() {
                        cx.worker.give_buffer(std::mem::take(&mut input));
                    }
                    return timer.poll(task, until).map(|()| {
                        cx.hcm.stats.hcm.downstream_cx_idle_timeout().inc();
                        None
                    });
                }
            }
        }
    });
    let sniffed = read.await?;
    Some((sniffed, transport, input))
}
