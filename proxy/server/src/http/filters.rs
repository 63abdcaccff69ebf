//! The HTTP filters of this binary, and the compiled filter chain.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::google::protobuf::Any;
use pb::http_filter::ConfigType;
use waystation_filter_api::http::{
    FactoryContext, FilterConfig, HttpFilterExtension, HttpFilterFactory, InnerFilters,
};
use waystation_filter_api::wire::{bool_value, positive, type_name, unpack};
use waystation_format::AccessLog;
use waystation_http::Known;
use waystation_schema::{At, ConfigError};
use waystation_stats::Scope;
use waystation_upstream::Cluster;

use self::discovered::DiscoveredFilter;
use crate::context::{CompileContext, Shared};

pub(crate) mod discovered;
mod on_demand;

/// Every HTTP filter besides the router.
pub const EXTENSIONS: &[&HttpFilterExtension] = &[
    &waystation_http_filters::adaptive_concurrency::EXTENSION,
    &waystation_http_filters::admission_control::EXTENSION,
    &waystation_http_filters::bandwidth_limit::EXTENSION,
    &waystation_http_filters::buffer::EXTENSION,
    &waystation_http_filters::composite::EXTENSION,
    &waystation_http_filters::ext_authz::EXTENSION,
    &waystation_http_filters::fault::EXTENSION,
    &waystation_http_filters::header_mutation::EXTENSION,
    &waystation_http_filters::health_check::EXTENSION,
    &waystation_http_filters::match_delegate::EXTENSION,
    &on_demand::EXTENSION,
    &waystation_ratelimit::http::EXTENSION,
    &waystation_rbac::http::EXTENSION,
];

/// The filters besides the codec that may stand on the upstream side; Envoy has no others there either.
const UPSTREAM: &[&str] = &[
    "envoy.extensions.filters.common.matcher.action.v3.ExtensionWithMatcher",
    "envoy.extensions.common.matching.v3.ExtensionWithMatcher",
    "envoy.extensions.filters.http.admission_control.v3.AdmissionControl",
    "envoy.extensions.filters.http.buffer.v3.Buffer",
    "envoy.extensions.filters.http.composite.v3.Composite",
    "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
];

const UPSTREAM_CODEC: &str = "envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec";

const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";

/// One filter of a chain.
#[derive(Debug)]
pub(crate) struct FilterEntry {
    /// The name under which routes configure it.
    pub(crate) name: Box<str>,
    pub(crate) factory: Arc<dyn HttpFilterFactory>,
    /// Unless the route says otherwise.
    pub(crate) disabled: bool,
}

/// The headers that `strict_check_headers` may name.
pub(crate) const STRICT_HEADERS: [Known; 5] = [
    Known::XEnvoyUpstreamRqTimeoutMs,
    Known::XEnvoyUpstreamRqPerTryTimeoutMs,
    Known::XEnvoyMaxRetries,
    Known::XEnvoyRetryOn,
    Known::XEnvoyRetryGrpcOn,
];

/// The terminal filter's configuration.
#[derive(Debug, Default)]
pub(crate) struct RouterConfig {
    pub(crate) dynamic_stats: bool,
    pub(crate) suppress_envoy_headers: bool,
    /// `strict_check_headers`: a bit for each of [`STRICT_HEADERS`].
    pub(crate) strict_headers: u8,
    pub(crate) respect_expected_timeout: bool,
    /// `upstream_log`: a line for each attempt.
    pub(crate) upstream_logs: Vec<AccessLog>,
    /// `flush_upstream_log_on_upstream_stream`.
    pub(crate) upstream_log_on_stream: bool,
    /// `upstream_log_flush_interval`.
    pub(crate) upstream_log_interval: Option<Duration>,
    /// `upstream_http_filters` before the codec.
    pub(crate) upstream_filters: Box<[FilterEntry]>,
}

/// `HttpProtocolOptions.http_filters` before the codec, as a cluster carries them.
pub(crate) struct UpstreamFilters(Box<[FilterEntry]>);

impl UpstreamFilters {
    /// Those of a cluster that has any.
    pub(crate) fn of(cluster: &Cluster) -> Option<&[FilterEntry]> {
        let own: &Self = cluster.upstream_filters.as_deref()?.downcast_ref()?;
        Some(&own.0)
    }

    /// Compiles the filters of a cluster with this scope. A codec alone keeps those of the router away, too.
    pub(crate) fn compile(
        options: &HttpProtocolOptions,
        scope: &Scope,
        cx: &CompileContext<'_>,
    ) -> Result<Option<waystation_upstream::cluster::UpstreamFilters>, ConfigError> {
        let protos = &options.http_filters;
        let is_codec = |filter: &pb::HttpFilter| matches!(&filter.config_type, Some(ConfigType::TypedConfig(any)) if type_name(any) == UPSTREAM_CODEC);
        if protos.last().is_some_and(|last| !is_codec(last)) {
            return Err(ConfigError::new(format!(
                "The codec filter is the only valid terminal upstream HTTP filter, use '{UPSTREAM_CODEC}'"
            )));
        }
        let entries = compile_upstream(protos, "http_filters", scope, cx)?;
        Ok((!protos.is_empty()).then(|| Arc::new(Self(entries)) as _))
    }
}

