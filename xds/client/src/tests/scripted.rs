//! Known ways in which servers and networks misbehave, one by one.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;

use super::harness::{
    BAD, CDS, EDS, LDS, Manners, RDS, World, any, brief, briefs, delta, named, options, sotw, spec, toy,
    wrapped,
};
use crate::wire;
use crate::{
    Action, BackoffSpec, Core, Event, Failure, GrpcService, GrpcSource, Interest, Options, Protocol,
    RateLimit, Rejection, ResourceType, Source, SubscribeError, SubscriptionSpec,
};

fn wildcard_world(protocol: Protocol) -> World {
    let mut world = World::new(protocol, Manners::default());
    world.subscribe(spec(CDS, Interest::Wildcard));
    world.open();
    assert_eq!(briefs(&world.take_requests()), ["Cluster"]);
    world
}

fn sent(world: &mut World) -> Vec<String> {
    briefs(&world.take_requests())
}

fn names(list: &[Arc<str>]) -> Vec<&str> {
    list.iter().map(|name| &**name).collect()
}

// === Applying and refusing ===

#[test]
fn one_bad_resource_takes_no_good_one_down() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.receive_sotw(&CDS, "1", "n1", &[toy("a", &[], "1"), toy("b", &[], "1")]);
    world.receive_sotw(&CDS, "2", "n2", &[toy("a", &[], "2"), toy("b", &[], BAD), toy("c", &[], "2")]);
    let requests = world.take_requests();
    assert_eq!(briefs(&requests), ["Cluster v1 n=n1", "Cluster v1 n=n2 NACK"]);
    assert_eq!(requests[1].error.as_deref(), Some("Error adding/updating cluster(s) b: it is bad"));
    let content = |name| world.consumer.applied_content(&CDS, name);
    assert_eq!([content("a"), content("b"), content("c")].map(Option::unwrap), ["2", "1", "2"]);

    // The refused one is offered again, the others are not; when it is mended, all is well.
    world.take_updates();
    world.receive_sotw(&CDS, "2", "n3", &[toy("a", &[], "2"), toy("b", &[], BAD), toy("c", &[], "2")]);
    let updates = world.take_updates();
    assert_eq!(
        updates.iter().flat_map(|update| &update.resources).map(|one| &*one.name).collect::<Vec<_>>(),
        ["b"]
    );
    world.receive_sotw(&CDS, "3", "n4", &[toy("a", &[], "2"), toy("b", &[], "3"), toy("c", &[], "2")]);
    assert_eq!(sent(&mut world), ["Cluster v1 n=n3 NACK", "Cluster v3 n=n4"]);
}

#[test]
fn refusals_read_as_with_envoy() {
    let mut world = World::new(Protocol::Delta, Manners::default());
    world.subscribe(spec(LDS, Interest::Wildcard));
    world.open();
    world.receive_delta(
        &LDS,
        "1",
        "n1",
        &[toy("l1", &[], BAD), toy("l2", &[], BAD), toy("l3", &[], "")],
        &[],
    );
    let requests = world.take_requests();
    let error = requests[1].error.as_deref();
    assert_eq!(error, Some("Error adding/updating listener(s) l1: it is bad\nl2: it is bad\n"));
}

#[test]
fn same_bytes_are_acknowledged_and_not_handed_out() {
    for protocol in [Protocol::Sotw, Protocol::Delta] {
        let mut world = wildcard_world(protocol);
        let toys = [toy("a", &[], "1"), toy("b", &[], "1")];
        for round in 1..=3 {
            let (version, nonce) = (round.to_string(), format!("n{round}"));
            match protocol {
                Protocol::Sotw => world.receive_sotw(&CDS, &version, &nonce, &toys),
                Protocol::Delta => world.receive_delta(&CDS, &version, &nonce, &toys, &[]),
            }
        }
        assert_eq!(world.take_updates().len(), 1);
        assert_eq!(world.take_requests().len(), 3);
        assert!(world.core.held(&CDS).all(|held| &*held.resource.version == "3"));
    }
}

#[test]
fn duplicate_names_are_refused_as_a_whole() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.receive_sotw(&CDS, "1", "n1", &[toy("a", &[], "1"), toy("b", &[], "1"), toy("a", &[], "2")]);
    world.receive_sotw(&CDS, "2", "n2", &[toy("a", &[], "1")]);
    world.receive_sotw(&CDS, "3", "n3", &[toy("a", &[], "1"), toy("a", &[], "1")]);
    let requests = world.take_requests();
    assert_eq!(briefs(&requests), ["Cluster n=n1 NACK", "Cluster v2 n=n2", "Cluster v2 n=n3 NACK"]);
    assert_eq!(requests[0].error.as_deref(), Some("duplicate cluster a found"));
    assert_eq!(world.consumer.failures.len(), 2);

    let mut world = wildcard_world(Protocol::Delta);
    world.receive_delta(&CDS, "1", "n1", &[toy("a", &[], "1")], &["a"]);
    let error = world.take_requests().remove(0).error;
    assert_eq!(error.as_deref(), Some("duplicate name a found in the union of added+removed resources"));
}

