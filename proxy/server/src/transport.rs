//! Byte streams: one enum for everything a connection can run over.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::{Buf as _, Bytes};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::network::filters::Filtered;

/// A plain socket, possibly with bytes that a listener filter has read ahead.
#[derive(Debug)]
pub struct Socket {
    /// Bytes read before the transport was put together; they come first.
    prefix: Bytes,
    io: SocketIo,
}

#[derive(Debug)]
enum SocketIo {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A byte stream. TLS is boxed: its state is many times that of a plain socket and must not weigh on those.
#[derive(Debug)]
pub enum Transport {
    /// TCP or a Unix socket.
    Plain(Socket),
    /// TLS with us as the server.
    TlsServer(Box<tokio_rustls::server::TlsStream<Socket>>),
    /// TLS with us as the client.
    TlsClient(Box<tokio_rustls::client::TlsStream<Socket>>),
    /// Any of them with network filters in its way.
    Filtered(Box<Filtered>),
}

/// How an idle connection looks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Liveness {
    /// Nothing to read: as it should be.
    Idle,
    /// At its end, broken, or with bytes that nobody asked for.
    Dead,
}

impl Socket {
    /// A TCP socket; small writes are not held back (`TCP_NODELAY`), as in Envoy.
    pub fn tcp(stream: TcpStream) -> Self {
        // Fails only on a socket that is already dead; the next read says so.
        let _ = stream.set_nodelay(true);
        Self { prefix: Bytes::new(), io: SocketIo::Tcp(stream) }
    }

    /// A Unix socket.
    pub fn unix(stream: UnixStream) -> Self {
        Self { prefix: Bytes::new(), io: SocketIo::Unix(stream) }
    }

    /// The same socket with `prefix` to be read first.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = prefix;
        self
    }

    /// The TCP socket, if it is one.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.io {
            SocketIo::Tcp(stream) => Some(stream),
            SocketIo::Unix(_) => None,
        }
    }

    /// The TCP socket without a runtime, and the bytes to be read first: for another thread. Nothing for a Unix socket.
    pub fn into_std(self) -> Option<io::Result<(std::net::TcpStream, Bytes)>> {
        match self.io {
            SocketIo::Tcp(stream) => Some(stream.into_std().map(|stream| (stream, self.prefix))),
            SocketIo::Unix(_) => None,
        }
    }

    /// Waits until the peer is gone, reading nothing. What has sent something may have closed one direction only and still
    /// wait for an answer: of that only a reset tells.
    pub async fn gone(&self) {
        let mut byte = [MaybeUninit::uninit()];
        let sent = !self.prefix.is_empty()
            || match &self.io {
                SocketIo::Tcp(stream) => {
                    stream.async_io(Interest::READABLE, || SockRef::from(stream).peek(&mut byte)).await
                }
                SocketIo::Unix(stream) => {
                    stream.async_io(Interest::READABLE, || SockRef::from(stream).peek(&mut byte)).await
                }
            }
            .is_ok_and(|count| count > 0);
        if sent {
            self.reset().await;
        }
    }

    /// Lets the kernel reset the connection when it is closed, dropping what is not yet sent.
    pub fn reset_on_close(&self) {
        if let Some(stream) = self.as_tcp() {
            // Fails only on a socket that is already dead.
            let _ = SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO));
        }
    }

    /// Waits until the connection is broken, reading nothing.
    pub async fn reset(&self) {
        // Either outcome says so.
        let _ = match &self.io {
            SocketIo::Tcp(stream) => stream.ready(Interest::ERROR).await,
            SocketIo::Unix(stream) => stream.ready(Interest::ERROR).await,
        };
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.io {
            SocketIo::Tcp(stream) => stream.try_read(buffer),
            SocketIo::Unix(stream) => stream.try_read(buffer),
        }
    }
}

impl Transport {
    /// A plain TCP connection.
    pub fn tcp(stream: TcpStream) -> Self {
        Self::Plain(Socket::tcp(stream))
    }

