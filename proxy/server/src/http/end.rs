//! Why a stream ended without upstream's response, and the one table of what that means to the client.

use std::borrow::Cow;

use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::http::LocalReply;
use waystation_http::Known;

/// Why an upstream stream was reset (Envoy's `StreamResetReason` and pool failure reasons).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ResetReason {
    /// The connection could not be made, for a reason on our side.
    LocalConnectionFailure,
    /// The connection was refused or failed on the way.
    RemoteConnectionFailure,
    /// `connect_timeout`.
    ConnectionTimeout,
    /// The connection ended, by FIN or RST alike.
    ConnectionTermination,
    /// A circuit breaker is open.
    Overflow,
    /// The upstream broke the protocol.
    ProtocolError,
    /// RST_STREAM.
    RemoteReset,
    /// RST_STREAM with REFUSED_STREAM: nothing was processed.
    RemoteRefused,
    /// We reset the stream.
    LocalReset,
    /// The upstream answered CONNECT with an error on the stream.
    ConnectError,
}

impl ResetReason {
    /// Envoy's text, as it stands in bodies.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::LocalConnectionFailure => "local connection failure",
            Self::RemoteConnectionFailure => "remote connection failure",
            Self::ConnectionTimeout => "connection timeout",
            Self::ConnectionTermination => "connection termination",
            Self::Overflow => "overflow",
            Self::ProtocolError => "protocol error",
            Self::RemoteReset => "remote reset",
            Self::RemoteRefused => "remote refused stream reset",
            Self::LocalReset => "local reset",
            Self::ConnectError => "remote error with CONNECT request",
        }
    }

    /// The response flag.
    pub(crate) fn flag(self) -> ResponseFlag {
        match self {
            Self::LocalConnectionFailure | Self::RemoteConnectionFailure | Self::ConnectionTimeout => {
                ResponseFlag::UpstreamConnectionFailure
            }
            Self::ConnectionTermination => ResponseFlag::UpstreamConnectionTermination,
            Self::Overflow => ResponseFlag::UpstreamOverflow,
            Self::ProtocolError => ResponseFlag::UpstreamProtocolError,
            Self::RemoteReset | Self::RemoteRefused | Self::ConnectError => ResponseFlag::UpstreamRemoteReset,
            Self::LocalReset => ResponseFlag::LocalReset,
        }
    }

    /// Whether the request never reached the upstream: such an attempt says nothing about its service.
    pub(crate) fn is_connect_failure(self) -> bool {
        matches!(self, Self::LocalConnectionFailure | Self::RemoteConnectionFailure | Self::ConnectionTimeout)
    }
}

