//! The engine with whole models: random weights in published shapes, half of them zero, as
//! dense types and as sparse ones, in turns in one process.
//!
//! All layers of a file hold the same numbers, each in memory of its own, as the engine has
//! any model's. Embedding and output matrix are dense on both sides.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use rayon::prelude::*;
use tegula_engine::{
    Batch, Context, ContextOptions, LoadOptions, Model, Shape, Source,
    shape::{Fill, ShapedTensor},
};
use tegula_gguf::{GgmlType, fuzz::driver::Random, sparse::pack_tensor, writer::GgufWriter};
use tegula_kernels::Amx;
use tegula_lab::{Env, Series};

use super::{Name, Plan, SIDES, dense_rows, seconds_left, turns};
use crate::prune::usual;

/// A published shape with one `part`-th of its layers and of its vocabulary, so that the output
/// matrix has the share of the work that it has in the whole model.
fn part_of(shape: &Shape, part: usize) -> Shape {
    Shape {
        name: match part {
            1 => shape.name.clone(),
            n => format!("{}, 1/{n} of its layers and vocabulary", shape.name),
        },
        layers: shape.layers / part,
        vocab: shape.vocab / part,
        ..shape.clone()
    }
}

/// A whole model's shape and types, and the largest share of it that is used.
const CASES: [(&str, GgmlType, usize); 3] = [
    ("llama-3-8b", GgmlType::S_BF16, 1),
    ("llama-3-8b", GgmlType::S8, 1),
    ("qwen3-30b-a3b", GgmlType::S8, 2),
];

/// Tokens that run together.
const BATCHES: [usize; 3] = [1, 16, 64];

/// Bytes per second that files are written and loaded with, before there was one.
const SPEED: f64 = 0.5e9;

/// Takes the measurements. A machine of little memory, or slow disks, gets a smaller part of
/// each model, or none; the series' names say which.
///
/// # Errors
/// When a file can't be written or loaded.
pub fn run(env: &Env) -> Result<Vec<Series>, String> {
    let plan = Plan::whole();
    let memory = 0.8 * env.host.memory_mib as f64 * (1 << 20) as f64;
    let mut speed = SPEED;
    let mut all = Vec::new();
    for (i, (name, ty, least)) in CASES.into_iter().enumerate() {
        let shape = Shape::preset(name).ok_or_else(|| format!("no shape {name}"))?;
        let dense = ty.dense();
        let per_weight = dense.block_bytes() as f64 / dense.block_len() as f64;
        // Of both files, about.
        let weights = |part| -> u64 {
            let tensors = part_of(&shape, part).tensors();
            tensors.iter().map(ShapedTensor::weights).sum()
        };
        let bytes = |part| 1.65 * per_weight * weights(part) as f64;
        let measuring = BATCHES.len() as f64 * 1.5 * plan.time.as_secs_f64();
        let time = seconds_left() / (CASES.len() - i) as f64 - measuring;
        // Files and packed copies of both sides at once, and room for all else.
        let fits = |part: &usize| 2.1 * bytes(*part) < memory && bytes(*part) / speed < time;
        let mut parts = [1, 2, 4, 8].into_iter().filter(|p| *p >= least);
        let Some(part) = parts.find(fits) else {
            println!("  {name} {ty}: too little memory or time");
            continue;
        };
        let begin = Instant::now();
        all.extend(measure(&plan, &part_of(&shape, part), ty)?);
        let took = begin.elapsed().as_secs_f64() - measuring;
        speed = bytes(part) / took.max(1.0);
    }
    Ok(all)
}

/// Files that are gone when the measurement ends.
struct Files(PathBuf);

