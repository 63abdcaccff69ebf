//! An access log service: remembers the entries, each beside the log and the node that its stream belongs to.
//!
//! An answer is for a stream, and comes after its first message; without one the stream is listened to for ever.

use std::collections::HashMap;

use serde_json::{Value, json};
use waystation_schema::{JsonStyle, Message, wire_to_json};

use super::{Script, h2};
use crate::case::{AnswerSpec, At, Then};
use crate::wire::Conn;
use crate::wire::http2::{self, Event, Reader, frame};

const MESSAGE: &str = "envoy.service.accesslog.v3.StreamAccessLogsMessage";

#[derive(Default)]
struct Stream {
    buffer: Vec<u8>,
    answer: Option<AnswerSpec>,
    identifier: Value,
}

pub(super) async fn serve(mut conn: Conn, script: &Script) {
    if !conn.need(http2::PREFACE.len()).await || conn.take(http2::PREFACE.len()) != http2::PREFACE {
        return;
    }
    let _ = conn.send(&frame(http2::SETTINGS, 0, 0, b"")).await;
    let mut reader = Reader::new();
    let mut streams: HashMap<u32, Stream> = HashMap::new();
    loop {
        match reader.next(&mut conn).await {
            Event::Headers { stream, .. } => {
                let answer = script.answers.lock().pop_front();
                if answer.as_ref().is_some_and(|answer| answer.at == At::Head && answer.then == Then::Hang) {
                    return std::future::pending().await;
                }
                streams.insert(stream, Stream { answer, ..Stream::default() });
            }
            Event::Data { stream, body, .. } => {
                let Some(known) = streams.get_mut(&stream) else { continue };
                known.buffer.extend_from_slice(&body);
                while let Some(message) = next_message(&mut known.buffer) {
                    remember(&message, known, script);
                    let Some(answer) = known.answer.take() else { continue };
                    let _ = conn.send(&h2::response(stream, &answer, None, &script.name)).await;
                    match answer.then {
                        Then::Close => return,
                        Then::Reset => return conn.reset(),
                        _ => {}
                    }
                }
            }
            Event::Reset { stream, .. } => drop(streams.remove(&stream)),
            Event::Closed => return,
            _ => {}
        }
    }
}

/// Takes a message of gRPC off the front: a flag, the length, the bytes.
fn next_message(buffer: &mut Vec<u8>) -> Option<Vec<u8>> {
    let length = u32::from_be_bytes(buffer.get(1..5)?.try_into().ok()?) as usize;
    buffer.get(..5 + length)?;
    let rest = buffer.split_off(5 + length);
    let message = std::mem::replace(buffer, rest);
    Some(message[5..].to_vec())
}

fn remember(message: &[u8], stream: &mut Stream, script: &Script) {
    let Some(kind) = Message::find(MESSAGE) else { return };
    let mut text = String::new();
    let style = JsonStyle { proto_names: true, ..JsonStyle::default() };
    let parsed = match wire_to_json(kind, message, &mut text, style) {
        Ok(()) => serde_json::from_str::<Value>(&text).unwrap_or_default(),
        Err(error) => json!({"unreadable": error.to_string()}),
    };
    if let Some(identifier) = parsed.get("identifier") {
        stream.identifier = json!({"log": identifier["log_name"], "node": identifier["node"]["id"]});
    }
    for kind in ["http_logs", "tcp_logs"] {
        for entry in parsed[kind]["log_entry"].as_array().into_iter().flatten() {
            let mut entry = entry.clone();
            let http2 = entry["protocol_version"] == "HTTP2";
            normalise(&mut entry, http2);
            script.record(json!({"of": stream.identifier, "kind": kind, "entry": entry}));
        }
    }
}

/// Times and ports are there or not; what they are differs from run to run. So does what HPACK makes of a head, with the
/// request's id in it.
fn normalise(value: &mut Value, http2: bool) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match key.as_str() {
                    "port_value" => *value = json!("{port}"),
                    "duration" | "start_time" => *value = json!("{time}"),
                    key if key.starts_with("time_to_") => *value = json!("{time}"),
                    key if http2 && (key.contains("_wire_bytes_") || key.contains("_header_bytes_")) => {
                        *value = json!("{bytes}");
                    }
                    _ => normalise(value, http2),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| normalise(item, http2)),
        _ => {}
    }
}
