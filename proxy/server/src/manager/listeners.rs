//! Listeners: added, warmed, updated in place or replaced, drained, removed.

mod addresses;
mod dump;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use waystation_filter_api::address::Address;
use waystation_schema::ConfigError;
use waystation_stats::stats_group;
use waystation_xds::Client;
use xxhash_rust::xxh64::xxh64;

pub use self::dump::{ListenerDump, ListenersDump};
use super::dump::Dumped;
use super::needs::Needs;
use super::offered::Offered;
use super::warming::Warming;
use crate::cli::options::Mode;
use crate::context::{CompileContext, Shared};
use crate::listener::config::{FilterChain, Listener};
use crate::listener::sockets::{LeftSockets, Sockets};

stats_group! {
    /// `listener_manager.`
    pub struct ListenerManagerStats {
        counters {
            listener_added,
            listener_create_failure,
            listener_create_success,
            listener_in_place_updated,
            listener_modified,
            listener_removed,
            listener_stopped,
        }
        gauges {
            total_filter_chains_draining,
            total_listeners_active,
            total_listeners_draining,
            total_listeners_warming,
            workers_pinned,
            workers_started,
        }
        histograms {}
    }
}

/// What the workers are to do about listeners.
#[derive(Clone, Debug)]
pub enum Order {
    /// Accept on these sockets with this configuration.
    Start {
        /// Names the running listener.
        id: u64,
        /// Its configuration.
        listener: Arc<Listener>,
        /// Its sockets.
        sockets: Arc<Sockets>,
    },
    /// Go on with another configuration of which only filter chains differ.
    Update {
        /// The running listener.
        id: u64,
        /// The new configuration.
        listener: Arc<Listener>,
        /// The time over which connections of chains that are gone are closed.
        over: Duration,
    },
    /// Drain the connections; with `stop`, accept no more.
    Drain {
        /// The running listener.
        id: u64,
        /// Whether its sockets are closed.
        stop: bool,
        /// The time over which connections are closed; zero is with their next response.
        over: Duration,
    },
    /// Close what is left on these chains, which an update has taken away.
    CloseChains {
        /// The running listener.
        id: u64,
        /// The chains.
        chains: Arc<[Arc<FilterChain>]>,
    },
    /// Close what is left.
    Remove {
        /// The running listener.
        id: u64,
    },
}

/// A listener that workers serve.
#[derive(Clone, Debug)]
pub struct Running {
    /// Names it towards the workers.
    pub id: u64,
    /// Its configuration.
    pub listener: Arc<Listener>,
    /// Its sockets; `None` with `bind_to_port: false`.
    pub sockets: Option<Arc<Sockets>>,
    /// Where it listens, with the ports that it was given.
    pub addresses: Vec<Address>,
    /// It was stopped (`/drain_listeners`): it accepts no more and is not updated.
    stopped: bool,
}

/// A listener that waits to take over.
#[derive(Debug)]
struct Successor {
    listener: Arc<Listener>,
    sockets: Option<Arc<Sockets>>,
    wire: Bytes,
    version: Arc<str>,
    hash: u64,
}

/// One name.
#[derive(Debug, Default)]
struct Entry {
    active: Option<Running>,
    hash: u64,
    warming: Option<Successor>,
    dumped: Option<Dumped>,
    dynamic: bool,
}

/// A listener, or a set of filter chains, on its way out.
#[derive(Debug)]
struct Draining {
    /// The running listener.
    id: u64,
    until: Instant,
    listener: Arc<Listener>,
    what: Leaving,
}

#[derive(Debug)]
enum Leaving {
    /// All of it.
    Listener {
        /// Closed when every worker has closed them: until then nobody else can bind their addresses, but a listener that
        /// wants to can have them.
        sockets: LeftSockets,
        dumped: Option<Dumped>,
    },
    /// Chains of a listener that goes on.
    Chains(Arc<[Arc<FilterChain>]>),
}

