//! The HTTP filters of one stream.
//!
//! A message goes through the filters of one direction as head, data and end or trailers. Each filter has a [`Station`]
//! in each direction: what it holds back, and what has come up behind that. Data never overtake the head, nor the end
//! the data. While a filter pauses, its body phase is shown everything it holds whenever more has come, so that it may
//! let go by itself; what it does not want to see waits for its resume handle. While a phase waits for a future, what
//! arrives is kept and shown to it afterwards.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use waystation_filter_api::http::{
    Asked, BodyData, Flow, Hold, HttpFilter, HttpFilterFactory, LocalReply, Phases, StreamCx,
};

use super::Stream;
use crate::http::Table;
use crate::http::downstream::{Downstream, Piece};
use crate::http::end::StreamEnd;

mod build;
mod driver;
mod station;

use build::levels;
use driver::PhaseDriver;
use station::{Part, Station, Stop, Tail};

/// The filters that this stream goes through, in the order of the configuration.
#[derive(Default)]
pub(super) struct Chain {
    slots: Vec<Slot>,
    /// The route that the filters were made for and are configured by, whatever is selected later.
    route: Option<(Rc<Table>, u32)>,
    phases: Phases,
    request: Lane,
    response: Lane,
    /// Data of the response that have passed the filters.
    pub(super) encoded: Vec<Bytes>,
    /// An encode filter has answered: its reply goes past the others.
    skip_encode: bool,
    /// What a phase passes on ahead of what it was shown.
    ahead: Vec<Bytes>,
}

/// A direction through the chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Request,
    Response,
}

/// How far a message has come in one direction.
#[derive(Default)]
struct Lane {
    /// The head has passed every filter.
    head_passed: bool,
    /// The filter that holds the head, otherwise.
    head_at: usize,
    /// The message is only a head.
    head_is_all: bool,
    /// The end has passed every filter.
    passed: bool,
    /// Some filter may hold something.
    held: bool,
}

struct Slot {
    /// Which of the connection manager's filters it is.
    entry: usize,
    /// What has made the filter, if not the connection manager's own factory.
    factory: Option<Arc<dyn HttpFilterFactory>>,
    filter: Box<dyn HttpFilter>,
    phases: Phases,
    request: Station,
    response: Station,
}

/// What a phase is shown.
enum Shown<'s> {
    Head { end: bool },
    Informational,
    Data(&'s mut BodyData, bool),
    Trailers,
    LocalReply(&'s mut LocalReply),
    Complete,
}

/// Why a message does not go on.
pub(super) enum Stopped {
    /// A filter has answered.
    Reply(Box<LocalReply>),
    /// The stream is over.
    End(StreamEnd),
}

/// Whether more may be buffered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Room {
    Free,
    /// Stop reading until something goes on.
    Full,
    Exceeded,
}

type Progress = Result<(), Box<LocalReply>>;

impl Chain {
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether response data go straight on.
    pub(super) fn response_is_clear(&self) -> bool {
        !self.phases.response_body && !self.response.held && self.encoded.is_empty()
    }

    /// Whether the response head has passed the filters.
    pub(super) fn response_head_passed(&self) -> bool {
        self.response.head_passed
    }

    /// Whether the response's end has passed the filters.
    pub(super) fn response_passed(&self) -> bool {
        self.response.passed
    }

    /// Whether the response is only a head.
    pub(super) fn response_is_head(&self) -> bool {
        self.response.head_is_all
    }

    /// From here on responses go past the encode filters.
    pub(super) fn skip_encode(&mut self) {
        self.skip_encode = true;
    }

    fn lane(&mut self, way: Way) -> &mut Lane {
        match way {
            Way::Request => &mut self.request,
            Way::Response => &mut self.response,
        }
    }

    fn steps(&self, way: Way) -> usize {
        if way == Way::Response && self.skip_encode { 0 } else { self.slots.len() }
    }

    /// The place in `slots` of a step, which counts in the order of `way`.
    fn place(&self, way: Way, step: usize) -> usize {
        match way {
            Way::Request => step,
            Way::Response => self.slots.len() - 1 - step,
        }
    }

