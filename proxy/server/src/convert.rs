//! Protobuf's well-known types and Envoy's small ones, compiled.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use waystation_schema::{At as _, ConfigError};

/// Envoy's default for `per_connection_buffer_limit_bytes`.
const BUFFER_LIMIT: usize = 1 << 20;

/// A duration that must not be negative; `None` when it is not set.
pub fn duration(proto: Option<&wkt::Duration>) -> Result<Option<Duration>, ConfigError> {
    proto
        .map(|proto| {
            let seconds = u64::try_from(proto.seconds);
            let nanos = u32::try_from(proto.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
            match (seconds, nanos) {
                (Ok(seconds), Some(nanos)) => Ok(Duration::new(seconds, nanos)),
                _ => Err(ConfigError::new("is not a duration that can be waited for")),
            }
        })
        .transpose()
}

/// A timeout of which zero means "none"; `default` when it is not set.
pub fn timeout(
    proto: Option<&wkt::Duration>,
    default: Option<Duration>,
) -> Result<Option<Duration>, ConfigError> {
    Ok(match duration(proto)? {
        None => default,
        Some(timeout) => Some(timeout).filter(|timeout| !timeout.is_zero()),
    })
}

/// `per_connection_buffer_limit_bytes`: 1 MiB by default.
pub fn buffer_limit(proto: Option<&wkt::UInt32Value>) -> usize {
    proto.map_or(BUFFER_LIMIT, |limit| usize::try_from(limit.value).unwrap_or(usize::MAX))
}

/// The bytes of a `DataSource`: inline, a file's or an environment variable's. Nothing when it is not set.
pub fn data_source(proto: Option<&core::DataSource>) -> Result<Vec<u8>, ConfigError> {
    use core::data_source::Specifier;
    let Some(proto) = proto else {
        return Ok(Vec::new());
    };
    match &proto.specifier {
        None => Ok(Vec::new()),
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes.clone()),
        Some(Specifier::InlineString(text)) => Ok(text.clone().into_bytes()),
        Some(Specifier::Filename(path)) => std::fs::read(path)
            .map_err(|error| ConfigError::new(format!("cannot read {path}: {error}")))
            .at(|| "filename"),
        Some(Specifier::EnvironmentVariable(name)) => {
            std::env::var(name).map(String::into_bytes).map_err(|_| {
                ConfigError::field("environment_variable", format!("{name} doesn't exist in the environment"))
            })
        }
    }
}
