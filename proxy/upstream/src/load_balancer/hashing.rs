//! Consistent hashing: ketama rings and Maglev tables with Envoy's layout, so that one key finds the same host behind
//! either proxy.

use std::sync::Arc;

use xxhash_rust::xxh64::xxh64;

use super::policy::{HashPolicy, TableKind};
use crate::host::Host;

/// A table over the hosts of one source.
#[derive(Debug)]
pub(crate) struct HashTable {
    slots: Slots,
    /// The list that the slots index.
    pub(crate) source: u32,
    /// Normalised weights of that list, for bounded loads.
    weights: Box<[f64]>,
    balance_factor: u32,
    /// The fewest and most slots of a host.
    pub(crate) spread: (u64, u64),
}

#[derive(Debug)]
enum Slots {
    /// Points in order, and the host at each.
    Ring {
        points: Box<[u64]>,
        hosts: Box<[u32]>,
    },
    Maglev(Box<[u32]>),
}

impl HashTable {
    /// Builds the table of hosts with weights that sum to one.
    pub(crate) fn build(policy: HashPolicy, source: u32, hosts: &[Arc<Host>], weights: Vec<f64>) -> Self {
        let keys = hosts.iter().map(|host| host.hash_key(policy.by_hostname));
        let (slots, spread) = match policy.table {
            TableKind::Ring { min, max, murmur } => ring(keys, &weights, min, max, murmur),
            TableKind::Maglev { size } => maglev(keys, &weights, size),
        };
        let weights = if policy.balance_factor > 0 { weights.into() } else { Box::default() };
        Self { slots, source, weights, balance_factor: policy.balance_factor, spread }
    }

    /// How many slots there are.
    pub(crate) fn len(&self) -> usize {
        match &self.slots {
            Slots::Ring { hosts, .. } | Slots::Maglev(hosts) => hosts.len(),
        }
    }

    /// The host of `hash`; further attempts go to other slots.
    pub(crate) fn pick(&self, hash: u64, attempt: u32) -> Option<u32> {
        match &self.slots {
            Slots::Ring { points, hosts } => {
                let first = points.partition_point(|point| *point < hash);
                let start = if first == points.len() { 0 } else { first };
                hosts.get((start + attempt as usize) % hosts.len().max(1)).copied()
            }
            Slots::Maglev(hosts) => {
                // A retry changes most bits of the hash, so that retries of one host do not all meet on another.
                let hash = if attempt > 0 { hash ^ (u64::MAX - u64::from(attempt) + 1) } else { hash };
                hosts.get((hash % hosts.len().max(1) as u64) as usize).copied()
            }
        }
    }

    /// The host of `hash`, or when that has more than its bounded share of the requests in flight, another one in an order
    /// that follows from the hash (`hash_balance_factor`).
    pub(crate) fn pick_bounded(
        &self,
        hash: u64,
        attempt: u32,
        hosts: &[Arc<Host>],
        active_requests: u64,
        scratch: &mut Vec<u32>,
    ) -> Option<u32> {
        let first = self.pick(hash, attempt)?;
        if self.balance_factor == 0 {
            return Some(first);
        }
        let overload = |index: u32| {
            let slots = ((active_requests + 1) * u64::from(self.balance_factor)).div_ceil(100);
            let share = (slots as f64 * self.weights[index as usize]).ceil().max(1.0);
            hosts[index as usize].active_requests() as f64 / share
        };
        let mut best = (overload(first), first);
        if best.0 <= 1.0 {
            return Some(first);
        }
        scratch.clear();
        scratch.extend(0..hosts.len() as u32);
        // Envoy's shuffle: the low half of the hash seeds the generator.
        let mut random = Mt19937::new(hash as u32);
        for i in 0..scratch.len() {
            let j = random.below((scratch.len() - i) as u32) as usize;
            scratch.swap(i, i + j);
            let candidate = scratch[i];
            if candidate == first {
                continue;
            }
            let load = overload(candidate);
            if load <= 1.0 {
                return Some(candidate);
            }
            if load < best.0 {
                best = (load, candidate);
            }
        }
        Some(best.1)
    }
}

fn ring(
    keys: impl Iterator<Item = String>,
    weights: &[f64],
    min_size: u64,
    max_size: u64,
    murmur: bool,
) -> (Slots, (u64, u64)) {
    let least = weights.iter().copied().fold(1.0, f64::min);
    // The least-weighted host gets a whole number of points; others get about their share.
    let scale = ((least * min_size as f64).ceil() / least).min(max_size as f64);
    let size = scale.ceil();
    let mut points: Vec<(u64, u32)> = Vec::with_capacity(if weights.is_empty() { 0 } else { size as usize });
    let (mut current, mut target) = (0.0, 0.0);
    let mut spread = (size as u64, 0);
    let mut key = String::new();
    for (index, (name, weight)) in (0_u32..).zip(keys.zip(weights)) {
        target += scale * weight;
        let mut count = 0_u64;
        while current < target {
            use std::fmt::Write as _;
            key.clear();
            // Writing to a string cannot fail.
            let _ = write!(key, "{name}_{count}");
            let hash = if murmur { murmur2(key.as_bytes()) } else { xxh64(key.as_bytes(), 0) };
            points.push((hash, index));
            count += 1;
            current += 1.0;
        }
        spread = (spread.0.min(count), spread.1.max(count));
    }
    points.sort_by_key(|(hash, _)| *hash);
    let (points, hosts): (Vec<u64>, Vec<u32>) = points.into_iter().unzip();
    (Slots::Ring { points: points.into(), hosts: hosts.into() }, spread)
}

