//! From a command's name and arguments to its operator.

use waystation_http::{HeaderName, Known};
use waystation_matchers::MetadataPath;
use waystation_schema::ConfigError;

use super::address::{AddressOf, AddressPart};
use super::grpc::GrpcForm;
use super::header::{Header, PathSource, Source};
use super::operator::{
    CertificateField, DurationOf, MetadataOf, NumberOf, Operator, Point, Side, StateForm, TextOf, TimeOf,
    TlsField, Unit,
};
use super::time::TimeFormat;
use super::{Extensions, coalesce, xfcc};

/// A command as it stands in a format string: `%NAME(arguments):max_length%`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command<'a> {
    pub(super) name: &'a str,
    pub(super) arguments: &'a str,
    pub(super) max_length: Option<usize>,
}

/// Compiles a command of a format string.
pub(super) fn compile(command: Command<'_>, extensions: Extensions) -> Result<Operator, ConfigError> {
    compile_known(command, extensions)?
        .ok_or_else(|| ConfigError::new(format!("Not supported field in StreamInfo: {}", command.name)))
}

/// Compiles a command; `None` when Envoy has none of that name.
pub(super) fn compile_known(
    command: Command<'_>,
    extensions: Extensions,
) -> Result<Option<Operator>, ConfigError> {
    let Command { name, arguments, max_length } = command;
    if let Some(operator) = without_arguments(name).or_else(|| address(name)) {
        if !arguments.is_empty() || max_length.is_some() {
            return Err(ConfigError::new(format!("{name} does not take any parameters or length")));
        }
        return Ok(Some(operator));
    }
    with_arguments(command, extensions)?.map_or_else(
        || if UNSUPPORTED.contains(&name) { Err(unsupported(name)) } else { Ok(None) },
        |operator| Ok(Some(operator)),
    )
}

/// Commands of Envoy 1.40 whose answer this proxy does not know.
const UNSUPPORTED: &[&str] = &[
    "CEL",
    "DOWNSTREAM_CX_RTT",
    "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED",
    "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT",
    "DOWNSTREAM_DETECTED_CLOSE_TYPE",
    "DOWNSTREAM_LOCAL_CLOSE_REASON",
    "DOWNSTREAM_LOCAL_OTHERNAME_SAN",
    "DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_1",
    "DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_256",
    "DOWNSTREAM_PEER_CHAIN_SERIALS",
    "DOWNSTREAM_PEER_ISSUER_FINGERPRINT_256",
    "DOWNSTREAM_PEER_ISSUER_SERIAL",
    "DOWNSTREAM_PEER_OTHERNAME_SAN",
    "DOWNSTREAM_TLS_SESSION_ID",
    "EMIT_TIME_LOCAL",
    "FILE_CONTENT",
    "PACKETS_RETRANSMITTED",
    "ROUNDTRIP_DURATION",
    "ROUTE_RESOLUTION_COUNT",
    "ROUTE_RESOLUTION_TIME_US",
    "SECRET",
    "START_TIME_LOCAL",
    "TLS_JA3_FINGERPRINT",
    "TLS_JA4_FINGERPRINT",
    "TRACE_ID",
    "TYPED_CEL",
    "UPSTREAM_CONNECTION_IDS_ATTEMPTED",
    "UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED",
    "UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT",
    "UPSTREAM_DETECTED_CLOSE_TYPE",
    "UPSTREAM_FILTER_STATE",
    "UPSTREAM_LOCAL_CLOSE_REASON",
    "UPSTREAM_SERVER_NAME",
    "UPSTREAM_TLS_SESSION_ID",
];

fn unsupported(what: &str) -> ConfigError {
    ConfigError::new(format!("not supported in this version: %{what}%"))
}

