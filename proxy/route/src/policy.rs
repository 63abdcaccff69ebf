//! The smaller policies of a route action.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::extensions::internal_redirect as redirect;
use waystation_filter_api::runtime::{Fraction, RuntimeFraction};
use waystation_filter_api::wire::{duration, refuse, type_name, unpack};
use waystation_format::HeaderMutationList;
use waystation_http::{HeaderName, Headers};
use waystation_schema::{At, ConfigError};

use crate::cluster::{ClusterCell, ClusterRef, header};
use crate::table::Compiler;

/// Compiled `RequestMirrorPolicy`.
#[derive(Debug)]
pub struct MirrorPolicy {
    cluster: MirrorCluster,
    /// The fraction of requests that is mirrored.
    pub fraction: RuntimeFraction,
    /// Whether the mirrored request is traced; like the original when unset.
    pub trace_sampled: Option<bool>,
    /// Whether `-shadow` is appended to the host; not when the host is rewritten.
    pub append_shadow_suffix: bool,
    /// `host_rewrite_literal`.
    pub host_rewrite: Option<Box<str>>,
    /// `request_headers_mutations`, of the copy alone.
    pub mutations: HeaderMutationList,
}

#[derive(Debug)]
enum MirrorCluster {
    Cluster(ClusterCell),
    Header(HeaderName),
}

impl MirrorPolicy {
    pub(crate) fn compile_all(
        protos: &[pb::route_action::RequestMirrorPolicy],
        compiler: &mut Compiler<'_>,
    ) -> Result<Box<[Self]>, ConfigError> {
        let compile = |(index, proto)| {
            Self::compile(proto, compiler).at(|| format!("request_mirror_policies[{index}]"))
        };
        protos.iter().enumerate().map(compile).collect()
    }

    fn compile(
        proto: &pb::route_action::RequestMirrorPolicy,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        let pb::route_action::RequestMirrorPolicy {
            cluster,
            cluster_header,
            runtime_fraction,
            trace_sampled,
            disable_shadow_host_suffix_append,
            request_headers_mutations,
            host_rewrite_literal,
        } = proto;
        let cluster = match (&**cluster, &**cluster_header) {
            ("", "") => return Err(ConfigError::new("one of cluster or cluster_header must be set")),
            (name, "") => MirrorCluster::Cluster(compiler.cluster(name).at(|| "cluster")?),
            ("", name) => MirrorCluster::Header(header("cluster_header", name)?),
            _ => return Err(ConfigError::new("only one of cluster and cluster_header may be set")),
        };
        Ok(Self {
            cluster,
            fraction: match runtime_fraction {
                Some(fraction) => compiler.cx.runtime.fractional_percent(fraction),
                None => RuntimeFraction::fixed(Fraction::ALWAYS),
            },
            trace_sampled: trace_sampled.map(|sampled| sampled.value),
            append_shadow_suffix: !disable_shadow_host_suffix_append,
            mutations: HeaderMutationList::compile(request_headers_mutations)
                .at(|| "request_headers_mutations")?,
            host_rewrite: (!host_rewrite_literal.is_empty()).then(|| host_rewrite_literal.as_str().into()),
        })
    }

    /// The cluster that gets the copy of a request.
    pub fn cluster<'a>(&'a self, headers: &'a Headers) -> ClusterRef<'a> {
        match &self.cluster {
            MirrorCluster::Cluster(cell) => ClusterRef::Cell(cell),
            MirrorCluster::Header(name) => ClusterRef::Named(headers.get(name).unwrap_or_default()),
        }
    }
}

/// Compiled `UpgradeConfig`.
#[derive(Debug)]
pub struct UpgradeConfig {
    /// `upgrade_type`, lower case.
    pub protocol: Box<str>,
    /// Whether the route allows or forbids it, against what the connection manager says.
    pub enabled: bool,
    /// `connect_config`: CONNECT ends here and its payload goes upstream as TCP.
    pub terminate_connect: bool,
    /// `connect_config.allow_post`: POST counts as CONNECT.
    pub allow_post: bool,
}