    fn station(&mut self, way: Way, step: usize) -> &mut Station {
        let place = self.place(way, step);
        let slot = &mut self.slots[place];
        match way {
            Way::Request => &mut slot.request,
            Way::Response => &mut slot.response,
        }
    }

    fn phases(&self, way: Way, step: usize) -> (bool, bool, bool) {
        let phases = self.slots[self.place(way, step)].phases;
        match way {
            Way::Request => (phases.request_headers, phases.request_body, phases.request_trailers),
            Way::Response => (phases.response_headers, phases.response_body, phases.response_trailers),
        }
    }

    /// Keeps what a flow other than `Continue` says; `true` when the filter holds.
    fn stop(&mut self, way: Way, step: usize, part: Part, flow: Flow) -> Result<bool, Box<LocalReply>> {
        let stop = match flow {
            Flow::Continue | Flow::Again | Flow::Anew => Stop::Open,
            Flow::Reply(reply) => return Err(reply),
            Flow::Pause(hold) => Stop::Paused(hold),
            Flow::Wait(future) => Stop::Waiting(future),
        };
        let holds = !matches!(stop, Stop::Open);
        let station = self.station(way, step);
        (station.stop, station.part) = (stop, part);
        self.lane(way).held |= holds;
        Ok(holds)
    }

    fn room(&mut self, way: Way, limit: usize) -> Room {
        if !self.lane(way).held {
            return Room::Free;
        }
        let mut room = Room::Free;
        for step in 0..self.steps(way) {
            let station = self.station(way, step);
            if station.bytes > limit && matches!(station.stop, Stop::Paused(Hold::Buffer)) {
                return Room::Exceeded;
            }
            if station.bytes >= limit && !matches!(station.stop, Stop::Paused(Hold::Buffer)) {
                room = Room::Full;
            }
        }
        room
    }
}

