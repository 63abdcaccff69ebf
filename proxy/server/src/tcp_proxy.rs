//! `envoy.filters.network.tcp_proxy`.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as pb;
use envoy_types::pb::envoy::r#type::v3 as types;
use prost::Message as _;
use waystation_filter_api::address::Address;
use waystation_filter_api::cell::Cell;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::http::ClusterSource;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire;
use waystation_format::{AccessLog, AccessLogType, FormatContext};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::stats_group;
use waystation_upstream::jitter::{back_off, spread};
use waystation_upstream::load_balancer::OriginalDestination;
use waystation_upstream::outlier::LocalOrigin;
use waystation_upstream::{Cluster, ClusterStats, MetadataMatch, PickContext};
use xxhash_rust::xxh64::xxh64;

use crate::config_source;
use crate::context::CompileContext;
use crate::duplex::{self, End, Limits};
use crate::manager::on_demand;
use crate::manager::subscription_stats::SubscriptionStats;
use crate::on_demand::{Answer, Places, Wanted};
use crate::overload::Overload;
use crate::pool::connect::{ConnectError, ConnectOptions, ConnectionGuard, connect};
use crate::transport::{Socket, Transport};
use crate::worker::Worker;

mod shedding;

use shedding::Shedding;

/// Envoy's default idle timeout of a session.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

stats_group! {
    /// `tcp.<stat_prefix>.`
    ///
    /// Nothing writes `*_bytes_buffered`: the buffer between the two sides is one, of 16 KiB, and empty unless a side is
    /// paused, which the flow control counters tell. Nothing is flushed to upstream after downstream is gone
    /// (`upstream_flush_*`): both are closed together.
    pub struct TcpStats {
        counters {
            downstream_cx_drain_close,
            downstream_cx_no_route,
            downstream_cx_overload_close,
            downstream_cx_rx_bytes_total,
            downstream_cx_total,
            downstream_cx_tx_bytes_total,
            downstream_flow_control_paused_reading_total,
            downstream_flow_control_resumed_reading_total,
            early_data_received_count_total,
            idle_timeout,
            max_downstream_connection_duration,
            route_delayed_total,
            upstream_flush_total,
        }
        gauges { downstream_cx_rx_bytes_buffered, downstream_cx_tx_bytes_buffered, upstream_flush_active }
        histograms {}
    }
}

stats_group! {
    /// `tcp.<stat_prefix>.`, when clusters are fetched on demand.
    pub struct OnDemandStats {
        counters {
            on_demand_cluster_attempt,
            on_demand_cluster_missing,
            on_demand_cluster_success,
            on_demand_cluster_timeout,
        }
        gauges {}
        histograms {}
    }
}

/// How unknown clusters are fetched.
#[derive(Debug)]
struct Discovery {
    source: Arc<ClusterSource>,
    stats: OnDemandStats,
    places: Arc<Places>,
    /// Held for the statistics to be there.
    _subscription: SubscriptionStats,
}

/// How long a connection waits for its cluster when the configuration does not say.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(60);

/// A compiled `TcpProxy`.
#[derive(Debug)]
pub struct TcpProxy {
    /// Where connections go; more than one with `weighted_clusters`.
    targets: Vec<Target>,
    total_weight: u64,
    idle_timeout: Option<Duration>,
    max_duration: Option<Duration>,
    /// Percent by which the maximal duration is spread.
    max_duration_jitter: f64,
    max_connect_attempts: u32,
    /// Base and maximum of the wait between attempts, which otherwise follow at once.
    back_off: Option<(Duration, Duration)>,
    hash_source_ip: bool,
    access_log: Vec<AccessLog>,
    log_on_start: bool,
    log_on_connect: bool,
    log_interval: Option<Duration>,
    on_demand: Option<Discovery>,
    /// The overload manager, where it bears on the listener.
    overload: Option<Arc<Overload>>,
    stats: TcpStats,
}

