//! The client's side of one stream, as the stream engine sees it.

use std::task::{Context, Poll};

use bytes::Bytes;
use waystation_filter_api::stream::Protocol;
use waystation_http::Headers;
use waystation_stats::{CounterRef, GaugeRef};

use super::end::StreamEnd;
use super::stats::HcmStats;

pub(crate) mod http1;
pub(crate) mod http2;
mod refused;

/// The details of requests whose connection `http2_server_go_away_and_close_on_dispatch` ends.
pub(crate) const FORCED_GOAWAY: &str = "forced_goaway";

/// A codec's connection in the statistics, until it is dropped. What drops it before its end closes it.
struct OpenCodec<'a> {
    stats: &'a HcmStats,
    active: GaugeRef<'a>,
    by_peer: bool,
}

impl<'a> OpenCodec<'a> {
    fn new(stats: &'a HcmStats, total: CounterRef<'a>, active: GaugeRef<'a>) -> Self {
        total.inc();
        active.inc();
        Self { stats, active, by_peer: false }
    }
}

impl Drop for OpenCodec<'_> {
    fn drop(&mut self) {
        self.active.dec();
        match self.by_peer {
            true => self.stats.downstream_cx_destroy_remote().inc(),
            false => self.stats.downstream_cx_destroy_local().inc(),
        }
    }
}

/// A piece of the request after its head.
#[derive(Debug)]
pub(crate) enum Piece {
    Data(Bytes),
    /// In the map that was passed in; nothing follows.
    Trailers,
    End,
}

/// Facts about a request head that are not in its headers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadFacts {
    pub(crate) protocol: Protocol,
    /// The request ends with its head.
    pub(crate) end: bool,
    /// An upgrade or CONNECT: the body is a tunnel if the upstream agrees.
    pub(crate) tunnel: bool,
    pub(crate) expect_continue: bool,
}

/// How a response is cut short.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Cut {
    /// The response had begun and cannot be completed.
    Failed,
    /// The other end of a tunnel is gone.
    Tunnel,
    /// There is nobody to answer, or nothing to be answered.
    Refused,
}

/// One request and its response on a downstream connection.
pub(crate) trait Downstream {
    /// The next piece of the request.
    fn poll_piece(&mut self, cx: &mut Context<'_>, trailers: &mut Headers) -> Poll<Result<Piece, StreamEnd>>;

    /// Ready when the client is gone, after the request was read to its end.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamEnd>;

    /// Queues a 1xx head.
    fn send_informational(&mut self, head: &Headers);

    /// Queues the response head, which afterwards also says what the connection is told with it.
    fn send_head(&mut self, head: &mut Headers, end: bool);

    /// Queues a piece of body.
    fn send_data(&mut self, data: Bytes);

    /// Queues the end, with trailers if there are any.
    fn send_end(&mut self, trailers: Option<&Headers>);

    /// Whether more of the response may be queued.
    fn has_room(&self) -> bool;

    /// Hands to the kernel what is queued; ready when all of it is.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamEnd>>;

    /// Says in the response head that this is the connection's last response, where the protocol has that.
    fn close_after_response(&mut self);

    /// Whether that has been said, or is to be.
    fn is_last(&self) -> bool;

    /// Cuts the response short.
    fn reset(&mut self, cut: Cut);

    /// Bytes of body, of headers and on the wire, received and sent.
    fn bytes(&self) -> waystation_filter_api::stream::Bytes;
}
