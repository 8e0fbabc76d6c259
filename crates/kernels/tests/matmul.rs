//! Matrix products of every tier against dequantised weights and against the scalar tier.

use tegula_gguf::{Bytes, GgmlType, blocks};
use tegula_kernels::{
    Acts, Compute, PoolConfig, Tier, Weights,
    ops::moe::{MoeScratch, RouteOptions},
};

#[path = "common/mod.rs"]
mod common;
use common::{Rng, matrix_types, random_weights};

fn compute(tier: Tier, threads: usize) -> Compute {
    Compute::new(tier, PoolConfig::new(threads))
}

fn product(c: &Compute, w: &Weights, x: &[f32], m: usize) -> Vec<f32> {
    let mut acts = Acts::new();
    c.prepare(&mut acts, x, m, w.k(), c.forms(m, [w]));
    let mut y = vec![f32::NAN; m * w.n()];
    c.matmul(w, &acts, &mut y);
    y
}

#[test]
fn scalar_products_are_near_the_dequantised_ones() {
    let c = compute(Tier::Scalar, 1);
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let (m, n, k) = (3, 17, 512);
    for ty in matrix_types() {
        let bytes = random_weights(ty, n, k, &mut rng);
        let mut plain = vec![0.0; n * k];
        blocks::dequantize(ty, &bytes, &mut plain).unwrap();
        let x: Vec<f32> = (0..m * k).map(|_| rng.float()).collect();
        let w = Weights::raw(ty, n, k, 1, Bytes::from_vec(bytes)).unwrap();
        let y = product(&c, &w, &x, m);
        for t in 0..m {
            for r in 0..n {
                let (x, w) = (&x[t * k..(t + 1) * k], &plain[r * k..(r + 1) * k]);
                let want: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x * w)).sum();
                // Rounding of activations: half a step of 1/127, at random.
                let step: f64 = w.iter().map(|&w| f64::from(w * w)).sum::<f64>().sqrt();
                let bound = if ty.is_quantized() {
                    step / 127.0 * 2.0
                } else {
                    step * 1e-5
                };
                let got = f64::from(y[t * n + r]);
                assert!(
                    (got - want).abs() <= bound,
                    "{ty} [{t}][{r}]: {got} for {want}"
                );
            }
        }
    }
}

#[test]
fn tiers_encodings_batches_and_threads_agree() {
    let mut rng = Rng(0x1234_5678_9abc_def1);
    let scalar = compute(Tier::Scalar, 1);
    let tiers: Vec<Tier> = Tier::ALL.into_iter().filter(|t| t.available()).collect();
    eprintln!("tiers: {tiers:?}");
    for ty in matrix_types() {
        for (n, k) in [
            (1, 256),
            (15, 512),
            (16, 256),
            (17, 2304),
            (33, 1280),
            (64, 1024),
        ] {
            let bytes = random_weights(ty, n, k, &mut rng);
            let raw = Weights::raw(ty, n, k, 1, Bytes::from_vec(bytes.clone())).unwrap();
            let packed = raw.pack(&scalar.pool);
            assert_eq!(packed.unpack_raw(&scalar.pool), bytes, "{ty}");
            let m = 33;
            let x: Vec<f32> = (0..m * k).map(|_| rng.float()).collect();
            let want = product(&scalar, &raw, &x, m);
            for &tier in &tiers {
                let exact = ty.is_quantized();
                let c = compute(tier, 2);
                let all = product(&c, &packed, &x, m);
                if exact {
                    assert_eq!(all, want, "{ty} {tier} {n}x{k}");
                } else {
                    for (a, b) in all.iter().zip(&want) {
                        assert!(
                            (a - b).abs() <= 0.02 * (k as f32).sqrt(),
                            "{ty} {tier}: {a} for {b}"
                        );
                    }
                }
                for m in [1, 2, 3, 4, 5, 7, 8, 9, 16, 17] {
                    let y = product(&c, &packed, &x[..m * k], m);
                    assert_eq!(y, all[..m * n], "{ty} {tier} {n}x{k} m={m}");
                }
                assert_eq!(product(&c, &raw, &x[..5 * k], 5), all[..5 * n], "{ty} raw");
            }
        }
    }
}

