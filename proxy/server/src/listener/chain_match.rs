//! Which filter chain takes a connection.
//!
//! Envoy matches the criteria one after the other in a fixed order. At each of them the most specific value that
//! matches decides, and there is no way back: a connection that finds no chain further down has none. The criteria are
//! compiled to a tree with one level for each, so that a lookup costs a few probes however many chains there are.

use std::collections::HashMap;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use ipnet::IpNet;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_schema::{At as _, ConfigError};

/// What is known of a connection when its chain is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Destination IP and port, after `original_dst` or PROXY protocol; `None` for pipes.
    pub destination: Option<(IpAddr, u16)>,
    /// SNI, lower case; empty when there is none.
    pub server_name: &'a str,
    /// `tls` or `raw_buffer`.
    pub transport_protocol: &'a str,
    /// ALPN protocols offered, in order.
    pub application_protocols: &'a [Box<[u8]>],
    /// The peer of the socket itself.
    pub direct_source: Option<IpAddr>,
    /// The peer, after PROXY protocol.
    pub source: Option<(IpAddr, u16)>,
}

impl<'a> Facts<'a> {
    /// What is known of `info`.
    pub fn of(info: &'a ConnectionInfo) -> Self {
        Self {
            destination: info.local_address.ip().map(|address| (address.ip(), address.port())),
            server_name: info.requested_server_name.as_deref().unwrap_or_default(),
            transport_protocol: info.transport_protocol,
            application_protocols: &info.application_protocols,
            direct_source: info.direct_remote_address.ip().map(|address| address.ip()),
            source: info.remote_address.ip().map(|address| (address.ip(), address.port())),
        }
    }

    /// `SAME_IP_OR_LOOPBACK`: the connection comes from this host.
    fn is_same_ip_or_loopback(&self) -> bool {
        match (self.source, self.destination) {
            (Some((source, _)), Some((destination, _))) => source.is_loopback() || source == destination,
            // Pipes are local by nature.
            _ => true,
        }
    }
}

/// The compiled `filter_chain_match` of all chains of a listener.
#[derive(Debug, Default)]
pub struct ChainTable {
    root: Option<Node>,
}

/// One chain's criteria.
#[derive(Debug, Default)]
struct Criteria {
    destination_port: Option<u16>,
    destination_ips: Vec<IpNet>,
    server_names: Vec<Box<str>>,
    transport_protocol: Option<Box<str>>,
    application_protocols: Vec<Box<[u8]>>,
    direct_source_ips: Vec<IpNet>,
    source_type: SourceType,
    source_ips: Vec<IpNet>,
    source_ports: Vec<u16>,
}

#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
enum SourceType {
    #[default]
    Any,
    SameIpOrLoopback,
    External,
}

/// The criteria in the order of Envoy's documentation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Level {
    DestinationPort,
    DestinationIp,
    ServerName,
    TransportProtocol,
    ApplicationProtocol,
    DirectSourceIp,
    SourceType,
    SourceIp,
    SourcePort,
}

const LEVELS: [Level; 9] = [
    Level::DestinationPort,
    Level::DestinationIp,
    Level::ServerName,
    Level::TransportProtocol,
    Level::ApplicationProtocol,
    Level::DirectSourceIp,
    Level::SourceType,
    Level::SourceIp,
    Level::SourcePort,
];

#[derive(Debug)]
enum Node {
    Chain(usize),
    Port(Branches<u16>),
    Ip(Vec<(IpNet, Node)>, Option<Box<Node>>),
    Name { exact: Branches<Box<str>>, suffix: HashMap<Box<str>, Node> },
    Bytes(Branches<Box<[u8]>>),
    Source(Branches<SourceType>),
}

#[derive(Debug)]
struct Branches<K> {
    keyed: HashMap<K, Node>,
    any: Option<Box<Node>>,
}

