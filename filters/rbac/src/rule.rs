//! Permissions and principals. Both are conditions on a request or connection, so that one compiled form serves for both.

use std::collections::BTreeMap;
use std::ops::Range;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::extensions::rbac::principals::mtls_authenticated::v3 as mtls;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use pb::permission::Rule as Permission;
use pb::principal::Identifier as Principal;
use prost::Name;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{Certificate, ConnectionInfo};
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_matchers::{
    Cidr, FilterStateMatcher, HeaderMatcher, Inputs, MetadataMatcher, PathMatcher, SanKind, SanMatcher,
    StringMatcher, UriTemplate, without_query,
};
use waystation_schema::{At, ConfigError};

use crate::engine::unregistered;

/// What is decided about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Level {
    /// Requests.
    Http,
    /// Connections: there are no headers.
    Network,
}

/// A condition. Nests as deep as a protobuf message may: some fifty levels.
#[derive(Debug)]
pub(crate) enum Rule {
    Always,
    All(Box<[Rule]>),
    Any(Box<[Rule]>),
    Not(Box<Rule>),
    Header(HeaderMatcher),
    Path(PathMatcher),
    Template(UriTemplate),
    Address(Side, Cidr),
    DestinationPort(Range<u32>),
    /// Dynamic metadata: the stream's, or without one the connection's.
    Metadata(MetadataMatcher),
    RouteMetadata(MetadataMatcher),
    ServerName(StringMatcher),
    /// TLS, and one of the names that the peer's certificate gives.
    Authenticated(Option<StringMatcher>),
    /// A verified certificate, with one of its names.
    MtlsAuthenticated(Option<SanMatcher>),
    FilterState(FilterStateMatcher),
}

/// Which address of a connection.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Side {
    /// `destination_ip`.
    Local,
    /// `source_ip`: as PROXY protocol states it.
    ConnectionRemote,
    /// `direct_remote_ip`: of the socket itself.
    DirectRemote,
    /// `remote_ip`: as the trust rules see it.
    Remote,
}

impl Side {
    pub(crate) const ALL: [Self; 4] = [Self::Local, Self::ConnectionRemote, Self::DirectRemote, Self::Remote];

    pub(crate) fn of<'a>(self, inputs: &Inputs<'a>) -> Option<&'a Address> {
        let connection = inputs.connection?;
        Some(match self {
            Self::Local => &connection.local_address,
            Self::ConnectionRemote => &connection.remote_address,
            Self::DirectRemote => &connection.direct_remote_address,
            Self::Remote => inputs.stream.map_or(&connection.remote_address, |stream| &stream.remote_address),
        })
    }
}

impl Rule {
    /// Compiles the permissions of a policy, one of which has to match.
    pub(crate) fn permissions(protos: &[pb::Permission], level: Level) -> Result<Self, ConfigError> {
        set(Self::Any, protos, "permissions", |proto| Self::permission(proto, level))
    }

    /// Compiles the principals of a policy, one of which has to match.
    pub(crate) fn principals(protos: &[pb::Principal], level: Level) -> Result<Self, ConfigError> {
        set(Self::Any, protos, "principals", |proto| Self::principal(proto, level))
    }

