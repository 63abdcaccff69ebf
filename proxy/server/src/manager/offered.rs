//! A listener or cluster as it is offered to its manager.

use std::sync::Arc;

use bytes::Bytes;

/// A resource and where it comes from.
#[derive(Debug)]
pub struct Offered<'a, M> {
    /// The message.
    pub proto: &'a M,
    /// Its encoded form.
    pub wire: Bytes,
    /// The version it came with; empty for static resources.
    pub version: &'a Arc<str>,
    /// By xDS rather than from the bootstrap.
    pub dynamic: bool,
}
