//! A parsed document to wire bytes: proto3 JSON as Envoy takes it.
//!
//! Beyond the specification, as Envoy's parser in its legacy mode: enum names in any case, numbers and booleans in
//! quotes, a wrapper as an object with `value`, an empty object for an `Any`, nulls in lists (left out). Stricter
//! than Envoy: a key given twice is an error.

mod scalar;
mod time;
mod wkt;

use std::collections::HashSet;

use crate::document::{Document, NodeKind, TextError};
use crate::message::{Field, Kind, Message, Type};
use crate::wire::{DEPTH_LIMIT, put_bytes, put_delimited, put_nested, put_tag};

pub(crate) use time::{format_duration, format_timestamp};

/// Options of the way from text to wire bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TextOptions {
    /// Leave out fields that the message does not have, and report their paths, instead of failing.
    pub allow_unknown: bool,
}

/// Wire bytes made from a text.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Encoded {
    /// The message on the wire.
    pub wire: Vec<u8>,
    /// With [`TextOptions::allow_unknown`]: each unknown field with its path and place.
    pub unknown: Vec<String>,
}

/// Encodes the root of a document as `message`.
pub(crate) fn encode(
    message: Message,
    document: &Document<'_>,
    options: TextOptions,
) -> Result<Encoded, TextError> {
    let mut encoder = Encoder { document, options, unknown: Vec::new() };
    let mut wire = Vec::new();
    encoder.message(message, 0, &mut wire, 0)?;
    Ok(Encoded { wire, unknown: encoder.unknown.into_iter().map(|error| error.to_string()).collect() })
}

struct Encoder<'d> {
    document: &'d Document<'d>,
    options: TextOptions,
    unknown: Vec<TextError>,
}

/// Fields and oneofs that an object has set.
#[derive(Default)]
struct Seen {
    fields: [u64; 4],
    /// For each oneof, 1 + the ordinal of the field that set it.
    oneofs: Vec<u16>,
}

