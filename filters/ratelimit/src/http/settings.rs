//! A compiled `LocalRateLimit`, and the descriptors that it makes of a request.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::extensions::common::ratelimit::v3 as common;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3 as pb;
use waystation_filter_api::http::{FactoryContext, LocalCluster};
use waystation_filter_api::runtime::RuntimeFraction;
use waystation_filter_api::stream::StreamInfo;
use waystation_filter_api::wire::{bool_value, decode, u32_value};
use waystation_format::HeaderMutations;
use waystation_http::Headers;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::stats_group;

use crate::bucket::BucketConfig;
use crate::descriptor::{Descriptors, HeadersOption, Place, Policies, Request};
use crate::limiter::{Limiter, LimiterConfig};

/// Envoy's default of `max_dynamic_descriptors`.
const MAX_DYNAMIC: u32 = 20;

stats_group! {
    /// `<stat_prefix>.http_local_rate_limit.`
    pub(super) struct Stats {
        counters { enabled, enforced, ok, rate_limited, shadow_mode }
    }
}

#[derive(Debug)]
pub(super) struct Settings {
    pub(super) stats: Stats,
    pub(super) enabled: Option<RuntimeFraction>,
    pub(super) enforced: Option<RuntimeFraction>,
    pub(super) limits: LimiterConfig,
    /// The buckets of `limits` for all connections.
    pub(super) limiter: Limiter,
    pub(super) is_per_connection: bool,
    /// With whom the limits are shared.
    pub(super) share: Option<Arc<dyn LocalCluster>>,
    pub(super) status: u16,
    pub(super) response_headers: HeaderMutations,
    pub(super) request_headers: HeaderMutations,
    pub(super) resource_exhausted: bool,
    pub(super) retry_after: bool,
    x_ratelimit: bool,
    own: Policies,
    stage: u32,
    virtual_host: VirtualHost,
    own_cluster: Box<str>,
}

/// `vh_rate_limits`: when a virtual host's policies count beside those of a route.
#[derive(Clone, Copy, Debug)]
enum VirtualHost {
    /// When the route has none.
    Override,
    Include,
    Ignore,
}

impl Settings {
    pub(super) fn compile(wire: &[u8], cx: &FactoryContext<'_>, is_route: bool) -> Result<Self, ConfigError> {
        let proto: pb::LocalRateLimit = decode(wire)?;
        let pb::LocalRateLimit {
            stat_prefix,
            status,
            token_bucket,
            filter_enabled,
            filter_enforced,
            request_headers_to_add_when_not_enforced,
            response_headers_to_add,
            descriptors,
            stage,
            local_rate_limit_per_downstream_connection,
            local_cluster_rate_limit,
            enable_x_ratelimit_headers: _,
            vh_rate_limits: _,
            always_consume_default_token_bucket,
            rate_limited_as_resource_exhausted,
            rate_limits,
            max_dynamic_descriptors,
            enable_retry_after_header,
        } = &proto;
        if is_route && token_bucket.is_none() {
            return Err(ConfigError::new("local rate limit token bucket must be set for per filter configs"));
        }
        let own = Policies::compile(rate_limits, Place::LocalFilter, "rate_limits", cx.runtime)?;
        let share = match local_cluster_rate_limit {
            None => None,
            Some(_) if *local_rate_limit_per_downstream_connection => {
                return Err(ConfigError::new(
                    "local_cluster_rate_limit is set and local_rate_limit_per_downstream_connection is set to true",
                ));
            }
            Some(common::LocalClusterRateLimit {}) => match cx.local_cluster {
                Some(local) => Some(Arc::clone(local)),
                None => {
                    return Err(ConfigError::new(
                        "local_cluster_rate_limit is set but no local cluster name is present",
                    ));
                }
            },
        };
        let default = token_bucket
            .as_ref()
            .map(|bucket| BucketConfig::compile(bucket, crate::network::BUCKET).at(|| "token_bucket"));
        let max_dynamic = u32_value(max_dynamic_descriptors.as_ref()).unwrap_or(MAX_DYNAMIC);
        let limits = LimiterConfig::compile(
            default.transpose()?,
            bool_value(always_consume_default_token_bucket.as_ref(), true),
            max_dynamic as usize,
            descriptors,
        )?;
        let fraction = |fraction| cx.runtime.fractional_percent(fraction);
        let status = status.as_ref().map_or(0, |status| status.code);
        let scope =
            cx.root.tag("envoy.local_http_ratelimit_prefix", stat_prefix).scope("http_local_rate_limit");
        Ok(Self {
            stats: scope.group(),
            enabled: filter_enabled.as_ref().map(fraction),
            enforced: filter_enforced.as_ref().map(fraction),
            limiter: limits.limiter(Instant::now()),
            limits,
            is_per_connection: *local_rate_limit_per_downstream_connection,
            share,
            status: u16::try_from(status).ok().filter(|status| *status >= 400).unwrap_or(429),
            response_headers: HeaderMutations::compile(response_headers_to_add, &[])
                .at(|| "response_headers_to_add")?,
            request_headers: HeaderMutations::compile(request_headers_to_add_when_not_enforced, &[])
                .at(|| "request_headers_to_add_when_not_enforced")?,
            resource_exhausted: *rate_limited_as_resource_exhausted,
            retry_after: *enable_retry_after_header,
            x_ratelimit: proto.enable_x_ratelimit_headers()
                == common::XRateLimitHeadersRfcVersion::DraftVersion03,
            own,
            stage: *stage,
            virtual_host: match proto.vh_rate_limits() {
                common::VhRateLimitsOptions::Override => VirtualHost::Override,
                common::VhRateLimitsOptions::Include => VirtualHost::Include,
                common::VhRateLimitsOptions::Ignore => VirtualHost::Ignore,
            },
            own_cluster: cx.node.cluster.as_str().into(),
        })
    }

