//! What matcher trees look at.

use std::borrow::Cow;
use std::fmt;
use std::io::Write as _;
use std::net::IpAddr;
use std::ops::Deref;

use envoy_types::pb::envoy::extensions::matching::common_inputs as common;
use envoy_types::pb::envoy::r#type::matcher::v3 as http;
use envoy_types::pb::google::protobuf::Any;
use prost::Name;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{Certificate, ConnectionInfo};
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::value::Value;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_http::{HeaderName, Headers, Known};
use waystation_schema::{At, ConfigError};

use crate::metadata::MetadataPath;
use crate::query::query_parameter;

/// Which inputs make sense where a matcher stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InputScope {
    /// Connections: listeners' filter chain matchers, network RBAC.
    Network,
    /// HTTP streams; connection inputs are available, too.
    Http,
    /// The RBAC network filter: what Envoy lets it look at.
    NetworkRbac,
    /// The RBAC HTTP filter: likewise.
    HttpRbac,
}

/// What is known at the moment of matching. A listener knows a connection, a route knows the request head, an
/// access log knows everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inputs<'a> {
    /// The downstream connection.
    pub connection: Option<&'a ConnectionInfo>,
    /// The stream.
    pub stream: Option<&'a StreamInfo>,
    /// The request head.
    pub request: Option<&'a Headers>,
    /// The request trailers.
    pub request_trailers: Option<&'a Headers>,
    /// The response head.
    pub response: Option<&'a Headers>,
    /// The response trailers.
    pub response_trailers: Option<&'a Headers>,
    /// Whether the response was made here, once there is one.
    pub local_reply: bool,
}

impl<'a> Inputs<'a> {
    /// A connection without a stream.
    pub fn network(connection: &'a ConnectionInfo) -> Self {
        Self { connection: Some(connection), ..Self::default() }
    }

    /// A stream whose request head has arrived.
    pub fn request(stream: &'a StreamInfo, request: &'a Headers) -> Self {
        Self {
            connection: Some(&stream.connection),
            stream: Some(stream),
            request: Some(request),
            ..Self::default()
        }
    }
}

/// The value of an input.
#[derive(Clone, Debug)]
pub enum Data<'a> {
    /// It may still come: matching has to wait.
    NotYet,
    /// There is none.
    Missing,
    /// Text.
    Text(Cow<'a, [u8]>),
    /// An address; as text it has no port.
    Address(IpAddr),
    /// A port.
    Port(u16),
    /// A metadata value.
    Value(Cow<'a, Value>),
}

/// Text that is there, or a number or address made into text in place.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a>(TextOf<'a>);

#[derive(Clone, Copy, Debug)]
enum TextOf<'a> {
    There(&'a [u8]),
    /// The longest are addresses of IPv6 that end as those of IPv4 do.
    Made([u8; 45], u8),
}

impl Deref for Text<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            TextOf::There(text) => text,
            TextOf::Made(text, len) => &text[..usize::from(*len)],
        }
    }
}

impl Text<'_> {
    fn make(value: impl fmt::Display) -> Self {
        let mut text = [0; 45];
        let mut rest = &mut text[..];
        write!(rest, "{value}").expect("addresses and ports have no more characters");
        let len = 45 - rest.len();
        Self(TextOf::Made(text, len as u8))
    }
}

impl Data<'_> {
    /// The value as text.
    pub fn text(&self) -> Option<Text<'_>> {
        match self {
            Self::Text(text) => Some(Text(TextOf::There(text))),
            Self::Address(address) => Some(Text::make(address)),
            Self::Port(port) => Some(Text::make(port)),
            Self::Value(value) => value.as_str().map(|text| Text(TextOf::There(text.as_bytes()))),
            Self::NotYet | Self::Missing => None,
        }
    }

    /// The value as an address.
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Address(address) => Some(*address),
            Self::Text(text) => str::from_utf8(text).ok()?.parse().ok(),
            _ => None,
        }
    }
}

