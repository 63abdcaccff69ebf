//! Wire bytes to JSON, laid out as Envoy's admin endpoints do it.

mod scalar;
mod wkt;

use std::borrow::Cow;
use std::fmt::{self, Write};

use crate::message::{Field, Kind, Message, Type};
use crate::wire::{DEPTH_LIMIT, Raw, Reader, WireError};

pub(crate) use scalar::write_string;
pub(crate) use wkt::{any_parts, struct_entries, time_parts};

/// How JSON is written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct JsonStyle {
    /// Names as in the proto files (`connect_timeout`) instead of camelCase: what `/config_dump` shows.
    pub proto_names: bool,
    /// One line per value, indented by one space per level, as Envoy's admin endpoints do.
    pub pretty: bool,
    /// Write numbers, booleans, enums, strings and lists that are not set (`always_print_primitive_fields`).
    pub with_defaults: bool,
    /// Write `[redacted]` for what `udpa.annotations.sensitive` marks.
    pub redact: bool,
}

impl JsonStyle {
    /// What `/config_dump` and CSDS dumps use.
    pub const CONFIG_DUMP: Self =
        Self { proto_names: true, pretty: true, with_defaults: false, redact: true };
}

/// Why a message could not be written as JSON.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RenderError {
    /// The bytes are not a message.
    Wire(WireError),
    /// The output refused.
    Output,
}

impl fmt::Display for RenderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wire(error) => error.fmt(f),
            Self::Output => f.write_str("the output does not take the text"),
        }
    }
}

impl std::error::Error for RenderError {}

impl From<WireError> for RenderError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<fmt::Error> for RenderError {
    fn from(_: fmt::Error) -> Self {
        Self::Output
    }
}

/// Writes `bytes`, a `message` on the wire, as JSON. Unknown fields are left out.
///
/// What an `Any` of an unknown type holds is written as base64 under `value`; a duration or time out of range as
/// null, since the mapping has no form for it.
pub fn wire_to_json(
    message: Message,
    bytes: &[u8],
    out: &mut dyn Write,
    style: JsonStyle,
) -> Result<(), RenderError> {
    Renderer { out, style, level: 0 }.message(message, bytes, 0, false)
}

struct Renderer<'o> {
    out: &'o mut dyn Write,
    style: JsonStyle,
    level: usize,
}

/// A comma between members, none before the first.
#[derive(Default)]
struct Members {
    any: bool,
}

