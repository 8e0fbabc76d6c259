//! Ideas switched off alone. Those that are ways of the product (interleaving, decoding once,
//! byte activations) are measured with the products; here are the others, each with and
//! without in turns.

use crate::{
    data::{Random, SHAPES, Shape, rows},
    products::Plan,
    series::series,
};
use std::{hint::black_box, time::Duration, time::Instant};
use tegula_gguf::{Bytes, GgmlType};
use tegula_kernels::{
    Acts, Compute, Pool, PoolConfig, Tier, Weights,
    kv::{KV_PAGE, KvCache, KvShape, KvType, PageTable},
    lab::{Chunks, Inputs, Matrix, Way, multiply},
    ops::{
        Attended, Token,
        moe::{MoeScratch, RouteOptions},
    },
};
use tegula_lab::Series;

/// Kind of the series: `ablation|idea|case|with` and `ablation|idea|case|without`.
pub const KIND: &str = "ablation";

/// The ideas that are measured here.
pub const IDEAS: [&str; 5] = [
    "dynamic chunks",
    "threads that spin",
    "huge pages",
    "fused experts",
    "flash attention",
];

/// How large the cases are: whole models' shapes, or as small as can be for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    Whole,
    Tiny,
}

/// Milliseconds with and without each idea, taking turns.
///
/// # Errors
/// When data can't be made.
pub fn measure(plan: &Plan, size: Size) -> Result<Vec<Series>, String> {
    let mut all = chunks(plan, size)?;
    all.extend(spinning(plan));
    all.extend(huge_pages(plan, size)?);
    all.extend(experts(plan, size)?);
    all.extend(attention(plan, size)?);
    Ok(all)
}

/// Times both in turns; the first turn of each warms up.
fn pair<'a>(
    plan: &Plan,
    idea: &str,
    case: &str,
    with: &'a mut (dyn FnMut() + 'a),
    without: &'a mut (dyn FnMut() + 'a),
) -> [Series; 2] {
    let (mut on, mut off) = (Vec::new(), Vec::new());
    for turn in 0..=plan.repetitions {
        for (run, samples) in [(&mut *with, &mut on), (&mut *without, &mut off)] {
            let start = Instant::now();
            run();
            let ms = start.elapsed().as_secs_f64() * 1e3;
            if turn > 0 {
                samples.push(ms);
            }
        }
    }
    [
        series(KIND, &[idea, case, "with"], "ms", on),
        series(KIND, &[idea, case, "without"], "ms", off),
    ]
}

fn shape(size: Size) -> Shape {
    match size {
        Size::Whole => SHAPES[0],
        Size::Tiny => Shape {
            name: "tiny",
            n: 64,
            k: 256,
        },
    }
}

/// 16 rows at a time to whoever comes, or an equal share each.
fn chunks(plan: &Plan, size: Size) -> Result<Vec<Series>, String> {
    let Shape { n, k, name } = shape(size);
    let pool = Pool::new(PoolConfig::new(plan.threads));
    let raw = rows(GgmlType::Q4_0, n, k)?;
    let way = Way::Interleaved;
    let matrix = Matrix::new(way, (GgmlType::Q4_0, n, k), &raw, &pool, true);
    let mut all = Vec::new();
    for m in [8, 64] {
        let inputs = Inputs::new(way, &Random::new(3).floats(m * k), m, k);
        let mut y = vec![0.0; n * m];
        let mut y2 = y.clone();
        let tier = Tier::detect_max();
        let run = |y: &mut Vec<f32>, chunks| {
            multiply(way, tier, &pool, &matrix, &inputs, black_box(y), chunks);
        };
        all.extend(pair(
            plan,
            IDEAS[0],
            &format!("{name}, {m} tokens"),
            &mut || run(&mut y, Chunks::Dynamic),
            &mut || run(&mut y2, Chunks::Static),
        ));
    }
    Ok(all)
}

