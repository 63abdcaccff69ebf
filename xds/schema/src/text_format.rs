//! The protobuf text format (`.pb_text` files) to wire bytes.
//!
//! <https://protobuf.dev/reference/protobuf/textformat-spec/>: fields by name, `{}` or `<>` around messages, lists in
//! `[]` or by repetition, adjacent strings join, `[type.googleapis.com/x.Y] {...}` as the content of an `Any`.

mod lexer;

use std::collections::HashSet;

use crate::document::{Position, TextError};
use crate::message::{Field, Kind, Message, Type};
use crate::wire::{DEPTH_LIMIT, put_bytes, put_delimited, put_nested, put_tag, put_varint, zigzag};
use lexer::{Lexer, Token, TokenKind};

/// Reads a whole text as `message`.
pub(crate) fn encode(message: Message, text: &str) -> Result<Vec<u8>, TextError> {
    let mut parser = Parser { lexer: Lexer::new(text)? };
    let mut out = Vec::new();
    parser.fields(message, None, &mut out, 0)?;
    Ok(out)
}

struct Parser<'t> {
    lexer: Lexer<'t>,
}

impl<'t> Parser<'t> {
    /// Fields up to `close`, or to the end of the text.
    fn fields(
        &mut self,
        message: Message,
        close: Option<char>,
        out: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), TextError> {
        if depth > DEPTH_LIMIT {
            return Err(TextError::new(self.lexer.peek().position, "messages are nested too deeply"));
        }
        let mut set = HashSet::new();
        let mut oneofs: Vec<Option<Field>> = vec![None; message.oneof_count()];
        let mut expanded = false;
        loop {
            let token = self.lexer.next()?;
            match (token.kind, close) {
                (TokenKind::End, None) => return Ok(()),
                (TokenKind::Symbol(found), Some(close)) if found == close => return Ok(()),
                (TokenKind::Symbol('['), _) if message.kind() == Kind::Any => {
                    if expanded || !set.is_empty() {
                        return Err(TextError::new(token.position, "the Any has a content already"));
                    }
                    expanded = true;
                    self.any_content(out, depth)?;
                }
                (TokenKind::Word(name), _) => {
                    let Some(field) = message.field_by_name(name).filter(|field| field.name() == name) else {
                        let reason = format!("{} has no such field", message.full_name());
                        return Err(TextError::new(token.position, reason).at(name));
                    };
                    let twice = !set.insert(field) && !field.is_repeated();
                    if twice || (expanded && message.kind() == Kind::Any) {
                        return Err(TextError::new(token.position, "the field is set twice").at(name));
                    }
                    if let Some(oneof) = field.oneof()
                        && let Some(other) = oneofs[oneof].replace(field)
                    {
                        let group = message.oneof_name(oneof);
                        let reason =
                            format!("`{}` is set too, and only one of `{group}` can be", other.name());
                        return Err(TextError::new(token.position, reason).at(name));
                    }
                    self.field(field, out, depth).map_err(|error| error.at(name))?;
                }
                _ => return Err(token.unexpected("a field name")),
            }
            self.lexer.skip_separator()?;
        }
    }

    fn field(&mut self, field: Field, out: &mut Vec<u8>, depth: usize) -> Result<(), TextError> {
        let colon = self.lexer.take_symbol(':')?;
        if field.is_repeated() && self.lexer.peek().kind == TokenKind::Symbol('[') {
            self.lexer.next()?;
            if self.lexer.take_symbol(']')? {
                return Ok(());
            }
            loop {
                self.value(field, true, out, depth)?;
                if self.lexer.take_symbol(']')? {
                    return Ok(());
                }
                if !self.lexer.take_symbol(',')? {
                    return Err(self.lexer.peek().unexpected("`,` or `]`"));
                }
            }
        }
        self.value(field, colon, out, depth)
    }

    /// One value with its tag.
    fn value(&mut self, field: Field, colon: bool, out: &mut Vec<u8>, depth: usize) -> Result<(), TextError> {
        if let Some(message) = field.message() {
            let token = self.lexer.next()?;
            let close = match token.kind {
                TokenKind::Symbol('{') => '}',
                TokenKind::Symbol('<') => '>',
                _ => return Err(token.unexpected("`{`")),
            };
            return put_nested(out, field.number(), |out| self.fields(message, Some(close), out, depth + 1));
        }
        if !colon {
            return Err(self.lexer.peek().unexpected("`:`"));
        }
        self.scalar(field, out)
    }

