//! What the whole process shares, and what compiling configuration may refer to.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as SecretProto;
use waystation_filter_api::cell::{Cell, CellTable};
use waystation_filter_api::http::{LocalCluster, NodeInfo};
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::singletons::Singletons;
use waystation_filter_api::wire;
use waystation_format::AccessLogSinks;
use waystation_route::RouteTable;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Scope, Store};
use waystation_tls::{Secret, SecretKind, SecretTable};
use waystation_upstream::Cluster;
use waystation_upstream::stats::TrafficStats;

use crate::cli::options::Options;
use crate::config_source::Backing;
use crate::http::filters::discovered::DiscoveredFilter;
use crate::http::stats::RouterStats;
use crate::manager::scopes::ScopeMap;
use crate::on_demand::OnDemand;
use crate::overload::{Connections, Installed, Overload};

/// One per process, behind an `Arc`: read by every thread, changed only through its cells and atomics.
pub struct Shared {
    /// All statistics.
    pub stats: Store,
    /// The layered runtime.
    pub runtime: Runtime,
    /// What the router counts of requests that are this proxy's own: mirrors.
    pub async_client: RouterStats,
    /// What the codecs of all listeners count.
    pub codecs: TrafficStats,
    /// Who this proxy is.
    pub node: NodeInfo,
    /// What extensions share between their configurations.
    pub singletons: Singletons,
    /// Clusters by name.
    pub clusters: CellTable<Cluster>,
    /// `cluster_manager.local_cluster_name`, once the bootstrap is read.
    pub local_cluster: OnceLock<Arc<dyn LocalCluster>>,
    /// Route configurations by [`resource_key`].
    pub routes: CellTable<RouteTable>,
    /// Scopes of SRDS subscriptions.
    pub scopes: CellTable<ScopeMap>,
    /// TLS secrets by [`resource_key`].
    pub secrets: SecretTable,
    /// Files and streams that access logs write to.
    pub access_logs: AccessLogSinks,
    /// Tells workers that one of them waits for room for a connection.
    pub room_wanted: tokio::sync::Notify,
    /// `--drain-time-s`.
    pub drain_time: Duration,
    /// Whether `--drain-strategy immediate` was given.
    pub drain_immediately: bool,
    /// When the process started.
    pub start: Instant,
    /// Whether the operator failed the health check (`/healthcheck/fail`).
    health_check_failed: AtomicBool,
    phase: AtomicU8,
    /// What the bootstrap has for config sources to name.
    pub backing: Arc<Backing>,
    /// The secrets of the bootstrap by name, compiled where they are used: what nobody uses is not read.
    pub static_secrets: OnceLock<StaticSecrets>,
    /// What requests wait for.
    pub on_demand: OnDemand,
    /// Downstream connections now open, and how many there may be.
    pub downstream: Arc<Connections>,
    /// The overload manager.
    pub overload: Installed,
    next_connection: AtomicU64,
}

/// Secrets of the bootstrap.
pub type StaticSecrets = HashMap<(SecretKind, String), SecretProto>;

/// What `/ready` and `server.state` say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum ServerState {
    /// Serving.
    Live,
    /// Failing health checks by request of the operator.
    Draining,
    /// Loading the bootstrap and the first clusters.
    PreInitializing,
    /// Waiting for the first configuration.
    Initializing,
}

impl ServerState {
    /// As `/ready` and `/server_info` print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "LIVE",
            Self::Draining => "DRAINING",
            Self::PreInitializing => "PRE_INITIALIZING",
            Self::Initializing => "INITIALIZING",
        }
    }
}

