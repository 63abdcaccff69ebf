//! `ValueMatcher` and its parts.

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use waystation_filter_api::value::Value;
use waystation_schema::{At, ConfigError};

use crate::string::StringMatcher;

/// A configuration may nest list and or matchers this deep.
const MAX_DEPTH: usize = 32;

/// Compiled `envoy.type.matcher.v3.ValueMatcher`.
#[derive(Clone, Debug)]
pub enum ValueMatcher {
    /// Matches null.
    Null,
    /// Matches a number.
    Double(DoubleMatcher),
    /// Matches a string.
    String(StringMatcher),
    /// Matches this boolean.
    Bool(bool),
    /// Matches when there is a value; with `false` never, as in Envoy.
    Present(bool),
    /// Matches a list.
    List(ListMatcher),
    /// Matches when one of these does.
    Or(Vec<ValueMatcher>),
}

impl ValueMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::ValueMatcher) -> Result<Self, ConfigError> {
        Self::compile_at_depth(proto, 0)
    }

    fn compile_at_depth(proto: &pb::ValueMatcher, depth: usize) -> Result<Self, ConfigError> {
        use pb::value_matcher::MatchPattern;
        if depth == MAX_DEPTH {
            return Err(ConfigError::new(format!("nested deeper than {MAX_DEPTH}")));
        }
        Ok(match &proto.match_pattern {
            None => return Err(ConfigError::field("match_pattern", "is required")),
            Some(MatchPattern::NullMatch(_)) => Self::Null,
            Some(MatchPattern::DoubleMatch(double)) => {
                Self::Double(DoubleMatcher::compile(double).at(|| "double_match")?)
            }
            Some(MatchPattern::StringMatch(text)) => {
                Self::String(StringMatcher::compile(text).at(|| "string_match")?)
            }
            Some(MatchPattern::BoolMatch(wanted)) => Self::Bool(*wanted),
            Some(MatchPattern::PresentMatch(wanted)) => Self::Present(*wanted),
            Some(MatchPattern::ListMatch(list)) => {
                Self::List(ListMatcher::compile_at_depth(list, depth + 1).at(|| "list_match")?)
            }
            Some(MatchPattern::OrMatch(or)) => {
                let compile = |(index, matcher)| {
                    Self::compile_at_depth(matcher, depth + 1)
                        .at(|| format!("or_match.value_matchers[{index}]"))
                };
                Self::Or(or.value_matchers.iter().enumerate().map(compile).collect::<Result<_, _>>()?)
            }
        })
    }

    /// Whether `value` matches; `None` is a value that is not there.
    pub fn is_match(&self, value: Option<&Value>) -> bool {
        match (self, value) {
            (Self::Present(wanted), value) => *wanted && value.is_some(),
            (Self::Or(matchers), value) => matchers.iter().any(|matcher| matcher.is_match(value)),
            (Self::Null, Some(Value::Null)) => true,
            (Self::Double(matcher), Some(Value::Number(number))) => matcher.is_match(*number),
            (Self::String(matcher), Some(Value::String(text))) => matcher.is_match(text.as_bytes()),
            (Self::Bool(wanted), Some(Value::Bool(value))) => wanted == value,
            (Self::List(matcher), Some(Value::List(items))) => matcher.is_match(items),
            _ => false,
        }
    }
}

/// Compiled `envoy.type.matcher.v3.ListMatcher`: one of the items matches.
#[derive(Clone, Debug)]
pub struct ListMatcher(Box<ValueMatcher>);

impl ListMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::ListMatcher) -> Result<Self, ConfigError> {
        Self::compile_at_depth(proto, 0)
    }

    fn compile_at_depth(proto: &pb::ListMatcher, depth: usize) -> Result<Self, ConfigError> {
        match &proto.match_pattern {
            None => Err(ConfigError::field("match_pattern", "is required")),
            Some(pb::list_matcher::MatchPattern::OneOf(matcher)) => {
                let matcher = ValueMatcher::compile_at_depth(matcher, depth + 1).at(|| "one_of")?;
                Ok(Self(Box::new(matcher)))
            }
        }
    }

    /// Whether one of `items` matches.
    pub fn is_match(&self, items: &[Value]) -> bool {
        items.iter().any(|item| self.0.is_match(Some(item)))
    }
}

/// Compiled `envoy.type.matcher.v3.DoubleMatcher`.
#[derive(Clone, Copy, Debug)]
pub enum DoubleMatcher {
    /// Half open: `start <= value < end`.
    Range(f64, f64),
    /// Exactly this number.
    Exact(f64),
}

impl DoubleMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::DoubleMatcher) -> Result<Self, ConfigError> {
        match &proto.match_pattern {
            None => Err(ConfigError::field("match_pattern", "is required")),
            Some(pb::double_matcher::MatchPattern::Range(range)) => Ok(Self::Range(range.start, range.end)),
            Some(pb::double_matcher::MatchPattern::Exact(number)) => Ok(Self::Exact(*number)),
        }
    }

    /// Whether `number` matches.
    pub fn is_match(self, number: f64) -> bool {
        match self {
            Self::Range(start, end) => (start..end).contains(&number),
            Self::Exact(wanted) => number == wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ValueMatcher;
    use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
    use envoy_types::pb::envoy::r#type::v3::DoubleRange;
    use pb::value_matcher::MatchPattern::{
        self, BoolMatch, DoubleMatch, ListMatch, NullMatch, OrMatch, PresentMatch,
    };
    use waystation_filter_api::value::Value;

    fn proto(pattern: MatchPattern) -> pb::ValueMatcher {
        pb::ValueMatcher { match_pattern: Some(pattern) }
    }

    fn matches(pattern: MatchPattern, value: Option<&Value>) -> bool {
        ValueMatcher::compile(&proto(pattern)).unwrap().is_match(value)
    }

    #[test]
    fn kinds_do_not_mix_and_missing_values_match_nothing() {
        let range = pb::double_matcher::MatchPattern::Range(DoubleRange { start: 1.0, end: 2.0 });
        let double = || DoubleMatch(pb::DoubleMatcher { match_pattern: Some(range) });
        assert!(
            matches(double(), Some(&Value::Number(1.0))) && !matches(double(), Some(&Value::Number(2.0)))
        );
        assert!(!matches(double(), Some(&Value::Bool(true))));
        assert!(matches(NullMatch(pb::value_matcher::NullMatch {}), Some(&Value::Null)));
        assert!(!matches(PresentMatch(false), None) && !matches(PresentMatch(true), None));
        assert!(
            !matches(PresentMatch(false), Some(&Value::Null))
                && matches(PresentMatch(true), Some(&Value::Null))
        );
        assert!(matches(BoolMatch(false), Some(&Value::Bool(false))) && !matches(BoolMatch(false), None));
        let one_of = pb::list_matcher::MatchPattern::OneOf(Box::new(proto(double())));
        let list = || ListMatch(Box::new(pb::ListMatcher { match_pattern: Some(one_of.clone()) }));
        assert!(matches(list(), Some(&Value::List(vec![Value::Null, Value::Number(1.5)]))));
        assert!(!matches(list(), Some(&Value::Number(1.5))));
        let or = OrMatch(pb::OrMatcher { value_matchers: vec![proto(BoolMatch(true)), proto(list())] });
        assert!(matches(or, Some(&Value::Bool(true))));
    }

    #[test]
    fn nesting_is_bounded() {
        let mut nested = proto(BoolMatch(true));
        for _ in 0..40 {
            nested = proto(OrMatch(pb::OrMatcher { value_matchers: vec![nested] }));
        }
        assert!(ValueMatcher::compile(&nested).is_err());
    }
}
