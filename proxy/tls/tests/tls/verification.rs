//! Who is accepted.

use base64::Engine as _;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::google::protobuf::UInt32Value;
use pb::subject_alt_name_matcher::SanType;
use rcgen::{KeyPair, PublicKeyData as _, date_time_ymd};
use waystation_tls::ClientOptions;

use crate::support::{
    Authority, Leaf, World, any_client, common, downstream, inline, shake, shake_plainly, spiffe, trusting,
    upstream, validated, yes,
};

fn san(kind: SanType, name: &str) -> pb::SubjectAltNameMatcher {
    let pattern = matcher::string_matcher::MatchPattern::Exact(name.into());
    pb::SubjectAltNameMatcher {
        san_type: kind.into(),
        matcher: Some(matcher::StringMatcher { match_pattern: Some(pattern), ignore_case: false }),
        oid: String::new(),
    }
}

fn hex_hash(bytes: &[u8]) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn spki_hash(leaf: &Leaf) -> String {
    let spki = leaf.key.subject_public_key_info();
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &spki);
    base64::engine::general_purpose::STANDARD.encode(hash.as_ref())
}

/// What the server says of a client with `leaf` under `validation`, and which counter it counted.
fn judge(validation: pb::CertificateValidationContext, leaf: Option<&Leaf>) -> Result<bool, &'static str> {
    let world = World::default();
    let own = Leaf::self_signed(&["server"]);
    let server = world.server(&pb::DownstreamTlsContext {
        require_client_certificate: yes(),
        ..downstream(validated(&[&own], validation))
    });
    let certificates: Vec<&Leaf> = leaf.into_iter().collect();
    let client = world.client(&upstream(common(&certificates)));
    match shake_plainly(&server, &client).server {
        Ok(info) => {
            assert_eq!(world.stat("listener.in.ssl.handshake"), 1);
            Ok(info.peer_verified)
        }
        Err(reason) => {
            assert!(reason.starts_with("TLS_error:|"), "{reason}");
            let counters = [
                "connection_error",
                "fail_verify_no_cert",
                "fail_verify_error",
                "fail_verify_san",
                "fail_verify_cert_hash",
            ];
            let counted: Vec<_> = counters
                .into_iter()
                .filter(|name| world.stat(&format!("listener.in.ssl.{name}")) == 1)
                .collect();
            assert_eq!(counted.len(), 1, "{reason} {counted:?}");
            Err(counted[0])
        }
    }
}

