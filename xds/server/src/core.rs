//! The state machine: requests and snapshots in, responses out. No I/O, no clock. Bottom up: `feed` (one type on
//! one stream), `stream` (the order of types on a stream), and here all streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use waystation_xds::{Protocol, ResourceType};

use crate::Snapshot;
use crate::status::StreamStatus;

mod feed;
mod stream;

use self::stream::{Notice, Stream};

/// Serves a snapshot to any number of streams.
#[derive(Debug, Default)]
pub struct Core {
    snapshot: Arc<Snapshot>,
    streams: BTreeMap<StreamId, Stream>,
    opened: u64,
}

/// A stream, for as long as it is open.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct StreamId(u64);

/// Who opened a stream, and for what.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address, as shown in the status.
    pub address: String,
    /// State of the world or delta.
    pub protocol: Protocol,
    /// The type of a stream that serves only one; `None` for ADS.
    pub kind: Option<ResourceType>,
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Output {
    /// Encoded responses, in order.
    pub messages: Vec<(StreamId, Bytes)>,
    /// What the console should say.
    pub notices: Vec<String>,
}

/// A request that ends its stream.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not the message of the method.
    #[error("malformed request: {0}")]
    Malformed(prost::DecodeError),
    /// Over ADS, each request names its type.
    #[error("type_url is missing")]
    NoType,
    /// The stream of one type was asked for another.
    #[error("type_url {0} does not belong to this method")]
    OtherType(String),
    /// More types than there are.
    #[error("too many types on one stream")]
    TooManyTypes,
    /// More names than anyone has.
    #[error("too many resource names")]
    TooManyNames,
}

impl Core {
    /// Serves `snapshot`.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self { snapshot, ..Self::default() }
    }

    /// What is served.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// A client has opened a stream.
    pub fn open(&mut self, peer: Peer) -> StreamId {
        let id = StreamId(self.opened);
        self.opened += 1;
        self.streams.insert(id, Stream::new(peer));
        id
    }

    /// A stream has ended; says which one it was.
    pub fn close(&mut self, id: StreamId) -> Option<String> {
        self.streams.remove(&id).map(|stream| stream.title())
    }

    /// A client has sent an encoded request. After an error the stream is to be ended.
    pub fn request(&mut self, id: StreamId, message: Bytes, now: Instant) -> Result<Output, RequestError> {
        let mut output = Output::default();
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(output) };
        for notice in stream.request(message)? {
            output.notices.push(match notice {
                Notice::Joined => format!("{} connected", stream.title()),
                Notice::Refused { kind, version, message } => {
                    format!("{} refused {kind:?} version {version}: {}", stream.title(), message.trim_end())
                }
            });
        }
        stream.pump(&self.snapshot, now, |message| output.messages.push((id, message)));
        Ok(output)
    }

    /// Serves another snapshot from now on.
    pub fn publish(&mut self, snapshot: Arc<Snapshot>, now: Instant) -> Output {
        let eds_names = changed_eds_clusters(&self.snapshot, &snapshot);
        self.snapshot = snapshot;
        for stream in self.streams.values_mut() {
            stream.invalidate(&eds_names);
        }
        self.tick(now)
    }

    /// Sends what has waited long enough; due at [`Self::next_deadline`].
    pub fn tick(&mut self, now: Instant) -> Output {
        let mut output = Output::default();
        for (id, stream) in &mut self.streams {
            stream.pump(&self.snapshot, now, |message| output.messages.push((*id, message)));
        }
        output
    }

    /// When [`Self::tick`] is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.streams.values().filter_map(Stream::deadline).min()
    }

    /// The open streams.
    pub fn streams(&self) -> impl Iterator<Item = StreamStatus> {
        self.streams.values().map(Stream::status)
    }

    /// How many resources, there or not, are remembered for the clients.
    #[cfg(test)]
    fn held(&self) -> usize {
        self.streams.values().map(Stream::held).sum()
    }
}

/// The assignments of EDS clusters that are new or changed.
fn changed_eds_clusters(old: &Snapshot, new: &Snapshot) -> BTreeSet<Arc<str>> {
    let old = old.of(&ResourceType::Cluster);
    let changed = new
        .of(&ResourceType::Cluster)
        .values()
        .filter(|cluster| old.get(cluster.name()).is_none_or(|before| before.version() != cluster.version()));
    changed.filter_map(|cluster| cluster.eds_name().cloned()).collect()
}

#[cfg(test)]
mod tests;
