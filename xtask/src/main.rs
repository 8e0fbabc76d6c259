//! Repository tasks. `cargo xtask help` lists them.
#![forbid(unsafe_code)]

mod ci;
mod dist;
mod docs;
mod phase;
mod ptx;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// Tasks of this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs a phase's checks, takes its measurements, or prints its page.
    Phase {
        /// 1 to 5.
        #[arg(value_parser = clap::value_parser!(u8).range(1..=5))]
        number: u8,
        action: Action,
        /// With verify: run this check alone, and record nothing; may be repeated.
        #[arg(long, value_name = "TASK")]
        only: Vec<String>,
    },
    /// Runs the checks that only a machine with a GPU can run, and records them under docs/bench.
    /// Without build tools, TEGULA_CHECKGPU and TEGULA_PROGRAM name programs built elsewhere.
    Gpu {
        /// Run this check alone; may be repeated.
        #[arg(long, value_name = "CHECK")]
        only: Vec<String>,
    },
    /// Prints where every phase stands, from the records.
    Status,
    /// Generates the pages under docs/ from the lists of checks and the records.
    Codegen {
        /// Changes nothing; fails, with the differences, if a page is stale.
        #[arg(long)]
        check: bool,
    },
    /// Compiles the GPU kernels to the PTX that is shipped; needs NVRTC, CUDA's run-time compiler.
    Ptx {
        /// Changes nothing and needs no CUDA; fails if the PTX was made from other sources.
        #[arg(long)]
        check: bool,
    },
    /// Builds and packs the program for others, and tries what was packed.
    Dist {
        /// Pack this program instead of building one.
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
        /// Where the archive and its checksum go.
        #[arg(long, value_name = "DIRECTORY", default_value = "target/dist")]
        out: PathBuf,
    },
    /// What CI runs after installing what is missing: format, lints, generated pages, tests.
    Ci,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Action {
    /// Runs the checks, records the outcomes under docs/results and regenerates the pages.
    Verify,
    /// Takes the measurements and records the samples under docs/bench.
    Bench,
    /// Regenerates the pages and prints the phase's.
    Report,
}

fn main() -> ExitCode {
    run(Cli::parse().task).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(task: Task) -> Result<ExitCode> {
    let root = root()?;
    match task {
        Task::Phase {
            number,
            action,
            only,
        } => {
            let phase = phase::numbered(number)?;
            match action {
                Action::Verify => phase::verify(&root, &phase, &only),
                Action::Bench => phase::bench(&root, &phase),
                Action::Report => phase::report(&root, &phase),
            }
        }
        Task::Gpu { only } => phase::gpu(&root, &only),
        Task::Status => {
            print!("{}", docs::status(&root)?);
            Ok(ExitCode::SUCCESS)
        }
        Task::Codegen { check: true } => docs::check(&root),
        Task::Codegen { check: false } => docs::write(&root).map(|()| ExitCode::SUCCESS),
        Task::Ptx { check: true } => Ok(ptx::check()),
        Task::Ptx { check: false } => ptx::write(&root).map(|()| ExitCode::SUCCESS),
        Task::Dist { binary, out } => {
            dist::run(&root, binary.as_deref(), &out).map(|()| ExitCode::SUCCESS)
        }
        Task::Ci => ci::run(&root),
    }
}

/// The workspace's root: where this program was built or, on a machine that it was carried to,
/// the current directory.
fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.parent().context("xtask has no parent directory")?;
    Ok(match root.is_dir() {
        true => root.to_owned(),
        false => std::env::current_dir()?,
    })
}
