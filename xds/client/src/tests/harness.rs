//! A core, a virtual clock, a consumer in the manner of Envoy's cluster and listener managers, and the requests in
//! readable form.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;

use crate::wire;
use crate::{
    Action, Core, Event, Failure, GrpcService, GrpcSource, Interest, Options, Protocol, Rejection, Resource,
    ResourceType, Source, StreamId, SubId, SubscriptionSpec, Update, UpdateToken,
};

pub(super) use ResourceType::{
    Cluster as CDS, ClusterLoadAssignment as EDS, Listener as LDS, RouteConfiguration as RDS,
};

/// Stands for any resource: a name, the names of the resources it needs, and some content.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Toy {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) needs: Vec<String>,
    #[prost(string, tag = "3")]
    pub(super) content: String,
}

/// Content that a consumer refuses.
pub(super) const BAD: &str = "bad";

pub(super) fn toy(name: &str, needs: &[&str], content: &str) -> Toy {
    Toy { name: name.into(), needs: needs.iter().map(|&name| name.into()).collect(), content: content.into() }
}

pub(super) fn any(kind: &ResourceType, toy: &Toy) -> wire::Any {
    wire::Any { type_url: kind.url().to_owned().into(), value: toy.encode_to_vec().into() }
}

pub(super) fn wrapped(kind: &ResourceType, toy: &Toy, version: &str) -> wire::Resource {
    wire::Resource {
        name: toy.name.clone().into(),
        version: version.to_owned().into(),
        resource: Some(any(kind, toy)),
        ..Default::default()
    }
}

pub(super) fn sotw(kind: &ResourceType, version: &str, nonce: &str, toys: &[Toy]) -> Bytes {
    let response = wire::DiscoveryResponse {
        version_info: version.into(),
        resources: toys.iter().map(|toy| any(kind, toy)).collect(),
        type_url: kind.url().into(),
        nonce: nonce.into(),
        control_plane: None,
    };
    response.encode_to_vec().into()
}

pub(super) fn delta(
    kind: &ResourceType,
    version: &str,
    nonce: &str,
    resources: Vec<wire::Resource>,
    removed: &[&str],
) -> Bytes {
    let response = wire::DeltaDiscoveryResponse {
        system_version_info: version.into(),
        resources,
        type_url: kind.url().into(),
        nonce: nonce.into(),
        removed_resources: removed.iter().map(|&name| name.to_owned().into()).collect(),
        control_plane: None,
    };
    response.encode_to_vec().into()
}

/// A request of either protocol.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Seen {
    /// Last part of the type URL.
    pub(super) kind: String,
    pub(super) version: String,
    pub(super) names: BTreeSet<String>,
    pub(super) subscribe: BTreeSet<String>,
    pub(super) unsubscribe: BTreeSet<String>,
    pub(super) initial: BTreeMap<String, String>,
    pub(super) nonce: String,
    pub(super) error: Option<String>,
    pub(super) with_node: bool,
}

impl Seen {
    pub(super) fn decode(protocol: Protocol, message: &Bytes) -> Self {
        let short = |url: &str| url.rsplit('.').next().unwrap_or_default().to_owned();
        match protocol {
            Protocol::Sotw => {
                let request = wire::DiscoveryRequest::decode(message.clone()).expect("our own encoding");
                Self {
                    kind: short(&request.type_url),
                    version: request.version_info,
                    names: request.resource_names.into_iter().collect(),
                    nonce: request.response_nonce,
                    error: request.error_detail.map(|status| status.message),
                    with_node: request.node.is_some(),
                    ..Self::default()
                }
            }
            Protocol::Delta => {
                let request = wire::DeltaDiscoveryRequest::decode(message.clone()).expect("our own encoding");
                Self {
                    kind: short(&request.type_url),
                    subscribe: request.resource_names_subscribe.into_iter().collect(),
                    unsubscribe: request.resource_names_unsubscribe.into_iter().collect(),
                    initial: request.initial_resource_versions,
                    nonce: request.response_nonce,
                    error: request.error_detail.map(|status| status.message),
                    with_node: request.node.is_some(),
                    ..Self::default()
                }
            }
        }
    }
}

