//! Certificates, versions and protocols that are agreed on.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use rcgen::{KeyPair, PKCS_RSA_SHA256};
use rustls::server::Acceptor;
use waystation_filter_api::connection::TlsInfo;
use waystation_tls::ClientOptions;

use crate::support::{
    Authority, Leaf, Wire, World, any_client, common, downstream, shake, shake_plainly, upstream, yes,
};

/// The subject of the certificate that a client sees; both sides must agree on it.
fn chosen(
    world: &World,
    server: &pb::DownstreamTlsContext,
    client: &pb::UpstreamTlsContext,
) -> Option<String> {
    let outcome = shake_plainly(&world.server(server), &world.client(client));
    let (server, client) = (outcome.server.ok()?, outcome.client.ok()?);
    let seen = client.peer.unwrap();
    assert_eq!(server.local.unwrap().sha256, seen.sha256);
    Some(seen.subject.split(',').next().unwrap().to_owned())
}

#[test]
fn server_names_select_certificates() {
    let world = World::default();
    let (first, exact, wild) = (
        Leaf::self_signed(&["first.org"]),
        Leaf::self_signed(&["a.example.com"]),
        Leaf::self_signed(&["*.example.com"]),
    );
    let proto = downstream(common(&[&first, &wild, &exact]));
    for (sni, expected) in [
        ("a.example.com", "CN=a.example.com"),
        ("A.EXAMPLE.COM", "CN=a.example.com"),
        ("b.example.com", "CN=*.example.com"),
        ("c.b.example.com", "CN=first.org"),
        ("example.com", "CN=first.org"),
        ("", "CN=first.org"),
    ] {
        assert_eq!(chosen(&world, &proto, &any_client(sni)).as_deref(), Some(expected), "{sni}");
    }
    let strict = pb::DownstreamTlsContext { require_sni: yes(), ..proto };
    assert_eq!(chosen(&world, &strict, &any_client("")), None);
    assert!(chosen(&world, &strict, &any_client("x")).is_some());
}

#[test]
fn elliptic_curves_win_where_the_client_knows_them() {
    let world = World::default();
    let ca = Authority::new("ca");
    let rsa = ca.leaf_with(&["rsa"], KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap(), |_| {});
    let ecdsa = ca.leaf(&["ecdsa"]);
    let proto = downstream(common(&[&rsa, &ecdsa]));
    let with_ciphers = |name: &str| {
        upstream(pb::CommonTlsContext {
            tls_params: Some(pb::TlsParameters {
                tls_maximum_protocol_version: 3,
                cipher_suites: vec![name.into()],
                ..pb::TlsParameters::default()
            }),
            ..pb::CommonTlsContext::default()
        })
    };
    assert_eq!(chosen(&world, &proto, &any_client("")).as_deref(), Some("CN=ecdsa"));
    let only_ecdsa = with_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256");
    assert_eq!(chosen(&world, &proto, &only_ecdsa).as_deref(), Some("CN=ecdsa"));
    let only_rsa = with_ciphers("ECDHE-RSA-AES128-GCM-SHA256");
    assert_eq!(chosen(&world, &proto, &only_rsa).as_deref(), Some("CN=rsa"));
}

fn versions(minimum: i32, maximum: i32) -> Option<pb::TlsParameters> {
    Some(pb::TlsParameters {
        tls_minimum_protocol_version: minimum,
        tls_maximum_protocol_version: maximum,
        ..pb::TlsParameters::default()
    })
}

