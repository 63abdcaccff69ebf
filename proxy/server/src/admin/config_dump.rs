//! `/config_dump`.
//!
//! The main thread gives references to encoded resources; they are wrapped as `envoy.admin.v3.ConfigDump` without being
//! decoded, and rendered by the schema.

mod mask;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::google::protobuf::{Any, Timestamp};
use hyper::{Response, StatusCode};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use regex::Regex;
use waystation_schema::{JsonStyle, Message};

use super::{Admin, Body, Query, json, render, respond, shutting_down};
use crate::manager::dump::{Dumped, Refused};
use crate::manager::listeners::ListenersDump;

const TYPE_PREFIX: &str = "type.googleapis.com/";
const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "envoy.config.listener.v3.Listener";
const ROUTE: &str = "envoy.config.route.v3.RouteConfiguration";
const FILTER: &str = "envoy.config.core.v3.TypedExtensionConfig";
const ENDPOINTS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";

/// The configuration of the process at one moment.
#[derive(Debug)]
pub struct ConfigSnapshot {
    /// The bootstrap, encoded.
    pub bootstrap: Bytes,
    /// When the process started.
    pub started: SystemTime,
    /// Clusters.
    pub clusters: Vec<ResourceDump>,
    /// Version of the last CDS update.
    pub clusters_version: Arc<str>,
    /// Listeners.
    pub listeners: ListenersDump,
    /// Version of the last LDS update.
    pub listeners_version: Arc<str>,
    /// Configurations of HTTP filters by ECDS.
    pub filters: Vec<ResourceDump>,
    /// Sets of scopes.
    pub scopes: Vec<ScopesDump>,
    /// Route configurations.
    pub routes: Vec<ResourceDump>,
    /// Secrets, private keys included: the rendering redacts them.
    pub secrets: Vec<ResourceDump>,
    /// Endpoints, filled when asked for: assignments, and for those that are not `dynamic` the clusters that have them.
    pub endpoints: Vec<ResourceDump>,
}

/// One resource.
#[derive(Debug)]
pub struct ResourceDump {
    /// Its name.
    pub name: String,
    /// By xDS rather than from the bootstrap.
    pub dynamic: bool,
    /// Not in force yet.
    pub warming: bool,
    /// The resource.
    pub dumped: Dumped,
}

/// A set of scopes.
#[derive(Debug)]
pub struct ScopesDump {
    /// Its name.
    pub name: String,
    /// By SRDS rather than from a list.
    pub dynamic: bool,
    /// Version and time of the last update; without a message, for there is none.
    pub dumped: Dumped,
    /// The scopes, encoded.
    pub scopes: Vec<Bytes>,
}

/// An element of one of the lists of a section.
struct Item {
    list: &'static str,
    type_name: &'static str,
    name: String,
    wire: Vec<u8>,
}

/// One message of the dump.
struct Section {
    type_name: &'static str,
    version: Arc<str>,
    items: Vec<Item>,
}

pub(super) async fn config_dump(admin: &Admin, query: &Query) -> Response<Body> {
    let include_eds = query.has("include_eds");
    let name_regex = match query.get("name_regex").filter(|regex| !regex.is_empty()).map(Regex::new) {
        None => None,
        Some(Ok(regex)) => Some(regex),
        Some(Err(error)) => {
            let given = query.get("name_regex").unwrap_or_default();
            let reason = waystation_stats::render::short_reason(&error);
            let body = format!("INVALID_ARGUMENT: Error while parsing name_regex from {given}: {reason}");
            return respond(StatusCode::BAD_REQUEST, "text/plain", super::full(body));
        }
    };
    let Some(snapshot) =
        admin.main.ask(move |server| server.configuration().config_snapshot(include_eds)).await
    else {
        return shutting_down();
    };
    let query = query.clone();
    render(move || rendered(&snapshot, include_eds, name_regex.as_ref(), &query)).await
}

