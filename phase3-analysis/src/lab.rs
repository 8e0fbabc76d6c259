//! The whole laboratory: everything that a record of phase 3 holds.

use crate::{
    ablations::{self, Size},
    cache::{Order, traffic},
    code::{Kind, mix_at},
    products::{self, Plan},
    series::series,
};
use std::time::Duration;
use tegula_gguf::GgmlType;
use tegula_kernels::{
    Amx, Pool, PoolConfig, Tier,
    lab::{TYPES, Way, code_address},
    probe::{Caches, Level, Peak, compute_peak, read_bandwidth},
};
use tegula_lab::{Env, Series};

/// `limit|memory` and the like, in giga-units per second.
pub const LIMIT: &str = "limit";
/// `code|type|way|tier|tokens|kind`, in instructions of the loop over blocks.
pub const CODE: &str = "code";
/// `traffic|way|tokens|what`, in lines per 1,000 multiplications.
pub const TRAFFIC: &str = "traffic";

/// Measures everything on this machine.
///
/// # Errors
/// Says what could not be measured.
pub fn run(_: &Env) -> Result<Vec<Series>, String> {
    whole(&Plan::whole(), Size::Whole)
}

/// Everything that a plan asks for.
///
/// # Errors
/// As [`run`].
pub fn whole(plan: &Plan, size: Size) -> Result<Vec<Series>, String> {
    let mut all = limits(plan);
    all.extend(code()?);
    all.extend(modelled());
    all.extend(products::measure(plan)?);
    all.extend(ablations::measure(plan, size)?);
    Ok(all)
}

/// Bandwidth and peaks with the plan's threads.
fn limits(plan: &Plan) -> Vec<Series> {
    let pool = Pool::new(PoolConfig::new(plan.threads));
    let time = Duration::from_millis(50);
    let giga = |samples: Vec<f64>| samples.into_iter().map(|s| s / 1e9).collect();
    let memory = Caches::detect().bytes(Level::Memory, plan.threads, plan.stream.max(1 << 20));
    let read = read_bandwidth(&pool, Tier::detect_max(), memory, plan.repetitions, time);
    let mut all = vec![
        series(LIMIT, &["threads"], "threads", vec![plan.threads as f64]),
        series(LIMIT, &["memory"], "GB/s", giga(read.samples)),
    ];
    for peak in Peak::ALL {
        let amx: Option<Amx> = plan.amx;
        if let Some(rates) = compute_peak(peak, &pool, amx, plan.repetitions, time) {
            all.push(series(LIMIT, &[peak.name()], "GOP/s", giga(rates.samples)));
        }
    }
    all
}

/// What the ways' loops consist of.
///
/// # Errors
/// When a function can't be decoded.
pub fn code() -> Result<Vec<Series>, String> {
    let mut all = Vec::new();
    for ty in TYPES {
        for way in Way::ALL {
            for tier in [Tier::Avx2, Tier::Avx512] {
                let Some(address) = code_address(way, tier, ty) else {
                    continue;
                };
                let mix = mix_at(address)?;
                for kind in Kind::ALL {
                    let count = mix.kinds.get(&kind).copied().unwrap_or(0);
                    let (tokens, tier) = (way.tokens().to_string(), tier.to_string());
                    let parts = [&ty.to_string(), way.name(), &tier, &tokens, kind.name()];
                    all.push(series(CODE, &parts, "instructions", vec![count as f64]));
                }
            }
        }
    }
    Ok(all)
}

/// Reads and misses by the model: 4-bit weights, 4,096 inputs, this machine's caches.
pub fn modelled() -> Vec<Series> {
    const K: u64 = 4096;
    let caches = Caches::detect();
    let orders = Way::ALL.map(Order::Way).into_iter().chain([Order::Panel]);
    let mut all = Vec::new();
    for order in orders {
        for m in [1, 8, 64, 512] {
            let t = traffic(&caches, order, 4, K, bits(GgmlType::Q4_0), m);
            for (what, lines) in [
                ("reads", t.reads),
                ("L1 misses", t.l1_misses),
                ("L2 misses", t.l2_misses),
            ] {
                let parts = [order.name(), &m.to_string(), what];
                all.push(series(TRAFFIC, &parts, "lines", vec![lines]));
            }
        }
    }
    all
}

/// Bits of a weight, rounded down.
fn bits(ty: GgmlType) -> u64 {
    (ty.block_bytes() * 8 / ty.block_len()) as u64
}
