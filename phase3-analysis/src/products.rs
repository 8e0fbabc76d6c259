//! The same products each way, on all threads, all ways taking turns.

use crate::{
    data::{Random, SHAPES, Shape, TOKENS, rows},
    series::Product,
};
use std::{hint::black_box, time::Instant};
use tegula_gguf::{Bytes, GgmlType};
use tegula_kernels::{
    Acts, Amx, Compute, PoolConfig, Tier, Weights,
    lab::{Chunks, Inputs, Matrix, TYPES, Way, multiply},
    probe::Caches,
};
use tegula_lab::Series;

/// As records name products on 8-bit tiles whose sums are scaled block by block.
pub const BYTE_TILES: &str = "8-bit tiles";

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    pub types: Vec<GgmlType>,
    pub shapes: Vec<Shape>,
    pub tokens: Vec<usize>,
    pub repetitions: usize,
    pub threads: usize,
    /// Few tokens multiply as many copies of a matrix as have this many bytes together, so
    /// that weights come from memory as they do in a model.
    pub stream: u64,
    pub amx: Option<Amx>,
}

impl Plan {
    /// Everything, on the default number of threads.
    pub fn whole() -> Plan {
        let caches = Caches::detect();
        Plan {
            types: TYPES.to_vec(),
            shapes: SHAPES.to_vec(),
            tokens: TOKENS.to_vec(),
            repetitions: 5,
            threads: tegula_engine::threads::default_threads(),
            stream: (2 * caches.l3).clamp(64 << 20, 1 << 30),
            amx: Amx::acquire().ok(),
        }
    }
}

/// Computes a product into its output.
type RunInto = Box<dyn FnMut(&mut [f32])>;

/// A way with its copies of the matrix.
struct Entry {
    name: String,
    tier: String,
    run: RunInto,
}

/// Milliseconds of every product, all ways in turns; names are [`Product`]s.
///
/// # Errors
/// When data can't be made.
pub fn measure(plan: &Plan) -> Result<Vec<Series>, String> {
    let mut series = Vec::new();
    for &ty in &plan.types {
        for shape in &plan.shapes {
            for &m in &plan.tokens {
                series.extend(one(plan, ty, shape, m)?);
            }
        }
    }
    Ok(series)
}

