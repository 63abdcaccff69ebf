use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use xxhash_rust::xxh64::xxh64;

use super::envelope::{Envelope, Item, Text};
use super::interest::{Interests, Subscribers};
use super::inventory::{Held, Inventory};
use super::{Rejection, Resource, SubId};
use crate::{Protocol, ResourceType, wire};

/// `google.rpc.Code.INTERNAL`, which is what Envoy puts into every NACK.
const REJECTED: i32 = 13;

/// Longest `error_detail`: enough to read, and never more than a server's header or message limits.
const MAX_DETAIL: usize = 32 << 10;

/// Refusals named in one `error_detail`; who has more of them has another problem.
const MAX_LISTED: usize = 256;

/// One type on one stream.
#[derive(Debug)]
pub(super) struct Feed {
    pub(super) kind: ResourceType,
    protocol: Protocol,
    pub(super) interest: Interests,
    pub(super) inventory: Inventory,
    /// Last accepted version of a whole response. Survives the stream.
    pub(super) version: Arc<str>,
    /// Whether any response has been accepted, ever.
    pub(super) settled: bool,
    /// Responses waiting for the one in work.
    pub(super) inbox: VecDeque<Envelope>,
    in_work: Option<InWork>,
    // What follows is true of the present stream only.
    started: bool,
    /// State of the world: names were sent, so an empty list means "nothing", no longer "everything".
    explicit: bool,
    nonce: String,
    answers: VecDeque<Answer>,
}

/// An acknowledgement or refusal that is to be sent.
#[derive(Debug)]
struct Answer {
    nonce: String,
    version: Arc<str>,
    error: Option<String>,
}

/// A response whose updates are with their consumers.
#[derive(Debug)]
struct InWork {
    serial: u64,
    nonce: String,
    version: Arc<str>,
    changed: HashMap<Arc<str>, Changed>,
    unanswered: usize,
    rejections: Vec<Rejection>,
}

#[derive(Debug)]
struct Changed {
    resource: Resource,
    hash: u64,
    ttl: Option<Duration>,
    /// Who has it, unless they left in the meantime.
    handed: Subscribers,
    refused: usize,
}

/// What a response means for the subscribers.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// An entry for each subscriber that the response is about, even when nothing is new for it.
    pub(super) deliveries: BTreeMap<SubId, Delivery>,
    /// TTLs that start anew (or end): name, old deadline, new TTL.
    pub(super) ttls: Vec<(Arc<str>, Option<Instant>, Option<Duration>)>,
}

#[derive(Debug, Default)]
pub(super) struct Delivery {
    pub(super) resources: Vec<Resource>,
    pub(super) removed: Vec<Arc<str>>,
}

/// What became of a response when all its updates were answered.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) ttls: Vec<(Arc<str>, Option<Instant>, Option<Duration>)>,
    nonce: String,
    error: Option<String>,
}

/// A name whose resource was dropped, and the deadline of its TTL, which is to be cleared.
pub(super) type Dropped = Vec<(Arc<str>, Instant)>;

impl Feed {
    pub(super) fn new(kind: ResourceType, protocol: Protocol) -> Self {
        Self {
            kind,
            protocol,
            interest: Interests::default(),
            inventory: Inventory::default(),
            version: "".into(),
            settled: false,
            inbox: VecDeque::new(),
            in_work: None,
            started: false,
            explicit: false,
            nonce: String::new(),
            answers: VecDeque::new(),
        }
    }

    // === Interest ===

    pub(super) fn remove_name(&mut self, sub: SubId, name: &Arc<str>) -> Dropped {
        self.interest.remove_name(sub, name);
        self.drop_unwanted([name.clone()])
    }

