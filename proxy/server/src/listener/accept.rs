//! Accepting on one worker: from the socket to the filter chain.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::rustls::server::Acceptor;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::Held;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::filter_state::FilterState;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::network::{Close, CloseKind};
use waystation_filter_api::stream::StreamInfo;
use waystation_format::{AccessLogType, FormatContext};
use waystation_listener_filters::Verdict;

use super::active::{Active, ActiveSet, ChainState};
use super::config::{FilterChain, Listener, NetworkFilter};
use super::load::Place;
use super::sockets::Sockets;
use crate::address;
use crate::http::timer::Timer;
use crate::manager::listeners::Order;
use crate::network::filters::{Filtered, Filters};
use crate::transport::{Socket, Transport};
use crate::worker::Worker;
use crate::{http, network, overload, tcp_proxy};

/// The most a listener filter may have read before it must decide: the longest PROXY header, which must not pass unread,
/// and about Envoy's bound on a ClientHello.
const INSPECT_LIMIT: usize = 16 + 65_535;

/// How long to wait when there are no file descriptors for an `accept`.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// An accepted connection that another worker is to serve (`exact_balance`).
#[derive(Debug)]
pub struct Handover {
    listener: u64,
    stream: std::net::TcpStream,
    /// What has been read of it.
    prefix: Bytes,
    info: Box<ConnectionInfo<()>>,
    admitted: Admitted,
    is_redirected: bool,
}

/// What a connection is on the way to its filter chain.
#[derive(Debug)]
struct Incoming {
    socket: Socket,
    info: Box<ConnectionInfo>,
    admitted: Admitted,
    /// It belongs to this listener by the address that it was meant for.
    is_redirected: bool,
}

/// What a connection holds of the limits, as long as it is open.
#[derive(Debug)]
struct Admitted {
    _connection: overload::Connection,
    place: Place,
}

/// The listeners of one worker.
#[derive(Debug)]
pub struct Listeners {
    worker: Rc<Worker>,
    handovers: Arc<[Sender<Handover>]>,
    active: Rc<RefCell<ActiveSet>>,
}

impl Listeners {
    /// None yet. `handovers` are the queues to all workers, by index.
    pub fn new(worker: Rc<Worker>, handovers: Arc<[Sender<Handover>]>) -> Self {
        Self { worker, handovers, active: Rc::default() }
    }

