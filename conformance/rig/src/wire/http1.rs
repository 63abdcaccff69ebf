//! HTTP/1 messages in both roles: read leniently, keeping every line as it came, and written as a case has them.

use super::{Conn, bytes_of, latin1};
use crate::case::Text;

/// A message as it stood on the wire.
#[derive(Debug, Default, Clone)]
pub(crate) struct Message {
    /// First line and header lines, in order, without line ends.
    pub(crate) head: Vec<String>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<String>,
    /// False when the stream ended inside the message.
    pub(crate) complete: bool,
}

impl Message {
    /// The first value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// The status of a response.
    pub(crate) fn status(&self) -> u16 {
        self.head.first().and_then(|l| l.split(' ').nth(1)).and_then(|s| s.parse().ok()).unwrap_or(0)
    }
}

pub(crate) fn header<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    head.iter().skip(1).find_map(|line| {
        let (n, v) = line.split_once(':')?;
        n.eq_ignore_ascii_case(name).then(|| v.trim())
    })
}

/// Reads a head; `None` when the stream ends before its first byte.
pub(crate) async fn read_head(conn: &mut Conn) -> Option<Message> {
    if !conn.need(1).await {
        return None;
    }
    let raw = conn.read_until(b"\r\n\r\n").await;
    let complete = raw.ends_with(b"\r\n\r\n");
    let text = latin1(&raw);
    let head = text.trim_end_matches("\r\n").split("\r\n").map(str::to_owned).collect();
    Some(Message { head, complete, ..Message::default() })
}

/// Writes a chunked body with its trailers.
pub(crate) fn chunked(chunks: &[Text], trailers: &[String], out: &mut Vec<u8>) {
    for chunk in chunks {
        out.extend_from_slice(format!("{:x}\r\n", chunk.0.len()).as_bytes());
        out.extend_from_slice(&chunk.0);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"0\r\n");
    for line in trailers {
        out.extend_from_slice(&bytes_of(line));
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// How a body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(usize),
    Chunked,
    UntilClose,
}

pub(crate) fn request_framing(message: &Message) -> Framing {
    framing(message).unwrap_or(Framing::None)
}

pub(crate) fn response_framing(message: &Message, to_head: bool) -> Framing {
    let status = message.status();
    if to_head || status < 200 || status == 204 || status == 304 {
        return Framing::None;
    }
    framing(message).unwrap_or(Framing::UntilClose)
}

fn framing(message: &Message) -> Option<Framing> {
    if message.header("transfer-encoding").is_some_and(|v| v.to_ascii_lowercase().ends_with("chunked")) {
        return Some(Framing::Chunked);
    }
    Some(Framing::Length(message.header("content-length")?.parse().ok()?))
}

/// Reads the body and trailers into `message`.
pub(crate) async fn read_body(conn: &mut Conn, message: &mut Message, framing: Framing) {
    match framing {
        Framing::None => {}
        Framing::UntilClose => message.body = conn.read_all().await,
        Framing::Length(n) => {
            message.complete &= conn.need(n).await;
            message.body = conn.take(n);
        }
        Framing::Chunked => message.complete &= read_chunks(conn, message).await,
    }
}

async fn read_chunks(conn: &mut Conn, message: &mut Message) -> bool {
    loop {
        let line = conn.read_until(b"\r\n").await;
        let text = latin1(&line);
        let size = text.trim().split(';').next().unwrap_or_default();
        let Ok(size) = usize::from_str_radix(size, 16) else { return false };
        if size == 0 {
            break;
        }
        let whole = conn.need(size + 2).await;
        message.body.extend_from_slice(&conn.take(size));
        if !whole {
            return false;
        }
        conn.take(2);
    }
    loop {
        let line = conn.read_until(b"\r\n").await;
        if !line.ends_with(b"\r\n") {
            return false;
        }
        if line.len() == 2 {
            return true;
        }
        message.trailers.push(latin1(&line[..line.len() - 2]));
    }
}

/// Reads one final response, with the interim ones before it.
pub(crate) async fn read_response(conn: &mut Conn, to_head: bool) -> (Vec<Message>, Option<Message>) {
    let mut interim = Vec::new();
    loop {
        let Some(mut message) = read_head(conn).await else { return (interim, None) };
        let status = message.status();
        if message.complete && (100..200).contains(&status) && status != 101 {
            interim.push(message);
            continue;
        }
        if message.complete {
            let framing = response_framing(&message, to_head);
            read_body(conn, &mut message, framing).await;
        }
        return (interim, Some(message));
    }
}
