//! `/stats` and `/stats/prometheus`, streamed.

use std::convert::Infallible;
use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Frame;
use hyper::{Response, StatusCode};
use tokio::task::JoinHandle;
use waystation_stats::render::{Query as StatsQuery, Renderer};

use super::{Admin, Body, CHUNK, Query, render, respond, text};

pub(super) async fn stats(admin: &Admin, query: &Query, prometheus: bool) -> Response<Body> {
    let parsed = if prometheus {
        StatsQuery::parse_prometheus(query.pairs())
    } else {
        StatsQuery::parse(query.pairs())
    };
    match parsed {
        Ok(StatsQuery { format, options }) => {
            let store = admin.shared.stats.clone();
            let renderer = render(move || Renderer::new(&store, format, options)).await;
            respond(StatusCode::OK, format.content_type(), StatsBody::next(renderer).boxed_unsync())
        }
        Err(reason) => text(StatusCode::BAD_REQUEST, reason),
    }
}

/// A scrape. Each piece is rendered on a thread of [`render`] and handed over when it is due, so that a slow reader
/// of a million lines holds one piece and no thread, and `/ready` goes between two writes.
struct StatsBody {
    /// `None` when all has been rendered.
    piece: Option<JoinHandle<(Renderer, Option<Bytes>)>>,
}

impl StatsBody {
    fn next(mut renderer: Renderer) -> Self {
        let render = move || {
            let piece = renderer.next_chunk(CHUNK);
            (renderer, piece)
        };
        Self { piece: Some(tokio::task::spawn_blocking(render)) }
    }
}

impl hyper::body::Body for StatsBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(piece) = &mut self.piece else {
            return Poll::Ready(None);
        };
        match ready!(Pin::new(piece).poll(cx)) {
            Ok((renderer, Some(piece))) => {
                *self = Self::next(renderer);
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            Ok((_, None)) => {
                self.piece = None;
                Poll::Ready(None)
            }
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}
