//! `CommonTlsContext`: what both sides configure alike.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use parking_lot::Mutex;
use rustls::{CommonState, KeyLog, NoKeyLog, SupportedCipherSuite};
use waystation_filter_api::cell::Cell;
use waystation_filter_api::connection::{Certificate, TlsInfo};
use waystation_filter_api::wire::refuse;
use waystation_schema::{At as _, ConfigError};

use crate::Secrets;
use crate::ciphers::cipher_name;
use crate::identity::Identity;
use crate::parameters::{Parameters, TlsProtocol, group_name, version_name};
use crate::secret::{Secret, SecretKind, ValidationPart};
use crate::validation::Validation;
use crate::x509;

use pb::common_tls_context::ValidationContextType;

/// A compiled `CommonTlsContext`.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) parameters: Parameters,
    pub(crate) alpn: Vec<Vec<u8>>,
    pub(crate) key_log: Arc<dyn KeyLog>,
    identities: Identities,
    validation: ValidationSource,
}

#[derive(Debug)]
enum Identities {
    Static(Vec<Arc<Identity>>),
    /// So many of the context's cells.
    Secrets(usize),
}

#[derive(Debug)]
enum ValidationSource {
    None,
    Static(Arc<Validation>),
    Secret,
    Combined(Box<ValidationPart>),
}

/// What a context is made of once all secrets are there.
#[derive(Debug)]
pub(crate) struct Material {
    pub(crate) identities: Vec<Arc<Identity>>,
    pub(crate) validation: Option<Arc<Validation>>,
}

impl Common {
    /// Compiles; the cells of all secrets it follows go into `cells`, in the order that [`Self::material`] expects.
    pub(crate) fn compile(
        proto: &pb::CommonTlsContext,
        secrets: &dyn Secrets,
        cells: &mut Vec<Arc<Cell<Secret>>>,
        newest: TlsProtocol,
    ) -> Result<Self, ConfigError> {
        #[expect(deprecated, reason = "they are refused by name")]
        let pb::CommonTlsContext {
            tls_params,
            tls_certificates,
            tls_certificate_sds_secret_configs,
            tls_certificate_provider_instance,
            custom_tls_certificate_selector,
            tls_certificate_certificate_provider,
            tls_certificate_certificate_provider_instance,
            alpn_protocols,
            custom_handshaker,
            key_log,
            validation_context_type,
        } = proto;
        let providers = "certificate providers";
        refuse("tls_certificate_provider_instance", tls_certificate_provider_instance.is_some(), providers)?;
        refuse(
            "tls_certificate_certificate_provider",
            tls_certificate_certificate_provider.is_some(),
            providers,
        )?;
        refuse(
            "tls_certificate_certificate_provider_instance",
            tls_certificate_certificate_provider_instance.is_some(),
            providers,
        )?;
        let selectors = "certificate selector extensions";
        refuse("custom_tls_certificate_selector", custom_tls_certificate_selector.is_some(), selectors)?;
        refuse("custom_handshaker", custom_handshaker.is_some(), "handshakes are those of rustls")?;

        let identities = if tls_certificates.is_empty() {
            for (index, config) in tls_certificate_sds_secret_configs.iter().enumerate() {
                let at = || format!("tls_certificate_sds_secret_configs[{index}]");
                cells.push(secret_cell(SecretKind::Certificate, config, secrets).at(at)?);
            }
            Identities::Secrets(tls_certificate_sds_secret_configs.len())
        } else if tls_certificate_sds_secret_configs.is_empty() {
            let compile = |(index, certificate)| match Identity::compile(certificate, "").map(Arc::new) {
                Ok(identity) => Ok(identity),
                Err(error) => Err(error.at(format!("tls_certificates[{index}]"))),
            };
            Identities::Static(tls_certificates.iter().enumerate().map(compile).collect::<Result<_, _>>()?)
        } else {
            return Err(ConfigError::field(
                "tls_certificate_sds_secret_configs",
                "SDS and non-SDS TLS certificates may not be mixed in server contexts",
            ));
        };
        let validation = match validation_context_type {
            None => ValidationSource::None,
            Some(ValidationContextType::ValidationContext(proto)) => {
                let whole = ValidationPart::compile(proto, "").and_then(|part| part.whole());
                ValidationSource::Static(whole.at(|| "validation_context")?)
            }
            Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => {
                let at = || "validation_context_sds_secret_config";
                cells.push(secret_cell(SecretKind::Validation, config, secrets).at(at)?);
                ValidationSource::Secret
            }
            Some(ValidationContextType::CombinedValidationContext(combined)) => {
                compile_combined(combined, secrets, cells).at(|| "combined_validation_context")?
            }
            #[expect(deprecated, reason = "it is refused by name")]
            Some(ValidationContextType::ValidationContextCertificateProvider(_)) => {
                return Err(ConfigError::field(
                    "validation_context_certificate_provider",
                    "not supported: certificate providers",
                ));
            }
            #[expect(deprecated, reason = "it is refused by name")]
            Some(ValidationContextType::ValidationContextCertificateProviderInstance(_)) => {
                return Err(ConfigError::field(
                    "validation_context_certificate_provider_instance",
                    "not supported: certificate providers",
                ));
            }
        };
        for (index, protocol) in alpn_protocols.iter().enumerate() {
            if protocol.is_empty() || protocol.len() > 255 {
                let reason = "must have 1 to 255 bytes";
                return Err(ConfigError::field(format!("alpn_protocols[{index}]"), reason));
            }
        }
        Ok(Self {
            parameters: Parameters::compile(tls_params.as_ref(), newest).at(|| "tls_params")?,
            alpn: alpn_protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect(),
            key_log: match key_log {
                Some(proto) => Arc::new(FileKeyLog::compile(proto).at(|| "key_log")?),
                None => Arc::new(NoKeyLog),
            },
            identities,
            validation,
        })
    }

