//! Tasks 3.1 to 3.6.

use crate::{
    ablations::{IDEAS, Size},
    data::{Random, rows},
    lab,
    products::Plan,
    report::{Times, ablated, page, records},
    series::{Product, parts},
};
use std::fs;
use tegula_gguf::{Bytes, GgmlType};
use tegula_kernels::{
    Acts, Compute, Forms, Pool, PoolConfig, Tier, Weights,
    lab::{Chunks, Inputs, Matrix, TYPES, Way, multiply},
};
use tegula_lab::{Check, Env, Need, Outcome, Record};

/// Tasks 3.1 to 3.6.
pub fn checks() -> Vec<Check> {
    vec![
        Check {
            id: "3.1",
            title: "the row-wise product, upstream's way, equals the scalar definition",
            requires: &[Need::Avx2],
            run: |_| equal(&[Way::RowWise, Way::RowWiseOnce]).into(),
        },
        Check {
            id: "3.2",
            title: "the interleaved product with decode-once strips, IQK's way, equals \
                    the scalar definition",
            requires: &[Need::Avx2],
            run: |_| equal(&[Way::Interleaved, Way::InterleavedEach]).into(),
        },
        Check {
            id: "3.3",
            title: "the three ways are timed on the same shapes in one run",
            requires: &[Need::Avx2],
            run: |env| timed(env).into(),
        },
        Check {
            id: "3.4",
            title: "instruction mix, bytes moved and cache behaviour of each way",
            requires: &[],
            run: |env| explained(env).into(),
        },
        Check {
            id: "3.5",
            title: "ablations: each idea switched off alone",
            requires: &[Need::Avx2],
            run: |env| switched_off(env).into(),
        },
        Check {
            id: "3.6",
            title: "the report answers with figures and is regenerated from records \
                    alone",
            requires: &[],
            run: |env| reported(env).into(),
        },
    ]
}

/// The ways against the scalar tier on the same codes, activations and scales: what is left
/// is the order of sums, for which the bound is a 2⁻¹⁶th of the sum of magnitudes.
fn equal(ways: &[Way]) -> Result<Outcome, String> {
    const BOUND: f64 = 1.0 / 65_536.0;
    let (n, k) = (64, 1024);
    let pool = Pool::new(PoolConfig::new(2));
    let scalar = Compute::new(Tier::Scalar, PoolConfig::new(1));
    let (mut products, mut worst) = (0, 0f64);
    for ty in TYPES {
        let raw = rows(ty, n, k)?;
        let weights = Weights::raw(ty, n, k, 1, Bytes::from(raw.clone()));
        let weights = weights.map_err(|e| e.to_string())?;
        for m in [1, 8, 64] {
            let x = Random::new(8).floats(m * k);
            let mut acts = Acts::new();
            scalar.prepare(&mut acts, &x, m, k, Forms::Q8);
            let mut want = vec![0.0; m * n];
            scalar.matmul(&weights, &acts, &mut want);
            let mut plain = vec![0.0; n * k];
            tegula_gguf::blocks::dequantize(ty, &raw, &mut plain).map_err(|e| e.to_string())?;
            for &way in ways {
                let matrix = Matrix::new(way, (ty, n, k), &raw, &pool, true);
                let inputs = Inputs::new(way, &x, m, k);
                for tier in [Tier::Avx2, Tier::Avx512]
                    .into_iter()
                    .filter(|t| t.available())
                {
                    let mut y = vec![f32::NAN; m * n];
                    multiply(way, tier, &pool, &matrix, &inputs, &mut y, Chunks::Dynamic);
                    for (i, (&y, &want)) in y.iter().zip(&want).enumerate() {
                        let (t, r) = (i / n, i % n);
                        let terms = x[t * k..][..k].iter().zip(&plain[r * k..][..k]);
                        let size: f64 = terms.map(|(a, b)| f64::from((a * b).abs())).sum();
                        let error = f64::from((y - want).abs()) / size.max(1e-30);
                        if error.is_nan() || error > BOUND {
                            return Err(format!(
                                "{} of {ty} at {tier}, {m} tokens: {y} where scalar has {want}",
                                way.name()
                            ));
                        }
                        worst = worst.max(error);
                        products += 1;
                    }
                }
            }
        }
    }
    Ok(Outcome::passed([
        ("values", products.to_string()),
        (
            "largest difference, of the terms' magnitude",
            format!("{worst:.1e}"),
        ),
    ]))
}

