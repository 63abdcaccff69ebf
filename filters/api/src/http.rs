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
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::Any as AnyProto;
use waystation_http::Headers;
use waystation_schema::ConfigError;
use waystation_stats::Scope;

use crate::client::{Clients, Clusters};
use crate::runtime::Runtime;
use crate::singletons::Singletons;
use crate::stream::StreamInfo;
use crate::value::Struct;

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
    /// Hold as with [`Hold::Watermark`] and wait for the future, then do as it says. For the rare phase that must ask
    /// somebody. A stream that ends meanwhile drops the future.
    Wait(LocalFuture<Flow>),
    /// After a wait or a pause: show this filter once more what it holds: the head in `decode_headers`, all of the data in
    /// `decode_data`, the trailers in `decode_trailers`, and likewise for a response. So a filter that has got its answer
    /// may change what it held. From a phase itself it is [`Flow::Continue`].
    Again,
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
            Self::Again => f.write_str("Again"),
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
    /// `encode_informational` and `encode_headers`, of upstream's responses and of local replies.
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
    /// The request head, in every phase but `decode_headers`. A change has an effect upstream as long as this filter holds
    /// the head, and on whoever looks at the request afterwards, such as access logs.
    pub request: Option<&'a mut Headers>,
    /// The response head, in `encode_data` and `encode_trailers`. A change has an effect as long as this filter holds the
    /// head.
    pub response: Option<&'a mut Headers>,
    /// The configuration of this filter on the stream's route, most specific level first; empty when no level
    /// has one.
    pub route_config: &'a [FilterConfig],
    /// The name of this filter in its chain: of its configuration on routes, and of what it writes to metadata.
    pub name: &'a str,
    /// Time, waits and whatever else is outside the stream.
    pub driver: &'a dyn Driver,
    factory: &'a dyn HttpFilterFactory,
    asked: &'a mut Asked,
}

/// What a phase has asked of the driver beside its [`Flow`].
#[derive(Default)]
pub struct Asked {
    /// The route is to be selected anew.
    pub clear_route: bool,
    /// The most bytes of request body that the chain may hold.
    pub request_buffer_limit: Option<usize>,
    /// Data that go on ahead of what the phase was shown.
    pub ahead: Vec<Bytes>,
    /// The instance that takes the place of the one asked.
    pub successor: Option<Box<dyn HttpFilter>>,
    /// Further phases that it wants.
    pub phases: Phases,
    /// Who makes the filters that are to stand beside this one.
    pub delegates: Vec<Arc<dyn HttpFilterFactory>>,
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { clear_route, request_buffer_limit, ahead, successor, phases, delegates } = self;
        f.debug_struct("Asked")
            .field("clear_route", clear_route)
            .field("request_buffer_limit", request_buffer_limit)
            .field("ahead", ahead)
            .field("successor", &successor.is_some())
            .field("phases", phases)
            .field("delegates", delegates)
            .finish()
    }
}

impl<'a> StreamCx<'a> {
    /// Assembled by the driver for each phase of an instance that `factory` has made.
    pub fn new(
        info: &'a mut StreamInfo,
        route_config: &'a [FilterConfig],
        factory: &'a dyn HttpFilterFactory,
        driver: &'a dyn Driver,
        asked: &'a mut Asked,
    ) -> Self {
        Self { info, request: None, response: None, route_config, name: "", driver, factory, asked }
    }

