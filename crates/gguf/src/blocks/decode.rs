//! Blocks to codes, scales and minima: the definition of every quantised format.

use super::{
    grids,
    layout::{self, SUPER, f16, unpack_scales_iq4_xs, unpack_scales_k4, unpack_scales_q3_k},
};
use crate::types::GgmlType;

/// One quantised format: weight `i` is `scales[i / GROUP] * codes[i]`, plus
/// `mins[i / GROUP]` where `HAS_MIN`.
pub(super) trait Block: bytemuck::Pod {
    const TYPE: GgmlType;
    const LEN: usize = Self::TYPE.block_len();
    const GROUP: usize;
    const HAS_MIN: bool = false;

    /// Writes `LEN` codes, `LEN / GROUP` scales, and as many minima where `HAS_MIN`.
    fn decode(&self, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]);
}

/// Low nibbles to the first half of `out`, high nibbles to the second.
#[inline]
fn nibbles(qs: &[u8], out: &mut [i8], value: impl Fn(u8) -> i8) {
    let (low, high) = out.split_at_mut(qs.len());
    for ((&q, l), h) in qs.iter().zip(low).zip(high) {
        *l = value(q & 15);
        *h = value(q >> 4);
    }
}

/// Nibbles as [`nibbles`], with bit `j` of `qh` as the fifth bit of weight `j`.
#[inline]
fn five_bits(qs: &[u8; 16], qh: [u8; 4], out: &mut [i8], zero: i8) {
    let qh = u32::from_le_bytes(qh);
    for (j, &q) in qs.iter().enumerate() {
        out[j] = ((q & 15) | ((((qh >> j) & 1) as u8) << 4)) as i8 - zero;
        out[j + 16] = ((q >> 4) | ((((qh >> (j + 16)) & 1) as u8) << 4)) as i8 - zero;
    }
}

impl Block for layout::Q4_0 {
    const TYPE: GgmlType = GgmlType::Q4_0;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        scales[0] = f16(self.d);
        nibbles(&self.qs, codes, |q| q as i8 - 8);
    }
}

impl Block for layout::Q4_1 {
    const TYPE: GgmlType = GgmlType::Q4_1;
    const GROUP: usize = 32;
    const HAS_MIN: bool = true;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        scales[0] = f16(self.d);
        mins[0] = f16(self.m);
        nibbles(&self.qs, codes, |q| q as i8);
    }
}

impl Block for layout::Q5_0 {
    const TYPE: GgmlType = GgmlType::Q5_0;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        scales[0] = f16(self.d);
        five_bits(&self.qs, self.qh, codes, 16);
    }
}

impl Block for layout::Q5_1 {
    const TYPE: GgmlType = GgmlType::Q5_1;
    const GROUP: usize = 32;
    const HAS_MIN: bool = true;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        scales[0] = f16(self.d);
        mins[0] = f16(self.m);
        five_bits(&self.qs, self.qh, codes, 0);
    }
}

impl Block for layout::Q8_0 {
    const TYPE: GgmlType = GgmlType::Q8_0;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        scales[0] = f16(self.d);
        codes.copy_from_slice(bytemuck::cast_slice(&self.qs));
    }
}

/// Half of the power of two that the E8M0 exponent `e` names: 2^(e − 128).
///
/// The half is because [`grids::MXFP4`] holds doubled values. The two smallest are f32
/// subnormals, and 255 (the standard's NaN) is 2^127 as in ggml.
#[inline]
pub(super) fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 {
        0x0020_0000 << e
    } else {
        (u32::from(e) - 1) << 23
    })
}

impl Block for layout::MXFP4 {
    const TYPE: GgmlType = GgmlType::MXFP4;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        scales[0] = e8m0_half(self.e);
        nibbles(&self.qs, codes, |q| grids::MXFP4[usize::from(q)]);
    }
}

/// Half of the value of an unsigned E4M3 scale, since [`grids::MXFP4`] holds doubled values.
///
/// 127, which would be a NaN, is zero, and the eighth bit is ignored, as in ggml.
#[inline]
pub(super) fn ue4m3_half(x: u8) -> f32 {
    if x == 0x7f {
        return 0.0;
    }
    let (exponent, mantissa) = (u32::from(x >> 3 & 15), x & 7);
    let power = |e: u32| f32::from_bits((e + 127 - 11) << 23);
    match exponent {
        0 => f32::from(mantissa) * power(1),
        e => f32::from(8 + mantissa) * power(e),
    }
}

