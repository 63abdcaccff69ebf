//! Rewrites of path and host.

use std::borrow::Cow;
use std::time::Instant;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::extensions::path::rewrite::uri_template::v3::UriTemplateRewriteConfig;
use envoy_types::pb::envoy::r#type::matcher::v3::RegexMatchAndSubstitute;
use pb::route_action::HostRewriteSpecifier;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_format::{AccessLogType, FormatContext, Formatter};
use waystation_http::{HeaderName, Headers, Known};
use waystation_matchers::{Substitution, UriRewrite, without_query};
use waystation_schema::{At, ConfigError};

use crate::cluster::header;
use crate::matching::PathPattern;

/// A compiled path rewrite.
#[derive(Debug)]
pub struct PathRewrite(Kind);

#[derive(Debug)]
enum Kind {
    /// Replaces what the route's path or prefix matched.
    Prefix(Box<str>),
    /// Replaces within the path, not the query.
    Regex(Substitution),
    Template(Box<UriRewrite>),
    /// Replaces the path, not the query; an empty result changes nothing.
    Format(Box<Formatter>),
}

/// What a request is formatted with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestFacts<'a> {
    pub(crate) info: &'a StreamInfo,
    pub(crate) now: Instant,
}

impl PathRewrite {
    /// Compiles the fields that `RouteAction` and `RedirectAction` share, at most one of which may be set.
    pub(crate) fn compile(
        prefix: &str,
        regex: Option<&RegexMatchAndSubstitute>,
        policy: Option<&TypedExtensionConfig>,
        format: &str,
        pattern: &PathPattern,
    ) -> Result<Option<Self>, ConfigError> {
        let set = [!prefix.is_empty(), regex.is_some(), policy.is_some(), !format.is_empty()];
        if set.iter().filter(|set| **set).count() > 1 {
            let reason =
                "only one of prefix_rewrite, regex_rewrite, path_rewrite_policy and path_rewrite may be set";
            return Err(ConfigError::new(reason));
        }
        let kind = if !prefix.is_empty() {
            Kind::Prefix(prefix.into())
        } else if let Some(regex) = regex {
            Kind::Regex(Substitution::compile(regex).at(|| "regex_rewrite")?)
        } else if let Some(policy) = policy {
            Kind::Template(Box::new(
                template_rewrite(policy, pattern).at(|| "typed_config").at(|| "path_rewrite_policy")?,
            ))
        } else if !format.is_empty() {
            Kind::Format(Box::new(Formatter::compile_omitting_empty(format).at(|| "path_rewrite")?))
        } else {
            return Ok(None);
        };
        Ok(Some(Self(kind)))
    }

    /// The request target after the rewrite, or nothing when it stays as it is.
    pub(crate) fn apply(
        &self,
        headers: &Headers,
        pattern: &PathPattern,
        facts: RequestFacts<'_>,
    ) -> Option<Vec<u8>> {
        let target = headers.path()?;
        let path = without_query(target);
        let with_rest = |new: &[u8], rest: &[u8]| [new, rest].concat();
        Some(match &self.0 {
            Kind::Prefix(prefix) => with_rest(prefix.as_bytes(), &target[pattern.matched_len(path)..]),
            Kind::Regex(substitution) => with_rest(&substitution.replace_all(path), &target[path.len()..]),
            Kind::Template(rewrite) => with_rest(&rewrite.rewrite(path)?, &target[path.len()..]),
            Kind::Format(formatter) => {
                let new = format(formatter, headers, facts);
                if new.is_empty() {
                    return None;
                }
                with_rest(&new, &target[path.len()..])
            }
        })
    }
}

/// A compiled `host_rewrite_specifier`.
#[derive(Debug)]
pub enum HostRewrite {
    /// A fixed host.
    Literal(Box<str>),
    /// The name of the upstream host: the router sets it once it has one.
    Auto,
    /// The value of a request header, if it has one.
    Header(HeaderName),
    /// What a substitution makes of the path.
    PathRegex(Substitution),
    /// A format; an empty result changes nothing.
    Format(Box<Formatter>),
}

