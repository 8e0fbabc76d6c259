//! A vector of f32, for AVX2 and AVX-512.

use std::arch::x86_64::*;

/// `LANES` single-precision values.
///
/// # Safety
/// All functions must be inlined into code compiled for the vector's tier, on a CPU that
/// has it; pointers must be valid for the lanes that are read or written (unaligned).
pub(crate) trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn add(self, o: Self) -> Self;
    unsafe fn sub(self, o: Self) -> Self;
    unsafe fn mul(self, o: Self) -> Self;
    unsafe fn div(self, o: Self) -> Self;
    /// `self * b + c`, one rounding.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn max(self, o: Self) -> Self;
    unsafe fn min(self, o: Self) -> Self;
    /// To the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for integral `n` in −126..=127.
    unsafe fn scale2(self, n: Self) -> Self;
    /// Sum over the lanes, halves first.
    unsafe fn sum(self) -> f32;
    /// Largest lane.
    unsafe fn hmax(self) -> f32;
    /// `LANES` f16.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// `LANES` pairs of bf16: the first and the second of each.
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self);
    /// `LANES` i8.
    unsafe fn load_i8(p: *const i8) -> Self;
}

impl Vector for __m256 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm256_storeu_ps(p, self) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        unsafe { _mm256_add_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        unsafe { _mm256_sub_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        unsafe { _mm256_mul_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        unsafe { _mm256_div_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        unsafe { _mm256_fmadd_ps(self, b, c) }
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        unsafe { _mm256_max_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        unsafe { _mm256_min_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        unsafe {
            let bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(self, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let x = _mm_add_ps(
                _mm256_castps256_ps128(self),
                _mm256_extractf128_ps::<1>(self),
            );
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn hmax(self) -> f32 {
        unsafe {
            let x = _mm_max_ps(
                _mm256_castps256_ps128(self),
                _mm256_extractf128_ps::<1>(self),
            );
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        unsafe {
            let pairs = _mm256_loadu_si256(p.cast());
            let first = _mm256_slli_epi32::<16>(pairs);
            let second = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32 as i32));
            (_mm256_castsi256_ps(first), _mm256_castsi256_ps(second))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
}

impl Vector for __m512 {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        unsafe { _mm512_add_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        unsafe { _mm512_sub_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        unsafe { _mm512_mul_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        unsafe { _mm512_div_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        unsafe { _mm512_fmadd_ps(self, b, c) }
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        unsafe { _mm512_max_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        unsafe { _mm512_min_ps(self, o) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        unsafe { _mm512_scalef_ps(self, n) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let high = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b1110>(self, self));
            Vector::sum(_mm256_add_ps(_mm512_castps512_ps256(self), high))
        }
    }
    #[inline(always)]
    unsafe fn hmax(self) -> f32 {
        unsafe {
            let high = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b1110>(self, self));
            Vector::hmax(_mm256_max_ps(_mm512_castps512_ps256(self), high))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        unsafe {
            let pairs = _mm512_loadu_si512(p.cast());
            let first = _mm512_slli_epi32::<16>(pairs);
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32));
            (_mm512_castsi512_ps(first), _mm512_castsi512_ps(second))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
}

/// e^x, within 2 ULP of the true value for −87.3 ≤ x ≤ 88.3; the smallest normal number below,
/// infinity above (at the latest from 88.73 on), NaN stays NaN.
///
/// Range reduction by ln 2 in two parts, then a polynomial of degree 6 (Cephes `expf`).
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn exp<V: Vector>(x: V) -> V {
    unsafe {
        // `max`/`min` return the second operand when one is NaN, so `x` stands second.
        let x = V::splat(88.8).min(V::splat(-87.33).max(x));
        let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
        let r = n.fma(V::splat(-355.0 / 512.0), x);
        let r = n.fma(V::splat(2.121_944_4e-4), r);
        let mut p = V::splat(1.987_569_1e-4);
        p = p.fma(r, V::splat(1.398_2e-3));
        p = p.fma(r, V::splat(8.333_452e-3));
        p = p.fma(r, V::splat(4.166_579_6e-2));
        p = p.fma(r, V::splat(1.666_666_6e-1));
        p = p.fma(r, V::splat(0.5));
        let y = p.fma(r.mul(r), r.add(V::splat(1.0)));
        y.scale2(n)
    }
}

/// 2^x for −125 ≤ x ≤ 127, of which 3 parts in a million are wrong at most: for weights that are
/// rounded to bf16. 2^−125 below, where nothing is subnormal yet: such a result takes the
/// processor a hundred times as long. NaN stays NaN.
///
/// The integer part is put into the exponent, the rest into a polynomial of degree 4 of least
/// relative error (Remez).
///
/// # Safety
/// As [`Vector`].
#[cfg_attr(not(feature = "amx"), allow(dead_code))]
#[inline(always)]
pub(crate) unsafe fn exp2<V: Vector>(x: V) -> V {
    unsafe {
        // `max` returns the second operand when one is NaN.
        let x = V::splat(-125.0).max(x);
        let n = x.round();
        let r = x.sub(n);
        let mut p = V::splat(9.570_102e-3);
        p = p.fma(r, V::splat(5.591_786e-2));
        p = p.fma(r, V::splat(0.240_247_44));
        p = p.fma(r, V::splat(0.693_121_8));
        p = p.fma(r, V::splat(0.999_999_3));
        p.scale2(n)
    }
}
