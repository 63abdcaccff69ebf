//! What policies add to a request, and what active health checks cost a proxy that has nothing else to do.
//!
//! All filters stand in one chain of one process, disabled but on the path that enables one of them, so that requests with
//! and without it differ in nothing else and are measured in turn.

use std::path::Path;
use std::thread;
use std::time::Duration;

use super::Bench;
use super::client;
use super::peers::{BY_BOOTSTRAP, Kind, Origin, Peer, Probe, Proxy};
use super::place::fill;
use super::report::{Section, Target, median, middle, optional, spread};
use super::routes::{LOAD, round};

const ANSWER: &str =
    r#"{"status": 200, "body": {"inline_string": "forty-three bytes, counted with care: yes!\n"}}"#;

/// A policy's path, and the path of requests that are alike but for it.
struct Policy {
    name: &'static str,
    path: &'static str,
    beside: &'static str,
    target: &'static str,
    bound: Bound,
}

/// What a policy may add.
enum Bound {
    /// Of what it adds to Envoy's requests.
    OfEnvoy(f64),
    Micros(f64),
}

const POLICIES: [Policy; 6] = [
    Policy::beside_nothing("fault, not firing", "/fault", "fault: addition by Envoy's"),
    Policy::beside_nothing("local rate limit", "/limit", "local rate limit: addition by Envoy's"),
    Policy::beside_nothing("RBAC, 10 policies", "/rbac-10", "RBAC, 10 policies: addition by Envoy's"),
    Policy::beside_nothing("RBAC, 1 000 policies", "/rbac-1000", "RBAC, 1 000 policies: addition by Envoy's"),
    Policy::beside_nothing("ext_authz by gRPC", "/authz", "ext_authz: addition by Envoy's"),
    Policy {
        name: "all breakers and outlier detection",
        path: "/guarded",
        beside: "/plain",
        target: "breakers and outlier detection: addition",
        bound: Bound::Micros(0.2),
    },
];

/// Hosts with active health checks, and how long they are watched.
const CHECKED: usize = 1000;
const WATCHED: Duration = Duration::from_secs(5);

impl Policy {
    const fn beside_nothing(name: &'static str, path: &'static str, target: &'static str) -> Self {
        Self { name, path, beside: "/none", target, bound: Bound::OfEnvoy(0.5) }
    }
}

/// CPU microseconds per request of each round, with and without each policy.
struct Measured {
    with: [Vec<f64>; POLICIES.len()],
    without: [Vec<f64>; POLICIES.len()],
}

impl Measured {
    /// What a policy adds, by round.
    fn added(&self, policy: usize) -> Vec<f64> {
        self.with[policy].iter().zip(&self.without[policy]).map(|(with, without)| with - without).collect()
    }
}

pub(super) fn policies(bench: &Bench) -> Result<Vec<Section>, String> {
    LOAD.available()?;
    let origin = Origin::start(&bench.place)?;
    let mut notes = vec![format!(
        "`wrk {}` on the path of each policy and on the same without it, in turn (`envoy/policies.json`); CPU \
         µs per request and what the policy adds to them, the median of the rounds' differences. Requests are answered by \
         the proxy, but for those with breakers, which go to the origin. RBAC: only the last policy matches. ext_authz: the \
         service is the origin, over HTTP/2.",
        LOAD.arguments(bench.round).join(" "),
    )];
    let mut subjects = Vec::new();
    for peer in bench.peers.of(&BY_BOOTSTRAP) {
        match start(bench, peer, &origin) {
            Ok(proxy) => {
                let measured = Measured { with: Default::default(), without: Default::default() };
                subjects.push((proxy, measured));
            }
            Err(reason) => notes.push(format!("**{}** did not take part: {reason}", peer.kind.name())),
        }
    }
    for _ in 0..bench.rounds {
        for (index, policy) in POLICIES.iter().enumerate() {
            for (proxy, measured) in &mut subjects {
                let rounds = round(bench, proxy, policy.beside)
                    .and_then(|without| Ok((without, round(bench, proxy, policy.path)?)));
                match rounds {
                    Ok((without, with)) => {
                        measured.without[index].push(without);
                        measured.with[index].push(with);
                    }
                    Err(reason) => notes.push(format!("**{}**: {reason}", proxy.peer.kind.name())),
                }
            }
        }
    }
    let rows = POLICIES.iter().enumerate().flat_map(|(index, policy)| {
        subjects.iter().map(move |(proxy, measured)| {
            vec![
                policy.name.to_owned(),
                proxy.peer.kind.name().to_owned(),
                middle(&measured.without[index]),
                middle(&measured.with[index]),
                spread(&measured.added(index)),
            ]
        })
    });
    let rows = rows.collect();
    let added = |kind, index| {
        let (_, measured) = subjects.iter().find(|(proxy, _)| proxy.peer.kind == kind)?;
        median(&measured.added(index))
    };
    let targets = POLICIES.iter().enumerate().map(|(index, policy)| {
        let ours = added(Kind::Waystation, index);
        match policy.bound {
            Bound::OfEnvoy(limit) => {
                // What adds nothing that can be measured is below any bound.
                let of = |theirs| ours.map(|ours| ours.max(0.0) / theirs);
                let measured = added(Kind::Envoy, index).filter(|theirs| *theirs > 0.0).and_then(of);
                Target { what: policy.target, limit, unit: "", measured }
            }
            Bound::Micros(limit) => Target { what: policy.target, limit, unit: "µs", measured: ours },
        }
    });
    let targets = targets.collect();
    let head = vec!["policy", "proxy", "without", "with", "adds"];
    Ok(vec![Section { title: "What policies add to a request".to_owned(), notes, head, rows, targets }])
}

