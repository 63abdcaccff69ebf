//! The configuration of this process as a whole: what the bootstrap says, the subscriptions that follow from it, and the
//! managers that keep what has come. It decides; the workers' orders are taken from it by the main loop.

mod updates;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap as BootstrapProto;
use envoy_types::pb::envoy::config::bootstrap::v3::bootstrap::DynamicResources;
use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterProto;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerProto;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as SecretProto;
use prost::Message as _;
use waystation_filter_api::address::Address;
use waystation_schema::{At as _, ConfigError};
use waystation_tls::SecretKind;
use waystation_upstream::discovery::ResolverSettings;
use waystation_upstream::outlier::Crossing;
use waystation_xds::{
    Client, Event, GrpcService, GrpcSource, Interest, Protocol, ResourceType, Source, SubId, SubscribeError,
    SubscriptionSpec,
};

use super::clusters::Clusters;
use super::dump::Dumped;
use super::listeners::{Graceful, Listeners, Order};
use super::needs::{Needs, Slot};
use super::offered::Offered;
use super::on_demand::{self, OnDemand};
use super::outliers::Outliers;
use super::secret_files::SecretFiles;
use super::subscription_stats::Counters;
use crate::admin::certs::TlsUsers;
use crate::admin::config_dump::{ConfigSnapshot, ResourceDump, ScopesDump};
use crate::bootstrap::Bootstrap;
use crate::cli::options::{Mode, Options};
use crate::config_source::{self, Backing};
use crate::context::{Shared, StaticSecrets};
use crate::dns::DnsEvent;
use crate::grpc_access_log::GrpcLogs;
use crate::on_demand::{Question, Wanted};
use crate::overload;
use crate::pool::connect::UpstreamSocket;
use crate::runtime_layers::RuntimeLayers;
use crate::server::StartError;
use crate::server_stats::ServerStats;
use crate::xds_transport;

/// What a subscription of the server itself is for.
#[derive(Clone, Debug)]
enum Purpose {
    Clusters,
    Listeners,
    /// RTDS: the layer's resource.
    Runtime(String),
}

/// What has happened to the configuration.
#[derive(Debug)]
pub enum Change {
    /// The management server said something, or failed to.
    Xds(Event),
    /// A cluster found endpoints by itself.
    Discovery(DnsEvent),
    /// Requests have failed so often that hosts may have to go.
    Outliers(Vec<Crossing>),
    /// Files of secrets were replaced.
    SecretFiles,
    /// A request needs something that is fetched on demand.
    Demand(Question),
}

/// Everything configured, and where changes of it come from.
#[derive(Debug)]
pub struct Configuration {
    shared: Arc<Shared>,
    options: Arc<Options>,
    bootstrap: Bytes,
    client: Client,
    clusters: Clusters,
    outliers: Outliers,
    listeners: Listeners,
    needs: Needs,
    on_demand: OnDemand,
    /// For `/config_dump`.
    static_secrets: Vec<(String, Dumped)>,
    secret_files: SecretFiles,
    layers: RuntimeLayers,
    purposes: HashMap<SubId, Purpose>,
    /// Of the server's own subscriptions, those that have not had an answer.
    waiting: Vec<SubId>,
    counters: Counters,
    cds: Option<core::ConfigSource>,
    lds: Option<core::ConfigSource>,
    stats: Arc<ServerStats>,
    versions: Versions,
    /// Removals by responses that could not be read as a whole.
    removals_waiting: HashMap<ResourceType, Vec<Arc<str>>>,
    /// What the workers have not been told yet.
    orders: Vec<Order>,
    overload: Option<overload::Manager>,
    started: SystemTime,
}

#[derive(Debug)]
struct Versions {
    clusters: Arc<str>,
    listeners: Arc<str>,
}

