//! One attempt of a call: a stream to one host.

use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use waystation_filter_api::client::CallError;
use waystation_filter_api::stream::Protocol;
use waystation_http::{Headers, Known};
use waystation_stats::ResponseStats;
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::host::{ActiveRequest, Outcome};
use waystation_upstream::outlier::LocalOrigin;
use waystation_upstream::{PickContext, Priority};

use crate::http::end::ResetReason;
use crate::http::stream::Event;
use crate::http::stream::request::is_grpc;
use crate::http::stream::router::outlier;
use crate::http::stream::upstream::{self, Carried, NoStream, RequestPermit, Upstream};
use crate::pool::{HostPool, TlsName};
use crate::worker::{LocalCluster, Sharing, Worker};

/// Envoy's client says that its requests come by HTTP/1.
const CARRIED: Carried = Carried::Http(Protocol::Http11);

/// Who calls whom.
pub(super) struct Between {
    pub(super) worker: Rc<Worker>,
    pub(super) local: Rc<LocalCluster>,
    pub(super) cluster: Rc<ClusterRef>,
    /// The request says that it comes from inside.
    pub(super) internal: bool,
}

impl Between {
    /// Counts a response, or what stands for one.
    pub(super) fn count(&self, status: u16) {
        self.cluster.count_response(status);
        self.category(|stats| stats.record(status));
    }

    fn category(&self, record: impl FnOnce(&ResponseStats)) {
        let extras = self.local.extras(&self.worker, &self.cluster);
        record(if self.internal { extras.internal() } else { extras.external() });
    }

    /// Picks a host.
    pub(super) fn pick(&self, head: &Headers, cx: &PickContext<'_>) -> Result<Rc<HostPool>, CallError> {
        let tls_name = TlsName::of(&self.cluster.http, head);
        let sharing = Sharing { tls_name, counted: Priority::Default, ..Sharing::default() };
        let picked = self.local.pick(&self.worker, &self.cluster, cx, sharing, Instant::now());
        picked.map_err(|no_host| {
            if no_host != waystation_upstream::NoHost::PoolOverflow {
                self.cluster.stats.upstream_cx_none_healthy().inc();
            }
            CallError::NoHealthyHost
        })
    }
}

/// A request on its way to a host. Dropped before its end, it is reset.
pub(super) struct Attempt {
    pub(super) between: Rc<Between>,
    pool: Rc<HostPool>,
    upstream: Option<Upstream>,
    active: Option<ActiveRequest>,
    _permit: RequestPermit,
    is_grpc: bool,
    start: Instant,
    /// The end of the request has been handed over.
    sent: bool,
    /// The end of the response has come.
    ended: bool,
}

impl Attempt {
    /// Waits for a connection and sends the head, which is all of the request with `end`.
    pub(super) async fn begin(
        between: Rc<Between>,
        pool: Rc<HostPool>,
        head: &mut Headers,
        end: bool,
    ) -> Result<Box<Self>, ResetReason> {
        let start = Instant::now();
        let Between { worker, cluster, .. } = &*between;
        let ready = upstream::ready(&pool, cluster, CARRIED, start);
        let mut upstream = match ready {
            Some(upstream) => upstream,
            None => {
                let mut waiting = Waiting(Some(cluster));
                let (worker, cluster) = (Rc::clone(worker), Rc::clone(cluster));
                let made =
                    upstream::acquire(worker, Rc::clone(&pool), cluster, Priority::Default, CARRIED).await;
                waiting.0 = None;
                made.map_err(|NoStream { reason, .. }| {
                    // Without room for it no host was asked.
                    if reason != ResetReason::Overflow {
                        between.cluster.local_origin(&pool.host(), LocalOrigin::ConnectFailed);
                    }
                    reason
                })?
            }
        };
        let Some(permit) = RequestPermit::acquire(cluster, Priority::Default) else {
            // Nothing was sent on it: the next request can be.
            if let Upstream::Http1(connection) = upstream {
                pool.put_idle(connection, cluster, Instant::now());
            }
            return Err(ResetReason::Overflow);
        };
        if !head.contains(Known::Scheme) {
            head.set(Known::Scheme, if upstream.info().tls.is_some() { "https" } else { "http" });
        }
        let host = pool.host();
        cluster.local_origin(&host, LocalOrigin::Connected);
        let active = host.begin_request();
        if let Err(reason) = upstream.send_head(worker, head, end) {
            cluster.local_origin(&host, LocalOrigin::ConnectFailed);
            active.finish(Outcome::Error);
            return Err(reason);
        }
        let is_grpc = is_grpc(head);
        let (upstream, active) = (Some(upstream), Some(active));
        Ok(Box::new(Self {
            between,
            pool,
            upstream,
            active,
            _permit: permit,
            is_grpc,
            start,
            sent: end,
            ended: false,
        }))
    }

