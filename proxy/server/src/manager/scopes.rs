//! Scoped routes: the scopes of one SRDS subscription, or of one list.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_filter_api::cell::{Cell, CellTable};
use waystation_route::{RouteTable, ScopeKey, ScopedTable};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Scope as StatScope, stats_group};

use super::routes;
use crate::context::{CompileContext, Need, Shared};

/// Scopes by key; each leads to its route configuration.
pub type ScopeMap = ScopedTable<Arc<Cell<RouteTable>>>;

stats_group! {
    /// `http.<prefix>.scoped_rds.<name>.`
    pub struct ScopedStats {
        counters { config_reload }
        gauges { active_scopes, all_scopes, config_reload_time_ms, on_demand_scopes }
        histograms {}
    }
}

/// The scopes of one subscription.
#[derive(Debug)]
pub struct Scopes {
    by_name: BTreeMap<String, Scope>,
    /// The name of the scope of each key.
    by_key: HashMap<ScopeKey, String>,
    /// By the cell of a route configuration that is missing: how many scopes would be active with it.
    missing: HashMap<Box<str>, u64>,
    rds: Option<core::ConfigSource>,
    http: StatScope,
    cell: Arc<Cell<ScopeMap>>,
    stats: ScopedStats,
}

#[derive(Debug)]
struct Scope {
    wire: Bytes,
    key: ScopeKey,
    cell: Arc<Cell<RouteTable>>,
    /// The route configuration by RDS, unless it is inline.
    need: Option<Need>,
    /// That is fetched when a request asks for it (`on_demand`).
    lazy: bool,
    /// It is subscribed to.
    held: bool,
}

impl Scope {
    fn into_held(self) -> Option<Need> {
        self.need.filter(|_| self.held)
    }
}

/// The scopes that an update replaces, as they were.
#[derive(Debug)]
pub struct Replaced(BTreeMap<String, Scope>);

/// What an update asks to be subscribed to, and what not any longer.
#[derive(Debug, Default)]
pub struct Changed {
    /// New.
    pub hold: Vec<Need>,
    /// Over.
    pub release: Vec<Need>,
}

impl Scopes {
    /// No scopes yet. `http` is the connection manager's statistics.
    pub fn new(
        rds: Option<core::ConfigSource>,
        cell: Arc<Cell<ScopeMap>>,
        http: StatScope,
        scope: &StatScope,
    ) -> Self {
        Self {
            by_name: BTreeMap::new(),
            by_key: HashMap::new(),
            missing: HashMap::new(),
            rds,
            http,
            cell,
            stats: scope.group(),
        }
    }

    /// Takes scopes away.
    pub fn remove(&mut self, names: &[Arc<str>], changed: &mut Changed) {
        for name in names {
            let gone = self.take_out(name);
            changed.release.extend(gone.and_then(Scope::into_held));
        }
    }

    fn put(&mut self, name: String, scope: Scope) -> Option<Scope> {
        let replaced = self.take_out(&name);
        self.by_key.insert(scope.key.clone(), name.clone());
        self.by_name.insert(name, scope);
        replaced
    }

    fn take_out(&mut self, name: &str) -> Option<Scope> {
        let scope = self.by_name.remove(name)?;
        self.by_key.remove(&scope.key);
        Some(scope)
    }

