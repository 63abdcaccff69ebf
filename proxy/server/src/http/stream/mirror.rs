//! Request mirroring: a copy goes to another cluster, and nobody waits for the answer.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use waystation_filter_api::cell::Cell;
use waystation_filter_api::stream::Protocol;
use waystation_http::Headers;
use waystation_upstream::{Cluster, PickContext, Priority};

use super::upstream::{self, Event, RequestPermit, TlsNames, Upstream};
use crate::worker::Worker;

/// Sends a request and reads its response to the end.
pub(super) async fn send(
    worker: Rc<Worker>,
    cell: Arc<Cell<Cluster>>,
    request: Headers,
    body: Vec<Bytes>,
    timeout: Duration,
) {
    let exchange = exchange(&worker, &cell, request, body);
    if timeout.is_zero() {
        exchange.await;
    } else {
        tokio::select! {
            () = exchange => {}
            () = tokio::time::sleep(timeout) => {}
        }
    }
}

async fn exchange(worker: &Rc<Worker>, cell: &Arc<Cell<Cluster>>, request: Headers, body: Vec<Bytes>) {
    let local = worker.cluster(cell);
    let Some(cluster) = local.get() else { return };
    let now = Instant::now();
    let Ok(pool) = local.pick(worker, &cluster, &PickContext::default(), now) else { return };
    let priority = Priority::Default;
    let stream = match upstream::ready(&pool, &cluster, Protocol::Http11, now) {
        Some(stream) => Ok(stream),
        None => {
            let names = TlsNames::default();
            upstream::acquire(
                Rc::clone(worker),
                Rc::clone(&pool),
                Rc::clone(&cluster),
                priority,
                Protocol::Http11,
                names,
            )
            .await
        }
    };
    let Ok(mut stream) = stream else { return };
    let Some(_permit) = RequestPermit::acquire(&cluster, priority) else { return };
    let bodiless = body.is_empty();
    if stream.send_head(worker, &request, bodiless).is_err() {
        return;
    }
    let mut body = body.into_iter();
    let mut ended = bodiless;
    let mut head = Headers::new();
    let done = std::future::poll_fn(|task| {
        while !ended {
            if !stream.has_room() && !matches!(stream.poll_flush(task), std::task::Poll::Ready(Ok(()))) {
                break;
            }
            let sent = match body.next() {
                Some(data) => stream.send_data(data),
                None => {
                    ended = true;
                    stream.send_end(None)
                }
            };
            if sent.is_err() {
                return std::task::Poll::Ready(false);
            }
        }
        let _ = stream.poll_flush(task);
        loop {
            match std::task::ready!(stream.poll_event(task, worker, &mut head)) {
                Err(_) => return std::task::Poll::Ready(false),
                Ok(Event::Head { end: true } | Event::Trailers | Event::End) => {
                    return std::task::Poll::Ready(true);
                }
                Ok(Event::Head { end: false }) => {
                    let status = head.status().unwrap_or(0);
                    cluster.response_codes().record(status);
                }
                Ok(Event::Informational | Event::Data(_)) => {}
            }
        }
    })
    .await;
    if let (true, Upstream::Http1(mut connection)) = (done, stream)
        && connection.finish(worker)
    {
        pool.put_idle(connection, &cluster, Instant::now());
    }
}