#[derive(Debug)]
struct Target {
    cluster: Arc<Cell<Cluster>>,
    weight: u64,
    metadata_match: Option<MetadataMatch>,
}

impl TcpProxy {
    /// Compiles the filter.
    #[expect(deprecated, reason = "old configurations still name it")]
    pub fn compile(proto: &pb::TcpProxy, context: &CompileContext<'_>) -> Result<Self, ConfigError> {
        let refuse = |set: bool, field: &str, reason: &str| {
            if set { Err(ConfigError::field(field, reason)) } else { Ok(()) }
        };
        refuse(
            proto.tunneling_config.is_some(),
            "tunneling_config",
            "tunneling over HTTP is not supported in this version",
        )?;
        refuse(proto.downstream_idle_timeout.is_some(), "downstream_idle_timeout", "use idle_timeout")?;
        refuse(proto.upstream_idle_timeout.is_some(), "upstream_idle_timeout", "use idle_timeout")?;
        refuse(
            !proto.proxy_protocol_tlvs.is_empty(),
            "proxy_protocol_tlvs",
            "the upstream PROXY protocol is not supported in this version",
        )?;
        refuse(proto.upstream_connect_mode != 0, "upstream_connect_mode", "only IMMEDIATE is supported")?;
        refuse(
            proto.max_early_data_bytes.is_some(),
            "max_early_data_bytes",
            "only meaningful with upstream_connect_mode, which is not supported",
        )?;

        let stats = context.shared.stats.root().scope("tcp").tag("envoy.tcp_prefix", &proto.stat_prefix);
        let common = match_of(proto.metadata_match.as_ref()).at(|| "metadata_match")?;
        let targets = match &proto.cluster_specifier {
            Some(pb::tcp_proxy::ClusterSpecifier::Cluster(name)) => {
                vec![Target { cluster: context.cluster_cell(name), weight: 1, metadata_match: common }]
            }
            Some(pb::tcp_proxy::ClusterSpecifier::WeightedClusters(weighted)) => {
                let mut targets = Vec::with_capacity(weighted.clusters.len());
                for (i, cluster) in weighted.clusters.iter().enumerate() {
                    let own = match_of(cluster.metadata_match.as_ref())
                        .at(|| "metadata_match")
                        .at(|| format!("weighted_clusters.clusters[{i}]"))?;
                    targets.push(Target {
                        cluster: context.cluster_cell(&cluster.name),
                        weight: cluster.weight.into(),
                        metadata_match: own.or_else(|| common.clone()),
                    });
                }
                targets
            }
            None => return Err(ConfigError::field("cluster", "cluster or weighted_clusters is required")),
        };
        let hash_source_ip = hash_policy(&proto.hash_policy).at(|| "hash_policy")?;
        let mut access_log = Vec::with_capacity(proto.access_log.len());
        for (i, log) in proto.access_log.iter().enumerate() {
            let compiled = AccessLog::compile(log, &context.shared.access_logs, &context.shared.runtime);
            access_log.push(compiled.at(|| format!("access_log[{i}]"))?);
        }
        let options = proto.access_log_options.as_ref();
        // The two fields outside of the options are deprecated forms of those inside.
        let interval = options
            .and_then(|options| options.access_log_flush_interval.as_ref())
            .or(proto.access_log_flush_interval.as_ref());
        Ok(Self {
            total_weight: targets.iter().map(|target| target.weight).sum(),
            targets,
            idle_timeout: wire::timeout("idle_timeout", proto.idle_timeout.as_ref(), Some(IDLE_TIMEOUT))?,
            max_duration: wire::duration(
                "max_downstream_connection_duration",
                proto.max_downstream_connection_duration.as_ref(),
            )?,
            max_duration_jitter: proto
                .max_downstream_connection_duration_jitter_percentage
                .as_ref()
                .map_or(0.0, |percent| percent.value),
            max_connect_attempts: proto
                .max_connect_attempts
                .as_ref()
                .map_or(1, |attempts| attempts.value.max(1)),
            back_off: proto
                .backoff_options
                .as_ref()
                .map(back_off_bounds)
                .transpose()
                .at(|| "backoff_options")?,
            hash_source_ip,
            access_log,
            log_on_start: options.is_some_and(|options| options.flush_access_log_on_start),
            log_on_connect: proto.flush_access_log_on_connected
                || options.is_some_and(|options| options.flush_access_log_on_connected),
            log_interval: wire::duration("access_log_flush_interval", interval)?,
            on_demand: cluster_source(proto.on_demand.as_ref()).at(|| "on_demand")?.map(|source| Discovery {
                source,
                stats: stats.group(),
                places: Arc::default(),
                _subscription: on_demand::scope(&context.shared.stats.root()).group(),
            }),
            overload: context.overload(),
            stats: stats.group(),
        })
    }

