//! Where the walk stands: a chain of stack frames that becomes a path only when somebody asks.

use std::fmt;

use crate::error::ConfigError;
use crate::message::{Field, Message, Type};
use crate::wire::{Raw, Reader};

/// A place in a message, from the root down. [`fmt::Display`] writes the path:
/// `static_resources.clusters[backend].connect_timeout`.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    parent: Option<&'a Place<'a>>,
    /// The enclosing message on the wire, and where in it the record starts.
    bytes: &'a [u8],
    start: usize,
    message: Option<Message>,
    field: Option<Field>,
    /// The record is there; otherwise the place is that of a missing field.
    present: bool,
}

impl<'a> Place<'a> {
    pub(super) fn root() -> Self {
        Self { parent: None, bytes: &[], start: 0, message: None, field: None, present: false }
    }

    #[inline]
    pub(super) fn record<'b>(
        &'b self,
        bytes: &'b [u8],
        start: usize,
        message: Message,
        field: Option<Field>,
    ) -> Place<'b>
    where
        'a: 'b,
    {
        Place { parent: Some(self), bytes, start, message: Some(message), field, present: true }
    }

    pub(super) fn absent<'b>(&'b self, message: Message, field: Field) -> Place<'b>
    where
        'a: 'b,
    {
        Place {
            parent: Some(self),
            bytes: &[],
            start: 0,
            message: Some(message),
            field: Some(field),
            present: false,
        }
    }

    /// The path from the root, empty at the root itself.
    pub fn path(&self) -> String {
        self.to_string()
    }

    /// An error at this place.
    pub fn error(&self, reason: impl Into<String>) -> ConfigError {
        let error = ConfigError::new(reason);
        if self.message.is_none() { error } else { error.at(self.path()) }
    }

    /// The number of the element in its list, or the key in its map; `None` for a field that holds one value.
    pub(super) fn subscript(&self) -> Option<String> {
        let field = self.field.filter(|field| self.present && field.is_repeated())?;
        Some(match self.key(field) {
            Some(key) => key,
            None => self.index(field).to_string(),
        })
    }

    /// Elements of the same field before this one.
    fn index(&self, field: Field) -> usize {
        let mut reader = Reader::new(self.bytes);
        let mut index = 0;
        while reader.position() < self.start {
            match reader.next() {
                Ok(Some(record)) if record.number == field.number() => index += 1,
                Ok(Some(_)) => {}
                _ => break,
            }
        }
        index
    }

    /// The key of a map's entry.
    fn key(&self, field: Field) -> Option<String> {
        let key_field = field.message().filter(|_| field.is_map())?.field(1)?;
        let key = self.member(1);
        Some(match (key_field.ty(), key) {
            (Type::String, Some(Raw::Bytes(text))) => String::from_utf8_lossy(text).into_owned(),
            (Type::String, _) => String::new(),
            (Type::Bool, Some(Raw::Varint(value))) => (value != 0).to_string(),
            (_, Some(Raw::Varint(value))) => (value as i64).to_string(),
            _ => "0".to_owned(),
        })
    }

    /// The name of an element that has one.
    fn name(&self, field: Field) -> Option<&'a str> {
        let number = field.message()?.name_field()?.number();
        match self.member(number)? {
            Raw::Bytes(name) => std::str::from_utf8(name).ok().filter(|name| !name.is_empty()),
            _ => None,
        }
    }

    /// A member of the message that stands at this place.
    fn member(&self, number: u32) -> Option<Raw<'a>> {
        let record = Reader::new(self.bytes.get(self.start..)?).next().ok()??;
        let Raw::Bytes(content) = record.value else { return None };
        super::last_value(content, number).ok()?
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(message) = self.message else { return Ok(()) };
        if let Some(parent) = self.parent.filter(|parent| parent.message.is_some()) {
            // The value of a map's entry is written as the entry: `metadata[key]`.
            if message.is_map_entry() && self.field.is_some_and(|field| field.number() == 2) {
                return parent.fmt(f);
            }
            parent.fmt(f)?;
            f.write_str(".")?;
        }
        let Some(field) = self.field else {
            let record = Reader::new(self.bytes.get(self.start..).unwrap_or(&[])).next();
            let number = record.ok().flatten().map_or(0, |record| record.number);
            return write!(f, "#{number}");
        };
        f.write_str(field.name())?;
        if !self.present || !field.is_repeated() {
            return Ok(());
        }
        if let Some(key) = self.key(field) {
            return write!(f, "[{key}]");
        }
        match self.name(field) {
            Some(name) => write!(f, "[{name}]"),
            None => write!(f, "[{}]", self.index(field)),
        }
    }
}
