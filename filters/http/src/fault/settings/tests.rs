use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as common;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::{Layer, Runtime};
use waystation_filter_api::value::{Struct, Value};
use waystation_http::{HeaderName, Headers, Known};
use waystation_stats::Store;

use super::super::caller::{Caller, Callers};
use super::{Abort, Settings};

const ALWAYS: Option<FractionalPercent> = Some(FractionalPercent { numerator: 100, denominator: 0 });

fn percent(numerator: u32, denominator: DenominatorType) -> Option<FractionalPercent> {
    Some(FractionalPercent { numerator, denominator: denominator.into() })
}

fn aborting(error: pb::fault_abort::ErrorType, percentage: Option<FractionalPercent>) -> pb::HttpFault {
    let abort = pb::FaultAbort { error_type: Some(error), percentage, ..Default::default() };
    pb::HttpFault { abort: Some(abort), ..Default::default() }
}

fn status(status: u32) -> pb::fault_abort::ErrorType {
    pb::fault_abort::ErrorType::HttpStatus(status)
}

fn asked() -> pb::fault_abort::ErrorType {
    pb::fault_abort::ErrorType::HeaderAbort(pb::fault_abort::HeaderAbort {})
}

fn delaying(millis: Option<u64>, percentage: Option<FractionalPercent>) -> common::FaultDelay {
    use common::fault_delay::{FaultDelaySecifier, HeaderDelay};
    let source = match millis {
        Some(millis) => FaultDelaySecifier::FixedDelay(wkt::Duration {
            seconds: (millis / 1000) as i64,
            nanos: (millis % 1000 * 1_000_000) as i32,
        }),
        None => FaultDelaySecifier::HeaderDelay(HeaderDelay {}),
    };
    common::FaultDelay { percentage, fault_delay_secifier: Some(source) }
}

fn compile(proto: &pb::HttpFault, runtime: &Runtime) -> Settings {
    Settings::compile(proto, runtime).unwrap()
}

fn head(headers: &[(Known, &str)]) -> Headers {
    let mut head = Headers::new();
    headers.iter().for_each(|(name, value)| head.append(*name, value));
    head
}

fn set(runtime: &Runtime, values: &[(&str, Value)]) {
    let values = values.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    runtime.set_layers(vec![Layer { name: "test".into(), values }]);
}

fn caller(name: &str, runtime: &Runtime) -> std::sync::Arc<Caller> {
    let callers = Callers::new(Store::default().root(), runtime.clone());
    callers.of(&head(&[(Known::XEnvoyDownstreamServiceCluster, name)])).unwrap()
}

/// How many of the draws `0..draws` abort.
fn aborts(settings: &Settings, head: &Headers, caller: Option<&Caller>, draws: u64) -> u64 {
    (0..draws).filter(|draw| settings.abort(head, caller, &mut || *draw).is_some()).count() as u64
}

#[test]
fn percentages_of_every_denominator() {
    let none = Headers::new();
    for (numerator, denominator, of, strikes) in [
        (0, DenominatorType::Hundred, 1_000, 0),
        (7, DenominatorType::Hundred, 1_000, 70),
        (100, DenominatorType::Hundred, 1_000, 1_000),
        (500, DenominatorType::Hundred, 1_000, 1_000),
        (7, DenominatorType::TenThousand, 20_000, 14),
        (9_999, DenominatorType::TenThousand, 20_000, 19_998),
        (1, DenominatorType::Million, 3_000_000, 3),
        (250_000, DenominatorType::Million, 3_000_000, 750_000),
    ] {
        let settings = compile(&aborting(status(503), percent(numerator, denominator)), &Runtime::default());
        assert_eq!(aborts(&settings, &none, None, of), strikes, "{numerator} of {denominator:?}");
    }
    let unset = compile(&aborting(status(503), None), &Runtime::default());
    assert_eq!(aborts(&unset, &none, None, 1_000), 0);
}

#[test]
fn runtime_overrides_the_percentage() {
    let runtime = Runtime::new();
    let none = Headers::new();
    let proto = aborting(status(503), percent(10, DenominatorType::TenThousand));
    let general = compile(&proto, &runtime);
    let own = compile(&pb::HttpFault { abort_percent_runtime: "mine".into(), ..proto }, &runtime);
    let counts = || (aborts(&general, &none, None, 10_000), aborts(&own, &none, None, 10_000));
    assert_eq!(counts(), (10, 10));
    set(&runtime, &[("fault.http.abort.abort_percent", Value::Number(3.0))]);
    assert_eq!(counts(), (300, 10), "a bare number is of a hundred");
    let million: Struct =
        [("numerator".into(), Value::Number(200.0)), ("denominator".into(), Value::String("MILLION".into()))]
            .into();
    set(&runtime, &[("mine", Value::Struct(million))]);
    assert_eq!(counts(), (10, 200), "of the first ten thousand, those below 200");
}

