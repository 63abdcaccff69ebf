//! Draining: connections learn that they are to end, all at once or spread over the drain time.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use slab::Slab;

use crate::context::Shared;

/// One worker's drain state of a listener or filter chain; clones share it.
#[derive(Clone, Debug, Default)]
pub struct DrainHandle(Rc<State>);

#[derive(Debug, Default)]
struct State {
    started: Cell<Option<Started>>,
    /// While the operator fails the health check, every response closes its connection.
    health: Option<Arc<Shared>>,
    waiting: RefCell<Slab<Waker>>,
    /// How often draining has started; each time empties `waiting`.
    starts: Cell<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Started {
    at: Instant,
    /// How long draining is spread over; zero is at once.
    over: Duration,
}

/// A connection's place among those that are woken when draining starts.
#[derive(Debug)]
pub struct DrainWait {
    handle: DrainHandle,
    /// The place, and after which start it was taken.
    slot: Option<(usize, u32)>,
}

impl DrainHandle {
    /// A state in which nothing drains.
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`Self::new`]; connections are also closed while `/healthcheck/fail` is in force.
    pub fn with_health_check(shared: &Arc<Shared>) -> Self {
        Self(Rc::new(State { health: Some(Arc::clone(shared)), ..State::default() }))
    }

    /// Starts draining. With `over` (the gradual strategy) the share of responses that close their connection grows
    /// from none to all within that time; zero (the immediate strategy) closes with every response. A drain that goes on
    /// is only ever made to end earlier.
    pub fn start(&self, now: Instant, over: Duration) {
        if self.0.started.get().is_some_and(|started| started.at + started.over <= now + over) {
            return;
        }
        self.0.started.set(Some(Started { at: now, over }));
        self.0.starts.set(self.0.starts.get() + 1);
        for waker in self.0.waiting.borrow_mut().drain() {
            waker.wake();
        }
    }

    /// Whether draining has started.
    #[inline]
    pub fn is_draining(&self) -> bool {
        self.0.started.get().is_some()
    }

    /// Whether this response should close its connection: Envoy's `DrainManagerImpl::drainClose`, in which the
    /// probability is the elapsed share of the drain time.
    #[inline]
    pub fn should_close(&self, now: Instant, random: u64) -> bool {
        match self.0.started.get() {
            None => self.0.health.as_ref().is_some_and(|shared| shared.health_check_failed()),
            Some(started) => started.closes(now, random),
        }
    }

    /// When a connection that can give notice without a response, as HTTP/2 can, does so: spread over the drain time.
    pub fn go_away_at(&self, connection: u64) -> Option<Instant> {
        let started = self.0.started.get()?;
        let millis = u64::try_from(started.over.as_millis()).unwrap_or(u64::MAX).max(1);
        // Connections are numbered in turn: the product of an odd number spreads them (Knuth, TAOCP 6.4).
        let spread = connection.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        Some(started.at + Duration::from_millis(spread % millis))
    }

    /// A place to wait in; [`DrainWait::due`] puts a waker there.
    pub fn waiter(&self) -> DrainWait {
        DrainWait { handle: self.clone(), slot: None }
    }
}

impl Started {
    fn closes(self, now: Instant, random: u64) -> bool {
        let elapsed = now.saturating_duration_since(self.at);
        if elapsed >= self.over {
            return true;
        }
        let millis = u64::try_from(self.over.as_millis()).unwrap_or(u64::MAX).max(1);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX) > random % millis
    }
}

impl DrainWait {
    /// As [`DrainHandle::go_away_at`]. `waker` is woken when that changes; it is kept once, for a connection is one task.
    #[inline]
    pub fn due(&mut self, waker: &Waker, connection: u64) -> Option<Instant> {
        let state = &self.handle.0;
        if self.slot.is_none_or(|(_, starts)| starts != state.starts.get()) {
            self.slot = Some((state.waiting.borrow_mut().insert(waker.clone()), state.starts.get()));
        }
        self.handle.go_away_at(connection)
    }
}

impl Drop for DrainWait {
    fn drop(&mut self) {
        let state = &self.handle.0;
        if let Some((slot, _)) = self.slot.filter(|(_, starts)| *starts == state.starts.get()) {
            state.waiting.borrow_mut().remove(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DrainHandle;
    use std::time::{Duration, Instant};

    #[test]
    fn notices_are_spread_over_the_drain_time() {
        let start = Instant::now();
        let drain = DrainHandle::new();
        assert_eq!(drain.go_away_at(1), None);
        drain.start(start, Duration::from_secs(100));
        let mut tenths = [0; 10];
        for connection in 1..=1000 {
            let after = drain.go_away_at(connection).unwrap() - start;
            tenths[after.as_secs() as usize / 10] += 1;
        }
        assert!(tenths.iter().all(|count| (50..=150).contains(count)), "{tenths:?}");
        let at_once = DrainHandle::new();
        at_once.start(start, Duration::ZERO);
        assert_eq!(at_once.go_away_at(7), Some(start));
    }

    #[test]
    fn probability_grows_with_time() {
        let start = Instant::now();
        let drain = DrainHandle::new();
        assert!(!drain.should_close(start, 0));
        drain.start(start, Duration::from_secs(100));
        let share = |seconds| {
            let now = start + Duration::from_secs(seconds);
            (0..100_000).step_by(1000).filter(|random| drain.should_close(now, *random)).count()
        };
        assert_eq!([share(0), share(25), share(100)], [0, 25, 100]);
        let at_once = DrainHandle::new();
        at_once.start(start, Duration::ZERO);
        assert!(at_once.should_close(start, u64::MAX));
        let later = start + Duration::from_secs(10);
        drain.start(later, Duration::from_secs(200));
        assert!(!drain.should_close(later, 50_000), "a drain is not prolonged");
        drain.start(later, Duration::ZERO);
        assert!(drain.should_close(later, 50_000), "it is cut short");
    }
}
