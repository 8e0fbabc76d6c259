//! How many threads to use by default: physical cores that this process may use.

use std::{collections::BTreeSet, fs, num::NonZero, thread};
use tegula_kernels::pool::allowed_cpus;

/// Physical cores within the CPU set, limited by the cgroup's quota; at least 1.
///
/// Hyperthreads of one core share its multipliers, so a second thread per core rarely adds
/// speed and often takes some.
pub fn default_threads() -> usize {
    let cpus = allowed_cpus();
    let cores: BTreeSet<_> = cpus.iter().map(|&cpu| core_of(cpu)).collect();
    let quota = thread::available_parallelism().map_or(1, NonZero::get);
    cores.len().clamp(1, quota.max(1))
}

/// What identifies the physical core of a CPU: its list of siblings, or itself.
fn core_of(cpu: usize) -> String {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn at_least_one_and_at_most_all() {
        let n = super::default_threads();
        assert!(n >= 1 && n <= tegula_kernels::pool::allowed_cpus().len());
    }
}
