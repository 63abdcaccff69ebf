//! Compiled listeners.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::google::protobuf::Any;
use waystation_filter_api::address::Address;
use waystation_filter_api::data_source;
use waystation_filter_api::runtime::RuntimeInteger;
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire::{self, type_name, unpack};
use waystation_format::AccessLog;
use waystation_listener_filters::ListenerFilter;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;
use waystation_tls::ServerContext;
use xxhash_rust::xxh64::{Xxh64, xxh64};

use super::chain_match::segment;
use super::chain_select::ChainSelector;
use super::load::Load;
use super::stats::{ListenerStats, WorkerListenerStats};
use crate::address::{self, SocketOption};
use crate::bootstrap::for_each_field;
use crate::context::{CompileContext, Need, Shared};
use crate::http::Hcm;
use crate::network::filters::{self, Before};
use crate::overload::{Admission, Overload};
use crate::tcp_proxy::TcpProxy;

const TLS_INSPECTOR: &str = "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector";

/// A compiled `envoy.config.listener.v3.Listener`.
#[derive(Debug)]
pub struct Listener {
    /// Its name; made up from the address when the configuration has none.
    pub name: Arc<str>,
    /// Where to listen, first the main address.
    pub addresses: Vec<ListenAddress>,
    /// Whether each worker has a socket of its own.
    pub reuse_port: bool,
    /// Whether connections are spread exactly over the workers.
    pub exact_balance: bool,
    /// Its open connections; an in-place update goes on with those of the listener that it updates.
    pub load: Arc<Load>,
    /// `false`: the listener only takes connections handed over by `use_original_dst`.
    pub bind_to_port: bool,
    /// Whether connections are handed to the listener that matches their original destination.
    pub use_original_dst: bool,
    /// Listen backlog.
    pub backlog: i32,
    /// Bytes buffered for a connection before its peer is made to wait.
    pub buffer_limit: usize,
    /// How long listener filters may wait for bytes; `None` is for ever.
    pub listener_filters_timeout: Option<Duration>,
    /// Go on with what is known when that time is over, rather than close.
    pub continue_on_timeout: bool,
    /// Filters that look at the first bytes.
    pub listener_filters: Vec<ListenerFilter>,
    /// Which chain takes a connection.
    pub selector: ChainSelector,
    /// The chains.
    pub chains: Vec<Arc<FilterChain>>,
    /// The chain for connections that no other matches.
    pub default_chain: Option<Arc<FilterChain>>,
    /// Whether connections count against the limit of the whole process.
    pub admission: Admission,
    /// What of the overload manager bears on the listener, which may have `bypass_overload_manager`.
    pub overload: Option<Arc<Overload>>,
    bypasses_overload: bool,
    /// Most connections at a time (`envoy.resource_limits.listener.<name>.connection_limit`).
    pub connection_limit: RuntimeInteger,
    /// Logs of connections that no network filter logs.
    pub access_log: Vec<AccessLog>,
    /// `INBOUND`, for `/drain_listeners?inboundonly`.
    pub inbound: bool,
    /// `drain_type: MODIFY_ONLY`: the listener ignores a failed health check. It drains with the process by
    /// `/drain_listeners`, as in Envoy.
    pub modify_only_drain: bool,
    /// Keep-alive probes of accepted sockets.
    pub tcp_keepalive: Option<socket2::TcpKeepalive>,
    /// The listener's metadata.
    pub metadata: Metadata,
    /// What it counts.
    pub stats: ListenerStats,
    /// What each worker counts.
    pub worker_stats: Vec<WorkerListenerStats>,
    /// Resources that must have arrived before it can serve.
    pub needs: Vec<Need>,
    /// Hash of everything but filter chains and what selects among them: equal hashes allow an in-place update.
    frame_hash: u64,
}

/// One address to listen on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ListenAddress {
    /// The address.
    pub address: Address,
    /// For a pipe, its permission bits.
    pub mode: Option<u32>,
    /// For `::`, whether IPv4 is taken as well.
    pub ipv4_compat: bool,
    /// Socket options, in order.
    pub options: Vec<SocketOption>,
}

