//! Phase 4: the f32 oracle, comparators, and the parity matrix.
//!
//! The [`oracle`] is what everything else in this project is held against; it shares no
//! code with the engine or the kernels, only the file reader and the plain dequantisers.
#![forbid(unsafe_code)]

mod checks;
pub mod compare;
mod engine;
pub mod golden;
pub mod matrix;
pub mod oracle;
pub mod precision;
pub mod tiles;

pub use checks::{checks, phase};
