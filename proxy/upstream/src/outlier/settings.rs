//! `envoy.config.cluster.v3.OutlierDetection`, compiled, and the runtime keys over it.

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use waystation_filter_api::runtime::{Runtime, RuntimeInteger};
use waystation_filter_api::wire::{bool_value, duration, positive, refuse, u32_value};
use waystation_schema::ConfigError;

use super::Ejection;

/// A number that the runtime may override, in the order of `KEYS`. Times are in milliseconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Value {
    /// `interval`.
    Interval,
    /// `base_ejection_time`.
    BaseEjectionTime,
    /// `max_ejection_time`.
    MaxEjectionTime,
    /// `max_ejection_time_jitter`.
    MaxEjectionTimeJitter,
    /// `max_ejection_percent`.
    MaxEjectionPercent,
    /// `consecutive_5xx`; 0 never crosses.
    Consecutive5xx,
    /// `consecutive_gateway_failure`, likewise.
    ConsecutiveGatewayFailure,
    /// `consecutive_local_origin_failure`, likewise.
    ConsecutiveLocalOriginFailure,
    /// `success_rate_minimum_hosts`.
    SuccessRateMinimumHosts,
    /// `success_rate_request_volume`.
    SuccessRateRequestVolume,
    /// `success_rate_stdev_factor`, in thousandths.
    SuccessRateStdevFactor,
    /// `failure_percentage_threshold`.
    FailurePercentageThreshold,
    /// `failure_percentage_minimum_hosts`.
    FailurePercentageMinimumHosts,
    /// `failure_percentage_request_volume`.
    FailurePercentageRequestVolume,
    /// `enforcing_consecutive_5xx`, in percent as all that follow.
    EnforcingConsecutive5xx,
    /// `enforcing_consecutive_gateway_failure`.
    EnforcingConsecutiveGatewayFailure,
    /// `enforcing_consecutive_local_origin_failure`.
    EnforcingConsecutiveLocalOriginFailure,
    /// `enforcing_success_rate`.
    EnforcingSuccessRate,
    /// `enforcing_local_origin_success_rate`.
    EnforcingLocalOriginSuccessRate,
    /// `enforcing_failure_percentage`.
    EnforcingFailurePercentage,
    /// `enforcing_failure_percentage_local_origin`.
    EnforcingFailurePercentageLocalOrigin,
}

const COUNT: usize = KEYS.len();

const KEYS: [&str; 21] = [
    "outlier_detection.interval_ms",
    "outlier_detection.base_ejection_time_ms",
    "outlier_detection.max_ejection_time_ms",
    "outlier_detection.max_ejection_time_jitter_ms",
    "outlier_detection.max_ejection_percent",
    "outlier_detection.consecutive_5xx",
    "outlier_detection.consecutive_gateway_failure",
    "outlier_detection.consecutive_local_origin_failure",
    "outlier_detection.success_rate_minimum_hosts",
    "outlier_detection.success_rate_request_volume",
    "outlier_detection.success_rate_stdev_factor",
    "outlier_detection.failure_percentage_threshold",
    "outlier_detection.failure_percentage_minimum_hosts",
    "outlier_detection.failure_percentage_request_volume",
    "outlier_detection.enforcing_consecutive_5xx",
    "outlier_detection.enforcing_consecutive_gateway_failure",
    "outlier_detection.enforcing_consecutive_local_origin_failure",
    "outlier_detection.enforcing_success_rate",
    "outlier_detection.enforcing_local_origin_success_rate",
    "outlier_detection.enforcing_failure_percentage",
    "outlier_detection.enforcing_failure_percentage_local_origin",
];

/// As configured.
#[derive(Debug)]
pub(super) struct Settings {
    values: [u64; COUNT],
    pub(super) split_local_origin: bool,
    pub(super) always_eject_one: bool,
    pub(super) uneject_checked: bool,
    pub(super) detect_degraded: bool,
}

/// As the runtime has it.
#[derive(Debug)]
pub(super) struct InForce([RuntimeInteger; COUNT]);

