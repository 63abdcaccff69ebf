//! Instructions per request: a figure that no other user of the machine changes, for comparing two commits.
//!
//! Valgrind counts what the process executes in user space. The difference of a long and a short run leaves out start
//! and end. Kernel time is not in it: the CPU figures of the other scenarios have that.

use std::time::Duration;

use super::Bench;
use super::load::{Load, Version};
use super::peers::{Kind, Origin, Peer, Probe};
use super::place::fill;
use super::report::Section;
use crate::run;

const SHORT: u32 = 2_000;
const LONG: u32 = 12_000;

/// Title, configuration, connections, streams of each, protocol.
const TRAFFIC: [(&str, &str, u32, u32, Version); 3] = [
    ("HTTP/1.1 to HTTP/1.1", "h1", 32, 1, Version::Http1),
    ("HTTP/2 to HTTP/2", "h2", 10, 10, Version::Http2),
    ("HTTP/2 to HTTP/1.1", "h2h1", 10, 10, Version::Http2),
];

pub(super) fn instructions(bench: &Bench) -> Result<Vec<Section>, String> {
    let valgrind = run::find("valgrind").ok_or("`valgrind` is not installed")?;
    let wrapper = [valgrind.to_string_lossy().into_owned(), "--tool=callgrind".to_owned()];
    let kinds = [Kind::Waystation];
    let peer = bench.peers.of(&kinds).next().ok_or("there is no waystation in this run")?;
    let origin = Origin::start(&bench.place)?;
    let mut rows = Vec::new();
    for (title, config, connections, streams, version) in TRAFFIC {
        let count = |requests| {
            let load = Load::Counted { connections, streams, requests, version };
            executed(bench, peer, &wrapper, config, load, &origin)
        };
        let per_request = count(LONG)?.saturating_sub(count(SHORT)?) / u64::from(LONG - SHORT);
        rows.push(vec![title.to_owned(), per_request.to_string()]);
    }
    let note = "Executed in user space by all threads (`valgrind --tool=callgrind`), as the difference of @LONG@ and \
                @SHORT@ requests of `h2load` with the connections and streams of the sections above.";
    let values = [("@LONG@", &*LONG.to_string()), ("@SHORT@", &*SHORT.to_string())];
    Ok(vec![Section {
        title: "Instructions per request".to_owned(),
        notes: vec![fill(note, &values)],
        head: vec!["traffic", "instructions"],
        rows,
        targets: Vec::new(),
    }])
}

/// What one run executes, from start to end.
fn executed(
    bench: &Bench,
    peer: &Peer,
    wrapper: &[String],
    config: &str,
    load: Load,
    origin: &Origin,
) -> Result<u64, String> {
    load.available()?;
    let (http1, http2) = (origin.http1.port().to_string(), origin.http2.port().to_string());
    let values = [("@ORIGIN@", &*http1), ("@ORIGIN_H2@", &*http2)];
    let mut proxy = peer.start_under(wrapper, &bench.place, config, &values, |_| Ok(()))?;
    proxy.ready(Probe::Connect, Duration::from_millis(50))?;
    let outcome = load.run(&format!("http://{}/", proxy.listen), bench.round, &proxy.folder)?;
    if outcome.failed > 0 {
        return Err(format!("{} requests failed", outcome.failed));
    }
    let output = proxy.process.output();
    collected(&output).ok_or_else(|| format!("no count in what valgrind printed: {output}"))
}

/// `==PID== Collected : COUNT`
fn collected(output: &str) -> Option<u64> {
    let count = output.lines().find_map(|line| line.split_once("Collected : "))?.1;
    count.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::collected;

    #[test]
    fn the_count_is_found() {
        assert_eq!(collected("==1== Events    : Ir\n==1== Collected : 123456\n"), Some(123_456));
        assert_eq!(collected("==1== Events    : Ir\n"), None);
    }
}
