//! Small models of random weights, adapters for them, and what the two are together.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};
use tegula_engine::{
    Batch, Context, ContextOptions, LoadOptions, Model, offload::GpuLayers, share::DecodeShare,
};
use tegula_gguf::{GgmlType, Gguf, Metadata, blocks, writer::GgufWriter};
use tegula_kernels::{
    Tier,
    device::{Device, sim::SimDevice},
};

/// Lends its vocabulary.
pub const EMBEDDED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tegula/assets/ferrous-moe-21m-Q4_0.gguf"
);

/// Random numbers, always the same.
pub struct Random(u32);

impl Random {
    pub fn new(seed: u32) -> Random {
        Random(seed)
    }

    /// From -1 to 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `len` of them, times `scale`.
    pub fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| scale * self.next()).collect()
    }
}

/// A tensor in f32, its shape in ggml's order.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<u64>,
    pub values: Vec<f32>,
}

/// Metadata and tensors of a file to be.
#[derive(Clone)]
pub struct Parts {
    pub metadata: Metadata,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Parts {
    /// Two layers, dense (LLaMA) or with four experts (Qwen3), and an output matrix of its own or
    /// the embeddings again.
    pub fn model(experts: bool) -> Parts {
        let arch = if experts { "qwen3moe" } else { "llama" };
        let lender = Gguf::open(EMBEDDED).unwrap();
        let mut metadata = lender.metadata().clone();
        metadata.retain(|key| key.starts_with("tokenizer."));
        metadata.set("general.architecture", arch);
        metadata.set("general.name", "tiny");
        let (embd, heads, kv_heads, dim, ff) = (64u32, 4u32, 2u32, 32u32, 96u32);
        let sizes = [
            ("block_count", 2),
            ("context_length", 256),
            ("embedding_length", embd),
            ("feed_forward_length", ff),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
            ("attention.key_length", dim),
            ("attention.value_length", dim),
        ];
        let of_experts = [
            ("expert_count", 4),
            ("expert_used_count", 2),
            ("expert_feed_forward_length", ff),
        ];
        let more: &[_] = if experts { &of_experts } else { &[] };
        for (key, value) in sizes.iter().chain(more) {
            metadata.set(&format!("{arch}.{key}"), *value);
        }
        metadata.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5f32);
        let mut parts = Parts {
            metadata,
            tensors: BTreeMap::new(),
        };
        let mut random = Random::new(if experts { 7 } else { 3 });
        let mut put = |name: String, shape: &[u32]| {
            let len: u32 = shape.iter().product();
            let mut values = match shape.len() {
                1 => vec![1.0; len as usize],
                _ => random.values(len as usize, (3.0 / shape[0] as f32).sqrt()),
            };
            if shape.len() == 1 {
                let noise = random.values(values.len(), 0.2);
                values.iter_mut().zip(noise).for_each(|(v, n)| *v += n);
            }
            let shape = shape.iter().map(|n| u64::from(*n)).collect();
            parts.tensors.insert(name, Tensor { shape, values });
        };
        put("token_embd.weight".to_owned(), &[embd, 4096]);
        put("output_norm.weight".to_owned(), &[embd]);
        if !experts {
            put("output.weight".to_owned(), &[embd, 4096]);
        }
        for i in 0..2 {
            let mut put = |part: &str, shape: &[u32]| put(format!("blk.{i}.{part}.weight"), shape);
            put("attn_norm", &[embd]);
            put("ffn_norm", &[embd]);
            put("attn_q", &[embd, heads * dim]);
            put("attn_k", &[embd, kv_heads * dim]);
            put("attn_v", &[embd, kv_heads * dim]);
            put("attn_output", &[heads * dim, embd]);
            if experts {
                put("attn_q_norm", &[dim]);
                put("attn_k_norm", &[dim]);
                put("ffn_gate_inp", &[embd, 4]);
                put("ffn_gate_exps", &[embd, ff, 4]);
                put("ffn_up_exps", &[embd, ff, 4]);
                put("ffn_down_exps", &[ff, embd, 4]);
            } else {
                put("ffn_gate", &[embd, ff]);
                put("ffn_up", &[embd, ff]);
                put("ffn_down", &[ff, embd]);
            }
        }
        parts
    }

    /// With experts: every token takes all of them, so that the least difference before a router
    /// can't change the choice.
    pub fn with_all_experts(mut self) -> Parts {
        self.metadata.set("qwen3moe.expert_used_count", 4u32);
        self
    }

