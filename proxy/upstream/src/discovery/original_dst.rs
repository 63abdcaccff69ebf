//! ORIGINAL_DST: hosts made of the address that a connection was meant for, forgotten when they are not used.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::r#type::metadata::v3 as metadata_pb;
use parking_lot::Mutex;
use waystation_filter_api::address::Address;
use waystation_filter_api::wire::u32_value;
use waystation_schema::{At, ConfigError};

use crate::cluster::Cluster;
use crate::host::{Host, HostState, Locality, UsedMark};
use crate::load_balancer::{NoHost, PickContext};

/// Hosts at once; a request to one more address finds no host until the next clean-up.
const MAX_HOSTS: usize = 65_536;

/// Where requests go, and the hosts that came of it.
#[derive(Debug)]
pub struct OriginalDst {
    /// The header that names the address, when one may.
    header: Option<Box<str>>,
    /// Namespace and path of the metadata that names the address.
    metadata_key: Option<MetadataKey>,
    port_override: Option<u16>,
    /// How often unused hosts are forgotten.
    pub cleanup_interval: Duration,
    hosts: Mutex<HashMap<SocketAddr, Arc<Entry>>>,
    /// Moves when hosts are forgotten, so that workers forget theirs.
    generation: AtomicU64,
}

#[derive(Debug)]
struct MetadataKey {
    namespace: Box<str>,
    path: Box<[Box<str>]>,
}

#[derive(Debug)]
struct Entry {
    host: Arc<Host>,
    used: UsedMark,
}

/// The hosts that one worker has used.
#[derive(Debug, Default)]
pub(crate) struct OriginalDstCache {
    hosts: HashMap<SocketAddr, Arc<Entry>>,
    generation: u64,
}

impl OriginalDst {
    pub(crate) fn compile(
        proto: &pb::cluster::OriginalDstLbConfig,
        cleanup_interval: Option<Duration>,
    ) -> Result<Self, ConfigError> {
        let pb::cluster::OriginalDstLbConfig {
            use_http_header,
            http_header_name,
            upstream_port_override,
            metadata_key,
        } = proto;
        let header = match (use_http_header, http_header_name.as_str()) {
            (false, "") => None,
            (false, _) => {
                return Err(ConfigError::field(
                    "http_header_name",
                    "must not be set without use_http_header",
                ));
            }
            (true, "") => Some("x-envoy-original-dst-host".into()),
            (true, name) => Some(name.to_ascii_lowercase().into()),
        };
        let port_override = u32_value(upstream_port_override.as_ref())
            .map(|port| {
                u16::try_from(port)
                    .map_err(|_| ConfigError::field("upstream_port_override", "must be at most 65535"))
            })
            .transpose()?;
        let metadata_key = metadata_key
            .as_ref()
            .map(|key| {
                let mut path = Vec::with_capacity(key.path.len());
                for segment in &key.path {
                    match &segment.segment {
                        Some(metadata_pb::metadata_key::path_segment::Segment::Key(key)) => {
                            path.push(key.as_str().into());
                        }
                        _ => return Err(ConfigError::field("path", "segments must be keys")),
                    }
                }
                Ok(MetadataKey { namespace: key.key.as_str().into(), path: path.into() })
            })
            .transpose()
            .at(|| "metadata_key")?;
        Ok(Self {
            header,
            metadata_key,
            port_override,
            cleanup_interval: cleanup_interval.unwrap_or(Duration::from_secs(5)),
            hosts: Mutex::default(),
            generation: AtomicU64::new(0),
        })
    }

    /// The header whose value the caller hands to a pick, lower case.
    pub fn header(&self) -> Option<&str> {
        self.header.as_deref()
    }

    /// The metadata whose value the caller hands to a pick: namespace and path.
    pub fn metadata_key(&self) -> Option<(&str, &[Box<str>])> {
        self.metadata_key.as_ref().map(|key| (&*key.namespace, &*key.path))
    }

    /// Every host now in use.
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        self.hosts.lock().values().map(|entry| Arc::clone(&entry.host)).collect()
    }

    /// Forgets hosts that nobody picked since the last call; their pools drain. To be called each `cleanup_interval`.
    pub fn clean_up(&self, cluster: &Cluster) -> Vec<Arc<Host>> {
        let mut removed = Vec::new();
        let mut hosts = self.hosts.lock();
        hosts.retain(|_, entry| {
            // A host with connections is in use even when they carry one long stream.
            let keep = entry.used.take() || entry.host.active_connections() > 0;
            if !keep {
                removed.push(Arc::clone(&entry.host));
            }
            keep
        });
        if !removed.is_empty() {
            self.generation.fetch_add(1, Ordering::Release);
            cluster.stats.membership_change().inc();
            set_membership(cluster, hosts.len());
        }
        removed
    }

    /// The host of a request. The first request to an address takes a lock and makes the host; later ones of the same worker
    /// find it in the worker's own map.
    pub(crate) fn pick<'a>(
        &self,
        cluster: &Cluster,
        cache: &'a mut OriginalDstCache,
        cx: &PickContext<'_>,
        now: Instant,
    ) -> Result<&'a Arc<Host>, NoHost> {
        let Some(address) = self.destination(cx) else {
            cluster.stats.original_dst_host_invalid().inc();
            return Err(NoHost::InvalidOriginalDestination);
        };
        let generation = self.generation.load(Ordering::Acquire);
        if cache.generation != generation {
            cache.generation = generation;
            cache.hosts.clear();
        }
        let entry = match cache.hosts.entry(address) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.shared(cluster, address, now).ok_or(NoHost::NoHealthyHost)?)
            }
        };
        entry.used.set();
        Ok(&entry.host)
    }

    /// In Envoy's order: filter state, header, metadata, the connection's own destination.
    fn destination(&self, cx: &PickContext<'_>) -> Option<SocketAddr> {
        let given = cx.original_destination?;
        let parse = |text: &str| text.trim().parse::<SocketAddr>().ok();
        let header = self.header.is_some().then_some(given.header).flatten();
        let metadata = self.metadata_key.is_some().then_some(given.metadata).flatten();
        let mut address = if let Some(address) = given.filter_state {
            address.ip()?
        } else if let Some(value) = header {
            parse(std::str::from_utf8(value).ok()?)?
        } else if let Some(value) = metadata {
            parse(value)?
        } else {
            given.local_address?.ip()?
        };
        if let Some(port) = self.port_override {
            address.set_port(port);
        }
        (address.port() != 0).then_some(address)
    }

    fn shared(&self, cluster: &Cluster, address: SocketAddr, now: Instant) -> Option<Arc<Entry>> {
        let mut hosts = self.hosts.lock();
        if let Some(entry) = hosts.get(&address) {
            return Some(Arc::clone(entry));
        }
        if hosts.len() >= MAX_HOSTS {
            return None;
        }
        let host = Arc::new(Host {
            state: HostState::new(now, cluster.monitor()),
            address: Address::Ip(address),
            locality: Arc::new(Locality::default()),
            metadata: None,
            weight: 1,
            priority: 0,
            transport: cluster.transport_for(None, None),
            details: None,
        });
        let entry = Arc::new(Entry { host, used: UsedMark::default() });
        hosts.insert(address, Arc::clone(&entry));
        cluster.stats.membership_change().inc();
        set_membership(cluster, hosts.len());
        Some(entry)
    }
}

fn set_membership(cluster: &Cluster, hosts: usize) {
    cluster.stats.membership_total().set(hosts as u64);
    cluster.stats.membership_healthy().set(hosts as u64);
    cluster.stats.max_host_weight().set(u64::from(hosts > 0));
}
