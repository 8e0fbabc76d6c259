//! Devices with memory of their own: what the engine asks of a GPU.
//!
//! A [`Device`] is an address space, copies in and out of it, and the operations that a layer
//! needs. Buffers are opaque: nothing outside a device can read one but through
//! [`Device::read`]. Weights reach a device as [`RawMatrix`], the file's own bytes; packed
//! weights ([`crate::Weights`]) have no way there.
//!
//! Operations may run behind the caller's back, in order; [`Device::read`] and
//! [`Device::sync`] wait for them. [`sim::SimDevice`] is a device made of the scalar kernels,
//! to run placement, copies and faults without hardware.

pub mod sim;
pub mod stream;

use crate::{
    kv::{KvShape, PageTable},
    ops::{RopeStyle, RopeTable, Token, moe::RouteOptions},
    strip,
    weights::WeightsError,
};
use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tegula_gguf::{Bytes, GgmlType};

/// Alignment of what is allocated on a device; plans round to it.
pub const ALIGN: u64 = 256;

/// Tokens from which a dense matrix is decoded to bf16 as a whole and a device's library
/// multiplies it; fewer are faster with kernels that decode on the way. Reasoned, not yet
/// measured: the decoded matrix costs 4 bytes a weight of memory traffic, which is what 200 to
/// 250 tokens gain on an H100. Plans keep the memory for it.
pub const LIBRARY_FROM: usize = 256;

/// Bytes that such a library works in; what cuBLAS's guide recommends for Hopper.
pub const LIBRARY_WORKSPACE: usize = 32 << 20;

/// Why a device could not do something. Messages are lower-case fragments.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver is there and can't be used.
    #[error("{0}")]
    Unusable(String),
    /// Not enough memory.
    #[error("{device}: out of memory: {needed} bytes are needed and {free} of {total} are free")]
    OutOfMemory {
        device: String,
        needed: u64,
        free: u64,
        total: u64,
    },
    /// Memory of the host that a device could read can't be had.
    #[error("{device}: {needed} bytes of pinned memory can't be had: {cause}")]
    Pinned {
        device: String,
        needed: u64,
        cause: String,
    },
    /// A matrix that the device has no kernel for, or of the wrong size.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// An operation failed; the device may be lost.
    #[error("{device}: {operation} failed: {cause}")]
    Failed {
        device: String,
        operation: &'static str,
        cause: String,
    },
}

/// `Result` with [`DeviceError`].
pub type Result<T, E = DeviceError> = std::result::Result<T, E>;

/// What a device is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// As flags name it: `CUDA0`.
    pub name: String,
    /// As its maker names it.
    pub description: String,
    /// Bytes of memory.
    pub total: u64,
    /// Bytes that can be allocated now.
    pub free: u64,
}

/// Bytes as devices allocate them.
pub fn rounded(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(ALIGN)
}

/// A device's bytes, counted.
#[derive(Debug)]
pub struct Budget {
    device: String,
    total: u64,
    used: AtomicU64,
}

impl Budget {
    /// `total` bytes of the device of that name.
    pub fn new(device: &str, total: u64) -> Budget {
        Budget {
            device: device.to_owned(),
            total,
            used: AtomicU64::new(0),
        }
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that can be taken.
    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.used())
    }

    /// Takes bytes, rounded.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] when fewer are left.
    pub fn take(&self, bytes: usize) -> Result<()> {
        let needed = rounded(bytes);
        let fits = |used: u64| used.checked_add(needed).filter(|sum| *sum <= self.total);
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        match taken {
            Ok(_) => Ok(()),
            Err(used) => Err(DeviceError::OutOfMemory {
                device: self.device.clone(),
                needed,
                free: self.total - used,
                total: self.total,
            }),
        }
    }

    /// Gives back what was taken.
    pub fn give(&self, bytes: usize) {
        self.used.fetch_sub(rounded(bytes), Ordering::Relaxed);
    }
}

/// Who gets a buffer's memory back.
pub trait Memory: Send + Sync {
    /// Frees what was allocated at `address`.
    fn free(&self, address: u64, bytes: usize);
}

/// Memory on a device, or of the host for a device, freed when dropped.
pub struct Buffer {
    address: u64,
    bytes: usize,
    pinned: bool,
    memory: Arc<dyn Memory>,
}

/// What a part of a buffer keeps.
struct Whole {
    _buffer: Arc<Buffer>,
}