/// A compiled input extension.
#[derive(Clone, Debug)]
pub enum Input {
    /// `HttpRequestHeaderMatchInput`.
    RequestHeader(HeaderName),
    /// `HttpRequestTrailerMatchInput`.
    RequestTrailer(HeaderName),
    /// `HttpResponseHeaderMatchInput`.
    ResponseHeader(HeaderName),
    /// `HttpResponseTrailerMatchInput`.
    ResponseTrailer(HeaderName),
    /// `HttpRequestQueryParamMatchInput`, percent-decoded.
    QueryParam(Box<str>),
    /// `HttpResponseStatusCodeMatchInput`.
    StatusCode,
    /// `HttpResponseStatusCodeClassMatchInput`: `2xx`.
    StatusCodeClass,
    /// `HttpResponseLocalReplyMatchInput`: `true` or `false`.
    LocalReply,
    /// `DestinationIPInput`.
    DestinationIp,
    /// `DestinationPortInput`.
    DestinationPort,
    /// `SourceIPInput`.
    SourceIp,
    /// `SourcePortInput`.
    SourcePort,
    /// `DirectSourceIPInput`.
    DirectSourceIp,
    /// `SourceTypeInput`: `local` or missing.
    SourceType,
    /// `ServerNameInput`.
    ServerName,
    /// `TransportProtocolInput`.
    TransportProtocol,
    /// `ApplicationProtocolInput`: `'h2','http/1.1'`.
    ApplicationProtocol,
    /// `FilterStateInput`: an object by key, or one of its fields.
    FilterState {
        /// The object's key.
        key: Box<str>,
        /// The field; empty for the whole object.
        field: Box<str>,
    },
    /// `DynamicMetadataInput`.
    DynamicMetadata(MetadataPath),
    /// `UriSanInput` of the peer's certificate.
    UriSan,
    /// `DnsSanInput` of the peer's certificate.
    DnsSan,
    /// `SubjectInput` of the peer's certificate.
    Subject,
    /// `environment_variable.Config`, read when it is compiled; missing when unset.
    Environment(Option<Box<[u8]>>),
}

impl Input {
    /// Compiles the `typed_config` of an input extension.
    pub fn compile(any: &Any, scope: InputScope) -> Result<Self, ConfigError> {
        let input = Self::decode(any)?;
        let is_http = matches!(
            input,
            Self::RequestHeader(_)
                | Self::RequestTrailer(_)
                | Self::ResponseHeader(_)
                | Self::ResponseTrailer(_)
                | Self::QueryParam(_)
                | Self::StatusCode
                | Self::StatusCodeClass
                | Self::LocalReply
        );
        if is_http && scope == InputScope::Network {
            return Err(ConfigError::new(format!("{} needs an HTTP request", type_name(any))));
        }
        input.check_rbac(scope, type_name(any))?;
        Ok(input)
    }

    fn check_rbac(&self, scope: InputScope, name: &str) -> Result<(), ConfigError> {
        let (filter, only_here) = match scope {
            InputScope::Network | InputScope::Http => return Ok(()),
            InputScope::NetworkRbac => ("RBAC network filter cannot match", false),
            InputScope::HttpRbac => (
                "RBAC HTTP filter cannot match on",
                matches!(self, Self::RequestHeader(_) | Self::DynamicMetadata(_)),
            ),
        };
        match self {
            Self::DestinationIp
            | Self::DestinationPort
            | Self::SourceIp
            | Self::SourcePort
            | Self::DirectSourceIp
            | Self::ServerName
            | Self::FilterState { .. }
            | Self::UriSan
            | Self::DnsSan
            | Self::Subject
            | Self::Environment(_) => Ok(()),
            Self::TransportProtocol | Self::ApplicationProtocol => Err(ConfigError::new(format!(
                "Didn't find a registered implementation for type URL: '{name}'"
            ))),
            _ if only_here => Ok(()),
            _ => {
                let reason = "requirement violation while creating RBAC match tree: INVALID_ARGUMENT";
                Err(ConfigError::new(format!("{reason}: {filter} '{name}'")))
            }
        }
    }

