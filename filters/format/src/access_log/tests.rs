use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3 as file;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::google::protobuf as wkt;
use pb::access_log_filter::FilterSpecifier as Specifier;
use prost::Message as _;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::runtime::{Layer, Runtime};
use waystation_filter_api::stream::{Protocol, StreamInfo};
use waystation_filter_api::value::Value;
use waystation_http::Headers;
use waystation_stats::Store;

use super::{AccessLog, AccessLogFilter, AccessLogSinks, AccessLogType};
use crate::formatter::FormatContext;

const HOUR: Duration = Duration::from_secs(3600);

pub(super) fn info() -> StreamInfo {
    let address = Address::Ip(([127, 0, 0, 1], 80).into());
    let connection = ConnectionInfo::new(1, Instant::now(), address.clone(), address);
    let start = connection.start;
    let mut info = StreamInfo::new(1, start, SystemTime::now(), Rc::new(connection), Some(Protocol::Http11));
    info.response_code = 200;
    info.timing.complete = Some(start + Duration::from_millis(50));
    info
}

pub(super) fn cx<'a>(info: &'a StreamInfo, request: &'a Headers) -> FormatContext<'a> {
    FormatContext {
        request: Some(request),
        response: None,
        trailers: None,
        info,
        local_reply_body: "",
        log_type: AccessLogType::DownstreamEnd,
        now: info.start,
    }
}

fn matches(specifier: Specifier, cx: &FormatContext<'_>, random: u64) -> bool {
    let proto = pb::AccessLogFilter { filter_specifier: Some(specifier) };
    AccessLogFilter::compile(&proto, &Runtime::new()).unwrap().is_match(cx, random)
}

fn comparison(op: pb::comparison_filter::Op, default_value: u32) -> Option<pb::ComparisonFilter> {
    let value = core::RuntimeUInt32 { default_value, runtime_key: "log.at".into() };
    Some(pb::ComparisonFilter { op: op.into(), value: Some(value) })
}

fn status(op: pb::comparison_filter::Op, value: u32) -> Specifier {
    Specifier::StatusCodeFilter(pb::StatusCodeFilter { comparison: comparison(op, value) })
}

fn filter(specifier: Specifier) -> pb::AccessLogFilter {
    pb::AccessLogFilter { filter_specifier: Some(specifier) }
}

#[test]
fn filters_decide() {
    use pb::comparison_filter::Op;
    let mut info = info();
    info.flags.set(ResponseFlag::UpstreamOverflow);
    info.metadata.set("ns", "k", Value::String("v".into()));
    info.health_check = true;
    let request: Headers = [("x-debug", "1")].into_iter().collect();
    let cx = cx(&info, &request);
    let duration =
        |op, value| Specifier::DurationFilter(pb::DurationFilter { comparison: comparison(op, value) });
    let flags = |flags: &[&str]| {
        Specifier::ResponseFlagFilter(pb::ResponseFlagFilter {
            flags: flags.iter().map(|flag| (*flag).into()).collect(),
        })
    };
    let grpc = |exclude| Specifier::GrpcStatusFilter(pb::GrpcStatusFilter { statuses: vec![2], exclude });
    let types = |types: Vec<i32>, exclude| Specifier::LogTypeFilter(pb::LogTypeFilter { types, exclude });
    let header = |name: &str| {
        let header = route::HeaderMatcher { name: name.into(), ..Default::default() };
        Specifier::HeaderFilter(pb::HeaderFilter { header: Some(header) })
    };
    let metadata = |key: &str, expected: &str, missing: Option<bool>| {
        let segment = matcher::metadata_matcher::path_segment::Segment::Key(key.into());
        let text = matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(expected.into())),
            ignore_case: false,
        };
        let value = matcher::ValueMatcher {
            match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(text)),
        };
        Specifier::MetadataFilter(pb::MetadataFilter {
            matcher: Some(matcher::MetadataMatcher {
                filter: "ns".into(),
                path: vec![matcher::metadata_matcher::PathSegment { segment: Some(segment) }],
                value: Some(value),
                invert: false,
            }),
            match_if_key_not_found: missing.map(|value| wkt::BoolValue { value }),
        })
    };
    let both = |a, b| vec![filter(a), filter(b)];
    for (specifier, expected) in [
        (status(Op::Eq, 200), true),
        (status(Op::Ge, 400), false),
        (status(Op::Le, 200), true),
        (status(Op::Ne, 200), false),
        (duration(Op::Ge, 50), true),
        (duration(Op::Ge, 51), false),
        (Specifier::NotHealthCheckFilter(pb::NotHealthCheckFilter {}), false),
        (Specifier::TraceableFilter(pb::TraceableFilter {}), false),
        (flags(&[]), true),
        (flags(&["NR"]), false),
        (flags(&["NR", "UO"]), true),
        // A response without a gRPC status whose HTTP status is 200 has "unknown".
        (grpc(false), true),
        (grpc(true), false),
        (types(vec![6], false), true),
        (types(vec![6], true), false),
        (types(vec![4], false), false),
        (header("x-debug"), true),
        (header("x-other"), false),
        (metadata("k", "v", None), true),
        (metadata("k", "w", None), false),
        (metadata("other", "v", None), true),
        (metadata("other", "v", Some(false)), false),
        (
            Specifier::AndFilter(pb::AndFilter { filters: both(status(Op::Eq, 200), header("x-other")) }),
            false,
        ),
        (Specifier::OrFilter(pb::OrFilter { filters: both(status(Op::Eq, 200), header("x-other")) }), true),
    ] {
        assert_eq!(matches(specifier.clone(), &cx, 0), expected, "{specifier:?}");
    }
}

