//! Who the client is, and which forwarded headers are believed: Envoy's `mutateRequestHeaders`, as a pure function.

use std::net::IpAddr;

use waystation_filter_api::address::Address;
use waystation_http::{HeaderName, Headers, Known, KnownSet};
use waystation_matchers::CidrList;

use super::end::StreamEnd;

/// What the connection manager's configuration says about trust.
#[derive(Debug, Default)]
pub(crate) struct Trust {
    /// `use_remote_address`.
    pub(crate) use_remote_address: bool,
    /// `xff_num_trusted_hops`.
    pub(crate) trusted_hops: u32,
    /// `skip_xff_append`.
    pub(crate) skip_xff_append: bool,
    /// `append_x_forwarded_port`.
    pub(crate) append_port: bool,
    /// `original_ip_detection_extensions`, or the one that Envoy uses when none is configured.
    pub(crate) detection: Vec<Detection>,
    /// `internal_address_config`.
    pub(crate) internal: Internal,
    /// `add_user_agent`: the service cluster and node.
    pub(crate) user_agent: Option<(Box<str>, Box<str>)>,
    /// `via`.
    pub(crate) via: Box<str>,
    /// `forward_proto_config`: what ports that a PROXY header states stand for.
    pub(crate) proto_ports: Option<Box<ProtoPorts>>,
}

/// `ForwardProtoConfig`.
#[derive(Debug)]
pub(crate) struct ProtoPorts {
    pub(crate) https: Box<[u32]>,
    pub(crate) http: Box<[u32]>,
}

/// A way to find the client's address that is not the connection's.
#[derive(Debug)]
pub(crate) enum Detection {
    /// `envoy.extensions.http.original_ip_detection.xff`.
    Xff { hops: u32, trusted: Option<CidrList>, skip_append: bool },
    /// `envoy.extensions.http.original_ip_detection.custom_header`.
    Header { name: HeaderName, trusted: bool, reject: Option<u16> },
}

/// `internal_address_config`.
#[derive(Debug, Default)]
pub(crate) struct Internal {
    pub(crate) unix_sockets: bool,
    /// `None` is Envoy's default since 1.33: no address is internal until the configuration says so.
    pub(crate) ranges: Option<CidrList>,
}

/// The connection as these rules see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer<'a> {
    pub(crate) remote: &'a Address,
    pub(crate) local: &'a Address,
    /// The local address is not the socket's: a listener filter has restored it.
    pub(crate) local_restored: bool,
    /// Written in place of a loopback peer: the node's own address.
    pub(crate) node_ip: IpAddr,
    pub(crate) tls: bool,
}

/// What came of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Verdict {
    /// The client's address, when it is not the connection's.
    pub(crate) remote: Option<Address>,
    /// Whether the request comes from inside.
    pub(crate) internal: bool,
    /// Whether this is the first trusted hop of an external request.
    pub(crate) edge: bool,
}

/// Headers that only internal requests may bring; Envoy's `cleanInternalHeaders`.
const INTERNAL_ONLY: KnownSet = KnownSet::of(&[
    Known::XEnvoyRetriableStatusCodes,
    Known::XEnvoyRetriableHeaderNames,
    Known::XEnvoyRetryOn,
    Known::XEnvoyRetryGrpcOn,
    Known::XEnvoyMaxRetries,
    Known::XEnvoyUpstreamAltStatName,
    Known::XEnvoyUpstreamRqTimeoutMs,
    Known::XEnvoyUpstreamRqPerTryTimeoutMs,
    Known::XEnvoyUpstreamRqTimeoutAltResponse,
    Known::XEnvoyExpectedRqTimeoutMs,
    Known::XEnvoyForceTrace,
    Known::XEnvoyIpTags,
    Known::XEnvoyOriginalUrl,
    Known::XEnvoyHedgeOnPerTryTimeout,
]);

/// And those that even other hops may not bring to the edge.
const EDGE_ONLY: KnownSet = KnownSet::of(&[
    Known::XEnvoyDecoratorOperation,
    Known::XEnvoyDownstreamServiceCluster,
    Known::XEnvoyDownstreamServiceNode,
    Known::XEnvoyUpstreamStreamDurationMs,
]);

