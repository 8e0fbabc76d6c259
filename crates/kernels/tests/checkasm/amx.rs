//! Tile products: on the emulator everywhere, on silicon where `TEGULA_TEST_AMX=silicon`.

use crate::{
    Random, attention,
    data::{Codes, hostile_rows, matrix_types, raw, weight_bytes},
    guard::{Guarded, with_guards},
    matmul::{compute, product, widths},
};
use libtest_mimic::{Failed, Trial};
use tegula_gguf::{GgmlType, blocks};
use tegula_kernels::{
    Acts, Amx, Compute, Forms, PoolConfig, Tier, check,
    ops::moe::{MoeScratch, RouteOptions},
    strip::{ROWS, kernels::Tiles},
};

/// One trial per tier that has decoders for tiles.
fn per_tier(
    trials: &mut Vec<Trial>,
    name: &str,
    check: impl Fn(Tier) -> Result<(), Failed> + Send + Copy + 'static,
) {
    for tier in [Tier::Avx2, Tier::Avx512] {
        let trial = Trial::test(format!("{name}::{tier}+amx"), move || check(tier));
        trials.push(trial.with_ignored_flag(!tier.available()));
    }
}

pub fn trials(trials: &mut Vec<Trial>) {
    per_tier(trials, "pack", pack);
    per_tier(trials, "tile_swiglu", swiglu);
    for ty in matrix_types().filter(|&ty| ty != GgmlType::F32) {
        per_tier(trials, &format!("strips::{ty}"), move |tier| {
            strips(ty, tier)
        });
        per_tier(trials, &format!("matmul::{ty}"), move |tier| {
            matmul(ty, tier)
        });
    }
    per_tier(trials, "large_batches", large_batches);
    per_tier(trials, "few_tokens", few_tokens);
    per_tier(trials, "experts", experts);
    per_tier(trials, "attention", |tier| {
        attention::on_tiles(|threads| with_amx(tier, threads))
    });
}

pub fn with_amx(tier: Tier, threads: usize) -> Compute {
    let amx = match std::env::var("TEGULA_TEST_AMX").as_deref() {
        Ok("silicon") => Amx::acquire().unwrap(),
        _ => Amx::emulate().unwrap(),
    };
    Compute::with_amx(tier, amx, PoolConfig::new(threads))
}

pub fn tiles(c: &Compute) -> &Tiles {
    c.table.matmul.tiles.as_ref().expect("tiles were asked for")
}

/// Rounding to bf16, and nothing written beside it.
fn pack(tier: Tier) -> Result<(), Failed> {
    let c = with_amx(tier, 1);
    let mut random = Random::new(51);
    for len in [32, 64, 1056] {
        let mut rows = hostile_rows(len, &mut random);
        rows.push(random.normals(len));
        rows.push(vec![f32::MAX; len]);
        // Exactly between two bf16 numbers, and just beside.
        rows.push(
            (0..len)
                .map(|i| f32::from_bits(0x3f80_7fff + i as u32 % 3))
                .collect(),
        );
        rows.push(
            (0..len)
                .map(|i| f32::from_bits(0x3f81_7fff + i as u32 % 3))
                .collect(),
        );
        for x in &rows {
            let x = Guarded::at_end(x);
            for step in [32, 96] {
                let mut out = Guarded::at_end(&vec![0x7777; (len / 32 - 1) * step + 32]);
                // SAFETY: as long as the step says; the tier is available, else this trial
                // is ignored.
                unsafe {
                    (tiles(&c).pack)(&x, out.as_mut_ptr(), step);
                    check::pack(&x, out.as_ptr(), step)?;
                }
                if (0..out.len()).any(|i| i % step >= 32 && out[i] != 0x7777) {
                    return Err(format!("{len} values: written between the steps").into());
                }
            }
        }
    }
    Ok(())
}

/// Gates far out on both sides, and nothing written behind the tokens.
fn swiglu(tier: Tier) -> Result<(), Failed> {
    let c = with_amx(tier, 1);
    let mut random = Random::new(52);
    for tokens in [1, 2, 15, 16] {
        for step in [16 * tokens, 16 * 37] {
            let len = step + 16 * tokens;
            let mut gate: Vec<_> = random.normals(len).iter().map(|x| x * 8.0).collect();
            for (i, x) in [-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]
                .iter()
                .enumerate()
            {
                gate[2 * i] = *x;
            }
            let (gate, up) = (
                Guarded::at_end(&gate),
                Guarded::at_end(&random.normals(len)),
            );
            let mut out = Guarded::at_end(&vec![0x7777; tokens * 32]);
            // SAFETY: two strips of so many tokens; the tier is available, else this trial is
            // ignored.
            unsafe {
                let (gate, up) = (gate.as_ptr(), up.as_ptr());
                (tiles(&c).swiglu)(gate, up, step, tokens, out.as_mut_ptr());
            }
            check::tile_swiglu(&gate, &up, step, tokens, &out)?;
        }
    }
    Ok(())
}