#[test]
fn runtime_filters_sample_alike_for_one_request_unless_told_otherwise() {
    let info = info();
    let request: Headers = [("x-request-id", "00000007-ffff-4fff-8fff-ffffffffffff")].into_iter().collect();
    let cx = cx(&info, &request);
    let sampled = |numerator, independent| {
        Specifier::RuntimeFilter(pb::RuntimeFilter {
            runtime_key: "log.sampled".into(),
            percent_sampled: Some(FractionalPercent { numerator, denominator: 0 }),
            use_independent_randomness: independent,
        })
    };
    assert!(matches(sampled(8, false), &cx, 99));
    assert!(!matches(sampled(7, false), &cx, 0));
    assert!(matches(sampled(7, true), &cx, 0));
    assert!(!matches(sampled(8, true), &cx, 99));
}

#[test]
fn the_runtime_moves_comparisons() {
    let runtime = Runtime::new();
    let proto = filter(status(pb::comparison_filter::Op::Ge, 400));
    let filter = AccessLogFilter::compile(&proto, &runtime).unwrap();
    let (info, request) = (info(), Headers::new());
    assert!(!filter.is_match(&cx(&info, &request), 0));
    let values = [("log.at".to_owned(), Value::Number(200.0))].into();
    runtime.set_layers(vec![Layer { name: "test".into(), values }]);
    assert!(filter.is_match(&cx(&info, &request), 0));
}

#[test]
fn filter_errors_name_the_place() {
    let nested = Specifier::AndFilter(pb::AndFilter {
        filters: vec![
            filter(Specifier::NotHealthCheckFilter(pb::NotHealthCheckFilter {})),
            filter(Specifier::StatusCodeFilter(pb::StatusCodeFilter { comparison: None })),
        ],
    });
    let extension = Specifier::ExtensionFilter(pb::ExtensionFilter { name: "cel".into(), config_type: None });
    let flag = Specifier::ResponseFlagFilter(pb::ResponseFlagFilter { flags: vec!["XX".into()] });
    for (specifier, expected) in [
        (nested, "and_filter.filters[1].status_code_filter.comparison: is required"),
        (extension, "extension_filter: not supported: cel"),
        (flag, "response_flag_filter.flags[0]: \"XX\" is no response flag"),
    ] {
        assert_eq!(
            AccessLogFilter::compile(&filter(specifier), &Runtime::new()).unwrap_err().to_string(),
            expected
        );
    }
}

fn any(type_name: &str, value: Vec<u8>) -> pb::access_log::ConfigType {
    let type_url = format!("type.googleapis.com/{type_name}");
    pb::access_log::ConfigType::TypedConfig(wkt::Any { type_url, value })
}

