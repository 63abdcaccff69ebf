//! What TLS contexts count.

use std::sync::OnceLock;

use rustls::{CertificateError, Error};
use waystation_filter_api::connection::TlsInfo;
use waystation_stats::{Counter, Gauge, Scope, stats_group};

use crate::identity::Identity;
use crate::validation::verifier::refusal;
use crate::validation::{Refusal, Validation};
use crate::x509;

stats_group! {
    /// `<listener or cluster>.ssl.*`. What concerns stapling stays 0: rustls does not tell whether a client asked.
    pub(crate) struct SslStats {
        counters {
            connection_error, handshake, session_reused, no_certificate, fail_verify_no_cert, fail_verify_error,
            fail_verify_san, fail_verify_cert_hash, ocsp_staple_failed, ocsp_staple_omitted, ocsp_staple_responses,
            ocsp_staple_requests,
        }
    }
}

stats_group! {
    /// `<listener or cluster>.{server,client}_ssl_socket_factory.*`.
    pub(crate) struct FactoryStats {
        counters {
            ssl_context_update_by_sds, upstream_context_secrets_not_ready, downstream_context_secrets_not_ready,
        }
    }
}

/// All statistics of one context.
#[derive(Debug)]
pub(crate) struct Stats {
    pub(crate) ssl: SslStats,
    pub(crate) factory: FactoryStats,
    ciphers: Family<9>,
    curves: Family<8>,
    versions: Family<2>,
    scope: Scope,
}

impl Stats {
    pub(crate) fn new(scope: &Scope, factory: &str) -> Self {
        let ssl = scope.scope("ssl");
        Self {
            factory: scope.scope(factory).group(),
            ciphers: Family::new(ssl.scope("ciphers"), "envoy.ssl_cipher"),
            curves: Family::new(ssl.scope("curves"), "envoy.ssl_curve"),
            versions: Family::new(ssl.scope("versions"), "envoy.ssl_version"),
            ssl: ssl.group(),
            scope: ssl,
        }
    }

    /// A handshake succeeded.
    pub(crate) fn handshake(&self, info: &TlsInfo) {
        self.ssl.handshake().inc();
        if info.resumed {
            self.ssl.session_reused().inc();
        }
        if info.peer.is_none() {
            self.ssl.no_certificate().inc();
        }
        self.ciphers.count(info.cipher);
        self.curves.count(info.group);
        self.versions.count(info.version);
    }

    /// A handshake failed; the text is the transport failure reason.
    pub(crate) fn failure(&self, error: &std::io::Error) -> String {
        let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
            // The peer went away, which is no error of TLS.
            return format!("TLS_error:|{error}");
        };
        let counted = match tls {
            Error::InvalidCertificate(certificate) => match refusal(certificate) {
                Some(Refusal::San) => self.ssl.fail_verify_san(),
                Some(Refusal::Pin) => self.ssl.fail_verify_cert_hash(),
                Some(Refusal::KeyUsage) => self.ssl.connection_error(),
                Some(Refusal::Chain(_)) | None => self.ssl.fail_verify_error(),
            },
            Error::NoCertificatesPresented => self.ssl.fail_verify_no_cert(),
            _ => self.ssl.connection_error(),
        };
        counted.inc();
        match tls {
            Error::InvalidCertificate(certificate) => {
                format!("TLS_error:|CERTIFICATE_VERIFY_FAILED:{}", cause(certificate))
            }
            Error::NoCertificatesPresented => "TLS_error:|PEER_DID_NOT_RETURN_A_CERTIFICATE".to_owned(),
            other => format!("TLS_error:|{other}"),
        }
    }

    /// `ssl.certificate.<name>.expiration_unix_time_seconds` for as long as the gauges are held.
    pub(crate) fn expirations<'a>(
        &self,
        identities: impl Iterator<Item = &'a Identity>,
        validation: Option<&Validation>,
    ) -> Vec<Gauge> {
        let own = identities.map(|identity| (identity.stat_name.as_str(), identity.certificate.not_after));
        let authority = validation.and_then(|validation| {
            let der = validation.authorities()?.certificates.first()?;
            let not_after = x509::parse(der)?.validity().not_after.timestamp();
            Some((validation.stat_name.as_str(), not_after))
        });
        own.chain(authority)
            .map(|(name, not_after)| {
                let scope = self.scope.scope("certificate").tag("envoy.tls_certificate", name);
                let gauge = scope.gauge("expiration_unix_time_seconds");
                gauge.set(u64::try_from(not_after).unwrap_or(0));
                gauge
            })
            .collect()
    }
}

/// Envoy's words for what went wrong with a certificate.
fn cause(error: &CertificateError) -> String {
    let text = match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "certificate has expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "certificate is not yet valid"
        }
        CertificateError::Revoked => "certificate revoked",
        CertificateError::UnknownIssuer => "unable to get local issuer certificate",
        CertificateError::UnknownRevocationStatus => "unable to get certificate CRL",
        CertificateError::ExpiredRevocationList => "CRL has expired",
        CertificateError::BadSignature => "certificate signature failure",
        CertificateError::InvalidPurpose => "unsupported certificate purpose",
        other => {
            return refusal(other)
                .map_or_else(|| format!("verify cert failed: {other}"), ToString::to_string);
        }
    };
    format!("verify cert failed: {text}")
}

/// Counters by a name out of a few, each made when it is first counted: Envoy lists only those.
#[derive(Debug)]
struct Family<const N: usize> {
    scope: Scope,
    tag: &'static str,
    /// A prefix of these is set; more names than places are not counted.
    counters: [OnceLock<(&'static str, Counter)>; N],
}

impl<const N: usize> Family<N> {
    fn new(scope: Scope, tag: &'static str) -> Self {
        Self { scope, tag, counters: [const { OnceLock::new() }; N] }
    }

    fn count(&self, name: &'static str) {
        if name.is_empty() {
            return;
        }
        for place in &self.counters {
            let (own, counter) = place.get_or_init(|| (name, self.scope.tag(self.tag, name).counter("")));
            if *own == name {
                counter.inc();
                return;
            }
        }
    }
}
