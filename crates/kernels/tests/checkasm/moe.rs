//! Routing, and feed-forward networks: dense and by experts.

use crate::{
    Random,
    data::{Codes, raw, weight_bytes},
    matmul::compute,
    per_tier,
};
use libtest_mimic::{Failed, Trial};
use tegula_gguf::GgmlType;
use tegula_kernels::{
    Acts, Compute, Tier, Weights, check,
    ops::moe::{MoeScratch, RouteOptions, Routing},
};

pub fn trials(trials: &mut Vec<Trial>) {
    trials.push(Trial::test("route", route));
    per_tier(trials, "gate_up", gate_up);
    for types in SETS {
        let name = format!("experts::{}_{}_{}", types.0, types.1, types.2);
        per_tier(trials, &name, move |tier| experts(tier, types));
    }
}

/// Types of gate, up and down, and the width of the intermediate.
type Types = (GgmlType, GgmlType, GgmlType, usize);

const SETS: [Types; 5] = [
    (GgmlType::Q4_0, GgmlType::Q4_0, GgmlType::Q8_0, 96),
    (GgmlType::Q4_K, GgmlType::Q4_K, GgmlType::Q6_K, 256),
    (GgmlType::MXFP4, GgmlType::MXFP4, GgmlType::MXFP4, 32),
    (GgmlType::BF16, GgmlType::BF16, GgmlType::BF16, 56),
    (GgmlType::F16, GgmlType::Q8_0, GgmlType::F32, 40),
];

/// Against softmax and sorting, in f64.
fn route() -> Result<(), Failed> {
    let mut random = Random::new(31);
    for (experts, m) in [(1, 3), (8, 1), (8, 40), (16, 200), (128, 33)] {
        let mut logits = random.normals(m * experts);
        logits.iter_mut().for_each(|l| *l *= 3.0);
        // Ties, and logits that overflow an exponential.
        logits[experts - 1] = logits[0];
        logits[(m - 1) * experts] = 500.0;
        for used in [1, 2, 8].into_iter().filter(|&used| used <= experts) {
            for normalize in [false, true] {
                let options = RouteOptions {
                    used,
                    normalize,
                    scale: 2.5,
                };
                let got = compute(Tier::Scalar, 3).route(&logits, experts, &options);
                let mut want = Routing {
                    used,
                    ..Routing::default()
                };
                for row in logits.chunks_exact(experts) {
                    let mut order: Vec<usize> = (0..experts).collect();
                    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
                    order.truncate(used);
                    let largest = f64::from(row[order[0]]);
                    let weight = |&l: &f32| (f64::from(l) - largest).exp();
                    let all: f64 = row.iter().map(weight).sum();
                    let chosen: f64 = order.iter().map(|&e| weight(&row[e])).sum();
                    let total = if normalize { chosen } else { all };
                    for e in order {
                        want.ids.push(e as u32);
                        want.weights.push((2.5 * weight(&row[e]) / total) as f32);
                    }
                }
                let what = format!("{used} of {experts}, normalize {normalize}");
                if got.ids != want.ids || got.used != used {
                    return Err(format!("{what}: other experts").into());
                }
                let within = check::relative(&want.weights, 1e-5, 1e-6);
                check::equal(&got.weights, &want.weights, within, |i| {
                    format!("{what}: {i}")
                })?;
            }
        }
    }
    Ok(())
}

/// Dense gate and up in one go equal two products, SwiGLU, and a third product.
fn gate_up(tier: Tier) -> Result<(), Failed> {
    let mut random = Random::new(32);
    for (gate, up, down, ff) in SETS {
        let (k, n) = (256, 33);
        let mut matrix = |ty, n, k| {
            let bytes = weight_bytes(ty, n, k, Codes::Usual, &mut random);
            raw(ty, n, k, 1, &bytes)
        };
        // Whole units of 32, so that the fused SwiGLU sees the same vectors.
        let ff = ff.next_multiple_of(32);
        let (gate, up, down) = (matrix(gate, ff, k), matrix(up, ff, k), matrix(down, n, ff));
        for (threads, m) in [(1, 1), (2, 1), (3, 7), (2, 18)] {
            let c = compute(tier, threads);
            let x = random.normals(m * k);
            let mut acts = Acts::new();
            c.prepare(&mut acts, &x, m, k, c.forms(m, [&gate, &up]));
            let mut hidden = Acts::new();
            c.gate_up(&acts, &gate, &up, &down, &mut hidden);
            let mut got = vec![f32::NAN; m * n];
            c.matmul(&down, &hidden, &mut got);

            let (mut g, mut u) = (vec![0.0; m * ff], vec![0.0; m * ff]);
            c.matmul_many(&mut [(&gate, &mut g), (&up, &mut u)], &acts);
            let mut h = vec![0.0; m * ff];
            c.swiglu(&g, &u, &mut h);
            c.prepare(&mut hidden, &h, m, ff, c.forms(m, [&down]));
            let mut want = vec![0.0; m * n];
            c.matmul(&down, &hidden, &mut want);
            check::equal(
                &got,
                &want,
                |_| 0.0,
                |i| format!("{gate:?} {m} tokens: {i}"),
            )?;
        }
    }
    Ok(())
}

