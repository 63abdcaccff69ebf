//! `DataSource`: bytes from the configuration, a file or the environment.

use envoy_types::pb::envoy::config::core::v3 as core;
use waystation_schema::ConfigError;

use core::data_source::Specifier;

/// What a data source held when it was read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Data {
    pub(crate) bytes: Vec<u8>,
    /// The file it came from, or `<inline>`, as Envoy names it in texts and `/certs`.
    pub(crate) origin: String,
}

/// Reads `source` now; nothing when it is absent or names nothing.
pub(crate) fn read(source: Option<&core::DataSource>) -> Result<Option<Data>, ConfigError> {
    // A watched directory tells *when* to read a file again: see `Secret::watched`.
    let Some(core::DataSource { specifier: Some(specifier), watched_directory: _ }) = source else {
        return Ok(None);
    };
    let inline = |bytes: &[u8]| Data { bytes: bytes.to_vec(), origin: "<inline>".to_owned() };
    let data = match specifier {
        Specifier::InlineBytes(bytes) => inline(bytes),
        Specifier::InlineString(text) => inline(text.as_bytes()),
        Specifier::EnvironmentVariable(name) => {
            let value = std::env::var_os(name)
                .ok_or_else(|| ConfigError::new(format!("Environment variable doesn't exist: {name}")))?;
            inline(value.as_encoded_bytes())
        }
        Specifier::Filename(path) => {
            let bytes = std::fs::read(path)
                .map_err(|error| ConfigError::new(format!("Invalid path: {path}: {}", error.kind())))?;
            if bytes.is_empty() {
                return Err(ConfigError::new(format!("file {path} is empty")));
            }
            Data { bytes, origin: path.clone() }
        }
    };
    Ok(Some(data))
}

/// Reads `source` and puts what was read in its place, so that it means the same when it is looked at again.
pub(crate) fn freeze(source: &mut Option<core::DataSource>) -> Result<(), ConfigError> {
    if let Some(data) = read(source.as_ref())? {
        *source = Some(core::DataSource {
            watched_directory: None,
            specifier: Some(Specifier::InlineBytes(data.bytes)),
        });
    }
    Ok(())
}

/// The file that `source` names.
pub(crate) fn file(source: Option<&core::DataSource>) -> Option<&str> {
    match source?.specifier.as_ref()? {
        Specifier::Filename(path) => Some(path),
        _ => None,
    }
}