    pub(super) fn remove_subscriber<'a>(
        &mut self,
        sub: SubId,
        names: impl Iterator<Item = &'a Arc<str>>,
    ) -> Dropped {
        let names: Vec<_> = names.cloned().collect();
        for name in &names {
            self.interest.remove_name(sub, name);
        }
        if self.interest.remove_broad(sub) {
            let all = self.inventory.names_where(|_| true);
            return self.drop_unwanted(all);
        }
        self.drop_unwanted(names)
    }

    /// Forgets resources that nobody wants, once the server knows it. Until then they stay, so that a name which
    /// is given up and taken again in one breath (a cluster that is replaced) need not be sent a second time.
    fn drop_unwanted(&mut self, names: impl IntoIterator<Item = Arc<str>>) -> Dropped {
        let mut dropped = Vec::new();
        for name in names {
            let Some(held) = self.inventory.get(&name) else { continue };
            let wanted = self.interest.wants(&name)
                || held.resource.aliases.iter().any(|alias| self.interest.wants(alias))
                || self.interest.awaits_unsubscribe(&name);
            if !wanted
                && let Some(held) = self.inventory.remove(&name)
                && let Some(at) = held.expires
            {
                dropped.push((name, at));
            }
        }
        dropped
    }

    // === Requests ===

    /// A new stream begins.
    pub(super) fn restart(&mut self) -> Dropped {
        self.started = false;
        self.explicit = false;
        self.nonce.clear();
        self.answers.clear();
        self.inbox.clear();
        // The consumers still answer, but the server that asked is gone.
        if let Some(work) = &mut self.in_work {
            work.nonce.clear();
        }
        self.interest.restart();
        let all = self.inventory.names_where(|_| true);
        self.drop_unwanted(all)
    }

    pub(super) fn is_started(&self) -> bool {
        self.started
    }

    pub(super) fn is_busy(&self) -> bool {
        self.in_work.is_some()
    }

    /// How many responses are not yet answered on the wire.
    pub(super) fn backlog(&self) -> usize {
        self.inbox.len() + self.answers.len()
    }

    pub(super) fn wants_to_send(&self) -> bool {
        if !self.started {
            // What is being applied of the last stream must be held before the new one is told what is.
            return !self.interest.is_empty() && !self.is_busy();
        }
        // A state-of-the-world request with an old nonce is ignored by the server when a newer response is under
        // way, so a change of names rides on the answer to that one.
        let answer_follows =
            self.protocol == Protocol::Sotw && (!self.inbox.is_empty() || self.expects_answer_to_work());
        !self.answers.is_empty() || (self.interest.has_news() && !answer_follows)
    }

    fn expects_answer_to_work(&self) -> bool {
        self.in_work.as_ref().is_some_and(|work| !work.nonce.is_empty())
    }

    /// Builds the next request. `resume` says whether the server is the one that gave us what we hold.
    pub(super) fn next_request(&mut self, node: Option<Bytes>, resume: bool) -> (Bytes, Dropped) {
        let first = !self.started;
        self.started = true;
        let answer = self.answers.pop_front();
        if let Some(answer) = &answer {
            self.nonce.clone_from(&answer.nonce);
        }
        let message = match self.protocol {
            Protocol::Sotw => self.sotw_request(node, answer, first, resume),
            Protocol::Delta => self.delta_request(node, answer, first, resume),
        };
        let (_, removed) = self.interest.take_news();
        (message, self.drop_unwanted(removed))
    }

    fn sotw_request(
        &mut self,
        node: Option<Bytes>,
        answer: Option<Answer>,
        first: bool,
        resume: bool,
    ) -> Bytes {
        let names =
            if self.interest.is_only_wildcard() && !self.explicit { Vec::new() } else { self.interest.all() };
        self.explicit |= !names.is_empty();
        let (version, error) = match answer {
            Some(answer) => (answer.version, answer.error),
            None if first && !(resume && self.holds_all_names()) => ("".into(), None),
            None => (self.version.clone(), None),
        };
        let request = wire::DiscoveryRequest {
            version_info: version.to_string(),
            node,
            resource_names: names,
            type_url: self.kind.url().to_owned(),
            response_nonce: self.nonce.clone(),
            error_detail: error.map(error_detail),
        };
        request.encode_to_vec().into()
    }

    fn delta_request(
        &mut self,
        node: Option<Bytes>,
        answer: Option<Answer>,
        first: bool,
        resume: bool,
    ) -> Bytes {
        let legacy_wildcard = first && self.interest.is_only_wildcard();
        let (added, removed) = self.interest.news();
        let subscribe = if legacy_wildcard { Vec::new() } else { added };
        let unsubscribe = if first { Vec::new() } else { removed };
        let mut versions = BTreeMap::new();
        if first && resume {
            // A disputed resource is left out: the server shall send it again.
            let held = self.inventory.iter().filter(|held| held.accepted && !held.disputed);
            versions
                .extend(held.map(|held| (held.resource.name.to_string(), held.resource.version.to_string())));
        }
        let request = wire::DeltaDiscoveryRequest {
            node,
            type_url: self.kind.url().to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: versions,
            response_nonce: answer.as_ref().map(|answer| answer.nonce.clone()).unwrap_or_default(),
            error_detail: answer.and_then(|answer| answer.error).map(error_detail),
        };
        request.encode_to_vec().into()
    }

    /// Whether the version we would state covers all that we ask for. If not, a server that compares versions
    /// would send nothing, and the name added while we were away would never arrive.
    fn holds_all_names(&self) -> bool {
        self.interest.names().all(|(name, _)| self.inventory.get(name).is_some())
    }

    // === Responses ===

    /// Takes a response into work: what is new in it, and for whom. An error refuses it as a whole, and then
    /// nothing has changed.
    pub(super) fn examine(&mut self, envelope: Envelope, serial: u64) -> Result<Findings, String> {
        let Envelope { version, nonce, items, removed, fault, .. } = envelope;
        if let Some(fault) = fault {
            return Err(fault);
        }
        let items: Vec<Item> = items.into_iter().filter(|item| self.wants_item(item)).collect();
        self.check_duplicates(&items, &removed, serial)?;

        let mut findings = Findings::default();
        for sub in self.interest.wildcards() {
            findings.deliveries.entry(*sub).or_default();
        }
        let heartbeats_only = !items.is_empty() && items.iter().all(|item| item.body.is_none());
        let mut changed = HashMap::new();
        for item in items {
            self.examine_item(item, &version, &mut findings, &mut changed);
        }
        if self.protocol == Protocol::Sotw && !heartbeats_only {
            let full = self.kind.is_full_state();
            let interest = &self.interest;
            let gone = self.inventory.names_where(|held| {
                held.seen != serial && (full || !interest.is_explicit(&held.resource.name))
            });
            for name in gone {
                self.remove(&name, &mut findings);
            }
        }
        for name in removed {
            self.remove(&Arc::from(name.as_str()), &mut findings);
        }
        let in_work = InWork { serial, nonce, version, changed, unanswered: 0, rejections: Vec::new() };
        self.in_work = Some(in_work);
        Ok(findings)
    }

    /// The consumers that the updates of the response in work went to.
    pub(super) fn handed_out(&mut self, updates: usize) {
        if let Some(work) = &mut self.in_work {
            work.unanswered = updates;
        }
    }

    /// One update of the response `serial` was answered; true when it was the last.
    pub(super) fn answered(&mut self, serial: u64, rejected: Vec<Rejection>) -> bool {
        let Some(work) = self.in_work.as_mut().filter(|work| work.serial == serial) else { return false };
        for rejection in rejected {
            if let Some(changed) = work.changed.get_mut(&rejection.name) {
                changed.refused += 1;
            }
            let listed = work.rejections.len() == MAX_LISTED || work.rejections.contains(&rejection);
            if !listed {
                work.rejections.push(rejection);
            }
        }
        work.unanswered = work.unanswered.saturating_sub(1);
        work.unanswered == 0
    }

    /// Ends the work on a response: what was accepted by anyone is held from now on.
    pub(super) fn complete(&mut self, unix_ms: u64) -> Option<Outcome> {
        let work = self.in_work.take()?;
        let mut ttls = Vec::new();
        for (name, changed) in work.changed {
            let handed = changed.handed.len();
            if handed > 0 && changed.refused >= handed {
                continue;
            }
            let held = Held {
                resource: changed.resource,
                hash: changed.hash,
                accepted: handed > 0,
                disputed: changed.refused > 0,
                seen: work.serial,
                expires: None,
                updated_unix_ms: unix_ms,
            };
            let before = self.inventory.put(held).and_then(|held| held.expires);
            if before.is_some() || changed.ttl.is_some() {
                ttls.push((name, before, changed.ttl));
            }
        }
        let error = (!work.rejections.is_empty()).then(|| self.kind.rejection_message(&work.rejections));
        if error.is_none() {
            self.version = work.version;
            self.settled = true;
        }
        Some(Outcome { ttls, nonce: work.nonce, error })
    }

    /// Queues the answer to a response that was worked on.
    pub(super) fn answer(&mut self, outcome: Outcome) {
        self.push_answer(outcome.nonce, outcome.error);
    }

    /// Queues the refusal of a response that was not.
    pub(super) fn refuse(&mut self, nonce: String, reason: String) {
        self.push_answer(nonce, Some(reason));
    }

    fn push_answer(&mut self, nonce: String, error: Option<String>) {
        // Without a nonce there is nobody to answer: a file, or a stream that is gone.
        if !nonce.is_empty() && self.started {
            self.answers.push_back(Answer { nonce, version: self.version.clone(), error });
        }
    }

    /// What there is of `names` for a subscriber that has just come: what is being applied by others, too, and then
    /// its answer counts for that response (serial and version).
    pub(super) fn catch_up(
        &mut self,
        sub: SubId,
        names: &[Arc<str>],
    ) -> (Vec<Resource>, Option<(u64, Arc<str>)>) {
        let mut resources = Vec::new();
        let mut joins = false;
        for name in names {
            if let Some(changed) = self.in_work.as_mut().and_then(|work| work.changed.get_mut(name)) {
                changed.handed.push(sub);
                resources.push(changed.resource.clone());
                joins = true;
            } else if let Some(held) = self.inventory.get(name) {
                resources.push(held.resource.clone());
            }
        }
        let response = self.in_work.as_mut().filter(|_| joins).map(|work| {
            work.unanswered += 1;
            (work.serial, work.version.clone())
        });
        (resources, response)
    }

    /// Names that `sub` wants, held or being applied.
    pub(super) fn names_for(&self, sub: SubId) -> Vec<Arc<str>> {
        let mut names =
            self.inventory.names_where(|held| self.interest.is_wanted_by(sub, &held.resource.name));
        let in_work = self.in_work.iter().flat_map(|work| work.changed.keys());
        names.extend(in_work.filter(|name| self.interest.is_wanted_by(sub, name)).cloned());
        names.sort_unstable();
        names.dedup();
        names
    }

    /// A subscriber leaves: it has accepted nothing of what is being applied.
    pub(super) fn abandon(&mut self, sub: SubId) {
        for changed in self.in_work.iter_mut().flat_map(|work| work.changed.values_mut()) {
            changed.handed.retain(|other| *other != sub);
        }
    }

    /// The answer to an update that came out of the inventory.
    pub(super) fn reviewed(&mut self, handed: Vec<(Arc<str>, u64)>, rejected: &[Rejection]) -> Dropped {
        let mut dropped = Vec::new();
        for (name, hash) in handed {
            let Some(held) = self.inventory.get_mut(&name).filter(|held| held.hash == hash) else { continue };
            let refused = rejected.iter().any(|rejection| rejection.name == name);
            if refused && !held.accepted {
                let held = self.inventory.remove(&name);
                dropped.extend(held.and_then(|held| held.expires).map(|at| (name, at)));
            } else {
                held.disputed |= refused;
                held.accepted = true;
            }
        }
        dropped
    }

    /// The TTL of `name` passed.
    pub(super) fn expire(&mut self, name: &Arc<str>) -> Findings {
        let mut findings = Findings::default();
        if let Some(held) = self.inventory.get_mut(name) {
            held.expires = None;
        }
        self.remove(name, &mut findings);
        findings
    }

    /// A name that was given up counts as long as the server has not been told: if it is taken again before, what
    /// came in the meantime will not come a second time.
    fn wants_item(&self, item: &Item) -> bool {
        let mut names = std::iter::once(&item.name).chain(&item.aliases).map(Text::as_str);
        names.any(|name| self.interest.wants(name) || self.interest.awaits_unsubscribe(name))
    }

    /// Marks what is held as seen on the way.
    fn check_duplicates(&mut self, items: &[Item], removed: &[Text], serial: u64) -> Result<(), String> {
        let mut fresh = HashSet::new();
        for item in items {
            let name = item.name.as_str();
            let first = match self.inventory.get_mut(name) {
                Some(held) => std::mem::replace(&mut held.seen, serial) != serial,
                None => fresh.insert(name),
            };
            if !first {
                return Err(self.kind.duplicate_message(name));
            }
        }
        let mut gone = HashSet::new();
        for name in removed {
            let name = name.as_str();
            let listed =
                fresh.contains(name) || self.inventory.get(name).is_some_and(|held| held.seen == serial);
            if listed || !gone.insert(name) {
                return Err(format!("duplicate name {name} found in the union of added+removed resources"));
            }
        }
        Ok(())
    }

    fn examine_item(
        &mut self,
        item: Item,
        response_version: &Arc<str>,
        findings: &mut Findings,
        changed: &mut HashMap<Arc<str>, Changed>,
    ) {
        let mut subscribers = self.interest.named_subscribers(item.name.as_str());
        for alias in &item.aliases {
            for sub in self.interest.named_subscribers(alias.as_str()) {
                if !subscribers.contains(&sub) {
                    subscribers.push(sub);
                }
            }
        }
        let held = self.inventory.get_mut(item.name.as_str());
        let Some(body) = item.body else {
            match held {
                // A heartbeat: the same version, and only the TTL starts anew.
                Some(held)
                    if item
                        .version
                        .as_ref()
                        .is_none_or(|version| version.as_str() == &*held.resource.version) =>
                {
                    findings.ttls.push((held.resource.name.clone(), held.expires, item.ttl));
                }
                // The server knows no virtual host for these hosts.
                _ => {
                    for alias in item.aliases {
                        let alias: Arc<str> = alias.as_str().into();
                        for sub in self.interest.named_subscribers(&alias) {
                            findings.deliveries.entry(sub).or_default().removed.push(alias.clone());
                        }
                    }
                }
            }
            return;
        };
        let hash = xxh64(&body, 0);
        let version = match item.version {
            Some(version) => version.as_str().into(),
            None => response_version.clone(),
        };
        for sub in &subscribers {
            findings.deliveries.entry(*sub).or_default();
        }
        let name = match held {
            Some(held) if held.hash == hash && held.accepted && !held.disputed => {
                held.resource.version = version.clone();
                if held.expires.is_some() || item.ttl.is_some() {
                    findings.ttls.push((held.resource.name.clone(), held.expires, item.ttl));
                }
                if held.resource.aliases.len() == item.aliases.len()
                    && held
                        .resource
                        .aliases
                        .iter()
                        .zip(&item.aliases)
                        .all(|(old, new)| **old == *new.as_str())
                {
                    return;
                }
                held.resource.name.clone()
            }
            Some(held) => held.resource.name.clone(),
            None => item.name.as_str().into(),
        };
        let resource = Resource {
            name: name.clone(),
            version,
            aliases: item.aliases.iter().map(|alias| alias.as_str().into()).collect(),
            // A slice would keep the whole response in memory for as long as this one resource lives.
            body: Bytes::copy_from_slice(&body),
        };
        let wildcards = self.interest.wildcards();
        subscribers.retain(|sub| !wildcards.contains(sub));
        let handed: Subscribers = wildcards.iter().chain(&subscribers).copied().collect();
        for sub in &handed {
            findings.deliveries.entry(*sub).or_default().resources.push(resource.clone());
        }
        changed.insert(name, Changed { resource, hash, ttl: item.ttl, handed, refused: 0 });
    }

    fn remove(&mut self, name: &Arc<str>, findings: &mut Findings) {
        let held = self.inventory.remove(name);
        if let Some(at) = held.as_ref().and_then(|held| held.expires) {
            findings.ttls.push((name.clone(), Some(at), None));
        }
        let wildcards = if held.is_some() { self.interest.wildcards() } else { &[] };
        let mut subscribers = self.interest.named_subscribers(name);
        subscribers.retain(|sub| !wildcards.contains(sub));
        for sub in wildcards.iter().chain(&subscribers) {
            findings.deliveries.entry(*sub).or_default().removed.push(name.clone());
        }
    }
}

fn error_detail(mut message: String) -> wire::Status {
    if message.len() > MAX_DETAIL {
        let end = (0..=MAX_DETAIL).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
        message.truncate(end);
        message.push_str("...");
    }
    wire::Status { code: REJECTED, message }
}
