//! Listener filters: tls_inspector, http_inspector, proxy_protocol, original_dst, local_ratelimit.
//!
//! They look at the first bytes of a connection before its filter chain is chosen. Deciding is sans-io: the driver
//! reads into one buffer and asks each filter in turn; what a filter does not consume is handed on to the transport.

#![forbid(unsafe_code)]

mod http_inspector;
mod proxy_protocol;
mod tls_inspector;

use std::net::SocketAddr;
use std::time::Instant;

use envoy_types::pb::envoy::extensions::filters::listener as pb;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::wire::decode;
use waystation_ratelimit::listener::LocalRateLimit;
use waystation_schema::ConfigError;
use waystation_stats::Scope;

use http_inspector::HttpInspector;
use proxy_protocol::ProxyProtocol;
use tls_inspector::TlsInspector;

/// A compiled listener filter.
#[derive(Debug)]
pub struct ListenerFilter(Kind);

#[derive(Debug)]
enum Kind {
    HttpInspector(HttpInspector),
    LocalRateLimit(LocalRateLimit),
    OriginalDst,
    ProxyProtocol(ProxyProtocol),
    TlsInspector(TlsInspector),
}

/// What a filter makes of the bytes so far.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It needs more bytes to decide.
    NeedMore,
    /// Done; so many bytes from the front of the buffer belong to it and are dropped.
    Done {
        /// Bytes that the filter consumed (a PROXY header).
        consumed: usize,
    },
    /// The connection is to be closed; `downstream_listener_filter_error`.
    Reject(&'static str),
    /// The connection is to be closed, which the filter has counted itself.
    Close,
}

impl Verdict {
    /// Done without taking bytes.
    pub const PASS: Self = Self::Done { consumed: 0 };
}

impl ListenerFilter {
    /// Compiles the filter of this type (without `type.googleapis.com/`); `scope` is the root of the statistics.
    pub fn compile(
        type_name: &str,
        config: &[u8],
        scope: &Scope,
        runtime: &Runtime,
    ) -> Result<Self, ConfigError> {
        let kind = match type_name {
            "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector" => {
                Kind::HttpInspector(HttpInspector::new(scope))
            }
            "envoy.extensions.filters.listener.local_ratelimit.v3.LocalRateLimit" => {
                let proto = decode::<pb::local_ratelimit::v3::LocalRateLimit>(config)?;
                Kind::LocalRateLimit(LocalRateLimit::compile(&proto, scope, runtime)?)
            }
            "envoy.extensions.filters.listener.original_dst.v3.OriginalDst" => Kind::OriginalDst,
            "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol" => {
                let proto = decode::<pb::proxy_protocol::v3::ProxyProtocol>(config)?;
                Kind::ProxyProtocol(ProxyProtocol::compile(&proto, scope)?)
            }
            "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" => {
                let proto = decode::<pb::tls_inspector::v3::TlsInspector>(config)?;
                Kind::TlsInspector(TlsInspector::compile(&proto, scope)?)
            }
            other => return Err(ConfigError::new(format!("unknown listener filter type '{other}'"))),
        };
        Ok(Self(kind))
    }

    /// Whether the filter needs bytes of the client, and so waits for them.
    pub fn wants_bytes(&self) -> bool {
        !matches!(self.0, Kind::OriginalDst | Kind::LocalRateLimit(_))
    }

    /// Looks at what has come in. `original_destination` is the kernel's answer (`SO_ORIGINAL_DST`), if the driver got
    /// one; `end` says that the client sends no more; `now` is the time.
    pub fn inspect(
        &self,
        buffer: &[u8],
        end: bool,
        original_destination: Option<SocketAddr>,
        now: Instant,
        info: &mut ConnectionInfo,
    ) -> Verdict {
        match &self.0 {
            Kind::HttpInspector(filter) => filter.inspect(buffer, end, info),
            Kind::LocalRateLimit(filter) => match filter.admits(now) {
                true => Verdict::PASS,
                false => Verdict::Close,
            },
            Kind::OriginalDst => {
                if let Some(original) = original_destination.map(Address::Ip)
                    && original != info.local_address
                {
                    info.local_address = original;
                    info.local_address_restored = true;
                }
                Verdict::PASS
            }
            Kind::ProxyProtocol(filter) => filter.inspect(buffer, end, info),
            Kind::TlsInspector(filter) => filter.inspect(buffer, end, info),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ListenerFilter, Verdict};
    use std::net::SocketAddr;
    use std::time::Instant;
    use waystation_filter_api::address::Address;
    use waystation_filter_api::connection::ConnectionInfo;
    use waystation_filter_api::runtime::Runtime;
    use waystation_stats::Store;

    #[test]
    fn original_dst_restores_only_a_different_destination() {
        let type_name = "envoy.extensions.filters.listener.original_dst.v3.OriginalDst";
        let filter =
            ListenerFilter::compile(type_name, &[], &Store::default().root(), &Runtime::new()).unwrap();
        let own: SocketAddr = "127.0.0.1:15001".parse().unwrap();
        let other: SocketAddr = "10.0.0.1:80".parse().unwrap();
        for (original, restored) in [(None, false), (Some(own), false), (Some(other), true)] {
            let mut info = ConnectionInfo::new(1, Instant::now(), own.into(), own.into());
            assert_eq!(filter.inspect(&[], false, original, info.start, &mut info), Verdict::PASS);
            assert_eq!(info.local_address_restored, restored);
            assert_eq!(info.local_address, Address::Ip(original.unwrap_or(own)));
        }
        assert!(!filter.wants_bytes());
    }

    #[test]
    fn unknown_types_are_named() {
        let error =
            ListenerFilter::compile("x.Y", &[], &Store::default().root(), &Runtime::new()).unwrap_err();
        assert_eq!(error.to_string(), "unknown listener filter type 'x.Y'");
    }
}