impl Shared {
    /// The shared state of a process that has not loaded any resource yet.
    pub fn new(stats: Store, node: NodeInfo, backing: Backing, options: &Options) -> Arc<Self> {
        let flush_bytes = options.file_flush_min_size_kb as usize * 1024;
        let runtime = Runtime::new();
        Arc::new(Self {
            downstream: Arc::new(Connections::new(&runtime)),
            async_client: stats
                .root()
                .scope("http")
                .tag("envoy.http_conn_manager_prefix", "async-client")
                .group(),
            codecs: {
                let codecs = TrafficStats::new(stats.root());
                // The admin interface speaks HTTP/1.
                codecs.http1();
                codecs
            },
            room_wanted: tokio::sync::Notify::new(),
            access_logs: AccessLogSinks::with_flush(&stats, options.file_flush_interval, flush_bytes),
            stats,
            runtime,
            node,
            singletons: Singletons::default(),
            clusters: CellTable::new(),
            local_cluster: OnceLock::new(),
            routes: CellTable::new(),
            scopes: CellTable::new(),
            secrets: SecretTable::new(),
            drain_time: options.drain_time,
            drain_immediately: options.drain_immediately,
            start: Instant::now(),
            health_check_failed: AtomicBool::new(false),
            phase: AtomicU8::new(ServerState::PreInitializing as u8),
            backing: Arc::new(backing),
            static_secrets: OnceLock::new(),
            on_demand: OnDemand::new(),
            overload: Installed::default(),
            next_connection: AtomicU64::new(0),
        })
    }

    /// What the process is doing. A failed health check shows once it is live.
    pub fn state(&self) -> ServerState {
        match self.phase.load(Ordering::Relaxed) {
            0 if self.health_check_failed() => ServerState::Draining,
            0 => ServerState::Live,
            3 => ServerState::Initializing,
            _ => ServerState::PreInitializing,
        }
    }

    /// The main thread's progress: `PreInitializing`, `Initializing`, `Live`.
    pub fn set_phase(&self, phase: ServerState) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Whether the operator failed the health check.
    pub fn health_check_failed(&self) -> bool {
        self.health_check_failed.load(Ordering::Relaxed)
    }

    /// `/healthcheck/fail` and `/healthcheck/ok`.
    pub fn fail_health_check(&self, fail: bool) {
        self.health_check_failed.store(fail, Ordering::Relaxed);
    }

    /// Downstream connections now open (`server.total_connections`).
    pub fn connections(&self) -> u64 {
        self.downstream.open()
    }

    /// Reserves `count` connection ids; a worker takes them in blocks so that accepting shares no counter.
    pub fn reserve_connection_ids(&self, count: u64) -> u64 {
        self.next_connection.fetch_add(count, Ordering::Relaxed)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("node", &self.node).finish_non_exhaustive()
    }
}

/// A resource that something compiled refers to: whoever manages subscriptions fetches it and fills the cell.
#[derive(Clone, Debug)]
pub enum Need {
    /// A route configuration by RDS.
    Route {
        /// Where it comes from.
        source: core::ConfigSource,
        /// Its name.
        name: String,
        /// Where it goes.
        cell: Arc<Cell<RouteTable>>,
        /// Where its subscription is counted.
        scope: Scope,
        /// Where the subscription to its virtual hosts is counted.
        vhds: Scope,
    },
    /// The scopes of scoped routes by SRDS.
    Scopes {
        /// Where they come from.
        source: core::ConfigSource,
        /// Where their route configurations come from.
        rds: Option<Box<core::ConfigSource>>,
        /// The name of the set of scopes.
        name: String,
        /// Where it goes.
        cell: Arc<Cell<ScopeMap>>,
        /// The connection manager's statistics.
        http: Scope,
        /// Where it and its subscription are counted.
        scope: Scope,
    },
    /// A secret by SDS.
    Secret {
        /// Where it comes from.
        source: core::ConfigSource,
        /// Its name.
        name: String,
        /// Where it goes.
        cell: Arc<Cell<Secret>>,
        /// Where its subscription is counted.
        scope: Scope,
    },
    /// The configuration of an HTTP filter by ECDS.
    Filter {
        /// Where it comes from.
        source: core::ConfigSource,
        /// Its name.
        name: String,
        /// Where it goes.
        place: Arc<DiscoveredFilter>,
        /// Where it and its subscription are counted.
        scope: Scope,
    },
}

impl Need {
    /// Whether what refers to it waits for its arrival.
    pub fn is_awaited(&self) -> bool {
        match self {
            Self::Filter { place, .. } => place.warms(),
            Self::Route { .. } | Self::Scopes { .. } | Self::Secret { .. } => true,
        }
    }
}

/// Passed to the compilers of listeners, filters, clusters and transport sockets: what they may refer to, and the
/// list of what they turned out to need.
pub struct CompileContext<'a> {
    /// The process.
    pub shared: &'a Arc<Shared>,
    needs: RefCell<Vec<Need>>,
    buffer_limit: usize,
    bypasses_overload: bool,
}

