//! Private keys under a password: PKCS #8 with PBES2 (RFC 8018), as `openssl genpkey` and `openssl pkcs8` write it.

use std::num::NonZeroU32;

use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::pbkdf2;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::asn1_rs::{Any, FromDer as _, Tag};

const BEGIN: &str = "-----BEGIN ENCRYPTED PRIVATE KEY-----";
const END: &str = "-----END ENCRYPTED PRIVATE KEY-----";

/// 1.2.840.113549.1.5.13.
const PBES2: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0d";
/// 1.2.840.113549.1.5.12.
const PBKDF2: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c";
/// 1.2.840.113549.2: the HMACs are below it.
const DIGESTS: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x02";
/// 2.16.840.1.101.3.4.1: AES in all its modes is below it.
const AES: &[u8] = b"\x60\x86\x48\x01\x65\x03\x04\x01";

/// More rounds than this would hold up the main thread for more than a second; tools use a few thousand up to a million.
const MAX_ITERATIONS: u32 = 2_000_000;

/// The key in a PEM file that holds an encrypted one; nothing when it holds none.
///
/// # Errors
/// Why it cannot be read.
pub(crate) fn decrypt(pem: &[u8], password: &[u8]) -> Option<Result<PrivateKeyDer<'static>, &'static str>> {
    let text = str::from_utf8(pem).ok()?;
    let (_, body) = text.split_once(BEGIN)?;
    let body = body.split_once(END).map_or("", |(body, _)| body);
    Some(decrypt_body(body, password))
}

fn decrypt_body(body: &str, password: &[u8]) -> Result<PrivateKeyDer<'static>, &'static str> {
    let text: String = body.split_ascii_whitespace().collect();
    let der = BASE64_STANDARD.decode(text).map_err(|_| "BAD_BASE64_DECODE")?;
    let (algorithm, mut data) = parse(&der).ok_or("DECODE_ERROR")?;
    let scheme = Scheme::parse(algorithm)?;
    let mut key = vec![0; scheme.cipher.key_len];
    pbkdf2::derive(scheme.digest, scheme.iterations, scheme.salt, password, &mut key);
    let key = UnboundCipherKey::new(scheme.cipher.algorithm, &key);
    let key = key.and_then(PaddedBlockDecryptingKey::cbc_pkcs7).map_err(|_| "DECODE_ERROR")?;
    // Padding that does not fit is what a wrong password looks like.
    let plain = key
        .decrypt(&mut data, DecryptionContext::Iv128(scheme.iv))
        .map_err(|_| "BAD_DECRYPT: wrong password?")?;
    Ok(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(plain.to_vec())))
}

/// How a key is encrypted.
struct Scheme<'a> {
    digest: pbkdf2::Algorithm,
    iterations: NonZeroU32,
    salt: &'a [u8],
    cipher: Cipher,
    iv: FixedLength<16>,
}

struct Cipher {
    algorithm: &'static aws_lc_rs::cipher::Algorithm,
    key_len: usize,
}

impl<'a> Scheme<'a> {
    fn parse(algorithm: &'a [u8]) -> Result<Self, &'static str> {
        let malformed = "DECODE_ERROR";
        let (scheme, rest) = take(algorithm, Tag::Oid).ok_or(malformed)?;
        if scheme != PBES2 {
            return Err("UNSUPPORTED_ALGORITHM: only PBES2 is supported");
        }
        let (parameters, _) = take(rest, Tag::Sequence).ok_or(malformed)?;
        let (derivation, rest) = take(parameters, Tag::Sequence).ok_or(malformed)?;
        let (encryption, _) = take(rest, Tag::Sequence).ok_or(malformed)?;

        let (function, rest) = take(derivation, Tag::Oid).ok_or(malformed)?;
        if function != PBKDF2 {
            return Err("UNSUPPORTED_KEY_DERIVATION_FUNCTION: only PBKDF2 is supported");
        }
        let (parameters, _) = take(rest, Tag::Sequence).ok_or(malformed)?;
        let (salt, rest) = take(parameters, Tag::OctetString).ok_or(malformed)?;
        let (iterations, rest) = take(rest, Tag::Integer).ok_or(malformed)?;
        let iterations = iterations.iter().try_fold(0_u32, |number, byte| {
            Some(number.checked_mul(256)? + u32::from(*byte)).filter(|number| *number <= MAX_ITERATIONS)
        });
        // The length of the key may be given; the cipher knows it.
        let rest = take(rest, Tag::Integer).map_or(rest, |(_, rest)| rest);
        let digest = match take(rest, Tag::Sequence) {
            None => pbkdf2::PBKDF2_HMAC_SHA1,
            Some((digest, _)) => {
                let (oid, _) = take(digest, Tag::Oid).ok_or(malformed)?;
                match oid.strip_prefix(DIGESTS) {
                    Some([7]) => pbkdf2::PBKDF2_HMAC_SHA1,
                    Some([9]) => pbkdf2::PBKDF2_HMAC_SHA256,
                    Some([10]) => pbkdf2::PBKDF2_HMAC_SHA384,
                    Some([11]) => pbkdf2::PBKDF2_HMAC_SHA512,
                    _ => return Err("UNSUPPORTED_PRF: only HMAC with SHA-1 and SHA-2 is supported"),
                }
            }
        };
        let (cipher, rest) = take(encryption, Tag::Oid).ok_or(malformed)?;
        let (algorithm, key_len) = match cipher.strip_prefix(AES) {
            Some([2]) => (&AES_128, 16),
            Some([22]) => (&AES_192, 24),
            Some([42]) => (&AES_256, 32),
            _ => return Err("UNKNOWN_CIPHER: only AES in CBC mode is supported"),
        };
        let (iv, _) = take(rest, Tag::OctetString).ok_or(malformed)?;
        let iv: [u8; 16] = iv.try_into().map_err(|_| malformed)?;
        Ok(Self {
            digest,
            iterations: iterations.and_then(NonZeroU32::new).ok_or("BAD_ITERATION_COUNT")?,
            salt,
            cipher: Cipher { algorithm, key_len },
            iv: FixedLength::from(iv),
        })
    }
}

/// The algorithm and the encrypted data of an `EncryptedPrivateKeyInfo`.
fn parse(der: &[u8]) -> Option<(&[u8], Vec<u8>)> {
    let (info, _) = take(der, Tag::Sequence)?;
    let (algorithm, rest) = take(info, Tag::Sequence)?;
    let (data, _) = take(rest, Tag::OctetString)?;
    Some((algorithm, data.to_vec()))
}

/// The content of the element in front, if it has this tag, and what follows it.
fn take(der: &[u8], tag: Tag) -> Option<(&[u8], &[u8])> {
    let (rest, any) = Any::from_der(der).ok()?;
    (any.tag() == tag).then_some((any.data, rest))
}

#[cfg(test)]
mod tests {
    use super::decrypt;
    use base64::Engine as _;
    use base64::prelude::BASE64_STANDARD;

