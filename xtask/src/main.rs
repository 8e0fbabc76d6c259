//! Repository tasks. `cargo xtask help` lists them.
#![forbid(unsafe_code)]

mod ci;

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
    /// What CI runs after installing what is missing: format, lints, tests.
    Ci,
}

fn main() -> Result<ExitCode> {
    let root = root()?;
    match Cli::parse().task {
        Task::Ci => ci::run(&root),
    }
}

/// The workspace's root.
fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here
        .parent()
        .context("xtask has no parent directory")?
        .to_owned())
}
