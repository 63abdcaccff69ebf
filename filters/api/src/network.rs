//! Network filters: what sees a connection before its terminal filter (HTTP connection manager, TCP proxy).
//!
//! A connection is shown to each filter in the order of the configuration, first as a new connection, before any TLS
//! handshake and before the terminal filter begins; then the bytes it says, decrypted, go through [`NetworkFilter::on_data`]
//! in that order, and what the terminal filter says through [`NetworkFilter::on_write`] in the reverse order. A phase returns a
//! [`Flow`]. Factories declare what they want to see ([`Wants`]): bytes that no filter wants are not touched.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::BytesMut;
use waystation_schema::ConfigError;
use waystation_stats::Scope;

use crate::connection::ConnectionInfo;
use crate::flags::ResponseFlag;
use crate::http::{LocalFuture, NodeInfo};
use crate::runtime::Runtime;
use crate::singletons::Singletons;

/// What a phase decides.
pub enum Flow {
    /// Go on with the next filter.
    Continue,
    /// Hold these bytes, and all behind them. Further bytes are shown together with those held, from the first filter on, until
    /// the buffer limit, beyond which the peer is made to wait. The [`Resume`] of [`NetworkCx::resume_handle`] goes on behind
    /// this filter without further bytes; a new connection goes on by nothing else.
    Stop,
    /// End the connection.
    Close(Close),
    /// Read nothing until the future is done, then do as it says. For the phase that must ask somebody.
    Wait(LocalFuture<Flow>),
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Continue => f.write_str("Continue"),
            Self::Stop => f.write_str("Stop"),
            Self::Close(close) => f.debug_tuple("Close").field(close).finish(),
            Self::Wait(_) => f.write_str("Wait(..)"),
        }
    }
}

/// The end of a connection by a filter. What access logs are to say of it is set in the [`ConnectionInfo`]: `flags` and
/// `termination_details`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Close {
    /// How.
    pub kind: CloseKind,
    /// Why, for the log.
    pub reason: Cow<'static, str>,
}

/// How a filter ends a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CloseKind {
    /// What was said to the peer goes out first (`FlushWrite`).
    Flush,
    /// At once (`NoFlush`).
    NoFlush,
    /// At once, by a reset (`AbortReset`).
    Reset,
}

impl Flow {
    /// Ends the connection.
    pub fn close(kind: CloseKind, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Close(Close { kind, reason: reason.into() })
    }
}

/// The bytes that a filter wants to see. It is shown each connection in any case.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Wants {
    /// What the peer says: `on_data`.
    pub data: bool,
    /// What the terminal filter says: `on_write`.
    pub write: bool,
}

/// What a phase may look at and do besides the bytes it is given.
pub struct NetworkCx<'a> {
    /// The connection. Filter state, metadata, flags and termination details can be set through it.
    pub connection: &'a ConnectionInfo,
    /// The time of this turn.
    pub now: Instant,
    /// Worker-local randomness.
    pub random: &'a mut fastrand::Rng,
    resume: &'a Resume,
    out: &'a mut BytesMut,
}

impl<'a> NetworkCx<'a> {
    /// Assembled by the driver for each phase: `out` goes to the peer.
    pub fn new(
        connection: &'a ConnectionInfo,
        now: Instant,
        random: &'a mut fastrand::Rng,
        resume: &'a Resume,
        out: &'a mut BytesMut,
    ) -> Self {
        Self { connection, now, random, resume, out }
    }

    /// Says something to the peer, past all filters. A new connection hears it after its handshake, unless it is closed before.
    pub fn write(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Sets a response flag, for the logs of the connection.
    pub fn set_flag(&mut self, flag: ResponseFlag) {
        let mut flags = self.connection.flags.get();
        flags.set(flag);
        self.connection.flags.set(flags);
    }

    /// A handle that ends this connection's [`Flow::Stop`].
    pub fn resume_handle(&self) -> Resume {
        self.resume.clone()
    }
}

impl fmt::Debug for NetworkCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetworkCx").field("connection", &self.connection).finish_non_exhaustive()
    }
}