#[test]
fn resource_of_another_type_is_refused() {
    let mut world = wildcard_world(Protocol::Sotw);
    let response = wire::DiscoveryResponse {
        version_info: "1".into(),
        type_url: CDS.url().into(),
        nonce: "n1".into(),
        resources: vec![any(&LDS, &toy("l", &[], ""))],
        control_plane: Some(wire::ControlPlane { identifier: "istiod-7".into() }),
    };
    world.receive(response.encode_to_vec().into());
    assert_eq!(sent(&mut world), ["Cluster n=n1 NACK"]);
    let mux = world.core.ads_mux().unwrap();
    assert_eq!(world.core.control_plane_stats(mux).unwrap().identifier, "istiod-7");
}

#[test]
fn malformed_message_ends_the_stream_and_nothing_else() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.receive_sotw(&CDS, "1", "n1", &[toy("a", &[], "1")]);
    world.receive(b"\xff\xff\xff"[..].into());
    assert!(world.stream.is_none());
    world.requests.clear();
    world.reopen();
    assert_eq!(sent(&mut world), ["Cluster v1"]);
    assert_eq!(world.core.held(&CDS).count(), 1);
}

#[test]
fn resources_that_nobody_asked_for_are_ignored() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    world.subscribe(named(EDS, &["a"]));
    world.open();
    world.receive_sotw(&EDS, "1", "n1", &[toy("a", &[], "1"), toy("x", &[], "1"), toy("x", &[], "1")]);
    world.receive_sotw(&RDS, "1", "m1", &[toy("r", &[], "1")]);
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment [a]", "ClusterLoadAssignment v1 [a] n=n1"]);
    assert_eq!(world.core.held(&EDS).count(), 1);
}

#[test]
fn only_full_state_types_lose_what_is_not_listed() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    world.subscribe(named(EDS, &["a", "b"]));
    world.subscribe(spec(CDS, Interest::Wildcard));
    world.open();
    world.receive_sotw(&EDS, "1", "n1", &[toy("a", &[], "1"), toy("b", &[], "1")]);
    world.receive_sotw(&CDS, "1", "m1", &[toy("a", &[], "1"), toy("b", &[], "1")]);
    world.take_updates();
    world.receive_sotw(&EDS, "2", "n2", &[toy("a", &[], "2")]);
    world.receive_sotw(&CDS, "2", "m2", &[]);
    let updates = world.take_updates();
    assert!(updates[0].removed.is_empty());
    assert_eq!(names(&updates[1].removed), ["a", "b"]);
    assert_eq!((world.core.held(&EDS).count(), world.core.held(&CDS).count()), (2, 0));
}

#[test]
fn first_answer_is_heard_even_when_it_is_empty() {
    let mut world = wildcard_world(Protocol::Delta);
    world.receive_delta(&CDS, "1", "n1", &[], &[]);
    world.receive_delta(&CDS, "2", "n2", &[], &[]);
    assert_eq!(world.take_updates().len(), 1);
    // Who comes later hears at once that there is nothing.
    world.subscribe(spec(CDS, Interest::Wildcard));
    assert_eq!(world.take_updates().len(), 1);
}

#[test]
fn ten_thousand_resources_with_one_changed() {
    let mut world = wildcard_world(Protocol::Sotw);
    let mut toys: Vec<_> = (0..10_000).map(|index| toy(&format!("c{index}"), &[], "1")).collect();
    world.receive_sotw(&CDS, "1", "n1", &toys);
    assert_eq!(world.take_updates()[0].resources.len(), 10_000);
    toys[4321].content = "2".into();
    toys.pop();
    world.receive_sotw(&CDS, "2", "n2", &toys);
    let updates = world.take_updates();
    assert_eq!((updates.len(), updates[0].resources.len(), updates[0].removed.len()), (1, 1, 1));
    assert_eq!(&*updates[0].resources[0].name, "c4321");
}

#[test]
fn ten_thousand_clusters_ask_for_their_endpoints_at_once() {
    for protocol in [Protocol::Sotw, Protocol::Delta] {
        let mut world = wildcard_world(protocol);
        let names: Vec<_> = (0..10_000).map(|index| format!("c{index}")).collect();
        let toys: Vec<_> = names.iter().map(|name| toy(name, &[name], "1")).collect();
        match protocol {
            Protocol::Sotw => world.receive_sotw(&CDS, "1", "n1", &toys),
            Protocol::Delta => world.receive_delta(&CDS, "1", "n1", &toys, &[]),
        }
        let requests = world.take_requests();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[0].names.len() + requests[0].subscribe.len(), 10_000);
    }
}

// === Warming and order ===

