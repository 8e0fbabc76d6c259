//! Strips: packing, unpacking, checking. Plain loops; they define the format.

use super::{ALIGN, BITMAP, GROUP, Header, Pattern, ROWS, SparseError, head_bytes, supers};
use crate::GgmlType;

/// Inputs of a step.
const fn step(ty: GgmlType) -> usize {
    match ty {
        GgmlType::S_BF16 => 2,
        _ => 4,
    }
}

/// The code of a weight that has no value.
const fn zero(ty: GgmlType) -> u16 {
    match ty {
        GgmlType::S8 => 128,
        GgmlType::S4 => 8,
        _ => 0,
    }
}

/// Which weight of a group bit `bit` of its bitmap stands for: (row, input).
const fn weight(step: usize, bit: usize) -> (usize, usize) {
    let per = ROWS * step;
    let (s, rest) = (bit / per, bit % per);
    (rest / step, s * step + rest % step)
}

/// One group of 16 rows: scales as they are, codes, and which of them are kept.
struct Group {
    scales: [[u8; 2]; ROWS],
    codes: [[u16; GROUP]; ROWS],
    kept: [u32; ROWS],
}

impl Group {
    /// Group `g` of `rows`, dense rows of `ty`'s twin of `k` weights.
    fn read(
        ty: GgmlType,
        k: usize,
        rows: &[&[u8]],
        g: usize,
        pattern: Option<Pattern>,
    ) -> Result<Group, SparseError> {
        let zero = zero(ty);
        let mut group = Group {
            scales: [[0; 2]; ROWS],
            codes: [[zero; GROUP]; ROWS],
            kept: [0; ROWS],
        };
        for (r, row) in rows.iter().enumerate() {
            let codes = &mut group.codes[r];
            match ty {
                GgmlType::S8 => {
                    let block = &row[g * 34..g * 34 + 34];
                    group.scales[r] = [block[0], block[1]];
                    for (code, &q) in codes.iter_mut().zip(&block[2..]) {
                        *code = u16::from(q ^ 0x80);
                    }
                }
                GgmlType::S4 => {
                    let block = &row[g * 18..g * 18 + 18];
                    group.scales[r] = [block[0], block[1]];
                    for (j, &q) in block[2..].iter().enumerate() {
                        codes[j] = u16::from(q & 15);
                        codes[j + 16] = u16::from(q >> 4);
                    }
                }
                _ => {
                    let rest = &row[g * GROUP * 2..row.len().min((g + 1) * GROUP * 2)];
                    for (code, bits) in codes.iter_mut().zip(rest.as_chunks::<2>().0) {
                        *code = u16::from_le_bytes(*bits);
                    }
                }
            }
            for (i, &code) in codes.iter().enumerate() {
                group.kept[r] |= u32::from(code != zero) << i;
            }
        }
        if let Some(p) = pattern {
            group.fill(p, k, g)?;
        }
        Ok(group)
    }

