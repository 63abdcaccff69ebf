use std::time::Instant;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::extensions::matching::common_inputs::network::v3::{
    ServerNameInput, SourceIpInput,
};
use envoy_types::pb::envoy::extensions::matching::input_matchers::consistent_hashing::v3::ConsistentHashing;
use envoy_types::pb::envoy::r#type::matcher::v3::{
    HttpRequestHeaderMatchInput, HttpResponseStatusCodeMatchInput,
};
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3 as pb;
use pb::matcher::matcher_list::predicate::{MatchType, PredicateList, SinglePredicate, single_predicate};
use pb::matcher::matcher_list::{FieldMatcher, Predicate};
use pb::matcher::matcher_tree::{MatchMap, TreeType};
use pb::matcher::{MatcherList, MatcherTree, MatcherType, OnMatch, on_match};
use prost::Name;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::runtime::Runtime;
use waystation_http::Headers;
use waystation_schema::ConfigError;

use super::{Matcher, TreeContext, Verdict};
use crate::inputs::{InputScope, Inputs};
use crate::messages::{DomainMatcher, IpMatcher, IpRangeMatcher, ServerNameMatcher};

fn extension(type_url: String, value: Vec<u8>) -> TypedExtensionConfig {
    TypedExtensionConfig { name: "x".into(), typed_config: Some(Any { type_url, value }) }
}

fn typed<M: Name>(message: &M) -> TypedExtensionConfig {
    extension(M::type_url(), message.encode_to_vec())
}

fn header(name: &str) -> TypedExtensionConfig {
    typed(&HttpRequestHeaderMatchInput { header_name: name.into() })
}

/// An action is its name.
fn action(name: &str) -> OnMatch {
    let action = TypedExtensionConfig { name: name.into(), typed_config: None };
    OnMatch { keep_matching: false, on_match: Some(on_match::OnMatch::Action(action)) }
}

fn keep(mut on_match: OnMatch) -> OnMatch {
    on_match.keep_matching = true;
    on_match
}

fn nested(matcher: pb::Matcher) -> OnMatch {
    OnMatch { keep_matching: false, on_match: Some(on_match::OnMatch::Matcher(Box::new(matcher))) }
}

fn is(name: &str, value: &str) -> Predicate {
    let text = pb::StringMatcher {
        ignore_case: false,
        match_pattern: Some(pb::string_matcher::MatchPattern::Exact(value.into())),
    };
    single(header(name), single_predicate::Matcher::ValueMatch(text))
}

fn single(input: TypedExtensionConfig, matcher: single_predicate::Matcher) -> Predicate {
    let single = SinglePredicate { input: Some(input), matcher: Some(matcher) };
    Predicate { match_type: Some(MatchType::SinglePredicate(single)) }
}

fn list(matchers: Vec<(Predicate, OnMatch)>, on_no_match: Option<OnMatch>) -> pb::Matcher {
    let matchers = matchers
        .into_iter()
        .map(|(predicate, on_match)| FieldMatcher { predicate: Some(predicate), on_match: Some(on_match) })
        .collect();
    pb::Matcher {
        on_no_match: on_no_match.map(Box::new),
        matcher_type: Some(MatcherType::MatcherList(MatcherList { matchers })),
    }
}

fn tree(input: TypedExtensionConfig, tree: TreeType, on_no_match: Option<OnMatch>) -> pb::Matcher {
    pb::Matcher {
        on_no_match: on_no_match.map(Box::new),
        matcher_type: Some(MatcherType::MatcherTree(MatcherTree {
            input: Some(input),
            tree_type: Some(tree),
        })),
    }
}

fn map<const N: usize>(entries: [(&str, OnMatch); N]) -> MatchMap {
    MatchMap { map: entries.into_iter().map(|(key, on_match)| (key.into(), on_match)).collect() }
}

fn compile_in(proto: &pb::Matcher, scope: InputScope) -> Result<Matcher<String>, ConfigError> {
    let action = |extension: &TypedExtensionConfig| Ok(extension.name.clone());
    Matcher::compile(proto, &TreeContext { scope, runtime: &Runtime::new(), action: &action })
}

