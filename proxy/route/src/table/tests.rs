use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::google::protobuf as wkt;
use pb::header_matcher::HeaderMatchSpecifier;
use pb::route_match::PathSpecifier;
use proptest::prelude::*;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::CellTable;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::http::FilterConfig;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::stream::{RouteView, StreamInfo};
use waystation_http::Headers;
use waystation_schema::ConfigError;

use super::{CompileContext, FilterConfigCompiler, Lookup, Request, Route, RouteTable};
use crate::{Action, AddedHosts, HashPolicy, RouteAction, timeouts, tls_redirect_location};

fn info() -> StreamInfo {
    let address = |text: &str| Address::Ip(text.parse().unwrap());
    let now = Instant::now();
    let connection = ConnectionInfo::new(1, now, address("127.0.0.1:47847"), address("127.0.0.1:45360"));
    StreamInfo::new(1, now, SystemTime::UNIX_EPOCH, Rc::new(connection), None)
}

fn compile(proto: &pb::RouteConfiguration) -> Result<RouteTable, ConfigError> {
    let (clusters, runtime) = (CellTable::new(), Runtime::new());
    RouteTable::compile(proto, &context(&clusters, &runtime))
}

fn context<'a>(clusters: &'a CellTable<crate::Cluster>, runtime: &'a Runtime) -> CompileContext<'a> {
    // A filter's configuration is its bytes; nobody knows the type `unknown`.
    let filter_config: &FilterConfigCompiler<'_> =
        &|_, any| Ok((any.type_url != "unknown").then(|| Arc::new(any.value.to_vec()) as FilterConfig));
    let stats = waystation_stats::Store::default().root();
    CompileContext { clusters, runtime, stats, validate_clusters: false, filter_config }
}

fn config(virtual_hosts: Vec<pb::VirtualHost>) -> pb::RouteConfiguration {
    pb::RouteConfiguration { name: "r".into(), virtual_hosts, ..Default::default() }
}

fn host(name: &str, domains: &[&str], routes: Vec<pb::Route>) -> pb::VirtualHost {
    pb::VirtualHost {
        name: name.into(),
        domains: domains.iter().map(|domain| (*domain).into()).collect(),
        routes,
        ..Default::default()
    }
}

fn route(path: PathSpecifier, action: pb::route::Action) -> pb::Route {
    pb::Route {
        r#match: Some(pb::RouteMatch { path_specifier: Some(path), ..Default::default() }),
        action: Some(action),
        ..Default::default()
    }
}

fn prefix(text: &str) -> PathSpecifier {
    PathSpecifier::Prefix(text.into())
}

fn regex(text: &str) -> matcher::RegexMatcher {
    matcher::RegexMatcher { regex: text.into(), engine_type: None }
}

fn substitution(pattern: &str, substitution: &str) -> matcher::RegexMatchAndSubstitute {
    matcher::RegexMatchAndSubstitute { pattern: Some(regex(pattern)), substitution: substitution.into() }
}

fn status(status: u32) -> pb::route::Action {
    pb::route::Action::DirectResponse(pb::DirectResponseAction { status, ..Default::default() })
}

fn forward(action: pb::RouteAction) -> pb::route::Action {
    let cluster = pb::route_action::ClusterSpecifier::Cluster("c".into());
    let cluster_specifier = action.cluster_specifier.clone().or(Some(cluster));
    pb::route::Action::Route(pb::RouteAction { cluster_specifier, ..action })
}

fn request(host: &str, path: &str, more: &[(&str, &str)]) -> Headers {
    let head = [(":method", "GET"), (":scheme", "http"), (":authority", host), (":path", path)];
    head.into_iter().chain([("x-forwarded-proto", "http")]).chain(more.iter().copied()).collect()
}

/// The status of the direct response that a request is routed to, or 404.
fn answer(table: &RouteTable, headers: &Headers) -> u16 {
    match table.find(headers, &info(), 0) {
        Lookup::Route(_, Route { action: Action::DirectResponse(response), .. }) => response.status,
        _ => 404,
    }
}

fn find<'a>(table: &'a RouteTable, headers: &Headers) -> &'a Route {
    match table.find(headers, &info(), 0) {
        Lookup::Route(_, route) => route,
        other => panic!("no route: {other:?}"),
    }
}

fn action(route: &Route) -> &RouteAction {
    match &route.action {
        Action::Route(action) => action,
        other => panic!("not a route action: {other:?}"),
    }
}

/// Tables are published to every worker.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<RouteTable>();
};