/// Commands that take neither arguments nor a length.
fn without_arguments(name: &str) -> Option<Operator> {
    use CertificateField as Certificate;
    let number = |of| Some(Operator::Number(of));
    let text = |of| Some(Operator::Text(of));
    let duration = |of| Some(Operator::Duration(of));
    let tls = |side, field| Some(Operator::Tls { side, field });
    let downstream_peer = |field| tls(Side::Downstream, TlsField::Peer(field));
    let downstream_local = |field| tls(Side::Downstream, TlsField::Local(field));
    let upstream_peer = |field| tls(Side::Upstream, TlsField::Peer(field));
    let upstream_local = |field| tls(Side::Upstream, TlsField::Local(field));
    match name {
        "RESPONSE_CODE" => number(NumberOf::ResponseCode),
        "BYTES_RECEIVED" => number(NumberOf::BytesReceived),
        "BYTES_SENT" => number(NumberOf::BytesSent),
        "BYTES_RETRANSMITTED" => number(NumberOf::BytesRetransmitted),
        "REQUEST_HEADERS_BYTES" => number(NumberOf::RequestHeaderBytes),
        "RESPONSE_HEADERS_BYTES" => number(NumberOf::ResponseHeaderBytes),
        "RESPONSE_TRAILERS_BYTES" => number(NumberOf::ResponseTrailerBytes),
        "DOWNSTREAM_WIRE_BYTES_RECEIVED" => number(NumberOf::DownstreamWireReceived),
        "DOWNSTREAM_WIRE_BYTES_SENT" => number(NumberOf::DownstreamWireSent),
        "DOWNSTREAM_HEADER_BYTES_RECEIVED" => number(NumberOf::DownstreamHeaderReceived),
        "DOWNSTREAM_HEADER_BYTES_SENT" => number(NumberOf::DownstreamHeaderSent),
        "UPSTREAM_WIRE_BYTES_RECEIVED" => number(NumberOf::UpstreamWireReceived),
        "UPSTREAM_WIRE_BYTES_SENT" => number(NumberOf::UpstreamWireSent),
        "UPSTREAM_HEADER_BYTES_RECEIVED" => number(NumberOf::UpstreamHeaderReceived),
        "UPSTREAM_HEADER_BYTES_SENT" => number(NumberOf::UpstreamHeaderSent),
        "CONNECTION_ID" => number(NumberOf::ConnectionId),
        "UPSTREAM_CONNECTION_ID" => number(NumberOf::UpstreamConnectionId),
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => number(NumberOf::UpstreamAttempts),

        "PROTOCOL" => text(TextOf::Protocol),
        "UPSTREAM_PROTOCOL" => text(TextOf::UpstreamProtocol),
        "RESPONSE_FLAGS" => text(TextOf::Flags),
        "RESPONSE_FLAGS_LONG" => text(TextOf::FlagsLong),
        // Set by extensions that this proxy does not have; without one, Envoy writes nothing.
        "CUSTOM_FLAGS" => Some(Operator::Constant("".into())),
        "LOCAL_REPLY_BODY" => text(TextOf::LocalReplyBody),
        "ACCESS_LOG_TYPE" => text(TextOf::LogType),
        "ROUTE_NAME" => text(TextOf::RouteName),
        "VIRTUAL_CLUSTER_NAME" => text(TextOf::VirtualCluster),
        "STREAM_ID" => text(TextOf::StreamId),
        "UNIQUE_ID" => text(TextOf::UniqueId),
        "HOSTNAME" => Some(Operator::Constant(host_name())),
        "LISTENER_NAME" => text(TextOf::ListenerName),
        "FILTER_CHAIN_NAME" => text(TextOf::FilterChainName),
        "REQUESTED_SERVER_NAME" => text(TextOf::RequestedServerName),
        "UPSTREAM_CLUSTER" => text(TextOf::UpstreamCluster),
        "UPSTREAM_CLUSTER_RAW" => text(TextOf::UpstreamClusterRaw),
        "UPSTREAM_HOST_NAME" => text(TextOf::UpstreamHostName),
        "UPSTREAM_HOST_NAME_WITHOUT_PORT" => text(TextOf::UpstreamHostNameWithoutPort),
        "UPSTREAM_HOSTS_ATTEMPTED" => text(TextOf::HostsAttempted),
        "UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT" => text(TextOf::HostsAttemptedWithoutPort),
        "UPSTREAM_HOST_NAMES_ATTEMPTED" => text(TextOf::HostNamesAttempted),
        "UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT" => text(TextOf::HostNamesAttemptedWithoutPort),
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => text(TextOf::DownstreamTransportFailure),
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => text(TextOf::UpstreamTransportFailure),
        "CONNECTION_TERMINATION_DETAILS" => text(TextOf::TerminationDetails),

        "DURATION" => duration(DurationOf::Total),
        "REQUEST_DURATION" => duration(DurationOf::Request),
        "REQUEST_TX_DURATION" => duration(DurationOf::RequestTx),
        "RESPONSE_DURATION" => duration(DurationOf::Response),
        "RESPONSE_TX_DURATION" => duration(DurationOf::ResponseTx),
        "DOWNSTREAM_HANDSHAKE_DURATION" => duration(DurationOf::Handshake),
        "UPSTREAM_CONNECTION_POOL_READY_DURATION" => duration(DurationOf::PoolReady),

        "DOWNSTREAM_TLS_VERSION" => tls(Side::Downstream, TlsField::Version),
        "DOWNSTREAM_TLS_CIPHER" => tls(Side::Downstream, TlsField::Cipher),
        "DOWNSTREAM_TLS_GROUP" => tls(Side::Downstream, TlsField::Group),
        "UPSTREAM_TLS_VERSION" => tls(Side::Upstream, TlsField::Version),
        "UPSTREAM_TLS_CIPHER" => tls(Side::Upstream, TlsField::Cipher),
        "UPSTREAM_TLS_GROUP" => tls(Side::Upstream, TlsField::Group),
        "DOWNSTREAM_PEER_SUBJECT" => downstream_peer(Certificate::Subject),
        "DOWNSTREAM_PEER_ISSUER" => downstream_peer(Certificate::Issuer),
        "DOWNSTREAM_PEER_SERIAL" => downstream_peer(Certificate::Serial),
        "DOWNSTREAM_PEER_FINGERPRINT_1" => downstream_peer(Certificate::Sha1),
        "DOWNSTREAM_PEER_FINGERPRINT_256" => downstream_peer(Certificate::Sha256),
        "DOWNSTREAM_PEER_CERT" => downstream_peer(Certificate::Pem),
        "DOWNSTREAM_PEER_URI_SAN" => downstream_peer(Certificate::UriSans),
        "DOWNSTREAM_PEER_DNS_SAN" => downstream_peer(Certificate::DnsSans),
        "DOWNSTREAM_PEER_IP_SAN" => downstream_peer(Certificate::IpSans),
        "DOWNSTREAM_PEER_EMAIL_SAN" => downstream_peer(Certificate::EmailSans),
        "DOWNSTREAM_LOCAL_SUBJECT" => downstream_local(Certificate::Subject),
        "DOWNSTREAM_LOCAL_URI_SAN" => downstream_local(Certificate::UriSans),
        "DOWNSTREAM_LOCAL_DNS_SAN" => downstream_local(Certificate::DnsSans),
        "DOWNSTREAM_LOCAL_IP_SAN" => downstream_local(Certificate::IpSans),
        "DOWNSTREAM_LOCAL_EMAIL_SAN" => downstream_local(Certificate::EmailSans),
        "UPSTREAM_PEER_SUBJECT" => upstream_peer(Certificate::Subject),
        "UPSTREAM_PEER_ISSUER" => upstream_peer(Certificate::Issuer),
        "UPSTREAM_PEER_CERT" => upstream_peer(Certificate::Pem),
        "UPSTREAM_PEER_URI_SAN" => upstream_peer(Certificate::UriSans),
        "UPSTREAM_PEER_DNS_SAN" => upstream_peer(Certificate::DnsSans),
        "UPSTREAM_PEER_IP_SAN" => upstream_peer(Certificate::IpSans),
        "UPSTREAM_LOCAL_URI_SAN" => upstream_local(Certificate::UriSans),
        "UPSTREAM_LOCAL_DNS_SAN" => upstream_local(Certificate::DnsSans),
        "UPSTREAM_LOCAL_IP_SAN" => upstream_local(Certificate::IpSans),
        _ => None,
    }
}

