//! `envoy.filters.http.composite`: which filters a stream goes through is decided by a matcher, its own or that of an
//! `ExtensionWithMatcher` around it. The filters stand beside it in the chain and are called by the chain, as any other.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::filters::http::composite::v3 as pb;
use waystation_filter_api::filter_state::{Object, Sharing};
use waystation_filter_api::http::{
    FactoryContext, FilterConfig, HttpFilter, HttpFilterExtension, HttpFilterFactory, Phases, StreamCx,
};
use waystation_filter_api::runtime::RuntimeFraction;
use waystation_filter_api::wire::decode;
use waystation_schema::{At, ConfigError};
use waystation_stats::stats_group;

use crate::match_delegate::{Delegating, Of, compile_tree, route_config};

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.composite",
    type_name: "envoy.extensions.filters.http.composite.v3.Composite",
    route_type_name: Some("envoy.extensions.filters.http.composite.v3.CompositePerRoute"),
    compile,
    compile_route,
};

/// Where the filter state says which action was taken by which filter.
const MATCHED_ACTIONS: &str = "envoy.extensions.filters.http.composite.matched_actions";

stats_group! {
    /// What the filter counts.
    struct CompositeStats {
        counters { filter_delegation_error, filter_delegation_success }
    }
}

/// The filters of an action, in order.
type Filters = Box<[Arc<dyn HttpFilterFactory>]>;

#[derive(Debug)]
struct Factory {
    stats: CompositeStats,
    named: HashMap<Box<str>, Filters>,
}

/// `ExecuteFilterAction`.
#[derive(Debug)]
pub(crate) struct Execute {
    /// What the filter state calls it.
    name: Box<str>,
    /// The filters; those of the name in the filter's own configuration otherwise.
    filters: Option<Filters>,
    sample: Option<RuntimeFraction>,
}

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let pb::Composite { named_filter_chains, matcher } = decode(wire)?;
    let mut named = HashMap::with_capacity(named_filter_chains.len());
    for (name, chain) in &named_filter_chains {
        let filters = compile_chain(chain, cx).at(|| format!("named_filter_chains[{name}]"))?;
        if filters.is_empty() {
            let reason = format!("Named filter chain '{name}' must contain at least one filter.");
            return Err(ConfigError::new(reason));
        }
        named.insert(name.as_str().into(), filters);
    }
    let factory = Arc::new(Factory { stats: cx.stats.scope("composite").group(), named });
    let tree = matcher.map(|matcher| compile_tree(&matcher, cx).at(|| "matcher")).transpose()?;
    Ok(Arc::new(Delegating::composite(factory, tree)))
}

fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    let pb::CompositePerRoute { matcher } = decode(wire)?;
    let matcher = matcher.ok_or_else(|| ConfigError::field("matcher", "is required"))?;
    Ok(route_config(Of::Composite, compile_tree(&matcher, cx).at(|| "matcher")?))
}

fn compile_chain(
    proto: &pb::FilterChainConfiguration,
    cx: &FactoryContext<'_>,
) -> Result<Filters, ConfigError> {
    let compile = |(index, config): (usize, &TypedExtensionConfig)| {
        let compiled = cx.filters.compile(&config.name, config.typed_config.as_ref());
        compiled.at(|| format!("typed_config[{index}]"))
    };
    proto.typed_config.iter().enumerate().map(compile).collect()
}

impl Execute {
    pub(crate) fn compile(
        proto: &pb::ExecuteFilterAction,
        cx: &FactoryContext<'_>,
    ) -> Result<Self, ConfigError> {
        let pb::ExecuteFilterAction {
            typed_config,
            dynamic_config,
            filter_chain,
            filter_chain_name,
            sample_percent,
        } = proto;
        let mut kinds = Vec::new();
        if let Some(config) = typed_config {
            let filter = cx.filters.compile(&config.name, config.typed_config.as_ref());
            kinds.push((&*config.name, Some(Box::from([filter.at(|| "typed_config")?]))));
        }
        if let Some(pb::DynamicConfig { name, config_discovery }) = dynamic_config {
            let source = config_discovery.as_ref();
            let source = source.ok_or_else(|| ConfigError::field("config_discovery", "is required"));
            let filter = source
                .and_then(|source| cx.filters.discover(name, source).at(|| "config_discovery"))
                .at(|| "dynamic_config")?;
            kinds.push((name, Some(Box::from([filter]))));
        }
        if let Some(chain) = filter_chain {
            let filters = compile_chain(chain, cx).at(|| "filter_chain")?;
            if filters.is_empty() {
                return Err(ConfigError::new("filter_chain must contain at least one filter."));
            }
            kinds.push(("filter_chain", Some(filters)));
        }
        if !filter_chain_name.is_empty() {
            kinds.push((filter_chain_name, None));
        }
        let Some((name, filters)) = kinds.pop() else {
            return Err(ConfigError::new("Didn't find a registered implementation for '' with type URL: ''"));
        };
        if !kinds.is_empty() {
            let fields = "typed_config, dynamic_config, filter_chain and filter_chain_name";
            return Err(ConfigError::new(format!("only one of {fields} can be set")));
        }
        let sample = sample_percent.as_ref().map(|percent| cx.runtime.fractional_percent(percent));
        Ok(Self { name: name.into(), filters, sample })
    }
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases::default()
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(Composite))
    }
}

/// Waits for its matcher.
struct Composite;

impl HttpFilter for Composite {
    fn on_match(&mut self, cx: &mut StreamCx<'_>, action: &dyn Any) {
        let Some(action) = action.downcast_ref::<Execute>() else { return };
        if action.sample.as_ref().is_some_and(|sample| !sample.contains(cx.random())) {
            return;
        }
        let factory = cx.config::<Factory>();
        // As in Envoy, a name that there is not is no error.
        let filters = action.filters.as_ref().or_else(|| factory.named.get(&action.name));
        let Some(filters) = filters else { return };
        factory.stats.filter_delegation_success().inc();
        note_action(cx, &action.name);
        cx.delegate_to(filters.iter().cloned());
    }
}

/// Which action each composite filter of a stream has taken.
#[derive(Clone, Debug, Default)]
struct MatchedActions(BTreeMap<Box<str>, Box<str>>);

fn note_action(cx: &mut StreamCx<'_>, action: &str) {
    let known = cx.info.filter_state.get(MATCHED_ACTIONS);
    let known = known.and_then(|object| object.as_any().downcast_ref::<MatchedActions>());
    let mut actions = known.cloned().unwrap_or_default();
    actions.0.insert(cx.name.into(), action.into());
    cx.info.filter_state.set(MATCHED_ACTIONS, Rc::new(actions), false, Sharing::None);
}

impl Object for MatchedActions {
    fn serialize(&self) -> Option<Vec<u8>> {
        let fields = self.0.iter().map(|(filter, action)| format!("{}:{}", quoted(filter), quoted(action)));
        Some(format!("{{{}}}", fields.collect::<Vec<_>>().join(",")).into_bytes())
    }

    fn is_json(&self) -> bool {
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            '\0'..' ' => quoted.push_str(&format!("\\u{:04x}", u32::from(letter))),
            _ => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::MatchedActions;
    use waystation_filter_api::filter_state::Object as _;

    #[test]
    fn matched_actions_are_json() {
        let actions = [("b", "x\"\n"), ("a", "\\")].map(|(filter, action)| (filter.into(), action.into()));
        let text = MatchedActions(actions.into()).serialize().unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), r#"{"a":"\\","b":"x\"\u000a"}"#);
    }
}