/// Choices that Envoy 1.40 made when it was asked.
#[test]
fn virtual_hosts_by_domain() {
    let domains = [
        &["*"][..],
        &["*.b.suf.com"],
        &["*.suf.com"],
        &["*-x.suf.com"],
        &["pre.*"],
        &["pre.a.*"],
        &["exact:80"],
    ];
    let hosts = domains.iter().zip(200..);
    let hosts =
        hosts.map(|(domains, code)| host(domains[0], domains, vec![route(prefix("/"), status(code))]));
    let table = compile(&config(hosts.collect())).unwrap();
    for (name, expected) in [
        ("x.suf.com", 202),
        (".suf.com", 200),
        ("suf.com", 200),
        ("y.b.suf.com", 201),
        ("a-x.suf.com", 203),
        ("-x.suf.com", 202),
        ("pre.q", 204),
        ("pre.", 200),
        ("pre.a.b", 205),
        ("pre.a.", 204),
        ("PRE.A.B", 205),
        ("pre.suf.com", 202),
        ("x.suf.com:80", 200),
        ("EXACT:80", 206),
        ("exact", 200),
        ("", 200),
    ] {
        assert_eq!(answer(&table, &request(name, "/", &[])), expected, "{name}");
    }
}

#[test]
fn ports_parameters_and_another_header_for_the_host() {
    let routes = || vec![route(PathSpecifier::Path("/a".into()), status(200))];
    let proto = pb::RouteConfiguration {
        ignore_port_in_host_matching: true,
        ignore_path_parameters_in_path_matching: true,
        ..config(vec![host("v", &["a", "[::1]"], routes())])
    };
    let table = compile(&proto).unwrap();
    for (name, path, expected) in
        [("a:1", "/a", 200), ("[::1]:2", "/a", 200), ("[::1]", "/a;x=1?q", 200), ("b:1", "/a", 404)]
    {
        assert_eq!(answer(&table, &request(name, path, &[])), expected, "{name}{path}");
    }
    let proto =
        pb::RouteConfiguration { vhost_header: "x-host".into(), ..config(vec![host("v", &["a"], routes())]) };
    let table = compile(&proto).unwrap();
    assert_eq!(answer(&table, &request("b", "/a", &[("x-host", "a")])), 200);
    assert_eq!(answer(&table, &request("a", "/a", &[])), 404);
}

#[test]
fn domains_stand_once() {
    for (domains, reason) in [
        (["x", "X"], "Only unique values for domains are permitted. Duplicate entry of domain x in route r"),
        (["*", "*"], "Only a single wildcard domain is permitted in route r"),
        (
            ["*.x", "*.x"],
            "Only unique values for domains are permitted. Duplicate entry of domain *.x in route r",
        ),
    ] {
        let error =
            compile(&config(vec![host("a", &domains[..1], vec![]), host("b", &domains[1..], vec![])]));
        assert_eq!(error.unwrap_err().reason(), reason);
    }
}

