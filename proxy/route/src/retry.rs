//! `RetryPolicy`, and what a request's headers make of it.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::extensions::retry;
use envoy_types::pb::google::protobuf::{self as wkt, Any};
use pb::retry_policy::{ResetHeaderFormat, retry_host_predicate, retry_priority};
use waystation_filter_api::value::{Metadata, Struct, Value};
use waystation_filter_api::wire::{duration, refuse, type_name, unpack};
use waystation_http::{HeaderName, Headers, Known};
use waystation_matchers::{HeaderMatcher, all_match};
use waystation_schema::{At, ConfigError};

use crate::cluster::{criteria, header};

/// Conditions to retry on: a set of bits.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RetryOn(u32);

macro_rules! retry_on {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $text:literal, $grpc:literal;)*) => {
        impl RetryOn {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            /// One word of `retry_on` or `x-envoy-retry-on`, or of `x-envoy-retry-grpc-on` when `grpc`.
            fn word(word: &[u8], grpc: bool) -> Option<Self> {
                $(if word == $text && grpc == $grpc { return Some(Self::$name); })*
                None
            }
        }
    };
}

retry_on! {
    /// Any 5xx, and no response at all.
    SERVER_ERROR = 0, b"5xx", false;
    /// 502, 503 or 504.
    GATEWAY_ERROR = 1, b"gateway-error", false;
    /// The connection could not be made.
    CONNECT_FAILURE = 2, b"connect-failure", false;
    /// 409.
    RETRIABLE_4XX = 3, b"retriable-4xx", false;
    /// The stream was refused (`REFUSED_STREAM`).
    REFUSED_STREAM = 4, b"refused-stream", false;
    /// gRPC status 1.
    GRPC_CANCELLED = 5, b"cancelled", true;
    /// gRPC status 4.
    GRPC_DEADLINE_EXCEEDED = 6, b"deadline-exceeded", true;
    /// gRPC status 8.
    GRPC_RESOURCE_EXHAUSTED = 7, b"resource-exhausted", true;
    /// gRPC status 14.
    GRPC_UNAVAILABLE = 8, b"unavailable", true;
    /// gRPC status 13.
    GRPC_INTERNAL = 9, b"internal", true;
    /// A status of `retriable_status_codes`.
    RETRIABLE_STATUS_CODES = 10, b"retriable-status-codes", false;
    /// No response: reset, disconnected or timed out.
    RESET = 11, b"reset", false;
    /// A response that `retriable_headers` match.
    RETRIABLE_HEADERS = 12, b"retriable-headers", false;
    /// `x-envoy-ratelimited` in the response.
    ENVOY_RATE_LIMITED = 13, b"envoy-ratelimited", false;
    /// A failure of HTTP/3 that is likely to go away over TCP.
    HTTP3_POST_CONNECT_FAILURE = 14, b"http3-post-connect-failure", false;
    /// Reset before the request was sent.
    RESET_BEFORE_REQUEST = 15, b"reset-before-request", false;
}

impl RetryOn {
    /// Nothing.
    pub const NONE: Self = Self(0);

    /// Whether there is nothing to retry on.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether one of `other` is in the set.
    #[inline]
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both sets.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Reads a comma-separated list. Unknown words are passed over, as in Envoy.
    fn parse(list: &[u8], grpc: bool) -> Self {
        let words = list.split(|byte| *byte == b',').filter_map(|word| Self::word(word.trim_ascii(), grpc));
        words.fold(Self::NONE, Self::union)
    }
}

/// Compiled `RetryPolicy`.
#[derive(Debug)]
pub struct RetryPolicy {
    /// Conditions of the configuration.
    pub retry_on: RetryOn,
    /// `num_retries`, 1 by default.
    pub num_retries: u32,
    /// `per_try_timeout`; zero is none.
    pub per_try_timeout: Duration,
    /// `per_try_idle_timeout`; zero is none.
    pub per_try_idle_timeout: Duration,
    /// `retry_priority`: `previous_priorities` with its `update_frequency`.
    pub previous_priorities: Option<u32>,
    /// Hosts that a retry avoids.
    pub host_predicates: Box<[RetryHostPredicate]>,
    /// How often host selection is tried anew when a predicate rejects the host, 1 by default.
    pub host_selection_attempts: u32,
    /// `retry_back_off`.
    pub back_off: BackOff,
    /// `rate_limited_retry_back_off`.
    pub rate_limited: Option<RateLimitedBackOff>,
    /// Whether a retry picks the cluster anew.
    pub refresh_cluster: bool,
    retriable_statuses: Box<[u16]>,
    retriable_headers: Box<[HeaderMatcher]>,
    request_headers: Box<[HeaderMatcher]>,
}

