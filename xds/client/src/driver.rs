use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    Action, Core, Event, MuxId, Options, Rejection, ResourceType, StreamId, SubId, SubscribeError,
    SubscriptionSpec, UpdateToken,
};

pub(crate) mod file;
pub(crate) mod grpc;
pub(crate) mod raw_codec;
mod rest;

/// A byte stream.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection made by [`Connect`].
pub type BoxedIo = Box<dyn Io>;

/// Makes connections to xDS servers: endpoint selection, Unix sockets and TLS are the proxy's.
pub trait Connect: Send + Sync {
    /// Connects to `target`, which is a cluster's name or another name that the caller put into the
    /// [`crate::GrpcService`]. `http2` says which protocol will be spoken, for ALPN.
    fn connect(&self, target: &str, http2: bool)
    -> Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>>;
}

/// Translates between text and the encoded protobuf form.
pub trait ConfigCodec: Send + Sync {
    /// An encoded `DiscoveryResponse` from a file (JSON, YAML, binary or text proto, by its extension).
    fn decode_file(&self, path: &Path, content: &[u8]) -> Result<Bytes, String>;
    /// JSON from an encoded `DiscoveryRequest`.
    fn request_to_json(&self, request: &[u8]) -> Result<String, String>;
    /// An encoded `DiscoveryResponse` from JSON.
    fn response_from_json(&self, json: &[u8]) -> Result<Bytes, String>;
}

/// What the client needs from its surroundings.
#[derive(Clone)]
pub struct Transport {
    /// Makes connections.
    pub connect: Arc<dyn Connect>,
    /// Translates files and REST bodies.
    pub codec: Arc<dyn ConfigCodec>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").finish_non_exhaustive()
    }
}

/// Reports of all tasks that may wait for the client.
const MAX_REPORTS: usize = 64;

/// Requests in the channel to a stream's task; the core never has more of them under way.
const MAX_REQUESTS: usize = 16;

/// What the task of a source has to say.
#[derive(Debug)]
enum Report {
    Opened(StreamId),
    Closed(StreamId, i32, String),
    Message(StreamId, Bytes),
    Sent(StreamId),
    Fetched(StreamId, Result<Bytes, String>),
}

/// The task of one source; dropping it ends the task and with it the connection.
#[derive(Debug)]
struct Running {
    stream: StreamId,
    /// Requests of a stream; "read again" (an empty message) of a file.
    requests: mpsc::Sender<Bytes>,
    may_read: watch::Sender<bool>,
    _task: AbortOnDropHandle<()>,
}

/// A [`Core`] on a tokio runtime.
///
/// It lives on the thread that compiles the configuration. Its methods act at once and never block; responses,
/// timers and connections move on while [`Client::next`] is awaited. `next` can be dropped at any point without
/// losing anything.
#[derive(Debug)]
pub struct Client {
    core: Core,
    transport: Transport,
    running: HashMap<MuxId, Running>,
    reports: mpsc::Receiver<Report>,
    reporter: mpsc::Sender<Report>,
}

impl Client {
    /// A client without subscriptions. Must be used inside a tokio runtime.
    pub fn new(options: Options, transport: Transport) -> Self {
        let (reporter, reports) = mpsc::channel(MAX_REPORTS);
        Self {
            core: Core::new(options, Instant::now()),
            transport,
            running: HashMap::new(),
            reports,
            reporter,
        }
    }

    /// The state machine, for stats and `config_dump`.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// See [`Core::drain_changed_stats`].
    pub fn drain_changed_stats(&mut self, each: impl FnMut(SubId, &crate::SubscriptionStats)) {
        self.core.drain_changed_stats(each);
    }

    /// See [`Core::subscribe`].
    pub fn subscribe(&mut self, spec: SubscriptionSpec) -> Result<SubId, SubscribeError> {
        let result = self.core.subscribe(spec, Instant::now());
        self.perform();
        result
    }

    /// See [`Core::unsubscribe`].
    pub fn unsubscribe(&mut self, id: SubId) {
        self.core.unsubscribe(id, Instant::now());
        self.perform();
    }

    /// See [`Core::set_names`].
    pub fn set_names(&mut self, id: SubId, names: Vec<Arc<str>>) {
        self.core.set_names(id, names, Instant::now());
        self.perform();
    }