    /// How many certificates there are.
    pub(crate) fn identities(&self) -> usize {
        match &self.identities {
            Identities::Static(identities) => identities.len(),
            Identities::Secrets(count) => *count,
        }
    }

    /// Whether peers are verified.
    pub(crate) fn validates(&self) -> bool {
        !matches!(self.validation, ValidationSource::None)
    }

    /// Puts together what the configuration and `secrets` (the values of the cells, in order) say. What it does not
    /// take itself is returned.
    pub(crate) fn material<'a>(
        &self,
        secrets: &'a [Arc<Secret>],
    ) -> Result<(Material, &'a [Arc<Secret>]), ConfigError> {
        let (identities, mut rest) = match &self.identities {
            Identities::Static(identities) => (identities.clone(), secrets),
            Identities::Secrets(count) => {
                let (own, rest) = secrets.split_at(*count);
                let identity = |(index, secret): (usize, &Arc<Secret>)| {
                    let at = || format!("tls_certificate_sds_secret_configs[{index}]");
                    secret.identity().map(Arc::clone).at(at)
                };
                (own.iter().enumerate().map(identity).collect::<Result<_, _>>()?, rest)
            }
        };
        let mut take = || {
            // One cell was pushed for each such validation.
            let (first, others) = rest.split_first().ok_or_else(|| ConfigError::new("no secret"))?;
            rest = others;
            first.validation()
        };
        let validation = match &self.validation {
            ValidationSource::None => None,
            ValidationSource::Static(validation) => Some(Arc::clone(validation)),
            ValidationSource::Secret => {
                let whole = take().and_then(ValidationPart::whole);
                Some(whole.at(|| "validation_context_sds_secret_config")?)
            }
            ValidationSource::Combined(default) => {
                let whole = take().and_then(|dynamic| default.combine(dynamic)?.whole());
                Some(whole.at(|| "combined_validation_context")?)
            }
        };
        let identities = match &self.parameters.schemes {
            None => identities,
            Some(schemes) => identities.iter().map(|own| Arc::new(own.limited(schemes))).collect(),
        };
        Ok((Material { identities, validation }, rest))
    }
}

