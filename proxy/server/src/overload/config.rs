//! `OverloadManager`, compiled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::overload::v3 as pb;
use envoy_types::pb::envoy::extensions::resource_monitors::cgroup_memory::v3::CgroupMemoryConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::cpu_utilization::v3::CpuUtilizationConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::cpu_utilization::v3::cpu_utilization_config::UtilizationComputeStrategy;
use envoy_types::pb::envoy::extensions::resource_monitors::downstream_connections::v3::DownstreamConnectionsConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::fixed_heap::v3::FixedHeapConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::injected_resource::v3::InjectedResourceConfig;
use envoy_types::pb::google::protobuf::Any;
use pb::scale_timers_overload_action_config::{ScaleTimer, TimerType, scale_timer::OverloadAdjust};
use tokio::sync::watch;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::wire::{self, type_name, unpack};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::Scope;

use super::connections::DOWNSTREAM_CONNECTIONS;
use super::cpu::CpuMonitor;
use super::manager::{Dependent, Resource, Shrink};
use super::monitor::{CgroupMemory, HeapLimit, Monitor};
use super::timeouts::Minimum;
use super::trigger::Trigger;
use super::{Level, Manager, Overload, Point};

/// How often monitors are asked when the configuration does not say.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// The shortest interval: none at all would leave the main thread no time for anything else.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);

/// `ShrinkHeapConfig` when it does not say.
const SHRINK_INTERVAL: Duration = Duration::from_secs(10);
const SHRINK_KEEP: u64 = 100 * 1024 * 1024;

const ACTION: &str = "envoy.overload_actions.";
const REDUCE_TIMEOUTS: &str = "envoy.overload_actions.reduce_timeouts";
const SHRINK_HEAP: &str = "envoy.overload_actions.shrink_heap";
const POINT: &str = "envoy.load_shed_points.";
const SCALE_TIMERS: &str = "envoy.config.overload.v3.ScaleTimersOverloadActionConfig";
const SHRINK_CONFIG: &str = "envoy.config.overload.v3.ShrinkHeapConfig";

/// A compiled `envoy.config.overload.v3.OverloadManager`.
#[derive(Debug)]
pub struct Compiled {
    /// For the main thread.
    pub manager: Manager,
    /// For the workers.
    pub overload: Arc<Overload>,
    /// The limit on open downstream connections, if there is one.
    pub connections: Option<u64>,
}

/// Compiles the overload manager of the bootstrap, if it has one. Statistics are below `root`.
///
/// # Errors
/// In Envoy's words, when something is twice, unknown, or not supported.
pub fn compile(
    proto: Option<&pb::OverloadManager>,
    runtime: &Runtime,
    root: &Scope,
    now: Instant,
) -> Result<Option<Compiled>, ConfigError> {
    proto.map(|proto| compile_set(proto, runtime, root, now).at(|| "overload_manager")).transpose()
}

fn compile_set(
    proto: &pb::OverloadManager,
    runtime: &Runtime,
    root: &Scope,
    now: Instant,
) -> Result<Compiled, ConfigError> {
    let pb::OverloadManager { refresh_interval, resource_monitors, actions, loadshed_points, .. } = proto;
    let interval = wire::duration("refresh_interval", refresh_interval.as_ref())?.unwrap_or(REFRESH_INTERVAL);
    let (changes, changed) = watch::channel(());
    let manager = Manager::new(interval.max(SHORTEST_INTERVAL), changes, root, now);
    let overload = Overload { changes: Some(changed), ..Overload::default() };
    let mut compiling = Compiling { manager, overload, connections: None, scope: root.scope("overload") };
    for (i, monitor) in resource_monitors.iter().enumerate() {
        compiling.monitor(monitor, runtime).at(|| format!("resource_monitors[{i}]"))?;
    }
    for (i, action) in actions.iter().enumerate() {
        if actions[..i].iter().any(|other| other.name == action.name) {
            return Err(ConfigError::new(format!("Duplicate overload action {}", action.name)));
        }
        compiling.action(action).at(|| format!("actions[{i}]"))?;
    }
    for (i, point) in loadshed_points.iter().enumerate() {
        let name = &point.name;
        if loadshed_points[..i].iter().any(|other| other.name == *name) {
            return Err(ConfigError::new(format!("Duplicate loadshed point {name}")));
        }
        if actions.iter().any(|action| action.name == *name) {
            return Err(ConfigError::new(format!(
                "Load shed point \"{name}\" conflicts with an overload action of the same name"
            )));
        }
        compiling.point(point).at(|| format!("loadshed_points[{i}]"))?;
    }
    let Compiling { manager, mut overload, connections, .. } = compiling;
    // Nobody else waits for a change.
    if !overload.reduce_timeouts.is_set() && overload.stop_accepting_connections.is_none() {
        overload.changes = None;
    }
    Ok(Compiled { manager, overload: Arc::new(overload), connections })
}

