//! 10 000 clusters: start, scrape, and the change of one of them.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::Bench;
use super::client;
use super::peers::{BY_BOOTSTRAP, Kind, Peer, Probe, Proxy};
use super::place::{fill, template, write};
use super::process::Process;
use super::report::{Section, Target, mebibytes, median, middle, spread};

const COUNT: usize = 10_000;

/// What makes a message a resource of a file.
const RESOURCE: &str = r#""@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "#;

/// The endpoint of every cluster; nobody connects to it.
const PORT: u16 = 9;

/// Envoy needs seconds for either.
const POLL: Duration = Duration::from_millis(5);
const SCRAPE_LIMIT: Duration = Duration::from_secs(60);

/// An update is over when no tick of CPU time (10 ms) was used for so long.
const QUIET: Duration = Duration::from_millis(500);
/// Or, when its whole work is below a tick, after this time.
const UNSEEN: Duration = Duration::from_secs(3);
const UPDATE_LIMIT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Start {
    ready: Vec<f64>,
    cpu: Vec<f64>,
    resident: Vec<f64>,
    anonymous: Vec<f64>,
    scrape: Vec<f64>,
    size: Vec<f64>,
    worst_ready: Vec<f64>,
    afterwards: Vec<f64>,
}

pub(super) fn clusters(bench: &Bench) -> Result<Vec<Section>, String> {
    let mut notes = vec![format!(
        "{COUNT} static clusters of one endpoint (`envoy/clusters.json`). Ready and CPU: from starting the process \
         to the first 200 of `/ready`. Memory 1 s later, before anything was scraped. Scrape: \
         `/stats/prometheus` to its last byte; meanwhile `/ready` is asked for every millisecond on connections \
         of its own, the worst answer counts."
    )];
    let list = clusters_json("", None)?;
    let mut subjects: Vec<(&Peer, Start)> =
        bench.peers.of(&BY_BOOTSTRAP).map(|peer| (peer, Start::default())).collect();
    // A start takes Envoy ten seconds; three of them tell enough.
    for _ in 0..bench.rounds.min(3) {
        for (peer, measured) in &mut subjects {
            if let Err(reason) = start_and_scrape(bench, peer, &list, measured) {
                notes.push(format!("**{}**: {reason}", peer.kind.name()));
            }
        }
    }
    let rows = subjects.iter().map(|(peer, measured)| measured.row(peer)).collect();
    let ours = subjects.iter().find(|(peer, _)| peer.kind == Kind::Waystation).map(|(_, measured)| measured);
    let of = |values: fn(&Start) -> &Vec<f64>| ours.and_then(|measured| median(values(measured)));
    let targets = vec![
        Target { what: "RSS", limit: 60.0, unit: "MiB", measured: of(|start| &start.resident) },
        Target { what: "CPU to ready", limit: 0.5, unit: "s", measured: of(|start| &start.cpu) },
        Target { what: "Prometheus scrape", limit: 0.3, unit: "s", measured: of(|start| &start.scrape) },
        Target {
            what: "`/ready` meanwhile",
            limit: 5.0,
            unit: "ms",
            measured: of(|start| &start.worst_ready),
        },
    ];
    let head = vec![
        "proxy",
        "ready s",
        "CPU s to ready",
        "RSS MiB",
        "anonymous MiB",
        "scrape s",
        "scrape MiB",
        "worst `/ready` ms",
        "RSS MiB after the scrape",
    ];
    Ok(vec![Section { title: "10 000 static clusters".to_owned(), notes, head, rows, targets }])
}

fn start_and_scrape(bench: &Bench, peer: &Peer, list: &str, measured: &mut Start) -> Result<(), String> {
    let mut proxy = peer.start(&bench.place, "clusters.json", &[("@CLUSTERS@", list)], |_| Ok(()))?;
    let ready = proxy.ready(Probe::Connect, POLL)?;
    let cpu = proxy.process.cpu();
    thread::sleep(Duration::from_secs(1));
    let memory = proxy.process.memory();
    measured.ready.push(ready.as_secs_f64());
    measured.cpu.push(cpu.as_secs_f64());
    measured.resident.push(mebibytes(memory.resident));
    measured.anonymous.push(mebibytes(memory.anonymous));

    let admin = proxy.admin;
    let over = AtomicBool::new(false);
    let (scrape, worst) = thread::scope(|scope| {
        let watcher = scope.spawn(|| worst_ready(admin, &over));
        let start = Instant::now();
        let size = client::size(admin, "/stats/prometheus", SCRAPE_LIMIT);
        let took = start.elapsed();
        over.store(true, Ordering::Relaxed);
        (size.map(|size| (size, took)), watcher.join())
    });
    let (size, took) = scrape?;
    let worst = worst.map_err(|_| "the watcher of /ready panicked".to_owned())??;
    measured.scrape.push(took.as_secs_f64());
    measured.size.push(mebibytes(size));
    measured.worst_ready.push(worst.as_secs_f64() * 1e3);
    measured.afterwards.push(mebibytes(proxy.process.memory().resident));
    Ok(())
}

/// The longest that `/ready` took, until told that it is over.
fn worst_ready(admin: SocketAddr, over: &AtomicBool) -> Result<Duration, String> {
    let mut worst = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        let start = Instant::now();
        client::get(admin, "/ready", SCRAPE_LIMIT)?;
        worst = worst.max(start.elapsed());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(worst)
}

