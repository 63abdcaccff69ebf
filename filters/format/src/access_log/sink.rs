//! Files and streams that access logs write to.
//!
//! A sink has a bounded buffer that the workers append whole lines to, and a thread that empties it. The lock around
//! the buffer is held for a copy of one line or a swap of two buffers, never for I/O, so a disk that stalls or a pipe
//! that nobody reads costs lines, never requests.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use waystation_schema::ConfigError;
use waystation_stats::{Store, stats_group};

use super::grpc::{GrpcLogDriver, GrpcLogs};

/// `--file-flush-interval-msec`
const FLUSH_INTERVAL: Duration = Duration::from_secs(10);
/// `--file-flush-min-size-kb`
const FLUSH_MIN_BYTES: usize = 64 * 1024;
/// What a sink holds while its writer is busy; lines beyond it are dropped.
const MAX_PENDING_BYTES: usize = 8 * 1024 * 1024;
/// A buffer that has grown larger than this in a burst is not kept.
const KEPT_CAPACITY: usize = 256 * 1024;
/// How long [`AccessLogSinks::flush_all`] waits for a writer that is stuck.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);

stats_group! {
    /// What all sinks count together, under `filesystem.`.
    pub(crate) struct SinkStats {
        counters {
            flushed_by_timer,
            reopen_failed,
            write_buffered,
            write_completed,
            write_dropped,
            write_failed,
        }
        gauges { write_total_buffered }
    }
}

/// Where lines go.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) enum Destination {
    Path(PathBuf),
    Stdout,
    Stderr,
}

/// Files and streams that access logs write to, shared by all logs of the process.
#[derive(Debug)]
pub struct AccessLogSinks {
    open: Mutex<HashMap<Destination, Weak<Sink>>>,
    settings: Settings,
    pub(super) grpc: GrpcLogs,
}

#[derive(Clone, Debug)]
struct Settings {
    stats: SinkStats,
    flush_interval: Duration,
    min_bytes: usize,
}

/// One file or stream. Its writer thread ends, after the last line, when the last log that uses it goes.
#[derive(Debug)]
pub(super) struct Sink {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Tells the writer that there is something to do.
    work: Condvar,
    /// Tells whoever waits that a flush is done.
    done: Condvar,
    settings: Settings,
}

#[derive(Debug, Default)]
struct State {
    pending: Vec<u8>,
    /// When the oldest pending line must be written.
    deadline: Option<Instant>,
    reopen: bool,
    closing: bool,
    /// Flushes asked for and done; a flush is done when all that was pending when it was asked for is written.
    flushes_asked: u64,
    flushes_done: u64,
}

impl AccessLogSinks {
    /// No sinks open yet. They are flushed every 10 s, or when 64 KB have gathered.
    pub fn new(stats: &Store) -> Self {
        Self::with_flush(stats, FLUSH_INTERVAL, FLUSH_MIN_BYTES)
    }

    /// No sinks open yet. They are flushed when a line has waited for `interval`
    /// (`--file-flush-interval-msec`), or when `min_bytes` have gathered (`--file-flush-min-size-kb`).
    pub fn with_flush(stats: &Store, interval: Duration, min_bytes: usize) -> Self {
        let grpc = GrpcLogs::new(stats);
        let stats = stats.root().scope("filesystem").group();
        Self {
            grpc,
            open: Mutex::default(),
            settings: Settings {
                stats,
                flush_interval: interval,
                min_bytes: min_bytes.min(MAX_PENDING_BYTES / 2),
            },
        }
    }

    /// Says who sends the entries of logs that go to a service; without one such logs are refused.
    pub fn set_grpc_driver(&self, driver: Box<dyn GrpcLogDriver>) {
        // Of several the first counts: a process has one.
        let _ = self.grpc.driver.set(driver);
    }

    /// Opens every file anew, after a log rotation (SIGUSR1, `/reopen_logs`). What is pending goes to the new file. A
    /// file that can't be opened is counted and the old one kept.
    pub fn reopen(&self) {
        for sink in self.sinks() {
            sink.shared.state.lock().reopen = true;
            sink.shared.work.notify_one();
        }
    }

    /// Writes out all that is pending and waits for it, though not for long: a stuck writer must not keep the
    /// process from its end.
    pub fn flush_all(&self) {
        let give_up = Instant::now() + FLUSH_PATIENCE;
        let asked: Vec<_> = self
            .sinks()
            .into_iter()
            .map(|sink| {
                let mut state = sink.shared.state.lock();
                state.flushes_asked += 1;
                let number = state.flushes_asked;
                drop(state);
                sink.shared.work.notify_one();
                (sink, number)
            })
            .collect();
        for (sink, number) in asked {
            let mut state = sink.shared.state.lock();
            while state.flushes_done < number {
                if sink.shared.done.wait_until(&mut state, give_up).timed_out() {
                    break;
                }
            }
        }
    }

    /// The sink for `destination`, which all logs share.
    pub(super) fn open(&self, destination: Destination) -> Result<Arc<Sink>, ConfigError> {
        let mut open = self.open.lock();
        if let Some(sink) = open.get(&destination).and_then(Weak::upgrade) {
            return Ok(sink);
        }
        let sink = Arc::new(Sink::open(&destination, self.settings.clone())?);
        open.retain(|_, sink| sink.strong_count() > 0);
        open.insert(destination, Arc::downgrade(&sink));
        Ok(sink)
    }

