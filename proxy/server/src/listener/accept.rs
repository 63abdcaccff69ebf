//! Accepting on one worker: from the socket to the filter chain.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use socket2::{SockRef, Socket as RawSocket};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::time::timeout;
use tokio_rustls::rustls::server::Acceptor;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::Held;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::stream::StreamInfo;
use waystation_format::{AccessLogType, FormatContext};
use waystation_listener_filters::Verdict;

use super::chain_match::Facts;
use super::config::{FilterChain, Listener, NetworkFilter};
use crate::address;
use crate::context::Shared;
use crate::drain::DrainHandle;
use crate::manager::listeners::Order;
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
    peer: SocketAddr,
    turn: Turn,
}

/// The listeners of one worker.
#[derive(Debug)]
pub struct Listeners {
    worker: Rc<Worker>,
    handovers: Arc<[Sender<Handover>]>,
    active: Rc<RefCell<HashMap<u64, Rc<Active>>>>,
}

/// One listener on one worker.
#[derive(Debug)]
struct Active {
    id: u64,
    listener: RefCell<Arc<Listener>>,
    drain: DrainHandle,
    /// One drain state for each chain, so that an update drains only those that are gone.
    chains: RefCell<Vec<ChainState>>,
    stopped: Notify,
    is_stopped: Cell<bool>,
    closed: Notify,
    is_closed: Cell<bool>,
}

