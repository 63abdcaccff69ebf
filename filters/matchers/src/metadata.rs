//! `MetadataMatcher`.

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use waystation_filter_api::value::{Metadata, Value};
use waystation_schema::{At, ConfigError};

use crate::value::ValueMatcher;

/// A namespace of metadata and the keys to walk below it.
#[derive(Clone, Debug)]
pub struct MetadataPath {
    namespace: Box<str>,
    keys: Box<[Box<str>]>,
}

impl MetadataPath {
    /// A path; an empty list of keys is the namespace's whole object.
    pub fn new<'a>(namespace: &str, keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self { namespace: namespace.into(), keys: keys.into_iter().map(Into::into).collect() }
    }

    /// The value there.
    pub fn find<'a>(&self, metadata: &'a Metadata) -> Option<&'a Value> {
        metadata.at(&self.namespace, &self.keys)
    }
}

/// Compiled `envoy.type.matcher.v3.MetadataMatcher`.
#[derive(Clone, Debug)]
pub struct MetadataMatcher {
    path: MetadataPath,
    value: ValueMatcher,
    invert: bool,
}

impl MetadataMatcher {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::MetadataMatcher) -> Result<Self, ConfigError> {
        let pb::MetadataMatcher { filter, path, value, invert } = proto;
        if filter.is_empty() {
            return Err(ConfigError::field("filter", "must not be empty"));
        }
        let mut keys = Vec::with_capacity(path.len());
        for (index, segment) in path.iter().enumerate() {
            match &segment.segment {
                Some(pb::metadata_matcher::path_segment::Segment::Key(key)) if !key.is_empty() => {
                    keys.push(&**key)
                }
                _ => return Err(ConfigError::field(format!("path[{index}].key"), "is required")),
            }
        }
        let value = value.as_ref().ok_or_else(|| ConfigError::field("value", "is required"))?;
        Ok(Self {
            path: MetadataPath::new(filter, keys),
            value: ValueMatcher::compile(value).at(|| "value")?,
            invert: *invert,
        })
    }

    /// Compiles a list of them, all of which must match.
    pub fn compile_all(protos: &[pb::MetadataMatcher], field: &str) -> Result<Box<[Self]>, ConfigError> {
        let compile = |(index, proto)| Self::compile(proto).at(|| format!("{field}[{index}]"));
        protos.iter().enumerate().map(compile).collect()
    }

    /// Whether `metadata` matches.
    pub fn is_match(&self, metadata: &Metadata) -> bool {
        self.value.is_match(self.path.find(metadata)) != self.invert
    }
}

#[cfg(test)]
mod tests {
    use super::MetadataMatcher;
    use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
    use waystation_filter_api::value::{Metadata, Value};

    #[test]
    fn a_path_below_a_namespace_and_its_inverse() {
        let mut metadata = Metadata::default();
        metadata.set("ns", "a", Value::Bool(true));
        for (key, invert, expected) in
            [("a", false, true), ("a", true, false), ("b", false, false), ("b", true, true)]
        {
            let segment = pb::metadata_matcher::path_segment::Segment::Key(key.into());
            let proto = pb::MetadataMatcher {
                filter: "ns".into(),
                path: vec![pb::metadata_matcher::PathSegment { segment: Some(segment) }],
                value: Some(pb::ValueMatcher {
                    match_pattern: Some(pb::value_matcher::MatchPattern::BoolMatch(true)),
                }),
                invert,
            };
            assert_eq!(
                MetadataMatcher::compile(&proto).unwrap().is_match(&metadata),
                expected,
                "{key} {invert}"
            );
        }
    }
}
