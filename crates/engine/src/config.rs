//! Hyperparameters from a file's metadata.

use crate::{Error, Result};
use serde::Serialize;
use std::fmt;
use tegula_gguf::{Gguf, Metadata};
use tegula_kernels::ops::{RopeParams, RopeStyle, Yarn, moe::RouteOptions};

/// The architectures that the engine runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// LLaMA 1–3, Mistral; with experts Mixtral.
    Llama,
    Qwen2,
    Qwen3,
    Qwen3Moe,
}

impl Arch {
    /// All of them.
    pub const ALL: [Arch; 4] = [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Qwen3Moe];

    /// As `general.architecture` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Llama => "llama",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Qwen3Moe => "qwen3moe",
        }
    }

    fn rope_style(self) -> RopeStyle {
        match self {
            Arch::Llama => RopeStyle::Normal,
            Arch::Qwen2 | Arch::Qwen3 | Arch::Qwen3Moe => RopeStyle::Neox,
        }
    }

    /// Whether queries and keys are normalised per head.
    pub(crate) fn has_qk_norm(self) -> bool {
        matches!(self, Arch::Qwen3 | Arch::Qwen3Moe)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A mixture of experts.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Experts {
    pub count: usize,
    /// Experts per token.
    pub used: usize,
    /// Rows of an expert's gate and up.
    pub ff: usize,
}

/// What the graphs need to know of a model.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ModelConfig {
    pub arch: Arch,
    pub name: String,
    pub layers: usize,
    pub embd: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Rows of a dense gate and up; 0 where all layers have experts.
    pub ff: usize,
    pub vocab: usize,
    pub context: usize,
    pub rms_eps: f32,
    pub experts: Option<Experts>,
    #[serde(skip)]
    pub rope: RopeParams,
}

impl ModelConfig {
    /// How the router's logits choose experts.
    pub(crate) fn route_options(&self) -> RouteOptions {
        RouteOptions {
            used: self.experts.map_or(1, |e| e.used),
            normalize: true,
            scale: 1.0,
        }
    }

    /// Reads and checks the hyperparameters.
    pub fn from_gguf(gguf: &Gguf) -> Result<ModelConfig> {
        let md = gguf.metadata();
        let file = md.origin().to_owned();
        let named = md.require_str("general.architecture")?;
        let Some(arch) = Arch::ALL.into_iter().find(|a| a.name() == named) else {
            return Err(Error::Architecture {
                file,
                arch: named.to_owned(),
                supported: Arch::ALL.map(Arch::name).join(", "),
            });
        };
        let reader = Reader { md, arch };
        let config = reader.config(gguf)?;
        let wrong = |what: String| {
            Err(Error::Config {
                file: file.clone(),
                what,
            })
        };
        let sizes = [
            ("layers", config.layers, 10_000),
            ("embedding length", config.embd, 1 << 20),
            ("heads", config.heads, 1 << 16),
            ("KV heads", config.kv_heads, 1 << 16),
            ("head dimension", config.head_dim, 1024),
            ("vocabulary", config.vocab, 1 << 26),
            ("context length", config.context, 1 << 30),
        ];
        for (what, value, limit) in sizes {
            if value == 0 || value > limit {
                return wrong(format!("{what} of {value} is out of range (1 to {limit})"));
            }
        }
        if !config.heads.is_multiple_of(config.kv_heads) {
            let (h, kv) = (config.heads, config.kv_heads);
            return wrong(format!("{h} heads can't share {kv} KV heads evenly"));
        }
        if !config.head_dim.is_multiple_of(2) || config.rope.frequencies.len() * 2 > config.head_dim
        {
            let (d, r) = (config.head_dim, config.rope.frequencies.len() * 2);
            return wrong(format!(
                "head dimension {d} with {r} rotating dimensions can't be"
            ));
        }
        if let Some(e) = config.experts
            && (e.used == 0 || e.used > e.count || e.ff == 0 || e.count > 1 << 16)
        {
            return wrong(format!(
                "{} of {} experts of {} rows can't be",
                e.used, e.count, e.ff
            ));
        }
        Ok(config)
    }
}

struct Reader<'a> {
    md: &'a Metadata,
    arch: Arch,
}

