//! DNS discovery as a state machine: answers in, assignments and the time of the next query out.
//!
//! STRICT_DNS makes a host of each address; LOGICAL_DNS (and `all_addresses_in_single_endpoint`) keeps one host and moves it
//! to the first address.

#![expect(deprecated, reason = "control planes still send deprecated fields, and Envoy reads them")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::clusters::dns::v3 as dns_pb;
use envoy_types::pb::envoy::extensions::network::dns_resolver as resolver_pb;
use waystation_filter_api::address::Address;
use waystation_filter_api::wire::{duration, positive, refuse, type_name, unpack};
use waystation_schema::{At, ConfigError};

use super::assignment::{Assignment, LocalityAssignment};
use crate::host::HostDetails;
use crate::jitter::back_off;
use crate::target::{Target, resolved};

/// A DNS cluster's settings.
#[derive(Debug)]
pub struct DnsSettings {
    /// Whether there is one host that moves.
    pub logical: bool,
    /// Time between queries that succeed.
    pub refresh_rate: Duration,
    /// Back-off after failures: base and maximum; `None` is the refresh rate.
    pub failure_refresh: Option<(Duration, Duration)>,
    /// Up to this much is added to each wait.
    pub jitter: Duration,
    /// Whether the records' TTL replaces the refresh rate.
    pub respect_ttl: bool,
    /// The least wait that a TTL can cause.
    pub min_refresh: Duration,
    /// Address families.
    pub family: LookupFamily,
    /// Where to ask.
    pub resolver: ResolverSettings,
    pub(crate) assignment: Assignment,
}

/// `DnsLookupFamily`.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum LookupFamily {
    /// IPv6, and IPv4 when there is none.
    #[default]
    Auto,
    /// IPv4.
    V4Only,
    /// IPv6.
    V6Only,
    /// IPv4, and IPv6 when there is none.
    V4Preferred,
    /// Both.
    All,
}

/// Where and how to ask. Clusters with equal settings can share a resolver.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct ResolverSettings {
    /// Servers; empty means those of the system.
    pub servers: Vec<SocketAddr>,
    /// Whether to ask over TCP only.
    pub tcp: bool,
    /// Whether to leave the system's search domains out.
    pub no_search_domain: bool,
    /// Whether `servers` come after those of the system.
    pub as_fallback: bool,
}

/// A query to make.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Query<'a> {
    /// Which answer it wants: hand it back to [`DnsDiscovery::answered`].
    pub target: usize,
    /// The name.
    pub name: &'a str,
    /// The families.
    pub family: LookupFamily,
}

/// One address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DnsRecord {
    /// The address.
    pub address: IpAddr,
    /// How long it may be kept.
    pub ttl: Duration,
}

/// No answer (a name that does not exist is an empty answer, not a failure).
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct DnsFailure(pub String);

/// The state of one cluster's names.
#[derive(Debug)]
pub struct DnsDiscovery<'a> {
    settings: &'a DnsSettings,
    targets: Vec<TargetState>,
}

#[derive(Debug)]
struct TargetState {
    locality: usize,
    endpoint: usize,
    port: u16,
    addresses: Vec<IpAddr>,
    failures: u32,
    state: QueryState,
}

#[derive(Clone, Copy, Debug)]
enum QueryState {
    Due(Instant),
    Asking,
}

impl<'a> DnsDiscovery<'a> {
    /// All names are due at `now`.
    pub fn new(settings: &'a DnsSettings, now: Instant) -> Self {
        let targets = settings
            .assignment
            .names()
            .map(|(locality, endpoint, _, port)| TargetState {
                locality,
                endpoint,
                port,
                addresses: Vec::new(),
                failures: 0,
                state: QueryState::Due(now),
            })
            .collect();
        Self { settings, targets }
    }