impl ChainTable {
    /// Compiles the criteria of `chains`; the result of a lookup is an index in it.
    pub fn compile(chains: &[pb::FilterChain]) -> Result<Self, ConfigError> {
        let mut criteria = Vec::with_capacity(chains.len());
        for (i, chain) in chains.iter().enumerate() {
            let matcher = chain.filter_chain_match.clone().unwrap_or_default();
            let compiled =
                Criteria::compile(matcher).at(|| "filter_chain_match").at(|| segment(chains, i))?;
            criteria.push(compiled);
        }
        if criteria.is_empty() {
            return Ok(Self::default());
        }
        let all = (0..criteria.len()).collect();
        build(&LEVELS, &criteria, all)
            .map(|root| Self { root: Some(root) })
            .map_err(|(a, b)| duplicate(chains, a, b))
    }

    /// The index of the chain that takes the connection.
    pub fn find(&self, facts: &Facts<'_>) -> Option<usize> {
        let mut node = self.root.as_ref()?;
        for level in LEVELS {
            node = node.step(level, facts)?;
        }
        match node {
            Node::Chain(index) => Some(*index),
            _ => None,
        }
    }
}

/// `filter_chains[name]`, or the index where a chain has no name.
pub fn segment(chains: &[pb::FilterChain], index: usize) -> String {
    match chains[index].name.as_str() {
        "" => format!("filter_chains[{index}]"),
        name => format!("filter_chains[{name}]"),
    }
}

fn duplicate(chains: &[pb::FilterChain], a: usize, b: usize) -> ConfigError {
    ConfigError::new(format!(
        "filter chain '{}' has the same matching rules defined as '{}'",
        chains[b].name, chains[a].name
    ))
    .at(segment(chains, b))
}

impl Criteria {
    fn compile(proto: pb::FilterChainMatch) -> Result<Self, ConfigError> {
        let pb::FilterChainMatch {
            destination_port,
            prefix_ranges,
            address_suffix,
            suffix_len,
            direct_source_prefix_ranges,
            source_type,
            source_prefix_ranges,
            source_ports,
            server_names,
            transport_protocol,
            application_protocols,
        } = proto;
        // Envoy refuses both as well: they are "not implemented".
        if !address_suffix.is_empty() {
            return Err(ConfigError::field("address_suffix", "not implemented, in Envoy neither"));
        }
        if suffix_len.is_some() {
            return Err(ConfigError::field("suffix_len", "not implemented, in Envoy neither"));
        }
        let destination_port = match destination_port {
            Some(port) => Some(port_of(port.value).at(|| "destination_port")?),
            None => None,
        };
        let mut names = Vec::with_capacity(server_names.len());
        for (i, name) in server_names.into_iter().enumerate() {
            if name.contains('*') && (!name.starts_with("*.") || name[2..].contains('*')) {
                let reason = format!("partial wildcards are not supported in \"server_names\": {name}");
                return Err(ConfigError::field(format!("server_names[{i}]"), reason));
            }
            names.push(name.to_ascii_lowercase().into_boxed_str());
        }
        Ok(Self {
            destination_port,
            destination_ips: nets(&prefix_ranges).at(|| "prefix_ranges")?,
            server_names: names,
            transport_protocol: Some(transport_protocol)
                .filter(|protocol| !protocol.is_empty())
                .map(String::into_boxed_str),
            application_protocols: application_protocols
                .into_iter()
                .map(|protocol| protocol.into_bytes().into_boxed_slice())
                .collect(),
            direct_source_ips: nets(&direct_source_prefix_ranges).at(|| "direct_source_prefix_ranges")?,
            source_type: match pb::filter_chain_match::ConnectionSourceType::try_from(source_type) {
                Ok(pb::filter_chain_match::ConnectionSourceType::Any) => SourceType::Any,
                Ok(pb::filter_chain_match::ConnectionSourceType::SameIpOrLoopback) => {
                    SourceType::SameIpOrLoopback
                }
                Ok(pb::filter_chain_match::ConnectionSourceType::External) => SourceType::External,
                Err(_) => return Err(ConfigError::field("source_type", "unknown value")),
            },
            source_ips: nets(&source_prefix_ranges).at(|| "source_prefix_ranges")?,
            source_ports: source_ports
                .into_iter()
                .map(|port| port_of(port).at(|| "source_ports"))
                .collect::<Result<_, _>>()?,
        })
    }
}

