//! Tasks 2.1 to 2.6.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tegula_engine::{ContextOptions, LoadOptions, Model, Source};
use tegula_kernels::{Amx, Features};
use tegula_lab::{Check, Env, Host, Outcome, Record};

use crate::{
    bench::{Options, Test},
    embedded::MODEL,
    matrix::{Engine, Group},
    peers::Peer,
    probe::{Probe, ProbeOptions},
    record::{BenchRecord, BenchRecordError, Row, State},
    report::{self, Pair, best_pairs, page, pairs, summary},
};

/// Tasks 2.1 to 2.6.
pub fn checks() -> Vec<Check> {
    vec![
        Check {
            id: "2.1",
            title: "the matrix runner: warm-up, raw samples, median, p10 and p90; peers \
                    that fail; dirty, emulated and throttled runs are refused, noisy ones \
                    claim nothing",
            requires: &[],
            run: |env| runner(env).into(),
        },
        Check {
            id: "2.2",
            title: "probes of memory and cache bandwidth and of compute peaks, scalar \
                    to AMX",
            requires: &[],
            run: |_| probes().into(),
        },
        Check {
            id: "2.3",
            title: "AMX beats the baseline in every cell of the matrix that the \
                    planner gives to it",
            requires: &[],
            run: |env| amx_wins(env).into(),
        },
        Check {
            id: "2.4",
            title: "GPU and hybrid runs are no slower with `--amx`, and beat the peers",
            requires: &[],
            run: |env| gpus_win(env).into(),
        },
        Check {
            id: "2.5",
            title: "decode and prefill against llama.cpp and ik_llama.cpp, interleaved \
                    in one run",
            requires: &[],
            run: |env| peers_lose(env).into(),
        },
        Check {
            id: "2.6",
            title: "every table of the report is regenerated from records alone",
            requires: &[],
            run: |env| regenerated(env).into(),
        },
    ]
}

/// A peer that is a shell script.
fn script(dir: &Path, label: &str, body: &str) -> Result<Peer, String> {
    let path = dir.join(format!("{label}.sh"));
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).map_err(|e| e.to_string())?;
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&path, mode).map_err(|e| e.to_string())?;
    let peer = format!("{label}={}", path.display());
    peer.parse()
        .map_err(|e: crate::peers::NoPeer| e.to_string())
}

fn ensure(holds: bool, what: &str) -> Result<(), String> {
    match holds {
        true => Ok(()),
        false => Err(what.to_owned()),
    }
}

