//! The oracle: what the models compute, written down once, plainly.
//!
//! Everything is f32: weights are dequantised when a model is loaded, activations are not
//! rounded to anything else, unless [`Activations`] says so. There is one forward pass for all architectures, as they differ
//! in few places:
//!
//! | architecture | rotary pairs | q, k, v | feed-forward |
//! |---|---|---|---|
//! | `llama` (2, 3) | neighbours | plain | gate, up, down |
//! | `llama` with experts (Mixtral) | neighbours | plain | experts |
//! | `qwen2` | halves | biased | gate, up, down |
//! | `qwen3` | halves | q and k normalised per head | gate, up, down |
//! | `qwen3moe` | halves | q and k normalised per head | experts |
//!
//! Deliberately absent: batches of sequences, fused or reordered operations. A tensor or a setting that this file has no words for is an error, never
//! ignored. Matrices are `[outputs][inputs]`, activations `[tokens][width]`, both flat.

use std::{cell::RefCell, collections::HashSet};

use half::f16;
use rayon::prelude::*;
use tegula_gguf::{Gguf, TensorInfo, blocks, sparse};

/// Why the oracle can't load or run a model.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The file is not what the architecture asks for.
    #[error(transparent)]
    Gguf(#[from] tegula_gguf::Error),
    /// The architecture, or a setting of it, is none that the oracle describes.
    #[error("{file}: the oracle knows no {what}")]
    Unsupported { file: String, what: String },
    /// A tensor is missing, or has another shape or an unreadable type.
    #[error("{file}: tensor `{tensor}` {what}")]
    Tensor {
        file: String,
        tensor: String,
        what: String,
    },
    /// A setting makes no sense.
    #[error("{file}: {what}")]
    Config { file: String, what: String },
    /// The caller's tokens can't be run.
    #[error("{0}")]
    Input(String),
}

type Result<T> = std::result::Result<T, OracleError>;

// ----------------------------------------------------------------------------------------
// Config and weights
// ----------------------------------------------------------------------------------------

/// The model's dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `llama`, `qwen2`, `qwen3` or `qwen3moe`.
    pub arch: String,
    pub n_vocab: usize,
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; each serves `n_head / n_head_kv` query heads.
    pub n_head_kv: usize,
    pub head_dim: usize,
    /// 0 without experts.
    pub n_expert: usize,
    /// Experts that each token visits.
    pub n_expert_used: usize,
    /// Positions that the model was trained for.
    pub n_ctx: usize,
    /// Added to the mean square in norms.
    pub rms_eps: f32,
    /// What dot products of queries and keys are multiplied by.
    pub attn_scale: f32,
}

/// `[outputs][inputs]`, one after the other for each expert if there are several.
struct Matrix {
    data: Vec<f32>,
    n_in: usize,
    n_out: usize,
    /// Inputs that share a scale when they are rounded to 8 bits; `None`: they are not.
    rounded: Option<usize>,
}

/// How products with quantised weights see their inputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Activations {
    /// As they are.
    #[default]
    Exact,
    /// As llama.cpp's kernels do: rounded to 8 bits, with a scale in f16 per 32 of them, or
    /// in f32 per 256 where the weights come in blocks of 256. With few bits per weight that
    /// moves perplexities by more than half a per cent.
    EightBits,
}

struct Layer {
    attn_norm: Vec<f32>, // [n_embd]
    q: Matrix,           // [n_head * head_dim][n_embd]
    k: Matrix,           // [n_head_kv * head_dim][n_embd]
    v: Matrix,           // [n_head_kv * head_dim][n_embd]
    q_bias: Option<Vec<f32>>,
    k_bias: Option<Vec<f32>>,
    v_bias: Option<Vec<f32>>,
    q_norm: Option<Vec<f32>>, // [head_dim]
    k_norm: Option<Vec<f32>>, // [head_dim]
    output: Matrix,           // [n_embd][n_head * head_dim]
    ffn_norm: Vec<f32>,       // [n_embd]
    ffn: FeedForward,
}

enum FeedForward {
    Dense(Expert),
    Experts {
        router: Matrix, // [n_expert][n_embd]
        experts: Vec<Expert>,
    },
}

struct Expert {
    gate: Matrix, // [n_ff][n_embd]
    up: Matrix,   // [n_ff][n_embd]
    down: Matrix, // [n_embd][n_ff]
}

