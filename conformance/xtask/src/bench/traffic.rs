//! Requests under load: CPU per request, latency at a fixed rate, memory afterwards.

use std::time::Duration;

use super::Bench;
use super::load::{Load, Version};
use super::peers::{EVERYONE, Kind, Origin, Peer, Probe, Proxy};
use super::place::certificate;
use super::report::{Section, Target, mebibytes, median, middle, optional, paired, spread};

/// Requests a second of the latency measurement, the same for all: a third or less of what the slowest can do.
const RATE: u32 = 4000;
const RATED_ROUND: Duration = Duration::from_secs(2);

const HEAD: [&str; 12] = [
    "proxy",
    "requests/s",
    "CPU µs/request",
    "of Envoy's",
    "of nginx's",
    "busy",
    "p50 µs at fixed rate",
    "p99 µs",
    "CPU µs/request at fixed rate",
    "RSS MiB",
    "anonymous MiB",
    "failed requests",
];

/// One kind of traffic.
struct Traffic {
    title: &'static str,
    /// The configuration's name.
    config: &'static str,
    scheme: &'static str,
    kinds: &'static [Kind],
    closed: Load,
    fixed: Load,
}

/// What was measured of one proxy.
#[derive(Default)]
struct Measured {
    cpu: Vec<f64>,
    rate: Vec<f64>,
    busy: Vec<f64>,
    fixed_cpu: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    failed: u64,
}

const HTTP1: Load = Load::Closed1 { connections: 32 };
const FIXED1: Load = Load::Fixed { connections: 32, streams: 1, rate: RATE, version: Version::Http1 };
const HTTP2: Load = Load::Closed2 { connections: 10, streams: 10 };
const FIXED2: Load = Load::Fixed { connections: 10, streams: 10, rate: RATE, version: Version::Http2 };

pub(super) fn h1(bench: &Bench) -> Result<Vec<Section>, String> {
    let traffic = Traffic {
        title: "HTTP/1.1 to HTTP/1.1",
        config: "h1",
        scheme: "http",
        kinds: &EVERYONE,
        closed: HTTP1,
        fixed: FIXED1,
    };
    traffic.run(bench, &[(Kind::Envoy, 0.5), (Kind::Nginx, 1.15)])
}

pub(super) fn h2(bench: &Bench) -> Result<Vec<Section>, String> {
    let traffic = Traffic {
        title: "HTTP/2 to HTTP/2",
        config: "h2",
        scheme: "http",
        // nginx speaks no HTTP/2 to upstreams.
        kinds: &[Kind::Waystation, Kind::Envoy, Kind::Haproxy],
        closed: HTTP2,
        fixed: FIXED2,
    };
    traffic.run(bench, &[(Kind::Envoy, 0.45)])
}

pub(super) fn h2h1(bench: &Bench) -> Result<Vec<Section>, String> {
    let traffic = Traffic {
        title: "HTTP/2 to HTTP/1.1",
        config: "h2h1",
        scheme: "http",
        kinds: &EVERYONE,
        closed: HTTP2,
        fixed: FIXED2,
    };
    traffic.run(bench, &[])
}

pub(super) fn tls(bench: &Bench) -> Result<Vec<Section>, String> {
    let traffic = Traffic {
        title: "HTTP/1.1 over TLS 1.3 (AES-128-GCM) to HTTP/1.1",
        config: "tls",
        scheme: "https",
        kinds: &EVERYONE,
        closed: HTTP1,
        fixed: FIXED1,
    };
    traffic.run(bench, &[(Kind::Envoy, 0.5)])
}

impl Traffic {
    fn run(&self, bench: &Bench, targets: &[(Kind, f64)]) -> Result<Vec<Section>, String> {
        self.closed.available()?;
        let origin = Origin::start(&bench.place)?;
        let mut notes = vec![self.description(bench)];
        let mut subjects = Vec::new();
        for peer in bench.peers.of(self.kinds) {
            match self.start(bench, peer, &origin) {
                Ok(proxy) => subjects.push((proxy, Measured::default())),
                Err(reason) => notes.push(format!("**{}** did not take part: {reason}", peer.kind.name())),
            }
        }
        for _ in 0..bench.rounds {
            for (proxy, measured) in &mut subjects {
                if let Err(reason) = self.closed_round(bench, proxy, measured) {
                    notes.push(format!("**{}**: {reason}", proxy.peer.kind.name()));
                }
            }
        }
        if let Err(reason) = self.fixed.available() {
            notes.push(format!("No latencies: {reason}."));
        } else {
            for _ in 0..bench.rounds {
                for (proxy, measured) in &mut subjects {
                    if let Err(reason) = self.fixed_round(proxy, measured) {
                        notes.push(format!("**{}**: {reason}", proxy.peer.kind.name()));
                    }
                }
            }
        }
        let cpu_of = |kind| {
            let (_, measured) = subjects.iter().find(|(proxy, _)| proxy.peer.kind == kind)?;
            Some(&*measured.cpu)
        };
        let ratio = |ours: &[f64], kind| paired(ours, cpu_of(kind)?);
        let rows = subjects
            .iter()
            .map(|(proxy, measured)| {
                let ratios = [Kind::Envoy, Kind::Nginx].map(|kind| ratio(&measured.cpu, kind));
                measured.row(proxy, ratios)
            })
            .collect();
        let targets = targets.iter().map(|&(kind, limit)| Target {
            what: if kind == Kind::Envoy {
                "CPU per request of Envoy's"
            } else {
                "CPU per request of nginx's"
            },
            limit,
            unit: "",
            measured: cpu_of(Kind::Waystation).and_then(|ours| ratio(ours, kind)),
        });
        Ok(vec![Section {
            title: self.title.to_owned(),
            notes,
            head: HEAD.to_vec(),
            rows,
            targets: targets.collect(),
        }])
    }