/// A compiled filter chain. An update that leaves its configuration unchanged keeps the object and its connections.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name.
    pub name: Arc<str>,
    /// Hash of its configuration.
    pub hash: u64,
    /// TLS, if it ends here.
    pub tls: Option<ServerContext>,
    /// How long a handshake may take; `None` is for ever.
    pub connect_timeout: Option<Duration>,
    /// What sees the connection first.
    pub before: Before,
    /// What serves the connection.
    pub filters: NetworkFilter,
    /// The chain's metadata.
    pub metadata: Metadata,
    /// What its filters and TLS context refer to.
    pub needs: Vec<Need>,
}

/// The terminal network filter of a chain.
#[derive(Debug)]
pub enum NetworkFilter {
    /// `envoy.filters.network.http_connection_manager`.
    Http(Arc<Hcm>),
    /// `envoy.filters.network.tcp_proxy`.
    Tcp(Arc<TcpProxy>),
    /// `envoy.filters.network.echo`.
    Echo,
    /// `envoy.filters.network.direct_response`: these bytes, then close.
    DirectResponse(bytes::Bytes),
    /// No filters: the connection is closed.
    None,
}

impl Listener {
    /// Whether `stop_accepting_connections` is in force.
    pub fn stops_accepting(&self) -> bool {
        let level = self.overload.as_ref().and_then(|overload| overload.stop_accepting_connections.as_ref());
        level.is_some_and(|level| level.is_saturated())
    }

