//! Weights to blocks.
//!
//! Without importance the formats of 32 weights take ggml's plain rounding (bit for bit),
//! the others a search over scales weighted by the weights themselves. With importance
//! every format but Q8_0, MXFP4 and NVFP4 searches.

use super::{
    decode::{Block, e8m0_half, ue4m3_half},
    grids,
    layout::{self, SUPER, f16, pack_scales_iq4_xs, pack_scales_k4, pack_scales_q3_k},
    search::{self, AffineSearch, to_code},
};

/// A format that can be written.
pub(super) trait Encode: Block {
    /// Larger weights are refused: no f16 scale reaches these in any format, and below them no sum
    /// of a search overflows.
    const LIMIT: f32 = 1e9;

    /// The block of `LEN` finite weights.
    fn encode(x: &[f32], importance: Option<Importance>) -> Self;
}

/// How much the columns that a block covers count.
#[derive(Clone, Copy)]
pub(super) struct Importance<'a> {
    /// One factor per weight, finite and not negative.
    pub columns: &'a [f32],
    /// The mean square of the whole row of weights.
    pub row_power: f32,
}

/// The `f16` nearest to `x`, little-endian.
fn to_f16(x: f32) -> [u8; 2] {
    half::f16::from_f32(x).to_le_bytes()
}

/// The reciprocal, or 0 for 0.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// `importance · √(power + x²)`: what the columns' factors make of the weights' errors.
///
/// Columns that never mattered must not leave a group without any weight; there, `plain`
/// takes over.
fn weigh<const N: usize>(
    x: &[f32; N],
    columns: &[f32],
    power: f32,
    plain: impl Fn(&[f32; N]) -> [f32; N],
) -> [f32; N] {
    let mut w = [0.0; N];
    for ((w, &x), &c) in w.iter_mut().zip(x).zip(columns) {
        *w = c * (power + x * x).sqrt();
    }
    if w.iter().sum::<f32>() > 0.0 {
        w
    } else {
        plain(x)
    }
}

fn squares<const N: usize>(x: &[f32; N]) -> [f32; N] {
    x.map(|x| x * x)
}

/// Codes of two halves as the nibbles of bytes; the inverse of `decode::nibbles`.
fn pack_nibbles(codes: &[u8], qs: &mut [u8]) {
    let (low, high) = codes.split_at(qs.len());
    for ((q, l), h) in qs.iter_mut().zip(low).zip(high) {
        *q = (l & 15) | (h << 4);
    }
}

fn pack_fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    let mut bits = 0u32;
    for (j, &c) in codes.iter().enumerate() {
        bits |= u32::from(c >> 4) << j;
    }
    bits.to_le_bytes()
}

/// Scale and codes (offset to start at 0) of ggml's plain rounding to `2·levels` steps.
fn round_symmetric(x: &[f32; 32], levels: f32) -> (f32, [u8; 32]) {
    let d = search::peak(x) / -levels;
    let inverse = inverse(d);
    let top = (2.0 * levels) as u8 - 1;
    // Truncation by the saturating cast; a NaN (of an infinite inverse) becomes 0.
    (
        d,
        x.map(|x| ((x * inverse + (levels + 0.5)) as u8).min(top)),
    )
}

/// Scale, minimum and codes of ggml's plain rounding to `levels` steps over the range.
fn round_affine(x: &[f32; 32], levels: f32) -> (f32, f32, [u8; 32]) {
    let low = x
        .iter()
        .copied()
        .fold(f32::MAX, |a, b| if b < a { b } else { a });
    let high = x
        .iter()
        .copied()
        .fold(f32::MIN, |a, b| if b > a { b } else { a });
    let d = (high - low) / levels;
    let inverse = inverse(d);
    (
        d,
        low,
        x.map(|x| (((x - low) * inverse + 0.5) as u8).min(levels as u8)),
    )
}

/// Scale and codes of a block of 32 whose codes run over `-levels..levels`.
fn symmetric32(x: &[f32; 32], levels: f32, importance: Option<Importance>) -> (f32, [u8; 32]) {
    let Some(importance) = importance else {
        return round_symmetric(x, levels);
    };
    let w = weigh(x, importance.columns, importance.row_power, squares);
    let d = search::symmetric(x, &w, levels);
    let inverse = inverse(f16(to_f16(d)));
    (
        d,
        x.map(|x| (to_code(x * inverse, -levels, levels - 1.0) + levels) as u8),
    )
}

