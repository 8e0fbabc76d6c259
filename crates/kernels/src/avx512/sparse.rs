//! Products with sparse strips: `vpexpandb` and `vpexpandw` put the zeros back.
//!
//! A step of a bitmap is a mask of the 64 weights that one dot product of 16 rows takes. The
//! values are loaded from the cursor as they lie, expanded under the mask into a vector of
//! zero points, and multiplied; the mask's population count moves the cursor. Nothing is
//! written to memory and no position is computed by vectors: three operations of the port
//! that shuffles per step, whatever the density.
//!
//! Up to eight tokens share each expanded vector in registers, of up to four strips in turns,
//! group by group. More tokens pass over a panel of two super-blocks that is expanded once, as
//! the dense kernels do. Sums are made in the dense kernels' order, so that results equal
//! theirs bit for bit.
//!
//! # What limits one token
//!
//! A step of 64 weights (of `S-BF16`: 32) is about eleven instructions: the mask to two kinds of
//! register, its count, the cursor, two for the request of memory, the values (`S4`: one or two
//! more), the zero points, the expansion of two operations, the dot product. Three of them
//! (`kmov`, `vpexpand`) are for port 5, so a core begins a step every three cycles at best and at
//! 2.6 GHz takes, at 50 % of zeros, 38 GB/s of `S8` (44 bytes a step), 24 of `S4` (28) and 31 of
//! `S-BF16` (36). Eight cores want two to three times the 100 GB/s that their memory gives: bytes
//! are the limit, and with them the gain is 1.54, 1.28 and 1.78 at most. `S4` gains little because
//! scales and bitmaps are 12 of its 28 bytes. The fewer bytes a step has, the more its instructions
//! count all the same: one token's sums stay in registers, and where two steps have no more than a
//! line, memory is asked for every other step (`docs/bench`).
//!
//! So what counts is that enough lines are on their way from memory all the time. One stream keeps
//! too few (`docs/bench`), hence several strips. And a strip is not read at an even pace: heads and
//! values are two places, and the first half of an `S4` super-block brings all of its values, the
//! second half none. Memory is asked for at an even pace all the same ([`Ask`]): a step's share of
//! the strip's bytes, from front to back, wherever the kernel reads meanwhile.

use std::arch::x86_64::*;

use tegula_gguf::{
    GgmlType,
    sparse::{GROUP, head_bytes, supers},
};

