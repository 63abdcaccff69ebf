//! The event log: `envoy.data.core.v3.HealthCheckEvent` as JSON, a line each.

use std::time::SystemTime;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::data::core::v3 as pb;
use envoy_types::pb::google::protobuf::{Struct, Timestamp, Value as PbValue, value::Kind};
use prost::Message as _;
use waystation_filter_api::value::Value;
use waystation_schema::{JsonStyle, Message, wire_to_json};
use waystation_upstream::Host;
use waystation_upstream::health_check::{Event, Failure};

use super::checker::Checker;
use super::probe::Probe;
use crate::admin::address_proto;

/// Writes what happened to a host.
pub(super) fn write(checker: &Checker, cluster: &str, host: &Host, events: &[Event]) {
    const EVENT: &str = "envoy.data.core.v3.HealthCheckEvent";
    let Some(message) = Message::find(EVENT) else { return };
    let style = JsonStyle { proto_names: true, with_defaults: true, ..JsonStyle::default() };
    for event in events {
        let wire = proto(checker, cluster, host, *event).encode_to_vec();
        let mut line = String::new();
        if wire_to_json(message, &wire, &mut line, style).is_err() {
            continue;
        }
        line.push('\n');
        for log in &checker.events {
            log.write(line.as_bytes());
        }
    }
}

fn proto(checker: &Checker, cluster: &str, host: &Host, event: Event) -> pb::HealthCheckEvent {
    use pb::health_check_event::Event as Proto;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let locality = host.locality();
    let event = match event {
        Event::EjectUnhealthy(failure) => Proto::EjectUnhealthyEvent(pb::HealthCheckEjectUnhealthy {
            failure_type: kind(failure).into(),
            http_status_code: status(failure),
        }),
        Event::AddHealthy { first_check } => {
            Proto::AddHealthyEvent(pb::HealthCheckAddHealthy { first_check })
        }
        Event::Failure { failure, first_check } => Proto::HealthCheckFailureEvent(pb::HealthCheckFailure {
            failure_type: kind(failure).into(),
            first_check,
            http_status_code: status(failure),
        }),
        Event::Success => Proto::SuccessfulHealthCheckEvent(pb::HealthCheckSuccessful {}),
        Event::Degraded => Proto::DegradedHealthyHost(pb::DegradedHealthyHost {}),
        Event::NoLongerDegraded => Proto::NoLongerDegradedHost(pb::NoLongerDegradedHost {}),
    };
    pb::HealthCheckEvent {
        health_checker_type: match checker.probe {
            Probe::Http(_) => pb::HealthCheckerType::Http,
            Probe::Tcp(_) => pb::HealthCheckerType::Tcp,
            Probe::Grpc(_) => pb::HealthCheckerType::Grpc,
        }
        .into(),
        host: Some(address_proto(host.address())),
        cluster_name: cluster.to_owned(),
        timestamp: Some(Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            // Milliseconds are what Envoy's clock shows.
            nanos: i32::try_from(now.subsec_millis() * 1_000_000).unwrap_or_default(),
        }),
        metadata: host.metadata().map(|metadata| core::Metadata {
            filter_metadata: metadata
                .filter
                .iter()
                .map(|(namespace, value)| {
                    let fields = match value {
                        Value::Struct(fields) => {
                            fields.iter().map(|(key, value)| (key.to_string(), value_proto(value))).collect()
                        }
                        _ => Default::default(),
                    };
                    (namespace.to_string(), Struct { fields })
                })
                .collect(),
            ..core::Metadata::default()
        }),
        locality: Some(core::Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            sub_zone: locality.sub_zone.to_string(),
        }),
        event: Some(event),
    }
}

fn kind(failure: Failure) -> pb::HealthCheckFailureType {
    match failure {
        Failure::Active { .. } => pb::HealthCheckFailureType::Active,
        Failure::Passive => pb::HealthCheckFailureType::Passive,
        Failure::Network => pb::HealthCheckFailureType::Network,
        Failure::Timeout => pb::HealthCheckFailureType::NetworkTimeout,
    }
}

fn status(failure: Failure) -> u32 {
    match failure {
        Failure::Active { status, .. } => status.into(),
        _ => 0,
    }
}

fn value_proto(value: &Value) -> PbValue {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(value) => Kind::NumberValue(*value),
        Value::String(value) => Kind::StringValue(value.to_string()),
        Value::List(values) => Kind::ListValue(envoy_types::pb::google::protobuf::ListValue {
            values: values.iter().map(value_proto).collect(),
        }),
        Value::Struct(fields) => Kind::StructValue(Struct {
            fields: fields.iter().map(|(key, value)| (key.to_string(), value_proto(value))).collect(),
        }),
    };
    PbValue { kind: Some(kind) }
}
