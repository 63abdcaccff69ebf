//! The small endpoints: readiness, server information, memory, listeners, draining.

use std::fs;
use std::time::Duration;

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::{Response, StatusCode};
use prost::Message as _;
use waystation_filter_api::address::Address;
use waystation_schema::JsonStyle;

use super::{Admin, Body, Query, json, ok, shutting_down, text};
use crate::cli::options::{Mode, Options};
use crate::context::ServerState;
use crate::manager::listeners::Graceful;
use crate::version;

/// Snake case, indented by one space, primitive fields always printed: Envoy's style for its own messages.
const STYLE: JsonStyle = JsonStyle { proto_names: true, pretty: true, with_defaults: true, redact: false };

pub(super) fn ready(admin: &Admin) -> Response<Body> {
    let state = admin.shared.state();
    let status = if state == ServerState::Live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    text(status, format!("{}\n", state.name()))
}

pub(super) async fn health_check(admin: &Admin, fail: bool) -> Response<Body> {
    match admin.main.ask(move |server| server.fail_health_check(fail)).await {
        Some(()) => ok(),
        None => shutting_down(),
    }
}

pub(super) fn reopen_logs(admin: &Admin) -> Response<Body> {
    admin.shared.access_logs.reopen();
    ok()
}

/// In the extensions of an answer: the process is to end once it is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quit;

