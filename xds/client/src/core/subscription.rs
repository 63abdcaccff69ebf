use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xxhash_rust::xxh64::xxh64;

use super::MuxId;

/// The counters of one subscription, with the meaning of Envoy's subscription stats.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SubscriptionStats {
    /// Requests started and responses handled.
    pub update_attempt: u64,
    /// Responses applied in full.
    pub update_success: u64,
    /// Connection failures.
    pub update_failure: u64,
    /// Responses refused, in whole or in part.
    pub update_rejected: u64,
    /// `initial_fetch_timeout` passed.
    pub init_fetch_timeout: u64,
    /// Milliseconds since the epoch of the last success.
    pub update_time: u64,
    /// How long the last update was with its consumer.
    pub update_duration: Duration,
    /// xxHash64 of the last accepted version.
    pub version: u64,
    /// The last accepted version.
    pub version_text: Arc<str>,
}

impl SubscriptionStats {
    pub(super) fn succeeded(&mut self, version: &Arc<str>, unix_ms: u64, took: Duration) {
        self.update_attempt += 1;
        self.update_success += 1;
        self.update_time = unix_ms;
        self.update_duration = took;
        if self.version_text != *version {
            self.version = xxh64(version.as_bytes(), 0);
            self.version_text = version.clone();
        }
    }

    pub(super) fn rejected(&mut self) {
        self.update_attempt += 1;
        self.update_rejected += 1;
    }

    pub(super) fn failed(&mut self) {
        self.update_attempt += 1;
        self.update_failure += 1;
    }

    pub(super) fn timed_out(&mut self) {
        self.update_attempt += 1;
        self.init_fetch_timeout += 1;
    }
}

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) mux: MuxId,
    pub(super) feed: usize,
    /// Explicit names; for wildcards and namespaces those asked for on demand.
    pub(super) names: BTreeSet<Arc<str>>,
    /// Set until the first update, refusal or timeout.
    pub(super) fetch_deadline: Option<Instant>,
    /// Whether the consumer has heard anything yet: a first response is delivered even when it is empty.
    pub(super) heard: bool,
    pub(super) stats: SubscriptionStats,
}

impl Subscription {
    pub(super) fn new(mux: MuxId, feed: usize, fetch_deadline: Option<Instant>) -> Self {
        Self {
            mux,
            feed,
            names: BTreeSet::new(),
            fetch_deadline,
            heard: false,
            stats: SubscriptionStats { update_attempt: 1, ..SubscriptionStats::default() },
        }
    }
}
