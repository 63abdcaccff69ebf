//! `update_*` of each subscription.

use std::collections::HashMap;
use std::sync::Arc;

use waystation_stats::{Gauge, Scope, TextReadout, stats_group};
use waystation_upstream::Cluster;
use waystation_xds::{Client, SubId};

stats_group! {
    /// Below `cluster_manager.cds.`, `listener_manager.lds.`, `cluster.<name>.` and so on.
    pub struct SubscriptionStats {
        counters { init_fetch_timeout, update_attempt, update_failure, update_rejected, update_success }
        gauges { update_time, version }
        histograms { update_duration: Milliseconds }
    }
}

stats_group! {
    /// What a cluster's own group does not have of them.
    pub struct EdsStats {
        counters { init_fetch_timeout, update_rejected }
        gauges { update_time }
        histograms { update_duration: Milliseconds }
    }
}

/// Where the numbers of one subscription go.
#[derive(Debug)]
enum Target {
    Own(SubscriptionStats),
    /// EDS: the cluster counts some of them itself, for DNS as well.
    Cluster(Arc<Cluster>, EdsStats),
}

#[derive(Debug)]
struct Counted {
    target: Target,
    version_text: TextReadout,
    seen: waystation_xds::SubscriptionStats,
}

/// `control_plane.` of the aggregated stream.
#[derive(Debug)]
struct ControlPlane {
    connected: Gauge,
    pending: Gauge,
    enforced: waystation_stats::Counter,
    enforced_seen: u64,
    identifier: TextReadout,
}

/// The stats of all subscriptions that have a scope, and of the aggregated stream.
#[derive(Debug)]
pub struct Counters {
    by_sub: HashMap<SubId, Counted>,
    /// There is one only with an aggregated stream.
    control_plane: Option<ControlPlane>,
}

impl Counters {
    /// No subscriptions yet.
    pub fn new(root: &Scope, has_ads: bool) -> Self {
        let scope = root.scope("control_plane");
        let control_plane = has_ads.then(|| ControlPlane {
            connected: scope.gauge("connected_state"),
            pending: scope.gauge("pending_requests"),
            enforced: scope.counter("rate_limit_enforced"),
            enforced_seen: 0,
            identifier: scope.text_readout("identifier"),
        });
        Self { by_sub: HashMap::new(), control_plane }
    }

    /// Counts `sub` below `scope`.
    pub fn add(&mut self, sub: SubId, scope: &Scope) {
        self.insert(sub, Target::Own(scope.group()), scope);
    }

    /// Counts a cluster's EDS subscription.
    pub fn add_eds(&mut self, sub: SubId, cluster: &Arc<Cluster>) {
        let target = Target::Cluster(Arc::clone(cluster), cluster.scope().group());
        self.insert(sub, target, cluster.scope());
    }

    fn insert(&mut self, sub: SubId, target: Target, scope: &Scope) {
        let counted = Counted {
            target,
            version_text: scope.text_readout("version_text"),
            seen: waystation_xds::SubscriptionStats::default(),
        };
        self.by_sub.insert(sub, counted);
    }

    /// Forgets a subscription.
    pub fn remove(&mut self, sub: SubId) {
        self.by_sub.remove(&sub);
    }

    /// Brings the counters up to date with the client.
    pub fn follow(&mut self, client: &mut Client) {
        client.drain_changed_stats(|sub, now| {
            let Some(Counted { target, version_text, seen }) = self.by_sub.get_mut(&sub) else {
                return;
            };
            let succeeded = now.update_success - seen.update_success;
            let took = u64::try_from(now.update_duration.as_millis()).unwrap_or(u64::MAX);
            match target {
                Target::Own(stats) => {
                    stats.update_attempt().add(now.update_attempt - seen.update_attempt);
                    stats.update_success().add(succeeded);
                    stats.update_failure().add(now.update_failure - seen.update_failure);
                    stats.update_rejected().add(now.update_rejected - seen.update_rejected);
                    stats.init_fetch_timeout().add(now.init_fetch_timeout - seen.init_fetch_timeout);
                    stats.update_time().set(now.update_time);
                    stats.version().set(now.version);
                    if succeeded > 0 {
                        stats.update_duration().record(took);
                    }
                }
                Target::Cluster(cluster, stats) => {
                    cluster.stats.update_attempt().add(now.update_attempt - seen.update_attempt);
                    cluster.stats.update_success().add(succeeded);
                    cluster.stats.update_failure().add(now.update_failure - seen.update_failure);
                    cluster.stats.version().set(now.version);
                    stats.update_rejected().add(now.update_rejected - seen.update_rejected);
                    stats.init_fetch_timeout().add(now.init_fetch_timeout - seen.init_fetch_timeout);
                    stats.update_time().set(now.update_time);
                    if succeeded > 0 {
                        stats.update_duration().record(took);
                    }
                }
            }
            if now.version_text != seen.version_text {
                version_text.set(&now.version_text);
            }
            *seen = now.clone();
        });
        let core = client.core();
        if let Some(plane) = &mut self.control_plane
            && let Some(stream) = core.ads_mux().and_then(|mux| core.control_plane_stats(mux))
        {
            plane.connected.set(u64::from(stream.connected));
            plane.pending.set(stream.pending_requests);
            plane.enforced.add(stream.rate_limit_enforced - plane.enforced_seen);
            plane.enforced_seen = stream.rate_limit_enforced;
            if plane.identifier.value() != stream.identifier {
                plane.identifier.set(&stream.identifier);
            }
        }
    }
}
