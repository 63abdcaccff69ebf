//! Protocol options of the downstream side.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::wire::{self, bool_value, u32_value};
use waystation_http::h1;
use waystation_http::h2::FrameLimits;
use waystation_matchers::StringMatcher;
use waystation_schema::{At, ConfigError};
use waystation_upstream::cluster::{header_case, underscores};

use super::Http2Options;

pub(super) fn http1(
    proto: Option<&core::Http1ProtocolOptions>,
    common: &core::HttpProtocolOptions,
    max_headers_kb: u32,
) -> Result<h1::Config, ConfigError> {
    let base = h1::Config {
        max_headers: common.max_headers_count.as_ref().map_or(100, |count| count.value),
        max_head_bytes: max_headers_kb.saturating_mul(1024),
        underscores: underscores(common.headers_with_underscores_action)?,
        ..h1::Config::default()
    };
    match proto {
        None => Ok(base),
        Some(proto) => http1_options(proto, base).at(|| "http_protocol_options"),
    }
}

fn http1_options(proto: &core::Http1ProtocolOptions, base: h1::Config) -> Result<h1::Config, ConfigError> {
    #[expect(deprecated, reason = "named to show that it is ignored")]
    let core::Http1ProtocolOptions {
        allow_absolute_url,
        accept_http_10,
        default_host_for_http_10,
        header_key_format,
        enable_trailers,
        allow_chunked_length,
        override_stream_error_on_invalid_http_message,
        // The request line is written by the upstream side.
        send_fully_qualified_url: _,
        // There is one parser here, with Balsa's results.
        use_balsa_parser: _,
        allow_custom_methods,
        ignore_http_11_upgrade,
    } = proto;
    if bool_value(override_stream_error_on_invalid_http_message.as_ref(), false) {
        return Err(ConfigError::field(
            "override_stream_error_on_invalid_http_message",
            "is not supported: an invalid HTTP/1 message always closes its connection",
        ));
    }
    Ok(h1::Config {
        allow_absolute_url: bool_value(allow_absolute_url.as_ref(), true),
        accept_http_10: *accept_http_10,
        default_host_for_http_10: Some(default_host_for_http_10.as_str())
            .filter(|host| !host.is_empty())
            .map(Into::into),
        enable_trailers: *enable_trailers,
        allow_chunked_length: *allow_chunked_length,
        allow_custom_methods: *allow_custom_methods,
        header_case: header_case(header_key_format.as_ref())?,
        ignored_upgrades: ignored_upgrades(ignore_http_11_upgrade)?,
        ..base
    })
}

pub(super) fn http2(proto: Option<&core::Http2ProtocolOptions>) -> Result<Http2Options, ConfigError> {
    let default = core::Http2ProtocolOptions::default();
    #[expect(deprecated, reason = "the deprecated form is refused like the current one")]
    let core::Http2ProtocolOptions {
        hpack_table_size,
        max_concurrent_streams,
        initial_stream_window_size,
        initial_connection_window_size,
        allow_connect,
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
        // There is one codec here.
        use_oghttp2_codec: _,
        max_metadata_size: _,
        // Only changes how headers are compressed.
        enable_huffman_encoding: _,
        max_header_field_size_kb: _,
        disallow_obs_text: _,
        stream_reset_burst: _,
        stream_reset_rate: _,
    } = proto.unwrap_or(&default);
    for (field, set) in [
        ("allow_metadata", *allow_metadata),
        ("custom_settings_parameters", !custom_settings_parameters.is_empty()),
    ] {
        if set {
            return Err(ConfigError::field(
                field,
                "is not supported: the HTTP/2 library has no METADATA or own settings",
            ));
        }
    }
    let number = |value: Option<&wkt::UInt32Value>, default: u32| u32_value(value).unwrap_or(default);
    let keepalive = connection_keepalive.as_ref();
    let duration = |field: &str, value: Option<&wkt::Duration>| {
        wire::timeout(field, value, None).at(|| "connection_keepalive")
    };
    let limits = FrameLimits::default();
    Ok(Http2Options {
        hpack_table_size: number(hpack_table_size.as_ref(), 4096),
        max_concurrent_streams: number(max_concurrent_streams.as_ref(), 1024),
        initial_stream_window_size: number(initial_stream_window_size.as_ref(), 16 << 20),
        initial_connection_window_size: number(initial_connection_window_size.as_ref(), 24 << 20),
        allow_connect: *allow_connect,
        keepalive_interval: duration(
            "interval",
            keepalive.and_then(|keepalive| keepalive.interval.as_ref()),
        )?,
        keepalive_timeout: duration("timeout", keepalive.and_then(|keepalive| keepalive.timeout.as_ref()))?,
        frame_limits: FrameLimits {
            empty_frames: number(
                max_consecutive_inbound_frames_with_empty_payload.as_ref(),
                limits.empty_frames,
            ),
            priority_frames: number(max_inbound_priority_frames_per_stream.as_ref(), limits.priority_frames),
            window_updates: number(
                max_inbound_window_update_frames_per_data_frame_sent.as_ref(),
                limits.window_updates,
            ),
        },
        stream_error_on_invalid_message: bool_value(
            override_stream_error_on_invalid_http_message.as_ref(),
            *stream_error_on_invalid_http_messaging,
        ),
    })
}

/// `upgrade` tokens that HTTP/1 requests lose on arrival.
fn ignored_upgrades(
    protos: &[envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher],
) -> Result<Option<h1::UpgradeMatcher>, ConfigError> {
    if protos.is_empty() {
        return Ok(None);
    }
    let matchers = protos.iter().enumerate().map(|(index, proto)| {
        StringMatcher::compile(proto).at(|| format!("ignore_http_11_upgrade[{index}]"))
    });
    let matchers: Vec<StringMatcher> = matchers.collect::<Result<_, _>>()?;
    Ok(Some(Arc::new(move |token: &[u8]| matchers.iter().any(|matcher| matcher.is_match(token)))))
}