    fn decode(any: &Any) -> Result<Self, ConfigError> {
        use common::{network::v3 as network, ssl::v3 as ssl};
        let name = type_name(any);
        let header = |name: &str| {
            HeaderName::parse(name).map_err(|error| ConfigError::field("header_name", error.to_string()))
        };
        let is = |full_name: String| name == full_name;
        Ok(if is(http::HttpRequestHeaderMatchInput::full_name()) {
            let name = header(&unpack::<http::HttpRequestHeaderMatchInput>(any)?.header_name)?;
            // A request's `host` header is its authority.
            let is_host = name.as_name().known() == Some(Known::Host);
            Self::RequestHeader(if is_host { Known::Authority.into() } else { name })
        } else if is(http::HttpRequestTrailerMatchInput::full_name()) {
            Self::RequestTrailer(header(&unpack::<http::HttpRequestTrailerMatchInput>(any)?.header_name)?)
        } else if is(http::HttpResponseHeaderMatchInput::full_name()) {
            Self::ResponseHeader(header(&unpack::<http::HttpResponseHeaderMatchInput>(any)?.header_name)?)
        } else if is(http::HttpResponseTrailerMatchInput::full_name()) {
            Self::ResponseTrailer(header(&unpack::<http::HttpResponseTrailerMatchInput>(any)?.header_name)?)
        } else if is(http::HttpRequestQueryParamMatchInput::full_name()) {
            Self::QueryParam(unpack::<http::HttpRequestQueryParamMatchInput>(any)?.query_param.into())
        } else if is(http::HttpResponseStatusCodeMatchInput::full_name()) {
            Self::StatusCode
        } else if is(http::HttpResponseStatusCodeClassMatchInput::full_name()) {
            Self::StatusCodeClass
        } else if is(http::HttpResponseLocalReplyMatchInput::full_name()) {
            Self::LocalReply
        } else if is(network::DestinationIpInput::full_name()) {
            Self::DestinationIp
        } else if is(network::DestinationPortInput::full_name()) {
            Self::DestinationPort
        } else if is(network::SourceIpInput::full_name()) {
            Self::SourceIp
        } else if is(network::SourcePortInput::full_name()) {
            Self::SourcePort
        } else if is(network::DirectSourceIpInput::full_name()) {
            Self::DirectSourceIp
        } else if is(network::SourceTypeInput::full_name()) {
            Self::SourceType
        } else if is(network::ServerNameInput::full_name()) {
            Self::ServerName
        } else if is(network::TransportProtocolInput::full_name()) {
            Self::TransportProtocol
        } else if is(network::ApplicationProtocolInput::full_name()) {
            Self::ApplicationProtocol
        } else if is(network::FilterStateInput::full_name()) {
            let network::FilterStateInput { key, field } = unpack(any)?;
            if key.is_empty() {
                return Err(ConfigError::field("key", "must not be empty"));
            }
            Self::FilterState { key: key.into(), field: field.into() }
        } else if is(network::DynamicMetadataInput::full_name()) {
            Self::DynamicMetadata(metadata_path(&unpack(any)?)?)
        } else if is(ssl::UriSanInput::full_name()) {
            Self::UriSan
        } else if is(ssl::DnsSanInput::full_name()) {
            Self::DnsSan
        } else if is(ssl::SubjectInput::full_name()) {
            Self::Subject
        } else if is(common::environment_variable::v3::Config::full_name()) {
            let name = unpack::<common::environment_variable::v3::Config>(any)?.name;
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(ConfigError::field("name", "is not the name of an environment variable"));
            }
            Self::Environment(std::env::var(name).ok().map(|value| value.into_bytes().into()))
        } else {
            return Err(ConfigError::new(format!("not supported: matcher input {name}")));
        })
    }

    /// The input's value.
    pub fn get<'a>(&'a self, inputs: &Inputs<'a>) -> Data<'a> {
        match self {
            Self::RequestHeader(name) => header_value(inputs.request, name),
            Self::RequestTrailer(name) => header_value(inputs.request_trailers, name),
            Self::ResponseHeader(name) => header_value(inputs.response, name),
            Self::ResponseTrailer(name) => header_value(inputs.response_trailers, name),
            Self::QueryParam(name) => match inputs.request {
                None => Data::NotYet,
                Some(request) => match request.path().and_then(|path| query_parameter(path, name.as_bytes()))
                {
                    None => Data::Missing,
                    Some(value) => Data::Text(percent_decode(value)),
                },
            },
            Self::StatusCode => match inputs.response {
                None => Data::NotYet,
                Some(response) => response.get(Known::Status).map_or(Data::Missing, borrowed),
            },
            Self::StatusCodeClass => match inputs.response {
                None => Data::NotYet,
                Some(response) => match response.status().map(|status| status / 100) {
                    Some(1) => borrowed(b"1xx"),
                    Some(2) => borrowed(b"2xx"),
                    Some(3) => borrowed(b"3xx"),
                    Some(4) => borrowed(b"4xx"),
                    Some(5) => borrowed(b"5xx"),
                    _ => Data::Missing,
                },
            },
            Self::LocalReply => match inputs.response {
                None => Data::NotYet,
                Some(_) => borrowed(if inputs.local_reply { b"true" } else { b"false" }),
            },
            Self::Environment(value) => value.as_deref().map_or(Data::Missing, borrowed),
            Self::DynamicMetadata(path) => dynamic_metadata(path, inputs),
            Self::FilterState { key, field } => filter_state(key, field, inputs),
            _ => match inputs.connection {
                None => Data::Missing,
                Some(connection) => self.of_connection(connection, inputs.stream),
            },
        }
    }

    fn of_connection<'a>(&self, connection: &'a ConnectionInfo, stream: Option<&'a StreamInfo>) -> Data<'a> {
        // A stream knows the client better than its connection does: `use_remote_address` and its hops.
        let remote = stream.map_or(&connection.remote_address, |stream| &stream.remote_address);
        match self {
            Self::DestinationIp => ip(&connection.local_address),
            Self::DestinationPort => port(&connection.local_address),
            Self::SourceIp => ip(remote),
            Self::SourcePort => port(remote),
            Self::DirectSourceIp => ip(&connection.direct_remote_address),
            Self::SourceType if is_local(connection) => borrowed(b"local"),
            Self::ServerName => match &connection.requested_server_name {
                Some(name) if !name.is_empty() => borrowed(name.as_bytes()),
                _ => Data::Missing,
            },
            Self::TransportProtocol if !connection.transport_protocol.is_empty() => {
                borrowed(connection.transport_protocol.as_bytes())
            }
            Self::ApplicationProtocol => quoted_list(&connection.application_protocols),
            Self::UriSan => sans(connection, |peer| &peer.uri_sans),
            Self::DnsSan => sans(connection, |peer| &peer.dns_sans),
            Self::Subject => match peer(connection) {
                Some(peer) if !peer.subject.is_empty() => borrowed(peer.subject.as_bytes()),
                _ => Data::Missing,
            },
            _ => Data::Missing,
        }
    }
}

