//! Headers that Envoy holds once.
//!
//! A repetition of one of these, received or appended, is joined to the first with a comma; any other header gets a
//! line of its own. Observed on
//! Envoy 1.40, header by header; those that its router takes out before anyone sees them are from its header tables.

use crate::known::Known;

impl Known {
    /// Whether Envoy holds it once in a request head.
    pub fn is_inline_in_request(self) -> bool {
        use Known as K;
        self.is_inline_in_both()
            || matches!(
                self,
                K::Accept
                    | K::AcceptEncoding
                    | K::AccessControlRequestHeaders
                    | K::AccessControlRequestMethod
                    | K::AccessControlRequestPrivateNetwork
                    | K::Authorization
                    | K::CdnLoop
                    | K::Expect
                    | K::GrpcAcceptEncoding
                    | K::GrpcTimeout
                    | K::IfMatch
                    | K::IfModifiedSince
                    | K::IfNoneMatch
                    | K::IfRange
                    | K::IfUnmodifiedSince
                    | K::Origin
                    | K::Pragma
                    | K::Referer
                    | K::Te
                    | K::UserAgent
                    | K::XClientTraceId
                    | K::XEnvoyDownstreamServiceCluster
                    | K::XEnvoyDownstreamServiceNode
                    | K::XEnvoyExpectedRqTimeoutMs
                    | K::XEnvoyExternalAddress
                    | K::XEnvoyForceTrace
                    | K::XEnvoyHedgeOnPerTryTimeout
                    | K::XEnvoyInternal
                    | K::XEnvoyIpTags
                    | K::XEnvoyIsTimeoutRetry
                    | K::XEnvoyMaxRetries
                    | K::XEnvoyOriginalHost
                    | K::XEnvoyOriginalPath
                    | K::XEnvoyOriginalUrl
                    | K::XEnvoyRetriableHeaderNames
                    | K::XEnvoyRetriableStatusCodes
                    | K::XEnvoyRetryGrpcOn
                    | K::XEnvoyRetryOn
                    | K::XEnvoyUpstreamAltStatName
                    | K::XEnvoyUpstreamRqPerTryTimeoutMs
                    | K::XEnvoyUpstreamRqTimeoutAltResponse
                    | K::XEnvoyUpstreamRqTimeoutMs
                    | K::XEnvoyUpstreamStreamDurationMs
                    | K::XForwardedClientCert
                    | K::XForwardedFor
                    | K::XForwardedHost
                    | K::XForwardedPort
                    | K::XForwardedProto
            )
    }

    /// Whether Envoy holds it once in a response head.
    pub fn is_inline_in_response(self) -> bool {
        use Known as K;
        self.is_inline_in_both()
            || self.is_inline_in_trailers()
            || matches!(
                self,
                K::AccessControlAllowCredentials
                    | K::AccessControlAllowHeaders
                    | K::AccessControlAllowMethods
                    | K::AccessControlAllowOrigin
                    | K::AccessControlAllowPrivateNetwork
                    | K::AccessControlExposeHeaders
                    | K::AccessControlMaxAge
                    | K::Age
                    | K::Date
                    | K::Etag
                    | K::Expires
                    | K::LastModified
                    | K::Location
                    | K::Server
                    | K::Vary
                    | K::XEnvoyDegraded
                    | K::XEnvoyImmediateHealthCheckFail
                    | K::XEnvoyRatelimited
                    | K::XEnvoyUpstreamCanary
                    | K::XEnvoyUpstreamHealthcheckedCluster
                    | K::XEnvoyUpstreamServiceTime
            )
    }

    /// Whether Envoy holds it once in trailers.
    pub fn is_inline_in_trailers(self) -> bool {
        matches!(self, Known::GrpcMessage | Known::GrpcStatus)
    }

    fn is_inline_in_both(self) -> bool {
        use Known as K;
        matches!(
            self,
            K::CacheControl
                | K::Connection
                | K::ContentEncoding
                | K::ContentLength
                | K::ContentType
                | K::KeepAlive
                | K::ProxyConnection
                | K::ProxyStatus
                | K::TransferEncoding
                | K::Upgrade
                | K::Via
                | K::XEnvoyAttemptCount
                | K::XEnvoyDecoratorOperation
                | K::XRequestId
        )
    }
}
