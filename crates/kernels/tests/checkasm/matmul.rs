//! Matrix products: the strip kernels in guarded memory, quantised activations, packing, and
//! the whole operation over shapes, encodings, batches and threads.

use crate::{
    Random,
    data::{Codes, hostile_rows, magnitudes, matrix_types, raw, weight_bytes},
    guard::{Guarded, with_guards},
    per_tier,
};
use libtest_mimic::{Failed, Trial};
use tegula_gguf::{GgmlType, blocks};
use tegula_kernels::{
    Acts, Compute, Forms, Kernels, Pool, PoolConfig, Tier, Weights,
    acts::Q8Dest,
    check,
    strip::{
        ROWS,
        kernels::{MatmulKernels, PANEL_BYTES},
    },
};

/// Tokens: one, every tail of a group of 8 and of runs of 4, whole groups ± 1. Fewer for
/// scalar, which has no such cases and takes its time.
fn tokens(tier: Tier) -> &'static [usize] {
    match tier {
        Tier::Scalar => &[1, 3, 8, 17],
        _ => &[1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33],
    }
}

/// Rows around whole strips and tasks of several.
const ROW_COUNTS: [usize; 8] = [1, 15, 16, 17, 31, 33, 64, 81];

pub fn trials(trials: &mut Vec<Trial>) {
    per_tier(trials, "quantize_q8", quantize_q8);
    for ty in matrix_types() {
        trials.push(Trial::test(format!("packing::{ty}"), move || packing(ty)));
        trials.push(Trial::test(format!("dequantised::{ty}"), move || {
            dequantised(ty)
        }));
        per_tier(trials, &format!("strips::{ty}"), move |tier| {
            strips(ty, tier)
        });
        per_tier(trials, &format!("matmul::{ty}"), move |tier| {
            matmul(ty, tier)
        });
    }
    per_tier(trials, "matmul_many", many);
    per_tier(trials, "non_finite", non_finite);
}

/// Weights per row: one block, a few, and both sides of the panel's 1024.
pub fn widths(ty: GgmlType) -> &'static [usize] {
    match ty.block_len() {
        1 => &[1, 2, 3, 8, 17, 33, 1023, 1024, 1025, 2051],
        32 => &[32, 64, 96, 992, 1024, 1056, 2080],
        _ => &[256, 512, 768, 1024, 1280, 2304],
    }
}

/// One call of a tier's kernel in guarded memory, held against scalar.
fn strip_call(
    kernels: &MatmulKernels,
    scalar: &Compute,
    (ty, k): (GgmlType, usize),
    bytes: &[u8],
    x: &[f32],
    end: bool,
) -> Result<(), Failed> {
    let mut acts = Acts::new();
    let form = match ty {
        GgmlType::BF16 => kernels.bf16_form,
        _ if ty.is_quantized() => Forms::Q8,
        _ => Forms::F32,
    };
    scalar.prepare(&mut acts, x, x.len() / k, k, form);
    with_guards((ty, k), bytes, &acts.view(), PANEL_BYTES, end, |args| {
        // SAFETY: everything is as large as the shapes say; the tier is available, else
        // this trial is ignored.
        unsafe {
            (kernels.mul_strips)(args);
            check::mul_strips(args)
        }
    })
}

/// Every width and batch with usual numbers, some with hostile ones.
fn strips(ty: GgmlType, tier: Tier) -> Result<(), Failed> {
    let (kernels, scalar) = (Kernels::for_tier(tier).matmul, compute(Tier::Scalar, 1));
    let mut random = Random::new(ty.id().into());
    for (i, &k) in widths(ty).iter().enumerate() {
        let count = 1 + i % 4;
        let bytes = weight_bytes(ty, count * ROWS, k, Codes::Usual, &mut random);
        let x = random.normals(33 * k);
        for (j, &m) in tokens(tier).iter().enumerate() {
            let end = (i + j) % 2 == 0;
            strip_call(&kernels, &scalar, (ty, k), &bytes, &x[..m * k], end)?;
        }
    }
    for k in [widths(ty)[1], widths(ty)[4]] {
        for codes in [Codes::Usual, Codes::Clear, Codes::Set, Codes::Wild] {
            let bytes = weight_bytes(ty, 2 * ROWS, k, codes, &mut random);
            let rows = hostile_rows(k, &mut random);
            for row in &rows {
                strip_call(&kernels, &scalar, (ty, k), &bytes, row, true)?;
            }
            let all = rows.concat();
            strip_call(&kernels, &scalar, (ty, k), &bytes, &all, true)?;
        }
    }
    Ok(())
}

