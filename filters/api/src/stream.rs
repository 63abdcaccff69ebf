//! What is known of one HTTP stream or TCP session while it lives: the source of access logs, header formatters
//! and filters.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use waystation_stats::Scope;

use crate::address::Address;
use crate::connection::{ConnectionInfo, TlsInfo};
use crate::filter_state::FilterState;
use crate::flags::ResponseFlags;
use crate::value::Metadata;

/// The protocol of one side of a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// HTTP/3.
    Http3,
}

impl Protocol {
    /// As `%PROTOCOL%` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
            Self::Http3 => "HTTP/3",
        }
    }
}

/// The route a stream took, as logs and filters see it. The table is the worker's; a route is an index in it.
pub trait RouteView: fmt::Debug {
    /// `Route.name`, empty when unset.
    fn route_name(&self, route: u32) -> &str;
    /// `Route.metadata`.
    fn route_metadata(&self, route: u32) -> Option<&Metadata>;
    /// `VirtualHost.name` of the route.
    fn virtual_host_name(&self, route: u32) -> &str;
    /// `VirtualHost.metadata` of the route.
    fn virtual_host_metadata(&self, route: u32) -> Option<&Metadata>;
    /// `rate_limits` of the route and of its virtual host; nothing for a route that does not forward.
    fn rate_limits(&self, _route: u32) -> Option<RateLimits<'_>> {
        None
    }
    /// The name of the virtual cluster that a request of this stream falls in, for `%VIRTUAL_CLUSTER_NAME%`.
    fn virtual_cluster_name(&self, virtual_cluster: u32) -> Option<&str>;
}

/// Rate limit policies of a route; the filters that apply them know the type behind them.
#[derive(Clone, Copy)]
pub struct RateLimits<'a> {
    /// `RouteAction.rate_limits`.
    pub route: Option<&'a (dyn Any + Send + Sync)>,
    /// `VirtualHost.rate_limits`.
    pub virtual_host: Option<&'a (dyn Any + Send + Sync)>,
    /// `RouteAction.include_vh_rate_limits`.
    pub include_virtual_host: bool,
}

impl fmt::Debug for RateLimits<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimits")
            .field("include_virtual_host", &self.include_virtual_host)
            .finish_non_exhaustive()
    }
}

/// The upstream host a stream went to.
pub trait HostView: fmt::Debug {
    /// Its address.
    fn address(&self) -> &Address;
    /// Its DNS name, empty when it has none.
    fn hostname(&self) -> &str;
    /// Its endpoint metadata.
    fn metadata(&self) -> Option<&Metadata>;
}

/// The cluster a stream went to.
pub trait ClusterView: fmt::Debug {
    /// The cluster's name.
    fn name(&self) -> &str;
    /// `alt_stat_name` or the name (`%UPSTREAM_CLUSTER%`).
    fn observability_name(&self) -> &str;
    /// The cluster's metadata.
    fn metadata(&self) -> Option<&Metadata>;
    /// Counts `upstream_rq_<status>` for an answer that a filter gives in the cluster's place.
    fn count_response(&self, _status: u16) {}
    /// What the filter configuration with the number `id` (see [`filter_id`]) keeps for this cluster on this worker, such as
    /// statistics below the cluster's scope: made the first time it is asked for.
    fn of_filter(&self, _id: u64, _make: &dyn Fn(&Scope) -> Rc<dyn Any>) -> Option<Rc<dyn Any>> {
        None
    }
}

/// A number for a filter configuration that no other has.
pub fn filter_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Points in time of a stream; `None` is "has not happened". Only those that a configured log or header needs
/// cost a clock reading beyond the first and last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// The last byte of the request came in.
    pub last_downstream_rx: Option<Instant>,
    /// The first byte of the request went upstream.
    pub first_upstream_tx: Option<Instant>,
    /// The last byte of the request went upstream.
    pub last_upstream_tx: Option<Instant>,
    /// The first byte of the response came from upstream.
    pub first_upstream_rx: Option<Instant>,
    /// The last byte of the response came from upstream.
    pub last_upstream_rx: Option<Instant>,
    /// The first byte of the response went downstream.
    pub first_downstream_tx: Option<Instant>,
    /// The last byte of the response went downstream.
    pub last_downstream_tx: Option<Instant>,
    /// The stream ended.
    pub complete: Option<Instant>,
    /// The downstream TLS handshake took this long.
    pub downstream_handshake: Option<Duration>,
    /// Waiting for an upstream connection took this long.
    pub pool_ready: Option<Duration>,
}

