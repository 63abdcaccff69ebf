//! Protobuf's wire format, written straight into a buffer: an entry has some thirty strings, and a message of its own for
//! each would cost as many allocations for every request.

/// A number that is not its default.
pub(super) fn number(out: &mut Vec<u8>, field: u32, value: u64) {
    if value != 0 {
        present(out, field, value);
    }
}

/// A number, whatever it is: members of a `oneof`.
pub(super) fn present(out: &mut Vec<u8>, field: u32, value: u64) {
    varint(out, u64::from(field << 3));
    varint(out, value);
}

/// A `double`.
pub(super) fn double(out: &mut Vec<u8>, field: u32, value: f64) {
    varint(out, u64::from(field << 3 | 1));
    out.extend_from_slice(&value.to_le_bytes());
}

/// Bytes, or text that is known to be UTF-8; nothing when there are none.
pub(super) fn bytes(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    if !value.is_empty() {
        any_bytes(out, field, value);
    }
}

/// The same, be it empty: keys and values of maps, members of a `oneof`.
pub(super) fn any_bytes(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    varint(out, u64::from(field << 3 | 2));
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// Text from a peer: a byte that is not UTF-8 becomes `!`, as Envoy has it.
pub(super) fn text(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    match str::from_utf8(value) {
        Ok(_) => bytes(out, field, value),
        Err(_) => bytes(out, field, &sanitized(value)),
    }
}

fn sanitized(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    for chunk in value.utf8_chunks() {
        out.extend_from_slice(chunk.valid().as_bytes());
        out.resize(out.len() + chunk.invalid().len(), b'!');
    }
    out
}

/// A message, which may be empty; or text that is written piece by piece.
pub(super) fn message(out: &mut Vec<u8>, field: u32, write: impl FnOnce(&mut Vec<u8>)) {
    varint(out, u64::from(field << 3 | 2));
    // The length comes first and is known last: mostly it takes the one byte that is left for it.
    let start = out.len();
    out.push(0);
    write(out);
    let length = out.len() - start - 1;
    let (mut prefix, mut width, mut rest) = ([0; 10], 0, length);
    while rest >= 0x80 {
        prefix[width] = rest as u8 | 0x80;
        rest >>= 7;
        width += 1;
    }
    prefix[width] = rest as u8;
    if width > 0 {
        out.extend_from_slice(&prefix[..width]);
        out.copy_within(start + 1..start + 1 + length, start + 1 + width);
    }
    out[start..=start + width].copy_from_slice(&prefix[..=width]);
}

/// A message that is left out when there is nothing in it.
pub(super) fn message_unless_empty(out: &mut Vec<u8>, field: u32, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    message(out, field, write);
    if out.last() == Some(&0) && out.len() - start <= 3 {
        out.truncate(start);
    }
}

/// An entry of a map from text to text.
pub(super) fn pair(out: &mut Vec<u8>, field: u32, key: &[u8], value: &[u8]) {
    message(out, field, |out| {
        text(out, 1, key);
        text(out, 2, value);
    });
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
