//! Clusters: added, warmed, replaced, removed; and the discovery of their endpoints.

mod dump;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use envoy_types::pb::envoy::config::bootstrap::v3 as bootstrap;
use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint_pb;
use prost::Message as _;
use waystation_filter_api::cell::Cell;
use waystation_filter_api::http::LocalCluster;
use waystation_filter_api::wire;
use waystation_schema::{At as _, ConfigError, Message, Policy, check};
use waystation_stats::stats_group;
use waystation_upstream::cluster::{self, Cluster, Discovery, Environment};
use waystation_upstream::discovery::ResolverSettings;
use waystation_upstream::outlier::Report;
use waystation_xds::{Client, Interest, Rejection, ResourceType, SubId, SubscriptionSpec, Update};
use xxhash_rust::xxh64::xxh64;

use super::dump::Dumped;
use super::needs::Needs;
use super::offered::Offered;
use super::warming::Warming;
use crate::config_source;
use crate::context::{CompileContext, Need, Shared};
use crate::dns::{DnsEvent, DnsTasks};
use crate::health::{Checker, HealthChecks};
use crate::http::filters::UpstreamFilters;
use crate::upstream_socket;

stats_group! {
    /// `cluster_manager.`
    ///
    /// Envoy merges the updates that come of health checks and outlier detection alone; here those are in force at once, as
    /// all others are there too. So `cluster_updated_via_merge`, `update_merge_cancelled` and
    /// `update_out_of_merge_window` are 0.
    pub struct ClusterManagerStats {
        counters {
            cluster_added,
            cluster_modified,
            cluster_removed,
            cluster_updated,
            cluster_updated_via_merge,
            update_merge_cancelled,
            update_out_of_merge_window,
        }
        gauges { active_clusters, warming_clusters }
        histograms {}
    }
}

/// A compiled cluster and what keeps it going.
#[derive(Debug)]
struct Live {
    cluster: Arc<Cluster>,
    /// What its hosts are asked.
    checker: Option<Arc<Checker>>,
    /// Its EDS subscription.
    eds: Option<SubId>,
    needs: Vec<Need>,
    /// When its endpoints are too old to be used, unless they are refreshed (`endpoint_stale_after`).
    stale_at: Option<Instant>,
    wire: Bytes,
    version: Arc<str>,
    hash: u64,
}

/// What compiling a cluster gives.
struct Compiled {
    cluster: Cluster,
    checker: Option<Arc<Checker>>,
    eds: Option<SubId>,
    held: Vec<Need>,
}

/// One name.
#[derive(Debug)]
struct Entry {
    cell: Arc<Cell<Cluster>>,
    active: Option<Live>,
    warming: Option<Live>,
    refused: Option<super::dump::Refused>,
    updated: SystemTime,
    dynamic: bool,
}

/// All clusters.
#[derive(Debug)]
pub struct Clusters {
    shared: Arc<Shared>,
    environment: Arc<Environment>,
    local_cluster: String,
    entries: BTreeMap<String, Entry>,
    by_sub: HashMap<SubId, String>,
    warming: Warming,
    /// How often a warming cluster was looked at.
    looks: u64,
    assignments: BTreeMap<String, Dumped>,
    /// EDS subscriptions that are not counted yet.
    fresh: Vec<(SubId, Arc<Cluster>)>,
    /// EDS subscriptions that are over.
    ended: Vec<SubId>,
    /// Clusters that have come into force.
    activated: Vec<String>,
    /// When the endpoints of which subscription are stale, and after how long without an update they are.
    stale: BTreeMap<(Instant, SubId), Duration>,
    dns: DnsTasks,
    health: HealthChecks,
    stats: ClusterManagerStats,
}

/// The cluster that this proxy is a member of.
#[derive(Debug)]
struct OwnCluster(Arc<Cell<Cluster>>);

impl LocalCluster for OwnCluster {
    fn members(&self) -> u64 {
        self.0.with(|cluster| cluster.map_or(0, |cluster| cluster.endpoints().snapshot().len() as u64))
    }
}