    #[expect(deprecated, reason = "configurations still use the old specifiers")]
    fn permission(proto: &pb::Permission, level: Level) -> Result<Self, ConfigError> {
        let nested = |proto: &pb::Permission| Self::permission(proto, level);
        match proto.rule.as_ref() {
            None => Err(ConfigError::field("rule", "is required")),
            Some(Permission::Any(any)) => always(*any),
            Some(Permission::AndRules(rules)) => {
                set(Self::All, &rules.rules, "rules", nested).at(|| "and_rules")
            }
            Some(Permission::OrRules(rules)) => {
                set(Self::Any, &rules.rules, "rules", nested).at(|| "or_rules")
            }
            Some(Permission::NotRule(rule)) => {
                Ok(Self::Not(Box::new(Self::permission(rule, level).at(|| "not_rule")?)))
            }
            Some(Permission::Header(header)) => {
                not_below_http(level, &header.name)?;
                HeaderMatcher::compile(header).map(Self::Header).at(|| "header")
            }
            Some(Permission::UrlPath(path)) => PathMatcher::compile(path).map(Self::Path).at(|| "url_path"),
            Some(Permission::UriTemplate(template)) => {
                UriTemplate::compile_extension(template).map(Self::Template).at(|| "uri_template")
            }
            Some(Permission::DestinationIp(range)) => {
                Cidr::compile(range).map(|range| Self::Address(Side::Local, range)).at(|| "destination_ip")
            }
            Some(Permission::DestinationPort(port)) if *port <= u32::from(u16::MAX) => {
                Ok(Self::DestinationPort(*port..*port + 1))
            }
            Some(Permission::DestinationPort(_)) => {
                Err(ConfigError::field("destination_port", "value must be less than or equal to 65535"))
            }
            Some(Permission::DestinationPortRange(range)) => {
                port_range(range).map(Self::DestinationPort).at(|| "destination_port_range")
            }
            Some(Permission::Metadata(matcher)) => {
                MetadataMatcher::compile(matcher).map(Self::Metadata).at(|| "metadata")
            }
            Some(Permission::SourcedMetadata(sourced)) => {
                Self::sourced_metadata(sourced).at(|| "sourced_metadata")
            }
            Some(Permission::RequestedServerName(name)) => {
                StringMatcher::compile(name).map(Self::ServerName).at(|| "requested_server_name")
            }
            Some(Permission::Matcher(matcher)) => {
                let name = matcher.typed_config.as_ref().map_or("", type_name);
                Err(unregistered(&matcher.name, name)).at(|| "matcher")
            }
        }
    }

