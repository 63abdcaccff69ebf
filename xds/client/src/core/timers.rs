use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::{MuxId, SubId};

/// What a deadline is for.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Timer {
    /// `initial_fetch_timeout`.
    Fetch(SubId),
    /// End of a back-off.
    Reconnect(MuxId),
    /// The rate limiter has a token again.
    Refill(MuxId),
    /// Next REST poll.
    Poll(MuxId),
    /// TTL of a resource of the mux's n-th feed.
    Expiry(MuxId, usize, Arc<str>),
}

impl Timer {
    fn mux(&self) -> Option<MuxId> {
        match self {
            Self::Fetch(_) => None,
            Self::Reconnect(mux) | Self::Refill(mux) | Self::Poll(mux) | Self::Expiry(mux, ..) => Some(*mux),
        }
    }
}

/// All deadlines in order. Whoever sets one remembers the instant, so that it can be taken out exactly and
/// nothing stale piles up.
#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(Instant, Timer)>);

impl Timers {
    pub(super) fn set(&mut self, at: Instant, timer: Timer) {
        self.0.insert((at, timer));
    }

    pub(super) fn clear(&mut self, at: Instant, timer: &Timer) {
        self.0.remove(&(at, timer.clone()));
    }

    pub(super) fn clear_mux(&mut self, mux: MuxId) {
        self.0.retain(|(_, timer)| timer.mux() != Some(mux));
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.0.first().map(|(at, _)| *at)
    }

    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        if self.next()? > now {
            return None;
        }
        self.0.pop_first().map(|(_, timer)| timer)
    }
}