fn of_request(proto: &pb::Matcher, headers: &[(&str, &str)]) -> Option<String> {
    let headers: Headers = headers.iter().copied().collect();
    let matcher = compile_in(proto, InputScope::Http).unwrap();
    matcher.evaluate(&Inputs { request: Some(&headers), ..Inputs::default() }).action().cloned()
}

fn connection(remote: &str, server_name: &str) -> ConnectionInfo {
    let address = |text: &str| Address::Ip(text.parse().unwrap());
    let mut connection = ConnectionInfo::new(1, Instant::now(), address("10.9.9.9:80"), address(remote));
    connection.requested_server_name = Some(server_name.into());
    connection
}

fn of_connection(proto: &pb::Matcher, connection: &ConnectionInfo) -> Option<String> {
    let matcher = compile_in(proto, InputScope::Network).unwrap();
    matcher.evaluate(&Inputs::network(connection)).action().cloned()
}

#[test]
fn lists_take_the_first_match_and_keep_matching_goes_on() {
    let proto = list(
        vec![
            (is("a", "1"), keep(action("kept"))),
            (is("a", "1"), nested(list(vec![(is("b", "2"), action("inner"))], None))),
            (is("a", "1"), action("outer")),
        ],
        Some(action("default")),
    );
    assert_eq!(of_request(&proto, &[("a", "1"), ("b", "2")]).as_deref(), Some("inner"));
    assert_eq!(of_request(&proto, &[("a", "1")]).as_deref(), Some("outer"), "a nested tree without a match");
    assert_eq!(of_request(&proto, &[]).as_deref(), Some("default"));
}

#[test]
fn predicates_combine() {
    let both = PredicateList { predicate: vec![is("a", "1"), is("b", "2")] };
    let and = Predicate { match_type: Some(MatchType::AndMatcher(both.clone())) };
    let or = Predicate { match_type: Some(MatchType::OrMatcher(both)) };
    let not = Predicate { match_type: Some(MatchType::NotMatcher(Box::new(or.clone()))) };
    let proto = list(vec![(and, action("and")), (or, action("or")), (not, action("not"))], None);
    assert_eq!(of_request(&proto, &[("a", "1"), ("b", "2")]).as_deref(), Some("and"));
    assert_eq!(of_request(&proto, &[("b", "2")]).as_deref(), Some("or"));
    assert_eq!(of_request(&proto, &[]).as_deref(), Some("not"));
}

#[test]
fn maps_by_exact_value_and_longest_prefix() {
    let exact = tree(header("a"), TreeType::ExactMatchMap(map([("x", action("X"))])), Some(action("none")));
    assert_eq!(of_request(&exact, &[("a", "x")]).as_deref(), Some("X"));
    assert_eq!(of_request(&exact, &[("a", "xy")]).as_deref(), Some("none"));
    assert_eq!(of_request(&exact, &[]).as_deref(), Some("none"));
    let inner = list(vec![(is("b", "2"), action("long"))], None);
    let prefixes = map([("/", action("short")), ("/api", nested(inner))]);
    let prefix = tree(header("a"), TreeType::PrefixMatchMap(prefixes), None);
    assert_eq!(of_request(&prefix, &[("a", "/api/x"), ("b", "2")]).as_deref(), Some("long"));
    assert_eq!(of_request(&prefix, &[("a", "/api/x")]).as_deref(), Some("short"), "the subtree missed");
}

#[test]
fn addresses_by_longest_range() {
    let range = |address: &str, len| CidrRange { address_prefix: address.into(), prefix_len: Some(len) };
    let branch = |ranges, on_match, exclusive| IpRangeMatcher { ranges, on_match: Some(on_match), exclusive };
    let len = |value| envoy_types::pb::google::protobuf::UInt32Value { value };
    let ip = IpMatcher {
        range_matchers: vec![
            branch(vec![range("10.0.0.0", len(8))], action("ten"), false),
            branch(vec![range("10.1.0.0", len(16))], keep(action("kept")), false),
            branch(vec![range("10.2.0.0", len(16))], keep(action("kept")), true),
        ],
    };
    let custom = extension(
        "type.googleapis.com/xds.type.matcher.v3.IPMatcher".into(),
        prost::Message::encode_to_vec(&ip),
    );
    let proto = tree(typed(&SourceIpInput {}), TreeType::CustomMatch(custom), Some(action("none")));
    assert_eq!(of_connection(&proto, &connection("10.1.0.1:1", "")).as_deref(), Some("ten"));
    assert_eq!(of_connection(&proto, &connection("10.2.0.1:1", "")).as_deref(), Some("none"), "exclusive");
    assert_eq!(of_connection(&proto, &connection("[::1]:1", "")).as_deref(), Some("none"));
}

