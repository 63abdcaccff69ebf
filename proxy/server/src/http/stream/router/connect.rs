//! The host of an attempt, and the connection to it.

use std::future::Future as _;
use std::rc::Rc;
use std::time::Instant;

use waystation_http::Known;
use waystation_route::RetryHostPredicate;
use waystation_upstream::cluster::ClusterRef;
use waystation_upstream::load_balancer::{OriginalDestination, PriorityLoad};
use waystation_upstream::{NoHost, PickContext, Priority};

use super::Routing;
use super::hedge::Answer;
use crate::http::downstream::Downstream;
use crate::http::end::StreamEnd;
use crate::http::retry::Retries;
use crate::http::stream::Stream;
use crate::http::stream::upstream::{self, NoStream, Upstream};
use crate::pool::{HostPool, TlsName};
use crate::worker::Sharing;

/// Why there is no connection to make an attempt with.
pub(super) enum Unmade {
    Failed(NoStream),
    Overtaken(Answer),
    Over(StreamEnd),
}

impl<D: Downstream> Stream<'_, D> {
    /// Picks the host of an attempt; a retry looks for one that the policy's predicates accept.
    pub(super) fn pick(
        &self,
        routing: &Routing<'_>,
        load: Option<&PriorityLoad>,
        now: Instant,
    ) -> Result<Rc<HostPool>, NoHost> {
        let policy = routing.retry.filter(|_| routing.attempts > 1);
        let reject = |host: &waystation_upstream::Host| {
            policy.is_some_and(|policy| {
                policy.host_predicates.iter().any(|predicate| match predicate {
                    RetryHostPredicate::PreviousHosts => routing.tried.contains(&host.id()),
                    RetryHostPredicate::OmitCanary => host.canary(),
                    RetryHostPredicate::OmitMetadata(labels) => labels.match_host(host.metadata()),
                })
            })
        };
        let connection = &self.cx.info;
        let cx = PickContext {
            hash: routing.hash,
            metadata_match: routing.metadata,
            priority_load: load,
            original_destination: Some(OriginalDestination {
                local_address: Some(&connection.local_address).filter(|_| connection.local_address_restored),
                header: self.heads.request.get(Known::XEnvoyOriginalDstHost),
                ..OriginalDestination::default()
            }),
            reject: policy.map(|_| &reject as _),
            reselections: policy.map_or(0, |policy| policy.host_selection_attempts),
            ..PickContext::default()
        };
        let sharing = Sharing {
            tls_name: TlsName::of(&routing.cluster.http, &self.heads.request),
            downstream: Some(connection),
            stated: self.cx.hcm.add_proxy_protocol_state,
            counted: routing.action.priority,
        };
        routing.local.pick(&self.cx.worker, &routing.cluster, &cx, sharing, now)
    }

    /// Waits for a connection, unless the stream ends before there is one.
    pub(super) async fn connect(
        &mut self,
        pool: &Rc<HostPool>,
        cluster: &Rc<ClusterRef>,
        priority: Priority,
        routing: &mut Routing<'_>,
        retries: &Retries<'_>,
    ) -> Result<Upstream, Unmade> {
        let mut future = Box::pin(upstream::acquire(
            Rc::clone(&self.cx.worker),
            Rc::clone(pool),
            Rc::clone(cluster),
            priority,
            routing.carried,
        ));
        let ended = std::future::poll_fn(|task| {
            if let std::task::Poll::Ready(result) = future.as_mut().poll(task) {
                return std::task::Poll::Ready(result.map_err(Unmade::Failed));
            }
            if let std::task::Poll::Ready(answer) = self.poll_parked(task, routing, retries) {
                return std::task::Poll::Ready(Err(Unmade::Overtaken(answer)));
            }
            if self.request_complete
                && let std::task::Poll::Ready(end) = self.down.poll_gone(task)
            {
                return std::task::Poll::Ready(Err(Unmade::Over(end)));
            }
            self.poll_deadlines(task, None).map(|end| Err(Unmade::Over(end)))
        })
        .await;
        if let Err(Unmade::Overtaken(_) | Unmade::Over(_)) = ended {
            cluster.stats.upstream_rq_cancelled().inc();
        }
        ended
    }
}
