//! Writing keys and values to pages.

use super::{KV_PAGE, KvShape, KvType};
use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};
use std::arch::x86_64::*;

/// Values that are converted at a time.
const CONVERTED: usize = 32;

/// One layer of the cache, open for writing.
pub(crate) struct LayerMut<'a> {
    pub(super) bytes: &'a mut [u8],
    pub(super) shape: KvShape,
}

impl LayerMut<'_> {
    pub(crate) fn writer(&mut self) -> LayerWriter<'_> {
        LayerWriter {
            bytes: crate::disjoint::DisjointMut::new(self.bytes),
            shape: self.shape,
        }
    }
}

/// Writes heads of a layer from several threads.
pub(crate) struct LayerWriter<'a> {
    bytes: crate::disjoint::DisjointMut<'a, u8>,
    shape: KvShape,
}

/// Neighbouring positions that are written together: their keys are then words of one vector.
pub(crate) const TOGETHER: usize = 8;

impl LayerWriter<'_> {
    /// K and V of one head in a page.
    ///
    /// # Safety
    /// No other thread uses this head at the same time.
    // As `DisjointMut::slice`.
    #[allow(clippy::mut_from_ref)]
    unsafe fn head(&self, page: u32, head: usize) -> (&mut [u8], &mut [u8]) {
        let at = page as usize * self.shape.layer_page_bytes() + head * self.shape.head_bytes();
        // SAFETY: heads are disjoint parts; the caller keeps other threads from this one.
        let bytes = unsafe { self.bytes.slice(at..at + self.shape.head_bytes()) };
        bytes.split_at_mut(self.shape.k.page_bytes(self.shape.dim))
    }

    /// Writes K and V, `[dim]` each, of one head at [`TOGETHER`] positions from `slot` on.
    ///
    /// # Safety
    /// No other thread writes this head at the same time.
    pub(crate) unsafe fn put_together(
        &self,
        page: u32,
        slot: usize,
        head: usize,
        k: [&[f32]; TOGETHER],
        v: [&[f32]; TOGETHER],
    ) {
        let dim = self.shape.dim;
        // SAFETY: the caller's.
        let (kb, vb) = unsafe { self.head(page, head) };
        match self.shape.k {
            KvType::F16 => put_keys_together(kb, k, dim, slot),
            ty => k
                .into_iter()
                .enumerate()
                .for_each(|(i, k)| put_key(ty, kb, k, slot + i)),
        }
        for (i, v) in v.into_iter().enumerate() {
            put_value(self.shape.v, vb, v, slot + i);
        }
    }

    /// Writes K and V, `[dim]` each, of one head at one position.
    ///
    /// # Safety
    /// No other thread writes this head at the same time.
    pub(crate) unsafe fn put(&self, page: u32, slot: usize, head: usize, k: &[f32], v: &[f32]) {
        // SAFETY: the caller's.
        let (kb, vb) = unsafe { self.head(page, head) };
        put_key(self.shape.k, kb, k, slot);
        put_value(self.shape.v, vb, v, slot);
    }
}

fn put_key(ty: KvType, page: &mut [u8], k: &[f32], slot: usize) {
    let columns = Place {
        stride: KV_PAGE,
        at: slot,
    };
    match ty {
        KvType::F16 => put_halves(page, k, |d| d * KV_PAGE + slot, f16_bits),
        KvType::BF16 => {
            put_halves(page, k, |d| (d / 2 * KV_PAGE + slot) * 2 + d % 2, bf16_bits);
        }
        KvType::Q8_0 => put_q8(page, k, columns, columns),
    }
}

fn put_value(ty: KvType, page: &mut [u8], v: &[f32], slot: usize) {
    let dim = v.len();
    let row = |dim| Place {
        stride: 1,
        at: slot * dim,
    };
    match ty {
        KvType::F16 => put_row(page, v, slot * dim),
        KvType::BF16 => {
            put_halves(page, v, |d| (slot / 2 * dim + d) * 2 + slot % 2, bf16_bits);
        }
        KvType::Q8_0 => put_q8(page, v, row(dim), row(dim / 32)),
    }
}

/// F16 keys of neighbouring positions from `slot` on.
fn put_keys_together(page: &mut [u8], k: [&[f32]; TOGETHER], dim: usize, slot: usize) {
    for first in (0..dim).step_by(CONVERTED) {
        let count = CONVERTED.min(dim - first);
        let mut bits = [[0u16; CONVERTED]; TOGETHER];
        for (bits, k) in bits.iter_mut().zip(k) {
            f16_bits(&k[first..first + count], &mut bits[..count]);
        }
        let whole = count / 8 * 8;
        for d in (0..whole).step_by(8) {
            let words = transpose(bits.each_ref().map(|row| &row[d..d + 8]));
            for (i, words) in words.into_iter().enumerate() {
                let at = 2 * ((first + d + i) * KV_PAGE + slot);
                page[at..at + 16].copy_from_slice(&words);
            }
        }
        for (i, row) in bits.iter().enumerate() {
            put_words(page, &row[whole..count], |d| {
                (first + whole + d) * KV_PAGE + slot + i
            });
        }
    }
}

/// Where the i-th element goes: `at + i * stride`.
#[derive(Clone, Copy)]
struct Place {
    stride: usize,
    at: usize,
}

fn f16_bits(x: &[f32], bits: &mut [u16]) {
    let halves: &mut [f16] = bits.reinterpret_cast_mut();
    halves.convert_from_f32_slice(x);
}

