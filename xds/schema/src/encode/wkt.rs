//! The well-known types, each with a JSON form of its own.

use std::collections::HashSet;

use super::Encoder;
use super::time::{parse_duration, parse_timestamp};
use crate::document::{NodeKind, TextError};
use crate::message::{Kind, Message};
use crate::wire::{DEPTH_LIMIT, put_bytes, put_nested, put_tag, put_varint};

impl Encoder<'_> {
    /// `{"@type": URL, fields...}`, or with `value` for a type whose JSON is not an object of its fields.
    pub(super) fn any(&mut self, node: usize, out: &mut Vec<u8>, depth: usize) -> Result<(), TextError> {
        let document = self.document;
        if document.kind(node) != NodeKind::Object {
            return Err(self.expected(node, "an object with @type"));
        }
        let mut url = None;
        for (key, value) in document.members(node) {
            if document.text(key) == "@type" {
                if url.is_some() {
                    return Err(document.error(key, "the field is set twice").at("@type"));
                }
                url = Some((value, self.text(value, "a type URL").map_err(|error| error.at("@type"))?));
            }
        }
        let Some((url_node, url)) = url else {
            if document.count(node) == 0 {
                return Ok(());
            }
            return Err(document.error(node, "an Any needs @type"));
        };
        let message = Message::find_by_url(url)
            .ok_or_else(|| document.error(url_node, format!("unknown type {url:?}")).at("@type"))?;
        put_bytes(out, 1, url.as_bytes());
        let start = out.len();
        put_nested(out, 2, |out| {
            if self.is_empty_with_value(message, node) {
                return Ok(());
            }
            if matches!(message.kind(), Kind::Plain | Kind::TypedStruct) {
                return self.object(message, node, out, depth + 1, true);
            }
            let mut found = false;
            for (key, value) in document.members(node) {
                match document.text(key) {
                    "@type" => {}
                    "value" if found => {
                        return Err(document.error(key, "the field is set twice").at("value"));
                    }
                    "value" => {
                        found = true;
                        let unset = document.kind(value) == NodeKind::Null && message.kind() != Kind::Value;
                        if !unset {
                            self.message(message, value, out, depth + 1)
                                .map_err(|error| error.at("value"))?;
                        }
                    }
                    other => {
                        let reason = format!("in an Any, {} has only `value`", message.full_name());
                        return Err(document.error(key, reason).at(other));
                    }
                }
            }
            Ok(())
        })?;
        // An empty content is left out, as every encoder of `Any` does.
        if out.len() == start + 2 {
            out.truncate(start);
        }
        Ok(())
    }

    /// `{"@type": ".../google.protobuf.Empty", "value": {}}`, as Go writes it.
    fn is_empty_with_value(&self, message: Message, node: usize) -> bool {
        let document = self.document;
        message.full_name() == "google.protobuf.Empty"
            && document.members(node).all(|(key, value)| match document.text(key) {
                "@type" => true,
                "value" => document.kind(value) == NodeKind::Object && document.count(value) == 0,
                _ => false,
            })
    }

    pub(super) fn duration(&mut self, node: usize, out: &mut Vec<u8>) -> Result<(), TextError> {
        let text = self.text(node, "a duration in quotes")?;
        let (seconds, nanos) = parse_duration(text).map_err(|reason| self.document.error(node, reason))?;
        put_time(out, seconds, nanos);
        Ok(())
    }

    pub(super) fn timestamp(&mut self, node: usize, out: &mut Vec<u8>) -> Result<(), TextError> {
        let text = self.text(node, "a time in quotes")?;
        let (seconds, nanos) = parse_timestamp(text).map_err(|reason| self.document.error(node, reason))?;
        put_time(out, seconds, nanos);
        Ok(())
    }

    pub(super) fn structure(
        &mut self,
        node: usize,
        out: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), TextError> {
        let document = self.document;
        self.check_depth(node, depth)?;
        if document.kind(node) != NodeKind::Object {
            return Err(self.expected(node, "an object"));
        }
        let mut keys = HashSet::with_capacity(document.count(node));
        for (key, value) in document.members(node) {
            let name = document.text(key);
            if !keys.insert(name) {
                return Err(document.error(key, "the key stands here twice").at(name));
            }
            put_nested(out, 1, |out| {
                put_bytes(out, 1, name.as_bytes());
                put_nested(out, 2, |out| self.value(value, out, depth + 2))
            })
            .map_err(|error| error.at(name))?;
        }
        Ok(())
    }

    pub(super) fn value(&mut self, node: usize, out: &mut Vec<u8>, depth: usize) -> Result<(), TextError> {
        let document = self.document;
        match document.kind(node) {
            NodeKind::Null => {
                put_tag(out, 1, 0);
                out.push(0);
            }
            kind @ (NodeKind::True | NodeKind::False) => {
                put_tag(out, 4, 0);
                out.push(u8::from(kind == NodeKind::True));
            }
            NodeKind::Number => {
                let number: f64 = document
                    .text(node)
                    .parse()
                    .ok()
                    .filter(|number: &f64| number.is_finite())
                    .ok_or_else(|| document.error(node, "the number is out of the range of a double"))?;
                put_tag(out, 2, 1);
                out.extend(number.to_le_bytes());
            }
            NodeKind::String => put_bytes(out, 3, document.text(node).as_bytes()),
            NodeKind::Object => put_nested(out, 5, |out| self.structure(node, out, depth + 1))?,
            NodeKind::Array => put_nested(out, 6, |out| self.list_value(node, out, depth + 1))?,
        }
        Ok(())
    }

    pub(super) fn list_value(
        &mut self,
        node: usize,
        out: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), TextError> {
        self.check_depth(node, depth)?;
        if self.document.kind(node) != NodeKind::Array {
            return Err(self.expected(node, "a list"));
        }
        for (index, element) in self.document.elements(node).enumerate() {
            put_nested(out, 1, |out| self.value(element, out, depth + 1))
                .map_err(|error| error.at(format!("[{index}]")))?;
        }
        Ok(())
    }

    /// `a.bC,d` for the paths `a.b_c` and `d`.
    pub(super) fn field_mask(&mut self, node: usize, out: &mut Vec<u8>) -> Result<(), TextError> {
        let text = self.text(node, "field paths in quotes")?;
        for path in text.split(',').filter(|_| !text.is_empty()) {
            if path.is_empty() || path.contains('_') {
                return Err(self.document.error(node, "expected camelCase field paths separated by commas"));
            }
            let mut snake = String::with_capacity(path.len() + 4);
            for character in path.chars() {
                if character.is_ascii_uppercase() {
                    snake.push('_');
                }
                snake.push(character.to_ascii_lowercase());
            }
            put_bytes(out, 1, snake.as_bytes());
        }
        Ok(())
    }

    /// A wrapper is its value; Envoy's parser also takes `{"value": ...}`.
    pub(super) fn wrapper(
        &mut self,
        message: Message,
        node: usize,
        out: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), TextError> {
        if self.document.kind(node) == NodeKind::Object {
            return self.object(message, node, out, depth, false);
        }
        self.single(message.field_at(0), node, out, depth, false)
    }

    fn check_depth(&self, node: usize, depth: usize) -> Result<(), TextError> {
        if depth > DEPTH_LIMIT {
            return Err(self.document.error(node, "messages are nested too deeply"));
        }
        Ok(())
    }
}

fn put_time(out: &mut Vec<u8>, seconds: i64, nanos: i32) {
    if seconds != 0 {
        put_tag(out, 1, 0);
        put_varint(out, seconds as u64);
    }
    if nanos != 0 {
        put_tag(out, 2, 0);
        put_varint(out, i64::from(nanos) as u64);
    }
}
