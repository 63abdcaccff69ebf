//! `CheckRequest`, written as it goes out: what is asked of every request is not built as objects first.

use std::borrow::Cow;
use std::time::UNIX_EPOCH;

use bytes::{BufMut, BytesMut};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::Certificate;
use waystation_filter_api::http::StreamCx;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::value::{Metadata, Value, struct_to_proto};
use waystation_http::{Headers, Known};
use waystation_matchers::StringMatcher;

use super::PARTIAL_BODY;
use super::config::{Config, Namespaces, PerRoute, RequestConfig};

/// `AttributeContext.context_extensions`.
pub(super) const CONTEXT_EXTENSIONS: u32 = 10;
/// `AttributeContext.Peer.labels`.
pub(super) const LABELS: u32 = 3;

/// What is shown of a request body.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown<'b> {
    pub(super) body: &'b [u8],
    /// How long it is so far.
    pub(super) received: usize,
}

impl Shown<'_> {
    /// The value of [`PARTIAL_BODY`], when a body is shown.
    pub(super) fn partial_text(&self) -> Option<&'static str> {
        let partial = if self.received > self.body.len() { "true" } else { "false" };
        (!self.body.is_empty()).then_some(partial)
    }
}

/// Writes the request.
pub(super) fn encode(
    config: &Config,
    cx: &StreamCx<'_>,
    head: &Headers,
    shown: Shown<'_>,
    out: &mut BytesMut,
) {
    let (of, info) = (&config.request, &*cx.info);
    message(1, out, |out| {
        let connection = &*info.connection;
        let tls = connection.tls.as_deref();
        let peer = tls.and_then(|tls| tls.peer.as_deref());
        message(1, out, |out| {
            address(&connection.remote_address, out);
            text(2, &plain(head.get(Known::XEnvoyDownstreamServiceCluster).unwrap_or_default()), out);
            text(4, &plain(principal(peer).as_bytes()), out);
            if let Some(peer) = peer.filter(|_| of.peer_certificate) {
                text(5, peer.url_encoded_pem.as_bytes(), out);
            }
        });
        message(2, out, |out| {
            address(&connection.local_address, out);
            out.extend_from_slice(&of.labels);
            text(4, &plain(principal(tls.and_then(|tls| tls.local.as_deref())).as_bytes()), out);
        });
        message(4, out, |out| {
            message(1, out, |out| {
                let since = info.start_time.duration_since(UNIX_EPOCH).unwrap_or_default();
                number(1, since.as_secs(), out);
                number(2, u64::from(since.subsec_nanos()), out);
            });
            message(2, out, |out| http(of, info, head, shown, out));
        });
        // The most specific level comes first and has the last word.
        for level in cx.route_config.iter().rev().filter_map(|level| level.downcast_ref::<PerRoute>()) {
            out.extend_from_slice(&level.extensions);
        }
        let of_connection = connection.metadata.borrow();
        message(11, out, |out| metadata(&of.metadata, &[&info.metadata, &of_connection], out));
        if of.tls_session {
            let sni = tls.and_then(|tls| tls.server_name.as_deref());
            let sni = sni.or(connection.requested_server_name.as_deref()).unwrap_or_default();
            message(12, out, |out| text(1, sni.as_bytes(), out));
        }
        let route = info.route.as_ref().and_then(|(view, route)| view.route_metadata(*route));
        message(13, out, |out| {
            if let Some(route) = route {
                metadata(&of.route_metadata, &[route], out);
            }
        });
    });
}

fn http(of: &RequestConfig, info: &StreamInfo, head: &Headers, shown: Shown<'_>, out: &mut BytesMut) {
    text(1, itoa(info.id).as_bytes(), out);
    text(2, &plain(head.method().unwrap_or_default()), out);
    if of.raw_headers {
        message(13, out, |out| {
            each_header(of, head, |name, value| raw_header(name, value, out));
            if let Some(partial) = shown.partial_text() {
                raw_header(PARTIAL_BODY.as_bytes(), partial.as_bytes(), out);
            }
        });
    } else {
        each_joined(of, head, |name, value| entry(3, name, value, out));
        if let Some(partial) = shown.partial_text() {
            entry(3, PARTIAL_BODY.as_bytes(), partial.as_bytes(), out);
        }
    }
    text(4, &plain(head.path().unwrap_or_default()), out);
    text(5, &plain(head.authority().unwrap_or_default()), out);
    text(6, &plain(head.scheme().unwrap_or_default()), out);
    number(9, shown.received as u64, out);
    text(10, info.protocol.map_or("", |protocol| protocol.as_str()).as_bytes(), out);
    match of.body_as_bytes {
        true => text(12, shown.body, out),
        false => text(11, &plain(shown.body), out),
    }
}

/// Calls `each` with the headers that the service is told of, pseudo-headers in Envoy's order.
pub(super) fn each_header(of: &RequestConfig, head: &Headers, mut each: impl FnMut(&[u8], &[u8])) {
    for name in [Known::Authority, Known::Path, Known::Method, Known::Scheme, Known::Protocol] {
        if let Some(value) = head.get(name).filter(|_| is_told(of, name.as_str().as_bytes())) {
            each(name.as_str().as_bytes(), value);
        }
    }
    for (name, value) in head.iter_regular() {
        if is_told(of, name.as_bytes()) {
            each(name.as_bytes(), value);
        }
    }
}

