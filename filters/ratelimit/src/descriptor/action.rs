//! `RateLimit.Action`: one entry of a descriptor.

use std::net::IpAddr;
use std::time::Instant;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::envoy::r#type::metadata::v3 as metadata;
use pb::rate_limit::action::{self, ActionSpecifier as Specifier};
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::value::{Metadata, Value};
use waystation_filter_api::wire::bool_value;
use waystation_format::{AccessLogType, FormatContext, Formatter};
use waystation_http::{HeaderName, Headers, Known};
use waystation_matchers::{
    Cidr, CidrList, Data, HeaderMatcher, Input, InputScope, Inputs, MetadataPath, QueryParameterMatcher,
    all_match, percent_decode, query_parameter,
};
use waystation_schema::{At as _, ConfigError};

use super::Entries;

/// Whether values of keys and matches are formats, as the runtime says when the configuration is compiled. Envoy's default
/// is that they are not.
const FORMATTED: &str = "envoy.reloadable_features.enable_formatter_for_ratelimit_action_descriptor_value";

/// What actions look at.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The request head.
    pub head: &'a Headers,
    /// Facts about the stream, its route among them.
    pub info: &'a StreamInfo,
    /// `node.cluster`, the cluster that requests come from.
    pub own_cluster: &'a str,
    /// The time of this turn.
    pub now: Instant,
}

#[derive(Debug)]
pub(super) enum Action {
    SourceCluster,
    DestinationCluster,
    Header {
        name: HeaderName,
        key: Box<str>,
        skip_if_absent: bool,
    },
    QueryParameter {
        name: Box<str>,
        key: Box<str>,
        skip_if_absent: bool,
    },
    RemoteAddress,
    MaskedRemoteAddress {
        v4: u8,
        v6: u8,
    },
    /// An entry of its own, if the condition holds.
    Text {
        condition: Condition,
        key: Box<str>,
        value: Text,
    },
    Metadata {
        of_route: bool,
        path: MetadataPath,
        key: Box<str>,
        default: Box<str>,
        skip_if_absent: bool,
    },
    /// A matcher input: its value, under the extension's name.
    Input {
        key: Box<str>,
        input: Input,
    },
}

#[derive(Debug)]
pub(super) enum Condition {
    Always,
    Headers { matchers: Box<[HeaderMatcher]>, expected: bool },
    Query { matchers: Box<[QueryParameterMatcher]>, expected: bool },
    RemoteAddress { ranges: CidrList, inverted: bool },
}

#[derive(Debug)]
pub(super) enum Text {
    Literal(Box<str>),
    Formatted { formatter: Formatter, default: Box<str> },
}