fn bf16_bits(x: &[f32], bits: &mut [u16]) {
    bits.iter_mut()
        .zip(x)
        .for_each(|(b, &x)| *b = bf16::from_f32(x).to_bits());
}

fn put_halves(
    bytes: &mut [u8],
    x: &[f32],
    place: impl Fn(usize) -> usize,
    convert: fn(&[f32], &mut [u16]),
) {
    for (c, chunk) in x.chunks(CONVERTED).enumerate() {
        let mut bits = [0u16; CONVERTED];
        convert(chunk, &mut bits[..chunk.len()]);
        put_words(bytes, &bits[..chunk.len()], |i| place(c * CONVERTED + i));
    }
}

fn put_words(bytes: &mut [u8], words: &[u16], place: impl Fn(usize) -> usize) {
    for (i, word) in words.iter().enumerate() {
        let at = 2 * place(i);
        bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
}

/// Writes `x` as f16 from element `at` on.
fn put_row(bytes: &mut [u8], x: &[f32], at: usize) {
    let out = bytes[2 * at..2 * (at + x.len())].chunks_mut(2 * CONVERTED);
    for (x, out) in x.chunks(CONVERTED).zip(out) {
        let mut bits = [0u16; CONVERTED];
        f16_bits(x, &mut bits[..x.len()]);
        let words = out.as_chunks_mut::<2>().0.iter_mut().zip(bits);
        words.for_each(|(out, word)| *out = word.to_le_bytes());
    }
}

/// Eight rows of eight words become columns.
fn transpose(rows: [&[u16]; 8]) -> [[u8; 16]; 8] {
    // SAFETY: SSE2 is part of x86-64; each row is a whole vector.
    unsafe {
        let r = rows.map(|row| {
            assert_eq!(row.len(), 8);
            _mm_loadu_si128(row.as_ptr().cast())
        });
        // Words of neighbouring rows side by side, then dwords, then quadwords.
        let pairs = |i: usize| {
            let (a, b) = (r[2 * i], r[2 * i + 1]);
            [_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)]
        };
        let fours = |a: [__m128i; 2], b: [__m128i; 2]| {
            let two = |a, b| [_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)];
            let ([a0, a1], [b0, b1]) = (a, b);
            let ([w, x], [y, z]) = (two(a0, b0), two(a1, b1));
            [w, x, y, z]
        };
        let (low, high) = (fours(pairs(0), pairs(1)), fours(pairs(2), pairs(3)));
        let mut out = [[0; 16]; 8];
        for (i, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let even = _mm_unpacklo_epi64(low[i], high[i]);
            let odd = _mm_unpackhi_epi64(low[i], high[i]);
            _mm_storeu_si128(out[0].as_mut_ptr().cast(), even);
            _mm_storeu_si128(out[1].as_mut_ptr().cast(), odd);
        }
        out
    }
}

/// Q8_0's rule with an f32 scale: `d = amax / 127`, codes round to nearest even.
fn put_q8(bytes: &mut [u8], x: &[f32], codes: Place, scales: Place) {
    let (code_bytes, scale_bytes) = bytes.split_at_mut(x.len() * KV_PAGE);
    for (g, group) in x.chunks_exact(32).enumerate() {
        let amax = group.iter().fold(0f32, |m, x| m.max(x.abs()));
        let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
        for (i, x) in group.iter().enumerate() {
            let code = (x * inverse).round_ties_even() as i8;
            code_bytes[codes.at + (g * 32 + i) * codes.stride] = code as u8;
        }
        let at = 4 * (scales.at + g * scales.stride);
        scale_bytes[at..at + 4].copy_from_slice(&(amax / 127.0).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_rows_become_columns() {
        let rows: [[u16; 8]; 8] =
            std::array::from_fn(|r| std::array::from_fn(|c| (r * 1000 + c * 7) as u16));
        let columns = transpose(rows.each_ref().map(|row| &row[..]));
        for (c, column) in columns.iter().enumerate() {
            for (r, word) in column.as_chunks::<2>().0.iter().enumerate() {
                assert_eq!(u16::from_le_bytes(*word), rows[r][c]);
            }
        }
    }

    #[test]
    fn positions_together_are_positions_one_by_one() {
        for (ty, v_type) in KvType::ALL
            .into_iter()
            .flat_map(|k| KvType::ALL.map(|v| (k, v)))
        {
            for dim in [32, 96, 128] {
                let shape = KvShape {
                    layers: 1,
                    heads: 2,
                    dim,
                    k: ty,
                    v: v_type,
                };
                let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 0.13;
                let rows: Vec<f32> = (0..2 * TOGETHER * dim).map(value).collect();
                let (k, v) = rows.split_at(TOGETHER * dim);
                let [k, v] = [k, v].map(|x| Vec::from_iter(x.chunks_exact(dim)));
                let write = |together: bool| {
                    let mut bytes = vec![0xa5; 2 * shape.layer_page_bytes()];
                    let mut layer = LayerMut {
                        bytes: &mut bytes,
                        shape,
                    };
                    let writer = layer.writer();
                    for (slot, head) in [(0, 0), (13, 1), (56, 0)] {
                        // SAFETY: nobody else writes.
                        unsafe {
                            if together {
                                let k = std::array::from_fn(|i| k[i]);
                                let v = std::array::from_fn(|i| v[i]);
                                writer.put_together(1, slot, head, k, v);
                                continue;
                            }
                            for i in 0..TOGETHER {
                                writer.put(1, slot + i, head, k[i], v[i]);
                            }
                        }
                    }
                    bytes
                };
                assert!(write(true) == write(false), "{ty:?} {v_type:?} {dim}");
            }
        }
    }
}
