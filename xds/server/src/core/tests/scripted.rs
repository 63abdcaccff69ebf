use std::time::Duration;

use super::*;

/// Contents begin with the name, for the benefit of [`Received::decode`].
fn world(version: &str) -> Arc<Snapshot> {
    let text = |name: &str| format!("{name} {version}");
    snapshot(&[
        (CDS, "c1", &text("c1")),
        (CDS, "c2", &text("c2")),
        (EDS, "e1", &text("e1")),
        (LDS, "l1", &text("l1")),
        (RDS, "r1", &text("r1")),
    ])
}

#[test]
fn state_of_the_world_wildcard_and_by_name() {
    let mut rig = Rig::new(Protocol::Sotw, world("1"));
    assert_eq!(briefs(&rig.ask(&CDS, &[])), ["Cluster c1 c2"]);
    // A name that does not exist is not answered; it is sent when it comes to exist.
    assert_eq!(briefs(&rig.ask(&EDS, &["e2"])), [""; 0]);
    assert_eq!(briefs(&rig.ask(&EDS, &["e1", "e2"])), ["ClusterLoadAssignment e1"]);
    assert_eq!(briefs(&rig.ask(&CDS, &[])), [""; 0]);
    assert_eq!(briefs(&rig.ask(&EDS, &["e1", "e2"])), [""; 0]);
    let more =
        snapshot(&[(CDS, "c1", "c1 1"), (CDS, "c2", "c2 1"), (EDS, "e1", "e1 1"), (EDS, "e2", "e2 1")]);
    assert_eq!(briefs(&rig.publish(more)), ["ClusterLoadAssignment e2"]);
    let status = rig.core.streams().next().expect("the stream is open");
    assert_eq!(status.types.len(), 2);
    assert!(status.types[0].wildcard && !status.types[0].awaiting_answer && status.types[1].awaiting_answer);
    assert_eq!(status.types[0].sent, status.types[0].acknowledged);
}

#[test]
fn explicit_names_end_the_legacy_wildcard() {
    let mut rig = Rig::new(Protocol::Sotw, world("1"));
    assert_eq!(briefs(&rig.ask(&CDS, &["c1"])), ["Cluster c1"]);
    assert_eq!(briefs(&rig.ask(&CDS, &[])), [""; 0]);
    assert_eq!(briefs(&rig.publish(world("2"))), [""; 0]);
    assert_eq!(briefs(&rig.ask(&CDS, &["*"])), ["Cluster c1 c2"]);
}

#[test]
fn empty_world_is_an_answer_to_a_wildcard() {
    for protocol in [Protocol::Sotw, Protocol::Delta] {
        let mut rig = Rig::new(protocol, Arc::default());
        let answer = match protocol {
            Protocol::Sotw => rig.ask(&LDS, &[]),
            Protocol::Delta => rig.change(&LDS, &[], &[], &[]),
        };
        assert_eq!(briefs(&answer), ["Listener"]);
    }
}

#[test]
fn refused_version_is_not_sent_again() {
    let mut rig = Rig::new(Protocol::Sotw, world("1"));
    rig.ask(&CDS, &[]);
    assert_eq!(briefs(&rig.answer(&CDS, &[], Some("no such thing"))), [""; 0]);
    let status = rig.core.streams().next().expect("the stream is open");
    assert_eq!(
        status.types[0].refused.as_ref().map(|refusal| refusal.detail.as_str()),
        Some("no such thing")
    );
    assert_eq!(briefs(&rig.publish(world("1"))), [""; 0]);
    assert_eq!(briefs(&rig.publish(world("2"))), ["Cluster c1 c2"]);
    rig.ask(&CDS, &[]);
    assert!(rig.core.streams().next().expect("the stream is open").types[0].refused.is_none());
}

#[test]
fn one_response_of_a_type_at_a_time() {
    let mut rig = Rig::new(Protocol::Sotw, world("1"));
    rig.ask(&CDS, &[]);
    assert_eq!(briefs(&rig.publish(world("2"))), [""; 0]);
    assert_eq!(briefs(&rig.publish(world("3"))), [""; 0]);
    // An answer to another response than the last is none.
    let nonce = rig.nonces.insert(CDS, "stale".to_owned()).expect("one was sent");
    assert_eq!(briefs(&rig.ask(&CDS, &[])), [""; 0]);
    rig.nonces.insert(CDS, nonce);
    let received = rig.ask(&CDS, &[]);
    assert_eq!(received[0].resources["c1"], "c1 3");
    assert_eq!(briefs(&rig.ask(&CDS, &[])), [""; 0]);
}