    /// The socket below any TLS.
    pub fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::TlsServer(stream) => stream.get_ref().0,
            Self::TlsClient(stream) => stream.get_ref().0,
            Self::Filtered(filtered) => filtered.inner().socket(),
        }
    }

    /// Whether a connection that should be silent still is. Costs a system call only when the poller saw something.
    pub fn liveness(&mut self) -> Liveness {
        let mut byte = [0];
        let silent = match self {
            Self::Plain(socket) => {
                socket.prefix.is_empty()
                    && matches!(socket.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
            }
            // Session tickets and alerts come at any time: only the TLS layer knows whether there is data.
            tls => {
                let mut buffer = ReadBuf::new(&mut byte);
                Pin::new(tls).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer).is_pending()
            }
        };
        if silent { Liveness::Idle } else { Liveness::Dead }
    }

    /// How many bytes have come in that a network filter holds back.
    pub fn held_back(&self) -> usize {
        match self {
            Self::Filtered(filtered) => filtered.held_back(),
            Self::Plain(_) | Self::TlsServer(_) | Self::TlsClient(_) => 0,
        }
    }

    /// As [`Socket::reset_on_close`].
    pub fn reset_on_close(&self) {
        self.socket().reset_on_close();
    }

    /// Whether one `writev` takes several buffers.
    #[inline]
    pub fn gathers(&self) -> bool {
        match self {
            Self::Plain(_) => true,
            Self::TlsServer(_) | Self::TlsClient(_) => false,
            Self::Filtered(filtered) => filtered.writes_directly() && filtered.inner().gathers(),
        }
    }
}

impl AsyncRead for Socket {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.prefix.is_empty() {
            let count = this.prefix.len().min(buffer.remaining());
            buffer.put_slice(&this.prefix[..count]);
            this.prefix.advance(count);
            return Poll::Ready(Ok(()));
        }
        match &mut this.io {
            SocketIo::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            SocketIo::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            SocketIo::Tcp(stream) => Pin::new(stream).poll_write(cx, data),
            SocketIo::Unix(stream) => Pin::new(stream).poll_write(cx, data),
        }
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            SocketIo::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            SocketIo::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            SocketIo::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            SocketIo::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Transport {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::TlsServer(stream) => Pin::new(&mut **stream).poll_read(cx, buffer),
            Self::TlsClient(stream) => Pin::new(&mut **stream).poll_read(cx, buffer),
            Self::Filtered(filtered) => filtered.poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Transport {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, data),
            Self::TlsServer(stream) => Pin::new(&mut **stream).poll_write(cx, data),
            Self::TlsClient(stream) => Pin::new(&mut **stream).poll_write(cx, data),
            Self::Filtered(filtered) => filtered.poll_write(cx, data),
        }
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Self::TlsServer(stream) => Pin::new(&mut **stream).poll_write_vectored(cx, slices),
            Self::TlsClient(stream) => Pin::new(&mut **stream).poll_write_vectored(cx, slices),
            Self::Filtered(filtered) => filtered.poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::TlsServer(stream) => Pin::new(&mut **stream).poll_flush(cx),
            Self::TlsClient(stream) => Pin::new(&mut **stream).poll_flush(cx),
            Self::Filtered(filtered) => filtered.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::TlsServer(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            Self::TlsClient(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            Self::Filtered(filtered) => filtered.poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Liveness, Socket, Transport};
    use bytes::Bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn a_peer_is_gone_when_it_closes_without_a_word_or_resets() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pair = async || {
            let theirs = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            (Transport::tcp(listener.accept().await.unwrap().0), theirs)
        };
        let (mut ours, mut theirs) = pair().await;
        theirs.write_all(b"x").await.unwrap();
        theirs.shutdown().await.unwrap();
        let socket = ours.socket();
        tokio::select! {
            biased;
            () = socket.gone() => panic!("it waits for an answer"),
            ready = socket.as_tcp().unwrap().readable() => ready.unwrap(),
        }
        let mut all = Vec::new();
        ours.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"x");

        let (ours, theirs) = pair().await;
        drop(theirs);
        ours.socket().gone().await;

        let (ours, mut theirs) = pair().await;
        theirs.write_all(b"x").await.unwrap();
        ours.socket().as_tcp().unwrap().readable().await.unwrap();
        Transport::tcp(theirs).reset_on_close();
        ours.socket().gone().await;
    }

    #[tokio::test]
    async fn prefix_comes_first_and_liveness_sees_data() {
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let mut transport = Transport::Plain(Socket::unix(ours).with_prefix(Bytes::from_static(b"GET ")));
        theirs.write_all(b"/ ").await.unwrap();
        let mut text = [0; 6];
        transport.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"GET / ");
        assert_eq!(transport.liveness(), Liveness::Idle);
        drop(theirs);
        let mut rest = Vec::new();
        transport.read_to_end(&mut rest).await.unwrap();
        assert_eq!(transport.liveness(), Liveness::Dead);
    }
}