    /// Takes out the scopes that an update is about to replace, so that their keys can move between them. What is taken out
    /// goes to [`Self::settle`].
    pub fn take<'n>(&mut self, names: impl Iterator<Item = &'n str>) -> Replaced {
        Replaced(names.filter_map(|name| Some((name.to_owned(), self.take_out(name)?))).collect())
    }

    /// Takes a scope away whose route configuration could not be subscribed to.
    pub fn discard(&mut self, name: &str) {
        self.take_out(name);
    }

    /// Ends an update: the scopes that it refuses keep their last good form. A scope that has taken over the key of such a
    /// one is refused with it; these are returned with the reasons.
    pub fn settle(
        &mut self,
        Replaced(mut replaced): Replaced,
        refused: impl Iterator<Item = String>,
        changed: &mut Changed,
    ) -> Vec<(String, ConfigError)> {
        let mut refused: Vec<String> = refused.collect();
        let mut also = Vec::new();
        while let Some(name) = refused.pop() {
            let Some(last) = replaced.remove(&name) else { continue };
            if let Some(other) = self.by_key.get(&last.key).cloned() {
                let gone = self.take_out(&other);
                changed.release.extend(gone.and_then(Scope::into_held));
                also.push((other.clone(), conflict(&name, &other)));
                refused.push(other);
            }
            let gone = self.put(name, last);
            changed.release.extend(gone.and_then(Scope::into_held));
        }
        changed.release.extend(replaced.into_values().filter_map(Scope::into_held));
        also
    }

    /// Adds or replaces a scope.
    ///
    /// # Errors
    /// When it is invalid, or another scope has its key.
    pub fn insert(
        &mut self,
        proto: &pb::ScopedRouteConfiguration,
        wire: &Bytes,
        shared: &Arc<Shared>,
        changed: &mut Changed,
    ) -> Result<(), ConfigError> {
        let pb::ScopedRouteConfiguration {
            on_demand,
            name,
            route_configuration_name,
            route_configuration,
            key: _,
        } = proto;
        let key = ScopeKey::compile(proto)?;
        if let Some(other) = self.by_key.get(&key).filter(|other| *other != name) {
            return Err(conflict(other, name));
        }
        let (cell, need) = match (route_configuration, route_configuration_name.as_str()) {
            (Some(_), name) if !name.is_empty() => {
                let reason = "only one of route_configuration_name and route_configuration may be set";
                return Err(ConfigError::new(reason));
            }
            (Some(inline), _) => (inline_cell(inline, shared)?, None),
            (None, "") => return Err(ConfigError::field("route_configuration_name", "is required")),
            (None, route) => {
                let source = self.rds.as_ref();
                let source = source.ok_or_else(|| ConfigError::field("rds_config_source", "is required"))?;
                let context = CompileContext::new(shared);
                let cell = context.route_cell(source, route, &self.http);
                (cell, context.into_needs().pop())
            }
        };
        // What another scope, or an earlier form of this one, has fetched is followed from now on.
        let held = need.is_some() && (!on_demand || cell.is_set());
        changed.hold.extend(need.clone().filter(|_| held));
        let scope = Scope { wire: wire.clone(), key, cell, need, lazy: *on_demand, held };
        let replaced = self.put(name.clone(), scope);
        changed.release.extend(replaced.and_then(Scope::into_held));
        Ok(())
    }

    /// The route configuration of the scope of `key`, and whether it has yet to be subscribed to. From now on it counts
    /// as subscribed to.
    pub fn load(&mut self, key: &ScopeKey) -> Option<(Need, bool)> {
        let scope = self.by_name.get_mut(self.by_key.get(key)?)?;
        let need = scope.need.clone()?;
        Some((need, !std::mem::replace(&mut scope.held, true)))
    }

    /// Has the workers use the scopes as they are now.
    pub fn publish(&mut self) {
        let scopes = self.by_name.iter();
        let table = ScopedTable::new(
            scopes.map(|(name, scope)| (name.clone(), scope.key.clone(), Arc::clone(&scope.cell))),
        );
        // Keys were compared when the scopes were inserted, so this does not fail.
        if let Ok(table) = table {
            self.cell.set(Some(Arc::new(table)));
        }
        let count = self.by_name.len() as u64;
        self.stats.all_scopes().set(count);
        // A scope counts as active when its route configuration has arrived, or is not loaded before a request asks for it.
        self.missing.clear();
        for scope in self.by_name.values().filter(|scope| !scope.lazy && !scope.cell.is_set()) {
            *self.missing.entry(scope.cell.name().into()).or_default() += 1;
        }
        self.stats.active_scopes().set(count - self.missing.values().sum::<u64>());
        let lazy = self.by_name.values().filter(|scope| scope.lazy).count();
        self.stats.on_demand_scopes().set(lazy as u64);
        self.stats.config_reload().inc();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.stats.config_reload_time_ms().set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    }

    /// The route configuration of a cell has arrived.
    pub fn arrived(&mut self, routes: &str) {
        if let Some(scopes) = self.missing.remove(routes) {
            self.stats.active_scopes().add(scopes);
        }
    }

    /// The route configurations that are subscribed to.
    pub fn held(&self) -> impl Iterator<Item = &Need> {
        self.by_name.values().filter(|scope| scope.held).filter_map(|scope| scope.need.as_ref())
    }

    /// Those that a listener waits for.
    pub fn awaited(&self) -> impl Iterator<Item = &Need> {
        self.by_name.values().filter(|scope| !scope.lazy).filter_map(|scope| scope.need.as_ref())
    }

    /// The encoded scopes, for `/config_dump`.
    pub fn wires(&self) -> Vec<Bytes> {
        self.by_name.values().map(|scope| scope.wire.clone()).collect()
    }
}

