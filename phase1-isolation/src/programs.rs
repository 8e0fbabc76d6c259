//! The programs that are compared: built by cargo from this very checkout, in three variants.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tegula_kernels::Tier;

use crate::probe::Facts;

/// How a program is built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Variant {
    /// Without AMX code: what main would be without this project.
    Without,
    /// As it ships.
    With,
    /// AMX code aborts.
    Aborting,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Variant::Without => "without-amx",
            Variant::With => "with-amx",
            Variant::Aborting => "amx-aborts",
        }
    }

    fn features(self) -> &'static [&'static str] {
        match self {
            Variant::Without => &[],
            Variant::With => &["--features", "amx"],
            Variant::Aborting => &["--features", "amx-abort"],
        }
    }
}

/// A program that was built for comparing.
#[derive(Clone, Debug)]
pub struct Program(PathBuf);

impl Program {
    /// The isolation probe.
    ///
    /// # Errors
    /// What cargo says.
    pub fn probe(root: &Path, variant: Variant) -> Result<Program, String> {
        let package = ["--package", "phase1-isolation", "--bin", "isolation-probe"];
        build(root, variant, &[&package, variant.features()].concat())
    }

    /// The program that users run; there is none of [`Variant::Aborting`].
    ///
    /// # Errors
    /// What cargo says.
    pub fn tegula(root: &Path, variant: Variant) -> Result<Program, String> {
        let package = ["--package", "tegula", "--bin", "tegula"];
        let features: &[&str] = match variant {
            Variant::Without => &["--no-default-features"],
            Variant::With => &[],
            Variant::Aborting => return Err("tegula has no aborting variant".to_owned()),
        };
        build(root, variant, &[&package, features].concat())
    }

    /// The trials of the GPU's kernels.
    ///
    /// # Errors
    /// What cargo says.
    pub fn checkgpu(root: &Path) -> Result<Program, String> {
        let test = ["--package", "tegula-cuda", "--test", "checkgpu"];
        build(root, Variant::With, &test)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn run(&self, arguments: &[&str]) -> Result<Output, String> {
        Command::new(&self.0)
            .args(arguments)
            .env_remove("TEGULA_ISA")
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("{}: {e}", self.0.display()))
    }

    /// Runs the probe with these arguments behind the model: tier, threads, and how AMX is to
    /// be had, if at all.
    ///
    /// # Errors
    /// When it fails, with what it says.
    pub fn facts(
        &self,
        model: &Path,
        tier: Tier,
        threads: usize,
        amx: Option<&str>,
    ) -> Result<Facts, String> {
        let output = self.run(&probe_arguments(
            &model.to_string_lossy(),
            tier,
            &threads.to_string(),
            amx,
        ))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{}, {tier}: {}", output.status, said.trim()));
        }
        serde_json::from_slice(&output.stdout).map_err(|e| format!("the probe's report: {e}"))
    }
}

/// The probe's command line.
pub fn probe_arguments<'a>(
    model: &'a str,
    tier: Tier,
    threads: &'a str,
    amx: Option<&'a str>,
) -> Vec<&'a str> {
    [model, tier.name(), threads]
        .into_iter()
        .chain(amx)
        .collect()
}

/// Builds a program and puts it where the next variant does not overwrite it. The build
/// directory is the usual one, since most of what is compiled is common.
fn build(root: &Path, variant: Variant, arguments: &[&str]) -> Result<Program, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--quiet", "--message-format", "json"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cargo can't be started: {e}"))?;
    let messages = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cargo build {}: {said}", arguments.join(" ")));
    }
    let executable = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back()
        .ok_or("cargo built no program")?;
    let (Some(dir), Some(name)) = (executable.parent(), executable.file_name()) else {
        return Err(format!("{}: no path of a program", executable.display()));
    };
    let dir = dir.join("isolation").join(variant.name());
    let (temporary, kept) = (dir.join("being-written"), dir.join(name));
    fs::create_dir_all(&dir)
        .and_then(|()| fs::copy(&executable, &temporary))
        .and_then(|_| fs::rename(&temporary, &kept))
        .map_err(|e| format!("{}: {e}", kept.display()))?;
    Ok(Program(kept))
}
