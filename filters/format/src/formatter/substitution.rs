//! `SubstitutionFormatString`: text or JSON with command operators.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::core::v3::substitution_format_string::Format;
use envoy_types::pb::google::protobuf as wkt;
use waystation_filter_api::data_source;
use waystation_filter_api::wire::type_name;
use waystation_schema::{At, ConfigError};

use super::operator::{Operator, Written};
use super::{Extensions, FormatContext, Formatter, Segment, json};

/// Compiled `envoy.config.core.v3.SubstitutionFormatString`.
#[derive(Clone, Debug)]
pub struct SubstitutionFormat {
    body: Body,
    content_type: Box<str>,
}

#[derive(Clone, Debug)]
enum Body {
    Text(Formatter),
    Json { root: Node, omit_empty: bool },
}

/// A place in a JSON format.
#[derive(Clone, Debug)]
enum Node {
    /// JSON text.
    Constant(Box<str>),
    /// A value that keeps its type.
    Operator(Operator),
    /// A string with operators in it; the literals are escaped already.
    Template(Formatter),
    List(Box<[Node]>),
    /// Entries in the order of their keys; a key is JSON text with its colon.
    Object(Box<[(Box<str>, Node)]>),
}

impl SubstitutionFormat {
    /// Compiles the protobuf form.
    pub fn compile(proto: &core::SubstitutionFormatString) -> Result<Self, ConfigError> {
        let core::SubstitutionFormatString {
            format,
            omit_empty_values,
            content_type,
            formatters,
            // Its one option sorts the properties, which are always sorted.
            json_format_options: _,
        } = proto;
        let extensions = compile_extensions(formatters)?;
        let missing = if *omit_empty_values { "" } else { "-" };
        #[expect(deprecated, reason = "configurations still use text_format")]
        let body = match format {
            None => return Err(ConfigError::field("format", "is required")),
            Some(Format::TextFormat(text)) => {
                Body::Text(Formatter::compile_with(text, extensions, missing).at(|| "text_format")?)
            }
            Some(Format::TextFormatSource(source)) => {
                let text = read_source(source).at(|| "text_format_source")?;
                Body::Text(Formatter::compile_with(&text, extensions, missing).at(|| "text_format_source")?)
            }
            Some(Format::JsonFormat(object)) => Body::Json {
                root: Node::compile_object(object, extensions, missing).at(|| "json_format")?,
                omit_empty: *omit_empty_values,
            },
        };
        let default_type = match body {
            Body::Text(_) => "text/plain",
            Body::Json { .. } => "application/json",
        };
        if !waystation_http::is_valid_value(content_type.as_bytes()) {
            return Err(ConfigError::field("content_type", "must not hold NUL, CR or LF"));
        }
        let content_type = if content_type.is_empty() { default_type } else { content_type };
        Ok(Self { body, content_type: content_type.into() })
    }

    /// Text with a format of its own or Envoy's default line.
    pub(crate) fn text(formatter: Formatter) -> Self {
        Self { body: Body::Text(formatter), content_type: "text/plain".into() }
    }

    /// JSON by the fields of `object`.
    pub(crate) fn json(object: &wkt::Struct) -> Result<Self, ConfigError> {
        let root = Node::compile_object(object, Extensions::default(), "-")?;
        Ok(Self { body: Body::Json { root, omit_empty: false }, content_type: "application/json".into() })
    }

    /// The `content-type` of the text, set or by its kind.
    pub fn content_type(&self) -> &str {
        &self.content_type
    }

    /// Appends the text for `cx`; JSON ends with a newline.
    pub fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        match &self.body {
            Body::Text(formatter) => formatter.write(cx, out),
            Body::Json { root, omit_empty } => {
                if !root.write(cx, *omit_empty, out) {
                    out.extend_from_slice(b"{}");
                }
                out.push(b'\n');
            }
        }
    }
}

impl Node {
    fn compile(
        value: &wkt::Value,
        extensions: Extensions,
        missing: &'static str,
    ) -> Result<Self, ConfigError> {
        use wkt::value::Kind;
        let constant = |put: &dyn Fn(&mut Vec<u8>)| {
            let mut text = Vec::new();
            put(&mut text);
            Self::Constant(String::from_utf8_lossy(&text).into())
        };
        Ok(match &value.kind {
            Some(Kind::StringValue(text)) => {
                let mut formatter = Formatter::compile_with(text, extensions, missing)?;
                if let Some(text) = formatter.literal() {
                    return Ok(constant(&|out| json::put_string(out, text.as_bytes())));
                }
                if let Some(operator) = formatter.single_operator() {
                    return Ok(Self::Operator(operator.clone()));
                }
                for segment in &mut formatter.segments {
                    if let Segment::Literal(text) = segment {
                        let mut escaped = Vec::new();
                        json::put_escaped(&mut escaped, text.as_bytes());
                        *text = String::from_utf8_lossy(&escaped).into();
                    }
                }
                Self::Template(formatter)
            }
            Some(Kind::StructValue(object)) => Self::compile_object(object, extensions, missing)?,
            Some(Kind::ListValue(list)) => Self::List(
                list.values
                    .iter()
                    .enumerate()
                    .map(|(i, value)| Self::compile(value, extensions, missing).at(|| format!("[{i}]")))
                    .collect::<Result<_, _>>()?,
            ),
            _ => constant(&|out| {
                json::put_value(out, &waystation_filter_api::value::Value::from_proto(value));
            }),
        })
    }

