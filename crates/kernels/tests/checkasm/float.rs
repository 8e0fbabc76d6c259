//! Norm, sum, SwiGLU, softmax.

use crate::{Random, guard::Guarded, per_tier};
use libtest_mimic::{Failed, Trial};
use tegula_kernels::{Kernels, Tier, check};

/// Vector lengths ± 1, odd ones, and rows as models have them.
const LENGTHS: [usize; 18] = [
    1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 1000, 2048, 4097,
];

pub fn trials(trials: &mut Vec<Trial>) {
    per_tier(trials, "rms_norm", rms_norm);
    per_tier(trials, "add_assign", add_assign);
    per_tier(trials, "swiglu", swiglu);
    per_tier(trials, "softmax", softmax);
    per_tier(trials, "gather", gather);
}

fn each(run: impl Fn(usize, &mut Random) -> Result<(), Failed>) -> Result<(), Failed> {
    LENGTHS
        .iter()
        .try_for_each(|&n| run(n, &mut Random::new(n as u64)))
}

fn rms_norm(tier: Tier) -> Result<(), Failed> {
    let float = Kernels::for_tier(tier).float;
    each(|n, random| {
        let (x, w) = (
            Guarded::at_end(&random.normals(n)),
            Guarded::at_start(&random.normals(n)),
        );
        let mut got = Guarded::at_end(&vec![7.0; n]);
        // SAFETY: the tier is available, else this trial is ignored.
        unsafe { (float.rms_norm)(&x, &w, 1e-6, &mut got) };
        Ok(check::rms_norm(&x, &w, 1e-6, &got)?)
    })
}

fn add_assign(tier: Tier) -> Result<(), Failed> {
    let float = Kernels::for_tier(tier).float;
    each(|n, random| {
        let (x, y) = (Guarded::at_end(&random.normals(n)), random.normals(n));
        let mut got = Guarded::at_end(&y);
        // SAFETY: as above.
        unsafe { (float.add_assign)(&mut got, &x) };
        Ok(check::add_assign(&y, &x, &got)?)
    })
}

fn swiglu(tier: Tier) -> Result<(), Failed> {
    let float = Kernels::for_tier(tier).float;
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
        let mut got = Guarded::at_end(&vec![7.0; n]);
        // SAFETY: as above.
        unsafe { (float.swiglu)(&gate, &up, &mut got) };
        Ok(check::swiglu(&gate, &up, &got)?)
    })
}

fn softmax(tier: Tier) -> Result<(), Failed> {
    let float = Kernels::for_tier(tier).float;
    each(|n, random| {
        let x: Vec<_> = random.normals(n).iter().map(|x| x * 10.0).collect();
        let mut got = Guarded::at_end(&x);
        // SAFETY: as above.
        unsafe { (float.softmax)(&mut got) };
        let total: f32 = got.iter().sum();
        if (total - 1.0).abs() > 1e-4 {
            return Err(format!("softmax {n} sums to {total}").into());
        }
        Ok(check::softmax(&x, &got)?)
    })
}

/// Whole strips and part of one, next to each other and far apart, put and added.
fn gather(tier: Tier) -> Result<(), Failed> {
    let float = Kernels::for_tier(tier).float;
    each(|n, random| {
        for step in [16, 48] {
            let sums = random.normals((n.div_ceil(16) - 1) * step + 16);
            let (sums, y) = (Guarded::at_end(&sums), random.normals(n));
            for adds in [false, true] {
                let mut got = Guarded::at_end(&y);
                // SAFETY: as above.
                unsafe { (float.gather)(&sums, step, &mut got, adds) };
                check::gather(&sums, step, adds.then_some(&y[..]), &got)?;
            }
        }
        Ok(())
    })
}