fn file_log(path: &Path, text: &str) -> pb::AccessLog {
    let source = core::DataSource {
        watched_directory: None,
        specifier: Some(core::data_source::Specifier::InlineString(text.into())),
    };
    let format = core::SubstitutionFormatString {
        format: Some(core::substitution_format_string::Format::TextFormatSource(source)),
        ..Default::default()
    };
    let config = file::FileAccessLog {
        path: path.to_str().unwrap().into(),
        access_log_format: Some(file::file_access_log::AccessLogFormat::LogFormat(format)),
    };
    pb::AccessLog {
        config_type: Some(any(
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            config.encode_to_vec(),
        )),
        ..Default::default()
    }
}

fn compile(proto: &pb::AccessLog, sinks: &AccessLogSinks) -> AccessLog {
    AccessLog::compile(proto, sinks, &Runtime::new()).unwrap()
}

fn log(log: &AccessLog) {
    log.log(&cx(&info(), &Headers::new()), 0);
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn logs_share_a_file_and_lines_wait_for_a_flush() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    std::fs::write(&path, "kept\n").unwrap();
    let store = Store::default();
    let sinks = AccessLogSinks::with_flush(&store, HOUR, 64 * 1024);
    let (one, two) = (
        compile(&file_log(&path, "one %RESPONSE_CODE%\n"), &sinks),
        compile(&file_log(&path, "two\n"), &sinks),
    );
    log(&one);
    log(&two);
    assert_eq!(read(&path), "kept\n");
    assert_eq!(store.find("filesystem.write_buffered"), Some(2));
    assert_eq!(store.find("filesystem.write_total_buffered"), Some(12));
    sinks.flush_all();
    assert_eq!(read(&path), "kept\none 200\ntwo\n");
    assert_eq!(store.find("filesystem.write_completed"), Some(1));
    assert_eq!(store.find("filesystem.write_total_buffered"), Some(0));
    assert_eq!(store.find("filesystem.flushed_by_timer"), Some(0));
    log(&one);
    drop(sinks);
    assert_eq!(read(&path), "kept\none 200\ntwo\none 200\n", "the end of the process flushes");
}

/// Waits for what another thread is about to bring about.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < give_up, "{what} never came");
        std::thread::yield_now();
    }
}

#[test]
fn lines_are_flushed_by_time_and_by_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    let store = Store::default();
    let sinks = AccessLogSinks::with_flush(&store, Duration::from_millis(1), 1 << 20);
    let timed = compile(&file_log(&path, "x\n"), &sinks);
    log(&timed);
    eventually("the timer", || store.find("filesystem.flushed_by_timer") == Some(1));
    eventually("the line", || read(&path) == "x\n");

    let (store, path) = (Store::default(), dir.path().join("sized.log"));
    let sinks = AccessLogSinks::with_flush(&store, HOUR, 4);
    let sized = compile(&file_log(&path, "x\n"), &sinks);
    log(&sized);
    assert_eq!(read(&path), "");
    log(&sized);
    eventually("the full buffer", || read(&path) == "x\nx\n");
    assert_eq!(store.find("filesystem.flushed_by_timer"), Some(0));
}

#[test]
fn a_rotated_file_is_reopened_and_a_lost_directory_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("logs").join("access.log");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let store = Store::default();
    let sinks = AccessLogSinks::with_flush(&store, HOUR, 64 * 1024);
    let access_log = compile(&file_log(&path, "x\n"), &sinks);
    log(&access_log);
    sinks.flush_all();
    let rotated = dir.path().join("rotated.log");
    std::fs::rename(&path, &rotated).unwrap();
    log(&access_log);
    sinks.reopen();
    sinks.flush_all();
    assert_eq!((read(&rotated), read(&path)), ("x\n".into(), "x\n".into()));

    std::fs::rename(&path, &rotated).unwrap();
    std::fs::remove_dir(path.parent().unwrap()).unwrap();
    sinks.reopen();
    log(&access_log);
    sinks.flush_all();
    assert_eq!(read(&rotated), "x\nx\n", "the old file is kept until there is a new one");
    assert_eq!(store.find("filesystem.reopen_failed"), Some(1));
}

