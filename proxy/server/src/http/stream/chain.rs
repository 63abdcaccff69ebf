//! The HTTP filters of one stream.
//!
//! A message goes through the filters of one direction as head, data and end or trailers. Each filter has a [`Station`]
//! in each direction: what it holds back, and what has come up behind that. Data never overtake the head, nor the end
//! the data. While a filter pauses, its body phase is shown everything it holds whenever more has come, so that it may
//! let go by itself; what it does not want to see waits for its resume handle. While a phase waits for a future, what
//! arrives is kept and shown to it afterwards.

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use waystation_filter_api::http::{Asked, Flow, HttpFilter, HttpFilterFactory, LocalReply, Phases};
use waystation_route::FilterSlot;

use super::Stream;
use crate::http::Table;
use crate::http::downstream::{Downstream, Piece};
use crate::http::end::StreamEnd;

mod build;
mod driver;
mod pass;
mod station;

pub(super) use pass::{Around, Place, Progress, Room, Shown};
use station::Station;

/// The filters that this stream goes through, in the order of the configuration.
#[derive(Default)]
pub(super) struct Chain {
    slots: Vec<Slot>,
    /// The route that the filters are configured by: the one they were made for, or one that a filter has led to.
    route: Option<Selected>,
    phases: Phases,
    request: Lane,
    response: Lane,
    /// An encode filter has answered: its reply goes past the others.
    skip_encode: bool,
    /// A filter's own limit of what is held of a request.
    request_limit: Option<usize>,
    /// What the last phase has asked for; of it, what it passes on ahead of what it was shown is taken by who has called it.
    asked: Asked,
}

/// A route, and which of its weighted clusters was picked.
#[derive(Clone)]
pub(super) struct Selected {
    table: Rc<Table>,
    route: u32,
    weighted: Option<usize>,
}

/// A direction through the chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Way {
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
    /// Data that have passed every filter.
    out: Vec<Bytes>,
}

/// A filter's instance.
struct Slot {
    /// Which of the configured filters it is.
    entry: usize,
    /// Where the route configures it.
    levels: Option<FilterSlot>,
    /// What has made the instance, if that is another factory than the entry's.
    factory: Option<Arc<dyn HttpFilterFactory>>,
    filter: Box<dyn HttpFilter>,
    phases: Phases,
    request: Station,
    response: Station,
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("filters", &self.slots.len()).finish_non_exhaustive()
    }
}

/// Why a message does not go on.
pub(super) enum Stopped {
    /// A filter has answered.
    Reply(Box<LocalReply>),
    /// The stream is over.
    End(StreamEnd),
}

impl Lane {
    fn recycle(&mut self) {
        self.out.clear();
        *self = Self { out: std::mem::take(&mut self.out), ..Self::default() };
    }
}

