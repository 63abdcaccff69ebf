//! The way of a response: from the wire to the consumers and back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xxhash_rust::xxh64::xxh64;

use super::envelope::Envelope;
use super::feed::{Delivery, Dropped};
use super::mux::MuxKind;
use super::timers::Timer;
use super::{Core, Event, Failure, MuxId, Outstanding, SubId, Update, UpdateToken};

impl Core {
    /// A response of one type has arrived. Responses of a type are worked on one after the other.
    pub(super) fn received(&mut self, mux: MuxId, feed: usize, envelope: Envelope, now: Instant) {
        let Some(state) = self.feed(mux, feed) else { return };
        if state.is_busy() {
            state.inbox.push_back(envelope);
        } else {
            self.work_on(mux, feed, envelope, now);
            self.work_on_inbox(mux, feed, now);
        }
    }

    /// All updates of the response in work are answered.
    pub(super) fn complete(&mut self, mux: MuxId, feed: usize, now: Instant) {
        self.conclude(mux, feed, now);
        self.work_on_inbox(mux, feed, now);
    }

    /// Hands to `sub` what is already held of `names`, or of all that it wants.
    pub(super) fn deliver_held(&mut self, id: SubId, names: Option<Vec<Arc<str>>>, now: Instant) {
        let Some(sub) = self.subs.get(&id) else { return };
        let (mux, index) = (sub.mux, sub.feed);
        let Some(feed) = self.muxes.get_mut(&mux).and_then(|state| state.feeds.get_mut(index)) else {
            return;
        };
        let broad = names.is_none();
        let names = names.unwrap_or_else(|| feed.names_for(id));
        let (resources, response) = feed.catch_up(id, &names);
        // A wildcard to which the server has already answered "nothing" need not wait for it again.
        if !resources.is_empty() || (broad && feed.settled) {
            let (response, version) = match response {
                Some((serial, version)) => (Some(serial), version),
                None => (None, feed.version.clone()),
            };
            let delivery = Delivery { resources, removed: Vec::new() };
            self.hand_out(mux, index, id, delivery, response, version, now);
        }
    }

    /// The TTL of a resource passed.
    pub(super) fn expired(&mut self, mux: MuxId, index: usize, name: &Arc<str>, now: Instant) {
        let Some(feed) = self.feed(mux, index) else { return };
        let findings = feed.expire(name);
        let version = feed.version.clone();
        for (sub, delivery) in findings.deliveries {
            if !delivery.removed.is_empty() {
                self.hand_out(mux, index, sub, delivery, None, version.clone(), now);
            }
        }
    }

    /// Takes the TTL timers of dropped resources back.
    pub(super) fn forget_expiry(&mut self, mux: MuxId, feed: usize, dropped: Dropped) {
        for (name, at) in dropped {
            self.timers.clear(at, &Timer::Expiry(mux, feed, name));
        }
    }

    /// A whole response, or a file, is unusable: everyone waiting for this type hears it.
    pub(super) fn reject_for(&mut self, subs: impl IntoIterator<Item = SubId>, reason: &str) {
        for id in subs {
            let Some(sub) = self.subs.get_mut(&id) else { continue };
            sub.stats.rejected();
            sub.heard = true;
            if let Some(at) = sub.fetch_deadline.take() {
                self.timers.clear(at, &Timer::Fetch(id));
            }
            self.changed_stats.insert(id);
            self.events.push_back(Event::Failed { sub: id, failure: Failure::Rejected(reason.to_owned()) });
        }
    }

    fn work_on_inbox(&mut self, mux: MuxId, feed: usize, now: Instant) {
        while let Some(envelope) =
            self.feed(mux, feed).filter(|state| !state.is_busy()).and_then(|state| state.inbox.pop_front())
        {
            self.work_on(mux, feed, envelope, now);
        }
    }

