//! Where each tensor goes and what multiplies it: a pure function of the model and the
//! flags. The loader only executes it, `explain` only prints it.

pub use crate::offload::Device;
use crate::{
    Arch, LoraPart, ModelConfig,
    offload::{self, DeviceUse, Offload, OffloadFlags, Unit, unit},
    scales,
    share::{Share, Sharing},
    stream::{self, Stream},
};
use serde::Serialize;
use tegula_gguf::{Gguf, TensorInfo, sparse};
use tegula_kernels::{Amx, Kernels, Tier, strip};

/// What decides the placement besides the model.
#[derive(Clone, Debug)]
pub struct PlanFlags {
    pub tier: Tier,
    /// AMX may be used.
    pub amx: Option<Amx>,
    /// Repack matrices to strips where it pays.
    pub repack: bool,
    /// Pack matrices that have many zeros without them.
    pub sparse_pack: bool,
    /// The file is mapped, not read.
    pub mmap: bool,
    /// Strips are mapped from a file that was written by an earlier load.
    pub packed_cache: bool,
    /// Of the CPU.
    pub threads: usize,
    /// What goes to devices.
    pub offload: OffloadFlags,
}

/// In which memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Buffer {
    /// The file's own pages.
    Mmap,
    /// Memory that the file was read into, or small tensors converted to f32.
    Heap,
    /// Memory for repacked weights.
    Packed,
    /// Pages of the packed file, which hold repacked weights.
    Cache,
    /// A GPU's memory.
    Device,
}

/// In which order of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As in the file.
    Raw,
    /// Strips of 16 interleaved rows.
    Strip16,
    /// Strips of 16 rows without their zeros, the file's or packed.
    Sparse16,
    /// Plain f32.
    F32,
    /// The file's blocks, field by field, for a GPU.
    Planes,
}

/// What a tensor is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// Rows are looked up.
    Embedding,
    /// Rows are looked up, and it is the output matrix too.
    TiedEmbedding,
    Matrix,
    /// Norms, biases, frequencies.
    Vector,
    /// Nothing that the graphs of this architecture read.
    Unused,
}

/// One tensor's place.
#[derive(Clone, Debug, Serialize)]
pub struct Placement {
    pub tensor: String,
    /// ggml order: row length first.
    pub shape: Vec<u64>,
    #[serde(rename = "type")]
    pub ty: String,
    pub device: Device,
    pub buffer: Buffer,
    pub encoding: Encoding,
    /// The kernel that will read it.
    pub kernel: String,
    /// Resident bytes in that encoding.
    pub bytes: u64,
    /// Of each device, where several hold a part.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<u64>,
    /// Why there and not otherwise.
    pub reason: String,
    /// On which device it is multiplied all the same, and from how many tokens on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub streams: Option<Stream>,
    /// Of single tokens a device multiplies so much of it, from pinned memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// What LoRA adapters add to its products, on the CPU.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lora: Vec<LoraPart>,
    #[serde(skip)]
    role: Role,
    /// For matrices, where AMX was asked for: whether its tiles multiply them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiles: Option<TileUse>,
}

/// Whether AMX tiles multiply a matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TileUse {
    /// In batches of at least so many tokens; fewer are faster on vectors.
    From(usize),
    /// Never, for this reason.
    Never(&'static str),
}

/// All tensors, in file order.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub placements: Vec<Placement>,
    /// What each device in use holds.
    pub devices: Vec<DeviceUse>,
    /// Where the model's parts go.
    #[serde(skip)]
    pub offload: Offload,
}

impl Plan {
    /// Resident bytes of all tensors in a buffer.
    pub fn bytes_in(&self, buffer: Buffer) -> u64 {
        self.placements
            .iter()
            .filter(|p| p.buffer == buffer)
            .map(|p| p.bytes)
            .sum()
    }

    /// Bytes of LoRA adapters, besides the tensors that they change.
    pub fn adapter_bytes(&self) -> u64 {
        let parts = self.placements.iter().flat_map(|p| &p.lora);
        parts.map(|part| part.bytes).sum()
    }

    /// Bytes of pinned memory from which devices multiply for single tokens.
    pub fn pinned(&self) -> u64 {
        self.offload.shares.map_or(0, |shares| shares.bytes)
    }