    /// Compiles a listener. Chains whose configuration is unchanged are taken over from `previous`: what has changed is told
    /// by `wire`, the encoded form.
    pub fn compile(
        proto: &pb::Listener,
        wire: &[u8],
        previous: Option<&Self>,
        context: &CompileContext<'_>,
        concurrency: u32,
    ) -> Result<Self, ConfigError> {
        reject_unsupported(proto)?;
        let addresses = addresses(proto)?;
        let name: Arc<str> = match proto.name.as_str() {
            "" => addresses[0].address.to_string().into(),
            name => name.into(),
        };
        let shared = context.shared;
        let stat_name = match proto.stat_prefix.as_str() {
            "" => addresses[0].address.to_string().replace(':', "_"),
            prefix => prefix.to_owned(),
        };
        let scope = shared.stats.root().scope("listener").tag("envoy.listener_address", &stat_name);

        let mut listener_filters = Vec::with_capacity(proto.listener_filters.len());
        for (i, filter) in proto.listener_filters.iter().enumerate() {
            let compiled =
                listener_filter(filter, shared).at(|| named("listener_filters", &filter.name, i))?;
            listener_filters.extend(compiled);
        }

        if needs_tls_inspector(proto) {
            tracing::warn!(
                target: "config",
                "adding listener '{name}': filter chain match rules require TLS Inspector listener filter, but it isn't \
                 configured, injecting it"
            );
            let (root, runtime) = (shared.stats.root(), &shared.runtime);
            listener_filters.push(ListenerFilter::compile(TLS_INSPECTOR, &[], &root, runtime)?);
        }

        let selector = ChainSelector::compile(proto, &shared.runtime)?;
        if proto.filter_chains.is_empty() && proto.default_filter_chain.is_none() {
            return Err(ConfigError::field("filter_chains", "no filter chains specified"));
        }
        let buffer_limit = wire::buffer_limit(proto.per_connection_buffer_limit_bytes.as_ref());
        let hashes = Hashes::of(wire)?;
        let frame_hash = hashes.frame;
        // Envoy replaces a listener as a whole when only its default chain is left.
        let updated = |previous: &&Self| previous.frame_hash == frame_hash && !proto.filter_chains.is_empty();
        let load = match previous.filter(updated) {
            Some(updated) => Arc::clone(&updated.load),
            None => Arc::new(Load::new(concurrency)),
        };
        let overload = shared.overload.of_listener(proto.bypass_overload_manager);
        // Chains have both compiled in.
        let previous = previous.filter(|previous| {
            previous.buffer_limit == buffer_limit
                && previous.bypasses_overload == proto.bypass_overload_manager
        });
        let inner = || {
            CompileContext::with_buffer_limit(shared, buffer_limit)
                .bypassing_overload(proto.bypass_overload_manager)
        };
        let chain = |chain, hash| FilterChain::compile(chain, hash, previous, &scope, inner());
        let mut chains = Vec::with_capacity(proto.filter_chains.len());
        for (i, (proto_chain, hash)) in proto.filter_chains.iter().zip(hashes.chains).enumerate() {
            chains.push(chain(proto_chain, hash).at(|| segment(&proto.filter_chains, i))?);
        }
        let default_chain = proto.default_filter_chain.as_ref();
        let default_chain = default_chain.map(|proto| chain(proto, hashes.default_chain)).transpose();
        let default_chain = default_chain.at(|| "default_filter_chain")?;

        let mut access_log = Vec::with_capacity(proto.access_log.len());
        for (i, log) in proto.access_log.iter().enumerate() {
            let compiled = AccessLog::compile(log, &shared.access_logs, &shared.runtime);
            access_log.push(compiled.at(|| format!("access_log[{i}]"))?);
        }
        let needs = chains.iter().chain(&default_chain).flat_map(|chain| chain.needs.clone()).collect();
        let exact_balance = match &proto.connection_balance_config {
            None => false,
            Some(config) => match &config.balance_type {
                Some(pb::listener::connection_balance_config::BalanceType::ExactBalance(_)) => true,
                _ => {
                    let path = "connection_balance_config";
                    return Err(ConfigError::field(path, "only exact_balance is supported"));
                }
            },
        };
        let limit_key = format!("envoy.resource_limits.listener.{name}.connection_limit");
        let worker_scope = |worker: u32| scope.worker(worker);
        let timeout = wire::duration("listener_filters_timeout", proto.listener_filters_timeout.as_ref())?
            .unwrap_or(Duration::from_secs(15));
        let is_pipe = addresses.iter().any(|address| address.address.ip().is_none());
        Ok(Self {
            frame_hash,
            stats: scope.group::<ListenerStats>(),
            worker_stats: (0..concurrency)
                .map(|worker| worker_scope(worker).group::<WorkerListenerStats>())
                .collect(),
            reuse_port: proto.enable_reuse_port.as_ref().is_none_or(|flag| flag.value) && !is_pipe,
            exact_balance: exact_balance && !is_pipe,
            admission: match proto.ignore_global_conn_limit || proto.bypass_overload_manager {
                true => Admission::Exempt,
                false => Admission::Limited,
            },
            overload,
            bypasses_overload: proto.bypass_overload_manager,
            load,
            bind_to_port: proto.bind_to_port.as_ref().is_none_or(|flag| flag.value),
            use_original_dst: proto.use_original_dst.as_ref().is_some_and(|flag| flag.value),
            backlog: proto
                .tcp_backlog_size
                .as_ref()
                .map_or(Ok(4096), |size| i32::try_from(size.value))
                .map_err(|_| ConfigError::field("tcp_backlog_size", "too large"))?,
            buffer_limit,
            listener_filters_timeout: Some(timeout).filter(|timeout| !timeout.is_zero()),
            continue_on_timeout: proto.continue_on_listener_filters_timeout,
            listener_filters,
            selector,
            chains,
            default_chain,
            connection_limit: shared.runtime.integer(&limit_key, u64::MAX),
            access_log,
            inbound: proto.traffic_direction() == core::TrafficDirection::Inbound,
            modify_only_drain: proto.drain_type() == pb::listener::DrainType::ModifyOnly,
            tcp_keepalive: proto.tcp_keepalive.as_ref().map(address::keepalive),
            metadata: proto.metadata.as_ref().map(Metadata::from_proto).unwrap_or_default(),
            needs,
            name,
            addresses,
        })
    }

    /// Whether it takes the place of `old` in place: with its sockets, and the connections of chains that both have.
    pub fn updates(&self, old: &Self) -> bool {
        Arc::ptr_eq(&self.load, &old.load)
    }

    /// All chains, the default one last.
    pub fn all_chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.chains.iter().chain(&self.default_chain)
    }
}