/// Scale, minimum and codes of a block of 32 whose codes run over `0..=levels`.
fn affine32(x: &[f32; 32], levels: f32, importance: Option<Importance>) -> (f32, f32, [u8; 32]) {
    let Some(importance) = importance else {
        return round_affine(x, levels);
    };
    let w = weigh(x, importance.columns, importance.row_power, squares);
    let search = AffineSearch {
        free_min: true,
        ..AFFINE_IMPORTANCE
    };
    let (d, m) = search::affine(x, &w, levels, &search);
    let (inverse, low) = (inverse(f16(to_f16(d))), f16(to_f16(m)));
    (
        d,
        m,
        x.map(|x| to_code((x - low) * inverse, 0.0, levels) as u8),
    )
}

fn array<const N: usize>(x: &[f32]) -> &[f32; N] {
    x.first_chunk().expect("the caller hands over whole blocks")
}

impl Encode for layout::Q4_0 {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let (d, codes) = symmetric32(array(x), 8.0, importance);
        let mut qs = [0; 16];
        pack_nibbles(&codes, &mut qs);
        Self { d: to_f16(d), qs }
    }
}

impl Encode for layout::Q4_1 {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let (d, m, codes) = affine32(array(x), 15.0, importance);
        let mut qs = [0; 16];
        pack_nibbles(&codes, &mut qs);
        Self {
            d: to_f16(d),
            m: to_f16(m),
            qs,
        }
    }
}

impl Encode for layout::Q5_0 {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let (d, codes) = symmetric32(array(x), 16.0, importance);
        let mut qs = [0; 16];
        pack_nibbles(&codes, &mut qs);
        Self {
            d: to_f16(d),
            qh: pack_fifth_bits(&codes),
            qs,
        }
    }
}

impl Encode for layout::Q5_1 {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let (d, m, codes) = affine32(array(x), 31.0, importance);
        let mut qs = [0; 16];
        pack_nibbles(&codes, &mut qs);
        Self {
            d: to_f16(d),
            m: to_f16(m),
            qh: pack_fifth_bits(&codes),
            qs,
        }
    }
}

impl Encode for layout::Q8_0 {
    fn encode(x: &[f32], _: Option<Importance>) -> Self {
        let x: &[f32; 32] = array(x);
        let d = search::peak(x).abs() / 127.0;
        let inverse = inverse(d);
        // ggml rounds halves away from zero here.
        Self {
            d: to_f16(d),
            qs: x.map(|x| (x * inverse).round() as i8 as u8),
        }
    }
}

/// The E2M1 nibble nearest to `x` under the scale `d` of doubled values.
fn e2m1(x: f32, d: f32) -> u8 {
    let (mut best, mut code) = (x.abs(), 0);
    for k in 1..8 {
        let error = (d * f32::from(grids::MXFP4[usize::from(k)]) - x.abs()).abs();
        if error < best {
            (best, code) = (error, k);
        }
    }
    if code != 0 && x < 0.0 { code + 8 } else { code }
}

/// The unsigned E4M3 number (NVFP4's scales) nearest to `x`, which is not negative: halves go away
/// from zero, and what is larger than 448 to it.
pub fn to_ue4m3(x: f32) -> u8 {
    // The smallest normal number is 2^-6, and below it they are 2^-9 apart.
    if x < 2f32.powi(-6) {
        return (x * 512.0 + 0.5) as u8;
    }
    // A carry out of the mantissa goes to the exponent. (ggml makes 448 of all from 256 on.)
    let bits = (x.to_bits() + (1 << 19)) >> 20;
    (bits - (120 << 3)).min(0x7e) as u8
}

impl Encode for layout::NVFP4 {
    // The largest scale times the largest code.
    const LIMIT: f32 = 448.0 * 6.0;

    fn encode(x: &[f32], _: Option<Importance>) -> Self {
        let x: &[f32; 64] = array(x);
        let (mut d, mut qs) = ([0; 4], [0; 32]);
        for (i, x) in x.as_chunks::<16>().0.iter().enumerate() {
            d[i] = to_ue4m3(search::peak(x).abs() / 6.0);
            let scale = ue4m3_half(d[i]);
            pack_nibbles(&x.map(|x| e2m1(x, scale)), &mut qs[8 * i..8 * i + 8]);
        }
        Self { d, qs }
    }
}

impl Encode for layout::MXFP4 {
    const LIMIT: f32 = f32::INFINITY;

