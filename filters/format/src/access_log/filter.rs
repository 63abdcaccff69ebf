//! Which requests are logged.

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::runtime::{Fraction, Runtime, RuntimeFraction, RuntimeInteger};
use waystation_http::{Headers, Known};
use waystation_matchers::{HeaderMatcher, MetadataPath, ValueMatcher};
use waystation_schema::{At, ConfigError};

use super::AccessLogType;
use crate::formatter::{FormatContext, grpc_status};

/// Compiled `envoy.config.accesslog.v3.AccessLogFilter`: which requests are logged, and which local replies a mapper
/// changes.
#[derive(Debug)]
pub struct AccessLogFilter(Condition);

#[derive(Debug)]
enum Condition {
    StatusCode(Comparison),
    Duration(Comparison),
    NotHealthCheck,
    Traceable,
    Runtime {
        sampled: RuntimeFraction,
        /// Whether each log draws for itself, and not all of them alike by the request's id.
        independent: bool,
    },
    And(Box<[Condition]>),
    Or(Box<[Condition]>),
    Header(HeaderMatcher),
    /// Any of these; any at all when there are none.
    ResponseFlag(Box<[ResponseFlag]>),
    GrpcStatus {
        statuses: Box<[i64]>,
        exclude: bool,
    },
    Metadata {
        path: Option<(MetadataPath, ValueMatcher)>,
        match_missing: bool,
    },
    LogType {
        types: Box<[i32]>,
        exclude: bool,
    },
}

/// A comparison with a number that the runtime may change.
#[derive(Debug)]
struct Comparison {
    operator: pb::comparison_filter::Op,
    value: RuntimeInteger,
}

/// The status of a response without one.
const GRPC_UNKNOWN: i64 = 2;

impl AccessLogFilter {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::AccessLogFilter, runtime: &Runtime) -> Result<Self, ConfigError> {
        Condition::compile(proto, runtime).map(Self)
    }

    /// Whether the stream passes. `random` serves runtime filters.
    pub fn is_match(&self, cx: &FormatContext<'_>, random: u64) -> bool {
        self.0.is_match(cx, random)
    }
}

impl Condition {
    fn compile(proto: &pb::AccessLogFilter, runtime: &Runtime) -> Result<Self, ConfigError> {
        use pb::access_log_filter::FilterSpecifier as Proto;
        let pb::AccessLogFilter { filter_specifier } = proto;
        match filter_specifier {
            None => Err(ConfigError::field("filter_specifier", "is required")),
            Some(Proto::StatusCodeFilter(pb::StatusCodeFilter { comparison })) => {
                Comparison::compile(comparison.as_ref(), runtime)
                    .map(Self::StatusCode)
                    .at(|| "status_code_filter")
            }
            Some(Proto::DurationFilter(pb::DurationFilter { comparison })) => {
                Comparison::compile(comparison.as_ref(), runtime).map(Self::Duration).at(|| "duration_filter")
            }
            Some(Proto::NotHealthCheckFilter(pb::NotHealthCheckFilter {})) => Ok(Self::NotHealthCheck),
            Some(Proto::TraceableFilter(pb::TraceableFilter {})) => Ok(Self::Traceable),
            Some(Proto::RuntimeFilter(filter)) => compile_runtime(filter, runtime).at(|| "runtime_filter"),
            Some(Proto::AndFilter(pb::AndFilter { filters })) => {
                compile_all(filters, runtime).map(Self::And).at(|| "and_filter")
            }
            Some(Proto::OrFilter(pb::OrFilter { filters })) => {
                compile_all(filters, runtime).map(Self::Or).at(|| "or_filter")
            }
            Some(Proto::HeaderFilter(pb::HeaderFilter { header })) => header
                .as_ref()
                .ok_or_else(|| ConfigError::new("is required"))
                .and_then(HeaderMatcher::compile)
                .map(Self::Header)
                .at(|| "header_filter.header"),
            Some(Proto::ResponseFlagFilter(pb::ResponseFlagFilter { flags })) => {
                let flag = |(index, name): (usize, &String)| {
                    ResponseFlag::ALL.iter().find(|flag| flag.short() == name).copied().ok_or_else(|| {
                        ConfigError::field(
                            format!("response_flag_filter.flags[{index}]"),
                            format!("{name:?} is no response flag"),
                        )
                    })
                };
                Ok(Self::ResponseFlag(flags.iter().enumerate().map(flag).collect::<Result<_, _>>()?))
            }
            Some(Proto::GrpcStatusFilter(pb::GrpcStatusFilter { statuses, exclude })) => {
                Ok(Self::GrpcStatus {
                    statuses: statuses.iter().map(|status| i64::from(*status)).collect(),
                    exclude: *exclude,
                })
            }
            Some(Proto::MetadataFilter(filter)) => compile_metadata(filter).at(|| "metadata_filter"),
            Some(Proto::LogTypeFilter(pb::LogTypeFilter { types, exclude })) => {
                Ok(Self::LogType { types: types.as_slice().into(), exclude: *exclude })
            }
            Some(Proto::ExtensionFilter(pb::ExtensionFilter { name, config_type: _ })) => {
                Err(ConfigError::field("extension_filter", format!("not supported: {name}")))
            }
        }
    }

