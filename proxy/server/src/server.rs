//! The main thread: brings the process up, drives the configuration, ends the process.
//!
//! Start-up order is Envoy's: runtime layers, static clusters, CDS until all clusters are warm, then LDS until all
//! listeners are warm, then the workers accept.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3 as core;
use tokio::sync::mpsc;
use waystation_filter_api::wire;

use crate::bootstrap::Bootstrap;
use crate::cli::options::{Mode, Options};
use crate::context::{ServerState, Shared};
use crate::control::{Job, MainThread};
use crate::manager::configuration::{Change, Configuration};
use crate::manager::listeners::Graceful;
use crate::memory;
use crate::server_stats::ServerStats;
use crate::signals::{Signal, Signals};
use crate::workers::Workers;

/// How often the server's own gauges are renewed and interval histograms merged, when the bootstrap says nothing.
const STATS_FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// How long after start-up its leavings are cleared away: the last frees and the first code of the workers come behind it.
const TIDY_AFTER: Duration = Duration::from_millis(200);

/// How far start-up has come.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Phase {
    /// RTDS layers.
    Runtime,
    /// Static clusters, then CDS.
    Clusters,
    /// LDS and what listeners wait for.
    Listeners,
    /// Serving.
    Live,
}

/// The main thread's state.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    options: Arc<Options>,
    configuration: Configuration,
    workers: Workers,
    phase: Phase,
    /// When what only start-up needed is let go of.
    tidy_at: Option<Instant>,
    stats: Arc<ServerStats>,
    exit: Option<Exit>,
    flush_interval: Duration,
}

/// How the process is ending.
#[derive(Clone, Copy, Debug)]
enum Exit {
    /// Connections drain until this time.
    Draining(Instant),
    /// At once.
    Now,
}

/// Why the process did not come up; printed as Envoy does, exit code 1.
pub type StartError = String;

impl Server {
    /// Compiles the bootstrap's resources; nothing is served yet. With `--mode validate` this is all.
    pub fn new(
        bootstrap: Bootstrap,
        options: Arc<Options>,
        shared: Arc<Shared>,
        node: core::Node,
    ) -> Result<Self, StartError> {
        let stats = Arc::new(ServerStats::new(&shared, &options));
        if let Some(version) = &bootstrap.proto.stats_server_version_override {
            stats.set_version(version.value);
        }
        if bootstrap.proto.stats_flush_interval.is_some() && bootstrap.proto.stats_flush.is_some() {
            return Err("Only one of stats_flush_interval or stats_flush_on_admin should be set!".to_owned());
        }
        let flush_interval =
            wire::duration("stats_flush_interval", bootstrap.proto.stats_flush_interval.as_ref())
                .map_err(|error| error.to_string())?
                .unwrap_or(STATS_FLUSH_INTERVAL);
        let configuration = Configuration::load(
            bootstrap,
            Arc::clone(&options),
            Arc::clone(&shared),
            node,
            Arc::clone(&stats),
        )?;
        Ok(Self {
            shared,
            options,
            configuration,
            workers: Workers::new(),
            phase: Phase::Runtime,
            tidy_at: None,
            stats,
            exit: None,
            flush_interval,
        })
    }

    /// Runs until the process is to end.
    pub async fn run(mut self, main: MainThread, mut jobs: mpsc::Receiver<Job>) -> io::Result<()> {
        drop(main);
        self.workers.start(self.options.concurrency, &self.shared)?;
        let mut signals = Signals::new()?;
        let mut flush = tokio::time::interval(self.flush_interval);
        self.configuration.subscribe_runtime();
        let mut compiled = false;
        loop {
            self.progress();
            self.configuration.count_subscriptions();
            if self.should_exit() {
                self.workers.finish().await;
                // While the configuration still holds the logs: once it goes, their threads end by themselves, and the
                // process does not wait for them.
                self.shared.access_logs.flush_all();
                return Ok(());
            }
            let due = self.next_due();
            tokio::select! {
                change = self.configuration.next() => {
                    compiled |= !matches!(change, Change::Demand(_) | Change::Outliers(_));
                    self.configuration.apply(change);
                }
                Some(job) = jobs.recv() => job(&mut self),
                signal = signals.next() => self.on_signal(signal),
                _ = flush.tick() => {
                    self.shared.stats.flush();
                    self.configuration.refresh_runtime();
                    self.configuration.prune();
                    self.stats.renew(&self.shared, self.configuration.first_expiry());
                    // What was compiled from is as large as what is kept.
                    if std::mem::take(&mut compiled) {
                        memory::give_back();
                    }
                }
                () = until(due) => {}
            }
        }
    }

