//! SparAMX's algorithm, re-created from its description: what the register kernels of sparse
//! strips are weighed against.
//!
//! A matrix is cut into tiles of 16 outputs by 32 inputs (bf16) or 64 (8 bits). A tile has a
//! bitmap of 16 words, one for each row of the weight tile as AMX multiplies it, and its
//! non-zero values lie one after another in the order of the bits. Each thread has an equal
//! share of the rows of tiles and a start in the values. It takes two rows of tiles at a time
//! and, at every step along k, for each of the two: counts the bits of 16 words in a vector,
//! makes prefix sums of the counts by shifting and adding, writes masks and offsets to memory
//! and reads them back one by one, expands each row of the tile from its offset into a buffer,
//! and loads the buffer as a tile, which multiplies. Sums stay in tiles until the end. For 8
//! bits both tiles share one buffer, as published, and there is one scale per output and one
//! per token.
//!
//! Two faults of the original are left out, so that results are right: rows are paired within
//! a thread's share, not across shares, and 8-bit codes use the whole range.

use std::arch::{asm, x86_64::*};

use crate::{
    Amx,
    amx::tile::{TILE_BYTES, TILE_ROWS, configure, release},
    disjoint::DisjointMut,
    mem::AlignedBuf,
    pool::Pool,
    strip::ROWS,
    tier::{Features, Tier},
};
use half::bf16;

/// Bytes behind the values that expanding loads may look at.
const SLACK: usize = 64;

/// The numbers that are multiplied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StagedType {
    Bf16,
    /// 8 bits with a scale per output.
    Int8,
}

impl StagedType {
    const fn bytes(self) -> usize {
        match self {
            StagedType::Bf16 => 2,
            StagedType::Int8 => 1,
        }
    }

    /// Inputs of a tile.
    pub const fn tile_k(self) -> usize {
        64 / self.bytes()
    }

    /// Bytes of a tile's bitmap.
    const fn bitmap(self) -> usize {
        TILE_BYTES / self.bytes() / 8
    }
}

/// A sparse matrix `[n][k]` as this algorithm wants it, for one number of threads.
#[derive(Debug)]
pub struct StagedMatrix {
    ty: StagedType,
    n: usize,
    k: usize,
    bitmaps: AlignedBuf,
    values: AlignedBuf,
    /// Per thread its rows of tiles, and where their bitmaps and values begin, in bytes.
    shares: Vec<Share>,
    /// `[n]`, of 8 bits.
    scales: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
struct Share {
    first: usize,
    end: usize,
    bitmap: usize,
    value: usize,
}

impl StagedMatrix {
    /// A matrix of bf16 bits `[n][k]`.
    ///
    /// # Panics
    /// When `n` is no multiple of 16 or `k` none of 32, or lengths disagree.
    pub fn bf16(n: usize, k: usize, bits: &[u16], threads: usize) -> StagedMatrix {
        let value = |at: usize| bits[at].to_le_bytes();
        StagedMatrix::pack(StagedType::Bf16, (n, k, bits.len()), threads, &value)
    }

    /// A matrix of codes `[n][k]` with scales `[n]`.
    ///
    /// # Panics
    /// When `n` is no multiple of 16 or `k` none of 64, or lengths disagree.
    pub fn int8(n: usize, k: usize, codes: &[i8], scales: &[f32], threads: usize) -> StagedMatrix {
        assert_eq!(scales.len(), n);
        let value = |at: usize| [codes[at] as u8];
        let packed = StagedMatrix::pack(StagedType::Int8, (n, k, codes.len()), threads, &value);
        StagedMatrix {
            scales: scales.to_vec(),
            ..packed
        }
    }

