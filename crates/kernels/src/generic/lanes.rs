//! Sixteen 32-bit lanes, one per row of a strip: one register of AVX-512, two of AVX2.

// Tiles take some of this alone.
#![cfg_attr(not(feature = "amx"), allow(dead_code))]

use std::arch::x86_64::*;

/// Sixteen dwords, each of them four bytes, one integer or one f32.
///
/// # Safety
/// All functions must be inlined into code compiled for the type's features, on a CPU that
/// has them; pointers must be valid for what is read or written (unaligned).
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type Floats: Copy;
    /// Tokens whose sums fit the registers.
    const TOKENS: usize;

    unsafe fn load(p: *const u8) -> Self;
    unsafe fn store(self, p: *mut u8);
    /// Sixteen unsigned bytes, widened.
    unsafe fn load_u8(p: *const u8) -> Self;
    /// Sixteen unsigned words, widened.
    unsafe fn load_u16(p: *const u8) -> Self;
    unsafe fn splat(x: i32) -> Self;
    /// The dword at `p`, in all lanes.
    unsafe fn broadcast(p: *const i32) -> Self;
    unsafe fn and(self, o: Self) -> Self;
    unsafe fn or(self, o: Self) -> Self;
    unsafe fn add(self, o: Self) -> Self;
    /// Takes `x` off every byte, modulo 256.
    unsafe fn sub_bytes(self, x: u8) -> Self;
    unsafe fn min(self, o: Self) -> Self;
    unsafe fn max(self, o: Self) -> Self;
    /// Logical shift of every dword, `n` < 32.
    unsafe fn shr(self, n: u32) -> Self;
    unsafe fn shl(self, n: u32) -> Self;
    /// Arithmetic shift of every dword, `n` < 32.
    unsafe fn sar(self, n: u32) -> Self;
    /// The low byte of every dword, sign-extended.
    unsafe fn sign_extend_u8(self) -> Self;
    /// `table[byte]` for every byte; all bytes are below 16.
    unsafe fn lookup(self, table: &[i8; 16]) -> Self;
    /// Adds to each lane the dot product of four unsigned bytes of `codes`, below 128 unless
    /// [`Lanes::WIDE`], with the four signed bytes at `x`, which are not -128.
    unsafe fn dot(self, codes: Self, x: *const i8) -> Self;
    /// [`Lanes::dot`] takes all bytes.
    const WIDE: bool;
    /// Whether dot products of codes below 32 are less work when up to four of them are added by
    /// [`Lanes::dot_small`], from zero on, and their sum by [`Lanes::add_small`].
    const SMALL: bool = false;
    #[inline(always)]
    unsafe fn dot_small(self, codes: Self, x: *const i8) -> Self {
        unsafe { self.dot(codes, x) }
    }
    #[inline(always)]
    unsafe fn add_small(self, sums: Self) -> Self {
        unsafe { self.add(sums) }
    }
    /// The same for codes up to 255, which stand for `code - 128`: the caller must have
    /// added [`Lanes::FULL_ZERO`] times the negated sum of the activations.
    unsafe fn dot_full(self, codes: Self, x: *const i8) -> Self;
    /// log2 of the zero point that [`Lanes::dot_full`] leaves to its caller, if any.
    const FULL_ZERO: Option<u32>;
    unsafe fn to_floats(self) -> Self::Floats;
    /// The bits as f32.
    unsafe fn as_floats(self) -> Self::Floats;

    unsafe fn fsplat(x: f32) -> Self::Floats;
    unsafe fn fbroadcast(p: *const f32) -> Self::Floats;
    unsafe fn fload(p: *const f32) -> Self::Floats;
    unsafe fn fstore(x: Self::Floats, p: *mut f32);
    /// Sixteen f16, widened.
    unsafe fn load_f16(p: *const u8) -> Self::Floats;
    unsafe fn fmul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, one rounding.
    unsafe fn fma(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    unsafe fn fneg(a: Self::Floats) -> Self::Floats;

    /// Both rounded to bf16, ties to even, NaN kept: `even` low, `odd` high in each dword.
    unsafe fn bf16_pair(even: Self::Floats, odd: Self::Floats) -> Self;
    /// 32 values as bf16, in order.
    unsafe fn pack_bf16(x: *const f32, out: *mut u16);
}

