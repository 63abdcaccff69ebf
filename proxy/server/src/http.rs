//! HTTP: the connection manager, its codecs' drivers, and the router.
//!
//! [`config`] compiles the connection manager; [`serve_connection`] drives a downstream connection; `stream` is the life
//! of one request, over whichever codec it came and whichever it goes out by.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use waystation_filter_api::cell::{Held, Local};
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::stream::{RateLimits, RouteView};
use waystation_filter_api::value::Metadata;
use waystation_http::Headers;
use waystation_route::{FilterSlot, RouteTable};

mod async_client;
mod client_cert;
pub mod config;
mod downstream;
pub(crate) mod end;
pub mod filters;
mod forwarding;
pub(crate) mod frames;
pub(crate) mod outbox;
mod proxy_status;
mod request_id;
pub(crate) mod retry;
mod sniff;
pub mod stats;
pub(crate) mod stream;
pub(crate) mod timer;

pub use config::Hcm;
pub(crate) use config::refuse_unsupported;

use crate::drain::DrainHandle;
use crate::manager::scopes::ScopeMap;
use crate::on_demand::Wanted;
use crate::overload::{Scale, ScaledTimeouts, Wait};
use crate::transport::Transport;
use crate::worker::Worker;
use config::Codec;
use sniff::Sniffed;

/// What the streams of one downstream connection share.
pub(crate) struct ConnCx {
    pub(crate) worker: Rc<Worker>,
    pub(crate) hcm: Held<Hcm>,
    pub(crate) info: Rc<ConnectionInfo>,
    pub(crate) drain: DrainHandle,
    routes: RefCell<Routes>,
}

struct Routes {
    /// Follows the scopes, when routes are scoped.
    scopes: Option<Local<ScopeMap>>,
    /// Follows the route configuration of the last request.
    local: Option<Local<RouteTable>>,
    table: Option<Rc<Table>>,
}

/// A route table as the streams of one connection refer to it.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) held: Held<RouteTable>,
    /// For each filter of the chain, its place in the table's per-filter configuration.
    pub(crate) slots: Box<[Option<FilterSlot>]>,
}

impl ConnCx {
    fn new(worker: Rc<Worker>, hcm: Held<Hcm>, info: Rc<ConnectionInfo>, drain: DrainHandle) -> Self {
        let (scopes, local) = match &hcm.routes {
            config::Routes::Table(cell) => (None, Some(Local::new(Arc::clone(cell)))),
            config::Routes::Scoped { scopes, .. } => (Some(Local::new(Arc::clone(scopes))), None),
        };
        Self { worker, hcm, info, drain, routes: RefCell::new(Routes { scopes, local, table: None }) }
    }

    /// The route table in force for a request; nothing while it has not arrived, or when no scope is the request's.
    #[inline]
    pub(crate) fn table(&self, request: &Headers) -> Option<Rc<Table>> {
        let mut routes = self.routes.borrow_mut();
        let Routes { scopes, local, table } = &mut *routes;
        if let (config::Routes::Scoped { key, .. }, Some(scopes)) = (&self.hcm.routes, scopes) {
            let cell = scopes.get()?.find(&key.key(request)?)?;
            if !local.as_ref().is_some_and(|local| Arc::ptr_eq(local.cell(), cell)) {
                *local = Some(Local::new(Arc::clone(cell)));
            }
        }
        let held = local.as_mut()?.get()?;
        if let Some(table) = table
            && table.held.same(held)
        {
            return Some(Rc::clone(table));
        }
        let slots = self.hcm.filters.iter().map(|entry| held.filter_slot(&entry.name)).collect();
        let fresh = Rc::new(Table { held: held.clone(), slots });
        *table = Some(Rc::clone(&fresh));
        Some(fresh)
    }

    /// The idle timeout of the connection, as long as it is at the present pressure.
    pub(crate) fn idle_timeout(&self) -> Option<Duration> {
        self.scaled(self.hcm.timeouts.idle, |timeouts| &timeouts.connection_idle)
    }

    /// The same for that of its streams.
    pub(crate) fn stream_idle_timeout(&self) -> Option<Duration> {
        self.scaled(self.hcm.timeouts.stream_idle, |timeouts| &timeouts.stream_idle)
    }

    /// When the connection is over, which without pressure is at `end`.
    pub(crate) fn connection_end(&self, end: Option<Instant>) -> Option<Instant> {
        let start = self.info.start;
        let max = end?.saturating_duration_since(start);
        Some(start + self.scaled(Some(max), |timeouts| &timeouts.connection_max).unwrap_or(max))
    }

    #[inline]
    fn scaled(&self, max: Option<Duration>, scale: impl Fn(&ScaledTimeouts) -> &Scale) -> Option<Duration> {
        let Some(overload) = &self.hcm.overload else { return max };
        max.map(|max| scale(&overload.reduce_timeouts).of(max))
    }

    /// Has the task look at its deadlines anew when the pressure changes them; nothing where it never does.
    pub(crate) async fn wait_for_overload(&self) -> Option<Wait> {
        self.hcm.overload.as_ref().filter(|overload| overload.reduce_timeouts.is_set())?;
        let waits = &self.worker.overload_waits;
        std::future::poll_fn(|task| Poll::Ready(Some(waits.enter(task.waker())))).await
    }

