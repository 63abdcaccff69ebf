//! Route tables.

use std::fmt;
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use waystation_filter_api::cell::CellTable;
use waystation_filter_api::http::FilterConfig;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::stream::{RateLimits, RouteView, StreamInfo};
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire::refuse;
use waystation_http::{HeaderName, Headers, Known};
use waystation_schema::{At, ConfigError};
use waystation_stats::Scope;

use crate::cluster::{Cluster, ClusterCell, header};
use crate::filter_config::{FilterConfigs, FilterNames, FilterSlot};
use crate::matching::Request;
use crate::mutations::Mutations;
use crate::policy::MirrorPolicy;
use crate::rate_limits;
use crate::redirect::port_start;
use crate::route::Route;
use crate::stats::RequestCounters;
use crate::virtual_host::{Domains, RequireTls, VirtualHost, segment};

/// The bound of direct response bodies where none is configured.
const DEFAULT_MAX_DIRECT_RESPONSE: usize = 4096;

/// Compiles a filter's per-route configuration from the filter's name and message; `None` when nobody knows the message.
pub type FilterConfigCompiler<'a> = dyn Fn(&str, &Any) -> Result<Option<FilterConfig>, ConfigError> + 'a;

/// What a route configuration refers to.
pub struct CompileContext<'a> {
    /// The cells of clusters.
    pub clusters: &'a CellTable<Cluster>,
    /// Runtime keys.
    pub runtime: &'a Runtime,
    /// The root of the stats, for those below `vhost.`.
    pub stats: Scope,
    /// Whether clusters must exist when the configuration does not say: true for a table in a bootstrap or listener,
    /// false for one from RDS.
    pub validate_clusters: bool,
    /// Compiles per-route configurations of filters.
    pub filter_config: &'a FilterConfigCompiler<'a>,
}

impl fmt::Debug for CompileContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompileContext")
            .field("validate_clusters", &self.validate_clusters)
            .finish_non_exhaustive()
    }
}

/// What all levels share while one table is compiled.
pub(crate) struct Compiler<'a> {
    pub(crate) cx: &'a CompileContext<'a>,
    pub(crate) filters: FilterNames,
    pub(crate) max_direct_response: usize,
    validate_clusters: bool,
}

impl<'a> Compiler<'a> {
    /// For what is compiled outside any table.
    pub(crate) fn new(cx: &'a CompileContext<'a>) -> Self {
        Self {
            cx,
            filters: FilterNames::default(),
            max_direct_response: DEFAULT_MAX_DIRECT_RESPONSE,
            validate_clusters: cx.validate_clusters,
        }
    }

    /// The cell of a cluster, which must exist when clusters are validated.
    pub(crate) fn cluster(&mut self, name: &str) -> Result<ClusterCell, ConfigError> {
        if name.is_empty() {
            return Err(ConfigError::new("must not be empty"));
        }
        let cell = self.cx.clusters.cell(name);
        if self.validate_clusters && !cell.is_set() {
            return Err(ConfigError::new(format!("route: unknown cluster '{name}'")));
        }
        Ok(cell)
    }
}

/// A compiled `RouteConfiguration`. Immutable; an update makes a new one.
#[derive(Debug)]
pub struct RouteTable {
    config: Arc<TableConfig>,
    hosts: Box<[Arc<VirtualHost>]>,
    /// The number of the first route and of the first virtual cluster of each host.
    bases: Box<[(u32, u32)]>,
    domains: Domains,
    pub(crate) filters: FilterNames,
}

/// The parts of a table that are not its virtual hosts.
#[derive(Debug)]
pub(crate) struct TableConfig {
    name: Box<str>,
    on_demand: bool,
    internal_only_headers: Box<[HeaderName]>,
    ignore_port: bool,
    ignore_path_parameters: bool,
    host_header: Option<HeaderName>,
    max_direct_response: usize,
    validate_clusters: bool,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) filters: FilterConfigs,
    pub(crate) request_mutations: Mutations,
    pub(crate) response_mutations: Mutations,
    pub(crate) most_specific_wins: bool,
    pub(crate) mirrors: Arc<[MirrorPolicy]>,
}

