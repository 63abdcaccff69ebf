//! Secrets that come and change.

use std::io::{Read as _, Write as _};

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use pb::common_tls_context::{CombinedCertificateValidationContext, ValidationContextType};
use pb::secret::Type;
use waystation_tls::{ClientOptions, Secret};

use crate::support::{
    Authority, Leaf, Wire, World, any_client, common, downstream, file, inline, sds, shake_plainly, spiffe,
    trusting, upstream, validated, yes,
};

fn with_sds(name: &str) -> pb::CommonTlsContext {
    pb::CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![sds(name)],
        ..pb::CommonTlsContext::default()
    }
}

fn validation_secret(proto: pb::CertificateValidationContext) -> pb::Secret {
    pb::Secret { name: "ca".into(), r#type: Some(Type::ValidationContext(proto)) }
}

#[test]
fn a_new_certificate_is_for_new_connections() {
    let world = World::default();
    let server = world.server(&downstream(with_sds("cert")));
    assert!(!server.is_ready() && server.config().is_none());
    assert_eq!(world.stat("listener.in.server_ssl_socket_factory.downstream_context_secrets_not_ready"), 1);
    let client = world.client(&any_client(""));

    world.set("cert", &Leaf::self_signed(&["one"]).secret());
    assert!(server.is_ready());
    let mut open = Wire::new(&server, &client, ClientOptions::default());
    let first = open.outcome(&server, &client).client.unwrap().peer.unwrap();
    assert_eq!(first.dns_sans, ["one"]);
    assert_eq!(world.stat("listener.in.server_ssl_socket_factory.ssl_context_update_by_sds"), 1);
    let expiration = "listener.in.ssl.certificate.cert.expiration_unix_time_seconds";
    assert_eq!(world.stat(expiration), u64::try_from(first.not_after).unwrap());

    world.set("cert", &Leaf::self_signed(&["two"]).secret());
    let second = shake_plainly(&server, &client).client.unwrap().peer.unwrap();
    assert_eq!(second.dns_sans, ["two"]);
    open.client.writer().write_all(b"still here").unwrap();
    open.pump();
    let mut received = [0; 10];
    open.server.reader().read_exact(&mut received).unwrap();
    assert_eq!(&received, b"still here");

    // A secret of another kind keeps what was.
    world.set("cert", &validation_secret(trusting(&Authority::new("ca"))));
    let third = shake_plainly(&server, &client).client.unwrap().peer.unwrap();
    assert_eq!(third.dns_sans, ["two"]);
    assert_eq!(world.stat("listener.in.server_ssl_socket_factory.ssl_context_update_by_sds"), 2);
}

#[test]
fn a_new_authority_changes_who_is_accepted() {
    let world = World::default();
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let leaf = Leaf::self_signed(&["server"]);
    let server = world.server(&pb::DownstreamTlsContext {
        require_client_certificate: yes(),
        ..downstream(pb::CommonTlsContext {
            validation_context_type: Some(ValidationContextType::ValidationContextSdsSecretConfig(sds("ca"))),
            ..common(&[&leaf])
        })
    });
    assert!(server.config().is_none());
    let accepted = |authority: &Authority| {
        let client = world.client(&upstream(common(&[&authority.leaf(&["a"])])));
        shake_plainly(&server, &client).server.is_ok()
    };
    world.set("ca", &validation_secret(trusting(&old)));
    assert_eq!((accepted(&old), accepted(&new)), (true, false));
    world.set("ca", &validation_secret(trusting(&new)));
    assert_eq!((accepted(&old), accepted(&new)), (false, true));
    // A context that would verify nothing it claims to is not taken over.
    let broken = pb::CertificateValidationContext { allow_expired_certificate: true, ..Default::default() };
    world.set("ca", &validation_secret(broken));
    assert_eq!((accepted(&old), accepted(&new)), (false, true));
}

#[test]
fn combined_contexts_join_lists_and_replace_fields() {
    use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
    let world = World::default();
    let ca = Authority::new("ca");
    let dns = |name: &str| pb::SubjectAltNameMatcher {
        san_type: pb::subject_alt_name_matcher::SanType::Dns.into(),
        matcher: Some(matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(name.into())),
            ignore_case: false,
        }),
        oid: String::new(),
    };
    let combined = CombinedCertificateValidationContext {
        default_validation_context: Some(pb::CertificateValidationContext {
            match_typed_subject_alt_names: vec![dns("a")],
            ..pb::CertificateValidationContext::default()
        }),
        validation_context_sds_secret_config: Some(sds("ca")),
        ..CombinedCertificateValidationContext::default()
    };
    let client = world.client(&upstream(pb::CommonTlsContext {
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
        ..pb::CommonTlsContext::default()
    }));
    assert!(client.connect(ClientOptions::default()).is_none());
    assert_eq!(world.stat("cluster.up.client_ssl_socket_factory.upstream_context_secrets_not_ready"), 1);
    world.set("ca", &validation_secret(trusting(&ca)));
    let accepted = |name: &str| {
        let server = world.server(&downstream(common(&[&ca.leaf(&[name])])));
        shake_plainly(&server, &client).client.is_ok()
    };
    assert_eq!((accepted("a"), accepted("b"), accepted("c")), (true, false, false));
    let more =
        pb::CertificateValidationContext { match_typed_subject_alt_names: vec![dns("b")], ..trusting(&ca) };
    world.set("ca", &validation_secret(more));
    assert_eq!((accepted("a"), accepted("b"), accepted("c")), (true, true, false));
    let stranger = world.server(&downstream(common(&[&Authority::new("x").leaf(&["a"])])));
    assert!(shake_plainly(&stranger, &client).client.is_err());
}