impl Configuration {
    /// Compiles the bootstrap's resources; nothing is served or subscribed to yet.
    pub fn load(
        bootstrap: Bootstrap,
        options: Arc<Options>,
        shared: Arc<Shared>,
        node: core::Node,
        stats: Arc<ServerStats>,
    ) -> Result<Self, StartError> {
        let Bootstrap {
            mut proto, wire, clusters: static_clusters, listeners: static_listeners, report, ..
        } = bootstrap;
        let text = |error: ConfigError| error.to_string();
        let layers = RuntimeLayers::compile(
            proto.layered_runtime.as_ref(),
            &shared.node.cluster,
            &shared.stats.root(),
        )
        .map_err(text)?;
        // As in Envoy the walk of the bootstrap's other resources, before there is a runtime, does not count.
        let of_listeners = |line: &&String| line.starts_with("static_resources.listeners");
        layers.deprecated_features_used(report.deprecated.iter().filter(of_listeners).count() as u64);
        layers.apply(&shared.runtime);
        if !matches!(proto.header_prefix.as_str(), "" | "x-envoy") {
            return Err(text(ConfigError::field(
                "header_prefix",
                "not supported: only x-envoy, the default",
            )));
        }
        let root = shared.stats.root();
        let overload =
            overload::compile(proto.overload_manager.as_ref(), &shared.runtime, &root, Instant::now());
        let overload =
            overload.map_err(text)?.map(|overload::Compiled { manager, overload, connections }| {
                if let Some(limit) = connections {
                    shared.downstream.limit(limit, &root);
                }
                shared.overload.install(overload);
                manager
            });

        let locality = proto.node.as_ref().and_then(|node| node.locality.clone()).unwrap_or_default();
        // Who we are is laid over what the bootstrap says of it.
        let identity = BootstrapProto { node: Some(node.clone()), ..BootstrapProto::default() };
        let encoded = Bytes::from([&*wire, &identity.encode_to_vec()].concat());
        let resources = proto.static_resources.take().unwrap_or_default();
        let dynamic = proto.dynamic_resources.clone().unwrap_or_default();
        let serving = options.mode != Mode::Validate;
        let ads = ads_source(&dynamic, &shared.backing, serving).map_err(text)?;
        for (kind, place, source) in own_sources(&dynamic, &layers) {
            let compile = || {
                let (compiled, _) = config_source::compile(source)?;
                if serving || kind != ResourceType::Listener {
                    shared.backing.check(&kind, source)?;
                }
                match compiled {
                    Source::Ads if ads.is_none() => Err(ConfigError::new(SubscribeError::NoAds.to_string())),
                    _ => Ok(()),
                }
            };
            compile().at(|| place).map_err(text)?;
        }
        let node = Bytes::from(node.encode_to_vec());
        shared.access_logs.set_grpc_driver(Box::new(GrpcLogs::new(&shared, node.clone())));
        let client = Client::new(
            waystation_xds::Options {
                node,
                ads,
                seed: fastrand::u64(..),
                unix_ms: unix_ms(SystemTime::now()),
            },
            xds_transport::transport(&shared),
        );

        let static_secrets = static_secrets(resources.secrets, &shared).map_err(text)?;
        let manager = proto.cluster_manager.clone().unwrap_or_default();
        let resolver = ResolverSettings::of_bootstrap(&proto).map_err(text)?;
        let outliers = Outliers::new(manager.outlier_detection.as_ref(), &shared)
            .at(|| "cluster_manager.outlier_detection")
            .map_err(text)?;
        let clusters =
            Clusters::new(&shared, &manager, &locality, resolver, outliers.report()).map_err(text)?;
        let listeners = Listeners::new(&shared, options.concurrency, options.mode);
        let counters = Counters::new(&shared.stats.root(), dynamic.ads_config.is_some());
        let on_demand = OnDemand::new(&shared);
        let needs = Needs::new(&shared);
        let mut configuration = Self {
            stats,
            shared,
            options,
            bootstrap: encoded,
            client,
            clusters,
            outliers,
            listeners,
            needs,
            on_demand,
            static_secrets,
            secret_files: SecretFiles::new(),
            layers,
            purposes: HashMap::new(),
            waiting: Vec::new(),
            counters,
            cds: dynamic.cds_config,
            lds: dynamic.lds_config,
            versions: Versions { clusters: Arc::from(""), listeners: Arc::from("") },
            removals_waiting: HashMap::new(),
            orders: Vec::new(),
            overload,
            started: SystemTime::now(),
        };
        configuration.add_static(static_clusters, static_listeners)?;
        Ok(configuration)
    }

