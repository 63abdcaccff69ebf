//! What is not understood in full is refused, with the place where it stands.

use envoy_types::pb::envoy::config::core::v3::{CelExpressionConfig, TypedExtensionConfig};
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::extensions::rbac::principals::mtls_authenticated::v3 as mtls;
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use envoy_types::pb::google::api::expr::v1alpha1::{CheckedExpr, Expr};
use envoy_types::pb::google::protobuf::Any;
use pb::permission::Rule;
use pb::principal::Identifier;
use prost::Name as _;
use waystation_rbac::{Engine, Level};

use crate::request::{exact, header, path, permission, policy, principal, rules};

const EVERYONE: Identifier = Identifier::Any(true);

fn error(policy: pb::Policy, level: Level) -> String {
    let rules = rules(pb::rbac::Action::Deny, [("p".to_owned(), policy)]);
    Engine::compile(&rules, level).expect_err("the policy must be refused").to_string()
}

fn of(rule: Rule) -> String {
    error(policy(rule, EVERYONE), Level::Http)
}

fn extension(type_url: String, value: Vec<u8>) -> TypedExtensionConfig {
    TypedExtensionConfig { name: "e".into(), typed_config: Some(Any { type_url, value }) }
}

#[test]
fn conditions_that_are_not_evaluated() {
    let good = || policy(Rule::Any(true), EVERYONE);
    for (field, bad) in [
        ("condition", pb::Policy { condition: Some(Expr::default()), ..good() }),
        ("checked_condition", pb::Policy { checked_condition: Some(CheckedExpr::default()), ..good() }),
        ("cel_config", pb::Policy { cel_config: Some(CelExpressionConfig::default()), ..good() }),
    ] {
        let expected = format!("policies[p].{field}: not supported: CEL is not implemented");
        assert_eq!(error(bad, Level::Http), expected);
    }
    let audited = pb::Rbac {
        audit_logging_options: Some(pb::rbac::AuditLoggingOptions::default()),
        ..rules(pb::rbac::Action::Allow, [])
    };
    let error = Engine::compile(&audited, Level::Http).unwrap_err();
    assert_eq!(error.path(), "audit_logging_options");
}

/// Also what a newer management server says in a field that this one does not know: on the wire, a choice of an unknown kind
/// is no choice.
#[test]
fn what_says_nothing() {
    let empty = pb::Permission { rule: None };
    let nested = |rule| Rule::NotRule(Box::new(permission(rule)));
    let set = |rules| pb::permission::Set { rules };
    for (rule, expected) in [
        (
            Rule::AndRules(set(vec![])),
            "permissions[0].and_rules.rules: value must contain at least 1 item(s)",
        ),
        (Rule::OrRules(set(vec![empty])), "permissions[0].or_rules.rules[0].rule: is required"),
        (nested(Rule::Any(false)), "permissions[0].not_rule.any: value must equal true"),
        (
            Rule::UrlPath(path(StringMatcher::default())),
            "permissions[0].url_path.path.match_pattern: is required",
        ),
        (
            Rule::SourcedMetadata(pb::SourcedMetadata::default()),
            "permissions[0].sourced_metadata.metadata_matcher: is required",
        ),
        (
            Rule::DestinationPort(65536),
            "permissions[0].destination_port: value must be less than or equal to 65535",
        ),
        (
            Rule::DestinationPortRange(Int32Range { start: 9, end: 9 }),
            "permissions[0].destination_port_range: range start 9 cannot be greater or equal than range end 9",
        ),
    ] {
        assert_eq!(of(rule), format!("policies[p].{expected}"));
    }
    let nobody = pb::Policy { principals: vec![], ..policy(Rule::Any(true), EVERYONE) };
    assert!(error(nobody, Level::Http).starts_with("policies[p].principals: "));
    let nothing = pb::Policy { permissions: vec![], ..policy(Rule::Any(true), EVERYONE) };
    assert!(error(nothing, Level::Http).starts_with("policies[p].permissions: "));
    let who = |identifier| error(policy(Rule::Any(true), identifier), Level::Http);
    let authenticated = pb::principal::Authenticated { principal_name: Some(StringMatcher::default()) };
    assert_eq!(
        who(Identifier::Authenticated(authenticated)),
        "policies[p].principals[0].authenticated.principal_name.match_pattern: is required"
    );
    let nested = pb::principal::Set { ids: vec![pb::Principal { identifier: None }] };
    assert_eq!(
        who(Identifier::OrIds(nested)),
        "policies[p].principals[0].or_ids.ids[0].identifier: is required"
    );
}

#[test]
fn extensions_that_there_are_not() {
    let unknown = || extension("type.googleapis.com/x.Y".into(), vec![]);
    for (place, error) in [
        ("permissions[0].matcher", of(Rule::Matcher(unknown()))),
        ("permissions[0].uri_template", of(Rule::UriTemplate(unknown()))),
        ("principals[0].custom", error(policy(Rule::Any(true), Identifier::Custom(unknown())), Level::Http)),
    ] {
        let reason = "Didn't find a registered implementation for 'e' with type URL: 'x.Y'";
        assert_eq!(error, format!("policies[p].{place}.typed_config: {reason}"));
    }
    let asks_nothing = Identifier::Custom(extension(mtls::Config::type_url(), vec![]));
    assert!(
        error(policy(Rule::Any(true), asks_nothing), Level::Http)
            .contains("did not have any configured validation")
    );
}

#[test]
fn headers_of_connections() {
    let header = || header("x-a", exact("a"));
    let deep = |inner: Rule| Rule::AndRules(pb::permission::Set { rules: vec![permission(inner)] });
    let reason = "Found header(x-a) rule,not supported by RBAC network filter";
    let found = error(policy(deep(Rule::Header(header())), EVERYONE), Level::Network);
    assert_eq!(found, format!("policies[p].permissions[0].and_rules.rules[0].header: {reason}"));
    let not = Identifier::NotId(Box::new(principal(Identifier::Header(header()))));
    let found = error(policy(Rule::Any(true), not), Level::Network);
    assert_eq!(found, format!("policies[p].principals[0].not_id.header: {reason}"));
}
