//! Sparse products beside dense ones: the same zero-filled weights, in turns, in one process.
//!
//! Each side has as many copies of its matrix as make a gigabyte, so that weights come from
//! memory and not from a cache, and each turn multiplies all of them once. Beside them: the
//! staged algorithm, attention to a pruned cache, and whole models.

pub mod attention;
#[cfg(feature = "amx")]
pub mod staged;
pub mod whole;

use std::{
    fmt,
    hint::black_box,
    str::FromStr,
    sync::OnceLock,
    time::{Duration, Instant},
};

use tegula_engine::threads::default_threads;
use tegula_gguf::{Bytes, GgmlType, fuzz::driver::Random, sparse::pack_tensor};
use tegula_kernels::{
    Acts, Amx, Compute, PoolConfig, Tier, Weights,
    ops::moe::{MoeScratch, RouteOptions},
    probe::read_bandwidth,
};
use tegula_lab::{Env, Series};

/// What a series was measured on: `sparse|layer|S8|50|14336x4096|1|avx512|dense|bytes`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Name {
    /// `layer`, `experts` for a fused network of them, `staged` beside the staged algorithm,
    /// `tiles` for sparse weights on tiles beside the same on vectors, `attention`, or `model` for
    /// a step of a whole one.
    pub kind: String,
    /// The sparse type; of attention the cache's.
    pub ty: GgmlType,
    /// Percent of weights, or of keys and values, that are zero.
    pub percent: u32,
    /// Outputs and inputs of the matrix, or what else is multiplied.
    pub shape: String,
    /// Tokens.
    pub m: usize,
    /// What multiplied: a tier's name, `+amx` behind it with tiles.
    pub kernels: String,
    /// `sparse`, or what it is compared with: `dense`, `staged`, `vectors`.
    pub side: String,
    /// Bytes of weights that a run reads.
    pub bytes: u64,
}

impl Name {
    /// Its series of milliseconds.
    fn timed(&self, samples: Vec<f64>) -> Series {
        Series {
            name: self.to_string(),
            unit: "ms".into(),
            samples,
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sparse|{}|{}|{}|{}|{}|{}|{}|{}",
            self.kind,
            self.ty,
            self.percent,
            self.shape,
            self.m,
            self.kernels,
            self.side,
            self.bytes
        )
    }
}

impl FromStr for Name {
    type Err = ();

