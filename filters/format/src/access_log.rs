//! Access logs.

mod filter;
mod grpc;
mod sink;

use std::cell::RefCell;
use std::sync::Arc;

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3 as file;
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3 as grpc_pb;
use envoy_types::pb::envoy::extensions::access_loggers::stream::v3 as stream;
use envoy_types::pb::google::protobuf::Any;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_schema::{At, ConfigError};

use crate::formatter::{FormatContext, Formatter, SubstitutionFormat};
pub use filter::AccessLogFilter;
use grpc::GrpcLog;
pub use grpc::{EntryKind, GrpcLogDriver, GrpcQueue, Next};
pub use sink::AccessLogSinks;
use sink::{Destination, Sink};

/// When a log line is written (`%ACCESS_LOG_TYPE%`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AccessLogType {
    /// Not set.
    NotSet,
    /// The start of a TCP session.
    TcpConnectionStart,
    /// The upstream connection of a TCP session was made.
    TcpUpstreamConnected,
    /// Now and then while a TCP session lasts.
    TcpPeriodic,
    /// The end of a TCP session.
    TcpConnectionEnd,
    /// The start of a request.
    DownstreamStart,
    /// Now and then while a request lasts.
    DownstreamPeriodic,
    /// The end of a request.
    DownstreamEnd,
    /// An attempt has its upstream connection.
    UpstreamPoolReady,
    /// Now and then while an attempt lasts.
    UpstreamPeriodic,
    /// The end of an attempt.
    UpstreamEnd,
    /// An upgrade or CONNECT was accepted.
    DownstreamTunnelSuccessfullyEstablished,
}

impl AccessLogType {
    /// Whether it is about an attempt rather than the request, and so comes from the router's log.
    fn is_of_attempt(self) -> bool {
        matches!(self, Self::UpstreamPoolReady | Self::UpstreamPeriodic | Self::UpstreamEnd)
    }

    /// As `%ACCESS_LOG_TYPE%` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotSet => "NotSet",
            Self::TcpConnectionStart => "TcpConnectionStart",
            Self::TcpUpstreamConnected => "TcpUpstreamConnected",
            Self::TcpPeriodic => "TcpPeriodic",
            Self::TcpConnectionEnd => "TcpConnectionEnd",
            Self::DownstreamStart => "DownstreamStart",
            Self::DownstreamPeriodic => "DownstreamPeriodic",
            Self::DownstreamEnd => "DownstreamEnd",
            Self::UpstreamPoolReady => "UpstreamPoolReady",
            Self::UpstreamPeriodic => "UpstreamPeriodic",
            Self::UpstreamEnd => "UpstreamEnd",
            Self::DownstreamTunnelSuccessfullyEstablished => "DownstreamTunnelSuccessfullyEstablished",
        }
    }
}

/// One compiled `envoy.config.accesslog.v3.AccessLog`: a filter, and what becomes of what it lets through.
#[derive(Debug)]
pub struct AccessLog {
    filter: Option<AccessLogFilter>,
    output: Output,
}

#[derive(Debug)]
enum Output {
    /// A line in a file or stream.
    Line(SubstitutionFormat, Arc<Sink>),
    /// An entry for a service.
    Entry(Box<GrpcLog>),
}

/// A line's buffer larger than this is not kept for the next one.
const KEPT_LINE_CAPACITY: usize = 16 * 1024;

thread_local! {
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A file of lines that are not about requests: what health checks and outlier detection found. It shares the writer, the
/// flushing and the reopening of access logs.
#[derive(Clone, Debug)]
pub struct EventLog(Arc<Sink>);

impl EventLog {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &str, sinks: &AccessLogSinks) -> Result<Self, ConfigError> {
        sinks.open(Destination::of_path(path)).map(Self)
    }

    /// Writes a line, which ends with a line feed; it is dropped when the writer is too far behind.
    pub fn write(&self, line: &[u8]) {
        self.0.write(line);
    }
}

