//! What a route does with its requests.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::RoutingPriority;
use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_action::{ClusterNotFoundResponseCode, InternalRedirectAction};
use waystation_filter_api::wire::{bool_value, duration, refuse};
use waystation_http::Headers;
use waystation_ratelimit::descriptor::Policies;
use waystation_schema::{At, ConfigError};

use crate::cluster::{ClusterSpecifier, MetadataMatch, Priority, Target, criteria};
use crate::direct_response::DirectResponse;
use crate::filter_config::FilterConfigs;
use crate::hash::HashPolicy;
use crate::matching::PathPattern;
use crate::policy::{HedgePolicy, InternalRedirectPolicy, MaxStreamDuration, MirrorPolicy, UpgradeConfig};
use crate::rate_limits;
use crate::redirect::Redirect;
use crate::retry::{self, RetryPolicy};
use crate::rewrite::{HostRewrite, PathRewrite};
use crate::table::Compiler;
use crate::virtual_host::Defaults;

/// The route timeout where none is configured.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// Compiled `Route.action`.
#[derive(Debug)]
pub enum Action {
    /// Forward to a cluster.
    Route(Box<RouteAction>),
    /// Redirect the client; the location comes from [`Route::redirect`](crate::Route::redirect).
    Redirect(Box<Redirect>),
    /// Answer here.
    DirectResponse(Box<DirectResponse>),
    /// Some filter answers; a request that reaches the router gets none (404).
    NonForwarding,
}

/// Compiled `RouteAction`.
#[derive(Debug)]
pub struct RouteAction {
    /// Where to.
    pub clusters: ClusterSpecifier,
    /// The status when the cluster does not exist.
    pub cluster_not_found_status: u16,
    /// Endpoint metadata that the load balancer must match; a weighted cluster has its own, merged.
    pub metadata_match: Option<MetadataMatch>,
    /// The path rewrite, applied by [`Route::rewrite`](crate::Route::rewrite).
    pub path_rewrite: Option<PathRewrite>,
    /// The host rewrite. All but [`HostRewrite::Auto`] are applied by [`Route::rewrite`](crate::Route::rewrite).
    pub host_rewrite: Option<HostRewrite>,
    /// Whether a host rewrite appends the old host to `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// From the end of the request to that of the response; zero is none. 15 s by default.
    pub timeout: Duration,
    /// The stream's idle timeout, zero is none; the connection manager's when unset.
    pub idle_timeout: Option<Duration>,
    /// The flush timeout, zero is none; the connection manager's when unset.
    pub flush_timeout: Option<Duration>,
    /// The route's retry policy, else the virtual host's.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// The route's mirrors, else the virtual host's, else the table's.
    pub mirrors: Arc<[MirrorPolicy]>,
    /// Which circuit breakers count.
    pub priority: Priority,
    /// `rate_limits`, if there are any.
    pub rate_limits: Option<Box<Policies>>,
    /// `include_vh_rate_limits`: the virtual host's apply beside the route's own.
    pub include_vh_rate_limits: bool,
    /// Hash policies in order.
    pub hash_policies: Box<[HashPolicy]>,
    /// Upgrades that the route allows or forbids.
    pub upgrades: Box<[UpgradeConfig]>,
    /// Following redirects of upstream.
    pub internal_redirect: Option<Box<InternalRedirectPolicy>>,
    /// The route's hedge policy, else the virtual host's.
    pub hedge: HedgePolicy,
    pub(crate) max_stream_duration: Option<MaxStreamDuration>,
    /// Deprecated `max_grpc_timeout`; zero is unbounded.
    pub(crate) max_grpc_timeout: Option<Duration>,
    pub(crate) grpc_timeout_offset: Option<Duration>,
}

impl Action {
    pub(crate) fn compile(
        proto: Option<&pb::route::Action>,
        pattern: &PathPattern,
        levels: &FilterConfigs,
        defaults: &Defaults,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        use pb::route::Action as Proto;
        match proto {
            None => Err(ConfigError::field("action", "is required")),
            Some(Proto::Route(action)) => {
                let action =
                    RouteAction::compile(action, pattern, levels, defaults, compiler).at(|| "route")?;
                Ok(Self::Route(Box::new(action)))
            }
            Some(Proto::Redirect(redirect)) => {
                Ok(Self::Redirect(Box::new(Redirect::compile(redirect, pattern).at(|| "redirect")?)))
            }
            Some(Proto::DirectResponse(response)) => {
                let response = DirectResponse::compile(response, compiler.max_direct_response)
                    .at(|| "direct_response")?;
                Ok(Self::DirectResponse(Box::new(response)))
            }
            Some(Proto::FilterAction(_)) => Err(ConfigError::field("filter_action", "not supported")),
            Some(Proto::NonForwardingAction(_)) => Ok(Self::NonForwarding),
        }
    }
}

