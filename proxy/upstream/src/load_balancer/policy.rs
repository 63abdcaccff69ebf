//! The balancing policy of a cluster, compiled from its deprecated fields or from `load_balancing_policy`.

#![expect(deprecated, reason = "control planes still send deprecated fields, and Envoy reads them")]

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::load_balancing_policies as lbp;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::runtime::{
    Denominator, Fraction, Runtime, RuntimeDouble, RuntimeFraction, RuntimeInteger,
};
use waystation_filter_api::wire::{positive, refuse, type_name, u32_value, unpack};
use waystation_schema::{At, ConfigError};

use super::subset::SubsetConfig;

/// How hosts of a cluster are chosen.
#[derive(Debug)]
pub struct LbPolicy {
    pub(crate) kind: Kind,
    pub(crate) locality: LocalityPolicy,
    pub(crate) subset: Option<Box<SubsetConfig>>,
    /// `healthy_panic_threshold`, in percent.
    pub(crate) panic_threshold: RuntimeInteger,
    /// Bit `1 << status` for each EDS status that an override host may have.
    pub(crate) override_statuses: u32,
}

#[derive(Debug)]
pub(crate) enum Kind {
    RoundRobin {
        slow_start: Option<Box<SlowStart>>,
    },
    LeastRequest(Box<LeastRequest>),
    Random,
    Hash(HashPolicy),
    /// The cluster knows where to go: ORIGINAL_DST.
    ClusterProvided,
}

