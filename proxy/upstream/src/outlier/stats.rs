//! What outlier detection counts.

use waystation_stats::stats_group;

use super::Ejection;

stats_group! {
    /// `outlier_detection.*` of a cluster. Whole names, for they are listed among the cluster's own.
    pub struct OutlierStats {
        counters {
            ejections_consecutive_5xx = "outlier_detection.ejections_consecutive_5xx",
            ejections_detected_consecutive_5xx = "outlier_detection.ejections_detected_consecutive_5xx",
            ejections_detected_consecutive_gateway_failure = "outlier_detection.ejections_detected_consecutive_gateway_failure",
            ejections_detected_consecutive_local_origin_failure = "outlier_detection.ejections_detected_consecutive_local_origin_failure",
            ejections_detected_degradation = "outlier_detection.ejections_detected_degradation",
            ejections_detected_failure_percentage = "outlier_detection.ejections_detected_failure_percentage",
            ejections_detected_local_origin_failure_percentage = "outlier_detection.ejections_detected_local_origin_failure_percentage",
            ejections_detected_local_origin_success_rate = "outlier_detection.ejections_detected_local_origin_success_rate",
            ejections_detected_success_rate = "outlier_detection.ejections_detected_success_rate",
            ejections_enforced_consecutive_5xx = "outlier_detection.ejections_enforced_consecutive_5xx",
            ejections_enforced_consecutive_gateway_failure = "outlier_detection.ejections_enforced_consecutive_gateway_failure",
            ejections_enforced_consecutive_local_origin_failure = "outlier_detection.ejections_enforced_consecutive_local_origin_failure",
            ejections_enforced_failure_percentage = "outlier_detection.ejections_enforced_failure_percentage",
            ejections_enforced_local_origin_failure_percentage = "outlier_detection.ejections_enforced_local_origin_failure_percentage",
            ejections_enforced_local_origin_success_rate = "outlier_detection.ejections_enforced_local_origin_success_rate",
            ejections_enforced_success_rate = "outlier_detection.ejections_enforced_success_rate",
            ejections_enforced_total = "outlier_detection.ejections_enforced_total",
            ejections_overflow = "outlier_detection.ejections_overflow",
            ejections_success_rate = "outlier_detection.ejections_success_rate",
            ejections_total = "outlier_detection.ejections_total",
        }
        gauges { ejections_active = "outlier_detection.ejections_active" }
    }
}

impl OutlierStats {
    /// A rule has found a host.
    pub(super) fn detected(&self, ejection: Ejection) {
        match ejection {
            Ejection::Consecutive5xx => self.ejections_detected_consecutive_5xx(),
            Ejection::ConsecutiveGatewayFailure => self.ejections_detected_consecutive_gateway_failure(),
            Ejection::SuccessRate => self.ejections_detected_success_rate(),
            Ejection::ConsecutiveLocalOriginFailure => {
                self.ejections_detected_consecutive_local_origin_failure()
            }
            Ejection::SuccessRateLocalOrigin => self.ejections_detected_local_origin_success_rate(),
            Ejection::FailurePercentage => self.ejections_detected_failure_percentage(),
            Ejection::FailurePercentageLocalOrigin => {
                self.ejections_detected_local_origin_failure_percentage()
            }
            Ejection::Degraded => self.ejections_detected_degradation(),
        }
        .inc();
    }

    /// A host is ejected.
    pub(super) fn enforced(&self, ejection: Ejection) {
        self.ejections_enforced_total().inc();
        match ejection {
            Ejection::Consecutive5xx => self.ejections_enforced_consecutive_5xx(),
            Ejection::ConsecutiveGatewayFailure => self.ejections_enforced_consecutive_gateway_failure(),
            Ejection::SuccessRate => self.ejections_enforced_success_rate(),
            Ejection::ConsecutiveLocalOriginFailure => {
                self.ejections_enforced_consecutive_local_origin_failure()
            }
            Ejection::SuccessRateLocalOrigin => self.ejections_enforced_local_origin_success_rate(),
            Ejection::FailurePercentage => self.ejections_enforced_failure_percentage(),
            Ejection::FailurePercentageLocalOrigin => {
                self.ejections_enforced_local_origin_failure_percentage()
            }
            Ejection::Degraded => return,
        }
        .inc();
    }
}