impl Start {
    fn row(&self, peer: &Peer) -> Vec<String> {
        vec![
            peer.kind.name().to_owned(),
            spread(&self.ready),
            spread(&self.cpu),
            middle(&self.resident),
            middle(&self.anonymous),
            spread(&self.scrape),
            middle(&self.size),
            spread(&self.worst_ready),
            middle(&self.afterwards),
        ]
    }
}

pub(super) fn update(bench: &Bench) -> Result<Vec<Section>, String> {
    let mut notes = vec![format!(
        "{COUNT} clusters from a file (`envoy/update.json`, `envoy/cds.json`), which is replaced by an atomic rename \
         with one endpoint's port changed. CPU: of the process until it is quiet for {} ms; no stats are read \
         meanwhile and the periodic flush is put off. `/clusters` is asked afterwards whether the change is there.",
        QUIET.as_millis()
    )];
    let mut subjects = Vec::new();
    for peer in bench.peers.of(&BY_BOOTSTRAP) {
        match start_from_file(bench, peer) {
            Ok(proxy) => subjects.push((proxy, Vec::new())),
            Err(reason) => notes.push(format!("**{}** did not take part: {reason}", peer.kind.name())),
        }
    }
    for number in 1..=bench.rounds {
        for (proxy, measured) in &mut subjects {
            match change_one(proxy, number) {
                Ok(used) => measured.push(used.as_secs_f64()),
                Err(reason) => notes.push(format!("**{}**: {reason}", proxy.peer.kind.name())),
            }
        }
    }
    let rows = subjects.iter().map(|(proxy, measured)| {
        let memory = proxy.process.memory();
        let resident = middle(&[mebibytes(memory.resident)]);
        vec![proxy.peer.kind.name().to_owned(), spread(measured), resident]
    });
    let ours = subjects.iter().find(|(proxy, _)| proxy.peer.kind == Kind::Waystation);
    let measured = ours.and_then(|(_, measured)| median(measured));
    Ok(vec![Section {
        title: "Changing one of 10 000 clusters".to_owned(),
        notes,
        head: vec!["proxy", "CPU s", "RSS MiB after all updates"],
        rows: rows.collect(),
        targets: vec![Target { what: "CPU of the change", limit: 0.12, unit: "s", measured }],
    }])
}

fn start_from_file<'a>(bench: &Bench, peer: &'a Peer) -> Result<Proxy<'a>, String> {
    let prepare = |folder: &Path| replace(folder, 0);
    let mut proxy = peer.start(&bench.place, "update.json", &[], prepare)?;
    proxy.ready(Probe::Connect, POLL)?;
    let cpu = proxy.process.cpu();
    quiet(&mut proxy.process, cpu)?;
    Ok(proxy)
}

/// CPU time of one update.
fn change_one(proxy: &mut Proxy<'_>, number: usize) -> Result<Duration, String> {
    let before = proxy.process.cpu();
    replace(&proxy.folder, number)?;
    let used = quiet(&mut proxy.process, before)? - before;
    let answer = client::get(proxy.admin, "/clusters", SCRAPE_LIMIT)?;
    let changed = format!("127.0.0.1:{}", changed_port(number));
    if !String::from_utf8_lossy(&answer.body).contains(&changed) {
        return Err(format!("update {number} did not arrive within {UPDATE_LIMIT:?}"));
    }
    // What answering left to do is no part of the next update.
    let now = proxy.process.cpu();
    quiet(&mut proxy.process, now)?;
    Ok(used)
}

/// Writes the next version of the file beside it and renames it over it.
fn replace(folder: &Path, number: usize) -> Result<(), String> {
    let list = clusters_json(RESOURCE, (number > 0).then_some(number))?;
    let version = number.to_string();
    let text = fill(&template("envoy/cds.json")?, &[("@VERSION@", &version), ("@CLUSTERS@", &list)]);
    let next = folder.join("cds.json.next");
    write(&next, &text)?;
    fs::rename(&next, folder.join("cds.json")).map_err(|error| error.to_string())
}

/// The list of clusters, one of them with the port of an update; `kind` begins each.
fn clusters_json(kind: &str, update: Option<usize>) -> Result<String, String> {
    let template = template("envoy/cluster.json")?;
    let clusters = (0..COUNT).map(|number| {
        let port = match update {
            Some(update) if number == COUNT / 2 => changed_port(update),
            _ => PORT,
        };
        let (number, port) = (number.to_string(), port.to_string());
        fill(template.trim_end(), &[("@TYPE@", kind), ("@N@", &number), ("@PORT@", &port)])
    });
    Ok(clusters.collect::<Vec<_>>().join(",\n"))
}

/// Each update has its own.
fn changed_port(update: usize) -> u16 {
    10_000 + u16::try_from(update % 50_000).unwrap_or_default()
}

/// Waits until the process rests; its CPU time then.
fn quiet(process: &mut Process, before: Duration) -> Result<Duration, String> {
    let start = Instant::now();
    let (mut last, mut since) = (before, start);
    loop {
        thread::sleep(Duration::from_millis(20));
        process.check()?;
        let cpu = process.cpu();
        if cpu != last {
            (last, since) = (cpu, Instant::now());
        }
        let patience = if last == before { UNSEEN } else { QUIET };
        if since.elapsed() >= patience || start.elapsed() >= UPDATE_LIMIT {
            return Ok(last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_one_cluster() {
        let first = clusters_json("", None).expect("the template is there");
        let second = clusters_json("", Some(3)).expect("the template is there");
        let differing = first.lines().zip(second.lines()).filter(|(before, after)| before != after);
        assert_eq!(differing.count(), 1);
        assert_eq!(first.lines().count(), COUNT);
        assert!(second.contains("10003"));
    }
}
