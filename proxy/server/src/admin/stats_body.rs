//! `/stats` and `/stats/prometheus`, streamed.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Frame;
use hyper::{Response, StatusCode};
use waystation_stats::render::{Query as StatsQuery, Renderer};

use super::{Admin, Body, Query, respond, text};

/// The size of a piece: a scrape of a million lines holds one of them at a time.
const CHUNK: usize = 64 * 1024;

pub(super) fn stats(admin: &Admin, query: &Query, prometheus: bool) -> Response<Body> {
    let parsed = if prometheus {
        StatsQuery::parse_prometheus(query.pairs())
    } else {
        StatsQuery::parse(query.pairs())
    };
    match parsed {
        Ok(parsed) => {
            let kind = parsed.format.content_type();
            let renderer = Renderer::new(&admin.shared.stats, parsed.format, parsed.options);
            respond(StatusCode::OK, kind, StatsBody { renderer, yielded: true }.boxed_unsync())
        }
        Err(reason) => text(StatusCode::BAD_REQUEST, reason),
    }
}

/// A scrape. Between two pieces other requests have their turn: `/ready` must not wait for a million lines.
struct StatsBody {
    renderer: Renderer,
    yielded: bool,
}

impl hyper::body::Body for StatsBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.yielded = !self.yielded;
        if self.yielded {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.renderer.next_chunk(CHUNK).map(|chunk| Ok(Frame::data(chunk))))
    }
}
