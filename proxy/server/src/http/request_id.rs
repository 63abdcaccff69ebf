//! `x-request-id`: a random UUID whose 15th hex digit tells why the request is traced.

/// The length of a UUID's text.
pub(crate) const LEN: usize = 36;

/// A random UUID (RFC 9562 version 4) in text form. Its 15th hex digit, the version, doubles as Envoy's trace bit:
/// `4` is "not traced".
pub(crate) fn generate(random: &mut fastrand::Rng) -> [u8; LEN] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut bytes = random.u128(..).to_be_bytes();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = [b'-'; LEN];
    let mut at = 0;
    for (i, byte) in bytes.into_iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = HEX[usize::from(byte >> 4)];
        text[at + 1] = HEX[usize::from(byte & 15)];
        at += 2;
    }
    text
}

/// A number that all proxies on the way derive alike from the id: the stream's stable random value
/// (Envoy's `UUIDRequestIDExtension::getInteger`, the first eight hex digits).
pub(crate) fn stable_random(id: &[u8]) -> Option<u64> {
    let digits = str::from_utf8(id.get(..8)?).ok()?;
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::{generate, stable_random};

    #[test]
    fn shape_is_that_of_a_version_4_uuid() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..100 {
            let text = generate(&mut random);
            let text = str::from_utf8(&text).unwrap();
            let lens: Vec<usize> = text.split('-').map(str::len).collect();
            assert_eq!(lens, [8, 4, 4, 4, 12], "{text}");
            assert_eq!(text.as_bytes()[14], b'4');
            assert!(b"89ab".contains(&text.as_bytes()[19]), "{text}");
            assert_eq!(stable_random(text.as_bytes()), u64::from_str_radix(&text[..8], 16).ok());
        }
        assert_eq!(stable_random(b"abc"), None);
    }
}
