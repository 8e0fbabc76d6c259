//! A phase's checks, measurements and page.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use tegula_lab::{Check, Env, Outcome, Phase, Record, lacking};

use crate::docs;

/// Where `phase N bench` leaves its records, one directory per machine.
const BENCH: &str = "docs/bench";

/// The phases in order.
pub fn all() -> Vec<Phase> {
    vec![
        phase1_isolation::phase(),
        phase2_perf::phase(),
        phase3_analysis::phase(),
        phase4_parity::phase(),
        phase5_sparamx::phase(),
    ]
}

/// What the measurements of a phase add to its page, if this is one.
pub fn measurements(page: &str, root: &Path) -> Option<Result<String, String>> {
    match page {
        "PHASE_2.md" => Some(phase2_perf::report::page(root)),
        "PHASE_3.md" => Some(phase3_analysis::report::page(root)),
        "PHASE_5.md" => Some(phase5_sparamx::report::page(root)),
        _ => None,
    }
}

/// What stands above all else on a phase's page, if this is one that has such a line.
pub fn headline(page: &str, root: &Path) -> Option<Result<String, String>> {
    match page {
        "PHASE_5.md" => phase5_sparamx::quality::headline(root).transpose(),
        _ => None,
    }
}

/// The phase of this number.
pub fn numbered(number: u8) -> Result<Phase> {
    let found = all().into_iter().find(|p| p.number == number);
    found.with_context(|| format!("there is no phase {number}"))
}

/// Runs the phase's checks, records how they end, and brings the pages up to date; or runs
/// `only` some and leaves no trace. Fails if a check fails; a blocked one is no failure.
pub fn verify(root: &Path, phase: &Phase, only: &[String]) -> Result<ExitCode> {
    let mut record = Record::new(&subject(phase), root, Env::detect(root).host);
    println!("phase {}: {}", phase.number, phase.title);
    let ended = run_checks(root, &phase.checks, only, &mut record)?;
    if only.is_empty() {
        save(&record, root, docs::RESULTS)?;
        docs::write(root)?;
    }
    Ok(ended)
}

/// Runs what only a machine with a GPU can show, and records how it ends unless everything is
/// blocked.
pub fn gpu(root: &Path, only: &[String]) -> Result<ExitCode> {
    let mut record = Record::new("gpu", root, Env::detect(root).host);
    let ended = run_checks(root, &phase1_isolation::gpu_checks(), only, &mut record)?;
    let blocked = |r: &tegula_lab::CheckResult| matches!(r.outcome, Outcome::Blocked { .. });
    if !record.checks.iter().all(blocked) {
        save(&record, root, BENCH)?;
    }
    Ok(ended)
}

/// Runs `checks`, or `only` some, and notes how they end.
fn run_checks(
    root: &Path,
    checks: &[Check],
    only: &[String],
    record: &mut Record,
) -> Result<ExitCode> {
    for id in only {
        if checks.iter().all(|c| c.id != id) {
            bail!("there is no check {id} among these");
        }
    }
    let env = Env::detect(root);
    let chosen = |c: &&Check| only.is_empty() || only.iter().any(|id| c.id == id);
    for check in checks.iter().filter(chosen) {
        let result = tegula_lab::verify(check, &env);
        println!(
            "{:<6}{:<9}{}\n      {}",
            check.id,
            result.outcome.status(),
            check.title,
            result.outcome.detail()
        );
        record.checks.push(result);
    }
    let count = |status| {
        let of = |r: &&tegula_lab::CheckResult| r.outcome.status() == status;
        record.checks.iter().filter(of).count()
    };
    let failed = count("failed");
    println!(
        "{} passed, {failed} failed, {} blocked",
        count("passed"),
        count("blocked")
    );
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Takes the phase's measurements and records their samples.
pub fn bench(root: &Path, phase: &Phase) -> Result<ExitCode> {
    if phase.benches.is_empty() {
        bail!("phase {} has no measurement yet", phase.number);
    }
    if cfg!(debug_assertions) {
        bail!(
            "measurements need the release build: cargo run --release -p xtask -- phase {} bench",
            phase.number
        );
    }
    let env = Env::detect(root);
    let mut record = Record::new(&subject(phase), root, env.host.clone());
    if record.dirty {
        bail!("there are changes that are not committed: nobody could measure the same again");
    }
    let mut all_taken = true;
    for bench in &phase.benches {
        let lacks = lacking(bench.requires, &env);
        if !lacks.is_empty() {
            println!("{}: {}", bench.title, Outcome::Blocked { lacks }.detail());
            continue;
        }
        println!("{}:", bench.title);
        match (bench.run)(&env) {
            Ok(series) => {
                for s in &series {
                    println!("  {}: {:.2} {}", s.name, s.median(), s.unit);
                }
                record.series.extend(series);
            }
            Err(why) => {
                println!("  failed: {why}");
                all_taken = false;
            }
        }
    }
    if !record.series.is_empty() {
        save(&record, root, BENCH)?;
    }
    Ok(match all_taken {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Brings the pages up to date and prints the phase's.
pub fn report(root: &Path, phase: &Phase) -> Result<ExitCode> {
    docs::write(root)?;
    let name = format!("docs/PHASE_{}.md", phase.number);
    let mut pages = docs::pages(root)?;
    println!("{}", pages.remove(&name).with_context(|| name)?);
    Ok(ExitCode::SUCCESS)
}

fn subject(phase: &Phase) -> String {
    format!("phase-{}", phase.number)
}

fn save(record: &Record, root: &Path, dir: &str) -> Result<()> {
    let name = format!("{dir}/{}/{}.json", record.host.slug(), record.subject);
    record.write(&root.join(&name))?;
    println!("recorded in {name}");
    Ok(())
}
