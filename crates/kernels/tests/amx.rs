//! Tile products: on the emulator everywhere, on silicon where `TEGULA_TEST_AMX=silicon`.

use tegula_gguf::{Bytes, GgmlType, blocks};
use tegula_kernels::{
    Acts, Amx, Compute, Forms, PoolConfig, Tier, Weights,
    ops::moe::{MoeScratch, RouteOptions},
};

#[path = "common/mod.rs"]
mod common;
use common::{Rng, matrix_types, random_weights};

fn amx() -> Amx {
    match std::env::var("TEGULA_TEST_AMX").as_deref() {
        Ok("silicon") => Amx::acquire().unwrap(),
        _ => Amx::emulate().unwrap(),
    }
}

/// Tiers that have decoders for tiles.
fn tiers() -> impl Iterator<Item = Tier> {
    [Tier::Avx2, Tier::Avx512]
        .into_iter()
        .filter(|t| t.available())
}

fn product(c: &Compute, w: &Weights, x: &[f32], m: usize) -> Vec<f32> {
    let mut acts = Acts::new();
    c.prepare(&mut acts, x, m, w.k(), c.forms(m, [w]));
    let mut y = vec![f32::NAN; m * w.n()];
    c.matmul(w, &acts, &mut y);
    y
}

/// Both factors are rounded to bf16, to 2^-9 of themselves each.
fn check(what: &str, y: &[f32], w: &[f32], x: &[f32], n: usize, k: usize) {
    for (t, (y, x)) in y.chunks(n).zip(x.chunks(k)).enumerate() {
        for (r, (&y, w)) in y.iter().zip(w.chunks(k)).enumerate() {
            let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let want: f64 = terms().sum();
            // Rounding errors of random signs: eight times their standard deviation.
            let spread = terms().map(|t| t * t).sum::<f64>().sqrt() * 8.0 / 512.0;
            let error = (f64::from(y) - want).abs();
            assert!(error <= spread, "{what} [{t}][{r}]: {y} for {want}");
        }
    }
}

#[test]
fn tile_products_are_near_the_exact_ones() {
    let amx = amx();
    let mut rng = Rng(0x0dd5_eed5);
    let shapes = [(1, 256), (16, 512), (33, 1280), (47, 256), (80, 2304)];
    for tier in tiers() {
        let c = Compute::with_amx(tier, amx, PoolConfig::new(2));
        for ty in matrix_types().filter(|&ty| ty != GgmlType::F32) {
            for (n, k) in shapes {
                let bytes = random_weights(ty, n, k, &mut rng);
                let mut plain = vec![0.0; n * k];
                blocks::dequantize(ty, &bytes, &mut plain).unwrap();
                let raw = Weights::raw(ty, n, k, 1, Bytes::from_vec(bytes)).unwrap();
                let packed = raw.pack(&c.pool);
                let m = 50;
                let x: Vec<f32> = (0..m * k).map(|_| rng.float()).collect();
                assert_eq!(c.forms(m, [&packed]), Forms::TILES);
                let all = product(&c, &packed, &x, m);
                check(&format!("{ty} {tier} {n}x{k}"), &all, &plain, &x, n, k);
                for m in [12, 15, 16, 17, 31, 32, 33, 48, 49] {
                    let y = product(&c, &packed, &x[..m * k], m);
                    assert_eq!(y, all[..m * n], "{ty} {tier} {n}x{k} m={m}");
                }
                assert_eq!(product(&c, &raw, &x, m), all, "{ty} raw");
            }
        }
    }
}

#[test]
fn large_batches_are_cut_evenly() {
    let amx = amx();
    let mut rng = Rng(99);
    let (n, k) = (20, 64);
    for tier in tiers() {
        let c = Compute::with_amx(tier, amx, PoolConfig::new(2));
        let bytes = random_weights(GgmlType::Q8_0, n, k, &mut rng);
        let mut plain = vec![0.0; n * k];
        blocks::dequantize(GgmlType::Q8_0, &bytes, &mut plain).unwrap();
        let w = Weights::raw(GgmlType::Q8_0, n, k, 1, Bytes::from_vec(bytes)).unwrap();
        let x: Vec<f32> = (0..1025 * k).map(|_| rng.float()).collect();
        let all = product(&c, &w, &x, 1025);
        check("1025 tokens", &all, &plain, &x, n, k);
        for m in [64, 65, 511, 512, 513] {
            assert_eq!(product(&c, &w, &x[..m * k], m), all[..m * n], "m={m}");
        }
    }
}

#[test]
fn few_tokens_and_f32_weights_take_no_tiles() {
    let c = Compute::with_amx(Tier::Avx512, amx(), PoolConfig::new(1));
    let mut rng = Rng(5);
    let mut make = |ty, k| {
        let bytes = random_weights(ty, 4, k, &mut rng);
        Weights::raw(ty, 4, k, 1, Bytes::from_vec(bytes)).unwrap()
    };
    assert_eq!(c.forms(1, [&make(GgmlType::Q4_0, 64)]), Forms::Q8);
    assert_eq!(c.forms(64, [&make(GgmlType::F32, 64)]), Forms::F32);
    let ragged = c.forms(64, [&make(GgmlType::BF16, 50)]);
    assert!(!ragged.has(Forms::TILES), "50 inputs are no whole tiles");
    if c.table.tier > Tier::Scalar {
        assert_eq!(c.forms(64, [&make(GgmlType::Q4_0, 64)]), Forms::TILES);
    }
}

#[test]
fn experts_mix_tiles_and_vectors() {
    let amx = amx();
    let mut rng = Rng(0xfeed);
    let (experts, used, k, ff, n, m) = (5, 2, 256, 96, 40, 60);
    let ty = GgmlType::Q4_0;
    for tier in tiers() {
        let (plain, tiles) = (
            Compute::new(tier, PoolConfig::new(2)),
            Compute::with_amx(tier, amx, PoolConfig::new(2)),
        );
        let mut stack = |n, k| {
            let bytes = random_weights(ty, experts * n, k, &mut rng);
            Weights::raw(ty, n, k, experts, Bytes::from_vec(bytes)).unwrap()
        };
        let (gate, up, down) = (stack(ff, k), stack(ff, k), stack(n, ff));
        let x: Vec<f32> = (0..m * k).map(|_| rng.float()).collect();
        // Expert 0 gets nearly every token, expert 1 a few, expert 4 none.
        let logits: Vec<f32> = (0..m)
            .flat_map(|t| [4.0, if t % 10 == 0 { 3.0 } else { -3.0 }, 1.0, 1.5, -9.0])
            .collect();
        let options = RouteOptions {
            used,
            normalize: true,
            scale: 1.0,
        };
        let run = |c: &Compute| {
            let routing = c.route(&logits, experts, &options);
            let mut acts = Acts::new();
            c.prepare(&mut acts, &x, m, k, c.expert_forms(m, &gate, &up));
            let mut out = vec![f32::NAN; m * n];
            let mut scratch = MoeScratch::default();
            c.moe_ffn(&acts, &routing, &gate, &up, &down, &mut scratch, &mut out);
            out
        };
        let (want, got) = (run(&plain), run(&tiles));
        let norm = |v: &[f32]| v.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        let difference: Vec<f32> = want.iter().zip(&got).map(|(a, b)| a - b).collect();
        assert!(norm(&difference) < 0.02 * norm(&want), "{tier}");
        assert!(norm(&difference) > 0.0, "{tier}: no tiles were used");
    }
}
