//! One compiled operator.

use std::io::Write as _;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use waystation_filter_api::connection::{Certificate, TlsInfo};
use waystation_filter_api::stream::{HostView, Protocol, StreamInfo, Timing};
use waystation_filter_api::value::{Metadata, Value};
use waystation_http::Known;
use waystation_matchers::MetadataPath;

use super::address::{AddressOf, AddressPart};
use super::grpc::{GrpcForm, grpc_status_of_request};
use super::header::{Header, PathSource};
use super::time::TimeFormat;
use super::{FormatContext, address, header, json, xfcc};

/// What an operator wrote. A missing value is `None`, and nothing is written for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Written {
    /// Text, a string in JSON.
    Text,
    /// A number, a boolean, an object or a list: the text is its JSON form.
    Json,
}

/// An operator with its arguments resolved.
#[derive(Clone, Debug)]
pub(super) enum Operator {
    /// A text that is the same for the life of the process.
    Constant(Box<str>),
    Number(NumberOf),
    Text(TextOf),
    Header(Header),
    Path {
        source: PathSource,
        query: bool,
        max_length: Option<usize>,
    },
    QueryParameter {
        key: Box<str>,
        max_length: Option<usize>,
    },
    QueryParameters {
        decoded: bool,
        max_length: Option<usize>,
    },
    Details {
        allow_whitespace: bool,
    },
    GrpcStatus(GrpcForm),
    Xfcc(Box<str>),
    Duration(DurationOf),
    CommonDuration {
        from: Point,
        to: Point,
        unit: Unit,
    },
    Time {
        of: TimeOf,
        format: TimeFormat,
    },
    Address {
        of: AddressOf,
        part: AddressPart,
    },
    Tls {
        side: Side,
        field: TlsField,
    },
    Metadata {
        of: MetadataOf,
        path: MetadataPath,
        max_length: Option<usize>,
    },
    FilterState {
        key: Box<str>,
        form: StateForm,
        max_length: Option<usize>,
    },
    /// The first that has a value that is not empty.
    Coalesce {
        operators: Box<[Operator]>,
        max_length: Option<usize>,
    },
}

/// Plain numbers.
#[derive(Clone, Copy, Debug)]
pub(super) enum NumberOf {
    ResponseCode,
    BytesReceived,
    BytesSent,
    /// Only QUIC counts these.
    BytesRetransmitted,
    RequestHeaderBytes,
    ResponseHeaderBytes,
    ResponseTrailerBytes,
    DownstreamWireReceived,
    DownstreamWireSent,
    DownstreamHeaderReceived,
    DownstreamHeaderSent,
    UpstreamWireReceived,
    UpstreamWireSent,
    UpstreamHeaderReceived,
    UpstreamHeaderSent,
    ConnectionId,
    UpstreamConnectionId,
    UpstreamAttempts,
}

/// Plain texts.
#[derive(Clone, Copy, Debug)]
pub(super) enum TextOf {
    Protocol,
    UpstreamProtocol,
    Flags,
    FlagsLong,
    LocalReplyBody,
    LogType,
    RouteName,
    VirtualCluster,
    StreamId,
    UniqueId,
    ListenerName,
    FilterChainName,
    RequestedServerName,
    UpstreamCluster,
    UpstreamClusterRaw,
    UpstreamHostName,
    UpstreamHostNameWithoutPort,
    HostsAttempted,
    HostsAttemptedWithoutPort,
    HostNamesAttempted,
    HostNamesAttemptedWithoutPort,
    DownstreamTransportFailure,
    UpstreamTransportFailure,
    TerminationDetails,
}

/// Durations in whole milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) enum DurationOf {
    Total,
    Request,
    RequestTx,
    Response,
    ResponseTx,
    Handshake,
    PoolReady,
}

/// Points in time of `COMMON_DURATION`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Point {
    DownstreamRxBegin,
    DownstreamRxEnd,
    UpstreamTxBegin,
    UpstreamTxEnd,
    UpstreamRxBegin,
    UpstreamRxEnd,
    DownstreamTxBegin,
    DownstreamTxEnd,
}

/// Units of `COMMON_DURATION`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Unit {
    Milliseconds,
    Microseconds,
    Nanoseconds,
}

/// Times of day.
#[derive(Clone, Copy, Debug)]
pub(super) enum TimeOf {
    Start,
    Emit,
    CertificateStart(Side),
    CertificateEnd(Side),
}

/// Which connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    Downstream,
    Upstream,
}