    /// Does as the main thread orders until it hangs up.
    pub async fn run(self, mut orders: Receiver<Order>, mut handed: Receiver<Handover>) {
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => return,
                },
                Some(handover) = handed.recv() => self.take_over(handover),
            }
        }
    }

    fn obey(&self, order: Order) {
        match order {
            Order::Start { id, listener, sockets } => {
                let active = Rc::new(Active::new(id, listener, &self.worker.shared));
                self.active.borrow_mut().insert(&active);
                for index in 0..sockets.len() {
                    let (listeners, active) = (self.handle(), Rc::clone(&active));
                    let sockets = Arc::clone(&sockets);
                    tokio::task::spawn_local(async move {
                        if let Err(error) = listeners.accept_on(sockets, index, &active).await {
                            let name = &active.listener().name;
                            tracing::error!(target: "conn_handler", "listener '{name}' cannot accept: {error}");
                        }
                    });
                }
            }
            Order::Update { id, listener, over } => {
                if let Some(active) = self.find(id) {
                    active.update(listener, over, &self.worker.shared);
                }
            }
            Order::Drain { id, stop, over } => {
                if let Some(active) = self.find(id) {
                    if stop {
                        active.stop();
                    }
                    active.drain(over);
                }
            }
            Order::CloseChains { id, chains } => {
                if let Some(active) = self.find(id) {
                    active.close_chains(&chains);
                }
            }
            Order::Remove { id } => {
                if let Some(active) = self.active.borrow_mut().remove(id) {
                    active.close();
                }
            }
        }
    }

    fn handle(&self) -> Self {
        Self {
            worker: Rc::clone(&self.worker),
            handovers: Arc::clone(&self.handovers),
            active: Rc::clone(&self.active),
        }
    }

    fn find(&self, id: u64) -> Option<Rc<Active>> {
        self.active.borrow().get(id).cloned()
    }

    /// Accepts on the socket of one address. The main thread sees by `sockets` when no worker holds them any more, so the
    /// duplicate that is used here goes first.
    async fn accept_on(&self, sockets: Arc<Sockets>, index: usize, active: &Rc<Active>) -> io::Result<()> {
        let (address, socket) = sockets.of_worker(index, self.worker.index)?;
        let mut gate = Gate(self.worker.shared.overload.get().and_then(|overload| overload.changes()));
        if socket.local_addr()?.as_socket().is_some() {
            let listener = TcpListener::from_std(socket.into())?;
            while gate.until_open(active).await {
                let accepted = tokio::select! {
                    biased;
                    () = active.stopped.until_raised() => return Ok(()),
                    () = gate.until(active, true) => continue,
                    accepted = listener.accept() => accepted,
                };
                match accepted {
                    Ok((stream, peer)) => self.accepted(active, stream, peer),
                    Err(error) => accept_failed(&error).await,
                }
            }
            return Ok(());
        }
        let listener = UnixListener::from_std(socket.into())?;
        while gate.until_open(active).await {
            let accepted = tokio::select! {
                biased;
                () = active.stopped.until_raised() => return Ok(()),
                () = gate.until(active, true) => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    // A client has no name of its own: Envoy gives it that of the socket.
                    let (local, remote) = (address.clone(), address.clone());
                    if let Some(admitted) = self.admit(&active.listener(), self.worker.index as usize) {
                        let (socket, info) = (Socket::unix(stream), self.info(local, remote));
                        self.spawn(active, Incoming { socket, info, admitted, is_redirected: false });
                    }
                }
                Err(error) => accept_failed(&error).await,
            }
        }
        Ok(())
    }

    fn accepted(&self, active: &Rc<Active>, stream: TcpStream, peer: SocketAddr) {
        let listener = active.listener();
        if let Some(keepalive) = &listener.tcp_keepalive {
            // Fails only on a socket that is already dead.
            let _ = SockRef::from(&stream).set_tcp_keepalive(keepalive);
        }
        let own = self.worker.index as usize;
        let chosen = if listener.exact_balance { listener.load.least(own) } else { own };
        let Some(admitted) = self.admit(&listener, chosen) else { return };
        let Ok(local) = stream.local_addr() else {
            // The peer is gone already.
            return;
        };
        // What an IPv4 client reached through an IPv6 socket (`ipv4_compat`) are IPv4 addresses, both of them.
        let info = self.info(Address::Ip(unmapped(local)), Address::Ip(unmapped(peer)));
        let socket = Socket::tcp(stream);
        let incoming = Incoming { socket, info, admitted, is_redirected: false };
        if chosen == own {
            return self.spawn(active, incoming);
        }
        self.hand_over(active, &listener, incoming);
    }

    /// Gives a connection to the worker that it counts for.
    fn hand_over(&self, active: &Active, listener: &Listener, incoming: Incoming) {
        let Incoming { socket, info, admitted, is_redirected } = incoming;
        let chosen = admitted.place.worker;
        // Only TCP is balanced; and it fails only on a socket that is already dead.
        let Some(Ok((stream, prefix))) = socket.into_std() else { return };
        let info = Box::new(info.with_filter_state(()));
        let handover = Handover { listener: active.id, stream, prefix, info, admitted, is_redirected };
        // A worker that is so far behind takes no more: the connection is dropped, and counted.
        if self.handovers[chosen].try_send(handover).is_err() {
            listener.stats.downstream_cx_overflow().inc();
        }
    }

    fn take_over(&self, handover: Handover) {
        let Handover { listener, stream, prefix, info, admitted, is_redirected } = handover;
        // It has gone since.
        let Some(active) = self.find(listener) else { return };
        match TcpStream::from_std(stream) {
            Ok(stream) => {
                let socket = Socket::tcp(stream).with_prefix(prefix);
                let info = Box::new(info.with_filter_state(FilterState::default()));
                self.spawn(&active, Incoming { socket, info, admitted, is_redirected });
            }
            Err(error) => tracing::warn!(target: "conn_handler", "cannot take a connection over: {error}"),
        }
    }

    /// Asks the limits of the process and of the listener for a connection that `worker` is to serve.
    fn admit(&self, listener: &Listener, worker: usize) -> Option<Admitted> {
        let Some(connection) = self.worker.shared.downstream.admit(listener.admission) else {
            listener.stats.downstream_global_cx_overflow().inc();
            return None;
        };
        if listener.overload.as_ref().is_some_and(|o| o.rejects_connection(|| self.worker.random())) {
            listener.stats.downstream_cx_overload_reject().inc();
            return None;
        }
        if listener.load.total() >= listener.connection_limit.get() {
            listener.stats.downstream_cx_overflow().inc();
            return None;
        }
        Some(Admitted { _connection: connection, place: Place::take(&listener.load, worker) })
    }

    fn info(&self, local: Address, remote: Address) -> Box<ConnectionInfo> {
        // Boxed: each step of the way would keep room for it in the task, which stays as large while the connection is idle.
        Box::new(ConnectionInfo::new(self.worker.connection_id(), Instant::now(), local, remote))
    }

    fn spawn(&self, active: &Rc<Active>, incoming: Incoming) {
        let (listeners, active) = (self.handle(), Rc::clone(active));
        tokio::task::spawn_local(async move { listeners.serve(active, incoming).await });
    }

    /// Listener filters, filter chain, network filter. What ends a connection is the end of the listener that it has got
    /// to, and from the filter chain on that of the chain.
    async fn serve(&self, mut active: Rc<Active>, incoming: Incoming) {
        let Incoming { mut socket, mut info, mut admitted, mut is_redirected } = incoming;
        let own = self.worker.index as usize;
        let listener = loop {
            let listener = active.listener();
            info.listener = Arc::clone(&listener.name);
            let inspected = tokio::select! {
                inspected = self.inspect(&listener, socket, &mut info) => inspected,
                () = active.closed.until_raised() => return,
            };
            let Some(inspected) = inspected else { return };
            socket = inspected;
            // A connection that was meant for another address belongs to the listener of that address, if there is one,
            // with its listener filters and its balance.
            let may_redirect = listener.use_original_dst && info.local_address_restored && !is_redirected;
            let other = may_redirect.then(|| self.listener_of(&info.local_address)).flatten();
            match other.filter(|other| !Rc::ptr_eq(other, &active)) {
                Some(other) => active = other,
                None => break listener,
            }
            is_redirected = true;
            let target = active.listener();
            // Filter state belongs to this thread.
            let may_move = socket.as_tcp().is_some() && info.filter_state.borrow().is_empty();
            let is_balanced = target.exact_balance && may_move;
            let chosen = if is_balanced { target.load.least(own) } else { own };
            admitted.place = Place::take(&target.load, chosen);
            if chosen != own {
                return self.hand_over(&active, &target, Incoming { socket, info, admitted, is_redirected });
            }
        };
        let Some(state) = active.chain_of(&info) else {
            listener.stats.no_filter_chain_match().inc();
            self.log_unserved(&listener, *info, Some(ResponseFlag::NoRouteFound), "filter_chain_not_found");
            return;
        };
        drop(active);
        let _served = Served::new(&listener, self.worker.index as usize, info.start);
        tokio::select! {
            () = self.serve_chain(&listener, &state, socket, info) => {}
            () = state.closed.until_raised() => {}
        }
        drop(admitted);
    }

    /// Handshake and network filter.
    async fn serve_chain(
        &self,
        listener: &Listener,
        state: &ChainState,
        socket: Socket,
        mut info: Box<ConnectionInfo>,
    ) {
        let ChainState { chain, drain, .. } = state;
        info.filter_chain = Arc::clone(&chain.name);
        let mut opening = Opening { filters: chain.before.start(&self.worker), info: Some(info) };
        if let Opening { filters: Some(filters), info: Some(info) } = &mut opening
            && let Err(close) = filters.new_connection(info, &socket).await
        {
            self.not_begun(chain, close, &socket, opening);
            return;
        }
        let Some(info) = &mut opening.info else { return };
        let transport = match &chain.tls {
            None => Transport::Plain(socket),
            Some(context) => match Box::pin(self.handshake(listener, chain, context, socket, info)).await {
                Ok(transport) => transport,
                Err(reason) => {
                    *info.transport_failure_reason.borrow_mut() = Some(reason.into());
                    if let (_, Some(info)) = opening.close() {
                        self.log_unserved(listener, *info, None, "");
                    }
                    return;
                }
            },
        };
        let worker = Rc::clone(&self.worker);
        let (filters, Some(info)) = opening.take() else { return };
        let info: Rc<ConnectionInfo> = Rc::from(info);
        let transport = match filters {
            None => transport,
            Some(filters) => {
                Transport::Filtered(Box::new(Filtered::new(transport, filters, Rc::clone(&info))))
            }
        };
        match &chain.filters {
            NetworkFilter::Http(manager) => {
                let manager = Held::new(Arc::clone(manager));
                http::serve_connection(worker, manager, transport, info, drain.clone()).await;
            }
            // Established TCP sessions outlive a drain: its end ends them.
            NetworkFilter::Tcp(proxy) => Box::pin(tcp_proxy::serve(worker, proxy, transport, info)).await,
            NetworkFilter::Echo => network::echo(transport).await,
            NetworkFilter::DirectResponse(body) => network::direct_response(transport, body).await,
            NetworkFilter::None => {}
        }
    }

    /// A connection that ends before its terminal filter begins, which has it in its figures nevertheless.
    fn not_begun(&self, chain: &FilterChain, close: Option<Close>, socket: &Socket, opening: Opening) {
        if let Some(Close { kind, reason }) = close {
            tracing::debug!(target: "connection", "network filter closes a connection: {reason}");
            if kind == CloseKind::Reset {
                socket.reset_on_close();
            }
        }
        let (_, Some(info)) = opening.close() else { return };
        match &chain.filters {
            NetworkFilter::Http(manager) => {
                let manager = Held::new(Arc::clone(manager));
                http::count_connection(&self.worker, manager, Rc::from(info));
            }
            NetworkFilter::Tcp(proxy) => tcp_proxy::count_connection(&self.worker, proxy, Rc::from(info)),
            NetworkFilter::Echo | NetworkFilter::DirectResponse(_) | NetworkFilter::None => {}
        }
    }

    async fn inspect(
        &self,
        listener: &Listener,
        mut socket: Socket,
        info: &mut ConnectionInfo,
    ) -> Option<Socket> {
        if listener.listener_filters.is_empty() {
            return Some(socket);
        }
        let original = socket.as_tcp().and_then(address::original_destination);
        listener.stats.downstream_pre_cx_active().inc();
        let _pre = Decrement(|| listener.stats.downstream_pre_cx_active().dec());
        let mut buffer = BytesMut::new();
        let filters = inspect_all(listener, &mut socket, &mut buffer, original, info);
        let outcome = match listener.listener_filters_timeout {
            None => filters.await,
            Some(limit) => match timeout(limit, filters).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    listener.stats.downstream_pre_cx_timeout().inc();
                    if listener.continue_on_timeout { Ok(()) } else { Err(None) }
                }
            },
        };
        match outcome {
            Ok(()) => Some(socket.with_prefix(buffer.freeze())),
            Err(reason) => {
                if let Some(reason) = reason {
                    tracing::debug!(target: "conn_handler", "listener filter closes a connection: {reason}");
                }
                None
            }
        }
    }

    async fn handshake(
        &self,
        listener: &Listener,
        chain: &FilterChain,
        context: &waystation_tls::ServerContext,
        socket: Socket,
        info: &mut ConnectionInfo,
    ) -> Result<Transport, String> {
        let Some(config) = context.config() else {
            return Err("TLS error: Secret is not supplied by SDS".to_owned());
        };
        let hello = tokio_rustls::LazyConfigAcceptor::new(Acceptor::default(), socket);
        let handshake = async {
            let hello = hello.await?;
            // What the client offers decides on ALPN, as in Envoy.
            let config = context.config_for(&hello.client_hello()).unwrap_or(config);
            hello.into_stream(config).await
        };
        let result = match chain.connect_timeout {
            None => handshake.await,
            Some(limit) => match self.in_time(listener, limit, handshake).await {
                Some(result) => result,
                None => {
                    listener.stats.downstream_cx_transport_socket_connect_timeout().inc();
                    return Err("transport socket timeout".to_owned());
                }
            },
        };
        let stream = result.map_err(|error| context.handshake_failed(&error))?;
        let connection = stream.get_ref().1;
        info.negotiated_protocol = connection.alpn_protocol().map(Into::into);
        info.tls = Some(Arc::new(context.handshake_done(connection)));
        Ok(Transport::TlsServer(Box::new(stream)))
    }

    /// Waits no longer than `limit` is at the present pressure (`TRANSPORT_SOCKET_CONNECT`).
    async fn in_time<T>(
        &self,
        listener: &Listener,
        limit: Duration,
        what: impl Future<Output = T>,
    ) -> Option<T> {
        let scale =
            listener.overload.as_ref().map(|overload| &overload.reduce_timeouts.transport_socket_connect);
        let Some(scale) = scale.filter(|scale| !scale.is_none()) else {
            return timeout(limit, what).await.ok();
        };
        let mut what = pin!(what);
        let (start, mut timer, mut wait) = (Instant::now(), Timer::default(), None);
        std::future::poll_fn(|task| {
            wait.get_or_insert_with(|| self.worker.overload_waits.enter(task.waker()));
            match what.as_mut().poll(task) {
                Poll::Ready(done) => Poll::Ready(Some(done)),
                Poll::Pending => timer.poll(task, Some(start + scale.of(limit))).map(|()| None),
            }
        })
        .await
    }

    fn listener_of(&self, address: &Address) -> Option<Rc<Active>> {
        self.active.borrow().at(address.ip()?).cloned()
    }

    /// A connection that no network filter saw goes to the listener's own access logs.
    fn log_unserved(
        &self,
        listener: &Listener,
        info: ConnectionInfo,
        flag: Option<ResponseFlag>,
        details: &'static str,
    ) {
        if listener.access_log.is_empty() {
            return;
        }
        let start = info.start;
        let now = Instant::now();
        let start_time = SystemTime::now() - now.saturating_duration_since(start);
        let mut stream = StreamInfo::new(info.id, start, start_time, Rc::new(info), None);
        if let Some(flag) = flag {
            stream.flags.set(flag);
        }
        if !details.is_empty() {
            stream.details = Some(details.into());
        }
        stream.timing.complete = Some(now);
        let cx = FormatContext {
            request: None,
            response: None,
            trailers: None,
            info: &stream,
            local_reply_body: "",
            log_type: AccessLogType::NotSet,
            now,
        };
        for log in &listener.access_log {
            log.log(&cx, fastrand::u64(..));
        }
    }
}

