//! HTTP options of upstream connections: `HttpProtocolOptions`, or the cluster's own deprecated fields.

#![expect(deprecated, reason = "control planes still send deprecated fields, and Envoy reads them")]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::http::header_formatters::preserve_case::v3 as preserve_case;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as upstream;
use preserve_case::PreserveCaseFormatterConfig;
use preserve_case::preserve_case_formatter_config::FormatterTypeOnEnvoyHeaders;
use waystation_filter_api::wire::{bool_value, duration, positive, refuse, type_name, u32_value, unpack};
use waystation_http::h1::{HeaderCase, Preserve, Underscores};
use waystation_http::h2::FrameLimits;
use waystation_schema::{At, ConfigError};

/// How HTTP is spoken to a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpOptions {
    /// Which version.
    pub protocol: UpstreamProtocol,
    /// How long a connection without streams is kept; `None` is for ever.
    pub idle_timeout: Option<Duration>,
    /// How long a connection takes new streams.
    pub max_connection_duration: Option<Duration>,
    /// Up to this percentage of `max_connection_duration` is added at random. Envoy does so for downstream connections only.
    pub max_connection_duration_jitter: f64,
    /// Streams after which a connection is closed; `None` is any number.
    pub max_requests_per_connection: Option<u32>,
    /// Header fields accepted in a response.
    pub max_headers_count: u32,
    /// Kilobytes of response headers accepted.
    pub max_response_headers_kb: u32,
    /// How long a stream may take altogether.
    pub max_stream_duration: Option<Duration>,
    /// Whether the SNI is the request's host.
    pub auto_sni: bool,
    /// Whether the certificate must be for that name.
    pub auto_san_validation: bool,
    /// The header that gives the name instead of `:authority`, lower case.
    pub auto_sni_header: Option<Box<str>>,
    /// HTTP/1 options.
    pub http1: Http1Options,
    /// HTTP/2 options.
    pub http2: Http2Options,
}

/// The version spoken to a cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// That of the downstream request.
    UseDownstream,
    /// What ALPN gives: HTTP/2 or HTTP/1.1.
    Auto,
}

/// `Http1ProtocolOptions` of an upstream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Http1Options {
    /// Header names.
    pub header_case: HeaderCase,
    /// Whether trailers are sent and received.
    pub enable_trailers: bool,
    /// Whether a response with both `transfer-encoding` and `content-length` passes, without the latter.
    pub allow_chunked_length: bool,
    /// Whether the request target is an absolute URL.
    pub send_fully_qualified_url: bool,
}

/// `Http2ProtocolOptions` of an upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct Http2Options {
    /// HPACK table.
    pub hpack_table_size: u32,
    /// Streams at once that we open on one connection.
    pub max_concurrent_streams: u32,
    /// Bytes.
    pub initial_stream_window_size: u32,
    /// Bytes.
    pub initial_connection_window_size: u32,
    /// Whether a malformed message ends only its stream.
    pub stream_error_on_invalid_message: bool,
    /// Keepalive by PING.
    pub keepalive: Option<Keepalive>,
    /// Frames that carry nothing and are tolerated.
    pub frame_limits: FrameLimits,
}

/// `KeepaliveSettings`.
#[derive(Clone, Debug, PartialEq)]
pub struct Keepalive {
    /// Time between PINGs; `None` sends only after idleness.
    pub interval: Option<Duration>,
    /// How long the answer may take.
    pub timeout: Duration,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            protocol: UpstreamProtocol::Http1,
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_duration: None,
            max_connection_duration_jitter: 0.0,
            max_requests_per_connection: None,
            max_headers_count: 100,
            max_response_headers_kb: 60,
            max_stream_duration: None,
            auto_sni: false,
            auto_san_validation: false,
            auto_sni_header: None,
            http1: Http1Options::default(),
            http2: Http2Options::default(),
        }
    }
}