impl<'a> CompileContext<'a> {
    /// A context with no needs yet.
    pub fn new(shared: &'a Arc<Shared>) -> Self {
        Self::with_buffer_limit(shared, wire::buffer_limit(None))
    }

    /// One for a filter chain of a listener with this `per_connection_buffer_limit_bytes`.
    pub fn with_buffer_limit(shared: &'a Arc<Shared>, buffer_limit: usize) -> Self {
        Self { shared, needs: RefCell::default(), buffer_limit, bypasses_overload: false }
    }

    /// The same for a listener with this `bypass_overload_manager`.
    #[must_use]
    pub fn bypassing_overload(self, bypasses_overload: bool) -> Self {
        Self { bypasses_overload, ..self }
    }

    /// The overload manager, where it bears on the listener under compilation.
    pub fn overload(&self) -> Option<Arc<Overload>> {
        self.shared.overload.of_listener(self.bypasses_overload)
    }

    /// What the listener under compilation lets a connection buffer.
    pub fn buffer_limit(&self) -> usize {
        self.buffer_limit
    }

    /// The cell of a cluster; empty while the cluster does not exist.
    pub fn cluster_cell(&self, name: &str) -> Arc<Cell<Cluster>> {
        self.shared.clusters.cell(name)
    }

    /// The cell of a route configuration that comes by RDS from `source`; `scope` is the connection manager's
    /// (`http.<stat_prefix>.`).
    pub fn route_cell(
        &self,
        source: &core::ConfigSource,
        name: &str,
        scope: &Scope,
    ) -> Arc<Cell<RouteTable>> {
        let cell = self.shared.routes.cell(&resource_key(source, name));
        self.needs.borrow_mut().push(Need::Route {
            source: source.clone(),
            name: name.to_owned(),
            cell: Arc::clone(&cell),
            scope: scope.scope("rds").tag("envoy.rds_route_config", name),
            vhds: scope.scope("rds").scope("vhds").scope(name),
        });
        cell
    }

    /// The cell of a set of scopes that comes by SRDS from `source`, and their route configurations from `rds`.
    pub fn scopes_cell(
        &self,
        source: &core::ConfigSource,
        rds: Option<&core::ConfigSource>,
        name: &str,
        http: &Scope,
    ) -> Arc<Cell<ScopeMap>> {
        let cell = self.shared.scopes.cell(&scopes_key(source, rds, name));
        self.needs.borrow_mut().push(Need::Scopes {
            source: source.clone(),
            rds: rds.cloned().map(Box::new),
            name: name.to_owned(),
            cell: Arc::clone(&cell),
            http: http.clone(),
            scope: http.scope("scoped_rds").tag("envoy.scoped_rds_config", name),
        });
        cell
    }

    /// The cell of a secret that comes by SDS from `source`.
    pub fn secret_cell(&self, source: &core::ConfigSource, name: &str) -> Arc<Cell<Secret>> {
        let cell = self.shared.secrets.cell(&resource_key(source, name));
        self.needs.borrow_mut().push(Need::Secret {
            source: source.clone(),
            name: name.to_owned(),
            cell: Arc::clone(&cell),
            scope: self.shared.stats.root().scope("sds").tag("envoy.xds_resource_name", name),
        });
        cell
    }

    /// Has the filter of `place` configured by ECDS.
    pub fn discover_filter(&self, source: &core::ConfigSource, name: &str, place: &Arc<DiscoveredFilter>) {
        let root = self.shared.stats.root();
        self.needs.borrow_mut().push(Need::Filter {
            source: source.clone(),
            name: name.to_owned(),
            place: Arc::clone(place),
            scope: root.scope("extension_config_discovery").scope("http_filter").scope(name),
        });
    }

    /// What was referred to, in order.
    pub fn into_needs(self) -> Vec<Need> {
        self.needs.into_inner()
    }
}

impl fmt::Debug for CompileContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompileContext").field("needs", &self.needs.borrow().len()).finish_non_exhaustive()
    }
}

