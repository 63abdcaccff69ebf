//! Addresses as Envoy's configuration and access logs know them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Where a listener listens, a host lives or a peer connects from
/// (`envoy.config.core.v3.Address` after resolution).
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Address {
    /// An IP address and port.
    Ip(SocketAddr),
    /// A Unix domain socket by path; `@name` is Linux's abstract namespace.
    Pipe(Arc<str>),
    /// An internal listener by name, with the endpoint id that tells hosts behind it apart.
    Internal {
        /// `server_listener_name`.
        listener: Arc<str>,
        /// `endpoint_id`, empty when unset.
        endpoint_id: Arc<str>,
    },
}

impl Address {
    /// The IP address and port, if it is one.
    pub fn ip(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(address) => Some(*address),
            _ => None,
        }
    }

    /// Whether the peer is on this machine: loopback or a Unix socket.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Ip(address) => match address.ip() {
                IpAddr::V4(ip) => ip.is_loopback(),
                IpAddr::V6(ip) => ip.is_loopback(),
            },
            Self::Pipe(_) | Self::Internal { .. } => true,
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

/// Envoy's text form: `127.0.0.1:80`, `[::1]:80`, `/run/a.sock`, `@abstract`, `envoy://listener/endpoint`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Pipe(path) => f.write_str(path),
            Self::Internal { listener, endpoint_id } => write!(f, "envoy://{listener}/{endpoint_id}"),
        }
    }
}