impl Default for Http2Options {
    /// Envoy's safe defaults (`envoy.reloadable_features.safe_http2_options`).
    fn default() -> Self {
        Self {
            hpack_table_size: 4096,
            max_concurrent_streams: 1024,
            initial_stream_window_size: 16 << 20,
            initial_connection_window_size: 24 << 20,
            stream_error_on_invalid_message: false,
            keepalive: None,
            frame_limits: FrameLimits::default(),
        }
    }
}

/// Compiles the options from whichever fields carry them. `HttpProtocolOptions` replaces the deprecated fields as a whole,
/// as in Envoy.
pub(super) fn compile(
    proto: &pb::Cluster,
    typed: Option<&upstream::HttpProtocolOptions>,
) -> Result<Arc<HttpOptions>, ConfigError> {
    static DEFAULT: OnceLock<Arc<HttpOptions>> = OnceLock::new();
    let options = match typed {
        Some(typed) => from_typed(typed).at(typed_path)?,
        None => from_cluster(proto)?,
    };
    // Most clusters of a mesh have the same options: they share one copy.
    let default = DEFAULT.get_or_init(|| Arc::new(HttpOptions::default()));
    Ok(if options == **default { Arc::clone(default) } else { Arc::new(options) })
}

/// Where `HttpProtocolOptions` stand in a cluster.
pub(super) fn typed_path() -> &'static str {
    "typed_extension_protocol_options[envoy.extensions.upstreams.http.v3.HttpProtocolOptions]"
}

fn from_cluster(proto: &pb::Cluster) -> Result<HttpOptions, ConfigError> {
    use pb::cluster::ClusterProtocolSelection;
    let mut options = HttpOptions::default();
    if let Some(common) = &proto.common_http_protocol_options {
        options.common(common).at(|| "common_http_protocol_options")?;
    }
    if let Some(upstream) = &proto.upstream_http_protocol_options {
        options.upstream(upstream);
    }
    if let Some(http1) = &proto.http_protocol_options {
        options.http1 = http1_options(http1).at(|| "http_protocol_options")?;
    }
    if let Some(http2) = &proto.http2_protocol_options {
        options.http2 = http2_options(http2).at(|| "http2_protocol_options")?;
        options.protocol = UpstreamProtocol::Http2;
    }
    if proto.protocol_selection == ClusterProtocolSelection::UseDownstreamProtocol as i32 {
        options.protocol = UpstreamProtocol::UseDownstream;
    }
    if let Some(max) = u32_value(proto.max_requests_per_connection.as_ref()) {
        options.max_requests_per_connection = (max > 0).then_some(max);
    }
    Ok(options)
}

