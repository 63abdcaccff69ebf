//! `Secret`: what SDS delivers and the bootstrap names.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::admin::v3 as admin;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use prost::Message as _;
use waystation_filter_api::data_source;
use waystation_schema::{At as _, ConfigError};

use crate::identity::Identity;
use crate::session::TicketKeys;
use crate::validation::{Sources, Validation};
use crate::x509;

/// A compiled `envoy.extensions.transport_sockets.tls.v3.Secret`.
#[derive(Debug)]
pub struct Secret {
    kind: Kind,
    watched: Vec<PathBuf>,
}

/// The kinds of secrets. Those of the bootstrap have a name space each.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum SecretKind {
    /// `tls_certificate`
    Certificate,
    /// `validation_context`
    Validation,
    /// `session_ticket_keys`
    TicketKeys,
    /// `generic_secret`
    Generic,
}

impl SecretKind {
    /// What a secret is; nothing when its type is not set.
    pub fn of(proto: &pb::Secret) -> Option<Self> {
        use pb::secret::Type;
        Some(match proto.r#type.as_ref()? {
            Type::TlsCertificate(_) => Self::Certificate,
            Type::ValidationContext(_) => Self::Validation,
            Type::SessionTicketKeys(_) => Self::TicketKeys,
            Type::GenericSecret(_) => Self::Generic,
        })
    }

    /// As Envoy's messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Certificate => "TlsCertificate",
            Self::Validation => "CertificateValidationContext",
            Self::TicketKeys => "TlsSessionTicketKeys",
            Self::Generic => "GenericSecret",
        }
    }
}

#[derive(Debug)]
enum Kind {
    Certificate(Arc<Identity>),
    Validation(Box<ValidationPart>),
    TicketKeys(Arc<TicketKeys>),
    Generic(GenericSecret),
}

/// A compiled `GenericSecret`: bytes that only who asked for them understands.
#[derive(Debug, Default)]
pub struct GenericSecret {
    /// `secret`.
    pub secret: Vec<u8>,
    /// `secrets`, by name.
    pub secrets: HashMap<String, Vec<u8>>,
}

/// A validation context with what it names read, so that it can be combined with another.
#[derive(Clone, Debug)]
pub(crate) struct ValidationPart {
    proto: pb::CertificateValidationContext,
    sources: Sources,
    compiled: Arc<Validation>,
}

impl Secret {
    /// Compiles a secret; files it names are read now.
    pub fn compile(proto: &pb::Secret) -> Result<Self, ConfigError> {
        use pb::secret::Type;
        let pb::Secret { name, r#type } = proto;
        let kind = match r#type {
            None => return Err(ConfigError::field("type", "value is required")),
            Some(Type::TlsCertificate(proto)) => {
                Kind::Certificate(Arc::new(Identity::compile(proto, name).at(|| "tls_certificate")?))
            }
            Some(Type::ValidationContext(proto)) => {
                let part = ValidationPart::compile(proto, name).at(|| "validation_context")?;
                Kind::Validation(Box::new(part))
            }
            Some(Type::SessionTicketKeys(proto)) => {
                Kind::TicketKeys(Arc::new(TicketKeys::compile(proto).at(|| "session_ticket_keys")?))
            }
            Some(Type::GenericSecret(proto)) => {
                Kind::Generic(GenericSecret::compile(proto).at(|| "generic_secret")?)
            }
        };
        Ok(Self { kind, watched: watched(proto) })
    }

    /// What `/certs` tells of it; nothing when it has no certificate.
    pub fn describe(&self) -> Option<admin::Certificate> {
        match &self.kind {
            Kind::Certificate(identity) => Some(admin::Certificate {
                ca_cert: Vec::new(),
                cert_chain: describe_identity(identity).collect(),
            }),
            Kind::Validation(part) => Some(admin::Certificate {
                ca_cert: describe_authority(&part.compiled).collect(),
                cert_chain: Vec::new(),
            }),
            Kind::TicketKeys(_) | Kind::Generic(_) => None,
        }
    }

    /// The directories in which a file that appears or moves means that the secret must be compiled again: those of
    /// `watched_directory`, otherwise those of the files it names.
    pub fn watched(&self) -> &[PathBuf] {
        &self.watched
    }

    /// The generic secret, if it is one.
    pub fn generic(&self) -> Option<&GenericSecret> {
        match &self.kind {
            Kind::Generic(generic) => Some(generic),
            _ => None,
        }
    }

    pub(crate) fn identity(&self) -> Result<&Arc<Identity>, ConfigError> {
        match &self.kind {
            Kind::Certificate(identity) => Ok(identity),
            other => Err(other.unexpected("a TLS certificate")),
        }
    }