/// Exponential back-off with full jitter: before the N-th retry a random time in `[0, (2^N - 1) * base)`, at most
/// `max`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackOff {
    /// 25 ms by default (runtime `upstream.base_retry_backoff_ms` is the router's to ask), at least 1 ms.
    pub base: Option<Duration>,
    /// Ten times the base by default.
    pub max: Option<Duration>,
}

/// Compiled `RateLimitedRetryBackOff`.
#[derive(Debug)]
pub struct RateLimitedBackOff {
    /// Headers that say when to come back, the first that is there counts.
    pub headers: Box<[ResetHeader]>,
    /// Longer waits are not made: the ordinary back-off applies. 300 s by default.
    pub max: Duration,
}

/// A response header that says when to come back.
#[derive(Debug)]
pub struct ResetHeader {
    /// Its name.
    pub name: HeaderName,
    /// Whether it is a point in time rather than a number of seconds.
    pub unix_timestamp: bool,
}

/// Compiled `retry_host_predicate`.
#[derive(Debug)]
pub enum RetryHostPredicate {
    /// Not a host that was tried before.
    PreviousHosts,
    /// Not a canary.
    OmitCanary,
    /// Not a host with this metadata.
    OmitMetadata(HostLabels),
}

/// Labels of hosts that a retry avoids: the namespace `envoy.lb` of `OmitHostMetadataConfig.metadata_match`.
#[derive(Clone, Debug)]
pub struct HostLabels(Struct);

impl HostLabels {
    /// Whether a host has all of them; a list at the host has each of its items. No labels match no host.
    pub fn match_host(&self, host: Option<&Metadata>) -> bool {
        let Some(Value::Struct(fields)) = host.and_then(|metadata| metadata.filter.get("envoy.lb")) else {
            return false;
        };
        !self.0.is_empty()
            && self.0.iter().all(|(key, wanted)| match fields.get(key) {
                Some(Value::List(items)) => items.contains(wanted),
                Some(found) => found == wanted,
                None => false,
            })
    }
}

/// What may be retried for one request.
#[derive(Debug, Default)]
pub struct RequestRetry<'a> {
    /// Conditions of configuration and headers.
    pub on: RetryOn,
    /// How many retries there may be.
    pub retries: u32,
    policy: Option<&'a RetryPolicy>,
    header_statuses: Vec<u16>,
    header_names: Vec<HeaderName>,
}

impl RetryPolicy {
    pub(crate) fn compile(proto: &pb::RetryPolicy) -> Result<Self, ConfigError> {
        let pb::RetryPolicy {
            retry_on,
            num_retries,
            per_try_timeout,
            per_try_idle_timeout,
            retry_priority,
            retry_host_predicate,
            retry_options_predicates,
            host_selection_retry_max_attempts,
            retriable_status_codes,
            retry_back_off,
            rate_limited_retry_back_off,
            retriable_headers,
            retriable_request_headers,
            refresh_cluster_on_retry,
        } = proto;
        let why = "retry options predicates";
        refuse("retry_options_predicates", !retry_options_predicates.is_empty(), why)?;
        let predicates = retry_host_predicate.iter().enumerate().map(|(index, predicate)| {
            let retry_host_predicate::ConfigType::TypedConfig(any) = predicate
                .config_type
                .as_ref()
                .ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
            host_predicate(any).at(|| "typed_config").at(|| format!("retry_host_predicate[{index}]"))
        });
        let list = retry_on.as_bytes();
        let statuses = retriable_status_codes.iter().map(|status| u16::try_from(*status).ok());
        Ok(Self {
            // The configuration has one list for both kinds of words.
            retry_on: RetryOn::parse(list, false).union(RetryOn::parse(list, true)),
            num_retries: num_retries.map_or(1, |retries| retries.value),
            per_try_timeout: duration("per_try_timeout", per_try_timeout.as_ref())?.unwrap_or_default(),
            per_try_idle_timeout: duration("per_try_idle_timeout", per_try_idle_timeout.as_ref())?
                .unwrap_or_default(),
            previous_priorities: retry_priority
                .as_ref()
                .map(|priority| previous_priorities(priority).at(|| "retry_priority"))
                .transpose()?,
            host_predicates: predicates.collect::<Result<_, _>>()?,
            host_selection_attempts: match host_selection_retry_max_attempts {
                0 => 1,
                attempts => u32::try_from(*attempts)
                    .map_err(|_| ConfigError::field("host_selection_retry_max_attempts", "out of range"))?,
            },
            back_off: retry_back_off
                .as_ref()
                .map(|back_off| BackOff::compile(back_off).at(|| "retry_back_off"))
                .transpose()?
                .unwrap_or(BackOff { base: None, max: None }),
            rate_limited: rate_limited_retry_back_off
                .as_ref()
                .map(|back_off| RateLimitedBackOff::compile(back_off).at(|| "rate_limited_retry_back_off"))
                .transpose()?,
            refresh_cluster: *refresh_cluster_on_retry,
            // A number that is no status matches none.
            retriable_statuses: statuses.flatten().collect(),
            retriable_headers: HeaderMatcher::compile_all(retriable_headers, "retriable_headers")?,
            request_headers: HeaderMatcher::compile_all(
                retriable_request_headers,
                "retriable_request_headers",
            )?,
        })
    }

