//! The little HTTP/1.1 that the bench itself speaks: admin pages, and connections that do nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A response, its body still in chunks when it came so.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// One GET on a connection of its own.
pub(super) fn get(address: SocketAddr, path: &str, limit: Duration) -> Result<Answer, String> {
    let mut bytes = Vec::new();
    let mut stream = connect(address, limit)?;
    send(&mut stream, path, "close")?;
    stream.read_to_end(&mut bytes).map_err(|error| format!("GET {path}: {error}"))?;
    let head = head_end(&bytes).ok_or_else(|| format!("GET {path}: no response"))?;
    let status = status_of(&bytes).ok_or_else(|| format!("GET {path}: not HTTP"))?;
    Ok(Answer { status, body: bytes.split_off(head) })
}

/// The size of an answer that is too long to keep: all bytes, head and chunk sizes included.
pub(super) fn size(address: SocketAddr, path: &str, limit: Duration) -> Result<u64, String> {
    let mut stream = connect(address, limit)?;
    send(&mut stream, path, "close")?;
    let mut part = vec![0; 256 * 1024];
    let mut size = 0;
    loop {
        match stream.read(&mut part) {
            Ok(0) if size == 0 => return Err(format!("GET {path}: no response")),
            Ok(0) => return Ok(size),
            Ok(read) if size == 0 && status_of(&part[..read]) != Some(200) => {
                return Err(format!("GET {path}: status {:?}", status_of(&part[..read])));
            }
            Ok(read) => size += read as u64,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("GET {path}: {error}")),
        }
    }
}

/// A connection that has carried one request and stays open.
pub(super) fn idle_connection(address: SocketAddr) -> Result<TcpStream, String> {
    let mut stream = connect(address, Duration::from_secs(5))?;
    send(&mut stream, "/", "keep-alive")?;
    let mut bytes = Vec::new();
    let mut part = [0; 1024];
    while !complete(&bytes) {
        match stream.read(&mut part) {
            Ok(0) => return Err("the connection was closed".to_owned()),
            Ok(read) => bytes.extend_from_slice(&part[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    match status_of(&bytes) {
        Some(200) => Ok(stream),
        status => Err(format!("status {status:?}")),
    }
}

fn connect(address: SocketAddr, limit: Duration) -> Result<TcpStream, String> {
    let stream = TcpStream::connect_timeout(&address, limit).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(limit)).map_err(|error| error.to_string())?;
    Ok(stream)
}

fn send(stream: &mut TcpStream, path: &str, connection: &str) -> Result<(), String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(|error| error.to_string())
}

fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|position| position + 4)
}

fn status_of(bytes: &[u8]) -> Option<u16> {
    let line = bytes.strip_prefix(b"HTTP/1.1 ")?;
    std::str::from_utf8(line.get(..3)?).ok()?.parse().ok()
}

/// Whether the head and as much body as its `content-length` says have come.
fn complete(bytes: &[u8]) -> bool {
    let Some(head) = head_end(bytes) else { return false };
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.and_then(|value| value.trim().parse().ok()).unwrap_or(0);
    bytes.len() >= head + length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_complete_with_its_body() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        assert!(complete(bytes));
        assert!(!complete(&bytes[..bytes.len() - 1]));
        assert!(!complete(b"HTTP/1.1 200 OK\r\n"));
        assert_eq!(status_of(bytes), Some(200));
    }
}