fn rendered(
    snapshot: &ConfigSnapshot,
    include_eds: bool,
    name_regex: Option<&Regex>,
    query: &Query,
) -> Response<Body> {
    let mut sections = sections(snapshot, include_eds);
    if let Some(regex) = name_regex {
        for section in &mut sections {
            section.items.retain(|item| item.list == "bootstrap" || is_full_match(regex, &item.name));
        }
    }
    let mask: Vec<&str> =
        query.get("mask").unwrap_or_default().split(',').filter(|path| !path.is_empty()).collect();
    let configs = match query.get("resource").filter(|resource| !resource.is_empty()) {
        Some(resource) => elements(sections, resource, &mask),
        None => whole(sections, &mask),
    };
    let configs = match configs {
        Ok(configs) => configs,
        Err((status, reason)) => {
            return respond(status, "text/plain", super::full(reason));
        }
    };
    json("envoy.admin.v3.ConfigDump", &pb::ConfigDump { configs }.encode_to_vec(), JsonStyle::CONFIG_DUMP)
}

/// `resource=`: every element of that list, with the fields of the mask.
fn elements(sections: Vec<Section>, resource: &str, mask: &[&str]) -> Result<Vec<Any>, (StatusCode, String)> {
    let field = sections
        .iter()
        .find_map(|section| Message::find(section.type_name)?.field_by_name(resource))
        .ok_or_else(|| (StatusCode::NOT_FOUND, format!("{resource} not found in config dump")))?;
    if !field.is_repeated() {
        let reason =
            format!("{resource} is not a repeated field. Use ?mask={resource} to get only this field");
        return Err((StatusCode::BAD_REQUEST, reason));
    }
    let items = sections.into_iter().flat_map(|section| section.items);
    items
        .filter(|item| item.list == resource)
        .map(|item| {
            let wire = match Message::find(item.type_name).filter(|_| !mask.is_empty()) {
                Some(message) => mask::apply_to_element(message, &item.wire, mask),
                None => Some(item.wire),
            };
            let wire = wire.ok_or_else(|| {
                let paths: String = mask.iter().map(|path| format!("paths: \"{path}\"\n")).collect();
                (StatusCode::BAD_REQUEST, format!("FieldMask {paths} could not be successfully used."))
            })?;
            Ok(any(item.type_name, wire))
        })
        .collect()
}

/// Every message of the dump; with a mask those that have all its fields.
fn whole(sections: Vec<Section>, mask: &[&str]) -> Result<Vec<Any>, (StatusCode, String)> {
    let configs: Vec<Any> = sections
        .into_iter()
        .filter_map(|section| {
            let message = Message::find(section.type_name)?;
            let wire = match mask {
                [] => section.encode(),
                _ if mask.iter().all(|path| mask::names_field(message, path)) => {
                    mask::apply(message, &section.encode(), mask)
                }
                _ => return None,
            };
            Some(any(section.type_name, wire))
        })
        .collect();
    if configs.is_empty() && !mask.is_empty() {
        let mask = mask.join(",");
        let reason = format!("FieldMask {mask} could not be successfully applied to any configs.");
        return Err((StatusCode::BAD_REQUEST, reason));
    }
    Ok(configs)
}

fn is_full_match(regex: &Regex, name: &str) -> bool {
    regex.find(name).is_some_and(|found| found.len() == name.len())
}

fn any(type_name: &str, value: Vec<u8>) -> Any {
    Any { type_url: format!("{TYPE_PREFIX}{type_name}"), value }
}

impl Section {
    fn encode(&self) -> Vec<u8> {
        let mut wire = Vec::new();
        let Some(message) = Message::find(self.type_name) else {
            return wire;
        };
        if let Some(field) = message.field_by_name("version_info").filter(|_| !self.version.is_empty()) {
            put(field.number(), self.version.as_bytes(), &mut wire);
        }
        for item in &self.items {
            if item.list == "bootstrap" {
                // The section is the element.
                wire.extend_from_slice(&item.wire);
            } else if let Some(field) = message.field_by_name(item.list) {
                put(field.number(), &item.wire, &mut wire);
            }
        }
        wire
    }
}

