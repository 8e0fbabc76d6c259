//! Perplexities with AMX against those without, for every file of the shared models. All are
//! ignored: emulated they take minutes.
//!
//! ```text
//! cargo test -p phase4-parity --test amx_perplexity -- --include-ignored
//! TEGULA_TEST_AMX=silicon cargo test --release -p phase4-parity --test amx_perplexity -- --include-ignored
//! ```
//!
//! On silicon they go over the whole text, and the perplexity must be within 0.2 %. Emulated
//! they go over two windows; what two windows can't tell from chance, twice the standard
//! error, is allowed on top.

use std::{fs, path::PathBuf};

use libtest_mimic::{Arguments, Trial};
use phase4_parity::precision::{PERPLEXITY_WITHIN, with_amx};
use tegula_kernels::{Amx, Tier};

fn main() {
    let shared = std::env::var_os("TEGULA_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")),
        PathBuf::from,
    );
    let models = shared.join("models");
    let silicon = std::env::var("TEGULA_TEST_AMX").as_deref() == Ok("silicon");
    let mut files: Vec<PathBuf> = fs::read_dir(&models)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .collect();
    files.sort();
    let trials = files.into_iter().map(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let text = models.join("heldout.txt");
        Trial::test(format!("perplexity::{name}"), move || {
            if Tier::detect_max() == Tier::Scalar {
                return Err("this CPU has no tier that feeds tiles".into());
            }
            let (amx, windows) = match silicon {
                true => (Amx::acquire()?, 0),
                false => (Amx::emulate()?, 2),
            };
            let apart = with_amx(&file, &fs::read_to_string(text)?, amx, windows)?;
            println!("{}: {apart}", file.display());
            let chance = if silicon { 0.0 } else { 2.0 * apart.error };
            match apart.perplexity.abs() <= PERPLEXITY_WITHIN + chance {
                true => Ok(()),
                false => Err(apart.to_string().into()),
            }
        })
        .with_ignored_flag(true)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}