    /// An adapter of this rank for all matrices of a model whose names `takes` takes: as large as
    /// the weights themselves where `alpha` is the rank or 0.
    pub fn adapter(
        &self,
        rank: usize,
        alpha: f32,
        seed: u32,
        takes: impl Fn(&str) -> bool,
    ) -> Parts {
        let mut metadata = Metadata::default();
        let arch = self.metadata.get("general.architecture").unwrap().clone();
        metadata.set("general.architecture", arch);
        metadata.set("general.type", "adapter");
        metadata.set("adapter.type", "lora");
        metadata.set("adapter.lora.alpha", alpha);
        let mut adapter = Parts {
            metadata,
            tensors: BTreeMap::new(),
        };
        let mut random = Random::new(seed);
        for (name, t) in &self.tensors {
            if t.shape.len() == 1 || name == "token_embd.weight" || !takes(name) {
                continue;
            }
            let [k, n] = [t.shape[0], t.shape[1]];
            let rest = &t.shape[2..];
            let mut put = |what: &str, first: u64, second: u64, scale: f32| {
                let shape: Vec<u64> = [&[first, second], rest].concat();
                let len = shape.iter().product::<u64>() as usize;
                let values = random.values(len, scale);
                let name = format!("{name}.lora_{what}");
                adapter.tensors.insert(name, Tensor { shape, values });
            };
            put("a", k, rank as u64, (3.0 / k as f32).sqrt());
            put("b", rank as u64, n, (3.0 / rank as f32).sqrt());
        }
        adapter
    }

    /// Adds `scale` times an adapter to the weights, in f64.
    pub fn merge(&mut self, adapter: &Parts, scale: f64) {
        let alpha = adapter.metadata.f32("adapter.lora.alpha").unwrap().unwrap();
        for (name, a) in &adapter.tensors {
            let Some(name) = name.strip_suffix(".lora_a") else {
                continue;
            };
            let b = &adapter.tensors[&format!("{name}.lora_b")];
            let w = self.tensors.get_mut(name).unwrap();
            let [k, n, rank] = [w.shape[0], w.shape[1], a.shape[1]].map(|n| n as usize);
            let factor = match alpha == 0.0 {
                true => scale,
                false => scale * f64::from(alpha) / rank as f64,
            };
            for (at, w) in w.values.iter_mut().enumerate() {
                let (e, row, col) = (at / (n * k), at / k % n, at % k);
                let products = (0..rank).map(|r| {
                    let b = f64::from(b.values[(e * n + row) * rank + r]);
                    b * f64::from(a.values[(e * rank + r) * k + col])
                });
                *w = (f64::from(*w) + factor * products.sum::<f64>()) as f32;
            }
        }
    }

    /// Rounds tensors to what their types hold.
    pub fn rounded(mut self, ty: impl Fn(&str) -> GgmlType) -> Parts {
        for (name, t) in &mut self.tensors {
            let mut values = vec![0.0; t.values.len()];
            let ty = type_of(t, &ty, name);
            blocks::dequantize(ty, &encode(ty, t), &mut values).unwrap();
            t.values = values;
        }
        self
    }

    /// Writes the file, norms in f32.
    pub fn write(&self, path: &Path, ty: impl Fn(&str) -> GgmlType) -> PathBuf {
        let mut writer = GgufWriter::new(self.metadata.clone());
        let mut data = Vec::new();
        for (name, t) in &self.tensors {
            let ty = type_of(t, &ty, name);
            writer.add_tensor(name, ty, &t.shape).unwrap();
            data.push(encode(ty, t));
        }
        let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
        std::fs::write(path, writer.to_bytes(&slices).unwrap()).unwrap();
        path.to_owned()
    }
}

fn type_of(t: &Tensor, ty: &impl Fn(&str) -> GgmlType, name: &str) -> GgmlType {
    match t.shape.len() {
        1 => GgmlType::F32,
        _ => ty(name),
    }
}

fn encode(ty: GgmlType, t: &Tensor) -> Vec<u8> {
    let bytes = ty.bytes_for(t.values.len() as u64).unwrap() as usize;
    let mut out = vec![0; bytes];
    blocks::quantize(ty, &t.values, None, &mut out).unwrap();
    out
}

/// Of few tokens, run in micro-batches of so many.
pub fn context(options: &LoadOptions, ubatch: usize) -> Context {
    let model = Arc::new(Model::load(options, &mut |_| {}).unwrap());
    let small = ContextOptions {
        context: 128,
        ubatch,
        ..ContextOptions::default()
    };
    Context::new(model, &small).unwrap()
}

/// Logits behind each of some tokens, which run in micro-batches of so many.
pub fn logits(options: &LoadOptions, ubatch: usize) -> Vec<f32> {
    let ids: Vec<u32> = (0..37).map(|i| 3 + i * 101 % 4000).collect();
    let mut context = context(options, ubatch);
    let out = context.decode(&Batch::all_logits(0, &ids)).unwrap();
    (0..out.len())
        .flat_map(|i| out.logits(i).to_vec())
        .collect()
}

/// The largest difference, by the largest value.
pub fn apart(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let both = got.iter().zip(want);
    both.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

pub fn near(what: &str, got: &[f32], want: &[f32], within: f32) {
    let apart = apart(got, want);
    assert!(apart <= within, "{what}: {apart} apart, at most {within}");
}

/// With a simulated device that takes all layers it can; everything that may stream or be shared is.
pub fn beside_a_device(options: LoadOptions) -> LoadOptions {
    let device = Arc::new(SimDevice::new("SIM0", 1 << 30, Tier::detect_max()));
    let devices = vec![device as Arc<dyn Device>];
    let mut options = options.with_devices(devices).unwrap();
    options.offload.layers = GpuLayers::Count(99);
    options.offload.margin = 0;
    options.offload.context = 128;
    options.offload.op_offload_min_batch = Some(2);
    options.offload.decode_share = DecodeShare::Fraction(0.5);
    options
}
