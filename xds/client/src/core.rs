//! The state machine. Bottom up: [`interest`] (who wants which name), [`inventory`] (what is held), [`envelope`]
//! (a response taken apart), [`feed`] (one type on one stream: requests, nonces, acknowledgements), [`mux`] (one
//! stream: connection, back-off, send queue). This file is the consumer's side, [`dispatch`] the way of a
//! response, [`transport`] the driver's side.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::{
    GrpcService, GrpcSource, Interest, PathSource, Protocol, ResourceType, RestSource, Source,
    SubscriptionSpec,
};

mod dispatch;
mod envelope;
mod feed;
mod interest;
mod inventory;
mod mux;
mod pacing;
mod subscription;
mod timers;
mod transport;

use self::feed::Feed;
pub use self::mux::ControlPlaneStats;
use self::mux::{Mux, MuxKind};
use self::subscription::Subscription;
pub use self::subscription::SubscriptionStats;
use self::timers::{Timer, Timers};

/// A subscription.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SubId(u64);

/// A source that is being followed: a stream, a file, a polled endpoint.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct MuxId(u32);

/// One life of a [`MuxId`]: what comes from an older one is ignored.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct StreamId {
    /// The source.
    pub mux: MuxId,
    generation: u64,
}

/// Stands for one [`Update`] until it is answered by [`Core::applied`].
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct UpdateToken(u64);

/// What the core must be told at the start.
#[derive(Clone, Debug)]
pub struct Options {
    /// `envoy.config.core.v3.Node`, encoded.
    pub node: Bytes,
    /// The source behind [`Source::Ads`].
    pub ads: Option<Arc<GrpcSource>>,
    /// Seeds back-off and poll jitter.
    pub seed: u64,
    /// Wall clock in milliseconds since the epoch at the moment of [`Core::new`], for `update_time`.
    pub unix_ms: u64,
}

/// For the transport.
#[derive(Clone, Debug)]
pub enum Action {
    /// Connect, call the method, and report [`Core::stream_opened`] or [`Core::stream_closed`].
    Open {
        /// Name for the new stream.
        stream: StreamId,
        /// The server.
        service: Arc<GrpcService>,
        /// The gRPC method's path.
        method: &'static str,
    },
    /// Send an encoded request; report [`Core::sent`] when it has left the queue.
    Send {
        /// The stream.
        stream: StreamId,
        /// The message.
        message: Bytes,
    },
    /// Close the stream (or stop watching or polling); nothing more is reported about it.
    Close {
        /// The stream.
        stream: StreamId,
    },
    /// Read the file now and whenever it is replaced; report [`Core::fetched`] each time.
    Watch {
        /// Name for the watch.
        stream: StreamId,
        /// The file.
        path: Arc<PathSource>,
    },
    /// Ask the REST endpoint once and report [`Core::fetched`].
    Poll {
        /// Name for the series of polls.
        stream: StreamId,
        /// The server.
        rest: Arc<RestSource>,
        /// The path of the endpoint.
        endpoint: &'static str,
        /// The encoded `DiscoveryRequest`.
        request: Bytes,
    },
}

/// For the consumer.
#[derive(Clone, Debug)]
pub enum Event {
    /// Resources to apply. Must be answered by [`Core::applied`].
    Update(Update),
    /// The subscription got nothing, or nothing usable; what it has stays in force.
    Failed {
        /// The subscription.
        sub: SubId,
        /// Why.
        failure: Failure,
    },
    /// A stream came up.
    Connected {
        /// The source.
        mux: MuxId,
    },
    /// A stream ended, a file could not be read, a poll failed. It is tried again by itself.
    Disconnected {
        /// The source.
        mux: MuxId,
        /// What kind of source it is.
        via: Via,
        /// Cluster or target name, or path.
        target: Arc<str>,
        /// gRPC status code (14 where there is none).
        code: i32,
        /// Details.
        message: String,
    },
}