fn from_typed(proto: &upstream::HttpProtocolOptions) -> Result<HttpOptions, ConfigError> {
    use upstream::http_protocol_options as options_pb;
    use upstream::http_protocol_options::UpstreamProtocolOptions;
    use upstream::http_protocol_options::explicit_http_config::ProtocolConfig;
    let upstream::HttpProtocolOptions {
        common_http_protocol_options,
        upstream_http_protocol_options,
        // Compiled by who knows filters.
        http_filters: _,
        header_validation_config,
        outlier_detection,
        // Compiled by who knows routes.
        request_mirror_policies: _,
        hash_policy: _,
        retry_policy: _,
        upstream_protocol_options,
    } = proto;
    refuse("header_validation_config", header_validation_config.is_some(), "header validators")?;
    let matcher = outlier_detection.as_ref().is_some_and(|detection| detection.error_matcher.is_some());
    refuse("outlier_detection.error_matcher", matcher, "outlier detection")?;

    let mut options = HttpOptions::default();
    if let Some(common) = common_http_protocol_options {
        options.common(common).at(|| "common_http_protocol_options")?;
    }
    if let Some(upstream) = upstream_http_protocol_options {
        options.upstream(upstream);
    }
    let http3 = |set: bool| refuse("http3_protocol_options", set, "HTTP/3");
    match upstream_protocol_options {
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => {
            let at = || "explicit_http_config";
            match &explicit.protocol_config {
                Some(ProtocolConfig::HttpProtocolOptions(http1)) => {
                    options.http1 = http1_options(http1).at(|| "http_protocol_options").at(at)?;
                }
                Some(ProtocolConfig::Http2ProtocolOptions(http2)) => {
                    options.http2 = http2_options(http2).at(|| "http2_protocol_options").at(at)?;
                    options.protocol = UpstreamProtocol::Http2;
                }
                Some(ProtocolConfig::Http3ProtocolOptions(_)) => http3(true).at(at)?,
                None => return Err(ConfigError::field("protocol_config", "must be set").at(at())),
            }
        }
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)) => {
            let at = || "use_downstream_protocol_config";
            let options_pb::UseDownstreamHttpConfig {
                http_protocol_options,
                http2_protocol_options,
                http3_protocol_options,
            } = config;
            http3(http3_protocol_options.is_some()).at(at)?;
            options.versions(http_protocol_options.as_ref(), http2_protocol_options.as_ref()).at(at)?;
            options.protocol = UpstreamProtocol::UseDownstream;
        }
        Some(UpstreamProtocolOptions::AutoConfig(config)) => {
            let at = || "auto_config";
            let options_pb::AutoHttpConfig {
                http_protocol_options,
                http2_protocol_options,
                http3_protocol_options,
                alternate_protocols_cache_options,
            } = config;
            http3(http3_protocol_options.is_some()).at(at)?;
            let alternate = alternate_protocols_cache_options.is_some();
            refuse("alternate_protocols_cache_options", alternate, "it is for HTTP/3").at(at)?;
            options.versions(http_protocol_options.as_ref(), http2_protocol_options.as_ref()).at(at)?;
            options.protocol = UpstreamProtocol::Auto;
        }
        None => return Err(ConfigError::field("upstream_protocol_options", "must be set")),
    }
    Ok(options)
}

impl HttpOptions {
    fn common(&mut self, proto: &core::HttpProtocolOptions) -> Result<(), ConfigError> {
        let core::HttpProtocolOptions {
            idle_timeout,
            max_connection_duration,
            max_connection_duration_jitter,
            max_headers_count,
            max_response_headers_kb,
            max_stream_duration,
            // Of requests: responses pass as they are, says Envoy.
            headers_with_underscores_action: _,
            max_requests_per_connection,
        } = proto;
        // An explicit zero switches the timeout off.
        if let Some(timeout) = duration("idle_timeout", idle_timeout.as_ref())? {
            self.idle_timeout = (!timeout.is_zero()).then_some(timeout);
        }
        self.max_connection_duration = duration("max_connection_duration", max_connection_duration.as_ref())?
            .filter(|value| !value.is_zero());
        self.max_connection_duration_jitter =
            max_connection_duration_jitter.as_ref().map_or(0.0, |percent| percent.value);
        if let Some(count) = u32_value(max_headers_count.as_ref()) {
            self.max_headers_count = count;
        }
        if let Some(kilobytes) = u32_value(max_response_headers_kb.as_ref()) {
            if !(1..=8192).contains(&kilobytes) {
                return Err(ConfigError::field("max_response_headers_kb", "must be in 1..=8192"));
            }
            self.max_response_headers_kb = kilobytes;
        }
        self.max_stream_duration =
            duration("max_stream_duration", max_stream_duration.as_ref())?.filter(|value| !value.is_zero());
        self.max_requests_per_connection =
            u32_value(max_requests_per_connection.as_ref()).filter(|max| *max > 0);
        Ok(())
    }

    fn upstream(&mut self, proto: &core::UpstreamHttpProtocolOptions) {
        let core::UpstreamHttpProtocolOptions { auto_sni, auto_san_validation, override_auto_sni_header } =
            proto;
        self.auto_sni = *auto_sni;
        self.auto_san_validation = *auto_san_validation;
        self.auto_sni_header = (!override_auto_sni_header.is_empty())
            .then(|| override_auto_sni_header.to_ascii_lowercase().into());
    }