/// What follows on a drain by the operator.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Graceful {
    /// The listeners stop (`/drain_listeners?graceful`).
    ThenStop,
    /// Nothing (`skip_exit`).
    SkipExit,
}

/// A drain by the operator.
#[derive(Clone, Copy, Debug)]
struct GracefulDrain {
    inbound_only: bool,
    /// When the listeners stop; `None` for never (`skip_exit`).
    stop_at: Option<Instant>,
}

/// All listeners.
#[derive(Debug)]
pub struct Listeners {
    shared: Arc<Shared>,
    workers: u32,
    /// Whether sockets are opened. Not to validate: a running proxy may have the addresses.
    binds: bool,
    entries: BTreeMap<String, Entry>,
    draining: Vec<Draining>,
    stats: ListenerManagerStats,
    next_id: u64,
    warming: Warming,
    /// Of the warming ones, those that were found to wait for nothing.
    ready: BTreeSet<String>,
    /// How often a warming listener was looked at.
    looks: u64,
    graceful: Vec<GracefulDrain>,
    stopped: bool,
    /// Inbound listeners were stopped (`/drain_listeners?inboundonly`) and stay so.
    stopped_inbound: bool,
    /// Over which time connections are closed when draining starts.
    drain_over: Duration,
}

impl Listeners {
    /// None yet.
    pub fn new(shared: &Arc<Shared>, workers: u32, mode: Mode) -> Self {
        Self {
            binds: mode != Mode::Validate,
            stats: shared.stats.root().scope("listener_manager").group(),
            shared: Arc::clone(shared),
            workers,
            entries: BTreeMap::new(),
            draining: Vec::new(),
            next_id: 1,
            warming: Warming::default(),
            ready: BTreeSet::new(),
            looks: 0,
            graceful: Vec::new(),
            stopped: false,
            stopped_inbound: false,
            drain_over: if shared.drain_immediately { Duration::ZERO } else { shared.drain_time },
        }
    }

    /// What they count.
    pub fn stats(&self) -> &ListenerManagerStats {
        &self.stats
    }

    /// Adds or updates a listener. It starts, or takes over, once what it needs has arrived: see [`Self::activate`].
    pub fn add(
        &mut self,
        offered: Offered<'_, pb::Listener>,
        needs: &mut Needs,
        client: &mut Client,
    ) -> Result<(), ConfigError> {
        let Offered { proto, wire, version, dynamic } = offered;
        let hash = xxh64(&wire, 0);
        if self.stopped || (self.stopped_inbound && is_inbound(proto)) {
            return Ok(());
        }
        if let Some(entry) = self.entries.get(&proto.name) {
            if dynamic && !entry.dynamic {
                // Envoy: a static listener cannot be updated; the update is ignored.
                return Ok(());
            }
            let current = entry.warming.as_ref().map_or(entry.hash, |warming| warming.hash);
            if current == hash {
                return Ok(());
            }
        }
        let result = self.compile(proto, &wire, needs, client);
        let entry = self.entries.entry(proto.name.clone()).or_default();
        entry.dynamic = dynamic;
        match result {
            Ok((listener, sockets)) => {
                self.stats.listener_create_success().inc();
                if entry.active.is_some() || entry.warming.is_some() {
                    self.stats.listener_modified().inc();
                } else {
                    self.stats.listener_added().inc();
                }
                if let Some(replaced) = entry.warming.take() {
                    needs.release(&replaced.listener.needs, client);
                } else {
                    self.stats.total_listeners_warming().add(1);
                }
                let version = Arc::clone(version);
                entry.warming = Some(Successor { listener, sockets, wire, version, hash });
                self.ready.remove(&proto.name);
                self.warming.insert(&proto.name, true);
                Ok(())
            }
            Err(error) => {
                self.stats.listener_create_failure().inc();
                Dumped::refuse(&mut entry.dumped, wire, Arc::clone(version), error.to_string());
                if entry.active.is_none() && entry.warming.is_none() && !dynamic {
                    self.entries.remove(&proto.name);
                }
                Err(error)
            }
        }
    }

