//! The gradient controller: compares how long requests take with how long they take when few are under way.
//!
//! Time passes only when it is asked: whoever enters or leaves brings the time, and does what has become due. Without
//! requests there is nothing to decide.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use waystation_stats::stats_group;

use super::latencies::Latencies;

/// So many windows in a row at the least limit look like a minimum that was measured wrongly.
const SUSPICIOUS: u32 = 5;

stats_group! {
    /// `http.<stat_prefix>.adaptive_concurrency.gradient_controller.`
    pub(super) struct ControllerStats {
        counters { rq_blocked }
        gauges {
            burst_queue_size,
            concurrency_limit,
            /// In thousandths.
            gradient,
            min_rtt_calculation_active,
            min_rtt_msecs,
            sample_rtt_msecs,
        }
    }
}

/// Where the round-trip time of an upstream without load comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum MinRtt {
    Fixed(Duration),
    /// Measured by so many requests at each interval, which is prolonged by a random part of this share.
    Sampled {
        interval: Duration,
        jitter: f64,
        requests: u64,
    },
}

/// `GradientControllerConfig`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameters {
    pub(super) update_interval: Duration,
    pub(super) min_rtt: MinRtt,
    /// At first, and while the minimal time is measured.
    pub(super) first_limit: u32,
    pub(super) min_limit: u32,
    pub(super) max_limit: u32,
    /// The share by which requests may be slower than the minimum.
    pub(super) buffer: f64,
    pub(super) percentile: f64,
}

#[derive(Debug)]
pub(super) struct Controller {
    parameters: Parameters,
    stats: ControllerStats,
    start: Instant,
    limit: AtomicU32,
    outstanding: AtomicU32,
    /// The minimal time is being measured.
    measuring: AtomicBool,
    /// When something is due and since when samples count: nanoseconds since the start.
    due: AtomicU64,
    epoch: AtomicU64,
    samples: Latencies,
    state: Mutex<State>,
}

/// What changes once in each window.
#[derive(Debug)]
struct State {
    min_rtt: Duration,
    /// The limit that comes back when the minimal time has been measured.
    deferred: u32,
    next_window: Instant,
    next_measurement: Option<Instant>,
    /// Windows in a row that have left the limit at its least.
    at_least: u32,
}

impl Controller {
    pub(super) fn new(parameters: Parameters, stats: ControllerStats, now: Instant) -> Self {
        let first = parameters.first_limit;
        let controller = Self {
            parameters,
            stats,
            start: now,
            limit: AtomicU32::new(first),
            outstanding: AtomicU32::new(0),
            measuring: AtomicBool::new(false),
            due: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            samples: Latencies::default(),
            state: Mutex::new(State {
                min_rtt: Duration::ZERO,
                deferred: 0,
                next_window: now + parameters.update_interval,
                next_measurement: None,
                at_least: 0,
            }),
        };
        {
            let mut state = controller.state.lock();
            controller.stats.concurrency_limit().set(first.into());
            match parameters.min_rtt {
                MinRtt::Fixed(time) => {
                    state.min_rtt = time;
                    controller.stats.min_rtt_msecs().set(millis(time));
                }
                MinRtt::Sampled { .. } => controller.measure(&mut state, now),
            }
            controller.set_due(&state);
        }
        controller
    }

