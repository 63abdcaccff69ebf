//! `PathMatcher`.

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use waystation_schema::{At, ConfigError};

use crate::string::{Literal, StringMatcher};

/// Compiled `envoy.type.matcher.v3.PathMatcher`: looks at a request target without query and fragment.
#[derive(Clone, Debug)]
pub struct PathMatcher(StringMatcher);

impl PathMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::PathMatcher) -> Result<Self, ConfigError> {
        match &proto.rule {
            None => Err(ConfigError::field("rule", "is required")),
            Some(pb::path_matcher::Rule::Path(text)) => Ok(Self(StringMatcher::compile(text).at(|| "path")?)),
        }
    }

    /// What every target that matches is or begins with, when that is known.
    pub fn literal(&self) -> Option<Literal<'_>> {
        self.0.literal()
    }

    /// Whether a request target (`:path`) matches.
    pub fn is_match(&self, target: &[u8]) -> bool {
        self.0.is_match(without_query(target))
    }
}

/// A request target up to its query or fragment.
#[inline]
pub fn without_query(target: &[u8]) -> &[u8] {
    &target[..memchr::memchr2(b'?', b'#', target).unwrap_or(target.len())]
}

#[cfg(test)]
mod tests {
    use super::PathMatcher;
    use envoy_types::pb::envoy::r#type::matcher::v3 as pb;

    #[test]
    fn the_query_does_not_count() {
        let text = pb::StringMatcher {
            match_pattern: Some(pb::string_matcher::MatchPattern::Exact("/a".into())),
            ..Default::default()
        };
        let matcher =
            PathMatcher::compile(&pb::PathMatcher { rule: Some(pb::path_matcher::Rule::Path(text)) });
        let matcher = matcher.unwrap();
        assert!(matcher.is_match(b"/a?b") && matcher.is_match(b"/a#b") && !matcher.is_match(b"/ab"));
    }
}
