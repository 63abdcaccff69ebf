//! Network filters before the terminal one: the chain's configuration, and their driver, which is a transport itself. The
//! terminal filter reads and writes it like any other, so a chain without such filters has none of this in its way.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Buf as _, BytesMut};
use envoy_types::pb::google::protobuf::Any;
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};
use tokio_util::io::poll_read_buf;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::http::LocalFuture;
use waystation_filter_api::network::{
    Close, CloseKind, Flow, NetworkCx, NetworkFactoryContext, NetworkFilter, NetworkFilterExtension,
    NetworkFilterFactory, Resume, Wants,
};
use waystation_filter_api::wire::type_name;
use waystation_ratelimit::{connection_limit, network};
use waystation_schema::{At as _, ConfigError};

use crate::context::CompileContext;
use crate::transport::{Socket, Transport};
use crate::worker::Worker;

/// Every network filter that is not terminal.
pub const EXTENSIONS: &[&NetworkFilterExtension] =
    &[&connection_limit::EXTENSION, &network::EXTENSION, &waystation_rbac::network::EXTENSION];

/// Bytes read at a time at least.
const READ: usize = 16 * 1024;

/// The filters of a filter chain before its terminal one.
#[derive(Debug)]
pub struct Before {
    factories: Box<[Arc<dyn NetworkFilterFactory>]>,
    /// What any of them wants.
    wants: Wants,
    /// Bytes held for filters that have stopped.
    buffer_limit: usize,
    /// Whether filters see that the peer has closed its direction.
    half_close: bool,
}

impl Before {
    /// No filters yet, before a terminal filter that lets connections be half closed or not.
    pub(crate) fn new(
        factories: Vec<Arc<dyn NetworkFilterFactory>>,
        buffer_limit: usize,
        half_close: bool,
    ) -> Self {
        let wants = factories.iter().map(|factory| factory.wants()).fold(Wants::default(), |all, one| {
            Wants { data: all.data | one.data, write: all.write | one.write }
        });
        Self { factories: factories.into(), wants, buffer_limit, half_close }
    }

    /// Instances for a connection; nothing when there are no filters.
    pub(crate) fn start(&self, worker: &Rc<Worker>) -> Option<Box<Filters>> {
        if self.factories.is_empty() {
            return None;
        }
        Some(Box::new(Filters {
            worker: Rc::clone(worker),
            filters: self.factories.iter().map(|factory| factory.create()).collect(),
            wants: self.wants,
            buffer_limit: self.buffer_limit,
            half_close: self.half_close,
            resume: Resume::default(),
            out: BytesMut::new(),
        }))
    }
}

/// Compiles a filter that is not terminal; nothing when its type is not known.
pub(crate) fn compile(
    any: &Any,
    cx: &CompileContext<'_>,
) -> Option<Result<Arc<dyn NetworkFilterFactory>, ConfigError>> {
    let extension = EXTENSIONS.iter().find(|extension| extension.type_name == type_name(any))?;
    let shared = cx.shared;
    let root = shared.stats.root();
    let context = NetworkFactoryContext {
        root: &root,
        runtime: &shared.runtime,
        node: &shared.node,
        singletons: &shared.singletons,
    };
    Some((extension.compile)(&any.value, &context).at(|| "typed_config"))
}

/// The filters of one connection.
pub(crate) struct Filters {
    worker: Rc<Worker>,
    filters: Box<[Box<dyn NetworkFilter>]>,
    wants: Wants,
    buffer_limit: usize,
    half_close: bool,
    resume: Resume,
    /// What goes to the peer past all filters.
    out: BytesMut,
}

impl fmt::Debug for Filters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filters").field("wants", &self.wants).finish_non_exhaustive()
    }
}

/// What a filter is asked.
#[derive(Clone, Copy)]
enum Phase {
    NewConnection,
    Data,
    Write,
}

impl Filters {
    fn ask(
        &mut self,
        index: usize,
        phase: Phase,
        connection: &ConnectionInfo,
        data: &mut BytesMut,
        end: bool,
    ) -> Flow {
        let Self { worker, filters, resume, out, .. } = self;
        resume.reset();
        worker.with_random(|random| {
            let mut cx = NetworkCx::new(connection, Instant::now(), random, resume, out);
            match phase {
                Phase::NewConnection => filters[index].on_new_connection(&mut cx),
                Phase::Data => filters[index].on_data(&mut cx, data, end),
                Phase::Write => filters[index].on_write(&mut cx, data, end),
            }
        })
    }

