//! The connection manager, compiled.
//!
//! Every field is compiled here, or refused with its path, or left out for a reason that stands beside it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::google::protobuf as wkt;
use pb::http_connection_manager as hcm;
use prost::Message as _;
use waystation_filter_api::http::HttpFilterFactory;
use waystation_filter_api::wire::{self, bool_value};
use waystation_format::{AccessLog, HeaderMutationList};
use waystation_http::h2::FrameLimits;
use waystation_http::{EscapedSlashes, PathOptions, h1};
use waystation_matchers::{CidrList, Matcher};
use waystation_schema::{At, ConfigError};
use waystation_stats::Scope;
use waystation_upstream::jitter::spread;

use super::client_cert::{Details, Forward, ForwardCert};
use super::filters::{self, FilterEntry, RouterConfig};
use super::forwarding::{Internal, ProtoPorts, Trust};
use super::proxy_status::ProxyStatus;
use super::stats::Stats;
use super::timer::after;
use crate::context::CompileContext;
use crate::http::downstream::http2::PrematureResets;
use crate::on_demand::Places;
use crate::overload::Overload;

mod extensions;
mod local_reply;
mod protocol;
mod route_source;

pub(crate) use local_reply::LocalReplies;
use route_source::inline_scopes;
pub(crate) use route_source::{Routes, refuse_unsupported};

/// How the codec is chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Codec {
    /// ALPN, or the first bytes.
    Auto,
    Http1,
    Http2,
}

/// `server_header_transformation`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ServerHeader {
    Overwrite,
    AppendIfAbsent,
    PassThrough,
}

/// Whether the port is taken off the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum StripPort {
    Never,
    /// When it is the listener's.
    Matching,
    Any,
}

/// Timeouts; `None` is never.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    pub(crate) stream_idle: Option<Duration>,
    pub(crate) flush: Option<Duration>,
    pub(crate) request: Option<Duration>,
    pub(crate) request_headers: Option<Duration>,
    /// Of a connection without a stream.
    pub(crate) idle: Option<Duration>,
    max_connection_duration: Option<Duration>,
    /// Percent by which it is spread.
    max_connection_duration_jitter: f64,
    pub(crate) max_stream_duration: Option<Duration>,
    drain: Option<Duration>,
    /// Percent by which it is spread.
    drain_jitter: f64,
    pub(crate) delayed_close: Option<Duration>,
}

impl Timeouts {
    /// When a connection that begins to drain `now` is over.
    pub(crate) fn drain_end(&self, now: Instant, random: u64) -> Option<Instant> {
        after(now, self.drain.map(|drain| spread(drain, self.drain_jitter, random)))
    }

    /// When a connection that began at `start` has lasted for `max_connection_duration`.
    pub(crate) fn connection_end(&self, start: Instant, random: u64) -> Option<Instant> {
        after(
            start,
            self.max_connection_duration.map(|max| spread(max, self.max_connection_duration_jitter, random)),
        )
    }
}

/// `Http2ProtocolOptions`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Http2Options {
    pub(crate) hpack_table_size: u32,
    pub(crate) max_concurrent_streams: u32,
    pub(crate) initial_stream_window_size: u32,
    pub(crate) initial_connection_window_size: u32,
    pub(crate) allow_connect: bool,
    pub(crate) keepalive_interval: Option<Duration>,
    pub(crate) keepalive_timeout: Option<Duration>,
    pub(crate) frame_limits: FrameLimits,
    /// Whether a malformed message ends only its stream.
    pub(crate) stream_error_on_invalid_message: bool,
}

/// What is done with `x-request-id`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestId {
    pub(crate) generate: bool,
    pub(crate) preserve_external: bool,
    pub(crate) always_in_response: bool,
}

