//! Where configuration comes from, already freed from its protobuf form.
//!
//! All types compare by value: two subscriptions of one type whose sources are equal share a stream, as in
//! Envoy.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::ResourceType;

/// What one consumer wants to be told about.
#[derive(Clone, Debug)]
pub struct SubscriptionSpec {
    /// The type of the resources.
    pub kind: ResourceType,
    /// Where they come from.
    pub source: Source,
    /// Which of them.
    pub interest: Interest,
    /// `ConfigSource.initial_fetch_timeout`: after it the consumer gets [`crate::Failure::FetchTimeout`] once and
    /// goes on without. `None` waits for ever (`0s` in the config); Envoy's default of 15 s is the caller's.
    pub init_fetch_timeout: Option<Duration>,
}

/// Which resources a subscription wants.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Interest {
    /// All that the server has for this node (LDS, CDS, SRDS).
    Wildcard,
    /// These, and no others.
    Names(Vec<Arc<str>>),
    /// VHDS: every resource named `<prefix>/...` that the server sends, asked for one by one on demand by
    /// [`crate::Core::add_names`].
    Namespace(Arc<str>),
}

/// A config source.
#[derive(Clone, Debug)]
pub enum Source {
    /// The aggregated stream of the bootstrap (`ads: {}`).
    Ads,
    /// A gRPC stream of its own for this type.
    Grpc(Arc<GrpcSource>),
    /// A file.
    Path(Arc<PathSource>),
    /// REST polling.
    Rest(Arc<RestSource>),
}

/// The two variants of the xDS protocol.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Protocol {
    /// State of the world: each response lists the resources in full.
    Sotw,
    /// Incremental.
    Delta,
}

impl Protocol {
    /// The method of the aggregated service.
    pub fn aggregated_method(self) -> &'static str {
        match self {
            Self::Sotw => "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
            Self::Delta => "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
        }
    }
}

/// `ApiConfigSource` with `api_type` `GRPC`, `DELTA_GRPC` or their aggregated forms.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct GrpcSource {
    /// State of the world or delta.
    pub protocol: Protocol,
    /// The server, and at most one more to fail over to. Must not be empty.
    pub services: Vec<Arc<GrpcService>>,
    /// Send the node only in the first request of a stream.
    pub node_on_first_message_only: bool,
    /// Limits requests, not responses.
    pub rate_limit: Option<RateLimit>,
    /// How long to wait between attempts to connect.
    pub backoff: BackoffSpec,
}

/// One server: `envoy_grpc` or `google_grpc`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct GrpcService {
    /// The cluster's name, or any other name that the caller's [`crate::Connect`] understands.
    pub target: Arc<str>,
    /// `:authority` of the requests; Envoy uses the cluster's name when none is configured.
    pub authority: Option<Arc<str>>,
    /// Bounds the wait for the connection; 20 s when absent. A stream lives until it breaks.
    pub timeout: Option<Duration>,
    /// Added to the headers of each stream, in order.
    pub initial_metadata: Vec<(Arc<str>, Arc<str>)>,
    /// Interval of HTTP/2 pings that find a dead connection (`connection_keepalive` of the cluster, or the channel
    /// arguments of `google_grpc`). Off unless configured, as with Envoy: gRPC servers hang up on clients that ping
    /// more often than they allow.
    pub keepalive_interval: Option<Duration>,
    /// How long a ping may stay unanswered.
    pub keepalive_timeout: Duration,
    /// Largest response accepted, bytes.
    pub max_message_bytes: usize,
}

/// `RateLimitSettings`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RateLimit {
    /// Size of the bucket; Envoy's default is 100.
    pub max_tokens: u32,
    /// Thousandths of tokens added each second; Envoy's default is 10 000 (10 tokens).
    pub fill_millis: u64,
}

/// Full-jitter exponential back-off.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct BackoffSpec {
    /// Upper end of the first wait.
    pub base: Duration,
    /// Upper end of any wait.
    pub max: Duration,
}

/// `PathConfigSource`, or the deprecated `path`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct PathSource {
    /// The file, which holds a `DiscoveryResponse`.
    pub path: PathBuf,
    /// Watch this directory instead of the file's own: a Kubernetes volume swaps a link inside it.
    pub watched_directory: Option<PathBuf>,
}

/// `ApiConfigSource` with `api_type: REST`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct RestSource {
    /// The cluster's name, for the caller's [`crate::Connect`].
    pub target: Arc<str>,
    /// Time between polls; the client adds up to as much again at random, as Envoy does.
    pub refresh_delay: Duration,
    /// How long one poll may take.
    pub request_timeout: Duration,
}

impl GrpcService {
    /// A server with the defaults: no keepalive pings, responses of up to 256 MiB.
    pub fn new(target: impl Into<Arc<str>>) -> Self {
        Self {
            target: target.into(),
            authority: None,
            timeout: None,
            initial_metadata: Vec::new(),
            keepalive_interval: None,
            keepalive_timeout: Duration::from_secs(20),
            max_message_bytes: 256 << 20,
        }
    }
}

impl GrpcSource {
    /// A source with one server and Envoy's defaults.
    pub fn new(protocol: Protocol, service: GrpcService) -> Self {
        Self {
            protocol,
            services: vec![Arc::new(service)],
            node_on_first_message_only: false,
            rate_limit: None,
            backoff: BackoffSpec::default(),
        }
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self { max_tokens: 100, fill_millis: 10_000 }
    }
}

impl Default for BackoffSpec {
    fn default() -> Self {
        Self { base: Duration::from_millis(500), max: Duration::from_secs(30) }
    }
}
