//! The compact schema: JSON/YAML to wire bytes and back, the validating walk, the ledger.

#![forbid(unsafe_code)]

mod error;

pub use error::{At, ConfigError};