#[test]
fn delta_subscriptions() {
    let mut rig = Rig::new(Protocol::Delta, world("1"));
    assert_eq!(briefs(&rig.change(&CDS, &[], &[], &[])), ["Cluster c1 c2"]);
    assert_eq!(briefs(&rig.ack(&CDS)), [""; 0]);
    // What does not exist is said not to, once.
    assert_eq!(briefs(&rig.change(&EDS, &["e1", "e2"], &[], &[])), ["ClusterLoadAssignment e1 -e2"]);
    assert_eq!(briefs(&rig.ack(&EDS)), [""; 0]);
    // Asked for again, sent again.
    assert_eq!(briefs(&rig.change(&EDS, &["e1"], &[], &[])), ["ClusterLoadAssignment e1"]);
    rig.ack(&EDS);
    assert_eq!(briefs(&rig.change(&EDS, &[], &["e1"], &[])), [""; 0]);
    let less = snapshot(&[(CDS, "c2", "c2 2"), (EDS, "e1", "e1 2"), (EDS, "e2", "e2 1")]);
    assert_eq!(briefs(&rig.publish(less)), ["Cluster c2", "ClusterLoadAssignment e2"]);
    assert_eq!(briefs(&rig.ack(&CDS)), [""; 0]);
    assert_eq!(briefs(&rig.ack(&EDS)), ["Cluster -c1"]);
}

#[test]
fn delta_reconnect_sends_the_difference() {
    let old = world("1");
    let version = |name: &str| old.of(&CDS)[name].version().to_string();
    let (c1, c2) = (version("c1"), version("c2"));
    let new = snapshot(&[(CDS, "c1", "c1 1"), (CDS, "c2", "c2 2"), (CDS, "c3", "c3 1")]);
    let mut rig = Rig::new(Protocol::Delta, new);
    let held = [("c0", "v"), ("c1", c1.as_str()), ("c2", c2.as_str())];
    assert_eq!(briefs(&rig.change(&CDS, &[], &[], &held)), ["Cluster c2 c3"]);
    assert_eq!(briefs(&rig.ack(&CDS)), ["Cluster -c0"]);
    // Nothing has changed: nothing is said.
    let mut rig = Rig::new(Protocol::Delta, old);
    assert_eq!(briefs(&rig.change(&CDS, &[], &[], &held[1..])), [""; 0]);
}

#[test]
fn make_before_break() {
    let before = snapshot(&[(CDS, "old", "old 1"), (LDS, "l1", "l1 1"), (RDS, "r1", "r1 old")]);
    let after = snapshot(&[(CDS, "new", "new 1"), (LDS, "l2", "l2 1"), (RDS, "r1", "r1 new")]);
    let mut rig = Rig::new(Protocol::Sotw, before.clone());
    for (kind, names) in [(CDS, &[][..]), (LDS, &[]), (RDS, &["r1"])] {
        rig.ask(&kind, names);
        rig.ask(&kind, names);
    }
    assert_eq!(briefs(&rig.publish(after.clone())), ["Cluster new old"]);
    assert_eq!(briefs(&rig.ask(&CDS, &[])), ["Listener l1 l2", "RouteConfiguration r1"]);
    assert_eq!(briefs(&rig.ask(&LDS, &[])), [""; 0]);
    assert_eq!(briefs(&rig.ask(&RDS, &["r1"])), ["Listener l2", "Cluster new"]);

    let mut rig = Rig::new(Protocol::Delta, before);
    for (kind, names) in [(CDS, &[][..]), (LDS, &[]), (RDS, &["r1"])] {
        rig.change(&kind, names, &[], &[]);
        rig.ack(&kind);
    }
    assert_eq!(briefs(&rig.publish(after)), ["Cluster new"]);
    assert_eq!(briefs(&rig.ack(&CDS)), ["Listener l2", "RouteConfiguration r1"]);
    assert_eq!(briefs(&rig.ack(&RDS)), [""; 0]);
    assert_eq!(briefs(&rig.ack(&LDS)), ["Listener -l1", "Cluster -old"]);
}

#[test]
fn patience_ends() {
    let mut rig = Rig::new(Protocol::Sotw, world("1"));
    for (kind, names) in [(CDS, &[][..]), (LDS, &[])] {
        rig.ask(&kind, names);
        rig.ask(&kind, names);
    }
    assert_eq!(briefs(&rig.publish(world("2"))), ["Cluster c1 c2"]);
    let deadline = rig.core.next_deadline().expect("the listener waits");
    assert_eq!(deadline, rig.now + Duration::from_secs(15));
    rig.now = deadline - Duration::from_millis(1);
    assert_eq!(briefs(&rig.tick()), [""; 0]);
    rig.now = deadline;
    assert_eq!(briefs(&rig.tick()), ["Listener l1"]);
    assert_eq!(rig.core.next_deadline(), None);
}