    fn add_static(&mut self, clusters: Vec<Bytes>, listeners: Vec<Bytes>) -> Result<(), StartError> {
        let unversioned: Arc<str> = Arc::from("");
        let place = |list: &str, name: &str, index: usize| match name {
            "" => format!("static_resources.{list}[{index}]"),
            name => format!("static_resources.{list}[{name}]"),
        };
        for (i, wire) in clusters.into_iter().enumerate() {
            let cluster = ClusterProto::decode(wire.clone()).map_err(|error| error.to_string())?;
            if self.clusters.contains(&cluster.name) {
                return Err(format!("cluster manager: duplicate cluster '{}'", cluster.name));
            }
            let offered = Offered { proto: &cluster, wire, version: &unversioned, dynamic: false };
            self.clusters
                .add(offered, &mut self.needs, &mut self.client)
                .at(|| place("clusters", &cluster.name, i))
                .map_err(|error| error.to_string())?;
        }
        self.clusters.check_local_cluster().map_err(|error| error.to_string())?;
        // Routes are asked for when the clusters are there.
        self.client.pause(&ResourceType::RouteConfiguration);
        for (i, mut wire) in listeners.into_iter().enumerate() {
            let mut listener = ListenerProto::decode(wire.clone()).map_err(|error| error.to_string())?;
            if listener.name.is_empty() {
                listener.name = format!("listener_{i}");
                let named = ListenerProto { name: listener.name.clone(), ..ListenerProto::default() };
                wire = Bytes::from([&*wire, &named.encode_to_vec()].concat());
            }
            let name = &listener.name;
            let offered = Offered { proto: &listener, wire, version: &unversioned, dynamic: false };
            let added = self.listeners.add(offered, &mut self.needs, &mut self.client);
            added.at(|| place("listeners", name, i)).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Subscribes to the runtime layers that come by RTDS.
    pub fn subscribe_runtime(&mut self) {
        let layers: Vec<_> =
            self.layers.rtds().map(|(name, source)| (name.to_owned(), source.clone())).collect();
        for (name, source) in layers {
            let interest = Interest::Names(vec![name.as_str().into()]);
            self.subscribe(&source, ResourceType::Runtime, interest, Purpose::Runtime(name));
        }
    }

    /// Subscribes to CDS, if the bootstrap names a source.
    pub fn subscribe_clusters(&mut self) {
        if let Some(source) = self.cds.take() {
            self.subscribe(&source, ResourceType::Cluster, Interest::Wildcard, Purpose::Clusters);
        }
    }

    /// Subscribes to LDS, if the bootstrap names a source, and asks for the routes that static listeners wait for.
    pub fn subscribe_listeners(&mut self) {
        self.client.resume(&ResourceType::RouteConfiguration);
        if let Some(source) = self.lds.take() {
            self.subscribe(&source, ResourceType::Listener, Interest::Wildcard, Purpose::Listeners);
        }
    }

    /// Whether one of these subscriptions has had no answer.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether every cluster that start-up waits for is in force.
    pub fn clusters_initialized(&self) -> bool {
        self.clusters.initialized()
    }

    /// Whether no listener waits for a resource.
    pub fn listeners_settled(&mut self) -> bool {
        self.listeners.all_settled(&self.needs)
    }

    /// Waits for the next change; nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> Change {
        tokio::select! {
            event = self.client.next() => Change::Xds(event),
            Some(event) = self.clusters.next() => Change::Discovery(event),
            crossings = self.outliers.next() => Change::Outliers(crossings),
            () = self.secret_files.moved() => Change::SecretFiles,
            question = self.on_demand.next() => Change::Demand(question),
        }
    }

    /// Takes a change in.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Xds(event) => self.on_event(event),
            Change::Discovery(event) => self.clusters.on_discovery(event),
            Change::Outliers(crossings) => self.outliers.decide(crossings, &self.clusters),
            Change::SecretFiles => self.reload_secrets(),
            Change::Demand(question) => self.on_question(question),
        }
    }

    fn on_question(&mut self, question: Question) {
        let Question { wanted, reply } = question;
        let client = &mut self.client;
        match wanted {
            Wanted::Cluster { source, name } => {
                self.on_demand.ask(&source, &name, reply, Instant::now(), &self.shared, client);
            }
            Wanted::VirtualHost { routes, host } => {
                self.needs.ask_virtual_host(&routes, &host, reply, client);
            }
            Wanted::Scope { scopes, key } => self.needs.ask_scope(&scopes, &key, reply, client),
        }
    }

    /// Puts clusters in force that have become warm, and tells the requests that wait for them.
    pub fn activate_clusters(&mut self, now: Instant) {
        let settled = self.needs.take_settled();
        self.clusters.needs_settled(&settled);
        self.listeners.needs_settled(&settled);
        self.clusters.activate(now, &mut self.needs, &mut self.client);
        for name in self.clusters.take_activated() {
            self.on_demand.activated(&name);
            self.outliers.watch(&name, now, &self.clusters);
        }
        self.outliers.tick(now, &self.clusters);
        self.on_demand.expire(now, &mut self.client);
    }

    /// Gives up what requests asked for that have left since.
    pub fn prune(&mut self) {
        self.needs.prune(&mut self.client);
    }

    /// Puts listeners in force that have become warm, and ends drains whose time is over.
    pub fn activate_listeners(&mut self, now: Instant) {
        let started = self.listeners.activate(now, &self.needs);
        self.orders.extend(started);
        let ended = self.listeners.expire(now, &mut self.needs, &mut self.client);
        self.orders.extend(ended);
    }

    /// What the workers are to do, in order.
    pub fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// When something is due without an event.
    pub fn next_due(&self) -> Option<Instant> {
        let overload = self.overload.as_ref().map(overload::Manager::due);
        let due = [
            self.listeners.next_expiry(),
            self.clusters.next_due(),
            self.outliers.next_due(),
            self.on_demand.next_due(),
            overload,
        ];
        due.into_iter().flatten().min()
    }

    /// Asks the resource monitors, when their time has come.
    pub fn poll_overload(&mut self, now: Instant) {
        if let Some(overload) = &mut self.overload {
            overload.tick(now);
        }
    }

    /// Brings the counters of subscriptions up to date.
    pub fn count_subscriptions(&mut self) {
        for (sub, scope) in self.needs.take_fresh() {
            self.counters.add(sub, &scope);
        }
        for (sub, cluster) in self.clusters.take_fresh() {
            self.counters.add_eds(sub, &cluster);
        }
        for sub in self.needs.take_ended().into_iter().chain(self.clusters.take_ended()) {
            self.counters.remove(sub);
            self.secret_files.forget(sub);
        }
        for sub in self.on_demand.take_fresh() {
            self.counters.add(sub, &on_demand::scope(&self.shared.stats.root()));
        }
        self.counters.follow(&mut self.client);
    }

    /// Reads disk layers of the runtime again, if they have changed.
    pub fn refresh_runtime(&mut self) {
        self.layers.refresh(&self.shared.runtime);
    }

    /// The listeners.
    pub fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    /// Stops accepting on all listeners, or on inbound ones only, and drains their connections: `at_once` when the
    /// process ends.
    pub fn stop_listeners(&mut self, inbound_only: bool, at_once: bool) {
        let orders = self.listeners.stop(inbound_only, at_once);
        self.orders.extend(orders);
    }

    /// Drains connections and goes on accepting until the drain time is over, or for ever.
    pub fn drain_connections(&mut self, inbound_only: bool, how: Graceful) {
        let orders = self.listeners.drain_connections(Instant::now(), inbound_only, how);
        self.orders.extend(orders);
    }

    fn subscribe(
        &mut self,
        source: &core::ConfigSource,
        kind: ResourceType,
        interest: Interest,
        purpose: Purpose,
    ) {
        let (source, init_fetch_timeout) = match config_source::compile(source) {
            Ok(compiled) => compiled,
            Err(error) => {
                tracing::error!(target: "config", "cannot subscribe to {kind:?}: {error}");
                return;
            }
        };
        match self.client.subscribe(SubscriptionSpec { kind, source, interest, init_fetch_timeout }) {
            Ok(sub) => {
                let root = self.shared.stats.root();
                match &purpose {
                    Purpose::Clusters => self.counters.add(sub, &root.scope("cluster_manager").scope("cds")),
                    Purpose::Listeners => {
                        self.counters.add(sub, &root.scope("listener_manager").scope("lds"))
                    }
                    Purpose::Runtime(name) => self.counters.add(sub, &root.scope("runtime").scope(name)),
                }
                self.purposes.insert(sub, purpose);
                self.waiting.push(sub);
            }
            Err(error) => tracing::error!(target: "config", "cannot subscribe: {error}"),
        }
    }
}

