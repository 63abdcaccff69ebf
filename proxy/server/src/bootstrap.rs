//! The bootstrap: read, merged, validated, decoded.

use std::fmt;
use std::fs;
use std::path::Path;

use bytes::Bytes;
use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};
use prost::{DecodeError, Message as _};
use waystation_filter_api::http::NodeInfo;
use waystation_filter_api::value::struct_from_proto;
use waystation_schema::{
    ConfigError, Encoded, Format, JsonStyle, Message, Policy, Report, TextOptions, check,
    resolve_typed_structs, to_wire, wire_to_json, yaml_to_wire,
};

use crate::cli::options::Options;

/// The name of the bootstrap's message.
pub const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";

/// A bootstrap that passed the walk.
#[derive(Debug)]
pub struct Bootstrap {
    /// The decoded message without its static clusters and listeners, the command line's node overrides applied.
    pub proto: pb::Bootstrap,
    /// The whole message, encoded.
    pub wire: Bytes,
    /// The static clusters, encoded. Each is decoded when it is compiled: thousands of decoded ones at a time would weigh
    /// more than all that is made of them.
    pub clusters: Vec<Bytes>,
    /// The static listeners, encoded: what is compared to tell what an update leaves unchanged.
    pub listeners: Vec<Bytes>,
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
        Self::decode(wire.into(), options, report)
    }

    /// Decodes a bootstrap that passed the walk.
    pub fn decode(wire: Bytes, options: &Options, report: Report) -> Result<Self, LoadError> {
        let malformed = |error| LoadError::Malformed(format!("malformed bootstrap: {error}"));
        let message = Message::find(BOOTSTRAP);
        let resolved = message.map_or(Ok(None), |message| resolve_typed_structs(message, &wire));
        // What was configured is what is dumped.
        let resolved = resolved.map_err(LoadError::Refused)?.map_or_else(|| wire.clone(), Bytes::from);
        let Split { rest, clusters, listeners } = split(&resolved).map_err(malformed)?;
        let mut proto = pb::Bootstrap::decode(&*rest).map_err(malformed)?;
        apply_overrides(&mut proto, options);
        Ok(Self { proto, wire, clusters, listeners, report })
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
            metadata: node.metadata.as_ref().map(struct_from_proto).unwrap_or_default(),
            zone: node.locality.map(|locality| locality.zone).unwrap_or_default(),
        }
    }
}

/// An encoded bootstrap in parts.
#[derive(Default)]
struct Split {
    rest: Vec<u8>,
    clusters: Vec<Bytes>,
    listeners: Vec<Bytes>,
}

/// Takes `static_resources.clusters` and `.listeners` out of an encoded bootstrap.
fn split(wire: &Bytes) -> Result<Split, DecodeError> {
    /// `Bootstrap.static_resources`, and of `StaticResources` `listeners` and `clusters`.
    const STATIC_RESOURCES: u32 = 2;
    const LISTENERS: u32 = 1;
    const CLUSTERS: u32 = 2;
    let mut split = Split::default();
    for_each_field(wire, &mut |number, whole, payload| {
        if number != STATIC_RESOURCES {
            split.rest.extend_from_slice(whole);
            return Ok(());
        }
        let mut others = Vec::new();
        for_each_field(payload, &mut |number, whole, payload| {
            match number {
                CLUSTERS => split.clusters.push(wire.slice_ref(payload)),
                LISTENERS => split.listeners.push(wire.slice_ref(payload)),
                _ => others.extend_from_slice(whole),
            }
            Ok(())
        })?;
        encode_key(STATIC_RESOURCES, WireType::LengthDelimited, &mut split.rest);
        encode_varint(others.len() as u64, &mut split.rest);
        split.rest.extend_from_slice(&others);
        Ok(())
    })?;
    Ok(split)
}

/// Takes the number, the bytes and the payload of a field.
pub(crate) type EachField<'a> = dyn FnMut(u32, &[u8], &[u8]) -> Result<(), DecodeError> + 'a;

/// Calls `each` with the number, the bytes and, where it is length-delimited, the payload of each field.
pub(crate) fn for_each_field(message: &[u8], each: &mut EachField<'_>) -> Result<(), DecodeError> {
    let mut left = message;
    while !left.is_empty() {
        let start = left;
        let (number, wire_type) = decode_key(&mut left)?;
        let payload: &[u8] = if wire_type == WireType::LengthDelimited {
            let length = decode_varint(&mut left)?;
            // The walk has found the lengths to be good.
            let (payload, after) =
                left.split_at(usize::try_from(length).unwrap_or(usize::MAX).min(left.len()));
            left = after;
            payload
        } else {
            skip_field(wire_type, number, &mut left, DecodeContext::default())?;
            &[]
        };
        each(number, &start[..start.len() - left.len()], payload)?;
    }
    Ok(())
}

/// Reads a file in the format that its extension names; another extension is taken as JSON, as by Envoy.
fn read(message: Message, path: &Path, options: TextOptions) -> Result<Encoded, LoadError> {
    // A named pipe can be read once and has no size: one read to its end serves all kinds of file.
    let content = fs::read(path).map_err(|_| LoadError::InvalidPath(path.display().to_string()))?;
    let format = Format::of_path(path).unwrap_or(Format::Json);
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

#[cfg(test)]
mod tests {
    use super::{Split, pb, split};
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;
    use envoy_types::pb::envoy::config::listener::v3::Listener;
    use prost::Message as _;

    #[test]
    fn clusters_and_listeners_are_taken_out_and_the_rest_stays() {
        let cluster = |name: &str| Cluster { name: name.into(), ..Default::default() };
        let part = |names: &[&str]| pb::Bootstrap {
            flags_path: "f".into(),
            static_resources: Some(pb::bootstrap::StaticResources {
                clusters: names.iter().map(|name| cluster(name)).collect(),
                listeners: vec![Listener { name: "l".into(), ..Default::default() }],
                ..Default::default()
            }),
            ..Default::default()
        };
        // A file, and YAML merged over it.
        let wire = [part(&["a", "b"]).encode_to_vec(), part(&["c"]).encode_to_vec()].concat();
        let Split { rest, clusters, listeners } = split(&wire.into()).unwrap();
        let names = clusters.iter().map(|wire| Cluster::decode(wire.clone()).unwrap().name);
        assert_eq!(names.collect::<Vec<_>>(), ["a", "b", "c"]);
        let rest = pb::Bootstrap::decode(&*rest).unwrap();
        let resources = rest.static_resources.unwrap();
        assert_eq!(
            (rest.flags_path.as_str(), resources.clusters.len(), resources.listeners.len()),
            ("f", 0, 0)
        );
        let names = listeners.iter().map(|wire| Listener::decode(wire.clone()).unwrap().name);
        assert_eq!(names.collect::<Vec<_>>(), ["l", "l"]);
    }
}
