//! Where a route sends its requests.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_action::ClusterSpecifier as Proto;
use pb::weighted_cluster::RandomValueSpecifier;
use pb::weighted_cluster::cluster_weight::HostRewriteSpecifier;
use waystation_filter_api::cell::Cell;
use waystation_filter_api::runtime::RuntimeInteger;
use waystation_filter_api::value::{Struct, struct_from_proto};
use waystation_http::{HeaderName, Headers};
use waystation_schema::{At, ConfigError};

use crate::filter_config::{FilterConfigs, FilterLevels, FilterSlot};
use crate::mutations::Mutations;
use crate::table::Compiler;

pub use waystation_upstream::{Cluster, MetadataMatch, Priority};

/// The cell a route holds: empty while the cluster does not exist.
pub type ClusterCell = Arc<Cell<Cluster>>;

/// A compiled `cluster_specifier`.
#[derive(Debug)]
pub enum ClusterSpecifier {
    /// One cluster.
    Cluster(ClusterCell),
    /// The cluster that a request header names.
    Header(HeaderName),
    /// One of several, by weight.
    Weighted(Box<WeightedClusters>),
}

/// A cluster, by cell or by the name that a header gave.
#[derive(Clone, Copy, Debug)]
pub enum ClusterRef<'a> {
    /// Resolved when the route was compiled.
    Cell(&'a ClusterCell),
    /// Named by the request, to be found in the table of clusters; empty when the header is missing, which is a
    /// cluster that does not exist.
    Named(&'a [u8]),
}

/// Where one request goes.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The cluster.
    pub cluster: ClusterRef<'a>,
    /// The weighted cluster that was picked: a level of its own for headers, filters and rewrites.
    pub weighted: Option<&'a WeightedCluster>,
}

/// Compiled `WeightedCluster`.
#[derive(Debug)]
pub struct WeightedClusters {
    clusters: Box<[WeightedCluster]>,
    /// The sum of the configured weights; with runtime keys the sum is taken anew.
    total: u64,
    runtime: bool,
    /// `header_name`: the header that carries the random value.
    random_header: Option<HeaderName>,
    /// `use_hash_policy`: the request's hash is the random value.
    use_hash: bool,
}

/// Compiled `WeightedCluster.ClusterWeight`.
#[derive(Debug)]
pub struct WeightedCluster {
    specifier: WeightedSpecifier,
    weight: RuntimeInteger,
    /// `metadata_match` merged over the route's.
    pub metadata_match: Option<MetadataMatch>,
    /// `host_rewrite_literal`, which a rewrite of the route overrides.
    pub host_rewrite: Option<Box<str>>,
    pub(crate) request_mutations: Mutations,
    pub(crate) response_mutations: Mutations,
    filters: FilterConfigs,
}

#[derive(Debug)]
enum WeightedSpecifier {
    Cluster(ClusterCell),
    Header(HeaderName),
}

impl ClusterSpecifier {
    pub(crate) fn compile(
        proto: Option<&Proto>,
        criteria: &Struct,
        levels: &FilterConfigs,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        match proto {
            None => Err(ConfigError::field("cluster_specifier", "is required")),
            Some(Proto::Cluster(name)) => Ok(Self::Cluster(compiler.cluster(name).at(|| "cluster")?)),
            Some(Proto::ClusterHeader(name)) => Ok(Self::Header(header("cluster_header", name)?)),
            Some(Proto::WeightedClusters(weighted)) => {
                let weighted = WeightedClusters::compile(weighted, criteria, levels, compiler);
                Ok(Self::Weighted(Box::new(weighted.at(|| "weighted_clusters")?)))
            }
            Some(Proto::ClusterSpecifierPlugin(name)) => {
                let reason = format!("not supported: cluster specifier plugin `{name}`");
                Err(ConfigError::field("cluster_specifier_plugin", reason))
            }
            Some(Proto::InlineClusterSpecifierPlugin(_)) => Err(ConfigError::field(
                "inline_cluster_specifier_plugin",
                "not supported: cluster specifier plugins",
            )),
        }
    }

    /// Picks the cluster for a request. `random` is the stream's random value, `hash` that of the hash policies,
    /// asked for only by weighted clusters with `use_hash_policy`.
    pub fn pick<'a>(
        &'a self,
        headers: &'a Headers,
        random: u64,
        hash: impl FnOnce() -> Option<u64>,
    ) -> Target<'a> {
        match self {
            Self::Cluster(cell) => Target { cluster: ClusterRef::Cell(cell), weighted: None },
            Self::Header(name) => Target { cluster: named(headers, name), weighted: None },
            Self::Weighted(weighted) => {
                let picked = weighted.pick(weighted.random_value(headers, random, hash));
                let cluster = match &picked.specifier {
                    WeightedSpecifier::Cluster(cell) => ClusterRef::Cell(cell),
                    WeightedSpecifier::Header(name) => named(headers, name),
                };
                Target { cluster, weighted: Some(picked) }
            }
        }
    }
}

