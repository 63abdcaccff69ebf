//! What may stand as a value.

use std::borrow::Cow;

use crate::name::Name;

/// Whether `value` may stand in a header: no NUL, CR or LF, the bytes that could split a message.
#[inline]
pub fn is_valid_value(value: &[u8]) -> bool {
    memchr::memchr3(0, b'\r', b'\n', value).is_none()
}

/// The value as it may stand in a head. What formatters, rewrites and filters make of peers' bytes ends up here: a line end or
/// a NUL would begin another header, and in a pseudo-header a blank would end the request target (request and response
/// splitting). Line ends become blanks; in pseudo-headers such bytes are percent-encoded.
pub(super) fn safe_value<'v>(name: Name<'_>, value: &'v [u8]) -> Cow<'v, [u8]> {
    let ends_target = |byte: &u8| *byte <= b' ' || *byte == 0x7f;
    match name {
        Name::Known(known) if known.is_pseudo() => {
            if !value.iter().any(ends_target) {
                return Cow::Borrowed(value);
            }
            let mut encoded = Vec::with_capacity(value.len() + 16);
            for byte in value {
                if ends_target(byte) {
                    encoded.extend_from_slice(format!("%{byte:02X}").as_bytes());
                } else {
                    encoded.push(*byte);
                }
            }
            encoded.into()
        }
        _ if is_valid_value(value) => Cow::Borrowed(value),
        _ => {
            let blank = |byte: &u8| if matches!(byte, 0 | b'\r' | b'\n') { b' ' } else { *byte };
            value.iter().map(blank).collect::<Vec<u8>>().into()
        }
    }
}

/// A plain decimal number: digits only, no sign, no space, no overflow.
pub(crate) fn parse_decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, byte| match byte {
        b'0'..=b'9' => number.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}
