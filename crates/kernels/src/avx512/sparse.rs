//! Products with sparse strips: `vpexpandb` and `vpexpandw` put the zeros back.
//!
//! A step of a bitmap is a mask of the 64 weights that one dot product of 16 rows takes. The
//! values are loaded from the cursor as they lie, expanded under the mask into a vector of
//! zero points, and multiplied; the mask's population count moves the cursor. Nothing is
//! written to memory and no position is computed by vectors: three operations of the port
//! that shuffles per step, whatever the density.
//!
//! Up to eight tokens share each expanded vector in registers. More tokens pass over a panel
//! of two super-blocks that is expanded once, as the dense kernels do. Sums are made in the
//! dense kernels' order, so that results equal theirs bit for bit.

use std::arch::x86_64::*;

use tegula_gguf::{
    GgmlType,
    sparse::{GROUP, head_bytes, supers},
};

use super::matmul::{Avx512, bf16_pairs};
#[cfg(feature = "amx")]
use crate::generic::lanes::WithBf16;
use crate::{
    acts::GROUP as TOKENS,
    generic::{
        format::{self, Shape},
        lanes::Lanes,
        matmul::{Tokens, ask_ahead, panel_at, panel_products, token_runs, tokens_at},
    },
    sparse::Super,
    strip::{
        ROWS,
        kernels::{PANEL_K, StripArgs},
    },
    tier::Features,
};

/// Whether these kernels run on this CPU and take `ty`.
pub(crate) fn takes(ty: GgmlType) -> bool {
    let has = Features::get();
    match ty {
        GgmlType::S8 | GgmlType::S4 => has.avx512vbmi2,
        GgmlType::S_BF16 => has.avx512vbmi2 && has.avx512bf16,
        _ => false,
    }
}

/// How the values of a quantised sparse type become codes.
trait Codes {
    const TYPE: GgmlType;
    /// The code that stands for zero, and its log2.
    const ZERO: u32;
    /// Groups behind the middle of a super-block have their values in the high nibbles.
    const HALVES: bool;
    type Shape: Shape;

    /// 64 values at `p` as bytes, of the high nibbles or the low ones.
    unsafe fn load<const HIGH: bool>(p: *const u8) -> __m512i;
}

struct S8;
struct S4;

impl Codes for S8 {
    const TYPE: GgmlType = GgmlType::S8;
    const ZERO: u32 = 7;
    const HALVES: bool = false;
    type Shape = format::Full;

    #[inline(always)]
    unsafe fn load<const HIGH: bool>(p: *const u8) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
}

impl Codes for S4 {
    const TYPE: GgmlType = GgmlType::S4;
    const ZERO: u32 = 3;
    const HALVES: bool = true;
    type Shape = format::Plain;

    #[inline(always)]
    unsafe fn load<const HIGH: bool>(p: *const u8) -> __m512i {
        // SAFETY: the caller's.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            // Bits that a nibble's neighbour shifts in are masked away.
            let nibble = if HIGH {
                _mm512_srli_epi16::<4>(both)
            } else {
                both
            };
            _mm512_and_si512(nibble, _mm512_set1_epi8(15))
        }
    }
}

/// The values under the next step's mask, expanded; moves both pointers on.
///
/// # Safety
/// `bits` is inside a bitmap, `values` where its values are; inlined where the features are.
#[inline(always)]
unsafe fn step<C: Codes, const HIGH: bool>(bits: *const u64, values: &mut *const u8) -> __m512i {
    // SAFETY: the caller's; 64 bytes may be read behind any value.
    unsafe {
        let mask = bits.read_unaligned();
        if !HIGH {
            ask_ahead::<_MM_HINT_T1>(*values, 1);
        }
        let codes = C::load::<HIGH>(*values);
        *values = values.add(mask.count_ones() as usize);
        _mm512_mask_expand_epi8(_mm512_set1_epi8(1 << C::ZERO), mask, codes)
    }
}

/// A group of a super-block on its way through a kernel.
struct Group {
    /// Index in the row, or in the stretch.
    kb: usize,
    head: *const u8,
}

/// What a kernel does with each group.
trait Visit<C: Codes> {
    /// Reads the group's values from `values` on and moves the pointer behind them.
    ///
    /// # Safety
    /// The group is whole; inlined where the features are.
    unsafe fn group<const HIGH: bool>(&mut self, group: &Group, values: &mut *const u8);
}

