//! Access logs that go to a gRPC service (`envoy.access_loggers.http_grpc`, `envoy.access_loggers.tcp_grpc`).
//!
//! An entry is encoded where its stream ends, and put into a bounded queue; sending is somebody else's, who is given the
//! queue when the log is made. So a service that is slow or gone costs entries, never requests.

mod entry;
mod queue;
mod wire;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::ApiVersion;
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3 as pb;
use envoy_types::pb::envoy::r#type::metadata::v3 as metadata;
use envoy_types::pb::envoy::r#type::tracing::v3 as tracing;
use parking_lot::Mutex;
use prost::Message as _;
use waystation_filter_api::wire::duration;
use waystation_http::HeaderName;
use waystation_matchers::MetadataPath;
use waystation_schema::{At, ConfigError};
use waystation_stats::Store;

use super::KEPT_LINE_CAPACITY;
use crate::formatter::{FormatContext, Formatter, MetadataOf};
use queue::{GrpcLogStats, Sender};
pub use queue::{GrpcQueue, Next};

/// `buffer_flush_interval`, when there is none.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// `buffer_size_bytes`, when there is none.
const BATCH: u32 = 16 * 1024;

/// What the entries of a log describe.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum EntryKind {
    /// Requests: `http_logs`.
    Http,
    /// Connections: `tcp_logs`.
    Tcp,
}

/// Who sends what gathers in the queues.
pub trait GrpcLogDriver: fmt::Debug + Send + Sync {
    /// Sends to the service of `config` what comes into `queue`, until that is closed.
    fn start(
        &self,
        config: &pb::CommonGrpcAccessLogConfig,
        kind: EntryKind,
        queue: Arc<GrpcQueue>,
    ) -> Result<(), ConfigError>;
}

/// The services that logs go to, one queue for each configuration.
#[derive(Debug)]
pub(super) struct GrpcLogs {
    open: Mutex<HashMap<Key, Weak<Sender>>>,
    pub(super) driver: OnceLock<Box<dyn GrpcLogDriver>>,
    stats: Store,
}

/// An encoded configuration, and what its entries describe.
type Key = (Vec<u8>, EntryKind);

/// One compiled log.
#[derive(Debug)]
pub(super) struct GrpcLog {
    kind: EntryKind,
    request_headers: Box<[HeaderName]>,
    response_headers: Box<[HeaderName]>,
    response_trailers: Box<[HeaderName]>,
    filter_state: Box<[Box<str>]>,
    tags: Box<[CustomTag]>,
    stream_id: Formatter,
    sender: Arc<Sender>,
}

/// A compiled `envoy.type.tracing.v3.CustomTag`.
#[derive(Debug)]
struct CustomTag {
    name: Box<str>,
    value: Formatter,
    /// Stands for a value that is empty.
    default: Box<str>,
}

