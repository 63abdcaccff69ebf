//! `/clusters`.

use std::fmt::Write as _;
use std::sync::Arc;

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::CircuitBreakers;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::v3 as types;
use envoy_types::pb::google::protobuf::UInt32Value;
use hyper::{Response, StatusCode};
use prost::Message as _;
use regex::Regex;
use waystation_schema::JsonStyle;
use waystation_upstream::admission::Resource;
use waystation_upstream::cluster::Discovery;
use waystation_upstream::host::HealthFlag;
use waystation_upstream::{Cluster, Host, Priority};

use super::{Admin, Body, Query, info::address_proto, json, render, shutting_down, text};

const PRIORITIES: [(Priority, &str); 2] = [(Priority::Default, "default"), (Priority::High, "high")];

const LIMITS: [(Resource, &str); 4] = [
    (Resource::Connections, "max_connections"),
    (Resource::Pending, "max_pending_requests"),
    (Resource::Requests, "max_requests"),
    (Resource::Retries, "max_retries"),
];

pub(super) async fn clusters(admin: &Admin, query: &Query) -> Response<Body> {
    let filter = match query.get("filter").filter(|filter| !filter.is_empty()).map(Regex::new) {
        None => None,
        Some(Ok(regex)) => Some(regex),
        Some(Err(_)) => return text(StatusCode::BAD_REQUEST, "Invalid re2 regex"),
    };
    let Some(mut clusters) = admin.main.ask(|server| server.configuration().cluster_list()).await else {
        return shutting_down();
    };
    if let Some(filter) = filter {
        clusters.retain(|cluster| filter.is_match(cluster.name()));
    }
    let json = query.get("format") == Some("json");
    render(move || if json { as_json(&clusters) } else { as_text(&clusters) }).await
}

fn as_json(clusters: &[Arc<Cluster>]) -> Response<Body> {
    let cluster_statuses = clusters.iter().map(|cluster| status(cluster)).collect();
    let wire = pb::Clusters { cluster_statuses }.encode_to_vec();
    let style = JsonStyle { proto_names: true, pretty: true, ..JsonStyle::default() };
    json("envoy.admin.v3.Clusters", &wire, style)
}

fn as_text(clusters: &[Arc<Cluster>]) -> Response<Body> {
    let mut out = String::new();
    for cluster in clusters {
        // Writing to a string does not fail.
        let _ = write_cluster(cluster, &mut out);
    }
    text(StatusCode::OK, out)
}

fn write_cluster(cluster: &Cluster, out: &mut String) -> std::fmt::Result {
    let name = cluster.name();
    writeln!(out, "{name}::observability_name::{}", cluster.observability_name())?;
    if let Some(detector) = &cluster.outlier_detection {
        for (origin, (average, threshold)) in ["", "local_origin_"].into_iter().zip(detector.success_rates())
        {
            writeln!(out, "{name}::outlier::{origin}success_rate_average::{average}")?;
            writeln!(out, "{name}::outlier::{origin}success_rate_ejection_threshold::{threshold}")?;
        }
    }
    for (priority, label) in PRIORITIES {
        for (resource, limit) in LIMITS {
            let max = cluster.admission.max(priority, resource);
            writeln!(out, "{name}::{label}_priority::{limit}::{max}")?;
        }
    }
    writeln!(out, "{name}::added_via_api::{}", cluster.added_via_api)?;
    if let Discovery::Eds(settings) = &cluster.discovery
        && *settings.resource_name != *name
    {
        writeln!(out, "{name}::eds_service_name::{}", settings.resource_name)?;
    }
    for host in cluster.hosts() {
        write_host(name, &host, out)?;
    }
    Ok(())
}

fn write_host(name: &str, host: &Host, out: &mut String) -> std::fmt::Result {
    let prefix = format!("{name}::{}", host.address());
    let counts = host.counts();
    let stats = [
        ("cx_active", counts.cx_active),
        ("cx_connect_fail", counts.cx_connect_fail),
        ("cx_total", counts.cx_total),
        ("rq_active", counts.rq_active),
        ("rq_error", counts.rq_error),
        ("rq_pending_active", 0),
        ("rq_success", counts.rq_success),
        ("rq_timeout", counts.rq_timeout),
        ("rq_total", counts.rq_total),
    ];
    for (key, value) in stats {
        writeln!(out, "{prefix}::{key}::{value}")?;
    }
    let locality = host.locality();
    writeln!(out, "{prefix}::hostname::{}", host.hostname())?;
    writeln!(out, "{prefix}::health_flags::{}", host.health_flags())?;
    writeln!(out, "{prefix}::weight::{}", host.weight())?;
    writeln!(out, "{prefix}::region::{}", locality.region)?;
    writeln!(out, "{prefix}::zone::{}", locality.zone)?;
    writeln!(out, "{prefix}::sub_zone::{}", locality.sub_zone)?;
    writeln!(out, "{prefix}::canary::{}", host.canary())?;
    writeln!(out, "{prefix}::priority::{}", host.priority())?;
    let (answers, connects) = host.success_rates();
    writeln!(out, "{prefix}::success_rate::{answers}")?;
    writeln!(out, "{prefix}::local_origin_success_rate::{connects}")
}

