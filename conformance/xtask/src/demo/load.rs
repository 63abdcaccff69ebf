//! Requests without pause, so that a change which loses one is found out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::http::{Connection, Response};

const CLIENTS: usize = 8;

/// Between two requests of a client: some thousand requests a second in all, and some room for the rest.
const PAUSE: Duration = Duration::from_millis(2);

/// Names of the upstreams, as they answer.
pub(super) const UPSTREAMS: [&str; 3] = ["a", "b", "canary"];

/// Versions that the route announces in `x-demo-version`.
pub(super) const VERSIONS: usize = 4;

/// A running load.
#[derive(Debug)]
pub(super) struct Load {
    tally: Arc<Tally>,
    clients: Vec<JoinHandle<()>>,
    failures: Receiver<String>,
}

/// What was counted so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    stop: AtomicBool,
    pub(super) requests: AtomicU64,
    pub(super) failed: AtomicU64,
    from: [AtomicU64; UPSTREAMS.len()],
    version: [AtomicU64; VERSIONS],
}

impl Tally {
    /// Answers of an upstream.
    pub(super) fn from(&self, upstream: &str) -> u64 {
        UPSTREAMS
            .iter()
            .zip(&self.from)
            .filter(|(name, _)| **name == upstream)
            .map(|(_, count)| count.load(Relaxed))
            .sum()
    }

    /// Answers that came through a version of the route, from 1.
    pub(super) fn version(&self, version: usize) -> u64 {
        self.version.get(version - 1).map_or(0, |count| count.load(Relaxed))
    }

    fn count(&self, response: &Response) -> Result<(), String> {
        let body = response.body.trim_end();
        if response.status != 200 {
            return Err(format!("status {}: {body:?}", response.status));
        }
        let name = UPSTREAMS.iter().position(|name| *name == body);
        let name = name.ok_or_else(|| format!("an answer from nobody we know: {body:?}"))?;
        self.from[name].fetch_add(1, Relaxed);
        let version = response.header("x-demo-version").and_then(|version| version.parse::<usize>().ok());
        let version = version.and_then(|version| self.version.get(version.checked_sub(1)?));
        version.ok_or("an answer without x-demo-version")?.fetch_add(1, Relaxed);
        Ok(())
    }
}

impl Load {
    pub(super) fn start(target: SocketAddr) -> Self {
        let tally = Arc::new(Tally::default());
        let (reporter, failures) = sync_channel(10);
        let clients = (0..CLIENTS).map(|_| {
            let (tally, reporter) = (tally.clone(), reporter.clone());
            thread::spawn(move || client(target, &tally, &reporter))
        });
        Self { clients: clients.collect(), tally, failures }
    }

    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Waits until the tally shows something; says how long it took.
    pub(super) fn wait(&self, what: &str, shows: impl Fn(&Tally) -> bool) -> Result<Duration, String> {
        let start = Instant::now();
        while !shows(&self.tally) {
            if start.elapsed() > Duration::from_secs(10) {
                return Err(format!("{what}: nothing of it seen for 10 seconds"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(start.elapsed())
    }

    /// Ends it; the first failures in words.
    pub(super) fn stop(self) -> (Arc<Tally>, Vec<String>) {
        self.tally.stop.store(true, Relaxed);
        for client in self.clients {
            // A client that panicked has told why on the standard error.
            if client.join().is_err() {
                self.tally.failed.fetch_add(1, Relaxed);
            }
        }
        (self.tally, self.failures.try_iter().collect())
    }
}

fn client(target: SocketAddr, tally: &Tally, failures: &SyncSender<String>) {
    let mut connection = None;
    while !tally.stop.load(Relaxed) {
        let open = connection.take().map_or_else(|| Connection::open(target), Ok);
        let result = open.and_then(|mut open| {
            let response = open.get("/")?;
            if response.header("connection") != Some("close") {
                connection = Some(open);
            }
            tally.count(&response)
        });
        tally.requests.fetch_add(1, Relaxed);
        if let Err(reason) = result {
            tally.failed.fetch_add(1, Relaxed);
            // The first ones tell enough.
            let _ = failures.try_send(reason);
        }
        thread::sleep(PAUSE);
    }
}