    fn compile(
        &mut self,
        proto: &pb::Listener,
        wire: &[u8],
        needs: &mut Needs,
        client: &mut Client,
    ) -> Result<(Arc<Listener>, Option<Arc<Sockets>>), ConfigError> {
        let entry = self.entries.get(&proto.name);
        let active = entry.and_then(|entry| entry.active.as_ref());
        let context = CompileContext::new(&self.shared);
        let previous = active.map(|running| &*running.listener);
        let listener = Listener::compile(proto, wire, previous, &context, self.workers)?;
        self.check_addresses(&proto.name, &listener)?;
        let sockets = match listener.bind_to_port && self.binds {
            false => None,
            true => {
                let warming = entry.and_then(|entry| entry.warming.as_ref());
                let kept = warming.and_then(|warming| warming.sockets.as_deref());
                let kept: Vec<_> =
                    kept.into_iter().chain(active.and_then(|running| running.sockets.as_deref())).collect();
                // Workers may not have closed the sockets of a listener that was removed a moment ago.
                let left: Vec<_> = self.leaving_sockets().collect();
                let opened = Sockets::open(&listener, self.workers, &kept, &left);
                Some(Arc::new(opened.map_err(ConfigError::new)?))
            }
        };
        needs.hold(&listener.needs, client)?;
        Ok((Arc::new(listener), sockets))
    }

    /// Sockets of draining listeners that are still open.
    fn leaving_sockets(&self) -> impl Iterator<Item = Sockets> {
        self.draining.iter().rev().filter_map(|drain| match &drain.what {
            Leaving::Listener { sockets, .. } => Some(sockets.open()),
            Leaving::Chains(_) => None,
        })
    }

    /// These needs have settled.
    pub fn needs_settled(&mut self, keys: &[String]) {
        keys.iter().for_each(|key| self.warming.settled(key));
    }

    /// Whether a warming listener waits for nothing; otherwise it is looked at again when that has changed.
    fn is_ready(&mut self, name: &str, needs: &Needs) -> bool {
        let warming = self.entries.get(name).and_then(|entry| entry.warming.as_ref());
        let Some(warming) = warming else { return false };
        self.looks += 1;
        let mut unsettled = needs.unsettled_keys(&warming.listener.needs).peekable();
        let is_ready = unsettled.peek().is_none();
        self.warming.wait(name, unsettled);
        is_ready
    }

