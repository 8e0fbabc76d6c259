//! How many threads to use by default: physical cores that this process may use.

use std::{collections::BTreeSet, fs, num::NonZero, thread};
use tegula_kernels::pool::allowed_cpus;

/// Physical cores within the CPU set that are not much slower than the fastest of them,
/// limited by the cgroup's quota; at least 1.
///
/// Hyperthreads of one core share its multipliers, so a second thread per core rarely adds
/// speed and often takes some. Efficiency cores of a hybrid CPU hold up the others at the end
/// of every product.
pub fn default_threads() -> usize {
    let cpus: Vec<(String, u64)> = allowed_cpus()
        .into_iter()
        .map(|cpu| (core_of(cpu), highest_khz(cpu)))
        .collect();
    let quota = thread::available_parallelism().map_or(1, NonZero::get);
    fast_cores(&cpus).clamp(1, quota.max(1))
}

/// A core this much slower than the fastest one, in percent of its clock, is left out.
const SLOW: u64 = 75;

/// How many of the cores, given with a CPU's highest clock each, have at least [`SLOW`]
/// percent of the highest of all; a clock of 0 is unknown and counts as fast.
fn fast_cores(cpus: &[(String, u64)]) -> usize {
    let highest = cpus.iter().map(|cpu| cpu.1).max().unwrap_or(0);
    let fast = |cpu: &&(String, u64)| cpu.1 == 0 || cpu.1 * 100 >= highest * SLOW;
    let cores: BTreeSet<&str> = cpus.iter().filter(fast).map(|cpu| cpu.0.as_str()).collect();
    cores.len()
}

/// The highest clock of a CPU in kHz; 0 where the system does not say.
fn highest_khz(cpu: usize) -> u64 {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// What identifies the physical core of a CPU: its list of siblings, or itself.
fn core_of(cpu: usize) -> String {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string())
}

#[cfg(test)]
mod tests {
    use super::fast_cores;

    #[test]
    fn hyperthreads_and_efficiency_cores_are_left_out() {
        let cpu = |core: &str, khz| (core.to_owned(), khz);
        let xeon = [cpu("0,2", 0), cpu("1,3", 0), cpu("0,2", 0), cpu("1,3", 0)];
        assert_eq!(fast_cores(&xeon), 2);
        let hybrid = [
            cpu("0-1", 5_200_000),
            cpu("0-1", 5_200_000),
            cpu("2-3", 5_000_000),
            cpu("4", 3_800_000),
            cpu("5", 3_800_000),
        ];
        assert_eq!(fast_cores(&hybrid), 2);
        assert_eq!(fast_cores(&[]), 0);
    }

    #[test]
    fn at_least_one_and_at_most_all() {
        let n = super::default_threads();
        assert!(n >= 1 && n <= tegula_kernels::pool::allowed_cpus().len());
    }
}