#[test]
fn a_callers_keys_stand_in_the_general_ones_place() {
    let runtime = Runtime::new();
    let none = Headers::new();
    set(
        &runtime,
        &[
            ("fault.http.abort.abort_percent", Value::Number(100.0)),
            ("fault.http.abort.http_status", Value::Number(420.0)),
            ("fault.http.known.abort.abort_percent", Value::Number(50.0)),
            ("fault.http.known.abort.http_status", Value::Number(421.0)),
            ("fault.http.delay.fixed_duration_ms", Value::Number(20.0)),
            ("fault.http.known.delay.fixed_duration_ms", Value::Number(30.0)),
        ],
    );
    let mut proto = aborting(status(503), percent(1, DenominatorType::Hundred));
    proto.delay = Some(delaying(Some(10), ALWAYS));
    let settings = compile(&proto, &runtime);
    let (known, unknown) = (caller("known", &runtime), caller("unknown", &runtime));
    let abort = |caller| settings.abort(&none, caller, &mut || 0);
    let delay = |caller| settings.delay(&none, caller, &mut || 0).unwrap().as_millis();
    assert_eq!((abort(None), delay(None)), (Some(Abort::Http(420)), 20));
    assert_eq!((abort(Some(&known)), delay(Some(&known))), (Some(Abort::Http(421)), 30));
    // Of one that runtime says nothing of, the status is the configured one, and the delay the general one.
    assert_eq!((abort(Some(&unknown)), delay(Some(&unknown))), (Some(Abort::Http(503)), 20));
    assert_eq!(aborts(&settings, &none, None, 100), 100);
    assert_eq!(aborts(&settings, &none, Some(&known), 100), 50);
    assert_eq!(aborts(&settings, &none, Some(&unknown), 100), 1);
}

#[test]
fn delay_and_abort_are_independent() {
    let mut proto = aborting(status(503), percent(50, DenominatorType::Hundred));
    proto.delay = Some(delaying(Some(10), percent(50, DenominatorType::Hundred)));
    let settings = compile(&proto, &Runtime::default());
    let none = Headers::new();
    let mut outcomes = [0; 4];
    for (first, second) in (0..100).flat_map(|first| (0..100).map(move |second| (first, second))) {
        let delay = settings.delay(&none, None, &mut || first).is_some();
        let abort = settings.abort(&none, None, &mut || second).is_some();
        outcomes[usize::from(delay) * 2 + usize::from(abort)] += 1;
    }
    assert_eq!(outcomes, [2_500; 4]);
}

#[test]
fn headers_say_what_and_at_most_how_often() {
    let settings = compile(&aborting(asked(), percent(20, DenominatorType::Hundred)), &Runtime::default());
    let abort = |headers: &[_]| settings.abort(&head(headers), None, &mut || 0);
    let (http, grpc) = (Known::XEnvoyFaultAbortRequest, Known::XEnvoyFaultAbortGrpcRequest);
    assert_eq!(abort(&[]), None);
    for (text, expected) in [
        ("503", Some(503)),
        (" +503 ", Some(503)),
        ("200", Some(200)),
        ("599", Some(599)),
        ("199", None),
        ("600", None),
        ("-1", None),
        ("5e2", None),
        ("", None),
        ("99999999999999999999", None),
    ] {
        assert_eq!(abort(&[(http, text)]), expected.map(Abort::Http), "{text}");
    }
    assert_eq!(abort(&[(http, "503"), (http, "504")]), Some(Abort::Http(503)));
    assert_eq!(abort(&[(grpc, "77")]), Some(Abort::Grpc(77)));
    assert_eq!(abort(&[(grpc, "7"), (http, "404")]), Some(Abort::Http(404)));
    assert_eq!(abort(&[(grpc, "7"), (http, "99")]), Some(Abort::Grpc(7)));
    for (asked, strikes) in [("0", 0), ("5", 5), ("20", 20), ("21", 20), ("x", 20), ("99999999999", 20)] {
        let head = head(&[(http, "503"), (Known::XEnvoyFaultAbortRequestPercentage, asked)]);
        assert_eq!(aborts(&settings, &head, None, 100), strikes, "{asked}");
    }
    let fixed = compile(&aborting(status(503), ALWAYS), &Runtime::default());
    let ignored = head(&[(http, "404"), (Known::XEnvoyFaultAbortRequestPercentage, "0")]);
    assert_eq!(fixed.abort(&ignored, None, &mut || 0), Some(Abort::Http(503)));
}