fn port_of(port: u32) -> Result<u16, ConfigError> {
    u16::try_from(port).map_err(|_| ConfigError::new(format!("{port} is not a port")))
}

/// Compiles `CidrRange`s; bits behind the prefix are dropped, as Envoy does.
pub fn nets(ranges: &[core::CidrRange]) -> Result<Vec<IpNet>, ConfigError> {
    let net = |(i, range): (usize, &core::CidrRange)| {
        let parse = || {
            let ip: IpAddr = range
                .address_prefix
                .parse()
                .map_err(|_| ConfigError::field("address_prefix", "malformed IP address"))?;
            let len = range.prefix_len.as_ref().map_or(0, |len| len.value);
            let net = u8::try_from(len).ok().and_then(|len| IpNet::new(ip, len).ok());
            net.map(|net| net.trunc())
                .ok_or_else(|| ConfigError::field("prefix_len", format!("{len} is too long for {ip}")))
        };
        parse().at(|| format!("[{i}]"))
    };
    ranges.iter().enumerate().map(net).collect()
}

/// Builds the tree below one level for the chains that are still possible; two chains that end in one leaf are the
/// error.
fn build(levels: &[Level], criteria: &[Criteria], chains: Vec<usize>) -> Result<Node, (usize, usize)> {
    let Some((level, deeper)) = levels.split_first() else {
        return match chains[..] {
            [only] => Ok(Node::Chain(only)),
            // `chains` is never empty: a node is built only for a key that some chain has.
            _ => Err((chains[0], chains[1])),
        };
    };
    let below = |chains| build(deeper, criteria, chains);
    match level {
        Level::DestinationPort => {
            branches(&chains, |i| criteria[i].destination_port.into_iter().collect(), below).map(Node::Port)
        }
        Level::SourcePort => branches(&chains, |i| criteria[i].source_ports.clone(), below).map(Node::Port),
        Level::DestinationIp => ip_node(&chains, |i| &criteria[i].destination_ips, below),
        Level::DirectSourceIp => ip_node(&chains, |i| &criteria[i].direct_source_ips, below),
        Level::SourceIp => ip_node(&chains, |i| &criteria[i].source_ips, below),
        Level::TransportProtocol => {
            let keys = |i: usize| {
                let protocol = criteria[i].transport_protocol.iter();
                protocol.map(|protocol| Box::from(protocol.as_bytes())).collect()
            };
            branches(&chains, keys, below).map(Node::Bytes)
        }
        Level::ApplicationProtocol => {
            branches(&chains, |i| criteria[i].application_protocols.clone(), below).map(Node::Bytes)
        }
        Level::SourceType => {
            let keys = |i: usize| match criteria[i].source_type {
                SourceType::Any => Vec::new(),
                kind => vec![kind],
            };
            branches(&chains, keys, below).map(Node::Source)
        }
        Level::ServerName => {
            let exact = branches(&chains, |i| criteria[i].server_names.clone(), below)?;
            let (suffix, keyed) = exact.keyed.into_iter().partition(|(name, _)| name.starts_with("*."));
            let suffix: HashMap<Box<str>, Node> = suffix;
            let suffix = suffix.into_iter().map(|(name, node)| (Box::from(&name[1..]), node)).collect();
            Ok(Node::Name { exact: Branches { keyed, any: exact.any }, suffix })
        }
    }
}

type Below<'a> = &'a dyn Fn(Vec<usize>) -> Result<Node, (usize, usize)>;