#[test]
fn clusters_without_endpoints_go_on_after_the_timeout() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.receive_sotw(&CDS, "1", "n1", &[toy("a", &["a"], "1")]);
    world.advance(Duration::from_millis(14_999));
    assert!(world.consumer.failures.is_empty());
    world.advance(Duration::from_millis(1));
    assert!(matches!(world.consumer.failures[..], [(_, Failure::FetchTimeout)]));
    world.advance(Duration::from_secs(60));
    assert_eq!(world.consumer.failures.len(), 1);
}

#[test]
fn changed_cluster_has_its_endpoints_at_once() {
    let mut world = wildcard_world(Protocol::Delta);
    world.receive_delta(&CDS, "1", "n1", &[toy("a", &["a"], "1")], &[]);
    world.receive_delta(&EDS, "1", "m1", &[toy("a", &[], "1")], &[]);
    world.take_requests();
    world.take_updates();
    world.receive_delta(&CDS, "2", "n2", &[toy("a", &["a"], "2")], &[]);
    assert_eq!(world.take_updates().iter().map(|update| update.kind.clone()).collect::<Vec<_>>(), [CDS, EDS]);
    assert_eq!(sent(&mut world), ["Cluster n=n2"]);
}

#[test]
fn changed_listener_keeps_its_routes() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    world.subscribe(spec(LDS, Interest::Wildcard));
    world.open();
    world.receive_sotw(&LDS, "1", "n1", &[toy("l", &["r"], "1")]);
    world.receive_sotw(&RDS, "1", "m1", &[toy("r", &[], "1")]);
    world.take_requests();
    world.take_updates();
    world.receive_sotw(&LDS, "2", "n2", &[toy("l", &["r"], "2")]);
    assert_eq!(sent(&mut world), ["Listener v2 n=n2"]);
    assert_eq!(world.consumer.applied_content(&RDS, "r").as_deref(), Some("1"));
}

#[test]
fn pauses_nest_and_hold_answers_back_in_order() {
    let mut world = wildcard_world(Protocol::Delta);
    world.core.pause(&CDS);
    world.core.pause(&CDS);
    world.receive_delta(&CDS, "1", "n1", &[toy("a", &[], "1")], &[]);
    world.receive_delta(&CDS, "2", "n2", &[toy("b", &[], BAD)], &[]);
    world.core.resume(&CDS, world.now);
    world.settle();
    assert!(sent(&mut world).is_empty());
    let mux = world.core.ads_mux().unwrap();
    assert_eq!(world.core.control_plane_stats(mux).unwrap().pending_requests, 1);
    world.core.resume(&CDS, world.now);
    world.settle();
    assert_eq!(sent(&mut world), ["Cluster n=n1", "Cluster n=n2 NACK"]);
    assert_eq!(world.core.control_plane_stats(mux).unwrap().pending_requests, 0);
}

#[test]
fn responses_wait_while_one_is_being_applied() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.withhold = true;
    world.receive_sotw(&CDS, "1", "n1", &[toy("a", &[], "1")]);
    world.receive_sotw(&CDS, "2", "n2", &[toy("a", &[], "2")]);
    assert_eq!(world.take_updates().len(), 1);
    assert!(sent(&mut world).is_empty());
    world.withhold = false;
    world.answer_withheld();
    assert_eq!(sent(&mut world), ["Cluster v1 n=n1", "Cluster v2 n=n2"]);
}

#[test]
fn flood_of_responses_stops_reading() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.withhold = true;
    let stream = world.stream.unwrap();
    let mut taken = 0;
    while world.core.wants_messages(stream) {
        taken += 1;
        assert!(taken < 100, "there must be a bound");
        world.receive_sotw(&CDS, "1", &format!("n{taken}"), &[toy("a", &[], &taken.to_string())]);
    }
    world.withhold = false;
    world.answer_withheld();
    assert!(world.core.wants_messages(stream));
    assert_eq!(world.take_requests().len(), taken);
}

#[test]
fn late_subscriber_gets_what_is_being_applied() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    let first = world.subscribe(named(EDS, &["a"]));
    world.open();
    world.receive_sotw(&EDS, "1", "n1", &[toy("a", &[], "1")]);
    world.take_requests();
    world.withhold = true;
    world.receive_sotw(&EDS, "2", "n2", &[toy("a", &[], BAD)]);
    world.take_updates();
    let late = world.subscribe(named(EDS, &["a"]));
    let update = world.take_updates().remove(0);
    assert_eq!((update.sub, &*update.version, &*update.resources[0].version), (late, "2", "2"));
    // Its refusal counts as that of the first, which leaves without having said anything.
    world.core.unsubscribe(first, world.now);
    world.settle();
    assert!(sent(&mut world).is_empty());
    world.answer_withheld();
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment v1 [a] n=n2 NACK"]);
    assert_eq!(&*world.core.held(&EDS).next().unwrap().resource.version, "1");
}

