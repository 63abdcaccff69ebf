//! Which policies may match, found by what a request is rather than by trying them all.
//!
//! Most policies can match only when something is one of a few texts, ports or addresses: a path, a header, a principal.
//! Such texts are the policy's keys, and the policy stands under each of them. A look-up by hash gives a superset of what
//! matches (case and collisions do not matter), each of which is tried, so that the outcome is that of trying them all in
//! order. What has no keys is always tried.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

use waystation_filter_api::filter_state::Object;
use waystation_http::HeaderName;
use waystation_matchers::{Cidr, CidrMap, Inputs, Literal, PrefixMap, without_query};

use crate::policies::Policy;
use crate::rule::{Rule, Side, destination_port, path, principal_names};

/// Policies by their keys. Policies are numbered in their order; lists of them ascend.
#[derive(Debug)]
pub(crate) struct Index {
    count: u32,
    /// Where the policies of a hash stand in `policies`.
    hashes: HashMap<u64, Range<u32>, BuildHasherDefault<Identity>>,
    policies: Box<[u32]>,
    paths: bool,
    path_prefixes: Option<PrefixMap<Vec<u32>>>,
    headers: Box<[HeaderName]>,
    ports: bool,
    server_names: bool,
    principals: bool,
    filter_states: Box<[Box<str>]>,
    addresses: Box<[(Side, CidrMap<u32>)]>,
    /// Those without keys.
    others: Box<[u32]>,
}

