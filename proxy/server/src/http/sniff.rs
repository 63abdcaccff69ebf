//! Codec AUTO without ALPN: the first bytes tell HTTP/2's preface from anything else.

use std::pin::Pin;

use bytes::BytesMut;
use tokio_util::io::poll_read_buf;

use super::ConnCx;
use super::config::Codec;
use super::timer::{Timer, after};
use crate::transport::Transport;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) enum Sniffed {
    Http1,
    Http2,
}

/// Reads the first bytes of a connection whose codec is given. Nothing when it ends or stays silent before that.
pub(crate) async fn first(cx: &ConnCx, transport: Transport) -> Option<(Sniffed, Transport, BytesMut)> {
    let http1 = cx.hcm.codec == Codec::Http1;
    read(cx, transport, |_| Some(if http1 { Sniffed::Http1 } else { Sniffed::Http2 })).await
}

/// Reads until it is clear which codec it is. Nothing when the connection ends or stays silent before that.
pub(crate) async fn sniff(cx: &ConnCx, transport: Transport) -> Option<(Sniffed, Transport, BytesMut)> {
    let tell = |input: &[u8]| {
        let seen = input.len().min(PREFACE.len());
        match input[..seen] == PREFACE[..seen] {
            false => Some(Sniffed::Http1),
            true => (seen == PREFACE.len()).then_some(Sniffed::Http2),
        }
    };
    read(cx, transport, tell).await
}

/// Reads until `tell` knows enough.
async fn read(
    cx: &ConnCx,
    mut transport: Transport,
    tell: impl Fn(&[u8]) -> Option<Sniffed>,
) -> Option<(Sniffed, Transport, BytesMut)> {
    let mut input = BytesMut::new();
    let mut timer = Timer::default();
    let _wait = cx.wait_for_overload().await;
    let read = std::future::poll_fn(|task| {
        loop {
            if input.capacity() == 0 {
                input = cx.worker.take_buffer();
            }
            match poll_read_buf(Pin::new(&mut transport), task, &mut input) {
                std::task::Poll::Ready(Ok(count)) if count > 0 => {
                    if let Some(told) = tell(&input) {
                        return std::task::Poll::Ready(Some(told));
                    }
                }
                std::task::Poll::Ready(_) => return std::task::Poll::Ready(None),
                std::task::Poll::Pending => {
                    if input.is_empty() {
                        cx.worker.give_buffer(std::mem::take(&mut input));
                    }
                    let until = after(cx.info.start, cx.idle_timeout());
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
