//! Attention over a long context: pruned pages beside dense ones.

use std::hint::black_box;

use tegula_gguf::{GgmlType, fuzz::driver::Random};
use tegula_kernels::{
    Compute, PoolConfig, Tier,
    kv::{KV_PAGE, KvCache, KvShape, KvType, PageTable, pruned::KvSparsity},
    ops::{Attended, Token},
};
use tegula_lab::{Env, Series};

use super::{Name, Plan, float, turns};

/// The shares of K and V that are dropped.
const SHARES: [(f32, f32); 3] = [(0.3, 0.5), (0.5, 0.5), (0.5, 0.7)];

/// Positions that are stored together.
const STEP: usize = 512;

/// Query heads per KV head, of Llama-3-8B.
const GROUP: usize = 4;

/// Takes the measurements.
///
/// # Errors
/// When a cache can't be made.
pub fn run(_: &Env) -> Result<Vec<Series>, String> {
    measure(&Plan::whole(), 8, 16384)
}

/// Measures one token's attention to `positions`, at the geometry of Llama-3-8B's layers but
/// with `heads` KV heads; as many layers as fill a set.
///
/// # Errors
/// When a cache can't be made.
pub fn measure(plan: &Plan, heads: usize, positions: usize) -> Result<Vec<Series>, String> {
    let compute = Compute::new(Tier::detect_max(), PoolConfig::new(plan.threads));
    let one = KvShape {
        layers: 1,
        heads,
        dim: 128,
        k: KvType::F16,
        v: KvType::F16,
    };
    let pages = positions.div_ceil(KV_PAGE);
    let shape = KvShape {
        layers: plan.set.div_ceil(one.bytes(pages)),
        ..one
    };
    // The last page is not full: its dense values are there.
    let filled = positions - 1;
    let dense = KvCache::new(shape, pages).map_err(|e| e.to_string())?;
    let dense = fill(&compute, dense, filled);
    let mut all = Vec::new();
    for (k, v) in SHARES {
        let sparsity = KvSparsity::new(k, v).ok_or("shares are below 1")?;
        let spare = STEP / KV_PAGE + 2;
        let sparse = KvCache::pruned(shape, sparsity, pages, spare).map_err(|e| e.to_string())?;
        let sparse = fill(&compute, sparse, filled);
        let sides = [&dense, &sparse];
        let token = Token {
            sequence: 0,
            position: filled - 1,
        };
        let mut random = Random::new(3);
        let row = heads * GROUP * shape.dim;
        let q: Vec<f32> = (0..row).map(|_| float(&mut random)).collect();
        let mut out = vec![0.0; row];
        let samples = turns(plan, |side| {
            let (cache, table) = sides[side];
            for layer in 0..shape.layers {
                let (heads, scale) = (heads * GROUP, 1.0 / (shape.dim as f32).sqrt());
                let out = black_box(&mut out);
                compute.attention(
                    cache,
                    layer,
                    &[table],
                    &[token],
                    &q,
                    heads,
                    scale,
                    Attended::Rows(out),
                );
            }
            shape.layers
        });
        let bytes = [
            one.bytes(pages),
            one.pruned_bytes(sparsity, pages)
                .map_err(|e| e.to_string())?,
        ];
        let sides = ["dense", "sparse"].into_iter().zip(bytes);
        all.extend(sides.zip(samples).map(|((side, bytes), samples)| {
            let percent = |x: f32| (100.0 * x).round() as u32;
            let name = Name {
                kind: "attention".into(),
                ty: GgmlType::F16,
                percent: percent((k + v) / 2.0),
                shape: format!(
                    "{positions} positions, K {} % and V {} %",
                    percent(k),
                    percent(v)
                ),
                m: 1,
                kernels: compute.table.tier.to_string(),
                side: side.to_owned(),
                bytes: bytes as u64,
            };
            name.timed(samples)
        }));
    }
    Ok(all)
}

/// Stores so many positions in all layers, as the engine does.
fn fill(compute: &Compute, mut cache: KvCache, positions: usize) -> (KvCache, PageTable) {
    let (layers, row) = (
        cache.shape().layers,
        cache.shape().heads * cache.shape().dim,
    );
    let mut random = Random::new(5);
    let mut floats = || -> Vec<f32> { (0..STEP * row).map(|_| float(&mut random)).collect() };
    let (k, v) = (floats(), floats());
    let mut table = PageTable::default();
    for first in (0..positions).step_by(STEP) {
        let count = STEP.min(positions - first);
        if cache.extend(&mut table, count).is_err() {
            // It was made for as many.
            break;
        }
        let token = |position| Token {
            sequence: 0,
            position,
        };
        let tokens: Vec<Token> = (first..first + count).map(token).collect();
        let part = ..count * row;
        for layer in 0..layers {
            compute.kv_store(&mut cache, layer, &[&table], &tokens, &k[part], &v[part]);
        }
        cache.settle(&mut table);
    }
    (cache, table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn both_caches_are_measured() {
        let plan = Plan {
            set: 1,
            turns: 1,
            time: Duration::ZERO,
            threads: 2,
        };
        let series = measure(&plan, 1, 700).unwrap();
        let gains = crate::report::gains(&series);
        assert_eq!(gains.len(), SHARES.len());
        for (gain, (k, v)) in gains.iter().zip(SHARES) {
            // A bit for each value beside 16 for those that are kept.
            let bytes = 1.0 - f64::from(k + v) / 2.0 + 1.0 / 16.0;
            let share = gain.name.bytes as f64 / gain.dense_bytes as f64;
            assert!((share - bytes).abs() < 0.02, "{share} {bytes}");
        }
    }
}