    fn description(&self, bench: &Bench) -> String {
        let command = |load: Load, round| format!("`{} {}`", load.program(), load.arguments(round).join(" "));
        format!(
            "GET with a 43-byte answer; configurations `*/{}.*`. Closed loop: {}. Latency: {}, from sending to the \
             end of the response, {RATE} requests/s in all; the generator's clients send in step, so a request \
             may wait for those of the other clients.",
            self.config,
            command(self.closed, bench.round),
            command(self.fixed, RATED_ROUND),
        )
    }

    fn start<'a>(&self, bench: &Bench, peer: &'a Peer, origin: &Origin) -> Result<Proxy<'a>, String> {
        let (http1, http2) = (origin.http1.port().to_string(), origin.http2.port().to_string());
        let values = [("@ORIGIN@", &*http1), ("@ORIGIN_H2@", &*http2)];
        let secure = self.scheme == "https";
        let prepare = |folder: &std::path::Path| if secure { certificate(folder) } else { Ok(()) };
        let mut proxy = peer.start(&bench.place, self.config, &values, prepare)?;
        proxy.ready(Probe::Connect, Duration::from_millis(5))?;
        // Warm-up: connections to the origin, caches, the branch predictor.
        let warm = self.closed.run(&self.url(&proxy), Duration::from_secs(1), &proxy.folder)?;
        if warm.failed * 100 > warm.requests {
            return Err(format!("{} of {} requests failed", warm.failed, warm.requests));
        }
        Ok(proxy)
    }

    fn closed_round(
        &self,
        bench: &Bench,
        proxy: &mut Proxy<'_>,
        measured: &mut Measured,
    ) -> Result<(), String> {
        proxy.process.check()?;
        let before = proxy.process.cpu();
        let outcome = self.closed.run(&self.url(proxy), bench.round, &proxy.folder)?;
        let used = proxy.process.cpu() - before;
        measured.cpu.push(per_request(used, outcome.requests));
        measured.rate.push(outcome.rate);
        measured.busy.push(used.as_secs_f64() / bench.round.as_secs_f64() * 100.0);
        measured.failed += outcome.failed;
        Ok(())
    }

    fn fixed_round(&self, proxy: &mut Proxy<'_>, measured: &mut Measured) -> Result<(), String> {
        proxy.process.check()?;
        let before = proxy.process.cpu();
        let outcome = self.fixed.run(&self.url(proxy), RATED_ROUND, &proxy.folder)?;
        measured.fixed_cpu.push(per_request(proxy.process.cpu() - before, outcome.requests));
        let micros = |part| outcome.percentile(part).map(|latency| latency.as_secs_f64() * 1e6);
        measured.p50.extend(micros(0.5));
        measured.p99.extend(micros(0.99));
        measured.failed += outcome.failed;
        Ok(())
    }

    fn url(&self, proxy: &Proxy<'_>) -> String {
        format!("{}://{}/", self.scheme, proxy.listen)
    }
}

impl Measured {
    fn row(&self, proxy: &Proxy<'_>, [of_envoy, of_nginx]: [Option<f64>; 2]) -> Vec<String> {
        let memory = proxy.process.memory();
        vec![
            proxy.peer.kind.name().to_owned(),
            middle(&self.rate),
            spread(&self.cpu),
            optional(of_envoy),
            optional(of_nginx),
            median(&self.busy).map_or_else(|| "-".to_owned(), |busy| format!("{busy:.0} %")),
            middle(&self.p50),
            middle(&self.p99),
            middle(&self.fixed_cpu),
            optional(Some(mebibytes(memory.resident))),
            optional(Some(mebibytes(memory.anonymous))),
            self.failed.to_string(),
        ]
    }
}

/// Microseconds of CPU per request.
pub(super) fn per_request(used: Duration, requests: u64) -> f64 {
    used.as_secs_f64() * 1e6 / requests as f64
}
