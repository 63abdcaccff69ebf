//! What a filter's phase may have done for its stream.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use waystation_filter_api::client::Clients;
use waystation_filter_api::http::{ClusterSource, Driver, Fetched, LocalFuture, Membership, Resume};
use waystation_http::Headers;
use waystation_route::{Action, ClusterRef};

use super::station::Station;
use crate::http::timer::Timer;
use crate::http::{ConnCx, Table};
use crate::on_demand::{Answer, Wanted};
use crate::worker::Worker;

pub(super) struct PhaseDriver<'s> {
    pub(super) cx: &'s ConnCx,
    pub(super) timer: &'s Timer,
    pub(super) station: &'s Station,
    pub(super) table: Option<&'s (Rc<Table>, u32)>,
    pub(super) random: u64,
}

impl PhaseDriver<'_> {
    fn ask(&self, wanted: Wanted) -> LocalFuture<Fetched> {
        let asked = self.cx.worker.shared.on_demand.ask(&self.cx.hcm.places, wanted);
        Box::pin(async {
            let Some(asked) = asked else { return Fetched::Full };
            match asked.answer().await {
                Answer::Full => Fetched::Full,
                // The route is selected anew, and what is missing then is missing.
                Answer::Found | Answer::Missing | Answer::TimedOut => Fetched::Done,
            }
        })
    }
}

impl Driver for PhaseDriver<'_> {
    fn now(&self) -> Instant {
        self.timer.now()
    }

    fn random(&self) -> u64 {
        self.cx.worker.random()
    }

    fn sleep(&self, duration: Duration) -> LocalFuture<()> {
        // A time of its own: the stream's timer stays with the stream's deadlines, which seldom come.
        Box::pin(tokio::time::sleep(duration))
    }

    fn resume_handle(&self) -> Resume {
        self.station.resume_handle()
    }

    fn is_health_check_failed(&self) -> bool {
        self.cx.worker.shared.health_check_failed()
    }

    fn membership(&self, cluster: &str) -> Option<Membership> {
        let cluster = self.cx.worker.cluster_named(cluster)?.get()?;
        Some(Membership {
            total: cluster.stats.membership_total().value(),
            healthy: cluster.stats.membership_healthy().value(),
            degraded: cluster.stats.membership_degraded().value(),
        })
    }

    fn clients(&self) -> Rc<dyn Clients> {
        Rc::<Worker>::clone(&self.cx.worker)
    }

    fn fetch_route(&self, head: &Headers) -> Option<LocalFuture<Fetched>> {
        Some(self.ask(self.cx.missing_route(head)?))
    }

    fn fetch_cluster(&self, source: &Arc<ClusterSource>, head: &Headers) -> Option<LocalFuture<Fetched>> {
        let name = self.cluster_name(head)?;
        Some(self.ask(Wanted::Cluster { source: Arc::clone(source), name: name.into() }))
    }

    fn cluster_name<'a>(&'a self, head: &'a Headers) -> Option<&'a str> {
        let (table, index) = self.table?;
        let Action::Route(action) = &table.held.route(*index)?.action else { return None };
        match action.target(head, self.random, || None).cluster {
            ClusterRef::Cell(cell) => Some(cell.name()),
            // Without the header there is no name.
            ClusterRef::Named(name) => str::from_utf8(name).ok().filter(|name| !name.is_empty()),
        }
    }
}