/// Cleans and completes the head of a request, and says where it comes from.
pub(crate) fn apply(trust: &Trust, peer: Peer<'_>, headers: &mut Headers) -> Result<Verdict, StreamEnd> {
    headers.remove(Known::XEnvoyInternal);
    let scheme = if peer.tls { "https" } else { "http" };
    let forwarded = trust.proto_ports.as_ref().and_then(|ports| ports.proto(peer)).unwrap_or(scheme);
    let mut remote = None;
    let mut checkable = false;
    if trust.use_remote_address {
        checkable = !headers.contains(Known::XForwardedFor);
        if trust.trusted_hops > 0 {
            let found =
                headers.get(Known::XForwardedFor).and_then(|xff| last_address(xff, trust.trusted_hops - 1));
            remote = found.map(|(ip, _)| address(ip));
        }
        if !trust.skip_xff_append {
            append_peer(peer, headers);
        }
        if trust.trusted_hops == 0 || !headers.contains(Known::XForwardedProto) {
            headers.set(Known::XForwardedProto, forwarded);
        }
        if trust.append_port && (trust.trusted_hops == 0 || !headers.contains(Known::XForwardedPort)) {
            set_port(peer, headers);
        }
    } else {
        for detection in &trust.detection {
            if let Some((found, trusted)) = detection.detect(peer, headers)? {
                remote = Some(found);
                checkable = trusted;
                break;
            }
        }
        let append = |detection: &Detection| matches!(detection, Detection::Xff { skip_append: false, .. });
        if !trust.skip_xff_append && trust.detection.iter().any(append) {
            append_peer(peer, headers);
        }
        if trust.append_port && !headers.contains(Known::XForwardedPort) {
            set_port(peer, headers);
        }
    }
    if !headers.contains(Known::XForwardedProto) {
        headers.append(Known::XForwardedProto, forwarded);
    }
    // `:scheme` follows `x-forwarded-proto` only where that names a scheme that HTTP has.
    if !headers.contains(Known::Scheme) {
        let forwarded = match headers.get(Known::XForwardedProto) {
            Some(proto) if proto.eq_ignore_ascii_case(b"https") => "https",
            Some(proto) if proto.eq_ignore_ascii_case(b"http") => "http",
            _ => scheme,
        };
        headers.append(Known::Scheme, forwarded);
    }
    // Without XFF, or with one that holds no address, the connection's peer is who is asked about only where
    // `use_remote_address` says that peers are clients.
    let internal = checkable && {
        let candidate = remote.as_ref().or(trust.use_remote_address.then_some(peer.remote));
        candidate.is_some_and(|candidate| trust.internal.contains(candidate))
    };
    let edge = !internal && trust.use_remote_address;
    if internal {
        headers.append(Known::XEnvoyInternal, "true");
    } else {
        if edge {
            headers.remove_all(&EDGE_ONLY);
        }
        headers.remove_all(&INTERNAL_ONLY);
    }
    if let Some((cluster, node)) = &trust.user_agent {
        headers.set(Known::XEnvoyDownstreamServiceCluster, cluster.as_bytes());
        if headers.get(Known::UserAgent).is_none_or(<[u8]>::is_empty) {
            headers.set(Known::UserAgent, cluster.as_bytes());
        }
        if !node.is_empty() {
            headers.set(Known::XEnvoyDownstreamServiceNode, node.as_bytes());
        }
    }
    if !trust.via.is_empty() {
        headers.append_joined(Known::Via, ", ", trust.via.as_bytes());
    }
    if edge && let Address::Ip(client) = remote.as_ref().unwrap_or(peer.remote) {
        headers.set(Known::XEnvoyExternalAddress, client.ip().to_string());
    }
    Ok(Verdict { remote, internal, edge })
}