pub(super) fn quit() -> Response<Body> {
    let mut response = ok();
    response.extensions_mut().insert(Quit);
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

pub(super) async fn drain_listeners(admin: &Admin, query: &Query) -> Response<Body> {
    let inbound_only = query.has("inboundonly");
    // Envoy takes `skip_exit` alone for a graceful drain, too.
    let graceful = match (query.has("graceful"), query.has("skip_exit")) {
        (_, true) => Some(Graceful::SkipExit),
        (true, false) => Some(Graceful::ThenStop),
        (false, false) => None,
    };
    match admin.main.ask(move |server| server.drain_listeners(inbound_only, graceful)).await {
        Some(()) => ok(),
        None => shutting_down(),
    }
}

pub(super) async fn listeners(admin: &Admin, query: &Query) -> Response<Body> {
    let Some(listeners) = admin.main.ask(|server| server.configuration().listener_addresses()).await else {
        return shutting_down();
    };
    if query.get("format") != Some("json") {
        let lines = listeners.iter().flat_map(|(name, addresses)| {
            addresses.iter().map(move |address| format!("{name}::{address}\n"))
        });
        return text(StatusCode::OK, lines.collect::<String>());
    }
    let statuses = listeners.iter().map(|(name, addresses)| pb::ListenerStatus {
        name: name.clone(),
        local_address: addresses.first().map(address_proto),
        additional_local_addresses: addresses.iter().skip(1).map(address_proto).collect(),
    });
    let wire = pb::Listeners { listener_statuses: statuses.collect() }.encode_to_vec();
    json("envoy.admin.v3.Listeners", &wire, JsonStyle { with_defaults: false, ..STYLE })
}

pub(super) async fn init_dump(admin: &Admin) -> Response<Body> {
    let Some(unready) = admin.main.ask(|server| server.configuration().unready()).await else {
        return shutting_down();
    };
    let dumps = unready
        .into_iter()
        .map(|(name, target_names)| pb::unready_targets_dumps::UnreadyTargetsDump { name, target_names });
    let wire = pb::UnreadyTargetsDumps { unready_targets_dumps: dumps.collect() }.encode_to_vec();
    json("envoy.admin.v3.UnreadyTargetsDumps", &wire, JsonStyle { with_defaults: false, ..STYLE })
}

pub(super) fn memory() -> Response<Body> {
    // The allocator keeps no cheap totals: what the kernel accounts to this process is what operators compare.
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Vec<u64> = statm.split(' ').filter_map(|field| field.trim().parse().ok()).collect();
    let page = 4096;
    let resident = pages.get(1).copied().unwrap_or_default() * page;
    let shared = pages.get(2).copied().unwrap_or_default() * page;
    let memory = pb::Memory {
        allocated: resident.saturating_sub(shared),
        heap_size: resident,
        total_physical_bytes: resident,
        ..pb::Memory::default()
    };
    json("envoy.admin.v3.Memory", &memory.encode_to_vec(), STYLE)
}

pub(super) fn server_info(admin: &Admin) -> Response<Body> {
    let uptime = seconds(Duration::from_secs(admin.shared.start.elapsed().as_secs()));
    let info = pb::ServerInfo {
        version: version::version(),
        // ServerInfo.State has the numbers of `server.state`.
        state: admin.shared.state() as i32,
        uptime_current_epoch: Some(uptime),
        uptime_all_epochs: Some(uptime),
        hot_restart_version: "disabled".to_owned(),
        command_line_options: Some(command_line(&admin.options)),
        // The node is an encoded message already: decoding what we encoded cannot fail.
        node: core::Node::decode(&*admin.node).ok(),
        ..pb::ServerInfo::default()
    };
    json("envoy.admin.v3.ServerInfo", &info.encode_to_vec(), STYLE)
}

fn command_line(options: &Options) -> pb::CommandLineOptions {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    };
    pb::CommandLineOptions {
        base_id: options.base_id.into(),
        use_dynamic_base_id: options.use_dynamic_base_id,
        base_id_path: path(&options.base_id_path),
        concurrency: options.concurrency,
        config_path: path(&options.config_path),
        config_yaml: options.config_yaml.clone().unwrap_or_default(),
        allow_unknown_static_fields: options.allow_unknown_static_fields,
        reject_unknown_dynamic_fields: options.reject_unknown_dynamic_fields,
        ignore_unknown_dynamic_fields: options.ignore_unknown_dynamic_fields,
        skip_deprecated_logs: options.skip_deprecated_logs,
        admin_address_path: path(&options.admin_address_path),
        local_address_ip_version: i32::from(options.local_address_v6),
        log_level: options.log_level.name().to_owned(),
        component_log_level: options.component_log_level.clone(),
        log_format: options.log_format.clone(),
        log_format_escaped: options.log_format_escaped,
        log_path: path(&options.log_path),
        service_cluster: options.service_cluster.clone(),
        service_node: options.service_node.clone(),
        service_zone: options.service_zone.clone(),
        file_flush_interval: Some(seconds(options.file_flush_interval)),
        file_flush_min_size: options.file_flush_min_size_kb,
        drain_time: Some(seconds(options.drain_time)),
        drain_strategy: i32::from(options.drain_immediately),
        parent_shutdown_time: Some(seconds(options.parent_shutdown_time)),
        mode: match options.mode {
            Mode::Serve => pb::command_line_options::Mode::Serve,
            Mode::Validate => pb::command_line_options::Mode::Validate,
            Mode::InitOnly => pb::command_line_options::Mode::InitOnly,
        }
        .into(),
        disable_hot_restart: options.disable_hot_restart,
        restart_epoch: options.restart_epoch,
        cpuset_threads: options.cpuset_threads,
        disabled_extensions: options.disabled_extensions.clone(),
        socket_path: options.socket_path.clone(),
        enable_core_dump: options.enable_core_dump,
        stats_tag: options.stats_tags.iter().map(|(name, value)| format!("{name}:{value}")).collect(),
        ..pb::CommandLineOptions::default()
    }
}

fn seconds(duration: Duration) -> wkt::Duration {
    wkt::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or_default(),
    }
}

/// An address as protobuf.
pub(crate) fn address_proto(address: &Address) -> core::Address {
    use core::address::Address as Kind;
    use core::socket_address::PortSpecifier;
    let kind = match address {
        Address::Ip(ip) => Kind::SocketAddress(core::SocketAddress {
            address: ip.ip().to_string(),
            port_specifier: Some(PortSpecifier::PortValue(ip.port().into())),
            ..core::SocketAddress::default()
        }),
        Address::Pipe(path) => Kind::Pipe(core::Pipe { path: path.to_string(), mode: 0 }),
        Address::Internal { listener, endpoint_id } => {
            Kind::EnvoyInternalAddress(core::EnvoyInternalAddress {
                endpoint_id: endpoint_id.to_string(),
                address_name_specifier: Some(
                    core::envoy_internal_address::AddressNameSpecifier::ServerListenerName(
                        listener.to_string(),
                    ),
                ),
            })
        }
    };
    core::Address { address: Some(kind) }
}