/// Policies of which a request without headers matches only the last.
fn rules(count: usize) -> String {
    let policy = |number: usize| {
        let permission = match number + 1 < count {
            true => format!(
                r#"{{"header": {{"name": "x-service", "string_match": {{"exact": "service-{number}"}}}}}}"#
            ),
            false => r#"{"any": true}"#.to_owned(),
        };
        format!(r#""policy-{number:04}": {{"permissions": [{permission}], "principals": [{{"any": true}}]}}"#)
    };
    (0..count).map(policy).collect::<Vec<_>>().join(",\n")
}

fn start<'a>(bench: &Bench, peer: &'a Peer, origin: &Origin) -> Result<Proxy<'a>, String> {
    let port = origin.http1.port().to_string();
    let origins = fill(
        r#"{"cluster_name": "c", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": @PORT@}}}}]}]}"#,
        &[("@PORT@", &port)],
    );
    let (few, many, http2) = (rules(10), rules(1000), origin.http2.port().to_string());
    let values = [
        ("@ANSWER@", ANSWER),
        ("@POLICIES_10@", &*few),
        ("@POLICIES_1000@", &*many),
        ("@ORIGINS@", &*origins),
        ("@ORIGIN_H2@", &*http2),
    ];
    let mut proxy = peer.start(&bench.place, "policies.json", &values, |_: &Path| Ok(()))?;
    proxy.ready(Probe::Connect, Duration::from_millis(5))?;
    for policy in &POLICIES {
        // A policy that answers in the proxy's place would be measured for something else.
        let answer = client::get(proxy.listen, policy.path, Duration::from_secs(2))?;
        if answer.status != 200 {
            return Err(format!("{} is answered with {}", policy.path, answer.status));
        }
    }
    LOAD.run(&format!("http://{}/none", proxy.listen), Duration::from_secs(1), &proxy.folder)?;
    Ok(proxy)
}

pub(super) fn health(bench: &Bench) -> Result<Vec<Section>, String> {
    let origin = Origin::start(&bench.place)?;
    let mut notes = vec![format!(
        "A cluster with {CHECKED} hosts, each asked for `/` every second on a connection that is kept \
         (`envoy/health.json`), and no traffic: CPU over {} s, {} times, in turn.",
        WATCHED.as_secs(),
        bench.rounds,
    )];
    let mut subjects = Vec::new();
    for peer in bench.peers.of(&BY_BOOTSTRAP) {
        match start_checked(bench, peer, &origin) {
            Ok(proxy) => subjects.push((proxy, Vec::new())),
            Err(reason) => notes.push(format!("**{}** did not take part: {reason}", peer.kind.name())),
        }
    }
    for _ in 0..bench.rounds {
        for (proxy, used) in &mut subjects {
            proxy.process.check()?;
            let before = proxy.process.cpu();
            thread::sleep(WATCHED);
            used.push((proxy.process.cpu() - before).as_secs_f64() / WATCHED.as_secs_f64() * 1e3);
        }
    }
    let of = |kind| {
        let (_, used) = subjects.iter().find(|(proxy, _)| proxy.peer.kind == kind)?;
        median(used)
    };
    let measured = of(Kind::Waystation).zip(of(Kind::Envoy)).map(|(ours, theirs)| ours / theirs);
    let rows = subjects.iter().map(|(proxy, used)| {
        let memory = super::report::mebibytes(proxy.process.memory().resident);
        vec![proxy.peer.kind.name().to_owned(), spread(used), optional(Some(memory))]
    });
    Ok(vec![Section {
        title: "1 000 hosts with active health checks".to_owned(),
        notes,
        head: vec!["proxy", "CPU ms per second", "RSS MiB"],
        rows: rows.collect(),
        targets: vec![Target { what: "CPU with health checks by Envoy's", limit: 0.3, unit: "", measured }],
    }])
}

fn start_checked<'a>(bench: &Bench, peer: &'a Peer, origin: &Origin) -> Result<Proxy<'a>, String> {
    let port = origin.everywhere.port();
    // The whole of 127.0.0.0/8 is this machine.
    let endpoint = |host: usize| {
        format!(
            r#"{{"endpoint": {{"address": {{"socket_address": {{"address": "127.0.{}.{}", "port_value": {port}}}}}}}}}"#,
            1 + host / 250,
            1 + host % 250,
        )
    };
    let endpoints = (0..CHECKED).map(endpoint).collect::<Vec<_>>().join(",\n");
    let mut proxy =
        peer.start(&bench.place, "health.json", &[("@ENDPOINTS@", &*endpoints)], |_: &Path| Ok(()))?;
    // Envoy serves, and is ready, when every host has been asked once.
    proxy.ready(Probe::Request, Duration::from_millis(50))?;
    let stats = client::get(proxy.admin, "/stats?filter=checked.membership_healthy", Duration::from_secs(2))?;
    let text = String::from_utf8_lossy(&stats.body).into_owned();
    match text.contains(&format!("membership_healthy: {CHECKED}")) {
        true => Ok(proxy),
        false => Err(format!("not all hosts are healthy: {}", text.trim())),
    }
}