#[test]
fn change_that_arrives_while_nobody_wants_the_name_is_not_missed() {
    let mut world = World::new(Protocol::Delta, Manners::default());
    let id = world.subscribe(named(EDS, &["a"]));
    world.open();
    world.receive_delta(&EDS, "1", "n1", &[toy("a", &[], "1")], &[]);
    world.core.pause(&EDS);
    world.core.unsubscribe(id, world.now);
    world.receive_delta(&EDS, "2", "n2", &[toy("a", &[], "2")], &[]);
    world.subscribe(named(EDS, &["a"]));
    assert_eq!(world.consumer.applied_content(&EDS, "a").as_deref(), Some("2"));
}

#[test]
fn resource_that_only_some_accept_is_offered_again() {
    let mut world = World::new(Protocol::Delta, Manners::default());
    let pair = [world.subscribe(named(EDS, &["a"])), world.subscribe(named(EDS, &["a"]))];
    world.open();
    for round in ["n1", "n2"] {
        world.withhold = true;
        world.receive_delta(&EDS, "1", round, &[toy("a", &[], "1")], &[]);
        let offered: Vec<_> = world.take_updates().iter().map(|update| update.sub).collect();
        assert_eq!(offered, pair);
        let rejection = Rejection { name: "a".into(), reason: "not for me".into() };
        world.withheld[1].1.push(rejection);
        world.answer_withheld();
    }
    let requests = sent(&mut world);
    assert_eq!(requests[1..], ["ClusterLoadAssignment n=n1 NACK", "ClusterLoadAssignment n=n2 NACK"]);
    // The one that accepted it has it, but a new stream must bring it again.
    assert_eq!(world.core.held(&EDS).count(), 1);
    world.close();
    world.reopen();
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment +[a]"]);
}

#[test]
fn resource_that_nobody_looked_at_is_not_accepted() {
    let mut world = World::new(Protocol::Delta, Manners::default());
    let first = world.subscribe(named(EDS, &["a"]));
    world.open();
    world.withhold = true;
    world.receive_delta(&EDS, "1", "n1", &[toy("a", &[], BAD)], &[]);
    world.core.pause(&EDS);
    world.core.unsubscribe(first, world.now);
    world.withheld.clear();
    world.withhold = false;
    assert_eq!(world.core.held(&EDS).count(), 0);
    // The server was not told, and will not send it again: who comes back for it must judge it.
    world.subscribe(named(EDS, &["a"]));
    assert_eq!(world.take_updates().len(), 2);
    assert_eq!(world.core.held(&EDS).count(), 0);
    world.core.resume(&EDS, world.now);
    world.settle();
    world.take_requests();
    world.close();
    world.reopen();
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment +[a]"]);
}

#[test]
fn subscriber_that_leaves_does_not_hold_the_answer_back() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    let first = world.subscribe(named(EDS, &["a"]));
    world.subscribe(named(EDS, &["b"]));
    world.open();
    world.take_requests();
    world.withhold = true;
    world.receive_sotw(&EDS, "1", "n1", &[toy("a", &[], "1"), toy("b", &[], "1")]);
    world.core.unsubscribe(first, world.now);
    world.settle();
    assert!(sent(&mut world).is_empty());
    world.answer_withheld();
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment v1 [b] n=n1"]);
    assert_eq!(world.core.held(&EDS).count(), 1);
}

#[test]
fn name_given_up_and_taken_again_is_not_asked_for_twice() {
    let mut world = World::new(Protocol::Delta, Manners::default());
    let id = world.subscribe(named(EDS, &["a"]));
    world.open();
    world.receive_delta(&EDS, "1", "n1", &[toy("a", &[], "1")], &[]);
    world.take_requests();
    world.take_updates();
    world.core.pause(&EDS);
    world.core.unsubscribe(id, world.now);
    world.subscribe(named(EDS, &["a"]));
    world.core.resume(&EDS, world.now);
    world.settle();
    assert!(sent(&mut world).is_empty());
    assert_eq!(world.take_updates().len(), 1);
}

// === Streams ===

#[test]
fn nothing_is_lost_while_the_server_is_away() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.receive_sotw(&CDS, "1", "n1", &[toy("a", &["a"], "1"), toy("b", &["b"], "1")]);
    world.receive_sotw(&EDS, "5", "m1", &[toy("a", &[], "1"), toy("b", &[], "1")]);
    world.take_requests();
    world.close();
    world.advance(Duration::from_secs(3600));
    assert_eq!((world.core.held(&CDS).count(), world.core.held(&EDS).count()), (2, 2));
    world.reopen();
    assert_eq!(sent(&mut world), ["Cluster v1", "ClusterLoadAssignment v5 [a,b]"]);
    // What was removed in the meantime is gone with the first answer.
    world.take_updates();
    world.receive_sotw(&CDS, "2", "k1", &[toy("b", &["b"], "1")]);
    let updates = world.take_updates();
    assert_eq!(names(&updates[0].removed), ["a"]);
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment v5 [b]", "Cluster v2 n=k1"]);
}

