//! The `proxy-status` header (RFC 9209): why a response is not what upstream would have answered.

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use pb::http_connection_manager::{ProxyStatusConfig, proxy_status_config::ProxyName};
use waystation_filter_api::flags::ResponseFlag;
use waystation_filter_api::stream::StreamInfo;
use waystation_http::Headers;

/// `ProxyStatusConfig`.
#[derive(Debug)]
pub(crate) struct ProxyStatus {
    name: Box<str>,
    details: bool,
    termination_details: bool,
    flags: bool,
    recommend: bool,
}

/// The error that a flag stands for, and the status that section 2.3 of the RFC recommends for it; the first flag that
/// is set counts, in Envoy's order. A request that breaks the protocol is answered before it has its flag.
const ERRORS: [(ResponseFlag, &str, Option<u16>); 19] = [
    (ResponseFlag::FailedLocalHealthCheck, "destination_unavailable", Some(503)),
    (ResponseFlag::NoHealthyUpstream, "destination_unavailable", Some(503)),
    (ResponseFlag::UpstreamRequestTimeout, "http_response_timeout", Some(504)),
    (ResponseFlag::LocalReset, "connection_timeout", Some(504)),
    (ResponseFlag::UpstreamRemoteReset, "connection_terminated", Some(502)),
    (ResponseFlag::UpstreamConnectionFailure, "connection_refused", Some(502)),
    (ResponseFlag::UpstreamConnectionTermination, "connection_terminated", Some(502)),
    (ResponseFlag::UpstreamOverflow, "connection_limit_reached", Some(503)),
    (ResponseFlag::NoRouteFound, "destination_not_found", Some(500)),
    (ResponseFlag::RateLimited, "connection_limit_reached", Some(503)),
    (ResponseFlag::RateLimitServiceError, "connection_limit_reached", Some(503)),
    (ResponseFlag::UpstreamRetryLimitExceeded, "destination_unavailable", Some(503)),
    (ResponseFlag::StreamIdleTimeout, "http_response_timeout", Some(504)),
    (ResponseFlag::InvalidEnvoyRequestHeaders, "http_request_error", None),
    (ResponseFlag::UpstreamMaxStreamDurationReached, "http_response_timeout", Some(504)),
    (ResponseFlag::NoFilterConfigFound, "proxy_configuration_error", Some(500)),
    (ResponseFlag::UpstreamProtocolError, "http_protocol_error", Some(502)),
    (ResponseFlag::NoClusterFound, "destination_unavailable", Some(503)),
    (ResponseFlag::DnsResolutionFailed, "dns_error", Some(502)),
];

impl ProxyStatus {
    pub(crate) fn compile(proto: &ProxyStatusConfig, server_name: &str, node_id: &str) -> Self {
        let ProxyStatusConfig {
            remove_details,
            remove_connection_termination_details,
            remove_response_flags,
            set_recommended_response_code,
            proxy_name,
        } = proto;
        let name = match proxy_name {
            Some(ProxyName::UseNodeId(_)) => node_id,
            Some(ProxyName::LiteralProxyName(name)) => name,
            None if server_name.is_empty() => "envoy",
            None => server_name,
        };
        Self {
            name: name.into(),
            details: !remove_details,
            termination_details: !remove_connection_termination_details,
            flags: !remove_response_flags,
            recommend: *set_recommended_response_code,
        }
    }

    /// Says in a response head what has gone wrong, if anything has.
    pub(crate) fn apply(&self, info: &StreamInfo, head: &mut Headers) {
        let Some((_, error, status)) = ERRORS.iter().find(|(flag, ..)| info.flags.contains(*flag)) else {
            return;
        };
        let mut value = format!("{}; error={error}", self.name);
        if let Some(details) = info.details.as_deref().filter(|_| self.details) {
            let mut text = details.to_owned();
            if self.termination_details
                && let Some(why) = info.connection.termination_details.borrow().as_deref()
            {
                text.push_str("; ");
                text.push_str(why);
            }
            if self.flags {
                text.push_str("; ");
                text.push_str(&info.flags.to_string());
            }
            value.push_str("; details=\"");
            for c in text.chars() {
                if matches!(c, '"' | '\\') {
                    value.push('\\');
                }
                value.push(c);
            }
            value.push('"');
        }
        head.append_joined("proxy-status", ", ", value);
        if let Some(status) = status.filter(|_| self.recommend) {
            head.set_status(status);
        }
    }
}
