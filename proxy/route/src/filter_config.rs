//! `typed_per_filter_config`, resolved over all levels when the table is compiled.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use waystation_filter_api::http::FilterConfig;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_schema::{At, ConfigError};

use crate::table::CompileContext;

/// A filter's place in the table's per-filter configuration: found once per filter chain with
/// [`RouteTable::filter_slot`](crate::RouteTable::filter_slot).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct FilterSlot(u16);

/// What the levels of a route say about one filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct FilterLevels<'a> {
    /// The configurations, most specific level first.
    pub configs: &'a [FilterConfig],
    /// Whether the most specific level that mentions the filter disables it; `None` when no level does and the filter
    /// chain decides.
    pub disabled: Option<bool>,
}

/// Names of filters that some level configures, and their slots.
#[derive(Clone, Debug, Default)]
pub(crate) struct FilterNames {
    slots: HashMap<Box<str>, FilterSlot>,
}

/// The resolved levels of one place: weighted cluster, route, virtual host or table. Shared by every place that adds
/// nothing of its own.
#[derive(Clone, Debug, Default)]
pub(crate) struct FilterConfigs(Option<Arc<[Entry]>>);

#[derive(Clone)]
struct Entry {
    slot: FilterSlot,
    configs: Arc<[FilterConfig]>,
    disabled: bool,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("slot", &self.slot)
            .field("configs", &self.configs.len())
            .field("disabled", &self.disabled)
            .finish()
    }
}

impl FilterNames {
    pub(crate) fn find(&self, name: &str) -> Option<FilterSlot> {
        self.slots.get(name).copied()
    }

    /// Compiles one level on top of the less specific ones.
    pub(crate) fn level(
        &mut self,
        below: &FilterConfigs,
        protos: &HashMap<String, Any>,
        cx: &CompileContext<'_>,
    ) -> Result<FilterConfigs, ConfigError> {
        if protos.is_empty() {
            return Ok(below.clone());
        }
        let mut entries: Vec<Entry> = below.0.as_deref().unwrap_or_default().to_vec();
        // Slots follow the order of names, not that of a hash map: one configuration makes one table.
        let mut names: Vec<&String> = protos.keys().collect();
        names.sort_unstable();
        for name in names {
            let own =
                compile_one(name, &protos[name], cx).at(|| format!("typed_per_filter_config[{name}]"))?;
            let Some(own) = own else { continue };
            let slot = self.slot(name)?;
            let (config, disabled) = match own {
                Own::Disabled => (None, true),
                Own::Config(config) => (Some(config), false),
            };
            match entries.iter_mut().find(|entry| entry.slot == slot) {
                Some(entry) => {
                    entry.configs = config.into_iter().chain(entry.configs.iter().cloned()).collect();
                    entry.disabled = disabled;
                }
                None => entries.push(Entry { slot, configs: config.into_iter().collect(), disabled }),
            }
        }
        entries.sort_by_key(|entry| entry.slot);
        Ok(FilterConfigs(Some(entries.into())))
    }

    fn slot(&mut self, name: &str) -> Result<FilterSlot, ConfigError> {
        if let Some(slot) = self.find(name) {
            return Ok(slot);
        }
        let next = u16::try_from(self.slots.len());
        let slot = FilterSlot(
            next.map_err(|_| ConfigError::new("more than 65 536 filters have per-route configuration"))?,
        );
        self.slots.insert(name.into(), slot);
        Ok(slot)
    }
}

impl FilterConfigs {
    pub(crate) fn get(&self, slot: FilterSlot) -> FilterLevels<'_> {
        let entry = self.0.as_deref().and_then(|entries| entries.iter().find(|entry| entry.slot == slot));
        match entry {
            Some(entry) => FilterLevels { configs: &entry.configs, disabled: Some(entry.disabled) },
            None => FilterLevels::default(),
        }
    }
}

enum Own {
    Disabled,
    Config(FilterConfig),
}

/// Unwraps `envoy.config.route.v3.FilterConfig`; nothing for an optional configuration that nobody knows.
fn compile_one(name: &str, any: &Any, cx: &CompileContext<'_>) -> Result<Option<Own>, ConfigError> {
    let wrapper: pb::FilterConfig;
    let (any, optional) = if type_name(any) == "envoy.config.route.v3.FilterConfig" {
        wrapper = unpack(any)?;
        let pb::FilterConfig { config, is_optional, disabled } = &wrapper;
        if *disabled {
            return Ok(Some(Own::Disabled));
        }
        let Some(config) = config else {
            let reason = format!("Empty route/virtual host per filter configuration for {name} filter");
            return Err(ConfigError::field("config", reason));
        };
        (config, *is_optional)
    } else {
        (any, false)
    };
    match (cx.filter_config)(name, any)? {
        Some(config) => Ok(Some(Own::Config(config))),
        None if optional => Ok(None),
        None => {
            let reason = format!(
                "Didn't find a registered implementation for '{name}' with type URL: '{}'",
                type_name(any)
            );
            Err(ConfigError::new(reason))
        }
    }
}
