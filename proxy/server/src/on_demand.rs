//! What requests wait for: clusters, virtual hosts and route configurations that are fetched when first needed.
//!
//! A worker puts a [`Question`] to the main thread, and who needs the same meanwhile, on whichever worker, waits for the same
//! answer: what is asked is bounded by names, who waits by [`Places`], and a connection manager has its own of both, so that
//! hosts which the clients of one make up leave the others alone. Requests that wait for nothing come past here at the price
//! of the checks that their filter makes anyway; those that wait take a lock.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use waystation_filter_api::cell::Cell;
use waystation_filter_api::http::ClusterSource;
use waystation_route::{RouteTable, ScopeKey};

use crate::manager::scopes::ScopeMap;

/// Requests of one connection manager, or connections of one TCP proxy, that may wait at one time.
const MAX_WAITING: usize = 16 * 1024;

/// Different things that those of one may wait for.
const MAX_NAMES: usize = 1024;

/// Questions on their way to the main thread.
const QUEUE: usize = 16 * MAX_NAMES;

/// What became of a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// It is there.
    Found,
    /// It does not exist.
    Missing,
    /// It has not come in time.
    TimedOut,
    /// Too many wait, or too much is waited for: nobody was asked.
    Full,
}

/// What a request needs. The same by its name and by where it comes from.
#[derive(Clone, Debug)]
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

impl Wanted {
    fn identity(&self) -> (usize, Result<&str, &ScopeKey>) {
        match self {
            Self::Cluster { source, name } => (Arc::as_ptr(source).addr(), Ok(name)),
            Self::VirtualHost { routes, host } => (Arc::as_ptr(routes).addr(), Ok(host)),
            Self::Scope { scopes, key } => (Arc::as_ptr(scopes).addr(), Err(key)),
        }
    }
}

impl PartialEq for Wanted {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for Wanted {}

impl Hash for Wanted {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

/// A question of the workers'.
#[derive(Debug)]
pub struct Question {
    /// What for.
    pub wanted: Wanted,
    /// Where the answer goes.
    pub reply: Reply,
}

/// Where the answer to a question goes: to all who wait for it. Dropped, it says that there is nothing.
#[derive(Debug)]
pub struct Reply(watch::Sender<Option<Answer>>);

/// The other end of a [`Reply`].
#[derive(Clone, Debug)]
pub struct Awaited(watch::Receiver<Option<Answer>>);

/// Both ends of a question.
pub fn channel() -> (Reply, Awaited) {
    let (reply, answer) = watch::channel(None);
    (Reply(reply), Awaited(answer))
}

impl Reply {
    /// Tells all who wait.
    pub fn send(self, answer: Answer) {
        self.0.send_replace(Some(answer));
    }

    /// Whether nobody waits any longer.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Until nobody waits any longer.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

impl Awaited {
    /// The answer, if there is one.
    pub fn now(&self) -> Option<Answer> {
        let gone = self.0.has_changed().is_err();
        self.0.borrow().or_else(|| gone.then_some(Answer::Missing))
    }

    async fn answer(mut self) -> Answer {
        let answer = self.0.wait_for(Option::is_some).await;
        answer.ok().and_then(|answer| *answer).unwrap_or(Answer::Missing)
    }
}

/// How many of one connection manager or TCP proxy wait, and for how many things.
#[derive(Debug, Default)]
pub struct Places {
    waiting: AtomicUsize,
    names: AtomicUsize,
}

/// The workers' side; one per process.
#[derive(Debug)]
pub struct OnDemand {
    questions: mpsc::Sender<Question>,
    /// Until the main thread takes them.
    queue: Mutex<Option<mpsc::Receiver<Question>>>,
    inquiries: Arc<Inquiries>,
}

/// The questions that somebody waits for. Only those who want something that is not there come here.
type Inquiries = Mutex<HashMap<Wanted, Weak<Inquiry>>>;

/// A question that was put, as long as somebody waits.
#[derive(Debug)]
struct Inquiry {
    wanted: Wanted,
    answer: Awaited,
    all: Weak<Inquiries>,
    _name: Place,
}

impl OnDemand {
    /// Nobody waits yet.
    pub fn new() -> Self {
        let (questions, queue) = mpsc::channel(QUEUE);
        Self { questions, queue: Mutex::new(Some(queue)), inquiries: Arc::default() }
    }

    /// The questions, for who answers them. Given out once.
    pub fn take_questions(&self) -> Option<mpsc::Receiver<Question>> {
        self.queue.lock().take()
    }

