use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::feed::Feed;
use super::pacing::{Backoff, TokenBucket};
use super::{MuxKey, Via};
use crate::{BackoffSpec, GrpcService, GrpcSource, PathSource, Protocol, ResourceType, RestSource};

/// Requests handed to the transport and not yet sent. Beyond it they wait here, where they cost nothing and
/// melt together.
const SEND_WINDOW: usize = 16;

/// Attempts on one server without any answer before the other one is tried (Envoy's `GrpcMuxFailover`).
const FAILURES_BEFORE_FAILOVER: u32 = 2;

/// The state of a source, with Envoy's `control_plane.*` names.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ControlPlaneStats {
    /// Whether the stream is up.
    pub connected: bool,
    /// Types that have something to send and may not yet.
    pub pending_requests: u64,
    /// Times that the rate limit held a request back.
    pub rate_limit_enforced: u64,
    /// How the server calls itself.
    pub identifier: String,
}

#[derive(Clone, Debug)]
pub(super) enum MuxKind {
    Ads(Arc<GrpcSource>),
    /// With the method of the type's own service.
    Grpc(Arc<GrpcSource>, &'static str),
    Path(Arc<PathSource>),
    /// With the path of the endpoint.
    Rest(Arc<RestSource>, &'static str),
}

impl MuxKind {
    pub(super) fn grpc(&self) -> Option<&Arc<GrpcSource>> {
        match self {
            Self::Ads(source) | Self::Grpc(source, _) => Some(source),
            Self::Path(_) | Self::Rest(..) => None,
        }
    }

    pub(super) fn protocol(&self) -> Protocol {
        self.grpc().map_or(Protocol::Sotw, |source| source.protocol)
    }
}

/// The state of the connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Link {
    /// Nobody has subscribed yet.
    Idle,
    /// Until the end of a back-off.
    Waiting(Instant),
    /// Waiting for the transport.
    Opening(u64),
    /// Up. Files and REST endpoints are up from the start.
    Open(u64),
}

impl Link {
    pub(super) fn generation(self) -> Option<u64> {
        match self {
            Self::Opening(generation) | Self::Open(generation) => Some(generation),
            Self::Idle | Self::Waiting(_) => None,
        }
    }
}

/// One source: a stream with its types, or a file or an endpoint with its only one.
#[derive(Debug)]
pub(super) struct Mux {
    pub(super) key: MuxKey,
    pub(super) kind: MuxKind,
    pub(super) link: Link,
    /// In the order of first subscription, which is the order of the first requests on a new stream.
    pub(super) feeds: Vec<Feed>,
    pub(super) subscribers: usize,
    /// Feeds that want to send, longest waiting first.
    queue: VecDeque<usize>,
    pub(super) backoff: Backoff,
    pub(super) limiter: Option<TokenBucket>,
    /// When the limiter's timer fires.
    pub(super) refill: Option<Instant>,
    /// Messages with the transport.
    pub(super) in_flight: usize,
    pub(super) node_sent: bool,
    /// Index of the server in use, and of the one that gave us what we hold.
    service: usize,
    origin: Option<usize>,
    silent_failures: u32,
    /// REST: when the next poll is due; `None` while one is under way.
    pub(super) next_poll: Option<Instant>,
    pub(super) stats: ControlPlaneStats,
}

impl Mux {
    pub(super) fn new(key: MuxKey, kind: MuxKind) -> Self {
        let source = kind.grpc();
        Self {
            link: Link::Idle,
            feeds: Vec::new(),
            subscribers: 0,
            queue: VecDeque::new(),
            backoff: Backoff::new(source.map_or_else(BackoffSpec::default, |source| source.backoff)),
            limiter: source.and_then(|source| source.rate_limit).map(TokenBucket::new),
            refill: None,
            in_flight: 0,
            node_sent: false,
            service: 0,
            origin: None,
            silent_failures: 0,
            next_poll: None,
            stats: ControlPlaneStats::default(),
            key,
            kind,
        }
    }

