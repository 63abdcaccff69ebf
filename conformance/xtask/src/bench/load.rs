//! The load generators: `wrk` and `h2load`, run on their core, their output read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::run;

/// What a generator does to a URL.
#[derive(Clone, Copy)]
pub(super) enum Load {
    /// `wrk`: HTTP/1.1, each connection sends when it has its answer.
    Closed1 { connections: u32 },
    /// `h2load`: HTTP/2, each stream is followed by the next.
    Closed2 { connections: u32, streams: u32 },
    /// `h2load --rps`: so many requests a second, the clients in step.
    Fixed { connections: u32, streams: u32, rate: u32, version: Version },
    /// `h2load -n`: so many requests, each stream followed by the next.
    Counted { connections: u32, streams: u32, requests: u32, version: Version },
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    Http1,
    Http2,
}

/// What came of it.
pub(super) struct Outcome {
    pub(super) requests: u64,
    /// Per second, by the generator's clock.
    pub(super) rate: f64,
    pub(super) failed: u64,
    /// Sorted; only a fixed rate records them.
    pub(super) latencies: Vec<Duration>,
}

impl Version {
    fn flag(self) -> &'static str {
        if self == Self::Http1 { " --h1" } else { "" }
    }
}

impl Load {
    /// The program that it needs.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Closed1 { .. } => "wrk",
            Self::Closed2 { .. } | Self::Fixed { .. } | Self::Counted { .. } => "h2load",
        }
    }

    /// The reason when the program is missing.
    pub(super) fn available(self) -> Result<(), String> {
        match run::find(self.program()) {
            Some(_) => Ok(()),
            None => Err(format!("`{}` is not installed", self.program())),
        }
    }

    /// The words of the command line, as the report shows them.
    pub(super) fn arguments(self, duration: Duration) -> Vec<String> {
        let seconds = duration.as_secs().max(1);
        let line = match self {
            Self::Closed1 { connections } => format!("-t1 -c{connections} -d{seconds}s"),
            Self::Closed2 { connections, streams } => {
                format!("-t1 -c{connections} -m{streams} -D{seconds}")
            }
            Self::Fixed { connections, streams, rate, version } => {
                let version = version.flag();
                format!("-t1 -c{connections} -m{streams} -D{seconds} --rps={}{version}", rate / connections)
            }
            Self::Counted { connections, streams, requests, version } => {
                format!("-t1 -c{connections} -m{streams} -n{requests}{}", version.flag())
            }
        };
        line.split(' ').map(str::to_owned).collect()
    }

    /// Runs it to its end.
    pub(super) fn run(self, url: &str, duration: Duration, folder: &Path) -> Result<Outcome, String> {
        let program = run::find(self.program()).ok_or_else(|| format!("`{}` is missing", self.program()))?;
        let mut command = Command::new(program);
        // Both link OpenSSL; one file gives every proxy the same cipher suite.
        command.args(self.arguments(duration)).env("OPENSSL_CONF", cipher_file());
        let log = folder.join("requests");
        if matches!(self, Self::Fixed { .. }) {
            // h2load appends.
            let _ = fs::remove_file(&log);
            command.arg(format!("--log-file={}", log.display()));
            command.arg("--tls13-ciphers=TLS_AES_128_GCM_SHA256");
        }
        let output = command.arg(url).output().map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout);
        let outcome = match self {
            Self::Closed1 { .. } => wrk(&text),
            Self::Closed2 { .. } | Self::Fixed { .. } | Self::Counted { .. } => h2load(&text),
        };
        let mut outcome = outcome.ok_or_else(|| {
            let errors = String::from_utf8_lossy(&output.stderr);
            format!("{}: {} {}", self.program(), text.trim(), errors.trim())
        })?;
        if outcome.requests == 0 {
            return Err(format!("{}: no request was answered", self.program()));
        }
        if matches!(self, Self::Fixed { .. }) {
            outcome.latencies = latencies(&fs::read_to_string(&log).map_err(|error| error.to_string())?);
        }
        Ok(outcome)
    }
}