    fn work_on(&mut self, mux: MuxId, index: usize, envelope: Envelope, now: Instant) {
        let serial = self.next_serial();
        let Some(feed) = self.feed(mux, index) else { return };
        let (nonce, version) = (envelope.nonce.clone(), envelope.version.clone());
        let findings = match feed.examine(envelope, serial) {
            Ok(findings) => findings,
            Err(reason) => {
                let everyone = feed.interest.everyone();
                feed.refuse(nonce, reason.clone());
                self.reject_for(everyone, &reason);
                self.flush(mux, now);
                return;
            }
        };
        let children = feed.kind.children();
        self.restart_ttls(mux, index, findings.ttls, now);
        self.reject_missing_in_file(mux, index, &findings.deliveries.keys().copied().collect());

        let unix_ms = self.unix_ms(now);
        let mut updates = 0;
        for (id, delivery) in findings.deliveries {
            let Some(sub) = self.subs.get_mut(&id) else { continue };
            if delivery.resources.is_empty() && delivery.removed.is_empty() && sub.heard {
                sub.stats.succeeded(&version, unix_ms, Duration::ZERO);
                self.changed_stats.insert(id);
            } else {
                self.hand_out(mux, index, id, delivery, Some(serial), version.clone(), now);
                updates += 1;
            }
        }
        if let Some(feed) = self.feed(mux, index) {
            feed.handed_out(updates);
        }
        for child in children {
            self.pause(child);
        }
        if updates == 0 {
            self.conclude(mux, index, now);
        }
    }

    /// Stores what was accepted, lets the dependent types send, and then answers: a server sees the new names of
    /// EDS before the acknowledgement of CDS, as with Envoy.
    fn conclude(&mut self, mux: MuxId, index: usize, now: Instant) {
        let unix_ms = self.unix_ms(now);
        let Some(feed) = self.feed(mux, index) else { return };
        let children = feed.kind.children();
        let Some(mut outcome) = feed.complete(unix_ms) else { return };
        self.restart_ttls(mux, index, std::mem::take(&mut outcome.ttls), now);
        for child in children {
            self.resume(child, now);
        }
        if let Some(feed) = self.feed(mux, index) {
            feed.answer(outcome);
        }
        self.flush(mux, now);
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one event; a struct for them would be the event"
    )]
    fn hand_out(
        &mut self,
        mux: MuxId,
        feed: usize,
        id: SubId,
        delivery: Delivery,
        response: Option<u64>,
        version: Arc<str>,
        now: Instant,
    ) {
        let token = UpdateToken(self.next_serial());
        let Some(sub) = self.subs.get_mut(&id) else { return };
        sub.heard = true;
        if let Some(at) = sub.fetch_deadline.take() {
            self.timers.clear(at, &Timer::Fetch(id));
        }
        let Some(kind) = self.feed(mux, feed).map(|feed| feed.kind.clone()) else { return };
        let Delivery { resources, removed } = delivery;
        let reviewed = match response {
            Some(_) => Vec::new(),
            None => resources.iter().map(|one| (one.name.clone(), xxh64(&one.body, 0))).collect(),
        };
        let version_text = version.clone();
        let outstanding =
            Outstanding { mux, feed, sub: id, response, version: version_text, reviewed, since: now };
        self.outstanding.insert(token, outstanding);
        self.events.push_back(Event::Update(Update { sub: id, kind, token, version, resources, removed }));
    }

    fn restart_ttls(
        &mut self,
        mux: MuxId,
        index: usize,
        ttls: Vec<(Arc<str>, Option<Instant>, Option<Duration>)>,
        now: Instant,
    ) {
        for (name, before, ttl) in ttls {
            let timer = Timer::Expiry(mux, index, name.clone());
            if let Some(at) = before {
                self.timers.clear(at, &timer);
            }
            let held = self.feed(mux, index).and_then(|feed| feed.inventory.get_mut(&name));
            let Some(held) = held else { continue };
            held.expires = ttl.map(|ttl| now + ttl);
            if let Some(at) = held.expires {
                self.timers.set(at, timer);
            }
        }
    }

    /// A file has nobody behind it who could still send a missing resource, so that is an error, not a wait.
    fn reject_missing_in_file(&mut self, mux: MuxId, index: usize, found: &BTreeSet<SubId>) {
        let Some(state) = self.muxes.get(&mux) else { return };
        let MuxKind::Path(path) = &state.kind else { return };
        let missing: Vec<_> = state.feeds[index]
            .interest
            .names()
            .flat_map(|(name, subs)| subs.iter().map(move |sub| (*sub, name)))
            .filter(|(sub, _)| !found.contains(sub))
            .map(|(sub, name)| (sub, format!("no resource named {name} in {}", path.path.display())))
            .collect();
        for (sub, reason) in missing {
            self.reject_for([sub], &reason);
        }
    }
}