#[test]
fn server_names_exact_then_longest_wildcard() {
    let branch = |domains: &[&str], name: &str| DomainMatcher {
        domains: domains.iter().map(|domain| (*domain).into()).collect(),
        on_match: Some(action(name)),
    };
    let names = ServerNameMatcher {
        domain_matchers: vec![
            branch(&["*"], "any"),
            branch(&["*.a.example", "b.example"], "wide"),
            branch(&["*.x.a.example"], "narrow"),
        ],
    };
    let custom = |names: &ServerNameMatcher| {
        let url = "type.googleapis.com/xds.type.matcher.v3.ServerNameMatcher";
        TreeType::CustomMatch(extension(url.into(), prost::Message::encode_to_vec(names)))
    };
    let proto = tree(typed(&ServerNameInput {}), custom(&names), None);
    for (name, expected) in
        [("b.example", "wide"), ("y.a.example", "wide"), ("y.x.a.example", "narrow"), ("a.example", "any")]
    {
        assert_eq!(
            of_connection(&proto, &connection("1.1.1.1:1", name)).as_deref(),
            Some(expected),
            "{name}"
        );
    }
    let twice = ServerNameMatcher { domain_matchers: vec![branch(&["a"], "1"), branch(&["a"], "2")] };
    let error =
        compile_in(&tree(typed(&ServerNameInput {}), custom(&twice), None), InputScope::Network).unwrap_err();
    assert!(error.path().ends_with("custom_match.typed_config.domain_matchers[1].domains[0]"), "{error}");
}

#[test]
fn inputs_that_may_still_come_hold_the_tree() {
    let status = typed(&HttpResponseStatusCodeMatchInput {});
    let proto = tree(status, TreeType::ExactMatchMap(map([("200", action("ok"))])), Some(action("none")));
    let matcher = compile_in(&proto, InputScope::Http).unwrap();
    assert_eq!(matcher.evaluate(&Inputs::default()), Verdict::NotYet);
    let mut response = Headers::new();
    response.set_status(200);
    let inputs = Inputs { response: Some(&response), ..Inputs::default() };
    assert_eq!(matcher.evaluate(&inputs).action().map(String::as_str), Some("ok"));
}

#[test]
fn consistent_hashing_splits_by_value() {
    let hashing = |threshold, modulo| {
        let matcher = typed(&ConsistentHashing { threshold, modulo, seed: 0 });
        list(vec![(single(header("a"), single_predicate::Matcher::CustomMatch(matcher)), action("in"))], None)
    };
    assert_eq!(of_request(&hashing(0, 10), &[("a", "x")]).as_deref(), Some("in"));
    assert_eq!(of_request(&hashing(10, 10), &[("a", "x")]), None);
    assert_eq!(of_request(&hashing(0, 10), &[]), None);
    assert!(compile_in(&hashing(1, 0), InputScope::Http).is_err());
}

#[test]
fn cel_is_refused_with_its_path() {
    let cel = extension("type.googleapis.com/xds.type.matcher.v3.CelMatcher".into(), Vec::new());
    let proto =
        list(vec![(single(header("a"), single_predicate::Matcher::CustomMatch(cel)), action("in"))], None);
    assert_eq!(
        compile_in(&proto, InputScope::Http).unwrap_err().to_string(),
        "matcher_list.matchers[0].predicate.single_predicate.custom_match.typed_config: not supported: input \
         matcher xds.type.matcher.v3.CelMatcher"
    );
}