use super::matmul::{Avx512, bf16_pairs};
#[cfg(feature = "amx")]
use crate::generic::lanes::WithBf16;
use crate::{
    acts::GROUP as TOKEN_GROUP,
    generic::{
        format::{self, Shape},
        lanes::Lanes,
        matmul::{
            Panels, Tokens, Vectors, ask_beginnings, panel_at, streams, token_runs, tokens_at,
        },
    },
    mem::{self, LINE},
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
    /// A byte of values that stands for zero, before any of its bits are masked away.
    #[cfg(feature = "amx")]
    const ABSENT: u8;
    /// A code's bits.
    #[cfg(feature = "amx")]
    const MASK: u8;

    /// Where the codes of the four bytes of an expanded dword come to stand on the way to tiles.
    #[cfg(feature = "amx")]
    fn places<const HIGH: bool>() -> [Place; 4];
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
    #[cfg(feature = "amx")]
    const ABSENT: u8 = 0x80;
    #[cfg(feature = "amx")]
    const MASK: u8 = 0xff;

    #[cfg(feature = "amx")]
    #[inline(always)]
    fn places<const HIGH: bool>() -> [Place; 4] {
        [
            Place::at(8, 8),
            Place::at(0, 8),
            Place::at(-8, 8),
            Place::at(-16, 8),
        ]
    }
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
    // Both nibbles: which one counts, the mask of its place says.
    #[cfg(feature = "amx")]
    const ABSENT: u8 = 0x88;
    #[cfg(feature = "amx")]
    const MASK: u8 = 0x0f;

    #[cfg(feature = "amx")]
    #[inline(always)]
    fn places<const HIGH: bool>() -> [Place; 4] {
        if HIGH {
            [
                Place::at(8, 12),
                Place::at(0, 12),
                Place::at(-8, 12),
                Place::at(-16, 12),
            ]
        } else {
            [
                Place::at(16, 16),
                Place::at(0, 8),
                Place::at(0, 16),
                Place::at(-8, 16),
            ]
        }
    }
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

/// Tokens whose sums share registers.
const FEW_TOKENS: usize = 8;
/// Strips that few tokens pass over in turns.
const STREAMS: usize = 4;
/// Bytes of a strip that are on their way: of four, 12 KiB of a first-level cache that two threads
/// may share. On the whole 2 and 4 KiB are slower (`docs/bench/2026-11-28-h100`).
const AHEAD: usize = 3072;

/// Steps of a group.
const fn steps(ty: GgmlType) -> usize {
    match ty {
        GgmlType::S_BF16 => GROUP / 2,
        _ => GROUP / 4,
    }
}

/// Bytes that a step has asked for.
fn bytes_per_step(ty: GgmlType, k: usize, bytes: usize) -> usize {
    bytes.div_ceil(k.div_ceil(GROUP).max(1) * steps(ty))
}

/// Asks for memory, the same number of bytes each step. At the end of a strip it goes on with the
/// one that is read next.
#[derive(Clone, Copy)]
struct Ask {
    at: *const u8,
    step: usize,
    end: *const u8,
    next: *const u8,
}

impl Ask {
    /// Bytes from `at` on, `step` each step, whatever they are.
    fn from(at: *const u8, step: usize) -> Ask {
        let end = std::ptr::without_provenance(usize::MAX);
        Ask {
            at,
            step,
            end,
            next: end,
        }
    }

    /// The bytes of `steps` steps, which are no more than a line's.
    #[inline(always)]
    fn steps<const HINT: i32>(&mut self, steps: usize) {
        mem::ask::<HINT>(self.at);
        self.at = self.at.wrapping_add(steps * self.step);
    }

    /// To be called before each group.
    #[inline(always)]
    fn turn(&mut self) {
        if self.at >= self.end {
            self.at = self.next.wrapping_add(self.at.addr() - self.end.addr());
            self.end = std::ptr::without_provenance(usize::MAX);
        }
    }
}

/// Where a kernel is in a strip.
#[derive(Clone, Copy)]
struct Cursor {
    /// Where the super-block begins, or, once it is read, the next one.
    at: *const u8,
    head: *const u8,
    values: *const u8,
    ask: Ask,
}

impl Cursor {
    fn new(at: *const u8, ask: Ask) -> Cursor {
        Cursor {
            at,
            head: at,
            values: at,
            ask,
        }
    }

    /// What a group is read by: its head, where its values begin, and whom to ask for memory.
    #[inline(always)]
    fn begin(mut self) -> (*const u8, *const u8, Ask) {
        self.ask.turn();
        (self.head, self.values, self.ask)
    }

    /// Behind a group whose head has so many bytes.
    #[inline(always)]
    fn behind(self, head_bytes: usize, values: *const u8, ask: Ask) -> Cursor {
        Cursor {
            head: self.head.wrapping_add(head_bytes),
            values,
            ask,
            ..self
        }
    }

    /// To the first group of a super-block.
    #[inline(always)]
    fn enter(&mut self, ty: GgmlType, of: (usize, usize)) {
        let block = Super::new(ty, self.at, of);
        (self.head, self.values) = (block.heads, block.values);
    }
}

/// Those of strips `first .. first + count` of a call, of which the first lines are asked for.
fn cursors(args: &StripArgs<'_>, first: usize, count: usize) -> [Cursor; STREAMS] {
    let strips = args.strips.iter().zip(args.bytes).skip(first).take(count);
    ask_beginnings(strips.map(|(&strip, &bytes)| (strip, bytes)), AHEAD);
    std::array::from_fn(|s| {
        let s = first + s.min(count - 1);
        let (at, bytes) = (args.strips[s], args.bytes[s]);
        let end = at.wrapping_add(bytes);
        let ask = Ask {
            at: at.wrapping_add(AHEAD.min(bytes)),
            step: bytes_per_step(args.ty, args.k, bytes),
            end,
            next: args.next.get(s).copied().unwrap_or(end),
        };
        Cursor::new(at, ask)
    })
}

/// The values under the next step's mask, expanded; moves the pointer on.
///
/// # Safety
/// `bits` is inside a bitmap, `values` where its values are; inlined where the features are.
#[inline(always)]
unsafe fn step<C: Codes, const HIGH: bool>(bits: *const u64, values: &mut *const u8) -> __m512i {
    // SAFETY: the caller's; 64 bytes may be read behind any value.
    unsafe {
        let mask = bits.read_unaligned();
        let codes = C::load::<HIGH>(*values);
        *values = values.add(mask.count_ones() as usize);
        _mm512_mask_expand_epi8(_mm512_set1_epi8(1 << C::ZERO), mask, codes)
    }
}

/// What a kernel does with each group.
trait Visit<C: Codes> {
    /// Reads group `kb` of the row, or of the stretch, of the strip `s`, and moves the cursor
    /// behind it.
    ///
    /// # Safety
    /// The group is whole; inlined where the features are.
    unsafe fn group<const HIGH: bool>(&mut self, kb: usize, s: usize, at: &mut Cursor);

    /// Reads group `kb` of all strips, one after the other, and moves the cursors behind it.
    ///
    /// # Safety
    /// As [`Visit::group`].
    #[inline(always)]
    unsafe fn turn<const HIGH: bool>(&mut self, kb: usize, strips: &mut [Cursor]) {
        for (s, at) in strips.iter_mut().enumerate() {
            // SAFETY: the caller's.
            unsafe { self.group::<HIGH>(kb, s, at) };
        }
    }
}

/// Visits all groups of `k` inputs, whole super-blocks but for the last, of all strips, which take
/// turns group by group. Leaves the cursors where the next ones begin.
///
/// # Safety
/// The cursors are where super-blocks begin; inlined where the features are.
#[inline(always)]
unsafe fn walk<C: Codes>(strips: &mut [Cursor], k: usize, visitor: &mut impl Visit<C>) {
    // SAFETY: the caller's.
    unsafe {
        for (first, groups) in supers(k) {
            let low = if C::HALVES {
                groups.div_ceil(2)
            } else {
                groups
            };
            for at in strips.iter_mut() {
                at.enter(C::TYPE, (first, groups));
            }
            for g in 0..low {
                visitor.turn::<false>(first + g, strips);
            }
            for at in strips.iter_mut() {
                let begin = at.head.wrapping_add((groups - low) * head_bytes(C::TYPE));
                at.at = std::mem::replace(&mut at.values, begin);
            }
            if !C::HALVES {
                continue;
            }
            for g in low..groups {
                visitor.turn::<true>(first + g, strips);
            }
            for at in strips.iter_mut() {
                at.at = at.at.max(at.values);
            }
        }
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
    if acts.m == 1 {
        streams(args.strips.len(), STREAMS, |first, count| {
            let strips = cursors(args, first, count);
            // SAFETY: the caller's; groups and tokens are inside the strips and the view.
            unsafe {
                let x = Tokens {
                    tile: args.tile_of(first),
                    ..tokens_at::<C::Shape>(acts, 0, 1)
                };
                match (count, strips.iter().all(|s| 2 * s.ask.step <= LINE)) {
                    (4, true) => one_token::<C, 4, 2>(strips, args.k, &x),
                    (4, false) => one_token::<C, 4, 1>(strips, args.k, &x),
                    (2, _) => one_token::<C, 2, 1>([strips[0], strips[1]], args.k, &x),
                    _ => one_token::<C, 1, 1>([strips[0]], args.k, &x),
                }
            }
        });
        return;
    }
    if acts.m <= FEW_TOKENS {
        for first in (0..args.strips.len()).step_by(STREAMS) {
            let count = STREAMS.min(args.strips.len() - first);
            let strips = &mut cursors(args, first, count)[..count];
            // SAFETY: the caller's; groups and tokens are inside the strips and the view.
            unsafe {
                let x = Tokens {
                    tile: args.tile_of(first),
                    ..tokens_at::<C::Shape>(acts, 0, acts.m)
                };
                match acts.m {
                    2 => tokens::<C, 2>(strips, args.k, &x),
                    3 => tokens::<C, 3>(strips, args.k, &x),
                    4 => tokens::<C, 4>(strips, args.k, &x),
                    5 => tokens::<C, 5>(strips, args.k, &x),
                    6 => tokens::<C, 6>(strips, args.k, &x),
                    7 => tokens::<C, 7>(strips, args.k, &x),
                    _ => tokens::<C, 8>(strips, args.k, &x),
                }
            }
        }
        return;
    }
    // SAFETY: the caller's.
    unsafe { panels::<C, Vectors<Avx512>>(args) };
}

/// Strips of codes times several tokens, by panels.
///
/// # Safety
/// As [`mul_strips`], with strips of `S8` or `S4`.
#[cfg(feature = "amx")]
pub(crate) unsafe fn by_panels<P: Panels>(args: &StripArgs<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match args.ty {
            GgmlType::S8 => panels::<S8, P>(args),
            _ => panels::<S4, P>(args),
        }
    }
}

/// # Safety
/// As [`mul_strips`].
unsafe fn panels<C: Codes, P: Panels>(args: &StripArgs<'_>) {
    for (s, &strip) in args.strips.iter().enumerate() {
        let step = bytes_per_step(args.ty, args.k, args.bytes[s]);
        // SAFETY: the caller's; groups are inside the strip.
        unsafe {
            args.tile_of(s).write_bytes(0, args.acts.m * ROWS);
            let mut at = strip;
            for k in (0..args.k).step_by(PANEL_K) {
                let len = PANEL_K.min(args.k - k);
                let panel = panel_at(args.panel, k / GROUP, len / GROUP, C::ZERO);
                // What follows comes while this panel is multiplied.
                let next = at.wrapping_add(len / GROUP * steps(C::TYPE) * step);
                let from = Cursor::new(at, Ask::from(next, step));
                at = match P::SIGNED {
                    true => decode::<C, true>(from, len, panel.codes, panel.scales),
                    false => decode::<C, false>(from, len, panel.codes, panel.scales),
                };
                P::products::<C::Shape>(&panel, args, s);
            }
        }
    }
}

/// Sums of one token with `S` strips, in registers. Memory is asked for every `EVERY` steps.
struct One<'a, const S: usize, const EVERY: usize> {
    x: &'a Tokens,
    sums: [__m512; S],
}