    fn pack<const B: usize>(
        ty: StagedType,
        (n, k, len): (usize, usize, usize),
        threads: usize,
        value: &dyn Fn(usize) -> [u8; B],
    ) -> StagedMatrix {
        assert!(n.is_multiple_of(ROWS) && k.is_multiple_of(ty.tile_k()) && len == n * k);
        let (rows, steps) = (n / ROWS, k / ty.tile_k());
        // Inputs that stand side by side in a row of a weight tile.
        let group = 4 / B;
        let (mut bitmaps, mut values) = (Vec::new(), Vec::<u8>::new());
        let mut tile = |row: usize, step: usize| {
            for line in 0..TILE_ROWS {
                let mut bits = 0u64;
                for bit in 0..16 * group {
                    let input = step * ty.tile_k() + line * group + bit % group;
                    let stored = value((row * ROWS + bit / group) * k + input);
                    if stored != [0; B] {
                        bits |= 1 << bit;
                        values.extend(stored);
                    }
                }
                bitmaps.extend(&bits.to_le_bytes()[..ty.bitmap() / TILE_ROWS]);
            }
            (bitmaps.len(), values.len())
        };
        let mut shares = Vec::new();
        let mut at = (0, 0);
        for thread in 0..threads {
            let (first, end) = (rows * thread / threads, rows * (thread + 1) / threads);
            shares.push(Share {
                first,
                end,
                bitmap: at.0,
                value: at.1,
            });
            for pair in (first..end).step_by(2) {
                for step in 0..steps {
                    for row in pair..end.min(pair + 2) {
                        at = tile(row, step);
                    }
                }
            }
        }
        let aligned = |bytes: &[u8]| {
            let mut buf = AlignedBuf::zeroed(bytes.len() + SLACK);
            buf[..bytes.len()].copy_from_slice(bytes);
            buf
        };
        StagedMatrix {
            ty,
            n,
            k,
            bitmaps: aligned(&bitmaps),
            values: aligned(&values),
            shares,
            scales: Vec::new(),
        }
    }

