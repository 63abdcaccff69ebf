//! Addresses and parts of them.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};

use waystation_filter_api::address::Address;
use waystation_filter_api::stream::StreamInfo;
use waystation_matchers::Cidr;

use super::operator::Written;

/// Whose address.
#[derive(Clone, Copy, Debug)]
pub(super) enum AddressOf {
    DownstreamRemote,
    DownstreamDirectRemote,
    DownstreamLocal,
    DownstreamDirectLocal,
    UpstreamHost,
    UpstreamRemote,
    UpstreamLocal,
}

/// What of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum AddressPart {
    Full,
    WithoutPort,
    /// The network of this prefix length.
    Masked(u8),
    Port,
    EndpointId,
}

pub(super) fn write(
    of: AddressOf,
    part: AddressPart,
    info: &StreamInfo,
    out: &mut Vec<u8>,
) -> Option<Written> {
    let address = of.get(info)?;
    match part {
        AddressPart::Full => put_full(address, out),
        AddressPart::WithoutPort => put_without_port(address, out),
        AddressPart::Masked(len) => {
            let ip = address.ip()?.ip();
            let network = Cidr::new(ip, len.min(if ip.is_ipv4() { 32 } else { 128 }));
            let _ = write!(out, "{}/{}", network.address(), network.prefix_len());
        }
        AddressPart::Port => {
            out.extend_from_slice(itoa::Buffer::new().format(address.ip()?.port()).as_bytes());
            return Some(Written::Json);
        }
        AddressPart::EndpointId => {
            if let Address::Internal { endpoint_id, .. } = address {
                out.extend_from_slice(endpoint_id.as_bytes());
            }
        }
    }
    Some(Written::Text)
}

impl AddressOf {
    fn get(self, info: &StreamInfo) -> Option<&Address> {
        let connection = &*info.connection;
        let upstream = &info.upstream;
        match self {
            Self::DownstreamRemote => Some(&info.remote_address),
            Self::DownstreamDirectRemote => Some(&connection.direct_remote_address),
            Self::DownstreamLocal => Some(&connection.local_address),
            Self::DownstreamDirectLocal => Some(&connection.direct_local_address),
            Self::UpstreamHost => Some(upstream.host.as_ref()?.address()),
            // Known once connected, where `%UPSTREAM_HOST%` is known once chosen.
            Self::UpstreamRemote => {
                upstream.connection_id?;
                Some(upstream.host.as_ref()?.address())
            }
            Self::UpstreamLocal => upstream.local_address.as_ref(),
        }
    }
}

/// Appends `127.0.0.1:80`, `[::1]:80`, a path, or `envoy://listener/endpoint`.
pub(super) fn put_full(address: &Address, out: &mut Vec<u8>) {
    match address {
        Address::Ip(SocketAddr::V4(address)) => {
            put_ipv4(address.ip().octets(), out);
            out.push(b':');
            out.extend_from_slice(itoa::Buffer::new().format(address.port()).as_bytes());
        }
        address => {
            let _ = write!(out, "{address}");
        }
    }
}

/// Appends the IP address alone; other addresses have no port to leave out.
pub(super) fn put_without_port(address: &Address, out: &mut Vec<u8>) {
    match address.ip().map(|address| address.ip()) {
        Some(IpAddr::V4(ip)) => put_ipv4(ip.octets(), out),
        Some(IpAddr::V6(ip)) => {
            let _ = write!(out, "{ip}");
        }
        None => put_full(address, out),
    }
}

/// `Ipv4Addr`'s `Display` goes through the formatting machinery, at ten times the cost.
fn put_ipv4(octets: [u8; 4], out: &mut Vec<u8>) {
    for (i, octet) in octets.into_iter().enumerate() {
        if i > 0 {
            out.push(b'.');
        }
        out.extend_from_slice(itoa::Buffer::new().format(octet).as_bytes());
    }
}