fn one(plan: &Plan, ty: GgmlType, shape: &Shape, m: usize) -> Result<Vec<Series>, String> {
    let Shape { n, k, .. } = *shape;
    let raw = rows(ty, n, k)?;
    let copies = match m {
        ..=8 => (plan.stream as usize).div_ceil(raw.len()),
        _ => 1,
    };
    let x = Random::new(2).floats(m * k);
    let mut entries = Vec::new();
    for rowwise in [true, false] {
        let kind = match rowwise {
            true => Way::RowWise,
            false => Way::Interleaved,
        };
        let pool = tegula_kernels::Pool::new(PoolConfig::new(plan.threads));
        let matrices: Vec<Matrix> = (0..copies)
            .map(|_| Matrix::new(kind, (ty, n, k), &raw, &pool, true))
            .collect();
        let shared = std::rc::Rc::new((pool, matrices));
        let ways = Way::ALL.into_iter().filter(|w| w.interleaves() != rowwise);
        for way in ways {
            for tier in [Tier::Avx2, Tier::Avx512]
                .into_iter()
                .filter(|t| t.available())
            {
                let (shared, inputs) = (shared.clone(), Inputs::new(way, &x, m, k));
                entries.push(Entry {
                    name: way.name().to_owned(),
                    tier: tier.to_string(),
                    run: Box::new(move |y| {
                        let (pool, matrices) = &*shared;
                        for matrix in matrices {
                            let chunks = Chunks::Dynamic;
                            multiply(way, tier, pool, matrix, &inputs, y, chunks);
                        }
                    }),
                });
            }
        }
    }
    let tiers = [Tier::Avx2, Tier::Avx512]
        .into_iter()
        .filter(|t| t.available());
    let mut tables: Vec<(String, Compute)> = tiers
        .map(|t| {
            (
                t.to_string(),
                Compute::new(t, PoolConfig::new(plan.threads)),
            )
        })
        .collect();
    if let Some(amx) = plan.amx {
        let tier = Tier::detect_max();
        let compute = Compute::with_amx(tier, amx, PoolConfig::new(plan.threads));
        tables.push(("amx".to_owned(), compute));
    }
    let weights: Vec<Weights> = (0..copies)
        .map(|_| {
            let weights = Weights::raw(ty, n, k, 1, Bytes::from(raw.clone()));
            let weights = weights.map_err(|e| e.to_string())?;
            Ok(weights.pack(&tables[0].1.pool))
        })
        .collect::<Result<_, String>>()?;
    let weights = std::rc::Rc::new(weights);
    for (tier, compute) in tables {
        let weights = weights.clone();
        let mut acts = Acts::new();
        compute.prepare(&mut acts, &x, m, k, compute.forms(m, &weights[..1]));
        entries.push(Entry {
            name: "tegula".to_owned(),
            tier,
            run: Box::new(move |y| {
                for w in &*weights {
                    compute.matmul(w, &acts, y);
                }
            }),
        });
    }
    #[cfg(feature = "amx")]
    entries.extend(byte_tiles(plan, (ty, n, k), &raw, &x, m));
    let mut y = vec![0.0; n * m];
    let mut samples = vec![Vec::new(); entries.len()];
    for turn in 0..=plan.repetitions {
        for (entry, samples) in entries.iter_mut().zip(&mut samples) {
            let start = Instant::now();
            (entry.run)(black_box(&mut y));
            let ms = start.elapsed().as_secs_f64() * 1e3 / copies as f64;
            // The first turn warms up.
            if turn > 0 {
                samples.push(ms);
            }
        }
    }
    let bytes = raw.len() as u64;
    let named = entries
        .into_iter()
        .zip(samples)
        .map(|(entry, samples)| Series {
            name: Product {
                ty: ty.to_string(),
                shape: shape.name.to_owned(),
                operations: 2 * (n * k * m) as u64,
                bytes,
                m,
                way: entry.name,
                tier: entry.tier,
            }
            .to_string(),
            unit: "ms".to_owned(),
            samples,
        });
    Ok(named.collect())
}

/// The product on 8-bit tiles, where there are tiles, enough tokens, and codes for them.
#[cfg(feature = "amx")]
fn byte_tiles(
    plan: &Plan,
    (ty, n, k): (GgmlType, usize, usize),
    raw: &[u8],
    x: &[f32],
    m: usize,
) -> Option<Entry> {
    use tegula_kernels::lab::{ByteInputs, ByteMatrix, multiply_bytes};
    let amx = plan.amx.filter(|_| m > 8 && ByteMatrix::takes(ty))?;
    let pool = tegula_kernels::Pool::new(PoolConfig::new(plan.threads));
    let (matrix, inputs) = (ByteMatrix::new((ty, n, k), raw), ByteInputs::new(x, m, k));
    Some(Entry {
        name: BYTE_TILES.to_owned(),
        tier: "amx".to_owned(),
        run: Box::new(move |y| {
            multiply_bytes(amx, &pool, &matrix, &inputs, y);
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_its_samples() {
        let plan = Plan {
            types: vec![GgmlType::Q4_0],
            shapes: vec![Shape {
                name: "small",
                n: 64,
                k: 256,
            }],
            tokens: vec![1, 9],
            repetitions: 2,
            threads: 2,
            stream: 20_000,
            amx: None,
        };
        let series = measure(&plan).unwrap();
        let tiers = [Tier::Avx2, Tier::Avx512]
            .into_iter()
            .filter(|t| t.available());
        assert_eq!(series.len(), 2 * (Way::ALL.len() + 1) * tiers.count());
        for s in series {
            assert_eq!(s.samples.len(), 2);
            let product: Product = s.name.parse().unwrap();
            assert_eq!(product.bytes, 64 * 256 / 32 * 18);
        }
    }
}
