//! The oracle against golden results. Ignored, by name, where the shared models are absent.

use std::path::PathBuf;

use libtest_mimic::{Arguments, Failed, Trial};
use phase4_parity::{golden, oracle::Activations};

fn main() {
    let shared = std::env::var_os("TEGULA_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")),
        PathBuf::from,
    );
    let models = shared.join("models");
    let absent = !models.join("golden.json").is_file();
    let mut trials = Vec::new();
    for model in ["ferrous-7m", "ferrous-moe-21m"] {
        let dir = models.clone();
        trials.push(Trial::test(format!("continuations::{model}"), move || {
            let golden = &golden::read(&dir)?[model];
            golden::continuations(&dir, model, golden)?;
            Ok(())
        }));
        // A few windows of a quantised file must come out near the same windows of the bf16
        // file; whole figures are the business of check 4.2.
        let dir = models.clone();
        trials.push(Trial::test(format!("perplexity::{model}"), move || {
            let ppl = |ty: &str, activations| {
                golden::perplexity(&dir, &format!("{model}-{ty}.gguf"), activations, 2)
            };
            let whole = ppl("bf16", Activations::Exact)?;
            let q4 = ppl("Q4_K_M", Activations::Exact)?;
            let rounded = ppl("Q4_K_M", Activations::EightBits)?;
            if rounded == q4 || !(0.98..1.02).contains(&(rounded / q4)) {
                return Err(format!("Q4_K_M {q4}, activations rounded {rounded}").into());
            }
            match (0.98..1.12).contains(&(q4 / whole)) {
                true => Ok(()),
                false => Err(Failed::from(format!("Q4_K_M {q4}, bf16 {whole}"))),
            }
        }));
    }
    let trials = trials.into_iter().map(|t| t.with_ignored_flag(absent));
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}
