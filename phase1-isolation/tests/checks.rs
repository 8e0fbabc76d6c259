//! The checks that take seconds, in every test run. Those that build programs of their own
//! are ignored by name; `cargo xtask phase 1 verify` runs them, and `--include-ignored`.

use std::path::Path;

use libtest_mimic::{Arguments, Trial};
use tegula_lab::{Env, Outcome, lacking, verify};

/// Checks that build programs.
const BUILD: [&str; 3] = ["1.1", "1.4", "gpu.3"];

fn main() {
    let env = Env::detect(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let mut arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for check in [phase1_isolation::checks(), phase1_isolation::gpu_checks()].concat() {
        let missing = lacking(check.requires, &env);
        let lacks = !missing.is_empty();
        if lacks && arguments.include_ignored {
            // Nothing makes it run here.
            println!("{}: waits for {}", check.id, missing.join("; "));
            continue;
        }
        let (env, builds) = (env.clone(), BUILD.contains(&check.id));
        let name = match builds {
            true => format!("{} (builds programs)", check.id),
            false => check.id.to_owned(),
        };
        let trial = Trial::test(name, move || match verify(&check, &env).outcome {
            Outcome::Passed { .. } => Ok(()),
            other => Err(other.detail().into()),
        });
        trials.push(trial.with_ignored_flag(lacks || builds));
    }
    // Instructions are counted for the whole process.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials).exit();
}
