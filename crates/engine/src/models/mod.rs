//! The graphs: one file per architecture, over shared building blocks.
//!
//! Shapes are written row-major, slowest first; `m` is the number of tokens in the step.

mod blocks;
mod llama;
mod qwen2;
mod qwen3;
mod qwen3moe;

pub(crate) use blocks::{Buffers, Step};

use crate::Arch;
use tegula_kernels::Weights;

/// All that is multiplied. Matrices are `[n][k]`: `n` outputs, `k` inputs.
pub(crate) struct Matrices {
    /// `[vocab][embd]`
    pub embedding: Weights,
    /// `[vocab][embd]`; the embedding again where it is absent.
    pub output: Option<Weights>,
    /// `[embd]`
    pub output_norm: Vec<f32>,
    pub layers: Vec<Layer>,
}

/// One transformer layer.
pub(crate) struct Layer {
    /// `[embd]`
    pub attn_norm: Vec<f32>,
    /// `[heads * head_dim][embd]`
    pub q: Weights,
    /// `[kv_heads * head_dim][embd]`
    pub k: Weights,
    /// `[kv_heads * head_dim][embd]`
    pub v: Weights,
    /// As many values as the matrix has rows.
    pub q_bias: Option<Vec<f32>>,
    pub k_bias: Option<Vec<f32>>,
    pub v_bias: Option<Vec<f32>>,
    /// `[head_dim]`
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    /// `[embd][heads * head_dim]`
    pub out: Weights,
    /// `[embd]`
    pub out_bias: Option<Vec<f32>>,
    /// `[embd]`
    pub ffn_norm: Vec<f32>,
    pub ffn: Ffn,
}

/// The feed-forward part of a layer.
pub(crate) enum Ffn {
    Dense {
        /// `[ff][embd]`
        gate: Weights,
        /// `[ff][embd]`
        up: Weights,
        /// `[embd][ff]`
        down: Weights,
    },
    Experts {
        /// `[experts][embd]`
        router: Weights,
        /// `[experts][ff][embd]`
        gate: Weights,
        /// `[experts][ff][embd]`
        up: Weights,
        /// `[experts][embd][ff]`
        down: Weights,
    },
}

/// Runs the layers of `arch` over a step that holds embedded tokens.
pub(crate) fn forward(arch: Arch, matrices: &Matrices, step: &mut Step<'_>) {
    match arch {
        Arch::Llama => llama::forward(matrices, step),
        Arch::Qwen2 => qwen2::forward(matrices, step),
        Arch::Qwen3 => qwen3::forward(matrices, step),
        Arch::Qwen3Moe => qwen3moe::forward(matrices, step),
    }
}
