//! What cannot be done is refused, and the error names the field.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::google::protobuf::{Any, Duration};
use pb::common_tls_context::{CombinedCertificateValidationContext, ValidationContextType};
use pb::downstream_tls_context::SessionTicketKeysType;
use pb::secret::Type;
use waystation_tls::Secret;

use crate::support::{
    Authority, Leaf, World, common, downstream, file, inline, sds, trusting, upstream, validated, yes,
};

fn extension() -> Option<core::TypedExtensionConfig> {
    Some(core::TypedExtensionConfig { name: "x".into(), typed_config: Some(Any::default()) })
}

fn provider() -> Option<pb::CertificateProviderPluginInstance> {
    Some(pb::CertificateProviderPluginInstance::default())
}

fn secret_path(kind: Type) -> String {
    let secret = pb::Secret { name: "s".into(), r#type: Some(kind) };
    Secret::compile(&secret).unwrap_err().path()
}

#[test]
fn certificates() {
    let leaf = Leaf::self_signed(&["a"]);
    let good = || leaf.proto();
    let other_key = Leaf::self_signed(&["b"]).proto().private_key;
    for (proto, field) in [
        (pb::TlsCertificate { pkcs12: inline("x"), ..good() }, "pkcs12"),
        (
            pb::TlsCertificate { private_key_provider: Some(Default::default()), ..good() },
            "private_key_provider",
        ),
        (
            pb::TlsCertificate { signed_certificate_timestamp: vec![inline("x").unwrap()], ..good() },
            "signed_certificate_timestamp",
        ),
        (pb::TlsCertificate { tls_params: Some(Default::default()), ..good() }, "tls_params"),
        (pb::TlsCertificate { certificate_chain: None, ..good() }, "certificate_chain"),
        (pb::TlsCertificate { certificate_chain: inline("x"), ..good() }, "certificate_chain"),
        (pb::TlsCertificate { private_key: None, ..good() }, "private_key"),
        (pb::TlsCertificate { private_key: inline("x"), ..good() }, "private_key"),
        (pb::TlsCertificate { private_key: other_key, ..good() }, "private_key"),
    ] {
        assert_eq!(secret_path(Type::TlsCertificate(proto.clone())), format!("tls_certificate.{field}"));
        let common = pb::CommonTlsContext { tls_certificates: vec![good(), proto], ..Default::default() };
        let error = World::default().try_server(&downstream(common)).unwrap_err();
        assert_eq!(error.path(), format!("common_tls_context.tls_certificates[1].{field}"));
    }
    let missing = core::DataSource {
        specifier: Some(core::data_source::Specifier::Filename("/nonexistent/x.pem".into())),
        watched_directory: None,
    };
    let proto = pb::TlsCertificate { certificate_chain: Some(missing), ..good() };
    assert_eq!(secret_path(Type::TlsCertificate(proto)), "tls_certificate.certificate_chain.filename");
}

#[test]
fn validation_contexts() {
    let ca = Authority::new("ca");
    let none = pb::CertificateValidationContext::default;
    let untyped = |pattern| matcher::StringMatcher { match_pattern: pattern, ignore_case: false };
    let san = |san_type: i32, oid: &str| pb::SubjectAltNameMatcher {
        san_type,
        matcher: Some(untyped(Some(matcher::string_matcher::MatchPattern::Exact("x".into())))),
        oid: oid.into(),
    };
    let sans =
        |san| pb::CertificateValidationContext { match_typed_subject_alt_names: vec![san], ..trusting(&ca) };
    #[expect(deprecated, reason = "it is still accepted")]
    let broken_untyped =
        pb::CertificateValidationContext { match_subject_alt_names: vec![untyped(None)], ..trusting(&ca) };
    for (proto, path) in [
        (pb::CertificateValidationContext { trusted_ca: inline("x"), ..none() }, "trusted_ca"),
        (
            pb::CertificateValidationContext { ca_certificate_provider_instance: provider(), ..none() },
            "ca_certificate_provider_instance",
        ),
        (
            pb::CertificateValidationContext { require_signed_certificate_timestamp: yes(), ..none() },
            "require_signed_certificate_timestamp",
        ),
        (
            pb::CertificateValidationContext { custom_validator_config: extension(), ..none() },
            "custom_validator_config.typed_config",
        ),
        (pb::CertificateValidationContext { crl: inline("x"), ..trusting(&ca) }, "crl"),
        (
            pb::CertificateValidationContext { trust_chain_verification: 7, ..none() },
            "trust_chain_verification",
        ),
        (
            pb::CertificateValidationContext { verify_certificate_hash: vec!["00".into()], ..none() },
            "verify_certificate_hash[0]",
        ),
        (
            pb::CertificateValidationContext { verify_certificate_spki: vec!["!".into()], ..none() },
            "verify_certificate_spki[0]",
        ),
        (sans(san(0, "")), "match_typed_subject_alt_names[0].san_type"),
        (sans(san(5, "1.2.3")), "match_typed_subject_alt_names[0].san_type"),
        (sans(san(2, "1.2.3")), "match_typed_subject_alt_names[0].oid"),
        (broken_untyped, "match_subject_alt_names[0].match_pattern"),
    ] {
        assert_eq!(secret_path(Type::ValidationContext(proto.clone())), format!("validation_context.{path}"));
        let error = World::default().try_client(&upstream(validated(&[], proto))).unwrap_err();
        assert_eq!(error.path(), format!("common_tls_context.validation_context.{path}"));
    }
    for (proto, path) in [
        (
            pb::CertificateValidationContext { allow_expired_certificate: true, ..none() },
            "allow_expired_certificate",
        ),
        (
            pb::CertificateValidationContext { match_typed_subject_alt_names: vec![san(2, "")], ..none() },
            "match_typed_subject_alt_names",
        ),
    ] {
        let error = World::default().try_client(&upstream(validated(&[], proto))).unwrap_err();
        assert_eq!(error.path(), format!("common_tls_context.validation_context.{path}"));
    }
}

#[test]
#[expect(deprecated, reason = "deprecated fields are refused by name")]
fn common_contexts() {
    let leaf = Leaf::self_signed(&["a"]);
    let good = || common(&[&leaf]);
    let combined = |combined| pb::CommonTlsContext {
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
        ..good()
    };
    for (proto, path) in [
        (
            pb::CommonTlsContext { tls_certificate_provider_instance: provider(), ..good() },
            "tls_certificate_provider_instance",
        ),
        (
            pb::CommonTlsContext { tls_certificate_certificate_provider: Some(Default::default()), ..good() },
            "tls_certificate_certificate_provider",
        ),
        (
            pb::CommonTlsContext {
                tls_certificate_certificate_provider_instance: Some(Default::default()),
                ..good()
            },
            "tls_certificate_certificate_provider_instance",
        ),
        (
            pb::CommonTlsContext { custom_tls_certificate_selector: extension(), ..good() },
            "custom_tls_certificate_selector",
        ),
        (pb::CommonTlsContext { custom_handshaker: extension(), ..good() }, "custom_handshaker"),
        (
            pb::CommonTlsContext { tls_certificate_sds_secret_configs: vec![sds("x")], ..good() },
            "tls_certificate_sds_secret_configs",
        ),
        (
            pb::CommonTlsContext {
                tls_certificate_sds_secret_configs: vec![sds("")],
                ..pb::CommonTlsContext::default()
            },
            "tls_certificate_sds_secret_configs[0].name",
        ),
        (pb::CommonTlsContext { alpn_protocols: vec![String::new()], ..good() }, "alpn_protocols[0]"),
        (
            pb::CommonTlsContext {
                key_log: Some(pb::TlsKeyLog { path: "/nonexistent/log".into(), ..pb::TlsKeyLog::default() }),
                ..good()
            },
            "key_log.path",
        ),
        (
            pb::CommonTlsContext {
                key_log: Some(pb::TlsKeyLog {
                    path: "/nonexistent/log".into(),
                    remote_address_range: vec![core::CidrRange::default()],
                    ..pb::TlsKeyLog::default()
                }),
                ..good()
            },
            "key_log.remote_address_range",
        ),
        (
            pb::CommonTlsContext {
                validation_context_type: Some(ValidationContextType::ValidationContextCertificateProvider(
                    Default::default(),
                )),
                ..good()
            },
            "validation_context_certificate_provider",
        ),
        (
            pb::CommonTlsContext {
                validation_context_type: Some(
                    ValidationContextType::ValidationContextCertificateProviderInstance(Default::default()),
                ),
                ..good()
            },
            "validation_context_certificate_provider_instance",
        ),
        (
            combined(CombinedCertificateValidationContext {
                validation_context_certificate_provider: Some(Default::default()),
                ..Default::default()
            }),
            "combined_validation_context.validation_context_certificate_provider",
        ),
        (
            combined(CombinedCertificateValidationContext {
                validation_context_certificate_provider_instance: Some(Default::default()),
                ..Default::default()
            }),
            "combined_validation_context.validation_context_certificate_provider_instance",
        ),
        (combined(Default::default()), "combined_validation_context.default_validation_context"),
        (
            pb::CommonTlsContext {
                tls_params: Some(pb::TlsParameters {
                    compliance_policies: vec![0],
                    ..pb::TlsParameters::default()
                }),
                ..good()
            },
            "tls_params.compliance_policies",
        ),
    ] {
        let error = World::default().try_server(&downstream(proto)).unwrap_err();
        assert_eq!(error.path(), format!("common_tls_context.{path}"));
    }
}

#[test]
fn sides() {
    let leaf = Leaf::self_signed(&["a"]);
    let good = || downstream(common(&[&leaf]));
    let short = pb::TlsSessionTicketKeys { keys: vec![inline("short").unwrap()] };
    for (proto, path) in [
        (downstream(pb::CommonTlsContext::default()), "common_tls_context"),
        (pb::DownstreamTlsContext { ocsp_staple_policy: 1, ..good() }, "ocsp_staple_policy"),
        (pb::DownstreamTlsContext { ocsp_staple_policy: 2, ..good() }, "ocsp_staple_policy"),
        (
            pb::DownstreamTlsContext { session_timeout: Some(Duration { seconds: -1, nanos: 0 }), ..good() },
            "session_timeout",
        ),
        (
            pb::DownstreamTlsContext {
                session_ticket_keys_type: Some(SessionTicketKeysType::SessionTicketKeys(short.clone())),
                ..good()
            },
            "session_ticket_keys.keys[0]",
        ),
        (
            pb::DownstreamTlsContext {
                session_ticket_keys_type: Some(SessionTicketKeysType::SessionTicketKeys(Default::default())),
                ..good()
            },
            "session_ticket_keys.keys",
        ),
    ] {
        assert_eq!(World::default().try_server(&proto).unwrap_err().path(), path);
    }
    assert_eq!(secret_path(Type::SessionTicketKeys(short)), "session_ticket_keys.keys[0]");
    let keys = vec![inline(&"k".repeat(80)).unwrap(), file("/nonexistent/key".as_ref()).unwrap()];
    let missing = Type::SessionTicketKeys(pb::TlsSessionTicketKeys { keys });
    assert_eq!(secret_path(missing), "session_ticket_keys.keys[1].filename");

    let other = Leaf::self_signed(&["b"]);
    for (proto, path) in [
        (
            pb::UpstreamTlsContext { allow_renegotiation: true, ..upstream(Default::default()) },
            "allow_renegotiation",
        ),
        (
            pb::UpstreamTlsContext { auto_sni_san_validation: true, ..upstream(Default::default()) },
            "auto_sni_san_validation",
        ),
        (pb::UpstreamTlsContext { sni: "x".repeat(256), ..upstream(Default::default()) }, "sni"),
        (upstream(common(&[&leaf, &other])), "common_tls_context"),
    ] {
        assert_eq!(World::default().try_client(&proto).unwrap_err().path(), path);
    }
    assert_eq!(Secret::compile(&pb::Secret::default()).unwrap_err().path(), "type");
}
