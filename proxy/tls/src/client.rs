//! `UpstreamTlsContext`.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::admin::v3 as admin;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::ServerName;
use waystation_filter_api::connection::TlsInfo;
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Gauge, Scope};

use crate::Secrets;
use crate::common::{self, Common};
use crate::follow::Follower;
use crate::identity::Identity;
use crate::parameters::TlsProtocol;
use crate::secret::{Secret, describe_authority, describe_identity};
use crate::stats::Stats;
use crate::validation::Validation;
use crate::validation::verifier::{Role, Verifier};

/// How many different demands on connections keep a configuration (and its sessions) at a time.
const MAX_VARIANTS: usize = 64;

/// What one upstream connection asks of a [`ClientContext`] beyond its configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientOptions<'a> {
    /// SNI that takes the place of the context's own (`auto_sni`, filter state).
    pub server_name: Option<&'a str>,
    /// A SAN that the certificate must have (`auto_san_validation`). None has the empty one.
    pub verify_san: Option<&'a str>,
    /// ALPN that takes the place of the context's own; empty leaves it.
    pub alpn: &'a [&'a [u8]],
}

/// The upstream side.
#[derive(Debug)]
pub struct ClientContext {
    common: Common,
    sni: Box<str>,
    auto_host_sni: bool,
    auto_sni_san_validation: bool,
    max_sessions: usize,
    follower: Follower<Built>,
    stats: Stats,
}

/// What new handshakes use, until a secret changes.
#[derive(Debug)]
struct Built {
    identity: Option<Arc<Identity>>,
    validation: Option<Arc<Validation>>,
    /// Replaced as a whole when one is added.
    variants: ArcSwap<Vec<Arc<Variant>>>,
    expirations: Vec<Gauge>,
}

/// The configuration for connections with the same demands. Each has its own sessions: one that was made under weaker
/// demands must not be resumed under stronger ones, which verifies nothing again.
#[derive(Debug)]
struct Variant {
    alpn: Vec<Vec<u8>>,
    verify_san: Option<Box<str>>,
    replaces_matchers: bool,
    config: Arc<ClientConfig>,
}

#[derive(Clone, Copy)]
struct Demands<'a> {
    alpn: &'a [&'a [u8]],
    verify_san: Option<&'a str>,
    replaces_matchers: bool,
}

impl ClientContext {
    /// Compiles an `UpstreamTlsContext`; statistics go below `scope` (`cluster.<name>.`).
    pub fn compile(
        proto: &pb::UpstreamTlsContext,
        secrets: &dyn Secrets,
        scope: &Scope,
    ) -> Result<Self, ConfigError> {
        #[expect(deprecated, reason = "it is ignored by name")]
        let pb::UpstreamTlsContext {
            common_tls_context,
            sni,
            auto_host_sni,
            auto_sni_san_validation,
            allow_renegotiation,
            max_session_keys,
            // As in Envoy: see `may_sign`.
            enforce_rsa_key_usage: _,
        } = proto;
        if *allow_renegotiation {
            let reason = "not supported: rustls does not renegotiate";
            return Err(ConfigError::field("allow_renegotiation", reason));
        }
        if sni.len() > 255 {
            return Err(ConfigError::field("sni", "value length must be at most 255 bytes"));
        }
        let mut cells = Vec::new();
        let default = pb::CommonTlsContext::default();
        let common = common_tls_context.as_ref().unwrap_or(&default);
        let common =
            Common::compile(common, secrets, &mut cells, TlsProtocol::TlSv12).at(|| "common_tls_context")?;
        if common.identities() > 1 {
            let reason = "Multiple TLS certificates are not supported for client contexts";
            return Err(ConfigError::field("common_tls_context", reason));
        }
        if *auto_sni_san_validation && !common.validates() {
            let reason = "'auto_sni_san_validation' was configured without configuring a validation context";
            return Err(ConfigError::field("auto_sni_san_validation", reason));
        }
        let context = Self {
            common,
            sni: sni.as_str().into(),
            auto_host_sni: *auto_host_sni,
            auto_sni_san_validation: *auto_sni_san_validation,
            max_sessions: max_session_keys
                .as_ref()
                .map_or(1, |keys| usize::try_from(keys.value).unwrap_or(usize::MAX).min(1024)),
            follower: Follower::new(cells),
            stats: Stats::new(scope, "client_ssl_socket_factory"),
        };
        // What is there already must fit together now; what comes later, when it comes.
        context.follower.update(|secrets| context.build(secrets)).at(|| "common_tls_context")?;
        Ok(context)
    }

