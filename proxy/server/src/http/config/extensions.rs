//! The small extensions of the connection manager.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions as ext;
use envoy_types::pb::xds::core::v3 as xds;
use envoy_types::pb::xds::r#type::matcher::v3 as tree;
use ext::filters::network::http_connection_manager::v3::RequestIdExtension;
use ext::filters::network::http_connection_manager::v3::http_connection_manager::ForwardClientCertConfig;
use ext::http::early_header_mutation::header_mutation::v3::HeaderMutation;
use ext::http::original_ip_detection::{custom_header::v3::CustomHeaderConfig, xff::v3::XffConfig};
use ext::request_id::uuid::v3::UuidRequestIdConfig;
use waystation_filter_api::runtime::Runtime;
use waystation_filter_api::wire::{bool_value, type_name, unpack};
use waystation_format::HeaderMutationList;
use waystation_http::HeaderName;
use waystation_matchers::{CidrList, InputScope, Matcher, TreeContext};
use waystation_schema::{At, ConfigError};

use super::RequestId;
use crate::http::client_cert::{Details, Forward, ForwardCert};
use crate::http::forwarding::Detection;

/// `original_ip_detection_extensions`; without any, XFF as Envoy reads it by default.
pub(super) fn detection(
    protos: &[TypedExtensionConfig],
    use_remote_address: bool,
    trusted_hops: u32,
) -> Result<Vec<Detection>, ConfigError> {
    if protos.is_empty() {
        return Ok(match use_remote_address {
            true => Vec::new(),
            false => vec![Detection::Xff { hops: trusted_hops, trusted: None, skip_append: true }],
        });
    }
    if use_remote_address {
        return Err(ConfigError::field(
            "original_ip_detection_extensions",
            "Original IP detection extensions and use_remote_address may not be mixed",
        ));
    }
    if trusted_hops > 0 {
        return Err(ConfigError::field(
            "original_ip_detection_extensions",
            "Original IP detection extensions and xff_num_trusted_hops may not be mixed",
        ));
    }
    let one = |proto: &TypedExtensionConfig| {
        let any =
            proto.typed_config.as_ref().ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        match type_name(any) {
            "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig" => {
                let XffConfig { xff_num_trusted_hops, xff_trusted_cidrs, skip_xff_append } = unpack(any)?;
                let trusted = xff_trusted_cidrs
                    .as_ref()
                    .map(|list| CidrList::compile(&list.cidrs, "cidrs").at(|| "xff_trusted_cidrs"))
                    .transpose()?;
                let skip_append = bool_value(skip_xff_append.as_ref(), true);
                Ok(Detection::Xff { hops: xff_num_trusted_hops, trusted, skip_append })
            }
            "envoy.extensions.http.original_ip_detection.custom_header.v3.CustomHeaderConfig" => {
                let config: CustomHeaderConfig = unpack(any)?;
                let name = HeaderName::parse(&config.header_name)
                    .map_err(|error| ConfigError::field("header_name", error.to_string()))?;
                let reject = config.reject_with_status.map(|status| {
                    let code = u16::try_from(status.code).ok().filter(|code| (400..512).contains(code));
                    code.unwrap_or(403)
                });
                Ok(Detection::Header {
                    name,
                    trusted: config.allow_extension_to_set_address_as_trusted,
                    reject,
                })
            }
            other => Err(ConfigError::new(format!("unknown original IP detection type '{other}'"))),
        }
    };
    protos
        .iter()
        .enumerate()
        .map(|(index, proto)| one(proto).at(|| format!("original_ip_detection_extensions[{index}]")))
        .collect()
}

/// `early_header_mutation_extensions`.
pub(super) fn early_mutations(
    protos: &[TypedExtensionConfig],
) -> Result<Vec<HeaderMutationList>, ConfigError> {
    let one = |proto: &TypedExtensionConfig| {
        let any =
            proto.typed_config.as_ref().ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        match type_name(any) {
            "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation" => {
                let config: HeaderMutation = unpack(any)?;
                HeaderMutationList::compile(&config.mutations).at(|| "mutations")
            }
            other => Err(ConfigError::new(format!("unknown early header mutation type '{other}'"))),
        }
    };
    protos
        .iter()
        .enumerate()
        .map(|(index, proto)| one(proto).at(|| format!("early_header_mutation_extensions[{index}]")))
        .collect()
}

/// `forward_client_cert_matcher`.
pub(super) fn forward_cert_matcher(
    proto: &tree::Matcher,
    runtime: &Runtime,
) -> Result<Matcher<ForwardCert>, ConfigError> {
    let action = |config: &xds::TypedExtensionConfig| {
        let any = config.typed_config.as_ref();
        let any = any.ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        let expected = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.ForwardClientCertConfig";
        if type_name(any) != expected {
            return Err(ConfigError::new(format!("unknown client certificate action '{}'", type_name(any))));
        }
        let config: ForwardClientCertConfig = unpack(any)?;
        Ok((
            Forward::compile(config.forward_client_cert_details()),
            Details::compile(config.set_current_client_cert_details.as_ref())?,
        ))
    };
    Matcher::compile(proto, &TreeContext { scope: InputScope::Http, runtime, action: &action })
}

/// `request_id_extension`: only the UUID that is Envoy's default. Its trace bit follows tracing, which is not there.
pub(super) fn request_id(
    proto: Option<&RequestIdExtension>,
    base: RequestId,
) -> Result<RequestId, ConfigError> {
    let Some(any) = proto.and_then(|proto| proto.typed_config.as_ref()) else { return Ok(base) };
    match type_name(any) {
        "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig" => {
            let UuidRequestIdConfig { pack_trace_reason: _, use_request_id_for_trace_sampling: _ } =
                unpack(any)?;
            Ok(base)
        }
        other => Err(ConfigError::new(format!("unknown request id type '{other}'"))),
    }
}