/// The newest record of the laboratory, clean and of this schema.
fn newest(env: &Env) -> Result<Option<Record>, String> {
    let mut all = records(&env.root)?;
    all.retain(|record| !record.dirty);
    all.sort_by(|a, b| a.date.cmp(&b.date));
    Ok(all.pop())
}

const LACKS: &str = "a record of the laboratory (`phase 3 bench` of a release build)";

fn timed(env: &Env) -> Result<Outcome, String> {
    let Some(record) = newest(env)? else {
        return Ok(Outcome::blocked(LACKS));
    };
    let plan = Plan::whole();
    let mut missing = Vec::new();
    let products: Vec<Product> = record
        .series
        .iter()
        .filter_map(|s| s.name.parse().ok())
        .collect();
    for ty in &plan.types {
        for shape in &plan.shapes {
            for &m in &plan.tokens {
                for way in ["row-wise", "interleaved", "tegula"] {
                    let there = products.iter().any(|p| {
                        p.way == way && p.ty == ty.to_string() && p.shape == shape.name && p.m == m
                    });
                    if !there {
                        missing.push(format!("{way} {ty} {} M={m}", shape.name));
                    }
                }
            }
        }
    }
    if !missing.is_empty() {
        return Err(format!("not timed: {}", missing.join(", ")));
    }
    let times = Times::of(&record);
    let mut facts = vec![("machine".to_owned(), record.host.cpu.clone())];
    for m in plan.tokens {
        let gain = times.gain(("interleaved", "avx2"), ("row-wise", "avx2"), m, None);
        if let Some(gain) = gain {
            facts.push((
                format!("interleaved over row-wise, M={m}"),
                gain.to_string(),
            ));
        }
    }
    Ok(Outcome::passed(facts))
}

/// The loops of the recorded build consist of what their ways promise, and the model of the
/// caches agrees with it.
fn explained(env: &Env) -> Result<Outcome, String> {
    let Some(record) = newest(env)? else {
        return Ok(Outcome::blocked(LACKS));
    };
    let series = &record.series;
    let count = |ty: GgmlType, way: Way, tier: &str, kind: &str| -> f64 {
        let matches = |p: Vec<&str>| {
            p[0] == ty.to_string() && p[1] == way.name() && p[2] == tier && p[4] == kind
        };
        let found = series
            .iter()
            .find(|s| parts(s, lab::CODE).is_some_and(matches));
        found.map_or(0.0, tegula_lab::Series::median)
    };
    let mut facts = Vec::new();
    for ty in TYPES {
        for tier in [Tier::Avx2, Tier::Avx512]
            .into_iter()
            .filter(|t| t.available())
        {
            let tier = tier.name();
            let per_token = |way: Way, kind: &str| count(ty, way, tier, kind) / way.tokens() as f64;
            let decode = |way| per_token(way, "decode");
            if count(ty, Way::RowWise, tier, "multiply") == 0.0 {
                // The machine lacks the tier.
                continue;
            }
            // The bytes of Q8_0 are its codes: what it has of such instructions are moves.
            let decodes = ty != GgmlType::Q8_0;
            if decodes && decode(Way::Interleaved) >= decode(Way::InterleavedEach) {
                return Err(format!(
                    "{ty} {tier}: decoding once decodes as much for each token"
                ));
            }
            facts.push((
                format!("{ty} {tier}, decoding instructions per token"),
                format!(
                    "{:.0} each time, {:.0} once",
                    decode(Way::InterleavedEach),
                    decode(Way::Interleaved)
                ),
            ));
        }
    }
    if facts.is_empty() {
        return Err("the record has no instructions".to_owned());
    }
    let reads = |way: &str| {
        let is = |p: Vec<&str>| p == [way, "64", "reads"];
        let found = series
            .iter()
            .find(|s| parts(s, lab::TRAFFIC).is_some_and(is));
        found.map_or(0.0, tegula_lab::Series::median)
    };
    if reads(Way::Interleaved.name()) >= reads(Way::RowWise.name()) {
        return Err("the model has interleaved rows read as much as single ones".to_owned());
    }
    facts.push((
        "lines read per 1,000 multiplications, 64 tokens".to_owned(),
        format!(
            "row-wise {:.2}, interleaved {:.2}, tegula {:.2}",
            reads(Way::RowWise.name()),
            reads(Way::Interleaved.name()),
            reads("tegula")
        ),
    ));
    Ok(Outcome::passed(facts))
}

