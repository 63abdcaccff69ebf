//! When a request is tried again, and after how long. No clock and no sockets: outcomes in, decisions out.

use std::time::{Duration, SystemTime};

use waystation_http::{Headers, Known, KnownSet};
use waystation_route::{RequestRetry, RetryOn, RetryPolicy};
use waystation_upstream::jitter::back_off;

use super::end::ResetReason;

/// Envoy's default for the first back-off (runtime `upstream.base_retry_backoff_ms`).
pub(crate) const BASE_MILLIS: u64 = 25;

/// What a request asks for itself; for us alone.
const ASKED: KnownSet = KnownSet::of(&[
    Known::XEnvoyRetryOn,
    Known::XEnvoyRetryGrpcOn,
    Known::XEnvoyMaxRetries,
    Known::XEnvoyRetriableStatusCodes,
    Known::XEnvoyRetriableHeaderNames,
    Known::XEnvoyHedgeOnPerTryTimeout,
]);

/// What became of one attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome<'a> {
    /// Upstream answered.
    Response(&'a Headers),
    /// The stream was reset; whether the request had been handed to a connection.
    Reset(ResetReason, bool),
    /// The per-try timeout, idle or not.
    PerTryTimeout,
    /// The same with hedging: the attempt goes on, and whatever the conditions are, another may begin.
    Slow,
}

/// What to do after an attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Decision {
    /// Let the outcome stand.
    Stand,
    /// It would be tried again, but the retries are used up (`URX`).
    LimitExceeded,
    /// It would be tried again, but the retry breaker is open (`UO`).
    Overflow,
    /// Try again after this.
    Again { after: Duration, rate_limited: bool },
}

/// Whether there may be one more retry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Admission {
    Admitted,
    /// The retry breaker is open.
    Overflow,
    /// Runtime `upstream.use_retry` says no.
    Off,
}

/// The retries of one request.
#[derive(Debug)]
pub(crate) struct Retries<'a> {
    policy: Option<&'a RetryPolicy>,
    request: RequestRetry<'a>,
    left: u32,
    /// Back-offs so far.
    attempts: u32,
    base: Duration,
    max: Duration,
}

impl<'a> Retries<'a> {
    /// The retries that a route's policy and the request's headers ask for; the headers are taken off.
    /// `base` is asked for the first back-off where the policy names none.
    pub(crate) fn new(
        policy: Option<&'a RetryPolicy>,
        headers: &mut Headers,
        base: impl FnOnce() -> Duration,
    ) -> Self {
        let request = RetryPolicy::for_request(policy, headers);
        headers.remove_all(&ASKED);
        let back_off = policy.map(|policy| policy.back_off);
        let own = back_off.and_then(|back_off| back_off.base);
        let base = if request.on.is_empty() { Duration::ZERO } else { own.unwrap_or_else(base) };
        let max = back_off.and_then(|back_off| back_off.max).unwrap_or(base * 10);
        Self { left: request.retries, policy, request, attempts: 0, base, max }
    }

    /// Whether anything is ever tried again: only then must the request be kept.
    pub(crate) fn is_enabled(&self) -> bool {
        !self.request.on.is_empty() && self.request.retries > 0
    }

    /// Whether an outcome is one to try again for, be that possible or not.
    pub(crate) fn wants(&self, outcome: Outcome<'_>) -> bool {
        !self.request.on.is_empty() && self.wanted(outcome)
    }

    /// Whether there are conditions to retry on; retries may still be used up.
    pub(crate) fn has_conditions(&self) -> bool {
        !self.request.on.is_empty()
    }

    /// Gives up further retries: the request can't be kept any longer.
    pub(crate) fn disable(&mut self) {
        self.request.on = RetryOn::NONE;
    }

    /// Decides after an attempt. `admit` takes a unit of the retry breaker, if retries are on; `random` draws the jitter.
    pub(crate) fn decide(
        &mut self,
        outcome: Outcome<'_>,
        wall: SystemTime,
        random: u64,
        admit: impl FnOnce() -> Admission,
    ) -> Decision {
        if !self.wants(outcome) {
            return Decision::Stand;
        }
        if self.left == 0 {
            return Decision::LimitExceeded;
        }
        self.left -= 1;
        match admit() {
            Admission::Admitted => {}
            Admission::Overflow => return Decision::Overflow,
            Admission::Off => return Decision::Stand,
        }
        if let Outcome::Response(headers) = outcome
            && let Some(after) = self.reset_after(headers, wall)
        {
            return Decision::Again { after: jittered_by_half(after, random), rate_limited: true };
        }
        self.attempts += 1;
        let after = back_off(self.base, self.max, self.attempts, random);
        Decision::Again { after, rate_limited: false }
    }

