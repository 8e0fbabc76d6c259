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
use tegula_engine::{Batch, Context, ContextOptions, LoadOptions, Model, Source};
use tegula_gguf::{
    GgmlType, Metadata, fuzz::driver::Random, sparse::pack_tensor, tokenizer::byte_char,
    writer::GgufWriter,
};
use tegula_kernels::Amx;
use tegula_lab::{Env, Series};

use super::{Name, Plan, SIDES, dense_rows, seconds_left, turns};

/// A published shape, or a part of it.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    name: &'static str,
    layers: usize,
    embd: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Rows of a gate; of an expert's, where there are experts.
    ff: usize,
    /// Experts, and how many a token visits.
    experts: Option<(usize, usize)>,
    vocab: usize,
}

const LLAMA: Shape = Shape {
    name: "llama-3-8b",
    layers: 32,
    embd: 4096,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    ff: 14336,
    experts: None,
    vocab: 128_256,
};

const QWEN: Shape = Shape {
    name: "qwen3-30b-a3b",
    layers: 48,
    embd: 2048,
    heads: 32,
    kv_heads: 4,
    head_dim: 128,
    ff: 768,
    experts: Some((128, 8)),
    vocab: 151_936,
};

impl Shape {
    /// The shape with one `part`-th of its layers and of its vocabulary, so that the output
    /// matrix has the share of the work that it has in the whole model.
    fn part(self, part: usize) -> Shape {
        Shape {
            layers: self.layers / part,
            vocab: self.vocab / part,
            ..self
        }
    }

    fn title(&self, part: usize) -> String {
        match part {
            1 => self.name.to_owned(),
            n => format!("{}, 1/{n} of its layers and vocabulary", self.name),
        }
    }

    /// Weights, about.
    fn weights(&self) -> u64 {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let attention = 2 * self.embd * (q + kv);
        let networks = self.experts.map_or(1, |(count, _)| count);
        let layer = attention + 3 * self.embd * self.ff * networks;
        (self.layers * layer + 2 * self.embd * self.vocab) as u64
    }
}

