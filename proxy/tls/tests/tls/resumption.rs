//! Sessions that are resumed, and those that must not be.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::google::protobuf::{Duration, UInt32Value};
use pb::downstream_tls_context::SessionTicketKeysType;
use waystation_tls::{ClientContext, ClientOptions, ServerContext};

use crate::support::{
    Authority, Leaf, World, any_client, common, downstream, file, inline, shake, shake_plainly, spiffe,
    trusting, upstream, validated, yes,
};

/// Whether the second of two connections resumes the session of the first; both sides must agree.
fn resumes(server: &ServerContext, second: &ServerContext, client: &ClientContext) -> bool {
    assert!(!shake_plainly(server, client).server.unwrap().resumed);
    let outcome = shake_plainly(second, client);
    let resumed = outcome.server.unwrap().resumed;
    assert_eq!(outcome.client.unwrap().resumed, resumed);
    resumed
}

fn tls12(proto: pb::UpstreamTlsContext) -> pb::UpstreamTlsContext {
    let params = pb::TlsParameters { tls_maximum_protocol_version: 3, ..pb::TlsParameters::default() };
    let common = pb::CommonTlsContext { tls_params: Some(params), ..proto.common_tls_context.unwrap() };
    pb::UpstreamTlsContext { common_tls_context: Some(common), ..proto }
}

#[test]
fn by_ticket_and_by_state_in_both_versions() {
    let leaf = Leaf::self_signed(&["a"]);
    let plain = || downstream(common(&[&leaf]));
    let stateless_off = Some(SessionTicketKeysType::DisableStatelessSessionResumption(true));
    let no_tickets =
        || pb::DownstreamTlsContext { session_ticket_keys_type: stateless_off.clone(), ..plain() };
    let no_state = || pb::DownstreamTlsContext { disable_stateful_session_resumption: true, ..plain() };
    let neither = || pb::DownstreamTlsContext { disable_stateful_session_resumption: true, ..no_tickets() };
    let timeout = |seconds| Some(Duration { seconds, nanos: 0 });
    let by_default = || pb::DownstreamTlsContext { session_timeout: timeout(0), ..plain() };
    let long = || pb::DownstreamTlsContext { session_timeout: timeout(1_000_000), ..plain() };
    let client = || any_client("a");
    let without = || pb::UpstreamTlsContext { max_session_keys: Some(UInt32Value { value: 0 }), ..client() };
    for (name, server, client, expected) in [
        ("both", plain(), client(), true),
        ("tickets", no_state(), client(), true),
        ("state", no_tickets(), client(), true),
        ("neither", neither(), client(), false),
        ("both, 1.2", plain(), tls12(client()), true),
        ("tickets, 1.2", no_state(), tls12(client()), true),
        ("state, 1.2", no_tickets(), tls12(client()), true),
        ("neither, 1.2", neither(), tls12(client()), false),
        ("timeout of 0", by_default(), client(), true),
        ("long timeout", long(), client(), true),
        ("client keeps none", plain(), without(), false),
    ] {
        let world = World::default();
        let server = world.server(&server);
        assert_eq!(resumes(&server, &server, &world.client(&client)), expected, "{name}");
        assert_eq!(world.stat("listener.in.ssl.session_reused"), u64::from(expected), "{name}");
        assert_eq!(world.stat("cluster.up.ssl.session_reused"), u64::from(expected), "{name}");
    }
}

