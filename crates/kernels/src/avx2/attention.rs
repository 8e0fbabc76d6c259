//! Attention for AVX2.

use std::arch::x86_64::__m256;

use crate::{attn::ChunkArgs, generic::attention as generic};

/// 2 rows share each load of K and V: with four vectors each that fills the registers.
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
pub(crate) fn chunk(args: &mut ChunkArgs<'_>) {
    // SAFETY: this function has the tier's features.
    unsafe { generic::chunk::<__m256, 2>(args) }
}
