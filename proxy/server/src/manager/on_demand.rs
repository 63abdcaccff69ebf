//! Clusters by ODCDS: many questions for one name are one subscription, and each has an answer in time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use prost::Message as _;
use tokio::sync::mpsc;
use waystation_filter_api::http::ClusterSource;
use waystation_schema::ConfigError;
use waystation_stats::Scope;
use waystation_xds::{Client, Interest, Protocol, ResourceType, Source, SubId, SubscriptionSpec};

use crate::config_source;
use crate::context::Shared;
use crate::on_demand::{Answer, Question, Reply};

/// Names of one source that its server has said nothing about. Who asks for another one is told that there are too many.
const MAX_UNANSWERED: usize = 16 * 1024;

/// Where subscriptions to clusters on demand are counted. Whoever configures them holds it, so that it is there before the
/// first of them.
pub fn scope(root: &Scope) -> Scope {
    root.scope("cluster_manager").scope("odcds")
}

/// Who waits for one thing.
#[derive(Debug, Default)]
pub struct Waiters(Vec<Reply>);

impl Waiters {
    /// One more.
    pub fn push(&mut self, reply: Reply) {
        if self.0.len() == self.0.capacity() {
            self.0.retain(|waiter| !waiter.is_closed());
        }
        self.0.push(reply);
    }

    /// Whether all have given up.
    pub fn have_left(&self) -> bool {
        self.0.iter().all(Reply::is_closed)
    }

