//! What `/config_dump` shows of listeners.

use std::sync::Arc;

use bytes::Bytes;

use super::{Leaving, Listeners};
use crate::admin::config_dump::{ResourceDump, ScopesDump};
use crate::listener::config::NetworkFilter;
use crate::manager::dump::{Dumped, Refused};

/// Listeners for `/config_dump`.
#[derive(Debug)]
pub struct ListenersDump {
    /// One for each name, and one for each that drains.
    pub entries: Vec<ListenerDump>,
}

/// One listener for `/config_dump`.
#[derive(Debug)]
pub struct ListenerDump {
    /// Its name.
    pub name: String,
    /// By LDS rather than from the bootstrap.
    pub dynamic: bool,
    /// In force.
    pub active: Option<Dumped>,
    /// The last refusal.
    pub error: Option<Refused>,
    /// Waiting to take over.
    pub warming: Option<Dumped>,
    /// On its way out.
    pub draining: Option<Dumped>,
}

impl Listeners {
    /// Inline route configurations, for `/config_dump`.
    pub fn static_routes(&self) -> Vec<ResourceDump> {
        let chains = self.active().flat_map(|running| running.listener.all_chains());
        let managers = chains.filter_map(|chain| match &chain.filters {
            NetworkFilter::Http(manager) => manager.inline_routes(),
            _ => None,
        });
        managers
            .map(|(name, wire)| ResourceDump {
                name,
                dynamic: false,
                warming: false,
                dumped: Dumped::accepted(wire, Arc::from("")),
            })
            .collect()
    }

    /// Inline scopes, for `/config_dump`.
    pub fn static_scopes(&self) -> Vec<ScopesDump> {
        let chains = self.active().flat_map(|running| running.listener.all_chains());
        let managers = chains.filter_map(|chain| match &chain.filters {
            NetworkFilter::Http(manager) => manager.inline_scopes(),
            _ => None,
        });
        managers
            .map(|(name, scopes)| ScopesDump {
                name,
                dynamic: false,
                dumped: Dumped::accepted(Bytes::new(), Arc::from("")),
                scopes,
            })
            .collect()
    }

    /// For `/config_dump`: name, whether dynamic, active state, warming state, draining state.
    pub fn dump(&self) -> ListenersDump {
        ListenersDump {
            entries: self
                .entries
                .iter()
                .map(|(name, entry)| ListenerDump {
                    name: name.clone(),
                    dynamic: entry.dynamic,
                    active: entry.dumped.clone().filter(|dumped| !dumped.wire.is_empty()),
                    error: entry.dumped.as_ref().and_then(|dumped| dumped.error.clone()),
                    warming: entry
                        .warming
                        .as_ref()
                        .map(|warming| Dumped::accepted(warming.wire.clone(), Arc::clone(&warming.version))),
                    draining: None,
                })
                .chain(self.draining.iter().filter_map(|drain| match &drain.what {
                    Leaving::Listener { dumped, .. } => Some(ListenerDump {
                        name: drain.listener.name.to_string(),
                        dynamic: true,
                        active: None,
                        error: None,
                        warming: None,
                        draining: dumped.clone(),
                    }),
                    Leaving::Chains(_) => None,
                }))
                .collect(),
        }
    }
}
