use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use waystation_xds::{Protocol, ResourceType, wire};

use super::feed::{Answer, Feed, Part};
use super::{Peer, RequestError};
use crate::Snapshot;
use crate::status::{FeedStatus, Refusal, StreamStatus};

/// How long a change waits for the acknowledgement of what has to be there before it. A client that takes a
/// cluster only when its endpoints are there, and never gets them, must not miss everything else.
const PATIENCE: Duration = Duration::from_secs(15);

/// Types on one stream.
const MAX_TYPES: usize = 64;

/// Names shown per type in the status.
const SHOWN_NAMES: usize = 20;

/// One stream of a client, and the order in which changes go out on it.
///
/// Make before break: first what traffic is sent to (clusters, endpoints, their secrets), then, when the client
/// has confirmed that, what sends traffic there (listeners, routes), and when that is confirmed, removals. A type
/// has at most one response under way, so what waits for a slow client is bounded by the number of types.
#[derive(Debug)]
pub(super) struct Stream {
    protocol: Protocol,
    /// The type of a stream that serves only one.
    own: Option<ResourceType>,
    peer: String,
    node: Option<Node>,
    /// Sorted by [`rank`].
    feeds: Vec<Feed>,
    nonces: u64,
    /// Since when a change waits for an earlier one.
    blocked: Option<Instant>,
}

/// What a request brought about, beside responses.
#[derive(Debug)]
pub(super) enum Notice {
    Joined,
    Refused { kind: ResourceType, version: String, message: String },
}

/// What this server shows of `envoy.config.core.v3.Node`.
#[derive(Clone, PartialEq, prost::Message)]
struct Node {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    cluster: String,
    #[prost(string, tag = "6")]
    user_agent_name: String,
}

impl Stream {
    pub(super) fn new(peer: Peer) -> Self {
        Self {
            protocol: peer.protocol,
            own: peer.kind,
            peer: peer.address,
            node: None,
            feeds: Vec::new(),
            nonces: 0,
            blocked: None,
        }
    }

    /// Takes a request apart; [`Self::pump`] answers it.
    pub(super) fn request(&mut self, message: Bytes) -> Result<Vec<Notice>, RequestError> {
        match self.protocol {
            Protocol::Sotw => {
                let request = wire::DiscoveryRequest::decode(message).map_err(RequestError::Malformed)?;
                let mut notices = self.identify(request.node)?;
                let feed = self.feed(&request.type_url)?;
                let answer = feed.answered(&request.response_nonce, request.error_detail);
                feed.subscribe_sotw(request.resource_names)?;
                notices.extend(refusal(feed, &answer));
                Ok(notices)
            }
            Protocol::Delta => {
                let request =
                    wire::DeltaDiscoveryRequest::decode(message).map_err(RequestError::Malformed)?;
                let mut notices = self.identify(request.node)?;
                let feed = self.feed(&request.type_url)?;
                let answer = feed.answered(&request.response_nonce, request.error_detail);
                feed.subscribe_delta(
                    request.resource_names_subscribe,
                    &request.resource_names_unsubscribe,
                    request.initial_resource_versions,
                )?;
                notices.extend(refusal(feed, &answer));
                Ok(notices)
            }
        }
    }

    /// The snapshot is another one; these assignments belong to clusters that have changed.
    pub(super) fn invalidate(&mut self, eds_names: &BTreeSet<Arc<str>>) {
        let endpoints_only = self.own == Some(ResourceType::ClusterLoadAssignment);
        for feed in &mut self.feeds {
            feed.invalidate();
            if endpoints_only {
                eds_names.iter().for_each(|name| feed.forget(name));
            }
        }
    }

    /// Sends what may be sent now.
    pub(super) fn pump(&mut self, snapshot: &Snapshot, now: Instant, mut send: impl FnMut(Bytes)) {
        let impatient = self.blocked.is_some_and(|since| now >= since + PATIENCE);
        let mut blocked = false;
        let (mut settled, mut all_sent) = (true, true);
        let mut index = 0;
        for group in [Group::Destination, Group::Source] {
            // Changes wait for confirmation; what a client asks for only until what it may refer to is on its way.
            let (open, may_answer) = (settled || impatient, all_sent || impatient);
            while index < self.feeds.len() && rank(self.feeds[index].kind()).0 == group {
                let feed = &mut self.feeds[index];
                index += 1;
                let pending = feed.pending(snapshot);
                if feed.is_outstanding() {
                    settled = false;
                    all_sent &= !pending.updates;
                    continue;
                }
                let part = if open && (pending.updates || pending.answer) {
                    Part::Updates
                } else if pending.answer && may_answer {
                    Part::Answer
                } else {
                    let waits = pending.updates || pending.answer;
                    settled &= !waits;
                    blocked |= waits;
                    continue;
                };
                settled = false;
                self.respond(index - 1, part, snapshot, &mut send);
            }
        }
        // In the other direction: nothing may point at what goes.
        for index in (0..self.feeds.len()).rev() {
            let feed = &mut self.feeds[index];
            if feed.is_outstanding() || !feed.pending(snapshot).removals {
                continue;
            }
            if settled || impatient {
                self.respond(index, Part::Removals, snapshot, &mut send);
            } else {
                blocked = true;
            }
        }
        self.blocked = blocked.then(|| self.blocked.unwrap_or(now));
    }

