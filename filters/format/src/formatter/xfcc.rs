//! Values in `x-forwarded-client-cert`.

/// Keys that `%XFCC_VALUE%` knows.
pub(super) const KEYS: &[&str] = &["by", "hash", "cert", "chain", "subject", "uri", "dns"];

/// Appends the first value of `key`: the leftmost element is the original client's. Tells whether there is one.
pub(super) fn write_value(header: &[u8], key: &str, out: &mut Vec<u8>) -> bool {
    for element in unquoted_split(header, b',') {
        for pair in unquoted_split(element, b';') {
            let (name, value) = match pair.iter().position(|byte| *byte == b'=') {
                Some(equals) => (&pair[..equals], &pair[equals + 1..]),
                None => (pair, &[][..]),
            };
            if name.trim_ascii().eq_ignore_ascii_case(key.as_bytes()) {
                unescape(value.trim_ascii(), out);
                return true;
            }
        }
    }
    false
}

/// Splits at `separator` outside quotes. What follows an unmatched quote is not an item.
fn unquoted_split(text: &[u8], separator: u8) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let (mut quoted, mut escaped) = (false, false);
        for (at, byte) in text.iter().enumerate() {
            match byte {
                b'"' if !escaped => quoted = !quoted,
                byte if *byte == separator && !quoted => {
                    rest = Some(&text[at + 1..]);
                    return Some(&text[..at]);
                }
                _ => {}
            }
            escaped = *byte == b'\\' && !escaped;
        }
        rest = None;
        (!quoted).then_some(text)
    })
}

fn unescape(value: &[u8], out: &mut Vec<u8>) {
    let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        match (byte, bytes.as_slice().first()) {
            (b'\\', Some(next @ (b'"' | b'\\'))) => {
                out.push(*next);
                bytes.next();
            }
            _ => out.push(*byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::write_value;

    #[test]
    fn the_leftmost_value_unquoted() {
        let header = br#"By=spiffe://a;Hash=h1;Subject="CN=a,\"O=b;\\";URI=spiffe://b,By=c;Hash=h2;URI=spiffe://c;dns="x""#;
        for (key, expected) in [
            ("uri", Some("spiffe://b")),
            ("hash", Some("h1")),
            ("subject", Some("CN=a,\"O=b;\\")),
            ("dns", Some("x")),
            ("cert", None),
        ] {
            let mut out = Vec::new();
            let found = write_value(header, key, &mut out);
            assert_eq!(found.then(|| String::from_utf8(out).unwrap()).as_deref(), expected);
        }
        assert!(!write_value(b"a=\"b;uri=c", "uri", &mut Vec::new()), "the quote is never closed");
    }
}