/// How positions turn queries and keys.
struct Rope {
    /// Radians per position for each pair of dimensions: `[n_rot / 2]`.
    frequencies: Vec<f32>,
    /// What turned values are multiplied by; 1 but for YaRN.
    magnitude: f32,
    /// Pairs are (i, i + n_rot/2) rather than (2i, 2i + 1).
    halves: bool,
}

/// A model in f32.
pub struct Oracle {
    config: Config,
    rope: Rope,
    token_embd: Matrix, // [n_vocab][n_embd]
    layers: Vec<Layer>,
    output_norm: Vec<f32>,  // [n_embd]
    output: Option<Matrix>, // [n_vocab][n_embd]; None: the embeddings serve
}

/// Reads tensors by name and remembers which were asked for.
struct Reader<'a> {
    gguf: &'a Gguf,
    activations: Activations,
    /// LoRA adapters, and how much of each.
    adapters: &'a [(Gguf, f32)],
    file: String,
    seen: RefCell<HashSet<String>>,
}

impl Reader<'_> {
    fn config(&self, what: impl Into<String>) -> OracleError {
        OracleError::Config {
            file: self.file.clone(),
            what: what.into(),
        }
    }

    /// The tensor in f32, or `None` if the file has none of that name. `shape` is in the
    /// file's order, the row's length first.
    fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>> {
        let error = |what: String| OracleError::Tensor {
            file: self.file.clone(),
            tensor: name.to_owned(),
            what,
        };
        let Some(info) = self.gguf.tensor(name) else {
            return Ok(None);
        };
        self.seen.borrow_mut().insert(name.to_owned());
        // Files may leave out trailing dimensions of one.
        let trimmed = |s: &[u64]| {
            let used = s.iter().rposition(|&n| n != 1).map_or(0, |i| i + 1);
            s[..used].to_vec()
        };
        let want: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        if trimmed(&info.shape) != trimmed(&want) {
            return Err(error(format!("is {:?}, not {want:?}", info.shape)));
        }
        let mut data = vec![0.0; shape.iter().product()];
        let rows = sparse::dense_data(self.gguf, info)?;
        blocks::dequantize(info.ty.dense(), &rows, &mut data)
            .map_err(|e| error(format!("can't be read: {e}")))?;
        Ok(Some(data))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let missing = || OracleError::Tensor {
            file: self.file.clone(),
            tensor: name.to_owned(),
            what: "is missing".to_owned(),
        };
        self.optional(name, &[len])?.ok_or_else(missing)
    }

    fn matrix(&self, name: &str, n_in: usize, n_out: usize) -> Result<Matrix> {
        let mut experts = self.experts(name, n_in, n_out, 1)?;
        Ok(experts.remove(0))
    }

    fn experts(&self, name: &str, n_in: usize, n_out: usize, n: usize) -> Result<Vec<Matrix>> {
        let missing = || OracleError::Tensor {
            file: self.file.clone(),
            tensor: name.to_owned(),
            what: "is missing".to_owned(),
        };
        let with = |end| format!("{}.{end}", name.strip_suffix(".weight").unwrap_or(name));
        let mut data = self
            .optional(name, &[n_in, n_out, n])?
            .ok_or_else(missing)?;
        // Factors of whole matrices. What activations may be divided by is of no use here.
        if let Some(factors) = self.optional(&with("scale"), &[n])? {
            for (matrix, factor) in data.chunks_exact_mut(n_in * n_out).zip(factors) {
                matrix.iter_mut().for_each(|w| *w *= factor);
            }
        }
        self.seen.borrow_mut().insert(with("input_scale"));
        for (adapter, strength) in self.adapters {
            self.adapt(&mut data, name, (n_in, n_out), adapter, *strength)?;
        }
        let block = self.gguf.tensor(name).map_or(1, |t| t.ty.block_len());
        let rounded = match self.activations {
            Activations::EightBits if block > 1 => Some(block),
            _ => None,
        };
        let split = data.chunks_exact(n_in * n_out).map(|one| Matrix {
            data: one.to_vec(),
            n_in,
            n_out,
            rounded,
        });
        Ok(split.collect())
    }

    /// What an adapter makes of matrices: W + s · B A, with s = strength · alpha / rank, or the
    /// strength where there is no alpha.
    fn adapt(
        &self,
        matrices: &mut [f32],
        name: &str,
        (n_in, n_out): (usize, usize),
        adapter: &Gguf,
        strength: f32,
    ) -> Result<()> {
        let of = |side: &str| adapter.tensor(&format!("{name}.lora_{side}"));
        let (Some(down), Some(up)) = (of("a"), of("b")) else {
            return Ok(());
        };
        let read = |t: &TensorInfo| {
            let mut values = vec![0.0; t.elements() as usize];
            let read = blocks::dequantize(t.ty, adapter.data(t), &mut values);
            read.map(|()| values).map_err(|e| OracleError::Tensor {
                file: adapter.metadata().origin().to_owned(),
                tensor: t.name.clone(),
                what: format!("can't be read: {e}"),
            })
        };
        let (down_values, up_values) = (read(down)?, read(up)?);
        let rank = down.shape.get(1).map_or(1, |r| *r as usize);
        let experts = matrices.len() / (n_in * n_out);
        let fits = down_values.len() == experts * rank * n_in;
        if !fits || up_values.len() != experts * n_out * rank {
            let what = format!("adapter of {:?} and {:?} for {name}", down.shape, up.shape);
            return Err(self.config(what));
        }
        let alpha = adapter.metadata().f32("adapter.lora.alpha")?;
        let s = match alpha {
            Some(alpha) if alpha != 0.0 => strength * alpha / rank as f32,
            _ => strength,
        };
        for (w, (a, b)) in matrices.chunks_exact_mut(n_in * n_out).zip(
            down_values
                .chunks_exact(rank * n_in)
                .zip(up_values.chunks_exact(n_out * rank)),
        ) {
            for (row, b) in w.chunks_exact_mut(n_in).zip(b.chunks_exact(rank)) {
                for (a, b) in a.chunks_exact(n_in).zip(b) {
                    row.iter_mut().zip(a).for_each(|(w, a)| *w += s * b * a);
                }
            }
        }
        Ok(())
    }

    /// Outputs of the matrix `name`.
    fn rows(&self, name: &str) -> Result<usize> {
        match self.gguf.tensor(name).map(|t| t.shape.as_slice()) {
            Some([_, rows, ..]) => Ok(*rows as usize),
            _ => Err(OracleError::Tensor {
                file: self.file.clone(),
                tensor: name.to_owned(),
                what: "is missing or no matrix".to_owned(),
            }),
        }
    }
}

