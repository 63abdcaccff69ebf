use std::rc::Rc;
use std::time::{Instant, SystemTime};

use envoy_types::pb::envoy::config::route::v3 as pb;
use prost::Message as _;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::runtime::{Layer, Runtime};
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::value::{Struct, Value};
use waystation_http::{HeaderName, Headers, Known};
use waystation_schema::{Message, TextOptions, yaml_to_wire};

use super::action::Request;
use super::{Descriptor, Entries, LimitOverride, Place, Policies};

fn policies(yaml: &str, place: Place, runtime: &Runtime) -> Result<Policies, String> {
    let message = Message::find("envoy.config.route.v3.RateLimit").unwrap();
    let wire = yaml_to_wire(message, yaml, TextOptions::default()).unwrap().wire;
    let proto = pb::RateLimit::decode(&*wire).unwrap();
    Policies::compile(&[proto], place, "rate_limits", runtime).map_err(|error| error.to_string())
}

fn stream() -> StreamInfo {
    let address = |text: &str| Address::Ip(text.parse().unwrap());
    let connection = ConnectionInfo::new(1, Instant::now(), address("10.0.0.1:80"), address("10.1.2.3:4000"));
    StreamInfo::new(1, Instant::now(), SystemTime::now(), Rc::new(connection), None)
}

fn head(path: &str, headers: &[(&str, &str)]) -> Headers {
    let mut head = Headers::new();
    head.set(Known::Method, "GET");
    head.set(Known::Authority, "example.com");
    head.set(Known::Path, path);
    for (name, value) in headers {
        head.append(&HeaderName::parse(name).unwrap(), value);
    }
    head
}

/// The descriptor as Envoy prints it.
fn describe(yaml: &str, head: &Headers, info: &StreamInfo) -> Option<String> {
    let policies = policies(yaml, Place::Route, &Runtime::new()).unwrap();
    let request = Request { head, info, own_cluster: "us", now: Instant::now() };
    let descriptor = policies.iter().next().unwrap().descriptor(&request)?;
    Some(descriptor.entries.to_string())
}

#[test]
fn every_action_has_its_entry_or_there_is_no_descriptor() {
    let head = head("/p?a=x%20y&b", &[("x-user", "ann"), ("x-user", "bob")]);
    let mut info = stream();
    info.metadata.set("ns", "key", Value::String("value".into()));
    info.metadata.set("ns", "number", Value::Number(1.0));
    let expect = |actions: &str, expected: Option<&str>| {
        assert_eq!(
            describe(&format!("actions: [{actions}]"), &head, &info).as_deref(),
            expected,
            "{actions}"
        );
    };
    expect("{source_cluster: {}}", Some("source_cluster=us"));
    // No cluster is known here.
    expect("{destination_cluster: {}}", None);
    expect("{request_headers: {header_name: x-user, descriptor_key: user}}", Some("user=ann"));
    expect("{request_headers: {header_name: host, descriptor_key: h}}", Some("h=example.com"));
    expect("{request_headers: {header_name: ':path', descriptor_key: p}}", Some("p=/p?a=x%20y&b"));
    expect("{request_headers: {header_name: x, descriptor_key: x}}", None);
    let skip = "{request_headers: {header_name: x, descriptor_key: x, skip_if_absent: true}}";
    expect(skip, Some(""));
    expect(&format!("{skip}, {{generic_key: {{descriptor_value: v}}}}"), Some("generic_key=v"));
    expect("{query_parameters: {query_parameter_name: a, descriptor_key: q}}", Some("q=x y"));
    expect("{query_parameters: {query_parameter_name: c, descriptor_key: q}}", None);
    expect(
        "{query_parameters: {query_parameter_name: c, descriptor_key: q, skip_if_absent: true}}",
        Some(""),
    );
    expect("{remote_address: {}}", Some("remote_address=10.1.2.3"));
    expect("{masked_remote_address: {}}", Some("masked_remote_address=10.1.2.3/32"));
    expect("{masked_remote_address: {v4_prefix_mask_len: 16}}", Some("masked_remote_address=10.1.0.0/16"));
    expect("{generic_key: {descriptor_value: v, descriptor_key: k}}", Some("k=v"));
    let user = "headers: [{name: x-user, present_match: true}]";
    expect(&format!("{{header_value_match: {{descriptor_value: v, {user}}}}}"), Some("header_match=v"));
    expect(&format!("{{header_value_match: {{descriptor_value: v, expect_match: false, {user}}}}}"), None);
    let query = "query_parameters: [{name: b, present_match: true}]";
    let expected = Some("k=v");
    expect(
        &format!("{{query_parameter_value_match: {{descriptor_value: v, descriptor_key: k, {query}}}}}"),
        expected,
    );
    let ranges = "address_matcher: {ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]";
    let expected = Some("remote_address_match=example.com");
    expect(
        &format!("{{remote_address_match: {{descriptor_value: '%REQ(:authority)%', {ranges}}}}}}}"),
        expected,
    );
    let inverted = format!("{ranges}, invert_match: true}}");
    expect(&format!("{{remote_address_match: {{descriptor_value: v, {inverted}}}}}"), None);
    let key = |name: &str| format!("metadata_key: {{key: ns, path: [{{key: {name}}}]}}, descriptor_key: m");
    expect(&format!("{{metadata: {{{}}}}}", key("key")), Some("m=value"));
    expect(&format!("{{metadata: {{{}}}}}", key("none")), None);
    expect(&format!("{{metadata: {{{}}}}}", key("number")), None);
    expect(&format!("{{metadata: {{{}, default_value: d}}}}", key("none")), Some("m=d"));
    expect(&format!("{{metadata: {{{}, skip_if_absent: true}}}}", key("none")), Some(""));
    expect(&format!("{{metadata: {{{}, source: ROUTE_ENTRY}}}}", key("key")), None);
    let input =
        "'@type': type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: x-user";
    expect(&format!("{{extension: {{name: e, typed_config: {{{input}}}}}}}"), Some("e=ann,bob"));
}