fn metadata_path(proto: &common::network::v3::DynamicMetadataInput) -> Result<MetadataPath, ConfigError> {
    use common::network::v3::dynamic_metadata_input::path_segment::Segment;
    let mut keys = Vec::with_capacity(proto.path.len());
    for (index, segment) in proto.path.iter().enumerate() {
        match &segment.segment {
            Some(Segment::Key(key)) => keys.push(&**key),
            None => return Err(ConfigError::field("key", "is required")).at(|| format!("path[{index}]")),
        }
    }
    Ok(MetadataPath::new(&proto.filter, keys))
}

fn borrowed(bytes: &[u8]) -> Data<'_> {
    Data::Text(Cow::Borrowed(bytes))
}

fn header_value<'a>(headers: Option<&'a Headers>, name: &HeaderName) -> Data<'a> {
    match headers {
        None => Data::NotYet,
        Some(headers) => headers.get_joined(name).map_or(Data::Missing, Data::Text),
    }
}

fn ip(address: &Address) -> Data<'_> {
    address.ip().map_or(Data::Missing, |address| Data::Address(address.ip()))
}

fn port(address: &Address) -> Data<'_> {
    address.ip().map_or(Data::Missing, |address| Data::Port(address.port()))
}

/// Envoy's `isLocalConnection`: loopback, a Unix socket, or a peer with our own address.
fn is_local(connection: &ConnectionInfo) -> bool {
    connection.remote_address.is_local()
        || match (connection.remote_address.ip(), connection.local_address.ip()) {
            (Some(remote), Some(local)) => remote.ip() == local.ip(),
            _ => false,
        }
}

fn quoted_list(protocols: &[Box<[u8]>]) -> Data<'_> {
    if protocols.is_empty() {
        return Data::Missing;
    }
    let mut text = Vec::new();
    for protocol in protocols {
        text.extend_from_slice(if text.is_empty() { b"'" } else { b",'" });
        text.extend_from_slice(protocol);
        text.push(b'\'');
    }
    Data::Text(Cow::Owned(text))
}

fn peer(connection: &ConnectionInfo) -> Option<&Certificate> {
    connection.tls.as_ref()?.peer.as_deref()
}

fn sans(connection: &ConnectionInfo, list: impl Fn(&Certificate) -> &Vec<String>) -> Data<'_> {
    let Some(peer) = peer(connection) else { return Data::Missing };
    match list(peer).as_slice() {
        [] => Data::Missing,
        [one] => borrowed(one.as_bytes()),
        several => Data::Text(Cow::Owned(several.join(",").into_bytes())),
    }
}

