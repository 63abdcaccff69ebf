//! `rate_limits` of routes and virtual hosts: what requests are counted as, for the filters that limit them.

use std::any::Any;

use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_filter_api::stream::RateLimits;
use waystation_ratelimit::descriptor::{Place, Policies};
use waystation_schema::ConfigError;

use crate::action::Action;
use crate::table::{CompileContext, RouteTable};

pub(crate) fn compile(
    protos: &[pb::RateLimit],
    cx: &CompileContext<'_>,
) -> Result<Option<Box<Policies>>, ConfigError> {
    if protos.is_empty() {
        return Ok(None);
    }
    Policies::compile(protos, Place::Route, "rate_limits", cx.runtime)
        .map(|policies| Some(Box::new(policies)))
}

/// Those of a route that forwards.
pub(crate) fn of(table: &RouteTable, route: u32) -> Option<RateLimits<'_>> {
    let Action::Route(action) = &table.route(route)?.action else { return None };
    Some(RateLimits {
        route: erased(&action.rate_limits),
        virtual_host: table.virtual_host(route).and_then(|host| erased(&host.rate_limits)),
        include_virtual_host: action.include_vh_rate_limits,
    })
}

fn erased(policies: &Option<Box<Policies>>) -> Option<&(dyn Any + Send + Sync)> {
    policies.as_deref().map(|policies| policies as _)
}
