//! Sparse tensors: the rows of a dense type without their zeros.
//!
//! GGUF knows no tensor whose size does not follow from its type and shape, so a sparse tensor
//! is written as a one-dimensional `I8` tensor under its own name, and the model's metadata
//! lists it: `tegula.sparse.version` and `tegula.sparse.tensors`. [`crate::Gguf`] shows it
//! with its real type and shape. `docs/sparse-format.md` describes the bytes for other
//! programs; this module is their definition.
//!
//! # The bytes of a tensor
//!
//! A [header](Header) of 64 bytes, a table of `strips + 1` u32 (where each strip begins and
//! the last one ends, in units of 64 bytes from the end of the table), zero bytes up to a
//! multiple of 64, the strips, 64 zero bytes. A strip is 16 consecutive rows (outputs) of one
//! matrix; the last strip of a matrix has rows without values behind the last. Strips of a
//! stack of matrices follow one another, matrix after matrix.
//!
//! # The bytes of a strip
//!
//! A strip is cut along k (inputs) into groups of 32 inputs, and these into super-blocks of up
//! to 16 groups. A super-block is the heads of its groups, then all its values. The head of a
//! group is, for `S8` and `S4`, the 16 f16 scales of its rows, and for all types a bitmap of
//! 512 bits, one per weight, set where the weight has a value. Bits are numbered by *steps*
//! of `w` inputs, where `w` is 4 for `S8` and `S4` and 2 for `S-BF16`: bit
//! `16·w·step + w·row + input in step`, least significant bit of the first byte first. So a
//! step's bits are one machine word whose order is the one in which dot products of 16 rows
//! want their weights.
//!
//! Values stand in the order of their bits: `S-BF16` as the two bytes they are, `S8` as a
//! byte, the code with its top bit flipped (128 stands for zero), `S4` as a nibble 0…15 (8
//! stands for zero). Of an S4 super-block of `G` groups the low nibbles hold the values of the
//! first `⌈G/2⌉` groups and the high nibbles those of the others; nibbles without value are 0.
//! The last super-block is followed by zero bytes up to a multiple of 64.
//!
//! # What is lossless
//!
//! Without value are exactly: `Q8_0` weights of code 0, `Q4_0` weights of nibble 8, and `BF16`
//! weights +0.0 (−0.0 has a value). Scales are kept as they are. So [`unpack_strip`] gives the
//! dense rows bit for bit.
//!
//! With a [`Pattern`] N:M every M consecutive inputs of every row have exactly N values, zeros
//! among them where there are not as many others: then all strips have the same length.

mod file;
mod strip;

use std::{fmt, ops::Range, str::FromStr};

pub use file::{
    Converted, SparseProgress, Sparsify, Worth, dense_data, densify, pack_tensor, sparsify, worth,
};
pub use strip::{bitmap, build_strip, check_strip, pack_strip, packed_strip, unpack_strip};

use crate::GgmlType;

/// The version of the format that is written, and the newest that is read.
pub const VERSION: u32 = 1;
/// Metadata key of the version.
pub const VERSION_KEY: &str = "tegula.sparse.version";
/// Metadata key of the names of the sparse tensors.
pub const TENSORS_KEY: &str = "tegula.sparse.tensors";

/// Rows of a strip.
pub const ROWS: usize = 16;
/// Inputs of a group.
pub const GROUP: usize = 32;
/// Groups of a whole super-block.
pub const SUPER: usize = 16;
/// Bytes of a group's bitmap.
pub const BITMAP: usize = ROWS * GROUP / 8;
/// Strips begin at multiples of this, and so many zero bytes follow the last one: kernels may
/// read so far beyond a strip.
pub const ALIGN: usize = 64;

const MAGIC: &[u8; 8] = b"TGSPARSE";
const HEADER: usize = 64;