fn branches<K: Clone + Eq + std::hash::Hash>(
    chains: &[usize],
    keys: impl Fn(usize) -> Vec<K>,
    below: impl Fn(Vec<usize>) -> Result<Node, (usize, usize)>,
) -> Result<Branches<K>, (usize, usize)> {
    let below: Below<'_> = &below;
    let mut groups: HashMap<K, Vec<usize>> = HashMap::new();
    let mut any = Vec::new();
    for &chain in chains {
        let keys = keys(chain);
        if keys.is_empty() {
            any.push(chain);
        }
        for key in keys {
            groups.entry(key).or_default().push(chain);
        }
    }
    let mut keyed = HashMap::with_capacity(groups.len());
    for (key, group) in groups {
        keyed.insert(key, below(group)?);
    }
    let any = if any.is_empty() { None } else { Some(Box::new(below(any)?)) };
    Ok(Branches { keyed, any })
}

fn ip_node<'a>(
    chains: &[usize],
    nets: impl Fn(usize) -> &'a Vec<IpNet>,
    below: impl Fn(Vec<usize>) -> Result<Node, (usize, usize)>,
) -> Result<Node, (usize, usize)> {
    let Branches { keyed, any } = branches(chains, |i| nets(i).clone(), below)?;
    let mut keyed: Vec<(IpNet, Node)> = keyed.into_iter().collect();
    // The longest prefix first, so that the first that contains the address decides.
    keyed.sort_by_key(|(net, _)| std::cmp::Reverse(net.prefix_len()));
    Ok(Node::Ip(keyed, any))
}

impl<K: Eq + std::hash::Hash> Branches<K> {
    fn get<Q>(&self, key: Option<&Q>) -> Option<&Node>
    where
        K: std::borrow::Borrow<Q>,
        Q: Eq + std::hash::Hash + ?Sized,
    {
        key.and_then(|key| self.keyed.get(key)).or(self.any.as_deref())
    }
}

