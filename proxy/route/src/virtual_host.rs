//! Virtual hosts, and the choice among them.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use pb::virtual_host::TlsRequirementType;
use smallvec::SmallVec;
use waystation_filter_api::value::Metadata;
use waystation_filter_api::wire::{refuse, type_name, unpack};
use waystation_http::Headers;
use waystation_matchers::{HeaderMatcher, InputScope, Inputs, Matcher, PrefixMap, TreeContext, all_match};
use waystation_ratelimit::descriptor::Policies;
use waystation_schema::{At, ConfigError};

use crate::filter_config::FilterConfigs;
use crate::index::RouteIndex;
use crate::matching::Request;
use crate::mutations::Mutations;
use crate::policy::{HedgePolicy, MirrorPolicy};
use crate::rate_limits;
use crate::retry::{self, RetryPolicy};
use crate::route::Route;
use crate::stats::RequestCounters;
use crate::table::{Compiler, TableConfig};

/// Compiled `VirtualHost`.
#[derive(Debug)]
pub struct VirtualHost {
    /// `name`.
    pub name: Box<str>,
    /// `metadata`.
    pub metadata: Option<Metadata>,
    /// `require_tls`.
    pub require_tls: RequireTls,
    /// Whether requests carry `x-envoy-attempt-count`.
    pub include_request_attempt_count: bool,
    /// Whether responses do.
    pub include_attempt_count_in_response: bool,
    /// Whether retries after a per-try timeout carry `x-envoy-is-timeout-retry`.
    pub include_is_timeout_retry_header: bool,
    pub(crate) rate_limits: Option<Box<Policies>>,
    pub(crate) domains: Box<[Box<str>]>,
    pub(crate) routes: Box<[Route]>,
    pub(crate) virtual_clusters: Box<[VirtualCluster]>,
    /// What requests count in that fall in none of the virtual clusters there are.
    other_counters: Option<Box<RequestCounters>>,
    selector: Selector,
}

/// Compiled `require_tls`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum RequireTls {
    /// No request needs TLS.
    #[default]
    None,
    /// Requests from outside do.
    ExternalOnly,
    /// All do.
    All,
}

#[derive(Debug)]
enum Selector {
    Index(RouteIndex),
    /// `matcher`: its actions are lists of routes.
    Tree(Box<Matcher<RouteIndex>>),
}

/// Compiled `VirtualCluster`.
#[derive(Debug)]
pub(crate) struct VirtualCluster {
    pub(crate) name: Box<str>,
    headers: Box<[HeaderMatcher]>,
    counters: Box<RequestCounters>,
}

/// What a virtual host and its table hand down to their routes.
#[derive(Debug)]
pub(crate) struct Defaults {
    /// The virtual host's name.
    pub(crate) host: Box<str>,
    pub(crate) filters: FilterConfigs,
    /// Of the virtual host and of the table.
    pub(crate) request_mutations: [Mutations; 2],
    pub(crate) response_mutations: [Mutations; 2],
    pub(crate) most_specific_wins: bool,
    pub(crate) retry_policy: Option<Arc<RetryPolicy>>,
    pub(crate) hedge: HedgePolicy,
    pub(crate) mirrors: Arc<[MirrorPolicy]>,
    pub(crate) request_body_buffer_limit: Option<u64>,
}

