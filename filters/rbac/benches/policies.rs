//! What a decision costs by the number of policies, beside trying them one by one in the order of their names.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use matcher::string_matcher::MatchPattern;
use pb::permission::Rule;
use pb::principal::{Authenticated, Identifier};
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{Certificate, ConnectionInfo, TlsInfo};
use waystation_filter_api::stream::{Protocol, StreamInfo};
use waystation_http::Headers;
use waystation_matchers::Inputs;
use waystation_rbac::{Engine, Level};

fn exact(text: String) -> matcher::StringMatcher {
    matcher::StringMatcher { match_pattern: Some(MatchPattern::Exact(text)), ..Default::default() }
}

fn header(name: &str, text: String) -> Rule {
    let specifier = route::header_matcher::HeaderMatchSpecifier::StringMatch(exact(text));
    Rule::Header(route::HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(specifier),
        ..Default::default()
    })
}

fn permission(rule: Rule) -> pb::Permission {
    pb::Permission { rule: Some(rule) }
}

/// As istiod makes them: a workload by its identity, a method, a path prefix.
fn policy(number: usize) -> pb::Policy {
    let prefix = MatchPattern::Prefix(format!("/service{number}/"));
    let path = matcher::StringMatcher { match_pattern: Some(prefix), ..Default::default() };
    let path = matcher::PathMatcher { rule: Some(matcher::path_matcher::Rule::Path(path)) };
    let all = vec![permission(header(":method", "GET".into())), permission(Rule::UrlPath(path))];
    let name = exact(format!("spiffe://cluster.local/ns/default/sa/client{number}"));
    let identifier = Identifier::Authenticated(Authenticated { principal_name: Some(name) });
    pb::Policy {
        permissions: vec![permission(Rule::AndRules(pb::permission::Set { rules: all }))],
        principals: vec![pb::Principal { identifier: Some(identifier) }],
        ..Default::default()
    }
}

fn engine(policies: impl IntoIterator<Item = (String, pb::Policy)>) -> Engine {
    let rules = pb::Rbac { policies: policies.into_iter().collect(), ..Default::default() };
    Engine::compile(&rules, Level::Http).expect("the policies are valid")
}

fn stream(name: String) -> StreamInfo {
    let address = Address::Ip((IpAddr::V4(Ipv4Addr::LOCALHOST), 80).into());
    let mut connection = ConnectionInfo::new(1, Instant::now(), address.clone(), address);
    let peer = Certificate { uri_sans: vec![name], ..Certificate::default() };
    connection.tls =
        Some(Arc::new(TlsInfo { peer: Some(Box::new(peer)), peer_verified: true, ..TlsInfo::default() }));
    StreamInfo::new(1, Instant::now(), SystemTime::now(), Rc::new(connection), Some(Protocol::Http11))
}

fn head(path: String) -> Headers {
    let mut head: Headers = [(":method", "GET"), (":authority", "a.test")].into_iter().collect();
    head.append(":path", path);
    for number in 0..12 {
        head.append(format!("x-header-{number}").as_str(), "value");
    }
    head
}

fn decisions(criterion: &mut Criterion) {
    for count in [1_usize, 4, 6, 10, 100, 1_000] {
        let engine = engine((0..count).map(|number| (format!("{number:04}"), policy(number))));
        // One engine for each policy: what trying them all costs, without an index.
        let single: Vec<Engine> =
            (0..count).map(|number| self::engine([(String::new(), policy(number))])).collect();
        for (what, number) in [("last", count - 1), ("none", count)] {
            let stream = stream(format!("spiffe://cluster.local/ns/default/sa/client{number}"));
            let head = head(format!("/service{number}/items?page=2"));
            let inputs = Inputs::request(&stream, &head);
            assert_eq!(engine.decide(&inputs).allowed, number < count);
            criterion.bench_function(&format!("{count} policies, {what} matches"), |bencher| {
                bencher.iter(|| black_box(&engine).decide(black_box(&inputs)).allowed);
            });
            criterion.bench_function(&format!("{count} policies one by one, {what} matches"), |bencher| {
                bencher.iter(|| single.iter().any(|engine| engine.decide(black_box(&inputs)).allowed));
            });
        }
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);
