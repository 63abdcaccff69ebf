//! Every operator, against the output of Envoy 1.40 for the same stream.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use proptest::prelude::*;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{Certificate, ConnectionInfo, TlsInfo};
use waystation_filter_api::filter_state::{Object, Sharing};
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::stream::{ClusterView, HostView, Protocol, RouteView, StreamInfo};
use waystation_filter_api::value::{Metadata, Value};
use waystation_http::Headers;

use super::{FormatContext, Formatter, SubstitutionFormat};
use crate::access_log::AccessLogType;

#[derive(Debug)]
struct Stub {
    address: Address,
    metadata: Metadata,
    other: Metadata,
}

impl RouteView for Stub {
    fn route_name(&self, route: u32) -> &str {
        if route == 1 { "rt" } else { "" }
    }
    fn route_metadata(&self, _: u32) -> Option<&Metadata> {
        Some(&self.metadata)
    }
    fn virtual_host_name(&self, _: u32) -> &str {
        "vh"
    }
    fn virtual_host_metadata(&self, _: u32) -> Option<&Metadata> {
        Some(&self.other)
    }
    fn virtual_cluster_name(&self, _: u32) -> Option<&str> {
        Some("vc")
    }
}

impl HostView for Stub {
    fn address(&self) -> &Address {
        &self.address
    }
    fn hostname(&self) -> &str {
        "hn.example:99"
    }
    fn metadata(&self) -> Option<&Metadata> {
        Some(&self.metadata)
    }
}

impl ClusterView for Stub {
    fn name(&self) -> &str {
        "up"
    }
    fn observability_name(&self) -> &str {
        "altup"
    }
    fn metadata(&self) -> Option<&Metadata> {
        Some(&self.metadata)
    }
}

