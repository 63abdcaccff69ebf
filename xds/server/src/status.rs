//! What the admin endpoint shows.

use std::collections::BTreeMap;

use serde::Serialize;

pub use crate::file::Fault;

/// Everything a user wants to know of a running server.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Each type that is served, by its URL.
    pub types: BTreeMap<String, TypeStatus>,
    /// Each file, by its path in the folder.
    pub files: BTreeMap<String, FileStatus>,
    /// References from what is served to what is not.
    pub warnings: Vec<String>,
    /// The open streams.
    pub streams: Vec<StreamStatus>,
}

/// One type.
#[derive(Clone, Debug, Serialize)]
pub struct TypeStatus {
    /// The hash of all its resources.
    pub version: String,
    /// How many there are.
    pub resources: usize,
}

/// One file.
#[derive(Clone, Debug, Serialize)]
pub struct FileStatus {
    /// Why its content is not served. What is served instead is the last version of it that was good, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// How many resources of it are served.
    pub resources: usize,
    /// What is served and may still not be meant.
    pub warnings: Vec<Fault>,
}

/// One stream of a client.
#[derive(Clone, Debug, Serialize)]
pub struct StreamStatus {
    /// The node's id; empty until the first request.
    pub node: String,
    /// The node's cluster.
    pub cluster: String,
    /// The node's software.
    pub user_agent: String,
    /// The address it came from.
    pub peer: String,
    /// "state of the world" or "delta".
    pub protocol: &'static str,
    /// "ADS", or the one type that is served.
    pub service: String,
    /// The types that were asked for.
    pub types: Vec<FeedStatus>,
}

/// One type on a stream.
#[derive(Clone, Debug, Serialize)]
pub struct FeedStatus {
    /// The type.
    pub type_url: String,
    /// Whether everything was asked for.
    pub wildcard: bool,
    /// How many names were asked for.
    pub subscribed: usize,
    /// The first of them.
    pub names: Vec<String>,
    /// The version sent last.
    pub sent: Option<String>,
    /// The version acknowledged last.
    pub acknowledged: Option<String>,
    /// Whether the client has still to answer.
    pub awaiting_answer: bool,
    /// The last response, if it was refused.
    pub refused: Option<Refusal>,
}

/// A response that a client refused.
#[derive(Clone, Debug, Serialize)]
pub struct Refusal {
    /// The version that was refused.
    pub version: String,
    /// The client's words.
    pub detail: String,
}
