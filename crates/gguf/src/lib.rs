//! GGUF files: reading (memory-mapped) and writing, block formats with their plain
//! (de)quantisers, tokenizers and chat templates.
//!
//! Knows nothing of kernels or devices. No input makes it panic.

pub mod types;

pub use types::GgmlType;