    /// What there is to ask at `now`; each query is handed out once, until it is answered.
    pub fn due(&mut self, now: Instant) -> Vec<Query<'a>> {
        let settings = self.settings;
        let mut queries = Vec::new();
        for (index, target) in self.targets.iter_mut().enumerate() {
            if matches!(target.state, QueryState::Due(at) if at <= now) {
                target.state = QueryState::Asking;
                let spec = &settings.assignment.localities[target.locality].endpoints[target.endpoint];
                if let Target::Name(name, _) = &spec.target {
                    queries.push(Query { target: index, name, family: settings.family });
                }
            }
        }
        queries
    }

    /// When [`DnsDiscovery::due`] has something next; `None` while everything is being asked.
    pub fn next_due(&self) -> Option<Instant> {
        self.targets
            .iter()
            .filter_map(|target| match target.state {
                QueryState::Due(at) => Some(at),
                QueryState::Asking => None,
            })
            .min()
    }

    /// Takes an answer and returns the endpoints if they are to be applied. A failure keeps what is known.
    pub fn answered(
        &mut self,
        target: usize,
        answer: Result<Vec<DnsRecord>, DnsFailure>,
        now: Instant,
        rng: &mut fastrand::Rng,
    ) -> Option<Assignment> {
        let settings = self.settings;
        let state = self.targets.get_mut(target)?;
        let (wait, changed) = match answer {
            Err(_) => {
                state.failures = state.failures.saturating_add(1);
                (settings.failure_wait(state.failures, rng), false)
            }
            Ok(records) => {
                state.failures = 0;
                let ttl = records.iter().map(|record| record.ttl).min();
                state.addresses = records.into_iter().map(|record| record.address).collect();
                (settings.success_wait(ttl), true)
            }
        };
        let jitter = settings.jitter.as_millis() as u64;
        let jitter = if jitter == 0 { 0 } else { rng.u64(..=jitter) };
        state.state = QueryState::Due(now + wait + Duration::from_millis(jitter));
        changed.then(|| self.assignment())
    }

    /// The endpoints as they are known now.
    pub fn assignment(&self) -> Assignment {
        let configured = &self.settings.assignment;
        let mut localities: Vec<LocalityAssignment> = Vec::with_capacity(configured.localities.len());
        for (l, locality) in configured.localities.iter().enumerate() {
            let mut endpoints = Vec::new();
            for (e, spec) in locality.endpoints.iter().enumerate() {
                let found = self.targets.iter().find(|target| (target.locality, target.endpoint) == (l, e));
                let (Target::Name(name, _), Some(target)) = (&spec.target, found) else {
                    endpoints.push(spec.clone());
                    continue;
                };
                let mut details = spec.details.clone().unwrap_or_default();
                if details.hostname.is_empty() {
                    details.hostname = name.clone();
                }
                let at = |ip: &IpAddr| Address::Ip(SocketAddr::new(*ip, target.port));
                let mut push = |address: Address, details: HostDetails| {
                    let mut spec = spec.clone();
                    spec.target = Target::Address(address);
                    spec.details = Some(details);
                    endpoints.push(spec);
                };
                match (&*target.addresses, self.settings.logical) {
                    ([], _) => {}
                    ([first, rest @ ..], true) => {
                        details.additional_addresses = rest.iter().map(at).collect();
                        push(at(first), details);
                    }
                    (all, false) => all.iter().for_each(|ip| push(at(ip), details.clone())),
                }
            }
            localities.push(LocalityAssignment { endpoints, ..locality.clone() });
        }
        Assignment { localities, ..configured.clone() }
    }
}

