//! What chooses: routers and the largest logit.

use super::{Bench, EXACT, Rng, both, raw};
use libtest_mimic::Failed;
use tegula_cuda::CudaDevice;
use tegula_gguf::GgmlType;
use tegula_kernels::{
    device::{Device, Norm, Product},
    ops::moe::RouteOptions,
};

/// A norm, a router's product and the choice, again and again: what the kernel leaves must be as it
/// was found.
pub fn routers(gpu: &CudaDevice) -> Result<(), Failed> {
    use GgmlType as T;
    for (ty, k) in [
        (T::F32, 2048),
        (T::F32, 100),
        (T::BF16, 96),
        (T::F16, 64),
        (T::Q8_0, 64),
    ] {
        for (experts, used, m) in [
            (128, 8, 1),
            (16, 2, 1),
            (1, 1, 1),
            (200, 32, 1),
            (300, 3, 1),
            (40, 4, 3),
        ] {
            let what = format!("router {ty} {experts}x{k}, {used}, {m} tokens");
            let choose = |d: &Bench<'_>| {
                let rng = &mut Rng(14);
                let w = d.load(&raw(rng, ty, experts, k, 1));
                let (x, scale) = (d.put(&rng.floats(m * k)), d.put(&rng.floats(k)));
                let (input, logits) = (d.poisoned(m * k), d.poisoned(m * experts));
                let norm = Norm {
                    x: &x,
                    w: &scale,
                    eps: 1e-6,
                    k,
                    out: &input,
                };
                let routing = d.routing(m, used);
                let options = RouteOptions {
                    used,
                    normalize: experts != 16,
                    scale: 1.5,
                };
                let (mut all, mut chosen) = (Vec::new(), Vec::new());
                for _ in 0..3 {
                    let router = Product {
                        w: &w,
                        out: &logits,
                        bias: None,
                        add: false,
                    };
                    d.0.norm_route(&norm, router, m, &options, &routing)
                        .unwrap();
                    let ids = d.get(&routing.ids, m * used);
                    // Experts that are nearly alike may be chosen the other way round.
                    let mut ids: Vec<u32> = ids.iter().map(|v| v.to_bits()).collect();
                    ids.chunks_mut(used).for_each(<[u32]>::sort_unstable);
                    chosen.extend(ids.iter().map(|id| *id as f32));
                    all.extend(d.get(&routing.weights, m * used));
                    all.extend(d.get(&logits, m * experts));
                    all.extend(d.get(&input, m * k));
                }
                (chosen, all)
            };
            both(gpu, &what, 0.0, |d| choose(d).0)?;
            both(gpu, &what, 1e-3, |d| choose(d).1)?;
        }
    }
    Ok(())
}

/// Choices by given logits, and the likeliest of many.
pub fn routing(gpu: &CudaDevice) -> Result<(), Failed> {
    for (m, experts, used) in [
        (1, 1, 1),
        (5, 16, 4),
        (9, 128, 8),
        (3, 256, 32),
        (2, 70, 40),
        (2, 300, 3),
    ] {
        for normalize in [true, false] {
            both(gpu, &format!("{used} of {experts}"), EXACT, |d| {
                let rng = &mut Rng(4);
                let mut logits = rng.floats(m * experts);
                if experts > 4 {
                    // Ties go to the lower number, and what is no choice comes last.
                    (logits[1], logits[3], logits[0]) = (2.0, 2.0, f32::NEG_INFINITY);
                }
                let routing = d.routing(m, used);
                let options = RouteOptions {
                    used,
                    normalize,
                    scale: 1.5,
                };
                d.0.route(&d.put(&logits), m, experts, &options, &routing)
                    .unwrap();
                let ids = d.get(&routing.ids, m * used);
                let mut all: Vec<f32> = ids.iter().map(|v| v.to_bits() as f32).collect();
                all.extend(d.get(&routing.weights, m * used));
                all
            })?;
        }
    }
    let bench = Bench(gpu);
    let mut x = Rng(5).floats(3 * 70_001);
    (x[123], x[456], x[70_001 + 9], x[2 * 70_001]) = (7.0, 7.0, f32::NAN, 9.0);
    let out = bench.poisoned(3);
    gpu.argmax(&bench.put(&x), 3, 70_001, &out)?;
    let got: Vec<u32> = bench.get(&out, 3).iter().map(|v| v.to_bits()).collect();
    let best = |row: &[f32]| {
        let mut at = 0;
        (0..row.len()).for_each(|i| {
            if row[i] > row[at] {
                at = i
            }
        });
        at as u32
    };
    let want: Vec<u32> = x.chunks(70_001).map(best).collect();
    if got != want {
        return Err(format!("argmax: {got:?} and not {want:?}").into());
    }
    Ok(())
}