/// Where `stop_accepting_connections` has new connections wait, in the kernel's queue.
struct Gate(Option<watch::Receiver<()>>);

impl Gate {
    /// Waits until it is closed, or open. Without an overload manager it never closes.
    async fn until(&mut self, active: &Active, closed: bool) {
        let Self(Some(changes)) = self else { return std::future::pending().await };
        while active.listener().stops_accepting() != closed {
            if changes.changed().await.is_err() {
                // Nothing changes any more: the process ends.
                return std::future::pending().await;
            }
        }
    }

    /// `false` when the listener stops for good before that.
    async fn until_open(&mut self, active: &Active) -> bool {
        if self.0.is_none() {
            return true;
        }
        tokio::select! {
            biased;
            () = active.stopped.until_raised() => false,
            () = self.until(active, false) => true,
        }
    }
}

/// Asks each filter in turn, reading as long as one needs more. `Err` closes the connection.
async fn inspect_all(
    listener: &Listener,
    socket: &mut Socket,
    buffer: &mut BytesMut,
    original: Option<SocketAddr>,
    info: &mut ConnectionInfo,
) -> Result<(), Option<&'static str>> {
    let mut end = false;
    for filter in &listener.listener_filters {
        loop {
            // A filter that needs no bytes must not wait for them: the client may expect the server to speak first.
            if !filter.wants_bytes() || !buffer.is_empty() || end {
                match filter.inspect(buffer, end, original, Instant::now(), info) {
                    Verdict::Done { consumed } => {
                        let _ = buffer.split_to(consumed);
                        break;
                    }
                    Verdict::Reject(reason) => {
                        listener.stats.downstream_listener_filter_error().inc();
                        return Err(Some(reason));
                    }
                    Verdict::Close => return Err(None),
                    Verdict::NeedMore if end || buffer.len() >= INSPECT_LIMIT => break,
                    Verdict::NeedMore => {}
                }
            }
            match socket.read_buf(buffer).await {
                Ok(0) if buffer.is_empty() => {
                    listener.stats.downstream_listener_filter_remote_close().inc();
                    return Err(None);
                }
                Ok(0) => end = true,
                Ok(_) => {}
                Err(_) => {
                    listener.stats.downstream_listener_filter_remote_close().inc();
                    return Err(None);
                }
            }
        }
    }
    Ok(())
}

