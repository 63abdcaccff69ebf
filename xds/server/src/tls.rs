use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// The server's certificate; read once, at the start.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate chain in PEM.
    pub cert: PathBuf,
    /// Its private key in PEM.
    pub key: PathBuf,
    /// The CAs in PEM of which one must have signed the client's certificate; without it clients need none.
    pub client_ca: Option<PathBuf>,
}

/// Why the certificate, the key or the CA is not usable.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct TlsError {
    path: PathBuf,
    reason: String,
}

impl TlsFiles {
    pub(crate) fn load(&self) -> Result<TlsAcceptor, TlsError> {
        let fail = |path: &Path, reason: String| TlsError { path: path.to_owned(), reason };
        let chain = certificates(&self.cert)?;
        let key =
            PrivateKeyDer::from_pem_file(&self.key).map_err(|error| fail(&self.key, error.to_string()))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let versions = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| fail(&self.cert, error.to_string()))?;
        let clients = match &self.client_ca {
            None => versions.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|error| fail(path, error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                versions.with_client_cert_verifier(verifier.map_err(|error| fail(path, error.to_string()))?)
            }
        };
        let mut config =
            clients.with_single_cert(chain, key).map_err(|error| fail(&self.cert, error.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |reason: String| TlsError { path: path.to_owned(), reason };
    let certificates: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| fail(error.to_string()))?.collect();
    let certificates = certificates.map_err(|error| fail(error.to_string()))?;
    if certificates.is_empty() { Err(fail("no certificate in it".to_owned())) } else { Ok(certificates) }
}