impl Memory for Whole {
    fn free(&self, _: u64, _: usize) {}
}

impl Buffer {
    /// For devices: a buffer of memory that they allocated.
    pub fn new(address: u64, bytes: usize, memory: Arc<dyn Memory>) -> Buffer {
        Buffer {
            address,
            bytes,
            pinned: false,
            memory,
        }
    }

    /// The same of the host's memory: what [`Device::pin`] gives.
    pub fn pinned(address: u64, bytes: usize, memory: Arc<dyn Memory>) -> Buffer {
        let mut buffer = Buffer::new(address, bytes, memory);
        buffer.pinned = true;
        buffer
    }

    /// A part of a buffer, which stays as long as its parts.
    ///
    /// # Panics
    /// When the buffer is shorter.
    pub fn part(whole: &Arc<Buffer>, at: usize, bytes: usize) -> Buffer {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= whole.bytes));
        Buffer {
            address: whole.address + at as u64,
            bytes,
            pinned: whole.pinned,
            memory: Arc::new(Whole {
                _buffer: Arc::clone(whole),
            }),
        }
    }

    /// True for the host's memory.
    pub fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// The device's own name for the place; not a pointer here.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes that may be used.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.free(self.address, self.bytes);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

/// A matrix, or a stack of them, as a file has it: the only weights that a device takes.
#[derive(Clone, Debug)]
pub struct RawMatrix {
    ty: GgmlType,
    n: usize,
    k: usize,
    experts: usize,
    bytes: Bytes,
}

impl RawMatrix {
    /// `experts * n` rows of `k` weights.
    ///
    /// # Errors
    /// When no product takes the type, rows are no whole blocks, or the size is wrong.
    pub fn new(
        ty: GgmlType,
        n: usize,
        k: usize,
        experts: usize,
        bytes: Bytes,
    ) -> Result<RawMatrix, WeightsError> {
        // The checks are those of weights for the CPU.
        crate::Weights::raw(ty, n, k, experts, bytes.clone())?;
        Ok(RawMatrix {
            ty,
            n,
            k,
            experts,
            bytes,
        })
    }

    /// These rows of each matrix.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn rows(&self, rows: Range<usize>) -> RawMatrix {
        self.part(rows, 0..self.k)
    }

    /// These columns of each matrix: whole blocks.
    ///
    /// # Panics
    /// When there are fewer, or blocks would be divided.
    pub fn columns(&self, columns: Range<usize>) -> RawMatrix {
        self.part(0..self.n, columns)
    }

    fn part(&self, rows: Range<usize>, columns: Range<usize>) -> RawMatrix {
        assert!(rows.end <= self.n && columns.end <= self.k);
        let (block, len) = (self.ty.block_bytes(), self.ty.block_len());
        assert!(columns.start.is_multiple_of(len) && columns.end.is_multiple_of(len));
        let row = self.k / len * block;
        let part = columns.start / len * block..columns.end / len * block;
        let mut bytes = Vec::with_capacity(self.experts * rows.len() * part.len());
        for expert in 0..self.experts {
            for n in rows.clone() {
                let at = (expert * self.n + n) * row;
                bytes.extend_from_slice(&self.bytes[at + part.start..at + part.end]);
            }
        }
        RawMatrix {
            ty: self.ty,
            n: rows.len(),
            k: columns.len(),
            experts: self.experts,
            bytes: Bytes::from_vec(bytes),
        }
    }

    /// The type.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Rows (outputs) of one matrix.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Weights per row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Matrices in the stack.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes on a device.
    pub fn device_bytes(&self) -> usize {
        let bytes = matrix_bytes(self.ty, self.n as u64, self.k as u64, self.experts as u64);
        bytes.expect("a matrix that was checked") as usize
    }
}

/// A matrix, or a stack of them, on a device.
#[derive(Debug)]
pub struct Matrix {
    pub ty: GgmlType,
    /// Rows (outputs) of one matrix.
    pub n: usize,
    /// Weights per row (inputs).
    pub k: usize,
    pub experts: usize,
    /// In the order of [`planes`].
    pub buffer: Buffer,
}

/// One field of a block: `len` bytes at `at`. On a device equal fields of all blocks stand
/// together, so that neighbouring threads read neighbouring bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plane {
    pub at: usize,
    pub len: usize,
}

