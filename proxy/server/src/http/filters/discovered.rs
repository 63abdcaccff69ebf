//! A place in a filter chain whose filter comes by ECDS.
//!
//! One resource may fill several places, of one connection manager or of many: each compiles it for itself, below its
//! own statistics. A stream is given the filter that is in force when it begins, and keeps it.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::Any;
use waystation_filter_api::cell::{Cell, CellTable};
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::http::{
    FilterConfig, Flow, HttpFilter, HttpFilterFactory, LocalReply, Phases, StreamCx,
};
use waystation_filter_api::wire::{message_name, type_name};
use waystation_http::Headers;
use waystation_schema::{At, ConfigError};
use waystation_stats::Scope;

use super::{EXTENSIONS, Inner, ROUTER, find};
use crate::context::Shared;

/// A filter of a chain that is configured by ECDS.
#[derive(Debug)]
pub struct DiscoveredFilter {
    shared: Arc<Shared>,
    /// Of the connection manager.
    scope: Scope,
    /// What the resource may be, without `type.googleapis.com/`.
    type_names: Box<[Box<str>]>,
    default: Option<Arc<dyn HttpFilterFactory>>,
    /// Whether the listener waits for the first configuration.
    warms: bool,
    in_force: Arc<Cell<InForce>>,
}

#[derive(Debug)]
struct InForce(Arc<dyn HttpFilterFactory>);

impl DiscoveredFilter {
    /// Compiles the place of the filter `name`.
    pub(super) fn compile(
        name: &str,
        proto: &core::ExtensionConfigSource,
        scope: &Scope,
        shared: &Arc<Shared>,
    ) -> Result<Self, ConfigError> {
        let core::ExtensionConfigSource {
            // The subscription is made by whoever is told of the need.
            config_source: _,
            default_config,
            apply_default_config_without_warming,
            type_urls,
        } = proto;
        if *apply_default_config_without_warming && default_config.is_none() {
            let reason =
                format!("Error: filter config {name} applied without warming but has no default config.");
            return Err(ConfigError::new(reason));
        }
        if type_urls.is_empty() {
            return Err(ConfigError::field("type_urls", "must not be empty"));
        }
        let mut type_names = Vec::with_capacity(type_urls.len());
        for url in type_urls {
            let type_name = message_name(url);
            if type_name == ROUTER {
                return Err(ConfigError::field("type_urls", "the router cannot be discovered"));
            }
            if !EXTENSIONS.iter().any(|extension| extension.type_name == type_name) {
                let reason = format!("Error: no factory found for a required type URL {url}.");
                return Err(ConfigError::new(reason));
            }
            type_names.push(type_name.into());
        }
        let mut place = Self {
            shared: Arc::clone(shared),
            scope: scope.clone(),
            type_names: type_names.into(),
            default: None,
            warms: !apply_default_config_without_warming,
            in_force: CellTable::new().cell(name),
        };
        if let Some(any) = default_config {
            place.default = Some(place.factory(any).at(|| "default_config")?);
        }
        Ok(place)
    }

    /// Whether the listener waits for the first configuration.
    pub fn warms(&self) -> bool {
        self.warms
    }

    /// Compiles a resource for this place.
    ///
    /// # Errors
    /// When it is of a type that this place does not take, or invalid.
    pub fn factory(&self, any: &Any) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
        if !self.takes(any) {
            let expected: Vec<&str> = self.type_names.iter().map(|name| &**name).collect();
            return Err(ConfigError::new(format!(
                "Error: filter config has type URL {} but expect {}.",
                type_name(any),
                expected.join(", ")
            )));
        }
        let inner = Inner { scope: &self.scope, shared: &self.shared, cx: None };
        inner.compile_as(find(self.in_force.name(), any)?, any)
    }

    /// Whether a resource is of a type that this place takes.
    pub fn takes(&self, any: &Any) -> bool {
        self.type_names.iter().any(|name| **name == *type_name(any))
    }

    /// Makes `factory` the one for new streams; with nothing, the default is.
    pub fn set(&self, factory: Option<Arc<dyn HttpFilterFactory>>) {
        self.in_force.set(factory.map(|factory| Arc::new(InForce(factory))));
    }
}

impl HttpFilterFactory for DiscoveredFilter {
    // A stream asks the factory in force.
    fn phases(&self) -> Phases {
        Phases::default()
    }

    fn in_force(&self) -> Option<Arc<dyn HttpFilterFactory>> {
        let discovered = self.in_force.get().map(|in_force| Arc::clone(&in_force.0));
        Some(discovered.or_else(|| self.default.clone()).unwrap_or_else(|| Arc::new(Missing)))
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        None
    }
}

/// Stands in for a filter without a configuration: its streams are refused rather than let through without it.
#[derive(Clone, Copy, Debug)]
struct Missing;

impl HttpFilterFactory for Missing {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(*self))
    }
}

impl HttpFilter for Missing {
    fn decode_headers(&mut self, _cx: &mut StreamCx<'_>, _head: &mut Headers, _end: bool) -> Flow {
        let mut reply = LocalReply::new(500, "", "");
        reply.flag = Some(ResponseFlag::NoFilterConfigFound);
        Flow::Reply(Box::new(reply))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::extensions::filters::http::header_mutation::v3::HeaderMutation;
    use prost::Message as _;

    const HEADER_MUTATION: &str =
        "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";

    fn place(proto: &core::ExtensionConfigSource) -> Result<DiscoveredFilter, ConfigError> {
        let shared = crate::context::tests::shared();
        let scope = shared.stats.root();
        DiscoveredFilter::compile("f", proto, &scope, &shared)
    }

    fn source() -> core::ExtensionConfigSource {
        core::ExtensionConfigSource { type_urls: vec![HEADER_MUTATION.into()], ..Default::default() }
    }

    fn config(url: &str) -> Any {
        Any { type_url: url.into(), value: HeaderMutation::default().encode_to_vec() }
    }

    /// Whether a stream gets an instance from the factory in force.
    fn makes_any(place: &DiscoveredFilter) -> bool {
        place.in_force().is_some_and(|factory| factory.create(&[]).is_some())
    }

    #[test]
    fn without_a_configuration_streams_are_refused() {
        let place = place(&source()).unwrap();
        assert!(place.warms() && place.in_force().unwrap().phases().request_headers);
        assert!(makes_any(&place), "the one that refuses");
        place.set(Some(place.factory(&config(HEADER_MUTATION)).unwrap()));
        assert!(!makes_any(&place), "a mutation of nothing has no instance");
        place.set(None);
        assert!(makes_any(&place));
    }

    #[test]
    fn the_default_stands_in_until_there_is_another() {
        let with_default = core::ExtensionConfigSource {
            default_config: Some(config(HEADER_MUTATION)),
            apply_default_config_without_warming: true,
            ..source()
        };
        let place = place(&with_default).unwrap();
        assert!(!place.warms());
        assert!(!makes_any(&place));
    }

    #[test]
    fn refusals() {
        let place_of = |proto| place(&proto).unwrap_err().to_string();
        let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
        assert!(place_of(core::ExtensionConfigSource::default()).contains("type_urls"));
        let of_router = core::ExtensionConfigSource { type_urls: vec![router.into()], ..source() };
        assert!(place_of(of_router).contains("router"));
        let unwarmed = core::ExtensionConfigSource { apply_default_config_without_warming: true, ..source() };
        assert!(place_of(unwarmed).contains("no default config"));
        let error = place(&source()).unwrap().factory(&config(router)).unwrap_err().to_string();
        assert!(error.contains("but expect envoy.extensions.filters.http.header_mutation"), "{error}");
    }
}