/// Why sparse bytes could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SparseError {
    /// The tensor does not begin like one.
    #[error("is listed as sparse and does not begin with a sparse header")]
    Foreign,
    /// A newer program wrote it.
    #[error(
        "sparse format version {0} is newer than {VERSION}, the newest that this build reads; update tegula, or use a dense file of the model"
    )]
    Newer(u32),
    /// A field of the header has no meaning.
    #[error("sparse header: {0}")]
    Header(String),
    /// The bytes end early.
    #[error("truncated: {what} needs {needed} bytes, {available} are there")]
    Truncated {
        what: &'static str,
        needed: u64,
        available: u64,
    },
    /// Strips do not follow one another.
    #[error("table of strips: {0}")]
    Table(String),
    /// A strip contradicts itself.
    #[error("strip {strip}: {what}")]
    Strip { strip: usize, what: String },
    /// The header counts other values than the bitmaps.
    #[error("the bitmaps count {found} values, the header {said}")]
    Values { said: u64, found: u64 },
    /// Type or shape of a tensor that can't be sparse.
    #[error("{0}")]
    Shape(String),
    /// A row has more values than its pattern allows.
    #[error("row {row}: more than {pattern} values from input {input} on")]
    Pattern {
        pattern: Pattern,
        row: usize,
        input: usize,
    },
}

/// `Result` with [`SparseError`].
pub type Result<T, E = SparseError> = std::result::Result<T, E>;

/// N values in every M consecutive inputs of a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pattern {
    n: u8,
    m: u8,
}

impl Pattern {
    /// `n` of `m`; `m` is 2, 4, 8, 16 or 32 and `n` less.
    pub fn new(n: u8, m: u8) -> Option<Pattern> {
        let fits = matches!(m, 2 | 4 | 8 | 16 | 32) && n > 0 && n < m;
        fits.then_some(Pattern { n, m })
    }

    /// Values per [`Pattern::m`] inputs.
    pub const fn n(self) -> usize {
        self.n as usize
    }

    /// Inputs that [`Pattern::n`] values belong to.
    pub const fn m(self) -> usize {
        self.m as usize
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.n, self.m)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(s: &str) -> Result<Pattern, String> {
        let parts = s.split_once(':');
        let parsed = parts.and_then(|(n, m)| Pattern::new(n.parse().ok()?, m.parse().ok()?));
        parsed.ok_or_else(|| {
            format!("`{s}` is no pattern N:M with M of 2, 4, 8, 16 or 32 and N from 1 to M - 1, such as 2:4")
        })
    }
}

/// What a sparse tensor says of itself: `TGSPARSE`; u16 version; u8 type (1 `S-BF16`, 2 `S8`,
/// 3 `S4`); u8 dimensions, 2 or 3; u8 N, u8 M, or zeros; u16 zero; u64 inputs; u64 rows of a
/// matrix; u64 matrices; u64 values; 16 zero bytes. Numbers are little-endian.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// A type of [`GgmlType::SPARSE`].
    pub ty: GgmlType,
    /// Inputs: weights per row.
    pub k: usize,
    /// Outputs: rows of one matrix.
    pub n: usize,
    /// Matrices in the stack.
    pub experts: usize,
    /// 2, or 3 for a stack.
    pub dims: u8,
    /// Values per inputs, if they are the same everywhere.
    pub pattern: Option<Pattern>,
    /// Weights that have a value.
    pub values: u64,
}

impl Header {
    /// Of a tensor of `shape` (ggml's order) whose values are still to be counted.
    ///
    /// # Errors
    /// [`SparseError::Shape`] for a type that is not sparse, other than two or three
    /// dimensions, rows that are no whole blocks or groups of the pattern.
    pub fn new(ty: GgmlType, shape: &[u64], pattern: Option<Pattern>) -> Result<Header> {
        let bad = |what: String| Err(SparseError::Shape(what));
        if !ty.is_sparse() {
            return bad(format!("{ty} is no sparse type"));
        }
        let extent = |i: usize| shape.get(i).copied().unwrap_or(1);
        let (k, n, experts) = (extent(0), extent(1), extent(2));
        if !matches!(shape.len(), 2 | 3) || k == 0 || n == 0 || experts == 0 {
            return bad(format!("a tensor of shape {shape:?} can't be sparse"));
        }
        let block = pattern.map_or(1, Pattern::m).max(ty.block_len()).max(1) as u64;
        if !k.is_multiple_of(block) {
            return bad(format!("rows of {k} are no multiple of {block}"));
        }
        // So bounded, no size below overflows.
        let weights = k.checked_mul(n).and_then(|w| w.checked_mul(experts));
        if weights.is_none_or(|w| w > 1 << 48) || n > 1 << 40 {
            return bad(format!("shape {shape:?} has too many weights"));
        }
        Ok(Header {
            ty,
            k: k as usize,
            n: n as usize,
            experts: experts as usize,
            dims: shape.len() as u8,
            pattern,
            values: 0,
        })
    }