pub(super) fn spec(kind: ResourceType, interest: Interest) -> SubscriptionSpec {
    SubscriptionSpec {
        kind,
        source: Source::Ads,
        interest,
        init_fetch_timeout: Some(Duration::from_secs(15)),
    }
}

pub(super) fn named(kind: ResourceType, names: &[&str]) -> SubscriptionSpec {
    spec(kind, Interest::Names(names.iter().map(|&name| name.into()).collect()))
}

pub(super) fn options(protocol: Protocol, seed: u64) -> Options {
    let source = GrpcSource::new(protocol, GrpcService::new("xds_cluster"));
    Options {
        node: Bytes::from_static(b"\x0a\x04node"),
        ads: Some(Arc::new(source)),
        seed,
        unix_ms: 1_000_000,
    }
}

/// How the consumer treats what it gets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Manners {
    /// Refuse all of an update when one resource in it is bad, as Envoy does for validation errors of clusters.
    pub(super) all_or_nothing: bool,
    /// Pause CDS while a changed cluster waits for its endpoints to be sent anew, as Envoy does.
    pub(super) warm_slowly: bool,
    /// Subscribe to LDS only when the first clusters have their endpoints, as Envoy does.
    pub(super) listeners_after_clusters: bool,
}

/// Managers of clusters, endpoints, listeners and routes.
#[derive(Debug, Default)]
pub(super) struct Consumer {
    manners: Manners,
    pub(super) applied: BTreeMap<ResourceType, BTreeMap<Arc<str>, Resource>>,
    /// EDS subscriptions by cluster, RDS subscriptions by route configuration (a draining listener keeps its own).
    endpoints: BTreeMap<Arc<str>, SubId>,
    routes: BTreeMap<Arc<str>, SubId>,
    warming: BTreeSet<Arc<str>>,
    awaited: BTreeSet<Arc<str>>,
    listeners: bool,
    pub(super) updates: Vec<Update>,
    pub(super) failures: Vec<(SubId, Failure)>,
    pub(super) reasons: BTreeMap<Arc<str>, String>,
}

impl Consumer {
    pub(super) fn new(manners: Manners) -> Self {
        Self { manners, ..Self::default() }
    }

    pub(super) fn applied_content(&self, kind: &ResourceType, name: &str) -> Option<String> {
        let resource = self.applied.get(kind)?.get(name)?;
        Some(Toy::decode(resource.body.clone()).expect("a toy").content)
    }

    /// Names that the consumer wants to know of a type that is subscribed to by name.
    pub(super) fn wanted(&self, kind: &ResourceType) -> BTreeSet<Arc<str>> {
        let (parent, subs) = match kind {
            EDS => (CDS, &self.endpoints),
            _ => (LDS, &self.routes),
        };
        if parent == LDS {
            return subs.keys().cloned().collect();
        }
        self.needs(&parent)
    }

    fn needs(&self, parent: &ResourceType) -> BTreeSet<Arc<str>> {
        let parents = self.applied.get(parent).into_iter().flat_map(BTreeMap::values);
        parents
            .flat_map(|resource| Toy::decode(resource.body.clone()).expect("a toy").needs)
            .map(Into::into)
            .collect()
    }

    /// Applies an update and says what is wrong with it.
    pub(super) fn apply(&mut self, core: &mut Core, update: &Update, now: Instant) -> Vec<Rejection> {
        self.updates.push(update.clone());
        let mut rejected = Vec::new();
        let toys: Vec<_> = update
            .resources
            .iter()
            .map(|resource| Toy::decode(resource.body.clone()).expect("a toy"))
            .collect();
        let bad = |toy: &Toy| toy.content.starts_with(BAD);
        let refuse_all = self.manners.all_or_nothing && update.kind == CDS && toys.iter().any(bad);
        for (resource, toy) in update.resources.iter().zip(&toys) {
            if refuse_all || bad(toy) {
                let reason = self.reasons.get(&resource.name).cloned().unwrap_or_else(|| "it is bad".into());
                if !refuse_all || bad(toy) {
                    rejected.push(Rejection { name: resource.name.clone(), reason });
                } else {
                    // Refused silently: the list names the culprit only.
                    rejected.push(Rejection { name: resource.name.clone(), reason: String::new() });
                }
                continue;
            }
            let before = self
                .applied
                .entry(update.kind.clone())
                .or_default()
                .insert(resource.name.clone(), resource.clone());
            match update.kind {
                CDS => self.set_cluster(core, &resource.name, &toy.needs, before.is_some(), now),
                LDS => self.set_listener(core, &toy.needs, now),
                // What was held already does not end Envoy's wait.
                EDS if before.is_none_or(|before| before.body != resource.body) => {
                    self.set_endpoints(core, &resource.name, now);
                }
                _ => {}
            }
        }
        for name in &update.removed {
            self.applied.entry(update.kind.clone()).or_default().remove(name);
            if update.kind == CDS
                && let Some(sub) = self.endpoints.remove(name)
            {
                core.unsubscribe(sub, now);
            }
        }
        if self.manners.listeners_after_clusters
            && !self.listeners
            && update.kind != LDS
            && self.awaited.is_empty()
        {
            self.listeners = true;
            core.subscribe(spec(LDS, Interest::Wildcard), now).expect("ads is configured");
        }
        rejected
    }