    fn encode(x: &[f32], _: Option<Importance>) -> Self {
        let x: &[f32; 32] = array(x);
        let peak = search::peak(x).abs();
        // Of the logarithm rounded to f32, as ggml has it: just below a power of two that
        // may round up to it.
        let exponent = ((f64::from(peak).log2() as f32).floor() - 2.0 + 127.0).max(0.0);
        let e = if peak > 0.0 { exponent as u8 } else { 0 };
        let d = e8m0_half(e);
        let codes = x.map(|x| e2m1(x, d));
        let mut qs = [0; 16];
        pack_nibbles(&codes, &mut qs);
        Self { e, qs }
    }
}

impl Encode for layout::IQ4_NL {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let x: &[f32; 32] = array(x);
        let w = match importance {
            Some(i) => weigh(x, i.columns, 2.0 * search::power(x), squares),
            None => squares(x),
        };
        let d = to_f16(search::iq4(x, &w));
        let inverse = inverse(f16(d));
        let mut qs = [0; 16];
        pack_nibbles(&x.map(|x| search::iq4_code(x * inverse)), &mut qs);
        Self { d, qs }
    }
}

impl Encode for layout::IQ4_XS {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let (groups, _) = x.as_chunks::<32>();
        let power = 2.0 * search::power(x);
        let mut fitted = [0f32; 8];
        for (g, (x, fitted)) in groups.iter().zip(&mut fitted).enumerate() {
            let w = match importance {
                Some(i) => weigh(x, &i.columns[32 * g..], power, squares),
                None => squares(x),
            };
            *fitted = search::iq4(x, &w);
        }
        let d = to_f16(search::peak(&fitted) / -32.0);
        let d_inverse = inverse(f16(d));
        let steps = fitted.map(|s| to_code(s * d_inverse, -32.0, 31.0));
        let mut qs = [0; 128];
        for ((x, qs), step) in groups.iter().zip(qs.chunks_exact_mut(16)).zip(steps) {
            let inverse = inverse(f16(d) * step);
            pack_nibbles(&x.map(|x| search::iq4_code(x * inverse)), qs);
        }
        let (scales_l, scales_h) = pack_scales_iq4_xs(&steps.map(|s| (s + 32.0) as u8));
        Self {
            d,
            scales_h,
            scales_l,
            qs,
        }
    }
}

/// The search that ggml uses where importance is known.
const AFFINE_IMPORTANCE: AffineSearch = AffineSearch {
    first: -0.9,
    step: 0.05,
    count: 36,
    absolute: false,
    free_min: false,
};

/// A super-block of groups with scales and minima: Q2_K, Q4_K, Q5_K.
struct AffineSuper<const GROUPS: usize> {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; GROUPS],
    mins: [u8; GROUPS],
    codes: [u8; SUPER],
}

/// What tells the three formats apart.
struct AffineFormat<const N: usize> {
    /// The greatest code of a weight, and of a scale or minimum.
    levels: f32,
    steps: f32,
    plain: AffineSearch,
    plain_weights: fn(&[f32; N]) -> [f32; N],
    /// How the super-block's mean square enters the weights made from importance.
    power: f32,
}

/// Largest first: the code of each of `fitted`, and the f16 step between codes.
fn step_codes<const N: usize>(fitted: &[f32; N], steps: f32) -> (f32, [f32; N]) {
    let high = fitted.iter().copied().fold(0.0, f32::max);
    if high <= 0.0 {
        return (0.0, [0.0; N]);
    }
    let inverse = steps / high;
    (
        high / steps,
        fitted.map(|s| to_code(s * inverse, 0.0, steps)),
    )
}

fn affine_super<const GROUPS: usize, const N: usize>(
    x: &[f32],
    importance: Option<Importance>,
    format: &AffineFormat<N>,
) -> AffineSuper<GROUPS> {
    let (groups, _) = x.as_chunks::<N>();
    let power = format.power * search::power(x);
    let (mut scales, mut mins, mut totals) = ([0f32; GROUPS], [0f32; GROUPS], [0f32; GROUPS]);
    for (g, x) in groups.iter().enumerate() {
        let (w, search) = match importance {
            Some(i) => (
                weigh(x, &i.columns[N * g..], power, format.plain_weights),
                &AFFINE_IMPORTANCE,
            ),
            None => ((format.plain_weights)(x), &format.plain),
        };
        let (scale, min) = search::affine(x, &w, format.levels, search);
        (scales[g], mins[g], totals[g]) = (scale, -min, w.iter().sum());
    }
    let ((d, scales), (dmin, mins)) = if importance.is_some() {
        (
            search::positive(&scales, &totals, format.steps),
            search::positive(&mins, &totals, format.steps),
        )
    } else {
        (
            step_codes(&scales, format.steps),
            step_codes(&mins, format.steps),
        )
    };
    let (d, dmin) = (to_f16(d), to_f16(dmin));

    // The stored scales differ from the fitted ones, so the codes are rounded anew.
    let mut codes = [0; SUPER];
    for (g, (x, codes)) in groups.iter().zip(codes.chunks_exact_mut(N)).enumerate() {
        let (scale, min) = (f16(d) * scales[g], f16(dmin) * mins[g]);
        if scale == 0.0 {
            continue;
        }
        for (c, x) in codes.iter_mut().zip(x) {
            *c = to_code((x + min) / scale, 0.0, format.levels) as u8;
        }
    }
    AffineSuper {
        d,
        dmin,
        scales: scales.map(|s| s as u8),
        mins: mins.map(|m| m as u8),
        codes,
    }
}