impl ProtoPorts {
    fn proto(&self, peer: Peer<'_>) -> Option<&'static str> {
        let Address::Ip(local) = peer.local else { return None };
        let port = u32::from(local.port());
        match () {
            () if !peer.local_restored => None,
            () if self.https.contains(&port) => Some("https"),
            () if self.http.contains(&port) => Some("http"),
            () => None,
        }
    }
}

impl Detection {
    fn detect(&self, peer: Peer<'_>, headers: &Headers) -> Result<Option<(Address, bool)>, StreamEnd> {
        match self {
            Self::Xff { hops, trusted: None, .. } => {
                let found = headers.get(Known::XForwardedFor).and_then(|xff| last_address(xff, *hops));
                Ok(found.map(|(ip, alone)| (address(ip), alone)))
            }
            Self::Xff { trusted: Some(ranges), .. } => {
                let from_trusted = matches!(peer.remote, Address::Ip(ip) if ranges.contains(ip.ip()));
                let xff = headers.get(Known::XForwardedFor).filter(|_| from_trusted);
                let found = xff.and_then(|xff| {
                    let mut seen = None;
                    for part in xff.rsplit(|byte| *byte == b',') {
                        let ip = parse_ip(part)?;
                        seen = Some(ip);
                        if !ranges.contains(ip) {
                            break;
                        }
                    }
                    seen
                });
                Ok(found.map(|ip| (address(ip), false)))
            }
            Self::Header { name, trusted, reject } => match headers.get(name.as_name()).and_then(parse_ip) {
                Some(ip) => Ok(Some((address(ip), *trusted))),
                None => match reject {
                    Some(status) => Err(StreamEnd::IpDetectionFailed(*status)),
                    None => Ok(None),
                },
            },
        }
    }
}

impl Internal {
    fn contains(&self, address: &Address) -> bool {
        match address {
            Address::Pipe(_) => self.unix_sockets,
            Address::Internal { .. } => false,
            Address::Ip(address) => match &self.ranges {
                Some(ranges) => ranges.contains(address.ip()),
                None => false,
            },
        }
    }
}

fn append_peer(peer: Peer<'_>, headers: &mut Headers) {
    if let Address::Ip(remote) = peer.remote {
        let ip = remote.ip();
        let shown = if ip.is_loopback() { peer.node_ip } else { ip };
        headers.append_joined(Known::XForwardedFor, ",", shown.to_string());
    }
}

fn set_port(peer: Peer<'_>, headers: &mut Headers) {
    if let Address::Ip(local) = peer.local {
        headers.set_number(Known::XForwardedPort, u64::from(local.port()));
    }
}

/// The address `skip` places left of the last one, and whether it is the only one (Envoy's `getLastAddressFromXFF`).
fn last_address(xff: &[u8], skip: u32) -> Option<(IpAddr, bool)> {
    let mut parts = xff.rsplit(|byte| *byte == b',');
    let mut part = parts.next()?;
    for _ in 0..skip {
        part = parts.next()?;
    }
    let alone = skip == 0 && parts.next().is_none();
    Some((parse_ip(part)?, alone))
}

fn parse_ip(text: &[u8]) -> Option<IpAddr> {
    str::from_utf8(text.trim_ascii()).ok()?.parse().ok()
}

fn address(ip: IpAddr) -> Address {
    Address::Ip(std::net::SocketAddr::new(ip, 0))
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::CidrRange;
    use envoy_types::pb::google::protobuf::UInt32Value;

    use super::{Detection, Internal, Peer, Trust, apply};
    use std::net::{IpAddr, Ipv4Addr};
    use waystation_filter_api::address::Address;
    use waystation_http::{HeaderName, Headers, Known};
    use waystation_matchers::CidrList;

    const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    fn ip(text: &str) -> Address {
        Address::Ip(format!("{text}:1000").parse().unwrap())
    }

    fn trust(use_remote_address: bool, hops: u32) -> Trust {
        Trust {
            use_remote_address,
            trusted_hops: hops,
            detection: vec![Detection::Xff { hops, trusted: None, skip_append: true }],
            internal: private(),
            ..Trust::default()
        }
    }

    /// RFC 1918.
    fn private() -> Internal {
        let ranges = [("10.0.0.0", 8), ("172.16.0.0", 12), ("192.168.0.0", 16)].map(|(prefix, length)| {
            CidrRange { address_prefix: prefix.into(), prefix_len: Some(UInt32Value { value: length }) }
        });
        Internal { unix_sockets: false, ranges: Some(CidrList::compile(&ranges, "cidr_ranges").unwrap()) }
    }

    struct Seen {
        trusted: String,
        xff: Option<String>,
        external: Option<String>,
        internal: bool,
    }

    fn run(trust: &Trust, peer: &str, xff: Option<&str>) -> Seen {
        let mut headers: Headers = xff.into_iter().map(|xff| (Known::XForwardedFor, xff)).collect();
        let remote = ip(peer);
        let peer = Peer {
            remote: &remote,
            local: &ip("10.0.0.9"),
            local_restored: false,
            node_ip: NODE,
            tls: false,
        };
        let verdict = apply(trust, peer, &mut headers).unwrap();
        let text = |name| headers.get_str(name).map(str::to_owned);
        assert_eq!(verdict.internal, text(Known::XEnvoyInternal).as_deref() == Some("true"));
        Seen {
            trusted: verdict.remote.unwrap_or(remote).ip().unwrap().ip().to_string(),
            xff: text(Known::XForwardedFor),
            external: text(Known::XEnvoyExternalAddress),
            internal: verdict.internal,
        }
    }

    /// The six worked examples of Envoy's documentation on `x-forwarded-for`.
    #[test]
    fn documented_examples() {
        // (use_remote_address, hops, peer, XFF in) -> (trusted, XFF out, external address, internal)
        type Row = (
            (bool, u32, &'static str, Option<&'static str>),
            (&'static str, Option<&'static str>, Option<&'static str>, bool),
        );
        let rows: [Row; 6] = [
            // 1: edge proxy without a trusted proxy in front.
            (
                (true, 0, "192.0.2.5", Some("203.0.113.128, 203.0.113.10, 203.0.113.1")),
                (
                    "192.0.2.5",
                    Some("203.0.113.128, 203.0.113.10, 203.0.113.1,192.0.2.5"),
                    Some("192.0.2.5"),
                    false,
                ),
            ),
            // 2: internal proxy receiving from the edge proxy of example 1.
            (
                (false, 0, "10.11.12.13", Some("203.0.113.128, 203.0.113.10, 203.0.113.1, 192.0.2.5")),
                ("192.0.2.5", Some("203.0.113.128, 203.0.113.10, 203.0.113.1, 192.0.2.5"), None, false),
            ),
            // 3: edge proxy behind two trusted proxies.
            (
                (true, 2, "192.0.2.5", Some("203.0.113.128, 203.0.113.10, 203.0.113.1")),
                (
                    "203.0.113.10",
                    Some("203.0.113.128, 203.0.113.10, 203.0.113.1,192.0.2.5"),
                    Some("203.0.113.10"),
                    false,
                ),
            ),
            // 4: internal proxy receiving from the edge proxy of example 3.
            (
                (false, 2, "10.11.12.13", Some("203.0.113.128, 203.0.113.10, 203.0.113.1, 192.0.2.5")),
                ("203.0.113.10", Some("203.0.113.128, 203.0.113.10, 203.0.113.1, 192.0.2.5"), None, false),
            ),
            // 5: internal proxy called by an internal client.
            ((false, 0, "10.20.30.40", None), ("10.20.30.40", None, None, false)),
            // 6: the internal proxy of example 5 behind another one.
            (
                (false, 0, "10.20.30.50", Some("10.20.30.40")),
                ("10.20.30.40", Some("10.20.30.40"), None, true),
            ),
        ];
        for ((remote, hops, peer, xff), (trusted, xff_out, external, internal)) in rows {
            let seen = run(&trust(remote, hops), peer, xff);
            let found = (&*seen.trusted, seen.xff.as_deref(), seen.external.as_deref(), seen.internal);
            assert_eq!(found, (trusted, xff_out, external, internal), "{remote} {hops} {peer} {xff:?}");
        }
    }

    #[test]
    fn nobody_is_internal_by_default() {
        let trust = Trust { use_remote_address: true, ..Trust::default() };
        assert!(!run(&trust, "10.1.2.3", None).internal);
    }

    #[test]
    fn private_peer_without_xff_is_internal_at_the_edge_and_loopback_is_not() {
        assert!(run(&trust(true, 0), "10.1.2.3", None).internal);
        let seen = run(&trust(true, 0), "127.0.0.1", Some("1.2.3.4"));
        assert_eq!((seen.internal, seen.xff.as_deref()), (false, Some("1.2.3.4,192.0.2.2")));
        assert_eq!(seen.external.as_deref(), Some("127.0.0.1"));
    }

    #[test]
    fn external_requests_lose_internal_headers() {
        let mut headers: Headers = [
            ("x-envoy-max-retries", "3"),
            ("x-envoy-decorator-operation", "x"),
            ("x-envoy-original-path", "/p"),
        ]
        .into_iter()
        .collect();
        let remote = ip("1.2.3.4");
        let peer = Peer { remote: &remote, local: &remote, local_restored: false, node_ip: NODE, tls: true };
        apply(&trust(false, 0), peer, &mut headers).unwrap();
        assert!(!headers.contains(Known::XEnvoyMaxRetries));
        assert!(headers.contains(Known::XEnvoyDecoratorOperation), "only the edge removes it");
        assert!(headers.contains(Known::XEnvoyOriginalPath));
        assert_eq!(headers.get_str(Known::XForwardedProto), Some("https"));
        assert_eq!(headers.get_str(Known::Scheme), Some("https"));
        apply(&trust(true, 0), peer, &mut headers).unwrap();
        assert!(!headers.contains(Known::XEnvoyDecoratorOperation));
    }

    #[test]
    fn custom_header_detects_or_rejects() {
        let name = HeaderName::parse("x-client").unwrap();
        let trust = Trust {
            detection: vec![Detection::Header { name, trusted: true, reject: Some(401) }],
            internal: private(),
            ..Trust::default()
        };
        let remote = ip("1.2.3.4");
        let peer = Peer { remote: &remote, local: &remote, local_restored: false, node_ip: NODE, tls: false };
        let mut headers: Headers = [("x-client", "10.0.0.1")].into_iter().collect();
        assert!(apply(&trust, peer, &mut headers).unwrap().internal);
        assert!(apply(&trust, peer, &mut Headers::new()).is_err());
    }
}
