//! `HeaderMatcher`.

use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_http::{HeaderName, Headers, Known};
use waystation_schema::{At, ConfigError};

use crate::regex::Regex;
use crate::string::{Literal, StringMatcher};

/// Compiled `envoy.config.route.v3.HeaderMatcher`. Of several values of one header, one has to match.
#[derive(Clone, Debug)]
pub struct HeaderMatcher {
    name: HeaderName,
    condition: Condition,
    invert: bool,
    missing_is_empty: bool,
}

#[derive(Clone, Debug)]
enum Condition {
    Present(bool),
    Text(StringMatcher),
    /// Half open: `start <= value < end`.
    Range(i64, i64),
}

impl HeaderMatcher {
    /// Compiles the protobuf form, deprecated specifiers included.
    #[expect(deprecated, reason = "configurations still use the old specifiers")]
    pub fn compile(proto: &pb::HeaderMatcher) -> Result<Self, ConfigError> {
        use pb::header_matcher::HeaderMatchSpecifier as Specifier;
        let pb::HeaderMatcher { name, invert_match, treat_missing_header_as_empty, header_match_specifier } =
            proto;
        let name = HeaderName::parse(name).map_err(|error| ConfigError::field("name", error.to_string()))?;
        let condition = match header_match_specifier {
            None => Condition::Present(true),
            Some(Specifier::PresentMatch(present)) => Condition::Present(*present),
            Some(Specifier::StringMatch(matcher)) => {
                Condition::Text(StringMatcher::compile(matcher).at(|| "string_match")?)
            }
            Some(Specifier::ExactMatch(text)) => Condition::Text(StringMatcher::exact(text)),
            Some(Specifier::PrefixMatch(text)) => Condition::Text(StringMatcher::prefix(text)),
            Some(Specifier::SuffixMatch(text)) => Condition::Text(StringMatcher::suffix(text)),
            Some(Specifier::ContainsMatch(text)) => Condition::Text(StringMatcher::contains(text)),
            Some(Specifier::SafeRegexMatch(regex)) => {
                Condition::Text(StringMatcher::regex(Regex::compile(regex).at(|| "safe_regex_match")?))
            }
            Some(Specifier::RangeMatch(range)) => Condition::Range(range.start, range.end),
        };
        Ok(Self {
            // A request's `host` header is its authority.
            name: if name.as_name().known() == Some(Known::Host) { Known::Authority.into() } else { name },
            condition,
            invert: *invert_match,
            missing_is_empty: *treat_missing_header_as_empty,
        })
    }

    /// Compiles a list of them, all of which must match.
    pub fn compile_all(protos: &[pb::HeaderMatcher], field: &str) -> Result<Box<[Self]>, ConfigError> {
        let compile = |(index, proto)| Self::compile(proto).at(|| format!("{field}[{index}]"));
        protos.iter().enumerate().map(compile).collect()
    }

    /// Matches when the header is there.
    pub fn present(name: HeaderName) -> Self {
        Self { name, condition: Condition::Present(true), invert: false, missing_is_empty: false }
    }

    /// The header looked at.
    pub fn name(&self) -> &HeaderName {
        &self.name
    }

    /// What a value of the header has to be or begin with, when that is known and the header must be there.
    pub fn literal(&self) -> Option<Literal<'_>> {
        match &self.condition {
            Condition::Text(text) if !self.invert && !self.missing_is_empty => text.literal(),
            _ => None,
        }
    }

    /// Whether `headers` match.
    ///
    /// A missing header matches only a test for absence, or as an empty value when the configuration says so;
    /// inverting does not turn "missing" into a match.
    #[inline]
    pub fn is_match(&self, headers: &Headers) -> bool {
        let outcome = match &self.condition {
            Condition::Present(wanted) => (self.missing_is_empty || headers.contains(&self.name)) == *wanted,
            condition => {
                let mut values = headers.get_all(&self.name).peekable();
                match values.peek() {
                    None if self.missing_is_empty => condition.is_match(&[]),
                    None => return false,
                    Some(_) => values.any(|value| condition.is_match(value)),
                }
            }
        };
        outcome != self.invert
    }
}