    #[expect(deprecated, reason = "configurations still use the old specifiers")]
    fn principal(proto: &pb::Principal, level: Level) -> Result<Self, ConfigError> {
        let nested = |proto: &pb::Principal| Self::principal(proto, level);
        let address = |side, range, field: &'static str| {
            Cidr::compile(range).map(|range| Self::Address(side, range)).at(|| field)
        };
        match proto.identifier.as_ref() {
            None => Err(ConfigError::field("identifier", "is required")),
            Some(Principal::Any(any)) => always(*any),
            Some(Principal::AndIds(ids)) => set(Self::All, &ids.ids, "ids", nested).at(|| "and_ids"),
            Some(Principal::OrIds(ids)) => set(Self::Any, &ids.ids, "ids", nested).at(|| "or_ids"),
            Some(Principal::NotId(id)) => {
                Ok(Self::Not(Box::new(Self::principal(id, level).at(|| "not_id")?)))
            }
            Some(Principal::Authenticated(pb::principal::Authenticated { principal_name })) => {
                let name = principal_name.as_ref().map(StringMatcher::compile).transpose();
                name.map(Self::Authenticated).at(|| "principal_name").at(|| "authenticated")
            }
            Some(Principal::SourceIp(range)) => address(Side::ConnectionRemote, range, "source_ip"),
            Some(Principal::DirectRemoteIp(range)) => address(Side::DirectRemote, range, "direct_remote_ip"),
            Some(Principal::RemoteIp(range)) => address(Side::Remote, range, "remote_ip"),
            Some(Principal::Header(header)) => {
                not_below_http(level, &header.name)?;
                HeaderMatcher::compile(header).map(Self::Header).at(|| "header")
            }
            Some(Principal::UrlPath(path)) => PathMatcher::compile(path).map(Self::Path).at(|| "url_path"),
            Some(Principal::Metadata(matcher)) => {
                MetadataMatcher::compile(matcher).map(Self::Metadata).at(|| "metadata")
            }
            Some(Principal::SourcedMetadata(sourced)) => {
                Self::sourced_metadata(sourced).at(|| "sourced_metadata")
            }
            Some(Principal::FilterState(matcher)) => {
                FilterStateMatcher::compile(matcher).map(Self::FilterState).at(|| "filter_state")
            }
            Some(Principal::Custom(custom)) => Self::custom(custom).at(|| "custom"),
        }
    }

    fn sourced_metadata(proto: &pb::SourcedMetadata) -> Result<Self, ConfigError> {
        let pb::SourcedMetadata { metadata_matcher, metadata_source } = proto;
        let matcher =
            metadata_matcher.as_ref().ok_or_else(|| ConfigError::field("metadata_matcher", "is required"))?;
        let matcher = MetadataMatcher::compile(matcher).at(|| "metadata_matcher")?;
        match pb::MetadataSource::try_from(*metadata_source) {
            Ok(pb::MetadataSource::Dynamic) => Ok(Self::Metadata(matcher)),
            Ok(pb::MetadataSource::Route) => Ok(Self::RouteMetadata(matcher)),
            Err(_) => {
                Err(ConfigError::field("metadata_source", "value must be one of the defined enum values"))
            }
        }
    }

    fn custom(proto: &TypedExtensionConfig) -> Result<Self, ConfigError> {
        let any = proto.typed_config.as_ref();
        let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        if type_name(any) != mtls::Config::full_name() {
            return Err(unregistered(&proto.name, type_name(any)));
        }
        let mtls::Config { san_matcher, any_validated_client_certificate } = unpack(any)?;
        if san_matcher.is_none() && !any_validated_client_certificate {
            let reason = "envoy.rbac.principals.mtls_authenticated did not have any configured validation. At least one \
                          configuration field must be set.";
            return Err(ConfigError::field("typed_config", reason));
        }
        let names = san_matcher.as_ref().map(SanMatcher::compile).transpose();
        names.map(Self::MtlsAuthenticated).at(|| "san_matcher").at(|| "typed_config")
    }

    /// Whether the condition holds. What is not there (a header, a path, a certificate) does not.
    pub(crate) fn is_match(&self, inputs: &Inputs<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::All(rules) => rules.iter().all(|rule| rule.is_match(inputs)),
            Self::Any(rules) => rules.iter().any(|rule| rule.is_match(inputs)),
            Self::Not(rule) => !rule.is_match(inputs),
            Self::Header(matcher) => inputs.request.is_some_and(|head| matcher.is_match(head)),
            Self::Path(matcher) => path(inputs).is_some_and(|path| matcher.is_match(path)),
            Self::Template(template) => template.is_match(without_query(path(inputs).unwrap_or_default())),
            Self::Address(side, range) => {
                let address = side.of(inputs).and_then(Address::ip);
                address.is_some_and(|address| range.contains(address.ip()))
            }
            Self::DestinationPort(ports) => {
                destination_port(inputs).is_some_and(|port| ports.contains(&port))
            }
            Self::Metadata(matcher) => match (inputs.stream, inputs.connection) {
                (Some(stream), _) => matcher.is_match(&stream.metadata),
                (None, Some(connection)) => matcher.is_match(&connection.metadata.borrow()),
                (None, None) => false,
            },
            Self::RouteMetadata(matcher) => {
                let route = inputs.stream.and_then(|stream| stream.route.as_ref());
                route.is_some_and(|(table, route)| match table.route_metadata(*route) {
                    Some(metadata) => matcher.is_match(metadata),
                    None => matcher.is_match(&EMPTY),
                })
            }
            Self::ServerName(matcher) => inputs.connection.is_some_and(|connection| {
                matcher.is_match(connection.requested_server_name.as_deref().unwrap_or_default().as_bytes())
            }),
            Self::Authenticated(name) => inputs.connection.is_some_and(|connection| {
                connection.tls.is_some()
                    && name.as_ref().is_none_or(|matcher| {
                        principal_names(connection).any(|name| matcher.is_match(name.as_bytes()))
                    })
            }),
            Self::MtlsAuthenticated(names) => {
                let tls = inputs.connection.and_then(|connection| connection.tls.as_ref());
                let peer = tls.filter(|tls| tls.peer_verified).and_then(|tls| tls.peer.as_deref());
                peer.is_some_and(|peer| names.as_ref().is_none_or(|matcher| has_name(peer, matcher)))
            }
            Self::FilterState(matcher) => {
                matcher.is_match(inputs.stream.map(|stream| &stream.filter_state), inputs.connection)
            }
        }
    }
}

