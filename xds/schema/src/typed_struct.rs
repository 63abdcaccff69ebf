//! `TypedStruct`: a message that travels as a `google.protobuf.Struct`.

use crate::document::{Document, NodeKind, Position, TextError};
use crate::encode::{self, TextOptions};
use crate::error::ConfigError;
use crate::message::Message;
use crate::render::struct_entries;
use crate::wire::{DEPTH_LIMIT, Raw, Reader, WireError};

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