/// Facts about a TLS session.
#[derive(Clone, Copy, Debug)]
pub(super) enum TlsField {
    Version,
    Cipher,
    Group,
    Peer(CertificateField),
    Local(CertificateField),
}

/// Facts about a certificate.
#[derive(Clone, Copy, Debug)]
pub(super) enum CertificateField {
    Subject,
    Issuer,
    Serial,
    Sha1,
    Sha256,
    UriSans,
    DnsSans,
    IpSans,
    EmailSans,
    Pem,
}

/// Where metadata comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MetadataOf {
    Dynamic,
    Cluster,
    UpstreamHost,
    Route,
    VirtualHost,
}

/// How a filter state object is written.
#[derive(Clone, Debug)]
pub(super) enum StateForm {
    Typed,
    Plain,
    Field(Box<str>),
}

impl Operator {
    /// Appends the value as text.
    pub(super) fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) -> Option<Written> {
        self.write_value(cx, out, true)
    }

    /// Appends the value for a place in JSON, where Envoy does not truncate metadata.
    pub(super) fn write_typed(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) -> Option<Written> {
        self.write_value(cx, out, false)
    }

    fn write_value(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>, as_text: bool) -> Option<Written> {
        match self {
            Self::Constant(text) => put(out, text.as_bytes()),
            Self::Number(of) => put_number(out, of.get(cx)),
            Self::Text(of) => of.write(cx, out),
            Self::Header(header) => put(out, header.get(cx)?),
            Self::Path { source, query, max_length } => {
                put(out, truncated(source.get(cx, *query)?, *max_length))
            }
            Self::QueryParameter { key, max_length } => {
                header::write_query_parameter(cx, key, *max_length, out).then_some(Written::Text)
            }
            Self::QueryParameters { decoded, max_length } => {
                header::write_query(cx, *decoded, *max_length, out).then_some(Written::Text)
            }
            Self::Details { allow_whitespace } => {
                let start = out.len();
                put(out, cx.info.details.as_ref()?.as_bytes());
                if !allow_whitespace {
                    underscores(&mut out[start..]);
                }
                Some(Written::Text)
            }
            Self::GrpcStatus(form) => form.write(grpc_status_of_request(cx)?, out),
            Self::Xfcc(key) => {
                let value = cx.request?.get_joined(Known::XForwardedClientCert)?;
                xfcc::write_value(&value, key, out).then_some(Written::Text)
            }
            Self::Duration(of) => put_number(out, of.get(cx)?.as_millis() as u64),
            Self::CommonDuration { from, to, unit } => {
                let duration = to.get(cx.info)?.checked_duration_since(from.get(cx.info)?)?;
                put_number(out, unit.of(duration))
            }
            Self::Time { of, format } => {
                format.write(of.get(cx)?, out);
                Some(Written::Text)
            }
            Self::Address { of, part } => address::write(*of, *part, cx.info, out),
            Self::Tls { side, field } => {
                let start = out.len();
                field.write(side.tls(cx.info)?, out);
                (out.len() > start).then_some(Written::Text)
            }
            Self::Metadata { of, path, max_length } => of.with(cx.info, |metadata| {
                let value = path.find(metadata)?;
                write_metadata(value, if as_text { *max_length } else { None }, out)
            }),
            Self::FilterState { key, form, max_length } => {
                write_filter_state(cx.info, key, form, if as_text { *max_length } else { None }, out)
            }
            Self::Coalesce { operators, max_length } => {
                let start = out.len();
                for operator in operators {
                    let written = operator.write_value(cx, out, as_text);
                    if let Some(written) = written
                        && out.len() > start
                    {
                        if as_text || written == Written::Text {
                            truncate_from(out, start, *max_length);
                        }
                        return Some(written);
                    }
                }
                None
            }
        }
    }
}

impl NumberOf {
    fn get(self, cx: &FormatContext<'_>) -> u64 {
        let info = cx.info;
        match self {
            Self::ResponseCode => u64::from(info.response_code),
            Self::BytesReceived => info.bytes.body_received,
            Self::BytesSent => info.bytes.body_sent,
            Self::BytesRetransmitted => 0,
            Self::RequestHeaderBytes => cx.request.map_or(0, |headers| headers.byte_size() as u64),
            Self::ResponseHeaderBytes => cx.response.map_or(0, |headers| headers.byte_size() as u64),
            Self::ResponseTrailerBytes => cx.trailers.map_or(0, |headers| headers.byte_size() as u64),
            Self::DownstreamWireReceived => info.bytes.wire_received,
            Self::DownstreamWireSent => info.bytes.wire_sent,
            Self::DownstreamHeaderReceived => info.bytes.header_received,
            Self::DownstreamHeaderSent => info.bytes.header_sent,
            Self::UpstreamWireReceived => info.upstream.bytes.wire_received,
            Self::UpstreamWireSent => info.upstream.bytes.wire_sent,
            Self::UpstreamHeaderReceived => info.upstream.bytes.header_received,
            Self::UpstreamHeaderSent => info.upstream.bytes.header_sent,
            Self::ConnectionId => info.connection.id,
            Self::UpstreamConnectionId => info.upstream.connection_id.unwrap_or(0),
            Self::UpstreamAttempts => u64::from(info.upstream.attempts),
        }
    }
}