/// The planes of a type in the order in which they lie on a device: codes first.
///
/// # Panics
/// For types that no product takes.
pub fn planes(ty: GgmlType) -> &'static [Plane] {
    use GgmlType as T;
    macro_rules! planes {
        ($(($at:expr, $len:expr)),*) => { &[$(Plane { at: $at, len: $len }),*] };
    }
    match ty {
        T::F32 => planes![(0, 4)],
        T::F16 | T::BF16 => planes![(0, 2)],
        T::Q4_0 | T::IQ4_NL => planes![(2, 16), (0, 2)],
        T::Q4_1 => planes![(4, 16), (0, 4)],
        T::Q5_0 => planes![(6, 16), (2, 4), (0, 2)],
        T::Q5_1 => planes![(8, 16), (4, 4), (0, 4)],
        T::Q8_0 => planes![(2, 32), (0, 2)],
        T::MXFP4 => planes![(1, 16), (0, 1)],
        T::NVFP4 => planes![(4, 32), (0, 4)],
        T::Q2_K => planes![(16, 64), (0, 16), (80, 4)],
        T::Q3_K => planes![(32, 64), (0, 32), (96, 12), (108, 2)],
        T::Q4_K => planes![(16, 128), (0, 16)],
        T::Q5_K => planes![(48, 128), (16, 32), (0, 16)],
        T::Q6_K => planes![(0, 128), (128, 64), (192, 16), (208, 2)],
        T::IQ4_XS => planes![(8, 128), (0, 8)],
        T::IQ2_XXS => planes![(2, 64), (0, 2)],
        T::IQ2_XS => planes![(2, 64), (66, 8), (0, 2)],
        T::IQ2_S => planes![(2, 32), (34, 32), (66, 8), (74, 8), (0, 2)],
        T::IQ3_XXS => planes![(2, 64), (66, 32), (0, 2)],
        T::IQ3_S => planes![(2, 64), (66, 8), (74, 32), (106, 4), (0, 2)],
        T::IQ1_S => planes![(2, 32), (34, 16), (0, 2)],
        T::IQ1_M => planes![(0, 32), (32, 16), (48, 8)],
        T::I8 | T::I16 | T::I32 | T::I64 | T::F64 | T::S_BF16 | T::S8 | T::S4 => {
            panic!("no product takes {ty}")
        }
    }
}

/// Bytes of a stack of matrices on a device, or `None` if no product takes it.
pub fn matrix_bytes(ty: GgmlType, n: u64, k: u64, experts: u64) -> Option<u64> {
    strip::layout(ty)?;
    ty.bytes_for(k)?;
    let blocks = (k / ty.block_len() as u64)
        .checked_mul(n)?
        .checked_mul(experts)?;
    planes(ty).iter().try_fold(0u64, |sum, plane| {
        let bytes = blocks.checked_mul(plane.len as u64)?;
        sum.checked_add(bytes.checked_next_multiple_of(ALIGN)?)
    })
}

/// One product `out = x · wᵀ (+ bias)`, or `out += …`.
pub struct Product<'a> {
    pub w: &'a Matrix,
    /// `[m][n]` f32
    pub out: &'a Buffer,
    /// `[n]` f32
    pub bias: Option<&'a Buffer>,
    pub add: bool,
}

/// `out = x / rms(x) * w` for rows of `k`.
pub struct Norm<'a> {
    pub x: &'a Buffer,
    pub w: &'a Buffer,
    pub eps: f32,
    pub k: usize,
    pub out: &'a Buffer,
}

/// Where a batch's tokens stand, on a device.
pub struct Places {
    /// `[m]` of `(first page in pages, position)`, u32 each.
    pub tokens: Buffer,
    /// Page numbers of all sequences, one after another.
    pub pages: Buffer,
    /// `[m][pairs]` f32
    pub cos: Buffer,
    pub sin: Buffer,
    /// Tokens.
    pub m: usize,
    pub pairs: usize,
    /// Positions that the longest of them sees.
    pub longest: usize,
    /// Runs of neighbouring tokens that are of one sequence.
    pub runs: usize,
}

/// The contents of [`Places`] in this address space.
#[derive(Default, Debug)]
pub struct PlacesData {
    pub tokens: Vec<u32>,
    pub pages: Vec<u32>,
    pub longest: usize,
    pub runs: usize,
}