/// The kernels in guarded memory: on bf16 tiles against products of bf16 in f64, on 8-bit ones
/// against those of vectors, which they equal.
fn strips(ty: GgmlType, tier: Tier) -> Result<(), Failed> {
    let c = with_amx(tier, 1);
    let mut random = Random::new(u64::from(ty.id()) + 2000);
    let call = |k: usize, bytes: &[u8], x: &[f32], form, end| {
        let mut acts = Acts::new();
        c.prepare(&mut acts, x, x.len() / k, k, form);
        with_guards(
            (ty, k),
            bytes,
            &acts.view(),
            tiles(&c).scratch,
            end,
            |args| {
                // SAFETY: as in the strips of vectors.
                unsafe {
                    (tiles(&c).mul_strips)(args);
                    check::tile_products(args)
                }
            },
        )
    };
    let forms = || forms(tiles(&c), ty);
    // Both sides of the panel's 1024 inputs; one strip or a pair, and pairs with one left
    // over; one tile of tokens or two, whole and not.
    let of_floats = [32, 64, 992, 1024, 1056];
    let widths = match ty.block_len() {
        1 => &of_floats[..],
        _ => &widths(ty)[..6],
    };
    for (i, &k) in widths.iter().enumerate() {
        let count = 1 + i % 3;
        let bytes = weight_bytes(ty, count * ROWS, k, Codes::Usual, &mut random);
        let x = random.normals(33 * k);
        let tokens = [1, 15, 16, 17, 32, 33];
        for (j, m) in tokens.into_iter().enumerate().skip(i % 2).step_by(2) {
            for form in forms() {
                call(k, &bytes, &x[..m * k], form, (i + j / 2) % 2 == 0)?;
            }
        }
    }
    let k = widths[0];
    for codes in [Codes::Usual, Codes::Clear, Codes::Set] {
        let bytes = weight_bytes(ty, ROWS, k, codes, &mut random);
        let x = hostile_rows(k, &mut random).concat();
        for form in forms() {
            call(k, &bytes, &x, form, true)?;
        }
    }
    Ok(())
}

/// The forms that products of a type on tiles take.
pub fn forms(tiles: &Tiles, ty: GgmlType) -> impl Iterator<Item = Forms> {
    let bytes = (tiles.most_byte_tokens)(ty) > 0;
    [Forms::TILES].into_iter().chain(bytes.then_some(Forms::Q8))
}

/// Within what rounding both factors to bf16, to 2^-9 of themselves each, can do.
fn near(what: &str, y: &[f32], w: &[f32], x: &[f32], n: usize, k: usize) -> Result<(), Failed> {
    for (i, &y) in y.iter().enumerate() {
        let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
        let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        let want: f64 = terms().sum();
        // Rounding errors of random signs: eight times their standard deviation.
        let spread = terms().map(|t| t * t).sum::<f64>().sqrt() * 8.0 / 512.0;
        if (f64::from(y) - want).abs() > spread {
            return Err(format!("{what}: token {} row {}: {y} for {want}", i / n, i % n).into());
        }
    }
    Ok(())
}

/// The operation. On bf16 tiles against the dequantised weights, and the same for every batch that
/// they take, encoding and number of threads; on 8-bit ones that of vectors, bit for bit.
fn matmul(ty: GgmlType, tier: Tier) -> Result<(), Failed> {
    let mut random = Random::new(u64::from(ty.id()) + 3000);
    let (one, two, vectors) = (with_amx(tier, 1), with_amx(tier, 2), compute(tier, 2));
    let fewest = (tiles(&one).fewest_tokens)(ty).expect("a type that tiles take");
    let most = (tiles(&one).most_byte_tokens)(ty);
    for (n, k, m) in [
        (1, 256, most + 50),
        (47, 512, most + 17),
        (80, 1280, most + 12),
    ] {
        let bytes = weight_bytes(ty, n, k, Codes::Usual, &mut random);
        let mut plain = vec![0.0; n * k];
        blocks::dequantize(ty, &bytes, &mut plain)?;
        let raw = raw(ty, n, k, 1, &bytes);
        let packed = raw.pack(&one.pool);
        let x = random.normals(m * k);
        let what = format!("{ty} {n}x{k}");
        let all = product(&one, &packed, &x, m);
        near(&what, &all, &plain, &x, n, k)?;
        for (few, w) in [(0, &raw), (15, &packed), (33, &packed), (50, &raw)] {
            let few = (most + few).max(fewest.max(most + 1));
            if few <= m && product(&two, w, &x[..few * k], few) != all[..few * n] {
                let encoding = w.encoding();
                return Err(format!("{what}: {few} tokens, {encoding:?}: another result").into());
            }
        }
        if one.forms(m, [&packed]) != Forms::TILES {
            return Err(format!("{what}: {m} tokens take no tiles").into());
        }
        for (few, w) in [(fewest, &raw), (fewest + 1, &packed), (most, &packed)] {
            if few > most {
                continue;
            }
            let x = &x[..few * k];
            if product(&two, w, x, few) != product(&vectors, w, x, few) {
                return Err(format!("{what}: {few} tokens: not as on vectors").into());
            }
        }
    }
    Ok(())
}

