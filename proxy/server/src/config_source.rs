//! `ConfigSource` to the sources of the xDS client, and whether what a source names is there.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use prost::Message as _;
use waystation_filter_api::wire;
use waystation_schema::{At as _, ConfigError};
use waystation_xds::{
    BackoffSpec, GrpcService, GrpcSource, PathSource, Protocol, RateLimit, ResourceType, RestSource, Source,
};
use xxhash_rust::xxh64::xxh64;

/// Envoy's default for `initial_fetch_timeout`.
const INITIAL_FETCH_TIMEOUT: Duration = Duration::from_secs(15);

/// What a bootstrap has for sources to name. Without one, as in tests of parts, nothing is checked.
#[derive(Debug, Default)]
pub struct Backing(Option<Known>);

#[derive(Debug)]
struct Known {
    /// Hashes of the names of Envoy's primary clusters: static ones that need no server for their endpoints. Ten thousand
    /// names would weigh more than the check is worth, and two of one hash only let a mistake pass.
    primary: HashSet<u64>,
    /// Whether `node` has both `id` and `cluster`.
    identified: bool,
}

/// As much of a `Cluster` as tells whether it is a primary one.
#[derive(prost::Message)]
struct ClusterHead {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(enumeration = "cluster_pb::cluster::DiscoveryType", tag = "2")]
    discovery: i32,
    #[prost(message, optional, tag = "3")]
    eds: Option<cluster_pb::cluster::EdsClusterConfig>,
}

impl Backing {
    /// What this node and these static clusters, encoded, are to sources.
    pub fn new(node: Option<&core::Node>, clusters: &[Bytes]) -> Self {
        let primary = clusters.iter().filter_map(|wire| {
            // What cannot be decoded is refused where it is compiled.
            let head = ClusterHead::decode(wire.clone()).ok()?;
            let from_server = head.discovery() == cluster_pb::cluster::DiscoveryType::Eds
                && head.eds.and_then(|eds| eds.eds_config).is_none_or(|source| path(&source).is_none());
            (!from_server).then(|| xxh64(head.name.as_bytes(), 0))
        });
        let identified = node.is_some_and(|node| !node.id.is_empty() && !node.cluster.is_empty());
        Self(Some(Known { primary: primary.collect(), identified }))
    }

    /// Checks what a subscription's source names, by Envoy's rules and in its words: the file exists, the cluster is static
    /// and has endpoints without a server. Incremental streams and secrets may name a cluster that comes later.
    pub fn check(&self, kind: &ResourceType, source: &core::ConfigSource) -> Result<(), ConfigError> {
        use core::api_config_source::ApiType;
        use core::config_source::ConfigSourceSpecifier as Specifier;
        let Some(known) = &self.0 else { return Ok(()) };
        known.check_node(kind.url())?;
        if let Some((path, watched)) = path(source) {
            if !Path::new(path).exists() {
                return Err(ConfigError::new(format!(
                    "paths must refer to an existing path in the system: '{path}' does not exist"
                )));
            }
            return match watched {
                Some(watched) if !Path::new(watched).is_dir() => Err(ConfigError::new(format!(
                    "unable to add filesystem watch for file {watched}/: No such file or directory"
                ))),
                _ => Ok(()),
            };
        }
        let Some(Specifier::ApiConfigSource(api)) = &source.config_source_specifier else { return Ok(()) };
        if *kind == ResourceType::Secret {
            return Ok(());
        }
        let targets: Vec<&str> = match api.api_type() {
            ApiType::Rest => api.cluster_names.iter().map(String::as_str).collect(),
            ApiType::Grpc => targets(api).collect(),
            _ => return Ok(()),
        };
        match targets.iter().find(|target| !known.is_primary(target)) {
            None => Ok(()),
            Some(target) => Err(ConfigError::new(format!(
                "envoy.config.core.v3.ApiConfigSource must have a statically defined non-EDS cluster: \
                 '{target}' does not exist, was added via api, or is an EDS cluster"
            ))),
        }
    }

