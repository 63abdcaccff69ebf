//! Resources that others refer to: route configurations and secrets, subscribed to as long as somebody holds them.

mod slot;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::envoy::config::route::v3::{ScopedRouteConfiguration, Vhds, VirtualHost};
use waystation_filter_api::cell::Cell;
use waystation_route::{RouteTable, ScopeKey};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;
use waystation_xds::{Client, Interest, Rejection, Resource, ResourceType, SubId, SubscriptionSpec, Update};

pub use self::slot::{DiscoveryStats, Needed, SecretStats, Slot, configure};
use self::slot::{key, parts, route_key};
use super::dump::Dumped;
use super::on_demand::Waiters;
use super::scopes::{Changed, ScopeMap};
use super::virtual_hosts::{VirtualHosts, names_of};
use super::warming::Waits;
use crate::config_source::{self, Backing};
use crate::context::{Need, Shared};
use crate::on_demand::{Answer, Reply};

/// All needed resources.
#[derive(Debug, Default)]
pub struct Needs {
    backing: Arc<Backing>,
    by_key: HashMap<String, Needed>,
    by_sub: HashMap<SubId, String>,
    /// Subscriptions that are not counted yet.
    fresh: Vec<(SubId, Scope)>,
    /// Subscriptions that are over.
    ended: Vec<SubId>,
    /// The keys of what has settled, or is not held any more.
    settled: Vec<String>,
    /// The keys of sets of scopes.
    scopes: HashSet<String>,
    /// Which of them wait for which route configurations.
    scoped: Waits,
    /// How often the route configurations of a set were gone through.
    pub(super) looks: u64,
}

