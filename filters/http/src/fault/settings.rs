//! What is done to which request: the decisions, free of I/O. Randomness is given.

use std::borrow::Cow;
use std::collections::HashSet;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as common;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use waystation_filter_api::runtime::{Fraction, Runtime, RuntimeFraction, RuntimeInteger};
use waystation_filter_api::value::{Struct, struct_from_proto};
use waystation_filter_api::wire::{positive, u32_value};
use waystation_http::{Headers, Known};
use waystation_matchers::{HeaderMatcher, all_match};
use waystation_schema::{At, ConfigError};

use super::caller::Caller;

/// `HTTPFault`, of a connection manager or of a route.
#[derive(Debug)]
pub(super) struct Settings {
    delay: Option<Delay>,
    abort: Option<AbortFault>,
    rate: Option<Rate>,
    upstream_cluster: Box<str>,
    downstream_nodes: HashSet<Box<[u8]>>,
    headers: Box<[HeaderMatcher]>,
    max_active: RuntimeInteger,
    counts_callers: bool,
    metadata: Struct,
}

#[derive(Debug)]
struct Delay {
    chance: Chance,
    /// In milliseconds; from the request's header otherwise.
    fixed: Option<u64>,
    runtime: RuntimeInteger,
}

#[derive(Debug)]
struct AbortFault {
    chance: Chance,
    /// From the request's headers otherwise.
    fixed: Option<Abort>,
    http_runtime: RuntimeInteger,
    grpc_runtime: RuntimeInteger,
    response_body: Option<Box<str>>,
}

#[derive(Debug)]
struct Rate {
    chance: Chance,
    /// In KiB a second; from the request's header otherwise.
    fixed: Option<u64>,
}

/// How often.
#[derive(Debug)]
struct Chance {
    default: Fraction,
    runtime: RuntimeFraction,
    /// The header by which a request may lower it.
    header: Option<Known>,
}

/// The answer to a request in upstream's place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Abort {
    Http(u16),
    Grpc(u32),
}

/// Where the decisions draw from.
pub(super) type Draw<'a> = &'a mut dyn FnMut() -> u64;

impl Settings {
    pub(super) fn compile(proto: &pb::HttpFault, runtime: &Runtime) -> Result<Self, ConfigError> {
        let pb::HttpFault {
            delay,
            abort,
            upstream_cluster,
            headers,
            downstream_nodes,
            max_active_faults,
            response_rate_limit,
            delay_percent_runtime,
            abort_percent_runtime,
            delay_duration_runtime,
            abort_http_status_runtime,
            max_active_faults_runtime,
            response_rate_limit_percent_runtime,
            abort_grpc_status_runtime,
            disable_downstream_cluster_stats,
            filter_metadata,
        } = proto;
        let integer = |own: &str, usual, default| runtime.integer(key(own, usual), default);
        let percent = |own, usual| (key(own, usual), runtime);
        let delay = delay.as_ref().map(|delay| {
            let chance = percent(delay_percent_runtime, "fault.http.delay.fixed_delay_percent");
            Ok(Delay {
                fixed: fixed_delay(delay)?,
                chance: Chance::compile(
                    delay.percentage.as_ref(),
                    chance,
                    matches!(
                        delay.fault_delay_secifier,
                        Some(common::fault_delay::FaultDelaySecifier::HeaderDelay(_))
                    )
                    .then_some(Known::XEnvoyFaultDelayRequestPercentage),
                ),
                runtime: integer(delay_duration_runtime, "fault.http.delay.fixed_duration_ms", 0),
            })
        });
        let abort = abort.as_ref().map(|abort| {
            let chance = percent(abort_percent_runtime, "fault.http.abort.abort_percent");
            let fixed = fixed_abort(abort)?;
            let header = fixed.is_none().then_some(Known::XEnvoyFaultAbortRequestPercentage);
            Ok(AbortFault {
                fixed,
                chance: Chance::compile(abort.percentage.as_ref(), chance, header),
                http_runtime: integer(abort_http_status_runtime, "fault.http.abort.http_status", 0),
                grpc_runtime: integer(abort_grpc_status_runtime, "fault.http.abort.grpc_status", 0),
                response_body: Some(&*abort.response_body).filter(|body| !body.is_empty()).map(Into::into),
            })
        });
        let rate = response_rate_limit.as_ref().map(|rate| {
            let chance =
                percent(response_rate_limit_percent_runtime, "fault.http.rate_limit.response_percent");
            let fixed = fixed_rate(rate)?;
            let header = fixed.is_none().then_some(Known::XEnvoyFaultThroughputResponsePercentage);
            Ok(Rate { fixed, chance: Chance::compile(rate.percentage.as_ref(), chance, header) })
        });
        let max_active = u32_value(max_active_faults.as_ref()).map_or(u64::MAX, u64::from);
        Ok(Self {
            delay: delay.transpose().at(|| "delay")?,
            abort: abort.transpose().at(|| "abort")?,
            rate: rate.transpose().at(|| "response_rate_limit")?,
            upstream_cluster: upstream_cluster.as_str().into(),
            downstream_nodes: downstream_nodes.iter().map(|node| node.as_bytes().into()).collect(),
            headers: HeaderMatcher::compile_all(headers, "headers")?,
            max_active: integer(max_active_faults_runtime, "fault.http.max_active_faults", max_active),
            counts_callers: !disable_downstream_cluster_stats,
            metadata: filter_metadata.as_ref().map(struct_from_proto).unwrap_or_default(),
        })
    }