    /// Shows them a new connection. `Err`: it must be closed; of a peer that has gone meanwhile nobody has decided.
    pub(crate) async fn new_connection(
        &mut self,
        connection: &ConnectionInfo,
        socket: &Socket,
    ) -> Result<(), Option<Close>> {
        for index in 0..self.filters.len() {
            let mut flow = self.ask(index, Phase::NewConnection, connection, &mut BytesMut::new(), false);
            loop {
                flow = match flow {
                    Flow::Continue => break,
                    Flow::Close(close) => return Err(Some(close)),
                    Flow::Wait(wait) => tokio::select! {
                        flow = wait => flow,
                        () = socket.gone() => return Err(None),
                    },
                    Flow::Stop => tokio::select! {
                        () = std::future::poll_fn(|cx| self.resume.poll_resumed(cx)) => Flow::Continue,
                        () = socket.gone() => return Err(None),
                    },
                };
            }
        }
        Ok(())
    }

    /// The connection is over.
    pub(crate) fn close(&mut self, connection: &ConnectionInfo) {
        for filter in &mut self.filters {
            filter.on_close(connection);
        }
    }
}

/// A transport whose bytes go through filters.
#[derive(Debug)]
pub struct Filtered {
    io: Transport,
    filters: Box<Filters>,
    connection: Rc<ConnectionInfo>,
    read: Way,
    write: Way,
    /// What may be written to `io`.
    out: BytesMut,
    /// The peer says nothing more.
    end: bool,
    /// The terminal filter says nothing more, and the filters have been told.
    finished: bool,
    closing: Option<Close>,
}

/// One direction.
#[derive(Debug, Default)]
struct Way {
    /// What filters have not let through.
    held: BytesMut,
    /// What they have.
    passed: BytesMut,
    /// The filter that holds it, if one does.
    at: At,
}

#[derive(Default)]
enum At {
    #[default]
    None,
    Stopped(usize),
    Waiting(usize, LocalFuture<Flow>),
}

impl fmt::Debug for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Stopped(index) => f.debug_tuple("Stopped").field(index).finish(),
            Self::Waiting(index, _) => f.debug_tuple("Waiting").field(index).finish(),
        }
    }
}

impl Filtered {
    /// `io` with filters that have let the connection through.
    pub(crate) fn new(io: Transport, mut filters: Box<Filters>, connection: Rc<ConnectionInfo>) -> Self {
        let out = std::mem::take(&mut filters.out);
        let (read, write) = (Way::default(), Way::default());
        Self { io, filters, connection, read, write, out, end: false, finished: false, closing: None }
    }

    /// The transport below.
    pub(crate) fn inner(&self) -> &Transport {
        &self.io
    }

    /// How many bytes the peer has said that have not come through the filters.
    pub(crate) fn held_back(&self) -> usize {
        self.read.held.len()
    }

    /// Whether written bytes go through no filter.
    pub(crate) fn writes_directly(&self) -> bool {
        !self.filters.wants.write
    }

    /// Reads what the filters have let through.
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.filters.wants.data {
            let _ = self.poll_out(cx)?;
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        loop {
            // What a filter says needs nobody else to move it.
            let _ = self.poll_out(cx)?;
            if !self.read.passed.is_empty() {
                let count = self.read.passed.len().min(buffer.remaining());
                buffer.put_slice(&self.read.passed[..count]);
                self.read.passed.advance(count);
                if self.read.passed.is_empty() {
                    // An idle connection holds no buffers.
                    self.read.passed = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_closing(cx))?;
            if self.end && matches!(self.read.at, At::None) {
                return Poll::Ready(Ok(()));
            }
            if ready!(self.poll_held(cx, Phase::Data)) {
                continue;
            }
            let was = self.read.held.len();
            if self.read.held.capacity() - was == 0 {
                self.read.held.reserve(READ);
            }
            let count = match poll_read_buf(Pin::new(&mut self.io), cx, &mut self.read.held) {
                Poll::Ready(count) => count?,
                Poll::Pending => {
                    if was == 0 {
                        self.read.held = BytesMut::new();
                    }
                    return Poll::Pending;
                }
            };
            if count == 0 {
                self.end = true;
                if !self.filters.half_close {
                    self.read.at = At::None;
                    return Poll::Ready(Ok(()));
                }
            }
            self.pass(Phase::Data, 0);
        }
    }

    /// Writes through the filters. Bytes are taken once those before them have gone to the transport.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_closing(cx))?;
        ready!(self.poll_out(cx))?;
        if self.writes_directly() {
            return Pin::new(&mut self.io).poll_write(cx, data);
        }
        while ready!(self.poll_held(cx, Phase::Write)) {
            ready!(self.poll_closing(cx))?;
            ready!(self.poll_out(cx))?;
        }
        let count = data.len().min(READ);
        self.write.held.extend_from_slice(&data[..count]);
        self.pass(Phase::Write, 0);
        // What does not go now goes with the next write or flush.
        if let Poll::Ready(Err(error)) = self.poll_out(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(count))
    }

