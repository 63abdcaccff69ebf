//! Clusters, hosts, load balancing and discovery of endpoints: everything about upstreams that needs no socket.
//!
//! A [`Cluster`] is compiled configuration plus the cluster's live endpoints; it lives in a cell of a [`ClusterTable`].
//! Endpoint updates go through [`Cluster::endpoints`]: they are diffed against the hosts in force, and a new immutable
//! [`Snapshot`] with ready-made balancers is published by one swap. A worker keeps one [`LocalLb`] per cluster and calls
//! [`Cluster::pick`]: no lock, no allocation and no shared reference count.
//!
//! * [`cluster`]: the compiled `envoy.config.cluster.v3.Cluster`;
//! * [`host`], [`host_set`]: endpoints, their health and statistics, and the sets that are balanced over;
//! * [`load_balancer`]: priorities, localities, subsets, and the policies;
//! * [`admission`]: circuit breakers, exact across workers;
//! * [`health_check`]: active health checks, decided without sockets;
//! * [`outlier`]: passive health checks;
//! * [`discovery`]: what EDS, DNS and ORIGINAL_DST make of their inputs;
//! * [`stats`]: the cluster's statistics.

#![forbid(unsafe_code)]

pub mod admission;
pub mod cluster;
pub mod discovery;
pub mod health_check;
pub mod host;
pub mod host_set;
pub mod jitter;
pub mod load_balancer;
pub mod outlier;
pub mod stats;
mod target;

use waystation_filter_api::cell::CellTable;

pub use admission::{Admission, Permit, Priority};
pub use cluster::{Cluster, CompileContext};
pub use host::{Health, Host, HostRef};
pub use host_set::Snapshot;
pub use load_balancer::{LocalLb, MetadataMatch, NoHost, PickContext};
pub use stats::ClusterStats;

/// All clusters by name.
pub type ClusterTable = CellTable<Cluster>;