    /// Whether there is any fault to inject.
    pub(super) fn has_any(&self) -> bool {
        self.delay.is_some() || self.abort.is_some() || self.rate.is_some()
    }

    /// Whether a request on its way to this cluster is one of those that the settings are for.
    pub(super) fn concerns(&self, head: &Headers, cluster: Option<&str>) -> bool {
        (self.upstream_cluster.is_empty() || cluster == Some(&*self.upstream_cluster))
            && (self.downstream_nodes.is_empty()
                || head
                    .get(Known::XEnvoyDownstreamServiceNode)
                    .is_some_and(|node| self.downstream_nodes.contains(node)))
            && all_match(&self.headers, head)
    }

    /// For how long a request is delayed.
    pub(super) fn delay(&self, head: &Headers, caller: Option<&Caller>, draw: Draw<'_>) -> Option<Duration> {
        let delay = self.delay.as_ref()?;
        if !delay.chance.strikes(head, caller.map(|caller| &caller.delay_percent), draw) {
            return None;
        }
        let configured = match delay.fixed {
            Some(fixed) => fixed,
            None => number(head, Known::XEnvoyFaultDelayRequest)?,
        };
        let usual = delay.runtime.get_or(configured);
        let millis = caller.map_or(usual, |caller| caller.delay_ms.get_or(usual));
        (millis > 0).then(|| Duration::from_millis(millis))
    }

    /// What a request is answered with.
    pub(super) fn abort(&self, head: &Headers, caller: Option<&Caller>, draw: Draw<'_>) -> Option<Abort> {
        let abort = self.abort.as_ref()?;
        if !abort.chance.strikes(head, caller.map(|caller| &caller.abort_percent), draw) {
            return None;
        }
        Some(match abort.fixed.or_else(|| asked_abort(head))? {
            Abort::Http(configured) => {
                let runtime = caller.map_or(&abort.http_runtime, |caller| &caller.http_status);
                let status = u16::try_from(runtime.get_or(configured.into()));
                // Envoy sends whatever runtime says, and a message that is none.
                Abort::Http(status.ok().filter(|status| (200..1000).contains(status)).unwrap_or(configured))
            }
            Abort::Grpc(configured) => {
                let runtime = caller.map_or(&abort.grpc_runtime, |caller| &caller.grpc_status);
                Abort::Grpc(u32::try_from(runtime.get_or(configured.into())).unwrap_or(configured))
            }
        })
    }

    /// What such an answer says.
    pub(super) fn response_body(&self) -> Cow<'static, str> {
        match self.abort.as_ref().and_then(|abort| abort.response_body.as_deref()) {
            Some(body) => body.to_owned().into(),
            None => "fault filter abort".into(),
        }
    }

    /// The KiB a second that a response may have.
    pub(super) fn response_rate(&self, head: &Headers, draw: Draw<'_>) -> Option<u64> {
        let rate = self.rate.as_ref()?;
        if !rate.chance.strikes(head, None, draw) {
            return None;
        }
        match rate.fixed {
            Some(fixed) => Some(fixed),
            None => number(head, Known::XEnvoyFaultThroughputResponse).filter(|rate| *rate > 0),
        }
    }

    /// Whether some responses are slowed down.
    pub(super) fn may_slow_responses(&self) -> bool {
        self.rate.is_some()
    }

    /// How many faults may be active.
    pub(super) fn max_active(&self) -> u64 {
        self.max_active.get()
    }

    pub(super) fn counts_callers(&self) -> bool {
        self.counts_callers
    }

    /// `filter_metadata`.
    pub(super) fn metadata(&self) -> &Struct {
        &self.metadata
    }
}

