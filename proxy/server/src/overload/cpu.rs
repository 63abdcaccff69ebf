//! `envoy.resource_monitors.cpu_utilization`: how much of the host's or the container's processors is in use.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The weight of the newest figure in the moving average, as in Envoy: a spike must last to count.
const ALPHA: f64 = 0.05;

/// The moving average, and what the last reading was.
#[derive(Debug)]
pub(super) struct CpuMonitor {
    source: Source,
    last: Option<Reading>,
    average: f64,
}

/// Where the figures come from.
#[derive(Debug)]
enum Source {
    /// `/proc/stat`.
    Host,
    /// The directory of a cgroup of version 2.
    Unified(PathBuf),
    /// `cpuacct.usage` and `cpu.shares`.
    Split { usage: PathBuf, shares: PathBuf },
}

/// Work that was done, out of how much could have been, both since some beginning.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reading {
    work: f64,
    total: f64,
}

impl CpuMonitor {
    /// For all processors of the host.
    pub(super) fn host() -> Self {
        Self::new(Source::Host)
    }

    /// For what this process's cgroup may use.
    ///
    /// # Errors
    /// When there are no figures of a cgroup.
    pub(super) fn container() -> Result<Self, String> {
        let unified = own_directory().filter(|own| own.join("cpu.stat").exists());
        let unified = unified.unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup"));
        if unified.join("cpu.stat").exists() {
            return Ok(Self::new(Source::Unified(unified)));
        }
        let usage = PathBuf::from("/sys/fs/cgroup/cpuacct/cpuacct.usage");
        let shares = PathBuf::from("/sys/fs/cgroup/cpu/cpu.shares");
        match usage.exists() && shares.exists() {
            true => Ok(Self::new(Source::Split { usage, shares })),
            false => Err("no cgroup with CPU statistics was found".to_owned()),
        }
    }

    fn new(source: Source) -> Self {
        let mut monitor = Self { source, last: None, average: 0.0 };
        // What came before this is not looked at; a failure shows with the first update.
        monitor.last = monitor.source.read(Duration::ZERO).ok();
        monitor
    }

    /// The moving average; `age` is the time since any fixed point.
    pub(super) fn pressure(&mut self, age: Duration) -> Result<f64, String> {
        let reading = self.source.read(age)?;
        let last = self.last.replace(reading).unwrap_or(reading);
        self.average = blend(self.average, last, reading)?;
        Ok(self.average)
    }
}

/// The average after another reading.
fn blend(average: f64, last: Reading, now: Reading) -> Result<f64, String> {
    let (work, total) = (now.work - last.work, now.total - last.total);
    if work < 0.0 || total <= 0.0 {
        return Err(format!(
            "Erroneous CPU stats calculation. Work_over_period='{work}' cannot be a negative number and \
             total_over_period='{total}' must be a positive number."
        ));
    }
    Ok((work / total).min(1.0) * ALPHA + average * (1.0 - ALPHA))
}

impl Source {
    /// `age` stands for what could have been done where the kernel does not count that.
    fn read(&self, age: Duration) -> Result<Reading, String> {
        match self {
            Self::Host => host(&read("/proc/stat".as_ref())?).ok_or_else(|| malformed("/proc/stat".as_ref())),
            Self::Unified(directory) => {
                let stat = directory.join("cpu.stat");
                let micros = usage(&read(&stat)?).ok_or_else(|| malformed(&stat))?;
                // Without these files all that the host has may be used.
                let most = fs::read_to_string(directory.join("cpu.max")).unwrap_or_default();
                let cpus = fs::read_to_string(directory.join("cpuset.cpus.effective")).unwrap_or_default();
                let processors = quota(&most).into_iter().chain(count(&cpus)).fold(f64::INFINITY, f64::min);
                let processors = if processors.is_finite() { processors } else { available() };
                Ok(Reading { work: micros / 1e6 / processors, total: age.as_secs_f64() })
            }
            Self::Split { usage, shares } => {
                let number = |path: &Path| read(path)?.trim().parse::<f64>().map_err(|_| malformed(path));
                // 1024 shares are one processor, by Kubernetes' convention, which Envoy goes by.
                let processors = number(shares)? / 1024.0;
                Ok(Reading { work: number(usage)? / 1e9 / processors, total: age.as_secs_f64() })
            }
        }
    }
}

