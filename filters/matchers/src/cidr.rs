//! Address ranges: a list to ask whether it contains an address, and a map by longest prefix.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_schema::{At, ConfigError};

/// An address range. Host bits are cleared.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Cidr {
    address: IpAddr,
    len: u8,
}

impl Cidr {
    /// A range; a length beyond the family's is the whole address, as in Envoy.
    pub fn new(address: IpAddr, len: u8) -> Self {
        let (bits, width) = to_bits(address);
        let len = len.min(width);
        let bits = bits & mask(len);
        let address = match address {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits((bits >> 96) as u32)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(bits)),
        };
        Self { address, len }
    }

    /// Compiles `envoy.config.core.v3.CidrRange`.
    pub fn compile(proto: &core::CidrRange) -> Result<Self, ConfigError> {
        let core::CidrRange { address_prefix, prefix_len } = proto;
        let address: IpAddr = address_prefix.parse().map_err(|_| {
            ConfigError::field("address_prefix", format!("malformed IP address: {address_prefix}"))
        })?;
        let len = prefix_len.map_or(0, |len| len.value);
        Ok(Self::new(address, u8::try_from(len).unwrap_or(u8::MAX)))
    }

    /// The range's first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The number of leading bits that count.
    pub fn prefix_len(&self) -> u8 {
        self.len
    }

    /// Whether `address` is in the range. Families do not mix.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4()
            && to_bits(address).0 & mask(self.len) == to_bits(self.address).0
    }
}

/// A set of ranges.
#[derive(Clone, Debug, Default)]
pub struct CidrList {
    map: CidrMap<()>,
}

impl CidrList {
    /// A set of these ranges.
    pub fn new(ranges: impl IntoIterator<Item = Cidr>) -> Self {
        Self { map: CidrMap::new(ranges.into_iter().map(|range| (range, ()))) }
    }

    /// Compiles `repeated envoy.config.core.v3.CidrRange`.
    pub fn compile(protos: &[core::CidrRange], field: &str) -> Result<Self, ConfigError> {
        let compile = |(index, proto)| Cidr::compile(proto).at(|| format!("{field}[{index}]"));
        Ok(Self::new(protos.iter().enumerate().map(compile).collect::<Result<Vec<_>, _>>()?))
    }

    /// Whether one of the ranges contains `address`.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.map.matches(address).next().is_some()
    }

    /// Whether there is no range.
    pub fn is_empty(&self) -> bool {
        self.map.nodes.len() == ROOTS
    }
}

/// Values by address range: a binary trie per family, compressed to the bits that tell ranges apart.
#[derive(Clone, Debug)]
pub struct CidrMap<T> {
    /// The roots of IPv4 and IPv6 stand first.
    nodes: Vec<Node>,
    values: Vec<T>,
}

/// The first two nodes.
const ROOTS: usize = 2;
const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Node {
    bits: u128,
    len: u8,
    children: [u32; 2],
    /// Values of exactly this range, in the order in which they were given.
    values: Vec<u32>,
}

impl Node {
    fn new(bits: u128, len: u8) -> Self {
        Self { bits, len, children: [NONE; 2], values: Vec::new() }
    }
}

impl<T> CidrMap<T> {
    /// A map of these ranges; one range may stand several times.
    pub fn new(entries: impl IntoIterator<Item = (Cidr, T)>) -> Self {
        let mut map = Self { nodes: vec![Node::new(0, 0), Node::new(0, 0)], values: Vec::new() };
        for (range, value) in entries {
            let node = map.node_of(range);
            map.nodes[node].values.push(map.values.len() as u32);
            map.values.push(value);
        }
        map
    }

    /// The values of all ranges that contain `address`: longest prefix first, then in the order given.
    pub fn matches(&self, address: IpAddr) -> impl Iterator<Item = &T> {
        let (bits, _) = to_bits(address);
        // At most one node per bit, and few of them carry values.
        let mut path = [0u32; 129];
        let mut depth = 0;
        let mut at = root(address);
        loop {
            let node = &self.nodes[at];
            if bits & mask(node.len) != node.bits {
                break;
            }
            if !node.values.is_empty() {
                path[depth] = at as u32;
                depth += 1;
            }
            if node.len == 128 {
                break;
            }
            match node.children[bit(bits, node.len)] {
                NONE => break,
                child => at = child as usize,
            }
        }
        (0..depth)
            .rev()
            .flat_map(move |level| &self.nodes[path[level] as usize].values)
            .map(|value| &self.values[*value as usize])
    }