    /// Starts, or updates, every listener whose needs have settled.
    pub fn activate(&mut self, now: Instant, needs: &Needs) -> Vec<Order> {
        let mut orders = Vec::new();
        if self.stopped {
            return orders;
        }
        let mut candidates = std::mem::take(&mut self.ready);
        candidates.extend(self.warming.take_touched());
        for name in candidates {
            let warming = self.entries.get(&name).and_then(|entry| entry.warming.as_ref());
            if self.stopped_inbound && warming.is_some_and(|warming| warming.listener.inbound) {
                self.ready.insert(name);
                continue;
            }
            if !self.is_ready(&name, needs) {
                continue;
            }
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            let Some(warming) = entry.warming.take() else { continue };
            self.warming.remove(&name);
            self.stats.total_listeners_warming().sub(1);
            let Successor { listener, sockets, wire, version, hash } = warming;
            if let Some(Err(reason)) = sockets.as_ref().map(|sockets| sockets.listen(&listener)) {
                tracing::error!(
                    target: "config",
                    "final pre-worker init for listener '{}' failed: {reason}", listener.name
                );
                self.stats.listener_create_failure().inc();
                Dumped::refuse(&mut entry.dumped, wire, version, reason);
                // It goes as a removed one does, without having come.
                let what = Leaving::Listener { sockets: LeftSockets::default(), dumped: None };
                self.stats.total_listeners_draining().add(1);
                self.draining.push(Draining { id: self.next_id, until: now, listener, what });
                self.next_id += 1;
                continue;
            }
            let old = entry.active.take();
            let old_dump = entry.dumped.replace(Dumped::accepted(wire, version));
            entry.hash = hash;
            let in_place = old.as_ref().filter(|old| listener.updates(&old.listener));
            let id = match in_place {
                Some(old) => {
                    self.stats.listener_in_place_updated().inc();
                    let (listener, over) = (Arc::clone(&listener), self.drain_over);
                    orders.push(Order::Update { id: old.id, listener, over });
                    old.id
                }
                None => {
                    let id = self.next_id;
                    self.next_id += 1;
                    let start = match &sockets {
                        Some(sockets) => Arc::clone(sockets),
                        None => Arc::new(Sockets::none()),
                    };
                    orders.push(Order::Start { id, listener: Arc::clone(&listener), sockets: start });
                    id
                }
            };
            let replaced_in_place = in_place.is_some();
            let until = now + self.shared.drain_time;
            match old {
                Some(old) if replaced_in_place => {
                    let kept: HashSet<*const _> = listener.all_chains().map(Arc::as_ptr).collect();
                    let gone = old.listener.all_chains().filter(|chain| !kept.contains(&Arc::as_ptr(chain)));
                    let gone: Arc<[_]> = gone.cloned().collect();
                    self.stats.total_filter_chains_draining().add(gone.len() as u64);
                    let what = Leaving::Chains(gone);
                    self.draining.push(Draining { id, until, listener: old.listener, what });
                }
                Some(old) => {
                    orders.push(Order::Drain { id: old.id, stop: true, over: self.drain_over });
                    self.stats.total_listeners_draining().add(1);
                    self.draining.push(Draining::listener(old, until, old_dump));
                }
                None => self.stats.total_listeners_active().add(1),
            }
            if !replaced_in_place && self.graceful.iter().any(|drain| drain.concerns(&listener)) {
                orders.push(Order::Drain { id, stop: false, over: self.drain_over });
            }
            let addresses = match &sockets {
                Some(sockets) => sockets.local_addresses(),
                None => listener.addresses.iter().map(|listen| listen.address.clone()).collect(),
            };
            entry.active = Some(Running { id, listener, sockets, addresses, stopped: false });
        }
        orders
    }

    /// Removes a dynamic listener: it drains, and keeps its route subscription while it does.
    pub fn remove(&mut self, name: &str, now: Instant, needs: &mut Needs, client: &mut Client) -> Vec<Order> {
        if self.entries.get(name).is_none_or(|entry| !entry.dynamic) {
            return Vec::new();
        }
        let Some(entry) = self.entries.remove(name) else {
            return Vec::new();
        };
        if entry.active.is_some() || entry.warming.is_some() {
            self.stats.listener_removed().inc();
        }
        if let Some(warming) = entry.warming {
            self.stats.total_listeners_warming().sub(1);
            self.warming.remove(name);
            self.ready.remove(name);
            needs.release(&warming.listener.needs, client);
        }
        let Some(active) = entry.active else {
            return Vec::new();
        };
        self.stats.total_listeners_active().sub(1);
        self.stats.total_listeners_draining().add(1);
        let order = Order::Drain { id: active.id, stop: true, over: self.drain_over };
        self.draining.push(Draining::listener(active, now + self.shared.drain_time, entry.dumped));
        vec![order]
    }

    /// Ends the drains whose time is over.
    pub fn expire(&mut self, now: Instant, needs: &mut Needs, client: &mut Client) -> Vec<Order> {
        let mut orders = Vec::new();
        for drain in self.draining.extract_if(.., |drain| drain.until <= now) {
            needs.release(&drain.listener.needs, client);
            let id = drain.id;
            match drain.what {
                Leaving::Listener { .. } => {
                    self.stats.total_listeners_draining().sub(1);
                    orders.push(Order::Remove { id });
                }
                Leaving::Chains(chains) => {
                    self.stats.total_filter_chains_draining().sub(chains.len() as u64);
                    orders.push(Order::CloseChains { id, chains });
                }
            }
        }
        let over: Vec<_> =
            self.graceful.extract_if(.., |drain| drain.stop_at.is_some_and(|at| at <= now)).collect();
        for drain in over {
            orders.extend(self.stop(drain.inbound_only, false));
        }
        orders
    }