/// Compiles `http_filters`. The router must be last and only there; an empty chain is one without a router.
pub(crate) fn compile(
    protos: &[pb::HttpFilter],
    scope: &Scope,
    cx: &CompileContext<'_>,
) -> Result<(Vec<FilterEntry>, RouterConfig), ConfigError> {
    let mut entries = Vec::new();
    let mut router = RouterConfig { dynamic_stats: true, ..RouterConfig::default() };
    for (index, proto) in protos.iter().enumerate() {
        let last = index + 1 == protos.len();
        let compiled = compile_one(proto, last, scope, cx, &mut router)
            .at(|| format!("http_filters[{}]", proto.name))?;
        entries.extend(compiled);
    }
    Ok((entries, router))
}

/// Compiles the filters of the upstream side, of which the codec is the last.
fn compile_upstream(
    protos: &[pb::HttpFilter],
    field: &str,
    scope: &Scope,
    cx: &CompileContext<'_>,
) -> Result<Box<[FilterEntry]>, ConfigError> {
    let mut entries = Vec::new();
    for (index, proto) in protos.iter().enumerate() {
        let last = index + 1 == protos.len();
        let compile = || {
            let type_name = match &proto.config_type {
                Some(ConfigType::TypedConfig(any)) => type_name(any),
                Some(ConfigType::ConfigDiscovery(_)) => {
                    return Err(ConfigError::field(
                        "config_discovery",
                        "is not supported on the upstream side",
                    ));
                }
                None => return Err(ConfigError::field("typed_config", "is required")),
            };
            check_terminal(&proto.name, type_name == UPSTREAM_CODEC, last, "upstream http")?;
            if !last && !UPSTREAM.contains(&type_name) && !proto.is_optional {
                return Err(ConfigError::new(format!(
                    "Didn't find a registered implementation for '{}' with type URL: '{type_name}'",
                    proto.name
                )));
            }
            match last || !UPSTREAM.contains(&type_name) {
                true => Ok(None),
                false => compile_one(proto, false, scope, cx, &mut RouterConfig::default()),
            }
        };
        entries.extend(compile().at(|| format!("{field}[{}]", proto.name))?);
    }
    Ok(entries.into())
}

/// A terminal filter stands last, and only there.
fn check_terminal(name: &str, terminal: bool, last: bool, chain: &str) -> Result<(), ConfigError> {
    let reason = match (terminal, last) {
        (true, true) | (false, false) => return Ok(()),
        (true, false) => format!(
            "Error: terminal filter named {name} of type {name} must be the last filter in a {chain} filter chain."
        ),
        (false, true) => format!(
            "Error: non-terminal filter named {name} of type {name} is the last filter in a {chain} filter chain."
        ),
    };
    Err(ConfigError::new(reason))
}

fn compile_one(
    proto: &pb::HttpFilter,
    last: bool,
    scope: &Scope,
    cx: &CompileContext<'_>,
    router: &mut RouterConfig,
) -> Result<Option<FilterEntry>, ConfigError> {
    let any = match &proto.config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(source)) => {
            return discover(proto, source, last, scope, cx).at(|| "config_discovery").map(Some);
        }
        None => return Err(ConfigError::field("typed_config", "is required")),
    };
    let terminal = type_name(any) == ROUTER;
    check_terminal(&proto.name, terminal, last, "http")?;
    if terminal {
        *router = compile_router(&unpack(any)?, scope, cx).at(|| "typed_config")?;
        return Ok(None);
    }
    let extension = match find(&proto.name, any) {
        Err(_) if proto.is_optional => return Ok(None),
        found => found?,
    };
    let inner = Inner { scope, shared: cx.shared, cx: Some(cx) };
    let factory = inner.compile_as(extension, any).at(|| "typed_config")?;
    Ok(Some(FilterEntry { name: proto.name.as_str().into(), factory, disabled: proto.disabled }))
}

/// The extension that a filter's configuration is of.
fn find(name: &str, any: &Any) -> Result<&'static HttpFilterExtension, ConfigError> {
    let found = EXTENSIONS.iter().copied().find(|extension| extension.type_name == type_name(any));
    found.ok_or_else(|| {
        ConfigError::new(format!(
            "Didn't find a registered implementation for '{name}' with type URL: '{}'",
            type_name(any)
        ))
    })
}

/// Compiles filters below a connection manager's statistics.
struct Inner<'a> {
    scope: &'a Scope,
    shared: &'a Arc<Shared>,
    /// Where something may still be subscribed to.
    cx: Option<&'a CompileContext<'a>>,
}

