//! Calls that filters make to clusters, from their worker and over its connection pools, so that the breakers, balancing,
//! outlier detection, TLS and statistics of the cluster apply.
//!
//! A configuration names its clusters when it is compiled ([`Clusters`]); a phase gets the worker's client by
//! [`Driver::clients`](crate::http::Driver::clients). A [`Call`] does nothing unless it is polled, and ends when it is
//! dropped. [`crate::grpc`] has what gRPC adds.

use std::any::Any;
use std::fmt;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_http::Headers;
use waystation_schema::ConfigError;

use crate::http::LocalFuture;

/// The most that is gathered of a response body: Envoy's `http.async_response_buffer_limit`.
pub const MAX_RESPONSE: usize = 32 << 20;

/// What a configuration may refer to of clusters, while it is compiled.
pub trait Clusters {
    /// The cluster of this name, whether it exists yet or not.
    fn cluster(&self, name: &str) -> NamedCluster;

    /// Compiles the retry policy of a service.
    ///
    /// # Errors
    /// When something in it is not valid or not supported.
    fn retry_policy(&self, proto: &core::RetryPolicy) -> Result<CallRetries, ConfigError>;
}

/// A cluster that a configuration names. What is behind the name is the data plane's.
pub struct NamedCluster {
    name: Box<str>,
    place: Box<dyn Any + Send + Sync>,
}

impl NamedCluster {
    /// Made by the data plane, which finds `place` again.
    pub fn new(name: &str, place: impl Any + Send + Sync) -> Self {
        Self { name: name.into(), place: Box::new(place) }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the data plane keeps of it.
    pub fn place<T: Any>(&self) -> Option<&T> {
        self.place.downcast_ref()
    }
}

impl fmt::Debug for NamedCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NamedCluster").field(&self.name).finish()
    }
}

/// A compiled retry policy of a service. What it says is the data plane's.
#[derive(Clone)]
pub struct CallRetries(Arc<dyn Any + Send + Sync>);

impl CallRetries {
    /// Made by the data plane.
    pub fn new(policy: Arc<dyn Any + Send + Sync>) -> Self {
        Self(policy)
    }

    /// The data plane's policy.
    pub fn policy<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.0).downcast().ok()
    }
}

impl fmt::Debug for CallRetries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CallRetries")
    }
}

/// A worker's client to all clusters.
pub trait Clients {
    /// Begins a call. Without a `body` the request stays open for [`Call::send`], and is not retried; with one, it is
    /// complete.
    fn call(self: Rc<Self>, request: Request<'_>, body: Option<Bytes>) -> Box<dyn Call>;

    /// Runs something beside the stream that asks, until it is done: what nobody waits for.
    fn spawn(&self, task: LocalFuture<()>);
}

/// A request to a cluster.
#[derive(Debug)]
pub struct Request<'a> {
    /// Where to.
    pub cluster: &'a NamedCluster,
    /// The head, with `:method`, `:path` and `:authority`.
    pub head: Headers,
    /// For the whole of the call; none is for ever.
    pub timeout: Option<Duration>,
    /// When it is tried again.
    pub retries: Option<&'a CallRetries>,
    /// What hashing balancers go by.
    pub hash: Option<u64>,
    /// Whether the request says that it comes from inside (`x-envoy-internal`).
    pub internal: bool,
    /// Whether it says from whom (`x-forwarded-for`).
    pub forwarded_for: bool,
}

/// A call under way. Dropped before its end, it is cancelled: over HTTP/2 by RST_STREAM.
pub trait Call {
    /// Sends a piece of the request body.
    fn send(&mut self, data: Bytes);

    /// Ends the request.
    fn finish(&mut self);

    /// Whether more of the request waits than is good: the time to send nothing further until the next event or
    /// [`poll_room`](Self::poll_room).
    fn is_behind(&self) -> bool;