    /// Whether a response may tell of the limits at all.
    pub(super) fn may_tell(&self) -> bool {
        self.x_ratelimit || self.limits.has_descriptors()
    }

    /// Whether it does, when the descriptor that decided says so.
    pub(super) fn tells(&self, option: HeadersOption) -> bool {
        match option {
            HeadersOption::Inherit => self.x_ratelimit,
            HeadersOption::Off => false,
            HeadersOption::On => true,
        }
    }

    /// The request's descriptors: of the filter's own policies, else of those of its route and virtual host. Nothing is made
    /// that no limit could be found by.
    pub(super) fn descriptors(&self, head: &Headers, info: &StreamInfo, now: Instant) -> Descriptors {
        let mut descriptors = Descriptors::new();
        if !self.limits.has_descriptors() {
            return descriptors;
        }
        let request = Request { head, info, own_cluster: &self.own_cluster, now };
        if !self.own.is_empty() {
            let policies = self.own.iter().filter(|policy| !policy.on_stream_done);
            descriptors.extend(policies.filter_map(|policy| policy.descriptor(&request)));
            return descriptors;
        }
        let limits = info.route.as_ref().and_then(|(table, route)| table.rate_limits(*route));
        let Some(limits) = limits else { return descriptors };
        let of_route = policies(limits.route);
        let of_host = policies(limits.virtual_host).filter(|_| match self.virtual_host {
            _ if limits.include_virtual_host => true,
            VirtualHost::Override => of_route.is_none(),
            VirtualHost::Include => true,
            VirtualHost::Ignore => false,
        });
        for policy in [of_route, of_host].into_iter().flatten().flat_map(Policies::iter) {
            // What runtime could disable is for the rate limit service alone, as in Envoy.
            if policy.stage == self.stage && policy.disable_key.is_none() && !policy.on_stream_done {
                descriptors.extend(policy.descriptor(&request));
            }
        }
        descriptors
    }
}

fn policies(config: Option<&(dyn Any + Send + Sync)>) -> Option<&Policies> {
    config.and_then(|config| config.downcast_ref::<Policies>()).filter(|policies| !policies.is_empty())
}
