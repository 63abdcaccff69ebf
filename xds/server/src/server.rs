use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;
use waystation_xds::ResourceType;

use crate::core::{Core, Output, Peer, RequestError, StreamId};
use crate::folder::{Files, Folder};
use crate::status::{Status, TypeStatus};
use crate::tls::{TlsError, TlsFiles};
use crate::watch::{self, Changes};
use crate::{Snapshot, admin, serve};

/// Responses of one stream that may wait for its socket. The core has at most one per type under way; a client
/// that asks faster than it reads loses its stream.
const MAX_RESPONSES: usize = 128;

/// A running management server.
///
/// It watches its folder for as long as it or a clone of it lives; its listeners are served for as long as the
/// futures of [`Self::serve`] and [`Self::serve_admin`] are polled.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
    _tasks: Arc<[AbortOnDropHandle<()>; 2]>,
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The folder cannot be read or watched.
    #[error("{}: {reason}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The certificate, key or CA is not usable.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What a server needs to start.
pub struct Builder {
    dir: PathBuf,
    tls: Option<TlsFiles>,
    console: Console,
}

type Console = Arc<dyn Fn(&str) + Send + Sync>;

/// What all connections share.
pub(crate) struct Shared {
    root: PathBuf,
    folder: Mutex<Folder>,
    hub: Mutex<Hub>,
    /// A stream waits for its time.
    deadline_set: Notify,
    pub(crate) tls: Option<TlsAcceptor>,
    console: Console,
}

#[derive(Default)]
struct Hub {
    core: Core,
    senders: HashMap<StreamId, mpsc::Sender<Bytes>>,
}

impl Server {
    /// A server of the folder `dir`.
    pub fn builder(dir: impl Into<PathBuf>) -> Builder {
        Builder { dir: dir.into(), tls: None, console: Arc::new(|line| eprintln!("{line}")) }
    }

    /// Serves xDS on a listener: gRPC over HTTP/2, REST over HTTP/1.1 and HTTP/2, with TLS if there is a
    /// certificate. Dropping the future closes the connections.
    pub async fn serve(&self, listener: TcpListener) {
        let shared = self.shared.clone();
        serve::accept(listener, move |socket, peer| serve::connection(shared.clone(), socket, peer)).await;
    }

    /// Serves the admin page (`/`) and the status (`/status`), in plain HTTP.
    pub async fn serve_admin(&self, listener: TcpListener) {
        let server = self.clone();
        serve::accept(listener, move |socket, _| admin::connection(server.clone(), socket)).await;
    }

    /// What the admin endpoint shows.
    pub fn status(&self) -> Status {
        let (files, warnings) = {
            let folder = self.shared.folder.lock();
            (folder.status(), folder.warnings().to_vec())
        };
        let hub = self.shared.hub.lock();
        let snapshot = hub.core.snapshot();
        let status = |(kind, resources): (&ResourceType, &BTreeMap<_, _>)| {
            let status = TypeStatus { version: snapshot.version(kind), resources: resources.len() };
            (kind.url().to_owned(), status)
        };
        Status {
            types: snapshot.types().map(status).collect(),
            files,
            warnings,
            streams: hub.core.streams().collect(),
        }
    }

    /// What is served now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("dir", &self.shared.root).finish_non_exhaustive()
    }
}

impl Builder {
    /// Serves xDS over TLS.
    #[must_use]
    pub fn tls(mut self, files: TlsFiles) -> Self {
        self.tls = Some(files);
        self
    }

    /// Where messages for a person go, line by line; without it, to the standard error.
    #[must_use]
    pub fn console(mut self, console: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.console = Arc::new(console);
        self
    }

