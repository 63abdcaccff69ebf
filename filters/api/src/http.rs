//! HTTP filters: phase traits, not futures.
//!
//! A request goes through the `decode_*` phases of each filter in the order of the configuration, the response
//! through the `encode_*` phases in the reverse order. A phase returns a [`Flow`]. Factories declare the phases
//! they want ([`Phases`]), so that a chain that only looks at heads lets bodies flow through untouched.
//! The terminal filter (the router) is the driver's; it is not expressed by this trait.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use waystation_http::Headers;
use waystation_schema::ConfigError;
use waystation_stats::Scope;

use crate::runtime::Runtime;
use crate::stream::StreamInfo;

/// A future that lives on one worker.
pub type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// What a phase decides.
pub enum Flow {
    /// Go on with the next filter.
    Continue,
    /// Hold this head, these data or these trailers, and everything behind them, until the [`Resume`] that
    /// [`StreamCx::resume_handle`] gave out is used. What arrives meanwhile is buffered up to the buffer limit
    /// (413 for a request, 500 for a response beyond it) when [`Hold::Buffer`], or stops being read when
    /// [`Hold::Watermark`].
    Pause(Hold),
    /// Answer the request here. Encode filters see the reply.
    Reply(Box<LocalReply>),
    /// Wait for the future, then do as it says. For the rare phase that must ask somebody.
    Wait(LocalFuture<Flow>),
    /// What the stream's route is taken from has changed: select the route anew, configure the filters behind this one
    /// for it, and show this filter the head once more. Only `decode_headers` waits for this; elsewhere it is
    /// [`Flow::Continue`].
    Anew,
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Continue => f.write_str("Continue"),
            Self::Pause(hold) => f.debug_tuple("Pause").field(hold).finish(),
            Self::Reply(reply) => f.debug_tuple("Reply").field(reply).finish(),
            Self::Wait(_) => f.write_str("Wait(..)"),
            Self::Anew => f.write_str("Anew"),
        }
    }
}

/// What happens to body that arrives while a filter pauses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Hold {
    /// The driver buffers it, bounded by the buffer limit: beyond it the stream ends with 413 or 500.
    Buffer,
    /// The driver buffers up to the limit and then stops reading: back-pressure instead of an error.
    Watermark,
}

/// A reply made here rather than upstream.
#[derive(Debug)]
pub struct LocalReply {
    /// The HTTP status; a gRPC request gets status 200 and the mapped `grpc-status` instead.
    pub status: u16,
    /// The body, and the `grpc-message`.
    pub body: Cow<'static, str>,
    /// `%RESPONSE_CODE_DETAILS%`.
    pub details: Cow<'static, str>,
    /// The gRPC status where it differs from the mapping of the HTTP status.
    pub grpc_status: Option<u32>,
    /// Further response headers, added after the driver's own.
    pub headers: Headers,
    /// The response flag, if it has one.
    pub flag: Option<crate::flags::ResponseFlag>,
}

impl LocalReply {
    /// A reply with status, body and details.
    pub fn new(
        status: u16,
        body: impl Into<Cow<'static, str>>,
        details: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            status,
            body: body.into(),
            details: details.into(),
            grpc_status: None,
            headers: Headers::new(),
            flag: None,
        }
    }
}

/// The phases a filter wants to see. Heads always count as wanted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Phases {
    /// `decode_headers`.
    pub request_headers: bool,
    /// `decode_data`.
    pub request_body: bool,
    /// `decode_trailers`.
    pub request_trailers: bool,
    /// `encode_headers`, of upstream's responses and of local replies.
    pub response_headers: bool,
    /// `encode_data`.
    pub response_body: bool,
    /// `encode_trailers`.
    pub response_trailers: bool,
    /// `on_complete`.
    pub complete: bool,
}

impl Phases {
    /// The phases that either wants.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            request_headers: self.request_headers | other.request_headers,
            request_body: self.request_body | other.request_body,
            request_trailers: self.request_trailers | other.request_trailers,
            response_headers: self.response_headers | other.response_headers,
            response_body: self.response_body | other.response_body,
            response_trailers: self.response_trailers | other.response_trailers,
            complete: self.complete | other.complete,
        }
    }
}