impl Clusters {
    /// None yet.
    pub fn new(
        shared: &Arc<Shared>,
        proto: &bootstrap::ClusterManager,
        locality: &core::Locality,
        resolver: ResolverSettings,
        outliers: Arc<Report>,
    ) -> Result<Self, ConfigError> {
        let local_cluster = proto.local_cluster_name.clone();
        let bind = proto.upstream_bind_config.as_ref().map(cluster::BindOptions::compile).transpose();
        let environment = Arc::new(Environment {
            runtime: shared.runtime.clone(),
            locality: waystation_upstream::host::Locality::from_proto(locality),
            local_cluster: Some(&local_cluster)
                .filter(|name| !name.is_empty())
                .map(|name| shared.clusters.cell(name)),
            bind: bind.at(|| "cluster_manager.upstream_bind_config")?,
            resolver,
            outliers,
        });
        if let Some(cell) = &environment.local_cluster {
            // There is one bootstrap; a second would name the same cluster.
            let _ = shared.local_cluster.set(Arc::new(OwnCluster(Arc::clone(cell))));
        }
        let stats: ClusterManagerStats = shared.stats.root().scope("cluster_manager").group();
        Ok(Self {
            dns: DnsTasks::new(stats.cluster_updated().to_owned()),
            health: HealthChecks::new(stats.cluster_updated().to_owned()),
            stats,
            shared: Arc::clone(shared),
            environment,
            local_cluster,
            entries: BTreeMap::new(),
            by_sub: HashMap::new(),
            warming: Warming::default(),
            looks: 0,
            assignments: BTreeMap::new(),
            fresh: Vec::new(),
            ended: Vec::new(),
            activated: Vec::new(),
            stale: BTreeMap::new(),
        })
    }

    /// Envoy refuses a `local_cluster_name` that no static cluster has.
    pub fn check_local_cluster(&self) -> Result<(), ConfigError> {
        if self.local_cluster.is_empty() || self.entries.contains_key(&self.local_cluster) {
            return Ok(());
        }
        Err(ConfigError::new(format!("local cluster '{}' must be defined", self.local_cluster)))
    }

    /// Whether there is a cluster of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Adds or changes a cluster. It serves once it is warm: see [`Self::activate`].
    pub fn add(
        &mut self,
        offered: Offered<'_, pb::Cluster>,
        needs: &mut Needs,
        client: &mut Client,
    ) -> Result<(), ConfigError> {
        let Offered { proto, wire, version, dynamic } = offered;
        let hash = xxh64(&wire, 0);
        if let Some(entry) = self.entries.get(&proto.name) {
            if dynamic && !entry.dynamic {
                // Envoy: a static cluster cannot be changed by CDS; the update is ignored.
                return Ok(());
            }
            let current = entry.warming.as_ref().or(entry.active.as_ref());
            if current.is_some_and(|live| live.hash == hash) {
                return Ok(());
            }
        }
        let live = match self.compile(proto, dynamic, needs, client) {
            Ok(Compiled { cluster, checker, eds, held }) => Live {
                cluster: Arc::new(cluster),
                checker,
                eds,
                needs: held,
                stale_at: None,
                wire,
                version: Arc::clone(version),
                hash,
            },
            Err(error) => {
                if let Some(entry) = self.entries.get_mut(&proto.name) {
                    entry.refused = Some(super::dump::Refused {
                        wire,
                        version: Arc::clone(version),
                        at: SystemTime::now(),
                        details: error.to_string(),
                    });
                }
                return Err(error);
            }
        };
        if let Some(sub) = live.eds {
            self.by_sub.insert(sub, proto.name.clone());
            self.fresh.push((sub, Arc::clone(&live.cluster)));
        }
        let entry = self.entries.entry(proto.name.clone()).or_insert_with(|| Entry {
            cell: self.shared.clusters.cell(&proto.name),
            active: None,
            warming: None,
            refused: None,
            updated: SystemTime::now(),
            dynamic,
        });
        entry.refused = None;
        if entry.active.is_some() || entry.warming.is_some() {
            self.stats.cluster_modified().inc();
        } else {
            self.stats.cluster_added().inc();
        }
        self.dns.start(&live.cluster);
        if let Some(checker) = &live.checker {
            self.health.start(&live.cluster, checker);
        }
        if !dynamic {
            // There is no traffic yet; static routes are checked against the clusters that exist, warm or not.
            entry.cell.set(Some(Arc::clone(&live.cluster)));
        }
        self.warming.insert(&proto.name, live.cluster.wait_for_warm_on_init);
        match entry.warming.replace(live) {
            Some(replaced) => {
                Self::retire(
                    replaced,
                    &mut self.by_sub,
                    &mut self.ended,
                    (&mut self.dns, &mut self.health),
                    needs,
                    client,
                );
            }
            None => self.stats.warming_clusters().add(1),
        }
        Ok(())
    }

