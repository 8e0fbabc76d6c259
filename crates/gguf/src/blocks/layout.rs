//! The blocks as they lie in a file, field for field.
//!
//! Every field is bytes, so the structs have no alignment, no padding, and any bytes are a
//! valid value: slices of a mapped file cast to them with `bytemuck`.

use bytemuck::{Pod, Zeroable};

/// Weights of a super-block: the K-quants and all IQ formats but IQ4_NL.
pub const SUPER: usize = 256;

macro_rules! blocks {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $len:tt,)* })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $field: blocks!(@ty $len),)* }
    )* };
    (@ty 1) => { u8 };
    (@ty $len:literal) => { [u8; $len] };
}

blocks! {
    /// 32 weights `d·(q − 8)`; `qs[j]` holds weight `j` low and `j + 16` high.
    Q4_0 { d: 2, qs: 16, }
    /// 32 weights `d·q + m`; nibbles as in [`Q4_0`].
    Q4_1 { d: 2, m: 2, qs: 16, }
    /// 32 weights `d·(q − 16)`; bit `j` of `qh` is the fifth bit of weight `j`.
    Q5_0 { d: 2, qh: 4, qs: 16, }
    /// 32 weights `d·q + m`; bits as in [`Q5_0`].
    Q5_1 { d: 2, m: 2, qh: 4, qs: 16, }
    /// 32 weights `d·q`, `q` signed bytes.
    Q8_0 { d: 2, qs: 32, }
    /// 32 weights: E2M1 nibbles under one power-of-two scale `e`.
    MXFP4 { e: 1, qs: 16, }
    /// 64 weights: E2M1 nibbles, of each 16 the first eight low, under four scales of eight bits
    /// (four of exponent, three of mantissa, no sign).
    NVFP4 { d: 4, qs: 32, }
    /// 32 weights `d·IQ4[q]`; nibbles as in [`Q4_0`].
    IQ4_NL { d: 2, qs: 16, }

    /// 256 weights of 2 bits; per 16 weights a byte of scale (low) and minimum (high nibble).
    Q2_K { scales: 16, qs: 64, d: 2, dmin: 2, }
    /// 256 weights of 3 bits (`hmask` holds the third, inverted); 16 scales of 6 bits.
    Q3_K { hmask: 32, qs: 64, scales: 12, d: 2, }
    /// 256 weights of 4 bits; 8 scales and 8 minima of 6 bits.
    Q4_K { d: 2, dmin: 2, scales: 12, qs: 128, }
    /// 256 weights of 5 bits; scales as in [`Q4_K`].
    Q5_K { d: 2, dmin: 2, scales: 12, qh: 32, qs: 128, }
    /// 256 weights of 6 bits; 16 scales of 8 signed bits.
    Q6_K { ql: 128, qh: 64, scales: 16, d: 2, }
    /// 256 weights of 4 bits over the IQ4 values; 8 scales of 6 bits.
    IQ4_XS { d: 2, scales_h: 2, scales_l: 4, qs: 128, }

    /// 256 weights; per 32 four grid indices (bytes), then four 7-bit signs and a scale.
    IQ2_XXS { d: 2, qs: 64, }
    /// 256 weights; 32 × `u16` of a 9-bit grid index and a 7-bit sign; 16 scale nibbles.
    IQ2_XS { d: 2, qs: 64, scales: 8, }
    /// 256 weights; 10-bit grid indices, a sign byte per 8 weights, 16 scale nibbles.
    IQ2_S { d: 2, qs: 32, signs: 32, qh: 8, scales: 8, }
    /// 256 weights; 64 grid indices, then per 32 weights four 7-bit signs and a scale.
    IQ3_XXS { d: 2, qs: 64, signs: 32, }
    /// 256 weights; 9-bit grid indices, a sign byte per 8 weights, 8 scale nibbles.
    IQ3_S { d: 2, qs: 64, qh: 8, signs: 32, scales: 4, }
    /// 256 weights; 11-bit grid indices; `qh` also holds a scale and a shift per 32 weights.
    IQ1_S { d: 2, qs: 32, qh: 16, }
    /// 256 weights; 11-bit grid indices, a shift per 8 and a scale per 16 weights. `scales`
    /// holds the f16 super-scale in its four high nibbles.
    IQ1_M { qs: 32, qh: 16, scales: 8, }
}

/// The f32 of a little-endian f16.
#[inline]
pub(super) fn f16(bytes: [u8; 2]) -> f32 {
    half::f16::from_le_bytes(bytes).to_f32()
}

/// The 8 scales and 8 minima (6 bits each) packed in the 12 bytes of Q4_K and Q5_K.
#[inline]
pub fn unpack_scales_k4(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for j in 0..4 {
        let (a, b, c) = (packed[j], packed[4 + j], packed[8 + j]);
        scales[j] = a & 63;
        mins[j] = b & 63;
        scales[4 + j] = (c & 15) | ((a >> 6) << 4);
        mins[4 + j] = (c >> 4) | ((b >> 6) << 4);
    }
    (scales, mins)
}

/// Inverse of [`unpack_scales_k4`]; bits above the sixth are dropped.
#[inline]
pub fn pack_scales_k4(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = (scales[j] & 63) | ((scales[4 + j] >> 4) << 6);
        packed[4 + j] = (mins[j] & 63) | ((mins[4 + j] >> 4) << 6);
        packed[8 + j] = (scales[4 + j] & 15) | (mins[4 + j] << 4);
    }
    packed
}

/// The 16 scales of Q3_K, 6 bits each, still with their offset of 32.
#[inline]
pub fn unpack_scales_q3_k(packed: &[u8; 12]) -> [u8; 16] {
    std::array::from_fn(|j| {
        let low = (packed[j % 8] >> (4 * (j / 8))) & 15;
        let high = (packed[8 + j % 4] >> (2 * (j / 4))) & 3;
        low | (high << 4)
    })
}

/// Inverse of [`unpack_scales_q3_k`]; bits above the sixth are dropped.
#[inline]
pub fn pack_scales_q3_k(scales: &[u8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (j, &s) in scales.iter().enumerate() {
        packed[j % 8] |= (s & 15) << (4 * (j / 8));
        packed[8 + j % 4] |= ((s >> 4) & 3) << (2 * (j / 4));
    }
    packed
}

/// The 8 scales of IQ4_XS, 6 bits each, still with their offset of 32.
#[inline]
pub fn unpack_scales_iq4_xs(low: &[u8; 4], high: [u8; 2]) -> [u8; 8] {
    let high = u16::from_le_bytes(high);
    std::array::from_fn(|j| {
        ((low[j / 2] >> (4 * (j % 2))) & 15) | ((((high >> (2 * j)) & 3) as u8) << 4)
    })
}

/// Inverse of [`unpack_scales_iq4_xs`]; bits above the sixth are dropped.
#[inline]
pub fn pack_scales_iq4_xs(scales: &[u8; 8]) -> ([u8; 4], [u8; 2]) {
    let (mut low, mut high) = ([0; 4], 0u16);
    for (j, &s) in scales.iter().enumerate() {
        low[j / 2] |= (s & 15) << (4 * (j % 2));
        high |= u16::from((s >> 4) & 3) << (2 * j);
    }
    (low, high.to_le_bytes())
}
