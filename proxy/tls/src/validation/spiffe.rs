//! `envoy.tls.cert_validator.spiffe`: trust by the trust domain of the peer's SPIFFE id.

use std::fmt;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use waystation_filter_api::data_source;
use waystation_filter_api::wire::{type_name, unpack};
use waystation_schema::{At as _, ConfigError};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::X509Certificate;

use super::{Authorities, Refusal, digest_of};
use crate::x509;

/// Authorities by trust domain.
pub(crate) struct TrustDomains {
    domains: Vec<(Box<str>, Authorities)>,
    /// Of their names and bundles.
    pub(crate) digest: [u8; 32],
}

impl TrustDomains {
    /// Compiles `custom_validator_config`.
    pub(crate) fn compile(extension: &core::TypedExtensionConfig) -> Result<Self, ConfigError> {
        let core::TypedExtensionConfig { name, typed_config } = extension;
        let any = typed_config.as_ref().ok_or_else(|| ConfigError::field("typed_config", "is required"))?;
        let type_name = type_name(any);
        if type_name != "envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig" {
            let reason = format!("not supported: certificate validator `{name}` ({type_name})");
            return Err(ConfigError::field("typed_config", reason));
        }
        let config = unpack(any).at(|| "typed_config")?;
        Self::compile_config(&config).at(|| "typed_config")
    }

    fn compile_config(config: &pb::SpiffeCertValidatorConfig) -> Result<Self, ConfigError> {
        let pb::SpiffeCertValidatorConfig { trust_domains, trust_bundles } = config;
        if trust_bundles.is_some() {
            return Err(ConfigError::field("trust_bundles", "not supported: give trust_domains"));
        }
        if trust_domains.is_empty() {
            return Err(ConfigError::field("trust_domains", "value must contain at least 1 item"));
        }
        let mut domains: Vec<(Box<str>, Authorities)> = Vec::new();
        let mut bundles = Vec::new();
        for (index, domain) in trust_domains.iter().enumerate() {
            let at = || format!("trust_domains[{index}]");
            let pb::spiffe_cert_validator_config::TrustDomain { name, trust_bundle, workload_trust_domain } =
                domain;
            if !workload_trust_domain.is_empty() {
                let error = ConfigError::field("workload_trust_domain", "not supported");
                return Err(error.at(at()));
            }
            if domains.iter().any(|(known, _)| **known == **name) {
                return Err(ConfigError::field(
                    "name",
                    "Multiple trust bundles are given for one trust domain",
                )
                .at(at()));
            }
            let bundle = data_source::read_filled(trust_bundle.as_ref()).at(|| "trust_bundle").at(at)?;
            let bundle =
                bundle.ok_or_else(|| ConfigError::field("trust_bundle", "value is required").at(at()))?;
            let authorities = Authorities::compile(&bundle).at(|| "trust_bundle").at(at)?;
            domains.push((name.as_str().into(), authorities));
            bundles.push(bundle.bytes);
        }
        let names = trust_domains.iter().map(|domain| domain.name.as_bytes());
        let digest = digest_of(names.zip(&bundles).flat_map(|(name, bundle)| [name, bundle]));
        Ok(Self { domains, digest })
    }

    /// The authorities for `leaf`: an X.509-SVID has one URI SAN and is no authority itself (SPIFFE X509-SVID 2, 5.2).
    pub(crate) fn authorities(&self, leaf: &X509Certificate<'_>) -> Result<&Authorities, Refusal> {
        let refused = |reason: &str| Refusal::Chain(reason.to_owned());
        let is_ca = leaf.basic_constraints().ok().flatten().is_some_and(|constraints| constraints.value.ca);
        let signs = leaf
            .key_usage()
            .ok()
            .flatten()
            .is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign());
        if is_ca || signs {
            return Err(refused("leaf certificate with CA condition"));
        }
        let mut uris = x509::names(leaf).iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let uri = match (uris.next(), uris.next()) {
            (Some(uri), None) => uri,
            _ => return Err(refused("no SPIFFE id")),
        };
        let domain = uri
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.split_once('/'))
            .map(|(domain, _)| domain)
            .ok_or_else(|| refused("not a SPIFFE id"))?;
        let found = self.domains.iter().find(|(name, _)| **name == *domain);
        found
            .map(|(_, authorities)| authorities)
            .ok_or_else(|| refused("no trust bundle for the trust domain"))
    }
}

impl fmt::Debug for TrustDomains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.domains.iter().map(|(name, _)| name)).finish()
    }
}
