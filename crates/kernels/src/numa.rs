//! Memory nodes: where threads run, and thereby where the memory lies that they touch first.

use crate::pool::{allowed_cpus, pin};
use std::{fs, path::Path, str::FromStr};

/// Where threads may run on a machine with several nodes, named as llama.cpp names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Numa {
    /// Workers in turn on all nodes. What they pack lies on the node of whoever packed it, so
    /// weights spread over all nodes too, and all memory channels are used.
    Distribute,
    /// Only on the node where the program started: threads, and all memory that it fits.
    Isolate,
    /// As `numactl` or whoever started the program has arranged it.
    Numactl,
}

/// The text names no [`Numa`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of distribute, isolate, numactl")]
pub struct UnknownNuma(String);

impl FromStr for Numa {
    type Err = UnknownNuma;

    fn from_str(s: &str) -> Result<Numa, UnknownNuma> {
        match s {
            "distribute" => Ok(Numa::Distribute),
            "isolate" => Ok(Numa::Isolate),
            "numactl" => Ok(Numa::Numactl),
            _ => Err(UnknownNuma(s.to_owned())),
        }
    }
}

/// The CPUs of each node that this process may run on; nodes without any are left out. One
/// node with all of them where the system shows none.
pub fn nodes() -> Vec<Vec<usize>> {
    nodes_under(Path::new("/sys/devices/system/node"), &allowed_cpus())
}

fn nodes_under(dir: &Path, allowed: &[usize]) -> Vec<Vec<usize>> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut named: Vec<(usize, Vec<usize>)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix("node")?.parse().ok()?;
            let list = fs::read_to_string(entry.path().join("cpulist")).ok()?;
            let mut cpus = cpu_list(&list);
            cpus.retain(|cpu| allowed.contains(cpu));
            (!cpus.is_empty()).then_some((number, cpus))
        })
        .collect();
    named.sort();
    match named.is_empty() {
        true => vec![allowed.to_vec()],
        false => named.into_iter().map(|(_, cpus)| cpus).collect(),
    }
}

/// The CPUs of a list such as `0-3,8`.
fn cpu_list(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

/// Keeps the calling thread, and the threads that it starts from now on, to the CPUs of the
/// node that it runs on. To be called before there are threads.
pub fn isolate() {
    // SAFETY: the call takes no arguments.
    let here = unsafe { libc::sched_getcpu() };
    let here = usize::try_from(here).unwrap_or(0);
    if let Some(node) = nodes().iter().find(|node| node.contains(&here)) {
        pin(node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_those_with_cpus_that_may_be_used() {
        let dir = std::env::temp_dir().join(format!("tegula-numa-{}", std::process::id()));
        for (node, list) in [(0, "0-3,8-11\n"), (1, "4-7\n"), (10, "12\n"), (2, "\n")] {
            let node = dir.join(format!("node{node}"));
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("cpulist"), list).unwrap();
        }
        fs::create_dir_all(dir.join("power")).unwrap();
        let allowed = [0, 1, 4, 5, 8, 12];
        let found = nodes_under(&dir, &allowed);
        let none = nodes_under(&dir.join("none"), &allowed);
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(found, [vec![0, 1, 8], vec![4, 5], vec![12]]);
        assert_eq!(none, [allowed.to_vec()]);
    }

    #[test]
    fn every_cpu_is_on_one_node() {
        let mut on_nodes = nodes().concat();
        let mut allowed = allowed_cpus();
        on_nodes.sort_unstable();
        allowed.sort_unstable();
        assert_eq!(on_nodes, allowed);
    }

    #[test]
    fn isolation_keeps_to_one_node() {
        std::thread::spawn(|| {
            isolate();
            let left = allowed_cpus();
            let inside = |node: &Vec<usize>| left.iter().all(|cpu| node.contains(cpu));
            assert!(!left.is_empty() && nodes().iter().any(inside));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn names_are_llama_cpps() {
        assert_eq!("distribute".parse(), Ok(Numa::Distribute));
        assert_eq!("isolate".parse(), Ok(Numa::Isolate));
        assert_eq!("numactl".parse(), Ok(Numa::Numactl));
        let mirror = "mirror".parse::<Numa>().unwrap_err().to_string();
        assert_eq!(mirror, "`mirror` is none of distribute, isolate, numactl");
    }
}