#[test]
fn conditions_besides_the_path() {
    let query = |name: &str| pb::QueryParameterMatcher { name: name.into(), ..Default::default() };
    let with = |change: &dyn Fn(&mut pb::RouteMatch), code| {
        let mut route = route(prefix("/"), status(code));
        change(route.r#match.as_mut().unwrap());
        route
    };
    let never = core::RuntimeFractionalPercent {
        default_value: Some(Default::default()),
        runtime_key: String::new(),
    };
    let tls = pb::route_match::TlsContextMatchOptions { presented: bool_value(true), validated: None };
    let routes = vec![
        with(&|proto| proto.runtime_fraction = Some(never.clone()), 200),
        with(&|proto| proto.tls_context = Some(tls), 201),
        with(&|proto| proto.grpc = Some(Default::default()), 202),
        with(&|proto| proto.query_parameters = vec![query("q")], 203),
        with(
            &|proto| proto.headers = vec![pb::HeaderMatcher { name: "x".into(), ..Default::default() }],
            204,
        ),
        route(PathSpecifier::ConnectMatcher(Default::default()), status(205)),
        route(prefix("/"), status(206)),
    ];
    let table = compile(&config(vec![host("v", &["*"], routes)])).unwrap();
    let get = |path: &str, more: &[(&str, &str)]| answer(&table, &request("a", path, more));
    assert_eq!(get("/", &[]), 206);
    assert_eq!(get("/?q", &[]), 203);
    assert_eq!(get("/", &[("x", "1")]), 204);
    assert_eq!(get("/", &[("content-type", "application/grpc+proto")]), 202);
    assert_eq!(get("/", &[("content-type", "application/grpc-web")]), 206);
    let connect: Headers = [(":method", "CONNECT"), (":authority", "a:1")].into_iter().collect();
    assert_eq!(answer(&table, &connect), 205);
}

#[test]
fn tls_is_required_before_a_route_is_looked_for() {
    let mut all = host("all", &["all"], vec![]);
    all.set_require_tls(pb::virtual_host::TlsRequirementType::All);
    let mut external = host("external", &["external"], vec![route(prefix("/"), status(200))]);
    external.set_require_tls(pb::virtual_host::TlsRequirementType::ExternalOnly);
    let table = compile(&config(vec![all, external])).unwrap();
    let headers = request("all", "/x?y", &[]);
    assert!(matches!(table.find(&headers, &info(), 0), Lookup::TlsRedirect(_)));
    assert_eq!(tls_redirect_location(&headers), b"https://all/x?y");
    assert!(matches!(table.find(&request("external", "/", &[]), &info(), 0), Lookup::TlsRedirect(_)));
    assert_eq!(answer(&table, &request("external", "/", &[("x-envoy-internal", "true")])), 200);
}

/// What Envoy 1.40 sent upstream.
#[test]
fn rewrites() {
    let r = |path, action| route(path, forward(action));
    let rewrite = |text: &str| pb::RouteAction { prefix_rewrite: text.into(), ..Default::default() };
    let host_rewrite = |specifier| pb::RouteAction {
        host_rewrite_specifier: Some(specifier),
        append_x_forwarded_host: true,
        ..Default::default()
    };
    use pb::route_action::HostRewriteSpecifier::{
        HostRewriteHeader, HostRewriteLiteral, HostRewritePathRegex,
    };
    let routes = vec![
        r(PathSpecifier::Path("/exact".into()), rewrite("/new")),
        r(prefix("/pre"), rewrite("/new")),
        r(PathSpecifier::SafeRegex(regex("/rx/.*")), rewrite("/new")),
        r(PathSpecifier::PathSeparatedPrefix("/sep".into()), rewrite("/new")),
        r(
            prefix("/rr"),
            pb::RouteAction { regex_rewrite: Some(substitution("r", r"\0Q")), ..Default::default() },
        ),
        r(prefix("/hrp"), host_rewrite(HostRewritePathRegex(substitution("^/(.+)/.+$", r"\1")))),
        r(prefix("/hh"), host_rewrite(HostRewriteHeader("y".into()))),
        r(prefix("/hl"), host_rewrite(HostRewriteLiteral("lit".into()))),
    ];
    let table = compile(&config(vec![host("v", &["*"], routes)])).unwrap();
    for (path, more, new_path, new_host) in [
        ("/exact?q=1", &[][..], "/new?q=1", "p"),
        ("/prefix/x?q=1", &[], "/newfix/x?q=1", "p"),
        ("/rx/a/b?q=1", &[], "/new?q=1", "p"),
        ("/sep?x", &[], "/new?x", "p"),
        ("/sep/x?y", &[], "/new/x?y", "p"),
        ("/rr/rr?rr=1", &[], "/rQrQ/rQrQ?rr=1", "p"),
        ("/hrp/x", &[], "/hrp/x", "hrp"),
        ("/hh", &[("y", "V")], "/hh", "V"),
        ("/hh", &[], "/hh", "p"),
        ("/hl", &[("x-forwarded-host", "z")], "/hl", "lit"),
    ] {
        let mut headers = request("p", path, more);
        find(&table, &headers.clone()).rewrite(&mut headers, None, &info(), Instant::now(), true);
        assert_eq!(
            (headers.get_str(":path"), headers.get_str(":authority")),
            (Some(new_path), Some(new_host))
        );
        let original = |name| headers.get_str(name).map(str::to_owned);
        assert_eq!(original("x-envoy-original-path"), (new_path != path).then(|| path.into()), "{path}");
        assert_eq!(original("x-envoy-original-host"), (new_host != "p").then(|| "p".into()), "{path}");
        if path == "/hl" {
            assert_eq!(headers.get_str("x-forwarded-host"), Some("z,p"));
        }
    }
    let headers = request("p", "/sepx", &[]);
    assert!(matches!(table.find(&headers, &info(), 0), Lookup::NoRoute(_)));
}

/// Locations that Envoy 1.40 gave.
#[test]
fn redirects() {
    use pb::redirect_action::PathRewriteSpecifier::{PathRedirect, PrefixRewrite, RegexRewrite};
    use pb::redirect_action::SchemeRewriteSpecifier::{HttpsRedirect, SchemeRedirect};
    let r = |path, redirect| route(prefix(path), pb::route::Action::Redirect(redirect));
    let scheme = |scheme| pb::RedirectAction { scheme_rewrite_specifier: Some(scheme), ..Default::default() };
    let path = |path, strip_query| pb::RedirectAction {
        path_rewrite_specifier: Some(path),
        strip_query,
        ..Default::default()
    };
    let routes = vec![
        r("/https", scheme(HttpsRedirect(true))),
        r("/scheme", scheme(SchemeRedirect("ftp".into()))),
        r("/port", pb::RedirectAction { port_redirect: 8443, ..Default::default() }),
        r("/host", pb::RedirectAction { host_redirect: "new:1".into(), ..Default::default() }),
        r("/path", path(PathRedirect("/n".into()), false)),
        r("/pq", path(PathRedirect("/n?a=1".into()), true)),
        r("/strip", path(PathRedirect("/n".into()), true)),
        r("/pfx", path(PrefixRewrite("/n".into()), true)),
        r("/pf2", path(PrefixRewrite("/n".into()), false)),
        r("/rgx", path(RegexRewrite(substitution("g", "_")), false)),
        r("/none", pb::RedirectAction { response_code: 1, ..Default::default() }),
    ];
    let table = compile(&config(vec![host("v", &["*"], routes)])).unwrap();
    for (name, path, proto, location) in [
        ("r", "/https?q", "http", "https://r/https?q"),
        ("r:80", "/https", "http", "https://r/https"),
        ("r:80", "/https", "https", "https://r:80/https"),
        ("r:443", "/https", "http", "https://r:443/https"),
        ("r:443", "/scheme", "https", "ftp://r/scheme"),
        ("[::1]:80", "/scheme", "http", "ftp://[::1]/scheme"),
        ("[::1]:80", "/port", "http", "http://[::1]:8443/port"),
        ("r:8080", "/port", "http", "http://r:8443/port"),
        ("r:80", "/none?q", "http", "http://r:80/none?q"),
        ("r", "/host", "http", "http://new:1/host"),
        ("r", "/path?q=1", "http", "http://r/n?q=1"),
        ("r", "/pq?q=1", "http", "http://r/n?a=1"),
        ("r", "/strip?q=1", "http", "http://r/n"),
        ("r", "/pfx/a?q=1", "http", "http://r/n/a"),
        ("r", "/pf2/a?q=1", "http", "http://r/n/a?q=1"),
        ("r", "/rgx/g?g", "http", "http://r/r_x/_?g"),
    ] {
        let mut headers = request(name, path, &[]);
        headers.set("x-forwarded-proto", proto);
        let (status, found) = find(&table, &headers).redirect(&headers, &info(), Instant::now()).unwrap();
        assert_eq!(str::from_utf8(&found), Ok(location));
        assert_eq!(status, if path.starts_with("/none") { 302 } else { 301 });
    }
}

fn seconds(seconds: i64) -> Option<wkt::Duration> {
    Some(wkt::Duration { seconds, nanos: 0 })
}

/// `x-envoy-expected-rq-timeout-ms` and `grpc-timeout` as Envoy 1.40 sent them.
#[test]
#[expect(deprecated, reason = "the old gRPC timeout fields still count")]
fn timeouts_with_headers() {
    let retry = |per_try| pb::RetryPolicy { per_try_timeout: seconds(per_try), ..Default::default() };
    let legacy = || pb::RouteAction {
        max_grpc_timeout: seconds(2),
        grpc_timeout_offset: Some(wkt::Duration { seconds: 0, nanos: 100_000_000 }),
        ..Default::default()
    };
    let plain = pb::RouteAction::default;
    let grpc = |timeout: &'static str| vec![("content-type", "application/grpc"), ("grpc-timeout", timeout)];
    let options = timeouts::RouterOptions { insert_expected_timeout: true, respect_expected_timeout: false };
    for (action_proto, more, global, per_try, expected, grpc_timeout) in [
        (plain(), vec![], 15_000, 0, Some("15000"), None),
        (plain(), vec![("x-envoy-upstream-rq-timeout-ms", "500")], 500, 0, Some("500"), None),
        (plain(), vec![("x-envoy-upstream-rq-per-try-timeout-ms", "500")], 15_000, 500, Some("500"), None),
        (plain(), vec![("x-envoy-upstream-rq-timeout-ms", "x")], 15_000, 0, Some("15000"), None),
        (
            pb::RouteAction { timeout: seconds(5), retry_policy: Some(retry(5)), ..plain() },
            vec![],
            5000,
            0,
            Some("5000"),
            None,
        ),
        (
            pb::RouteAction { timeout: seconds(0), retry_policy: Some(retry(5)), ..plain() },
            vec![],
            0,
            5000,
            Some("5000"),
            None,
        ),
        (pb::RouteAction { timeout: seconds(0), ..plain() }, vec![], 0, 0, None, None),
        (
            pb::RouteAction { timeout: seconds(4), max_stream_duration: Some(Default::default()), ..plain() },
            vec![],
            0,
            0,
            None,
            None,
        ),
        (legacy(), grpc("1S"), 900, 0, Some("900"), Some("900m")),
        (legacy(), grpc("50m"), 50, 0, Some("50"), Some("50m")),
        (legacy(), grpc("0S"), 2000, 0, Some("2000"), Some("2000m")),
        (legacy(), grpc("5S"), 2000, 0, Some("2000"), Some("2000m")),
    ] {
        let proto = config(vec![host("v", &["*"], vec![route(prefix("/"), forward(action_proto))])]);
        let table = compile(&proto).unwrap();
        let mut headers = request("a", "/", &more);
        let found = timeouts::resolve(action(find(&table, &headers.clone())), &mut headers, options);
        assert_eq!(found.global, Duration::from_millis(global), "{more:?}");
        assert_eq!(found.per_try, Duration::from_millis(per_try), "{more:?}");
        assert_eq!(headers.get_str("x-envoy-expected-rq-timeout-ms"), expected, "{more:?}");
        assert_eq!(headers.get_str("grpc-timeout"), grpc_timeout, "{more:?}");
        assert!(!headers.contains("x-envoy-upstream-rq-timeout-ms"));
    }
}

#[test]
fn stream_durations() {
    let duration = |max, header_max| pb::route_action::MaxStreamDuration {
        max_stream_duration: max,
        grpc_timeout_header_max: header_max,
        grpc_timeout_header_offset: Some(wkt::Duration { seconds: 0, nanos: 100_000_000 }),
    };
    let grpc = ("content-type", "application/grpc");
    for (proto, more, connection_manager, max, tells_upstream) in [
        (duration(None, seconds(2)), vec![grpc, ("grpc-timeout", "1S")], None, Some(900), true),
        (duration(None, seconds(2)), vec![grpc, ("grpc-timeout", "5S")], None, Some(1900), true),
        (duration(None, seconds(2)), vec![grpc, ("grpc-timeout", "50m")], None, Some(0), true),
        (
            duration(None, seconds(2)),
            vec![grpc, ("grpc-timeout", "100000000S")],
            Some(7000),
            Some(7000),
            true,
        ),
        (duration(seconds(9), None), vec![grpc, ("grpc-timeout", "3S")], Some(7000), Some(9000), true),
        (duration(seconds(9), None), vec![], None, Some(9000), false),
        (duration(seconds(0), None), vec![], Some(7000), None, false),
        (duration(None, None), vec![], None, None, false),
    ] {
        let action_proto = pb::RouteAction { max_stream_duration: Some(proto), ..Default::default() };
        let table =
            compile(&config(vec![host("v", &["*"], vec![route(prefix("/"), forward(action_proto))])]))
                .unwrap();
        let headers = request("a", "/", &more);
        let connection_manager = connection_manager.map(Duration::from_millis);
        let found = timeouts::stream_duration(action(find(&table, &headers)), &headers, connection_manager);
        assert_eq!(found.max, max.map(Duration::from_millis), "{more:?}");
        assert_eq!(found.tells_upstream, tells_upstream, "{more:?}");
    }
}

#[test]
fn weighted_clusters_by_header_and_random_value() {
    let weight = |name: &str, weight| pb::weighted_cluster::ClusterWeight {
        name: name.into(),
        weight: Some(wkt::UInt32Value { value: weight }),
        typed_per_filter_config: [("f".to_owned(), any("", name))].into(),
        ..Default::default()
    };
    let weighted = pb::WeightedCluster {
        clusters: vec![weight("one", 1), weight("two", 2), weight("zero", 0)],
        random_value_specifier: Some(pb::weighted_cluster::RandomValueSpecifier::HeaderName("rnd".into())),
        ..Default::default()
    };
    let specifier = pb::route_action::ClusterSpecifier::WeightedClusters(weighted);
    let proto = forward(pb::RouteAction { cluster_specifier: Some(specifier), ..Default::default() });
    let mut proto = route(prefix("/"), proto);
    proto.typed_per_filter_config = [("f".to_owned(), any("", "route"))].into();
    let table = compile(&config(vec![host("v", &["*"], vec![proto])])).unwrap();
    let slot = table.filter_slot("f").unwrap();
    for (more, random, expected) in [
        (vec![("rnd", "0")], 9, "one"),
        (vec![("rnd", "1")], 9, "two"),
        (vec![("rnd", "2")], 9, "two"),
        (vec![("rnd", "3")], 9, "one"),
        (vec![("rnd", "x")], 3, "one"),
        (vec![("rnd", "0"), ("rnd", "0")], 5, "two"),
        (vec![], 4, "two"),
    ] {
        let headers = request("a", "/", &more);
        let route = find(&table, &headers);
        let target = action(route).target(&headers, random, || None);
        let crate::ClusterRef::Cell(cell) = target.cluster else { panic!("a cell") };
        assert_eq!(cell.name(), expected, "{more:?} {random}");
        let levels = route.filter_config(target.weighted, slot);
        let configs: Vec<_> =
            levels.configs.iter().map(|config| config.downcast_ref::<Vec<u8>>().unwrap()).collect();
        assert_eq!(configs, [expected.as_bytes(), b"route"]);
    }
}

fn bool_value(value: bool) -> Option<wkt::BoolValue> {
    Some(wkt::BoolValue { value })
}

fn any(type_url: &str, value: &str) -> wkt::Any {
    wkt::Any { type_url: type_url.into(), value: value.as_bytes().to_vec() }
}

#[test]
fn filter_configuration_by_level() {
    use prost::Message;
    let wrap = |wrapper: pb::FilterConfig| wkt::Any {
        type_url: "type.googleapis.com/envoy.config.route.v3.FilterConfig".into(),
        value: wrapper.encode_to_vec(),
    };
    let disabled = wrap(pb::FilterConfig { disabled: true, ..Default::default() });
    let optional =
        wrap(pb::FilterConfig { config: Some(any("unknown", "")), is_optional: true, disabled: false });
    let mut special = route(prefix("/special"), status(200));
    special.typed_per_filter_config =
        [("a".to_owned(), any("", "route")), ("b".to_owned(), any("", "on"))].into();
    let mut vhost = host("v", &["*"], vec![special, route(prefix("/"), status(200))]);
    vhost.typed_per_filter_config =
        [("a".to_owned(), any("", "vhost")), ("b".to_owned(), disabled), ("c".to_owned(), optional)].into();
    let mut proto = config(vec![vhost]);
    proto.typed_per_filter_config = [("a".to_owned(), any("", "table"))].into();
    let table = compile(&proto).unwrap();
    let texts = |path, filter| {
        let slot = table.filter_slot(filter).unwrap();
        let levels = find(&table, &request("a", path, &[])).filter_config(None, slot);
        let configs = levels.configs.iter().map(|config| config.downcast_ref::<Vec<u8>>().unwrap().clone());
        (configs.map(|bytes| String::from_utf8(bytes).unwrap()).collect::<Vec<_>>(), levels.disabled)
    };
    assert_eq!(texts("/special", "a"), (vec!["route".into(), "vhost".into(), "table".into()], Some(false)));
    assert_eq!(texts("/", "a"), (vec!["vhost".into(), "table".into()], Some(false)));
    assert_eq!(texts("/special", "b"), (vec!["on".into()], Some(false)), "the route enables it again");
    assert_eq!(texts("/", "b"), (vec![], Some(true)));
    assert!(table.filter_slot("c").is_none(), "optional and unknown");
    let mut vhost = host("v", &["*"], vec![]);
    vhost.typed_per_filter_config = [("c".to_owned(), any("unknown", ""))].into();
    let error = compile(&config(vec![vhost])).unwrap_err();
    assert_eq!(error.path(), "virtual_hosts[v].typed_per_filter_config[c]");
}

/// The cookie is the one that Envoy 1.40 made for these addresses.
#[test]
fn hashes_and_the_cookies_they_make() {
    use pb::route_action::hash_policy::{Cookie, CookieAttribute, Header, PolicySpecifier};
    let attribute = |name: &str, value: &str| CookieAttribute { name: name.into(), value: value.into() };
    let cookie = PolicySpecifier::Cookie(Cookie {
        name: "k".into(),
        ttl: seconds(10),
        path: "/p".into(),
        attributes: vec![attribute("SameSite", "Strict"), attribute("Secure", "")],
    });
    let header = PolicySpecifier::Header(Header { header_name: "x".into(), regex_rewrite: None });
    let policy =
        |specifier, terminal| pb::route_action::HashPolicy { terminal, policy_specifier: Some(specifier) };
    let compile = |protos: &[pb::route_action::HashPolicy]| -> Vec<HashPolicy> {
        protos.iter().map(|proto| HashPolicy::compile(proto).unwrap().unwrap()).collect()
    };
    let mut cookies = Vec::new();
    let policies = compile(&[policy(header.clone(), true), policy(cookie, false)]);
    let hash = HashPolicy::hash(&policies, &request("a", "/", &[]), &info(), &mut cookies);
    assert_eq!(cookies, ["k=\"308b9ca8ead5effd\"; Max-Age=10; Path=/p; SameSite=Strict; Secure; HttpOnly"]);
    assert_eq!(hash, Some(xxhash_rust::xxh64::xxh64(b"308b9ca8ead5effd", 0)));
    let with = |values: &[(&str, &str)], policies: &[HashPolicy]| {
        HashPolicy::hash(policies, &request("a", "/", values), &info(), &mut Vec::new())
    };
    let one = with(&[("x", "v")], &policies).unwrap();
    assert_eq!(one, xxhash_rust::xxh64::xxh64(b"v", 0), "terminal");
    let twice = compile(&[policy(header.clone(), false), policy(header, false)]);
    assert_eq!(with(&[("x", "v")], &twice), Some(one.rotate_left(1) ^ one));
    assert_eq!(with(&[("x", "b"), ("x", "a")], &policies), Some(xxhash_rust::xxh64::xxh64(b"ab", 0)));
}

#[test]
fn virtual_hosts_come_and_go() {
    let proto = pb::RouteConfiguration {
        vhds: Some(Default::default()),
        ..config(vec![host(
            "a",
            &["a"],
            vec![route(prefix("/"), status(200)), route(prefix("/"), status(201))],
        )])
    };
    let (clusters, runtime) = (CellTable::new(), Runtime::new());
    let cx = context(&clusters, &runtime);
    let table = RouteTable::compile(&proto, &cx).unwrap();
    assert!(matches!(
        table.find(&request("b", "/", &[]), &info(), 0),
        Lookup::NoVirtualHost { on_demand: true }
    ));
    let table = Arc::new(table);
    let mut named = route(prefix("/"), status(202));
    named.name = "named".into();
    // A name stands for nothing: the table's own host of it stays.
    let (a, b) = (host("a", &["c"], vec![route(prefix("/"), status(203))]), host("b", &["b"], vec![named]));
    let mut added = AddedHosts::new(Arc::clone(&table));
    let grown = added.update(vec![("rc/b".into(), &b), ("rc/c".into(), &a)], &[], &cx, |_| Ok(())).unwrap();
    let Lookup::Route(index, _) = grown.find(&request("b", "/", &[]), &info(), 0) else { panic!("a route") };
    assert_eq!((grown.route_name(index), grown.virtual_host_name(index)), ("named", "b"));
    assert_eq!(["a", "b", "c"].map(|host| answer(&grown, &request(host, "/", &[]))), [200, 202, 203]);
    // What is refused changes nothing.
    let taken = host("d", &["b"], Vec::new());
    assert!(added.update(vec![("rc/d".into(), &taken)], &["rc/c".into()], &cx, |_| Ok(())).is_err());
    let refused = added.update(vec![("rc/b".into(), &a)], &[], &cx, |_| Err(ConfigError::new("no")));
    assert_eq!(refused.unwrap_err().to_string(), "no");
    let shrunk = added.update(Vec::new(), &["rc/b".into(), "rc/never".into()], &cx, |_| Ok(())).unwrap();
    assert_eq!(["a", "b", "c"].map(|host| answer(&shrunk, &request(host, "/", &[]))), [200, 404, 203]);
    let alone = added.update(Vec::new(), &["rc/c".into()], &cx, |_| Ok(())).unwrap();
    assert!(Arc::ptr_eq(&alone, &table) && !added.contains("rc/c"));
}

#[test]
fn an_added_virtual_host_shares_what_it_leaves_unchanged() {
    let (clusters, runtime) = (CellTable::new(), Runtime::new());
    let cx = context(&clusters, &runtime);
    let mut added = AddedHosts::new(Arc::new(RouteTable::compile(&config(Vec::new()), &cx).unwrap()));
    let host = |name: &str| host(name, &[name], vec![route(prefix("/"), status(200))]);
    let (a, b) = (host("a"), host("b"));
    let before = added.update(vec![("a".into(), &a), ("b".into(), &b)], &[], &cx, |_| Ok(())).unwrap();
    let after = added.update(vec![("b".into(), &b)], &[], &cx, |_| Ok(())).unwrap();
    let place = |table: &RouteTable, name: &str| {
        let host = table.virtual_hosts().find(|host| &*host.name == name);
        std::ptr::from_ref(host.unwrap())
    };
    assert_eq!(place(&before, "a"), place(&after, "a"));
    assert_ne!(place(&before, "b"), place(&after, "b"));
}

/// Ten thousand routes are as many of these.
#[test]
fn a_route_is_small() {
    assert!(size_of::<Route>() <= 256, "{}", size_of::<Route>());
}

#[test]
fn errors_name_the_path() {
    let mut named =
        route(prefix("/"), forward(pb::RouteAction { timeout: seconds(-1), ..Default::default() }));
    named.name = "api".into();
    let error = compile(&config(vec![host("v", &["*"], vec![named])])).unwrap_err();
    assert_eq!(error.to_string(), "virtual_hosts[v].routes[api].route.timeout: duration out of range");
    let bad = route(PathSpecifier::SafeRegex(regex("(")), status(200));
    let error = compile(&config(vec![host("v", &["*"], vec![bad])])).unwrap_err();
    assert_eq!(error.path(), "virtual_hosts[v].routes[0].match.safe_regex.regex");
    let proto = pb::RouteConfiguration {
        validate_clusters: bool_value(true),
        ..config(vec![host("v", &["*"], vec![route(prefix("/"), forward(Default::default()))])])
    };
    assert_eq!(compile(&proto).unwrap_err().reason(), "route: unknown cluster 'c'");
}

/// Paths over a small alphabet, so that routes overlap.
fn path_specifier() -> impl Strategy<Value = PathSpecifier> {
    prop_oneof![
        4 => "/[ab/]{0,4}".prop_map(PathSpecifier::Prefix),
        4 => "/[ab/]{0,4}".prop_map(PathSpecifier::Path),
        3 => "/[ab/]{0,2}[ab]".prop_map(PathSpecifier::PathSeparatedPrefix),
        1 => "/[ab]{0,2}".prop_map(|text| PathSpecifier::SafeRegex(regex(&format!("{text}[a/]*")))),
        1 => Just(PathSpecifier::SafeRegex(regex("(?i)/A.*|/b/?"))),
        1 => Just(PathSpecifier::ConnectMatcher(Default::default())),
    ]
}

fn any_route() -> impl Strategy<Value = pb::Route> {
    (path_specifier(), proptest::option::weighted(0.3, "[xy]"), proptest::bool::weighted(0.8)).prop_map(
        |(path, header, case_sensitive)| {
            let headers = header.into_iter().map(|value| pb::HeaderMatcher {
                name: "x".into(),
                header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(matcher::StringMatcher {
                    ignore_case: false,
                    match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(value)),
                })),
                ..Default::default()
            });
            let r#match = pb::RouteMatch {
                path_specifier: Some(path),
                headers: headers.collect(),
                case_sensitive: bool_value(case_sensitive),
                ..Default::default()
            };
            pb::Route { r#match: Some(r#match), action: Some(status(200)), ..Default::default() }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_index_agrees_with_a_scan(
        routes in proptest::collection::vec(any_route(), 0..24),
        requests in proptest::collection::vec(("/[abAB/]{0,6}(\\?[ab]{0,2})?", "[xyz]", proptest::bool::ANY), 1..12),
    ) {
        let table = compile(&config(vec![host("v", &["*"], routes)])).unwrap();
        let info = info();
        for (path, value, connect) in requests {
            let mut headers = request("a", &path, &[("x", &value)]);
            if connect {
                headers.set(":method", "CONNECT");
            }
            let matched = Request {
                headers: &headers,
                info: &info,
                random: 0,
                path: Some(Route::matched_path(path.as_bytes(), false)),
            };
            let routes = &table.hosts[0].routes;
            let expected = routes.iter().position(|route| route.matcher.is_match(&matched));
            let found = match table.find(&headers, &info, 0) {
                Lookup::Route(index, _) => Some(index as usize),
                _ => None,
            };
            prop_assert_eq!(found, expected, "{}", path);
        }
    }
}
