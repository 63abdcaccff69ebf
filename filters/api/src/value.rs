//! Metadata values: what `google.protobuf.Struct` becomes once it is compiled.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;

/// A compiled `google.protobuf.Value`.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Value {
    /// `null`, and a value whose kind is not set.
    #[default]
    Null,
    /// A boolean.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A string.
    String(Arc<str>),
    /// A list.
    List(Vec<Value>),
    /// An object, sorted by key so that equal objects compare equal.
    Struct(Struct),
}

/// A compiled `google.protobuf.Struct`.
pub type Struct = BTreeMap<Arc<str>, Value>;

impl Value {
    /// Compiles the protobuf form.
    pub fn from_proto(proto: &wkt::Value) -> Self {
        use wkt::value::Kind;
        match &proto.kind {
            None | Some(Kind::NullValue(_)) => Self::Null,
            Some(Kind::BoolValue(value)) => Self::Bool(*value),
            Some(Kind::NumberValue(value)) => Self::Number(*value),
            Some(Kind::StringValue(value)) => Self::String(value.as_str().into()),
            Some(Kind::ListValue(list)) => Self::List(list.values.iter().map(Self::from_proto).collect()),
            Some(Kind::StructValue(value)) => Self::Struct(struct_from_proto(value)),
        }
    }

    /// The protobuf form.
    pub fn to_proto(&self) -> wkt::Value {
        use wkt::value::Kind;
        let kind = match self {
            Self::Null => Kind::NullValue(0),
            Self::Bool(value) => Kind::BoolValue(*value),
            Self::Number(value) => Kind::NumberValue(*value),
            Self::String(value) => Kind::StringValue(value.to_string()),
            Self::List(values) => {
                Kind::ListValue(wkt::ListValue { values: values.iter().map(Self::to_proto).collect() })
            }
            Self::Struct(fields) => Kind::StructValue(struct_to_proto(fields)),
        };
        wkt::Value { kind: Some(kind) }
    }

    /// The value at `path`, walking objects by key.
    pub fn at<S: AsRef<str>>(&self, path: &[S]) -> Option<&Self> {
        path.iter().try_fold(self, |value, key| match value {
            Self::Struct(fields) => fields.get(key.as_ref()),
            _ => None,
        })
    }

    /// The string, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }
}

/// Compiles a protobuf object.
pub fn struct_from_proto(proto: &wkt::Struct) -> Struct {
    proto.fields.iter().map(|(key, value)| (key.as_str().into(), Value::from_proto(value))).collect()
}

/// The protobuf form of an object.
pub fn struct_to_proto(fields: &Struct) -> wkt::Struct {
    wkt::Struct { fields: fields.iter().map(|(key, value)| (key.to_string(), value.to_proto())).collect() }
}

/// A typed metadata entry: type URL and serialised message.
pub type TypedMetadata = (Arc<str>, Arc<[u8]>);

/// Compiled `envoy.config.core.v3.Metadata`: objects by namespace (`envoy.lb`, a filter's name, ...).
///
/// The typed half (`typed_filter_metadata`) is kept as type URL and bytes for the extension that knows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// `filter_metadata` by namespace.
    pub filter: BTreeMap<Arc<str>, Value>,
    /// `typed_filter_metadata` by namespace: type URL and serialised message.
    pub typed: BTreeMap<Arc<str>, TypedMetadata>,
}

impl Metadata {
    /// Compiles the protobuf form.
    pub fn from_proto(proto: &core::Metadata) -> Self {
        Self {
            filter: proto
                .filter_metadata
                .iter()
                .map(|(namespace, value)| {
                    (namespace.as_str().into(), Value::Struct(struct_from_proto(value)))
                })
                .collect(),
            typed: proto
                .typed_filter_metadata
                .iter()
                .map(|(namespace, any)| {
                    (namespace.as_str().into(), (any.type_url.as_str().into(), any.value.as_slice().into()))
                })
                .collect(),
        }
    }

    /// The value at `path` below `namespace`; an empty path is the namespace's whole object.
    pub fn at<S: AsRef<str>>(&self, namespace: &str, path: &[S]) -> Option<&Value> {
        self.filter.get(namespace)?.at(path)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.filter.is_empty() && self.typed.is_empty()
    }

    /// Sets one key below a namespace (dynamic metadata).
    pub fn set(&mut self, namespace: &str, key: &str, value: Value) {
        if !self.filter.contains_key(namespace) {
            self.filter.insert(namespace.into(), Value::Struct(Struct::new()));
        }
        let Some(Value::Struct(fields)) = self.filter.get_mut(namespace) else { return };
        match fields.get_mut(key) {
            Some(field) => *field = value,
            None => {
                fields.insert(key.into(), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Metadata, Value};

    #[test]
    fn paths_walk_objects_only() {
        let mut metadata = Metadata::default();
        metadata.set("envoy.lb", "canary", Value::Bool(true));
        assert_eq!(metadata.at("envoy.lb", &["canary"]), Some(&Value::Bool(true)));
        assert_eq!(metadata.at("envoy.lb", &["canary", "x"]), None);
        assert_eq!(metadata.at::<&str>("other", &[]), None);
    }
}