/// The bits of `x` rounded to bf16 in the high half, NaN kept.
#[inline(always)]
fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    if x.is_nan() {
        bits | 0x0040_0000
    } else {
        bits + 0x7fff + (bits >> 16 & 1)
    }
}

impl Lanes for __m512i {
    type Floats = __m512;
    const TOKENS: usize = 8;
    const WIDE: bool = true;
    const FULL_ZERO: Option<u32> = Some(7);

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        unsafe { _mm512_storeu_si512(p.cast(), self) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u8) -> Self {
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> Self {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn broadcast(p: *const i32) -> Self {
        unsafe { _mm512_set1_epi32(p.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn and(self, o: Self) -> Self {
        unsafe { _mm512_and_si512(self, o) }
    }
    #[inline(always)]
    unsafe fn or(self, o: Self) -> Self {
        unsafe { _mm512_or_si512(self, o) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        unsafe { _mm512_add_epi32(self, o) }
    }
    #[inline(always)]
    unsafe fn sub_bytes(self, x: u8) -> Self {
        unsafe { _mm512_sub_epi8(self, _mm512_set1_epi8(x as i8)) }
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        unsafe { _mm512_min_epi32(self, o) }
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        unsafe { _mm512_max_epi32(self, o) }
    }
    #[inline(always)]
    unsafe fn shr(self, n: u32) -> Self {
        unsafe { _mm512_srlv_epi32(self, _mm512_set1_epi32(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shl(self, n: u32) -> Self {
        unsafe { _mm512_sllv_epi32(self, _mm512_set1_epi32(n as i32)) }
    }
    #[inline(always)]
    unsafe fn sar(self, n: u32) -> Self {
        unsafe { _mm512_srav_epi32(self, _mm512_set1_epi32(n as i32)) }
    }
    #[inline(always)]
    unsafe fn sign_extend_u8(self) -> Self {
        unsafe { _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(self)) }
    }
    #[inline(always)]
    unsafe fn lookup(self, table: &[i8; 16]) -> Self {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, self)
        }
    }
    #[inline(always)]
    unsafe fn dot(self, codes: Self, x: *const i8) -> Self {
        unsafe { _mm512_dpbusd_epi32(self, codes, Self::broadcast(x.cast())) }
    }
    #[inline(always)]
    unsafe fn dot_full(self, codes: Self, x: *const i8) -> Self {
        unsafe { self.dot(codes, x) }
    }
    #[inline(always)]
    unsafe fn to_floats(self) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(self) }
    }
    #[inline(always)]
    unsafe fn as_floats(self) -> __m512 {
        unsafe { _mm512_castsi512_ps(self) }
    }
    #[inline(always)]
    unsafe fn fsplat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn fbroadcast(p: *const f32) -> __m512 {
        unsafe { _mm512_set1_ps(*p) }
    }
    #[inline(always)]
    unsafe fn fload(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn fstore(x: __m512, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn fmul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn fneg(a: __m512) -> __m512 {
        unsafe { _mm512_xor_ps(a, _mm512_set1_ps(-0.0)) }
    }
    #[inline(always)]
    unsafe fn bf16_pair(even: __m512, odd: __m512) -> Self {
        unsafe { bf16_pair(even, odd) }
    }
    #[inline(always)]
    unsafe fn pack_bf16(x: *const f32, out: *mut u16) {
        unsafe { pack_bf16(x, out) }
    }
}

/// [`Lanes::bf16_pair`] without instructions for it.
#[inline(always)]
unsafe fn bf16_pair<L: Lanes>(even: L::Floats, odd: L::Floats) -> L {
    unsafe {
        let (mut e, mut o) = ([0f32; 16], [0f32; 16]);
        L::fstore(even, e.as_mut_ptr());
        L::fstore(odd, o.as_mut_ptr());
        let mut pairs = [0u32; 16];
        for i in 0..16 {
            pairs[i] = round_bf16(e[i]) >> 16 | round_bf16(o[i]) & 0xffff_0000;
        }
        L::load(pairs.as_ptr().cast())
    }
}

/// [`Lanes::pack_bf16`] without instructions for it.
#[inline(always)]
unsafe fn pack_bf16(x: *const f32, out: *mut u16) {
    unsafe {
        for i in 0..32 {
            *out.add(i) = (round_bf16(*x.add(i)) >> 16) as u16;
        }
    }
}

/// AVX-512 with bf16 conversions.
#[derive(Clone, Copy)]
pub(crate) struct WithBf16(__m512i);

impl From<__m512i> for WithBf16 {
    #[inline(always)]
    fn from(x: __m512i) -> WithBf16 {
        WithBf16(x)
    }
}

impl Lanes for WithBf16 {
    type Floats = __m512;
    const TOKENS: usize = <__m512i as Lanes>::TOKENS;
    const WIDE: bool = <__m512i as Lanes>::WIDE;
    const FULL_ZERO: Option<u32> = <__m512i as Lanes>::FULL_ZERO;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::load(p)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        unsafe { <__m512i as Lanes>::store(self.0, p) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::load_u8(p)) }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u8) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::load_u16(p)) }
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::splat(x)) }
    }
    #[inline(always)]
    unsafe fn broadcast(p: *const i32) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::broadcast(p)) }
    }
    #[inline(always)]
    unsafe fn and(self, o: Self) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::and(self.0, o.0)) }
    }
    #[inline(always)]
    unsafe fn or(self, o: Self) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::or(self.0, o.0)) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::add(self.0, o.0)) }
    }
    #[inline(always)]
    unsafe fn sub_bytes(self, x: u8) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::sub_bytes(self.0, x)) }
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::min(self.0, o.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::max(self.0, o.0)) }
    }
    #[inline(always)]
    unsafe fn shr(self, n: u32) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::shr(self.0, n)) }
    }
    #[inline(always)]
    unsafe fn shl(self, n: u32) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::shl(self.0, n)) }
    }
    #[inline(always)]
    unsafe fn sar(self, n: u32) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::sar(self.0, n)) }
    }
    #[inline(always)]
    unsafe fn sign_extend_u8(self) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::sign_extend_u8(self.0)) }
    }
    #[inline(always)]
    unsafe fn lookup(self, table: &[i8; 16]) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::lookup(self.0, table)) }
    }
    #[inline(always)]
    unsafe fn dot(self, codes: Self, x: *const i8) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::dot(self.0, codes.0, x)) }
    }
    #[inline(always)]
    unsafe fn dot_full(self, codes: Self, x: *const i8) -> Self {
        unsafe { WithBf16(<__m512i as Lanes>::dot_full(self.0, codes.0, x)) }
    }
    #[inline(always)]
    unsafe fn to_floats(self) -> __m512 {
        unsafe { <__m512i as Lanes>::to_floats(self.0) }
    }
    #[inline(always)]
    unsafe fn as_floats(self) -> __m512 {
        unsafe { <__m512i as Lanes>::as_floats(self.0) }
    }
    #[inline(always)]
    unsafe fn fsplat(x: f32) -> __m512 {
        unsafe { <__m512i as Lanes>::fsplat(x) }
    }
    #[inline(always)]
    unsafe fn fbroadcast(p: *const f32) -> __m512 {
        unsafe { <__m512i as Lanes>::fbroadcast(p) }
    }
    #[inline(always)]
    unsafe fn fload(p: *const f32) -> __m512 {
        unsafe { <__m512i as Lanes>::fload(p) }
    }
    #[inline(always)]
    unsafe fn fstore(x: __m512, p: *mut f32) {
        unsafe { <__m512i as Lanes>::fstore(x, p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m512 {
        unsafe { <__m512i as Lanes>::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn fmul(a: __m512, b: __m512) -> __m512 {
        unsafe { <__m512i as Lanes>::fmul(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { <__m512i as Lanes>::fma(a, b, c) }
    }
    #[inline(always)]
    unsafe fn fneg(a: __m512) -> __m512 {
        unsafe { <__m512i as Lanes>::fneg(a) }
    }
    #[inline(always)]
    unsafe fn bf16_pair(even: __m512, odd: __m512) -> Self {
        unsafe {
            // The conversion puts `even` in the low half: the permutation interleaves.
            let order = INTERLEAVE.as_ptr().cast();
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
            WithBf16(_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both))
        }
    }
    #[inline(always)]
    unsafe fn pack_bf16(x: *const f32, out: *mut u16) {
        unsafe {
            let (low, high) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)));
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.cast(), both);
        }
    }
}

/// 0, 16, 1, 17, …
static INTERLEAVE: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// Two 256-bit registers; `VNNI` says whether the CPU has `vpdpbusd` in its VEX form.
#[derive(Clone, Copy)]
pub(crate) struct Pair<const VNNI: bool>(__m256i, __m256i);

macro_rules! both {
    ($a:expr, $op:ident) => {
        Pair($op($a.0), $op($a.1))
    };
    ($a:expr, $b:expr, $op:ident) => {
        Pair($op($a.0, $b.0), $op($a.1, $b.1))
    };
}

impl<const VNNI: bool> Lanes for Pair<VNNI> {
    type Floats = (__m256, __m256);
    const TOKENS: usize = 4;
    const WIDE: bool = VNNI;
    const FULL_ZERO: Option<u32> = if VNNI { Some(7) } else { None };
    const SMALL: bool = !VNNI;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        unsafe {
            Pair(
                _mm256_loadu_si256(p.cast()),
                _mm256_loadu_si256(p.add(32).cast()),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        unsafe {
            _mm256_storeu_si256(p.cast(), self.0);
            _mm256_storeu_si256(p.add(32).cast(), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        unsafe {
            let x = _mm_loadu_si128(p.cast());
            Pair(
                _mm256_cvtepu8_epi32(x),
                _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(x)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u8) -> Self {
        unsafe {
            Pair(
                _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())),
                _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(16).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> Self {
        unsafe { Pair(_mm256_set1_epi32(x), _mm256_set1_epi32(x)) }
    }
    #[inline(always)]
    unsafe fn broadcast(p: *const i32) -> Self {
        unsafe { Self::splat(p.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn and(self, o: Self) -> Self {
        unsafe { both!(self, o, _mm256_and_si256) }
    }
    #[inline(always)]
    unsafe fn or(self, o: Self) -> Self {
        unsafe { both!(self, o, _mm256_or_si256) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        unsafe { both!(self, o, _mm256_add_epi32) }
    }
    #[inline(always)]
    unsafe fn sub_bytes(self, x: u8) -> Self {
        unsafe {
            both!(
                self,
                Self::splat(i32::from_ne_bytes([x; 4])),
                _mm256_sub_epi8
            )
        }
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        unsafe { both!(self, o, _mm256_min_epi32) }
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        unsafe { both!(self, o, _mm256_max_epi32) }
    }
    #[inline(always)]
    unsafe fn shr(self, n: u32) -> Self {
        unsafe { both!(self, Self::splat(n as i32), _mm256_srlv_epi32) }
    }
    #[inline(always)]
    unsafe fn shl(self, n: u32) -> Self {
        unsafe { both!(self, Self::splat(n as i32), _mm256_sllv_epi32) }
    }
    #[inline(always)]
    unsafe fn sar(self, n: u32) -> Self {
        unsafe { both!(self, Self::splat(n as i32), _mm256_srav_epi32) }
    }
    #[inline(always)]
    unsafe fn sign_extend_u8(self) -> Self {
        unsafe {
            Pair(
                _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(self.0)),
                _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(self.1)),
            )
        }
    }
    #[inline(always)]
    unsafe fn lookup(self, table: &[i8; 16]) -> Self {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            Pair(
                _mm256_shuffle_epi8(table, self.0),
                _mm256_shuffle_epi8(table, self.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn dot(self, codes: Self, x: *const i8) -> Self {
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            if VNNI {
                return Pair(
                    _mm256_dpbusd_avx_epi32(self.0, codes.0, x),
                    _mm256_dpbusd_avx_epi32(self.1, codes.1, x),
                );
            }
            // 2 · 127 · 127 < 2^15: the pairwise sums do not saturate.
            let ones = _mm256_set1_epi16(1);
            Pair(
                _mm256_add_epi32(
                    self.0,
                    _mm256_madd_epi16(_mm256_maddubs_epi16(codes.0, x), ones),
                ),
                _mm256_add_epi32(
                    self.1,
                    _mm256_madd_epi16(_mm256_maddubs_epi16(codes.1, x), ones),
                ),
            )
        }
    }
    #[inline(always)]
    unsafe fn dot_small(self, codes: Self, x: *const i8) -> Self {
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            // 4 · 2 · 31 · 127 < 2^15.
            Pair(
                _mm256_add_epi16(self.0, _mm256_maddubs_epi16(codes.0, x)),
                _mm256_add_epi16(self.1, _mm256_maddubs_epi16(codes.1, x)),
            )
        }
    }
    #[inline(always)]
    unsafe fn add_small(self, sums: Self) -> Self {
        unsafe {
            let ones = _mm256_set1_epi16(1);
            Pair(
                _mm256_add_epi32(self.0, _mm256_madd_epi16(sums.0, ones)),
                _mm256_add_epi32(self.1, _mm256_madd_epi16(sums.1, ones)),
            )
        }
    }
    #[inline(always)]
    unsafe fn dot_full(self, codes: Self, x: *const i8) -> Self {
        unsafe {
            if VNNI {
                return self.dot(codes, x);
            }
            // Unsigned codes would saturate; magnitudes up to 128 with the signs moved to
            // the activations do not: 2 · 128 · 127 < 2^15.
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let (ones, top) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
            let (a, b) = (
                _mm256_xor_si256(codes.0, top),
                _mm256_xor_si256(codes.1, top),
            );
            let a = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(x, a));
            let b = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(x, b));
            Pair(
                _mm256_add_epi32(self.0, _mm256_madd_epi16(a, ones)),
                _mm256_add_epi32(self.1, _mm256_madd_epi16(b, ones)),
            )
        }
    }
    #[inline(always)]
    unsafe fn to_floats(self) -> (__m256, __m256) {
        unsafe { (_mm256_cvtepi32_ps(self.0), _mm256_cvtepi32_ps(self.1)) }
    }
    #[inline(always)]
    unsafe fn as_floats(self) -> (__m256, __m256) {
        unsafe { (_mm256_castsi256_ps(self.0), _mm256_castsi256_ps(self.1)) }
    }
    #[inline(always)]
    unsafe fn fsplat(x: f32) -> (__m256, __m256) {
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn fbroadcast(p: *const f32) -> (__m256, __m256) {
        unsafe { Self::fsplat(*p) }
    }
    #[inline(always)]
    unsafe fn fload(p: *const f32) -> (__m256, __m256) {
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn fstore(x: (__m256, __m256), p: *mut f32) {
        unsafe {
            _mm256_storeu_ps(p, x.0);
            _mm256_storeu_ps(p.add(8), x.1);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> (__m256, __m256) {
        unsafe {
            (
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn fmul(a: (__m256, __m256), b: (__m256, __m256)) -> (__m256, __m256) {
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn fma(
        a: (__m256, __m256),
        b: (__m256, __m256),
        c: (__m256, __m256),
    ) -> (__m256, __m256) {
        unsafe {
            (
                _mm256_fmadd_ps(a.0, b.0, c.0),
                _mm256_fmadd_ps(a.1, b.1, c.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn fneg(a: (__m256, __m256)) -> (__m256, __m256) {
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            (_mm256_xor_ps(a.0, sign), _mm256_xor_ps(a.1, sign))
        }
    }
    #[inline(always)]
    unsafe fn bf16_pair(even: (__m256, __m256), odd: (__m256, __m256)) -> Self {
        unsafe { bf16_pair(even, odd) }
    }
    #[inline(always)]
    unsafe fn pack_bf16(x: *const f32, out: *mut u16) {
        unsafe { pack_bf16(x, out) }
    }
}