impl VirtualHost {
    #[expect(deprecated, reason = "deprecated fields are implemented or refused, not passed over")]
    pub(crate) fn compile(
        proto: &pb::VirtualHost,
        table: &TableConfig,
        compiler: &mut Compiler<'_>,
    ) -> Result<Self, ConfigError> {
        let pb::VirtualHost {
            name,
            domains,
            routes,
            matcher,
            require_tls: _,
            virtual_clusters,
            rate_limits,
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            cors,
            typed_per_filter_config,
            include_request_attempt_count,
            include_attempt_count_in_response,
            retry_policy,
            retry_policy_typed_config,
            hedge_policy,
            include_is_timeout_retry_header,
            per_request_buffer_limit_bytes,
            request_body_buffer_limit,
            request_mirror_policies,
            metadata,
            route_specifiers,
        } = proto;
        refuse("cors", cors.is_some(), "use typed_per_filter_config of envoy.filters.http.cors")?;
        refuse("route_specifiers", !route_specifiers.is_empty(), "route specifiers")?;
        if name.is_empty() {
            return Err(ConfigError::field("name", "must not be empty"));
        }
        if domains.is_empty() {
            return Err(ConfigError::field("domains", "must not be empty"));
        }
        let mirrors = MirrorPolicy::compile_all(request_mirror_policies, compiler)?;
        let defaults = Defaults {
            host: name.as_str().into(),
            filters: compiler.filters.level(&table.filters, typed_per_filter_config, compiler.cx)?,
            request_mutations: [
                Mutations::compile(request_headers_to_add, request_headers_to_remove, "request")?,
                table.request_mutations.clone(),
            ],
            response_mutations: [
                Mutations::compile(response_headers_to_add, response_headers_to_remove, "response")?,
                table.response_mutations.clone(),
            ],
            most_specific_wins: table.most_specific_wins,
            retry_policy: retry::compile_either(retry_policy.as_ref(), retry_policy_typed_config.as_ref())?
                .map(Arc::new),
            hedge: hedge_policy.as_ref().map_or_else(HedgePolicy::default, HedgePolicy::compile),
            mirrors: if mirrors.is_empty() { Arc::clone(&table.mirrors) } else { mirrors.into() },
            request_body_buffer_limit: request_body_buffer_limit
                .map(|limit| limit.value)
                .or(per_request_buffer_limit_bytes.map(|limit| u64::from(limit.value))),
        };
        let mut compiled = Vec::with_capacity(routes.len());
        let selector = match matcher {
            Some(_) if !routes.is_empty() => {
                return Err(ConfigError::new("cannot set both matcher and routes on virtual host"));
            }
            Some(matcher) => {
                let tree = compile_tree(matcher, &defaults, &mut compiled, compiler).at(|| "matcher")?;
                Selector::Tree(Box::new(tree))
            }
            None => {
                for (index, route) in routes.iter().enumerate() {
                    let route = Route::compile(route, &defaults, compiler)
                        .at(|| segment("routes", index, &route.name))?;
                    compiled.push(route);
                }
                Selector::Index(index_of(&compiled, 0))
            }
        };
        let (root, host) = (&compiler.cx.stats, name);
        let other_counters =
            (!virtual_clusters.is_empty()).then(|| RequestCounters::of_virtual_cluster(root, host, "other"));
        let virtual_clusters = virtual_clusters.iter().enumerate().map(|(index, proto)| {
            let pb::VirtualCluster { headers, name } = proto;
            let headers = HeaderMatcher::compile_all(headers, "headers");
            let headers = headers.at(|| segment("virtual_clusters", index, name))?;
            if headers.is_empty() {
                let reason = "at least one header matcher is required";
                return Err(ConfigError::field(segment("virtual_clusters", index, name), reason));
            }
            let counters = RequestCounters::of_virtual_cluster(root, host, name);
            Ok(VirtualCluster { name: name.as_str().into(), headers, counters })
        });
        Ok(Self {
            name: name.as_str().into(),
            metadata: metadata.as_ref().map(Metadata::from_proto),
            require_tls: match proto.require_tls() {
                TlsRequirementType::None => RequireTls::None,
                TlsRequirementType::ExternalOnly => RequireTls::ExternalOnly,
                TlsRequirementType::All => RequireTls::All,
            },
            include_request_attempt_count: *include_request_attempt_count,
            include_attempt_count_in_response: *include_attempt_count_in_response,
            include_is_timeout_retry_header: *include_is_timeout_retry_header,
            rate_limits: rate_limits::compile(rate_limits, compiler.cx)?,
            domains: domains.iter().map(|domain| domain.to_ascii_lowercase().into()).collect(),
            virtual_clusters: virtual_clusters.collect::<Result<_, _>>()?,
            other_counters,
            routes: compiled.into(),
            selector,
        })
    }

    /// Its routes, in order.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// The first route that matches, by its place in this virtual host.
    #[inline]
    pub(crate) fn find(&self, request: &Request<'_>) -> Option<u32> {
        let index = match &self.selector {
            Selector::Index(index) => index,
            Selector::Tree(tree) => {
                tree.evaluate(&Inputs::request(request.info, request.headers)).action()?
            }
        };
        index.find(request.path, |index| self.routes[index as usize].matcher.is_rest_match(request))
    }

    /// What the requests of a virtual cluster count in, or those of none; nothing where there are no virtual clusters.
    pub(crate) fn counters(&self, virtual_cluster: Option<u32>) -> Option<&RequestCounters> {
        match virtual_cluster {
            Some(index) => self.virtual_clusters.get(index as usize).map(|found| &*found.counters),
            None => self.other_counters.as_deref(),
        }
    }

    /// The first virtual cluster that a request falls in.
    pub(crate) fn virtual_cluster(&self, headers: &Headers) -> Option<u32> {
        let found = self.virtual_clusters.iter().position(|cluster| all_match(&cluster.headers, headers))?;
        u32::try_from(found).ok()
    }
}

