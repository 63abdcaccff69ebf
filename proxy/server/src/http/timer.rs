//! One timer per task, moved as rarely as possible.

use std::cell::Cell;
use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

/// Wakes its task at the earliest of many deadlines that come and go.
///
/// Deadlines live with whoever has them; here is only the earliest that was ever asked for. A deadline that moves later
/// or vanishes (every request that ends before its timeout) leaves the timer alone: it fires once in vain, and is then
/// set anew. So a 15 s timeout per request costs one timer operation per 15 s and connection.
#[derive(Debug, Default)]
pub(crate) struct Timer {
    sleep: Option<Pin<Box<Sleep>>>,
    /// When `sleep` fires; `None` when it has fired or was never set.
    armed: Option<Instant>,
    /// The waker that is registered is another task's.
    foreign: bool,
    /// The time, since it was asked for after the last wait.
    now: Cell<Option<Instant>>,
}

impl Timer {
    /// The time of this turn of the task: one reading of the clock serves all that happens between two waits, as whoever
    /// waits polls the timer last.
    #[inline]
    pub(crate) fn now(&self) -> Instant {
        match self.now.get() {
            Some(now) => now,
            None => {
                let now = Instant::now();
                self.now.set(Some(now));
                now
            }
        }
    }

    /// For another task: the next poll registers that one, and finds the timer where the last deadline left it.
    pub(crate) fn hand_over(&mut self) {
        self.foreign = true;
        self.now.take();
    }

    /// Ready when `deadline` has passed. Otherwise the task is woken by then.
    #[inline]
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, deadline: Option<Instant>) -> Poll<()> {
        self.now.take();
        let Some(deadline) = deadline else { return Poll::Pending };
        if let (Some(armed), Some(sleep)) = (self.armed, &self.sleep) {
            // The waker was registered when the timer was set, unless for another task.
            if armed <= deadline && !sleep.is_elapsed() && !self.foreign {
                return Poll::Pending;
            }
        }
        self.rearm(cx, deadline)
    }

    #[cold]
    fn rearm(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        loop {
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            let earlier = self.armed.filter(|armed| *armed <= deadline);
            let sleep = match &mut self.sleep {
                Some(sleep) if std::mem::take(&mut self.foreign) && earlier.is_some() => sleep,
                Some(sleep) => {
                    sleep.as_mut().reset(deadline.into());
                    self.armed = Some(deadline);
                    sleep
                }
                none => {
                    self.armed = Some(deadline);
                    none.insert(Box::pin(tokio::time::sleep_until(deadline.into())))
                }
            };
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

/// The earlier of two optional deadlines.
#[inline]
pub(crate) fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, None) | (None, one) => one,
    }
}

/// `now + timeout`, where there is a timeout.
#[inline]
pub(crate) fn after(now: Instant, timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| now.checked_add(timeout))
}