/// What a table says about a request.
#[derive(Clone, Copy, Debug)]
pub enum Lookup<'a> {
    /// This route, by number and reference.
    Route(u32, &'a Route),
    /// The virtual host requires TLS: redirect with 301 to [`tls_redirect_location`](crate::tls_redirect_location).
    TlsRedirect(&'a VirtualHost),
    /// No route of the virtual host matches: 404.
    NoRoute(&'a VirtualHost),
    /// No virtual host has the domain: 404, or the caller may ask VHDS when `on_demand`.
    NoVirtualHost {
        /// Whether the table has `vhds`.
        on_demand: bool,
    },
}

impl RouteTable {
    /// Compiles a route configuration. Errors name the path from within it.
    pub fn compile(proto: &pb::RouteConfiguration, cx: &CompileContext<'_>) -> Result<Self, ConfigError> {
        let pb::RouteConfiguration {
            name,
            virtual_hosts,
            vhds,
            internal_only_headers,
            response_headers_to_add,
            response_headers_to_remove,
            request_headers_to_add,
            request_headers_to_remove,
            most_specific_header_mutations_wins,
            validate_clusters,
            max_direct_response_body_size_bytes,
            cluster_specifier_plugins,
            request_mirror_policies,
            ignore_port_in_host_matching,
            vhost_header,
            ignore_path_parameters_in_path_matching,
            typed_per_filter_config,
            metadata,
            route_specifiers,
        } = proto;
        // An optional plugin that nobody knows may be there as long as no route uses it; routes that do are refused.
        for (index, plugin) in cluster_specifier_plugins.iter().enumerate() {
            let reason = "cluster specifier plugins";
            refuse(&format!("cluster_specifier_plugins[{index}]"), !plugin.is_optional, reason)?;
        }
        refuse("route_specifiers", !route_specifiers.is_empty(), "route specifiers")?;
        let max_direct_response =
            max_direct_response_body_size_bytes.map_or(DEFAULT_MAX_DIRECT_RESPONSE, |max| max.value as usize);
        let validate_clusters = validate_clusters.map_or(cx.validate_clusters, |validate| validate.value);
        let mut compiler =
            Compiler { cx, filters: FilterNames::default(), max_direct_response, validate_clusters };
        let internal_only = internal_only_headers
            .iter()
            .enumerate()
            .map(|(index, name)| header(&format!("internal_only_headers[{index}]"), name));
        let config = TableConfig {
            name: name.as_str().into(),
            on_demand: vhds.is_some(),
            internal_only_headers: internal_only.collect::<Result<_, _>>()?,
            ignore_port: *ignore_port_in_host_matching,
            ignore_path_parameters: *ignore_path_parameters_in_path_matching,
            host_header: match &**vhost_header {
                "" => None,
                name => Some(header("vhost_header", name)?),
            },
            max_direct_response,
            validate_clusters,
            metadata: metadata.as_ref().map(Metadata::from_proto),
            filters: compiler.filters.level(&FilterConfigs::default(), typed_per_filter_config, cx)?,
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
            most_specific_wins: *most_specific_header_mutations_wins,
            mirrors: MirrorPolicy::compile_all(request_mirror_policies, &mut compiler)?.into(),
        };
        let hosts = compile_hosts(virtual_hosts.iter(), &config, &mut compiler)?;
        Self::assemble(Arc::new(config), hosts, compiler.filters)
    }

    /// Compiles virtual hosts that come later.
    pub(crate) fn compile_hosts<'p>(
        &self,
        protos: impl Iterator<Item = &'p pb::VirtualHost>,
        filters: &mut FilterNames,
        cx: &CompileContext<'_>,
    ) -> Result<Vec<Arc<VirtualHost>>, ConfigError> {
        let mut compiler = Compiler {
            cx,
            filters: std::mem::take(filters),
            max_direct_response: self.config.max_direct_response,
            validate_clusters: self.config.validate_clusters,
        };
        let hosts = compile_hosts(protos, &self.config, &mut compiler);
        *filters = compiler.filters;
        hosts
    }

    /// The table with these virtual hosts behind its own.
    pub(crate) fn with_hosts<'h>(
        &self,
        added: impl Iterator<Item = &'h Arc<VirtualHost>>,
        filters: &FilterNames,
    ) -> Result<Self, ConfigError> {
        let hosts = self.hosts.iter().cloned().chain(added.cloned()).collect();
        Self::assemble(Arc::clone(&self.config), hosts, filters.clone())
    }

    fn assemble(
        config: Arc<TableConfig>,
        hosts: Vec<Arc<VirtualHost>>,
        filters: FilterNames,
    ) -> Result<Self, ConfigError> {
        let mut bases = Vec::with_capacity(hosts.len());
        let mut base = (0, 0);
        for host in &hosts {
            bases.push(base);
            // A configuration has far fewer than 2^32 routes: it would not fit in a message.
            base.0 += host.routes.len() as u32;
            base.1 += host.virtual_clusters.len() as u32;
        }
        let domains = Domains::new(&hosts, &config.name).at(|| "virtual_hosts")?;
        Ok(Self { config, hosts: hosts.into(), bases: bases.into(), domains, filters })
    }

    /// The route of a request. `random` decides runtime fractions; the same value picks a weighted cluster later.
    #[inline]
    pub fn find(&self, headers: &Headers, info: &StreamInfo, random: u64) -> Lookup<'_> {
        let Some(index) = self.domains.find(self.host(headers)) else {
            return Lookup::NoVirtualHost { on_demand: self.config.on_demand };
        };
        let host = &*self.hosts[index as usize];
        if host.require_tls != RequireTls::None && needs_tls(host.require_tls, headers) {
            return Lookup::TlsRedirect(host);
        }
        let path = headers.path().filter(|path| !path.is_empty());
        let path = path.map(|target| Route::matched_path(target, self.config.ignore_path_parameters));
        match host.find(&Request { headers, info, random, path }) {
            Some(route) => Lookup::Route(self.bases[index as usize].0 + route, &host.routes[route as usize]),
            None => Lookup::NoRoute(host),
        }
    }

    /// Whether a virtual host has the request's domain.
    pub fn has_virtual_host(&self, headers: &Headers) -> bool {
        self.domains.find(self.host(headers)).is_some()
    }

    /// The text that virtual hosts are chosen by.
    fn host<'a>(&self, headers: &'a Headers) -> &'a [u8] {
        let host = match &self.config.host_header {
            Some(name) => headers.get(name),
            None => headers.authority(),
        };
        let host = host.unwrap_or_default();
        match port_start(host) {
            Some(port) if self.config.ignore_port => &host[..port],
            _ => host,
        }
    }

    /// The name of the route configuration.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// `metadata` of the route configuration.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.config.metadata.as_ref()
    }

    /// Headers that only requests from inside may carry.
    pub fn internal_only_headers(&self) -> &[HeaderName] {
        &self.config.internal_only_headers
    }

    /// Whether missing virtual hosts may be asked for (`vhds`).
    pub fn is_on_demand(&self) -> bool {
        self.config.on_demand
    }

    /// The slot of a filter, by its name in the filter chain; `None` when no level configures it.
    pub fn filter_slot(&self, filter: &str) -> Option<FilterSlot> {
        self.filters.find(filter)
    }

    /// The virtual hosts.
    pub fn virtual_hosts(&self) -> impl Iterator<Item = &VirtualHost> {
        self.hosts.iter().map(|host| &**host)
    }

    /// A route by the number that [`find`](Self::find) gave.
    pub fn route(&self, route: u32) -> Option<&Route> {
        let (host, base) = self.place(route)?;
        host.routes.get((route - base) as usize)
    }

    /// The virtual host of a route.
    pub fn virtual_host(&self, route: u32) -> Option<&VirtualHost> {
        Some(self.place(route)?.0)
    }

    /// The virtual cluster that a request of this route falls in, by number.
    pub fn virtual_cluster(&self, route: u32, headers: &Headers) -> Option<u32> {
        let index = self.host_index(route)?;
        Some(self.bases[index].1 + self.hosts[index].virtual_cluster(headers)?)
    }

    /// What a request of this route counts in besides its cluster: its virtual cluster, and the route itself.
    pub fn counters(&self, route: u32, virtual_cluster: Option<u32>) -> [Option<&RequestCounters>; 2] {
        let Some(index) = self.host_index(route) else { return [None; 2] };
        let of_cluster =
            self.hosts[index].counters(virtual_cluster.map(|number| number - self.bases[index].1));
        [of_cluster, self.route(route).and_then(|route| route.counters.as_deref())]
    }

    fn place(&self, route: u32) -> Option<(&VirtualHost, u32)> {
        let index = self.host_index(route)?;
        Some((&self.hosts[index], self.bases[index].0))
    }

    fn host_index(&self, route: u32) -> Option<usize> {
        // Hosts without routes share their base with the next one, which comes later.
        self.bases.partition_point(|(base, _)| *base <= route).checked_sub(1)
    }
}

