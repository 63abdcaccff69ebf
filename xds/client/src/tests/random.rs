//! A seeded random server, network and consumer. After each step the invariants are checked, and in the end, when
//! the faults stop, the client must hold exactly what the server has.
//!
//! `WAYSTATION_SIM_SEEDS=100000` runs more of them, `WAYSTATION_SIM_SEED=n` one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;

use super::harness::{
    BAD, CDS, EDS, LDS, Manners, RDS, Seen, Toy, World, brief, delta, named, options, sotw, spec, toy,
    wrapped,
};
use crate::{Interest, Protocol, ResourceType, SubId};

const KINDS: [ResourceType; 4] = [CDS, EDS, LDS, RDS];

#[test]
fn state_of_the_world() {
    sweep(Protocol::Sotw);
}

#[test]
fn incremental() {
    sweep(Protocol::Delta);
}

fn sweep(protocol: Protocol) {
    let number = |key: &str| std::env::var(key).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds: Range<u64> = match number("WAYSTATION_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("WAYSTATION_SIM_SEEDS").unwrap_or(250),
    };
    for seed in seeds {
        let _named = NameTheSeed(protocol, seed);
        Simulation::new(protocol, seed).run(400);
    }
}

struct NameTheSeed(Protocol, u64);

impl Drop for NameTheSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:?}: failing seed: WAYSTATION_SIM_SEED={}", self.0, self.1);
        }
    }
}

/// What the server has of one type.
#[derive(Debug, Default)]
struct Shelf {
    version: u64,
    resources: BTreeMap<String, (u64, Toy)>,
}

/// What the server knows of the client, of one type, on the present stream.
#[derive(Debug, Default)]
struct Session {
    asked: bool,
    wildcard: bool,
    names: BTreeSet<String>,
    /// Delta: what the client has, by what we have told it and it has told us.
    known: BTreeMap<String, u64>,
    /// Names whose absence was told, or that are not to be answered.
    told_missing: BTreeSet<String>,
    /// State of the world: version of the last response, or that the client came with.
    sent_version: Option<u64>,
    unanswered: VecDeque<Sent>,
    last_answered: String,
    /// An answer is due whatever the version says.
    due: bool,
}

#[derive(Debug)]
struct Sent {
    nonce: String,
    version: u64,
    must_refuse: bool,
    may_refuse: bool,
}

struct Simulation {
    rng: Rng,
    protocol: Protocol,
    world: World,
    shelves: BTreeMap<ResourceType, Shelf>,
    sessions: BTreeMap<ResourceType, Session>,
    to_client: VecDeque<Bytes>,
    to_server: VecDeque<Seen>,
    nonces: u64,
    /// Versions that the client may have accepted, over all streams.
    acceptable: BTreeMap<ResourceType, BTreeSet<String>>,
    paused: Vec<ResourceType>,
    /// Clusters asked for by name beside the wildcard, with the incremental protocol.
    on_demand: Option<SubId>,
}

