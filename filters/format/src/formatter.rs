//! Command operators.

mod address;
mod coalesce;
mod command;
mod grpc;
mod header;
mod json;
mod operator;
mod parse;
mod substitution;
mod time;
mod xfcc;

use std::time::Instant;

use waystation_filter_api::stream::StreamInfo;
use waystation_http::Headers;
use waystation_schema::ConfigError;

pub(crate) use grpc::grpc_status;
pub(crate) use header::decoded_if;
pub use substitution::SubstitutionFormat;

use crate::access_log::AccessLogType;
pub(crate) use operator::MetadataOf;
use operator::Operator;
use waystation_matchers::MetadataPath;

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

/// Formatter extensions that a format string may use (`SubstitutionFormatString.formatters`).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extensions {
    /// `envoy.formatter.req_without_query`.
    pub(crate) req_without_query: bool,
}

/// A compiled text with command operators.
#[derive(Clone, Debug)]
pub struct Formatter {
    segments: Box<[Segment]>,
    /// What stands for a missing value.
    missing: &'static str,
}

#[derive(Clone, Debug)]
enum Segment {
    Literal(Box<str>),
    Operator(Operator),
}

/// The line of an access log that has no format of its own.
pub(crate) const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
     %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
     %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
     \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

impl Formatter {
    /// Compiles a format string; an unknown operator is an error that names it.
    pub fn compile(text: &str) -> Result<Self, ConfigError> {
        Self::compile_with(text, Extensions::default(), "-")
    }

    /// Compiles a format string whose missing values are written as nothing: header values, and formats with
    /// `omit_empty_values`.
    pub fn compile_omitting_empty(text: &str) -> Result<Self, ConfigError> {
        Self::compile_with(text, Extensions::default(), "")
    }

    pub(crate) fn compile_with(
        text: &str,
        extensions: Extensions,
        missing: &'static str,
    ) -> Result<Self, ConfigError> {
        Ok(Self { segments: parse::parse(text, extensions)?.into(), missing })
    }

    /// Writes a value of metadata, and nothing when there is none.
    pub(crate) fn of_metadata(of: MetadataOf, path: MetadataPath) -> Self {
        let operator = Operator::Metadata { of, path, max_length: None };
        Self { segments: [Segment::Operator(operator)].into(), missing: "" }
    }

    /// Envoy's default access log line.
    pub fn default_line() -> Self {
        Self::compile(DEFAULT_FORMAT).expect("every operator of the default line is known")
    }

    /// Appends the text for `cx`; a missing value is written as `-`.
    pub fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        for segment in &self.segments {
            match segment {
                Segment::Literal(text) => out.extend_from_slice(text.as_bytes()),
                Segment::Operator(operator) => {
                    if operator.write(cx, out).is_none() {
                        out.extend_from_slice(self.missing.as_bytes());
                    }
                }
            }
        }
    }

    /// The text, when it has no operators.
    pub fn literal(&self) -> Option<&str> {
        match &*self.segments {
            [] => Some(""),
            [Segment::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Whether the text is one command operator and nothing else.
    pub fn is_one_operator(&self) -> bool {
        self.single_operator().is_some()
    }

    /// The operator, when the text is nothing else: in JSON its value keeps its type.
    fn single_operator(&self) -> Option<&Operator> {
        match &*self.segments {
            [Segment::Operator(operator)] => Some(operator),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