struct Compiling {
    manager: Manager,
    overload: Overload,
    connections: Option<u64>,
    scope: Scope,
}

impl Compiling {
    /// By the type of its configuration, as in Envoy, save the limit on connections, which goes by its name.
    fn monitor(&mut self, proto: &pb::ResourceMonitor, runtime: &Runtime) -> Result<(), ConfigError> {
        let name = &proto.name;
        let known = self.manager.resources.iter().any(|resource| *resource.name == **name);
        if known || name == DOWNSTREAM_CONNECTIONS && self.connections.is_some() {
            return Err(ConfigError::new(format!("Duplicate resource monitor {name}")));
        }
        let Some(pb::resource_monitor::ConfigType::TypedConfig(any)) = &proto.config_type else {
            return Err(ConfigError::field("typed_config", "is required"));
        };
        let compiled = match type_name(any) {
            "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig" => {
                if name != DOWNSTREAM_CONNECTIONS {
                    let reason = format!("only '{DOWNSTREAM_CONNECTIONS}' is supported");
                    return Err(ConfigError::field("name", reason));
                }
                let limit = connection_limit(any).at(|| "typed_config")?;
                self.connections = Some(limit);
                return Ok(());
            }
            "envoy.extensions.resource_monitors.injected_resource.v3.InjectedResourceConfig" => {
                unpack::<InjectedResourceConfig>(any).map(|proto| Monitor::Injected(proto.filename.into()))
            }
            "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig" => {
                unpack(any).and_then(|proto| heap_limit(&proto, runtime)).map(Monitor::FixedHeap)
            }
            "envoy.extensions.resource_monitors.cgroup_memory.v3.CgroupMemoryConfig" => {
                unpack::<CgroupMemoryConfig>(any)
                    .and_then(|proto| CgroupMemory::find(proto.max_memory_bytes).map_err(ConfigError::new))
                    .map(Monitor::CgroupMemory)
            }
            "envoy.extensions.resource_monitors.cpu_utilization.v3.CpuUtilizationConfig" => unpack::<
                CpuUtilizationConfig,
            >(any)
            .and_then(|proto| match proto.mode() {
                UtilizationComputeStrategy::Host => Ok(CpuMonitor::host()),
                UtilizationComputeStrategy::Container => CpuMonitor::container().map_err(ConfigError::new),
            })
            .map(Monitor::Cpu),
            other => Err(ConfigError::new(format!(
                "Didn't find a registered implementation for '{name}' with type URL: '{other}'"
            ))),
        };
        let monitor = compiled.at(|| "typed_config")?;
        let stats = self.scope.scope(name).group();
        self.manager.resources.push(Resource { name: name.as_str().into(), monitor, stats });
        Ok(())
    }

    /// Registers what has these triggers, by the numbers of their resources.
    fn depend(
        &mut self,
        triggers: &[pb::Trigger],
        (name, what, duplicate): (&str, &str, &str),
        dependent: Dependent,
    ) -> Result<(), ConfigError> {
        let mut compiled = Vec::with_capacity(triggers.len());
        for (i, proto) in triggers.iter().enumerate() {
            let resource = &proto.name;
            if triggers[..i].iter().any(|other| other.name == *resource) {
                return Err(ConfigError::new(format!("Duplicate trigger resource for {duplicate} {name}")));
            }
            let trigger = trigger(proto).at(|| format!("triggers[{i}]"))?;
            match self.manager.resources.iter().position(|known| *known.name == **resource) {
                Some(number) => compiled.push((number, trigger)),
                // It counts and has no pressure: nothing follows from it, as in Envoy.
                None if resource == DOWNSTREAM_CONNECTIONS && self.connections.is_some() => {}
                None => {
                    let reason = format!("Unknown trigger resource {resource} for {what} {name}");
                    return Err(ConfigError::new(reason));
                }
            }
        }
        self.manager.core.add(compiled);
        self.manager.dependents.push(dependent);
        Ok(())
    }

