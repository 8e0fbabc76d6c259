//! The graphs: one file per architecture, over shared building blocks.
//!
//! Shapes are written row-major, slowest first; `m` is the number of tokens in the step.

mod blocks;
mod graph;
mod lane;
mod llama;
mod qwen2;
mod qwen3;
mod qwen3moe;
mod shared;

pub(crate) use blocks::{Buffers, OnPool, Step};
pub(crate) use graph::{Graph, On};
pub(crate) use lane::Lane;
pub(crate) use shared::{LayerShares, SharedRows, Sharing, multiply};

use crate::{Arch, Top, stream::Stream};
use tegula_kernels::{
    Weights,
    device::{self, RawMatrix},
};

/// What layers that run on a device without leaving it end with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Behind {
    /// The last one's x.
    Layer,
    /// The last one's router: its experts are elsewhere.
    Router,
    /// The output matrix.
    Output,
}

/// What is wanted of the tokens that want something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// Hidden states alone.
    Hidden,
    /// Hidden states and logits.
    Logits,
    /// The likeliest token alone.
    Best,
}

/// Some of a row's logits, by token.
pub(crate) type TopRow = Vec<(u32, f32)>;

/// Where it goes: each appends.
pub(crate) struct Results<'a> {
    /// `[outputs][embd]`
    pub hidden: &'a mut Vec<f32>,
    /// `[outputs][vocab]`
    pub logits: &'a mut Vec<f32>,
    /// `[outputs]`
    pub best: &'a mut Vec<u32>,
    /// The largest logits instead of all of them, where the output matrix is on a device: a row
    /// per output, ascending by token.
    pub top: Option<(&'a Top, &'a mut Vec<TopRow>)>,
}

/// Something of the model, on the CPU or on a device.
pub(crate) enum Placed<H, D> {
    Host(H),
    Device(usize, D),
    /// Parts on several devices, in their order.
    Split(Vec<(usize, D)>),
}

/// All that is multiplied. Matrices are `[n][k]`: `n` outputs, `k` inputs.
pub(crate) struct Matrices {
    /// `[vocab][embd]`
    pub embedding: Weights,
    pub output: Placed<Output<Weights, Vec<f32>>, Output<device::Matrix, device::Buffer>>,
    /// Of an output matrix on the CPU.
    pub output_share: Option<SharedRows>,
    pub layers: Vec<Layer>,
}

/// What turns the last hidden state into logits.
pub(crate) struct Output<M, V> {
    /// `[embd]`
    pub norm: V,
    /// `[vocab][embd]`; the embedding again where it is absent.
    pub matrix: Option<M>,
}

/// One transformer layer.
pub(crate) struct Layer {
    pub attention: Placed<HostAttention, DeviceAttention>,
    pub ffn: Placed<HostFfn, DeviceFfn>,
    /// Of a mixture of experts.
    pub experts: Option<Placed<Network<Weights>, Network<device::Matrix>>>,
    pub streamed: Streamed,
    pub shares: LayerShares,
}

/// What of a layer lies on the CPU and is brought to a device for batches of many tokens: the
/// file's own bytes.
#[derive(Default)]
pub(crate) struct Streamed {
    /// q, k and v, and out.
    pub attention: Option<(Stream, ([RawMatrix; 3], RawMatrix))>,
    /// Of a dense network.
    pub ffn: Option<(Stream, Network<RawMatrix>)>,
    pub experts: Option<(Stream, Network<RawMatrix>)>,
}

pub(crate) type HostAttention = Attention<Weights, Vec<f32>>;
pub(crate) type DeviceAttention = Attention<device::Matrix, device::Buffer>;
pub(crate) type HostFfn = Ffn<Weights, Vec<f32>>;
pub(crate) type DeviceFfn = Ffn<device::Matrix, device::Buffer>;

/// A layer's attention.
pub(crate) struct Attention<M, V> {
    /// `[embd]`
    pub norm: V,
    /// `[heads * head_dim][embd]`
    pub q: M,
    /// `[kv_heads * head_dim][embd]`
    pub k: M,
    /// `[kv_heads * head_dim][embd]`
    pub v: M,
    /// As many values as the matrix has rows.
    pub q_bias: Option<V>,
    pub k_bias: Option<V>,
    pub v_bias: Option<V>,
    /// `[head_dim]`
    pub q_norm: Option<V>,
    pub k_norm: Option<V>,
    /// `[embd][heads * head_dim]`
    pub out: M,
    /// `[embd]`
    pub out_bias: Option<V>,
}

/// The feed-forward part of a layer.
pub(crate) struct Ffn<M, V> {
    /// `[embd]`
    pub norm: V,
    pub kind: FfnKind<M>,
}

/// Dense, or where the router is of a mixture of experts.
pub(crate) enum FfnKind<M> {
    Dense(Network<M>),
    /// `[experts][embd]`
    Router(M),
}

/// A feed-forward network, or a stack of them.
pub(crate) struct Network<M> {
    /// `[ff][embd]` or `[experts][ff][embd]`
    pub gate: M,
    /// `[ff][embd]` or `[experts][ff][embd]`
    pub up: M,
    /// `[embd][ff]` or `[experts][embd][ff]`
    pub down: M,
}

/// Runs a layer of `arch`, up to the choice of experts where it has some:
/// [`Graph::experts`] is behind that.
pub(crate) fn layer(arch: Arch, layer: usize, graph: &mut Graph<'_>) {
    match arch {
        Arch::Llama => llama::layer(layer, graph),
        Arch::Qwen2 => qwen2::layer(layer, graph),
        Arch::Qwen3 => qwen3::layer(layer, graph),
        Arch::Qwen3Moe => qwen3moe::layer(layer, graph),
    }
}
