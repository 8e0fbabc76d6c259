//! The Strip16 layout: 16 output rows interleaved so that one load holds the same few
//! weights of 16 rows, and one broadcast activation feeds all of them.
//!
//! A strip is the blocks of its 16 rows, block after block along k, one contiguous stream.
//! Inside a block every field of the raw format is transposed: element `e` of the field for
//! the 16 rows, then element `e + 1`. Code bytes move as dwords (four bytes of one row stay
//! together, which is the order the byte dot products want), scales as the integers they
//! are. A strip takes exactly the bytes of its rows; the last strip of a matrix is filled up
//! with rows of zero bytes. Nothing is lost: [`unpack_strip`] is the exact inverse.

pub mod kernels;
mod transpose;

use tegula_gguf::GgmlType;

/// The version of the layouts: files of strips hold only for the version that wrote them.
pub const LAYOUT_VERSION: u32 = 1;

/// Rows of a strip.
pub const ROWS: usize = 16;

/// How the elements of a field change on the way into a strip.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Map {
    /// Unchanged.
    Plain,
    /// Every byte's top bit flipped: signed codes become unsigned ones with zero point 128,
    /// the form that `vpdpbusd` multiplies.
    Bias,
    /// The 32 high bits of a `Q5_0`/`Q5_1` block, bit `4s + b` moved to bit `8b + s`, so that
    /// one shift and one mask give the bits of the four weights of step `s`.
    HighBits,
}

/// One field of a block: `count` elements of `width` bytes at `raw` in the raw block.
#[derive(Clone, Copy, Debug)]
struct Field {
    raw: usize,
    width: usize,
    count: usize,
    map: Map,
}

/// How one type's rows become a strip.
#[derive(Debug)]
pub struct Layout {
    /// Weights of one row per strip block.
    block_len: usize,
    /// Raw bytes of one row per strip block.
    block_bytes: usize,
    fields: &'static [Field],
}

const fn f(raw: usize, width: usize, count: usize) -> Field {
    Field {
        raw,
        width,
        count,
        map: Map::Plain,
    }
}

const fn fm(raw: usize, width: usize, count: usize, map: Map) -> Field {
    Field {
        raw,
        width,
        count,
        map,
    }
}

macro_rules! layout {
    ($len:expr, $bytes:expr, $fields:expr) => {{
        const L: Layout = Layout {
            block_len: $len,
            block_bytes: $bytes,
            fields: &$fields,
        };
        Some(&L)
    }};
}

/// The strip layout of `ty`, or `None` for types that no matrix product takes.
pub fn layout(ty: GgmlType) -> Option<&'static Layout> {
    use GgmlType as T;
    match ty {
        T::F32 => layout!(1, 4, [f(0, 4, 1)]),
        T::F16 => layout!(1, 2, [f(0, 2, 1)]),
        // Pairs along k, the operand of `vdpbf16ps`; an odd last weight gets a zero partner.
        T::BF16 => layout!(2, 4, [f(0, 4, 1)]),
        T::Q4_0 | T::IQ4_NL => layout!(32, 18, [f(2, 4, 4), f(0, 2, 1)]),
        T::Q4_1 => layout!(32, 20, [f(4, 4, 4), f(0, 2, 2)]),
        T::Q5_0 => layout!(32, 22, [f(6, 4, 4), fm(2, 4, 1, Map::HighBits), f(0, 2, 1)]),
        T::Q5_1 => layout!(32, 24, [f(8, 4, 4), fm(4, 4, 1, Map::HighBits), f(0, 2, 2)]),
        T::Q8_0 => layout!(32, 34, [fm(2, 4, 8, Map::Bias), f(0, 2, 1)]),
        T::MXFP4 => layout!(32, 17, [f(1, 4, 4), f(0, 1, 1)]),
        T::NVFP4 => layout!(64, 36, [f(0, 4, 1), f(4, 4, 8)]),
        // scales, qs, d, dmin
        T::Q2_K => layout!(256, 84, [f(80, 2, 2), f(0, 4, 4), f(16, 4, 16)]),
        // hmask, qs, scales, d
        T::Q3_K => layout!(
            256,
            110,
            [f(0, 4, 8), f(32, 4, 16), f(96, 4, 3), f(108, 2, 1)]
        ),
        // d, dmin, scales, qs
        T::Q4_K => layout!(256, 144, [f(0, 2, 2), f(4, 4, 3), f(16, 4, 32)]),
        // d, dmin, scales, qh, qs
        T::Q5_K => layout!(
            256,
            176,
            [f(0, 2, 2), f(4, 4, 3), f(16, 4, 8), f(48, 4, 32)]
        ),
        // ql, qh, scales, d
        T::Q6_K => layout!(
            256,
            210,
            [f(0, 4, 32), f(128, 4, 16), f(192, 4, 4), f(208, 2, 1)]
        ),
        // d, scales_h, scales_l, qs
        T::IQ4_XS => layout!(256, 136, [f(0, 2, 2), f(4, 4, 1), f(8, 4, 32)]),
        T::IQ2_XXS => layout!(256, 66, [f(0, 66, 1)]),
        T::IQ2_XS => layout!(256, 74, [f(0, 74, 1)]),
        T::IQ2_S => layout!(256, 82, [f(0, 82, 1)]),
        T::IQ3_XXS => layout!(256, 98, [f(0, 98, 1)]),
        T::IQ3_S => layout!(256, 110, [f(0, 110, 1)]),
        T::IQ1_S => layout!(256, 50, [f(0, 50, 1)]),
        T::IQ1_M => layout!(256, 56, [f(0, 56, 1)]),
        // Sparse strips are another thing: see [`crate::sparse`].
        T::S_BF16 | T::S8 | T::S4 => None,
        T::I8 | T::I16 | T::I32 | T::I64 | T::F64 => None,
    }
}