/// A whole model's types, and the share of it that is used where there is room.
const CASES: [(Shape, GgmlType, usize); 3] = [
    (LLAMA, GgmlType::S_BF16, 1),
    (LLAMA, GgmlType::S8, 1),
    (QWEN, GgmlType::S8, 2),
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
    for (i, (shape, ty, least)) in CASES.into_iter().enumerate() {
        let dense = ty.dense();
        let per_weight = dense.block_bytes() as f64 / dense.block_len() as f64;
        // Of both files, about.
        let bytes = |part: usize| 1.65 * per_weight * shape.part(part).weights() as f64;
        let measuring = BATCHES.len() as f64 * 1.5 * plan.time.as_secs_f64();
        let time = seconds_left() / (CASES.len() - i) as f64 - measuring;
        // Files and packed copies of both sides at once, and room for all else.
        let fits = |part: &usize| 2.1 * bytes(*part) < memory && bytes(*part) / speed < time;
        let mut parts = [1, 2, 4, 8].into_iter().filter(|p| *p >= least);
        let Some(part) = parts.find(fits) else {
            println!("  {} {ty}: too little memory or time", shape.name);
            continue;
        };
        let begin = Instant::now();
        all.extend(measure(&plan, &shape.part(part), &shape.title(part), ty)?);
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
pub fn measure(
    plan: &Plan,
    shape: &Shape,
    title: &str,
    ty: GgmlType,
) -> Result<Vec<Series>, String> {
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
                    let experts = shape.experts.map_or(0.0, |(count, used)| {
                        let share = used as f64 / count as f64;
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
                        shape: title.to_owned(),
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

/// The matrices of a layer: name, outputs, inputs, whether a stack of experts.
fn matrices(s: &Shape) -> Vec<(&'static str, usize, usize, bool)> {
    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let mut all = vec![
        ("attn_q", q, s.embd, false),
        ("attn_k", kv, s.embd, false),
        ("attn_v", kv, s.embd, false),
        ("attn_output", s.embd, q, false),
    ];
    all.extend(match s.experts {
        None => [
            ("ffn_gate", s.ff, s.embd, false),
            ("ffn_up", s.ff, s.embd, false),
            ("ffn_down", s.embd, s.ff, false),
        ],
        Some(_) => [
            ("ffn_gate_exps", s.ff, s.embd, true),
            ("ffn_up_exps", s.ff, s.embd, true),
            ("ffn_down_exps", s.embd, s.ff, true),
        ],
    });
    all
}

fn tensor_shape(s: &Shape, (n, k, stack): (usize, usize, bool)) -> Vec<u64> {
    let experts = s.experts.filter(|_| stack).map(|(count, _)| count as u64);
    [k as u64, n as u64].into_iter().chain(experts).collect()
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
        for (_, n, k, stack) in matrices(shape) {
            let key = tensor_shape(shape, (n, k, stack));
            if numbers.dense.contains_key(&key) {
                continue;
            }
            let all = key[1..].iter().product::<u64>() as usize;
            let dense = rows(ty, all, k, 50);
            let packed = pack_tensor(ty, &key, None, &dense).map_err(|e| e.to_string())?;
            numbers.sparse.insert(key.clone(), packed);
            numbers.dense.insert(key, dense);
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

/// A tensor of a file.
struct Entry<'a> {
    name: String,
    ty: GgmlType,
    shape: Vec<u64>,
    data: Data<'a>,
}

/// A model's tensors; its layers' matrices are of `ty`.
fn entries<'a>(s: &Shape, ty: GgmlType, numbers: &'a Numbers) -> Vec<Entry<'a>> {
    let ends = |name: &str| Entry {
        name: name.to_owned(),
        ty: ty.dense(),
        shape: vec![s.embd as u64, s.vocab as u64],
        data: Data::Bytes(&numbers.embedding),
    };
    let ones = |name: String, len: usize| Entry {
        name,
        ty: GgmlType::F32,
        shape: vec![len as u64],
        data: Data::Floats(vec![1.0; len]),
    };
    let mut all = vec![ends("token_embd.weight")];
    for layer in 0..s.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        all.push(ones(name("attn_norm"), s.embd));
        all.push(ones(name("ffn_norm"), s.embd));
        if let Some((count, _)) = s.experts {
            all.push(ones(name("attn_q_norm"), s.head_dim));
            all.push(ones(name("attn_k_norm"), s.head_dim));
            // Experts that differ, so that tokens choose.
            let float = |i: usize| (i as f32 * 0.37 + layer as f32).sin() * 0.1;
            all.push(Entry {
                name: name("ffn_gate_inp"),
                ty: GgmlType::F32,
                shape: vec![s.embd as u64, count as u64],
                data: Data::Floats((0..s.embd * count).map(float).collect()),
            });
        }
        for (part, n, k, stack) in matrices(s) {
            let shape = tensor_shape(s, (n, k, stack));
            let from = match ty.is_sparse() {
                true => &numbers.sparse,
                false => &numbers.dense,
            };
            all.push(Entry {
                name: name(part),
                ty,
                data: Data::Bytes(&from[&shape]),
                shape,
            });
        }
    }
    all.push(ones("output_norm.weight".into(), s.embd));
    all.push(ends("output.weight"));
    all
}

/// Writes a model whose layers' matrices are of `ty`.
fn write(path: &Path, s: &Shape, ty: GgmlType, numbers: &Numbers) -> Result<(), String> {
    let text = |e: tegula_gguf::Error| e.to_string();
    let mut writer = GgufWriter::new(metadata(s));
    let entries = entries(s, ty, numbers);
    for e in &entries {
        let declared = match (e.ty.is_sparse(), &e.data) {
            (true, Data::Bytes(bytes)) => {
                writer.add_sparse(&e.name, e.ty, &e.shape, bytes.len() as u64)
            }
            _ => writer.add_tensor(&e.name, e.ty, &e.shape),
        };
        declared.map_err(text)?;
    }
    let mut out = writer.create(path).map_err(text)?;
    for e in &entries {
        match &e.data {
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

/// Hyperparameters, and a vocabulary of the right size.
fn metadata(s: &Shape) -> Metadata {
    let arch = match s.experts {
        Some(_) => "qwen3moe",
        None => "llama",
    };
    let mut md = Metadata::new(s.name);
    md.set("general.architecture", arch);
    md.set("general.name", format!("{} (random weights)", s.name));
    let mut set = |key: &str, n: usize| md.set(&format!("{arch}.{key}"), n as u32);
    set("block_count", s.layers);
    set("context_length", 8192);
    set("embedding_length", s.embd);
    set("feed_forward_length", s.ff);
    set("attention.head_count", s.heads);
    set("attention.head_count_kv", s.kv_heads);
    set("attention.key_length", s.head_dim);
    set("attention.value_length", s.head_dim);
    set("rope.dimension_count", s.head_dim);
    set("vocab_size", s.vocab);
    if let Some((count, used)) = s.experts {
        set("expert_count", count);
        set("expert_used_count", used);
        set("expert_feed_forward_length", s.ff);
    }
    md.set(&format!("{arch}.rope.freq_base"), 1e6f32);
    md.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5f32);
    let mut tokens: Vec<String> = (0..=255).map(|b| byte_char(b).to_string()).collect();
    tokens.push("\u{120}t".to_owned());
    tokens.extend((tokens.len()..s.vocab).map(|i| format!("word{i}")));
    let end = s.vocab - 1;
    let mut types = vec![1i32; s.vocab];
    types[end] = 3;
    md.set("tokenizer.ggml.model", "gpt2");
    md.set("tokenizer.ggml.pre", "qwen2");
    md.set("tokenizer.ggml.tokens", tokens);
    md.set("tokenizer.ggml.token_type", types);
    md.set("tokenizer.ggml.merges", vec!["\u{120} t".to_owned()]);
    md.set("tokenizer.ggml.bos_token_id", end as u32);
    md.set("tokenizer.ggml.eos_token_id", end as u32);
    md.set("tokenizer.ggml.add_bos_token", false);
    md
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn small_models_of_both_kinds_run() {
        let dense = Shape {
            name: "small",
            layers: 2,
            embd: 128,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            ff: 256,
            experts: None,
            vocab: 512,
        };
        let moe = Shape {
            ff: 64,
            experts: Some((8, 2)),
            ..dense
        };
        let plan = Plan {
            set: 1,
            turns: 1,
            time: Duration::ZERO,
            threads: 2,
        };
        for (shape, ty) in [
            (dense, GgmlType::S_BF16),
            (dense, GgmlType::S8),
            (moe, GgmlType::S8),
        ] {
            let series = measure(&plan, &shape, "small", ty).unwrap();
            assert_eq!(series.len(), 2 * BATCHES.len());
            let gains = crate::report::gains(&series);
            assert_eq!(gains.len(), BATCHES.len());
            // Half of the weights of the layers' matrices are gone.
            let ratio = gains[0].dense_bytes as f64 / gains[0].name.bytes as f64;
            assert!((1.1..1.8).contains(&ratio), "{ty}: {ratio}");
        }
    }

    #[test]
    fn shapes_have_the_published_sizes() {
        let billions = |shape: Shape| shape.weights() / 100_000_000;
        assert_eq!((billions(LLAMA), billions(QWEN)), (80, 305));
        let quarter = LLAMA.part(4);
        assert_eq!((quarter.layers, quarter.vocab), (8, 32_064));
    }
}