    /// Reads the folder and watches it from now on. Must be called inside a tokio runtime. Files that are not good
    /// are told of, and do not keep the server from starting.
    pub fn start(self) -> Result<Server, StartError> {
        let tls = self.tls.map(|files| files.load()).transpose()?;
        let failed = |reason: &dyn fmt::Display| StartError::Folder {
            path: self.dir.clone(),
            reason: reason.to_string(),
        };
        // Watch first, read second: what happens in between is seen.
        let changes = Changes::watch(&self.dir).map_err(|error| failed(&error))?;
        let files = watch::read(&self.dir).map_err(|error| failed(&error))?;
        let shared = Arc::new(Shared {
            root: self.dir,
            folder: Mutex::default(),
            hub: Mutex::default(),
            deadline_set: Notify::new(),
            tls,
            console: self.console,
        });
        shared.update(&files);
        let tasks = [
            AbortOnDropHandle::new(tokio::spawn(follow(shared.clone(), changes))),
            AbortOnDropHandle::new(tokio::spawn(keep_time(shared.clone()))),
        ];
        Ok(Server { shared, _tasks: Arc::new(tasks) })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("dir", &self.dir).field("tls", &self.tls).finish_non_exhaustive()
    }
}

/// Reads the folder whenever it changes.
async fn follow(shared: Arc<Shared>, mut changes: Changes) {
    while changes.next().await {
        let reader = shared.clone();
        let reading = tokio::task::spawn_blocking(move || match watch::read(&reader.root) {
            Ok(files) => reader.update(&files),
            Err(error) => {
                reader.say(&format!("{}: {error}; everything stays as it is", reader.root.display()))
            }
        });
        if reading.await.is_err() {
            shared.say("reading the folder failed; everything stays as it is");
        }
    }
}

/// Sends what has waited long enough.
async fn keep_time(shared: Arc<Shared>) {
    loop {
        let deadline = shared.hub.lock().core.next_deadline();
        let set = shared.deadline_set.notified();
        match deadline {
            Some(deadline) => tokio::select! {
                () = tokio::time::sleep_until(deadline.into()) => {
                    let mut hub = shared.hub.lock();
                    let output = hub.core.tick(Instant::now());
                    shared.perform(&mut hub, output);
                }
                () = set => {}
            },
            None => set.await,
        }
    }
}

impl Shared {
    pub(crate) fn say(&self, line: &str) {
        (self.console)(line);
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.hub.lock().core.snapshot().clone()
    }

    /// A client has opened a stream; its responses arrive at the receiver, which ends when the stream must.
    pub(crate) fn open(&self, peer: Peer) -> (StreamId, mpsc::Receiver<Bytes>) {
        let (sender, receiver) = mpsc::channel(MAX_RESPONSES);
        let mut hub = self.hub.lock();
        let id = hub.core.open(peer);
        hub.senders.insert(id, sender);
        (id, receiver)
    }

    pub(crate) fn request(&self, id: StreamId, message: Bytes) -> Result<(), RequestError> {
        let mut hub = self.hub.lock();
        let output = hub.core.request(id, message, Instant::now())?;
        self.perform(&mut hub, output);
        Ok(())
    }

    pub(crate) fn close(&self, id: StreamId) {
        let closed = {
            let mut hub = self.hub.lock();
            hub.senders.remove(&id);
            hub.core.close(id)
        };
        if let Some(title) = closed {
            self.say(&format!("{title} disconnected"));
        }
    }

    fn update(&self, files: &Files) {
        // The lock stays until the snapshot is out: two updates must not overtake each other.
        let mut folder = self.folder.lock();
        let change = folder.update(files, |file| watch::show(&self.root, file));
        change.notices.iter().for_each(|line| self.say(line));
        if let Some(snapshot) = change.snapshot {
            let mut hub = self.hub.lock();
            let output = hub.core.publish(snapshot, Instant::now());
            self.perform(&mut hub, output);
        }
    }

    fn perform(&self, hub: &mut Hub, output: Output) {
        for (id, message) in output.messages {
            let sent = hub.senders.get(&id).map(|sender| sender.try_send(message));
            if let Some(Err(mpsc::error::TrySendError::Full(_))) = sent {
                // Its receiver ends, and with it the stream.
                hub.senders.remove(&id);
            }
        }
        output.notices.iter().for_each(|line| self.say(line));
        if hub.core.next_deadline().is_some() {
            self.deadline_set.notify_one();
        }
    }
}
