//! The main thread: brings the process up, keeps the configuration, ends the process.
//!
//! Start-up order is Envoy's: runtime layers, static clusters, CDS until all clusters are warm, then LDS until all
//! listeners are warm, then the workers accept.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use envoy_types::pb::envoy::admin::v3 as admin_pb;
use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap as BootstrapProto;
use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterProto;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerProto;
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, ScopedRouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as SecretProto;
use envoy_types::pb::envoy::service::runtime::v3::Runtime as RuntimeProto;
use prost::Message as _;
use tokio::sync::mpsc;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::Cell;
use waystation_schema::{At as _, ConfigError, Message, Policy, check};
use waystation_tls::Secret;
use waystation_xds::{
    Client, Event, Interest, Rejection, Resource, ResourceType, SubId, SubscriptionSpec, Update,
};

use crate::admin::config_dump::{ConfigSnapshot, ResourceDump, ScopesDump};
use crate::bootstrap::Bootstrap;
use crate::cli::options::{Mode, Options};
use crate::config_source;
use crate::context::{ServerState, Shared, static_secret};
use crate::control::{Job, MainThread};
use crate::manager::clusters::Clusters;
use crate::manager::dump::Dumped;
use crate::manager::listeners::Listeners;
use crate::manager::needs::{Needs, Slot, configure};
use crate::manager::subscription_stats::Counters;
use crate::overload;
use crate::runtime_layers::RuntimeLayers;
use crate::signals::{Signal, Signals};
use crate::workers::Workers;
use crate::xds_transport;

/// How often the server's own gauges are renewed and interval histograms merged, when the bootstrap says nothing.
const STATS_FLUSH_INTERVAL: Duration = Duration::from_secs(5);

const VIRTUAL_HOST: &str = "envoy.config.route.v3.VirtualHost";
const SCOPE: &str = "envoy.config.route.v3.ScopedRouteConfiguration";

/// How far start-up has come.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Phase {
    /// RTDS layers.
    Runtime,
    /// Static clusters, then CDS.
    Clusters,
    /// LDS and what listeners wait for.
    Listeners,
    /// Serving.
    Live,
}

/// What a subscription of the server itself is for.
#[derive(Clone, Debug)]
enum Purpose {
    Clusters,
    Listeners,
    /// RTDS: the layer's resource.
    Runtime(String),
}

/// The main thread's state.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    options: Arc<Options>,
    bootstrap: Bytes,
    client: Client,
    clusters: Clusters,
    listeners: Listeners,
    needs: Needs,
    /// Held for the life of the process: their cells have no other owner until somebody refers to them.
    static_secrets: Vec<(Arc<Cell<Secret>>, String, Dumped)>,
    layers: RuntimeLayers,
    workers: Workers,
    purposes: HashMap<SubId, Purpose>,
    /// Of the server's own subscriptions, those that have not had an answer.
    waiting: Vec<SubId>,
    counters: Counters,
    phase: Phase,
    dynamic: core_config::Dynamic,
    stats: crate::server_stats::ServerStats,
    versions: Versions,
    /// Removals by responses that could not be read as a whole.
    removals_waiting: HashMap<ResourceType, Vec<Arc<str>>>,
    exit: Option<Exit>,
    started: SystemTime,
    flush_interval: Duration,
}

#[derive(Debug)]
struct Versions {
    clusters: Arc<str>,
    listeners: Arc<str>,
}

/// How the process is ending.
#[derive(Clone, Copy, Debug)]
enum Exit {
    /// Connections drain until this time.
    Draining(Instant),
    /// At once.
    Now,
}

/// The parts of the bootstrap that are used after start-up begins.
mod core_config {
    use envoy_types::pb::envoy::config::core::v3::ConfigSource;

    #[derive(Debug, Default)]
    pub(super) struct Dynamic {
        pub(super) clusters: Option<ConfigSource>,
        pub(super) listeners: Option<ConfigSource>,
    }
}

/// Why the process did not come up; printed as Envoy does, exit code 1.
pub type StartError = String;

