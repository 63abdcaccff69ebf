//! Access logs.

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use waystation_filter_api::runtime::Runtime;
use waystation_schema::ConfigError;
use waystation_stats::Store;

use crate::formatter::FormatContext;

/// When a log line is written (`%ACCESS_LOG_TYPE%`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AccessLogType {
    /// Not set.
    NotSet,
    /// The end of a TCP session.
    TcpConnectionEnd,
    /// The start of a request.
    DownstreamStart,
    /// Now and then while a request lasts.
    DownstreamPeriodic,
    /// The end of a request.
    DownstreamEnd,
}

impl AccessLogType {
    /// As `%ACCESS_LOG_TYPE%` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotSet => "NotSet",
            Self::TcpConnectionEnd => "TcpConnectionEnd",
            Self::DownstreamStart => "DownstreamStart",
            Self::DownstreamPeriodic => "DownstreamPeriodic",
            Self::DownstreamEnd => "DownstreamEnd",
        }
    }
}

/// Files and streams that access logs write to, shared by all logs of the process.
#[derive(Debug)]
pub struct AccessLogSinks {}

impl AccessLogSinks {
    /// No sinks open yet.
    pub fn new(stats: &Store) -> Self {
        let _ = stats;
        Self {}
    }
}

/// One compiled `envoy.config.accesslog.v3.AccessLog`: a filter, a format, a sink.
#[derive(Debug)]
pub struct AccessLog {}

impl AccessLog {
    /// Compiles it and opens its sink.
    pub fn compile(
        proto: &pb::AccessLog,
        sinks: &AccessLogSinks,
        runtime: &Runtime,
    ) -> Result<Self, ConfigError> {
        let _ = (proto, sinks, runtime);
        Ok(Self {})
    }

    /// Writes a line if the filter lets it through. `random` serves runtime filters.
    pub fn log(&self, cx: &FormatContext<'_>, random: u64) {
        let _ = (cx, random);
    }
}