    fn versions(
        &mut self,
        http1: Option<&core::Http1ProtocolOptions>,
        http2: Option<&core::Http2ProtocolOptions>,
    ) -> Result<(), ConfigError> {
        if let Some(http1) = http1 {
            self.http1 = http1_options(http1).at(|| "http_protocol_options")?;
        }
        if let Some(http2) = http2 {
            self.http2 = http2_options(http2).at(|| "http2_protocol_options")?;
        }
        Ok(())
    }
}

fn http1_options(proto: &core::Http1ProtocolOptions) -> Result<Http1Options, ConfigError> {
    let core::Http1ProtocolOptions {
        // Of requests: it has no meaning for an upstream.
        allow_absolute_url: _,
        // Such responses always pass.
        accept_http_10: _,
        // Of requests likewise.
        default_host_for_http_10: _,
        header_key_format,
        enable_trailers,
        allow_chunked_length,
        // A bad HTTP/1 response always ends its connection, which carries one stream.
        override_stream_error_on_invalid_http_message: _,
        send_fully_qualified_url,
        // There is one parser.
        use_balsa_parser: _,
        // Of requests: methods pass to upstreams as they came.
        allow_custom_methods: _,
        // Of requests.
        ignore_http_11_upgrade: _,
    } = proto;
    Ok(Http1Options {
        header_case: header_case(header_key_format.as_ref())?,
        enable_trailers: *enable_trailers,
        allow_chunked_length: *allow_chunked_length,
        send_fully_qualified_url: *send_fully_qualified_url,
    })
}

/// What becomes of header names with underscores in requests (`headers_with_underscores_action`).
///
/// # Errors
/// When the number is of no action.
pub fn underscores(action: i32) -> Result<Underscores, ConfigError> {
    use core::http_protocol_options::HeadersWithUnderscoresAction as Action;
    match Action::try_from(action) {
        Ok(Action::Allow) => Ok(Underscores::Allow),
        Ok(Action::RejectRequest) => Ok(Underscores::Reject),
        Ok(Action::DropHeader) => Ok(Underscores::Drop),
        Err(_) => Err(ConfigError::field("headers_with_underscores_action", "unknown value")),
    }
}

/// How header names are spelled on the wire (`header_key_format`), towards both sides.
///
/// # Errors
/// When the stateful formatter is not `preserve_case`.
pub fn header_case(
    proto: Option<&core::http1_protocol_options::HeaderKeyFormat>,
) -> Result<HeaderCase, ConfigError> {
    use core::http1_protocol_options::header_key_format::HeaderFormat;
    let (formatter, name) = match proto.and_then(|format| format.header_format.as_ref()) {
        None => return Ok(HeaderCase::Lower),
        Some(HeaderFormat::ProperCaseWords(_)) => return Ok(HeaderCase::Proper),
        Some(HeaderFormat::StatefulFormatter(formatter)) => {
            (formatter, formatter.typed_config.as_ref().map_or("", type_name))
        }
    };
    match name {
        "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig" => {
            let any = formatter.typed_config.as_ref();
            let config: PreserveCaseFormatterConfig = any.map(unpack).transpose()?.unwrap_or_default();
            let proper_added =
                config.formatter_type_on_envoy_headers() == FormatterTypeOnEnvoyHeaders::ProperCase;
            Ok(HeaderCase::Preserve(Preserve { reason_phrase: config.forward_reason_phrase, proper_added }))
        }
        _ => Err(ConfigError::field(
            "header_key_format.stateful_formatter",
            format!("not supported: header formatter {} ({name})", formatter.name),
        )),
    }
}