impl<C: Codes, const S: usize, const EVERY: usize> Visit<C> for One<'_, S, EVERY> {
    #[inline(always)]
    unsafe fn group<const HIGH: bool>(&mut self, kb: usize, s: usize, cursor: &mut Cursor) {
        // SAFETY: the caller's.
        unsafe {
            let (head, mut values, mut ask) = cursor.begin();
            // Two chains of sums, so that a group waits for half as many products in a row.
            let zero = _mm512_set1_epi32(*self.x.nsum.add(kb) << C::ZERO);
            let mut sums = [zero, _mm512_setzero_si512()];
            let bits = head.add(2 * ROWS).cast::<u64>();
            let q = self.x.q.add(kb * GROUP).cast::<i32>();
            for e in 0..8 {
                if e % EVERY == 0 {
                    ask.steps::<_MM_HINT_T0>(EVERY);
                }
                let codes = step::<C, HIGH>(bits.add(e), &mut values);
                let q = _mm512_set1_epi32(q.add(e).read_unaligned());
                sums[e % 2] = _mm512_dpbusd_epi32(sums[e % 2], codes, q);
            }
            *cursor = cursor.behind(head_bytes(C::TYPE), values, ask);
            let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1]));
            let scale = _mm512_set1_ps(*self.x.d.add(kb));
            let scale = _mm512_mul_ps(<__m512i as Lanes>::load_f16(head), scale);
            self.sums[s] = _mm512_fmadd_ps(sum, scale, self.sums[s]);
        }
    }

    // Written out: each strip's sums have a register, which the compiler does not give them in a
    // loop.
    #[inline(always)]
    unsafe fn turn<const HIGH: bool>(&mut self, kb: usize, strips: &mut [Cursor]) {
        // SAFETY: the caller's.
        unsafe {
            Visit::<C>::group::<HIGH>(self, kb, 0, &mut strips[0]);
            if S > 1 {
                Visit::<C>::group::<HIGH>(self, kb, 1, &mut strips[1]);
            }
            if S > 2 {
                Visit::<C>::group::<HIGH>(self, kb, 2, &mut strips[2]);
                Visit::<C>::group::<HIGH>(self, kb, 3, &mut strips[3]);
            }
        }
    }
}