/// How resources come from a source.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Via {
    /// By the gRPC method of this path.
    Stream(&'static str),
    /// From a file.
    File,
    /// From the endpoint of this path.
    Poll(&'static str),
}

/// Resources for one subscription.
#[derive(Clone, Debug)]
pub struct Update {
    /// The subscription.
    pub sub: SubId,
    /// The type.
    pub kind: ResourceType,
    /// To be given back to [`Core::applied`].
    pub token: UpdateToken,
    /// Version of the response (`version_info`, `system_version_info`).
    pub version: Arc<str>,
    /// New or changed resources, in the order of the response. May be empty: the server has answered, and has
    /// nothing.
    pub resources: Vec<Resource>,
    /// Names that are gone, or known not to exist.
    pub removed: Vec<Arc<str>>,
}

/// A resource as it came from the server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Resource {
    /// Its name.
    pub name: Arc<str>,
    /// Its own version, or that of the response.
    pub version: Arc<str>,
    /// Other names it answers to (VHDS).
    pub aliases: Vec<Arc<str>>,
    /// The encoded message, without the `Any` around it.
    pub body: Bytes,
}

/// Why a [`Event::Failed`] came.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Failure {
    /// `initial_fetch_timeout` passed.
    FetchTimeout,
    /// The response as a whole was refused before anything of it could be applied; the server was told.
    Rejected(String),
    /// The file cannot be read, as [`Event::Disconnected`] has told. It may never be, so nothing should wait for it.
    Unreadable,
}

/// A resource that the consumer could not apply.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rejection {
    /// The resource's name.
    pub name: Arc<str>,
    /// Why, in the words that the server's operator should read.
    pub reason: String,
}

/// Why a subscription is not possible.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SubscribeError {
    /// [`Source::Ads`] without [`Options::ads`].
    #[error("ADS must be configured to support an ADS config source: the bootstrap has no ads_config")]
    NoAds,
    /// The source names no server.
    #[error("no gRPC service in the config source")]
    NoService,
    /// E.g. VHDS over state of the world, or REST for a type without an endpoint.
    #[error("{kind} can not be fetched by {transport}")]
    Unavailable {
        /// The type.
        kind: ResourceType,
        /// How it was to be fetched.
        transport: &'static str,
    },
}

/// A resource that is held, for `config_dump`.
#[derive(Clone, Debug)]
pub struct HeldResource<'a> {
    /// The source.
    pub mux: MuxId,
    /// The last accepted resource.
    pub resource: &'a Resource,
    /// Milliseconds since the epoch when it was accepted.
    pub updated_unix_ms: u64,
}

/// Identity of a mux: equal sources share one.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum MuxKey {
    Ads,
    Grpc(Arc<GrpcSource>, ResourceType),
    Path(Arc<PathSource>, ResourceType),
    Rest(Arc<RestSource>, ResourceType),
}

/// An update that is with the consumer.
#[derive(Debug)]
struct Outstanding {
    mux: MuxId,
    feed: usize,
    sub: SubId,
    /// Serial of the response; `None` when it did not come straight from one (held resources, expiry).
    response: Option<u64>,
    version: Arc<str>,
    /// Names and hashes of the bodies, when the update came out of the inventory.
    reviewed: Vec<(Arc<str>, u64)>,
    since: Instant,
}

/// The state machine; see the crate documentation.
#[derive(Debug)]
pub struct Core {
    options: Options,
    started: Instant,
    rng: fastrand::Rng,
    muxes: BTreeMap<MuxId, Mux>,
    keys: HashMap<MuxKey, MuxId>,
    subs: HashMap<SubId, Subscription>,
    outstanding: BTreeMap<UpdateToken, Outstanding>,
    paused: HashMap<ResourceType, u32>,
    timers: Timers,
    actions: VecDeque<Action>,
    events: VecDeque<Event>,
    changed_stats: HashSet<SubId>,
    serial: u64,
}