    /// What all tokens read and multiply, by how often they do.
    pub fn matrices(&self) -> MatrixSizes {
        let mut sizes = MatrixSizes::default();
        for p in &self.placements {
            let output = p.tensor == "output.weight";
            let size = match p.role {
                Role::Unused | Role::Embedding => continue,
                Role::TiedEmbedding => &mut sizes.output,
                Role::Matrix if output => &mut sizes.output,
                Role::Matrix if p.tensor.ends_with("_exps.weight") => &mut sizes.experts,
                Role::Matrix | Role::Vector => &mut sizes.dense,
            };
            size.bytes += p.bytes;
            if p.role != Role::Vector {
                size.weights += p.shape.iter().product::<u64>();
            }
        }
        sizes
    }

    /// Matrices that AMX tiles multiply, and all matrices; `None` where AMX was not asked for.
    pub fn on_tiles(&self) -> Option<(usize, usize)> {
        let uses = || self.placements.iter().filter_map(|p| p.tiles);
        let on = |u: &TileUse| matches!(u, TileUse::From(_));
        (uses().count() > 0).then(|| (uses().filter(on).count(), uses().count()))
    }

    /// The place of a tensor.
    pub fn get(&self, tensor: &str) -> Option<&Placement> {
        self.placements.iter().find(|p| p.tensor == tensor)
    }
}

/// Resident bytes, and weights that are multiplied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MatrixSize {
    pub bytes: u64,
    pub weights: u64,
}

/// The matrices (and the small vectors) of a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MatrixSizes {
    /// Every token multiplies these.
    pub dense: MatrixSize,
    /// All experts of all layers; a token takes some.
    pub experts: MatrixSize,
    /// Tokens that want logits multiply this.
    pub output: MatrixSize,
}

/// What the graphs use a tensor for, by its name.
pub(crate) fn role(arch: Arch, gguf: &Gguf, tensor: &TensorInfo) -> Role {
    let name = tensor.name.as_str();
    let tied = gguf.tensor("output.weight").is_none();
    if let Some(matrix) = scales::matrix(name) {
        let of = gguf.tensor(&matrix).map(|m| role(arch, gguf, m));
        return match of {
            Some(Role::Matrix) => Role::Vector,
            _ => Role::Unused,
        };
    }
    match name {
        "token_embd.weight" if tied => return Role::TiedEmbedding,
        "token_embd.weight" => return Role::Embedding,
        "output.weight" => return Role::Matrix,
        "output_norm.weight" | "rope_freqs.weight" => return Role::Vector,
        _ => {}
    }
    let Some((_, part)) = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
    else {
        return Role::Unused;
    };
    match part {
        "attn_q.weight"
        | "attn_k.weight"
        | "attn_v.weight"
        | "attn_output.weight"
        | "ffn_gate.weight"
        | "ffn_up.weight"
        | "ffn_down.weight"
        | "ffn_gate_inp.weight"
        | "ffn_gate_exps.weight"
        | "ffn_up_exps.weight"
        | "ffn_down_exps.weight" => Role::Matrix,
        "attn_norm.weight" | "ffn_norm.weight" | "attn_q.bias" | "attn_k.bias" | "attn_v.bias"
        | "attn_output.bias" => Role::Vector,
        "attn_q_norm.weight" | "attn_k_norm.weight" if arch.has_qk_norm() => Role::Vector,
        _ => Role::Unused,
    }
}