impl Chain {
    /// Makes it one without filters, that has the memory of this one.
    pub(super) fn recycle(&mut self) {
        self.slots.clear();
        self.request.recycle();
        self.response.recycle();
        (self.route, self.phases, self.skip_encode) = (None, Phases::default(), false);
        self.request_limit = None;
        self.asked = Asked::default();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether response data go straight on.
    pub(super) fn response_is_clear(&self) -> bool {
        !self.phases.response_body && !self.response.held && self.response.out.is_empty()
    }

    /// From here on responses go past the encode filters.
    pub(super) fn skip_encode(&mut self) {
        self.skip_encode = true;
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
        self.with_chain(|chain, stream| {
            chain.begin(stream, Way::Request, complete && pieces.is_empty() && !trailers)?;
            let last = pieces.len();
            for (index, data) in (1..).zip(pieces) {
                chain.pass_data(stream, Way::Request, 0, data, complete && !trailers && index == last)?;
            }
            if complete && trailers { chain.pass_trailers(stream, Way::Request, 0) } else { Ok(()) }
        })?;
        self.keep_decoded();
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
            // A client may wait for 100 Continue before it sends what a filter waits for.
            if let Poll::Ready(Err(end)) = self.down.poll_flush(task) {
                return Poll::Ready(Err(Stopped::End(end)));
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
        let polled = self.with_chain(|chain, stream| stream.poll_decode_through(chain, task));
        self.keep_decoded();
        polled
    }

    fn poll_decode_through(
        &mut self,
        chain: &mut Chain,
        task: &mut Context<'_>,
    ) -> Poll<Result<(), Stopped>> {
        if chain.request.held && chain.poll_stations(self, Way::Request, task)? {
            return Poll::Ready(Ok(()));
        }
        match chain.room(Way::Request, self.cx.hcm.buffer_limit) {
            Room::Exceeded => return Poll::Ready(Err(Stopped::End(StreamEnd::RequestTooLarge))),
            Room::Full => return Poll::Pending,
            Room::Free if self.request_complete => return Poll::Pending,
            Room::Free => {}
        }
        let passed = match std::task::ready!(self.down.poll_piece(task, &mut self.heads.request_trailers)) {
            Err(end) => return Poll::Ready(Err(Stopped::End(end))),
            Ok(Piece::Data(data)) => chain.pass_data(self, Way::Request, 0, data, false),
            Ok(Piece::Trailers) => {
                self.request_has_trailers = true;
                self.mark_request_complete();
                chain.pass_trailers(self, Way::Request, 0)
            }
            Ok(Piece::End) => {
                self.mark_request_complete();
                chain.pass_data(self, Way::Request, 0, Bytes::new(), true)
            }
        };
        Poll::Ready(passed.map_err(Stopped::from))
    }

    /// Keeps what has passed the filters for the router and its mirrors.
    fn keep_decoded(&mut self) {
        for data in self.chain.request.out.drain(..) {
            for feed in &self.mirrors {
                feed.push(&data);
            }
            self.kept_bytes += data.len();
            self.heads.kept.push(data);
        }
        if self.chain.request.passed {
            self.end_mirrors();
        }
    }

    /// Begins to take the response head through the filters. Whether it has passed, `head_passed` tells.
    pub(super) fn begin_encode(&mut self, end: bool) -> Result<(), Stopped> {
        self.chain.forget_response();
        self.with_chain(|chain, stream| chain.begin(stream, Way::Response, end))?;
        self.check_response_head()
    }

    /// Takes response data to the filters; what passes them is in `chain.out`.
    pub(super) fn encode_data(&mut self, data: Bytes, end: bool) -> Result<(), Stopped> {
        self.with_chain(|chain, stream| chain.pass_data(stream, Way::Response, 0, data, end))?;
        self.check_response_head()?;
        match self.chain.room(Way::Response, self.cx.hcm.buffer_limit) {
            Room::Exceeded => Err(Stopped::End(StreamEnd::ResponseTooLarge)),
            Room::Full | Room::Free => Ok(()),
        }
    }

    /// Takes the response trailers to the filters.
    pub(super) fn encode_trailers(&mut self) -> Result<(), Stopped> {
        self.with_chain(|chain, stream| chain.pass_trailers(stream, Way::Response, 0))?;
        self.check_response_head()
    }

    /// Lets go what encode filters let go; `true` when something has moved.
    pub(super) fn poll_encode(&mut self, task: &mut Context<'_>) -> Result<bool, Stopped> {
        if !self.chain.response.held {
            return Ok(false);
        }
        let moved = self.with_chain(|chain, stream| chain.poll_stations(stream, Way::Response, task))?;
        self.check_response_head()?;
        Ok(moved)
    }

    /// Whether upstream must not be read, because a filter holds as much as it may.
    pub(super) fn encode_is_full(&mut self) -> bool {
        self.chain.room(Way::Response, self.cx.hcm.buffer_limit) != Room::Free
    }

    fn check_response_head(&self) -> Result<(), Stopped> {
        if self.chain.head_passed(Way::Response)
            && !self.response_started
            && self.heads.response.status().is_none()
        {
            return Err(Stopped::End(StreamEnd::FilterRemovedRequiredResponseHeaders));
        }
        Ok(())
    }

    pub(super) fn chain_on_local_reply(&mut self, reply: &mut LocalReply) {
        self.with_chain(|chain, stream| {
            for step in 0..chain.slots.len() {
                chain.phase(stream, Way::Request, step, Shown::LocalReply(reply));
            }
        });
    }

    /// Shows an informational response to the filters.
    pub(super) fn encode_informational(&mut self) {
        self.with_chain(|chain, stream| chain.show_informational(stream));
    }

    /// The chain beside the stream that it works on.
    fn with_chain<R>(&mut self, call: impl FnOnce(&mut Chain, &mut Self) -> R) -> R {
        let mut chain = std::mem::take(&mut self.chain);
        let result = call(&mut chain, self);
        self.chain = chain;
        result
    }
}

impl<D: Downstream> Place for Stream<'_, D> {
    fn around(&mut self) -> Around<'_> {
        Around {
            filters: &self.cx.hcm.filters,
            info: &mut self.info,
            heads: self.heads,
            cx: self.cx,
            timer: self.timer,
            table: self.table.as_ref(),
            random: self.random,
        }
    }

    fn select_anew(&mut self, chain: &mut Chain) {
        self.info.upstream.cluster = None;
        // A route that is gone shows when the router looks for it.
        let _ = self.select_route();
        self.note_cluster();
        // Who looks from now on is configured by the route that the request will take.
        if self.table.is_some() {
            chain.configure(self.selected());
        }
    }

    fn look_again(&mut self, chain: &mut Chain, step: usize) -> Result<Flow, StreamEnd> {
        self.look_again_through(chain, step)
    }
}

impl From<Box<LocalReply>> for Stopped {
    fn from(reply: Box<LocalReply>) -> Self {
        Self::Reply(reply)
    }
}
