//! What requests wait for: clusters, virtual hosts and route configurations that are fetched when first needed.
//!
//! A worker puts a [`Question`] to the main thread and keeps the other end of its answer. The main thread makes one
//! subscription of all questions for one name (`manager/on_demand.rs`). Requests that wait for nothing come past here at
//! the price of the checks that their filter makes anyway.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use waystation_filter_api::cell::Cell;
use waystation_filter_api::http::ClusterSource;
use waystation_route::{RouteTable, ScopeKey};

use crate::manager::scopes::ScopeMap;

/// Requests and connections of the process that may wait at one time. Who comes beyond it goes on as if what it asks for
/// did not exist.
const MAX_WAITING: usize = 16 * 1024;

/// Questions on their way to the main thread; who comes beyond it is treated in the same way.
const QUEUE: usize = 1024;

/// What became of a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// It is there.
    Found,
    /// It does not exist.
    Missing,
    /// It has not come in time.
    TimedOut,
}

/// What a request needs.
#[derive(Debug)]
pub enum Wanted {
    /// A cluster, by name.
    Cluster {
        /// Where it comes from.
        source: Arc<ClusterSource>,
        /// Its name.
        name: Box<str>,
    },
    /// The virtual host of a host, by VHDS.
    VirtualHost {
        /// Where its route configuration lives.
        routes: Arc<Cell<RouteTable>>,
        /// The host as the request names it, in lower case.
        host: Box<str>,
    },
    /// The route configuration of a scope.
    Scope {
        /// Where the scopes live.
        scopes: Arc<Cell<ScopeMap>>,
        /// The request's key.
        key: ScopeKey,
    },
}

/// A question of a worker's.
#[derive(Debug)]
pub struct Question {
    /// What for.
    pub wanted: Wanted,
    /// Where the answer goes. Closed when nobody waits any longer.
    pub reply: oneshot::Sender<Answer>,
}

/// The workers' side; one per process.
#[derive(Debug)]
pub struct OnDemand {
    questions: mpsc::Sender<Question>,
    /// Until the main thread takes them.
    queue: Mutex<Option<mpsc::Receiver<Question>>>,
    waiting: Arc<AtomicUsize>,
}

impl OnDemand {
    /// Nobody waits yet.
    pub fn new() -> Self {
        let (questions, queue) = mpsc::channel(QUEUE);
        Self { questions, queue: Mutex::new(Some(queue)), waiting: Arc::default() }
    }

    /// The questions, for who answers them. Given out once.
    pub fn take_questions(&self) -> Option<mpsc::Receiver<Question>> {
        self.queue.lock().take()
    }

    /// Asks; nothing when too many wait already.
    pub fn ask(&self, wanted: Wanted) -> Option<Asked> {
        let place = Place::take(&self.waiting)?;
        let (reply, answer) = oneshot::channel();
        self.questions.try_send(Question { wanted, reply }).ok()?;
        Some(Asked { answer, _place: place })
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

impl Default for OnDemand {
    fn default() -> Self {
        Self::new()
    }
}

/// A question that was put. Dropping it gives up waiting.
#[derive(Debug)]
pub struct Asked {
    answer: oneshot::Receiver<Answer>,
    _place: Place,
}

impl Asked {
    /// Waits for the answer.
    pub async fn answer(self) -> Answer {
        // Without an answer the process is ending.
        self.answer.await.unwrap_or(Answer::Missing)
    }
}

/// A unit of [`MAX_WAITING`], given back on drop.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(waiting: &Arc<AtomicUsize>) -> Option<Self> {
        let place = Self(Arc::clone(waiting));
        (waiting.fetch_add(1, Ordering::Relaxed) < MAX_WAITING).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str) -> Wanted {
        let source = Arc::new(ClusterSource { config: bytes::Bytes::new(), timeout: Default::default() });
        Wanted::Cluster { source, name: name.into() }
    }

    #[test]
    fn who_comes_beyond_the_bound_does_not_wait() {
        let on_demand = OnDemand::new();
        let mut questions = on_demand.take_questions().unwrap();
        let mut asked = Vec::new();
        for index in 0..MAX_WAITING {
            asked.push(on_demand.ask(wanted(&index.to_string())).unwrap());
            questions.try_recv().unwrap();
        }
        assert!(on_demand.ask(wanted("one more")).is_none());
        assert_eq!(on_demand.waiting(), MAX_WAITING);
        asked.pop();
        assert!(on_demand.ask(wanted("in its place")).is_some());
    }

    #[test]
    fn who_gives_up_leaves_a_closed_channel_and_nothing_else() {
        let on_demand = OnDemand::new();
        let mut questions = on_demand.take_questions().unwrap();
        drop(on_demand.ask(wanted("a")));
        assert_eq!(on_demand.waiting(), 0);
        assert!(questions.try_recv().unwrap().reply.is_closed());
    }
}
