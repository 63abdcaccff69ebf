//! Bytes that are sent, and bytes that an answer is to hold.

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::health_check::Payload;
use envoy_types::pb::envoy::config::core::v3::health_check::payload::Payload as Kind;
use waystation_schema::{At as _, ConfigError};

/// The bytes of a payload: its text is hexadecimal.
pub(super) fn compile(proto: &Payload) -> Result<Bytes, ConfigError> {
    match &proto.payload {
        None => Err(ConfigError::field("payload", "is required")),
        Some(Kind::Binary(bytes)) => Ok(Bytes::copy_from_slice(bytes)),
        Some(Kind::Text(text)) => unhex(text)
            .map(Bytes::from)
            .ok_or_else(|| ConfigError::field("text", format!("invalid hex string '{text}'"))),
    }
}

pub(super) fn compile_list(protos: &[Payload]) -> Result<Box<[Bytes]>, ConfigError> {
    protos.iter().enumerate().map(|(i, proto)| compile(proto).at(|| format!("receive[{i}]"))).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let (pairs, odd) = text.as_bytes().as_chunks::<2>();
    let byte = |[high, low]: &[u8; 2]| u8::try_from(digit(high)? << 4 | digit(low)?).ok();
    if odd.is_empty() { pairs.iter().map(byte).collect() } else { None }
}

/// Looks for the expected pieces in order, anything between them. It holds less than the next piece.
#[derive(Debug, Default)]
pub(super) struct Search {
    found: usize,
    tail: Vec<u8>,
}

impl Search {
    /// Takes further bytes; whether all pieces have come.
    pub(super) fn feed(&mut self, expected: &[Bytes], bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while let Some(piece) = expected.get(self.found) {
            if self.tail.is_empty() {
                match memchr::memmem::find(rest, piece) {
                    Some(at) => rest = &rest[at + piece.len()..],
                    None => {
                        self.tail.extend_from_slice(
                            &rest[rest.len().saturating_sub(piece.len().saturating_sub(1))..],
                        );
                        return false;
                    }
                }
            } else {
                // The piece may begin in what came before.
                let before = self.tail.len();
                self.tail.extend_from_slice(&rest[..rest.len().min(piece.len() - 1)]);
                match memchr::memmem::find(&self.tail, piece) {
                    Some(at) => rest = &rest[at + piece.len() - before..],
                    None if rest.len() < piece.len() => {
                        let kept = self.tail.len().min(piece.len() - 1);
                        self.tail.drain(..self.tail.len() - kept);
                        return false;
                    }
                    None => {
                        self.tail.clear();
                        continue;
                    }
                }
                self.tail.clear();
            }
            self.found += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{Search, unhex};
    use bytes::Bytes;

    #[test]
    fn text_is_hexadecimal() {
        assert_eq!(unhex("50694E67").as_deref(), Some(&b"PiNg"[..]));
        for bad in ["5", "zz", "+1", "5 "] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }

    /// However the bytes are cut, the search finds what a search in the whole finds.
    #[test]
    fn pieces_are_found_across_reads() {
        for seed in 0..3000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut bytes = |most: usize| -> Vec<u8> {
                (0..random.usize(1..=most)).map(|_| b"ab"[random.usize(..2)]).collect()
            };
            let text = bytes(30);
            let expected: Vec<Bytes> = (0..1 + seed % 3).map(|_| bytes(4).into()).collect();
            let mut at = 0;
            let whole = expected.iter().all(|piece| match memchr::memmem::find(&text[at..], piece) {
                Some(found) => {
                    at += found + piece.len();
                    true
                }
                None => false,
            });
            let mut search = Search::default();
            let mut found = false;
            let mut rest = &text[..];
            while !rest.is_empty() && !found {
                let (now, later) = rest.split_at(random.usize(1..=rest.len()));
                found = search.feed(&expected, now);
                rest = later;
            }
            assert_eq!(found, whole, "seed {seed}: {expected:?} in {text:?}");
        }
    }
}
