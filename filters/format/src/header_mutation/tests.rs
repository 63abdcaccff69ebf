//! The outcomes are those observed on Envoy 1.40.

use std::rc::Rc;
use std::time::{Instant, SystemTime};

use envoy_types::pb::envoy::config::common::mutation_rules::v3 as rules;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::value::Value;
use waystation_http::Headers;

use super::{HeaderMutationList, HeaderMutations, legacy_arguments};
use crate::access_log::AccessLogType;
use crate::formatter::FormatContext;

const APPEND: i32 = 0;
const ADD_IF_ABSENT: i32 = 1;
const OVERWRITE: i32 = 2;
const OVERWRITE_IF_EXISTS: i32 = 3;

fn option(key: &str, value: &str, append_action: i32) -> core::HeaderValueOption {
    core::HeaderValueOption {
        header: Some(core::HeaderValue { key: key.into(), value: value.into(), ..Default::default() }),
        append_action,
        ..Default::default()
    }
}

fn kept(option: core::HeaderValueOption) -> core::HeaderValueOption {
    core::HeaderValueOption { keep_empty_value: true, ..option }
}

fn info() -> StreamInfo {
    let address = Address::Ip(([127, 0, 0, 1], 80).into());
    let connection = ConnectionInfo::new(1, Instant::now(), address.clone(), address);
    StreamInfo::new(1, connection.start, SystemTime::now(), Rc::new(connection), None)
}

fn cx(info: &StreamInfo) -> FormatContext<'_> {
    FormatContext {
        request: None,
        response: None,
        trailers: None,
        info,
        local_reply_body: "",
        log_type: AccessLogType::NotSet,
        now: info.start,
    }
}

fn lines(headers: &Headers) -> Vec<String> {
    headers.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value))).collect()
}

#[test]
fn values_are_those_from_before_and_overwriting_goes_first() {
    let mut request: Headers =
        [(":path", "/o"), ("user-agent", "ua"), ("x-r", "0"), ("x-gone", "1")].into_iter().collect();
    let mutations = HeaderMutations::compile(
        &[
            option("X-R", "a", APPEND),
            option("x-r", "b", OVERWRITE),
            option("x-r", "c", APPEND),
            option("x-n", "%REQ(x-r)%", APPEND),
            option("x-ab", "1", ADD_IF_ABSENT),
            option("x-ab", "2", ADD_IF_ABSENT),
            option("x-none", "%REQ(nope)%", APPEND),
            kept(option("x-kept", "%REQ(nope)%", APPEND)),
            option("x-miss", "1", OVERWRITE_IF_EXISTS),
            option("user-agent", "ua2", APPEND),
        ],
        &["X-Gone".into()],
    );
    let info = info();
    mutations.unwrap().apply_to_request(&mut request, &cx(&info));
    assert_eq!(
        lines(&request),
        [
            ":path: /o",
            "user-agent: ua,ua2",
            "x-r: b",
            "x-r: a",
            "x-r: c",
            "x-n: 0",
            "x-ab: 1",
            "x-ab: 2",
            "x-kept: "
        ]
    );
}

#[test]
fn a_list_is_done_one_after_the_other() {
    use rules::header_mutation::{Action, RemoveOnMatch};
    let append = |option| Action::Append(option);
    let pattern = matcher::string_matcher::MatchPattern::Prefix("x-rm".into());
    let actions = [
        append(option("x-a", "2", APPEND)),
        append(option("x-copy", "%REQ(x-a)%", APPEND)),
        append(option("x-abs", "1", ADD_IF_ABSENT)),
        append(option("x-abs", "2", ADD_IF_ABSENT)),
        Action::RemoveOnMatch(RemoveOnMatch {
            key_matcher: Some(matcher::StringMatcher { match_pattern: Some(pattern), ignore_case: false }),
        }),
        Action::Remove("x-gone".into()),
        append(option("x-late", "%REQ(x-abs)%%REQ(x-gone)%", APPEND)),
    ];
    let protos = actions.map(|action| rules::HeaderMutation { action: Some(action) });
    let mut request: Headers =
        [("x-a", "1"), ("x-rm-1", "1"), ("x-rm-2", "1"), ("x-gone", "1")].into_iter().collect();
    let info = info();
    let list = HeaderMutationList::compile(&protos).unwrap();
    assert!(!list.is_empty());
    list.apply_to_request(&mut request, &cx(&info));
    assert_eq!(lines(&request), ["x-a: 1", "x-a: 2", "x-copy: 1", "x-abs: 1", "x-late: 1"]);
}