impl Server {
    /// Compiles the bootstrap's resources; nothing is served yet. With `--mode validate` this is all.
    pub fn new(
        bootstrap: Bootstrap,
        options: Arc<Options>,
        shared: Arc<Shared>,
        node: core::Node,
    ) -> Result<Self, StartError> {
        let Bootstrap { mut proto, wire, clusters: static_clusters, .. } = bootstrap;
        let text = |error: ConfigError| error.to_string();
        let layers =
            RuntimeLayers::compile(proto.layered_runtime.as_ref(), &shared.node.cluster).map_err(text)?;
        layers.apply(&shared.runtime);
        if !matches!(proto.header_prefix.as_str(), "" | "x-envoy") {
            return Err(text(ConfigError::field(
                "header_prefix",
                "not supported: only x-envoy, the default",
            )));
        }
        if let Some(limit) = overload::compile(proto.overload_manager.as_ref()).map_err(text)? {
            shared.downstream.limit(limit, &shared.stats.root());
        }

        let locality = proto.node.as_ref().and_then(|node| node.locality.clone()).unwrap_or_default();
        // Who we are is laid over what the bootstrap says of it.
        let identity = BootstrapProto { node: Some(node.clone()), ..BootstrapProto::default() };
        let encoded = Bytes::from([&*wire, &identity.encode_to_vec()].concat());
        let resources = proto.static_resources.take().unwrap_or_default();
        let dynamic = proto.dynamic_resources.clone().unwrap_or_default();
        let ads = match &dynamic.ads_config {
            Some(api) => {
                match config_source::api_source(api).at(|| "dynamic_resources.ads_config").map_err(text)? {
                    waystation_xds::Source::Grpc(source) => Some(source),
                    _ => return Err("dynamic_resources.ads_config: ADS needs a gRPC api_type".to_owned()),
                }
            }
            None => None,
        };
        let uses_grpc = ads.is_some() || dynamic.cds_config.is_some() || dynamic.lds_config.is_some();
        if uses_grpc && ads.is_some() && (node.id.is_empty() || node.cluster.is_empty()) {
            return Err("node 'id' and 'cluster' are required. Set it either in 'node' config or via \
                        --service-node and --service-cluster options."
                .to_owned());
        }
        let subscribed = [("cds_config", &dynamic.cds_config), ("lds_config", &dynamic.lds_config)];
        for (field, source) in
            subscribed.into_iter().filter_map(|(field, source)| Some((field, source.as_ref()?)))
        {
            let (source, _) =
                config_source::compile(source).at(|| format!("dynamic_resources.{field}")).map_err(text)?;
            if matches!(source, waystation_xds::Source::Ads) && ads.is_none() {
                return Err(format!("dynamic_resources.{field}: ADS without an ads_config"));
            }
        }
        let client = Client::new(
            waystation_xds::Options {
                node: node.encode_to_vec().into(),
                ads,
                seed: fastrand::u64(..),
                unix_ms: unix_ms(SystemTime::now()),
            },
            xds_transport::transport(&shared),
        );

        let mut static_secrets = Vec::with_capacity(resources.secrets.len());
        for (i, secret) in resources.secrets.iter().enumerate() {
            let compiled =
                Secret::compile(secret).at(|| format!("static_resources.secrets[{i}]")).map_err(text)?;
            let cell = shared.secrets.cell(&static_secret(&secret.name));
            cell.set(Some(Arc::new(compiled)));
            let dumped = Dumped::accepted(secret.encode_to_vec().into(), Arc::from(""));
            static_secrets.push((cell, secret.name.clone(), dumped));
        }

        let manager = proto.cluster_manager.clone().unwrap_or_default();
        let clusters = Clusters::new(&shared, &manager, &locality).map_err(text)?;
        let listeners = Listeners::new(&shared, options.concurrency);
        let flush_interval = crate::convert::duration(proto.stats_flush_interval.as_ref())
            .at(|| "stats_flush_interval")
            .map_err(text)?
            .unwrap_or(STATS_FLUSH_INTERVAL);
        let stats = crate::server_stats::ServerStats::new(&shared, &options);
        if let Some(version) = &proto.stats_server_version_override {
            stats.set_version(version.value);
        }
        let counters = Counters::new(&shared.stats.root());
        let mut server = Self {
            workers: Workers::new(),
            stats,
            shared,
            options,
            bootstrap: encoded,
            client,
            clusters,
            listeners,
            needs: Needs::default(),
            static_secrets,
            layers,
            purposes: HashMap::new(),
            waiting: Vec::new(),
            counters,
            phase: Phase::Runtime,
            dynamic: core_config::Dynamic { clusters: dynamic.cds_config, listeners: dynamic.lds_config },
            versions: Versions { clusters: Arc::from(""), listeners: Arc::from("") },
            removals_waiting: HashMap::new(),
            exit: None,
            started: SystemTime::now(),
            flush_interval,
        };
        server.add_static(static_clusters, resources.listeners)?;
        Ok(server)
    }

