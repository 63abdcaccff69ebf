//! A seeded client that answers when it likes, and worlds that change when they like.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// A small generator, so that a seed is the same run everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Clusters, and routes that lead to some of them; contents are `name version target...`.
fn world(dice: &mut Dice) -> Arc<Snapshot> {
    let clusters: Vec<String> =
        (0..6).filter(|_| dice.roll(2) == 0).map(|index| format!("c{index}")).collect();
    let mut resources: Vec<(ResourceType, String, String)> = Vec::new();
    for cluster in &clusters {
        resources.push((CDS, cluster.clone(), format!("{cluster} {}", dice.roll(3))));
    }
    for route in ["r0", "r1"] {
        let targets: Vec<&str> = clusters.iter().filter(|_| dice.roll(2) == 0).map(String::as_str).collect();
        resources.push((RDS, route.to_owned(), format!("{route} 0 {}", targets.join(" "))));
    }
    if dice.roll(4) > 0 {
        resources.push((LDS, "l0".to_owned(), format!("l0 {}", dice.roll(2))));
    }
    let resources: Vec<_> = resources
        .iter()
        .map(|(kind, name, content)| (kind.clone(), name.as_str(), content.as_str()))
        .collect();
    snapshot(&resources)
}

#[derive(Default)]
struct View {
    held: BTreeMap<ResourceType, BTreeMap<String, Bytes>>,
    unanswered: BTreeSet<ResourceType>,
}

impl View {
    fn take(&mut self, protocol: Protocol, received: Vec<Received>) {
        for response in received {
            assert!(self.unanswered.insert(response.kind.clone()), "two {:?} under way", response.kind);
            let held = self.held.entry(response.kind.clone()).or_default();
            if protocol == Protocol::Sotw && response.kind.is_full_state() {
                held.clear();
            }
            held.extend(response.resources);
            for name in &response.removed {
                held.remove(name);
            }
            self.check();
        }
    }

    /// No route leads to a cluster that is not there, at any moment.
    fn check(&self) {
        let none = BTreeMap::new();
        let clusters = self.held.get(&CDS).unwrap_or(&none);
        for content in self.held.get(&RDS).unwrap_or(&none).values() {
            let content = std::str::from_utf8(content).expect("text");
            for target in content.split_whitespace().skip(2) {
                assert!(clusters.contains_key(target), "route {content:?} with {:?}", clusters.keys());
            }
        }
    }
}

fn run(protocol: Protocol, seed: u64) {
    let mut dice = Dice(seed * 2 + 1);
    let mut rig = Rig::new(protocol, world(&mut dice));
    let mut view = View::default();
    let routes = ["r0", "r1"];
    let names = |kind: &ResourceType| if *kind == RDS { &routes[..] } else { &[] };
    let mut started = BTreeSet::new();
    for step in 0..60 {
        let kind = [CDS, RDS, LDS][dice.roll(3) as usize].clone();
        let received = if step == 0 || (started.contains(&CDS) && started.insert(kind.clone())) {
            let kind = if step == 0 { CDS } else { kind };
            started.insert(kind.clone());
            match protocol {
                Protocol::Sotw => rig.ask(&kind, names(&kind)),
                Protocol::Delta => rig.change(&kind, names(&kind), &[], &[]),
            }
        } else if dice.roll(4) == 0 {
            let next = world(&mut dice);
            rig.publish(next)
        } else if view.unanswered.remove(&kind) {
            match protocol {
                Protocol::Sotw => rig.ask(&kind, names(&kind)),
                Protocol::Delta => rig.ack(&kind),
            }
        } else {
            Vec::new()
        };
        view.take(protocol, received);
    }
    // When everything is answered, the client has what there is, and nothing else.
    while let Some(kind) = view.unanswered.pop_first() {
        let received = match protocol {
            Protocol::Sotw => rig.ask(&kind, names(&kind)),
            Protocol::Delta => rig.ack(&kind),
        };
        view.take(protocol, received);
    }
    for kind in &started {
        let wanted = rig.core.snapshot().of(kind);
        let wanted: BTreeMap<String, Bytes> =
            wanted.values().map(|resource| (resource.name().to_string(), resource.value().clone())).collect();
        assert_eq!(view.held.get(kind).cloned().unwrap_or_default(), wanted, "{kind:?}");
    }
}

#[test]
fn nothing_ever_leads_nowhere() {
    for protocol in [Protocol::Sotw, Protocol::Delta] {
        for seed in 0..400 {
            let result = std::panic::catch_unwind(|| run(protocol, seed));
            assert!(result.is_ok(), "{protocol:?}, seed {seed}");
        }
    }
}
