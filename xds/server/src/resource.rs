use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use waystation_xds::{ResourceType, wire};
use xxhash_rust::xxh64::xxh64;

/// A resource as it is served. Its version is the hash of its content: the same text in another file, on another
/// day or by another server process is the same version, and is not sent again.
#[derive(Clone, Debug)]
pub struct Resource {
    kind: ResourceType,
    name: Arc<str>,
    aliases: Box<[Arc<str>]>,
    version: Arc<str>,
    value: Bytes,
    eds_name: Option<Arc<str>>,
}

impl Resource {
    /// A resource from its encoded message.
    pub fn new(kind: ResourceType, name: impl Into<Arc<str>>, value: Bytes) -> Self {
        let name = name.into();
        let version = format!("{:016x}", xxh64(&value, 0)).into();
        let eds_name = (kind == ResourceType::Cluster).then(|| eds_name(&name, &value)).flatten();
        Self { kind, name, aliases: Box::default(), version, value, eds_name }
    }

    /// The same under further names, by which it is served to those who ask for it and to nobody else: a virtual host
    /// on demand.
    #[must_use]
    pub fn with_aliases(mut self, aliases: Vec<Arc<str>>) -> Self {
        // Other aliases are another version, or they would not be sent.
        let seed = xxh64(self.version.as_bytes(), 0);
        self.version =
            format!("{:016x}", aliases.iter().fold(seed, |hash, one| xxh64(one.as_bytes(), hash))).into();
        self.aliases = aliases.into();
        self
    }

    /// The names besides its own.
    pub fn aliases(&self) -> &[Arc<str>] {
        &self.aliases
    }

    /// All names that it is asked for by, each once: its own first, which may stand among the aliases.
    pub(crate) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        std::iter::once(&self.name).chain(self.aliases.iter().filter(|alias| **alias != self.name))
    }

    /// The type.
    pub fn kind(&self) -> &ResourceType {
        &self.kind
    }

    /// The name, unique within its type.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The hash of the content.
    pub fn version(&self) -> &Arc<str> {
        &self.version
    }

    /// The encoded message.
    pub fn value(&self) -> &Bytes {
        &self.value
    }

    /// For an EDS cluster: the name of its `ClusterLoadAssignment`.
    pub(crate) fn eds_name(&self) -> Option<&Arc<str>> {
        self.eds_name.as_ref()
    }

    pub(crate) fn to_any(&self) -> wire::Any {
        wire::Any { type_url: Bytes::copy_from_slice(self.kind.url().as_bytes()), value: self.value.clone() }
    }

    pub(crate) fn to_wrapped(&self) -> wire::Resource {
        wire::Resource {
            version: Bytes::copy_from_slice(self.version.as_bytes()),
            resource: Some(self.to_any()),
            name: Bytes::copy_from_slice(self.name.as_bytes()),
            aliases: self.aliases.iter().map(|alias| Bytes::copy_from_slice(alias.as_bytes())).collect(),
            ..wire::Resource::default()
        }
    }
}

/// `type.name`, as people speak of it.
impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.name)
    }
}

/// What this server needs to know of `envoy.config.cluster.v3.Cluster`.
#[derive(Clone, PartialEq, prost::Message)]
struct Cluster {
    #[prost(int32, tag = "2")]
    discovery_type: i32,
    #[prost(message, optional, tag = "3")]
    eds_cluster_config: Option<EdsClusterConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct EdsClusterConfig {
    #[prost(string, tag = "2")]
    service_name: String,
}

/// `Cluster.DiscoveryType.EDS`.
const EDS: i32 = 3;

fn eds_name(name: &Arc<str>, value: &Bytes) -> Option<Arc<str>> {
    let cluster = Cluster::decode(value.clone()).ok().filter(|cluster| cluster.discovery_type == EDS)?;
    let service = cluster.eds_cluster_config.unwrap_or_default().service_name;
    Some(if service.is_empty() { name.clone() } else { service.into() })
}