#[test]
fn configured_keys_are_shared_but_not_with_those_who_demand_more() {
    let ca = Authority::new("ca");
    let leaf = Leaf::self_signed(&["a"]);
    let key = "k".repeat(80);
    let keys = pb::TlsSessionTicketKeys { keys: vec![inline(&key).unwrap()] };
    let keyed = |common: pb::CommonTlsContext, require: bool| pb::DownstreamTlsContext {
        session_ticket_keys_type: Some(SessionTicketKeysType::SessionTicketKeys(keys.clone())),
        require_client_certificate: if require { yes() } else { None },
        ..downstream(common)
    };
    let world = World::default();
    let (one, same) =
        (world.server(&keyed(common(&[&leaf]), false)), world.server(&keyed(common(&[&leaf]), false)));
    assert!(resumes(&one, &same, &world.client(&any_client("a"))));

    let strict = world.server(&keyed(validated(&[&leaf], trusting(&ca)), true));
    let client = world.client(&any_client("a"));
    assert!(shake_plainly(&one, &client).server.is_ok());
    assert!(shake_plainly(&strict, &client).server.is_err(), "no way around the client certificate");
}

/// Sessions outlive the process under configured keys; nobody looks at the client's certificate again.
#[test]
fn a_ticket_goes_with_the_trust_it_was_made_under() {
    let (old, new, own) = (Authority::new("old"), Authority::new("new"), Leaf::self_signed(&["server"]));
    let leaf = old.leaf_with(&["spiffe://td/a"], rcgen::KeyPair::generate().unwrap(), |params| {
        params.serial_number = Some(2.into());
    });
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.pem");
    let none = pb::CertificateValidationContext::default;
    for (kind, validation, before, after) in [
        (
            "authority",
            pb::CertificateValidationContext { trusted_ca: file(&path), ..none() },
            old.pem.clone(),
            new.pem.clone(),
        ),
        ("SPIFFE bundle", spiffe([("td", file(&path))]), old.pem.clone(), new.pem.clone()),
        (
            "revocation",
            pb::CertificateValidationContext { crl: file(&path), ..trusting(&old) },
            old.revoking(1, 2900),
            old.revoking(2, 2900),
        ),
    ] {
        let keys = pb::TlsSessionTicketKeys { keys: vec![inline(&"k".repeat(80)).unwrap()] };
        let proto = pb::DownstreamTlsContext {
            session_ticket_keys_type: Some(SessionTicketKeysType::SessionTicketKeys(keys)),
            require_client_certificate: yes(),
            ..downstream(validated(&[&own], validation))
        };
        let world = World::default();
        let client = world.client(&upstream(common(&[&leaf])));
        std::fs::write(&path, before).unwrap();
        assert!(resumes(&world.server(&proto), &world.server(&proto), &client), "{kind}");
        std::fs::write(&path, after).unwrap();
        assert!(shake_plainly(&world.server(&proto), &client).server.is_err(), "{kind}");
    }
}

#[test]
fn resumed_sessions_keep_the_client_certificate() {
    let ca = Authority::new("ca");
    let world = World::default();
    let own = Leaf::self_signed(&["server"]);
    let server = world.server(&pb::DownstreamTlsContext {
        require_client_certificate: yes(),
        ..downstream(validated(&[&own], trusting(&ca)))
    });
    let client = world.client(&upstream(common(&[&ca.leaf(&["a"])])));
    let first = shake_plainly(&server, &client).server.unwrap();
    let second = shake_plainly(&server, &client).server.unwrap();
    assert!(!first.resumed && second.resumed && second.peer_verified);
    assert_eq!(first.peer.unwrap().sha256, second.peer.unwrap().sha256);
}

#[test]
fn a_session_made_for_one_name_is_not_resumed_for_another() {
    let ca = Authority::new("ca");
    let world = World::default();
    let server = world.server(&downstream(common(&[&ca.leaf(&["a"])])));
    let client = world.client(&upstream(validated(&[], trusting(&ca))));
    fn named(name: &str) -> ClientOptions<'_> {
        ClientOptions { verify_san: Some(name), ..ClientOptions::default() }
    }
    assert!(shake(&server, &client, named("a")).client.is_ok());
    assert!(shake(&server, &client, named("b")).client.is_err());
    assert!(shake(&server, &client, named("a")).client.unwrap().resumed);
    for index in 0..200 {
        assert!(client.connect(named(&index.to_string())).is_some(), "more names than are kept");
    }
}
