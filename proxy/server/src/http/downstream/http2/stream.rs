//! One stream: its request as it comes, its response as it goes.

use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use waystation_filter_api::stream::{Bytes as ByteCounts, Protocol};
use waystation_http::h1::Underscores;
use waystation_http::h2::Flood;
use waystation_http::{Headers, Known, Name, h2 as convert};

use super::HIGH_WATER;
use super::streams::{Active, Streams};
use crate::http::ConnCx;
use crate::http::downstream::{Cut, Downstream, FORCED_GOAWAY, HeadFacts, Piece};
use crate::http::end::StreamEnd;
use crate::http::frames::{FIELD_LIMIT, TOO_LARGE, Watch, cut_off};
use crate::http::stream::{self, Begin};
use crate::pool::http2::{FRAME_HEADER, poll_send};

/// Serves a request that the library has handed out.
pub(super) async fn serve(
    cx: Rc<ConnCx>,
    active: Active,
    start: Instant,
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let Active(streams) = &active;
    let _wait = cx.wait_for_overload().await;
    let taken_back = std::future::poll_fn(|task| Poll::Ready(respond.poll_reset(task).is_ready())).await;
    let watch = &streams.watch;
    let cx = &*cx;
    let mut scratch = cx.worker.take_scratch();
    let (parts, receive) = request.into_parts();
    let protocol = parts.extensions.get::<h2::ext::Protocol>().map(h2::ext::Protocol::as_str);
    convert::read_request(&parts, protocol, &mut scratch.request);
    // RFC 8441: inside the proxy an extended CONNECT is what an HTTP/1.1 upgrade is, as in Envoy.
    let upgrade = protocol.is_some();
    if let Some(protocol) = protocol {
        let head = &mut scratch.request;
        head.set(Known::Method, "GET");
        head.remove(Known::Protocol);
        head.set(Known::Upgrade, protocol);
        head.set(Known::Connection, "upgrade");
    }
    let underscore = underscores(cx, watch, &mut scratch.request);
    let head = &scratch.request;
    let facts = HeadFacts {
        protocol: Protocol::Http2,
        end: receive.is_end_stream(),
        tunnel: upgrade || head.method() == Some(b"CONNECT"),
        expect_continue: head
            .get(Known::Expect)
            .is_some_and(|expect| expect.eq_ignore_ascii_case(b"100-continue")),
    };
    let refused = if let Some(end) = too_large(cx, watch, head) {
        Some(end)
    } else if !head.contains(Known::Authority) && !head.contains(Known::Host) {
        Some(StreamEnd::DownstreamViolation("http2.violation.of.messaging.rule"))
    } else {
        underscore
    };
    let header_received = head.byte_size() as u64;
    let mut down = Http2 {
        receive,
        respond,
        send: None,
        pending: std::mem::take(&mut scratch.pending),
        pending_bytes: 0,
        high_water: HIGH_WATER.min(cx.hcm.buffer_limit),
        ended: false,
        trailers: None,
        data_done: facts.end,
        finished: false,
        upgrade,
        bytes: ByteCounts {
            header_received,
            wire_received: header_received + FRAME_HEADER,
            ..ByteCounts::default()
        },
        streams: Rc::clone(streams),
    };
    let mut timer = std::mem::take(&mut scratch.timer);
    let begin = Begin { start, facts, refused };
    let code = stream::serve(cx, &mut down, &mut timer, &mut scratch, begin).await;
    // A client that has taken its request back before it was looked at is not excused by the response that was made for it.
    let code = code.filter(|_| !taken_back);
    streams.ended(code, timer.now().saturating_duration_since(start), &cx.hcm.premature_resets);
    // If the client has not sent its request to the end, the library tells it not to once the response is out.
    scratch.timer = timer;
    scratch.pending = down.pending;
    cx.worker.give_scratch(scratch);
}

/// One stream.
struct Http2 {
    receive: RecvStream,
    respond: SendResponse<Bytes>,
    send: Option<SendStream<Bytes>>,
    pending: VecDeque<Bytes>,
    pending_bytes: usize,
    high_water: usize,
    ended: bool,
    trailers: Option<http::HeaderMap>,
    data_done: bool,
    finished: bool,
    /// The request was an extended CONNECT.
    upgrade: bool,
    bytes: ByteCounts,
    streams: Rc<Streams>,
}

impl Downstream for Http2 {
    fn poll_piece(&mut self, cx: &mut Context<'_>, trailers: &mut Headers) -> Poll<Result<Piece, StreamEnd>> {
        if !self.data_done {
            match ready!(self.receive.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Read only when upstream has room: that is the back-pressure.
                    let _ = self.receive.flow_control().release_capacity(data.len());
                    self.bytes.body_received += data.len() as u64;
                    self.bytes.wire_received += data.len() as u64 + FRAME_HEADER;
                    return Poll::Ready(Ok(Piece::Data(data)));
                }
                Some(Err(error)) => return Poll::Ready(Err(lost(&self.streams, &error))),
                None => self.data_done = true,
            }
        }
        match ready!(self.receive.poll_trailers(cx)) {
            Ok(Some(map)) => {
                convert::read_trailers(&map, trailers);
                Poll::Ready(Ok(Piece::Trailers))
            }
            Ok(None) => Poll::Ready(Ok(Piece::End)),
            Err(error) => Poll::Ready(Err(lost(&self.streams, &error))),
        }
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamEnd> {
        let reset = match &mut self.send {
            Some(send) => send.poll_reset(cx),
            None if self.finished => return Poll::Pending,
            None => self.respond.poll_reset(cx),
        };
        match ready!(reset) {
            Ok(_) => Poll::Ready(StreamEnd::DownstreamReset),
            Err(error) => Poll::Ready(lost(&self.streams, &error)),
        }
    }

