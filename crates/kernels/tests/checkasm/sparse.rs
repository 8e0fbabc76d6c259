//! Sparse weights: kernels in guarded memory, and operations that equal those of the dense
//! weights bit for bit, for every density, batch and number of threads.

use crate::{
    Random,
    data::{Codes, raw, weight_bytes},
    guard::with_guarded_strips,
    matmul::{compute, product},
    per_tier,
};
use libtest_mimic::{Failed, Trial};
use tegula_gguf::{
    Bytes, GgmlType,
    sparse::{self, Pattern, pack_strip, pack_tensor},
};
use tegula_kernels::{
    Acts, Compute, Encoding, Forms, Kernels, Pool, PoolConfig, Tier, Weights, check,
    ops::moe::{MoeScratch, RouteOptions},
    sparse::SLACK,
    strip::{
        ROWS,
        kernels::{MatmulKernels, PANEL_BYTES, StripArgs},
    },
    weights::WeightsError,
};

/// Percent of weights that have a value.
const DENSITIES: [usize; 7] = [0, 1, 10, 25, 50, 75, 100];

pub fn trials(trials: &mut Vec<Trial>) {
    for &ty in GgmlType::SPARSE {
        per_tier(trials, &format!("sparse_strips::{ty}"), move |tier| {
            strips(ty, tier)
        });
        per_tier(trials, &format!("sparse_matmul::{ty}"), move |tier| {
            matmul(ty, |threads| compute(tier, threads), &BATCHES)
        });
        per_tier(trials, &format!("sparse_experts::{ty}"), move |tier| {
            experts(ty, |threads| compute(tier, threads))
        });
        let trial = move || unpacking(ty);
        trials.push(Trial::test(format!("sparse_unpacking::{ty}"), trial));
        #[cfg(feature = "amx")]
        on_tiles(trials, ty);
    }
    trials.push(Trial::test("sparse_refused", refused));
    per_tier(trials, "sparse_by_many_threads", many_threads);
}

#[cfg(feature = "amx")]
fn on_tiles(trials: &mut Vec<Trial>, ty: GgmlType) {
    use crate::amx::with_amx;
    for tier in [Tier::Avx2, Tier::Avx512] {
        let mut trial = |name: &str, run: fn(GgmlType, Tier) -> Result<(), Failed>| {
            let trial = Trial::test(format!("{name}::{ty}::{tier}+amx"), move || run(ty, tier));
            trials.push(trial.with_ignored_flag(!tier.available()));
        };
        trial("sparse_strips", tile_strips);
        trial("sparse_matmul", |ty, tier| {
            matmul(ty, |threads| with_amx(tier, threads), &[1, 12, 33])
        });
        trial("sparse_experts", |ty, tier| {
            experts(ty, |threads| with_amx(tier, threads))
        });
    }
}

