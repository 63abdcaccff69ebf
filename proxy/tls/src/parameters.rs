//! `TlsParameters`: protocol versions and key exchange groups by BoringSSL's names; suites are in `ciphers.rs`.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::version::{TLS12, TLS13};
use rustls::{NamedGroup, ProtocolVersion, SupportedProtocolVersion};
use waystation_schema::ConfigError;

use crate::ciphers::Ciphers;
use crate::signature::Schemes;
pub(crate) use pb::tls_parameters::TlsProtocol;

/// What both sides of a handshake may choose from.
#[derive(Clone, Debug)]
pub(crate) struct Parameters {
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) ciphers: Ciphers,
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
        let ciphers = Ciphers::compile(cipher_suites, &versions)?;
        provider.cipher_suites = ciphers.own();
        if !ecdh_curves.is_empty() {
            provider.kx_groups.clear();
            for (index, name) in ecdh_curves.iter().enumerate() {
                let group = group(name)
                    .map_err(|reason| ConfigError::field(format!("ecdh_curves[{index}]"), reason))?;
                provider.kx_groups.push(group);
            }
        }
        Ok(Self { provider: Arc::new(provider), ciphers, versions, schemes })
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
}