#[test]
fn non_finite_activations_give_nan() {
    let mut rng = Rng(77);
    for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
        let c = compute(tier, 1);
        let (n, k) = (16, 256);
        for ty in [GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::Q6_K] {
            let bytes = random_weights(ty, n, k, &mut rng);
            let w = Weights::raw(ty, n, k, 1, Bytes::from_vec(bytes)).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1.0; 2 * k];
                x[5] = bad;
                let y = product(&c, &w, &x, 2);
                assert!(y[..n].iter().all(|v| v.is_nan()), "{tier} {ty} {bad}");
                assert!(y[n..].iter().all(|v| v.is_finite()));
            }
            assert_eq!(product(&c, &w, &vec![1e-31; k], 1), vec![0.0; n]);
            assert!(product(&c, &w, &[], 0).is_empty());
        }
    }
}

#[test]
fn experts_equal_dense_products() {
    let mut rng = Rng(4242);
    let (experts, used, k, ff, n) = (6, 3, 256, 96, 40);
    let sets = [
        (GgmlType::Q4_0, GgmlType::Q4_0, GgmlType::Q8_0, 96),
        (GgmlType::Q4_K, GgmlType::Q4_K, GgmlType::Q6_K, 256),
        (GgmlType::BF16, GgmlType::BF16, GgmlType::BF16, 56),
        (GgmlType::F16, GgmlType::Q8_0, GgmlType::F32, 40),
    ];
    let _ = ff;
    for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
        let c = compute(tier, 2);
        for (gate_ty, up_ty, down_ty, ff) in sets {
            let mut stack = |ty, n, k| random_weights(ty, experts * n, k, &mut rng);
            let (gate, up, down) = (
                stack(gate_ty, ff, k),
                stack(up_ty, ff, k),
                stack(down_ty, n, ff),
            );
            let m = 21;
            let x: Vec<f32> = (0..m * k).map(|_| rng.float()).collect();
            let logits: Vec<f32> = (0..m * experts).map(|_| rng.float() * 4.0).collect();
            let whole = |ty, n, k, b: &[u8]| {
                Weights::raw(ty, n, k, experts, Bytes::from_vec(b.to_vec()))
                    .unwrap()
                    .pack(&c.pool)
            };
            let one = |ty, n, k, b: &[u8], e: usize| {
                let len = b.len() / experts;
                let bytes = Bytes::from_vec(b[e * len..(e + 1) * len].to_vec());
                Weights::raw(ty, n, k, 1, bytes).unwrap()
            };
            let (wg, wu, wd) = (
                whole(gate_ty, ff, k, &gate),
                whole(up_ty, ff, k, &up),
                whole(down_ty, n, ff, &down),
            );
            let options = RouteOptions {
                used,
                normalize: true,
                scale: 1.0,
            };
            let mut scratch = MoeScratch::default();
            let mut run = |m: usize| {
                let routing = c.route(&logits[..m * experts], experts, &options);
                let mut acts = Acts::new();
                c.prepare(&mut acts, &x[..m * k], m, k, c.expert_forms(m, &wg, &wu));
                let mut out = vec![f32::NAN; m * n];
                c.moe_ffn(&acts, &routing, &wg, &wu, &wd, &mut scratch, &mut out);
                (routing, out)
            };
            let (routing, got) = run(m);
            for t in 0..m {
                let mut want = vec![0f32; n];
                for r in 0..used {
                    let e = routing.ids[t * used + r] as usize;
                    let x = &x[t * k..(t + 1) * k];
                    let (g, u) = (one(gate_ty, ff, k, &gate, e), one(up_ty, ff, k, &up, e));
                    let d = one(down_ty, n, ff, &down, e);
                    let mut acts = Acts::new();
                    c.prepare(&mut acts, x, 1, k, c.forms(1, [&g, &u]));
                    let mut hidden = Acts::new();
                    c.gate_up(&acts, &g, &u, &d, &mut hidden);
                    let mut y = vec![0.0; n];
                    c.matmul(&d, &hidden, &mut y);
                    for (w, y) in want.iter_mut().zip(y) {
                        *w += routing.weights[t * used + r] * y;
                    }
                }
                assert_eq!(got[t * n..(t + 1) * n], want, "{tier} {gate_ty} token {t}");
            }
            for few in [1, 2, 9] {
                assert_eq!(run(few).1, got[..few * n], "{tier} {gate_ty} m={few}");
            }
        }
    }
}