impl Renderer<'_> {
    /// `secret` says that an enclosing field is sensitive.
    fn message(
        &mut self,
        message: Message,
        bytes: &[u8],
        depth: usize,
        secret: bool,
    ) -> Result<(), RenderError> {
        if depth > DEPTH_LIMIT {
            return Err(WireError::Depth.into());
        }
        match message.kind() {
            Kind::Plain | Kind::TypedStruct => {
                let mut members = self.open('{')?;
                self.fields(message, bytes, depth, secret, &mut members)?;
                self.close(&members, '}')
            }
            Kind::Any => self.any(bytes, depth, secret),
            Kind::Duration => self.duration(bytes),
            Kind::Timestamp => self.timestamp(bytes),
            Kind::Struct => self.structure(bytes, depth, secret),
            Kind::Value => self.value(bytes, depth, secret),
            Kind::ListValue => self.list_value(bytes, depth, secret),
            Kind::FieldMask => self.field_mask(bytes),
            Kind::Wrapper => self.wrapper(message, bytes, secret),
        }
    }

    /// The members of an ordinary message, by field number.
    fn fields(
        &mut self,
        message: Message,
        bytes: &[u8],
        depth: usize,
        secret: bool,
        members: &mut Members,
    ) -> Result<(), RenderError> {
        if self.style.redact && message.kind() == Kind::TypedStruct {
            return self.redacted_typed_struct(bytes, depth, secret, members);
        }
        let records = Records::read(message, bytes)?;
        let mut next = 0;
        for (ordinal, field) in message.fields().enumerate() {
            let start = next;
            while records.0.get(next).is_some_and(|record| usize::from(record.ordinal) == ordinal) {
                next += 1;
            }
            let values = &records.0[start..next];
            if values.is_empty() {
                if self.style.with_defaults && (field.is_repeated() || !field.has_presence()) {
                    self.member(members, self.name(field))?;
                    self.default_value(field)?;
                }
                continue;
            }
            self.field(field, values, depth, secret || field.is_sensitive(), members)?;
        }
        Ok(())
    }

    fn field(
        &mut self,
        field: Field,
        values: &[Value<'_>],
        depth: usize,
        secret: bool,
        members: &mut Members,
    ) -> Result<(), RenderError> {
        let redact = secret && self.style.redact;
        if redact && !matches!(field.ty(), Type::String | Type::Bytes | Type::Message) {
            // Numbers and the like have no redacted form: they are cleared.
            return Ok(());
        }
        let last = values.last().expect("the field was seen").raw;
        if !field.is_repeated() && !field.has_presence() && is_default(field.ty(), last) {
            if self.style.with_defaults {
                self.member(members, self.name(field))?;
                self.default_value(field)?;
            }
            return Ok(());
        }
        self.member(members, self.name(field))?;
        if field.is_map() {
            return self.map(field, values, depth, secret);
        }
        if !field.is_repeated() {
            return match field.message() {
                Some(message) => self.message(message, &merged(values)?, depth + 1, secret),
                None => self.scalar(field, last, redact),
            };
        }
        let mut items = self.open('[')?;
        for value in values {
            match (field.message(), value.raw) {
                (Some(message), raw) => {
                    self.item(&mut items)?;
                    self.message(message, bytes_of(raw)?, depth + 1, secret)?;
                }
                (None, Raw::Bytes(packed)) if !matches!(field.ty(), Type::String | Type::Bytes) => {
                    let mut reader = Reader::new(packed);
                    while !reader.is_empty() {
                        let raw = packed_value(field.ty(), &mut reader)?;
                        self.item(&mut items)?;
                        self.scalar(field, raw, redact)?;
                    }
                }
                (None, raw) => {
                    self.item(&mut items)?;
                    self.scalar(field, raw, redact)?;
                }
            }
        }
        self.close(&items, ']')
    }

    fn map(
        &mut self,
        field: Field,
        values: &[Value<'_>],
        depth: usize,
        secret: bool,
    ) -> Result<(), RenderError> {
        let entry = field.message().expect("a map is a list of entry messages");
        let (key_field, value_field) = (entry.field_at(0), entry.field_at(1));
        let mut entries = Vec::with_capacity(values.len());
        for value in values {
            let records = Records::read(entry, bytes_of(value.raw)?)?;
            let split = records.0.partition_point(|record| record.ordinal == 0);
            let key = scalar::map_key(key_field, records.0[..split].last().map(|value| value.raw))?;
            entries.push((key, records, split));
        }
        // Of two entries with one key the later wins.
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by(|&a, &b| entries[a].0.cmp(&entries[b].0).then(b.cmp(&a)));
        order.dedup_by(|b, a| entries[*a].0 == entries[*b].0);
        order.sort_unstable();

        let redact = secret && self.style.redact;
        let mut members = self.open('{')?;
        for index in order {
            let (key, records, split) = &entries[index];
            let values = &records.0[*split..];
            self.member(&mut members, key)?;
            match (value_field.message(), values.last()) {
                (Some(message), _) => self.message(message, &merged(values)?, depth + 2, secret)?,
                (None, Some(value)) => self.scalar(value_field, value.raw, redact)?,
                (None, None) => self.default_value(value_field)?,
            }
        }
        self.close(&members, '}')
    }

    fn name(&self, field: Field) -> &'static str {
        if self.style.proto_names { field.name() } else { field.json_name() }
    }

    fn default_value(&mut self, field: Field) -> Result<(), RenderError> {
        if field.is_map() {
            self.out.write_str("{}")?;
        } else if field.is_repeated() {
            self.out.write_str("[]")?;
        } else {
            self.scalar(field, default_of(field.ty()), false)?;
        }
        Ok(())
    }

    fn open(&mut self, bracket: char) -> Result<Members, RenderError> {
        self.out.write_char(bracket)?;
        self.level += 1;
        Ok(Members::default())
    }

    fn item(&mut self, members: &mut Members) -> Result<(), RenderError> {
        if members.any {
            self.out.write_char(',')?;
        }
        members.any = true;
        self.new_line()
    }

    fn member(&mut self, members: &mut Members, name: &str) -> Result<(), RenderError> {
        self.item(members)?;
        write_string(name, self.out)?;
        self.out.write_str(if self.style.pretty { ": " } else { ":" })?;
        Ok(())
    }

    fn close(&mut self, members: &Members, bracket: char) -> Result<(), RenderError> {
        self.level -= 1;
        if members.any {
            self.new_line()?;
        }
        self.out.write_char(bracket)?;
        Ok(())
    }

    fn new_line(&mut self) -> Result<(), RenderError> {
        if self.style.pretty {
            self.out.write_char('\n')?;
            for _ in 0..self.level {
                self.out.write_char(' ')?;
            }
        }
        Ok(())
    }
}