/// A compiled `envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`.
#[derive(Debug)]
pub struct Hcm {
    pub(crate) stats: Stats,
    pub(crate) codec: Codec,
    pub(crate) routes: Routes,
    pub(crate) filters: Vec<FilterEntry>,
    pub(crate) router: RouterConfig,
    pub(crate) trust: Trust,
    pub(crate) server_name: Box<str>,
    pub(crate) server_header: ServerHeader,
    /// `scheme_to_overwrite`.
    pub(crate) scheme: Option<&'static str>,
    pub(crate) http1: Arc<h1::Config>,
    pub(crate) http2: Http2Options,
    pub(crate) premature_resets: PrematureResets,
    pub(crate) timeouts: Timeouts,
    pub(crate) max_requests_per_connection: Option<u32>,
    pub(crate) access_logs: Vec<AccessLog>,
    pub(crate) log_on_request: bool,
    /// `flush_log_on_tunnel_successfully_established`.
    pub(crate) log_on_tunnel: bool,
    /// `access_log_flush_interval`.
    pub(crate) log_interval: Option<Duration>,
    pub(crate) proxy_status: Option<Box<ProxyStatus>>,
    pub(crate) request_id: RequestId,
    pub(crate) forward_cert: ForwardCert,
    /// Goes before `forward_cert` where it matches.
    pub(crate) forward_cert_matcher: Option<Box<Matcher<ForwardCert>>>,
    pub(crate) proxy_100_continue: bool,
    /// Upgrade protocols in lower case, and whether they are allowed.
    pub(crate) upgrades: Vec<(Box<str>, bool)>,
    pub(crate) paths: PathOptions,
    pub(crate) strip_port: StripPort,
    pub(crate) strip_dot: bool,
    pub(crate) local_reply: Option<Box<LocalReplies>>,
    pub(crate) early_mutations: Vec<HeaderMutationList>,
    /// What a stream may buffer.
    pub(crate) buffer_limit: usize,
    /// Whether upstream connections may state the downstream's addresses in a PROXY header.
    pub(crate) add_proxy_protocol_state: bool,
    /// The overload manager, where it bears on this listener.
    pub(crate) overload: Option<Arc<Overload>>,
    /// Tells a client that is refused for its sake with `x-envoy-local-overloaded`.
    pub(crate) append_local_overload: bool,
    /// For requests that wait for their configuration.
    pub(crate) places: Arc<Places>,
    /// The inline route configuration, encoded.
    inline_routes: Option<(String, Bytes)>,
    /// The inline scopes, encoded, and their name.
    inline_scopes: Option<(String, Vec<Bytes>)>,
}