#[derive(Debug)]
struct Text(&'static str);

impl Object for Text {
    fn serialize(&self) -> Option<Vec<u8>> {
        Some(self.0.into())
    }
    fn field(&self, name: &str) -> Option<Vec<u8>> {
        (name == "len").then(|| self.0.len().to_string().into())
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

fn ip(text: &str) -> Address {
    Address::Ip(text.parse::<SocketAddr>().unwrap())
}

struct Stream {
    request: Headers,
    response: Headers,
    trailers: Headers,
    info: StreamInfo,
    now: Instant,
}

impl Stream {
    fn cx(&self) -> FormatContext<'_> {
        FormatContext {
            request: Some(&self.request),
            response: Some(&self.response),
            trailers: Some(&self.trailers),
            info: &self.info,
            local_reply_body: "",
            log_type: AccessLogType::DownstreamEnd,
            now: self.now,
        }
    }

    fn text(&self, format: &str) -> String {
        let mut out = Vec::new();
        Formatter::compile(format).unwrap().write(&self.cx(), &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }
}

fn bare() -> Stream {
    let start = Instant::now();
    let connection = ConnectionInfo::new(7, start, ip("127.0.0.1:18901"), ip("127.0.0.1:60452"));
    // 2026-11-21T08:50:12.810720Z
    let start_time = UNIX_EPOCH + Duration::from_micros(1_795_251_012_810_720);
    Stream {
        request: Headers::new(),
        response: Headers::new(),
        trailers: Headers::new(),
        info: StreamInfo::new(1, start, start_time, Rc::new(connection), Some(Protocol::Http11)),
        now: start + Duration::from_millis(24),
    }
}

fn proxied() -> Stream {
    let mut stream = bare();
    stream.request = [
        (":method", "GET"),
        (":authority", "127.0.0.1:18901"),
        (":path", "/rwp/q?a=b%2Fc%26x&d=%41&b%20c=1&plus=a+b&nv&e="),
        ("user-agent", "curl/7.88.1"),
        ("x-multi", "1"),
        ("x-multi", "2"),
        ("x-one", "abcdef"),
        ("x-empty", ""),
        ("x-request-id", "be34505b-20ed-400f-8f49-70294db2fd4c"),
        ("x-envoy-original-path", "/p/q?a=b"),
        ("x-forwarded-client-cert", "By=spiffe://a;URI=spiffe://b,By=c;URI=spiffe://c"),
    ]
    .into_iter()
    .collect();
    stream.request.append("x-quote", b"a\"b\\c\td\xc3\xa9/<>\xff");
    stream.response = [(":status", "404"), ("x-envoy-upstream-service-time", "0")].into_iter().collect();
    stream.trailers = [("grpc-status", "14")].into_iter().collect();
    let mut metadata = Metadata::default();
    metadata.set("foo", "bar", Value::String("baz".into()));
    let mut other = Metadata::default();
    other.set("rns", "rk", Value::String("vhv".into()));
    let stub = Rc::new(Stub { address: ip("127.0.0.1:19901"), metadata, other });
    let info = &mut stream.info;
    info.response_code = 404;
    info.details = Some(Cow::Borrowed("via upstream"));
    info.route = Some((stub.clone(), 1));
    info.bytes.body_sent = 5067;
    info.bytes.wire_received = 279;
    info.upstream.cluster = Some(stub.clone());
    info.upstream.host = Some(stub);
    info.upstream.attempts = 1;
    info.upstream.connection_id = Some(2);
    info.upstream.local_address = Some(ip("127.0.0.1:59054"));
    info.upstream.protocol = Some(Protocol::Http11);
    let at = |micros| Some(info.start + Duration::from_micros(micros));
    info.timing.last_downstream_rx = at(100);
    info.timing.last_upstream_tx = at(1_200);
    info.timing.first_upstream_rx = at(2_500);
    info.timing.last_downstream_tx = at(5_628);
    info.timing.complete = at(6_000);
    for (key, value) in [
        ("k", Value::String("va\"l\u{e9}".into())),
        ("num", Value::Number(42.0)),
        ("b", Value::Bool(true)),
        ("nul", Value::Null),
        ("list", Value::List(vec![Value::String("a".into()), Value::Number(2.0)])),
    ] {
        info.metadata.set("ns", key, value);
    }
    info.filter_state.set("fsk", Rc::new(Text("fs-value")), false, Sharing::None);
    stream
}

#[test]
fn the_default_line() {
    let mut stream = proxied();
    assert_eq!(
        stream.text(super::DEFAULT_FORMAT),
        "[2026-11-21T08:50:12.810Z] \"GET /p/q?a=b HTTP/1.1\" 404 - 0 5067 6 0 \"-\" \"curl/7.88.1\" \
         \"be34505b-20ed-400f-8f49-70294db2fd4c\" \"127.0.0.1:18901\" \"127.0.0.1:19901\"\n"
    );
    stream.info.flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
    stream.info.flags.set(ResponseFlag::UpstreamConnectionFailure);
    assert_eq!(
        stream.text("%RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG%"),
        "URX,UF UpstreamRetryLimitExceeded,UpstreamConnectionFailure"
    );
    assert_eq!(
        bare().text(super::DEFAULT_FORMAT),
        "[2026-11-21T08:50:12.810Z] \"- - HTTP/1.1\" 0 - 0 0 24 - \"-\" \"-\" \"-\" \"-\" \"-\"\n"
    );
}

#[test]
fn operators_of_a_proxied_request() {
    let stream = proxied();
    for (format, expected) in [
        ("%ACCESS_LOG_TYPE%", "DownstreamEnd"),
        ("%BYTES_SENT% %BYTES_RECEIVED% %BYTES_RETRANSMITTED%", "5067 0 0"),
        ("%CONNECTION_ID% %UPSTREAM_CONNECTION_ID% %UPSTREAM_REQUEST_ATTEMPT_COUNT%", "7 2 1"),
        ("%CUSTOM_FLAGS%", ""),
        ("%LOCAL_REPLY_BODY%", ""),
        ("%DOWNSTREAM_WIRE_BYTES_RECEIVED%", "279"),
        ("%REQUEST_DURATION% %REQUEST_TX_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%", "0 1 2 3"),
        ("%DURATION% %DOWNSTREAM_HANDSHAKE_DURATION%", "6 -"),
        ("%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%", "5628"),
        ("%COMMON_DURATION(DS_RX_BEG:DS_TX_END)%", "5"),
        ("%COMMON_DURATION(DS_TX_END:DS_RX_BEG:ns)%", "-"),
        ("%START_TIME% %START_TIME(%s.%3f)%", "2026-11-21T08:50:12.810Z 1795251012.810"),
        ("%EMIT_TIME(%6f)%", "834720"),
        (
            "%PATH% %PATH(NQ)% %PATH(WQ:ORIG)% %PATH(NQ:PATH)% %PATH(WQ:PATH):3%",
            "/p/q?a=b /p/q /p/q?a=b /rwp/q /rw",
        ),
        ("%QUERY_PARAM(a)% %QUERY_PARAM(b c)% %QUERY_PARAM(plus)% %QUERY_PARAM(a):2%", "b/c&x 1 a+b b/"),
        ("%QUERY_PARAM(nv)%|%QUERY_PARAM(none)%", "|-"),
        ("%QUERY_PARAMS%", "a=b%2Fc%26x&d=%41&b%20c=1&plus=a+b&nv&e="),
        ("%QUERY_PARAMS(DECODED)% %QUERY_PARAMS:4%", "a=b/c&x&d=A&b%20c=1&plus=a+b&nv&e= a=b%"),
        ("%REQ(X-MULTI)% %REQ(nope?X-ONE):3% %REQ(nope)% %REQ(X-EMPTY)%", "1 abc - "),
        ("%REQ(HOST)% %REQUEST_HEADER(x-one)% %STREAM_INFO_REQ(x-one)%", "127.0.0.1:18901 abcdef abcdef"),
        ("%RESP(:status)% %RESPONSE_HEADER(nope)% %TRAILER(grpc-status)%", "404 - 14"),
        ("%RESPONSE_CODE_DETAILS% %RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)%", "via_upstream via upstream"),
        ("%GRPC_STATUS%", "-"),
        ("%ROUTE_NAME% %VIRTUAL_CLUSTER_NAME%", "rt -"),
        ("%STREAM_ID%", "be34505b-20ed-400f-8f49-70294db2fd4c"),
        ("%UPSTREAM_CLUSTER% %UPSTREAM_CLUSTER_RAW%", "altup up"),
        ("%UPSTREAM_HOST% %UPSTREAM_HOSTS_ATTEMPTED%", "127.0.0.1:19901 127.0.0.1:19901"),
        ("%UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT% %UPSTREAM_HOST_NAME%", "127.0.0.1 hn.example:99"),
        ("%UPSTREAM_HOST_NAME_WITHOUT_PORT% %UPSTREAM_HOST_NAMES_ATTEMPTED%", "hn.example hn.example:99"),
        ("%UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT%", "hn.example"),
        ("%UPSTREAM_LOCAL_ADDRESS% %UPSTREAM_LOCAL_PORT%", "127.0.0.1:59054 59054"),
        ("%UPSTREAM_REMOTE_ADDRESS% %UPSTREAM_REMOTE_PORT%", "127.0.0.1:19901 19901"),
        ("%UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID%|%UPSTREAM_PROTOCOL%", "|HTTP/1.1"),
        ("%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(8)%", "127.0.0.0/8"),
        ("%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_PORT%", "127.0.0.1:60452 60452"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "127.0.0.1"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(16)%", "127.0.0.0/16"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(33)%", "127.0.0.1/32"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(0)%", "0.0.0.0/0"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(a)%", "127.0.0.1"),
        ("%DOWNSTREAM_DIRECT_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_PORT%", "127.0.0.1:18901 18901"),
        ("%DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID%", ""),
        ("%DYNAMIC_METADATA(ns)%", r#"{"b":true,"k":"va\"lé","list":["a",2],"nul":null,"num":42}"#),
        ("%DYNAMIC_METADATA(ns:k)% %DYNAMIC_METADATA(ns:num)%", "va\"l\u{e9} 42"),
        ("%DYNAMIC_METADATA(ns:nul)% %DYNAMIC_METADATA(no)% %DYNAMIC_METADATA(ns):5%", "- - {\"b\":"),
        ("%UPSTREAM_METADATA(foo:bar)% %CLUSTER_METADATA(foo:bar)%", "baz baz"),
        (
            "%METADATA(ROUTE:foo:bar)% %METADATA(VIRTUAL_HOST:rns:rk)% %METADATA(CLUSTER:foo)%",
            "baz vhv {\"bar\":\"baz\"}",
        ),
        ("%METADATA(UPSTREAM_HOST:foo:bar)% %METADATA(DYNAMIC:ns:b)%", "baz true"),
        (
            "%FILTER_STATE(fsk)% %FILTER_STATE(fsk:PLAIN)% %FILTER_STATE(fsk:PLAIN):2%",
            "\"fs-value\" fs-value fs",
        ),
        ("%FILTER_STATE(fsk:FIELD:len)% %FILTER_STATE(no)%", "8 -"),
        ("%XFCC_VALUE(uri)% %XFCC_VALUE(By)% %XFCC_VALUE(hash)%", "spiffe://b spiffe://a -"),
        (
            r#"%COALESCE({"operators":["REQUESTED_SERVER_NAME",{"command":"REQ","param":"x-empty"},{"command":"REQ","param":"x-one","max_length":2}]})%"#,
            "ab",
        ),
        (r#"%COALESCE({"operators":["ROUTE_NAME"]}):1%"#, "r"),
        ("%REQUESTED_SERVER_NAME% %FILTER_CHAIN_NAME% %DOWNSTREAM_TLS_VERSION%", "- - -"),
        ("%ENVIRONMENT(SURELY_NOT_SET)%", "-"),
        ("100%% %%REQ%%", "100% %REQ%"),
        ("", ""),
    ] {
        assert_eq!(stream.text(format), expected, "{format}");
    }
}

#[test]
fn operators_of_a_request_that_never_connected() {
    let mut stream = proxied();
    stream.info.upstream.connection_id = None;
    stream.info.upstream.local_address = None;
    stream.info.upstream.transport_failure_reason = Some("delayed connect error: Connection refused".into());
    stream.request.set("content-type", "application/grpc+proto");
    stream.trailers.clear();
    stream.info.response_code = 503;
    for (format, expected) in [
        ("%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS% %UPSTREAM_HOSTS_ATTEMPTED%", "127.0.0.1:19901 - -"),
        ("%UPSTREAM_CONNECTION_ID% %UPSTREAM_LOCAL_ADDRESS%", "0 -"),
        ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", "delayed_connect_error:_Connection_refused"),
        ("%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS_NUMBER%", "Unavailable UNAVAILABLE 14"),
    ] {
        assert_eq!(stream.text(format), expected, "{format}");
    }
    let host = stream.info.upstream.host.clone().unwrap();
    stream.info.upstream.attempted = vec![host.clone(), host];
    assert_eq!(stream.text("%UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT%"), "127.0.0.1,127.0.0.1");
}

#[test]
fn operators_of_tls_and_other_addresses() {
    let mut stream = bare();
    let certificate = Certificate {
        subject: "CN=client".into(),
        uri_sans: vec!["spiffe://a".into(), "spiffe://b".into()],
        not_before: 0,
        not_after: 1_795_251_012,
        ..Certificate::default()
    };
    let tls = TlsInfo {
        version: "TLSv1.3",
        cipher: "TLS_AES_256_GCM_SHA384",
        peer: Some(Box::new(certificate)),
        ..TlsInfo::default()
    };
    let local = Address::Internal { listener: "inner".into(), endpoint_id: "e1".into() };
    let mut connection = ConnectionInfo::new(1, stream.info.start, local, ip("[2001:db8::1]:5"));
    connection.tls = Some(Arc::new(tls));
    connection.requested_server_name = Some("sni.example".into());
    *connection.termination_details.borrow_mut() = Some("why not".into());
    *connection.transport_failure_reason.borrow_mut() = Some("TLS error: x".into());
    let connection = Rc::new(connection);
    stream.info = StreamInfo::new(1, stream.info.start, stream.info.start_time, connection, None);
    for (format, expected) in [
        (
            "%DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER% %DOWNSTREAM_TLS_GROUP%",
            "TLSv1.3 TLS_AES_256_GCM_SHA384 -",
        ),
        ("%DOWNSTREAM_PEER_SUBJECT% %DOWNSTREAM_PEER_ISSUER%", "CN=client -"),
        ("%DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_LOCAL_URI_SAN%", "spiffe://a,spiffe://b -"),
        ("%DOWNSTREAM_PEER_CERT_V_START% %DOWNSTREAM_PEER_CERT_V_END(%Y)%", "1970-01-01T00:00:00.000Z 2026"),
        ("%UPSTREAM_PEER_SUBJECT% %UPSTREAM_PEER_CERT_V_END%", "- -"),
        ("%REQUESTED_SERVER_NAME% %PROTOCOL%", "sni.example -"),
        ("%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID%", "envoy://inner/e1 e1"),
        ("%DOWNSTREAM_LOCAL_PORT% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%", "- envoy://inner/e1"),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(32)%",
            "[2001:db8::1]:5 2001:db8::/32",
        ),
        ("%CONNECTION_TERMINATION_DETAILS%", "why not"),
        ("%DOWNSTREAM_TRANSPORT_FAILURE_REASON%", "TLS_error:_x"),
    ] {
        assert_eq!(stream.text(format), expected, "{format}");
    }
    let id = stream.text("%STREAM_ID%");
    assert_eq!((id.len(), &id[14..15], stream.text("%STREAM_ID%")), (36, "4", id.clone()));
    assert_ne!(stream.text("%UNIQUE_ID%"), stream.text("%UNIQUE_ID%"));
}

#[test]
fn errors_in_envoys_words() {
    for (format, expected) in [
        ("%", "Incorrect configuration: %. Couldn't find valid command at position 0"),
        ("a%b", "Incorrect configuration: a%b. Couldn't find valid command at position 1"),
        ("%REQ(a)%b)%", "Incorrect configuration: %REQ(a)%b)%. Couldn't find valid command at position 10"),
        ("%REQ(a\nb)%", "Incorrect configuration: %REQ(a\nb)%. Couldn't find valid command at position 0"),
        (
            "%REQ(a):99999999999999999999%",
            "Incorrect configuration: %REQ(a):99999999999999999999%. Couldn't find valid command at position 0",
        ),
        ("%REQ()%", "REQ requires parameters"),
        ("%REQ(a?b?c)%", "More than 1 alternative header specified in token: a?b?c"),
        ("%REQ(a)b)%", "Invalid header configuration. Format string contains invalid characters."),
        ("%NOPE%", "Not supported field in StreamInfo: NOPE"),
        ("%REQ_WITHOUT_QUERY(a)%", "Not supported field in StreamInfo: REQ_WITHOUT_QUERY"),
        ("%RESPONSE_CODE(a)%", "RESPONSE_CODE does not take any parameters or length"),
        ("%RESPONSE_CODE:3%", "RESPONSE_CODE does not take any parameters or length"),
        ("%START_TIME(%n)%", "Invalid header configuration. Format string contains newline."),
        ("%START_TIME():3%", "START_TIME does not allow length to be specified."),
        ("%COMMON_DURATION(a)%", "Invalid common duration configuration: a."),
        ("%COMMON_DURATION(DS_RX_BEG:DS_TX_END:s)%", "Invalid common duration precision: s."),
        (
            "%COMMON_DURATION(DS_RX_BEG:US_CX_BEG)%",
            "not supported in this version: %COMMON_DURATION(US_CX_BEG)%",
        ),
        ("%PATH(X)%", "Invalid PATH option: 'X', only 'WQ'/'NQ' are allowed"),
        ("%PATH(NQ:X)%", "Invalid PATH option: 'X', only 'ORIG'/'PATH'/'ORIG_OR_PATH' are allowed"),
        ("%QUERY_PARAMS(X)%", "Invalid QUERY_PARAMS option: 'X', only 'ORIG'/'DECODED' are allowed"),
        (
            "%GRPC_STATUS(X)%",
            "GrpcStatusFormatter only supports CAMEL_STRING, SNAKE_STRING or NUMBER. Got: X",
        ),
        ("%DYNAMIC_METADATA%", "DYNAMIC_METADATA requires parameters"),
        ("%METADATA(X:a)%", "X is not supported type of metadata"),
        ("%METADATA(LISTENER:a)%", "not supported in this version: %METADATA(LISTENER)%"),
        ("%FILTER_STATE(a:X)%", "Invalid filter state serialize type, only support PLAIN/TYPED/FIELD."),
        (
            "%FILTER_STATE(a:FIELD)%",
            "Invalid filter state serialize type, FIELD should be used with the field name.",
        ),
        ("%FILTER_STATE(:PLAIN)%", "Invalid filter state configuration, key cannot be empty."),
        ("%XFCC_VALUE%", "XFCC_VALUE command requires a subcommand"),
        ("%XFCC_VALUE(zz)%", "XFCC_VALUE command does not support subcommand: zz"),
        ("%COALESCE({})%", "COALESCE: JSON configuration must contain 'operators' array"),
        ("%COALESCE({\"operators\":[]})%", "COALESCE: 'operators' array must not be empty"),
        (
            "%COALESCE({\"operators\":[\"NOPE\"]})%",
            "COALESCE: failed to parse operator at index 0: unknown command: 'NOPE'",
        ),
        ("%CEL(request.path)%", "not supported in this version: %CEL%"),
        ("%TRACE_ID%", "not supported in this version: %TRACE_ID%"),
    ] {
        assert_eq!(Formatter::compile(format).unwrap_err().reason(), expected, "{format}");
    }
    assert!(Formatter::compile("%PROTOCOL()%").is_ok());
}

#[test]
fn literals_are_known() {
    assert_eq!(Formatter::compile("50%% off").unwrap().literal(), Some("50% off"));
    assert_eq!(Formatter::compile("").unwrap().literal(), Some(""));
    assert_eq!(Formatter::compile("%PROTOCOL%").unwrap().literal(), None);
}

fn string(text: &str) -> wkt::Value {
    wkt::Value { kind: Some(wkt::value::Kind::StringValue(text.into())) }
}

fn object(fields: impl IntoIterator<Item = (&'static str, wkt::Value)>) -> wkt::Struct {
    wkt::Struct { fields: fields.into_iter().map(|(key, value)| (key.into(), value)).collect() }
}

fn json_format(omit: bool) -> SubstitutionFormat {
    use wkt::value::Kind;
    let value = |kind| wkt::Value { kind: Some(kind) };
    let nested = object([
        ("a", string("%REQ(nope)%")),
        (
            "b",
            value(Kind::ListValue(wkt::ListValue {
                values: vec![string("%REQ(nope)%"), string("%RESPONSE_CODE%"), string("x")],
            })),
        ),
    ]);
    let empty = object([("a", string("%REQ(nope)%"))]);
    let format = object([
        ("code", string("%RESPONSE_CODE%")),
        ("Upper", string("100%%")),
        ("mixed", string("a%REQ(nope)%b%RESPONSE_CODE%")),
        ("none", string("%REQ(nope)%")),
        ("quote", string("%REQ(X-QUOTE)%")),
        ("pre", string("pre%REQ(X-QUOTE)%\u{e9}\"")),
        ("meta", string("%DYNAMIC_METADATA(ns):5%")),
        ("inside", string("x%DYNAMIC_METADATA(ns:list)%")),
        ("state", string("%FILTER_STATE(fsk)%")),
        ("e", string("")),
        ("n", value(Kind::StructValue(nested))),
        ("gone", value(Kind::StructValue(empty))),
        ("num", value(Kind::NumberValue(1.5))),
        ("bool", value(Kind::BoolValue(true))),
        ("nil", value(Kind::NullValue(0))),
    ]);
    let proto = core::SubstitutionFormatString {
        format: Some(core::substitution_format_string::Format::JsonFormat(format)),
        omit_empty_values: omit,
        ..Default::default()
    };
    SubstitutionFormat::compile(&proto).unwrap()
}

#[test]
fn json_keeps_types_and_sorts_keys() {
    let stream = proxied();
    let text = |format: &SubstitutionFormat| {
        let mut out = Vec::new();
        format.write(&stream.cx(), &mut out);
        String::from_utf8(out).unwrap()
    };
    let format = json_format(false);
    assert_eq!(format.content_type(), "application/json");
    assert_eq!(
        text(&format),
        concat!(
            r#"{"Upper":"100%","bool":true,"code":404,"e":"","gone":{"a":null},"inside":"x[\"a\",2]","#,
            r#""meta":{"b":true,"k":"va\"lé","list":["a",2],"nul":null,"num":42},"mixed":"a-b404","#,
            r#""n":{"a":null,"b":[null,404,"x"]},"nil":null,"none":null,"num":1.5,"#,
            r#""pre":"prea\u0022b\u005cc\u0009d\u00c3\u00a9/<>\u00ffé\"","#,
            r#""quote":"a\u0022b\u005cc\u0009d\u00c3\u00a9/<>\u00ff","state":"fs-value"}"#,
            "\n"
        )
    );
    assert_eq!(
        text(&json_format(true)),
        concat!(
            r#"{"Upper":"100%","bool":true,"code":404,"e":"","inside":"x[\"a\",2]","#,
            r#""meta":{"b":true,"k":"va\"lé","list":["a",2],"nul":null,"num":42},"mixed":"ab404","#,
            r#""n":{"b":[404,"x"]},"num":1.5,"#,
            r#""pre":"prea\u0022b\u005cc\u0009d\u00c3\u00a9/<>\u00ffé\"","#,
            r#""quote":"a\u0022b\u005cc\u0009d\u00c3\u00a9/<>\u00ff","state":"fs-value"}"#,
            "\n"
        )
    );
}

#[test]
#[expect(deprecated, reason = "text_format is still accepted")]
fn text_formats_and_their_extensions() {
    use core::substitution_format_string::Format;
    let compile = |format, formatters: Vec<&str>, content_type: &str| {
        SubstitutionFormat::compile(&core::SubstitutionFormatString {
            format,
            omit_empty_values: true,
            content_type: content_type.into(),
            formatters: formatters
                .into_iter()
                .map(|name| core::TypedExtensionConfig {
                    name: "x".into(),
                    typed_config: Some(wkt::Any {
                        type_url: format!("type.googleapis.com/envoy.extensions.formatter.{name}"),
                        value: Vec::new(),
                    }),
                })
                .collect(),
            json_format_options: None,
        })
    };
    let stream = proxied();
    let mut out = Vec::new();
    let source = core::DataSource {
        watched_directory: None,
        specifier: Some(core::data_source::Specifier::InlineString(
            "%REQ(nope)%%REQ_WITHOUT_QUERY(:path)%".into(),
        )),
    };
    let format = compile(
        Some(Format::TextFormatSource(source)),
        vec!["req_without_query.v3.ReqWithoutQuery", "metadata.v3.Metadata"],
        "text/html",
    );
    let format = format.unwrap();
    format.write(&stream.cx(), &mut out);
    assert_eq!((&*out, format.content_type()), (&b"/rwp/q"[..], "text/html"));
    let text = |text: &str| Some(Format::TextFormat(text.into()));
    assert_eq!(compile(text("a"), vec![], "").unwrap().content_type(), "text/plain");
    for (result, path) in [
        (compile(None, vec![], ""), "format"),
        (compile(text("%NOPE%"), vec![], ""), "text_format"),
        (compile(text("a"), vec!["cel.v3.Cel"], ""), "formatters[0].typed_config"),
        (compile(text("a"), vec![], "a\nb"), "content_type"),
        (
            compile(
                Some(Format::TextFormatSource(core::DataSource {
                    watched_directory: None,
                    specifier: Some(core::data_source::Specifier::Filename("/surely/not/there".into())),
                })),
                vec![],
                "",
            ),
            "text_format_source.filename",
        ),
        (
            compile(
                Some(Format::TextFormatSource(core::DataSource {
                    watched_directory: None,
                    specifier: Some(core::data_source::Specifier::InlineBytes(vec![0xff])),
                })),
                vec![],
                "",
            ),
            "text_format_source.inline_bytes",
        ),
    ] {
        assert_eq!(result.unwrap_err().path(), path);
    }
}

proptest! {
    #[test]
    fn any_text_compiles_or_is_an_error(
        text in "(%|%%|\\(|\\)|:[0-9]{0,3}|[A-Z_]{1,6}|REQ|START_TIME|COALESCE|\\{\"operators\":|\\[|\\]|\\}|.){0,24}"
    ) {
        if let Ok(formatter) = Formatter::compile(&text) {
            let mut out = Vec::new();
            formatter.write(&proxied().cx(), &mut out);
            if let Some(literal) = formatter.literal() {
                prop_assert_eq!(literal.as_bytes(), &*out);
            }
        }
    }

    #[test]
    fn times_never_panic(pattern in "(%[-_0E:*#]?[a-zA-Z0-9%]|.){0,8}", seconds in any::<i64>()) {
        let text = format!("%DOWNSTREAM_PEER_CERT_V_END({pattern})%");
        if let Ok(formatter) = Formatter::compile(&text) {
            let certificate = Certificate { not_after: seconds, ..Certificate::default() };
            let mut stream = bare();
            let mut connection =
                ConnectionInfo::new(1, stream.info.start, ip("127.0.0.1:1"), ip("127.0.0.1:2"));
            connection.tls = Some(Arc::new(TlsInfo { peer: Some(Box::new(certificate)), ..TlsInfo::default() }));
            stream.info.connection = Rc::new(connection);
            formatter.write(&stream.cx(), &mut Vec::new());
        }
    }
}