    fn compile(
        &mut self,
        proto: &pb::Cluster,
        dynamic: bool,
        needs: &mut Needs,
        client: &mut Client,
    ) -> Result<Compiled, ConfigError> {
        let context = CompileContext::new(&self.shared);
        let root = self.shared.stats.root();
        let stat_name = if proto.alt_stat_name.is_empty() { &proto.name } else { &proto.alt_stat_name };
        let scope = root.scope("cluster").tag("envoy.cluster_name", stat_name);
        let previous = self.entries.get(&proto.name).and_then(|entry| entry.active.as_ref());
        let transport = |socket: &core::TransportSocket| upstream_socket::compile(socket, &scope, &context);
        let cluster = Cluster::compile(
            proto,
            &cluster::CompileContext {
                environment: &self.environment,
                stats: &root,
                transport: &transport,
                route_policies: &|options| super::routes::cluster_policies(options, &self.shared),
                upstream_filters: &|options| UpstreamFilters::compile(options, &scope, &context),
                added_via_api: dynamic,
                previous: previous.map(|live| &live.cluster),
                now: Instant::now(),
            },
        )?;
        let checker = Checker::compile(proto, &cluster, &scope, &self.shared)?;
        let held = context.into_needs();
        needs.hold(&held, client)?;
        let eds = match &cluster.discovery {
            Discovery::Eds(settings) => {
                let mut subscribe = || {
                    self.shared.backing.check(&ResourceType::ClusterLoadAssignment, &settings.source)?;
                    let (source, init_fetch_timeout) = config_source::compile(&settings.source)?;
                    let spec = SubscriptionSpec {
                        kind: ResourceType::ClusterLoadAssignment,
                        source,
                        interest: Interest::Names(vec![(&*settings.resource_name).into()]),
                        init_fetch_timeout,
                    };
                    client.subscribe(spec).map_err(|error| ConfigError::new(error.to_string()))
                };
                match subscribe().at(|| "eds_config").at(|| "eds_cluster_config") {
                    Ok(sub) => Some(sub),
                    Err(error) => {
                        needs.release(&held, client);
                        return Err(error);
                    }
                }
            }
            _ => None,
        };
        Ok(Compiled { cluster, checker, eds, held })
    }

    /// These needs have settled.
    pub fn needs_settled(&mut self, keys: &[String]) {
        keys.iter().for_each(|key| self.warming.settled(key));
    }

    /// Puts every cluster in force whose endpoints and secrets are there, and drops endpoints that are too old.
    pub fn activate(&mut self, now: Instant, needs: &mut Needs, client: &mut Client) {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.expire(now, |sub| {
            let stats = client.core().subscription_stats(sub)?;
            wall.checked_sub(Duration::from_millis(stats.update_time))
        });
        self.health.run();
        if self.dns.missed() {
            self.warming.touch_all();
        }
        for name in self.warming.take_touched() {
            let Some(entry) = self.entries.get_mut(&name) else {
                continue;
            };
            let Some(live) = entry.warming.take_if(|live| {
                self.looks += 1;
                if !is_discovered(&live.cluster) {
                    return false;
                }
                let mut unsettled = needs.unsettled_keys(&live.needs).peekable();
                let is_ready = unsettled.peek().is_none();
                self.warming.wait(&name, unsettled);
                is_ready
            }) else {
                continue;
            };
            self.warming.remove(&name);
            self.stats.warming_clusters().sub(1);
            live.cluster.admission.take_over();
            entry.cell.set(Some(Arc::clone(&live.cluster)));
            entry.updated = SystemTime::now();
            match entry.active.replace(live) {
                Some(old) => Self::retire(
                    old,
                    &mut self.by_sub,
                    &mut self.ended,
                    (&mut self.dns, &mut self.health),
                    needs,
                    client,
                ),
                None => self.stats.active_clusters().add(1),
            }
            self.activated.push(name);
        }
    }