    fn from_str(s: &str) -> Result<Name, ()> {
        let parts: Vec<&str> = s.split('|').collect();
        let ["sparse", kind, ty, percent, shape, m, kernels, side, bytes] = parts[..] else {
            return Err(());
        };
        Ok(Name {
            kind: kind.to_owned(),
            ty: ty.parse().map_err(drop)?,
            percent: percent.parse().map_err(drop)?,
            shape: shape.to_owned(),
            m: m.parse().map_err(drop)?,
            kernels: kernels.to_owned(),
            side: side.to_owned(),
            bytes: bytes.parse().map_err(drop)?,
        })
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Bytes of weights of each side.
    pub set: usize,
    /// Turns of each case.
    pub turns: usize,
    /// No more turns of a case after this, once there are three.
    pub time: Duration,
    pub threads: usize,
}

impl Plan {
    /// A gigabyte each, as many threads as a run uses.
    pub fn whole() -> Plan {
        Plan {
            set: 1 << 30,
            turns: 31,
            time: Duration::from_secs(4),
            threads: default_threads(),
        }
    }
}

/// Batch 1: type, percent of zeros, rows, inputs.
const LAYERS: [(GgmlType, u32, usize, usize); 8] = [
    (GgmlType::S_BF16, 50, 14336, 4096),
    (GgmlType::S8, 50, 14336, 4096),
    (GgmlType::S8, 70, 14336, 4096),
    (GgmlType::S8, 80, 14336, 4096),
    (GgmlType::S4, 50, 14336, 4096),
    (GgmlType::S4, 70, 14336, 4096),
    (GgmlType::S8, 50, 4096, 14336),
    (GgmlType::S8, 50, 1024, 4096),
];

/// Larger batches, at 50 %.
const BATCHES: [(GgmlType, &[usize]); 3] = [
    (GgmlType::S_BF16, &[16, 64]),
    (GgmlType::S8, &[2, 4, 8, 16, 64, 512]),
    (GgmlType::S4, &[16, 64]),
];

/// Batches at which tiles are held against vectors, where tiles are used at all: about as many
/// tokens as decide, [`tegula_kernels::amx::fewest_tokens`].
const CROSSOVER: [usize; 4] = [4, 8, 12, 16];

/// When the first measurement began.
static BEGIN: OnceLock<Instant> = OnceLock::new();

/// Seconds that are left of those that all of the phase's measurements may take.
fn seconds_left() -> f64 {
    const ALL: f64 = 450.0;
    ALL - BEGIN.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Takes all measurements.
///
/// # Errors
/// When weights can't be made.
pub fn run(_: &Env) -> Result<Vec<Series>, String> {
    BEGIN.get_or_init(Instant::now);
    measure(&Plan::whole())
}

/// Measures, and says how fast memory is read.
///
/// # Errors
/// When weights can't be made.
pub fn measure(plan: &Plan) -> Result<Vec<Series>, String> {
    let plain = Compute::new(Tier::detect_max(), PoolConfig::new(plan.threads));
    let mut all = vec![Series {
        name: "sparse-threads".into(),
        unit: "threads".into(),
        samples: vec![plan.threads as f64],
    }];
    let once = Duration::from_millis(200);
    let speed = read_bandwidth(&plain.pool, Tier::detect_max(), plan.set as u64, 5, once);
    all.push(Series {
        name: "sparse-bandwidth".into(),
        unit: "GB/s".into(),
        samples: speed.samples.iter().map(|b| b / 1e9).collect(),
    });
    for (ty, percent, n, k) in LAYERS {
        let sets = Sets::new(plan, &plain, ty, percent, (n, k))?;
        all.extend(sets.run(plan, &plain, 1));
        if (percent, n) == (50, 14336) {
            let tiles = Amx::acquire().ok();
            let tiles = tiles.map(|amx| {
                Compute::with_amx(Tier::detect_max(), amx, PoolConfig::new(plan.threads))
            });
            let batches = BATCHES.iter().filter(|(of, _)| *of == ty);
            for &m in batches.flat_map(|(_, batches)| *batches) {
                let compute = tiles.as_ref().filter(|_| m > 8).unwrap_or(&plain);
                all.extend(sets.run(plan, compute, m));
            }
            if let Some(tiles) = &tiles {
                let beside = |m| sets.crossover(plan, [&plain, tiles], m);
                all.extend(CROSSOVER.into_iter().filter_map(beside).flatten());
            }
        }
    }
    all.extend(experts(plan, &plain)?);
    Ok(all)
}

/// From -1 to 1.
fn float(random: &mut Random) -> f32 {
    (random.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Random dense rows of the twin of `ty`, of whose weights about `percent` are zero.
pub fn dense_rows(ty: GgmlType, rows: usize, k: usize, percent: u32, seed: u64) -> Vec<u8> {
    let dense = ty.dense();
    let mut random = Random::new(seed);
    // Two bytes decide, two make the code: the share is right to a hundredth of a percent.
    let limit = percent * 0xffff / 100;
    let mut code = |zero: u16, other: fn(u16) -> u16| {
        let bits = random.next_u64();
        match (bits & 0xffff) as u32 >= limit {
            true => other((bits >> 16) as u16),
            false => zero,
        }
    };
    let weights = rows * k;
    let mut out = Vec::with_capacity(dense.bytes_for(weights as u64).unwrap_or(0) as usize);
    match dense {
        GgmlType::BF16 => {
            // Magnitudes from 1/128 to 1/64.
            let some = |bits: u16| 0x3c00 | bits & 0x807f;
            (0..weights).for_each(|_| out.extend(code(0, some).to_le_bytes()));
        }
        GgmlType::Q8_0 => {
            for _ in 0..weights / 32 {
                out.extend([0x20, 0x14]);
                out.extend((0..32).map(|_| code(0, |bits| bits % 127 + 1) as u8));
            }
        }
        _ => {
            for _ in 0..weights / 32 {
                out.extend([0x20, 0x1c]);
                let mut nibble = || code(8, |bits| (bits % 15 + 9) % 16) as u8;
                out.extend((0..16).map(|_| nibble() | nibble() << 4));
            }
        }
    }
    out
}

/// The weights of both sides.
fn both(
    compute: &Compute,
    ty: GgmlType,
    (n, k, experts): (usize, usize, usize),
    percent: u32,
) -> Result<[Weights; 2], String> {
    let rows = dense_rows(ty, n * experts, k, percent, 7);
    let shape = [k as u64, n as u64, experts as u64];
    let packed = pack_tensor(ty, &shape, None, &rows).map_err(|e| e.to_string())?;
    let pool = &compute.pool;
    let dense = Weights::raw(ty.dense(), n, k, experts, Bytes::from_vec(rows));
    let sparse = Weights::sparse(ty, n, k, experts, Bytes::from_vec(packed), pool);
    Ok([
        dense.map_err(|e| e.to_string())?.pack(pool),
        sparse.map_err(|e| e.to_string())?.pack(pool),
    ])
}

/// As many copies as fill a set.
fn copies(plan: &Plan, compute: &Compute, one: Weights, bytes: usize) -> Vec<Weights> {
    let count = plan.set.div_ceil(bytes.max(1)).max(1);
    let mut all: Vec<Weights> = (1..count).map(|_| one.pack(&compute.pool)).collect();
    all.push(one);
    all
}

const SIDES: [&str; 2] = ["dense", "sparse"];

/// A matrix in many copies, dense and sparse.
struct Sets {
    name: Name,
    sides: [Vec<Weights>; 2],
}

impl Sets {
    fn new(
        plan: &Plan,
        compute: &Compute,
        ty: GgmlType,
        percent: u32,
        (n, k): (usize, usize),
    ) -> Result<Sets, String> {
        let sides = both(compute, ty, (n, k, 1), percent)?.map(|one| {
            let bytes = one.bytes();
            copies(plan, compute, one, bytes)
        });
        Ok(Sets {
            name: Name {
                kind: "layer".into(),
                ty,
                percent,
                shape: format!("{n}x{k}"),
                m: 0,
                kernels: String::new(),
                side: String::new(),
                bytes: 0,
            },
            sides,
        })
    }

    /// Milliseconds of a product, dense and sparse in turns.
    fn run(&self, plan: &Plan, compute: &Compute, m: usize) -> [Series; 2] {
        let (n, k) = (self.sides[0][0].n(), self.sides[0][0].k());
        let mut random = Random::new(3);
        let x: Vec<f32> = (0..m * k).map(|_| float(&mut random)).collect();
        let mut y = vec![0.0; m * n];
        let mut acts = [Acts::new(), Acts::new()];
        for (acts, side) in acts.iter_mut().zip(&self.sides) {
            compute.prepare(acts, &x, m, k, compute.forms(m, [&side[0]]));
        }
        let samples = turns(plan, |side| {
            for w in &self.sides[side] {
                compute.matmul(w, &acts[side], black_box(&mut y));
            }
            self.sides[side].len()
        });
        let kernels = compute.table.matmul;
        let tiles = |w: &Weights| kernels.tiles_for(w, m).is_some();
        let mut samples = samples.into_iter();
        [0, 1].map(|side| {
            let w = &self.sides[side][0];
            let name = Name {
                m,
                kernels: match tiles(w) {
                    true => format!("{}+amx", compute.table.tier),
                    false => compute.table.tier.to_string(),
                },
                side: SIDES[side].into(),
                bytes: w.bytes() as u64,
                ..self.name.clone()
            };
            name.timed(samples.next().unwrap_or_default())
        })
    }

    /// Milliseconds of a sparse product on vectors and on tiles in turns; nothing where so few
    /// tokens do not go to tiles.
    fn crossover(&self, plan: &Plan, on: [&Compute; 2], m: usize) -> Option<[Series; 2]> {
        let weights = &self.sides[1];
        let one = &weights[0];
        on[1].table.matmul.tiles_for(one, m)?;
        let (n, k) = (one.n(), one.k());
        let mut random = Random::new(3);
        let x: Vec<f32> = (0..m * k).map(|_| float(&mut random)).collect();
        let mut y = vec![0.0; m * n];
        let mut acts = [Acts::new(), Acts::new()];
        for (acts, compute) in acts.iter_mut().zip(on) {
            compute.prepare(acts, &x, m, k, compute.forms(m, [one]));
        }
        let samples = turns(plan, |side| {
            for w in weights {
                on[side].matmul(w, &acts[side], black_box(&mut y));
            }
            weights.len()
        });
        let mut samples = samples.into_iter();
        let tier = on[0].table.tier.to_string();
        Some(
            [("vectors", tier.clone()), ("sparse", tier + "+amx")].map(|(side, kernels)| {
                let name = Name {
                    kind: "tiles".into(),
                    m,
                    kernels,
                    side: side.into(),
                    bytes: one.bytes() as u64,
                    ..self.name.clone()
                };
                name.timed(samples.next().unwrap_or_default())
            }),
        )
    }
}

/// Milliseconds per item of each side, taking turns; `run` returns how many items it did. The
/// first turn warms up.
fn turns(plan: &Plan, mut run: impl FnMut(usize) -> usize) -> [Vec<f64>; 2] {
    let mut samples = [Vec::new(), Vec::new()];
    let begin = Instant::now();
    for turn in 0..=plan.turns {
        for (side, samples) in samples.iter_mut().enumerate() {
            let start = Instant::now();
            let items = run(side);
            let ms = start.elapsed().as_secs_f64() * 1e3 / items as f64;
            if turn > 0 {
                samples.push(ms);
            }
        }
        if turn >= 3 && begin.elapsed() > plan.time {
            break;
        }
    }
    samples
}

/// A layer of experts as Qwen3-30B-A3B has it, but with 32 of them: 8 used per token.
fn experts(plan: &Plan, compute: &Compute) -> Result<Vec<Series>, String> {
    let (k, ff, count, used, ty) = (2048, 768, 32, 8, GgmlType::S8);
    let up = both(compute, ty, (ff, k, count), 50)?;
    let down = both(compute, ty, (k, ff, count), 50)?;
    let mut random = Random::new(5);
    let x: Vec<f32> = (0..k).map(|_| float(&mut random)).collect();
    let mut out = vec![0.0; k];
    let mut scratch = MoeScratch::default();
    let options = RouteOptions {
        used,
        normalize: true,
        scale: 1.0,
    };
    let [up_d, up_s] = up;
    let [down_d, down_s] = down;
    let mut layers = Vec::new();
    for (up, down) in [(up_d, down_d), (up_s, down_s)] {
        let bytes = 2 * up.bytes() + down.bytes();
        let layer = copies(plan, compute, up, bytes);
        let gates: Vec<Weights> = layer.iter().map(|w| w.pack(&compute.pool)).collect();
        let mut downs: Vec<Weights> = (1..layer.len()).map(|_| down.pack(&compute.pool)).collect();
        downs.push(down);
        layers.push((bytes, gates, layer, downs));
    }
    let samples = turns(plan, |side| {
        let (_, gates, ups, downs) = &layers[side];
        // Every layer is asked for all of its experts in the end.
        let rounds = count / used;
        for _ in 0..rounds {
            for ((gate, up), down) in gates.iter().zip(ups).zip(downs) {
                let logits: Vec<f32> = (0..count).map(|_| float(&mut random)).collect();
                let routing = compute.route(&logits, count, &options);
                compute.moe_ffn(
                    &x,
                    &routing,
                    gate,
                    up,
                    down,
                    &mut scratch,
                    black_box(&mut out),
                );
            }
        }
        rounds * gates.len()
    });
    let all = samples.into_iter().enumerate().map(|(side, samples)| {
        let name = Name {
            kind: "experts".into(),
            ty,
            percent: 50,
            shape: format!("{used} of {ff}x{k}"),
            m: 1,
            kernels: compute.table.tier.to_string(),
            side: SIDES[side].into(),
            bytes: (layers[side].0 * used / count) as u64,
        };
        name.timed(samples)
    });
    Ok(all.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        let name = Name {
            kind: "layer".into(),
            ty: GgmlType::S_BF16,
            percent: 50,
            shape: "14336x4096".into(),
            m: 1,
            kernels: "avx512+amx".into(),
            side: "sparse".into(),
            bytes: 12,
        };
        assert_eq!(name.to_string().parse(), Ok(name));
        assert_eq!("sparse|layer".parse::<Name>(), Err(()));
    }

    #[test]
    fn random_rows_have_their_share_of_zeros() {
        for &ty in GgmlType::SPARSE {
            let rows = dense_rows(ty, 64, 1024, 70, 1);
            let packed = pack_tensor(ty, &[1024, 64], None, &rows).unwrap();
            let sparse = tegula_gguf::sparse::Sparse::parse(&packed).unwrap();
            let density = sparse.header().density();
            assert!((density - 0.3).abs() < 0.01, "{ty}: {density}");
        }
    }

    #[test]
    fn both_sides_are_measured() {
        let plan = Plan {
            set: 1,
            turns: 2,
            time: Duration::ZERO,
            threads: 1,
        };
        let compute = Compute::new(Tier::detect_max(), PoolConfig::new(1));
        let sets = Sets::new(&plan, &compute, GgmlType::S8, 50, (64, 512)).unwrap();
        let series = sets.run(&plan, &compute, 2);
        for (series, side) in series.iter().zip(SIDES) {
            let name: Name = series.name.parse().unwrap();
            assert_eq!((name.side.as_str(), name.m), (side, 2));
            assert!(series.samples.iter().all(|ms| *ms > 0.0));
            assert_eq!(series.samples.len(), 2);
        }
        // Without tiles there is nothing to hold against vectors.
        assert!(sets.crossover(&plan, [&compute, &compute], 16).is_none());
    }

    #[test]
    #[cfg(feature = "amx")]
    fn tiles_are_held_against_vectors_from_where_they_are_used() {
        let plan = Plan {
            set: 1,
            turns: 1,
            time: Duration::ZERO,
            threads: 1,
        };
        let (tier, one) = (Tier::detect_max(), || PoolConfig::new(1));
        let vectors = Compute::new(tier, one());
        let Ok(amx) = Amx::emulate() else { return };
        let tiles = Compute::with_amx(tier, amx, one());
        let sets = Sets::new(&plan, &vectors, GgmlType::S8, 50, (32, 64)).unwrap();
        assert!(sets.crossover(&plan, [&vectors, &tiles], 4).is_none());
        let both = sets.crossover(&plan, [&vectors, &tiles], 16).unwrap();
        let gains = crate::report::gains(&both);
        assert_eq!(gains.len(), 1);
        assert_eq!(
            (gains[0].name.kind.as_str(), gains[0].name.m),
            ("tiles", 16)
        );
        assert_eq!(crate::report::floor(&gains[0].name), Some(1.0));
    }
}