    /// Keeps as many zeros as the pattern lacks.
    fn fill(&mut self, pattern: Pattern, k: usize, g: usize) -> Result<(), SparseError> {
        let m = pattern.m();
        for (row, kept) in self.kept.iter_mut().enumerate() {
            for first in (0..GROUP.min(k - g * GROUP)).step_by(m) {
                let part = ((1u64 << m) - 1) << first;
                let mut lacking =
                    pattern.n() as i64 - i64::from((u64::from(*kept) & part).count_ones());
                if lacking < 0 {
                    let input = g * GROUP + first;
                    return Err(SparseError::Pattern {
                        pattern,
                        row,
                        input,
                    });
                }
                for i in first..first + m {
                    if lacking > 0 && *kept >> i & 1 == 0 {
                        *kept |= 1 << i;
                        lacking -= 1;
                    }
                }
            }
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.kept.iter().map(|k| k.count_ones() as usize).sum()
    }
}

/// Bytes of the values of a super-block whose groups have so many.
fn value_bytes(ty: GgmlType, counts: &[usize]) -> usize {
    match ty {
        GgmlType::S_BF16 => 2 * counts.iter().sum::<usize>(),
        GgmlType::S4 => {
            let (low, high) = counts.split_at(counts.len().div_ceil(2));
            low.iter().sum::<usize>().max(high.iter().sum())
        }
        _ => counts.iter().sum(),
    }
}

/// How long [`pack_strip`] makes a strip, in bytes, and how many values it holds.
///
/// # Errors
/// As [`pack_strip`].
///
/// # Panics
/// As [`pack_strip`].
pub fn packed_strip(
    ty: GgmlType,
    k: usize,
    rows: &[&[u8]],
    pattern: Option<Pattern>,
) -> Result<(usize, u64), SparseError> {
    let (mut bytes, mut values) = (0, 0);
    for (first, groups) in supers(k) {
        let counts = (first..first + groups)
            .map(|g| Ok(Group::read(ty, k, rows, g, pattern)?.count()))
            .collect::<Result<Vec<_>, SparseError>>()?;
        bytes += groups * head_bytes(ty) + value_bytes(ty, &counts);
        values += counts.iter().sum::<usize>() as u64;
    }
    Ok((bytes.next_multiple_of(ALIGN), values))
}

/// Appends the strip of up to 16 dense rows of `k` weights to `out` and returns the number of
/// its values. `rows` have the dense twin of `ty`.
///
/// # Errors
/// [`SparseError::Pattern`] when a row has more values than `pattern` allows; its row counts
/// from the strip's first.
///
/// # Panics
/// When `ty` is not sparse, there are more than 16 rows, or a row has another length than `k`
/// weights of whole blocks take.
pub fn pack_strip(
    ty: GgmlType,
    k: usize,
    rows: &[&[u8]],
    pattern: Option<Pattern>,
    out: &mut Vec<u8>,
) -> Result<u64, SparseError> {
    let row_bytes = ty.dense().bytes_for(k as u64).expect("whole blocks") as usize;
    assert!(ty.is_sparse() && rows.len() <= ROWS);
    assert!(rows.iter().all(|row| row.len() == row_bytes));
    let start = out.len();
    let mut values = 0;
    let mut kept: Vec<Vec<u16>> = Vec::new();
    for (first, groups) in supers(k) {
        kept.clear();
        for g in first..first + groups {
            let group = Group::read(ty, k, rows, g, pattern)?;
            if head_bytes(ty) > BITMAP {
                out.extend(group.scales.as_flattened());
            }
            out.extend(bitmap(ty, &group.kept));
            let mut codes = Vec::with_capacity(group.count());
            for bit in 0..8 * BITMAP {
                let (row, i) = weight(step(ty), bit);
                if group.kept[row] >> i & 1 == 1 {
                    codes.push(group.codes[row][i]);
                }
            }
            values += codes.len() as u64;
            kept.push(codes);
        }
        match ty {
            GgmlType::S_BF16 => out.extend(kept.iter().flatten().flat_map(|c| c.to_le_bytes())),
            GgmlType::S4 => {
                let (low, high) = kept.split_at(groups.div_ceil(2));
                let (low, high) = (low.concat(), high.concat());
                let nibble = |of: &[u16], i| of.get(i).map_or(0, |&c| c as u8);
                let pairs = 0..low.len().max(high.len());
                out.extend(pairs.map(|i| nibble(&low, i) | nibble(&high, i) << 4));
            }
            _ => out.extend(kept.iter().flatten().map(|&c| c as u8)),
        }
    }
    let len = (out.len() - start).next_multiple_of(ALIGN);
    out.resize(start + len, 0);
    Ok(values)
}

/// The bitmap of a group whose rows keep these of their 32 inputs, one bit each.
pub fn bitmap(ty: GgmlType, kept: &[u32; ROWS]) -> [u8; BITMAP] {
    let step = step(ty);
    let mut words = [0u64; BITMAP / 8];
    for (row, kept) in kept.iter().enumerate() {
        for s in 0..GROUP / step {
            let bits = u64::from(kept >> (s * step)) & ((1 << step) - 1);
            let at = (s * ROWS + row) * step;
            words[at / 64] |= bits << (at % 64);
        }
    }
    let mut out = [0; BITMAP];
    for (bytes, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    out
}

/// Appends a strip of `k` inputs that has no dense rows yet, and returns the number of its values.
/// `head(group, bytes)` writes the head of each group of the row, `values(bytes)` those of each
/// super-block, where of `S4` only the nibbles count that have a value.
///
/// # Panics
/// When `ty` is not sparse.
pub fn build_strip(
    ty: GgmlType,
    k: usize,
    mut head: impl FnMut(usize, &mut [u8]),
    mut values: impl FnMut(&mut [u8]),
    out: &mut Vec<u8>,
) -> u64 {
    assert!(ty.is_sparse());
    let (start, bytes) = (out.len(), head_bytes(ty));
    let mut all = 0;
    for (first, groups) in supers(k) {
        let at = out.len();
        out.resize(at + groups * bytes, 0);
        let heads = out[at..].chunks_exact_mut(bytes).enumerate();
        let counts: Vec<usize> = heads
            .map(|(g, bytes)| {
                head(first + g, bytes);
                count(bytes)
            })
            .collect();
        let at = out.len();
        out.resize(at + value_bytes(ty, &counts), 0);
        values(&mut out[at..]);
        if ty == GgmlType::S4 {
            let (low, high) = counts.split_at(groups.div_ceil(2));
            let (low, high) = (low.iter().sum::<usize>(), high.iter().sum::<usize>());
            out[at + low.min(high)..at + high.max(low)]
                .iter_mut()
                .for_each(|b| *b &= if low < high { 0xf0 } else { 0x0f });
        }
        all += counts.iter().sum::<usize>() as u64;
    }
    let len = (out.len() - start).next_multiple_of(ALIGN);
    out.resize(start + len, 0);
    all
}

/// Values of the group with this head.
fn count(head: &[u8]) -> usize {
    let (words, _) = head[head.len() - BITMAP..].as_chunks::<8>();
    let ones = |w: &[u8; 8]| u64::from_le_bytes(*w).count_ones() as usize;
    words.iter().map(ones).sum()
}

/// A super-block of a strip.
struct Super<'a> {
    /// `[groups][head_bytes]`
    heads: &'a [u8],
    values: &'a [u8],
    counts: Vec<usize>,
}

/// Takes a super-block of `groups` groups from `rest`.
fn take_super<'a>(ty: GgmlType, groups: usize, rest: &mut &'a [u8]) -> Option<Super<'a>> {
    let head = head_bytes(ty);
    let heads = rest.split_off(..groups * head)?;
    let counts: Vec<usize> = heads.chunks_exact(head).map(count).collect();
    let values = rest.split_off(..value_bytes(ty, &counts))?;
    Some(Super {
        heads,
        values,
        counts,
    })
}