/// Three turns of the embedded model, a peer that works and two that don't.
fn runner(env: &Env) -> Result<Outcome, String> {
    const TURNS: usize = 3;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let file = env.root.join(MODEL);
    let load = LoadOptions {
        threads: 1,
        ..LoadOptions::new(Source::Path(file.clone()))
    };
    let model = Model::load(&load, &mut |_| {}).map_err(|e| e.to_string())?;
    let engines = [Engine {
        model: Arc::new(model),
        row: Row {
            engine: "tegula".to_owned(),
            threads: 1,
            ..Row::default()
        },
        probe: None,
    }];
    let peers = [
        script(
            dir.path(),
            "llama-bench",
            r#"echo '[{"n_prompt":16,"n_gen":0,"samples_ns":[16000000]},{"n_prompt":0,"n_gen":4,"samples_ns":[4000000]}]'"#,
        )?,
        script(dir.path(), "llama-bench-crash", "kill -SEGV $$")?,
        script(dir.path(), "ik-llama-bench-other", "echo '| model | t/s |'")?,
    ];
    let test = |prompt, generate| Test {
        prompt,
        generate,
        depth: 0,
    };
    let tests = [test(16, 0), test(0, 4)];
    let mut record = BenchRecord::new(
        Record::built("bench", "0000000000", false, Host::default()),
        true,
    );
    let group = Group {
        engines: &engines,
        peers: &peers,
        file: Some(&file),
        tests: &tests,
        options: Options {
            context: ContextOptions::default(),
            repetitions: TURNS,
            warm_up: true,
            profile: false,
        },
        interleave: true,
        timeout: Duration::from_secs(60),
    };
    let never = AtomicBool::new(false);
    group
        .run(&never, &mut |row| record.rows.push(row))
        .map_err(|e| e.to_string())?;
    let (failed, sampled): (Vec<&Row>, Vec<&Row>) =
        record.rows.iter().partition(|row| row.error.is_some());
    ensure(sampled.len() == 4 && failed.len() == 4, "rows are missing")?;
    for row in &sampled {
        let s = &row.summary;
        ensure(row.samples_ns.len() == TURNS, "samples are missing")?;
        ensure(
            s.p10_ts <= s.median_ts && s.median_ts <= s.p90_ts && s.p10_ts > 0.0,
            "percentiles out of order",
        )?;
    }
    let theirs = sampled.iter().filter(|row| row.engine == "llama-bench");
    ensure(
        theirs
            .clone()
            .all(|row| (row.summary.median_ts - 1000.0).abs() < 1e-6),
        "a peer's figures were read wrongly",
    )?;
    ensure(pairs(&record).len() == 2, "pairs are missing")?;
    let why: Vec<&str> = failed
        .iter()
        .filter_map(|row| row.error.as_deref())
        .collect();
    ensure(
        why.iter().any(|w| w.contains("signal: 11"))
            && why.iter().any(|w| w.contains("no llama-bench JSON")),
        "a peer's failure is not told",
    )?;
    // What proves nothing leaves no record, and noise no claim.
    record.state = State::Complete;
    let refused = |change: fn(&mut BenchRecord)| {
        let mut bad = record.clone();
        change(&mut bad);
        let result = bad.write(&dir.path().join("records"));
        ensure(
            matches!(result, Err(BenchRecordError::Refused(_))),
            "a run that proves nothing was recorded",
        )
    };
    refused(|r| r.record.dirty = true)?;
    refused(|r| r.rows[0].isa = "avx512, amx: emulated".to_owned())?;
    refused(|r| r.throttled = Some("throttled".to_owned()))?;
    let mut noisy = record.clone();
    for row in noisy.rows.iter_mut().filter(|row| row.engine == "tegula") {
        row.set_samples(vec![1_000_000, 2_000_000, 4_000_000]);
    }
    let no_claims = pairs(&noisy).iter().all(|p| p.no_claim() == Some("noisy"));
    ensure(no_claims, "a claim was made from noisy samples")?;
    Ok(Outcome::passed([
        ("rows with samples", sampled.len().to_string()),
        ("rows that say why they failed", failed.len().to_string()),
        ("refused", "dirty, emulated, throttled".to_owned()),
    ]))
}

/// Every limit that this machine has, and an order that any machine keeps.
fn probes() -> Result<Outcome, String> {
    let threads = tegula_engine::threads::default_threads();
    let options = ProbeOptions {
        repetitions: 3,
        time: Duration::from_millis(20),
        memory: 256 << 20,
    };
    let amx = Amx::acquire();
    let probe = Probe::run(threads, amx.clone().ok(), &options);
    let giga = |name: &str| {
        let mut rates = probe.compute.iter().chain(&probe.bandwidth);
        rates.find(|r| r.name == name).map(|r| r.median())
    };
    let f = Features::get();
    for (name, there) in [
        ("scalar f32", true),
        ("memory", true),
        ("avx2 f32", f.avx2 && f.fma),
        ("avx2 int8", f.avx2),
        ("avx512 f32", f.avx512f),
        ("avx512 vnni int8", f.avx512vnni),
        ("avx512 bf16", f.avx512bf16),
        ("amx int8", amx.is_ok()),
        ("amx bf16", amx.is_ok()),
    ] {
        if giga(name).is_some_and(|g| g > 0.0) != there {
            return Err(format!(
                "{name}: measured although absent, or the other way round"
            ));
        }
    }
    let scalar = giga("scalar f32").unwrap_or(f64::MAX);
    for wider in ["avx2 f32", "avx512 vnni int8", "amx bf16"] {
        if giga(wider).is_some_and(|g| g < 2.0 * scalar) {
            return Err(format!("{wider} is not twice as fast as scalar code"));
        }
    }
    let rates = probe.bandwidth.iter().chain(&probe.compute);
    let mut facts: Vec<(String, String)> = rates
        .map(|r| (r.name.clone(), format!("{:.0} {}", r.median(), r.unit)))
        .collect();
    facts.push(("threads".to_owned(), threads.to_string()));
    if let Err(why) = amx {
        facts.push(("amx".to_owned(), why.to_string()));
    }
    Ok(Outcome::passed(facts))
}