/// Dense rows of which about `percent` weights are not zero.
fn dense_bytes(
    ty: GgmlType,
    rows: usize,
    k: usize,
    percent: usize,
    random: &mut Random,
) -> Vec<u8> {
    let mut bytes = weight_bytes(ty, rows, k, Codes::Usual, random);
    let mut keep = || random.below(100) < percent;
    match ty {
        GgmlType::BF16 => {
            for w in bytes.as_chunks_mut::<2>().0 {
                if !keep() {
                    *w = [0; 2];
                }
            }
        }
        _ => {
            for block in bytes.chunks_exact_mut(ty.block_bytes()) {
                for q in &mut block[2..] {
                    match ty {
                        GgmlType::Q8_0 if !keep() => *q = 0,
                        GgmlType::Q4_0 => {
                            let low = if keep() { *q & 15 } else { 8 };
                            let high = if keep() { *q >> 4 } else { 8 };
                            *q = low | high << 4;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    bytes
}

/// The sparse strips of dense rows, each with the bytes behind it that kernels may read.
fn sparse_strips(ty: GgmlType, k: usize, bytes: &[u8], pattern: Option<Pattern>) -> Vec<Vec<u8>> {
    let row_bytes = ty.dense().bytes_for(k as u64).unwrap() as usize;
    let rows: Vec<&[u8]> = bytes.chunks_exact(row_bytes).collect();
    rows.chunks(ROWS)
        .map(|rows| {
            let mut strip = Vec::new();
            pack_strip(ty, k, rows, pattern, &mut strip).unwrap();
            strip.extend([0; SLACK]);
            strip
        })
        .collect()
}

fn sparse_weights(
    ty: GgmlType,
    (n, k, experts): (usize, usize, usize),
    bytes: &[u8],
    pool: &Pool,
) -> Weights {
    let shape = [k as u64, n as u64, experts as u64];
    let tensor = pack_tensor(ty, &shape, None, bytes).unwrap();
    Weights::sparse(ty, n, k, experts, Bytes::from_vec(tensor), pool).unwrap()
}

/// Weights per row: groups, both sides of super-blocks of 512 and of panels of 1024.
fn widths(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::S_BF16 => &[1, 2, 33, 100, 511, 512, 513, 1056, 2051],
        _ => &[32, 64, 96, 480, 512, 544, 1024, 1056, 2080],
    }
}

fn form(kernels: &MatmulKernels, ty: GgmlType) -> Forms {
    match ty {
        GgmlType::S_BF16 => kernels.bf16_form,
        _ => Forms::Q8,
    }
}

/// The tier's kernel in guarded memory.
fn strips(ty: GgmlType, tier: Tier) -> Result<(), Failed> {
    let (kernels, scalar) = (Kernels::for_tier(tier).matmul, compute(Tier::Scalar, 1));
    if !(kernels.sparse)(ty) {
        // The dense kernels do it, and `sparse_matmul` shows that.
        return Ok(());
    }
    let mut random = Random::new(u64::from(ty.id()));
    for (i, &k) in widths(ty).iter().enumerate() {
        for (j, percent) in DENSITIES.into_iter().enumerate() {
            // More than take turns.
            let count = 1 + (i + j) % 7;
            let bytes = dense_bytes(ty.dense(), count * ROWS, k, percent, &mut random);
            let x = random.normals(17 * k);
            let pattern = if percent == 0 && k % 4 == 0 {
                Pattern::new(2, 4)
            } else {
                None
            };
            let strips = sparse_strips(ty, k, &bytes, pattern);
            for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 17] {
                let mut acts = Acts::new();
                scalar.prepare(&mut acts, &x[..m * k], m, k, form(&kernels, ty));
                let call = |args: &StripArgs<'_>| {
                    // SAFETY: everything is as large as the shapes say; the tier is
                    // available, else this trial is ignored.
                    unsafe {
                        (kernels.mul_strips)(args);
                        check::mul_strips(args)
                    }
                };
                let end = (i + j + m) % 2 == 0;
                with_guarded_strips((ty, k), &strips, &acts.view(), PANEL_BYTES, end, call)?;
            }
        }
    }
    Ok(())
}

/// The tile kernel in guarded memory.
#[cfg(feature = "amx")]
fn tile_strips(ty: GgmlType, tier: Tier) -> Result<(), Failed> {
    let c = crate::amx::with_amx(tier, 1);
    let tiles = crate::amx::tiles(&c);
    if !(tiles.sparse)(ty) {
        return Ok(());
    }
    let mut random = Random::new(u64::from(ty.id()));
    for (i, k) in [32, 512, 1056, 2080].into_iter().enumerate() {
        for (j, percent) in [0, 50, 100].into_iter().enumerate() {
            let bytes = dense_bytes(ty.dense(), (1 + i) * ROWS, k, percent, &mut random);
            let strips = sparse_strips(ty, k, &bytes, None);
            // The last: more activations than are read anew for each pair of strips.
            let m = match (i, percent) {
                (3, 50) => 130,
                _ => [1, 17, 33][(i + j) % 3],
            };
            let x = random.normals(m * k);
            for form in crate::amx::forms(tiles, ty) {
                let mut acts = Acts::new();
                c.prepare(&mut acts, &x, m, k, form);
                let call = |args: &StripArgs<'_>| {
                    // SAFETY: as above.
                    unsafe {
                        (tiles.mul_strips)(args);
                        check::tile_products(args)
                    }
                };
                let end = i % 2 == 0;
                with_guarded_strips((ty, k), &strips, &acts.view(), tiles.scratch, end, call)?;
            }
        }
    }
    Ok(())
}

/// Tokens: in registers, one by one, and beyond.
const BATCHES: [usize; 12] = [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 64];

/// The operation equals the dense one on the same zero-filled weights, bit for bit.
fn matmul(
    ty: GgmlType,
    compute: impl Fn(usize) -> Compute,
    batches: &[usize],
) -> Result<(), Failed> {
    let mut random = Random::new(u64::from(ty.id()) + 1);
    let by_threads = [1, 2, 3].map(compute);
    let most = batches.iter().copied().max().unwrap();
    for (i, (n, k)) in [(1, 64), (17, 1056), (48, 768), (100, 512), (300, 96)]
        .into_iter()
        .enumerate()
    {
        let percent = DENSITIES[(2 * i + 1) % DENSITIES.len()];
        let bytes = dense_bytes(ty.dense(), n, k, percent, &mut random);
        let x = random.normals(most * k);
        let pool = &by_threads[0].pool;
        let dense = raw(ty.dense(), n, k, 1, &bytes).pack(pool);
        let mapped = sparse_weights(ty, (n, k, 1), &bytes, pool);
        let packed = mapped.pack(&by_threads[2].pool);
        if packed.encoding() != Encoding::Sparse16 || packed.bytes() != mapped.bytes() {
            return Err(format!("{packed:?} of {mapped:?}").into());
        }
        for &m in batches {
            let want = product(&by_threads[0], &dense, &x[..m * k], m);
            for (c, threads) in by_threads.iter().zip(1..) {
                let w = if threads == 2 { &mapped } else { &packed };
                let got = product(c, w, &x[..m * k], m);
                let same = got
                    .iter()
                    .zip(&want)
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                if !same {
                    let at = got.iter().zip(&want).position(|(a, b)| a != b);
                    return Err(format!(
                        "{ty} {n}x{k} {percent} % by {m} tokens, {threads} threads: not as dense, first at {at:?}"
                    )
                    .into());
                }
            }
        }
    }
    Ok(())
}

/// The shapes and threads at which SparAMX's positions, fixed per thread, go wrong: three
/// tiles a thread, and more than 32 of which the number is no multiple of 32.
fn many_threads(tier: Tier) -> Result<(), Failed> {
    if tier == Tier::Scalar {
        return Ok(());
    }
    let mut random = Random::new(5);
    let one = compute(tier, 1);
    for (n, k) in [(768, 2048), (14336, 64)] {
        for &ty in GgmlType::SPARSE {
            let bytes = dense_bytes(ty.dense(), n, k, 50, &mut random);
            let dense = raw(ty.dense(), n, k, 1, &bytes).pack(&one.pool);
            let sparse = sparse_weights(ty, (n, k, 1), &bytes, &one.pool);
            let x = random.normals(2 * k);
            let want = product(&one, &dense, &x, 2);
            for threads in [5, 16, 17] {
                if product(&compute(tier, threads), &sparse, &x, 2) != want {
                    return Err(format!("{ty} {n}x{k}, {threads} threads: not as dense").into());
                }
            }
        }
    }
    Ok(())
}

/// A network by experts equals the dense one bit for bit.
fn experts(ty: GgmlType, compute: impl Fn(usize) -> Compute) -> Result<(), Failed> {
    let mut random = Random::new(u64::from(ty.id()) + 2);
    let (k, ff, n_expert, used) = (96, 64, 6, 3);
    let mut stack = |n: usize, k: usize| {
        let bytes = dense_bytes(ty.dense(), n * n_expert, k, 50, &mut random);
        let pool = Pool::new(PoolConfig::new(1));
        let sparse = sparse_weights(ty, (n, k, n_expert), &bytes, &pool);
        (raw(ty.dense(), n, k, n_expert, &bytes).pack(&pool), sparse)
    };
    let (gate, up, down) = (stack(ff, k), stack(ff, k), stack(k, ff));
    for m in [1, 2, 7, 40] {
        let x = random.normals(m * k);
        let logits = random.normals(m * n_expert);
        let options = RouteOptions {
            used,
            normalize: true,
            scale: 1.0,
        };
        let run = |threads: usize, gate: &Weights, up: &Weights, down: &Weights| {
            let c = compute(threads);
            let routing = c.route(&logits, n_expert, &options);
            let mut out = vec![0.5; m * k];
            let mut scratch = MoeScratch::default();
            c.moe_ffn(&x, &routing, gate, up, down, &mut scratch, &mut out);
            out
        };
        let want = run(1, &gate.0, &up.0, &down.0);
        for threads in [1, 3] {
            if run(threads, &gate.1, &up.1, &down.1) != want {
                return Err(format!("{ty}: {m} tokens, {threads} threads: not as dense").into());
            }
        }
    }
    Ok(())
}

/// Rows come back as they were.
fn unpacking(ty: GgmlType) -> Result<(), Failed> {
    let mut random = Random::new(u64::from(ty.id()) + 3);
    let pool = Pool::new(PoolConfig::new(3));
    let (n, k, experts) = (21, 1056, 2);
    let bytes = dense_bytes(ty.dense(), n * experts, k, 40, &mut random);
    let w = sparse_weights(ty, (n, k, experts), &bytes, &pool);
    let row_bytes = bytes.len() / (n * experts);
    let mut row = vec![0; row_bytes];
    for w in [&w, &w.pack(&pool)] {
        if w.unpack_raw(&pool) != bytes {
            return Err(format!("{w:?}: other bytes").into());
        }
        w.read_row(1, 17, &mut row);
        if row != bytes[(n + 17) * row_bytes..][..row_bytes] {
            return Err(format!("{w:?}: another row").into());
        }
    }
    Ok(())
}

/// Damaged tensors and those of another shape are errors that say where.
fn refused() -> Result<(), Failed> {
    let mut random = Random::new(4);
    let pool = Pool::new(PoolConfig::new(2));
    let (n, k) = (2000, 64);
    let bytes = dense_bytes(GgmlType::Q8_0, n, k, 50, &mut random);
    let good = pack_tensor(GgmlType::S8, &[k as u64, n as u64, 1], None, &bytes)?;
    let load =
        |bytes: &[u8], ty, n| Weights::sparse(ty, n, k, 1, Bytes::from_vec(bytes.to_vec()), &pool);
    load(&good, GgmlType::S8, n)?;
    let other = load(&good, GgmlType::S4, n).unwrap_err();
    assert!(matches!(other, WeightsError::Other { .. }), "{other}");
    let other = load(&good, GgmlType::S8, n + 1).unwrap_err();
    assert!(matches!(other, WeightsError::Other { .. }), "{other}");
    let cut = load(&good[..good.len() - 64], GgmlType::S8, n).unwrap_err();
    assert!(cut.to_string().starts_with("truncated"), "{cut}");
    // The first of two damaged strips is named, whichever thread finds it.
    let sparse = sparse::Sparse::parse(&good)?;
    let mut bad = good.clone();
    for s in [70, 120] {
        let at = sparse.header().strips_at() + sparse.range(s).start;
        bad[at + 32..at + 96].fill(0xff);
    }
    let damaged = load(&bad, GgmlType::S8, n).unwrap_err().to_string();
    assert!(damaged.starts_with("strip 70: "), "{damaged}");
    Ok(())
}
