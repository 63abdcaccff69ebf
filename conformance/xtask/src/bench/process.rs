//! A process under measurement: started on one core, read through `/proc`, ended by its id.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The unit of the times in `/proc/PID/stat`: `USER_HZ`, 100 on every architecture that Linux has a proxy for.
const TICK: Duration = Duration::from_millis(10);

/// How long a process may take to end when asked.
const GRACE: Duration = Duration::from_secs(5);

/// A running process, ended when dropped.
pub(super) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    pub(super) started: Instant,
}

/// What a process holds in memory, in bytes; summed over master and workers where there are several.
#[derive(Clone, Copy, Default)]
pub(super) struct Memory {
    pub(super) resident: u64,
    /// Without pages of files: code and read-only data of the binary do not count.
    pub(super) anonymous: u64,
}

impl Process {
    /// Starts a program on one core; what it prints goes to a file in the folder.
    pub(super) fn start(
        name: &str,
        program: &Path,
        arguments: &[String],
        core: usize,
        folder: &Path,
    ) -> Result<Self, String> {
        let log = folder.join("output");
        let output = File::create(&log).map_err(|error| format!("cannot make {}: {error}", log.display()))?;
        let errors = output.try_clone().map_err(|error| error.to_string())?;
        let mut command = Command::new("taskset");
        command.arg("-c").arg(core.to_string()).arg(program).args(arguments).current_dir(folder);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let started = Instant::now();
        let child = command.spawn().map_err(|error| format!("cannot start {name}: {error}"))?;
        Ok(Self { name: name.to_owned(), child, log, started })
    }

    /// CPU time of all threads, living and ended, of the process and its children.
    pub(super) fn cpu(&self) -> Duration {
        self.family().into_iter().filter_map(cpu_ticks).sum::<u32>() * TICK
    }

    pub(super) fn memory(&self) -> Memory {
        let mut sum = Memory::default();
        for pid in self.family() {
            let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
            sum.resident += kilobytes(&status, "VmRSS:") * 1024;
            sum.anonymous += kilobytes(&status, "RssAnon:") * 1024;
        }
        sum
    }

    /// An error with the last lines of its output when the process has ended.
    pub(super) fn check(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("{} ended: {status}: {}", self.name, self.last_words())),
            Err(error) => Err(format!("{}: {error}", self.name)),
        }
    }

    /// Ends it and gives what it printed.
    pub(super) fn output(mut self) -> String {
        self.end();
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines of its output, in one line.
    pub(super) fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
    }

    /// The process and its descendants (nginx: the master and its worker).
    fn family(&self) -> Vec<u32> {
        let mut pids = vec![self.child.id()];
        let mut next = 0;
        while let Some(&pid) = pids.get(next) {
            next += 1;
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            pids.extend(children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        pids
    }

    fn end(&mut self) {
        let family = self.family();
        if matches!(self.child.try_wait(), Ok(None)) {
            signal("-TERM", &family[..1]);
        }
        if !self.ends_within(GRACE) {
            signal("-KILL", &family);
            // It cannot refuse; this only collects its status.
            let _ = self.child.wait();
        }
    }

    fn ends_within(&mut self, limit: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < limit {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn signal(name: &str, pids: &[u32]) {
    let pids = pids.iter().map(u32::to_string);
    // It may have ended meanwhile, which is what is wanted.
    let _ = Command::new("kill").arg(name).args(pids).stderr(Stdio::null()).status();
}

/// User and system time of `/proc/PID/stat`.
fn cpu_ticks(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    ticks_of(&text)
}

fn ticks_of(stat: &str) -> Option<u32> {
    // The second field is the program's name in parentheses, which may hold anything; the third follows them.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn kilobytes(status: &str, key: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_follow_a_name_with_spaces_and_parentheses() {
        let stat = "42 (a (b) c) S 1 42 42 0 -1 4194304 100 0 0 0 150 25 7 8 20 0 1 0 12345 1 2";
        assert_eq!(ticks_of(stat), Some(175));
    }

    #[test]
    fn memory_lines_are_found() {
        let status = "Name:\tx\nVmRSS:\t    5120 kB\nRssAnon:\t  1024 kB\n";
        assert_eq!(kilobytes(status, "VmRSS:"), 5120);
        assert_eq!(kilobytes(status, "RssAnon:"), 1024);
        assert_eq!(kilobytes(status, "RssShmem:"), 0);
    }
}