/// What a phase may look at and change besides the head or data it is given.
pub struct StreamCx<'a> {
    /// Facts about the stream.
    pub info: &'a mut StreamInfo,
    /// The request head, in encode phases and in body phases.
    pub request: Option<&'a Headers>,
    /// The configuration of this filter on the stream's route, most specific level first; empty when no level
    /// has one.
    pub route_config: &'a [FilterConfig],
    /// Worker-local randomness.
    pub random: &'a mut fastrand::Rng,
    /// Fetches what the stream's route lacks.
    pub on_demand: &'a dyn OnDemand,
    pause: &'a dyn Pause,
    clear_route: &'a mut bool,
}

impl<'a> StreamCx<'a> {
    /// Assembled by the driver for each phase.
    pub fn new(
        info: &'a mut StreamInfo,
        request: Option<&'a Headers>,
        route_config: &'a [FilterConfig],
        random: &'a mut fastrand::Rng,
        on_demand: &'a dyn OnDemand,
        pause: &'a dyn Pause,
        clear_route: &'a mut bool,
    ) -> Self {
        Self { info, request, route_config, random, on_demand, pause, clear_route }
    }

    /// A handle that ends this filter's pause, made when it is first asked for.
    pub fn resume_handle(&self) -> Resume {
        self.pause.handle()
    }

    /// Has the route selected anew, after a filter changed what it depends on.
    pub fn clear_route_cache(&mut self) {
        *self.clear_route = true;
    }
}

impl fmt::Debug for StreamCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamCx").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Configuration that is fetched for the request that needs it (`envoy.filters.http.on_demand`).
///
/// Each method gives nothing when there is nothing to fetch. Dropping the future gives up waiting.
pub trait OnDemand {
    /// Fetches the virtual host of `head` by VHDS, or the route configuration of its scope.
    fn fetch_route(&self, head: &Headers) -> Option<LocalFuture<Fetched>>;

    /// Fetches the cluster that the stream's route sends `head` to.
    fn fetch_cluster(&self, source: &Arc<ClusterSource>, head: &Headers) -> Option<LocalFuture<Fetched>>;
}

/// How a wait for configuration has ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fetched {
    /// What was asked for has arrived, does not exist, or did not come in time.
    Done,
    /// Too many wait: nobody was asked.
    Full,
}

/// Where clusters that nobody has configured come from, and how long a request waits for one.
#[derive(Debug)]
pub struct ClusterSource {
    /// The encoded `envoy.config.core.v3.ConfigSource`.
    pub config: Bytes,
    /// From the first request that asks for a name.
    pub timeout: Duration,
}

/// A filter's place in the driver, which makes the handle that ends its pause: few filters ever ask for one.
pub trait Pause {
    /// The same handle as before, if there is one.
    fn handle(&self) -> Resume;
}

/// Where a handle leaves its verdict, in the driver.
pub trait Paused {
    /// The stream is to go on as `flow` says. Told at most once by each handle.
    fn resume(&self, flow: Flow);
}

/// Ends a filter's pause from outside the phase: a timer, a side call, a Wasm module's `continue`.
#[derive(Clone)]
pub struct Resume(Rc<dyn Paused>);

impl Resume {
    /// Made by the driver.
    pub fn new(paused: Rc<dyn Paused>) -> Self {
        Self(paused)
    }

    /// Lets the stream go on as `flow` says.
    pub fn resume(self, flow: Flow) {
        self.0.resume(flow);
    }
}

impl fmt::Debug for Resume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resume")
    }
}

/// One filter on one stream.
pub trait HttpFilter {
    /// The request head.
    fn decode_headers(&mut self, _cx: &mut StreamCx<'_>, _head: &mut Headers, _end: bool) -> Flow {
        Flow::Continue
    }

    /// A piece of the request body, or the whole of what was buffered when the filter pauses with a hold.
    fn decode_data(&mut self, _cx: &mut StreamCx<'_>, _data: &mut BodyData, _end: bool) -> Flow {
        Flow::Continue
    }