/// One value of a known field.
#[derive(Clone, Copy)]
struct Value<'a> {
    ordinal: u16,
    raw: Raw<'a>,
}

/// The values of a message, sorted by field number; those of one field keep their order.
struct Records<'a>(Vec<Value<'a>>);

impl<'a> Records<'a> {
    fn read(message: Message, bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut records = Vec::new();
        let mut reader = Reader::new(bytes);
        // For each oneof the ordinal of the last member: it unsets the others.
        let mut oneofs: Vec<Option<u16>> = Vec::new();
        while let Some(record) = reader.next()? {
            let Some(field) = message.field(record.number) else { continue };
            let ordinal = message.ordinal(field) as u16;
            records.push(Value { ordinal, raw: record.value });
            if let Some(oneof) = field.oneof() {
                if oneofs.is_empty() {
                    oneofs = vec![None; message.oneof_count()];
                }
                match oneofs[oneof].replace(ordinal) {
                    Some(other) if other != ordinal => records.retain(|value| value.ordinal != other),
                    _ => {}
                }
            }
        }
        if !records.is_sorted_by_key(|value| value.ordinal) {
            records.sort_by_key(|value| value.ordinal);
        }
        Ok(Self(records))
    }
}

/// A message field that stands several times is the merge of all, which on the wire is their concatenation.
fn merged<'a>(values: &[Value<'a>]) -> Result<Cow<'a, [u8]>, WireError> {
    match values {
        [] => Ok(Cow::Borrowed(&[])),
        [value] => bytes_of(value.raw).map(Cow::Borrowed),
        values => {
            let mut all = Vec::new();
            for value in values {
                all.extend_from_slice(bytes_of(value.raw)?);
            }
            Ok(Cow::Owned(all))
        }
    }
}

fn bytes_of(raw: Raw<'_>) -> Result<&[u8], WireError> {
    match raw {
        Raw::Bytes(bytes) => Ok(bytes),
        _ => Err(WireError::WireType),
    }
}

/// The next element of a packed list.
pub(crate) fn packed_value<'a>(ty: Type, reader: &mut Reader<'a>) -> Result<Raw<'a>, WireError> {
    match ty {
        Type::Double | Type::Fixed64 | Type::Sfixed64 => {
            reader.array().map(|bytes| Raw::Fixed64(u64::from_le_bytes(bytes)))
        }
        Type::Float | Type::Fixed32 | Type::Sfixed32 => {
            reader.array().map(|bytes| Raw::Fixed32(u32::from_le_bytes(bytes)))
        }
        _ => reader.varint().map(Raw::Varint),
    }
}

fn default_of(ty: Type) -> Raw<'static> {
    match ty {
        Type::Double | Type::Fixed64 | Type::Sfixed64 => Raw::Fixed64(0),
        Type::Float | Type::Fixed32 | Type::Sfixed32 => Raw::Fixed32(0),
        Type::String | Type::Bytes | Type::Message => Raw::Bytes(&[]),
        _ => Raw::Varint(0),
    }
}

fn is_default(ty: Type, raw: Raw<'_>) -> bool {
    match raw {
        Raw::Varint(value) => match ty {
            Type::Int32 | Type::Uint32 | Type::Enum | Type::Sint32 => value as u32 == 0,
            _ => value == 0,
        },
        Raw::Fixed64(value) => value == 0,
        Raw::Fixed32(value) => value == 0,
        Raw::Bytes(bytes) => bytes.is_empty() && ty != Type::Message,
        Raw::Group => false,
    }
}