    /// The configuration and server name for the next handshake; `None` while a secret has not arrived
    /// (`upstream_context_secrets_not_ready`).
    pub fn connect(&self, options: ClientOptions<'_>) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        let Some(built) = self.follower.current(|secrets| self.build(secrets)) else {
            self.stats.factory.upstream_context_secrets_not_ready().inc();
            return None;
        };
        let sni = options.server_name.unwrap_or(&self.sni);
        let by_sni = self.auto_sni_san_validation && !sni.is_empty();
        let demands = Demands {
            alpn: options.alpn,
            verify_san: if by_sni { Some(sni) } else { options.verify_san },
            replaces_matchers: by_sni,
        };
        let config = match built.variants.load().iter().find(|variant| variant.meets(demands)) {
            Some(variant) => Arc::clone(&variant.config),
            None => self.add_variant(&built, demands)?,
        };
        // rustls sends no SNI for an address, and what the certificate must say is not for the name to decide.
        let no_sni = || ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let name = ServerName::try_from(sni.to_owned()).unwrap_or_else(|_| no_sni());
        Some((config, name))
    }

    /// Whether a host's name is the SNI of connections to it, where none is asked for (`auto_host_sni`).
    pub fn auto_host_sni(&self) -> bool {
        self.auto_host_sni
    }

    /// Whether every secret has arrived.
    pub fn is_ready(&self) -> bool {
        self.follower.is_ready()
    }

    /// What a finished handshake tells, counted in `ssl.*`.
    pub fn handshake_done(&self, connection: &rustls::ClientConnection) -> TlsInfo {
        let built = self.follower.last();
        let local = built.as_ref().and_then(|built| Some(Arc::clone(&built.identity.as_ref()?.certificate)));
        let mut info = common::describe(connection, connection.negotiated_cipher_suite(), local);
        if let (Some(chain), Some(built)) = (connection.peer_certificates(), built) {
            info.peer_verified = built.validation.as_ref().is_some_and(|validation| {
                self.verifier(Some(Arc::clone(validation)), None, false).verifies(chain)
            });
        }
        self.stats.handshake(&info);
        info
    }

    /// Counts a handshake that failed, and names the reason for `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub fn handshake_failed(&self, error: &std::io::Error) -> String {
        self.stats.failure(error)
    }

    /// When the first of its certificates expires, in seconds since 1970.
    pub fn first_expiry(&self) -> Option<u64> {
        self.follower.last()?.expirations.iter().map(Gauge::value).min()
    }

    /// What `/certs` tells of it; nothing while a secret has not arrived.
    pub fn describe(&self) -> Option<admin::Certificate> {
        let built = self.follower.current(|secrets| self.build(secrets))?;
        Some(admin::Certificate {
            ca_cert: built.validation.iter().flat_map(|validation| describe_authority(validation)).collect(),
            cert_chain: built.identity.iter().flat_map(|identity| describe_identity(identity)).collect(),
        })
    }

    fn build(&self, secrets: &[Arc<Secret>]) -> Result<Built, ConfigError> {
        let (material, _) = self.common.material(secrets)?;
        let expirations = self
            .stats
            .expirations(material.identities.iter().map(AsRef::as_ref), material.validation.as_deref());
        let built = Built {
            identity: material.identities.into_iter().next(),
            validation: material.validation,
            variants: ArcSwap::default(),
            expirations,
        };
        let plain = Demands { alpn: &[], verify_san: None, replaces_matchers: false };
        let variant = self
            .variant(&built, plain)
            .map_err(|error| ConfigError::field("tls_params", error.to_string()))?;
        built.variants.store(Arc::new(vec![Arc::new(variant)]));
        if !secrets.is_empty() {
            self.stats.factory.ssl_context_update_by_sds().inc();
        }
        Ok(built)
    }

    /// Makes the configuration for `demands` and keeps it. At the bound all go, with their sessions.
    fn add_variant(&self, built: &Built, demands: Demands<'_>) -> Option<Arc<ClientConfig>> {
        // The same provider and versions were accepted when the context was built.
        let variant = Arc::new(self.variant(built, demands).ok()?);
        built.variants.rcu(|variants| {
            let mut variants = if variants.len() < MAX_VARIANTS { variants.to_vec() } else { Vec::new() };
            variants.push(Arc::clone(&variant));
            variants
        });
        Some(Arc::clone(&variant.config))
    }

    fn variant(&self, built: &Built, demands: Demands<'_>) -> Result<Variant, rustls::Error> {
        let Demands { alpn, verify_san, replaces_matchers } = demands;
        let parameters = &self.common.parameters;
        let verifier = self.verifier(built.validation.clone(), verify_san, replaces_matchers);
        let builder = ClientConfig::builder_with_provider(Arc::clone(&parameters.provider))
            .with_protocol_versions(&parameters.versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &built.identity {
            Some(identity) => {
                let certified = Arc::clone(&identity.certified);
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
            None => builder.with_no_client_auth(),
        };
        let alpn: Vec<Vec<u8>> = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.alpn_protocols = if alpn.is_empty() { self.common.alpn.clone() } else { alpn.clone() };
        config.key_log = Arc::clone(&self.common.key_log);
        config.resumption = match self.max_sessions {
            0 => Resumption::disabled(),
            sessions => Resumption::in_memory_sessions(sessions),
        };
        Ok(Variant {
            alpn,
            verify_san: verify_san.map(Into::into),
            replaces_matchers,
            config: Arc::new(config),
        })
    }

    fn verifier(
        &self,
        validation: Option<Arc<Validation>>,
        verify_san: Option<&str>,
        replaces_matchers: bool,
    ) -> Verifier {
        let role = Role::Client { verify_san: verify_san.map(Into::into), replaces_matchers };
        Verifier::new(validation, &self.common.parameters, role)
    }
}

impl Variant {
    fn meets(&self, demands: Demands<'_>) -> bool {
        self.verify_san.as_deref() == demands.verify_san
            && self.replaces_matchers == demands.replaces_matchers
            && self.alpn.iter().map(Vec::as_slice).eq(demands.alpn.iter().copied())
    }
}
