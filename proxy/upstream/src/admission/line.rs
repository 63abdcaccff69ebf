//! Who waits for room for a connection, over all workers, in order.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

use parking_lot::Mutex;

/// The line. Its lock is taken only by who waits, and by whoever ends a connection while somebody does.
#[derive(Debug, Default)]
pub(super) struct Line {
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
    line: Arc<Line>,
    spot: Arc<Spot>,
}

impl Line {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) == 0
    }

    /// A connection has ended: there may be room for the first.
    pub(super) fn call(&self) {
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
    pub(super) fn new(line: &Arc<Line>) -> Self {
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
