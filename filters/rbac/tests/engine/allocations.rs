//! Deciding allocates nothing, however many policies there are and whatever they look at.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::extensions::matching::common_inputs::network::v3::{
    DestinationPortInput, DirectSourceIpInput,
};
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::protobuf::UInt32Value;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3 as xds;
use matcher::string_matcher::MatchPattern;
use pb::permission::Rule;
use pb::principal::{Authenticated, Identifier};
use waystation_filter_api::runtime::Runtime;
use waystation_matchers::Inputs;
use waystation_rbac::{Engine, Level};
use xds::matcher::matcher_tree::{MatchMap, TreeType};
use xds::matcher::on_match::OnMatch as OnMatchKind;
use xds::matcher::{MatcherTree, MatcherType, OnMatch};

use crate::request::{Peer, Request, engine, exact, header, path, permission, policy, rules};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came; counting touches no memory but a thread's own cell, which
// needs no allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no cell any more; what it allocates is nobody's.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract, and all memory comes from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn text(pattern: MatchPattern, ignore_case: bool) -> matcher::StringMatcher {
    matcher::StringMatcher { ignore_case, match_pattern: Some(pattern) }
}

/// A policy of each kind that may match or be looked at for the request below.
fn policies(number: usize) -> pb::Policy {
    let name = |text| Identifier::Authenticated(Authenticated { principal_name: Some(text) });
    let here =
        |len| CidrRange { address_prefix: "127.0.0.0".into(), prefix_len: Some(UInt32Value { value: len }) };
    let regex = matcher::RegexMatcher { regex: format!("/[a-z]{{{}}}", 90 + number), ..Default::default() };
    match number % 9 {
        0 => policy(Rule::UrlPath(path(exact(&format!("/{number}")))), Identifier::Any(true)),
        1 => policy(Rule::UrlPath(path(text(MatchPattern::SafeRegex(regex), false))), Identifier::Any(true)),
        2 => policy(Rule::Header(header("x-user", exact(&number.to_string()))), name(exact("spiffe://a"))),
        3 => policy(Rule::Any(true), name(text(MatchPattern::Suffix(format!("/{number}")), true))),
        4 => policy(Rule::DestinationPort(80), Identifier::RemoteIp(here(32))),
        5 => policy(
            Rule::Header(header("x-user", text(MatchPattern::Contains(format!("X{number}")), true))),
            Identifier::DirectRemoteIp(here(8)),
        ),
        6 => {
            let path = permission(Rule::UrlPath(path(text(MatchPattern::Prefix("/a".into()), false))));
            let not = permission(Rule::NotRule(Box::new(path.clone())));
            policy(Rule::AndRules(pb::permission::Set { rules: vec![path, not] }), Identifier::Any(true))
        }
        7 => {
            let matches = matcher::filter_state_matcher::Matcher::StringMatch(exact(&number.to_string()));
            let user = matcher::FilterStateMatcher { key: "user".into(), matcher: Some(matches) };
            policy(Rule::Any(true), Identifier::FilterState(user))
        }
        _ => policy(Rule::RequestedServerName(exact(&format!("{number}.test"))), Identifier::Any(true)),
    }
}

fn extension<M: prost::Name>(message: &M) -> TypedExtensionConfig {
    let any = Any { type_url: M::type_url(), value: message.encode_to_vec() };
    TypedExtensionConfig { name: "e".into(), typed_config: Some(any) }
}

#[test]
fn a_tree_makes_text_of_ports_and_addresses_in_place() {
    let action = pb::Action { name: "a".into(), action: pb::rbac::Action::Allow.into() };
    let by = |input, value: &str, then: OnMatchKind| {
        let on_match = OnMatch { on_match: Some(then), ..OnMatch::default() };
        let map = MatchMap { map: [(value.to_owned(), on_match)].into() };
        let tree = MatcherTree { input: Some(input), tree_type: Some(TreeType::ExactMatchMap(map)) };
        xds::Matcher { matcher_type: Some(MatcherType::MatcherTree(tree)), on_no_match: None }
    };
    let ports = by(extension(&DestinationPortInput {}), "80", OnMatchKind::Action(extension(&action)));
    let addresses =
        by(extension(&DirectSourceIpInput {}), "127.0.0.1", OnMatchKind::Matcher(Box::new(ports)));
    let engine = Engine::compile_tree(&addresses, Level::Http, &Runtime::new()).expect("the tree is valid");
    let request = Request::get("/");
    let (stream, head) = (request.stream(), request.head());
    let inputs = Inputs::request(&stream, &head);
    let before = ALLOCATIONS.get();
    assert!(engine.decide(&inputs).allowed);
    assert_eq!(ALLOCATIONS.get() - before, 0);
}

#[test]
fn deciding_allocates_nothing() {
    let mut request = Request::get("/a/path?with=query");
    request.headers = vec![("x-user", "amy".into()), ("x-user", "bob".into())];
    request.server_name = Some("a.test".into());
    request.users = [None, Some("amy".into())];
    request.peer = Some(Peer { uris: vec!["spiffe://a".into()], ..Peer::default() });
    let (stream, head) = (request.stream(), request.head());
    for count in [1, 4, 10, 1000] {
        let policies = (0..count).map(|number| (format!("p{number}"), policies(number)));
        let engine = engine(&rules(pb::rbac::Action::Allow, policies));
        let inputs = Inputs::request(&stream, &head);
        // Regular expressions make room for themselves the first time.
        let decided = engine.decide(&inputs);
        assert!(!decided.allowed);
        let before = ALLOCATIONS.get();
        assert_eq!(engine.decide(&inputs), decided);
        assert_eq!(ALLOCATIONS.get() - before, 0, "{count} policies");
    }
}
