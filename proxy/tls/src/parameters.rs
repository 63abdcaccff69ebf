//! `TlsParameters`: protocol versions, cipher suites and key exchange groups by BoringSSL's names.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::version::{TLS12, TLS13};
use rustls::{CipherSuite, NamedGroup, ProtocolVersion, SupportedCipherSuite, SupportedProtocolVersion};
use waystation_schema::ConfigError;

use crate::signature::Schemes;
pub(crate) use pb::tls_parameters::TlsProtocol;

/// What both sides of a handshake may choose from.
#[derive(Clone, Debug)]
pub(crate) struct Parameters {
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) versions: Vec<&'static SupportedProtocolVersion>,
    /// Signature schemes, where they are not all that there are.
    pub(crate) schemes: Option<Schemes>,
}

impl Parameters {
    /// `newest` is the maximum that `TLS_AUTO` stands for: Envoy's servers take TLS 1.3, its clients TLS 1.2.
    pub(crate) fn compile(
        proto: Option<&pb::TlsParameters>,
        newest: TlsProtocol,
    ) -> Result<Self, ConfigError> {
        let default = pb::TlsParameters::default();
        let pb::TlsParameters {
            tls_minimum_protocol_version,
            tls_maximum_protocol_version,
            cipher_suites,
            ecdh_curves,
            signature_algorithms,
            compliance_policies,
        } = proto.unwrap_or(&default);
        let schemes = Schemes::compile(signature_algorithms)
            .map_err(|reason| ConfigError::field("signature_algorithms", reason))?;
        if !compliance_policies.is_empty() {
            return Err(ConfigError::field("compliance_policies", "not supported: this is not a FIPS build"));
        }
        let minimum =
            version("tls_minimum_protocol_version", *tls_minimum_protocol_version, TlsProtocol::TlSv12)?;
        let maximum = version("tls_maximum_protocol_version", *tls_maximum_protocol_version, newest)?;
        let mut versions = Vec::with_capacity(2);
        if maximum == TlsProtocol::TlSv13 {
            versions.push(&TLS13);
        }
        if minimum == TlsProtocol::TlSv12 {
            versions.push(&TLS12);
        }
        if versions.is_empty() {
            return Err(ConfigError::field(
                "tls_minimum_protocol_version",
                "is above tls_maximum_protocol_version",
            ));
        }

        let mut provider = aws_lc_rs::default_provider();
        if !cipher_suites.is_empty() {
            let chosen = suites(cipher_suites)?;
            // As in BoringSSL the list is of TLS 1.2; the suites of TLS 1.3 are always on.
            let mut all: Vec<SupportedCipherSuite> =
                provider.cipher_suites.into_iter().filter(|suite| suite.tls13().is_some()).collect();
            all.extend(chosen);
            provider.cipher_suites = all;
        }
        // rustls would offer, and choose certificates by, suites of versions that are off.
        provider.cipher_suites.retain(|suite| versions.iter().any(|version| *version == suite.version()));
        if !ecdh_curves.is_empty() {
            provider.kx_groups.clear();
            for (index, name) in ecdh_curves.iter().enumerate() {
                let group = group(name)
                    .map_err(|reason| ConfigError::field(format!("ecdh_curves[{index}]"), reason))?;
                provider.kx_groups.push(group);
            }
        }
        Ok(Self { provider: Arc::new(provider), versions, schemes })
    }
}

/// As OpenSSL prints a version, in `%DOWNSTREAM_TLS_VERSION%` and `ssl.versions.X`.
pub(crate) fn version_name(version: Option<ProtocolVersion>) -> &'static str {
    match version {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        // rustls knows no other.
        _ => "",
    }
}

/// As OpenSSL prints a cipher suite.
pub(crate) fn cipher_name(suite: CipherSuite) -> &'static str {
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        other => SUITES.iter().find(|(_, suite)| suite.suite() == other).map_or("", |(name, _)| name),
    }
}

/// As BoringSSL prints a key exchange group.
pub(crate) fn group_name(group: NamedGroup) -> &'static str {
    match group {
        NamedGroup::X25519 => "X25519",
        NamedGroup::secp256r1 => "P-256",
        NamedGroup::secp384r1 => "P-384",
        NamedGroup::secp521r1 => "P-521",
        NamedGroup::X25519MLKEM768 => "X25519MLKEM768",
        NamedGroup::secp256r1MLKEM768 => "SecP256r1MLKEM768",
        NamedGroup::MLKEM768 => "MLKEM768",
        NamedGroup::MLKEM1024 => "MLKEM1024",
        _ => "",
    }
}

