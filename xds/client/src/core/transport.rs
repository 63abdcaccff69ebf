//! The driver's side: streams come and go, messages arrive, time passes, requests go out.

use std::time::Instant;

use bytes::Bytes;

use super::envelope::Envelope;
use super::mux::{Link, MuxKind};
use super::pacing::jitter;
use super::timers::Timer;
use super::{Action, Core, Event, Failure, MuxId, StreamId, SubId, Via};
use crate::Protocol;

/// Responses of one type that may wait for an answer before the stream is read no further.
const MAX_BACKLOG: usize = 16;

/// Events that may wait for the consumer before streams are read no further.
const MAX_EVENTS: usize = 1024;

/// `grpc-status: UNAVAILABLE`, for failures that have no status of their own.
const UNAVAILABLE: i32 = 14;

/// `grpc-status: INTERNAL`: a message could not be decoded.
const INTERNAL: i32 = 13;

impl Core {
    /// The stream of an [`Action::Open`] is up: the server has answered with headers, or will accept messages.
    pub fn stream_opened(&mut self, stream: StreamId, now: Instant) {
        let Some(state) = self.muxes.get_mut(&stream.mux) else { return };
        if state.link != Link::Opening(stream.generation) {
            return;
        }
        state.link = Link::Open(stream.generation);
        state.stats.connected = true;
        state.node_sent = false;
        state.in_flight = 0;
        state.forget_queue();
        let mut dropped = Vec::new();
        for (index, feed) in state.feeds.iter_mut().enumerate() {
            dropped.push((index, feed.restart()));
        }
        for (index, dropped) in dropped {
            self.forget_expiry(stream.mux, index, dropped);
        }
        self.events.push_back(Event::Connected { mux: stream.mux });
        self.flush(stream.mux, now);
    }

    /// A stream ended, or could not be opened. All that it brought stays.
    pub fn stream_closed(&mut self, stream: StreamId, code: i32, message: &str, now: Instant) {
        let Some(state) = self.muxes.get_mut(&stream.mux) else { return };
        if !state.is_current(stream.generation) {
            return;
        }
        state.note_failure();
        let at = now + state.backoff.next(&mut self.rng);
        state.link = Link::Waiting(at);
        state.stats.connected = false;
        if let Some(refill) = state.refill.take() {
            self.timers.clear(refill, &Timer::Refill(stream.mux));
        }
        self.timers.set(at, Timer::Reconnect(stream.mux));
        self.report_failure(stream.mux, code, message);
    }

    /// A message arrived on a stream.
    pub fn message(&mut self, stream: StreamId, message: Bytes, now: Instant) {
        let Some(state) = self.muxes.get_mut(&stream.mux) else { return };
        if state.link != Link::Open(stream.generation) {
            return;
        }
        let only = matches!(state.kind, MuxKind::Grpc(..)).then(|| state.feeds.first()).flatten();
        let expected = only.map(|feed| feed.kind.url().to_owned());
        match Envelope::decode(state.kind.protocol(), message, expected.as_deref()) {
            Ok(envelope) => {
                state.note_response();
                if !envelope.identifier.is_empty() && state.stats.identifier != envelope.identifier {
                    state.stats.identifier.clone_from(&envelope.identifier);
                }
                // A type that was never asked for on this stream has no subscriber and gets no answer.
                let feed =
                    state.find_feed(&envelope.type_url).filter(|index| state.feeds[*index].is_started());
                match feed {
                    Some(feed) => self.received(stream.mux, feed, envelope, now),
                    None => tracing::warn!(
                        type_url = envelope.type_url,
                        "ignoring a response that nobody asked for"
                    ),
                }
            }
            Err(error) => {
                self.actions.push_back(Action::Close { stream });
                self.stream_closed(stream, INTERNAL, &format!("malformed discovery response: {error}"), now);
            }
        }
    }

