//! The device: memory, copies and operations by kernels.

use crate::{
    driver::{Gpu, Recorded},
    launch::{Kv, PlaneTable, Where, launch},
    modules::{Modules, Unit},
};
use std::{
    collections::{HashMap, HashSet},
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};
use tegula_gguf::{GgmlType, blocks::grids};
use tegula_kernels::{
    device::{
        ALIGN, Buffer, Device, DeviceError, DeviceInfo, DeviceRouting, HeadOptions, Matrix, Memory,
        Network, Places, Product, RawMatrix, Recording, Result, matrix_bytes, planes,
    },
    kv::{KV_PAGE, KvShape, KvType},
    ops::{RopeStyle, moe::RouteOptions},
};

/// Pinned memory through which all copies to the device go.
const RING: usize = 32 << 20;
/// The largest piece of a copy.
const PIECE: usize = 8 << 20;
/// Tokens up to which rows of weights are multiplied one by one.
pub(crate) const FEW: usize = 8;
/// Tokens of an expert's tile.
const TILE: usize = 64;
/// Blocks of threads that keep a GPU busy.
const BUSY: usize = 264;

/// A GPU's memory, counted.
pub(crate) struct Pool {
    pub(crate) gpu: Gpu,
    used: AtomicU64,
    /// Bytes that may be used, where a GPU is presented as several.
    budget: Option<u64>,
}

impl Memory for Pool {
    fn free(&self, address: u64, bytes: usize) {
        self.used.fetch_sub(rounded(bytes), Ordering::Relaxed);
        self.gpu.free(address);
    }
}

pub(crate) fn rounded(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(ALIGN)
}

impl Pool {
    fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let used = self.used.fetch_add(rounded(bytes), Ordering::Relaxed);
        let give_back = || self.used.fetch_sub(rounded(bytes), Ordering::Relaxed);
        if let Some(total) = self.budget
            && used + rounded(bytes) > total
        {
            give_back();
            return Err(DeviceError::OutOfMemory {
                device: self.gpu.name.clone(),
                needed: rounded(bytes),
                free: total.saturating_sub(used),
                total,
            });
        }
        match self.gpu.alloc(bytes) {
            Ok(address) => Ok(Buffer::new(address, bytes, Arc::clone(self) as _)),
            Err(error) => {
                give_back();
                Err(error)
            }
        }
    }
}

/// Pinned memory, filled from the front again and again.
struct Ring {
    start: *mut u8,
    at: usize,
}

// SAFETY: plain memory, used under the device's lock.
unsafe impl Send for Ring {}

/// Buffers of the device's own; each grows to the largest use and stays.
#[derive(Default)]
struct Scratch {
    buffers: HashMap<&'static str, Buffer>,
}

struct State {
    ring: Ring,
    scratch: Scratch,
    /// Keys of operations that were issued once, so that nothing more is allocated by them.
    seen: HashSet<Vec<u64>>,
    recordings: HashMap<Vec<u64>, Recorded>,
    /// The key that is being recorded.
    recording: Option<Vec<u64>>,
}

/// One GPU, or a part of one.
pub struct CudaDevice {
    state: Mutex<State>,
    pub(crate) modules: Modules,
    pub(crate) grids: Buffer,
    pub(crate) pool: Arc<Pool>,
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.recordings.clear();
        // SAFETY: the ring came from `pinned`; after waiting nothing reads it.
        unsafe {
            let _ = self.pool.gpu.sync();
            self.pool.gpu.free_pinned(state.ring.start);
        }
    }
}

fn failed(gpu: &Gpu, operation: &'static str, cause: String) -> DeviceError {
    DeviceError::Failed {
        device: gpu.name.clone(),
        operation,
        cause,
    }
}

pub(crate) fn is_float(ty: GgmlType) -> bool {
    !ty.is_quantized()
}

/// True if tensor cores multiply the matrix with many tokens.
pub(crate) fn on_tensor_cores(ty: GgmlType, k: usize) -> bool {
    ty != GgmlType::F32 && k.is_multiple_of(32)
}