/// `S` strips times one token; the tiles are written, not added to.
///
/// # Safety
/// As [`tokens`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,popcnt,f16c")]
unsafe fn one_token<C: Codes, const S: usize, const EVERY: usize>(
    mut strips: [Cursor; S],
    k: usize,
    x: &Tokens,
) {
    // SAFETY: the caller's.
    unsafe {
        let sums = [_mm512_setzero_ps(); S];
        let mut one = One::<S, EVERY> { x, sums };
        walk::<C>(&mut strips, k, &mut one);
        for (s, sum) in one.sums.into_iter().enumerate() {
            _mm512_storeu_ps(x.tile.add(s * ROWS), sum);
        }
    }
}

/// Sums of `T` tokens, in their tiles.
struct Sums<'a, const T: usize> {
    x: &'a Tokens,
}

impl<C: Codes, const T: usize> Visit<C> for Sums<'_, T> {
    #[inline(always)]
    unsafe fn group<const HIGH: bool>(&mut self, kb: usize, s: usize, cursor: &mut Cursor) {
        // SAFETY: the caller's.
        unsafe {
            let (x, at) = (self.x, kb * self.x.stride);
            let (head, mut values, mut ask) = cursor.begin();
            let mut sums = [_mm512_setzero_si512(); T];
            for (t, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_set1_epi32(*x.nsum.add(at + t) << C::ZERO);
            }
            let bits = head.add(2 * ROWS).cast::<u64>();
            let q = x.q.add(at * GROUP);
            for e in 0..8 {
                ask.steps::<_MM_HINT_T0>(1);
                let codes = step::<C, HIGH>(bits.add(e), &mut values);
                for (t, sum) in sums.iter_mut().enumerate() {
                    let q = q.add(t * GROUP + 4 * e).cast::<i32>().read_unaligned();
                    *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(q));
                }
            }
            *cursor = cursor.behind(head_bytes(C::TYPE), values, ask);
            let scales = <__m512i as Lanes>::load_f16(head);
            let tile = x.tile.add(s * T * ROWS);
            for (t, sum) in sums.into_iter().enumerate() {
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*x.d.add(at + t)));
                let tile = tile.add(t * ROWS);
                let acc = _mm512_loadu_ps(tile);
                let acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
                _mm512_storeu_ps(tile, acc);
            }
        }
    }
}