    /// Tells them.
    pub fn answer(&mut self, answer: Answer) {
        for waiter in self.0.drain(..) {
            waiter.send(answer);
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
    /// Sources that cannot be asked, and that was logged.
    refused: HashSet<Bytes>,
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
    /// The source that was asked.
    source: Bytes,
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
            refused: HashSet::new(),
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
        reply: Reply,
        now: Instant,
        shared: &Shared,
        client: &mut Client,
    ) {
        // Who asks has left, or a client has chosen a name that means something else in xDS.
        if reply.is_closed() || name == "*" || name.starts_with("xdstp:") {
            return;
        }
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
                let source = source.config.clone();
                self.pending.insert(name.into(), Pending { waiters, due, source });
            }
            Ok(false) => waiters.answer(Answer::Full),
            Err(error) => {
                // Once: clients decide how often it is tried.
                if self.refused.insert(source.config.clone()) {
                    tracing::warn!(target: "upstream", "cannot discover cluster '{name}': {error}");
                }
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

    /// Ends the waits that have lasted long enough. A name that the server has said nothing about is given up, so that names
    /// that clients make up do not use up `MAX_UNANSWERED`; the next request asks anew.
    pub fn expire(&mut self, now: Instant, client: &mut Client) {
        while let Some((due, name)) = self.due.pop_first() {
            if due > now {
                self.due.insert((due, name));
                return;
            }
            let Some(mut pending) = self.pending.remove(&name) else { continue };
            pending.waiters.answer(Answer::TimedOut);
            if let Some(source) = self.sources.get_mut(&pending.source)
                && let Some(name) = source.unanswered.take(&*name)
            {
                client.remove_names(source.sub, vec![name]);
            }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::on_demand::{Awaited, channel};
    use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
    use waystation_xds::{GrpcService, GrpcSource, Options};

    /// A main thread whose server never answers.
    struct Main {
        shared: Arc<Shared>,
        client: Client,
        on_demand: OnDemand,
        source: ClusterSource,
        now: Instant,
    }

    impl Main {
        fn new(protocol: Protocol) -> Self {
            let shared = crate::context::tests::shared();
            let ads = Arc::new(GrpcSource::new(protocol, GrpcService::new("xds")));
            let options = Options { node: Bytes::new(), ads: Some(ads), seed: 1, unix_ms: 0 };
            let client = Client::new(options, crate::xds_transport::transport(&shared));
            let ads = ConfigSourceSpecifier::Ads(core::AggregatedConfigSource::default());
            let proto = core::ConfigSource { config_source_specifier: Some(ads), ..Default::default() };
            let source =
                ClusterSource { config: proto.encode_to_vec().into(), timeout: Duration::from_secs(5) };
            let on_demand = OnDemand::new(&shared);
            Self { shared, client, on_demand, source, now: Instant::now() }
        }

        fn ask(&mut self, name: &str) -> Awaited {
            let (reply, answer) = channel();
            self.on_demand.ask(&self.source, name, reply, self.now, &self.shared, &mut self.client);
            answer
        }

        fn answered(&mut self, missing: &[&str]) {
            let missing: Vec<Arc<str>> = missing.iter().map(|name| Arc::from(*name)).collect();
            let sub = *self.on_demand.by_sub.keys().next().expect("one subscription");
            self.on_demand.answered(sub, std::iter::empty(), &missing, &mut self.client);
        }
    }

    fn run(test: impl FnOnce()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async { test() });
    }

    #[test]
    fn all_who_ask_for_a_cluster_share_a_subscription_and_its_answer() {
        run(|| {
            let mut main = Main::new(Protocol::Delta);
            let waiting = [main.ask("a"), main.ask("a"), main.ask("b")];
            assert_eq!((main.on_demand.take_fresh().len(), main.on_demand.pending.len()), (1, 2));
            main.on_demand.activated("a");
            let answers = waiting.each_ref().map(|waiting| waiting.now());
            assert_eq!(answers, [Some(Answer::Found), Some(Answer::Found), None]);
            main.answered(&["b"]);
            assert_eq!(waiting[2].now(), Some(Answer::Missing));
            // It is asked for anew, below the same subscription.
            let again = main.ask("b");
            assert_eq!(again.now(), None);
            assert!(main.on_demand.take_fresh().is_empty() && main.on_demand.due.len() == 1);
        });
    }

    #[test]
    fn the_wait_ends_when_the_time_of_the_first_who_asked_is_over() {
        run(|| {
            let mut main = Main::new(Protocol::Delta);
            let first = main.ask("a");
            main.now += Duration::from_secs(3);
            let second = main.ask("a");
            let due = main.on_demand.next_due().unwrap();
            assert_eq!(due, main.now + Duration::from_secs(2));
            main.on_demand.expire(due - Duration::from_millis(1), &mut main.client);
            assert_eq!(first.now(), None);
            main.on_demand.expire(due, &mut main.client);
            assert_eq!((first.now(), second.now()), (Some(Answer::TimedOut), Some(Answer::TimedOut)));
            assert_eq!((main.on_demand.next_due(), main.on_demand.pending.len()), (None, 0));
        });
    }

    #[test]
    fn names_without_an_answer_are_bounded() {
        run(|| {
            let mut main = Main::new(Protocol::Delta);
            for index in 0..MAX_UNANSWERED {
                main.ask(&format!("c{index}"));
            }
            assert_eq!(main.ask("one more").now(), Some(Answer::Full));
            main.answered(&["c7"]);
            assert_eq!(main.ask("one more").now(), None);
            // A server that stays silent does not end discovery.
            let due = main.on_demand.next_due().unwrap();
            main.on_demand.expire(due, &mut main.client);
            assert_eq!(main.ask("and another").now(), None);
        });
    }

    #[test]
    fn names_that_mean_something_else_are_not_asked_for() {
        run(|| {
            let mut main = Main::new(Protocol::Delta);
            for name in ["*", "xdstp://a/envoy.config.cluster.v3.Cluster/*"] {
                assert_eq!(main.ask(name).now(), Some(Answer::Missing), "{name}");
            }
            assert!(main.on_demand.pending.is_empty() && main.on_demand.take_fresh().is_empty());
        });
    }

    #[test]
    fn a_state_of_the_world_stream_is_not_asked() {
        run(|| {
            let mut main = Main::new(Protocol::Sotw);
            assert_eq!(main.ask("a").now(), Some(Answer::Missing));
        });
    }
}
