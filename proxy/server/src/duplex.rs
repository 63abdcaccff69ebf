//! Bytes both ways between two transports, until both are done.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Sleep, sleep_until};
use tokio_util::io::poll_read_buf;

/// Bytes held for one direction at most. A direction that is at rest holds no buffer.
const BUFFER: usize = 16 * 1024;

/// What limits a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Ends the session when neither direction moved a byte for so long.
    pub idle_timeout: Option<Duration>,
    /// Ends the session at this time.
    pub deadline: Option<Instant>,
}

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// Both directions were closed in order.
    Closed,
    /// Neither direction moved for the idle timeout.
    Idle,
    /// The deadline passed.
    Deadline,
    /// Reading from or writing to the downstream failed.
    Downstream(io::Error),
    /// Reading from or writing to the upstream failed.
    Upstream(io::Error),
}

/// What a step did: the bytes that went through, and who is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// From downstream to upstream.
    pub upstream: u64,
    /// From upstream to downstream.
    pub downstream: u64,
    /// Whether downstream is read, since upstream takes what it says.
    pub reading_downstream: Flow,
    /// Whether upstream is read, since downstream takes what it says.
    pub reading_upstream: Flow,
}

/// How the reading of one side has changed: a step may resume it and then pause it again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flow {
    /// It is not read any more: the other side takes no bytes.
    pub paused: bool,
    /// It is read again.
    pub resumed: bool,
}

/// A session between two transports. It can be left and entered again: what is buffered stays.
#[derive(Debug)]
pub struct Session {
    to_up: Direction,
    to_down: Direction,
    limits: Limits,
    timer: Option<Pin<Box<Sleep>>>,
    last: Instant,
}

/// Moves bytes both ways until the session ends. A side that closes is closed towards the other one (half-close), and
/// the other direction goes on. `moved` is called with the bytes of each step.
pub async fn run<D, U>(down: &mut D, up: &mut U, limits: Limits, moved: impl FnMut(Moved)) -> End
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    Session::new(limits).run(down, up, moved).await
}

impl Session {
    /// A session that has moved nothing yet.
    pub fn new(limits: Limits) -> Self {
        let (to_up, to_down) = (Direction::default(), Direction::default());
        Self { to_up, to_down, limits, timer: None, last: Instant::now() }
    }

    /// As [`run`]; may be dropped and called again.
    pub async fn run<D, U>(&mut self, down: &mut D, up: &mut U, mut moved: impl FnMut(Moved)) -> End
    where
        D: AsyncRead + AsyncWrite + Unpin,
        U: AsyncRead + AsyncWrite + Unpin,
    {
        poll_fn(|cx| self.poll(cx, down, up, &mut moved)).await
    }

    fn poll<D, U>(
        &mut self,
        cx: &mut Context<'_>,
        down: &mut D,
        up: &mut U,
        moved: &mut impl FnMut(Moved),
    ) -> Poll<End>
    where
        D: AsyncRead + AsyncWrite + Unpin,
        U: AsyncRead + AsyncWrite + Unpin,
    {
        let mut step = Moved::default();
        let upstream_done = self.to_up.poll(cx, down, up, &mut step.upstream, &mut step.reading_downstream);
        let downstream_done =
            self.to_down.poll(cx, up, down, &mut step.downstream, &mut step.reading_upstream);
        if step.upstream + step.downstream > 0 {
            self.last = Instant::now();
            moved(step);
        } else if step.reading_downstream.paused || step.reading_upstream.paused {
            moved(step);
        }
        match (upstream_done, downstream_done) {
            (Poll::Ready(Err(Failed::Read(error))), _) | (_, Poll::Ready(Err(Failed::Write(error)))) => {
                return Poll::Ready(End::Downstream(error));
            }
            (Poll::Ready(Err(Failed::Write(error))), _) | (_, Poll::Ready(Err(Failed::Read(error)))) => {
                return Poll::Ready(End::Upstream(error));
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(End::Closed),
            _ => {}
        }
        // The timer is only moved when it fires: activity costs a clock reading, not a timer operation.
        loop {
            let idle_at = self.limits.idle_timeout.map(|idle| self.last + idle);
            let Some(due) = [idle_at, self.limits.deadline].into_iter().flatten().min() else {
                return Poll::Pending;
            };
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due.into())));
            ready!(timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.limits.deadline.is_some_and(|deadline| now >= deadline) {
                return Poll::Ready(End::Deadline);
            }
            if idle_at.is_some_and(|idle_at| now >= idle_at) {
                return Poll::Ready(End::Idle);
            }
            timer.as_mut().reset(due.into());
        }
    }
}

enum Failed {
    Read(io::Error),
    Write(io::Error),
}