/// Strips times `T` tokens; the tiles are written, not added to.
///
/// # Safety
/// The cursors are at the beginning of sparse strips of `k` inputs, `x` holds `T` interleaved
/// tokens and the strips' tiles, one after the other.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,popcnt,f16c")]
unsafe fn tokens<C: Codes, const T: usize>(strips: &mut [Cursor], k: usize, x: &Tokens) {
    // SAFETY: the caller's.
    unsafe {
        x.tile.write_bytes(0, strips.len() * T * ROWS);
        walk::<C>(strips, k, &mut Sums::<T> { x });
    }
}

/// Codes, signed or not, and scales on their way to a panel.
struct ToPanel<const SIGNED: bool> {
    codes: *mut u8,
    scales: *mut f32,
}

impl<C: Codes, const SIGNED: bool> Visit<C> for ToPanel<SIGNED> {
    #[inline(always)]
    unsafe fn group<const HIGH: bool>(&mut self, kb: usize, _: usize, cursor: &mut Cursor) {
        // SAFETY: the caller's, and the panel has room.
        unsafe {
            let bits = cursor.head.add(2 * ROWS).cast::<u64>();
            let out = self.codes.add(kb * GROUP * ROWS);
            for e in 0..8 {
                cursor.ask.steps::<_MM_HINT_T1>(1);
                let mut codes = step::<C, HIGH>(bits.add(e), &mut cursor.values);
                if SIGNED {
                    codes = codes.sub_bytes(1 << C::ZERO);
                }
                _mm512_storeu_si512(out.add(64 * e).cast(), codes);
            }
            let out = self.scales.add(kb * ROWS);
            _mm512_storeu_ps(out, <__m512i as Lanes>::load_f16(cursor.head));
            cursor.head = cursor.head.add(head_bytes(C::TYPE));
        }
    }
}

