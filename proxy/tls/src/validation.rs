//! `CertificateValidationContext`: what a peer's certificate must be.

pub(crate) mod san;
mod spiffe;
pub(crate) mod verifier;

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use prost::Message as _;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor};
use waystation_filter_api::data_source::{self, Data};
use waystation_filter_api::wire::refuse;
use waystation_matchers::SanMatcher;
use waystation_schema::{At as _, ConfigError};
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::prelude::X509Certificate;

use crate::identity::{UNNAMED_CA, certificates};
use spiffe::TrustDomains;

use pb::certificate_validation_context::TrustChainVerification;

/// A compiled validation context.
#[derive(Debug, Default)]
pub(crate) struct Validation {
    /// `None`: the chain is not verified at all.
    pub(crate) trust: Option<Trust>,
    hashes: Vec<[u8; 32]>,
    spkis: Vec<[u8; 32]>,
    sans: Vec<SanMatcher>,
    allow_expired: bool,
    accept_untrusted: bool,
    max_depth: Option<u32>,
    hide_ca_list: bool,
    /// Of everything that it says, the contents of what it names included.
    pub(crate) digest: [u8; 32],
    /// The name of the secret it is in, for statistics.
    pub(crate) stat_name: String,
}

/// Where trust comes from.
#[derive(Debug)]
pub(crate) enum Trust {
    /// `trusted_ca`.
    Authorities(Authorities),
    /// The SPIFFE validator: authorities by trust domain.
    Spiffe(Arc<TrustDomains>),
}

/// What a validation context names, as it was read. Combined with that of another, and compiled again, without another
/// look at the disk: that happens on a worker, and the files may have changed or gone since.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources {
    ca: Option<Data>,
    system_roots: Option<Data>,
    crl: Option<Data>,
    spiffe: Option<Arc<TrustDomains>>,
}

/// Certificates that are trusted as they are, and what they revoked.
#[derive(Default)]
pub(crate) struct Authorities {
    anchors: Vec<TrustAnchor<'static>>,
    /// The same certificates, for a peer that presents one of them itself.
    pub(crate) certificates: Vec<CertificateDer<'static>>,
    crls: Vec<CertRevocationList<'static>>,
    only_leaf_crl: bool,
    pub(crate) origin: String,
}

/// Why a peer's certificate was refused for a reason that rustls has no word for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Refusal {
    /// The chain does not hold.
    Chain(String),
    /// No subject alternative name is one we wait for.
    San,
    /// Neither hash nor SPKI is pinned.
    Pin,
    /// The key may not sign handshakes.
    KeyUsage,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(reason) => write!(f, "verify cert failed: {reason}"),
            Self::San => f.write_str("verify SAN list"),
            Self::Pin => f.write_str("verify cert hash and spki"),
            Self::KeyUsage => f.write_str("KEY_USAGE_BIT_INCORRECT"),
        }
    }
}

impl std::error::Error for Refusal {}