    /// The content of a watched file, or the answer to a poll: an encoded `DiscoveryResponse`, or why there is
    /// none.
    pub fn fetched(&mut self, stream: StreamId, content: Result<Bytes, String>, now: Instant) {
        let Some(state) = self.muxes.get_mut(&stream.mux) else { return };
        if state.link != Link::Open(stream.generation) {
            return;
        }
        if let MuxKind::Rest(rest, _) = &state.kind {
            let at = now + rest.refresh_delay + jitter(rest.refresh_delay, &mut self.rng);
            state.next_poll = Some(at);
            self.timers.set(at, Timer::Poll(stream.mux));
        }
        let Some(expected) = state.feeds.first().map(|feed| feed.kind.url().to_owned()) else { return };
        let decoded = content.and_then(|content| {
            Envelope::decode(Protocol::Sotw, content, Some(&expected)).map_err(|error| error.to_string())
        });
        match decoded {
            Ok(mut envelope) => {
                if matches!(state.kind, MuxKind::Path(_)) {
                    // Nobody waits for an answer to a file.
                    envelope.nonce.clear();
                }
                if !state.stats.connected {
                    state.stats.connected = true;
                    self.events.push_back(Event::Connected { mux: stream.mux });
                }
                self.received(stream.mux, 0, envelope, now);
                self.flush(stream.mux, now);
            }
            Err(message) => {
                state.stats.connected = false;
                self.report_failure(stream.mux, UNAVAILABLE, &message);
            }
        }
    }

    /// The transport has sent one message of an [`Action::Send`].
    pub fn sent(&mut self, stream: StreamId, now: Instant) {
        let Some(state) = self.muxes.get_mut(&stream.mux) else { return };
        if state.link == Link::Open(stream.generation) {
            state.in_flight = state.in_flight.saturating_sub(1);
            self.flush(stream.mux, now);
        }
    }

    /// Whether the transport should read on. While not, responses pile up behind HTTP/2 flow control, on the
    /// server's side.
    pub fn wants_messages(&self, stream: StreamId) -> bool {
        self.events.len() < MAX_EVENTS
            && self
                .muxes
                .get(&stream.mux)
                .is_none_or(|state| state.feeds.iter().all(|feed| feed.backlog() < MAX_BACKLOG))
    }