fn magnitudes<const N: usize>(x: &[f32; N]) -> [f32; N] {
    x.map(f32::abs)
}

/// Root mean square plus magnitude.
fn rms_magnitudes<const N: usize>(x: &[f32; N]) -> [f32; N] {
    let rms = search::power(x).sqrt();
    x.map(|x| rms + x.abs())
}

/// Two bits a weight: the inverse of `decode::two_bits`.
fn pack_two_bits(codes: &[u8; SUPER]) -> [u8; 64] {
    std::array::from_fn(|i| {
        let base = i / 32 * 128 + i % 32;
        (0..4).fold(0, |q, s| q | ((codes[base + 32 * s] & 3) << (2 * s)))
    })
}

/// Nibbles of a super-block, in chunks of 64 weights.
fn pack_super_nibbles(codes: &[u8; SUPER]) -> [u8; 128] {
    let mut qs = [0; 128];
    for (codes, qs) in codes.chunks_exact(64).zip(qs.chunks_exact_mut(32)) {
        pack_nibbles(codes, qs);
    }
    qs
}

impl Encode for layout::Q2_K {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let block = affine_super::<16, 16>(
            x,
            importance,
            &AffineFormat {
                levels: 3.0,
                steps: 15.0,
                plain: AffineSearch {
                    first: -0.5,
                    step: 0.1,
                    count: 15,
                    absolute: true,
                    free_min: false,
                },
                plain_weights: magnitudes,
                power: 1.0,
            },
        );
        Self {
            scales: std::array::from_fn(|j| block.scales[j] | (block.mins[j] << 4)),
            qs: pack_two_bits(&block.codes),
            d: block.d,
            dmin: block.dmin,
        }
    }
}

impl Encode for layout::Q4_K {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let block = affine_super::<8, 32>(
            x,
            importance,
            &AffineFormat {
                levels: 15.0,
                steps: 63.0,
                plain: AffineSearch {
                    first: -1.0,
                    step: 0.1,
                    count: 20,
                    absolute: false,
                    free_min: false,
                },
                plain_weights: rms_magnitudes,
                power: 2.0,
            },
        );
        Self {
            d: block.d,
            dmin: block.dmin,
            scales: pack_scales_k4(&block.scales, &block.mins),
            qs: pack_super_nibbles(&block.codes),
        }
    }
}

impl Encode for layout::Q5_K {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let block = affine_super::<8, 32>(
            x,
            importance,
            &AffineFormat {
                levels: 31.0,
                steps: 63.0,
                plain: AffineSearch {
                    first: -0.5,
                    step: 0.1,
                    count: 15,
                    absolute: false,
                    free_min: false,
                },
                plain_weights: rms_magnitudes,
                power: 2.0,
            },
        );
        let mut qh = [0; 32];
        for (i, codes) in block.codes.chunks_exact(32).enumerate() {
            for (h, c) in qh.iter_mut().zip(codes) {
                *h |= (c >> 4) << i;
            }
        }
        Self {
            d: block.d,
            dmin: block.dmin,
            scales: pack_scales_k4(&block.scales, &block.mins),
            qh,
            qs: pack_super_nibbles(&block.codes),
        }
    }
}

/// The codes, offset to start at 0, of 16 groups of 16 weights under given scales.
fn symmetric_codes(x: &[f32], scales: &[f32; 16], levels: f32) -> [u8; SUPER] {
    let mut codes = [levels as u8; SUPER];
    let groups = x.chunks_exact(16).zip(codes.chunks_exact_mut(16));
    for ((x, codes), &scale) in groups.zip(scales) {
        if scale == 0.0 {
            continue;
        }
        for (c, x) in codes.iter_mut().zip(x) {
            *c = (to_code(x / scale, -levels, levels - 1.0) + levels) as u8;
        }
    }
    codes
}