/// What a policy may stand under.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Key<'a> {
    /// The path without its query.
    Path(&'a [u8]),
    PathPrefix(&'a [u8]),
    /// A value of a header.
    Header(&'a HeaderName, &'a [u8]),
    DestinationPort(u32),
    ServerName(&'a [u8]),
    Principal(&'a [u8]),
    /// The serialised form of an object.
    FilterState(&'a str, &'a [u8]),
    Address(Side, Cidr),
}

impl Key<'_> {
    /// The hash of what is looked up by hash.
    fn hash(&self) -> Option<u64> {
        Some(match self {
            Self::Path(text) => hash(PATH, text),
            Self::Header(name, text) => hash(hash(HEADER, name.as_str().as_bytes()), text),
            Self::DestinationPort(port) => hash(PORT, &port.to_le_bytes()),
            Self::ServerName(text) => hash(SERVER_NAME, text),
            Self::Principal(text) => hash(PRINCIPAL, text),
            Self::FilterState(name, text) => hash(hash(FILTER_STATE, name.as_bytes()), text),
            Self::PathPrefix(_) | Self::Address(..) => return None,
        })
    }
}

const PATH: u64 = 1;
const HEADER: u64 = 2;
const PORT: u64 = 3;
const SERVER_NAME: u64 = 4;
const PRINCIPAL: u64 = 5;
const FILTER_STATE: u64 = 6;

/// A range of ports is a key for each of them up to so many.
const PORTS: usize = 8;

impl Index {
    pub(crate) fn new(policies: &[Policy]) -> Self {
        let mut counts = HashMap::new();
        for policy in policies {
            for rule in [&policy.permission, &policy.principal] {
                each_key(rule, &mut |key| *counts.entry(key).or_insert(0) += 1);
            }
        }
        let (mut others, mut under) = (Vec::new(), Vec::new());
        for (number, policy) in (0..).zip(policies) {
            match keys_of_both(policy, &counts) {
                Some(keys) => under.extend(keys.into_iter().map(|key| (key, number))),
                None => others.push(number),
            }
        }
        Self::of(policies.len(), &under, others)
    }

    fn of(count: usize, under: &[(Key<'_>, u32)], others: Vec<u32>) -> Self {
        let any = |is: fn(&Key<'_>) -> bool| under.iter().any(|(key, _)| is(key));
        let (mut headers, mut filter_states) = (Vec::<HeaderName>::new(), Vec::<Box<str>>::new());
        for (key, _) in under {
            match key {
                Key::Header(name, _) if !headers.contains(name) => headers.push((*name).clone()),
                Key::FilterState(name, _) if !filter_states.iter().any(|known| **known == **name) => {
                    filter_states.push((*name).into());
                }
                _ => {}
            }
        }
        let prefixes = under.iter().filter_map(|(key, policy)| match key {
            Key::PathPrefix(text) => Some((*text, vec![*policy])),
            _ => None,
        });
        let addresses = Side::ALL.into_iter().filter_map(|side| {
            let ranges = under.iter().filter_map(|(key, policy)| match key {
                Key::Address(of, range) if *of == side => Some((*range, *policy)),
                _ => None,
            });
            let ranges: Vec<(Cidr, u32)> = ranges.collect();
            (!ranges.is_empty()).then(|| (side, CidrMap::new(ranges)))
        });
        let mut hashed: Vec<(u64, u32)> =
            under.iter().filter_map(|(key, policy)| Some((key.hash()?, *policy))).collect();
        hashed.sort_unstable();
        hashed.dedup();
        let mut hashes: HashMap<u64, Range<u32>, _> = HashMap::default();
        for (at, (hash, _)) in (0..).zip(&hashed) {
            hashes.entry(*hash).or_insert(at..at).end = at + 1;
        }
        Self {
            // A configuration of 4 billion policies does not fit into a message.
            count: count as u32,
            hashes,
            policies: hashed.into_iter().map(|(_, policy)| policy).collect(),
            paths: any(|key| matches!(key, Key::Path(_))),
            path_prefixes: any(|key| matches!(key, Key::PathPrefix(_)))
                .then(|| PrefixMap::build(prefixes, true, |all, one| all.extend(one))),
            headers: headers.into(),
            ports: any(|key| matches!(key, Key::DestinationPort(_))),
            server_names: any(|key| matches!(key, Key::ServerName(_))),
            principals: any(|key| matches!(key, Key::Principal(_))),
            filter_states: filter_states.into(),
            addresses: addresses.collect(),
            others: others.into(),
        }
    }

    /// The first policy that `is_match`, which must be true of none whose keys are all absent from `inputs`.
    pub(crate) fn first(&self, inputs: &Inputs<'_>, is_match: impl Fn(u32) -> bool) -> Option<usize> {
        let mut search = Search { index: self, first: self.count, is_match };
        if let Some(target) = path(inputs) {
            let path = without_query(target);
            if self.paths {
                search.hashed(hash(PATH, path));
            }
            for (_, policies) in self.path_prefixes.iter().flat_map(|map| map.prefixes(path)) {
                search.try_in_order(policies);
            }
        }
        if let Some(head) = inputs.request {
            for name in &self.headers {
                let seed = hash(HEADER, name.as_str().as_bytes());
                for value in head.get_all(name) {
                    search.hashed(hash(seed, value));
                }
            }
        }
        if self.ports
            && let Some(port) = destination_port(inputs)
        {
            search.hashed(hash(PORT, &port.to_le_bytes()));
        }
        if let Some(connection) = inputs.connection {
            if self.server_names {
                let name = connection.requested_server_name.as_deref().unwrap_or_default();
                search.hashed(hash(SERVER_NAME, name.as_bytes()));
            }
            if self.principals && connection.tls.is_some() {
                for name in principal_names(connection) {
                    search.hashed(hash(PRINCIPAL, name.as_bytes()));
                }
            }
        }
        for name in &self.filter_states {
            let seed = hash(FILTER_STATE, name.as_bytes());
            filter_state(name, inputs, &mut |text| search.hashed(hash(seed, text)));
        }
        for (side, map) in &self.addresses {
            let address = side.of(inputs).and_then(|address| address.ip());
            for policy in address.iter().flat_map(|address| map.matches(address.ip())) {
                search.try_in_order(std::slice::from_ref(policy));
            }
        }
        search.try_in_order(&self.others);
        (search.first < self.count).then_some(search.first as usize)
    }
}

/// The first policy that matches among those tried so far.
struct Search<'a, M> {
    index: &'a Index,
    first: u32,
    is_match: M,
}

impl<M: Fn(u32) -> bool> Search<'_, M> {
    fn hashed(&mut self, hash: u64) {
        if let Some(Range { start, end }) = self.index.hashes.get(&hash) {
            self.try_in_order(&self.index.policies[*start as usize..*end as usize]);
        }
    }

    fn try_in_order(&mut self, policies: &[u32]) {
        let before = policies.iter().take_while(|policy| **policy < self.first);
        if let Some(found) = before.copied().find(|policy| (self.is_match)(*policy)) {
            self.first = found;
        }
    }
}

/// The keys of the one of a policy's conditions that fewer policies share.
fn keys_of_both<'a>(policy: &'a Policy, counts: &HashMap<Key<'a>, usize>) -> Option<Vec<Key<'a>>> {
    let both = [keys(&policy.permission, counts), keys(&policy.principal, counts)];
    both.into_iter().flatten().min_by_key(|(cost, _)| *cost).map(|(_, keys)| keys)
}

/// Keys of which one is there whenever `rule` holds, and how many policies stand under them; nothing when there are no such
/// keys.
fn keys<'a>(rule: &'a Rule, counts: &HashMap<Key<'a>, usize>) -> Option<(usize, Vec<Key<'a>>)> {
    match rule {
        Rule::All(rules) => rules.iter().filter_map(|rule| keys(rule, counts)).min_by_key(|(cost, _)| *cost),
        Rule::Any(rules) => rules.iter().try_fold((0, Vec::new()), |(cost, mut all), rule| {
            let (more, keys) = keys(rule, counts)?;
            all.extend(keys);
            Some((cost + more, all))
        }),
        leaf => {
            let keys = leaf_keys(leaf)?;
            let cost = keys.iter().map(|key| counts.get(key).copied().unwrap_or_default()).sum();
            Some((cost, keys))
        }
    }
}

fn each_key<'a>(rule: &'a Rule, each: &mut impl FnMut(Key<'a>)) {
    match rule {
        Rule::All(rules) | Rule::Any(rules) => rules.iter().for_each(|rule| each_key(rule, each)),
        leaf => leaf_keys(leaf).into_iter().flatten().for_each(each),
    }
}

fn leaf_keys(rule: &Rule) -> Option<Vec<Key<'_>>> {
    let key = match rule {
        Rule::Path(path) => match path.literal()? {
            Literal::Exact(text) => Key::Path(text),
            Literal::Prefix(text) => Key::PathPrefix(text),
        },
        Rule::Template(template) => Key::PathPrefix(template.literal_prefix()),
        Rule::Header(header) => match header.literal()? {
            Literal::Exact(text) => Key::Header(header.name(), text),
            Literal::Prefix(_) => return None,
        },
        Rule::Address(side, range) => Key::Address(*side, *range),
        Rule::DestinationPort(ports) if ports.len() <= PORTS => {
            return Some(ports.clone().map(Key::DestinationPort).collect());
        }
        Rule::ServerName(name) => match name.literal()? {
            Literal::Exact(text) => Key::ServerName(text),
            Literal::Prefix(_) => return None,
        },
        Rule::Authenticated(Some(name)) => match name.literal()? {
            Literal::Exact(text) => Key::Principal(text),
            Literal::Prefix(_) => return None,
        },
        Rule::FilterState(object) => match object.literal()? {
            Literal::Exact(text) => Key::FilterState(object.key(), text),
            Literal::Prefix(_) => return None,
        },
        _ => return None,
    };
    match key {
        // Nearly everything begins so.
        Key::PathPrefix(b"" | b"/") => None,
        Key::Address(_, range) if range.prefix_len() == 0 => None,
        key => Some(vec![key]),
    }
}

/// Reads an object of the stream, or else of its connection, as `FilterStateMatcher` does.
fn filter_state(name: &str, inputs: &Inputs<'_>, read: &mut dyn FnMut(&[u8])) {
    let mut read = |object: &dyn Object| match object.text() {
        Some(text) => read(text),
        None => {
            if let Some(text) = object.serialize() {
                read(&text);
            }
        }
    };
    if let Some(object) = inputs.stream.and_then(|stream| stream.filter_state.get(name)) {
        read(&**object);
    } else if let Some(connection) = inputs.connection
        && let Some(object) = connection.filter_state.borrow().get(name)
    {
        read(&**object);
    }
}

/// A hash that takes letters of both cases for the same, and some other characters too: whoever is found by it is looked at.
fn hash(seed: u64, text: &[u8]) -> u64 {
    const FOLD: u64 = 0x2020_2020_2020_2020;
    const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
    let mix = |hash: u64, word: u64| {
        let wide = u128::from(hash ^ word) * u128::from(FACTOR);
        (wide as u64) ^ (wide >> 64) as u64
    };
    let (words, rest) = text.as_chunks::<8>();
    let hash = words
        .iter()
        .fold(mix(seed, text.len() as u64), |hash, word| mix(hash, u64::from_le_bytes(*word) | FOLD));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    mix(hash, u64::from_le_bytes(last) | FOLD)
}

/// Keys are hashes already.
#[derive(Debug, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only whole hashes are looked up");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
