//! Recorded runs of Envoy 1.40 against a scripted server are played to the core: the requests, their content and
//! their order must be the same.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::harness::{
    BAD, CDS, EDS, LDS, Manners, RDS, Seen, Toy, World, briefs, delta, sotw, spec, toy, wrapped,
};
use crate::{Interest, Protocol, ResourceType};

enum Line {
    Opened,
    Closed,
    Request(Seen),
    Response {
        kind: ResourceType,
        version: String,
        nonce: String,
        names: Vec<String>,
        removed: Vec<String>,
    },
    /// The run waited long enough for `initial_fetch_timeout`.
    TimedOut,
}

#[test]
fn state_of_the_world() {
    replay(Protocol::Sotw, include_str!("wire/sotw.log"));
}

#[test]
fn incremental() {
    replay(Protocol::Delta, include_str!("wire/delta.log"));
}

#[test]
fn changed_cluster_without_endpoints() {
    replay(Protocol::Delta, include_str!("wire/cds-modify-no-eds.log"));
}

fn replay(protocol: Protocol, log: &str) {
    let manners = Manners { all_or_nothing: true, warm_slowly: true, listeners_after_clusters: true };
    let mut world = World::new(protocol, manners);
    let mut expected = Vec::new();
    world.subscribe(spec(CDS, Interest::Wildcard));
    let mut reasons = BTreeMap::new();
    for line in parse(protocol, log) {
        match line {
            Line::Opened if world.opening.is_empty() => {
                if world.stream.is_some() {
                    world.close();
                }
                world.reopen();
            }
            Line::Opened => world.open(),
            Line::Closed => world.close(),
            Line::Request(seen) => {
                if let Some(error) = &seen.error {
                    // The recording shows the reason only when it comes back; the consumer must know it before.
                    reasons.insert(seen.nonce.clone(), error.clone());
                }
                expected.push(seen);
            }
            Line::Response { kind, version, nonce, names, removed } => {
                respond(&mut world, protocol, &kind, &version, &nonce, &names, &removed);
            }
            Line::TimedOut => {
                let World { core, consumer, now, .. } = &mut world;
                consumer.stop_warming(core, *now);
                world.settle();
            }
        }
    }
    let got = world.take_requests();
    assert_eq!(briefs(&got), briefs(&expected));
    for (got, expected) in got.iter().zip(&expected) {
        assert!(got.with_node, "Envoy sends the node in each request by default");
        if let (Some(got), Some(expected)) = (&got.error, &expected.error) {
            let prefix = expected.split(": ").next().unwrap_or_default();
            assert!(
                got.starts_with(prefix) || !prefix.starts_with("Error adding"),
                "{got} should begin like {expected}"
            );
        }
    }
}

fn respond(
    world: &mut World,
    protocol: Protocol,
    kind: &ResourceType,
    version: &str,
    nonce: &str,
    names: &[String],
    removed: &[String],
) {
    let toys: Vec<Toy> = names
        .iter()
        .map(|name| {
            let needs: &[&str] = match (kind, name.as_str()) {
                (&CDS, "a" | "b") => &[name],
                (&LDS, "l1") => &["r1"],
                (&LDS, "l2") => &["r2"],
                _ => &[],
            };
            // Envoy's cluster `bad` always fails, its listener `l2` only in version 2.
            let is_bad = name == "bad" || (name == "l2" && version == "2");
            // Endpoints differ each time: Envoy hands even the same ones to the waiting cluster.
            let content = match (is_bad, kind) {
                (true, _) => BAD.to_owned(),
                (false, &EDS) => nonce.to_owned(),
                // A cluster changes with the version, but not when the version only adds another cluster.
                (false, &CDS) => version.replace('5', "4"),
                (false, _) => String::new(),
            };
            toy(name, needs, &content)
        })
        .collect();
    let message = match protocol {
        Protocol::Sotw => sotw(kind, version, nonce, &toys),
        Protocol::Delta => {
            let removed: Vec<&str> = removed.iter().map(String::as_str).collect();
            let resources = toys.iter().map(|toy| wrapped(kind, toy, version)).collect();
            delta(kind, version, nonce, resources, &removed)
        }
    };
    world.receive(message);
}

fn parse(protocol: Protocol, log: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    for line in log.lines() {
        let text = line.trim_start().split_once(' ').map_or("", |(_, text)| text);
        if text.starts_with("*** stream opened") {
            lines.push(Line::Opened);
        } else if text.starts_with("*** stream closed") {
            lines.push(Line::Closed);
        } else if let Some(json) = text.strip_prefix("C->S ") {
            lines.push(Line::Request(request(protocol, json)));
        } else if let Some(response) = text.strip_prefix("S->C ") {
            lines.push(response_line(response));
        } else if text.contains("never resend EDS") {
            lines.push(Line::TimedOut);
        }
    }
    // The timeout comes after the response that makes the cluster warm, which the log notes first.
    if let Some(at) = lines.iter().position(|line| matches!(line, Line::TimedOut)) {
        let timeout = lines.remove(at);
        lines.insert(at + 1, timeout);
    }
    lines
}

fn request(protocol: Protocol, json: &str) -> Seen {
    let json: Value = serde_json::from_str(json).expect("the log is JSON");
    let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
    let names = |key: &str| -> BTreeSet<String> {
        let list = json[key].as_array().into_iter().flatten();
        list.map(|name| name.as_str().expect("names are text").to_owned()).collect()
    };
    let mut initial = BTreeMap::new();
    for (name, version) in json["initialResourceVersions"].as_object().into_iter().flatten() {
        initial.insert(name.clone(), version.as_str().expect("versions are text").to_owned());
    }
    assert!(protocol == Protocol::Delta || initial.is_empty());
    Seen {
        kind: text("typeUrl"),
        version: text("versionInfo"),
        names: names("resourceNames"),
        subscribe: names("resourceNamesSubscribe"),
        unsubscribe: names("resourceNamesUnsubscribe"),
        initial,
        nonce: text("responseNonce"),
        error: json["errorDetail"]["message"].as_str().map(ToOwned::to_owned),
        with_node: true,
    }
}

/// `Cluster v=1 nonce=Cluster-n1 ['a', 'b'] removed []`
fn response_line(text: &str) -> Line {
    let mut words = text.split(' ');
    let kind = match words.next() {
        Some("Cluster") => CDS,
        Some("ClusterLoadAssignment") => EDS,
        Some("Listener") => LDS,
        Some("RouteConfiguration") => RDS,
        other => panic!("unknown type {other:?}"),
    };
    let mut value =
        |key: &str| words.next().and_then(|word| word.strip_prefix(key)).expect("in order").to_owned();
    let (version, nonce) = (value("v="), value("nonce="));
    let (names, removed) =
        text.split_once('[').and_then(|(_, rest)| rest.split_once("] removed [")).expect("lists");
    let list = |text: &str| -> Vec<String> {
        text.trim_end_matches(']')
            .split(", ")
            .filter(|name| !name.is_empty())
            .map(|name| name.trim_matches('\'').to_owned())
            .collect()
    };
    Line::Response { kind, version, nonce, names: list(names), removed: list(removed) }
}