/// The suites of TLS 1.2 by OpenSSL's names, best first.
static SUITES: [(&str, &SupportedCipherSuite); 6] = [
    ("ECDHE-ECDSA-AES128-GCM-SHA256", &cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-ECDSA-CHACHA20-POLY1305", &cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    ("ECDHE-RSA-AES128-GCM-SHA256", &cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-RSA-CHACHA20-POLY1305", &cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
    ("ECDHE-ECDSA-AES256-GCM-SHA384", &cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    ("ECDHE-RSA-AES256-GCM-SHA384", &cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
];

/// What BoringSSL has besides and rustls has not: no forward secrecy, or CBC.
const OBSOLETE: [&str; 13] = [
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA256",
    "ECDHE-RSA-AES256-SHA",
    "ECDHE-PSK-AES128-CBC-SHA",
    "ECDHE-PSK-AES256-CBC-SHA",
    "ECDHE-PSK-CHACHA20-POLY1305",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
];

/// The suites of a list of names and of `[a|b]` groups of equal preference.
///
/// An obsolete suite beside others is left out with a warning: control planes list them by habit (Istio's inbound
/// list has two without forward secrecy), and to offer less of what is weak harms only peers that have nothing else.
/// A list of nothing else is refused, as is a name nobody knows.
fn suites(names: &[String]) -> Result<Vec<SupportedCipherSuite>, ConfigError> {
    let mut suites: Vec<SupportedCipherSuite> = Vec::new();
    for (index, entry) in names.iter().enumerate() {
        let entries = entry.strip_prefix('[').and_then(|entry| entry.strip_suffix(']')).unwrap_or(entry);
        for name in entries.split(['|', ':']) {
            if let Some((_, suite)) = SUITES.iter().find(|(known, _)| *known == name) {
                if !suites.contains(suite) {
                    suites.push(**suite);
                }
            } else if OBSOLETE.contains(&name) {
                tracing::warn!(target: "config", "cipher suite {name} is not offered: rustls does not implement it");
            } else {
                let reason = format!(
                    "Failed to initialize cipher suites {}. The following ciphers were rejected when tried \
                     individually: {name}",
                    names.join(":")
                );
                return Err(ConfigError::field(format!("cipher_suites[{index}]"), reason));
            }
        }
    }
    if suites.is_empty() {
        return Err(ConfigError::field("cipher_suites", "rustls implements none of these cipher suites"));
    }
    Ok(suites)
}

fn group(name: &str) -> Result<&'static dyn rustls::crypto::SupportedKxGroup, String> {
    Ok(match name {
        "X25519" | "x25519" => kx_group::X25519,
        "P-256" | "prime256v1" => kx_group::SECP256R1,
        "P-384" | "secp384r1" => kx_group::SECP384R1,
        "X25519MLKEM768" => kx_group::X25519MLKEM768,
        "P-521" | "secp521r1" | "P-224" | "secp224r1" | "X25519Kyber768Draft00" | "MLKEM1024" => {
            return Err(format!("not supported: rustls does not implement {name}"));
        }
        _ => return Err(format!("Failed to initialize ECDH curves {name}")),
    })
}

fn version(field: &'static str, value: i32, automatic: TlsProtocol) -> Result<TlsProtocol, ConfigError> {
    match TlsProtocol::try_from(value) {
        Ok(TlsProtocol::TlsAuto) => Ok(automatic),
        Ok(version @ (TlsProtocol::TlSv12 | TlsProtocol::TlSv13)) => Ok(version),
        Ok(TlsProtocol::TlSv10 | TlsProtocol::TlSv11) => {
            Err(ConfigError::field(field, "not supported: rustls implements only TLS 1.2 and TLS 1.3"))
        }
        Err(_) => Err(ConfigError::field(field, "value must be one of the defined enum values")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Parameters, TlsProtocol, pb};

    fn refused(proto: &pb::TlsParameters) -> String {
        Parameters::compile(Some(proto), TlsProtocol::TlSv13).unwrap_err().path()
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let none = pb::TlsParameters::default;
        for (proto, path) in [
            (pb::TlsParameters { tls_minimum_protocol_version: 1, ..none() }, "tls_minimum_protocol_version"),
            (pb::TlsParameters { tls_minimum_protocol_version: 2, ..none() }, "tls_minimum_protocol_version"),
            (pb::TlsParameters { tls_maximum_protocol_version: 2, ..none() }, "tls_maximum_protocol_version"),
            (pb::TlsParameters { tls_maximum_protocol_version: 9, ..none() }, "tls_maximum_protocol_version"),
            (
                pb::TlsParameters {
                    tls_minimum_protocol_version: 4,
                    tls_maximum_protocol_version: 3,
                    ..none()
                },
                "tls_minimum_protocol_version",
            ),
            (pb::TlsParameters { cipher_suites: vec!["AES128-SHA".into()], ..none() }, "cipher_suites"),
            (
                pb::TlsParameters { cipher_suites: vec!["TLS_AES_128_GCM_SHA256".into()], ..none() },
                "cipher_suites[0]",
            ),
            (
                pb::TlsParameters { ecdh_curves: vec!["X25519".into(), "P-521".into()], ..none() },
                "ecdh_curves[1]",
            ),
            (pb::TlsParameters { ecdh_curves: vec!["nonsense".into()], ..none() }, "ecdh_curves[0]"),
            (
                pb::TlsParameters { signature_algorithms: vec!["rsa_pss".into()], ..none() },
                "signature_algorithms",
            ),
            (pb::TlsParameters { compliance_policies: vec![0], ..none() }, "compliance_policies"),
        ] {
            assert_eq!(refused(&proto), path);
        }
    }

    #[test]
    fn equal_preference_groups_and_obsolete_names() {
        let proto = pb::TlsParameters {
            cipher_suites: vec![
                "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]".into(),
                "AES128-GCM-SHA256".into(),
            ],
            ..pb::TlsParameters::default()
        };
        let parameters = Parameters::compile(Some(&proto), TlsProtocol::TlSv13).unwrap();
        assert_eq!(parameters.provider.cipher_suites.len(), 3 + 2);
    }
}
