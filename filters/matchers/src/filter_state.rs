//! `FilterStateMatcher`.

use std::net::IpAddr;

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use waystation_filter_api::connection::ConnectionInfo;
use waystation_filter_api::filter_state::{FilterState, Object};
use waystation_schema::{At, ConfigError};

use crate::cidr::CidrList;
use crate::messages::envoy_twin;
use crate::string::{Literal, StringMatcher};

/// Compiled `envoy.type.matcher.v3.FilterStateMatcher`: looks at an object's serialised form.
#[derive(Clone, Debug)]
pub struct FilterStateMatcher {
    key: Box<str>,
    condition: Condition,
}

#[derive(Clone, Debug)]
enum Condition {
    Text(StringMatcher),
    Address(CidrList, bool),
}

impl FilterStateMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::FilterStateMatcher) -> Result<Self, ConfigError> {
        use pb::filter_state_matcher::Matcher;
        let pb::FilterStateMatcher { key, matcher } = proto;
        if key.is_empty() {
            return Err(ConfigError::field("key", "must not be empty"));
        }
        let condition = match matcher {
            None => return Err(ConfigError::field("matcher", "is required")),
            Some(Matcher::StringMatch(text)) => {
                Condition::Text(StringMatcher::compile(text).at(|| "string_match")?)
            }
            Some(Matcher::AddressMatch(address)) => {
                let ranges = address.ranges.iter().map(envoy_twin).collect::<Vec<_>>();
                let ranges = CidrList::compile(&ranges, "ranges").at(|| "address_match")?;
                Condition::Address(ranges, address.invert_match)
            }
        };
        Ok(Self { key: key.as_str().into(), condition })
    }

    /// Compiles a list of them, all of which must match.
    pub fn compile_all(protos: &[pb::FilterStateMatcher], field: &str) -> Result<Box<[Self]>, ConfigError> {
        let compile = |(index, proto)| Self::compile(proto).at(|| format!("{field}[{index}]"));
        protos.iter().enumerate().map(compile).collect()
    }

    /// The object looked at.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What its serialised form has to be or begin with, when that is known.
    pub fn literal(&self) -> Option<Literal<'_>> {
        match &self.condition {
            Condition::Text(text) => text.literal(),
            Condition::Address(..) => None,
        }
    }

    /// Whether the stream's filter state, or else its connection's, matches. A missing object does not.
    pub fn is_match(&self, stream: Option<&FilterState>, connection: Option<&ConnectionInfo>) -> bool {
        if let Some(object) = stream.and_then(|state| state.get(&self.key)) {
            return self.is_object_match(&**object);
        }
        let Some(connection) = connection else { return false };
        let state = connection.filter_state.borrow();
        state.get(&self.key).is_some_and(|object| self.is_object_match(&**object))
    }

    fn is_object_match(&self, object: &dyn Object) -> bool {
        match object.text() {
            Some(text) => self.is_value_match(text),
            None => object.serialize().is_some_and(|value| self.is_value_match(&value)),
        }
    }

    fn is_value_match(&self, value: &[u8]) -> bool {
        match &self.condition {
            Condition::Text(text) => text.is_match(value),
            Condition::Address(ranges, invert) => {
                let address = str::from_utf8(value).ok().and_then(|text| text.parse::<IpAddr>().ok());
                address.is_some_and(|address| ranges.contains(address) != *invert)
            }
        }
    }
}
