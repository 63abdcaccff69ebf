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
    slot: Option<usize>,
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
    /// from none to all within that time; zero (the immediate strategy) closes with every response.
    pub fn start(&self, now: Instant, over: Duration) {
        if self.0.started.get().is_some() {
            return;
        }
        self.0.started.set(Some(Started { at: now, over }));
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

    /// When a connection that is idle should look again: spread over what remains of the drain time.
    pub fn idle_close_at(&self, random: u64) -> Option<Instant> {
        let started = self.0.started.get()?;
        let millis = u64::try_from(started.over.as_millis()).unwrap_or(u64::MAX);
        Some(started.at + Duration::from_millis(random % millis.max(1)))
    }

    /// A place to wait in; [`DrainWait::register`] puts a waker there.
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
    /// Has `waker` woken when draining starts. Registers once: a connection is one task.
    #[inline]
    pub fn register(&mut self, waker: &Waker) {
        if self.slot.is_none() && !self.handle.is_draining() {
            self.slot = Some(self.handle.0.waiting.borrow_mut().insert(waker.clone()));
        }
    }

    /// The state that is waited on.
    #[inline]
    pub fn handle(&self) -> &DrainHandle {
        &self.handle
    }
}

impl Drop for DrainWait {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            // Draining that has started has emptied the slab.
            self.handle.0.waiting.borrow_mut().try_remove(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DrainHandle;
    use std::time::{Duration, Instant};

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
    }
}
