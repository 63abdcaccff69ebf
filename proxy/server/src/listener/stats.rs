//! What a listener counts.

use waystation_stats::stats_group;

stats_group! {
    /// `listener.<address>.`
    pub struct ListenerStats {
        counters {
            downstream_cx_destroy,
            downstream_cx_overflow,
            downstream_cx_overload_reject,
            downstream_cx_total,
            downstream_cx_transport_socket_connect_timeout,
            downstream_global_cx_overflow,
            downstream_listener_filter_error,
            downstream_listener_filter_remote_close,
            downstream_pre_cx_timeout,
            extension_config_missing,
            network_extension_config_missing,
            no_filter_chain_match,
        }
        gauges {
            downstream_cx_active,
            downstream_pre_cx_active,
        }
        histograms {
            connections_accepted_per_socket_event: Unspecified,
            downstream_cx_length_ms: Milliseconds,
        }
    }
}

stats_group! {
    /// `listener.<address>.worker_<n>.`
    pub struct WorkerListenerStats {
        counters { downstream_cx_total }
        gauges { downstream_cx_active }
        histograms {}
    }
}
