//! `RedirectAction`.

use std::borrow::Cow;
use std::time::Instant;

use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
use waystation_filter_api::stream::StreamInfo;
use waystation_http::{Headers, Known};
use waystation_schema::ConfigError;

use crate::matching::PathPattern;
use crate::rewrite::{PathRewrite, RequestFacts};

/// Compiled `RedirectAction`.
#[derive(Debug)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    scheme: Option<Box<str>>,
    host: Option<Box<str>>,
    port: Option<u16>,
    path: PathRedirect,
    strip_query: bool,
}

#[derive(Debug)]
enum PathRedirect {
    Keep,
    /// A new path; with a query of its own it replaces the request's.
    Path(Box<str>),
    Rewrite(PathRewrite),
}

impl Redirect {
    pub(crate) fn compile(proto: &pb::RedirectAction, pattern: &PathPattern) -> Result<Self, ConfigError> {
        let pb::RedirectAction {
            host_redirect,
            port_redirect,
            response_code: _,
            strip_query,
            scheme_rewrite_specifier,
            path_rewrite_specifier,
        } = proto;
        let status = match proto.response_code() {
            RedirectResponseCode::MovedPermanently => 301,
            RedirectResponseCode::Found => 302,
            RedirectResponseCode::SeeOther => 303,
            RedirectResponseCode::TemporaryRedirect => 307,
            RedirectResponseCode::PermanentRedirect => 308,
        };
        let scheme = match scheme_rewrite_specifier {
            Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".into()),
            Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) if !scheme.is_empty() => {
                Some(scheme.as_str().into())
            }
            _ => None,
        };
        let rewrite = |prefix: &str, regex, format: &str| {
            let rewrite = PathRewrite::compile(prefix, regex, None, format, pattern)?;
            Ok::<_, ConfigError>(rewrite.map_or(PathRedirect::Keep, PathRedirect::Rewrite))
        };
        let path = match path_rewrite_specifier {
            None => PathRedirect::Keep,
            Some(PathRewriteSpecifier::PathRedirect(path)) if path.is_empty() => PathRedirect::Keep,
            Some(PathRewriteSpecifier::PathRedirect(path)) => PathRedirect::Path(path.as_str().into()),
            Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => rewrite(prefix, None, "")?,
            Some(PathRewriteSpecifier::RegexRewrite(regex)) => rewrite("", Some(regex), "")?,
            Some(PathRewriteSpecifier::PathRewrite(format)) => rewrite("", None, format)?,
        };
        Ok(Self {
            status,
            scheme,
            host: (!host_redirect.is_empty()).then(|| host_redirect.as_str().into()),
            port: match port_redirect {
                0 => None,
                port => Some(
                    u16::try_from(*port)
                        .map_err(|_| ConfigError::field("port_redirect", "must be at most 65535"))?,
                ),
            },
            path,
            strip_query: *strip_query,
        })
    }

    /// The `location` of the redirect of a request.
    pub(crate) fn location(
        &self,
        headers: &Headers,
        info: &StreamInfo,
        now: Instant,
        pattern: &PathPattern,
    ) -> Vec<u8> {
        let scheme = match &self.scheme {
            Some(scheme) => scheme.as_bytes(),
            // The scheme of the request, not the security of the connection.
            None => headers.scheme().unwrap_or_default(),
        };
        let host = match &self.host {
            Some(host) => host.as_bytes(),
            None => request_host(headers, scheme, self.port.is_some()),
        };
        let mut location = Vec::with_capacity(64);
        location.extend_from_slice(scheme);
        location.extend_from_slice(b"://");
        location.extend_from_slice(host);
        if let Some(port) = self.port {
            location.extend_from_slice(format!(":{port}").as_bytes());
        }
        let target = headers.path().unwrap_or_default();
        let (path, own_query) = match &self.path {
            PathRedirect::Keep => (Cow::Borrowed(target), false),
            PathRedirect::Path(path) if path.contains('?') => (Cow::Borrowed(path.as_bytes()), true),
            PathRedirect::Path(path) => {
                let query = memchr::memchr(b'?', target).map_or(&[][..], |at| &target[at..]);
                (Cow::Owned([path.as_bytes(), query].concat()), false)
            }
            PathRedirect::Rewrite(rewrite) => {
                let rewritten = rewrite.apply(headers, pattern, RequestFacts { info, now });
                (rewritten.map_or(Cow::Borrowed(target), Cow::Owned), false)
            }
        };
        let end = match memchr::memchr(b'?', &path) {
            Some(at) if self.strip_query && !own_query => at,
            _ => path.len(),
        };
        location.extend_from_slice(&path[..end]);
        location
    }
}

/// Where a request must go to be on TLS (`require_tls`, status 301).
pub fn tls_redirect_location(headers: &Headers) -> Vec<u8> {
    let mut location = b"https://".to_vec();
    location.extend_from_slice(headers.authority().unwrap_or_default());
    location.extend_from_slice(headers.path().unwrap_or_default());
    location
}

/// The request's host, without its port when that gives way to another port, or is the old scheme's default while
/// the scheme changes. The old scheme is that of `x-forwarded-proto`, so that `http://a:80` keeps its port when it
/// came over TLS. Envoy's `processRequestHost`.
fn request_host<'a>(headers: &'a Headers, new_scheme: &[u8], new_port: bool) -> &'a [u8] {
    let host = headers.authority().unwrap_or_default();
    let Some(at) = port_start(host) else { return host };
    let protocol = headers.get(Known::XForwardedProto).unwrap_or_default();
    let port = &host[at..];
    let default_port = (protocol == b"https" && port == b":443") || (protocol == b"http" && port == b":80");
    if new_port || (new_scheme != protocol && default_port) { &host[..at] } else { host }
}

/// Where `:port` begins in a host, if it has a port. Colons inside an IPv6 literal's brackets do not count.
pub(crate) fn port_start(host: &[u8]) -> Option<usize> {
    let colon = memchr::memrchr(b':', host)?;
    match memchr::memrchr(b']', host) {
        Some(bracket) if bracket > colon => None,
        _ => Some(colon),
    }
}