/// The scopes of a list, which never change.
pub fn compile_list(
    protos: &[pb::ScopedRouteConfiguration],
    shared: &Arc<Shared>,
) -> Result<Arc<Cell<ScopeMap>>, ConfigError> {
    let mut scopes = Vec::with_capacity(protos.len());
    for proto in protos {
        let compile = || {
            if !proto.route_configuration_name.is_empty() {
                let reason = "Fetching routes via RDS (route_configuration_name) is not supported with inline scoped routes.";
                return Err(ConfigError::new(reason));
            }
            let inline = proto.route_configuration.as_ref().ok_or_else(|| {
                ConfigError::new("You must specify a route_configuration with inline scoped routes.")
            })?;
            Ok((proto.name.clone(), ScopeKey::compile(proto)?, inline_cell(inline, shared)?))
        };
        scopes.push(compile().at(|| format!("scoped_route_configurations[{}]", proto.name))?);
    }
    let cell = CellTable::new().cell("");
    cell.set(Some(Arc::new(ScopedTable::new(scopes)?)));
    Ok(cell)
}

fn conflict(first: &str, second: &str) -> ConfigError {
    let reason = format!("scope key conflict found, first scope is '{first}', second scope is '{second}'");
    ConfigError::new(reason)
}

fn inline_cell(
    proto: &pb::RouteConfiguration,
    shared: &Arc<Shared>,
) -> Result<Arc<Cell<RouteTable>>, ConfigError> {
    let table = routes::compile(proto, true, shared).at(|| "route_configuration")?;
    let cell = CellTable::new().cell(&proto.name);
    cell.set(Some(Arc::new(table)));
    Ok(cell)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::scoped_route_configuration::{Key, key};
    use prost::Message as _;

    fn scopes(shared: &Arc<Shared>) -> Scopes {
        let http = shared.stats.root().scope("http");
        Scopes::new(Some(core::ConfigSource::default()), CellTable::new().cell("s"), http.clone(), &http)
    }

    fn scope(name: &str, text: &str, route: &str) -> pb::ScopedRouteConfiguration {
        let fragment = key::Fragment { r#type: Some(key::fragment::Type::StringKey(text.into())) };
        pb::ScopedRouteConfiguration {
            name: name.into(),
            route_configuration_name: route.into(),
            key: Some(Key { fragments: vec![fragment] }),
            ..Default::default()
        }
    }

    fn insert(
        scopes: &mut Scopes,
        proto: &pb::ScopedRouteConfiguration,
        shared: &Arc<Shared>,
    ) -> Result<Changed, ConfigError> {
        let mut changed = Changed::default();
        scopes.insert(proto, &proto.encode_to_vec().into(), shared, &mut changed).map(|()| changed)
    }

    #[test]
    fn a_scope_holds_its_route_configuration_as_long_as_it_stands() {
        let shared = crate::context::tests::shared();
        let mut scopes = scopes(&shared);
        let added = insert(&mut scopes, &scope("a", "k", "r1"), &shared).unwrap();
        assert_eq!((added.hold.len(), added.release.len()), (1, 0));
        let replaced = insert(&mut scopes, &scope("a", "k", "r2"), &shared).unwrap();
        assert_eq!((replaced.hold.len(), replaced.release.len()), (1, 1));
        scopes.publish();
        assert!(scopes.cell.get().unwrap().find(&ScopeKey::compile(&scope("", "k", "")).unwrap()).is_some());
        let mut removed = Changed::default();
        scopes.remove(&["a".into(), "never".into()], &mut removed);
        assert_eq!((removed.hold.len(), removed.release.len()), (0, 1));
        scopes.publish();
        assert!(scopes.cell.get().unwrap().find(&ScopeKey::compile(&scope("", "k", "")).unwrap()).is_none());
    }

    #[test]
    fn a_key_is_of_one_scope_and_free_again_when_that_goes() {
        let shared = crate::context::tests::shared();
        let mut scopes = scopes(&shared);
        insert(&mut scopes, &scope("a", "k", "r"), &shared).unwrap();
        let error = insert(&mut scopes, &scope("b", "k", "r"), &shared).unwrap_err().to_string();
        assert_eq!(error, "scope key conflict found, first scope is 'a', second scope is 'b'");
        scopes.remove(&["a".into()], &mut Changed::default());
        assert!(insert(&mut scopes, &scope("b", "k", "r"), &shared).is_ok());
    }

    fn find(scopes: &mut Scopes, key: &str) -> Option<String> {
        scopes.publish();
        let key = ScopeKey::compile(&scope("", key, "")).unwrap();
        scopes.by_key.get(&key).cloned()
    }

    #[test]
    fn keys_move_between_the_scopes_of_one_update() {
        let shared = crate::context::tests::shared();
        let mut scopes = scopes(&shared);
        insert(&mut scopes, &scope("a", "k1", "r"), &shared).unwrap();
        insert(&mut scopes, &scope("b", "k2", "r"), &shared).unwrap();
        let replaced = scopes.take(["a", "b", "new"].into_iter());
        insert(&mut scopes, &scope("a", "k2", "r"), &shared).unwrap();
        insert(&mut scopes, &scope("b", "k3", "r"), &shared).unwrap();
        let mut changed = Changed::default();
        assert!(scopes.settle(replaced, std::iter::empty(), &mut changed).is_empty());
        assert_eq!(changed.release.len(), 2);
        assert_eq!(
            ["k1", "k2", "k3"].map(|key| find(&mut scopes, key)),
            [None, Some("a".into()), Some("b".into())]
        );
    }

    #[test]
    fn a_refused_scope_keeps_its_last_form_and_its_key() {
        let shared = crate::context::tests::shared();
        let mut scopes = scopes(&shared);
        for (name, key) in [("a", "k1"), ("b", "k2"), ("c", "k3")] {
            insert(&mut scopes, &scope(name, key, "r"), &shared).unwrap();
        }
        // `a` is invalid; `b` wants its key, `c` that of `b`, and neither can have it.
        let replaced = scopes.take(["a", "b", "c"].into_iter());
        assert!(insert(&mut scopes, &scope("a", "k4", ""), &shared).is_err());
        insert(&mut scopes, &scope("b", "k1", "r"), &shared).unwrap();
        insert(&mut scopes, &scope("c", "k2", "r"), &shared).unwrap();
        let mut changed = Changed::default();
        let also = scopes.settle(replaced, ["a".to_owned()].into_iter(), &mut changed);
        let names: Vec<_> = also.iter().map(|(name, _)| &**name).collect();
        assert_eq!((names, changed.release.len()), (vec!["b", "c"], 2));
        let holders = ["k1", "k2", "k3"].map(|key| find(&mut scopes, key).unwrap());
        assert_eq!(holders, ["a", "b", "c"]);
    }

    #[test]
    fn a_lazy_scope_holds_nothing_until_it_is_asked_for() {
        let shared = crate::context::tests::shared();
        let mut scopes = scopes(&shared);
        let lazy = pb::ScopedRouteConfiguration { on_demand: true, ..scope("a", "k", "r") };
        let added = insert(&mut scopes, &lazy, &shared).unwrap();
        assert_eq!((added.hold.len(), scopes.held().count(), scopes.awaited().count()), (0, 0, 0));
        let key = ScopeKey::compile(&lazy).unwrap();
        assert!(scopes.load(&key).is_some_and(|(_, fresh)| fresh));
        assert!(scopes.load(&key).is_some_and(|(_, fresh)| !fresh), "once");
        assert_eq!((scopes.held().count(), scopes.awaited().count()), (1, 0));
        let mut removed = Changed::default();
        scopes.remove(&["a".into()], &mut removed);
        assert_eq!(removed.release.len(), 1);
    }

    #[test]
    fn a_lazy_scope_whose_routes_are_there_follows_them() {
        let shared = crate::context::tests::shared();
        let mut scopes = scopes(&shared);
        insert(&mut scopes, &scope("a", "k", "r"), &shared).unwrap();
        let table = routes::compile(&pb::RouteConfiguration::default(), false, &shared).unwrap();
        scopes.by_name["a"].cell.set(Some(Arc::new(table)));
        let lazy = pb::ScopedRouteConfiguration { on_demand: true, ..scope("b", "l", "r") };
        assert_eq!(insert(&mut scopes, &lazy, &shared).unwrap().hold.len(), 1);
    }
}