    /// The same for `ads_config`.
    pub fn check_ads(&self, api: &core::ApiConfigSource) -> Result<(), ConfigError> {
        let Some(known) = &self.0 else { return Ok(()) };
        known.check_node("ads")?;
        match targets(api).find(|target| !known.is_primary(target)) {
            None => Ok(()),
            Some(target) => Err(ConfigError::new(format!("Unknown gRPC client cluster '{target}'"))),
        }
    }
}

impl Known {
    fn is_primary(&self, cluster: &str) -> bool {
        self.primary.contains(&xxh64(cluster.as_bytes(), 0))
    }

    fn check_node(&self, who: &str) -> Result<(), ConfigError> {
        if self.identified {
            return Ok(());
        }
        Err(ConfigError::new(format!(
            "{who}: node 'id' and 'cluster' are required. Set it either in 'node' config or via --service-node and \
             --service-cluster options."
        )))
    }
}

/// The file of a source that is one, and the directory that is watched for it.
#[expect(deprecated, reason = "old configurations still name it")]
fn path(source: &core::ConfigSource) -> Option<(&str, Option<&str>)> {
    use core::config_source::ConfigSourceSpecifier as Specifier;
    match source.config_source_specifier.as_ref()? {
        Specifier::Path(path) => Some((path, None)),
        Specifier::PathConfigSource(source) => {
            Some((&source.path, source.watched_directory.as_ref().map(|watched| &*watched.path)))
        }
        _ => None,
    }
}

/// The clusters that the gRPC services of a source name.
fn targets(api: &core::ApiConfigSource) -> impl Iterator<Item = &str> {
    use core::grpc_service::TargetSpecifier;
    api.grpc_services.iter().filter_map(|service| match &service.target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(envoy)) => Some(&*envoy.cluster_name),
        _ => None,
    })
}

/// Compiles a source and its initial fetch timeout (`None`: wait for ever).
#[expect(deprecated, reason = "old configurations still name it")]
pub fn compile(proto: &core::ConfigSource) -> Result<(Source, Option<Duration>), ConfigError> {
    use core::config_source::ConfigSourceSpecifier as Specifier;
    let timeout = wire::timeout(
        "initial_fetch_timeout",
        proto.initial_fetch_timeout.as_ref(),
        Some(INITIAL_FETCH_TIMEOUT),
    )?;
    refuse_v2(proto.resource_api_version, "resource_api_version")?;
    if !proto.authorities.is_empty() {
        return Err(ConfigError::field("authorities", "xdstp authorities are not supported"));
    }
    let source = match &proto.config_source_specifier {
        // `self` is the stream that the resource came by: the aggregated one, or another server's equal source.
        Some(Specifier::Ads(_) | Specifier::Self_(_)) => Source::Ads,
        Some(Specifier::Path(path)) => {
            Source::Path(Arc::new(PathSource { path: PathBuf::from(path), watched_directory: None }))
        }
        Some(Specifier::PathConfigSource(path)) => Source::Path(Arc::new(PathSource {
            path: PathBuf::from(&path.path),
            watched_directory: path.watched_directory.as_ref().map(|watched| PathBuf::from(&watched.path)),
        })),
        Some(Specifier::ApiConfigSource(api)) => api_source(api).at(|| "api_config_source")?,
        None => return Err(ConfigError::new("names no source")),
    };
    Ok((source, timeout))
}

/// Checks a source of clusters on demand. They are asked for one by one, which only the incremental protocol can do;
/// whether the aggregated stream speaks it shows when it is asked.
pub fn check_on_demand(proto: &core::ConfigSource) -> Result<(), ConfigError> {
    match compile(proto)?.0 {
        Source::Ads => Ok(()),
        Source::Grpc(source) if source.protocol == Protocol::Delta => Ok(()),
        _ => Err(ConfigError::new("clusters on demand need ads or api_type DELTA_GRPC")),
    }
}

