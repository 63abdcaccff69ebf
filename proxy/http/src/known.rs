//! The header names that the proxy itself reads or writes.
//!
//! A known name is one byte in a [`Headers`](crate::Headers) entry instead of a copy of its text, and asking whether
//! it is present is one bit test. The names are those Envoy 1.40 declares in its `Http::Headers` and
//! `Http::CustomHeaders` tables.

macro_rules! known_names {
    ($( $(#[$meta:meta])* $variant:ident = $text:literal, )*) => {
        /// A header name with a fixed id. The text is always lower-case.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Known {
            $(
                #[doc = concat!("`", $text, "`")]
                $(#[$meta])*
                $variant,
            )*
        }

        const ALL: &[Known] = &[$(Known::$variant),*];
        const TEXTS: &[&str] = &[$($text),*];
    };
}

known_names! {
    // Pseudo-headers come first: `Known::is_pseudo` is a comparison with the last of them.
    Method = ":method",
    Scheme = ":scheme",
    Authority = ":authority",
    Path = ":path",
    Protocol = ":protocol",
    Status = ":status",
    // Framing and connection.
    Host = "host",
    ContentLength = "content-length",
    TransferEncoding = "transfer-encoding",
    Connection = "connection",
    KeepAlive = "keep-alive",
    ProxyConnection = "proxy-connection",
    Upgrade = "upgrade",
    Te = "te",
    Trailer = "trailer",
    Expect = "expect",
    Http2Settings = "http2-settings",
    SecWebsocketKey = "sec-websocket-key",
    SecWebsocketVersion = "sec-websocket-version",
    SecWebsocketAccept = "sec-websocket-accept",
    SecWebsocketProtocol = "sec-websocket-protocol",
    SecWebsocketExtensions = "sec-websocket-extensions",
    CapsuleProtocol = "capsule-protocol",
    // General.
    Accept = "accept",
    AcceptEncoding = "accept-encoding",
    AcceptLanguage = "accept-language",
    AcceptRanges = "accept-ranges",
    Age = "age",
    Allow = "allow",
    AltSvc = "alt-svc",
    Authorization = "authorization",
    CacheControl = "cache-control",
    CacheStatus = "cache-status",
    CdnLoop = "cdn-loop",
    ContentDisposition = "content-disposition",
    ContentEncoding = "content-encoding",
    ContentLanguage = "content-language",
    ContentRange = "content-range",
    ContentType = "content-type",
    Cookie = "cookie",
    Date = "date",
    EarlyData = "early-data",
    Etag = "etag",
    Expires = "expires",
    Forwarded = "forwarded",
    IfMatch = "if-match",
    IfModifiedSince = "if-modified-since",
    IfNoneMatch = "if-none-match",
    IfRange = "if-range",
    IfUnmodifiedSince = "if-unmodified-since",
    LastModified = "last-modified",
    Location = "location",
    Origin = "origin",
    Pragma = "pragma",
    ProxyAuthenticate = "proxy-authenticate",
    ProxyAuthorization = "proxy-authorization",
    ProxyStatus = "proxy-status",
    Range = "range",
    Referer = "referer",
    RetryAfter = "retry-after",
    Server = "server",
    SetCookie = "set-cookie",
    StrictTransportSecurity = "strict-transport-security",
    UserAgent = "user-agent",
    Vary = "vary",
    Via = "via",
    WwwAuthenticate = "www-authenticate",
    XContentTypeOptions = "x-content-type-options",
    XFrameOptions = "x-frame-options",
    AccessControlRequestMethod = "access-control-request-method",
    AccessControlRequestHeaders = "access-control-request-headers",
    AccessControlRequestPrivateNetwork = "access-control-request-private-network",
    AccessControlAllowOrigin = "access-control-allow-origin",
    AccessControlAllowMethods = "access-control-allow-methods",
    AccessControlAllowHeaders = "access-control-allow-headers",
    AccessControlAllowCredentials = "access-control-allow-credentials",
    AccessControlAllowPrivateNetwork = "access-control-allow-private-network",
    AccessControlExposeHeaders = "access-control-expose-headers",
    AccessControlMaxAge = "access-control-max-age",
    SecFetchSite = "sec-fetch-site",
    // Forwarding.
    XForwardedFor = "x-forwarded-for",
    XForwardedProto = "x-forwarded-proto",
    XForwardedHost = "x-forwarded-host",
    XForwardedPort = "x-forwarded-port",
    XForwardedClientCert = "x-forwarded-client-cert",
    XRequestId = "x-request-id",
    XClientTraceId = "x-client-trace-id",
    XRealIp = "x-real-ip",
    // gRPC.
    GrpcStatus = "grpc-status",
    GrpcMessage = "grpc-message",
    GrpcTimeout = "grpc-timeout",
    GrpcEncoding = "grpc-encoding",
    GrpcAcceptEncoding = "grpc-accept-encoding",
    GrpcStatusDetailsBin = "grpc-status-details-bin",
    XGrpcWeb = "x-grpc-web",
    // Rate limits.
    XRatelimitLimit = "x-ratelimit-limit",
    XRatelimitRemaining = "x-ratelimit-remaining",
    XRatelimitReset = "x-ratelimit-reset",
    // Tracing.
    Traceparent = "traceparent",
    Tracestate = "tracestate",
    Baggage = "baggage",
    B3 = "b3",
    XB3TraceId = "x-b3-traceid",
    XB3SpanId = "x-b3-spanid",
    XB3ParentSpanId = "x-b3-parentspanid",
    XB3Sampled = "x-b3-sampled",
    XB3Flags = "x-b3-flags",
    XOtSpanContext = "x-ot-span-context",
    XCloudTraceContext = "x-cloud-trace-context",
    XAmznTraceId = "x-amzn-trace-id",
    Sw8 = "sw8",
    XDatadogTraceId = "x-datadog-trace-id",
    XDatadogParentId = "x-datadog-parent-id",
    XDatadogSamplingPriority = "x-datadog-sampling-priority",
    GrpcTraceBin = "grpc-trace-bin",
    // Envoy's own, requests.
    XEnvoyAttemptCount = "x-envoy-attempt-count",
    XEnvoyCluster = "x-envoy-cluster",
    XEnvoyDecoratorOperation = "x-envoy-decorator-operation",
    XEnvoyDownstreamServiceCluster = "x-envoy-downstream-service-cluster",
    XEnvoyDownstreamServiceNode = "x-envoy-downstream-service-node",
    XEnvoyExpectedRqTimeoutMs = "x-envoy-expected-rq-timeout-ms",
    XEnvoyExternalAddress = "x-envoy-external-address",
    XEnvoyForceTrace = "x-envoy-force-trace",
    XEnvoyHedgeOnPerTryTimeout = "x-envoy-hedge-on-per-try-timeout",
    XEnvoyInternal = "x-envoy-internal",
    XEnvoyIpTags = "x-envoy-ip-tags",
    XEnvoyIsTimeoutRetry = "x-envoy-is-timeout-retry",
    XEnvoyMaxRetries = "x-envoy-max-retries",
    XEnvoyOriginalDstHost = "x-envoy-original-dst-host",
    XEnvoyOriginalHost = "x-envoy-original-host",
    XEnvoyOriginalMethod = "x-envoy-original-method",
    XEnvoyOriginalPath = "x-envoy-original-path",
    XEnvoyOriginalUrl = "x-envoy-original-url",
    XEnvoyRetriableHeaderNames = "x-envoy-retriable-header-names",
    XEnvoyRetriableStatusCodes = "x-envoy-retriable-status-codes",
    XEnvoyRetryGrpcOn = "x-envoy-retry-grpc-on",
    XEnvoyRetryOn = "x-envoy-retry-on",
    XEnvoyUpstreamAltStatName = "x-envoy-upstream-alt-stat-name",
    XEnvoyUpstreamRqPerTryTimeoutMs = "x-envoy-upstream-rq-per-try-timeout-ms",
    XEnvoyUpstreamRqTimeoutAltResponse = "x-envoy-upstream-rq-timeout-alt-response",
    XEnvoyUpstreamRqTimeoutMs = "x-envoy-upstream-rq-timeout-ms",
    XEnvoyUpstreamStreamDurationMs = "x-envoy-upstream-stream-duration-ms",
    // Envoy's own, responses.
    XEnvoyDegraded = "x-envoy-degraded",
    XEnvoyDropOverload = "x-envoy-drop-overload",
    XEnvoyUnconditionalDropOverload = "x-envoy-unconditional-drop-overload",
    XEnvoyImmediateHealthCheckFail = "x-envoy-immediate-health-check-fail",
    XEnvoyLocalOverloaded = "x-envoy-local-overloaded",
    XEnvoyOverloaded = "x-envoy-overloaded",
    XEnvoyRatelimited = "x-envoy-ratelimited",
    XEnvoyUpstreamCanary = "x-envoy-upstream-canary",
    XEnvoyUpstreamHealthcheckedCluster = "x-envoy-upstream-healthchecked-cluster",
    XEnvoyUpstreamHostAddress = "x-envoy-upstream-host-address",
    XEnvoyUpstreamHostname = "x-envoy-upstream-hostname",
    XEnvoyUpstreamServiceTime = "x-envoy-upstream-service-time",
    // Envoy's own, fault injection.
    XEnvoyFaultAbortRequest = "x-envoy-fault-abort-request",
    XEnvoyFaultAbortGrpcRequest = "x-envoy-fault-abort-grpc-request",
    XEnvoyFaultAbortRequestPercentage = "x-envoy-fault-abort-request-percentage",
    XEnvoyFaultDelayRequest = "x-envoy-fault-delay-request",
    XEnvoyFaultDelayRequestPercentage = "x-envoy-fault-delay-request-percentage",
    XEnvoyFaultThroughputResponse = "x-envoy-fault-throughput-response",
    XEnvoyFaultThroughputResponsePercentage = "x-envoy-fault-throughput-response-percentage",
    // Istio's metadata exchange.
    XEnvoyPeerMetadata = "x-envoy-peer-metadata",
    XEnvoyPeerMetadataId = "x-envoy-peer-metadata-id",
}

impl Known {
    /// How many known names there are; ids run from 1 to this, 0 means "not known".
    pub const COUNT: usize = ALL.len();

    /// The length of the longest.
    pub const LONGEST: usize = {
        let (mut longest, mut i) = (0, 0);
        while i < TEXTS.len() {
            let length = TEXTS[i].len();
            longest = if length > longest { length } else { longest };
            i += 1;
        }
        longest
    };

    /// All known names, in the order of their discriminants.
    pub fn all() -> &'static [Known] {
        ALL
    }

    /// Finds the id of a lower-case name.
    #[inline]
    pub fn lookup(name: &[u8]) -> Option<Self> {
        let mut slot = slot_of(name);
        loop {
            let id = SLOTS[slot];
            if id == 0 {
                return None;
            }
            if TEXTS[id as usize - 1].as_bytes() == name {
                return Some(ALL[id as usize - 1]);
            }
            slot = (slot + 1) % SLOT_COUNT;
        }
    }

    /// The name's text, lower-case.
    #[inline]
    pub fn as_str(self) -> &'static str {
        TEXTS[self as usize]
    }

    /// Whether this is an HTTP/2 style pseudo-header such as `:path`.
    #[inline]
    pub fn is_pseudo(self) -> bool {
        self <= Known::Status
    }

    /// The id stored in a header entry: never 0.
    #[inline]
    pub(crate) const fn id(self) -> u8 {
        self as u8 + 1
    }

    /// The inverse of [`id`](Self::id); `None` for 0.
    #[inline]
    pub(crate) fn from_id(id: u8) -> Option<Self> {
        ALL.get((id as usize).wrapping_sub(1)).copied()
    }
}