fn codebooks() -> Vec<u8> {
    let mut out = Vec::with_capacity(33_920);
    let bytes = |v: &i8| *v as u8;
    out.extend(grids::IQ2_XXS.as_flattened().iter().map(bytes));
    out.extend(grids::IQ2_XS.as_flattened().iter().map(bytes));
    out.extend(grids::IQ2_S.as_flattened().iter().map(bytes));
    out.extend(grids::IQ1.as_flattened().iter().map(bytes));
    out.extend(grids::IQ3_XXS.as_flattened().iter().map(bytes));
    out.extend(grids::IQ3_S.as_flattened().iter().map(bytes));
    out.extend_from_slice(&grids::SIGNS);
    out
}

fn kv_number(ty: KvType) -> i32 {
    match ty {
        KvType::F16 => 0,
        KvType::BF16 => 1,
        KvType::Q8_0 => 2,
    }
}

impl CudaDevice {
    /// Opens GPU `ordinal` under a name, with a share of its memory if it is one of several.
    ///
    /// # Errors
    /// When the driver refuses, or the GPU is older than compute capability 8.0.
    pub(crate) fn open(ordinal: usize, name: &str, parts: u64) -> Result<CudaDevice> {
        let gpu = Gpu::open(ordinal, name)?;
        if gpu.arch < (8, 0) {
            let (major, minor) = gpu.arch;
            return Err(DeviceError::Unusable(format!(
                "{name} ({}): compute capability {major}.{minor}; 8.0 or later is needed",
                gpu.description
            )));
        }
        let (free, _) = gpu.memory()?;
        let pool = Arc::new(Pool {
            gpu,
            used: AtomicU64::new(0),
            budget: (parts > 1).then_some(free / parts),
        });
        let books = codebooks();
        let device = CudaDevice {
            state: Mutex::new(State {
                ring: Ring {
                    start: pool.gpu.pinned(RING)?,
                    at: 0,
                },
                scratch: Scratch::default(),
                seen: HashSet::new(),
                recordings: HashMap::new(),
                recording: None,
            }),
            modules: Modules::default(),
            grids: pool.alloc(books.len())?,
            pool,
        };
        device.write(&device.grids, 0, &books)?;
        Ok(device)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a buffer of the device's own.
    pub(crate) fn scratch(&self, what: &'static str, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        if let Some(buffer) = state.scratch.buffers.get(what)
            && buffer.bytes() >= bytes
        {
            return Ok(buffer.address());
        }
        // Recordings name the old one.
        state.recordings.clear();
        state.seen.clear();
        state.scratch.buffers.remove(what);
        let buffer = self.pool.alloc(bytes)?;
        let address = buffer.address();
        state.scratch.buffers.insert(what, buffer);
        Ok(address)
    }

    fn kv(&self, cache: &Buffer, shape: &KvShape) -> Kv {
        let page = KvShape {
            layers: 1,
            ..*shape
        }
        .bytes(1);
        Kv {
            cache: cache.address(),
            k_type: kv_number(shape.k),
            v_type: kv_number(shape.v),
            heads: shape.heads as i32,
            dim: shape.dim as i32,
            k_bytes: shape.k.page_bytes(shape.dim) as i32,
            head_bytes: (page / shape.heads) as i32,
            page_bytes: page as i32,
        }
    }

    /// The index of the largest of `n` values in each of `m` rows; `out` is u32.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn argmax(&self, x: &Buffer, m: usize, n: usize, out: &Buffer) -> Result<()> {
        let (x, out, n) = (x.address(), out.address(), n as i32);
        launch!(self, Unit::Rows, "argmax", [m, 1, 1], 1024, 0, x, n, out)
    }

    /// Loads every kernel, to see that the device takes them all.
    ///
    /// # Errors
    /// For the first that it does not take.
    pub fn load_all(&self) -> Result<()> {
        for &unit in crate::modules::UNITS {
            let name = match unit {
                Unit::Rows => c"rms_norm",
                Unit::Attention => c"attention",
                Unit::Mul(_) => c"mul_mat_64",
            };
            self.modules.function(&self.pool.gpu, unit, name)?;
        }
        Ok(())
    }
}

fn where_of(places: &Places) -> Where {
    Where {
        tokens: places.tokens.address(),
        pages: places.pages.address(),
    }
}