/// Addresses without arguments: whole, a port, an endpoint id.
fn address(name: &str) -> Option<Operator> {
    let (of, part) = match name {
        "DOWNSTREAM_REMOTE_ADDRESS" => (AddressOf::DownstreamRemote, AddressPart::Full),
        "DOWNSTREAM_REMOTE_PORT" => (AddressOf::DownstreamRemote, AddressPart::Port),
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => (AddressOf::DownstreamDirectRemote, AddressPart::Full),
        "DOWNSTREAM_DIRECT_REMOTE_PORT" => (AddressOf::DownstreamDirectRemote, AddressPart::Port),
        "DOWNSTREAM_LOCAL_ADDRESS" => (AddressOf::DownstreamLocal, AddressPart::Full),
        "DOWNSTREAM_LOCAL_PORT" => (AddressOf::DownstreamLocal, AddressPart::Port),
        "DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID" => (AddressOf::DownstreamLocal, AddressPart::EndpointId),
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS" => (AddressOf::DownstreamDirectLocal, AddressPart::Full),
        "DOWNSTREAM_DIRECT_LOCAL_PORT" => (AddressOf::DownstreamDirectLocal, AddressPart::Port),
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_ENDPOINT_ID" => {
            (AddressOf::DownstreamDirectLocal, AddressPart::EndpointId)
        }
        "UPSTREAM_HOST" => (AddressOf::UpstreamHost, AddressPart::Full),
        "UPSTREAM_REMOTE_ADDRESS" => (AddressOf::UpstreamRemote, AddressPart::Full),
        "UPSTREAM_REMOTE_PORT" => (AddressOf::UpstreamRemote, AddressPart::Port),
        "UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID" => (AddressOf::UpstreamRemote, AddressPart::EndpointId),
        "UPSTREAM_LOCAL_ADDRESS" => (AddressOf::UpstreamLocal, AddressPart::Full),
        "UPSTREAM_LOCAL_PORT" => (AddressOf::UpstreamLocal, AddressPart::Port),
        _ => return None,
    };
    Some(Operator::Address { of, part })
}

