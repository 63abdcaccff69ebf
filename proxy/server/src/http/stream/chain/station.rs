//! A filter's place in one direction: what it holds back, and the handle that ends its pause.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use waystation_filter_api::http::{Flow, Hold, LocalFuture, Paused, Resume};

/// What one filter holds in one direction.
#[derive(Default)]
pub(super) struct Station {
    pub(super) stop: Stop,
    /// What it stopped at.
    pub(super) part: Part,
    /// Data that the filter has seen, or does not want to see.
    pub(super) held: Vec<Bytes>,
    /// Data that it has yet to see.
    pub(super) unseen: Vec<Bytes>,
    pub(super) bytes: usize,
    pub(super) tail: Option<Tail>,
    /// Made for the filter that asks for its handle.
    resume: OnceCell<Rc<Resumed>>,
}

#[derive(Default)]
pub(super) enum Stop {
    #[default]
    Open,
    Paused(Hold),
    Waiting(LocalFuture<Flow>),
}

/// A part of a message.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Part {
    #[default]
    Head,
    Data,
    Trailers,
}

/// What ends a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tail {
    pub(super) trailers: bool,
    pub(super) seen: bool,
}

/// Where a [`Resume`] handle leaves its verdict.
#[derive(Default)]
struct Resumed {
    verdict: RefCell<Option<Flow>>,
    waker: RefCell<Option<Waker>>,
}

impl Station {
    /// A verdict over an earlier pause says nothing about the next.
    pub(super) fn forget_verdict(&self) {
        if matches!(self.stop, Stop::Open)
            && let Some(resumed) = self.resume.get()
        {
            resumed.verdict.take();
        }
    }

    pub(super) fn poll(&mut self, task: &mut Context<'_>) -> Poll<Flow> {
        match &mut self.stop {
            Stop::Open => Poll::Pending,
            Stop::Waiting(future) => future.as_mut().poll(task),
            Stop::Paused(_) => {
                let Some(resumed) = self.resume.get() else { return Poll::Pending };
                if let Some(flow) = resumed.verdict.borrow_mut().take() {
                    return Poll::Ready(flow);
                }
                *resumed.waker.borrow_mut() = Some(task.waker().clone());
                Poll::Pending
            }
        }
    }

    /// A handle that ends the filter's pause.
    pub(super) fn resume_handle(&self) -> Resume {
        Resume::new(Rc::<Resumed>::clone(self.resume.get_or_init(Rc::default)))
    }

    /// All that is held, in one piece: the piece that it was already, as a rule.
    pub(super) fn take_held(&mut self) -> BytesMut {
        let mut pieces = self.held.drain(..);
        let mut all = pieces.next().map(|first| first.try_into_mut().unwrap_or_else(BytesMut::from));
        for piece in pieces {
            all.get_or_insert_default().extend_from_slice(&piece);
        }
        let all = all.unwrap_or_default();
        self.bytes -= all.len();
        all
    }

    pub(super) fn has_unseen_tail(&self) -> bool {
        self.tail.is_some_and(|tail| !tail.seen)
    }

    pub(super) fn hold(&mut self, data: Bytes) {
        self.bytes += data.len();
        if !data.is_empty() {
            self.held.push(data);
        }
    }
}

impl Paused for Resumed {
    fn resume(&self, flow: Flow) {
        *self.verdict.borrow_mut() = Some(flow);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}
