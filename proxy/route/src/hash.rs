//! Hash policies: which hosts requests stick to.

use std::net::IpAddr;
use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_action::hash_policy::PolicySpecifier;
use waystation_filter_api::address::Address;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::wire::duration;
use waystation_http::{HeaderName, Headers};
use waystation_matchers::{Substitution, cookie_value, query_parameter};
use waystation_schema::{At, ConfigError};
use xxhash_rust::xxh64::{Xxh64, xxh64};

use crate::cluster::header;

/// One compiled `HashPolicy`.
#[derive(Debug)]
pub struct HashPolicy {
    method: Method,
    terminal: bool,
}

#[derive(Debug)]
enum Method {
    Header(HeaderName, Option<Box<Substitution>>),
    Cookie(Box<CookieMethod>),
    SourceIp,
    QueryParameter(Box<str>),
    FilterState(Box<str>),
}

#[derive(Debug)]
struct CookieMethod {
    name: Box<str>,
    /// A cookie is made when the request has none; zero is a session cookie.
    ttl: Option<Duration>,
    path: Box<str>,
    attributes: Box<[(Box<str>, Box<str>)]>,
}

impl HashPolicy {
    pub(crate) fn compile_all(protos: &[pb::route_action::HashPolicy]) -> Result<Box<[Self]>, ConfigError> {
        let compiled = protos.iter().enumerate().filter_map(|(index, proto)| {
            Self::compile(proto).at(|| format!("hash_policy[{index}]")).transpose()
        });
        compiled.collect()
    }

    /// Compiles one entry; `connection_properties` without `source_ip` is none.
    pub(crate) fn compile(proto: &pb::route_action::HashPolicy) -> Result<Option<Self>, ConfigError> {
        let pb::route_action::HashPolicy { terminal, policy_specifier } = proto;
        let method = match policy_specifier {
            None => return Err(ConfigError::field("policy_specifier", "is required")),
            Some(PolicySpecifier::Header(proto)) => {
                let name = header("header_name", &proto.header_name).at(|| "header")?;
                let rewrite = proto.regex_rewrite.as_ref();
                let rewrite =
                    rewrite.map(|regex| Substitution::compile(regex).at(|| "regex_rewrite")).transpose();
                Method::Header(name, rewrite.at(|| "header")?.map(Box::new))
            }
            Some(PolicySpecifier::Cookie(proto)) => {
                let pb::route_action::hash_policy::Cookie { name, ttl, path, attributes } = proto;
                let attributes =
                    attributes.iter().map(|proto| (proto.name.as_str().into(), proto.value.as_str().into()));
                Method::Cookie(Box::new(CookieMethod {
                    name: name.as_str().into(),
                    ttl: duration("ttl", ttl.as_ref()).at(|| "cookie")?,
                    path: path.as_str().into(),
                    attributes: attributes.collect(),
                }))
            }
            Some(PolicySpecifier::ConnectionProperties(proto)) if proto.source_ip => Method::SourceIp,
            Some(PolicySpecifier::ConnectionProperties(_)) => return Ok(None),
            Some(PolicySpecifier::QueryParameter(proto)) => {
                Method::QueryParameter(proto.name.as_str().into())
            }
            Some(PolicySpecifier::FilterState(proto)) => Method::FilterState(proto.key.as_str().into()),
        };
        Ok(Some(Self { method, terminal: *terminal }))
    }

    /// The hash of a request over all policies. Cookies made on the way are added to `set_cookies`, values of
    /// `set-cookie` for the response.
    pub fn hash(
        policies: &[Self],
        headers: &Headers,
        info: &StreamInfo,
        set_cookies: &mut Vec<String>,
    ) -> Option<u64> {
        let mut hash = None;
        for policy in policies {
            if let Some(own) = policy.evaluate(headers, info, set_cookies) {
                // Rotating keeps equal policies from cancelling each other out.
                hash = Some(hash.map_or(0, |hash: u64| hash.rotate_left(1)) ^ own);
            }
            if policy.terminal && hash.is_some() {
                break;
            }
        }
        hash
    }

    fn evaluate(&self, headers: &Headers, info: &StreamInfo, set_cookies: &mut Vec<String>) -> Option<u64> {
        match &self.method {
            Method::Header(name, rewrite) => hash_header(headers, name, rewrite.as_deref()),
            Method::Cookie(cookie) => match cookie_value(headers, cookie.name.as_bytes()) {
                Some(value) if !value.is_empty() => Some(xxh64(value, 0)),
                _ => {
                    let value = cookie_for(info);
                    set_cookies.push(cookie.render(&value)?);
                    Some(xxh64(value.as_bytes(), 0))
                }
            },
            Method::SourceIp => {
                let ip: IpAddr = info.remote_address.ip()?.ip();
                Some(xxh64(ip.to_string().as_bytes(), 0))
            }
            Method::QueryParameter(name) => {
                let value = query_parameter(headers.path()?, name.as_bytes())?;
                Some(xxh64(value, 0))
            }
            Method::FilterState(key) => {
                let value = info.filter_state.get(key).and_then(|object| object.serialize());
                let value = value.or_else(|| {
                    info.connection.filter_state.borrow().get(key).and_then(|object| object.serialize())
                });
                Some(xxh64(&value?, 0))
            }
        }
    }
}

impl CookieMethod {
    /// The `set-cookie` value, or nothing when no cookie is to be made.
    fn render(&self, value: &str) -> Option<String> {
        let ttl = self.ttl?;
        let mut text = format!("{}=\"{value}\"", self.name);
        if !ttl.is_zero() {
            text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
        }
        if !self.path.is_empty() {
            text.push_str("; Path=");
            text.push_str(&self.path);
        }
        for (name, value) in &self.attributes {
            text.push_str("; ");
            text.push_str(name);
            if !value.is_empty() {
                text.push('=');
                text.push_str(value);
            }
        }
        text.push_str("; HttpOnly");
        Some(text)
    }
}

/// The same for all streams of a connection, so that those which race all get the same cookie.
fn cookie_for(info: &StreamInfo) -> String {
    let text = |address: &Address| address.to_string();
    let addresses = text(&info.connection.remote_address) + &text(&info.connection.local_address);
    format!("{:016x}", xxh64(addresses.as_bytes(), 0))
}

/// Several values count whatever their order.
fn hash_header(headers: &Headers, name: &HeaderName, rewrite: Option<&Substitution>) -> Option<u64> {
    let rewritten =
        |value| rewrite.map_or(std::borrow::Cow::Borrowed(value), |rewrite| rewrite.replace_all(value));
    let mut values = headers.get_all(name);
    let first = values.next()?;
    let Some(second) = values.next() else { return Some(xxh64(&rewritten(first), 0)) };
    let mut all: Vec<_> = [first, second].into_iter().chain(values).map(rewritten).collect();
    all.sort_unstable();
    let mut hasher = Xxh64::new(0);
    for value in &all {
        hasher.update(value);
    }
    Some(hasher.digest())
}
