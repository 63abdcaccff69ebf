//! Signals, as Envoy takes them: SIGTERM and SIGINT end the process, SIGUSR1 reopens logs, SIGHUP is eaten. SIGPIPE is
//! ignored by Rust's runtime.

use std::io;

use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// A signal that means something.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Signal {
    /// End: its name.
    Terminate(&'static str),
    /// Reopen logs.
    ReopenLogs,
    /// Ignored, with a word in the log.
    HangUp,
}

/// The signals of this process.
#[derive(Debug)]
pub struct Signals {
    term: Stream,
    int: Stream,
    usr1: Stream,
    hup: Stream,
}

impl Signals {
    /// Takes the signals over.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            usr1: signal(SignalKind::user_defined1())?,
            hup: signal(SignalKind::hangup())?,
        })
    }

    /// The next one.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.term.recv() => Signal::Terminate("ENVOY_SIGTERM"),
            _ = self.int.recv() => Signal::Terminate("SIGINT"),
            _ = self.usr1.recv() => Signal::ReopenLogs,
            _ = self.hup.recv() => Signal::HangUp,
        }
    }
}
