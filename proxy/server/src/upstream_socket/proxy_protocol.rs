//! The PROXY protocol towards upstream: the header that a connection begins with, before TLS and everything else
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::core::v3::proxy_protocol_config::Version;
use envoy_types::pb::envoy::config::core::v3::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{ConnectionInfo, Tlv};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Scope, stats_group};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

stats_group! {
    /// `cluster.<name>.upstream.proxyprotocol.`
    pub(crate) struct Stats {
        counters { v2_tlvs_exceed_max_length }
        gauges {}
        histograms {}
    }
}

/// Compiled `ProxyProtocolConfig`.
#[derive(Debug)]
pub struct ProxyProtocol {
    version: Version,
    passed: Passed,
    /// They win over received ones of the same type.
    added: Vec<Tlv>,
    stats: Stats,
}

/// Which TLVs of the downstream connection go on.
#[derive(Debug)]
enum Passed {
    None,
    All,
    Listed(HashSet<u8>),
}

impl ProxyProtocol {
    pub(crate) fn compile(proto: &core::ProxyProtocolConfig, scope: &Scope) -> Result<Self, ConfigError> {
        let passed = match &proto.pass_through_tlvs {
            None => Passed::None,
            Some(tlvs) if tlvs.match_type() == PassTlVsMatchType::IncludeAll => Passed::All,
            Some(tlvs) => {
                Passed::Listed(tlvs.tlv_type.iter().filter_map(|kind| (*kind).try_into().ok()).collect())
            }
        };
        let mut added: Vec<Tlv> = Vec::with_capacity(proto.added_tlvs.len());
        for (index, entry) in proto.added_tlvs.iter().enumerate() {
            let core::TlvEntry { r#type, value, format_string } = entry;
            let at = || format!("added_tlvs[{index}]");
            if format_string.is_some() {
                let reason = "not supported: give the value";
                return Err(ConfigError::field("format_string", reason).at(at()));
            }
            let kind =
                u8::try_from(*r#type).map_err(|_| ConfigError::field("type", "must be below 256")).at(at)?;
            if value.is_empty() {
                return Err(ConfigError::field("value", "must not be empty").at(at()));
            }
            added.push(Tlv { kind, value: value.as_slice().into() });
        }
        let stats = scope.scope("upstream").scope("proxyprotocol").group();
        Ok(Self { version: proto.version(), passed, added, stats })
    }

    /// The header of a connection made for `downstream`; without one it speaks of the connection itself (`ends`: its
    /// local and remote address).
    pub(crate) fn header(
        &self,
        downstream: Option<&ConnectionInfo>,
        ends: (Option<&Address>, &Address),
    ) -> Vec<u8> {
        let stated = downstream.map(|info| (&info.remote_address, &info.local_address));
        match self.version {
            Version::V1 => {
                let addresses = stated.or(ends.0.map(|local| (local, ends.1)));
                version_1(addresses.and_then(of_one_family))
            }
            Version::V2 => {
                match stated.and_then(of_one_family) {
                    Some(addresses) => {
                        self.version_2(addresses, downstream.map_or(&[], |info| &*info.proxy_protocol_tlvs))
                    }
                    None => {
                        // LOCAL: the connection stands for nobody else's.
                        let mut out = SIGNATURE.to_vec();
                        out.extend([0x20, 0, 0, 0]);
                        out
                    }
                }
            }
        }
    }

    fn version_2(&self, (source, destination): (SocketAddr, SocketAddr), received: &[Tlv]) -> Vec<u8> {
        let mut body = Vec::with_capacity(64);
        for ip in [source.ip(), destination.ip()] {
            match ip {
                IpAddr::V4(ip) => body.extend(ip.octets()),
                IpAddr::V6(ip) => body.extend(ip.octets()),
            }
        }
        body.extend(source.port().to_be_bytes());
        body.extend(destination.port().to_be_bytes());
        let passed = received.iter().filter(|tlv| {
            let wanted = match &self.passed {
                Passed::None => false,
                Passed::All => true,
                Passed::Listed(kinds) => kinds.contains(&tlv.kind),
            };
            wanted && !self.added.iter().any(|added| added.kind == tlv.kind)
        });
        let without = body.len();
        for Tlv { kind, value } in self.added.iter().chain(passed) {
            body.push(*kind);
            body.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
            body.extend(&**value);
        }
        let length = u16::try_from(body.len()).unwrap_or_else(|_| {
            self.stats.v2_tlvs_exceed_max_length().inc();
            body.truncate(without);
            // Two addresses and two ports.
            without as u16
        });
        let mut out = SIGNATURE.to_vec();
        out.extend([0x21, if source.is_ipv4() { 0x11 } else { 0x21 }]);
        out.extend(length.to_be_bytes());
        out.extend(body);
        out
    }
}

/// The addresses, where a header can state them: it has room for one family.
fn of_one_family((source, destination): (&Address, &Address)) -> Option<(SocketAddr, SocketAddr)> {
    let addresses = source.ip().zip(destination.ip());
    addresses.filter(|(source, destination)| source.is_ipv4() == destination.is_ipv4())
}

fn version_1(addresses: Option<(SocketAddr, SocketAddr)>) -> Vec<u8> {
    let Some((source, destination)) = addresses else { return b"PROXY UNKNOWN\r\n".to_vec() };
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (source.ip(), destination.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::ProxyProtocol;
    use envoy_types::pb::envoy::config::core::v3 as core;
    use std::net::SocketAddr;
    use std::time::Instant;
    use waystation_filter_api::address::Address;
    use waystation_filter_api::connection::{ConnectionInfo, Tlv};
    use waystation_stats::Store;

    const ALL: i32 = 0;
    const INCLUDE: i32 = 1;

    fn compile(version: i32, passed: Option<(i32, &[u32])>, added: &[(u32, &[u8])]) -> ProxyProtocol {
        let proto = core::ProxyProtocolConfig {
            version,
            pass_through_tlvs: passed.map(|(match_type, tlv_type)| core::ProxyProtocolPassThroughTlVs {
                match_type,
                tlv_type: tlv_type.to_vec(),
            }),
            added_tlvs: added
                .iter()
                .map(|(kind, value)| core::TlvEntry {
                    r#type: *kind,
                    value: value.to_vec(),
                    format_string: None,
                })
                .collect(),
        };
        ProxyProtocol::compile(&proto, &Store::default().root()).unwrap()
    }

    fn ip(text: &str) -> Address {
        Address::Ip(text.parse::<SocketAddr>().unwrap())
    }

    fn downstream(local: Address, remote: Address, tlvs: &[(u8, &[u8])]) -> ConnectionInfo {
        let mut info = ConnectionInfo::new(1, Instant::now(), local, remote);
        info.proxy_protocol_tlvs =
            tlvs.iter().map(|(kind, value)| Tlv { kind: *kind, value: (*value).into() }).collect();
        info
    }

    #[test]
    fn version_1_states_the_downstream_or_the_connection_itself() {
        let v1 = compile(0, None, &[]);
        let (own, peer) = (ip("10.0.0.1:5"), ip("10.0.0.2:6"));
        let text = |info: Option<&ConnectionInfo>, local: Option<&Address>| {
            String::from_utf8(v1.header(info, (local, &peer))).unwrap()
        };
        let four = downstream(ip("1.2.3.4:80"), ip("9.8.7.6:1111"), &[]);
        assert_eq!(text(Some(&four), Some(&own)), "PROXY TCP4 9.8.7.6 1.2.3.4 1111 80\r\n");
        let six = downstream(ip("[::2]:80"), ip("[::1]:1111"), &[]);
        assert_eq!(text(Some(&six), Some(&own)), "PROXY TCP6 ::1 ::2 1111 80\r\n");
        assert_eq!(text(None, Some(&own)), "PROXY TCP4 10.0.0.1 10.0.0.2 5 6\r\n");
        assert_eq!(text(None, None), "PROXY UNKNOWN\r\n");
        let pipe = downstream(Address::Pipe("/x".into()), Address::Pipe("".into()), &[]);
        assert_eq!(text(Some(&pipe), Some(&own)), "PROXY UNKNOWN\r\n");
        let mixed = downstream(ip("[::ffff:1.2.3.4]:80"), ip("9.8.7.6:1111"), &[]);
        assert_eq!(text(Some(&mixed), Some(&own)), "PROXY UNKNOWN\r\n");
    }

    #[test]
    fn version_2_carries_tlvs() {
        let info = downstream(ip("1.2.3.4:80"), ip("9.8.7.6:4369"), &[(0xE0, b"hi"), (0xE1, b"no")]);
        let tlvs = |config: &ProxyProtocol| {
            let header = config.header(Some(&info), (None, &ip("10.0.0.2:6")));
            assert_eq!(header[12..14], [0x21, 0x11]);
            assert_eq!(usize::from(u16::from_be_bytes([header[14], header[15]])), header.len() - 16);
            assert_eq!(header[16..28], [9, 8, 7, 6, 1, 2, 3, 4, 0x11, 0x11, 0, 80]);
            header[28..].to_vec()
        };
        assert_eq!(tlvs(&compile(1, None, &[])), b"");
        assert_eq!(tlvs(&compile(1, Some((ALL, &[])), &[])), b"\xE0\0\x02hi\xE1\0\x02no");
        assert_eq!(tlvs(&compile(1, Some((INCLUDE, &[0xE1])), &[])), b"\xE1\0\x02no");
        let added: [(u32, &[u8]); 3] = [(0xE1, b"mine"), (0xF0, b"x"), (0xE1, b"again")];
        assert_eq!(
            tlvs(&compile(1, Some((ALL, &[])), &added)),
            b"\xE1\0\x04mine\xF0\0\x01x\xE1\0\x05again\xE0\0\x02hi"
        );
        let long = vec![0; 65_530];
        let config = compile(1, None, &[(1, &long)]);
        assert_eq!(tlvs(&config), b"");
        assert_eq!(config.stats.v2_tlvs_exceed_max_length().value(), 1);
    }

    #[test]
    fn version_2_without_addresses_is_local() {
        let v2 = compile(1, None, &[]);
        for info in [None, Some(downstream(ip("1.2.3.4:80"), ip("[::1]:1"), &[]))] {
            let header = v2.header(info.as_ref(), (Some(&ip("10.0.0.1:5")), &ip("10.0.0.2:6")));
            assert_eq!(header, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
        }
    }
}
