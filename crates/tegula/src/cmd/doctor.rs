//! `doctor`: what this machine has for inference, and the reason of every "no".

use crate::{facts, output};
use clap::Args;
use serde::Serialize;
use std::{collections::BTreeMap, fs, path::Path};
use tegula_engine::threads::default_threads;
use tegula_kernels::{Amx, AmxFacts, Features, Tier, pool::allowed_cpus};
use tegula_lab::Host;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula doctor
  tegula doctor --json | jq .tiers")]
pub struct DoctorArgs {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    cpu: String,
    kernel: String,
    tiers: Vec<TierReport>,
    /// The tier that is used without `--isa`.
    best: &'static str,
    features: BTreeMap<&'static str, bool>,
    amx: AmxReport,
    threads: Threads,
    /// Of the first CPU, as the system writes the sizes.
    caches: Vec<String>,
    numa: Vec<Node>,
    memory: Memory,
    huge_pages: HugePages,
    gpus: Gpus,
}

#[derive(Serialize)]
struct TierReport {
    name: &'static str,
    available: bool,
    /// Why not.
    reason: Option<String>,
}

/// What `--amx` would use.
#[derive(Serialize)]
struct AmxReport {
    tile: bool,
    int8: bool,
    bf16: bool,
    fp16: bool,
    /// The state that the operating system saves; bits 17 and 18 are AMX's.
    xcr0: u64,
    available: bool,
    /// Why not.
    reason: Option<String>,
}

#[derive(Serialize)]
struct Threads {
    /// CPUs that the process may run on.
    allowed_cpus: usize,
    /// Those that the cgroup's quota leaves.
    quota: usize,
    /// What `-t` is by default: physical cores.
    default: usize,
}

#[derive(Serialize)]
struct Node {
    id: usize,
    cpus: String,
    memory: u64,
}

#[derive(Serialize)]
struct Memory {
    total: u64,
    available: Option<u64>,
    /// Of the cgroup.
    limit: Option<u64>,
    /// What may be locked by `--mlock`, as the system writes it.
    lockable: Option<String>,
}

#[derive(Serialize)]
struct HugePages {
    /// `always`, `madvise` or `never`.
    transparent: Option<String>,
    /// Whether large buffers will get them.
    used: bool,
    reserved: u64,
}

#[derive(Serialize)]
struct Gpus {
    /// NVIDIA GPUs that the driver shows.
    present: usize,
    usable: usize,
    /// Those that are usable, and bytes of their memory.
    devices: BTreeMap<String, (String, u64)>,
    /// Why none is.
    reason: Option<String>,
}

/// The GPUs that can be used, or why none can.
fn gpus(present: usize) -> Gpus {
    let found = crate::gpu::detect().and_then(|devices| {
        let infos = devices.iter().map(|d| d.info());
        Ok(infos.collect::<Result<Vec<_>, _>>()?)
    });
    let (infos, reason) = match found {
        Ok(infos) if infos.is_empty() => {
            let why = match cfg!(feature = "cuda") {
                true => "there is no NVIDIA driver, or no GPU",
                false => "this build has no GPU support",
            };
            (infos, Some(why.to_owned()))
        }
        Ok(infos) => (infos, None),
        Err(error) => (Vec::new(), Some(format!("{error:#}"))),
    };
    Gpus {
        present,
        usable: infos.len(),
        devices: infos
            .into_iter()
            .map(|i| (i.name, (i.description, i.total)))
            .collect(),
        reason,
    }
}

pub fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let report = report();
    if args.json {
        output::json(&report)
    } else {
        output::text(&text(&report))
    }
}

