//! `DirectResponseAction`.

use bytes::Bytes;
use core::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_schema::{At, ConfigError};

/// Compiled `DirectResponseAction`.
#[derive(Clone, Debug)]
pub struct DirectResponse {
    /// The status.
    pub status: u16,
    /// The body, possibly empty.
    pub body: Bytes,
}

impl DirectResponse {
    /// `max_body` is `max_direct_response_body_size_bytes`. A file is read now, by the thread that compiles.
    pub(crate) fn compile(proto: &pb::DirectResponseAction, max_body: usize) -> Result<Self, ConfigError> {
        let pb::DirectResponseAction { status, body, body_format } = proto;
        if body_format.is_some() {
            return Err(ConfigError::field("body_format", "not supported: formatted direct response bodies"));
        }
        let status = u16::try_from(*status).ok().filter(|status| (200..600).contains(status));
        Ok(Self {
            status: status.ok_or_else(|| ConfigError::field("status", "must be between 200 and 599"))?,
            body: match body {
                Some(source) => read(source, max_body).at(|| "body")?,
                None => Bytes::new(),
            },
        })
    }
}

fn read(source: &core::DataSource, max: usize) -> Result<Bytes, ConfigError> {
    let core::DataSource { watched_directory, specifier } = source;
    if watched_directory.is_some() {
        let reason = "not supported: the body is read when the route configuration is loaded";
        return Err(ConfigError::field("watched_directory", reason));
    }
    let body: Vec<u8> = match specifier {
        None => return Err(ConfigError::field("specifier", "is required")),
        Some(Specifier::InlineString(text)) => text.clone().into_bytes(),
        Some(Specifier::InlineBytes(bytes)) => bytes.to_vec(),
        Some(Specifier::EnvironmentVariable(name)) => match std::env::var(name) {
            Ok(value) => value.into_bytes(),
            Err(_) => {
                let reason = format!("Environment variable doesn't exist: {name}");
                return Err(ConfigError::field("environment_variable", reason));
            }
        },
        Some(Specifier::Filename(path)) => {
            read_file(path, max).map_err(|reason| ConfigError::field("filename", reason))?
        }
    };
    if body.len() > max {
        return Err(ConfigError::new(too_long(body.len(), max)));
    }
    Ok(body.into())
}

/// The size is looked at first, so that a huge file is never in memory.
fn read_file(path: &str, max: usize) -> Result<Vec<u8>, String> {
    let size = std::fs::metadata(path).map_err(|error| format!("{path}: {error}"))?.len();
    if size > max as u64 {
        return Err(too_long(size as usize, max));
    }
    std::fs::read(path).map_err(|error| format!("{path}: {error}"))
}

fn too_long(size: usize, max: usize) -> String {
    format!("response body size is {size} bytes; maximum is {max}")
}