    /// The value of the longest range that contains `address`, the first given among equals.
    pub fn find(&self, address: IpAddr) -> Option<&T> {
        self.matches(address).next()
    }

    fn node_of(&mut self, range: Cidr) -> usize {
        let (bits, _) = to_bits(range.address);
        let mut at = root(range.address);
        loop {
            // Invariant: the node at `at` is a prefix of `range`.
            if self.nodes[at].len == range.len {
                return at;
            }
            let side = bit(bits, self.nodes[at].len);
            let child = self.nodes[at].children[side];
            if child == NONE {
                return self.add_child(at, side, Node::new(bits, range.len));
            }
            let (child_bits, child_len) = (self.nodes[child as usize].bits, self.nodes[child as usize].len);
            let shared = (((child_bits ^ bits).leading_zeros()) as u8).min(child_len).min(range.len);
            if shared == child_len {
                at = child as usize;
                continue;
            }
            // The range leaves the edge in its middle: split it.
            let middle = self.add_child(at, side, Node::new(bits & mask(shared), shared));
            self.nodes[middle].children[bit(child_bits, shared)] = child;
            at = middle;
        }
    }

    fn add_child(&mut self, parent: usize, side: usize, node: Node) -> usize {
        let index = self.nodes.len();
        self.nodes.push(node);
        self.nodes[parent].children[side] = index as u32;
        index
    }
}

impl<T> Default for CidrMap<T> {
    fn default() -> Self {
        Self::new([])
    }
}

fn root(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

/// The address left-aligned in 128 bits, and its width.
fn to_bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

fn mask(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

/// The bit behind the first `len` ones.
fn bit(bits: u128, len: u8) -> usize {
    usize::from(bits << len >> 127 == 1)
}

#[cfg(test)]
mod tests {
    use super::{Cidr, CidrList, CidrMap};
    use proptest::prelude::*;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    fn cidr(text: &str) -> Cidr {
        let (address, len) = text.split_once('/').unwrap();
        Cidr::new(address.parse().unwrap(), len.parse().unwrap())
    }

    #[test]
    fn longest_prefix_first() {
        let map = CidrMap::new(
            ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8"].map(cidr).into_iter().zip(0..),
        );
        let found = |address: &str| map.matches(address.parse().unwrap()).copied().collect::<Vec<_>>();
        assert_eq!(found("10.1.2.3"), [2, 1, 3, 0]);
        assert_eq!(found("11.0.0.0"), [0]);
        assert!(found("::1").is_empty());
        assert!(!CidrList::default().contains("1.2.3.4".parse().unwrap()));
        assert!(CidrList::new([cidr("::1/128")]).contains("::1".parse().unwrap()));
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        // Few distinct bits, so that ranges nest and addresses hit them.
        prop_oneof![
            (0u32..16, 0u32..4).prop_map(|(high, low)| IpAddr::V4(Ipv4Addr::from_bits(high << 28 | low))),
            (0u128..16, 0u128..4).prop_map(|(high, low)| IpAddr::V6(Ipv6Addr::from_bits(high << 124 | low))),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_scan(
            ranges in proptest::collection::vec((address(), 0u8..=128), 0..40),
            addresses in proptest::collection::vec(address(), 1..20),
        ) {
            let ranges: Vec<Cidr> = ranges.into_iter().map(|(address, len)| Cidr::new(address, len)).collect();
            let map = CidrMap::new(ranges.iter().copied().zip(0..));
            for address in addresses {
                let mut expected: Vec<usize> = (0..ranges.len()).filter(|i| ranges[*i].contains(address)).collect();
                expected.sort_by_key(|i| std::cmp::Reverse(ranges[*i].prefix_len()));
                prop_assert_eq!(map.matches(address).copied().collect::<Vec<_>>(), expected);
            }
        }
    }
}
