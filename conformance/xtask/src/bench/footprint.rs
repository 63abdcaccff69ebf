//! What a proxy costs before it has done anything: start, memory, connections that wait.

use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use super::Bench;
use super::client::idle_connection;
use super::peers::{EVERYONE, Kind, Origin, Peer, Probe};
use super::report::{Section, Target, mebibytes, median, middle, spread};

/// Connections of the measurement, and those before it, so that what is made on first use does not count.
const CONNECTIONS: u32 = 2000;
const FIRST: u32 = 100;

/// Until what a start or a burst of connections leaves behind is done.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Measured {
    ready: Vec<f64>,
    cpu: Vec<f64>,
    resident: Vec<f64>,
    anonymous: Vec<f64>,
    /// Bytes.
    connection: Vec<f64>,
}

pub(super) fn idle(bench: &Bench) -> Result<Vec<Section>, String> {
    let origin = Origin::start(&bench.place)?;
    let mut notes = vec![format!(
        "Configurations `*/h1.*`. Ready: from starting the process to the first 200 of `/ready`, for nginx and \
         HAProxy of a request through them, asked for every 0.2 ms. Memory {} s later, nothing having been \
         served. Connections: the growth of `RssAnon` from {FIRST} to {} kept HTTP/1.1 connections that have \
         carried one request each, by {CONNECTIONS}; the kernel's part is not in it.",
        SETTLE.as_secs(),
        FIRST + CONNECTIONS
    )];
    let mut subjects: Vec<(&Peer, Measured)> =
        bench.peers.of(&EVERYONE).map(|peer| (peer, Measured::default())).collect();
    for _ in 0..bench.rounds {
        for (peer, measured) in &mut subjects {
            if let Err(reason) = round(bench, peer, &origin, measured) {
                notes.push(format!("**{}**: {reason}", peer.kind.name()));
            }
        }
    }
    let rows = subjects.iter().map(|(peer, measured)| measured.row(peer)).collect();
    let ours = subjects.iter().find(|(peer, _)| peer.kind == Kind::Waystation).map(|(_, measured)| measured);
    let of = |values: fn(&Measured) -> &Vec<f64>| ours.and_then(|measured| median(values(measured)));
    let targets = vec![
        target("RSS idle, small configuration", 10.0, "MiB", of(|measured| &measured.resident)),
        target("ready after start", 20.0, "ms", of(|measured| &measured.ready)),
        target("idle HTTP/1 connection", 6144.0, "bytes", of(|measured| &measured.connection)),
    ];
    let head = vec!["proxy", "ready ms", "CPU ms", "RSS MiB", "anonymous MiB", "bytes per idle connection"];
    Ok(vec![Section { title: "Idle".to_owned(), notes, head, rows, targets }])
}

fn round(bench: &Bench, peer: &Peer, origin: &Origin, measured: &mut Measured) -> Result<(), String> {
    let port = origin.http1.port().to_string();
    let mut proxy = peer.start(&bench.place, "h1", &[("@ORIGIN@", &port)], |_| Ok(()))?;
    let ready = proxy.ready(Probe::Request, Duration::from_micros(200))?;
    thread::sleep(SETTLE);
    let memory = proxy.process.memory();
    measured.ready.push(ready.as_secs_f64() * 1e3);
    measured.cpu.push(proxy.process.cpu().as_secs_f64() * 1e3);
    measured.resident.push(mebibytes(memory.resident));
    measured.anonymous.push(mebibytes(memory.anonymous));

    let open =
        |count| (0..count).map(|_| idle_connection(proxy.listen)).collect::<Result<Vec<TcpStream>, _>>();
    let _first = open(FIRST)?;
    thread::sleep(SETTLE);
    let before = mebibytes(proxy.process.memory().anonymous);
    let _kept = open(CONNECTIONS)?;
    thread::sleep(SETTLE);
    let after = mebibytes(proxy.process.memory().anonymous);
    measured.connection.push((after - before) * 1_048_576.0 / f64::from(CONNECTIONS));
    Ok(())
}

impl Measured {
    fn row(&self, peer: &Peer) -> Vec<String> {
        vec![
            peer.kind.name().to_owned(),
            spread(&self.ready),
            middle(&self.cpu),
            middle(&self.resident),
            middle(&self.anonymous),
            spread(&self.connection),
        ]
    }
}

fn target(what: &'static str, limit: f64, unit: &'static str, measured: Option<f64>) -> Target {
    Target { what, limit, unit, measured }
}