fn large_batches(tier: Tier) -> Result<(), Failed> {
    let c = with_amx(tier, 2);
    let mut random = Random::new(53);
    let (n, k, m) = (20, 64, 1025);
    let bytes = weight_bytes(GgmlType::Q8_0, n, k, Codes::Usual, &mut random);
    let mut plain = vec![0.0; n * k];
    blocks::dequantize(GgmlType::Q8_0, &bytes, &mut plain)?;
    let w = raw(GgmlType::Q8_0, n, k, 1, &bytes);
    let x = random.normals(m * k);
    let all = product(&c, &w, &x, m);
    near("1025 tokens", &all, &plain, &x, n, k)?;
    for few in [64, 65, 511, 512, 513] {
        if product(&c, &w, &x[..few * k], few) != all[..few * n] {
            return Err(format!("{few} tokens: not as in a batch of {m}").into());
        }
    }
    Ok(())
}

fn few_tokens(tier: Tier) -> Result<(), Failed> {
    let c = with_amx(tier, 1);
    let mut random = Random::new(54);
    let mut forms = |m, ty, k| {
        let bytes = weight_bytes(ty, 4, k, Codes::Usual, &mut random);
        c.forms(m, [&raw(ty, 4, k, 1, &bytes)])
    };
    let got = [
        forms(1, GgmlType::Q4_0, 64),
        forms(64, GgmlType::F32, 64),
        forms(64, GgmlType::Q4_0, 64),
    ];
    if got != [Forms::Q8, Forms::F32, Forms::TILES] {
        return Err(format!("one token, F32 weights, a batch: {got:?}").into());
    }
    if forms(64, GgmlType::BF16, 50).has(Forms::TILES) {
        return Err("50 inputs are no whole tiles".into());
    }
    Ok(())
}

/// Experts with many tokens on bf16 tiles, with fewer on 8-bit ones, with few on vectors, in one
/// batch.
fn experts(tier: Tier) -> Result<(), Failed> {
    let mut random = Random::new(55);
    let (experts, used, k, ff, n, m) = (5, 2, 256, 96, 40, 160);
    let ty = GgmlType::Q4_0;
    let mut stack = |n, k| {
        let bytes = weight_bytes(ty, experts * n, k, Codes::Usual, &mut random);
        raw(ty, n, k, experts, &bytes)
    };
    let (gate, up, down) = (stack(ff, k), stack(ff, k), stack(n, ff));
    let x = random.normals(m * k);
    // Expert 0 gets every token, expert 1 sixteen, expert 2 four, expert 4 none.
    let logits: Vec<f32> = (0..m)
        .flat_map(|t| {
            let [some, few] = [t % 10 == 0, t % 40 == 5].map(|x| if x { 3.0 } else { -3.0 });
            [4.0, some, few, 1.5, -9.0]
        })
        .collect();
    let options = RouteOptions {
        used,
        normalize: true,
        scale: 1.0,
    };
    let run = |c: &Compute| {
        let routing = c.route(&logits, experts, &options);
        let mut out = vec![0.0; m * n];
        let mut scratch = MoeScratch::default();
        c.moe_ffn(&x, &routing, &gate, &up, &down, &mut scratch, &mut out);
        out
    };
    let (want, got) = (run(&compute(tier, 2)), run(&with_amx(tier, 2)));
    let norm = |v: &[f32]| v.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
    let difference: Vec<f32> = want.iter().zip(&got).map(|(a, b)| a - b).collect();
    let relative = norm(&difference) / norm(&want);
    // Zero would mean that no tiles were used.
    match relative > 0.0 && relative < 0.02 {
        true => Ok(()),
        false => Err(format!("{relative} from vectors").into()),
    }
}
