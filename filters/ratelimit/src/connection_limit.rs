//! `envoy.filters.network.connection_limit`: so many connections at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3 as pb;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::network::{
    CloseKind, Flow, NetworkCx, NetworkFactoryContext, NetworkFilter, NetworkFilterExtension,
    NetworkFilterFactory, Wants,
};
use waystation_filter_api::runtime::RuntimeFlag;
use waystation_filter_api::wire::{self, decode};
use waystation_schema::ConfigError;
use waystation_stats::stats_group;

use crate::enabled;

/// For the binary's table.
pub const EXTENSION: NetworkFilterExtension = NetworkFilterExtension {
    name: "envoy.filters.network.connection_limit",
    type_name: "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
    compile,
};

stats_group! {
    /// `connection_limit.<stat_prefix>.`
    struct Stats {
        counters { limited_connections }
        gauges { active_connections }
    }
}

#[derive(Debug)]
struct Config {
    places: Places,
    /// How long a connection too many is kept before it is closed.
    delay: Option<Duration>,
    enabled: RuntimeFlag,
    stats: Stats,
}

fn compile(
    wire: &[u8],
    cx: &NetworkFactoryContext<'_>,
) -> Result<Arc<dyn NetworkFilterFactory>, ConfigError> {
    let pb::ConnectionLimit { stat_prefix, max_connections, delay, runtime_enabled } = decode(wire)?;
    let scope = cx.root.scope("connection_limit").tag("envoy.connection_limit_prefix", &stat_prefix);
    Ok(Arc::new(Factory(Arc::new(Config {
        places: Places::new(max_connections.map_or(0, |max| max.value)),
        delay: wire::duration("delay", delay.as_ref())?.filter(|delay| !delay.is_zero()),
        enabled: enabled(cx.runtime, runtime_enabled.as_ref()),
        stats: scope.group(),
    }))))
}

/// Places for connections, shared by all workers.
#[derive(Debug)]
struct Places {
    taken: AtomicU64,
    max: u64,
}

impl Places {
    fn new(max: u64) -> Self {
        Self { taken: AtomicU64::new(0), max }
    }

    /// Takes a place. One that is too many takes none of those that are limited, but counts as long as it is there, as in
    /// Envoy: who is made to wait for his end does not make room.
    fn take(&self) -> bool {
        self.taken.fetch_add(1, Ordering::Relaxed) < self.max
    }

    fn give_back(&self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Filter {
    config: Arc<Config>,
    counts: bool,
}

/// Its instances refer to the configuration.
#[derive(Debug)]
struct Factory(Arc<Config>);

impl NetworkFilterFactory for Factory {
    fn wants(&self) -> Wants {
        Wants::default()
    }

    fn create(&self) -> Box<dyn NetworkFilter> {
        Box::new(Filter { config: Arc::clone(&self.0), counts: false })
    }
}

impl NetworkFilter for Filter {
    fn on_new_connection(&mut self, _: &mut NetworkCx<'_>) -> Flow {
        let Config { places, delay, enabled, stats } = &*self.config;
        if !enabled.get() {
            return Flow::Continue;
        }
        self.counts = true;
        stats.active_connections().inc();
        if places.take() {
            return Flow::Continue;
        }
        stats.limited_connections().inc();
        let close = || Flow::close(CloseKind::NoFlush, "over_connection_limit");
        match *delay {
            None => close(),
            Some(delay) => Flow::Wait(Box::pin(async move {
                tokio::time::sleep(delay).await;
                close()
            })),
        }
    }

    fn on_close(&mut self, _: &ConnectionInfo) {
        if self.counts {
            self.config.places.give_back();
            self.config.stats.active_connections().dec();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Places;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn workers_at_the_limit_never_have_one_place_too_many_and_leave_none_behind() {
        const MAX: u64 = 3;
        let places = Places::new(MAX);
        let (open, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        if places.take() {
                            most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            open.fetch_sub(1, Ordering::SeqCst);
                        }
                        places.give_back();
                    }
                });
            }
        });
        assert!(most.into_inner() <= MAX);
        assert_eq!(places.taken.into_inner(), 0);
    }
}
