//! `RouteMatch`: whether a request belongs to a route.

use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_match::PathSpecifier;
use waystation_filter_api::runtime::RuntimeFraction;
use waystation_filter_api::stream::StreamInfo;
use waystation_http::{Headers, Known};
use waystation_matchers::{
    CookieMatcher, FilterStateMatcher, HeaderMatcher, MetadataMatcher, QueryParameterMatcher, Regex,
    UriTemplate, all_match,
};
use waystation_schema::{At, ConfigError};

use crate::table::CompileContext;

/// Compiled `RouteMatch`.
#[derive(Debug)]
pub(crate) struct RouteMatch {
    pub(crate) path: PathPattern,
    /// What must hold besides the path; most routes have no such condition.
    pub(crate) conditions: Option<Box<Conditions>>,
}

/// Compiled `path_specifier`.
#[derive(Debug)]
pub(crate) enum PathPattern {
    Exact {
        path: Box<[u8]>,
        ignore_case: bool,
    },
    Prefix {
        prefix: Box<[u8]>,
        ignore_case: bool,
    },
    /// `path_separated_prefix`: the prefix, alone or followed by `/`.
    Segment {
        prefix: Box<[u8]>,
        ignore_case: bool,
    },
    Regex(Regex),
    Template(UriTemplate),
    Connect,
}

/// What must hold besides the path.
#[derive(Debug)]
pub(crate) struct Conditions {
    runtime: Option<RuntimeFraction>,
    grpc: bool,
    headers: Box<[HeaderMatcher]>,
    query: Box<[QueryParameterMatcher]>,
    cookies: Box<[CookieMatcher]>,
    tls: Option<TlsMatch>,
    metadata: Box<[MetadataMatcher]>,
    filter_state: Box<[FilterStateMatcher]>,
}

#[derive(Clone, Copy, Debug)]
struct TlsMatch {
    presented: Option<bool>,
    validated: Option<bool>,
}

/// What matching looks at.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) headers: &'a Headers,
    pub(crate) info: &'a StreamInfo,
    pub(crate) random: u64,
    /// The path as it is matched: without query, and without parameters when those are ignored.
    pub(crate) path: Option<&'a [u8]>,
}

impl RouteMatch {
    pub(crate) fn compile(proto: &pb::RouteMatch, cx: &CompileContext<'_>) -> Result<Self, ConfigError> {
        let pb::RouteMatch {
            case_sensitive,
            runtime_fraction,
            headers,
            query_parameters,
            cookies,
            grpc,
            tls_context,
            dynamic_metadata,
            filter_state,
            path_specifier,
        } = proto;
        let ignore_case = case_sensitive.is_some_and(|sensitive| !sensitive.value);
        let query = query_parameters.iter().enumerate().map(|(index, matcher)| {
            QueryParameterMatcher::compile(matcher).at(|| format!("query_parameters[{index}]"))
        });
        let cookies = cookies
            .iter()
            .enumerate()
            .map(|(index, matcher)| CookieMatcher::compile(matcher).at(|| format!("cookies[{index}]")));
        let conditions = Conditions {
            runtime: runtime_fraction.as_ref().map(|fraction| cx.runtime.fractional_percent(fraction)),
            grpc: grpc.is_some(),
            headers: HeaderMatcher::compile_all(headers, "headers")?,
            query: query.collect::<Result<_, _>>()?,
            cookies: cookies.collect::<Result<_, _>>()?,
            tls: tls_context.as_ref().map(|tls| TlsMatch {
                presented: tls.presented.map(|presented| presented.value),
                validated: tls.validated.map(|validated| validated.value),
            }),
            metadata: MetadataMatcher::compile_all(dynamic_metadata, "dynamic_metadata")?,
            filter_state: FilterStateMatcher::compile_all(filter_state, "filter_state")?,
        };
        Ok(Self {
            path: PathPattern::compile(path_specifier.as_ref(), ignore_case)?,
            conditions: (!conditions.is_empty()).then(|| Box::new(conditions)),
        })
    }

    /// Whether the request matches, path included. The index asks [`is_rest_match`](Self::is_rest_match) instead.
    #[cfg(test)]
    pub(crate) fn is_match(&self, request: &Request<'_>) -> bool {
        let path = match (&self.path, request.path) {
            (PathPattern::Connect, _) => true,
            (_, None) => false,
            (PathPattern::Exact { path, ignore_case: false }, Some(found)) => found == &**path,
            (PathPattern::Exact { path, ignore_case: true }, Some(found)) => found.eq_ignore_ascii_case(path),
            (PathPattern::Prefix { prefix, ignore_case }, Some(found)) => {
                starts_with(found, prefix, *ignore_case)
            }
            (PathPattern::Segment { prefix, ignore_case }, Some(found)) => {
                starts_with(found, prefix, *ignore_case)
                    && matches!(found.get(prefix.len()), None | Some(b'/'))
            }
            (PathPattern::Regex(_) | PathPattern::Template(_), Some(_)) => true,
        };
        path && self.is_rest_match(request)
    }