/// What a worker keeps for each filter chain.
#[derive(Clone, Debug)]
struct ChainState {
    chain: Arc<FilterChain>,
    drain: DrainHandle,
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
                let drain = |listener: &Listener| drain_handle(listener, &self.worker.shared);
                let chains =
                    listener.all_chains().map(|chain| ChainState::new(chain, drain(&listener))).collect();
                let active = Rc::new(Active {
                    id,
                    listener: RefCell::new(Arc::clone(&listener)),
                    drain: drain(&listener),
                    chains: RefCell::new(chains),
                    stopped: Notify::new(),
                    is_stopped: Cell::new(false),
                    closed: Notify::new(),
                    is_closed: Cell::new(false),
                });
                self.active.borrow_mut().insert(id, Rc::clone(&active));
                let sockets = match sockets.for_worker(self.worker.index) {
                    Ok(sockets) => sockets,
                    Err(error) => {
                        tracing::error!(
                            target: "conn_handler",
                            "listener '{}' cannot use its sockets: {error}", listener.name
                        );
                        return;
                    }
                };
                for socket in sockets {
                    let (listeners, active) = (self.handle(), Rc::clone(&active));
                    tokio::task::spawn_local(async move {
                        if let Err(error) = listeners.accept_on(socket, &active).await {
                            tracing::error!(target: "conn_handler", "a listener ended: {error}");
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
                    active.drain_all(over);
                }
            }
            Order::Remove { id } => {
                if let Some(active) = self.active.borrow_mut().remove(&id) {
                    active.stop();
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
        self.active.borrow().get(&id).cloned()
    }

    async fn accept_on(&self, socket: RawSocket, active: &Rc<Active>) -> io::Result<()> {
        if socket.local_addr()?.as_socket().is_some() {
            let listener = TcpListener::from_std(socket.into())?;
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = active.until_stopped() => return Ok(()),
                };
                match accepted {
                    Ok((stream, peer)) => self.accepted(active, stream, peer),
                    Err(error) => accept_failed(&error).await,
                }
            }
        }
        let path = match &active.listener.borrow().addresses[0].address {
            Address::Pipe(path) => Arc::clone(path),
            other => other.to_string().into(),
        };
        let listener = UnixListener::from_std(socket.into())?;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = active.until_stopped() => return Ok(()),
            };
            match accepted {
                Ok((stream, _)) => {
                    let local = Address::Pipe(Arc::clone(&path));
                    let remote = Address::Pipe(Arc::from(""));
                    self.spawn(active, Socket::unix(stream), local, remote, None);
                }
                Err(error) => accept_failed(&error).await,
            }
        }
    }

    fn accepted(&self, active: &Rc<Active>, stream: TcpStream, peer: SocketAddr) {
        let listener = Arc::clone(&active.listener.borrow());
        if let Some(keepalive) = &listener.tcp_keepalive {
            // Fails only on a socket that is already dead.
            let _ = SockRef::from(&stream).set_tcp_keepalive(keepalive);
        }
        let turn = listener.exact_balance.then(|| Turn::take(&listener, self.worker.index as usize));
        match turn {
            Some(turn) if turn.worker != self.worker.index as usize => {
                let queue = &self.handovers[turn.worker];
                // Fails only on a socket that is already dead.
                let Ok(stream) = stream.into_std() else { return };
                // A worker that is so far behind takes no more: the connection is dropped, and counted.
                if queue.try_send(Handover { listener: active.id, stream, peer, turn }).is_err() {
                    listener.stats.downstream_cx_overflow().inc();
                }
            }
            turn => self.serve_tcp(active, stream, peer, turn),
        }
    }

    fn take_over(&self, handover: Handover) {
        let Some(active) = self.find(handover.listener) else {
            return;
        };
        match TcpStream::from_std(handover.stream) {
            Ok(stream) => self.serve_tcp(&active, stream, handover.peer, Some(handover.turn)),
            Err(error) => tracing::warn!(target: "conn_handler", "cannot take a connection over: {error}"),
        }
    }

    fn serve_tcp(&self, active: &Rc<Active>, stream: TcpStream, peer: SocketAddr, turn: Option<Turn>) {
        let Ok(local) = stream.local_addr() else {
            // The peer is gone already.
            return;
        };
        self.spawn(active, Socket::tcp(stream), Address::Ip(local), Address::Ip(unmapped(peer)), turn);
    }

    fn spawn(
        &self,
        active: &Rc<Active>,
        socket: Socket,
        local: Address,
        remote: Address,
        turn: Option<Turn>,
    ) {
        let listener = Arc::clone(&active.listener.borrow());
        let index = self.worker.index as usize;
        let Some(connection) = self.worker.shared.downstream.admit(listener.admission) else {
            listener.stats.downstream_global_cx_overflow().inc();
            return;
        };
        let open = listener.stats.downstream_cx_active().value();
        if open >= listener.connection_limit.get() {
            listener.stats.downstream_cx_overflow().inc();
            return;
        }
        listener.stats.downstream_cx_total().inc();
        listener.stats.downstream_cx_active().inc();
        if let Some(worker) = listener.worker_stats.get(index) {
            worker.downstream_cx_total().inc();
            worker.downstream_cx_active().inc();
        }
        let mut info = ConnectionInfo::new(self.worker.connection_id(), Instant::now(), local, remote);
        info.listener = Arc::clone(&listener.name);
        let guard = Guard {
            listener: Arc::clone(&listener),
            index,
            start: info.start,
            _connection: connection,
            _turn: turn,
        };
        let (listeners, active) = (self.handle(), Rc::clone(active));
        tokio::task::spawn_local(async move {
            let _guard = guard;
            tokio::select! {
                () = listeners.serve(&active, &listener, socket, info) => {}
                () = active.until_closed() => {}
            }
        });
    }

    /// Listener filters, filter chain, handshake, network filter.
    async fn serve(
        &self,
        active: &Rc<Active>,
        listener: &Arc<Listener>,
        socket: Socket,
        mut info: ConnectionInfo,
    ) {
        let Some(socket) = self.inspect(listener, socket, &mut info).await else {
            return;
        };
        // A connection that was meant for another address belongs to the listener of that address, if there is one.
        let redirected = if listener.use_original_dst && info.local_address_restored {
            self.listener_of(&info.local_address).filter(|other| !Rc::ptr_eq(other, active))
        } else {
            None
        };
        let active = redirected.as_ref().unwrap_or(active);
        let listener = Arc::clone(&active.listener.borrow());
        let facts = Facts {
            destination: info.local_address.ip().map(|address| (address.ip(), address.port())),
            server_name: info.requested_server_name.as_deref().unwrap_or_default(),
            transport_protocol: info.transport_protocol,
            application_protocols: &info.application_protocols,
            direct_source: info.direct_remote_address.ip().map(|address| address.ip()),
            source: info.remote_address.ip().map(|address| (address.ip(), address.port())),
        };
        let chain = match listener.matching.find(&facts) {
            Some(index) => listener.chains.get(index),
            None => listener.default_chain.as_ref(),
        };
        let Some(chain) = chain else {
            listener.stats.no_filter_chain_match().inc();
            self.log_unserved(&listener, info, Some(ResponseFlag::NoRouteFound), "filter_chain_not_found");
            return;
        };
        info.filter_chain = Arc::clone(&chain.name);
        let drain = active.drain_of(chain);
        let transport = match &chain.tls {
            None => Transport::Plain(socket),
            Some(context) => {
                match Box::pin(self.handshake(&listener, chain, context, socket, &mut info)).await {
                    Ok(transport) => transport,
                    Err(reason) => {
                        *info.transport_failure_reason.borrow_mut() = Some(reason.into());
                        self.log_unserved(&listener, info, None, "");
                        return;
                    }
                }
            }
        };
        let worker = Rc::clone(&self.worker);
        match &chain.filters {
            NetworkFilter::Http(manager) => {
                let manager = Held::new(Arc::clone(manager));
                http::serve_connection(worker, manager, transport, Rc::new(info), drain).await;
            }
            NetworkFilter::Tcp(proxy) => {
                Box::pin(tcp_proxy::serve(worker, proxy, transport, info, drain)).await
            }
            NetworkFilter::Echo => network::echo(transport).await,
            NetworkFilter::DirectResponse(body) => network::direct_response(transport, body).await,
            NetworkFilter::None => {}
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
            Some(limit) => match timeout(limit, handshake).await {
                Ok(result) => result,
                Err(_) => {
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

    fn listener_of(&self, address: &Address) -> Option<Rc<Active>> {
        let wanted = address.ip()?;
        let active = self.active.borrow();
        let running = || active.values().filter(|active| !active.is_stopped.get());
        let bound_to = |active: &&Rc<Active>, exact: bool| {
            active.listener.borrow().addresses.iter().filter_map(|listen| listen.address.ip()).any(|bound| {
                bound.port() == wanted.port()
                    && if exact { bound.ip() == wanted.ip() } else { bound.ip().is_unspecified() }
            })
        };
        let exact = running().find(|active| bound_to(active, true));
        exact.or_else(|| running().find(|active| bound_to(active, false))).cloned()
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
                match filter.inspect(buffer, end, original, info) {
                    Verdict::Done { consumed } => {
                        let _ = buffer.split_to(consumed);
                        break;
                    }
                    Verdict::Reject(reason) => {
                        listener.stats.downstream_listener_filter_error().inc();
                        return Err(Some(reason));
                    }
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

/// `drain_type: MODIFY_ONLY` listeners do not react to the health check.
fn drain_handle(listener: &Listener, shared: &Arc<Shared>) -> DrainHandle {
    if listener.modify_only_drain { DrainHandle::new() } else { DrainHandle::with_health_check(shared) }
}

impl ChainState {
    fn new(chain: &Arc<FilterChain>, drain: DrainHandle) -> Self {
        Self { chain: Arc::clone(chain), drain }
    }
}

impl Active {
    fn update(&self, listener: Arc<Listener>, over: Duration, shared: &Arc<Shared>) {
        let mut chains = self.chains.borrow_mut();
        let mut next = Vec::new();
        for chain in listener.all_chains() {
            let kept = chains.iter().position(|known| Arc::ptr_eq(&known.chain, chain));
            let fresh = || ChainState::new(chain, drain_handle(&listener, shared));
            next.push(kept.map_or_else(fresh, |at| chains.swap_remove(at)));
        }
        let now = Instant::now();
        for gone in chains.drain(..) {
            gone.drain.start(now, over);
        }
        *chains = next;
        *self.listener.borrow_mut() = listener;
    }

    fn drain_of(&self, chain: &Arc<FilterChain>) -> DrainHandle {
        let chains = self.chains.borrow();
        let own = chains.iter().find(|known| Arc::ptr_eq(&known.chain, chain));
        own.map_or_else(|| self.drain.clone(), |known| known.drain.clone())
    }

    fn drain_all(&self, over: Duration) {
        let now = Instant::now();
        self.drain.start(now, over);
        for state in self.chains.borrow().iter() {
            state.drain.start(now, over);
        }
    }

    fn stop(&self) {
        self.is_stopped.set(true);
        self.stopped.notify_waiters();
    }

    fn close(&self) {
        self.is_closed.set(true);
        self.closed.notify_waiters();
    }

    async fn until_stopped(&self) {
        if !self.is_stopped.get() {
            self.stopped.notified().await;
        }
    }

    async fn until_closed(&self) {
        if !self.is_closed.get() {
            self.closed.notified().await;
        }
    }
}

/// Counts a connection as closed when it ends, however that happens.
#[derive(Debug)]
struct Guard {
    listener: Arc<Listener>,
    index: usize,
    start: Instant,
    _connection: overload::Connection,
    _turn: Option<Turn>,
}

impl Drop for Guard {
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

/// A connection's place in the `exact_balance` of its listener, given back when it ends.
#[derive(Debug)]
struct Turn {
    listener: Arc<Listener>,
    worker: usize,
}

impl Turn {
    fn take(listener: &Arc<Listener>, own: usize) -> Self {
        Self { worker: listener.balance.choose(own), listener: Arc::clone(listener) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.listener.balance.release(self.worker);
    }
}

struct Decrement<F: Fn()>(F);

impl<F: Fn()> Drop for Decrement<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Open connections of a listener by worker, for `exact_balance`.
#[derive(Debug)]
pub struct Balance(Box<[AtomicUsize]>);

impl Balance {
    /// No connections.
    pub fn new(workers: u32) -> Self {
        Self((0..workers).map(|_| AtomicUsize::new(0)).collect())
    }

    /// Counts a connection on the worker with the fewest; `own` wins a tie.
    fn choose(&self, own: usize) -> usize {
        let mut best = own;
        let mut least = self.0[own].load(Ordering::Relaxed);
        for (index, count) in self.0.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count < least {
                (best, least) = (index, count);
            }
        }
        self.0[best].fetch_add(1, Ordering::Relaxed);
        best
    }

    fn release(&self, index: usize) {
        self.0[index].fetch_sub(1, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::Balance;

    #[test]
    fn the_least_loaded_worker_is_chosen_and_ties_stay() {
        let balance = Balance::new(3);
        assert_eq!([balance.choose(1), balance.choose(1), balance.choose(1)], [1, 0, 2]);
        balance.release(2);
        assert_eq!(balance.choose(1), 2);
    }
}
