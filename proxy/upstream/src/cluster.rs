//! Clusters: `envoy.config.cluster.v3.Cluster`, compiled, together with its live endpoints.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use waystation_filter_api::cell::{Cell, Held};
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::stream::ClusterView;
use waystation_filter_api::value::Metadata;
use waystation_schema::ConfigError;
use waystation_stats::{ResponseStats, Scope};

use crate::admission::Admission;
use crate::discovery::{DnsSettings, OriginalDst, ResolverSettings};
use crate::health_check::HealthCheck;
use crate::host::Locality;
use crate::load_balancer::LbPolicy;
use crate::outlier::{self, Detector};
use crate::stats::{ClusterStats, RequestSizeStats, TimeoutBudgetStats, TrafficStats};

mod compile;
mod connection;
mod endpoints;
mod http;
mod outliers;
mod transport;

pub use connection::{
    BindOptions, ConnectionOptions, HappyEyeballs, SocketOption, SocketState, TcpKeepalive,
};
pub use endpoints::{Applied, Endpoints};
pub use http::{
    Http1Options, Http2Options, HttpOptions, Keepalive, UpstreamProtocol, header_case, underscores,
};
pub use transport::TransportSockets;

/// What the caller's factory makes of a transport socket; the pool casts it back. One value per distinct socket, shared by
/// the hosts that use it.
pub type TransportFactory = Arc<dyn Any + Send + Sync>;

/// Compiles a transport socket. A cluster without one asks for `envoy.transport_sockets.raw_buffer`.
pub type TransportCompiler<'a> = dyn Fn(&core::TransportSocket) -> Result<TransportFactory, ConfigError> + 'a;

/// What the caller makes of the policies in a cluster's `HttpProtocolOptions` that are otherwise a route's; routes are
/// compiled against clusters, so it is they who know. The router casts it back.
pub type RoutePolicies = Arc<dyn Any + Send + Sync>;

/// Compiles them; nothing when there are none.
pub type RoutePolicyCompiler<'a> =
    dyn Fn(&HttpProtocolOptions) -> Result<Option<RoutePolicies>, ConfigError> + 'a;

/// The compiled HTTP filters of a cluster; the router casts them back.
pub type UpstreamFilters = Arc<dyn Any + Send + Sync>;

/// Compiles them; nothing when there are none besides the codec.
pub type UpstreamFilterCompiler<'a> =
    dyn Fn(&HttpProtocolOptions) -> Result<Option<UpstreamFilters>, ConfigError> + 'a;

/// What all clusters of a process share; made once.
pub struct Environment {
    /// The layered runtime.
    pub runtime: Runtime,
    /// The locality of this node (`node.locality`), for zone-aware routing.
    pub locality: Locality,
    /// `cluster_manager.local_cluster_name`: the cluster that this proxy is a member of.
    pub local_cluster: Option<Arc<Cell<Cluster>>>,
    /// `cluster_manager.upstream_bind_config`, for clusters without their own.
    pub bind: Option<BindOptions>,
    /// The bootstrap's `typed_dns_resolver_config`, for clusters that say nothing of a resolver.
    pub resolver: ResolverSettings,
    /// Tells the main thread that outlier detection has something to decide.
    pub outliers: Arc<outlier::Report>,
}

/// What compiling one cluster needs.
pub struct CompileContext<'a> {
    /// What all clusters share.
    pub environment: &'a Arc<Environment>,
    /// The root of the stats; the cluster's are `cluster.<name>.` below it.
    pub stats: &'a Scope,
    /// Compiles transport sockets.
    pub transport: &'a TransportCompiler<'a>,
    /// Compiles policies of requests.
    pub route_policies: &'a RoutePolicyCompiler<'a>,
    /// Compiles filters of requests.
    pub upstream_filters: &'a UpstreamFilterCompiler<'a>,
    /// Whether the cluster came by CDS.
    pub added_via_api: bool,
    /// The cluster that this one is to replace.
    pub previous: Option<&'a Arc<Cluster>>,
    /// The time.
    pub now: Instant,
}

/// A compiled cluster.
pub struct Cluster {
    name: Box<str>,
    alt_stat_name: Option<Box<str>>,
    /// Whether it came by CDS.
    pub added_via_api: bool,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// How long a connection may take, TLS handshake included.
    pub connect_timeout: Duration,
    /// `per_connection_buffer_limit_bytes`.
    pub buffer_limit: usize,
    /// HTTP options.
    pub http: Arc<HttpOptions>,
    /// The policies that go before those of a route.
    pub route_policies: Option<RoutePolicies>,
    /// The filters between the router and the codec.
    pub upstream_filters: Option<UpstreamFilters>,
    /// Sockets of upstream connections.
    pub connection: Option<Box<ConnectionOptions>>,
    /// `common_lb_config.close_connections_on_host_set_change`.
    pub close_connections_on_host_set_change: bool,
    /// `connection_pool_per_downstream_connection`, or a transport socket that makes it necessary.
    pub pool_per_downstream_connection: bool,
    /// `wait_for_warm_on_init`.
    pub wait_for_warm_on_init: bool,
    /// `health_checks`.
    pub health_check: Option<Box<HealthCheck>>,
    /// `close_connections_on_host_health_failure`: moves when health may have changed, for TCP sessions to look at theirs.
    pub health_watch: Option<tokio::sync::watch::Sender<()>>,
    /// Circuit breakers.
    pub admission: Arc<Admission>,
    /// `outlier_detection`.
    pub outlier_detection: Option<Box<Detector>>,
    /// Statistics.
    pub stats: ClusterStats,
    /// `track_cluster_stats.timeout_budgets`.
    pub timeout_budget: Option<TimeoutBudgetStats>,
    /// `track_cluster_stats.request_response_sizes`.
    pub request_sizes: Option<RequestSizeStats>,
    pub(crate) scope: Scope,
    pub(crate) traffic: OnceLock<Box<TrafficStats>>,
    pub(crate) metadata: Option<Box<Metadata>>,
    pub(crate) policy: LbPolicy,
    pub(crate) sockets: TransportSockets,
    pub(crate) endpoints: Endpoints,
    pub(crate) environment: Arc<Environment>,
    /// The cluster that this one is to replace, whose ejected hosts stay so.
    pub(crate) previous: Option<Weak<Cluster>>,
}