    /// The clusters that have come into force since the last call.
    pub fn take_activated(&mut self) -> Vec<String> {
        std::mem::take(&mut self.activated)
    }

    fn retire(
        live: Live,
        by_sub: &mut HashMap<SubId, String>,
        ended: &mut Vec<SubId>,
        (dns, health): (&mut DnsTasks, &mut HealthChecks),
        needs: &mut Needs,
        client: &mut Client,
    ) {
        if let Some(sub) = live.eds {
            client.unsubscribe(sub);
            by_sub.remove(&sub);
            ended.push(sub);
        }
        dns.stop(&live.cluster);
        health.stop(&live.cluster);
        needs.release(&live.needs, client);
    }

    /// Removes a dynamic cluster; streams that use it finish.
    pub fn remove(&mut self, name: &str, needs: &mut Needs, client: &mut Client) {
        if self.entries.get(name).is_none_or(|entry| !entry.dynamic) {
            return;
        }
        let Some(entry) = self.entries.remove(name) else {
            return;
        };
        entry.cell.set(None);
        self.stats.cluster_removed().inc();
        if let Some(live) = entry.active {
            self.stats.active_clusters().sub(1);
            Self::retire(
                live,
                &mut self.by_sub,
                &mut self.ended,
                (&mut self.dns, &mut self.health),
                needs,
                client,
            );
        }
        if let Some(live) = entry.warming {
            self.warming.remove(name);
            self.stats.warming_clusters().sub(1);
            Self::retire(
                live,
                &mut self.by_sub,
                &mut self.ended,
                (&mut self.dns, &mut self.health),
                needs,
                client,
            );
        }
        self.assignments.remove(name);
    }