/// Visits all groups of `k` inputs, whole super-blocks but for the last, from `at` on; returns
/// where the next ones begin.
///
/// # Safety
/// `at` is where a super-block begins; inlined where the features are.
#[inline(always)]
unsafe fn walk<C: Codes>(mut at: *const u8, k: usize, visitor: &mut impl Visit<C>) -> *const u8 {
    // SAFETY: the caller's.
    unsafe {
        for of in supers(k) {
            let block = Super::new(C::TYPE, at, of);
            let group = |g: usize| {
                let head = block.heads.add(g * head_bytes(C::TYPE));
                ask_ahead::<_MM_HINT_T1>(head, head_bytes(C::TYPE));
                Group {
                    kb: block.first + g,
                    head,
                }
            };
            let low = if C::HALVES { block.low() } else { block.groups };
            let mut values = block.values;
            for g in 0..low {
                visitor.group::<false>(&group(g), &mut values);
            }
            at = values;
            if C::HALVES {
                let mut values = block.values;
                for g in low..block.groups {
                    visitor.group::<true>(&group(g), &mut values);
                }
                at = at.max(values);
            }
        }
        at
    }
}

/// # Safety
/// As `MatmulKernels::mul_strips`, for types that [`takes`] accepts.
pub(crate) unsafe fn mul_strips(args: &StripArgs<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match args.ty {
            GgmlType::S8 => quantized::<S8>(args),
            GgmlType::S4 => quantized::<S4>(args),
            _ => bf16(args),
        }
    }
}

/// # Safety
/// As [`mul_strips`].
unsafe fn quantized<C: Codes>(args: &StripArgs<'_>) {
    let acts = &args.acts;
    for (s, &strip) in args.strips.iter().enumerate() {
        let tile = args.tile_of(s);
        // SAFETY: the caller's; groups and tokens are inside the strip and the view.
        unsafe {
            if acts.m <= TOKENS {
                let x = Tokens {
                    tile,
                    ..tokens_at::<C::Shape>(acts, 0, acts.m)
                };
                match acts.m {
                    1 => tokens::<C, 1>(strip, args.k, &x),
                    2 => tokens::<C, 2>(strip, args.k, &x),
                    3 => tokens::<C, 3>(strip, args.k, &x),
                    4 => tokens::<C, 4>(strip, args.k, &x),
                    5 => tokens::<C, 5>(strip, args.k, &x),
                    6 => tokens::<C, 6>(strip, args.k, &x),
                    7 => tokens::<C, 7>(strip, args.k, &x),
                    _ => tokens::<C, 8>(strip, args.k, &x),
                }
                continue;
            }
            tile.write_bytes(0, acts.m * ROWS);
            let mut at = strip;
            for k in (0..args.k).step_by(PANEL_K) {
                let len = PANEL_K.min(args.k - k);
                let panel = panel_at(args.panel, k / GROUP, len / GROUP, C::ZERO);
                at = decode::<C>(at, len, panel.codes, panel.scales);
                panel_products::<Avx512, C::Shape>(&panel, acts, tile);
            }
        }
    }
}

/// Sums of `T` tokens.
struct Sums<'a, const T: usize> {
    acc: [__m512; T],
    x: &'a Tokens,
}

impl<C: Codes, const T: usize> Visit<C> for Sums<'_, T> {
    #[inline(always)]
    unsafe fn group<const HIGH: bool>(&mut self, group: &Group, values: &mut *const u8) {
        // SAFETY: the caller's.
        unsafe {
            let (x, at) = (self.x, group.kb * self.x.stride);
            let mut sums = [_mm512_setzero_si512(); T];
            for (t, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_set1_epi32(*x.nsum.add(at + t) << C::ZERO);
            }
            let bits = group.head.add(2 * ROWS).cast::<u64>();
            let q = x.q.add(at * GROUP);
            for e in 0..8 {
                let codes = step::<C, HIGH>(bits.add(e), values);
                for (t, sum) in sums.iter_mut().enumerate() {
                    let q = q.add(t * GROUP + 4 * e).cast::<i32>().read_unaligned();
                    *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(q));
                }
            }
            let scales = <__m512i as Lanes>::load_f16(group.head);
            for (t, (acc, sum)) in self.acc.iter_mut().zip(sums).enumerate() {
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*x.d.add(at + t)));
                *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *acc);
            }
        }
    }
}

/// A strip times `T` tokens, in registers; the tile is written, not added to.
///
/// # Safety
/// `strip` is a sparse strip of `k` inputs, `x` holds `T` interleaved tokens and their tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,popcnt,f16c")]
unsafe fn tokens<C: Codes, const T: usize>(strip: *const u8, k: usize, x: &Tokens) {
    let acc = [_mm512_setzero_ps(); T];
    let mut sums = Sums { acc, x };
    // SAFETY: the caller's.
    unsafe {
        walk::<C>(strip, k, &mut sums);
        for (t, acc) in sums.acc.iter().enumerate() {
            _mm512_storeu_ps(x.tile.add(t * ROWS), *acc);
        }
    }
}