    fn scalar(&mut self, field: Field, out: &mut Vec<u8>) -> Result<(), TextError> {
        let number = field.number();
        match field.ty() {
            Type::String => {
                let (position, bytes) = self.lexer.string()?;
                let text = String::from_utf8(bytes)
                    .map_err(|_| TextError::new(position, "the string is not UTF-8"))?;
                put_bytes(out, number, text.as_bytes());
            }
            Type::Bytes => {
                let (_, bytes) = self.lexer.string()?;
                put_bytes(out, number, &bytes);
            }
            Type::Bool => {
                let token = self.lexer.next()?;
                let value = match token.kind {
                    TokenKind::Word("true" | "True" | "t") | TokenKind::Number("1") => true,
                    TokenKind::Word("false" | "False" | "f") | TokenKind::Number("0") => false,
                    _ => return Err(token.unexpected("true or false")),
                };
                put_tag(out, number, 0);
                out.push(u8::from(value));
            }
            Type::Enum => {
                let item = field.enumeration().expect("the type is an enum");
                let position = self.lexer.peek().position;
                let value = if let TokenKind::Word(name) = self.lexer.peek().kind {
                    self.lexer.next()?;
                    item.value_by_name(name).map(|value| value.number()).ok_or_else(|| {
                        TextError::new(position, format!("{} has no value {name}", item.full_name()))
                    })?
                } else {
                    let (_, value) = self.integer(i128::from(i32::MIN), i128::from(i32::MAX))?;
                    value as i32
                };
                put_tag(out, number, 0);
                put_varint(out, i64::from(value) as u64);
            }
            Type::Double => {
                let value = self.float()?;
                put_tag(out, number, 1);
                out.extend(value.to_le_bytes());
            }
            Type::Float => {
                let value = self.float()? as f32;
                put_tag(out, number, 5);
                out.extend(value.to_le_bytes());
            }
            Type::Fixed32 | Type::Sfixed32 => {
                let value = self.sized(field.ty())?;
                put_tag(out, number, 5);
                out.extend((value as u32).to_le_bytes());
            }
            Type::Fixed64 | Type::Sfixed64 => {
                let value = self.sized(field.ty())?;
                put_tag(out, number, 1);
                out.extend((value as u64).to_le_bytes());
            }
            Type::Sint32 | Type::Sint64 => {
                let value = self.sized(field.ty())?;
                put_tag(out, number, 0);
                put_varint(out, zigzag(value as i64));
            }
            ty => {
                let value = self.sized(ty)?;
                put_tag(out, number, 0);
                put_varint(out, value as i64 as u64);
            }
        }
        Ok(())
    }

    fn sized(&mut self, ty: Type) -> Result<i128, TextError> {
        let (low, high) = match ty {
            Type::Int32 | Type::Sint32 | Type::Sfixed32 => (i128::from(i32::MIN), i128::from(i32::MAX)),
            Type::Uint32 | Type::Fixed32 => (0, i128::from(u32::MAX)),
            Type::Uint64 | Type::Fixed64 => (0, i128::from(u64::MAX)),
            _ => (i128::from(i64::MIN), i128::from(i64::MAX)),
        };
        self.integer(low, high).map(|(_, value)| value)
    }

    fn integer(&mut self, low: i128, high: i128) -> Result<(Position, i128), TextError> {
        let negative = self.lexer.take_symbol('-')?;
        let token = self.lexer.next()?;
        let TokenKind::Number(text) = token.kind else { return Err(token.unexpected("an integer")) };
        let magnitude = if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            u64::from_str_radix(digits, 16)
        } else if text.len() > 1 && text.starts_with('0') {
            u64::from_str_radix(&text[1..], 8)
        } else {
            text.parse()
        };
        let magnitude = magnitude.map_err(|_| token.unexpected("an integer"))?;
        let value = if negative { -i128::from(magnitude) } else { i128::from(magnitude) };
        if (low..=high).contains(&value) {
            Ok((token.position, value))
        } else {
            Err(TextError::new(token.position, format!("{value} is out of range ({low} to {high})")))
        }
    }

    fn float(&mut self) -> Result<f64, TextError> {
        let negative = self.lexer.take_symbol('-')?;
        let token = self.lexer.next()?;
        let value = match token.kind {
            TokenKind::Number(text) => text
                .strip_suffix(['f', 'F'])
                .filter(|_| !text.starts_with("0x"))
                .unwrap_or(text)
                .parse()
                .map_err(|_| token.unexpected("a number"))?,
            TokenKind::Word(word)
                if ["inf", "infinity"].iter().any(|name| word.eq_ignore_ascii_case(name)) =>
            {
                f64::INFINITY
            }
            TokenKind::Word(word) if word.eq_ignore_ascii_case("nan") => f64::NAN,
            _ => return Err(token.unexpected("a number")),
        };
        Ok(if negative { -value } else { value })
    }

    /// `type.googleapis.com/x.Y] {...}`, the bracket taken already.
    fn any_content(&mut self, out: &mut Vec<u8>, depth: usize) -> Result<(), TextError> {
        let position = self.lexer.peek().position;
        let url = self.lexer.type_url()?;
        let message = Message::find_by_url(&url)
            .ok_or_else(|| TextError::new(position, format!("unknown type {url:?}")))?;
        self.lexer.take_symbol(':')?;
        let token = self.lexer.next()?;
        let close = match token.kind {
            TokenKind::Symbol('{') => '}',
            TokenKind::Symbol('<') => '>',
            _ => return Err(token.unexpected("`{`")),
        };
        put_bytes(out, 1, url.as_bytes());
        put_tag(out, 2, 2);
        put_delimited(out, |out| self.fields(message, Some(close), out, depth + 1))
            .map_err(|error: TextError| error.at(format!("[{url}]")))
    }
}