impl HostRewrite {
    pub(crate) fn compile(proto: Option<&HostRewriteSpecifier>) -> Result<Option<Self>, ConfigError> {
        Ok(match proto {
            None => None,
            Some(HostRewriteSpecifier::AutoHostRewrite(auto)) => auto.value.then_some(Self::Auto),
            Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
                (!host.is_empty()).then(|| Self::Literal(host.as_str().into()))
            }
            Some(HostRewriteSpecifier::HostRewriteHeader(name)) if name.is_empty() => None,
            Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
                Some(Self::Header(header("host_rewrite_header", name)?))
            }
            Some(HostRewriteSpecifier::HostRewritePathRegex(regex)) => {
                Some(Self::PathRegex(Substitution::compile(regex).at(|| "host_rewrite_path_regex")?))
            }
            Some(HostRewriteSpecifier::HostRewrite(format)) if format.is_empty() => None,
            Some(HostRewriteSpecifier::HostRewrite(format)) => {
                Some(Self::Format(Box::new(Formatter::compile(format).at(|| "host_rewrite")?)))
            }
        })
    }

    /// The new host, or nothing when it stays as it is (or the upstream host decides).
    pub(crate) fn apply<'a>(
        &'a self,
        headers: &'a Headers,
        facts: RequestFacts<'_>,
    ) -> Option<Cow<'a, [u8]>> {
        let host = match self {
            Self::Literal(host) => Cow::Borrowed(host.as_bytes()),
            Self::Auto => return None,
            Self::Header(name) => Cow::Borrowed(headers.get(name)?),
            Self::PathRegex(substitution) => substitution.replace_all(without_query(headers.path()?)),
            Self::Format(formatter) => Cow::Owned(format(formatter, headers, facts)),
        };
        (!host.is_empty()).then_some(host)
    }
}

/// Sets `:authority` and leaves a trace of the old one in `x-envoy-original-host` (not when a weighted cluster's rewrite
/// is the cause), and in `x-forwarded-host` when that is appended to. Envoy's `Utility::updateAuthority`.
pub(crate) fn update_authority(
    headers: &mut Headers,
    host: &[u8],
    append_x_forwarded_host: bool,
    keep_original: bool,
) {
    let old = headers.authority().unwrap_or_default().to_vec();
    if keep_original && !old.is_empty() {
        headers.set(Known::XEnvoyOriginalHost, &old);
    }
    if append_x_forwarded_host && !old.is_empty() {
        // Not when it is the value appended last: that was us, on an earlier try.
        let last =
            headers.get(Known::XForwardedHost).and_then(|hosts| hosts.rsplit(|byte| *byte == b',').next());
        if last.is_none_or(|last| last.trim_ascii() != old) {
            headers.append_joined(Known::XForwardedHost, ",", &old);
        }
    }
    headers.set(Known::Authority, host);
}

fn format(formatter: &Formatter, headers: &Headers, facts: RequestFacts<'_>) -> Vec<u8> {
    let cx = FormatContext {
        request: Some(headers),
        response: None,
        trailers: None,
        info: facts.info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now: facts.now,
    };
    let mut out = Vec::new();
    formatter.write(&cx, &mut out);
    out
}

fn template_rewrite(policy: &TypedExtensionConfig, pattern: &PathPattern) -> Result<UriRewrite, ConfigError> {
    let any = policy.typed_config.as_ref().ok_or_else(|| ConfigError::new("is required"))?;
    match type_name(any) {
        "envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig" => {
            let UriTemplateRewriteConfig { path_template_rewrite } = unpack(any)?;
            let PathPattern::Template(template) = pattern else {
                return Err(ConfigError::new(
                    "unable to use envoy.path.rewrite.uri_template.uri_template_rewriter extension without \
                     envoy.path.match.uri_template.uri_template_matcher extension",
                ));
            };
            UriRewrite::compile(&path_template_rewrite, template).at(|| "path_template_rewrite")
        }
        name => Err(ConfigError::new(format!("not supported: path rewrite policy {name}"))),
    }
}