    /// What may give a request without a route one: the virtual host of its host, or the routes of its scope.
    pub(crate) fn missing_route(&self, request: &Headers) -> Option<Wanted> {
        if let Some(table) = self.table(request) {
            if !table.held.is_on_demand() || table.held.has_virtual_host(request) {
                return None;
            }
            let host = str::from_utf8(request.authority()?).ok()?.to_ascii_lowercase();
            let routes = self.routes.borrow().local.as_ref().map(|local| Arc::clone(local.cell()))?;
            return Some(Wanted::VirtualHost { routes, host: host.into() });
        }
        let config::Routes::Scoped { key, scopes } = &self.hcm.routes else { return None };
        let key = key.key(request)?;
        let known = scopes.with(|scopes| scopes.is_some_and(|scopes| scopes.find(&key).is_some()));
        known.then(|| Wanted::Scope { scopes: Arc::clone(scopes), key })
    }
}

impl RouteView for Table {
    fn route_name(&self, route: u32) -> &str {
        self.held.route_name(route)
    }

    fn route_metadata(&self, route: u32) -> Option<&Metadata> {
        self.held.route_metadata(route)
    }

    fn virtual_host_name(&self, route: u32) -> &str {
        self.held.virtual_host_name(route)
    }

    fn virtual_host_metadata(&self, route: u32) -> Option<&Metadata> {
        self.held.virtual_host_metadata(route)
    }

    fn rate_limits(&self, route: u32) -> Option<RateLimits<'_>> {
        self.held.rate_limits(route)
    }

    fn virtual_cluster_name(&self, virtual_cluster: u32) -> Option<&str> {
        self.held.virtual_cluster_name(virtual_cluster)
    }
}

/// Serves one downstream connection to its end. `hcm` is the configuration it keeps for life.
pub async fn serve_connection(
    worker: Rc<Worker>,
    hcm: Held<Hcm>,
    transport: Transport,
    info: Rc<ConnectionInfo>,
    drain: DrainHandle,
) {
    let cx = ConnCx::new(worker, hcm, info, drain);
    let hcm = &cx.hcm;
    let _open = OpenConnection::new(&cx);
    let alpn_h2 = cx.info.negotiated_protocol.as_deref() == Some(b"h2");
    let served = match hcm.codec {
        // What a codec is made for has come.
        Codec::Http1 | Codec::Http2 if hcm.overload.as_ref().is_some_and(|o| o.creating_codec.is_some()) => {
            sniff::first(&cx, transport).await
        }
        Codec::Http1 => Some((Sniffed::Http1, transport, BytesMut::new())),
        Codec::Http2 => Some((Sniffed::Http2, transport, BytesMut::new())),
        Codec::Auto if alpn_h2 => Some((Sniffed::Http2, transport, BytesMut::new())),
        Codec::Auto => sniff::sniff(&cx, transport).await,
    };
    if served.is_some()
        && let Some(point) = hcm.overload.as_ref().and_then(|overload| overload.creating_codec.as_ref())
        && point.sheds(|| cx.worker.random())
    {
        hcm.stats.hcm.downstream_rq_overload_close().inc();
        return;
    }
    match served {
        Some((Sniffed::Http1, transport, input)) => downstream::http1::serve(&cx, transport, input).await,
        // The HTTP/2 driver is many times the size of the other: only those who need it carry it.
        Some((Sniffed::Http2, transport, input)) => {
            Box::pin(downstream::http2::serve(cx_rc(&cx), transport, input)).await;
        }
        None => {}
    }
}

/// A connection that a network filter has ended before it came here: it is counted nevertheless.
pub fn count_connection(worker: &Rc<Worker>, hcm: Held<Hcm>, info: Rc<ConnectionInfo>) {
    let cx = ConnCx::new(Rc::clone(worker), hcm, info, DrainHandle::default());
    drop(OpenConnection::new(&cx));
}

/// A connection in the statistics, until it is dropped: however that happens, it is not left counted as active.
struct OpenConnection<'a>(&'a ConnCx);

impl<'a> OpenConnection<'a> {
    fn new(cx: &'a ConnCx) -> Self {
        let stats = &cx.hcm.stats.hcm;
        stats.downstream_cx_total().inc();
        stats.downstream_cx_active().inc();
        if cx.info.tls.is_some() {
            stats.downstream_cx_ssl_total().inc();
            stats.downstream_cx_ssl_active().inc();
        }
        Self(cx)
    }
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        let Self(cx) = self;
        let stats = &cx.hcm.stats.hcm;
        stats.downstream_cx_destroy().inc();
        stats.downstream_cx_active().dec();
        if cx.info.tls.is_some() {
            stats.downstream_cx_ssl_active().dec();
        }
        stats.downstream_cx_length_ms().record(millis(cx.info.start, Instant::now()));
    }
}

/// The same connection for streams that are tasks of their own.
fn cx_rc(cx: &ConnCx) -> Rc<ConnCx> {
    Rc::new(ConnCx::new(Rc::clone(&cx.worker), cx.hcm.clone(), Rc::clone(&cx.info), cx.drain.clone()))
}

pub(crate) fn millis(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_millis()).unwrap_or(u64::MAX)
}
