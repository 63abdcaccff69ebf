//! `DownstreamTlsContext`.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::admin::v3 as admin;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::google::protobuf::Duration as PbDuration;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, ServerConfig, SupportedCipherSuite};
use waystation_filter_api::connection::{Certificate, TlsInfo};
use waystation_schema::{At as _, ConfigError};
use waystation_stats::{Gauge, Scope};

use crate::Secrets;
use crate::common::{self, Common, secret_cell};
use crate::follow::Follower;
use crate::identity::Identity;
use crate::parameters::TlsProtocol;
use crate::secret::{Secret, SecretKind, describe_authority, describe_identity, unix_now};
use crate::session::{RandomTickets, SESSION_TIMEOUT, Sessions, TicketKeys, Tickets};
use crate::stats::Stats;
use crate::validation::verifier::{Role, Verifier};
use crate::validation::{Validation, digest_of};

use pb::downstream_tls_context::{OcspStaplePolicy, SessionTicketKeysType};

/// How many orders of suites keep a configuration at a time: as many as Envoy's own list has.
const MAX_VARIANTS: usize = 24;

/// The downstream side.
#[derive(Debug)]
pub struct ServerContext {
    common: Common,
    settings: Settings,
    follower: Follower<Built>,
    stats: Stats,
}

#[derive(Debug)]
struct Settings {
    require_client_certificate: bool,
    require_sni: bool,
    stateful_resumption: bool,
    tickets: TicketSource,
    session_timeout: Duration,
    full_scan: bool,
    prefer_client_ciphers: bool,
}

#[derive(Debug)]
enum TicketSource {
    Random,
    Static(Arc<TicketKeys>),
    Secret,
    None,
}

/// What new handshakes use, until a secret changes.
#[derive(Debug)]
struct Built {
    /// With the suites in our own order.
    plain: Arc<Variant>,
    /// Replaced as a whole when one is added.
    variants: ArcSwap<Vec<Arc<Variant>>>,
    resolver: Arc<Resolver>,
    verifier: Option<Arc<Verifier>>,
    expirations: Vec<Gauge>,
}

/// The configuration for clients that get the suites in one order. rustls asks for the order either its own list, by which
/// it goes in every version, or the client.
#[derive(Debug)]
struct Variant {
    suites: Vec<SupportedCipherSuite>,
    config: Arc<ServerConfig>,
    /// For clients that offer only protocols we do not speak: Envoy goes on without ALPN, rustls would refuse them.
    without_alpn: Option<Arc<ServerConfig>>,
}

