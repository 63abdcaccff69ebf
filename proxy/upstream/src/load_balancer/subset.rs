//! Subsets of hosts by endpoint metadata (`lb_subset_config`, `subset.v3.Subset`).

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::extensions::load_balancing_policies::subset::v3 as typed;
use smallvec::SmallVec;
use waystation_filter_api::value::{Struct, Value, struct_from_proto};
use waystation_filter_api::wire::refuse;
use waystation_schema::{At, ConfigError};

use super::build::PriorityLb;
use crate::host::Host;

/// What a route asks of endpoints: its `metadata_match` of the namespace `envoy.lb`, in the order of keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetadataMatch {
    entries: Box<[Criterion]>,
    /// What to try instead, in order, with `metadata_fallback_policy: FALLBACK_LIST`.
    fallbacks: Box<[MetadataMatch]>,
}

#[derive(Clone, Debug, PartialEq)]
struct Criterion {
    key: Arc<str>,
    value: Value,
    hash: u64,
}

/// A compiled subset configuration.
#[derive(Debug)]
pub(crate) struct SubsetConfig {
    pub(crate) fallback: Fallback,
    pub(crate) default_subset: Vec<(Arc<str>, Value)>,
    pub(crate) selectors: Vec<Selector>,
    pub(crate) locality_weight_aware: bool,
    pub(crate) scale_locality_weight: bool,
    pub(crate) panic_mode_any: bool,
    pub(crate) list_as_any: bool,
    pub(crate) fallback_list: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fallback {
    None,
    AnyEndpoint,
    DefaultSubset,
}

#[derive(Debug)]
pub(crate) struct Selector {
    /// Sorted.
    pub(crate) keys: Vec<Arc<str>>,
    pub(crate) single_host: bool,
    pub(crate) fallback: SelectorFallback,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum SelectorFallback {
    /// The cluster's.
    NotDefined,
    /// One of its own.
    Own(Fallback),
    /// Looks again with these keys only.
    Keys(Vec<Arc<str>>),
}

/// The subsets of one snapshot.
#[derive(Debug, Default)]
pub(crate) struct Subsets {
    by_hash: HashMap<u64, SmallVec<[u32; 1]>>,
    pub(crate) list: Vec<Subset>,
    pub(crate) default: Option<PriorityLb>,
    /// Hosts beyond the first of a `single_host_per_subset` subset.
    pub(crate) duplicates: u64,
}

#[derive(Debug)]
pub(crate) struct Subset {
    criteria: Vec<(Arc<str>, Value)>,
    pub(crate) lb: PriorityLb,
}

/// A combination of keys and values, and the hosts of each priority level that have it.
#[derive(Debug)]
pub(crate) struct SubsetHosts {
    pub(crate) criteria: Vec<(Arc<str>, Value)>,
    pub(crate) levels: Vec<Vec<Arc<Host>>>,
}

/// Which entries of a match count: `fallback_keys_subset` leaves some out.
pub(crate) type Mask = u64;

impl MetadataMatch {
    /// Compiles the fields of `envoy.lb`. Returns `None` when there are none: then a route asks for nothing.
    ///
    /// # Errors
    /// With more than 64 keys.
    pub fn compile(fields: &Struct) -> Result<Option<Self>, ConfigError> {
        let entries: Box<[Criterion]> = fields
            .iter()
            .filter(|(key, _)| &***key != "fallback_list")
            .map(|(key, value)| Criterion {
                key: Arc::clone(key),
                value: value.clone(),
                hash: entry_hash(key, value),
            })
            .collect();
        if entries.len() > Mask::BITS as usize {
            return Err(ConfigError::new("at most 64 keys can be matched"));
        }
        let mut fallbacks = Vec::new();
        if let Some(Value::List(list)) = fields.get("fallback_list") {
            for alternative in list {
                let Value::Struct(alternative) = alternative else { continue };
                let mut merged = fields.clone();
                merged.remove("fallback_list");
                merged.extend(alternative.iter().map(|(key, value)| (Arc::clone(key), value.clone())));
                fallbacks.extend(Self::compile(&merged)?);
            }
        }
        let empty = entries.is_empty() && fallbacks.is_empty();
        Ok((!empty).then(|| Self { entries, fallbacks: fallbacks.into() }))
    }

    /// The alternatives.
    pub(crate) fn fallbacks(&self) -> &[Self] {
        &self.fallbacks
    }

    /// All entries.
    pub(crate) fn all(&self) -> Mask {
        match self.entries.len() {
            0 => 0,
            len => Mask::MAX >> (Mask::BITS as usize - len),
        }
    }

    /// The entries whose keys are in `keys`, of those in `mask`.
    pub(crate) fn only(&self, mask: Mask, keys: &[Arc<str>]) -> Mask {
        (0..).zip(&*self.entries).fold(0, |left, (i, entry)| {
            if mask >> i & 1 == 1 && keys.contains(&entry.key) { left | 1 << i } else { left }
        })
    }