    /// The factory that has made this instance: what all streams share need not be copied to each.
    ///
    /// # Panics
    /// When asked for another type than that of the factory.
    #[inline]
    pub fn config<T: HttpFilterFactory>(&self) -> &'a T {
        let factory: &'a dyn Any = self.factory;
        factory.downcast_ref().expect("a filter asks for the factory that has made it")
    }

    /// The configuration of the route's most specific level that has one of this type.
    #[inline]
    pub fn most_specific<T: Any>(&self) -> Option<&'a T> {
        most_specific(self.route_config)
    }

    /// Calls a phase of `filter`, an instance that `factory` has made, in this one's place, as wrappers of filters do. A
    /// successor that it names stands in `filter` afterwards.
    pub fn of<R>(
        &mut self,
        factory: &dyn HttpFilterFactory,
        filter: &mut Box<dyn HttpFilter>,
        phase: impl FnOnce(&mut dyn HttpFilter, &mut StreamCx<'_>) -> R,
    ) -> R {
        let mut inner = StreamCx {
            info: self.info,
            request: self.request.as_deref_mut(),
            response: self.response.as_deref_mut(),
            route_config: self.route_config,
            name: self.name,
            driver: self.driver,
            factory,
            asked: self.asked,
        };
        let result = phase(&mut **filter, &mut inner);
        if let Some(successor) = self.asked.successor.take() {
            *filter = successor;
        }
        result
    }

    /// Has another instance of the same factory's take this one's place from the next phase on, which wants these phases as
    /// well. So a filter that finds nothing to do for a stream has cost it neither memory nor phases.
    pub fn succeed_by(&mut self, filter: Box<dyn HttpFilter>, phases: Phases) {
        self.asked.successor = Some(filter);
        self.asked.phases = self.asked.phases.union(phases);
    }

    /// Has filters of these factories stand beside this one from now on, in this order, under its name: they see next what this
    /// phase was shown, if its message goes on, and whatever follows. No phases but those of heads, data and trailers
    /// may ask for it.
    pub fn delegate_to(&mut self, factories: impl IntoIterator<Item = Arc<dyn HttpFilterFactory>>) {
        self.asked.delegates.extend(factories);
    }

    /// A handle that ends this filter's pause.
    pub fn resume_handle(&self) -> Resume {
        self.driver.resume_handle()
    }

    /// The time.
    pub fn now(&self) -> Instant {
        self.driver.now()
    }

    /// A random number of the worker's.
    pub fn random(&self) -> u64 {
        self.driver.random()
    }

    /// Has the route selected anew, after a filter changed what it depends on.
    pub fn clear_route_cache(&mut self) {
        self.asked.clear_route = true;
    }

    /// Sets the most bytes of request body that filters of this stream may hold ([`Hold::Buffer`]), in place of the
    /// listener's limit, be it less or more.
    pub fn set_request_buffer_limit(&mut self, bytes: usize) {
        self.asked.request_buffer_limit = Some(bytes);
    }

    /// Sends data on ahead of what this phase was shown, whatever the phase returns: body of the filter's own before the
    /// trailers, or the part of a body that may go while the rest is held. The head goes first if the filter holds it. In
    /// `decode_headers` and `encode_headers`, which have nothing ahead of them, it is without effect.
    pub fn pass_on(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.asked.ahead.push(data);
        }
    }
}

/// The first configuration of this type: that of the most specific level.
pub fn most_specific<T: Any>(route_config: &[FilterConfig]) -> Option<&T> {
    route_config.iter().find_map(|config| config.downcast_ref())
}

impl fmt::Debug for StreamCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamCx").field("info", &self.info).finish_non_exhaustive()
    }
}

/// What the data plane does for a filter. What it starts lives on the stream's worker, and ends when its future is dropped.
pub trait Driver {
    /// The time of this turn of the stream's task.
    fn now(&self) -> Instant;

    /// A random number of the worker's.
    fn random(&self) -> u64;

    /// Ready after `duration`.
    fn sleep(&self, duration: Duration) -> LocalFuture<()>;

    /// A handle that ends the pause of the filter whose phase this is; the same handle each time.
    fn resume_handle(&self) -> Resume;

    /// Whether the operator has failed the health check of this proxy (`/healthcheck/fail`).
    fn is_health_check_failed(&self) -> bool;

    /// How many hosts a cluster has; nothing when there is no such cluster.
    fn membership(&self, cluster: &str) -> Option<Membership>;

    /// The worker's client to clusters, for a future to own.
    fn clients(&self) -> Rc<dyn Clients>;

    /// Fetches the virtual host of `head` by VHDS, or the route configuration of its scope. Nothing when there is nothing to
    /// fetch.
    fn fetch_route(&self, head: &Headers) -> Option<LocalFuture<Fetched>>;

