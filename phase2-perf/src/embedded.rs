//! The embedded model, end to end: small enough to measure anywhere, and too small to say
//! anything about memory bandwidth.

use std::sync::{Arc, atomic::AtomicBool};

use tegula_engine::{ContextOptions, LoadOptions, Model, Source};
use tegula_kernels::Tier;
use tegula_lab::{Env, Series};

use crate::bench::{Options, Test, measure};

/// From the workspace's root.
pub(crate) const MODEL: &str = "crates/tegula/assets/ferrous-moe-21m-Q4_0.gguf";

const REPETITIONS: usize = 5;

/// A prompt of 512 tokens and 64 generated ones at every tier that the CPU has.
///
/// # Errors
/// Says what can't be loaded or run.
pub fn tiers(env: &Env) -> Result<Vec<Series>, String> {
    let mut series = Vec::new();
    for tier in Tier::ALL.into_iter().filter(|tier| tier.available()) {
        let load = LoadOptions {
            tier,
            ..LoadOptions::new(Source::Path(env.root.join(MODEL)))
        };
        let model = Model::load(&load, &mut |_| {}).map_err(|e| e.to_string())?;
        let model = Arc::new(model);
        for (prompt, generate) in [(512, 0), (0, 64)] {
            let test = Test {
                prompt,
                generate,
                depth: 0,
            };
            let options = Options {
                context: ContextOptions::default(),
                repetitions: REPETITIONS,
                warm_up: true,
                profile: false,
            };
            let never = AtomicBool::new(false);
            let samples = measure(&model, test, &options, &never, &mut |_| {})
                .map_err(|e| format!("{test}, {tier}: {e}"))?;
            series.push(Series {
                name: format!("{test}, {tier}, {} threads", load.threads),
                unit: "t/s".to_owned(),
                samples: samples.tps(),
            });
        }
    }
    Ok(series)
}
