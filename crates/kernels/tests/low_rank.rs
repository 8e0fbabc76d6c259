//! Products with low-rank additions, against sums in f64: plain ones, networks, and experts.

use tegula_gguf::{Bytes, GgmlType};
use tegula_kernels::{
    Acts, Compute, PoolConfig, Tier, Weights,
    ops::moe::{MoeScratch, Routing},
    weights::WeightsError,
};

/// Differences of f32 sums, by the largest result.
const WITHIN: f64 = 2e-5;

struct Random(u32);

impl Random {
    fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        let mut one = || {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            scale * ((self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..len).map(|_| one()).collect()
    }

    fn matrix(&mut self, n: usize, k: usize, experts: usize) -> Vec<f32> {
        self.values(n * k * experts, (3.0 / k as f32).sqrt())
    }
}

fn weights(n: usize, k: usize, experts: usize, values: &[f32]) -> Weights {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Weights::raw(GgmlType::F32, n, k, experts, Bytes::from_vec(bytes)).unwrap()
}

/// Matrices with adapters of these ranks, and what each is as a whole, `[experts][n][k]`.
fn adapted(
    random: &mut Random,
    (n, k, experts): (usize, usize, usize),
    ranks: &[usize],
) -> (Weights, Vec<f64>) {
    let w = random.matrix(n, k, experts);
    let mut whole: Vec<f64> = w.iter().map(|w| f64::from(*w)).collect();
    let mut held = weights(n, k, experts, &w);
    for &rank in ranks {
        let (a, b) = (
            random.matrix(rank, k, experts),
            random.matrix(n, rank, experts),
        );
        let scale = 0.75;
        for (at, w) in whole.iter_mut().enumerate() {
            let (e, row, col) = (at / (n * k), at / k % n, at % k);
            let one =
                |r| f64::from(b[(e * n + row) * rank + r]) * f64::from(a[(e * rank + r) * k + col]);
            *w += f64::from(scale) * (0..rank).map(one).sum::<f64>();
        }
        let (a, b) = (weights(rank, k, experts, &a), weights(n, rank, experts, &b));
        held.adapt(a, b, scale).unwrap();
    }
    (held, whole)
}

/// One token with matrix `expert`.
fn product(w: &[f64], n: usize, expert: usize, x: &[f64]) -> Vec<f64> {
    let rows = w.chunks_exact(x.len()).skip(expert * n).take(n);
    rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum())
        .collect()
}

fn network(
    [gate, up, down]: [&[f64]; 3],
    ff: usize,
    n: usize,
    expert: usize,
    x: &[f64],
) -> Vec<f64> {
    let (g, u) = (product(gate, ff, expert, x), product(up, ff, expert, x));
    let hidden: Vec<f64> = g
        .iter()
        .zip(&u)
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        .collect();
    product(down, n, expert, &hidden)
}

fn near(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f64, |m, v| m.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let apart = (f64::from(*got) - want).abs();
        assert!(apart <= WITHIN * largest, "{what}, {i}: {got}, {want}");
    }
}

fn doubles(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn each_tier(test: impl Fn(Tier, &Compute)) {
    for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
        test(tier, &Compute::new(tier, PoolConfig::new(3)));
    }
}

#[test]
fn products_add_what_each_matrix_has() {
    each_tier(|tier, c| {
        let random = &mut Random(1);
        for (n, k, ranks) in [(17, 40, &[1][..]), (48, 64, &[5, 16]), (130, 33, &[33])] {
            let (first, first_whole) = adapted(random, (n, k, 1), ranks);
            let (plain, plain_whole) = adapted(random, (16, k, 1), &[]);
            let (last, last_whole) = adapted(random, (n + 3, k, 1), &[8]);
            for m in [1, 2, 9, 40, 700] {
                let x = random.values(m * k, 1.0);
                let mut acts = Acts::new();
                c.prepare(&mut acts, &x, m, k, c.forms(m, [&first, &plain, &last]));
                let [mut a, mut b, mut d] = [n, 16, n + 3].map(|n| vec![f32::NAN; m * n]);
                c.matmul_many(
                    &mut [(&first, &mut a), (&plain, &mut b), (&last, &mut d)],
                    &acts,
                );
                let of = |w: &[f64], n| -> Vec<f64> {
                    let tokens = x.chunks_exact(k);
                    tokens.flat_map(|x| product(w, n, 0, &doubles(x))).collect()
                };
                let what = format!("{tier}, {n} x {k}, {m} tokens");
                near(&what, &a, &of(&first_whole, n));
                near(&what, &b, &of(&plain_whole, 16));
                near(&what, &d, &of(&last_whole, n + 3));
                // The same again on top of that, all of it.
                c.matmul_add(&first, &acts, &mut a);
                let twice: Vec<f64> = of(&first_whole, n).iter().map(|v| 2.0 * v).collect();
                near(&what, &a, &twice);
            }
        }
    });
}

