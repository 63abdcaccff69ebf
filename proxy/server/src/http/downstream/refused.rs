//! A request that the HTTP/2 library refused before it was one: there is nobody to answer, but something to log.

use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use waystation_filter_api::stream::Protocol;
use waystation_http::Headers;

use super::{Cut, Downstream, HeadFacts, Piece};
use crate::http::ConnCx;
use crate::http::end::StreamEnd;
use crate::http::stream::{self, Begin};
use crate::http::timer::Timer;

/// Counts and logs a request that ended so.
pub(super) async fn log(cx: &ConnCx, end: StreamEnd) {
    let facts = HeadFacts { protocol: Protocol::Http2, end: true, tunnel: false, expect_continue: false };
    let begin = Begin { start: Instant::now(), facts, refused: Some(end) };
    let mut scratch = cx.worker.take_scratch();
    stream::serve(cx, &mut Refused, &mut Timer::default(), &mut scratch, begin).await;
    cx.worker.give_scratch(scratch);
}

/// The library's side of such a request is over.
struct Refused;

impl Downstream for Refused {
    fn poll_piece(&mut self, _: &mut Context<'_>, _: &mut Headers) -> Poll<Result<Piece, StreamEnd>> {
        Poll::Ready(Ok(Piece::End))
    }

    fn poll_gone(&mut self, _: &mut Context<'_>) -> Poll<StreamEnd> {
        Poll::Ready(StreamEnd::DownstreamGone)
    }

    fn send_informational(&mut self, _: &Headers) {}

    fn send_head(&mut self, _: &mut Headers, _: bool) {}

    fn send_data(&mut self, _: Bytes) {}

    fn send_end(&mut self, _: Option<&Headers>) {}

    fn has_room(&self) -> bool {
        true
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StreamEnd>> {
        Poll::Ready(Ok(()))
    }

    fn close_after_response(&mut self) {}

    fn is_last(&self) -> bool {
        true
    }

    fn reset(&mut self, _: Cut) {}

    fn bytes(&self) -> waystation_filter_api::stream::Bytes {
        waystation_filter_api::stream::Bytes::default()
    }
}
