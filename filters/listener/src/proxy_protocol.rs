//! `envoy.filters.listener.proxy_protocol`: the PROXY protocol, versions 1 and 2
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use envoy_types::pb::envoy::config::core::v3::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as pb;
use waystation_filter_api::address::Address;
use waystation_filter_api::connection::{ConnectionInfo, Tlv};
use waystation_filter_api::value::Value;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Scope, stats_group};

use crate::Verdict;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const V1: &[u8] = b"PROXY ";

/// The longest version 1 header, CRLF included.
const V1_LIMIT: usize = 107;

/// Signature, command, family, length.
const V2_FIXED: usize = 16;

stats_group! {
    /// `proxy_proto.`, or `proxy_proto.<stat_prefix>.`
    pub(crate) struct Stats {
        counters {
            not_found_allowed,
            not_found_disallowed,
            v1_disallowed = "versions.v1.disallowed",
            v1_error = "versions.v1.error",
            v1_found = "versions.v1.found",
            v2_disallowed = "versions.v2.disallowed",
            v2_error = "versions.v2.error",
            v2_found = "versions.v2.found",
        }
        gauges {}
        histograms {}
    }
}

#[derive(Debug)]
pub(crate) struct ProxyProtocol {
    rules: Vec<Rule>,
    /// The TLVs that upstream may get: nothing, all (`Some(None)`), or some types.
    passed: Option<Option<HashSet<u8>>>,
    optional: bool,
    allow_v1: bool,
    allow_v2: bool,
    stats: Stats,
}

/// Which TLV becomes which dynamic metadata.
#[derive(Debug)]
struct Rule {
    tlv: u8,
    namespace: Box<str>,
    key: Box<str>,
}

/// A parsed header.
#[derive(Debug, Default, Eq, PartialEq)]
struct Header<'a> {
    length: usize,
    /// Source and destination; `None` for `LOCAL`, `UNKNOWN` and families other than TCP over IP.
    addresses: Option<(SocketAddr, SocketAddr)>,
    tlvs: &'a [u8],
}

enum Parse<'a> {
    Header(Header<'a>),
    NeedMore,
    Malformed,
}

impl ProxyProtocol {
    pub(crate) fn compile(proto: &pb::ProxyProtocol, scope: &Scope) -> Result<Self, ConfigError> {
        if proto.tlv_location() != pb::proxy_protocol::TlvLocation::DynamicMetadata {
            return Err(ConfigError::field("tlv_location", "only DYNAMIC_METADATA is supported"));
        }
        let mut rules = Vec::with_capacity(proto.rules.len());
        for (i, rule) in proto.rules.iter().enumerate() {
            rules.push(Rule::compile(rule).at(|| format!("rules[{i}]"))?);
        }
        let passed = proto.pass_through_tlvs.as_ref().map(|tlvs| match tlvs.match_type() {
            PassTlVsMatchType::IncludeAll => None,
            PassTlVsMatchType::Include => {
                Some(tlvs.tlv_type.iter().filter_map(|kind| (*kind).try_into().ok()).collect())
            }
        });
        // `ProxyProtocolConfig.Version`: V1 is 0, V2 is 1.
        let allows = |version: i32| !proto.disallowed_versions.contains(&version);
        let scope = scope.scope("proxy_proto");
        let scope = match proto.stat_prefix.as_str() {
            "" => scope,
            prefix => scope.tag("envoy.proxy_protocol_prefix", prefix),
        };
        Ok(Self {
            rules,
            passed,
            optional: proto.allow_requests_without_proxy_protocol,
            allow_v1: allows(0),
            allow_v2: allows(1),
            stats: scope.group(),
        })
    }

