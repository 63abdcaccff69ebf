//! A raw upstream connection that carries what a CONNECT request tunnels, when CONNECT ends here (`connect_config`).

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWrite as _;
use tokio_util::io::poll_read_buf;
use waystation_filter_api::stream::Bytes as ByteCounts;
use waystation_http::Headers;

use super::HostPool;
use super::connect::{ConnectionGuard, UpstreamConnInfo};
use crate::http::end::ResetReason;
use crate::http::outbox::Outbox;
use crate::http::stream::Event;
use crate::transport::Transport;

/// Room that a read should find.
const READ_ROOM: usize = 16 * 1024;

/// One connection, for one tunnel.
pub(crate) struct Tcp {
    transport: Transport,
    out: Outbox,
    input: BytesMut,
    /// What is said before the first byte: the connection is the answer.
    events: VecDeque<Event>,
    ended: bool,
    shut: bool,
    pub(crate) info: Rc<UpstreamConnInfo>,
    guard: ConnectionGuard,
    pool: Weak<HostPool>,
}

impl Tcp {
    pub(crate) fn new(
        transport: Transport,
        info: UpstreamConnInfo,
        mut guard: ConnectionGuard,
        pool: &Rc<HostPool>,
    ) -> Self {
        guard.active = true;
        pool.opened_raw();
        Self {
            transport,
            out: Outbox::new(guard.cluster().buffer_limit),
            input: BytesMut::new(),
            events: VecDeque::from([Event::Head { end: false }]),
            ended: false,
            shut: false,
            info: Rc::new(info),
            guard,
            pool: Rc::downgrade(pool),
        }
    }

    /// Bytes on the wire.
    pub(crate) fn bytes(&self) -> ByteCounts {
        let (received, sent) = self.guard.bytes();
        ByteCounts {
            wire_received: received,
            wire_sent: sent + self.out.waiting() as u64,
            ..ByteCounts::default()
        }
    }

    pub(crate) fn send_data(&mut self, data: Bytes) {
        self.out.push(data);
    }

    pub(crate) fn send_end(&mut self) {
        self.ended = true;
    }

    pub(crate) fn has_room(&self) -> bool {
        self.out.has_room()
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        let lost = |_| ResetReason::ConnectionTermination;
        if !self.out.is_empty() {
            let mut sent = 0;
            let flushed = self.out.poll_flush(cx, &mut self.transport, &mut sent);
            self.guard.sent(sent);
            ready!(flushed).map_err(lost)?;
        }
        if self.ended && !self.shut {
            ready!(Pin::new(&mut self.transport).poll_shutdown(cx)).map_err(lost)?;
            self.shut = true;
        }
        Poll::Ready(Ok(()))
    }

    pub(crate) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        headers: &mut Headers,
    ) -> Poll<Result<Event, ResetReason>> {
        if let Some(event) = self.events.pop_front() {
            headers.set_status(200);
            return Poll::Ready(Ok(event));
        }
        self.input.reserve(READ_ROOM);
        match ready!(poll_read_buf(Pin::new(&mut self.transport), cx, &mut self.input)) {
            Ok(0) => {
                self.guard.remote = true;
                Poll::Ready(Ok(Event::End))
            }
            Ok(count) => {
                self.guard.received(count);
                Poll::Ready(Ok(Event::Data(self.input.split().freeze())))
            }
            Err(_) => {
                self.guard.remote = true;
                Poll::Ready(Err(ResetReason::ConnectionTermination))
            }
        }
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.closed_raw();
        }
    }
}

impl fmt::Debug for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tcp").field("info", &self.info).finish_non_exhaustive()
    }
}