impl Simulation {
    fn new(protocol: Protocol, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let manners =
            Manners { all_or_nothing: false, warm_slowly: false, listeners_after_clusters: rng.bool() };
        let mut world = World::with_options(protocol, manners, options(protocol, seed));
        world.subscribe(spec(CDS, Interest::Wildcard));
        if !manners.listeners_after_clusters {
            world.subscribe(spec(LDS, Interest::Wildcard));
        }
        let on_demand = (protocol == Protocol::Delta).then(|| world.subscribe(named(CDS, &[])));
        Self {
            rng,
            protocol,
            on_demand,
            world,
            shelves: KINDS.into_iter().map(|kind| (kind, Shelf { version: 1, ..Shelf::default() })).collect(),
            sessions: BTreeMap::new(),
            to_client: VecDeque::new(),
            to_server: VecDeque::new(),
            nonces: 0,
            acceptable: BTreeMap::new(),
            paused: Vec::new(),
        }
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
            self.collect();
            self.check();
        }
        self.calm_down();
        self.converge();
        self.mend();
        self.converge();
        self.check_equality();
    }

    fn step(&mut self) {
        match self.rng.u32(0..100) {
            0..15 => self.change_resource(),
            15..40 => _ = self.serve(true),
            40..65 => _ = self.deliver_to_client(),
            65..82 => _ = self.deliver_to_server(),
            82..85 => self.world.withhold = self.rng.bool(),
            85..89 => self.world.answer_withheld(),
            89..92 => self.pause_or_resume(),
            92..94 => self.kill_stream(),
            94..97 => self.reconnect(),
            97 => self.send_nonsense(),
            98 => self.ask_on_demand(),
            _ => {
                let by = Duration::from_millis(self.rng.u64(0..3000));
                self.world.advance(by);
            }
        }
    }

    // === The server ===

    fn change_resource(&mut self) {
        let kind = self.rng.choice(KINDS).expect("not empty");
        let name = format!(
            "{}{}",
            ["c", "e", "l", "r"][KINDS.iter().position(|one| *one == kind).unwrap()],
            self.rng.u32(0..6)
        );
        let shelf = self.shelves.get_mut(&kind).expect("one for each type");
        shelf.version += 1;
        if self.rng.u32(0..4) == 0 {
            shelf.resources.remove(&name);
            return;
        }
        let letter = if kind == CDS { "e" } else { "r" };
        let needs: Vec<String> = match kind {
            CDS | LDS => (0..self.rng.u32(0..3)).map(|_| format!("{letter}{}", self.rng.u32(0..6))).collect(),
            _ => Vec::new(),
        };
        let needs: BTreeSet<&str> = needs.iter().map(String::as_str).collect();
        let needs: Vec<&str> = needs.into_iter().collect();
        let content = if self.rng.u32(0..6) == 0 { BAD.to_owned() } else { shelf.version.to_string() };
        shelf.resources.insert(name.clone(), (shelf.version, toy(&name, &needs, &content)));
    }

    /// Sends a response of some type, if there is anything to say or, when `freely`, sometimes without need.
    fn serve(&mut self, freely: bool) -> bool {
        if self.world.stream.is_none() {
            return false;
        }
        let kinds: Vec<_> =
            self.sessions.iter().filter(|(_, session)| session.asked).map(|(kind, _)| kind.clone()).collect();
        let Some(kind) = self.rng.choice(kinds) else { return false };
        // Good servers wait for the answer; others do not.
        if !self.sessions[&kind].unanswered.is_empty() && (!freely || self.rng.u32(0..4) > 0) {
            return false;
        }
        let force = freely && self.rng.u32(0..10) == 0;
        self.nonces += 1;
        let nonce = format!("{kind:?}-{}", self.nonces);
        let message = match self.protocol {
            Protocol::Sotw => self.sotw_response(&kind, &nonce, force),
            Protocol::Delta => self.delta_response(&kind, &nonce, force),
        };
        let Some((message, sent)) = message else { return false };
        self.to_client.push_back(message);
        if !sent.must_refuse {
            self.acceptable.entry(kind.clone()).or_default().insert(sent.version.to_string());
        }
        let session = self.sessions.get_mut(&kind).expect("chosen above");
        session.unanswered.push_back(sent);
        true
    }

    fn sotw_response(&mut self, kind: &ResourceType, nonce: &str, force: bool) -> Option<(Bytes, Sent)> {
        let shelf = &self.shelves[kind];
        let session = self.sessions.get_mut(kind).expect("asked");
        if !force && !session.due && session.sent_version == Some(shelf.version) {
            return None;
        }
        session.due = false;
        session.sent_version = Some(shelf.version);
        let wanted = |name: &String| session.wildcard || session.names.contains(name);
        let mut toys: Vec<Toy> = shelf
            .resources
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(_, (_, toy))| toy.clone())
            .collect();
        self.rng.shuffle(&mut toys);
        let bad = toys.iter().any(|toy| toy.content == BAD);
        let sent = Sent {
            nonce: nonce.into(),
            version: shelf.version,
            must_refuse: bad && session.wildcard,
            may_refuse: bad,
        };
        Some((sotw(kind, &shelf.version.to_string(), nonce, &toys), sent))
    }

    fn delta_response(&mut self, kind: &ResourceType, nonce: &str, force: bool) -> Option<(Bytes, Sent)> {
        let shelf = &self.shelves[kind];
        let session = self.sessions.get_mut(kind).expect("asked");
        let wanted = |name: &String| session.wildcard || session.names.contains(name);
        let mut resources = Vec::new();
        let mut bad = false;
        for (name, (version, toy)) in shelf.resources.iter().filter(|(name, _)| wanted(name)) {
            if force || session.known.get(name) != Some(version) {
                bad |= toy.content == BAD;
                session.known.insert(name.clone(), *version);
                session.told_missing.remove(name);
                resources.push(wrapped(kind, toy, &version.to_string()));
            }
        }
        let gone: Vec<String> = session
            .known
            .keys()
            .chain(&session.names)
            .filter(|name| !shelf.resources.contains_key(*name) && !session.told_missing.contains(*name))
            .cloned()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        for name in &gone {
            session.known.remove(name);
            session.told_missing.insert(name.clone());
        }
        if resources.is_empty() && gone.is_empty() && !session.due && !force {
            return None;
        }
        session.due = false;
        self.rng.shuffle(&mut resources);
        let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
        let message = delta(kind, &shelf.version.to_string(), nonce, resources, &gone);
        let must_refuse = bad && session.wildcard;
        Some((message, Sent { nonce: nonce.into(), version: shelf.version, must_refuse, may_refuse: bad }))
    }

    fn send_nonsense(&mut self) {
        let Some((kind, session)) =
            self.sessions.iter_mut().find(|(_, session)| session.asked && session.wildcard)
        else {
            return;
        };
        if self.world.stream.is_none() {
            return;
        }
        if self.rng.u32(0..3) == 0 {
            self.to_client.push_back(Bytes::from_static(b"\x0a\xff\xff\xff"));
            return;
        }
        self.nonces += 1;
        let nonce = format!("{kind:?}-{}", self.nonces);
        let (one, two) = (toy("twin", &[], "1"), toy("twin", &[], "2"));
        self.to_client.push_back(match self.protocol {
            Protocol::Sotw => sotw(kind, "0", &nonce, &[one, two]),
            Protocol::Delta => {
                delta(kind, "0", &nonce, vec![wrapped(kind, &one, "0"), wrapped(kind, &two, "0")], &[])
            }
        });
        session.due = true;
        session.unanswered.push_back(Sent { nonce, version: 0, must_refuse: true, may_refuse: true });
    }

    fn deliver_to_server(&mut self) -> bool {
        let Some(seen) = self.to_server.pop_front() else { return false };
        let kind = KINDS.into_iter().find(|kind| format!("{kind:?}") == seen.kind).expect("only these types");
        let session = self.sessions.entry(kind.clone()).or_default();
        let acceptable = self.acceptable.entry(kind.clone()).or_default();
        let first = !session.asked;
        session.asked = true;

        let is_answer = session.unanswered.front().is_some_and(|sent| sent.nonce == seen.nonce);
        let mut refused = seen.error.is_some();
        if is_answer {
            let sent = session.unanswered.pop_front().expect("just seen");
            session.last_answered.clone_from(&seen.nonce);
            assert!(!sent.must_refuse || refused, "should have been refused: {}", brief(&seen));
            assert!(sent.may_refuse || !refused, "should have been accepted: {}", brief(&seen));
            match (self.protocol, refused) {
                (Protocol::Sotw, false) => assert_eq!(seen.version, sent.version.to_string()),
                (Protocol::Sotw, true) => {
                    assert!(
                        seen.version.is_empty() || acceptable.contains(&seen.version),
                        "{}",
                        brief(&seen)
                    );
                }
                (Protocol::Delta, _) => {}
            }
        } else {
            assert!(!refused, "a refusal of nothing: {}", brief(&seen));
            let expected = match self.protocol {
                Protocol::Sotw => session.last_answered.as_str(),
                Protocol::Delta => "",
            };
            assert_eq!(seen.nonce, expected, "the nonce of another stream, or answered twice");
            refused = false;
        }
        assert!(first || seen.initial.is_empty(), "versions are stated once");
        match self.protocol {
            Protocol::Sotw => {
                assert!(first || is_answer || session.names != seen.names, "a request that says nothing");
                let more = !seen.names.is_subset(&session.names);
                session.wildcard = matches!(kind, CDS | LDS);
                session.names = seen.names;
                if first {
                    session.sent_version = seen.version.parse().ok();
                } else {
                    session.due |= more;
                }
            }
            Protocol::Delta => {
                let star = seen.subscribe.contains("*");
                let legacy = first && (seen.subscribe.is_empty() || star);
                assert!(seen.subscribe.is_disjoint(&session.names), "subscribed twice: {}", brief(&seen));
                assert!(seen.unsubscribe.is_subset(&session.names), "never subscribed: {}", brief(&seen));
                assert!(first || is_answer || !seen.subscribe.is_empty() || !seen.unsubscribe.is_empty());
                session.wildcard |= legacy;
                session.due |= legacy;
                session.names.extend(seen.subscribe.into_iter().filter(|name| name != "*"));
                for name in seen.unsubscribe {
                    session.names.remove(&name);
                    session.told_missing.remove(&name);
                    match session.known.get_mut(&name) {
                        // The wildcard wants it still: the protocol has the server say anew what there is of it.
                        Some(version) if session.wildcard => *version = 0,
                        _ => _ = session.known.remove(&name),
                    }
                }
                for (name, version) in seen.initial {
                    session.known.insert(name, version.parse().expect("our own versions"));
                }
            }
        }
        // A refused resource is as good as unknown; the server sends it again when it changes.
        if refused && self.protocol == Protocol::Delta && seen.nonce.is_empty() {
            session.due = true;
        }
        true
    }

    // === Network and consumer ===

    fn deliver_to_client(&mut self) -> bool {
        let Some(stream) = self.world.stream else { return false };
        if !self.world.core.wants_messages(stream) {
            return false;
        }
        let Some(message) = self.to_client.pop_front() else { return false };
        self.world.receive(message);
        if self.world.stream.is_none() {
            self.drop_stream();
        }
        true
    }

    fn kill_stream(&mut self) {
        if self.world.stream.is_some() {
            self.world.close();
            self.drop_stream();
        }
    }

    fn drop_stream(&mut self) {
        self.to_client.clear();
        self.to_server.clear();
        self.world.requests.clear();
        self.sessions.clear();
    }

    fn reconnect(&mut self) {
        if self.world.stream.is_none() {
            self.world.reopen();
        }
    }

    fn pause_or_resume(&mut self) {
        if self.paused.len() < 4 && self.rng.bool() {
            let kind = self.rng.choice(KINDS).expect("not empty");
            self.world.core.pause(&kind);
            self.paused.push(kind);
        } else if let Some(kind) = self.paused.pop() {
            self.world.core.resume(&kind, self.world.now);
            self.world.settle();
        }
    }

    /// Asks for a cluster by name, which may not exist, or gives one up.
    fn ask_on_demand(&mut self) {
        let Some(sub) = self.on_demand else { return };
        let names = vec![format!("c{}", self.rng.u32(0..8)).into()];
        match self.rng.bool() {
            true => self.world.core.add_names(sub, names, self.world.now),
            false => self.world.core.remove_names(sub, names, self.world.now),
        }
        self.world.settle();
    }

    fn collect(&mut self) {
        self.to_server.extend(self.world.requests.drain(..));
    }

    // === Invariants ===

    fn check(&self) {
        assert!(self.to_server.len() <= 400, "requests are bounded by what happens");
        if !self.world.withheld.is_empty() {
            return;
        }
        for kind in KINDS {
            let applied = self.world.consumer.applied.get(&kind);
            let mut held = 0;
            for resource in self.world.core.held(&kind) {
                held += 1;
                let name = &resource.resource.name;
                if !matches!(kind, CDS | LDS) && !self.world.consumer.wanted(&kind).contains(name) {
                    // Given up; it goes when the server is told.
                    continue;
                }
                let applied = applied.and_then(|applied| applied.get(name));
                let applied =
                    applied.unwrap_or_else(|| panic!("{kind:?} {name} is held, but was never accepted"));
                assert_eq!(
                    applied.body, resource.resource.body,
                    "{kind:?} {name}: held is not what was accepted"
                );
            }
            if matches!(kind, CDS | LDS) {
                assert_eq!(held, applied.map_or(0, BTreeMap::len), "{kind:?}: something was lost");
            }
        }
    }

    fn calm_down(&mut self) {
        self.world.withhold = false;
        self.world.answer_withheld();
        while let Some(kind) = self.paused.pop() {
            self.world.core.resume(&kind, self.world.now);
        }
        self.world.settle();
    }

    fn mend(&mut self) {
        for shelf in self.shelves.values_mut() {
            for (version, toy) in shelf.resources.values_mut().filter(|(_, toy)| toy.content == BAD) {
                shelf.version += 1;
                *version = shelf.version;
                toy.content = shelf.version.to_string();
            }
        }
    }

    fn converge(&mut self) {
        let mut quiet = 0;
        for _ in 0..5_000 {
            self.collect();
            if self.world.stream.is_none() {
                self.world.reopen();
            }
            let busy = [self.deliver_to_server(), self.deliver_to_client(), self.serve(false)];
            self.check();
            // The server chooses a type at random: one silence does not mean that it has nothing to say.
            quiet = if busy.contains(&true) { 0 } else { quiet + 1 };
            if quiet > 60 {
                return;
            }
        }
        panic!("this does not come to rest");
    }

    fn check_equality(&self) {
        for (kind, shelf) in &self.shelves {
            let session = self.sessions.get(kind);
            let unanswered = session.map_or(0, |session| session.unanswered.len());
            assert_eq!(unanswered, 0, "{kind:?}: each response is answered");
            let wanted = |name: &str| match kind {
                CDS | LDS => session.is_some(),
                kind => self.world.consumer.wanted(kind).contains(name),
            };
            if !matches!(kind, CDS | LDS) {
                let told: BTreeSet<_> = session.map(|session| session.names.clone()).unwrap_or_default();
                let wanted: BTreeSet<_> =
                    self.world.consumer.wanted(kind).iter().map(|name| name.to_string()).collect();
                assert_eq!(told, wanted, "{kind:?}: what the server was told");
            }
            let held: BTreeMap<_, _> = self
                .world
                .core
                .held(kind)
                .map(|held| (held.resource.name.to_string(), held.resource.body.clone()))
                .collect();
            for (name, (_, toy)) in shelf.resources.iter().filter(|(name, _)| wanted(name)) {
                let body = prost::Message::encode_to_vec(toy);
                assert_eq!(held.get(name).map(|held| &held[..]), Some(&body[..]), "{kind:?} {name}");
            }
            let full = self.protocol == Protocol::Delta || matches!(kind, CDS | LDS);
            if full {
                for name in held.keys() {
                    assert!(shelf.resources.contains_key(name), "{kind:?} {name} should be gone");
                }
            }
        }
    }
}
