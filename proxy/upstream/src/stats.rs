//! The cluster's statistics, by Envoy's names below `cluster.<name>.`.

use std::sync::OnceLock;

use waystation_stats::{ResponseStats, Scope, stats_group};

stats_group! {
    /// What every cluster counts. The groups that only some clusters have are made on first use.
    ///
    /// Nothing writes `upstream_cx_{rx,tx}_bytes_buffered`, as of `http.<stat_prefix>.`: the flow control counters tell
    /// that a side is behind.
    pub struct ClusterStats {
        counters {
            assignment_stale, assignment_timeout_received, assignment_use_cached, bind_errors,
            lb_healthy_panic, lb_local_cluster_not_ok, lb_recalculate_zone_structures, lb_subsets_created,
            lb_subsets_fallback, lb_subsets_fallback_panic, lb_subsets_removed, lb_subsets_selected,
            lb_zone_cluster_too_small, lb_zone_no_capacity_left, lb_zone_routing_all_directly,
            lb_zone_routing_cross_zone, lb_zone_routing_sampled, membership_change,
            original_dst_host_invalid, retry_or_shadow_abandoned, update_attempt, update_empty,
            update_failure, update_no_rebuild, update_success, upstream_cx_close_notify,
            upstream_cx_connect_attempts_exceeded, upstream_cx_connect_fail, upstream_cx_connect_timeout,
            upstream_cx_connect_with_0_rtt, upstream_cx_destroy, upstream_cx_destroy_local,
            upstream_cx_destroy_local_with_active_rq, upstream_cx_destroy_remote,
            upstream_cx_destroy_remote_with_active_rq, upstream_cx_destroy_with_active_rq,
            upstream_cx_http1_total, upstream_cx_http2_total, upstream_cx_http3_total,
            upstream_cx_idle_timeout, upstream_cx_max_duration_reached, upstream_cx_max_requests,
            upstream_cx_none_healthy, upstream_cx_overflow, upstream_cx_pool_overflow,
            upstream_cx_preconnect_skipped, upstream_cx_protocol_error, upstream_cx_rx_bytes_total,
            upstream_cx_total, upstream_cx_tx_bytes_total, upstream_flow_control_backed_up_total,
            upstream_flow_control_drained_total, upstream_flow_control_paused_reading_total,
            upstream_flow_control_resumed_reading_total, upstream_http3_broken,
            upstream_internal_redirect_failed_total, upstream_internal_redirect_succeeded_total,
            upstream_rq_0rtt, upstream_rq_active_overflow, upstream_rq_cancelled,
            upstream_rq_completed, upstream_rq_maintenance_mode,
            upstream_rq_max_duration_reached,
            upstream_rq_pending_failure_eject, upstream_rq_pending_overflow, upstream_rq_pending_total,
            upstream_rq_per_try_idle_timeout, upstream_rq_per_try_timeout, upstream_rq_retry,
            upstream_rq_retry_backoff_exponential, upstream_rq_retry_backoff_ratelimited,
            upstream_rq_retry_limit_exceeded, upstream_rq_retry_overflow, upstream_rq_retry_success,
            upstream_rq_rx_reset, upstream_rq_rx_reset_no_error, upstream_rq_timeout, upstream_rq_total,
            upstream_rq_tx_reset,
            socket_match_default = "default.total_match_count",
        }
        gauges {
            cx_open_default = "circuit_breakers.default.cx_open",
            cx_pool_open_default = "circuit_breakers.default.cx_pool_open",
            rq_open_default = "circuit_breakers.default.rq_open",
            rq_pending_open_default = "circuit_breakers.default.rq_pending_open",
            rq_retry_open_default = "circuit_breakers.default.rq_retry_open",
            cx_open_high = "circuit_breakers.high.cx_open",
            cx_pool_open_high = "circuit_breakers.high.cx_pool_open",
            rq_open_high = "circuit_breakers.high.rq_open",
            rq_pending_open_high = "circuit_breakers.high.rq_pending_open",
            rq_retry_open_high = "circuit_breakers.high.rq_retry_open",
            lb_subsets_active, max_host_weight, membership_degraded, membership_excluded, membership_healthy,
            membership_total, upstream_cx_active, upstream_cx_rx_bytes_buffered,
            upstream_cx_tx_bytes_buffered, upstream_queue_overloaded, upstream_rq_active, upstream_rq_pending_active, version,
            warming_state,
        }
        histograms {
            upstream_cx_connect_ms: Milliseconds,
            upstream_cx_length_ms: Milliseconds,
            upstream_rq_per_cx: Unspecified,
        }
    }
}

