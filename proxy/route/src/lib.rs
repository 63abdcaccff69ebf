//! Route tables: virtual hosts, matchers and actions, compiled once and matched flat.
//!
//! [`RouteTable::compile`] turns a `RouteConfiguration` into an immutable table; [`RouteTable::find`] gives the route
//! of a request in time that does not grow with the number of virtual hosts and routes, and without allocating.
//! What to do with the request is the route's [`Action`]; the parts of it that change a request or make a reply are
//! pure functions on [`Headers`](waystation_http::Headers):
//!
//! * [`Route::rewrite`], [`Route::rewrite_host_to_upstream`]: path and host rewrites;
//! * [`Route::redirect`], [`tls_redirect_location`]: redirects;
//! * [`RouteAction::target`]: the cluster, weighted ones by random value;
//! * [`timeouts`]: timeouts with the `x-envoy-*` and `grpc-timeout` headers;
//! * [`HashPolicy::hash`]: the hash for consistent load balancing;
//! * [`RetryPolicy::for_request`]: what is retried, headers included.
//!
//! Header mutations of all levels come in the order in which Envoy applies them from
//! [`Route::request_mutations`] and [`Route::response_mutations`]; per-filter configuration from
//! [`Route::filter_config`], resolved over all levels when the table was compiled.

#![forbid(unsafe_code)]

mod action;
mod added;
mod cluster;
mod cluster_policies;
mod direct_response;
mod filter_config;
mod hash;
mod index;
mod matching;
mod mutations;
mod policy;
mod rate_limits;
mod redirect;
mod retry;
mod rewrite;
mod route;
mod scoped;
mod stats;
mod table;
pub mod timeouts;
mod virtual_host;

pub use action::{Action, RouteAction};
pub use added::AddedHosts;
pub use cluster::{
    Cluster, ClusterCell, ClusterRef, ClusterSpecifier, MetadataMatch, Priority, Target, WeightedCluster,
    WeightedClusters,
};
pub use cluster_policies::ClusterPolicies;
pub use direct_response::DirectResponse;
pub use filter_config::{FilterLevels, FilterSlot};
pub use hash::HashPolicy;
pub use mutations::Mutations;
pub use policy::{HedgePolicy, InternalRedirectPolicy, MirrorPolicy, RedirectPredicate, UpgradeConfig};
pub use redirect::{Redirect, tls_redirect_location};
pub use retry::{
    BackOff, HostLabels, RateLimitedBackOff, RequestRetry, ResetHeader, RetryHostPredicate, RetryOn,
    RetryPolicy,
};
pub use rewrite::{HostRewrite, PathRewrite};
pub use route::Route;
pub use scoped::{ScopeKey, ScopeKeyBuilder, ScopedTable};
pub use stats::{RequestCounters, RequestStats};
pub use table::{CompileContext, FilterConfigCompiler, Lookup, RouteTable};
pub use virtual_host::{RequireTls, VirtualHost};