impl Device for CudaDevice {
    fn info(&self) -> Result<DeviceInfo> {
        let (mut free, mut total) = self.pool.gpu.memory()?;
        if let Some(budget) = self.pool.budget {
            total = budget;
            free = free.min(budget.saturating_sub(self.pool.used.load(Ordering::Relaxed)));
        }
        Ok(DeviceInfo {
            name: self.pool.gpu.name.clone(),
            description: self.pool.gpu.description.clone(),
            total,
            free,
        })
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.pool.alloc(bytes)
    }

    fn zero(&self, dst: &Buffer) -> Result<()> {
        // SAFETY: the whole buffer.
        unsafe { self.pool.gpu.clear(dst.address(), dst.bytes()) }
    }

    fn write(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        assert!(
            at + src.len() <= dst.bytes(),
            "a copy behind a buffer's end"
        );
        let mut state = self.state();
        let gpu = &self.pool.gpu;
        let mut to = dst.address() + at as u64;
        for piece in src.chunks(PIECE) {
            let ring = &mut state.ring;
            if ring.at + piece.len() > RING {
                gpu.sync()?;
                ring.at = 0;
            }
            // SAFETY: the piece fits behind `at`, which nothing reads: copies from there were
            // waited for. It is not written again before they are.
            unsafe {
                let staged = ring.start.add(ring.at);
                ptr::copy_nonoverlapping(piece.as_ptr(), staged, piece.len());
                gpu.copy_in(to, staged, piece.len())?;
            }
            ring.at += piece.len().next_multiple_of(64);
            to += piece.len() as u64;
        }
        Ok(())
    }