impl Layout {
    /// Weights of one row per strip block.
    pub const fn block_len(&self) -> usize {
        self.block_len
    }

    /// Bytes of one strip block.
    pub const fn strip_block_bytes(&self) -> usize {
        self.block_bytes * ROWS
    }

    /// Bytes of a strip of rows of `k` weights.
    pub const fn strip_bytes(&self, k: usize) -> usize {
        k.div_ceil(self.block_len) * self.block_bytes * ROWS
    }
}

fn high_bits_in(x: u32) -> u32 {
    let mut out = 0;
    let mut b = 0;
    while b < 4 {
        // Gather bits b, b+4, …, b+28 into the low byte: one bit of every nibble.
        let mut y = (x >> b) & 0x1111_1111;
        y = (y | (y >> 3)) & 0x0303_0303;
        y = (y | (y >> 6)) & 0x000f_000f;
        y = (y | (y >> 12)) & 0xff;
        out |= y << (8 * b);
        b += 1;
    }
    out
}

fn high_bits_out(x: u32) -> u32 {
    let mut out = 0;
    let mut b = 0;
    while b < 4 {
        let mut y = (x >> (8 * b)) & 0xff;
        y = (y | (y << 12)) & 0x000f_000f;
        y = (y | (y << 6)) & 0x0303_0303;
        y = (y | (y << 3)) & 0x1111_1111;
        out |= y << b;
        b += 1;
    }
    out
}

fn read_u32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Packs up to 16 raw rows of `k` weights into `dst`, a strip of
/// [`Layout::strip_bytes`]`(k)` bytes. Missing rows become zero bytes.
///
/// # Panics
/// When a row or `dst` has the wrong length.
pub fn pack_strip(layout: &Layout, k: usize, rows: &[&[u8]], dst: &mut [u8]) {
    assert!(rows.len() <= ROWS);
    assert_eq!(dst.len(), layout.strip_bytes(k));
    let blocks = k.div_ceil(layout.block_len);
    let whole = if k.is_multiple_of(layout.block_len) {
        blocks
    } else {
        blocks - 1
    };
    let zeros = vec![
        0u8;
        if rows.len() < ROWS {
            blocks * layout.block_bytes
        } else {
            0
        }
    ];
    let mut all: [&[u8]; ROWS] = [&zeros; ROWS];
    all[..rows.len()].copy_from_slice(rows);
    let (body, tail) = dst.split_at_mut(whole * layout.strip_block_bytes());
    if let [field] = layout.fields {
        // Blocks of nothing else are one long field.
        let count = field.count * whole;
        pack_field(&Field { count, ..*field }, &all, 0, body);
    } else {
        let blocks = body.chunks_exact_mut(layout.strip_block_bytes());
        for (b, out) in blocks.enumerate() {
            pack_block(layout, &all, b * layout.block_bytes, out);
        }
    }
    if !tail.is_empty() {
        // Only BF16 with odd k ends in part of a block.
        let mut tails = [[0u8; 4]; ROWS];
        for (tail, row) in tails.iter_mut().zip(rows) {
            let rest = &row[whole * layout.block_bytes..];
            tail[..rest.len()].copy_from_slice(rest);
        }
        pack_block(layout, &tails.each_ref().map(|t| &t[..]), 0, tail);
    }
}

fn pack_block(layout: &Layout, rows: &[&[u8]; ROWS], base: usize, out: &mut [u8]) {
    let mut o = 0;
    for field in layout.fields {
        let len = field.width * field.count * ROWS;
        pack_field(field, rows, base + field.raw, &mut out[o..o + len]);
        o += len;
    }
}

/// Transposes a field that begins at byte `at` of each row.
fn pack_field(field: &Field, rows: &[&[u8]; ROWS], at: usize, dst: &mut [u8]) {
    let count = field.count;
    match (field.map, field.width) {
        (Map::Plain, 4) => transpose::dwords(rows, at, count, dst, 0),
        (Map::Bias, _) => transpose::dwords(rows, at, count, dst, 0x8080_8080),
        (Map::HighBits, _) => transpose::elements::<4>(rows, at, 0..count, dst, |x| {
            high_bits_in(u32::from_le_bytes(x)).to_le_bytes()
        }),
        (Map::Plain, 2) => transpose::words(rows, at, count, dst),
        (Map::Plain, 1) => transpose::elements::<1>(rows, at, 0..count, dst, |x| x),
        (Map::Plain, width) => {
            for (i, out) in dst.chunks_exact_mut(width).enumerate() {
                let at = at + i / ROWS * width;
                out.copy_from_slice(&rows[i % ROWS][at..at + width]);
            }
        }
    }
}

