//! Scalars: numbers, booleans, strings, bytes, enums, map keys.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::Encoder;
use crate::document::{NodeKind, TextError};
use crate::message::{Enum, Field, Type};
use crate::wire::{put_tag, put_varint, zigzag};

const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// The wire type of a scalar, or of a message.
pub(crate) fn wire_type(ty: Type) -> u8 {
    match ty {
        Type::Double | Type::Fixed64 | Type::Sfixed64 => 1,
        Type::Float | Type::Fixed32 | Type::Sfixed32 => 5,
        Type::String | Type::Bytes | Type::Message => 2,
        Type::Int64
        | Type::Uint64
        | Type::Int32
        | Type::Bool
        | Type::Uint32
        | Type::Enum
        | Type::Sint32
        | Type::Sint64 => 0,
    }
}

impl Encoder<'_> {
    /// Appends a scalar without its tag; true when it is the default value of its type.
    pub(super) fn scalar(&mut self, field: Field, node: usize, out: &mut Vec<u8>) -> Result<bool, TextError> {
        let document = self.document;
        let zero = match field.ty() {
            Type::String => {
                let text = self.text(node, "a string")?;
                put_varint(out, text.len() as u64);
                out.extend_from_slice(text.as_bytes());
                text.is_empty()
            }
            Type::Bytes => {
                let bytes = decode_base64(self.text(node, "base64")?)
                    .ok_or_else(|| document.error(node, "expected base64"))?;
                put_varint(out, bytes.len() as u64);
                out.extend_from_slice(&bytes);
                bytes.is_empty()
            }
            Type::Bool => {
                let value = match document.kind(node) {
                    NodeKind::True => true,
                    NodeKind::False => false,
                    NodeKind::String if document.text(node) == "true" => true,
                    NodeKind::String if document.text(node) == "false" => false,
                    _ => return Err(self.expected(node, "true or false")),
                };
                out.push(u8::from(value));
                !value
            }
            Type::Enum => {
                let number = self.enum_number(field.enumeration().expect("the type is an enum"), node)?;
                put_varint(out, i64::from(number) as u64);
                number == 0
            }
            Type::Double => {
                let value = self.float(node)?;
                out.extend(value.to_le_bytes());
                value.to_bits() == 0
            }
            Type::Float => {
                let wide = self.float(node)?;
                let value = wide as f32;
                if value.is_infinite() && wide.is_finite() {
                    return Err(document.error(node, "the number is out of the range of a float"));
                }
                out.extend(value.to_le_bytes());
                value.to_bits() == 0
            }
            ty => {
                let value = self.integer(node, ty)?;
                put_integer(out, ty, value);
                value == 0
            }
        };
        Ok(zero)
    }

    /// Appends a map's key with its tag.
    pub(super) fn map_key(&mut self, field: Field, node: usize, out: &mut Vec<u8>) -> Result<(), TextError> {
        let text = self.document.text(node);
        put_tag(out, 1, wire_type(field.ty()));
        match field.ty() {
            Type::String => {
                put_varint(out, text.len() as u64);
                out.extend_from_slice(text.as_bytes());
            }
            Type::Bool if text == "true" || text == "false" => out.push(u8::from(text == "true")),
            Type::Bool => return Err(self.document.error(node, "the key must be true or false")),
            ty => put_integer(out, ty, self.integer(node, ty)?),
        }
        Ok(())
    }

    pub(super) fn text(&self, node: usize, wanted: &str) -> Result<&str, TextError> {
        match self.document.kind(node) {
            NodeKind::String => Ok(self.document.text(node)),
            _ => Err(self.expected(node, wanted)),
        }
    }

    pub(super) fn expected(&self, node: usize, wanted: &str) -> TextError {
        self.document.error(node, format!("expected {wanted}, found {}", self.document.describe(node)))
    }

    fn enum_number(&self, item: Enum, node: usize) -> Result<i32, TextError> {
        let document = self.document;
        let unknown =
            || document.error(node, format!("{} has no value {}", item.full_name(), document.describe(node)));
        match document.kind(node) {
            NodeKind::Null if item.is_null_value() => Ok(0),
            NodeKind::Number => {
                self.integer(node, Type::Int32).map(|value| i32::try_from(value).expect("it was checked"))
            }
            NodeKind::String => {
                let name = document.text(node);
                if let Some(value) = item.value_by_name(name) {
                    return Ok(value.number());
                }
                if let Ok(number) = name.parse::<i32>() {
                    return Ok(number);
                }
                let name = name.to_ascii_uppercase().replace('-', "_");
                item.value_by_name(&name).map(|value| value.number()).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }

    fn float(&self, node: usize) -> Result<f64, TextError> {
        let text = match self.document.kind(node) {
            NodeKind::Number | NodeKind::String => self.document.text(node),
            _ => return Err(self.expected(node, "a number")),
        };
        let value = match text {
            "NaN" => return Ok(f64::NAN),
            "Infinity" => return Ok(f64::INFINITY),
            "-Infinity" => return Ok(f64::NEG_INFINITY),
            _ if text.starts_with(|first: char| first == '-' || first == '.' || first.is_ascii_digit()) => {
                text.parse::<f64>().map_err(|_| self.expected(node, "a number"))?
            }
            _ => return Err(self.expected(node, "a number")),
        };
        // "-inf" and the like parse too.
        if value.is_finite() && !text.ends_with(|last: char| last.is_ascii_alphabetic()) {
            Ok(value)
        } else {
            Err(self.document.error(node, "the number is out of the range of a double"))
        }
    }

    /// An integer that fits into `ty`; `1.0` and `1e3` are integers too.
    fn integer(&self, node: usize, ty: Type) -> Result<i128, TextError> {
        let text = match self.document.kind(node) {
            NodeKind::Number | NodeKind::String => self.document.text(node),
            _ => return Err(self.expected(node, "an integer")),
        };
        let plain = text.strip_prefix('-').unwrap_or(text);
        let value = if !plain.is_empty() && plain.bytes().all(|byte| byte.is_ascii_digit()) {
            text.parse::<i128>().ok()
        } else {
            let looks_numeric = plain.starts_with(|first: char| first.is_ascii_digit() || first == '.');
            match text.parse::<f64>() {
                Ok(value) if looks_numeric && value.fract() == 0.0 && value.abs() < 1.9e19 => {
                    Some(value as i128)
                }
                Ok(value) if looks_numeric && value.fract() != 0.0 => {
                    return Err(self.document.error(node, "expected an integer, found a fraction"));
                }
                _ => return Err(self.expected(node, "an integer")),
            }
        };
        let (low, high) = match ty {
            Type::Int32 | Type::Sint32 | Type::Sfixed32 => (i128::from(i32::MIN), i128::from(i32::MAX)),
            Type::Uint32 | Type::Fixed32 => (0, i128::from(u32::MAX)),
            Type::Uint64 | Type::Fixed64 => (0, i128::from(u64::MAX)),
            _ => (i128::from(i64::MIN), i128::from(i64::MAX)),
        };
        value
            .filter(|value| (low..=high).contains(value))
            .ok_or_else(|| self.document.error(node, format!("{text} is out of range ({low} to {high})")))
    }
}

/// Appends an integer that is known to fit.
fn put_integer(out: &mut Vec<u8>, ty: Type, value: i128) {
    match ty {
        Type::Fixed32 | Type::Sfixed32 => out.extend((value as u32).to_le_bytes()),
        Type::Fixed64 | Type::Sfixed64 => out.extend((value as u64).to_le_bytes()),
        Type::Sint32 | Type::Sint64 => put_varint(out, zigzag(value as i64)),
        _ => put_varint(out, value as i64 as u64),
    }
}

/// Standard or URL-safe, padded or not.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let engine = if text.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
    engine.decode(text).ok()
}