impl Oracle {
    /// Reads the model, all of it, as f32: four bytes a weight.
    ///
    /// # Errors
    /// [`OracleError`] naming the file and the setting or tensor: an architecture that is
    /// not described here, a missing, misshapen or superfluous tensor.
    pub fn load(gguf: &Gguf) -> Result<Oracle> {
        Oracle::load_with(gguf, Activations::Exact)
    }

    /// The same, with activations as said.
    ///
    /// # Errors
    /// As [`Oracle::load`].
    pub fn load_with(gguf: &Gguf, activations: Activations) -> Result<Oracle> {
        Oracle::load_adapted(gguf, activations, &[])
    }

    /// The same, with LoRA adapters merged into the weights, each so many times: files that fit the
    /// model.
    ///
    /// # Errors
    /// As [`Oracle::load`], and when an adapter can't be read.
    pub fn load_adapted(
        gguf: &Gguf,
        activations: Activations,
        adapters: &[(Gguf, f32)],
    ) -> Result<Oracle> {
        let md = gguf.metadata();
        let read = Reader {
            gguf,
            activations,
            adapters,
            file: md.origin().to_owned(),
            seen: RefCell::default(),
        };
        let unsupported = |what: String| OracleError::Unsupported {
            file: md.origin().to_owned(),
            what,
        };
        let arch = md.require_str("general.architecture")?;
        if !["llama", "qwen2", "qwen3", "qwen3moe"].contains(&arch) {
            let what = format!("architecture `{arch}` (llama, qwen2, qwen3, qwen3moe)");
            return Err(unsupported(what));
        }
        let key = |name: &str| format!("{arch}.{name}");
        let size = |name: &str| -> Result<usize> {
            let n = md.require_u32(&key(name))? as usize;
            match n {
                1..=0x10_0000 => Ok(n),
                _ => Err(read.config(format!("{arch}.{name} is {n}"))),
            }
        };

        let (n_embd, n_head) = (size("embedding_length")?, size("attention.head_count")?);
        let n_head_kv = match md.contains(&key("attention.head_count_kv")) {
            true => size("attention.head_count_kv")?,
            false => n_head,
        };
        let head_dim = match md.contains(&key("attention.key_length")) {
            true => size("attention.key_length")?,
            false => n_embd / n_head,
        };
        let value_dim = md.u32(&key("attention.value_length"))?;
        let n_expert = md.u32(&key("expert_count"))?.unwrap_or(0) as usize;
        let n_expert_used = md.u32(&key("expert_used_count"))?.unwrap_or(0) as usize;
        if !n_head.is_multiple_of(n_head_kv) || head_dim == 0 {
            let what = format!("{n_head} heads of {head_dim} can't share {n_head_kv}");
            return Err(read.config(what));
        }
        if value_dim.is_some_and(|d| d as usize != head_dim) {
            return Err(unsupported(
                "keys and values of different lengths".to_owned(),
            ));
        }
        if n_expert_used > n_expert || (n_expert > 0 && n_expert_used == 0) {
            let what = format!("{n_expert_used} of {n_expert} experts can't be used");
            return Err(read.config(what));
        }
        if (arch == "qwen3moe") != (n_expert > 0) && arch != "llama" {
            return Err(unsupported(format!("`{arch}` with {n_expert} experts")));
        }
        let attn_scale = md.f32(&key("attention.scale"))?.unwrap_or(0.0);
        let config = Config {
            arch: arch.to_owned(),
            n_vocab: read.rows("token_embd.weight")?,
            n_layer: size("block_count")?,
            n_embd,
            n_head,
            n_head_kv,
            head_dim,
            n_expert,
            n_expert_used,
            n_ctx: size("context_length")?,
            rms_eps: md.require_f32(&key("attention.layer_norm_rms_epsilon"))?,
            attn_scale: match attn_scale {
                0.0 => 1.0 / (head_dim as f32).sqrt(),
                given => given,
            },
        };

        let rope = Rope::from_gguf(&read, &config)?;
        let token_embd = read.matrix("token_embd.weight", n_embd, config.n_vocab)?;
        let layers = (0..config.n_layer)
            .map(|l| Layer::from_gguf(&read, &config, l))
            .collect::<Result<Vec<_>>>()?;
        let output_norm = read.vector("output_norm.weight", n_embd)?;
        let output = match gguf.tensor("output.weight") {
            Some(_) => Some(read.matrix("output.weight", n_embd, config.n_vocab)?),
            None => None,
        };
        let seen = read.seen.into_inner();
        if let Some(other) = gguf.tensors().iter().find(|t| !seen.contains(&t.name)) {
            return Err(unsupported(format!("tensor `{}` in `{arch}`", other.name)));
        }
        Ok(Oracle {
            config,
            rope,
            token_embd,
            layers,
            output_norm,
            output,
        })
    }