    fn is_match(&self, cx: &FormatContext<'_>, random: u64) -> bool {
        let info = cx.info;
        match self {
            Self::StatusCode(comparison) => comparison.is_match(u64::from(info.response_code)),
            Self::Duration(comparison) => {
                let end = info.timing.complete.unwrap_or(cx.now);
                // 2^64 milliseconds are half a billion years.
                comparison.is_match(end.saturating_duration_since(info.start).as_millis() as u64)
            }
            Self::NotHealthCheck => !info.health_check,
            Self::Traceable => info.traced,
            Self::Runtime { sampled, independent } => {
                let by_id = if *independent { None } else { request_id_number(cx) };
                sampled.contains(by_id.unwrap_or(random))
            }
            Self::And(filters) => filters.iter().all(|filter| filter.is_match(cx, random)),
            Self::Or(filters) => filters.iter().any(|filter| filter.is_match(cx, random)),
            Self::Header(matcher) => match cx.request {
                Some(request) => matcher.is_match(request),
                None => matcher.is_match(&Headers::new()),
            },
            Self::ResponseFlag(flags) if flags.is_empty() => !info.flags.is_empty(),
            Self::ResponseFlag(flags) => flags.iter().any(|flag| info.flags.contains(*flag)),
            Self::GrpcStatus { statuses, exclude } => {
                statuses.contains(&grpc_status(cx).unwrap_or(GRPC_UNKNOWN)) != *exclude
            }
            Self::Metadata { path, match_missing } => match path {
                None => *match_missing,
                Some((path, value)) => info.with_metadata(|metadata| match path.find(metadata) {
                    Some(found) => value.is_match(Some(found)),
                    None => *match_missing,
                }),
            },
            Self::LogType { types, exclude } => types.contains(&cx.log_type.number()) != *exclude,
        }
    }
}

impl Comparison {
    fn compile(proto: Option<&pb::ComparisonFilter>, runtime: &Runtime) -> Result<Self, ConfigError> {
        let pb::ComparisonFilter { op, value } =
            proto.ok_or_else(|| ConfigError::field("comparison", "is required"))?;
        let operator = pb::comparison_filter::Op::try_from(*op)
            .map_err(|_| ConfigError::field("comparison.op", "is not a known value"))?;
        let value = value.as_ref().ok_or_else(|| ConfigError::field("comparison.value", "is required"))?;
        Ok(Self { operator, value: runtime.integer(&value.runtime_key, u64::from(value.default_value)) })
    }

    fn is_match(&self, number: u64) -> bool {
        use pb::comparison_filter::Op;
        let value = self.value.get();
        match self.operator {
            Op::Eq => number == value,
            Op::Ge => number >= value,
            Op::Le => number <= value,
            Op::Ne => number != value,
        }
    }
}

impl AccessLogType {
    /// The number in `envoy.data.accesslog.v3.AccessLogType`.
    pub(super) fn number(self) -> i32 {
        match self {
            Self::NotSet => 0,
            Self::TcpUpstreamConnected => 1,
            Self::TcpConnectionStart => 14,
            Self::TcpPeriodic => 2,
            Self::TcpConnectionEnd => 3,
            Self::DownstreamStart => 4,
            Self::DownstreamPeriodic => 5,
            Self::DownstreamEnd => 6,
            Self::UpstreamPoolReady => 7,
            Self::UpstreamPeriodic => 8,
            Self::UpstreamEnd => 9,
            Self::DownstreamTunnelSuccessfullyEstablished => 10,
        }
    }
}

fn compile_runtime(proto: &pb::RuntimeFilter, runtime: &Runtime) -> Result<Condition, ConfigError> {
    let pb::RuntimeFilter { runtime_key, percent_sampled, use_independent_randomness } = proto;
    if runtime_key.is_empty() {
        return Err(ConfigError::field("runtime_key", "must not be empty"));
    }
    let default = percent_sampled.as_ref().map_or(Fraction::NEVER, Fraction::from_proto);
    Ok(Condition::Runtime {
        sampled: runtime.fraction(runtime_key, default),
        independent: *use_independent_randomness,
    })
}

fn compile_all(protos: &[pb::AccessLogFilter], runtime: &Runtime) -> Result<Box<[Condition]>, ConfigError> {
    if protos.len() < 2 {
        return Err(ConfigError::field("filters", "needs at least two"));
    }
    let compile = |(index, proto)| Condition::compile(proto, runtime).at(|| format!("filters[{index}]"));
    protos.iter().enumerate().map(compile).collect()
}

fn compile_metadata(proto: &pb::MetadataFilter) -> Result<Condition, ConfigError> {
    use envoy_types::pb::envoy::r#type::matcher::v3::MetadataMatcher;
    use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::path_segment::Segment;
    let pb::MetadataFilter { matcher, match_if_key_not_found } = proto;
    let path = match matcher {
        None => None,
        // Envoy does not read `invert` here, and so neither do we.
        Some(MetadataMatcher { filter, path, value, invert: _ }) => {
            let keys =
                path.iter().filter_map(|segment| segment.segment.as_ref().map(|Segment::Key(key)| &**key));
            let value = value.as_ref().ok_or_else(|| ConfigError::field("matcher.value", "is required"))?;
            let value = ValueMatcher::compile(value).at(|| "matcher.value")?;
            Some((MetadataPath::new(filter, keys), value))
        }
    };
    Ok(Condition::Metadata {
        path,
        match_missing: match_if_key_not_found.as_ref().is_none_or(|flag| flag.value),
    })
}

/// The number that a request's id stands for: all proxies on its way draw alike from it.
fn request_id_number(cx: &FormatContext<'_>) -> Option<u64> {
    const UUID_LEN: usize = 36;
    let id = cx.request?.get_str(Known::XRequestId)?;
    if id.len() < UUID_LEN {
        return None;
    }
    u64::from_str_radix(id.get(..8)?, 16).ok()
}
