//! Making one upstream connection: address, socket options, connect timeout, TLS.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{ConnectionInfo, TlsInfo};
use waystation_tls::{ClientContext, ClientOptions};
use waystation_upstream::ClusterStats;
use waystation_upstream::admission::Resource;
use waystation_upstream::cluster::{
    ClusterRef, ConnectionOptions, HappyEyeballs, SocketState, TransportFactory,
};
use waystation_upstream::host::{ActiveConnection, HealthFlag};
use waystation_upstream::{HostRef, Permit, Priority};

use super::happy_eyeballs;
use crate::address::set_option;
use crate::transport::{Socket, Transport};
use crate::upstream_socket::proxy_protocol::ProxyProtocol;
use crate::worker::Worker;

/// What a cluster's transport socket factory must make (`TransportFactory` downcasts to it).
#[derive(Debug)]
pub enum UpstreamSocket {
    /// `envoy.transport_sockets.raw_buffer`.
    Plain,
    /// `envoy.transport_sockets.tls`.
    Tls(Box<ClientContext>),
    /// `envoy.transport_sockets.upstream_proxy_protocol` around another.
    ProxyProtocol(Box<(ProxyProtocol, UpstreamSocket)>),
}

impl UpstreamSocket {
    /// Its TLS context, if it has one.
    pub fn tls(&self) -> Option<&ClientContext> {
        match self {
            Self::Plain => None,
            Self::Tls(context) => Some(context),
            Self::ProxyProtocol(around) => around.1.tls(),
        }
    }
}

/// Whether a connection may go past the bounds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum PastLimit {
    /// There are others to wait for.
    #[default]
    Never,
    /// When no worker has any to the host, which would be unreachable otherwise.
    First,
    /// This worker has none to the host.
    Always,
}

/// What a caller asks of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConnectOptions<'a> {
    /// Which circuit breakers count.
    pub priority: Priority,
    /// Whether to go past `max_connections`.
    pub past_limit: PastLimit,
    /// It is the turn of this one of all that wait for room.
    pub called: bool,
    /// The connection that it is made for, of which a PROXY header speaks.
    pub downstream: Option<&'a ConnectionInfo>,
    /// SNI and SAN of this connection, and the ALPN list.
    pub tls: ClientOptions<'a>,
}

/// Facts about a connection that was made.
#[derive(Clone, Debug)]
pub struct UpstreamConnInfo {
    /// Unique in this process.
    pub id: u64,
    /// Our address.
    pub local_address: Option<Address>,
    /// The host's address that answered.
    pub remote_address: Address,
    /// The TLS session.
    pub tls: Option<Arc<TlsInfo>>,
    /// The protocol agreed by ALPN.
    pub alpn: Option<Box<[u8]>>,
}

/// Which bound leaves no room for a connection: who waits for room waits in the line of that one, and holds up nobody who has
/// enough of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bound {
    /// The cluster's, of the priority.
    Cluster,
    /// The host's.
    Host,
}

/// Why a connection was not made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ConnectError {
    /// `max_connections` is reached.
    Overflow(Bound),
    /// `connect_timeout` passed.
    Timeout,
    /// It failed; the text is `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    Failed {
        /// Whether it failed before anything left this machine.
        local: bool,
        /// The reason.
        reason: Box<str>,
    },
}

/// Accounts for an open connection: gives back its permit and counts its end when dropped.
#[derive(Debug)]
pub struct ConnectionGuard {
    cluster: Rc<ClusterRef>,
    /// Both are given back before others hear of it.
    permit: Option<Permit>,
    active_connection: Option<ActiveConnection>,
    start: Instant,
    /// Bytes received and sent that are not in the statistics yet.
    received: u64,
    sent: u64,
    /// Whether the upstream closed it.
    pub remote: bool,
    /// Whether a request was under way when it ended.
    pub active: bool,
    /// Requests begun on it.
    pub requests: u32,
}

