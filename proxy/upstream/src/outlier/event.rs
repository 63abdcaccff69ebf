//! What the event log says: `envoy.data.cluster.v3.OutlierDetectionEvent`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use envoy_types::pb::envoy::data::cluster::v3 as pb;
use envoy_types::pb::envoy::data::cluster::v3::outlier_detection_event::Event as Details;
use envoy_types::pb::google::protobuf as wkt;
use prost::Message as _;
use waystation_filter_api::address::Address;
use waystation_schema::{JsonStyle, Message, wire_to_json};

use super::Ejection;
use super::monitor::Rates;

/// A host was ejected, would have been, or is back.
#[derive(Clone, Debug)]
pub struct Event {
    pub(super) cluster: Arc<str>,
    pub(super) address: Address,
    pub(super) ejections: u32,
    pub(super) since_last_action: Option<Duration>,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Consecutive { ejection: Ejection, enforced: bool },
    SuccessRate { ejection: Ejection, enforced: bool, host: f64, rates: Rates },
    FailurePercentage { ejection: Ejection, enforced: bool, host: f64 },
    Back,
}

impl Event {
    /// Why a host was ejected or would have been; nothing when it is back.
    pub fn ejection(&self) -> Option<Ejection> {
        match self.kind {
            Kind::Consecutive { ejection, .. }
            | Kind::SuccessRate { ejection, .. }
            | Kind::FailurePercentage { ejection, .. } => Some(ejection),
            Kind::Back => None,
        }
    }

    /// The host.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// A line of the log, in Envoy's order and without a line end.
    pub fn to_json(&self, wall: SystemTime) -> String {
        // Envoy's clock is that of milliseconds.
        let since = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let timestamp = wkt::Timestamp {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(since.subsec_millis() * 1_000_000).unwrap_or_default(),
        };
        // Casts of what may be below zero or more than fits stop at the bounds.
        let (ejection, enforced, event) = match self.kind {
            Kind::Consecutive { ejection, enforced } => {
                (ejection, enforced, Some(Details::EjectConsecutiveEvent(pb::OutlierEjectConsecutive {})))
            }
            Kind::SuccessRate { ejection, enforced, host, rates } => (
                ejection,
                enforced,
                Some(Details::EjectSuccessRateEvent(pb::OutlierEjectSuccessRate {
                    host_success_rate: host as u32,
                    cluster_average_success_rate: rates.average as u32,
                    cluster_success_rate_ejection_threshold: rates.threshold as u32,
                })),
            ),
            Kind::FailurePercentage { ejection, enforced, host } => (
                ejection,
                enforced,
                Some(Details::EjectFailurePercentageEvent(pb::OutlierEjectFailurePercentage {
                    host_success_rate: host as u32,
                })),
            ),
            // The type of what is over is not told.
            Kind::Back => (Ejection::Consecutive5xx, false, None),
        };
        let proto = pb::OutlierDetectionEvent {
            r#type: ejection as i32,
            timestamp: Some(timestamp),
            secs_since_last_action: self
                .since_last_action
                .map(|since| wkt::UInt64Value { value: since.as_secs() }),
            cluster_name: self.cluster.to_string(),
            upstream_url: self.address.to_string(),
            action: if event.is_some() { pb::Action::Eject } else { pb::Action::Uneject }.into(),
            num_ejections: self.ejections,
            enforced,
            event,
        };
        let mut line = String::new();
        let style = JsonStyle { proto_names: true, with_defaults: true, ..JsonStyle::default() };
        if let Some(message) = Message::find("envoy.data.cluster.v3.OutlierDetectionEvent") {
            // Writing to a string does not fail, and these bytes are a message.
            let _ = wire_to_json(message, &proto.encode_to_vec(), &mut line, style);
        }
        line
    }
}