const EXPERTS: usize = 6;
const USED: usize = 3;

/// A stack of experts equals, bit for bit, each token's experts run as dense networks; the
/// same for every batch, encoding and number of threads.
fn experts(tier: Tier, (gate_ty, up_ty, down_ty, ff): Types) -> Result<(), Failed> {
    let mut random = Random::new(33);
    let (k, n, m) = (256, 40, 21);
    let one = compute(tier, 1);
    let mut matrix = |ty, n, k| {
        let bytes = weight_bytes(ty, EXPERTS * n, k, Codes::Usual, &mut random);
        let alone: Vec<_> = bytes
            .chunks_exact(bytes.len() / EXPERTS)
            .map(|bytes| raw(ty, n, k, 1, bytes))
            .collect();
        let stack = raw(ty, n, k, EXPERTS, &bytes);
        (stack.pack(&one.pool), stack, alone)
    };
    let (gate, up, down) = (
        matrix(gate_ty, ff, k),
        matrix(up_ty, ff, k),
        matrix(down_ty, n, ff),
    );
    let x = random.normals(m * k);
    let mut logits = random.normals(m * EXPERTS);
    // An expert that nobody wants.
    logits.iter_mut().step_by(EXPERTS).for_each(|l| *l = -100.0);
    let options = RouteOptions {
        used: USED,
        normalize: true,
        scale: 1.0,
    };
    let run = |c: &Compute, m: usize, w: [&Weights; 3]| {
        let routing = c.route(&logits[..m * EXPERTS], EXPERTS, &options);
        let mut out = vec![0.0; m * n];
        let mut scratch = MoeScratch::default();
        c.moe_ffn(
            &x[..m * k],
            &routing,
            w[0],
            w[1],
            w[2],
            &mut scratch,
            &mut out,
        );
        (routing, out)
    };
    let (packed, plain) = ([&gate.0, &up.0, &down.0], [&gate.1, &up.1, &down.1]);
    let (routing, got) = run(&one, m, packed);
    // Of a token, those of its experts that are in `kept`.
    let dense = |t: usize, kept: &[u32]| {
        let mut want = vec![0f32; n];
        for choice in t * USED..(t + 1) * USED {
            let e = routing.ids[choice] as usize;
            if !kept.contains(&(e as u32)) {
                continue;
            }
            let (g, u, d) = (&gate.2[e], &up.2[e], &down.2[e]);
            let mut acts = Acts::new();
            one.prepare(&mut acts, &x[t * k..][..k], 1, k, one.forms(1, [g, u]));
            let mut hidden = Acts::new();
            one.gate_up(&acts, g, u, d, &mut hidden);
            let mut y = vec![0.0; n];
            one.matmul(d, &hidden, &mut y);
            for (want, y) in want.iter_mut().zip(y) {
                *want += routing.weights[choice] * y;
            }
        }
        want
    };
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    for t in 0..m {
        let (got, want) = (&got[t * n..(t + 1) * n], dense(t, &all));
        check::equal(got, &want, |_| 0.0, |i| format!("token {t} row {i}"))?;
    }
    for kept in [&[1, 2, 5][..], &[4], &[]] {
        let (mut out, mut scratch) = (vec![0.0; m * n], MoeScratch::default());
        let [gate, up, down] = packed;
        let part = routing.only(kept);
        compute(tier, 2).moe_ffn(&x, &part, gate, up, down, &mut scratch, &mut out);
        for t in 0..m {
            let (got, want) = (&out[t * n..(t + 1) * n], dense(t, kept));
            let what = |i| format!("{kept:?} alone, token {t} row {i}");
            check::equal(got, &want, |_| 0.0, what)?;
        }
    }
    for threads in [2, 3] {
        let c = compute(tier, threads);
        for few in [1, 2, 9, m] {
            for weights in [packed, plain] {
                if run(&c, few, weights).1 != got[..few * n] {
                    let encoding = weights[0].encoding();
                    let how = format!("{few} tokens, {threads} threads, {encoding:?}");
                    return Err(format!("{how}: not as in a batch of {m}").into());
                }
            }
        }
    }
    Ok(())
}
