//! The compact schema: JSON/YAML to wire bytes and back, the validating walk, the ledger.

#![forbid(unsafe_code)]

mod check;
mod document;
mod encode;
mod error;
mod json;
mod layout;
pub mod ledger;
mod merge;
mod message;
mod render;
mod table;
mod typed_struct;
mod walk;
mod wire;
mod yaml;

pub use check::{Policy, Report, check};
pub use document::TextError;
pub use encode::{Encoded, TextOptions};
pub use error::{At, ConfigError};
pub use merge::merge;
pub use message::{Enum, EnumValue, Field, Kind, Message, TYPE_URL_PREFIX, Type};
pub use render::{JsonStyle, RenderError, wire_to_json};
pub use typed_struct::typed_struct_to_wire;
pub use walk::{Finding, Place, Violation, Visitor, walk};
pub use wire::WireError;

/// Reads JSON (RFC 8259, the proto3 mapping) as a message and writes it in wire form.
pub fn json_to_wire(message: Message, text: &str, options: TextOptions) -> Result<Encoded, TextError> {
    encode::encode(message, &json::parse(text)?, options)
}

/// Reads one YAML document as a message, plain scalars as Envoy takes them, and writes it in wire form.
pub fn yaml_to_wire(message: Message, text: &str, options: TextOptions) -> Result<Encoded, TextError> {
    encode::encode(message, &yaml::parse(text)?, options)
}

/// The size of the tables in bytes: all there is, and all of it read-only.
pub fn table_size() -> usize {
    table::BLOB.len()
}