    fn read(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        assert!(
            at + dst.len() <= src.bytes(),
            "a copy behind a buffer's end"
        );
        let state = self.state();
        let gpu = &self.pool.gpu;
        let mut from = src.address() + at as u64;
        for piece in dst.chunks_mut(PIECE) {
            // Copies to the device that still read the ring's front come first.
            gpu.sync()?;
            // SAFETY: the ring is longer than a piece, and nothing reads it after the wait.
            unsafe {
                gpu.copy_out(state.ring.start, from, piece.len())?;
                gpu.sync()?;
                ptr::copy_nonoverlapping(state.ring.start, piece.as_mut_ptr(), piece.len());
            }
            from += piece.len() as u64;
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.pool.gpu.sync()
    }

    fn load(&self, matrix: &RawMatrix) -> Result<Matrix> {
        let (ty, n, k, experts) = (matrix.ty(), matrix.n(), matrix.k(), matrix.experts());
        let bytes = matrix_bytes(ty, n as u64, k as u64, experts as u64);
        let buffer = self.alloc(bytes.expect("a matrix that was checked") as usize)?;
        let loaded = Matrix {
            ty,
            n,
            k,
            experts,
            buffer,
        };
        let mut table = PlaneTable {
            to: self.mat(&loaded).planes,
            at: [0; 5],
            len: [0; 5],
            count: planes(ty).len() as i32,
            block: ty.block_bytes() as i32,
        };
        for (i, plane) in planes(ty).iter().enumerate() {
            table.at[i] = plane.at as i32;
            table.len[i] = plane.len as i32;
        }
        let piece = PIECE / ty.block_bytes() * ty.block_bytes();
        let staging = self.alloc(piece.min(matrix.bytes().len()))?;
        for (i, part) in matrix.bytes().chunks(piece).enumerate() {
            self.write(&staging, 0, part)?;
            let first = (i * (piece / ty.block_bytes())) as u64;
            let (raw, len) = (staging.address(), part.len() as u64);
            let grid = [part.len().div_ceil(256), 1, 1];
            launch!(
                self,
                Unit::Rows,
                "to_planes",
                grid,
                256,
                0,
                raw,
                first,
                len,
                table
            )?;
        }
        Ok(loaded)
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        eps: f32,
        m: usize,
        k: usize,
        out: &Buffer,
    ) -> Result<()> {
        let (x, w, out, k) = (x.address(), w.address(), out.address(), k as i32);
        launch!(
            self,
            Unit::Rows,
            "rms_norm",
            [m, 1, 1],
            256,
            0,
            x,
            w,
            eps,
            k,
            out
        )
    }

    fn matmul(&self, products: &[Product<'_>], x: &Buffer, m: usize) -> Result<()> {
        let x = x.address();
        let (mut q8, mut rounded) = (None, None);
        let alike = |a: &Product<'_>, b: &Product<'_>| a.w.ty == b.w.ty && a.add == b.add;
        for group in products.chunk_by(alike).flat_map(|group| group.chunks(3)) {
            let (ty, k) = (group[0].w.ty, group[0].w.k);
            if m <= FEW || !on_tensor_cores(ty, k) {
                if !is_float(ty) && q8.is_none() {
                    q8 = Some(self.quantize(x, m, k)?);
                }
                self.by_rows(group, x, q8, m)?;
                continue;
            }
            let input = match rounded {
                Some(input) => input,
                None => self.round(x, m * k)?,
            };
            rounded = Some(input);
            for p in group {
                let bias = p.bias.map_or(0, Buffer::address);
                self.by_tiles(p.w, input, m, p.out.address(), bias, p.add, None)?;
            }
        }
        Ok(())
    }

    fn heads(
        &self,
        x: &Buffer,
        norm: Option<&Buffer>,
        o: &HeadOptions,
        places: &Places,
    ) -> Result<()> {
        let (x, w, eps) = (x.address(), norm.map_or(0, Buffer::address), o.eps);
        let (heads, dim) = (o.heads as i32, o.dim as i32);
        let neox = i32::from(o.style == RopeStyle::Neox);
        let (cos, sin) = (places.cos.address(), places.sin.address());
        let (pairs, grid) = (places.pairs as i32, [o.heads, places.m, 1]);
        launch!(
            self,
            Unit::Rows,
            "heads",
            grid,
            32,
            4 * o.dim,
            x,
            w,
            eps,
            heads,
            dim,
            neox,
            cos,
            sin,
            pairs
        )
    }

    fn kv_store(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        let (kv, at, grid) = (
            self.kv(cache, shape),
            where_of(places),
            [shape.heads, places.m, 1],
        );
        let (k, v) = (k.address(), v.address());
        launch!(self, Unit::Attention, "kv_store", grid, 32, 0, kv, at, k, v)
    }

    fn kv_copy(&self, cache: &Buffer, shape: &KvShape, from: u32, to: u32) -> Result<()> {
        let page = KvShape {
            layers: 1,
            ..*shape
        }
        .bytes(1);
        let at = |n: u32| cache.address() + n as u64 * page as u64;
        if from == to {
            return Ok(());
        }
        // SAFETY: two pages of the cache.
        unsafe { self.pool.gpu.copy_inside(at(to), at(from), page) }
    }

    fn attention(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        q: &Buffer,
        heads: usize,
        out: &Buffer,
    ) -> Result<()> {
        let dim = shape.dim;
        if dim > 256 {
            let why = format!("heads of {dim} dimensions; up to 256 are supported");
            return Err(failed(&self.pool.gpu, "attention", why));
        }
        let parts = (heads / shape.heads).div_ceil(8);
        let pages = places.longest.div_ceil(KV_PAGE).max(1);
        let blocks = shape.heads * parts * places.m;
        let run_pages = pages.div_ceil((BUSY / blocks.max(1)).clamp(1, pages));
        let runs = pages.div_ceil(run_pages);
        let rows = places.m * heads;
        let (sums, stats) = match runs {
            1 => (0, 0),
            _ => (
                self.scratch("attention sums", 4 * rows * runs * dim)?,
                self.scratch("attention stats", 8 * rows * runs)?,
            ),
        };
        let (kv, at) = (self.kv(cache, shape), where_of(places));
        let scale = 1.0f32 / (dim as f32).sqrt();
        let (q, out, n) = (q.address(), out.address(), heads as i32);
        let (per, count) = (run_pages as i32, runs as i32);
        let shared = 4 * (8 * dim + 2 * 64 * 8 + 3 * 8);
        let grid = [shape.heads * parts, runs, places.m];
        launch!(
            self,
            Unit::Attention,
            "attention",
            grid,
            128,
            shared,
            kv,
            at,
            q,
            n,
            scale,
            per,
            count,
            out,
            sums,
            stats
        )?;
        if runs > 1 {
            let dim = dim as i32;
            launch!(
                self,
                Unit::Attention,
                "merge",
                [rows, 1, 1],
                128,
                0,
                sums,
                stats,
                count,
                dim,
                out
            )?;
        }
        Ok(())
    }

    fn ffn(&self, network: &Network<'_>, input: &Buffer, m: usize, x: &Buffer) -> Result<()> {
        let Network { gate, up, down } = *network;
        let (ff, input) = (gate.n, input.address());
        let hidden = self.scratch("hidden", 4 * m * ff)?;
        if m <= FEW && gate.ty == up.ty && !is_float(gate.ty) {
            let q8 = self.quantize(input, m, gate.k)?;
            let (g, u, tokens) = (self.mat(gate), self.mat(up), m as i32);
            let (unit, grid) = (Unit::Mul(gate.ty), [ff.div_ceil(4), 1, 1]);
            if m == 1 {
                launch!(
                    self,
                    unit,
                    "gate_up_1",
                    grid,
                    128,
                    0,
                    g,
                    u,
                    q8.codes,
                    q8.scales,
                    q8.sums,
                    tokens,
                    hidden
                )?;
            } else {
                launch!(
                    self,
                    unit,
                    "gate_up_8",
                    grid,
                    128,
                    0,
                    g,
                    u,
                    q8.codes,
                    q8.scales,
                    q8.sums,
                    tokens,
                    hidden
                )?;
            }
        } else {
            let other = self.scratch("up", 4 * m * ff)?;
            for (w, out) in [(gate, hidden), (up, other)] {
                self.single(w, input, m, out, false)?;
            }
            self.swiglu(hidden, other, m * ff)?;
        }
        self.single(down, hidden, m, x.address(), true)
    }

    fn route(
        &self,
        logits: &Buffer,
        m: usize,
        experts: usize,
        options: &RouteOptions,
        routing: &DeviceRouting,
    ) -> Result<()> {
        if experts > 4000 {
            let why = format!("{experts} experts; up to 4000 are supported");
            return Err(failed(&self.pool.gpu, "routing", why));
        }
        let (logits, count, used) = (logits.address(), experts as i32, options.used as i32);
        let (normalize, scale) = (i32::from(options.normalize), options.scale);
        let (ids, weights) = (routing.ids.address(), routing.weights.address());
        launch!(
            self,
            Unit::Rows,
            "route",
            [m, 1, 1],
            32,
            4 * experts,
            logits,
            count,
            used,
            normalize,
            scale,
            ids,
            weights
        )
    }

    fn experts(
        &self,
        network: &Network<'_>,
        input: &Buffer,
        routing: &DeviceRouting,
        m: usize,
        x: &Buffer,
    ) -> Result<()> {
        let Network { gate, up, down } = *network;
        let (ff, n, used) = (gate.n, down.n, routing.used);
        let (pairs, input) = (m * used, input.address());
        let ids = routing.ids.address();
        let hidden = self.scratch("hidden", 4 * pairs * ff)?;
        let other = self.scratch("up", 4 * pairs * ff)?;
        let y = self.scratch("experts", 4 * pairs * n)?;
        let tiles = [gate, up, down].iter().all(|w| on_tensor_cores(w.ty, w.k));
        if m <= FEW || !tiles {
            if gate.ty == up.ty && !is_float(gate.ty) {
                let q8 = self.quantize(input, m, gate.k)?;
                let (g, u, share) = (self.mat(gate), self.mat(up), used as i32);
                let grid = [ff.div_ceil(4), pairs, 1];
                let unit = Unit::Mul(gate.ty);
                launch!(
                    self,
                    unit,
                    "experts_gate_up",
                    grid,
                    128,
                    0,
                    g,
                    u,
                    ids,
                    share,
                    q8.codes,
                    q8.scales,
                    q8.sums,
                    hidden
                )?;
            } else {
                self.pairs_by_rows(gate, ids, pairs, used, input, m, hidden)?;
                self.pairs_by_rows(up, ids, pairs, used, input, m, other)?;
                self.swiglu(hidden, other, pairs * ff)?;
            }
            self.pairs_by_rows(down, ids, pairs, 1, hidden, pairs, y)?;
        } else {
            let most = pairs / TILE + gate.experts.min(pairs);
            let order = self.scratch("order", 4 * pairs)?;
            let table = self.scratch("tiles", 12 * most)?;
            let (count, experts) = (pairs as i32, gate.experts as i32);
            let (tile, last) = (TILE as i32, most as i32);
            let shared = 4 * (3 * gate.experts + 1);
            launch!(
                self,
                Unit::Rows,
                "group_experts",
                [1, 1, 1],
                1024,
                shared,
                ids,
                count,
                experts,
                tile,
                last,
                order,
                table
            )?;
            let rounded = self.round(input, m * gate.k)?;
            let grouped = |share| Some((table, order, most, share));
            self.by_tiles(gate, rounded, pairs, hidden, 0, false, grouped(used))?;
            self.by_tiles(up, rounded, pairs, other, 0, false, grouped(used))?;
            self.swiglu(hidden, other, pairs * ff)?;
            let rounded = self.round(hidden, pairs * ff)?;
            self.by_tiles(down, rounded, pairs, y, 0, false, grouped(1))?;
        }
        let (x, weights) = (x.address(), routing.weights.address());
        let (grid, used, n) = ([n.div_ceil(256), m, 1], used as i32, n as i32);
        launch!(
            self,
            Unit::Rows,
            "combine",
            grid,
            256,
            0,
            x,
            y,
            weights,
            used,
            n
        )
    }

    fn add(&self, dst: &Buffer, x: &Buffer, len: usize) -> Result<()> {
        let (dst, x, n) = (dst.address(), x.address(), len as u64);
        launch!(
            self,
            Unit::Rows,
            "add",
            [len.div_ceil(256), 1, 1],
            256,
            0,
            dst,
            x,
            n
        )
    }

    fn gather(
        &self,
        x: &Buffer,
        rows: &Buffer,
        count: usize,
        k: usize,
        out: &Buffer,
    ) -> Result<()> {
        let (x, rows, out, k) = (x.address(), rows.address(), out.address(), k as i32);
        launch!(
            self,
            Unit::Rows,
            "gather",
            [count, 1, 1],
            256,
            0,
            x,
            rows,
            k,
            out
        )
    }

    fn begin(&self, key: &[u64]) -> Result<Recording> {
        let mut state = self.state();
        if let Some(recorded) = state.recordings.get(key) {
            self.pool.gpu.replay(recorded)?;
            return Ok(Recording::Replayed);
        }
        // The first time everything that is needed is allocated, the second time recorded.
        if !state.seen.insert(key.to_vec()) {
            self.pool.gpu.begin_capture()?;
            state.recording = Some(key.to_vec());
        }
        Ok(Recording::Issue)
    }

    fn end(&self) -> Result<()> {
        let mut state = self.state();
        let Some(key) = state.recording.take() else {
            return Ok(());
        };
        let recorded = self.pool.gpu.end_capture()?;
        self.pool.gpu.replay(&recorded)?;
        // Prompts of every length would fill memory with recordings.
        if state.recordings.len() >= 64 {
            state.recordings.clear();
        }
        state.recordings.insert(key, recorded);
        Ok(())
    }

    fn forget(&self) {
        let mut state = self.state();
        state.recordings.clear();
        state.seen.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::{Mat, Products};

    #[test]
    fn parameters_lie_as_the_kernels_expect() {
        assert_eq!(size_of::<Mat>(), 56);
        assert_eq!(size_of::<Products>(), 232);
        assert_eq!(size_of::<Kv>(), 40);
        assert_eq!(size_of::<PlaneTable>(), 88);
    }

    #[test]
    fn codebooks_are_where_the_kernels_look() {
        let books = codebooks();
        assert_eq!(books.len(), 33_792 + 128);
        assert_eq!(books[2048..2056], grids::IQ2_XS[0].map(|v| v as u8));
        assert_eq!(books[14_336..14_344], grids::IQ1[0].map(|v| v as u8));
        assert_eq!(books[33_793], grids::SIGNS[1]);
    }
}