    fn sinks(&self) -> Vec<Arc<Sink>> {
        self.open.lock().values().filter_map(Weak::upgrade).collect()
    }
}

impl Drop for AccessLogSinks {
    fn drop(&mut self) {
        self.flush_all();
    }
}

impl Destination {
    /// A file; the standard streams by their well-known paths are the streams themselves, which a process may write
    /// to even where it may not open them.
    pub(super) fn of_path(path: &str) -> Self {
        match path {
            "/dev/stdout" => Self::Stdout,
            "/dev/stderr" => Self::Stderr,
            path => Self::Path(path.into()),
        }
    }
}

impl Sink {
    fn open(destination: &Destination, settings: Settings) -> Result<Self, ConfigError> {
        let (path, file) = match destination {
            Destination::Stdout => {
                (None, std::io::stdout().as_fd().try_clone_to_owned().map(|fd| Some(fd.into())))
            }
            Destination::Stderr => {
                (None, std::io::stderr().as_fd().try_clone_to_owned().map(|fd| Some(fd.into())))
            }
            // Opening a FIFO waits for its reader: that is for the writer to do.
            Destination::Path(path) if is_fifo(path) => (Some(path.clone()), Ok(None)),
            Destination::Path(path) => (Some(path.clone()), open_file(path).map(Some)),
        };
        let file = file.map_err(|error| {
            ConfigError::field("path", format!("unable to open file '{}': {error}", destination.name()))
        })?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            settings,
        });
        let writer = Writer { shared: Arc::clone(&shared), path, file };
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || writer.run())
            .map_err(|error| ConfigError::new(format!("unable to start a writer thread: {error}")))?;
        Ok(Self { shared })
    }

    /// Hands a line over, or drops it when the writer is too far behind.
    pub(super) fn write(&self, line: &[u8]) {
        let Settings { stats, flush_interval, min_bytes } = &self.shared.settings;
        let mut state = self.shared.state.lock();
        let before = state.pending.len();
        let after = before + line.len();
        if after > MAX_PENDING_BYTES {
            drop(state);
            return stats.write_dropped().inc();
        }
        state.pending.extend_from_slice(line);
        // The first line starts the clock, and the one that fills the buffer ends the wait.
        let wake = before == 0 || before < *min_bytes && after >= *min_bytes;
        if before == 0 {
            state.deadline = Some(Instant::now() + *flush_interval);
        }
        // Before the writer can subtract them.
        stats.write_total_buffered().add(line.len() as u64);
        drop(state);
        stats.write_buffered().inc();
        if wake {
            self.shared.work.notify_one();
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.state.lock().closing = true;
        self.shared.work.notify_one();
    }
}

impl Destination {
    fn name(&self) -> std::borrow::Cow<'_, str> {
        match self {
            Self::Path(path) => path.to_string_lossy(),
            Self::Stdout => "/dev/stdout".into(),
            Self::Stderr => "/dev/stderr".into(),
        }
    }
}

/// The thread that empties a sink's buffer.
struct Writer {
    shared: Arc<Shared>,
    /// The file to reopen; a stream has none.
    path: Option<PathBuf>,
    file: Option<File>,
}

impl Writer {
    fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let Settings { stats, min_bytes, .. } = &shared.settings;
        let mut buffer = Vec::new();
        let mut state = shared.state.lock();
        loop {
            let due = state.deadline.is_some_and(|deadline| deadline <= Instant::now());
            let full = state.pending.len() >= *min_bytes;
            let flush = state.flushes_done < state.flushes_asked;
            if !(due || full || flush || state.reopen || state.closing) {
                match state.deadline {
                    Some(deadline) => {
                        shared.work.wait_until(&mut state, deadline);
                    }
                    None => shared.work.wait(&mut state),
                }
                continue;
            }
            let (closing, reopen, asked) =
                (state.closing, std::mem::take(&mut state.reopen), state.flushes_asked);
            std::mem::swap(&mut state.pending, &mut buffer);
            state.deadline = None;
            drop(state);

            if reopen {
                self.reopen(stats);
            }
            if !buffer.is_empty() {
                if due && !full {
                    stats.flushed_by_timer().inc();
                }
                self.write(&buffer, stats);
                stats.write_total_buffered().sub(buffer.len() as u64);
                buffer.clear();
                buffer.shrink_to(KEPT_CAPACITY);
            }
            if closing {
                return;
            }
            state = shared.state.lock();
            if state.flushes_done < asked {
                state.flushes_done = asked;
                shared.done.notify_all();
            }
        }
    }

    fn write(&mut self, buffer: &[u8], stats: &SinkStats) {
        if self.file.is_none() {
            self.file = self.path.as_deref().and_then(|path| open_file(path).ok());
        }
        let written = self.file.as_mut().is_some_and(|file| file.write_all(buffer).is_ok());
        if written { stats.write_completed().inc() } else { stats.write_failed().inc() }
    }

    fn reopen(&mut self, stats: &SinkStats) {
        let Some(path) = &self.path else { return };
        match open_file(path) {
            Ok(file) => self.file = Some(file),
            Err(_) => stats.reopen_failed().inc(),
        }
    }
}

fn open_file(path: &Path) -> std::io::Result<File> {
    File::options().append(true).create(true).open(path)
}

fn is_fifo(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo())
}
