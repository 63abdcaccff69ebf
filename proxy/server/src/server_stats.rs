//! `server.*`.

use std::time::{Duration, SystemTime};

use waystation_stats::stats_group;

use crate::cli::options::Options;
use crate::context::Shared;
use crate::memory::{self, Resident};
use crate::version;

stats_group! {
    /// `server.`
    pub struct ServerGroup {
        counters {
            debug_assertion_failures,
            dropped_stat_flushes,
            dynamic_unknown_fields,
            static_unknown_fields,
            envoy_bug_failures,
            envoy_notifications,
            wip_protos,
        }
        gauges {
            compilation_settings_fips_mode = "compilation_settings.fips_mode",
            concurrency,
            days_until_first_cert_expiring,
            hot_restart_epoch,
            live,
            memory_allocated,
            memory_heap_size,
            memory_physical_size,
            parent_connections,
            seconds_until_first_ocsp_response_expiring,
            state,
            stats_recent_lookups,
            total_connections,
            uptime,
            version,
        }
        histograms { initialization_time_ms: Milliseconds }
    }
}

/// The group with what keeps it up to date.
#[derive(Debug)]
pub struct ServerStats {
    group: ServerGroup,
}

impl ServerStats {
    /// The stats of this process.
    pub fn new(shared: &Shared, options: &Options) -> Self {
        let group: ServerGroup = shared.stats.root().scope("server").group();
        group.concurrency().set(options.concurrency.into());
        group.hot_restart_epoch().set(options.restart_epoch.into());
        group.version().set(version::revision_number());
        group.state().set(shared.state() as u64);
        // No certificate: the largest value, as Envoy.
        group.days_until_first_cert_expiring().set(u32::MAX.into());
        Self { group }
    }

    /// `stats_server_version_override`.
    pub fn set_version(&self, version: u64) {
        self.group.version().set(version);
    }

    /// One unknown field in a dynamic resource.
    pub fn unknown_dynamic_field(&self) {
        self.group.dynamic_unknown_fields().inc();
    }

    /// Unknown fields in the bootstrap.
    pub fn unknown_static_fields(&self, count: u64) {
        self.group.static_unknown_fields().add(count);
    }

    /// Start-up took this long.
    pub fn initialized(&self, took: Duration) {
        self.group.initialization_time_ms().record(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    }

    /// Whether health checks pass; the state follows with the next flush, as in Envoy.
    pub fn live(&self, live: bool) {
        self.group.live().set(u64::from(live));
    }

    /// Renews the gauges; `first_expiry` is that of all certificates, in seconds since 1970.
    pub fn renew(&self, shared: &Shared, first_expiry: Option<u64>) {
        let group = &self.group;
        let state = shared.state();
        group.state().set(state as u64);
        group.live().set(u64::from(!shared.health_check_failed()));
        group.uptime().set(shared.start.elapsed().as_secs());
        group.days_until_first_cert_expiring().set(days_until(first_expiry));
        group.total_connections().set(shared.connections());
        let Resident { all, files } = memory::resident();
        group.memory_physical_size().set(all);
        group.memory_heap_size().set(all);
        group.memory_allocated().set(all.saturating_sub(files));
    }
}

/// Whole days until that time, 0 once it has passed; the largest value without any certificate, as Envoy.
fn days_until(expiry: Option<u64>) -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    expiry.map_or(u32::MAX.into(), |at| at.saturating_sub(now) / 86_400)
}

#[cfg(test)]
mod tests {
    use super::days_until;
    use std::time::SystemTime;

    #[test]
    fn days_are_whole_and_never_negative() {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(days_until(Some(now + 2 * 86_400 + 3_600)), 2);
        assert_eq!(days_until(Some(now - 1)), 0);
        assert_eq!(days_until(None), u64::from(u32::MAX));
    }
}
