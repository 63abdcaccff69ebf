//! `DirectResponseAction`.

use bytes::Bytes;
use core::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use waystation_filter_api::data_source::{self, Data};
use waystation_format::{FormatContext, SubstitutionFormat};
use waystation_schema::{At, ConfigError};

/// Compiled `DirectResponseAction`.
#[derive(Clone, Debug)]
pub struct DirectResponse {
    /// The status.
    pub status: u16,
    body: Bytes,
    format: Option<SubstitutionFormat>,
}

impl DirectResponse {
    /// `max_body` is `max_direct_response_body_size_bytes`. A file is read now, by the thread that compiles.
    pub(crate) fn compile(proto: &pb::DirectResponseAction, max_body: usize) -> Result<Self, ConfigError> {
        let pb::DirectResponseAction { status, body, body_format } = proto;
        let status = u16::try_from(*status).ok().filter(|status| (200..600).contains(status));
        Ok(Self {
            status: status.ok_or_else(|| ConfigError::field("status", "must be between 200 and 599"))?,
            body: match body {
                Some(source) => read(source, max_body).at(|| "body")?,
                None => Bytes::new(),
            },
            format: body_format
                .as_ref()
                .map(|format| SubstitutionFormat::compile(format).at(|| "body_format"))
                .transpose()?,
        })
    }

    /// The body, and its content type if there is a format that says so. `cx` needs no `local_reply_body`.
    pub fn body<'a>(&'a self, cx: &FormatContext<'_>) -> (Bytes, Option<&'a str>) {
        let Some(format) = &self.format else { return (self.body.clone(), None) };
        let text = String::from_utf8_lossy(&self.body);
        let mut body = Vec::new();
        format.write(&FormatContext { local_reply_body: &text, ..*cx }, &mut body);
        (body.into(), Some(format.content_type()))
    }
}

fn read(source: &core::DataSource, max: usize) -> Result<Bytes, ConfigError> {
    let core::DataSource { watched_directory, specifier } = source;
    if watched_directory.is_some() {
        let reason = "not supported: the body is read when the route configuration is loaded";
        return Err(ConfigError::field("watched_directory", reason));
    }
    // The size is looked at first, so that a huge file is never in memory.
    if let Some(Specifier::Filename(path)) = specifier
        && let Ok(file) = std::fs::metadata(path)
        && file.len() > max as u64
    {
        return Err(ConfigError::field("filename", too_long(file.len() as usize, max)));
    }
    let Some(Data { bytes: body, .. }) = data_source::read(Some(source))? else {
        return Err(ConfigError::field("specifier", "is required"));
    };
    if body.len() > max {
        return Err(ConfigError::new(too_long(body.len(), max)));
    }
    Ok(body.into())
}

fn too_long(size: usize, max: usize) -> String {
    format!("response body size is {size} bytes; maximum is {max}")
}