/// Connects to `host`. Every attempt ends in the cluster's `upstream_cx_*` statistics.
///
/// # Errors
/// When a breaker is open, or the connection cannot be made in `connect_timeout`.
pub async fn connect(
    worker: &Worker,
    cluster: &Rc<ClusterRef>,
    host: &Rc<HostRef>,
    options: ConnectOptions<'_>,
) -> Result<(Transport, UpstreamConnInfo, ConnectionGuard), ConnectError> {
    let stats = &cluster.stats;
    let (permit, active) = admit(cluster, host, options)?;
    let start = Instant::now();
    stats.upstream_cx_total().inc();
    stats.upstream_cx_active().inc();
    let mut guard = ConnectionGuard {
        cluster: Rc::clone(cluster),
        permit: Some(permit),
        active_connection: Some(active),
        start,
        received: 0,
        sent: 0,
        remote: false,
        active: false,
        requests: 0,
    };
    let deadline = tokio::time::sleep(cluster.connect_timeout);
    let connected = tokio::select! {
        biased;
        connected = establish(worker, cluster, host, options) => connected,
        () = deadline => Err(ConnectError::Timeout),
    };
    match connected {
        Ok((transport, info)) => {
            stats.upstream_cx_connect_ms().record(millis_since(start));
            Ok((transport, info, guard))
        }
        Err(error) => {
            guard.remote = true;
            stats.upstream_cx_connect_fail().inc();
            host.connect_failed();
            if error == ConnectError::Timeout {
                stats.upstream_cx_connect_timeout().inc();
            }
            Err(error)
        }
    }
}

/// A unit of `max_connections`, and one of the host's.
fn admit(
    cluster: &ClusterRef,
    host: &Rc<HostRef>,
    options: ConnectOptions<'_>,
) -> Result<(Permit, ActiveConnection), ConnectError> {
    let ConnectOptions { priority, past_limit, called, .. } = options;
    let admission = &cluster.admission;
    // Who comes now waits behind those who wait, unless it would not wait at all.
    let waits_for_none = called || past_limit == PastLimit::Always;
    let is_next = waits_for_none || !admission.are_connections_wanted(priority);
    let reserved = is_next.then(|| admission.reserve(priority, Resource::Connections)).flatten();
    let permit = match (reserved, past_limit) {
        (Some(permit), _) => permit,
        (None, PastLimit::Always) => {
            cluster.stats.upstream_cx_overflow().inc();
            admission.reserve_anyway(priority, Resource::Connections)
        }
        (None, PastLimit::First) => {
            if is_next && let Some(active) = host.try_begin_connection(1) {
                cluster.stats.upstream_cx_overflow().inc();
                return Ok((admission.reserve_anyway(priority, Resource::Connections), active));
            }
            return Err(overflow(cluster, called, Bound::Cluster));
        }
        (None, PastLimit::Never) => return Err(overflow(cluster, called, Bound::Cluster)),
    };
    let active = match admission.max_connections_per_host() {
        None => host.begin_connection(),
        Some(max) => {
            let is_next = waits_for_none || !host.are_connections_wanted();
            match (is_next.then(|| host.try_begin_connection(max)).flatten(), past_limit) {
                (Some(active), _) => active,
                (None, PastLimit::Always) => {
                    cluster.stats.upstream_cx_overflow().inc();
                    host.begin_connection()
                }
                (None, _) => {
                    // Somebody may have looked in vain while this had the unit.
                    drop(permit);
                    admission.connection_ended();
                    return Err(overflow(cluster, called, Bound::Host));
                }
            }
        }
    };
    Ok((permit, active))
}

/// Counted once, however often somebody looks again who waits.
fn overflow(cluster: &ClusterRef, called: bool, bound: Bound) -> ConnectError {
    if !called {
        cluster.stats.upstream_cx_overflow().inc();
    }
    ConnectError::Overflow(bound)
}

impl ConnectionGuard {
    /// Counts bytes received.
    #[inline]
    pub fn received(&mut self, count: usize) {
        self.received += count as u64;
    }

    /// Counts bytes sent.
    #[inline]
    pub fn sent(&mut self, count: u64) {
        self.sent += count;
    }

    /// Bytes received and sent since they were last brought into the statistics.
    pub fn bytes(&self) -> (u64, u64) {
        (self.received, self.sent)
    }

    /// Brings the byte counts into the statistics: once per request, not per system call.
    #[inline]
    pub fn flush(&mut self) {
        if self.received > 0 {
            self.cluster.stats.upstream_cx_rx_bytes_total().add(std::mem::take(&mut self.received));
        }
        if self.sent > 0 {
            self.cluster.stats.upstream_cx_tx_bytes_total().add(std::mem::take(&mut self.sent));
        }
    }