    pub(super) fn count(&self, status: u16) {
        self.between.count(status);
        if let Some(zone) = self.pool.zone_stats(&self.between.worker, &self.between.cluster) {
            zone.record(status);
        }
    }

    /// Says in a response head how long it took, as the router does.
    pub(super) fn state_time(&self, head: &mut Headers) {
        head.set_number(Known::XEnvoyUpstreamServiceTime, super::elapsed(self.start));
    }

    /// The response is complete: `upstream_rq_time`.
    pub(super) fn record_time(&self) {
        let elapsed = super::elapsed(self.start);
        self.between.cluster.responses().record_time(elapsed);
        self.between.category(|stats| stats.record_time(elapsed));
        if let Some(zone) = self.pool.zone_stats(&self.between.worker, &self.between.cluster) {
            zone.record_time(elapsed);
        }
    }

    /// The time of the call is over.
    pub(super) fn time_out(&mut self, begun: bool) {
        self.between.cluster.stats.upstream_rq_timeout().inc();
        if !begun {
            self.count(504);
        }
        self.too_slow();
    }

    /// Nothing came in the time of the call or of the try.
    pub(super) fn too_slow(&mut self) {
        self.between.cluster.local_origin(&self.pool.host(), outlier::timed_out(false));
        self.fail(Outcome::Timeout);
    }

    fn fail(&mut self, outcome: Outcome) {
        if let Some(active) = self.active.take() {
            active.finish(outcome);
        }
    }

    pub(super) fn send(&mut self, data: Bytes) {
        // An error shows when the response is read.
        if let Some(upstream) = self.upstream.as_mut().filter(|_| !data.is_empty()) {
            let _ = upstream.send_data(data);
        }
    }

    pub(super) fn finish(&mut self, trailers: Option<&Headers>) {
        if let Some(upstream) = self.upstream.as_mut().filter(|_| !self.sent) {
            self.sent = true;
            let _ = upstream.send_end(trailers);
        }
    }

    pub(super) fn is_behind(&self) -> bool {
        self.upstream.as_ref().is_some_and(|upstream| !upstream.has_room())
    }

    pub(super) fn poll_room(&mut self, task: &mut Context<'_>) -> Poll<()> {
        match &mut self.upstream {
            Some(upstream) if !upstream.has_room() => upstream.poll_flush(task).map(drop),
            _ => Poll::Ready(()),
        }
    }

    /// What comes of the response, heads and trailers in `received`.
    pub(super) fn poll_event(
        &mut self,
        task: &mut Context<'_>,
        received: &mut Headers,
    ) -> Poll<Result<Event, ResetReason>> {
        let Some(upstream) = &mut self.upstream else { return Poll::Ready(Ok(Event::End)) };
        let _ = upstream.poll_flush(task);
        let event = ready!(upstream.poll_event(task, &self.between.worker, received));
        match &event {
            Ok(Event::Head { end }) => {
                self.ended = *end;
                outlier::answered(&self.between.cluster, &self.pool.host(), received, self.is_grpc);
                let failed = received.status().is_none_or(|status| status >= 500);
                self.fail(if failed { Outcome::Error } else { Outcome::Success });
            }
            Ok(Event::Trailers | Event::End) => self.ended = true,
            Ok(Event::Informational | Event::Data(_)) => {}
            Err(reason) => {
                upstream.count_loss(&self.between.cluster, *reason);
                self.upstream = None;
                self.between.cluster.local_origin(&self.pool.host(), LocalOrigin::ConnectFailed);
                self.fail(Outcome::Error);
            }
        }
        Poll::Ready(event)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.fail(Outcome::Cancelled);
        if let Some(upstream) = self.upstream.take() {
            let Between { worker, cluster, .. } = &*self.between;
            upstream.release(worker, &self.pool, cluster, self.sent && self.ended, Instant::now());
        }
    }
}

/// Counts a call that goes away while it waits for a connection.
struct Waiting<'a>(Option<&'a Rc<ClusterRef>>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(cluster) = self.0 {
            cluster.stats.upstream_rq_cancelled().inc();
        }
    }
}
