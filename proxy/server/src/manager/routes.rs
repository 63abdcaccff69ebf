//! Route configurations, compiled against the clusters and filters of this process.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::google::protobuf::Any;
use waystation_route::{AddedHosts, ClusterPolicies, CompileContext, FilterConfigCompiler, RouteTable};
use waystation_schema::ConfigError;
use waystation_upstream::cluster::RoutePolicies;

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
    table.virtual_hosts().try_for_each(refuse_unsupported)?;
    Ok(table)
}

/// A table with virtual hosts added or replaced, by the names of their resources, and others removed.
pub fn update_virtual_hosts(
    hosts: &mut AddedHosts,
    updated: Vec<(Arc<str>, &VirtualHost)>,
    removed: &[Arc<str>],
    shared: &Arc<Shared>,
) -> Result<Arc<RouteTable>, ConfigError> {
    let filter_config = |name: &str, any: &Any| filters::compile_route_config(name, any, shared);
    hosts.update(updated, removed, &context(false, shared, &filter_config), refuse_unsupported)
}

/// The policies of a cluster that go before those of its routes.
pub fn cluster_policies(
    options: &HttpProtocolOptions,
    shared: &Arc<Shared>,
) -> Result<Option<RoutePolicies>, ConfigError> {
    let filter_config = |name: &str, any: &Any| filters::compile_route_config(name, any, shared);
    let policies = ClusterPolicies::compile(options, &context(false, shared, &filter_config))?;
    Ok(policies.map(|policies| Arc::new(policies) as _))
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