#[test]
fn clients() {
    let ca = Authority::new("ca");
    let other = Authority::new("other");
    let good = ca.leaf(&["a.example.com", "spiffe://td/ns/a"]);
    let stranger = other.leaf(&["a.example.com"]);
    let expired = ca.leaf_with(&["old"], KeyPair::generate().unwrap(), |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    let server_only = ca.leaf_with(&["x"], KeyPair::generate().unwrap(), |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    let trusting = || trusting(&ca);
    let none = pb::CertificateValidationContext::default;
    let accept_untrusted = || pb::CertificateValidationContext { trust_chain_verification: 1, ..trusting() };
    let sans = |sans: &[pb::SubjectAltNameMatcher]| pb::CertificateValidationContext {
        match_typed_subject_alt_names: sans.to_vec(),
        ..trusting()
    };
    let hash =
        |hash: String| pb::CertificateValidationContext { verify_certificate_hash: vec![hash], ..none() };
    let spki =
        |hash: String| pb::CertificateValidationContext { verify_certificate_spki: vec![hash], ..none() };
    let table = [
        ("trusted", trusting(), Some(&good), Ok(true)),
        ("missing", trusting(), None, Err("fail_verify_no_cert")),
        ("wrong authority", trusting(), Some(&stranger), Err("fail_verify_error")),
        ("expired", trusting(), Some(&expired), Err("fail_verify_error")),
        ("purpose", trusting(), Some(&server_only), Err("fail_verify_error")),
        (
            "expired, allowed",
            pb::CertificateValidationContext { allow_expired_certificate: true, ..trusting() },
            Some(&expired),
            Ok(true),
        ),
        (
            "expired and allowed, but a stranger",
            pb::CertificateValidationContext { allow_expired_certificate: true, ..trusting() },
            Some(&stranger),
            Err("fail_verify_error"),
        ),
        ("untrusted, accepted", accept_untrusted(), Some(&stranger), Ok(false)),
        ("trusted, accepted", accept_untrusted(), Some(&good), Ok(true)),
        ("SAN", sans(&[san(SanType::Uri, "spiffe://td/ns/a")]), Some(&good), Ok(true)),
        (
            "second SAN",
            sans(&[san(SanType::Dns, "b"), san(SanType::Dns, "a.example.com")]),
            Some(&good),
            Ok(true),
        ),
        (
            "SAN of another type",
            sans(&[san(SanType::Dns, "spiffe://td/ns/a")]),
            Some(&good),
            Err("fail_verify_san"),
        ),
        ("SAN mismatch", sans(&[san(SanType::Uri, "spiffe://td/ns/b")]), Some(&good), Err("fail_verify_san")),
        (
            "SAN of a stranger",
            sans(&[san(SanType::Dns, "a.example.com")]),
            Some(&stranger),
            Err("fail_verify_error"),
        ),
        ("hash", hash(hex_hash(&good.der)), Some(&good), Ok(true)),
        ("hash mismatch", hash(hex_hash(&good.der)), Some(&stranger), Err("fail_verify_cert_hash")),
        ("SPKI", spki(spki_hash(&good)), Some(&good), Ok(true)),
        ("SPKI mismatch", spki(spki_hash(&good)), Some(&stranger), Err("fail_verify_cert_hash")),
        (
            "hash or SPKI",
            pb::CertificateValidationContext {
                verify_certificate_hash: vec![hex_hash(&stranger.der)],
                verify_certificate_spki: vec![spki_hash(&good)],
                ..trusting()
            },
            Some(&good),
            Ok(true),
        ),
    ];
    for (name, validation, leaf, expected) in table {
        assert_eq!(judge(validation, leaf), expected, "{name}");
    }
}

#[test]
fn hashes_may_have_colons() {
    let leaf = Leaf::self_signed(&["a"]);
    let hash = hex_hash(&leaf.der).to_uppercase();
    let pairs: Vec<&str> = (0..hash.len()).step_by(2).map(|at| &hash[at..at + 2]).collect();
    let validation = pb::CertificateValidationContext {
        verify_certificate_hash: vec![pairs.join(":")],
        ..pb::CertificateValidationContext::default()
    };
    assert_eq!(judge(validation, Some(&leaf)), Ok(true));
}

#[test]
fn a_trusted_self_signed_certificate_needs_no_issuer() {
    let leaf = Leaf::self_signed(&["a"]);
    let validation = pb::CertificateValidationContext {
        trusted_ca: inline(&leaf.pem),
        ..pb::CertificateValidationContext::default()
    };
    assert_eq!(judge(validation.clone(), Some(&leaf)), Ok(true));
    assert_eq!(judge(validation, Some(&Leaf::self_signed(&["a"]))), Err("fail_verify_error"));
}

#[test]
fn revocation() {
    let ca = Authority::new("ca");
    let with_serial = |serial: u64| {
        ca.leaf_with(&["a"], KeyPair::generate().unwrap(), |params| {
            params.serial_number = Some(serial.into())
        })
    };
    let (good, revoked) = (with_serial(1), with_serial(2));
    let current = ca.revoking(2, 2900);
    let with_list = |list: &str| pb::CertificateValidationContext { crl: inline(list), ..trusting(&ca) };
    assert_eq!(judge(with_list(&current), Some(&good)), Ok(true));
    assert_eq!(judge(with_list(&current), Some(&revoked)), Err("fail_verify_error"));
    let outdated = ca.revoking(2, 2021);
    assert_eq!(judge(with_list(&outdated), Some(&good)), Err("fail_verify_error"));
    let beside = pb::CertificateValidationContext {
        trusted_ca: inline(&format!("{}{current}", ca.pem)),
        ..pb::CertificateValidationContext::default()
    };
    assert_eq!(judge(beside, Some(&revoked)), Err("fail_verify_error"));

    // A list of the root says nothing of what an intermediate issued.
    let middle = ca.below("middle");
    let mut deep = middle.leaf(&["deep"]);
    deep.pem.push_str(&middle.pem);
    assert_eq!(judge(with_list(&current), Some(&deep)), Err("fail_verify_error"));
    assert_eq!(judge(trusting(&ca), Some(&deep)), Ok(true));
}

#[test]
fn depth_counts_intermediates() {
    let ca = Authority::new("ca");
    let middle = ca.below("middle");
    let mut leaf = middle.leaf(&["deep"]);
    leaf.pem.push_str(&middle.pem);
    let depth = |value| pb::CertificateValidationContext {
        max_verify_depth: Some(UInt32Value { value }),
        ..trusting(&ca)
    };
    assert_eq!(judge(depth(1), Some(&leaf)), Ok(true));
    assert_eq!(judge(depth(0), Some(&leaf)), Err("fail_verify_error"));
    assert_eq!(judge(depth(0), Some(&ca.leaf(&["a"]))), Ok(true));
}

#[test]
fn client_certificates_are_optional_unless_required() {
    let ca = Authority::new("ca");
    let own = Leaf::self_signed(&["server"]);
    let world = World::default();
    let server = world.server(&downstream(validated(&[&own], trusting(&ca))));
    let without = shake_plainly(&server, &world.client(&any_client("")));
    assert!(without.server.unwrap().peer.is_none());
    assert_eq!(world.stat("listener.in.ssl.no_certificate"), 1);

    let leaf = ca.leaf(&["a.example.com", "spiffe://td/ns/a"]);
    let with = shake_plainly(&server, &world.client(&upstream(common(&[&leaf]))));
    let (seen, own_view) = (with.server.unwrap(), with.client.unwrap());
    let peer = seen.peer.unwrap();
    assert!(seen.peer_verified);
    assert_eq!(peer.subject, "CN=a.example.com,O=Way\\, station");
    assert_eq!(peer.issuer, "CN=ca");
    assert_eq!(
        (&peer.dns_sans[..], &peer.uri_sans[..]),
        (&["a.example.com".into()][..], &["spiffe://td/ns/a".into()][..])
    );
    assert_eq!(peer.sha256, hex_hash(&leaf.der));
    assert_eq!(peer.sha256, own_view.local.unwrap().sha256);
    let pem = leaf.pem.replace("\r\n", "\n");
    let encoded: String = pem
        .chars()
        .map(|character| match character {
            '+' => "%2B".into(),
            '/' => "%2F".into(),
            '=' => "%3D".into(),
            ' ' => "%20".into(),
            '\n' => "%0A".into(),
            other => other.to_string(),
        })
        .collect();
    assert_eq!(peer.url_encoded_pem, encoded);

    let wrong = shake_plainly(&server, &world.client(&upstream(common(&[&Leaf::self_signed(&["x"])]))));
    assert_eq!(
        wrong.server.unwrap_err(),
        "TLS_error:|CERTIFICATE_VERIFY_FAILED:verify cert failed: unable to get local issuer certificate"
    );
}

#[test]
fn servers() {
    let ca = Authority::new("ca");
    let leaf = ca.leaf(&["*.example.com"]);
    let world = World::default();
    let server = world.server(&downstream(common(&[&leaf])));
    let check = |proto: &pb::UpstreamTlsContext, options: ClientOptions<'_>| {
        shake(&server, &world.client(proto), options).client.map(|info| info.peer_verified)
    };
    let options = ClientOptions::default;

    // Without a validation context any server will do.
    assert_eq!(check(&any_client("other.org"), options()), Ok(false));
    let trusting_ca = || upstream(validated(&[], trusting(&ca)));
    // A trusted chain is enough, whatever the name.
    assert_eq!(check(&trusting_ca(), options()), Ok(true));
    let trusting_other = upstream(validated(&[], trusting(&Authority::new("other"))));
    assert!(check(&trusting_other, options()).is_err());
    assert_eq!(world.stat("cluster.up.ssl.fail_verify_error"), 1);

    let verify_san = |name| ClientOptions { verify_san: Some(name), ..ClientOptions::default() };
    assert_eq!(check(&trusting_ca(), verify_san("a.example.com")), Ok(true));
    assert!(check(&trusting_ca(), verify_san("other.org")).is_err());
    assert!(check(&any_client(""), verify_san("other.org")).is_err());
    assert!(check(&trusting_ca(), verify_san("")).is_err(), "no name is not any name");
    assert_eq!(world.stat("cluster.up.ssl.fail_verify_san"), 3);

    // With auto_sni_san_validation the SNI takes the place of the matchers.
    let by_sni = |sni: &str, matcher: &str| pb::UpstreamTlsContext {
        sni: sni.into(),
        auto_sni_san_validation: true,
        ..upstream(validated(
            &[],
            pb::CertificateValidationContext {
                match_typed_subject_alt_names: vec![san(SanType::Dns, matcher)],
                ..trusting(&ca)
            },
        ))
    };
    assert_eq!(check(&by_sni("a.example.com", "nobody.org"), options()), Ok(true));
    assert!(check(&by_sni("other.org", "b.example.com"), options()).is_err());
    assert_eq!(check(&by_sni("", "b.example.com"), options()), Ok(true));
}

#[test]
fn spiffe_trust_domains() {
    let (one, two) = (Authority::new("one"), Authority::new("two"));
    let validation = || spiffe([("one.org", inline(&one.pem)), ("two.org", inline(&two.pem))]);
    assert_eq!(judge(validation(), Some(&one.leaf(&["spiffe://one.org/a"]))), Ok(true));
    for (authority, names) in [
        (&two, &["spiffe://one.org/a"][..]),
        (&one, &["spiffe://three.org/a"]),
        (&one, &["spiffe://one.org/a", "spiffe://one.org/b"]),
        (&one, &["one.org"]),
    ] {
        assert_eq!(judge(validation(), Some(&authority.leaf(names))), Err("fail_verify_error"), "{names:?}");
    }
    assert_eq!(judge(validation(), None), Err("fail_verify_no_cert"));
}

#[test]
fn keys_that_may_not_sign() {
    use rcgen::KeyUsagePurpose::{DigitalSignature, KeyAgreement, KeyEncipherment};
    let ca = Authority::new("ca");
    let accept_untrusted =
        || pb::CertificateValidationContext { trust_chain_verification: 1, ..trusting(&ca) };
    for (algorithm, usages, accepted) in [
        (&rcgen::PKCS_RSA_SHA256, vec![KeyEncipherment], false),
        (&rcgen::PKCS_RSA_SHA256, vec![KeyEncipherment, DigitalSignature], true),
        (&rcgen::PKCS_ECDSA_P256_SHA256, vec![KeyAgreement], false),
        (&rcgen::PKCS_ECDSA_P256_SHA256, vec![], true),
    ] {
        let case = format!("{algorithm:?} {usages:?}");
        let key = KeyPair::generate_for(algorithm).unwrap();
        let leaf = ca.leaf_with(&["a"], key, |params| params.key_usages = usages);
        let expected = if accepted { Ok(true) } else { Err("connection_error") };
        assert_eq!(judge(trusting(&ca), Some(&leaf)), expected, "client, {case}");
        assert_eq!(judge(accept_untrusted(), Some(&leaf)), expected, "untrusted client, {case}");

        let world = World::default();
        let server = world.server(&downstream(common(&[&leaf])));
        #[expect(deprecated, reason = "it is ignored")]
        let lax = pb::UpstreamTlsContext {
            enforce_rsa_key_usage: Some(envoy_types::pb::google::protobuf::BoolValue { value: false }),
            ..upstream(validated(&[], trusting(&ca)))
        };
        assert_eq!(shake_plainly(&server, &world.client(&lax)).client.is_ok(), accepted, "server, {case}");
        assert_eq!(world.stat("cluster.up.ssl.connection_error"), u64::from(!accepted), "{case}");
    }
}
