//! The well-known types in their JSON forms.

use std::borrow::Cow;
use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::scalar::{write_double, write_string};
use super::{Members, Records, RenderError, Renderer, bytes_of, merged};
use crate::encode::{format_duration, format_timestamp};
use crate::message::{Kind, Message, Type};
use crate::typed_struct::typed_struct_to_wire;
use crate::wire::{DEPTH_LIMIT, Raw, Reader, WireError};

impl Renderer<'_> {
    pub(super) fn any(&mut self, bytes: &[u8], depth: usize, secret: bool) -> Result<(), RenderError> {
        let (url, content) = any_parts(bytes)?;
        let mut members = self.open('{')?;
        if !url.is_empty() {
            self.member(&mut members, "@type")?;
            write_string(url, self.out)?;
        }
        match Message::find_by_url(url) {
            Some(message) if matches!(message.kind(), Kind::Plain | Kind::TypedStruct) => {
                if depth >= DEPTH_LIMIT {
                    return Err(WireError::Depth.into());
                }
                self.fields(message, content, depth + 1, secret, &mut members)?;
            }
            Some(message) => {
                self.member(&mut members, "value")?;
                self.message(message, content, depth + 1, secret)?;
            }
            None if content.is_empty() => {}
            None => {
                let redact = secret && self.style.redact;
                self.member(&mut members, "value")?;
                let content = if redact { b"[redacted]".as_slice() } else { content };
                write_string(&STANDARD.encode(content), self.out)?;
            }
        }
        self.close(&members, '}')
    }

    /// A `TypedStruct` by the message that it stands for, which tells what in it is a secret.
    pub(super) fn redacted_typed_struct(
        &mut self,
        bytes: &[u8],
        depth: usize,
        secret: bool,
        members: &mut Members,
    ) -> Result<(), RenderError> {
        if depth >= DEPTH_LIMIT {
            return Err(WireError::Depth.into());
        }
        // It has the field numbers of an `Any`.
        let (url, value) = any_parts(bytes)?;
        if !url.is_empty() {
            self.member(members, if self.style.proto_names { "type_url" } else { "typeUrl" })?;
            write_string(url, self.out)?;
        }
        self.member(members, "value")?;
        let inner = Message::find_by_url(url);
        match inner.and_then(|inner| Some((inner, typed_struct_to_wire(value, inner).ok()?))) {
            Some((inner, wire)) => self.message(inner, &wire, depth + 1, secret),
            // Nothing tells which of its texts are secrets.
            None => self.structure(value, depth + 1, true),
        }
    }

    pub(super) fn duration(&mut self, bytes: &[u8]) -> Result<(), RenderError> {
        let (seconds, nanos) = time_parts(bytes)?;
        let mut text = String::with_capacity(16);
        if !format_duration(seconds, nanos, &mut text)? {
            self.out.write_str("null")?;
            return Ok(());
        }
        write_string(&text, self.out)?;
        Ok(())
    }

    pub(super) fn timestamp(&mut self, bytes: &[u8]) -> Result<(), RenderError> {
        let (seconds, nanos) = time_parts(bytes)?;
        let mut text = String::with_capacity(32);
        if !format_timestamp(seconds, nanos, &mut text)? {
            self.out.write_str("null")?;
            return Ok(());
        }
        write_string(&text, self.out)?;
        Ok(())
    }

    pub(super) fn structure(&mut self, bytes: &[u8], depth: usize, secret: bool) -> Result<(), RenderError> {
        if depth > DEPTH_LIMIT {
            return Err(WireError::Depth.into());
        }
        let entries = struct_entries(bytes)?;
        let mut members = self.open('{')?;
        for (key, value) in &entries {
            self.member(&mut members, key)?;
            self.value(value, depth + 1, secret)?;
        }
        self.close(&members, '}')
    }

    pub(super) fn value(&mut self, bytes: &[u8], depth: usize, secret: bool) -> Result<(), RenderError> {
        let message = Message::find("google.protobuf.Value").expect("the schema has the well-known types");
        let records = Records::read(message, bytes)?;
        let Some(last) = records.0.last() else {
            self.out.write_str("null")?;
            return Ok(());
        };
        match (usize::from(last.ordinal), last.raw) {
            (0, _) => self.out.write_str("null")?,
            (1, Raw::Fixed64(bits)) => write_double(f64::from_bits(bits), self.out)?,
            (2, Raw::Bytes(text)) => {
                let text = std::str::from_utf8(text).map_err(|_| WireError::Utf8)?;
                let redact = secret && self.style.redact;
                write_string(if redact { "[redacted]" } else { text }, self.out)?;
            }
            (3, Raw::Varint(value)) => self.out.write_str(if value == 0 { "false" } else { "true" })?,
            (4, Raw::Bytes(_)) => self.structure(&merged(&records.0)?, depth + 1, secret)?,
            (5, Raw::Bytes(_)) => self.list_value(&merged(&records.0)?, depth + 1, secret)?,
            _ => return Err(WireError::WireType.into()),
        }
        Ok(())
    }

    pub(super) fn list_value(&mut self, bytes: &[u8], depth: usize, secret: bool) -> Result<(), RenderError> {
        if depth > DEPTH_LIMIT {
            return Err(WireError::Depth.into());
        }
        let mut items = self.open('[')?;
        let mut reader = Reader::new(bytes);
        while let Some(record) = reader.next()? {
            if record.number == 1 {
                self.item(&mut items)?;
                self.value(bytes_of(record.value)?, depth + 1, secret)?;
            }
        }
        self.close(&items, ']')
    }

    pub(super) fn field_mask(&mut self, bytes: &[u8]) -> Result<(), RenderError> {
        let mut text = String::new();
        let mut reader = Reader::new(bytes);
        while let Some(record) = reader.next()? {
            if record.number != 1 {
                continue;
            }
            if !text.is_empty() {
                text.push(',');
            }
            let path = std::str::from_utf8(bytes_of(record.value)?).map_err(|_| WireError::Utf8)?;
            let mut upper = false;
            for character in path.chars() {
                match character {
                    '_' => upper = true,
                    other if upper => {
                        text.push(other.to_ascii_uppercase());
                        upper = false;
                    }
                    other => text.push(other),
                }
            }
        }
        write_string(&text, self.out)?;
        Ok(())
    }

    pub(super) fn wrapper(
        &mut self,
        message: Message,
        bytes: &[u8],
        secret: bool,
    ) -> Result<(), RenderError> {
        let field = message.field_at(0);
        let redact = secret && self.style.redact && matches!(field.ty(), Type::String | Type::Bytes);
        let records = Records::read(message, bytes)?;
        let raw = records.0.last().map_or_else(|| super::default_of(field.ty()), |value| value.raw);
        self.scalar(field, raw, redact)
    }
}