/// The same with the values of one name as one, and as text.
pub(super) fn each_joined(of: &RequestConfig, head: &Headers, mut each: impl FnMut(&[u8], &[u8])) {
    for (index, (name, value)) in head.iter().enumerate() {
        let earlier = head.iter().take(index).any(|(other, _)| other == name);
        if earlier || !is_told(of, name.as_bytes()) {
            continue;
        }
        let joined = head.get_joined(name);
        each(name.as_bytes(), &plain(joined.as_deref().unwrap_or(value)));
    }
}

fn is_told(of: &RequestConfig, name: &[u8]) -> bool {
    let among = |list: &[StringMatcher]| list.iter().any(|matcher| matcher.is_match(name));
    // What this filter itself says is not for the client to say.
    name != PARTIAL_BODY.as_bytes()
        && !among(&of.disallowed)
        && of.allowed.as_ref().is_none_or(|list| among(list))
}

/// Envoy's order: URI SAN, DNS SAN, subject.
fn principal(certificate: Option<&Certificate>) -> &str {
    let Some(certificate) = certificate else { return "" };
    let first = certificate.uri_sans.first().or_else(|| certificate.dns_sans.first());
    first.unwrap_or(&certificate.subject)
}

fn address(address: &Address, out: &mut BytesMut) {
    message(1, out, |out| match address {
        Address::Ip(ip) => message(1, out, |out| {
            text(2, ip.ip().to_string().as_bytes(), out);
            // Part of a oneof: there, though it may be 0.
            encode_key(3, WireType::Varint, out);
            encode_varint(u64::from(ip.port()), out);
        }),
        Address::Pipe(path) => message(2, out, |out| text(1, path.as_bytes(), out)),
        Address::Internal { listener, endpoint_id } => message(3, out, |out| {
            text(1, listener.as_bytes(), out);
            text(2, endpoint_id.as_bytes(), out);
        }),
    });
}

/// The namespaces that the first of `sources` has.
fn metadata(namespaces: &Namespaces, sources: &[&Metadata], out: &mut BytesMut) {
    for name in &namespaces.untyped {
        if let Some(Value::Struct(fields)) =
            sources.iter().find_map(|source| source.filter.get(name.as_str()))
        {
            entry(1, name.as_bytes(), &struct_to_proto(fields).encode_to_vec(), out);
        }
    }
    for name in &namespaces.typed {
        if let Some((url, value)) = sources.iter().find_map(|source| source.typed.get(name.as_str())) {
            message(2, out, |out| {
                text(1, name.as_bytes(), out);
                message(2, out, |out| {
                    text(1, url.as_bytes(), out);
                    text(2, value, out);
                });
            });
        }
    }
}

/// Bytes as text: what is not UTF-8 becomes `!`, as Envoy has it.
pub(super) fn plain(bytes: &[u8]) -> Cow<'_, [u8]> {
    if str::from_utf8(bytes).is_ok() {
        return Cow::Borrowed(bytes);
    }
    let mut plain = Vec::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        plain.extend_from_slice(chunk.valid().as_bytes());
        plain.resize(plain.len() + chunk.invalid().len(), b'!');
    }
    Cow::Owned(plain)
}

fn itoa(number: u64) -> String {
    number.to_string()
}

/// An entry of a map from text to text.
pub(super) fn map_entry(field: u32, key: &str, value: &str, out: &mut Vec<u8>) {
    let mut encoded = BytesMut::new();
    entry(field, key.as_bytes(), value.as_bytes(), &mut encoded);
    out.extend_from_slice(&encoded);
}

fn entry(field: u32, key: &[u8], value: &[u8], out: &mut BytesMut) {
    let length = |text: &[u8]| 1 + encoded_len_varint(text.len() as u64) + text.len();
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint((length(key) + length(value)) as u64, out);
    for (field, text) in [(1, key), (2, value)] {
        encode_key(field, WireType::LengthDelimited, out);
        encode_varint(text.len() as u64, out);
        out.extend_from_slice(text);
    }
}

fn raw_header(name: &[u8], value: &[u8], out: &mut BytesMut) {
    message(1, out, |out| {
        text(1, name, out);
        text(3, value, out);
    });
}

/// A text or bytes, unless empty.
fn text(field: u32, text: &[u8], out: &mut BytesMut) {
    if !text.is_empty() {
        encode_key(field, WireType::LengthDelimited, out);
        encode_varint(text.len() as u64, out);
        out.extend_from_slice(text);
    }
}

/// A number, unless 0.
fn number(field: u32, number: u64, out: &mut BytesMut) {
    if number != 0 {
        encode_key(field, WireType::Varint, out);
        encode_varint(number, out);
    }
}

/// A message that `write` writes; its length, known afterwards, makes its own room.
fn message(field: u32, out: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    encode_key(field, WireType::LengthDelimited, out);
    let start = out.len();
    out.put_u8(0);
    write(out);
    let length = out.len() - start - 1;
    let more = encoded_len_varint(length as u64) - 1;
    out.put_bytes(0, more);
    out.copy_within(start + 1..start + 1 + length, start + 1 + more);
    encode_varint(length as u64, &mut &mut out[start..]);
}