thread_local! {
    static ENTRY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl GrpcLogs {
    pub(super) fn new(stats: &Store) -> Self {
        Self { open: Mutex::default(), driver: OnceLock::new(), stats: stats.clone() }
    }

    /// The queue of a configuration, which all logs that have the same share.
    fn open(
        &self,
        config: &pb::CommonGrpcAccessLogConfig,
        kind: EntryKind,
    ) -> Result<Arc<Sender>, ConfigError> {
        let key = (config.encode_to_vec(), kind);
        let mut open = self.open.lock();
        if let Some(sender) = open.get(&key).and_then(Weak::upgrade) {
            return Ok(sender);
        }
        let interval = duration("buffer_flush_interval", config.buffer_flush_interval.as_ref())?;
        let batch = config.buffer_size_bytes.as_ref().map_or(BATCH, |size| size.value);
        let stats: GrpcLogStats = self.stats.root().scope("access_logs").scope("grpc_access_log").group();
        let counted = kind == EntryKind::Http;
        let queue = GrpcQueue::new(stats, counted, interval.unwrap_or(FLUSH_INTERVAL), batch as usize);
        let sender = Arc::new(Sender(Arc::new(queue)));
        let driver = self.driver.get().ok_or_else(|| ConfigError::new("no service can be reached here"))?;
        driver.start(config, kind, Arc::clone(&sender.0))?;
        open.retain(|_, sender| sender.strong_count() > 0);
        open.insert(key, Arc::downgrade(&sender));
        Ok(sender)
    }
}

impl GrpcLog {
    pub(super) fn http(proto: &pb::HttpGrpcAccessLogConfig, logs: &GrpcLogs) -> Result<Self, ConfigError> {
        let pb::HttpGrpcAccessLogConfig {
            common_config,
            additional_request_headers_to_log,
            additional_response_headers_to_log,
            additional_response_trailers_to_log,
        } = proto;
        let mut log = Self::compile(common_config.as_ref(), EntryKind::Http, logs)?;
        log.request_headers = names("additional_request_headers_to_log", additional_request_headers_to_log)?;
        log.response_headers =
            names("additional_response_headers_to_log", additional_response_headers_to_log)?;
        log.response_trailers =
            names("additional_response_trailers_to_log", additional_response_trailers_to_log)?;
        Ok(log)
    }

    pub(super) fn tcp(proto: &pb::TcpGrpcAccessLogConfig, logs: &GrpcLogs) -> Result<Self, ConfigError> {
        let pb::TcpGrpcAccessLogConfig { common_config } = proto;
        Self::compile(common_config.as_ref(), EntryKind::Tcp, logs)
    }

    fn compile(
        config: Option<&pb::CommonGrpcAccessLogConfig>,
        kind: EntryKind,
        logs: &GrpcLogs,
    ) -> Result<Self, ConfigError> {
        let config = config.ok_or_else(|| ConfigError::field("common_config", "is required"))?;
        let compile = || {
            #[expect(deprecated, reason = "it is refused by name")]
            if config.transport_api_version() == ApiVersion::V2 {
                let why = "the v2 xDS major version has been removed and is no longer supported";
                return Err(ConfigError::field("transport_api_version", why));
            }
            let tags = config.custom_tags.iter().enumerate();
            let tags = tags.map(|(i, tag)| CustomTag::compile(tag).at(|| format!("custom_tags[{i}]")));
            Ok(Self {
                kind,
                request_headers: Box::default(),
                response_headers: Box::default(),
                response_trailers: Box::default(),
                filter_state: config
                    .filter_state_objects_to_log
                    .iter()
                    .map(|name| name.as_str().into())
                    .collect(),
                tags: tags.collect::<Result<_, _>>()?,
                stream_id: Formatter::compile_omitting_empty("%STREAM_ID%")?,
                sender: logs.open(config, kind)?,
            })
        };
        compile().at(|| "common_config")
    }

    /// Encodes the entry of a stream and hands it over.
    pub(super) fn log(&self, cx: &FormatContext<'_>) {
        ENTRY.with_borrow_mut(|entry| {
            entry.clear();
            self.encode(cx, entry);
            self.sender.push(entry, cx.now);
            if entry.capacity() > KEPT_LINE_CAPACITY {
                *entry = Vec::new();
            }
        });
    }
}

impl CustomTag {
    fn compile(proto: &tracing::CustomTag) -> Result<Self, ConfigError> {
        use tracing::custom_tag::{Environment, Header, Literal, Metadata, Type};
        let tracing::CustomTag { tag, r#type } = proto;
        let escaped = |text: &str| text.replace('%', "%%");
        let (value, default) = match r#type {
            None => return Err(ConfigError::new("needs a type")),
            Some(Type::Literal(Literal { value })) => (escaped(value), ""),
            // The environment of a process does not change.
            Some(Type::Environment(Environment { name, default_value })) => {
                (escaped(&std::env::var(name).unwrap_or_default()), default_value.as_str())
            }
            Some(Type::RequestHeader(Header { name, default_value })) => {
                HeaderName::parse(name)
                    .map_err(|_| ConfigError::field("request_header.name", "is invalid"))?;
                (format!("%REQ({name})%"), default_value.as_str())
            }
            Some(Type::Value(format)) => (format.clone(), ""),
            Some(Type::Metadata(Metadata { kind, metadata_key, default_value })) => {
                let value = of_metadata(kind.as_ref(), metadata_key.as_ref()).at(|| "metadata")?;
                return Ok(Self { name: tag.as_str().into(), value, default: default_value.as_str().into() });
            }
        };
        let value = Formatter::compile_omitting_empty(&value)?;
        Ok(Self { name: tag.as_str().into(), value, default: default.into() })
    }
}

fn of_metadata(
    kind: Option<&metadata::MetadataKind>,
    key: Option<&metadata::MetadataKey>,
) -> Result<Formatter, ConfigError> {
    use metadata::metadata_key::path_segment::Segment;
    use metadata::metadata_kind::Kind;
    let of = match kind.and_then(|kind| kind.kind.as_ref()) {
        Some(Kind::Request(_)) => MetadataOf::Dynamic,
        Some(Kind::Route(_)) => MetadataOf::Route,
        Some(Kind::Cluster(_)) => MetadataOf::Cluster,
        Some(Kind::Host(_)) => MetadataOf::UpstreamHost,
        None => return Err(ConfigError::field("kind", "is required")),
    };
    let key = key.ok_or_else(|| ConfigError::field("metadata_key", "is required"))?;
    let path = key.path.iter().map(|segment| match &segment.segment {
        Some(Segment::Key(key)) => Ok(&**key),
        _ => Err(ConfigError::field("metadata_key.path", "a step that is no key is not supported")),
    });
    let path = path.collect::<Result<Vec<_>, _>>()?;
    Ok(Formatter::of_metadata(of, MetadataPath::new(&key.key, path)))
}

fn names(field: &'static str, names: &[String]) -> Result<Box<[HeaderName]>, ConfigError> {
    let parse = |(i, name): (usize, &String)| {
        HeaderName::parse(name).map_err(|_| ConfigError::field(format!("{field}[{i}]"), "is no header name"))
    };
    names.iter().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests;
