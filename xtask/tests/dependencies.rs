//! Dependencies point one way: gguf ← kernels ← engine ← phases ← tegula.

use std::collections::BTreeMap;

use cargo_metadata::{Metadata, MetadataCommand, Package};

/// What each crate may use of this workspace. A new crate needs a line here.
const MAY_USE: &[(&str, &[&str])] = &[
    ("tegula-gguf", &[]),
    ("amx-emu", &[]),
    ("tegula-lab", &[]),
    ("tegula-kernels", &["tegula-gguf", "amx-emu"]),
    ("tegula-cuda", &["tegula-gguf", "tegula-kernels"]),
    ("tegula-engine", &["tegula-gguf", "tegula-kernels"]),
    ("tegula-grammar", &["tegula-gguf", "tegula-engine"]),
    (
        "tegula-server",
        &[
            "tegula-gguf",
            "tegula-kernels",
            "tegula-engine",
            "tegula-grammar",
        ],
    ),
    (
        "phase1-isolation",
        &[
            "tegula-gguf",
            "amx-emu",
            "tegula-lab",
            "tegula-kernels",
            // For its checks on real GPUs.
            "tegula-cuda",
            "tegula-engine",
        ],
    ),
    ("phase2-perf", BELOW_PHASES),
    ("phase3-analysis", BELOW_PHASES),
    ("phase4-parity", BELOW_PHASES),
    ("phase5-sparamx", BELOW_PHASES),
    (
        "tegula",
        &[
            "tegula-gguf",
            "tegula-lab",
            "tegula-kernels",
            "tegula-cuda",
            "tegula-engine",
            "tegula-grammar",
            "tegula-server",
            "phase1-isolation",
            "phase2-perf",
            "phase3-analysis",
            "phase4-parity",
            "phase5-sparamx",
        ],
    ),
    (
        "xtask",
        &[
            "tegula-lab",
            // For the sources of its kernels.
            "tegula-cuda",
            // For the definition of its commands.
            "tegula",
            // For its feature `amx` alone.
            "tegula-engine",
            "phase1-isolation",
            "phase2-perf",
            "phase3-analysis",
            "phase4-parity",
            "phase5-sparamx",
        ],
    ),
];

const BELOW_PHASES: &[&str] = &[
    "tegula-gguf",
    "amx-emu",
    "tegula-lab",
    "tegula-kernels",
    "tegula-engine",
];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo describes the workspace")
}

/// The names of a package's dependencies of every kind: normal, build and development.
fn uses(package: &Package) -> impl Iterator<Item = &str> {
    package.dependencies.iter().map(|d| d.name.as_str())
}

#[test]
fn crates_use_only_what_lies_below_them() {
    let metadata = metadata();
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        let name = package.name.as_str();
        let Some(may_use) = allowed.get(name) else {
            wrong.push(format!("{name} has no line in MAY_USE"));
            continue;
        };
        for used in uses(package).filter(|used| allowed.contains_key(used)) {
            if !may_use.contains(&used) {
                wrong.push(format!("{name} uses {used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_names_the_workspace_in_order() {
    let metadata = metadata();
    for (i, (name, may_use)) in MAY_USE.iter().enumerate() {
        assert!(
            metadata.packages.iter().any(|p| p.name.as_str() == *name),
            "{name} is no crate of the workspace"
        );
        // A crate that is listed before its user can't use it in turn: no cycles.
        for used in *may_use {
            let at = MAY_USE.iter().position(|(other, _)| other == used);
            assert!(at.is_some_and(|at| at < i), "{name} precedes {used}");
        }
    }
}

#[test]
fn only_the_program_has_sockets() {
    for package in &metadata().packages {
        let sockets = ["axum", "hyper", "hyper-util", "tokio"];
        assert!(
            package.name.as_str() == "tegula" || uses(package).all(|used| !sockets.contains(&used)),
            "{}: sockets are the program's",
            package.name
        );
    }
}

#[test]
fn only_programs_use_anyhow() {
    for package in &metadata().packages {
        let program = ["tegula", "xtask"].contains(&package.name.as_str());
        assert!(
            program || uses(package).all(|used| used != "anyhow"),
            "{}: libraries have typed errors",
            package.name
        );
    }
}
