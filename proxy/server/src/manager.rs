//! The configuration in force: what the xDS client and the bootstrap say, compiled and published.
//!
//! Everything here runs on the main thread; [`configuration`] holds it together. A resource goes: wire bytes, validating
//! walk, protobuf, compiled form, cell. A listener or cluster that refers to others is *warming* until they have arrived
//! (or their `initial_fetch_timeout` has passed); the one it replaces serves until then.

pub mod clusters;
pub mod configuration;
pub mod dump;
pub mod listeners;
pub mod needs;
pub mod offered;
pub mod on_demand;
pub mod routes;
pub mod scopes;
pub mod secret_files;
pub mod subscription_stats;
pub mod virtual_hosts;
mod warming;
