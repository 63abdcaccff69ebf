//! How other threads ask something of the main thread.

use tokio::sync::{mpsc, oneshot};

use crate::server::Server;

/// Runs on the main thread.
pub type Job = Box<dyn FnOnce(&mut Server) + Send>;

/// Requests of the admin interface that wait at most; beyond it an admin request waits to be taken.
const QUEUE: usize = 64;

/// A handle to the main thread.
#[derive(Clone, Debug)]
pub struct MainThread(mpsc::Sender<Job>);

impl MainThread {
    /// A handle, and the queue that the main thread works off.
    pub fn channel() -> (Self, mpsc::Receiver<Job>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), receiver)
    }

    /// Has `question` answered by the main thread; `None` when it is gone.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Server) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |server| {
            // Nobody waits for the answer any more when the request was dropped.
            let _ = reply.send(question(server));
        });
        self.0.send(job).await.ok()?;
        answer.await.ok()
    }
}