    fn masked(&self, mask: Mask) -> impl Iterator<Item = &Criterion> {
        (0..).zip(&*self.entries).filter(move |(i, _)| mask >> i & 1 == 1).map(|(_, entry)| entry)
    }

    /// Whether the keys in `mask` are exactly `keys`.
    pub(crate) fn has_keys(&self, mask: Mask, keys: &[Arc<str>]) -> bool {
        self.masked(mask).map(|entry| &entry.key).eq(keys)
    }
}

impl Subsets {
    pub(crate) fn new(duplicates: u64) -> Self {
        Self { duplicates, ..Self::default() }
    }

    pub(crate) fn push(&mut self, criteria: Vec<(Arc<str>, Value)>, lb: PriorityLb) {
        let hash = combine(criteria.iter().map(|(key, value)| entry_hash(key, value)));
        self.by_hash.entry(hash).or_default().push(self.list.len() as u32);
        self.list.push(Subset { criteria, lb });
    }

    /// The subset that a match names.
    pub(crate) fn find(&self, wanted: &MetadataMatch, mask: Mask) -> Option<&Subset> {
        if mask == 0 {
            return None;
        }
        let hash = combine(wanted.masked(mask).map(|entry| entry.hash));
        let candidates = self.by_hash.get(&hash)?;
        candidates.iter().map(|index| &self.list[*index as usize]).find(|subset| {
            let criteria = subset.criteria.iter().map(|(key, value)| (key, value));
            criteria.eq(wanted.masked(mask).map(|entry| (&entry.key, &entry.value)))
        })
    }

    /// What identifies the subsets, to count those that come and go.
    pub(crate) fn hashes(&self) -> impl Iterator<Item = u64> + '_ {
        self.by_hash.keys().copied()
    }

    pub(crate) fn has(&self, hash: u64) -> bool {
        self.by_hash.contains_key(&hash)
    }
}

impl SubsetConfig {
    /// Sorts the hosts of each priority level into the subsets of all selectors. Returns also how many hosts were left out
    /// of subsets that take one host only.
    pub(crate) fn sort(&self, levels: &[&[Arc<Host>]]) -> (Vec<SubsetHosts>, u64) {
        let mut found: Vec<SubsetHosts> = Vec::new();
        let mut by_hash: HashMap<u64, SmallVec<[usize; 1]>> = HashMap::new();
        let mut duplicates = 0;
        for selector in &self.selectors {
            for (level, hosts) in levels.iter().enumerate() {
                for host in *hosts {
                    for criteria in self.combinations(selector, host) {
                        let hash = combine(criteria.iter().map(|(key, value)| entry_hash(key, value)));
                        let same = by_hash.entry(hash).or_default();
                        let index = same.iter().copied().find(|index| found[*index].criteria == criteria);
                        let index = index.unwrap_or_else(|| {
                            same.push(found.len());
                            found.push(SubsetHosts { criteria, levels: vec![Vec::new(); levels.len()] });
                            found.len() - 1
                        });
                        let subset = &mut found[index];
                        let taken = subset.levels.iter().any(|hosts| !hosts.is_empty());
                        if selector.single_host && taken {
                            duplicates += 1;
                        } else if subset.levels[level].last().is_none_or(|last| !Arc::ptr_eq(last, host)) {
                            // Two selectors with the same keys would bring each host twice.
                            subset.levels[level].push(Arc::clone(host));
                        }
                    }
                }
            }
        }
        (found, duplicates)
    }

    /// Whether a host belongs to the default subset.
    pub(crate) fn in_default(&self, host: &Host) -> bool {
        self.default_subset.iter().all(|(key, wanted)| match host.lb_metadata(key) {
            Some(Value::List(values)) if self.list_as_any => values.contains(wanted),
            value => value == Some(wanted),
        })
    }

    /// The key-value combinations by which a host is in subsets of a selector: one, unless lists stand for any of their
    /// elements.
    fn combinations(&self, selector: &Selector, host: &Host) -> Vec<Vec<(Arc<str>, Value)>> {
        let mut combinations = vec![Vec::new()];
        for key in &selector.keys {
            let values: &[Value] = match host.lb_metadata(key) {
                None => return Vec::new(),
                Some(Value::List(values)) if self.list_as_any => values,
                Some(value) => std::slice::from_ref(value),
            };
            combinations = combinations
                .iter()
                .flat_map(|base| values.iter().map(move |value| (base, value)))
                .map(|(base, value)| {
                    let mut extended: Vec<(Arc<str>, Value)> = base.clone();
                    extended.push((Arc::clone(key), value.clone()));
                    extended
                })
                .collect();
        }
        combinations
    }

