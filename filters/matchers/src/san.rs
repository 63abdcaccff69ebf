//! Subject alternative names of certificates.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use waystation_schema::{At as _, ConfigError};

use matcher::string_matcher::MatchPattern;
use pb::subject_alt_name_matcher::SanType;

use crate::string::StringMatcher;

/// A type of name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SanKind {
    /// An e-mail address.
    Email,
    /// A DNS name.
    Dns,
    /// A URI.
    Uri,
    /// An IP address.
    Ip,
}

/// Compiled `envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher`.
#[derive(Clone, Debug)]
pub struct SanMatcher(Condition);

#[derive(Clone, Debug)]
enum Condition {
    /// An exact DNS name: a wildcard in the certificate matches it.
    Dns(Box<str>),
    /// Any other matcher, on the names of one type.
    Text(SanKind, StringMatcher),
}

impl SanMatcher {
    /// Compiles the protobuf form.
    ///
    /// # Errors
    /// For names of the type `OTHER_NAME`, and what is wrong with the matcher.
    pub fn compile(proto: &pb::SubjectAltNameMatcher) -> Result<Self, ConfigError> {
        let pb::SubjectAltNameMatcher { san_type, matcher, oid } = proto;
        let kind = match SanType::try_from(*san_type) {
            Ok(SanType::Email) => SanKind::Email,
            Ok(SanType::Dns) => SanKind::Dns,
            Ok(SanType::Uri) => SanKind::Uri,
            Ok(SanType::IpAddress) => SanKind::Ip,
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
    ///
    /// # Errors
    /// What is wrong with the matcher.
    pub fn compile_untyped(proto: &matcher::StringMatcher) -> Result<[Self; 4], ConfigError> {
        let of = |kind| Self::of_kind(kind, proto);
        Ok([of(SanKind::Dns)?, of(SanKind::Uri)?, of(SanKind::Email)?, of(SanKind::Ip)?])
    }

    fn of_kind(kind: SanKind, proto: &matcher::StringMatcher) -> Result<Self, ConfigError> {
        let compiled = StringMatcher::compile(proto)?;
        Ok(Self(match &proto.match_pattern {
            Some(MatchPattern::Exact(name)) if kind == SanKind::Dns => Condition::Dns(name.as_str().into()),
            _ => Condition::Text(kind, compiled),
        }))
    }

    /// Whether a name of a certificate matches.
    pub fn is_match(&self, kind: SanKind, name: &str) -> bool {
        match &self.0 {
            Condition::Dns(wanted) => kind == SanKind::Dns && dns_name_matches(wanted, name),
            Condition::Text(wanted, text) => kind == *wanted && text.is_match(name.as_bytes()),
        }
    }
}

/// Whether the DNS name `pattern` of a certificate covers `name`: one `*` in the left-most label stands for a part of
/// one label, but not in an A-label (RFC 6125 section 6.4.3; Envoy `Utility::dnsNameMatch`).
pub fn dns_name_matches(name: &str, pattern: &str) -> bool {
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
    let (name, pattern) = (name.as_bytes(), pattern.as_bytes());
    if pattern.get(..4).is_some_and(|start| start.eq_ignore_ascii_case(b"xn--")) {
        return false;
    }
    let Some(star) = pattern.iter().position(|byte| *byte == b'*') else { return false };
    let (before, after) = (&pattern[..star], &pattern[star + 1..]);
    !after.contains(&b'*')
        && name.len() >= before.len() + after.len()
        && name[..before.len()].eq_ignore_ascii_case(before)
        && name[name.len() - after.len()..].eq_ignore_ascii_case(after)
}

#[cfg(test)]
mod tests {
    use super::dns_name_matches;

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
            assert_eq!(dns_name_matches(name, pattern), expected, "{name} {pattern}");
        }
    }
}