impl ServerContext {
    /// Compiles a `DownstreamTlsContext`; statistics go below `scope` (`listener.<address>.`).
    pub fn compile(
        proto: &pb::DownstreamTlsContext,
        secrets: &dyn Secrets,
        scope: &Scope,
    ) -> Result<Self, ConfigError> {
        let pb::DownstreamTlsContext {
            common_tls_context,
            require_client_certificate,
            require_sni,
            disable_stateful_session_resumption,
            session_timeout,
            ocsp_staple_policy,
            full_scan_certs_on_sni_mismatch,
            prefer_client_ciphers,
            session_ticket_keys_type,
        } = proto;
        let mut cells = Vec::new();
        let default = pb::CommonTlsContext::default();
        let common = common_tls_context.as_ref().unwrap_or(&default);
        let common =
            Common::compile(common, secrets, &mut cells, TlsProtocol::TlSv13).at(|| "common_tls_context")?;
        if common.identities() == 0 {
            return Err(ConfigError::field(
                "common_tls_context",
                "No TLS certificates found for server context",
            ));
        }
        match OcspStaplePolicy::try_from(*ocsp_staple_policy) {
            Ok(OcspStaplePolicy::LenientStapling) => {}
            Ok(OcspStaplePolicy::StrictStapling | OcspStaplePolicy::MustStaple) => {
                let reason = "not supported: rustls does not tell which clients ask for a staple, so none is refused for want of \
                              one (LENIENT_STAPLING)";
                return Err(ConfigError::field("ocsp_staple_policy", reason));
            }
            Err(_) => return Err(ConfigError::field("ocsp_staple_policy", "unknown value")),
        }
        let tickets = match session_ticket_keys_type {
            None | Some(SessionTicketKeysType::DisableStatelessSessionResumption(false)) => {
                TicketSource::Random
            }
            Some(SessionTicketKeysType::DisableStatelessSessionResumption(true)) => TicketSource::None,
            Some(SessionTicketKeysType::SessionTicketKeys(keys)) => {
                TicketSource::Static(Arc::new(TicketKeys::compile(keys).at(|| "session_ticket_keys")?))
            }
            Some(SessionTicketKeysType::SessionTicketKeysSdsSecretConfig(config)) => {
                let at = || "session_ticket_keys_sds_secret_config";
                cells.push(secret_cell(SecretKind::TicketKeys, config, secrets).at(at)?);
                TicketSource::Secret
            }
        };
        let flag = |flag: &Option<envoy_types::pb::google::protobuf::BoolValue>| {
            flag.as_ref().is_some_and(|flag| flag.value)
        };
        // BoringSSL takes 0 for its default.
        let session_timeout = match session_timeout {
            None | Some(PbDuration { seconds: 0, .. }) => SESSION_TIMEOUT,
            Some(timeout) => {
                let seconds = u64::try_from(timeout.seconds).ok().filter(|seconds| *seconds < 1 << 32);
                let reason = "value must be less than 4294967296s and at least 0s";
                Duration::from_secs(seconds.ok_or_else(|| ConfigError::field("session_timeout", reason))?)
            }
        };
        let context = Self {
            common,
            settings: Settings {
                require_client_certificate: flag(require_client_certificate),
                require_sni: flag(require_sni),
                stateful_resumption: !disable_stateful_session_resumption,
                tickets,
                session_timeout,
                full_scan: flag(full_scan_certs_on_sni_mismatch),
                prefer_client_ciphers: *prefer_client_ciphers,
            },
            follower: Follower::new(cells),
            stats: Stats::new(scope, "server_ssl_socket_factory"),
        };
        // What is there already must fit together now; what comes later, when it comes.
        context.follower.update(|secrets| context.build(secrets)).at(|| "common_tls_context")?;
        Ok(context)
    }

    /// The configuration for the next handshake; `None` while a secret has not arrived
    /// (`downstream_context_secrets_not_ready`).
    pub fn config(&self) -> Option<Arc<ServerConfig>> {
        Some(Arc::clone(&self.current()?.plain.config))
    }

    /// The same for a client that has said hello already: it is not refused for offering only application protocols
    /// that are not ours, and its order of suites counts where it should.
    pub fn config_for(&self, hello: &ClientHello<'_>) -> Option<Arc<ServerConfig>> {
        let built = self.current()?;
        let variant = self.variant(&built, hello.cipher_suites());
        let foreign = |config: &Arc<ServerConfig>| {
            let ours = |protocol: &[u8]| config.alpn_protocols.iter().any(|own| own == protocol);
            hello.alpn().is_some_and(|mut offered| !offered.any(ours))
        };
        Some(match &variant.without_alpn {
            Some(without) if foreign(&variant.config) => Arc::clone(without),
            _ => Arc::clone(&variant.config),
        })
    }

    /// Whether every secret has arrived.
    pub fn is_ready(&self) -> bool {
        self.follower.is_ready()
    }

    /// What a finished handshake tells, counted in `ssl.*`.
    pub fn handshake_done(&self, connection: &rustls::ServerConnection) -> TlsInfo {
        let built = self.follower.last();
        let local = built.as_ref().and_then(|built| built.resolver.used(connection));
        let local = local.map(|identity| Arc::clone(&identity.certificate));
        let mut info = common::describe(connection, connection.negotiated_cipher_suite(), local);
        if let (Some(chain), Some(built)) = (connection.peer_certificates(), built) {
            info.peer_verified = built.verifier.as_ref().is_some_and(|verifier| verifier.verifies(chain));
        }
        info.server_name = connection.server_name().map(Into::into);
        self.stats.handshake(&info);
        info
    }