impl AccessLog {
    /// Compiles it and opens its sink.
    pub fn compile(
        proto: &pb::AccessLog,
        sinks: &AccessLogSinks,
        runtime: &Runtime,
    ) -> Result<Self, ConfigError> {
        // The name has no meaning beside the type.
        let pb::AccessLog { name: _, filter, config_type } = proto;
        let filter = filter
            .as_ref()
            .map(|filter| AccessLogFilter::compile(filter, runtime))
            .transpose()
            .at(|| "filter")?;
        let Some(pb::access_log::ConfigType::TypedConfig(config)) = config_type else {
            return Err(ConfigError::field("typed_config", "is required"));
        };
        let output = compile_logger(config, sinks).at(|| "typed_config")?;
        Ok(Self { filter, output })
    }

    /// Writes a line, or an entry, if the filter lets it through. `random` serves runtime filters.
    ///
    /// It is handed to the writer's thread; nothing here waits for a disk or a reader.
    pub fn log(&self, cx: &FormatContext<'_>, random: u64) {
        if self.filter.as_ref().is_some_and(|filter| !filter.is_match(cx, random)) {
            return;
        }
        let (format, sink) = match &self.output {
            Output::Line(format, sink) => (format, sink),
            Output::Entry(log) => return log.log(cx),
        };
        LINE.with_borrow_mut(|line| {
            line.clear();
            format.write(cx, line);
            sink.write(line);
            if line.capacity() > KEPT_LINE_CAPACITY {
                *line = Vec::new();
            }
        });
    }
}

fn compile_logger(config: &Any, sinks: &AccessLogSinks) -> Result<Output, ConfigError> {
    let line = |(destination, format)| Ok(Output::Line(format, sinks.open(destination)?));
    let entry = |log| Output::Entry(Box::new(log));
    match type_name(config) {
        "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig" => {
            let config: grpc_pb::HttpGrpcAccessLogConfig = unpack(config)?;
            GrpcLog::http(&config, &sinks.grpc).map(entry)
        }
        "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig" => {
            let config: grpc_pb::TcpGrpcAccessLogConfig = unpack(config)?;
            GrpcLog::tcp(&config, &sinks.grpc).map(entry)
        }
        _ => compile_lines(config).and_then(line),
    }
}

fn compile_lines(config: &Any) -> Result<(Destination, SubstitutionFormat), ConfigError> {
    match type_name(config) {
        "envoy.extensions.access_loggers.file.v3.FileAccessLog" => {
            let file::FileAccessLog { path, access_log_format } = unpack(config)?;
            if path.is_empty() {
                return Err(ConfigError::field("path", "must not be empty"));
            }
            Ok((Destination::of_path(&path), compile_file_format(access_log_format)?))
        }
        "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog" => {
            let stream::StdoutAccessLog { access_log_format } = unpack(config)?;
            let format = match &access_log_format {
                Some(stream::stdout_access_log::AccessLogFormat::LogFormat(format)) => {
                    SubstitutionFormat::compile(format).at(|| "log_format")?
                }
                None => default_format(),
            };
            Ok((Destination::Stdout, format))
        }
        "envoy.extensions.access_loggers.stream.v3.StderrAccessLog" => {
            let stream::StderrAccessLog { access_log_format } = unpack(config)?;
            let format = match &access_log_format {
                Some(stream::stderr_access_log::AccessLogFormat::LogFormat(format)) => {
                    SubstitutionFormat::compile(format).at(|| "log_format")?
                }
                None => default_format(),
            };
            Ok((Destination::Stderr, format))
        }
        name => Err(ConfigError::new(format!("not supported: access logger {name}"))),
    }
}

#[expect(deprecated, reason = "configurations still use the old formats")]
fn compile_file_format(
    format: Option<file::file_access_log::AccessLogFormat>,
) -> Result<SubstitutionFormat, ConfigError> {
    use file::file_access_log::AccessLogFormat as Format;
    match format {
        None => Ok(default_format()),
        Some(Format::Format(text)) if text.is_empty() => Ok(default_format()),
        Some(Format::Format(text)) => {
            Ok(SubstitutionFormat::text(Formatter::compile(&text).at(|| "format")?))
        }
        Some(Format::JsonFormat(object)) => SubstitutionFormat::json(&object).at(|| "json_format"),
        Some(Format::TypedJsonFormat(object)) => SubstitutionFormat::json(&object).at(|| "typed_json_format"),
        Some(Format::LogFormat(format)) => SubstitutionFormat::compile(&format).at(|| "log_format"),
    }
}

fn default_format() -> SubstitutionFormat {
    SubstitutionFormat::text(Formatter::default_line())
}

#[cfg(test)]
mod tests;