fn report() -> Report {
    let host = Host::detect();
    let tiers = Tier::ALL.map(|tier| TierReport {
        name: tier.name(),
        available: tier.available(),
        reason: tier.why_not(),
    });
    let transparent = read("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|s| chosen(&s));
    Report {
        version: env!("CARGO_PKG_VERSION"),
        tiers: tiers.into(),
        best: Tier::detect_max().name(),
        features: Features::get().list().into_iter().collect(),
        amx: amx(),
        threads: Threads {
            allowed_cpus: allowed_cpus().len(),
            quota: host.cores,
            default: default_threads(),
        },
        caches: caches(),
        numa: nodes(),
        memory: Memory {
            total: host.memory_mib << 20,
            available: facts::available_memory(),
            limit: read("/sys/fs/cgroup/memory.max").and_then(|s| s.parse().ok()),
            lockable: read("/proc/self/limits").and_then(|s| lockable(&s)),
        },
        huge_pages: HugePages {
            used: matches!(transparent.as_deref(), Some("always" | "madvise")),
            transparent,
            reserved: facts::meminfo("HugePages_Total").unwrap_or(0),
        },
        gpus: gpus(host.gpus),
        cpu: host.cpu,
        kernel: host.kernel,
    }
}

/// Asks the kernel for the permission, too, which commands without `--amx` never do; what is
/// asked for ends with this process.
fn amx() -> AmxReport {
    let facts = AmxFacts::read();
    let refusal = Amx::acquire().err();
    AmxReport {
        tile: facts.tile,
        int8: facts.int8,
        bf16: facts.bf16,
        fp16: facts.fp16,
        xcr0: facts.xcr0,
        available: refusal.is_none(),
        reason: refusal.map(|e| e.to_string()),
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The word in brackets.
fn chosen(s: &str) -> Option<String> {
    let (_, rest) = s.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// The soft limit of locked memory: `8 MiB` or `unlimited`.
fn lockable(limits: &str) -> Option<String> {
    let line = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max locked memory"))?;
    let soft = line.split_whitespace().next()?;
    Some(soft.parse().map_or_else(|_| soft.to_owned(), output::bytes))
}

/// `L1 data 32K`, ….
fn caches() -> Vec<String> {
    let cache = |i: usize| {
        let file = |name: &str| {
            read(format!(
                "/sys/devices/system/cpu/cpu0/cache/index{i}/{name}"
            ))
        };
        let kind = file("type")?.to_lowercase();
        Some(format!("L{} {kind} {}", file("level")?, file("size")?))
    };
    (0..8).map_while(cache).collect()
}

fn nodes() -> Vec<Node> {
    let node = |id: usize| {
        let dir = format!("/sys/devices/system/node/node{id}");
        let memory = read(format!("{dir}/meminfo")).unwrap_or_default();
        let total = memory.lines().find_map(|l| l.split_once("MemTotal:"));
        let kib = total.and_then(|(_, n)| n.split_whitespace().next()?.parse::<u64>().ok());
        Some(Node {
            id,
            cpus: read(format!("{dir}/cpulist"))?,
            memory: kib.unwrap_or(0) * 1024,
        })
    };
    // Numbers can have gaps, but not large ones.
    (0..64).filter_map(node).collect()
}

fn text(r: &Report) -> String {
    let mut out = format!(
        "tegula {}\n\ncpu        {}\nkernel     {}\n",
        r.version, r.cpu, r.kernel
    );
    let yes = |b: bool| if b { "yes" } else { "no" };
    for t in &r.tiers {
        let why = t
            .reason
            .as_ref()
            .map_or(String::new(), |why| format!(": {why}"));
        let used = if t.name == r.best { " (used)" } else { "" };
        out += &format!("{:10} {}{why}{used}\n", t.name, yes(t.available));
    }
    let why = r
        .amx
        .reason
        .as_ref()
        .map_or(String::new(), |why| format!(": {why}"));
    let how = if r.amx.available { " (with --amx)" } else { "" };
    out += &format!("{:10} {}{why}{how}\n", "amx", yes(r.amx.available));
    let has: Vec<_> = r.features.iter().filter(|f| *f.1).map(|f| *f.0).collect();
    out += &format!("features   {}\n", has.join(" "));
    out += &format!(
        "threads    {} by default; {} CPUs allowed, quota {}\n",
        r.threads.default, r.threads.allowed_cpus, r.threads.quota
    );
    if !r.caches.is_empty() {
        out += &format!("caches     {}\n", r.caches.join(", "));
    }
    for n in &r.numa {
        out += &format!(
            "numa {:<5} CPUs {}, {}\n",
            n.id,
            n.cpus,
            output::bytes(n.memory)
        );
    }
    if r.numa.is_empty() {
        out += "numa       the system shows no nodes\n";
    }
    let m = &r.memory;
    out += &format!("memory     {}", output::bytes(m.total));
    let parts = [
        m.available
            .map(|n| format!("{} available", output::bytes(n))),
        m.limit
            .map(|n| format!("cgroup limit {}", output::bytes(n))),
        m.lockable.as_ref().map(|n| format!("lockable {n}")),
    ];
    for part in parts.into_iter().flatten() {
        out += &format!(", {part}");
    }
    let h = &r.huge_pages;
    let mode = h
        .transparent
        .as_deref()
        .unwrap_or("not offered by the kernel");
    out += &format!(
        "\nhuge pages {}: transparent huge pages: {mode}; {} reserved\n",
        yes(h.used),
        h.reserved
    );
    if let Some(why) = &r.gpus.reason {
        let shown = r.gpus.present;
        out += &format!("gpus       none usable: {why} ({shown} shown by the driver)\n");
    }
    for (name, (description, total)) in &r.gpus.devices {
        out += &format!(
            "gpus       {name}: {description}, {}\n",
            output::bytes(*total)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_files_are_read_as_they_are_written() {
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("nothing"), None);
        let limits = "Max open files  1024 4096 files\nMax locked memory         8388608              8388608              bytes\n";
        assert_eq!(lockable(limits).as_deref(), Some("8.00 MiB"));
        let limits = "Max locked memory         unlimited            unlimited            bytes\n";
        assert_eq!(lockable(limits).as_deref(), Some("unlimited"));
    }
}