/// The stream's metadata; a listener filter's where there is no stream. The latter is behind a cell and so copied.
fn dynamic_metadata<'a>(path: &MetadataPath, inputs: &Inputs<'a>) -> Data<'a> {
    if let Some(value) = inputs.stream.and_then(|stream| path.find(&stream.metadata)) {
        return Data::Value(Cow::Borrowed(value));
    }
    let Some(connection) = inputs.connection else { return Data::Missing };
    let metadata = connection.metadata.borrow();
    path.find(&metadata).map_or(Data::Missing, |value| Data::Value(Cow::Owned(value.clone())))
}

fn filter_state<'a>(key: &str, field: &str, inputs: &Inputs<'a>) -> Data<'a> {
    let read = |object: &dyn waystation_filter_api::filter_state::Object| {
        if field.is_empty() { object.serialize() } else { object.field(field) }
    };
    let of_stream =
        inputs.stream.and_then(|stream| stream.filter_state.get(key)).map(|object| read(&**object));
    let value = match (of_stream, inputs.connection) {
        (Some(value), _) => value,
        (None, Some(connection)) => {
            connection.filter_state.borrow().get(key).and_then(|object| read(&**object))
        }
        (None, None) => None,
    };
    value.map_or(Data::Missing, |value| Data::Text(Cow::Owned(value)))
}

/// A query parameter's text: `%20` is a space, and what is malformed stays as it is.
pub fn percent_decode(value: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr(b'%', value).is_none() {
        return Cow::Borrowed(value);
    }
    let hex = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let mut decoded = Vec::with_capacity(value.len());
    let mut at = 0;
    while at < value.len() {
        match (value[at], hex(value.get(at + 1)), hex(value.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                // Two hex digits make one byte.
                decoded.push((high * 16 + low) as u8);
                at += 3;
            }
            (byte, _, _) => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    Cow::Owned(decoded)
}

#[cfg(test)]
mod tests {
    use super::{Data, Input, InputScope, Inputs, percent_decode, quoted_list};
    use envoy_types::pb::envoy::extensions::matching::common_inputs::network::v3::DestinationPortInput;
    use envoy_types::pb::envoy::r#type::matcher::v3::HttpRequestHeaderMatchInput;
    use envoy_types::pb::google::protobuf::Any;
    use prost::Name;
    use std::time::Instant;
    use waystation_filter_api::address::Address;
    use waystation_filter_api::connection::ConnectionInfo;

    fn any<M: Name>(message: &M) -> Any {
        Any { type_url: M::type_url(), value: message.encode_to_vec() }
    }

    #[test]
    fn http_inputs_need_http() {
        let header = any(&HttpRequestHeaderMatchInput { header_name: "x".into() });
        assert!(Input::compile(&header, InputScope::Http).is_ok());
        assert!(Input::compile(&header, InputScope::Network).is_err());
        let unknown = Any { type_url: "type.googleapis.com/x.Y".into(), value: Vec::new() };
        let error = Input::compile(&unknown, InputScope::Http).unwrap_err();
        assert_eq!(error.to_string(), "not supported: matcher input x.Y");
    }

    #[test]
    fn connection_inputs() {
        let address = |text: &str| Address::Ip(text.parse().unwrap());
        let connection =
            ConnectionInfo::new(1, Instant::now(), address("10.0.0.1:80"), address("127.0.0.1:9"));
        let inputs = Inputs::network(&connection);
        let port = Input::compile(&any(&DestinationPortInput {}), InputScope::Network).unwrap();
        assert_eq!(port.get(&inputs).text().as_deref(), Some(&b"80"[..]));
        assert_eq!(Input::SourceType.get(&inputs).text().as_deref(), Some(&b"local"[..]));
        assert_eq!(Input::DestinationIp.get(&inputs).address(), Some("10.0.0.1".parse().unwrap()));
        assert!(Input::ServerName.get(&inputs).text().is_none());
    }

    #[test]
    fn addresses_and_ports_are_made_text_in_place() {
        for address in ["10.0.0.1", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::ffff:255.255.255.255"]
        {
            let data = Data::Address(address.parse().unwrap());
            assert_eq!(data.text().as_deref(), Some(address.as_bytes()));
        }
        assert_eq!(Data::Port(65535).text().as_deref(), Some(&b"65535"[..]));
    }

    #[test]
    fn text_forms() {
        assert_eq!(&*percent_decode(b"a%2fb%zz%4"), b"a/b%zz%4");
        let list: [Box<[u8]>; 2] = [(*b"h2").into(), (*b"http/1.1").into()];
        assert_eq!(quoted_list(&list).text().as_deref(), Some(&b"'h2','http/1.1'"[..]));
    }
}
