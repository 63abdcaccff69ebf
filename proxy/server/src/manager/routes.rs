//! Route configurations, compiled against the clusters and filters of this process.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use waystation_route::{CompileContext, RouteTable};
use waystation_schema::ConfigError;

use crate::context::Shared;
use crate::http::{filters, refuse_unsupported};

/// Compiles a route configuration. `validate_clusters` is the default where the configuration does not say: true for an
/// inline one, false for one by RDS.
pub fn compile(
    proto: &RouteConfiguration,
    validate_clusters: bool,
    shared: &Arc<Shared>,
) -> Result<RouteTable, ConfigError> {
    let table = RouteTable::compile(
        proto,
        &CompileContext {
            clusters: &shared.clusters,
            runtime: &shared.runtime,
            validate_clusters,
            filter_config: &|name, any| filters::compile_route_config(name, any, shared),
        },
    )?;
    refuse_unsupported(&table)?;
    Ok(table)
}
