//! What the admin interface counts of itself: to Envoy it is a listener with an HTTP connection manager.

use std::sync::Arc;
use std::time::Instant;

use waystation_stats::{GaugeRef, Scope, stats_group};

use crate::http::millis;
use crate::http::stats::{ClassStats, HcmStats};
use crate::listener::stats::WorkerListenerStats;

stats_group! {
    /// `listener.admin.`
    pub struct AdminListenerStats {
        counters {
            downstream_cx_destroy, downstream_cx_overflow, downstream_cx_overload_reject, downstream_cx_total,
            downstream_cx_transport_socket_connect_timeout, downstream_global_cx_overflow,
            downstream_listener_filter_error, downstream_listener_filter_remote_close, downstream_pre_cx_timeout,
            no_filter_chain_match,
        }
        gauges { downstream_cx_active, downstream_pre_cx_active }
        histograms { connections_accepted_per_socket_event: Unspecified, downstream_cx_length_ms: Milliseconds }
    }
}

/// All handles.
#[derive(Debug)]
pub(crate) struct AdminStats {
    hcm: HcmStats,
    classes: ClassStats,
    listener: AdminListenerStats,
    listener_classes: ClassStats,
    thread: WorkerListenerStats,
}

/// An open connection, and whether it is one of HTTP/2 once that is known; counts its end when dropped.
pub(crate) struct CountedConnection(Arc<AdminStats>, Instant, Option<bool>);

/// A request under way.
pub(crate) struct CountedRequest<'a>(&'a AdminStats, Instant);

impl AdminStats {
    pub(crate) fn new(root: &Scope) -> Arc<Self> {
        const MANAGER: &str = "envoy.http_conn_manager_prefix";
        let http = root.scope("http").tag(MANAGER, "admin");
        let listener = root.scope("listener").scope("admin");
        Arc::new(Self {
            hcm: http.group(),
            classes: http.group(),
            listener_classes: listener.scope("http").tag(MANAGER, "admin").group(),
            thread: listener.scope("main_thread").group(),
            listener: listener.group(),
        })
    }

    pub(crate) fn connection(self: &Arc<Self>) -> CountedConnection {
        self.hcm.downstream_cx_total().inc();
        self.hcm.downstream_cx_active().inc();
        self.listener.connections_accepted_per_socket_event().record(1);
        self.listener.downstream_cx_total().inc();
        self.listener.downstream_cx_active().inc();
        self.thread.downstream_cx_total().inc();
        self.thread.downstream_cx_active().inc();
        CountedConnection(Arc::clone(self), Instant::now(), None)
    }

    fn active(&self, http2: bool) -> GaugeRef<'_> {
        if http2 { self.hcm.downstream_cx_http2_active() } else { self.hcm.downstream_cx_http1_active() }
    }

    pub(crate) fn request(&self, http2: bool) -> CountedRequest<'_> {
        self.hcm.downstream_rq_total().inc();
        if http2 {
            self.hcm.downstream_rq_http2_total().inc();
        } else {
            self.hcm.downstream_rq_http1_total().inc();
        }
        self.hcm.downstream_rq_active().inc();
        CountedRequest(self, Instant::now())
    }
}

impl CountedConnection {
    /// Its first bytes have come.
    pub(crate) fn speaks(&mut self, http2: bool) {
        let stats = &self.0;
        if http2 {
            stats.hcm.downstream_cx_http2_total().inc();
        } else {
            stats.hcm.downstream_cx_http1_total().inc();
        }
        stats.active(http2).inc();
        self.2 = Some(http2);
    }
}

impl CountedRequest<'_> {
    /// It is answered with this status.
    pub(crate) fn answered(&self, status: u16) {
        self.0.classes.record(status);
        self.0.listener_classes.record(status);
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        let Self(stats, start, http2) = self;
        let length = millis(*start, Instant::now());
        stats.hcm.downstream_cx_destroy().inc();
        stats.hcm.downstream_cx_active().dec();
        if let Some(http2) = *http2 {
            stats.active(http2).dec();
        }
        stats.hcm.downstream_cx_length_ms().record(length);
        stats.listener.downstream_cx_destroy().inc();
        stats.listener.downstream_cx_active().dec();
        stats.listener.downstream_cx_length_ms().record(length);
        stats.thread.downstream_cx_active().dec();
    }
}

impl Drop for CountedRequest<'_> {
    fn drop(&mut self) {
        self.0.hcm.downstream_rq_active().dec();
        self.0.hcm.downstream_rq_time().record(millis(self.1, Instant::now()));
    }
}