    /// The model's dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl Layer {
    fn from_gguf(read: &Reader<'_>, c: &Config, layer: usize) -> Result<Layer> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (n_q, n_kv) = (c.n_head * c.head_dim, c.n_head_kv * c.head_dim);
        let normed = c.arch.starts_with("qwen3");
        let norm = |part: &str| match normed {
            true => read.vector(&name(part), c.head_dim).map(Some),
            false => Ok(None),
        };
        let bias = |part: &str, len| match c.arch == "qwen2" {
            true => read.vector(&name(part), len).map(Some),
            false => read.optional(&name(part), &[len]),
        };
        let ffn = if c.n_expert == 0 {
            let n_ff = read.rows(&name("ffn_gate.weight"))?;
            FeedForward::Dense(Expert {
                gate: read.matrix(&name("ffn_gate.weight"), c.n_embd, n_ff)?,
                up: read.matrix(&name("ffn_up.weight"), c.n_embd, n_ff)?,
                down: read.matrix(&name("ffn_down.weight"), n_ff, c.n_embd)?,
            })
        } else {
            let n_ff = read.rows(&name("ffn_gate_exps.weight"))?;
            let stack = |part: &str, n_in, n_out| {
                let all = read.experts(&name(part), n_in, n_out, c.n_expert)?;
                Ok::<_, OracleError>(all.into_iter())
            };
            let gate = stack("ffn_gate_exps.weight", c.n_embd, n_ff)?;
            let up = stack("ffn_up_exps.weight", c.n_embd, n_ff)?;
            let down = stack("ffn_down_exps.weight", n_ff, c.n_embd)?;
            FeedForward::Experts {
                router: read.matrix(&name("ffn_gate_inp.weight"), c.n_embd, c.n_expert)?,
                experts: gate
                    .zip(up)
                    .zip(down)
                    .map(|((gate, up), down)| Expert { gate, up, down })
                    .collect(),
            }
        };
        Ok(Layer {
            attn_norm: read.vector(&name("attn_norm.weight"), c.n_embd)?,
            q: read.matrix(&name("attn_q.weight"), c.n_embd, n_q)?,
            k: read.matrix(&name("attn_k.weight"), c.n_embd, n_kv)?,
            v: read.matrix(&name("attn_v.weight"), c.n_embd, n_kv)?,
            q_bias: bias("attn_q.bias", n_q)?,
            k_bias: bias("attn_k.bias", n_kv)?,
            v_bias: bias("attn_v.bias", n_kv)?,
            q_norm: norm("attn_q_norm.weight")?,
            k_norm: norm("attn_k_norm.weight")?,
            output: read.matrix(&name("attn_output.weight"), n_q, c.n_embd)?,
            ffn_norm: read.vector(&name("ffn_norm.weight"), c.n_embd)?,
            ffn,
        })
    }
}