    fn action(&mut self, proto: &pb::OverloadAction) -> Result<(), ConfigError> {
        let pb::OverloadAction { name, triggers, typed_config } = proto;
        let config = typed_config.as_ref().map(type_name);
        let scales = name == REDUCE_TIMEOUTS || config == Some(SCALE_TIMERS);
        let wanted =
            if scales { Some(SCALE_TIMERS) } else { Some(SHRINK_CONFIG).filter(|_| name == SHRINK_HEAP) };
        let own_name = !name.starts_with(ACTION) && config == Some(SCALE_TIMERS);
        if config.is_some() && config != wanted || scales && name != REDUCE_TIMEOUTS && !own_name {
            return Err(ConfigError::new(format!(
                "Overload action name \"{name}\" conflicts with its typed config"
            )));
        }
        let level = Arc::new(Level::default());
        let stats = self.scope.scope(name).group();
        let dependent = Dependent::Action { name: name.as_str().into(), level: Arc::clone(&level), stats };
        self.depend(triggers, (name, "overload action", "overload action"), dependent)?;
        if scales {
            let Some(any) = typed_config else {
                return Err(ConfigError::new(format!("Overload action \"{name}\" requires typed_config")));
            };
            return self.scale_timers(any, &level).at(|| "typed_config");
        }
        let overload = &mut self.overload;
        let place = match name.strip_prefix(ACTION) {
            Some("stop_accepting_requests") => &mut overload.stop_accepting_requests,
            Some("disable_http_keepalive") => &mut overload.disable_http_keepalive,
            Some("stop_accepting_connections") => &mut overload.stop_accepting_connections,
            Some("reject_incoming_connections") => &mut overload.reject_incoming_connections,
            Some("shrink_heap") => {
                return self.shrink_heap(typed_config.as_ref(), level).at(|| "typed_config");
            }
            Some("reset_high_memory_stream" | "close_idle_http_connections") => {
                return Err(ConfigError::field("name", format!("{name} is not supported in this version")));
            }
            _ => return Err(ConfigError::new(format!("Unknown Overload Manager Action {name}"))),
        };
        *place = Some(level);
        Ok(())
    }

    fn scale_timers(&mut self, any: &Any, level: &Arc<Level>) -> Result<(), ConfigError> {
        let proto: pb::ScaleTimersOverloadActionConfig = unpack(any)?;
        for (i, factor) in proto.timer_scale_factors.iter().enumerate() {
            let timer = factor.timer();
            if proto.timer_scale_factors[..i].iter().any(|other| other.timer() == timer) {
                let name = timer.as_str_name();
                return Err(ConfigError::new(format!("Found duplicate entry for timer type {name}")));
            }
            let minimum = minimum(factor).at(|| format!("timer_scale_factors[{i}]"))?;
            let scaled = &mut self.overload.reduce_timeouts;
            let place = match timer {
                TimerType::Unspecified => return Err(ConfigError::field("timer", "is required")),
                TimerType::HttpDownstreamConnectionIdle => &mut scaled.connection_idle,
                TimerType::HttpDownstreamStreamIdle => &mut scaled.stream_idle,
                TimerType::TransportSocketConnect => &mut scaled.transport_socket_connect,
                TimerType::HttpDownstreamConnectionMax => &mut scaled.connection_max,
                TimerType::HttpDownstreamStreamFlush => &mut scaled.stream_flush,
            };
            place.add(level, minimum);
        }
        Ok(())
    }

    fn shrink_heap(&mut self, any: Option<&Any>, level: Arc<Level>) -> Result<(), ConfigError> {
        let proto: pb::ShrinkHeapConfig = any.map(unpack).transpose()?.unwrap_or_default();
        let interval = wire::positive("timer_interval", proto.timer_interval.as_ref())?;
        let (tell, told) = watch::channel(());
        self.overload.shrink = Some(told);
        self.manager.shrink = Some(Shrink {
            level,
            interval: interval.unwrap_or(SHRINK_INTERVAL),
            keep: proto.max_unfreed_memory_bytes.map_or(SHRINK_KEEP, |keep| keep.value),
            stats: self.scope.scope(SHRINK_HEAP).group(),
            tell,
        });
        Ok(())
    }