    /// When [`Self::expire`] has something to do.
    pub fn next_expiry(&self) -> Option<Instant> {
        let drains = self.draining.iter().map(|drain| drain.until);
        drains.chain(self.graceful.iter().filter_map(|drain| drain.stop_at)).min()
    }

    /// Stops accepting on all listeners, or on inbound ones only (`/drain_listeners`), and drains their connections:
    /// `at_once` when the process ends.
    pub fn stop(&mut self, inbound_only: bool, at_once: bool) -> Vec<Order> {
        let over = if at_once { Duration::ZERO } else { self.drain_over };
        if inbound_only {
            self.stopped_inbound = true;
        } else {
            self.stopped = true;
        }
        let mut orders = Vec::new();
        for active in self.entries.values_mut().filter_map(|entry| entry.active.as_mut()) {
            if inbound_only && !active.listener.inbound {
                continue;
            }
            if !active.stopped {
                active.stopped = true;
                // Only the workers' sockets: the address is free when they have closed them.
                active.sockets = None;
                self.stats.listener_stopped().inc();
            } else if !at_once {
                continue;
            }
            orders.push(Order::Drain { id: active.id, stop: true, over });
        }
        if at_once {
            // What drains already has no longer than the process.
            orders.extend(self.draining.iter().map(|drain| Order::Drain { id: drain.id, stop: true, over }));
        }
        orders
    }

    /// Drains connections and goes on accepting until the drain time is over, or for ever. A drain that goes on already is
    /// not begun anew.
    pub fn drain_connections(&mut self, now: Instant, inbound_only: bool, how: Graceful) -> Vec<Order> {
        if self.graceful.iter().any(|drain| drain.inbound_only == inbound_only) {
            return Vec::new();
        }
        let stop_at = (how == Graceful::ThenStop).then(|| now + self.shared.drain_time);
        let drain = GracefulDrain { inbound_only, stop_at };
        self.graceful.push(drain);
        let chosen = self.active().filter(|active| !active.stopped && drain.concerns(&active.listener));
        chosen.map(|active| Order::Drain { id: active.id, stop: false, over: self.drain_over }).collect()
    }

    /// Whether no listener waits for a resource.
    pub fn all_settled(&mut self, needs: &Needs) -> bool {
        for name in self.warming.take_touched() {
            if self.is_ready(&name, needs) {
                self.ready.insert(name);
            }
        }
        self.ready.len() == self.warming.len()
    }

    /// The listeners that serve.
    pub fn active(&self) -> impl Iterator<Item = &Running> {
        self.entries.values().filter_map(|entry| entry.active.as_ref())
    }

    /// What still waits, and for which resources, for `/init_dump`.
    pub fn unready<'a>(&'a self, needs: &'a Needs) -> impl Iterator<Item = (&'a str, Vec<&'a str>)> {
        self.entries.iter().filter_map(move |(name, entry)| {
            let warming = entry.warming.as_ref()?;
            Some((name.as_str(), needs.unsettled(&warming.listener.needs).collect()))
        })
    }
}

impl Draining {
    fn listener(old: Running, until: Instant, dumped: Option<Dumped>) -> Self {
        let sockets = old.sockets.as_ref().map(|sockets| sockets.leave()).unwrap_or_default();
        Self { id: old.id, until, listener: old.listener, what: Leaving::Listener { sockets, dumped } }
    }
}

impl GracefulDrain {
    fn concerns(self, listener: &Listener) -> bool {
        !self.inbound_only || listener.inbound
    }
}

fn is_inbound(proto: &pb::Listener) -> bool {
    proto.traffic_direction() == core::TrafficDirection::Inbound
}
