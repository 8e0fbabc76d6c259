//! Tasks 4.1 to 4.6.

use std::{collections::BTreeMap, path::Path};

use tegula_lab::{Check, Env, Need, Outcome, Phase, Table};

use crate::{
    engine, golden,
    matrix::{self, Evidence, ROWS},
    oracle::Activations,
    tiles,
};

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
        tables: vec![Table {
            title: "The matrix of what upstream's AMX does",
            header: &["row", "capability", "upstream", "tegula", "evidence"],
            rows: matrix::table(),
        }],
    }
}

/// Tasks 4.1 to 4.6.
pub fn checks() -> Vec<Check> {
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
            requires: &[Need::Avx2],
            run: |_| every_type().into(),
        },
        Check {
            id: "4.5",
            title: "experts, batched, broadcast, 3-D and over-2-GiB weights are right on AMX",
            requires: &[Need::Avx2],
            run: |_| every_shape().into(),
        },
        Check {
            id: "4.6",
            title: "each of the 22 rows of the parity matrix is a test or a record, with how it is \
                    surpassed or why not",
            requires: &[Need::Avx2],
            run: |env| every_row(env).into(),
        },
    ]
}

/// How products on tiles are executed here.
fn mode() -> Result<(String, String), String> {
    let amx = tiles::compute(1)?.table.amx.ok_or("no AMX")?;
    Ok(("tiles".to_owned(), amx.name().to_owned()))
}

/// Task 4.4.
fn every_type() -> Result<Outcome, String> {
    let distances = tiles::every_type()?;
    let facts = distances
        .into_iter()
        .map(|(ty, d)| (ty, format!("{d:.1e}")));
    let bound = format!("{:.0e}", tiles::PRODUCTS_WITHIN);
    let bound = ("relative L2 distances, at most".to_owned(), bound);
    Ok(Outcome::passed([mode()?, bound].into_iter().chain(facts)))
}

/// Task 4.5.
fn every_shape() -> Result<Outcome, String> {
    Ok(Outcome::passed([
        mode()?,
        ("experts".to_owned(), tiles::experts()?),
        ("batched and broadcast".to_owned(), tiles::attention()?),
        ("3-D, over 2 GiB".to_owned(), tiles::beyond_two_gib()?),
    ]))
}

/// Task 4.6: looks at the evidence of each row, once.
fn every_row(env: &Env) -> Result<Outcome, String> {
    let mut seen: BTreeMap<String, Result<String, String>> = BTreeMap::new();
    let (mut shown, mut absent, mut misses) = (0, Vec::new(), Vec::new());
    for row in &ROWS {
        let mut holds = false;
        for evidence in row.evidence {
            let look = || evidence.look(&env.root);
            match (evidence, seen.entry(evidence.name()).or_insert_with(look)) {
                (Evidence::Not(why), _) => absent.push(format!("{}: {why}", row.number)),
                (_, Ok(_)) => holds = true,
                (_, Err(why)) => misses.push(format!("{}: {why}", row.number)),
            }
        }
        shown += usize::from(holds);
    }
    match misses.is_empty() {
        true => Ok(Outcome::passed([
            mode()?,
            (
                "rows with evidence that holds".to_owned(),
                shown.to_string(),
            ),
            ("absent, by row".to_owned(), absent.join("; ")),
        ])),
        false => Err(misses.join("; ")),
    }
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