/// Both sides of every idea compute the same now, and a record says what each is worth.
fn switched_off(env: &Env) -> Result<Outcome, String> {
    let tiny = Plan {
        types: Vec::new(),
        shapes: Vec::new(),
        repetitions: 1,
        threads: 2,
        stream: 10_000,
        ..Plan::whole()
    };
    crate::ablations::measure(&tiny, Size::Tiny)?;
    let Some(record) = newest(env)? else {
        return Ok(Outcome::blocked(LACKS));
    };
    let cases = ablated(&record);
    let mut facts = Vec::new();
    for idea in IDEAS {
        let of: Vec<_> = cases.iter().filter(|c| c.0 == idea).collect();
        if of.is_empty() {
            return Err(format!("the record has nothing of {idea}"));
        }
        for (_, case, with, without) in of {
            facts.push((format!("{idea}, {case}"), format!("{:.2}", without / with)));
        }
    }
    let times = Times::of(&record);
    for (idea, ours, theirs) in [
        ("interleaving", "interleaved", "row-wise, decoded once"),
        (
            "decoding once",
            "interleaved",
            "interleaved, decoded each time",
        ),
        (
            "byte activations",
            "interleaved",
            "interleaved, f32 activations",
        ),
    ] {
        let gain = times.gain((ours, "avx2"), (theirs, "avx2"), 64, None);
        let gain = gain.ok_or_else(|| format!("the record has nothing of {idea}"))?;
        facts.push((format!("{idea}, 64 tokens"), gain.to_string()));
    }
    Ok(Outcome::passed(facts))
}

fn reported(env: &Env) -> Result<Outcome, String> {
    let records = records(&env.root)?;
    if records.is_empty() {
        return Ok(Outcome::blocked(LACKS));
    }
    let path = env.root.join("docs/PHASE_3.md");
    let text = fs::read_to_string(&path).map_err(|e| format!("docs/PHASE_3.md: {e}"))?;
    match text.contains(page(&env.root)?.trim()) {
        true => Ok(Outcome::passed([("records", records.len().to_string())])),
        false => {
            Err("docs/PHASE_3.md is not what the records say: cargo xtask phase 3 report".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{RECORDS, tests::record};
    use tegula_lab::Host;

    #[test]
    fn without_records_nothing_is_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let env = Env {
            root: dir.path().to_owned(),
            shared: None,
            host: Host::default(),
        };
        assert_eq!(timed(&env).unwrap().status(), "blocked");
        assert_eq!(switched_off(&env).unwrap().status(), "blocked");
        assert_eq!(explained(&env).unwrap().status(), "blocked");
        assert_eq!(reported(&env).unwrap().status(), "blocked");
        // A record that lacks most of it is a failure, not a claim.
        let path = dir.path().join(RECORDS).join("host/phase-3.json");
        record().write(&path).unwrap();
        assert!(timed(&env).unwrap_err().starts_with("not timed: "));
        assert!(
            switched_off(&env)
                .unwrap_err()
                .contains("nothing of dynamic chunks")
        );
        fs::write(dir.path().join("docs/PHASE_3.md"), "old").unwrap();
        assert!(reported(&env).unwrap_err().contains("PHASE_3.md"));
        fs::write(
            dir.path().join("docs/PHASE_3.md"),
            page(dir.path()).unwrap(),
        )
        .unwrap();
        assert_eq!(reported(&env).unwrap().status(), "passed");
    }

    #[test]
    fn ways_are_equal() {
        if !Tier::Avx2.available() {
            return;
        }
        for ways in [
            [Way::RowWise, Way::RowWiseOnce],
            [Way::Interleaved, Way::InterleavedEach],
        ] {
            assert_eq!(equal(&ways).unwrap().status(), "passed");
        }
    }
}