    /// Compiles `lb_subset_config`; without selectors there are no subsets.
    pub(crate) fn compile_legacy(proto: &pb::cluster::LbSubsetConfig) -> Result<Option<Self>, ConfigError> {
        let pb::cluster::LbSubsetConfig {
            fallback_policy,
            default_subset,
            subset_selectors,
            locality_weight_aware,
            scale_locality_weight,
            panic_mode_any,
            list_as_any,
            metadata_fallback_policy,
        } = proto.clone();
        // The typed message is the same but for allow_redundant_keys.
        let selector =
            |selector: pb::cluster::lb_subset_config::LbSubsetSelector| typed::subset::LbSubsetSelector {
                keys: selector.keys,
                single_host_per_subset: selector.single_host_per_subset,
                fallback_policy: selector.fallback_policy,
                fallback_keys_subset: selector.fallback_keys_subset,
            };
        Self::compile(&typed::Subset {
            fallback_policy,
            default_subset,
            subset_selectors: subset_selectors.into_iter().map(selector).collect(),
            allow_redundant_keys: false,
            locality_weight_aware,
            scale_locality_weight,
            panic_mode_any,
            list_as_any,
            metadata_fallback_policy,
            subset_lb_policy: None,
        })
    }

    /// Compiles the typed policy but for its nested policy.
    pub(crate) fn compile(proto: &typed::Subset) -> Result<Option<Self>, ConfigError> {
        let typed::Subset {
            fallback_policy,
            default_subset,
            subset_selectors,
            allow_redundant_keys,
            locality_weight_aware,
            scale_locality_weight,
            panic_mode_any,
            list_as_any,
            metadata_fallback_policy,
            // Compiled by the policy that holds this one.
            subset_lb_policy: _,
        } = proto;
        refuse("allow_redundant_keys", *allow_redundant_keys, "matches name exactly the keys of a selector")?;
        if subset_selectors.is_empty() {
            return Ok(None);
        }
        let fallback = match fallback_policy {
            0 => Fallback::None,
            1 => Fallback::AnyEndpoint,
            2 => Fallback::DefaultSubset,
            _ => return Err(ConfigError::field("fallback_policy", "unknown value")),
        };
        let selectors = subset_selectors
            .iter()
            .enumerate()
            .map(|(i, selector)| Selector::compile(selector).at(|| format!("subset_selectors[{i}]")))
            .collect::<Result<_, _>>()?;
        Ok(Some(Self {
            fallback,
            default_subset: default_subset
                .as_ref()
                .map(struct_from_proto)
                .unwrap_or_default()
                .into_iter()
                .collect(),
            selectors,
            locality_weight_aware: *locality_weight_aware,
            scale_locality_weight: *scale_locality_weight,
            panic_mode_any: *panic_mode_any,
            list_as_any: *list_as_any,
            fallback_list: *metadata_fallback_policy == 1,
        }))
    }
}

impl Selector {
    fn compile(proto: &typed::subset::LbSubsetSelector) -> Result<Self, ConfigError> {
        let sorted = |keys: &[String]| {
            let mut keys: Vec<Arc<str>> = keys.iter().map(|key| key.as_str().into()).collect();
            keys.sort();
            keys.dedup();
            keys
        };
        let keys = sorted(&proto.keys);
        if keys.is_empty() {
            return Err(ConfigError::field("keys", "must not be empty"));
        }
        let narrowed = sorted(&proto.fallback_keys_subset);
        let fallback = match proto.fallback_policy {
            0 => SelectorFallback::NotDefined,
            1 => SelectorFallback::Own(Fallback::None),
            2 => SelectorFallback::Own(Fallback::AnyEndpoint),
            3 => SelectorFallback::Own(Fallback::DefaultSubset),
            4 => {
                // A proper subset, so that looking again comes to an end.
                if narrowed.is_empty()
                    || narrowed.len() >= keys.len()
                    || !narrowed.iter().all(|key| keys.contains(key))
                {
                    return Err(ConfigError::field(
                        "fallback_keys_subset",
                        "must be a non-empty proper subset of the selector's keys",
                    ));
                }
                SelectorFallback::Keys(narrowed)
            }
            _ => return Err(ConfigError::field("fallback_policy", "unknown value")),
        };
        if !matches!(fallback, SelectorFallback::Keys(_)) && !proto.fallback_keys_subset.is_empty() {
            return Err(ConfigError::field("fallback_keys_subset", "only with fallback_policy KEYS_SUBSET"));
        }
        Ok(Self { keys, single_host: proto.single_host_per_subset, fallback })
    }
}

fn entry_hash(key: &str, value: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hash_value(value, &mut hasher);
    hasher.finish()
}

fn hash_value(value: &Value, hasher: &mut DefaultHasher) {
    std::mem::discriminant(value).hash(hasher);
    match value {
        Value::Null => {}
        Value::Bool(flag) => flag.hash(hasher),
        // Zero and minus zero are equal.
        Value::Number(number) => (number + 0.0).to_bits().hash(hasher),
        Value::String(text) => text.hash(hasher),
        Value::List(values) => values.iter().for_each(|value| hash_value(value, hasher)),
        Value::Struct(fields) => fields.iter().for_each(|(key, value)| {
            key.hash(hasher);
            hash_value(value, hasher);
        }),
    }
}

fn combine(hashes: impl Iterator<Item = u64>) -> u64 {
    hashes.fold(0, |all, hash| (all.rotate_left(5) ^ hash).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
