//! `TypedStruct`: a message that travels as a `google.protobuf.Struct`.

use crate::document::{Document, NodeKind, Position, TextError};
use crate::encode::{self, TextOptions};
use crate::error::ConfigError;
use crate::message::{Field, Kind, Message};
use crate::render::{any_parts, struct_entries};
use crate::wire::{DEPTH_LIMIT, Raw, Reader, WireError, put_bytes};

/// Turns `value`, the `google.protobuf.Struct` of a `TypedStruct` on the wire, into the `inner` message on the
/// wire, by the rules of JSON.
pub fn typed_struct_to_wire(value: &[u8], inner: Message) -> Result<Vec<u8>, ConfigError> {
    let mut document = Document::new("");
    structure(value, &mut document, 0)?;
    match encode::encode(inner, &document, TextOptions::default()) {
        Ok(encoded) => Ok(encoded.wire),
        // A struct has no lines.
        Err(error) => Err(error.config_error().clone()),
    }
}

/// Replaces every `TypedStruct` inside an `Any` by the message that it stands for, so that who compiles a message that has
/// passed the walk need not know of them. Nothing when there is none; one of an unknown type stays.
pub fn resolve_typed_structs(message: Message, wire: &[u8]) -> Result<Option<Vec<u8>>, ConfigError> {
    if !may_have_one(wire) {
        return Ok(None);
    }
    resolve(message, wire, 0).map(Some)
}

/// By the name that the URL of the `Any` ends with.
fn may_have_one(wire: &[u8]) -> bool {
    memchr::memmem::find(wire, b".TypedStruct").is_some()
}

fn resolve(message: Message, wire: &[u8], depth: usize) -> Result<Vec<u8>, ConfigError> {
    let malformed = |error: WireError| ConfigError::new(error.to_string());
    if depth > DEPTH_LIMIT {
        return Err(malformed(WireError::Depth));
    }
    if message.kind() == Kind::Any {
        return resolve_any(wire, depth);
    }
    let mut out = Vec::with_capacity(wire.len());
    let mut reader = Reader::new(wire);
    while let Some(record) = reader.next().map_err(malformed)? {
        let inner = message.field(record.number).and_then(Field::message);
        match (inner, record.value) {
            (Some(inner), Raw::Bytes(bytes)) if may_have_one(bytes) => {
                put_bytes(&mut out, record.number, &resolve(inner, bytes, depth + 1)?);
            }
            _ => out.extend_from_slice(&wire[record.start..reader.position()]),
        }
    }
    Ok(out)
}

fn resolve_any(wire: &[u8], depth: usize) -> Result<Vec<u8>, ConfigError> {
    let parts = |bytes| any_parts(bytes).map_err(|error| ConfigError::new(error.to_string()));
    let (url, content) = parts(wire)?;
    let Some(outer) = Message::find_by_url(url) else { return Ok(wire.to_vec()) };
    let (url, resolved) = if outer.kind() == Kind::TypedStruct {
        // It has the field numbers of an `Any`.
        let (url, value) = parts(content)?;
        let Some(inner) = Message::find_by_url(url) else { return Ok(wire.to_vec()) };
        (url, resolve(inner, &typed_struct_to_wire(value, inner)?, depth + 1)?)
    } else {
        (url, resolve(outer, content, depth + 1)?)
    };
    let mut out = Vec::with_capacity(url.len() + resolved.len() + 8);
    put_bytes(&mut out, 1, url.as_bytes());
    put_bytes(&mut out, 2, &resolved);
    Ok(out)
}

const NOWHERE: Position = Position { line: 0, column: 0 };

enum StructError {
    Wire(WireError),
    Text(TextError),
}

impl From<WireError> for StructError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<TextError> for StructError {
    fn from(error: TextError) -> Self {
        Self::Text(error)
    }
}

impl From<StructError> for ConfigError {
    fn from(error: StructError) -> Self {
        match error {
            StructError::Wire(error) => Self::new(format!("not a google.protobuf.Struct: {error}")),
            StructError::Text(error) => error.config_error().clone(),
        }
    }
}

fn structure(bytes: &[u8], document: &mut Document<'_>, depth: usize) -> Result<(), StructError> {
    if depth > DEPTH_LIMIT {
        return Err(WireError::Depth.into());
    }
    let entries = struct_entries(bytes)?;
    let node = document.open(NodeKind::Object, NOWHERE)?;
    for (key, member) in &entries {
        document.push_text(NodeKind::String, NOWHERE, key)?;
        value(member, document, depth + 1)?;
    }
    document.close(node, entries.len() as u32);
    Ok(())
}

fn value(bytes: &[u8], document: &mut Document<'_>, depth: usize) -> Result<(), StructError> {
    if depth > DEPTH_LIMIT {
        return Err(WireError::Depth.into());
    }
    let mut last = None;
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        if record.number <= 6 {
            last = Some(record);
        }
    }
    match last.map(|record| (record.number, record.value)) {
        None | Some((1, _)) => document.push_literal(NodeKind::Null, NOWHERE)?,
        Some((2, Raw::Fixed64(bits))) => {
            let number = f64::from_bits(bits);
            if number.is_finite() {
                document.push_text(NodeKind::Number, NOWHERE, &number.to_string())?;
            } else {
                let name = if number.is_nan() {
                    "NaN"
                } else if number > 0.0 {
                    "Infinity"
                } else {
                    "-Infinity"
                };
                document.push_text(NodeKind::String, NOWHERE, name)?;
            }
        }
        Some((3, Raw::Bytes(text))) => {
            let text = std::str::from_utf8(text).map_err(|_| WireError::Utf8)?;
            document.push_text(NodeKind::String, NOWHERE, text)?;
        }
        Some((4, Raw::Varint(truth))) => {
            let kind = if truth == 0 { NodeKind::False } else { NodeKind::True };
            document.push_literal(kind, NOWHERE)?;
        }
        Some((5, Raw::Bytes(members))) => structure(members, document, depth + 1)?,
        Some((6, Raw::Bytes(elements))) => list(elements, document, depth + 1)?,
        Some(_) => return Err(WireError::WireType.into()),
    }
    Ok(())
}

fn list(bytes: &[u8], document: &mut Document<'_>, depth: usize) -> Result<(), StructError> {
    let node = document.open(NodeKind::Array, NOWHERE)?;
    let mut elements = 0;
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        match (record.number, record.value) {
            (1, Raw::Bytes(element)) => {
                value(element, document, depth + 1)?;
                elements += 1;
            }
            (1, _) => return Err(WireError::WireType.into()),
            _ => {}
        }
    }
    document.close(node, elements);
    Ok(())
}
