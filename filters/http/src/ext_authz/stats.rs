//! What the filter counts.

use std::cell::OnceCell;

use waystation_stats::{Counter, ResponseStats, Scope, stats_group};

stats_group! {
    /// `http.<stat_prefix>.ext_authz.*`. What would need limits of header maps, and the shadow mode, is always 0 here.
    pub(super) struct Stats {
        counters {
            denied, disabled, error, failure_mode_allowed, filter_state_name_collision, ignored_dynamic_metadata, invalid,
            ok, omitted_response_headers, request_header_limits_reached, response_header_limits_reached, shadow_denied,
            shadow_error,
        }
    }
}

/// `cluster.<name>.ext_authz.*` of one configuration: as in Envoy, what never happened is not listed.
#[derive(Debug)]
pub(super) struct ClusterStats {
    scope: Scope,
    counters: [OnceCell<Counter>; OUTCOMES.len()],
    /// Denials in place of responses to requests from inside.
    pub(super) internal: ResponseStats,
}

/// In the order of [`Outcome`].
const OUTCOMES: [&str; 5] = ["ok", "denied", "error", "failure_mode_allowed", "invalid"];

/// What a cluster counts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outcome {
    Ok,
    Denied,
    Error,
    FailureModeAllowed,
    Invalid,
}

impl ClusterStats {
    /// Below the cluster's scope.
    pub(super) fn new(cluster: &Scope, prefix: &str) -> Self {
        let scope = cluster.scope("ext_authz").tag("envoy.ext_authz_prefix", prefix);
        Self { scope, counters: Default::default(), internal: ResponseStats::new(cluster.scope("internal")) }
    }

    pub(super) fn count(&self, outcome: Outcome) {
        let name = OUTCOMES[outcome as usize];
        self.counters[outcome as usize].get_or_init(|| self.scope.counter(name)).inc();
    }
}