#[test]
fn delays_and_rates() {
    let runtime = Runtime::new();
    let rate = |limit_type| common::FaultRateLimit { limit_type: Some(limit_type), percentage: ALWAYS };
    use common::fault_rate_limit::{FixedLimit, HeaderLimit, LimitType};
    let fixed = compile(
        &pb::HttpFault {
            delay: Some(delaying(Some(1500), ALWAYS)),
            response_rate_limit: Some(rate(LimitType::FixedLimit(FixedLimit { limit_kbps: 3 }))),
            ..Default::default()
        },
        &runtime,
    );
    let by_header = compile(
        &pb::HttpFault {
            delay: Some(delaying(None, ALWAYS)),
            response_rate_limit: Some(rate(LimitType::HeaderLimit(HeaderLimit {}))),
            ..Default::default()
        },
        &runtime,
    );
    let delay = |settings: &Settings, headers: &[_]| settings.delay(&head(headers), None, &mut || 0);
    let rate = |settings: &Settings, headers: &[_]| settings.response_rate(&head(headers), &mut || 0);
    let (delays, rates) = (Known::XEnvoyFaultDelayRequest, Known::XEnvoyFaultThroughputResponse);
    assert_eq!(delay(&fixed, &[(delays, "1")]), Some(Duration::from_millis(1500)));
    assert_eq!(delay(&by_header, &[]), None);
    assert_eq!(delay(&by_header, &[(delays, "25")]), Some(Duration::from_millis(25)));
    assert_eq!(delay(&by_header, &[(delays, "0")]), None);
    let lowered = [(delays, "25"), (Known::XEnvoyFaultDelayRequestPercentage, "0")];
    assert_eq!(delay(&by_header, &lowered), None);
    assert_eq!(rate(&fixed, &[(rates, "9")]), Some(3));
    assert_eq!((rate(&by_header, &[]), rate(&by_header, &[(rates, "0")])), (None, None));
    assert_eq!(rate(&by_header, &[(rates, "9")]), Some(9));
    let lowered = [(rates, "9"), (Known::XEnvoyFaultThroughputResponsePercentage, "0")];
    assert_eq!(rate(&by_header, &lowered), None);
    set(&runtime, &[("fault.http.delay.fixed_duration_ms", Value::Number(0.0))]);
    assert_eq!(delay(&fixed, &[]), None, "no time is no delay");
    set(&runtime, &[("fault.http.rate_limit.response_percent", Value::Number(0.0))]);
    assert_eq!(rate(&fixed, &[]), None);
}

#[test]
fn statuses_that_no_response_has_are_not_taken_from_runtime() {
    let runtime = Runtime::new();
    let settings = compile(&aborting(status(503), ALWAYS), &runtime);
    for (value, expected) in [(700.0, 700), (42.0, 503), (100.0, 503), (70_000.0, 503)] {
        set(&runtime, &[("fault.http.abort.http_status", Value::Number(value))]);
        assert_eq!(settings.abort(&Headers::new(), None, &mut || 0), Some(Abort::Http(expected)));
    }
}

#[test]
fn whom_it_concerns() {
    use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
    let settings = compile(
        &pb::HttpFault {
            upstream_cluster: "up".into(),
            downstream_nodes: vec!["n1".into(), "n2".into()],
            headers: vec![HeaderMatcher { name: "x-test".into(), ..Default::default() }],
            ..Default::default()
        },
        &Runtime::default(),
    );
    assert!(!settings.has_any());
    let mut request = head(&[(Known::XEnvoyDownstreamServiceNode, "n2")]);
    assert!(!settings.concerns(&request, Some("up")));
    request.append(&HeaderName::parse("x-test").unwrap(), "");
    assert!(settings.concerns(&request, Some("up")));
    assert!(!settings.concerns(&request, Some("other")) && !settings.concerns(&request, None));
    request.set(Known::XEnvoyDownstreamServiceNode, "n3");
    assert!(!settings.concerns(&request, Some("up")));
}

#[test]
fn refusals_name_their_path() {
    let refusal =
        |proto: pb::HttpFault| Settings::compile(&proto, &Runtime::default()).unwrap_err().to_string();
    let abort = pb::FaultAbort::default();
    let refused = refusal(pb::HttpFault { abort: Some(abort), ..Default::default() });
    assert_eq!(refused, "abort.error_type: is required");
    assert!(refusal(aborting(status(600), None)).starts_with("abort.http_status: "));
    let none = pb::HttpFault { delay: Some(delaying(Some(0), None)), ..Default::default() };
    assert_eq!(refusal(none), "delay.fixed_delay: must be positive");
}
