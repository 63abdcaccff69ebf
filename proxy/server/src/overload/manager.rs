//! The main thread's part: asks the monitors in their turn, and puts into force what follows from the answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use waystation_stats::{Scope, stats_group};

use super::monitor::Monitor;
use super::trigger::Core;
use super::{Level, Point};
use crate::memory;

stats_group! {
    /// `overload.<resource>.` of a monitor that is polled. Nothing writes `skipped_updates`: an update is done at once.
    pub struct ResourceStats {
        counters { failed_updates, skipped_updates }
        gauges {
            /// Percent.
            pressure,
        }
        histograms {}
    }
}

stats_group! {
    /// `overload.<action>.`
    pub struct ActionStats {
        counters {}
        gauges {
            /// 1 when it is saturated.
            active,
            scale_percent,
        }
        histograms {}
    }
}

stats_group! {
    /// `overload.envoy.overload_actions.shrink_heap.`
    pub struct ShrinkStats {
        counters { shrink_count }
        gauges {}
        histograms {}
    }
}

stats_group! {
    /// `overload.`
    pub struct ManagerStats {
        counters {}
        gauges {}
        histograms {
            /// From one update to the next.
            refresh_interval_delay: Milliseconds,
        }
    }
}

/// A resource that is polled.
#[derive(Debug)]
pub(super) struct Resource {
    pub(super) name: Box<str>,
    pub(super) monitor: Monitor,
    pub(super) stats: ResourceStats,
}

/// What a state of [`Core`] is the state of.
#[derive(Debug)]
pub(super) enum Dependent {
    Action { name: Box<str>, level: Arc<Level>, stats: ActionStats },
    Point(Arc<Point>),
}

/// `envoy.overload_actions.shrink_heap`.
#[derive(Debug)]
pub(super) struct Shrink {
    pub(super) level: Arc<Level>,
    pub(super) interval: Duration,
    /// A heap that is smaller has less to give back.
    pub(super) keep: u64,
    pub(super) stats: ShrinkStats,
    /// Has the workers give back theirs.
    pub(super) tell: watch::Sender<()>,
}

/// Polls and decides; [`Manager::due`] says when next.
#[derive(Debug)]
pub struct Manager {
    pub(super) interval: Duration,
    pub(super) resources: Vec<Resource>,
    pub(super) core: Core,
    pub(super) dependents: Vec<Dependent>,
    pub(super) shrink: Option<Shrink>,
    /// For those who wait for a level to change.
    pub(super) changes: watch::Sender<()>,
    pub(super) stats: ManagerStats,
    start: Instant,
    polled: Instant,
    shrunk: Instant,
}

impl Manager {
    pub(super) fn new(interval: Duration, changes: watch::Sender<()>, root: &Scope, now: Instant) -> Self {
        Self {
            interval,
            resources: Vec::new(),
            core: Core::default(),
            dependents: Vec::new(),
            shrink: None,
            changes,
            stats: root.scope("overload").group(),
            start: now,
            polled: now,
            shrunk: now,
        }
    }

    /// When there is something to do.
    pub fn due(&self) -> Instant {
        let poll = self.polled + self.interval;
        self.shrink.as_ref().map_or(poll, |shrink| poll.min(self.shrunk + shrink.interval))
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        if now >= self.polled + self.interval {
            self.stats.refresh_interval_delay().record(millis(now - self.polled));
            self.polled = now;
            self.poll(now);
        }
        if let Some(shrink) = self.shrink.as_ref().filter(|shrink| now >= self.shrunk + shrink.interval) {
            self.shrunk = now;
            if shrink.level.is_saturated() {
                shrink.stats.shrink_count().inc();
                // The allocator does not tell how much of the heap is free; it cannot be more than the heap.
                if memory::heap() > shrink.keep {
                    memory::give_back();
                    shrink.tell.send_replace(());
                }
            }
        }
    }

    fn poll(&mut self, now: Instant) {
        let Self { resources, core, dependents, .. } = self;
        let mut any = false;
        for (number, resource) in resources.iter_mut().enumerate() {
            let Resource { name, monitor, stats } = resource;
            match monitor.pressure(now - self.start) {
                Ok(pressure) => {
                    stats.pressure().set(percent(pressure));
                    core.update(number, pressure, |dependent, state| {
                        any = true;
                        dependents[dependent].set(state);
                    });
                }
                Err(error) => {
                    stats.failed_updates().inc();
                    tracing::info!(target: "main", "Failed to update resource {name}: {error}");
                }
            }
        }
        if any {
            self.changes.send_replace(());
        }
    }
}

impl Dependent {
    fn set(&self, state: f64) {
        match self {
            Self::Action { name, level, stats } => {
                level.set(state);
                stats.active().set(u64::from(level.is_saturated()));
                stats.scale_percent().set(percent(state));
                let percent = percent(state);
                tracing::debug!(target: "main", "Overload action {name} is at {percent} percent");
            }
            Self::Point(point) => {
                point.level.set(state);
                point.stats.scale_percent().set(percent(state));
            }
        }
    }
}

/// Cut off, not rounded, as in Envoy.
fn percent(share: f64) -> u64 {
    (share * 100.0) as u64
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