    fn choose(&self, random: u64) -> Option<&Target> {
        let mut point = random.checked_rem(self.total_weight)?;
        self.targets.iter().find(|target| {
            let found = point < target.weight;
            point = point.saturating_sub(target.weight);
            found
        })
    }

    fn log(&self, info: &StreamInfo, log_type: AccessLogType, random: u64) {
        let cx = FormatContext {
            request: None,
            response: None,
            trailers: None,
            info,
            local_reply_body: "",
            log_type,
            now: Instant::now(),
        };
        for log in &self.access_log {
            log.log(&cx, random);
        }
    }
}

/// Where unknown clusters come from; without a source none are fetched.
fn cluster_source(
    proto: Option<&pb::tcp_proxy::OnDemand>,
) -> Result<Option<Arc<ClusterSource>>, ConfigError> {
    let Some(pb::tcp_proxy::OnDemand { odcds_config, resources_locator, timeout }) = proto else {
        return Ok(None);
    };
    if !resources_locator.is_empty() {
        return Err(ConfigError::field("resources_locator", "xdstp resource names are not supported"));
    }
    let Some(source) = odcds_config else { return Ok(None) };
    config_source::check_on_demand(source).at(|| "odcds_config")?;
    let timeout = wire::duration("timeout", timeout.as_ref())?.unwrap_or(CLUSTER_TIMEOUT);
    Ok(Some(Arc::new(ClusterSource { config: source.encode_to_vec().into(), timeout })))
}

/// The `envoy.lb` part of a metadata match.
fn match_of(proto: Option<&core::Metadata>) -> Result<Option<MetadataMatch>, ConfigError> {
    let metadata = proto.map(Metadata::from_proto).unwrap_or_default();
    match metadata.at::<&str>("envoy.lb", &[]) {
        Some(waystation_filter_api::value::Value::Struct(fields)) => MetadataMatch::compile(fields),
        _ => Ok(None),
    }
}

fn back_off_bounds(proto: &core::BackoffStrategy) -> Result<(Duration, Duration), ConfigError> {
    let core::BackoffStrategy { base_interval, max_interval } = proto;
    let base = wire::positive("base_interval", base_interval.as_ref())?;
    let base = base.ok_or_else(|| ConfigError::field("base_interval", "is required"))?;
    let max = wire::positive("max_interval", max_interval.as_ref())?.unwrap_or(base * 10);
    if max < base {
        let reason = "must be greater than or equal to the base_interval";
        return Err(ConfigError::field("max_interval", reason));
    }
    Ok((base, max))
}

/// Only the source address can be hashed; `filter_state` waits for filters that set it.
fn hash_policy(policies: &[types::HashPolicy]) -> Result<bool, ConfigError> {
    use types::hash_policy::PolicySpecifier;
    match policies {
        [] => Ok(false),
        [policy] => match &policy.policy_specifier {
            Some(PolicySpecifier::SourceIp(_)) => Ok(true),
            _ => Err(ConfigError::new("only source_ip is supported in this version").at("[0]")),
        },
        _ => Err(ConfigError::new("only one policy is supported")),
    }
}

