//! What a successful request is.

use envoy_types::pb::envoy::extensions::filters::http::admission_control::v3::admission_control::SuccessCriteria;
use waystation_schema::ConfigError;

/// The gRPC codes that sending fewer requests would not change, as Envoy has them.
const GRPC_DEFAULTS: [u32; 11] = [0, 1, 2, 3, 5, 6, 7, 9, 11, 12, 16];

/// The highest code of gRPC.
const GRPC_LAST: u32 = 16;

#[derive(Clone, Debug)]
pub(super) struct Criteria {
    /// Ranges without their ends.
    http: Vec<(u16, u16)>,
    /// A bit for each code.
    grpc: u32,
}

impl Criteria {
    /// # Errors
    /// In Envoy's words, for what is no status.
    pub(super) fn compile(proto: &SuccessCriteria) -> Result<Self, ConfigError> {
        let http = match &proto.http_criteria {
            // The client is to blame for what is below.
            None => vec![(0, 500)],
            Some(criteria) => criteria.http_success_status.iter().map(range).collect::<Result<_, _>>()?,
        };
        let codes = proto.grpc_criteria.as_ref().map(|criteria| &*criteria.grpc_success_status);
        let mut grpc = 0;
        for code in codes.unwrap_or(&GRPC_DEFAULTS) {
            if *code > GRPC_LAST {
                return Err(ConfigError::new(format!("invalid gRPC code {code}")));
            }
            grpc |= 1 << code;
        }
        Ok(Self { http, grpc })
    }

    pub(super) fn is_http_success(&self, status: u16) -> bool {
        self.http.iter().any(|(start, end)| (*start..*end).contains(&status))
    }

    pub(super) fn is_grpc_success(&self, code: u32) -> bool {
        code <= GRPC_LAST && self.grpc & 1 << code != 0
    }
}

fn range(proto: &envoy_types::pb::envoy::r#type::v3::Int32Range) -> Result<(u16, u16), ConfigError> {
    let (start, end) = (proto.start, proto.end);
    match (u16::try_from(start), u16::try_from(end)) {
        (Ok(from), Ok(to)) if (100..=600).contains(&from) && to <= 600 && from <= to => Ok((from, to)),
        _ => Err(ConfigError::new(format!("invalid HTTP range: [{start}, {end})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults() {
        let criteria = Criteria::compile(&SuccessCriteria::default()).unwrap();
        for (status, success) in [(200, true), (404, true), (499, true), (500, false), (503, false)] {
            assert_eq!(criteria.is_http_success(status), success, "{status}");
        }
        let failures: Vec<u32> = (0..20).filter(|code| !criteria.is_grpc_success(*code)).collect();
        assert_eq!(failures, [4, 8, 10, 13, 14, 15, 17, 18, 19]);
    }
}