    /// Whether somebody waits for the room that it takes.
    pub fn is_room_wanted(&self) -> bool {
        let of_cluster = |permit: &Permit| self.cluster.admission.are_connections_wanted(permit.priority());
        let of_host = |active: &ActiveConnection| active.host().are_connections_wanted();
        self.permit.as_ref().is_some_and(of_cluster) || self.active_connection.as_ref().is_some_and(of_host)
    }

    /// The cluster as it was when the connection was made.
    pub fn cluster(&self) -> &Rc<ClusterRef> {
        &self.cluster
    }

    /// Returns when the host fails its health checks or is ejected, where the cluster says that connections end with that
    /// (`close_connections_on_host_health_failure`).
    pub fn host_fails(&self) -> impl Future<Output = ()> + use<> {
        let host = self.active_connection.as_ref().map(|active| Rc::clone(active.host()));
        let watch = self.cluster.health_watch.as_ref().map(|watch| watch.subscribe());
        async move {
            let (Some(mut watch), Some(host)) = (watch, host) else { return std::future::pending().await };
            let is_failed =
                || host.has_flag(HealthFlag::FailedActiveHc) || host.has_flag(HealthFlag::FailedOutlierCheck);
            // A connection to a host that has failed already is one of panic, and stays.
            let mut was_failed = is_failed();
            while was_failed || !is_failed() {
                if watch.changed().await.is_err() {
                    return std::future::pending().await;
                }
                was_failed &= is_failed();
            }
        }
    }

    /// When the connection was begun.
    pub fn start(&self) -> Instant {
        self.start
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.flush();
        let host = self.active_connection.as_ref().map(|active| Rc::clone(active.host()));
        drop((self.permit.take(), self.active_connection.take()));
        self.cluster.admission.connection_ended();
        if let Some(host) = host {
            host.connection_ended();
        }
        let stats = &self.cluster.stats;
        stats.upstream_cx_active().dec();
        stats.upstream_cx_destroy().inc();
        stats.upstream_cx_length_ms().record(millis_since(self.start));
        if self.requests > 0 {
            stats.upstream_rq_per_cx().record(self.requests.into());
        }
        if self.remote {
            stats.upstream_cx_destroy_remote().inc();
        } else {
            stats.upstream_cx_destroy_local().inc();
        }
        if self.active {
            stats.upstream_cx_destroy_with_active_rq().inc();
            if self.remote {
                stats.upstream_cx_destroy_remote_with_active_rq().inc();
            } else {
                stats.upstream_cx_destroy_local_with_active_rq().inc();
            }
        }
    }
}

async fn establish(
    worker: &Worker,
    cluster: &ClusterRef,
    host: &HostRef,
    options: ConnectOptions<'_>,
) -> Result<(Transport, UpstreamConnInfo), ConnectError> {
    let connection = cluster.connection.as_deref();
    let ((socket, local_address), address) = match host.additional_addresses() {
        [] => (open(host.address(), connection, &cluster.stats).await?, host.address()),
        more => {
            let all: Vec<&Address> = std::iter::once(host.address()).chain(more).collect();
            let order = connection.map_or_else(HappyEyeballs::default, |options| options.happy_eyeballs);
            let attempts = order.sort(&all).into_iter().enumerate().map(|(index, address)| async move {
                // Envoy counts every attempt as a connection, but only one of them as failed or ended.
                if index > 0 {
                    cluster.stats.upstream_cx_total().inc();
                }
                open(address, connection, &cluster.stats).await.map(|opened| (opened, address))
            });
            let none = ConnectError::Failed { local: true, reason: "no address".into() };
            happy_eyeballs::first(attempts, happy_eyeballs::attempt_delay, none).await?
        }
    };
    let info = UpstreamConnInfo {
        id: worker.connection_id(),
        local_address,
        remote_address: address.clone(),
        tls: None,
        alpn: None,
    };
    secure(socket, info, (host.transport(), host.hostname()), options).await
}

/// Opens a socket. A source address that cannot be taken is counted.
pub(crate) async fn open(
    address: &Address,
    options: Option<&ConnectionOptions>,
    stats: &ClusterStats,
) -> Result<(Socket, Option<Address>), ConnectError> {
    match address {
        Address::Ip(address) => {
            let stream = tcp(*address, options).await.map_err(|error| match error {
                Unopened::Bind(source, error) => {
                    stats.bind_errors().inc();
                    failed(&format!("failed to bind to {source}"), &error)
                }
                Unopened::Other(error) => failed("delayed connect error", &error),
            })?;
            let local = stream.local_addr().ok().map(Address::Ip);
            Ok((Socket::tcp(stream), local))
        }
        Address::Pipe(path) => {
            let stream = match path.strip_prefix('@') {
                Some(name) => abstract_socket(name),
                None => UnixStream::connect(&**path).await,
            };
            let stream = stream.map_err(|error| failed("immediate connect error", &error))?;
            Ok((Socket::unix(stream), None))
        }
        Address::Internal { .. } => Err(ConnectError::Failed {
            local: true,
            reason: "internal listeners are not reachable from this cluster".into(),
        }),
    }
}

