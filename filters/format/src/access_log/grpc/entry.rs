//! What an entry says of a stream: `envoy.data.accesslog.v3`, in the numbers of its fields.

use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{Certificate, ConnectionInfo, TlsInfo};
use waystation_filter_api::flags::{ResponseFlag, ResponseFlags};
use waystation_filter_api::stream::Protocol;
use waystation_filter_api::value::{Metadata, Value};
use waystation_http::{HeaderName, Headers, Known};

use super::wire::{any_bytes, bytes, double, message, message_unless_empty, number, pair, present, text};
use super::{EntryKind, GrpcLog};
use crate::formatter::FormatContext;

/// `envoy.config.core.v3.RequestMethod`, in the order of its numbers from 1.
const METHODS: [&[u8]; 9] =
    [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];

impl GrpcLog {
    /// Appends the entry of a stream.
    pub(super) fn encode(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        message(out, 1, |out| self.common(cx, out));
        let info = cx.info;
        if self.kind == EntryKind::Tcp {
            return message(out, 2, |out| {
                number(out, 1, info.bytes.body_received);
                number(out, 2, info.bytes.body_sent);
            });
        }
        let version = match info.protocol {
            None => 0,
            Some(Protocol::Http10) => 1,
            Some(Protocol::Http11) => 2,
            Some(Protocol::Http2) => 3,
            Some(Protocol::Http3) => 4,
        };
        number(out, 2, version);
        message(out, 3, |out| self.request(cx, out));
        message(out, 4, |out| self.response(cx, out));
    }

    /// `HTTPRequestProperties`
    fn request(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        let upstream = &cx.info.upstream.bytes;
        if let Some(head) = cx.request {
            let header = |name: Known| head.get(name).unwrap_or_default();
            let method = METHODS.iter().position(|method| *method == header(Known::Method));
            number(out, 1, method.map_or(0, |index| index as u64 + 1));
            text(out, 2, header(Known::Scheme));
            text(out, 3, header(Known::Authority));
            text(out, 5, header(Known::Path));
            text(out, 6, header(Known::UserAgent));
            text(out, 7, header(Known::Referer));
            text(out, 8, header(Known::XForwardedFor));
            text(out, 9, header(Known::XRequestId));
            text(out, 10, header(Known::XEnvoyOriginalPath));
            number(out, 11, head.byte_size() as u64);
            chosen(out, 13, head, &self.request_headers);
        }
        number(out, 12, cx.info.bytes.body_received);
        number(out, 14, upstream.header_sent);
        number(out, 15, cx.info.bytes.header_received);
    }

    /// `HTTPResponseProperties`
    fn response(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        let info = cx.info;
        if info.response_code != 0 {
            message(out, 1, |out| number(out, 1, u64::from(info.response_code)));
        }
        if let Some(head) = cx.response {
            number(out, 2, head.byte_size() as u64);
            chosen(out, 4, head, &self.response_headers);
        }
        number(out, 3, info.bytes.body_sent);
        if let Some(trailers) = cx.trailers {
            chosen(out, 5, trailers, &self.response_trailers);
        }
        text(out, 6, info.details.as_deref().unwrap_or_default().as_bytes());
        number(out, 7, info.upstream.bytes.header_received);
        number(out, 8, info.bytes.header_sent);
    }

