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
pub mod outliers;
pub mod routes;
pub mod scopes;
pub mod secret_files;
pub mod subscription_stats;
pub mod virtual_hosts;
mod warming;

use bytes::Bytes;
use waystation_schema::{ConfigError, Message, resolve_typed_structs};

/// Decodes a `message` that has passed the walk, every `TypedStruct` in it as the message that it stands for.
fn decode<M: prost::Message + Default>(message: Message, wire: &Bytes) -> Result<M, ConfigError> {
    let resolved = resolve_typed_structs(message, wire)?;
    let wire = resolved.map_or_else(|| wire.clone(), Bytes::from);
    M::decode(wire).map_err(|error| ConfigError::new(error.to_string()))
}