    pub(crate) fn inspect(&self, buffer: &[u8], end: bool, info: &mut ConnectionInfo) -> Verdict {
        let is_v2 = looks_like(SIGNATURE, buffer);
        let is_v1 = looks_like(V1, buffer);
        if buffer.is_empty() || (!is_v1 && !is_v2) {
            return match (buffer.is_empty() && !end, self.optional) {
                (true, _) => Verdict::NeedMore,
                (false, true) => {
                    self.stats.not_found_allowed().inc();
                    Verdict::PASS
                }
                (false, false) => {
                    self.stats.not_found_disallowed().inc();
                    Verdict::Reject("no PROXY protocol header")
                }
            };
        }
        // "\r" may begin a version 2 signature; with the first distinct byte it is clear which one it is.
        let (allowed, disallowed, error, found) = if is_v2 {
            (self.allow_v2, self.stats.v2_disallowed(), self.stats.v2_error(), self.stats.v2_found())
        } else {
            (self.allow_v1, self.stats.v1_disallowed(), self.stats.v1_error(), self.stats.v1_found())
        };
        match if is_v2 { parse_v2(buffer) } else { parse_v1(buffer) } {
            Parse::NeedMore if !end => Verdict::NeedMore,
            Parse::NeedMore | Parse::Malformed => {
                error.inc();
                Verdict::Reject("malformed PROXY protocol header")
            }
            Parse::Header(_) if !allowed => {
                disallowed.inc();
                Verdict::Reject("this version of the PROXY protocol is not allowed")
            }
            Parse::Header(header) => {
                found.inc();
                self.apply(&header, info);
                Verdict::Done { consumed: header.length }
            }
        }
    }

    fn apply(&self, header: &Header<'_>, info: &mut ConnectionInfo) {
        if let Some((source, destination)) = header.addresses {
            info.remote_address = Address::Ip(source);
            let destination = Address::Ip(destination);
            info.local_address_restored |= destination != info.local_address;
            info.local_address = destination;
        }
        let mut rest = header.tlvs;
        while let [kind, high, low, tail @ ..] = rest {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            let Some(value) = tail.get(..length) else {
                return;
            };
            rest = &tail[length..];
            if let Some(wanted) = &self.passed
                && wanted.as_ref().is_none_or(|kinds| kinds.contains(kind))
            {
                info.proxy_protocol_tlvs.push(Tlv { kind: *kind, value: value.into() });
            }
            for rule in self.rules.iter().filter(|rule| rule.tlv == *kind) {
                // Envoy sanitises what is not UTF-8; the replacement character says where.
                let text = String::from_utf8_lossy(value);
                let value = Value::String(text.as_ref().into());
                info.metadata.get_mut().set(&rule.namespace, &rule.key, value);
            }
        }
    }
}

impl Rule {
    fn compile(proto: &pb::proxy_protocol::Rule) -> Result<Self, ConfigError> {
        let target = proto
            .on_tlv_present
            .as_ref()
            .ok_or_else(|| ConfigError::field("on_tlv_present", "is required"))?;
        if target.value_string_encoding != 0 {
            let reason = "only UNDEFINED (the value as text) is supported";
            return Err(ConfigError::field("on_tlv_present.value_string_encoding", reason));
        }
        let namespace = match target.metadata_namespace.as_str() {
            "" => "envoy.filters.listener.proxy_protocol",
            namespace => namespace,
        };
        Ok(Self {
            tlv: u8::try_from(proto.tlv_type)
                .map_err(|_| ConfigError::field("tlv_type", "must be below 256"))?,
            namespace: namespace.into(),
            key: target.key.as_str().into(),
        })
    }
}

/// Whether `buffer` begins with `start`, or may still come to.
fn looks_like(start: &[u8], buffer: &[u8]) -> bool {
    buffer.starts_with(start) || start.starts_with(buffer)
}