    /// `AccessLogCommon`
    fn common(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        let info = cx.info;
        let connection = &*info.connection;
        address(out, 2, Some(&info.remote_address));
        address(out, 3, Some(&connection.local_address));
        if let Some(tls) = &connection.tls {
            message(out, 4, |out| tls_properties(out, tls, connection));
        }
        message(out, 5, |out| time(out, info.start_time));
        let timing = &info.timing;
        let points = [
            timing.last_downstream_rx,
            timing.first_upstream_tx,
            timing.last_upstream_tx,
            timing.first_upstream_rx,
            timing.last_upstream_rx,
            timing.first_downstream_tx,
            timing.last_downstream_tx,
        ];
        for (field, point) in (6..).zip(points) {
            if let Some(point) = point {
                message(out, field, |out| elapsed(out, point.saturating_duration_since(info.start)));
            }
        }
        let upstream = &info.upstream;
        address(out, 13, upstream.host.as_ref().map(|host| host.address()));
        address(out, 14, upstream.local_address.as_ref());
        // To Envoy the cluster is the host's.
        if let (Some(_), Some(cluster)) = (&upstream.host, &upstream.cluster) {
            text(out, 15, cluster.observability_name().as_bytes());
        }
        message_unless_empty(out, 16, |out| flags(out, info.flags));
        if !info.metadata.is_empty() {
            message_unless_empty(out, 17, |out| metadata(out, &info.metadata));
        }
        text(out, 18, upstream.transport_failure_reason.as_deref().unwrap_or_default().as_bytes());
        if let Some((table, route)) = &info.route {
            text(out, 19, table.route_name(*route).as_bytes());
        }
        address(out, 20, Some(&connection.direct_remote_address));
        for name in &self.filter_state {
            let of_connection = connection.filter_state.borrow();
            let object = info.filter_state.get(name).or_else(|| of_connection.get(name));
            if let Some(value) = object.and_then(|object| object.serialize()) {
                message(out, 21, |out| {
                    text(out, 1, name.as_bytes());
                    message(out, 2, |out| {
                        bytes(out, 1, b"type.googleapis.com/google.protobuf.StringValue");
                        message_unless_empty(out, 2, |out| text(out, 1, &value));
                    });
                });
            }
        }
        let mut scratch = Vec::new();
        for tag in &self.tags {
            scratch.clear();
            tag.value.write(cx, &mut scratch);
            let value = if scratch.is_empty() { tag.default.as_bytes() } else { &scratch };
            if !value.is_empty() {
                pair(out, 22, tag.name.as_bytes(), value);
            }
        }
        match timing.complete {
            Some(complete) => {
                message(out, 23, |out| elapsed(out, complete.saturating_duration_since(info.start)))
            }
            None => number(out, 27, 1),
        }
        number(out, 24, u64::from(upstream.attempts));
        if let Some(details) = &*connection.termination_details.borrow() {
            text(out, 25, details.as_bytes());
        }
        if !cx.log_type.is_of_attempt() {
            scratch.clear();
            self.stream_id.write(cx, &mut scratch);
            text(out, 26, &scratch);
        }
        if let Some(reason) = &*connection.transport_failure_reason.borrow() {
            text(out, 28, reason.as_bytes());
        }
        number(out, 29, info.bytes.wire_sent);
        number(out, 30, info.bytes.wire_received);
        number(out, 31, upstream.bytes.wire_sent);
        number(out, 32, upstream.bytes.wire_received);
        // Never negative.
        number(out, 33, u64::from(cx.log_type.number().unsigned_abs()));
    }
}

/// Headers that were asked for, several lines of one joined.
fn chosen(out: &mut Vec<u8>, field: u32, headers: &Headers, names: &[HeaderName]) {
    for name in names {
        if let Some(value) = headers.get_joined(name) {
            pair(out, field, name.as_name().as_bytes(), &value);
        }
    }
}

/// `envoy.config.core.v3.Address`
fn address(out: &mut Vec<u8>, field: u32, address: Option<&Address>) {
    let Some(address) = address else { return };
    message(out, field, |out| match address {
        Address::Ip(address) => message(out, 1, |out| {
            // Writing to a vector does not fail.
            message(out, 2, |out| drop(write!(out, "{}", address.ip())));
            present(out, 3, u64::from(address.port()));
        }),
        Address::Pipe(path) => message(out, 2, |out| bytes(out, 1, path.as_bytes())),
        Address::Internal { listener, endpoint_id } => message(out, 3, |out| {
            any_bytes(out, 1, listener.as_bytes());
            bytes(out, 2, endpoint_id.as_bytes());
        }),
    });
}

/// `TLSProperties`. The library does not tell the session's id.
fn tls_properties(out: &mut Vec<u8>, tls: &TlsInfo, connection: &ConnectionInfo) {
    number(
        out,
        1,
        match tls.version {
            "TLSv1.2" => 3,
            "TLSv1.3" => 4,
            _ => 0,
        },
    );
    if let Some(suite) = suite(tls.cipher) {
        message(out, 2, |out| number(out, 1, u64::from(suite)));
    }
    text(out, 3, connection.requested_server_name.as_deref().unwrap_or_default().as_bytes());
    message(out, 4, |out| {
        if let Some(certificate) = &tls.local {
            names(out, certificate);
            text(out, 2, certificate.subject.as_bytes());
        }
    });
    message(out, 5, |out| {
        if let Some(certificate) = &tls.peer {
            names(out, certificate);
            text(out, 2, certificate.subject.as_bytes());
            text(out, 3, certificate.issuer.as_bytes());
        }
    });
}

