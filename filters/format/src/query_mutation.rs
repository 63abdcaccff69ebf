//! Query parameters to add, overwrite and remove.

use std::borrow::Cow;
use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::value::Kind;
use waystation_http::{Headers, Known};
use waystation_matchers::query_parameters;
use waystation_schema::{At, ConfigError};

use crate::formatter::{FormatContext, Formatter, decoded_if};

/// A compiled list of `envoy.config.core.v3.KeyValueMutation` for the query of a request, done one after the other.
#[derive(Clone, Debug, Default)]
pub struct QueryMutationList(Box<[Mutation]>);

#[derive(Clone, Debug)]
enum Mutation {
    Remove(Box<[u8]>),
    Add { key: Box<[u8]>, value: Formatter, action: core::key_value_append::KeyValueAppendAction },
}

impl QueryMutationList {
    /// Compiles the list; errors name the element (`[2].append.record.value`).
    pub fn compile(protos: &[core::KeyValueMutation]) -> Result<Self, ConfigError> {
        let mutation = |(index, proto)| Mutation::compile(proto).at(|| format!("[{index}]"));
        Ok(Self(protos.iter().enumerate().map(mutation).collect::<Result<_, _>>()?))
    }

    /// Rewrites the query of the request's path, its parameters in the order of their names as Envoy leaves them.
    pub fn apply(&self, request: &mut Headers, cx: &FormatContext<'_>) {
        if self.0.is_empty() {
            return;
        }
        let Some(path) = request.path() else { return };
        let mut parameters: BTreeMap<Cow<'_, [u8]>, Vec<Cow<'_, [u8]>>> = BTreeMap::new();
        // Nothing stands behind the last `&`.
        let text = path.strip_suffix(b"&").unwrap_or(path);
        for (key, value) in query_parameters(text).filter(|_| !text.ends_with(b"?")) {
            parameters.entry(plain(key)).or_default().push(plain(value));
        }
        let cx = FormatContext { request: Some(request), ..*cx };
        for mutation in &self.0 {
            mutation.apply(&mut parameters, &cx);
        }
        let end = path.iter().position(|byte| *byte == b'?').unwrap_or(path.len());
        let mut target = path[..end].to_vec();
        let mut delimiter = b'?';
        for (key, values) in &parameters {
            for value in values {
                target.push(std::mem::replace(&mut delimiter, b'&'));
                target.extend_from_slice(key);
                target.push(b'=');
                target.extend_from_slice(value);
            }
        }
        request.set(Known::Path, target);
    }
}

impl Mutation {
    fn compile(proto: &core::KeyValueMutation) -> Result<Self, ConfigError> {
        let core::KeyValueMutation { append, remove } = proto;
        let append = match (append, remove.as_bytes()) {
            (None, []) => return Err(ConfigError::new("One of 'append'/'remove' must be specified.")),
            (None, key) => return Ok(Self::Remove(key.into())),
            (Some(append), []) => append,
            (Some(_), _) => return Err(ConfigError::new("Only one of 'append'/'remove' can be specified.")),
        };
        let record = append.record.as_ref();
        let record = record.ok_or_else(|| ConfigError::new("No record specified for append mutation."))?;
        let Some(Kind::StringValue(value)) = record.value.as_ref().and_then(|value| value.kind.as_ref())
        else {
            return Err(ConfigError::new("Only string value is allowed for record value."));
        };
        let value = Formatter::compile_omitting_empty(value);
        Ok(Self::Add {
            key: record.key.as_bytes().into(),
            value: value.at(|| "value").at(|| "record").at(|| "append")?,
            action: append.action(),
        })
    }

    fn apply<'a>(
        &'a self,
        parameters: &mut BTreeMap<Cow<'a, [u8]>, Vec<Cow<'a, [u8]>>>,
        cx: &FormatContext<'_>,
    ) {
        use core::key_value_append::KeyValueAppendAction as Action;
        let (key, value, action) = match self {
            Self::Remove(key) => {
                parameters.remove(&**key);
                return;
            }
            Self::Add { key, value, action } => (key, value, action),
        };
        let there = parameters.get_mut(&**key);
        if matches!((action, &there), (Action::AddIfAbsent, Some(_)) | (Action::OverwriteIfExists, None)) {
            return;
        }
        let mut formatted = Vec::new();
        value.write(cx, &mut formatted);
        let value = Cow::Owned(escape(&formatted));
        match there {
            Some(values) => {
                if *action != Action::AppendIfExistsOrAdd {
                    values.clear();
                }
                values.push(value);
            }
            None => {
                parameters.insert(Cow::Borrowed(key), vec![value]);
            }
        }
    }
}

/// A name or value without the escapes that it does not need. Envoy drops them all, which lets a client's `%26` begin
/// another parameter.
fn plain(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.contains(&b'%') {
        return Cow::Borrowed(text);
    }
    let harmless = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'&' | b'=' | b'#' | b'%' | b'+');
    decoded_if(text, harmless).collect()
}

/// Escapes what Envoy does: all but letters, digits, `-`, `.` and `_`.
fn escape(text: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(text.len());
    for byte in text {
        match byte {
            b'-' | b'.' | b'_' => escaped.push(*byte),
            _ if byte.is_ascii_alphanumeric() => escaped.push(*byte),
            _ => escaped.extend_from_slice(format!("%{byte:02X}").as_bytes()),
        }
    }
    escaped
}