    fn set_cluster(
        &mut self,
        core: &mut Core,
        name: &Arc<str>,
        needs: &[String],
        changed: bool,
        now: Instant,
    ) {
        let before = self.endpoints.remove(name);
        if !needs.is_empty() {
            let needs: Vec<&str> = needs.iter().map(String::as_str).collect();
            if !changed {
                self.awaited.extend(needs.iter().map(|&name| Arc::from(name)));
            }
            let sub = core.subscribe(named(EDS, &needs), now).expect("ads is configured");
            self.endpoints.insert(name.clone(), sub);
            if changed && self.manners.warm_slowly {
                self.warming.extend(needs.iter().map(|&name| Arc::from(name)));
                core.pause(&CDS);
            }
        }
        // The new cluster is there before the old one goes.
        if let Some(sub) = before {
            core.unsubscribe(sub, now);
        }
    }

    fn set_listener(&mut self, core: &mut Core, needs: &[String], now: Instant) {
        for name in needs {
            if !self.routes.contains_key(&**name) {
                let sub = core.subscribe(named(RDS, &[name]), now).expect("ads is configured");
                self.routes.insert(name.as_str().into(), sub);
            }
        }
    }

    fn set_endpoints(&mut self, core: &mut Core, name: &Arc<str>, now: Instant) {
        self.awaited.remove(name);
        if self.warming.remove(name) {
            core.resume(&CDS, now);
        }
    }

    /// `initial_fetch_timeout` of warming clusters: they go on with what they have.
    pub(super) fn stop_warming(&mut self, core: &mut Core, now: Instant) {
        for _ in std::mem::take(&mut self.warming) {
            core.resume(&CDS, now);
        }
    }
}

/// Core, clock and consumer together.
#[derive(Debug)]
pub(super) struct World {
    pub(super) core: Core,
    pub(super) protocol: Protocol,
    pub(super) now: Instant,
    pub(super) consumer: Consumer,
    pub(super) stream: Option<StreamId>,
    pub(super) opening: VecDeque<StreamId>,
    pub(super) requests: VecDeque<Seen>,
    /// Updates that were applied, but whose answer is being withheld.
    pub(super) withheld: Vec<(UpdateToken, Vec<Rejection>)>,
    pub(super) withhold: bool,
}

impl World {
    pub(super) fn new(protocol: Protocol, manners: Manners) -> Self {
        Self::with_options(protocol, manners, options(protocol, 1))
    }

    pub(super) fn with_options(protocol: Protocol, manners: Manners, options: Options) -> Self {
        let now = Instant::now();
        Self {
            core: Core::new(options, now),
            protocol,
            now,
            consumer: Consumer::new(manners),
            stream: None,
            opening: VecDeque::new(),
            requests: VecDeque::new(),
            withheld: Vec::new(),
            withhold: false,
        }
    }

    /// Subscribes and lets the stream come up.
    pub(super) fn subscribe(&mut self, spec: SubscriptionSpec) -> SubId {
        let id = self.core.subscribe(spec, self.now).expect("ads is configured");
        self.settle();
        id
    }

    pub(super) fn open(&mut self) {
        self.settle();
        let stream = self.opening.pop_front().expect("the core wants a stream");
        self.stream = Some(stream);
        self.core.stream_opened(stream, self.now);
        self.settle();
    }

