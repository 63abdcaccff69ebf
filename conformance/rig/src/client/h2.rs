//! An HTTP/2 client that sends whatever it is told and notes what comes back.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::report::{body_value, header_lines};
use crate::wire::Conn;
use crate::wire::http2::{self, Event, Reader, frame};

/// A connection with its streams.
pub(crate) struct Session {
    pub(crate) conn: Conn,
    reader: Reader,
    next: u32,
    streams: BTreeMap<u32, Reply>,
    goaway: Option<u32>,
    closed: bool,
}

#[derive(Default)]
struct Reply {
    interim: Vec<Vec<String>>,
    head: Option<Vec<String>>,
    body: Vec<u8>,
    trailers: Option<Vec<String>>,
    ended: bool,
    reset: Option<u32>,
}

impl Session {
    pub(crate) fn new(conn: Conn) -> Self {
        Self { conn, reader: Reader::new(), next: 1, streams: BTreeMap::new(), goaway: None, closed: false }
    }

    /// The preface and empty settings.
    pub(crate) async fn greet(&mut self) {
        let mut out = http2::PREFACE.to_vec();
        out.extend_from_slice(&frame(http2::SETTINGS, 0, 0, b""));
        let _ = self.conn.send(&out).await;
    }

    /// The next free stream.
    pub(crate) fn take_stream(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    /// Reads until the stream is over: ended, reset, or the connection gone.
    pub(crate) async fn finish(&mut self, stream: u32) {
        self.streams.entry(stream).or_default();
        while !self.closed && !self.streams.get(&stream).is_some_and(|s| s.ended || s.reset.is_some()) {
            self.read().await;
        }
    }

    /// Reads until the proxy closes the connection.
    pub(crate) async fn drain(&mut self) {
        while !self.closed {
            self.read().await;
        }
    }

    async fn read(&mut self) {
        match self.reader.next(&mut self.conn).await {
            Event::Headers { stream, fields, end } => {
                let s = self.streams.entry(stream).or_default();
                let interim = fields.first().is_some_and(|f| f.starts_with(":status: 1"));
                if interim {
                    s.interim.push(fields);
                } else if s.head.is_none() {
                    s.head = Some(fields);
                } else {
                    s.trailers = Some(fields);
                }
                s.ended |= end;
            }
            Event::Data { stream, body, end } => {
                let s = self.streams.entry(stream).or_default();
                s.body.extend_from_slice(&body);
                s.ended |= end;
            }
            Event::Reset { stream, code } => self.streams.entry(stream).or_default().reset = Some(code),
            Event::GoAway { code } => self.goaway = Some(code),
            Event::Closed => self.closed = true,
            Event::Settings | Event::SettingsAck | Event::Pong => {}
        }
    }

    /// True when the stream came to a final head or a reset; both leave an access log line.
    pub(crate) fn answered(&self, stream: u32) -> bool {
        self.streams.get(&stream).is_some_and(|s| s.head.is_some() || s.reset.is_some())
    }

    /// What came for a stream.
    pub(crate) fn reply(&self, stream: u32, only: Option<&[String]>, ordered: bool) -> Value {
        let mut out = json!({});
        let Some(s) = self.streams.get(&stream) else { return out };
        if let Some(head) = &s.head {
            out["headers"] = header_lines(head, only, ordered);
        }
        if !s.interim.is_empty() {
            out["interim"] = json!(s.interim);
        }
        if !s.body.is_empty() {
            out["body"] = body_value(&s.body);
        }
        if let Some(trailers) = &s.trailers {
            out["trailers"] = json!(trailers);
        }
        // After a whole response NO_ERROR only stops the upload; whether it is seen depends on when one looks.
        if let Some(code) = s.reset.filter(|c| !(s.ended && *c == 0)) {
            out["reset"] = Value::String(http2::error_name(code));
        }
        if let Some(code) = self.goaway {
            out["goaway"] = Value::String(http2::error_name(code));
        }
        if !s.ended && s.reset.is_none() {
            out["unfinished"] = Value::from(true);
        }
        out
    }

    /// The first final header of that name.
    pub(crate) fn header(&self, stream: u32, name: &str) -> Option<String> {
        let head = self.streams.get(&stream)?.head.as_ref()?;
        head.iter().find_map(|l| l.strip_prefix(&format!("{name}: ")).map(str::to_owned))
    }

    /// The body received so far.
    pub(crate) fn body(&self, stream: u32) -> &[u8] {
        self.streams.get(&stream).map_or(&[], |s| &s.body)
    }
}