    /// A copy in memory of its own.
    pub fn copy(&self) -> StagedMatrix {
        let copy = |from: &AlignedBuf| {
            let mut to = AlignedBuf::zeroed(from.len());
            to.copy_from_slice(from);
            to
        };
        StagedMatrix {
            bitmaps: copy(&self.bitmaps),
            values: copy(&self.values),
            shares: self.shares.clone(),
            scales: self.scales.clone(),
            ..*self
        }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.bitmaps.len() + self.values.len() - 2 * SLACK
    }
}

/// Activations `[m][k]`, at most 16 tokens, as tiles `[k / tile][m][64 bytes]`.
#[derive(Debug)]
pub struct StagedInputs {
    ty: StagedType,
    m: usize,
    k: usize,
    tiles: AlignedBuf,
    /// `[m]`, of 8 bits.
    scales: Vec<f32>,
}

impl StagedInputs {
    /// Rounds them, to bf16 or to 8 bits with a scale per token.
    ///
    /// # Panics
    /// For more than 16 tokens, or lengths that disagree.
    pub fn new(ty: StagedType, x: &[f32], m: usize, k: usize) -> StagedInputs {
        assert!((1..=TILE_ROWS).contains(&m) && x.len() == m * k);
        assert!(k.is_multiple_of(ty.tile_k()));
        let mut tiles = AlignedBuf::zeroed(m * k * ty.bytes());
        let mut scales = vec![0.0; m];
        for (t, x) in x.chunks_exact(k).enumerate() {
            let largest = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            scales[t] = largest / 127.0;
            for (i, &x) in x.iter().enumerate() {
                let (step, within) = (i / ty.tile_k(), i % ty.tile_k());
                let at = (step * m + t) * 64 + within * ty.bytes();
                match ty {
                    StagedType::Bf16 => {
                        let bits = bf16::from_f32(x).to_bits().to_le_bytes();
                        tiles[at..at + 2].copy_from_slice(&bits);
                    }
                    StagedType::Int8 => {
                        tiles[at] = (x * inverse).round_ties_even() as i8 as u8;
                    }
                }
            }
        }
        StagedInputs {
            ty,
            m,
            k,
            tiles,
            scales,
        }
    }
}

/// Whether the CPU has the vector instructions that the algorithm wants.
fn vectors() -> bool {
    Tier::Avx512.available()
        && Features::get().avx512vbmi2
        && is_x86_feature_detected!("avx512vpopcntdq")
}

/// `y = x · wᵀ`, `[m][n]`. False, and nothing done, where the CPU lacks the vector
/// instructions.
///
/// # Panics
/// When shapes disagree.
pub fn multiply_staged(
    amx: Amx,
    pool: &Pool,
    matrix: &StagedMatrix,
    inputs: &StagedInputs,
    y: &mut [f32],
) -> bool {
    // The token vouches for the tiles, nothing else.
    let _: Amx = amx;
    let (n, m) = (matrix.n, inputs.m);
    assert!(matrix.ty == inputs.ty && matrix.k == inputs.k && y.len() == n * m);
    if !vectors() {
        return false;
    }
    let y = DisjointMut::new(y);
    pool.run(matrix.shares.len(), &|thread| {
        let share = matrix.shares[thread];
        let mut sums = Sums([0; 2 * TILE_ROWS * ROWS]);
        let mut cursor = Cursor {
            bitmap: matrix.bitmaps[share.bitmap..].as_ptr(),
            value: matrix.values[share.value..].as_ptr(),
        };
        // SAFETY: AMX may be executed, as the token says.
        unsafe { configure(m) };
        for pair in (share.first..share.end).step_by(2) {
            let count = 2.min(share.end - pair);
            // SAFETY: the CPU has the features; the cursor is where the pair begins, and
            // bitmaps count the values.
            unsafe {
                match matrix.ty {
                    StagedType::Bf16 => bf16_rows(inputs, count, &mut cursor, &mut sums),
                    StagedType::Int8 => int8_rows(inputs, count, &mut cursor, &mut sums),
                }
            }
            for row in 0..count {
                let first = (pair + row) * ROWS;
                for t in 0..m {
                    // SAFETY: a row of tiles belongs to one task.
                    let y = unsafe { y.slice(t * n + first..t * n + first + ROWS) };
                    let sums = &sums.0[(row * TILE_ROWS + t) * ROWS..][..ROWS];
                    for (i, (y, &sum)) in y.iter_mut().zip(sums).enumerate() {
                        *y = match matrix.ty {
                            StagedType::Bf16 => f32::from_bits(sum as u32),
                            StagedType::Int8 => {
                                sum as f32 * (matrix.scales[first + i] * inputs.scales[t])
                            }
                        };
                    }
                }
            }
        }
        // SAFETY: as above.
        unsafe { release() };
    });
    true
}

/// Sums of two tiles: bits of f32, or integers.
#[repr(C, align(64))]
struct Sums([i32; 2 * TILE_ROWS * ROWS]);

/// An expanded tile.
#[repr(C, align(64))]
struct Buffer([u8; TILE_BYTES]);

/// Where a thread is.
struct Cursor {
    bitmap: *const u8,
    value: *const u8,
}

macro_rules! tiles {
    ($code:literal $(, $operand:ident = $value:expr)*) => {
        // What stands in tiles is kept between these blocks: nothing else in the loop around
        // them uses tiles, and the compiler never does by itself.
        asm!(
            $code,
            $($operand = in(reg) $value,)*
            row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Sums of one or two rows of tiles, bf16.
///
/// # Safety
/// The CPU has the features, tiles are configured for the inputs' tokens, and the cursor is
/// at the rows' first tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vpopcntdq,popcnt")]
unsafe fn bf16_rows(inputs: &StagedInputs, count: usize, cursor: &mut Cursor, sums: &mut Sums) {
    let mut buffers = [const { Buffer([0; TILE_BYTES]) }; 2];
    let [first, second] = &mut buffers;
    let steps = inputs.k / StagedType::Bf16.tile_k();
    // SAFETY: the caller's; tiles have the sizes that they are configured for.
    unsafe {
        tiles!("tilezero tmm0\ntilezero tmm1\n/* {row} */");
        for step in 0..steps {
            let a = inputs.tiles.as_ptr().add(step * inputs.m * 64);
            bf16_tile(cursor, first);
            tiles!(
                "tileloadd tmm4, [{a} + {row}*1]
                tileloadd tmm6, [{b} + {row}*1]
                tdpbf16ps tmm0, tmm4, tmm6",
                a = a,
                b = first.0.as_ptr()
            );
            if count == 2 {
                bf16_tile(cursor, second);
                tiles!(
                    "tileloadd tmm7, [{b} + {row}*1]
                    tdpbf16ps tmm1, tmm4, tmm7",
                    b = second.0.as_ptr()
                );
            }
        }
        tiles!(
            "tilestored [{c} + {row}*1], tmm0
            tilestored [{c} + {row}*1 + 1024], tmm1",
            c = sums.0.as_mut_ptr()
        );
    }
}

/// The same of 8 bits.
///
/// # Safety
/// As [`bf16_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vpopcntdq,popcnt")]
unsafe fn int8_rows(inputs: &StagedInputs, count: usize, cursor: &mut Cursor, sums: &mut Sums) {
    let mut buffer = Buffer([0; TILE_BYTES]);
    let steps = inputs.k / StagedType::Int8.tile_k();
    // SAFETY: the caller's; tiles have the sizes that they are configured for.
    unsafe {
        tiles!("tilezero tmm0\ntilezero tmm1\n/* {row} */");
        for step in 0..steps {
            let a = inputs.tiles.as_ptr().add(step * inputs.m * 64);
            int8_tile(cursor, &mut buffer);
            tiles!(
                "tileloadd tmm4, [{a} + {row}*1]
                tileloadd tmm6, [{b} + {row}*1]
                tdpbssd tmm0, tmm4, tmm6",
                a = a,
                b = buffer.0.as_ptr()
            );
            if count == 2 {
                int8_tile(cursor, &mut buffer);
                tiles!(
                    "tileloadd tmm7, [{b} + {row}*1]
                    tdpbssd tmm1, tmm4, tmm7",
                    b = buffer.0.as_ptr()
                );
            }
        }
        tiles!(
            "tilestored [{c} + {row}*1], tmm0
            tilestored [{c} + {row}*1 + 1024], tmm1",
            c = sums.0.as_mut_ptr()
        );
    }
}

/// Expands the next tile of bf16 into the buffer.
///
/// # Safety
/// As [`bf16_rows`]; inlined where the features are.
#[inline(always)]
unsafe fn bf16_tile(cursor: &mut Cursor, buffer: &mut Buffer) {
    // SAFETY: the caller's: a bitmap of 64 bytes, and as many values as it counts.
    unsafe {
        let bitmap = _mm512_loadu_si512(cursor.bitmap.cast());
        // The next two tiles' bitmaps.
        _mm_prefetch::<_MM_HINT_T0>(cursor.bitmap.wrapping_add(64).cast());
        _mm_prefetch::<_MM_HINT_T0>(cursor.bitmap.wrapping_add(128).cast());
        let counts = _mm512_popcnt_epi32(bitmap);
        let zero = _mm512_setzero_si512();
        let mut sums = counts;
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<15>(sums, zero));
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<14>(sums, zero));
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<12>(sums, zero));
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<8>(sums, zero));
        let (mut masks, mut ends) = ([0u32; 16], [0u32; 16]);
        _mm512_storeu_si512(masks.as_mut_ptr().cast(), bitmap);
        _mm512_storeu_si512(ends.as_mut_ptr().cast(), sums);
        let mut start = 0;
        for (line, (&mask, &end)) in masks.iter().zip(&ends).enumerate() {
            let from = cursor.value.add(2 * start as usize);
            let row = _mm512_maskz_expandloadu_epi16(mask, from.cast());
            _mm512_store_si512(buffer.0.as_mut_ptr().add(64 * line).cast(), row);
            start = end;
        }
        cursor.bitmap = cursor.bitmap.add(64);
        cursor.value = cursor.value.add(2 * start as usize);
    }
}