#[test]
fn values_are_formats_when_the_runtime_says_so() {
    let (head, info) = (head("/", &[]), stream());
    let yaml = "actions: [{generic_key: {descriptor_value: '%REQ(x)%', default_value: d}}]";
    assert_eq!(describe(yaml, &head, &info).as_deref(), Some("generic_key=%REQ(x)%"));
    let runtime = Runtime::new();
    let key = "envoy.reloadable_features.enable_formatter_for_ratelimit_action_descriptor_value";
    runtime.set_layers(vec![Layer { name: "l".into(), values: [(key.into(), Value::Bool(true))].into() }]);
    let policies = policies(yaml, Place::Route, &runtime).unwrap();
    let request = Request { head: &head, info: &info, own_cluster: "", now: Instant::now() };
    let descriptor = policies.iter().next().unwrap().descriptor(&request).unwrap();
    assert_eq!(descriptor.entries.to_string(), "generic_key=d");
}

#[test]
fn hits_and_limits_come_with_the_request() {
    let head = head("/", &[("x-hits", "7"), ("x-bad", "7.5")]);
    let mut info = stream();
    let limit: Struct =
        [("requests_per_unit".into(), Value::Number(42.0)), ("unit".into(), Value::String("HOUR".into()))]
            .into();
    info.metadata.set("ns", "limit", Value::Struct(limit));
    let make_at = |place, more: &str| -> Option<Descriptor> {
        let yaml = format!("actions: [{{generic_key: {{descriptor_value: v}}}}]\n{more}");
        let policies = policies(&yaml, place, &Runtime::new()).unwrap();
        let request = Request { head: &head, info: &info, own_cluster: "", now: Instant::now() };
        policies.iter().next().unwrap().descriptor(&request)
    };
    assert_eq!(make_at(Place::Route, "hits_addend: {number: 3}").unwrap().hits, None);
    let make = |more: &str| make_at(Place::LocalFilter, more);
    assert_eq!(make("hits_addend: {number: 3}").unwrap().hits, Some(3));
    let given = make("hits_addend: {format: '%REQ(x-hits)%', is_negative_hits: true}").unwrap();
    assert_eq!((given.hits, given.gives_back), (Some(7), true));
    assert_eq!(make("hits_addend: {format: '%REQ(x-bad)%'}"), None);
    assert_eq!(make("hits_addend: {format: '%REQ(x-none)%'}"), None);
    let make = |more: &str| make_at(Place::Route, more);
    let fixed = LimitOverride { requests_per_unit: 5, unit: 1 };
    assert_eq!(make("limit: {rate_limit: {requests_per_unit: 5, unit: SECOND}}").unwrap().limit, Some(fixed));
    let path =
        |key| format!("limit: {{dynamic_metadata: {{metadata_key: {{key: ns, path: [{{key: {key}}}]}}}}}}");
    let found = LimitOverride { requests_per_unit: 42, unit: 3 };
    assert_eq!(make(&path("limit")).unwrap().limit, Some(found));
    assert_eq!(make(&path("none")).unwrap().limit, None);
}

#[test]
fn what_a_filters_own_list_may_not_say() {
    let refused = |more: &str| {
        let yaml = format!("actions: [{{remote_address: {{}}}}]\n{more}");
        policies(&yaml, Place::LocalFilter, &Runtime::new()).unwrap_err()
    };
    let stage = "rate_limits[0]: 'stage' field and 'disable_key' field are not supported";
    assert_eq!(refused("stage: 1"), stage);
    assert_eq!(refused("disable_key: k"), stage);
    let limit = refused("limit: {rate_limit: {requests_per_unit: 5, unit: SECOND}}");
    assert_eq!(limit, "rate_limits[0]: 'limit' field is not supported");
    let hits = refused("hits_addend: {}");
    assert_eq!(hits, "rate_limits[0]: hits_addend must contain either a format or a number");
    let hits = refused("hits_addend: {format: '%REQ(a)%%REQ(b)%'}");
    assert_eq!(hits, "rate_limits[0]: hits_addend format must contain exactly one substitution");
}

#[test]
fn entries_are_kept_apart_whatever_is_in_them() {
    let of = |pairs: &[(&str, &str)]| {
        let mut entries = Entries::default();
        for (key, value) in pairs {
            entries.push(key.as_bytes(), value.as_bytes());
        }
        entries
    };
    assert_ne!(of(&[("a", "bc")]), of(&[("ab", "c")]));
    assert_ne!(of(&[("a", "")]), of(&[("a", ""), ("", "")]));
    let long = "x".repeat(1000);
    let entries = of(&[("key", &long), ("", ""), ("k", "v")]);
    let pairs: Vec<_> = entries.iter().collect();
    assert_eq!(pairs, [(&b"key"[..], long.as_bytes()), (b"", b""), (b"k", b"v")]);
}
