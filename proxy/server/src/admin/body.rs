//! Bodies of answers, and the threads that long ones are made on.
//!
//! A connection lives on the admin thread. When an answer is long, whoever writes it moves to a renderer until the socket
//! is full or the answer has ended, and comes back: the pieces are made and written by one thread, without a hop between
//! them, a slow reader holds none, and `/ready` waits for none.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Frame;
use tokio::runtime::Builder;

use crate::memory;

/// The size of a piece of a long answer.
const PIECE: usize = 64 * 1024;

/// Threads that render; more requests than these wait for one of them. They end when there is nothing to render.
const RENDERERS: usize = 2;

/// Of the renderers, against 0 of everybody else: a third of the share of a thread that has as much to do. At 10, a tenth, a
/// scrape took seconds on a machine that others kept busy.
const NICENESS: i32 = 5;

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What may be done on this thread.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Place {
    /// What is short.
    #[default]
    Admin,
    /// The same, and the task that runs has something long to do.
    AdminNoLonger,
    /// Everything.
    Renderer,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Admin) };
}

/// Has `runtime` start renderers as they are needed.
pub(super) fn with_renderers(runtime: &mut Builder) -> &mut Builder {
    runtime
        .thread_name("admin:render")
        .max_blocking_threads(RENDERERS)
        .on_thread_start(|| {
            PLACE.set(Place::Renderer);
            yield_to_others();
        })
        .on_thread_stop(memory::give_back)
}

/// A scrape on a busy processor takes its time from neither traffic nor `/ready`.
fn yield_to_others() {
    // Only Linux keeps the niceness by thread. A sandbox may refuse it: the renderer is then a thread like the others.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(NICENESS);
}

/// Does what may take long on a thread that nobody waits for.
pub(crate) async fn render<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The runtime lives as long as its thread, so nothing is cancelled.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Runs `task` on the admin thread, and on a renderer while it writes a long body.
pub(super) async fn moving<F>(mut task: Pin<Box<F>>) -> F::Output
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    loop {
        let here = poll_fn(|cx| match task.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending if PLACE.replace(Place::Admin) == Place::AdminNoLonger => {
                Poll::Ready(Err(cx.waker().clone()))
            }
            Poll::Pending => Poll::Pending,
        });
        let waker = match here.await {
            Ok(output) => return output,
            Err(waker) => waker,
        };
        // One poll goes as far as the socket takes it. What wakes the task meanwhile is not lost: it is polled here again.
        let polled = render(move || {
            let polled = task.as_mut().poll(&mut Context::from_waker(&waker));
            (task, polled)
        });
        match polled.await {
            (_, Poll::Ready(output)) => return output,
            (back, Poll::Pending) => task = back,
        }
    }
}

/// A body that is there already, sent chunked as Envoy's admin sends all of its answers.
pub(crate) fn full(body: impl Into<Bytes>) -> Body {
    let mut body = body.into();
    if body.len() <= PIECE {
        return Whole(body).boxed_unsync();
    }
    long(std::iter::from_fn(move || (!body.is_empty()).then(|| body.split_to(body.len().min(PIECE)))))
}

/// A body of many pieces, or of such that take time to make.
pub(super) fn long(pieces: impl Iterator<Item = Bytes> + Send + 'static) -> Body {
    Long(Box::new(pieces)).boxed_unsync()
}

/// Of no announced length.
struct Whole(Bytes);

struct Long(Box<dyn Iterator<Item = Bytes> + Send>);

impl hyper::body::Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let whole = std::mem::take(&mut self.0);
        Poll::Ready((!whole.is_empty()).then(|| Ok(Frame::data(whole))))
    }
}

impl hyper::body::Body for Long {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if PLACE.get() != Place::Renderer {
            // `moving` polls again, over there.
            PLACE.set(Place::AdminNoLonger);
            return Poll::Pending;
        }
        Poll::Ready(self.0.next().map(|piece| Ok(Frame::data(piece))))
    }
}