impl Block for layout::NVFP4 {
    const TYPE: GgmlType = GgmlType::NVFP4;
    const GROUP: usize = 16;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        for (scale, &d) in scales.iter_mut().zip(&self.d) {
            *scale = ue4m3_half(d);
        }
        for (codes, qs) in codes.chunks_exact_mut(16).zip(self.qs.chunks_exact(8)) {
            nibbles(qs, codes, |q| grids::MXFP4[usize::from(q)]);
        }
    }
}

impl Block for layout::IQ4_NL {
    const TYPE: GgmlType = GgmlType::IQ4_NL;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        scales[0] = f16(self.d);
        nibbles(&self.qs, codes, |q| grids::IQ4[usize::from(q)]);
    }
}

/// Two bits a weight: weight `128h + 32s + j` in bits `2s` of `qs[32h + j]`.
#[inline]
fn two_bits(qs: &[u8; 64], codes: &mut [i8]) {
    for (out, qs) in codes.chunks_exact_mut(128).zip(qs.chunks_exact(32)) {
        for (s, out) in out.chunks_exact_mut(32).enumerate() {
            for (o, &q) in out.iter_mut().zip(qs) {
                *o = ((q >> (2 * s)) & 3) as i8;
            }
        }
    }
}

impl Block for layout::Q2_K {
    const TYPE: GgmlType = GgmlType::Q2_K;
    const GROUP: usize = 16;
    const HAS_MIN: bool = true;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        let (d, dmin) = (f16(self.d), f16(self.dmin));
        for ((&s, scale), min) in self.scales.iter().zip(scales).zip(mins) {
            *scale = d * f32::from(s & 15);
            *min = -(dmin * f32::from(s >> 4));
        }
        two_bits(&self.qs, codes);
    }
}

impl Block for layout::Q3_K {
    const TYPE: GgmlType = GgmlType::Q3_K;
    const GROUP: usize = 16;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        for (scale, s) in scales.iter_mut().zip(unpack_scales_q3_k(&self.scales)) {
            *scale = d * (f32::from(s) - 32.0);
        }
        two_bits(&self.qs, codes);
        for (i, out) in codes.chunks_exact_mut(32).enumerate() {
            for (o, &h) in out.iter_mut().zip(&self.hmask) {
                // The mask bit says that 4 is *not* subtracted.
                *o -= (((h >> i) & 1) ^ 1) as i8 * 4;
            }
        }
    }
}

#[inline]
fn k4_scales(d: [u8; 2], dmin: [u8; 2], packed: &[u8; 12], scales: &mut [f32], mins: &mut [f32]) {
    let (d, dmin) = (f16(d), f16(dmin));
    let (s, m) = unpack_scales_k4(packed);
    for j in 0..8 {
        scales[j] = d * f32::from(s[j]);
        mins[j] = -(dmin * f32::from(m[j]));
    }
}

impl Block for layout::Q4_K {
    const TYPE: GgmlType = GgmlType::Q4_K;
    const GROUP: usize = 32;
    const HAS_MIN: bool = true;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        k4_scales(self.d, self.dmin, &self.scales, scales, mins);
        for (qs, out) in self.qs.chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
            nibbles(qs, out, |q| q as i8);
        }
    }
}

impl Block for layout::Q5_K {
    const TYPE: GgmlType = GgmlType::Q5_K;
    const GROUP: usize = 32;
    const HAS_MIN: bool = true;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        k4_scales(self.d, self.dmin, &self.scales, scales, mins);
        for (qs, out) in self.qs.chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
            nibbles(qs, out, |q| q as i8);
        }
        for (i, out) in codes.chunks_exact_mut(32).enumerate() {
            for (o, &h) in out.iter_mut().zip(&self.qh) {
                *o |= (((h >> i) & 1) << 4) as i8;
            }
        }
    }
}

impl Block for layout::Q6_K {
    const TYPE: GgmlType = GgmlType::Q6_K;
    const GROUP: usize = 16;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        for (scale, &s) in scales.iter_mut().zip(&self.scales) {
            *scale = d * f32::from(s as i8);
        }
        let halves = self.ql.chunks_exact(64).zip(self.qh.chunks_exact(32));
        for ((ql, qh), out) in halves.zip(codes.chunks_exact_mut(128)) {
            nibbles(ql, out, |q| q as i8);
            for (s, out) in out.chunks_exact_mut(32).enumerate() {
                for (o, &h) in out.iter_mut().zip(qh) {
                    *o = (*o | (((h >> (2 * s)) & 3) << 4) as i8) - 32;
                }
            }
        }
    }
}