/// What the admin interface asks.
impl Configuration {
    /// `/runtime_modify`; `false` without an admin layer.
    pub fn modify_runtime(&mut self, changes: &[(String, String)]) -> bool {
        let modified = self.layers.modify(changes);
        if modified {
            self.layers.apply(&self.shared.runtime);
        }
        modified
    }

    /// Names and bound addresses.
    pub fn listener_addresses(&self) -> Vec<(String, Vec<Address>)> {
        let active = self.listeners.active();
        active.map(|running| (running.listener.name.to_string(), running.addresses.clone())).collect()
    }

    /// What start-up or an update still waits for.
    pub fn unready(&self) -> Vec<(String, Vec<String>)> {
        let listeners = self.listeners.unready(&self.needs).map(|(name, targets)| {
            (format!("listener {name}"), targets.into_iter().map(str::to_owned).collect())
        });
        let clusters = self.clusters.unready().map(|name| (format!("cluster {name}"), Vec::new()));
        listeners.chain(clusters).collect()
    }

    /// `/certs`: whoever has TLS contexts that are in use.
    pub fn tls_users(&self) -> TlsUsers {
        let chains = self.listeners.active().flat_map(|running| running.listener.all_chains());
        TlsUsers {
            chains: chains.filter(|chain| chain.tls.is_some()).map(Arc::clone).collect(),
            clusters: self.clusters.active(),
        }
    }

