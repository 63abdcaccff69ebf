//! gRPC over a [`Call`]: messages in frames, and the status at the end
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).

use std::borrow::Cow;
use std::fmt;
use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use waystation_http::{Headers, Known, decode_grpc_message};

use crate::client::{Call, CallError, Event, MAX_RESPONSE};

/// Before each message: a flag and the length.
const FRAME_HEAD: usize = 5;

/// Status codes that this proxy itself gives.
pub mod code {
    /// Success.
    pub const OK: u32 = 0;
    /// The peer did not say.
    pub const UNKNOWN: u32 = 2;
    /// The bearer of the call may not make it.
    pub const PERMISSION_DENIED: u32 = 7;
    /// A message is larger than allowed.
    pub const RESOURCE_EXHAUSTED: u32 = 8;
    /// The method does not exist.
    pub const UNIMPLEMENTED: u32 = 12;
    /// Something is broken.
    pub const INTERNAL: u32 = 13;
    /// The service can't be reached.
    pub const UNAVAILABLE: u32 = 14;
    /// The caller is not known.
    pub const UNAUTHENTICATED: u32 = 16;
}

/// How a call ended that did not succeed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Status {
    /// The gRPC status code, never 0.
    pub code: u32,
    /// `grpc-message`, or what this proxy knows.
    pub message: Cow<'static, str>,
}

impl Status {
    fn new(code: u32, message: &'static str) -> Self {
        Self { code, message: Cow::Borrowed(message) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gRPC status {}: {}", self.code, self.message)
    }
}

impl std::error::Error for Status {}

impl From<CallError> for Status {
    /// As Envoy's client: without a response the service is unavailable, a broken one is an internal error.
    fn from(error: CallError) -> Self {
        let code = match error {
            CallError::Reset { begun: true } => code::INTERNAL,
            CallError::TooLarge => code::RESOURCE_EXHAUSTED,
            _ => code::UNAVAILABLE,
        };
        Self { code, message: error.to_string().into() }
    }
}

/// The head of a call of `path` (`/package.Service/Method`).
pub fn head(authority: &str, path: &str, timeout: Option<Duration>) -> Headers {
    let mut head = Headers::with_capacity(12, 256);
    head.append(Known::Method, "POST");
    head.append(Known::Path, path);
    head.append(Known::Authority, authority);
    head.append(Known::Scheme, "http");
    head.append(Known::Te, "trailers");
    if let Some(timeout) = timeout {
        head.append(Known::GrpcTimeout, timeout_value(timeout));
    }
    head.append(Known::ContentType, "application/grpc");
    head
}

/// `grpc-timeout`: at most eight digits and a unit.
fn timeout_value(timeout: Duration) -> String {
    const MOST: u128 = 99_999_999;
    let millis = timeout.as_millis();
    let (number, unit) = match millis {
        0..=MOST => (millis, 'm'),
        _ if millis / 1000 <= MOST => (millis / 1000, 'S'),
        _ if millis / 60_000 <= MOST => (millis / 60_000, 'M'),
        _ => ((millis / 3_600_000).min(MOST), 'H'),
    };
    format!("{number}{unit}")
}

/// A message in its frame: `write` appends it.
pub fn frame(write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut frame = BytesMut::with_capacity(512);
    frame.put_bytes(0, FRAME_HEAD);
    write(&mut frame);
    let length = u32::try_from(frame.len() - FRAME_HEAD).unwrap_or(u32::MAX);
    frame[1..FRAME_HEAD].copy_from_slice(&length.to_be_bytes());
    frame.freeze()
}

/// Takes messages out of the pieces of a body.
#[derive(Debug)]
pub struct Frames {
    pending: BytesMut,
    /// The largest message.
    limit: usize,
}

impl Frames {
    /// For messages of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { pending: BytesMut::new(), limit }
    }

    /// More of the body.
    pub fn push(&mut self, data: Bytes) {
        if self.pending.is_empty() {
            self.pending = data.try_into_mut().unwrap_or_else(BytesMut::from);
        } else {
            self.pending.extend_from_slice(&data);
        }
    }

    /// The next message, if it is complete.
    ///
    /// # Errors
    /// When it is compressed, which was not asked for, no frame at all, or too large.
    pub fn next_message(&mut self) -> Result<Option<Bytes>, Status> {
        let Some(&flag) = self.pending.first() else { return Ok(None) };
        if flag > 1 {
            return Err(Status::new(code::INTERNAL, "not a gRPC frame"));
        }
        let Some(head) = self.pending.first_chunk::<FRAME_HEAD>() else { return Ok(None) };
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > self.limit {
            return Err(Status::new(code::RESOURCE_EXHAUSTED, "the message is too large"));
        }
        if flag != 0 && length > 0 {
            return Err(Status::new(code::INTERNAL, "the message is compressed"));
        }
        if self.pending.len() < FRAME_HEAD + length {
            return Ok(None);
        }
        self.pending.advance(FRAME_HEAD);
        Ok(Some(self.pending.split_to(length).freeze()))
    }
}

