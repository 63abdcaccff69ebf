//! How a message goes from filter to filter, whatever the chain stands in.

use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use waystation_filter_api::http::{BodyData, Flow, Hold, LocalReply, StreamCx};
use waystation_filter_api::stream::StreamInfo;

use super::build::levels;
use super::driver::PhaseDriver;
use super::station::{Part, Station, Stop, Tail};
use super::{Chain, Lane, Stopped, Way};
use crate::http::end::StreamEnd;
use crate::http::filters::FilterEntry;
use crate::http::stream::Scratch;
use crate::http::timer::Timer;
use crate::http::{ConnCx, Table};

/// What a chain of filters stands in: a stream of a client's, or an attempt of the router's.
pub(in crate::http::stream) trait Place {
    /// What of it a phase is shown.
    fn around(&mut self) -> Around<'_>;

    /// A filter has changed what the route depends on.
    fn select_anew(&mut self, chain: &mut Chain);

    /// Shows the filter of this step the request head once more, for a route that is selected anew.
    fn look_again(&mut self, chain: &mut Chain, step: usize) -> Result<Flow, StreamEnd>;
}

pub(in crate::http::stream) struct Around<'a> {
    /// The filters that the chain was made of.
    pub(in crate::http::stream) filters: &'a [FilterEntry],
    pub(in crate::http::stream) info: &'a mut StreamInfo,
    pub(in crate::http::stream) heads: &'a mut Scratch,
    pub(in crate::http::stream) cx: &'a ConnCx,
    pub(in crate::http::stream) timer: &'a Timer,
    /// The route as it is selected now.
    pub(in crate::http::stream) table: Option<&'a (Rc<Table>, u32)>,
    /// The stream's random number.
    pub(in crate::http::stream) random: u64,
}

/// What a phase is shown.
pub(in crate::http::stream) enum Shown<'s> {
    Head { end: bool },
    Informational,
    Data(&'s mut BodyData, bool),
    Trailers,
    LocalReply(&'s mut LocalReply),
    Complete,
}

/// Whether more may be buffered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::http::stream) enum Room {
    Free,
    /// Stop reading until something goes on.
    Full,
    Exceeded,
}

pub(in crate::http::stream) type Progress = Result<(), Box<LocalReply>>;

impl Chain {
    pub(super) fn lane(&mut self, way: Way) -> &mut Lane {
        match way {
            Way::Request => &mut self.request,
            Way::Response => &mut self.response,
        }
    }

    fn lane_of(&self, way: Way) -> &Lane {
        match way {
            Way::Request => &self.request,
            Way::Response => &self.response,
        }
    }

    pub(super) fn steps(&self, way: Way) -> usize {
        if way == Way::Response && self.skip_encode { 0 } else { self.slots.len() }
    }

    /// The place in `slots` of a step, which counts in the order of `way`.
    pub(super) fn place(&self, way: Way, step: usize) -> usize {
        match way {
            Way::Request => step,
            Way::Response => self.slots.len() - 1 - step,
        }
    }

    pub(super) fn station(&mut self, way: Way, step: usize) -> &mut Station {
        let place = self.place(way, step);
        let slot = &mut self.slots[place];
        match way {
            Way::Request => &mut slot.request,
            Way::Response => &mut slot.response,
        }
    }

    pub(super) fn phases(&self, way: Way, step: usize) -> (bool, bool, bool) {
        let phases = self.slots[self.place(way, step)].phases;
        match way {
            Way::Request => (phases.request_headers, phases.request_body, phases.request_trailers),
            Way::Response => (phases.response_headers, phases.response_body, phases.response_trailers),
        }
    }

    /// Whether some filter may hold something.
    pub(in crate::http::stream) fn is_held(&self, way: Way) -> bool {
        self.lane_of(way).held
    }

    /// Whether the head has passed every filter.
    pub(in crate::http::stream) fn head_passed(&self, way: Way) -> bool {
        self.lane_of(way).head_passed
    }

    /// Whether the message is only a head.
    pub(in crate::http::stream) fn head_is_all(&self, way: Way) -> bool {
        self.lane_of(way).head_is_all
    }