fn complete(env: &Env) -> Result<Vec<BenchRecord>, String> {
    let records = BenchRecord::read_all(&env.root.join(report::RECORDS));
    let records = records.map_err(|e| e.to_string())?.into_iter().map(|r| r.1);
    Ok(records.filter(|r| r.state == State::Complete).collect())
}

/// The batches of this row run on tiles.
fn given_to_amx(row: &Row) -> bool {
    let together = row.n_prompt.min(row.batch).min(row.ubatch);
    row.gpus.is_empty() && row.n_gen == 0 && row.amx_from.is_some_and(|n| together >= n)
}

/// A pair in the record that it is from, what to call it besides, and the least ratio that is
/// no loss.
type Claim<'a> = (&'a BenchRecord, Pair<'a>, &'static str, f64);

/// Passed if no claim is a loss; what is noisy claims nothing.
fn judge<'a>(claims: impl Iterator<Item = Claim<'a>>, lacks: &str) -> Outcome {
    let mut facts = Vec::new();
    let mut losses = Vec::new();
    for (record, pair, what, least) in claims.filter(|(_, pair, ..)| pair.no_claim().is_none()) {
        let ratio = pair.median();
        let cell = format!(
            "{} {}{what} on {}",
            pair.ours.model, pair.ours.test, record.record.host.cpu
        );
        if ratio < least {
            losses.push(format!("{cell}: {ratio:.2} times {}", pair.theirs.engine));
        }
        facts.push((cell, format!("{ratio:.2}")));
    }
    match (facts.is_empty(), losses.is_empty()) {
        (true, _) => Outcome::blocked(lacks),
        (_, false) => Outcome::failed(losses.join("; ")),
        (_, true) => Outcome::passed(facts),
    }
}

fn amx_wins(env: &Env) -> Result<Outcome, String> {
    let records = complete(env)?;
    let cells = records.iter().flat_map(|record| {
        let own = |pair: &Pair| pair.theirs.engine == "tegula" && given_to_amx(pair.ours);
        pairs(record)
            .into_iter()
            .filter(own)
            .map(move |pair| (record, pair, "", 1.0))
    });
    Ok(judge(
        cells,
        "a record of `tegula bench --amx=off,on --interleave` from a machine with AMX",
    ))
}

fn peers_lose(env: &Env) -> Result<Outcome, String> {
    let records = complete(env)?;
    let against = |record: &&BenchRecord| {
        let has = |peer: &str| {
            let of = |row: &Row| row.engine.starts_with(peer) && !row.samples_ts.is_empty();
            record.rows.iter().any(of)
        };
        let tested = |generate: bool| {
            record
                .rows
                .iter()
                .any(|row| row.engine == "tegula" && (row.n_gen > 0) == generate)
        };
        has("llama-bench") && has("ik-llama-bench") && tested(true) && tested(false)
    };
    let cells = records.iter().filter(against).flat_map(|record| {
        let on_cpu = |pair: &Pair| pair.ours.gpus.is_empty();
        best_pairs(record)
            .into_iter()
            .filter(on_cpu)
            .map(move |pair| (record, pair, "", 1.0))
    });
    Ok(judge(
        cells,
        "a record of `tegula bench` with `--peer llama-bench=…` and `--peer ik-llama-bench=…`",
    ))
}

/// With everything on a GPU `--amx` changes nothing, so that half of the ratios are below 1.
const NO_SLOWER: f64 = 0.97;

