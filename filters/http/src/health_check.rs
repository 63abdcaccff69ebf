//! `envoy.filters.http.health_check`: answers the health checks that others make of this proxy.
//!
//! A request that matches is answered here, unless the filter is in pass-through mode: then upstream answers, and its answer
//! may serve for a while. While the operator has failed the health check, all checks fail, and every other response tells
//! whoever checks us to let us be (`x-envoy-immediate-health-check-fail`).

use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::extensions::filters::http::health_check::v3 as pb;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::http::{
    Driver, FactoryContext, FilterConfig, Flow, HttpFilter, HttpFilterExtension, HttpFilterFactory,
    LocalReply, Phases, StreamCx,
};
use waystation_filter_api::wire::{bool_value, decode, duration};
use waystation_http::{Headers, Known};
use waystation_matchers::{HeaderMatcher, all_match};
use waystation_schema::ConfigError;

mod cache;

use cache::Cache;

/// The filter.
pub static EXTENSION: HttpFilterExtension = HttpFilterExtension {
    name: "envoy.filters.http.health_check",
    type_name: "envoy.extensions.filters.http.health_check.v3.HealthCheck",
    route_type_name: None,
    compile,
    compile_route,
};

#[derive(Debug)]
struct Factory {
    pass_through: bool,
    /// The last answer of upstream, in pass-through mode with a `cache_time`.
    cache: Option<Cache>,
    /// Which share of its hosts each of these clusters must have, in percent.
    clusters: Box<[(Box<str>, u64)]>,
    matchers: Box<[HeaderMatcher]>,
    /// The cluster that this proxy belongs to (`node.cluster`).
    own_cluster: Box<str>,
}

fn compile(wire: &[u8], cx: &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    let pb::HealthCheck { pass_through_mode, cache_time, cluster_min_healthy_percentages, headers } =
        decode(wire)?;
    let pass_through = bool_value(pass_through_mode.as_ref(), false);
    let cache_time = duration("cache_time", cache_time.as_ref())?.filter(|time| !time.is_zero());
    if !pass_through && cache_time.is_some() {
        return Err(ConfigError::new("cache_time_ms must not be set when path_through_mode is disabled"));
    }
    let mut clusters: Vec<_> = cluster_min_healthy_percentages
        .iter()
        // Whole percents, as in Envoy; the walk has seen that there are at most 100.
        .map(|(name, percent)| (name.as_str().into(), percent.value.clamp(0.0, 100.0) as u64))
        .collect();
    clusters.sort();
    Ok(Arc::new(Factory {
        pass_through,
        cache: cache_time.map(|time| Cache::new(time, Instant::now())),
        clusters: clusters.into(),
        matchers: HeaderMatcher::compile_all(&headers, "headers")?,
        own_cluster: cx.node.cluster.as_str().into(),
    }))
}

fn compile_route(_: &[u8], _: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    Err(ConfigError::new("the filter has no configuration of routes"))
}

impl HttpFilterFactory for Factory {
    fn phases(&self) -> Phases {
        Phases { request_headers: true, response_headers: true, ..Phases::default() }
    }

    fn create(&self, _: &[FilterConfig]) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(Other))
    }
}

/// Why a check is answered as it is: `%RESPONSE_CODE_DETAILS%`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Ok,
    Failed,
    Cached { status: u16, degraded: bool },
    ClustersHealthy,
    NoCluster,
    ClusterEmpty,
    ClusterUnhealthy,
}

impl Verdict {
    fn details(self) -> &'static str {
        match self {
            Self::Ok => "health_check_ok",
            Self::Failed => "health_check_failed",
            Self::Cached { .. } => "health_check_cached",
            Self::ClustersHealthy => "health_check_ok_cluster_healthy",
            Self::NoCluster => "health_check_failed_no_cluster_found",
            Self::ClusterEmpty => "health_check_failed_cluster_empty",
            Self::ClusterUnhealthy => "health_check_failed_cluster_unhealthy",
        }
    }

    fn status(self) -> u16 {
        match self {
            Self::Ok | Self::ClustersHealthy => 200,
            Self::Cached { status, .. } => status,
            Self::Failed | Self::NoCluster | Self::ClusterEmpty | Self::ClusterUnhealthy => 503,
        }
    }
}

impl Factory {
    /// The answer to a check, if it is ours to give.
    fn answer(&self, driver: &dyn Driver) -> Option<Verdict> {
        if driver.is_health_check_failed() {
            return Some(Verdict::Failed);
        }
        if self.pass_through {
            let (status, degraded) = self.cache.as_ref()?.get(driver.now())?;
            return Some(Verdict::Cached { status, degraded });
        }
        if self.clusters.is_empty() {
            return Some(Verdict::Ok);
        }
        let failing = self.clusters.iter().find_map(|(name, least)| {
            let Some(hosts) = driver.membership(name) else { return Some(Verdict::NoCluster) };
            if hosts.total == 0 {
                return (*least > 0).then_some(Verdict::ClusterEmpty);
            }
            let is_enough = 100 * (hosts.healthy + hosts.degraded) >= hosts.total * least;
            (!is_enough).then_some(Verdict::ClusterUnhealthy)
        });
        Some(failing.unwrap_or(Verdict::ClustersHealthy))
    }
}

/// A stream that is no health check, or not known to be one yet. Takes no memory.
struct Other;

/// A health check.
struct Check;

impl HttpFilter for Other {
    fn decode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        let factory = cx.config::<Factory>();
        if !all_match(&factory.matchers, head) {
            return Flow::Continue;
        }
        cx.info.health_check = true;
        let phases = Phases { response_headers: true, ..Phases::default() };
        cx.succeed_by(Box::new(Check), phases);
        let Some(verdict) = factory.answer(cx.driver) else { return Flow::Continue };
        let mut reply = LocalReply::new(verdict.status(), "", verdict.details());
        if !(200..300).contains(&reply.status) {
            reply.flag = Some(ResponseFlag::FailedLocalHealthCheck);
        }
        if let Verdict::Cached { degraded: true, .. } = verdict {
            reply.headers.append(Known::XEnvoyDegraded, "");
        }
        Flow::Reply(Box::new(reply))
    }

    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        tell_failure(cx, head);
        Flow::Continue
    }
}

/// Whoever checks this proxy by its responses is told while the operator has failed the check.
fn tell_failure(cx: &StreamCx<'_>, head: &mut Headers) {
    if cx.driver.is_health_check_failed() {
        head.set(Known::XEnvoyImmediateHealthCheckFail, "true");
    }
}

impl HttpFilter for Check {
    fn encode_headers(&mut self, cx: &mut StreamCx<'_>, head: &mut Headers, _end: bool) -> Flow {
        let factory = cx.config::<Factory>();
        if let Some(cache) = &factory.cache {
            cache.set(cx.now(), head.status().unwrap_or(0), head.contains(Known::XEnvoyDegraded));
        }
        head.set(Known::XEnvoyUpstreamHealthcheckedCluster, factory.own_cluster.as_bytes());
        tell_failure(cx, head);
        Flow::Continue
    }
}
