//! Virtual hosts by VHDS: added to the route configuration that asks for them, and taken out of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_route::RouteTable;
use waystation_schema::ConfigError;
use waystation_stats::{Scope, stats_group};
use waystation_xds::SubId;

use super::routes;
use crate::context::Shared;

stats_group! {
    /// `http.<prefix>.rds.vhds.<route configuration>.`
    pub struct VirtualHostStats {
        counters { config_reload, update_empty }
        gauges {}
        histograms {}
    }
}

/// The virtual hosts of one route configuration that do not stand in it.
#[derive(Debug)]
pub struct VirtualHosts {
    /// Their subscription.
    pub sub: SubId,
    /// Where they come from.
    pub source: core::ConfigSource,
    /// Whether the server has answered, or is not waited for any longer.
    pub settled: bool,
    /// By the names of their resources, `<route configuration>/<host>`.
    by_name: BTreeMap<String, pb::VirtualHost>,
    /// The route configuration as it came.
    base: Arc<RouteTable>,
    stats: VirtualHostStats,
}

impl VirtualHosts {
    /// None yet.
    pub fn new(sub: SubId, source: core::ConfigSource, base: Arc<RouteTable>, scope: &Scope) -> Self {
        Self { sub, source, settled: false, by_name: BTreeMap::new(), base, stats: scope.group() }
    }

    /// Goes on with another version of the route configuration; the virtual hosts stay.
    ///
    /// # Errors
    /// When they do not go together: a domain stands in both.
    pub fn rebase(
        &mut self,
        base: Arc<RouteTable>,
        shared: &Arc<Shared>,
    ) -> Result<Arc<RouteTable>, ConfigError> {
        let table = self.table(&base, &self.by_name, shared)?;
        self.base = base;
        Ok(table)
    }

    /// The table with these virtual hosts added or replaced, and those removed.
    ///
    /// # Errors
    /// When a virtual host is invalid, or another one has its domain. Then nothing has changed.
    pub fn update(
        &mut self,
        updated: Vec<(String, pb::VirtualHost)>,
        removed: &[Arc<str>],
        shared: &Arc<Shared>,
    ) -> Result<Arc<RouteTable>, ConfigError> {
        if updated.is_empty() && removed.is_empty() {
            self.stats.update_empty().inc();
        }
        let mut by_name = self.by_name.clone();
        for name in removed {
            by_name.remove(&**name);
        }
        by_name.extend(updated);
        let table = self.table(&self.base, &by_name, shared)?;
        self.by_name = by_name;
        self.stats.config_reload().inc();
        Ok(table)
    }

    fn table(
        &self,
        base: &Arc<RouteTable>,
        by_name: &BTreeMap<String, pb::VirtualHost>,
        shared: &Arc<Shared>,
    ) -> Result<Arc<RouteTable>, ConfigError> {
        if by_name.is_empty() {
            return Ok(Arc::clone(base));
        }
        let hosts: Vec<pb::VirtualHost> = by_name.values().cloned().collect();
        routes::with_virtual_hosts(base, &hosts, shared).map(Arc::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::tests::shared;

    fn host(name: &str, domain: &str) -> (String, pb::VirtualHost) {
        let host = pb::VirtualHost { name: name.into(), domains: vec![domain.into()], ..Default::default() };
        (format!("rc/{domain}"), host)
    }

    fn base(shared: &Arc<Shared>) -> Arc<RouteTable> {
        let (_, own) = host("own", "own.example");
        let proto =
            pb::RouteConfiguration { name: "rc".into(), virtual_hosts: vec![own], ..Default::default() };
        Arc::new(routes::compile(&proto, false, shared).unwrap())
    }

    fn names(table: &RouteTable) -> Vec<&str> {
        table.virtual_hosts().map(|host| &*host.name).collect()
    }

    fn hosts(shared: &Arc<Shared>) -> VirtualHosts {
        let mut client = client();
        let spec = waystation_xds::SubscriptionSpec {
            kind: waystation_xds::ResourceType::VirtualHost,
            source: waystation_xds::Source::Path(Arc::new(waystation_xds::PathSource {
                path: "/nonexistent".into(),
                watched_directory: None,
            })),
            interest: waystation_xds::Interest::Namespace("rc".into()),
            init_fetch_timeout: None,
        };
        let sub = client.subscribe(spec, std::time::Instant::now()).unwrap();
        VirtualHosts::new(sub, core::ConfigSource::default(), base(shared), &shared.stats.root())
    }

    fn client() -> waystation_xds::Core {
        let options = waystation_xds::Options { node: bytes::Bytes::new(), ads: None, seed: 1, unix_ms: 0 };
        waystation_xds::Core::new(options, std::time::Instant::now())
    }

    #[test]
    fn hosts_come_and_go_beside_those_of_the_configuration() {
        let shared = shared();
        let mut hosts = hosts(&shared);
        let table = hosts.update(vec![host("a", "a.example"), host("b", "b.example")], &[], &shared).unwrap();
        assert_eq!(names(&table), ["own", "a", "b"]);
        let table = hosts.update(vec![host("c", "c.example")], &["rc/a.example".into()], &shared).unwrap();
        assert_eq!(names(&table), ["own", "b", "c"]);
        let table = hosts.rebase(base(&shared), &shared).unwrap();
        assert_eq!(names(&table), ["own", "b", "c"]);
    }

    #[test]
    fn a_domain_that_is_taken_changes_nothing() {
        let shared = shared();
        let mut hosts = hosts(&shared);
        hosts.update(vec![host("a", "a.example")], &[], &shared).unwrap();
        assert!(hosts.update(vec![host("x", "own.example")], &["rc/a.example".into()], &shared).is_err());
        assert_eq!(names(&hosts.rebase(base(&shared), &shared).unwrap()), ["own", "a"]);
    }
}
