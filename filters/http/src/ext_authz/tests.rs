use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::envoy::service::auth::v3 as auth;
use prost::Message as _;
use waystation_filter_api::client::{CallRetries, Clusters, NamedCluster};
use waystation_filter_api::grpc::Status;
use waystation_filter_api::http::{FactoryContext, NodeInfo};
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::singletons::Singletons;
use waystation_http::{Headers, Known};
use waystation_schema::ConfigError;
use waystation_stats::Store;

use super::answer::{Answer, Verdict};
use super::config::{Config, PerRoute};
use super::{check, mutation};

struct NoClusters;

impl Clusters for NoClusters {
    fn cluster(&self, name: &str) -> NamedCluster {
        NamedCluster::new(name, ())
    }

    fn retry_policy(&self, _: &core::RetryPolicy) -> Result<CallRetries, ConfigError> {
        Ok(CallRetries::new(Arc::new(())))
    }
}

fn with<R>(test: impl FnOnce(&FactoryContext<'_>) -> R) -> R {
    let root = Store::default().root();
    let (runtime, node) = (Runtime::new(), NodeInfo::default());
    test(&FactoryContext {
        stats: &root,
        root: &root,
        runtime: &runtime,
        node: &node,
        local_cluster: None,
        singletons: &Singletons::default(),
        filters: &(),
        clusters: &NoClusters,
    })
}

fn grpc() -> core::GrpcService {
    use core::grpc_service::{EnvoyGrpc, TargetSpecifier};
    let target = EnvoyGrpc { cluster_name: "a".into(), ..EnvoyGrpc::default() };
    core::GrpcService { target_specifier: Some(TargetSpecifier::EnvoyGrpc(target)), ..Default::default() }
}

fn proto(change: impl FnOnce(&mut pb::ExtAuthz)) -> pb::ExtAuthz {
    let services = Some(pb::ext_authz::Services::GrpcService(grpc()));
    let mut proto = pb::ExtAuthz { services, ..pb::ExtAuthz::default() };
    proto.transport_api_version = core::ApiVersion::V3.into();
    change(&mut proto);
    proto
}

fn compiled(change: impl FnOnce(&mut pb::ExtAuthz)) -> Result<Config, String> {
    with(|cx| Config::compile(&proto(change), cx).map_err(|error| error.to_string()))
}

#[test]
fn what_is_not_understood_is_refused() {
    let refused = |path: &str, change: fn(&mut pb::ExtAuthz)| {
        let error = compiled(change).unwrap_err();
        assert!(error.starts_with(path), "{error}");
    };
    refused("services: ", |proto| proto.services = None);
    refused("grpc_service.google_grpc: ", |proto| {
        let google = core::grpc_service::GoogleGrpc::default();
        let target = Some(core::grpc_service::TargetSpecifier::GoogleGrpc(google));
        let service = core::GrpcService { target_specifier: target, ..Default::default() };
        proto.services = Some(pb::ext_authz::Services::GrpcService(service));
    });
    refused("http_service.server_uri: ", |proto| {
        proto.services = Some(pb::ext_authz::Services::HttpService(pb::HttpService::default()));
    });
    refused("transport_api_version: ", |proto| proto.transport_api_version = 1);
    refused("with_request_body.max_request_bytes: ", |proto| {
        proto.with_request_body = Some(Default::default())
    });
    refused("filter_metadata: ", |proto| proto.filter_metadata = Some(Default::default()));
    refused("emit_filter_state_stats: ", |proto| proto.emit_filter_state_stats = true);
    refused("enforce_response_header_limits: ", |proto| proto.enforce_response_header_limits = true);
    refused("shadow_mode: ", |proto| proto.shadow_mode = true);
    let nothing = with(|cx| PerRoute::compile(&pb::ExtAuthzPerRoute::default(), cx).map(drop));
    assert_eq!(nothing.unwrap_err().to_string(), "override: is required");
}

#[test]
fn only_a_clear_yes_allows() {
    let answered = |wire: &[u8]| Answer::of_grpc(Ok(Bytes::copy_from_slice(wire))).verdict;
    let response = |code: i32, http: Option<auth::check_response::HttpResponse>| {
        let status = envoy_types::pb::google::rpc::Status { code, ..Default::default() };
        let response =
            auth::CheckResponse { status: Some(status), http_response: http, ..Default::default() };
        answered(&response.encode_to_vec())
    };
    use auth::check_response::HttpResponse::{DeniedResponse, ErrorResponse, OkResponse};
    assert_eq!(response(0, None), Verdict::Allowed);
    assert_eq!(response(0, Some(OkResponse(Default::default()))), Verdict::Allowed);
    for code in [1, 7, 16, -1, i32::MAX] {
        assert_eq!(response(code, None), Verdict::Denied(403));
        // It says both: no is the answer.
        assert_eq!(response(code, Some(OkResponse(Default::default()))), Verdict::Denied(403));
        assert_eq!(response(code, Some(DeniedResponse(Default::default()))), Verdict::Denied(403));
        assert_eq!(response(code, Some(ErrorResponse(Default::default()))), Verdict::Failed(None));
    }
    assert_eq!(answered(&[0xff; 4]), Verdict::Failed(None));
    let status = Status { code: 14, message: "".into() };
    assert_eq!(Answer::of_grpc(Err(status)).verdict, Verdict::Failed(None));
    assert_eq!(Answer::default().verdict, Verdict::Failed(None), "nobody was asked");
}

#[test]
fn bytes_that_would_split_a_message_stay_out() {
    let config = compiled(|_| {}).unwrap();
    let mut answer = Answer::default();
    let field = |name: &str, value: &str| (name.as_bytes().into(), value.as_bytes().into());
    answer.request.set =
        vec![field("a", "1\r\nb: 2"), field("c d", "1"), field("e", "1"), field("host", "x.test")];
    answer.query.set = vec![field("q", "1 HTTP/1.1\r\n"), field("r", "1")];
    let mut head = Headers::new();
    head.append(Known::Authority, "a.test");
    head.append(Known::Path, "/p");
    mutation::apply_to_request(&config, &answer, &mut head).unwrap();
    mutation::apply_to_query(&config, &answer.query, &mut head).unwrap();
    let text: Vec<String> =
        head.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value))).collect();
    assert_eq!(text, [":authority: x.test", ":path: /p?r=1", "e: 1"]);
    let strict = compiled(|proto| proto.validate_mutations = true).unwrap();
    mutation::apply_to_request(&strict, &answer, &mut head).unwrap_err();
    mutation::apply_to_query(&strict, &answer.query, &mut head).unwrap_err();
}

#[test]
fn map_entries_are_those_of_the_message() {
    let mut wire = Vec::new();
    for (key, value) in [("a", "1"), ("b", &"x".repeat(300)), ("a", "2")] {
        check::map_entry(check::CONTEXT_EXTENSIONS, key, value, &mut wire);
    }
    let decoded = auth::AttributeContext::decode(&*wire).unwrap().context_extensions;
    assert_eq!((decoded["a"].as_str(), decoded["b"].len()), ("2", 300));
    assert_eq!(&*check::plain(b"a\xff\xfeb\xc3\xa9"), "a!!b\u{e9}".as_bytes());
}
