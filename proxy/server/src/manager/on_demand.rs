//! Clusters by ODCDS: many questions for one name are one subscription, and each has an answer in time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use waystation_filter_api::http::ClusterSource;
use waystation_schema::ConfigError;
use waystation_xds::{Client, Interest, Protocol, ResourceType, Source, SubId, SubscriptionSpec};

use crate::config_source;
use crate::context::Shared;
use crate::on_demand::{Answer, Question};

/// Names of one source that its server has said nothing about. Who asks for another one is told that it does not exist.
const MAX_UNANSWERED: usize = 16 * 1024;

/// Who waits for one thing.
#[derive(Debug, Default)]
pub struct Waiters(Vec<oneshot::Sender<Answer>>);

impl Waiters {
    /// One more.
    pub fn push(&mut self, reply: oneshot::Sender<Answer>) {
        if self.0.len() == self.0.capacity() {
            self.0.retain(|waiter| !waiter.is_closed());
        }
        self.0.push(reply);
    }

    /// Whether all have given up.
    pub fn have_left(&self) -> bool {
        self.0.iter().all(oneshot::Sender::is_closed)
    }

    /// Tells them.
    pub fn answer(&mut self, answer: Answer) {
        for waiter in self.0.drain(..) {
            // Who has given up meanwhile need not know.
            let _ = waiter.send(answer);
        }
    }
}

/// The clusters that requests wait for.
#[derive(Debug)]
pub struct OnDemand {
    questions: Option<mpsc::Receiver<Question>>,
    sources: HashMap<Bytes, Subscribed>,
    by_sub: HashMap<SubId, Bytes>,
    pending: HashMap<Box<str>, Pending>,
    due: BTreeSet<(Instant, Box<str>)>,
    /// Subscriptions that are not counted yet.
    fresh: Vec<SubId>,
}

#[derive(Debug)]
struct Subscribed {
    sub: SubId,
    unanswered: HashSet<Arc<str>>,
}

#[derive(Debug)]
struct Pending {
    waiters: Waiters,
    due: Instant,
}

impl OnDemand {
    /// Nobody waits.
    pub fn new(shared: &Shared) -> Self {
        Self {
            questions: shared.on_demand.take_questions(),
            sources: HashMap::new(),
            by_sub: HashMap::new(),
            pending: HashMap::new(),
            due: BTreeSet::new(),
            fresh: Vec::new(),
        }
    }

    /// The next question of a worker.
    pub async fn next(&mut self) -> Question {
        match &mut self.questions {
            Some(questions) => match questions.recv().await {
                Some(question) => question,
                None => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
    }

    /// Somebody needs a cluster.
    pub fn ask(
        &mut self,
        source: &ClusterSource,
        name: &str,
        reply: oneshot::Sender<Answer>,
        now: Instant,
        shared: &Shared,
        client: &mut Client,
    ) {
        let mut waiters = Waiters::default();
        waiters.push(reply);
        if shared.clusters.find(name).is_some_and(|cell| cell.is_set()) {
            return waiters.answer(Answer::Found);
        }
        if let Some(pending) = self.pending.get_mut(name) {
            waiters.0.drain(..).for_each(|waiter| pending.waiters.push(waiter));
            return;
        }
        match self.subscribe(source, name, client) {
            Ok(true) => {
                let due = now + source.timeout;
                self.due.insert((due, name.into()));
                self.pending.insert(name.into(), Pending { waiters, due });
            }
            Ok(false) => waiters.answer(Answer::Missing),
            Err(error) => {
                tracing::warn!(target: "upstream", "cannot discover cluster '{name}': {error}");
                waiters.answer(Answer::Missing);
            }
        }
    }

    /// Adds a name to the subscription of its source; `false` when there are too many.
    fn subscribe(
        &mut self,
        source: &ClusterSource,
        name: &str,
        client: &mut Client,
    ) -> Result<bool, ConfigError> {
        let name: Arc<str> = name.into();
        if let Some(subscribed) = self.sources.get_mut(&source.config) {
            if subscribed.unanswered.len() >= MAX_UNANSWERED {
                return Ok(false);
            }
            subscribed.unanswered.insert(Arc::clone(&name));
            client.add_names(subscribed.sub, vec![name]);
            return Ok(true);
        }
        let proto = core::ConfigSource::decode(source.config.clone())
            .map_err(|error| ConfigError::new(error.to_string()))?;
        config_source::check_on_demand(&proto)?;
        let (from, init_fetch_timeout) = config_source::compile(&proto)?;
        if matches!(from, Source::Ads) && client.core().ads_protocol() == Some(Protocol::Sotw) {
            return Err(ConfigError::new("clusters on demand need incremental ADS"));
        }
        let spec = SubscriptionSpec {
            kind: ResourceType::Cluster,
            source: from,
            interest: Interest::Names(vec![Arc::clone(&name)]),
            init_fetch_timeout,
        };
        let sub = client.subscribe(spec).map_err(|error| ConfigError::new(error.to_string()))?;
        self.fresh.push(sub);
        self.by_sub.insert(sub, source.config.clone());
        self.sources.insert(source.config.clone(), Subscribed { sub, unanswered: HashSet::from([name]) });
        Ok(true)
    }

    /// Whether a subscription is one of these.
    pub fn owns(&self, sub: SubId) -> bool {
        self.by_sub.contains_key(&sub)
    }

    /// The server has spoken of these names; `missing` do not exist. Those are asked for anew by the next request, so that
    /// names that clients make up do not add up.
    pub fn answered<'n>(
        &mut self,
        sub: SubId,
        names: impl Iterator<Item = &'n Arc<str>>,
        missing: &'n [Arc<str>],
        client: &mut Client,
    ) {
        let source = self.by_sub.get(&sub).and_then(|config| self.sources.get_mut(config));
        let Some(source) = source else { return };
        for name in names.chain(missing) {
            source.unanswered.remove(name);
        }
        client.remove_names(sub, missing.to_vec());
        for name in missing {
            self.end(name, Answer::Missing);
        }
    }

    /// A cluster is in force.
    pub fn activated(&mut self, name: &str) {
        self.end(name, Answer::Found);
    }

    /// Ends the waits that have lasted long enough. What comes later is there for the next request.
    pub fn expire(&mut self, now: Instant) {
        while let Some((due, name)) = self.due.pop_first() {
            if due > now {
                self.due.insert((due, name));
                return;
            }
            self.end(&name, Answer::TimedOut);
        }
    }

    /// When [`Self::expire`] has something to do.
    pub fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// New subscriptions, to be counted.
    pub fn take_fresh(&mut self) -> Vec<SubId> {
        std::mem::take(&mut self.fresh)
    }

    fn end(&mut self, name: &str, answer: Answer) {
        if let Some((name, mut pending)) = self.pending.remove_entry(name) {
            self.due.remove(&(pending.due, name));
            pending.waiters.answer(answer);
        }
    }
}