    /// As [`Filtered::poll_write`], with as few system calls as the transport allows when no filter looks.
    pub(crate) fn poll_write_vectored(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.writes_directly() {
            ready!(self.poll_closing(cx))?;
            ready!(self.poll_out(cx))?;
            return Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        }
        let first = slices.iter().find(|slice| !slice.is_empty());
        self.poll_write(cx, first.map_or(&[], |slice| &**slice))
    }

    /// Sends what has been let through; what filters hold stays with them.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let At::Waiting(..) = self.write.at {
            ready!(self.poll_held(cx, Phase::Write));
        }
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// Tells the filters that nothing more is said, and shuts the transport down when they let it.
    pub(crate) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.writes_directly() {
            if !std::mem::replace(&mut self.finished, true) {
                self.pass(Phase::Write, 0);
            }
            while !matches!(self.write.at, At::None) {
                ready!(self.poll_held(cx, Phase::Write));
            }
        }
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    /// Goes on behind the filter that holds a direction when it is time for that. `false`: nothing is held back that more
    /// bytes could not set free.
    fn poll_held(&mut self, cx: &mut Context<'_>, phase: Phase) -> Poll<bool> {
        let way = self.way(phase);
        match &mut way.at {
            At::None => Poll::Ready(false),
            At::Waiting(index, wait) => {
                let index = *index;
                let flow = ready!(wait.as_mut().poll(cx));
                way.at = At::None;
                if self.obey(phase, index, flow) {
                    self.pass(phase, index + 1);
                }
                Poll::Ready(true)
            }
            At::Stopped(index) => {
                let next = *index + 1;
                if self.filters.resume.poll_resumed(cx).is_ready() {
                    self.pass(phase, next);
                    return Poll::Ready(true);
                }
                let full = self.way(phase).held.len() >= self.filters.buffer_limit;
                if full || self.is_over(phase) { Poll::Pending } else { Poll::Ready(false) }
            }
        }
    }

    /// Shows what is held to the filters from the `from`th of this direction on.
    fn pass(&mut self, phase: Phase, from: usize) {
        let end = self.is_over(phase);
        let mut held = std::mem::take(&mut self.way(phase).held);
        self.way(phase).at = At::None;
        let count = self.filters.filters.len();
        for place in from..count {
            let index = if let Phase::Write = phase { count - 1 - place } else { place };
            let flow = self.filters.ask(index, phase, &self.connection, &mut held, end);
            if !self.obey(phase, place, flow) {
                self.out.extend_from_slice(&self.filters.out.split());
                self.way(phase).held = held;
                return;
            }
        }
        self.out.extend_from_slice(&self.filters.out.split());
        match phase {
            Phase::Write => self.out.extend_from_slice(&held),
            _ => self.read.passed = held,
        }
    }

    /// Whether the filter at `place` lets the bytes pass.
    fn obey(&mut self, phase: Phase, place: usize, flow: Flow) -> bool {
        let way = self.way(phase);
        match flow {
            Flow::Continue => return true,
            Flow::Stop => way.at = At::Stopped(place),
            Flow::Wait(wait) => way.at = At::Waiting(place, wait),
            Flow::Close(close) => self.closing = Some(close),
        }
        false
    }

    fn way(&mut self, phase: Phase) -> &mut Way {
        if let Phase::Write = phase { &mut self.write } else { &mut self.read }
    }

    fn is_over(&self, phase: Phase) -> bool {
        if let Phase::Write = phase { self.finished } else { self.end }
    }

    /// Writes what may go out.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, &self.out))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(count);
            if self.out.is_empty() {
                self.out = BytesMut::new();
                // TLS may hold bytes back until it is flushed.
                let _ = Pin::new(&mut self.io).poll_flush(cx)?;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ends the connection if a filter wants that: the terminal filter sees a broken one.
    fn poll_closing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(close) = &self.closing else { return Poll::Ready(Ok(())) };
        match close.kind {
            CloseKind::Flush => {
                ready!(self.poll_out(cx))?;
                ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            }
            CloseKind::NoFlush => {}
            CloseKind::Reset => self.io.reset_on_close(),
        }
        Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
    }
}

impl Drop for Filtered {
    fn drop(&mut self) {
        self.filters.close(&self.connection);
    }
}

#[cfg(test)]
mod tests;
