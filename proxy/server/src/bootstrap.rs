//! The bootstrap: read, merged, validated, decoded.

use std::fmt;
use std::fs;
use std::path::Path;

use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use prost::Message as _;
use waystation_filter_api::http::NodeInfo;
use waystation_schema::{
    ConfigError, Encoded, Format, JsonStyle, Message, Policy, Report, TextOptions, check, to_wire,
    wire_to_json, yaml_to_wire,
};

use crate::cli::options::Options;

/// The name of the bootstrap's message.
pub const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";

/// A bootstrap that passed the walk.
#[derive(Debug)]
pub struct Bootstrap {
    /// The decoded message, the command line's node overrides applied.
    pub proto: pb::Bootstrap,
    /// What the walk found worth telling.
    pub report: Report,
}

/// Why there is no bootstrap.
#[derive(Debug)]
pub enum LoadError {
    /// Neither `--config-path` nor `--config-yaml`.
    Missing,
    /// The file cannot be read.
    InvalidPath(String),
    /// The text is not a bootstrap.
    Malformed(String),
    /// The bootstrap says something that is refused.
    Refused(ConfigError),
}

/// Envoy's words where launchers look for them.
impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str(
                "At least one of --config-path or --config-yaml or Options::configProto() should be non-empty",
            ),
            Self::InvalidPath(path) => write!(f, "Invalid path: {path}"),
            Self::Malformed(text) => f.write_str(text),
            Self::Refused(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for LoadError {}

impl Bootstrap {
    /// Reads the configuration that the command line names.
    pub fn load(options: &Options) -> Result<Self, LoadError> {
        let Some(message) = Message::find(BOOTSTRAP) else {
            return Err(LoadError::Malformed(format!("{BOOTSTRAP} is not in the schema")));
        };
        let text_options = TextOptions { allow_unknown: options.allow_unknown_static_fields };
        let mut wire = Vec::new();
        let mut unknown = Vec::new();
        if let Some(path) = &options.config_path {
            let encoded = read(message, path, text_options)?;
            wire = encoded.wire;
            unknown = encoded.unknown;
        }
        if let Some(yaml) = &options.config_yaml {
            let encoded = yaml_to_wire(message, yaml, text_options)
                .map_err(|error| LoadError::Malformed(format!("--config-yaml: {error}")))?;
            // Concatenated messages merge (protobuf's MergeFrom), which is how Envoy lays one over the other.
            wire.extend_from_slice(&encoded.wire);
            unknown.extend(encoded.unknown);
        }
        if options.config_path.is_none() && options.config_yaml.as_deref().is_none_or(str::is_empty) {
            return Err(LoadError::Missing);
        }
        let policy = Policy { allow_unknown: options.allow_unknown_static_fields, ..Policy::default() };
        let mut report = check(message, &wire, policy).map_err(LoadError::Refused)?;
        report.unknown.extend(unknown);
        let mut proto = pb::Bootstrap::decode(&*wire)
            .map_err(|error| LoadError::Malformed(format!("malformed bootstrap: {error}")))?;
        apply_overrides(&mut proto, options);
        Ok(Self { proto, report })
    }

    /// The log format that `application_log_config` sets, as a pattern for [`crate::log::set_format`].
    pub fn log_format(&self, options: &Options) -> Result<Option<String>, LoadError> {
        use pb::bootstrap::application_log_config::log_format::LogFormat as Format;
        let config = self.proto.application_log_config.as_ref();
        let Some(format) = config.and_then(|config| config.log_format.as_ref()?.log_format.as_ref()) else {
            return Ok(None);
        };
        let refused = |reason: &str| {
            let path = "application_log_config.log_format";
            Err(LoadError::Refused(ConfigError::field(path, reason.to_owned())))
        };
        if options.log_format != crate::log::DEFAULT_FORMAT {
            return refused(
                "Only one of ApplicationLogConfig.log_format or CLI option --log-format can be specified.",
            );
        }
        match format {
            Format::TextFormat(text) => Ok(Some(text.clone())),
            Format::JsonFormat(fields) => {
                let mut text = String::new();
                let message = Message::find("google.protobuf.Struct");
                let rendered = message.map(|message| {
                    wire_to_json(message, &fields.encode_to_vec(), &mut text, JsonStyle::default())
                });
                if !matches!(rendered, Some(Ok(()))) {
                    return refused("json_format cannot be rendered");
                }
                // Inside of JSON the message must be escaped, which only %j does.
                for flag in ["%v", "%_"] {
                    if text.contains(flag) {
                        return refused(&format!("Usage of {flag} is unavailable for JSON log formats"));
                    }
                }
                Ok(Some(text))
            }
        }
    }

    /// Who this proxy is.
    pub fn node(&self) -> NodeInfo {
        let node = self.proto.node.clone().unwrap_or_default();
        NodeInfo {
            id: node.id,
            cluster: node.cluster,
            zone: node.locality.map(|locality| locality.zone).unwrap_or_default(),
        }
    }
}

/// Reads a file in the format that its extension names; another extension is taken as YAML, of which JSON is a part.
fn read(message: Message, path: &Path, options: TextOptions) -> Result<Encoded, LoadError> {
    // A named pipe can be read once and has no size: one read to its end serves all kinds of file.
    let content = fs::read(path).map_err(|_| LoadError::InvalidPath(path.display().to_string()))?;
    let format = Format::of_path(path).unwrap_or(Format::Yaml);
    to_wire(message, format, &content, options)
        .map_err(|error| LoadError::Malformed(format!("{}: {error}", path.display())))
}

/// `--service-*` override the node where they are not empty.
fn apply_overrides(proto: &mut pb::Bootstrap, options: &Options) {
    if options.service_node.is_empty()
        && options.service_cluster.is_empty()
        && options.service_zone.is_empty()
    {
        return;
    }
    let node = proto.node.get_or_insert_with(core::Node::default);
    if !options.service_node.is_empty() {
        node.id.clone_from(&options.service_node);
    }
    if !options.service_cluster.is_empty() {
        node.cluster.clone_from(&options.service_cluster);
    }
    if !options.service_zone.is_empty() {
        node.locality.get_or_insert_with(core::Locality::default).zone.clone_from(&options.service_zone);
    }
}