/// They are combined on the worker that shakes hands next.
#[test]
fn combined_contexts_need_no_file_again() {
    let (ca, own) = (Authority::new("ca"), Leaf::self_signed(&["server"]));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bundle.pem");
    let leaf = ca.leaf(&["spiffe://td/a"]);
    for (kind, default, dynamic) in [
        ("SPIFFE bundle by default", spiffe([("td", file(&path))]), Default::default()),
        ("SPIFFE bundle of the secret", Default::default(), spiffe([("td", file(&path))])),
        (
            "authority",
            pb::CertificateValidationContext { trusted_ca: file(&path), ..Default::default() },
            Default::default(),
        ),
    ] {
        let combined = CombinedCertificateValidationContext {
            default_validation_context: Some(default),
            validation_context_sds_secret_config: Some(sds("ca")),
            ..CombinedCertificateValidationContext::default()
        };
        std::fs::write(&path, &ca.pem).unwrap();
        let world = World::default();
        let server = world.server(&pb::DownstreamTlsContext {
            require_client_certificate: yes(),
            ..downstream(pb::CommonTlsContext {
                validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
                ..common(&[&own])
            })
        });
        world.set("ca", &validation_secret(dynamic));
        std::fs::remove_file(&path).unwrap();
        let judge =
            |leaf: &Leaf| shake_plainly(&server, &world.client(&upstream(common(&[leaf])))).server.is_ok();
        assert!(judge(&leaf), "{kind}");
        assert!(!judge(&Authority::new("other").leaf(&["spiffe://td/a"])), "{kind}");
    }
}

#[test]
fn certificates_are_described() {
    let ca = Authority::new("ca");
    let leaf = ca.leaf(&["a.example.com", "spiffe://td/a"]);
    let described = Secret::compile(&leaf.secret()).unwrap().describe().unwrap();
    assert_eq!((described.ca_cert.len(), described.cert_chain.len()), (0, 1));
    let details = &described.cert_chain[0];
    assert_eq!((details.path.as_str(), details.subject_alt_names.len()), ("<inline>", 2));
    let described = Secret::compile(&validation_secret(trusting(&ca))).unwrap().describe().unwrap();
    assert_eq!((described.ca_cert.len(), described.cert_chain.len()), (1, 0));
    let world = World::default();
    let server = world.server(&downstream(validated(&[&leaf], trusting(&ca))));
    let described = server.describe().unwrap();
    assert_eq!((described.ca_cert.len(), described.cert_chain.len()), (1, 1));
    let generic =
        pb::GenericSecret { secret: inline("s"), secrets: [("k".into(), inline("v").unwrap())].into() };
    let secret = pb::Secret { name: "g".into(), r#type: Some(Type::GenericSecret(generic)) };
    let secret = Secret::compile(&secret).unwrap();
    assert!(secret.describe().is_none());
    assert_eq!(secret.generic().unwrap().secrets["k"], b"v");
}

#[test]
fn files_are_read_when_a_secret_is_compiled_and_their_directories_are_to_be_watched() {
    use envoy_types::pb::envoy::config::core::v3 as core;
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        let specifier = Some(core::data_source::Specifier::Filename(path.to_str().unwrap().into()));
        Some(core::DataSource { specifier, watched_directory: None })
    };
    let leaf = Leaf::self_signed(&["a"]);
    let proto = pb::TlsCertificate {
        certificate_chain: file("chain.pem", &leaf.pem),
        private_key: file("key.pem", &leaf.key.serialize_pem()),
        ..pb::TlsCertificate::default()
    };
    let secret = |proto| pb::Secret { name: "s".into(), r#type: Some(Type::TlsCertificate(proto)) };
    let compiled = Secret::compile(&secret(proto.clone())).unwrap();
    assert_eq!(compiled.watched(), [directory.path()]);
    assert!(compiled.describe().unwrap().cert_chain[0].path.ends_with("chain.pem"));
    let watched = Some(core::WatchedDirectory { path: "/etc/certs".into(), ..Default::default() });
    let proto = pb::TlsCertificate { watched_directory: watched, ..proto };
    assert_eq!(Secret::compile(&secret(proto)).unwrap().watched(), [std::path::Path::new("/etc/certs")]);
    assert!(Secret::compile(&leaf.secret()).unwrap().watched().is_empty());
}