impl Value {
    /// How often an ejection is carried out. What says that it is degraded always is.
    pub(super) fn enforcing(ejection: Ejection) -> Self {
        match ejection {
            Ejection::Consecutive5xx | Ejection::Degraded => Self::EnforcingConsecutive5xx,
            Ejection::ConsecutiveGatewayFailure => Self::EnforcingConsecutiveGatewayFailure,
            Ejection::ConsecutiveLocalOriginFailure => Self::EnforcingConsecutiveLocalOriginFailure,
            Ejection::SuccessRate => Self::EnforcingSuccessRate,
            Ejection::SuccessRateLocalOrigin => Self::EnforcingLocalOriginSuccessRate,
            Ejection::FailurePercentage => Self::EnforcingFailurePercentage,
            Ejection::FailurePercentageLocalOrigin => Self::EnforcingFailurePercentageLocalOrigin,
        }
    }
}

impl Settings {
    pub(super) fn compile(proto: &pb::OutlierDetection) -> Result<Self, ConfigError> {
        refuse("monitors", !proto.monitors.is_empty(), "this release has no monitors as extensions")?;
        let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let time = |field: &str, value, default: u64| {
            Ok::<_, ConfigError>(positive(field, value)?.map_or(default, millis))
        };
        let interval = time("interval", proto.interval.as_ref(), 10_000)?;
        let base = time("base_ejection_time", proto.base_ejection_time.as_ref(), 30_000)?;
        let max = time("max_ejection_time", proto.max_ejection_time.as_ref(), base.max(300_000))?;
        if max < base {
            return Err(ConfigError::new(
                "outlier detector's max_ejection_time cannot be smaller than base_ejection_time",
            ));
        }
        let jitter = duration("max_ejection_time_jitter", proto.max_ejection_time_jitter.as_ref())?;
        let of = |value, default: u64| u32_value(value).map_or(default, u64::from);
        Ok(Self {
            values: [
                interval,
                base,
                max,
                jitter.map_or(0, millis),
                of(proto.max_ejection_percent.as_ref(), 10),
                of(proto.consecutive_5xx.as_ref(), 5),
                of(proto.consecutive_gateway_failure.as_ref(), 5),
                of(proto.consecutive_local_origin_failure.as_ref(), 5),
                of(proto.success_rate_minimum_hosts.as_ref(), 5),
                of(proto.success_rate_request_volume.as_ref(), 100),
                of(proto.success_rate_stdev_factor.as_ref(), 1900),
                of(proto.failure_percentage_threshold.as_ref(), 85),
                of(proto.failure_percentage_minimum_hosts.as_ref(), 5),
                of(proto.failure_percentage_request_volume.as_ref(), 50),
                of(proto.enforcing_consecutive_5xx.as_ref(), 100),
                of(proto.enforcing_consecutive_gateway_failure.as_ref(), 0),
                of(proto.enforcing_consecutive_local_origin_failure.as_ref(), 100),
                of(proto.enforcing_success_rate.as_ref(), 100),
                of(proto.enforcing_local_origin_success_rate.as_ref(), 100),
                of(proto.enforcing_failure_percentage.as_ref(), 0),
                of(proto.enforcing_failure_percentage_local_origin.as_ref(), 0),
            ],
            split_local_origin: proto.split_external_local_origin_errors,
            always_eject_one: bool_value(proto.always_eject_one_host.as_ref(), false),
            uneject_checked: bool_value(proto.successful_active_health_check_uneject_host.as_ref(), true),
            detect_degraded: bool_value(proto.detect_degraded_hosts.as_ref(), false),
        })
    }

    /// Binds every number to its key. The keys are the same for all clusters; what each falls back to is not.
    pub(super) fn resolve(&self, runtime: &Runtime) -> InForce {
        InForce(std::array::from_fn(|i| runtime.integer(KEYS[i], self.values[i])))
    }
}

impl InForce {
    pub(super) fn get(&self, value: Value) -> u64 {
        self.0[value as usize].get()
    }
}
