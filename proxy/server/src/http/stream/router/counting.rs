//! What requests and responses count in besides their cluster: categories, zones, virtual clusters, routes, and the
//! histograms of `track_cluster_stats`.

use std::rc::Rc;
use std::time::{Duration, Instant};

use waystation_http::{Headers, Known};
use waystation_route::{RequestCounters, RequestStats};
use waystation_stats::ResponseStats;
use waystation_upstream::{Cluster, Host};

use super::Routing;
use crate::http::downstream::Downstream;
use crate::http::millis;
use crate::http::stream::Stream;
use crate::worker::LocalCluster;

/// What one request is counted by.
#[derive(Debug)]
pub(super) struct Counted<'r> {
    /// Its virtual cluster and its route, where these count.
    counters: [Option<&'r RequestCounters>; 2],
    /// `zone.<ours>.<the last host's>`.
    zone: Option<Rc<ResponseStats>>,
    /// The last host, or its response, is a canary.
    canary: bool,
    /// When the stream of the attempt began; nothing when it never had one.
    start: Option<Instant>,
    /// Bytes and number of the response's headers.
    response_head: Option<(u64, u64)>,
}

impl<'r> Counted<'r> {
    pub(super) fn new(counters: [Option<&'r RequestCounters>; 2]) -> Self {
        Self { counters, zone: None, canary: false, start: None, response_head: None }
    }

    /// Those of another attempt of the same request.
    pub(super) fn another(&self) -> Self {
        Self::new(self.counters)
    }

    /// Counts a request in its virtual cluster and its route.
    #[inline]
    pub(super) fn each(&self, count: impl Fn(&RequestStats)) {
        self.counters.iter().flatten().for_each(|counters| count(&counters.requests));
    }

    /// An attempt has its stream to `host`.
    pub(super) fn begin(&mut self, now: Instant, host: &Host, zone: Option<Rc<ResponseStats>>) {
        self.each(|requests| requests.upstream_rq_total().inc());
        *self = Self { zone, canary: host.canary(), start: Some(now), ..Self::new(self.counters) };
    }

    /// The response head of the attempt; measured only for who wants it, as that takes a walk.
    pub(super) fn head(&mut self, head: &Headers, measure: bool) {
        self.canary |= head.get(Known::XEnvoyUpstreamCanary) == Some(b"true");
        self.response_head = measure.then(|| (head.byte_size() as u64, head.len() as u64));
    }
}

impl<D: Downstream> Stream<'_, D> {
    /// `upstream_rq_NNN` for a response, or for what we answer in place of one.
    pub(super) fn count(&self, routing: &Routing<'_>, status: u16) {
        self.count_status(&routing.local, &routing.cluster, &routing.counted, status);
    }

    /// The same before there is anything to share between attempts.
    pub(super) fn count_status(
        &self,
        local: &LocalCluster,
        cluster: &Cluster,
        counted: &Counted<'_>,
        status: u16,
    ) {
        // Health checks that others make through us would distort what clients get.
        if self.cx.hcm.router.dynamic_stats && !self.info.health_check {
            cluster.count_response(status);
            self.each_category(local, cluster, counted, |stats| stats.record(status));
        }
    }

    /// The response is complete: `upstream_rq_time`, and the share of the route timeout that was used.
    pub(super) fn record_time(&self, routing: &Routing<'_>) {
        let Some(since) = self.info.timing.last_downstream_rx else { return };
        let elapsed = millis(since, Instant::now());
        if let Some(budgets) = &routing.cluster.timeout_budget {
            let used = percent_of(elapsed, routing.timeouts.global);
            budgets.upstream_rq_timeout_budget_percent_used().record(used);
        }
        if self.cx.hcm.router.dynamic_stats && !self.info.health_check {
            routing.cluster.responses().record_time(elapsed);
            let (local, cluster, counted) = (&routing.local, &routing.cluster, &routing.counted);
            self.each_category(local, cluster, counted, |stats| stats.record_time(elapsed));
        }
    }

    /// The histograms that have a value for each attempt, however it ended.
    pub(super) fn record_attempt(&self, routing: &mut Routing<'_>) {
        let Some(start) = routing.counted.start.take() else { return };
        if let Some(budgets) = &routing.cluster.timeout_budget {
            let used = percent_of(millis(start, Instant::now()), routing.timeouts.per_try);
            budgets.upstream_rq_timeout_budget_per_try_percent_used().record(used);
        }
        let Some(sizes) = &routing.cluster.request_sizes else { return };
        let (request, bytes) = (&self.heads.request, &self.info.upstream.bytes);
        sizes.upstream_rq_headers_size().record(request.byte_size() as u64);
        sizes.upstream_rq_headers_count().record(request.len() as u64);
        sizes.upstream_rq_body_size().record(bytes.body_sent);
        if let Some((size, count)) = routing.counted.response_head {
            sizes.upstream_rs_headers_size().record(size);
            sizes.upstream_rs_headers_count().record(count);
            sizes.upstream_rs_body_size().record(bytes.body_received);
        }
    }

    fn each_category(
        &self,
        local: &LocalCluster,
        cluster: &Cluster,
        counted: &Counted<'_>,
        record: impl Fn(&ResponseStats),
    ) {
        let extras = local.extras(&self.cx.worker, cluster);
        if counted.canary {
            record(extras.canary());
        }
        record(if self.info.internal { extras.internal() } else { extras.external() });
        counted.counters.iter().flatten().for_each(|counters| record(&counters.responses));
        if let Some(zone) = &counted.zone {
            record(zone);
        }
    }
}

/// Whole percent; of no timeout nothing is ever used.
fn percent_of(millis: u64, timeout: Duration) -> u64 {
    let timeout = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    millis.saturating_mul(100).checked_div(timeout).unwrap_or(0)
}