fn status(cluster: &Cluster) -> pb::ClusterStatus {
    let thresholds = PRIORITIES.iter().map(|(priority, _)| {
        let max = |resource| {
            let value = cluster.admission.max(*priority, resource);
            Some(UInt32Value { value: u32::try_from(value).unwrap_or(u32::MAX) })
        };
        Thresholds {
            priority: match priority {
                Priority::Default => core::RoutingPriority::Default.into(),
                Priority::High => core::RoutingPriority::High.into(),
            },
            max_connections: max(Resource::Connections),
            max_pending_requests: max(Resource::Pending),
            max_requests: max(Resource::Requests),
            max_retries: max(Resource::Retries),
            ..Thresholds::default()
        }
    });
    let rates = cluster.outlier_detection.as_ref().map(|detector| detector.success_rates());
    let [answers, connects] = rates.unwrap_or([(-1.0, -1.0); 2]);
    pb::ClusterStatus {
        success_rate_ejection_threshold: percent(answers.1),
        local_origin_success_rate_ejection_threshold: percent(connects.1),
        name: cluster.name().to_owned(),
        added_via_api: cluster.added_via_api,
        host_statuses: cluster.hosts().iter().map(|host| host_status(host)).collect(),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: thresholds.collect(),
            ..CircuitBreakers::default()
        }),
        observability_name: cluster.observability_name().to_owned(),
        eds_service_name: match &cluster.discovery {
            Discovery::Eds(settings) if *settings.resource_name != *cluster.name() => {
                settings.resource_name.to_string()
            }
            _ => String::new(),
        },
    }
}

fn host_status(host: &Host) -> pb::HostStatus {
    let counts = host.counts();
    let metric = |kind: pb::simple_metric::Type, name: &str, value: u64| pb::SimpleMetric {
        r#type: kind.into(),
        name: name.to_owned(),
        value,
    };
    let counter = |name, value| metric(pb::simple_metric::Type::Counter, name, value);
    let gauge = |name, value| metric(pb::simple_metric::Type::Gauge, name, value);
    let locality = host.locality();
    pb::HostStatus {
        address: Some(address_proto(host.address())),
        stats: vec![
            counter("cx_connect_fail", counts.cx_connect_fail),
            counter("cx_total", counts.cx_total),
            counter("rq_error", counts.rq_error),
            counter("rq_success", counts.rq_success),
            counter("rq_timeout", counts.rq_timeout),
            counter("rq_total", counts.rq_total),
            gauge("cx_active", counts.cx_active),
            gauge("rq_active", counts.rq_active),
            gauge("rq_pending_active", 0),
        ],
        health_status: Some(pb::HostHealthStatus {
            failed_active_health_check: host.has_flag(HealthFlag::FailedActiveHc),
            failed_active_degraded_check: host.has_flag(HealthFlag::DegradedActiveHc),
            pending_dynamic_removal: host.has_flag(HealthFlag::PendingDynamicRemoval),
            pending_active_hc: host.has_flag(HealthFlag::PendingActiveHc),
            excluded_via_immediate_hc_fail: host.has_flag(HealthFlag::ExcludedViaImmediateHcFail),
            active_hc_timeout: host.has_flag(HealthFlag::ActiveHcTimeout),
            failed_outlier_check: host.has_flag(HealthFlag::FailedOutlierCheck),
            failed_degraded_outlier_detection: host.has_flag(HealthFlag::DegradedOutlierDetection),
            eds_health_status: match host.eds_status() {
                core::HealthStatus::Unknown => core::HealthStatus::Healthy.into(),
                other => other.into(),
            },
        }),
        success_rate: percent(host.success_rates().0),
        local_origin_success_rate: percent(host.success_rates().1),
        weight: host.weight(),
        hostname: host.hostname().to_owned(),
        priority: host.priority(),
        locality: Some(core::Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            sub_zone: locality.sub_zone.to_string(),
        }),
    }
}

/// Below zero there is none.
fn percent(rate: f64) -> Option<types::Percent> {
    (rate >= 0.0).then_some(types::Percent { value: rate })
}
