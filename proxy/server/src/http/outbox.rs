//! Bytes on their way to a transport: heads and small pieces gathered in one buffer, large ones passed as they are, all
//! of it written by as few system calls as possible.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::AsyncWrite as _;

use waystation_http::h1::DataFrame;

use crate::transport::Transport;

/// Pieces up to this are copied behind the head: copying a kilobyte costs less than another entry of `writev`.
const COPY_UP_TO: usize = 2048;

/// The most slices handed to one `writev`.
const SLICES: usize = 16;

/// Bytes that may wait before more is taken in, where the configuration does not want fewer.
const HIGH_WATER: usize = 256 * 1024;

/// What is waiting to be written.
#[derive(Debug)]
pub(crate) struct Outbox {
    high_water: usize,
    /// Comes first; `written` bytes of it are gone.
    first: BytesMut,
    written: usize,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// TLS holds written bytes back until it is flushed.
    unflushed: bool,
}

/// The length of the line that a head begins with.
#[inline]
pub(crate) fn first_line(head: &[u8]) -> usize {
    memchr::memchr(b'\n', head).map_or(0, |end| end + 1)
}

/// What Envoy's byte meter counts of a head that is sent: the lines of its fields.
#[inline]
pub(crate) fn header_lines(head: &[u8]) -> u64 {
    (head.len() - first_line(head)).saturating_sub(2) as u64
}

/// What it counts of one that was received, of `head` bytes with the first line: of a field's line one byte less.
#[inline]
pub(crate) fn fields_size(head: usize, line: usize, fields: usize) -> u64 {
    head.saturating_sub(line + 2 + fields) as u64
}

impl Outbox {
    /// With the connection's `per_connection_buffer_limit_bytes`.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            high_water: limit.min(HIGH_WATER),
            first: BytesMut::new(),
            written: 0,
            queue: VecDeque::new(),
            queued: 0,
            unflushed: false,
        }
    }

    /// Whether more may be taken in.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.waiting() < self.high_water
    }

    /// Where a head is encoded. Only before anything large was queued, or nothing at all is.
    #[inline]
    pub(crate) fn with_buffer<T>(&mut self, write: impl FnOnce(&mut BytesMut) -> T) -> T {
        if self.queue.is_empty() {
            return write(&mut self.first);
        }
        let mut piece = BytesMut::new();
        let result = write(&mut piece);
        self.queued += piece.len();
        self.queue.push_back(piece.freeze());
        result
    }

    /// Queues a piece of body.
    #[inline]
    pub(crate) fn push(&mut self, data: Bytes) {
        if self.queue.is_empty() && data.len() <= COPY_UP_TO {
            self.first.extend_from_slice(&data);
        } else if !data.is_empty() {
            self.queued += data.len();
            self.queue.push_back(data);
        }
    }

    /// Queues a piece of body with the framing around it.
    #[inline]
    pub(crate) fn push_framed(&mut self, frame: &DataFrame, data: Bytes) {
        if !frame.prefix().is_empty() {
            self.with_buffer(|buffer| buffer.extend_from_slice(frame.prefix()));
        }
        self.push(if frame.take() == data.len() { data } else { data.slice(..frame.take()) });
        if !frame.suffix().is_empty() {
            self.with_buffer(|buffer| buffer.extend_from_slice(frame.suffix()));
        }
    }

    /// Bytes waiting.
    #[inline]
    pub(crate) fn waiting(&self) -> usize {
        self.first.len() - self.written + self.queued
    }

    /// Whether nothing waits.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting() == 0 && !self.unflushed
    }

    /// Takes the buffer out for another connection to use; only when nothing waits.
    pub(crate) fn take_buffer(&mut self) -> BytesMut {
        debug_assert!(self.is_empty(), "what waits would be lost");
        self.written = 0;
        std::mem::take(&mut self.first)
    }

    /// Brings a buffer to write heads into.
    #[inline]
    pub(crate) fn give_buffer(&mut self, make: impl FnOnce() -> BytesMut) {
        if self.first.capacity() == 0 {
            self.first = make();
        }
    }

    /// Writes until everything is gone (`Ready`) or the transport takes no more. Counts what was written.
    #[inline]
    pub(crate) fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        transport: &mut Transport,
        sent: &mut u64,
    ) -> Poll<io::Result<()>> {
        while self.waiting() != 0 {
            let count = if self.queue.is_empty() {
                ready!(Pin::new(&mut *transport).poll_write(cx, &self.first[self.written..]))?
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let mut used = 0;
                if self.written < self.first.len() {
                    slices[0] = IoSlice::new(&self.first[self.written..]);
                    used = 1;
                }
                for (slot, data) in slices[used..].iter_mut().zip(&self.queue) {
                    *slot = IoSlice::new(data);
                    used += 1;
                }
                ready!(Pin::new(&mut *transport).poll_write_vectored(cx, &slices[..used]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *sent += count as u64;
            self.advance(count);
            self.unflushed = !transport.gathers();
        }
        if self.unflushed {
            ready!(Pin::new(transport).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut count: usize) {
        let head = count.min(self.first.len() - self.written);
        self.written += head;
        count -= head;
        if self.written == self.first.len() {
            self.first.clear();
            self.written = 0;
        }
        self.queued -= count;
        while count > 0 {
            // `count` is at most what was offered, so the queue holds that many bytes.
            let Some(front) = self.queue.front_mut() else { break };
            if front.len() > count {
                front.advance(count);
                break;
            }
            count -= front.len();
            self.queue.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Outbox;
    use crate::transport::{Socket, Transport};
    use bytes::Bytes;
    use tokio::io::AsyncReadExt as _;

    #[tokio::test]
    async fn order_survives_partial_writes() {
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let mut transport = Transport::Plain(Socket::unix(ours));
        let mut outbox = Outbox::new(usize::MAX);
        let big = Bytes::from(vec![b'x'; 3_000_000]);
        outbox.with_buffer(|buffer| buffer.extend_from_slice(b"head"));
        outbox.push(Bytes::from_static(b"small"));
        outbox.push(big.clone());
        outbox.with_buffer(|buffer| buffer.extend_from_slice(b"tail"));
        let total = outbox.waiting();
        let mut sent = 0;
        let write = async {
            std::future::poll_fn(|cx| outbox.poll_flush(cx, &mut transport, &mut sent)).await.unwrap();
            drop(transport);
        };
        let mut seen = Vec::new();
        let (_, read) = tokio::join!(write, theirs.read_to_end(&mut seen));
        read.unwrap();
        assert_eq!((seen.len(), sent), (total, total as u64));
        assert!(seen.starts_with(b"headsmallxxx") && seen.ends_with(b"xxxtail"));
        assert!(outbox.is_empty());
    }
}
