//! Shapes of models: those with a name, and any other. What measures and tests without weights of
//! a real model makes a file of random ones from them.

mod vocab;

use crate::{Arch, config::Experts};
use tegula_gguf::Metadata;

/// Dimensions that no model can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shape {name}: {what}")]
pub struct ShapeError {
    name: String,
    what: String,
}

/// What a tensor of random weights holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fill {
    Constant(f32),
    Random,
}

/// A tensor that a model of some shape has.
#[derive(Clone, Debug, PartialEq)]
pub struct ShapedTensor {
    pub name: String,
    /// ggml order: row length first.
    pub shape: Vec<u64>,
    pub fill: Fill,
}

impl ShapedTensor {
    /// Its weights.
    pub fn weights(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// The dimensions of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub name: String,
    pub arch: Arch,
    pub layers: usize,
    /// Width of the residual stream.
    pub embd: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Rows of a dense gate and up.
    pub ff: usize,
    pub experts: Option<Experts>,
    pub vocab: usize,
    /// Positions that the metadata promise.
    pub context: usize,
    pub rope_base: f32,
    pub rms_eps: f32,
    /// The embedding is the output matrix, too.
    pub tied: bool,
}

/// Name, architecture, layers, embd, heads, KV heads, head dimension, ff, experts (count,
/// used, ff), vocabulary, context, rope base, tied.
type Row = (
    &'static str,
    Arch,
    [usize; 6],
    [usize; 3],
    [usize; 2],
    f32,
    bool,
);

const NONE: [usize; 3] = [0; 3];

/// Published models, and a small one of each architecture to start from.
#[rustfmt::skip]
const ROWS: [Row; 13] = [
    ("qwen3-0.6b",    Arch::Qwen3,    [28, 1024, 16, 8, 128, 3072],  NONE,          [151_936, 40_960],  1e6, true),
    ("qwen3-1.7b",    Arch::Qwen3,    [28, 2048, 16, 8, 128, 6144],  NONE,          [151_936, 40_960],  1e6, true),
    ("qwen3-4b",      Arch::Qwen3,    [36, 2560, 32, 8, 128, 9728],  NONE,          [151_936, 40_960],  1e6, true),
    ("qwen3-8b",      Arch::Qwen3,    [36, 4096, 32, 8, 128, 12288], NONE,          [151_936, 40_960],  1e6, false),
    ("qwen3-14b",     Arch::Qwen3,    [40, 5120, 40, 8, 128, 17408], NONE,          [151_936, 40_960],  1e6, false),
    ("qwen3-30b-a3b", Arch::Qwen3Moe, [48, 2048, 32, 4, 128, 6144],  [128, 8, 768], [151_936, 40_960],  1e6, false),
    ("qwen2.5-7b",    Arch::Qwen2,    [28, 3584, 28, 4, 128, 18944], NONE,          [152_064, 32_768],  1e6, false),
    ("llama-3-8b",    Arch::Llama,    [32, 4096, 32, 8, 128, 14336], NONE,          [128_256, 8_192],   5e5, false),
    ("mixtral-8x7b",  Arch::Llama,    [32, 4096, 32, 8, 128, 14336], [8, 2, 14336], [32_000, 32_768],   1e6, false),
    ("llama",         Arch::Llama,    [2, 256, 4, 2, 64, 512],       NONE,          [512, 2_048],       1e4, false),
    ("qwen2",         Arch::Qwen2,    [2, 256, 4, 2, 64, 512],       NONE,          [512, 2_048],       1e6, false),
    ("qwen3",         Arch::Qwen3,    [2, 256, 4, 2, 64, 512],       NONE,          [512, 2_048],       1e6, true),
    ("qwen3moe",      Arch::Qwen3Moe, [2, 256, 4, 2, 64, 512],       [8, 2, 256],   [512, 2_048],       1e6, false),
];

/// The names that [`Shape::preset`] knows.
pub const PRESETS: [&str; ROWS.len()] = {
    let mut names = [""; ROWS.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = ROWS[i].0;
        i += 1;
    }
    names
};

impl Shape {
    /// The shape of a published model, or a small one of an architecture.
    pub fn preset(name: &str) -> Option<Shape> {
        let row = ROWS.iter().find(|r| r.0.eq_ignore_ascii_case(name))?;
        let &(name, arch, dims, experts, [vocab, context], rope_base, tied) = row;
        let [layers, embd, heads, kv_heads, head_dim, ff] = dims;
        let [count, used, expert_ff] = experts;
        Some(Shape {
            name: name.to_owned(),
            arch,
            layers,
            embd,
            heads,
            kv_heads,
            head_dim,
            ff,
            experts: (count > 0).then_some(Experts {
                count,
                used,
                ff: expert_ff,
            }),
            vocab,
            context,
            rope_base,
            rms_eps: match arch {
                Arch::Llama => 1e-5,
                _ => 1e-6,
            },
            tied,
        })
    }

