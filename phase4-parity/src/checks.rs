//! Tasks 4.1 to 4.6.

use std::path::Path;

use tegula_lab::{Check, Env, Need, Outcome, Phase, unbuilt};

use crate::{engine, golden, oracle::Activations};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 4,
        title: "Parity",
        goal: "Whatever upstream's AMX can do, Tegula can do, and every row of that list is a \
               test; results are held against a plain f32 reference engine that is itself \
               held against results from elsewhere.",
        checks: checks(),
        benches: Vec::new(),
    }
}

/// Tasks 4.1 to 4.6.
pub fn checks() -> Vec<Check> {
    const AMX: Need = Need::Unbuilt("the matrix of what upstream's AMX does, run on tiles");
    vec![
        Check {
            id: "4.1",
            title: "the oracle continues prompts as the transformers library does: token ids and \
                    greedy text equal, logits within 1e-3",
            requires: &[Need::Shared],
            run: |env| run(env, oracle_continues),
        },
        Check {
            id: "4.2",
            title: "the oracle's perplexity of every given file, activations rounded as llama.cpp \
                    rounds them, is within 0.5 % of llama.cpp's",
            requires: &[Need::Shared],
            run: |env| run(env, oracle_perplexities),
        },
        Check {
            id: "4.3",
            title: "the engine agrees with the oracle at every tier that the CPU has: logits, top-k, \
                    KL, perplexity",
            requires: &[Need::Shared],
            run: |env| run(env, engine::agrees),
        },
        Check {
            id: "4.4",
            title: "every type that upstream's AMX multiplies, and those it does not, run on AMX \
                    with stated errors",
            requires: &[AMX],
            run: unbuilt,
        },
        Check {
            id: "4.5",
            title: "experts, batched, broadcast, 3-D and over-2-GiB weights are right on AMX",
            requires: &[AMX],
            run: unbuilt,
        },
        Check {
            id: "4.6",
            title: "each of the 22 rows of the parity matrix is a test or a record, with how it is \
                    surpassed or why not",
            requires: &[AMX],
            run: unbuilt,
        },
    ]
}

fn run(env: &Env, check: fn(&Path) -> Result<Outcome, String>) -> Outcome {
    match &env.shared {
        Some(shared) => check(&shared.join("models")).into(),
        None => Outcome::blocked("the shared models"),
    }
}

fn oracle_continues(models: &Path) -> Result<Outcome, String> {
    let mut facts = Vec::new();
    for (model, golden) in golden::read(models)? {
        let worst = golden::continuations(models, &model, &golden)?;
        let prompts = golden.prompts.len();
        facts.push((
            model,
            format!("{prompts} prompts, logits {worst:.1e} apart"),
        ));
    }
    match facts.is_empty() {
        true => Err("golden.json names no model".to_owned()),
        false => Ok(Outcome::passed(facts)),
    }
}

fn oracle_perplexities(models: &Path) -> Result<Outcome, String> {
    let mut facts = Vec::new();
    let mut misses = Vec::new();
    for (model, golden) in golden::read(models)? {
        for (ty, &want) in &golden.perplexity.ppl {
            let file = golden::file(&model, ty);
            // There are figures for files that are not given.
            if !models.join(&file).is_file() {
                continue;
            }
            let ppl = golden::perplexity(models, &file, Activations::EightBits, golden::CHUNKS)?;
            let text = format!("{ppl:.4} (llama.cpp {want:.4})");
            if (ppl / want - 1.0).abs() > golden::PERPLEXITY_WITHIN || ppl.is_nan() {
                misses.push(format!("{file}: {text}"));
            }
            facts.push((file, text));
        }
    }
    match (misses.is_empty(), facts.is_empty()) {
        (true, false) => Ok(Outcome::passed(facts)),
        (true, true) => Err("no file has a figure".to_owned()),
        (false, _) => Err(misses.join("; ")),
    }
}