#[test]
fn removed_while_away_with_delta() {
    let mut world = wildcard_world(Protocol::Delta);
    world.receive_delta(&CDS, "1", "n1", &[toy("a", &[], "1"), toy("b", &[], "1")], &[]);
    world.take_requests();
    world.close();
    world.reopen();
    assert_eq!(sent(&mut world), ["Cluster held[a=1,b=1]"]);
    world.receive_delta(&CDS, "2", "n1", &[], &["a"]);
    assert_eq!(sent(&mut world), ["Cluster n=n1"]);
    assert_eq!(world.core.held(&CDS).count(), 1);
}

#[test]
fn name_added_while_away_forces_a_full_answer() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    world.subscribe(named(EDS, &["a"]));
    world.open();
    world.receive_sotw(&EDS, "1", "n1", &[toy("a", &[], "1")]);
    world.take_requests();
    world.close();
    world.subscribe(named(EDS, &["b"]));
    world.reopen();
    // With version 1 a server would think that there is nothing to tell.
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment [a,b]"]);
}

#[test]
fn answer_of_an_old_stream_is_not_sent_on_the_new_one() {
    let mut world = wildcard_world(Protocol::Sotw);
    world.withhold = true;
    world.receive_sotw(&CDS, "1", "n1", &[toy("a", &[], "1")]);
    world.close();
    world.reopen();
    // First it is settled what we hold, then the new server is told.
    assert!(sent(&mut world).is_empty());
    world.answer_withheld();
    assert_eq!(sent(&mut world), ["Cluster v1"]);
    assert_eq!(world.core.held(&CDS).count(), 1);
}

#[test]
fn reports_of_an_old_stream_are_ignored() {
    let mut world = wildcard_world(Protocol::Sotw);
    let old = world.stream.unwrap();
    world.close();
    world.reopen();
    world.take_requests();
    world.core.message(old, sotw(&CDS, "1", "n1", &[toy("a", &[], "1")]), world.now);
    world.core.stream_closed(old, 14, "late", world.now);
    world.settle();
    assert!(sent(&mut world).is_empty());
    assert_eq!(world.core.held(&CDS).count(), 0);
    assert!(world.stream.is_some() && world.opening.is_empty());
}

#[test]
fn node_on_the_first_message_only() {
    let mut source = GrpcSource::new(Protocol::Sotw, GrpcService::new("xds_cluster"));
    source.node_on_first_message_only = true;
    let options = Options { ads: Some(Arc::new(source)), ..options(Protocol::Sotw, 1) };
    let mut world = World::with_options(Protocol::Sotw, Manners::default(), options);
    world.subscribe(spec(CDS, Interest::Wildcard));
    world.subscribe(spec(LDS, Interest::Wildcard));
    world.open();
    world.receive_sotw(&CDS, "1", "n1", &[]);
    world.close();
    world.reopen();
    let with_node: Vec<_> = world.take_requests().iter().map(|request| request.with_node).collect();
    assert_eq!(with_node, [true, false, false, true, false]);
}

#[test]
fn two_failures_lead_to_the_other_server() {
    let mut source = GrpcSource::new(Protocol::Delta, GrpcService::new("primary"));
    source.services.push(Arc::new(GrpcService::new("failover")));
    let options = Options { ads: Some(Arc::new(source)), ..options(Protocol::Delta, 1) };
    let mut core = Core::new(options, std::time::Instant::now());
    let mut now = std::time::Instant::now();
    core.subscribe(spec(CDS, Interest::Wildcard), now).unwrap();
    let mut open = |core: &mut Core| loop {
        if let Some(at) = core.next_deadline() {
            now = now.max(at);
        }
        core.tick(now);
        match core.poll_action() {
            Some(Action::Open { stream, service, .. }) => return (stream, service.target.clone(), now),
            Some(_) => {}
            None => assert!(core.next_deadline().is_some()),
        }
    };
    let (stream, target, now) = open(&mut core);
    assert_eq!(&*target, "primary");
    core.stream_opened(stream, now);
    core.message(stream, delta(&CDS, "1", "n1", vec![wrapped(&CDS, &toy("a", &[], "1"), "1")], &[]), now);
    while let Some(event) = core.poll_event() {
        if let Event::Update(update) = event {
            core.applied(update.token, Vec::new(), now);
        }
    }
    core.stream_closed(stream, 14, "", now);
    let (stream, target, now) = open(&mut core);
    assert_eq!(&*target, "primary");
    core.stream_closed(stream, 14, "", now);
    let (stream, target, now) = open(&mut core);
    assert_eq!(&*target, "failover");
    // Its versions are its own: what the primary gave us means nothing to it.
    core.stream_opened(stream, now);
    let Some(Action::Send { message, .. }) = core.poll_action() else { panic!("a first request") };
    assert_eq!(brief(&super::harness::Seen::decode(Protocol::Delta, &message)), "Cluster");
}

