//! One pass over a message on the wire that finds everything wrong with it.
//!
//! What it looks for: bytes that are no message, fields and types that the schema does not have, deprecated fields
//! and enum values, the `protoc-gen-validate` rules, and the ledger. It goes into the content of every `Any` whose
//! type is known, and into `TypedStruct`s that name a known type. A message without findings costs no allocation.

mod forms;
mod place;
mod program;
mod rules;
mod violation;

use std::fmt;

use crate::error::ConfigError;
use crate::ledger::{self, State};
use crate::merge;
use crate::message::{EnumValue, Field, Kind, Message, Type};
use crate::render::any_parts;
use crate::table::BLOB;
use crate::typed_struct::typed_struct_to_wire;
use crate::wire::{DEPTH_LIMIT, Raw, Reader, WireError};

pub use place::Place;
pub use violation::Violation;

/// Something the walk came upon.
#[derive(Debug)]
pub enum Finding<'a> {
    /// The bytes are not a message; the walk leaves this message.
    Malformed(WireError),
    /// A `protoc-gen-validate` rule is broken.
    Constraint(Violation),
    /// The message has no field with this number.
    UnknownField {
        /// The message type.
        message: Message,
        /// The number on the wire.
        number: u32,
    },
    /// An `Any` or `TypedStruct` holds a type that the schema does not have.
    UnknownType {
        /// Its type URL.
        url: &'a str,
    },
    /// A deprecated field is set, or a field to a deprecated value.
    Deprecated {
        /// The message type.
        message: Message,
        /// The field.
        field: Field,
        /// The value, when it is not the field that is deprecated.
        value: Option<EnumValue>,
    },
    /// The ledger refuses the field.
    Rejected {
        /// Why.
        reason: &'static str,
    },
    /// The ledger refuses the type that an `Any` holds.
    RejectedType {
        /// The type.
        message: Message,
        /// Why; empty when the ledger does not know the type.
        reason: &'static str,
    },
    /// The field is accepted and has no effect.
    Ignored {
        /// Why.
        reason: &'static str,
    },
    /// The ledger does not know the field.
    Unclaimed,
    /// The value of a `TypedStruct` is not the message it says it is.
    TypedStruct(&'a ConfigError),
}

/// The reason, without the path.
impl fmt::Display for Finding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(error) => write!(f, "not a protobuf message: {error}"),
            Self::Constraint(violation) => violation.fmt(f),
            Self::UnknownField { message, number } => {
                write!(f, "{} has no field with number {number}", message.full_name())
            }
            Self::UnknownType { url } => write!(f, "unknown type {url:?}"),
            Self::Deprecated { message, field, value: None } => {
                write!(f, "Using deprecated option '{}.{}'", message.full_name(), field.name())?;
                if field.is_disallowed() { f.write_str(", which is refused by default") } else { Ok(()) }
            }
            Self::Deprecated { message, field, value: Some(value) } => {
                let (value, disallowed) = (value.name(), value.is_disallowed());
                let (message, field) = (message.full_name(), field.name());
                write!(f, "Using deprecated value {value} for enum '{message}.{field}'")?;
                if disallowed { f.write_str(", which is refused by default") } else { Ok(()) }
            }
            Self::Rejected { reason } => write!(f, "not supported: {reason}"),
            Self::RejectedType { message, reason: "" } => {
                write!(f, "{} is not accepted here", message.full_name())
            }
            Self::RejectedType { message, reason } => {
                write!(f, "{} is not supported: {reason}", message.full_name())
            }
            Self::Ignored { reason } => write!(f, "ignored: {reason}"),
            Self::Unclaimed => f.write_str("not supported: the ledger has no entry for it"),
            Self::TypedStruct(error) => error.fmt(f),
        }
    }
}

/// Takes the findings of a walk.
pub trait Visitor {
    /// Takes one finding; an error ends the walk.
    fn found(&mut self, place: &Place<'_>, finding: &Finding<'_>) -> Result<(), ConfigError>;
}

/// Walks `bytes`, a `message` on the wire, and reports to `visitor` until that returns an error.
pub fn walk(message: Message, bytes: &[u8], visitor: &mut dyn Visitor) -> Result<(), ConfigError> {
    let mode = Mode { ledger: true };
    Walker { visitor }.message(message, bytes, &Place::root(), 0, mode)
}