    /// Made by `openssl genpkey -algorithm ED25519 -aes-NNN-cbc -pass pass:PASSWORD` and `openssl pkcs8 -topk8`.
    #[test]
    fn what_openssl_writes_is_read() {
        let rows = [
            "MIGbMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAg8CcZA9j0PXQICCAAw\n\
             DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEH2WldwbGRo0m8GrKxE8Xh0EQBLh\n\
             o1mejsGJQ/aANEAmcD2NOn7OtoqlRACHXxub9uYKih8qwvdy9MCqQAVmi+ZiwvqZ\n\
             Y9eJ6xQCR4oRdcSyq0g=",
            "MIGbMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgKhvl5yivh8gICCAAw\n\
             DAYIKoZIhvcNAgsFADAdBglghkgBZQMEARYEEEJItdzWBnnrr7Q2x29R4noEQFym\n\
             S4/O7xDApXPNJQNLaJF0DMEtxk3iHu8DDvT7y6ocdktzJTtQ4TfVpp1gbrpIkPJJ\n\
             bxs+REKAJ7xdfrluGrc=",
            "MIGNMEkGCSqGSIb3DQEFDTA8MBsGCSqGSIb3DQEFDDAOBAicrmXyLGkZAQICCAAw\n\
             HQYJYIZIAWUDBAECBBALWMtEc3lX+SakPY68guNiBEDXeG19dxR1aW/Bkvoeq1aM\n\
             NfdBQ8ENhJ5aKkL/NHPRPSM5cqcyXx0XarPTxP7YtnyBJ15caRAnn6FOXXCgOiLC",
        ];
        let plain = BASE64_STANDARD
            .decode("MC4CAQAwBQYDK2VwBCIEIE0RjywIrliUN97iTbXM76LkX/cBjvuOFT/EyFOtpuWD")
            .unwrap();
        let pem = |body: &str| {
            format!(
                "# a key\n-----BEGIN ENCRYPTED PRIVATE KEY-----\n{body}\n-----END ENCRYPTED PRIVATE KEY-----\n"
            )
        };
        for body in rows {
            let key = decrypt(pem(body).as_bytes(), b"secret").unwrap().unwrap();
            assert_eq!(key.secret_der(), plain, "{body}");
            // One wrong password in 256 leaves padding that fits, and then a key that is none.
            let wrong = decrypt(pem(body).as_bytes(), b"Secret").unwrap();
            assert!(wrong.is_err_and(|cause| cause.starts_with("BAD_DECRYPT")), "{body}");
        }
        for (body, cause) in [
            (
                "MIGKME4GCSqGSIb3DQEFDTBBMCkGCSqGSIb3DQEFDDAcBAjKnK/u4WKiagICCAAwDAYIKoZIhvcNAgkFADAUBggqhkiG9w0DBwQIjRwHNODV/0IEOIGOtr+WwlvfOUWNbf9wq5EcWbpPkop4FmAdlOQ4E32otm/6HPWXYxGq9OVH+s9FFsi/oltENuGC",
                "UNKNOWN_CIPHER",
            ),
            (
                "MIGTME8GCSqGSIb3DQEFDTBCMCEGCSsGAQQB2kcECzAUBAjdnE4lYK9nSgICQAACAQgCAQEwHQYJYIZIAWUDBAEqBBCaIlqn70AFbEciyOypYYtYBECP4Q3vIgZ0PxDDXapybUgNCUAwerM7sk851GDxbT2NzoOIFtNBslkBERpFesQOiVwAqZQL6rHvqU+MDlu4SUlm",
                "UNSUPPORTED_KEY_DERIVATION_FUNCTION",
            ),
        ] {
            assert!(decrypt(pem(body).as_bytes(), b"secret").unwrap().unwrap_err().starts_with(cause));
        }
    }

    #[test]
    fn others_are_named() {
        assert!(decrypt(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", b"x").is_none());
        for (body, cause) in [("!", "BAD_BASE64_DECODE"), ("AAAA", "DECODE_ERROR"), ("MAA=", "DECODE_ERROR")]
        {
            let pem = format!(
                "-----BEGIN ENCRYPTED PRIVATE KEY-----\n{body}\n-----END ENCRYPTED PRIVATE KEY-----\n"
            );
            assert_eq!(decrypt(pem.as_bytes(), b"x").unwrap().unwrap_err(), cause, "{body}");
        }
    }
}