/// Lets a connection that a filter has stopped go on behind that filter.
#[derive(Clone, Debug, Default)]
pub struct Resume(Rc<RefCell<Gate>>);

#[derive(Debug, Default)]
struct Gate {
    open: bool,
    waiting: Option<Waker>,
}

impl Resume {
    /// Goes on. Without a filter that has stopped it has no effect.
    pub fn resume(&self) {
        let mut gate = self.0.borrow_mut();
        gate.open = true;
        if let Some(waker) = gate.waiting.take() {
            waker.wake();
        }
    }

    /// For the driver: whether to go on since the last [`Resume::reset`]; otherwise its task is woken for it.
    pub fn poll_resumed(&self, cx: &Context<'_>) -> Poll<()> {
        let mut gate = self.0.borrow_mut();
        if std::mem::take(&mut gate.open) {
            return Poll::Ready(());
        }
        gate.waiting = Some(cx.waker().clone());
        Poll::Pending
    }

    /// For the driver: what was said before a filter is asked does not count.
    pub fn reset(&self) {
        self.0.borrow_mut().open = false;
    }
}

/// One filter on one connection.
pub trait NetworkFilter {
    /// A new connection: addresses and what listener filters have found are known, the TLS session is not. After anything
    /// but [`Flow::Close`] the connection goes on to the filters behind it and to its terminal filter.
    fn on_new_connection(&mut self, _cx: &mut NetworkCx<'_>) -> Flow {
        Flow::Continue
    }

    /// All that the peer has said and that neither a filter nor the terminal filter has taken. A filter takes bytes by
    /// removing them. `end`: the peer says nothing more; only shown when the terminal filter lets connections be half
    /// closed, as TCP proxies do.
    fn on_data(&mut self, _cx: &mut NetworkCx<'_>, _data: &mut BytesMut, _end: bool) -> Flow {
        Flow::Continue
    }

    /// What is said to the peer, likewise.
    fn on_write(&mut self, _cx: &mut NetworkCx<'_>, _data: &mut BytesMut, _end: bool) -> Flow {
        Flow::Continue
    }

    /// The connection is over, however it ended; called exactly once.
    fn on_close(&mut self, _connection: &ConnectionInfo) {}
}

/// A compiled filter configuration: makes one instance for each connection.
pub trait NetworkFilterFactory: fmt::Debug + Send + Sync {
    /// The bytes that an instance wants to see.
    fn wants(&self) -> Wants;

    /// An instance for one connection.
    fn create(&self) -> Box<dyn NetworkFilter>;
}

/// Compiles a filter's configuration from wire bytes that passed the schema's walk.
pub type CompileNetworkFilter =
    fn(&[u8], &NetworkFactoryContext<'_>) -> Result<Arc<dyn NetworkFilterFactory>, ConfigError>;

/// What a network filter's extension exports; the binary lists it under its type URL.
pub struct NetworkFilterExtension {
    /// The category-qualified name, e.g. `envoy.filters.network.rbac`.
    pub name: &'static str,
    /// The message of the configuration, without `type.googleapis.com/`.
    pub type_name: &'static str,
    /// Compiles the configuration.
    pub compile: CompileNetworkFilter,
}

impl fmt::Debug for NetworkFilterExtension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetworkFilterExtension").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a network filter's configuration may refer to while it is compiled.
#[derive(Debug)]
pub struct NetworkFactoryContext<'a> {
    /// The root of all statistics.
    pub root: &'a Scope,
    /// Runtime keys.
    pub runtime: &'a Runtime,
    /// Identity of this proxy.
    pub node: &'a NodeInfo,
    /// What is shared between configurations of the process.
    pub singletons: &'a Singletons,
}