fn maglev(keys: impl Iterator<Item = String>, weights: &[f64], size: u64) -> (Slots, (u64, u64)) {
    struct Entry {
        index: u32,
        key: String,
        offset: u64,
        skip: u64,
        weight: f64,
        target: f64,
        next: u64,
        count: u64,
    }
    if weights.is_empty() {
        return (Slots::Maglev(Box::default()), (0, 0));
    }
    const FREE: u32 = u32::MAX;
    let mut entries: Vec<Entry> = (0..)
        .zip(keys)
        .zip(weights)
        .map(|((index, key), weight)| Entry {
            index,
            offset: xxh64(key.as_bytes(), 0) % size,
            skip: xxh64(key.as_bytes(), 1) % (size - 1) + 1,
            weight: *weight,
            target: 0.0,
            next: 0,
            count: 0,
            key,
        })
        .collect();
    // Hosts take turns in the order of their keys, so that the table does not depend on the order of the assignment.
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    let heaviest = weights.iter().copied().fold(0.0, f64::max);
    let mut table = vec![FREE; size as usize];
    let mut filled = 0;
    let mut iteration = 1.0;
    while filled < size {
        for entry in &mut entries {
            if filled == size {
                break;
            }
            // A host with a third of the heaviest one's weight takes a turn every third time.
            if iteration * entry.weight < entry.target {
                continue;
            }
            entry.target += heaviest;
            let slot = loop {
                let slot = ((entry.offset + entry.skip * entry.next) % size) as usize;
                entry.next += 1;
                if table[slot] == FREE {
                    break slot;
                }
            };
            table[slot] = entry.index;
            entry.count += 1;
            filled += 1;
        }
        iteration += 1.0;
    }
    let spread = entries
        .iter()
        .fold((size, 0), |(least, most), entry| (entry.count.min(least), entry.count.max(most)));
    (Slots::Maglev(table.into()), spread)
}

/// MurmurHash64A as libstdc++ has it, with its standard seed.
fn murmur2(key: &[u8]) -> u64 {
    const MUL: u64 = 0xc6a4_a793_5bd1_e995;
    const SEED: u64 = 0xc70f_6907;
    let mix = |value: u64| value ^ (value >> 47);
    let mut hash = SEED ^ (key.len() as u64).wrapping_mul(MUL);
    let (chunks, rest) = key.as_chunks::<8>();
    for chunk in chunks {
        let data = mix(u64::from_le_bytes(*chunk).wrapping_mul(MUL)).wrapping_mul(MUL);
        hash = (hash ^ data).wrapping_mul(MUL);
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        hash = (hash ^ u64::from_le_bytes(last)).wrapping_mul(MUL);
    }
    mix(mix(hash).wrapping_mul(MUL))
}

/// The Mersenne Twister of C++'s `std::mt19937`: the order of alternatives must be Envoy's for the same hash.
struct Mt19937 {
    state: [u32; 624],
    at: usize,
}

impl Mt19937 {
    fn new(seed: u32) -> Self {
        let mut state = [0; 624];
        state[0] = seed;
        for i in 1..624 {
            let last: u32 = state[i - 1];
            state[i] = (last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, at: 624 }
    }

    fn next(&mut self) -> u32 {
        if self.at == 624 {
            for i in 0..624 {
                let bits = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7fff_ffff);
                let odd = if bits & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ (bits >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut value = self.state[self.at];
        self.at += 1;
        value ^= value >> 11;
        value ^= (value << 7) & 0x9d2c_5680;
        value ^= (value << 15) & 0xefc6_0000;
        value ^ (value >> 18)
    }

    /// Uniform in `0..bound`, by rejection.
    fn below(&mut self, bound: u32) -> u32 {
        let width = (1_u64 << 32) / u64::from(bound.max(1));
        loop {
            let value = u64::from(self.next()) / width;
            if value < u64::from(bound) {
                return value as u32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Mt19937, murmur2};

    /// Two vectors of Envoy's `hash_test.cc`; recorded picks cover the rest.
    #[test]
    fn murmur_vectors() {
        assert_eq!(murmur2(b"foo"), 9_631_199_822_919_835_226);
        assert_eq!(murmur2(b"bar"), 11_474_628_671_133_349_555);
    }

    /// The C++ standard requires this value (`[rand.predef]`).
    #[test]
    fn twister_matches_the_standard() {
        let mut random = Mt19937::new(5489);
        let mut last = 0;
        for _ in 0..10_000 {
            last = random.next();
        }
        assert_eq!(last, 4_123_659_995);
    }
}