    /// When to pump again though nothing happened.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.blocked.map(|since| since + PATIENCE)
    }

    /// `node 'id'`, or the address while the node is not known.
    pub(super) fn title(&self) -> String {
        match &self.node {
            Some(node) => format!("node '{}' ({})", node.id, self.peer),
            None => self.peer.clone(),
        }
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.feeds.iter().map(Feed::held).sum()
    }

    pub(super) fn status(&self) -> StreamStatus {
        let node = self.node.clone().unwrap_or_default();
        StreamStatus {
            node: node.id,
            cluster: node.cluster,
            user_agent: node.user_agent_name,
            peer: self.peer.clone(),
            protocol: match self.protocol {
                Protocol::Sotw => "state of the world",
                Protocol::Delta => "delta",
            },
            service: self.own.as_ref().map_or("ADS".to_owned(), |kind| format!("{kind:?}")),
            types: self.feeds.iter().map(feed_status).collect(),
        }
    }

    fn respond(&mut self, index: usize, part: Part, snapshot: &Snapshot, send: &mut impl FnMut(Bytes)) {
        self.nonces += 1;
        let response = self.feeds[index].respond(part, snapshot, self.nonces.to_string());
        send(response.message);
        // Envoy warms a changed cluster until it hears of its endpoints, but asks only for names that it has not
        // asked for before.
        let endpoints =
            self.feeds.iter_mut().find(|feed| *feed.kind() == ResourceType::ClusterLoadAssignment);
        if let Some(endpoints) = endpoints {
            response.eds_names.iter().for_each(|name| endpoints.forget(name));
        }
    }

    fn identify(&mut self, node: Option<Bytes>) -> Result<Vec<Notice>, RequestError> {
        let Some(node) = node else { return Ok(Vec::new()) };
        let first = self.node.is_none();
        self.node = Some(Node::decode(node).map_err(RequestError::Malformed)?);
        Ok(if first { vec![Notice::Joined] } else { Vec::new() })
    }

    /// The feed of the type that a request names.
    fn feed(&mut self, type_url: &str) -> Result<&mut Feed, RequestError> {
        let kind = match &self.own {
            Some(own) if type_url.is_empty() || own.url() == type_url => own.clone(),
            Some(_) => return Err(RequestError::OtherType(type_url.to_owned())),
            None if type_url.is_empty() => return Err(RequestError::NoType),
            None => ResourceType::from_url(type_url),
        };
        let index = match self.feeds.binary_search_by(|feed| rank(feed.kind()).cmp(&rank(&kind))) {
            Ok(index) => index,
            Err(_) if self.feeds.len() >= MAX_TYPES => return Err(RequestError::TooManyTypes),
            Err(index) => {
                self.feeds.insert(index, Feed::new(self.protocol, kind));
                index
            }
        };
        Ok(&mut self.feeds[index])
    }
}

/// What a resource is to traffic.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Group {
    /// Where it goes.
    Destination,
    /// Where it comes from and what sends it on.
    Source,
}

/// The order of types on a stream.
fn rank(kind: &ResourceType) -> (Group, u8, &str) {
    let (group, place) = match kind {
        ResourceType::Runtime => (Group::Destination, 0),
        ResourceType::Cluster => (Group::Destination, 1),
        ResourceType::ClusterLoadAssignment => (Group::Destination, 2),
        ResourceType::Secret => (Group::Destination, 3),
        ResourceType::Other(_) => (Group::Destination, 4),
        ResourceType::Listener => (Group::Source, 0),
        ResourceType::ScopedRouteConfiguration => (Group::Source, 1),
        ResourceType::RouteConfiguration => (Group::Source, 2),
        ResourceType::VirtualHost => (Group::Source, 3),
        ResourceType::ExtensionConfig => (Group::Source, 4),
    };
    (group, place, kind.url())
}

fn refusal(feed: &Feed, answer: &Answer) -> Option<Notice> {
    let refused = feed.versions().2.filter(|_| *answer == Answer::Refused)?;
    Some(Notice::Refused {
        kind: feed.kind().clone(),
        version: refused.version.clone(),
        message: refused.message.clone(),
    })
}

fn feed_status(feed: &Feed) -> FeedStatus {
    let (sent, acked, refused) = feed.versions();
    FeedStatus {
        type_url: feed.kind().url().to_owned(),
        wildcard: feed.is_wildcard(),
        subscribed: feed.names().len(),
        names: feed.names().iter().take(SHOWN_NAMES).map(|name| name.to_string()).collect(),
        sent: sent.map(str::to_owned),
        acknowledged: acked.map(str::to_owned),
        awaiting_answer: feed.is_outstanding(),
        refused: refused
            .map(|refused| Refusal { version: refused.version.clone(), detail: refused.message.clone() }),
    }
}