    /// Time has come to [`Core::next_deadline`].
    pub fn tick(&mut self, now: Instant) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Fetch(id) => self.fetch_timed_out(id),
                Timer::Reconnect(mux) => self.open(mux, now),
                Timer::Refill(mux) => {
                    if let Some(state) = self.muxes.get_mut(&mux) {
                        state.refill = None;
                    }
                    self.flush(mux, now);
                }
                Timer::Poll(mux) => self.poll(mux),
                Timer::Expiry(mux, feed, name) => self.expired(mux, feed, &name, now),
            }
        }
    }

    /// Opens a mux with its first subscription.
    pub(super) fn start(&mut self, id: MuxId, now: Instant) {
        if self.muxes.get(&id).is_some_and(|state| state.link == Link::Idle) {
            self.open(id, now);
        }
    }

    /// Sends all that may be sent now.
    pub(super) fn flush(&mut self, id: MuxId, now: Instant) {
        let Some(state) = self.muxes.get_mut(&id) else { return };
        let Link::Open(generation) = state.link else { return };
        let stream = StreamId { mux: id, generation };
        match &state.kind {
            MuxKind::Ads(_) | MuxKind::Grpc(..) => self.flush_stream(stream, now),
            // What is asked for anew is in the file, or it is not.
            MuxKind::Path(path) => {
                let feed = &mut state.feeds[0];
                let (added, removed) = feed.interest.news();
                if !added.is_empty() {
                    self.actions.push_back(Action::Watch { stream, path: path.clone() });
                }
                if !added.is_empty() || !removed.is_empty() {
                    let (_, dropped) = feed.next_request(None, true);
                    self.forget_expiry(id, 0, dropped);
                }
            }
            MuxKind::Rest(..) => {
                if state.feeds[0].interest.has_news()
                    && let Some(at) = state.next_poll
                {
                    self.timers.clear(at, &Timer::Poll(id));
                    self.poll(id);
                }
            }
        }
    }

    fn open(&mut self, id: MuxId, now: Instant) {
        let generation = self.next_serial();
        let Some(state) = self.muxes.get_mut(&id) else { return };
        let stream = StreamId { mux: id, generation };
        if let Some((service, method)) = state.destination() {
            state.link = Link::Opening(generation);
            self.actions.push_back(Action::Open { stream, service, method });
            return;
        }
        state.link = Link::Open(generation);
        match &state.kind {
            MuxKind::Rest(..) => self.poll(id),
            _ => {
                // A wildcard or namespace has no names whose arrival would have the file read.
                if let MuxKind::Path(path) = &state.kind
                    && !state.feeds[0].interest.has_news()
                {
                    self.actions.push_back(Action::Watch { stream, path: path.clone() });
                }
                self.flush(id, now);
            }
        }
    }

    fn flush_stream(&mut self, stream: StreamId, now: Instant) {
        let id = stream.mux;
        loop {
            let Some(state) = self.muxes.get_mut(&id) else { return };
            let paused = &self.paused;
            let Some(index) = state.next_to_send(|kind| paused.contains_key(kind)) else { return };
            if !state.has_window() || state.refill.is_some() {
                return;
            }
            if let Some(limiter) = &mut state.limiter
                && let Err(at) = limiter.take(now)
            {
                state.stats.rate_limit_enforced += 1;
                state.refill = Some(at);
                self.timers.set(at, Timer::Refill(id));
                return;
            }
            let with_node = !(state.node_sent && state.node_on_first_message_only());
            let node = with_node.then(|| self.options.node.clone());
            let resume = state.resumes();
            let (message, dropped) = state.feeds[index].next_request(node, resume);
            state.node_sent = true;
            state.in_flight += 1;
            state.sent(index);
            self.forget_expiry(id, index, dropped);
            self.actions.push_back(Action::Send { stream, message });
        }
    }

    fn poll(&mut self, id: MuxId) {
        let Some(state) = self.muxes.get_mut(&id) else { return };
        let (Link::Open(generation), MuxKind::Rest(rest, endpoint)) = (state.link, &state.kind) else {
            return;
        };
        let (rest, endpoint) = (rest.clone(), *endpoint);
        state.next_poll = None;
        let (request, dropped) = state.feeds[0].next_request(Some(self.options.node.clone()), true);
        self.forget_expiry(id, 0, dropped);
        self.actions.push_back(Action::Poll {
            stream: StreamId { mux: id, generation },
            rest,
            endpoint,
            request,
        });
    }

    fn fetch_timed_out(&mut self, id: SubId) {
        let Some(sub) = self.subs.get_mut(&id) else { return };
        sub.fetch_deadline = None;
        sub.stats.timed_out();
        self.changed_stats.insert(id);
        self.events.push_back(Event::Failed { sub: id, failure: Failure::FetchTimeout });
    }

    fn report_failure(&mut self, id: MuxId, code: i32, message: &str) {
        let Some(state) = self.muxes.get(&id) else { return };
        let (via, target) = (state.via(), state.target());
        self.events.push_back(Event::Disconnected {
            mux: id,
            via,
            target,
            code,
            message: message.to_owned(),
        });
        for (sub_id, sub) in &mut self.subs {
            if sub.mux != id {
                continue;
            }
            sub.stats.failed();
            self.changed_stats.insert(*sub_id);
            // A server is waited for; a file is not, as in Envoy.
            if via == Via::File {
                if let Some(at) = sub.fetch_deadline.take() {
                    self.timers.clear(at, &Timer::Fetch(*sub_id));
                }
                self.events.push_back(Event::Failed { sub: *sub_id, failure: Failure::Unreadable });
            }
        }
    }
}
