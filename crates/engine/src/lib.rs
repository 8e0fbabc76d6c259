//! The engine: what a model is, where its tensors go, how a batch runs through it, and how
//! text comes out.
//!
//! Names operations and formats, never instruction sets; holds no unsafe code.
#![forbid(unsafe_code)]

pub mod config;
mod constraint;
mod context;
mod error;
mod host;
mod lora;
mod model;
mod models;
pub mod offload;
mod packed;
mod perplexity;
pub mod plan;
pub mod sampler;
mod scales;
mod session;
pub mod shape;
pub mod share;
mod state;
pub mod stream;
pub mod tensor_split;
mod text;
pub mod threads;

pub use config::{Arch, ModelConfig};
pub use constraint::{Constraint, ConstraintError, TokenSet};
pub use context::{Batch, BatchToken, Context, ContextOptions, Outputs, Top, UBATCH};
pub use error::{Error, Result};
pub use lora::{AdapterInfo, Adapters, LoraFile, LoraPart};
pub use model::{LoadEvent, LoadOptions, Model, Source};
pub use offload::{Offload, OffloadFlags};
pub use packed::{PackedFile, Unfit};
pub use perplexity::{Perplexity, perplexity, windows};
pub use plan::{Plan, PlanFlags, plan};
pub use sampler::{Sampler, SamplerOptions};
pub use session::{
    GenerateOptions, Generation, StopReason, Timings, generate, generate_constrained,
};
pub use shape::Shape;
pub use text::{TextStream, overlap};