#[test]
fn versions_and_their_names() {
    let leaf = Leaf::self_signed(&["a"]);
    let agree = |server: (i32, i32), client: (i32, i32)| -> Result<TlsInfo, String> {
        let world = World::default();
        let server = pb::CommonTlsContext { tls_params: versions(server.0, server.1), ..common(&[&leaf]) };
        let client = pb::CommonTlsContext {
            tls_params: versions(client.0, client.1),
            ..pb::CommonTlsContext::default()
        };
        let outcome = shake_plainly(&world.server(&downstream(server)), &world.client(&upstream(client)));
        match &outcome.server {
            Ok(info) => {
                for (family, name) in
                    [("versions", info.version), ("ciphers", info.cipher), ("curves", info.group)]
                {
                    assert_eq!(world.stat(&format!("listener.in.ssl.{family}.{name}")), 1, "{name}");
                    assert_eq!(world.stat(&format!("cluster.up.ssl.{family}.{name}")), 1, "{name}");
                }
            }
            Err(reason) => {
                assert!(reason.starts_with("TLS_error:|"), "{reason}");
                assert_eq!(world.stat("listener.in.ssl.connection_error"), 1);
                assert_eq!(world.stat("cluster.up.ssl.connection_error"), 1);
            }
        }
        outcome.server
    };
    // Envoy's clients stop at TLS 1.2 unless they are told otherwise.
    assert_eq!(agree((0, 0), (0, 0)).unwrap().version, "TLSv1.2");
    let new = agree((0, 0), (0, 4)).unwrap();
    assert_eq!((new.version, new.group), ("TLSv1.3", "X25519MLKEM768"));
    assert!(new.cipher.starts_with("TLS_"), "{}", new.cipher);
    let old = agree((0, 0), (3, 3)).unwrap();
    assert_eq!((old.version, old.group), ("TLSv1.2", "X25519"));
    assert!(old.cipher.starts_with("ECDHE-ECDSA-"), "{}", old.cipher);
    assert_eq!(agree((3, 3), (0, 0)).unwrap().version, "TLSv1.2");
    assert!(agree((4, 4), (3, 3)).is_err());
    assert!(agree((3, 3), (4, 4)).is_err());
}

#[test]
fn curves_are_those_configured() {
    let leaf = Leaf::self_signed(&["a"]);
    let world = World::default();
    let params = pb::TlsParameters { ecdh_curves: vec!["P-384".into()], ..pb::TlsParameters::default() };
    let server = pb::CommonTlsContext { tls_params: Some(params), ..common(&[&leaf]) };
    let outcome = shake_plainly(&world.server(&downstream(server)), &world.client(&any_client("")));
    assert_eq!(outcome.client.unwrap().group, "P-384");
}

fn alpn(protocols: &[&str], common: pb::CommonTlsContext) -> pb::CommonTlsContext {
    pb::CommonTlsContext {
        alpn_protocols: protocols.iter().map(|protocol| (*protocol).to_owned()).collect(),
        ..common
    }
}

#[test]
fn application_protocols_in_the_order_of_the_server() {
    let leaf = Leaf::self_signed(&["a"]);
    let world = World::default();
    let server = world.server(&downstream(alpn(&["h2", "http/1.1"], common(&[&leaf]))));
    let client = world.client(&upstream(alpn(&["http/1.1", "h2"], pb::CommonTlsContext::default())));
    let wire = crate::support::Wire::new(&server, &client, ClientOptions::default());
    assert_eq!(wire.server.alpn_protocol(), Some(&b"h2"[..]));
    let only: &[&[u8]] = &[b"http/1.1"];
    let wire =
        crate::support::Wire::new(&server, &client, ClientOptions { alpn: only, ..Default::default() });
    assert_eq!(wire.client.alpn_protocol(), Some(&b"http/1.1"[..]));
    let none = world.client(&any_client(""));
    assert!(shake(&server, &none, ClientOptions::default()).server.is_ok());
}

#[test]
fn foreign_application_protocols_are_passed_over_once_the_hello_is_known() {
    let leaf = Leaf::self_signed(&["a"]);
    let world = World::default();
    let server = world.server(&downstream(alpn(&["h2"], common(&[&leaf]))));
    for (offered, protocols) in [(&b"foo"[..], 0), (b"h2", 1)] {
        let client = world.client(&any_client(""));
        let options = ClientOptions { alpn: &[offered], ..ClientOptions::default() };
        let (config, name) = client.connect(options).unwrap();
        let mut connection = rustls::ClientConnection::new(config, name).unwrap();
        let mut hello = Vec::new();
        connection.write_tls(&mut hello).unwrap();
        let mut acceptor = Acceptor::default();
        acceptor.read_tls(&mut &hello[..]).unwrap();
        let accepted = acceptor.accept().map_err(|(error, _)| error).unwrap().unwrap();
        let config = server.config_for(&accepted.client_hello()).unwrap();
        assert_eq!(config.alpn_protocols.len(), protocols);
        assert!(accepted.into_connection(config).is_ok());
    }
}