#[test]
fn rate_limit_holds_requests_back() {
    let mut source = GrpcSource::new(Protocol::Sotw, GrpcService::new("xds_cluster"));
    source.rate_limit = Some(RateLimit { max_tokens: 2, fill_millis: 1000 });
    let options = Options { ads: Some(Arc::new(source)), ..options(Protocol::Sotw, 1) };
    let mut world = World::with_options(Protocol::Sotw, Manners::default(), options);
    for kind in [CDS, LDS] {
        world.subscribe(spec(kind, Interest::Wildcard));
    }
    world.subscribe(named(EDS, &["a"]));
    world.open();
    assert_eq!(sent(&mut world), ["Cluster", "Listener"]);
    let mux = world.core.ads_mux().unwrap();
    let stats = world.core.control_plane_stats(mux).unwrap();
    assert_eq!((stats.rate_limit_enforced, stats.pending_requests), (1, 1));
    world.advance(Duration::from_secs(1));
    assert_eq!(sent(&mut world), ["ClusterLoadAssignment [a]"]);
}

#[test]
fn waits_between_attempts_are_jittered_and_bounded() {
    let mut source = GrpcSource::new(Protocol::Sotw, GrpcService::new("xds_cluster"));
    source.backoff = BackoffSpec { base: Duration::from_millis(100), max: Duration::from_millis(800) };
    let options = Options { ads: Some(Arc::new(source)), ..options(Protocol::Sotw, 9) };
    let mut world = World::with_options(Protocol::Sotw, Manners::default(), options);
    let id = world
        .core
        .subscribe(SubscriptionSpec { init_fetch_timeout: None, ..spec(CDS, Interest::Wildcard) }, world.now);
    world.settle();
    for round in 0..8_u32 {
        let stream = world.opening.pop_front().expect("an attempt");
        world.core.stream_closed(stream, 14, "refused", world.now);
        let wait = world.core.next_deadline().unwrap() - world.now;
        assert!(wait < Duration::from_millis(100 << round.min(3)), "{wait:?} in round {round}");
        world.advance(wait);
    }
    let stats = world.core.subscription_stats(id.unwrap()).unwrap();
    assert_eq!((stats.update_failure, stats.update_attempt), (8, 9));
}

#[test]
fn transport_that_does_not_send_gets_no_more() {
    let mut core = Core::new(options(Protocol::Delta, 1), std::time::Instant::now());
    let now = std::time::Instant::now();
    let id = core.subscribe(named(EDS, &["start"]), now).unwrap();
    let Some(Action::Open { stream, .. }) = core.poll_action() else { panic!("a stream") };
    core.stream_opened(stream, now);
    for index in 0..1000 {
        core.add_names(id, vec![format!("n{index}").into()], now);
    }
    let queued = std::iter::from_fn(|| core.poll_action()).count();
    assert_eq!(queued, 16);
    // The rest melts into one request.
    core.sent(stream, now);
    let Some(Action::Send { message, .. }) = core.poll_action() else { panic!("a request") };
    assert_eq!(super::harness::Seen::decode(Protocol::Delta, &message).subscribe.len(), 1000 - 15);
}

// === Wildcards, namespaces, TTL ===

#[test]
fn explicit_names_beside_the_wildcard() {
    let mut world = wildcard_world(Protocol::Delta);
    let on_demand = world.subscribe(named(CDS, &["x"]));
    assert_eq!(sent(&mut world), ["Cluster +[x]"]);
    world.receive_delta(&CDS, "1", "n1", &[toy("a", &[], "1"), toy("x", &[], "1")], &["y"]);
    // The wildcard hears of both, the other of its own only.
    let counts: Vec<_> = world.take_updates().iter().map(|update| update.resources.len()).collect();
    assert_eq!(counts, [2, 1]);
    world.take_requests();
    world.close();
    world.reopen();
    assert_eq!(sent(&mut world), ["Cluster +[*,x] held[a=1,x=1]"]);
    world.core.unsubscribe(on_demand, world.now);
    world.settle();
    assert_eq!(sent(&mut world), ["Cluster -[x]"]);
    assert_eq!(world.core.held(&CDS).count(), 2);
}

#[test]
fn state_of_the_world_never_turns_a_list_into_a_wildcard() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    let id = world.subscribe(named(EDS, &["a"]));
    world.open();
    world.receive_sotw(&EDS, "1", "n1", &[toy("a", &[], "1")]);
    world.core.set_names(id, Vec::new(), world.now);
    world.settle();
    assert_eq!(
        sent(&mut world),
        ["ClusterLoadAssignment [a]", "ClusterLoadAssignment v1 [a] n=n1", "ClusterLoadAssignment v1 n=n1"]
    );
    world.close();
    world.reopen();
    assert!(sent(&mut world).is_empty(), "on a new stream an empty list would mean everything");
}

#[test]
fn name_that_does_not_exist_is_told_at_once() {
    let mut world = World::new(Protocol::Delta, Manners::default());
    world.subscribe(named(EDS, &["a"]));
    world.open();
    world.receive_delta(&EDS, "1", "n1", &[], &["a"]);
    assert_eq!(names(&world.take_updates()[0].removed), ["a"]);
    world.advance(Duration::from_secs(60));
    assert!(world.consumer.failures.is_empty());
}

