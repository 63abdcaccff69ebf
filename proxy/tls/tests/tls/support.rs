//! Certificates, contexts and a wire in memory.

use std::cell::RefCell;
use std::io::{Error, ErrorKind};
use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::google::protobuf::{Any, BoolValue};
use pb::common_tls_context::ValidationContextType;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};
use rustls::{ClientConnection, ServerConnection};
use waystation_filter_api::cell::Cell;
use waystation_filter_api::connection::TlsInfo;
use waystation_schema::ConfigError;
use waystation_stats::Store;
use waystation_tls::{ClientContext, ClientOptions, Secret, SecretKind, SecretTable, Secrets, ServerContext};

/// An authority.
pub(crate) struct Authority {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

/// A certificate with its key.
pub(crate) struct Leaf {
    pub(crate) pem: String,
    pub(crate) key: KeyPair,
    pub(crate) der: Vec<u8>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let (params, key) = Self::params(name);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// An intermediate authority.
    pub(crate) fn below(&self, name: &str) -> Self {
        let (params, key) = Self::params(name);
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn params(name: &str) -> (CertificateParams, KeyPair) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params, KeyPair::generate().unwrap())
    }

    /// A certificate for DNS names and URIs (what has `://`).
    pub(crate) fn leaf(&self, names: &[&str]) -> Leaf {
        self.leaf_with(names, KeyPair::generate().unwrap(), |_| {})
    }

    pub(crate) fn leaf_with(
        &self,
        names: &[&str],
        key: KeyPair,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Leaf {
        let mut params = params(names);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Leaf { pem: certificate.pem(), key, der: certificate.der().to_vec() }
    }
}

impl Authority {
    /// The list that it revoked one certificate, good until some year.
    pub(crate) fn revoking(&self, serial: u64, until: i32) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

impl Leaf {
    pub(crate) fn self_signed(names: &[&str]) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params(names).self_signed(&key).unwrap();
        Self { pem: certificate.pem(), key, der: certificate.der().to_vec() }
    }

    pub(crate) fn proto(&self) -> pb::TlsCertificate {
        pb::TlsCertificate {
            certificate_chain: inline(&self.pem),
            private_key: inline(&self.key.serialize_pem()),
            ..pb::TlsCertificate::default()
        }
    }