/// The raw bytes of row `row` (0..16) of one strip block, into `dst`.
pub fn unpack_block_row(layout: &Layout, block: &[u8], row: usize, dst: &mut [u8]) {
    let mut o = 0;
    for field in layout.fields {
        let w = field.width;
        for e in 0..field.count {
            let s = o + (e * ROWS + row) * w;
            let d = field.raw + e * w;
            match field.map {
                Map::Plain => dst[d..d + w].copy_from_slice(&block[s..s + w]),
                Map::Bias => {
                    dst[d..d + w].copy_from_slice(&(read_u32(block, s) ^ 0x8080_8080).to_le_bytes())
                }
                Map::HighBits => {
                    dst[d..d + w].copy_from_slice(&high_bits_out(read_u32(block, s)).to_le_bytes())
                }
            }
        }
        o += w * field.count * ROWS;
    }
}

/// The raw bytes of row `row` (0..16) of a strip of rows of `k` weights; `dst` has the raw
/// row's length.
///
/// # Panics
/// When `strip` or `dst` has the wrong length.
pub fn unpack_row(layout: &Layout, k: usize, strip: &[u8], row: usize, dst: &mut [u8]) {
    assert_eq!(strip.len(), layout.strip_bytes(k));
    let blocks = strip.chunks_exact(layout.strip_block_bytes());
    for (block, out) in blocks.zip(dst.chunks_mut(layout.block_bytes)) {
        if out.len() == layout.block_bytes {
            unpack_block_row(layout, block, row, out);
        } else {
            let mut whole = [0u8; 4];
            unpack_block_row(layout, block, row, &mut whole);
            let len = out.len();
            out.copy_from_slice(&whole[..len]);
        }
    }
}

/// The inverse of [`pack_strip`]: `rows` receive the raw bytes of the strip's first rows.
pub fn unpack_strip(layout: &Layout, k: usize, strip: &[u8], rows: &mut [&mut [u8]]) {
    for (r, row) in rows.iter_mut().enumerate() {
        unpack_row(layout, k, strip, r, row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn high_bits_are_a_permutation_with_the_stated_map() {
        for s in 0..8 {
            for b in 0..4 {
                let x = 1u32 << (4 * s + b);
                assert_eq!(high_bits_in(x), 1 << (8 * b + s));
                assert_eq!(high_bits_out(high_bits_in(x)), x);
            }
        }
    }

    #[test]
    fn fields_cover_every_raw_byte_once() {
        for &ty in GgmlType::ALL {
            let Some(l) = layout(ty) else { continue };
            let mut seen = vec![0; l.block_bytes];
            for field in l.fields {
                for b in &mut seen[field.raw..field.raw + field.width * field.count] {
                    *b += 1;
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{ty}");
            assert_eq!(
                l.block_len * ty.block_bytes(),
                l.block_bytes * ty.block_len(),
                "{ty}"
            );
        }
    }

    #[test]
    fn the_version_stands_for_these_layouts() {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for &ty in GgmlType::ALL {
            let Some(l) = layout(ty) else { continue };
            let len = l.block_bytes;
            let rows: Vec<Vec<u8>> = (0..ROWS)
                .map(|r| (0..len).map(|i| (r * 59 + i * 31 + r * i) as u8).collect())
                .collect();
            let rows: Vec<&[u8]> = rows.iter().map(|r| &r[..]).collect();
            let mut strip = vec![0; l.strip_block_bytes()];
            pack_strip(l, l.block_len, &rows, &mut strip);
            for byte in strip {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        // Another hash means other strips: then raise the version, too.
        assert_eq!((LAYOUT_VERSION, hash), (1, 0xff76_9600_07db_db81));
    }

    #[test]
    fn unpacking_inverts_packing() {
        for &ty in GgmlType::ALL {
            let Some(l) = layout(ty) else { continue };
            for (k, n) in [(256, 16), (768, 5), (257, 3), (8, 16), (45, 16)] {
                if k % ty.block_len() != 0 {
                    continue;
                }
                let len = ty.bytes_for(k as u64).unwrap() as usize;
                let mut x = 7u32;
                let raw: Vec<Vec<u8>> = (0..n)
                    .map(|_| {
                        (0..len)
                            .map(|_| {
                                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                                (x >> 24) as u8
                            })
                            .collect()
                    })
                    .collect();
                let rows: Vec<&[u8]> = raw.iter().map(|r| &r[..]).collect();
                let mut strip = vec![0xaa; l.strip_bytes(k)];
                pack_strip(l, k, &rows, &mut strip);
                for (r, want) in raw.iter().enumerate() {
                    let mut got = vec![0; len];
                    unpack_row(l, k, &strip, r, &mut got);
                    assert_eq!(&got, want, "{ty} k={k} row {r}");
                }
            }
        }
    }
}