    fn wanted(&self, outcome: Outcome<'_>) -> bool {
        let on = |conditions: RetryOn| self.request.on.intersects(conditions);
        let server_error = RetryOn::SERVER_ERROR.union(RetryOn::GATEWAY_ERROR);
        match outcome {
            Outcome::Response(headers) => self.wanted_response(headers),
            Outcome::Reset(ResetReason::Overflow, _) => false,
            Outcome::Reset(reason, started) => {
                on(RetryOn::RESET.union(server_error))
                    || (on(RetryOn::RESET_BEFORE_REQUEST) && !started)
                    || (on(RetryOn::REFUSED_STREAM) && reason == ResetReason::RemoteRefused)
                    || (on(RetryOn::CONNECT_FAILURE) && reason.is_connect_failure())
            }
            Outcome::PerTryTimeout => on(RetryOn::RESET.union(server_error)),
            Outcome::Slow => true,
        }
    }

    /// Envoy's `RetryStateImpl::wouldRetryFromHeaders`.
    fn wanted_response(&self, headers: &Headers) -> bool {
        let on = |conditions: RetryOn| self.request.on.intersects(conditions);
        // An upstream that sheds load must not get more of it.
        if headers.contains(Known::XEnvoyOverloaded) {
            return false;
        }
        if headers.contains(Known::XEnvoyRatelimited) {
            return on(RetryOn::ENVOY_RATE_LIMITED);
        }
        let status = headers.status().unwrap_or(0);
        if (500..600).contains(&status) && on(RetryOn::SERVER_ERROR)
            || (502..=504).contains(&status) && on(RetryOn::GATEWAY_ERROR)
            || status == 409 && on(RetryOn::RETRIABLE_4XX)
            || on(RetryOn::RETRIABLE_STATUS_CODES) && self.request.is_retriable_status(status)
            || on(RetryOn::RETRIABLE_HEADERS) && self.request.has_retriable_header(headers)
        {
            return true;
        }
        match headers.get(Known::GrpcStatus) {
            Some(b"1") => on(RetryOn::GRPC_CANCELLED),
            Some(b"4") => on(RetryOn::GRPC_DEADLINE_EXCEEDED),
            Some(b"8") => on(RetryOn::GRPC_RESOURCE_EXHAUSTED),
            Some(b"13") => on(RetryOn::GRPC_INTERNAL),
            Some(b"14") => on(RetryOn::GRPC_UNAVAILABLE),
            _ => false,
        }
    }

    /// What `rate_limited_retry_back_off` reads from the response; none, and one beyond its maximum, do not
    /// count.
    fn reset_after(&self, headers: &Headers, wall: SystemTime) -> Option<Duration> {
        let config = self.policy?.rate_limited.as_ref()?;
        config.headers.iter().find_map(|header| {
            let value: u64 = headers.get_str(header.name.as_name())?.trim().parse().ok()?;
            let seconds = if header.unix_timestamp {
                let now = wall.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
                value.checked_sub(now)?
            } else {
                value
            };
            Some(Duration::from_secs(seconds)).filter(|after| !after.is_zero() && *after <= config.max)
        })
    }
}

/// Envoy's `JitteredLowerBoundBackOffStrategy`: not earlier than asked, up to half as long again.
fn jittered_by_half(after: Duration, random: u64) -> Duration {
    let half = u64::try_from(after.as_millis() / 2).unwrap_or(u64::MAX).max(1);
    after + Duration::from_millis(random % half)
}

#[cfg(test)]
mod tests {
    use super::{Admission, BASE_MILLIS, Decision, Outcome, Retries};
    use crate::http::end::ResetReason;
    use std::time::{Duration, SystemTime};
    use waystation_http::Headers;

    const BASE: Duration = Duration::from_millis(BASE_MILLIS);

    fn request(on: &str, more: &[(&str, &str)]) -> Headers {
        [("x-envoy-retry-on", on)].iter().chain(more).copied().collect()
    }

    fn wants(on: &str, more: &[(&str, &str)], outcome: Outcome<'_>) -> bool {
        let mut headers = request(on, more);
        let mut retries = Retries::new(None, &mut headers, || BASE);
        assert!(headers.is_empty(), "the headers are for us alone");
        retries.decide(outcome, SystemTime::UNIX_EPOCH, 0, || Admission::Admitted) != Decision::Stand
    }

    #[test]
    fn responses() {
        let rows = [
            ("5xx", 500, "", true),
            ("5xx", 404, "", false),
            ("gateway-error", 500, "", false),
            ("gateway-error", 503, "", true),
            ("retriable-4xx", 409, "", true),
            ("retriable-4xx", 400, "", false),
            ("retriable-status-codes", 418, "", true),
            ("5xx", 503, "x-envoy-overloaded", false),
            ("5xx", 429, "x-envoy-ratelimited", false),
            ("envoy-ratelimited", 429, "x-envoy-ratelimited", true),
            ("retriable-headers", 200, "x-again", true),
            ("connect-failure,reset", 503, "", false),
        ];
        for (on, status, header, expected) in rows {
            let mut response = Headers::new();
            response.set_status(status);
            if !header.is_empty() {
                response.append(header, "1");
            }
            let more =
                [("x-envoy-retriable-status-codes", "418"), ("x-envoy-retriable-header-names", "x-again")];
            assert_eq!(wants(on, &more, Outcome::Response(&response)), expected, "{on} {status} {header}");
        }
        let response: Headers = [(":status", "200"), ("grpc-status", "14")].into_iter().collect();
        assert!(wants("", &[("x-envoy-retry-grpc-on", "unavailable")], Outcome::Response(&response)));
        assert!(!wants("", &[("x-envoy-retry-grpc-on", "cancelled")], Outcome::Response(&response)));
    }