/// The cell that `config` names.
pub(crate) fn secret_cell(
    kind: SecretKind,
    config: &pb::SdsSecretConfig,
    secrets: &dyn Secrets,
) -> Result<Arc<Cell<Secret>>, ConfigError> {
    let pb::SdsSecretConfig { name, sds_config } = config;
    if name.is_empty() {
        return Err(ConfigError::field("name", "value length must be at least 1 characters"));
    }
    secrets.secret(kind, sds_config.as_ref(), name)
}

/// What both sides tell of a finished handshake.
pub(crate) fn describe(
    connection: &CommonState,
    suite: Option<SupportedCipherSuite>,
    local: Option<Arc<Certificate>>,
) -> TlsInfo {
    let group = connection.negotiated_key_exchange_group();
    TlsInfo {
        version: version_name(connection.protocol_version()),
        cipher: suite.map_or("", |suite| cipher_name(suite.suite())),
        group: group.map_or("", |group| group_name(group.name())),
        resumed: connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
        server_name: None,
        peer: connection.peer_certificates().and_then(x509::certificate).map(Box::new),
        peer_verified: false,
        local,
    }
}

fn compile_combined(
    proto: &pb::common_tls_context::CombinedCertificateValidationContext,
    secrets: &dyn Secrets,
    cells: &mut Vec<Arc<Cell<Secret>>>,
) -> Result<ValidationSource, ConfigError> {
    #[expect(deprecated, reason = "they are refused by name")]
    let pb::common_tls_context::CombinedCertificateValidationContext {
        default_validation_context,
        validation_context_sds_secret_config,
        validation_context_certificate_provider,
        validation_context_certificate_provider_instance,
    } = proto;
    for (field, set) in [
        ("validation_context_certificate_provider", validation_context_certificate_provider.is_some()),
        (
            "validation_context_certificate_provider_instance",
            validation_context_certificate_provider_instance.is_some(),
        ),
    ] {
        if set {
            return Err(ConfigError::field(field, "not supported: certificate providers"));
        }
    }
    let required = |field| ConfigError::field(field, "value is required");
    let default =
        default_validation_context.as_ref().ok_or_else(|| required("default_validation_context"))?;
    let default = ValidationPart::compile(default, "").at(|| "default_validation_context")?;
    let config = validation_context_sds_secret_config
        .as_ref()
        .ok_or_else(|| required("validation_context_sds_secret_config"))?;
    let cell = secret_cell(SecretKind::Validation, config, secrets);
    cells.push(cell.at(|| "validation_context_sds_secret_config")?);
    Ok(ValidationSource::Combined(Box::new(default)))
}

/// `key_log`: secrets of sessions in NSS format, appended to a file. A means of debugging: it writes while the worker
/// waits.
#[derive(Debug)]
struct FileKeyLog(Mutex<File>);

impl FileKeyLog {
    fn compile(proto: &pb::TlsKeyLog) -> Result<Self, ConfigError> {
        let pb::TlsKeyLog { path, local_address_range, remote_address_range } = proto;
        for (field, ranges) in
            [("local_address_range", local_address_range), ("remote_address_range", remote_address_range)]
        {
            if !ranges.is_empty() {
                let reason = "not supported: rustls does not tell whose secret it logs";
                return Err(ConfigError::field(field, reason));
            }
        }
        let file = File::options().create(true).append(true).open(path);
        let file = file.map_err(|error| {
            ConfigError::field("path", format!("unable to open {path}: {}", error.kind()))
        })?;
        Ok(Self(Mutex::new(file)))
    }
}

impl KeyLog for FileKeyLog {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        let line = format!("{label} {} {}\n", x509::hex(client_random), x509::hex(secret));
        if let Err(error) = self.0.lock().write_all(line.as_bytes()) {
            tracing::warn!(target: "connection", "cannot write the TLS key log: {error}");
        }
    }
}
