//! What a device computes.

use crate::{
    copies::PIECE,
    device::{CudaDevice, FEW, failed, is_float, on_tensor_cores, where_of},
    launch::{Attended, HeadsOf, Kv, NormOf, Q8, launch},
    modules::Unit,
    products::Into,
};
use std::ffi::CStr;
use tegula_gguf::GgmlType;
use tegula_kernels::{
    device::{
        Buffer, Device, DeviceInfo, DeviceRouting, Ended, HeadOptions, Heads, MOST_LARGEST, Matrix,
        Network, Norm, Places, Product, RawMatrix, Recording, Result, stream::Feeder,
    },
    kv::{KV_PAGE, KvShape, KvType},
    ops::{RopeStyle, moe::RouteOptions},
};

/// Blocks of threads that keep a GPU busy, and so the most runs that `merge` is given
/// (`attention.cu`).
const BUSY: usize = 264;
/// Rows of queries that a block of [`tiles_kernel`] takes.
const QUERY_ROWS: usize = 64;
/// Shared memory that a block gets unasked.
const SHARED: usize = 48 << 10;

/// The kernel for few tokens, for heads in groups of `group`, and how many of them a block takes.
/// There is one for each type of both caches, which reads a warp's quarter of the dimensions in
/// whole words and, of Q8_0, with one scale per 32 that are read together; others read any cache.
fn attention_kernel(shape: &KvShape, group: usize) -> (&'static CStr, usize) {
    let whole = shape.dim.is_multiple_of(32);
    let scaled = [32, 64, 128, 256].contains(&shape.dim);
    let [four, eight] = match (shape.k, shape.v) {
        (KvType::F16, KvType::F16) if whole => [c"attention_4_f16", c"attention_8_f16"],
        (KvType::BF16, KvType::BF16) if whole => [c"attention_4_bf16", c"attention_8_bf16"],
        (KvType::Q8_0, KvType::Q8_0) if scaled => [c"attention_4_q8_0", c"attention_8_q8_0"],
        _ => [c"attention_4_any", c"attention_8_any"],
    };
    match group {
        ..=4 => (four, 4),
        _ => (eight, 8),
    }
}

/// Experts and used ones up to which a lane keeps its logits in registers.
const FEW_EXPERTS: usize = 256;
const FEW_USED: usize = 32;

/// Attention on tensor cores for heads of `dim`, and the shared memory that it takes.
fn tiles_kernel(dim: usize) -> Option<(&'static CStr, usize)> {
    let name = match dim {
        32 => c"attention_tiles_32",
        64 => c"attention_tiles_64",
        96 => c"attention_tiles_96",
        128 => c"attention_tiles_128",
        256 => c"attention_tiles_256",
        _ => return None,
    };
    let stages = if dim > 128 { 1 } else { 2 };
    Some((
        name,
        2 * ((1 + stages) * 64 * (dim + 8) + stages * dim * 72),
    ))
}

impl CudaDevice {
    /// Attention of many tokens; `false` if tensor cores don't take it.
    fn attention_by_tiles(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        q: u64,
        heads: usize,
        out: u64,
    ) -> Result<bool> {
        let (m, group) = (places.m, heads / shape.heads);
        // Tokens of many sequences share no pages: those are better taken one by one.
        if m <= FEW || group > QUERY_ROWS || places.runs * FEW > m {
            return Ok(false);
        }
        let Some((name, shared)) =
            tiles_kernel(shape.dim).filter(|(_, shared)| *shared <= self.pool.gpu.shared)
        else {
            return Ok(false);
        };
        let (_, bf16) = self.prepare(out, m, heads * shape.dim)?;
        let (kv, at) = (self.kv(cache, shape), where_of(places));
        // Exponentials are of base 2.
        let scale = std::f32::consts::LOG2_E / (shape.dim as f32).sqrt();
        let grid = [shape.heads, m.div_ceil(QUERY_ROWS / group), 1];
        let (unit, n, m) = (Unit::Attention, heads as i32, m as i32);
        launch!(
            self, unit, name, grid, 128, shared, kv, at, q, n, scale, m, out, bf16
        )?;
        Ok(true)
    }
}

