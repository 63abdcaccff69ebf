//! What `/config_dump` shows of clusters and their endpoints.

use std::sync::Arc;

use super::Clusters;
use crate::admin::config_dump::ResourceDump;
use crate::manager::dump::Dumped;

impl Clusters {
    /// For `/config_dump`.
    pub fn dump(&self) -> Vec<ResourceDump> {
        let mut all = Vec::with_capacity(self.entries.len());
        for (name, entry) in &self.entries {
            for (live, warming) in [(entry.active.as_ref(), false), (entry.warming.as_ref(), true)] {
                let Some(live) = live else {
                    continue;
                };
                all.push(ResourceDump {
                    name: name.clone(),
                    dynamic: entry.dynamic,
                    warming,
                    dumped: Dumped {
                        wire: live.wire.clone(),
                        version: Arc::clone(&live.version),
                        last_updated: entry.updated,
                        error: entry.refused.clone(),
                    },
                });
            }
        }
        all
    }

    /// Endpoints for `/config_dump?include_eds`.
    pub fn dump_endpoints(&self) -> Vec<ResourceDump> {
        let dynamic = self.assignments.iter().map(|(name, dumped)| ResourceDump {
            name: name.clone(),
            dynamic: true,
            warming: false,
            dumped: dumped.clone(),
        });
        // Whole clusters: whoever renders them takes the endpoints out.
        let fixed = self.entries.iter().filter_map(|(name, entry)| {
            let live = entry.active.as_ref()?;
            Some(ResourceDump {
                name: name.clone(),
                dynamic: false,
                warming: false,
                dumped: Dumped::accepted(live.wire.clone(), Arc::clone(&live.version)),
            })
        });
        dynamic.chain(fixed).collect()
    }
}