fn put(number: u32, bytes: &[u8], wire: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, wire);
    encode_varint(bytes.len() as u64, wire);
    wire.extend_from_slice(bytes);
}

/// In Envoy's order: bootstrap, clusters, discovered filters, endpoints, listeners, routes, secrets.
fn sections(snapshot: &ConfigSnapshot, include_eds: bool) -> Vec<Section> {
    let unversioned: Arc<str> = Arc::from("");
    let mut bootstrap = Vec::new();
    put(1, &snapshot.bootstrap, &mut bootstrap);
    put(2, &timestamp(snapshot.started).encode_to_vec(), &mut bootstrap);
    let bootstrap = Item {
        list: "bootstrap",
        type_name: "envoy.admin.v3.BootstrapConfigDump",
        name: String::new(),
        wire: bootstrap,
    };
    let mut sections = vec![
        Section {
            type_name: "envoy.admin.v3.BootstrapConfigDump",
            version: Arc::clone(&unversioned),
            items: vec![bootstrap],
        },
        Section {
            type_name: "envoy.admin.v3.ClustersConfigDump",
            version: Arc::clone(&snapshot.clusters_version),
            items: snapshot.clusters.iter().map(cluster).collect(),
        },
    ];
    if !snapshot.filters.is_empty() {
        sections.push(Section {
            type_name: "envoy.admin.v3.EcdsConfigDump",
            version: Arc::clone(&unversioned),
            items: snapshot.filters.iter().map(filter).collect(),
        });
    }
    if include_eds {
        sections.push(Section {
            type_name: "envoy.admin.v3.EndpointsConfigDump",
            version: Arc::clone(&unversioned),
            items: snapshot.endpoints.iter().filter_map(endpoints).collect(),
        });
    }
    sections.push(Section {
        type_name: "envoy.admin.v3.ListenersConfigDump",
        version: Arc::clone(&snapshot.listeners_version),
        items: listeners(&snapshot.listeners),
    });
    sections.push(Section {
        type_name: "envoy.admin.v3.ScopedRoutesConfigDump",
        version: Arc::clone(&unversioned),
        items: snapshot.scopes.iter().map(scopes).collect(),
    });
    sections.push(Section {
        type_name: "envoy.admin.v3.RoutesConfigDump",
        version: Arc::clone(&unversioned),
        items: snapshot.routes.iter().map(route).collect(),
    });
    sections.push(Section {
        type_name: "envoy.admin.v3.SecretsConfigDump",
        version: unversioned,
        items: snapshot.secrets.iter().map(secret).collect(),
    });
    sections
}

fn cluster(resource: &ResourceDump) -> Item {
    let Dumped { wire, version, last_updated, error } = &resource.dumped;
    let cluster = Some(any(CLUSTER, wire.to_vec()));
    let last_updated = Some(timestamp(*last_updated));
    let (list, type_name, wire) = if resource.dynamic {
        let dynamic = pb::clusters_config_dump::DynamicCluster {
            version_info: version.to_string(),
            cluster: cluster.filter(|_| !wire.is_empty()),
            last_updated,
            error_state: error.as_ref().map(|error| refused(CLUSTER, error)),
            client_status: 0,
        };
        let list = if resource.warming { "dynamic_warming_clusters" } else { "dynamic_active_clusters" };
        (list, "envoy.admin.v3.ClustersConfigDump.DynamicCluster", dynamic.encode_to_vec())
    } else {
        let fixed = pb::clusters_config_dump::StaticCluster { cluster, last_updated };
        ("static_clusters", "envoy.admin.v3.ClustersConfigDump.StaticCluster", fixed.encode_to_vec())
    };
    Item { list, type_name, name: resource.name.clone(), wire }
}