impl Reader<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.md.u32(&self.key(key))?.map(|n| n as usize))
    }

    fn required(&self, key: &str) -> Result<usize> {
        Ok(self.md.require_u32(&self.key(key))? as usize)
    }

    fn float(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.md.f32(&self.key(key))?)
    }

    fn config(&self, gguf: &Gguf) -> Result<ModelConfig> {
        let embd = self.required("embedding_length")?;
        let heads = self.required("attention.head_count")?;
        let key_length = self.size("attention.key_length")?;
        let head_dim = key_length.or(embd.checked_div(heads)).unwrap_or(0);
        let value_length = self.size("attention.value_length")?.unwrap_or(head_dim);
        if value_length != head_dim {
            return Err(Error::Config {
                file: self.md.origin().to_owned(),
                what: format!("keys of {head_dim} and values of {value_length} dimensions differ"),
            });
        }
        let experts = match self.size("expert_count")?.filter(|&n| n > 0) {
            Some(count) => Some(Experts {
                count,
                used: self.required("expert_used_count")?,
                ff: match self.size("expert_feed_forward_length")? {
                    Some(ff) => ff,
                    None => self.required("feed_forward_length")?,
                },
            }),
            None => None,
        };
        if (self.arch == Arch::Qwen3Moe) && experts.is_none() {
            return Err(self
                .md
                .require_u32(&self.key("expert_count"))
                .err()
                .map_or_else(
                    || Error::Config {
                        file: self.md.origin().to_owned(),
                        what: "a mixture of experts without experts".to_owned(),
                    },
                    Error::from,
                ));
        }
        let rows = |name| gguf.tensor(name).map(|t| t.rows() as usize);
        let vocab = rows("token_embd.weight")
            .or(self.size("vocab_size")?)
            .unwrap_or(0);
        Ok(ModelConfig {
            arch: self.arch,
            name: self.md.str("general.name")?.unwrap_or("unnamed").to_owned(),
            layers: self.required("block_count")?,
            embd,
            heads,
            kv_heads: self.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ff: self.size("feed_forward_length")?.unwrap_or(0),
            vocab,
            context: self.required("context_length")?,
            rms_eps: self
                .md
                .require_f32(&self.key("attention.layer_norm_rms_epsilon"))?,
            experts,
            rope: self.rope(head_dim, gguf)?,
        })
    }

    fn rope(&self, head_dim: usize, gguf: &Gguf) -> Result<RopeParams> {
        let dims = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        let base = self.float("rope.freq_base")?.unwrap_or(10_000.0);
        let rope = RopeParams::new(self.arch.rope_style(), dims.min(1 << 16), base);
        if let Some(tensor) = gguf.tensor("rope_freqs.weight") {
            let mut divisors = vec![0.0; tensor.elements().min(1 << 16) as usize];
            let decoded =
                tegula_gguf::blocks::dequantize(tensor.ty, gguf.data(tensor), &mut divisors);
            let scaled = decoded.ok().and_then(|()| rope.divided_by(&divisors));
            return scaled.ok_or_else(|| Error::Tensor {
                file: self.md.origin().to_owned(),
                tensor: tensor.name.clone(),
                what: format!("must hold {} f32 divisors", dims / 2),
            });
        }
        let factor = self.float("rope.scaling.factor")?.filter(|&f| f > 0.0);
        let kind = self
            .md
            .str(&self.key("rope.scaling.type"))?
            .unwrap_or("none");
        match (kind, factor) {
            ("none", _) | (_, None) => Ok(rope),
            ("linear", Some(factor)) => Ok(rope.linear(factor)),
            ("yarn", Some(factor)) => {
                let original = self.size("rope.scaling.original_context_length")?;
                let original = match original {
                    Some(n) => n,
                    None => self.required("context_length")?,
                };
                let number = |key, default| Ok::<_, Error>(self.float(key)?.unwrap_or(default));
                Ok(rope.yarn(
                    base,
                    &Yarn {
                        factor,
                        original_context: original as u32,
                        beta_fast: number("rope.scaling.yarn_beta_fast", 32.0)?,
                        beta_slow: number("rope.scaling.yarn_beta_slow", 1.0)?,
                        attention_factor: number("rope.scaling.attn_factor", 1.0)?,
                    },
                ))
            }
            (other, Some(_)) => Err(Error::Config {
                file: self.md.origin().to_owned(),
                what: format!(
                    "rope scaling `{other}` is not supported (supported: none, linear, yarn)"
                ),
            }),
        }
    }
}
