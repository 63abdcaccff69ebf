//! The price of finding a route, by the size of the table and the place of the route in it.

use std::hint::black_box;
use std::rc::Rc;
use std::time::{Instant, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3::RegexMatcher;
use pb::route_match::PathSpecifier;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::CellTable;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::stream::StreamInfo;
use waystation_http::Headers;
use waystation_route::{CompileContext, Lookup, RouteTable};

fn path(kind: &str, index: usize) -> PathSpecifier {
    match (kind, index % 4) {
        ("exact", _) | ("mixed", 0) => PathSpecifier::Path(format!("/api/v1/service-{index:05}/method")),
        ("prefix", _) | ("mixed", 1) => PathSpecifier::Prefix(format!("/api/v1/service-{index:05}/")),
        ("mixed", 2) => PathSpecifier::PathSeparatedPrefix(format!("/api/v1/service-{index:05}")),
        _ => PathSpecifier::SafeRegex(RegexMatcher {
            regex: format!("/api/v1/service-{index:05}/[a-z]+"),
            engine_type: None,
        }),
    }
}

fn table(kind: &str, size: usize, spread_over_hosts: bool) -> RouteTable {
    let route = |index| pb::Route {
        r#match: Some(pb::RouteMatch { path_specifier: Some(path(kind, index)), ..Default::default() }),
        action: Some(pb::route::Action::DirectResponse(pb::DirectResponseAction {
            status: 200,
            ..Default::default()
        })),
        ..Default::default()
    };
    let host = |name: String, routes| pb::VirtualHost {
        domains: vec![name.clone()],
        name,
        routes,
        ..Default::default()
    };
    let virtual_hosts = if spread_over_hosts {
        (0..size).map(|index| host(format!("host-{index:05}.example"), vec![route(index)])).collect()
    } else {
        vec![host("host-00000.example".into(), (0..size).map(route).collect())]
    };
    let proto = pb::RouteConfiguration { virtual_hosts, ..Default::default() };
    let (clusters, runtime) = (CellTable::new(), Runtime::new());
    let cx = CompileContext {
        clusters: &clusters,
        runtime: &runtime,
        stats: waystation_stats::Store::default().root(),
        validate_clusters: false,
        filter_config: &|_, _| Ok(None),
    };
    RouteTable::compile(&proto, &cx).expect("the configuration is valid")
}

fn matching(criterion: &mut Criterion) {
    let address = |text: &str| Address::Ip(text.parse().expect("an address"));
    let now = Instant::now();
    let connection = ConnectionInfo::new(1, now, address("127.0.0.1:80"), address("127.0.0.1:81"));
    let info = StreamInfo::new(1, now, SystemTime::UNIX_EPOCH, Rc::new(connection), None);
    for kind in ["exact", "prefix", "mixed", "hosts"] {
        for size in [10, 10_000] {
            let hosts = kind == "hosts";
            let table = table(if hosts { "prefix" } else { kind }, size, hosts);
            // The last of the same kind as the first.
            for (place, index) in [("first", 0), ("last", (size - 1) / 4 * 4)] {
                let host = format!("host-{:05}.example", if hosts { index } else { 0 });
                let path = format!("/api/v1/service-{index:05}/method");
                let head =
                    [(":method", "GET"), (":scheme", "http"), (":authority", &*host), (":path", &*path)];
                let headers: Headers = head.into_iter().collect();
                assert!(
                    matches!(table.find(&headers, &info, 0), Lookup::Route(found, _) if found == index as u32)
                );
                criterion.bench_function(&format!("{kind}/{size}/{place}"), |bencher| {
                    bencher.iter(|| black_box(table.find(black_box(&headers), &info, 0)));
                });
            }
        }
    }
}

fn compiling(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compile");
    group.sample_size(10);
    for kind in ["prefix", "mixed"] {
        group.bench_function(format!("{kind}/10000"), |bencher| bencher.iter(|| table(kind, 10_000, false)));
    }
}

criterion_group!(benches, matching, compiling);
criterion_main!(benches);
