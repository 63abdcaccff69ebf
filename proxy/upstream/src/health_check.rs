//! Active health checks: what a cluster asks for, and what follows from each answer.
//!
//! A [`Session`] decides for one host, without clock or socket: when it is checked, and what an answer does to it. Whoever
//! drives it asks the host, reports the [`Answer`], and puts the [`Verdict`] in force with [`Host::judge`]; `Cluster::refresh`
//! then publishes what has changed. Which protocol a check speaks is the driver's affair.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as pb;
use parking_lot::Mutex;
use tokio::sync::Notify;
use waystation_filter_api::runtime::{Runtime, RuntimeInteger};
use waystation_filter_api::wire::{bool_value, duration, positive, u32_value};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Scope, stats_group};

use crate::host::{HealthFlag, Host};

mod session;
#[cfg(test)]
mod tests;

pub use session::{Answer, Event, Failure, Session, Verdict};

stats_group! {
    /// `cluster.<name>.health_check.`
    pub struct HealthCheckStats {
        counters { attempt, failure, network_failure, passive_failure, success, verify_cluster }
        gauges { degraded, healthy }
        histograms {}
    }
}

/// A cluster's `health_checks`, but for what is sent and expected.
#[derive(Debug)]
pub struct HealthCheck {
    /// When hosts are checked and what makes them healthy.
    pub settings: Settings,
    /// Statistics.
    pub stats: HealthCheckStats,
    /// `ignore_new_hosts_until_first_hc`.
    pub(crate) ignores_new_hosts: bool,
    /// Hosts that discovery has removed stay as long as they pass their checks (not `ignore_health_on_host_removal`).
    pub(crate) keeps_removed_hosts: bool,
    first_round: AtomicBool,
    attention: Notify,
    /// Hosts that traffic says are to get no more, by id.
    failed: Mutex<Vec<u64>>,
}

/// Hosts that traffic may fail before those are looked at; the next response says it again.
const MAX_FAILED: usize = 4096;

/// Times and thresholds.
#[derive(Debug)]
pub struct Settings {
    /// How long an answer may take.
    pub timeout: Duration,
    /// Whether connections are kept from one check to the next.
    pub reuse_connection: bool,
    /// Whether each failure is an event, not only those that change something.
    pub log_failures: bool,
    /// Whether each success is.
    pub log_successes: bool,
    interval: Duration,
    no_traffic_interval: Duration,
    no_traffic_healthy_interval: Duration,
    unhealthy_interval: Duration,
    unhealthy_edge_interval: Duration,
    healthy_edge_interval: Duration,
    initial_jitter: Duration,
    interval_jitter: Duration,
    interval_jitter_percent: u32,
    unhealthy_threshold: u32,
    healthy_threshold: u32,
    min_interval: RuntimeInteger,
    max_interval: RuntimeInteger,
}

/// How often a host is checked whose cluster has never had a connection.
const NO_TRAFFIC_INTERVAL: Duration = Duration::from_secs(60);

impl HealthCheck {
    pub(crate) fn compile(
        proto: &cluster_pb::Cluster,
        runtime: &Runtime,
        scope: &Scope,
    ) -> Result<Option<Self>, ConfigError> {
        let check = match &*proto.health_checks {
            [] => return Ok(None),
            [only] => only,
            _ => {
                return Err(ConfigError::new(
                    "health check at index 0 is missing a name; all health checks must have a name when multiple health \
                     checks are configured",
                ));
            }
        };
        let settings = Settings::compile(check, runtime).at(|| "health_checks[0]")?;
        let common = proto.common_lb_config.as_ref();
        Ok(Some(Self {
            settings,
            stats: scope.scope("health_check").group(),
            ignores_new_hosts: common.is_some_and(|common| common.ignore_new_hosts_until_first_hc),
            keeps_removed_hosts: !proto.ignore_health_on_host_removal,
            first_round: AtomicBool::new(false),
            attention: Notify::new(),
            failed: Mutex::default(),
        }))
    }

    /// Whether every host of the first assignment has been checked: only then is the cluster warm.
    pub fn first_round_done(&self) -> bool {
        self.first_round.load(Ordering::Acquire)
    }

    /// Every host has been checked.
    pub fn end_first_round(&self) {
        self.first_round.store(true, Ordering::Release);
    }

    /// Waits until other hosts may have come into force, or traffic has failed some; one of these before the call is not
    /// lost.
    pub async fn attention(&self) {
        self.attention.notified().await;
    }