/// Places every tensor.
pub fn plan(config: &ModelConfig, gguf: &Gguf, flags: &PlanFlags) -> Plan {
    let file = if flags.mmap {
        Buffer::Mmap
    } else {
        Buffer::Heap
    };
    let mut offload = offload::offload(config, gguf, &flags.offload);
    let tiles = |tensor: &TensorInfo| matches!(kernels(tensor, flags).1, Some(TileUse::From(_)));
    stream::decide(config, gguf, flags, &tiles, &mut offload);
    let mut sharing = Sharing::new(&flags.offload, &offload);
    let on_device = |tensor: &TensorInfo, unit: Unit| match offload.device(unit) {
        Device::Cpu => None,
        device => {
            let matrix = tensor.shape.len() > 1;
            let part = |d| offload.cut_bytes(tensor, d);
            let parts: Vec<u64> = match device {
                Device::Split => (0..offload.devices.len()).map(part).collect(),
                _ => Vec::new(),
            };
            Some(Placement {
                tensor: tensor.name.clone(),
                shape: tensor.shape.clone(),
                ty: tensor.ty.name().to_owned(),
                device,
                buffer: Buffer::Device,
                encoding: if matrix {
                    Encoding::Planes
                } else {
                    Encoding::F32
                },
                kernel: match matrix {
                    true => format!("{} product, gpu", tensor.ty),
                    false => "f32 rows, gpu".to_owned(),
                },
                bytes: match device {
                    Device::Split => parts.iter().sum(),
                    _ => offload::device_bytes(tensor),
                },
                parts,
                reason: offload.reason(unit).to_owned(),
                streams: None,
                share: None,
                lora: Vec::new(),
                role: role(config.arch, gguf, tensor),
                tiles: None,
            })
        }
    };
    let mut place = |tensor: &TensorInfo| {
        let mut role = role(config.arch, gguf, tensor);
        // Frequencies are used on the CPU, wherever the heads are that they rotate.
        let unit = unit(&tensor.name).filter(|unit| match *unit {
            Unit::Attention(i) | Unit::Ffn(i) | Unit::Experts(i) if i >= config.layers => false,
            _ => role != Role::Unused,
        });
        if let Some(placement) = unit.and_then(|unit| on_device(tensor, unit)) {
            return placement;
        }
        if role == Role::TiedEmbedding && offload.output != Device::Cpu {
            role = Role::Embedding;
        }
        let strips = strip_bytes(tensor);
        let packable = flags.repack && flags.tier > Tier::Scalar;
        let packed = match flags.packed_cache {
            true => Buffer::Cache,
            false => Buffer::Packed,
        };
        let multiplied = matches!(role, Role::Matrix | Role::TiedEmbedding);
        let kernels = multiplied.then(|| kernels(tensor, flags));
        let (product, tiles) = kernels.unwrap_or_default();
        let as_it_is = match tensor.ty.is_sparse() {
            true => Encoding::Sparse16,
            false => Encoding::Raw,
        };
        let raw = (file, as_it_is, tensor.bytes);
        let without_zeros = match multiplied {
            true => without_zeros(gguf, tensor, flags),
            false => None,
        };
        let streams = unit
            .filter(|unit| stream::is_streamed(*unit, &tensor.name))
            .and_then(|unit| offload.streams.get(unit));
        if let Some(worth) = without_zeros {
            let packed = TensorInfo {
                ty: tensor.ty.sparse().unwrap_or(tensor.ty),
                ..tensor.clone()
            };
            let (kernel, tiles) = self::kernels(&packed, flags);
            return Placement {
                tensor: tensor.name.clone(),
                shape: tensor.shape.clone(),
                ty: tensor.ty.name().to_owned(),
                device: Device::Cpu,
                buffer: Buffer::Packed,
                encoding: Encoding::Sparse16,
                kernel,
                bytes: worth.bytes,
                parts: Vec::new(),
                reason: format!(
                    "{:.0} % of the weights are zero: packed without them, {:.2} of the bytes",
                    100.0 * worth.zeros,
                    worth.bytes as f64 / tensor.bytes as f64
                ),
                streams,
                share: None,
                lora: Vec::new(),
                role,
                tiles,
            };
        }
        let share = match role {
            Role::Matrix if flags.offload.adapted.contains_key(&tensor.name) => None,
            Role::Matrix if scales::of(gguf, &tensor.name).is_some() => None,
            Role::Matrix => unit.and_then(|unit| sharing.of(unit, tensor)),
            Role::TiedEmbedding => sharing.of(Unit::Output, tensor),
            _ => None,
        };
        let ((buffer, encoding, bytes), kernel, reason) = match role {
            Role::Unused => (
                raw,
                "none".to_owned(),
                "no operation of this architecture reads it",
            ),
            Role::Vector => {
                let bytes = tensor.elements() * 4;
                (
                    (Buffer::Heap, Encoding::F32, bytes),
                    "f32 rows".to_owned(),
                    "small: kept as f32",
                )
            }
            Role::Embedding => (
                raw,
                "row look-up".to_owned(),
                "rows are looked up, never multiplied",
            ),
            Role::Matrix | Role::TiedEmbedding if tensor.ty.is_sparse() => {
                let buffer = match flags.repack && !flags.packed_cache {
                    true => Buffer::Packed,
                    false => file,
                };
                let reason = match buffer {
                    Buffer::Packed => "sparse: strips without their zeros, copied to large pages",
                    _ => "sparse: strips without their zeros, as the file has them",
                };
                ((buffer, Encoding::Sparse16, tensor.bytes), product, reason)
            }
            Role::Matrix | Role::TiedEmbedding => match strips {
                Some(bytes) if packable => {
                    let reason = match role {
                        Role::TiedEmbedding => {
                            "output matrix too: strips, from which rows can be looked up"
                        }
                        _ => "repacked to strips of 16 rows: one activation feeds 16 products",
                    };
                    ((packed, Encoding::Strip16, bytes), product, reason)
                }
                _ if flags.tier == Tier::Scalar => {
                    (raw, product, "the scalar kernels gain nothing from strips")
                }
                Some(_) => (
                    raw,
                    product,
                    "--no-repack: strips are made anew for each product",
                ),
                None => (raw, "none".to_owned(), "no kernel takes this type or shape"),
            },
        };
        Placement {
            tensor: tensor.name.clone(),
            shape: tensor.shape.clone(),
            ty: tensor.ty.name().to_owned(),
            device: Device::Cpu,
            buffer,
            encoding,
            kernel,
            bytes,
            parts: Vec::new(),
            reason: reason.to_owned(),
            streams,
            share,
            lora: Vec::new(),
            role,
            tiles,
        }
    };
    let adapted = |mut p: Placement| {
        let added = flags.offload.adapted.get(&p.tensor);
        p.lora = added.cloned().unwrap_or_default();
        p
    };
    let placed = gguf.tensors().iter().map(&mut place);
    let mut placements: Vec<_> = placed.map(adapted).collect();
    if let (None, Some(tied)) = (
        gguf.tensor("output.weight"),
        gguf.tensor("token_embd.weight"),
    ) && let Some(mut copy) = on_device(tied, Unit::Output)
    {
        "a second copy, as the output matrix".clone_into(&mut copy.reason);
        placements.push(copy);
    }
    sharing.finish(&flags.offload, &mut offload);
    Plan {
        placements,
        devices: offload.devices.clone(),
        offload,
    }
}

