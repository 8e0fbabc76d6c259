//! The PTX of the GPU kernels, made ahead so that no build needs CUDA.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, anyhow};
use tegula_cuda::{UNITS, Unit};

/// The oldest architecture that the kernels run on; drivers translate for newer ones.
const ARCH: &str = "compute_80";

fn file(root: &Path, unit: Unit) -> PathBuf {
    root.join("crates/cuda/ptx")
        .join(format!("{}.ptx.z", unit.name()))
}

/// Compiles every unit whose sources are not those of its PTX, and removes what is no unit's.
pub fn write(root: &Path) -> Result<()> {
    let mut made = 0;
    for unit in UNITS {
        if stale(*unit).is_none() {
            continue;
        }
        let ptx = unit.compile(ARCH).map_err(|why| {
            anyhow!(
                "{}: {why}; NVRTC comes with the CUDA toolkit, and its directory must be where \
                 the system looks for libraries (LD_LIBRARY_PATH)",
                unit.name()
            )
        })?;
        let path = file(root, *unit);
        fs::write(&path, unit.packed(&ptx)).with_context(|| path.display().to_string())?;
        made += 1;
    }
    let units: BTreeSet<PathBuf> = UNITS.iter().map(|unit| file(root, *unit)).collect();
    for entry in fs::read_dir(root.join("crates/cuda/ptx"))? {
        let path = entry?.path();
        if !units.contains(&path) {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    println!(
        "{made} of {} units compiled, the others are up to date",
        UNITS.len()
    );
    Ok(())
}

/// Prints which units' PTX was made from other sources.
pub fn check() -> ExitCode {
    let stale: Vec<String> = UNITS.iter().filter_map(|unit| stale(*unit)).collect();
    for line in &stale {
        eprintln!("{line}");
    }
    match stale.is_empty() {
        true => ExitCode::SUCCESS,
        false => {
            eprintln!("run `cargo xtask ptx` where CUDA is installed");
            ExitCode::FAILURE
        }
    }
}

/// Why a unit's PTX, as this program has it, does not suit its sources.
fn stale(unit: Unit) -> Option<String> {
    match unit.shipped() {
        Ok(ptx) if ptx.starts_with(&unit.stamp()) => None,
        Ok(_) => Some(format!("{}: made from other sources", unit.name())),
        Err(why) => Some(format!("{}: {why}", unit.name())),
    }
}