/// Codes, scales and sums, for one token alone and among others.
fn quantize_q8(tier: Tier) -> Result<(), Failed> {
    let kernels = Kernels::for_tier(tier).matmul;
    let mut random = Random::new(8);
    for len in [32, 64, 96, 1024, 2080] {
        let mut rows = hostile_rows(len, &mut random);
        rows.push(random.normals(len));
        // Exactly between two codes: 127 is the largest, so codes are the values.
        rows.push(
            (0..len)
                .map(|i| match i % 32 {
                    0 => 127.0,
                    i => i as f32 * 4.0 - 63.5,
                })
                .collect(),
        );
        rows.push(vec![f32::MAX; len]);
        // Magnitudes of all sizes, the largest anywhere.
        rows.push(
            (0..len)
                .map(|_| random.normal() * 2f32.powi(random.below(60) as i32 - 30))
                .collect(),
        );
        for x in &rows {
            let x = Guarded::at_end(x);
            for tokens in [1, 3, 8] {
                let groups = len / 32 - 1;
                // As much as one token's share needs, so that its end is the array's.
                let mut q = Guarded::at_end(&vec![77i8; (groups * tokens + 1) * 32]);
                let mut d = Guarded::at_end(&vec![7.0; groups * tokens + 1]);
                let mut nsum32 = Guarded::at_end(&vec![7; groups * tokens + 1]);
                let mut nsum16 = Guarded::at_end(&vec![7; (2 * groups + 1) * tokens + 1]);
                let mut fsum32 = Guarded::at_end(&vec![7.0; groups * tokens + 1]);
                let mut fsum16 = Guarded::at_end(&vec![7.0; (2 * groups + 1) * tokens + 1]);
                let dest = Q8Dest {
                    tokens,
                    q: q.as_mut_ptr(),
                    d: d.as_mut_ptr(),
                    nsum32: nsum32.as_mut_ptr(),
                    nsum16: nsum16.as_mut_ptr(),
                    fsum32: fsum32.as_mut_ptr(),
                    fsum16: fsum16.as_mut_ptr(),
                };
                // SAFETY: the destination is as long as the strides say; the tier is
                // available, else this trial is ignored.
                unsafe {
                    (kernels.quantize_q8)(&x, &dest);
                    check::quantize_q8(&x, &dest)?;
                }
                let others = |at: usize| !(at / 32).is_multiple_of(tokens);
                if (0..q.len()).any(|at| others(at) && q[at] != 77) {
                    return Err(format!("{len} values of {tokens} tokens: another's codes").into());
                }
            }
        }
    }
    Ok(())
}

/// Strips hold every bit of the file, for every number of rows and stack of matrices.
fn packing(ty: GgmlType) -> Result<(), Failed> {
    let mut random = Random::new(5);
    let pool = Pool::new(PoolConfig::new(2));
    for (i, &k) in widths(ty).iter().enumerate() {
        for n in ROW_COUNTS {
            let experts = 1 + i % 3;
            let bytes = weight_bytes(ty, experts * n, k, Codes::Wild, &mut random);
            let raw = raw(ty, n, k, experts, &bytes);
            let packed = raw.pack(&pool);
            let shape = format!("{ty} {experts}x{n}x{k}");
            if packed.unpack_raw(&pool) != bytes || raw.unpack_raw(&pool) != bytes {
                return Err(format!("{shape}: unpacking does not invert packing").into());
            }
            if packed.pack(&pool).unpack_raw(&pool) != bytes {
                return Err(format!("{shape}: packing twice differs").into());
            }
            let row_bytes = bytes.len() / (experts * n);
            let mut row = vec![0; row_bytes];
            packed.read_row(experts - 1, n - 1, &mut row);
            if row != bytes[bytes.len() - row_bytes..] {
                return Err(format!("{shape}: the last row differs").into());
            }
        }
    }
    Ok(())
}