    /// Whether the request matches, given that its path goes with the pattern as far as the index can tell.
    #[inline]
    pub(crate) fn is_rest_match(&self, request: &Request<'_>) -> bool {
        let path = match &self.path {
            PathPattern::Exact { .. } | PathPattern::Prefix { .. } | PathPattern::Segment { .. } => true,
            PathPattern::Regex(regex) => request.path.is_some_and(|path| regex.is_match(path)),
            PathPattern::Template(template) => request.path.is_some_and(|path| template.is_match(path)),
            PathPattern::Connect => is_connect(request.headers),
        };
        path && self.conditions.as_ref().is_none_or(|conditions| conditions.is_match(request))
    }
}

impl PathPattern {
    fn compile(proto: Option<&PathSpecifier>, ignore_case: bool) -> Result<Self, ConfigError> {
        Ok(match proto {
            None => return Err(ConfigError::field("path_specifier", "is required")),
            Some(PathSpecifier::Prefix(prefix)) => {
                Self::Prefix { prefix: prefix.as_bytes().into(), ignore_case }
            }
            Some(PathSpecifier::Path(path)) => Self::Exact { path: path.as_bytes().into(), ignore_case },
            Some(PathSpecifier::SafeRegex(regex)) => Self::Regex(Regex::compile(regex).at(|| "safe_regex")?),
            Some(PathSpecifier::ConnectMatcher(_)) => Self::Connect,
            Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
                if prefix.is_empty() || prefix.contains(['?', '#']) || prefix.ends_with('/') {
                    let reason = "must not be empty, contain `?` or `#`, or end with `/`";
                    return Err(ConfigError::field("path_separated_prefix", reason));
                }
                Self::Segment { prefix: prefix.as_bytes().into(), ignore_case }
            }
            Some(PathSpecifier::PathMatchPolicy(policy)) => {
                Self::Template(UriTemplate::compile_extension(policy).at(|| "path_match_policy")?)
            }
        })
    }

    /// What a prefix rewrite replaces: the configured path or prefix, or everything where there is none.
    pub(crate) fn matched_len(&self, path: &[u8]) -> usize {
        match self {
            Self::Exact { path: text, .. }
            | Self::Prefix { prefix: text, .. }
            | Self::Segment { prefix: text, .. } => text.len().min(path.len()),
            Self::Regex(_) | Self::Template(_) | Self::Connect => path.len(),
        }
    }
}

impl Conditions {
    fn is_empty(&self) -> bool {
        let Self { runtime, grpc, headers, query, cookies, tls, metadata, filter_state } = self;
        runtime.is_none()
            && !grpc
            && headers.is_empty()
            && query.is_empty()
            && cookies.is_empty()
            && tls.is_none()
            && metadata.is_empty()
            && filter_state.is_empty()
    }

    fn is_match(&self, request: &Request<'_>) -> bool {
        let Request { headers, info, random, .. } = request;
        if self.runtime.as_ref().is_some_and(|fraction| !fraction.contains(*random)) {
            return false;
        }
        if self.grpc && !is_grpc(headers) {
            return false;
        }
        all_match(&self.headers, headers)
            && (self.query.is_empty() || {
                let target = headers.path().unwrap_or_default();
                self.query.iter().all(|matcher| matcher.is_match(target))
            })
            && self.cookies.iter().all(|matcher| matcher.is_match(headers))
            && self.tls.is_none_or(|tls| tls.is_match(info))
            && self.metadata.iter().all(|matcher| matcher.is_match(&info.metadata))
            && self
                .filter_state
                .iter()
                .all(|matcher| matcher.is_match(Some(&info.filter_state), Some(&info.connection)))
    }
}

impl TlsMatch {
    fn is_match(self, info: &StreamInfo) -> bool {
        let tls = info.connection.tls.as_deref();
        let presented = tls.is_some_and(|tls| tls.peer.is_some());
        let validated = tls.is_some_and(|tls| tls.peer_verified);
        self.presented.is_none_or(|wanted| wanted == presented)
            && self.validated.is_none_or(|wanted| wanted == validated)
    }
}

/// Whether a content type is gRPC's: `application/grpc`, alone or followed by `+` and a message format.
pub(crate) fn is_grpc(headers: &Headers) -> bool {
    let content_type = headers.get(Known::ContentType).unwrap_or_default();
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest, [] | [b'+', ..]))
}

/// CONNECT and CONNECT-UDP. Other extended CONNECT requests reach the routes as upgrades.
fn is_connect(headers: &Headers) -> bool {
    headers.method() == Some(b"CONNECT")
        || headers.get(Known::Upgrade).is_some_and(|upgrade| upgrade.eq_ignore_ascii_case(b"connect-udp"))
}

#[cfg(test)]
fn starts_with(path: &[u8], prefix: &[u8], ignore_case: bool) -> bool {
    path.get(..prefix.len())
        .is_some_and(|start| if ignore_case { start.eq_ignore_ascii_case(prefix) } else { start == prefix })
}
