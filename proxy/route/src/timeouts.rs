//! Timeouts of a request: configuration and the `x-envoy-*` and `grpc-timeout` headers.

use std::time::Duration;

use waystation_http::{Headers, Known};

use crate::action::RouteAction;
use crate::matching::is_grpc;

/// The timeouts of the router; zero is none.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RequestTimeouts {
    /// Of all tries together.
    pub global: Duration,
    /// Of one try.
    pub per_try: Duration,
    /// Of the silence within one try.
    pub per_try_idle: Duration,
    /// Whether a per-try timeout hedges: the policy, or `x-envoy-hedge-on-per-try-timeout`.
    pub hedge_on_per_try_timeout: bool,
}

/// How the router is configured.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouterOptions {
    /// Not `suppress_envoy_headers`: `x-envoy-expected-rq-timeout-ms` is set.
    pub insert_expected_timeout: bool,
    /// `respect_expected_rq_timeout`.
    pub respect_expected_timeout: bool,
}

/// Resolves the timeouts of a request, removes the headers that set them and adds those that tell upstream. Envoy's
/// `FilterUtility::finalTimeout`. Headers of untrusted clients were removed before.
pub fn resolve(action: &RouteAction, headers: &mut Headers, options: RouterOptions) -> RequestTimeouts {
    let retry = action.retry_policy.as_deref();
    let legacy_grpc =
        action.max_grpc_timeout.filter(|_| action.max_stream_duration.is_none() && is_grpc(headers));
    let mut timeouts = RequestTimeouts {
        global: match legacy_grpc {
            Some(max) => legacy_grpc_timeout(action, headers, max),
            // With `max_stream_duration` a route has no response timeout of its own.
            None if action.max_stream_duration.is_some() => Duration::ZERO,
            None => action.timeout,
        },
        per_try: retry.map_or(Duration::ZERO, |retry| retry.per_try_timeout),
        per_try_idle: retry.map_or(Duration::ZERO, |retry| retry.per_try_idle_timeout),
        hedge_on_per_try_timeout: match headers.get(Known::XEnvoyHedgeOnPerTryTimeout) {
            Some(b"true") => true,
            Some(b"false") => false,
            _ => action.hedge.on_per_try_timeout,
        },
    };
    headers.remove(Known::XEnvoyHedgeOnPerTryTimeout);
    let expected = headers.get(Known::XEnvoyExpectedRqTimeoutMs).filter(|_| options.respect_expected_timeout);
    if let Some(expected) = expected {
        // An Envoy before us set it: it counts, and stays as it is.
        timeouts.global = milliseconds(expected).unwrap_or(timeouts.global);
    } else if let Some(wanted) = headers.get(Known::XEnvoyUpstreamRqTimeoutMs) {
        timeouts.global = milliseconds(wanted).unwrap_or(timeouts.global);
        headers.remove(Known::XEnvoyUpstreamRqTimeoutMs);
    }
    if let Some(wanted) = headers.get(Known::XEnvoyUpstreamRqPerTryTimeoutMs) {
        timeouts.per_try = milliseconds(wanted).unwrap_or(timeouts.per_try);
        headers.remove(Known::XEnvoyUpstreamRqPerTryTimeoutMs);
    }
    if timeouts.per_try >= timeouts.global && !timeouts.global.is_zero() {
        timeouts.per_try = Duration::ZERO;
    }
    set_headers(&timeouts, headers, Duration::ZERO, options, legacy_grpc.is_some());
    timeouts
}