impl Condition {
    fn is_match(&self, value: &[u8]) -> bool {
        match self {
            Self::Present(wanted) => *wanted,
            Self::Text(text) => text.is_match(value),
            Self::Range(start, end) => integer(value).is_some_and(|number| (*start..*end).contains(&number)),
        }
    }
}

/// Whether `headers` match every one of `matchers`.
#[inline]
pub fn all_match(matchers: &[HeaderMatcher], headers: &Headers) -> bool {
    matchers.iter().all(|matcher| matcher.is_match(headers))
}

/// A decimal number with optional sign and surrounding blanks, as `absl::SimpleAtoi` reads it.
fn integer(value: &[u8]) -> Option<i64> {
    str::from_utf8(value).ok()?.trim_ascii().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::HeaderMatcher;
    use envoy_types::pb::envoy::config::route::v3 as pb;
    use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
    use envoy_types::pb::envoy::r#type::v3::Int64Range;
    use pb::header_matcher::HeaderMatchSpecifier as Specifier;
    use waystation_http::Headers;

    fn text(pattern: matcher::string_matcher::MatchPattern) -> Specifier {
        Specifier::StringMatch(matcher::StringMatcher { ignore_case: false, match_pattern: Some(pattern) })
    }

    #[test]
    fn conditions_inversion_and_missing_headers() {
        use matcher::string_matcher::MatchPattern::{Exact, Prefix};
        let absent = Headers::new();
        let one: Headers = [("x", "5")].into_iter().collect();
        let two: Headers = [("x", "a"), ("y", "z"), ("x", "b")].into_iter().collect();
        let range = || Specifier::RangeMatch(Int64Range { start: 5, end: 7 });
        // specifier, invert, missing as empty; expected for: absent, `5`, `a` and `b`
        for (specifier, invert, empty, expected) in [
            (None, false, false, [false, true, true]),
            (None, true, false, [true, false, false]),
            (Some(Specifier::PresentMatch(false)), false, false, [true, false, false]),
            (Some(Specifier::PresentMatch(true)), false, true, [true, true, true]),
            (Some(text(Exact("a,b".into()))), false, false, [false, false, false]),
            (Some(text(Exact("b".into()))), false, false, [false, false, true]),
            (Some(text(Exact("a".into()))), true, false, [false, true, false]),
            (Some(text(Exact("a".into()))), true, true, [true, true, false]),
            (Some(text(Prefix("".into()))), false, true, [true, true, true]),
            (Some(range()), false, false, [false, true, false]),
            (Some(range()), true, true, [true, false, true]),
        ] {
            let proto = pb::HeaderMatcher {
                name: "X".into(),
                invert_match: invert,
                treat_missing_header_as_empty: empty,
                header_match_specifier: specifier.clone(),
            };
            let matcher = HeaderMatcher::compile(&proto).unwrap();
            let got = [&absent, &one, &two].map(|headers| matcher.is_match(headers));
            assert_eq!(got, expected, "{specifier:?} invert={invert} empty={empty}");
        }
    }

    #[test]
    fn host_is_the_authority() {
        let headers: Headers = [(":authority", "a.example")].into_iter().collect();
        let proto = pb::HeaderMatcher {
            name: "Host".into(),
            header_match_specifier: Some(text(matcher::string_matcher::MatchPattern::Exact(
                "a.example".into(),
            ))),
            ..Default::default()
        };
        assert!(HeaderMatcher::compile(&proto).unwrap().is_match(&headers));
        let bad = pb::HeaderMatcher { name: "a b".into(), ..Default::default() };
        assert_eq!(HeaderMatcher::compile(&bad).unwrap_err().path(), "name");
    }
}