impl<D: Downstream> Stream<'_, D> {
    /// Takes the request head through the filters, and what has come of the body. `true` when one of them has answered.
    pub(super) async fn decode_head(&mut self) -> Result<bool, StreamEnd> {
        match self.decode_what_came().await {
            Ok(()) => {}
            Err(Stopped::End(end)) => return Err(end),
            Err(Stopped::Reply(reply)) => {
                self.reply(*reply).await?;
                return Ok(true);
            }
        }
        if self.heads.request.authority().is_none() || self.heads.request.method().is_none() {
            return Err(StreamEnd::FilterRemovedRequiredRequestHeaders);
        }
        Ok(false)
    }

    async fn decode_what_came(&mut self) -> Result<(), Stopped> {
        // A request that was redirected internally comes with its body. The list stays, for what passes the filters.
        let pieces: Vec<Bytes> = self.heads.kept.drain(..).collect();
        self.kept_bytes = 0;
        let (complete, trailers) = (self.request_complete, self.request_has_trailers);
        self.begin(Way::Request, complete && pieces.is_empty() && !trailers)?;
        let last = pieces.len();
        for (index, data) in (1..).zip(pieces) {
            self.pass_data(Way::Request, 0, data, complete && !trailers && index == last)?;
        }
        if complete && trailers {
            self.pass_trailers(Way::Request, 0)?;
        }
        std::future::poll_fn(|task| {
            loop {
                if self.chain.request.head_passed {
                    return Poll::Ready(Ok(()));
                }
                match self.poll_decode(task) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(stopped)) => return Poll::Ready(Err(stopped)),
                    Poll::Pending => break,
                }
            }
            if self.request_complete
                && let Poll::Ready(end) = self.down.poll_gone(task)
            {
                return Poll::Ready(Err(Stopped::End(end)));
            }
            self.poll_deadlines(task, None).map(|end| Err(Stopped::End(end)))
        })
        .await
    }

    /// Whether the request's end has passed the filters.
    pub(super) fn request_passed(&self) -> bool {
        if self.chain.is_empty() { self.request_complete } else { self.chain.request.passed }
    }

    /// Brings the request forward: reads from the client, and lets go what filters let go. What has passed them all is
    /// in `heads.kept`.
    pub(super) fn poll_decode(&mut self, task: &mut Context<'_>) -> Poll<Result<(), Stopped>> {
        if self.chain.request.held {
            match self.poll_stations(Way::Request, task) {
                Ok(true) => return Poll::Ready(Ok(())),
                Ok(false) => {}
                Err(stopped) => return Poll::Ready(Err(stopped)),
            }
        }
        match self.chain.room(Way::Request, self.cx.hcm.buffer_limit) {
            Room::Exceeded => return Poll::Ready(Err(Stopped::End(StreamEnd::RequestTooLarge))),
            Room::Full => return Poll::Pending,
            Room::Free if self.request_complete => return Poll::Pending,
            Room::Free => {}
        }
        let passed = match std::task::ready!(self.down.poll_piece(task, &mut self.heads.request_trailers)) {
            Err(end) => return Poll::Ready(Err(Stopped::End(end))),
            Ok(Piece::Data(data)) => self.pass_data(Way::Request, 0, data, false),
            Ok(Piece::Trailers) => {
                self.request_has_trailers = true;
                self.mark_request_complete();
                self.pass_trailers(Way::Request, 0)
            }
            Ok(Piece::End) => {
                self.mark_request_complete();
                self.pass_data(Way::Request, 0, Bytes::new(), true)
            }
        };
        Poll::Ready(passed.map_err(Stopped::from))
    }

    /// Begins to take the response head through the filters. Whether it has passed, `response_head_passed` tells.
    pub(super) fn begin_encode(&mut self, end: bool) -> Result<(), Stopped> {
        self.chain.response = Lane::default();
        self.chain.encoded.clear();
        for slot in &mut self.chain.slots {
            slot.response = Station::default();
        }
        self.begin(Way::Response, end).map_err(Stopped::from)?;
        self.check_response_head()
    }

    /// Takes response data to the filters; what passes them is in `chain.encoded`.
    pub(super) fn encode_data(&mut self, data: Bytes, end: bool) -> Result<(), Stopped> {
        self.pass_data(Way::Response, 0, data, end)?;
        self.check_response_head()?;
        match self.chain.room(Way::Response, self.cx.hcm.buffer_limit) {
            Room::Exceeded => Err(Stopped::End(StreamEnd::ResponseTooLarge)),
            Room::Full | Room::Free => Ok(()),
        }
    }

    /// Takes the response trailers to the filters.
    pub(super) fn encode_trailers(&mut self) -> Result<(), Stopped> {
        self.pass_trailers(Way::Response, 0)?;
        self.check_response_head()
    }

    /// Lets go what encode filters let go; `true` when something has moved.
    pub(super) fn poll_encode(&mut self, task: &mut Context<'_>) -> Result<bool, Stopped> {
        if !self.chain.response.held {
            return Ok(false);
        }
        let moved = self.poll_stations(Way::Response, task)?;
        self.check_response_head()?;
        Ok(moved)
    }

    /// Whether upstream must not be read, because a filter holds as much as it may.
    pub(super) fn encode_is_full(&mut self) -> bool {
        self.chain.room(Way::Response, self.cx.hcm.buffer_limit) != Room::Free
    }

    fn check_response_head(&self) -> Result<(), Stopped> {
        if self.chain.response.head_passed && !self.response_started && self.heads.response.status().is_none()
        {
            return Err(Stopped::End(StreamEnd::FilterRemovedRequiredResponseHeaders));
        }
        Ok(())
    }

    fn begin(&mut self, way: Way, end: bool) -> Progress {
        self.chain.lane(way).head_is_all = end;
        self.pass_head(way, 0)
    }

    fn pass_head(&mut self, way: Way, from: usize) -> Progress {
        let end = self.chain.lane(way).head_is_all;
        for step in from..self.chain.steps(way) {
            if !self.chain.phases(way, step).0 {
                continue;
            }
            let flow = self.phase(way, step, Shown::Head { end });
            self.select_anew();
            self.chain.ahead.clear();
            if self.chain.stop(way, step, Part::Head, flow)? {
                self.chain.lane(way).head_at = step;
                return Ok(());
            }
        }
        let lane = self.chain.lane(way);
        lane.head_passed = true;
        lane.passed |= end;
        Ok(())
    }

    fn pass_data(&mut self, way: Way, from: usize, data: Bytes, end: bool) -> Progress {
        let mut data = BodyData::Shared(data);
        for step in from..self.chain.steps(way) {
            let wants = self.chain.phases(way, step).1;
            let station = self.chain.station(way, step);
            match &station.stop {
                Stop::Open if !wants => continue,
                Stop::Open => {}
                Stop::Waiting(_) => {
                    let data = data.into_bytes();
                    station.bytes += data.len();
                    station.unseen.push(data);
                    station.tail = end.then_some(Tail { trailers: false, seen: false });
                    return Ok(());
                }
                Stop::Paused(_) if !wants => {
                    station.hold(data.into_bytes());
                    station.tail = end.then_some(Tail { trailers: false, seen: true });
                    return Ok(());
                }
                Stop::Paused(_) if !station.held.is_empty() => {
                    let mut all = station.take_held();
                    all.extend_from_slice(data.as_slice());
                    data = BodyData::Owned(all);
                }
                Stop::Paused(_) => {}
            }
            let held_head = self.holds_head(way, step);
            let flow = self.phase(way, step, Shown::Data(&mut data, end));
            self.select_anew();
            self.send_ahead(way, step)?;
            if self.chain.stop(way, step, Part::Data, flow)? {
                let station = self.chain.station(way, step);
                station.hold(data.into_bytes());
                station.tail = end.then_some(Tail { trailers: false, seen: true });
                return Ok(());
            }
            if held_head && self.holds_head(way, step) {
                self.pass_head(way, step + 1)?;
            }
        }
        let data = data.into_bytes();
        if !data.is_empty() {
            match way {
                Way::Request => {
                    for feed in &self.mirrors {
                        feed.push(&data);
                    }
                    self.kept_bytes += data.len();
                    self.heads.kept.push(data);
                }
                Way::Response => self.chain.encoded.push(data),
            }
        }
        if end {
            self.pass_end(way);
        }
        Ok(())
    }

    fn pass_trailers(&mut self, way: Way, from: usize) -> Progress {
        for step in from..self.chain.steps(way) {
            let wants = self.chain.phases(way, step).2;
            let station = self.chain.station(way, step);
            match &station.stop {
                Stop::Open if !wants => continue,
                Stop::Waiting(_) => {
                    station.tail = Some(Tail { trailers: true, seen: false });
                    return Ok(());
                }
                Stop::Paused(_) if !wants => {
                    station.tail = Some(Tail { trailers: true, seen: true });
                    return Ok(());
                }
                Stop::Open | Stop::Paused(_) => {}
            }
            let paused = matches!(station.stop, Stop::Paused(_));
            let flow = self.phase(way, step, Shown::Trailers);
            self.select_anew();
            // What goes ahead of the trailers goes behind the data that are held before them.
            let ahead = std::mem::take(&mut self.chain.ahead);
            for data in ahead {
                match paused {
                    true => self.chain.station(way, step).hold(data),
                    false => self.pass_data(way, step + 1, data, false)?,
                }
            }
            if self.chain.stop(way, step, Part::Trailers, flow)? {
                self.chain.station(way, step).tail = Some(Tail { trailers: true, seen: true });
                return Ok(());
            }
            if paused {
                self.let_go(way, step)?;
            }
        }
        self.pass_end(way);
        Ok(())
    }

    fn pass_end(&mut self, way: Way) {
        self.chain.lane(way).passed = true;
        if way == Way::Request {
            self.end_mirrors();
        }
    }

    fn holds_head(&mut self, way: Way, step: usize) -> bool {
        let lane = self.chain.lane(way);
        !lane.head_passed && lane.head_at == step
    }

    /// Sends on what a phase has passed on ahead of what it was shown.
    fn send_ahead(&mut self, way: Way, step: usize) -> Progress {
        if self.chain.ahead.is_empty() {
            return Ok(());
        }
        let ahead = std::mem::take(&mut self.chain.ahead);
        if self.holds_head(way, step) {
            self.pass_head(way, step + 1)?;
        }
        for data in ahead {
            self.pass_data(way, step + 1, data, false)?;
        }
        Ok(())
    }

    /// Shows a filter once more what it holds.
    fn show_again(&mut self, way: Way, step: usize) -> Result<Flow, Box<LocalReply>> {
        let station = self.chain.station(way, step);
        station.stop = Stop::Open;
        let flow = match station.part {
            Part::Head => {
                let end = self.chain.lane(way).head_is_all;
                self.phase(way, step, Shown::Head { end })
            }
            Part::Data => {
                let end = station.tail.is_some_and(|tail| tail.seen && !tail.trailers);
                let mut data = BodyData::Owned(station.take_held());
                let flow = self.phase(way, step, Shown::Data(&mut data, end));
                self.chain.station(way, step).hold(data.into_bytes());
                flow
            }
            Part::Trailers => self.phase(way, step, Shown::Trailers),
        };
        self.select_anew();
        self.send_ahead(way, step)?;
        Ok(flow)
    }

    /// Shows a filter that has waited and now pauses what came meanwhile.
    fn show_unseen(&mut self, way: Way, step: usize) -> Progress {
        let station = self.chain.station(way, step);
        if !matches!(station.stop, Stop::Paused(_)) || station.unseen.is_empty() && !station.has_unseen_tail()
        {
            return Ok(());
        }
        let unseen = std::mem::take(&mut station.unseen);
        station.bytes -= unseen.iter().map(Bytes::len).sum::<usize>();
        let tail = station.has_unseen_tail().then(|| station.tail.take()).flatten();
        let count = unseen.len();
        for (index, data) in (1..).zip(unseen) {
            let end = tail.is_some_and(|tail| !tail.trailers) && index == count;
            self.pass_data(way, step, data, end)?;
        }
        match tail {
            Some(Tail { trailers: true, .. }) => self.pass_trailers(way, step),
            Some(_) if count == 0 => self.pass_data(way, step, Bytes::new(), true),
            _ => Ok(()),
        }
    }

    /// Sends on what a filter held that holds no more.
    fn let_go(&mut self, way: Way, step: usize) -> Progress {
        let held_head = self.holds_head(way, step);
        let station = self.chain.station(way, step);
        let (held, unseen) = (std::mem::take(&mut station.held), std::mem::take(&mut station.unseen));
        let tail = station.tail.take();
        station.bytes = 0;
        if held_head {
            self.pass_head(way, step + 1)?;
        }
        let seen_end = tail.is_some_and(|tail| tail.seen && !tail.trailers);
        let (last, count) = (held.len(), unseen.len());
        for (index, data) in (1..).zip(held) {
            self.pass_data(way, step + 1, data, seen_end && index == last)?;
        }
        for (index, data) in (1..).zip(unseen) {
            let end = tail.is_some_and(|tail| !tail.trailers) && index == count;
            self.pass_data(way, step, data, end)?;
        }
        match tail {
            Some(Tail { trailers: true, seen }) => self.pass_trailers(way, step + usize::from(seen)),
            Some(Tail { trailers: false, seen: true }) if last == 0 => {
                self.pass_data(way, step + 1, Bytes::new(), true)
            }
            _ => Ok(()),
        }
    }

    /// Asks those who hold something; `true` when somebody let go.
    fn poll_stations(&mut self, way: Way, task: &mut Context<'_>) -> Result<bool, Stopped> {
        let mut still = false;
        let mut step = 0;
        // One that looks again may have fewer filters behind it than before.
        while step < self.chain.steps(way) {
            while let Poll::Ready(mut flow) = self.chain.station(way, step).poll(task) {
                if matches!(flow, Flow::Anew) && way == Way::Request {
                    flow = self.look_again(step).map_err(Stopped::End)?;
                } else if matches!(flow, Flow::Again) {
                    flow = self.show_again(way, step)?;
                }
                let part = self.chain.station(way, step).part;
                if !self.chain.stop(way, step, part, flow)? {
                    self.let_go(way, step)?;
                    return Ok(true);
                }
                self.show_unseen(way, step)?;
            }
            still |= !matches!(self.chain.station(way, step).stop, Stop::Open);
            step += 1;
        }
        self.chain.lane(way).held = still;
        Ok(false)
    }

    pub(super) fn chain_on_local_reply(&mut self, reply: &mut LocalReply) {
        for step in 0..self.chain.slots.len() {
            self.phase(Way::Request, step, Shown::LocalReply(reply));
        }
    }

    /// Shows an informational response to the filters.
    pub(super) fn encode_informational(&mut self) {
        for step in 0..self.chain.steps(Way::Response) {
            if self.chain.phases(Way::Response, step).0 {
                self.phase(Way::Response, step, Shown::Informational);
            }
        }
    }

    /// Calls one phase of one filter with its context. What it passes on is in `chain.ahead`.
    fn phase(&mut self, way: Way, step: usize, shown: Shown<'_>) -> Flow {
        let place = self.chain.place(way, step);
        let slot = &mut self.chain.slots[place];
        let station = match way {
            Way::Request => &slot.request,
            Way::Response => &slot.response,
        };
        station.forget_verdict();
        let factory = slot.factory.as_deref().unwrap_or(&*self.cx.hcm.filters[slot.entry].factory);
        let configs = levels(self.chain.route.as_ref(), slot.entry).configs;
        let driver = PhaseDriver {
            cx: self.cx,
            timer: self.timer,
            station,
            table: self.table.as_ref(),
            random: self.random,
        };
        let mut asked = Asked::default();
        let (filter, info, heads) = (&mut *slot.filter, &mut self.info, &mut *self.heads);
        let mut cx = StreamCx::new(info, configs, factory, &driver, &mut asked);
        cx.name = &self.cx.hcm.filters[slot.entry].name;
        let flow = match (way, shown) {
            (Way::Request, Shown::Head { end }) => filter.decode_headers(&mut cx, &mut heads.request, end),
            (way, shown) => {
                cx.request = Some(&mut heads.request);
                match (way, shown) {
                    (Way::Request, Shown::Data(data, end)) => filter.decode_data(&mut cx, data, end),
                    (Way::Request, Shown::Trailers) => {
                        filter.decode_trailers(&mut cx, &mut heads.request_trailers)
                    }
                    (Way::Response, Shown::Data(data, end)) => {
                        cx.response = Some(&mut heads.response);
                        filter.encode_data(&mut cx, data, end)
                    }
                    (Way::Response, Shown::Trailers) => {
                        cx.response = Some(&mut heads.response);
                        filter.encode_trailers(&mut cx, &mut heads.response_trailers)
                    }
                    (_, Shown::Head { end }) => filter.encode_headers(&mut cx, &mut heads.response, end),
                    (_, Shown::Informational) => {
                        filter.encode_informational(&mut cx, &mut heads.response);
                        Flow::Continue
                    }
                    (_, Shown::LocalReply(reply)) => {
                        filter.on_local_reply(&mut cx, reply);
                        Flow::Continue
                    }
                    (_, Shown::Complete) => {
                        filter.on_complete(&mut cx);
                        Flow::Continue
                    }
                }
            }
        };
        if let Some((filter, phases)) = asked.successor {
            (slot.filter, slot.phases) = (filter, phases);
            self.chain.phases.response_body |= phases.response_body;
        }
        self.route_cleared |= asked.clear_route;
        self.chain.ahead = asked.ahead;
        flow
    }

    /// Selects the route again if a filter asked for it, now that the head is back in its place.
    fn select_anew(&mut self) {
        if std::mem::take(&mut self.route_cleared) {
            self.info.upstream.cluster = None;
            // A route that is gone shows when the router looks for it.
            let _ = self.select_route();
            self.note_cluster();
        }
    }
}

impl From<Box<LocalReply>> for Stopped {
    fn from(reply: Box<LocalReply>) -> Self {
        Self::Reply(reply)
    }
}
