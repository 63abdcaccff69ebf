//! What virtual clusters and routes with a `stat_prefix` count: `vhost.<name>.vcluster.<name>.` and
//! `vhost.<name>.route.<stat_prefix>.`.

use waystation_stats::{ResponseStats, Scope, stats_group};

stats_group! {
    /// Requests by what became of them.
    pub struct RequestStats {
        counters {
            upstream_rq_retry, upstream_rq_retry_limit_exceeded, upstream_rq_retry_overflow, upstream_rq_retry_success,
            upstream_rq_timeout, upstream_rq_total,
        }
        gauges {}
        histograms {}
    }
}

/// The handles of one virtual cluster or route.
#[derive(Debug)]
pub struct RequestCounters {
    /// The counters that are always listed.
    pub requests: RequestStats,
    /// `upstream_rq_<code>` and `upstream_rq_time`.
    pub responses: ResponseStats,
}

impl RequestCounters {
    fn new(scope: Scope) -> Box<Self> {
        Box::new(Self { requests: scope.group(), responses: ResponseStats::new(scope) })
    }

    /// Those of a virtual cluster; requests that fall in none of a host's count in `other`.
    pub(crate) fn of_virtual_cluster(root: &Scope, host: &str, name: &str) -> Box<Self> {
        Self::new(host_scope(root, host).scope("vcluster").tag("envoy.virtual_cluster", name))
    }

    /// Those of a route.
    pub(crate) fn of_route(root: &Scope, host: &str, stat_prefix: &str) -> Box<Self> {
        Self::new(host_scope(root, host).scope("route").tag("envoy.route", stat_prefix))
    }
}

fn host_scope(root: &Scope, host: &str) -> Scope {
    root.scope("vhost").tag("envoy.virtual_host", host)
}
