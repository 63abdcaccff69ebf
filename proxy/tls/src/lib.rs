//! TLS contexts and secrets over rustls.
//!
//! A [`ServerContext`] or [`ClientContext`] is compiled from Envoy's `DownstreamTlsContext` or
//! `UpstreamTlsContext`. Secrets that come by SDS are held as cells: a rotation swaps the rustls configuration that
//! new handshakes use and drops no connection. A context whose new secrets do not fit together keeps the old ones.
//!
//! Peers are verified as Envoy does, which is not what rustls does by default: without a validation context any
//! certificate is accepted, `trusted_ca` alone checks the chain but no name, and names are checked by SAN matchers
//! or by the name that a connection asks for.
#![forbid(unsafe_code)]

mod ciphers;
mod client;
mod common;
mod encrypted_key;
mod follow;
mod identity;
mod ocsp;
mod parameters;
mod secret;
mod server;
mod session;
mod signature;
mod stats;
mod validation;
mod x509;

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_filter_api::cell::{Cell, CellTable};
use waystation_schema::ConfigError;

pub use client::{ClientContext, ClientOptions};
pub use secret::{GenericSecret, Secret, SecretKind};
pub use server::ServerContext;

/// Secrets by name; a context that refers to one holds its cell and follows rotations.
pub type SecretTable = CellTable<Secret>;

/// Where contexts get secrets by name.
pub trait Secrets {
    /// The cell of a secret that comes from `source`; a static secret of the bootstrap when there is no source.
    fn secret(
        &self,
        kind: SecretKind,
        source: Option<&core::ConfigSource>,
        name: &str,
    ) -> Result<Arc<Cell<Secret>>, ConfigError>;
}