/// A thousand jobs of one small task per thread, as between a token's products.
fn spinning(plan: &Plan) -> [Series; 2] {
    let spins = Pool::new(PoolConfig::new(plan.threads));
    let sleeps = Pool::new(PoolConfig {
        spin: Duration::ZERO,
        ..PoolConfig::new(plan.threads)
    });
    let run = |pool: &Pool| {
        for _ in 0..1_000 {
            pool.run(pool.threads(), &|task| {
                black_box(task);
            });
        }
    };
    pair(
        plan,
        IDEAS[1],
        "1,000 empty jobs",
        &mut || run(&spins),
        &mut || run(&sleeps),
    )
}

/// A token times matrices that come from memory.
fn huge_pages(plan: &Plan, size: Size) -> Result<Vec<Series>, String> {
    let Shape { n, k, name } = shape(size);
    let way = Way::Interleaved;
    let pool = Pool::new(PoolConfig::new(plan.threads));
    let raw = rows(GgmlType::Q4_0, n, k)?;
    let copies = (plan.stream as usize).div_ceil(raw.len());
    let matrices = |huge| -> Vec<Matrix> {
        let one = |_| Matrix::new(way, (GgmlType::Q4_0, n, k), &raw, &pool, huge);
        (0..copies).map(one).collect()
    };
    let (huge, small) = (matrices(true), matrices(false));
    let inputs = Inputs::new(way, &Random::new(4).floats(k), 1, k);
    let (mut y, mut y2) = (vec![0.0; n], vec![0.0; n]);
    let run = |y: &mut Vec<f32>, matrices: &[Matrix]| {
        for matrix in matrices {
            let tier = Tier::detect_max();
            multiply(way, tier, &pool, matrix, &inputs, y, Chunks::Dynamic);
        }
    };
    Ok(pair(
        plan,
        IDEAS[2],
        &format!("{name}, 1 token, {copies} copies"),
        &mut || run(&mut y, &huge),
        &mut || run(&mut y2, &small),
    )
    .to_vec())
}

/// A layer of experts: all in two dispatches with shared inputs, or product by product and
/// expert by expert.
fn experts(plan: &Plan, size: Size) -> Result<Vec<Series>, String> {
    const TY: GgmlType = GgmlType::Q4_0;
    let (count, used, ff, embd) = match size {
        Size::Whole => (128, 8, 768, 2048),
        Size::Tiny => (4, 2, 64, 256),
    };
    let compute = Compute::new(Tier::detect_max(), PoolConfig::new(plan.threads));
    let stack = |n: usize, k: usize, experts: usize| -> Result<Weights, String> {
        let raw = rows(TY, n, k)?.repeat(experts);
        let weights = Weights::raw(TY, n, k, experts, Bytes::from(raw));
        Ok(weights.map_err(|e| e.to_string())?.pack(&compute.pool))
    };
    let all = [
        stack(ff, embd, count)?,
        stack(ff, embd, count)?,
        stack(embd, ff, count)?,
    ];
    let single: Vec<[Weights; 3]> = (0..count)
        .map(|_| {
            Ok([
                stack(ff, embd, 1)?,
                stack(ff, embd, 1)?,
                stack(embd, ff, 1)?,
            ])
        })
        .collect::<Result<_, String>>()?;
    let mut out = Vec::new();
    for m in [1, 64] {
        let mut random = Random::new(5);
        let x = random.floats(m * embd);
        let options = RouteOptions {
            used,
            normalize: true,
            scale: 1.0,
        };
        let routing = compute.route(&random.floats(m * count), count, &options);
        let (mut fused, mut apart) = (vec![0.0; m * embd], vec![0.0; m * embd]);
        let mut scratch = MoeScratch::default();
        let mut with = || {
            // It adds to what is there.
            fused.fill(0.0);
            let [gate, up, down] = &all;
            compute.moe_ffn(&x, &routing, gate, up, down, &mut scratch, &mut fused);
        };
        let mut one = Acts::new();
        let mut without = || {
            apart.fill(0.0);
            for (expert, [gate, up, down]) in single.iter().enumerate() {
                // The tokens that have chosen this expert, and with what weight.
                let chosen: Vec<(usize, f32)> = routing
                    .ids
                    .iter()
                    .zip(&routing.weights)
                    .enumerate()
                    .filter(|(_, (id, _))| **id as usize == expert)
                    .map(|(i, (_, &weight))| (i / used, weight))
                    .collect();
                let len = chosen.len();
                if len == 0 {
                    continue;
                }
                let rows = chosen
                    .iter()
                    .flat_map(|(t, _)| &x[t * embd..(t + 1) * embd]);
                let rows: Vec<f32> = rows.copied().collect();
                let (mut g, mut u) = (vec![0.0; len * ff], vec![0.0; len * ff]);
                compute.prepare(&mut one, &rows, len, embd, compute.forms(len, [gate, up]));
                compute.matmul(gate, &one, &mut g);
                compute.matmul(up, &one, &mut u);
                let mut h = vec![0.0; len * ff];
                compute.swiglu(&g, &u, &mut h);
                compute.prepare(&mut one, &h, len, ff, compute.forms(len, [down]));
                let mut y = vec![0.0; len * embd];
                compute.matmul(down, &one, &mut y);
                for ((t, weight), y) in chosen.iter().zip(y.chunks_exact(embd)) {
                    for (sum, y) in apart[t * embd..(t + 1) * embd].iter_mut().zip(y) {
                        *sum += weight * y;
                    }
                }
            }
        };
        let case = format!("qwen3-30b-a3b layer, {m} tokens");
        out.extend(pair(plan, IDEAS[3], &case, &mut with, &mut without));
        same(&fused, &apart, 2e-2, IDEAS[3])?;
    }
    Ok(out)
}