    /// Moves start-up on, and does what time has made due.
    fn progress(&mut self) {
        let now = Instant::now();
        let before = self.phase;
        let configuration = &mut self.configuration;
        configuration.poll_overload(now);
        if self.phase == Phase::Runtime && !configuration.is_waiting() {
            self.phase = Phase::Clusters;
            configuration.subscribe_clusters();
        }
        configuration.activate_clusters(now);
        if self.phase == Phase::Clusters
            && !configuration.is_waiting()
            && configuration.clusters_initialized()
        {
            self.phase = Phase::Listeners;
            self.shared.set_phase(ServerState::Initializing);
            tracing::info!(target: "upstream", "cm init: all clusters initialized");
            configuration.subscribe_listeners();
        }
        if self.phase == Phase::Listeners && !configuration.is_waiting() && configuration.listeners_settled()
        {
            tracing::info!(target: "main", "all dependencies initialized. starting workers");
            self.phase = Phase::Live;
            configuration.listeners().stats().workers_started().set(1);
            self.shared.set_phase(ServerState::Live);
            self.stats.initialized(self.shared.start.elapsed());
            if self.options.mode == Mode::InitOnly {
                self.exit = Some(Exit::Now);
                return;
            }
        }
        if self.phase == Phase::Live {
            configuration.activate_listeners(now);
        }
        self.workers.send(configuration.take_orders());
        if self.phase != before && self.phase == Phase::Live {
            self.tidy_at = Some(now + TIDY_AFTER);
        }
        if self.tidy_at.is_some_and(|at| at <= now) {
            self.tidy_at = None;
            memory::give_back();
            memory::let_go_of_program();
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let exit = match self.exit {
            // A drain ends early when the last connection goes, which nobody tells us.
            Some(Exit::Draining(until)) => Some(until.min(Instant::now() + Duration::from_millis(50))),
            _ => None,
        };
        [exit, self.tidy_at, self.configuration.next_due()].into_iter().flatten().min()
    }

    fn should_exit(&self) -> bool {
        match self.exit {
            None => false,
            Some(Exit::Now) => true,
            Some(Exit::Draining(until)) => Instant::now() >= until || self.workers.connections() == 0,
        }
    }

    fn on_signal(&mut self, signal: Signal) {
        match signal {
            Signal::Terminate(name) => {
                tracing::warn!(target: "main", "caught {name}");
                match self.exit {
                    None => {
                        let drain = self.options.shutdown_drain_time;
                        self.exit = Some(Exit::Draining(Instant::now() + drain));
                        self.configuration.stop_listeners(false, true);
                    }
                    // A second signal means it.
                    Some(_) => self.exit = Some(Exit::Now),
                }
            }
            Signal::ReopenLogs => {
                tracing::info!(target: "main", "caught SIGUSR1. Reopening access logs.");
                self.shared.access_logs.reopen();
                if let Err(error) = crate::log::reopen() {
                    tracing::error!(target: "main", "cannot reopen the log: {error}");
                }
            }
            Signal::HangUp => {
                tracing::warn!(target: "main", "caught and eating SIGHUP. See documentation for how to hot restart.")
            }
        }
    }
}

/// What the admin interface and the command line ask.
impl Server {
    /// Unknown fields that the bootstrap was allowed to have.
    pub fn count_unknown_static(&self, count: u64) {
        self.stats.unknown_static_fields(count);
    }

    /// The configuration.
    pub fn configuration(&mut self) -> &mut Configuration {
        &mut self.configuration
    }

    /// `/healthcheck/fail` and `/healthcheck/ok`.
    pub fn fail_health_check(&mut self, fail: bool) {
        self.shared.fail_health_check(fail);
        self.stats.live(!fail);
    }

    /// `/quitquitquit`.
    pub fn quit(&mut self) {
        self.exit = Some(Exit::Now);
    }

    /// `/drain_listeners`.
    pub fn drain_listeners(&mut self, inbound_only: bool, graceful: Option<Graceful>) {
        match graceful {
            None => self.configuration.stop_listeners(inbound_only, false),
            Some(how) => self.configuration.drain_connections(inbound_only, how),
        }
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