impl Node {
    fn step(&self, level: Level, facts: &Facts<'_>) -> Option<&Self> {
        match self {
            Self::Chain(_) => None,
            Self::Port(branches) => {
                let endpoint = if level == Level::DestinationPort { facts.destination } else { facts.source };
                branches.get(endpoint.map(|(_, port)| port).as_ref())
            }
            Self::Ip(nets, any) => {
                let ip = match level {
                    Level::DestinationIp => facts.destination.map(|(ip, _)| ip),
                    Level::DirectSourceIp => facts.direct_source,
                    _ => facts.source.map(|(ip, _)| ip),
                };
                let longest = ip.and_then(|ip| nets.iter().find(|(net, _)| net.contains(&ip)));
                longest.map(|(_, node)| node).or(any.as_deref())
            }
            Self::Name { exact, suffix } => {
                let name = facts.server_name;
                if let Some(node) = exact.keyed.get(name) {
                    return Some(node);
                }
                // `.example.com` of `a.b.example.com`: the longest suffix first.
                let dots = name.bytes().enumerate().filter(|(_, byte)| *byte == b'.');
                let wildcard = dots.map(|(at, _)| &name[at..]).find_map(|suffix_of| suffix.get(suffix_of));
                wildcard.or(exact.any.as_deref())
            }
            Self::Bytes(branches) if level == Level::TransportProtocol => {
                branches.get(Some(facts.transport_protocol.as_bytes()))
            }
            Self::Bytes(branches) => {
                let offered = facts.application_protocols.iter();
                let first = offered.filter_map(|protocol| branches.keyed.get(&**protocol)).next();
                first.or(branches.any.as_deref())
            }
            Self::Source(branches) => {
                let kind = if facts.is_same_ip_or_loopback() {
                    SourceType::SameIpOrLoopback
                } else {
                    SourceType::External
                };
                branches.get(Some(&kind))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ChainTable, Facts};
    use envoy_types::pb::envoy::config::core::v3::CidrRange;
    use envoy_types::pb::envoy::config::listener::v3 as pb;
    use envoy_types::pb::google::protobuf::UInt32Value;

    fn chain(name: &str, matcher: pb::FilterChainMatch) -> pb::FilterChain {
        pb::FilterChain { name: name.into(), filter_chain_match: Some(matcher), ..Default::default() }
    }

    fn names(names: &[&str]) -> pb::FilterChainMatch {
        pb::FilterChainMatch {
            server_names: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn range(prefix: &str, len: u32) -> CidrRange {
        CidrRange { address_prefix: prefix.into(), prefix_len: Some(UInt32Value { value: len }) }
    }

    fn facts<'a>(server_name: &'a str, alpn: &'a [Box<[u8]>]) -> Facts<'a> {
        Facts {
            destination: Some(([10, 0, 0, 1].into(), 443)),
            server_name,
            transport_protocol: if server_name.is_empty() { "raw_buffer" } else { "tls" },
            application_protocols: alpn,
            direct_source: Some([192, 168, 1, 1].into()),
            source: Some(([192, 168, 1, 1].into(), 50_000)),
        }
    }

    #[test]
    fn server_names_prefer_exact_then_the_longest_wildcard_then_none() {
        let chains = [
            chain("exact", names(&["www.example.com"])),
            chain("wide", names(&["*.com"])),
            chain("narrow", names(&["*.example.com"])),
            chain("none", pb::FilterChainMatch::default()),
        ];
        let table = ChainTable::compile(&chains).unwrap();
        for (name, expected) in [
            ("www.example.com", 0),
            ("api.example.com", 2),
            ("a.b.example.com", 2),
            ("other.com", 1),
            ("example.org", 3),
            ("", 3),
        ] {
            assert_eq!(table.find(&facts(name, &[])), Some(expected), "{name}");
        }
    }

    #[test]
    fn a_more_specific_early_criterion_is_not_taken_back() {
        let port_and_name = pb::FilterChainMatch {
            destination_port: Some(UInt32Value { value: 443 }),
            ..names(&["a.example"])
        };
        let chains = [chain("port", port_and_name), chain("any", pb::FilterChainMatch::default())];
        let table = ChainTable::compile(&chains).unwrap();
        assert_eq!(table.find(&facts("a.example", &[])), Some(0));
        assert_eq!(table.find(&facts("b.example", &[])), None, "port 443 decides before the name");
    }

    #[test]
    fn longest_prefix_alpn_and_source() {
        let wide = pb::FilterChainMatch { prefix_ranges: vec![range("10.0.0.0", 8)], ..Default::default() };
        let narrow =
            pb::FilterChainMatch { prefix_ranges: vec![range("10.0.0.9", 24)], ..Default::default() };
        let h2 = pb::FilterChainMatch { application_protocols: vec!["h2".into()], ..narrow.clone() };
        let external = pb::FilterChainMatch { source_type: 2, ..h2.clone() };
        let chains = [
            chain("wide", wide),
            chain("narrow", narrow),
            chain("h2", pb::FilterChainMatch { source_type: 1, ..h2 }),
            chain("external", external),
        ];
        let table = ChainTable::compile(&chains).unwrap();
        let h2: [Box<[u8]>; 1] = [Box::from(*b"h2")];
        assert_eq!(table.find(&facts("", &[])), Some(1));
        assert_eq!(table.find(&facts("", &h2)), Some(3));
        let local = Facts { source: Some(([10, 0, 0, 1].into(), 1)), ..facts("", &h2) };
        assert_eq!(table.find(&local), Some(2));
        let elsewhere = Facts { destination: Some(([10, 9, 0, 1].into(), 1)), ..facts("", &h2) };
        assert_eq!(table.find(&elsewhere), Some(0));
    }

    #[test]
    fn equal_rules_and_partial_wildcards_are_refused() {
        let chains = [chain("a", names(&["x"])), chain("b", names(&["y", "X"]))];
        let error = ChainTable::compile(&chains).unwrap_err();
        assert_eq!(
            error.to_string(),
            "filter_chains[b]: filter chain 'b' has the same matching rules defined as 'a'"
        );
        let error = ChainTable::compile(&[chain("a", names(&["w*.x"]))]).unwrap_err();
        assert_eq!(error.path(), "filter_chains[a].filter_chain_match.server_names[0]");
    }
}