/// Serves one connection.
pub async fn serve(
    worker: Rc<Worker>,
    proxy: &TcpProxy,
    mut transport: Transport,
    connection: Rc<ConnectionInfo>,
) {
    let mut logged = begin(&worker, proxy, connection);
    if proxy.log_on_start {
        proxy.log(&logged.info, AccessLogType::TcpConnectionStart, worker.random());
    }
    relay(&worker, proxy, &mut transport, &mut logged.info).await;
    // What a filter has kept for itself has been received nevertheless.
    let held_back = transport.held_back() as u64;
    proxy.stats.downstream_cx_rx_bytes_total().add(held_back);
    logged.info.bytes.body_received += held_back;
    logged.info.bytes.wire_received += held_back;
}

/// A connection that another network filter has ended before it came here: it is counted and logged.
pub fn count_connection(worker: &Worker, proxy: &TcpProxy, connection: Rc<ConnectionInfo>) {
    drop(begin(worker, proxy, connection));
}

fn begin<'a>(worker: &'a Worker, proxy: &'a TcpProxy, connection: Rc<ConnectionInfo>) -> Logged<'a> {
    proxy.stats.downstream_cx_total().inc();
    let start = connection.start;
    let start_time = SystemTime::now() - Instant::now().saturating_duration_since(start);
    Logged { worker, proxy, info: StreamInfo::new(connection.id, start, start_time, connection, None) }
}

/// Writes the last line of a connection however it ends: its listener's removal drops it where it stands.
struct Logged<'a> {
    worker: &'a Worker,
    proxy: &'a TcpProxy,
    info: StreamInfo,
}

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        self.info.timing.complete = Some(Instant::now());
        for flag in self.info.connection.flags.get().iter() {
            self.info.flags.set(flag);
        }
        self.proxy.log(&self.info, AccessLogType::TcpConnectionEnd, self.worker.random());
    }
}

async fn relay(worker: &Worker, proxy: &TcpProxy, down: &mut Transport, info: &mut StreamInfo) {
    let Some(target) = proxy.choose(worker.random()) else {
        proxy.stats.downstream_cx_no_route().inc();
        info.flags.set(ResponseFlag::NoRouteFound);
        return;
    };
    let deadline = proxy
        .max_duration
        .map(|longest| info.start + spread(longest, proxy.max_duration_jitter, worker.random()));
    let connected = tokio::select! {
        connected = establish(worker, proxy, target, down.socket(), info) => connected,
        // Who has only closed its own direction may wait for what upstream says.
        () = down.socket().reset() => return,
        () = until(deadline) => {
            proxy.stats.max_downstream_connection_duration().inc();
            info.flags.set(ResponseFlag::DurationTimeout);
            return;
        }
    };
    let Some((mut up, mut guard)) = connected else { return };
    if proxy.log_on_connect {
        proxy.log(info, AccessLogType::TcpUpstreamConnected, worker.random());
    }
    let host_fails = guard.host_fails();
    let end = tokio::select! {
        end = pump(worker, proxy, deadline, down, &mut up, info, &mut guard) => end,
        () = host_fails => {
            guard.active = true;
            return up.reset_on_close();
        }
    };
    match end {
        End::Closed => {}
        // Envoy counts it and sets no flag.
        End::Idle => proxy.stats.idle_timeout().inc(),
        End::Deadline => {
            proxy.stats.max_downstream_connection_duration().inc();
            info.flags.set(ResponseFlag::DurationTimeout);
        }
        End::Downstream(_) => guard.remote = false,
        End::Upstream(_) => {
            guard.remote = true;
            info.flags.set(ResponseFlag::UpstreamRemoteReset);
        }
    }
}