impl Hcm {
    /// Compiles the filter of a listener whose statistics are below `listener`.
    ///
    /// # Errors
    /// When a field is invalid, or set but not supported; the path starts below the filter.
    pub fn compile(
        proto: &pb::HttpConnectionManager,
        listener: &Scope,
        cx: &CompileContext<'_>,
    ) -> Result<Self, ConfigError> {
        #[expect(deprecated, reason = "the deprecated forms of the log options are still in use")]
        let pb::HttpConnectionManager {
            codec_type: _,
            stat_prefix,
            http_filters,
            add_user_agent,
            // Tracing changes no traffic; spans are not reported in this version.
            tracing: _,
            common_http_protocol_options,
            // Only changes when a connection over its age closes: here it always waits for its request.
            http1_safe_max_connection_duration: _,
            http_protocol_options,
            http2_protocol_options,
            http3_protocol_options,
            server_name,
            server_header_transformation: _,
            scheme_header_transformation,
            max_request_headers_kb,
            stream_idle_timeout,
            stream_flush_timeout,
            request_timeout,
            request_headers_timeout,
            drain_timeout,
            drain_timeout_jitter,
            delayed_close_timeout,
            access_log,
            access_log_flush_interval,
            flush_access_log_on_new_request,
            access_log_options,
            use_remote_address,
            xff_num_trusted_hops,
            original_ip_detection_extensions,
            early_header_mutation_extensions,
            internal_address_config,
            skip_xff_append,
            via,
            generate_request_id,
            preserve_external_request_id,
            always_set_request_id_in_response,
            forward_client_cert_details: _,
            set_current_client_cert_details,
            forward_client_cert_matcher,
            proxy_100_continue,
            represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
            upgrade_configs,
            normalize_path,
            merge_slashes,
            path_with_escaped_slashes_action: _,
            request_id_extension,
            local_reply_config,
            strip_matching_host_port,
            stream_error_on_invalid_http_message,
            path_normalization_options,
            strip_trailing_host_dot,
            proxy_status_config,
            typed_header_validation_config,
            append_x_forwarded_port,
            append_local_overload,
            // PROXY protocol's state goes to filter state for transport sockets that are not there yet.
            add_proxy_protocol_connection_state,
            forward_proto_config,
            route_specifier,
            strip_port_mode,
        } = proto;
        let refuse = |field: &'static str, set: bool| {
            if set { Err(ConfigError::field(field, "is not supported in this version")) } else { Ok(()) }
        };
        refuse("http3_protocol_options", http3_protocol_options.is_some())?;
        refuse(
            "represent_ipv4_remote_address_as_ipv4_mapped_ipv6",
            *represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
        )?;
        refuse("path_normalization_options", path_normalization_options.is_some())?;
        refuse("typed_header_validation_config", typed_header_validation_config.is_some())?;
        refuse(
            "stream_error_on_invalid_http_message",
            bool_value(stream_error_on_invalid_http_message.as_ref(), false),
        )?;
        let options = access_log_options.as_ref();
        let log_interval = options.and_then(|options| options.access_log_flush_interval.as_ref());
        let log_interval = log_interval.or(access_log_flush_interval.as_ref());
        let codec = match proto.codec_type() {
            hcm::CodecType::Auto => Codec::Auto,
            hcm::CodecType::Http1 => Codec::Http1,
            hcm::CodecType::Http2 => Codec::Http2,
            hcm::CodecType::Http3 => return Err(ConfigError::field("codec_type", "HTTP/3 is not supported")),
        };
        if stat_prefix.is_empty() {
            return Err(ConfigError::field("stat_prefix", "must not be empty"));
        }
        let shared = cx.shared;
        let http = shared.stats.root().scope("http").tag("envoy.http_conn_manager_prefix", stat_prefix);
        let (filters, router) = filters::compile(http_filters, &http, cx)?;
        let common = common_http_protocol_options.unwrap_or_default();
        let duration = |field: &'static str, value: Option<&wkt::Duration>, default: Option<Duration>| {
            wire::timeout(field, value, default)
        };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let stream_idle = duration("stream_idle_timeout", stream_idle_timeout.as_ref(), seconds(300))?;
        let timeouts = Timeouts {
            stream_idle,
            flush: duration("stream_flush_timeout", stream_flush_timeout.as_ref(), stream_idle)?,
            request: duration("request_timeout", request_timeout.as_ref(), None)?,
            request_headers: duration("request_headers_timeout", request_headers_timeout.as_ref(), None)?,
            idle: duration(
                "common_http_protocol_options.idle_timeout",
                common.idle_timeout.as_ref(),
                seconds(3600),
            )?,
            max_connection_duration: duration(
                "common_http_protocol_options.max_connection_duration",
                common.max_connection_duration.as_ref(),
                None,
            )?,
            max_connection_duration_jitter: common
                .max_connection_duration_jitter
                .as_ref()
                .map_or(0.0, |percent| percent.value),
            max_stream_duration: duration(
                "common_http_protocol_options.max_stream_duration",
                common.max_stream_duration.as_ref(),
                None,
            )?,
            drain: duration("drain_timeout", drain_timeout.as_ref(), seconds(5))?,
            drain_jitter: drain_timeout_jitter.as_ref().map_or(0.0, |percent| percent.value),
            delayed_close: duration("delayed_close_timeout", delayed_close_timeout.as_ref(), seconds(1))?,
        };
        let node = &shared.node;
        let add_agent = bool_value(add_user_agent.as_ref(), false);
        if add_agent && node.cluster.is_empty() {
            return Err(ConfigError::field("add_user_agent", "needs the node's cluster"));
        }
        let trust = Trust {
            use_remote_address: bool_value(use_remote_address.as_ref(), false),
            trusted_hops: *xff_num_trusted_hops,
            skip_xff_append: *skip_xff_append,
            append_port: *append_x_forwarded_port,
            detection: extensions::detection(
                original_ip_detection_extensions,
                bool_value(use_remote_address.as_ref(), false),
                *xff_num_trusted_hops,
            )?,
            internal: match internal_address_config {
                None => Internal::default(),
                Some(config) => Internal {
                    unix_sockets: config.unix_sockets,
                    ranges: Some(
                        CidrList::compile(&config.cidr_ranges, "cidr_ranges")
                            .at(|| "internal_address_config")?,
                    ),
                },
            },
            user_agent: add_agent.then(|| (node.cluster.as_str().into(), node.id.as_str().into())),
            via: via.as_str().into(),
            proto_ports: forward_proto_config.as_ref().map(|config| {
                let pb::ForwardProtoConfig { https_destination_ports, http_destination_ports } = config;
                Box::new(ProtoPorts {
                    https: https_destination_ports.as_slice().into(),
                    http: http_destination_ports.as_slice().into(),
                })
            }),
        };
        let routes = Routes::compile(route_specifier.as_ref(), &http, cx)?;
        let access_logs = access_log.iter().enumerate().map(|(index, proto)| {
            AccessLog::compile(proto, &shared.access_logs, &shared.runtime)
                .at(|| format!("access_log[{index}]"))
        });
        Ok(Self {
            stats: Stats::new(&http, listener, stat_prefix),
            codec,
            routes,
            filters,
            router,
            trust,
            overload: cx.overload(),
            append_local_overload: *append_local_overload,
            places: Arc::default(),
            server_name: if server_name.is_empty() { "envoy".into() } else { server_name.as_str().into() },
            server_header: match proto.server_header_transformation() {
                hcm::ServerHeaderTransformation::Overwrite => ServerHeader::Overwrite,
                hcm::ServerHeaderTransformation::AppendIfAbsent => ServerHeader::AppendIfAbsent,
                hcm::ServerHeaderTransformation::PassThrough => ServerHeader::PassThrough,
            },
            scheme: scheme(scheme_header_transformation.as_ref()).at(|| "scheme_header_transformation")?,
            http1: Arc::new(protocol::http1(
                http_protocol_options.as_ref(),
                &common,
                max_request_headers_kb.as_ref().map_or(60, |kb| kb.value),
            )?),
            http2: protocol::http2(http2_protocol_options.as_ref()).at(|| "http2_protocol_options")?,
            premature_resets: PrematureResets::new(&cx.shared.runtime),
            timeouts,
            max_requests_per_connection: common
                .max_requests_per_connection
                .as_ref()
                .map(|max| max.value)
                .filter(|max| *max > 0),
            access_logs: access_logs.collect::<Result<_, _>>()?,
            log_on_request: *flush_access_log_on_new_request
                || options.is_some_and(|options| options.flush_access_log_on_new_request),
            log_on_tunnel: options
                .is_some_and(|options| options.flush_log_on_tunnel_successfully_established),
            log_interval: wire::positive("access_log_flush_interval", log_interval)?,
            proxy_status: proxy_status_config
                .as_ref()
                .map(|config| Box::new(ProxyStatus::compile(config, server_name, &node.id))),
            request_id: extensions::request_id(
                request_id_extension.as_ref(),
                RequestId {
                    generate: bool_value(generate_request_id.as_ref(), true),
                    preserve_external: *preserve_external_request_id,
                    always_in_response: *always_set_request_id_in_response,
                },
            )
            .at(|| "request_id_extension")?,
            forward_cert: (
                Forward::compile(proto.forward_client_cert_details()),
                Details::compile(set_current_client_cert_details.as_ref())?,
            ),
            forward_cert_matcher: forward_client_cert_matcher
                .as_ref()
                .map(|proto| extensions::forward_cert_matcher(proto, &shared.runtime).map(Box::new))
                .transpose()
                .at(|| "forward_client_cert_matcher")?,
            proxy_100_continue: *proxy_100_continue,
            upgrades: upgrade_configs
                .iter()
                .enumerate()
                .map(|(index, config)| upgrade(config).at(|| format!("upgrade_configs[{index}]")))
                .collect::<Result<_, _>>()?,
            paths: PathOptions {
                normalize: bool_value(normalize_path.as_ref(), false),
                merge_slashes: *merge_slashes,
                escaped_slashes: match proto.path_with_escaped_slashes_action() {
                    hcm::PathWithEscapedSlashesAction::ImplementationSpecificDefault
                    | hcm::PathWithEscapedSlashesAction::KeepUnchanged => EscapedSlashes::Keep,
                    hcm::PathWithEscapedSlashesAction::RejectRequest => EscapedSlashes::Reject,
                    hcm::PathWithEscapedSlashesAction::UnescapeAndRedirect => {
                        EscapedSlashes::UnescapeAndRedirect
                    }
                    hcm::PathWithEscapedSlashesAction::UnescapeAndForward => {
                        EscapedSlashes::UnescapeAndForward
                    }
                },
            },
            strip_port: match strip_port_mode {
                Some(hcm::StripPortMode::StripAnyHostPort(true)) => StripPort::Any,
                _ if *strip_matching_host_port => StripPort::Matching,
                _ => StripPort::Never,
            },
            strip_dot: *strip_trailing_host_dot,
            local_reply: local_reply_config
                .as_ref()
                .map(|config| local_reply::compile(config, cx).at(|| "local_reply_config").map(Box::new))
                .transpose()?,
            early_mutations: extensions::early_mutations(early_header_mutation_extensions)?,
            buffer_limit: cx.buffer_limit(),
            add_proxy_protocol_state: bool_value(add_proxy_protocol_connection_state.as_ref(), true),
            inline_routes: match route_specifier {
                Some(hcm::RouteSpecifier::RouteConfig(config)) => {
                    Some((config.name.clone(), config.encode_to_vec().into()))
                }
                _ => None,
            },
            inline_scopes: match route_specifier {
                Some(hcm::RouteSpecifier::ScopedRoutes(scoped)) => inline_scopes(scoped),
                _ => None,
            },
        })
    }

    /// Name and encoded form of the inline scopes, for `/config_dump`.
    pub fn inline_scopes(&self) -> Option<(String, Vec<Bytes>)> {
        self.inline_scopes.clone()
    }

    /// Puts a filter that is not in the table of extensions before the router: how an embedder brings its own.
    pub fn push_filter(&mut self, name: &str, factory: Arc<dyn HttpFilterFactory>) {
        self.filters.push(FilterEntry { name: name.into(), factory, disabled: false });
    }

    /// Name and encoded form of the inline route configuration, for `/config_dump`.
    pub fn inline_routes(&self) -> Option<(String, Bytes)> {
        self.inline_routes.clone()
    }
}

fn scheme(proto: Option<&core::SchemeHeaderTransformation>) -> Result<Option<&'static str>, ConfigError> {
    use core::scheme_header_transformation::Transformation;
    let Some(proto) = proto else { return Ok(None) };
    if proto.match_upstream {
        return Err(ConfigError::field("match_upstream", "is not supported in this version"));
    }
    match &proto.transformation {
        None => Ok(None),
        Some(Transformation::SchemeToOverwrite(scheme)) => match scheme.as_str() {
            "http" => Ok(Some("http")),
            "https" => Ok(Some("https")),
            _ => Err(ConfigError::field("scheme_to_overwrite", "must be http or https")),
        },
    }
}

fn upgrade(proto: &hcm::UpgradeConfig) -> Result<(Box<str>, bool), ConfigError> {
    let hcm::UpgradeConfig { upgrade_type, filters, enabled } = proto;
    if !filters.is_empty() {
        return Err(ConfigError::field("filters", "upgrades go through the connection manager's filters"));
    }
    Ok((upgrade_type.to_ascii_lowercase().into(), bool_value(enabled.as_ref(), true)))
}
