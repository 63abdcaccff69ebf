//! How observations are written into results.

use serde_json::{Value, json};

use crate::wire::http1::Message;
use crate::wire::latin1;

/// Short bodies as text; long ones by length and checksum.
pub(crate) fn body_value(body: &[u8]) -> Value {
    if body.len() <= 4096 {
        return Value::String(latin1(body));
    }
    let hash = body
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    json!({"bytes": body.len(), "fnv1a": format!("{hash:016x}")})
}

/// Header lines in a stable order, or as they came.
pub(crate) fn header_lines(lines: &[String], only: Option<&[String]>, ordered: bool) -> Value {
    let mut lines: Vec<String> = lines
        .iter()
        .map(|l| l.chars().take(4096).collect::<String>())
        .filter(|l| {
            let name = l.get(1..).and_then(|rest| rest.find(':')).map_or(l.as_str(), |i| &l[..=i]);
            only.is_none_or(|only| only.iter().any(|o| o.eq_ignore_ascii_case(name)))
        })
        .collect();
    if !ordered {
        lines.sort_by(|a, b| a.split(':').next().cmp(&b.split(':').next()));
    }
    json!(lines)
}

/// A response of HTTP/1.
pub(crate) fn response(
    interim: &[Message],
    message: Option<&Message>,
    only: Option<&[String]>,
    ordered: bool,
) -> Value {
    let Some(message) = message else { return json!({"closed_without_response": true}) };
    let mut out = json!({
        "status": message.head.first(),
        "headers": header_lines(message.head.get(1..).unwrap_or_default(), only, ordered),
    });
    if !message.body.is_empty() {
        out["body"] = body_value(&message.body);
    }
    if !message.trailers.is_empty() {
        out["trailers"] = json!(message.trailers);
    }
    if !interim.is_empty() {
        out["interim"] = interim.iter().map(|m| json!(m.head)).collect();
    }
    if !message.complete {
        out["incomplete"] = Value::from(true);
    }
    out
}