/// Bytes of one side of a stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bytes {
    /// Body bytes received.
    pub body_received: u64,
    /// Body bytes sent.
    pub body_sent: u64,
    /// Header bytes received.
    pub header_received: u64,
    /// Header bytes sent.
    pub header_sent: u64,
    /// Bytes on the wire received.
    pub wire_received: u64,
    /// Bytes on the wire sent.
    pub wire_sent: u64,
}

/// The upstream side of a stream.
#[derive(Clone, Debug, Default)]
pub struct UpstreamInfo {
    /// The cluster.
    pub cluster: Option<Rc<dyn ClusterView>>,
    /// The host of the last attempt.
    pub host: Option<Rc<dyn HostView>>,
    /// Addresses of all hosts attempted, in order; filled only when a retry happens.
    pub attempted: Vec<Rc<dyn HostView>>,
    /// How many attempts were made (`%UPSTREAM_REQUEST_ATTEMPT_COUNT%`).
    pub attempts: u32,
    /// Our address of the upstream connection.
    pub local_address: Option<Address>,
    /// The upstream connection's id.
    pub connection_id: Option<u64>,
    /// The protocol spoken upstream.
    pub protocol: Option<Protocol>,
    /// The upstream TLS session.
    pub tls: Option<Arc<TlsInfo>>,
    /// Why the transport failed.
    pub transport_failure_reason: Option<Cow<'static, str>>,
    /// Byte counts of the upstream side.
    pub bytes: Bytes,
}

impl UpstreamInfo {
    /// Before a further attempt: what was known of the last one's connection.
    pub fn forget_connection(&mut self) {
        (self.local_address, self.connection_id, self.protocol) = (None, None, None);
        (self.tls, self.transport_failure_reason) = (None, None);
    }
}

/// All that is known of a stream.
#[derive(Debug)]
pub struct StreamInfo {
    /// When it began.
    pub start: Instant,
    /// The same by the wall clock.
    pub start_time: SystemTime,
    /// The downstream connection.
    pub connection: Rc<ConnectionInfo>,
    /// The downstream protocol; `None` for TCP.
    pub protocol: Option<Protocol>,
    /// A number unique to the stream (`%STREAM_ID%` derives from the request id when there is one).
    pub id: u64,
    /// The status sent downstream, 0 when none was.
    pub response_code: u16,
    /// Response flags.
    pub flags: ResponseFlags,
    /// `%RESPONSE_CODE_DETAILS%`.
    pub details: Option<Cow<'static, str>>,
    /// The route table and the route's index in it.
    pub route: Option<(Rc<dyn RouteView>, u32)>,
    /// The virtual cluster, an index in the route's table.
    pub virtual_cluster: Option<u32>,
    /// Points in time.
    pub timing: Timing,
    /// Byte counts of the downstream side.
    pub bytes: Bytes,
    /// The upstream side.
    pub upstream: UpstreamInfo,
    /// Dynamic metadata.
    pub metadata: Metadata,
    /// Filter state with the life of the stream; the connection has its own.
    pub filter_state: FilterState,
    /// The client's address as the trust rules see it (`use_remote_address`, XFF).
    pub remote_address: Address,
    /// Whether the request came from inside (`x-envoy-internal`).
    pub internal: bool,
    /// Whether this is a health check request, for the `not_health_check` log filter.
    pub health_check: bool,
    /// Whether it is traced, and why.
    pub traced: bool,
}

impl StreamInfo {
    /// A stream that begins now on `connection`.
    pub fn new(
        id: u64,
        start: Instant,
        start_time: SystemTime,
        connection: Rc<ConnectionInfo>,
        protocol: Option<Protocol>,
    ) -> Self {
        Self {
            start,
            start_time,
            remote_address: connection.remote_address.clone(),
            connection,
            protocol,
            id,
            response_code: 0,
            flags: ResponseFlags::default(),
            details: None,
            route: None,
            virtual_cluster: None,
            timing: Timing::default(),
            bytes: Bytes::default(),
            upstream: UpstreamInfo::default(),
            metadata: Metadata::default(),
            filter_state: FilterState::default(),
            internal: false,
            health_check: false,
            traced: false,
        }
    }

    /// Reads dynamic metadata: a TCP session's are its connection's.
    pub fn with_metadata<R>(&self, read: impl FnOnce(&Metadata) -> R) -> R {
        match self.protocol {
            Some(_) => read(&self.metadata),
            None => read(&self.connection.metadata.borrow()),
        }
    }
}
