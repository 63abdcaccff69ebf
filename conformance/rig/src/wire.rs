//! Bytes on a socket, seen without anybody's opinion: the rig must be able to send what no library would.

pub(crate) mod http1;
pub(crate) mod http2;

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// Any byte stream: TCP, or TLS over it.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A stream with what was read from it but not yet consumed.
pub(crate) struct Conn {
    io: Box<dyn Io>,
    /// A second handle of the TCP socket, so that a reset can be sent from under a TLS layer.
    socket: Option<socket2::Socket>,
    pub(crate) buf: Vec<u8>,
    pub(crate) eof: bool,
    /// What TLS said when the stream broke.
    pub(crate) alert: Option<String>,
}

impl Conn {
    pub(crate) fn new(io: Box<dyn Io>, socket: Option<socket2::Socket>) -> Self {
        Self { io, socket, buf: Vec::new(), eof: false, alert: None }
    }

    /// Wraps a plain TCP stream.
    pub(crate) fn tcp(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true);
        let socket = duplicate(&stream);
        Self::new(Box::new(stream), socket)
    }

    /// Reads once; false at the end of the stream. A reset counts as an end: which of the two arrives when a
    /// peer closes with unread bytes is the kernel's choice, not the proxy's.
    pub(crate) async fn fill(&mut self) -> bool {
        if self.eof {
            return false;
        }
        let mut chunk = [0_u8; 16 * 1024];
        match self.io.read(&mut chunk).await {
            Ok(0) => {
                self.eof = true;
                false
            }
            Err(e) => {
                self.alert = Some(e.to_string()).filter(|text| text.contains("alert"));
                self.eof = true;
                false
            }
            Ok(n) => {
                self.buf.extend_from_slice(&chunk[..n]);
                true
            }
        }
    }

    /// Waits until `n` bytes are buffered; false when the stream ends first.
    pub(crate) async fn need(&mut self, n: usize) -> bool {
        while self.buf.len() < n {
            if !self.fill().await {
                return false;
            }
        }
        true
    }

    /// Takes `n` buffered bytes.
    pub(crate) fn take(&mut self, n: usize) -> Vec<u8> {
        let rest = self.buf.split_off(n.min(self.buf.len()));
        std::mem::replace(&mut self.buf, rest)
    }

    /// Reads up to and including `mark`; at the end of the stream whatever there is.
    pub(crate) async fn read_until(&mut self, mark: &[u8]) -> Vec<u8> {
        loop {
            if let Some(at) = find(&self.buf, mark) {
                return self.take(at + mark.len());
            }
            if !self.fill().await {
                return self.take(usize::MAX);
            }
        }
    }

    /// Reads until the peer closes.
    pub(crate) async fn read_all(&mut self) -> Vec<u8> {
        while self.fill().await {}
        self.take(usize::MAX)
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }

    /// Ends the writing side only.
    pub(crate) async fn half_close(&mut self) {
        let _ = self.io.shutdown().await;
    }

    /// Makes the coming drop a TCP reset.
    pub(crate) fn reset(self) {
        if let Some(socket) = &self.socket {
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
        // Dropping the duplicate first lets the stream's own close be the last one, which sends the reset.
        drop(self.socket);
        drop(self.io);
    }
}

pub(crate) fn duplicate(stream: &TcpStream) -> Option<socket2::Socket> {
    socket2::SockRef::from(stream).try_clone().ok()
}

pub(crate) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// Case files and results write bytes as Latin-1, so that every byte has a spelling.
pub(crate) fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| char::from(b)).collect()
}

/// The reverse of [`latin1`]; a character above U+00FF becomes its UTF-8 bytes.
pub(crate) fn bytes_of(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    for c in text.chars() {
        match u8::try_from(u32::from(c)) {
            Ok(b) => out.push(b),
            Err(_) => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    out
}