    /// Counts a handshake that failed, and names the reason for `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%`.
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
        let validation = built.verifier.as_ref().and_then(|verifier| verifier.validation.as_deref());
        Some(admin::Certificate {
            ca_cert: validation.into_iter().flat_map(describe_authority).collect(),
            cert_chain: built.resolver.identities.iter().flat_map(|own| describe_identity(own)).collect(),
        })
    }

    fn current(&self) -> Option<Arc<Built>> {
        let built = self.follower.current(|secrets| self.build(secrets));
        if built.is_none() {
            self.stats.factory.downstream_context_secrets_not_ready().inc();
        }
        built
    }

    fn build(&self, secrets: &[Arc<Secret>]) -> Result<Built, ConfigError> {
        let (material, rest) = self.common.material(secrets)?;
        material.identities.iter().try_for_each(|identity| identity.check_staple())?;
        let Settings { session_timeout, .. } = self.settings;
        let parameters = &self.common.parameters;
        let mandatory = self.settings.require_client_certificate;
        let asks = mandatory
            || material.validation.as_ref().is_some_and(|validation| validation.wants_certificate());
        let verifier = asks.then(|| {
            let role = Role::Server { mandatory };
            Arc::new(Verifier::new(material.validation.clone(), parameters, role))
        });
        let expirations = self
            .stats
            .expirations(material.identities.iter().map(AsRef::as_ref), material.validation.as_deref());
        let resolver = Arc::new(Resolver {
            identities: material.identities,
            require_sni: self.settings.require_sni,
            full_scan: self.settings.full_scan,
        });
        let mut config = self
            .rustls_config(Arc::clone(&parameters.provider), verifier.as_ref(), &resolver)
            .map_err(|error| ConfigError::field("tls_params", error.to_string()))?;
        config.session_storage = if self.settings.stateful_resumption {
            Arc::new(Sessions::new(session_timeout))
        } else {
            Arc::new(NoServerSessionStorage {})
        };
        let tickets = |keys: &Arc<TicketKeys>| Tickets {
            keys: Arc::clone(keys),
            binding: self.binding(&resolver, material.validation.as_deref()),
            timeout: session_timeout,
        };
        match &self.settings.tickets {
            TicketSource::None if !self.settings.stateful_resumption => config.send_tls13_tickets = 0,
            TicketSource::None => {}
            TicketSource::Random => {
                let inner = rustls::crypto::aws_lc_rs::Ticketer::new()
                    .map_err(|error| ConfigError::new(format!("cannot make ticket keys: {error}")))?;
                config.ticketer = Arc::new(RandomTickets { inner, timeout: session_timeout });
            }
            TicketSource::Static(keys) => config.ticketer = Arc::new(tickets(keys)),
            TicketSource::Secret => {
                let secret = rest.first().ok_or_else(|| ConfigError::new("no secret"))?;
                let keys = secret.ticket_keys().at(|| "session_ticket_keys_sds_secret_config")?;
                config.ticketer = Arc::new(tickets(keys));
            }
        }
        let plain = Arc::new(Variant::new(parameters.ciphers.own(), config));
        if !secrets.is_empty() {
            self.stats.factory.ssl_context_update_by_sds().inc();
        }
        Ok(Built { plain, variants: ArcSwap::default(), resolver, verifier, expirations })
    }

    /// What is not of sessions.
    fn rustls_config(
        &self,
        provider: Arc<CryptoProvider>,
        verifier: Option<&Arc<Verifier>>,
        resolver: &Arc<Resolver>,
    ) -> Result<ServerConfig, rustls::Error> {
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&self.common.parameters.versions)?;
        let builder = match verifier {
            Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier) as _),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::clone(resolver) as _);
        config.alpn_protocols.clone_from(&self.common.alpn);
        config.key_log = Arc::clone(&self.common.key_log);
        config.ignore_client_order = !self.settings.prefer_client_ciphers;
        Ok(config)
    }

    /// The configuration for a client that offers these suites. At the bound all are forgotten; they share their sessions.
    fn variant(&self, built: &Built, offered: &[CipherSuite]) -> Arc<Variant> {
        if self.settings.prefer_client_ciphers {
            return Arc::clone(&built.plain);
        }
        let parameters = &self.common.parameters;
        let suites = parameters.ciphers.for_client(offered);
        let variants = built.variants.load();
        if let Some(variant) = [&built.plain].into_iter().chain(&**variants).find(|own| own.suites == suites)
        {
            return Arc::clone(variant);
        }
        let provider =
            CryptoProvider { cipher_suites: suites.clone(), ..CryptoProvider::clone(&parameters.provider) };
        // The same suites and versions were accepted when the context was built.
        let Ok(mut config) = self.rustls_config(Arc::new(provider), built.verifier.as_ref(), &built.resolver)
        else {
            return Arc::clone(&built.plain);
        };
        let plain = &built.plain.config;
        config.session_storage = Arc::clone(&plain.session_storage);
        config.ticketer = Arc::clone(&plain.ticketer);
        config.send_tls13_tickets = plain.send_tls13_tickets;
        let variant = Arc::new(Variant::new(suites, config));
        built.variants.rcu(|variants| {
            let mut variants = if variants.len() < MAX_VARIANTS { variants.to_vec() } else { Vec::new() };
            variants.push(Arc::clone(&variant));
            variants
        });
        variant
    }

    /// What a session under shared keys is bound to: the demands on clients and the names we serve, but not the very
    /// certificates, so that it outlives their renewal. The demands by content: a session is resumed without another
    /// look at the client's certificate, and who was trusted when it was made may not be any more.
    fn binding(&self, resolver: &Resolver, validation: Option<&Validation>) -> [u8; 32] {
        let required = [u8::from(self.settings.require_client_certificate)];
        let mut parts = vec![&required[..], validation.map_or(&[], |validation| &validation.digest)];
        for Certificate { subject, dns_sans, uri_sans, .. } in
            resolver.identities.iter().map(|identity| &*identity.certificate)
        {
            parts.push(subject.as_bytes());
            parts.extend(dns_sans.iter().chain(uri_sans).map(|name| name.as_bytes()));
        }
        digest_of(parts)
    }
}