impl UpgradeConfig {
    pub(crate) fn compile_all(
        protos: &[pb::route_action::UpgradeConfig],
    ) -> Result<Box<[Self]>, ConfigError> {
        let mut compiled: Vec<Self> = Vec::with_capacity(protos.len());
        for (index, proto) in protos.iter().enumerate() {
            let upgrade = Self::compile(proto).at(|| format!("upgrade_configs[{index}]"))?;
            if compiled.iter().any(|other| other.protocol == upgrade.protocol) {
                let reason = format!("Duplicate upgrade {}", proto.upgrade_type);
                return Err(ConfigError::field(format!("upgrade_configs[{index}]"), reason));
            }
            compiled.push(upgrade);
        }
        Ok(compiled.into())
    }

    fn compile(proto: &pb::route_action::UpgradeConfig) -> Result<Self, ConfigError> {
        let pb::route_action::UpgradeConfig { upgrade_type, enabled, connect_config } = proto;
        let protocol = upgrade_type.to_ascii_lowercase();
        if let Some(connect) = connect_config {
            let why = "a PROXY header before the payload of CONNECT";
            refuse("proxy_protocol_config", connect.proxy_protocol_config.is_some(), why)
                .at(|| "connect_config")?;
            if !matches!(&*protocol, "connect" | "connect-udp") {
                let reason = format!("Non-CONNECT upgrade type {upgrade_type} has ConnectConfig");
                return Err(ConfigError::field("connect_config", reason));
            }
        }
        Ok(Self {
            protocol: protocol.into(),
            enabled: enabled.is_none_or(|enabled| enabled.value),
            terminate_connect: connect_config.is_some(),
            allow_post: connect_config.as_ref().is_some_and(|connect| connect.allow_post),
        })
    }
}

/// Compiled `InternalRedirectPolicy`.
#[derive(Debug)]
pub struct InternalRedirectPolicy {
    /// How many redirects one request may follow, 1 by default.
    pub max_redirects: u32,
    /// Whether `http` may redirect to `https` and back.
    pub allow_cross_scheme: bool,
    /// Predicates, all of which must allow the redirect.
    pub predicates: Box<[RedirectPredicate]>,
    /// Headers of the redirect response that the next request gets.
    pub headers_to_copy: Box<[HeaderName]>,
    statuses: Box<[u16]>,
}

/// Compiled internal redirect predicates.
#[derive(Debug)]
pub enum RedirectPredicate {
    /// Not to a route that this request was at before.
    PreviousRoutes,
    /// Only to routes of these names.
    AllowListedRoutes(Box<[Box<str>]>),
    /// Across schemes only from `https` to `http`, or within one scheme.
    SafeCrossScheme,
    /// As an object of the filter state says.
    FilterState {
        /// The object's key.
        key: Box<str>,
        /// What to do when it is missing.
        if_absent: bool,
    },
}

impl InternalRedirectPolicy {
    pub(crate) fn compile(proto: &pb::InternalRedirectPolicy) -> Result<Self, ConfigError> {
        let pb::InternalRedirectPolicy {
            max_internal_redirects,
            redirect_response_codes,
            predicates,
            allow_cross_scheme_redirect,
            response_headers_to_copy,
        } = proto;
        let predicates = predicates.iter().enumerate().map(|(index, proto)| {
            predicate(proto).at(|| "typed_config").at(|| format!("predicates[{index}]"))
        });
        let headers = response_headers_to_copy
            .iter()
            .enumerate()
            .map(|(index, name)| header(&format!("response_headers_to_copy[{index}]"), name));
        let statuses = redirect_response_codes.iter().filter_map(|status| u16::try_from(*status).ok());
        Ok(Self {
            max_redirects: max_internal_redirects.map_or(1, |max| max.value),
            allow_cross_scheme: *allow_cross_scheme_redirect,
            predicates: predicates.collect::<Result<_, _>>()?,
            headers_to_copy: headers.collect::<Result<_, _>>()?,
            statuses: if redirect_response_codes.is_empty() {
                [302].into()
            } else {
                // Statuses that are no redirects are passed over, as in Envoy.
                statuses.filter(|status| matches!(status, 301..=303 | 307 | 308)).collect()
            },
        })
    }