    #[test]
    fn resets() {
        use ResetReason as R;
        let rows = [
            ("reset", R::ConnectionTermination, true, true),
            ("5xx", R::RemoteReset, true, true),
            ("gateway-error", R::RemoteConnectionFailure, false, true),
            ("connect-failure", R::RemoteConnectionFailure, false, true),
            ("connect-failure", R::ConnectionTimeout, false, true),
            ("connect-failure", R::ConnectionTermination, true, false),
            ("refused-stream", R::RemoteRefused, true, true),
            ("refused-stream", R::RemoteReset, true, false),
            ("reset-before-request", R::ConnectionTermination, false, true),
            ("reset-before-request", R::ConnectionTermination, true, false),
            ("5xx,reset", R::Overflow, false, false),
        ];
        for (on, reason, started, expected) in rows {
            assert_eq!(wants(on, &[], Outcome::Reset(reason, started)), expected, "{on} {reason:?}");
        }
        assert!(wants("5xx", &[], Outcome::PerTryTimeout));
        assert!(!wants("connect-failure", &[], Outcome::PerTryTimeout));
    }

    #[test]
    fn back_off_doubles_with_full_jitter_and_retries_run_out() {
        let mut headers = request("reset", &[("x-envoy-max-retries", "6")]);
        let mut retries = Retries::new(None, &mut headers, || BASE);
        let mut bounds = Vec::new();
        let outcome = Outcome::Reset(ResetReason::RemoteReset, true);
        let millis = Duration::from_millis;
        // The interval in force is the bound of the draw, found as the largest remainder.
        for interval in [25, 50, 100, 200, 250, 250] {
            match retries.decide(outcome, SystemTime::UNIX_EPOCH, interval - 1, || Admission::Admitted) {
                Decision::Again { after, rate_limited: false } => bounds.push(after),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(bounds, [24, 49, 99, 199, 249, 249].map(millis));
        let last = retries.decide(outcome, SystemTime::UNIX_EPOCH, 0, || Admission::Admitted);
        assert_eq!(last, Decision::LimitExceeded);
    }

    #[test]
    fn breaker_is_asked_only_when_a_retry_is_left() {
        let mut headers = request("reset", &[]);
        let mut retries = Retries::new(None, &mut headers, || BASE);
        let outcome = Outcome::Reset(ResetReason::RemoteReset, true);
        assert_eq!(
            retries.decide(outcome, SystemTime::UNIX_EPOCH, 0, || Admission::Overflow),
            Decision::Overflow
        );
        let asked = retries.decide(outcome, SystemTime::UNIX_EPOCH, 0, || panic!("no retry is left"));
        assert_eq!(asked, Decision::LimitExceeded);
    }

    /// What the core decides, against a model of a few lines, for policies and outcomes drawn at random.
    #[test]
    fn retries_keep_to_a_simple_model() {
        for seed in 0..500 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (base, max_retries) = (rng.u64(1..200), rng.u32(0..8));
            let text = max_retries.to_string();
            let mut headers = request("5xx", &[("x-envoy-max-retries", &text)]);
            let mut retries = Retries::new(None, &mut headers, || Duration::from_millis(base));
            let (mut left, mut interval) = (max_retries, base);
            for step in 0..20 {
                let status = *rng.choice([200, 404, 500, 503].iter()).expect("not empty");
                let admission =
                    *rng.choice([Admission::Admitted, Admission::Overflow].iter()).expect("not empty");
                let random = rng.u64(..);
                let response: Headers = [(":status", status.to_string().as_str())].into_iter().collect();
                let decision =
                    retries
                        .decide(Outcome::Response(&response), SystemTime::UNIX_EPOCH, random, || admission);
                let expected = match (status < 500, left, admission) {
                    (true, ..) => Decision::Stand,
                    (false, 0, _) => Decision::LimitExceeded,
                    (false, _, Admission::Admitted) => {
                        left -= 1;
                        let after = Duration::from_millis(random % interval);
                        interval = (interval * 2).min(base * 10);
                        Decision::Again { after, rate_limited: false }
                    }
                    _ => {
                        left -= 1;
                        Decision::Overflow
                    }
                };
                assert_eq!(decision, expected, "seed {seed}, step {step}");
            }
        }
    }
}