impl Chance {
    fn compile(proto: Option<&FractionalPercent>, key: (&str, &Runtime), header: Option<Known>) -> Self {
        let default = proto.map_or(Fraction::NEVER, Fraction::from_proto);
        let (key, runtime) = key;
        Self { default, runtime: runtime.fraction(key, default), header }
    }

    /// For a request with a caller, the caller's key stands in the general one's place.
    fn strikes(&self, head: &Headers, caller: Option<&RuntimeFraction>, draw: Draw<'_>) -> bool {
        let mut default = self.default;
        if let Some(asked) = self.header.and_then(|header| number(head, header)) {
            // More than 32 bits are no number in Envoy.
            default.numerator = u32::try_from(asked).map_or(default.numerator, |n| n.min(default.numerator));
        }
        let fraction = caller.unwrap_or(&self.runtime).get_or(default);
        fraction.numerator > 0 && fraction.contains(draw())
    }
}

fn key<'a>(own: &'a str, usual: &'a str) -> &'a str {
    if own.is_empty() { usual } else { own }
}

fn fixed_delay(proto: &common::FaultDelay) -> Result<Option<u64>, ConfigError> {
    use common::fault_delay::FaultDelaySecifier as Source;
    match &proto.fault_delay_secifier {
        Some(Source::FixedDelay(delay)) => {
            let delay = positive("fixed_delay", Some(delay))?;
            Ok(delay.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)))
        }
        Some(Source::HeaderDelay(_)) => Ok(None),
        None => Err(ConfigError::field("fault_delay_secifier", "is required")),
    }
}

fn fixed_abort(proto: &pb::FaultAbort) -> Result<Option<Abort>, ConfigError> {
    use pb::fault_abort::ErrorType as Source;
    match proto.error_type {
        Some(Source::HttpStatus(status)) => match u16::try_from(status) {
            Ok(status @ 200..600) => Ok(Some(Abort::Http(status))),
            _ => Err(ConfigError::field("http_status", "must be in [200, 600)")),
        },
        Some(Source::GrpcStatus(status)) => Ok(Some(Abort::Grpc(status))),
        Some(Source::HeaderAbort(_)) => Ok(None),
        None => Err(ConfigError::field("error_type", "is required")),
    }
}

fn fixed_rate(proto: &common::FaultRateLimit) -> Result<Option<u64>, ConfigError> {
    use common::fault_rate_limit::LimitType as Source;
    match &proto.limit_type {
        Some(Source::FixedLimit(limit)) if limit.limit_kbps == 0 => {
            Err(ConfigError::field("limit_kbps", "must be positive")).at(|| "fixed_limit")
        }
        Some(Source::FixedLimit(limit)) => Ok(Some(limit.limit_kbps)),
        Some(Source::HeaderLimit(_)) => Ok(None),
        None => Err(ConfigError::field("limit_type", "is required")),
    }
}

/// What a request asks to be answered with: an HTTP status before a gRPC status.
fn asked_abort(head: &Headers) -> Option<Abort> {
    let http = number(head, Known::XEnvoyFaultAbortRequest).and_then(|status| u16::try_from(status).ok());
    if let Some(status) = http.filter(|status| (200..600).contains(status)) {
        return Some(Abort::Http(status));
    }
    let grpc = number(head, Known::XEnvoyFaultAbortGrpcRequest)?;
    Some(Abort::Grpc(u32::try_from(grpc).ok()?))
}

/// The number that the first header of this name is, as `absl::SimpleAtoi` reads it.
fn number(head: &Headers, name: Known) -> Option<u64> {
    let text = str::from_utf8(head.get(name)?).ok()?.trim();
    text.parse().ok()
}

#[cfg(test)]
mod tests;
