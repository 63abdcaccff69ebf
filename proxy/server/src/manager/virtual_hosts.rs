//! Virtual hosts by VHDS: added to the route configuration that asks for them, and taken out of it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_route::{AddedHosts, RouteTable};
use waystation_schema::ConfigError;
use waystation_stats::{Scope, stats_group};
use waystation_xds::{Resource, SubId};

use super::on_demand::Waiters;
use super::routes;
use crate::context::Shared;
use crate::on_demand::{Answer, Reply};

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
    by_name: BTreeMap<Arc<str>, Known>,
    /// For each of their names and aliases, how many have it.
    known: HashMap<Arc<str>, usize>,
    /// The names and aliases that virtual hosts have lost, and that may still be subscribed to.
    lost: Vec<Arc<str>>,
    /// The names that requests wait for.
    waiting: HashMap<Arc<str>, Waiters>,
    /// The route configuration as it came, and they as they are added to it.
    table: AddedHosts,
    stats: VirtualHostStats,
}

/// A virtual host that is in force.
#[derive(Debug)]
struct Known {
    /// Compiled anew when the route configuration is another one.
    proto: pb::VirtualHost,
    /// What it may be asked for by.
    names: Vec<Arc<str>>,
}

/// Names that requests of one route configuration wait for; who asks for another one is told that there are too many.
const MAX_WAITED_FOR: usize = 16 * 1024;

impl VirtualHosts {
    /// None yet.
    pub fn new(sub: SubId, source: core::ConfigSource, base: Arc<RouteTable>, scope: &Scope) -> Self {
        Self {
            sub,
            source,
            settled: false,
            by_name: BTreeMap::new(),
            known: HashMap::new(),
            lost: Vec::new(),
            waiting: HashMap::new(),
            table: AddedHosts::new(base),
            stats: scope.group(),
        }
    }

    /// A request needs the virtual host of `host`: gives the name to subscribe to, if nobody has asked for it yet.
    pub fn ask(&mut self, host: &str, reply: Reply) -> Option<Arc<str>> {
        let alias: Arc<str> = format!("{}/{host}", self.table.base().name()).into();
        let mut waiters = Waiters::default();
        if let Some(waiting) = self.waiting.get_mut(&alias) {
            waiting.push(reply);
            return None;
        }
        waiters.push(reply);
        if self.known.contains_key(&alias) {
            waiters.answer(Answer::Found);
            return None;
        }
        if self.waiting.len() >= MAX_WAITED_FOR {
            waiters.answer(Answer::Full);
            return None;
        }
        self.waiting.insert(Arc::clone(&alias), waiters);
        Some(alias)
    }

    /// The server has spoken of a name.
    pub fn answer(&mut self, name: &str, answer: Answer) {
        if let Some(mut waiters) = self.waiting.remove(name) {
            waiters.answer(answer);
        }
    }

    /// After an update of `offered` and `removed`: tells who waits for what is not there now, be it that it could not be
    /// read, and gives the names that stand for nothing.
    pub fn miss(&mut self, offered: &[Resource], removed: &[Arc<str>]) -> Vec<Arc<str>> {
        let mut over = std::mem::take(&mut self.lost);
        over.extend(removed.iter().cloned());
        over.extend(
            offered.iter().flat_map(names_of).filter(|name| !self.known.contains_key(*name)).cloned(),
        );
        for name in &over {
            self.answer(name, Answer::Missing);
        }
        over
    }

    /// The server will say nothing: tells all who wait, and gives the names that they have waited for.
    pub fn give_up(&mut self) -> Vec<Arc<str>> {
        let waiting = self.waiting.drain();
        let names = waiting.map(|(name, mut waiters)| {
            waiters.answer(Answer::Missing);
            name
        });
        names.collect()
    }