    fn add_static(&mut self, clusters: Vec<Bytes>, listeners: Vec<ListenerProto>) -> Result<(), StartError> {
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
            self.clusters
                .add(&cluster, wire, &unversioned, false, &mut self.needs, &mut self.client)
                .at(|| place("clusters", &cluster.name, i))
                .map_err(|error| error.to_string())?;
        }
        self.clusters.check_local_cluster().map_err(|error| error.to_string())?;
        // Routes are asked for when the clusters are there.
        self.client.pause(&ResourceType::RouteConfiguration);
        for (i, listener) in listeners.into_iter().enumerate() {
            let name = match listener.name.as_str() {
                "" => format!("listener_{i}"),
                name => name.to_owned(),
            };
            let listener = ListenerProto { name: name.clone(), ..listener };
            let added = self.listeners.add(&listener, &unversioned, false, &mut self.needs, &mut self.client);
            added.at(|| place("listeners", &name, i)).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Runs until the process is to end.
    pub async fn run(mut self, main: MainThread, mut jobs: mpsc::Receiver<Job>) -> io::Result<()> {
        drop(main);
        self.workers.start(self.options.concurrency, &self.shared)?;
        let mut signals = Signals::new()?;
        let mut flush = tokio::time::interval(self.flush_interval);
        for (name, source) in
            self.layers.rtds().map(|(name, source)| (name.to_owned(), source.clone())).collect::<Vec<_>>()
        {
            self.subscribe(
                &source,
                ResourceType::Runtime,
                Interest::Names(vec![name.as_str().into()]),
                Purpose::Runtime(name),
            );
        }
        loop {
            self.progress();
            for (sub, scope) in self.needs.take_fresh() {
                self.counters.add(sub, &scope);
            }
            for (sub, cluster) in self.clusters.take_fresh() {
                self.counters.add_eds(sub, &cluster);
            }
            for sub in self.needs.take_ended().into_iter().chain(self.clusters.take_ended()) {
                self.counters.remove(sub);
            }
            self.counters.follow(&mut self.client);
            if self.should_exit() {
                self.workers.finish();
                return Ok(());
            }
            let due = self.next_due();
            tokio::select! {
                event = self.client.next() => self.on_event(event),
                Some(event) = self.clusters.next() => self.clusters.on_discovery(event),
                Some(job) = jobs.recv() => job(&mut self),
                signal = signals.next() => self.on_signal(signal),
                _ = flush.tick() => {
                    self.shared.stats.flush();
                    self.layers.refresh(&self.shared.runtime);
                    self.stats.renew(&self.shared);
                }
                () = until(due) => {}
            }
        }
    }

    /// Moves start-up on, and does what time has made due.
    fn progress(&mut self) {
        let now = Instant::now();
        if self.phase == Phase::Runtime && self.waiting.is_empty() {
            self.phase = Phase::Clusters;
            if let Some(source) = self.dynamic.clusters.clone() {
                self.subscribe(&source, ResourceType::Cluster, Interest::Wildcard, Purpose::Clusters);
            }
        }
        self.clusters.activate(now, &mut self.needs, &mut self.client);
        if self.phase == Phase::Clusters && self.waiting.is_empty() && self.clusters.initialized() {
            self.phase = Phase::Listeners;
            self.client.resume(&ResourceType::RouteConfiguration);
            self.shared.set_phase(ServerState::Initializing);
            tracing::info!(target: "upstream", "cm init: all clusters initialized");
            if let Some(source) = self.dynamic.listeners.clone() {
                self.subscribe(&source, ResourceType::Listener, Interest::Wildcard, Purpose::Listeners);
            }
        }
        if self.phase == Phase::Listeners
            && self.waiting.is_empty()
            && self.listeners.all_settled(&self.needs)
        {
            tracing::info!(target: "main", "all dependencies initialized. starting workers");
            self.phase = Phase::Live;
            self.listeners.stats().workers_started().set(1);
            self.shared.set_phase(ServerState::Live);
            crate::memory::give_back();
            self.stats.initialized(self.shared.start.elapsed());
            if self.options.mode == Mode::InitOnly {
                self.exit = Some(Exit::Now);
                return;
            }
        }
        if self.phase == Phase::Live {
            let orders = self.listeners.activate(now, &self.needs);
            self.workers.send(orders);
            let orders = self.listeners.expire(now, &mut self.needs, &mut self.client);
            self.workers.send(orders);
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let exit = match self.exit {
            // A drain ends early when the last connection goes, which nobody tells us.
            Some(Exit::Draining(until)) => Some(until.min(Instant::now() + Duration::from_millis(50))),
            _ => None,
        };
        [exit, self.listeners.next_expiry(), self.clusters.next_due()].into_iter().flatten().min()
    }

    fn should_exit(&self) -> bool {
        match self.exit {
            None => false,
            Some(Exit::Now) => true,
            Some(Exit::Draining(until)) => Instant::now() >= until || self.workers.connections() == 0,
        }
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

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Update(update) => {
                let rejected = self.apply(&update);
                for rejection in &rejected {
                    tracing::warn!(
                        target: "config",
                        "{} '{}' rejected: {}", update.kind.url(), rejection.name, rejection.reason
                    );
                }
                self.client.applied(update.token, rejected);
                self.waiting.retain(|sub| *sub != update.sub);
            }
            Event::Failed { sub, failure } => {
                tracing::warn!(target: "config", "subscription failed: {failure:?}");
                self.waiting.retain(|waiting| *waiting != sub);
                if let Some(needed) = self.needs.settle(sub) {
                    if let Slot::Filter { stats, .. } = &needed.slot {
                        stats.config_fail().inc();
                    }
                } else {
                    self.clusters.fetch_failed(sub);
                }
            }
            Event::Connected { .. } => {}
            Event::Disconnected { target, code, message, .. } => {
                tracing::warn!(
                    target: "config",
                    "gRPC config stream to {target} closed: {code}, {message}"
                );
            }
        }
    }

    fn apply(&mut self, update: &Update) -> Vec<Rejection> {
        match self.purposes.get(&update.sub).cloned() {
            Some(Purpose::Clusters) => self.apply_clusters(update),
            Some(Purpose::Listeners) => self.apply_listeners(update),
            Some(Purpose::Runtime(name)) => self.apply_runtime(&name, update),
            None if update.kind == ResourceType::ClusterLoadAssignment => {
                let allow_unknown = self.allow_unknown();
                self.clusters.apply_endpoints(update, allow_unknown)
            }
            None => self.apply_needed(update),
        }
    }

    fn apply_clusters(&mut self, update: &Update) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        let decoded =
            self.decode_all::<ClusterProto>(update, "envoy.config.cluster.v3.Cluster", &mut rejected);
        // A cluster that is refused below is not one that the response leaves out.
        let unreadable = !rejected.is_empty();
        for (resource, proto) in decoded {
            let result = self.clusters.add(
                &proto,
                resource.body.clone(),
                &resource.version,
                true,
                &mut self.needs,
                &mut self.client,
            );
            note(&mut rejected, resource, result);
        }
        for name in self.removals(update, unreadable) {
            self.clusters.remove(&name, &mut self.needs, &mut self.client);
        }
        if rejected.is_empty() {
            self.versions.clusters = Arc::clone(&update.version);
        }
        rejected
    }

