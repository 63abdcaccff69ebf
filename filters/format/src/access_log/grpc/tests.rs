use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::accesslog::v3 as log_pb;
use envoy_types::pb::envoy::data::accesslog::v3::HttpAccessLogEntry;
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3 as pb;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::HttpAccessLogEntries;
use envoy_types::pb::google::protobuf::Any;
use parking_lot::Mutex;
use prost::Message as _;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::value::Value;
use waystation_http::Headers;
use waystation_schema::ConfigError;
use waystation_stats::Store;

use super::{EntryKind, GrpcLogDriver, GrpcQueue, Next};
use crate::access_log::tests::{cx, info};
use crate::access_log::{AccessLog, AccessLogSinks};

/// Keeps the queues for the test to empty.
#[derive(Clone, Debug, Default)]
struct Driver(Arc<Mutex<Vec<Arc<GrpcQueue>>>>);

impl GrpcLogDriver for Driver {
    fn start(
        &self,
        _: &pb::CommonGrpcAccessLogConfig,
        _: EntryKind,
        queue: Arc<GrpcQueue>,
    ) -> Result<(), ConfigError> {
        self.0.lock().push(queue);
        Ok(())
    }
}

fn config(log_name: &str) -> log_pb::AccessLog {
    let common = pb::CommonGrpcAccessLogConfig { log_name: log_name.into(), ..Default::default() };
    let config = pb::HttpGrpcAccessLogConfig {
        common_config: Some(common),
        additional_request_headers_to_log: vec!["x-many".into()],
        ..Default::default()
    };
    let type_url = "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig";
    let any = Any { type_url: type_url.into(), value: config.encode_to_vec() };
    log_pb::AccessLog {
        config_type: Some(log_pb::access_log::ConfigType::TypedConfig(any)),
        ..Default::default()
    }
}

fn entries(queue: &GrpcQueue) -> Vec<HttpAccessLogEntry> {
    HttpAccessLogEntries::decode(&*queue.take()).unwrap().log_entry
}

#[test]
fn what_is_written_by_hand_is_what_a_decoder_reads() {
    let store = Store::default();
    let sinks = AccessLogSinks::new(&store);
    let driver = Driver::default();
    sinks.set_grpc_driver(Box::new(driver.clone()));
    let log = AccessLog::compile(&config("l"), &sinks, &Runtime::new()).unwrap();
    let mut info = info();
    info.flags.set(ResponseFlag::UnauthorizedExternalService);
    info.flags.set(ResponseFlag::NoClusterFound);
    info.flags.set(ResponseFlag::DownstreamRemoteReset);
    info.metadata.set("ns", "list", Value::List(vec![Value::Null, Value::Number(1.5), Value::Bool(true)]));
    // Lengths of one, two and three bytes.
    let long = "p".repeat(20_000);
    let agent = "u".repeat(200);
    let request: Headers = [
        (":method", "DELETE"),
        (":path", long.as_str()),
        ("user-agent", agent.as_str()),
        ("x-many", "a"),
        ("x-many", "b"),
    ]
    .into_iter()
    .collect();
    log.log(&cx(&info, &request), 0);
    let queue = Arc::clone(&driver.0.lock()[0]);
    let all = entries(&queue);
    assert_eq!(all.len(), 1);
    let entry = all.into_iter().next().unwrap();
    let (head, common) = (entry.request.unwrap(), entry.common_properties.unwrap());
    assert_eq!((head.request_method, head.path, head.user_agent), (5, long, agent));
    assert_eq!(head.request_headers["x-many"], "a,b");
    let flags = common.response_flags.unwrap();
    assert!(flags.no_cluster_found && flags.downstream_remote_reset && !flags.no_route_found);
    assert_eq!(flags.unauthorized_details.unwrap().reason, 1);
    let metadata = common.metadata.unwrap();
    assert_eq!(
        metadata.filter_metadata["ns"].fields["list"].kind.as_ref().map(|kind| match kind {
            envoy_types::pb::google::protobuf::value::Kind::ListValue(list) => list.values.len(),
            _ => 0,
        }),
        Some(3)
    );
    assert_eq!(entry.response.unwrap().response_code.unwrap().value, 200);
    assert_eq!(common.duration.unwrap().nanos, 50_000_000);
}

#[test]
fn logs_that_are_alike_share_a_queue_which_ends_with_the_last() {
    let sinks = AccessLogSinks::new(&Store::default());
    let driver = Driver::default();
    let refused = AccessLog::compile(&config("l"), &sinks, &Runtime::new()).unwrap_err();
    assert_eq!(refused.to_string(), "typed_config.common_config: no service can be reached here");
    sinks.set_grpc_driver(Box::new(driver.clone()));
    let compile = |name| AccessLog::compile(&config(name), &sinks, &Runtime::new()).unwrap();
    let (one, same, other) = (compile("l"), compile("l"), compile("m"));
    assert_eq!(driver.0.lock().len(), 2);
    let queue = Arc::clone(&driver.0.lock()[0]);
    let (info, request, now) = (info(), Headers::new(), Instant::now());
    one.log(&cx(&info, &request), 0);
    same.log(&cx(&info, &request), 0);
    assert_eq!(queue.poll(info.start + Duration::from_secs(1), Waker::noop()), Next::Send);
    assert_eq!(entries(&queue).len(), 2);
    drop(one);
    assert_eq!(queue.poll(now, Waker::noop()), Next::Idle);
    drop((same, other));
    assert_eq!(queue.poll(now, Waker::noop()), Next::Closed);
}