impl Rope {
    /// Pair `i` of `n_rot / 2` turns by `base^(-2i / n_rot)` radians per position. On top of
    /// that come, as files ask for: Llama 3's factors, a tensor by which frequencies are
    /// divided; linear scaling, which divides all by one number; YaRN
    /// (<https://arxiv.org/abs/2309.00071>), which divides only those pairs that turn slowly.
    fn from_gguf(read: &Reader<'_>, c: &Config) -> Result<Rope> {
        let md = read.gguf.metadata();
        let key = |name: &str| format!("{}.rope.{name}", c.arch);
        let unsupported = |what: String| OracleError::Unsupported {
            file: read.file.clone(),
            what,
        };
        let n_rot = md
            .u32(&key("dimension_count"))?
            .map_or(c.head_dim, |n| n as usize);
        if n_rot == 0 || n_rot > c.head_dim || !n_rot.is_multiple_of(2) {
            let what = format!("can't rotate {n_rot} of {} dimensions", c.head_dim);
            return Err(read.config(what));
        }
        let base = f64::from(md.f32(&key("freq_base"))?.unwrap_or(10_000.0));
        let kind = md.str(&key("scaling.type"))?.unwrap_or("none");
        let factor = match (
            md.f32(&key("scaling.factor"))?,
            md.f32(&key("scale_linear"))?,
        ) {
            (Some(f), _) | (None, Some(f)) if f != 0.0 => f64::from(f),
            _ => 1.0,
        };
        let divisors = read.optional("rope_freqs.weight", &[n_rot / 2])?;
        let unscaled = |i: usize| base.powf(-2.0 * i as f64 / n_rot as f64);
        let frequency: Box<dyn Fn(usize) -> f64> = match kind {
            "none" => Box::new(unscaled),
            "linear" => Box::new(move |i| unscaled(i) / factor),
            "yarn" => {
                let n_ctx = md.u32(&key("scaling.original_context_length"))?;
                let n_ctx = n_ctx.map_or(c.n_ctx as f64, f64::from);
                let beta = |name: &str, default: f32| -> Result<f64> {
                    Ok(f64::from(md.f32(&key(name))?.unwrap_or(default)))
                };
                // The pair that makes `turns` turns over the original context.
                let pair = |turns: f64| {
                    n_rot as f64 * (n_ctx / (turns * std::f64::consts::TAU)).ln()
                        / (2.0 * base.ln())
                };
                let fast = pair(beta("scaling.yarn_beta_fast", 32.0)?).floor().max(0.0);
                let slow = pair(beta("scaling.yarn_beta_slow", 1.0)?).ceil();
                let slow = slow.min(n_rot as f64 - 1.0);
                let extend = beta("scaling.yarn_ext_factor", 1.0)?;
                Box::new(move |i| {
                    let slowness = ((i as f64 - fast) / (slow - fast).max(0.001)).clamp(0.0, 1.0);
                    let keep = (1.0 - slowness) * extend;
                    unscaled(i) * (keep + (1.0 - keep) / factor)
                })
            }
            other => return Err(unsupported(format!("rope scaling `{other}`"))),
        };
        let extended = md.f32(&key("scaling.yarn_ext_factor"))? != Some(0.0);
        let magnitude = match kind {
            "yarn" if extended => 1.0 + 0.1 * factor.ln(),
            _ => 1.0,
        };
        let attn_factor = md.f32(&key("scaling.attn_factor"))?.unwrap_or(1.0);
        Ok(Rope {
            frequencies: (0..n_rot / 2)
                .map(|i| frequency(i) / divisors.as_ref().map_or(1.0, |d| f64::from(d[i])))
                .map(|f| f as f32)
                .collect(),
            magnitude: magnitude as f32 * attn_factor,
            halves: c.arch != "llama",
        })
    }