fn with_arguments(command: Command<'_>, extensions: Extensions) -> Result<Option<Operator>, ConfigError> {
    let Command { name, arguments, max_length } = command;
    Ok(Some(match name {
        "REQ" | "REQUEST_HEADER" | "STREAM_INFO_REQ" => header(command, Source::Request)?,
        "RESP" | "RESPONSE_HEADER" => header(command, Source::Response)?,
        "TRAILER" | "RESPONSE_TRAILER" => header(command, Source::Trailers)?,
        "REQ_WITHOUT_QUERY" if extensions.req_without_query => match header(command, Source::Request)? {
            Operator::Header(header) => Operator::Header(Header { without_query: true, ..header }),
            operator => operator,
        },
        "PATH" => path(arguments, max_length)?,
        "QUERY_PARAM" => {
            command.requires_arguments()?;
            Operator::QueryParameter { key: arguments.into(), max_length }
        }
        "QUERY_PARAMS" => {
            let decoded = match arguments {
                "" | "ORIG" => false,
                "DECODED" => true,
                option => {
                    return Err(ConfigError::new(format!(
                        "Invalid QUERY_PARAMS option: '{option}', only 'ORIG'/'DECODED' are allowed"
                    )));
                }
            };
            Operator::QueryParameters { decoded, max_length }
        }
        "RESPONSE_CODE_DETAILS" => {
            command.allows_no_length()?;
            Operator::Details { allow_whitespace: arguments == "ALLOW_WHITESPACES" }
        }
        "GRPC_STATUS" => {
            command.allows_no_length()?;
            Operator::GrpcStatus(match arguments {
                "" | "CAMEL_STRING" => GrpcForm::Camel,
                "SNAKE_STRING" => GrpcForm::Snake,
                "NUMBER" => GrpcForm::Number,
                form => {
                    return Err(ConfigError::new(format!(
                        "GrpcStatusFormatter only supports CAMEL_STRING, SNAKE_STRING or NUMBER. Got: {form}"
                    )));
                }
            })
        }
        "GRPC_STATUS_NUMBER" => {
            if !arguments.is_empty() || max_length.is_some() {
                return Err(ConfigError::new(format!("{name} does not take any parameters or length")));
            }
            Operator::GrpcStatus(GrpcForm::Number)
        }
        "ENVIRONMENT" => {
            command.requires_arguments()?;
            let value = std::env::var_os(arguments);
            let mut value = value.map_or_else(|| b"-".to_vec(), std::ffi::OsString::into_encoded_bytes);
            value.truncate(max_length.unwrap_or(usize::MAX));
            Operator::Constant(String::from_utf8_lossy(&value).into())
        }
        "XFCC_VALUE" => {
            let key = arguments.to_ascii_lowercase();
            if key.is_empty() {
                return Err(ConfigError::new("XFCC_VALUE command requires a subcommand"));
            }
            if !xfcc::KEYS.contains(&&*key) {
                return Err(ConfigError::new(format!(
                    "XFCC_VALUE command does not support subcommand: {key}"
                )));
            }
            Operator::Xfcc(key.into())
        }
        "COALESCE" => {
            command.requires_arguments()?;
            coalesce::compile(arguments, max_length)?
        }
        "COMMON_DURATION" => {
            command.requires_arguments()?;
            command.allows_no_length()?;
            common_duration(arguments)?
        }
        "START_TIME" => time(command, TimeOf::Start)?,
        "EMIT_TIME" => time(command, TimeOf::Emit)?,
        "DOWNSTREAM_PEER_CERT_V_START" => time(command, TimeOf::CertificateStart(Side::Downstream))?,
        "DOWNSTREAM_PEER_CERT_V_END" => time(command, TimeOf::CertificateEnd(Side::Downstream))?,
        "UPSTREAM_PEER_CERT_V_START" => time(command, TimeOf::CertificateStart(Side::Upstream))?,
        "UPSTREAM_PEER_CERT_V_END" => time(command, TimeOf::CertificateEnd(Side::Upstream))?,
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => masked(command, AddressOf::DownstreamRemote)?,
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            masked(command, AddressOf::DownstreamDirectRemote)?
        }
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => masked(command, AddressOf::DownstreamLocal)?,
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT" => masked(command, AddressOf::DownstreamDirectLocal)?,
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => masked(command, AddressOf::UpstreamRemote)?,
        "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => masked(command, AddressOf::UpstreamLocal)?,
        "DYNAMIC_METADATA" => metadata(command, MetadataOf::Dynamic, arguments)?,
        "CLUSTER_METADATA" => metadata(command, MetadataOf::Cluster, arguments)?,
        "UPSTREAM_METADATA" => metadata(command, MetadataOf::UpstreamHost, arguments)?,
        "METADATA" => {
            let (of, path) = arguments.split_once(':').unwrap_or((arguments, ""));
            let of = match of {
                "DYNAMIC" => MetadataOf::Dynamic,
                "CLUSTER" => MetadataOf::Cluster,
                "UPSTREAM_HOST" => MetadataOf::UpstreamHost,
                "ROUTE" => MetadataOf::Route,
                "VIRTUAL_HOST" => MetadataOf::VirtualHost,
                "LISTENER" | "LISTENER_FILTER_CHAIN" => return Err(unsupported(&format!("METADATA({of})"))),
                of => return Err(ConfigError::new(format!("{of} is not supported type of metadata"))),
            };
            metadata(command, of, path)?
        }
        "FILTER_STATE" => filter_state(command)?,
        _ => return Ok(None),
    }))
}