struct Walker<'v> {
    visitor: &'v mut dyn Visitor,
}

/// What is looked for below a place.
#[derive(Clone, Copy)]
struct Mode {
    /// Off below a field that is ignored or unclaimed: that was said once.
    ledger: bool,
}

/// The fields that a message sets.
#[derive(Clone, Copy, Default)]
struct Seen([u64; 4]);

impl Seen {
    #[inline]
    fn insert(&mut self, ordinal: usize) -> bool {
        let word = &mut self.0[ordinal / 64 % 4];
        let bit = 1 << (ordinal % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    #[inline]
    fn contains(&self, ordinal: usize) -> bool {
        self.0[ordinal / 64 % 4] & (1 << (ordinal % 64)) != 0
    }
}

impl Walker<'_> {
    fn message(
        &mut self,
        message: Message,
        bytes: &[u8],
        place: &Place<'_>,
        depth: usize,
        mode: Mode,
    ) -> Result<(), ConfigError> {
        if depth > DEPTH_LIMIT {
            return self.visitor.found(place, &Finding::Malformed(WireError::Depth));
        }
        let (seen, repeated) = match survey(message, bytes) {
            Ok(found) => found,
            Err(error) => return self.visitor.found(place, &Finding::Malformed(error)),
        };
        if repeated {
            // Legal, and written by nobody: the parts are one value only together.
            return match merge::canonical(message, bytes, depth) {
                Ok(whole) => self.message(message, &whole, place, depth + 1, mode),
                Err(error) => self.visitor.found(place, &Finding::Malformed(error)),
            };
        }
        let mut reader = Reader::new(bytes);
        // The survey has read the same records.
        while let Ok(Some(record)) = reader.next() {
            let Some(field) = message.field(record.number) else {
                let finding = Finding::UnknownField { message, number: record.number };
                self.visitor.found(&place.record(bytes, record.start, message, None), &finding)?;
                continue;
            };
            let place = place.record(bytes, record.start, message, Some(field));
            self.field(message, field, record.value, &place, depth, mode)?;
        }
        if !message.rules_disabled() {
            self.whole(message, bytes, &seen, place)?;
        }
        match message.kind() {
            Kind::Any => self.any(bytes, place, depth, mode),
            Kind::TypedStruct => self.typed_struct(bytes, place, depth, mode),
            _ => Ok(()),
        }
    }

    fn field(
        &mut self,
        message: Message,
        field: Field,
        value: Raw<'_>,
        place: &Place<'_>,
        depth: usize,
        mut mode: Mode,
    ) -> Result<(), ConfigError> {
        if mode.ledger {
            match ledger::state(field) {
                State::Implemented => {}
                State::Rejected(reason) => {
                    return self.visitor.found(place, &Finding::Rejected { reason });
                }
                State::Ignored(reason) => {
                    self.visitor.found(place, &Finding::Ignored { reason })?;
                    mode.ledger = false;
                }
                State::Unclaimed => {
                    self.visitor.found(place, &Finding::Unclaimed)?;
                    mode.ledger = false;
                }
            }
        }
        if field.is_deprecated() {
            self.visitor.found(place, &Finding::Deprecated { message, field, value: None })?;
        }
        let mut program = if message.rules_disabled() { 0 } else { field.rules() };
        if program != 0 && field.is_map() {
            return self.map_entry(message, field, value, place, depth, mode);
        }
        if program != 0 && field.is_repeated() {
            program = program::items(program);
        }
        match (field.ty(), value) {
            (Type::Message, Raw::Bytes(bytes)) => {
                let inner = field.message().expect("the type is a message");
                let mut skip = false;
                if program != 0 {
                    let verdict = rules::check_message(program, inner, bytes);
                    skip = verdict.skip;
                    self.verdict(message, field, place, verdict.fault)?;
                }
                if skip {
                    return Ok(());
                }
                match inner.kind() {
                    // Nothing below can be wrong but the bytes.
                    Kind::Wrapper | Kind::Duration | Kind::Timestamp => match survey(inner, bytes) {
                        Ok(_) => Ok(()),
                        Err(error) => self.visitor.found(place, &Finding::Malformed(error)),
                    },
                    _ => self.message(inner, bytes, place, depth + 1, mode),
                }
            }
            (Type::String | Type::Bytes, Raw::Bytes(bytes)) => {
                let fault = rules::check_scalar(program, field, value);
                self.verdict(message, field, place, fault)?;
                if field.ty() == Type::String && std::str::from_utf8(bytes).is_err() {
                    return self.visitor.found(place, &Finding::Malformed(WireError::Utf8));
                }
                Ok(())
            }
            (_, Raw::Bytes(packed)) => {
                let mut reader = Reader::new(packed);
                while let Ok(Some(raw)) = next_packed(field.ty(), &mut reader) {
                    self.scalar(message, field, raw, program, place)?;
                }
                Ok(())
            }
            (_, raw) => self.scalar(message, field, raw, program, place),
        }
    }

    fn scalar(
        &mut self,
        message: Message,
        field: Field,
        raw: Raw<'_>,
        program: u32,
        place: &Place<'_>,
    ) -> Result<(), ConfigError> {
        if program != 0 {
            self.verdict(message, field, place, rules::check_scalar(program, field, raw))?;
        }
        if let (Type::Enum, Raw::Varint(number)) = (field.ty(), raw) {
            let item = field.enumeration().expect("the type is an enum");
            if let Some(value) = item.value(number as i32)
                && value.is_deprecated()
            {
                let finding = Finding::Deprecated { message, field, value: Some(value) };
                self.visitor.found(place, &finding)?;
            }
        }
        Ok(())
    }

    /// An entry of a map whose keys or values have rules.
    fn map_entry(
        &mut self,
        message: Message,
        field: Field,
        value: Raw<'_>,
        place: &Place<'_>,
        depth: usize,
        mode: Mode,
    ) -> Result<(), ConfigError> {
        let (Some(entry), Raw::Bytes(bytes)) = (field.message(), value) else { return Ok(()) };
        let (keys, values) = program::map_sides(field.rules());
        for (side, program) in [(1, keys), (2, values)] {
            let Some(member) = entry.field(side).filter(|_| program != 0) else { continue };
            let raw = match last_value(bytes, side) {
                Ok(raw) => raw,
                Err(error) => return self.visitor.found(place, &Finding::Malformed(error)),
            };
            let fault = match (member.message(), raw) {
                (Some(inner), Some(Raw::Bytes(bytes))) => rules::check_message(program, inner, bytes).fault,
                (Some(_), _) => None,
                (None, raw) => rules::check_scalar(
                    program,
                    member,
                    raw.unwrap_or_else(|| rules::default_raw(member.ty())),
                ),
            };
            self.verdict(message, field, place, fault)?;
        }
        self.message(entry, bytes, place, depth + 1, mode)
    }

    /// The rules about what a message does not set, and about its lists as a whole.
    fn whole(
        &mut self,
        message: Message,
        bytes: &[u8],
        seen: &Seen,
        place: &Place<'_>,
    ) -> Result<(), ConfigError> {
        for (ordinal, field) in message.checks() {
            let present = seen.contains(ordinal);
            let fault = if field.is_repeated() {
                rules::check_list(field, bytes, present)
            } else if present {
                None
            } else {
                rules::check_absent(field)
            };
            if fault.is_some() {
                self.verdict(message, field, &place.absent(message, field), fault)?;
            }
        }
        for oneof in 0..message.oneof_count() {
            if !message.oneof_required(oneof) {
                continue;
            }
            let set = message
                .fields()
                .enumerate()
                .any(|(ordinal, field)| field.oneof() == Some(oneof) && seen.contains(ordinal));
            if !set {
                let violation = Violation::oneof(message, oneof);
                self.visitor.found(place, &Finding::Constraint(violation))?;
            }
        }
        Ok(())
    }

    fn any(
        &mut self,
        bytes: &[u8],
        place: &Place<'_>,
        depth: usize,
        mut mode: Mode,
    ) -> Result<(), ConfigError> {
        let (url, content) = match any_parts(bytes) {
            Ok(parts) => parts,
            Err(error) => return self.visitor.found(place, &Finding::Malformed(error)),
        };
        if url.is_empty() && content.is_empty() {
            return Ok(());
        }
        let Some(inner) = self.packed(url, place, &mut mode)? else {
            return Ok(());
        };
        self.message(inner, content, place, depth + 1, mode)
    }

    /// The message that an `Any` or a `TypedStruct` holds. The ledger says nothing of the fields of one it refuses.
    fn packed(
        &mut self,
        url: &str,
        place: &Place<'_>,
        mode: &mut Mode,
    ) -> Result<Option<Message>, ConfigError> {
        let Some(inner) = Message::find_by_url(url) else {
            self.visitor.found(place, &Finding::UnknownType { url })?;
            return Ok(None);
        };
        if mode.ledger && !inner.is_root() {
            let reason = match ledger::message_state(inner) {
                State::Rejected(reason) => reason,
                _ => "",
            };
            self.visitor.found(place, &Finding::RejectedType { message: inner, reason })?;
            mode.ledger = false;
        }
        Ok(Some(inner))
    }

    fn typed_struct(
        &mut self,
        bytes: &[u8],
        place: &Place<'_>,
        depth: usize,
        mut mode: Mode,
    ) -> Result<(), ConfigError> {
        // A TypedStruct has the field numbers of an Any.
        let (url, value) = match any_parts(bytes) {
            Ok(parts) => parts,
            Err(error) => return self.visitor.found(place, &Finding::Malformed(error)),
        };
        let Some(inner) = self.packed(url, place, &mut mode)? else {
            return Ok(());
        };
        match typed_struct_to_wire(value, inner) {
            Ok(wire) => self.message(inner, &wire, place, depth + 1, mode),
            Err(error) => self.visitor.found(place, &Finding::TypedStruct(&error)),
        }
    }

    #[inline]
    fn verdict(
        &mut self,
        message: Message,
        field: Field,
        place: &Place<'_>,
        fault: Option<violation::Fault>,
    ) -> Result<(), ConfigError> {
        match fault {
            None => Ok(()),
            Some(fault) => {
                let violation = Violation::field(message, field, place.subscript(), fault);
                self.visitor.found(place, &Finding::Constraint(violation))
            }
        }
    }
}

/// Checks that every record reads as its field, and finds which fields are set; also whether a field that holds
/// one value stands twice.
fn survey(message: Message, bytes: &[u8]) -> Result<(Seen, bool), WireError> {
    let mut seen = Seen::default();
    let mut repeated = false;
    let mut oneofs = 0_u64;
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        let Some(field) = message.field(record.number) else { continue };
        check_wire_type(field, record.value)?;
        if !seen.insert(message.ordinal(field)) && !field.is_repeated() {
            repeated = true;
        }
        if let Some(oneof) = field.oneof() {
            let bit = 1 << (oneof % 64);
            repeated |= oneofs & bit != 0;
            oneofs |= bit;
        }
    }
    Ok((seen, repeated))
}