impl TextOf {
    fn write(self, cx: &FormatContext<'_>, out: &mut Vec<u8>) -> Option<Written> {
        let info = cx.info;
        let connection = &*info.connection;
        match self {
            Self::Protocol => put(out, info.protocol.map(Protocol::as_str)?.as_bytes()),
            Self::UpstreamProtocol => put(out, info.upstream.protocol.map(Protocol::as_str)?.as_bytes()),
            Self::Flags | Self::FlagsLong if info.flags.is_empty() => put(out, b"-"),
            Self::Flags => {
                join(out, info.flags.iter(), |flag, out| out.extend_from_slice(flag.short().as_bytes()))
            }
            Self::FlagsLong => {
                join(out, info.flags.iter(), |flag, out| out.extend_from_slice(flag.long().as_bytes()))
            }
            Self::LocalReplyBody => put(out, cx.local_reply_body.as_bytes()),
            Self::LogType => put(out, cx.log_type.as_str().as_bytes()),
            Self::RouteName => {
                let (table, route) = info.route.as_ref()?;
                put_non_empty(out, table.route_name(*route))
            }
            Self::VirtualCluster => {
                let (table, _) = info.route.as_ref()?;
                put_non_empty(out, table.virtual_cluster_name(info.virtual_cluster?)?)
            }
            Self::StreamId => match cx.request.and_then(|headers| headers.get(Known::XRequestId)) {
                Some(id) => put(out, id),
                // Only a TCP session has an id without a request that carries it.
                None if info.protocol.is_none() => put_uuid(out, session_bits(info.id)),
                None => None,
            },
            Self::UniqueId => put_uuid(out, fastrand::u128(..)),
            Self::ListenerName => put_non_empty(out, &connection.listener),
            Self::FilterChainName => put_non_empty(out, &connection.filter_chain),
            Self::RequestedServerName => put_non_empty(out, connection.requested_server_name.as_ref()?),
            Self::UpstreamCluster => put_non_empty(out, info.upstream.cluster.as_ref()?.observability_name()),
            Self::UpstreamClusterRaw => put_non_empty(out, info.upstream.cluster.as_ref()?.name()),
            Self::UpstreamHostName => {
                put_host_name(out, &**info.upstream.host.as_ref()?, Port::Kept);
                Some(Written::Text)
            }
            Self::UpstreamHostNameWithoutPort => {
                put_host_name(out, &**info.upstream.host.as_ref()?, Port::Stripped);
                Some(Written::Text)
            }
            Self::HostsAttempted => attempted(info, out, |host, out| address::put_full(host.address(), out)),
            Self::HostsAttemptedWithoutPort => {
                attempted(info, out, |host, out| address::put_without_port(host.address(), out))
            }
            Self::HostNamesAttempted => {
                attempted(info, out, |host, out| put_host_name(out, host, Port::Kept))
            }
            Self::HostNamesAttemptedWithoutPort => {
                attempted(info, out, |host, out| put_host_name(out, host, Port::Stripped))
            }
            Self::DownstreamTransportFailure => {
                let reason = connection.transport_failure_reason.borrow();
                put_reason(out, reason.as_deref()?)
            }
            Self::UpstreamTransportFailure => {
                put_reason(out, info.upstream.transport_failure_reason.as_deref()?)
            }
            Self::TerminationDetails => {
                put_non_empty(out, connection.termination_details.borrow().as_deref()?)
            }
        }
    }
}

impl DurationOf {
    fn get(self, cx: &FormatContext<'_>) -> Option<Duration> {
        let StreamInfo { start, timing, .. } = cx.info;
        let since_start = |point: Option<Instant>| Some(point?.saturating_duration_since(*start));
        match self {
            Self::Total => since_start(Some(timing.complete.unwrap_or(cx.now))),
            Self::Request => since_start(timing.last_downstream_rx),
            Self::RequestTx => since_start(timing.last_upstream_tx),
            Self::Response => since_start(timing.first_upstream_rx),
            Self::ResponseTx => {
                Some(timing.last_downstream_tx?.saturating_duration_since(timing.first_upstream_rx?))
            }
            Self::Handshake => timing.downstream_handshake,
            Self::PoolReady => timing.pool_ready,
        }
    }
}