/// The cause that ended a stream. [`StreamEnd::reply`] is the table that a reviewer holds beside the documentation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum StreamEnd {
    /// The codec refused the request; the text is its details.
    Codec { status: u16, body: &'static str, details: &'static str },
    /// HTTP/1.0 without `accept_http_10`.
    LowVersion,
    /// No `Host`.
    MissingHost,
    /// No `:path` where one is needed.
    MissingPath,
    /// `OPTIONS *` and the like.
    AbsolutePathRejected,
    /// The path cannot be normalised, or must not be as it is.
    PathNormalization,
    /// Escaped slashes with UNESCAPE_AND_REDIRECT: the path that the client should use.
    PathRedirect(Box<str>),
    /// `require_tls`: where the client should go.
    TlsRedirect(Box<[u8]>),
    /// QUERY needs a content type.
    QueryWithoutContentType,
    /// The address detection extension rejects the request.
    IpDetectionFailed(u16),
    /// The request head did not come in time.
    RequestHeaderTimeout,
    /// The overload manager refuses it, which the client is told of in a header or not.
    Overloaded { told: bool },
    /// It does so before the request is parsed.
    DispatchAborted,
    /// No route.
    RouteNotFound,
    /// The route's cluster does not exist.
    ClusterNotFound { status: u16 },
    /// An upgrade that is not allowed.
    UpgradeFailed,
    /// `strict_check_headers`: the header that failed.
    StrictHeaderCheck(Known, Box<str>),
    /// Runtime `upstream.maintenance_mode.<cluster>`.
    MaintenanceMode,
    /// The cluster has no host to go to.
    NoHealthyUpstream,
    /// The upstream stream was reset before it answered, or after it had `begun` to.
    UpstreamReset { reason: ResetReason, retried: bool, begun: bool, transport: Option<Box<str>> },
    /// The route timeout.
    RouteTimeout { alternative: bool },
    /// The per-try timeout, after the last retry.
    PerTryTimeout { alternative: bool },
    /// The per-try idle timeout.
    PerTryIdleTimeout,
    /// More of the request came during a back-off than is kept for a retry.
    RetryBufferExceeded,
    /// `max_stream_duration` of the upstream's protocol options.
    UpstreamMaxStreamDuration,
    /// Nothing moved for the stream idle timeout.
    StreamIdleTimeout { request_complete: bool },
    /// `max_stream_duration` of route or connection manager.
    MaxStreamDuration { request_complete: bool },
    /// `request_timeout`.
    RequestTimeout,
    /// The request body exceeds the buffer limit.
    RequestTooLarge,
    /// The response body exceeds the buffer limit.
    ResponseTooLarge,
    /// A filter answered when the response had begun; the text is its reply's details.
    LateReply(Cow<'static, str>),
    /// A filter removed or broke what every request needs.
    FilterRemovedRequiredRequestHeaders,
    /// A filter removed or broke what every response needs.
    FilterRemovedRequiredResponseHeaders,
    /// The client closed its connection.
    DownstreamGone,
    /// The client reset the stream.
    DownstreamReset,
    /// An HTTP/2 head that is well-formed and refused by resetting its stream; the text is its details.
    HeadRefused(&'static str),
    /// The client broke HTTP/2 in a way that only resets the stream; the text is its details.
    DownstreamViolation(&'static str),
    /// The proxy ended the client's connection; the text is its details.
    ConnectionAborted(&'static str),
}

/// How a downstream stream ends that cannot be answered any more, or need not be.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) reply: LocalReply,
    /// The connection must not serve another request: where the request's end is unknown.
    pub(crate) close: bool,
}

const TIMEOUT: &str = "upstream request timeout";

impl StreamEnd {
    /// Status, body, flag, details and extra headers of the answer; nothing when there is nobody to answer.
    pub(crate) fn reply(&self) -> Option<Reply> {
        use ResponseFlag as Flag;
        let entry = |status: u16, body: &'static str, details: &'static str, flag: Option<Flag>| {
            let mut reply = LocalReply::new(status, body, details);
            reply.flag = flag;
            Some(Reply { reply, close: false })
        };
        let closing = |status, body, details, flag| {
            entry(status, body, details, flag).map(|r| Reply { close: true, ..r })
        };
        match self {
            Self::Codec { status, body, details } => {
                closing(*status, body, details, Some(Flag::DownstreamProtocolError))
            }
            Self::LowVersion => {
                closing(426, "Upgrade Required", "low_version", Some(Flag::DownstreamProtocolError))
            }
            Self::MissingHost => closing(400, "", "missing_host_header", None),
            Self::MissingPath => entry(404, "", "missing_path_rejected", None),
            Self::AbsolutePathRejected => entry(404, "", "absolute_path_rejected", None),
            Self::PathNormalization => closing(400, "", "path_normalization_failed", None),
            Self::PathRedirect(path) => entry(307, "", "path_normalization_failed", None).map(|mut r| {
                r.reply.headers.append(Known::Location, path.as_bytes());
                r
            }),
            Self::TlsRedirect(location) => entry(301, "", "direct_response", None).map(|mut r| {
                r.reply.headers.append(Known::Location, location);
                r
            }),
            Self::QueryWithoutContentType => closing(400, "", "query_missing_content_type", None),
            Self::IpDetectionFailed(status) => entry(*status, "", "rejecting_because_detection_failed", None),
            Self::RequestHeaderTimeout => {
                closing(408, "request header timeout", "request_header_timeout", None)
            }
            Self::Overloaded { told } => entry(503, "envoy overloaded", "overload", None).map(|mut r| {
                if *told {
                    r.reply.headers.append(Known::XEnvoyLocalOverloaded, "true");
                }
                r
            }),
            Self::DispatchAborted => {
                closing(500, "Internal Server Error", "overload", Some(Flag::DownstreamProtocolError))
            }
            Self::RouteNotFound => entry(404, "", "route_not_found", Some(Flag::NoRouteFound)),
            Self::ClusterNotFound { status } => {
                entry(*status, "", "cluster_not_found", Some(Flag::NoClusterFound))
            }
            Self::UpgradeFailed => closing(403, "", "upgrade_failed", None),
            Self::StrictHeaderCheck(name, value) => {
                let mut reply = LocalReply::new(
                    400,
                    format!("invalid header '{}' with value '{value}'", name.as_str()),
                    "request_headers_failed_strict_check",
                );
                reply.flag = Some(Flag::InvalidEnvoyRequestHeaders);
                Some(Reply { reply, close: false })
            }
            Self::MaintenanceMode => {
                overloaded(entry(503, "maintenance mode", "maintenance_mode", Some(Flag::UpstreamOverflow)))
            }
            Self::NoHealthyUpstream => {
                entry(503, "no healthy upstream", "no_healthy_upstream", Some(Flag::NoHealthyUpstream))
            }
            Self::UpstreamReset { reason, retried, begun, transport } => {
                let reply = upstream_reset(*reason, *retried, *begun, transport.as_deref());
                if *reason == ResetReason::Overflow { overloaded(reply) } else { reply }
            }
            Self::RouteTimeout { alternative } => alternate(
                entry(504, TIMEOUT, "response_timeout", Some(Flag::UpstreamRequestTimeout)),
                *alternative,
            ),
            Self::PerTryTimeout { alternative } => alternate(
                entry(504, TIMEOUT, "upstream_per_try_timeout", Some(Flag::UpstreamRequestTimeout)),
                *alternative,
            ),
            Self::PerTryIdleTimeout => {
                entry(504, TIMEOUT, "upstream_per_try_idle_timeout", Some(Flag::UpstreamRequestTimeout))
            }
            Self::RetryBufferExceeded => closing(
                507,
                "exceeded request buffer limit while retrying upstream",
                "request_payload_exceeded_retry_buffer_limit",
                None,
            ),
            Self::UpstreamMaxStreamDuration => entry(
                504,
                "upstream max stream duration reached",
                "upstream_max_stream_duration_reached",
                Some(Flag::UpstreamMaxStreamDurationReached),
            ),
            Self::StreamIdleTimeout { request_complete } => {
                let status = if *request_complete { 504 } else { 408 };
                entry(status, "stream timeout", "stream_idle_timeout", Some(Flag::StreamIdleTimeout))
            }
            Self::MaxStreamDuration { request_complete } => {
                let status = if *request_complete { 504 } else { 408 };
                // Of all timeouts only this one is DEADLINE_EXCEEDED to a gRPC client.
                entry(status, "downstream duration timeout", "max_duration_timeout", None).map(|mut r| {
                    r.reply.grpc_status = Some(4);
                    r
                })
            }
            Self::RequestTimeout => closing(408, "request timeout", "request_overall_timeout", None),
            Self::RequestTooLarge => closing(413, "Payload Too Large", "request_payload_too_large", None),
            Self::FilterRemovedRequiredRequestHeaders => {
                entry(400, "missing required header", "filter_removed_required_request_headers", None)
            }
            Self::FilterRemovedRequiredResponseHeaders => entry(
                502,
                "missing required header: :status",
                "filter_removed_required_response_headers",
                None,
            ),
            Self::ResponseTooLarge => entry(500, "Internal Server Error", "response_payload_too_large", None),
            Self::LateReply(_)
            | Self::DownstreamGone
            | Self::DownstreamReset
            | Self::HeadRefused(_)
            | Self::DownstreamViolation(_)
            | Self::ConnectionAborted(_) => None,
        }
    }

    /// Flag and details of an end that is not answered.
    pub(crate) fn silent(&self) -> Option<(Option<ResponseFlag>, &'static str)> {
        match self {
            Self::DownstreamGone => {
                Some((Some(ResponseFlag::DownstreamConnectionTermination), "downstream_remote_disconnect"))
            }
            Self::DownstreamReset => Some((Some(ResponseFlag::DownstreamRemoteReset), "http2.remote_reset")),
            Self::HeadRefused(details) => Some((Some(ResponseFlag::DownstreamRemoteReset), details)),
            Self::DownstreamViolation(details) => {
                Some((Some(ResponseFlag::DownstreamProtocolError), details))
            }
            Self::ConnectionAborted(details) => Some((None, details)),
            _ => None,
        }
    }

    /// The details when the response had begun and is cut short.
    pub(crate) fn details_after_start(&self) -> Cow<'static, str> {
        match self {
            Self::UpstreamReset { reason, .. } => {
                format!("upstream_reset_after_response_started{{{}}}", underscored(reason.text())).into()
            }
            Self::LateReply(details) => details.clone(),
            other => match other.reply() {
                Some(reply) => reply.reply.details,
                None => other.silent().map_or("", |(_, details)| details).into(),
            },
        }
    }
}

/// Envoy shows the transport's failure in the details, never in the body.
fn upstream_reset(reason: ResetReason, retried: bool, begun: bool, transport: Option<&str>) -> Option<Reply> {
    let status = if reason == ResetReason::ProtocolError { 502 } else { 503 };
    let again = if retried { "retried and the latest " } else { "" };
    let text = reason.text();
    let body =
        format!("upstream connect error or disconnect/reset before headers. {again}reset reason: {text}");
    let text = underscored(text);
    let when = if begun { "after" } else { "before" };
    let details = match transport {
        Some(transport) => {
            format!("upstream_reset_{when}_response_started{{{text}|{}}}", underscored(transport))
        }
        None => format!("upstream_reset_{when}_response_started{{{text}}}"),
    };
    let mut reply = LocalReply::new(status, body, details);
    reply.flag = Some(reason.flag());
    Some(Reply { reply, close: false })
}

fn underscored(text: &str) -> String {
    text.replace(' ', "_")
}

fn overloaded(reply: Option<Reply>) -> Option<Reply> {
    reply.map(|mut r| {
        r.reply.headers.append(Known::XEnvoyOverloaded, "true");
        r
    })
}

/// `x-envoy-upstream-rq-timeout-alt-response`: 204 without a body in place of 504.
fn alternate(reply: Option<Reply>, alternative: bool) -> Option<Reply> {
    reply.map(|mut r| {
        if alternative {
            r.reply.status = 204;
            r.reply.body = Cow::Borrowed("");
        }
        r
    })
}

/// The gRPC status of a local reply, from its HTTP status (Envoy's `httpToGrpcStatus`).
pub(crate) fn grpc_status(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::{ResetReason, StreamEnd, grpc_status};

    /// Rows of the reference: cause, status, body, flag, details.
    #[test]
    fn table() {
        let reset = |reason, retried, transport: Option<&str>| StreamEnd::UpstreamReset {
            reason,
            retried,
            begun: false,
            transport: transport.map(Into::into),
        };
        let before = "upstream connect error or disconnect/reset before headers.";
        let refused = Some("delayed connect error: Connection refused");
        let rows = [
            (StreamEnd::RouteNotFound, 404, String::new(), "NR", "route_not_found"),
            (StreamEnd::ClusterNotFound { status: 503 }, 503, String::new(), "NC", "cluster_not_found"),
            (StreamEnd::NoHealthyUpstream, 503, "no healthy upstream".into(), "UH", "no_healthy_upstream"),
            (
                reset(ResetReason::RemoteConnectionFailure, false, refused),
                503,
                format!("{before} reset reason: remote connection failure"),
                "UF",
                "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}",
            ),
            (
                reset(ResetReason::RemoteConnectionFailure, true, None),
                503,
                format!("{before} retried and the latest reset reason: remote connection failure"),
                "UF",
                "upstream_reset_before_response_started{remote_connection_failure}",
            ),
            (
                reset(ResetReason::ConnectionTermination, false, None),
                503,
                format!("{before} reset reason: connection termination"),
                "UC",
                "upstream_reset_before_response_started{connection_termination}",
            ),
            (
                reset(ResetReason::ProtocolError, false, None),
                502,
                format!("{before} reset reason: protocol error"),
                "UPE",
                "upstream_reset_before_response_started{protocol_error}",
            ),
            (
                reset(ResetReason::Overflow, false, None),
                503,
                format!("{before} reset reason: overflow"),
                "UO",
                "upstream_reset_before_response_started{overflow}",
            ),
            (StreamEnd::MaintenanceMode, 503, "maintenance mode".into(), "UO", "maintenance_mode"),
            (
                StreamEnd::RouteTimeout { alternative: false },
                504,
                "upstream request timeout".into(),
                "UT",
                "response_timeout",
            ),
            (StreamEnd::RouteTimeout { alternative: true }, 204, String::new(), "UT", "response_timeout"),
            (
                StreamEnd::PerTryTimeout { alternative: false },
                504,
                "upstream request timeout".into(),
                "UT",
                "upstream_per_try_timeout",
            ),
            (
                StreamEnd::StreamIdleTimeout { request_complete: true },
                504,
                "stream timeout".into(),
                "SI",
                "stream_idle_timeout",
            ),
            (
                StreamEnd::MaxStreamDuration { request_complete: true },
                504,
                "downstream duration timeout".into(),
                "-",
                "max_duration_timeout",
            ),
            (StreamEnd::RequestTimeout, 408, "request timeout".into(), "-", "request_overall_timeout"),
            (StreamEnd::RequestTooLarge, 413, "Payload Too Large".into(), "-", "request_payload_too_large"),
            (StreamEnd::UpgradeFailed, 403, String::new(), "-", "upgrade_failed"),
        ];
        for (end, status, body, flag, details) in rows {
            let reply = end.reply().unwrap().reply;
            let found = reply.flag.map_or("-", |flag| flag.short());
            assert_eq!(
                (reply.status, &*reply.body, found, &*reply.details),
                (status, body.as_str(), flag, details),
                "{end:?}"
            );
        }
        assert!(StreamEnd::DownstreamGone.reply().is_none());
    }

    #[test]
    fn grpc_statuses() {
        let codes = [400, 401, 403, 404, 429, 500, 502, 503, 504, 413].map(grpc_status);
        assert_eq!(codes, [13, 16, 7, 12, 14, 2, 14, 14, 14, 2]);
    }
}
