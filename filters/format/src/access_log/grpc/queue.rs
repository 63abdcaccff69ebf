//! What waits to be sent to an access log service. No clock and no sockets: entries in, batches out.

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use waystation_stats::stats_group;

use super::wire;

/// What a service that takes nothing may leave behind before entries are dropped, beyond a batch: as much as a stream of
/// Envoy's buffers.
const PATIENCE: usize = 1024 * 1024;

stats_group! {
    /// What all access log services count together, under `access_logs.grpc_access_log.`.
    pub(crate) struct GrpcLogStats {
        counters { logs_dropped, logs_written }
    }
}

/// Entries of one log on their way to a service: workers put them in, the driver takes them out in batches.
#[derive(Debug)]
pub struct GrpcQueue {
    state: Mutex<State>,
    stats: GrpcLogStats,
    /// Whether what is written is counted: Envoy counts entries of requests only.
    counted: bool,
    /// `buffer_flush_interval`
    interval: Duration,
    /// `buffer_size_bytes`; with zero no entry waits for another.
    batch: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Entries as fields 1 of `HTTPAccessLogEntries` or `TCPAccessLogEntries`.
    pending: Vec<u8>,
    /// When they are sent at the latest.
    due: Option<Instant>,
    waker: Option<Waker>,
    closed: bool,
}

/// What the driver is to do.
#[derive(Debug, Eq, PartialEq)]
pub enum Next {
    /// There is a batch.
    Send,
    /// There will be one then, unless it fills up before.
    At(Instant),
    /// Wait.
    Idle,
    /// Nothing more will come.
    Closed,
}

/// The logs' end of a queue; the last one closes it.
#[derive(Debug)]
pub(in crate::access_log) struct Sender(pub(super) Arc<GrpcQueue>);

impl GrpcQueue {
    pub(super) fn new(stats: GrpcLogStats, counted: bool, interval: Duration, batch: usize) -> Self {
        Self { state: Mutex::default(), stats, counted, interval, batch }
    }

    /// Whether there is a batch to send; `waker` is told when the answer has changed.
    pub fn poll(&self, now: Instant, waker: &Waker) -> Next {
        let mut state = self.state.lock();
        if self.is_ready(&state, now) {
            return Next::Send;
        }
        if state.closed {
            return Next::Closed;
        }
        if !state.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            state.waker = Some(waker.clone());
        }
        state.due.map_or(Next::Idle, Next::At)
    }

    /// All that waits: fields 1 of a list of entries. Empty when nothing does.
    pub fn take(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        state.due = None;
        std::mem::take(&mut state.pending)
    }

    fn is_ready(&self, state: &State, now: Instant) -> bool {
        let waited = state.closed || state.due.is_some_and(|due| now >= due);
        !state.pending.is_empty() && (waited || state.pending.len() >= self.batch)
    }
}

impl Sender {
    /// Hands an entry over, or drops it when the service is too far behind.
    pub(super) fn push(&self, entry: &[u8], now: Instant) {
        let GrpcQueue { state, stats, counted, interval, batch } = &*self.0;
        let mut state = state.lock();
        if state.pending.len() >= batch + PATIENCE {
            drop(state);
            return stats.logs_dropped().inc();
        }
        let before = state.pending.len();
        wire::any_bytes(&mut state.pending, 1, entry);
        if before == 0 {
            state.due = Some(now + *interval);
        }
        // The first one starts the clock, and the one that fills the batch ends the wait.
        let wake = before == 0 || before < *batch && state.pending.len() >= *batch;
        let waker = if wake { state.waker.take() } else { None };
        drop(state);
        if *counted {
            stats.logs_written().inc();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{GrpcQueue, Next, PATIENCE, Sender};
    use std::sync::Arc;
    use std::task::Waker;
    use std::time::{Duration, Instant};
    use waystation_stats::Store;

    fn queue(batch: usize) -> (Arc<GrpcQueue>, Sender, Store) {
        let store = Store::default();
        let queue = GrpcQueue::new(store.root().group(), true, Duration::from_secs(1), batch);
        let queue = Arc::new(queue);
        (Arc::clone(&queue), Sender(Arc::clone(&queue)), store)
    }

    #[test]
    fn a_batch_is_full_or_has_waited() {
        let (queue, sender, _store) = queue(100);
        let now = Instant::now();
        let poll = |at: u64| queue.poll(now + Duration::from_millis(at), Waker::noop());
        assert_eq!(poll(0), Next::Idle);
        sender.push(&[7; 10], now);
        assert_eq!(poll(0), Next::At(now + Duration::from_secs(1)));
        assert_eq!(poll(1000), Next::Send);
        assert_eq!(queue.take(), [&[0x0a, 10][..], &[7; 10]].concat());
        assert_eq!(poll(2000), Next::Idle);
        sender.push(&[7; 98], now);
        assert_eq!(poll(0), Next::Send, "100 bytes with tag and length");
    }

    #[test]
    fn without_a_batch_size_nothing_waits_and_the_end_sends_the_rest() {
        let (immediate, sender, _store) = queue(0);
        let now = Instant::now();
        sender.push(&[1], now);
        assert_eq!(immediate.poll(now, Waker::noop()), Next::Send);
        immediate.take();
        drop(sender);
        assert_eq!(immediate.poll(now, Waker::noop()), Next::Closed);
        let (patient, sender, _store) = queue(100);
        sender.push(&[1], now);
        drop(sender);
        assert_eq!(patient.poll(now, Waker::noop()), Next::Send);
        patient.take();
        assert_eq!(patient.poll(now, Waker::noop()), Next::Closed);
    }

    #[test]
    fn what_nobody_takes_is_bounded_and_counted() {
        let (queue, sender, _store) = queue(1000);
        let now = Instant::now();
        let entry = [0; 1000];
        for _ in 0..2000 {
            sender.push(&entry, now);
        }
        let (written, dropped) = (queue.stats.logs_written().value(), queue.stats.logs_dropped().value());
        assert_eq!(written + dropped, 2000);
        assert!(dropped > 0);
        let held = queue.take().len();
        assert!((1000 + PATIENCE..2100 + PATIENCE).contains(&held), "{held}");
        sender.push(&entry, now);
        assert_eq!(queue.stats.logs_dropped().value(), dropped, "there is room again");
    }
}
