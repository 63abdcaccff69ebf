//! `update_*` of each subscription.

use std::collections::HashMap;

use waystation_stats::{Scope, stats_group};
use waystation_xds::{Client, SubId};

stats_group! {
    /// Below `cluster_manager.cds.`, `listener_manager.lds.`, `cluster.<name>.` and so on.
    pub struct SubscriptionStats {
        counters { init_fetch_timeout, update_attempt, update_failure, update_rejected, update_success }
        gauges { update_time, version }
        histograms { update_duration: Milliseconds }
    }
}

#[derive(Debug)]
struct Counted {
    stats: SubscriptionStats,
    seen: waystation_xds::SubscriptionStats,
}

/// The stats of all subscriptions that have a scope.
#[derive(Debug, Default)]
pub struct Counters {
    by_sub: HashMap<SubId, Counted>,
}

impl Counters {
    /// Counts `sub` below `scope`.
    pub fn add(&mut self, sub: SubId, scope: &Scope) {
        let counted = Counted { stats: scope.group(), seen: waystation_xds::SubscriptionStats::default() };
        self.by_sub.insert(sub, counted);
    }

    /// Forgets a subscription.
    pub fn remove(&mut self, sub: SubId) {
        self.by_sub.remove(&sub);
    }

    /// Brings the counters up to date with the client.
    pub fn follow(&mut self, client: &mut Client) {
        client.drain_changed_stats(|sub, now| {
            let Some(Counted { stats, seen }) = self.by_sub.get_mut(&sub) else {
                return;
            };
            stats.update_attempt().add(now.update_attempt - seen.update_attempt);
            stats.update_success().add(now.update_success - seen.update_success);
            stats.update_failure().add(now.update_failure - seen.update_failure);
            stats.update_rejected().add(now.update_rejected - seen.update_rejected);
            stats.init_fetch_timeout().add(now.init_fetch_timeout - seen.init_fetch_timeout);
            stats.update_time().set(now.update_time);
            stats.version().set(now.version);
            *seen = now.clone();
        });
    }
}