impl Point {
    fn get(self, info: &StreamInfo) -> Option<Instant> {
        let timing: &Timing = &info.timing;
        match self {
            Self::DownstreamRxBegin => Some(info.start),
            Self::DownstreamRxEnd => timing.last_downstream_rx,
            Self::UpstreamTxBegin => timing.first_upstream_tx,
            Self::UpstreamTxEnd => timing.last_upstream_tx,
            Self::UpstreamRxBegin => timing.first_upstream_rx,
            Self::UpstreamRxEnd => timing.last_upstream_rx,
            Self::DownstreamTxBegin => timing.first_downstream_tx,
            Self::DownstreamTxEnd => timing.last_downstream_tx,
        }
    }
}

impl Unit {
    fn of(self, duration: Duration) -> u64 {
        // 2^64 nanoseconds are 584 years.
        match self {
            Self::Milliseconds => duration.as_millis() as u64,
            Self::Microseconds => duration.as_micros() as u64,
            Self::Nanoseconds => duration.as_nanos() as u64,
        }
    }
}

impl TimeOf {
    fn get(self, cx: &FormatContext<'_>) -> Option<SystemTime> {
        let info = cx.info;
        let peer = |side: Side| side.tls(info)?.peer.as_deref();
        match self {
            Self::Start => Some(info.start_time),
            // The wall clock moves with the monotonic one, so that a log line never ends before it began.
            Self::Emit => info.start_time.checked_add(cx.now.saturating_duration_since(info.start)),
            Self::CertificateStart(side) => unix_time(peer(side)?.not_before),
            Self::CertificateEnd(side) => unix_time(peer(side)?.not_after),
        }
    }
}

fn unix_time(seconds: i64) -> Option<SystemTime> {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) }
}

impl Side {
    fn tls(self, info: &StreamInfo) -> Option<&TlsInfo> {
        match self {
            Self::Downstream => info.connection.tls.as_deref(),
            Self::Upstream => info.upstream.tls.as_deref(),
        }
    }
}

impl TlsField {
    fn write(self, tls: &TlsInfo, out: &mut Vec<u8>) {
        match self {
            Self::Version => out.extend_from_slice(tls.version.as_bytes()),
            Self::Cipher => out.extend_from_slice(tls.cipher.as_bytes()),
            Self::Group => out.extend_from_slice(tls.group.as_bytes()),
            Self::Peer(field) => {
                if let Some(certificate) = &tls.peer {
                    field.write(certificate, out);
                }
            }
            Self::Local(field) => {
                if let Some(certificate) = &tls.local {
                    field.write(certificate, out);
                }
            }
        }
    }
}

impl CertificateField {
    fn write(self, certificate: &Certificate, out: &mut Vec<u8>) {
        let text = match self {
            Self::Subject => &certificate.subject,
            Self::Issuer => &certificate.issuer,
            Self::Serial => &certificate.serial,
            Self::Sha1 => &certificate.sha1,
            Self::Sha256 => &certificate.sha256,
            Self::Pem => &certificate.url_encoded_pem,
            Self::UriSans => return put_list(out, &certificate.uri_sans),
            Self::DnsSans => return put_list(out, &certificate.dns_sans),
            Self::IpSans => return put_list(out, &certificate.ip_sans),
            Self::EmailSans => return put_list(out, &certificate.email_sans),
        };
        out.extend_from_slice(text.as_bytes());
    }
}

impl MetadataOf {
    fn with(self, info: &StreamInfo, read: impl FnOnce(&Metadata) -> Option<Written>) -> Option<Written> {
        match self {
            Self::Dynamic => info.with_metadata(read),
            Self::Cluster => read(info.upstream.cluster.as_ref()?.metadata()?),
            Self::UpstreamHost => read(info.upstream.host.as_ref()?.metadata()?),
            Self::Route => {
                let (table, route) = info.route.as_ref()?;
                read(table.route_metadata(*route)?)
            }
            Self::VirtualHost => {
                let (table, route) = info.route.as_ref()?;
                read(table.virtual_host_metadata(*route)?)
            }
        }
    }
}

