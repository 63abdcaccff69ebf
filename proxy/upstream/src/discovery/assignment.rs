//! `ClusterLoadAssignment`, compiled: what EDS sends and what a cluster's `load_assignment` holds.

#![expect(deprecated, reason = "control planes still send deprecated fields, and Envoy reads them")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use waystation_filter_api::address::Address;
use waystation_filter_api::runtime::Fraction;
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire::{positive, refuse, u32_value};
use waystation_schema::{At, ConfigError};

use crate::host::{HealthCheckTarget, HostDetails, Locality};
use crate::host_set::{AssignmentPolicy, DropOverload};
use crate::target::{Target, resolved, target};

/// The endpoints of a cluster as they are configured, before names are resolved.
#[derive(Clone, Debug, Default)]
pub struct Assignment {
    pub(crate) localities: Vec<LocalityAssignment>,
    pub(crate) policy: AssignmentPolicy,
    /// `endpoint_stale_after`.
    pub stale_after: Option<Duration>,
}

#[derive(Clone, Debug)]
pub(crate) struct LocalityAssignment {
    pub(crate) locality: Arc<Locality>,
    pub(crate) priority: u32,
    pub(crate) weight: u32,
    pub(crate) metadata: Option<Arc<Metadata>>,
    pub(crate) endpoints: Vec<EndpointSpec>,
}

#[derive(Clone, Debug)]
pub(crate) struct EndpointSpec {
    pub(crate) target: Target,
    pub(crate) weight: u32,
    pub(crate) status: core::HealthStatus,
    pub(crate) metadata: Option<Arc<Metadata>>,
    pub(crate) details: Option<HostDetails>,
}

/// Envoy's bound on `priority`.
const MAX_PRIORITY: u32 = 128;

impl Assignment {
    /// Compiles an assignment.
    ///
    /// # Errors
    /// When a field is invalid, or set but not supported.
    pub fn compile(proto: &pb::ClusterLoadAssignment) -> Result<Self, ConfigError> {
        let pb::ClusterLoadAssignment {
            // Whoever subscribed knows the name.
            cluster_name: _,
            endpoints,
            named_endpoints,
            policy,
        } = proto;
        let mut interned: HashMap<Locality, Arc<Locality>> = HashMap::new();
        let mut localities = Vec::with_capacity(endpoints.len());
        for (i, locality) in endpoints.iter().enumerate() {
            let compiled = LocalityAssignment::compile(locality, named_endpoints, &mut interned)
                .at(|| format!("endpoints[{i}]"))?;
            localities.push(compiled);
        }
        let (policy, stale_after) = match policy {
            None => (AssignmentPolicy::default(), None),
            Some(policy) => compile_policy(policy).at(|| "policy")?,
        };
        Ok(Self { localities, policy, stale_after })
    }

    /// The names to resolve, each with its place: locality and endpoint.
    pub(crate) fn names(&self) -> impl Iterator<Item = (usize, usize, &str, u16)> {
        self.localities.iter().enumerate().flat_map(|(l, locality)| {
            locality.endpoints.iter().enumerate().filter_map(move |(e, endpoint)| match &endpoint.target {
                Target::Name(name, port) => Some((l, e, &**name, *port)),
                Target::Address(_) => None,
            })
        })
    }

    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.localities.iter().map(|locality| locality.endpoints.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Refuses endpoints that need DNS.
    pub(crate) fn require_addresses(&self) -> Result<(), ConfigError> {
        match self.names().next() {
            None => Ok(()),
            Some((l, e, name, _)) => Err(ConfigError::new(format!(
                "malformed IP address: {name}. Consider setting resolver_name or setting cluster type to \
                 'STRICT_DNS' or 'LOGICAL_DNS'"
            ))
            .at(format!("lb_endpoints[{e}].endpoint.address"))
            .at(format!("endpoints[{l}]"))),
        }
    }
}

impl LocalityAssignment {
    fn compile(
        proto: &pb::LocalityLbEndpoints,
        named: &HashMap<String, pb::Endpoint>,
        interned: &mut HashMap<Locality, Arc<Locality>>,
    ) -> Result<Self, ConfigError> {
        let pb::LocalityLbEndpoints {
            locality,
            metadata,
            lb_endpoints,
            load_balancing_weight,
            priority,
            // Envoy does not read it either.
            proximity: _,
            lb_config,
        } = proto;
        if *priority > MAX_PRIORITY {
            return Err(ConfigError::field("priority", "must be at most 128"));
        }
        let listed = match lb_config {
            None => lb_endpoints,
            Some(pb::locality_lb_endpoints::LbConfig::LoadBalancerEndpoints(list)) => &list.lb_endpoints,
            Some(pb::locality_lb_endpoints::LbConfig::LedsClusterLocalityConfig(_)) => {
                return Err(ConfigError::field("leds_cluster_locality_config", "not supported: LEDS"));
            }
        };
        let weight = match u32_value(load_balancing_weight.as_ref()) {
            Some(0) => return Err(ConfigError::field("load_balancing_weight", "must be at least 1")),
            weight => weight.unwrap_or(0),
        };
        let locality = locality.as_ref().map(Locality::from_proto).unwrap_or_default();
        let locality =
            Arc::clone(interned.entry(locality.clone()).or_insert_with(|| shared_locality(locality)));
        let endpoints = listed
            .iter()
            .enumerate()
            .map(|(i, endpoint)| EndpointSpec::compile(endpoint, named).at(|| format!("lb_endpoints[{i}]")))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            locality,
            priority: *priority,
            weight,
            metadata: compile_metadata(metadata.as_ref()),
            endpoints,
        })
    }
}