impl Variant {
    fn new(suites: Vec<SupportedCipherSuite>, config: ServerConfig) -> Self {
        let without_alpn = (!config.alpn_protocols.is_empty()).then(|| {
            let mut config = config.clone();
            config.alpn_protocols.clear();
            Arc::new(config)
        });
        Self { suites, config: Arc::new(config), without_alpn }
    }
}

/// Chooses a certificate for a client (Envoy `DefaultTlsCertificateSelector`).
#[derive(Debug)]
struct Resolver {
    identities: Vec<Arc<Identity>>,
    require_sni: bool,
    full_scan: bool,
}

impl Resolver {
    /// The certificate for `server_name` among those that `usable` accepts: one that has the name, then one that has a
    /// wildcard for it, then by `full_scan_certs_on_sni_mismatch` any, or else the first. Elliptic curves win.
    fn choose(
        &self,
        server_name: Option<&str>,
        usable: impl Fn(&Identity) -> bool,
    ) -> Option<&Arc<Identity>> {
        let best = |serves: &dyn Fn(&Identity) -> bool| {
            let mut fitting = self.identities.iter().filter(|own| serves(own) && usable(own));
            let first = fitting.clone().next();
            fitting.find(|own| own.is_ecdsa()).or(first)
        };
        let Some(name) = server_name.filter(|name| !name.is_empty()) else {
            return best(&|_| true).or_else(|| self.identities.first());
        };
        let name = name.to_ascii_lowercase();
        let parent = name.split_once('.').map(|(_, parent)| parent);
        let has = |identity: &Identity, wanted: &dyn Fn(&str) -> bool| {
            identity.server_names.iter().any(|own| wanted(own))
        };
        best(&|own| has(own, &|own| own == name))
            .or_else(|| best(&|own| has(own, &|own| parent.is_some() && own.strip_prefix("*.") == parent)))
            .or_else(|| if self.full_scan { best(&|_| true) } else { None })
            .or_else(|| self.identities.first())
    }

    /// The certificate that a finished handshake used. rustls does not tell, so the choice is made again; every
    /// client of TLS 1.3 knows ECDSA (RFC 8446 section 9.1), and in TLS 1.2 the cipher suite tells.
    fn used(&self, connection: &rustls::ServerConnection) -> Option<&Arc<Identity>> {
        let (suite, now) = (connection.negotiated_cipher_suite(), unix_now());
        let signs = |identity: &Identity| match suite {
            _ if identity.to_serve(now).is_none() => false,
            Some(rustls::SupportedCipherSuite::Tls12(suite)) => {
                identity.certified.key.choose_scheme(suite.sign).is_some()
            }
            _ => true,
        };
        self.choose(connection.server_name(), signs)
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name();
        if self.require_sni && name.is_none_or(str::is_empty) {
            return None;
        }
        let schemes = hello.signature_schemes();
        let now = unix_now();
        let usable = |own: &Identity| {
            own.certified.key.choose_scheme(schemes).is_some() && own.to_serve(now).is_some()
        };
        self.choose(name, usable)?.to_serve(now).map(Arc::clone)
    }
}