    /// Whether the end has passed every filter.
    pub(in crate::http::stream) fn passed(&self, way: Way) -> bool {
        self.lane_of(way).passed
    }

    /// Data that have passed every filter.
    pub(in crate::http::stream) fn out(&mut self, way: Way) -> std::vec::Drain<'_, Bytes> {
        self.lane(way).out.drain(..)
    }

    /// The first of them.
    pub(in crate::http::stream) fn next_out(&mut self, way: Way) -> Option<Bytes> {
        let out = &mut self.lane(way).out;
        (!out.is_empty()).then(|| out.remove(0))
    }

    /// Shows a filter the head once more.
    pub(in crate::http::stream) fn show_head<P: Place>(
        &mut self,
        place: &mut P,
        way: Way,
        step: usize,
    ) -> Flow {
        self.station(way, step).stop = Stop::Open;
        let end = self.head_is_all(way);
        self.phase(place, way, step, Shown::Head { end })
    }

    /// Tells the filters of the end.
    pub(in crate::http::stream) fn complete<P: Place>(&mut self, place: &mut P) {
        for step in 0..self.slots.len() {
            if self.slots[step].phases.complete {
                self.phase(place, Way::Request, step, Shown::Complete);
            }
        }
        self.slots.clear();
    }

    /// Keeps what a flow other than `Continue` says; `true` when the filter holds.
    fn stop(&mut self, way: Way, step: usize, part: Part, flow: Flow) -> Result<bool, Box<LocalReply>> {
        let stop = match flow {
            Flow::Continue | Flow::Again | Flow::Anew => Stop::Open,
            Flow::Reply(reply) => {
                // The future that has said so must not be asked again.
                self.station(way, step).stop = Stop::Open;
                return Err(reply);
            }
            Flow::Pause(hold) => Stop::Paused(hold),
            Flow::Wait(future) => Stop::Waiting(future),
        };
        let holds = !matches!(stop, Stop::Open);
        let station = self.station(way, step);
        (station.stop, station.part) = (stop, part);
        self.lane(way).held |= holds;
        Ok(holds)
    }

    pub(in crate::http::stream) fn room(&mut self, way: Way, limit: usize) -> Room {
        if !self.lane(way).held {
            return Room::Free;
        }
        let limit = self.request_limit.filter(|_| way == Way::Request).unwrap_or(limit);
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

    /// Forgets an earlier response.
    pub(super) fn forget_response(&mut self) {
        self.response.recycle();
        for slot in &mut self.slots {
            slot.response = Station::default();
        }
    }

    pub(in crate::http::stream) fn show_informational<P: Place>(&mut self, place: &mut P) {
        for step in 0..self.steps(Way::Response) {
            if self.phases(Way::Response, step).0 {
                self.phase(place, Way::Response, step, Shown::Informational);
            }
        }
    }

    /// Begins to take a head through the filters; `end` when it is all of the message.
    pub(in crate::http::stream) fn begin<P: Place>(
        &mut self,
        place: &mut P,
        way: Way,
        end: bool,
    ) -> Progress {
        self.lane(way).head_is_all = end;
        self.pass_head(place, way, 0)
    }

    fn pass_head<P: Place>(&mut self, place: &mut P, way: Way, from: usize) -> Progress {
        let end = self.lane(way).head_is_all;
        for step in from.. {
            // A filter may have got others beside it meanwhile.
            if step >= self.steps(way) {
                break;
            }
            if !self.phases(way, step).0 {
                continue;
            }
            let flow = self.phase(place, way, step, Shown::Head { end });
            self.asked.ahead.clear();
            if self.stop(way, step, Part::Head, flow)? {
                self.lane(way).head_at = step;
                return Ok(());
            }
        }
        let lane = self.lane(way);
        lane.head_passed = true;
        lane.passed |= end;
        Ok(())
    }

    pub(in crate::http::stream) fn pass_data<P: Place>(
        &mut self,
        place: &mut P,
        way: Way,
        from: usize,
        data: Bytes,
        end: bool,
    ) -> Progress {
        let mut data = BodyData::Shared(data);
        for step in from.. {
            // A filter may have got others beside it meanwhile.
            if step >= self.steps(way) {
                break;
            }
            let wants = self.phases(way, step).1;
            let station = self.station(way, step);
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
            let flow = self.phase(place, way, step, Shown::Data(&mut data, end));
            self.send_ahead(place, way, step)?;
            if self.stop(way, step, Part::Data, flow)? {
                let station = self.station(way, step);
                station.hold(data.into_bytes());
                station.tail = end.then_some(Tail { trailers: false, seen: true });
                return Ok(());
            }
            if held_head && self.holds_head(way, step) {
                self.pass_head(place, way, step + 1)?;
            }
        }
        let data = data.into_bytes();
        let lane = self.lane(way);
        lane.passed |= end;
        if !data.is_empty() {
            lane.out.push(data);
        }
        Ok(())
    }

    pub(in crate::http::stream) fn pass_trailers<P: Place>(
        &mut self,
        place: &mut P,
        way: Way,
        from: usize,
    ) -> Progress {
        for step in from.. {
            // A filter may have got others beside it meanwhile.
            if step >= self.steps(way) {
                break;
            }
            let wants = self.phases(way, step).2;
            let station = self.station(way, step);
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
            let flow = self.phase(place, way, step, Shown::Trailers);
            // What goes ahead of the trailers goes behind the data that are held before them.
            let ahead = std::mem::take(&mut self.asked.ahead);
            for data in ahead {
                match paused {
                    true => self.station(way, step).hold(data),
                    false => self.pass_data(place, way, step + 1, data, false)?,
                }
            }
            if self.stop(way, step, Part::Trailers, flow)? {
                self.station(way, step).tail = Some(Tail { trailers: true, seen: true });
                return Ok(());
            }
            if paused {
                self.let_go(place, way, step)?;
            }
        }
        self.lane(way).passed = true;
        Ok(())
    }

    fn holds_head(&mut self, way: Way, step: usize) -> bool {
        let lane = self.lane(way);
        !lane.head_passed && lane.head_at == step
    }

    /// Sends on what a phase has passed on ahead of what it was shown.
    fn send_ahead<P: Place>(&mut self, place: &mut P, way: Way, step: usize) -> Progress {
        if self.asked.ahead.is_empty() {
            return Ok(());
        }
        let ahead = std::mem::take(&mut self.asked.ahead);
        if self.holds_head(way, step) {
            self.pass_head(place, way, step + 1)?;
        }
        for data in ahead {
            self.pass_data(place, way, step + 1, data, false)?;
        }
        Ok(())
    }

    /// Shows a filter once more what it holds.
    fn show_again<P: Place>(
        &mut self,
        place: &mut P,
        way: Way,
        step: usize,
    ) -> Result<Flow, Box<LocalReply>> {
        let station = self.station(way, step);
        station.stop = Stop::Open;
        let flow = match station.part {
            Part::Head => {
                let end = self.lane(way).head_is_all;
                self.phase(place, way, step, Shown::Head { end })
            }
            Part::Data => {
                let end = station.tail.is_some_and(|tail| tail.seen && !tail.trailers);
                let mut data = BodyData::Owned(station.take_held());
                let flow = self.phase(place, way, step, Shown::Data(&mut data, end));
                self.station(way, step).hold(data.into_bytes());
                flow
            }
            Part::Trailers => self.phase(place, way, step, Shown::Trailers),
        };
        self.send_ahead(place, way, step)?;
        Ok(flow)
    }

    /// Shows a filter that has waited and now pauses what came meanwhile.
    fn show_unseen<P: Place>(&mut self, place: &mut P, way: Way, step: usize) -> Progress {
        let station = self.station(way, step);
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
            self.pass_data(place, way, step, data, end)?;
        }
        match tail {
            Some(Tail { trailers: true, .. }) => self.pass_trailers(place, way, step),
            Some(_) if count == 0 => self.pass_data(place, way, step, Bytes::new(), true),
            _ => Ok(()),
        }
    }

    /// Sends on what a filter held that holds no more.
    fn let_go<P: Place>(&mut self, place: &mut P, way: Way, step: usize) -> Progress {
        let held_head = self.holds_head(way, step);
        let station = self.station(way, step);
        let (held, unseen) = (std::mem::take(&mut station.held), std::mem::take(&mut station.unseen));
        let tail = station.tail.take();
        station.bytes = 0;
        if held_head {
            self.pass_head(place, way, step + 1)?;
        }
        let seen_end = tail.is_some_and(|tail| tail.seen && !tail.trailers);
        let (last, count) = (held.len(), unseen.len());
        for (index, data) in (1..).zip(held) {
            self.pass_data(place, way, step + 1, data, seen_end && index == last)?;
        }
        for (index, data) in (1..).zip(unseen) {
            let end = tail.is_some_and(|tail| !tail.trailers) && index == count;
            self.pass_data(place, way, step, data, end)?;
        }
        match tail {
            Some(Tail { trailers: true, seen }) => self.pass_trailers(place, way, step + usize::from(seen)),
            Some(Tail { trailers: false, seen: true }) if last == 0 => {
                self.pass_data(place, way, step + 1, Bytes::new(), true)
            }
            _ => Ok(()),
        }
    }

    /// Asks those who hold something; `true` when something has moved.
    pub(in crate::http::stream) fn poll_stations<P: Place>(
        &mut self,
        place: &mut P,
        way: Way,
        task: &mut Context<'_>,
    ) -> Result<bool, Stopped> {
        let progress = |lane: &Lane| (lane.head_passed, lane.passed, lane.out.len());
        let before = progress(self.lane_of(way));
        let mut still = false;
        let mut step = 0;
        // One that looks again may have fewer filters behind it than before.
        while step < self.steps(way) {
            while let Poll::Ready(mut flow) = self.station(way, step).poll(task) {
                if matches!(flow, Flow::Anew) && way == Way::Request {
                    flow = place.look_again(self, step).map_err(Stopped::End)?;
                } else if matches!(flow, Flow::Again) {
                    flow = self.show_again(place, way, step)?;
                }
                let part = self.station(way, step).part;
                if !self.stop(way, step, part, flow)? {
                    self.let_go(place, way, step)?;
                    return Ok(true);
                }
                self.show_unseen(place, way, step)?;
            }
            still |= !matches!(self.station(way, step).stop, Stop::Open);
            step += 1;
        }
        self.lane(way).held = still;
        // Some of what is held may have gone ahead of the rest.
        Ok(progress(self.lane_of(way)) != before)
    }

    /// Calls one phase of one filter with its context. What it passes on is in `asked.ahead`.
    pub(super) fn phase<P: Place>(&mut self, place: &mut P, way: Way, step: usize, shown: Shown<'_>) -> Flow {
        let index = self.place(way, step);
        let around = place.around();
        let slot = &mut self.slots[index];
        let station = match way {
            Way::Request => &slot.request,
            Way::Response => &slot.response,
        };
        station.forget_verdict();
        let factory = slot.factory.as_deref().unwrap_or(&*around.filters[slot.entry].factory);
        let configs = levels(self.route.as_ref(), slot.levels).configs;
        let (filter, info, heads) = (&mut *slot.filter, around.info, around.heads);
        let driver = PhaseDriver {
            cx: around.cx,
            timer: around.timer,
            station,
            table: around.table,
            random: around.random,
        };
        // What nobody has taken of an earlier phase.
        self.asked.ahead.clear();
        let mut cx = StreamCx::new(info, configs, factory, &driver, &mut self.asked);
        cx.name = &around.filters[slot.entry].name;
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
        if let Some(filter) = self.asked.successor.take() {
            slot.filter = filter;
        }
        let phases = std::mem::take(&mut self.asked.phases);
        slot.phases = slot.phases.union(phases);
        self.phases.response_body |= phases.response_body;
        if !self.asked.delegates.is_empty() {
            let delegates = std::mem::take(&mut self.asked.delegates);
            self.put_beside(way, index, delegates);
        }
        self.request_limit = self.asked.request_buffer_limit.take().or(self.request_limit);
        if std::mem::take(&mut self.asked.clear_route) {
            place.select_anew(self);
        }
        flow
    }
}
