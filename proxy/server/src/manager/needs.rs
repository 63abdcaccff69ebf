//! Resources that others refer to: route configurations and secrets, subscribed to as long as somebody holds them.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::cell::Cell;
use waystation_route::RouteTable;
use waystation_schema::ConfigError;
use waystation_stats::Scope;
use waystation_tls::Secret;
use waystation_xds::{Client, Interest, ResourceType, SubId, SubscriptionSpec};

use super::dump::Dumped;
use crate::config_source;
use crate::context::{Need, resource_key};

/// Where a resource goes when it arrives.
#[derive(Clone, Debug)]
pub enum Slot {
    /// A route configuration.
    Route(Arc<Cell<RouteTable>>),
    /// A secret.
    Secret(Arc<Cell<Secret>>),
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
        let (Need::Route { scope, .. } | Need::Secret { scope, .. }) = need;
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
        needs.iter().all(|need| self.by_key.get(&parts(need).0).is_some_and(|needed| needed.settled))
    }

    /// Those of `needs` that are still waited for, by name, for `/init_dump`.
    pub fn unsettled<'a>(&'a self, needs: &'a [Need]) -> impl Iterator<Item = &'a str> {
        let waiting = needs.iter().filter_map(|need| self.by_key.get(&parts(need).0));
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
    }
}