/// The definition itself: products with what the file's plain dequantiser gives, and rows
/// as the embedding looks them up.
fn dequantised(ty: GgmlType) -> Result<(), Failed> {
    let c = compute(Tier::Scalar, 1);
    let mut random = Random::new(9);
    let (m, n, k) = (3, 17, 512);
    let bytes = weight_bytes(ty, n, k, Codes::Usual, &mut random);
    let mut plain = vec![0.0; n * k];
    blocks::dequantize(ty, &bytes, &mut plain)?;
    let x = random.normals(m * k);
    let w = raw(ty, n, k, 1, &bytes);
    let y = product(&c, &w, &x, m);
    for (i, &got) in y.iter().enumerate() {
        let (x, w) = (&x[i / n * k..][..k], &plain[i % n * k..][..k]);
        let want: f64 = x
            .iter()
            .zip(w)
            .map(|(&x, &w)| f64::from(x) * f64::from(w))
            .sum();
        let length = w
            .iter()
            .map(|&w| f64::from(w) * f64::from(w))
            .sum::<f64>()
            .sqrt();
        // Activations of 8 bits are off by up to half a step, at random: the largest of 32
        // normal ones is below 4, so a step is 4 / 127.
        let bound = match ty.is_quantized() {
            true => length * 4.0 / 127.0 * 2.0,
            false => length * 1e-4,
        };
        if (f64::from(got) - want).abs() > bound {
            return Err(format!("{ty} product {i}: {got} for {want}").into());
        }
    }
    let ids = [16, 0, 7, 7];
    for w in [&w, &w.pack(&c.pool)] {
        let mut rows = vec![f32::NAN; ids.len() * k];
        c.get_rows(w, &ids, &mut rows);
        for (row, id) in rows.chunks_exact(k).zip(ids) {
            if row != &plain[id as usize * k..][..k] {
                return Err(format!("{ty}: row {id} is not what the dequantiser gives").into());
            }
        }
    }
    Ok(())
}

pub fn compute(tier: Tier, threads: usize) -> Compute {
    Compute::new(tier, PoolConfig::new(threads))
}

pub fn product(c: &Compute, w: &Weights, x: &[f32], m: usize) -> Vec<f32> {
    let mut acts = Acts::new();
    c.prepare(&mut acts, x, m, w.k(), c.forms(m, [w]));
    let mut y = vec![f32::NAN; m * w.n()];
    c.matmul(w, &acts, &mut y);
    y
}

/// Scalar's products, and the bounds on the difference from them.
fn definition(
    tier: &Compute,
    (ty, n, k): (GgmlType, usize, usize),
    bytes: &[u8],
    x: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let scalar = compute(Tier::Scalar, 1);
    let m = x.len() / k;
    let round = |&x: &f32| half::bf16::from_f32(x).to_f32();
    let seen: Vec<f32> = match ty {
        GgmlType::BF16 if tier.table.matmul.bf16_form == Forms::BF16 => {
            x.iter().map(round).collect()
        }
        _ => x.to_vec(),
    };
    let want = product(&scalar, &raw(ty, n, k, 1, bytes), &seen, m);
    if ty.is_quantized() {
        let exact = vec![0.0; want.len()];
        return (want, exact);
    }
    let x: Vec<f32> = seen.iter().map(|x| x.abs()).collect();
    let bytes = magnitudes(ty, bytes);
    let mut within = product(&scalar, &raw(ty, n, k, 1, &bytes), &x, m);
    within.iter_mut().for_each(|w| *w *= check::FLOAT_PRODUCTS);
    (want, within)
}

/// The operation: against scalar, and bit for bit the same for every encoding, number of
/// threads and batch.
fn matmul(ty: GgmlType, tier: Tier) -> Result<(), Failed> {
    let mut random = Random::new(u64::from(ty.id()) + 1000);
    let by_threads = [1, 2, 3].map(|threads| compute(tier, threads));
    let one = &by_threads[0];
    let widths = widths(ty);
    // More tokens than are multiplied at a time, and many rows.
    let large = [(17, widths[3], 530), (200, widths[2], 20)];
    let shapes = ROW_COUNTS
        .iter()
        .enumerate()
        .map(|(i, &n)| (n, widths[i % widths.len()], 33))
        .chain(large);
    for (n, k, m) in shapes {
        let bytes = weight_bytes(ty, n, k, Codes::Usual, &mut random);
        let x = random.normals(m * k);
        let raw = raw(ty, n, k, 1, &bytes);
        let packed = raw.pack(&one.pool);
        let shape = format!("{ty} {n}x{k}");
        let all = product(one, &packed, &x, m);
        let (want, within) = definition(one, (ty, n, k), &bytes, &x);
        check::equal(
            &all,
            &want,
            |i| within[i],
            |i| format!("{shape} by {m} tokens: token {} row {}", i / n, i % n),
        )?;
        for (c, threads) in by_threads.iter().zip(1..) {
            for &few in tokens(tier).iter().chain([&m]).filter(|&&few| few <= m) {
                let w = if few % 4 == 1 { &raw } else { &packed };
                if product(c, w, &x[..few * k], few) != all[..few * n] {
                    let encoding = w.encoding();
                    let how = format!("{few} tokens, {threads} threads, {encoding:?}");
                    return Err(format!("{shape}: {how}: not as in a batch of {m}").into());
                }
            }
        }
        if !product(one, &packed, &[], 0).is_empty() {
            return Err(format!("{shape}: results of no tokens").into());
        }
    }
    Ok(())
}