fn listeners(dump: &ListenersDump) -> Vec<Item> {
    let state = |dumped: &Dumped| pb::listeners_config_dump::DynamicListenerState {
        version_info: dumped.version.to_string(),
        listener: Some(any(LISTENER, dumped.wire.to_vec())),
        last_updated: Some(timestamp(dumped.last_updated)),
    };
    let item = |entry: &crate::manager::listeners::ListenerDump| {
        let (list, type_name, wire) = if entry.dynamic {
            let dynamic = pb::listeners_config_dump::DynamicListener {
                name: entry.name.clone(),
                active_state: entry.active.as_ref().map(state),
                warming_state: entry.warming.as_ref().map(state),
                draining_state: entry.draining.as_ref().map(state),
                error_state: entry.error.as_ref().map(|error| refused(LISTENER, error)),
                client_status: 0,
            };
            let type_name = "envoy.admin.v3.ListenersConfigDump.DynamicListener";
            ("dynamic_listeners", type_name, dynamic.encode_to_vec())
        } else {
            let dumped = entry.active.as_ref().or(entry.warming.as_ref());
            let fixed = pb::listeners_config_dump::StaticListener {
                listener: dumped.map(|dumped| any(LISTENER, dumped.wire.to_vec())),
                last_updated: dumped.map(|dumped| timestamp(dumped.last_updated)),
            };
            ("static_listeners", "envoy.admin.v3.ListenersConfigDump.StaticListener", fixed.encode_to_vec())
        };
        Item { list, type_name, name: entry.name.clone(), wire }
    };
    dump.entries.iter().map(item).collect()
}

fn route(resource: &ResourceDump) -> Item {
    let Dumped { wire, version, last_updated, error } = &resource.dumped;
    let route_config = Some(any(ROUTE, wire.to_vec())).filter(|_| !wire.is_empty());
    let last_updated = Some(timestamp(*last_updated));
    let (list, type_name, wire) = if resource.dynamic {
        let dynamic = pb::routes_config_dump::DynamicRouteConfig {
            version_info: version.to_string(),
            route_config,
            last_updated,
            error_state: error.as_ref().map(|error| refused(ROUTE, error)),
            client_status: 0,
        };
        let type_name = "envoy.admin.v3.RoutesConfigDump.DynamicRouteConfig";
        ("dynamic_route_configs", type_name, dynamic.encode_to_vec())
    } else {
        let fixed = pb::routes_config_dump::StaticRouteConfig { route_config, last_updated };
        ("static_route_configs", "envoy.admin.v3.RoutesConfigDump.StaticRouteConfig", fixed.encode_to_vec())
    };
    Item { list, type_name, name: resource.name.clone(), wire }
}

fn filter(resource: &ResourceDump) -> Item {
    let Dumped { wire, version, last_updated, error } = &resource.dumped;
    let dumped = pb::ecds_config_dump::EcdsFilterConfig {
        version_info: version.to_string(),
        ecds_filter: Some(any(FILTER, wire.to_vec())).filter(|_| !wire.is_empty()),
        last_updated: Some(timestamp(*last_updated)),
        error_state: error.as_ref().map(|error| refused(FILTER, error)),
        client_status: 0,
    };
    Item {
        list: "ecds_filters",
        type_name: "envoy.admin.v3.EcdsConfigDump.EcdsFilterConfig",
        name: resource.name.clone(),
        wire: dumped.encode_to_vec(),
    }
}

