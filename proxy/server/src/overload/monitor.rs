//! What measures the pressure of a resource.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use waystation_filter_api::runtime::RuntimeInteger;

use super::cpu::CpuMonitor;
use crate::memory;

/// A monitor, by its kind. It is asked on the main thread: what it reads are files of the kernel, or short ones.
#[derive(Debug)]
pub(super) enum Monitor {
    /// `injected_resource`: the pressure is what the file says, from 0 to 1.
    Injected(PathBuf),
    /// `fixed_heap`: the heap ([`memory::heap`]) against this many bytes.
    FixedHeap(HeapLimit),
    /// `cgroup_memory`: the cgroup's memory against its limit.
    CgroupMemory(CgroupMemory),
    /// `cpu_utilization`.
    Cpu(CpuMonitor),
}

/// Where the size of a heap that is full comes from.
#[derive(Debug)]
pub(super) enum HeapLimit {
    Fixed(u64),
    Runtime(RuntimeInteger),
}

/// Where a cgroup's figures are, and the bound that the configuration sets beside its own; 0 for none.
#[derive(Debug)]
pub(super) struct CgroupMemory {
    usage: PathBuf,
    limit: PathBuf,
    max: u64,
}

impl Monitor {
    /// The pressure, of which 1 is all that there is. `age` is the time since any fixed point.
    pub(super) fn pressure(&mut self, age: Duration) -> Result<f64, String> {
        match self {
            Self::Injected(path) => injected(&read(path)?),
            Self::FixedHeap(limit) => {
                let limit = match limit {
                    HeapLimit::Fixed(limit) => *limit,
                    HeapLimit::Runtime(limit) => limit.get(),
                };
                match limit {
                    0 => Err("max heap size must be greater than 0".to_owned()),
                    limit => Ok(memory::heap() as f64 / limit as f64),
                }
            }
            Self::CgroupMemory(cgroup) => cgroup.pressure(),
            Self::Cpu(cpu) => cpu.pressure(age),
        }
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("unable to read {}: {error}", path.display()))
}

fn injected(text: &str) -> Result<f64, String> {
    let text = text.trim();
    let pressure: f64 =
        text.parse().map_err(|_| format!("failed to parse injected resource pressure '{text}'"))?;
    match (0.0..=1.0).contains(&pressure) {
        true => Ok(pressure),
        false => Err("pressure out of range".to_owned()),
    }
}

impl CgroupMemory {
    /// The cgroup of this container.
    ///
    /// # Errors
    /// When there is none that counts memory, in Envoy's words.
    pub(super) fn find(max: u64) -> Result<Self, String> {
        for (usage, limit) in [
            ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.max"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        ] {
            if Path::new(usage).exists() && Path::new(limit).exists() {
                return Ok(Self { usage: usage.into(), limit: limit.into(), max });
            }
        }
        Err("No supported cgroup memory implementation found".to_owned())
    }

    fn pressure(&self) -> Result<f64, String> {
        let used = bytes(&read(&self.usage)?).flatten();
        let used = used
            .ok_or_else(|| format!("Unable to parse memory stats from file at {}", self.usage.display()))?;
        let limit = bytes(&read(&self.limit)?)
            .ok_or_else(|| format!("Unable to parse memory stats from file at {}", self.limit.display()))?;
        Ok(share(used, limit, self.max))
    }
}

/// A number of bytes, or no limit; nothing when it is neither.
#[expect(clippy::option_option, reason = "no limit is not the same as no number")]
fn bytes(text: &str) -> Option<Option<u64>> {
    match text.trim() {
        // Version 2 and version 1.
        "max" | "-1" => Some(None),
        text => text.parse().ok().map(Some),
    }
}

/// The pressure of memory against the lower of two limits, of which 0 is none.
fn share(used: u64, limit: Option<u64>, max: u64) -> f64 {
    let max = Some(max).filter(|max| *max > 0);
    match limit.into_iter().chain(max).min() {
        None => 0.0,
        Some(limit) => used as f64 / limit.max(1) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_injected_pressure_is_a_share() {
        assert_eq!(injected("0.75\n"), Ok(0.75));
        assert_eq!(injected("1"), Ok(1.0));
        for wrong in ["", "much", "-0.1", "1.01", "NaN", "inf"] {
            assert!(injected(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn memory_against_the_lower_limit() {
        assert_eq!(bytes("max\n"), Some(None));
        assert_eq!(bytes("-1\n"), Some(None));
        assert_eq!(bytes("4096\n"), Some(Some(4096)));
        assert_eq!(bytes("some"), None);
        assert_eq!(share(50, None, 0), 0.0);
        assert_eq!(share(50, None, 200), 0.25);
        assert_eq!(share(50, Some(100), 200), 0.5);
        assert_eq!(share(50, Some(100), 0), 0.5);
    }

    #[test]
    fn the_heap_of_this_process() {
        let pressure = |limit| Monitor::FixedHeap(HeapLimit::Fixed(limit)).pressure(Duration::ZERO);
        assert!(pressure(1 << 40).unwrap() > 0.0);
        assert!(pressure(1).unwrap() > 1.0, "it is not cut off at 1, as Envoy's is not");
        assert!(pressure(0).is_err());
    }
}