/// A stream of messages, in both directions. A unary call is one with a single message each way.
pub struct Stream {
    call: Box<dyn Call>,
    frames: Frames,
    headers: Option<Headers>,
    /// How it ended.
    over: Option<Result<(), Status>>,
}

impl Stream {
    /// The stream of a call; messages may be of `limit` bytes, 0 for as large as anything may be.
    pub fn new(call: Box<dyn Call>, limit: usize) -> Self {
        let limit = if limit == 0 { MAX_RESPONSE } else { limit };
        Self { call, frames: Frames::new(limit), headers: None, over: None }
    }

    /// Sends a message, which [`frame`] has made.
    pub fn send(&mut self, frame: Bytes) {
        self.call.send(frame);
    }

    /// Says that there are no further messages.
    pub fn finish(&mut self) {
        self.call.finish();
    }

    /// Whether the peer takes messages more slowly than they are sent.
    pub fn is_behind(&self) -> bool {
        self.call.is_behind()
    }

    /// Ready once there is room for more messages.
    pub fn poll_room(&mut self, task: &mut Context<'_>) -> Poll<()> {
        if self.over.is_some() { Poll::Ready(()) } else { self.call.poll_room(task) }
    }

    /// The initial metadata, once it has come.
    pub fn initial_metadata(&self) -> Option<&Headers> {
        self.headers.as_ref()
    }

    /// The next message; nothing after the last, when the call has succeeded.
    pub fn poll_message(&mut self, task: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        loop {
            match self.frames.next_message() {
                Ok(None) => {}
                Ok(Some(message)) => return Poll::Ready(Ok(Some(message))),
                Err(status) => self.over = Some(Err(status)),
            }
            if let Some(over) = &self.over {
                return Poll::Ready(over.clone().map(|()| None));
            }
            match ready!(self.call.poll_event(task)) {
                Ok(Event::Head { head, end }) => self.on_head(head, end),
                Ok(Event::Data(data)) => self.frames.push(data),
                Ok(Event::Trailers(trailers)) => self.over = Some(outcome(&trailers)),
                Ok(Event::End) => {
                    self.over = Some(Err(Status::new(code::UNKNOWN, "the response has no grpc-status")));
                }
                Err(error) => self.over = Some(Err(error.into())),
            }
        }
    }

    /// The next message, as a future.
    pub async fn message(&mut self) -> Result<Option<Bytes>, Status> {
        poll_fn(|task| self.poll_message(task)).await
    }

    fn on_head(&mut self, head: Headers, end: bool) {
        let status = head.status().unwrap_or(0);
        let stated = head.contains(Known::GrpcStatus);
        if end && (status == 200 || stated) {
            self.over = Some(outcome(&head));
        } else if status != 200 {
            self.over = Some(Err(Status::new(of_http(status), "the response is not gRPC")));
        }
        self.headers = Some(head);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("over", &self.over).finish_non_exhaustive()
    }
}

/// Waits for the answer of a unary call.
///
/// # Errors
/// With the status of a call that failed; a success without a message is an internal error.
pub async fn unary(mut stream: Stream) -> Result<Bytes, Status> {
    let mut answer = None;
    // Of several, which no service sends, the last counts, as for Envoy.
    while let Some(message) = stream.message().await? {
        answer = Some(message);
    }
    answer.ok_or(Status::new(code::INTERNAL, "the response has no message"))
}

fn outcome(trailers: &Headers) -> Result<(), Status> {
    let code = trailers.get_str(Known::GrpcStatus).and_then(|code| code.parse().ok());
    let code: u32 = code.unwrap_or(code::UNKNOWN);
    if code == code::OK {
        return Ok(());
    }
    let message = trailers.get(Known::GrpcMessage).unwrap_or_default();
    let message = String::from_utf8_lossy(&decode_grpc_message(message)).into_owned();
    Err(Status { code, message: message.into() })
}