    /// Turns one head's query or key at a position.
    fn turn(&self, head: &mut [f32], position: usize) {
        let half = self.frequencies.len();
        for (i, frequency) in self.frequencies.iter().enumerate() {
            let (a, b) = match self.halves {
                true => (i, i + half),
                false => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            let (x, y) = (head[a], head[b]);
            head[a] = (x * cos - y * sin) * self.magnitude;
            head[b] = (x * sin + y * cos) * self.magnitude;
        }
    }
}

// ----------------------------------------------------------------------------------------
// The parts
// ----------------------------------------------------------------------------------------

/// Each row of `x` brought to a mean square of one, times `weight`.
fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let mean_square = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
        let scale = 1.0 / (mean_square + eps).sqrt();
        out.extend(row.iter().zip(weight).map(|(v, w)| v * scale * w));
    }
    out
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    x.iter_mut().for_each(|v| *v /= sum);
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// Sixteen partial sums, so that the compiler may use vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// `x [tokens][n_in]` times `w`, plus `bias`: `[tokens][n_out]`.
fn matmul(w: &Matrix, x: &[f32], bias: Option<&Vec<f32>>) -> Vec<f32> {
    let rounded = w.rounded.map(|block| to_eight_bits(x, block));
    let x = rounded.as_deref().unwrap_or(x);
    // A row of weights serves several tokens while it is in the cache.
    const TOKENS: usize = 16;
    let mut out = vec![0.0; x.len() / w.n_in * w.n_out];
    out.par_chunks_mut(TOKENS * w.n_out)
        .zip(x.par_chunks(TOKENS * w.n_in))
        .for_each(|(out, x)| {
            for (o, row) in w.data.chunks_exact(w.n_in).enumerate() {
                for (t, x) in x.chunks_exact(w.n_in).enumerate() {
                    out[t * w.n_out + o] = dot(row, x) + bias.map_or(0.0, |b| b[o]);
                }
            }
        });
    out
}

/// Values rounded to 8 bits and back; each `block` of them shares a scale.
fn to_eight_bits(x: &[f32], block: usize) -> Vec<f32> {
    let mut out = x.to_vec();
    for group in out.chunks_exact_mut(block) {
        let largest = group.iter().fold(0f32, |m, v| m.max(v.abs()));
        if largest == 0.0 {
            continue;
        }
        let scale = match block {
            32 => f16::from_f32(largest / 127.0).to_f32(),
            _ => largest / 127.0,
        };
        let inverse = 127.0 / largest;
        for v in group {
            *v = (*v * inverse).round_ties_even() * scale;
        }
    }
    out
}

/// `down(silu(gate(x)) * up(x))`: `[tokens][n_embd]` both ways.
fn feed_forward(ffn: &Expert, x: &[f32]) -> Vec<f32> {
    let gate = matmul(&ffn.gate, x, None); // [tokens][n_ff]
    let mut hidden = matmul(&ffn.up, x, None); // [tokens][n_ff]
    for (h, g) in hidden.iter_mut().zip(gate) {
        *h *= silu(g);
    }
    matmul(&ffn.down, &hidden, None)
}

/// Sends each token through the `used` experts that the router likes best, and adds their
/// results by the router's probabilities, made to sum to one over those chosen.
fn mixture(router: &Matrix, experts: &[Expert], used: usize, x: &[f32]) -> Vec<f32> {
    let n_embd = router.n_in;
    let mut probabilities = matmul(router, x, None); // [tokens][n_expert]
    // For each expert the tokens that visit it, and the weight of its word.
    let mut visits = vec![Vec::new(); experts.len()];
    for (token, row) in probabilities.chunks_exact_mut(experts.len()).enumerate() {
        softmax(row);
        let mut order: Vec<usize> = (0..experts.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let sum: f32 = order[..used].iter().map(|&e| row[e]).sum();
        for &e in &order[..used] {
            visits[e].push((token, row[e] / sum));
        }
    }
    let mut out = vec![0.0; x.len()]; // [tokens][n_embd]
    for (expert, visitors) in experts.iter().zip(visits) {
        let mut gathered = Vec::with_capacity(visitors.len() * n_embd);
        for &(token, _) in &visitors {
            gathered.extend_from_slice(&x[token * n_embd..][..n_embd]);
        }
        let result = feed_forward(expert, &gathered);
        for (row, (token, weight)) in result.chunks_exact(n_embd).zip(visitors) {
            for (o, r) in out[token * n_embd..][..n_embd].iter_mut().zip(row) {
                *o += weight * r;
            }
        }
    }
    out
}

// ----------------------------------------------------------------------------------------
// The forward pass
// ----------------------------------------------------------------------------------------

/// The keys and values of a sequence so far: for each layer `[tokens][n_head_kv][head_dim]`.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    len: usize,
}