impl PlacesData {
    /// Of a batch.
    pub fn new(tables: &[&PageTable], tokens: &[Token]) -> PlacesData {
        let mut data = PlacesData::default();
        let mut starts = Vec::with_capacity(tables.len());
        for table in tables {
            starts.push(data.pages.len() as u32);
            data.pages.extend_from_slice(table.pages());
        }
        data.runs = tokens.chunk_by(|a, b| a.sequence == b.sequence).count();
        for t in tokens {
            data.tokens.extend([starts[t.sequence], t.position as u32]);
            data.longest = data.longest.max(t.position + 1);
        }
        data
    }
}

/// The heads of one projection.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// `[m][heads][dim]` f32
    pub x: &'a Buffer,
    /// `[dim]` f32: what each head is normalised by.
    pub norm: Option<&'a Buffer>,
    pub heads: usize,
}

/// Rotation of heads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct HeadOptions {
    pub dim: usize,
    pub style: RopeStyle,
    pub eps: f32,
}

/// Experts of tokens, on a device.
pub struct DeviceRouting {
    /// `[m][used]` u32
    pub ids: Buffer,
    /// `[m][used]` f32
    pub weights: Buffer,
    pub used: usize,
}

/// A feed-forward network's matrices on a device: one each, or stacks.
pub struct Network<'a> {
    /// `[ff][k]`
    pub gate: &'a Matrix,
    /// `[ff][k]`
    pub up: &'a Matrix,
    /// `[k][ff]`
    pub down: &'a Matrix,
}

/// What [`Device::begin`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recording {
    /// Issue the operations, then call [`Device::end`].
    Issue,
    /// They have just been issued again from a recording: don't.
    Replayed,
}

/// How [`Device::end`] left the operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// They have been issued.
    Done,
    /// They were to be recorded, that failed, and none of them has run: begin again. The next
    /// time nothing is recorded.
    Again,
}

/// A device. All activations are f32; `m` counts tokens.
///
/// Shapes and types were checked by the caller; a device may panic when they disagree.
pub trait Device: Send + Sync {
    /// What it is, and how much memory is free now.
    fn info(&self) -> Result<DeviceInfo>;

    /// Memory with unspecified contents.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn alloc(&self, bytes: usize) -> Result<Buffer>;

    /// Fills a buffer with zeros.
    fn zero(&self, dst: &Buffer) -> Result<()>;

    /// Copies to a buffer.
    fn write(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()>;

    /// Copies to the beginnings of several buffers.
    fn write_all(&self, parts: &[(&Buffer, &[u8])]) -> Result<()> {
        let mut parts = parts.iter();
        parts.try_for_each(|(dst, src)| self.write(dst, 0, src))
    }

    /// Copies to the beginning of a buffer what may be large: `feeder` fills memory that the
    /// device copies from.
    fn upload(&self, dst: &Buffer, src: &[u8], feeder: &mut dyn stream::Feeder) -> Result<()> {
        let _ = feeder;
        self.write(dst, 0, src)
    }

    /// Waits for what was issued and copies from a buffer.
    fn read(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()>;

    /// The same for the beginnings of several buffers, waiting once.
    fn read_all(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        let mut parts = parts.iter_mut();
        parts.try_for_each(|(src, dst)| self.read(src, 0, dst))
    }

    /// The same for what may be large: `feeder` empties memory that the device copies to.
    fn download(
        &self,
        parts: &mut [(&Buffer, &mut [u8])],
        feeder: &mut dyn stream::Feeder,
    ) -> Result<()> {
        let _ = feeder;
        self.read_all(parts)
    }

    /// Waits for what was issued.
    fn sync(&self) -> Result<()>;

    /// Memory of the host that the device reads and writes over its link, with unspecified
    /// contents. It takes nothing of the device's own.
    ///
    /// # Errors
    /// [`DeviceError::Pinned`].
    fn pin(&self, bytes: usize) -> Result<Buffer>;

    /// Brings a matrix to the device.
    fn load(&self, matrix: &RawMatrix) -> Result<Matrix> {
        self.load_to(matrix, self.alloc(matrix.device_bytes())?)
    }

    /// The same to a buffer that has room for it, pinned or not.
    fn load_to(&self, matrix: &RawMatrix, buffer: Buffer) -> Result<Matrix>;

    /// Room for a matrix of up to `bytes` bytes, as [`matrix_bytes`] counts them, that
    /// [`Device::stream`] brings.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn slot(&self, bytes: usize) -> Result<Matrix> {
        Ok(Matrix {
            ty: GgmlType::F32,
            n: 0,
            k: 0,
            experts: 0,
            buffer: self.alloc(bytes)?,
        })
    }

    /// Brings a matrix that stays in host memory to a slot, or of a stack those that `chosen`
    /// names, in this order and numbered anew. What was issued before finds the slot as it was,
    /// and what is issued behind finds it filled; copies run beside both. When it returns, `from`
    /// has been read.
    ///
    /// # Panics
    /// When the slot is too small.
    fn stream(
        &self,
        from: &RawMatrix,
        chosen: Option<&[u32]>,
        feeder: &mut dyn stream::Feeder,
        slot: &mut Matrix,
    ) -> Result<()>;

    /// `out = x / rms(x) * w` for `m` rows of `k`.
    fn rms_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        eps: f32,
        m: usize,
        k: usize,
        out: &Buffer,
    ) -> Result<()>;