    /// When the first of these certificates expires, in seconds since 1970.
    pub fn first_expiry(&self) -> Option<u64> {
        let chains = self.listeners.active().flat_map(|running| running.listener.all_chains());
        let of_listeners = chains.filter_map(|chain| chain.tls.as_ref()?.first_expiry()).min();
        let clusters = self.clusters.active();
        let sockets = clusters.iter().flat_map(|cluster| cluster.transports());
        let sockets = sockets.filter_map(|socket| socket.downcast_ref::<UpstreamSocket>());
        let of_clusters = sockets.filter_map(|socket| socket.tls()?.first_expiry()).min();
        of_listeners.into_iter().chain(of_clusters).min()
    }

    /// Cluster objects for `/clusters`.
    pub fn cluster_list(&self) -> Vec<Arc<waystation_upstream::Cluster>> {
        self.clusters.active()
    }

    /// `/config_dump`.
    pub fn config_snapshot(&self, include_eds: bool) -> ConfigSnapshot {
        let mut routes = self.listeners.static_routes();
        let mut secrets: Vec<ResourceDump> = self
            .static_secrets
            .iter()
            .map(|(name, dumped)| ResourceDump {
                name: name.clone(),
                dynamic: false,
                warming: false,
                dumped: dumped.clone(),
            })
            .collect();
        let mut filters = Vec::new();
        let mut scopes = self.listeners.static_scopes();
        for needed in self.needs.iter() {
            let Some(dumped) = needed.dumped.clone() else {
                continue;
            };
            if let Slot::Scopes(Some(set)) = &needed.slot {
                let dynamic = true;
                scopes.push(ScopesDump { name: needed.name.clone(), dynamic, dumped, scopes: set.wires() });
                continue;
            }
            let dump = ResourceDump { name: needed.name.clone(), dynamic: true, warming: false, dumped };
            match needed.slot {
                Slot::Route { .. } => routes.push(dump),
                Slot::Secret { .. } => secrets.push(dump),
                Slot::Filter { .. } => filters.push(dump),
                Slot::Scopes(_) => {}
            }
        }
        ConfigSnapshot {
            bootstrap: self.bootstrap.clone(),
            started: self.started,
            clusters: self.clusters.dump(),
            clusters_version: Arc::clone(&self.versions.clusters),
            listeners: self.listeners.dump(),
            listeners_version: Arc::clone(&self.versions.listeners),
            filters,
            scopes,
            routes,
            secrets,
            endpoints: if include_eds { self.clusters.dump_endpoints() } else { Vec::new() },
        }
    }
}

