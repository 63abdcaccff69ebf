//! Route configurations, compiled against the clusters and filters of this process.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, VirtualHost};
use envoy_types::pb::google::protobuf::Any;
use waystation_route::{CompileContext, FilterConfigCompiler, RouteTable};
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
    let filter_config = |name: &str, any: &Any| filters::compile_route_config(name, any, shared);
    let table = RouteTable::compile(proto, &context(validate_clusters, shared, &filter_config))?;
    refuse_unsupported(&table)?;
    Ok(table)
}

/// A table with virtual hosts added to those it has.
pub fn with_virtual_hosts(
    base: &RouteTable,
    hosts: &[VirtualHost],
    shared: &Arc<Shared>,
) -> Result<RouteTable, ConfigError> {
    let filter_config = |name: &str, any: &Any| filters::compile_route_config(name, any, shared);
    let table = base.with_virtual_hosts(hosts, &[], &context(false, shared, &filter_config))?;
    refuse_unsupported(&table)?;
    Ok(table)
}

fn context<'a>(
    validate_clusters: bool,
    shared: &'a Arc<Shared>,
    filter_config: &'a FilterConfigCompiler<'a>,
) -> CompileContext<'a> {
    CompileContext {
        clusters: &shared.clusters,
        runtime: &shared.runtime,
        stats: shared.stats.root(),
        validate_clusters,
        filter_config,
    }
}
