//! `StringMatcher`.

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use envoy_types::pb::xds::r#type::matcher::v3 as xds;
use memchr::memmem;
use waystation_schema::{At, ConfigError};

use crate::messages::envoy_twin;
use crate::regex::Regex;

/// Text that tells beforehand what a matcher cannot match, ASCII case aside.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Literal<'a> {
    /// Only this matches.
    Exact(&'a [u8]),
    /// Only what begins so matches.
    Prefix(&'a [u8]),
}

/// Compiled `envoy.type.matcher.v3.StringMatcher`, on bytes. Case is ASCII case, as in Envoy.
#[derive(Clone, Debug)]
pub struct StringMatcher {
    pattern: Pattern,
    ignore_case: bool,
}

#[derive(Clone, Debug)]
enum Pattern {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Suffix(Box<[u8]>),
    /// Lower case already when the matcher ignores case.
    Contains(Box<memmem::Finder<'static>>),
    Regex(Regex),
}

impl StringMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::StringMatcher) -> Result<Self, ConfigError> {
        use pb::string_matcher::MatchPattern;
        let pb::StringMatcher { ignore_case, match_pattern } = proto;
        let pattern = match match_pattern {
            None => return Err(ConfigError::field("match_pattern", "is required")),
            Some(MatchPattern::Exact(text)) => Pattern::Exact(text.as_bytes().into()),
            Some(MatchPattern::Prefix(text)) => Pattern::Prefix(text.as_bytes().into()),
            Some(MatchPattern::Suffix(text)) => Pattern::Suffix(text.as_bytes().into()),
            Some(MatchPattern::Contains(text)) => contains(text, *ignore_case),
            Some(MatchPattern::SafeRegex(regex)) => {
                regex_pattern(Regex::compile(regex).at(|| "safe_regex")?, *ignore_case)?
            }
            Some(MatchPattern::Custom(custom)) => return Err(unsupported_custom(custom)),
        };
        Ok(Self { pattern, ignore_case: *ignore_case })
    }

    /// Compiles the same of the `xds` package.
    pub fn compile_xds(proto: &xds::StringMatcher) -> Result<Self, ConfigError> {
        Self::compile(&envoy_twin(proto))
    }

    /// Compiles a `ListStringMatcher`.
    pub fn compile_list(proto: &pb::ListStringMatcher) -> Result<Vec<Self>, ConfigError> {
        let compile = |(index, pattern)| Self::compile(pattern).at(|| format!("patterns[{index}]"));
        proto.patterns.iter().enumerate().map(compile).collect()
    }

    /// Matches exactly `text`.
    pub fn exact(text: &str) -> Self {
        Self { pattern: Pattern::Exact(text.as_bytes().into()), ignore_case: false }
    }

    /// Matches what begins with `text`.
    pub fn prefix(text: &str) -> Self {
        Self { pattern: Pattern::Prefix(text.as_bytes().into()), ignore_case: false }
    }

    /// Matches what ends with `text`.
    pub fn suffix(text: &str) -> Self {
        Self { pattern: Pattern::Suffix(text.as_bytes().into()), ignore_case: false }
    }

    /// Matches what contains `text`.
    pub fn contains(text: &str) -> Self {
        Self { pattern: contains(text, false), ignore_case: false }
    }

    /// Matches what `regex` matches as a whole.
    pub fn regex(regex: Regex) -> Self {
        Self { pattern: Pattern::Regex(regex), ignore_case: false }
    }

    /// What every text that matches is or begins with, when that is known.
    pub fn literal(&self) -> Option<Literal<'_>> {
        match &self.pattern {
            Pattern::Exact(text) => Some(Literal::Exact(text)),
            Pattern::Prefix(text) => Some(Literal::Prefix(text)),
            Pattern::Suffix(_) | Pattern::Contains(_) | Pattern::Regex(_) => None,
        }
    }

    /// Whether `value` matches.
    pub fn is_match(&self, value: &[u8]) -> bool {
        match (&self.pattern, self.ignore_case) {
            (Pattern::Exact(text), false) => value == &**text,
            (Pattern::Exact(text), true) => value.eq_ignore_ascii_case(text),
            (Pattern::Prefix(text), false) => value.starts_with(text),
            (Pattern::Prefix(text), true) => {
                value.get(..text.len()).is_some_and(|start| start.eq_ignore_ascii_case(text))
            }
            (Pattern::Suffix(text), false) => value.ends_with(text),
            (Pattern::Suffix(text), true) => {
                let start = value.len().checked_sub(text.len());
                start.is_some_and(|start| value[start..].eq_ignore_ascii_case(text))
            }
            (Pattern::Contains(finder), false) => finder.find(value).is_some(),
            (Pattern::Contains(finder), true) => contains_ignoring_case(value, finder.needle()),
            (Pattern::Regex(regex), _) => regex.is_match(value),
        }
    }
}

