//! The thin driver of DNS discovery, and the resolver it asks.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ProtocolConfig, ResolverConfig,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;

use super::dns::{DnsDiscovery, DnsFailure, DnsRecord, LookupFamily, ResolverSettings};
use crate::cluster::{Applied, Cluster, Discovery};

/// The answer to one query, in the making.
pub type Resolve<'a> = Pin<Box<dyn Future<Output = Result<Vec<DnsRecord>, DnsFailure>> + Send + 'a>>;

/// Who answers queries.
pub trait Resolver: Send + Sync {
    /// Addresses of a name. A name that does not exist, or has no addresses of the families, is an empty answer.
    fn resolve<'a>(&'a self, name: &'a str, family: LookupFamily) -> Resolve<'a>;
}

/// hickory-resolver: the system's configuration and hosts file, or servers of one's own.
pub struct HickoryResolver {
    v4: TokioResolver,
    v6: TokioResolver,
}

/// Keeps a DNS cluster's endpoints up to date until it is dropped; `applied` hears of each update. Returns at once for other
/// kinds of clusters, and for a cluster without names.
pub async fn drive(cluster: &Cluster, resolver: &dyn Resolver, mut applied: impl FnMut(Applied)) {
    let Discovery::Dns(settings) = &cluster.discovery else { return };
    let mut rng = fastrand::Rng::new();
    let mut discovery = DnsDiscovery::new(settings, Instant::now());
    if settings.assignment.names().next().is_none() {
        applied(cluster.apply(&settings.assignment, Instant::now()));
        return;
    }
    // Answers are awaited beside each other; a slow name does not hold up the others.
    let mut asking: Vec<(usize, Resolve<'_>)> = Vec::new();
    loop {
        for query in discovery.due(Instant::now()) {
            cluster.stats.update_attempt().inc();
            asking.push((query.target, resolver.resolve(query.name, query.family)));
        }
        let Some((target, answer)) = next_answer(&mut asking, discovery.next_due()).await else { continue };
        match &answer {
            Ok(records) if records.is_empty() => cluster.stats.update_empty().inc(),
            Ok(_) => cluster.stats.update_success().inc(),
            Err(_) => cluster.stats.update_failure().inc(),
        }
        let failed = answer.is_err();
        match discovery.answered(target, answer, Instant::now(), &mut rng) {
            Some(assignment) => applied(cluster.apply(&assignment, Instant::now())),
            // A name that cannot be resolved must not keep the cluster from starting.
            None if failed && !cluster.endpoints().initialized() => {
                applied(cluster.apply(&discovery.assignment(), Instant::now()));
            }
            None => {}
        }
    }
}

/// The next answer, or `None` when a query falls due first.
async fn next_answer(
    asking: &mut Vec<(usize, Resolve<'_>)>,
    due: Option<Instant>,
) -> Option<(usize, Result<Vec<DnsRecord>, DnsFailure>)> {
    let answered = std::future::poll_fn(|cx| {
        for i in 0..asking.len() {
            if let std::task::Poll::Ready(answer) = asking[i].1.as_mut().poll(cx) {
                let (target, _) = asking.swap_remove(i);
                return std::task::Poll::Ready((target, answer));
            }
        }
        std::task::Poll::Pending
    });
    match due {
        Some(due) => tokio::time::timeout_at(due.into(), answered).await.ok(),
        None => Some(answered.await),
    }
}

impl HickoryResolver {
    /// A resolver with these settings.
    ///
    /// # Errors
    /// When the system's configuration cannot be read.
    pub fn new(settings: &ResolverSettings) -> Result<Self, DnsFailure> {
        Ok(Self {
            v4: build(settings, LookupIpStrategy::Ipv4Only)?,
            v6: build(settings, LookupIpStrategy::Ipv6Only)?,
        })
    }

    async fn lookup(&self, name: &str, family: LookupFamily) -> Result<Vec<DnsRecord>, DnsFailure> {
        match family {
            LookupFamily::V4Only => ask(&self.v4, name).await,
            LookupFamily::V6Only => ask(&self.v6, name).await,
            LookupFamily::V4Preferred => first_of(&self.v4, &self.v6, name).await,
            LookupFamily::Auto => first_of(&self.v6, &self.v4, name).await,
            LookupFamily::All => {
                let (v4, v6) = tokio::join!(ask(&self.v4, name), ask(&self.v6, name));
                match (v4, v6) {
                    (Ok(mut all), Ok(v6)) => {
                        all.extend(v6);
                        Ok(all)
                    }
                    (Ok(all), Err(_)) | (Err(_), Ok(all)) if !all.is_empty() => Ok(all),
                    (Err(error), _) | (_, Err(error)) => Err(error),
                }
            }
        }
    }
}

impl Resolver for HickoryResolver {
    fn resolve<'a>(&'a self, name: &'a str, family: LookupFamily) -> Resolve<'a> {
        Box::pin(self.lookup(name, family))
    }
}

impl fmt::Debug for HickoryResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HickoryResolver").finish_non_exhaustive()
    }
}