/// The same of 8 bits.
///
/// # Safety
/// As [`bf16_rows`]; inlined where the features are.
#[inline(always)]
unsafe fn int8_tile(cursor: &mut Cursor, buffer: &mut Buffer) {
    // SAFETY: the caller's: a bitmap of 128 bytes, and as many values as it counts.
    unsafe {
        for part in 0..2 {
            let bitmap = _mm512_loadu_si512(cursor.bitmap.add(64 * part).cast());
            _mm_prefetch::<_MM_HINT_T0>(cursor.bitmap.wrapping_add(64 * part + 128).cast());
            let counts = _mm512_popcnt_epi64(bitmap);
            let zero = _mm512_setzero_si512();
            let mut sums = counts;
            sums = _mm512_add_epi64(sums, _mm512_alignr_epi64::<7>(sums, zero));
            sums = _mm512_add_epi64(sums, _mm512_alignr_epi64::<6>(sums, zero));
            sums = _mm512_add_epi64(sums, _mm512_alignr_epi64::<4>(sums, zero));
            let (mut masks, mut ends) = ([0u64; 8], [0u64; 8]);
            _mm512_storeu_si512(masks.as_mut_ptr().cast(), bitmap);
            _mm512_storeu_si512(ends.as_mut_ptr().cast(), sums);
            let mut start = 0;
            for (line, (&mask, &end)) in masks.iter().zip(&ends).enumerate() {
                let from = cursor.value.add(start as usize);
                let row = _mm512_maskz_expandloadu_epi8(mask, from.cast());
                let to = buffer.0.as_mut_ptr().add(64 * (8 * part + line));
                _mm512_store_si512(to.cast(), row);
                start = end;
            }
            cursor.value = cursor.value.add(start as usize);
        }
        cursor.bitmap = cursor.bitmap.add(128);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PoolConfig, lab::tests::Numbers};

    #[test]
    fn staged_products_are_right() {
        let Ok(amx) = Amx::emulate() else { return };
        let mut numbers = Numbers(9);
        // Shares of one to three rows of tiles, odd and even, and more threads than rows.
        for (n, k, threads, m) in [
            (96, 128, 4, 1),
            (48, 192, 1, 5),
            (64, 64, 2, 16),
            (32, 64, 5, 3),
        ] {
            for percent in [0, 50, 90, 100] {
                let mut weights: Vec<f32> = (0..n * k).map(|_| numbers.float()).collect();
                for w in &mut weights {
                    if numbers.bits() % 100 < percent {
                        *w = 0.0;
                    }
                }
                let x: Vec<f32> = (0..m * k).map(|_| numbers.float()).collect();
                let pool = Pool::new(PoolConfig::new(2));
                let at = format!("{n}x{k}, {threads} threads, {m} tokens, {percent} %");

                let bits: Vec<u16> = weights
                    .iter()
                    .map(|&w| bf16::from_f32(w).to_bits())
                    .collect();
                let matrix = StagedMatrix::bf16(n, k, &bits, threads);
                let inputs = StagedInputs::new(StagedType::Bf16, &x, m, k);
                let mut y = vec![f32::NAN; m * n];
                if !multiply_staged(amx, &pool, &matrix.copy(), &inputs, &mut y) {
                    return;
                }
                let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
                for (i, y) in y.iter().enumerate() {
                    let (t, row) = (i / n, i % n);
                    let terms =
                        || (0..k).map(|j| round(weights[row * k + j]) * round(x[t * k + j]));
                    let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    let off = (f64::from(*y) - want).abs();
                    assert!(off <= 1e-5 * size + 1e-12, "{at}: {y} {want}");
                }

                let codes: Vec<i8> = weights.iter().map(|w| (w * 127.0) as i8).collect();
                let scales: Vec<f32> = (0..n).map(|i| 0.01 + i as f32 * 1e-4).collect();
                let matrix = StagedMatrix::int8(n, k, &codes, &scales, threads);
                let inputs = StagedInputs::new(StagedType::Int8, &x, m, k);
                multiply_staged(amx, &pool, &matrix, &inputs, &mut y);
                for (i, y) in y.iter().enumerate() {
                    let (t, row) = (i / n, i % n);
                    let x = &x[t * k..(t + 1) * k];
                    let largest = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    let code = |v: f32| (v * (127.0 / largest)).round_ties_even() as i32;
                    let sum: i32 = (0..k)
                        .map(|j| i32::from(codes[row * k + j]) * code(x[j]))
                        .sum();
                    assert_eq!(*y, sum as f32 * (scales[row] * (largest / 127.0)), "{at}");
                }
            }
        }
    }

    #[test]
    fn bytes_are_bitmaps_and_values() {
        let (n, k) = (32, 128);
        let dense = StagedMatrix::bf16(n, k, &vec![0x3f80; n * k], 2);
        assert_eq!(dense.bytes(), n * k * 2 + n * k / 8);
        let empty = StagedMatrix::int8(n, k, &vec![0; n * k], &vec![1.0; n], 2);
        assert_eq!(empty.bytes(), n * k / 8);
    }
}