    /// Products with the same `x`, `[m][k]`.
    fn matmul(&self, products: &[Product<'_>], x: &Buffer, m: usize) -> Result<()>;

    /// A norm, a router's product with it, and [`Device::route`] by its logits.
    fn norm_route(
        &self,
        norm: &Norm<'_>,
        router: Product<'_>,
        m: usize,
        options: &RouteOptions,
        routing: &DeviceRouting,
    ) -> Result<()> {
        if m == 1 && self.norm_route_at_once(norm, &router, options, routing)? {
            return Ok(());
        }
        let (logits, experts) = (router.out, router.w.n);
        self.rms_norm(norm.x, norm.w, norm.eps, m, norm.k, norm.out)?;
        self.matmul(&[router], norm.out, m)?;
        self.route(logits, m, experts, options, routing)
    }

    /// The same for one token as a single operation; `false` if there is none for these.
    fn norm_route_at_once(
        &self,
        _: &Norm<'_>,
        _: &Product<'_>,
        _: &RouteOptions,
        _: &DeviceRouting,
    ) -> Result<bool> {
        Ok(false)
    }

    /// [`Device::matmul`] for an `x` that comes from here, f32 values as bytes, to pinned buffers,
    /// which [`Device::collect`] reads.
    fn matmul_from(&self, products: &[Product<'_>], x: &[u8], m: usize) -> Result<()>;

    /// Waits for what was issued and copies the beginnings of pinned buffers, without a copy
    /// over the link. It spins, since what it waits for takes some microseconds.
    ///
    /// # Panics
    /// When a buffer is not pinned.
    fn collect(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()>;

    /// Normalises each head of both projections, where there is a norm, and rotates it, in
    /// place.
    fn heads(&self, both: [Heads<'_>; 2], options: &HeadOptions, places: &Places) -> Result<()>;

    /// Writes `k` and `v`, `[m][kv heads][dim]`, to one layer's cache, which lies as
    /// [`crate::kv`] says and was filled with zeros before its first use.
    fn kv_store(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()>;

    /// [`Device::heads`], then [`Device::kv_store`] of the second projection and `v`.
    fn heads_and_store(
        &self,
        both: [Heads<'_>; 2],
        v: &Buffer,
        options: &HeadOptions,
        places: &Places,
        cache: &Buffer,
        shape: &KvShape,
    ) -> Result<()> {
        self.heads(both, options, places)?;
        self.kv_store(cache, shape, places, both[1].x, v)
    }

    /// Copies a page of one layer's cache.
    fn kv_copy(&self, cache: &Buffer, shape: &KvShape, from: u32, to: u32) -> Result<()>;

    /// Causal attention; `q` and `out` are `[m][heads][dim]`.
    fn attention(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        q: &Buffer,
        heads: usize,
        out: &Buffer,
    ) -> Result<()>;

    /// `x += down · (silu(gate · input) * (up · input))`.
    fn ffn(&self, network: &Network<'_>, input: &Buffer, m: usize, x: &Buffer) -> Result<()>;

    /// Chooses experts as [`crate::Compute::route`] does.
    fn route(
        &self,
        logits: &Buffer,
        m: usize,
        experts: usize,
        options: &RouteOptions,
        routing: &DeviceRouting,
    ) -> Result<()>;

    /// The same network by experts: `x += Σ weight · …`, summed in the routing's order.
    fn experts(
        &self,
        network: &Network<'_>,
        input: &Buffer,
        routing: &DeviceRouting,
        m: usize,
        x: &Buffer,
    ) -> Result<()>;

    /// `dst += x`, `len` values.
    fn add(&self, dst: &Buffer, x: &Buffer, len: usize) -> Result<()>;

    /// The same for an `x` that comes from here, f32 values as bytes. `via` has room for it; its
    /// contents are lost.
    fn add_from(
        &self,
        dst: &Buffer,
        via: &Buffer,
        x: &[u8],
        feeder: &mut dyn stream::Feeder,
    ) -> Result<()> {
        self.upload(via, x, feeder)?;
        self.add(dst, via, x.len() / 4)
    }

    /// `out[i] = x[rows[i]]`, `count` rows of `k`; `rows` is u32.
    fn gather(&self, x: &Buffer, rows: &Buffer, count: usize, k: usize, out: &Buffer)
    -> Result<()>;

    /// The index of the largest of `n` values in each of `m` rows, the lowest of equals; a NaN is
    /// less than any number. `out` is u32.
    fn argmax(&self, x: &Buffer, m: usize, n: usize, out: &Buffer) -> Result<()>;

    /// The `k` largest of `n` values in each of `m` rows, the largest first and the lowest index
    /// first among equals, to `[m][k]` of u32 and of f32; a NaN counts as −∞. `k` is at most
    /// [`MOST_LARGEST`] and at most `n`.
    fn top_k(
        &self,
        x: &Buffer,
        m: usize,
        n: usize,
        k: usize,
        ids: &Buffer,
        values: &Buffer,
    ) -> Result<()>;

    /// The values at the same `count` indices, which are u32 and below `n`, of each of `m` rows
    /// of `n`.
    fn pick(
        &self,
        x: &Buffer,
        m: usize,
        n: usize,
        ids: &Buffer,
        count: usize,
        out: &Buffer,
    ) -> Result<()>;

    /// Asks whether the operations that follow, which `key` names wholly (the same buffers,
    /// the same shapes), can be issued at once from a recording. Copies from and to here can't be
    /// among them.
    fn begin(&self, key: &[u64]) -> Result<Recording> {
        let _ = key;
        Ok(Recording::Issue)
    }

    /// Ends what [`Device::begin`] began, if that said [`Recording::Issue`]. It must be called
    /// whatever became of the operations.
    fn end(&self) -> Result<Ended> {
        Ok(Ended::Done)
    }

    /// What a user should know of how the device has worked, since the last call: that it
    /// records nothing any more, say.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Forgets recordings, because buffers that they name are about to go.
    fn forget(&self) {}
}

/// How many of a row's largest values [`Device::top_k`] finds at most.
pub const MOST_LARGEST: usize = 512;

/// The `k` largest values of a row with their indices, as [`Device::top_k`] finds them.
pub fn largest_of(row: &[f32], k: usize) -> Vec<(u32, f32)> {
    // Both zeros are alike.
    let clean = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    let mut all: Vec<(u32, f32)> = (0..).zip(row.iter().copied().map(clean)).collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| {
        let values = (b.1 + 0.0).total_cmp(&(a.1 + 0.0));
        values.then(a.0.cmp(&b.0))
    };
    if k < all.len() {
        all.select_nth_unstable_by(k, order);
        all.truncate(k);
    }
    all.sort_unstable_by(order);
    all
}

/// The index of a row's largest value, the lowest of equals; a NaN is less than any number.
pub fn largest(row: &[f32]) -> u32 {
    // Where it is costs more than what it is, so only one block is searched for it.
    let mut best = (0, f32::NEG_INFINITY);
    for (block, values) in row.chunks(MAXIMA_BLOCK).enumerate() {
        let most = maximum(values);
        if most > best.1 {
            best = (block, most);
        }
    }
    let start = best.0 * MAXIMA_BLOCK;
    match row[start..].iter().position(|&v| v == best.1) {
        Some(at) if best.1 > f32::NEG_INFINITY => (start + at) as u32,
        _ => 0,
    }
}

/// Values in a block of [`maxima`].
pub const MAXIMA_BLOCK: usize = 64;

/// The largest value of each block of [`MAXIMA_BLOCK`], −∞ where there are but NaNs.
pub fn maxima(row: &[f32], out: &mut Vec<f32>) {
    out.clear();
    out.extend(row.chunks(MAXIMA_BLOCK).map(maximum));
}

/// The largest of some values. Eight at a time, none of which waits for another.
fn maximum(values: &[f32]) -> f32 {
    let larger = |most: f32, v: f32| if v > most { v } else { most };
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (eights, rest) = values.as_chunks::<8>();
    for eight in eights {
        for (most, &v) in lanes.iter_mut().zip(eight) {
            *most = larger(*most, v);
        }
    }
    let both = lanes.iter().chain(rest);
    both.fold(f32::NEG_INFINITY, |most, &v| larger(most, v))
}

/// Cosines and sines of a batch as a device takes them.
pub fn rope_rows(table: &RopeTable) -> (&[f32], &[f32], usize) {
    table.rows()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_is_the_first_and_no_nan() {
        assert_eq!(largest(&[f32::NAN, 1.0, 3.0, f32::NAN, 3.0]), 2);
        assert_eq!(largest(&[f32::NEG_INFINITY, f32::NAN]), 0);
        assert_eq!(largest(&[]), 0);
        // Whatever the block, and the place in it.
        for n in [1, 7, 8, 63, 64, 65, 200] {
            for at in 0..n {
                let mut row = vec![-1.0; n];
                row[at] = 0.5;
                row[n - 1] = 0.5;
                assert_eq!(largest(&row), at as u32, "{n}");
            }
        }
        let mut blocks = Vec::new();
        let row: Vec<f32> = (0..130).map(|i| [-3.0, f32::NAN][i % 2]).collect();
        maxima(&row, &mut blocks);
        assert_eq!(blocks, [-3.0; 3]);
        maxima(&[f32::NAN; 3], &mut blocks);
        assert_eq!(blocks, [f32::NEG_INFINITY]);
    }

    #[test]
    fn the_largest_come_in_order_and_equal_ones_by_index() {
        let row = [1.0, f32::NAN, 3.0, -0.0, 3.0, 0.0, f32::NEG_INFINITY];
        let ids = |k| -> Vec<u32> { largest_of(&row, k).iter().map(|v| v.0).collect() };
        assert_eq!(ids(7), [2, 4, 0, 3, 5, 1, 6]);
        assert_eq!(ids(4), [2, 4, 0, 3]);
        assert!(ids(0).is_empty());
        assert_eq!(largest_of(&row, 6)[5], (1, f32::NEG_INFINITY));
    }

    #[test]
    fn planes_are_the_whole_block() {
        for &ty in GgmlType::ALL {
            if strip::layout(ty).is_none() {
                continue;
            }
            let mut fields = planes(ty).to_vec();
            fields.sort_by_key(|p| p.at);
            let mut at = 0;
            for f in fields {
                assert_eq!(f.at, at, "{ty}");
                at += f.len;
            }
            assert_eq!(at, ty.block_bytes(), "{ty}");
        }
    }

    #[test]
    fn parts_are_the_rows_and_columns_of_each_matrix() {
        // Two matrices of three rows of two blocks; a block's first byte numbers it.
        let block = GgmlType::Q8_0.block_bytes();
        let mut bytes = vec![0; 12 * block];
        (0..12).for_each(|i| bytes[i * block] = i as u8);
        let all = RawMatrix::new(GgmlType::Q8_0, 3, 64, 2, Bytes::from_vec(bytes)).unwrap();
        let blocks =
            |m: &RawMatrix| -> Vec<u8> { m.bytes().iter().step_by(block).copied().collect() };
        let rows = all.rows(1..3);
        assert_eq!((rows.n(), rows.k(), rows.experts()), (2, 64, 2));
        assert_eq!(blocks(&rows), [2, 3, 4, 5, 8, 9, 10, 11]);
        let columns = all.columns(32..64);
        assert_eq!((columns.n(), columns.k(), columns.experts()), (3, 32, 2));
        assert_eq!(blocks(&columns), [1, 3, 5, 7, 9, 11]);
    }

    #[test]
    fn bytes_are_those_of_the_file_and_filling() {
        for &ty in GgmlType::ALL {
            let Some(bytes) = matrix_bytes(ty, 100, 512, 3) else {
                continue;
            };
            let raw = ty.bytes_for(512).unwrap() * 300;
            assert!(
                bytes >= raw && bytes < raw + 5 * ALIGN,
                "{ty}: {bytes} for {raw}"
            );
        }
        assert_eq!(matrix_bytes(GgmlType::I32, 1, 1, 1), None);
        assert_eq!(matrix_bytes(GgmlType::Q4_0, 1, 33, 1), None);
        assert_eq!(
            matrix_bytes(GgmlType::Q4_0, 1 << 40, 1 << 40, 1 << 40),
            None
        );
    }
}