impl Core {
    /// A core without subscriptions.
    pub fn new(options: Options, now: Instant) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(options.seed),
            options,
            started: now,
            muxes: BTreeMap::new(),
            keys: HashMap::new(),
            subs: HashMap::new(),
            outstanding: BTreeMap::new(),
            paused: HashMap::new(),
            timers: Timers::default(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
            changed_stats: HashSet::new(),
            serial: 0,
        }
    }

    /// Subscribes. What is already held for it is delivered at once, as an [`Event::Update`].
    pub fn subscribe(&mut self, spec: SubscriptionSpec, now: Instant) -> Result<SubId, SubscribeError> {
        let mux = self.mux_for(&spec)?;
        let id = SubId(self.next_serial());
        let state = self.muxes.get_mut(&mux).expect("just looked up or made");
        let feed = state.feed_index(&spec.kind);
        state.subscribers += 1;
        let namespace_or_wildcard = !matches!(spec.interest, Interest::Names(_));
        let names = match spec.interest {
            Interest::Wildcard => {
                state.feeds[feed].interest.add_wildcard(id);
                Vec::new()
            }
            Interest::Namespace(prefix) => {
                state.feeds[feed].interest.add_namespace(id, prefix);
                Vec::new()
            }
            Interest::Names(names) => names,
        };
        let fetch_deadline =
            spec.init_fetch_timeout.filter(|limit| !limit.is_zero()).map(|limit| now + limit);
        if let Some(at) = fetch_deadline {
            self.timers.set(at, Timer::Fetch(id));
        }
        self.subs.insert(id, Subscription::new(mux, feed, fetch_deadline));
        self.changed_stats.insert(id);
        if namespace_or_wildcard {
            self.deliver_held(id, None, now);
        }
        self.change_names(id, names, Vec::new(), now);
        // A file is not asked: what counts is each reading of it.
        let asked = !matches!(self.muxes[&mux].kind, MuxKind::Path(_));
        if let Some(sub) = self.subs.get_mut(&id) {
            sub.stats.update_attempt = u64::from(asked);
        }
        self.start(mux, now);
        self.flush(mux, now);
        Ok(id)
    }

    /// Ends a subscription. Names that nobody else wants are given up on the wire, too.
    pub fn unsubscribe(&mut self, id: SubId, now: Instant) {
        let Some(sub) = self.subs.remove(&id) else { return };
        self.changed_stats.remove(&id);
        if let Some(at) = sub.fetch_deadline {
            self.timers.clear(at, &Timer::Fetch(id));
        }
        let state = self.muxes.get_mut(&sub.mux).expect("a mux lives as long as its subscriptions");
        state.subscribers -= 1;
        let dropped = state.feeds[sub.feed].remove_subscriber(id, sub.names.iter());
        self.forget_expiry(sub.mux, sub.feed, dropped);
        // An update that its subscriber will never answer must not hold the acknowledgement back.
        if let Some(feed) = self.feed(sub.mux, sub.feed) {
            feed.abandon(id);
        }
        let orphans: Vec<_> =
            self.outstanding.iter().filter(|(_, update)| update.sub == id).map(|(token, _)| *token).collect();
        for token in orphans {
            if let Some(update) = self.outstanding.get_mut(&token) {
                update.reviewed.clear();
            }
            self.applied(token, Vec::new(), now);
        }
        if self
            .muxes
            .get(&sub.mux)
            .is_some_and(|state| state.subscribers == 0 && !matches!(state.kind, MuxKind::Ads(_)))
        {
            self.remove_mux(sub.mux);
        } else {
            self.flush(sub.mux, now);
        }
    }

    /// Replaces the names of a subscription.
    pub fn set_names(&mut self, id: SubId, names: Vec<Arc<str>>, now: Instant) {
        let Some(sub) = self.subs.get(&id) else { return };
        let wanted: HashSet<&Arc<str>> = names.iter().collect();
        let gone = sub.names.iter().filter(|name| !wanted.contains(name)).cloned().collect();
        self.change_names(id, names, gone, now);
    }

    /// Adds names; those already there are ignored.
    pub fn add_names(&mut self, id: SubId, names: Vec<Arc<str>>, now: Instant) {
        self.change_names(id, names, Vec::new(), now);
    }

    /// Removes names.
    pub fn remove_names(&mut self, id: SubId, names: Vec<Arc<str>>, now: Instant) {
        self.change_names(id, Vec::new(), names, now);
    }

    /// Answers an update: everything in it was applied, but for `rejected`. When all updates of a response are
    /// answered, it is acknowledged or refused. Unknown and repeated tokens are ignored.
    pub fn applied(&mut self, token: UpdateToken, rejected: Vec<Rejection>, now: Instant) {
        let Some(update) = self.outstanding.remove(&token) else { return };
        let unix_ms = self.unix_ms(now);
        if let Some(sub) = self.subs.get_mut(&update.sub) {
            let took = now.saturating_duration_since(update.since);
            if rejected.is_empty() {
                sub.stats.succeeded(&update.version, unix_ms, took);
            } else {
                sub.stats.rejected();
            }
            self.changed_stats.insert(update.sub);
        }
        let Some(feed) = self.feed(update.mux, update.feed) else { return };
        match update.response {
            Some(serial) => {
                if feed.answered(serial, rejected) {
                    self.complete(update.mux, update.feed, now);
                }
            }
            None => {
                let dropped = feed.reviewed(update.reviewed, &rejected);
                self.forget_expiry(update.mux, update.feed, dropped);
            }
        }
    }

    /// Holds back requests and acknowledgements of a type on all streams until [`Core::resume`]; calls nest.
    /// Responses are still processed. This is how Envoy delays the acknowledgement of CDS while clusters warm.
    pub fn pause(&mut self, kind: &ResourceType) {
        *self.paused.entry(kind.clone()).or_insert(0) += 1;
    }

    /// Undoes one [`Core::pause`].
    pub fn resume(&mut self, kind: &ResourceType, now: Instant) {
        let Some(count) = self.paused.get_mut(kind) else { return };
        *count -= 1;
        if *count == 0 {
            self.paused.remove(kind);
            let ids: Vec<_> = self.muxes.keys().copied().collect();
            for id in ids {
                self.flush(id, now);
            }
        }
    }

    /// The next thing for the transport to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The next thing for the consumer to hear.
    pub fn poll_event(&mut self) -> Option<Event> {
        while let Some(event) = self.events.pop_front() {
            let alive = match &event {
                Event::Update(update) => self.outstanding.contains_key(&update.token),
                Event::Failed { sub, .. } => self.subs.contains_key(sub),
                Event::Connected { .. } | Event::Disconnected { .. } => true,
            };
            if alive {
                return Some(event);
            }
        }
        None
    }

    /// When [`Core::tick`] wants to be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Counters of a subscription.
    pub fn subscription_stats(&self, id: SubId) -> Option<&SubscriptionStats> {
        self.subs.get(&id).map(|sub| &sub.stats)
    }

    /// Hands over the counters of each subscription that has changed since the last call.
    pub fn drain_changed_stats(&mut self, mut each: impl FnMut(SubId, &SubscriptionStats)) {
        for id in self.changed_stats.drain() {
            if let Some(sub) = self.subs.get(&id) {
                each(id, &sub.stats);
            }
        }
    }

    /// The source of a subscription.
    pub fn mux_of(&self, id: SubId) -> Option<MuxId> {
        self.subs.get(&id).map(|sub| sub.mux)
    }

    /// Counters of a source.
    pub fn control_plane_stats(&self, id: MuxId) -> Option<&ControlPlaneStats> {
        self.muxes.get(&id).map(|state| &state.stats)
    }

    /// The source behind [`Source::Ads`], once it has been subscribed to.
    pub fn ads_mux(&self) -> Option<MuxId> {
        self.keys.get(&MuxKey::Ads).copied()
    }

    /// What the source behind [`Source::Ads`] speaks.
    pub fn ads_protocol(&self) -> Option<Protocol> {
        self.options.ads.as_ref().map(|source| source.protocol)
    }

    /// All resources of a type that are held, by source.
    pub fn held<'a>(&'a self, kind: &'a ResourceType) -> impl Iterator<Item = HeldResource<'a>> {
        self.muxes.iter().flat_map(move |(id, state)| {
            state.feeds.iter().filter(move |feed| feed.kind == *kind).flat_map(move |feed| {
                feed.inventory.iter().filter(|held| held.accepted).map(move |held| HeldResource {
                    mux: *id,
                    resource: &held.resource,
                    updated_unix_ms: held.updated_unix_ms,
                })
            })
        })
    }

    fn mux_for(&mut self, spec: &SubscriptionSpec) -> Result<MuxId, SubscribeError> {
        let kind = &spec.kind;
        let unavailable = |transport| SubscribeError::Unavailable { kind: kind.clone(), transport };
        let (key, what) = match &spec.source {
            Source::Ads => {
                let source = self.options.ads.clone().ok_or(SubscribeError::NoAds)?;
                (MuxKey::Ads, MuxKind::Ads(source))
            }
            Source::Grpc(source) => {
                let transport = match source.protocol {
                    Protocol::Sotw => "a state-of-the-world stream of its own",
                    Protocol::Delta => "a delta stream of its own",
                };
                let method = kind.method(source.protocol).ok_or_else(|| unavailable(transport))?;
                (MuxKey::Grpc(source.clone(), kind.clone()), MuxKind::Grpc(source.clone(), method))
            }
            Source::Path(path) => (MuxKey::Path(path.clone(), kind.clone()), MuxKind::Path(path.clone())),
            Source::Rest(rest) => {
                let endpoint = kind.rest_path().ok_or_else(|| unavailable("REST"))?;
                (MuxKey::Rest(rest.clone(), kind.clone()), MuxKind::Rest(rest.clone(), endpoint))
            }
        };
        if let Some(source) = what.grpc() {
            if source.services.is_empty() {
                return Err(SubscribeError::NoService);
            }
            if source.protocol == Protocol::Sotw && *kind == ResourceType::VirtualHost {
                return Err(unavailable("a state-of-the-world stream"));
            }
        }
        if let Some(id) = self.keys.get(&key) {
            return Ok(*id);
        }
        let id = MuxId(u32::try_from(self.next_serial()).unwrap_or(u32::MAX));
        self.keys.insert(key.clone(), id);
        self.muxes.insert(id, Mux::new(key, what));
        Ok(id)
    }

    fn remove_mux(&mut self, id: MuxId) {
        let Some(state) = self.muxes.remove(&id) else { return };
        self.keys.remove(&state.key);
        self.timers.clear_mux(id);
        if let Some(generation) = state.link.generation() {
            self.actions.push_back(Action::Close { stream: StreamId { mux: id, generation } });
        }
    }

    /// Adds and removes names of one subscription, tells the wire, and hands over what is already held.
    fn change_names(&mut self, id: SubId, add: Vec<Arc<str>>, remove: Vec<Arc<str>>, now: Instant) {
        let Some(sub) = self.subs.get_mut(&id) else { return };
        let (mux, index) = (sub.mux, sub.feed);
        let feed =
            &mut self.muxes.get_mut(&mux).expect("a mux lives as long as its subscriptions").feeds[index];
        let mut added = Vec::new();
        for name in add {
            if sub.names.insert(name.clone()) {
                feed.interest.add_name(id, &name);
                added.push(name);
            }
        }
        let mut dropped = Vec::new();
        let mut changed = !added.is_empty();
        for name in remove {
            if sub.names.remove(&name) {
                changed = true;
                dropped.extend(feed.remove_name(id, &name));
            }
        }
        if !changed {
            return;
        }
        sub.stats.update_attempt += 1;
        self.changed_stats.insert(id);
        self.forget_expiry(mux, index, dropped);
        self.deliver_held(id, Some(added), now);
        self.flush(mux, now);
    }

    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    fn unix_ms(&self, now: Instant) -> u64 {
        let since: Duration = now.saturating_duration_since(self.started);
        self.options.unix_ms + u64::try_from(since.as_millis()).unwrap_or(u64::MAX / 2)
    }

    fn feed(&mut self, mux: MuxId, feed: usize) -> Option<&mut Feed> {
        self.muxes.get_mut(&mux)?.feeds.get_mut(feed)
    }
}