#[test]
fn clusters_on_demand() {
    let mut world = World::new(Protocol::Delta, Manners::default());
    let id = world.subscribe(named(CDS, &["gone"]));
    world.open();
    assert_eq!(sent(&mut world), ["Cluster +[gone]"]);
    world.receive_delta(&CDS, "1", "n1", &[], &["gone"]);
    assert_eq!(names(&world.take_updates()[0].removed), ["gone"]);
    assert_eq!(sent(&mut world), ["Cluster n=n1"]);
    // Who was told that there is nothing gives the name up, and may ask anew.
    world.core.remove_names(id, vec!["gone".into()], world.now);
    world.settle();
    assert_eq!(sent(&mut world), ["Cluster -[gone]"]);
    world.core.add_names(id, vec!["gone".into(), "here".into()], world.now);
    world.settle();
    assert_eq!(sent(&mut world), ["Cluster +[gone,here]"]);
    // Two who ask for one name are one subscription.
    world.core.add_names(id, vec!["here".into()], world.now);
    world.settle();
    assert!(sent(&mut world).is_empty());
    world.receive_delta(&CDS, "2", "n2", &[toy("here", &[], "1"), toy("gone", &[], "1")], &[]);
    assert_eq!(world.take_updates()[0].resources.len(), 2);
    world.take_requests();
    // What was found stays, and a new stream is told of it.
    world.close();
    world.reopen();
    assert_eq!(sent(&mut world), ["Cluster +[gone,here] held[gone=2,here=2]"]);
    world.receive_delta(&CDS, "3", "n3", &[], &["gone"]);
    assert_eq!(names(&world.take_updates()[0].removed), ["gone"]);
    assert_eq!(world.core.held(&CDS).count(), 1);
}

#[test]
fn virtual_hosts_on_demand() {
    let vhds = ResourceType::VirtualHost;
    let mut world = World::new(Protocol::Delta, Manners::default());
    let id = world.subscribe(spec(vhds.clone(), Interest::Namespace("rc".into())));
    world.open();
    world.receive_delta(&vhds, "1", "n1", &[toy("rc/first", &[], "1"), toy("other/x", &[], "1")], &[]);
    assert_eq!(world.take_updates()[0].resources.len(), 1);
    assert_eq!(sent(&mut world), ["VirtualHost", "VirtualHost n=n1"]);

    world.core.add_names(id, vec!["rc/api.example".into(), "rc/nowhere".into()], world.now);
    world.settle();
    assert_eq!(sent(&mut world), ["VirtualHost +[rc/api.example,rc/nowhere]"]);
    let mut found = wrapped(&vhds, &toy("rc/api", &[], "1"), "2");
    found.aliases = vec!["rc/api.example".into()];
    let unknown = wire::Resource {
        name: "rc/nowhere".into(),
        aliases: vec!["rc/nowhere".into()],
        ..wire::Resource::default()
    };
    world.receive(delta(&vhds, "2", "n2", vec![found, unknown], &[]));
    let update = world.take_updates().remove(0);
    assert_eq!((&*update.resources[0].name, &*update.resources[0].aliases[0]), ("rc/api", "rc/api.example"));
    assert_eq!(names(&update.removed), ["rc/nowhere"]);
    world.take_requests();
    world.close();
    world.reopen();
    assert_eq!(sent(&mut world), ["VirtualHost +[rc/api.example,rc/nowhere] held[rc/api=2,rc/first=1]"]);
}

#[test]
fn time_to_live_and_heartbeats() {
    let mut world = wildcard_world(Protocol::Delta);
    let with_ttl = |content: Option<&str>, version: &str| {
        let mut resource = wrapped(&CDS, &toy("a", &[], content.unwrap_or_default()), version);
        resource.ttl = Some(wire::Duration { seconds: 10, nanos: 0 });
        if content.is_none() {
            resource.resource = None;
        }
        resource
    };
    world.receive(delta(&CDS, "1", "n1", vec![with_ttl(Some("1"), "1")], &[]));
    world.advance(Duration::from_secs(9));
    // A heartbeat: same version, no body.
    world.receive(delta(&CDS, "1", "n2", vec![with_ttl(None, "1")], &[]));
    assert_eq!(sent(&mut world), ["Cluster n=n1", "Cluster n=n2"]);
    world.advance(Duration::from_secs(9));
    assert_eq!(world.core.held(&CDS).count(), 1);
    // One for a version that we do not have proves nothing.
    world.receive(delta(&CDS, "1", "n3", vec![with_ttl(None, "0")], &[]));
    world.take_updates();
    world.advance(Duration::from_secs(1));
    assert_eq!(names(&world.take_updates()[0].removed), ["a"]);
    assert_eq!(world.core.held(&CDS).count(), 0);
    assert_eq!(world.core.next_deadline(), None);
}