/// The URIs among the subject alternative names, which are all that Envoy tells.
fn names(out: &mut Vec<u8>, certificate: &Certificate) {
    for uri in &certificate.uri_sans {
        message(out, 1, |out| any_bytes(out, 1, uri.as_bytes()));
    }
}

/// The number of a cipher suite (RFC 8446 appendix B.4, RFC 5289, RFC 7905).
fn suite(name: &str) -> Option<u16> {
    Some(match name {
        "TLS_AES_128_GCM_SHA256" => 0x1301,
        "TLS_AES_256_GCM_SHA384" => 0x1302,
        "TLS_CHACHA20_POLY1305_SHA256" => 0x1303,
        "ECDHE-ECDSA-AES128-GCM-SHA256" => 0xc02b,
        "ECDHE-ECDSA-AES256-GCM-SHA384" => 0xc02c,
        "ECDHE-RSA-AES128-GCM-SHA256" => 0xc02f,
        "ECDHE-RSA-AES256-GCM-SHA384" => 0xc030,
        "ECDHE-RSA-CHACHA20-POLY1305" => 0xcca8,
        "ECDHE-ECDSA-CHACHA20-POLY1305" => 0xcca9,
        _ => return None,
    })
}

/// `google.protobuf.Timestamp`
fn time(out: &mut Vec<u8>, time: SystemTime) {
    elapsed(out, time.duration_since(UNIX_EPOCH).unwrap_or_default());
}

/// `google.protobuf.Duration`
fn elapsed(out: &mut Vec<u8>, elapsed: Duration) {
    number(out, 1, elapsed.as_secs());
    number(out, 2, u64::from(elapsed.subsec_nanos()));
}

/// `ResponseFlags`: most fields follow the bits, those that came later do not.
fn flags(out: &mut Vec<u8>, flags: ResponseFlags) {
    for flag in flags.iter() {
        let bit = flag as u32;
        match flag {
            ResponseFlag::UnauthorizedExternalService => message(out, 13, |out| number(out, 1, 1)),
            ResponseFlag::DownstreamRemoteReset => number(out, 28, 1),
            ResponseFlag::DropOverload | ResponseFlag::UnconditionalDropOverload => {}
            _ => number(out, bit + 1, 1),
        }
    }
}

/// `envoy.config.core.v3.Metadata`
fn metadata(out: &mut Vec<u8>, metadata: &Metadata) {
    for (namespace, value) in &metadata.filter {
        message(out, 1, |out| {
            bytes(out, 1, namespace.as_bytes());
            if let Value::Struct(fields) = value {
                message(out, 2, |out| object(out, fields));
            }
        });
    }
    for (namespace, (type_url, value)) in &metadata.typed {
        message(out, 2, |out| {
            bytes(out, 1, namespace.as_bytes());
            message(out, 2, |out| {
                bytes(out, 1, type_url.as_bytes());
                bytes(out, 2, value);
            });
        });
    }
}

/// `google.protobuf.Struct`
fn object(out: &mut Vec<u8>, fields: &waystation_filter_api::value::Struct) {
    for (key, value) in fields {
        message(out, 1, |out| {
            text(out, 1, key.as_bytes());
            message(out, 2, |out| any(out, value));
        });
    }
}

/// `google.protobuf.Value`
fn any(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null => present(out, 1, 0),
        Value::Number(number) => double(out, 2, *number),
        Value::String(text) => any_bytes(out, 3, text.as_bytes()),
        Value::Bool(flag) => present(out, 4, u64::from(*flag)),
        Value::Struct(fields) => message(out, 5, |out| object(out, fields)),
        Value::List(items) => message(out, 6, |out| {
            for item in items {
                message(out, 1, |out| any(out, item));
            }
        }),
    }
}
