//! `envoy.filters.http.on_demand`: a request whose route, or whose cluster, is not there yet waits until it has been
//! fetched.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::http::on_demand::v3 as pb;
use prost::Message as _;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::http::{
    ClusterSource, FactoryContext, Fetched, FilterConfig, Flow, HttpFilter, HttpFilterExtension,
    HttpFilterFactory, LocalFuture, LocalReply, Phases, StreamCx,
};
use waystation_filter_api::wire;
use waystation_http::Headers;
use waystation_schema::{At, ConfigError};
use waystation_stats::Scope;

use crate::config_source;
use crate::manager::on_demand;
use crate::manager::subscription_stats::SubscriptionStats;

/// The filter.
pub(super) static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.on_demand",
    type_name: "envoy.extensions.filters.http.on_demand.v3.OnDemand",
    route_type_name: Some("envoy.extensions.filters.http.on_demand.v3.PerRouteConfig"),
    compile,
    compile_route,
};

/// How long a request waits for a cluster when the configuration does not say.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(5);

/// Where unknown clusters come from, if they are fetched.
#[derive(Debug)]
struct Config {
    clusters: Option<Arc<ClusterSource>>,
    /// Held for the statistics to be there.
    _stats: Option<SubscriptionStats>,
}

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let pb::OnDemand { odcds } = decode(wire)?;
    Ok(Arc::new(Config::compile(odcds.as_ref(), cx.root)?))
}

fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    let pb::PerRouteConfig { odcds } = decode(wire)?;
    Ok(Arc::new(Config::compile(odcds.as_ref(), cx.root)?))
}

fn decode<M: prost::Message + Default>(wire: &[u8]) -> Result<M, ConfigError> {
    M::decode(wire).map_err(|error| ConfigError::new(error.to_string()))
}

impl Config {
    fn compile(proto: Option<&pb::OnDemandCds>, root: &Scope) -> Result<Self, ConfigError> {
        let Some(pb::OnDemandCds { source, resources_locator, timeout }) = proto else {
            return Ok(Self { clusters: None, _stats: None });
        };
        let compile = || {
            if !resources_locator.is_empty() {
                let reason = "xdstp resource names are not supported";
                return Err(ConfigError::field("resources_locator", reason));
            }
            let source = source.as_ref().ok_or_else(|| ConfigError::field("source", "is required"))?;
            config_source::check_on_demand(source).at(|| "source")?;
            let timeout = wire::duration("timeout", timeout.as_ref())?.unwrap_or(CLUSTER_TIMEOUT);
            Ok(ClusterSource { config: source.encode_to_vec().into(), timeout })
        };
        let clusters = Some(Arc::new(compile().at(|| "odcds")?));
        Ok(Self { clusters, _stats: Some(on_demand::scope(root).group()) })
    }
}

impl HttpFilterFactory for Config {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        let clusters = self.clusters.clone();
        Some(Box::new(Filter { clusters, asked_for_route: false, asked_for_cluster: false }))
    }
}

/// Asks once for each: what does not come is not there.
struct Filter {
    clusters: Option<Arc<ClusterSource>>,
    asked_for_route: bool,
    asked_for_cluster: bool,
}

impl HttpFilter for Filter {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        if cx.info.route.is_none() {
            return match std::mem::replace(&mut self.asked_for_route, true) {
                true => Flow::Continue,
                false => wait(cx.driver.fetch_route(head)),
            };
        }
        if cx.info.upstream.cluster.is_some() || self.asked_for_cluster {
            return Flow::Continue;
        }
        // A route has its own source, or none and then no discovery, whatever the filter has.
        let of_route = cx.route_config.iter().find_map(|config| config.downcast_ref::<Config>());
        let Some(source) = of_route.map_or(self.clusters.as_ref(), |config| config.clusters.as_ref()) else {
            return Flow::Continue;
        };
        self.asked_for_cluster = true;
        wait(cx.driver.fetch_cluster(source, head))
    }
}

fn wait(fetched: Option<LocalFuture<Fetched>>) -> Flow {
    let Some(fetched) = fetched else { return Flow::Continue };
    Flow::Wait(Box::pin(async {
        match fetched.await {
            Fetched::Done => Flow::Anew,
            Fetched::Full => Flow::Reply(Box::new(overflow())),
        }
    }))
}

/// Envoy has no bound. To say that there is no such host would be untrue, and caches might believe it.
fn overflow() -> LocalReply {
    let mut reply =
        LocalReply::new(503, "too many requests wait for their configuration", "on_demand_overflow");
    reply.flag = Some(ResponseFlag::UpstreamOverflow);
    reply
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::core::v3 as core;

    fn refusal(proto: pb::OnDemandCds) -> String {
        let shared = crate::context::tests::shared();
        Config::compile(Some(&proto), &shared.stats.root()).unwrap_err().to_string()
    }

    #[test]
    fn refusals_name_their_path() {
        assert_eq!(refusal(pb::OnDemandCds::default()), "odcds.source: is required");
        let located = pb::OnDemandCds { resources_locator: "xdstp://a/b".into(), ..Default::default() };
        assert!(refusal(located).starts_with("odcds.resources_locator: "));
        let path = core::config_source::ConfigSourceSpecifier::PathConfigSource(core::PathConfigSource {
            path: "/f".into(),
            ..Default::default()
        });
        let source = core::ConfigSource { config_source_specifier: Some(path), ..Default::default() };
        let error = refusal(pb::OnDemandCds { source: Some(source), ..Default::default() });
        assert!(error.starts_with("odcds.source: "), "{error}");
    }
}
