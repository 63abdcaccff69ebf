//! `local_reply_config`.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use waystation_filter_api::data_source;
use waystation_format::{AccessLogFilter, HeaderMutations, SubstitutionFormat};
use waystation_schema::{At, ConfigError};

use crate::context::CompileContext;

/// `local_reply_config`.
#[derive(Debug)]
pub(crate) struct LocalReplies {
    pub(crate) mappers: Vec<Mapper>,
    pub(crate) format: Option<SubstitutionFormat>,
}

/// `ResponseMapper`.
#[derive(Debug)]
pub(crate) struct Mapper {
    pub(crate) filter: AccessLogFilter,
    pub(crate) status: Option<u16>,
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) format: Option<SubstitutionFormat>,
    pub(crate) headers: HeaderMutations,
}

pub(super) fn compile(
    proto: &pb::LocalReplyConfig,
    cx: &CompileContext<'_>,
) -> Result<LocalReplies, ConfigError> {
    let pb::LocalReplyConfig { mappers, body_format } = proto;
    let format = |proto: Option<&core::SubstitutionFormatString>, field: &'static str| {
        proto.map(|proto| SubstitutionFormat::compile(proto).at(|| field)).transpose()
    };
    let mapper = |proto: &pb::ResponseMapper| {
        let pb::ResponseMapper { filter, status_code, body, body_format_override, headers_to_add } = proto;
        let filter = filter.as_ref().ok_or_else(|| ConfigError::field("filter", "is required"))?;
        let status = status_code.as_ref().map(|code| {
            u16::try_from(code.value)
                .ok()
                .filter(|code| (200..600).contains(code))
                .ok_or_else(|| ConfigError::field("status_code", "must be between 200 and 599"))
        });
        Ok(Mapper {
            filter: AccessLogFilter::compile(filter, &cx.shared.runtime).at(|| "filter")?,
            status: status.transpose()?,
            body: data_source::read(body.as_ref()).at(|| "body")?.map(|data| data.bytes),
            format: format(body_format_override.as_ref(), "body_format_override")?,
            headers: HeaderMutations::compile(headers_to_add, &[]).at(|| "headers_to_add")?,
        })
    };
    Ok(LocalReplies {
        mappers: mappers
            .iter()
            .enumerate()
            .map(|(index, proto)| mapper(proto).at(|| format!("mappers[{index}]")))
            .collect::<Result<_, ConfigError>>()?,
        format: format(body_format.as_ref(), "body_format")?,
    })
}
