//! The compact schema of the Envoy API: everything this project knows about protobuf messages at run time.
//!
//! The build script compiles the protos that `envoy-types` ships to one read-only table: messages, fields, enums,
//! `protoc-gen-validate` rules, deprecations, and the ledger of what we implement (`ledger.txt`). Nothing happens
//! at start and nothing lives on the heap; a type is a two-byte [`Message`], a field a four-byte [`Field`].
//!
//! Messages stay what they are on the wire. On the wire bytes work
//! - [`json_to_wire`], [`yaml_to_wire`], [`pb_text_to_wire`], and [`to_wire`] over all formats: a text becomes wire
//!   bytes, with Envoy's reading of each; an error names the message path, line and column;
//! - [`wire_to_json`]: the way back, for the admin endpoints;
//! - [`walk`]: one pass that reports every [`Finding`] with its [`Place`]; [`check`] is the walk with a policy;
//! - [`merge`]: protobuf's `MergeFrom`;
//! - [`locate`]: from a message path back to line and column;
//! - [`typed_struct_to_wire`]: a message that travels as a `google.protobuf.Struct`.
//!
//! ```
//! use waystation_schema::{Message, Policy, TextOptions, check, yaml_to_wire};
//!
//! let cluster = Message::find("envoy.config.cluster.v3.Cluster").unwrap();
//! let encoded = yaml_to_wire(cluster, "{name: backend, connect_timeout: 0s}", TextOptions::default()).unwrap();
//! assert_eq!(
//!     check(cluster, &encoded.wire, Policy::default()).unwrap_err().to_string(),
//!     "connect_timeout: Proto constraint validation failed \
//!      (ClusterValidationError.ConnectTimeout: value must be greater than 0s)"
//! );
//! ```

#![forbid(unsafe_code)]

mod check;
mod document;
mod encode;
mod error;
mod json;
mod layout;
pub mod ledger;
mod locate;
mod merge;
mod message;
mod render;
mod table;
mod text_format;
mod typed_struct;
mod walk;
mod wire;
mod yaml;

pub use check::{Policy, Report, check};
pub use document::TextError;
pub use encode::{Encoded, TextOptions};
pub use error::{At, ConfigError};
pub use locate::locate;
pub use merge::merge;
pub use message::{Enum, EnumValue, Field, Kind, Message, TYPE_URL_PREFIX, Type};
pub use render::{JsonStyle, RenderError, wire_to_json};
pub use typed_struct::{resolve_typed_structs, typed_struct_to_wire};
pub use walk::{Finding, Place, Violation, Visitor, walk};
pub use wire::WireError;

/// The formats in which a configuration is written.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Format {
    /// `.json`
    Json,
    /// `.yaml`, `.yml`
    Yaml,
    /// `.pb_text`: the protobuf text format.
    ProtoText,
    /// `.pb`: the wire format.
    ProtoBinary,
}

impl Format {
    /// The format that a file name's extension stands for in any case of letters, if any.
    pub fn of_path(path: &std::path::Path) -> Option<Self> {
        match &*path.extension()?.to_str()?.to_ascii_lowercase() {
            "json" => Some(Self::Json),
            "yaml" | "yml" => Some(Self::Yaml),
            "pb_text" => Some(Self::ProtoText),
            "pb" => Some(Self::ProtoBinary),
            _ => None,
        }
    }
}

/// Reads JSON (the proto3 mapping, as liberal as Envoy) as a message and writes it in wire form.
pub fn json_to_wire(message: Message, text: &str, options: TextOptions) -> Result<Encoded, TextError> {
    encode::encode(message, &json::parse(text)?, options)
}

/// Reads one YAML document as a message, plain scalars as Envoy takes them, and writes it in wire form.
pub fn yaml_to_wire(message: Message, text: &str, options: TextOptions) -> Result<Encoded, TextError> {
    encode::encode(message, &yaml::parse(text)?, options)
}

/// Reads the protobuf text format as a message and writes it in wire form.
///
/// An unknown field is always an error: the format has no way to skip its value.
pub fn pb_text_to_wire(message: Message, text: &str) -> Result<Vec<u8>, TextError> {
    text_format::encode(message, text)
}

/// Reads the content of a file in any format as a message and writes it in wire form.
///
/// [`Format::ProtoBinary`] passes unread: [`check`] finds what is wrong with it.
pub fn to_wire(
    message: Message,
    format: Format,
    content: &[u8],
    options: TextOptions,
) -> Result<Encoded, ConfigError> {
    if format == Format::ProtoBinary {
        return Ok(Encoded { wire: content.to_vec(), unknown: Vec::new() });
    }
    let text = std::str::from_utf8(content).map_err(|error| {
        ConfigError::new(format!("the text is not UTF-8 from byte {} on", error.valid_up_to()))
    })?;
    // Editors leave byte order marks.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match format {
        Format::Json => Ok(json_to_wire(message, text, options)?),
        Format::Yaml => Ok(yaml_to_wire(message, text, options)?),
        Format::ProtoText | Format::ProtoBinary => {
            Ok(Encoded { wire: pb_text_to_wire(message, text)?, unknown: Vec::new() })
        }
    }
}

/// The version of the `envoy-types` crate whose protos the tables describe.
pub const ENVOY_TYPES_VERSION: &str = env!("ENVOY_TYPES_VERSION");

/// The size of the tables in bytes: all there is, and all of it read-only.
pub fn table_size() -> usize {
    table::BLOB.len()
}
