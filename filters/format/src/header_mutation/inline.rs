//! Headers that Envoy holds once.
//!
//! Appending to one of these joins the values with a comma; appending to any other header adds a line. Observed on
//! Envoy 1.40, header by header; those that its router takes out before anyone sees them are from its header tables.

use waystation_http::Known;

pub(super) fn in_request(name: Known) -> bool {
    use Known as K;
    in_both(name)
        || matches!(
            name,
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

pub(super) fn in_response(name: Known) -> bool {
    use Known as K;
    in_both(name)
        || in_trailers(name)
        || matches!(
            name,
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

pub(super) fn in_trailers(name: Known) -> bool {
    matches!(name, Known::GrpcMessage | Known::GrpcStatus)
}

fn in_both(name: Known) -> bool {
    use Known as K;
    matches!(
        name,
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