/// `routes[3]`, or `routes[name]` for a named element.
pub(crate) fn segment(field: &str, index: usize, name: &str) -> String {
    if name.is_empty() { format!("{field}[{index}]") } else { format!("{field}[{name}]") }
}

fn index_of(routes: &[Route], base: usize) -> RouteIndex {
    // A configuration has far fewer than 2^32 routes: it would not fit in a message.
    RouteIndex::new(routes.iter().enumerate().map(|(index, route)| ((base + index) as u32, &route.matcher)))
}

fn compile_tree(
    proto: &envoy_types::pb::xds::r#type::matcher::v3::Matcher,
    defaults: &Defaults,
    routes: &mut Vec<Route>,
    compiler: &mut Compiler<'_>,
) -> Result<Matcher<RouteIndex>, ConfigError> {
    let runtime = compiler.cx.runtime;
    // The tree calls back from within its own recursion.
    let state = std::cell::RefCell::new((routes, compiler));
    let action = |action: &TypedExtensionConfig| {
        let (routes, compiler) = &mut *state.borrow_mut();
        let any =
            action.typed_config.as_ref().ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        let list = match type_name(any) {
            "envoy.config.route.v3.Route" => vec![unpack::<pb::Route>(any).at(|| "typed_config")?],
            "envoy.config.route.v3.RouteList" => unpack::<pb::RouteList>(any).at(|| "typed_config")?.routes,
            name => {
                return Err(ConfigError::field(
                    "typed_config",
                    format!("not supported: route action {name}"),
                ));
            }
        };
        let base = routes.len();
        for (index, route) in list.iter().enumerate() {
            let route =
                Route::compile(route, defaults, compiler).at(|| segment("routes", index, &route.name));
            routes.push(route.at(|| "typed_config")?);
        }
        Ok(index_of(&routes[base..], base))
    };
    Matcher::compile(proto, &TreeContext { scope: InputScope::Http, runtime, action: &action })
}

/// Virtual hosts by domain: exact, longest `*suffix`, longest `prefix*`, `*`. All lower case.
#[derive(Debug)]
pub(crate) struct Domains {
    exact: HashMap<Box<[u8]>, u32>,
    /// By reversed suffix.
    suffixes: PrefixMap<u32>,
    prefixes: PrefixMap<u32>,
    any: Option<u32>,
}

impl Domains {
    pub(crate) fn new(hosts: &[Arc<VirtualHost>], table: &str) -> Result<Self, ConfigError> {
        let mut exact = HashMap::new();
        let mut suffixes = HashMap::new();
        let mut prefixes = HashMap::new();
        let mut any = None;
        for (index, host) in hosts.iter().enumerate() {
            let index = index as u32;
            for domain in &host.domains {
                let bytes = domain.as_bytes();
                let taken = match bytes {
                    b"*" => {
                        if any.replace(index).is_some() {
                            let reason =
                                format!("Only a single wildcard domain is permitted in route {table}");
                            return Err(ConfigError::new(reason));
                        }
                        None
                    }
                    [b'*', suffix @ ..] => {
                        suffixes.insert(suffix.iter().rev().copied().collect::<Vec<u8>>(), index)
                    }
                    [prefix @ .., b'*'] => prefixes.insert(prefix.to_vec(), index),
                    _ => exact.insert(bytes.into(), index),
                };
                if taken.is_some() {
                    return Err(ConfigError::new(format!(
                        "Only unique values for domains are permitted. Duplicate entry of domain {domain} in route {table}"
                    )));
                }
            }
        }
        Ok(Self {
            exact,
            suffixes: PrefixMap::build(suffixes, false, |_, _| ()),
            prefixes: PrefixMap::build(prefixes, false, |_, _| ()),
            any,
        })
    }

    /// The virtual host of a host name.
    #[inline]
    pub(crate) fn find(&self, host: &[u8]) -> Option<u32> {
        if (self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty()) || host.is_empty()
        {
            return self.any;
        }
        let mut lower: SmallVec<[u8; 256]> = host.into();
        lower.make_ascii_lowercase();
        if let Some(found) = self.exact.get(&lower[..]) {
            return Some(*found);
        }
        // A wildcard stands for at least one character.
        let longest = |map: &PrefixMap<u32>, text: &[u8]| {
            map.prefixes(text).take_while(|(len, _)| *len < text.len()).last().map(|(_, found)| *found)
        };
        if !self.suffixes.is_empty() {
            let reversed: SmallVec<[u8; 256]> = lower.iter().rev().copied().collect();
            if let Some(found) = longest(&self.suffixes, &reversed) {
                return Some(found);
            }
        }
        longest(&self.prefixes, &lower).or(self.any)
    }
}
