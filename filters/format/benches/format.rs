//! The default access log line, and header mutation.

use std::hint::black_box;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::stream::{HostView, Protocol, StreamInfo};
use waystation_filter_api::value::Metadata;
use waystation_format::{AccessLogType, FormatContext, Formatter, HeaderMutations};
use waystation_http::Headers;

#[derive(Debug)]
struct Host(Address);

impl HostView for Host {
    fn address(&self) -> &Address {
        &self.0
    }
    fn hostname(&self) -> &str {
        ""
    }
    fn metadata(&self) -> Option<&Metadata> {
        None
    }
}

fn address(text: &str) -> Address {
    let address: SocketAddr = text.parse().expect("a literal address");
    Address::Ip(address)
}

fn bench(c: &mut Criterion) {
    let start = Instant::now();
    let connection = ConnectionInfo::new(1, start, address("10.0.0.1:80"), address("10.0.0.2:40000"));
    let mut info = StreamInfo::new(1, start, SystemTime::now(), Rc::new(connection), Some(Protocol::Http11));
    info.response_code = 200;
    info.bytes.body_sent = 5067;
    info.timing.complete = Some(start + Duration::from_millis(12));
    info.upstream.host = Some(Rc::new(Host(address("10.1.2.3:8080"))));
    let request: Headers = [
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "shop.example"),
        (":path", "/api/v1/items?page=2"),
        ("user-agent", "curl/7.88.1"),
        ("accept", "*/*"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-proto", "http"),
        ("x-request-id", "be34505b-20ed-400f-8f49-70294db2fd4c"),
    ]
    .into_iter()
    .collect();
    let response: Headers =
        [(":status", "200"), ("x-envoy-upstream-service-time", "11")].into_iter().collect();
    let cx = FormatContext {
        request: Some(&request),
        response: Some(&response),
        trailers: None,
        info: &info,
        local_reply_body: "",
        log_type: AccessLogType::DownstreamEnd,
        now: start,
    };

    let formatter = Formatter::default_line();
    let mut out = Vec::with_capacity(512);
    c.bench_function("default line", |b| {
        b.iter(|| {
            out.clear();
            formatter.write(black_box(&cx), &mut out);
            black_box(out.len())
        });
    });

    let option = HeaderValueOption {
        header: Some(HeaderValue { key: "x-added".into(), value: "a literal".into(), ..Default::default() }),
        append_action: 2,
        ..Default::default()
    };
    let mutations = HeaderMutations::compile(&[option], &[]).expect("a valid mutation");
    let mut headers = request.clone();
    let cx = FormatContext { request: None, ..cx };
    c.bench_function("literal header overwritten", |b| {
        b.iter(|| mutations.apply_to_request(black_box(&mut headers), &cx));
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
