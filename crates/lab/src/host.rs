//! Facts about the machine that records name.

use std::fs;

use serde::{Deserialize, Serialize};

/// The machine that a result comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The CPU's own name.
    pub cpu: String,
    /// The instruction sets that kernels could use, as the system spells them.
    pub flags: Vec<String>,
    /// Logical CPUs that the process may run on.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// NVIDIA GPUs that the driver shows.
    pub gpus: usize,
}

impl Host {
    /// Reads the facts from the system; what can't be read is empty or zero.
    pub fn detect() -> Host {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut host = Host::from_proc(&read("/proc/cpuinfo"), &read("/proc/meminfo"));
        host.cores = std::thread::available_parallelism().map_or(0, usize::from);
        host.kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
        host.gpus = fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count);
        host
    }

    fn from_proc(cpuinfo: &str, meminfo: &str) -> Host {
        let field = |text: &str, name: &str| {
            text.lines()
                .filter_map(|l| l.split_once(':'))
                .find(|(k, _)| k.trim() == name)
                .map(|(_, v)| v.trim().to_owned())
                .unwrap_or_default()
        };
        let of_interest = |f: &&str| {
            ["avx", "amx", "fma", "f16c", "sse4", "ssse3", "bmi"]
                .iter()
                .any(|p| f.starts_with(p))
        };
        let mut flags: Vec<String> = field(cpuinfo, "flags")
            .split_whitespace()
            .filter(of_interest)
            .map(str::to_owned)
            .collect();
        flags.sort_unstable();
        let kib = field(meminfo, "MemTotal");
        Host {
            cpu: field(cpuinfo, "model name"),
            flags,
            memory_mib: kib
                .split_whitespace()
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .map_or(0, |n| n / 1024),
            ..Host::default()
        }
    }

    /// A short name for directories: the CPU's name, its cores and its GPUs.
    pub fn slug(&self) -> String {
        let mut words: Vec<String> = self
            .cpu
            .split(|c: char| !c.is_ascii_alphanumeric())
            .map(str::to_ascii_lowercase)
            .filter(|w| !w.is_empty() && !["r", "tm", "cpu", "processor"].contains(&&**w))
            .collect();
        if words.is_empty() {
            words.push("unknown".to_owned());
        }
        words.push(format!("{}c", self.cores));
        if self.gpus > 0 {
            words.push(format!("{}gpu", self.gpus));
        }
        words.join("-")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_and_named() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8570 CPU\n\
                       flags\t\t: fpu sse4_2 avx2 amx_tile avx512f\n";
        let mut host = Host::from_proc(cpuinfo, "MemTotal:       2097152 kB\n");
        assert_eq!(host.cpu, "Intel(R) Xeon(R) Platinum 8570 CPU");
        assert_eq!(host.flags, ["amx_tile", "avx2", "avx512f", "sse4_2"]);
        assert_eq!(host.memory_mib, 2048);
        host.cores = 16;
        assert_eq!(host.slug(), "intel-xeon-platinum-8570-16c");
        host.gpus = 2;
        assert_eq!(host.slug(), "intel-xeon-platinum-8570-16c-2gpu");
    }

    #[test]
    fn nothing_readable_is_no_panic() {
        let host = Host::from_proc("", "");
        assert_eq!(host, Host::default());
        assert_eq!(host.slug(), "unknown-0c");
    }
}
