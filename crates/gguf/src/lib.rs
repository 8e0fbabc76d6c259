//! GGUF files: reading (memory-mapped) and writing, block formats with their plain
//! (de)quantisers, tokenizers and chat templates.
//!
//! Knows nothing of kernels or devices. No input makes it panic.
#![deny(unsafe_code)]

pub mod blocks;
mod bytes;
pub mod chat;
mod error;
#[doc(hidden)]
pub mod fuzz;
pub mod metadata;
mod mmap;
mod parse;
pub mod quantize;
mod read;
pub mod sparse;
pub mod tokenizer;
pub mod types;
pub mod writer;

pub use bytes::Bytes;
pub use chat::{ChatTemplate, TemplateError};
pub use error::{Error, Result};
pub use metadata::{Array, Metadata, Value, ValueType};
pub use mmap::Advice;
pub use parse::TensorInfo;
pub use read::{FileInfo, Gguf, OpenOptions};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use types::GgmlType;