/// A connection that a listener serves: counted as closed when it ends, however that happens.
#[derive(Debug)]
struct Served {
    listener: Arc<Listener>,
    index: usize,
    start: Instant,
}

impl Served {
    fn new(listener: &Arc<Listener>, index: usize, start: Instant) -> Self {
        listener.stats.downstream_cx_total().inc();
        listener.stats.downstream_cx_active().inc();
        if let Some(worker) = listener.worker_stats.get(index) {
            worker.downstream_cx_total().inc();
            worker.downstream_cx_active().inc();
        }
        Self { listener: Arc::clone(listener), index, start }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let stats = &self.listener.stats;
        stats.downstream_cx_active().dec();
        stats.downstream_cx_destroy().inc();
        let length = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        stats.downstream_cx_length_ms().record(length);
        if let Some(worker) = self.listener.worker_stats.get(self.index) {
            worker.downstream_cx_active().dec();
        }
    }
}

/// A connection on the way to its terminal filter: its network filters hear when it goes no further.
#[derive(Debug)]
struct Opening {
    filters: Option<Box<Filters>>,
    info: Option<Box<ConnectionInfo>>,
}

impl Opening {
    /// It goes on.
    fn take(&mut self) -> (Option<Box<Filters>>, Option<Box<ConnectionInfo>>) {
        (self.filters.take(), self.info.take())
    }

    /// It is over.
    fn close(mut self) -> (Option<Box<Filters>>, Option<Box<ConnectionInfo>>) {
        self.tell();
        self.take()
    }

    fn tell(&mut self) {
        if let Self { filters: Some(filters), info: Some(info) } = self {
            filters.close(info);
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.tell();
    }
}

struct Decrement<F: Fn()>(F);

impl<F: Fn()> Drop for Decrement<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

async fn accept_failed(error: &io::Error) {
    match error.kind() {
        // The peer gave up between the handshake and `accept`: nothing to wait for.
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted => {}
        _ => {
            tracing::warn!(target: "conn_handler", "cannot accept: {error}");
            tokio::time::sleep(ACCEPT_BACKOFF).await;
        }
    }
}

/// An IPv4 peer of a dual-stack socket, without the IPv6 wrapping.
fn unmapped(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}
