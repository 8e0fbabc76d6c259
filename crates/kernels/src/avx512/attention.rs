//! Attention for AVX-512.

use std::arch::x86_64::__m512;

use crate::{attn::ChunkArgs, generic::attention as generic};

/// 4 rows share each load of K and V: with four vectors each that fills the registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
pub(crate) fn chunk(args: &mut ChunkArgs<'_>) {
    if args.pruned.is_some() && super::pruned::takes(args.dim) {
        // SAFETY: `takes` has looked for the features.
        return unsafe { super::pruned::chunk(args) };
    }
    // SAFETY: this function has the tier's features.
    unsafe { generic::chunk::<__m512, 4>(args) }
}