    /// Compiles the policy of a service that is called beside requests.
    ///
    /// # Errors
    /// As of a route's.
    pub fn compile_core(proto: &core::RetryPolicy) -> Result<Self, ConfigError> {
        use core::retry_policy::{retry_host_predicate, retry_priority};
        let core::RetryPolicy {
            retry_back_off,
            num_retries,
            retry_on,
            retry_priority,
            retry_host_predicate,
            host_selection_retry_max_attempts,
        } = proto;
        let base_interval = retry_back_off.as_ref().and_then(|back_off| back_off.base_interval);
        let base_interval = base_interval.unwrap_or(wkt::Duration { seconds: 1, nanos: 0 });
        let max_interval = retry_back_off.as_ref().and_then(|back_off| back_off.max_interval);
        let max_interval = max_interval.unwrap_or(wkt::Duration { seconds: 10, nanos: 0 });
        let priority = retry_priority.as_ref().map(|priority| pb::retry_policy::RetryPriority {
            name: priority.name.clone(),
            config_type: priority.config_type.as_ref().map(|config| {
                let retry_priority::ConfigType::TypedConfig(any) = config;
                pb::retry_policy::retry_priority::ConfigType::TypedConfig(any.clone())
            }),
        });
        let predicates = retry_host_predicate.iter().map(|predicate| pb::retry_policy::RetryHostPredicate {
            name: predicate.name.clone(),
            config_type: predicate.config_type.as_ref().map(|config| {
                let retry_host_predicate::ConfigType::TypedConfig(any) = config;
                pb::retry_policy::retry_host_predicate::ConfigType::TypedConfig(any.clone())
            }),
        });
        Self::compile(&pb::RetryPolicy {
            retry_on: retry_on.clone(),
            num_retries: *num_retries,
            per_try_timeout: Some(max_interval),
            retry_priority: priority,
            retry_host_predicate: predicates.collect(),
            host_selection_retry_max_attempts: *host_selection_retry_max_attempts,
            retry_back_off: Some(pb::retry_policy::RetryBackOff {
                base_interval: Some(base_interval),
                max_interval: Some(max_interval),
            }),
            ..pb::RetryPolicy::default()
        })
    }

    /// Compiles a policy in an `Any` (`retry_policy_typed_config`).
    pub(crate) fn compile_any(any: &Any) -> Result<Self, ConfigError> {
        match type_name(any) {
            "envoy.config.route.v3.RetryPolicy" => Self::compile(&unpack(any)?),
            name => Err(ConfigError::new(format!("not supported: retry policy {name}"))),
        }
    }

    /// What may be retried for a request: `policy` is the route's, if it has one. Reads and removes nothing; the
    /// `x-envoy-retry-*` headers are there only when the request may set them.
    pub fn for_request<'a>(policy: Option<&'a Self>, headers: &Headers) -> RequestRetry<'a> {
        let mut on = policy.map_or(RetryOn::NONE, |policy| policy.retry_on);
        if let Some(list) = headers.get(Known::XEnvoyRetryOn) {
            on = on.union(RetryOn::parse(list, false));
        }
        if let Some(list) = headers.get(Known::XEnvoyRetryGrpcOn) {
            on = on.union(RetryOn::parse(list, true));
        }
        let limits = policy.map_or(&[][..], |policy| &policy.request_headers);
        if !limits.is_empty() && !limits.iter().any(|matcher| matcher.is_match(headers)) {
            on = RetryOn::NONE;
        }
        if on.is_empty() {
            return RequestRetry { policy, ..RequestRetry::default() };
        }
        let retries = headers.get_str(Known::XEnvoyMaxRetries).and_then(|text| text.trim().parse().ok());
        let statuses = list(headers, Known::XEnvoyRetriableStatusCodes);
        let names = list(headers, Known::XEnvoyRetriableHeaderNames);
        RequestRetry {
            on,
            retries: retries.unwrap_or(policy.map_or(1, |policy| policy.num_retries)),
            policy,
            header_statuses: statuses.filter_map(|text| text.parse().ok()).collect(),
            header_names: names.filter_map(|text| HeaderName::parse(text).ok()).collect(),
        }
    }
}

