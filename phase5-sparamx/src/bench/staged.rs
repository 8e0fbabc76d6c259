//! Register kernels beside SparAMX's staged algorithm.

use std::hint::black_box;

use tegula_gguf::{Bytes, GgmlType, fuzz::driver::Random, sparse::pack_tensor};
use tegula_kernels::{
    Acts, Amx, Compute, PoolConfig, Tier, Weights,
    lab::{StagedInputs, StagedMatrix, StagedType, multiply_staged},
};
use tegula_lab::{Env, Series};

use super::{Name, Plan, copies, dense_rows, float, turns};

/// Tokens of a product.
const BATCHES: [usize; 2] = [1, 4];

/// Takes the measurements.
///
/// # Errors
/// When weights can't be made, or AMX not be had.
pub fn run(_: &Env) -> Result<Vec<Series>, String> {
    let amx = Amx::acquire().map_err(|e| e.to_string())?;
    measure(&Plan::whole(), amx, (14336, 4096))
}

/// Measures both types at 50 %.
///
/// # Errors
/// As [`run`].
pub fn measure(plan: &Plan, amx: Amx, (n, k): (usize, usize)) -> Result<Vec<Series>, String> {
    let compute = Compute::new(Tier::detect_max(), PoolConfig::new(plan.threads));
    let mut all = Vec::new();
    for ty in [GgmlType::S_BF16, GgmlType::S8] {
        let rows = dense_rows(ty, n, k, 50, 7);
        let staged = stage(ty, (n, k), &rows, plan.threads);
        let packed = pack_tensor(ty, &[k as u64, n as u64], None, &rows);
        let packed = Bytes::from_vec(packed.map_err(|e| e.to_string())?);
        drop(rows);
        let sparse = Weights::sparse(ty, n, k, 1, packed, &compute.pool);
        let sparse = sparse.map_err(|e| e.to_string())?.pack(&compute.pool);
        let bytes = [staged.bytes(), sparse.bytes()];
        let count = plan.set.div_ceil(staged.bytes().max(1)).max(1);
        let mut theirs: Vec<StagedMatrix> = (1..count).map(|_| staged.copy()).collect();
        theirs.push(staged);
        let ours = copies(plan, &compute, sparse, bytes[1]);
        for m in BATCHES {
            let mut random = Random::new(3);
            let x: Vec<f32> = (0..m * k).map(|_| float(&mut random)).collect();
            let mut y = vec![0.0; m * n];
            let inputs = StagedInputs::new(staged_type(ty), &x, m, k);
            let mut acts = Acts::new();
            compute.prepare(&mut acts, &x, m, k, compute.forms(m, [&ours[0]]));
            let mut ran = true;
            let samples = turns(plan, |side| match side {
                0 => {
                    for w in &theirs {
                        ran &= multiply_staged(amx, &compute.pool, w, &inputs, black_box(&mut y));
                    }
                    theirs.len()
                }
                _ => {
                    for w in &ours {
                        compute.matmul(w, &acts, black_box(&mut y));
                    }
                    ours.len()
                }
            });
            if !ran {
                return Err("the CPU lacks avx512vbmi2 or avx512vpopcntdq".to_owned());
            }
            let sides = ["staged", "sparse"].into_iter().zip(bytes);
            all.extend(sides.zip(samples).map(|((side, bytes), samples)| {
                let name = Name {
                    kind: "staged".into(),
                    ty,
                    percent: 50,
                    shape: format!("{n}x{k}"),
                    m,
                    kernels: match side {
                        "staged" => "avx512+amx".to_owned(),
                        _ => compute.table.tier.to_string(),
                    },
                    side: side.to_owned(),
                    bytes: bytes as u64,
                };
                name.timed(samples)
            }));
        }
    }
    Ok(all)
}

fn staged_type(ty: GgmlType) -> StagedType {
    match ty {
        GgmlType::S_BF16 => StagedType::Bf16,
        _ => StagedType::Int8,
    }
}

/// The rows as the staged algorithm wants them; of Q8_0 rows the codes, with one scale each.
fn stage(ty: GgmlType, (n, k): (usize, usize), rows: &[u8], threads: usize) -> StagedMatrix {
    match staged_type(ty) {
        StagedType::Bf16 => {
            let bits = rows.as_chunks::<2>().0.iter();
            let bits: Vec<u16> = bits.map(|b| u16::from_le_bytes(*b)).collect();
            StagedMatrix::bf16(n, k, &bits, threads)
        }
        StagedType::Int8 => {
            let blocks = rows.as_chunks::<34>().0.iter();
            let codes: Vec<i8> = blocks
                .flat_map(|block| block[2..].iter().map(|&c| c as i8))
                .collect();
            StagedMatrix::int8(n, k, &codes, &vec![1e-3; n], threads)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tegula_kernels::tier::Features;

    #[test]
    fn both_sides_are_measured() {
        let Ok(amx) = Amx::emulate() else { return };
        if !Features::get().avx512vbmi2 {
            return;
        }
        let plan = Plan {
            set: 1,
            turns: 1,
            time: Duration::ZERO,
            threads: 2,
        };
        let series = measure(&plan, amx, (64, 128)).unwrap();
        let gains = crate::report::gains(&series);
        assert_eq!(gains.len(), 2 * BATCHES.len());
        assert!(gains.iter().all(|g| g.dense_bytes > 0 && g.gain > 0.0));
    }
}
