//! Messages of the `xds` package: those that are Envoy's under another name, and those of `xds.type.matcher.v3` that
//! `envoy-types` does not carry.

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::xds::r#type::matcher::v3::matcher::OnMatch;
use prost::Message;

/// Envoy's message of the same fields: what the `xds` package copied from Envoy (`StringMatcher`, `CidrRange`) is the
/// same on the wire.
pub(crate) fn envoy_twin<X: Message, E: Message + Default>(proto: &X) -> E {
    E::decode(&*proto.encode_to_vec()).expect("the fields of both have the same numbers and types")
}

/// `xds.type.matcher.v3.IPMatcher`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct IpMatcher {
    #[prost(message, repeated, tag = "1")]
    pub(crate) range_matchers: Vec<IpRangeMatcher>,
}

/// `xds.type.matcher.v3.IPMatcher.IPRangeMatcher`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct IpRangeMatcher {
    #[prost(message, repeated, tag = "1")]
    pub(crate) ranges: Vec<CidrRange>,
    #[prost(message, optional, tag = "2")]
    pub(crate) on_match: Option<OnMatch>,
    #[prost(bool, tag = "3")]
    pub(crate) exclusive: bool,
}

/// `xds.type.matcher.v3.ServerNameMatcher`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ServerNameMatcher {
    #[prost(message, repeated, tag = "1")]
    pub(crate) domain_matchers: Vec<DomainMatcher>,
}

/// `xds.type.matcher.v3.ServerNameMatcher.DomainMatcher`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct DomainMatcher {
    #[prost(string, repeated, tag = "1")]
    pub(crate) domains: Vec<String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) on_match: Option<OnMatch>,
}