/// Of a route that has none.
static EMPTY: Metadata = Metadata { filter: BTreeMap::new(), typed: BTreeMap::new() };

pub(crate) fn path<'a>(inputs: &Inputs<'a>) -> Option<&'a [u8]> {
    inputs.request?.path()
}

pub(crate) fn destination_port(inputs: &Inputs<'_>) -> Option<u32> {
    Some(u32::from(inputs.connection?.local_address.ip()?.port()))
}

/// What `authenticated.principal_name` looks at: URI names, DNS names and the subject, which is empty for who has no
/// certificate. Nothing is empty of a connection without TLS: it has no principal.
pub(crate) fn principal_names(connection: &ConnectionInfo) -> impl Iterator<Item = &str> {
    let peer = connection.tls.as_ref().and_then(|tls| tls.peer.as_deref());
    let names = peer.into_iter().flat_map(|peer| peer.uri_sans.iter().chain(&peer.dns_sans));
    let subject = peer.map_or("", |peer| peer.subject.as_str());
    names.map(String::as_str).chain(std::iter::once(subject))
}

fn has_name(peer: &Certificate, matcher: &SanMatcher) -> bool {
    let any = |kind, names: &[String]| names.iter().any(|name| matcher.is_match(kind, name));
    any(SanKind::Uri, &peer.uri_sans)
        || any(SanKind::Dns, &peer.dns_sans)
        || any(SanKind::Ip, &peer.ip_sans)
        || any(SanKind::Email, &peer.email_sans)
}

fn always(any: bool) -> Result<Rule, ConfigError> {
    if any { Ok(Rule::Always) } else { Err(ConfigError::field("any", "value must equal true")) }
}

/// Compiles a set, of which all or any have to match. A set of one is that one: control planes wrap everything in sets.
fn set<P>(
    of: fn(Box<[Rule]>) -> Rule,
    protos: &[P],
    field: &'static str,
    compile: impl Fn(&P) -> Result<Rule, ConfigError>,
) -> Result<Rule, ConfigError> {
    if protos.is_empty() {
        return Err(ConfigError::field(field, "value must contain at least 1 item(s)"));
    }
    let compile = |(index, proto)| compile(proto).at(|| format!("{field}[{index}]"));
    let mut rules = protos.iter().enumerate().map(compile).collect::<Result<Vec<_>, _>>()?;
    Ok(match rules.len() {
        1 => rules.remove(0),
        _ => of(rules.into()),
    })
}

fn port_range(proto: &Int32Range) -> Result<Range<u32>, ConfigError> {
    let Int32Range { start, end } = *proto;
    let bound = |what, bound: i32| match u32::try_from(bound) {
        Ok(bound) if bound <= 65536 => Ok(bound),
        _ => Err(ConfigError::new(format!("range {what} {bound} is out of bounds"))),
    };
    let ports = bound("start", start)?..bound("end", end)?;
    if ports.is_empty() {
        let reason = format!("range start {start} cannot be greater or equal than range end {end}");
        return Err(ConfigError::new(reason));
    }
    Ok(ports)
}

fn not_below_http(level: Level, header: &str) -> Result<(), ConfigError> {
    match level {
        Level::Http => Ok(()),
        Level::Network => {
            let reason = format!("Found header({header}) rule,not supported by RBAC network filter");
            Err(ConfigError::field("header", reason))
        }
    }
}