impl CudaDevice {
    /// Heads of two projections, and where there is a cache, k and v to it.
    fn rotate(
        &self,
        both: [Heads<'_>; 2],
        o: &HeadOptions,
        places: &Places,
        kv: Kv,
        v: u64,
    ) -> Result<()> {
        let [q, k] = both.map(|of| {
            self.overwritten(of.x.address());
            HeadsOf {
                x: of.x.address(),
                norm: of.norm.map_or(0, Buffer::address),
                heads: of.heads as i32,
            }
        });
        let (dim, neox) = (o.dim as i32, i32::from(o.style == RopeStyle::Neox));
        let (cos, sin) = (places.cos.address(), places.sin.address());
        let (pairs, at) = (places.pairs as i32, where_of(places));
        let grid = [
            both[0].heads + both[1].heads + kv.heads as usize,
            places.m,
            1,
        ];
        let (unit, name, shared, eps) = (Unit::Attention, c"heads", 4 * o.dim, o.eps);
        launch!(
            self, unit, name, grid, 32, shared, q, k, eps, dim, neox, cos, sin, pairs, kv, at, v
        )
    }
}

impl CudaDevice {
    /// One row, with a place for its q8 form.
    fn norm_of(&self, norm: &Norm<'_>) -> Result<NormOf> {
        let out = norm.out.address();
        let (q8, _) = self.prepare(out, 1, norm.k)?;
        Ok(NormOf {
            x: norm.x.address(),
            w: norm.w.address(),
            eps: norm.eps,
            k: norm.k as i32,
            out,
            q8,
        })
    }

    /// `dst += x`, `len` values, which may lie in pinned memory.
    pub(crate) fn add_at(&self, dst: &Buffer, x: u64, len: usize) -> Result<()> {
        self.overwritten(dst.address());
        let (dst, n) = (dst.address(), len as u64);
        let (unit, name, grid) = (Unit::Rows, c"add", [len.div_ceil(256), 1, 1]);
        launch!(self, unit, name, grid, 256, 0, dst, x, n)
    }
}

impl Device for CudaDevice {
    fn info(&self) -> Result<DeviceInfo> {
        self.describe()
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.pool.alloc(bytes)
    }

    fn zero(&self, dst: &Buffer) -> Result<()> {
        self.overwritten(dst.address());
        // SAFETY: the whole buffer.
        unsafe { self.pool.gpu.clear(dst.address(), dst.bytes()) }
    }

    fn write(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        self.write_at(dst, at, src)
    }

    fn write_all(&self, parts: &[(&Buffer, &[u8])]) -> Result<()> {
        self.write_starts(parts)
    }

    fn upload(&self, dst: &Buffer, src: &[u8], feeder: &mut dyn Feeder) -> Result<()> {
        self.write_by(dst, src, feeder)
    }

    fn read(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        self.read_at(src, at, dst)
    }

    fn read_all(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        self.read_starts(parts)
    }

    fn download(&self, parts: &mut [(&Buffer, &mut [u8])], feeder: &mut dyn Feeder) -> Result<()> {
        self.read_by(parts, feeder)
    }

    fn sync(&self) -> Result<()> {
        self.pool.gpu.sync()
    }

    fn pin(&self, bytes: usize) -> Result<Buffer> {
        self.pinned_buffer(bytes)
    }

    fn load_to(&self, matrix: &RawMatrix, buffer: Buffer) -> Result<Matrix> {
        let (ty, n, k, experts) = (matrix.ty(), matrix.n(), matrix.k(), matrix.experts());
        assert!(
            matrix.device_bytes() <= buffer.bytes(),
            "a matrix larger than its buffer"
        );
        let loaded = Matrix {
            ty,
            n,
            k,
            experts,
            buffer,
        };
        let table = self.plane_table(&loaded);
        let piece = PIECE / ty.block_bytes() * ty.block_bytes();
        let staging = self.alloc(piece.min(matrix.bytes().len()))?;
        for (i, part) in matrix.bytes().chunks(piece).enumerate() {
            self.write(&staging, 0, part)?;
            let first = (i * (piece / ty.block_bytes())) as u64;
            let (raw, len) = (staging.address(), part.len() as u64);
            let grid = [part.len().div_ceil(256), 1, 1];
            let (unit, name) = (Unit::Rows, c"to_planes");
            launch!(self, unit, name, grid, 256, 0, raw, first, len, table)?;
        }
        Ok(loaded)
    }

    fn slot(&self, bytes: usize) -> Result<Matrix> {
        self.new_slot(Matrix {
            ty: GgmlType::F32,
            n: 0,
            k: 0,
            experts: 0,
            buffer: self.alloc(bytes)?,
        })
    }