/// Codes and scales on their way to a panel.
struct ToPanel {
    codes: *mut u8,
    scales: *mut f32,
}

impl<C: Codes> Visit<C> for ToPanel {
    #[inline(always)]
    unsafe fn group<const HIGH: bool>(&mut self, group: &Group, values: &mut *const u8) {
        // SAFETY: the caller's, and the panel has room.
        unsafe {
            let bits = group.head.add(2 * ROWS).cast::<u64>();
            let out = self.codes.add(group.kb * GROUP * ROWS);
            for e in 0..8 {
                let codes = step::<C, HIGH>(bits.add(e), values);
                _mm512_storeu_si512(out.add(64 * e).cast(), codes);
            }
            let out = self.scales.add(group.kb * ROWS);
            _mm512_storeu_ps(out, <__m512i as Lanes>::load_f16(group.head));
        }
    }
}

/// Writes codes and scales of `len` inputs, whole super-blocks but for the row's last, from
/// `at` on; returns where the next ones begin.
///
/// # Safety
/// `at` is where a super-block begins; the arrays have room.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt,f16c")]
unsafe fn decode<C: Codes>(
    at: *const u8,
    len: usize,
    codes: *mut u8,
    scales: *mut f32,
) -> *const u8 {
    // SAFETY: the caller's.
    unsafe { walk::<C>(at, len, &mut ToPanel { codes, scales }) }
}

/// Inputs of BF16 that are expanded at a time, whole super-blocks: pairs of 16 rows fill two
/// thirds of the panel.
const BF16_K: usize = 512;

/// # Safety
/// As [`mul_strips`], with bf16 activations.
unsafe fn bf16(args: &StripArgs<'_>) {
    let acts = &args.acts;
    let pairs = args.k.div_ceil(2);
    for (s, &strip) in args.strips.iter().enumerate() {
        let tile = args.tile_of(s);
        // SAFETY: the caller's; pairs and tokens are inside the strip and the view.
        unsafe {
            match acts.m {
                1 => bf16_tokens::<1>(strip, args.k, acts.pairs, tile),
                2 => bf16_tokens::<2>(strip, args.k, acts.pairs, tile),
                3 => bf16_tokens::<3>(strip, args.k, acts.pairs, tile),
                4 => bf16_tokens::<4>(strip, args.k, acts.pairs, tile),
                5 => bf16_tokens::<5>(strip, args.k, acts.pairs, tile),
                6 => bf16_tokens::<6>(strip, args.k, acts.pairs, tile),
                7 => bf16_tokens::<7>(strip, args.k, acts.pairs, tile),
                8 => bf16_tokens::<8>(strip, args.k, acts.pairs, tile),
                _ => {
                    tile.write_bytes(0, acts.m * ROWS);
                    let mut at = strip;
                    for k in (0..args.k).step_by(BF16_K) {
                        let len = BF16_K.min(args.k - k);
                        at = bf16_expand(at, len, args.panel);
                        token_runs(acts.m, 8, |base, stride, t, run| {
                            let x = acts.pairs.add(base * pairs + k / 2 * stride + t);
                            let tile = tile.add((base + t) * ROWS);
                            let (w, len) = (args.panel.cast_const(), len.div_ceil(2));
                            match run {
                                8 => bf16_pairs::<1, 8>([w], len, x, stride, [tile]),
                                4 => bf16_pairs::<1, 4>([w], len, x, stride, [tile]),
                                2 => bf16_pairs::<1, 2>([w], len, x, stride, [tile]),
                                _ => bf16_pairs::<1, 1>([w], len, x, stride, [tile]),
                            }
                        });
                    }
                }
            }
        }
    }
}

/// The pair of inputs under the next mask, expanded.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn bf16_step(bits: *const u32, values: &mut *const u8) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let mask = bits.read_unaligned();
        let words = _mm512_loadu_si512(values.cast());
        *values = values.add(2 * mask.count_ones() as usize);
        _mm512_maskz_expand_epi16(mask, words)
    }
}