    /// See [`Core::add_names`].
    pub fn add_names(&mut self, id: SubId, names: Vec<Arc<str>>) {
        self.core.add_names(id, names, Instant::now());
        self.perform();
    }

    /// See [`Core::remove_names`].
    pub fn remove_names(&mut self, id: SubId, names: Vec<Arc<str>>) {
        self.core.remove_names(id, names, Instant::now());
        self.perform();
    }

    /// See [`Core::applied`].
    pub fn applied(&mut self, token: UpdateToken, rejected: Vec<Rejection>) {
        self.core.applied(token, rejected, Instant::now());
        self.perform();
    }

    /// See [`Core::pause`].
    pub fn pause(&mut self, kind: &ResourceType) {
        self.core.pause(kind);
    }

    /// See [`Core::resume`].
    pub fn resume(&mut self, kind: &ResourceType) {
        self.core.resume(kind, Instant::now());
        self.perform();
    }

    /// The next event, if there is one already.
    pub fn try_next(&mut self) -> Option<Event> {
        let event = self.core.poll_event();
        self.perform();
        event
    }

    /// Waits for the next event.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.try_next() {
                return event;
            }
            let deadline = self.core.next_deadline();
            let timer = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now).into());
            tokio::select! {
                report = self.reports.recv() => self.handle(report.expect("we hold a sender ourselves")),
                () = timer, if deadline.is_some() => self.core.tick(Instant::now()),
            }
        }
    }

    fn handle(&mut self, report: Report) {
        let now = Instant::now();
        match report {
            Report::Opened(stream) => self.core.stream_opened(stream, now),
            Report::Closed(stream, code, message) => {
                if self.running.get(&stream.mux).is_some_and(|running| running.stream == stream) {
                    self.running.remove(&stream.mux);
                }
                self.core.stream_closed(stream, code, &message, now);
            }
            Report::Message(stream, message) => self.core.message(stream, message, now),
            Report::Sent(stream) => self.core.sent(stream, now),
            Report::Fetched(stream, content) => self.core.fetched(stream, content, now),
        }
    }

    /// Does what the core wants done, and tells the streams whether to read on.
    fn perform(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Open { stream, service, method } => {
                    let connect = self.transport.connect.clone();
                    self.run(stream, |reports, requests, may_read| {
                        grpc::run(stream, service, method, connect, reports, requests, may_read)
                    });
                }
                Action::Send { stream, message } => self.send(stream, message),
                Action::Close { stream } => {
                    if self.running.get(&stream.mux).is_some_and(|running| running.stream == stream) {
                        self.running.remove(&stream.mux);
                    }
                }
                Action::Watch { stream, path } => {
                    if self.running.get(&stream.mux).is_some_and(|running| running.stream == stream) {
                        self.send(stream, Bytes::new());
                    } else {
                        let codec = self.transport.codec.clone();
                        self.run(stream, |reports, requests, _| {
                            file::run(stream, path, codec, reports, requests)
                        });
                    }
                }
                Action::Poll { stream, rest, endpoint, request } => {
                    let transport = self.transport.clone();
                    self.run(stream, |reports, _, _| {
                        rest::run(stream, rest, endpoint, request, transport, reports)
                    });
                }
            }
        }
        for running in self.running.values() {
            let may_read = self.core.wants_messages(running.stream);
            running.may_read.send_if_modified(|before| std::mem::replace(before, may_read) != may_read);
        }
    }

    fn run<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        stream: StreamId,
        task: impl FnOnce(mpsc::Sender<Report>, mpsc::Receiver<Bytes>, watch::Receiver<bool>) -> F,
    ) {
        let (requests, receiver) = mpsc::channel(MAX_REQUESTS);
        let (may_read, reading) = watch::channel(true);
        let task = tokio::spawn(task(self.reporter.clone(), receiver, reading));
        let running = Running { stream, requests, may_read, _task: AbortOnDropHandle::new(task) };
        self.running.insert(stream.mux, running);
    }

    fn send(&mut self, stream: StreamId, message: Bytes) {
        let running = self.running.get(&stream.mux).filter(|running| running.stream == stream);
        // A closed channel means that the stream has ended, and its report is under way. A full one can only be
        // that of a file, which is about to be read anyway.
        if let Some(running) = running
            && running.requests.try_send(message).is_err()
        {
            tracing::trace!(?stream, "request dropped");
        }
    }
}
