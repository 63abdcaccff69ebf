//! A long route table: what the last of 10 000 routes costs beside the first.

use std::path::Path;
use std::time::Duration;

use super::Bench;
use super::load::Load;
use super::peers::{BY_BOOTSTRAP, Kind, Peer, Probe, Proxy};
use super::place::{fill, template};
use super::report::{Section, Target, median, optional, ratio, spread};
use super::traffic::per_request;

const COUNT: usize = 10_000;
pub(super) const LOAD: Load = Load::Closed1 { connections: 32 };

/// How the routes of a table match.
struct Form {
    title: &'static str,
    /// The field of `RouteMatch`.
    field: &'static str,
    path: fn(usize) -> String,
    target: &'static str,
}

#[derive(Default)]
struct Measured {
    first: Vec<f64>,
    last: Vec<f64>,
}

pub(super) fn routes(bench: &Bench) -> Result<Vec<Section>, String> {
    LOAD.available()?;
    let exact = Form {
        title: "10 000 routes by exact path",
        field: "path",
        path: |number| format!("/service/{number}/item"),
        target: "last of 10 000 exact paths by the first",
    };
    let prefix = Form {
        title: "10 000 routes by prefix",
        field: "prefix",
        path: |number| format!("/service/{number}/"),
        target: "last of 10 000 prefixes by the first",
    };
    Ok(vec![exact.run(bench)?, prefix.run(bench)?])
}

impl Form {
    fn run(&self, bench: &Bench) -> Result<Section, String> {
        let table = self.table()?;
        let mut notes = vec![format!(
            "One virtual host with {COUNT} routes of the form `{}: {}`, each with a direct response of 43 bytes, so \
             that nothing but the match differs (`envoy/routes.json`). `wrk {}` on the path that the first route \
             matches and on that of the last, in turn; CPU µs per request.",
            self.field,
            (self.path)(0),
            LOAD.arguments(bench.round).join(" "),
        )];
        let mut subjects = Vec::new();
        for peer in bench.peers.of(&BY_BOOTSTRAP) {
            match start(bench, peer, &table) {
                Ok(proxy) => subjects.push((proxy, Measured::default())),
                Err(reason) => notes.push(format!("**{}** did not take part: {reason}", peer.kind.name())),
            }
        }
        let path = |number| format!("/service/{number}/item");
        for _ in 0..bench.rounds {
            for (proxy, measured) in &mut subjects {
                let rounds = round(bench, proxy, &path(0))
                    .and_then(|first| Ok((first, round(bench, proxy, &path(COUNT - 1))?)));
                match rounds {
                    Ok((first, last)) => {
                        measured.first.push(first);
                        measured.last.push(last);
                    }
                    Err(reason) => notes.push(format!("**{}**: {reason}", proxy.peer.kind.name())),
                }
            }
        }
        let ratio_of = |measured: &Measured| ratio(median(&measured.last), median(&measured.first));
        let rows = subjects.iter().map(|(proxy, measured)| {
            vec![
                proxy.peer.kind.name().to_owned(),
                spread(&measured.first),
                spread(&measured.last),
                optional(ratio_of(measured)),
            ]
        });
        let ours = subjects.iter().find(|(proxy, _)| proxy.peer.kind == Kind::Waystation);
        let measured = ours.and_then(|(_, measured)| ratio_of(measured));
        Ok(Section {
            title: self.title.to_owned(),
            notes,
            head: vec!["proxy", "first", "last", "last by first"],
            rows: rows.collect(),
            targets: vec![Target { what: self.target, limit: 1.2, unit: "", measured }],
        })
    }

    fn table(&self) -> Result<String, String> {
        let template = template("envoy/route.json")?;
        let routes = (0..COUNT).map(|number| {
            fill(template.trim_end(), &[("@MATCH@", self.field), ("@PATH@", &(self.path)(number))])
        });
        Ok(routes.collect::<Vec<_>>().join(",\n"))
    }
}

fn start<'a>(bench: &Bench, peer: &'a Peer, table: &str) -> Result<Proxy<'a>, String> {
    let values = [("@ROUTES@", table)];
    let mut proxy = peer.start(&bench.place, "routes.json", &values, |_: &Path| Ok(()))?;
    proxy.ready(Probe::Connect, Duration::from_millis(5))?;
    LOAD.run(&format!("http://{}/service/0/item", proxy.listen), Duration::from_secs(1), &proxy.folder)?;
    Ok(proxy)
}

/// CPU microseconds per request for a path.
pub(super) fn round(bench: &Bench, proxy: &mut Proxy<'_>, path: &str) -> Result<f64, String> {
    proxy.process.check()?;
    let before = proxy.process.cpu();
    let outcome = LOAD.run(&format!("http://{}{path}", proxy.listen), bench.round, &proxy.folder)?;
    if outcome.failed > 0 {
        return Err(format!("{} of {} requests for {path} failed", outcome.failed, outcome.requests));
    }
    Ok(per_request(proxy.process.cpu() - before, outcome.requests))
}
