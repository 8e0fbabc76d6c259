//! The matrix products for AVX2, with `vpdpbusd` where the CPU has its VEX form.

use std::arch::x86_64::*;

use crate::{
    acts::{Forms, Q8Dest},
    generic::{lanes::Pair, matmul as generic},
    scalar::matmul::q8_scale,
    strip::kernels::MatmulKernels,
    tier::Features,
};

/// The kernels that this CPU can run.
pub(crate) fn kernels() -> MatmulKernels {
    let vnni = Features::get().avxvnni;
    MatmulKernels {
        name: if vnni { "avx2+vnni" } else { "avx2" },
        quantize_q8,
        mul_strips: if vnni {
            generic::mul_strips::<Vnni>
        } else {
            generic::mul_strips::<Plain>
        },
        bf16_form: Forms::F32,
        sparse: |_| false,
        tiles: None,
    }
}

generic::tier_kernels!(Plain, Pair<false>, "avx2,fma,f16c,bmi2");
generic::tier_kernels!(Vnni, Pair<true>, "avx2,fma,f16c,bmi2,avxvnni");

/// # Safety
/// As [`MatmulKernels::quantize_q8`].
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
unsafe fn quantize_q8(x: &[f32], dest: &Q8Dest) {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    for (kb, x) in x.as_chunks::<32>().0.iter().enumerate() {
        // SAFETY: 32 values are four vectors; the destination is the caller's.
        unsafe {
            let mut v = [_mm256_setzero_ps(); 4];
            let mut largest = _mm256_setzero_si256();
            for (i, v) in v.iter_mut().enumerate() {
                *v = _mm256_loadu_ps(x.as_ptr().add(8 * i));
                let bits = _mm256_and_si256(_mm256_castps_si256(*v), magnitude);
                largest = _mm256_max_epi32(largest, bits);
            }
            let mut m = _mm_max_epi32(
                _mm256_castsi256_si128(largest),
                _mm256_extracti128_si256::<1>(largest),
            );
            m = _mm_max_epi32(m, _mm_shuffle_epi32::<0b01_00_11_10>(m));
            m = _mm_max_epi32(m, _mm_shuffle_epi32::<0b10_11_00_01>(m));
            let (d, inverse) = q8_scale(f32::from_bits(_mm_cvtsi128_si32(m) as u32));
            let mut codes = [_mm256_setzero_si256(); 4];
            if inverse != 0.0 {
                let inverse = _mm256_set1_ps(inverse);
                for (code, v) in codes.iter_mut().zip(v) {
                    *code = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
                }
            }
            let sum = |a, b| {
                let s = _mm256_add_epi32(a, b);
                let s = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256::<1>(s));
                let s = _mm_add_epi32(s, _mm_shuffle_epi32::<0b01_00_11_10>(s));
                _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32::<0b10_11_00_01>(s)))
            };
            let (low, high) = (sum(codes[0], codes[1]), sum(codes[2], codes[3]));
            // Packing interleaves the halves; the permutation puts the dwords in order.
            let packed = _mm256_packs_epi16(
                _mm256_packs_epi32(codes[0], codes[1]),
                _mm256_packs_epi32(codes[2], codes[3]),
            );
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let packed = _mm256_permutevar8x32_epi32(packed, order);
            _mm256_storeu_si256(dest.q.add(kb * dest.tokens * 32).cast(), packed);
            dest.put_sums(kb, d, low, high);
        }
    }
}
