//! Statistics by Envoy's names: sharded counters, gauges, histograms, and their rendering.
//!
//! A [`Store`] hands out a root [`Scope`]; a scope is a name prefix that knows which of its segments are tags.
//! From a scope come handles ([`Counter`], [`Gauge`], [`Histogram`], [`TextReadout`]), whole groups declared with
//! [`stats_group!`], and per-status-code families ([`ResponseCodes`]). Handles are resolved when configuration is
//! compiled; nothing on the request path looks at a name.
//!
//! ```
//! use waystation_stats::{Store, stats_group};
//!
//! stats_group! {
//!     /// What a cluster counts.
//!     pub struct ClusterStats {
//!         counters { upstream_cx_total, default_cx_open = "circuit_breakers.default.cx_open" }
//!         gauges { upstream_cx_active }
//!         histograms { upstream_cx_connect_ms: Milliseconds }
//!     }
//! }
//!
//! let store = Store::default();
//! let up = store.root().scope("cluster").tag("envoy.cluster_name", "up");
//! let stats: ClusterStats = up.group();
//! stats.upstream_cx_total().inc();
//! assert_eq!(store.find("cluster.up.upstream_cx_total"), Some(1));
//! ```
//!
//! # Cost
//! Values live in per-worker shards. A worker that called [`Store::register_worker`] is the only writer of its shard,
//! so an increment is one relaxed load and one relaxed store; every other thread shares shard 0 and pays for an atomic
//! add. Names of a group are one static table; a shard of values is allocated when a worker first writes to it. An idle
//! group therefore costs a few hundred bytes however many names it lists, and is still listed (as 0), as Envoy does.
//!
//! # Lifetime and identity
//! The same full name is the same stat while anyone holds a handle to it; when the last handle goes, the name leaves
//! the listings. A cluster that is removed by CDS takes its stats with it, and one that is replaced while its
//! predecessor drains continues the same counters.
#![forbid(unsafe_code)]

mod cells;
mod codes;
mod config;
mod group;
mod handles;
mod histogram;
pub mod render;
mod scope;
mod shard;
mod store;
mod tags;

pub use codes::{ResponseCodes, ResponseStats};
pub use config::{BucketSettings, NamePredicate, StatsConfig, StatsMatcher, TagRule};
pub use group::{Group, GroupCells, GroupDef};
pub use handles::{Counter, CounterRef, Gauge, GaugeRef, Histogram, HistogramRef, TextReadout};
pub use histogram::{Summary, Unit};
pub use scope::Scope;
pub use shard::WorkerShard;
pub use store::{Kind, Stat, Store, Value};
