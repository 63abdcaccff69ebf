//! An upstream stream behind the filters of the upstream side (`HttpProtocolOptions.http_filters`, the router's
//! `upstream_http_filters`).
//!
//! Each attempt has instances of its own, between the router and the codec: what the router sends goes through their decode
//! phases first, what upstream answers through their encode phases, and only then is it the router's, which may retry. They
//! work on heads of their own, so that one attempt's changes are not the next one's.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use waystation_filter_api::http::{Flow, LocalReply};
use waystation_filter_api::stream::StreamInfo;
use waystation_http::Headers;
use waystation_upstream::cluster::ClusterRef;

use super::chain::{Around, Chain, Place, Progress, Room, Stopped, Way};
use super::upstream::{Event, Upstream};
use super::{Scratch, Stream};
use crate::http::downstream::Downstream;
use crate::http::end::{ResetReason, StreamEnd};
use crate::http::filters::{FilterEntry, UpstreamFilters};
use crate::http::timer::Timer;
use crate::http::{ConnCx, Table};

/// An upstream stream, and the filters before it if there are any.
pub(super) struct Outbound {
    pub(super) codec: Upstream,
    filters: Option<Box<Filters>>,
}

/// What the filters see of the stream that the attempt is one of.
pub(super) struct Beside<'a> {
    pub(super) cx: &'a ConnCx,
    pub(super) info: &'a mut StreamInfo,
    pub(super) timer: &'a Timer,
    pub(super) table: Option<&'a (Rc<Table>, u32)>,
    pub(super) random: u64,
}

/// Why an attempt does not go on.
#[derive(Debug)]
pub(super) enum Failed {
    Reset(ResetReason),
    /// A filter of the upstream side has answered.
    Reply(Box<LocalReply>),
}

struct Filters {
    owner: Owner,
    chain: Chain,
    heads: Box<Scratch>,
    sent: Sent,
    told: Told,
    /// What failed while the request was on its way, for who reads the response.
    failed: Option<Failed>,
}

/// Whose filters they are; held as long as they are used.
enum Owner {
    Cluster(Rc<ClusterRef>),
    Router,
}

/// What the codec has been given of the request.
#[derive(Default)]
struct Sent {
    head: bool,
    end: bool,
    /// The request ends with trailers.
    trailers: bool,
}

/// What has come of the response, and what the router has been told of it.
#[derive(Default)]
struct Told {
    head_came: bool,
    end_came: bool,
    head: bool,
    end: bool,
    /// The response ends with trailers.
    trailers: bool,
}

struct AttemptPlace<'p, 'b> {
    entries: &'p [FilterEntry],
    heads: &'p mut Scratch,
    beside: &'p mut Beside<'b>,
}

impl Place for AttemptPlace<'_, '_> {
    fn around(&mut self) -> Around<'_> {
        Around {
            filters: self.entries,
            info: self.beside.info,
            heads: self.heads,
            cx: self.beside.cx,
            timer: self.beside.timer,
            table: self.beside.table,
            random: self.beside.random,
        }
    }

    /// The route is the one that has led here.
    fn select_anew(&mut self, _: &mut Chain) {}

    fn look_again(&mut self, chain: &mut Chain, step: usize) -> Result<Flow, StreamEnd> {
        Ok(chain.show_head(self, Way::Request, step))
    }
}

impl Owner {
    /// Whose filters a stream to the cluster has, if it has any: the cluster's own stand in place of the router's.
    fn of(cluster: &Rc<ClusterRef>, cx: &ConnCx) -> Option<Self> {
        match UpstreamFilters::of(cluster) {
            Some(own) => (!own.is_empty()).then(|| Self::Cluster(Rc::clone(cluster))),
            None => (!cx.hcm.router.upstream_filters.is_empty()).then_some(Self::Router),
        }
    }

    fn entries<'a>(&'a self, cx: &'a ConnCx) -> &'a [FilterEntry] {
        match self {
            Self::Cluster(cluster) => UpstreamFilters::of(cluster).unwrap_or_default(),
            Self::Router => &cx.hcm.router.upstream_filters,
        }
    }
}

impl<D: Downstream> Stream<'_, D> {
    /// The filters of the cluster or the router in front of an upstream stream.
    pub(super) fn outbound(&self, codec: Upstream, cluster: &Rc<ClusterRef>) -> Outbound {
        let owner = Owner::of(cluster, self.cx).filter(|_| !matches!(codec, Upstream::Tcp(_)));
        let filters = owner.map(|owner| {
            let mut heads = self.cx.worker.take_scratch();
            let mut chain = std::mem::take(&mut heads.chain);
            chain.fill(owner.entries(self.cx), self.selected());
            let (sent, told) = (Sent::default(), Told::default());
            Box::new(Filters { owner, chain, heads, sent, told, failed: None })
        });
        Outbound { codec, filters }
    }

    /// The upstream stream, whose filters have been told of its end.
    pub(super) fn end_filters(&mut self, outbound: Outbound) -> Upstream {
        if let Some(mut filters) = outbound.filters {
            let _ = filters.with(&mut self.beside_heads().0, |chain, place| {
                chain.complete(place);
                Ok(())
            });
            filters.chain.recycle();
            filters.heads.chain = std::mem::take(&mut filters.chain);
            self.cx.worker.give_scratch(filters.heads);
        }
        outbound.codec
    }

    /// What the filters of an attempt see, beside the heads of the stream.
    #[inline]
    pub(super) fn beside_heads(&mut self) -> (Beside<'_>, &mut Scratch) {
        let beside = Beside {
            cx: self.cx,
            info: &mut self.info,
            timer: self.timer,
            table: self.table.as_ref(),
            random: self.random,
        };
        (beside, self.heads)
    }
}