/// Sets the headers that tell upstream how long it has, `elapsed` after the request began: for each try anew.
pub fn set_headers(
    timeouts: &RequestTimeouts,
    headers: &mut Headers,
    elapsed: Duration,
    options: RouterOptions,
    legacy_grpc: bool,
) {
    let (global, elapsed) = (millis(timeouts.global), millis(elapsed));
    let mut expected = millis(timeouts.per_try);
    // With hedging an earlier try may still answer within the global timeout.
    if expected == 0 || timeouts.hedge_on_per_try_timeout {
        expected = global;
    }
    if expected == 0 {
        return;
    }
    if global > 0 {
        // Out of time is not "no timeout", which is what 0 would mean.
        expected = expected.min(global.saturating_sub(elapsed)).max(1);
    }
    if options.insert_expected_timeout {
        headers.set_number(Known::XEnvoyExpectedRqTimeoutMs, expected);
    }
    if legacy_grpc {
        set_grpc_timeout(headers, Duration::from_millis(expected));
    }
}

/// How long a stream may take as a whole, from its route's `max_stream_duration`, or else from
/// `connection_manager`'s. Zero has run out already: `grpc-timeout` and its offset can say so.
///
/// A gRPC request tells upstream: the caller sets [`set_grpc_timeout`] when `tells_upstream`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct StreamDuration {
    /// The bound, if there is one.
    pub max: Option<Duration>,
    /// Whether `grpc-timeout` has to be set to it.
    pub tells_upstream: bool,
}

/// The bound of a stream.
pub fn stream_duration(
    action: &RouteAction,
    headers: &Headers,
    connection_manager: Option<Duration>,
) -> StreamDuration {
    let own = action.max_stream_duration.unwrap_or_default();
    let max = match (grpc_timeout(headers), own.grpc_header_max) {
        (Some(timeout), Some(max)) => {
            let timeout = if max.is_zero() { timeout } else { timeout.min(max) };
            Some(timeout.saturating_sub(own.grpc_header_offset.unwrap_or_default()))
        }
        _ => own.max.or(connection_manager).filter(|max| !max.is_zero()),
    };
    // The connection manager's own bound is not told.
    let tells_upstream = max.is_some() && action.max_stream_duration.is_some() && is_grpc(headers);
    StreamDuration { max, tells_upstream }
}

/// Reads `grpc-timeout`: up to eight digits and a unit. Fractions of a millisecond round up.
pub fn grpc_timeout(headers: &Headers) -> Option<Duration> {
    let (unit, digits) = headers.get(Known::GrpcTimeout)?.split_last()?;
    if digits.len() > 8 || digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = str::from_utf8(digits).ok()?.parse().ok()?;
    let millis = match unit {
        b'H' => number * 3_600_000,
        b'M' => number * 60_000,
        b'S' => number * 1000,
        b'm' => number,
        b'u' => number.div_ceil(1000),
        b'n' => number.div_ceil(1_000_000),
        _ => return None,
    };
    Some(Duration::from_millis(millis))
}

/// Sets `grpc-timeout` in the finest unit that eight digits can hold.
pub fn set_grpc_timeout(headers: &mut Headers, timeout: Duration) {
    const MAX: u64 = 99_999_999;
    let mut value = millis(timeout);
    let mut unit = "m";
    for (divisor, next) in [(1000, "S"), (60, "M"), (60, "H")] {
        if value <= MAX {
            break;
        }
        value /= divisor;
        unit = next;
    }
    headers.set(Known::GrpcTimeout, format!("{}{unit}", value.min(MAX)));
}

/// With `max_grpc_timeout`, a gRPC request's timeout is its `grpc-timeout`, where missing and 0 mean unbounded.
fn legacy_grpc_timeout(action: &RouteAction, headers: &Headers, max: Duration) -> Duration {
    let mut timeout = grpc_timeout(headers).unwrap_or_default();
    if let Some(offset) = action.grpc_timeout_offset.filter(|offset| *offset < timeout) {
        timeout -= offset;
    }
    if !max.is_zero() && (timeout.is_zero() || timeout > max) { max } else { timeout }
}

fn milliseconds(value: &[u8]) -> Option<Duration> {
    str::from_utf8(value).ok()?.trim_ascii().parse().ok().map(Duration::from_millis)
}

/// Whole milliseconds, as the headers have them.
fn millis(value: Duration) -> u64 {
    u64::try_from(value.as_millis()).unwrap_or(u64::MAX)
}
