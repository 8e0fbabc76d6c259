//! Weight matrices and the encodings they are stored in.

use std::{
    io::{self, Write},
    ops::{Deref, Range},
};

use std::sync::Mutex;

use tegula_gguf::{
    Bytes, GgmlType,
    sparse::{self, Sparse, SparseError, unpack_strip},
};

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
    /// Strips without their zeros, see [`tegula_gguf::sparse`].
    Sparse16,
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
    /// Sparse bytes that contradict themselves.
    #[error(transparent)]
    Sparse(#[from] SparseError),
    /// Factors of another stack.
    #[error("{got} factors for a stack of {experts}")]
    Factors {
        /// Factors.
        got: usize,
        /// Matrices.
        experts: usize,
    },
    /// Matrices that don't make an addition to another.
    #[error("{factors} make no low-rank addition to {matrix}")]
    LowRank {
        /// The shapes of both.
        factors: String,
        /// The shape of the other one.
        matrix: String,
    },
    /// Sparse bytes of another matrix.
    #[error("sparse {found} where {wanted} was expected")]
    Other {
        /// Type and shape found.
        found: String,
        /// Type and shape asked for.
        wanted: String,
    },
}

enum Storage {
    Raw(Bytes),
    Strip16(Strips),
    /// Where each strip begins, in units of `sparse::ALIGN`, and where the last ends.
    Sparse16(Vec<u32>, Strips),
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
    /// One per expert, or none.
    factors: Vec<f32>,
    adapters: Vec<LowRank>,
}

/// An addition of low rank to a matrix, or to each of a stack: `W + scale · B A`. It is never
/// added up: products take it as `W x + B (scale · A x)`.
#[derive(Debug)]
pub struct LowRank {
    /// `[rank][k]`, or `[experts][rank][k]`.
    pub(crate) a: Weights,
    /// `[n][rank]`, or `[experts][n][rank]`.
    pub(crate) b: Weights,
    pub(crate) scale: f32,
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