fn available() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("Unable to read {}: {error}", path.display()))
}

fn malformed(path: &Path) -> String {
    format!("Unexpected format in linux cpu stats file {}", path.display())
}

/// The first line of `/proc/stat`: user, nice, system, and idle. What else it counts Envoy leaves out.
fn host(text: &str) -> Option<Reading> {
    let mut times = text.strip_prefix("cpu  ")?.split_ascii_whitespace().map_while(|time| time.parse().ok());
    let mut next = || -> Option<f64> { times.next() };
    let work = next()? + next()? + next()?;
    Some(Reading { work, total: work + next()? })
}

/// `usage_usec` of `cpu.stat`.
fn usage(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix("usage_usec "))?.trim().parse().ok()
}

/// The processors that `cpu.max` allows; nothing when it sets no limit.
fn quota(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// How many processors a list such as `0-3,8` names.
fn count(text: &str) -> Option<f64> {
    let mut count = 0;
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count += last.checked_sub(first)?.checked_add(1)?;
    }
    Some(f64::from(count))
}

/// The directory of this process's cgroup, as it is mounted here.
fn own_directory() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    directory(&mounts, &groups)
}

fn directory(mounts: &str, groups: &str) -> Option<PathBuf> {
    // 30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw
    let (root, mounted) = mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        after.starts_with("cgroup2 ").then_some((fields.next()?, fields.next()?))
    })?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"))?.trim_end();
    // A private namespace says `/`, whose place is the mount itself.
    let below = own.strip_prefix(root.trim_end_matches('/')).unwrap_or_default();
    Some(Path::new(mounted).join(below.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_the_kernel() {
        assert_eq!(host("cpu  10 1 4 85 7 0 3\ncpu0 1 2 3 4\n"), Some(Reading { work: 15.0, total: 100.0 }));
        assert_eq!(host("cpu0 10 1 4 85"), None);
        assert_eq!(host("cpu  10 1 4"), None);
        assert_eq!(usage("usage_usec 2500000\nuser_usec 1\n"), Some(2_500_000.0));
        assert_eq!(usage("user_usec 1\n"), None);
        assert_eq!(quota("150000 100000\n"), Some(1.5));
        assert_eq!(quota("max 100000\n"), None);
        assert_eq!(count("0-3,8\n"), Some(5.0));
        assert_eq!(count("\n"), None);
        assert_eq!(count("3-1"), None);
    }

    #[test]
    fn the_directory_of_a_cgroup() {
        let mounts =
            "29 23 0:25 / /proc rw - proc proc rw\n30 23 0:26 /pod /sys/fs/cgroup rw - cgroup2 c rw\n";
        for (mounts, groups, expected) in [
            (mounts, "1:cpu:/x\n0::/pod/a\n", Some("/sys/fs/cgroup/a")),
            (mounts, "0::/pod\n", Some("/sys/fs/cgroup/")),
            (mounts, "0::/\n", Some("/sys/fs/cgroup/")),
            (mounts, "1:cpu:/x\n", None),
            ("29 23 0:25 / /proc rw - proc proc rw\n", "0::/a\n", None),
            ("30 23 0:26 / /c rw - cgroup2 c rw\n", "0::/a/b\n", Some("/c/a/b")),
        ] {
            assert_eq!(directory(mounts, groups), expected.map(PathBuf::from), "{groups}");
        }
    }

    #[test]
    fn a_spike_must_last_to_count() {
        let reading = |work, total| Reading { work, total };
        let mut average = 0.0;
        for second in 0..14 {
            let (last, now) = (f64::from(second), f64::from(second + 1));
            average = blend(average, reading(last, last), reading(now, now)).unwrap();
        }
        assert!((0.50..0.52).contains(&average), "half of it after 14 updates: {average}");
        let above = blend(0.0, reading(0.0, 0.0), reading(9.0, 1.0)).unwrap();
        assert_eq!(above, ALPHA, "more than everything is everything");
        assert!(blend(0.5, reading(5.0, 5.0), reading(4.0, 6.0)).is_err());
        assert!(blend(0.5, reading(5.0, 5.0), reading(5.0, 5.0)).is_err());
    }
}
