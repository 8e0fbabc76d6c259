//! Norm, sum, SwiGLU, softmax.

use crate::{Random, close, guard::Guarded, per_tier};
use libtest_mimic::{Failed, Trial};
use tegula_kernels::Kernels;

/// Vector lengths ± 1, odd ones, and rows as models have them.
const LENGTHS: [usize; 18] = [
    1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 1000, 2048, 4097,
];

pub fn trials(trials: &mut Vec<Trial>) {
    per_tier(trials, "rms_norm", rms_norm);
    per_tier(trials, "add_assign", add_assign);
    per_tier(trials, "swiglu", swiglu);
    per_tier(trials, "softmax", softmax);
}

fn each(run: impl Fn(usize, &mut Random) -> Result<(), Failed>) -> Result<(), Failed> {
    LENGTHS
        .iter()
        .try_for_each(|&n| run(n, &mut Random::new(n as u64)))
}

fn rms_norm(tier: &Kernels, scalar: &Kernels) -> Result<(), Failed> {
    each(|n, random| {
        let (x, w) = (
            Guarded::at_end(&random.normals(n)),
            Guarded::at_start(&random.normals(n)),
        );
        let (mut got, mut want) = (Guarded::at_end(&vec![7.0; n]), vec![0.0; n]);
        // SAFETY: the tier is available, else this trial is ignored.
        unsafe {
            (tier.float.rms_norm)(&x, &w, 1e-6, &mut got);
            (scalar.float.rms_norm)(&x, &w, 1e-6, &mut want);
        }
        close(&format!("rms_norm {n}"), &got, &want, 4e-6, 1e-3)
    })
}

fn add_assign(tier: &Kernels, scalar: &Kernels) -> Result<(), Failed> {
    each(|n, random| {
        let (x, y) = (Guarded::at_end(&random.normals(n)), random.normals(n));
        let (mut got, mut want) = (Guarded::at_end(&y), y.clone());
        // SAFETY: as above.
        unsafe {
            (tier.float.add_assign)(&mut got, &x);
            (scalar.float.add_assign)(&mut want, &x);
        }
        close(&format!("add_assign {n}"), &got, &want, 0.0, 0.0)
    })
}

fn swiglu(tier: &Kernels, scalar: &Kernels) -> Result<(), Failed> {
    each(|n, random| {
        // Gates far out on both sides, where e^-x over- and underflows.
        let mut gate: Vec<_> = random.normals(n).iter().map(|x| x * 8.0).collect();
        for (i, x) in [-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]
            .into_iter()
            .enumerate()
        {
            if let Some(g) = gate.get_mut(i * 3) {
                *g = x;
            }
        }
        let (gate, up) = (Guarded::at_end(&gate), Guarded::at_end(&random.normals(n)));
        let (mut got, mut want) = (Guarded::at_end(&vec![7.0; n]), vec![0.0; n]);
        // SAFETY: as above.
        unsafe {
            (tier.float.swiglu)(&gate, &up, &mut got);
            (scalar.float.swiglu)(&gate, &up, &mut want);
        }
        close(&format!("swiglu {n}"), &got, &want, 2e-6, 1e-6)
    })
}

fn softmax(tier: &Kernels, scalar: &Kernels) -> Result<(), Failed> {
    each(|n, random| {
        let x: Vec<_> = random.normals(n).iter().map(|x| x * 10.0).collect();
        let (mut got, mut want) = (Guarded::at_end(&x), x.clone());
        // SAFETY: as above.
        unsafe {
            (tier.float.softmax)(&mut got);
            (scalar.float.softmax)(&mut want);
        }
        let total: f32 = got.iter().sum();
        if (total - 1.0).abs() > 1e-4 {
            return Err(format!("softmax {n} sums to {total}").into());
        }
        close(&format!("softmax {n}"), &got, &want, 4e-6, 1e-6)
    })
}