    pub(super) fn close(&mut self) {
        let stream = self.stream.take().expect("a stream is open");
        self.core.stream_closed(stream, 14, "gone", self.now);
        self.settle();
    }

    /// Waits for the back-off and opens the next stream.
    pub(super) fn reopen(&mut self) {
        while self.opening.is_empty() {
            let at = self.core.next_deadline().expect("a back-off is running");
            self.advance(at - self.now);
        }
        self.open();
    }

    pub(super) fn advance(&mut self, by: Duration) {
        self.now += by;
        self.core.tick(self.now);
        self.settle();
    }

    pub(super) fn receive(&mut self, message: Bytes) {
        let stream = self.stream.expect("a stream is open");
        self.core.message(stream, message, self.now);
        self.settle();
    }

    pub(super) fn receive_sotw(&mut self, kind: &ResourceType, version: &str, nonce: &str, toys: &[Toy]) {
        self.receive(sotw(kind, version, nonce, toys));
    }

    pub(super) fn receive_delta(
        &mut self,
        kind: &ResourceType,
        version: &str,
        nonce: &str,
        toys: &[Toy],
        removed: &[&str],
    ) {
        let resources = toys.iter().map(|toy| wrapped(kind, toy, version)).collect();
        self.receive(delta(kind, version, nonce, resources, removed));
    }

    pub(super) fn answer_withheld(&mut self) {
        for (token, rejected) in std::mem::take(&mut self.withheld) {
            self.core.applied(token, rejected, self.now);
        }
        self.settle();
    }

    /// Lets transport and consumer do all that there is to do.
    pub(super) fn settle(&mut self) {
        loop {
            let mut idle = true;
            while let Some(action) = self.core.poll_action() {
                idle = false;
                match action {
                    Action::Open { stream, .. } => self.opening.push_back(stream),
                    Action::Send { stream, message } => {
                        assert_eq!(Some(stream), self.stream, "a request on a stream that is not open");
                        self.requests.push_back(Seen::decode(self.protocol, &message));
                        self.core.sent(stream, self.now);
                    }
                    Action::Close { stream } => {
                        if self.stream == Some(stream) {
                            self.stream = None;
                        }
                    }
                    Action::Watch { .. } | Action::Poll { .. } => unreachable!("only streams here"),
                }
            }
            if let Some(event) = self.core.poll_event() {
                idle = false;
                match event {
                    Event::Update(update) => {
                        let rejected = self.consumer.apply(&mut self.core, &update, self.now);
                        if self.withhold {
                            self.withheld.push((update.token, rejected));
                        } else {
                            self.core.applied(update.token, rejected, self.now);
                        }
                    }
                    Event::Failed { sub, failure } => self.consumer.failures.push((sub, failure)),
                    Event::Connected { .. } | Event::Disconnected { .. } => {}
                }
            }
            if idle {
                return;
            }
        }
    }

    pub(super) fn take_requests(&mut self) -> Vec<Seen> {
        self.requests.drain(..).collect()
    }

    pub(super) fn take_updates(&mut self) -> Vec<Update> {
        std::mem::take(&mut self.consumer.updates)
    }
}

/// Shorthand for a request in assertions: type, version or nothing, names or diffs, nonce, whether it refuses.
pub(super) fn brief(seen: &Seen) -> String {
    let mut text = seen.kind.clone();
    let list = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join(",");
    if !seen.version.is_empty() {
        text += &format!(" v{}", seen.version);
    }
    if !seen.names.is_empty() {
        text += &format!(" [{}]", list(&seen.names));
    }
    if !seen.subscribe.is_empty() {
        text += &format!(" +[{}]", list(&seen.subscribe));
    }
    if !seen.unsubscribe.is_empty() {
        text += &format!(" -[{}]", list(&seen.unsubscribe));
    }
    if !seen.initial.is_empty() {
        let held: Vec<_> = seen.initial.iter().map(|(name, version)| format!("{name}={version}")).collect();
        text += &format!(" held[{}]", held.join(","));
    }
    if !seen.nonce.is_empty() {
        text += &format!(" n={}", seen.nonce);
    }
    if seen.error.is_some() {
        text += " NACK";
    }
    text
}

pub(super) fn briefs(seen: &[Seen]) -> Vec<String> {
    seen.iter().map(brief).collect()
}
