//! Kernels written once over a vector type and compiled per tier.
//!
//! Everything here is `#[inline(always)]` and reaches machine code only inside a tier's
//! `#[target_feature]` wrapper, which is what makes the intrinsics below it legal.

// Every body is one unsafe block that rests on the contract of `vector::Vector` or
// `lanes::Lanes`, stated there.
// Index loops over several register arrays at once are what the kernels are.
#![allow(clippy::undocumented_unsafe_blocks, clippy::needless_range_loop)]

pub(crate) mod attention;
pub(crate) mod float;
pub(crate) mod format;
pub(crate) mod lanes;
pub(crate) mod matmul;
pub(crate) mod vector;