    fn apply_listeners(&mut self, update: &Update) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        let decoded =
            self.decode_all::<ListenerProto>(update, "envoy.config.listener.v3.Listener", &mut rejected);
        // Removals first, so that another listener can take the address over.
        let now = Instant::now();
        for name in self.removals(update, !rejected.is_empty()) {
            let orders = self.listeners.remove(&name, now, &mut self.needs, &mut self.client);
            self.workers.send(orders);
        }
        for (resource, proto) in decoded {
            let result =
                self.listeners.add(&proto, &resource.version, true, &mut self.needs, &mut self.client);
            note(&mut rejected, resource, result);
        }
        if rejected.is_empty() {
            self.versions.listeners = Arc::clone(&update.version);
        }
        rejected
    }

    /// What an update removes. A response that cannot be read as a whole removes nothing: what it leaves out may be what
    /// could not be read. Its removals are made up for by the next good response.
    fn removals(&mut self, update: &Update, unreadable: bool) -> Vec<Arc<str>> {
        let waiting = self.removals_waiting.entry(update.kind.clone()).or_default();
        waiting.extend(update.removed.iter().cloned());
        if unreadable {
            return Vec::new();
        }
        let held: HashSet<Arc<str>> =
            self.client.core().held(&update.kind).map(|held| Arc::clone(&held.resource.name)).collect();
        let offered: HashSet<&Arc<str>> = update.resources.iter().map(|resource| &resource.name).collect();
        let mut removed = std::mem::take(waiting);
        removed.retain(|name| !held.contains(name) && !offered.contains(name));
        removed
    }

    /// Walks and decodes all resources of an update.
    fn decode_all<'u, M: prost::Message + Default>(
        &self,
        update: &'u Update,
        type_name: &str,
        rejected: &mut Vec<Rejection>,
    ) -> Vec<(&'u Resource, M)> {
        let mut decoded = Vec::with_capacity(update.resources.len());
        for resource in &update.resources {
            match self.decode(resource, type_name) {
                Ok(proto) => decoded.push((resource, proto)),
                Err(error) => note(rejected, resource, Err(error)),
            }
        }
        decoded
    }

    fn apply_runtime(&mut self, layer: &str, update: &Update) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        for resource in &update.resources {
            let result =
                self.decode::<RuntimeProto>(resource, "envoy.service.runtime.v3.Runtime").map(|proto| {
                    self.layers.set_rtds(layer, proto.layer.as_ref());
                });
            note(&mut rejected, resource, result);
        }
        if !update.removed.is_empty() {
            self.layers.set_rtds(layer, None);
        }
        self.layers.apply(&self.shared.runtime);
        rejected
    }

    /// A resource that others refer to.
    fn apply_needed(&mut self, update: &Update) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        if update.kind == ResourceType::ScopedRouteConfiguration {
            let scopes = self.decode_all::<ScopedRouteConfiguration>(update, SCOPE, &mut rejected);
            rejected.extend(self.needs.apply_scopes(update, scopes, &self.shared, &mut self.client));
        }
        if update.kind == ResourceType::VirtualHost {
            let hosts = self.decode_all::<VirtualHost>(update, VIRTUAL_HOST, &mut rejected);
            rejected.extend(self.needs.apply_virtual_hosts(update, hosts, &self.shared));
            return rejected;
        }
        for resource in &update.resources {
            let result = self.apply_one(update.sub, resource);
            note(&mut rejected, resource, result);
        }
        if update.kind == ResourceType::RouteConfiguration {
            self.needs.count_scopes();
        }
        // An answer without the resource says that it does not exist. A refused one is not waited for either: what refers
        // to it starts without, as in Envoy.
        if let Some(needed) = self.needs.settle(update.sub)
            && let Slot::Filter { places, stats } = &needed.slot
        {
            if !rejected.is_empty() {
                stats.config_fail().inc();
            } else if !update.resources.is_empty() {
                stats.config_reload().inc();
            } else if !update.removed.is_empty() {
                places.iter().for_each(|place| place.set(None));
                needed.dumped = None;
            }
        }
        rejected
    }

    fn apply_one(&mut self, sub: SubId, resource: &Resource) -> Result<(), ConfigError> {
        let Some(slot) = self.needs.slot(sub) else {
            return Ok(());
        };
        let result = match slot {
            Slot::Route { .. } => self
                .decode::<RouteConfiguration>(resource, "envoy.config.route.v3.RouteConfiguration")
                .and_then(|proto| {
                    let table = crate::manager::routes::compile(&proto, false, &self.shared)?;
                    let vhds = proto.vhds.as_ref();
                    self.needs.apply_routes(sub, table, vhds, &self.shared, &mut self.client)
                }),
            Slot::Secret(cell) => self
                .decode::<SecretProto>(resource, "envoy.extensions.transport_sockets.tls.v3.Secret")
                .and_then(|proto| Secret::compile(&proto))
                .map(|secret| cell.set(Some(Arc::new(secret)))),
            // These are applied together.
            Slot::Scopes(_) => return Ok(()),
            Slot::Filter { places, .. } => self
                .decode::<core::TypedExtensionConfig>(resource, "envoy.config.core.v3.TypedExtensionConfig")
                .and_then(|config| configure(places, &config)),
        };
        if let Some(needed) = self.needs.by_sub(sub) {
            let version = Arc::clone(&resource.version);
            match &result {
                Ok(()) => needed.dumped = Some(Dumped::accepted(resource.body.clone(), version)),
                Err(error) => {
                    Dumped::refuse(&mut needed.dumped, resource.body.clone(), version, error.to_string());
                }
            }
        }
        result
    }

    fn allow_unknown(&self) -> bool {
        !self.options.reject_unknown_dynamic_fields
    }

    /// Walks and decodes a dynamic resource.
    fn decode<M: prost::Message + Default>(
        &self,
        resource: &Resource,
        type_name: &str,
    ) -> Result<M, ConfigError> {
        let message =
            Message::find(type_name).ok_or_else(|| ConfigError::new(format!("unknown type {type_name}")))?;
        let policy = Policy { allow_unknown: self.allow_unknown(), ..Policy::default() };
        let report = check(message, &resource.body, policy)?;
        for unknown in &report.unknown {
            self.stats.unknown_dynamic_field();
            if !self.options.ignore_unknown_dynamic_fields {
                tracing::warn!(target: "config", "{} '{}': {unknown}", message.name(), resource.name);
            }
        }
        if !self.options.skip_deprecated_logs {
            for deprecated in &report.deprecated {
                tracing::warn!(target: "config", "{} '{}': {deprecated}", message.name(), resource.name);
            }
        }
        for ignored in &report.ignored {
            tracing::debug!(target: "config", "{} '{}': {ignored}", message.name(), resource.name);
        }
        M::decode(resource.body.clone()).map_err(|error| ConfigError::new(error.to_string()))
    }

    fn on_signal(&mut self, signal: Signal) {
        match signal {
            Signal::Terminate(name) => {
                tracing::warn!(target: "main", "caught {name}");
                match self.exit {
                    None => {
                        let drain = self.options.shutdown_drain_time;
                        self.exit = Some(Exit::Draining(Instant::now() + drain));
                        let orders = self.listeners.stop(false, true);
                        self.workers.send(orders);
                    }
                    // A second signal means it.
                    Some(_) => self.exit = Some(Exit::Now),
                }
            }
            Signal::ReopenLogs => {
                self.shared.access_logs.reopen();
                if let Err(error) = crate::log::reopen() {
                    tracing::error!(target: "main", "cannot reopen the log: {error}");
                }
            }
            Signal::HangUp => {
                tracing::warn!(target: "main", "caught and eating SIGHUP. See documentation for how to hot restart.")
            }
        }
    }
}

