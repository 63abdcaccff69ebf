//! Dynamic resources: from the response of a management server to the managers, and the refusals back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterProto;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerProto;
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, ScopedRouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as SecretProto;
use envoy_types::pb::envoy::service::runtime::v3::Runtime as RuntimeProto;
use prost::Message as _;
use waystation_schema::{ConfigError, Message, Policy, check};
use waystation_tls::Secret;
use waystation_xds::{Event, Failure, Rejection, Resource, ResourceType, SubId, Update, Via};

use super::{Configuration, Purpose};
use crate::manager::needs::{Slot, configure};
use crate::manager::offered::Offered;
use crate::manager::{self, dump::Dumped};

const VIRTUAL_HOST: &str = "envoy.config.route.v3.VirtualHost";
const SCOPE: &str = "envoy.config.route.v3.ScopedRouteConfiguration";

impl Configuration {
    pub(super) fn on_event(&mut self, event: Event) {
        match event {
            Event::Update(update) => {
                let rejected = self.apply_update(&update);
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
                match &failure {
                    Failure::FetchTimeout => {
                        tracing::warn!(target: "config", "a subscription's initial fetch timed out");
                    }
                    Failure::Rejected(reason) => {
                        tracing::warn!(target: "config", "update rejected: {reason}")
                    }
                    Failure::Unreadable => {}
                }
                self.waiting.retain(|waiting| *waiting != sub);
                self.needs.give_up_virtual_hosts(sub, &mut self.client);
                if let Some(needed) = self.needs.settle(sub) {
                    if let Slot::Filter { stats, .. } = &needed.slot {
                        stats.config_fail().inc();
                    }
                } else {
                    self.clusters.fetch_failed(sub);
                }
            }
            Event::Connected { .. } => {}
            Event::Disconnected { via, target, code, message, .. } => match via {
                Via::Stream(method) => {
                    let name = method.rsplit('/').next().unwrap_or(method);
                    tracing::warn!(
                        target: "config",
                        "{name} gRPC config stream to {target} closed: {code}, {message}"
                    );
                }
                Via::File => tracing::warn!(
                    target: "config",
                    "Filesystem config update failure: in {target}, {message}"
                ),
                Via::Poll(path) => {
                    tracing::warn!(target: "config", "REST update for {path} failed: {target}: {message}");
                }
            },
        }
    }

    fn apply_update(&mut self, update: &Update) -> Vec<Rejection> {
        match self.purposes.get(&update.sub).cloned() {
            Some(Purpose::Clusters) => self.apply_clusters(update),
            Some(Purpose::Listeners) => self.apply_listeners(update),
            Some(Purpose::Runtime(name)) => self.apply_runtime(&name, update),
            None if self.on_demand.owns(update.sub) => {
                let rejected = self.apply_clusters(update);
                let names = update.resources.iter().map(|resource| &resource.name);
                self.on_demand.answered(update.sub, names, &update.removed, &mut self.client);
                rejected
            }
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
            let result = self.clusters.add(offered(resource, &proto), &mut self.needs, &mut self.client);
            note(&mut rejected, resource, result);
        }
        for name in self.removals(update, unreadable) {
            self.clusters.remove(&name, &mut self.needs, &mut self.client);
            self.outliers.watch(&name, Instant::now(), &self.clusters);
        }
        if rejected.is_empty() && !self.on_demand.owns(update.sub) {
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
            self.orders.extend(orders);
        }
        for (resource, proto) in decoded {
            let result = self.listeners.add(offered(resource, &proto), &mut self.needs, &mut self.client);
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
        if unreadable || waiting.is_empty() {
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
            let result = self
                .decode::<RuntimeProto>(resource, "envoy.service.runtime.v3.Runtime")
                .and_then(|proto| self.layers.set_rtds(layer, proto.layer.as_ref()));
            note(&mut rejected, resource, result);
        }
        if !update.removed.is_empty() {
            self.layers.clear_rtds(layer);
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
            rejected.extend(self.needs.apply_virtual_hosts(update, hosts, &self.shared, &mut self.client));
            return rejected;
        }
        for resource in &update.resources {
            let result = self.apply_one(update.sub, resource);
            note(&mut rejected, resource, result);
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
            Slot::Secret { cell, .. } => self
                .decode::<SecretProto>(resource, "envoy.extensions.transport_sockets.tls.v3.Secret")
                .and_then(|proto| Secret::compile(&proto))
                .and_then(|secret| {
                    self.secret_files.watch(sub, secret.watched())?;
                    cell.set(Some(Arc::new(secret)));
                    Ok(())
                }),
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

    /// Reads secrets again of which a file was replaced. One that cannot be used leaves the last good one in force.
    pub(super) fn reload_secrets(&mut self) {
        for sub in self.secret_files.take_moved() {
            let Some(needed) = self.needs.by_sub(sub) else { continue };
            let (Slot::Secret { cell, stats }, Some(dumped)) = (&needed.slot, &needed.dumped) else {
                continue;
            };
            let proto = SecretProto::decode(dumped.wire.clone());
            let read = proto.map_err(|error| ConfigError::new(error.to_string()));
            match read.and_then(|proto| Secret::compile(&proto)) {
                Ok(secret) => cell.set(Some(Arc::new(secret))),
                Err(error) => {
                    stats.key_rotation_failed().inc();
                    tracing::warn!(target: "secret", "failed to reload secret '{}': {error}", needed.name);
                }
            }
        }
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
        self.layers.deprecated_features_used(report.deprecated.len() as u64);
        if !self.options.skip_deprecated_logs {
            for deprecated in &report.deprecated {
                tracing::warn!(target: "config", "{} '{}': {deprecated}", message.name(), resource.name);
            }
        }
        for ignored in &report.ignored {
            tracing::debug!(target: "config", "{} '{}': {ignored}", message.name(), resource.name);
        }
        manager::decode(message, &resource.body)
    }
}

fn offered<'a, M>(resource: &'a Resource, proto: &'a M) -> Offered<'a, M> {
    Offered { proto, wire: resource.body.clone(), version: &resource.version, dynamic: true }
}

fn note(rejected: &mut Vec<Rejection>, resource: &Resource, result: Result<(), ConfigError>) {
    if let Err(error) = result {
        rejected.push(Rejection { name: Arc::clone(&resource.name), reason: error.to_string() });
    }
}
