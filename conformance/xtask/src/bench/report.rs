//! The tables, as Markdown.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::peers::Peers;
use super::{LOAD_CORE, PROXY_CORE};
use crate::run;

/// The whole document.
pub(super) struct Report {
    text: String,
}

/// The result of a scenario, or of a part of it.
pub(super) struct Section {
    pub(super) title: String,
    /// Paragraphs: what was measured, with which commands; then what went wrong.
    pub(super) notes: Vec<String>,
    pub(super) head: Vec<&'static str>,
    pub(super) rows: Vec<Vec<String>>,
    pub(super) targets: Vec<Target>,
}

/// An upper bound that this proxy should keep.
pub(super) struct Target {
    pub(super) what: &'static str,
    pub(super) limit: f64,
    pub(super) unit: &'static str,
    /// `None`: one of the two sides of it is missing from this run.
    pub(super) measured: Option<f64>,
}

impl Report {
    pub(super) fn of_this_machine() -> Self {
        let mut text = "# Performance beside Envoy, nginx and HAProxy\n\n".to_owned();
        text += "Written by `cargo bench-peers`; every table is of one run.\n\n";
        let cores = thread::available_parallelism().map_or(0, usize::from);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or_default().to_owned();
        text += &format!("- Machine: {cores} cores, {}, Linux {}", std::env::consts::ARCH, kernel.trim());
        text += &format!("; load average before the run {load}.\n");
        Self { text }
    }

    /// Which of our builds takes part.
    pub(super) fn build(&mut self, profile: &str) {
        let output =
            Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(run::root()).output();
        let commit = output.map(|output| output.stdout).unwrap_or_default();
        let commit = String::from_utf8_lossy(&commit);
        self.line(&format!("- waystation is built from commit {} with profile `{profile}`.", commit.trim()));
    }

    pub(super) fn peers(&mut self, peers: &Peers) {
        for peer in &peers.found {
            let name = peer.kind.name();
            let command = peer.kind.arguments("FILE", "FOLDER").join(" ");
            self.line(&format!("- {name}: {}; `{name} {command}`", peer.version));
        }
        for (kind, reason) in &peers.missing {
            self.line(&format!("- {}: **not in this run**: {reason}", kind.name()));
        }
    }

    pub(super) fn method(&mut self, rounds: usize, round: Duration) {
        let text = format!(
            "- One worker each. Proxies are pinned to core {PROXY_CORE}; load generator and origin (nginx, \
             `return 200` with 43 bytes) to core {LOAD_CORE}. Configurations: `conformance/bench`, ports and \
             folders filled in.\n\
             - {rounds} rounds of {} s for each proxy, interleaved (A B C D, A B C D, ...) after a warm-up round; \
             figures are medians, in brackets the smallest and largest;\n\
             \x20 ratios of CPU per request are medians of the rounds' ratios.\n\
             - CPU per request: user and system time of all threads and processes of the proxy \
             (`/proc/PID/stat`) over a round, by the requests that the generator counted. `busy` is that time by \
             the round's length: a proxy that is not near 100 % was waiting for generator and origin, or for \
             other users of the machine, and wakes more often per request.\n\
             - Memory: `VmRSS` and `RssAnon` (without pages of files) of `/proc/PID/status`, summed over master \
             and worker for nginx.\n",
            round.as_secs()
        );
        self.text += &text;
    }

    pub(super) fn add(&mut self, section: Section) {
        let mut text = format!("\n## {}\n", section.title);
        for note in &section.notes {
            text += &format!("\n{note}\n");
        }
        if !section.rows.is_empty() {
            text.push('\n');
            text += &table(&section.head, &section.rows);
        }
        if !section.targets.is_empty() {
            let rows: Vec<Vec<String>> = section.targets.iter().map(Target::row).collect();
            text.push('\n');
            text += &table(&["target", "at most", "measured", ""], &rows);
        }
        eprintln!("{text}");
        self.text += &text;
    }

    pub(super) fn skipped(&mut self, name: &str, reason: &str) {
        eprintln!("skipped: {reason}");
        self.line(&format!("\n## {name}\n\nSkipped: {reason}"));
    }

    /// Writes the document to a file, relative to the workspace, or to standard output.
    pub(super) fn write(self, out: Option<&Path>) -> Result<(), String> {
        let Some(out) = out else {
            print!("{}", self.text);
            return Ok(());
        };
        let file = run::root().join(out);
        let failed = |error| format!("cannot write {}: {error}", file.display());
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        fs::write(&file, self.text).map_err(failed)
    }

    fn line(&mut self, line: &str) {
        self.text += line;
        self.text.push('\n');
    }
}

impl Target {
    fn row(&self) -> Vec<String> {
        let (measured, verdict) = match self.measured {
            Some(value) if value <= self.limit => (figure(value), "ok"),
            Some(value) => (figure(value), "**missed**"),
            None => ("-".to_owned(), "not measured"),
        };
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        let limit = format!("{}{unit}", figure(self.limit));
        let measured = if self.measured.is_some() { format!("{measured}{unit}") } else { measured };
        vec![self.what.to_owned(), limit, measured, verdict.to_owned()]
    }
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "| {} |", head.join(" | "));
    let _ = writeln!(text, "|{}", "---|".repeat(head.len()));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

/// The middle value; of an even number the mean of the two in the middle.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get(values.len().checked_sub(1)? / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// The median, and the ends when there are several values.
pub(super) fn spread(values: &[f64]) -> String {
    let Some(middle) = median(values) else { return "-".to_owned() };
    if values.len() < 2 {
        return figure(middle);
    }
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} ({}-{})", figure(middle), figure(low), figure(high))
}

/// The median alone.
pub(super) fn middle(values: &[f64]) -> String {
    median(values).map_or_else(|| "-".to_owned(), figure)
}

/// `a` by `b`.
pub(super) fn ratio(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) if b > 0.0 => Some(a / b),
        _ => None,
    }
}

/// The median of each round's ratio: what slows the machine for a while slows both sides of a round.
pub(super) fn paired(ours: &[f64], theirs: &[f64]) -> Option<f64> {
    // A round that failed on one side leaves no pairs.
    if ours.len() != theirs.len() {
        return ratio(median(ours), median(theirs));
    }
    median(&ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
}

pub(super) fn optional(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), figure)
}

/// Three significant digits or so.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// Bytes as MiB.
pub(super) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_compared_in_pairs() {
        // The machine was three times slower in the last round; 0.5 is true of every one.
        assert_eq!(paired(&[1.0, 1.1, 3.0], &[2.0, 2.2, 6.0]), Some(0.5));
        assert_eq!(paired(&[1.0, 3.0], &[2.0, 3.0, 4.0]), Some(2.0 / 3.0));
        assert_eq!(paired(&[], &[]), None);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(spread(&[1.0, 2.0, 30.0]), "2.00 (1.00-30.0)");
    }

    #[test]
    fn a_target_is_kept_missed_or_unknown() {
        let verdict = |measured| Target { what: "x", limit: 0.5, unit: "s", measured }.row().pop();
        assert_eq!(verdict(Some(0.5)).as_deref(), Some("ok"));
        assert_eq!(verdict(Some(0.51)).as_deref(), Some("**missed**"));
        assert_eq!(verdict(None).as_deref(), Some("not measured"));
    }
}
