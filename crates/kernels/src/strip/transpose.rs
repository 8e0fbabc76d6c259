//! Transposing 16 rows with SSE2, which every x86-64 has: loading a model is then as fast as
//! memory, and wider registers would not make it faster.

use super::ROWS;
use std::arch::x86_64::{
    __m128i, _mm_loadu_si128, _mm_set1_epi32, _mm_storeu_si128, _mm_unpackhi_epi16,
    _mm_unpackhi_epi32, _mm_unpackhi_epi64, _mm_unpacklo_epi16, _mm_unpacklo_epi32,
    _mm_unpacklo_epi64, _mm_xor_si128,
};
use std::{array, ops::Range};

/// Bytes of a row that are taken before the next rows' turn: a cache line. A few rows at a
/// time, because rows a power of two apart fall into the same set of the cache, which has
/// fewer ways than a strip has rows.
const LINE: usize = 64;

fn load(src: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes, at any alignment.
    unsafe { _mm_loadu_si128(src.as_ptr().cast()) }
}

fn store(dst: &mut [u8], at: usize, v: __m128i) {
    // SAFETY: 16 writable bytes, at any alignment.
    unsafe { _mm_storeu_si128(dst[at..at + 16].as_mut_ptr().cast(), v) }
}

/// Four rows of four dwords to four columns.
#[inline(always)]
fn dwords_4x4([a, b, c, d]: [__m128i; 4]) -> [__m128i; 4] {
    // SAFETY: x86-64 has SSE2.
    unsafe {
        let (ab, cd) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
        [
            _mm_unpacklo_epi64(ab, cd),
            _mm_unpackhi_epi64(ab, cd),
            _mm_unpacklo_epi64(ab_high, cd_high),
            _mm_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}

/// Eight rows of eight words to eight columns.
#[inline(always)]
fn words_8x8(r: [__m128i; 8]) -> [__m128i; 8] {
    // Pairs of rows become rows of dwords, of which there are two squares.
    // SAFETY: x86-64 has SSE2.
    let low = array::from_fn(|i| unsafe { _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]) });
    // SAFETY: as above.
    let high = array::from_fn(|i| unsafe { _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]) });
    let ([a, b, c, d], [e, f, g, h]) = (dwords_4x4(low), dwords_4x4(high));
    [a, b, c, d, e, f, g, h]
}

/// Transposes `N` rows (from row `r`) × `N` elements of `16 / N` bytes at a time, as long as
/// there are `N` elements; returns the number of elements done.
#[inline(always)]
fn squares<const N: usize>(
    rows: &[&[u8]; ROWS],
    at: usize,
    count: usize,
    dst: &mut [u8],
    square: impl Fn([__m128i; N]) -> [__m128i; N],
) -> usize {
    let width = 16 / N;
    let whole = count - count % N;
    for first in (0..whole).step_by(LINE / width) {
        let last = whole.min(first + LINE / width);
        for r in (0..ROWS).step_by(N) {
            let lines: [&[[u8; 16]]; N] = array::from_fn(|i| {
                let bytes = at + first * width..at + last * width;
                rows[r + i][bytes].as_chunks().0
            });
            for (step, first) in (first..last).step_by(N).enumerate() {
                let columns = square(lines.map(|line| load(&line[step])));
                for (e, column) in (first..).zip(columns) {
                    store(dst, (e * ROWS + r) * width, column);
                }
            }
        }
    }
    whole
}

/// Element by element, for the few that make no square.
#[inline(always)]
pub(super) fn elements<const W: usize>(
    rows: &[&[u8]; ROWS],
    at: usize,
    range: Range<usize>,
    dst: &mut [u8],
    map: impl Fn([u8; W]) -> [u8; W],
) {
    let dst = &mut dst.as_chunks_mut::<W>().0[range.start * ROWS..range.end * ROWS];
    for (e, column) in range.zip(dst.as_chunks_mut::<ROWS>().0) {
        let at = at + e * W;
        for (row, out) in rows.iter().zip(column) {
            *out = map(*row[at..].first_chunk().expect("rows are whole blocks"));
        }
    }
}

/// Transposes `count` dwords of 16 rows, from byte `at` on, each xored with `flip`.
pub(super) fn dwords(rows: &[&[u8]; ROWS], at: usize, count: usize, dst: &mut [u8], flip: u32) {
    let done = squares(rows, at, count, dst, |square| {
        // SAFETY: x86-64 has SSE2.
        let flipped = |column| unsafe { _mm_xor_si128(column, _mm_set1_epi32(flip as i32)) };
        dwords_4x4(square).map(flipped)
    });
    elements::<4>(rows, at, done..count, dst, |x| {
        (u32::from_le_bytes(x) ^ flip).to_le_bytes()
    });
}

/// Transposes `count` words of 16 rows, from byte `at` on.
pub(super) fn words(rows: &[&[u8]; ROWS], at: usize, count: usize, dst: &mut [u8]) {
    let done = squares(rows, at, count, dst, words_8x8);
    elements::<2>(rows, at, done..count, dst, |x| x);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_element_finds_its_place() {
        let rows: [Vec<u8>; ROWS] = array::from_fn(|r| {
            let byte = |i: usize| (i as u32 * 31 + r as u32 * 77 + (i as u32 >> 3)) as u8;
            (0..3 + 4 * 41).map(byte).collect()
        });
        let rows = rows.each_ref().map(|r| &r[..]);
        for count in [0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 41] {
            for at in [0, 3] {
                let mut dst = vec![0; count * ROWS * 4];
                dwords(&rows, at, count, &mut dst, 0x8040_2010);
                let mut words_dst = vec![0; count * ROWS * 2];
                words(&rows, at, count, &mut words_dst);
                for (e, r) in (0..count).flat_map(|e| (0..ROWS).map(move |r| (e, r))) {
                    let i = e * ROWS + r;
                    let want: Vec<u8> = rows[r][at + 4 * e..][..4]
                        .iter()
                        .zip([0x10, 0x20, 0x40, 0x80])
                        .map(|(x, flip)| x ^ flip)
                        .collect();
                    assert_eq!(dst[4 * i..][..4], want, "dword {e} of {count}, row {r}");
                    let want = &rows[r][at + 2 * e..][..2];
                    assert_eq!(
                        words_dst[2 * i..][..2],
                        *want,
                        "word {e} of {count}, row {r}"
                    );
                }
            }
        }
    }
}