/// Whether a chain is matched by what only a ClientHello tells, and nothing looks at it. Envoy adds the inspector then.
fn needs_tls_inspector(proto: &pb::Listener) -> bool {
    let has_inspector = proto.listener_filters.iter().any(|filter| match &filter.config_type {
        Some(pb::listener_filter::ConfigType::TypedConfig(any)) => type_name(any) == TLS_INSPECTOR,
        _ => false,
    });
    let needs = |matcher: &pb::FilterChainMatch| match matcher.transport_protocol.as_str() {
        "tls" => true,
        "" => !matcher.server_names.is_empty() || !matcher.application_protocols.is_empty(),
        _ => false,
    };
    !has_inspector
        && proto.filter_chains.iter().filter_map(|chain| chain.filter_chain_match.as_ref()).any(needs)
}

/// Fields of which the whole is refused in this version.
#[expect(deprecated, reason = "old configurations still name it")]
fn reject_unsupported(proto: &pb::Listener) -> Result<(), ConfigError> {
    let refuse = |set: bool, field: &str, reason: &str| {
        if set { Err(ConfigError::field(field, reason)) } else { Ok(()) }
    };
    refuse(proto.stats_matcher.is_some(), "stats_matcher", "not supported: set it in the bootstrap")?;
    refuse(proto.fcds_config.is_some(), "fcds_config", "filter chain discovery is not supported")?;
    refuse(
        proto.per_connection_buffer_high_watermark_timeout.is_some(),
        "per_connection_buffer_high_watermark_timeout",
        "not supported",
    )?;
    refuse(
        proto.deprecated_v1.as_ref().is_some_and(|v1| v1.bind_to_port.is_some()),
        "deprecated_v1",
        "use bind_to_port",
    )?;
    refuse(proto.udp_listener_config.is_some(), "udp_listener_config", "UDP and QUIC are not supported")?;
    refuse(proto.api_listener.is_some(), "api_listener", "API listeners are not supported")?;
    refuse(proto.enable_mptcp, "enable_mptcp", "MPTCP is not supported")?;
    refuse(
        matches!(proto.listener_specifier, Some(pb::listener::ListenerSpecifier::InternalListener(_))),
        "internal_listener",
        "internal listeners are not supported in this version",
    )
}

/// The listener's own address and the additional ones, each with its socket options.
fn addresses(proto: &pb::Listener) -> Result<Vec<ListenAddress>, ConfigError> {
    let mut common = Vec::new();
    if proto.transparent.as_ref().is_some_and(|flag| flag.value) {
        common.push(SocketOption::Transparent);
    }
    if proto.freebind.as_ref().is_some_and(|flag| flag.value) {
        common.push(SocketOption::Freebind);
    }
    if let Some(length) = &proto.tcp_fast_open_queue_length {
        common.push(SocketOption::FastOpen(length.value));
    }
    let options = |own: &[core::SocketOption]| -> Result<Vec<SocketOption>, ConfigError> {
        let own = address::socket_options(own).at(|| "socket_options")?;
        Ok(common.iter().cloned().chain(own).collect())
    };
    let main = proto.address.as_ref().ok_or_else(|| ConfigError::field("address", "is required"))?;
    let main_options = options(&proto.socket_options)?;
    let mut all = vec![listen_address(main, main_options.clone()).at(|| "address")?];
    for (i, additional) in proto.additional_addresses.iter().enumerate() {
        let compile = || {
            let address = additional.address.as_ref();
            let address = address.ok_or_else(|| ConfigError::field("address", "is required"))?;
            let own = match &additional.socket_options {
                Some(own) => options(&own.socket_options)?,
                None => main_options.clone(),
            };
            if additional.tcp_keepalive.is_some() {
                return Err(ConfigError::field("tcp_keepalive", "set it on the listener"));
            }
            listen_address(address, own).at(|| "address")
        };
        all.push(compile().at(|| format!("additional_addresses[{i}]"))?);
    }
    Ok(all)
}

