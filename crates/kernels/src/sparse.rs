//! Sparse strips: 16 rows without their zeros, as [`tegula_gguf::sparse`] defines them.
//!
//! A product with sparse weights is, bit for bit, the product with the dense rows that they
//! were packed from: codes, scales and the order of sums are the same. Kernels that know the
//! format put the zeros back in registers (few tokens) or on the way to a panel (many). Where
//! a tier has none, [`expand`] writes the whole dense strip and the dense kernel follows.
//!
//! Kernels find a strip's end by its bitmaps; [`crate::Weights::sparse`] has checked them.

use tegula_gguf::{
    GgmlType,
    sparse::{BITMAP, GROUP, head_bytes, supers},
};

use crate::strip::{self, ROWS};

/// Bytes behind a strip that kernels may read.
pub const SLACK: usize = tegula_gguf::sparse::ALIGN;

/// A super-block of a strip.
#[derive(Clone, Copy)]
pub(crate) struct Super {
    /// Index of its first group in the row.
    pub first: usize,
    pub groups: usize,
    /// Heads of the groups.
    pub heads: *const u8,
    /// Where the values begin.
    pub values: *const u8,
}

impl Super {
    /// The super-block at `at`.
    #[inline(always)]
    pub fn new(ty: GgmlType, at: *const u8, (first, groups): (usize, usize)) -> Super {
        Super {
            first,
            groups,
            heads: at,
            values: at.wrapping_add(groups * head_bytes(ty)),
        }
    }

    /// Groups whose values of `S4` are in the low nibbles.
    #[inline(always)]
    pub fn low(&self) -> usize {
        self.groups.div_ceil(2)
    }
}

/// Writes the dense strip of a sparse one: what [`strip::pack_strip`] makes of the dense rows.
///
/// # Safety
/// `src` is a checked sparse strip of `ty` and `k`; `out` has the bytes of a strip of
/// `ty.dense()` and `k`.
pub(crate) unsafe fn expand(ty: GgmlType, k: usize, src: *const u8, out: *mut u8) {
    let layout = strip::layout(ty.dense()).expect("a type that products take");
    let bytes = layout.strip_bytes(k);
    let mut at = src;
    for of in supers(k) {
        let block = Super::new(ty, at, of);
        let mut cursor = block.values;
        let mut furthest = cursor;
        for g in 0..block.groups {
            if ty == GgmlType::S4 && g == block.low() {
                cursor = block.values;
            }
            // SAFETY: the caller's: heads, values and the group's dense bytes are inside.
            unsafe {
                let head = block.heads.add(g * head_bytes(ty));
                let kb = block.first + g;
                cursor = match ty {
                    GgmlType::S_BF16 => {
                        let dst = out.add(kb * GROUP * ROWS * 2).cast::<u16>();
                        let words = (GROUP * ROWS).min((bytes - kb * GROUP * ROWS * 2) / 2);
                        std::slice::from_raw_parts_mut(dst, words).fill(0);
                        scatter(head, cursor, 2, |bit, p| {
                            *dst.add(bit) = p.cast::<u16>().read_unaligned();
                        })
                    }
                    GgmlType::S8 => {
                        let dst = out.add(kb * 34 * ROWS);
                        std::slice::from_raw_parts_mut(dst, GROUP * ROWS).fill(0x80);
                        dst.add(GROUP * ROWS)
                            .copy_from_nonoverlapping(head, 2 * ROWS);
                        let bitmap = head.add(2 * ROWS);
                        scatter(bitmap, cursor, 1, |bit, p| *dst.add(bit) = *p)
                    }
                    _ => {
                        let dst = out.add(kb * 18 * ROWS);
                        dst.add(GROUP / 2 * ROWS)
                            .copy_from_nonoverlapping(head, 2 * ROWS);
                        let mut codes = [8u8; GROUP * ROWS];
                        let shift = if g < block.low() { 0 } else { 4 };
                        let bitmap = head.add(2 * ROWS);
                        let end = scatter(bitmap, cursor, 1, |bit, p| {
                            codes[bit] = *p >> shift & 15;
                        });
                        // Weights 16 apart share a byte.
                        let (low, high) = codes.split_at(GROUP / 2 * ROWS);
                        for (i, (l, h)) in low.iter().zip(high).enumerate() {
                            *dst.add(i) = l | h << 4;
                        }
                        end
                    }
                };
            }
            furthest = furthest.max(cursor);
        }
        at = furthest;
    }
}

/// Calls `put(bit, place of its value)` for every set bit of the bitmap; values are `width`
/// bytes each from `cursor` on. Returns where they end.
///
/// # Safety
/// The bitmap is 64 bytes and as many values follow as it has bits.
#[inline(always)]
unsafe fn scatter(
    bitmap: *const u8,
    mut cursor: *const u8,
    width: usize,
    mut put: impl FnMut(usize, *const u8),
) -> *const u8 {
    for word in 0..BITMAP / 8 {
        // SAFETY: the caller's.
        unsafe {
            let mut bits = bitmap.cast::<u64>().add(word).read_unaligned();
            while bits != 0 {
                put(word * 64 + bits.trailing_zeros() as usize, cursor);
                cursor = cursor.add(width);
                bits &= bits - 1;
            }
        }
    }
    cursor
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_gguf::sparse::pack_strip;

    #[test]
    fn expanding_gives_the_dense_strip() {
        for &ty in GgmlType::SPARSE {
            let dense = ty.dense();
            let layout = strip::layout(dense).unwrap();
            for k in [32, 96, 512, 544, 1056, 33, 1] {
                let Some(row_bytes) = dense.bytes_for(k as u64) else {
                    continue;
                };
                for rows in [1, 16] {
                    let mut state = 7u32;
                    let raw: Vec<Vec<u8>> = (0..rows)
                        .map(|_| {
                            let mut byte = || {
                                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                                match state >> 30 {
                                    0 => (state >> 20) as u8,
                                    1 if dense == GgmlType::Q4_0 => 0x80 | (state >> 24) as u8 & 15,
                                    _ if dense == GgmlType::Q4_0 => 0x88,
                                    _ => 0,
                                }
                            };
                            (0..row_bytes).map(|_| byte()).collect()
                        })
                        .collect();
                    let raw: Vec<&[u8]> = raw.iter().map(|r| &r[..]).collect();
                    let mut packed = Vec::new();
                    pack_strip(ty, k, &raw, None, &mut packed).unwrap();
                    packed.extend([0; SLACK]);
                    let mut want = vec![0; layout.strip_bytes(k)];
                    strip::pack_strip(layout, k, &raw, &mut want);
                    if dense == GgmlType::Q4_0 && rows < ROWS {
                        // Rows that do not exist have nibbles of 0 there, zeros here.
                        for block in want.chunks_exact_mut(18 * ROWS) {
                            for (i, b) in block[..16 * ROWS].iter_mut().enumerate() {
                                if i / 4 % ROWS >= rows {
                                    *b = 0x88;
                                }
                            }
                        }
                    }
                    if dense == GgmlType::Q8_0 && rows < ROWS {
                        for block in want.chunks_exact_mut(34 * ROWS) {
                            for (i, b) in block[..32 * ROWS].iter_mut().enumerate() {
                                if i / 4 % ROWS >= rows {
                                    *b = 0x80;
                                }
                            }
                        }
                    }
                    let mut got = vec![0xee; want.len()];
                    // SAFETY: whole strips of these shapes.
                    unsafe { expand(ty, k, packed.as_ptr(), got.as_mut_ptr()) };
                    assert!(got == want, "{ty} {rows}x{k}");
                }
            }
        }
    }
}
