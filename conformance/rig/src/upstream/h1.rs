//! The HTTP/1 upstream.

use std::time::Duration;

use serde_json::{Value, json};

use super::Script;
use crate::case::{AnswerSpec, At, Text, Then};
use crate::report::body_value;
use crate::wire::http1::{self, Message, chunked};
use crate::wire::{Conn, bytes_of, latin1};

pub(super) async fn serve(mut conn: Conn, id: usize, sni: Option<String>, script: &Script) {
    if let Some(answer) = script.next_at_accept() {
        let Some(back) = perform(conn, &answer, &Message::default(), script, None).await else { return };
        conn = back;
    }
    while let Some(mut request) = http1::read_head(&mut conn).await {
        let mut entry = json!({"connection": id, "head": request.head});
        if let Some(sni) = &sni {
            entry["sni"] = Value::String(sni.clone());
        }
        let at = script.record(entry);
        let target = request.head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
        let answer = script.next(target);
        if answer.at == At::Request {
            let framing = http1::request_framing(&request);
            http1::read_body(&mut conn, &mut request, framing).await;
            if !request.body.is_empty() {
                script.update(at, "body", body_value(&request.body));
            }
            if !request.trailers.is_empty() {
                script.update(at, "trailers", json!(request.trailers));
            }
            if !request.complete {
                script.update(at, "incomplete", Value::from(true));
                return;
            }
        }
        let Some(back) = perform(conn, &answer, &request, script, Some(at)).await else { return };
        conn = back;
    }
}

/// Answers; gives the connection back when it stays in use.
async fn perform(
    mut conn: Conn,
    answer: &AnswerSpec,
    request: &Message,
    script: &Script,
    at: Option<usize>,
) -> Option<Conn> {
    tokio::time::sleep(Duration::from_millis(answer.delay)).await;
    for interim in &answer.interim {
        let _ = conn.send(&bytes_of(interim)).await;
    }
    let silent = answer.status.is_none() && (answer.then != Then::Keep || answer.at == At::Accept);
    if let Some(raw) = &answer.raw {
        let _ = conn.send(&raw.0).await;
    } else if !silent || answer.body.is_some() {
        let _ = conn.send(&response(answer, request, &script.name)).await;
    }
    for later in &answer.later {
        tokio::time::sleep(Duration::from_millis(later.delay)).await;
        let _ = conn.send(&later.raw.0).await;
    }
    match answer.then {
        Then::Keep => return Some(conn),
        Then::Close => {}
        Then::Reset => conn.reset(),
        Then::Hang => {
            conn.read_all().await;
        }
        Then::HalfClose => {
            conn.half_close().await;
            conn.read_all().await;
        }
        Then::Echo => {
            let mut all = Vec::new();
            loop {
                let bytes = conn.take(usize::MAX);
                all.extend_from_slice(&bytes);
                if let Some(at) = at {
                    script.update(at, "tunnel", Value::String(latin1(&all)));
                }
                let _ = conn.send(&bytes).await;
                if !conn.fill().await {
                    break;
                }
            }
        }
    }
    None
}

fn response(answer: &AnswerSpec, request: &Message, name: &str) -> Vec<u8> {
    let status = answer.status.unwrap_or(200);
    let version = answer.version.as_deref().unwrap_or("1.1");
    let reason = answer.reason.clone().unwrap_or_else(|| reason(status).to_owned());
    let mut head = format!("HTTP/{version} {status} {reason}\r\n");
    for line in &answer.headers {
        match line.contains(": {fill ") {
            true => {
                let (name, value) = super::h2::field(line);
                head.push_str(&format!("{}: {}", latin1(&name), latin1(&value)));
            }
            false => head.push_str(line),
        }
        head.push_str("\r\n");
    }
    let body = answer.body.as_ref().map_or_else(|| name.as_bytes().to_vec(), |t| t.0.clone());
    let bodiless = (100..200).contains(&status) || status == 204 || status == 304;
    let to_head = request.head.first().is_some_and(|l| l.starts_with("HEAD "));
    if !answer.bare {
        head.push_str(&format!("x-upstream: {name}\r\n"));
        if answer.chunks.is_some() || !answer.trailers.is_empty() {
            head.push_str("transfer-encoding: chunked\r\n");
        } else if !bodiless {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
    }
    head.push_str("\r\n");
    let mut out = bytes_of(&head);
    if bodiless || to_head {
        return out;
    }
    if answer.chunks.is_some() || !answer.trailers.is_empty() {
        let whole = [Text(body)];
        chunked(answer.chunks.as_deref().unwrap_or(&whole), &answer.trailers, &mut out);
    } else {
        out.extend_from_slice(&body);
    }
    out
}

fn reason(status: u16) -> &'static str {
    match status {
        101 => "Switching Protocols",
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        304 => "Not Modified",
        400 => "Bad Request",
        404 => "Not Found",
        409 => "Conflict",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Scripted",
    }
}