    fn compile_object(
        object: &wkt::Struct,
        extensions: Extensions,
        missing: &'static str,
    ) -> Result<Self, ConfigError> {
        let mut fields: Vec<_> = object.fields.iter().collect();
        fields.sort_by_key(|(key, _)| *key);
        let compile = |(key, value): (&String, _)| {
            let mut text = Vec::new();
            json::put_string(&mut text, key.as_bytes());
            text.push(b':');
            let node = Self::compile(value, extensions, missing).at(|| format!("[{key}]"))?;
            Ok((String::from_utf8_lossy(&text).into(), node))
        };
        Ok(Self::Object(fields.into_iter().map(compile).collect::<Result<_, ConfigError>>()?))
    }

    /// Appends the value. With `omit_empty`, nothing for null and for an object without entries: then `false`.
    fn write(&self, cx: &FormatContext<'_>, omit_empty: bool, out: &mut Vec<u8>) -> bool {
        match self {
            Self::Constant(text) if omit_empty && &**text == "null" => return false,
            Self::Constant(text) => out.extend_from_slice(text.as_bytes()),
            Self::Operator(operator) => {
                let start = out.len();
                match operator.write_typed(cx, out) {
                    None if omit_empty => return false,
                    None => out.extend_from_slice(b"null"),
                    Some(Written::Json) => {}
                    Some(Written::Text) => quote_from(out, start),
                }
            }
            Self::Template(formatter) => {
                out.push(b'"');
                for segment in &formatter.segments {
                    match segment {
                        Segment::Literal(text) => out.extend_from_slice(text.as_bytes()),
                        Segment::Operator(operator) => {
                            let start = out.len();
                            if operator.write(cx, out).is_none() {
                                out.extend_from_slice(formatter.missing.as_bytes());
                            }
                            json::escape_from(out, start);
                        }
                    }
                }
                out.push(b'"');
            }
            Self::List(items) => {
                out.push(b'[');
                write_separated(items.iter(), out, |item, out| item.write(cx, omit_empty, out));
                out.push(b']');
            }
            Self::Object(fields) => {
                let start = out.len();
                out.push(b'{');
                let written = write_separated(fields.iter(), out, |(key, value), out| {
                    out.extend_from_slice(key.as_bytes());
                    value.write(cx, omit_empty, out)
                });
                if omit_empty && !written {
                    out.truncate(start);
                    return false;
                }
                out.push(b'}');
            }
        }
        true
    }
}

/// Writes items with commas between those that `write` does not refuse; tells whether there was one.
fn write_separated<T>(
    items: impl Iterator<Item = T>,
    out: &mut Vec<u8>,
    write: impl Fn(T, &mut Vec<u8>) -> bool,
) -> bool {
    let mut any = false;
    for item in items {
        let start = out.len();
        if any {
            out.push(b',');
        }
        if write(item, out) {
            any = true;
        } else {
            out.truncate(start);
        }
    }
    any
}

/// Makes what was appended since `start` a JSON string.
fn quote_from(out: &mut Vec<u8>, start: usize) {
    json::escape_from(out, start);
    out.insert(start, b'"');
    out.push(b'"');
}

/// The text of a data source, read once, as Envoy does.
fn read_source(source: &core::DataSource) -> Result<String, ConfigError> {
    if source.watched_directory.is_some() {
        return Err(ConfigError::field("watched_directory", "not supported: a format is read once"));
    }
    let Some(data) = data_source::read(Some(source))? else {
        return Err(ConfigError::field("specifier", "is required"));
    };
    use core::data_source::Specifier;
    let field = match source.specifier {
        Some(Specifier::Filename(_)) => "filename",
        Some(Specifier::EnvironmentVariable(_)) => "environment_variable",
        _ => "inline_bytes",
    };
    String::from_utf8(data.bytes).map_err(|_| ConfigError::field(field, "is not UTF-8"))
}

fn compile_extensions(formatters: &[core::TypedExtensionConfig]) -> Result<Extensions, ConfigError> {
    let mut extensions = Extensions::default();
    for (index, formatter) in formatters.iter().enumerate() {
        let core::TypedExtensionConfig { name: _, typed_config } = formatter;
        match typed_config.as_ref().map_or("", type_name) {
            "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery" => {
                extensions.req_without_query = true;
            }
            // `%METADATA%` is built in as well.
            "envoy.extensions.formatter.metadata.v3.Metadata" => {}
            name => {
                return Err(ConfigError::field("typed_config", format!("not supported: formatter {name}"))
                    .at(format!("formatters[{index}]")));
            }
        }
    }
    Ok(extensions)
}