impl Token<'_> {
    fn unexpected(&self, wanted: &str) -> TextError {
        let found = match self.kind {
            TokenKind::Word(text) | TokenKind::Number(text) => format!("`{text}`"),
            TokenKind::String => "a string".to_owned(),
            TokenKind::Symbol(symbol) => format!("`{symbol}`"),
            TokenKind::End => "the end of the text".to_owned(),
        };
        TextError::new(self.position, format!("expected {wanted}, found {found}"))
    }
}

#[cfg(test)]
mod tests {
    use super::encode;
    use crate::message::Message;
    use crate::{JsonStyle, wire_to_json};

    fn json(message: &str, text: &str) -> String {
        let message = Message::find(message).expect("the test names a type");
        let wire = encode(message, text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let mut out = String::new();
        wire_to_json(message, &wire, &mut out, JsonStyle::default()).expect("a String takes it");
        out
    }

    #[test]
    fn a_cluster_reads() {
        let text = r#"
            # A comment.
            name: "a" 'b' "\x63\144\n"  # parts join
            type: STRICT_DNS
            connect_timeout { seconds: 0x1 nanos: 500000000 };
            load_assignment: <
              cluster_name: "c",
              endpoints: [{ priority: 1 }, { priority: 02 }]
            >
            dns_lookup_family: 1
            lb_subset_config { list_as_any: true }
            metadata { filter_metadata { key: "k" value { fields { key: "n" value { number_value: -1.5f } } } } }
            typed_extension_protocol_options {
              key: "x"
              value { [type.googleapis.com/envoy.config.core.v3.Locality] { zone: "z" } }
            }
            common_lb_config { healthy_panic_threshold { value: inf } }
        "#;
        assert_eq!(
            json("envoy.config.cluster.v3.Cluster", text),
            concat!(
                r#"{"name":"abcd\n","type":"STRICT_DNS","connectTimeout":"1.500s","dnsLookupFamily":"V4_ONLY","#,
                r#""lbSubsetConfig":{"listAsAny":true},"metadata":{"filterMetadata":{"k":{"n":-1.5}}},"#,
                r#""commonLbConfig":{"healthyPanicThreshold":{"value":"Infinity"}},"#,
                r#""loadAssignment":{"clusterName":"c","endpoints":[{"priority":1},{"priority":2}]},"#,
                r#""typedExtensionProtocolOptions":{"x":{"@type":"type.googleapis.com/"#,
                r#"envoy.config.core.v3.Locality","zone":"z"}}}"#
            )
        );
    }

    #[test]
    fn faults_have_their_place() {
        let cases = [
            ("nam: \"a\"", "1:1 nam: envoy.config.cluster.v3.Cluster has no such field"),
            ("connectTimeout {}", "1:1 connectTimeout: envoy.config.cluster.v3.Cluster has no such field"),
            ("name: \"a\"\nname: \"b\"", "2:1 name: the field is set twice"),
            ("name: a", "1:7 name: expected a string, found `a`"),
            ("name \"a\"", "1:6 name: expected `:`, found a string"),
            ("name: \"a", "1:7 name: the string is not closed"),
            ("type: NO", "1:7 type: envoy.config.cluster.v3.Cluster.DiscoveryType has no value NO"),
            (
                "connect_timeout { seconds: 1.5 }",
                "1:28 connect_timeout.seconds: expected an integer, found `1.5`",
            ),
            ("connect_timeout {", "1:18 connect_timeout: expected a field name, found the end of the text"),
            (
                "type: EDS cluster_type {}",
                "1:11 cluster_type: `type` is set too, and only one of `cluster_discovery_type` can be",
            ),
            ("name: \"\\q\"", "1:7 name: an unknown escape in a string"),
            ("$", "1:1 unexpected character '$'"),
        ];
        let message = Message::find("envoy.config.cluster.v3.Cluster").expect("it exists");
        for (text, expected) in cases {
            let error = encode(message, text).unwrap_err();
            let found = format!("{}:{} {}", error.line(), error.column(), error.config_error());
            assert_eq!(found, expected, "for {text:?}");
        }
        let deep = "metadata { filter_metadata { value { fields { value { struct_value {".to_owned()
            + &"fields { value { struct_value {".repeat(2000);
        assert!(encode(message, &deep).unwrap_err().to_string().contains("too deeply"));
    }
}
