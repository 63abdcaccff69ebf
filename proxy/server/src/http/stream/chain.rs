//! The HTTP filters of one stream.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Poll, Waker};

use bytes::Bytes;
use waystation_filter_api::http::{
    BodyData, FilterConfig, Flow, Hold, HttpFilter, LocalFuture, LocalReply, Phases, Resume, StreamCx,
};

use super::Stream;
use crate::http::downstream::{Downstream, Piece};
use crate::http::end::StreamEnd;

/// The filters that this stream goes through, in the order of the configuration.
#[derive(Default)]
pub(super) struct Chain {
    slots: Vec<Slot>,
    phases: Phases,
    resume: Option<Rc<Resumed>>,
}

struct Slot {
    filter: Box<dyn HttpFilter>,
    phases: Phases,
    configs: Vec<FilterConfig>,
}

/// Where a [`Resume`] handle leaves its verdict.
#[derive(Default)]
struct Resumed {
    verdict: RefCell<Option<Flow>>,
    waker: RefCell<Option<Waker>>,
}

/// What a body phase made of its data.
pub(super) enum Passed {
    /// Goes on.
    Data(Bytes),
    /// Answered here.
    Reply(Box<LocalReply>),
}

impl Chain {
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether some filter looks at request bodies.
    pub(super) fn wants_request_body(&self) -> bool {
        self.phases.request_body
    }

    /// Whether some filter looks at response bodies.
    pub(super) fn wants_response_body(&self) -> bool {
        self.phases.response_body
    }
}

