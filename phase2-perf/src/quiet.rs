//! What disturbs a measurement and what it costs: throttling and energy, as the system counts
//! them. What can't be read counts as absent.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Counters of throttling that only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Throttling {
    /// Times that cores or packages lowered their clock for heat or power.
    thermal: u64,
    /// Times that the cgroup had used up its quota of CPU time.
    quota: u64,
}

impl Throttling {
    /// The counters now.
    pub fn read() -> Throttling {
        Throttling::under(Path::new("/sys"))
    }

    fn under(sys: &Path) -> Throttling {
        let number = |path: PathBuf| -> u64 {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        let cpus = entries(&sys.join("devices/system/cpu"), "cpu");
        let thermal = cpus.iter().map(|cpu| {
            let dir = cpu.join("thermal_throttle");
            number(dir.join("core_throttle_count")) + number(dir.join("package_throttle_count"))
        });
        let quota = fs::read_to_string(sys.join("fs/cgroup/cpu.stat")).unwrap_or_default();
        let quota = quota
            .lines()
            .find_map(|line| line.strip_prefix("nr_throttled "));
        Throttling {
            thermal: thermal.sum(),
            quota: quota.and_then(|n| n.trim().parse().ok()).unwrap_or(0),
        }
    }

    /// What happened since, in words; nothing if nothing did.
    pub fn since(&self, before: &Throttling) -> Option<String> {
        let mut what = Vec::new();
        if self.thermal > before.thermal {
            let times = self.thermal - before.thermal;
            what.push(format!(
                "cores were throttled {times} times for heat or power"
            ));
        }
        if self.quota > before.quota {
            let times = self.quota - before.quota;
            what.push(format!("the cgroup's CPU quota ran out {times} times"));
        }
        (!what.is_empty()).then(|| what.join(", "))
    }
}

/// Entries of a directory whose name is `prefix` and a number or more.
fn entries(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|n| n.to_str());
        name.and_then(|n| n.strip_prefix(prefix))
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let mut paths: Vec<_> = entries.map(|e| e.path()).filter(named).collect();
    paths.sort();
    paths
}

/// The energy counters of the CPU packages (RAPL).
#[derive(Clone, Debug, Default)]
pub struct Energy {
    /// Counter and where it wraps, in microjoules.
    packages: Vec<(PathBuf, u64)>,
    start: Vec<u64>,
}

impl Energy {
    /// Finds the counters that may be read, and starts.
    pub fn start() -> Energy {
        Energy::under(Path::new("/sys/class/powercap"))
    }

    fn under(dir: &Path) -> Energy {
        let read =
            |path: &Path| -> Option<u64> { fs::read_to_string(path).ok()?.trim().parse().ok() };
        let zones = entries(dir, "intel-rapl:");
        // `intel-rapl:0:1` is a part of package 0.
        let packages = zones.iter().filter(|zone| {
            let name = zone.file_name().and_then(|n| n.to_str()).unwrap_or("");
            name.matches(':').count() == 1
        });
        let mut energy = Energy::default();
        for zone in packages {
            let counter = zone.join("energy_uj");
            let Some(now) = read(&counter) else { continue };
            let range = read(&zone.join("max_energy_range_uj")).unwrap_or(u64::MAX);
            energy.packages.push((counter, range));
            energy.start.push(now);
        }
        energy
    }

    /// Joules of all packages since the start; nothing where no counter can be read.
    pub fn joules(&self) -> Option<f64> {
        let mut sum = 0;
        for ((path, range), &start) in self.packages.iter().zip(&self.start) {
            let now: u64 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
            sum += match now.checked_sub(start) {
                Some(used) => used,
                None => range - start + now,
            };
        }
        (!self.packages.is_empty()).then_some(sum as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn throttling_is_what_has_grown() {
        let dir = tempfile::tempdir().unwrap();
        let count = dir
            .path()
            .join("devices/system/cpu/cpu3/thermal_throttle/core_throttle_count");
        let stat = dir.path().join("fs/cgroup/cpu.stat");
        write(count.clone(), "7\n");
        write(stat.clone(), "usage_usec 5\nnr_periods 9\nnr_throttled 2\n");
        let before = Throttling::under(dir.path());
        assert_eq!(before.since(&before), None);
        write(count, "9\n");
        let heat = Throttling::under(dir.path()).since(&before).unwrap();
        assert_eq!(heat, "cores were throttled 2 times for heat or power");
        write(stat, "nr_throttled 3\n");
        let both = Throttling::under(dir.path()).since(&before).unwrap();
        assert!(
            both.ends_with(", the cgroup's CPU quota ran out 1 times"),
            "{both}"
        );
        let none = Throttling::under(&dir.path().join("none"));
        assert_eq!(none, Throttling::default());
    }

    #[test]
    fn energy_is_of_packages_and_wraps() {
        let dir = tempfile::tempdir().unwrap();
        let zone = |name: &str, file: &str, text: &str| {
            write(dir.path().join(name).join(file), text);
        };
        assert_eq!(Energy::under(dir.path()).joules(), None);
        zone("intel-rapl:0", "energy_uj", "900\n");
        zone("intel-rapl:0", "max_energy_range_uj", "1000\n");
        zone("intel-rapl:0:0", "energy_uj", "5\n");
        zone("intel-rapl:1", "energy_uj", "100\n");
        let energy = Energy::under(dir.path());
        zone("intel-rapl:0", "energy_uj", "200\n");
        zone("intel-rapl:1", "energy_uj", "1100\n");
        zone("intel-rapl:0:0", "energy_uj", "999999\n");
        assert_eq!(energy.joules(), Some(1300.0 / 1e6));
    }
}
