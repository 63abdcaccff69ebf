//! `DataSource`: bytes from the configuration, a file or the environment.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use waystation_schema::ConfigError;

/// What a data source held when it was read.
#[derive(Clone, Debug, Default)]
pub struct Data {
    /// The bytes as they were.
    pub bytes: Vec<u8>,
    /// The file it came from, or `<inline>`, as Envoy names it in texts and `/certs`.
    pub origin: String,
}

/// Reads `source` now; nothing when it is absent or names nothing. A file that is empty is empty data.
///
/// # Errors
/// When the file cannot be read or the environment has no such variable.
pub fn read(source: Option<&core::DataSource>) -> Result<Option<Data>, ConfigError> {
    // A watched directory tells *when* to read a file again, which is for the caller to follow or to refuse.
    let Some(core::DataSource { specifier: Some(specifier), watched_directory: _ }) = source else {
        return Ok(None);
    };
    let inline = |bytes: &[u8]| Data { bytes: bytes.to_vec(), origin: "<inline>".to_owned() };
    let data = match specifier {
        Specifier::InlineBytes(bytes) => inline(bytes),
        Specifier::InlineString(text) => inline(text.as_bytes()),
        Specifier::EnvironmentVariable(name) => {
            let value = std::env::var_os(name)
                .ok_or_else(|| format!("Environment variable doesn't exist: {name}"))
                .map_err(|reason| ConfigError::field("environment_variable", reason))?;
            inline(value.as_encoded_bytes())
        }
        Specifier::Filename(path) => {
            let bytes = std::fs::read(path)
                .map_err(|error| format!("Invalid path: {path}: {}", error.kind()))
                .map_err(|reason| ConfigError::field("filename", reason))?;
            Data { bytes, origin: path.clone() }
        }
    };
    Ok(Some(data))
}

/// As [`read`], but an empty file is refused.
///
/// # Errors
/// As [`read`], and when the file is empty.
pub fn read_filled(source: Option<&core::DataSource>) -> Result<Option<Data>, ConfigError> {
    let data = read(source)?;
    match (&data, file(source)) {
        (Some(Data { bytes, .. }), Some(path)) if bytes.is_empty() => {
            Err(ConfigError::field("filename", format!("file {path} is empty")))
        }
        _ => Ok(data),
    }
}

/// The file that `source` names.
pub fn file(source: Option<&core::DataSource>) -> Option<&str> {
    match source?.specifier.as_ref()? {
        Specifier::Filename(path) => Some(path),
        _ => None,
    }
}