impl DnsSettings {
    /// Compiles the cluster's own fields (types STRICT_DNS and LOGICAL_DNS).
    pub(crate) fn compile_legacy(
        proto: &pb::Cluster,
        assignment: Assignment,
        logical: bool,
        default: &ResolverSettings,
    ) -> Result<Self, ConfigError> {
        use pb::cluster::DnsLookupFamily;
        let family = match DnsLookupFamily::try_from(proto.dns_lookup_family) {
            Ok(DnsLookupFamily::Auto) => LookupFamily::Auto,
            Ok(DnsLookupFamily::V4Only) => LookupFamily::V4Only,
            Ok(DnsLookupFamily::V6Only) => LookupFamily::V6Only,
            Ok(DnsLookupFamily::V4Preferred) => LookupFamily::V4Preferred,
            Ok(DnsLookupFamily::All) => LookupFamily::All,
            Err(_) => return Err(ConfigError::field("dns_lookup_family", "unknown value")),
        };
        let resolver = match &proto.typed_dns_resolver_config {
            Some(typed) => ResolverSettings::compile(typed).at(|| "typed_dns_resolver_config")?,
            None => ResolverSettings::compile_legacy(proto, default)?,
        };
        let failure = proto.dns_failure_refresh_rate.as_ref();
        let failure_refresh = failure
            .map(|rate| backoff(rate.base_interval.as_ref(), rate.max_interval.as_ref()))
            .transpose()
            .at(|| "dns_failure_refresh_rate")?;
        let refresh = refresh_rate(proto.dns_refresh_rate.as_ref())?;
        let jitter = duration("dns_jitter", proto.dns_jitter.as_ref())?.unwrap_or_default();
        let settings = Self {
            logical,
            refresh_rate: refresh,
            failure_refresh,
            jitter,
            respect_ttl: proto.respect_dns_ttl,
            min_refresh: Duration::ZERO,
            family,
            resolver,
            assignment,
        };
        settings.checked()
    }

    /// Compiles `DnsCluster`.
    pub(crate) fn compile(
        proto: &dns_pb::DnsCluster,
        assignment: Assignment,
        default: &ResolverSettings,
    ) -> Result<Self, ConfigError> {
        let dns_pb::DnsCluster {
            dns_refresh_rate,
            dns_failure_refresh_rate,
            respect_dns_ttl,
            dns_jitter,
            typed_dns_resolver_config,
            dns_lookup_family,
            all_addresses_in_single_endpoint,
            dns_min_refresh_rate,
        } = proto;
        let family = match dns_lookup_family {
            0 | 1 => LookupFamily::Auto,
            2 => LookupFamily::V4Only,
            3 => LookupFamily::V6Only,
            4 => LookupFamily::V4Preferred,
            5 => LookupFamily::All,
            _ => return Err(ConfigError::field("dns_lookup_family", "unknown value")),
        };
        let resolver = match typed_dns_resolver_config {
            Some(typed) => ResolverSettings::compile(typed).at(|| "typed_dns_resolver_config")?,
            None => default.clone(),
        };
        let failure_refresh = dns_failure_refresh_rate
            .as_ref()
            .map(|rate| backoff(rate.base_interval.as_ref(), rate.max_interval.as_ref()))
            .transpose()
            .at(|| "dns_failure_refresh_rate")?;
        let settings = Self {
            logical: *all_addresses_in_single_endpoint,
            refresh_rate: refresh_rate(dns_refresh_rate.as_ref())?,
            failure_refresh,
            jitter: duration("dns_jitter", dns_jitter.as_ref())?.unwrap_or_default(),
            respect_ttl: *respect_dns_ttl,
            min_refresh: positive("dns_min_refresh_rate", dns_min_refresh_rate.as_ref())?.unwrap_or_default(),
            family,
            resolver,
            assignment,
        };
        settings.checked()
    }

    fn checked(self) -> Result<Self, ConfigError> {
        if self.logical && (self.assignment.localities.len() != 1 || self.assignment.len() != 1) {
            return Err(ConfigError::field(
                "load_assignment",
                "LOGICAL_DNS clusters must have a single locality_lb_endpoint and a single lb_endpoint",
            ));
        }
        Ok(self)
    }

    fn success_wait(&self, ttl: Option<Duration>) -> Duration {
        match ttl {
            // A TTL of zero would make a busy loop.
            Some(ttl) if self.respect_ttl && !ttl.is_zero() => ttl.max(self.min_refresh),
            _ => self.refresh_rate,
        }
    }

    /// Exponential back-off with full jitter, as Envoy's.
    fn failure_wait(&self, failures: u32, rng: &mut fastrand::Rng) -> Duration {
        let Some((base, max)) = self.failure_refresh else { return self.refresh_rate };
        // Zero would make a busy loop.
        back_off(base, max, failures, rng.u64(..)).max(Duration::from_millis(1))
    }
}