impl Sequence {
    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Oracle {
    /// Appends `tokens` to `sequence` and returns the logits that follow each of the last
    /// `want` of them: `[want][n_vocab]`.
    ///
    /// # Errors
    /// [`OracleError::Input`] if a token is not in the vocabulary, the context is full, or
    /// `want` exceeds the tokens; `sequence` is then as before.
    pub fn forward(
        &self,
        sequence: &mut Sequence,
        tokens: &[u32],
        want: usize,
    ) -> Result<Vec<f32>> {
        let c = &self.config;
        let first = sequence.len;
        if want > tokens.len() {
            let what = format!("logits of {want} positions wanted from {}", tokens.len());
            return Err(OracleError::Input(what));
        }
        if let Some(bad) = tokens.iter().find(|&&t| t as usize >= c.n_vocab) {
            let what = format!("token {bad} is not among the vocabulary's {}", c.n_vocab);
            return Err(OracleError::Input(what));
        }
        if first + tokens.len() > c.n_ctx {
            let what = format!(
                "{} tokens exceed the model's context of {}",
                first + tokens.len(),
                c.n_ctx
            );
            return Err(OracleError::Input(what));
        }
        sequence.keys.resize(c.n_layer, Vec::new());
        sequence.values.resize(c.n_layer, Vec::new());

        // The residual stream: [tokens][n_embd].
        let mut x = Vec::with_capacity(tokens.len() * c.n_embd);
        for &token in tokens {
            x.extend_from_slice(&self.token_embd.data[token as usize * c.n_embd..][..c.n_embd]);
        }

        for (l, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attn_norm, c.rms_eps);
            let mut q = matmul(&layer.q, &normed, layer.q_bias.as_ref()); // [tokens][n_head][head_dim]
            let mut k = matmul(&layer.k, &normed, layer.k_bias.as_ref()); // [tokens][n_head_kv][head_dim]
            let v = matmul(&layer.v, &normed, layer.v_bias.as_ref()); // [tokens][n_head_kv][head_dim]
            if let (Some(q_norm), Some(k_norm)) = (&layer.q_norm, &layer.k_norm) {
                q = rms_norm(&q, q_norm, c.rms_eps);
                k = rms_norm(&k, k_norm, c.rms_eps);
            }
            for (i, head) in q.chunks_exact_mut(c.head_dim).enumerate() {
                self.rope.turn(head, first + i / c.n_head);
            }
            for (i, head) in k.chunks_exact_mut(c.head_dim).enumerate() {
                self.rope.turn(head, first + i / c.n_head_kv);
            }
            sequence.keys[l].extend_from_slice(&k);
            sequence.values[l].extend_from_slice(&v);
            let attended = self.attention(&q, &sequence.keys[l], &sequence.values[l], first);
            add(&mut x, &matmul(&layer.output, &attended, None));

            let normed = rms_norm(&x, &layer.ffn_norm, c.rms_eps);
            let fed = match &layer.ffn {
                FeedForward::Dense(ffn) => feed_forward(ffn, &normed),
                FeedForward::Experts { router, experts } => {
                    mixture(router, experts, c.n_expert_used, &normed)
                }
            };
            add(&mut x, &fed);
        }
        sequence.len += tokens.len();

        let last = &x[(tokens.len() - want) * c.n_embd..];
        let normed = rms_norm(last, &self.output_norm, c.rms_eps);
        let output = self.output.as_ref().unwrap_or(&self.token_embd);
        Ok(matmul(output, &normed, None))
    }

