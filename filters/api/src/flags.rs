//! Response flags (Envoy's access log `%RESPONSE_FLAGS%`).

use std::fmt;

macro_rules! response_flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $short:literal, $long:literal;)*) => {
        /// One response flag; the discriminant is its bit.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        #[repr(u8)]
        pub enum ResponseFlag { $($(#[$doc])* $name = $bit,)* }

        impl ResponseFlag {
            /// All flags in bit order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The short form, e.g. `UF`.
            pub fn short(self) -> &'static str {
                match self { $(Self::$name => $short,)* }
            }

            /// The long form, e.g. `UpstreamConnectionFailure`.
            pub fn long(self) -> &'static str {
                match self { $(Self::$name => $long,)* }
            }
        }
    };
}

response_flags! {
    /// The local service failed its health check.
    FailedLocalHealthCheck = 0, "LH", "FailedLocalHealthCheck";
    /// No healthy upstream host.
    NoHealthyUpstream = 1, "UH", "NoHealthyUpstream";
    /// The upstream request timed out.
    UpstreamRequestTimeout = 2, "UT", "UpstreamRequestTimeout";
    /// The connection was reset by us.
    LocalReset = 3, "LR", "LocalReset";
    /// The upstream reset the stream.
    UpstreamRemoteReset = 4, "UR", "UpstreamRemoteReset";
    /// The upstream connection could not be made.
    UpstreamConnectionFailure = 5, "UF", "UpstreamConnectionFailure";
    /// The upstream connection ended.
    UpstreamConnectionTermination = 6, "UC", "UpstreamConnectionTermination";
    /// A circuit breaker is open.
    UpstreamOverflow = 7, "UO", "UpstreamOverflow";
    /// No route matched, or no filter chain.
    NoRouteFound = 8, "NR", "NoRouteFound";
    /// A delay was injected.
    DelayInjected = 9, "DI", "DelayInjected";
    /// An abort was injected.
    FaultInjected = 10, "FI", "FaultInjected";
    /// Rate limited.
    RateLimited = 11, "RL", "RateLimited";
    /// Denied by the external authorization service.
    UnauthorizedExternalService = 12, "UAEX", "UnauthorizedExternalService";
    /// The rate limit service failed.
    RateLimitServiceError = 13, "RLSE", "RateLimitServiceError";
    /// The client closed the connection.
    DownstreamConnectionTermination = 14, "DC", "DownstreamConnectionTermination";
    /// Retries are exhausted.
    UpstreamRetryLimitExceeded = 15, "URX", "UpstreamRetryLimitExceeded";
    /// The stream was idle too long.
    StreamIdleTimeout = 16, "SI", "StreamIdleTimeout";
    /// A strictly checked request header is invalid.
    InvalidEnvoyRequestHeaders = 17, "IH", "InvalidEnvoyRequestHeaders";
    /// The client broke the protocol.
    DownstreamProtocolError = 18, "DPE", "DownstreamProtocolError";
    /// The upstream stream lasted too long.
    UpstreamMaxStreamDurationReached = 19, "UMSDR", "UpstreamMaxStreamDurationReached";
    /// The response came from a cache.
    ResponseFromCacheFilter = 20, "RFCF", "ResponseFromCacheFilter";
    /// A filter's configuration is missing.
    NoFilterConfigFound = 21, "NFCF", "NoFilterConfigFound";
    /// The connection or stream lasted too long.
    DurationTimeout = 22, "DT", "DurationTimeout";
    /// The upstream broke the protocol.
    UpstreamProtocolError = 23, "UPE", "UpstreamProtocolError";
    /// The cluster does not exist.
    NoClusterFound = 24, "NC", "NoClusterFound";
    /// Ended by the overload manager.
    OverloadManagerTerminated = 25, "OM", "OverloadManagerTerminated";
    /// DNS resolution failed.
    DnsResolutionFailed = 26, "DF", "DnsResolutionFailed";
    /// Dropped by `drop_overload`.
    DropOverload = 27, "DO", "DropOverload";
    /// The client reset the stream.
    DownstreamRemoteReset = 28, "DR", "DownstreamRemoteReset";
    /// Dropped unconditionally by `drop_overload`.
    UnconditionalDropOverload = 29, "UDO", "UnconditionalDropOverload";
}

/// The flags of a stream, in the order in which they were set: `%RESPONSE_FLAGS%` prints `URX,UF`, not `UF,URX`.
///
/// At most eight are kept; Envoy's own paths set no more than three.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ResponseFlags {
    order: [u8; 8],
    len: u8,
}

impl ResponseFlags {
    /// Sets a flag; setting it again changes nothing.
    pub fn set(&mut self, flag: ResponseFlag) {
        let len = usize::from(self.len);
        if !self.contains(flag) && len < self.order.len() {
            self.order[len] = flag as u8;
            self.len += 1;
        }
    }

    /// Whether the flag is set.
    pub fn contains(&self, flag: ResponseFlag) -> bool {
        self.order[..usize::from(self.len)].contains(&(flag as u8))
    }

    /// Whether no flag is set.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The flags in the order they were set.
    pub fn iter(&self) -> impl Iterator<Item = ResponseFlag> + '_ {
        self.order[..usize::from(self.len)].iter().map(|bit| ResponseFlag::ALL[usize::from(*bit)])
    }
}

/// The short forms joined by commas, `-` when there are none.
impl fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        for (i, flag) in self.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(flag.short())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{ResponseFlag, ResponseFlags};

    #[test]
    fn order_of_setting_is_kept() {
        let mut flags = ResponseFlags::default();
        assert_eq!(flags.to_string(), "-");
        flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
        flags.set(ResponseFlag::UpstreamConnectionFailure);
        flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
        assert_eq!(flags.to_string(), "URX,UF");
    }

    #[test]
    fn discriminants_index_the_table() {
        for (i, flag) in ResponseFlag::ALL.iter().enumerate() {
            assert_eq!(*flag as usize, i);
        }
    }
}
