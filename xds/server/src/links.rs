//! References between resources. A proxy copes with one that leads nowhere (503 `NC`, warming until a timeout), and
//! it may lead into the proxy's own bootstrap: hence warnings, never errors.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message as _;
use waystation_xds::ResourceType;

use crate::Snapshot;

const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TCP_PROXY: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";

/// Warnings reported.
const MAX_WARNINGS: usize = 100;

/// The references that lead to nothing in `snapshot`, sorted.
pub(crate) fn check(snapshot: &Snapshot) -> Vec<String> {
    let mut links = Links { snapshot, missing: BTreeSet::new() };
    for cluster in snapshot.of(&ResourceType::Cluster).values() {
        if let Some(name) = cluster.eds_name() {
            links.expect(&format!("cluster {}", cluster.name()), ResourceType::ClusterLoadAssignment, name);
        }
    }
    for (name, route) in snapshot.of(&ResourceType::RouteConfiguration) {
        if let Ok(route) = RouteConfiguration::decode(route.value().clone()) {
            links.route_configuration(&format!("route configuration {name}"), &route);
        }
    }
    for (name, host) in snapshot.of(&ResourceType::VirtualHost) {
        if let Ok(host) = VirtualHost::decode(host.value().clone()) {
            links.virtual_host(&format!("virtual host {name}"), &host);
        }
    }
    for (name, listener) in snapshot.of(&ResourceType::Listener) {
        if let Ok(listener) = Listener::decode(listener.value().clone()) {
            links.listener(&format!("listener {name}"), &listener);
        }
    }
    links.missing.into_iter().take(MAX_WARNINGS).collect()
}

struct Links<'s> {
    snapshot: &'s Snapshot,
    missing: BTreeSet<String>,
}

impl Links<'_> {
    fn expect(&mut self, from: &str, kind: ResourceType, name: &str) {
        if !name.is_empty() && !self.snapshot.of(&kind).contains_key(name) {
            self.missing.insert(format!("{from} refers to {kind:?} {name}, which is not in the folder"));
        }
    }

    fn cluster(&mut self, from: &str, name: &str) {
        self.expect(from, ResourceType::Cluster, name);
    }

    fn listener(&mut self, from: &str, listener: &Listener) {
        let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
        for config in
            chains.flat_map(|chain| &chain.filters).filter_map(|filter| filter.typed_config.as_ref())
        {
            if config.type_url == HCM
                && let Ok(hcm) = HttpConnectionManager::decode(config.value.clone())
            {
                if let Some(rds) = &hcm.rds {
                    self.expect(from, ResourceType::RouteConfiguration, &rds.route_config_name);
                }
                if let Some(route) = &hcm.route_config {
                    self.route_configuration(from, route);
                }
            } else if config.type_url == TCP_PROXY
                && let Ok(proxy) = TcpProxy::decode(config.value.clone())
            {
                self.cluster(from, &proxy.cluster);
                let weighted = proxy.weighted_clusters.iter().flat_map(|weighted| &weighted.clusters);
                weighted.for_each(|cluster| self.cluster(from, &cluster.name));
            }
        }
    }

    fn route_configuration(&mut self, from: &str, route: &RouteConfiguration) {
        for host in &route.virtual_hosts {
            self.virtual_host(from, host);
        }
    }

    fn virtual_host(&mut self, from: &str, host: &VirtualHost) {
        for action in host.routes.iter().filter_map(|route| route.route.as_ref()) {
            self.cluster(from, &action.cluster);
            let weighted = action.weighted_clusters.iter().flat_map(|weighted| &weighted.clusters);
            weighted.for_each(|cluster| self.cluster(from, &cluster.name));
            action.request_mirror_policies.iter().for_each(|mirror| self.cluster(from, &mirror.cluster));
        }
    }
}

// The few fields of each message that lead on; everything else is skipped, not decoded.

#[derive(Clone, PartialEq, prost::Message)]
struct Listener {
    #[prost(message, repeated, tag = "3")]
    filter_chains: Vec<FilterChain>,
    #[prost(message, optional, tag = "25")]
    default_filter_chain: Option<FilterChain>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct FilterChain {
    #[prost(message, repeated, tag = "3")]
    filters: Vec<Filter>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Filter {
    #[prost(message, optional, tag = "4")]
    typed_config: Option<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HttpConnectionManager {
    #[prost(message, optional, tag = "3")]
    rds: Option<Rds>,
    #[prost(message, optional, tag = "4")]
    route_config: Option<RouteConfiguration>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Rds {
    #[prost(string, tag = "2")]
    route_config_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TcpProxy {
    #[prost(string, tag = "2")]
    cluster: String,
    #[prost(message, optional, tag = "10")]
    weighted_clusters: Option<WeightedClusters>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RouteConfiguration {
    #[prost(message, repeated, tag = "2")]
    virtual_hosts: Vec<VirtualHost>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct VirtualHost {
    #[prost(message, repeated, tag = "3")]
    routes: Vec<Route>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Route {
    #[prost(message, optional, tag = "2")]
    route: Option<RouteAction>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RouteAction {
    #[prost(string, tag = "1")]
    cluster: String,
    #[prost(message, optional, tag = "3")]
    weighted_clusters: Option<WeightedClusters>,
    #[prost(message, repeated, tag = "30")]
    request_mirror_policies: Vec<Mirror>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WeightedClusters {
    #[prost(message, repeated, tag = "1")]
    clusters: Vec<Named>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Mirror {
    #[prost(string, tag = "1")]
    cluster: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

#[cfg(test)]
mod tests {
    use waystation_schema::Format;

    use crate::Snapshot;
    use crate::file::parse;

    #[test]
    fn references_are_followed_everywhere() {
        let text = r"
resources:
- '@type': type.googleapis.com/envoy.config.listener.v3.Listener
  name: ingress
  address: {socket_address: {address: 127.0.0.1, port_value: 0}}
  filter_chains:
  - filters:
    - name: hcm
      typed_config:
        '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
        stat_prefix: a
        rds: {route_config_name: elsewhere, config_source: {ads: {}}}
  default_filter_chain:
    filters:
    - name: tcp
      typed_config:
        '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
        stat_prefix: a
        weighted_clusters: {clusters: [{name: tcp, weight: 1}]}
- '@type': type.googleapis.com/envoy.config.route.v3.RouteConfiguration
  name: routes
  virtual_hosts:
  - name: all
    domains: ['*']
    routes:
    - match: {prefix: /}
      route: {cluster: plain, request_mirror_policies: [{cluster: mirror}]}
    - match: {prefix: /}
      route: {weighted_clusters: {clusters: [{name: weighted, weight: 1}, {name: here, weight: 1}]}}
- '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: here
  type: EDS
  eds_cluster_config: {service_name: service, eds_config: {ads: {}}}
";
        let content = parse(Format::Yaml, text.as_bytes()).expect("it is good");
        let snapshot: Snapshot = content.resources.into_iter().map(|located| located.resource).collect();
        assert_eq!(
            super::check(&snapshot),
            [
                "cluster here refers to ClusterLoadAssignment service, which is not in the folder",
                "listener ingress refers to Cluster tcp, which is not in the folder",
                "listener ingress refers to RouteConfiguration elsewhere, which is not in the folder",
                "route configuration routes refers to Cluster mirror, which is not in the folder",
                "route configuration routes refers to Cluster plain, which is not in the folder",
                "route configuration routes refers to Cluster weighted, which is not in the folder",
            ]
        );
    }
}
