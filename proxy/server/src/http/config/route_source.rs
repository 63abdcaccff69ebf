//! `route_specifier`: where the routes of a request come from.

use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use pb::http_connection_manager::RouteSpecifier;
use pb::scoped_routes::ConfigSpecifier;
use prost::Message as _;
use waystation_filter_api::cell::{Cell, CellTable};
use waystation_route::{Action, RouteTable, ScopeKeyBuilder, VirtualHost};
use waystation_schema::{At, ConfigError};
use waystation_stats::Scope;

use crate::context::CompileContext;
use crate::manager::routes;
use crate::manager::scopes::{self, ScopeMap};

/// Where the routes of a request come from.
#[derive(Debug)]
pub(crate) enum Routes {
    /// One route configuration.
    Table(Arc<Cell<RouteTable>>),
    /// The route configuration of the request's scope.
    Scoped { key: ScopeKeyBuilder, scopes: Arc<Cell<ScopeMap>> },
}

impl Routes {
    pub(super) fn compile(
        specifier: Option<&RouteSpecifier>,
        http: &Scope,
        cx: &CompileContext<'_>,
    ) -> Result<Self, ConfigError> {
        match specifier {
            None => Err(ConfigError::field("route_specifier", "is required")),
            Some(RouteSpecifier::RouteConfig(config)) => {
                if config.vhds.is_some() {
                    let reason = "only a route configuration by RDS can have virtual hosts by VHDS";
                    return Err(ConfigError::field("vhds", reason).at("route_config"));
                }
                let table = routes::compile(config, true, cx.shared).at(|| "route_config")?;
                // Nobody else knows the name: the cell is this connection manager's own.
                let cell = CellTable::new().cell(&config.name);
                cell.set(Some(Arc::new(table)));
                Ok(Self::Table(cell))
            }
            Some(RouteSpecifier::Rds(rds)) => {
                let source = rds
                    .config_source
                    .as_ref()
                    .ok_or_else(|| ConfigError::field("rds.config_source", "is required"))?;
                Ok(Self::Table(cx.route_cell(source, &rds.route_config_name, http)))
            }
            Some(RouteSpecifier::ScopedRoutes(scoped)) => {
                scoped_routes(scoped, http, cx).at(|| "scoped_routes")
            }
        }
    }
}

fn scoped_routes(
    proto: &pb::ScopedRoutes,
    http: &Scope,
    cx: &CompileContext<'_>,
) -> Result<Routes, ConfigError> {
    let pb::ScopedRoutes { name, scope_key_builder, rds_config_source, config_specifier } = proto;
    let key = scope_key_builder.as_ref();
    let key = key.ok_or_else(|| ConfigError::field("scope_key_builder", "is required"))?;
    let key = ScopeKeyBuilder::compile(key).at(|| "scope_key_builder")?;
    let scopes = match config_specifier {
        None => return Err(ConfigError::field("config_specifier", "is required")),
        Some(ConfigSpecifier::ScopedRouteConfigurationsList(list)) => {
            scopes::compile_list(&list.scoped_route_configurations, cx.shared)
                .at(|| "scoped_route_configurations_list")?
        }
        Some(ConfigSpecifier::ScopedRds(srds)) => {
            let pb::ScopedRds { scoped_rds_config_source, srds_resources_locator } = srds;
            if !srds_resources_locator.is_empty() {
                let field = "scoped_rds.srds_resources_locator";
                return Err(ConfigError::field(field, "xdstp resource names are not supported"));
            }
            let source = scoped_rds_config_source.as_ref();
            let source = source
                .ok_or_else(|| ConfigError::field("scoped_rds.scoped_rds_config_source", "is required"))?;
            cx.scopes_cell(source, rds_config_source.as_ref(), name, http)
        }
    };
    Ok(Routes::Scoped { key, scopes })
}

pub(super) fn inline_scopes(proto: &pb::ScopedRoutes) -> Option<(String, Vec<Bytes>)> {
    let Some(ConfigSpecifier::ScopedRouteConfigurationsList(list)) = &proto.config_specifier else {
        return None;
    };
    let scopes = list.scoped_route_configurations.iter();
    Some((proto.name.clone(), scopes.map(|scope| scope.encode_to_vec().into()).collect()))
}

/// Refuses what the routes' crate compiles and this router does not do: it must not be dropped in silence.
pub(crate) fn refuse_unsupported(host: &VirtualHost) -> Result<(), ConfigError> {
    for route in host.routes() {
        let Action::Route(action) = &route.action else { continue };
        let unsupported = [(
            "upgrade_configs.connect_config",
            action.upgrades.iter().any(|upgrade| {
                upgrade.terminate_connect && (upgrade.allow_post || &*upgrade.protocol != "connect")
            }),
        )];
        for (field, set) in unsupported {
            if set {
                return Err(ConfigError::field(field, "is not supported in this version")
                    .at("route")
                    .at(format!("routes[{}]", route.name))
                    .at(format!("virtual_hosts[{}]", host.name)));
            }
        }
    }
    Ok(())
}
