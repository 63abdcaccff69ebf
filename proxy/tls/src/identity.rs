//! `TlsCertificate`: a certificate chain with its private key.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use rustls::SignatureAlgorithm;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use waystation_filter_api::connection::Certificate;
use waystation_filter_api::data_source;
use waystation_filter_api::wire::refuse;
use waystation_schema::{At as _, ConfigError};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::encrypted_key;
use crate::ocsp::Staple;
use crate::signature::Schemes;
use crate::x509;

/// What Envoy calls a certificate outside of any named secret, and an authority likewise, in
/// `ssl.certificate.<name>.expiration_unix_time_seconds`: the number is a hash of nothing, and dashboards have it.
const UNNAMED_CERT: &str = "unnamed_cert_e3b0c442";
pub(crate) const UNNAMED_CA: &str = "unnamed_ca_cert_e3b0c442";

/// A certificate that we can prove to own.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) certified: Arc<CertifiedKey>,
    /// The same with its OCSP response, which is stapled until this time in seconds since 1970.
    stapled: Option<(Arc<CertifiedKey>, i64)>,
    /// It says of itself that it is good only with one (RFC 7633).
    must_staple: bool,
    /// The names it serves: its DNS SANs, or its common name when it has none. Lower case.
    pub(crate) server_names: Vec<Box<str>>,
    pub(crate) certificate: Arc<Certificate>,
    /// Its segment in `ssl.certificate.<name>.expiration_unix_time_seconds`.
    pub(crate) stat_name: String,
    /// Where it came from, for `/certs`.
    pub(crate) origin: String,
}

impl Identity {
    /// Compiles a `TlsCertificate`; `name` is that of the secret it is in, if any.
    pub(crate) fn compile(proto: &pb::TlsCertificate, name: &str) -> Result<Self, ConfigError> {
        let pb::TlsCertificate {
            certificate_chain,
            private_key,
            pkcs12,
            // Tells when to read the files again: see `Secret::watched`.
            watched_directory: _,
            private_key_provider,
            password,
            ocsp_staple,
            signed_certificate_timestamp,
            tls_params,
        } = proto;
        refuse("pkcs12", pkcs12.is_some(), "give the chain and the key in PEM")?;
        refuse("private_key_provider", private_key_provider.is_some(), "keys are used in the process")?;
        refuse(
            "signed_certificate_timestamp",
            !signed_certificate_timestamp.is_empty(),
            "rustls sends no certificate timestamps",
        )?;
        refuse("tls_params", tls_params.is_some(), "parameters are those of the TLS context")?;

        let chain = data_source::read_filled(certificate_chain.as_ref()).at(|| "certificate_chain")?;
        let chain = chain.ok_or_else(|| {
            ConfigError::field("certificate_chain", "is required: No certificate chain was found")
        })?;
        let certificates =
            certificates(&chain.bytes).ok().filter(|chain| !chain.is_empty()).ok_or_else(|| {
                ConfigError::field(
                    "certificate_chain",
                    format!("Failed to load certificate chain from {}", chain.origin),
                )
            })?;
        let key = data_source::read_filled(private_key.as_ref()).at(|| "private_key")?;
        let key = key.ok_or_else(|| {
            ConfigError::field(
                "private_key",
                format!("Failed to load incomplete private key from path: {}", chain.origin),
            )
        })?;
        let cause = |cause: &dyn std::fmt::Display| {
            let text = format!("Failed to load private key from {}, Cause: {cause}", key.origin);
            ConfigError::field("private_key", text)
        };
        let password = data_source::read(password.as_ref()).at(|| "password")?;
        let decrypted =
            password.and_then(|password| encrypted_key::decrypt(&key.bytes, &password.bytes)).transpose();
        let der = match decrypted.map_err(|error| cause(&error))? {
            Some(der) => der,
            None => PrivateKeyDer::from_pem_slice(&key.bytes).map_err(|error| cause(&error))?,
        };
        let key = any_supported_type(&der).map_err(|error| cause(&error))?;

        let certified = CertifiedKey::new(certificates, key);
        certified.keys_match().map_err(|_| cause(&"KEY_VALUES_MISMATCH"))?;

        let unreadable = || ConfigError::field("certificate_chain", "the certificate cannot be read");
        let leaf = x509::parse(certified.cert.first().ok_or_else(unreadable)?).ok_or_else(unreadable)?;
        let staple = data_source::read_filled(ocsp_staple.as_ref()).at(|| "ocsp_staple")?;
        let stapled = match staple {
            None => None,
            Some(data) => {
                let until = staple_until(&data.bytes, &leaf)
                    .map_err(|text| ConfigError::field("ocsp_staple", text))?;
                let (cert, key) = (certified.cert.clone(), Arc::clone(&certified.key));
                Some((Arc::new(CertifiedKey { cert, key, ocsp: Some(data.bytes) }), until))
            }
        };
        let must_staple = x509::must_staple(&leaf);
        let mut server_names: Vec<Box<str>> = x509::names(&leaf)
            .iter()
            .filter_map(|name| match name {
                GeneralName::DNSName(name) => Some(name.to_ascii_lowercase().into()),
                _ => None,
            })
            .collect();
        if server_names.is_empty() {
            server_names.extend(x509::common_name(&leaf).map(|name| name.to_ascii_lowercase().into()));
        }
        let certificate = x509::certificate(&certified.cert).ok_or_else(unreadable)?;
        let stat_name = if name.is_empty() { UNNAMED_CERT.to_owned() } else { name.replace(['.', ':'], "_") };
        Ok(Self {
            certified: Arc::new(certified),
            stapled,
            must_staple,
            server_names,
            certificate: Arc::new(certificate),
            stat_name,
            origin: chain.origin,
        })
    }

