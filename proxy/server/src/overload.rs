//! `overload_manager`: pressures of resources, and what is done when they rise.
//!
//! The main thread asks the monitors once in each `refresh_interval` and feeds the pressures through the triggers
//! (`manager`, around the sans-io core in `trigger`). What comes out are [`Level`]s: a decision on the request path is one
//! relaxed load of the one that it depends on, and none at all where the bootstrap has nothing for it or the listener has
//! `bypass_overload_manager`. The limit on downstream connections is no pressure but a count ([`Connections`]).

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

mod config;
mod connections;
mod cpu;
mod level;
mod manager;
mod monitor;
mod timeouts;
mod trigger;
mod waits;

pub use config::{Compiled, compile};
pub use connections::{Admission, Connection, Connections};
pub use level::{Level, Point};
pub use manager::Manager;
pub use timeouts::{Scale, ScaledTimeouts};
pub use waits::{Wait, Waits, follow};

/// What of the overload manager bears on workers; a field is set where the bootstrap has the action or load-shed point.
#[derive(Clone, Debug, Default)]
pub struct Overload {
    /// `envoy.overload_actions.stop_accepting_requests`.
    pub stop_accepting_requests: Option<Arc<Level>>,
    /// `envoy.overload_actions.disable_http_keepalive`.
    pub disable_http_keepalive: Option<Arc<Level>>,
    /// `envoy.overload_actions.stop_accepting_connections`.
    pub stop_accepting_connections: Option<Arc<Level>>,
    /// `envoy.overload_actions.reject_incoming_connections`.
    pub reject_incoming_connections: Option<Arc<Level>>,
    /// All instances of `envoy.overload_actions.reduce_timeouts`.
    pub reduce_timeouts: ScaledTimeouts,
    /// `envoy.load_shed_points.tcp_listener_accept`.
    pub tcp_listener_accept: Option<Arc<Point>>,
    /// `envoy.load_shed_points.http_connection_manager_decode_headers`.
    pub decode_headers: Option<Arc<Point>>,
    /// `envoy.load_shed_points.hcm_ondata_creating_codec`.
    pub creating_codec: Option<Arc<Point>>,
    /// `envoy.load_shed_points.http1_server_abort_dispatch`.
    pub http1_abort_dispatch: Option<Arc<Point>>,
    /// `envoy.load_shed_points.http2_server_go_away_on_dispatch`.
    pub go_away: Option<Arc<Point>>,
    /// `envoy.load_shed_points.http2_server_go_away_and_close_on_dispatch`.
    pub go_away_and_close: Option<Arc<Point>>,
    /// `envoy.load_shed_points.http_downstream_filter_check`.
    pub filter_check: Option<Arc<Point>>,
    /// `envoy.load_shed_points.connection_pool_new_connection`.
    pub new_connection: Option<Arc<Point>>,
    /// `envoy.load_shed_points.tcp_proxy_on_data`.
    pub tcp_proxy_on_data: Option<Arc<Point>>,
    /// `envoy.load_shed_points.tcp_proxy_upstream_connect`.
    pub tcp_proxy_connect: Option<Arc<Point>>,
    /// Moves with each change of a level that somebody waits for.
    changes: Option<watch::Receiver<()>>,
    /// Moves when memory is to be given back.
    shrink: Option<watch::Receiver<()>>,
}

/// What a connection does with bytes that have come, by the load-shed points of HTTP's dispatch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Dispatch {
    /// Parses them.
    Go,
    /// Parses them, and is to end soon.
    Drain,
    /// Ends at once, without an answer.
    Close,
}

impl Overload {
    /// Moves with each change of a level that somebody waits for; nothing when nobody can.
    pub fn changes(&self) -> Option<watch::Receiver<()>> {
        self.changes.clone()
    }

    /// Moves when memory is to be given back; nothing when it never is.
    pub fn shrink(&self) -> Option<watch::Receiver<()>> {
        self.shrink.clone()
    }

    /// Whether a new connection is closed.
    pub fn rejects_connection(&self, random: impl Fn() -> u64) -> bool {
        let point = self.tcp_listener_accept.as_deref().is_some_and(|point| point.sheds(&random));
        point || self.reject_incoming_connections.as_deref().is_some_and(|level| level.fires(random))
    }

    /// Whether a new request is refused.
    pub fn rejects_request(&self, random: impl Fn() -> u64) -> bool {
        let point = self.decode_headers.as_deref().is_some_and(|point| point.sheds(&random));
        point || self.stop_accepting_requests.as_deref().is_some_and(|level| level.fires(random))
    }

    /// Whether a response is the last of its connection.
    pub fn ends_connection(&self, random: impl FnOnce() -> u64) -> bool {
        self.disable_http_keepalive.as_deref().is_some_and(|level| level.fires(random))
    }

    /// What to do with bytes that have come on an HTTP connection.
    pub fn dispatch(&self, random: impl Fn() -> u64) -> Dispatch {
        if self.go_away_and_close.as_deref().is_some_and(|point| point.sheds(&random)) {
            Dispatch::Close
        } else if self.go_away.as_deref().is_some_and(|point| point.sheds(random)) {
            Dispatch::Drain
        } else {
            Dispatch::Go
        }
    }
}

/// The overload manager of the process; empty until the bootstrap has been read, and for good when it has none.
#[derive(Debug, Default)]
pub struct Installed(OnceLock<Views>);

#[derive(Debug)]
struct Views {
    all: Arc<Overload>,
    /// What bears on listeners that bypass it, if anything does.
    bypassed: Option<Arc<Overload>>,
}

impl Installed {
    /// Puts it in force. Once, before anything else is compiled.
    pub fn install(&self, overload: Arc<Overload>) {
        // To Envoy its timers are the thread's, and know of no listener.
        let reduce_timeouts = overload.reduce_timeouts.clone();
        let changes = overload.changes();
        let bypassed = reduce_timeouts
            .is_set()
            .then(|| Arc::new(Overload { reduce_timeouts, changes, ..Overload::default() }));
        // A second call changes nothing: the bootstrap is read once.
        let _ = self.0.set(Views { all: overload, bypassed });
    }

    /// What is in force, if anything is.
    #[inline]
    pub fn get(&self) -> Option<&Arc<Overload>> {
        self.0.get().map(|views| &views.all)
    }

    /// What of it bears on a listener with this `bypass_overload_manager`.
    pub fn of_listener(&self, bypasses: bool) -> Option<Arc<Overload>> {
        let views = self.0.get()?;
        if bypasses { views.bypassed.clone() } else { Some(Arc::clone(&views.all)) }
    }
}
