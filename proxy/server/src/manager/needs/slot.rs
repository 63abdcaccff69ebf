//! A needed resource, and what identifies it.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::cell::Cell;
use waystation_route::RouteTable;
use waystation_schema::{ConfigError, Message};
use waystation_stats::{Scope, stats_group};
use waystation_tls::Secret;
use waystation_xds::{ResourceType, SubId};

use crate::context::{Need, resource_key, scopes_key};
use crate::http::filters::discovered::DiscoveredFilter;
use crate::manager::on_demand::Waiters;
use crate::manager::scopes::Scopes;
use crate::manager::virtual_hosts::VirtualHosts;
use crate::manager::{self, dump::Dumped};

stats_group! {
    /// `extension_config_discovery.http_filter.<name>.`
    pub struct DiscoveryStats {
        counters { config_conflict, config_fail, config_reload }
        gauges {}
        histograms {}
    }
}

stats_group! {
    /// `sds.<name>.`
    pub struct SecretStats {
        counters { key_rotation_failed }
        gauges {}
        histograms {}
    }
}

/// Where a resource goes when it arrives.
#[derive(Debug)]
pub enum Slot {
    /// A route configuration.
    Route {
        /// Where it goes.
        cell: Arc<Cell<RouteTable>>,
        /// Its virtual hosts by VHDS, if it has any.
        hosts: Option<Box<VirtualHosts>>,
        /// Where the subscription to those is counted.
        scope: Scope,
    },
    /// A set of scopes; nothing while an update is applied to them.
    Scopes(Option<Box<Scopes>>),
    /// A secret.
    Secret {
        /// Where it goes.
        cell: Arc<Cell<Secret>>,
        /// What it counts.
        stats: Box<SecretStats>,
    },
    /// The configuration of a filter: one place for each holder, so that a chain that an update of its listener keeps has
    /// its places here twice.
    Filter {
        /// The places.
        places: Vec<Arc<DiscoveredFilter>>,
        /// What they count.
        stats: Arc<DiscoveryStats>,
    },
}

/// A needed resource.
#[derive(Debug)]
pub struct Needed {
    /// Its name.
    pub name: String,
    /// Where it goes.
    pub slot: Slot,
    /// Its subscription.
    pub sub: SubId,
    /// Whether it has arrived, or will not be waited for any longer.
    pub settled: bool,
    /// For `/config_dump`.
    pub dumped: Option<Dumped>,
    /// Requests that wait for it.
    pub(super) waiters: Waiters,
    pub(super) holders: usize,
}

impl Needed {
    /// One more place for a configuration that may be here already.
    pub(super) fn join(&mut self, need: &Need) {
        let (Slot::Filter { places, stats }, Need::Filter { place, .. }) = (&mut self.slot, need) else {
            return;
        };
        let known = places.iter().any(|known| Arc::ptr_eq(known, place));
        places.push(Arc::clone(place));
        let Some(dumped) = self.dumped.as_ref().filter(|dumped| !known && !dumped.wire.is_empty()) else {
            return;
        };
        let message = Message::find("envoy.config.core.v3.TypedExtensionConfig");
        let config = message
            .and_then(|message| manager::decode::<core::TypedExtensionConfig>(message, &dumped.wire).ok());
        let Some(any) = config.and_then(|config| config.typed_config) else { return };
        match place.factory(&any) {
            Ok(factory) => place.set(Some(factory)),
            Err(error) => {
                stats.config_conflict().inc();
                tracing::warn!(target: "config", "filter configuration '{}' does not fit: {error}", self.name);
            }
        }
    }

    pub(super) fn leave(&mut self, need: &Need) {
        if let (Slot::Filter { places, .. }, Need::Filter { place, .. }) = (&mut self.slot, need)
            && let Some(index) = places.iter().position(|known| Arc::ptr_eq(known, place))
        {
            places.swap_remove(index);
        }
    }
}

/// Has a discovered configuration taken over by all places of a filter, or by none.
pub fn configure(
    places: &[Arc<DiscoveredFilter>],
    config: &core::TypedExtensionConfig,
) -> Result<(), ConfigError> {
    let any = config.typed_config.as_ref();
    let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
    let factories = places.iter().map(|place| place.factory(any)).collect::<Result<Vec<_>, _>>()?;
    for (place, factory) in places.iter().zip(factories) {
        place.set(Some(factory));
    }
    Ok(())
}

/// What identifies a resource among all needs.
pub(super) fn key(need: &Need) -> String {
    match need {
        Need::Route { source, name, .. } => route_key(&resource_key(source, name)),
        Need::Scopes { source, rds, name, .. } => {
            format!("scopes/{}", scopes_key(source, rds.as_deref(), name))
        }
        Need::Secret { source, name, .. } => format!("secret/{}", resource_key(source, name)),
        Need::Filter { source, name, .. } => format!("filter/{}", resource_key(source, name)),
    }
}

/// The same by the name of the cell.
pub(super) fn route_key(cell: &str) -> String {
    format!("route/{cell}")
}

pub(super) fn parts(need: &Need) -> (ResourceType, &core::ConfigSource, &String, Slot) {
    match need {
        Need::Route { source, name, cell, vhds, .. } => {
            let slot = Slot::Route { cell: Arc::clone(cell), hosts: None, scope: vhds.clone() };
            (ResourceType::RouteConfiguration, source, name, slot)
        }
        Need::Scopes { source, rds, name, cell, http, scope } => {
            let scopes = Scopes::new(rds.as_deref().cloned(), Arc::clone(cell), http.clone(), scope);
            (ResourceType::ScopedRouteConfiguration, source, name, Slot::Scopes(Some(Box::new(scopes))))
        }
        Need::Secret { source, name, cell, scope } => {
            let slot = Slot::Secret { cell: Arc::clone(cell), stats: Box::new(scope.group()) };
            (ResourceType::Secret, source, name, slot)
        }
        Need::Filter { source, name, place, scope } => {
            let places = vec![Arc::clone(place)];
            let slot = Slot::Filter { places, stats: Arc::new(scope.group()) };
            (ResourceType::ExtensionConfig, source, name, slot)
        }
    }
}