fn listen_address(proto: &core::Address, options: Vec<SocketOption>) -> Result<ListenAddress, ConfigError> {
    let mut listen =
        ListenAddress { address: address::listen(proto)?, mode: None, ipv4_compat: false, options };
    match &proto.address {
        Some(core::address::Address::SocketAddress(socket)) => listen.ipv4_compat = socket.ipv4_compat,
        Some(core::address::Address::Pipe(pipe)) => listen.mode = Some(pipe.mode).filter(|mode| *mode != 0),
        _ => {}
    }
    Ok(listen)
}

/// A listener filter; `None` when `filter_disabled` is `any_match`, the one predicate that needs no evaluation.
fn listener_filter(
    proto: &pb::ListenerFilter,
    shared: &Shared,
) -> Result<Option<ListenerFilter>, ConfigError> {
    use pb::listener_filter_chain_match_predicate::Rule;
    if let Some(predicate) = &proto.filter_disabled {
        return match &predicate.rule {
            Some(Rule::AnyMatch(true)) => Ok(None),
            _ => Err(ConfigError::field("filter_disabled", "only any_match is supported in this version")),
        };
    }
    match &proto.config_type {
        Some(pb::listener_filter::ConfigType::TypedConfig(any)) => {
            ListenerFilter::compile(type_name(any), &any.value, &shared.stats.root(), &shared.runtime)
                .at(|| "typed_config")
                .map(Some)
        }
        Some(pb::listener_filter::ConfigType::ConfigDiscovery(_)) => {
            Err(ConfigError::field("config_discovery", "not supported for listener filters"))
        }
        None => Err(ConfigError::field("typed_config", "is required")),
    }
}

impl FilterChain {
    #[expect(deprecated, reason = "old configurations still name it")]
    fn compile(
        proto: &pb::FilterChain,
        hash: u64,
        previous: Option<&Listener>,
        scope: &Scope,
        context: CompileContext<'_>,
    ) -> Result<Arc<Self>, ConfigError> {
        // What selects the chain is part of it: connections of a chain that is matched differently drain, as in Envoy.
        let same = |chain: &&Arc<Self>| chain.hash == hash && *chain.name == *proto.name;
        if let Some(kept) = previous.and_then(|listener| listener.all_chains().find(same)) {
            return Ok(Arc::clone(kept));
        }
        if proto.use_proxy_proto.as_ref().is_some_and(|flag| flag.value) {
            return Err(ConfigError::field("use_proxy_proto", "use the proxy_protocol listener filter"));
        }
        let tls = match &proto.transport_socket {
            None => None,
            Some(socket) => {
                transport_socket(socket, scope, &context).at(|| "typed_config").at(|| "transport_socket")?
            }
        };
        let (before, filters) = network_filters(&proto.filters, scope, &context)?;
        let connect_timeout = wire::duration(
            "transport_socket_connect_timeout",
            proto.transport_socket_connect_timeout.as_ref(),
        )?;
        Ok(Arc::new(Self {
            name: proto.name.as_str().into(),
            hash,
            tls,
            connect_timeout: connect_timeout.filter(|timeout| !timeout.is_zero()),
            before,
            filters,
            metadata: proto.metadata.as_ref().map(Metadata::from_proto).unwrap_or_default(),
            needs: context.into_needs(),
        }))
    }
}

fn transport_socket(
    socket: &core::TransportSocket,
    scope: &Scope,
    context: &CompileContext<'_>,
) -> Result<Option<ServerContext>, ConfigError> {
    let Some(core::transport_socket::ConfigType::TypedConfig(any)) = &socket.config_type else {
        return Err(ConfigError::new("is required"));
    };
    match type_name(any) {
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext" => {
            let proto: tls::DownstreamTlsContext = unpack(any)?;
            ServerContext::compile(&proto, context, scope).map(Some)
        }
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(None),
        other => Err(ConfigError::new(format!("unknown downstream transport socket type '{other}'"))),
    }
}

/// Terminal filters, the only ones that may come last, and must.
const TERMINAL: [&str; 4] = [
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
    "envoy.extensions.filters.network.echo.v3.Echo",
    "envoy.extensions.filters.network.direct_response.v3.Config",
];