    /// A sparse matrix as a GGUF file has it. All strips are checked: kernels trust them.
    ///
    /// # Errors
    /// When the bytes are another matrix's or contradict themselves.
    pub fn sparse(
        ty: GgmlType,
        n: usize,
        k: usize,
        experts: usize,
        bytes: Bytes,
        pool: &Pool,
    ) -> Result<Weights, WeightsError> {
        let sparse = Sparse::parse(&bytes)?;
        let h = *sparse.header();
        if (h.ty, h.n, h.k, h.experts) != (ty, n, k, experts) {
            let name = |ty, experts, n, k| format!("{ty} of {experts} x {n} x {k}");
            return Err(WeightsError::Other {
                found: name(h.ty, h.experts, h.n, h.k),
                wanted: name(ty, experts, n, k),
            });
        }
        let state = Mutex::new((0u64, None));
        let chunk = 64;
        pool.run(h.strips().div_ceil(chunk), &|task| {
            let strips = task * chunk..h.strips().min((task + 1) * chunk);
            let mut values = 0;
            let mut wrong = None;
            for s in strips {
                match sparse.check_strip(s) {
                    Ok(n) => values += n,
                    Err(e) => wrong = Some((s, e)),
                }
                if wrong.is_some() {
                    break;
                }
            }
            let mut state = state.lock().unwrap_or_else(|e| e.into_inner());
            state.0 += values;
            // The first one in order is named, whoever found it.
            if let Some((s, e)) = wrong
                && state.1.as_ref().is_none_or(|(first, _)| s < *first)
            {
                state.1 = Some((s, e));
            }
        });
        let (values, wrong) = state.into_inner().unwrap_or_else(|e| e.into_inner());
        if let Some((_, e)) = wrong {
            return Err(e.into());
        }
        sparse.check_values(values)?;
        let units = |at: usize| (at / sparse::ALIGN) as u32;
        let starts = (0..h.strips()).map(|s| units(sparse.range(s).start));
        let end = units(sparse.range(h.strips() - 1).end);
        let table = starts.chain([end]).collect();
        let at = h.strips_at();
        let len = bytes.len();
        let dense = ty.dense();
        let layout = strip::layout(dense).ok_or(WeightsError::Type(dense))?;
        let row_bytes = dense
            .bytes_for(k as u64)
            .ok_or(WeightsError::Ragged { ty: dense, k })? as usize;
        Ok(Weights {
            ty,
            n,
            k,
            experts,
            row_bytes,
            strip_bytes: layout.strip_bytes(k),
            layout,
            storage: Storage::Sparse16(table, Strips::Shared(bytes.slice(at..len))),
            factors: Vec::new(),
            adapters: Vec::new(),
        })
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
            Storage::Strip16(strips) | Storage::Sparse16(_, strips) => {
                (n.div_ceil(ROWS), strip_bytes, strips.len())
            }
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
            factors: Vec::new(),
            adapters: Vec::new(),
        })
    }

    /// Has all products with a matrix of the stack multiplied by its factor, before adapters are
    /// added. Look-ups of rows, copies of bytes and devices know nothing of it.
    ///
    /// # Errors
    /// When there are not as many factors as experts.
    pub fn scale_by(&mut self, factors: Vec<f32>) -> Result<(), WeightsError> {
        if factors.len() != self.experts {
            return Err(WeightsError::Factors {
                got: factors.len(),
                experts: self.experts,
            });
        }
        self.factors = factors;
        Ok(())
    }

    /// What products are multiplied by, per expert; empty: by nothing.
    pub fn factors(&self) -> &[f32] {
        &self.factors
    }

    /// Has all products with these weights add `scale · b (a x)`: `a` is `[experts][rank][k]`,
    /// `b` is `[experts][n][rank]`, with as many experts as there are here. Look-ups of rows, copies
    /// and devices know nothing of it.
    ///
    /// # Errors
    /// When the shapes are not those.
    pub fn adapt(&mut self, a: Weights, b: Weights, scale: f32) -> Result<(), WeightsError> {
        let shape = |w: &Weights| [w.experts, w.n, w.k];
        let rank = a.n;
        let fits = shape(&a) == [self.experts, rank, self.k]
            && shape(&b) == [self.experts, self.n, rank]
            && rank > 0;
        if !fits {
            return Err(WeightsError::LowRank {
                factors: format!("{a:?} and {b:?}"),
                matrix: format!("{self:?}"),
            });
        }
        self.adapters.push(LowRank { a, b, scale });
        Ok(())
    }

    /// What products add.
    pub(crate) fn adapters(&self) -> &[LowRank] {
        &self.adapters
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
            Storage::Sparse16(..) => Encoding::Sparse16,
        }
    }

    /// Bytes that the weights occupy, filling of the last strips included.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::Raw(b) => b.len(),
            Storage::Strip16(b) | Storage::Sparse16(_, b) => b.len(),
        }
    }

    /// Strips of one matrix.
    pub(crate) fn strips(&self) -> usize {
        self.n.div_ceil(ROWS)
    }

    /// Bytes of one strip; of sparse weights, when it is made dense.
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
    /// [`Weights::strip_bytes`] long while the encoding is raw. A sparse strip has
    /// [`crate::sparse::SLACK`] more bytes than it needs.
    pub(crate) fn strip<'a>(&'a self, expert: usize, s: usize, scratch: &'a mut [u8]) -> &'a [u8] {
        assert!(expert < self.experts && s < self.strips());
        match &self.storage {
            Storage::Strip16(b) => {
                let at = (expert * self.strips() + s) * self.strip_bytes;
                &b[at..at + self.strip_bytes]
            }
            Storage::Sparse16(table, b) => {
                let i = expert * self.strips() + s;
                let [at, end] = [i, i + 1].map(|i| table[i] as usize * sparse::ALIGN);
                &b[at..end + crate::sparse::SLACK]
            }
            Storage::Raw(b) => {
                self.pack_strip(b, expert, s, scratch);
                scratch
            }
        }
    }

    /// The same weights as strips in memory of their own, without adapters; sparse ones stay
    /// sparse. Lossless: [`Weights::unpack_raw`] is the inverse.
    pub fn pack(&self, pool: &Pool) -> Weights {
        if let Storage::Sparse16(table, b) = &self.storage {
            let mut out = AlignedBuf::zeroed(b.len());
            let dst = DisjointMut::new(&mut out);
            pool.run(b.len().div_ceil(HUGE), &|task| {
                let part = task * HUGE..b.len().min((task + 1) * HUGE);
                // SAFETY: each part is one task's.
                unsafe { dst.slice(part.clone()) }.copy_from_slice(&b[part]);
            });
            return Weights {
                storage: Storage::Sparse16(table.clone(), Strips::Own(out)),
                factors: self.factors.clone(),
                adapters: Vec::new(),
                ..*self
            };
        }
        let per = self.strips();
        let total = per * self.experts;
        let mut out = AlignedBuf::zeroed(total * self.strip_bytes);
        match &self.storage {
            Storage::Strip16(b) | Storage::Sparse16(_, b) => out.copy_from_slice(b),
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
            factors: self.factors.clone(),
            adapters: Vec::new(),
            ..*self
        }
    }

    /// The raw bytes of row `row` of matrix `expert`, of a sparse one those of its dense twin,
    /// into `dst`.
    ///
    /// # Panics
    /// When the row does not exist or `dst` is no raw row long
    /// (`ty().dense().bytes_for(k())`).
    pub fn read_row(&self, expert: usize, row: usize, dst: &mut [u8]) {
        assert!(expert < self.experts && row < self.n && dst.len() == self.row_bytes);
        match &self.storage {
            Storage::Raw(b) => dst.copy_from_slice(self.raw_row(b, expert, row)),
            Storage::Strip16(b) => {
                let at = (expert * self.strips() + row / ROWS) * self.strip_bytes;
                let strip = &b[at..at + self.strip_bytes];
                strip::unpack_row(self.layout, self.k, strip, row % ROWS, dst);
            }
            Storage::Sparse16(..) => {
                let rows = self.sparse_rows(expert, row / ROWS);
                let at = row % ROWS * self.row_bytes;
                dst.copy_from_slice(&rows[at..at + self.row_bytes]);
            }
        }
    }

    /// The dense rows of a sparse strip.
    fn sparse_rows(&self, expert: usize, s: usize) -> Vec<u8> {
        let mut out = vec![0; self.strip_rows(s).len() * self.row_bytes];
        let mut rows: Vec<_> = out.chunks_exact_mut(self.row_bytes.max(1)).collect();
        let strip = self.strip(expert, s, &mut []);
        unpack_strip(self.ty, self.k, strip, &mut rows);
        out
    }

    /// Writes the strips, [`Weights::bytes`] of them, for [`Weights::from_strips`]. They are
    /// no rows: nothing but that reads them.
    ///
    /// # Errors
    /// What the writer says, and `InvalidInput` for weights that are not packed, or sparse.
    pub fn write_strips(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.storage {
            Storage::Strip16(strips) => out.write_all(strips),
            Storage::Raw(_) | Storage::Sparse16(..) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The file's bytes again; of sparse weights, those of their dense twin.
    pub fn unpack_raw(&self, pool: &Pool) -> Vec<u8> {
        let mut out = vec![0; self.experts * self.n * self.row_bytes];
        let dst = DisjointMut::new(&mut out);
        pool.run(self.experts * self.strips(), &|task| {
            let (expert, s) = (task / self.strips(), task % self.strips());
            if self.encoding() == Encoding::Sparse16 {
                let rows = self.sparse_rows(expert, s);
                let at = (expert * self.n + s * ROWS) * self.row_bytes;
                // SAFETY: each strip's rows are one task's.
                unsafe { dst.slice(at..at + rows.len()) }.copy_from_slice(&rows);
                return;
            }
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