/// Where endpoints come from.
#[derive(Debug)]
pub enum Discovery {
    /// The configuration itself.
    Static,
    /// EDS.
    Eds(Box<EdsSettings>),
    /// DNS: [`DnsSettings::logical`] tells STRICT_DNS from LOGICAL_DNS.
    Dns(Box<DnsSettings>),
    /// The address that the downstream connection was meant for, or that a header names.
    OriginalDst(Box<OriginalDst>),
}

/// `eds_cluster_config`.
#[derive(Debug)]
pub struct EdsSettings {
    /// Where assignments come from.
    pub source: core::ConfigSource,
    /// `service_name`, or the cluster's name.
    pub resource_name: Box<str>,
}

/// A cluster as streams of one worker refer to it (`UpstreamInfo.cluster` wants an `Rc` of it).
#[derive(Clone, Debug)]
pub struct ClusterRef(pub Held<Cluster>, Kept);

/// What filters keep for a cluster on one worker, by the numbers of their configurations.
#[derive(Clone, Default)]
struct Kept(RefCell<Vec<(u64, Rc<dyn Any>)>>);

/// Filter configurations come and go while a cluster stays: of more than these the oldest makes its own anew.
const MOST_KEPT: usize = 16;

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kept").field(&self.0.borrow().len()).finish()
    }
}

impl Cluster {
    /// Compiles a cluster. One with static endpoints is ready; the others wait for their first assignment.
    ///
    /// # Errors
    /// When a field is invalid, or set but not supported; the path starts below the cluster.
    pub fn compile(proto: &pb::Cluster, cx: &CompileContext<'_>) -> Result<Self, ConfigError> {
        compile::compile(proto, cx)
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `alt_stat_name`, or the name.
    pub fn observability_name(&self) -> &str {
        self.alt_stat_name.as_deref().unwrap_or(&self.name)
    }

    /// The cluster's metadata.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_deref()
    }

    /// The scope of its statistics, for groups that other crates keep below `cluster.<name>.`.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// What it counts once it carries traffic, made on first use.
    pub fn traffic(&self) -> &TrafficStats {
        self.traffic.get_or_init(|| Box::new(TrafficStats::new(self.scope.clone())))
    }

    /// `upstream_rq_<code>`, its sums and `upstream_rq_time`.
    pub fn responses(&self) -> &ResponseStats {
        &self.traffic().responses
    }

    /// Counts a response by its status.
    pub fn count_response(&self, status: u16) {
        self.stats.upstream_rq_completed().inc();
        self.responses().record(status);
    }

    /// The live endpoints.
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// The balancing policy, for admin pages.
    pub fn policy(&self) -> &LbPolicy {
        &self.policy
    }
}

impl ClusterView for ClusterRef {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn observability_name(&self) -> &str {
        self.0.observability_name()
    }

    fn metadata(&self) -> Option<&Metadata> {
        self.0.metadata()
    }

    fn count_response(&self, status: u16) {
        self.0.count_response(status);
    }

    fn of_filter(&self, id: u64, make: &dyn Fn(&Scope) -> Rc<dyn Any>) -> Option<Rc<dyn Any>> {
        let mut kept = self.1.0.borrow_mut();
        if let Some((_, found)) = kept.iter().find(|(known, _)| *known == id) {
            return Some(Rc::clone(found));
        }
        let made = make(self.0.scope());
        if kept.len() >= MOST_KEPT {
            kept.remove(0);
        }
        kept.push((id, Rc::clone(&made)));
        Some(made)
    }
}

impl ClusterView for Cluster {
    fn name(&self) -> &str {
        &self.name
    }

    fn observability_name(&self) -> &str {
        Cluster::observability_name(self)
    }

    fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_deref()
    }
}

impl ClusterRef {
    /// A reference that stream information can hold.
    pub fn new(held: Held<Cluster>) -> Rc<Self> {
        Rc::new(Self(held, Kept::default()))
    }
}

impl Deref for ClusterRef {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.0
    }
}

impl Environment {
    /// An environment without zone-aware routing.
    pub fn new(runtime: Runtime) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            locality: Locality::default(),
            local_cluster: None,
            bind: None,
            resolver: ResolverSettings::default(),
            outliers: Arc::new(|_| {}),
        })
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment")
            .field("locality", &self.locality)
            .field("local_cluster", &self.local_cluster)
            .field("bind", &self.bind)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for CompileContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompileContext").field("added_via_api", &self.added_via_api).finish_non_exhaustive()
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("name", &self.name).finish_non_exhaustive()
    }
}