impl EndpointSpec {
    fn compile(proto: &pb::LbEndpoint, named: &HashMap<String, pb::Endpoint>) -> Result<Self, ConfigError> {
        let pb::LbEndpoint { health_status, metadata, load_balancing_weight, host_identifier } = proto;
        let endpoint = match host_identifier {
            Some(pb::lb_endpoint::HostIdentifier::Endpoint(endpoint)) => endpoint,
            Some(pb::lb_endpoint::HostIdentifier::EndpointName(name)) => {
                named.get(name).ok_or_else(|| {
                    ConfigError::field("endpoint_name", format!("{name} is not among named_endpoints"))
                })?
            }
            None => return Err(ConfigError::field("endpoint", "must be set")),
        };
        let pb::Endpoint { address, health_check_config, hostname, additional_addresses, observability_name } =
            endpoint;
        let at = || "endpoint";
        refuse("observability_name", !observability_name.is_empty(), "endpoints are shown by address")
            .at(at)?;
        let missing = || ConfigError::field("address", "must be set").at(at());
        let target = target(address.as_ref().ok_or_else(missing)?).at(|| "address").at(at)?;
        let mut additional = Vec::with_capacity(additional_addresses.len());
        for (i, extra) in additional_addresses.iter().enumerate() {
            let missing = || ConfigError::field("address", "must be set");
            let compiled = extra.address.as_ref().ok_or_else(missing).and_then(resolved);
            additional.push(compiled.at(|| format!("additional_addresses[{i}]")).at(at)?);
        }
        if !additional.is_empty() && !matches!(target, Target::Address(Address::Ip(_))) {
            return Err(ConfigError::field("additional_addresses", "only beside an IP address").at(at()));
        }
        let health_check = health_check_config
            .as_ref()
            .map(|config| health_check_target(config, &target))
            .transpose()
            .at(|| "health_check_config")
            .at(at)?;
        let details = HostDetails {
            hostname: hostname.as_str().into(),
            additional_addresses: additional.into(),
            health_check,
        };
        let weight = match u32_value(load_balancing_weight.as_ref()) {
            Some(0) => return Err(ConfigError::field("load_balancing_weight", "must be at least 1")),
            weight => weight.unwrap_or(1),
        };
        let status = core::HealthStatus::try_from(*health_status)
            .map_err(|_| ConfigError::field("health_status", "unknown value"))?;
        Ok(Self {
            target,
            weight,
            status,
            metadata: compile_metadata(metadata.as_ref()),
            details: (details != HostDetails::default()).then_some(details),
        })
    }
}

fn health_check_target(
    proto: &pb::endpoint::HealthCheckConfig,
    target: &Target,
) -> Result<HealthCheckTarget, ConfigError> {
    let pb::endpoint::HealthCheckConfig { port_value, hostname, address, disable_active_health_check } =
        proto;
    let address = address.as_ref().map(resolved).transpose().at(|| "address")?;
    let port = match *port_value {
        0 => None,
        port => {
            Some(u16::try_from(port).map_err(|_| ConfigError::field("port_value", "must be at most 65535"))?)
        }
    };
    let has_port = match (&address, target) {
        (Some(address), _) | (None, Target::Address(address)) => matches!(address, Address::Ip(_)),
        // It will be resolved.
        (None, Target::Name(..)) => true,
    };
    if port.is_some() && !has_port {
        return Err(ConfigError::field("port_value", "only for IP addresses"));
    }
    Ok(HealthCheckTarget {
        address,
        port,
        hostname: hostname.as_str().into(),
        disabled: *disable_active_health_check,
    })
}

fn compile_policy(
    proto: &pb::cluster_load_assignment::Policy,
) -> Result<(AssignmentPolicy, Option<Duration>), ConfigError> {
    let pb::cluster_load_assignment::Policy {
        drop_overloads,
        overprovisioning_factor,
        endpoint_stale_after,
        weighted_priority_health,
    } = proto;
    let overprovisioning_factor = match u32_value(overprovisioning_factor.as_ref()) {
        Some(0) => return Err(ConfigError::field("overprovisioning_factor", "must be positive")),
        factor => factor.unwrap_or(140),
    };
    // Envoy takes one: "Cluster drop_overloads config has more than one category".
    if drop_overloads.len() > 1 {
        return Err(ConfigError::field("drop_overloads", "only one category is supported"));
    }
    let drop_overloads = drop_overloads
        .iter()
        .map(|overload| DropOverload {
            category: overload.category.as_str().into(),
            share: overload.drop_percentage.as_ref().map_or(Fraction::NEVER, Fraction::from_proto),
        })
        .collect();
    let policy = AssignmentPolicy {
        overprovisioning_factor,
        weighted_priority_health: *weighted_priority_health,
        drop_overloads,
    };
    Ok((policy, positive("endpoint_stale_after", endpoint_stale_after.as_ref())?))
}

fn compile_metadata(proto: Option<&core::Metadata>) -> Option<Arc<Metadata>> {
    let metadata = Metadata::from_proto(proto?);
    (!metadata.is_empty()).then(|| Arc::new(metadata))
}

/// Most clusters have no locality: they share one.
fn shared_locality(locality: Locality) -> Arc<Locality> {
    static EMPTY: std::sync::OnceLock<Arc<Locality>> = std::sync::OnceLock::new();
    if locality.is_empty() { Arc::clone(EMPTY.get_or_init(Arc::default)) } else { Arc::new(locality) }
}
