//! Weight matrices and the encodings they are stored in.

use std::{
    io::{self, Write},
    ops::{Deref, Range},
};

use tegula_gguf::{Bytes, GgmlType};

use crate::{
    disjoint::DisjointMut,
    mem::{AlignedBuf, HUGE},
    pool::Pool,
    strip::{self, Layout, ROWS},
};

/// How a matrix lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Encoding {
    /// The file's rows.
    Raw,
    /// Strips of 16 interleaved rows, see [`crate::strip`].
    Strip16,
}

/// Why weights were refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// No matrix product takes the type.
    #[error("no matrix product takes {0} weights")]
    Type(GgmlType),
    /// Rows are not whole blocks.
    #[error("{ty} rows of {k} weights are no whole number of blocks of {}", ty.block_len())]
    Ragged {
        /// The type.
        ty: GgmlType,
        /// Weights per row.
        k: usize,
    },
    /// The bytes given are not the matrix.
    #[error("{ty} matrix of {experts} x {n} x {k} needs {want:?} bytes, got {got}")]
    Size {
        /// The type.
        ty: GgmlType,
        /// Matrices.
        experts: usize,
        /// Rows.
        n: usize,
        /// Weights per row.
        k: usize,
        /// Bytes that the shape needs; `None` if more than the address space.
        want: Option<usize>,
        /// Bytes given.
        got: usize,
    },
}

enum Storage {
    Raw(Bytes),
    Strip16(Strips),
}

/// Whose memory strips lie in.
enum Strips {
    /// Packed here.
    Own(AlignedBuf),
    /// Packed earlier: pages of a file.
    Shared(Bytes),
}

impl Deref for Strips {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Strips::Own(buf) => buf,
            Strips::Shared(bytes) => bytes,
        }
    }
}

/// One `[n][k]` matrix, or a stack of them (`experts`), in one of the encodings.
pub struct Weights {
    ty: GgmlType,
    n: usize,
    k: usize,
    experts: usize,
    row_bytes: usize,
    strip_bytes: usize,
    layout: &'static Layout,
    storage: Storage,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Weights {
            ty, n, k, experts, ..
        } = self;
        write!(f, "Weights({ty} {experts}x{n}x{k} {:?})", self.encoding())
    }
}

impl Weights {
    /// A matrix as a GGUF file has it: `experts * n` rows of `k` weights.
    ///
    /// # Errors
    /// When no product takes the type, rows are no whole blocks, or the size is wrong.
    pub fn raw(
        ty: GgmlType,
        n: usize,
        k: usize,
        experts: usize,
        bytes: Bytes,
    ) -> Result<Weights, WeightsError> {
        Weights::new(ty, n, k, experts, Storage::Raw(bytes))
    }

    /// A matrix that was packed earlier: what [`Weights::write_strips`] wrote.
    ///
    /// # Errors
    /// As [`Weights::raw`].
    pub fn from_strips(
        ty: GgmlType,
        n: usize,
        k: usize,
        experts: usize,
        bytes: Bytes,
    ) -> Result<Weights, WeightsError> {
        let storage = Storage::Strip16(Strips::Shared(bytes));
        Weights::new(ty, n, k, experts, storage)
    }

    fn new(
        ty: GgmlType,
        n: usize,
        k: usize,
        experts: usize,
        storage: Storage,
    ) -> Result<Weights, WeightsError> {
        let layout = strip::layout(ty).ok_or(WeightsError::Type(ty))?;
        let row_bytes = ty
            .bytes_for(k as u64)
            .ok_or(WeightsError::Ragged { ty, k })? as usize;
        let strip_bytes = layout.strip_bytes(k);
        let (units, unit_bytes, got) = match &storage {
            Storage::Raw(bytes) => (n, row_bytes, bytes.len()),
            Storage::Strip16(strips) => (n.div_ceil(ROWS), strip_bytes, strips.len()),
        };
        let units = units.checked_mul(experts);
        let want = units.and_then(|units| units.checked_mul(unit_bytes));
        if want != Some(got) {
            return Err(WeightsError::Size {
                ty,
                experts,
                n,
                k,
                want,
                got,
            });
        }
        Ok(Weights {
            ty,
            n,
            k,
            experts,
            row_bytes,
            strip_bytes,
            layout,
            storage,
        })
    }