    pub(crate) fn secret(&self) -> pb::Secret {
        let r#type = Some(pb::secret::Type::TlsCertificate(self.proto()));
        pb::Secret { name: "cert".into(), r#type }
    }
}

fn params(names: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Way, station");
    params.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or("leaf"));
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = names
        .iter()
        .map(|name| match name.contains("://") {
            true => SanType::URI((*name).try_into().unwrap()),
            false => SanType::DnsName((*name).try_into().unwrap()),
        })
        .collect();
    params
}

pub(crate) fn inline(text: &str) -> Option<core::DataSource> {
    let specifier = Some(core::data_source::Specifier::InlineString(text.to_owned()));
    Some(core::DataSource { specifier, watched_directory: None })
}

/// The file at `path`.
pub(crate) fn file(path: &std::path::Path) -> Option<core::DataSource> {
    let specifier = Some(core::data_source::Specifier::Filename(path.to_str().unwrap().into()));
    Some(core::DataSource { specifier, watched_directory: None })
}

/// The SPIFFE validator with these bundles by trust domain.
pub(crate) fn spiffe(
    domains: impl IntoIterator<Item = (&'static str, Option<core::DataSource>)>,
) -> pb::CertificateValidationContext {
    use prost::Message as _;
    let domain = |(name, trust_bundle): (&str, _)| pb::spiffe_cert_validator_config::TrustDomain {
        name: name.into(),
        trust_bundle,
        workload_trust_domain: String::new(),
    };
    let config = pb::SpiffeCertValidatorConfig {
        trust_domains: domains.into_iter().map(domain).collect(),
        trust_bundles: None,
    };
    let type_url = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
    pb::CertificateValidationContext {
        custom_validator_config: Some(core::TypedExtensionConfig {
            name: "envoy.tls.cert_validator.spiffe".into(),
            typed_config: Some(Any { type_url: type_url.into(), value: config.encode_to_vec() }),
        }),
        ..pb::CertificateValidationContext::default()
    }
}

pub(crate) fn yes() -> Option<BoolValue> {
    Some(BoolValue { value: true })
}

pub(crate) fn common(certificates: &[&Leaf]) -> pb::CommonTlsContext {
    pb::CommonTlsContext {
        tls_certificates: certificates.iter().map(|leaf| leaf.proto()).collect(),
        ..pb::CommonTlsContext::default()
    }
}

pub(crate) fn downstream(common: pb::CommonTlsContext) -> pb::DownstreamTlsContext {
    pb::DownstreamTlsContext { common_tls_context: Some(common), ..pb::DownstreamTlsContext::default() }
}

pub(crate) fn upstream(common: pb::CommonTlsContext) -> pb::UpstreamTlsContext {
    pb::UpstreamTlsContext { common_tls_context: Some(common), ..pb::UpstreamTlsContext::default() }
}

/// A client without a certificate that verifies nothing.
pub(crate) fn any_client(sni: &str) -> pb::UpstreamTlsContext {
    pb::UpstreamTlsContext { sni: sni.into(), ..upstream(pb::CommonTlsContext::default()) }
}

pub(crate) fn trusting(authority: &Authority) -> pb::CertificateValidationContext {
    pb::CertificateValidationContext {
        trusted_ca: inline(&authority.pem),
        ..pb::CertificateValidationContext::default()
    }
}

pub(crate) fn validated(
    certificates: &[&Leaf],
    validation: pb::CertificateValidationContext,
) -> pb::CommonTlsContext {
    pb::CommonTlsContext {
        validation_context_type: Some(ValidationContextType::ValidationContext(validation)),
        ..common(certificates)
    }
}

pub(crate) fn sds(name: &str) -> pb::SdsSecretConfig {
    pb::SdsSecretConfig { name: name.into(), sds_config: Some(core::ConfigSource::default()) }
}

/// Secrets by name, and statistics.
#[derive(Default)]
pub(crate) struct World {
    table: SecretTable,
    store: Store,
    /// Statistics live as long as who counts them.
    servers: RefCell<Vec<Rc<ServerContext>>>,
    clients: RefCell<Vec<Rc<ClientContext>>>,
}

impl Secrets for World {
    fn secret(
        &self,
        _kind: SecretKind,
        _source: Option<&core::ConfigSource>,
        name: &str,
    ) -> Result<Arc<Cell<Secret>>, ConfigError> {
        Ok(self.table.cell(name))
    }
}

impl World {
    pub(crate) fn server(&self, proto: &pb::DownstreamTlsContext) -> Rc<ServerContext> {
        let server = Rc::new(self.try_server(proto).unwrap());
        self.servers.borrow_mut().push(Rc::clone(&server));
        server
    }

    pub(crate) fn try_server(&self, proto: &pb::DownstreamTlsContext) -> Result<ServerContext, ConfigError> {
        ServerContext::compile(proto, self, &self.store.root().scope("listener").scope("in"))
    }

    pub(crate) fn client(&self, proto: &pb::UpstreamTlsContext) -> Rc<ClientContext> {
        let client = Rc::new(self.try_client(proto).unwrap());
        self.clients.borrow_mut().push(Rc::clone(&client));
        client
    }

    pub(crate) fn try_client(&self, proto: &pb::UpstreamTlsContext) -> Result<ClientContext, ConfigError> {
        ClientContext::compile(proto, self, &self.store.root().scope("cluster").scope("up"))
    }

    pub(crate) fn set(&self, name: &str, secret: &pb::Secret) {
        self.table.cell(name).set(Some(Arc::new(Secret::compile(secret).unwrap())));
    }

    pub(crate) fn stat(&self, name: &str) -> u64 {
        self.store.find(name).unwrap_or(0)
    }
}

/// Both ends of a connection.
pub(crate) struct Wire {
    pub(crate) server: ServerConnection,
    pub(crate) client: ClientConnection,
    server_error: Option<Error>,
    client_error: Option<Error>,
}

/// What both sides think of a handshake.
pub(crate) struct Outcome {
    pub(crate) server: Result<TlsInfo, String>,
    pub(crate) client: Result<TlsInfo, String>,
}

impl Wire {
    pub(crate) fn new(server: &ServerContext, client: &ClientContext, options: ClientOptions<'_>) -> Self {
        let (config, name) = client.connect(options).unwrap();
        let mut wire = Self {
            server: ServerConnection::new(server.config().unwrap()).unwrap(),
            client: ClientConnection::new(config, name).unwrap(),
            server_error: None,
            client_error: None,
        };
        wire.pump();
        wire
    }

    /// With the configuration that the server has for a client that has said hello, as in a listener.
    pub(crate) fn greeted(server: &ServerContext, client: &ClientContext) -> Self {
        let (config, name) = client.connect(ClientOptions::default()).unwrap();
        let mut client = ClientConnection::new(config, name).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        let mut acceptor = rustls::server::Acceptor::default();
        acceptor.read_tls(&mut &hello[..]).unwrap();
        let accepted = acceptor.accept().map_err(|(error, _)| error).unwrap().unwrap();
        let config = server.config_for(&accepted.client_hello()).unwrap();
        let server = accepted.into_connection(config).map_err(|(error, _)| error).unwrap();
        let mut wire = Self { server, client, server_error: None, client_error: None };
        wire.pump();
        wire
    }

    /// Carries bytes until both are silent.
    pub(crate) fn pump(&mut self) {
        loop {
            let mut bytes = Vec::new();
            while self.client.wants_write() {
                self.client.write_tls(&mut bytes).unwrap();
            }
            let to_server = bytes.len();
            let mut rest = &bytes[..];
            while !rest.is_empty() && self.server_error.is_none() {
                self.server.read_tls(&mut rest).unwrap();
                let processed = self.server.process_new_packets();
                self.server_error = processed.err().map(|error| Error::new(ErrorKind::InvalidData, error));
            }
            let mut bytes = Vec::new();
            while self.server.wants_write() {
                self.server.write_tls(&mut bytes).unwrap();
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() && self.client_error.is_none() {
                self.client.read_tls(&mut rest).unwrap();
                let processed = self.client.process_new_packets();
                self.client_error = processed.err().map(|error| Error::new(ErrorKind::InvalidData, error));
            }
            if to_server + bytes.len() == 0 {
                return;
            }
        }
    }

    pub(crate) fn outcome(&self, server: &ServerContext, client: &ClientContext) -> Outcome {
        Outcome {
            server: match &self.server_error {
                Some(error) => Err(server.handshake_failed(error)),
                None => Ok(server.handshake_done(&self.server)),
            },
            client: match &self.client_error {
                Some(error) => Err(client.handshake_failed(error)),
                None => Ok(client.handshake_done(&self.client)),
            },
        }
    }
}

pub(crate) fn shake(server: &ServerContext, client: &ClientContext, options: ClientOptions<'_>) -> Outcome {
    Wire::new(server, client, options).outcome(server, client)
}

pub(crate) fn shake_plainly(server: &ServerContext, client: &ClientContext) -> Outcome {
    shake(server, client, ClientOptions::default())
}