/// Checks the bytes of a strip and returns the number of its values; or says what is wrong.
///
/// After this, reading by the bitmaps stays inside the strip.
///
/// # Errors
/// A fragment that reads after the strip's number.
pub fn check_strip(header: &Header, strip: &[u8]) -> Result<u64, String> {
    let (ty, k) = (header.ty, header.k);
    let mut rest = strip;
    let mut values = 0;
    for (first, groups) in supers(k) {
        let at = strip.len() - rest.len();
        let Some(block) = take_super(ty, groups, &mut rest) else {
            return Err(format!(
                "the bitmaps from byte {at} on count more values than its {} bytes hold",
                strip.len()
            ));
        };
        values += block.counts.iter().sum::<usize>() as u64;
        for (g, head) in block.heads.chunks_exact(head_bytes(ty)).enumerate() {
            let g = first + g;
            let bitmap = &head[head.len() - BITMAP..];
            let inputs = GROUP.min(k - g * GROUP);
            if inputs == GROUP && header.pattern.is_none() {
                continue;
            }
            let mut kept = [0u32; ROWS];
            for bit in 0..8 * BITMAP {
                let (row, i) = weight(step(ty), bit);
                kept[row] |= u32::from(bitmap[bit / 8] >> (bit % 8) & 1) << i;
            }
            if kept.iter().any(|&k| u64::from(k) >> inputs != 0) {
                return Err(format!("a value behind the last of {k} inputs"));
            }
            let Some(p) = header.pattern else { continue };
            let part = |first: usize| ((1u64 << p.m()) - 1) << first;
            let wrong = |&k: &u32| {
                let of = |first| (u64::from(k) & part(first)).count_ones() as usize;
                (0..inputs).step_by(p.m()).any(|first| of(first) != p.n())
            };
            if let Some(row) = kept.iter().position(wrong) {
                return Err(format!("row {row} of group {g} is not {p}"));
            }
        }
    }
    if rest.len() >= ALIGN || rest.iter().any(|&b| b != 0) {
        return Err(format!(
            "its bitmaps count {values} values, which leaves {} bytes that are no filling",
            rest.len()
        ));
    }
    Ok(values)
}