    /// Applies EDS resources to the clusters that asked for them.
    pub fn apply_endpoints(&mut self, update: &Update, allow_unknown: bool) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        let now = Instant::now();
        let Some(live) = self.live(update.sub) else {
            return rejected;
        };
        let mut stale_after = None;
        let cluster = Arc::clone(&live.cluster);
        let is_active = self.is_active(&cluster);
        for resource in &update.resources {
            let mut apply = || {
                const ASSIGNMENT: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
                let message = Message::find(ASSIGNMENT)
                    .ok_or_else(|| ConfigError::new(format!("unknown type {ASSIGNMENT}")))?;
                check(message, &resource.body, Policy { allow_unknown, ..Policy::default() })?;
                let proto = endpoint_pb::ClusterLoadAssignment::decode(resource.body.clone())
                    .map_err(|error| ConfigError::new(error.to_string()))?;
                let applied = cluster.apply_eds(&proto, now)?;
                let policy = proto.policy.as_ref();
                stale_after = wire::duration(
                    "policy.endpoint_stale_after",
                    policy.and_then(|policy| policy.endpoint_stale_after.as_ref()),
                )?;
                Ok::<_, ConfigError>(applied)
            };
            match apply() {
                Ok(applied) => {
                    if is_active && applied.rebuilt {
                        self.stats.cluster_updated().inc();
                    }
                    let dumped = Dumped::accepted(resource.body.clone(), Arc::clone(&resource.version));
                    self.assignments.insert(cluster.name().to_owned(), dumped);
                }
                Err(error) => {
                    rejected.push(Rejection { name: Arc::clone(&resource.name), reason: error.to_string() })
                }
            }
        }
        if !update.resources.is_empty() && rejected.is_empty() {
            self.watch_age(update.sub, now, stale_after);
        }
        if (update.resources.is_empty() || !rejected.is_empty()) && !cluster.endpoints().initialized() {
            // The server says that there is no such assignment, or it is refused: no need to wait for it, as in Envoy.
            cluster.assignment_timed_out();
        }
        self.warming.touch(cluster.name());
        rejected
    }

    /// Has the endpoints of a subscription dropped when no update comes within `stale_after`.
    fn watch_age(&mut self, sub: SubId, now: Instant, stale_after: Option<Duration>) {
        let due = stale_after.filter(|after| !after.is_zero()).map(|after| (now + after, after));
        let Some(live) = self.live_mut(sub) else { return };
        if let Some(before) = std::mem::replace(&mut live.stale_at, due.map(|(at, _)| at)) {
            self.stale.remove(&(before, sub));
        }
        if let Some((at, after)) = due {
            self.stale.insert((at, sub), after);
        }
    }

    /// Drops the endpoints that nobody has confirmed for too long. `last_update` tells for how long a subscription has had
    /// no update: one with the same endpoints is not applied again, but it confirms them.
    fn expire(&mut self, now: Instant, last_update: impl Fn(SubId) -> Option<Duration>) {
        while let Some(((at, sub), after)) = self.stale.pop_first() {
            if at > now {
                self.stale.insert((at, sub), after);
                return;
            }
            let Some(cluster) = self.live(sub).map(|live| Arc::clone(&live.cluster)) else { continue };
            match last_update(sub).and_then(|age| after.checked_sub(age)).filter(|rest| !rest.is_zero()) {
                Some(rest) => {
                    self.stale.insert((now + rest, sub), after);
                    if let Some(live) = self.live_mut(sub) {
                        live.stale_at = Some(now + rest);
                    }
                }
                None => {
                    tracing::debug!(target: "upstream", "endpoints of cluster '{}' are stale", cluster.name());
                    if cluster.assignment_stale(now).rebuilt && self.is_active(&cluster) {
                        self.stats.cluster_updated().inc();
                    }
                }
            }
        }
    }

    /// New EDS subscriptions, to be counted.
    pub fn take_fresh(&mut self) -> Vec<(SubId, Arc<Cluster>)> {
        std::mem::take(&mut self.fresh)
    }

    /// Subscriptions that are over: their counters go.
    pub fn take_ended(&mut self) -> Vec<SubId> {
        std::mem::take(&mut self.ended)
    }

    /// A subscription of ours got nothing in time.
    pub fn fetch_failed(&mut self, sub: SubId) {
        if let Some(cluster) = self.live(sub).map(|live| Arc::clone(&live.cluster)) {
            cluster.assignment_timed_out();
            self.warming.touch(cluster.name());
        }
    }

    /// Whether it is this cluster that serves: what one gets while it warms is not counted as an update.
    fn is_active(&self, cluster: &Arc<Cluster>) -> bool {
        let active = self.entries.get(cluster.name()).and_then(|entry| entry.active.as_ref());
        active.is_some_and(|live| Arc::ptr_eq(&live.cluster, cluster))
    }

    fn live(&self, sub: SubId) -> Option<&Live> {
        let entry = self.entries.get(self.by_sub.get(&sub)?)?;
        let both = [entry.warming.as_ref(), entry.active.as_ref()];
        both.into_iter().flatten().find(|live| live.eds == Some(sub))
    }

    fn live_mut(&mut self, sub: SubId) -> Option<&mut Live> {
        let entry = self.entries.get_mut(self.by_sub.get(&sub)?)?;
        let both = [entry.warming.as_mut(), entry.active.as_mut()];
        both.into_iter().flatten().find(|live| live.eds == Some(sub))
    }

    /// The next answer of DNS, or the end of the first round of a cluster's health checks.
    pub async fn next(&mut self) -> Option<DnsEvent> {
        tokio::select! {
            event = self.dns.next() => event,
            cluster = self.health.next() => cluster.map(|cluster| DnsEvent { cluster }),
        }
    }

    /// A cluster got endpoints by itself: it may be warm now, which [`Self::activate`] sees.
    pub fn on_discovery(&mut self, event: DnsEvent) {
        tracing::debug!(target: "upstream", "cluster '{}' has endpoints", event.cluster);
        self.warming.touch(&event.cluster);
    }

    /// Whether every cluster that start-up waits for is in force.
    pub fn initialized(&self) -> bool {
        !self.warming.is_awaited()
    }

    /// When [`Self::activate`] has something to do without an event.
    pub fn next_due(&self) -> Option<Instant> {
        self.stale.first_key_value().map(|((at, _), _)| *at)
    }

    /// Clusters that wait.
    pub fn unready(&self) -> impl Iterator<Item = &str> {
        self.warming.names()
    }

    /// The cluster of this name that is in force.
    pub fn in_force(&self, name: &str) -> Option<&Arc<Cluster>> {
        self.entries.get(name)?.active.as_ref().map(|live| &live.cluster)
    }

    /// Counts an update of hosts that nobody sent.
    pub fn count_update(&self) {
        self.stats.cluster_updated().inc();
    }

    /// The clusters in force, by name.
    pub fn active(&self) -> Vec<Arc<Cluster>> {
        let active = self.entries.values().filter_map(|entry| entry.active.as_ref());
        active.map(|live| Arc::clone(&live.cluster)).collect()
    }
}