impl RouteAction {
    #[expect(deprecated, reason = "deprecated fields are implemented or refused, not passed over")]
    fn compile(
        proto: &pb::RouteAction,
        pattern: &PathPattern,
        levels: &FilterConfigs,
        defaults: &Defaults,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        let pb::RouteAction {
            cluster_not_found_response_code: _,
            metadata_match,
            prefix_rewrite,
            regex_rewrite,
            path_rewrite_policy,
            path_rewrite,
            append_x_forwarded_host,
            timeout,
            idle_timeout,
            flush_timeout,
            // Decides only about early data upstream, which is never sent.
            early_data_policy: _,
            retry_policy,
            retry_policy_typed_config,
            request_mirror_policies,
            priority: _,
            rate_limits,
            include_vh_rate_limits,
            hash_policy,
            cors,
            max_grpc_timeout,
            grpc_timeout_offset,
            upgrade_configs,
            internal_redirect_policy,
            internal_redirect_action: _,
            max_internal_redirects,
            hedge_policy,
            max_stream_duration,
            cluster_specifier,
            host_rewrite_specifier,
        } = proto;
        refuse("cors", cors.is_some(), "use typed_per_filter_config of envoy.filters.http.cors")?;
        let criteria = criteria(metadata_match.as_ref());
        let clusters = ClusterSpecifier::compile(cluster_specifier.as_ref(), &criteria, levels, compiler)?;
        let retry_policy =
            match retry::compile_either(retry_policy.as_ref(), retry_policy_typed_config.as_ref())? {
                Some(policy) => Some(Arc::new(policy)),
                None => defaults.retry_policy.clone(),
            };
        let internal_redirect = match internal_redirect_policy {
            Some(policy) => Some(InternalRedirectPolicy::compile(policy).at(|| "internal_redirect_policy")?),
            None if proto.internal_redirect_action() == InternalRedirectAction::HandleInternalRedirect => {
                Some(InternalRedirectPolicy::deprecated(max_internal_redirects.map(|max| max.value)))
            }
            None => None,
        };
        let mirrors = MirrorPolicy::compile_all(request_mirror_policies, compiler)?;
        Ok(Self {
            clusters,
            cluster_not_found_status: match proto.cluster_not_found_response_code() {
                ClusterNotFoundResponseCode::ServiceUnavailable => 503,
                ClusterNotFoundResponseCode::NotFound => 404,
                ClusterNotFoundResponseCode::InternalServerError => 500,
            },
            metadata_match: MetadataMatch::compile(&criteria).at(|| "metadata_match")?,
            path_rewrite: PathRewrite::compile(
                prefix_rewrite,
                regex_rewrite.as_ref(),
                path_rewrite_policy.as_ref(),
                path_rewrite,
                pattern,
            )?,
            host_rewrite: HostRewrite::compile(host_rewrite_specifier.as_ref())?,
            append_x_forwarded_host: *append_x_forwarded_host,
            timeout: duration("timeout", timeout.as_ref())?.unwrap_or(DEFAULT_TIMEOUT),
            idle_timeout: duration("idle_timeout", idle_timeout.as_ref())?,
            flush_timeout: duration("flush_timeout", flush_timeout.as_ref())?,
            retry_policy,
            mirrors: if mirrors.is_empty() { Arc::clone(&defaults.mirrors) } else { mirrors.into() },
            priority: match proto.priority() {
                RoutingPriority::Default => Priority::Default,
                RoutingPriority::High => Priority::High,
            },
            rate_limits: rate_limits::compile(rate_limits, compiler.cx)?,
            include_vh_rate_limits: bool_value(include_vh_rate_limits.as_ref(), false),
            hash_policies: HashPolicy::compile_all(hash_policy)?,
            upgrades: UpgradeConfig::compile_all(upgrade_configs)?,
            internal_redirect: internal_redirect.map(Box::new),
            hedge: hedge_policy.as_ref().map_or(defaults.hedge, HedgePolicy::compile),
            max_stream_duration: max_stream_duration
                .as_ref()
                .map(|proto| MaxStreamDuration::compile(proto).at(|| "max_stream_duration"))
                .transpose()?,
            max_grpc_timeout: duration("max_grpc_timeout", max_grpc_timeout.as_ref())?,
            grpc_timeout_offset: duration("grpc_timeout_offset", grpc_timeout_offset.as_ref())?,
        })
    }

    /// Picks the cluster for a request. `random` is the stream's random value, `hash` that of the hash policies.
    pub fn target<'a>(
        &'a self,
        headers: &'a Headers,
        random: u64,
        hash: impl FnOnce() -> Option<u64>,
    ) -> Target<'a> {
        self.clusters.pick(headers, random, hash)
    }

    /// The endpoint metadata that the load balancer must match.
    pub fn metadata_match<'a>(&'a self, target: &Target<'a>) -> Option<&'a MetadataMatch> {
        target.weighted.map_or(self.metadata_match.as_ref(), |weighted| weighted.metadata_match.as_ref())
    }

    /// What the route says about an upgrade protocol, if anything.
    pub fn upgrade(&self, protocol: &[u8]) -> Option<&UpgradeConfig> {
        self.upgrades.iter().find(|upgrade| upgrade.protocol.as_bytes().eq_ignore_ascii_case(protocol))
    }
}