#[test]
fn networks_and_experts_add_them_before_and_behind_the_activation() {
    each_tier(|tier, c| {
        let random = &mut Random(2);
        let (k, ff, n) = (40, 56, 33);
        // Gate, up and down with adapters or without, in all ways.
        for case in 0..8 {
            let ranks = |i: usize| [&[][..], &[3, 8]][case >> i & 1];
            for experts in [1, 5] {
                let (gate, g) = adapted(random, (ff, k, experts), ranks(0));
                let (up, u) = adapted(random, (ff, k, experts), ranks(1));
                let (down, d) = adapted(random, (n, ff, experts), ranks(2));
                for m in [1, 2, 19] {
                    let x = random.values(m * k, 1.0);
                    let tokens: Vec<Vec<f64>> = x.chunks_exact(k).map(doubles).collect();
                    let what = format!("{tier}, case {case}, {experts} experts, {m} tokens");
                    let of = |e, x: &[f64]| network([&g, &u, &d], ff, n, e, x);
                    if experts == 1 {
                        let (mut acts, mut hidden) = (Acts::new(), Acts::new());
                        c.prepare(&mut acts, &x, m, k, c.forms(m, [&gate, &up]));
                        c.gate_up(&acts, &gate, &up, &down, &mut hidden);
                        let mut got = vec![f32::NAN; m * n];
                        c.matmul(&down, &hidden, &mut got);
                        let want: Vec<f64> = tokens.iter().flat_map(|x| of(0, x)).collect();
                        near(&what, &got, &want);
                        continue;
                    }
                    // Experts with many tokens, with one, and with none.
                    let routing = Routing {
                        used: 2,
                        ids: (0..m as u32).flat_map(|t| [t % 3, 3]).collect(),
                        weights: random.values(2 * m, 1.0),
                    };
                    let mut got = vec![0.0; m * n];
                    let scratch = &mut MoeScratch::default();
                    c.moe_ffn(&x, &routing, &gate, &up, &down, scratch, &mut got);
                    let mut want = vec![0f64; m * n];
                    for (t, x) in tokens.iter().enumerate() {
                        for choice in 2 * t..2 * t + 2 {
                            let weight = f64::from(routing.weights[choice]);
                            let y = of(routing.ids[choice] as usize, x);
                            let to = &mut want[t * n..(t + 1) * n];
                            to.iter_mut().zip(y).for_each(|(to, y)| *to += weight * y);
                        }
                    }
                    near(&what, &got, &want);
                }
            }
        }
    });
}

#[test]
fn factors_that_do_not_fit_are_refused() {
    let of =
        |n: usize, k: usize, experts: usize| weights(n, k, experts, &vec![0.0; n * k * experts]);
    for (a, b) in [
        (of(4, 31, 2), of(8, 4, 2)),
        (of(4, 32, 2), of(9, 4, 2)),
        (of(4, 32, 2), of(8, 5, 2)),
        (of(4, 32, 1), of(8, 4, 2)),
        (of(0, 32, 2), of(8, 0, 2)),
    ] {
        let refused = of(8, 32, 2).adapt(a, b, 1.0).unwrap_err();
        assert!(matches!(refused, WeightsError::LowRank { .. }), "{refused}");
    }
    assert!(of(8, 32, 2).adapt(of(4, 32, 2), of(8, 4, 2), 1.0).is_ok());
}