    fn point(&mut self, proto: &pb::LoadShedPoint) -> Result<(), ConfigError> {
        let name = &proto.name;
        let point = Arc::new(Point { level: Level::default(), stats: self.scope.scope(name).group() });
        let dependent = Dependent::Point(Arc::clone(&point));
        self.depend(&proto.triggers, (name, "loadshed point", "LoadShedPoint"), dependent)?;
        let overload = &mut self.overload;
        let place = match name.strip_prefix(POINT) {
            Some("tcp_listener_accept") => &mut overload.tcp_listener_accept,
            Some("http_connection_manager_decode_headers") => &mut overload.decode_headers,
            Some("hcm_ondata_creating_codec") => &mut overload.creating_codec,
            Some("http1_server_abort_dispatch") => &mut overload.http1_abort_dispatch,
            Some("http2_server_go_away_on_dispatch") => &mut overload.go_away,
            Some("http2_server_go_away_and_close_on_dispatch") => &mut overload.go_away_and_close,
            Some("http_downstream_filter_check") => &mut overload.filter_check,
            Some("connection_pool_new_connection") => &mut overload.new_connection,
            Some("tcp_proxy_on_data") => &mut overload.tcp_proxy_on_data,
            Some("tcp_proxy_upstream_connect") => &mut overload.tcp_proxy_connect,
            // HTTP/3 is refused where it would be served.
            Some("http3_server_go_away_on_dispatch" | "http3_server_go_away_and_close_on_dispatch") => {
                return Ok(());
            }
            _ => return Err(ConfigError::field("name", format!("unknown load-shed point '{name}'"))),
        };
        *place = Some(point);
        Ok(())
    }
}

fn connection_limit(any: &Any) -> Result<u64, ConfigError> {
    let limit = unpack::<DownstreamConnectionsConfig>(any)?.max_active_downstream_connections;
    u64::try_from(limit)
        .ok()
        .filter(|limit| *limit > 0)
        .ok_or_else(|| ConfigError::field("max_active_downstream_connections", "must be greater than 0"))
}

fn heap_limit(proto: &FixedHeapConfig, runtime: &Runtime) -> Result<HeapLimit, ConfigError> {
    let FixedHeapConfig { max_heap_size_bytes, max_heap_size_bytes_runtime } = proto;
    let empty = || ConfigError::new("fixed_heap: max heap size must be greater than 0");
    match (*max_heap_size_bytes, max_heap_size_bytes_runtime) {
        (0, None) => Err(empty()),
        (limit, None) => Ok(HeapLimit::Fixed(limit)),
        (0, Some(proto)) if proto.default_value == 0 => Err(empty()),
        (0, Some(proto)) => Ok(HeapLimit::Runtime(runtime.integer(&proto.runtime_key, proto.default_value))),
        _ => Err(ConfigError::new(
            "fixed_heap: exactly one of max_heap_size_bytes or max_heap_size_bytes_runtime must be set",
        )),
    }
}

fn trigger(proto: &pb::Trigger) -> Result<Trigger, ConfigError> {
    use pb::trigger::TriggerOneof;
    match &proto.trigger_oneof {
        Some(TriggerOneof::Threshold(threshold)) => Ok(Trigger::Threshold(threshold.value)),
        Some(TriggerOneof::Scaled(scaled)) if scaled.scaling_threshold < scaled.saturation_threshold => {
            Ok(Trigger::Scaled(scaled.scaling_threshold, scaled.saturation_threshold))
        }
        Some(TriggerOneof::Scaled(_)) => {
            Err(ConfigError::field("scaled", "scaling_threshold must be less than saturation_threshold"))
        }
        None => Err(ConfigError::new("threshold or scaled is required")),
    }
}

fn minimum(proto: &ScaleTimer) -> Result<Minimum, ConfigError> {
    match &proto.overload_adjust {
        Some(OverloadAdjust::MinTimeout(min)) => {
            let min = wire::duration("min_timeout", Some(min))?;
            Ok(Minimum::Absolute(min.unwrap_or_default()))
        }
        // The walk has seen that it is a percentage.
        Some(OverloadAdjust::MinScale(share)) => Ok(Minimum::Share((share.value / 100.0).clamp(0.0, 1.0))),
        None => Err(ConfigError::new("min_timeout or min_scale is required")),
    }
}