#[derive(Debug, Default)]
struct Direction {
    buffer: BytesMut,
    state: State,
    /// The reader waits for the writer.
    paused: bool,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    #[default]
    Open,
    /// The reader is at its end; what is buffered goes out, then the writer is shut down.
    Closing,
    Closed,
}

impl Direction {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        moved: &mut u64,
        flow: &mut Flow,
    ) -> Poll<Result<(), Failed>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            if !self.buffer.is_empty() {
                let Poll::Ready(written) = Pin::new(&mut *to).poll_write(cx, &self.buffer) else {
                    flow.paused |= !std::mem::replace(&mut self.paused, true);
                    return Poll::Pending;
                };
                match written {
                    Ok(0) => return Poll::Ready(Err(Failed::Write(io::ErrorKind::WriteZero.into()))),
                    Ok(count) => {
                        self.buffer.advance(count);
                        *moved += count as u64;
                        continue;
                    }
                    Err(error) => return Poll::Ready(Err(Failed::Write(error))),
                }
            }
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Failed::Write)?;
                    self.state = State::Closed;
                }
                State::Open => {
                    flow.resumed |= std::mem::take(&mut self.paused);
                    self.buffer.clear();
                    self.buffer.reserve(BUFFER);
                    match poll_read_buf(Pin::new(&mut *from), cx, &mut self.buffer) {
                        Poll::Ready(Ok(0)) => self.state = State::Closing,
                        Poll::Ready(Ok(_)) => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(Failed::Read(error))),
                        Poll::Pending => {
                            self.buffer = BytesMut::new();
                            // TLS may hold bytes back until it is flushed.
                            return match Pin::new(&mut *to).poll_flush(cx) {
                                Poll::Ready(Err(error)) => Poll::Ready(Err(Failed::Write(error))),
                                _ => Poll::Pending,
                            };
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{End, Limits, run};
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    #[tokio::test]
    async fn half_close_passes_through_and_the_other_way_goes_on() {
        let (mut client, mut down) = duplex(64);
        let (mut up, mut server) = duplex(64);
        let session = async {
            let mut total = (0, 0);
            let end = run(&mut down, &mut up, Limits::default(), |moved| {
                total = (total.0 + moved.upstream, total.1 + moved.downstream);
            });
            (end.await, total)
        };
        let peers = async {
            client.write_all(b"ping").await.unwrap();
            client.shutdown().await.unwrap();
            let mut seen = Vec::new();
            server.read_to_end(&mut seen).await.unwrap();
            server.write_all(b"pong!").await.unwrap();
            server.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            (seen, answer)
        };
        let ((end, total), (seen, answer)) = tokio::join!(session, peers);
        assert!(matches!(end, End::Closed), "{end:?}");
        assert_eq!((seen, answer), (b"ping".to_vec(), b"pong!".to_vec()));
        assert_eq!(total, (4, 5));
    }

    #[tokio::test]
    async fn a_side_that_takes_nothing_pauses_the_other() {
        let (mut client, mut down) = duplex(64);
        let (mut up, mut server) = duplex(64);
        let counts = std::cell::Cell::new([0; 4]);
        let session = run(&mut down, &mut up, Limits::default(), |moved| {
            let flows = [moved.reading_downstream, moved.reading_upstream];
            let seen = [flows[0].paused, flows[0].resumed, flows[1].paused, flows[1].resumed];
            counts.set(std::array::from_fn(|i| counts.get()[i] + u32::from(seen[i])));
        });
        let peers = async {
            // Less than both pipes and the session hold, more than the one pipe that nobody reads.
            client.write_all(&[b'x'; 160]).await.unwrap();
            while counts.get()[0] == 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(counts.get(), [1, 0, 0, 0]);
            client.shutdown().await.unwrap();
            server.read_to_end(&mut Vec::new()).await.unwrap();
            server.shutdown().await.unwrap();
        };
        let (end, ()) = tokio::join!(session, peers);
        assert!(matches!(end, End::Closed), "{end:?}");
        let [paused, resumed, other_paused, other_resumed] = counts.get();
        assert!(paused > 0 && paused == resumed, "{paused} {resumed}");
        assert_eq!((other_paused, other_resumed), (0, 0));
    }

    #[tokio::test]
    async fn idle_sessions_end() {
        let (_client, mut down) = duplex(64);
        let (mut up, _server) = duplex(64);
        let limits = Limits { idle_timeout: Some(Duration::from_secs(3600)), deadline: None };
        // The paused clock does not move std's Instant: the deadline variant shows the timer path.
        let limits = Limits { deadline: Some(std::time::Instant::now()), ..limits };
        let end = run(&mut down, &mut up, limits, |_| ()).await;
        assert!(matches!(end, End::Deadline), "{end:?}");
    }
}