    /// Refuses dimensions that no model can have. Whether blocks fit the rows is for the
    /// writer to say.
    ///
    /// # Errors
    /// [`ShapeError`], which says what can't be.
    pub fn check(&self) -> Result<(), ShapeError> {
        let refuse = |what: String| {
            Err(ShapeError {
                name: self.name.clone(),
                what,
            })
        };
        let sizes = [
            ("layers", self.layers, 1, 10_000),
            ("width", self.embd, 1, 1 << 20),
            ("heads", self.heads, 1, 1 << 16),
            ("KV heads", self.kv_heads, 1, 1 << 16),
            ("head dimension", self.head_dim, 2, 1024),
            ("feed-forward rows", self.ff, 1, 1 << 24),
            ("vocabulary", self.vocab, vocab::MIN, 1 << 24),
            ("context", self.context, 1, 1 << 30),
        ];
        for (what, n, min, max) in sizes {
            if !(min..=max).contains(&n) {
                return refuse(format!("{what} of {n} is out of range ({min} to {max})"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return refuse(format!(
                "{} heads of {} can't share {} KV heads",
                self.heads, self.head_dim, self.kv_heads
            ));
        }
        match (self.arch, self.experts) {
            (_, Some(e)) if e.used == 0 || e.used > e.count || e.count > 1 << 16 || e.ff == 0 => {
                refuse(format!(
                    "{} of {} experts of {} rows can't be",
                    e.used, e.count, e.ff
                ))
            }
            (Arch::Qwen2 | Arch::Qwen3, Some(_)) => refuse(format!(
                "{} has no experts (llama and qwen3moe have)",
                self.arch
            )),
            (Arch::Qwen3Moe, None) => refuse("qwen3moe needs experts".to_owned()),
            // Mixtral's files have one length for both.
            (Arch::Llama, Some(e)) if e.ff != self.ff => refuse(format!(
                "llama's experts have as many rows as its feed-forward ({}), not {}",
                self.ff, e.ff
            )),
            _ => Ok(()),
        }
    }

    /// The hyperparameters, as converters write them, and a vocabulary of the right size.
    pub fn metadata(&self) -> Metadata {
        let mut md = Metadata::new(self.name.as_str());
        md.set("general.architecture", self.arch.name());
        md.set("general.type", "model");
        md.set("general.name", format!("{} (random weights)", self.name));
        let mut set = |key: &str, n: usize| {
            md.set(&format!("{}.{key}", self.arch), n as u32);
        };
        set("block_count", self.layers);
        set("context_length", self.context);
        set("embedding_length", self.embd);
        set("feed_forward_length", self.ff);
        set("attention.head_count", self.heads);
        set("attention.head_count_kv", self.kv_heads);
        set("attention.key_length", self.head_dim);
        set("attention.value_length", self.head_dim);
        set("rope.dimension_count", self.head_dim);
        set("vocab_size", self.vocab);
        if let Some(e) = self.experts {
            set("expert_count", e.count);
            set("expert_used_count", e.used);
            if self.arch == Arch::Qwen3Moe {
                set("expert_feed_forward_length", e.ff);
            }
        }
        let mut set = |key: &str, x: f32| {
            md.set(&format!("{}.{key}", self.arch), x);
        };
        set("rope.freq_base", self.rope_base);
        set("attention.layer_norm_rms_epsilon", self.rms_eps);
        vocab::describe(self, &mut md);
        md
    }

    /// The tensors in file order.
    pub fn tensors(&self) -> Vec<ShapedTensor> {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], fill| {
            tensors.push(ShapedTensor {
                name,
                shape: shape.iter().map(|&n| n as u64).collect(),
                fill,
            });
        };
        let ones = Fill::Constant(1.0);
        let zeros = Fill::Constant(0.0);
        let random = Fill::Random;
        let (embd, dim) = (self.embd, self.head_dim);
        let (q, kv) = (self.heads * dim, self.kv_heads * dim);
        add("token_embd.weight".into(), &[embd, self.vocab], random);
        for layer in 0..self.layers {
            let mut add = |part: &str, shape: &[usize], fill| {
                add(format!("blk.{layer}.{part}"), shape, fill);
            };
            add("attn_norm.weight", &[embd], ones);
            add("attn_q.weight", &[embd, q], random);
            add("attn_k.weight", &[embd, kv], random);
            add("attn_v.weight", &[embd, kv], random);
            if self.arch == Arch::Qwen2 {
                add("attn_q.bias", &[q], zeros);
                add("attn_k.bias", &[kv], zeros);
                add("attn_v.bias", &[kv], zeros);
            }
            if matches!(self.arch, Arch::Qwen3 | Arch::Qwen3Moe) {
                add("attn_q_norm.weight", &[dim], ones);
                add("attn_k_norm.weight", &[dim], ones);
            }
            add("attn_output.weight", &[q, embd], random);
            add("ffn_norm.weight", &[embd], ones);
            match self.experts {
                Some(e) => {
                    add("ffn_gate_inp.weight", &[embd, e.count], random);
                    add("ffn_gate_exps.weight", &[embd, e.ff, e.count], random);
                    add("ffn_up_exps.weight", &[embd, e.ff, e.count], random);
                    add("ffn_down_exps.weight", &[e.ff, embd, e.count], random);
                }
                None => {
                    add("ffn_gate.weight", &[embd, self.ff], random);
                    add("ffn_up.weight", &[embd, self.ff], random);
                    add("ffn_down.weight", &[self.ff, embd], random);
                }
            }
        }
        add("output_norm.weight".into(), &[embd], ones);
        if !self.tied {
            add("output.weight".into(), &[embd, self.vocab], random);
        }
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters of the published models, in units of a million.
    #[test]
    fn presets_have_the_published_sizes() {
        let millions = |name: &str| {
            let shape = Shape::preset(name).unwrap();
            shape.check().unwrap();
            let weights = shape
                .tensors()
                .iter()
                .map(ShapedTensor::weights)
                .sum::<u64>();
            weights / 1_000_000
        };
        let published = [
            ("qwen3-0.6b", 596),
            ("qwen3-1.7b", 1_720),
            ("qwen3-4b", 4_022),
            ("qwen3-8b", 8_190),
            ("qwen3-14b", 14_768),
            ("qwen3-30b-a3b", 30_532),
            ("qwen2.5-7b", 7_615),
            ("llama-3-8b", 8_030),
            ("mixtral-8x7b", 46_702),
        ];
        for (name, want) in published {
            assert_eq!(millions(name), want, "{name}");
        }
    }
}