/// A connection to a host of the target's cluster; `None` when there is none, which `info` then tells.
async fn establish(
    worker: &Worker,
    proxy: &TcpProxy,
    target: &Target,
    client: &Socket,
    info: &mut StreamInfo,
) -> Option<(Transport, ConnectionGuard)> {
    let local = worker.cluster(&target.cluster);
    if let (None, Some(discovery)) = (local.get(), &proxy.on_demand) {
        // Who waits holds a place: not for a client that is gone.
        tokio::select! {
            answer = discovery.fetch(worker, target.cluster.name()) => if answer == Answer::Full {
                info.flags.set(ResponseFlag::UpstreamOverflow);
                return None;
            },
            () = client.gone() => return None,
        }
    }
    let Some(cluster) = local.get() else {
        proxy.stats.downstream_cx_no_route().inc();
        info.flags.set(ResponseFlag::NoClusterFound);
        return None;
    };
    info.upstream.cluster = Some(Rc::clone(&cluster) as _);
    let hash = proxy.hash_source_ip.then(|| source_hash(&info.connection.remote_address)).flatten();
    let point = proxy.overload.as_ref().and_then(|overload| overload.tcp_proxy_connect.as_deref());
    if point.is_some_and(|point| point.sheds(|| worker.random())) {
        info.flags.set(ResponseFlag::OverloadManagerTerminated);
        return None;
    }
    let mut attempts = 0;
    loop {
        let point = worker.shared.overload.get().and_then(|overload| overload.new_connection.as_deref());
        if point.is_some_and(|point| point.sheds(|| worker.random())) {
            info.flags.set(ResponseFlag::UpstreamOverflow);
            return None;
        }
        let destination = info.connection.local_address_restored.then_some(&info.connection.local_address);
        let pick = PickContext {
            hash,
            metadata_match: target.metadata_match.as_ref(),
            original_destination: Some(OriginalDestination {
                local_address: destination,
                ..Default::default()
            }),
            ..PickContext::default()
        };
        let Ok(host) = local.pick_host(worker, &cluster, &pick, Instant::now()) else {
            cluster.stats.upstream_cx_none_healthy().inc();
            info.flags.set(ResponseFlag::NoHealthyUpstream);
            return None;
        };
        let options = ConnectOptions { downstream: Some(&info.connection), ..ConnectOptions::default() };
        match connect(worker, &cluster, &host, options).await {
            Ok((transport, facts, guard)) => {
                cluster.local_origin(&host, LocalOrigin::ConnectedFinally);
                info.upstream.host = Some(Rc::clone(&host) as _);
                info.upstream.attempts = attempts + 1;
                info.upstream.local_address = facts.local_address;
                info.upstream.connection_id = Some(facts.id);
                info.upstream.tls = facts.tls;
                return Some((transport, guard));
            }
            Err(ConnectError::Overflow(_)) => {
                info.flags.set(ResponseFlag::UpstreamOverflow);
                return None;
            }
            Err(error) => {
                cluster.local_origin(
                    &host,
                    match error {
                        ConnectError::Timeout => LocalOrigin::TimedOut(504),
                        _ => LocalOrigin::ConnectFailed,
                    },
                );
                attempts += 1;
                info.upstream.attempts = attempts;
                info.upstream.host = Some(Rc::clone(&host) as _);
                if let ConnectError::Failed { reason, .. } = error {
                    info.upstream.transport_failure_reason = Some(reason.into_string().into());
                }
                if attempts >= proxy.max_connect_attempts {
                    info.flags.set(ResponseFlag::UpstreamConnectionFailure);
                    cluster.stats.upstream_cx_connect_attempts_exceeded().inc();
                    info.flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
                    return None;
                }
                if let Some((base, max)) = proxy.back_off {
                    tokio::time::sleep(back_off(base, max, attempts, worker.random())).await;
                }
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

impl Discovery {
    /// Waits until a cluster has been fetched. What the client sends meanwhile stays in its socket.
    async fn fetch(&self, worker: &Worker, name: &str) -> Answer {
        let stats = &self.stats;
        stats.on_demand_cluster_attempt().inc();
        let wanted = Wanted::Cluster { source: Arc::clone(&self.source), name: name.into() };
        let answer = match worker.shared.on_demand.ask(&self.places, wanted) {
            Some(asked) => asked.answer().await,
            None => Answer::Full,
        };
        match answer {
            Answer::Found => stats.on_demand_cluster_success().inc(),
            Answer::Missing | Answer::Full => stats.on_demand_cluster_missing().inc(),
            Answer::TimedOut => stats.on_demand_cluster_timeout().inc(),
        }
        answer
    }
}

/// Moves the bytes; with a log interval it stops now and then to write a line.
async fn pump(
    worker: &Worker,
    proxy: &TcpProxy,
    deadline: Option<Instant>,
    down: &mut Transport,
    up: &mut Transport,
    info: &mut StreamInfo,
    guard: &mut ConnectionGuard,
) -> End {
    let limits = Limits { idle_timeout: proxy.idle_timeout, deadline };
    let point = proxy.overload.as_ref().and_then(|overload| overload.tcp_proxy_on_data.as_deref());
    let mut down = Shedding::new(down, point, worker);
    let mut session = duplex::Session::new(limits);
    let mut ticks = proxy.log_interval.map(tokio::time::interval);
    if let Some(ticks) = &mut ticks {
        // The first tick is at once.
        ticks.tick().await;
    }
    loop {
        let tick = async {
            match &mut ticks {
                Some(ticks) => ticks.tick().await,
                None => std::future::pending().await,
            }
        };
        let end = {
            let (info, stats) = (&mut *info, &proxy.stats);
            let guard = &mut *guard;
            let run = session.run(&mut down, up, move |moved| {
                stats.downstream_cx_rx_bytes_total().add(moved.upstream);
                stats.downstream_cx_tx_bytes_total().add(moved.downstream);
                info.bytes.body_received += moved.upstream;
                info.bytes.body_sent += moved.downstream;
                info.bytes.wire_received += moved.upstream;
                info.bytes.wire_sent += moved.downstream;
                info.upstream.bytes.wire_sent += moved.upstream;
                info.upstream.bytes.wire_received += moved.downstream;
                guard.sent(moved.upstream);
                guard.received(usize::try_from(moved.downstream).unwrap_or(usize::MAX));
                guard.flush();
                count_flow(&moved, stats, &guard.cluster().stats);
            });
            tokio::select! {
                end = run => Some(end),
                _ = tick => None,
            }
        };
        match end {
            Some(end) => {
                if let Some(shed) = down.shed {
                    info.flags.set(ResponseFlag::OverloadManagerTerminated);
                    proxy.stats.downstream_cx_rx_bytes_total().add(shed);
                    info.bytes.body_received += shed;
                    info.bytes.wire_received += shed;
                }
                return end;
            }
            None => proxy.log(info, AccessLogType::TcpPeriodic, worker.random()),
        }
    }
}

/// Counts pauses of either side; Envoy does not count here that upstream is backed up.
#[inline]
fn count_flow(moved: &duplex::Moved, tcp: &TcpStats, cluster: &ClusterStats) {
    let duplex::Moved { reading_downstream, reading_upstream, .. } = moved;
    if reading_downstream.resumed {
        tcp.downstream_flow_control_resumed_reading_total().inc();
    }
    if reading_downstream.paused {
        tcp.downstream_flow_control_paused_reading_total().inc();
    }
    if reading_upstream.resumed {
        cluster.upstream_flow_control_resumed_reading_total().inc();
    }
    if reading_upstream.paused {
        cluster.upstream_flow_control_paused_reading_total().inc();
    }
}

/// Envoy hashes the address without its port.
fn source_hash(address: &Address) -> Option<u64> {
    let ip = address.ip()?.ip().to_string();
    Some(xxh64(ip.as_bytes(), 0))
}
