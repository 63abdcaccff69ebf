//! Scoped routes: the key of a request, and the table of scopes.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::route::v3::{
    ScopedRouteConfiguration, scoped_route_configuration as scope,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::scoped_routes as pb;
use pb::scope_key_builder::fragment_builder::{
    HeaderValueExtractor, Type, header_value_extractor::ExtractType,
};
use smallvec::SmallVec;
use waystation_http::{HeaderName, Headers};
use waystation_schema::{At, ConfigError};

use crate::cluster::header;

/// The key of a scope: fragments in order.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct ScopeKey {
    /// Each fragment with its length before it, so that no two lists of fragments look alike.
    bytes: SmallVec<[u8; 64]>,
}

impl ScopeKey {
    /// Compiles the key of a scope. A scope without a key is reached through no request.
    pub fn compile(proto: &ScopedRouteConfiguration) -> Result<Self, ConfigError> {
        let key = proto.key.as_ref().filter(|key| !key.fragments.is_empty());
        let key = key.ok_or_else(|| ConfigError::field("key", "must have fragments"))?;
        let mut compiled = Self::default();
        for (index, fragment) in key.fragments.iter().enumerate() {
            match &fragment.r#type {
                Some(scope::key::fragment::Type::StringKey(text)) => compiled.push(text.as_bytes()),
                None => {
                    return Err(ConfigError::field("string_key", "is required"))
                        .at(|| format!("fragments[{index}]"))
                        .at(|| "key");
                }
            }
        }
        Ok(compiled)
    }

    fn push(&mut self, fragment: &[u8]) {
        self.bytes.extend_from_slice(&(fragment.len() as u64).to_ne_bytes());
        self.bytes.extend_from_slice(fragment);
    }
}

/// Compiled `ScopeKeyBuilder`.
#[derive(Debug)]
pub struct ScopeKeyBuilder {
    fragments: Box<[Extractor]>,
}

#[derive(Debug)]
struct Extractor {
    name: HeaderName,
    /// Empty: the value is one element.
    separator: Box<str>,
    part: Part,
}

#[derive(Debug)]
enum Part {
    Index(usize),
    /// The value of the first element `key<separator>value` with this key.
    Value {
        separator: Box<str>,
        key: Box<str>,
    },
}

impl ScopeKeyBuilder {
    /// Compiles the protobuf form.
    pub fn compile(proto: &pb::ScopeKeyBuilder) -> Result<Self, ConfigError> {
        if proto.fragments.is_empty() {
            return Err(ConfigError::field("fragments", "must not be empty"));
        }
        let fragments = proto.fragments.iter().enumerate().map(|(index, fragment)| match &fragment.r#type {
            Some(Type::HeaderValueExtractor(proto)) => {
                Extractor::compile(proto).at(|| "header_value_extractor").at(|| format!("fragments[{index}]"))
            }
            None => Err(ConfigError::field("type", "is required")).at(|| format!("fragments[{index}]")),
        });
        Ok(Self { fragments: fragments.collect::<Result<_, _>>()? })
    }

    /// The key of a request, if every fragment can be taken from it.
    pub fn key(&self, headers: &Headers) -> Option<ScopeKey> {
        let mut key = ScopeKey::default();
        for extractor in &self.fragments {
            key.push(extractor.extract(headers)?);
        }
        Some(key)
    }
}

impl Extractor {
    fn compile(proto: &HeaderValueExtractor) -> Result<Self, ConfigError> {
        let HeaderValueExtractor { name, element_separator, extract_type } = proto;
        let part = match extract_type {
            None => return Err(ConfigError::field("extract_type", "is required")),
            Some(ExtractType::Index(index)) if *index > 0 && element_separator.is_empty() => {
                return Err(ConfigError::field("index", "Index > 0 for empty string element separator."));
            }
            Some(ExtractType::Index(index)) => Part::Index(*index as usize),
            Some(ExtractType::Element(element)) if element.separator.is_empty() || element.key.is_empty() => {
                return Err(ConfigError::field("element", "separator and key must not be empty"));
            }
            Some(ExtractType::Element(element)) => {
                Part::Value { separator: element.separator.as_str().into(), key: element.key.as_str().into() }
            }
        };
        Ok(Self { name: header("name", name)?, separator: element_separator.as_str().into(), part })
    }

    fn extract<'a>(&self, headers: &'a Headers) -> Option<&'a [u8]> {
        let name = match self.name.as_name().known() {
            Some(waystation_http::Known::Host) => waystation_http::Known::Authority.into(),
            _ => self.name.as_name(),
        };
        let value = headers.get(name)?;
        match &self.part {
            Part::Index(index) => elements(value, &self.separator).nth(*index),
            Part::Value { separator, key } => elements(value, &self.separator).find_map(|element| {
                let at = find(element, separator.as_bytes())?;
                (element[..at] == *key.as_bytes()).then(|| &element[at + separator.len()..])
            }),
        }
    }
}

