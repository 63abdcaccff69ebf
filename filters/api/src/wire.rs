//! Readers for the small protobuf messages that every converter meets: `Any`, durations, wrapped scalars.

use std::time::Duration;

use envoy_types::pb::google::protobuf as wkt;
use prost::Message;
use waystation_schema::ConfigError;

/// The full name of the message in `any`. As in Envoy, whatever stands before the type URL's last slash is no part of
/// it.
pub fn type_name(any: &wkt::Any) -> &str {
    message_name(&any.type_url)
}

/// The full name of the message that a type URL is of.
pub fn message_name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or_default()
}

/// Decodes the message in `any`, whose type was looked at.
///
/// # Errors
/// When the bytes are no such message.
pub fn unpack<M: Message + Default>(any: &wkt::Any) -> Result<M, ConfigError> {
    decode(&any.value).map_err(|error| ConfigError::new(format!("{}: {}", type_name(any), error.reason())))
}

/// Decodes a message of a known type.
///
/// # Errors
/// When the bytes are no such message.
pub fn decode<M: Message + Default>(wire: &[u8]) -> Result<M, ConfigError> {
    M::decode(wire).map_err(|error| ConfigError::new(error.to_string()))
}

/// The longest duration there is: ten thousand years (`google/protobuf/duration.proto`). A clock can be moved by it without
/// running over.
const LONGEST: u64 = 315_576_000_000;

/// A duration that must not be negative; `None` when it is not set.
///
/// # Errors
/// When it is negative, longer than the longest there is, or has more than a second of nanoseconds.
pub fn duration(field: &str, value: Option<&wkt::Duration>) -> Result<Option<Duration>, ConfigError> {
    value
        .map(|value| match (u64::try_from(value.seconds), u32::try_from(value.nanos)) {
            (Ok(seconds), Ok(nanos)) if seconds <= LONGEST && nanos < 1_000_000_000 => {
                Ok(Duration::new(seconds, nanos))
            }
            _ => Err(ConfigError::field(field, "duration out of range")),
        })
        .transpose()
}

/// A duration that must be positive; `None` when it is not set.
///
/// # Errors
/// When it is not.
pub fn positive(field: &str, value: Option<&wkt::Duration>) -> Result<Option<Duration>, ConfigError> {
    match duration(field, value)? {
        Some(Duration::ZERO) => Err(ConfigError::field(field, "must be positive")),
        other => Ok(other),
    }
}

/// A timeout of which zero means "none"; `default` when it is not set.
///
/// # Errors
/// When it is negative.
pub fn timeout(
    field: &str,
    value: Option<&wkt::Duration>,
    default: Option<Duration>,
) -> Result<Option<Duration>, ConfigError> {
    Ok(match duration(field, value)? {
        None => default,
        Some(timeout) => Some(timeout).filter(|timeout| !timeout.is_zero()),
    })
}

/// The value of a wrapped `uint32`.
pub fn u32_value(value: Option<&wkt::UInt32Value>) -> Option<u32> {
    value.map(|value| value.value)
}

/// The value of a wrapped `bool`.
pub fn bool_value(value: Option<&wkt::BoolValue>, default: bool) -> bool {
    value.map_or(default, |value| value.value)
}

/// `per_connection_buffer_limit_bytes`: 1 MiB by default; 0 is none.
pub fn buffer_limit(value: Option<&wkt::UInt32Value>) -> usize {
    match value.map(|limit| limit.value) {
        None => 1 << 20,
        Some(0) => usize::MAX,
        Some(limit) => usize::try_from(limit).unwrap_or(usize::MAX),
    }
}

/// Refuses a field that is set but not supported.
///
/// # Errors
/// When `set`.
pub fn refuse(field: &str, set: bool, why: &str) -> Result<(), ConfigError> {
    if set { Err(ConfigError::field(field, format!("not supported: {why}"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{LONGEST, duration, message_name, positive, timeout, unpack};
    use envoy_types::pb::google::protobuf as wkt;
    use std::time::Duration;

    #[test]
    fn a_type_urls_domain_does_not_count() {
        for url in ["type.googleapis.com/x.Y", "types.example.com/a/x.Y", "/x.Y", "x.Y"] {
            assert_eq!(message_name(url), "x.Y");
        }
        assert_eq!(message_name("x.Y/"), "");
    }

    #[test]
    fn what_does_not_decode_is_named() {
        let any = wkt::Any { type_url: "a/google.protobuf.Duration".into(), value: vec![8] };
        let error = unpack::<wkt::Duration>(&any).unwrap_err().to_string();
        assert!(error.starts_with("google.protobuf.Duration: "), "{error}");
    }

    #[test]
    fn durations() {
        let of = |seconds, nanos| Some(wkt::Duration { seconds, nanos });
        assert_eq!(duration("x", None), Ok(None));
        assert_eq!(duration("x", of(1, 5).as_ref()), Ok(Some(Duration::new(1, 5))));
        let longest = LONGEST as i64;
        assert_eq!(duration("x", of(longest, 0).as_ref()), Ok(Some(Duration::from_secs(LONGEST))));
        for bad in [of(-1, 0), of(0, -1), of(0, 1_000_000_000), of(longest + 1, 0), of(i64::MAX, 0)] {
            assert_eq!(duration("x", bad.as_ref()).unwrap_err().to_string(), "x: duration out of range");
        }
        assert_eq!(positive("x", of(0, 0).as_ref()).unwrap_err().to_string(), "x: must be positive");
        let default = Some(Duration::from_secs(9));
        assert_eq!(timeout("x", None, default), Ok(default));
        assert_eq!(timeout("x", of(0, 0).as_ref(), default), Ok(None));
        assert_eq!(timeout("x", of(2, 0).as_ref(), default), Ok(Some(Duration::from_secs(2))));
    }
}