    fn send_informational(&mut self, head: &Headers) {
        if let Ok(head) = convert::write_response(head) {
            // A stream that is gone says so when the response is sent.
            let _ = self.respond.send_informational(head);
        }
    }

    fn send_head(&mut self, head: &mut Headers, end: bool) {
        self.bytes.header_sent += head.byte_size() as u64;
        self.bytes.wire_sent += self.bytes.header_sent + FRAME_HEADER;
        let Ok(mut response) = convert::write_response(head) else {
            self.respond.send_reset(Reason::INTERNAL_ERROR);
            return;
        };
        if self.upgrade && response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
            *response.status_mut() = http::StatusCode::OK;
        }
        if let Ok(send) = self.respond.send_response(response, end) {
            self.finished = end;
            self.send = (!end).then_some(send);
        }
    }

    fn send_data(&mut self, data: Bytes) {
        if self.send.is_some() {
            self.bytes.body_sent += data.len() as u64;
            self.bytes.wire_sent += data.len() as u64 + FRAME_HEADER;
            self.pending_bytes += data.len();
            self.pending.push_back(data);
        }
    }

    fn send_end(&mut self, trailers: Option<&Headers>) {
        self.ended = true;
        self.trailers = trailers.and_then(|trailers| convert::write_trailers(trailers).ok());
    }

    fn has_room(&self) -> bool {
        self.pending_bytes < self.high_water
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamEnd>> {
        let Some(send) = &mut self.send else { return Poll::Ready(Ok(())) };
        let sent =
            poll_send(cx, send, &mut self.pending, &mut self.pending_bytes, self.ended, &mut self.trailers);
        match ready!(sent) {
            Ok(done) => {
                if done {
                    self.finished = true;
                    self.send = None;
                }
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(lost(&self.streams, &error))),
        }
    }

    fn close_after_response(&mut self) {
        // The response wakes the connection's task.
        self.streams.last.set(true);
    }

    fn is_last(&self) -> bool {
        self.streams.last.get()
    }

    fn reset(&mut self, cut: Cut) {
        if !self.finished {
            let reason = match cut {
                Cut::Failed => Reason::INTERNAL_ERROR,
                Cut::Tunnel => Reason::CONNECT_ERROR,
                Cut::Refused => Reason::PROTOCOL_ERROR,
            };
            match &mut self.send {
                Some(send) => send.send_reset(reason),
                None => self.respond.send_reset(reason),
            }
            self.finished = true;
            self.send = None;
        }
    }

    fn bytes(&self) -> ByteCounts {
        self.bytes
    }
}

fn lost(streams: &Streams, error: &h2::Error) -> StreamEnd {
    let watch = &streams.watch;
    if streams.forced.get() {
        return StreamEnd::ConnectionAborted(FORCED_GOAWAY);
    }
    if let Some(flood) = watch.flood() {
        return StreamEnd::DownstreamViolation(match flood {
            Flood::Empty => "http2.inbound_empty_frames_flood",
            Flood::Priority => "codec_error:Too_many_PRIORITY_frames",
            Flood::WindowUpdate => "codec_error:Too_many_WINDOW_UPDATE_frames",
        });
    }
    if watch.has_reset_too_often() {
        return StreamEnd::ConnectionAborted("too_many_premature_resets");
    }
    match error.is_reset() {
        _ if watch.is_cut() => cut_off(),
        // The library reset the stream over what the client sent, such as data beyond the announced length.
        true if !error.is_remote() => StreamEnd::DownstreamViolation("http2.remote_reset"),
        true => StreamEnd::DownstreamReset,
        false => StreamEnd::DownstreamGone,
    }
}

/// What of a head is more than Envoy's codec takes.
fn too_large(cx: &ConnCx, watch: &Watch, head: &Headers) -> Option<StreamEnd> {
    let limits = &cx.hcm.http1;
    if head.len() > limits.max_headers as usize {
        watch.stats.header_overflow().inc();
        return Some(StreamEnd::HeadRefused("http2.too_many_headers"));
    }
    // The memory it takes is more than its size but for the names that are known, and known without a walk.
    let limit = limits.max_head_bytes as usize;
    if head.capacity_bytes() + head.len() * Known::LONGEST <= limit.min(FIELD_LIMIT) {
        return None;
    }
    if head.iter().any(|(name, value)| name.as_bytes().len().max(value.len()) > FIELD_LIMIT) {
        watch.end();
        return Some(cut_off());
    }
    (head.byte_size() > limit).then(|| {
        watch.stats.header_list_size_too_large().inc();
        StreamEnd::HeadRefused(TOO_LARGE)
    })
}

/// `headers_with_underscores_action`, which the library knows nothing of.
fn underscores(cx: &ConnCx, watch: &Watch, head: &mut Headers) -> Option<StreamEnd> {
    let action = cx.hcm.http1.underscores;
    if action == Underscores::Allow {
        return None;
    }
    let offends = |name: Name<'_>| name.as_bytes().contains(&b'_');
    let found = head.iter().filter(|(name, _)| offends(*name)).count();
    if found == 0 {
        return None;
    }
    if action == Underscores::Reject {
        watch.stats.requests_rejected_with_underscores_in_headers().inc();
        return Some(StreamEnd::HeadRefused("http2.unexpected_underscore"));
    }
    watch.stats.dropped_headers_with_underscores().add(found as u64);
    head.retain(|name, _| !offends(name));
    None
}