impl Inner<'_> {
    fn compile_as(
        &self,
        extension: &HttpFilterExtension,
        any: &Any,
    ) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
        self.with(|context| (extension.compile)(&any.value, context))
    }

    fn with<R>(&self, compile: impl FnOnce(&FactoryContext<'_>) -> R) -> R {
        let shared = self.shared;
        compile(&FactoryContext {
            stats: self.scope,
            root: &shared.stats.root(),
            runtime: &shared.runtime,
            node: &shared.node,
            local_cluster: shared.local_cluster.get(),
            singletons: &shared.singletons,
            filters: self,
            clusters: &**shared,
        })
    }
}

impl InnerFilters for Inner<'_> {
    fn compile(&self, name: &str, config: Option<&Any>) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
        let any = config.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        self.compile_as(find(name, any)?, any).at(|| "typed_config")
    }

    fn discover(
        &self,
        name: &str,
        source: &core::ExtensionConfigSource,
    ) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
        let cx = self.cx.ok_or_else(|| {
            ConfigError::new("Failed to get downstream factory context or server factory context.")
        })?;
        let place = discovered_place(name, source, self.scope, cx)?;
        Ok(place)
    }
}

fn discover(
    proto: &pb::HttpFilter,
    source: &core::ExtensionConfigSource,
    last: bool,
    scope: &Scope,
    cx: &CompileContext<'_>,
) -> Result<FilterEntry, ConfigError> {
    let name = proto.name.as_str();
    let place = discovered_place(name, source, scope, cx)?;
    if last {
        return Err(ConfigError::new("the last filter must be the router, which cannot be discovered"));
    }
    Ok(FilterEntry { name: name.into(), factory: place, disabled: proto.disabled })
}

fn discovered_place(
    name: &str,
    source: &core::ExtensionConfigSource,
    scope: &Scope,
    cx: &CompileContext<'_>,
) -> Result<Arc<DiscoveredFilter>, ConfigError> {
    let place = Arc::new(DiscoveredFilter::compile(name, source, scope, cx.shared)?);
    let source = source.config_source.as_ref();
    let source = source.ok_or_else(|| ConfigError::field("config_source", "is required"))?;
    cx.discover_filter(source, name, &place);
    Ok(place)
}

fn compile_router(
    proto: &Router,
    scope: &Scope,
    cx: &CompileContext<'_>,
) -> Result<RouterConfig, ConfigError> {
    #[expect(deprecated, reason = "named to show that it is ignored")]
    let Router {
        dynamic_stats,
        // There are no spans yet, so no child spans.
        start_child_span: _,
        upstream_log,
        upstream_log_options,
        suppress_envoy_headers,
        strict_check_headers,
        respect_expected_rq_timeout,
        suppress_grpc_request_failure_code_stats,
        upstream_http_filters,
        reject_connect_request_early_data,
    } = proto;
    for (field, set) in [
        ("suppress_grpc_request_failure_code_stats", *suppress_grpc_request_failure_code_stats),
        ("reject_connect_request_early_data", bool_value(reject_connect_request_early_data.as_ref(), false)),
    ] {
        if set {
            return Err(ConfigError::field(field, "is not supported in this version"));
        }
    }
    let logs = upstream_log.iter().enumerate().map(|(index, proto)| {
        AccessLog::compile(proto, &cx.shared.access_logs, &cx.shared.runtime)
            .at(|| format!("upstream_log[{index}]"))
    });
    let options = upstream_log_options.unwrap_or_default();
    let interval = options.upstream_log_flush_interval.as_ref();
    Ok(RouterConfig {
        upstream_logs: logs.collect::<Result<_, _>>()?,
        upstream_log_on_stream: options.flush_upstream_log_on_upstream_stream,
        upstream_log_interval: positive("upstream_log_flush_interval", interval)
            .at(|| "upstream_log_options")?,
        upstream_filters: compile_upstream(upstream_http_filters, "upstream_http_filters", scope, cx)?,
        dynamic_stats: bool_value(dynamic_stats.as_ref(), true),
        suppress_envoy_headers: *suppress_envoy_headers,
        strict_headers: (0..)
            .zip(STRICT_HEADERS)
            .filter(|(_, known)| {
                strict_check_headers.iter().any(|name| name.eq_ignore_ascii_case(known.as_str()))
            })
            .fold(0, |mask, (bit, _)| mask | 1 << bit),
        respect_expected_timeout: *respect_expected_rq_timeout,
    })
}

/// Compiles a filter's per-route configuration; nothing for a message that no filter knows.
pub(crate) fn compile_route_config(
    name: &str,
    any: &Any,
    shared: &Arc<Shared>,
) -> Result<Option<FilterConfig>, ConfigError> {
    let found = EXTENSIONS.iter().find(|extension| extension.route_type_name == Some(type_name(any)));
    let Some(extension) = found else {
        let without = |extension: &&&HttpFilterExtension| {
            extension.route_type_name.is_none() && extension.type_name == type_name(any)
        };
        if EXTENSIONS.iter().any(|extension| without(&extension)) {
            return Err(ConfigError::new(format!(
                "The filter {name} doesn't support virtual host or route specific configurations"
            )));
        }
        return Ok(None);
    };
    let inner = Inner { scope: &shared.stats.root(), shared, cx: None };
    inner.with(|context| (extension.compile_route)(&any.value, context)).map(Some)
}
