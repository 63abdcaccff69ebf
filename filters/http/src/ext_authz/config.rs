//! The filter's configuration.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3::ListStringMatcher;
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use pb::check_settings::ServiceOverride;
use pb::ext_authz::Services;
use pb::ext_authz_per_route::Override;
use waystation_filter_api::client::Clusters;
use waystation_filter_api::http::{FactoryContext, FilterConfig, HttpFilterFactory};
use waystation_filter_api::runtime::{RuntimeFlag, RuntimeFraction};
use waystation_filter_api::stream::filter_id;
use waystation_filter_api::value::{Metadata, Value};
use waystation_filter_api::wire::{bool_value, decode, refuse};
use waystation_format::{GrpcService, MutationRules};
use waystation_matchers::{MetadataMatcher, StringMatcher};
use waystation_schema::{At, ConfigError};

use super::check;
use super::http_service::HttpService;
use super::stats::Stats;

/// How long a service may take when the configuration does not say.
pub(super) const TIMEOUT: Duration = Duration::from_millis(200);

/// A compiled filter.
#[derive(Debug)]
pub(super) struct Config {
    /// By which clusters keep what is counted of them.
    pub(super) id: u64,
    pub(super) service: Service,
    pub(super) stats: Stats,
    pub(super) stat_prefix: Box<str>,
    pub(super) failure_mode_allow: bool,
    pub(super) failure_mode_header: bool,
    pub(super) clear_route_cache: bool,
    pub(super) status_on_error: u16,
    pub(super) validate_mutations: bool,
    pub(super) rules: Option<MutationRules>,
    pub(super) charge_cluster: bool,
    pub(super) ingest_metadata: bool,
    /// Bytes; 0 is as many as there are.
    pub(super) max_denied_body: usize,
    pub(super) deny_at_disable: RuntimeFlag,
    pub(super) request: RequestConfig,
    enabled: Option<RuntimeFraction>,
    enabled_metadata: Option<MetadataMatcher>,
    body: Option<Body>,
}

/// What the service is told of a request.
#[derive(Debug)]
pub(super) struct RequestConfig {
    /// Of all headers, when nothing is said.
    pub(super) allowed: Option<Vec<StringMatcher>>,
    pub(super) disallowed: Vec<StringMatcher>,
    pub(super) raw_headers: bool,
    pub(super) body_as_bytes: bool,
    pub(super) peer_certificate: bool,
    pub(super) tls_session: bool,
    pub(super) metadata: Namespaces,
    pub(super) route_metadata: Namespaces,
    /// `Peer.labels` of the destination, encoded.
    pub(super) labels: Vec<u8>,
}

/// Namespaces of metadata that the service is told of.
#[derive(Debug)]
pub(super) struct Namespaces {
    pub(super) untyped: Vec<String>,
    pub(super) typed: Vec<String>,
}

/// How much of a body the service is shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Body {
    pub(super) max: usize,
    /// Whether it may be a part of it.
    pub(super) partial: bool,
}

/// Who is asked.
#[derive(Debug)]
pub(super) enum Service {
    Grpc(GrpcService),
    Http(Arc<HttpService>),
}

/// Compiled `ExtAuthzPerRoute`.
#[derive(Debug, Default)]
pub(super) struct PerRoute {
    pub(super) disabled: bool,
    /// `AttributeContext.context_extensions`, encoded: of entries of one key, a reader takes the last.
    pub(super) extensions: Vec<u8>,
    pub(super) service: Option<Service>,
    no_body: bool,
    body: Option<Body>,
}

impl Config {
    /// Whether somebody is to be asked.
    pub(super) fn enabled(&self, metadata: &Metadata, random: u64) -> bool {
        self.enabled.as_ref().is_none_or(|fraction| fraction.contains(random))
            && self.enabled_metadata.as_ref().is_none_or(|matcher| matcher.is_match(metadata))
    }

    /// What is shown of a body on a route with this configuration.
    pub(super) fn body_for(&self, of_route: Option<&PerRoute>) -> Option<Body> {
        match of_route {
            Some(route) if route.no_body => None,
            Some(route) => route.body.or(self.body),
            None => self.body,
        }
    }
}

pub(super) fn compile(
    wire: &[u8],
    cx: &FactoryContext<'_>,
) -> Result<Arc<dyn HttpFilterFactory>, ConfigError> {
    Ok(Arc::new(Config::compile(&decode(wire)?, cx)?))
}

pub(super) fn compile_route(wire: &[u8], cx: &FactoryContext<'_>) -> Result<FilterConfig, ConfigError> {
    Ok(Arc::new(PerRoute::compile(&decode(wire)?, cx)?))
}