impl RequestRetry<'_> {
    /// Whether `retriable-status-codes` covers a status.
    pub fn is_retriable_status(&self, status: u16) -> bool {
        self.policy.is_some_and(|policy| policy.retriable_statuses.contains(&status))
            || self.header_statuses.contains(&status)
    }

    /// Whether `retriable-headers` covers a response.
    pub fn has_retriable_header(&self, response: &Headers) -> bool {
        self.policy.is_some_and(|policy| {
            policy.retriable_headers.iter().any(|matcher| all_match(std::slice::from_ref(matcher), response))
        }) || self.header_names.iter().any(|name| response.contains(name))
    }
}

impl BackOff {
    fn compile(proto: &pb::retry_policy::RetryBackOff) -> Result<Self, ConfigError> {
        let pb::retry_policy::RetryBackOff { base_interval, max_interval } = proto;
        let base = duration("base_interval", base_interval.as_ref())?;
        let base = base.ok_or_else(|| ConfigError::field("base_interval", "is required"))?;
        let max = duration("max_interval", max_interval.as_ref())?;
        for (field, value) in [("base_interval", Some(base)), ("max_interval", max)] {
            if value.is_some_and(|value| value.is_zero()) {
                return Err(ConfigError::field(field, "must be positive"));
            }
        }
        // Timers have milliseconds.
        let base = base.max(Duration::from_millis(1));
        let max = max.map(|max| max.max(Duration::from_millis(1)));
        if max.is_some_and(|max| max < base) {
            let reason = "retry_policy.max_interval must greater than or equal to the base_interval";
            return Err(ConfigError::field("max_interval", reason));
        }
        Ok(Self { base: Some(base), max })
    }
}

impl RateLimitedBackOff {
    fn compile(proto: &pb::retry_policy::RateLimitedRetryBackOff) -> Result<Self, ConfigError> {
        let pb::retry_policy::RateLimitedRetryBackOff { reset_headers, max_interval } = proto;
        if reset_headers.is_empty() {
            return Err(ConfigError::field("reset_headers", "must not be empty"));
        }
        let headers = reset_headers.iter().enumerate().map(|(index, proto)| {
            let name = header("name", &proto.name).at(|| format!("reset_headers[{index}]"))?;
            Ok(ResetHeader { name, unix_timestamp: proto.format() == ResetHeaderFormat::UnixTimestamp })
        });
        let max = duration("max_interval", max_interval.as_ref())?.unwrap_or(Duration::from_secs(300));
        Ok(Self { headers: headers.collect::<Result<_, ConfigError>>()?, max })
    }
}

fn host_predicate(any: &Any) -> Result<RetryHostPredicate, ConfigError> {
    match type_name(any) {
        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate" => {
            Ok(RetryHostPredicate::PreviousHosts)
        }
        "envoy.extensions.retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate" => {
            Ok(RetryHostPredicate::OmitCanary)
        }
        "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig" => {
            let config: retry::host::omit_host_metadata::v3::OmitHostMetadataConfig = unpack(any)?;
            Ok(RetryHostPredicate::OmitMetadata(HostLabels(criteria(config.metadata_match.as_ref()))))
        }
        name => Err(ConfigError::new(format!("not supported: retry host predicate {name}"))),
    }
}

fn previous_priorities(proto: &pb::retry_policy::RetryPriority) -> Result<u32, ConfigError> {
    let retry_priority::ConfigType::TypedConfig(any) =
        proto.config_type.as_ref().ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
    match type_name(any) {
        "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig" => {
            let config: retry::priority::previous_priorities::v3::PreviousPrioritiesConfig = unpack(any)?;
            let frequency = u32::try_from(config.update_frequency).ok().filter(|frequency| *frequency > 0);
            frequency
                .ok_or_else(|| ConfigError::field("update_frequency", "must be positive"))
                .at(|| "typed_config")
        }
        name => Err(ConfigError::field("typed_config", format!("not supported: retry priority {name}"))),
    }
}

fn list(headers: &Headers, name: Known) -> impl Iterator<Item = &str> {
    let items = headers.get_str(name).into_iter().flat_map(|text| text.split(','));
    items.map(str::trim).filter(|item| !item.is_empty())
}

/// Refuses `retry_policy_typed_config` beside `retry_policy` and compiles whichever is set.
pub(crate) fn compile_either(
    policy: Option<&pb::RetryPolicy>,
    typed: Option<&Any>,
) -> Result<Option<RetryPolicy>, ConfigError> {
    match (policy, typed) {
        (Some(policy), _) => RetryPolicy::compile(policy).at(|| "retry_policy").map(Some),
        (None, Some(any)) => RetryPolicy::compile_any(any).at(|| "retry_policy_typed_config").map(Some),
        (None, None) => Ok(None),
    }
}