    fn stream(
        &self,
        from: &RawMatrix,
        chosen: Option<&[u32]>,
        feeder: &mut dyn Feeder,
        slot: &mut Matrix,
    ) -> Result<()> {
        self.stream_in(from, chosen, feeder, slot)
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
        let (x, w, out) = (x.address(), w.address(), out.address());
        let (q8, bf16) = self.prepare(out, m, k)?;
        // Few rows keep few multiprocessors busy: with more threads each.
        let block = if m <= FEW { 1024 } else { 512 };
        let (unit, name, grid, k) = (Unit::Rows, c"rms_norm", [m, 1, 1], k as i32);
        launch!(
            self, unit, name, grid, block, 0, x, w, eps, k, out, q8, bf16
        )
    }

    fn matmul(&self, products: &[Product<'_>], x: &Buffer, m: usize) -> Result<()> {
        self.multiply(products, |_| Ok(x.address()), m)
    }

    fn norm_route_at_once(
        &self,
        norm: &Norm<'_>,
        router: &Product<'_>,
        options: &RouteOptions,
        routing: &DeviceRouting,
    ) -> Result<bool> {
        let (ty, n, shared) = (router.w.ty, router.w.n, 4 * norm.k);
        let few = n <= FEW_EXPERTS && options.used <= FEW_USED && shared <= SHARED;
        if !few || !is_float(ty) || router.bias.is_some() || router.add {
            return Ok(false);
        }
        let (w, logits) = (self.mat(router.w), router.out.address());
        self.overwritten(logits);
        let (norm, counter) = (self.norm_of(norm)?, self.counter.address());
        let (used, normalize) = (options.used as i32, i32::from(options.normalize));
        let (ids, weights) = (routing.ids.address(), routing.weights.address());
        let (scale, grid) = (options.scale, [n.div_ceil(4), 1, 1]);
        let name = match n {
            ..=128 => c"norm_route_128",
            _ => c"norm_route_256",
        };
        launch!(
            self,
            Unit::Mul(ty),
            name,
            grid,
            128,
            shared,
            w,
            norm,
            logits,
            used,
            normalize,
            scale,
            ids,
            weights,
            counter
        )?;
        Ok(true)
    }

    fn matmul_from(&self, products: &[Product<'_>], x: &[u8], m: usize) -> Result<()> {
        self.multiply_from(products, x, m)
    }

    fn collect(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        self.collect_pinned(parts)
    }

    fn heads(&self, both: [Heads<'_>; 2], o: &HeadOptions, places: &Places) -> Result<()> {
        let none = Kv {
            dim: o.dim as i32,
            ..Kv::default()
        };
        self.rotate(both, o, places, none, 0)
    }

    fn kv_store(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        let (kv, at) = (self.kv(cache, shape), where_of(places));
        let (k, v, grid) = (k.address(), v.address(), [2 * shape.heads, places.m, 1]);
        let (unit, name) = (Unit::Attention, c"kv_store");
        launch!(self, unit, name, grid, 32, 0, kv, at, k, v)
    }

    fn heads_and_store(
        &self,
        both: [Heads<'_>; 2],
        v: &Buffer,
        o: &HeadOptions,
        places: &Places,
        cache: &Buffer,
        shape: &KvShape,
    ) -> Result<()> {
        self.rotate(both, o, places, self.kv(cache, shape), v.address())
    }

    fn kv_copy(&self, cache: &Buffer, shape: &KvShape, from: u32, to: u32) -> Result<()> {
        let page = shape.layer_page_bytes();
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
        if dim > 256 || !dim.is_multiple_of(2) {
            let why = format!("heads of {dim} dimensions; even numbers up to 256 are supported");
            return Err(failed(&self.pool.gpu, "attention", why));
        }
        let (q, out) = (q.address(), out.address());
        if self.attention_by_tiles(cache, shape, places, q, heads, out)? {
            return Ok(());
        }
        let group = heads / shape.heads;
        let (name, per) = attention_kernel(shape, group);
        let parts = group.div_ceil(per);
        let pages = places.longest.div_ceil(KV_PAGE).max(1);
        let blocks = shape.heads * parts * places.m;
        let run_pages = pages.div_ceil((BUSY / blocks.max(1)).max(1));
        let runs = pages.div_ceil(run_pages);
        let rows = places.m * heads;
        let (sums, stats) = match runs {
            1 => (0, 0),
            _ => (
                self.scratch("attention sums", 4 * rows * runs * dim)?,
                self.scratch("attention stats", 8 * rows * runs)?,
            ),
        };
        let (q8, bf16) = match dim.is_multiple_of(32) {
            true => self.prepare(out, places.m, heads * dim)?,
            false => {
                self.overwritten(out);
                (Q8::default(), 0)
            }
        };
        let to = Attended { out, q8, bf16 };
        let (kv, at) = (self.kv(cache, shape), where_of(places));
        let (scale, n) = (1.0f32 / (dim as f32).sqrt(), heads as i32);
        let (each, count) = (run_pages as i32, runs as i32);
        let shared = 4 * per * (dim + (1 + 4) * 64 + 3);
        let unit = Unit::Attention;
        let grid = [shape.heads * parts, runs, places.m];
        launch!(
            self, unit, name, grid, 128, shared, kv, at, q, n, scale, each, count, to, sums, stats
        )?;
        if runs == 1 {
            return Ok(());
        }
        let (name, grid, dim) = (c"merge", [rows, 1, 1], dim as i32);
        launch!(
            self, unit, name, grid, 128, 0, sums, stats, n, count, dim, to
        )
    }

    fn ffn(&self, network: &Network<'_>, input: &Buffer, m: usize, x: &Buffer) -> Result<()> {
        let Network { gate, up, down } = *network;
        let (ff, input) = (gate.n, input.address());
        self.overwritten(x.address());
        let last = [Into::plain(down, x.address())];
        if m <= FEW && gate.ty == up.ty && !is_float(gate.ty) {
            let q8 = self.quantized(input, m, gate.k)?;
            let (hidden, forms) = self.hidden(down, m)?;
            let (g, u, tokens) = (self.mat(gate), self.mat(up), m as i32);
            let (unit, grid) = (Unit::Mul(gate.ty), [ff.div_ceil(32), 1, 1]);
            let name = if m == 1 { c"gate_up_1" } else { c"gate_up_8" };
            launch!(
                self, unit, name, grid, 256, 0, g, u, q8, tokens, hidden, forms
            )?;
            return match forms.codes {
                0 => self.by_floats(&last, true, hidden, m),
                _ => self.by_rows(&last, true, forms, m),
            };
        }
        let hidden = self.scratch("hidden", 4 * m * ff)?;
        let other = self.scratch("up", 4 * m * ff)?;
        for (w, out) in [(gate, hidden), (up, other)] {
            self.product(&[Into::plain(w, out)], false, input, m)?;
        }
        if m > FEW && on_tensor_cores(down.ty, ff) {
            let rounded = self.swiglu_rounded(hidden, other, m * ff)?;
            return self.by_tensor_cores(&last[0], true, rounded, m);
        }
        self.swiglu(hidden, other, m * ff)?;
        self.overwritten(hidden);
        self.product(&last, true, hidden, m)
    }

    fn route(
        &self,
        logits: &Buffer,
        m: usize,
        experts: usize,
        options: &RouteOptions,
        routing: &DeviceRouting,
    ) -> Result<()> {
        let shared = 4 * experts;
        if shared > SHARED {
            let why = format!("{experts} experts; up to {} are supported", SHARED / 4);
            return Err(failed(&self.pool.gpu, "routing", why));
        }
        let (logits, count, used) = (logits.address(), experts as i32, options.used as i32);
        let (normalize, scale) = (i32::from(options.normalize), options.scale);
        let (ids, weights) = (routing.ids.address(), routing.weights.address());
        let few = experts <= FEW_EXPERTS && options.used <= FEW_USED;
        let (name, shared) = if few {
            (c"route_256", 0)
        } else {
            (c"route", shared)
        };
        let (unit, grid) = (Unit::Rows, [m, 1, 1]);
        launch!(
            self, unit, name, grid, 32, shared, logits, count, used, normalize, scale, ids, weights
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
        let (ids, weights) = (routing.ids.address(), routing.weights.address());
        let x = x.address();
        self.overwritten(x);
        let y = |device: &CudaDevice| device.scratch("experts", 4 * pairs * n);
        let tiles = [gate, up, down].iter().all(|w| on_tensor_cores(w.ty, w.k));
        if m > FEW && tiles {
            let grouped = self.group(gate, ids, pairs, used)?;
            let rounded = self.rounded(input, m * gate.k)?;
            let hidden = self.scratch("hidden", 4 * pairs * ff)?;
            let other = self.scratch("up", 4 * pairs * ff)?;
            self.by_groups(gate, rounded, hidden, &grouped)?;
            self.by_groups(up, rounded, other, &grouped)?;
            let rounded = self.swiglu_rounded(hidden, other, pairs * ff)?;
            let out = y(self)?;
            self.by_groups(down, rounded, out, &grouped.by_pairs())?;
            return self.combine(x, out, weights, m, used, n);
        }
        if gate.ty == up.ty && !is_float(gate.ty) {
            let q8 = self.quantized(input, m, gate.k)?;
            let (hidden, forms) = self.hidden(down, pairs)?;
            let (g, u, share) = (self.mat(gate), self.mat(up), used as i32);
            let (unit, grid) = (Unit::Mul(gate.ty), [ff.div_ceil(32), pairs, 1]);
            let name = c"experts_gate_up";
            launch!(
                self, unit, name, grid, 256, 0, g, u, ids, share, q8, hidden, forms
            )?;
            if forms.codes == 0 {
                let out = y(self)?;
                self.pairs_by_rows(down, ids, pairs, 1, hidden, pairs, out)?;
                return self.combine(x, out, weights, m, used, n);
            }
            if used <= 16 {
                let (w, grid) = (self.mat(down), [n.div_ceil(4), m, 1]);
                let (unit, name, block) = (Unit::Mul(down.ty), c"experts_down", 32 * used);
                return launch!(self, unit, name, grid, block, 0, w, ids, weights, forms, x);
            }
            let out = y(self)?;
            self.pairs_by_codes(down, ids, pairs, 1, forms, out)?;
            return self.combine(x, out, weights, m, used, n);
        }
        let hidden = self.scratch("hidden", 4 * pairs * ff)?;
        let other = self.scratch("up", 4 * pairs * ff)?;
        self.pairs_by_rows(gate, ids, pairs, used, input, m, hidden)?;
        self.pairs_by_rows(up, ids, pairs, used, input, m, other)?;
        self.swiglu(hidden, other, pairs * ff)?;
        self.overwritten(hidden);
        let out = y(self)?;
        self.pairs_by_rows(down, ids, pairs, 1, hidden, pairs, out)?;
        self.combine(x, out, weights, m, used, n)
    }

    fn add(&self, dst: &Buffer, x: &Buffer, len: usize) -> Result<()> {
        self.add_at(dst, x.address(), len)
    }

    fn add_from(
        &self,
        dst: &Buffer,
        via: &Buffer,
        x: &[u8],
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        self.add_by(dst, via, x, feeder)
    }

    fn gather(
        &self,
        x: &Buffer,
        rows: &Buffer,
        count: usize,
        k: usize,
        out: &Buffer,
    ) -> Result<()> {
        self.overwritten(out.address());
        let (x, rows, out, k) = (x.address(), rows.address(), out.address(), k as i32);
        let (unit, name, grid) = (Unit::Rows, c"gather", [count, 1, 1]);
        launch!(self, unit, name, grid, 256, 0, x, rows, k, out)
    }

    fn argmax(&self, x: &Buffer, m: usize, n: usize, out: &Buffer) -> Result<()> {
        self.overwritten(out.address());
        let (x, out, n) = (x.address(), out.address(), n as i32);
        let (unit, name) = (Unit::Rows, c"argmax");
        launch!(self, unit, name, [m, 1, 1], 1024, 0, x, n, out)
    }

    fn top_k(
        &self,
        x: &Buffer,
        m: usize,
        n: usize,
        k: usize,
        ids: &Buffer,
        values: &Buffer,
    ) -> Result<()> {
        assert!(k <= MOST_LARGEST.min(n));
        self.overwritten(ids.address());
        self.overwritten(values.address());
        let (x, ids, values) = (x.address(), ids.address(), values.address());
        let (unit, name, n, k) = (Unit::Rows, c"top_k", n as i32, k as i32);
        launch!(self, unit, name, [m, 1, 1], 1024, 0, x, n, k, ids, values)
    }

    fn pick(
        &self,
        x: &Buffer,
        m: usize,
        n: usize,
        ids: &Buffer,
        count: usize,
        out: &Buffer,
    ) -> Result<()> {
        self.overwritten(out.address());
        let (x, ids, out) = (x.address(), ids.address(), out.address());
        let (unit, name, n, count) = (Unit::Rows, c"pick", n as i32, count as i32);
        launch!(self, unit, name, [m, 1, 1], 256, 0, x, n, ids, count, out)
    }

    fn begin(&self, key: &[u64]) -> Result<Recording> {
        self.begin_recording(key)
    }

    fn end(&self) -> Result<Ended> {
        self.end_recording()
    }

    fn notes(&self) -> Vec<String> {
        self.take_notes()
    }

    fn forget(&self) {
        self.forget_recordings();
    }
}
