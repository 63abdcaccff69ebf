//! Matching subject alternative names.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use waystation_matchers::StringMatcher;
use waystation_schema::{At as _, ConfigError};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::X509Certificate;

use crate::x509;

use matcher::string_matcher::MatchPattern;
use pb::subject_alt_name_matcher::SanType;

/// Compiled `SubjectAltNameMatcher`.
#[derive(Clone, Debug)]
pub(crate) enum SanMatcher {
    /// An exact DNS name: a wildcard in the certificate matches it.
    Dns(Box<str>),
    /// Any other matcher, on the SANs of one type.
    Text(Kind, StringMatcher),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    Email,
    Dns,
    Uri,
    Ip,
}

impl SanMatcher {
    pub(crate) fn compile(proto: &pb::SubjectAltNameMatcher) -> Result<Self, ConfigError> {
        let pb::SubjectAltNameMatcher { san_type, matcher, oid } = proto;
        let kind = match SanType::try_from(*san_type) {
            Ok(SanType::Email) => Kind::Email,
            Ok(SanType::Dns) => Kind::Dns,
            Ok(SanType::Uri) => Kind::Uri,
            Ok(SanType::IpAddress) => Kind::Ip,
            Ok(SanType::OtherName) => {
                return Err(ConfigError::field("san_type", "not supported: OTHER_NAME"));
            }
            Ok(SanType::Unspecified) | Err(_) => {
                return Err(ConfigError::field("san_type", "value must be a defined type"));
            }
        };
        if !oid.is_empty() {
            return Err(ConfigError::field("oid", "not supported: only OTHER_NAME has one"));
        }
        let matcher = matcher.as_ref().ok_or_else(|| ConfigError::field("matcher", "value is required"))?;
        Self::of_kind(kind, matcher).at(|| "matcher")
    }

    /// `match_subject_alt_names`: one matcher for every type of name.
    pub(crate) fn compile_untyped(proto: &matcher::StringMatcher) -> Result<[Self; 4], ConfigError> {
        let of = |kind| Self::of_kind(kind, proto);
        Ok([of(Kind::Dns)?, of(Kind::Uri)?, of(Kind::Email)?, of(Kind::Ip)?])
    }

    fn of_kind(kind: Kind, proto: &matcher::StringMatcher) -> Result<Self, ConfigError> {
        let compiled = StringMatcher::compile(proto)?;
        match &proto.match_pattern {
            Some(MatchPattern::Exact(name)) if kind == Kind::Dns => Ok(Self::Dns(name.as_str().into())),
            _ => Ok(Self::Text(kind, compiled)),
        }
    }

    /// Whether one of the names of `certificate` matches.
    pub(crate) fn matches(&self, certificate: &X509Certificate<'_>) -> bool {
        x509::names(certificate).iter().any(|name| match (self, name) {
            (Self::Dns(wanted), GeneralName::DNSName(name)) => dns_matches(wanted, name),
            (Self::Text(Kind::Dns, matcher), GeneralName::DNSName(text))
            | (Self::Text(Kind::Uri, matcher), GeneralName::URI(text))
            | (Self::Text(Kind::Email, matcher), GeneralName::RFC822Name(text)) => {
                matcher.is_match(text.as_bytes())
            }
            (Self::Text(Kind::Ip, matcher), GeneralName::IPAddress(bytes)) => {
                x509::ip_text(bytes).is_some_and(|text| matcher.is_match(text.as_bytes()))
            }
            _ => false,
        })
    }
}

/// Whether `certificate` is for `name`, which may be a DNS name, a URI or an address.
pub(crate) fn has_name(certificate: &X509Certificate<'_>, name: &str) -> bool {
    x509::names(certificate).iter().any(|own| match own {
        GeneralName::DNSName(pattern) => dns_matches(name, pattern),
        GeneralName::URI(uri) => *uri == name,
        GeneralName::IPAddress(bytes) => x509::ip_text(bytes).is_some_and(|text| text == name),
        _ => false,
    })
}

/// Whether the DNS name `pattern` of a certificate covers `name`: one `*` in the left-most label stands for a part of
/// one label, but not in an A-label (RFC 6125 section 6.4.3; Envoy `Utility::dnsNameMatch`).
fn dns_matches(name: &str, pattern: &str) -> bool {
    if name.eq_ignore_ascii_case(pattern) {
        return true;
    }
    let (Some((name, name_rest)), Some((pattern, pattern_rest))) =
        (name.split_once('.'), pattern.split_once('.'))
    else {
        return false;
    };
    if !name_rest.eq_ignore_ascii_case(pattern_rest) || pattern_rest.contains('*') {
        return false;
    }
    let (name, pattern) = (name.to_ascii_lowercase(), pattern.to_ascii_lowercase());
    if pattern.starts_with("xn--") {
        return false;
    }
    match pattern.split_once('*') {
        Some((before, after)) if !after.contains('*') => {
            name.len() + 1 >= pattern.len() && name.starts_with(before) && name.ends_with(after)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::dns_matches;

    #[test]
    fn wildcards_cover_one_label() {
        for (name, pattern, expected) in [
            ("a.example.com", "a.example.com", true),
            ("A.Example.com", "a.example.COM", true),
            ("a.example.com", "*.example.com", true),
            ("foobar.example.com", "foo*.example.com", true),
            ("foobar.example.com", "*bar.example.com", true),
            ("foobar.example.com", "f*r.example.com", true),
            ("fr.example.com", "f*r.example.com", true),
            ("f.example.com", "f*f.example.com", false),
            ("a.b.example.com", "*.example.com", false),
            ("example.com", "*.example.com", false),
            ("example.com", "*.com", true),
            ("xn--abc.example.com", "xn--*.example.com", false),
            ("a.b.com", "a.*.com", false),
            ("a.b.com", "*.*.com", false),
            ("abc.b.com", "**c.b.com", false),
            ("localhost", "*", false),
        ] {
            assert_eq!(dns_matches(name, pattern), expected, "{name} {pattern}");
        }
    }
}