/// Several products in one dispatch equal each alone.
fn many(tier: Tier) -> Result<(), Failed> {
    let mut random = Random::new(21);
    let k = 512;
    let types = [
        (GgmlType::Q4_K, 70),
        (GgmlType::Q6_K, 17),
        (GgmlType::F16, 1),
        (GgmlType::BF16, 33),
        (GgmlType::Q8_0, 160),
    ];
    let weights = types.map(|(ty, n)| {
        let bytes = weight_bytes(ty, n, k, Codes::Usual, &mut random);
        raw(ty, n, k, 1, &bytes)
    });
    for threads in [1, 3] {
        let c = compute(tier, threads);
        for m in [1, 2, 11] {
            let x = random.normals(m * k);
            let mut acts = Acts::new();
            c.prepare(&mut acts, &x, m, k, c.forms(m, &weights));
            let mut ys: Vec<_> = weights.iter().map(|w| vec![f32::NAN; m * w.n()]).collect();
            let mut products: Vec<_> = weights
                .iter()
                .zip(&mut ys)
                .map(|(w, y)| (w, &mut y[..]))
                .collect();
            c.matmul_many(&mut products, &acts);
            for (w, y) in weights.iter().zip(&ys) {
                if *y != product(&c, w, &x, m) {
                    return Err(format!("{w:?} by {m} tokens differs among others").into());
                }
            }
            // The first rows alone, in whole strips, added to what is there.
            let first = |w: &Weights| (w.n() / 2).next_multiple_of(ROWS).min(w.n());
            let mut sums: Vec<_> = weights.iter().map(|w| vec![1.0; m * first(w)]).collect();
            let parts = weights.iter().zip(&mut sums);
            let mut parts: Vec<_> = parts.map(|(w, y)| (w, &mut y[..])).collect();
            let mut beside = 0;
            c.matmul_beside(&mut parts, &acts, true, || beside += 1);
            for ((w, y), sums) in weights.iter().zip(&ys).zip(&sums) {
                let rows = y.chunks(w.n()).flat_map(|row| &row[..first(w)]);
                let want: Vec<f32> = rows.map(|v| 1.0 + v).collect();
                if beside != 1 || *sums != want {
                    return Err(format!("the first rows of {w:?} by {m} tokens differ").into());
                }
            }
        }
    }
    Ok(())
}

/// A token with a NaN or an infinity gives NaN for quantised weights, and only that token.
fn non_finite(tier: Tier) -> Result<(), Failed> {
    let c = compute(tier, 1);
    let mut random = Random::new(22);
    let (n, k) = (16, 256);
    for ty in matrix_types().filter(|ty| ty.is_quantized()) {
        let w = raw(
            ty,
            n,
            k,
            1,
            &weight_bytes(ty, n, k, Codes::Usual, &mut random),
        );
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (m, at) in [(1, 0), (2, 0), (9, 4), (9, 8)] {
                let mut x = vec![1.0; m * k];
                x[at * k + random.below(k)] = bad;
                let y = product(&c, &w, &x, m);
                for (t, y) in y.chunks_exact(n).enumerate() {
                    if y.iter().any(|y| y.is_nan() != (t == at)) {
                        return Err(format!("{ty}: {bad} in token {at} of {m}: token {t}").into());
                    }
                }
            }
        }
        if product(&c, &w, &vec![1e-31; k], 1) != vec![0.0; n] {
            return Err(format!("{ty}: tiny activations do not count as zero").into());
        }
    }
    Ok(())
}
