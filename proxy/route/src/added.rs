//! Virtual hosts that come after their table (VHDS).

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_schema::ConfigError;

use crate::filter_config::FilterNames;
use crate::table::{CompileContext, RouteTable};
use crate::virtual_host::VirtualHost;

/// A route table, and virtual hosts that are added to it by the names of their resources. An update compiles what it
/// brings; all else is shared with the table before it.
#[derive(Debug)]
pub struct AddedHosts {
    base: Arc<RouteTable>,
    hosts: BTreeMap<Arc<str>, Arc<VirtualHost>>,
    /// Those of the base, and of every virtual host there has been: what is compiled refers to their places.
    filters: FilterNames,
}

impl AddedHosts {
    /// None yet.
    pub fn new(base: Arc<RouteTable>) -> Self {
        Self { filters: base.filters.clone(), base, hosts: BTreeMap::new() }
    }

    /// The table that they are added to.
    pub fn base(&self) -> &Arc<RouteTable> {
        &self.base
    }

    /// Whether there is one of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.hosts.contains_key(name)
    }

    /// The table with virtual hosts added or replaced, and others removed. `check` may refuse one.
    ///
    /// # Errors
    /// When one is invalid, or another one has its domain. Then nothing has changed.
    pub fn update(
        &mut self,
        updated: Vec<(Arc<str>, &pb::VirtualHost)>,
        removed: &[Arc<str>],
        cx: &CompileContext<'_>,
        check: impl Fn(&VirtualHost) -> Result<(), ConfigError>,
    ) -> Result<Arc<RouteTable>, ConfigError> {
        let mut filters = self.filters.clone();
        let protos = updated.iter().map(|(_, proto)| *proto);
        let compiled = self.base.compile_hosts(protos, &mut filters, cx)?;
        compiled.iter().try_for_each(|host| check(host))?;
        let mut changes: BTreeMap<Arc<str>, Option<Arc<VirtualHost>>> =
            removed.iter().map(|name| (Arc::clone(name), None)).collect();
        changes.extend(updated.into_iter().map(|(name, _)| name).zip(compiled.into_iter().map(Some)));
        let kept = self.hosts.iter().filter(|(name, _)| !changes.contains_key(*name));
        let added = kept.map(|(_, host)| host).chain(changes.values().flatten());
        let table = self.base.with_hosts(added, &filters)?;
        self.filters = filters;
        for (name, host) in changes {
            match host {
                Some(host) => drop(self.hosts.insert(name, host)),
                None => drop(self.hosts.remove(&name)),
            }
        }
        if self.hosts.is_empty() {
            return Ok(Arc::clone(&self.base));
        }
        Ok(Arc::new(table))
    }
}
