//! Tasks of one worker that wait for a deadline which a change of a level moves.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::Waker;

use slab::Slab;

use super::Overload;
use crate::memory;

/// Their wakers.
#[derive(Debug, Default)]
pub struct Waits(RefCell<Slab<Waker>>);

/// A task's place among them, until it is dropped.
#[derive(Debug)]
pub struct Wait {
    waits: Rc<Waits>,
    place: usize,
}

impl Waits {
    /// Has the task of this waker look at its deadlines after each change.
    pub fn enter(self: &Rc<Self>, waker: &Waker) -> Wait {
        Wait { place: self.0.borrow_mut().insert(waker.clone()), waits: Rc::clone(self) }
    }

    /// A level has changed.
    pub fn wake(&self) {
        // Nobody enters or leaves meanwhile: to wake is to queue.
        self.0.borrow().iter().for_each(|(_, waker)| waker.wake_by_ref());
    }
}

/// Does on this worker what the overload manager asks of all of them.
pub fn follow(overload: &Overload, waits: &Rc<Waits>) {
    if let Some(mut changes) = overload.changes().filter(|_| overload.reduce_timeouts.is_set()) {
        let waits = Rc::clone(waits);
        tokio::task::spawn_local(async move {
            while changes.changed().await.is_ok() {
                waits.wake();
            }
        });
    }
    if let Some(mut shrink) = overload.shrink() {
        tokio::task::spawn_local(async move {
            while shrink.changed().await.is_ok() {
                memory::give_back();
            }
        });
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.waits.0.borrow_mut().remove(self.place);
    }
}