/// Whether the cluster has its first endpoints, or needs none, and knows how they are, if it asks.
fn is_discovered(cluster: &Cluster) -> bool {
    let has_endpoints = match &cluster.discovery {
        Discovery::Static | Discovery::OriginalDst(_) => true,
        Discovery::Eds(_) | Discovery::Dns(_) => cluster.endpoints().initialized(),
    };
    has_endpoints && cluster.health_check.as_ref().is_none_or(|check| check.first_round_done())
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::bootstrap::v3::ClusterManager;
    use waystation_schema::{TextOptions, yaml_to_wire};

    use super::*;
    use crate::context::tests::shared;

    /// Each of many clusters becomes warm by an event of its own, and each event costs a look at that cluster alone.
    #[tokio::test]
    async fn warming_is_linear() {
        const COUNT: usize = 10_000;
        let shared = shared();
        let mut client = Client::new(
            waystation_xds::Options { node: Bytes::new(), ads: None, seed: 1, unix_ms: 0 },
            crate::xds_transport::transport(&shared),
        );
        let mut needs = Needs::default();
        let manager = ClusterManager::default();
        let resolver = ResolverSettings::default();
        let mut clusters =
            Clusters::new(&shared, &manager, &core::Locality::default(), resolver, Arc::new(|_| {})).unwrap();
        let template = "{name: c, type: EDS, eds_cluster_config: {eds_config: {resource_api_version: V3, api_config_source: \
                        {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: x}}]}}}}";
        let message = Message::find("envoy.config.cluster.v3.Cluster").unwrap();
        let wire = yaml_to_wire(message, template, TextOptions::default()).unwrap().wire;
        let template = pb::Cluster::decode(&*wire).unwrap();
        let version = Arc::from("1");
        for i in 0..COUNT {
            let proto = pb::Cluster { name: format!("c{i}"), ..template.clone() };
            let wire = proto.encode_to_vec().into();
            let offered = Offered { proto: &proto, wire, version: &version, dynamic: true };
            clusters.add(offered, &mut needs, &mut client).unwrap();
        }
        let now = Instant::now();
        clusters.activate(now, &mut needs, &mut client);
        assert_eq!((clusters.active().len(), clusters.initialized()), (0, false));
        let subs: Vec<SubId> = clusters.take_fresh().into_iter().map(|(sub, _)| sub).collect();
        for sub in subs {
            clusters.fetch_failed(sub);
            clusters.activate(now, &mut needs, &mut client);
        }
        assert_eq!((clusters.active().len(), clusters.initialized()), (COUNT, true));
        assert_eq!(clusters.looks, 2 * COUNT as u64);
    }
}
