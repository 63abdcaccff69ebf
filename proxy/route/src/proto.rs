//! Readers for the small protobuf types that every converter meets.

use std::time::Duration;

use envoy_types::pb::google::protobuf as wkt;
use prost::Message;
use waystation_schema::ConfigError;

/// A duration that must not be negative.
pub(crate) fn duration(field: &str, value: Option<&wkt::Duration>) -> Result<Option<Duration>, ConfigError> {
    value
        .map(|value| match (u64::try_from(value.seconds), u32::try_from(value.nanos)) {
            (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
            _ => Err(ConfigError::field(field, "duration out of range")),
        })
        .transpose()
}

/// Refuses a field that is set but not supported.
pub(crate) fn refuse(field: &str, set: bool, why: &str) -> Result<(), ConfigError> {
    if set { Err(ConfigError::field(field, format!("not supported: {why}"))) } else { Ok(()) }
}

/// The message's full name, without the type URL's domain.
pub(crate) fn type_name(any: &wkt::Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// Decodes the message in an `Any` whose type was looked at.
pub(crate) fn unpack<M: Message + Default>(any: &wkt::Any) -> Result<M, ConfigError> {
    M::decode(any.value.as_slice()).map_err(|error| ConfigError::new(format!("{}: {error}", any.type_url)))
}

/// Whole milliseconds, as timers and headers have them.
pub(crate) fn millis(value: Duration) -> u64 {
    u64::try_from(value.as_millis()).unwrap_or(u64::MAX)
}
