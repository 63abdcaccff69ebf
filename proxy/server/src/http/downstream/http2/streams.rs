//! The streams of a connection: how many are under way, and whether its client resets too many of them.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use waystation_filter_api::runtime::{Runtime, RuntimeInteger};

use crate::http::frames::Watch;

/// When a client that resets its requests before they have a response is to be cut off (CVE-2023-44487).
#[derive(Debug)]
pub(crate) struct PrematureResets {
    /// Half as many of them end the connection; from so many streams on, half of all.
    total: RuntimeInteger,
    /// A stream that is older, in seconds, is not reset prematurely.
    min_lifetime: RuntimeInteger,
}

impl PrematureResets {
    pub(crate) fn new(runtime: &Runtime) -> Self {
        Self {
            total: runtime.integer("overload.premature_reset_total_stream_count", 500),
            min_lifetime: runtime.integer("overload.premature_reset_min_stream_lifetime_seconds", 1),
        }
    }

    /// Whether a stream of this age ended too early.
    fn is_premature(&self, age: Duration) -> bool {
        age.as_secs() <= self.min_lifetime.get()
    }

    /// Whether so many premature ones among the streams that are over are too many.
    fn are_too_many(&self, premature: u64, over: u64) -> bool {
        premature.saturating_mul(2) >= over.max(self.total.get())
    }
}

/// The streams of a connection.
pub(super) struct Streams {
    active: Cell<usize>,
    /// A response was the last of the connection.
    pub(super) last: Cell<bool>,
    /// The overload manager ends the connection: at once, with all that is under way, or when that is over.
    pub(super) forced: Cell<bool>,
    pub(super) drain: Cell<bool>,
    /// When the last of them ended.
    idle_since: Cell<Instant>,
    /// How many are over, and were so without a response soon after they began.
    over: Cell<u64>,
    premature: Cell<u64>,
    pub(super) watch: Rc<Watch>,
}

impl Streams {
    pub(super) fn new(start: Instant, watch: &Rc<Watch>) -> Rc<Self> {
        Rc::new(Self {
            active: Cell::new(0),
            last: Cell::new(false),
            forced: Cell::new(false),
            drain: Cell::new(false),
            idle_since: Cell::new(start),
            over: Cell::new(0),
            premature: Cell::new(0),
            watch: Rc::clone(watch),
        })
    }

    pub(super) fn are_active(&self) -> bool {
        self.active.get() > 0
    }

    /// Since when there is none.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        (!self.are_active()).then(|| self.idle_since.get())
    }

    /// A stream of this age is over, with this response code or with none.
    pub(super) fn ended(&self, code: Option<u16>, age: Duration, limits: &PrematureResets) {
        self.over.set(self.over.get() + 1);
        if code.is_none() && limits.is_premature(age) {
            self.premature.set(self.premature.get() + 1);
            if limits.are_too_many(self.premature.get(), self.over.get()) {
                self.watch.reset_too_often();
            }
        }
    }
}

/// One of them.
pub(super) struct Active(pub(super) Rc<Streams>);

impl Active {
    pub(super) fn new(streams: &Rc<Streams>) -> Self {
        streams.active.set(streams.active.get() + 1);
        streams.watch.stats.streams_active().inc();
        Self(Rc::clone(streams))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        // The library wakes the connection's task when a stream goes, so that it looks at its idle timeout.
        self.0.active.set(self.0.active.get() - 1);
        if self.0.active.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
        self.0.watch.stats.streams_active().dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_limit_or_half_of_all_are_too_many() {
        let limits = PrematureResets::new(&Runtime::new());
        for (premature, over, too_many) in [
            (249, 249, false),
            (250, 250, true),
            (249, 499, false),
            (250, 500, true),
            (299, 600, false),
            (300, 600, true),
        ] {
            assert_eq!(limits.are_too_many(premature, over), too_many, "{premature} of {over}");
        }
        assert!(limits.is_premature(Duration::from_millis(1999)));
        assert!(!limits.is_premature(Duration::from_secs(2)));
    }
}