    /// What a client gets at this time, in seconds since 1970: an OCSP response that has expired is not stapled
    /// (`LENIENT_STAPLING`). A certificate that must have one is not shown without: Envoy refuses only clients that ask
    /// for it, and rustls does not tell which do.
    pub(crate) fn to_serve(&self, now: i64) -> Option<&Arc<CertifiedKey>> {
        match &self.stapled {
            Some((stapled, until)) if now < *until => Some(stapled),
            _ => Some(&self.certified).filter(|_| !self.must_staple),
        }
    }

    /// Refuses, for a server, a certificate that must have an OCSP response and has none.
    pub(crate) fn check_staple(&self) -> Result<(), ConfigError> {
        if self.must_staple && self.stapled.is_none() {
            return Err(ConfigError::new("OCSP response is required for must-staple certificate"));
        }
        Ok(())
    }

    /// The same, signing by `schemes` only.
    pub(crate) fn limited(&self, schemes: &Schemes) -> Self {
        Self {
            certified: Arc::new(schemes.limit(&self.certified)),
            stapled: self.stapled.as_ref().map(|(key, until)| (Arc::new(schemes.limit(key)), *until)),
            ..self.clone()
        }
    }

    /// Whether the key is an elliptic-curve one.
    pub(crate) fn is_ecdsa(&self) -> bool {
        self.certified.key.algorithm() == SignatureAlgorithm::ECDSA
    }
}

/// Until when an OCSP response may be stapled to a certificate.
fn staple_until(der: &[u8], leaf: &X509Certificate<'_>) -> Result<i64, &'static str> {
    let staple = Staple::parse(der)?;
    if staple.serial != leaf.raw_serial() {
        return Err("OCSP response does not match its TLS certificate");
    }
    Ok(staple.next_update.unwrap_or(i64::MIN))
}

/// All certificates of a PEM text.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, rustls_pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(pem).collect()
}

#[cfg(test)]
mod tests {
    use super::Identity;
    use crate::ocsp::tests::staple;
    use envoy_types::pb::envoy::config::core::v3 as core;
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
    use waystation_schema::ConfigError;

    fn compile(serial: &[u8], staple: Vec<u8>) -> Result<Identity, ConfigError> {
        compile_with(serial, Some(staple), false)
    }

    fn compile_with(serial: &[u8], staple: Option<Vec<u8>>, must: bool) -> Result<Identity, ConfigError> {
        use core::data_source::Specifier;
        let source =
            |specifier| Some(core::DataSource { specifier: Some(specifier), watched_directory: None });
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(["a.test".to_owned()]).unwrap();
        params.serial_number = Some(rcgen::SerialNumber::from_slice(serial));
        if must {
            let features = rcgen::CustomExtension::from_oid_content(
                &[1, 3, 6, 1, 5, 5, 7, 1, 24],
                vec![0x30, 6, 2, 1, 17, 2, 1, 5],
            );
            params.custom_extensions.push(features);
        }
        let proto = pb::TlsCertificate {
            certificate_chain: source(Specifier::InlineString(params.self_signed(&key).unwrap().pem())),
            private_key: source(Specifier::InlineString(key.serialize_pem())),
            ocsp_staple: staple.and_then(|staple| source(Specifier::InlineBytes(staple))),
            ..pb::TlsCertificate::default()
        };
        Identity::compile(&proto, "")
    }

    #[test]
    fn a_response_is_stapled_until_it_expires() {
        let der = staple(&[1, 2, 3], "20300102030405Z");
        let identity = compile(&[1, 2, 3], der.clone()).unwrap();
        let until = 1_893_553_445;
        assert_eq!(identity.to_serve(until - 1).unwrap().ocsp.as_ref(), Some(&der));
        assert_eq!(identity.to_serve(until).unwrap().ocsp, None);
        assert_eq!(identity.to_serve(until).unwrap().cert, identity.certified.cert);
        assert!(identity.check_staple().is_ok());
    }

    #[test]
    fn what_must_be_stapled_is_not_served_without() {
        let der = staple(&[1, 2, 3], "20300102030405Z");
        let identity = compile_with(&[1, 2, 3], Some(der.clone()), true).unwrap();
        let until = 1_893_553_445;
        assert_eq!(identity.to_serve(until - 1).unwrap().ocsp.as_ref(), Some(&der));
        assert!(identity.to_serve(until).is_none());
        assert!(identity.check_staple().is_ok());
        assert!(compile_with(&[1], None, false).unwrap().check_staple().is_ok());
        let none = compile_with(&[1], None, true).unwrap();
        assert_eq!(
            none.check_staple().unwrap_err().to_string(),
            "OCSP response is required for must-staple certificate"
        );
    }

    #[test]
    fn what_cannot_be_stapled_is_refused() {
        let other = compile(&[1, 2, 4], staple(&[1, 2, 3], "20300102030405Z")).unwrap_err();
        assert_eq!(other.to_string(), "ocsp_staple: OCSP response does not match its TLS certificate");
        let garbage = compile(&[1], vec![1, 2, 3]).unwrap_err();
        assert_eq!(garbage.to_string(), "ocsp_staple: OCSP response is malformed");
    }
}
