//! The matrix of task 1.8: every way to load a model, with AMX and without.

use std::{collections::BTreeMap, path::Path};

use tegula_engine::{LoadOptions, plan::Device};
use tegula_kernels::{Amx, Tier};

use crate::probe::{Seen, options, run, trap};

/// Everything that the plan of a tensor says except which kernel reads it, and why.
fn places(seen: &Seen) -> Vec<impl PartialEq> {
    let place = |p: &tegula_engine::plan::Placement| {
        (p.tensor.clone(), p.device, p.buffer, p.encoding, p.bytes)
    };
    seen.plan.placements.iter().map(place).collect()
}

/// Runs the CPU's part: tiers × packed or raw × mapped or read × one or two threads × `--amx`
/// or not. Returns the number of cells.
///
/// # Errors
/// Names the first cell where something doesn't hold.
pub(crate) fn on_the_cpu(model: &Path, amx: Amx) -> Result<usize, String> {
    trap()?;
    let mut cells = 0;
    // Logits by tier and by whether there was AMX: nothing else may change them.
    let mut logits = BTreeMap::new();
    for tier in Tier::ALL.into_iter().filter(|tier| tier.available()) {
        for (repack, mmap, threads) in [
            (true, true, 1),
            (true, true, 2),
            (true, false, 2),
            (false, true, 1),
            (false, true, 2),
            (false, false, 2),
        ] {
            let cell = |amx: Option<Amx>| {
                let load = LoadOptions {
                    repack,
                    mmap,
                    ..options(model, tier, amx, threads)
                };
                let name = format!(
                    "{tier}, repack {repack}, mmap {mmap}, {threads} threads, AMX {}",
                    amx.is_some()
                );
                let seen = run(&load).map_err(|e| format!("{name}: {e}"))?;
                Ok::<_, String>((name, seen))
            };
            let without = cell(None)?;
            let with = (tier > Tier::Scalar).then(|| cell(Some(amx))).transpose()?;
            if let Some(with) = &with
                && places(&with.1) != places(&without.1)
            {
                return Err(format!("{}: other places than without", with.0));
            }
            for (on, (name, seen)) in [(false, Some(without)), (true, with)]
                .into_iter()
                .filter_map(|(on, cell)| Some((on, cell?)))
            {
                let wrong = |what: &str| Err(format!("{name}: {what}"));
                if seen.permission {
                    return wrong("the permission is set");
                }
                if (seen.instructions > 0) != on {
                    return wrong(&format!("{} AMX instructions", seen.instructions));
                }
                if seen.plan.placements.iter().any(|p| p.device != Device::Cpu) {
                    return wrong("a tensor on another device");
                }
                let first = logits.entry((tier, on)).or_insert_with(|| seen.bits());
                if *first != seen.bits() {
                    return wrong("other logits than in the first cell of the tier");
                }
                cells += 1;
            }
        }
    }
    Ok(cells)
}