    /// Ready once there is room for more of the request, or there will be none.
    fn poll_room(&mut self, task: &mut Context<'_>) -> Poll<()>;

    /// What comes of the response; also what moves the request on. After an error or an end it is not to be asked again.
    fn poll_event(&mut self, task: &mut Context<'_>) -> Poll<Result<Event, CallError>>;
}

/// What comes of a response.
#[derive(Debug)]
pub enum Event {
    /// Its head.
    Head {
        /// The head.
        head: Headers,
        /// Nothing follows.
        end: bool,
    },
    /// A piece of its body.
    Data(Bytes),
    /// Its trailers; nothing follows.
    Trailers(Headers),
    /// Nothing follows.
    End,
}

/// Why there is no response, or no end of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CallError {
    /// The cluster does not exist.
    NoCluster,
    /// The cluster has no host to go to.
    NoHealthyHost,
    /// A circuit breaker is open.
    Overflow,
    /// The cluster is in maintenance mode.
    Maintenance,
    /// The connection could not be made.
    Connect,
    /// It ended before its time, or upstream broke the protocol.
    Reset {
        /// The response had begun.
        begun: bool,
    },
    /// The time was over.
    Timeout,
    /// The response is larger than was asked for.
    TooLarge,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoCluster => "the cluster does not exist",
            Self::NoHealthyHost => "no healthy upstream",
            Self::Overflow => "a circuit breaker is open",
            Self::Maintenance => "maintenance mode",
            Self::Connect => "the connection could not be made",
            Self::Reset { .. } => "the call was reset",
            Self::Timeout => "the call took too long",
            Self::TooLarge => "the response is too large",
        })
    }
}

impl std::error::Error for CallError {}

/// A response that is known in full.
#[derive(Debug, Default)]
pub struct Response {
    /// Its head.
    pub head: Headers,
    /// Its body.
    pub body: Bytes,
    /// Its trailers, if it had any.
    pub trailers: Option<Headers>,
}

/// Waits for the whole response, whose body may be of `limit` bytes.
///
/// # Errors
/// When it does not come, or is larger.
pub async fn gather(mut call: Box<dyn Call>, limit: usize) -> Result<Response, CallError> {
    let mut response = Response::default();
    let mut body = Gathered::default();
    loop {
        match poll_fn(|task| call.poll_event(task)).await? {
            Event::Head { head, end } => {
                response.head = head;
                if end {
                    break;
                }
            }
            Event::Data(data) => {
                if body.len() + data.len() > limit {
                    return Err(CallError::TooLarge);
                }
                body.push(data);
            }
            Event::Trailers(trailers) => {
                response.trailers = Some(trailers);
                break;
            }
            Event::End => break,
        }
    }
    response.body = body.into_bytes();
    Ok(response)
}

/// Pieces that become one; the usual single piece is not copied.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    only: Bytes,
    more: BytesMut,
}

impl Gathered {
    pub(crate) fn len(&self) -> usize {
        self.only.len() + self.more.len()
    }

    pub(crate) fn push(&mut self, data: Bytes) {
        if self.len() == 0 {
            self.only = data;
            return;
        }
        let first = std::mem::take(&mut self.only);
        self.more.extend_from_slice(&first);
        self.more.extend_from_slice(&data);
    }

    pub(crate) fn into_bytes(self) -> Bytes {
        if self.more.is_empty() { self.only } else { self.more.freeze() }
    }
}

#[cfg(test)]
mod tests {
    use super::{CallError, Event, Gathered, gather};
    use crate::grpc::tests::Scripted;
    use bytes::Bytes;
    use waystation_http::Headers;

    #[test]
    fn pieces_become_one() {
        let mut gathered = Gathered::default();
        let first = Bytes::from_static(b"a");
        gathered.push(first.clone());
        assert_eq!(gathered.len(), 1);
        for data in [&b"b"[..], b"", b"cd"] {
            gathered.push(Bytes::copy_from_slice(data));
        }
        assert_eq!(gathered.len(), 4);
        assert_eq!(gathered.into_bytes(), "abcd");
        let mut single = Gathered::default();
        single.push(first.clone());
        assert_eq!(single.into_bytes().as_ptr(), first.as_ptr(), "not copied");
    }

    #[test]
    fn a_response_is_gathered_up_to_its_limit() {
        let events = || {
            let head = Event::Head { head: Headers::new(), end: false };
            vec![Ok(head), Ok(Event::Data("abc".into())), Ok(Event::Data("d".into())), Ok(Event::End)]
        };
        let gathered = |limit| Scripted::block_on(gather(Box::new(Scripted::new(events())), limit));
        assert_eq!(gathered(4).unwrap().body, "abcd");
        assert_eq!(gathered(3).unwrap_err(), CallError::TooLarge);
    }
}