impl Command<'_> {
    fn requires_arguments(&self) -> Result<(), ConfigError> {
        if self.arguments.is_empty() {
            return Err(ConfigError::new(format!("{} requires parameters", self.name)));
        }
        Ok(())
    }

    fn allows_no_length(&self) -> Result<(), ConfigError> {
        if self.max_length.is_some() {
            return Err(ConfigError::new(format!("{} does not allow length to be specified.", self.name)));
        }
        Ok(())
    }
}

fn header(command: Command<'_>, source: Source) -> Result<Operator, ConfigError> {
    command.requires_arguments()?;
    let mut names = command.arguments.split('?');
    let main = names.next().unwrap_or_default();
    let alternative = names.next().filter(|name| !name.is_empty());
    if names.next().is_some() {
        return Err(ConfigError::new(format!(
            "More than 1 alternative header specified in token: {}",
            command.arguments
        )));
    }
    let parse = |name: &str| match HeaderName::parse(name) {
        // A request has its host in `:authority`, and Envoy knows that by both names.
        Ok(name) if name.as_name().known() == Some(Known::Host) && matches!(source, Source::Request) => {
            Ok(HeaderName::from(Known::Authority))
        }
        Ok(name) => Ok(name),
        Err(_) => {
            Err(ConfigError::new("Invalid header configuration. Format string contains invalid characters."))
        }
    };
    Ok(Operator::Header(Header {
        source,
        main: parse(main)?,
        alternative: alternative.map(parse).transpose()?,
        max_length: command.max_length,
        without_query: false,
    }))
}

