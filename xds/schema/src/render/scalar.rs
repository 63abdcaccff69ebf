//! Scalars and strings in JSON.

use std::fmt::{self, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{RenderError, Renderer, bytes_of};
use crate::message::{Field, Type};
use crate::wire::{Raw, WireError, unzigzag};

/// A scalar as a number, whatever its encoding.
#[derive(Clone, Copy)]
pub(super) enum Number {
    Signed(i64),
    Unsigned(u64),
}

impl Renderer<'_> {
    pub(super) fn scalar(&mut self, field: Field, raw: Raw<'_>, redact: bool) -> Result<(), RenderError> {
        match field.ty() {
            Type::String => {
                let text = std::str::from_utf8(bytes_of(raw)?).map_err(|_| WireError::Utf8)?;
                write_string(if redact { "[redacted]" } else { text }, self.out)?;
            }
            Type::Bytes => {
                let bytes = bytes_of(raw)?;
                self.out.write_char('"')?;
                let bytes = if redact { b"[redacted]".as_slice() } else { bytes };
                self.out.write_str(&STANDARD.encode(bytes))?;
                self.out.write_char('"')?;
            }
            Type::Bool => {
                let Raw::Varint(value) = raw else { return Err(WireError::WireType.into()) };
                self.out.write_str(if value == 0 { "false" } else { "true" })?;
            }
            Type::Enum => {
                let Raw::Varint(value) = raw else { return Err(WireError::WireType.into()) };
                let item = field.enumeration().expect("the type is an enum");
                match item.value(value as i32) {
                    _ if item.is_null_value() => self.out.write_str("null")?,
                    Some(value) => write_string(value.name(), self.out)?,
                    None => write!(self.out, "{}", value as i32)?,
                }
            }
            Type::Double => {
                let Raw::Fixed64(bits) = raw else { return Err(WireError::WireType.into()) };
                write_double(f64::from_bits(bits), self.out)?;
            }
            Type::Float => {
                let Raw::Fixed32(bits) = raw else { return Err(WireError::WireType.into()) };
                write_float(f32::from_bits(bits), self.out)?;
            }
            ty => {
                let wide =
                    matches!(ty, Type::Int64 | Type::Uint64 | Type::Fixed64 | Type::Sfixed64 | Type::Sint64);
                let quote = if wide { "\"" } else { "" };
                match integer(ty, raw)? {
                    Number::Signed(value) => write!(self.out, "{quote}{value}{quote}")?,
                    Number::Unsigned(value) => write!(self.out, "{quote}{value}{quote}")?,
                }
            }
        }
        Ok(())
    }
}

/// Reads an integer of any of the ten types.
pub(super) fn integer(ty: Type, raw: Raw<'_>) -> Result<Number, WireError> {
    Ok(match (ty, raw) {
        (Type::Int32, Raw::Varint(value)) => Number::Signed(i64::from(value as i32)),
        (Type::Int64, Raw::Varint(value)) => Number::Signed(value as i64),
        (Type::Uint32, Raw::Varint(value)) => Number::Unsigned(u64::from(value as u32)),
        (Type::Uint64, Raw::Varint(value)) => Number::Unsigned(value),
        (Type::Sint32, Raw::Varint(value)) => Number::Signed(unzigzag(u64::from(value as u32))),
        (Type::Sint64, Raw::Varint(value)) => Number::Signed(unzigzag(value)),
        (Type::Fixed32, Raw::Fixed32(value)) => Number::Unsigned(u64::from(value)),
        (Type::Sfixed32, Raw::Fixed32(value)) => Number::Signed(i64::from(value as i32)),
        (Type::Fixed64, Raw::Fixed64(value)) => Number::Unsigned(value),
        (Type::Sfixed64, Raw::Fixed64(value)) => Number::Signed(value as i64),
        _ => return Err(WireError::WireType),
    })
}

/// A map's key as the name of a member.
pub(super) fn map_key(field: Field, raw: Option<Raw<'_>>) -> Result<String, RenderError> {
    let raw = raw.unwrap_or_else(|| super::default_of(field.ty()));
    Ok(match (field.ty(), raw) {
        (Type::String, raw) => std::str::from_utf8(bytes_of(raw)?).map_err(|_| WireError::Utf8)?.to_owned(),
        (Type::Bool, Raw::Varint(value)) => (value != 0).to_string(),
        (ty, raw) => match integer(ty, raw)? {
            Number::Signed(value) => value.to_string(),
            Number::Unsigned(value) => value.to_string(),
        },
    })
}