    /// The feed of a type, made if need be.
    pub(super) fn feed_index(&mut self, kind: &ResourceType) -> usize {
        self.feeds.iter().position(|feed| feed.kind == *kind).unwrap_or_else(|| {
            self.feeds.push(Feed::new(kind.clone(), self.kind.protocol()));
            self.feeds.len() - 1
        })
    }

    pub(super) fn find_feed(&self, type_url: &str) -> Option<usize> {
        self.feeds.iter().position(|feed| feed.kind.url() == type_url)
    }

    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.link.generation() == Some(generation)
    }

    /// The server to connect to, and the method to call there.
    pub(super) fn destination(&self) -> Option<(Arc<GrpcService>, &'static str)> {
        let (source, method) = match &self.kind {
            MuxKind::Ads(source) => (source, source.protocol.aggregated_method()),
            MuxKind::Grpc(source, method) => (source, *method),
            MuxKind::Path(_) | MuxKind::Rest(..) => return None,
        };
        Some((source.services[self.service].clone(), method))
    }

    /// What to call the source in a log line.
    pub(super) fn target(&self) -> Arc<str> {
        match &self.kind {
            MuxKind::Ads(source) | MuxKind::Grpc(source, _) => source.services[self.service].target.clone(),
            MuxKind::Path(path) => path.path.to_string_lossy().into(),
            MuxKind::Rest(rest, _) => rest.target.clone(),
        }
    }

    /// What kind of source it is.
    pub(super) fn via(&self) -> Via {
        match &self.kind {
            MuxKind::Ads(source) => Via::Stream(source.protocol.aggregated_method()),
            MuxKind::Grpc(_, method) => Via::Stream(method),
            MuxKind::Path(_) => Via::File,
            MuxKind::Rest(_, endpoint) => Via::Poll(endpoint),
        }
    }

    /// Whether what we hold came from the server in use; versions mean nothing to another one.
    pub(super) fn resumes(&self) -> bool {
        self.origin.is_none_or(|origin| origin == self.service)
    }

    /// The server in use has answered.
    pub(super) fn note_response(&mut self) {
        self.backoff.reset();
        self.silent_failures = 0;
        self.origin = Some(self.service);
    }

    /// The stream ended; after two attempts in vain the other server is next.
    pub(super) fn note_failure(&mut self) {
        self.silent_failures += 1;
        let servers = self.kind.grpc().map_or(1, |source| source.services.len());
        if servers > 1 && self.silent_failures >= FAILURES_BEFORE_FAILOVER {
            self.silent_failures = 0;
            self.service = (self.service + 1) % servers;
        }
    }

    pub(super) fn node_on_first_message_only(&self) -> bool {
        self.kind.grpc().is_some_and(|source| source.node_on_first_message_only)
    }

    pub(super) fn has_window(&self) -> bool {
        self.in_flight < SEND_WINDOW
    }

    /// The feed whose turn it is to send. Feeds keep their place in the queue while they are held back.
    pub(super) fn next_to_send(&mut self, is_paused: impl Fn(&ResourceType) -> bool) -> Option<usize> {
        for index in 0..self.feeds.len() {
            if self.feeds[index].wants_to_send() && !self.queue.contains(&index) {
                self.queue.push_back(index);
            }
        }
        let feeds = &self.feeds;
        self.queue.retain(|index| feeds[*index].wants_to_send());
        self.stats.pending_requests = self.queue.len() as u64;
        self.queue.iter().copied().find(|index| !is_paused(&self.feeds[*index].kind))
    }

    /// The feed has sent: it goes to the back of the queue if it has more.
    pub(super) fn sent(&mut self, feed: usize) {
        self.queue.retain(|index| *index != feed);
    }

    pub(super) fn forget_queue(&mut self) {
        self.queue.clear();
    }
}