    /// The names that nobody waits for any longer, and that the server has said nothing about.
    pub fn take_left(&mut self) -> Vec<Arc<str>> {
        self.waiting.extract_if(|_, waiters| waiters.have_left()).map(|(name, _)| name).collect()
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
        let mut rebased = AddedHosts::new(base);
        let hosts = self.by_name.iter().map(|(name, known)| (Arc::clone(name), &known.proto)).collect();
        let table = routes::update_virtual_hosts(&mut rebased, hosts, &[], shared)?;
        self.table = rebased;
        Ok(table)
    }

    /// The table with these virtual hosts added or replaced, and those removed; nothing when that changes nothing.
    ///
    /// # Errors
    /// When a virtual host is invalid, or another one has its domain. Then nothing has changed.
    pub fn update(
        &mut self,
        updated: Vec<(&Resource, pb::VirtualHost)>,
        removed: &[Arc<str>],
        shared: &Arc<Shared>,
    ) -> Result<Option<Arc<RouteTable>>, ConfigError> {
        if updated.is_empty() && !removed.iter().any(|name| self.table.contains(name)) {
            // Mostly the answer that a host which some client made up does not exist.
            if removed.is_empty() {
                self.stats.update_empty().inc();
            }
            return Ok(None);
        }
        let hosts = updated.iter().map(|(resource, host)| (Arc::clone(&resource.name), host)).collect();
        let table = routes::update_virtual_hosts(&mut self.table, hosts, removed, shared)?;
        let mut before = Vec::new();
        for name in removed {
            before.extend(self.by_name.remove(name).into_iter().flat_map(|known| known.names));
        }
        for (resource, proto) in updated {
            let names: Vec<_> = names_of(resource).cloned().collect();
            for name in &names {
                *self.known.entry(Arc::clone(name)).or_default() += 1;
            }
            let replaced = self.by_name.insert(Arc::clone(&resource.name), Known { proto, names });
            before.extend(replaced.into_iter().flat_map(|known| known.names));
        }
        // What a virtual host was known by is what its last form says.
        for name in before {
            if let Some(count) = self.known.get_mut(&name) {
                *count -= 1;
                if *count == 0 {
                    self.known.remove(&name);
                    self.lost.push(name);
                }
            }
        }
        self.stats.config_reload().inc();
        Ok(Some(table))
    }
}

