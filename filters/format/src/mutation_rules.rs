//! `envoy.config.common.mutation_rules.v3.HeaderMutationRules`: which headers a side service may change.

use envoy_types::pb::envoy::config::common::mutation_rules::v3 as pb;
use waystation_filter_api::wire::bool_value;
use waystation_http::is_valid_value;
use waystation_matchers::Regex;
use waystation_schema::{At, ConfigError};

/// Compiled rules.
#[derive(Clone, Debug)]
pub struct MutationRules {
    allow: Option<Regex>,
    disallow: Option<Regex>,
    disallow_all: bool,
    allow_all_routing: bool,
    disallow_system: bool,
    allow_envoy: bool,
    disallow_is_error: bool,
}

/// What is to be done with a header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Operation {
    /// It gets a value, or another one.
    Set,
    /// Its value gets longer.
    Append,
    /// It is removed.
    Remove,
}

/// What the rules say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Allowed {
    /// Do it.
    Yes,
    /// Leave it.
    Ignore,
    /// Take none of what the service says (`disallow_is_error`).
    Fail,
}

impl MutationRules {
    /// Compiles the protobuf form.
    ///
    /// # Errors
    /// When an expression does not compile.
    pub fn compile(proto: &pb::HeaderMutationRules) -> Result<Self, ConfigError> {
        let pb::HeaderMutationRules {
            allow_all_routing,
            allow_envoy,
            disallow_system,
            disallow_all,
            allow_expression,
            disallow_expression,
            disallow_is_error,
        } = proto;
        let allow = allow_expression.as_ref().map(Regex::compile).transpose();
        let disallow = disallow_expression.as_ref().map(Regex::compile).transpose();
        Ok(Self {
            allow: allow.at(|| "allow_expression")?,
            disallow: disallow.at(|| "disallow_expression")?,
            disallow_all: bool_value(disallow_all.as_ref(), false),
            allow_all_routing: bool_value(allow_all_routing.as_ref(), false),
            disallow_system: bool_value(disallow_system.as_ref(), false),
            allow_envoy: bool_value(allow_envoy.as_ref(), false),
            disallow_is_error: bool_value(disallow_is_error.as_ref(), false),
        })
    }

    /// Whether the header `name`, in lower case, may be changed so.
    pub fn check(&self, operation: Operation, name: &[u8], value: &[u8]) -> Allowed {
        if self.allows(operation, name) && (operation == Operation::Remove || is_good(name, value)) {
            Allowed::Yes
        } else if self.disallow_is_error {
            Allowed::Fail
        } else {
            Allowed::Ignore
        }
    }

    fn allows(&self, operation: Operation, name: &[u8]) -> bool {
        let system = name.starts_with(b":");
        if operation == Operation::Remove && (system || name == b"host") {
            return false;
        }
        if self.disallow.as_ref().is_some_and(|regex| regex.is_match(name)) {
            return false;
        }
        if self.allow.as_ref().is_some_and(|regex| regex.is_match(name)) {
            return true;
        }
        let routing = matches!(name, b"host" | b":authority" | b":method" | b":scheme");
        // A pseudo-header has one value.
        let system = system && (operation == Operation::Append || self.disallow_system);
        let envoy = !self.allow_envoy && name.starts_with(b"x-envoy");
        !(self.disallow_all || routing && !self.allow_all_routing || system || envoy)
    }
}

/// Values that would break a request whoever sets them.
fn is_good(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"host" | b":authority" => value.iter().all(|byte| byte.is_ascii_graphic()),
        b":scheme" => value.eq_ignore_ascii_case(b"http") || value.eq_ignore_ascii_case(b"https"),
        b":status" => {
            str::from_utf8(value).ok().and_then(|text| text.parse::<u32>().ok()).is_some_and(|s| s >= 200)
        }
        _ => is_valid_value(value),
    }
}

#[cfg(test)]
mod tests {
    use super::{Allowed, MutationRules, Operation, pb};
    use envoy_types::pb::envoy::r#type::matcher::v3::RegexMatcher;
    use envoy_types::pb::google::protobuf::BoolValue;

    fn rules(change: impl FnOnce(&mut pb::HeaderMutationRules)) -> MutationRules {
        let mut proto = pb::HeaderMutationRules::default();
        change(&mut proto);
        MutationRules::compile(&proto).unwrap()
    }

    fn yes() -> Option<BoolValue> {
        Some(BoolValue { value: true })
    }

    fn regex(regex: &str) -> Option<RegexMatcher> {
        Some(RegexMatcher { regex: regex.into(), ..RegexMatcher::default() })
    }

    #[test]
    fn what_may_be_changed() {
        use Operation::{Append, Remove, Set};
        let set =
            |rules: &MutationRules, name: &str| rules.check(Set, name.as_bytes(), b"200") == Allowed::Yes;
        let usual = rules(|_| {});
        for (name, allowed) in
            [("a", true), (":path", true), (":method", false), ("host", false), ("x-envoy-a", false)]
        {
            assert_eq!(set(&usual, name), allowed, "{name}");
        }
        assert_eq!(usual.check(Append, b":path", b"x"), Allowed::Ignore);
        assert_eq!(usual.check(Remove, b"a", b""), Allowed::Yes);
        assert_eq!(usual.check(Remove, b":path", b""), Allowed::Ignore);
        assert_eq!(usual.check(Set, b"a", b"x\ny"), Allowed::Ignore);
        let open = rules(|rules| (rules.allow_all_routing, rules.allow_envoy) = (yes(), yes()));
        assert!(set(&open, ":method") && set(&open, "x-envoy-a"));
        assert_eq!(open.check(Set, b":authority", b"a b"), Allowed::Ignore);
        assert_eq!(open.check(Set, b":scheme", b"ftp"), Allowed::Ignore);
        assert_eq!(open.check(Remove, b"host", b""), Allowed::Ignore);
        let closed = rules(|rules| {
            (rules.disallow_all, rules.disallow_is_error) = (yes(), yes());
            (rules.allow_expression, rules.disallow_expression) = (regex("x-.*"), regex("x-no"));
        });
        assert_eq!(closed.check(Set, b"a", b"x"), Allowed::Fail);
        assert!(set(&closed, "x-a") && !set(&closed, "x-no"));
        assert!(!set(&rules(|rules| rules.disallow_system = yes()), ":path"));
    }
}