fn parse_v1(buffer: &[u8]) -> Parse<'_> {
    let window = &buffer[..buffer.len().min(V1_LIMIT)];
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        return if buffer.len() < V1_LIMIT { Parse::NeedMore } else { Parse::Malformed };
    };
    let Ok(line) = std::str::from_utf8(&window[V1.len()..end]) else {
        return Parse::Malformed;
    };
    let length = end + 2;
    let words: Vec<&str> = line.split(' ').collect();
    let addresses = match words[..] {
        ["UNKNOWN", ..] => return Parse::Header(Header { length, ..Header::default() }),
        [family @ ("TCP4" | "TCP6"), source, destination, source_port, destination_port] => {
            let parse = |ip: &str, port: &str| {
                let ip: IpAddr = ip.parse().ok()?;
                // "0" alone is a port; leading zeros and signs are not (specification section 2.1).
                let canonical = port == "0" || !(port.starts_with('0') || port.starts_with('+'));
                let port: u16 = port.parse().ok().filter(|_| canonical)?;
                (ip.is_ipv4() == (family == "TCP4")).then_some(SocketAddr::new(ip, port))
            };
            parse(source, source_port).zip(parse(destination, destination_port))
        }
        _ => None,
    };
    match addresses {
        Some(addresses) => Parse::Header(Header { length, addresses: Some(addresses), tlvs: &[] }),
        None => Parse::Malformed,
    }
}

