//! TLS contexts and secrets over rustls.
//!
//! A [`ServerContext`] or [`ClientContext`] is compiled from Envoy's `DownstreamTlsContext` or
//! `UpstreamTlsContext`. Secrets that come by SDS are held as cells: a rotation swaps the rustls configuration that
//! new handshakes use and drops no connection.

#![forbid(unsafe_code)]

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use waystation_filter_api::cell::{Cell, CellTable};
use waystation_filter_api::connection::TlsInfo;
use waystation_schema::ConfigError;
use waystation_stats::Scope;

/// Secrets by name; a context that refers to one holds its cell and follows rotations.
pub type SecretTable = CellTable<Secret>;

/// A compiled `envoy.extensions.transport_sockets.tls.v3.Secret`.
#[derive(Debug)]
pub enum Secret {}

impl Secret {
    /// Compiles a secret; files it names are read now.
    pub fn compile(proto: &pb::Secret) -> Result<Self, ConfigError> {
        let _ = proto;
        Err(ConfigError::new("unsupported"))
    }

    /// The certificates in it, for `/certs`.
    pub fn describe(&self) -> Option<envoy_types::pb::envoy::admin::v3::Certificate> {
        None
    }
}

/// Where contexts get secrets by name.
pub trait Secrets {
    /// The cell of a secret that comes from `source`; a static secret of the bootstrap when there is no source.
    fn secret(&self, source: Option<&core::ConfigSource>, name: &str)
    -> Result<Arc<Cell<Secret>>, ConfigError>;
}

/// The downstream side.
#[derive(Debug)]
pub struct ServerContext {}

impl ServerContext {
    /// Compiles a `DownstreamTlsContext`; statistics go below `scope` (`listener.<address>.`).
    pub fn compile(
        proto: &pb::DownstreamTlsContext,
        secrets: &dyn Secrets,
        scope: &Scope,
    ) -> Result<Self, ConfigError> {
        let _ = (proto, secrets, scope);
        Err(ConfigError::new("unsupported"))
    }

    /// The configuration for the next handshake; `None` while a secret has not arrived
    /// (`downstream_context_secrets_not_ready`).
    pub fn config(&self) -> Option<Arc<rustls::ServerConfig>> {
        None
    }

    /// What a finished handshake tells, counted in `ssl.*`.
    pub fn handshake_done(&self, connection: &rustls::ServerConnection) -> TlsInfo {
        let _ = connection;
        TlsInfo::default()
    }

    /// Counts a handshake that failed, and names the reason for `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub fn handshake_failed(&self, error: &std::io::Error) -> String {
        error.to_string()
    }
}

/// What one upstream connection asks of a [`ClientContext`] beyond its configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientOptions<'a> {
    /// SNI that takes the place of the context's own (`auto_sni`, filter state).
    pub server_name: Option<&'a str>,
    /// A DNS SAN that must match (`auto_san_validation`).
    pub verify_san: Option<&'a str>,
    /// ALPN that takes the place of the context's own; empty leaves it.
    pub alpn: &'a [&'a [u8]],
}

/// The upstream side.
#[derive(Debug)]
pub struct ClientContext {}

impl ClientContext {
    /// Compiles an `UpstreamTlsContext`; statistics go below `scope` (`cluster.<name>.`).
    pub fn compile(
        proto: &pb::UpstreamTlsContext,
        secrets: &dyn Secrets,
        scope: &Scope,
    ) -> Result<Self, ConfigError> {
        let _ = (proto, secrets, scope);
        Err(ConfigError::new("unsupported"))
    }

    /// The configuration and server name for the next handshake; `None` while a secret has not arrived.
    pub fn connect(
        &self,
        options: ClientOptions<'_>,
    ) -> Option<(Arc<rustls::ClientConfig>, rustls_pki_types::ServerName<'static>)> {
        let _ = options;
        None
    }

    /// What a finished handshake tells, counted in `ssl.*`.
    pub fn handshake_done(&self, connection: &rustls::ClientConnection) -> TlsInfo {
        let _ = connection;
        TlsInfo::default()
    }

    /// Counts a handshake that failed, and names the reason for `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub fn handshake_failed(&self, error: &std::io::Error) -> String {
        error.to_string()
    }
}