    /// Fetches the cluster that the stream's route sends `head` to. Nothing when there is nothing to fetch.
    fn fetch_cluster(&self, source: &Arc<ClusterSource>, head: &Headers) -> Option<LocalFuture<Fetched>>;

    /// The name of the cluster that the stream's route sends `head` to, whether there is such a cluster or not.
    fn cluster_name<'a>(&'a self, _head: &'a Headers) -> Option<&'a str> {
        None
    }
}

/// The hosts of a cluster, by their health.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Membership {
    /// All of them.
    pub total: u64,
    /// Those that get requests.
    pub healthy: u64,
    /// Those that get requests when the healthy ones do not suffice.
    pub degraded: u64,
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

/// One filter on one stream. What it shares with other streams is in its factory ([`StreamCx::config`]): an instance without
/// state of its own takes no memory.
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

    /// An informational response (1xx) of upstream's, on its way to the client. It is not held up.
    fn encode_informational(&mut self, _cx: &mut StreamCx<'_>, _head: &mut Headers) {}

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

    /// A matcher around this filter has come to this action (`onMatchCallback`).
    fn on_match(&mut self, _cx: &mut StreamCx<'_>, _action: &dyn Any) {}

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

    /// Takes the first `at` bytes.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn split_to(&mut self, at: usize) -> Bytes {
        match self {
            Self::Shared(bytes) => bytes.split_to(at),
            Self::Owned(bytes) => bytes.split_to(at).freeze(),
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
pub trait HttpFilterFactory: Any + fmt::Debug + Send + Sync {
    /// The phases an instance wants.
    fn phases(&self) -> Phases;

    /// The factory that makes the instances in place of this one, if this is a place that others fill. Asked once for each
    /// stream.
    fn in_force(&self) -> Option<Arc<dyn HttpFilterFactory>> {
        None
    }

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
pub struct FactoryContext<'a> {
    /// The stat scope of the enclosing object, e.g. `http.<stat_prefix>.`.
    pub stats: &'a Scope,
    /// The root of all statistics, for what is counted below no object.
    pub root: &'a Scope,
    /// Runtime keys.
    pub runtime: &'a Runtime,
    /// Identity of this proxy.
    pub node: &'a NodeInfo,
    /// The cluster that this proxy is a member of, if it has been told (`cluster_manager.local_cluster_name`).
    pub local_cluster: Option<&'a Arc<dyn LocalCluster>>,
    /// What extensions share between their configurations.
    pub singletons: &'a Singletons,
    /// Compiles the filters that stand inside others.
    pub filters: &'a dyn InnerFilters,
    /// Clusters that the filter calls.
    pub clusters: &'a dyn Clusters,
}

impl fmt::Debug for FactoryContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FactoryContext").field("stats", &self.stats).finish_non_exhaustive()
    }
}

/// Compiles filters that stand inside the configuration of another one.
pub trait InnerFilters {
    /// Compiles the configuration of the filter `name`, of whatever type it is.
    ///
    /// # Errors
    /// When nobody knows the type, or the configuration is invalid.
    fn compile(
        &self,
        name: &str,
        config: Option<&AnyProto>,
    ) -> Result<Arc<dyn HttpFilterFactory>, ConfigError>;

    /// A place for the filter `name`, whose configuration comes by ECDS.
    ///
    /// # Errors
    /// When the source is invalid, or where nothing can be discovered.
    fn discover(
        &self,
        name: &str,
        source: &core::ExtensionConfigSource,
    ) -> Result<Arc<dyn HttpFilterFactory>, ConfigError>;
}

/// There are no inner filters.
impl InnerFilters for () {
    fn compile(&self, _: &str, _: Option<&AnyProto>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
        Err(ConfigError::new("there are no inner filters here"))
    }

    fn discover(
        &self,
        _: &str,
        _: &core::ExtensionConfigSource,
    ) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
        Err(ConfigError::new("there are no inner filters here"))
    }
}

/// The cluster that this proxy is a member of.
pub trait LocalCluster: fmt::Debug + Send + Sync {
    /// How many there are, this proxy among them.
    fn members(&self) -> u64;
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
    /// `node.metadata`.
    pub metadata: Struct,
}
