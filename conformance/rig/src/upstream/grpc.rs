//! gRPC services that the rig plays: what was asked, and the answers, as JSON of their messages.

use serde_json::{Value, json};
use waystation_schema::{JsonStyle, Message, TextOptions, json_to_wire, wire_to_json};

/// Path, request and response of each method.
const METHODS: [(&str, &str, &str); 1] = [(
    "/envoy.service.auth.v3.Authorization/Check",
    "envoy.service.auth.v3.CheckRequest",
    "envoy.service.auth.v3.CheckResponse",
)];

const STYLE: JsonStyle = JsonStyle { proto_names: true, pretty: false, with_defaults: false, redact: false };

/// A method that the rig knows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method {
    request: Message,
    response: Message,
}

impl Method {
    /// The method that a request head calls.
    pub(super) fn of(head: &[String]) -> Option<Self> {
        let path = head.iter().find_map(|line| line.strip_prefix(":path: "))?;
        let (_, request, response) = METHODS.iter().find(|(known, ..)| *known == path)?;
        Some(Self { request: Message::find(request)?, response: Message::find(response)? })
    }

    /// The messages of a request body so far.
    pub(super) fn requests(self, mut body: &[u8]) -> Value {
        let mut messages = Vec::new();
        while let Some((head, rest)) = body.split_first_chunk::<5>() {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let Some((message, rest)) = rest.split_at_checked(length) else { break };
            messages.push(self.request(message));
            body = rest;
        }
        Value::Array(messages)
    }

    fn request(self, wire: &[u8]) -> Value {
        let mut text = String::new();
        if let Err(error) = wire_to_json(self.request, wire, &mut text, STYLE) {
            return json!({"malformed": error.to_string()});
        }
        let mut value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        // A stream's number is anybody's guess.
        if let Some(id) = value.pointer_mut("/attributes/request/http/id") {
            *id = json!("{id}");
        }
        value
    }
}

/// The frames of these messages; what is no such message is a defect of the case and shows as an empty response.
pub(super) fn responses(method: Option<Method>, messages: &[Value]) -> Vec<u8> {
    let mut body = Vec::new();
    let Some(method) = method else { return body };
    for message in messages {
        match json_to_wire(method.response, &message.to_string(), TextOptions::default()) {
            Ok(encoded) => {
                body.push(0);
                body.extend_from_slice(&(encoded.wire.len() as u32).to_be_bytes());
                body.extend_from_slice(&encoded.wire);
            }
            Err(error) => eprintln!("{message} is no {}: {error}", method.response.full_name()),
        }
    }
    body
}