#[test]
fn endpoints_are_sent_again_with_their_cluster() {
    let with = |timeout| {
        let (kind, name, content) = eds_cluster("a", timeout);
        snapshot(&[(kind, name, &content), (EDS, "a", "a 1")])
    };
    for kind in [None, Some(EDS)] {
        let mut rig = Rig::of(Protocol::Delta, kind.clone(), with(1));
        if kind.is_none() {
            rig.change(&CDS, &[], &[], &[]);
            rig.ack(&CDS);
        }
        rig.change(&EDS, &["a"], &[], &[]);
        rig.ack(&EDS);
        let expected = ["Cluster a", "ClusterLoadAssignment a"];
        let expected = if kind.is_none() { &expected[..] } else { &expected[1..] };
        assert_eq!(briefs(&rig.publish(with(2))), expected);
    }
}

#[test]
fn requests_that_end_a_stream() {
    let request = |kind: &str| {
        let request =
            wire::DiscoveryRequest { type_url: kind.to_owned(), ..wire::DiscoveryRequest::default() };
        Bytes::from(request.encode_to_vec())
    };
    let mut rig = Rig::new(Protocol::Sotw, world("1"));
    assert!(matches!(rig.send(request("")), Err(RequestError::NoType)));
    assert!(matches!(rig.send(Bytes::from_static(&[0xff])), Err(RequestError::Malformed(_))));
    let many = (0..100).find_map(|index| rig.send(request(&format!("t/{index}"))).err());
    assert!(matches!(many, Some(RequestError::TooManyTypes)));
    let mut rig = Rig::of(Protocol::Sotw, Some(CDS), world("1"));
    assert!(matches!(rig.send(request(LDS.url())), Err(RequestError::OtherType(_))));
    assert_eq!(briefs(&rig.send(request("")).expect("the stream knows its type")), ["Cluster c1 c2"]);
    rig.core.close(rig.id);
    assert_eq!(rig.core.streams().count(), 0);
    assert_eq!(briefs(&rig.publish(world("2"))), [""; 0]);
}

#[test]
fn virtual_hosts_by_their_aliases() {
    const VHDS: ResourceType = ResourceType::VirtualHost;
    let world = |version: &str, aliases: &[&str]| {
        let host = |name: &str| Resource::new(VHDS, name, Bytes::from(format!("{name} {version}")));
        let aliases = aliases.iter().map(|alias| Arc::from(*alias)).collect();
        Arc::new([host("rc/all"), host("rc/lazy").with_aliases(aliases)].map(Arc::new).into_iter().collect())
    };
    let mut rig = Rig::new(Protocol::Delta, world("1", &["rc/a", "rc/b"]));
    // Without a name there is what has no aliases.
    assert_eq!(briefs(&rig.change(&VHDS, &[], &[], &[])), ["VirtualHost rc/all"]);
    rig.ack(&VHDS);
    // Two names of one resource are one answer, and who asks by another one is answered again.
    assert_eq!(briefs(&rig.change(&VHDS, &["rc/a", "rc/lazy"], &[], &[])), ["VirtualHost rc/lazy"]);
    rig.ack(&VHDS);
    assert_eq!(briefs(&rig.change(&VHDS, &["rc/b"], &[], &[])), ["VirtualHost rc/lazy"]);
    rig.ack(&VHDS);
    // Nothing is an answer, too; and it comes once it is there.
    assert_eq!(briefs(&rig.change(&VHDS, &["rc/c"], &[], &[])), ["VirtualHost rc/c?"]);
    rig.ack(&VHDS);
    assert_eq!(briefs(&rig.publish(world("1", &["rc/a", "rc/c"]))), ["VirtualHost rc/b? rc/lazy"]);
    rig.ack(&VHDS);
    assert_eq!(briefs(&rig.publish(world("2", &["rc/a", "rc/c"]))), ["VirtualHost rc/all rc/lazy"]);
    rig.ack(&VHDS);
    // Given up by one name, it is still followed by the others.
    assert_eq!(briefs(&rig.change(&VHDS, &[], &["rc/a", "rc/lazy"], &[])), [""; 0]);
    assert_eq!(briefs(&rig.publish(world("3", &["rc/a", "rc/c"]))), ["VirtualHost rc/all rc/lazy"]);
    rig.ack(&VHDS);
    rig.change(&VHDS, &[], &["rc/c", "rc/b"], &[]);
    assert_eq!(briefs(&rig.publish(world("4", &["rc/a", "rc/c"]))), ["VirtualHost rc/all"]);
    rig.ack(&VHDS);
    // Names that a client makes up leave nothing behind when it gives them up: asked for again, each is news.
    for _ in 0..2 {
        assert_eq!(briefs(&rig.change(&VHDS, &["rc/made-up"], &[], &[])), ["VirtualHost rc/made-up?"]);
        rig.ack(&VHDS);
        assert_eq!(briefs(&rig.change(&VHDS, &[], &["rc/made-up"], &[])), [""; 0]);
        assert_eq!(rig.core.held(), 1, "rc/all alone");
    }
}