/// Compiles `ads_config` or an `api_config_source`.
#[expect(deprecated, reason = "old configurations still name it")]
pub fn api_source(api: &core::ApiConfigSource) -> Result<Source, ConfigError> {
    use core::api_config_source::ApiType;
    refuse_v2(api.transport_api_version, "transport_api_version")?;
    if !api.config_validators.is_empty() {
        return Err(ConfigError::field("config_validators", "not supported"));
    }
    match api.api_type() {
        ApiType::Rest => {
            let target = match &api.cluster_names[..] {
                [cluster] => cluster.as_str().into(),
                _ => return Err(ConfigError::field("cluster_names", "REST needs exactly one cluster")),
            };
            let refresh_delay = wire::duration("refresh_delay", api.refresh_delay.as_ref())?;
            let request_timeout = wire::duration("request_timeout", api.request_timeout.as_ref())?;
            Ok(Source::Rest(Arc::new(RestSource {
                target,
                refresh_delay: refresh_delay
                    .ok_or_else(|| ConfigError::field("refresh_delay", "REST needs it"))?,
                request_timeout: request_timeout.unwrap_or(Duration::from_secs(1)),
            })))
        }
        ApiType::Grpc | ApiType::AggregatedGrpc => grpc(api, Protocol::Sotw),
        ApiType::DeltaGrpc | ApiType::AggregatedDeltaGrpc => grpc(api, Protocol::Delta),
        ApiType::DeprecatedAndUnavailableDoNotUse => {
            Err(ConfigError::field("api_type", "the v1 REST API is not available"))
        }
    }
}

/// There is only v3, which is also what an unset version can mean.
fn refuse_v2(version: i32, field: &'static str) -> Result<(), ConfigError> {
    #[expect(deprecated, reason = "it is refused by name")]
    match core::ApiVersion::try_from(version) {
        Ok(core::ApiVersion::V2) => Err(ConfigError::field(field, "the v2 xDS API is not available")),
        _ => Ok(()),
    }
}

fn grpc(api: &core::ApiConfigSource, protocol: Protocol) -> Result<Source, ConfigError> {
    let mut services = Vec::with_capacity(api.grpc_services.len());
    let mut backoff = BackoffSpec::default();
    for (i, service) in api.grpc_services.iter().enumerate() {
        let compiled = grpc_service(service, &mut backoff).at(|| format!("grpc_services[{i}]"))?;
        services.push(Arc::new(compiled));
    }
    if services.is_empty() || services.len() > 2 {
        return Err(ConfigError::field(
            "grpc_services",
            "needs one service, and at most one to fail over to",
        ));
    }
    let rate_limit = api.rate_limit_settings.as_ref().map(|settings| {
        let default = RateLimit::default();
        RateLimit {
            max_tokens: settings.max_tokens.as_ref().map_or(default.max_tokens, |tokens| tokens.value),
            // Thousandths, so that fractional rates stay exact enough.
            fill_millis: settings
                .fill_rate
                .as_ref()
                .map_or(default.fill_millis, |rate| (rate.value.max(0.0) * 1000.0) as u64),
        }
    });
    Ok(Source::Grpc(Arc::new(GrpcSource {
        protocol,
        services,
        node_on_first_message_only: api.set_node_on_first_message_only,
        rate_limit,
        backoff,
    })))
}

/// A service; `backoff` is changed where it has one of its own.
pub(crate) fn grpc_service(
    proto: &core::GrpcService,
    backoff: &mut BackoffSpec,
) -> Result<GrpcService, ConfigError> {
    use core::grpc_service::TargetSpecifier;
    wire::refuse("retry_policy", proto.retry_policy.is_some(), "xDS streams have their own back-off")?;
    let mut service = match &proto.target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(envoy)) => {
            let mut service = GrpcService::new(envoy.cluster_name.as_str());
            service.authority =
                Some(envoy.authority.as_str()).filter(|authority| !authority.is_empty()).map(Into::into);
            if let Some(limit) = &envoy.max_receive_message_length {
                service.max_message_bytes = usize::try_from(limit.value).unwrap_or(usize::MAX);
            }
            if let Some(policy) = &envoy.retry_policy {
                stream_backoff(policy, backoff).at(|| "envoy_grpc.retry_policy")?;
            }
            // `skip_envoy_headers` asks for what is so anyway: these streams carry no headers of Envoy's.
            service
        }
        Some(TargetSpecifier::GoogleGrpc(google)) => {
            let plain = google.channel_credentials.is_none()
                && google.channel_credentials_plugin.is_empty()
                && google.call_credentials.is_empty()
                && google.call_credentials_plugin.is_empty()
                && google.credentials_factory_name.is_empty();
            if !plain {
                let reason = "credentials are not supported here: use envoy_grpc with a cluster that has TLS";
                return Err(ConfigError::field("google_grpc", reason));
            }
            // The target is dialled directly; the prefix tells the connector so.
            GrpcService::new(format!("{GOOGLE_GRPC}{}", google.target_uri))
        }
        None => return Err(ConfigError::new("names no target")),
    };
    service.timeout = wire::timeout("timeout", proto.timeout.as_ref(), None)?;
    for header in &proto.initial_metadata {
        let value = if header.value.is_empty() {
            String::from_utf8_lossy(&header.raw_value).into_owned()
        } else {
            header.value.clone()
        };
        service.initial_metadata.push((header.key.to_ascii_lowercase().into(), value.into()));
    }
    Ok(service)
}