/// A strip times `T` tokens, in registers; the tile is written, not added to.
///
/// # Safety
/// `strip` is a sparse strip of `k` inputs, `x` is `[⌈k / 2⌉][T]`, `tile` is `[T][16]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt")]
unsafe fn bf16_tokens<const T: usize>(strip: *const u8, k: usize, x: *const u32, tile: *mut f32) {
    // SAFETY: the caller's; both bf16 vectors are 512 plain bits.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); T];
        let pairs = k.div_ceil(2);
        let mut at = strip;
        for of in supers(k) {
            let block = Super::new(GgmlType::S_BF16, at, of);
            let mut values = block.values;
            for g in 0..block.groups {
                let head = block.heads.add(g * head_bytes(GgmlType::S_BF16));
                ask_ahead::<_MM_HINT_T1>(head, 64);
                let first = (block.first + g) * (GROUP / 2);
                for i in 0..(GROUP / 2).min(pairs - first) {
                    ask_ahead::<_MM_HINT_T1>(values, 1);
                    let w = bf16_step(head.cast::<u32>().add(i), &mut values);
                    let w: __m512bh = std::mem::transmute(w);
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let x = *x.add((first + i) * T + t) as i32;
                        let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x));
                        *acc = _mm512_dpbf16_ps(*acc, w, x);
                    }
                }
            }
            at = values;
        }
        for (t, acc) in acc.iter().enumerate() {
            _mm512_storeu_ps(tile.add(t * ROWS), *acc);
        }
    }
}

/// Writes the pairs of `len` inputs, as dense strips and tiles have them; returns where the
/// next super-block begins. Also those of an input that `len` lacks to whole groups, as zeros.
///
/// # Safety
/// `at` is where a super-block begins; `out` has 64 bytes for each pair of whole groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt")]
unsafe fn bf16_expand(mut at: *const u8, len: usize, out: *mut u8) -> *const u8 {
    // SAFETY: the caller's.
    unsafe {
        for of in supers(len) {
            let block = Super::new(GgmlType::S_BF16, at, of);
            let mut values = block.values;
            for g in 0..block.groups {
                let head = block.heads.add(g * head_bytes(GgmlType::S_BF16));
                ask_ahead::<_MM_HINT_T1>(head, 64);
                let out = out.add((block.first + g) * GROUP * ROWS * 2);
                for i in 0..GROUP / 2 {
                    ask_ahead::<_MM_HINT_T1>(values, 1);
                    let w = bf16_step(head.cast::<u32>().add(i), &mut values);
                    _mm512_storeu_si512(out.add(64 * i).cast(), w);
                }
            }
            at = values;
        }
        at
    }
}

/// Writes `len` inputs from `at` on, whole super-blocks but for the row's last, as bf16 tiles:
/// `(code - zero point) * scale`, rounded as dense weights on their way to tiles are. Returns
/// where the next ones begin.
///
/// # Safety
/// `at` is where a super-block begins; `out` has 64 bytes for every two inputs of whole groups;
/// [`takes`] accepts both `ty` and `S_BF16`.
#[cfg(feature = "amx")]
pub(crate) unsafe fn to_tiles(ty: GgmlType, at: *const u8, len: usize, out: *mut u8) -> *const u8 {
    // SAFETY: the caller's.
    unsafe {
        match ty {
            GgmlType::S8 => code_tiles::<S8>(at, len, out),
            GgmlType::S4 => code_tiles::<S4>(at, len, out),
            _ => bf16_expand(at, len, out),
        }
    }
}

/// bf16 tiles on their way to memory.
#[cfg(feature = "amx")]
struct ToTiles(*mut u8);

#[cfg(feature = "amx")]
impl<C: Codes> Visit<C> for ToTiles {
    #[inline(always)]
    unsafe fn group<const HIGH: bool>(&mut self, group: &Group, values: &mut *const u8) {
        use crate::amx::panel::{bias, four};
        // SAFETY: the caller's, and there is room.
        unsafe {
            let bits = group.head.add(2 * ROWS).cast::<u64>();
            let out = self.0.add(group.kb * GROUP * ROWS * 2);
            let scale = WithBf16::load_f16(group.head);
            let bias = bias::<WithBf16, C::Shape>(scale, scale, C::ZERO);
            for e in 0..8 {
                let codes = step::<C, HIGH>(bits.add(e), values);
                four(WithBf16::from(codes), scale, bias, out.add(128 * e));
            }
        }
    }
}

/// # Safety
/// As [`to_tiles`].
#[cfg(feature = "amx")]
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx512bf16,popcnt,f16c"
)]
unsafe fn code_tiles<C: Codes>(at: *const u8, len: usize, out: *mut u8) -> *const u8 {
    // SAFETY: the caller's.
    unsafe { walk::<C>(at, len, &mut ToTiles(out)) }
}