#[test]
fn joined_or_added_depends_on_the_header_and_the_side() {
    let mutations = HeaderMutations::compile(
        &[option("via", "b", APPEND), option("user-agent", "b", APPEND), option("grpc-status", "b", APPEND)],
        &[],
    )
    .unwrap();
    let before: Headers = [("via", "a"), ("user-agent", "a"), ("grpc-status", "a")].into_iter().collect();
    let info = info();
    let (mut request, mut response, mut trailers) = (before.clone(), before.clone(), before);
    mutations.apply_to_request(&mut request, &cx(&info));
    mutations.apply_to_response(&mut response, &cx(&info));
    mutations.apply(&mut trailers, &cx(&info));
    assert_eq!(lines(&request), ["via: a,b", "user-agent: a,b", "grpc-status: a", "grpc-status: b"]);
    assert_eq!(lines(&response), ["via: a,b", "user-agent: a", "grpc-status: a,b", "user-agent: b"]);
    assert_eq!(lines(&trailers), ["via: a", "user-agent: a", "grpc-status: a,b", "via: b", "user-agent: b"]);
}

#[test]
#[expect(deprecated, reason = "append is still accepted")]
fn the_deprecated_flag_and_raw_values() {
    use envoy_types::pb::google::protobuf::BoolValue;
    let flagged = |append| core::HeaderValueOption {
        append: Some(BoolValue { value: append }),
        ..option("x", "2", APPEND)
    };
    let raw = core::HeaderValueOption {
        header: Some(core::HeaderValue {
            key: "raw".into(),
            raw_value: b"%\xff".to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let info = info();
    for (append, expected) in
        [(true, vec!["x: 1", "x: 2", "raw: %\u{fffd}"]), (false, vec!["x: 2", "raw: %\u{fffd}"])]
    {
        let mut headers: Headers = [("x", "1")].into_iter().collect();
        let mutations = HeaderMutations::compile(&[flagged(append), raw.clone()], &[]).unwrap();
        mutations.apply_to_request(&mut headers, &cx(&info));
        assert_eq!(lines(&headers), expected);
    }
    let both = core::HeaderValueOption { append_action: ADD_IF_ABSENT, ..flagged(true) };
    let error = HeaderMutations::compile(&[both], &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "[0].append_action: Both append and append_action are set and it's not allowed"
    );
}

#[test]
fn values_that_could_split_the_message_are_dropped() {
    let mut info = info();
    info.metadata.set("ns", "k", Value::String("a\r\nb".into()));
    let mutations =
        HeaderMutations::compile(&[option("x", "%DYNAMIC_METADATA(ns:k)%", APPEND)], &[]).unwrap();
    let mut headers = Headers::new();
    mutations.apply_to_request(&mut headers, &cx(&info));
    assert!(headers.is_empty());
}

#[test]
fn errors_name_the_element() {
    let good = option("x", "1", APPEND);
    for (key, value, expected) in [
        (":path", "x", "[1].header.key: :-prefixed or host headers may not be modified"),
        ("Host", "x", "[1].header.key: :-prefixed or host headers may not be modified"),
        ("a b", "x", "[1].header.key: invalid header name"),
        ("", "x", "[1].header.key: invalid header name"),
        ("a", "x\ny", "[1].header.value: must not hold NUL, CR or LF"),
        ("a", "%NOPE%", "[1].header.value: Not supported field in StreamInfo: NOPE"),
        (
            "a",
            "50%",
            "[1].header.value: Incorrect configuration: 50%. Couldn't find valid command at position 2",
        ),
    ] {
        let error = HeaderMutations::compile(&[good.clone(), option(key, value, APPEND)], &[]).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    let error = HeaderMutations::compile(&[], &["a".into(), "Host".into()]).unwrap_err();
    assert_eq!(error.to_string(), "[1]: :-prefixed or host headers may not be removed");
    let error = HeaderMutationList::compile(&[rules::HeaderMutation { action: None }]).unwrap_err();
    assert_eq!(error.to_string(), "[0].action: is required");
}

#[test]
fn old_spellings_in_header_values() {
    for (old, new) in [
        (r#"a %UPSTREAM_METADATA(["a", "b"])% b"#, "a %UPSTREAM_METADATA(a:b)% b"),
        (r#"%DYNAMIC_METADATA(["a"])%"#, "%DYNAMIC_METADATA(a)%"),
        ("%PER_REQUEST_STATE(x.y)%", "%FILTER_STATE(x.y:PLAIN)%"),
        ("%UPSTREAM_METADATA(a:b)% 100%%", "%UPSTREAM_METADATA(a:b)% 100%%"),
        ("%REQ(a)%PER_REQUEST_STATE(x)%", "%REQ(a)%PER_REQUEST_STATE(x)%"),
        ("%", "%"),
    ] {
        assert_eq!(legacy_arguments(old), new);
    }
}