/// Rows with weights on GPUs, with `--amx` beside those without it, and beside peers. A record
/// counts if it has both.
fn gpus_win(env: &Env) -> Result<Outcome, String> {
    let records = complete(env)?;
    let mut claims = Vec::new();
    for record in &records {
        let on_gpu = |pair: &Pair| !pair.ours.gpus.is_empty();
        let own = |pair: &Pair| pair.theirs.engine == "tegula" && on_gpu(pair);
        let own: Vec<Pair> = pairs(record).into_iter().filter(own).collect();
        let peers: Vec<Pair> = best_pairs(record).into_iter().filter(on_gpu).collect();
        if !own.is_empty() && !peers.is_empty() {
            claims.extend(
                own.into_iter()
                    .map(|pair| (record, pair, " with --amx", NO_SLOWER)),
            );
            claims.extend(peers.into_iter().map(|pair| (record, pair, "", 1.0)));
        }
    }
    Ok(judge(
        claims.into_iter(),
        "a record of `tegula bench --amx=off,on --interleave --peer llama-bench=…` from a machine \
         with a GPU, with llama.cpp built for it",
    ))
}

/// The pages hold what the records say now, and other records would say something else.
fn regenerated(env: &Env) -> Result<Outcome, String> {
    let read =
        |name: &str| fs::read_to_string(env.root.join(name)).map_err(|e| format!("{name}: {e}"));
    let records = complete(env)?;
    if records.is_empty() {
        return Ok(Outcome::blocked("a record of `tegula bench --record`"));
    }
    ensure(
        read("docs/PHASE_2.md")?.contains(page(&env.root)?.trim()),
        "docs/PHASE_2.md is not what the records say: cargo xtask phase 2 report",
    )?;
    ensure(
        read("README.md")?.contains(summary(&env.root)?.trim()),
        "README.md is not what the records say: cargo xtask phase 2 report",
    )?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let mut other = records[0].clone();
    other.record.dirty = false;
    other.record.commit = "f".repeat(40);
    for row in &mut other.rows {
        row.set_samples(vec![1]);
    }
    let folder = dir.path().join(report::RECORDS).join("other");
    other.write(&folder).map_err(|e| e.to_string())?;
    let text = page(dir.path())?;
    let figure = other
        .rows
        .first()
        .map(|row| format!("{:.2}", row.summary.median_ts));
    ensure(
        figure.is_none_or(|f| text.contains(&f)) && !read("docs/PHASE_2.md")?.contains(text.trim()),
        "the tables don't follow the records",
    )?;
    Ok(Outcome::passed([("records", records.len().to_string())]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::{record, row};

    fn env(dir: &Path, records: &[BenchRecord]) -> Env {
        for (i, record) in records.iter().enumerate() {
            record
                .write(&dir.join(report::RECORDS).join(i.to_string()))
                .unwrap();
        }
        Env {
            root: dir.to_owned(),
            shared: None,
            host: Host::default(),
        }
    }

    fn prompt(engine: &str, isa: &str, speed: f64) -> Row {
        let mut row = row(engine, isa, &[speed, speed, speed]);
        (row.n_prompt, row.n_gen, row.test) = (512, 0, "pp512".to_owned());
        (row.batch, row.ubatch) = (2048, 512);
        row.amx_from = isa.contains("amx").then_some(16);
        row
    }

    #[test]
    fn amx_must_win_where_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let empty = amx_wins(&env(dir.path(), &[])).unwrap();
        assert_eq!(empty.status(), "blocked");
        let mut slow_decode = row("tegula", "avx512, amx", &[1.0, 1.0, 1.0]);
        slow_decode.amx_from = Some(16);
        let rows = |amx| {
            let decode = row("tegula", "avx512", &[2.0, 2.0, 2.0]);
            record(vec![
                prompt("tegula", "avx512", 100.0),
                prompt("tegula", "avx512, amx", amx),
                decode,
                slow_decode.clone(),
            ])
        };
        let wins = amx_wins(&env(dir.path(), &[rows(200.0)])).unwrap();
        assert_eq!(wins, Outcome::passed([("m.gguf pp512 on ", "2.00")]));
        let loses = amx_wins(&env(dir.path(), &[rows(90.0)])).unwrap();
        assert_eq!(loses.detail(), "m.gguf pp512 on : 0.90 times tegula");
    }

    #[test]
    fn both_peers_must_lose_both_tests() {
        let dir = tempfile::tempdir().unwrap();
        let rows = |ik: f64| {
            record(vec![
                prompt("tegula", "avx512", 100.0),
                prompt("llama-bench", "", 50.0),
                prompt("ik-llama-bench", "", ik),
                row("tegula", "avx512", &[20.0, 20.0, 20.0]),
                row("llama-bench", "", &[10.0, 10.0, 10.0]),
            ])
        };
        let mut without = rows(80.0);
        without.rows.remove(2);
        let blocked = peers_lose(&env(dir.path(), &[without])).unwrap();
        assert_eq!(blocked.status(), "blocked");
        let passed = peers_lose(&env(dir.path(), &[rows(80.0)])).unwrap();
        assert_eq!(
            passed.detail(),
            "m.gguf pp512 on : 1.25; m.gguf tg64 on : 2.00"
        );
        let failed = peers_lose(&env(dir.path(), &[rows(125.0)])).unwrap();
        assert_eq!(
            failed.detail(),
            "m.gguf pp512 on : 0.80 times ik-llama-bench"
        );
    }

    #[test]
    fn gpus_are_judged_apart_with_and_without_amx_and_beside_peers() {
        let dir = tempfile::tempdir().unwrap();
        let on_gpu = |mut row: Row| {
            row.gpus = vec!["CUDA0".to_owned()];
            row
        };
        let rows = |amx: f64, peer: f64| {
            record(vec![
                on_gpu(prompt("tegula", "avx512, CUDA0", 1000.0)),
                on_gpu(prompt("tegula", "avx512, amx, CUDA0", amx)),
                on_gpu(prompt("llama-bench", "", peer)),
            ])
        };
        let judged = |record: BenchRecord| {
            let dir = tempfile::tempdir_in(dir.path()).unwrap();
            let env = env(dir.path(), &[record]);
            // Nothing here is a claim about CPUs.
            assert_eq!(amx_wins(&env).unwrap().status(), "blocked");
            assert_eq!(peers_lose(&env).unwrap().status(), "blocked");
            gpus_win(&env).unwrap()
        };
        // A hair slower is noise.
        assert_eq!(
            judged(rows(990.0, 800.0)).detail(),
            "m.gguf pp512 on : 1.25; m.gguf pp512 with --amx on : 0.99"
        );
        assert_eq!(judged(rows(990.0, 800.0)).status(), "passed");
        assert_eq!(
            judged(rows(900.0, 800.0)).detail(),
            "m.gguf pp512 with --amx on : 0.90 times tegula"
        );
        assert_eq!(
            judged(rows(1000.0, 1250.0)).detail(),
            "m.gguf pp512 on : 0.80 times llama-bench"
        );
        let mut alone = rows(1000.0, 800.0);
        alone.rows.pop();
        assert_eq!(judged(alone).status(), "blocked");
        let on_cpu = record(vec![
            prompt("tegula", "avx512", 100.0),
            prompt("tegula", "avx512, amx", 200.0),
            prompt("llama-bench", "", 50.0),
        ]);
        let env = env(&dir.path().join("cpu"), &[on_cpu]);
        assert_eq!(gpus_win(&env).unwrap().status(), "blocked");
    }

    #[test]
    fn pages_that_say_something_else_fail() {
        let dir = tempfile::tempdir().unwrap();
        let env = env(dir.path(), &[record(vec![row("tegula", "avx2", &[1.0])])]);
        let texts = |page: &str, readme: &str| {
            fs::write(dir.path().join("docs/PHASE_2.md"), page).unwrap();
            fs::write(dir.path().join("README.md"), readme).unwrap();
            regenerated(&env)
        };
        let (page, readme) = (page(dir.path()).unwrap(), summary(dir.path()).unwrap());
        assert_eq!(texts(&page, &readme).unwrap().status(), "passed");
        assert!(texts(&page.replace("1.00", "9.00"), &readme).is_err());
        assert!(texts(&page, "nothing").is_err());
    }
}