/// A string in quotes, with the escapes of protobuf's own JSON writer.
pub(crate) fn write_string(text: &str, out: &mut dyn Write) -> fmt::Result {
    out.write_char('"')?;
    let mut plain = 0;
    for (at, character) in text.char_indices() {
        if !must_escape(character) {
            continue;
        }
        out.write_str(&text[plain..at])?;
        plain = at + character.len_utf8();
        match character {
            '"' => out.write_str("\\\"")?,
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            '\u{8}' => out.write_str("\\b")?,
            '\u{c}' => out.write_str("\\f")?,
            other => {
                let mut units = [0; 2];
                for unit in other.encode_utf16(&mut units) {
                    write!(out, "\\u{unit:04x}")?;
                }
            }
        }
    }
    out.write_str(&text[plain..])?;
    out.write_char('"')
}

/// What JSON forbids in a string, and what protobuf escapes for the sake of JavaScript and terminals.
fn must_escape(character: char) -> bool {
    match character {
        '"' | '\\' | '<' | '>' | '\0'..='\x1f' | '\x7f'..='\u{9f}' => true,
        ' '..='~' => false,
        '\u{ad}' | '\u{600}'..='\u{603}' | '\u{6dd}' | '\u{70f}' | '\u{17b4}' | '\u{17b5}' => true,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2064}' => true,
        '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' => true,
        '\u{1d173}'..='\u{1d17a}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}' => true,
        _ => false,
    }
}

pub(super) fn write_double(value: f64, out: &mut dyn Write) -> fmt::Result {
    if write_special(value, out)? {
        return Ok(());
    }
    write_shortest(&format!("{value:e}"), 15, out)
}

fn write_float(value: f32, out: &mut dyn Write) -> fmt::Result {
    if write_special(f64::from(value), out)? {
        return Ok(());
    }
    write_shortest(&format!("{value:e}"), 6, out)
}

fn write_special(value: f64, out: &mut dyn Write) -> Result<bool, fmt::Error> {
    if value.is_nan() {
        out.write_str("\"NaN\"")?;
    } else if value.is_infinite() {
        out.write_str(if value > 0.0 { "\"Infinity\"" } else { "\"-Infinity\"" })?;
    } else {
        return Ok(false);
    }
    Ok(true)
}

/// Writes `-d.ddde-x` as C's `%g` does: plain unless the exponent is below -4 or beyond the digits.
fn write_shortest(scientific: &str, precision: usize, out: &mut dyn Write) -> fmt::Result {
    let (mantissa, exponent) = scientific.split_once('e').expect("the `e` format writes an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent is a small integer");
    let (sign, mantissa) = match mantissa.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", mantissa),
    };
    let digits: String = mantissa.chars().filter(|&character| character != '.').collect();
    let limit = precision.max(digits.len()) as i32;
    out.write_str(sign)?;
    if exponent < -4 || exponent >= limit {
        out.write_str(mantissa)?;
        write!(out, "e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    } else if exponent < 0 {
        write!(out, "0.{}{digits}", "0".repeat((-exponent - 1) as usize))
    } else {
        let whole = exponent as usize + 1;
        if digits.len() <= whole {
            write!(out, "{digits}{}", "0".repeat(whole - digits.len()))
        } else {
            write!(out, "{}.{}", &digits[..whole], &digits[whole..])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{write_double, write_float, write_string};

    #[test]
    fn numbers_read_as_c_prints_them() {
        let cases = [
            (0.0, "0"),
            (-0.0, "-0"),
            (1.0, "1"),
            (0.1, "0.1"),
            (1.5, "1.5"),
            (100.0, "100"),
            (1e14, "100000000000000"),
            (1e15, "1e+15"),
            (1e300, "1e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (1234.5678, "1234.5678"),
            (f64::NAN, "\"NaN\""),
            (f64::NEG_INFINITY, "\"-Infinity\""),
        ];
        for (value, expected) in cases {
            let mut out = String::new();
            write_double(value, &mut out).unwrap();
            assert_eq!(out, expected);
        }
        let mut out = String::new();
        write_float(0.1, &mut out).unwrap();
        assert_eq!(out, "0.1");
    }

    #[test]
    fn strings_are_escaped_as_envoy_does() {
        let mut out = String::new();
        write_string("<b>&'\"\u{7f}\u{2028}\u{e9}\t\\\u{1}</b>\u{e0001}", &mut out).unwrap();
        assert_eq!(
            out,
            "\"\\u003cb\\u003e&'\\\"\\u007f\\u2028\u{e9}\\t\\\\\\u0001\\u003c/b\\u003e\\udb40\\udc01\""
        );
    }
}
