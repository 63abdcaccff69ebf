//! `QueryParameterMatcher`.

use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_schema::{At, ConfigError};

use crate::inputs::percent_decode;
use crate::string::StringMatcher;

/// Compiled `envoy.config.route.v3.QueryParameterMatcher`: looks at the first parameter of its name, undecoded.
#[derive(Clone, Debug)]
pub struct QueryParameterMatcher {
    name: Box<[u8]>,
    condition: Condition,
}

#[derive(Clone, Debug)]
enum Condition {
    Present(bool),
    Text(StringMatcher),
}

impl QueryParameterMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::QueryParameterMatcher) -> Result<Self, ConfigError> {
        use pb::query_parameter_matcher::QueryParameterMatchSpecifier as Specifier;
        let pb::QueryParameterMatcher { name, query_parameter_match_specifier } = proto;
        let condition = match query_parameter_match_specifier {
            None => Condition::Present(true),
            Some(Specifier::PresentMatch(present)) => Condition::Present(*present),
            Some(Specifier::StringMatch(matcher)) => {
                Condition::Text(StringMatcher::compile(matcher).at(|| "string_match")?)
            }
        };
        Ok(Self { name: name.as_bytes().into(), condition })
    }

    /// Whether a request target (`:path`) matches.
    pub fn is_match(&self, target: &[u8]) -> bool {
        self.is_value_match(query_parameter(target, &self.name))
    }

    /// As [`is_match`](Self::is_match), with names and values decoded: as rate limit actions see them, and routes do not.
    pub fn is_match_decoded(&self, target: &[u8]) -> bool {
        let found = query_parameters(target).find(|(name, _)| *percent_decode(name) == *self.name);
        self.is_value_match(found.map(|(_, value)| percent_decode(value)).as_deref())
    }

    fn is_value_match(&self, value: Option<&[u8]>) -> bool {
        match &self.condition {
            Condition::Present(wanted) => value.is_some() == *wanted,
            Condition::Text(text) => value.is_some_and(|value| text.is_match(value)),
        }
    }
}

/// The first parameter called `name` in a request target's query, as it stands there.
pub fn query_parameter<'a>(target: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    query_parameters(target).find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// The parameters of a request target's query, undecoded. One without `=` has an empty value.
pub fn query_parameters(target: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let query = memchr::memchr(b'?', target).map(|at| &target[at + 1..]);
    query.into_iter().flat_map(|query| query.split(|byte| *byte == b'&')).map(
        |parameter| match memchr::memchr(b'=', parameter) {
            Some(at) => (&parameter[..at], &parameter[at + 1..]),
            None => (parameter, &[][..]),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::{QueryParameterMatcher, query_parameter};
    use envoy_types::pb::envoy::config::route::v3 as pb;
    use pb::query_parameter_matcher::QueryParameterMatchSpecifier as Specifier;

    #[test]
    fn the_first_parameter_counts() {
        assert_eq!(query_parameter(b"/a?x=1&y&x=2", b"x"), Some(&b"1"[..]));
        assert_eq!(query_parameter(b"/a?x=1&y&x=2", b"y"), Some(&b""[..]));
        assert_eq!(query_parameter(b"/a?x=1=2", b"x"), Some(&b"1=2"[..]));
        assert_eq!(query_parameter(b"/a", b"x"), None);
    }

    #[test]
    fn presence() {
        for (specifier, with, without) in [
            (None, true, false),
            (Some(Specifier::PresentMatch(false)), false, true),
            (Some(Specifier::PresentMatch(true)), true, false),
        ] {
            let proto =
                pb::QueryParameterMatcher { name: "x".into(), query_parameter_match_specifier: specifier };
            let matcher = QueryParameterMatcher::compile(&proto).unwrap();
            assert_eq!((matcher.is_match(b"/?x"), matcher.is_match(b"/?y")), (with, without));
        }
    }
}