/// A power of two, so that `%` is a mask, and several times the number of names, so that a probe for a name that is
/// not known nearly always ends at once.
const SLOT_COUNT: usize = 1024;

const SLOTS: [u8; SLOT_COUNT] = build_slots();

const _: () = assert!(ALL.len() < 255, "ids are one byte");

const fn build_slots() -> [u8; SLOT_COUNT] {
    let mut slots = [0; SLOT_COUNT];
    let mut index = 0;
    while index < TEXTS.len() {
        let mut slot = slot_of(TEXTS[index].as_bytes());
        while slots[slot] != 0 {
            slot = (slot + 1) % SLOT_COUNT;
        }
        slots[slot] = index as u8 + 1;
        index += 1;
    }
    slots
}

/// Mixes the length and four bytes that differ most between header names: `x-envoy-...` names share their start, so
/// the bytes come from the middle and the end.
#[inline]
const fn slot_of(name: &[u8]) -> usize {
    let len = name.len();
    if len == 0 {
        return 0;
    }
    let first = name[0] as u32;
    let middle = name[len / 2] as u32;
    let late = name[len - 1 - len / 4] as u32;
    let last = name[len - 1] as u32;
    let bytes = first | middle << 8 | late << 16 | last << 24;
    let mixed = (bytes ^ (len as u32).wrapping_mul(0x9e37_79b1)).wrapping_mul(0x85eb_ca6b);
    (mixed >> 16) as usize % SLOT_COUNT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_and_lower_case() {
        for (index, text) in TEXTS.iter().enumerate() {
            assert_eq!(Known::lookup(text.as_bytes()), Some(ALL[index]), "{text}");
            assert_eq!(ALL[index].as_str(), *text);
            assert_eq!(Known::from_id(ALL[index].id()), Some(ALL[index]));
            assert_eq!(text.to_ascii_lowercase(), *text);
            assert_eq!(ALL[index].is_pseudo(), text.starts_with(':'));
        }
    }

    #[test]
    fn other_names_are_not_known() {
        for name in ["", "x", "hosts", "x-envoy-", "x-forwarded-fo", "Host", "\u{ff}"] {
            assert_eq!(Known::lookup(name.as_bytes()), None, "{name}");
        }
        assert_eq!(Known::from_id(0), None);
        assert_eq!(Known::from_id(255), None);
    }

    #[test]
    fn probes_are_short() {
        let longest = |slots: &[u8]| slots.split(|slot| *slot == 0).map(<[u8]>::len).max();
        assert!(longest(&SLOTS) <= Some(8), "{:?}", longest(&SLOTS));
    }
}