fn abstract_socket(name: &str) -> io::Result<UnixStream> {
    use std::os::linux::net::SocketAddrExt as _;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Why there is no TCP connection.
enum Unopened {
    /// The source address cannot be taken.
    Bind(SocketAddr, io::Error),
    Other(io::Error),
}

impl From<io::Error> for Unopened {
    fn from(error: io::Error) -> Self {
        Self::Other(error)
    }
}

async fn tcp(address: SocketAddr, options: Option<&ConnectionOptions>) -> Result<TcpStream, Unopened> {
    let Some(options) = options else { return Ok(TcpStream::connect(address).await?) };
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    let view = socket2::SockRef::from(&socket);
    if let Some(keepalive) = &options.keepalive {
        let mut wanted = socket2::TcpKeepalive::new();
        if let Some(time) = keepalive.time {
            wanted = wanted.with_time(time);
        }
        if let Some(interval) = keepalive.interval {
            wanted = wanted.with_interval(interval);
        }
        if let Some(probes) = keepalive.probes {
            wanted = wanted.with_retries(probes);
        }
        view.set_tcp_keepalive(&wanted)?;
    }
    if let Some(bind) = &options.bind {
        for option in bind.options.iter().filter(|option| option.state == SocketState::Prebind) {
            set_option(&socket, option.level, option.name, &option.value)?;
        }
        if bind.freebind {
            view.set_freebind_v4(true)?;
        }
        if let Some(source) = bind.source_for(address.ip()) {
            socket.bind(source).map_err(|error| Unopened::Bind(source, error))?;
        }
        for option in bind.options.iter().filter(|option| option.state == SocketState::Bound) {
            set_option(&socket, option.level, option.name, &option.value)?;
        }
    }
    Ok(socket.connect(address).await?)
}

/// Does what the transport socket of the host does on a new connection, where the host's name may be asked for.
pub(crate) async fn secure(
    mut socket: Socket,
    mut info: UpstreamConnInfo,
    (transport, hostname): (&TransportFactory, &str),
    options: ConnectOptions<'_>,
) -> Result<(Transport, UpstreamConnInfo), ConnectError> {
    let mut transport = transport.downcast_ref::<UpstreamSocket>();
    while let Some(UpstreamSocket::ProxyProtocol(outer)) = transport {
        let (proxy_protocol, inner) = &**outer;
        let ends = (info.local_address.as_ref(), &info.remote_address);
        let header = proxy_protocol.header(options.downstream, ends);
        socket.write_all(&header).await.map_err(|error| failed("delayed connect error", &error))?;
        transport = Some(inner);
    }
    let Some(UpstreamSocket::Tls(tls)) = transport else { return Ok((Transport::Plain(socket), info)) };
    let mut wanted = options.tls;
    if wanted.server_name.is_none() && tls.auto_host_sni() {
        wanted.server_name = Some(hostname).filter(|name| !name.is_empty());
    }
    let Some((config, name)) = tls.connect(wanted) else {
        return Err(ConnectError::Failed {
            local: true,
            reason: "TLS error: Secret is not supplied by SDS".into(),
        });
    };
    let connector = tokio_rustls::TlsConnector::from(config);
    let stream = connector.connect(name, socket).await.map_err(|error| ConnectError::Failed {
        local: false,
        reason: tls.handshake_failed(&error).into(),
    })?;
    let session = stream.get_ref().1;
    info.alpn = session.alpn_protocol().map(Into::into);
    info.tls = Some(Arc::new(tls.handshake_done(session)));
    Ok((Transport::TlsClient(Box::new(stream)), info))
}

/// Envoy's text: what was done, and the system's message without its number.
fn failed(what: &str, error: &io::Error) -> ConnectError {
    let text = error.to_string();
    let message = text.split(" (os error").next().unwrap_or_default();
    let local = matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable);
    ConnectError::Failed { local, reason: format!("{what}: {message}").into() }
}

fn millis_since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}