impl Action {
    pub(super) fn compile(proto: &pb::rate_limit::Action, runtime: &Runtime) -> Result<Self, ConfigError> {
        let formatted = || runtime.flag(FORMATTED, false).get();
        let or = |key: &str, default: &str| if key.is_empty() { default.into() } else { key.into() };
        Ok(match &proto.action_specifier {
            None => return Err(ConfigError::field("action_specifier", "is required")),
            Some(Specifier::SourceCluster(action::SourceCluster {})) => Self::SourceCluster,
            Some(Specifier::DestinationCluster(action::DestinationCluster {})) => Self::DestinationCluster,
            Some(Specifier::RequestHeaders(proto)) => {
                let action::RequestHeaders { header_name, descriptor_key, skip_if_absent } = proto;
                let name = HeaderName::parse(header_name)
                    .map_err(|error| ConfigError::field("header_name", error.to_string()))
                    .at(|| "request_headers")?;
                Self::Header {
                    // A request's `host` header is its authority.
                    name: if name.as_name().known() == Some(Known::Host) {
                        Known::Authority.into()
                    } else {
                        name
                    },
                    key: descriptor_key.as_str().into(),
                    skip_if_absent: *skip_if_absent,
                }
            }
            Some(Specifier::QueryParameters(proto)) => {
                let action::QueryParameters { query_parameter_name, descriptor_key, skip_if_absent } = proto;
                Self::QueryParameter {
                    name: query_parameter_name.as_str().into(),
                    key: descriptor_key.as_str().into(),
                    skip_if_absent: *skip_if_absent,
                }
            }
            Some(Specifier::RemoteAddress(action::RemoteAddress {})) => Self::RemoteAddress,
            Some(Specifier::MaskedRemoteAddress(proto)) => {
                let action::MaskedRemoteAddress { v4_prefix_mask_len, v6_prefix_mask_len } = proto;
                // The schema has seen to their bounds.
                let len = |len: Option<u32>, longest: u8| {
                    len.and_then(|len| u8::try_from(len).ok()).unwrap_or(longest)
                };
                Self::MaskedRemoteAddress {
                    v4: len(v4_prefix_mask_len.map(|len| len.value), 32),
                    v6: len(v6_prefix_mask_len.map(|len| len.value), 128),
                }
            }
            Some(Specifier::GenericKey(proto)) => {
                let action::GenericKey { descriptor_value, default_value, descriptor_key } = proto;
                let value = Text::compile(descriptor_value, default_value, formatted());
                Self::Text {
                    condition: Condition::Always,
                    key: or(descriptor_key, "generic_key"),
                    value: value.at(|| "generic_key")?,
                }
            }
            Some(Specifier::HeaderValueMatch(proto)) => {
                let action::HeaderValueMatch {
                    descriptor_value,
                    default_value,
                    descriptor_key,
                    expect_match,
                    headers,
                } = proto;
                let matchers = HeaderMatcher::compile_all(headers, "headers").at(|| "header_value_match")?;
                let value = Text::compile(descriptor_value, default_value, formatted());
                Self::Text {
                    condition: Condition::Headers {
                        matchers,
                        expected: bool_value(expect_match.as_ref(), true),
                    },
                    key: or(descriptor_key, "header_match"),
                    value: value.at(|| "header_value_match")?,
                }
            }
            Some(Specifier::QueryParameterValueMatch(proto)) => {
                let action::QueryParameterValueMatch {
                    descriptor_value,
                    default_value,
                    descriptor_key,
                    expect_match,
                    query_parameters,
                } = proto;
                let matcher = |(i, proto)| {
                    QueryParameterMatcher::compile(proto).at(|| format!("query_parameters[{i}]"))
                };
                let matchers = query_parameters.iter().enumerate().map(matcher).collect::<Result<_, _>>();
                let value = Text::compile(descriptor_value, default_value, formatted());
                Self::Text {
                    condition: Condition::Query {
                        matchers: matchers.at(|| "query_parameter_value_match")?,
                        expected: bool_value(expect_match.as_ref(), true),
                    },
                    key: or(descriptor_key, "query_match"),
                    value: value.at(|| "query_parameter_value_match")?,
                }
            }
            Some(Specifier::RemoteAddressMatch(proto)) => {
                remote_address_match(proto).at(|| "remote_address_match")?
            }
            #[expect(deprecated, reason = "old configurations still name it")]
            Some(Specifier::DynamicMetadata(proto)) => {
                let action::DynamicMetaData { descriptor_key, metadata_key, default_value } = proto;
                let path = metadata_path(metadata_key.as_ref());
                Self::Metadata {
                    of_route: false,
                    path: path.at(|| "metadata_key").at(|| "dynamic_metadata")?,
                    key: descriptor_key.as_str().into(),
                    default: default_value.as_str().into(),
                    skip_if_absent: false,
                }
            }
            Some(Specifier::Metadata(proto)) => Self::Metadata {
                of_route: proto.source() == action::meta_data::Source::RouteEntry,
                path: metadata_path(proto.metadata_key.as_ref()).at(|| "metadata_key").at(|| "metadata")?,
                key: proto.descriptor_key.as_str().into(),
                default: proto.default_value.as_str().into(),
                skip_if_absent: proto.skip_if_absent,
            },
            Some(Specifier::Extension(core::TypedExtensionConfig { name, typed_config })) => {
                let any = typed_config.as_ref();
                let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"));
                let input = any.and_then(|any| Input::compile(any, InputScope::Http));
                Self::Input { key: name.as_str().into(), input: input.at(|| "extension")? }
            }
        })
    }

    /// Adds the request's entry. `None`: there is none, and so no descriptor.
    pub(super) fn append(&self, request: &Request<'_>, out: &mut Entries) -> Option<()> {
        match self {
            Self::SourceCluster => out.push(b"source_cluster", request.own_cluster.as_bytes()),
            Self::DestinationCluster => {
                let cluster = request.info.upstream.cluster.as_ref()?;
                out.push(b"destination_cluster", cluster.name().as_bytes());
            }
            Self::Header { name, key, skip_if_absent } => match request.head.get(name) {
                Some(value) => out.push(key.as_bytes(), value),
                None => return skip_if_absent.then_some(()),
            },
            Self::QueryParameter { name, key, skip_if_absent } => {
                let target = request.head.path().unwrap_or_default();
                match query_parameter(target, name.as_bytes()) {
                    Some(value) => out.push(key.as_bytes(), &percent_decode(value)),
                    None => return skip_if_absent.then_some(()),
                }
            }
            Self::RemoteAddress => {
                out.push_display(b"remote_address", remote_address(request)?);
            }
            Self::MaskedRemoteAddress { v4, v6 } => {
                let address = remote_address(request)?;
                let len = if address.is_ipv4() { *v4 } else { *v6 };
                let first = Cidr::new(address, len).address();
                out.push_display(b"masked_remote_address", format_args!("{first}/{len}"));
            }
            Self::Text { condition, key, value } => {
                if !condition.holds(request) {
                    return None;
                }
                match value {
                    Text::Literal(value) => out.push(key.as_bytes(), value.as_bytes()),
                    Text::Formatted { formatter, default } => {
                        let text = text_of(formatter, request);
                        let text = if text.is_empty() { default.as_bytes() } else { &text };
                        if text.is_empty() {
                            return None;
                        }
                        out.push(key.as_bytes(), text);
                    }
                }
            }
            Self::Metadata { of_route, path, key, default, skip_if_absent } => {
                let metadata =
                    if *of_route { route_metadata(request.info) } else { Some(&request.info.metadata) };
                let found = metadata.and_then(|metadata| path.find(metadata)).and_then(Value::as_str);
                match found.filter(|text| !text.is_empty()).unwrap_or(default) {
                    "" => return skip_if_absent.then_some(()),
                    text => out.push(key.as_bytes(), text.as_bytes()),
                }
            }
            Self::Input { key, input } => match input.get(&Inputs::request(request.info, request.head)) {
                Data::NotYet | Data::Missing => return None,
                data => match data.text() {
                    Some(text) if !text.is_empty() => out.push(key.as_bytes(), &text),
                    _ => {}
                },
            },
        }
        Some(())
    }
}