stats_group! {
    /// `circuit_breakers.default.remaining_*`, with `track_remaining`. Whole names, for they are listed among those above.
    pub struct RemainingDefaultStats {
        gauges {
            cx = "circuit_breakers.default.remaining_cx",
            cx_pools = "circuit_breakers.default.remaining_cx_pools",
            pending = "circuit_breakers.default.remaining_pending",
            retries = "circuit_breakers.default.remaining_retries",
            rq = "circuit_breakers.default.remaining_rq",
        }
    }
}

stats_group! {
    /// `circuit_breakers.high.remaining_*`, likewise.
    pub struct RemainingHighStats {
        gauges {
            cx = "circuit_breakers.high.remaining_cx",
            cx_pools = "circuit_breakers.high.remaining_cx_pools",
            pending = "circuit_breakers.high.remaining_pending",
            retries = "circuit_breakers.high.remaining_retries",
            rq = "circuit_breakers.high.remaining_rq",
        }
    }
}

stats_group! {
    /// `ring_hash_lb.*`.
    pub struct RingHashStats {
        gauges { max_hashes_per_host, min_hashes_per_host, size }
    }
}

stats_group! {
    /// `maglev_lb.*`.
    pub struct MaglevStats {
        gauges { max_entries_per_host, min_entries_per_host }
    }
}

stats_group! {
    /// `http1.*`, of all listeners or of one cluster. Answers to pipelined requests do not pile up: the next request is
    /// taken when the answer to the one before is on its way, so there is no `response_flood`.
    pub struct Http1CodecStats {
        counters {
            dropped_headers_with_underscores, metadata_not_supported_error,
            requests_rejected_with_underscores_in_headers, response_flood,
        }
    }
}

stats_group! {
    /// `http2.*`, likewise. What Envoy says of its own codec's queues has no counterpart here.
    pub struct Http2CodecStats {
        counters {
            dropped_headers_with_underscores, goaway_sent, header_list_size_too_large, header_overflow,
            headers_cb_no_stream,
            inbound_empty_frames_flood, inbound_priority_frames_flood, inbound_window_update_frames_flood,
            keepalive_timeout, metadata_empty_frames, requests_rejected_with_underscores_in_headers,
            rx_messaging_error, rx_reset, stream_refused_errors, trailers, tx_reset,
        }
        gauges { streams_active }
    }
}

/// What a cluster counts from its first request on.
#[derive(Debug)]
pub struct TrafficStats {
    scope: Scope,
    /// `upstream_rq_<code>`, its sums and `upstream_rq_time`.
    pub responses: ResponseStats,
    http1: OnceLock<Http1CodecStats>,
    http2: OnceLock<Http2CodecStats>,
}

impl TrafficStats {
    /// Those below `scope`: a cluster's, or the root for the codecs of all listeners.
    pub fn new(scope: Scope) -> Self {
        Self {
            responses: ResponseStats::new(scope.clone()),
            http1: OnceLock::new(),
            http2: OnceLock::new(),
            scope,
        }
    }

    /// `http1.*`, made with the first connection of that kind.
    pub fn http1(&self) -> &Http1CodecStats {
        self.http1.get_or_init(|| self.scope.scope("http1").group())
    }

    /// `http2.*` likewise.
    pub fn http2(&self) -> &Http2CodecStats {
        self.http2.get_or_init(|| self.scope.scope("http2").group())
    }
}

/// The scope `cluster.<alt_stat_name or name>`.
pub fn cluster_scope(root: &Scope, stat_name: &str) -> Scope {
    root.scope("cluster").tag("envoy.cluster_name", stat_name)
}

stats_group! {
    /// `track_cluster_stats.timeout_budgets`.
    pub struct TimeoutBudgetStats {
        histograms {
            upstream_rq_timeout_budget_percent_used: Unspecified,
            upstream_rq_timeout_budget_per_try_percent_used: Unspecified,
        }
    }
}

stats_group! {
    /// `track_cluster_stats.request_response_sizes`.
    pub struct RequestSizeStats {
        histograms {
            upstream_rq_body_size: Bytes,
            upstream_rq_headers_count: Unspecified,
            upstream_rq_headers_size: Bytes,
            upstream_rs_body_size: Bytes,
            upstream_rs_headers_count: Unspecified,
            upstream_rs_headers_size: Bytes,
        }
    }
}