impl Block for layout::IQ4_XS {
    const TYPE: GgmlType = GgmlType::IQ4_XS;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        let packed = unpack_scales_iq4_xs(&self.scales_l, self.scales_h);
        for (scale, s) in scales.iter_mut().zip(packed) {
            *scale = d * (f32::from(s) - 32.0);
        }
        for (qs, out) in self.qs.chunks_exact(16).zip(codes.chunks_exact_mut(32)) {
            nibbles(qs, out, |q| grids::IQ4[usize::from(q)]);
        }
    }
}

/// The magnitudes of one grid row, negated where a bit of `signs` is set.
#[inline]
fn signed(out: &mut [i8], grid: &[i8], signs: u8) {
    for (i, (o, &g)) in out.iter_mut().zip(grid).enumerate() {
        // Two's complement by mask: `(g ^ -1) + 1` where the sign bit is set.
        let mask = -(((signs >> i) & 1) as i8);
        *o = (g ^ mask) - mask;
    }
}

#[inline]
fn nibble(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 2] >> (4 * (i % 2))) & 15
}

impl Block for layout::IQ2_XXS {
    const TYPE: GgmlType = GgmlType::IQ2_XXS;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        let (groups, _) = self.qs.as_chunks::<8>();
        for ((&[i0, i1, i2, i3, a0, a1, a2, a3], scale), out) in
            groups.iter().zip(scales).zip(codes.chunks_exact_mut(32))
        {
            let aux = u32::from_le_bytes([a0, a1, a2, a3]);
            *scale = d * (0.5 + (aux >> 28) as f32) * 0.25;
            for (l, index) in [i0, i1, i2, i3].into_iter().enumerate() {
                let sign = grids::SIGNS[(aux >> (7 * l)) as usize & 127];
                signed(
                    &mut out[8 * l..8 * l + 8],
                    &grids::IQ2_XXS[usize::from(index)],
                    sign,
                );
            }
        }
    }
}

impl Block for layout::IQ2_XS {
    const TYPE: GgmlType = GgmlType::IQ2_XS;
    const GROUP: usize = 16;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        for (g, scale) in scales.iter_mut().enumerate() {
            *scale = d * (0.5 + f32::from(nibble(&self.scales, g))) * 0.25;
        }
        let (qs, _) = self.qs.as_chunks::<2>();
        for (&q, out) in qs.iter().zip(codes.chunks_exact_mut(8)) {
            let q = usize::from(u16::from_le_bytes(q));
            signed(out, &grids::IQ2_XS[q & 511], grids::SIGNS[q >> 9]);
        }
    }
}

impl Block for layout::IQ2_S {
    const TYPE: GgmlType = GgmlType::IQ2_S;
    const GROUP: usize = 16;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        for (g, scale) in scales.iter_mut().enumerate() {
            *scale = d * (0.5 + f32::from(nibble(&self.scales, g))) * 0.25;
        }
        for (l, out) in codes.chunks_exact_mut(8).enumerate() {
            let high = usize::from((self.qh[l / 4] >> (2 * (l % 4))) & 3);
            let index = usize::from(self.qs[l]) | (high << 8);
            signed(out, &grids::IQ2_S[index], self.signs[l]);
        }
    }
}

impl Block for layout::IQ3_XXS {
    const TYPE: GgmlType = GgmlType::IQ3_XXS;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        let (aux, _) = self.signs.as_chunks::<4>();
        for (((&aux, qs), scale), out) in aux
            .iter()
            .zip(self.qs.chunks_exact(8))
            .zip(scales)
            .zip(codes.chunks_exact_mut(32))
        {
            let aux = u32::from_le_bytes(aux);
            *scale = d * (0.5 + (aux >> 28) as f32) * 0.5;
            for (l, (index, out)) in qs.iter().zip(out.chunks_exact_mut(4)).enumerate() {
                let sign = grids::SIGNS[(aux >> (7 * (l / 2))) as usize & 127];
                signed(
                    out,
                    &grids::IQ3_XXS[usize::from(*index)],
                    sign >> (4 * (l % 2)),
                );
            }
        }
    }
}