/// Both computed the same thing, up to a part of the largest value.
fn same(a: &[f32], b: &[f32], bound: f32, what: &str) -> Result<(), String> {
    let largest = a.iter().fold(1e-6f32, |l, x| l.max(x.abs()));
    let apart = a.iter().zip(b).fold(0f32, |l, (a, b)| l.max((a - b).abs()));
    match apart <= bound * largest {
        true => Ok(()),
        false => Err(format!("{what}: results differ by {apart} of {largest}")),
    }
}

/// Attention of a layer: in one pass with a running softmax, or with all scores written to
/// memory between two products.
fn attention(plan: &Plan, size: Size) -> Result<Vec<Series>, String> {
    const GROUP: usize = 4;
    const DIM: usize = 128;
    let (kv_heads, positions, queries) = match size {
        Size::Whole => (8, 4096, [1, 64]),
        Size::Tiny => (2, 128, [1, 3]),
    };
    let heads = kv_heads * GROUP;
    let compute = Compute::new(Tier::detect_max(), PoolConfig::new(plan.threads));
    let mut random = Random::new(6);
    let keys = random.floats(positions * kv_heads * DIM);
    let values = random.floats(positions * kv_heads * DIM);
    let shape = KvShape {
        layers: 1,
        heads: kv_heads,
        dim: DIM,
        k: KvType::F16,
        v: KvType::F16,
    };
    let mut cache = KvCache::new(shape, positions.div_ceil(KV_PAGE)).map_err(|e| e.to_string())?;
    let mut table = PageTable::default();
    cache
        .extend(&mut table, positions)
        .map_err(|e| e.to_string())?;
    let at = |position| Token {
        sequence: 0,
        position,
    };
    let tokens: Vec<Token> = (0..positions).map(at).collect();
    compute.kv_store(&mut cache, 0, &[&table], &tokens, &keys, &values);
    // Keys as `[positions][DIM]` and values as `[DIM][positions]` of each head, as matrices.
    let matrix = |n: usize, k: usize, value: &dyn Fn(usize, usize) -> f32| {
        let rows = (0..n).flat_map(|r| (0..k).map(move |c| (r, c)));
        let floats: Vec<f32> = rows.map(|(r, c)| value(r, c)).collect();
        let mut raw = vec![0; n * k * 2];
        tegula_gguf::blocks::quantize(GgmlType::F16, &floats, None, &mut raw)
            .map_err(|e| e.to_string())?;
        let weights = Weights::raw(GgmlType::F16, n, k, 1, Bytes::from(raw));
        Ok::<_, String>(weights.map_err(|e| e.to_string())?.pack(&compute.pool))
    };
    let mut matrices = Vec::new();
    for h in 0..kv_heads {
        let of = |rows: &[f32], p: usize, d: usize| rows[(p * kv_heads + h) * DIM + d];
        matrices.push((
            matrix(positions, DIM, &|p, d| of(&keys, p, d))?,
            matrix(DIM, positions, &|d, p| of(&values, p, d))?,
        ));
    }
    let scale = 1.0 / (DIM as f32).sqrt();
    let mut out = Vec::new();
    for m in queries {
        let q = random.floats(m * heads * DIM);
        let tokens = &tokens[positions - m..];
        let (mut flash, mut apart) = (vec![0.0; q.len()], vec![0.0; q.len()]);
        let mut with = || {
            let tables = [&table];
            compute.attention(
                &cache,
                0,
                &tables,
                tokens,
                &q,
                heads,
                scale,
                Attended::Rows(&mut flash),
            );
        };
        let mut acts = Acts::new();
        let rows = m * GROUP;
        let mut scores = vec![0.0; rows * positions];
        let mut result = vec![0.0; rows * DIM];
        let mut without = || {
            for (h, (k, v)) in matrices.iter().enumerate() {
                // The query heads of a KV head are rows of one product.
                let place = |row: usize| ((row / GROUP) * heads + h * GROUP + row % GROUP) * DIM;
                let mut x = Vec::with_capacity(rows * DIM);
                for row in 0..rows {
                    x.extend(q[place(row)..][..DIM].iter().map(|q| q * scale));
                }
                compute.prepare(&mut acts, &x, rows, DIM, compute.forms(rows, [k]));
                compute.matmul(k, &acts, &mut scores);
                for (row, scores) in scores.chunks_exact_mut(positions).enumerate() {
                    let seen = positions - m + row / GROUP + 1;
                    scores[seen..].fill(f32::NEG_INFINITY);
                    compute.softmax(scores);
                }
                compute.prepare(
                    &mut acts,
                    &scores,
                    rows,
                    positions,
                    compute.forms(rows, [v]),
                );
                compute.matmul(v, &acts, &mut result);
                for row in 0..rows {
                    apart[place(row)..][..DIM].copy_from_slice(&result[row * DIM..][..DIM]);
                }
            }
        };
        let case = format!("{heads} heads, {positions} positions, {m} queries");
        out.extend(pair(plan, IDEAS[4], &case, &mut with, &mut without));
        same(&flash, &apart, 2e-2, IDEAS[4])?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::series::parts;

    #[test]
    fn both_sides_of_every_idea_are_measured_and_agree() {
        let plan = Plan {
            types: Vec::new(),
            shapes: Vec::new(),
            tokens: Vec::new(),
            repetitions: 1,
            threads: 2,
            stream: 10_000,
            amx: None,
        };
        let series = measure(&plan, Size::Tiny).unwrap();
        for idea in IDEAS {
            let of = |side: &str| {
                let is = |s: &&Series| {
                    let parts = parts(s, KIND).unwrap();
                    parts[0] == idea && parts[2] == side
                };
                series.iter().filter(is).count()
            };
            assert!(of("with") > 0 && of("with") == of("without"), "{idea}");
        }
    }

    #[test]
    fn other_results_are_an_error() {
        assert!(same(&[1.0, 2.0], &[1.0, 2.01], 0.01, "x").is_ok());
        let error = same(&[1.0, 2.0], &[1.0, 2.5], 0.01, "x").unwrap_err();
        assert_eq!(error, "x: results differ by 0.5 of 2");
    }
}