impl RouteView for RouteTable {
    fn route_name(&self, route: u32) -> &str {
        self.route(route).map_or("", |route| &route.name)
    }

    fn route_metadata(&self, route: u32) -> Option<&Metadata> {
        self.route(route)?.metadata.as_deref()
    }

    fn virtual_host_name(&self, route: u32) -> &str {
        self.virtual_host(route).map_or("", |host| &host.name)
    }

    fn virtual_host_metadata(&self, route: u32) -> Option<&Metadata> {
        self.virtual_host(route)?.metadata.as_ref()
    }

    fn rate_limits(&self, route: u32) -> Option<RateLimits<'_>> {
        rate_limits::of(self, route)
    }

    fn virtual_cluster_name(&self, virtual_cluster: u32) -> Option<&str> {
        let index = self.bases.partition_point(|(_, base)| *base <= virtual_cluster).checked_sub(1)?;
        let place = virtual_cluster - self.bases[index].1;
        self.hosts[index].virtual_clusters.get(place as usize).map(|cluster| &*cluster.name)
    }
}

fn compile_hosts<'p>(
    protos: impl Iterator<Item = &'p pb::VirtualHost>,
    config: &TableConfig,
    compiler: &mut Compiler<'_>,
) -> Result<Vec<Arc<VirtualHost>>, ConfigError> {
    let mut hosts = Vec::with_capacity(protos.size_hint().0);
    for (index, proto) in protos.enumerate() {
        let host = VirtualHost::compile(proto, config, compiler);
        hosts.push(Arc::new(host.at(|| segment("virtual_hosts", index, &proto.name))?));
    }
    Ok(hosts)
}

/// The connection manager has set `x-forwarded-proto` and `x-envoy-internal` before it asks for a route.
fn needs_tls(requirement: RequireTls, headers: &Headers) -> bool {
    let secure =
        headers.get(Known::XForwardedProto).is_some_and(|proto| proto.eq_ignore_ascii_case(b"https"));
    let internal = headers.get(Known::XEnvoyInternal) == Some(b"true");
    match requirement {
        RequireTls::None => false,
        RequireTls::ExternalOnly => !secure && !internal,
        RequireTls::All => !secure,
    }
}

#[cfg(test)]
mod tests;