/// Writes codes and scales of `len` inputs, whole super-blocks but for the row's last; returns
/// where the next ones begin.
///
/// # Safety
/// The cursor is where a super-block begins; the arrays have room.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt,f16c")]
unsafe fn decode<C: Codes, const SIGNED: bool>(
    from: Cursor,
    len: usize,
    codes: *mut u8,
    scales: *mut f32,
) -> *const u8 {
    let mut strip = [from];
    // SAFETY: the caller's.
    unsafe { walk::<C>(&mut strip, len, &mut ToPanel::<SIGNED> { codes, scales }) };
    strip[0].at
}

/// Inputs of BF16 that are expanded at a time, whole super-blocks: pairs of 16 rows fill two
/// thirds of the panel.
const BF16_K: usize = 512;

/// # Safety
/// As [`mul_strips`], with bf16 activations.
unsafe fn bf16(args: &StripArgs<'_>) {
    let acts = &args.acts;
    let pairs = args.k.div_ceil(2);
    if acts.m <= FEW_TOKENS {
        for first in (0..args.strips.len()).step_by(STREAMS) {
            let count = STREAMS.min(args.strips.len() - first);
            let strips = &mut cursors(args, first, count)[..count];
            let (x, tile) = (acts.pairs, args.tile_of(first));
            // SAFETY: the caller's; pairs and tokens are inside the strips and the view.
            unsafe {
                match acts.m {
                    1 => bf16_tokens::<1>(strips, args.k, x, tile),
                    2 => bf16_tokens::<2>(strips, args.k, x, tile),
                    3 => bf16_tokens::<3>(strips, args.k, x, tile),
                    4 => bf16_tokens::<4>(strips, args.k, x, tile),
                    5 => bf16_tokens::<5>(strips, args.k, x, tile),
                    6 => bf16_tokens::<6>(strips, args.k, x, tile),
                    7 => bf16_tokens::<7>(strips, args.k, x, tile),
                    _ => bf16_tokens::<8>(strips, args.k, x, tile),
                }
            }
        }
        return;
    }
    for (s, &strip) in args.strips.iter().enumerate() {
        let tile = args.tile_of(s);
        let step = bytes_per_step(args.ty, args.k, args.bytes[s]);
        // SAFETY: the caller's; pairs and tokens are inside the strip and the view.
        unsafe {
            tile.write_bytes(0, acts.m * ROWS);
            let mut at = strip;
            for k in (0..args.k).step_by(BF16_K) {
                let len = BF16_K.min(args.k - k);
                let next = at.wrapping_add(len.div_ceil(GROUP) * steps(args.ty) * step);
                at = bf16_expand(Cursor::new(at, Ask::from(next, step)), len, args.panel);
                token_runs(acts.m, (TOKEN_GROUP, 8), |base, stride, t, run| {
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

/// Strips times `T` tokens, in turns group by group; the tiles are written, not added to.
///
/// # Safety
/// The cursors are at the beginning of sparse strips of `k` inputs, `x` is `[⌈k / 2⌉][T]`, `tiles`
/// are `[strips][T][16]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt")]
unsafe fn bf16_tokens<const T: usize>(
    strips: &mut [Cursor],
    k: usize,
    x: *const u32,
    tiles: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        tiles.write_bytes(0, strips.len() * T * ROWS);
        let pairs = k.div_ceil(2);
        for (first, groups) in supers(k) {
            for at in strips.iter_mut() {
                at.enter(GgmlType::S_BF16, (first, groups));
            }
            for pair in (first * GROUP / 2..pairs).step_by(GROUP / 2).take(groups) {
                let x = x.add(pair * T);
                for (s, at) in strips.iter_mut().enumerate() {
                    let tile = tiles.add(s * T * ROWS);
                    match pairs - pair {
                        0..16 => bf16_group::<T>(at, pairs - pair, x, tile),
                        // A constant, so that the loop is gone.
                        _ => bf16_group::<T>(at, GROUP / 2, x, tile),
                    }
                }
            }
            for at in strips.iter_mut() {
                at.at = at.values;
            }
        }
    }
}

/// Adds the products of the cursor's group of `pairs` with `T` tokens, and moves the cursor on.
///
/// # Safety
/// As [`bf16_tokens`], with `x` and the tile of this group and strip; inlined where the features
/// are.
#[inline(always)]
unsafe fn bf16_group<const T: usize>(
    cursor: &mut Cursor,
    pairs: usize,
    x: *const u32,
    tile: *mut f32,
) {
    // SAFETY: the caller's; both bf16 vectors are 512 plain bits.
    unsafe {
        let (head, mut values, mut ask) = cursor.begin();
        let mut acc = [_mm512_setzero_ps(); T];
        for (t, acc) in acc.iter_mut().enumerate() {
            *acc = _mm512_loadu_ps(tile.add(t * ROWS));
        }
        for i in 0..pairs {
            ask.steps::<_MM_HINT_T0>(1);
            let w: __m512bh =
                std::mem::transmute(bf16_step(head.cast::<u32>().add(i), &mut values));
            for (t, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(*x.add(i * T + t) as i32);
                *acc = _mm512_dpbf16_ps(*acc, w, std::mem::transmute::<__m512i, __m512bh>(x));
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            _mm512_storeu_ps(tile.add(t * ROWS), *acc);
        }
        *cursor = cursor.behind(head_bytes(GgmlType::S_BF16), values, ask);
    }
}

/// Writes the pairs of `len` inputs, as dense strips and tiles have them; returns where the
/// next super-block begins. Also those of an input that `len` lacks to whole groups, as zeros.
///
/// # Safety
/// The cursor is where a super-block begins; `out` has 64 bytes for each pair of whole groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt")]
unsafe fn bf16_expand(mut from: Cursor, len: usize, out: *mut u8) -> *const u8 {
    // SAFETY: the caller's.
    unsafe {
        for (first, groups) in supers(len) {
            from.enter(GgmlType::S_BF16, (first, groups));
            for g in 0..groups {
                let out = out.add((first + g) * GROUP * ROWS * 2);
                for i in 0..GROUP / 2 {
                    from.ask.steps::<_MM_HINT_T1>(1);
                    let w = bf16_step(from.head.cast::<u32>().add(i), &mut from.values);
                    _mm512_storeu_si512(out.add(64 * i).cast(), w);
                }
                from.head = from.head.add(head_bytes(GgmlType::S_BF16));
            }
            from.at = from.values;
        }
        from.at
    }
}

/// Writes `len` inputs from `at` on, whole super-blocks but for the row's last, as bf16 tiles:
/// `(code - zero point) * scale`, rounded as dense weights on their way to tiles are. Returns
/// where the next ones begin. Asks for what is at `next` on the way, as many bytes as `len` inputs
/// of a strip of `k` inputs in `bytes` bytes take.
///
/// # Safety
/// `at` is where a super-block begins; `out` has 64 bytes for every two inputs of whole groups;
/// [`takes`] accepts both `ty` and `S_BF16`.
#[cfg(feature = "amx")]
pub(crate) unsafe fn to_tiles(
    (ty, k, bytes): (GgmlType, usize, usize),
    at: *const u8,
    len: usize,
    out: *mut u8,
    next: *const u8,
) -> *const u8 {
    let from = Cursor::new(at, Ask::from(next, bytes_per_step(ty, k, bytes)));
    // SAFETY: the caller's.
    unsafe {
        match ty {
            GgmlType::S8 => code_tiles::<S8>(from, len, out),
            GgmlType::S4 => code_tiles::<S4>(from, len, out),
            _ => bf16_expand(from, len, out),
        }
    }
}

/// Where in a dword the codes of four inputs of a row are.
#[cfg(feature = "amx")]
#[derive(Clone, Copy)]
struct Place {
    /// Bits that they are shifted left, or, negative, right, for their lowest bit to stand at `bit`.
    shift: i32,
    bit: u32,
}

/// Codes become f32 without a conversion: a code's bits, put into the mantissa of a power of two
/// that gives them their weight, are that power plus the code. What is added to `scale` times
/// that, `-(power + zero point) * scale`, must be exact, which it is for f16 scales and powers up
/// to 2^15; so the sum is `(code - zero point) * scale` with one rounding, which is none.
///
/// A step takes two or three shifts, four `vpternlog` and four fused multiply-adds: three or four
/// instructions fewer than with masks and conversions, as many as the expansion costs.
#[cfg(feature = "amx")]
impl Place {
    const fn at(shift: i32, bit: u32) -> Place {
        Place { shift, bit }
    }

    /// The power of two.
    const fn power(self) -> f32 {
        (1_u32 << (23 - self.bit)) as f32
    }
}

/// bf16 tiles on their way to memory.
#[cfg(feature = "amx")]
struct ToTiles(*mut u8);

#[cfg(feature = "amx")]
impl<C: Codes> Visit<C> for ToTiles {
    #[inline(always)]
    unsafe fn group<const HIGH: bool>(&mut self, kb: usize, _: usize, cursor: &mut Cursor) {
        // SAFETY: the caller's, and there is room.
        unsafe {
            let bits = cursor.head.add(2 * ROWS).cast::<u64>();
            let out = self.0.add(kb * GROUP * ROWS * 2);
            let scale = <__m512i as Lanes>::load_f16(cursor.head);
            let places = C::places::<HIGH>();
            let zero = (1_u32 << C::ZERO) as f32;
            let bias =
                places.map(|place| _mm512_mul_ps(scale, _mm512_set1_ps(-(place.power() + zero))));
            let absent = _mm512_set1_epi8(C::ABSENT as i8);
            for e in 0..8 {
                cursor.ask.steps::<_MM_HINT_T1>(1);
                let mask = bits.add(e).read_unaligned();
                let codes = _mm512_loadu_si512(cursor.values.cast());
                cursor.values = cursor.values.add(mask.count_ones() as usize);
                let codes = _mm512_mask_expand_epi8(absent, mask, codes);
                let mut values = [scale; 4];
                for ((value, place), bias) in values.iter_mut().zip(places).zip(bias) {
                    let shifted = match place.shift {
                        16 => _mm512_slli_epi32::<16>(codes),
                        8 => _mm512_slli_epi32::<8>(codes),
                        -8 => _mm512_srli_epi32::<8>(codes),
                        -16 => _mm512_srli_epi32::<16>(codes),
                        _ => codes,
                    };
                    let mask = _mm512_set1_epi32((C::MASK as i32) << place.bit);
                    let power = _mm512_castps_si512(_mm512_set1_ps(place.power()));
                    // (shifted & mask) | power
                    let code = _mm512_ternarylogic_epi32::<0xea>(shifted, mask, power);
                    *value = _mm512_fmadd_ps(_mm512_castsi512_ps(code), scale, bias);
                }
                let out = out.add(128 * e);
                WithBf16::bf16_pair(values[0], values[1]).store(out);
                WithBf16::bf16_pair(values[2], values[3]).store(out.add(64));
            }
            cursor.head = cursor.head.add(head_bytes(C::TYPE));
        }
    }
}

/// # Safety
/// As [`to_tiles`].
#[cfg(feature = "amx")]
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx512bf16,popcnt,f16c"
)]
unsafe fn code_tiles<C: Codes>(from: Cursor, len: usize, out: *mut u8) -> *const u8 {
    let mut strip = [from];
    // SAFETY: the caller's.
    unsafe { walk::<C>(&mut strip, len, &mut ToTiles(out)) };
    strip[0].at
}