impl Condition {
    fn holds(&self, request: &Request<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::Headers { matchers, expected } => all_match(matchers, request.head) == *expected,
            Self::Query { matchers, expected } => {
                let target = request.head.path().unwrap_or_default();
                matchers.iter().all(|matcher| matcher.is_match_decoded(target)) == *expected
            }
            Self::RemoteAddress { ranges, inverted } => {
                remote_address(request).is_some_and(|address| ranges.contains(address) != *inverted)
            }
        }
    }
}

impl Text {
    fn compile(value: &str, default: &str, formatted: bool) -> Result<Self, ConfigError> {
        if !formatted {
            return Ok(Self::Literal(value.into()));
        }
        let formatter = Formatter::compile_omitting_empty(value).at(|| "descriptor_value")?;
        Ok(match formatter.literal() {
            Some(literal) => Self::Literal(literal.into()),
            None => Self::Formatted { formatter, default: default.into() },
        })
    }
}

fn remote_address_match(proto: &action::RemoteAddressMatch) -> Result<Action, ConfigError> {
    let action::RemoteAddressMatch { descriptor_value, descriptor_key, default_value, address_matcher } =
        proto;
    let matcher = address_matcher.as_ref();
    let matcher::AddressMatcher { ranges, invert_match } =
        matcher.ok_or_else(|| ConfigError::field("address_matcher", "is required"))?;
    let mut compiled = Vec::with_capacity(ranges.len());
    for (i, range) in ranges.iter().enumerate() {
        let range =
            core::CidrRange { address_prefix: range.address_prefix.clone(), prefix_len: range.prefix_len };
        compiled.push(Cidr::compile(&range).at(|| format!("ranges[{i}]")).at(|| "address_matcher")?);
    }
    Ok(Action::Text {
        condition: Condition::RemoteAddress { ranges: CidrList::new(compiled), inverted: *invert_match },
        key: match descriptor_key.as_str() {
            "" => "remote_address_match".into(),
            key => key.into(),
        },
        // Always a format: this action came when values had become formats.
        value: Text::compile(descriptor_value, default_value, true)?,
    })
}

/// The trusted address of the client.
fn remote_address(request: &Request<'_>) -> Option<IpAddr> {
    request.info.remote_address.ip().map(|address| address.ip())
}

fn route_metadata(info: &StreamInfo) -> Option<&Metadata> {
    let (table, route) = info.route.as_ref()?;
    table.route_metadata(*route)
}

/// Where metadata are looked for.
pub(super) fn metadata_path(proto: Option<&metadata::MetadataKey>) -> Result<MetadataPath, ConfigError> {
    use metadata::metadata_key::path_segment::Segment;
    let metadata::MetadataKey { key, path } = proto.ok_or_else(|| ConfigError::new("is required"))?;
    let mut keys = Vec::with_capacity(path.len());
    for (i, segment) in path.iter().enumerate() {
        match &segment.segment {
            Some(Segment::Key(key)) => keys.push(key.as_str()),
            _ => return Err(ConfigError::field(format!("path[{i}]"), "only keys are supported")),
        }
    }
    Ok(MetadataPath::new(key, keys))
}

/// What a format makes of the request; a missing value is nothing.
pub(super) fn text_of(formatter: &Formatter, request: &Request<'_>) -> Vec<u8> {
    let mut text = Vec::new();
    let cx = FormatContext {
        request: Some(request.head),
        response: None,
        trailers: None,
        info: request.info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now: request.now,
    };
    formatter.write(&cx, &mut text);
    text
}