/// Changes `backoff` to what is to be between two attempts to open a stream.
///
/// `num_retries` and `retry_on` change nothing, as in Envoy for xDS: a stream is opened again until it is open, whatever it
/// failed with.
pub(crate) fn stream_backoff(
    policy: &core::RetryPolicy,
    backoff: &mut BackoffSpec,
) -> Result<(), ConfigError> {
    let core::RetryPolicy {
        retry_back_off,
        num_retries: _,
        retry_on: _,
        retry_priority,
        retry_host_predicate,
        host_selection_retry_max_attempts,
    } = policy;
    let why = "streams choose no hosts by their failures";
    wire::refuse("retry_priority", retry_priority.is_some(), why)?;
    wire::refuse("retry_host_predicate", !retry_host_predicate.is_empty(), why)?;
    wire::refuse("host_selection_retry_max_attempts", *host_selection_retry_max_attempts != 0, why)?;
    if let Some(retry) = retry_back_off {
        let interval = |field, value: Option<&_>| wire::duration(field, value).at(|| "retry_back_off");
        backoff.base = interval("base_interval", retry.base_interval.as_ref())?.unwrap_or(backoff.base);
        // Envoy: ten times the base when no maximum is set.
        backoff.max = interval("max_interval", retry.max_interval.as_ref())?.unwrap_or(backoff.base * 10);
    }
    Ok(())
}

/// Marks a target that is an address to dial rather than a cluster.
pub const GOOGLE_GRPC: &str = "google_grpc:";

#[cfg(test)]
mod tests {
    use super::{BackoffSpec, core, stream_backoff};
    use envoy_types::pb::google::protobuf as wkt;
    use std::time::Duration;

    #[test]
    fn streams_take_the_back_off_of_a_policy_and_refuse_its_choice_of_hosts() {
        let mut backoff = BackoffSpec::default();
        let interval = core::BackoffStrategy {
            base_interval: Some(wkt::Duration { seconds: 2, nanos: 0 }),
            ..Default::default()
        };
        let policy = core::RetryPolicy {
            retry_back_off: Some(interval),
            retry_on: "unavailable".into(),
            ..Default::default()
        };
        stream_backoff(&policy, &mut backoff).expect("it is supported");
        assert_eq!((backoff.base, backoff.max), (Duration::from_secs(2), Duration::from_secs(20)));
        let predicate = core::retry_policy::RetryHostPredicate { name: "p".into(), ..Default::default() };
        for (field, policy) in [
            (
                "retry_priority",
                core::RetryPolicy { retry_priority: Some(Default::default()), ..policy.clone() },
            ),
            (
                "retry_host_predicate",
                core::RetryPolicy { retry_host_predicate: vec![predicate], ..policy.clone() },
            ),
            (
                "host_selection_retry_max_attempts",
                core::RetryPolicy { host_selection_retry_max_attempts: 1, ..policy.clone() },
            ),
        ] {
            let refused =
                stream_backoff(&policy, &mut backoff).expect_err("hosts are not chosen").to_string();
            assert!(refused.contains(field), "{refused}");
        }
    }
}