#[test]
fn a_reader_that_never_reads_costs_lines_not_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let store = Store::default();
    let sinks = AccessLogSinks::with_flush(&store, Duration::ZERO, 1);
    let line = format!("{}\n", "x".repeat(64 * 1024));
    let access_log = compile(&file_log(&path, &line), &sinks);
    // The writer hangs in opening the pipe with the first line; 8 MiB later, lines are dropped.
    let started = Instant::now();
    for _ in 0..512 {
        log(&access_log);
    }
    let dropped = store.find("filesystem.write_dropped").unwrap();
    assert!(dropped > 0 && dropped < 512, "{dropped} dropped");
    assert!(started.elapsed() < Duration::from_secs(10), "32 MB in memory");
    // Someone reads after all: every line that was not dropped is whole, and new ones find room again.
    let kept = 512 - dropped;
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; usize::try_from(kept).unwrap() * line.len()];
        std::io::Read::read_exact(&mut std::fs::File::open(path).unwrap(), &mut bytes).unwrap();
        assert!(bytes.chunks(line.len()).all(|chunk| chunk == line.as_bytes()));
    });
    reader.join().unwrap();
    eventually("room", || store.find("filesystem.write_total_buffered") == Some(0));
}

#[test]
fn loggers_and_their_formats() {
    use file::file_access_log::AccessLogFormat as Format;
    let dir = tempfile::tempdir().unwrap();
    let sinks = AccessLogSinks::new(&Store::default());
    let json = wkt::Struct {
        fields: [(
            "a".to_owned(),
            wkt::Value { kind: Some(wkt::value::Kind::StringValue("%RESPONSE_CODE%".into())) },
        )]
        .into(),
    };
    #[expect(deprecated, reason = "the old formats are still accepted")]
    let formats = [
        (None, " HTTP/1.1\" 200 - 0 0 50 - \"-\" \"-\" \"-\" \"-\" \"-\"\n"),
        (Some(Format::Format(String::new())), " HTTP/1.1\" 200 - 0 0 50 - \"-\" \"-\" \"-\" \"-\" \"-\"\n"),
        (Some(Format::Format("f%RESPONSE_CODE%".into())), "f200"),
        (Some(Format::JsonFormat(json.clone())), "{\"a\":200}\n"),
        (Some(Format::TypedJsonFormat(json)), "{\"a\":200}\n"),
    ];
    for (index, (access_log_format, expected)) in formats.into_iter().enumerate() {
        let path = dir.path().join(index.to_string());
        let config = file::FileAccessLog { path: path.to_str().unwrap().into(), access_log_format };
        let name = "envoy.extensions.access_loggers.file.v3.FileAccessLog";
        let proto =
            pb::AccessLog { config_type: Some(any(name, config.encode_to_vec())), ..Default::default() };
        log(&compile(&proto, &sinks));
        eventually("the last line of a log that is gone", || read(&path).ends_with(expected));
    }
    for name in ["StdoutAccessLog", "StderrAccessLog"] {
        let config = any(&format!("envoy.extensions.access_loggers.stream.v3.{name}"), Vec::new());
        compile(&pb::AccessLog { config_type: Some(config), ..Default::default() }, &sinks);
    }
    let missing = dir.path().join("no").join("log");
    for (proto, expected) in [
        (pb::AccessLog::default(), "typed_config: is required".to_owned()),
        (
            file_log(&missing, "x"),
            format!(
                "typed_config.path: unable to open file '{}': No such file or directory (os error 2)",
                missing.display()
            ),
        ),
        (file_log(Path::new(""), "x"), "typed_config.path: must not be empty".into()),
        (
            file_log(&missing, "%NOPE%"),
            "typed_config.log_format.text_format_source: Not supported field in StreamInfo: NOPE".into(),
        ),
        (
            pb::AccessLog { config_type: Some(any("a.b.GrpcLog", Vec::new())), ..Default::default() },
            "typed_config: not supported: access logger a.b.GrpcLog".into(),
        ),
    ] {
        assert_eq!(AccessLog::compile(&proto, &sinks, &Runtime::new()).unwrap_err().to_string(), expected);
    }
}