/// The name under which a resource's cell is kept. Two sources may serve different resources of one name, so the
/// source is part of it; the aggregated stream, by far the most common, adds nothing.
pub fn resource_key(source: &core::ConfigSource, name: &str) -> String {
    use core::config_source::ConfigSourceSpecifier;
    use envoy_types::pb::google::protobuf::Duration;
    use prost::Message as _;
    match &source.config_source_specifier {
        Some(ConfigSourceSpecifier::Ads(_)) => name.to_owned(),
        specifier => {
            let identity = core::ConfigSource {
                config_source_specifier: specifier.clone(),
                initial_fetch_timeout: None::<Duration>,
                ..core::ConfigSource::default()
            };
            format!("{name}@{:016x}", xxhash_rust::xxh64::xxh64(&identity.encode_to_vec(), 0))
        }
    }
}

/// The same for a set of scopes: the source of their route configurations is part of what they are.
pub fn scopes_key(source: &core::ConfigSource, rds: Option<&core::ConfigSource>, name: &str) -> String {
    resource_key(source, &rds.map_or_else(|| name.to_owned(), |rds| resource_key(rds, name)))
}

impl waystation_tls::Secrets for CompileContext<'_> {
    fn secret(
        &self,
        kind: SecretKind,
        source: Option<&core::ConfigSource>,
        name: &str,
    ) -> Result<Arc<Cell<Secret>>, ConfigError> {
        match source {
            Some(source) => Ok(self.secret_cell(source, name)),
            None => {
                // The key of a secret of the bootstrap, which has no source.
                let cell = self.shared.secrets.cell(&format!("{name}@static {}", kind.name()));
                if !cell.is_set() {
                    let secrets = self.shared.static_secrets.get();
                    let proto = secrets.and_then(|secrets| secrets.get(&(kind, name.to_owned())));
                    let proto = proto.ok_or_else(|| unknown_secret(kind, name))?;
                    let secret = Secret::compile(proto).at(|| format!("static_resources.secrets[{name}]"))?;
                    cell.set(Some(Arc::new(secret)));
                }
                Ok(cell)
            }
        }
    }
}

/// In Envoy's words, which differ by kind.
fn unknown_secret(kind: SecretKind, name: &str) -> ConfigError {
    let what = match kind {
        SecretKind::Certificate => "static secret",
        SecretKind::Validation => "static certificate validation context",
        SecretKind::TicketKeys => "tls session ticket keys",
        SecretKind::Generic => "static generic secret",
    };
    ConfigError::new(format!("Unknown {what}: {name}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cli::options::{Command, parse};

    /// A process without any configuration.
    pub(crate) fn shared() -> Arc<Shared> {
        match parse(["waystation".into(), "--config-yaml".into(), "{}".into()]) {
            Ok(Command::Run(options)) => {
                Shared::new(Store::default(), NodeInfo::default(), Backing::default(), &options)
            }
            _ => panic!("the command line is valid"),
        }
    }
    /// A cluster of one host.
    pub(crate) fn cluster(shared: &Arc<Shared>) -> waystation_upstream::Cluster {
        use envoy_types::pb::envoy::config::{core::v3 as core, endpoint::v3 as endpoint};
        use waystation_upstream::cluster::Environment;

        let socket = core::SocketAddress {
            address: "127.0.0.1".into(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(1)),
            ..Default::default()
        };
        let address = core::Address { address: Some(core::address::Address::SocketAddress(socket)) };
        let host = endpoint::Endpoint { address: Some(address), ..Default::default() };
        let host = endpoint::LbEndpoint {
            host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(host)),
            ..Default::default()
        };
        let locality = endpoint::LocalityLbEndpoints { lb_endpoints: vec![host], ..Default::default() };
        let assignment = endpoint::ClusterLoadAssignment {
            cluster_name: "one".into(),
            endpoints: vec![locality],
            ..Default::default()
        };
        let proto = envoy_types::pb::envoy::config::cluster::v3::Cluster {
            name: "one".into(),
            load_assignment: Some(assignment),
            ..Default::default()
        };
        let scope = shared.stats.root().scope("cluster").scope("one");
        let context = waystation_upstream::CompileContext {
            environment: &Environment::new(shared.runtime.clone()),
            stats: &shared.stats.root(),
            transport: &|socket| {
                crate::upstream_socket::compile(socket, &scope, &CompileContext::new(shared))
            },
            route_policies: &|_| Ok(None),
            upstream_filters: &|_| Ok(None),
            added_via_api: false,
            previous: None,
            now: Instant::now(),
        };
        waystation_upstream::Cluster::compile(&proto, &context).unwrap()
    }
}
