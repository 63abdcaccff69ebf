use std::fmt;
use std::sync::Arc;

/// A type of resource, as named by its type URL.
#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ResourceType {
    /// LDS.
    Listener,
    /// RDS.
    RouteConfiguration,
    /// SRDS.
    ScopedRouteConfiguration,
    /// VHDS; names are `<route configuration>/<host>`.
    VirtualHost,
    /// CDS and on-demand CDS.
    Cluster,
    /// EDS.
    ClusterLoadAssignment,
    /// SDS.
    Secret,
    /// RTDS.
    Runtime,
    /// ECDS.
    ExtensionConfig,
    /// Any other type, by its full type URL; available over ADS only.
    Other(Arc<str>),
}

/// What is fixed for a type: its URL, the gRPC methods and the REST path that serve it alone.
struct Facts {
    url: &'static str,
    sotw: Option<&'static str>,
    delta: &'static str,
    rest: Option<&'static str>,
}

const LISTENER: Facts = Facts {
    url: "type.googleapis.com/envoy.config.listener.v3.Listener",
    sotw: Some("/envoy.service.listener.v3.ListenerDiscoveryService/StreamListeners"),
    delta: "/envoy.service.listener.v3.ListenerDiscoveryService/DeltaListeners",
    rest: Some("/v3/discovery:listeners"),
};
const ROUTE: Facts = Facts {
    url: "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
    sotw: Some("/envoy.service.route.v3.RouteDiscoveryService/StreamRoutes"),
    delta: "/envoy.service.route.v3.RouteDiscoveryService/DeltaRoutes",
    rest: Some("/v3/discovery:routes"),
};
const SCOPED_ROUTE: Facts = Facts {
    url: "type.googleapis.com/envoy.config.route.v3.ScopedRouteConfiguration",
    sotw: Some("/envoy.service.route.v3.ScopedRoutesDiscoveryService/StreamScopedRoutes"),
    delta: "/envoy.service.route.v3.ScopedRoutesDiscoveryService/DeltaScopedRoutes",
    rest: Some("/v3/discovery:scoped-routes"),
};
const VIRTUAL_HOST: Facts = Facts {
    url: "type.googleapis.com/envoy.config.route.v3.VirtualHost",
    sotw: None,
    delta: "/envoy.service.route.v3.VirtualHostDiscoveryService/DeltaVirtualHosts",
    rest: None,
};
const CLUSTER: Facts = Facts {
    url: "type.googleapis.com/envoy.config.cluster.v3.Cluster",
    sotw: Some("/envoy.service.cluster.v3.ClusterDiscoveryService/StreamClusters"),
    delta: "/envoy.service.cluster.v3.ClusterDiscoveryService/DeltaClusters",
    rest: Some("/v3/discovery:clusters"),
};
const ENDPOINT: Facts = Facts {
    url: "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
    sotw: Some("/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints"),
    delta: "/envoy.service.endpoint.v3.EndpointDiscoveryService/DeltaEndpoints",
    rest: Some("/v3/discovery:endpoints"),
};
const SECRET: Facts = Facts {
    url: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
    sotw: Some("/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"),
    delta: "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
    rest: Some("/v3/discovery:secrets"),
};
const RUNTIME: Facts = Facts {
    url: "type.googleapis.com/envoy.service.runtime.v3.Runtime",
    sotw: Some("/envoy.service.runtime.v3.RuntimeDiscoveryService/StreamRuntime"),
    delta: "/envoy.service.runtime.v3.RuntimeDiscoveryService/DeltaRuntime",
    rest: Some("/v3/discovery:runtime"),
};
const EXTENSION_CONFIG: Facts = Facts {
    url: "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
    sotw: Some("/envoy.service.extension.v3.ExtensionConfigDiscoveryService/StreamExtensionConfigs"),
    delta: "/envoy.service.extension.v3.ExtensionConfigDiscoveryService/DeltaExtensionConfigs",
    rest: Some("/v3/discovery:extension_configs"),
};

