//! The verifiers that rustls calls.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerMisbehaved,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{
    EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth, RevocationOptionsBuilder, VerifiedPath,
};
use x509_parser::prelude::X509Certificate;

use super::san::{has_match, has_name};
use super::{Authorities, Refusal, Trust, Validation};
use crate::parameters::Parameters;
use crate::signature::Schemes;
use crate::x509;

/// Verifies the certificates of peers. Signatures of handshakes are always verified; what else is, the validation
/// context says. Without one any certificate is accepted, as Envoy does.
pub(crate) struct Verifier {
    pub(crate) validation: Option<Arc<Validation>>,
    algorithms: WebPkiSupportedAlgorithms,
    /// `signature_algorithms`.
    schemes: Option<Schemes>,
    hints: Vec<DistinguishedName>,
    role: Role,
}

/// Which side the verifier is on.
#[derive(Debug)]
pub(crate) enum Role {
    /// On the server: looks at clients.
    Server {
        /// `require_client_certificate`.
        mandatory: bool,
    },
    /// On the client: looks at servers.
    Client {
        /// A name the server must have besides what the context demands.
        verify_san: Option<Box<str>>,
        /// The name stands in for the SAN matchers (`auto_sni_san_validation`).
        replaces_matchers: bool,
    },
}

impl Verifier {
    pub(crate) fn new(validation: Option<Arc<Validation>>, parameters: &Parameters, role: Role) -> Self {
        let hints = match (&role, &validation) {
            (Role::Server { .. }, Some(validation)) if !validation.hide_ca_list => validation
                .authorities()
                .into_iter()
                .flat_map(|authorities| &authorities.anchors)
                .map(|anchor| DistinguishedName::in_sequence(&anchor.subject))
                .collect(),
            _ => Vec::new(),
        };
        let algorithms = parameters.provider.signature_verification_algorithms;
        Self { validation, algorithms, schemes: parameters.schemes.clone(), hints, role }
    }

    /// Refuses a handshake's signature by a scheme that we did not offer.
    fn offered(&self, signature: &DigitallySignedStruct) -> Result<(), Error> {
        match &self.schemes {
            Some(schemes) if !schemes.contains(signature.scheme) => {
                Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
            }
            _ => Ok(()),
        }
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        let supported = self.algorithms.supported_schemes();
        self.schemes.as_ref().map_or_else(|| supported.clone(), |schemes| schemes.among(&supported))
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let certificate = x509::parse(leaf).ok_or(CertificateError::BadEncoding)?;
        // Not for the validation context to decide, nor for ACCEPT_UNTRUSTED.
        if !may_sign(&certificate) {
            return Err(refuse(Refusal::KeyUsage));
        }
        let (verify_san, replaces_matchers) = match &self.role {
            Role::Server { .. } => (None, false),
            Role::Client { verify_san, replaces_matchers } => (verify_san.as_deref(), *replaces_matchers),
        };
        let none = Validation::default();
        let validation = self.validation.as_deref().unwrap_or(&none);
        let verified =
            self.verify_context(validation, &certificate, leaf, intermediates, now, replaces_matchers);
        // ACCEPT_UNTRUSTED accepts a failure of anything; that it was one shows in `peer_verified`.
        let verified = if validation.accept_untrusted { Ok(()) } else { verified };
        match verify_san {
            Some(name) if !validation.accept_untrusted && !has_name(&certificate, name) => {
                verified.and(Err(refuse(Refusal::San)))
            }
            _ => verified,
        }
    }

    fn verify_context(
        &self,
        validation: &Validation,
        certificate: &X509Certificate<'_>,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        replaces_matchers: bool,
    ) -> Result<(), Error> {
        let authorities = match &validation.trust {
            None => None,
            Some(Trust::Authorities(authorities)) => Some(authorities),
            Some(Trust::Spiffe(domains)) => Some(domains.authorities(certificate).map_err(refuse)?),
        };
        if let Some(authorities) = authorities {
            self.verify_chain(validation, authorities, certificate, leaf, intermediates, now)?;
        }
        if !replaces_matchers
            && !validation.sans.is_empty()
            && !validation.sans.iter().any(|matcher| has_match(certificate, matcher))
        {
            return Err(refuse(Refusal::San));
        }
        if !validation.is_pinned(leaf, certificate) {
            return Err(refuse(Refusal::Pin));
        }
        Ok(())
    }