impl Outcome {
    /// The latency that the given part of the requests did not exceed.
    pub(super) fn percentile(&self, part: f64) -> Option<Duration> {
        let last = self.latencies.len().checked_sub(1)?;
        let index = (last as f64 * part).round() as usize;
        self.latencies.get(index).copied()
    }
}

fn cipher_file() -> PathBuf {
    run::root().join("conformance/bench/openssl.cnf")
}

fn wrk(text: &str) -> Option<Outcome> {
    let requests = text.lines().find_map(|line| line.trim().split_once(" requests in "))?.0;
    let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"))?.trim();
    let failed = text.lines().find_map(|line| line.trim().strip_prefix("Non-2xx or 3xx responses:"));
    let errors = text.lines().find_map(|line| line.trim().strip_prefix("Socket errors:")).unwrap_or_default();
    let errors = errors.split([' ', ',']).filter_map(|word| word.parse::<u64>().ok()).sum::<u64>();
    Some(Outcome {
        requests: requests.parse().ok()?,
        rate: rate.parse().ok()?,
        failed: failed.map_or(Some(0), |count| count.trim().parse::<u64>().ok())? + errors,
        latencies: Vec::new(),
    })
}

fn h2load(text: &str) -> Option<Outcome> {
    let finished = text.lines().find(|line| line.starts_with("finished in "))?;
    let rate = finished.split(", ").find_map(|part| part.strip_suffix(" req/s"))?;
    let counts = text.lines().find_map(|line| line.strip_prefix("requests: "))?;
    let count = |name: &str| -> Option<u64> {
        counts.split(", ").find_map(|part| part.strip_suffix(name))?.trim().parse().ok()
    };
    let status = text.lines().find_map(|line| line.strip_prefix("status codes: "))?;
    let succeeded: u64 = status.split(' ').next()?.parse().ok()?;
    let done = count(" done")?;
    Some(Outcome {
        requests: done,
        rate: rate.parse().ok()?,
        failed: count(" failed")?.max(done.saturating_sub(succeeded)),
        latencies: Vec::new(),
    })
}

/// The third column of h2load's log, microseconds from sending to the end of the response, sorted.
fn latencies(log: &str) -> Vec<Duration> {
    let micros = log.lines().filter_map(|line| line.split('\t').nth(2)?.parse().ok());
    let mut latencies: Vec<Duration> = micros.map(Duration::from_micros).collect();
    latencies.sort_unstable();
    latencies
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_output_is_read() {
        let text = "Running 2s test @ http://127.0.0.1:1/\n  108266 requests in 2.10s, 19.72MB read\n  \
                    Socket errors: connect 0, read 3, write 0, timeout 1\n  Non-2xx or 3xx responses: 7\n\
                    Requests/sec:  51543.14\nTransfer/sec:      9.39MB\n";
        let outcome = wrk(text).expect("parses");
        assert_eq!((outcome.requests, outcome.failed), (108_266, 11));
        assert!((outcome.rate - 51543.14).abs() < 0.01);
    }

    #[test]
    fn h2load_output_is_read() {
        let text = "finished in 2.00s, 35887.50 req/s, 3.77MB/s\n\
                    requests: 71775 total, 71875 started, 71775 done, 71770 succeeded, 5 failed, 0 errored, 0 timeout\n\
                    status codes: 71770 2xx, 0 3xx, 5 4xx, 0 5xx\n";
        let outcome = h2load(text).expect("parses");
        assert_eq!((outcome.requests, outcome.failed), (71775, 5));
    }

    #[test]
    fn percentiles_of_a_log() {
        let outcome = Outcome {
            requests: 3,
            rate: 1.0,
            failed: 0,
            latencies: latencies("1\t200\t300\n2\t200\t100\n3\t200\t200\n"),
        };
        assert_eq!(outcome.percentile(0.5), Some(Duration::from_micros(200)));
        assert_eq!(outcome.percentile(0.99), Some(Duration::from_micros(300)));
    }
}