impl Needs {
    /// None yet.
    pub fn new(shared: &Shared) -> Self {
        Self { backing: Arc::clone(&shared.backing), ..Self::default() }
    }

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
        let key = key(need);
        if let Some(needed) = self.by_key.get_mut(&key) {
            needed.holders += 1;
            needed.join(need);
            return Ok(());
        }
        let (kind, source, name, slot) = parts(need);
        self.backing.check(&kind, source)?;
        let (source, init_fetch_timeout) = config_source::compile(source)?;
        let spec = SubscriptionSpec {
            kind,
            source,
            interest: match need {
                Need::Scopes { .. } => Interest::Wildcard,
                _ => Interest::Names(vec![name.as_str().into()]),
            },
            init_fetch_timeout,
        };
        let sub = client.subscribe(spec).map_err(|error| ConfigError::new(error.to_string()))?;
        self.by_sub.insert(sub, key.clone());
        let (Need::Route { scope, .. }
        | Need::Scopes { scope, .. }
        | Need::Secret { scope, .. }
        | Need::Filter { scope, .. }) = need;
        self.fresh.push((sub, scope.clone()));
        let waiters = Waiters::default();
        let needed =
            Needed { name: name.clone(), slot, sub, settled: false, dumped: None, waiters, holders: 1 };
        if matches!(needed.slot, Slot::Scopes(_)) {
            self.scopes.insert(key.clone());
        }
        self.by_key.insert(key, needed);
        Ok(())
    }

    /// Gives the references back; what nobody holds any more is unsubscribed from.
    pub fn release(&mut self, needs: &[Need], client: &mut Client) {
        for need in needs {
            let key = key(need);
            let Some(needed) = self.by_key.get_mut(&key) else {
                continue;
            };
            needed.holders -= 1;
            needed.leave(need);
            if needed.holders == 0 {
                client.unsubscribe(needed.sub);
                self.ended.push(needed.sub);
                self.by_sub.remove(&needed.sub);
                let gone = self.by_key.remove(&key).map(|needed| needed.slot);
                self.tell_settled(&key);
                match gone {
                    Some(Slot::Scopes(Some(scopes))) => {
                        self.scopes.remove(&key);
                        self.scoped.forget(&key);
                        let routes: Vec<Need> = scopes.held().cloned().collect();
                        self.release(&routes, client);
                    }
                    Some(Slot::Route { hosts: Some(hosts), .. }) => self.end(hosts.sub, client),
                    _ => {}
                }
            }
        }
    }

    /// The keys of those of `needs` that are still waited for; [`Self::take_settled`] tells of their arrival.
    pub fn unsettled_keys<'a>(&'a self, needs: &'a [Need]) -> impl Iterator<Item = String> + 'a {
        needs.iter().filter(|need| need.is_awaited() && !self.has_settled(need)).map(key)
    }

    /// The keys of what has settled since this was called, or is not held any more.
    pub fn take_settled(&mut self) -> Vec<String> {
        std::mem::take(&mut self.settled)
    }

    fn has_settled(&self, need: &Need) -> bool {
        self.is_complete(&key(need))
    }

    fn is_complete(&self, key: &str) -> bool {
        self.by_key.get(key).is_some_and(|needed| {
            needed.settled
                && match &needed.slot {
                    // Scopes are there when their route configurations are.
                    Slot::Scopes(_) => !self.scoped.is_waiting(key),
                    Slot::Route { hosts: Some(hosts), .. } => hosts.settled,
                    _ => true,
                }
        })
    }

    /// Something has come, or gone: if nothing is missing now, tells those who wait for it.
    fn tell_settled(&mut self, key: &str) {
        if self.by_key.contains_key(key) && !self.is_complete(key) {
            return;
        }
        self.settled.push(key.to_owned());
        for scopes in self.scoped.settled(key) {
            self.await_routes(&scopes);
            self.tell_settled(&scopes);
        }
    }

    /// Has a set of scopes wait for those of its route configurations that are missing.
    fn await_routes(&mut self, scopes: &str) {
        let Some(Slot::Scopes(Some(set))) = self.by_key.get(scopes).map(|needed| &needed.slot) else {
            return;
        };
        self.looks += 1;
        let missing: Vec<String> = set.awaited().map(key).filter(|key| !self.is_complete(key)).collect();
        self.scoped.wait(scopes, missing);
    }

    /// Nothing has come for a subscription in time: what waits for it goes on without. What has been refused or was
    /// never there is not waited for either.
    pub fn settle(&mut self, sub: SubId) -> Option<&mut Needed> {
        let key = self.by_sub.get(&sub)?.clone();
        let needed = self.by_key.get_mut(&key)?;
        match &mut needed.slot {
            Slot::Route { hosts: Some(hosts), .. } if hosts.sub == sub => hosts.settled = true,
            _ => {
                needed.settled = true;
                needed.waiters.answer(Answer::Found);
            }
        }
        self.tell_settled(&key);
        self.by_key.get_mut(&key)
    }

    /// Applies an update to a set of scopes; `resources` are those that could be read.
    pub fn apply_scopes(
        &mut self,
        update: &Update,
        resources: Vec<(&Resource, ScopedRouteConfiguration)>,
        shared: &Arc<Shared>,
        client: &mut Client,
    ) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        let Some(Slot::Scopes(slot)) = self.by_sub(update.sub).map(|needed| &mut needed.slot) else {
            return rejected;
        };
        let Some(mut scopes) = slot.take() else { return rejected };
        let mut changed = Changed::default();
        scopes.remove(&update.removed, &mut changed);
        let replaced = scopes.take(resources.iter().map(|(_, proto)| &*proto.name));
        let mut refused = Vec::new();
        for (resource, proto) in resources {
            let inserted = scopes.insert(&proto, &resource.body, shared, &mut changed).and_then(|()| {
                let hold = std::mem::take(&mut changed.hold);
                // Nothing is held for it that would have to be given back.
                self.hold(&hold, client).inspect_err(|_| scopes.discard(&proto.name))
            });
            if let Err(error) = inserted {
                let reason = error.to_string();
                rejected.push(Rejection { name: Arc::clone(&resource.name), reason });
                refused.push(proto.name);
            }
        }
        for (name, error) in scopes.settle(replaced, refused.into_iter(), &mut changed) {
            rejected.push(Rejection { name: name.into(), reason: error.to_string() });
        }
        scopes.publish();
        // What is held and released in one update keeps its subscription.
        self.release(&changed.release, client);
        if let Some(needed) = self.by_sub(update.sub) {
            needed.slot = Slot::Scopes(Some(scopes));
            if rejected.is_empty() {
                needed.dumped = Some(Dumped::accepted(Bytes::new(), Arc::clone(&update.version)));
            }
        }
        if let Some(key) = self.by_sub.get(&update.sub).cloned() {
            self.await_routes(&key);
        }
        rejected
    }

    /// A request needs the virtual host of `host` in the route configuration of `routes`.
    pub fn ask_virtual_host(
        &mut self,
        routes: &Cell<RouteTable>,
        host: &str,
        reply: Reply,
        client: &mut Client,
    ) {
        // A route configuration that is gone meanwhile has nobody to ask: the reply is dropped, which is an answer.
        let slot = self.by_key.get_mut(&route_key(routes.name())).map(|needed| &mut needed.slot);
        let Some(Slot::Route { hosts: Some(hosts), .. }) = slot else { return };
        if let Some(name) = hosts.ask(host, reply) {
            client.add_names(hosts.sub, vec![name]);
        }
    }

    /// A request needs the route configuration of the scope of `key`.
    pub fn ask_scope(&mut self, scopes: &Cell<ScopeMap>, key: &ScopeKey, reply: Reply, client: &mut Client) {
        let slot = self.by_key.get_mut(&format!("scopes/{}", scopes.name())).map(|needed| &mut needed.slot);
        let Some(Slot::Scopes(Some(scopes))) = slot else { return };
        let Some((need, fresh)) = scopes.load(key) else { return };
        if fresh && let Err(error) = self.hold(std::slice::from_ref(&need), client) {
            tracing::warn!(target: "config", "cannot load a scope: {error}");
        }
        let Some(needed) = self.by_key.get_mut(&self::key(&need)) else { return };
        needed.waiters.push(reply);
        if needed.settled {
            needed.waiters.answer(Answer::Found);
        }
    }

    /// Gives up the names of virtual hosts that nobody waits for any longer.
    pub fn prune(&mut self, client: &mut Client) {
        for needed in self.by_key.values_mut() {
            if let Slot::Route { hosts: Some(hosts), .. } = &mut needed.slot {
                client.remove_names(hosts.sub, hosts.take_left());
            }
        }
    }

    fn end(&mut self, sub: SubId, client: &mut Client) {
        client.unsubscribe(sub);
        self.ended.push(sub);
        self.by_sub.remove(&sub);
    }

    /// Puts a route configuration in force, with the virtual hosts by VHDS that it has or now asks for.
    pub fn apply_routes(
        &mut self,
        sub: SubId,
        table: RouteTable,
        vhds: Option<&Vhds>,
        shared: &Arc<Shared>,
        client: &mut Client,
    ) -> Result<(), ConfigError> {
        let Some(key) = self.by_sub.get(&sub).cloned() else { return Ok(()) };
        let Some(needed) = self.by_key.get_mut(&key) else { return Ok(()) };
        let Slot::Route { cell, hosts, scope } = &mut needed.slot else { return Ok(()) };
        let table = Arc::new(table);
        let first = (!cell.is_set()).then(|| Arc::clone(cell));
        let source = match vhds {
            Some(vhds) => {
                let source = vhds.config_source.as_ref();
                Some(source.ok_or_else(|| ConfigError::field("vhds.config_source", "is required"))?)
            }
            None => None,
        };
        if let (Some(hosts), Some(source)) = (hosts.as_mut(), source)
            && hosts.source == *source
        {
            cell.set(Some(hosts.rebase(table, shared)?));
            return Ok(());
        }
        let fresh = match source {
            None => None,
            Some(proto) => {
                let checked = self.backing.check(&ResourceType::VirtualHost, proto);
                let compiled = checked.and_then(|()| config_source::compile(proto));
                let (source, init_fetch_timeout) = compiled.at(|| "vhds.config_source")?;
                let spec = SubscriptionSpec {
                    kind: ResourceType::VirtualHost,
                    source,
                    interest: Interest::Namespace(table.name().into()),
                    init_fetch_timeout,
                };
                let sub = client
                    .subscribe(spec)
                    .map_err(|error| ConfigError::new(format!("vhds: {error}: it needs a delta stream")))?;
                self.by_sub.insert(sub, key);
                self.fresh.push((sub, scope.clone()));
                Some(Box::new(VirtualHosts::new(sub, proto.clone(), Arc::clone(&table), scope)))
            }
        };
        let replaced = std::mem::replace(hosts, fresh);
        cell.set(Some(table));
        if let Some(replaced) = replaced {
            self.end(replaced.sub, client);
        }
        if let Some(first) = first {
            self.count_scopes(first.name());
        }
        Ok(())
    }

    /// Applies an update of virtual hosts to the route configuration that they belong to, as a whole.
    pub fn apply_virtual_hosts(
        &mut self,
        update: &Update,
        resources: Vec<(&Resource, VirtualHost)>,
        shared: &Arc<Shared>,
        client: &mut Client,
    ) -> Vec<Rejection> {
        let Some(key) = self.by_sub.get(&update.sub).cloned() else { return Vec::new() };
        let Some(needed) = self.by_key.get_mut(&key) else { return Vec::new() };
        let Slot::Route { cell, hosts: Some(hosts), .. } = &mut needed.slot else { return Vec::new() };
        let first = !std::mem::replace(&mut hosts.settled, true);
        let offered: Vec<&Resource> = resources.iter().map(|(resource, _)| *resource).collect();
        let updated = hosts.update(resources, &update.removed, shared);
        let (answer, rejected) = match updated {
            Ok(table) => {
                if let Some(table) = table {
                    cell.set(Some(table));
                }
                (Answer::Found, Vec::new())
            }
            Err(error) => {
                let reject = |resource: &&Resource| Rejection {
                    name: Arc::clone(&resource.name),
                    reason: error.to_string(),
                };
                (Answer::Missing, offered.iter().map(reject).collect())
            }
        };
        for name in offered.into_iter().flat_map(names_of) {
            hosts.answer(name, answer);
        }
        // What does not exist is asked for anew by the next request, so that names that clients make up do not add up.
        let over = hosts.miss(&update.resources, &update.removed);
        client.remove_names(hosts.sub, over);
        if first {
            self.tell_settled(&key);
        }
        rejected
    }

    /// Nothing has come for a subscription: who waits for a virtual host by it is told that there is none.
    pub fn give_up_virtual_hosts(&mut self, sub: SubId, client: &mut Client) {
        if let Some(Slot::Route { hosts: Some(hosts), .. }) = self.by_sub(sub).map(|needed| &mut needed.slot)
            && hosts.sub == sub
        {
            client.remove_names(sub, hosts.give_up());
        }
    }

    /// Those of `needs` that are still waited for, by name, for `/init_dump`.
    pub fn unsettled<'a>(&'a self, needs: &'a [Need]) -> impl Iterator<Item = &'a str> {
        let awaited = needs.iter().filter(|need| need.is_awaited());
        let waiting = awaited.filter_map(|need| self.by_key.get(&key(need)));
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

    /// A route configuration has come for the first time: scopes that lead to it count as active.
    fn count_scopes(&mut self, routes: &str) {
        for key in &self.scopes {
            let slot = self.by_key.get_mut(key).map(|needed| &mut needed.slot);
            if let Some(Slot::Scopes(Some(scopes))) = slot {
                scopes.arrived(routes);
            }
        }
    }

    /// Where the resource of a subscription goes.
    pub fn slot(&self, sub: SubId) -> Option<&Slot> {
        Some(&self.by_key.get(self.by_sub.get(&sub)?)?.slot)
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
