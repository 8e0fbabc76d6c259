//! What can go wrong in the engine.

use std::path::PathBuf;
use tegula_kernels::{device::DeviceError, kv::KvError, weights::WeightsError};

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be loaded or run. Messages are lower-case fragments.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file itself.
    #[error(transparent)]
    Gguf(#[from] tegula_gguf::Error),

    /// An architecture that this build does not know.
    #[error("{file}: architecture `{arch}` is not supported (supported: {supported})")]
    Architecture {
        file: String,
        arch: String,
        supported: String,
    },

    /// A hyperparameter that can't be.
    #[error("{file}: {what}")]
    Config { file: String, what: String },

    /// A tensor of the wrong shape or type.
    #[error("{file}: tensor `{tensor}` {what}")]
    Tensor {
        file: String,
        tensor: String,
        what: String,
    },

    /// A LoRA adapter that is none, or not for this model.
    #[error("{file}: {what}")]
    Lora { file: String, what: String },

    /// A matrix that no kernel takes.
    #[error("{file}: tensor `{tensor}`: {source}")]
    Weights {
        file: String,
        tensor: String,
        source: WeightsError,
    },

    /// More memory than the caller allows.
    #[error(
        "{file}: the weights need {needed} bytes of memory and {available} are available; use a smaller quantisation or leave them as they are in the file (--no-repack)"
    )]
    Memory {
        file: String,
        needed: u64,
        available: u64,
    },

    /// Flags of placement that can't be followed.
    #[error("{0}")]
    Placement(String),

    /// More than a device has.
    #[error(
        "{device}: {needed} bytes are needed and {available} are available; offload fewer layers (-ngl, or no -ngl for as many as fit), keep experts on the CPU (--n-cpu-moe), or use a smaller context (-c) or cache (-ctk, -ctv)"
    )]
    DeviceMemory {
        device: String,
        needed: u64,
        available: u64,
    },

    /// A device refused or failed.
    #[error(transparent)]
    Device(#[from] DeviceError),

    /// A sparse cache that would lie on a device.
    #[error(
        "a sparse KV cache (--sparse-kv) must be on the CPU: keep the layers there (-ngl 0) or the cache (-nkvo)"
    )]
    SparseCacheElsewhere,

    /// The KV cache could not be made or extended.
    #[error(transparent)]
    Kv(#[from] KvError),

    /// More tokens than the context holds. There is no context shift: it would silently
    /// change what the model sees.
    #[error(
        "the context is full: {needed} tokens are needed and it holds {context}; use a larger context (-c)"
    )]
    ContextFull { needed: usize, context: usize },

    /// A token that is not in the vocabulary.
    #[error("token {id} is outside the vocabulary of {vocab}")]
    Token { id: u32, vocab: usize },

    /// A sequence that the context was not made for.
    #[error("sequence {sequence} does not exist: the context has {sequences}")]
    Sequence { sequence: usize, sequences: usize },

    /// What constrains the text can't go on.
    #[error("the constraint failed: {0}")]
    Constraint(#[from] crate::ConstraintError),

    /// Nothing to run.
    #[error("the {0} is empty")]
    Empty(&'static str),

    /// Too little text for what was asked.
    #[error("{tokens} tokens are too few: {needed} are needed")]
    TooShort { tokens: usize, needed: usize },

    /// A saved state that does not fit.
    #[error("{}: not a usable saved state: {what}", path.display())]
    State { path: PathBuf, what: String },

    /// The operating system refused something.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        path: PathBuf,
        action: &'static str,
        source: std::io::Error,
    },
}