impl Config {
    pub(super) fn compile(proto: &pb::ExtAuthz, cx: &FactoryContext<'_>) -> Result<Self, ConfigError> {
        let pb::ExtAuthz {
            services,
            transport_api_version,
            failure_mode_allow,
            failure_mode_allow_header_add,
            with_request_body,
            clear_route_cache,
            status_on_error,
            validate_mutations,
            metadata_context_namespaces,
            typed_metadata_context_namespaces,
            route_metadata_context_namespaces,
            route_typed_metadata_context_namespaces,
            filter_enabled,
            filter_enabled_metadata,
            deny_at_disable,
            include_peer_certificate,
            stat_prefix,
            bootstrap_metadata_labels_key,
            allowed_headers,
            disallowed_headers,
            include_tls_session,
            charge_cluster_response_stats,
            encode_raw_headers,
            decoder_header_mutation_rules,
            enable_dynamic_metadata_ingestion,
            filter_metadata,
            emit_filter_state_stats,
            max_denied_response_body_bytes,
            enforce_response_header_limits,
            shadow_mode,
            // There are no spans.
            emit_client_span: _,
        } = proto;
        refuse("filter_metadata", filter_metadata.is_some(), "filter state for logs")?;
        refuse("emit_filter_state_stats", *emit_filter_state_stats, "filter state for logs")?;
        refuse("enforce_response_header_limits", *enforce_response_header_limits, "limits of responses")?;
        refuse("shadow_mode", *shadow_mode, "decisions that another filter enforces")?;
        // The default is AUTO, which is V3 where there is no other.
        #[expect(deprecated, reason = "named to be refused")]
        let v2 = i32::from(core::ApiVersion::V2);
        if *transport_api_version == v2 {
            let reason = "V2 (and AUTO) xDS transport protocol versions are deprecated";
            return Err(ConfigError::field("transport_api_version", reason));
        }
        let services = services.as_ref().ok_or_else(|| ConfigError::field("services", "is required"))?;
        let service = Service::compile(services, cx.clusters)?;
        let old = match services {
            Services::HttpService(http) => http.authorization_request.as_ref(),
            Services::GrpcService(_) => None,
        };
        #[expect(deprecated, reason = "configurations still use it")]
        let old = old.and_then(|request| request.allowed_headers.as_ref());
        if allowed_headers.is_some() && old.is_some() {
            return Err(ConfigError::new("Invalid duplicate configuration for allowed_headers."));
        }
        let is_http = matches!(service, Service::Http(_));
        let listed = allowed_headers.as_ref().or(old).map(|list| matchers(list).at(|| "allowed_headers"));
        let mut allowed = listed.transpose()?;
        if is_http {
            // A service over HTTP is not told more than that when nothing is said.
            let usual = ["authorization", ":method", ":path", ":authority"].map(StringMatcher::exact);
            allowed.get_or_insert_default().extend(usual);
        }
        let disallowed = disallowed_headers.as_ref().map(|list| matchers(list).at(|| "disallowed_headers"));
        let metadata = filter_enabled_metadata.as_ref();
        let metadata = metadata.map(|proto| MetadataMatcher::compile(proto).at(|| "filter_enabled_metadata"));
        let rules = decoder_header_mutation_rules.as_ref();
        let rules = rules.map(|proto| MutationRules::compile(proto).at(|| "decoder_header_mutation_rules"));
        let deny = deny_at_disable.as_ref().map_or_else(
            || RuntimeFlag::fixed(false),
            |flag| cx.runtime.flag(&flag.runtime_key, bool_value(flag.default_value.as_ref(), false)),
        );
        let scope = cx.stats.scope("ext_authz").tag("envoy.ext_authz_prefix", stat_prefix);
        Ok(Self {
            id: filter_id(),
            service,
            stats: scope.group(),
            stat_prefix: stat_prefix.as_str().into(),
            failure_mode_allow: *failure_mode_allow,
            failure_mode_header: *failure_mode_allow_header_add,
            clear_route_cache: *clear_route_cache,
            status_on_error: status(status_on_error.as_ref()),
            validate_mutations: *validate_mutations,
            rules: rules.transpose()?,
            charge_cluster: bool_value(charge_cluster_response_stats.as_ref(), true),
            ingest_metadata: bool_value(enable_dynamic_metadata_ingestion.as_ref(), true),
            max_denied_body: *max_denied_response_body_bytes as usize,
            deny_at_disable: deny,
            request: RequestConfig {
                allowed,
                disallowed: disallowed.transpose()?.unwrap_or_default(),
                raw_headers: *encode_raw_headers,
                body_as_bytes: with_request_body.as_ref().is_some_and(|body| body.pack_as_bytes),
                peer_certificate: *include_peer_certificate,
                tls_session: *include_tls_session,
                metadata: Namespaces {
                    untyped: metadata_context_namespaces.clone(),
                    typed: typed_metadata_context_namespaces.clone(),
                },
                route_metadata: Namespaces {
                    untyped: route_metadata_context_namespaces.clone(),
                    typed: route_typed_metadata_context_namespaces.clone(),
                },
                labels: labels(bootstrap_metadata_labels_key, cx),
            },
            enabled: filter_enabled.as_ref().map(|fraction| cx.runtime.fractional_percent(fraction)),
            enabled_metadata: metadata.transpose()?,
            body: with_request_body.as_ref().map(Body::compile).transpose().at(|| "with_request_body")?,
        })
    }
}