#[derive(Debug)]
pub(crate) struct LeastRequest {
    pub(crate) choice_count: u32,
    pub(crate) bias: RuntimeDouble,
    pub(crate) full_scan: bool,
    pub(crate) slow_start: Option<Box<SlowStart>>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct HashPolicy {
    pub(crate) table: TableKind,
    pub(crate) by_hostname: bool,
    /// In percent, at least 100; zero is unbounded.
    pub(crate) balance_factor: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum TableKind {
    Ring { min: u64, max: u64, murmur: bool },
    Maglev { size: u64 },
}

#[derive(Debug)]
pub(crate) struct SlowStart {
    pub(crate) window: Duration,
    pub(crate) aggression: RuntimeDouble,
    pub(crate) min_weight: f64,
}

#[derive(Debug)]
pub(crate) enum LocalityPolicy {
    /// Nothing, unless the proxy knows its own cluster.
    ZoneAware(Box<ZoneAware>),
    Weighted,
    Ignored,
}

#[derive(Debug)]
pub(crate) struct ZoneAware {
    pub(crate) enabled: RuntimeFraction,
    pub(crate) min_cluster_size: RuntimeInteger,
    pub(crate) fail_traffic_on_panic: bool,
    /// Hosts that the local zone must have to take everything, whatever the share of the callers in it.
    pub(crate) force_local_min: Option<u32>,
}

const MAX_RING: u64 = 8 << 20;
/// The largest table that Envoy takes.
const MAX_MAGLEV: u64 = 5_000_011;
const DEFAULT_MAGLEV: u64 = 65_537;

impl LbPolicy {
    /// Compiles whichever fields of the cluster say how it is balanced.
    pub(crate) fn compile(proto: &pb::Cluster, runtime: &Runtime) -> Result<Self, ConfigError> {
        let common = proto.common_lb_config.clone().unwrap_or_default();
        let pb::cluster::CommonLbConfig {
            healthy_panic_threshold,
            // Each update is published by one swap, and costs the same merged or not.
            update_merge_window: _,
            // Hosts are only unchecked while there is active health checking.
            ignore_new_hosts_until_first_hc: _,
            // Compiled by the cluster.
            close_connections_on_host_set_change: _,
            // Read where the policies are compiled, below.
            consistent_hashing_lb_config: _,
            locality_config_specifier: _,
            override_host_status,
        } = &common;
        let panic = healthy_panic_threshold.as_ref().map_or(50.0, |percent| percent.value);
        if !(0.0..=100.0).contains(&panic) {
            return Err(
                ConfigError::field("healthy_panic_threshold", "must be a percentage").at("common_lb_config")
            );
        }
        let default_statuses = [
            core::HealthStatus::Unknown as i32,
            core::HealthStatus::Healthy as i32,
            core::HealthStatus::Degraded as i32,
        ];
        let statuses = override_host_status.as_ref().map_or(&default_statuses[..], |set| &set.statuses);
        let override_statuses = statuses
            .iter()
            .filter(|status| (0..=5).contains(*status))
            .fold(0, |bits, status| bits | 1 << status);

        let mut policy = Self {
            kind: Kind::Random,
            locality: LocalityPolicy::Ignored,
            subset: None,
            // Envoy truncates the percentage to an integer.
            panic_threshold: runtime.integer("upstream.healthy_panic_threshold", panic as u64),
            override_statuses,
        };
        if let Some(typed) = &proto.load_balancing_policy {
            refuse(
                "lb_subset_config",
                proto.lb_subset_config.is_some(),
                "load_balancing_policy replaces it",
            )?;
            policy.typed(typed, runtime).at(|| "load_balancing_policy")?;
        } else {
            policy.legacy(proto, &common, runtime)?;
        }
        Ok(policy)
    }

    /// Envoy's name of the policy, for admin pages.
    pub fn name(&self) -> &'static str {
        match &self.kind {
            Kind::RoundRobin { .. } => "round_robin",
            Kind::LeastRequest(_) => "least_request",
            Kind::Random => "random",
            Kind::Hash(HashPolicy { table: TableKind::Ring { .. }, .. }) => "ring_hash",
            Kind::Hash(HashPolicy { table: TableKind::Maglev { .. }, .. }) => "maglev",
            Kind::ClusterProvided => "cluster_provided",
        }
    }

    /// Whether picks depend on the hash of the request.
    pub fn hashes(&self) -> bool {
        matches!(self.kind, Kind::Hash(_))
    }

    fn legacy(
        &mut self,
        proto: &pb::Cluster,
        common: &pb::cluster::CommonLbConfig,
        runtime: &Runtime,
    ) -> Result<(), ConfigError> {
        use pb::cluster::common_lb_config::LocalityConfigSpecifier;
        use pb::cluster::{LbConfig, LbPolicy as Legacy};
        let hashing = common.consistent_hashing_lb_config.unwrap_or_default();
        let balance = balance_factor(hashing.hash_balance_factor.as_ref())
            .at(|| "consistent_hashing_lb_config")
            .at(|| "common_lb_config")?;
        let hash = |table| {
            Kind::Hash(HashPolicy {
                table,
                by_hostname: hashing.use_hostname_for_hashing,
                balance_factor: balance,
            })
        };
        let config = proto.lb_config.as_ref();
        self.kind = match Legacy::try_from(proto.lb_policy) {
            Ok(Legacy::RoundRobin) => {
                let slow = match config {
                    Some(LbConfig::RoundRobinLbConfig(config)) => {
                        slow_start_legacy(config.slow_start_config.as_ref(), runtime)
                            .at(|| "round_robin_lb_config")?
                    }
                    _ => None,
                };
                Kind::RoundRobin { slow_start: slow }
            }
            Ok(Legacy::LeastRequest) => {
                let config = match config {
                    Some(LbConfig::LeastRequestLbConfig(config)) => config.clone(),
                    _ => pb::cluster::LeastRequestLbConfig::default(),
                };
                let at = || "least_request_lb_config";
                Kind::LeastRequest(Box::new(LeastRequest {
                    choice_count: choice_count(config.choice_count.as_ref()).at(at)?,
                    bias: bias(config.active_request_bias.as_ref(), runtime).at(at)?,
                    full_scan: false,
                    slow_start: slow_start_legacy(config.slow_start_config.as_ref(), runtime).at(at)?,
                }))
            }
            Ok(Legacy::Random) => Kind::Random,
            Ok(Legacy::RingHash) => {
                let config = match config {
                    Some(LbConfig::RingHashLbConfig(config)) => *config,
                    _ => pb::cluster::RingHashLbConfig::default(),
                };
                let murmur = config.hash_function
                    == pb::cluster::ring_hash_lb_config::HashFunction::MurmurHash2 as i32;
                let min = config.minimum_ring_size.as_ref();
                let max = config.maximum_ring_size.as_ref();
                hash(ring(min, max, murmur).at(|| "ring_hash_lb_config")?)
            }
            Ok(Legacy::Maglev) => {
                let size = match config {
                    Some(LbConfig::MaglevLbConfig(config)) => config.table_size,
                    _ => None,
                };
                hash(maglev(size.as_ref()).at(|| "maglev_lb_config")?)
            }
            Ok(Legacy::ClusterProvided) => Kind::ClusterProvided,
            Ok(Legacy::LoadBalancingPolicyConfig) => {
                return Err(ConfigError::field("load_balancing_policy", "must be set"));
            }
            Err(_) => return Err(ConfigError::field("lb_policy", "unknown value")),
        };
        self.locality = match &common.locality_config_specifier {
            Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => LocalityPolicy::Weighted,
            _ if self.hashes() => LocalityPolicy::Ignored,
            Some(LocalityConfigSpecifier::ZoneAwareLbConfig(config)) => zone_aware(
                config.routing_enabled.as_ref().map(|percent| percent.value),
                config.min_cluster_size.as_ref(),
                config.fail_traffic_on_panic,
                None,
                runtime,
            ),
            None => zone_aware(None, None, false, None, runtime),
        };
        if let Some(subset) = &proto.lb_subset_config {
            self.subset = SubsetConfig::compile_legacy(subset).at(|| "lb_subset_config")?.map(Box::new);
        }
        Ok(())
    }

    /// Takes the first policy of the list that is known.
    fn typed(&mut self, proto: &pb::LoadBalancingPolicy, runtime: &Runtime) -> Result<(), ConfigError> {
        let mut names = Vec::new();
        for (i, policy) in proto.policies.iter().enumerate() {
            let Some(extension) = &policy.typed_extension_config else { continue };
            let Some(any) = &extension.typed_config else { continue };
            let at = || format!("policies[{i}]");
            if self.one(any, runtime).at(|| extension.name.clone()).at(at)? {
                return Ok(());
            }
            names.push(type_name(any));
        }
        Err(ConfigError::field(
            "policies",
            format!("no supported load balancing policy among [{}]", names.join(", ")),
        ))
    }

    fn one(&mut self, any: &wkt::Any, runtime: &Runtime) -> Result<bool, ConfigError> {
        let Some(name) = type_name(any).strip_prefix("envoy.extensions.load_balancing_policies.") else {
            return Ok(false);
        };
        match name {
            "round_robin.v3.RoundRobin" => {
                let lbp::round_robin::v3::RoundRobin { slow_start_config, locality_lb_config } = unpack(any)?;
                self.kind = Kind::RoundRobin { slow_start: slow_start(slow_start_config.as_ref(), runtime)? };
                self.locality = locality(locality_lb_config.as_ref(), runtime)?;
            }
            "least_request.v3.LeastRequest" => {
                let lbp::least_request::v3::LeastRequest {
                    choice_count: choices,
                    active_request_bias,
                    slow_start_config,
                    locality_lb_config,
                    enable_full_scan,
                    selection_method,
                } = unpack(any)?;
                let full = lbp::least_request::v3::least_request::SelectionMethod::FullScan as i32;
                self.kind = Kind::LeastRequest(Box::new(LeastRequest {
                    choice_count: choice_count(choices.as_ref())?,
                    bias: bias(active_request_bias.as_ref(), runtime)?,
                    full_scan: selection_method == full || enable_full_scan.is_some_and(|flag| flag.value),
                    slow_start: slow_start(slow_start_config.as_ref(), runtime)?,
                }));
                self.locality = locality(locality_lb_config.as_ref(), runtime)?;
            }
            "random.v3.Random" => {
                let lbp::random::v3::Random { locality_lb_config } = unpack(any)?;
                self.kind = Kind::Random;
                self.locality = locality(locality_lb_config.as_ref(), runtime)?;
            }
            "ring_hash.v3.RingHash" => {
                let lbp::ring_hash::v3::RingHash {
                    hash_function,
                    minimum_ring_size,
                    maximum_ring_size,
                    use_hostname_for_hashing,
                    hash_balance_factor,
                    consistent_hashing_lb_config,
                    locality_weighted_lb_config,
                } = unpack(any)?;
                let murmur = hash_function == lbp::ring_hash::v3::ring_hash::HashFunction::MurmurHash2 as i32;
                let table = ring(minimum_ring_size.as_ref(), maximum_ring_size.as_ref(), murmur)?;
                let mut policy = hashing(table, consistent_hashing_lb_config.as_ref())?;
                if consistent_hashing_lb_config.is_none() {
                    policy.by_hostname = use_hostname_for_hashing;
                    policy.balance_factor = balance_factor(hash_balance_factor.as_ref())?;
                }
                self.kind = Kind::Hash(policy);
                self.locality = weighted(locality_weighted_lb_config.is_some());
            }
            "maglev.v3.Maglev" => {
                let lbp::maglev::v3::Maglev {
                    table_size,
                    consistent_hashing_lb_config,
                    locality_weighted_lb_config,
                } = unpack(any)?;
                let table = maglev(table_size.as_ref())?;
                self.kind = Kind::Hash(hashing(table, consistent_hashing_lb_config.as_ref())?);
                self.locality = weighted(locality_weighted_lb_config.is_some());
            }
            "wrr_locality.v3.WrrLocality" => {
                let lbp::wrr_locality::v3::WrrLocality { endpoint_picking_policy } = unpack(any)?;
                let inner = endpoint_picking_policy
                    .ok_or_else(|| ConfigError::field("endpoint_picking_policy", "must be set"))?;
                self.typed(&inner, runtime).at(|| "endpoint_picking_policy")?;
                self.locality = LocalityPolicy::Weighted;
            }
            "subset.v3.Subset" => {
                let mut subset: lbp::subset::v3::Subset = unpack(any)?;
                let inner = subset
                    .subset_lb_policy
                    .take()
                    .ok_or_else(|| ConfigError::field("subset_lb_policy", "must be set"))?;
                self.typed(&inner, runtime).at(|| "subset_lb_policy")?;
                if self.subset.is_some() {
                    return Err(ConfigError::field("subset_lb_policy", "subsets do not nest"));
                }
                self.subset = SubsetConfig::compile(&subset)?.map(Box::new);
            }
            "cluster_provided.v3.ClusterProvided" => {
                self.kind = Kind::ClusterProvided;
                self.locality = LocalityPolicy::Ignored;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn weighted(on: bool) -> LocalityPolicy {
    if on { LocalityPolicy::Weighted } else { LocalityPolicy::Ignored }
}

fn hashing(
    table: TableKind,
    config: Option<&lbp::common::v3::ConsistentHashingLbConfig>,
) -> Result<HashPolicy, ConfigError> {
    let Some(config) = config else {
        return Ok(HashPolicy { table, by_hostname: false, balance_factor: 0 });
    };
    let lbp::common::v3::ConsistentHashingLbConfig {
        use_hostname_for_hashing,
        hash_balance_factor,
        hash_policy,
    } = config;
    let at = || "consistent_hashing_lb_config";
    refuse("hash_policy", !hash_policy.is_empty(), "set it on the route").at(at)?;
    Ok(HashPolicy {
        table,
        by_hostname: *use_hostname_for_hashing,
        balance_factor: balance_factor(hash_balance_factor.as_ref()).at(at)?,
    })
}

fn balance_factor(value: Option<&wkt::UInt32Value>) -> Result<u32, ConfigError> {
    match u32_value(value) {
        None | Some(0) => Ok(0),
        Some(factor) if factor >= 100 => Ok(factor),
        Some(_) => Err(ConfigError::field("hash_balance_factor", "must be at least 100")),
    }
}

fn ring(
    min: Option<&wkt::UInt64Value>,
    max: Option<&wkt::UInt64Value>,
    murmur: bool,
) -> Result<TableKind, ConfigError> {
    let min = min.map_or(1024, |value| value.value);
    let max = max.map_or(MAX_RING, |value| value.value);
    if min > MAX_RING {
        return Err(ConfigError::field("minimum_ring_size", "must be at most 8388608"));
    }
    if max > MAX_RING {
        return Err(ConfigError::field("maximum_ring_size", "must be at most 8388608"));
    }
    if min > max {
        return Err(ConfigError::new(format!(
            "ring hash: minimum_ring_size ({min}) > maximum_ring_size ({max})"
        )));
    }
    Ok(TableKind::Ring { min, max, murmur })
}

fn maglev(size: Option<&wkt::UInt64Value>) -> Result<TableKind, ConfigError> {
    let size = size.map_or(DEFAULT_MAGLEV, |value| value.value);
    let prime = size >= 2
        && (2..).take_while(|factor| factor * factor <= size).all(|factor| !size.is_multiple_of(factor));
    if size > MAX_MAGLEV || !prime {
        return Err(ConfigError::field(
            "table_size",
            "The table size of maglev must be prime number up to 5000011",
        ));
    }
    Ok(TableKind::Maglev { size })
}

fn choice_count(value: Option<&wkt::UInt32Value>) -> Result<u32, ConfigError> {
    match u32_value(value) {
        None => Ok(2),
        Some(count) if count >= 2 => Ok(count),
        Some(_) => Err(ConfigError::field("choice_count", "must be at least 2")),
    }
}

fn bias(proto: Option<&core::RuntimeDouble>, runtime: &Runtime) -> Result<RuntimeDouble, ConfigError> {
    match proto {
        None => Ok(RuntimeDouble::fixed(1.0)),
        Some(bias) if bias.default_value < 0.0 => {
            Err(ConfigError::field("active_request_bias", "must not be negative"))
        }
        Some(bias) => Ok(runtime.double(&bias.runtime_key, bias.default_value)),
    }
}

fn slow_start_legacy(
    proto: Option<&pb::cluster::SlowStartConfig>,
    runtime: &Runtime,
) -> Result<Option<Box<SlowStart>>, ConfigError> {
    let Some(pb::cluster::SlowStartConfig { slow_start_window, aggression, min_weight_percent }) =
        proto.cloned()
    else {
        return Ok(None);
    };
    slow_start(
        Some(&lbp::common::v3::SlowStartConfig { slow_start_window, aggression, min_weight_percent }),
        runtime,
    )
}

fn slow_start(
    proto: Option<&lbp::common::v3::SlowStartConfig>,
    runtime: &Runtime,
) -> Result<Option<Box<SlowStart>>, ConfigError> {
    let Some(proto) = proto else { return Ok(None) };
    let at = || "slow_start_config";
    let Some(window) = positive("slow_start_window", proto.slow_start_window.as_ref()).at(at)? else {
        return Ok(None);
    };
    let aggression = match &proto.aggression {
        None => RuntimeDouble::fixed(1.0),
        Some(aggression) if aggression.default_value <= 0.0 => {
            return Err(ConfigError::field("aggression", "must be positive").at(at()));
        }
        Some(aggression) => runtime.double(&aggression.runtime_key, aggression.default_value),
    };
    let min_weight = proto.min_weight_percent.as_ref().map_or(10.0, |percent| percent.value) / 100.0;
    Ok(Some(Box::new(SlowStart { window, aggression, min_weight })))
}

fn locality(
    proto: Option<&lbp::common::v3::LocalityLbConfig>,
    runtime: &Runtime,
) -> Result<LocalityPolicy, ConfigError> {
    use lbp::common::v3::locality_lb_config::LocalityConfigSpecifier;
    Ok(match proto.and_then(|proto| proto.locality_config_specifier.as_ref()) {
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => LocalityPolicy::Weighted,
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(config)) => {
            let force = config.force_locality_direct_routing;
            let at = || "locality_lb_config.zone_aware_lb_config";
            refuse("locality_basis", config.locality_basis != 0, "localities are compared by their hosts")
                .at(at)?;
            let min =
                config.force_local_zone.as_ref().map(|zone| u32_value(zone.min_size.as_ref()).unwrap_or(1));
            zone_aware(
                config.routing_enabled.as_ref().map(|percent| percent.value),
                config.min_cluster_size.as_ref(),
                config.fail_traffic_on_panic,
                min.or(force.then_some(1)),
                runtime,
            )
        }
        None => zone_aware(None, None, false, None, runtime),
    })
}

fn zone_aware(
    enabled: Option<f64>,
    min_size: Option<&wkt::UInt64Value>,
    fail_traffic_on_panic: bool,
    force_local_min: Option<u32>,
    runtime: &Runtime,
) -> LocalityPolicy {
    // A percentage may have decimals: hundredths of a percent are kept.
    let numerator = (enabled.unwrap_or(100.0).clamp(0.0, 100.0) * 100.0).round() as u32;
    let default = Fraction { numerator, denominator: Denominator::TenThousand };
    LocalityPolicy::ZoneAware(Box::new(ZoneAware {
        enabled: runtime.fraction("upstream.zone_routing.enabled", default),
        min_cluster_size: runtime
            .integer("upstream.zone_routing.min_cluster_size", min_size.map_or(6, |size| size.value)),
        fail_traffic_on_panic,
        force_local_min,
    }))
}
