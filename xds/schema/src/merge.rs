//! Merging messages on the wire.
//!
//! By definition of the wire format the concatenation of two messages is their merge (`MergeFrom`): the later
//! scalar wins, messages merge, lists append, the later value of a map's key wins, the later member of a oneof
//! unsets the others. [`merge`] also brings the result into the form an encoder would write.

use crate::message::{Field, Message, Type};
use crate::wire::{DEPTH_LIMIT, Raw, Reader, WireError, put_bytes};

/// Merges `overlay` over `base`, as Envoy does with `--config-yaml` over the configuration file.
pub fn merge(message: Message, base: &[u8], overlay: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut both = Vec::with_capacity(base.len() + overlay.len());
    both.extend_from_slice(base);
    both.extend_from_slice(overlay);
    canonical(message, &both, 0)
}

/// The same message with every field that holds one value once, in the order of field numbers; fields that the
/// schema does not know stand at the end.
pub(crate) fn canonical(message: Message, bytes: &[u8], depth: usize) -> Result<Vec<u8>, WireError> {
    if depth > DEPTH_LIMIT {
        return Err(WireError::Depth);
    }
    let mut parts: Vec<Vec<Part<'_>>> = vec![Vec::new(); message.field_count()];
    let mut unknown = Vec::new();
    let mut reader = Reader::new(bytes);
    while let Some(record) = reader.next()? {
        let whole = &bytes[record.start..reader.position()];
        let Some(field) = message.field(record.number) else {
            unknown.extend_from_slice(whole);
            continue;
        };
        if let Some(oneof) = field.oneof() {
            for (other, values) in message.fields().zip(&mut parts) {
                if other != field && other.oneof() == Some(oneof) {
                    values.clear();
                }
            }
        }
        parts[message.ordinal(field)].push(Part { value: record.value, whole });
    }
    let mut out = Vec::with_capacity(bytes.len());
    for (field, values) in message.fields().zip(&parts) {
        put_field(field, values, &mut out, depth)?;
    }
    out.extend(unknown);
    Ok(out)
}

/// One record: its value, and its bytes with the tag.
#[derive(Clone, Copy)]
struct Part<'a> {
    value: Raw<'a>,
    whole: &'a [u8],
}

fn put_field(field: Field, values: &[Part<'_>], out: &mut Vec<u8>, depth: usize) -> Result<(), WireError> {
    let Some((last, earlier)) = values.split_last() else { return Ok(()) };
    if field.is_map() {
        let keys: Vec<&[u8]> = values.iter().map(|part| entry_key(part.value)).collect::<Result<_, _>>()?;
        let mut winner = std::collections::HashMap::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            winner.insert(*key, index);
        }
        for (index, (key, part)) in keys.iter().zip(values).enumerate() {
            if winner[key] == index {
                out.extend_from_slice(part.whole);
            }
        }
        return Ok(());
    }
    if field.is_repeated() {
        for part in values {
            out.extend_from_slice(part.whole);
        }
        return Ok(());
    }
    if field.ty() != Type::Message || earlier.is_empty() {
        out.extend_from_slice(last.whole);
        return Ok(());
    }
    let inner = field.message().expect("the type is a message");
    let mut all = Vec::new();
    for part in values {
        let Raw::Bytes(bytes) = part.value else { return Err(WireError::WireType) };
        all.extend_from_slice(bytes);
    }
    put_bytes(out, field.number(), &canonical(inner, &all, depth + 1)?);
    Ok(())
}

/// The bytes that stand for the key in a map's entry; empty for the default key.
fn entry_key(value: Raw<'_>) -> Result<&[u8], WireError> {
    let Raw::Bytes(entry) = value else { return Err(WireError::WireType) };
    let mut key: &[u8] = &[];
    let mut reader = Reader::new(entry);
    while let Some(record) = reader.next()? {
        if record.number == 1 {
            key = match record.value {
                Raw::Bytes(text) => text,
                _ => &entry[record.start + 1..reader.position()],
            };
        }
    }
    // A number key of 0 may be written or left out.
    Ok(if key == [0] { &[] } else { key })
}