    /// Every query looks at the keys up to its own position, `[tokens][n_head][head_dim]`:
    /// `softmax(q k^T * scale) v`.
    fn attention(&self, q: &[f32], keys: &[f32], values: &[f32], first: usize) -> Vec<f32> {
        let c = &self.config;
        let (group, stride) = (c.n_head / c.n_head_kv, c.n_head_kv * c.head_dim);
        let mut out = vec![0.0; q.len()];
        out.par_chunks_mut(c.head_dim)
            .zip(q.par_chunks(c.head_dim))
            .enumerate()
            .for_each(|(i, (out, q))| {
                let (position, head) = (first + i / c.n_head, i % c.n_head);
                let offset = head / group * c.head_dim;
                let at = |all, p: usize| -> &[f32] {
                    let all: &[f32] = all;
                    &all[p * stride + offset..][..c.head_dim]
                };
                let mut scores: Vec<f32> = (0..=position)
                    .map(|p| dot(q, at(keys, p)) * c.attn_scale)
                    .collect();
                softmax(&mut scores);
                for (p, score) in scores.into_iter().enumerate() {
                    for (o, v) in out.iter_mut().zip(at(values, p)) {
                        *o += score * v;
                    }
                }
            });
        out
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

// ----------------------------------------------------------------------------------------
// Uses
// ----------------------------------------------------------------------------------------

/// What [`Oracle::perplexity`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// Negative log-likelihood per scored token, in nats.
    pub nll: f64,
    /// `exp(nll)`.
    pub ppl: f64,
    /// Windows run.
    pub chunks: usize,
    /// Tokens scored.
    pub tokens: usize,
}

impl Oracle {
    /// The logits that follow `tokens`: `[n_vocab]`.
    ///
    /// # Errors
    /// As [`Oracle::forward`]; also if there is no token.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.forward(&mut Sequence::default(), tokens, 1)
    }

    /// Continues `prompt`: `pick` chooses a token from the logits, or ends by `None`. Ends
    /// also after `n` tokens and when the context is full.
    ///
    /// # Errors
    /// As [`Oracle::forward`].
    pub fn generate(
        &self,
        prompt: &[u32],
        n: usize,
        mut pick: impl FnMut(&[f32]) -> Option<u32>,
    ) -> Result<Vec<u32>> {
        let mut sequence = Sequence::default();
        let mut logits = self.forward(&mut sequence, prompt, 1)?;
        let mut out = Vec::new();
        while out.len() < n {
            let Some(token) = pick(&logits) else { break };
            out.push(token);
            if out.len() == n || sequence.len() == self.config.n_ctx {
                break;
            }
            logits = self.forward(&mut sequence, &[token], 1)?;
        }
        Ok(out)
    }

    /// Perplexity as llama.cpp counts it: windows of `n_ctx` tokens, each on its own, its
    /// first token replaced by `bos` if given; scored are the tokens of the second half, but
    /// the first of it. At most `chunks` windows. After each, `progress` gets the result so
    /// far and says whether to go on.
    ///
    /// # Errors
    /// As [`Oracle::forward`]; also if `tokens` fill no window.
    pub fn perplexity(
        &self,
        tokens: &[u32],
        n_ctx: usize,
        chunks: usize,
        bos: Option<u32>,
        mut progress: impl FnMut(Perplexity) -> bool,
    ) -> Result<Perplexity> {
        if n_ctx < 4 || tokens.len() < n_ctx {
            let what = format!("{} tokens fill no window of {n_ctx}", tokens.len());
            return Err(OracleError::Input(what));
        }
        let first = n_ctx / 2;
        let mut sum = 0.0;
        let mut result = Perplexity::default();
        for window in tokens.chunks_exact(n_ctx).take(chunks) {
            let mut window = window.to_vec();
            if let Some(bos) = bos {
                window[0] = bos;
            }
            // The logits at `first` to the last but one score their successors.
            let logits = self.forward(&mut Sequence::default(), &window, n_ctx - first)?;
            for (row, &next) in logits
                .chunks_exact(self.config.n_vocab)
                .zip(&window[first + 1..])
            {
                sum -= log_probability(row, next as usize);
                result.tokens += 1;
            }
            result.chunks += 1;
            result.nll = sum / result.tokens as f64;
            result.ppl = result.nll.exp();
            if !progress(result) {
                break;
            }
        }
        Ok(result)
    }
}

/// The natural logarithm of the probability that `logits` give to `token`.
pub fn log_probability(logits: &[f32], token: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    f64::from(logits[token] - max) - sum.ln()
}

/// The index of the largest logit, the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .reduce(|best, next| match next.1 > best.1 {
            true => next,
            false => best,
        });
    best.map_or(0, |(i, _)| i as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_are_127_steps_of_each_block() {
        let mut x = vec![0.0; 512];
        (x[0], x[1], x[2], x[40]) = (-127.0, 0.5, 1.5, 12.7);
        let by_32 = to_eight_bits(&x, 32);
        assert_eq!(by_32[..4], [-127.0, 0.0, 2.0, 0.0], "ties to even");
        let scale = f16::from_f32(0.1).to_f32();
        assert_eq!(by_32[40], 127.0 * scale, "a scale of its own, in f16");
        let by_256 = to_eight_bits(&x, 256);
        assert_eq!(by_256[40], 13.0, "the scale of the whole block");
        assert_eq!(by_256[256..], x[256..], "nothing but zeros stays that");
    }
}