    pub(crate) fn validation(&self) -> Result<&ValidationPart, ConfigError> {
        match &self.kind {
            Kind::Validation(part) => Ok(part),
            other => Err(other.unexpected("a validation context")),
        }
    }

    pub(crate) fn ticket_keys(&self) -> Result<&Arc<TicketKeys>, ConfigError> {
        match &self.kind {
            Kind::TicketKeys(keys) => Ok(keys),
            other => Err(other.unexpected("session ticket keys")),
        }
    }
}

impl Kind {
    fn unexpected(&self, wanted: &str) -> ConfigError {
        let got = match self {
            Self::Certificate(_) => "a TLS certificate",
            Self::Validation(_) => "a validation context",
            Self::TicketKeys(_) => "session ticket keys",
            Self::Generic(_) => "a generic secret",
        };
        ConfigError::new(format!("Unexpected SDS secret: {wanted} is needed, {got} was given"))
    }
}

impl GenericSecret {
    fn compile(proto: &pb::GenericSecret) -> Result<Self, ConfigError> {
        let pb::GenericSecret { secret, secrets } = proto;
        let secret = data_source::read_filled(secret.as_ref()).at(|| "secret")?.unwrap_or_default().bytes;
        let secrets = secrets
            .iter()
            .map(|(name, source)| {
                let data = data_source::read_filled(Some(source)).at(|| format!("secrets[{name}]"))?;
                Ok((name.clone(), data.unwrap_or_default().bytes))
            })
            .collect::<Result<_, ConfigError>>()?;
        Ok(Self { secret, secrets })
    }
}

impl ValidationPart {
    pub(crate) fn compile(proto: &pb::CertificateValidationContext, name: &str) -> Result<Self, ConfigError> {
        let sources = Sources::read(proto)?;
        let mut compiled = Validation::compile(proto, &sources)?;
        if !name.is_empty() {
            compiled.stat_name = name.replace(['.', ':'], "_");
        }
        Ok(Self { proto: proto.clone(), sources, compiled: Arc::new(compiled) })
    }

    /// `combined_validation_context`: fields of `dynamic` take the place of ours, lists are joined.
    pub(crate) fn combine(&self, dynamic: &Self) -> Result<Self, ConfigError> {
        let mut proto = self.proto.clone();
        proto
            .merge(dynamic.proto.encode_to_vec().as_slice())
            .map_err(|error| ConfigError::new(format!("cannot combine validation contexts: {error}")))?;
        let sources = dynamic.sources.or(&self.sources);
        let mut compiled = Validation::compile(&proto, &sources)?;
        compiled.stat_name.clone_from(&dynamic.compiled.stat_name);
        Ok(Self { proto, sources, compiled: Arc::new(compiled) })
    }

    /// The validation, when it is not only a part of one.
    pub(crate) fn whole(&self) -> Result<Arc<Validation>, ConfigError> {
        self.compiled.check_whole(&self.proto)?;
        Ok(Arc::clone(&self.compiled))
    }
}

pub(crate) fn describe_identity(identity: &Identity) -> impl Iterator<Item = admin::CertificateDetails> {
    let now = unix_now();
    identity.certified.cert.iter().filter_map(move |der| x509::details(der, &identity.origin, now))
}

/// The first authority only, as Envoy.
pub(crate) fn describe_authority(validation: &Validation) -> impl Iterator<Item = admin::CertificateDetails> {
    let authorities = validation.authorities();
    authorities
        .and_then(|authorities| {
            x509::details(authorities.certificates.first()?, &authorities.origin, unix_now())
        })
        .into_iter()
}

fn watched(proto: &pb::Secret) -> Vec<PathBuf> {
    use pb::secret::Type;
    let (directory, files) = match &proto.r#type {
        Some(Type::TlsCertificate(certificate)) => (
            &certificate.watched_directory,
            vec![&certificate.certificate_chain, &certificate.private_key, &certificate.ocsp_staple],
        ),
        Some(Type::ValidationContext(context)) => {
            (&context.watched_directory, vec![&context.trusted_ca, &context.crl])
        }
        _ => return Vec::new(),
    };
    let files: Vec<&str> =
        files.into_iter().filter_map(|source| data_source::file(source.as_ref())).collect();
    let mut directories: Vec<PathBuf> = match directory {
        _ if files.is_empty() => return Vec::new(),
        Some(directory) => vec![PathBuf::from(&directory.path)],
        None => files.into_iter().filter_map(|file| Some(Path::new(file).parent()?.to_owned())).collect(),
    };
    directories.dedup();
    directories
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
