//! Resources that others refer to: route configurations and secrets, subscribed to as long as somebody holds them.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use prost::Message as _;
use waystation_filter_api::cell::Cell;
use waystation_route::RouteTable;
use waystation_schema::ConfigError;
use waystation_stats::{Scope, stats_group};
use waystation_tls::Secret;
use waystation_xds::{Client, Interest, ResourceType, SubId, SubscriptionSpec};

use super::dump::Dumped;
use crate::config_source;
use crate::context::{Need, resource_key};
use crate::http::filters::discovered::DiscoveredFilter;

stats_group! {
    /// `extension_config_discovery.http_filter.<name>.`
    pub struct DiscoveryStats {
        counters { config_conflict, config_fail, config_reload }
        gauges {}
        histograms {}
    }
}

/// Where a resource goes when it arrives.
#[derive(Clone, Debug)]
pub enum Slot {
    /// A route configuration.
    Route(Arc<Cell<RouteTable>>),
    /// A secret.
    Secret(Arc<Cell<Secret>>),
    /// The configuration of a filter: one place for each holder, so that a chain that an update of its listener keeps has
    /// its places here twice.
    Filter {
        /// The places.
        places: Vec<Arc<DiscoveredFilter>>,
        /// What they count.
        stats: Arc<DiscoveryStats>,
    },
}

impl Slot {
    /// What identifies the slot among all needs.
    fn key(kind: &'static str, source: &core::ConfigSource, name: &str) -> String {
        format!("{kind}/{}", resource_key(source, name))
    }
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
    holders: usize,
}

/// All needed resources.
#[derive(Debug, Default)]
pub struct Needs {
    by_key: HashMap<String, Needed>,
    by_sub: HashMap<SubId, String>,
    /// Subscriptions that are not counted yet.
    fresh: Vec<(SubId, Scope)>,
    /// Subscriptions that are over.
    ended: Vec<SubId>,
}

impl Needs {
    /// Takes one more reference to each of `needs`, subscribing to those that nobody held.
    pub fn hold(&mut self, needs: &[Need], client: &mut Client) -> Result<(), ConfigError> {
        for (i, need) in needs.iter().enumerate() {
            if let Err(error) = self.hold_one(need, client) {
                self.release(&needs[..i], client);
                return Err(error);
            }
        }
        Ok(())
    }

    fn hold_one(&mut self, need: &Need, client: &mut Client) -> Result<(), ConfigError> {
        let (key, kind, source, name, slot) = parts(need);
        if let Some(needed) = self.by_key.get_mut(&key) {
            needed.holders += 1;
            needed.join(need);
            return Ok(());
        }
        let (source, init_fetch_timeout) = config_source::compile(source)?;
        let spec = SubscriptionSpec {
            kind,
            source,
            interest: Interest::Names(vec![name.as_str().into()]),
            init_fetch_timeout,
        };
        let sub = client.subscribe(spec).map_err(|error| ConfigError::new(error.to_string()))?;
        self.by_sub.insert(sub, key.clone());
        let (Need::Route { scope, .. } | Need::Secret { scope, .. } | Need::Filter { scope, .. }) = need;
        self.fresh.push((sub, scope.clone()));
        let needed = Needed { name: name.clone(), slot, sub, settled: false, dumped: None, holders: 1 };
        self.by_key.insert(key, needed);
        Ok(())
    }

    /// Gives the references back; what nobody holds any more is unsubscribed from.
    pub fn release(&mut self, needs: &[Need], client: &mut Client) {
        for need in needs {
            let (key, ..) = parts(need);
            let Some(needed) = self.by_key.get_mut(&key) else {
                continue;
            };
            needed.holders -= 1;
            needed.leave(need);
            if needed.holders == 0 {
                client.unsubscribe(needed.sub);
                self.ended.push(needed.sub);
                self.by_sub.remove(&needed.sub);
                self.by_key.remove(&key);
            }
        }
    }

    /// Whether all of them have arrived, or are not waited for any longer.
    pub fn settled(&self, needs: &[Need]) -> bool {
        needs
            .iter()
            .filter(|need| need.is_awaited())
            .all(|need| self.by_key.get(&parts(need).0).is_some_and(|needed| needed.settled))
    }

    /// Those of `needs` that are still waited for, by name, for `/init_dump`.
    pub fn unsettled<'a>(&'a self, needs: &'a [Need]) -> impl Iterator<Item = &'a str> {
        let awaited = needs.iter().filter(|need| need.is_awaited());
        let waiting = awaited.filter_map(|need| self.by_key.get(&parts(need).0));
        waiting.filter(|needed| !needed.settled).map(|needed| needed.name.as_str())
    }

    /// New subscriptions, to be counted below their scopes.
    pub fn take_fresh(&mut self) -> Vec<(SubId, Scope)> {
        std::mem::take(&mut self.fresh)
    }

    /// Subscriptions that are over: their counters go.
    pub fn take_ended(&mut self) -> Vec<SubId> {
        std::mem::take(&mut self.ended)
    }

    /// The needed resource that a subscription is for.
    pub fn by_sub(&mut self, sub: SubId) -> Option<&mut Needed> {
        self.by_key.get_mut(self.by_sub.get(&sub)?)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Needed> {
        self.by_key.values()
    }
}

impl Needed {
    /// One more place for a configuration that may be here already.
    fn join(&mut self, need: &Need) {
        let (Slot::Filter { places, stats }, Need::Filter { place, .. }) = (&mut self.slot, need) else {
            return;
        };
        let known = places.iter().any(|known| Arc::ptr_eq(known, place));
        places.push(Arc::clone(place));
        let Some(dumped) = self.dumped.as_ref().filter(|dumped| !known && !dumped.wire.is_empty()) else {
            return;
        };
        let config = core::TypedExtensionConfig::decode(dumped.wire.clone()).ok();
        let Some(any) = config.and_then(|config| config.typed_config) else { return };
        match place.factory(&any) {
            Ok(factory) => place.set(Some(factory)),
            Err(error) => {
                stats.config_conflict().inc();
                tracing::warn!(target: "config", "filter configuration '{}' does not fit: {error}", self.name);
            }
        }
    }

    fn leave(&mut self, need: &Need) {
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

fn parts(need: &Need) -> (String, ResourceType, &core::ConfigSource, &String, Slot) {
    match need {
        Need::Route { source, name, cell, .. } => (
            Slot::key("route", source, name),
            ResourceType::RouteConfiguration,
            source,
            name,
            Slot::Route(Arc::clone(cell)),
        ),
        Need::Secret { source, name, cell, .. } => (
            Slot::key("secret", source, name),
            ResourceType::Secret,
            source,
            name,
            Slot::Secret(Arc::clone(cell)),
        ),
        Need::Filter { source, name, place, scope } => (
            Slot::key("filter", source, name),
            ResourceType::ExtensionConfig,
            source,
            name,
            Slot::Filter { places: vec![Arc::clone(place)], stats: Arc::new(scope.group()) },
        ),
    }
}