fn elements<'a>(value: &'a [u8], separator: &str) -> impl Iterator<Item = &'a [u8]> {
    let separator = separator.as_bytes().to_vec();
    let mut rest = Some(value);
    std::iter::from_fn(move || {
        let value = rest?;
        match find(value, &separator) {
            Some(at) => {
                rest = Some(&value[at + separator.len()..]);
                Some(&value[..at])
            }
            None => rest.take(),
        }
    })
}

fn find(value: &[u8], separator: &[u8]) -> Option<usize> {
    if separator.is_empty() { None } else { memchr::memmem::find(value, separator) }
}

/// Scopes by key; `T` is what a scope leads to.
#[derive(Debug)]
pub struct ScopedTable<T> {
    scopes: HashMap<ScopeKey, (Box<str>, T)>,
}

impl<T> ScopedTable<T> {
    /// A table of scopes: name, key and what the scope leads to. No two scopes may have the same key.
    pub fn new(scopes: impl IntoIterator<Item = (String, ScopeKey, T)>) -> Result<Self, ConfigError> {
        let mut table = HashMap::new();
        for (name, key, value) in scopes {
            if let Some((other, _)) = table.get(&key) {
                let reason =
                    format!("scope key conflict found, first scope is '{other}', second scope is '{name}'");
                return Err(ConfigError::new(reason));
            }
            table.insert(key, (name.into(), value));
        }
        Ok(Self { scopes: table })
    }

    /// What the scope of `key` leads to.
    pub fn find(&self, key: &ScopeKey) -> Option<&T> {
        self.scopes.get(key).map(|(_, value)| value)
    }

    /// The name of the scope of `key`.
    pub fn name(&self, key: &ScopeKey) -> Option<&str> {
        self.scopes.get(key).map(|(name, _)| &**name)
    }
}

#[cfg(test)]
mod tests {
    use super::{ScopeKey, ScopeKeyBuilder, ScopedTable, pb, scope};
    use envoy_types::pb::envoy::config::route::v3::ScopedRouteConfiguration;
    use header_value_extractor::{ExtractType, KvElement};
    use pb::scope_key_builder::FragmentBuilder;
    use pb::scope_key_builder::fragment_builder::{HeaderValueExtractor, Type, header_value_extractor};
    use waystation_http::Headers;

    fn builder(name: &str, separator: &str, part: ExtractType) -> ScopeKeyBuilder {
        let extractor = HeaderValueExtractor {
            name: name.into(),
            element_separator: separator.into(),
            extract_type: Some(part),
        };
        let fragment = FragmentBuilder { r#type: Some(Type::HeaderValueExtractor(extractor)) };
        ScopeKeyBuilder::compile(&pb::ScopeKeyBuilder { fragments: vec![fragment] }).unwrap()
    }

    fn key(fragments: &[&str]) -> ScopeKey {
        let fragment = |text: &&str| scope::key::Fragment {
            r#type: Some(scope::key::fragment::Type::StringKey((*text).into())),
        };
        let fragments = fragments.iter().map(fragment).collect();
        let proto = ScopedRouteConfiguration { key: Some(scope::Key { fragments }), ..Default::default() };
        ScopeKey::compile(&proto).unwrap()
    }

    #[test]
    fn elements_by_index_and_by_key() {
        let headers: Headers = [(":authority", "a.example"), ("x", "v=1;foo=bar")].into_iter().collect();
        let by_key = ExtractType::Element(KvElement { separator: "=".into(), key: "foo".into() });
        assert_eq!(builder("X", ";", by_key).key(&headers), Some(key(&["bar"])));
        assert_eq!(builder("x", ";", ExtractType::Index(0)).key(&headers), Some(key(&["v=1"])));
        assert_eq!(builder("x", ";", ExtractType::Index(2)).key(&headers), None);
        assert_eq!(builder("host", "", ExtractType::Index(0)).key(&headers), Some(key(&["a.example"])));
        assert_eq!(builder("y", "", ExtractType::Index(0)).key(&headers), None);
    }

    #[test]
    fn keys_are_unique_and_fragments_do_not_run_together() {
        assert_ne!(key(&["a", "bc"]), key(&["ab", "c"]));
        let table =
            ScopedTable::new([("one".into(), key(&["a"]), 1), ("two".into(), key(&["b"]), 2)]).unwrap();
        assert_eq!(table.find(&key(&["b"])), Some(&2));
        let error =
            ScopedTable::new([("one".into(), key(&["a"]), 1), ("two".into(), key(&["a"]), 2)]).unwrap_err();
        assert!(error.to_string().contains("one"), "{error}");
    }
}