impl ResourceType {
    /// The type with this URL (`type.googleapis.com/...`).
    pub fn from_url(url: &str) -> Self {
        Self::known().into_iter().find(|kind| kind.url() == url).unwrap_or_else(|| Self::Other(url.into()))
    }

    /// The full type URL.
    pub fn url(&self) -> &str {
        match self {
            Self::Other(url) => url,
            known => known.facts().map_or("", |facts| facts.url),
        }
    }

    /// The method of the type's own service, `None` where there is none in this protocol.
    pub fn method(&self, protocol: crate::Protocol) -> Option<&'static str> {
        let facts = self.facts()?;
        match protocol {
            crate::Protocol::Sotw => facts.sotw,
            crate::Protocol::Delta => Some(facts.delta),
        }
    }

    /// The path of the REST endpoint, `None` where there is none.
    pub fn rest_path(&self) -> Option<&'static str> {
        self.facts()?.rest
    }

    /// Whether a state-of-the-world response lists all there is, so that what it does not name is gone.
    pub fn is_full_state(&self) -> bool {
        matches!(self, Self::Listener | Self::Cluster | Self::ScopedRouteConfiguration)
    }

    /// The types whose requests wait while an update of this one is applied, so that all names that it brings go
    /// out in one request, before the update is acknowledged.
    pub(crate) fn children(&self) -> &'static [ResourceType] {
        match self {
            Self::Cluster => &[Self::ClusterLoadAssignment, Self::Secret],
            Self::Listener => &[
                Self::RouteConfiguration,
                Self::ScopedRouteConfiguration,
                Self::ExtensionConfig,
                Self::Secret,
            ],
            Self::ScopedRouteConfiguration => &[Self::RouteConfiguration],
            Self::RouteConfiguration => &[Self::VirtualHost],
            _ => &[],
        }
    }

    /// The text of `error_detail` in Envoy's form.
    pub(crate) fn rejection_message(&self, rejections: &[crate::Rejection]) -> String {
        let each = |separator: &str, with_name: bool| {
            let mut text = String::new();
            for (index, rejection) in rejections.iter().enumerate() {
                if index > 0 {
                    text.push_str(separator);
                }
                if with_name {
                    text.push_str(&rejection.name);
                    text.push_str(": ");
                }
                text.push_str(&rejection.reason);
            }
            text
        };
        match self {
            Self::Cluster => format!("Error adding/updating cluster(s) {}", each(", ", true)),
            // Envoy ends every entry of this list, the last one too, with a line feed.
            Self::Listener => format!("Error adding/updating listener(s) {}\n", each("\n", true)),
            _ => each(", ", rejections.len() > 1),
        }
    }

    /// The text of `error_detail` for a name that stands twice in a response.
    pub(crate) fn duplicate_message(&self, name: &str) -> String {
        match self {
            Self::Cluster => format!("duplicate cluster {name} found"),
            Self::Listener => format!("duplicate listener {name} found"),
            _ => format!("duplicate name {name} found among added/updated resources"),
        }
    }

    /// The types with a service of their own.
    pub fn known() -> [Self; 9] {
        [
            Self::Listener,
            Self::RouteConfiguration,
            Self::ScopedRouteConfiguration,
            Self::VirtualHost,
            Self::Cluster,
            Self::ClusterLoadAssignment,
            Self::Secret,
            Self::Runtime,
            Self::ExtensionConfig,
        ]
    }

    fn facts(&self) -> Option<&'static Facts> {
        Some(match self {
            Self::Listener => &LISTENER,
            Self::RouteConfiguration => &ROUTE,
            Self::ScopedRouteConfiguration => &SCOPED_ROUTE,
            Self::VirtualHost => &VIRTUAL_HOST,
            Self::Cluster => &CLUSTER,
            Self::ClusterLoadAssignment => &ENDPOINT,
            Self::Secret => &SECRET,
            Self::Runtime => &RUNTIME,
            Self::ExtensionConfig => &EXTENSION_CONFIG,
            Self::Other(_) => return None,
        })
    }
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url())
    }
}

impl fmt::Debug for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url().rsplit_once('.').map_or(self.url(), |(_, short)| short))
    }
}
