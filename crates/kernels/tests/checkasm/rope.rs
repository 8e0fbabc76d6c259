//! Norm and rotation of heads against both written down directly, in f64.

use crate::{Random, matmul::compute, per_tier};
use libtest_mimic::{Failed, Trial};
use tegula_kernels::{
    Tier, check,
    ops::{Heads, RopeParams, RopeStyle, RopeTable, Yarn},
};

pub fn trials(trials: &mut Vec<Trial>) {
    per_tier(trials, "heads", heads);
}

/// Plain and scaled frequencies for `dims` rotating dimensions.
fn scalings(style: RopeStyle, dims: usize) -> Vec<RopeParams> {
    let plain = RopeParams::new(style, dims, 10_000.0);
    let yarn = Yarn {
        factor: 4.0,
        original_context: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.0,
    };
    let divisors: Vec<f32> = (0..dims / 2).map(|i| 1.0 + i as f32).collect();
    vec![
        plain.clone(),
        plain.clone().linear(4.0),
        plain.clone().llama3(8.0, 1.0, 4.0, 4096.0),
        plain.clone().yarn(10_000.0, &yarn),
        plain.divided_by(&divisors).expect("one divisor per pair"),
    ]
}

fn heads(tier: Tier) -> Result<(), Failed> {
    let mut random = Random::new(41);
    // The whole head, a part of it, one pair; tokens that share out and that do not.
    for (dim, dims, heads) in [(64, 64, 3), (80, 32, 2), (128, 128, 8), (6, 2, 1)] {
        for style in [RopeStyle::Normal, RopeStyle::Neox] {
            for params in scalings(style, dims) {
                for positions in [vec![0], vec![7, 3, 3, 40_000], (100..150).collect()] {
                    let x = random.normals(positions.len() * heads * dim);
                    let keys = random.normals(positions.len() * dim);
                    let norm = random.normals(dim);
                    let mut table = RopeTable::default();
                    table.fill(&params, positions.iter().copied());
                    let (mut got, mut want) = (x.clone(), x.clone());
                    let (mut got_keys, mut want_keys) = (keys.clone(), keys.clone());
                    let both = [(&mut got, heads, None), (&mut got_keys, 1, Some(&norm[..]))];
                    let both = both.map(|(x, heads, norm)| Heads { x, heads, norm });
                    compute(tier, 2).heads(both, dim, 1e-6, style, &table);
                    for (key, &position) in want_keys.chunks_exact_mut(dim).zip(&positions) {
                        let squares: f64 = key.iter().map(|x| f64::from(*x).powi(2)).sum();
                        let scale = 1.0 / (squares / dim as f64 + 1e-6).sqrt();
                        for (x, w) in key.iter_mut().zip(&norm) {
                            *x = (f64::from(*x) * scale * f64::from(*w)) as f32;
                        }
                        rotate(key, position, &params);
                    }
                    let largest = norm.iter().fold(0f32, |m, x| m.max(x.abs()));
                    check::equal(
                        &got_keys,
                        &want_keys,
                        |_| 1e-5 * largest,
                        |i| format!("keys, {style:?} {dims} of {dim}: {i}"),
                    )?;
                    for (i, head) in want.chunks_exact_mut(dim).enumerate() {
                        rotate(head, positions[i / heads], &params);
                    }
                    let magnitude = |i: usize| {
                        let head = &x[i / dim * dim..][..dim];
                        head.iter().map(|x| x.abs()).fold(0.0, f32::max)
                    };
                    check::equal(
                        &got,
                        &want,
                        |i| 1e-6 * magnitude(i),
                        |i| format!("{style:?} {dims} of {dim}: {i}"),
                    )?;
                }
            }
        }
    }
    Ok(())
}

fn rotate(head: &mut [f32], position: usize, params: &RopeParams) {
    let pairs = params.frequencies.len();
    for (i, &frequency) in params.frequencies.iter().enumerate() {
        let (a, b) = match params.style {
            RopeStyle::Normal => (2 * i, 2 * i + 1),
            RopeStyle::Neox => (i, i + pairs),
        };
        // The angle is a product of f32 numbers, as models were trained with.
        let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
        let (x, y) = (f64::from(head[a]), f64::from(head[b]));
        let magnitude = f64::from(params.magnitude);
        head[a] = (magnitude * (x * cos - y * sin)) as f32;
        head[b] = (magnitude * (x * sin + y * cos)) as f32;
    }
}
