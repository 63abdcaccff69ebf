//! `TlsParameters.signature_algorithms`: by which algorithms a peer's signatures are accepted, and ours made.

use std::fmt;
use std::sync::Arc;

use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use rustls_pki_types::SubjectPublicKeyInfoDer;

/// The schemes by BoringSSL's names, in the order of preference. A cheap clone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Schemes(Arc<[SignatureScheme]>);

/// What rustls implements, by the names of the TLS registry and of OpenSSL's lists.
const NAMES: [(SignatureScheme, &[&str]); 10] = [
    (SignatureScheme::ECDSA_NISTP256_SHA256, &["ecdsa_secp256r1_sha256", "ECDSA+SHA256"]),
    (SignatureScheme::ECDSA_NISTP384_SHA384, &["ecdsa_secp384r1_sha384", "ECDSA+SHA384"]),
    (SignatureScheme::ECDSA_NISTP521_SHA512, &["ecdsa_secp521r1_sha512", "ECDSA+SHA512"]),
    (SignatureScheme::RSA_PSS_SHA256, &["rsa_pss_rsae_sha256", "RSA-PSS+SHA256", "PSS+SHA256"]),
    (SignatureScheme::RSA_PSS_SHA384, &["rsa_pss_rsae_sha384", "RSA-PSS+SHA384", "PSS+SHA384"]),
    (SignatureScheme::RSA_PSS_SHA512, &["rsa_pss_rsae_sha512", "RSA-PSS+SHA512", "PSS+SHA512"]),
    (SignatureScheme::RSA_PKCS1_SHA256, &["rsa_pkcs1_sha256", "RSA+SHA256"]),
    (SignatureScheme::RSA_PKCS1_SHA384, &["rsa_pkcs1_sha384", "RSA+SHA384"]),
    (SignatureScheme::RSA_PKCS1_SHA512, &["rsa_pkcs1_sha512", "RSA+SHA512"]),
    (SignatureScheme::ED25519, &["ed25519"]),
];

/// What BoringSSL has besides.
const OBSOLETE: [&str; 4] = ["rsa_pkcs1_sha1", "RSA+SHA1", "ecdsa_sha1", "ECDSA+SHA1"];

impl Schemes {
    /// The list, or why it is none. Nothing when it is empty: then rustls' own holds.
    pub(crate) fn compile(names: &[String]) -> Result<Option<Self>, String> {
        let mut schemes = Vec::with_capacity(names.len());
        // Envoy joins the entries by colons, so an entry may be several.
        for name in names.iter().flat_map(|entry| entry.split(':')) {
            let known = NAMES.iter().find(|(_, names)| names.contains(&name)).map(|(scheme, _)| *scheme);
            match known {
                Some(scheme) if !schemes.contains(&scheme) => schemes.push(scheme),
                None if OBSOLETE.contains(&name) => {
                    return Err(format!("not supported: rustls does not implement {name}"));
                }
                _ => {
                    return Err(format!("Failed to initialize TLS signature algorithms {}", names.join(":")));
                }
            }
        }
        Ok((!schemes.is_empty()).then(|| Self(schemes.into())))
    }

    pub(crate) fn contains(&self, scheme: SignatureScheme) -> bool {
        self.0.contains(&scheme)
    }

    /// Those of `supported` that are in the list, in its order.
    pub(crate) fn among(&self, supported: &[SignatureScheme]) -> Vec<SignatureScheme> {
        self.0.iter().copied().filter(|scheme| supported.contains(scheme)).collect()
    }

    /// The same certificate with a key that signs by these schemes only.
    pub(crate) fn limit(&self, certified: &CertifiedKey) -> CertifiedKey {
        let key = Arc::new(LimitedKey { key: Arc::clone(&certified.key), schemes: self.clone() });
        CertifiedKey { key, ..certified.clone() }
    }
}

struct LimitedKey {
    key: Arc<dyn SigningKey>,
    schemes: Schemes,
}

impl SigningKey for LimitedKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        // Our order decides, as in BoringSSL.
        self.schemes.among(offered).into_iter().find_map(|scheme| self.key.choose_scheme(&[scheme]))
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        self.key.public_key()
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.key.algorithm()
    }
}

impl fmt::Debug for LimitedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitedKey").field("schemes", &self.schemes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::Schemes;
    use rustls::SignatureScheme as Scheme;

    #[test]
    fn names() {
        let compile = |names: &[&str]| {
            Schemes::compile(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(compile(&[]), Ok(None));
        let two = compile(&["ECDSA+SHA256:rsa_pss_rsae_sha256", "ed25519"]).unwrap().unwrap();
        assert!(two.contains(Scheme::ED25519) && !two.contains(Scheme::RSA_PKCS1_SHA256));
        let offered = [Scheme::ED25519, Scheme::RSA_PKCS1_SHA256, Scheme::ECDSA_NISTP256_SHA256];
        assert_eq!(two.among(&offered), [Scheme::ECDSA_NISTP256_SHA256, Scheme::ED25519]);
        let failed = |names: &[&str]| compile(names).unwrap_err();
        assert_eq!(failed(&["ed25519", "x"]), "Failed to initialize TLS signature algorithms ed25519:x");
        assert!(failed(&["ed25519", "ed25519"]).starts_with("Failed"));
        assert_eq!(failed(&["rsa_pkcs1_sha1"]), "not supported: rustls does not implement rsa_pkcs1_sha1");
    }
}