fn scopes(set: &ScopesDump) -> Item {
    const SCOPE: &str = "envoy.config.route.v3.ScopedRouteConfiguration";
    let Dumped { version, last_updated, error, .. } = &set.dumped;
    let name = set.name.clone();
    let scoped_route_configs = set.scopes.iter().map(|wire| any(SCOPE, wire.to_vec())).collect();
    let last_updated = Some(timestamp(*last_updated));
    let (list, type_name, wire) = if set.dynamic {
        let dynamic = pb::scoped_routes_config_dump::DynamicScopedRouteConfigs {
            name: name.clone(),
            version_info: version.to_string(),
            scoped_route_configs,
            last_updated,
            error_state: error.as_ref().map(|error| refused(SCOPE, error)),
            client_status: 0,
        };
        let type_name = "envoy.admin.v3.ScopedRoutesConfigDump.DynamicScopedRouteConfigs";
        ("dynamic_scoped_route_configs", type_name, dynamic.encode_to_vec())
    } else {
        let inline = pb::scoped_routes_config_dump::InlineScopedRouteConfigs {
            name: name.clone(),
            scoped_route_configs,
            last_updated,
        };
        let type_name = "envoy.admin.v3.ScopedRoutesConfigDump.InlineScopedRouteConfigs";
        ("inline_scoped_route_configs", type_name, inline.encode_to_vec())
    };
    Item { list, type_name, name, wire }
}

/// `None` for a cluster without an assignment.
fn endpoints(resource: &ResourceDump) -> Option<Item> {
    let Dumped { wire, version, last_updated, .. } = &resource.dumped;
    let assignment = if resource.dynamic {
        wire.to_vec()
    } else {
        cluster_pb::Cluster::decode(wire.clone()).ok()?.load_assignment?.encode_to_vec()
    };
    let endpoint_config = Some(any(ENDPOINTS, assignment));
    let last_updated = Some(timestamp(*last_updated));
    let (list, type_name, wire) = if resource.dynamic {
        let dynamic = pb::endpoints_config_dump::DynamicEndpointConfig {
            version_info: version.to_string(),
            endpoint_config,
            last_updated,
            ..Default::default()
        };
        let type_name = "envoy.admin.v3.EndpointsConfigDump.DynamicEndpointConfig";
        ("dynamic_endpoint_configs", type_name, dynamic.encode_to_vec())
    } else {
        let fixed = pb::endpoints_config_dump::StaticEndpointConfig { endpoint_config, last_updated };
        let type_name = "envoy.admin.v3.EndpointsConfigDump.StaticEndpointConfig";
        ("static_endpoint_configs", type_name, fixed.encode_to_vec())
    };
    Some(Item { list, type_name, name: resource.name.clone(), wire })
}

fn secret(resource: &ResourceDump) -> Item {
    const SECRET: &str = "envoy.extensions.transport_sockets.tls.v3.Secret";
    let Dumped { wire, version, last_updated, error } = &resource.dumped;
    let secret = Some(any(SECRET, wire.to_vec())).filter(|_| !wire.is_empty());
    let last_updated = Some(timestamp(*last_updated));
    let name = resource.name.clone();
    let (list, type_name, wire) = if resource.dynamic {
        let dynamic = pb::secrets_config_dump::DynamicSecret {
            name: name.clone(),
            version_info: version.to_string(),
            last_updated,
            secret,
            error_state: error.as_ref().map(|error| refused(SECRET, error)),
            client_status: 0,
        };
        let list = if resource.warming { "dynamic_warming_secrets" } else { "dynamic_active_secrets" };
        (list, "envoy.admin.v3.SecretsConfigDump.DynamicSecret", dynamic.encode_to_vec())
    } else {
        let fixed = pb::secrets_config_dump::StaticSecret { name: name.clone(), last_updated, secret };
        ("static_secrets", "envoy.admin.v3.SecretsConfigDump.StaticSecret", fixed.encode_to_vec())
    };
    Item { list, type_name, name, wire }
}

fn refused(type_name: &str, error: &Refused) -> pb::UpdateFailureState {
    pb::UpdateFailureState {
        failed_configuration: Some(any(type_name, error.wire.to_vec())),
        last_update_attempt: Some(timestamp(error.at)),
        details: error.details.clone(),
        version_info: error.version.to_string(),
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        // Milliseconds, as Envoy prints.
        nanos: i32::try_from(since.subsec_millis()).unwrap_or_default() * 1_000_000,
    }
}