fn write_metadata(value: &Value, max_length: Option<usize>, out: &mut Vec<u8>) -> Option<Written> {
    let start = out.len();
    let written = match value {
        Value::Null => return None,
        Value::String(text) => {
            out.extend_from_slice(text.as_bytes());
            Written::Text
        }
        value => {
            json::put_value(out, value);
            Written::Json
        }
    };
    truncate_from(out, start, max_length);
    Some(written)
}

fn write_filter_state(
    info: &StreamInfo,
    key: &str,
    form: &StateForm,
    max_length: Option<usize>,
    out: &mut Vec<u8>,
) -> Option<Written> {
    let start = out.len();
    let connection = info.connection.filter_state.borrow();
    let object = info.filter_state.get(key).or_else(|| connection.get(key))?;
    let written = match form {
        StateForm::Plain => put(out, &object.serialize()?),
        StateForm::Field(name) => put(out, &object.field(name)?),
        StateForm::Typed => {
            // As JSON of the object's message; a plain string is a quoted one.
            let serialized = object.serialize()?;
            match object.is_json() {
                true => out.extend_from_slice(&serialized),
                false => json::put_string(out, &serialized),
            }
            Some(Written::Json)
        }
    };
    truncate_from(out, start, max_length);
    written
}

/// The hosts of all attempts; without a retry only the last one is kept, and it counts once it was connected to.
fn attempted(
    info: &StreamInfo,
    out: &mut Vec<u8>,
    put: impl Fn(&dyn HostView, &mut Vec<u8>),
) -> Option<Written> {
    let upstream = &info.upstream;
    if !upstream.attempted.is_empty() {
        return join(out, upstream.attempted.iter(), |host, out| put(&**host, out));
    }
    upstream.connection_id?;
    put(&**upstream.host.as_ref()?, out);
    Some(Written::Text)
}

#[derive(Clone, Copy)]
enum Port {
    Kept,
    Stripped,
}

/// A host's DNS name, or its address when it has none.
fn put_host_name(out: &mut Vec<u8>, host: &dyn HostView, port: Port) {
    let start = out.len();
    match host.hostname() {
        "" => address::put_full(host.address(), out),
        name => out.extend_from_slice(name.as_bytes()),
    }
    if matches!(port, Port::Stripped) {
        let len = header::without_port(&out[start..]).len();
        out.truncate(start + len);
    }
}

fn join<T>(
    out: &mut Vec<u8>,
    items: impl Iterator<Item = T>,
    put: impl Fn(T, &mut Vec<u8>),
) -> Option<Written> {
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.push(b',');
        }
        put(item, out);
    }
    Some(Written::Text)
}

fn put(out: &mut Vec<u8>, text: &[u8]) -> Option<Written> {
    out.extend_from_slice(text);
    Some(Written::Text)
}

fn put_non_empty(out: &mut Vec<u8>, text: &str) -> Option<Written> {
    if text.is_empty() { None } else { put(out, text.as_bytes()) }
}

fn put_list(out: &mut Vec<u8>, items: &[String]) {
    join(out, items.iter(), |item, out| out.extend_from_slice(item.as_bytes()));
}

fn put_number(out: &mut Vec<u8>, number: u64) -> Option<Written> {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    Some(Written::Json)
}

/// A reason for humans, made one word so that a line can be split at its spaces.
fn put_reason(out: &mut Vec<u8>, reason: &str) -> Option<Written> {
    let start = out.len();
    let written = put_non_empty(out, reason);
    underscores(&mut out[start..]);
    written
}

/// Random bits that stay the same for one session of this process.
fn session_bits(id: u64) -> u128 {
    static SEED: LazyLock<u64> = LazyLock::new(|| fastrand::u64(..));
    fastrand::Rng::with_seed(SEED.wrapping_add(id)).u128(..)
}

/// A UUID of version 4 from random bits.
fn put_uuid(out: &mut Vec<u8>, random: u128) -> Option<Written> {
    let bits = random & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let _ = write!(
        out,
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        bits >> 96,
        bits >> 80 & 0xffff,
        bits >> 64 & 0xffff,
        bits >> 48 & 0xffff,
        bits & 0xffff_ffff_ffff
    );
    Some(Written::Text)
}

fn underscores(text: &mut [u8]) {
    for byte in text {
        if byte.is_ascii_whitespace() || *byte == 0x0b {
            *byte = b'_';
        }
    }
}

pub(super) fn truncated(text: &[u8], max_length: Option<usize>) -> &[u8] {
    &text[..text.len().min(max_length.unwrap_or(usize::MAX))]
}

fn truncate_from(out: &mut Vec<u8>, start: usize, max_length: Option<usize>) {
    if let Some(max_length) = max_length {
        out.truncate(start.saturating_add(max_length));
    }
}
