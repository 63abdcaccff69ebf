//! Percent-encoding of `grpc-message`.

use std::borrow::Cow;

/// Encodes a status message for `grpc-message` as Envoy does: everything but printable ASCII, and `%` and `~`.
pub fn encode_grpc_message(message: &[u8]) -> Cow<'_, [u8]> {
    let plain = |byte: &u8| matches!(byte, b' '..=b'}') && *byte != b'%';
    if message.iter().all(plain) {
        return Cow::Borrowed(message);
    }
    let mut encoded = Vec::with_capacity(message.len() + 16);
    for byte in message {
        if plain(byte) {
            encoded.push(*byte);
        } else {
            const HEX: &[u8; 16] = b"0123456789ABCDEF";
            encoded.extend_from_slice(&[b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
    Cow::Owned(encoded)
}

/// Decodes a `grpc-message`; what is not a valid escape stays as it is.
pub fn decode_grpc_message(encoded: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr(b'%', encoded).is_none() {
        return Cow::Borrowed(encoded);
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let mut decoded = Vec::with_capacity(encoded.len());
    let mut rest = encoded;
    while let Some((first, tail)) = rest.split_first() {
        if let [b'%', high, low, after @ ..] = rest
            && let (Some(high), Some(low)) = (digit(*high), digit(*low))
        {
            decoded.push(high << 4 | low);
            rest = after;
        } else {
            decoded.push(*first);
            rest = tail;
        }
    }
    Cow::Owned(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        assert!(matches!(encode_grpc_message(b"plain text!"), Cow::Borrowed(_)));
        assert_eq!(&encode_grpc_message("a\n%\u{e9}~".as_bytes())[..], b"a%0A%25%C3%A9%7E");
        assert_eq!(&decode_grpc_message(b"a%0A%25%c3%A9%7E")[..], "a\n%\u{e9}~".as_bytes());
        assert_eq!(&decode_grpc_message(b"100%, %4, %zz")[..], b"100%, %4, %zz");
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(&decode_grpc_message(&encode_grpc_message(&all))[..], &all[..]);
    }
}