    /// The weights' type.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Rows (outputs) of one matrix.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Weights per row (inputs).
    pub fn k(&self) -> usize {
        self.k
    }

    /// Matrices in the stack; 1 for a plain one.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The encoding.
    pub fn encoding(&self) -> Encoding {
        match self.storage {
            Storage::Raw(_) => Encoding::Raw,
            Storage::Strip16(_) => Encoding::Strip16,
        }
    }

    /// Bytes that the weights occupy, filling of the last strips included.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::Raw(b) => b.len(),
            Storage::Strip16(b) => b.len(),
        }
    }

    /// Strips of one matrix.
    pub(crate) fn strips(&self) -> usize {
        self.n.div_ceil(ROWS)
    }

    /// Bytes of one strip.
    pub(crate) fn strip_bytes(&self) -> usize {
        self.strip_bytes
    }

    /// The rows of strip `s`.
    fn strip_rows(&self, s: usize) -> Range<usize> {
        s * ROWS..self.n.min((s + 1) * ROWS)
    }

    fn raw_row<'a>(&self, bytes: &'a [u8], expert: usize, row: usize) -> &'a [u8] {
        let at = (expert * self.n + row) * self.row_bytes;
        &bytes[at..at + self.row_bytes]
    }

    fn pack_strip(&self, bytes: &[u8], expert: usize, s: usize, dst: &mut [u8]) {
        let mut rows: [&[u8]; ROWS] = [&[]; ROWS];
        let range = self.strip_rows(s);
        let count = range.len();
        for (slot, row) in rows.iter_mut().zip(range) {
            *slot = self.raw_row(bytes, expert, row);
        }
        strip::pack_strip(self.layout, self.k, &rows[..count], dst);
    }

    /// The strip `s` of matrix `expert`: where it lies, or packed into `scratch`.
    ///
    /// # Panics
    /// When the strip or the matrix does not exist, or `scratch` is not
    /// [`Weights::strip_bytes`] long while the encoding is raw.
    pub(crate) fn strip<'a>(&'a self, expert: usize, s: usize, scratch: &'a mut [u8]) -> &'a [u8] {
        assert!(expert < self.experts && s < self.strips());
        match &self.storage {
            Storage::Strip16(b) => {
                let at = (expert * self.strips() + s) * self.strip_bytes;
                &b[at..at + self.strip_bytes]
            }
            Storage::Raw(b) => {
                self.pack_strip(b, expert, s, scratch);
                scratch
            }
        }
    }

    /// The same weights as strips. Lossless: [`Weights::unpack_raw`] is the inverse.
    pub fn pack(&self, pool: &Pool) -> Weights {
        let per = self.strips();
        let total = per * self.experts;
        let mut out = AlignedBuf::zeroed(total * self.strip_bytes);
        match &self.storage {
            Storage::Strip16(b) => out.copy_from_slice(b),
            Storage::Raw(b) => {
                // A few hundred KiB per task: enough to hide the counter, little enough to
                // balance.
                let chunk = (256 * 1024 / self.strip_bytes.max(1)).clamp(1, total.max(1));
                // Who writes to a fresh huge page first has the kernel clear it; others who
                // come meanwhile have one cleared in vain. So threads begin in different pages.
                let per_page = (HUGE / (chunk * self.strip_bytes).max(1)).max(1);
                let pages = total.div_ceil(chunk * per_page);
                let dst = DisjointMut::new(&mut out);
                pool.run(pages * per_page, &|task| {
                    let part = task % pages * per_page + task / pages;
                    for i in part * chunk..total.min((part + 1) * chunk) {
                        // SAFETY: each strip is packed by one task only.
                        let strip =
                            unsafe { dst.slice(i * self.strip_bytes..(i + 1) * self.strip_bytes) };
                        self.pack_strip(b, i / per, i % per, strip);
                    }
                });
            }
        }
        Weights {
            storage: Storage::Strip16(Strips::Own(out)),
            ..*self
        }
    }

    /// The raw bytes of row `row` of matrix `expert`, into `dst`.
    ///
    /// # Panics
    /// When the row does not exist or `dst` is no raw row long
    /// (`ty().bytes_for(k())`).
    pub fn read_row(&self, expert: usize, row: usize, dst: &mut [u8]) {
        assert!(expert < self.experts && row < self.n && dst.len() == self.row_bytes);
        match &self.storage {
            Storage::Raw(b) => dst.copy_from_slice(self.raw_row(b, expert, row)),
            Storage::Strip16(b) => {
                let at = (expert * self.strips() + row / ROWS) * self.strip_bytes;
                let strip = &b[at..at + self.strip_bytes];
                strip::unpack_row(self.layout, self.k, strip, row % ROWS, dst);
            }
        }
    }

    /// Writes the strips, [`Weights::bytes`] of them, for [`Weights::from_strips`]. They are
    /// no rows: nothing but that reads them.
    ///
    /// # Errors
    /// What the writer says, and `InvalidInput` for weights that are not packed.
    pub fn write_strips(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.storage {
            Storage::Strip16(strips) => out.write_all(strips),
            Storage::Raw(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The file's bytes again.
    pub fn unpack_raw(&self, pool: &Pool) -> Vec<u8> {
        let mut out = vec![0; self.experts * self.n * self.row_bytes];
        let dst = DisjointMut::new(&mut out);
        pool.run(self.experts * self.strips(), &|task| {
            let (expert, s) = (task / self.strips(), task % self.strips());
            for row in self.strip_rows(s) {
                let at = (expert * self.n + row) * self.row_bytes;
                // SAFETY: each row belongs to one strip, each strip to one task.
                let row_dst = unsafe { dst.slice(at..at + self.row_bytes) };
                self.read_row(expert, row, row_dst);
            }
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PoolConfig;

    #[test]
    fn unpacking_inverts_packing_by_several_threads() {
        let pool = Pool::new(PoolConfig::new(3));
        // Less than a task, less than a huge page, several pages, strips larger than tasks.
        for (n, k, experts) in [
            (5, 32, 1),
            (100, 4096, 1),
            (1999, 2080, 3),
            (70, 1 << 18, 1),
        ] {
            let ty = GgmlType::Q4_0;
            let len = ty.bytes_for(k as u64).unwrap() as usize * n * experts;
            let raw: Vec<u8> = (0..len as u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8)
                .collect();
            let weights = Weights::raw(ty, n, k, experts, Bytes::from_vec(raw.clone())).unwrap();
            let packed = weights.pack(&pool);
            assert_eq!(packed.encoding(), Encoding::Strip16);
            assert!(packed.unpack_raw(&pool) == raw, "{n} x {k} x {experts}");
            let mut strips = Vec::new();
            packed.write_strips(&mut strips).unwrap();
            assert!(weights.write_strips(&mut Vec::new()).is_err());
            let of = |len: usize| {
                let bytes = Bytes::from_vec(strips[..len].to_vec());
                Weights::from_strips(ty, n, k, experts, bytes)
            };
            let again = of(strips.len()).unwrap();
            assert_eq!(again.encoding(), Encoding::Strip16);
            assert!(again.unpack_raw(&pool) == raw, "{n} x {k} x {experts}");
            let short = of(strips.len() - 1).unwrap_err();
            assert!(matches!(short, WeightsError::Size { .. }), "{short}");
        }
    }
}