/// `text` is lower case.
fn contains_ignoring_case(value: &[u8], text: &[u8]) -> bool {
    let Some(first) = text.first() else { return true };
    let mut starts = memchr::memchr2_iter(*first, first.to_ascii_uppercase(), value);
    starts.any(|at| value.get(at..at + text.len()).is_some_and(|found| found.eq_ignore_ascii_case(text)))
}

fn contains(text: &str, ignore_case: bool) -> Pattern {
    let finder = if ignore_case {
        memmem::Finder::new(text.to_ascii_lowercase().as_bytes()).into_owned()
    } else {
        memmem::Finder::new(text.as_bytes()).into_owned()
    };
    Pattern::Contains(Box::new(finder))
}

fn regex_pattern(regex: Regex, ignore_case: bool) -> Result<Pattern, ConfigError> {
    if ignore_case {
        return Err(ConfigError::field("ignore_case", "has no effect for safe_regex"));
    }
    Ok(Pattern::Regex(regex))
}

fn unsupported_custom(custom: &envoy_types::pb::xds::core::v3::TypedExtensionConfig) -> ConfigError {
    let reason = format!("not supported: string matcher extension `{}`", custom.name);
    ConfigError::field("custom", reason)
}

#[cfg(test)]
mod tests {
    use super::StringMatcher;
    use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher as Proto, string_matcher};
    use string_matcher::MatchPattern::{Contains, Exact, Prefix, SafeRegex, Suffix};

    fn matches(pattern: string_matcher::MatchPattern, ignore_case: bool, value: &str) -> bool {
        let proto = Proto { ignore_case, match_pattern: Some(pattern) };
        StringMatcher::compile(&proto).unwrap().is_match(value.as_bytes())
    }

    #[test]
    fn every_kind_with_and_without_case() {
        for (pattern, hit, miss) in [
            (Exact("Foo".into()), "Foo", "foo"),
            (Prefix("Foo".into()), "Foobar", "foobar"),
            (Suffix("Bar".into()), "fooBar", "foobar"),
            (Contains("Bc".into()), "aBcd", "abcd"),
        ] {
            assert!(matches(pattern.clone(), false, hit), "{pattern:?}");
            assert!(!matches(pattern.clone(), false, miss), "{pattern:?}");
            assert!(matches(pattern.clone(), true, miss), "{pattern:?}");
            assert!(!matches(pattern.clone(), true, "x"), "{pattern:?}");
        }
        let regex = || SafeRegex(RegexMatcher { regex: "a+".into(), engine_type: None });
        assert!(matches(regex(), false, "aaa") && !matches(regex(), false, "aab"));
    }

    #[test]
    fn errors_name_the_field() {
        let regex = RegexMatcher { regex: "(".into(), engine_type: None };
        let proto = Proto { ignore_case: false, match_pattern: Some(SafeRegex(regex)) };
        assert_eq!(StringMatcher::compile(&proto).unwrap_err().path(), "safe_regex.regex");
        assert_eq!(StringMatcher::compile(&Proto::default()).unwrap_err().path(), "match_pattern");
    }
}