fn http2_options(proto: &core::Http2ProtocolOptions) -> Result<Http2Options, ConfigError> {
    let core::Http2ProtocolOptions {
        hpack_table_size,
        max_concurrent_streams,
        initial_stream_window_size,
        initial_connection_window_size,
        // Of requests: an upstream says for itself whether it takes extended CONNECT.
        allow_connect: _,
        allow_metadata,
        // What we queue: the HTTP/2 library has its own, stricter bounds.
        max_outbound_frames: _,
        max_outbound_control_frames: _,
        max_consecutive_inbound_frames_with_empty_payload,
        max_inbound_priority_frames_per_stream,
        max_inbound_window_update_frames_per_data_frame_sent,
        stream_error_on_invalid_http_messaging,
        override_stream_error_on_invalid_http_message,
        custom_settings_parameters,
        connection_keepalive,
        // There is one codec.
        use_oghttp2_codec: _,
        // Only with allow_metadata.
        max_metadata_size: _,
        enable_huffman_encoding,
        max_header_field_size_kb,
        disallow_obs_text,
        // Resets that a server tolerates: not of an upstream connection.
        stream_reset_burst: _,
        stream_reset_rate: _,
    } = proto;
    refuse("allow_metadata", *allow_metadata, "METADATA frames")?;
    refuse("custom_settings_parameters", !custom_settings_parameters.is_empty(), "custom SETTINGS")?;
    let no_huffman = enable_huffman_encoding.as_ref().is_some_and(|flag| !flag.value);
    refuse("enable_huffman_encoding", no_huffman, "Huffman coding is always used")?;
    refuse("max_header_field_size_kb", max_header_field_size_kb.is_some(), "use max_response_headers_kb")?;
    let disallow = disallow_obs_text.as_ref().is_some_and(|flag| flag.value);
    refuse("disallow_obs_text", disallow, "obs-text passes")?;
    let default = Http2Options::default();
    let ranged = |field: &str, value, min: u32, default: u32| match u32_value(value) {
        None => Ok(default),
        Some(value) if (min..=i32::MAX as u32).contains(&value) => Ok(value),
        Some(_) => Err(ConfigError::field(field.to_owned(), format!("must be in {min}..=2147483647"))),
    };
    Ok(Http2Options {
        hpack_table_size: u32_value(hpack_table_size.as_ref()).unwrap_or(default.hpack_table_size),
        max_concurrent_streams: ranged(
            "max_concurrent_streams",
            max_concurrent_streams.as_ref(),
            1,
            default.max_concurrent_streams,
        )?,
        initial_stream_window_size: ranged(
            "initial_stream_window_size",
            initial_stream_window_size.as_ref(),
            65_535,
            default.initial_stream_window_size,
        )?,
        initial_connection_window_size: ranged(
            "initial_connection_window_size",
            initial_connection_window_size.as_ref(),
            65_535,
            default.initial_connection_window_size,
        )?,
        stream_error_on_invalid_message: bool_value(
            override_stream_error_on_invalid_http_message.as_ref(),
            *stream_error_on_invalid_http_messaging,
        ),
        keepalive: connection_keepalive.as_ref().map(keepalive).transpose().at(|| "connection_keepalive")?,
        frame_limits: FrameLimits {
            empty_frames: u32_value(max_consecutive_inbound_frames_with_empty_payload.as_ref())
                .unwrap_or(default.frame_limits.empty_frames),
            priority_frames: u32_value(max_inbound_priority_frames_per_stream.as_ref())
                .unwrap_or(default.frame_limits.priority_frames),
            window_updates: ranged(
                "max_inbound_window_update_frames_per_data_frame_sent",
                max_inbound_window_update_frames_per_data_frame_sent.as_ref(),
                1,
                default.frame_limits.window_updates,
            )?,
        },
    })
}

fn keepalive(proto: &core::KeepaliveSettings) -> Result<Keepalive, ConfigError> {
    let core::KeepaliveSettings {
        interval,
        timeout,
        // PINGs go out at the interval.
        interval_jitter: _,
        // Refused by the schema.
        connection_idle_interval: _,
    } = proto;
    Ok(Keepalive {
        interval: positive("interval", interval.as_ref())?,
        timeout: positive("timeout", timeout.as_ref())?
            .ok_or_else(|| ConfigError::field("timeout", "must be set"))?,
    })
}