impl<D: Downstream> Stream<'_, D> {
    /// Makes the filters' instances for the stream's route.
    pub(super) fn build_chain(&mut self) {
        self.complete_chain();
        self.chain = Chain::default();
        let hcm = &self.cx.hcm;
        if hcm.filters.is_empty() {
            return;
        }
        let route = self.table.as_ref().and_then(|(table, index)| Some((table, table.held.route(*index)?)));
        for (i, entry) in hcm.filters.iter().enumerate() {
            let levels = route
                .and_then(|(table, route)| Some(route.filter_config(None, (*table.slots.get(i)?)?)))
                .unwrap_or_default();
            if levels.disabled.unwrap_or(entry.disabled) {
                continue;
            }
            let factory = &entry.factory;
            let Some(filter) = factory.create(levels.configs) else { continue };
            let phases = factory.phases();
            let all = &mut self.chain.phases;
            all.request_body |= phases.request_body;
            all.request_trailers |= phases.request_trailers;
            all.response_body |= phases.response_body;
            all.response_trailers |= phases.response_trailers;
            self.chain.slots.push(Slot { filter, phases, configs: levels.configs.to_vec() });
        }
    }

    /// Runs the request head through the filters. `true` when one of them has answered.
    pub(super) async fn decode_head(&mut self) -> Result<bool, StreamEnd> {
        for index in 0..self.chain.slots.len() {
            if !self.chain.slots[index].phases.request_headers {
                continue;
            }
            let end = self.request_complete && !self.request_has_trailers && self.heads.kept.is_empty();
            let mut head = std::mem::take(&mut self.heads.request);
            let flow = self.phase(index, None, |filter, cx| filter.decode_headers(cx, &mut head, end));
            self.heads.request = head;
            if let Some(reply) = self.settle(flow).await? {
                self.reply(*reply).await?;
                return Ok(true);
            }
        }
        if self.heads.request.authority().is_none() || self.heads.request.method().is_none() {
            return Err(StreamEnd::FilterRemovedRequiredRequestHeaders);
        }
        Ok(false)
    }

    /// Runs the response head through the filters, in reverse.
    pub(super) async fn encode_head(&mut self, end: bool) -> Result<(), StreamEnd> {
        for index in (0..self.chain.slots.len()).rev() {
            if !self.chain.slots[index].phases.response_headers {
                continue;
            }
            let mut head = std::mem::take(&mut self.heads.response);
            let request = std::mem::take(&mut self.heads.request);
            let flow =
                self.phase(index, Some(&request), |filter, cx| filter.encode_headers(cx, &mut head, end));
            self.heads.request = request;
            self.heads.response = head;
            // A filter that would answer a response again has nothing to answer: its verdict stands as it is.
            self.settle_response(flow).await?;
        }
        if self.heads.response.status().is_none() {
            return Err(StreamEnd::FilterRemovedRequiredResponseHeaders);
        }
        Ok(())
    }

    /// Runs a piece of the request body through the filters.
    pub(super) fn decode_data(&mut self, data: Bytes, end: bool) -> Passed {
        let mut data = BodyData::Shared(data);
        for index in 0..self.chain.slots.len() {
            if !self.chain.slots[index].phases.request_body {
                continue;
            }
            let request = std::mem::take(&mut self.heads.request);
            let flow = self.phase(index, Some(&request), |filter, cx| filter.decode_data(cx, &mut data, end));
            self.heads.request = request;
            if let Flow::Reply(reply) = flow {
                return Passed::Reply(reply);
            }
        }
        Passed::Data(data.into_bytes())
    }

    /// Runs a piece of the response body through the filters, in reverse.
    pub(super) fn encode_data(&mut self, data: Bytes, end: bool) -> Bytes {
        let mut data = BodyData::Shared(data);
        for index in (0..self.chain.slots.len()).rev() {
            if !self.chain.slots[index].phases.response_body {
                continue;
            }
            let request = std::mem::take(&mut self.heads.request);
            let _ = self.phase(index, Some(&request), |filter, cx| filter.encode_data(cx, &mut data, end));
            self.heads.request = request;
        }
        data.into_bytes()
    }

    /// Runs request trailers through the filters.
    pub(super) fn decode_trailers(&mut self) {
        if !self.chain.phases.request_trailers {
            return;
        }
        let mut trailers = std::mem::take(&mut self.heads.request_trailers);
        for index in 0..self.chain.slots.len() {
            let request = std::mem::take(&mut self.heads.request);
            let _ = self.phase(index, Some(&request), |filter, cx| filter.decode_trailers(cx, &mut trailers));
            self.heads.request = request;
        }
        self.heads.request_trailers = trailers;
    }

    /// Runs response trailers through the filters, in reverse.
    pub(super) fn encode_trailers(&mut self) {
        if !self.chain.phases.response_trailers {
            return;
        }
        let mut trailers = std::mem::take(&mut self.heads.response_trailers);
        for index in (0..self.chain.slots.len()).rev() {
            let request = std::mem::take(&mut self.heads.request);
            let _ = self.phase(index, Some(&request), |filter, cx| filter.encode_trailers(cx, &mut trailers));
            self.heads.request = request;
        }
        self.heads.response_trailers = trailers;
    }

    pub(super) fn chain_on_local_reply(&mut self, reply: &mut LocalReply) {
        for index in 0..self.chain.slots.len() {
            self.phase(index, None, |filter, cx| {
                filter.on_local_reply(cx, reply);
                Flow::Continue
            });
        }
    }

    pub(super) fn complete_chain(&mut self) {
        for index in 0..self.chain.slots.len() {
            if self.chain.slots[index].phases.complete {
                let request = std::mem::take(&mut self.heads.request);
                self.phase(index, Some(&request), |filter, cx| {
                    filter.on_complete(cx);
                    Flow::Continue
                });
                self.heads.request = request;
            }
        }
    }

    /// Calls one phase of one filter with its context.
    fn phase(
        &mut self,
        index: usize,
        request: Option<&waystation_http::Headers>,
        call: impl FnOnce(&mut dyn HttpFilter, &mut StreamCx<'_>) -> Flow,
    ) -> Flow {
        let resumed = Rc::clone(self.chain.resume.get_or_insert_with(Rc::default));
        let resume = Resume::new(move |flow| {
            *resumed.verdict.borrow_mut() = Some(flow);
            if let Some(waker) = resumed.waker.borrow_mut().take() {
                waker.wake();
            }
        });
        let mut clear_route = false;
        let slot = &mut self.chain.slots[index];
        let info = &mut self.info;
        let flow = self.cx.worker.with_random(|random| {
            let mut cx = StreamCx::new(info, request, &slot.configs, random, &resume, &mut clear_route);
            call(&mut *slot.filter, &mut cx)
        });
        if clear_route {
            // A route that is gone shows when the router looks for it.
            let _ = self.select_route();
        }
        flow
    }

    /// Waits until a head phase lets the stream go on; the reply when it does not.
    async fn settle(&mut self, mut flow: Flow) -> Result<Option<Box<LocalReply>>, StreamEnd> {
        loop {
            flow = match flow {
                Flow::Continue => return Ok(None),
                Flow::Reply(reply) => return Ok(Some(reply)),
                Flow::Wait(future) => self.wait(Some(future), Hold::Watermark).await?,
                Flow::Pause(hold) => self.wait(None, hold).await?,
            };
        }
    }

    async fn settle_response(&mut self, mut flow: Flow) -> Result<(), StreamEnd> {
        loop {
            flow = match flow {
                Flow::Continue | Flow::Reply(_) => return Ok(()),
                Flow::Wait(future) => self.wait(Some(future), Hold::Watermark).await?,
                Flow::Pause(_) => self.wait(None, Hold::Watermark).await?,
            };
        }
    }

    /// Waits for a filter's verdict; what arrives of the request meanwhile is kept, up to the buffer limit.
    async fn wait(&mut self, mut future: Option<LocalFuture<Flow>>, hold: Hold) -> Result<Flow, StreamEnd> {
        let resumed = Rc::clone(self.chain.resume.get_or_insert_with(Rc::default));
        let limit = self.cx.hcm.buffer_limit;
        std::future::poll_fn(|task| {
            if let Some(future) = &mut future {
                if let Poll::Ready(flow) = future.as_mut().poll(task) {
                    return Poll::Ready(Ok(flow));
                }
            } else {
                if let Some(flow) = resumed.verdict.borrow_mut().take() {
                    return Poll::Ready(Ok(flow));
                }
                *resumed.waker.borrow_mut() = Some(task.waker().clone());
            }
            if self.request_complete {
                if let Poll::Ready(end) = self.down.poll_gone(task) {
                    return Poll::Ready(Err(end));
                }
            } else {
                while !self.request_complete && self.kept_bytes < limit {
                    match self.down.poll_piece(task, &mut self.heads.request_trailers) {
                        Poll::Pending => break,
                        Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
                        Poll::Ready(Ok(piece)) => self.keep(piece),
                    }
                }
                if self.kept_bytes >= limit && hold == Hold::Buffer {
                    return Poll::Ready(Err(StreamEnd::RequestTooLarge));
                }
            }
            self.poll_deadlines(task, None).map(Err)
        })
        .await
    }

    /// Keeps a piece of the request that cannot go on yet.
    fn keep(&mut self, piece: Piece) {
        match piece {
            Piece::Data(data) => {
                self.kept_bytes += data.len();
                self.heads.kept.push(data);
            }
            Piece::Trailers => {
                self.request_has_trailers = true;
                self.mark_request_complete();
            }
            Piece::End => self.mark_request_complete(),
        }
    }
}