    /// The policy of the deprecated `internal_redirect_action: HANDLE_INTERNAL_REDIRECT`.
    pub(crate) fn deprecated(max_redirects: Option<u32>) -> Self {
        Self {
            max_redirects: max_redirects.unwrap_or(1),
            allow_cross_scheme: false,
            predicates: [].into(),
            headers_to_copy: [].into(),
            statuses: [302].into(),
        }
    }

    /// Whether a response of this status is followed.
    pub fn handles(&self, status: u16) -> bool {
        self.statuses.contains(&status)
    }
}

fn predicate(proto: &TypedExtensionConfig) -> Result<RedirectPredicate, ConfigError> {
    let any = proto.typed_config.as_ref().ok_or_else(|| ConfigError::new("is required"))?;
    match type_name(any) {
        "envoy.extensions.internal_redirect.previous_routes.v3.PreviousRoutesConfig" => {
            Ok(RedirectPredicate::PreviousRoutes)
        }
        "envoy.extensions.internal_redirect.safe_cross_scheme.v3.SafeCrossSchemeConfig" => {
            Ok(RedirectPredicate::SafeCrossScheme)
        }
        "envoy.extensions.internal_redirect.allow_listed_routes.v3.AllowListedRoutesConfig" => {
            let config: redirect::allow_listed_routes::v3::AllowListedRoutesConfig = unpack(any)?;
            Ok(RedirectPredicate::AllowListedRoutes(
                config.allowed_route_names.into_iter().map(Into::into).collect(),
            ))
        }
        "envoy.extensions.internal_redirect.filter_state.v3.FilterStateConfig" => {
            let config: redirect::filter_state::v3::FilterStateConfig = unpack(any)?;
            Ok(RedirectPredicate::FilterState {
                key: config.redirect_enabled_key.into(),
                if_absent: config.redirect_if_absent,
            })
        }
        name => Err(ConfigError::new(format!("not supported: internal redirect predicate {name}"))),
    }
}

/// Compiled `HedgePolicy`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HedgePolicy {
    /// Whether a per-try timeout starts the next try and leaves the old one running.
    pub on_per_try_timeout: bool,
}

impl HedgePolicy {
    /// `initial_requests` and `additional_request_chance` do nothing in Envoy, and nothing here.
    pub(crate) fn compile(proto: &pb::HedgePolicy) -> Self {
        let pb::HedgePolicy { initial_requests: _, additional_request_chance: _, hedge_on_per_try_timeout } =
            proto;
        Self { on_per_try_timeout: *hedge_on_per_try_timeout }
    }
}

/// Compiled `MaxStreamDuration`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct MaxStreamDuration {
    /// Zero is none.
    pub(crate) max: Option<Duration>,
    /// The bound of `grpc-timeout`, which counts only when this is set; zero is unbounded.
    pub(crate) grpc_header_max: Option<Duration>,
    pub(crate) grpc_header_offset: Option<Duration>,
}

impl MaxStreamDuration {
    pub(crate) fn compile(proto: &pb::route_action::MaxStreamDuration) -> Result<Self, ConfigError> {
        let pb::route_action::MaxStreamDuration {
            max_stream_duration,
            grpc_timeout_header_max,
            grpc_timeout_header_offset,
        } = proto;
        Ok(Self {
            max: duration("max_stream_duration", max_stream_duration.as_ref())?,
            grpc_header_max: duration("grpc_timeout_header_max", grpc_timeout_header_max.as_ref())?,
            grpc_header_offset: duration("grpc_timeout_header_offset", grpc_timeout_header_offset.as_ref())?,
        })
    }
}