impl Validation {
    /// Compiles a `CertificateValidationContext` and what was read of it. It may be a part of a combined one;
    /// [`Self::check_whole`] looks at what only makes sense as a whole.
    pub(crate) fn compile(
        proto: &pb::CertificateValidationContext,
        sources: &Sources,
    ) -> Result<Self, ConfigError> {
        #[expect(deprecated, reason = "it is still accepted")]
        let pb::CertificateValidationContext {
            // Read by `Sources`, as are the lists of `crl` and the bundles of `custom_validator_config`.
            trusted_ca: _,
            ca_certificate_provider_instance,
            system_root_certs: _,
            // Tells when to read the files again: see `Secret::watched`.
            watched_directory: _,
            verify_certificate_spki,
            verify_certificate_hash,
            match_typed_subject_alt_names,
            match_subject_alt_names,
            require_signed_certificate_timestamp,
            crl: _,
            allow_expired_certificate,
            trust_chain_verification,
            custom_validator_config: _,
            only_verify_leaf_cert_crl,
            max_verify_depth,
            suppress_client_ca_list,
        } = proto;
        refuse(
            "ca_certificate_provider_instance",
            ca_certificate_provider_instance.is_some(),
            "certificate providers",
        )?;
        refuse(
            "require_signed_certificate_timestamp",
            require_signed_certificate_timestamp.as_ref().is_some_and(|flag| flag.value),
            "rustls verifies no certificate timestamps",
        )?;
        let accept_untrusted = match TrustChainVerification::try_from(*trust_chain_verification) {
            Ok(TrustChainVerification::VerifyTrustChain) => false,
            Ok(TrustChainVerification::AcceptUntrusted) => true,
            Err(_) => return Err(ConfigError::field("trust_chain_verification", "unknown value")),
        };

        let mut sans = Vec::new();
        for (index, matcher) in match_typed_subject_alt_names.iter().enumerate() {
            let at = || format!("match_typed_subject_alt_names[{index}]");
            sans.push(SanMatcher::compile(matcher).at(at)?);
        }
        // Envoy looks at the untyped list only when there is no typed one.
        if sans.is_empty() {
            for (index, matcher) in match_subject_alt_names.iter().enumerate() {
                let at = || format!("match_subject_alt_names[{index}]");
                sans.extend(SanMatcher::compile_untyped(matcher).at(at)?);
            }
        }

        let Sources { ca, system_roots, crl, spiffe } = sources;
        let trust = match spiffe {
            Some(domains) => {
                refuse("crl", crl.is_some(), "the SPIFFE validator has no revocation lists")?;
                Some(Trust::Spiffe(Arc::clone(domains)))
            }
            None => match ca.as_ref().or(system_roots.as_ref()) {
                Some(data) => {
                    let mut authorities = Authorities::compile(data).at(|| "trusted_ca")?;
                    authorities.only_leaf_crl = *only_verify_leaf_cert_crl;
                    if let Some(data) = crl {
                        authorities.add_crls(data).at(|| "crl")?;
                        if authorities.crls.is_empty() {
                            let reason = format!("Failed to load CRL from {}", data.origin);
                            return Err(ConfigError::field("crl", reason));
                        }
                    }
                    Some(Trust::Authorities(authorities))
                }
                None => {
                    if let Some(data) = crl {
                        // Parsed so that a broken list is refused where it is, not where it is combined.
                        Authorities::default().add_crls(data).at(|| "crl")?;
                    }
                    None
                }
            },
        };
        Ok(Self {
            trust,
            hashes: pins("verify_certificate_hash", verify_certificate_hash, |text| {
                unhex(&text.replace(':', ""))
            })?,
            spkis: pins("verify_certificate_spki", verify_certificate_spki, |text| BASE64.decode(text).ok())?,
            sans,
            allow_expired: *allow_expired_certificate,
            accept_untrusted,
            max_depth: max_verify_depth.as_ref().map(|depth| depth.value),
            hide_ca_list: *suppress_client_ca_list,
            digest: sources.digest(proto),
            stat_name: UNNAMED_CA.to_owned(),
        })
    }

    /// Refuses what verifies less than it seems to.
    pub(crate) fn check_whole(&self, proto: &pb::CertificateValidationContext) -> Result<(), ConfigError> {
        if self.trust.is_some() {
            return Ok(());
        }
        if proto.crl.is_some() {
            return Err(ConfigError::field("crl", "Failed to load CRL without trusted CA"));
        }
        if !self.sans.is_empty() {
            return Err(ConfigError::field(
                "match_typed_subject_alt_names",
                "SAN-based verification of peer certificates without trusted CA is insecure and not allowed",
            ));
        }
        if self.allow_expired {
            return Err(ConfigError::field(
                "allow_expired_certificate",
                "Certificate validity period is always ignored without trusted CA",
            ));
        }
        Ok(())
    }

    /// Whether there is anything that a peer's certificate must be, so that one must be asked for.
    pub(crate) fn wants_certificate(&self) -> bool {
        self.trust.is_some()
            || self.accept_untrusted
            || !self.sans.is_empty()
            || !self.hashes.is_empty()
            || !self.spkis.is_empty()
    }

    /// The certificates that may be named to clients, and shown in `/certs`.
    pub(crate) fn authorities(&self) -> Option<&Authorities> {
        match &self.trust {
            Some(Trust::Authorities(authorities)) => Some(authorities),
            Some(Trust::Spiffe(_)) | None => None,
        }
    }

    /// The pins hold: there are none, or one of them does.
    fn is_pinned(&self, der: &[u8], certificate: &X509Certificate<'_>) -> bool {
        let known = |pins: &[[u8; 32]], bytes: &[u8]| {
            !pins.is_empty() && {
                let hash = digest::digest(&digest::SHA256, bytes);
                pins.iter().any(|pin| pin == hash.as_ref())
            }
        };
        (self.hashes.is_empty() && self.spkis.is_empty())
            || known(&self.hashes, der)
            || known(&self.spkis, certificate.public_key().raw)
    }
}

