//! The HTTP/2 upstream. Answers wait in a queue, so that a slow stream does not hold up the others.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::{Script, grpc};
use crate::case::{AnswerSpec, At, Then};
use crate::report::body_value;
use crate::wire::http2::{self, Event, Reader, frame};
use crate::wire::{Conn, bytes_of};

struct Stream {
    at: usize,
    body: Vec<u8>,
    answer: Option<AnswerSpec>,
    /// What its messages are, when it is a call of a service that the rig knows.
    method: Option<grpc::Method>,
}

/// An answer and when it goes out.
struct Due {
    at: Instant,
    stream: u32,
    answer: AnswerSpec,
    method: Option<grpc::Method>,
}

pub(super) async fn serve(mut conn: Conn, id: usize, sni: Option<String>, script: &Script) {
    if let Some(answer) = script.next_at_accept() {
        tokio::time::sleep(Duration::from_millis(answer.delay)).await;
        if answer.then == Then::Reset {
            return conn.reset();
        }
        return;
    }
    if !conn.need(http2::PREFACE.len()).await || conn.take(http2::PREFACE.len()) != http2::PREFACE {
        return;
    }
    let _ = conn.send(&frame(http2::SETTINGS, 0, 0, b"")).await;
    let mut reader = Reader::new();
    let mut streams: HashMap<u32, Stream> = HashMap::new();
    let mut due: Vec<Due> = Vec::new();
    loop {
        let next = due.iter().map(|d| d.at).min();
        let far = Instant::now() + Duration::from_secs(3600);
        let event = tokio::select! {
            f = Reader::frame(&mut conn) => match f {
                None => return,
                Some(f) => reader.on_frame(&mut conn, f).await,
            },
            () = sleep_until(next.unwrap_or(far)) => None,
        };
        match event {
            Some(Event::Headers { stream, mut fields, end }) => {
                // The order among pseudo-headers means nothing to any receiver; that of the others is kept.
                fields.sort_by_key(|f| if f.starts_with(':') { (0, f.clone()) } else { (1, String::new()) });
                if let Some(known) = streams.get(&stream) {
                    script.update(known.at, "trailers", json!(fields));
                } else {
                    let path = fields.iter().find_map(|field| field.strip_prefix(":path: "));
                    let answer = script.next(path.unwrap_or_default());
                    let mut entry = json!({"connection": id, "head": &fields});
                    if let Some(sni) = &sni {
                        entry["sni"] = Value::String(sni.clone());
                    }
                    let at = script.record(entry);
                    let early = answer.at == At::Head;
                    let method = grpc::Method::of(&fields);
                    let mut known = Stream { at, body: Vec::new(), answer: Some(answer), method };
                    if early {
                        queue(&mut due, stream, &mut known);
                    }
                    streams.insert(stream, known);
                }
                if end && let Some(known) = streams.get_mut(&stream) {
                    queue(&mut due, stream, known);
                }
            }
            Some(Event::Data { stream, body, end }) => {
                if let Some(known) = streams.get_mut(&stream) {
                    known.body.extend_from_slice(&body);
                    match known.method.filter(|_| !known.body.is_empty()) {
                        Some(method) => script.update(known.at, "messages", method.requests(&known.body)),
                        None if known.body.is_empty() => {}
                        None => script.update(known.at, "body", body_value(&known.body)),
                    }
                    if end {
                        queue(&mut due, stream, known);
                    }
                }
            }
            Some(Event::Reset { stream, code }) => {
                due.retain(|d| d.stream != stream);
                if let Some(known) = streams.remove(&stream) {
                    script.update(known.at, "reset", Value::String(http2::error_name(code)));
                }
            }
            Some(Event::Closed) => return,
            _ => {}
        }
        let now = Instant::now();
        while let Some(i) = due.iter().position(|d| d.at <= now) {
            let Due { stream, answer, method, .. } = due.remove(i);
            let _ = conn.send(&response(stream, &answer, method, &script.name)).await;
            match answer.then {
                Then::Close => return,
                Then::Reset => return conn.reset(),
                _ => {}
            }
        }
    }
}

fn queue(due: &mut Vec<Due>, stream: u32, known: &mut Stream) {
    if let Some(answer) = known.answer.take() {
        let at = Instant::now() + Duration::from_millis(answer.delay);
        due.push(Due { at, stream, answer, method: known.method });
    }
}

pub(super) fn response(
    stream: u32,
    answer: &AnswerSpec,
    method: Option<grpc::Method>,
    name: &str,
) -> Vec<u8> {
    let mut out = Vec::new();
    if answer.goaway {
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend_from_slice(&0_u32.to_be_bytes());
        out.extend_from_slice(&frame(http2::GOAWAY, 0, 0, &payload));
    }
    let silent = answer.then != Then::Keep || answer.reset.is_some();
    if answer.status.is_some() || !silent {
        for interim in &answer.interim {
            out.extend_from_slice(&http2::header_frames(
                stream,
                &[field(&format!(":status: {interim}"))],
                false,
            ));
        }
        let mut fields = vec![field(&format!(":status: {}", answer.status.unwrap_or(200)))];
        fields.extend(answer.headers.iter().map(|l| field(l)));
        let mut body = answer.body.as_ref().map_or_else(|| name.as_bytes().to_vec(), |t| t.0.clone());
        let mut trailers = answer.trailers.clone();
        if let Some(messages) = &answer.grpc {
            fields.push(field("content-type: application/grpc"));
            body = grpc::responses(method, messages);
            if trailers.is_empty() {
                trailers.push("grpc-status: 0".to_owned());
            }
        }
        if !answer.bare {
            fields.push(field(&format!("x-upstream: {name}")));
        }
        let ends = answer.reset.is_none() && answer.then == Then::Keep;
        let only_head = body.is_empty() && trailers.is_empty();
        out.extend_from_slice(&http2::header_frames(stream, &fields, only_head && ends));
        if !only_head {
            out.extend_from_slice(&http2::data_frames(stream, &body, trailers.is_empty() && ends));
        }
        if !trailers.is_empty() {
            let fields: Vec<_> = trailers.iter().map(|l| field(l)).collect();
            out.extend_from_slice(&http2::header_frames(stream, &fields, ends));
        }
    }
    if let Some(code) = &answer.reset {
        let code = http2::error_code(code).to_be_bytes();
        out.extend_from_slice(&frame(http2::RST_STREAM, 0, stream, &code));
    }
    out
}

/// `name: value`, where the name may be a pseudo-header, and `{fill N}` stands for a long value.
pub(crate) fn field(line: &str) -> (Vec<u8>, Vec<u8>) {
    let (name, value) = line.split_once(": ").unwrap_or((line.trim_end_matches(':'), ""));
    let long = value.strip_prefix("{fill ").and_then(|rest| rest.strip_suffix('}')?.parse().ok());
    (bytes_of(name), long.map_or_else(|| bytes_of(value), |length| vec![b'x'; length]))
}
