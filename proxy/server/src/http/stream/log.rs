//! The access logs of a stream: its own, and the router's of each attempt.

use std::time::Instant;

use waystation_filter_api::flags::{ResponseFlag, ResponseFlags};
use waystation_filter_api::stream::Bytes;
use waystation_format::{AccessLog, AccessLogType, FormatContext};
use waystation_http::Headers;

use super::Stream;
use super::upstream::Upstream;
use crate::http::downstream::Downstream;
use crate::http::timer::{after, earliest};

/// What the router's log (`upstream_log`) says of the attempt that is under way.
#[derive(Clone, Copy)]
pub(super) struct AttemptLog {
    start: Instant,
    /// When the next line of a long attempt is due.
    due: Option<Instant>,
    /// The status of the response, 0 while there is none.
    pub(super) status: u16,
    /// Why there is none, or no more of it.
    pub(super) flag: Option<ResponseFlag>,
}

impl<D: Downstream> Stream<'_, D> {
    /// Writes a line to the logs of the connection manager.
    pub(super) fn log(&mut self, log_type: AccessLogType, now: Instant) {
        if !self.cx.hcm.access_logs.is_empty() {
            self.write_logs(&self.cx.hcm.access_logs, log_type, now);
        }
    }

    /// The same while the stream goes on.
    pub(super) fn log_midway(&mut self, log_type: AccessLogType) {
        self.info.bytes = self.bytes();
        self.log(log_type, self.timer.now());
    }

    /// When a line is due of a stream that goes on.
    #[inline]
    pub(super) fn log_due(&self) -> Option<Instant> {
        earliest(self.deadlines.log, self.attempt_log.and_then(|attempt| attempt.due))
    }

    /// Writes the lines that are due. What `upstream` has carried so far counts, though its attempt is not over.
    pub(super) fn log_periodically(&mut self, upstream: Option<&Upstream>) {
        let now = self.timer.now();
        let before = self.info.upstream.bytes;
        if let Some(upstream) = upstream {
            self.add_bytes(upstream);
        }
        if self.deadlines.log.is_some_and(|due| now >= due) {
            self.deadlines.log = after(now, self.cx.hcm.log_interval);
            self.log_midway(AccessLogType::DownstreamPeriodic);
        }
        if let Some(attempt) = &mut self.attempt_log
            && attempt.due.is_some_and(|due| now >= due)
        {
            attempt.due = after(now, self.cx.hcm.router.upstream_log_interval);
            self.log_attempt(AccessLogType::UpstreamPeriodic, now);
        }
        self.info.upstream.bytes = before;
    }

    /// An attempt begins.
    #[inline]
    pub(super) fn begin_attempt_log(&mut self, now: Instant) {
        let router = &self.cx.hcm.router;
        if !router.upstream_logs.is_empty() {
            let due = after(now, router.upstream_log_interval);
            self.attempt_log = Some(AttemptLog { start: now, due, status: 0, flag: None });
        }
    }

    /// The attempt has a connection.
    #[inline]
    pub(super) fn log_pool_ready(&mut self, now: Instant) {
        if self.cx.hcm.router.upstream_log_on_stream {
            self.log_attempt(AccessLogType::UpstreamPoolReady, now);
        }
    }

    /// The attempt is over.
    #[inline]
    pub(super) fn end_attempt_log(&mut self) {
        if self.attempt_log.is_some() {
            self.log_attempt(AccessLogType::UpstreamEnd, self.timer.now());
            self.attempt_log = None;
        }
    }

    /// Why the attempt has failed.
    #[inline]
    pub(super) fn flag_attempt(&mut self, flag: ResponseFlag) {
        if let Some(attempt) = &mut self.attempt_log {
            attempt.flag = Some(flag);
        }
    }

    /// Writes a line of the router's logs. To them the stream is the attempt: it began with it, and what it has received
    /// is the response.
    fn log_attempt(&mut self, log_type: AccessLogType, now: Instant) {
        let Some(attempt) = self.attempt_log else { return };
        // As to Envoy, who counts for an attempt from its connection on.
        let down = match self.info.upstream.connection_id {
            Some(_) => self.down.bytes(),
            None => Bytes::default(),
        };
        let info = &mut self.info;
        let of_upstream = info.upstream.bytes;
        let mut flags = ResponseFlags::default();
        attempt.flag.into_iter().for_each(|flag| flags.set(flag));
        let mut timing = info.timing;
        timing.complete = (log_type == AccessLogType::UpstreamEnd).then_some(now);
        (timing.last_downstream_rx, timing.first_downstream_tx, timing.last_downstream_tx) =
            (None, None, None);
        let bytes =
            Bytes { body_received: of_upstream.body_received, body_sent: of_upstream.body_sent, ..down };
        let code = std::mem::replace(&mut info.response_code, attempt.status);
        let flags = std::mem::replace(&mut info.flags, flags);
        let timing = std::mem::replace(&mut info.timing, timing);
        let bytes = std::mem::replace(&mut info.bytes, bytes);
        let start = std::mem::replace(&mut info.start, attempt.start);
        let wall = self.cx.worker.wall_clock(attempt.start);
        let wall = std::mem::replace(&mut info.start_time, wall);
        let attempts = std::mem::take(&mut info.upstream.attempts);
        let protocol = std::mem::replace(&mut info.protocol, info.upstream.protocol);
        let details = info.details.take();
        self.write_logs(&self.cx.hcm.router.upstream_logs, log_type, now);
        let info = &mut self.info;
        (info.response_code, info.flags, info.timing, info.bytes) = (code, flags, timing, bytes);
        (info.start, info.start_time, info.protocol, info.details) = (start, wall, protocol, details);
        info.upstream.attempts = attempts;
    }

    fn write_logs(&self, logs: &[AccessLog], log_type: AccessLogType, now: Instant) {
        let some = |headers| Some(headers).filter(|headers: &&Headers| !headers.is_empty());
        let cx = FormatContext {
            request: Some(&self.heads.request),
            response: some(&self.heads.response),
            trailers: some(&self.heads.response_trailers),
            info: &self.info,
            local_reply_body: "",
            log_type,
            now,
        };
        for log in logs {
            log.log(&cx, self.cx.worker.random());
        }
    }
}