fn parse_v2(buffer: &[u8]) -> Parse<'_> {
    let Some(fixed) = buffer.first_chunk::<V2_FIXED>() else {
        return Parse::NeedMore;
    };
    let (version, command) = (fixed[12] >> 4, fixed[12] & 15);
    let body_length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if version != 2 || command > 1 {
        return Parse::Malformed;
    }
    let length = V2_FIXED + body_length;
    let Some(body) = buffer.get(V2_FIXED..length) else {
        return Parse::NeedMore;
    };
    if command == 0 {
        // LOCAL: the proxy itself, a health check. The addresses, if any, mean nothing.
        return Parse::Header(Header { length, ..Header::default() });
    }
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    match fixed[13] {
        // TCP over IPv4.
        0x11 if body.len() >= 12 => {
            let ip =
                |at: usize| IpAddr::V4(Ipv4Addr::new(body[at], body[at + 1], body[at + 2], body[at + 3]));
            let addresses = (SocketAddr::new(ip(0), port(8)), SocketAddr::new(ip(4), port(10)));
            Parse::Header(Header { length, addresses: Some(addresses), tlvs: &body[12..] })
        }
        // TCP over IPv6.
        0x21 if body.len() >= 36 => {
            let ip = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&body[at..at + 16]);
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            let addresses = (SocketAddr::new(ip(0), port(32)), SocketAddr::new(ip(16), port(34)));
            Parse::Header(Header { length, addresses: Some(addresses), tlvs: &body[36..] })
        }
        // UNSPEC: accepted, and the addresses of the socket stay.
        0x00 => Parse::Header(Header { length, ..Header::default() }),
        _ => Parse::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use super::{ProxyProtocol, SIGNATURE, Tlv};
    use crate::Verdict;
    use envoy_types::pb::envoy::config::core::v3 as core;
    use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as pb;
    use std::time::Instant;
    use waystation_filter_api::connection::ConnectionInfo;
    use waystation_filter_api::value::Value;
    use waystation_stats::Store;

    fn info() -> ConnectionInfo {
        let address: std::net::SocketAddr = "127.0.0.1:1".parse().unwrap();
        ConnectionInfo::new(1, Instant::now(), address.into(), address.into())
    }

    fn filter(proto: pb::ProxyProtocol) -> ProxyProtocol {
        ProxyProtocol::compile(&proto, &Store::default().root()).unwrap()
    }

    #[test]
    fn version_1_sets_the_addresses() {
        let filter = filter(pb::ProxyProtocol::default());
        let header = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n";
        let bytes = [&header[..], b"GET /"].concat();
        for cut in 1..header.len() {
            assert_eq!(filter.inspect(&bytes[..cut], false, &mut info()), Verdict::NeedMore, "{cut}");
        }
        let mut info = info();
        assert_eq!(filter.inspect(&bytes, false, &mut info), Verdict::Done { consumed: header.len() });
        assert_eq!(info.remote_address.to_string(), "192.0.2.1:5000");
        assert_eq!(info.local_address.to_string(), "198.51.100.2:443");
        assert_eq!(info.direct_remote_address.to_string(), "127.0.0.1:1");
        assert!(info.local_address_restored);
    }

    #[test]
    fn malformed_and_missing_headers_close() {
        let strict = filter(pb::ProxyProtocol::default());
        for bytes in [
            &b"PROXY TCP4 192.0.2.1 198.51.100.2 05000 443\r\n"[..],
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
            b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n",
            &[b'P'; 2],
        ] {
            let verdict = strict.inspect(bytes, false, &mut info());
            assert!(matches!(verdict, Verdict::Reject(_)), "{}: {verdict:?}", bytes.escape_ascii());
        }
        let endless = [&b"PROXY "[..], &[b'x'; 200]].concat();
        assert!(matches!(strict.inspect(&endless, false, &mut info()), Verdict::Reject(_)));
        assert_eq!(strict.inspect(b"PROXY UNKNOWN\r\n", false, &mut info()), Verdict::Done { consumed: 15 });
        let lenient = filter(pb::ProxyProtocol {
            allow_requests_without_proxy_protocol: true,
            ..pb::ProxyProtocol::default()
        });
        assert_eq!(lenient.inspect(b"GET / HTTP/1.1\r\n", false, &mut info()), Verdict::PASS);
    }

    #[test]
    fn version_2_with_tlv_rules_and_bans() {
        let rule = pb::proxy_protocol::Rule {
            tlv_type: 0xE0,
            on_tlv_present: Some(pb::proxy_protocol::KeyValuePair { key: "k".into(), ..Default::default() }),
        };
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([0x21, 0x11, 0, 17]);
        bytes.extend([10, 0, 0, 1, 10, 0, 0, 2, 0x13, 0x88, 0, 80]);
        bytes.extend([0xE0, 0, 2, b'h', b'i']);
        let open = filter(pb::ProxyProtocol { rules: vec![rule], ..Default::default() });
        let mut info1 = info();
        assert_eq!(open.inspect(&bytes, false, &mut info1), Verdict::Done { consumed: bytes.len() });
        assert_eq!(info1.remote_address.to_string(), "10.0.0.1:5000");
        let namespace = "envoy.filters.listener.proxy_protocol";
        assert_eq!(info1.metadata.borrow().at(namespace, &["k"]), Some(&Value::String("hi".into())));
        let banned = filter(pb::ProxyProtocol { disallowed_versions: vec![1], ..Default::default() });
        assert!(matches!(banned.inspect(&bytes, false, &mut info()), Verdict::Reject(_)));
        assert!(info1.proxy_protocol_tlvs.is_empty());
        for (match_type, kinds, passed) in [(0, vec![], 1), (1, vec![0xE0], 1), (1, vec![0xE1], 0)] {
            let passing = pb::ProxyProtocol {
                pass_through_tlvs: Some(core::ProxyProtocolPassThroughTlVs { match_type, tlv_type: kinds }),
                ..Default::default()
            };
            let mut info = info();
            assert_eq!(
                filter(passing).inspect(&bytes, false, &mut info),
                Verdict::Done { consumed: bytes.len() }
            );
            let wanted = Tlv { kind: 0xE0, value: b"hi"[..].into() };
            assert_eq!(info.proxy_protocol_tlvs, vec![wanted; passed]);
        }
        let mut local = bytes.clone();
        local[12] = 0x20;
        let mut info2 = info();
        assert_eq!(open.inspect(&local, false, &mut info2), Verdict::Done { consumed: bytes.len() });
        assert_eq!(info2.remote_address.to_string(), "127.0.0.1:1");
    }
}