impl WeightedClusters {
    fn compile(
        proto: &pb::WeightedCluster,
        criteria: &Struct,
        levels: &FilterConfigs,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        #[expect(deprecated, reason = "named to show that it is ignored")]
        let pb::WeightedCluster {
            clusters,
            // Deprecated; Envoy takes the sum of the weights, too.
            total_weight: _,
            runtime_key_prefix,
            random_value_specifier,
        } = proto;
        if clusters.is_empty() {
            return Err(ConfigError::field("clusters", "must not be empty"));
        }
        let mut compiled = Vec::with_capacity(clusters.len());
        let mut total = 0u64;
        for (index, cluster) in clusters.iter().enumerate() {
            total += u64::from(cluster.weight.map_or(0, |weight| weight.value));
            let cluster = WeightedCluster::compile(cluster, runtime_key_prefix, criteria, levels, compiler);
            compiled.push(cluster.at(|| format!("clusters[{index}]"))?);
        }
        if total == 0 {
            return Err(ConfigError::new("Sum of weights in the weighted_cluster must be greater than 0."));
        }
        if total > u64::from(u32::MAX) {
            return Err(ConfigError::new(format!("the sum of weights {total} exceeds {}", u32::MAX)));
        }
        let (random_header, use_hash) = match random_value_specifier {
            None => (None, false),
            Some(RandomValueSpecifier::HeaderName(name)) => (Some(header("header_name", name)?), false),
            Some(RandomValueSpecifier::UseHashPolicy(wanted)) => (None, wanted.value),
        };
        let runtime = !runtime_key_prefix.is_empty();
        Ok(Self { clusters: compiled.into(), total, runtime, random_header, use_hash })
    }

    /// The clusters, in the order of the configuration.
    pub fn clusters(&self) -> &[WeightedCluster] {
        &self.clusters
    }

    /// Picks by `value`: the clusters share `[0, total)` in their order.
    pub fn pick(&self, value: u64) -> &WeightedCluster {
        let total = if self.runtime {
            self.clusters.iter().map(|cluster| cluster.weight.get()).sum()
        } else {
            self.total
        };
        // Runtime may have set every weight to 0: the first cluster then takes all.
        let selected = value.checked_rem(total).unwrap_or(0);
        let mut end = 0u64;
        let found = self.clusters.iter().find(|cluster| {
            end = end.saturating_add(cluster.weight.get());
            selected < end
        });
        found.unwrap_or(&self.clusters[0])
    }

    fn random_value(&self, headers: &Headers, random: u64, hash: impl FnOnce() -> Option<u64>) -> u64 {
        if self.use_hash {
            return hash().unwrap_or(random);
        }
        let Some(name) = &self.random_header else { return random };
        let mut values = headers.get_all(name);
        match (values.next(), values.next()) {
            (Some(value), None) => {
                str::from_utf8(value).ok().and_then(|text| text.trim_ascii().parse().ok()).unwrap_or(random)
            }
            _ => random,
        }
    }
}

impl WeightedCluster {
    fn compile(
        proto: &pb::weighted_cluster::ClusterWeight,
        runtime_key_prefix: &str,
        route_criteria: &Struct,
        levels: &FilterConfigs,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        let pb::weighted_cluster::ClusterWeight {
            name,
            cluster_header,
            weight,
            metadata_match,
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            typed_per_filter_config,
            host_rewrite_specifier,
        } = proto;
        let specifier = match (&**name, &**cluster_header) {
            ("", "") => {
                return Err(ConfigError::new("At least one of name or cluster_header need to be specified"));
            }
            (name, "") => WeightedSpecifier::Cluster(compiler.cluster(name).at(|| "name")?),
            ("", header_name) => WeightedSpecifier::Header(header("cluster_header", header_name)?),
            _ => return Err(ConfigError::new("Only one of name or cluster_header can be specified")),
        };
        let mut merged = route_criteria.clone();
        merged.extend(criteria(metadata_match.as_ref()));
        let weight = u64::from(weight.map_or(0, |weight| weight.value));
        let weight = if runtime_key_prefix.is_empty() {
            RuntimeInteger::fixed(weight)
        } else {
            compiler.cx.runtime.integer(&format!("{runtime_key_prefix}.{name}"), weight)
        };
        Ok(Self {
            specifier,
            weight,
            metadata_match: MetadataMatch::compile(&merged).at(|| "metadata_match")?,
            host_rewrite: host_rewrite_specifier
                .as_ref()
                .map(|HostRewriteSpecifier::HostRewriteLiteral(host)| host.as_str().into()),
            request_mutations: Mutations::compile(
                request_headers_to_add,
                request_headers_to_remove,
                "request",
            )?,
            response_mutations: Mutations::compile(
                response_headers_to_add,
                response_headers_to_remove,
                "response",
            )?,
            filters: compiler.filters.level(levels, typed_per_filter_config, compiler.cx)?,
        })
    }

    /// What all levels say about a filter when this cluster was picked.
    pub fn filter_config(&self, slot: FilterSlot) -> FilterLevels<'_> {
        self.filters.get(slot)
    }
}

/// The criteria of a `metadata_match`: what the namespace `envoy.lb` asks of endpoints.
pub(crate) fn criteria(proto: Option<&core::Metadata>) -> Struct {
    let fields = proto.and_then(|metadata| metadata.filter_metadata.get("envoy.lb"));
    fields.map(struct_from_proto).unwrap_or_default()
}

fn named<'a>(headers: &'a Headers, name: &HeaderName) -> ClusterRef<'a> {
    ClusterRef::Named(headers.get(name).unwrap_or_default())
}

pub(crate) fn header(field: &str, name: &str) -> Result<HeaderName, ConfigError> {
    HeaderName::parse(name).map_err(|error| ConfigError::field(field, error.to_string()))
}
