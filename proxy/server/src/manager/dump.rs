//! What `/config_dump` shows of each resource.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

/// A resource as it was last accepted, and the last one that was refused.
#[derive(Clone, Debug)]
pub struct Dumped {
    /// The encoded message; empty while only a refused one is known.
    pub wire: Bytes,
    /// The version it came with; empty for static resources.
    pub version: Arc<str>,
    /// When it was accepted.
    pub last_updated: SystemTime,
    /// The last refusal since then.
    pub error: Option<Refused>,
}

/// A refused update (`error_state`).
#[derive(Clone, Debug)]
pub struct Refused {
    /// The encoded message.
    pub wire: Bytes,
    /// Its version.
    pub version: Arc<str>,
    /// When it was refused.
    pub at: SystemTime,
    /// Why.
    pub details: String,
}

impl Dumped {
    /// An accepted resource.
    pub fn accepted(wire: Bytes, version: Arc<str>) -> Self {
        Self { wire, version, last_updated: SystemTime::now(), error: None }
    }

    /// Records that an update was refused.
    pub fn refuse(slot: &mut Option<Self>, wire: Bytes, version: Arc<str>, details: String) {
        let now = SystemTime::now();
        let refused = Refused { wire, version, at: now, details };
        slot.get_or_insert_with(|| Self {
            wire: Bytes::new(),
            version: Arc::from(""),
            last_updated: now,
            error: None,
        })
        .error = Some(refused);
    }
}