impl Encoder<'_> {
    /// Appends the fields of `message` that the value at `node` sets.
    fn message(
        &mut self,
        message: Message,
        node: usize,
        out: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), TextError> {
        if depth > DEPTH_LIMIT {
            return Err(self.document.error(node, "messages are nested too deeply"));
        }
        match message.kind() {
            Kind::Plain | Kind::TypedStruct => self.object(message, node, out, depth, false),
            // `{seconds: 5}`, which old configurations have.
            Kind::Duration | Kind::Timestamp if self.document.kind(node) == NodeKind::Object => {
                self.object(message, node, out, depth, false)
            }
            Kind::Any => self.any(node, out, depth),
            Kind::Duration => self.duration(node, out),
            Kind::Timestamp => self.timestamp(node, out),
            Kind::Struct => self.structure(node, out, depth),
            Kind::Value => self.value(node, out, depth),
            Kind::ListValue => self.list_value(node, out, depth),
            Kind::FieldMask => self.field_mask(node, out),
            Kind::Wrapper => self.wrapper(message, node, out, depth),
        }
    }

    /// An ordinary message. `embedded` says that the object is the content of an `Any` and has an `@type`.
    fn object(
        &mut self,
        message: Message,
        node: usize,
        out: &mut Vec<u8>,
        depth: usize,
        embedded: bool,
    ) -> Result<(), TextError> {
        let document = self.document;
        if document.kind(node) != NodeKind::Object {
            let found = document.describe(node);
            return Err(
                document.error(node, format!("expected an object ({}), found {found}", message.full_name()))
            );
        }
        let mut seen = Seen::default();
        for (key, value) in document.members(node) {
            let name = document.text(key);
            if embedded && name == "@type" {
                continue;
            }
            let Some(field) = message.field_by_name(name) else {
                let error =
                    document.error(key, format!("{} has no such field", message.full_name())).at(name);
                if self.options.allow_unknown && !message.is_strict() {
                    self.unknown.push(error);
                    continue;
                }
                return Err(error);
            };
            if seen.twice(message.ordinal(field)) {
                return Err(document.error(key, "the field is set twice").at(field.name()));
            }
            if self.is_unset(field, value) {
                continue;
            }
            if let Some(oneof) = field.oneof() {
                seen.claim(message, oneof, field).map_err(|other| {
                    let group = message.oneof_name(oneof);
                    document
                        .error(
                            key,
                            format!("`{}` is set too, and only one of `{group}` can be", other.name()),
                        )
                        .at(field.name())
                })?;
            }
            let unknown = self.unknown.len();
            self.field(field, value, out, depth)
                .map_err(|error| if field.is_repeated() { error } else { error.at(field.name()) })?;
            self.enclose(unknown, |error| if field.is_repeated() { error } else { error.at(field.name()) });
        }
        Ok(())
    }

    /// Null is "not set", except where null is a value.
    fn is_unset(&self, field: Field, value: usize) -> bool {
        let null_is_a_value = match field.ty() {
            Type::Message => field.message().is_some_and(|message| message.kind() == Kind::Value),
            Type::Enum => field.enumeration().is_some_and(|item| item.is_null_value()),
            _ => false,
        };
        self.document.kind(value) == NodeKind::Null && (field.is_repeated() || !null_is_a_value)
    }

    fn field(
        &mut self,
        field: Field,
        value: usize,
        out: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), TextError> {
        if field.is_map() {
            self.map(field, value, out, depth)
        } else if field.is_repeated() {
            self.list(field, value, out, depth)
        } else {
            self.single(field, value, out, depth, field.has_presence())
        }
    }

    /// One value behind its tag; a default value is left out unless `keep_default`.
    fn single(
        &mut self,
        field: Field,
        value: usize,
        out: &mut Vec<u8>,
        depth: usize,
        keep_default: bool,
    ) -> Result<(), TextError> {
        match field.message() {
            Some(message) => {
                put_nested(out, field.number(), |out| self.message(message, value, out, depth + 1))
            }
            None => {
                let start = out.len();
                put_tag(out, field.number(), scalar::wire_type(field.ty()));
                let is_default = self.scalar(field, value, out)?;
                if is_default && !keep_default {
                    out.truncate(start);
                }
                Ok(())
            }
        }
    }

    fn list(&mut self, field: Field, node: usize, out: &mut Vec<u8>, depth: usize) -> Result<(), TextError> {
        let document = self.document;
        if document.kind(node) != NodeKind::Array {
            let found = document.describe(node);
            return Err(document.error(node, format!("expected a list, found {found}")).at(field.name()));
        }
        if field.is_packed() && document.count(node) > 0 {
            put_tag(out, field.number(), 2);
            return put_delimited(out, |out| {
                for (index, element) in document.elements(node).enumerate() {
                    if document.kind(element) != NodeKind::Null {
                        self.scalar(field, element, out)
                            .map_err(|error| error.at(format!("{}[{index}]", field.name())))?;
                    }
                }
                Ok(())
            });
        }
        for (index, element) in document.elements(node).enumerate() {
            if self.document.kind(element) == NodeKind::Null
                && field.message().is_none_or(|message| message.kind() != Kind::Value)
            {
                continue;
            }
            let unknown = self.unknown.len();
            let result = self.single(field, element, out, depth, true);
            if result.is_err() || self.unknown.len() > unknown {
                let segment = self.element_segment(field, index, element);
                result.map_err(|error| error.at(segment.clone()))?;
                self.enclose(unknown, |error| error.at(segment.clone()));
            }
        }
        Ok(())
    }

    fn map(&mut self, field: Field, node: usize, out: &mut Vec<u8>, depth: usize) -> Result<(), TextError> {
        let document = self.document;
        let entry = field.message().expect("a map is a list of entry messages");
        let (key_field, value_field) = (entry.field_at(0), entry.field_at(1));
        if document.kind(node) != NodeKind::Object {
            let found = document.describe(node);
            return Err(document.error(node, format!("expected an object, found {found}")).at(field.name()));
        }
        let mut keys = HashSet::with_capacity(document.count(node));
        for (key, value) in document.members(node) {
            let name = document.text(key);
            let at = |error: TextError| error.at(format!("{}[{name}]", field.name()));
            if !keys.insert(name) {
                return Err(at(document.error(key, "the key stands here twice")));
            }
            let unknown = self.unknown.len();
            put_nested(out, field.number(), |out| {
                self.map_key(key_field, key, out)?;
                if self.is_unset(value_field, value) {
                    if value_field.message().is_some() {
                        put_bytes(out, 2, &[]);
                    }
                    return Ok(());
                }
                self.single(value_field, value, out, depth + 1, true)
            })
            .map_err(at)?;
            self.enclose(unknown, at);
        }
        Ok(())
    }

    /// `field[name]` where the element has a name, else `field[index]`.
    fn element_segment(&self, field: Field, index: usize, element: usize) -> String {
        let named = field.message().and_then(Message::name_field).is_some();
        if named && self.document.kind(element) == NodeKind::Object {
            for (key, value) in self.document.members(element) {
                let is_name = self.document.text(key) == "name";
                if is_name
                    && self.document.kind(value) == NodeKind::String
                    && !self.document.text(value).is_empty()
                {
                    return format!("{}[{}]", field.name(), self.document.text(value));
                }
            }
        }
        format!("{}[{index}]", field.name())
    }

    /// Adds a path segment to the unknown fields found since there were `from`.
    fn enclose(&mut self, from: usize, segment: impl Fn(TextError) -> TextError) {
        for error in &mut self.unknown[from..] {
            *error = segment(error.clone());
        }
    }
}

impl Seen {
    /// Marks a field; true when it was marked already.
    fn twice(&mut self, ordinal: usize) -> bool {
        let bit = 1 << (ordinal % 64);
        let word = &mut self.fields[ordinal / 64];
        let twice = *word & bit != 0;
        *word |= bit;
        twice
    }

    /// Marks a oneof; the other field when it was marked already.
    fn claim(&mut self, message: Message, oneof: usize, field: Field) -> Result<(), Field> {
        if self.oneofs.is_empty() {
            self.oneofs = vec![0; message.oneof_count()];
        }
        match self.oneofs[oneof] {
            0 => {
                self.oneofs[oneof] = message.ordinal(field) as u16 + 1;
                Ok(())
            }
            other => Err(message.field_at(usize::from(other) - 1)),
        }
    }
}
