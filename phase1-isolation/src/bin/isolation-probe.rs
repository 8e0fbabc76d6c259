//! The isolation probe as a program: `isolation-probe MODEL TIER THREADS [emulate|silicon]`
//! prints what a run touched as one JSON document. Built three times by the phase's checks:
//! without AMX code, with it, and with AMX code that aborts.
#![forbid(unsafe_code)]

use std::{env, path::Path, process::ExitCode};

use phase1_isolation::probe::{options, run, trap};
use tegula_kernels::Amx;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match probe(&arguments) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("isolation-probe: {why}");
            ExitCode::FAILURE
        }
    }
}

fn probe(arguments: &[String]) -> Result<String, String> {
    let [model, tier, threads, mode @ ..] = arguments else {
        return Err("usage: isolation-probe MODEL TIER THREADS [emulate|silicon]".to_owned());
    };
    let tier = tier.parse().map_err(|e| format!("{e}"))?;
    let threads = threads.parse().map_err(|e| format!("threads: {e}"))?;
    let mode = mode.first().map(String::as_str);
    // On silicon nothing traps: the permission is what is asked for.
    if mode != Some("silicon") {
        trap()?;
    }
    let amx = match mode {
        None => None,
        Some("emulate") => Some(Amx::emulate().map_err(|e| e.to_string())?),
        Some("silicon") => Some(Amx::acquire().map_err(|e| e.to_string())?),
        Some(other) => return Err(format!("`{other}` is neither emulate nor silicon")),
    };
    let seen = run(&options(Path::new(model), tier, amx, threads))?;
    serde_json::to_string(&seen.facts()?).map_err(|e| e.to_string())
}
