//! Who waits for room for a connection, over all workers, in order.
//!
//! Each bound has a line of its own, so that whoever is first there waits for the same as all behind: when it looks in vain,
//! they would too.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};

use parking_lot::Mutex;

/// The line of one bound, made when somebody first waits.
#[derive(Debug, Default)]
pub(crate) struct Line(OnceLock<Arc<Queue>>);

/// Its lock is taken only by who waits, and by whoever ends a connection while somebody does.
#[derive(Debug, Default)]
struct Queue {
    waiting: AtomicUsize,
    places: Mutex<VecDeque<Arc<Spot>>>,
}

/// One who waits.
#[derive(Debug, Default)]
struct Spot {
    /// There may be room for the first.
    called: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

/// A place in the line; left when dropped, and then it is the next one's turn.
#[derive(Debug)]
pub struct Place {
    line: Arc<Queue>,
    spot: Arc<Spot>,
}

impl Line {
    pub(crate) fn stand(&self) -> Place {
        Place::new(self.0.get_or_init(Arc::default))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.get().is_none_or(|queue| queue.is_empty())
    }

    /// A connection has ended: there may be room for the first.
    pub(crate) fn call(&self) {
        if let Some(queue) = self.0.get() {
            queue.call();
        }
    }
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) == 0
    }

    fn call(&self) {
        if !self.is_empty() {
            self.call_first();
        }
    }

    #[cold]
    fn call_first(&self) {
        let first = self.places.lock().front().cloned();
        if let Some(spot) = first {
            spot.called.store(true, Ordering::SeqCst);
            let waker = spot.waker.lock().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl Place {
    fn new(line: &Arc<Queue>) -> Self {
        let spot = Arc::<Spot>::default();
        let mut places = line.places.lock();
        // Who is alone looks again at once: room may have come before there was anyone to call.
        spot.called.store(places.is_empty(), Ordering::SeqCst);
        places.push_back(Arc::clone(&spot));
        line.waiting.store(places.len(), Ordering::SeqCst);
        drop(places);
        Self { line: Arc::clone(line), spot }
    }

    /// Waits until it is worth a look.
    pub async fn called(&self) {
        poll_fn(|task| {
            *self.spot.waker.lock() = Some(task.waker().clone());
            match self.spot.called.swap(false, Ordering::SeqCst) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.line.places.lock();
        places.retain(|spot| !Arc::ptr_eq(spot, &self.spot));
        self.line.waiting.store(places.len(), Ordering::SeqCst);
        drop(places);
        self.line.call();
    }
}
