//! `cargo bench-peers`: this proxy beside Envoy, nginx and HAProxy, in one run.
//!
//! A figure of one proxy says little on a machine that somebody shares; a ratio of two that were measured
//! alternately says a lot. So every proxy has one worker, all are pinned to one core, the load generator and
//! the origin to the other, rounds are interleaved, and the cost of a request is taken from the process's own
//! CPU accounting, which does not depend on who else was waiting for the core.
//!
//! The configurations are the files of `conformance/bench`, with ports and folders filled in.

mod client;
mod footprint;
mod instructions;
mod load;
mod peers;
mod place;
mod policies;
mod process;
mod report;
mod routes;
mod scale;
mod traffic;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use self::peers::Peers;
use self::place::Place;
use self::report::{Report, Section};
use crate::run;

/// The core of the proxies, and that of load generators, origin and ourselves.
const PROXY_CORE: usize = 0;
const LOAD_CORE: usize = 1;

const USAGE: &str = "usage: cargo bench-peers [SCENARIO..] [options]

scenarios (all, when none is named):
  h1 h2 h2h1 tls      CPU per request, latency and memory under load
  instructions        instructions per request of this proxy, under valgrind
  idle                memory and start with a small configuration, memory of an idle connection
  clusters update     10 000 clusters: start, scrape, the change of one
  routes              10 000 routes: the last against the first
  policies            what filters, breakers and outlier detection add to a request
  health              1 000 hosts with active health checks

options:
  --waystation BIN    instead of building it
  --profile NAME      the profile to build it with (default: quick)
  --envoy BIN         instead of the `envoy` on the path
  --seconds N         length of a round (default: 3)
  --rounds N          rounds of each proxy (default: 5)
  --out FILE          where the table goes (default: standard output)";

/// What a scenario needs to run.
struct Bench {
    peers: Peers,
    place: Place,
    round: Duration,
    rounds: usize,
}

type Scenario = fn(&Bench) -> Result<Vec<Section>, String>;

const SCENARIOS: [(&str, Scenario); 11] = [
    ("h1", traffic::h1),
    ("h2", traffic::h2),
    ("h2h1", traffic::h2h1),
    ("tls", traffic::tls),
    ("instructions", instructions::instructions),
    ("idle", footprint::idle),
    ("clusters", scale::clusters),
    ("update", scale::update),
    ("routes", routes::routes),
    ("policies", policies::policies),
    ("health", policies::health),
];

#[derive(Default)]
struct Options {
    scenarios: Vec<String>,
    waystation: Option<PathBuf>,
    envoy: Option<PathBuf>,
    profile: Option<String>,
    out: Option<PathBuf>,
    seconds: Option<u64>,
    rounds: Option<usize>,
}

/// Runs the named scenarios, or all, and writes the tables.
pub(crate) fn run(flags: &[&str]) -> Result<(), String> {
    let Some(options) = parse(flags)? else {
        println!("{USAGE}");
        return Ok(());
    };
    let chosen: Vec<(&str, Scenario)> = SCENARIOS
        .into_iter()
        .filter(|(name, _)| {
            options.scenarios.is_empty() || options.scenarios.iter().any(|chosen| chosen == name)
        })
        .collect();

    // Before we are pinned: the report tells the machine's cores, and a build wants them all.
    let mut report = Report::of_this_machine();
    let waystation = match options.waystation {
        Some(file) => Ok(file),
        None => {
            let profile = options.profile.as_deref().unwrap_or("quick");
            report.build(profile);
            build(profile)
        }
    };
    let envoy = options.envoy.or_else(|| run::find("envoy"));
    let peers = Peers::find(waystation, envoy);
    report.peers(&peers);
    pin_ourselves()?;

    let bench = Bench {
        peers,
        place: Place::new()?,
        round: Duration::from_secs(options.seconds.unwrap_or(3).max(1)),
        rounds: options.rounds.unwrap_or(5).max(1),
    };
    report.method(bench.rounds, bench.round);
    for (name, scenario) in chosen {
        eprintln!("── {name}");
        match scenario(&bench) {
            Ok(sections) => sections.into_iter().for_each(|section| report.add(section)),
            Err(reason) => report.skipped(name, &reason),
        }
    }
    report.write(options.out.as_deref())
}

fn parse(flags: &[&str]) -> Result<Option<Options>, String> {
    let mut options = Options::default();
    let mut flags = flags.iter();
    while let Some(&flag) = flags.next() {
        let mut value = || flags.next().map(|&value| value.to_owned()).ok_or(format!("{flag} needs a value"));
        match flag {
            "--help" | "-h" => return Ok(None),
            "--waystation" => options.waystation = Some(value()?.into()),
            "--envoy" => options.envoy = Some(value()?.into()),
            "--profile" => options.profile = Some(value()?),
            "--out" => options.out = Some(value()?.into()),
            "--seconds" => options.seconds = Some(number(flag, &value()?)?),
            "--rounds" => options.rounds = Some(number(flag, &value()?)?),
            name if SCENARIOS.iter().any(|(known, _)| *known == name) => {
                options.scenarios.push(name.to_owned());
            }
            unknown => return Err(format!("unknown scenario or option `{unknown}`\n{USAGE}")),
        }
    }
    Ok(Some(options))
}

fn number<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{flag} needs a number, not `{text}`"))
}

/// Builds our proxy; the error is the reason for its absence from the tables.
fn build(profile: &str) -> Result<PathBuf, String> {
    run::step(run::cargo().args(["build", "--package", "waystation", "--profile", profile]))?;
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(run::target().join(folder).join("waystation"))
}

/// Scraping and polling must not take the proxies' core. What we start inherits it.
fn pin_ourselves() -> Result<(), String> {
    let pid = std::process::id().to_string();
    let core = LOAD_CORE.to_string();
    if run::find("taskset").is_none() {
        return Err("`taskset` (util-linux) is needed to pin processes".to_owned());
    }
    if run::succeeds(Command::new("taskset").args(["-a", "-c", "-p", &core, &pid])) {
        Ok(())
    } else {
        Err("this machine has no second core to keep the load generator from the proxies".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_scenarios_mix() {
        let options = parse(&["h1", "--seconds", "4", "tls", "--out", "docs/performance.md"]);
        let options = options.expect("parses").expect("not help");
        assert_eq!(options.scenarios, ["h1", "tls"]);
        assert_eq!(options.seconds, Some(4));
        assert_eq!(options.out, Some(PathBuf::from("docs/performance.md")));
    }

    #[test]
    fn what_is_unknown_is_named() {
        assert!(parse(&["h9"]).is_err_and(|text| text.contains("`h9`")));
        assert!(parse(&["--seconds"]).is_err_and(|text| text.contains("--seconds")));
        assert!(parse(&["--rounds", "x"]).is_err_and(|text| text.contains("`x`")));
    }
}