async fn ask(resolver: &TokioResolver, name: &str) -> Result<Vec<DnsRecord>, DnsFailure> {
    let lookup = match resolver.lookup_ip(name).await {
        Ok(lookup) => lookup,
        Err(error) if error.is_no_records_found() => return Ok(Vec::new()),
        Err(error) => return Err(DnsFailure(error.to_string())),
    };
    let records = lookup.as_lookup().answers().iter().filter_map(|record| {
        let address = match &record.data {
            RData::A(address) => address.0.into(),
            RData::AAAA(address) => address.0.into(),
            _ => return None,
        };
        Some(DnsRecord { address, ttl: Duration::from_secs(record.ttl.into()) })
    });
    Ok(records.collect())
}

async fn first_of(
    first: &TokioResolver,
    second: &TokioResolver,
    name: &str,
) -> Result<Vec<DnsRecord>, DnsFailure> {
    match ask(first, name).await {
        Ok(records) if !records.is_empty() => Ok(records),
        _ => ask(second, name).await,
    }
}

fn build(settings: &ResolverSettings, strategy: LookupIpStrategy) -> Result<TokioResolver, DnsFailure> {
    let failure = |error: &dyn fmt::Display| DnsFailure(error.to_string());
    let own = settings.servers.iter().map(|server| {
        let protocols = if settings.tcp {
            vec![ProtocolConfig::Tcp]
        } else {
            vec![ProtocolConfig::Udp, ProtocolConfig::Tcp]
        };
        let connections = protocols.into_iter().map(|protocol| {
            let mut connection = ConnectionConfig::new(protocol);
            connection.port = server.port();
            connection
        });
        NameServerConfig::new(server.ip(), true, connections.collect())
    });
    let own: Vec<NameServerConfig> = own.collect();
    let system = || hickory_resolver::system_conf::read_system_conf().map_err(|error| failure(&error));
    let (mut config, mut options) =
        if own.is_empty() || settings.as_fallback { system()? } else { Default::default() };
    let tcp_only = |mut server: NameServerConfig| {
        if settings.tcp {
            server.connections.retain(|connection| matches!(connection.protocol, ProtocolConfig::Tcp));
        }
        server
    };
    let (domain, search, servers) = config.into_parts();
    let servers = servers.into_iter().map(tcp_only).chain(own).collect();
    config = if settings.no_search_domain {
        ResolverConfig::from_parts(None, Vec::new(), servers)
    } else {
        ResolverConfig::from_parts(domain, search, servers)
    };
    options.ip_strategy = strategy;
    // The discovery decides when to ask again.
    options.cache_size = 0;
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build().map_err(|error| failure(&error))
}

/// A resolver that several clusters with equal settings share.
impl<R: Resolver + ?Sized> Resolver for Arc<R> {
    fn resolve<'a>(&'a self, name: &'a str, family: LookupFamily) -> Resolve<'a> {
        (**self).resolve(name, family)
    }
}