    /// In ggml's order.
    pub fn shape(&self) -> Vec<u64> {
        let all = [self.k as u64, self.n as u64, self.experts as u64];
        all[..usize::from(self.dims)].to_vec()
    }

    /// Strips of all matrices.
    pub fn strips(&self) -> usize {
        self.experts * self.n.div_ceil(ROWS)
    }

    /// The rows, counted through all matrices, of a strip: at most 16.
    pub fn rows_of(&self, strip: usize) -> Range<usize> {
        let per = self.n.div_ceil(ROWS);
        let (expert, s) = (strip / per, strip % per);
        let start = expert * self.n;
        start + s * ROWS..start + self.n.min((s + 1) * ROWS)
    }

    /// Bytes before the first strip.
    pub fn strips_at(&self) -> usize {
        (HEADER + 4 * (self.strips() + 1)).next_multiple_of(ALIGN)
    }

    /// Header and table of a tensor with strips of these lengths, up to the first strip.
    ///
    /// # Errors
    /// [`SparseError::Table`] when they take more than the table can say, 256 GiB.
    pub fn encode(&self, lengths: &[usize]) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(self.strips_at());
        out.extend(MAGIC);
        out.extend((VERSION as u16).to_le_bytes());
        out.push(kind(self.ty));
        out.push(self.dims);
        let (n, m) = self.pattern.map_or((0, 0), |p| (p.n, p.m));
        out.extend([n, m, 0, 0]);
        for x in [self.k, self.n, self.experts] {
            out.extend((x as u64).to_le_bytes());
        }
        out.extend(self.values.to_le_bytes());
        out.resize(HEADER, 0);
        let mut at = 0u32;
        out.extend(at.to_le_bytes());
        for &len in lengths {
            let units = u32::try_from(len / ALIGN).ok();
            at = units
                .and_then(|units| at.checked_add(units))
                .ok_or_else(|| SparseError::Table("the tensor takes more than 256 GiB".into()))?;
            out.extend(at.to_le_bytes());
        }
        out.resize(self.strips_at(), 0);
        Ok(out)
    }

    fn decode(bytes: &[u8]) -> Result<Header> {
        if bytes.len() < HEADER {
            return Err(SparseError::Truncated {
                what: "the sparse header",
                needed: HEADER as u64,
                available: bytes.len() as u64,
            });
        }
        if &bytes[..8] != MAGIC {
            return Err(SparseError::Foreign);
        }
        let bad = |what: String| Err(SparseError::Header(what));
        let version = u32::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        if version > VERSION {
            return Err(SparseError::Newer(version));
        }
        if version == 0 {
            return bad("version 0".into());
        }
        let Some(&ty) = GgmlType::SPARSE.iter().find(|&&t| kind(t) == bytes[10]) else {
            return bad(format!("unknown type {}", bytes[10]));
        };
        let dims = bytes[11];
        if !matches!(dims, 2 | 3) {
            return bad(format!("{dims} dimensions"));
        }
        let pattern = match (bytes[12], bytes[13]) {
            (0, 0) => None,
            (n, m) => match Pattern::new(n, m) {
                None => return bad(format!("pattern {n}:{m}")),
                some => some,
            },
        };
        if bytes[14..16].iter().chain(&bytes[48..64]).any(|&b| b != 0) {
            return bad("reserved bytes are not zero".into());
        }
        let number = |at: usize| {
            let mut x = [0; 8];
            x.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(x)
        };
        let shape = [number(16), number(24), number(32)];
        if dims == 2 && shape[2] != 1 {
            return bad(format!("two dimensions and {} matrices", shape[2]));
        }
        let mut header = Header::new(ty, &shape[..usize::from(dims)], pattern)?;
        header.values = number(40);
        Ok(header)
    }

    /// Weights that have a value, of all.
    pub fn density(&self) -> f64 {
        // With a pattern rows that only fill the last strip have values, too.
        if let Some(p) = self.pattern {
            return p.n() as f64 / p.m() as f64;
        }
        let all = self.k as f64 * self.n as f64 * self.experts as f64;
        self.values as f64 / all
    }
}