/// The least share of its bytes that a matrix must lose to be packed without zeros.
pub const LEAST_SAVING: f64 = 0.1;

/// What a dense matrix is without its zeros, if that is worth it and kernels take it so.
fn without_zeros(gguf: &Gguf, tensor: &TensorInfo, flags: &PlanFlags) -> Option<sparse::Worth> {
    // The packed file holds dense strips alone.
    if !(flags.repack && flags.sparse_pack) || flags.packed_cache {
        return None;
    }
    let packed = tensor.ty.sparse().filter(|_| !tensor.ty.is_sparse())?;
    if !(Kernels::for_tier(flags.tier).matmul.sparse)(packed) {
        return None;
    }
    // A shape that can't be sparse is none of this function's business.
    let worth = sparse::worth(tensor.ty, &tensor.shape, gguf.data(tensor), LEAST_SAVING);
    worth.ok().flatten()
}

/// What multiplies a matrix, and whether tiles do.
fn kernels(tensor: &TensorInfo, flags: &PlanFlags) -> (String, Option<TileUse>) {
    let kernels = match flags.amx {
        None => Kernels::for_tier(flags.tier),
        Some(amx) => Kernels::with_amx(flags.tier, amx),
    };
    let vectors = format!("{} product, {}", tensor.ty, kernels.matmul.name);
    let Some(tiles) = &kernels.matmul.tiles else {
        return (vectors, None);
    };
    let used = match (tiles.fewest_tokens)(tensor.ty) {
        _ if strip_bytes(tensor).is_none() => TileUse::Never("no kernel takes it"),
        _ if !tensor.row_len().is_multiple_of(32) => TileUse::Never("rows are no whole tiles"),
        None => TileUse::Never("no tile product of this type"),
        Some(n) => TileUse::From(n),
    };
    let name = match used {
        TileUse::From(n) => format!("{vectors}; {} from {n} tokens", tiles.name),
        TileUse::Never(why) => format!("{vectors} ({why})"),
    };
    (name, Some(used))
}

/// Bytes of a matrix (or a stack of them) as strips, of a sparse one as dense strips, if it can
/// be packed.
fn strip_bytes(tensor: &TensorInfo) -> Option<u64> {
    let k = tensor.row_len();
    let ty = tensor.ty.dense();
    ty.bytes_for(k)?;
    let layout = strip::layout(ty)?;
    let n = tensor.shape.get(1).copied().unwrap_or(1);
    let experts = tensor.shape.get(2).copied().unwrap_or(1);
    let strips = n.div_ceil(strip::ROWS as u64).checked_mul(experts)?;
    strips.checked_mul(layout.strip_bytes(usize::try_from(k).ok()?) as u64)
}