fn network_filters(
    protos: &[pb::Filter],
    scope: &Scope,
    context: &CompileContext<'_>,
) -> Result<(Before, NetworkFilter), ConfigError> {
    let (mut before, mut terminal) = (Vec::new(), NetworkFilter::None);
    for (i, proto) in protos.iter().enumerate() {
        let mut compile = || {
            let any = match &proto.config_type {
                Some(pb::filter::ConfigType::TypedConfig(any)) => any,
                Some(pb::filter::ConfigType::ConfigDiscovery(_)) => {
                    return Err(ConfigError::field("config_discovery", "not supported for network filters"));
                }
                None => return Err(ConfigError::new("has no typed_config")),
            };
            let is_terminal = TERMINAL.contains(&type_name(any));
            if !is_terminal {
                let Some(compiled) = filters::compile(any, context) else {
                    let reason = format!("unknown network filter type '{}'", type_name(any));
                    return Err(ConfigError::new(reason).at("typed_config"));
                };
                before.push(compiled?);
            }
            let is_last = i + 1 == protos.len();
            if is_terminal != is_last {
                let (kind, place) = match is_terminal {
                    true => ("terminal", "must be"),
                    false => ("non-terminal", "is"),
                };
                let name = &proto.name;
                return Err(ConfigError::new(format!(
                    "Error: {kind} filter named {name} of type {name} {place} the last filter in a network filter chain."
                )));
            }
            if is_terminal {
                terminal = terminal_filter(any, scope, context).at(|| "typed_config")?;
            }
            Ok(())
        };
        compile().at(|| named("filters", &proto.name, i))?;
    }
    let half_close = matches!(terminal, NetworkFilter::Tcp(_) | NetworkFilter::Echo);
    Ok((Before::new(before, context.buffer_limit(), half_close), terminal))
}

fn terminal_filter(
    any: &Any,
    scope: &Scope,
    context: &CompileContext<'_>,
) -> Result<NetworkFilter, ConfigError> {
    match type_name(any) {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            Hcm::compile(&unpack(any)?, scope, context).map(|manager| NetworkFilter::Http(Arc::new(manager)))
        }
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
            TcpProxy::compile(&unpack(any)?, context).map(|proxy| NetworkFilter::Tcp(Arc::new(proxy)))
        }
        "envoy.extensions.filters.network.direct_response.v3.Config" => {
            let proto: network::direct_response::v3::Config = unpack(any)?;
            let body = data_source::read(proto.response.as_ref()).at(|| "response")?.unwrap_or_default();
            Ok(NetworkFilter::DirectResponse(body.bytes.into()))
        }
        _ => Ok(NetworkFilter::Echo),
    }
}

fn named(list: &str, name: &str, index: usize) -> String {
    if name.is_empty() { format!("{list}[{index}]") } else { format!("{list}[{name}]") }
}

/// Of the encoded listener, which has one form: a decoded one has its maps in an order that differs each time.
#[derive(Debug, Eq, PartialEq)]
struct Hashes {
    /// What must be equal for an update to keep the sockets and the connections of unchanged chains.
    frame: u64,
    /// Of each chain, in order.
    chains: Vec<u64>,
    default_chain: u64,
}

impl Hashes {
    fn of(wire: &[u8]) -> Result<Self, ConfigError> {
        /// Fields of `Listener`.
        const FILTER_CHAINS: u32 = 3;
        const DEFAULT_FILTER_CHAIN: u32 = 25;
        const FILTER_CHAIN_MATCHER: u32 = 32;
        let (mut frame, mut default_chain) = (Xxh64::new(0), Xxh64::new(0));
        let mut chains = Vec::new();
        for_each_field(wire, &mut |number, whole, payload| {
            match number {
                FILTER_CHAINS => chains.push(xxh64(payload, 0)),
                // Once, or in parts that merge.
                DEFAULT_FILTER_CHAIN => default_chain.update(payload),
                FILTER_CHAIN_MATCHER => {}
                _ => frame.update(whole),
            }
            Ok(())
        })
        .map_err(|error| ConfigError::new(error.to_string()))?;
        Ok(Self { frame: frame.digest(), chains, default_chain: default_chain.digest() })
    }
}
