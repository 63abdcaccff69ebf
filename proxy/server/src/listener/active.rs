//! A listener at work on one worker: its configuration, its filter chains, and how they end.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use waystation_filter_api::connection::ConnectionInfo;

use super::chain_select::Selected;
use super::config::{FilterChain, Listener};
use crate::context::Shared;
use crate::drain::DrainHandle;

/// One listener on one worker.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) id: u64,
    listener: RefCell<Arc<Listener>>,
    /// Its IP addresses, which no update changes: at others it is another listener.
    bound: Box<[SocketAddr]>,
    /// Whether it drains as a whole, so that chains of a later update do as well.
    draining: Cell<Option<Duration>>,
    /// One state for each of [`Listener::all_chains`], so that an update drains only those that are gone.
    chains: RefCell<Vec<ChainState>>,
    /// Chains that an update has taken away: they drain until the main thread says that their time is over.
    gone: RefCell<Vec<ChainState>>,
    /// It accepts no more.
    pub(super) stopped: Signal,
    /// Connections that have no chain yet end.
    pub(super) closed: Signal,
}

/// The listeners of one worker.
#[derive(Debug, Default)]
pub(super) struct ActiveSet {
    by_id: HashMap<u64, Rc<Active>>,
    /// For redirected connections, which look for the listener of their original destination.
    by_port: HashMap<u16, Vec<Rc<Active>>>,
}

impl ActiveSet {
    pub(super) fn get(&self, id: u64) -> Option<&Rc<Active>> {
        self.by_id.get(&id)
    }

    pub(super) fn insert(&mut self, active: &Rc<Active>) {
        self.by_id.insert(active.id, Rc::clone(active));
        for address in &active.bound {
            let of_port = self.by_port.entry(address.port()).or_default();
            // One with several addresses on a port stands there once.
            if !of_port.iter().any(|other| other.id == active.id) {
                of_port.push(Rc::clone(active));
            }
        }
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<Rc<Active>> {
        let active = self.by_id.remove(&id)?;
        self.by_port.retain(|_, of_port| {
            of_port.retain(|other| other.id != id);
            !of_port.is_empty()
        });
        Some(active)
    }

    /// Who accepts at an address: it alone, or else all addresses with that port.
    pub(super) fn at(&self, wanted: SocketAddr) -> Option<&Rc<Active>> {
        let of_port = self.by_port.get(&wanted.port())?;
        let is_at = |active: &Rc<Active>, is_wanted: fn(SocketAddr, IpAddr) -> bool| {
            let mut bound = active.bound.iter().filter(|bound| bound.port() == wanted.port());
            !active.stopped.is_raised() && bound.any(|bound| is_wanted(*bound, wanted.ip()))
        };
        let exact = of_port.iter().find(|active| is_at(active, |bound, ip| bound.ip() == ip));
        exact.or_else(|| of_port.iter().find(|active| is_at(active, |bound, _| bound.ip().is_unspecified())))
    }
}

/// What a worker keeps for each filter chain.
#[derive(Clone, Debug)]
pub(super) struct ChainState {
    pub(super) chain: Arc<FilterChain>,
    pub(super) drain: DrainHandle,
    /// What is left of its connections ends.
    pub(super) closed: Rc<Signal>,
}

/// Something that happens once.
#[derive(Debug, Default)]
pub(super) struct Signal {
    raised: Cell<bool>,
    waiting: Notify,
}

impl Signal {
    pub(super) fn is_raised(&self) -> bool {
        self.raised.get()
    }

    fn raise(&self) {
        self.raised.set(true);
        self.waiting.notify_waiters();
    }

    pub(super) async fn until_raised(&self) {
        if !self.raised.get() {
            self.waiting.notified().await;
        }
    }
}

impl Active {
    pub(super) fn new(id: u64, listener: Arc<Listener>, shared: &Arc<Shared>) -> Self {
        let chains = listener.all_chains().map(|chain| ChainState::new(chain, &listener, shared)).collect();
        let bound = listener.addresses.iter().filter_map(|listen| listen.address.ip()).collect();
        Self {
            id,
            listener: RefCell::new(listener),
            bound,
            draining: Cell::new(None),
            chains: RefCell::new(chains),
            gone: RefCell::default(),
            stopped: Signal::default(),
            closed: Signal::default(),
        }
    }

    /// The configuration in force.
    pub(super) fn listener(&self) -> Arc<Listener> {
        Arc::clone(&self.listener.borrow())
    }

    /// The chain that takes a connection.
    pub(super) fn chain_of(&self, info: &ConnectionInfo) -> Option<ChainState> {
        let listener = self.listener.borrow();
        let chains = self.chains.borrow();
        match listener.selector.select(info) {
            Selected::Chain(index) => chains.get(index),
            // Behind all others.
            Selected::Default => listener.default_chain.as_ref().and_then(|_| chains.last()),
            Selected::Nothing => None,
        }
        .cloned()
    }

    /// Goes on with another configuration; the connections of chains that it does not have any more drain.
    pub(super) fn update(&self, listener: Arc<Listener>, over: Duration, shared: &Arc<Shared>) {
        let now = Instant::now();
        let mut chains = self.chains.borrow_mut();
        let mut next = Vec::new();
        for chain in listener.all_chains() {
            let kept = chains.iter().position(|known| Arc::ptr_eq(&known.chain, chain));
            next.push(match kept {
                Some(at) => chains.swap_remove(at),
                None => {
                    let fresh = ChainState::new(chain, &listener, shared);
                    if let Some(over) = self.draining.get() {
                        fresh.drain.start(now, over);
                    }
                    fresh
                }
            });
        }
        let gone = std::mem::replace(&mut *chains, next);
        for state in &gone {
            state.drain.start(now, over);
        }
        self.gone.borrow_mut().extend(gone);
        *self.listener.borrow_mut() = listener;
    }

    /// Has all connections end over that time.
    pub(super) fn drain(&self, over: Duration) {
        self.draining.set(Some(over));
        let now = Instant::now();
        for state in self.chains.borrow().iter().chain(self.gone.borrow().iter()) {
            state.drain.start(now, over);
        }
    }

    pub(super) fn stop(&self) {
        self.stopped.raise();
    }

    /// Closes what is left on chains that an update has taken away.
    pub(super) fn close_chains(&self, over: &[Arc<FilterChain>]) {
        let is_over = |state: &ChainState| over.iter().any(|chain| Arc::ptr_eq(chain, &state.chain));
        self.gone.borrow_mut().retain(|state| {
            let is_over = is_over(state);
            if is_over {
                state.closed.raise();
            }
            !is_over
        });
    }

    /// Closes all that is left.
    pub(super) fn close(&self) {
        self.stop();
        self.closed.raise();
        for state in self.chains.borrow().iter().chain(self.gone.borrow().iter()) {
            state.closed.raise();
        }
    }
}

impl ChainState {
    fn new(chain: &Arc<FilterChain>, listener: &Listener, shared: &Arc<Shared>) -> Self {
        // `drain_type: MODIFY_ONLY` listeners do not react to the health check.
        let drain = match listener.modify_only_drain {
            true => DrainHandle::new(),
            false => DrainHandle::with_health_check(shared),
        };
        Self { chain: Arc::clone(chain), drain, closed: Rc::default() }
    }
}