/// <https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md>
fn of_http(status: u16) -> u32 {
    match status {
        400 => code::INTERNAL,
        401 => code::UNAUTHENTICATED,
        403 => code::PERMISSION_DENIED,
        404 => code::UNIMPLEMENTED,
        429 | 502..=504 => code::UNAVAILABLE,
        _ => code::UNKNOWN,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::task::Waker;

    /// A call whose events are known.
    pub(crate) struct Scripted(VecDeque<Result<Event, CallError>>);

    impl Scripted {
        pub(crate) fn new(events: Vec<Result<Event, CallError>>) -> Self {
            Self(events.into())
        }

        /// Runs what never waits.
        pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
            match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(value) => value,
                Poll::Pending => panic!("waits for nobody"),
            }
        }
    }

    impl Call for Scripted {
        fn send(&mut self, _: Bytes) {}

        fn finish(&mut self) {}

        fn is_behind(&self) -> bool {
            false
        }

        fn poll_room(&mut self, _: &mut Context<'_>) -> Poll<()> {
            Poll::Ready(())
        }

        fn poll_event(&mut self, _: &mut Context<'_>) -> Poll<Result<Event, CallError>> {
            self.0.pop_front().map_or(Poll::Pending, Poll::Ready)
        }
    }

    fn headers(fields: &[(&'static str, &str)]) -> Headers {
        let mut headers = Headers::new();
        fields.iter().for_each(|(name, value)| headers.append(*name, value));
        headers
    }

    fn opened() -> Result<Event, CallError> {
        Ok(Event::Head { head: headers(&[(":status", "200")]), end: false })
    }

    fn message(text: &str) -> Bytes {
        frame(|out| out.extend_from_slice(text.as_bytes()))
    }

    fn ended(status: &str) -> Result<Event, CallError> {
        Ok(Event::Trailers(headers(&[("grpc-status", status), ("grpc-message", "a%20b")])))
    }

    fn called(events: Vec<Result<Event, CallError>>) -> Result<Bytes, u32> {
        let stream = Stream::new(Box::new(Scripted::new(events)), 8);
        Scripted::block_on(unary(stream)).map_err(|status| status.code)
    }

    #[test]
    fn answers_and_failures() {
        assert_eq!(called(vec![opened(), Ok(Event::Data(message("x"))), ended("0")]), Ok("x".into()));
        let half = message("hello");
        let (first, rest) = (half.slice(..7), half.slice(7..));
        let pieces = vec![opened(), Ok(Event::Data(first)), Ok(Event::Data(rest)), ended("0")];
        assert_eq!(called(pieces), Ok("hello".into()));
        for (events, code) in [
            (vec![opened(), ended("0")], code::INTERNAL),
            (vec![opened(), Ok(Event::Data(message("x"))), ended("7")], 7),
            (vec![opened(), Ok(Event::Data(message("x"))), ended("nonsense")], code::UNKNOWN),
            (vec![opened(), Ok(Event::Data(message("x"))), Ok(Event::End)], code::UNKNOWN),
            (vec![opened(), Ok(Event::Data("garbage".into()))], code::INTERNAL),
            (vec![opened(), Ok(Event::Data(Bytes::from_static(&[1, 0, 0, 0, 1, 9])))], code::INTERNAL),
            (vec![opened(), Ok(Event::Data(message("longer than it may be")))], code::RESOURCE_EXHAUSTED),
            (vec![Err(CallError::NoCluster)], code::UNAVAILABLE),
            (vec![Err(CallError::Timeout)], code::UNAVAILABLE),
            (vec![opened(), Err(CallError::Reset { begun: true })], code::INTERNAL),
        ] {
            assert_eq!(called(events), Err(code));
        }
        for (status, stated, code) in
            [("503", None, code::UNAVAILABLE), ("404", None, code::UNIMPLEMENTED), ("503", Some("5"), 5)]
        {
            let mut head = headers(&[(":status", status)]);
            stated.into_iter().for_each(|stated| head.append(Known::GrpcStatus, stated));
            assert_eq!(called(vec![Ok(Event::Head { head, end: true })]), Err(code));
        }
    }

    #[test]
    fn a_stream_is_more_messages() {
        let two = [message("a"), message("b")].concat();
        let events = vec![opened(), Ok(Event::Data(two.into())), Ok(Event::Data(message(""))), ended("0")];
        let mut stream = Stream::new(Box::new(Scripted::new(events)), 0);
        let mut next = || Scripted::block_on(stream.message()).unwrap();
        assert_eq!([next(), next(), next()], [Some("a".into()), Some("b".into()), Some(Bytes::new())]);
        assert_eq!([next(), next()], [None, None], "its end stays its end");
    }

    #[test]
    fn timeouts_have_at_most_eight_digits() {
        for (millis, value) in [
            (0, "0m"),
            (200, "200m"),
            (99_999_999, "99999999m"),
            (100_000_000, "100000S"),
            (100_000_000_000, "1666666M"),
        ] {
            assert_eq!(timeout_value(Duration::from_millis(millis)), value);
        }
    }
}