    fn verify_chain(
        &self,
        validation: &Validation,
        authorities: &Authorities,
        certificate: &X509Certificate<'_>,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        // A certificate that is trusted as it stands, such as a self-signed one, needs no issuer.
        if authorities.crls.is_empty() && authorities.certificates.contains(leaf) {
            return self.verify_trusted_leaf(validation, certificate, now);
        }
        let parsed = EndEntityCert::try_from(leaf).map_err(chain_error)?;
        let verify_at = |time| self.verify_path(validation, authorities, &parsed, intermediates, time);
        let result = verify_at(now);
        if !validation.allow_expired || !matches!(&result, Err(error) if is_about_time(error)) {
            return result.map_err(chain_error);
        }
        // The rest of the verification still counts, so it is done at a time when the presented certificates were valid.
        let parsed_chain: Vec<_> = intermediates.iter().filter_map(|der| x509::parse(der)).collect();
        let validities = || parsed_chain.iter().chain([certificate]).map(|parsed| parsed.validity());
        let begins = validities().map(|validity| validity.not_before.timestamp()).max();
        let leaf_ends = certificate.validity().not_after.timestamp();
        let ends = validities().map(|validity| validity.not_after.timestamp()).min();
        [begins, ends, Some(leaf_ends)]
            .into_iter()
            .flatten()
            .filter_map(|seconds| u64::try_from(seconds).ok())
            .map(|seconds| verify_at(UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds))))
            .fold(result, |best, next| if best.is_ok() { best } else { next })
            .map_err(chain_error)
    }

    fn verify_path(
        &self,
        validation: &Validation,
        authorities: &Authorities,
        leaf: &EndEntityCert<'_>,
        intermediates: &[CertificateDer<'_>],
        time: UnixTime,
    ) -> Result<(), webpki::Error> {
        let crls: Vec<_> = authorities.crls.iter().collect();
        let depth = if authorities.only_leaf_crl {
            RevocationCheckDepth::EndEntity
        } else {
            RevocationCheckDepth::Chain
        };
        // Without lists nothing is checked; with lists a certificate that none speaks of is refused, as is any
        // certificate when the list is out of date.
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|builder| {
            builder.with_depth(depth).with_expiration_policy(ExpirationPolicy::Enforce).build()
        });
        let max_depth = validation.max_depth.map(|depth| usize::try_from(depth).unwrap_or(usize::MAX));
        let within_depth = |path: &VerifiedPath<'_>| match max_depth {
            Some(max) if path.intermediate_certificates().count() > max => {
                Err(webpki::Error::MaximumPathDepthExceeded)
            }
            _ => Ok(()),
        };
        let usage = match self.role {
            Role::Server { .. } => KeyUsage::client_auth(),
            Role::Client { .. } => KeyUsage::server_auth(),
        };
        leaf.verify_for_usage(
            self.algorithms.all,
            &authorities.anchors,
            intermediates,
            time,
            usage,
            revocation,
            Some(&within_depth),
        )
        .map(|_| ())
    }

    fn verify_trusted_leaf(
        &self,
        validation: &Validation,
        certificate: &X509Certificate<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let validity = certificate.validity();
        if !validation.allow_expired && now > validity.not_after.timestamp() {
            return Err(CertificateError::Expired.into());
        }
        if !validation.allow_expired && now < validity.not_before.timestamp() {
            return Err(CertificateError::NotValidYet.into());
        }
        let fits = certificate.extended_key_usage().ok().flatten().is_none_or(|usage| {
            usage.value.any
                || match self.role {
                    Role::Server { .. } => usage.value.client_auth,
                    Role::Client { .. } => usage.value.server_auth,
                }
        });
        if fits { Ok(()) } else { Err(CertificateError::InvalidPurpose.into()) }
    }

    /// Whether `chain`, which was accepted, was also verified against something.
    pub(crate) fn verifies(&self, chain: &[CertificateDer<'_>]) -> bool {
        let Some(validation) = self.validation.as_deref().filter(|validation| {
            validation.trust.is_some() || !validation.hashes.is_empty() || !validation.spkis.is_empty()
        }) else {
            return false;
        };
        if !validation.accept_untrusted {
            return true;
        }
        let Some((leaf, intermediates)) = chain.split_first() else { return false };
        let Some(certificate) = x509::parse(leaf) else { return false };
        self.verify_context(validation, &certificate, leaf, intermediates, UnixTime::now(), false).is_ok()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        // The name is what SNI says. Which names are accepted, the validation context says.
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.offered(dss)?;
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.offered(dss)?;
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        matches!(self.role, Role::Server { mandatory: true })
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.offered(dss)?;
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.offered(dss)?;
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("validation", &self.validation)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// The refusal inside an error of rustls.
pub(crate) fn refusal(error: &CertificateError) -> Option<&Refusal> {
    match error {
        CertificateError::Other(OtherError(other)) => other.downcast_ref(),
        _ => None,
    }
}

fn refuse(refusal: Refusal) -> Error {
    CertificateError::Other(OtherError(Arc::new(refusal))).into()
}

/// Keeps what rustls has an alert for; the rest as text.
fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    match error {
        E::CertExpired { .. } => CertificateError::Expired.into(),
        E::CertNotValidYet { .. } => CertificateError::NotValidYet.into(),
        E::CertRevoked => CertificateError::Revoked.into(),
        E::CrlExpired { .. } => CertificateError::ExpiredRevocationList.into(),
        E::UnknownIssuer => CertificateError::UnknownIssuer.into(),
        E::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus.into(),
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature.into(),
        other => refuse(Refusal::Chain(other.to_string())),
    }
}

fn is_about_time(error: &webpki::Error) -> bool {
    matches!(
        error,
        webpki::Error::CertExpired { .. }
            | webpki::Error::CertNotValidYet { .. }
            | webpki::Error::InvalidCertValidity
    )
}

/// Whether the key usage, if stated, lets the key sign: in every cipher suite of rustls each side that shows a certificate
/// signs with its key. BoringSSL demands it of either side and of every kind of key.
fn may_sign(certificate: &X509Certificate<'_>) -> bool {
    match certificate.key_usage() {
        Ok(usage) => usage.is_none_or(|usage| usage.value.digital_signature()),
        // It is stated twice.
        Err(_) => false,
    }
}