/// What the admin interface and the command line ask.
impl Server {
    /// Unknown fields that the bootstrap was allowed to have.
    pub fn count_unknown_static(&self, count: u64) {
        self.stats.unknown_static_fields(count);
    }

    /// `/runtime_modify`; `false` without an admin layer.
    pub fn modify_runtime(&mut self, changes: &[(String, String)]) -> bool {
        let modified = self.layers.modify(changes);
        if modified {
            self.layers.apply(&self.shared.runtime);
        }
        modified
    }

    /// `/healthcheck/fail` and `/healthcheck/ok`.
    pub fn fail_health_check(&mut self, fail: bool) {
        self.shared.fail_health_check(fail);
        self.stats.live(!fail);
    }

    /// `/quitquitquit`.
    pub fn quit(&mut self) {
        self.exit = Some(Exit::Now);
    }

    /// `/drain_listeners`.
    pub fn drain_listeners(&mut self, skip_exit: bool, inbound_only: bool) {
        let orders = if skip_exit {
            self.listeners.drain_connections(inbound_only)
        } else {
            self.listeners.stop(inbound_only, false)
        };
        self.workers.send(orders);
    }

    /// Names and bound addresses.
    pub fn listener_addresses(&self) -> Vec<(String, Vec<Address>)> {
        let active = self.listeners.active().filter_map(|running| {
            let sockets = running.sockets.as_ref()?;
            Some((running.listener.name.to_string(), sockets.local_addresses()))
        });
        active.collect()
    }

    /// What start-up or an update still waits for.
    pub fn unready(&self) -> Vec<(String, Vec<String>)> {
        let listeners = self.listeners.unready(&self.needs).map(|(name, targets)| {
            (format!("listener {name}"), targets.into_iter().map(str::to_owned).collect())
        });
        let clusters = self.clusters.unready().map(|name| (format!("cluster {name}"), Vec::new()));
        listeners.chain(clusters).collect()
    }

    /// `/certs`.
    pub fn certificates(&self) -> Vec<admin_pb::Certificate> {
        let live = self.shared.secrets.live();
        live.iter().filter_map(|cell| cell.get()).filter_map(|secret| secret.describe()).collect()
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
            .map(|(_, name, dumped)| ResourceDump {
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
                Slot::Secret(_) => secrets.push(dump),
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

fn note(rejected: &mut Vec<Rejection>, resource: &Resource, result: Result<(), ConfigError>) {
    if let Err(error) = result {
        rejected.push(Rejection { name: Arc::clone(&resource.name), reason: error.to_string() });
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