#[test]
fn heartbeats_in_state_of_the_world_delete_nothing() {
    let mut world = wildcard_world(Protocol::Sotw);
    let wrapper = |name: &str, body: bool| {
        let mut resource = wrapped(&CDS, &toy(name, &[], "1"), "1");
        resource.ttl = Some(wire::Duration { seconds: 10, nanos: 0 });
        if !body {
            resource.resource = None;
        }
        let type_url = "type.googleapis.com/envoy.service.discovery.v3.Resource";
        wire::Any { type_url: type_url.into(), value: resource.encode_to_vec().into() }
    };
    let respond = |world: &mut World, nonce: &str, resources| {
        let response = wire::DiscoveryResponse {
            version_info: "1".into(),
            type_url: CDS.url().into(),
            nonce: nonce.into(),
            resources,
            control_plane: None,
        };
        world.receive(response.encode_to_vec().into());
    };
    respond(&mut world, "n1", vec![wrapper("a", true), wrapper("b", true)]);
    world.advance(Duration::from_secs(6));
    respond(&mut world, "n2", vec![wrapper("a", false)]);
    assert_eq!(world.core.held(&CDS).count(), 2);
    world.advance(Duration::from_secs(6));
    assert_eq!(world.core.held(&CDS).map(|held| &*held.resource.name).collect::<Vec<_>>(), ["a"]);
    assert_eq!(sent(&mut world), ["Cluster v1 n=n1", "Cluster v1 n=n2"]);
}

#[test]
fn any_other_type_over_ads() {
    let workload = ResourceType::from_url("type.googleapis.com/istio.workload.Address");
    let mut world = World::new(Protocol::Delta, Manners::default());
    world.subscribe(spec(workload.clone(), Interest::Wildcard));
    world.open();
    // The body has no name in its first field: the wrapper's counts.
    world.receive_delta(&workload, "1", "n1", &[toy("cluster//Pod/ns/name", &[], "1")], &[]);
    assert_eq!(world.take_updates()[0].resources.len(), 1);
    assert_eq!(sent(&mut world), ["Address", "Address n=n1"]);
}

// === Sources and counters ===

#[test]
fn equal_sources_share_a_stream_and_the_last_one_closes_it() {
    let now = std::time::Instant::now();
    let mut core = Core::new(options(Protocol::Sotw, 1), now);
    let own = |name: &str| SubscriptionSpec {
        source: Source::Grpc(Arc::new(GrpcSource::new(Protocol::Sotw, GrpcService::new("eds")))),
        ..named(EDS, &[name])
    };
    let (one, two) = (core.subscribe(own("a"), now).unwrap(), core.subscribe(own("b"), now).unwrap());
    assert_eq!(core.mux_of(one), core.mux_of(two));
    assert!(matches!(core.poll_action(), Some(Action::Open { .. })));
    assert!(core.poll_action().is_none());
    core.unsubscribe(one, now);
    assert!(core.poll_action().is_none());
    core.unsubscribe(two, now);
    assert!(matches!(core.poll_action(), Some(Action::Close { .. })));
    assert_eq!(core.next_deadline(), None);
}

#[test]
fn impossible_subscriptions_say_why() {
    let now = std::time::Instant::now();
    let mut core = Core::new(Options { ads: None, ..options(Protocol::Sotw, 1) }, now);
    assert_eq!(core.subscribe(spec(CDS, Interest::Wildcard), now), Err(SubscribeError::NoAds));
    let vhds = SubscriptionSpec {
        source: Source::Grpc(Arc::new(GrpcSource::new(Protocol::Sotw, GrpcService::new("x")))),
        ..spec(ResourceType::VirtualHost, Interest::Namespace("rc".into()))
    };
    let error = core.subscribe(vhds, now).unwrap_err();
    assert_eq!(
        error.to_string(),
        "type.googleapis.com/envoy.config.route.v3.VirtualHost can not be fetched by a state-of-the-world stream of \
         its own"
    );
}

#[test]
fn counters_of_a_subscription() {
    let mut world = World::new(Protocol::Sotw, Manners::default());
    let id = world.subscribe(spec(CDS, Interest::Wildcard));
    world.open();
    world.advance(Duration::from_secs(2));
    world.receive_sotw(&CDS, "v1", "n1", &[toy("a", &[], "1")]);
    world.receive_sotw(&CDS, "v2", "n2", &[toy("a", &[], "1")]);
    world.receive_sotw(&CDS, "v3", "n3", &[toy("a", &[], BAD)]);
    world.close();
    let stats = world.core.subscription_stats(id).unwrap().clone();
    assert_eq!((stats.update_attempt, stats.update_success), (5, 2));
    assert_eq!((stats.update_rejected, stats.update_failure, stats.init_fetch_timeout), (1, 1, 0));
    assert_eq!((&*stats.version_text, stats.version), ("v2", xxhash_rust::xxh64::xxh64(b"v2", 0)));
    assert_eq!(stats.update_time, 1_002_000);
    let mut changed = Vec::new();
    world.core.drain_changed_stats(|id, _| changed.push(id));
    assert_eq!(changed, [id]);
    world.core.drain_changed_stats(|_, _| panic!("nothing has changed since"));
}
