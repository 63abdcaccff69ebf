//! What this binary calls itself towards launchers and control planes.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::v3::SemanticVersion;
use envoy_types::pb::google::protobuf as wkt;

/// The Envoy version whose behaviour and API are offered. Control planes pick features by it.
pub const ENVOY: (u32, u32, u32) = (1, 40, 0);

/// Envoy's revision; launchers expect the five parts of `sha/version/status/type/ssl`, the first in hex.
const REVISION: &str = "9e5580933739775e8bce696a57a2e1bc99368f23";

/// `sha/1.40.0/Clean/RELEASE/BoringSSL` in shape; the last part names the TLS library that is really used.
pub fn version() -> String {
    let (major, minor, patch) = ENVOY;
    format!("{REVISION}/{major}.{minor}.{patch}/Clean/RELEASE/rustls")
}

/// `server.version`: the first three bytes of the revision as a number, as Envoy has it.
pub fn revision_number() -> u64 {
    u64::from_str_radix(&REVISION[..6], 16).unwrap_or_default()
}

/// Fills in who is speaking: `user_agent_name: envoy`, because servers gate features on it, with this project named in
/// the build's metadata.
pub fn identify(node: &mut core::Node) {
    let (major_number, minor_number, patch) = ENVOY;
    let text = |value: &str| wkt::Value { kind: Some(wkt::value::Kind::StringValue(value.to_owned())) };
    let fields = [
        ("build.type", "RELEASE"),
        ("revision.sha", REVISION),
        ("revision.status", "Clean"),
        ("ssl.version", "rustls"),
        ("waystation.version", env!("CARGO_PKG_VERSION")),
    ];
    let metadata = wkt::Struct {
        fields: fields.iter().map(|(name, value)| ((*name).to_owned(), text(value))).collect(),
    };
    node.user_agent_name = "envoy".to_owned();
    node.user_agent_version_type =
        Some(core::node::UserAgentVersionType::UserAgentBuildVersion(core::BuildVersion {
            version: Some(SemanticVersion { major_number, minor_number, patch }),
            metadata: Some(metadata),
        }));
}