fn kind(ty: GgmlType) -> u8 {
    (ty.id() & 0xff) as u8
}

/// A sparse tensor's bytes, of which header and table hold.
#[derive(Clone, Copy, Debug)]
pub struct Sparse<'a> {
    header: Header,
    table: &'a [[u8; 4]],
    strips: &'a [u8],
}

impl<'a> Sparse<'a> {
    /// Reads header and table. What strips hold is for [`Sparse::check`] to see.
    ///
    /// # Errors
    /// [`SparseError`], with what is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Sparse<'a>> {
        let header = Header::decode(bytes)?;
        let truncated = |what, needed: u64| SparseError::Truncated {
            what,
            needed,
            available: bytes.len() as u64,
        };
        let strips = header.strips();
        // Not `strips_at` yet: it could overflow what a usize of 32 bits holds.
        let table_end = HEADER as u64 + 4 * (strips as u64 + 1);
        if table_end > bytes.len() as u64 {
            return Err(truncated("the table of strips", table_end));
        }
        let (table, _) = bytes[HEADER..table_end as usize].as_chunks::<4>();
        let at = |i: usize| u64::from(u32::from_le_bytes(table[i])) * ALIGN as u64;
        if at(0) != 0 {
            return Err(SparseError::Table("the first strip is not at 0".into()));
        }
        if let Some(i) = (0..strips).find(|&i| at(i) > at(i + 1)) {
            return Err(SparseError::Table(format!(
                "strip {i} ends before it begins"
            )));
        }
        let want = header.strips_at() as u64 + at(strips) + ALIGN as u64;
        if want > bytes.len() as u64 {
            return Err(truncated("the tensor with all its strips", want));
        }
        if want < bytes.len() as u64 {
            let more = bytes.len() as u64 - want;
            return Err(SparseError::Table(format!(
                "{more} bytes behind the last strip"
            )));
        }
        Ok(Sparse {
            header,
            table,
            strips: &bytes[header.strips_at()..],
        })
    }

    /// Type, shape and counts.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where strip `i` lies among the strips.
    ///
    /// # Panics
    /// When there is no such strip.
    pub fn range(&self, i: usize) -> Range<usize> {
        let at = |i: usize| u32::from_le_bytes(self.table[i]) as usize * ALIGN;
        at(i)..at(i + 1)
    }

    /// The bytes of strip `i`.
    ///
    /// # Panics
    /// When there is no such strip.
    pub fn strip(&self, i: usize) -> &'a [u8] {
        &self.strips[self.range(i)]
    }

    /// Checks one strip and returns the number of its values.
    ///
    /// # Errors
    /// [`SparseError::Strip`].
    ///
    /// # Panics
    /// When there is no such strip.
    pub fn check_strip(&self, i: usize) -> Result<u64> {
        check_strip(&self.header, self.strip(i))
            .map_err(|what| SparseError::Strip { strip: i, what })
    }

    /// Compares the values that strips were found to have with the header.
    ///
    /// # Errors
    /// [`SparseError::Values`].
    pub fn check_values(&self, found: u64) -> Result<()> {
        let said = self.header.values;
        match found == said {
            true => Ok(()),
            false => Err(SparseError::Values { said, found }),
        }
    }

    /// Checks all strips: afterwards any reader of them stays inside the bytes.
    ///
    /// # Errors
    /// [`SparseError`], with the strip and what is wrong.
    pub fn check(&self) -> Result<()> {
        let mut values = 0;
        for i in 0..self.header.strips() {
            values += self.check_strip(i)?;
        }
        self.check_values(values)
    }
}

/// The super-blocks of rows of `k` inputs: first group and groups of each.
pub fn supers(k: usize) -> impl Iterator<Item = (usize, usize)> {
    let groups = k.div_ceil(GROUP);
    (0..groups)
        .step_by(SUPER)
        .map(move |g| (g, SUPER.min(groups - g)))
}

/// Bytes of a group's head: scales and bitmap.
pub const fn head_bytes(ty: GgmlType) -> usize {
    match ty {
        GgmlType::S_BF16 => BITMAP,
        _ => 2 * ROWS + BITMAP,
    }
}