/// What a virtual host may be asked for by.
pub fn names_of(resource: &Resource) -> impl Iterator<Item = &Arc<str>> {
    resource.aliases.iter().chain([&resource.name])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::tests::shared;
    use crate::on_demand::channel;

    fn host(name: &str, domain: &str) -> (Resource, pb::VirtualHost) {
        let host = pb::VirtualHost { name: name.into(), domains: vec![domain.into()], ..Default::default() };
        let resource = Resource {
            name: format!("rc/{domain}").into(),
            version: "1".into(),
            aliases: vec![format!("rc/also.{domain}").into()],
            body: bytes::Bytes::new(),
        };
        (resource, host)
    }

    fn update(
        hosts: &mut VirtualHosts,
        updated: &[(Resource, pb::VirtualHost)],
        removed: &[Arc<str>],
        shared: &Arc<Shared>,
    ) -> Result<Arc<RouteTable>, ConfigError> {
        let updated = updated.iter().map(|(resource, host)| (resource, host.clone()));
        hosts.update(updated.collect(), removed, shared).map(|table| table.expect("something changes"))
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
        let table =
            update(&mut hosts, &[host("a", "a.example"), host("b", "b.example")], &[], &shared).unwrap();
        assert_eq!(names(&table), ["own", "a", "b"]);
        let table = update(&mut hosts, &[host("c", "c.example")], &["rc/a.example".into()], &shared).unwrap();
        assert_eq!(names(&table), ["own", "b", "c"]);
        let table = hosts.rebase(base(&shared), &shared).unwrap();
        assert_eq!(names(&table), ["own", "b", "c"]);
    }

    #[test]
    fn a_domain_that_is_taken_changes_nothing() {
        let shared = shared();
        let mut hosts = hosts(&shared);
        update(&mut hosts, &[host("a", "a.example")], &[], &shared).unwrap();
        assert!(update(&mut hosts, &[host("x", "own.example")], &["rc/a.example".into()], &shared).is_err());
        assert_eq!(names(&hosts.rebase(base(&shared), &shared).unwrap()), ["own", "a"]);
    }

    #[test]
    fn one_name_is_asked_for_once_and_all_who_wait_for_it_are_told() {
        let shared = shared();
        let mut hosts = hosts(&shared);
        let ask = |hosts: &mut VirtualHosts, host: &str| {
            let (reply, answer) = channel();
            (hosts.ask(host, reply), answer)
        };
        let (first, one) = ask(&mut hosts, "a.example");
        assert_eq!(first.as_deref(), Some("rc/a.example"));
        let (second, two) = ask(&mut hosts, "a.example");
        assert_eq!(second, None);
        hosts.answer("rc/other", Answer::Found);
        assert!(one.now().is_none());
        update(&mut hosts, &[host("a", "a.example")], &[], &shared).unwrap();
        hosts.answer("rc/a.example", Answer::Found);
        assert_eq!((one.now(), two.now()), (Some(Answer::Found), Some(Answer::Found)));
        // What is there, by its name or by another, is not asked for.
        for host in ["a.example", "also.a.example"] {
            let (name, known) = ask(&mut hosts, host);
            assert_eq!((name, known.now()), (None, Some(Answer::Found)));
        }
        // Removed, it is asked for again; and who gives up leaves the name to be given up, too.
        update(&mut hosts, &[], &["rc/a.example".into()], &shared).unwrap();
        let (again, three) = ask(&mut hosts, "also.a.example");
        assert!(again.is_some() && hosts.take_left().is_empty());
        drop(three);
        assert_eq!(hosts.take_left(), ["rc/also.a.example".into()]);
    }

    #[test]
    fn an_alias_that_a_virtual_host_loses_is_asked_for_again() {
        let shared = shared();
        let mut hosts = hosts(&shared);
        update(&mut hosts, &[host("a", "a.example")], &[], &shared).unwrap();
        assert!(hosts.miss(&[host("a", "a.example").0], &[]).is_empty());
        let (mut resource, proto) = host("a", "a.example");
        resource.aliases = vec!["rc/new.a.example".into()];
        update(&mut hosts, &[(resource, proto)], &[], &shared).unwrap();
        assert_eq!(hosts.miss(&[], &[]), ["rc/also.a.example".into()]);
        let (reply, known) = channel();
        assert_eq!((hosts.ask("new.a.example", reply), known.now()), (None, Some(Answer::Found)));
        let (reply, _answer) = channel();
        assert_eq!(hosts.ask("also.a.example", reply).as_deref(), Some("rc/also.a.example"));
    }

    #[test]
    fn who_waits_for_a_virtual_host_that_cannot_be_read_is_told() {
        let shared = shared();
        let mut hosts = hosts(&shared);
        let (reply, answer) = channel();
        hosts.ask("also.a.example", reply);
        // It was left out of what is applied.
        let (unreadable, _) = host("a", "a.example");
        let over = hosts.miss(&[unreadable], &[]);
        assert_eq!(over, ["rc/also.a.example".into(), "rc/a.example".into()]);
        assert_eq!(answer.now(), Some(Answer::Missing));
    }

    #[test]
    fn all_who_wait_are_told_when_nothing_will_come() {
        let shared = shared();
        let mut hosts = hosts(&shared);
        let (reply, answer) = channel();
        hosts.ask("a.example", reply);
        assert_eq!(hosts.give_up(), ["rc/a.example".into()]);
        assert_eq!(answer.now(), Some(Answer::Missing));
        let (reply, _answer) = channel();
        assert!(hosts.ask("a.example", reply).is_some());
    }
}