impl Encode for layout::Q3_K {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let (groups, _) = x.as_chunks::<16>();
        let power = 2.0 * search::power(x);
        let (mut fitted, mut totals) = ([0f32; 16], [0f32; 16]);
        for (g, x) in groups.iter().enumerate() {
            if let Some(i) = importance {
                let w = weigh(x, &i.columns[16 * g..], power, squares);
                (fitted[g], totals[g]) = (search::symmetric(x, &w, 4.0), w.iter().sum());
            } else {
                let peak = search::peak(x);
                if peak.abs() >= search::TINY {
                    let mut codes = x.map(|x| to_code(x * (-4.0 / peak), -4.0, 3.0));
                    fitted[g] = search::descend(x, &squares(x), &mut codes, -4.0, 3.0);
                }
            }
        }
        let d = to_f16(if importance.is_some() {
            search::symmetric(&fitted, &totals, 32.0)
        } else {
            search::peak(&fitted) / -32.0
        });
        let d_inverse = inverse(f16(d));
        let steps = fitted.map(|s| to_code(s * d_inverse, -32.0, 31.0));
        let codes = symmetric_codes(x, &steps.map(|s| f16(d) * s), 4.0);
        let mut hmask = [0; 32];
        for (i, codes) in codes.chunks_exact(32).enumerate() {
            for (h, c) in hmask.iter_mut().zip(codes) {
                *h |= (c >> 2) << i;
            }
        }
        Self {
            hmask,
            qs: pack_two_bits(&codes),
            scales: pack_scales_q3_k(&steps.map(|s| (s + 32.0) as u8)),
            d,
        }
    }
}

impl Encode for layout::Q6_K {
    fn encode(x: &[f32], importance: Option<Importance>) -> Self {
        let (groups, _) = x.as_chunks::<16>();
        let mut fitted = [0f32; 16];
        for (g, (x, fitted)) in groups.iter().zip(&mut fitted).enumerate() {
            let w = match importance.map(|i| *array(&i.columns[16 * g..])) {
                Some(w) if w.iter().any(|&w| w > 0.0) => w,
                _ => squares(x),
            };
            *fitted = search::symmetric(x, &w, 32.0);
        }
        let d = to_f16(search::peak(&fitted) / -128.0);
        let d_inverse = inverse(f16(d));
        let steps = fitted.map(|s| to_code(s * d_inverse, -128.0, 127.0));
        let codes = symmetric_codes(x, &steps.map(|s| f16(d) * s), 32.0);
        let (mut ql, mut qh) = ([0; 128], [0; 64]);
        let halves = ql.chunks_exact_mut(64).zip(qh.chunks_exact_mut(32));
        for ((ql, qh), codes) in halves.zip(codes.chunks_exact(128)) {
            pack_nibbles(codes, ql);
            for (s, codes) in codes.chunks_exact(32).enumerate() {
                for (h, c) in qh.iter_mut().zip(codes) {
                    *h |= (c >> 4) << (2 * s);
                }
            }
        }
        Self {
            ql,
            qh,
            scales: steps.map(|s| s as i8 as u8),
            d,
        }
    }
}

/// Quantises whole blocks. `row` is the length of a row, which is also that of `importance`;
/// `dst` has one block per `LEN` weights.
///
/// On failure returns the index of the block whose scales left the range of f16.
pub(super) fn quantize<B: Encode>(
    src: &[f32],
    row: usize,
    importance: Option<&[f32]>,
    dst: &mut [B],
) -> Result<(), usize> {
    let mut codes = [0i8; SUPER];
    let (mut scales, mut mins) = ([0f32; SUPER / 16], [0f32; SUPER / 16]);
    let (codes, groups) = (&mut codes[..B::LEN], B::LEN / B::GROUP);
    let blocks_per_row = row / B::LEN;
    let mut row_power = 0.0;
    for (i, (x, out)) in src.chunks_exact(B::LEN).zip(dst).enumerate() {
        let column = i % blocks_per_row * B::LEN;
        if importance.is_some() && column == 0 {
            let start = i * B::LEN;
            row_power = search::power(&src[start..start + row]);
        }
        let importance = importance.map(|all| Importance {
            columns: &all[column..column + B::LEN],
            row_power,
        });
        if x.iter().fold(false, |over, x| over | (x.abs() > B::LIMIT)) {
            return Err(i);
        }
        *out = B::encode(x, importance);
        out.decode(codes, &mut scales[..groups], &mut mins[..groups]);
        if !scales[..groups]
            .iter()
            .chain(&mins[..groups])
            .all(|s| s.is_finite())
        {
            return Err(i);
        }
    }
    Ok(())
}
