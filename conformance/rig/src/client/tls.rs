//! TLS for clients and upstreams of the rig.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

use crate::case::ClientTls;
use crate::certs::Certs;

/// The rig wants to see whatever certificate is shown; the cases compare which it was.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Shakes hands; the inner result is what the case records either way.
pub(crate) async fn connect(
    stream: TcpStream,
    spec: &ClientTls,
    certs: &Certs,
) -> Result<Result<(TlsStream<TcpStream>, Value), Value>> {
    let mut provider = aws_lc_rs::default_provider();
    if !spec.ciphers.is_empty() {
        let suite = |name: &String| {
            let mut known = provider.cipher_suites.iter();
            let found = known.find(|suite| format!("{:?}", suite.suite()) == *name);
            found.copied().with_context(|| format!("no cipher suite {name}"))
        };
        provider.cipher_suites = spec.ciphers.iter().map(suite).collect::<Result<_>>()?;
    }
    let provider = Arc::new(provider);
    let versions: &[&rustls::SupportedProtocolVersion] = match spec.version.as_deref() {
        Some("1.2") => &[&rustls::version::TLS12],
        Some("1.3") => &[&rustls::version::TLS13],
        _ => &[&rustls::version::TLS12, &rustls::version::TLS13],
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(provider)));
    let mut config = match &spec.cert {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let cert = certs.get(name).with_context(|| format!("no certificate {name}"))?;
            builder.with_client_auth_cert(vec![cert.der.clone()], cert.key())?
        }
    };
    config.alpn_protocols = spec.alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    config.enable_sni = spec.sni.is_some();
    let name = ServerName::try_from(spec.sni.clone().unwrap_or_else(|| "none.test".to_owned()))?;
    match TlsConnector::from(Arc::new(config)).connect(name, stream).await {
        Err(e) => Ok(Err(json!({"handshake": failure(&e.to_string())}))),
        Ok(stream) => {
            let session = stream.get_ref().1;
            let shown = session.peer_certificates().and_then(|c| c.first());
            let cert = certs.iter().find(|(_, c)| Some(&c.der) == shown).map(|(n, _)| n);
            let mut info = json!({
                "version": session.protocol_version().map(|v| format!("{v:?}")),
                "alpn": session.alpn_protocol().map(String::from_utf8_lossy),
                "certificate": cert,
            });
            if !spec.ciphers.is_empty() {
                let suite = session.negotiated_cipher_suite();
                info["cipher"] = json!(suite.map(|suite| format!("{:?}", suite.suite())));
            }
            Ok(Ok((stream, info)))
        }
    }
}

/// A handshake ends by an alert or by a bare close; the wording around it is this library's.
fn failure(text: &str) -> String {
    text.rsplit_once("alert: ").map_or_else(|| "closed".to_owned(), |(_, alert)| format!("alert {alert}"))
}

/// The server side of an upstream.
pub(crate) fn acceptor(certs: &Certs, name: &str, alpn: &[String], client_ca: bool) -> Result<TlsAcceptor> {
    let cert = certs.get(name).with_context(|| format!("no certificate {name}"))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = if client_ca {
        let mut roots = RootCertStore::empty();
        roots.add(certs.get("ca").context("ca")?.der.clone())?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_single_cert(vec![cert.der.clone()], cert.key())?;
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    Ok(TlsAcceptor::from(Arc::new(config)))
}