    /// The request trailers.
    fn decode_trailers(&mut self, _cx: &mut StreamCx<'_>, _trailers: &mut Headers) -> Flow {
        Flow::Continue
    }

    /// The response head.
    fn encode_headers(&mut self, _cx: &mut StreamCx<'_>, _head: &mut Headers, _end: bool) -> Flow {
        Flow::Continue
    }

    /// A piece of the response body.
    fn encode_data(&mut self, _cx: &mut StreamCx<'_>, _data: &mut BodyData, _end: bool) -> Flow {
        Flow::Continue
    }

    /// The response trailers.
    fn encode_trailers(&mut self, _cx: &mut StreamCx<'_>, _trailers: &mut Headers) -> Flow {
        Flow::Continue
    }

    /// Somebody answers locally: the filter may change the reply.
    fn on_local_reply(&mut self, _cx: &mut StreamCx<'_>, _reply: &mut LocalReply) {}

    /// The stream is over, however it ended; called exactly once.
    fn on_complete(&mut self, _cx: &mut StreamCx<'_>) {}
}

/// Body data in a phase: shared until a filter wants to write.
#[derive(Debug)]
pub enum BodyData {
    /// As it came from the codec.
    Shared(Bytes),
    /// Owned by the chain and free to change.
    Owned(BytesMut),
}

impl BodyData {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }

    /// The bytes for writing; copies shared bytes once.
    pub fn to_mut(&mut self) -> &mut BytesMut {
        if let Self::Shared(bytes) = self {
            *self = Self::Owned(BytesMut::from(&bytes[..]));
        }
        match self {
            Self::Owned(bytes) => bytes,
            Self::Shared(_) => unreachable!("made owned above"),
        }
    }

    /// The bytes for sending.
    pub fn into_bytes(self) -> Bytes {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Owned(bytes) => bytes.freeze(),
        }
    }
}

/// A compiled per-route configuration of some filter; the filter knows the type behind it.
pub type FilterConfig = Arc<dyn Any + Send + Sync>;

/// A compiled filter configuration: makes one instance for each stream.
pub trait HttpFilterFactory: fmt::Debug + Send + Sync {
    /// The phases an instance wants.
    fn phases(&self) -> Phases;

    /// An instance for one stream, or `None` when this stream needs none (e.g. its route disables the filter).
    fn create(&self, route_config: &[FilterConfig]) -> Option<Box<dyn HttpFilter>>;
}

/// Compiles a filter's configuration from wire bytes.
pub type CompileFilter = fn(&[u8], &FactoryContext<'_>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError>;

/// Compiles a filter's per-route configuration from wire bytes.
pub type CompileRouteConfig = fn(&[u8], &FactoryContext<'_>) -> Result<FilterConfig, ConfigError>;

/// What an HTTP filter's extension exports; the binary's registry lists it under its type URLs.
pub struct HttpFilterExtension {
    /// The category-qualified name, e.g. `envoy.filters.http.fault`.
    pub name: &'static str,
    /// The message of the configuration, without `type.googleapis.com/`.
    pub type_name: &'static str,
    /// The message of the per-route configuration, if the filter has one.
    pub route_type_name: Option<&'static str>,
    /// Compiles the configuration from wire bytes that passed the schema's walk.
    pub compile: CompileFilter,
    /// Compiles the per-route configuration.
    pub compile_route: CompileRouteConfig,
}

impl fmt::Debug for HttpFilterExtension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpFilterExtension").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a filter's configuration may refer to while it is compiled.
#[derive(Debug)]
pub struct FactoryContext<'a> {
    /// The stat scope of the enclosing object, e.g. `http.<stat_prefix>.`.
    pub stats: &'a Scope,
    /// The root of all statistics, for what is counted below no object.
    pub root: &'a Scope,
    /// Runtime keys.
    pub runtime: &'a Runtime,
    /// Identity of this proxy.
    pub node: &'a NodeInfo,
}

/// Who this proxy is (`Bootstrap.node` with the command line's overrides).
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    /// `node.id`.
    pub id: String,
    /// `node.cluster`.
    pub cluster: String,
    /// `node.locality.zone`.
    pub zone: String,
}