impl Block for layout::IQ3_S {
    const TYPE: GgmlType = GgmlType::IQ3_S;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        for (g, scale) in scales.iter_mut().enumerate() {
            *scale = d * f32::from(1 + 2 * nibble(&self.scales, g));
        }
        for (l, out) in codes.chunks_exact_mut(4).enumerate() {
            let high = usize::from((self.qh[l / 8] >> (l % 8)) & 1);
            let index = usize::from(self.qs[l]) | (high << 8);
            signed(
                out,
                &grids::IQ3_S[index],
                self.signs[l / 2] >> (4 * (l % 2)),
            );
        }
    }
}

/// Eight times a grid row, shifted down or up by one: `8·(grid ∓ 1/8)`.
#[inline]
fn shifted(out: &mut [i8], index: usize, down: bool) {
    let shift = if down { -1 } else { 1 };
    for (o, &g) in out.iter_mut().zip(&grids::IQ1[index]) {
        *o = 8 * g + shift;
    }
}

impl Block for layout::IQ1_S {
    const TYPE: GgmlType = GgmlType::IQ1_S;
    const GROUP: usize = 32;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let d = f16(self.d);
        let (qh, _) = self.qh.as_chunks::<2>();
        for (((&qh, qs), scale), out) in qh
            .iter()
            .zip(self.qs.chunks_exact(4))
            .zip(scales)
            .zip(codes.chunks_exact_mut(32))
        {
            let qh = u16::from_le_bytes(qh);
            *scale = d * f32::from(2 * ((qh >> 12) & 7) + 1) * 0.125;
            for (l, (&low, out)) in qs.iter().zip(out.chunks_exact_mut(8)).enumerate() {
                let index = usize::from(low) | (usize::from((qh >> (3 * l)) & 7) << 8);
                shifted(out, index, qh & 0x8000 != 0);
            }
        }
    }
}

impl Block for layout::IQ1_M {
    const TYPE: GgmlType = GgmlType::IQ1_M;
    const GROUP: usize = 16;

    fn decode(&self, codes: &mut [i8], scales: &mut [f32], _: &mut [f32]) {
        let packed: [u16; 4] = std::array::from_fn(|i| {
            u16::from_le_bytes([self.scales[2 * i], self.scales[2 * i + 1]])
        });
        let d = packed
            .iter()
            .enumerate()
            .fold(0, |d, (i, p)| d | ((p >> 12) << (4 * i)));
        let d = f16(d.to_le_bytes());
        for (g, scale) in scales.iter_mut().enumerate() {
            let s = (packed[g / 4] >> (3 * (g % 4))) & 7;
            *scale = d * f32::from(2 * s + 1) * 0.125;
        }
        for (l, out) in codes.chunks_exact_mut(8).enumerate() {
            let high = nibble(&self.qh, l);
            let index = usize::from(self.qs[l]) | (usize::from(high & 7) << 8);
            shifted(out, index, high & 8 != 0);
        }
    }
}

/// Dequantises whole blocks; `dst` has `LEN` elements per block.
pub(super) fn dequantize<B: Block>(src: &[B], dst: &mut [f32]) {
    let mut codes = [0i8; SUPER];
    let (mut scales, mut mins) = ([0f32; SUPER / 16], [0f32; SUPER / 16]);
    let codes = &mut codes[..B::LEN];
    for (block, out) in src.iter().zip(dst.chunks_exact_mut(B::LEN)) {
        block.decode(
            codes,
            &mut scales[..B::LEN / B::GROUP],
            &mut mins[..B::LEN / B::GROUP],
        );
        let groups = out
            .chunks_exact_mut(B::GROUP)
            .zip(codes.chunks_exact(B::GROUP));
        for ((out, codes), (&scale, &min)) in groups.zip(scales.iter().zip(&mins)) {
            for (o, &c) in out.iter_mut().zip(codes) {
                let w = scale * f32::from(c);
                *o = if B::HAS_MIN { w + min } else { w };
            }
        }
    }
}

/// Codes, scales and minima of whole blocks. `mins` is left alone unless `HAS_MIN`.
pub(super) fn codes<B: Block>(src: &[B], codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
    let groups = B::LEN / B::GROUP;
    let outs = codes
        .chunks_exact_mut(B::LEN)
        .zip(scales.chunks_exact_mut(groups));
    for (i, (block, (codes, scales))) in src.iter().zip(outs).enumerate() {
        let mins = if B::HAS_MIN {
            &mut mins[i * groups..(i + 1) * groups]
        } else {
            &mut []
        };
        block.decode(codes, scales, mins);
    }
}