    /// A place for a request, if there is one.
    pub(super) fn enter(this: &Arc<Self>, now: Instant, random: u64) -> Option<Place> {
        this.advance(now, random);
        let limit = this.limit.load(Ordering::Relaxed);
        let below = |count: u32| (count < limit).then_some(count + 1);
        // The count guards nothing but itself.
        if this.outstanding.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below).is_err() {
            this.stats.rq_blocked().inc();
            return None;
        }
        Some(Place(Arc::clone(this)))
    }

    /// Does what has become due.
    fn advance(&self, now: Instant, _random: u64) {
        if self.nanos(now) < self.due.load(Ordering::Relaxed) {
            return;
        }
        // Whoever does it already does all of it.
        let Some(mut state) = self.state.try_lock() else { return };
        if !self.is_measuring() && now >= state.next_window {
            self.end_window(&mut state, now);
            state.next_window = now + self.parameters.update_interval;
        }
        if !self.is_measuring() && state.next_measurement.is_some_and(|at| now >= at) {
            self.measure(&mut state, now);
        }
        self.set_due(&state);
    }

    fn sample(&self, start: Instant, took: Duration, now: Instant, random: u64) {
        // It was under way when there were more.
        if self.nanos(start) < self.epoch.load(Ordering::Relaxed) {
            return;
        }
        let count = self.samples.add(took);
        if let MinRtt::Sampled { requests, .. } = self.parameters.min_rtt
            && self.is_measuring()
            && count >= requests
        {
            let mut state = self.state.lock();
            // Another sample may have ended it meanwhile.
            if self.is_measuring() {
                self.measured(&mut state, now, random);
                self.set_due(&state);
            }
        }
    }

    /// Begins to measure the minimal time, with few requests at a time.
    fn measure(&self, state: &mut State, now: Instant) {
        self.measuring.store(true, Ordering::Relaxed);
        self.stats.min_rtt_calculation_active().set(1);
        state.next_measurement = None;
        state.deferred = self.limit.load(Ordering::Relaxed);
        self.set_limit(state, self.parameters.first_limit, now);
        self.samples.take(0.0);
        self.epoch.store(self.nanos(now), Ordering::Relaxed);
    }

    fn measured(&self, state: &mut State, now: Instant, random: u64) {
        if let Some(time) = self.samples.take(self.parameters.percentile) {
            state.min_rtt = time;
            self.stats.min_rtt_msecs().set(millis(time));
        }
        let deferred = std::mem::take(&mut state.deferred);
        self.set_limit(state, deferred, now);
        self.measuring.store(false, Ordering::Relaxed);
        self.stats.min_rtt_calculation_active().set(0);
        if let MinRtt::Sampled { interval, jitter, .. } = self.parameters.min_rtt {
            let share = (random >> 11) as f64 / (1_u64 << 53) as f64;
            state.next_measurement = Some(now + interval + interval.mul_f64(jitter.max(0.0) * share));
        }
        state.next_window = now + self.parameters.update_interval;
    }

    fn end_window(&self, state: &mut State, now: Instant) {
        if self.samples.is_empty() {
            return;
        }
        let Some(time) = self.samples.take(self.parameters.percentile) else { return };
        self.stats.sample_rtt_msecs().set(millis(time));
        let limit = self.limit.load(Ordering::Relaxed);
        let next = next_limit(&self.parameters, limit, state.min_rtt, time);
        self.stats.gradient().set((next.gradient * 1000.0) as u64);
        self.stats.burst_queue_size().set(next.headroom as u64);
        self.set_limit(state, next.limit, now);
    }

    fn set_limit(&self, state: &mut State, limit: u32, now: Instant) {
        let before = self.limit.swap(limit, Ordering::Relaxed);
        self.stats.concurrency_limit().set(limit.into());
        let least = self.parameters.min_limit;
        if self.is_measuring() || before != least || limit != least {
            state.at_least = 0;
            return;
        }
        state.at_least += 1;
        if state.at_least >= SUSPICIOUS && matches!(self.parameters.min_rtt, MinRtt::Sampled { .. }) {
            state.next_measurement = Some(now);
        }
    }

    fn is_measuring(&self) -> bool {
        self.measuring.load(Ordering::Relaxed)
    }

    fn set_due(&self, state: &State) {
        // What ends a measurement are its samples.
        let due = match self.is_measuring() {
            true => u64::MAX,
            false => {
                self.nanos(state.next_measurement.map_or(state.next_window, |at| at.min(state.next_window)))
            }
        };
        self.due.store(due, Ordering::Relaxed);
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// What a window has come to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Next {
    gradient: f64,
    headroom: f64,
    limit: u32,
}

/// The limit after a window in which requests took `time`: it follows the gradient, within a half and two, and has room for
/// bursts of its square root.
fn next_limit(parameters: &Parameters, limit: u32, min_rtt: Duration, time: Duration) -> Next {
    let allowed = min_rtt.as_secs_f64() * (1.0 + parameters.buffer);
    let gradient = (allowed / time.as_secs_f64().max(1e-9)).clamp(0.5, 2.0);
    let scaled = f64::from(limit) * gradient;
    let headroom = scaled.sqrt();
    // Cut off, and within its bounds, of which the lower goes before the higher.
    let next = (scaled + headroom) as u32;
    Next { gradient, headroom, limit: next.min(parameters.max_limit).max(parameters.min_limit) }
}

/// A request that is under way.
#[derive(Debug)]
pub(super) struct Place(Arc<Controller>);

impl Place {
    /// It was answered: that took so long.
    pub(super) fn served(self, start: Instant, took: Duration, now: Instant, random: u64) {
        self.0.sample(start, took, now, random);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
