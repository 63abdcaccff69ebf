//! JSON as Envoy writes it.

use std::io::Write as _;

use waystation_filter_api::value::Value;

/// Appends `text` as a JSON string with its quotes.
pub(super) fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    put_escaped(out, text);
    out.push(b'"');
}

/// Appends `text` escaped for a place inside a JSON string.
///
/// Text that is not UTF-8 is escaped byte by byte in another style, quotes and backslashes too: Envoy does not try to
/// tell its good parts from its bad ones.
pub(super) fn put_escaped(out: &mut Vec<u8>, text: &[u8]) {
    if !text.iter().any(|byte| needs_escape(*byte) || !byte.is_ascii()) {
        return out.extend_from_slice(text);
    }
    let utf8 = str::from_utf8(text).is_ok();
    for byte in text {
        match byte {
            b'"' if utf8 => out.extend_from_slice(b"\\\""),
            b'\\' if utf8 => out.extend_from_slice(b"\\\\"),
            b'\n' if utf8 => out.extend_from_slice(b"\\n"),
            b'\r' if utf8 => out.extend_from_slice(b"\\r"),
            b'\t' if utf8 => out.extend_from_slice(b"\\t"),
            0x08 if utf8 => out.extend_from_slice(b"\\b"),
            0x0c if utf8 => out.extend_from_slice(b"\\f"),
            byte if needs_escape(*byte) || !utf8 && !byte.is_ascii() => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
            }
            byte => out.push(*byte),
        }
    }
}

/// Escapes what was appended since `start`, as [`put_escaped`] does.
pub(super) fn escape_from(out: &mut Vec<u8>, start: usize) {
    if out[start..].iter().any(|byte| needs_escape(*byte) || !byte.is_ascii()) {
        let text = out.split_off(start);
        put_escaped(out, &text);
    }
}

fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// Appends a value.
pub(super) fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) => put_number(out, *number),
        Value::String(text) => put_string(out, text.as_bytes()),
        Value::List(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                put_value(out, item);
            }
            out.push(b']');
        }
        Value::Struct(fields) => {
            out.push(b'{');
            for (i, (key, value)) in fields.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                put_string(out, key.as_bytes());
                out.push(b':');
                put_value(out, value);
            }
            out.push(b'}');
        }
    }
}

/// Appends the shortest text that reads back as `number`, in whichever of fixed and scientific notation is shorter:
/// C++'s `std::to_chars`.
fn put_number(out: &mut Vec<u8>, number: f64) {
    /// Below this a whole number has fewer digits than its scientific form can save, and fits `i128`.
    const FIXED_LIMIT: f64 = 1e30;
    if !number.is_finite() {
        return out.extend_from_slice(b"null");
    }
    let start = out.len();
    let _ = write!(out, "{number:e}");
    let exponent_at =
        out[start..].iter().position(|byte| *byte == b'e').map_or(out.len(), |at| start + at + 1);
    let exponent = out.split_off(exponent_at);
    let (sign, digits) = match exponent.strip_prefix(b"-") {
        Some(digits) => (b'-', digits),
        None => (b'+', &exponent[..]),
    };
    out.push(sign);
    if digits.len() < 2 {
        out.push(b'0');
    }
    out.extend_from_slice(digits);
    let scientific_len = out.len() - start;
    if number.abs() < FIXED_LIMIT {
        if number.fract() == 0.0 && number != 0.0 {
            // Exact: past 2^53 the shortest digits would be padded with zeros.
            let _ = write!(out, "{}", number as i128);
        } else {
            let _ = write!(out, "{number}");
        }
        let fixed_len = out.len() - start - scientific_len;
        if fixed_len <= scientific_len {
            out.drain(start..start + scientific_len);
        } else {
            out.truncate(start + scientific_len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(put: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        put(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_as_envoy_writes_them() {
        for (number, expected) in [
            (1e20, "1e+20"),
            (1e15, "1e+15"),
            (123_456_789_012_345_678.0, "123456789012345680"),
            (9_007_199_254_740_993.0, "9007199254740992"),
            (0.300_000_000_000_000_04, "0.30000000000000004"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "1e-04"),
            (0.001, "0.001"),
            (0.1, "0.1"),
            (-0.0, "-0"),
            (0.0, "0"),
            (-5.0, "-5"),
            (f64::MAX, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
            (1e17, "1e+17"),
            (123_456_789.0, "123456789"),
            (2.5e10, "2.5e+10"),
            (18_446_744_073_709_551_616.0, "18446744073709551616"),
            (9_223_372_036_854_775_807.0, "9223372036854775808"),
            (f64::NAN, "null"),
        ] {
            assert_eq!(text(|out| put_number(out, number)), expected);
        }
    }

    #[test]
    fn strings_escape_by_the_character_or_when_not_utf8_by_the_byte() {
        assert_eq!(
            text(|out| put_string(out, "q\"\\/\u{7f}\u{2028}\u{1}\u{8}\u{c}\n\r\t\u{e9}".as_bytes())),
            "\"q\\\"\\\\/\u{7f}\u{2028}\\u0001\\b\\f\\n\\r\\t\u{e9}\""
        );
        assert_eq!(
            text(|out| put_string(out, b"a\"b\\c\td\xc3\xa9/<>\xff")),
            r#""a\u0022b\u005cc\u0009d\u00c3\u00a9/<>\u00ff""#
        );
    }
}