impl Drop for Files {
    fn drop(&mut self) {
        // Left behind they harm nobody but the disk.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Milliseconds of a step of each number of tokens, dense and sparse in turns.
///
/// # Errors
/// As [`run`].
pub fn measure(plan: &Plan, shape: &Shape, ty: GgmlType) -> Result<Vec<Series>, String> {
    let dir = std::env::temp_dir().join(format!("tegula-phase5-whole-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let files = Files(dir);
    let mut models = Vec::new();
    let layer = Numbers::new(shape, ty)?;
    for (side, ty) in SIDES.into_iter().zip([ty.dense(), ty]) {
        let path = files.0.join(format!("{side}.gguf"));
        write(&path, shape, ty, &layer)?;
        let load = LoadOptions {
            threads: plan.threads,
            // The dense side is to stay so.
            sparse_pack: false,
            amx: Amx::acquire().ok(),
            ..LoadOptions::new(Source::Path(path.clone()))
        };
        let model = Model::load(&load, &mut |_| ()).map_err(|e| e.to_string())?;
        // What is mapped stays until the model goes.
        fs::remove_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        models.push(Arc::new(model));
    }
    drop(layer);
    let options = ContextOptions {
        context: 256,
        ..ContextOptions::default()
    };
    let contexts = models.iter().map(|m| Context::new(Arc::clone(m), &options));
    let contexts: Result<Vec<Context>, _> = contexts.collect();
    let mut contexts = contexts.map_err(|e| e.to_string())?;
    let mut all = Vec::new();
    for m in BATCHES {
        // Both sides see the same tokens.
        let mut randoms = [Random::new(m as u64), Random::new(m as u64)];
        let mut error = None;
        let samples = turns(plan, |side| {
            let steps = if m == 1 { 4 } else { 1 };
            for _ in 0..steps {
                let id = |_| (randoms[side].next_u64() % shape.vocab as u64) as u32;
                let ids: Vec<u32> = (0..m).map(id).collect();
                let ctx = &mut contexts[side];
                let step = ctx
                    .truncate(0, 0)
                    .and_then(|()| ctx.decode(&Batch::prompt(0, &ids)));
                match step {
                    Ok(out) if out.logits(0).iter().all(|x| x.is_finite()) => {}
                    Ok(_) => error = Some("logits are not finite".to_owned()),
                    Err(e) => error = Some(e.to_string()),
                }
            }
            steps
        });
        if let Some(error) = error {
            return Err(error);
        }
        all.extend(
            models
                .iter()
                .zip(SIDES)
                .zip(samples)
                .map(|((model, side), samples)| {
                    let sizes = model.plan().matrices();
                    let experts = shape.experts.map_or(0.0, |e| {
                        let share = e.used as f64 / e.count as f64;
                        // What at least one token visits, were the choice random.
                        1.0 - (1.0 - share).powi(m as i32)
                    });
                    let bytes = (sizes.dense.bytes + sizes.output.bytes) as f64
                        + experts * sizes.experts.bytes as f64;
                    let compute = model.compute();
                    let name = Name {
                        kind: "model".into(),
                        ty,
                        percent: 50,
                        shape: shape.name.clone(),
                        m,
                        kernels: match compute.table.amx {
                            Some(_) => format!("{}+amx", compute.table.tier),
                            None => compute.table.tier.to_string(),
                        },
                        side: side.into(),
                        bytes: bytes as u64,
                    };
                    name.timed(samples)
                }),
        );
    }
    Ok(all)
}

/// The data of a layer's matrices by their shape, dense and sparse, and of the embedding.
struct Numbers {
    dense: HashMap<Vec<u64>, Vec<u8>>,
    sparse: HashMap<Vec<u64>, Vec<u8>>,
    embedding: Vec<u8>,
}

impl Numbers {
    fn new(shape: &Shape, ty: GgmlType) -> Result<Numbers, String> {
        let mut numbers = Numbers {
            dense: HashMap::new(),
            sparse: HashMap::new(),
            embedding: rows(ty, shape.vocab, shape.embd, 0),
        };
        for t in shape.tensors().iter().filter(|t| usual(&t.name)) {
            let key = &t.shape;
            if numbers.dense.contains_key(key) {
                continue;
            }
            let all = key[1..].iter().product::<u64>() as usize;
            let dense = rows(ty, all, key[0] as usize, 50);
            let packed = pack_tensor(ty, key, None, &dense).map_err(|e| e.to_string())?;
            numbers.sparse.insert(key.clone(), packed);
            numbers.dense.insert(key.clone(), dense);
        }
        Ok(numbers)
    }
}

/// Rows as [`dense_rows`] makes them, by all processors.
fn rows(ty: GgmlType, n: usize, k: usize, percent: u32) -> Vec<u8> {
    const ROWS: usize = 64;
    let parts: Vec<Vec<u8>> = (0..n.div_ceil(ROWS))
        .into_par_iter()
        .map(|i| dense_rows(ty, ROWS.min(n - i * ROWS), k, percent, 7 + i as u64))
        .collect();
    parts.concat()
}

/// What a tensor holds.
enum Data<'a> {
    Floats(Vec<f32>),
    Bytes(&'a [u8]),
}

/// Type and data of a model's tensor; its layers' matrices are of `ty`.
fn entry<'a>(t: &ShapedTensor, ty: GgmlType, numbers: &'a Numbers) -> (GgmlType, Data<'a>) {
    if usual(&t.name) {
        let from = match ty.is_sparse() {
            true => &numbers.sparse,
            false => &numbers.dense,
        };
        return (ty, Data::Bytes(&from[&t.shape]));
    }
    match t.fill {
        Fill::Constant(x) => {
            let all = vec![x; t.weights() as usize];
            (GgmlType::F32, Data::Floats(all))
        }
        // Experts that differ, in each layer in its own way, so that tokens choose.
        Fill::Random if t.name.ends_with("ffn_gate_inp.weight") => {
            let layer = t.name.bytes().fold(0.0, |sum, b| sum + f32::from(b));
            let float = |i: u64| (i as f32 * 0.37 + layer).sin() * 0.1;
            let all = (0..t.weights()).map(float).collect();
            (GgmlType::F32, Data::Floats(all))
        }
        Fill::Random => (ty.dense(), Data::Bytes(&numbers.embedding)),
    }
}

/// Writes a model whose layers' matrices are of `ty`.
fn write(path: &Path, s: &Shape, ty: GgmlType, numbers: &Numbers) -> Result<(), String> {
    let text = |e: tegula_gguf::Error| e.to_string();
    let mut writer = GgufWriter::new(s.metadata());
    let tensors = s.tensors();
    for t in &tensors {
        let declared = match entry(t, ty, numbers) {
            (ty, Data::Bytes(bytes)) if ty.is_sparse() => {
                writer.add_sparse(&t.name, ty, &t.shape, bytes.len() as u64)
            }
            (ty, _) => writer.add_tensor(&t.name, ty, &t.shape),
        };
        declared.map_err(text)?;
    }
    let mut out = writer.create(path).map_err(text)?;
    for t in &tensors {
        match entry(t, ty, numbers).1 {
            Data::Bytes(bytes) => out.write(bytes),
            Data::Floats(floats) => {
                let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
                out.write(&bytes)
            }
        }
        .map_err(text)?;
    }
    out.finish().map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn small_models_of_both_kinds_run() {
        let shape = |name: &str| Shape {
            name: "small".to_owned(),
            ..Shape::preset(name).unwrap()
        };
        let (dense, moe) = (shape("llama"), shape("qwen3moe"));
        let plan = Plan {
            set: 1,
            turns: 1,
            time: Duration::ZERO,
            threads: 2,
        };
        for (shape, ty) in [
            (&dense, GgmlType::S_BF16),
            (&dense, GgmlType::S8),
            (&moe, GgmlType::S8),
        ] {
            let series = measure(&plan, shape, ty).unwrap();
            assert_eq!(series.len(), 2 * BATCHES.len());
            let gains = crate::report::gains(&series);
            assert_eq!(gains.len(), BATCHES.len());
            // Half of the weights of the layers' matrices are gone.
            let ratio = gains[0].dense_bytes as f64 / gains[0].name.bytes as f64;
            assert!((1.1..1.8).contains(&ratio), "{ty}: {ratio}");
        }
    }

    #[test]
    fn parts_have_their_share_of_layers_and_vocabulary() {
        for (name, _, least) in CASES {
            let shape = Shape::preset(name).unwrap();
            assert_eq!(part_of(&shape, 1), shape);
            let part = part_of(&shape, 4 * least);
            part.check().unwrap();
            assert_eq!(part.layers * 4 * least, shape.layers);
            assert_eq!(part.vocab, shape.vocab / (4 * least));
        }
        let quarter = part_of(&Shape::preset("llama-3-8b").unwrap(), 4);
        assert_eq!(quarter.name, "llama-3-8b, 1/4 of its layers and vocabulary");
    }
}
