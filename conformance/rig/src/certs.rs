//! Certificates made afresh for each run, under fixed names.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use base64::Engine as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, PublicKeyData,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// One certificate with its key and fingerprints.
pub(crate) struct Cert {
    pub(crate) pem: String,
    pub(crate) key_pem: String,
    pub(crate) der: CertificateDer<'static>,
    key_der: Vec<u8>,
    /// SHA-256 of the certificate, lower-case hex.
    pub(crate) hash: String,
    /// Base64 of the SHA-256 of the public key.
    pub(crate) spki: String,
}

impl Cert {
    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key_der.clone()))
    }
}

/// All certificates of a run.
pub(crate) struct Certs {
    named: BTreeMap<&'static str, Cert>,
    crl: String,
}

struct Wanted {
    name: &'static str,
    cn: &'static str,
    /// DNS names, or URIs where they contain `://`, or addresses.
    sans: &'static [&'static str],
    issuer: &'static str,
    rsa: bool,
    expired: bool,
    /// The only key usage.
    usage: Option<KeyUsagePurpose>,
    /// Carries the TLS feature extension that asks for an OCSP staple.
    must_staple: bool,
}

const fn want(
    name: &'static str,
    cn: &'static str,
    sans: &'static [&'static str],
    issuer: &'static str,
) -> Wanted {
    Wanted { name, cn, sans, issuer, rsa: false, expired: false, usage: None, must_staple: false }
}

/// `ca` is trusted by the cases, `ca2` is the stranger.
const WANTED: [Wanted; 16] = [
    want("server", "server.test", &["server.test", "spiffe://test/server"], "ca"),
    Wanted { rsa: true, ..want("server-rsa", "server.test", &["server.test"], "ca") },
    want("wild", "wild.test", &["*.wild.test"], "ca"),
    want("other", "other.test", &["other.test", "api.other.test"], "ca"),
    want("stranger", "server.test", &["server.test"], "ca2"),
    Wanted { expired: true, ..want("expired", "server.test", &["server.test"], "ca") },
    want("upstream", "upstream.test", &["upstream.test", "127.0.0.1", "spiffe://test/upstream"], "ca"),
    want("client", "client.test", &["client.test", "spiffe://test/ns/a/sa/client"], "ca"),
    want("client2", "client2.test", &["client2.test", "spiffe://test/ns/b/sa/client2"], "ca"),
    want("revoked", "revoked.test", &["revoked.test"], "ca"),
    Wanted {
        usage: Some(KeyUsagePurpose::KeyAgreement),
        ..want("server-agrees", "server.test", &["server.test"], "ca")
    },
    Wanted {
        rsa: true,
        usage: Some(KeyUsagePurpose::KeyEncipherment),
        ..want("server-enciphers", "server.test", &["server.test"], "ca")
    },
    Wanted {
        usage: Some(KeyUsagePurpose::KeyAgreement),
        ..want("client-agrees", "client.test", &["client.test"], "ca")
    },
    Wanted {
        usage: Some(KeyUsagePurpose::DigitalSignature),
        ..want("client-signs", "client.test", &["client.test"], "ca")
    },
    Wanted { must_staple: true, ..want("must-staple", "server.test", &["server.test"], "ca") },
    want("client-stranger", "client.test", &["client.test", "spiffe://test/ns/a/sa/client"], "ca2"),
];

impl Certs {
    pub(crate) fn generate() -> Result<Arc<Self>> {
        let mut named = BTreeMap::new();
        let mut crl = String::new();
        let mut serial = 10_u64;
        for ca in ["ca", "ca2"] {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            let mut params = params(ca, &[], serial)?;
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![
                KeyUsagePurpose::KeyCertSign,
                KeyUsagePurpose::CrlSign,
                KeyUsagePurpose::DigitalSignature,
            ];
            let cert = params.self_signed(&key)?;
            named.insert(ca, finish(cert.der().clone(), cert.pem(), &key));
            let issuer = Issuer::new(params, key);
            for wanted in WANTED.iter().filter(|w| w.issuer == ca) {
                serial += 1;
                let key = if wanted.rsa {
                    KeyPair::generate_for(&PKCS_RSA_SHA256)?
                } else {
                    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?
                };
                let mut params = self::params(wanted.cn, wanted.sans, serial)?;
                if wanted.expired {
                    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
                    params.not_after = rcgen::date_time_ymd(2020, 2, 1);
                }
                params.key_usages.extend(wanted.usage);
                if wanted.must_staple {
                    params.custom_extensions.push(must_staple());
                }
                params.use_authority_key_identifier_extension = true;
                let cert = params.signed_by(&key, &issuer)?;
                named.insert(wanted.name, finish(cert.der().clone(), cert.pem(), &key));
                if wanted.name == "revoked" {
                    crl = revocation_list(serial).signed_by(&issuer)?.pem()?;
                }
            }
            serial = 100;
        }
        Ok(Arc::new(Self { named, crl }))
    }

    /// Writes `NAME.pem`, `NAME.key` and `crl.pem` into a folder.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        for (name, cert) in &self.named {
            std::fs::write(dir.join(format!("{name}.pem")), &cert.pem)?;
            std::fs::write(dir.join(format!("{name}.key")), &cert.key_pem)?;
        }
        std::fs::write(dir.join("crl.pem"), &self.crl)?;
        Ok(())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Cert> {
        self.named.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &Cert)> {
        self.named.iter().map(|(n, c)| (*n, c))
    }
}

fn revocation_list(serial: u64) -> CertificateRevocationListParams {
    CertificateRevocationListParams {
        this_update: rcgen::date_time_ymd(2024, 1, 1),
        next_update: rcgen::date_time_ymd(2044, 1, 1),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: rcgen::date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    }
}

/// RFC 7633: a sequence of TLS features, of which 5 is `status_request`.
fn must_staple() -> CustomExtension {
    CustomExtension::from_oid_content(&[1, 3, 6, 1, 5, 5, 7, 1, 24], vec![0x30, 3, 2, 1, 5])
}

fn params(cn: &str, sans: &[&str], serial: u64) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, cn);
    params.serial_number = Some(SerialNumber::from(serial));
    params.not_before = rcgen::date_time_ymd(2024, 1, 1);
    params.not_after = rcgen::date_time_ymd(2044, 1, 1);
    for san in sans {
        params.subject_alt_names.push(if san.contains("://") {
            SanType::URI((*san).try_into()?)
        } else if let Ok(ip) = san.parse() {
            SanType::IpAddress(ip)
        } else {
            SanType::DnsName((*san).try_into()?)
        });
    }
    Ok(params)
}

fn finish(der: CertificateDer<'static>, pem: String, key: &KeyPair) -> Cert {
    let hash = sha256(&der).iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    });
    let spki = base64::engine::general_purpose::STANDARD.encode(sha256(&key.subject_public_key_info()));
    Cert { pem, key_pem: key.serialize_pem(), der, key_der: key.serialize_der(), hash, spki }
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    match rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256 {
        rustls::SupportedCipherSuite::Tls13(suite) => {
            suite.common.hash_provider.hash(bytes).as_ref().to_vec()
        }
        rustls::SupportedCipherSuite::Tls12(suite) => {
            suite.common.hash_provider.hash(bytes).as_ref().to_vec()
        }
    }
}