fn path(arguments: &str, max_length: Option<usize>) -> Result<Operator, ConfigError> {
    let (query, source) = arguments.split_once(':').unwrap_or((arguments, ""));
    let query = match query {
        "" | "WQ" => true,
        "NQ" => false,
        option => {
            return Err(ConfigError::new(format!(
                "Invalid PATH option: '{option}', only 'WQ'/'NQ' are allowed"
            )));
        }
    };
    let source = match source {
        "ORIG" => PathSource::Original,
        "PATH" => PathSource::Current,
        "" | "ORIG_OR_PATH" => PathSource::OriginalOrCurrent,
        option => {
            return Err(ConfigError::new(format!(
                "Invalid PATH option: '{option}', only 'ORIG'/'PATH'/'ORIG_OR_PATH' are allowed"
            )));
        }
    };
    Ok(Operator::Path { source, query, max_length })
}

fn common_duration(arguments: &str) -> Result<Operator, ConfigError> {
    let invalid = || ConfigError::new(format!("Invalid common duration configuration: {arguments}."));
    let mut parts = arguments.split(':');
    let from = parts.next().ok_or_else(invalid)?;
    let to = parts.next().ok_or_else(invalid)?;
    let unit = match parts.next() {
        None | Some("ms") => Unit::Milliseconds,
        Some("us") => Unit::Microseconds,
        Some("ns") => Unit::Nanoseconds,
        Some(unit) => return Err(ConfigError::new(format!("Invalid common duration precision: {unit}."))),
    };
    if parts.next().is_some() {
        return Err(invalid());
    }
    let point = |name: &str| {
        Ok(match name {
            "DS_RX_BEG" => Point::DownstreamRxBegin,
            "DS_RX_END" => Point::DownstreamRxEnd,
            "US_TX_BEG" => Point::UpstreamTxBegin,
            "US_TX_END" => Point::UpstreamTxEnd,
            "US_RX_BEG" => Point::UpstreamRxBegin,
            "US_RX_END" => Point::UpstreamRxEnd,
            "DS_TX_BEG" => Point::DownstreamTxBegin,
            "DS_TX_END" => Point::DownstreamTxEnd,
            // `US_CX_BEG`, `US_CX_END`, `US_HS_END`, and points that filters set under names of their own.
            name => return Err(unsupported(&format!("COMMON_DURATION({name})"))),
        })
    };
    Ok(Operator::CommonDuration { from: point(from)?, to: point(to)?, unit })
}

fn time(command: Command<'_>, of: TimeOf) -> Result<Operator, ConfigError> {
    command.allows_no_length()?;
    Ok(Operator::Time { of, format: TimeFormat::compile(command.arguments)? })
}

/// An address without its port, or its network when the argument is a prefix length; any other argument is ignored,
/// as in Envoy.
fn masked(command: Command<'_>, of: AddressOf) -> Result<Operator, ConfigError> {
    command.allows_no_length()?;
    let part = match command.arguments.parse() {
        Ok(len) => AddressPart::Masked(len),
        Err(_) => AddressPart::WithoutPort,
    };
    Ok(Operator::Address { of, part })
}

fn metadata(command: Command<'_>, of: MetadataOf, path: &str) -> Result<Operator, ConfigError> {
    command.requires_arguments()?;
    let mut keys = path.split(':');
    let namespace = keys.next().unwrap_or_default();
    Ok(Operator::Metadata { of, path: MetadataPath::new(namespace, keys), max_length: command.max_length })
}

fn filter_state(command: Command<'_>) -> Result<Operator, ConfigError> {
    command.requires_arguments()?;
    let mut parts = command.arguments.split(':');
    let key = parts.next().unwrap_or_default();
    if key.is_empty() {
        return Err(ConfigError::new("Invalid filter state configuration, key cannot be empty."));
    }
    let form = parts.next().unwrap_or_default();
    let field = parts.next().unwrap_or_default();
    let form = match (form, field) {
        ("" | "TYPED", "") => StateForm::Typed,
        ("PLAIN", "") => StateForm::Plain,
        ("FIELD", field) if !field.is_empty() => StateForm::Field(field.into()),
        ("" | "TYPED" | "PLAIN" | "FIELD", _) => {
            return Err(ConfigError::new(
                "Invalid filter state serialize type, FIELD should be used with the field name.",
            ));
        }
        _ => {
            return Err(ConfigError::new(
                "Invalid filter state serialize type, only support PLAIN/TYPED/FIELD.",
            ));
        }
    };
    Ok(Operator::FilterState { key: key.into(), form, max_length: command.max_length })
}

/// The machine's name, which the standard library has no call for.
fn host_name() -> Box<str> {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "-".into(), |name| name.trim_end().into())
}