impl Sources {
    /// Reads what `proto` names.
    pub(crate) fn read(proto: &pb::CertificateValidationContext) -> Result<Self, ConfigError> {
        let ca = data_source::read_filled(proto.trusted_ca.as_ref()).at(|| "trusted_ca")?;
        let system_roots = match &proto.system_root_certs {
            Some(_) if ca.is_none() => Some(system_roots().at(|| "system_root_certs")?),
            _ => None,
        };
        let spiffe = match &proto.custom_validator_config {
            Some(extension) => {
                Some(Arc::new(TrustDomains::compile(extension).at(|| "custom_validator_config")?))
            }
            None => None,
        };
        let crl = data_source::read_filled(proto.crl.as_ref()).at(|| "crl")?;
        Ok(Self { ca, system_roots, crl, spiffe })
    }

    /// These, and where there are none those of `default`.
    pub(crate) fn or(&self, default: &Self) -> Self {
        Self {
            ca: self.ca.as_ref().or(default.ca.as_ref()).cloned(),
            system_roots: self.system_roots.as_ref().or(default.system_roots.as_ref()).cloned(),
            crl: self.crl.as_ref().or(default.crl.as_ref()).cloned(),
            spiffe: self.spiffe.as_ref().or(default.spiffe.as_ref()).cloned(),
        }
    }

    /// A digest of `proto` and of the contents of what it names.
    fn digest(&self, proto: &pb::CertificateValidationContext) -> [u8; 32] {
        let stated = pb::CertificateValidationContext {
            trusted_ca: None,
            crl: None,
            watched_directory: None,
            ..proto.clone()
        };
        let contents = [&self.ca, &self.system_roots, &self.crl]
            .map(|data| data.as_ref().map_or(&[][..], |data| &data.bytes[..]));
        let bundles = self.spiffe.as_ref().map_or(&[][..], |domains| &domains.digest);
        digest_of([&stated.encode_to_vec()[..], bundles].into_iter().chain(contents))
    }
}

/// A digest of `parts` that tells them apart.
pub(crate) fn digest_of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

impl Authorities {
    pub(crate) fn compile(data: &Data) -> Result<Self, ConfigError> {
        let failed =
            || ConfigError::new(format!("Failed to load trusted CA certificates from {}", data.origin));
        let certificates = certificates(&data.bytes).map_err(|_| failed())?;
        if certificates.is_empty() {
            return Err(failed());
        }
        let mut anchors = Vec::with_capacity(certificates.len());
        for certificate in &certificates {
            let anchor = webpki::anchor_from_trusted_cert(certificate);
            anchors.push(anchor.map_err(|_| failed())?.to_owned());
        }
        let origin = data.origin.clone();
        let mut authorities = Self { anchors, certificates, origin, ..Self::default() };
        // As in OpenSSL, lists may stand among the certificates.
        authorities.add_crls(data)?;
        Ok(authorities)
    }

    fn add_crls(&mut self, data: &Data) -> Result<(), ConfigError> {
        let failed = || ConfigError::new(format!("Failed to load CRL from {}", data.origin));
        for crl in CertificateRevocationListDer::pem_slice_iter(&data.bytes) {
            let crl = crl.map_err(|_| failed())?;
            let crl = OwnedCertRevocationList::from_der(&crl).map_err(|_| failed())?;
            self.crls.push(CertRevocationList::Owned(crl));
        }
        Ok(())
    }
}

impl fmt::Debug for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorities")
            .field("certificates", &self.certificates.len())
            .field("crls", &self.crls.len())
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

/// The system's trusted certificates, where distributions keep them.
fn system_roots() -> Result<Data, ConfigError> {
    const BUNDLES: [&str; 5] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    BUNDLES
        .iter()
        .find_map(|path| {
            let bytes = std::fs::read(path).ok()?;
            Some(Data { bytes, origin: (*path).to_owned() })
        })
        .ok_or_else(|| ConfigError::new("no system root certificates were found"))
}

fn pins(
    field: &str,
    texts: &[String],
    decode: impl Fn(&str) -> Option<Vec<u8>>,
) -> Result<Vec<[u8; 32]>, ConfigError> {
    let pin = |(index, text): (usize, &String)| {
        let bytes = decode(text).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| {
            ConfigError::field(format!("{field}[{index}]"), format!("Invalid SHA-256 digest '{text}'"))
        })
    };
    texts.iter().enumerate().map(pin).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}