impl PerRoute {
    pub(super) fn compile(
        proto: &pb::ExtAuthzPerRoute,
        cx: &FactoryContext<'_>,
    ) -> Result<Self, ConfigError> {
        let settings = match &proto.r#override {
            None => return Err(ConfigError::field("override", "is required")),
            Some(Override::Disabled(disabled)) => return Ok(Self { disabled: *disabled, ..Self::default() }),
            Some(Override::CheckSettings(settings)) => settings,
        };
        let compile = || {
            let pb::CheckSettings {
                context_extensions,
                disable_request_body_buffering,
                with_request_body,
                service_override,
                // There are no spans.
                emit_client_span: _,
            } = settings;
            if *disable_request_body_buffering && with_request_body.is_some() {
                let reason = "Invalid configuration for check_settings. Only one of \
                              disable_request_body_buffering or with_request_body can be set.";
                return Err(ConfigError::new(reason));
            }
            let service = service_override.as_ref().map(|service| match service {
                ServiceOverride::GrpcService(grpc) => Service::grpc(grpc, cx.clusters),
                ServiceOverride::HttpService(http) => Service::http(http, cx.clusters),
            });
            // Sorted, so that equal settings are equal bytes.
            let sorted: BTreeMap<_, _> = context_extensions.iter().collect();
            let mut extensions = Vec::new();
            for (key, value) in sorted {
                check::map_entry(check::CONTEXT_EXTENSIONS, key, value, &mut extensions);
            }
            Ok(Self {
                disabled: false,
                extensions,
                service: service.transpose()?,
                no_body: *disable_request_body_buffering,
                body: with_request_body.as_ref().map(Body::compile).transpose().at(|| "with_request_body")?,
            })
        };
        compile().at(|| "check_settings")
    }
}

impl Body {
    fn compile(proto: &pb::BufferSettings) -> Result<Self, ConfigError> {
        let pb::BufferSettings { max_request_bytes, allow_partial_message, pack_as_bytes: _ } = proto;
        if *max_request_bytes == 0 {
            return Err(ConfigError::field("max_request_bytes", "value must be greater than 0"));
        }
        Ok(Self { max: *max_request_bytes as usize, partial: *allow_partial_message })
    }
}

impl Service {
    fn compile(services: &Services, clusters: &dyn Clusters) -> Result<Self, ConfigError> {
        match services {
            Services::GrpcService(grpc) => Self::grpc(grpc, clusters),
            Services::HttpService(http) => Self::http(http, clusters),
        }
    }

    fn grpc(proto: &core::GrpcService, clusters: &dyn Clusters) -> Result<Self, ConfigError> {
        GrpcService::compile(proto, Some(TIMEOUT), clusters).map(Self::Grpc).at(|| "grpc_service")
    }

    fn http(proto: &pb::HttpService, clusters: &dyn Clusters) -> Result<Self, ConfigError> {
        HttpService::compile(proto, clusters)
            .map(|service| Self::Http(Arc::new(service)))
            .at(|| "http_service")
    }
}

/// Compiles a list of what names of headers may be.
pub(super) fn matchers(list: &ListStringMatcher) -> Result<Vec<StringMatcher>, ConfigError> {
    StringMatcher::compile_list(list)
}

/// 403 unless another is said that can be sent.
fn status(proto: Option<&HttpStatus>) -> u16 {
    let code = proto.and_then(|status| u16::try_from(status.code).ok());
    code.filter(|code| (100..600).contains(code)).unwrap_or(403)
}

/// `node.metadata.<key>`, the texts in it, as labels.
fn labels(key: &str, cx: &FactoryContext<'_>) -> Vec<u8> {
    let mut labels = Vec::new();
    if let Some(Value::Struct(fields)) = cx.node.metadata.get(key) {
        for (name, value) in fields {
            check::map_entry(check::LABELS, name, value.as_str().unwrap_or_default(), &mut labels);
        }
    }
    labels
}