/// The dense rows of a checked strip: of the dense twin of `ty`, as many as `rows`.
///
/// # Panics
/// When there are more than 16 rows, a row has not the length that `k` weights take, or the
/// strip is none that [`check_strip`] accepts.
pub fn unpack_strip(ty: GgmlType, k: usize, strip: &[u8], rows: &mut [&mut [u8]]) {
    let row_bytes = ty.dense().bytes_for(k as u64).expect("whole blocks") as usize;
    assert!(rows.len() <= ROWS && rows.iter().all(|row| row.len() == row_bytes));
    let mut rest = strip;
    for (first, groups) in supers(k) {
        let block = take_super(ty, groups, &mut rest).expect("a checked strip");
        let half = groups.div_ceil(2);
        let mut cursor = 0;
        for (g, head) in block.heads.chunks_exact(head_bytes(ty)).enumerate() {
            if ty == GgmlType::S4 && g == half {
                cursor = 0;
            }
            let (scales, bitmap) = head.split_at(head.len() - BITMAP);
            let mut codes = [[zero(ty); GROUP]; ROWS];
            for bit in 0..8 * BITMAP {
                if bitmap[bit / 8] >> (bit % 8) & 1 == 0 {
                    continue;
                }
                let (row, i) = weight(step(ty), bit);
                codes[row][i] = match ty {
                    GgmlType::S_BF16 => {
                        let at = 2 * cursor;
                        u16::from_le_bytes([block.values[at], block.values[at + 1]])
                    }
                    GgmlType::S4 if g < half => u16::from(block.values[cursor] & 15),
                    GgmlType::S4 => u16::from(block.values[cursor] >> 4),
                    _ => u16::from(block.values[cursor]),
                };
                cursor += 1;
            }
            for ((r, row), codes) in rows.iter_mut().enumerate().zip(&codes) {
                write_group(ty, first + g, scales, r, codes, row);
            }
        }
    }
}

/// Writes group `g` of dense row `r`.
fn write_group(
    ty: GgmlType,
    g: usize,
    scales: &[u8],
    r: usize,
    codes: &[u16; GROUP],
    row: &mut [u8],
) {
    match ty {
        GgmlType::S8 => {
            let block = &mut row[g * 34..g * 34 + 34];
            block[..2].copy_from_slice(&scales[2 * r..2 * r + 2]);
            for (q, &code) in block[2..].iter_mut().zip(codes) {
                *q = code as u8 ^ 0x80;
            }
        }
        GgmlType::S4 => {
            let block = &mut row[g * 18..g * 18 + 18];
            block[..2].copy_from_slice(&scales[2 * r..2 * r + 2]);
            for (j, q) in block[2..].iter_mut().enumerate() {
                *q = codes[j] as u8 | (codes[j + 16] as u8) << 4;
            }
        }
        _ => {
            for (bits, code) in row[g * GROUP * 2..]
                .as_chunks_mut::<2>()
                .0
                .iter_mut()
                .zip(codes)
            {
                *bits = code.to_le_bytes();
            }
        }
    }
}