/// Compiles `ads_config`. Validation subscribes to nothing, so there a stream that is missing is no fault, as in Envoy: what
/// is validated may be a part of a bootstrap.
fn ads_source(
    dynamic: &DynamicResources,
    backing: &Backing,
    serving: bool,
) -> Result<Option<Arc<GrpcSource>>, ConfigError> {
    let Some(api) = &dynamic.ads_config else {
        let unused = || Arc::new(GrpcSource::new(Protocol::Delta, GrpcService::new("")));
        return Ok((!serving).then(unused));
    };
    let compile = || match config_source::api_source(api)? {
        Source::Grpc(source) => backing.check_ads(api).map(|()| source),
        _ => Err(ConfigError::new("ADS needs a gRPC api_type")),
    };
    compile().at(|| "dynamic_resources.ads_config").map(Some)
}

/// The sources of what the server itself subscribes to, each with its place in the bootstrap.
fn own_sources<'a>(
    dynamic: &'a DynamicResources,
    layers: &'a RuntimeLayers,
) -> impl Iterator<Item = (ResourceType, String, &'a core::ConfigSource)> {
    let runtime = layers.rtds().map(|(name, source)| {
        (ResourceType::Runtime, format!("layered_runtime.layers[{name}].rtds_layer.rtds_config"), source)
    });
    let clusters = dynamic.cds_config.as_ref().map(|source| (ResourceType::Cluster, "cds_config", source));
    let listeners = dynamic.lds_config.as_ref().map(|source| (ResourceType::Listener, "lds_config", source));
    let resources = clusters.into_iter().chain(listeners);
    runtime.chain(resources.map(|(kind, field, source)| (kind, format!("dynamic_resources.{field}"), source)))
}

/// Takes the secrets of the bootstrap up for whoever names them; two of one name and kind are refused.
fn static_secrets(secrets: Vec<SecretProto>, shared: &Shared) -> Result<Vec<(String, Dumped)>, ConfigError> {
    let mut dumps: Vec<(String, Dumped)> = Vec::with_capacity(secrets.len());
    let mut by_name = StaticSecrets::with_capacity(secrets.len());
    for (i, secret) in secrets.into_iter().enumerate() {
        dumps.push((secret.name.clone(), Dumped::accepted(secret.encode_to_vec().into(), Arc::from(""))));
        let refuse = |reason: String| ConfigError::new(reason).at(format!("static_resources.secrets[{i}]"));
        let kind = SecretKind::of(&secret).ok_or_else(|| refuse("Secret type not implemented".to_owned()))?;
        if let Some(earlier) = by_name.insert((kind, secret.name.clone()), secret) {
            return Err(refuse(format!("Duplicate static {} secret name {}", kind.name(), earlier.name)));
        }
    }
    // The process has one configuration, which is loaded once.
    let _ = shared.static_secrets.set(by_name);
    Ok(dumps)
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