/// The type URL and the content of an `Any`.
pub(crate) fn any_parts(bytes: &[u8]) -> Result<(&str, &[u8]), WireError> {
    let (mut url, mut content): (&[u8], &[u8]) = (&[], &[]);
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        match record.number {
            1 => url = bytes_of(record.value)?,
            2 => content = bytes_of(record.value)?,
            _ => {}
        }
    }
    Ok((std::str::from_utf8(url).map_err(|_| WireError::Utf8)?, content))
}

/// Seconds and nanoseconds of a duration or timestamp.
pub(crate) fn time_parts(bytes: &[u8]) -> Result<(i64, i32), WireError> {
    let (mut seconds, mut nanos) = (0, 0);
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        match (record.number, record.value) {
            (1, Raw::Varint(value)) => seconds = value as i64,
            (2, Raw::Varint(value)) => nanos = value as i32,
            (1 | 2, _) => return Err(WireError::WireType),
            _ => {}
        }
    }
    Ok((seconds, nanos))
}

/// A member of a struct: its name, and its `google.protobuf.Value` on the wire.
pub(crate) type Member<'a> = (&'a str, Cow<'a, [u8]>);

/// The members of a `google.protobuf.Struct`; of two with one key the later wins and keeps the first's place.
pub(crate) fn struct_entries(bytes: &[u8]) -> Result<Vec<Member<'_>>, WireError> {
    let mut entries: Vec<Member<'_>> = Vec::new();
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        if record.number != 1 {
            continue;
        }
        let (mut key, mut value): (&[u8], Cow<'_, [u8]>) = (&[], Cow::Borrowed(&[]));
        let mut entry = Reader::new(bytes_of(record.value)?);
        while let Some(part) = entry.next()? {
            match part.number {
                1 => key = bytes_of(part.value)?,
                2 if value.is_empty() => value = Cow::Borrowed(bytes_of(part.value)?),
                2 => value.to_mut().extend_from_slice(bytes_of(part.value)?),
                _ => {}
            }
        }
        let key = std::str::from_utf8(key).map_err(|_| WireError::Utf8)?;
        match places.get(key) {
            Some(&place) => entries[place].1 = value,
            None => {
                places.insert(key, entries.len());
                entries.push((key, value));
            }
        }
    }
    Ok(entries)
}