fn check_wire_type(field: Field, raw: Raw<'_>) -> Result<(), WireError> {
    let fits = match (field.ty(), raw) {
        (Type::String | Type::Bytes | Type::Message, Raw::Bytes(_))
        | (Type::Double | Type::Fixed64 | Type::Sfixed64, Raw::Fixed64(_))
        | (Type::Float | Type::Fixed32 | Type::Sfixed32, Raw::Fixed32(_)) => true,
        (Type::String | Type::Bytes | Type::Message, _) => false,
        (ty, Raw::Bytes(packed)) if field.is_repeated() => {
            let mut reader = Reader::new(packed);
            while next_packed(ty, &mut reader)?.is_some() {}
            true
        }
        (Type::Double | Type::Fixed64 | Type::Sfixed64 | Type::Float | Type::Fixed32 | Type::Sfixed32, _) => {
            false
        }
        (_, Raw::Varint(_)) => true,
        _ => false,
    };
    if fits { Ok(()) } else { Err(WireError::WireType) }
}

/// The next element of a packed list.
fn next_packed<'a>(ty: Type, reader: &mut Reader<'a>) -> Result<Option<Raw<'a>>, WireError> {
    if reader.is_empty() {
        return Ok(None);
    }
    crate::render::packed_value(ty, reader).map(Some)
}

/// The last value of a field in a message.
fn last_value(bytes: &[u8], number: u32) -> Result<Option<Raw<'_>>, WireError> {
    let mut last = None;
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        if record.number == number {
            last = Some(record.value);
        }
    }
    Ok(last)
}

/// The bytes of the rules section from `offset` on.
fn rule_bytes(offset: u32) -> &'static [u8] {
    &BLOB[crate::table::section::RULES + offset as usize..]
}