#[test]
fn a_full_scan_finds_a_usable_certificate_where_the_first_is_not() {
    let world = World::default();
    let ca = Authority::new("ca");
    let rsa = ca.leaf_with(&["rsa"], KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap(), |_| {});
    let ecdsa = ca.leaf(&["ecdsa"]);
    let client = pb::UpstreamTlsContext {
        sni: "unknown".into(),
        ..upstream(pb::CommonTlsContext {
            tls_params: Some(pb::TlsParameters {
                tls_maximum_protocol_version: 3,
                cipher_suites: vec!["ECDHE-ECDSA-AES128-GCM-SHA256".into()],
                ..pb::TlsParameters::default()
            }),
            ..pb::CommonTlsContext::default()
        })
    };
    let proto = downstream(common(&[&rsa, &ecdsa]));
    assert_eq!(chosen(&world, &proto, &client), None);
    let scanning = pb::DownstreamTlsContext { full_scan_certs_on_sni_mismatch: yes(), ..proto };
    assert_eq!(chosen(&world, &scanning, &client).as_deref(), Some("CN=ecdsa"));
}

#[test]
fn session_secrets_are_logged_where_asked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys");
    let leaf = Leaf::self_signed(&["a"]);
    let world = World::default();
    let key_log = pb::TlsKeyLog { path: path.to_str().unwrap().into(), ..pb::TlsKeyLog::default() };
    let proto = pb::CommonTlsContext { key_log: Some(key_log), ..common(&[&leaf]) };
    let outcome = shake_plainly(&world.server(&downstream(proto)), &world.client(&any_client("")));
    assert!(outcome.server.is_ok());
    let logged = std::fs::read_to_string(path).unwrap();
    assert!(logged.lines().any(|line| line.starts_with("CLIENT_RANDOM ")), "{logged}");
}

#[test]
fn the_server_chooses_the_cipher_unless_it_prefers_the_clients_order() {
    let ciphers = ["ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"];
    let with = |ciphers: [&str; 2], certificates: &[&Leaf]| pb::CommonTlsContext {
        tls_params: Some(pb::TlsParameters {
            tls_maximum_protocol_version: pb::tls_parameters::TlsProtocol::TlSv12 as i32,
            cipher_suites: ciphers.map(String::from).to_vec(),
            ..Default::default()
        }),
        ..common(certificates)
    };
    let own = Leaf::self_signed(&["server"]);
    let world = World::default();
    let client = world.client(&upstream(with([ciphers[1], ciphers[0]], &[])));
    for (prefer_client_ciphers, chosen) in [(false, ciphers[0]), (true, ciphers[1])] {
        let server = pb::DownstreamTlsContext { prefer_client_ciphers, ..downstream(with(ciphers, &[&own])) };
        let outcome = shake_plainly(&world.server(&server), &client);
        assert_eq!(outcome.server.unwrap().cipher, chosen);
    }
}

#[test]
fn a_client_chooses_among_equals_and_keeps_its_session() {
    let own = Leaf::self_signed(&["server"]);
    let world = World::default();
    let server = world.server(&downstream(common(&[&own])));
    let (aes, chacha) = ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305");
    for ciphers in [[aes, chacha], [chacha, aes]] {
        let client = world.client(&upstream(pb::CommonTlsContext {
            tls_params: Some(pb::TlsParameters {
                tls_maximum_protocol_version: pb::tls_parameters::TlsProtocol::TlSv12 as i32,
                cipher_suites: ciphers.map(String::from).to_vec(),
                ..Default::default()
            }),
            ..pb::CommonTlsContext::default()
        }));
        for resumed in [false, true] {
            let info = Wire::greeted(&server, &client).outcome(&server, &client).server.unwrap();
            assert_eq!((info.cipher, info.resumed), (ciphers[0], resumed));
        }
    }
}

#[test]
fn signatures_are_made_and_accepted_by_the_configured_algorithms() {
    let with = |algorithm: &str, certificates: &[&Leaf]| pb::CommonTlsContext {
        tls_params: Some(pb::TlsParameters {
            signature_algorithms: vec![algorithm.into()],
            tls_maximum_protocol_version: pb::tls_parameters::TlsProtocol::TlSv13 as i32,
            ..Default::default()
        }),
        ..common(certificates)
    };
    // Its key is of P-256.
    let own = Leaf::self_signed(&["server"]);
    let (fits, not) = ("ecdsa_secp256r1_sha256", "rsa_pss_rsae_sha256");
    let world = World::default();
    for (server, client, works) in [
        (with(fits, &[&own]), with(fits, &[]), true),
        // The server cannot sign, the client does not accept how it signs.
        (with(not, &[&own]), common(&[]), false),
        (common(&[&own]), with(not, &[]), false),
    ] {
        let outcome = shake_plainly(&world.server(&downstream(server)), &world.client(&upstream(client)));
        assert_eq!(outcome.server.is_ok() && outcome.client.is_ok(), works);
    }
}