    pub(crate) fn tell_hosts_changed(&self) {
        self.attention.notify_one();
    }

    /// A response of the host says that it is to get no more requests (`x-envoy-immediate-health-check-fail`).
    pub fn fail_by_traffic(&self, host: &Host) {
        let mut failed = self.failed.lock();
        if failed.len() < MAX_FAILED && !failed.contains(&host.id()) {
            failed.push(host.id());
            drop(failed);
            self.attention.notify_one();
        }
    }

    /// The hosts that traffic has failed since the last call.
    pub fn take_failed(&self) -> Vec<u64> {
        std::mem::take(&mut self.failed.lock())
    }

    /// The flags of a host that has not been checked yet.
    pub(crate) fn unchecked(&self) -> u32 {
        let pending = if self.ignores_new_hosts { HealthFlag::PendingActiveHc as u32 } else { 0 };
        HealthFlag::FailedActiveHc as u32 | pending
    }
}

impl Settings {
    /// Compiles the times and thresholds of a check; what is sent is not looked at.
    ///
    /// # Errors
    /// When a time is missing or not positive.
    pub fn compile(proto: &pb::HealthCheck, runtime: &Runtime) -> Result<Self, ConfigError> {
        let required = |field: &str, value| {
            positive(field, value)?.ok_or_else(|| ConfigError::field(field, "value is required"))
        };
        let threshold = |field: &str, value| {
            u32_value(value).ok_or_else(|| ConfigError::field(field, "value is required"))
        };
        let interval = required("interval", proto.interval.as_ref())?;
        let no_traffic_interval = positive("no_traffic_interval", proto.no_traffic_interval.as_ref())?
            .unwrap_or(NO_TRAFFIC_INTERVAL);
        let no_traffic_healthy_interval =
            positive("no_traffic_healthy_interval", proto.no_traffic_healthy_interval.as_ref())?;
        let unhealthy_interval =
            positive("unhealthy_interval", proto.unhealthy_interval.as_ref())?.unwrap_or(interval);
        let unhealthy_edge_interval =
            positive("unhealthy_edge_interval", proto.unhealthy_edge_interval.as_ref())?;
        let healthy_edge_interval = positive("healthy_edge_interval", proto.healthy_edge_interval.as_ref())?;
        let jitter = |field: &str, value| Ok::<_, ConfigError>(duration(field, value)?.unwrap_or_default());
        Ok(Self {
            timeout: required("timeout", proto.timeout.as_ref())?,
            reuse_connection: bool_value(proto.reuse_connection.as_ref(), true),
            log_failures: proto.always_log_health_check_failures,
            log_successes: proto.always_log_health_check_success,
            interval,
            no_traffic_interval,
            no_traffic_healthy_interval: no_traffic_healthy_interval.unwrap_or(no_traffic_interval),
            unhealthy_interval,
            unhealthy_edge_interval: unhealthy_edge_interval.unwrap_or(unhealthy_interval),
            healthy_edge_interval: healthy_edge_interval.unwrap_or(interval),
            initial_jitter: jitter("initial_jitter", proto.initial_jitter.as_ref())?,
            interval_jitter: jitter("interval_jitter", proto.interval_jitter.as_ref())?,
            interval_jitter_percent: proto.interval_jitter_percent,
            unhealthy_threshold: threshold("unhealthy_threshold", proto.unhealthy_threshold.as_ref())?,
            healthy_threshold: threshold("healthy_threshold", proto.healthy_threshold.as_ref())?,
            min_interval: runtime.integer("health_check.min_interval", 1),
            max_interval: runtime.integer("health_check.max_interval", u64::MAX),
        })
    }
}

impl HealthCheckStats {
    /// Has the gauges follow a host that was counted as `before` (whether healthy, whether degraded).
    pub fn follow(&self, before: (bool, bool), now: (bool, bool)) {
        for (gauge, before, now) in [(self.healthy(), before.0, now.0), (self.degraded(), before.1, now.1)] {
            match (before, now) {
                (false, true) => gauge.inc(),
                (true, false) => gauge.dec(),
                _ => {}
            }
        }
    }

    /// Counts an answer.
    pub fn count(&self, answer: Answer) {
        match answer {
            Answer::Healthy { .. } => self.success().inc(),
            Answer::Failed(failure) => {
                self.failure().inc();
                match failure {
                    Failure::Network | Failure::Timeout => self.network_failure().inc(),
                    Failure::Passive => self.passive_failure().inc(),
                    Failure::Active { .. } => {}
                }
            }
        }
    }
}