impl Outbound {
    /// Sends the request's head; `end` when it is all of it.
    #[inline]
    pub(super) fn send_head(
        &mut self,
        mut beside: Beside<'_>,
        head: &Headers,
        end: bool,
    ) -> Result<(), Failed> {
        let Some(filters) = &mut self.filters else {
            return Ok(self.codec.send_head(&beside.cx.worker, head, end)?);
        };
        filters.heads.request.clone_from(head);
        filters.with(&mut beside, |chain, place| chain.begin(place, Way::Request, end))?;
        filters.send(&mut self.codec, beside.cx)
    }

    #[inline]
    pub(super) fn send_data(&mut self, mut beside: Beside<'_>, data: Bytes) -> Result<(), Failed> {
        let Some(filters) = &mut self.filters else { return Ok(self.codec.send_data(data)?) };
        filters.with(&mut beside, |chain, place| chain.pass_data(place, Way::Request, 0, data, false))?;
        filters.send(&mut self.codec, beside.cx)
    }

    #[inline]
    pub(super) fn send_end(
        &mut self,
        mut beside: Beside<'_>,
        trailers: Option<&Headers>,
    ) -> Result<(), Failed> {
        let Some(filters) = &mut self.filters else { return Ok(self.codec.send_end(trailers)?) };
        if let Some(trailers) = trailers {
            filters.heads.request_trailers.clone_from(trailers);
            filters.sent.trailers = true;
        }
        let trailers = filters.sent.trailers;
        filters.with(&mut beside, |chain, place| match trailers {
            true => chain.pass_trailers(place, Way::Request, 0),
            false => chain.pass_data(place, Way::Request, 0, Bytes::new(), true),
        })?;
        filters.send(&mut self.codec, beside.cx)
    }

    /// Whether more of the request is welcome. If not, `poll_flush` wakes when it is.
    #[inline]
    pub(super) fn has_room(&mut self, cx: &ConnCx) -> bool {
        self.codec.has_room()
            && self.filters.as_mut().is_none_or(|filters| filters.room(Way::Request, cx) == Room::Free)
    }

    /// Moves the request on. A failure that is not the codec's is kept for `poll_event`.
    #[inline]
    pub(super) fn poll_flush(
        &mut self,
        task: &mut Context<'_>,
        mut beside: Beside<'_>,
    ) -> Poll<Result<(), ResetReason>> {
        if let Some(filters) = &mut self.filters {
            if filters.failed.is_some() {
                return Poll::Ready(Err(ResetReason::LocalReset));
            }
            let moved = filters.poll_held(&mut beside, Way::Request, task);
            let sent = moved.and_then(|_| filters.send(&mut self.codec, beside.cx));
            if let Err(failed) = sent {
                filters.failed.get_or_insert(failed);
                return Poll::Ready(Err(ResetReason::LocalReset));
            }
            match filters.room(Way::Request, beside.cx) {
                Room::Free => {}
                Room::Full => {
                    // What the codec has goes out meanwhile; whether it can tells its next user.
                    let _ = self.codec.poll_flush(task);
                    return Poll::Pending;
                }
                Room::Exceeded => {
                    let reply = LocalReply::new(413, "Payload Too Large", "request_payload_too_large");
                    filters.failed.get_or_insert(Failed::Reply(Box::new(reply)));
                    return Poll::Ready(Err(ResetReason::LocalReset));
                }
            }
        }
        self.codec.poll_flush(task)
    }

    /// What comes next of the response: a head or trailers in `into`.
    #[inline]
    pub(super) fn poll_event(
        &mut self,
        task: &mut Context<'_>,
        beside: Beside<'_>,
        into: &mut Headers,
    ) -> Poll<Result<Event, Failed>> {
        match &mut self.filters {
            None => self.codec.poll_event(task, &beside.cx.worker, into).map_err(Failed::Reset),
            Some(filters) => filters.poll_event(&mut self.codec, task, beside, into),
        }
    }
}

impl Filters {
    /// The chain beside what it works on.
    fn with(
        &mut self,
        beside: &mut Beside<'_>,
        call: impl FnOnce(&mut Chain, &mut AttemptPlace<'_, '_>) -> Progress,
    ) -> Result<(), Failed> {
        let entries = self.owner.entries(beside.cx);
        let mut place = AttemptPlace { entries, heads: &mut self.heads, beside };
        call(&mut self.chain, &mut place).map_err(Failed::Reply)
    }