    /// Asks on behalf of one who has these places; nothing when too many wait already.
    pub fn ask(&self, places: &Arc<Places>, wanted: Wanted) -> Option<Asked> {
        let place = Place::take(places, |places| &places.waiting, MAX_WAITING)?;
        let mut inquiries = self.inquiries.lock();
        let known = inquiries.get(&wanted).and_then(Weak::upgrade);
        if let Some(inquiry) = known.as_ref().filter(|inquiry| inquiry.answer.now().is_none()) {
            return Some(Asked { inquiry: Arc::clone(inquiry), _place: place });
        }
        let name = Place::take(places, |places| &places.names, MAX_NAMES);
        let inquiry = name.and_then(|name| {
            let (reply, answer) = channel();
            self.questions.try_send(Question { wanted: wanted.clone(), reply }).ok()?;
            let all = Arc::downgrade(&self.inquiries);
            Some(Arc::new(Inquiry { wanted: wanted.clone(), answer, all, _name: name }))
        });
        if let Some(inquiry) = &inquiry {
            inquiries.insert(wanted, Arc::downgrade(inquiry));
        }
        // Whatever is dropped now may be the last of an inquiry, which takes the lock.
        drop(inquiries);
        Some(Asked { inquiry: inquiry?, _place: place })
    }

    /// What is asked and waited for now.
    pub fn inquiries(&self) -> usize {
        self.inquiries.lock().len()
    }
}

impl Default for OnDemand {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Inquiry {
    fn drop(&mut self) {
        let Some(all) = self.all.upgrade() else { return };
        let mut all = all.lock();
        // Another one may have taken its place.
        if all.get(&self.wanted).is_some_and(|inquiry| std::ptr::eq(inquiry.as_ptr(), self)) {
            all.remove(&self.wanted);
        }
    }
}

/// A question that was put. Dropping it gives up waiting.
#[derive(Debug)]
pub struct Asked {
    inquiry: Arc<Inquiry>,
    _place: Place,
}

impl Asked {
    /// Waits for the answer.
    pub async fn answer(self) -> Answer {
        self.inquiry.answer.clone().answer().await
    }
}

impl Places {
    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// One of [`Places`], given back on drop.
#[derive(Debug)]
struct Place(Arc<Places>, fn(&Places) -> &AtomicUsize);

impl Place {
    fn take(places: &Arc<Places>, of: fn(&Places) -> &AtomicUsize, max: usize) -> Option<Self> {
        let place = Self(Arc::clone(places), of);
        (of(places).fetch_add(1, Ordering::Relaxed) < max).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Arc<ClusterSource> {
        Arc::new(ClusterSource { config: bytes::Bytes::new(), timeout: Default::default() })
    }

    fn wanted(source: &Arc<ClusterSource>, name: &str) -> Wanted {
        Wanted::Cluster { source: Arc::clone(source), name: name.into() }
    }

    #[tokio::test]
    async fn one_name_is_one_question_and_all_who_wait_have_its_answer() {
        let (on_demand, source) = (OnDemand::new(), source());
        let mut questions = on_demand.take_questions().unwrap();
        let places = [Arc::<Places>::default(), Arc::default()];
        // Far more than there is room for questions, of two connection managers.
        let asked = (0..2 * QUEUE - 2).map(|index| on_demand.ask(&places[index % 2], wanted(&source, "a")));
        let asked: Vec<_> = asked.collect::<Option<_>>().unwrap();
        assert_eq!((questions.len(), places[0].waiting(), on_demand.inquiries()), (1, QUEUE - 1, 1));
        questions.try_recv().unwrap().reply.send(Answer::Found);
        // The answer is for those who have asked before it.
        let later = on_demand.ask(&places[0], wanted(&source, "a")).unwrap();
        for asked in asked {
            assert_eq!(asked.answer().await, Answer::Found);
        }
        assert_eq!((questions.len(), on_demand.inquiries()), (1, 1));
        drop(later);
        assert_eq!((places[0].waiting(), places[1].waiting(), on_demand.inquiries()), (0, 0, 0));
        assert!(questions.try_recv().unwrap().reply.is_closed());
    }

    #[tokio::test]
    async fn a_question_that_nobody_takes_is_answered() {
        let (on_demand, source) = (OnDemand::new(), source());
        let asked = on_demand.ask(&Arc::default(), wanted(&source, "a")).unwrap();
        drop(on_demand.take_questions());
        assert_eq!(asked.answer().await, Answer::Missing);
    }

    #[test]
    fn what_has_one_name_elsewhere_is_something_else() {
        let (on_demand, places) = (OnDemand::new(), Arc::default());
        let _asked = [source(), source()].map(|source| on_demand.ask(&places, wanted(&source, "a")).unwrap());
        assert_eq!(on_demand.inquiries(), 2);
    }

    #[test]
    fn who_comes_beyond_a_bound_does_not_wait_and_leaves_the_others_alone() {
        let (on_demand, source) = (OnDemand::new(), source());
        let (places, other) = (Arc::default(), Arc::default());
        let ask = |places: &Arc<Places>, name: &str| on_demand.ask(places, wanted(&source, name));
        let mut asked: Vec<_> = (0..MAX_NAMES).map(|name| ask(&places, &name.to_string()).unwrap()).collect();
        assert!(ask(&places, "one more").is_none());
        asked.extend((MAX_NAMES..MAX_WAITING).map(|_| ask(&places, "7").unwrap()));
        assert!(ask(&places, "7").is_none());
        assert_eq!(places.waiting(), MAX_WAITING);
        assert!(ask(&other, "one more").is_some() && ask(&other, "7").is_some());
        asked.remove(0);
        assert!(ask(&places, "in its place").is_some());
    }
}