impl ResolverSettings {
    fn compile(proto: &core::TypedExtensionConfig) -> Result<Self, ConfigError> {
        let Some(any) = &proto.typed_config else {
            return Err(ConfigError::field("typed_config", "must be set"));
        };
        match type_name(any) {
            "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig" => {
                // What tunes c-ares itself (query counts, EDNS sizes, channel life) has no counterpart; timeouts are
                // those of our resolver.
                let config: resolver_pb::cares::v3::CaresDnsResolverConfig = unpack(any)?;
                let options = config.dns_resolver_options.unwrap_or_default();
                Ok(Self {
                    servers: servers(&config.resolvers)?,
                    tcp: options.use_tcp_for_dns_lookups,
                    no_search_domain: options.no_default_search_domain,
                    as_fallback: config.use_resolvers_as_fallback,
                })
            }
            // The system's resolver by another library: the same files and servers.
            "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig" => {
                Ok(Self::default())
            }
            other => Err(ConfigError::new(format!("not supported: DNS resolver {other}"))),
        }
    }

    /// What the bootstrap says of the resolver of clusters that say nothing themselves.
    ///
    /// # Errors
    /// When a server is no IP address, or the resolver is not known.
    pub fn of_bootstrap(proto: &Bootstrap) -> Result<Self, ConfigError> {
        if let Some(typed) = &proto.typed_dns_resolver_config {
            return Self::compile(typed).at(|| "typed_dns_resolver_config");
        }
        match &proto.dns_resolution_config {
            Some(config) => Self::compile_resolution(config).at(|| "dns_resolution_config"),
            None => Ok(Self { tcp: proto.use_tcp_for_dns_lookups, ..Self::default() }),
        }
    }

    fn compile_resolution(config: &core::DnsResolutionConfig) -> Result<Self, ConfigError> {
        let options = config.dns_resolver_options.unwrap_or_default();
        Ok(Self {
            servers: servers(&config.resolvers)?,
            tcp: options.use_tcp_for_dns_lookups,
            no_search_domain: options.no_default_search_domain,
            as_fallback: false,
        })
    }

    fn compile_legacy(proto: &pb::Cluster, default: &Self) -> Result<Self, ConfigError> {
        // Without servers of its own a cluster has the bootstrap's resolver as it is, options and all.
        match &proto.dns_resolution_config {
            Some(config) if config.resolvers.is_empty() => Ok(default.clone()),
            Some(config) => Self::compile_resolution(config).at(|| "dns_resolution_config"),
            None if proto.dns_resolvers.is_empty() => Ok(default.clone()),
            None => Ok(Self {
                servers: servers(&proto.dns_resolvers).at(|| "dns_resolvers")?,
                tcp: proto.use_tcp_for_dns_lookups,
                no_search_domain: false,
                as_fallback: false,
            }),
        }
    }
}

fn servers(proto: &[core::Address]) -> Result<Vec<SocketAddr>, ConfigError> {
    let mut servers = Vec::with_capacity(proto.len());
    for (i, address) in proto.iter().enumerate() {
        match resolved(address).at(|| format!("resolvers[{i}]"))? {
            Address::Ip(address) => {
                let port = if address.port() == 0 { 53 } else { address.port() };
                servers.push(SocketAddr::new(address.ip(), port));
            }
            _ => return Err(ConfigError::field(format!("resolvers[{i}]"), "must be an IP address")),
        }
    }
    Ok(servers)
}

fn refresh_rate(
    proto: Option<&envoy_types::pb::google::protobuf::Duration>,
) -> Result<Duration, ConfigError> {
    let rate = duration("dns_refresh_rate", proto)?.unwrap_or(Duration::from_secs(5));
    let tiny = rate < Duration::from_millis(1);
    refuse("dns_refresh_rate", tiny, "must be at least 1ms")?;
    Ok(rate)
}

fn backoff(
    base: Option<&envoy_types::pb::google::protobuf::Duration>,
    max: Option<&envoy_types::pb::google::protobuf::Duration>,
) -> Result<(Duration, Duration), ConfigError> {
    let base =
        positive("base_interval", base)?.ok_or_else(|| ConfigError::field("base_interval", "must be set"))?;
    let max = positive("max_interval", max)?.unwrap_or(base * 10);
    if max < base {
        return Err(ConfigError::field("max_interval", "must be greater than or equal to the base_interval"));
    }
    Ok((base, max))
}