    /// Lets go what filters let go; `true` when something has moved.
    fn poll_held(
        &mut self,
        beside: &mut Beside<'_>,
        way: Way,
        task: &mut Context<'_>,
    ) -> Result<bool, Failed> {
        let entries = self.owner.entries(beside.cx);
        let mut place = AttemptPlace { entries, heads: &mut self.heads, beside };
        let mut moved = false;
        // Who lets go may hold the next piece at once: it is asked until it has taken our waker.
        while self.chain.is_held(way) && self.chain.poll_stations(&mut place, way, task)? {
            moved = true;
        }
        Ok(moved)
    }

    fn room(&mut self, way: Way, cx: &ConnCx) -> Room {
        self.chain.room(way, cx.hcm.buffer_limit)
    }

    /// Gives the codec what has passed the filters.
    fn send(&mut self, codec: &mut Upstream, cx: &ConnCx) -> Result<(), Failed> {
        if !self.sent.head && self.chain.head_passed(Way::Request) {
            let end = self.chain.head_is_all(Way::Request);
            codec.send_head(&cx.worker, &self.heads.request, end)?;
            (self.sent.head, self.sent.end) = (true, end);
        }
        if self.sent.head && !self.sent.end {
            for data in self.chain.out(Way::Request) {
                codec.send_data(data)?;
            }
            if self.chain.passed(Way::Request) {
                codec.send_end(Some(&self.heads.request_trailers).filter(|_| self.sent.trailers))?;
                self.sent.end = true;
            }
        }
        Ok(())
    }

    fn poll_event(
        &mut self,
        codec: &mut Upstream,
        task: &mut Context<'_>,
        mut beside: Beside<'_>,
        into: &mut Headers,
    ) -> Poll<Result<Event, Failed>> {
        loop {
            if let Some(failed) = self.failed.take() {
                return Poll::Ready(Err(failed));
            }
            if let Some(event) = self.next(into) {
                return Poll::Ready(Ok(event));
            }
            if self.poll_held(&mut beside, Way::Response, task)? {
                continue;
            }
            match self.room(Way::Response, beside.cx) {
                Room::Free if !self.told.end_came => {}
                Room::Free | Room::Full => return Poll::Pending,
                Room::Exceeded => {
                    let reply = LocalReply::new(500, "Internal Server Error", "response_payload_too_large");
                    return Poll::Ready(Err(Failed::Reply(Box::new(reply))));
                }
            }
            let heads = &mut *self.heads;
            let head = if self.told.head_came { &mut heads.response_trailers } else { &mut heads.response };
            match ready!(codec.poll_event(task, &beside.cx.worker, head))? {
                Event::Informational => {
                    self.with(&mut beside, |chain, place| {
                        chain.show_informational(place);
                        Ok(())
                    })?;
                    into.clone_from(&self.heads.response);
                    self.heads.response.clear();
                    return Poll::Ready(Ok(Event::Informational));
                }
                Event::Head { end } => {
                    (self.told.head_came, self.told.end_came) = (true, end);
                    self.with(&mut beside, |chain, place| chain.begin(place, Way::Response, end))?;
                }
                Event::Data(data) => {
                    self.with(&mut beside, |chain, place| {
                        chain.pass_data(place, Way::Response, 0, data, false)
                    })?;
                }
                Event::Trailers => {
                    (self.told.trailers, self.told.end_came) = (true, true);
                    self.with(&mut beside, |chain, place| chain.pass_trailers(place, Way::Response, 0))?;
                }
                Event::End => {
                    self.told.end_came = true;
                    self.with(&mut beside, |chain, place| {
                        chain.pass_data(place, Way::Response, 0, Bytes::new(), true)
                    })?;
                }
            }
        }
    }

    /// What has passed the filters and has not been told.
    fn next(&mut self, into: &mut Headers) -> Option<Event> {
        let told = &mut self.told;
        if !told.head {
            if !told.head_came || !self.chain.head_passed(Way::Response) {
                return None;
            }
            let end = self.chain.head_is_all(Way::Response);
            (told.head, told.end) = (true, end);
            // The filters may still look at it.
            into.clone_from(&self.heads.response);
            return Some(Event::Head { end });
        }
        if told.end {
            return None;
        }
        if let Some(data) = self.chain.next_out(Way::Response) {
            return Some(Event::Data(data));
        }
        self.chain.passed(Way::Response).then(|| {
            told.end = true;
            if !told.trailers {
                return Event::End;
            }
            into.clone_from(&self.heads.response_trailers);
            Event::Trailers
        })
    }
}

impl From<ResetReason> for Failed {
    fn from(reason: ResetReason) -> Self {
        Self::Reset(reason)
    }
}

impl From<Stopped> for Failed {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Reply(reply) => Self::Reply(reply),
            // No filter of an attempt can end the stream itself.
            Stopped::End(_) => Self::Reset(ResetReason::LocalReset),
        }
    }
}
