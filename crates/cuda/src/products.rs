//! Products with weights, between addresses on the device.

use crate::{
    blas::Shape,
    device::{CudaDevice, FEW, failed, is_float, on_tensor_cores},
    launch::{Mat, Products, Q8, launch},
    modules::Unit,
};
use tegula_gguf::GgmlType;
use tegula_kernels::device::{Buffer, LIBRARY_FROM, Matrix, Product, Result, planes, rounded};

/// The largest part of a matrix that is decoded at once, in bytes of bf16.
const DECODED: usize = 256 << 20;
/// Multiprocessors of the GPUs that this was written for.
const PROCESSORS: usize = 132;
/// Rows of weights in a tile.
const TILE_ROWS: usize = 128;
/// Shared memory of [`CudaDevice::group`]'s kernel, in words.
const GROUP_WORDS: usize = 12 << 10;

/// Names of the buffers that hold a network's hidden values.
const HIDDEN: [&str; 3] = ["hidden codes", "hidden scales", "hidden sums"];

/// A matrix and where its product goes: addresses.
#[derive(Clone, Copy)]
pub(crate) struct Into<'a> {
    pub w: &'a Matrix,
    pub out: u64,
    /// 0 where there is none.
    pub bias: u64,
}

impl<'a> Into<'a> {
    pub fn plain(w: &'a Matrix, out: u64) -> Into<'a> {
        Into { w, out, bias: 0 }
    }
}

impl<'a> From<&Product<'a>> for Into<'a> {
    fn from(p: &Product<'a>) -> Into<'a> {
        Into {
            w: p.w,
            out: p.out.address(),
            bias: p.bias.map_or(0, Buffer::address),
        }
    }
}

/// Pairs of tokens and experts, grouped by expert in tiles.
pub(crate) struct Grouped {
    tiles: u64,
    order: u64,
    /// Tiles, at most.
    most: usize,
    tile: usize,
    /// Pairs that share a row of x.
    share: usize,
}

impl Grouped {
    /// The same with a row of x for each pair.
    pub fn by_pairs(&self) -> Grouped {
        Grouped { share: 1, ..*self }
    }
}

/// Bytes of shared memory that a tile of so many tokens takes.
fn tile_bytes(tokens: usize) -> usize {
    2 * (TILE_ROWS + tokens) * 36 * 4
}

impl CudaDevice {
    pub(crate) fn mat(&self, m: &Matrix) -> Mat {
        let blocks = m.experts * m.n * m.k / m.ty.block_len();
        let mut at = m.buffer.address();
        let mut addresses = [0; 5];
        for (slot, plane) in addresses.iter_mut().zip(planes(m.ty)) {
            *slot = at;
            at += rounded(blocks * plane.len);
        }
        Mat {
            planes: addresses,
            grids: self.grids.address(),
            n: m.n as i32,
            k: m.k as i32,
        }
    }

    /// Products with the same `[m][k]` f32, which matrices of a type find where `x` says.
    pub(crate) fn multiply(
        &self,
        products: &[Product<'_>],
        x: impl Fn(GgmlType) -> Result<u64>,
        m: usize,
    ) -> Result<()> {
        let alike = |a: &Product<'_>, b: &Product<'_>| a.w.ty == b.w.ty && a.add == b.add;
        for group in products.chunk_by(alike).flat_map(|group| group.chunks(3)) {
            let into: Vec<_> = group.iter().map(Into::from).collect();
            self.product(&into, group[0].add, x(group[0].w.ty)?, m)?;
        }
        products
            .iter()
            .for_each(|p| self.overwritten(p.out.address()));
        Ok(())
    }

    /// One to three matrices of one type with the same x, `[m][k]` f32.
    pub(crate) fn product(&self, group: &[Into<'_>], add: bool, x: u64, m: usize) -> Result<()> {
        let (ty, k) = (group[0].w.ty, group[0].w.k);
        if m > FEW && on_tensor_cores(ty, k) {
            let x = self.rounded(x, m * k)?;
            return group
                .iter()
                .try_for_each(|into| self.by_tensor_cores(into, add, x, m));
        }
        if is_float(ty) {
            return self.by_floats(group, add, x, m);
        }
        let q8 = self.quantized(x, m, k)?;
        self.by_rows(group, add, q8, m)
    }

    /// As kernels by rows take them; a warp takes `rows` of them.
    fn products(&self, group: &[Into<'_>], add: bool, rows: usize) -> (Products, usize) {
        let mut p = Products {
            w: [self.mat(group[0].w); 3],
            out: [0; 3],
            bias: [0; 3],
            end: [0; 3],
            add: i32::from(add),
        };
        let mut units = 0;
        for i in 0..3 {
            if let Some(into) = group.get(i) {
                p.w[i] = self.mat(into.w);
                p.out[i] = into.out;
                p.bias[i] = into.bias;
                units += into.w.n.div_ceil(rows);
            }
            p.end[i] = units as i32;
        }
        (p, units)
    }

    /// Quantised matrices with up to [`FEW`] tokens.
    pub(crate) fn by_rows(&self, group: &[Into<'_>], add: bool, x: Q8, m: usize) -> Result<()> {
        let (p, units) = self.products(group, add, 2);
        let name = if m == 1 { c"mul_vec_1" } else { c"mul_vec_8" };
        let (unit, grid) = (Unit::Mul(group[0].w.ty), [units.div_ceil(4), 1, 1]);
        launch!(self, unit, name, grid, 128, 0, p, x, m as i32)
    }

    /// Matrices of plain floats with f32 activations.
    pub(crate) fn by_floats(&self, group: &[Into<'_>], add: bool, x: u64, m: usize) -> Result<()> {
        let (p, units) = self.products(group, add, 1);
        let (name, tokens) = match m {
            1 => (c"mul_float_1", 1),
            _ => (c"mul_float_8", 8),
        };
        let grid = [units.div_ceil(4), m.div_ceil(tokens), 1];
        launch!(
            self,
            Unit::Mul(group[0].w.ty),
            name,
            grid,
            128,
            0,
            p,
            x,
            m as i32
        )
    }

    /// One matrix with many tokens, bf16.
    pub(crate) fn by_tensor_cores(
        &self,
        into: &Into<'_>,
        add: bool,
        x: u64,
        m: usize,
    ) -> Result<()> {
        if m >= LIBRARY_FROM && into.bias == 0 && self.by_library(into, add, x, m)? {
            return Ok(());
        }
        let rows = into.w.n.div_ceil(TILE_ROWS);
        let tile = match m {
            ..=32 => 32,
            33..=64 => 64,
            m if rows * m.div_ceil(128) < PROCESSORS => 64,
            _ => 128,
        };
        let (none, share) = (0u64, 1i32);
        let (mat, out, bias, add) = (self.mat(into.w), into.out, into.bias, i32::from(add));
        let grid = [rows, m.div_ceil(tile), 1];
        self.tiles(
            into.w.ty, tile, grid, mat, x, m, out, bias, add, none, none, share,
        )
    }

    #[allow(clippy::too_many_arguments)]
    fn tiles(
        &self,
        ty: GgmlType,
        tile: usize,
        grid: [usize; 3],
        mat: Mat,
        x: u64,
        m: usize,
        out: u64,
        bias: u64,
        add: i32,
        tiles: u64,
        order: u64,
        share: i32,
    ) -> Result<()> {
        let name = match tile {
            32 => c"mul_mat_32",
            64 => c"mul_mat_64",
            _ => c"mul_mat_128",
        };
        let (unit, shared, m) = (Unit::Mul(ty), tile_bytes(tile), m as i32);
        launch!(
            self, unit, name, grid, 256, shared, mat, x, m, out, bias, add, tiles, order, share
        )
    }

    /// The same by cuBLAS, of the matrix decoded to bf16; `false` if it is not there.
    fn by_library(&self, into: &Into<'_>, add: bool, x: u64, m: usize) -> Result<bool> {
        let Some(blas) = self.blas() else {
            return Ok(false);
        };
        let Into { w, out, .. } = *into;
        let (mat, k) = (self.mat(w), w.k);
        let part = (DECODED / (2 * k)).clamp(1, w.n);
        let decoded = match w.ty {
            GgmlType::BF16 => 0,
            _ => self.scratch("decoded", 2 * k * part)?,
        };
        // Whoever else uses the stream must know that this thread does.
        self.pool.gpu.stream()?;
        for first in (0..w.n).step_by(part) {
            let n = part.min(w.n - first);
            let from = match w.ty {
                GgmlType::BF16 => mat.planes[0] + (2 * first * k) as u64,
                ty => {
                    let groups = (n * k / 32) as u64;
                    let (unit, name) = (Unit::Mul(ty), c"to_bf16");
                    let grid = [(n * k / 32).div_ceil(256), 1, 1];
                    let start = (first * k / 32) as u64;
                    launch!(self, unit, name, grid, 256, 0, mat, start, groups, decoded)?;
                    decoded
                }
            };
            let shape = Shape {
                n,
                m,
                k,
                stride: w.n,
            };
            let product = blas.product(shape, from, x, out + (4 * first) as u64, add);
            product.map_err(|why| failed(&self.pool.gpu, "a product by cuBLAS", why))?;
        }
        Ok(true)
    }

    /// `gate = silu(gate) * up`
    pub(crate) fn swiglu(&self, gate: u64, up: u64, len: usize) -> Result<()> {
        let (grid, len) = ([len.div_ceil(256), 1, 1], len as u64);
        launch!(self, Unit::Rows, c"swiglu", grid, 256, 0, gate, up, len)
    }

    /// The same to bf16 elsewhere.
    pub(crate) fn swiglu_rounded(&self, gate: u64, up: u64, len: usize) -> Result<u64> {
        let out = self.scratch("hidden rounded", 2 * len)?;
        let (grid, pairs) = ([(len / 2).div_ceil(256), 1, 1], (len / 2) as u64);
        let (unit, name) = (Unit::Rows, c"swiglu_bf16");
        launch!(self, unit, name, grid, 256, 0, gate, up, pairs, out)?;
        Ok(out)
    }

    /// Places for `m` rows of hidden values as `down` takes them: f32, or the q8 form.
    pub(crate) fn hidden(&self, down: &Matrix, m: usize) -> Result<(u64, Q8)> {
        if is_float(down.ty) || !down.k.is_multiple_of(32) {
            return Ok((self.scratch("hidden", 4 * m * down.k)?, Q8::default()));
        }
        Ok((0, self.q8_scratch(HIDDEN, m, down.k)?))
    }

    /// `out[pair] = w of the pair's expert · x[pair / share]`, by rows; `rows` of x.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn pairs_by_rows(
        &self,
        w: &Matrix,
        ids: u64,
        pairs: usize,
        share: usize,
        x: u64,
        rows: usize,
        out: u64,
    ) -> Result<()> {
        if !is_float(w.ty) {
            let q8 = self.quantized(x, rows, w.k)?;
            return self.pairs_by_codes(w, ids, pairs, share, q8, out);
        }
        let (unit, name, grid) = (
            Unit::Mul(w.ty),
            c"experts_float",
            [w.n.div_ceil(4), pairs, 1],
        );
        let (mat, share) = (self.mat(w), share as i32);
        launch!(self, unit, name, grid, 128, 0, mat, ids, share, x, out)
    }

    /// The same with quantised weights and x in the q8 form.
    pub(crate) fn pairs_by_codes(
        &self,
        w: &Matrix,
        ids: u64,
        pairs: usize,
        share: usize,
        x: Q8,
        out: u64,
    ) -> Result<()> {
        let (unit, name, grid) = (Unit::Mul(w.ty), c"experts_mul", [w.n.div_ceil(4), pairs, 1]);
        let (mat, share) = (self.mat(w), share as i32);
        launch!(self, unit, name, grid, 128, 0, mat, ids, share, x, out)
    }

    /// Groups pairs by expert, in tiles that suit how many an expert gets.
    pub(crate) fn group(
        &self,
        gate: &Matrix,
        ids: u64,
        pairs: usize,
        used: usize,
    ) -> Result<Grouped> {
        let experts = gate.experts;
        let tile = match pairs / experts {
            ..=16 => 32,
            17..=96 => 64,
            _ => 128,
        };
        let most = pairs / tile + experts.min(pairs);
        let left = GROUP_WORDS.saturating_sub(3 * experts + 1);
        let warps = (left / experts).min(32);
        if warps == 0 {
            let why = format!("{experts} experts; up to 3071 are supported");
            return Err(failed(&self.pool.gpu, "grouping by expert", why));
        }
        let order = self.scratch("order", 4 * pairs)?;
        let tiles = self.scratch("tiles", 12 * most)?;
        let shared = 4 * (warps * experts + 3 * experts + 1);
        let (count, size, last, n) = (pairs as i32, tile as i32, most as i32, experts as i32);
        let (unit, name, grid) = (Unit::Rows, c"group_experts", [1, 1, 1]);
        let block = 32 * warps;
        launch!(
            self, unit, name, grid, block, shared, ids, count, n, size, last, order, tiles
        )?;
        Ok(Grouped {
            tiles,
            order,
            most,
            tile,
            share: used,
        })
    }

    /// Products of grouped pairs: row `pair / share` of x, bf16, to row `pair` of out.
    pub(crate) fn by_groups(&self, w: &Matrix, x: u64, out: u64, g: &Grouped) -> Result<()> {
        let (mat, share) = (self.mat(w), g.share as i32);
        let grid = [w.n.div_ceil(TILE_ROWS), g.most, 1];
        self.tiles(
            w.ty, g.tile, grid, mat, x, 0, out, 0, 0, g.tiles, g.order, share,
        )
    }

    /// `x[t] += Σ weights · y[pair]`, `n` values a row.
    pub(crate) fn combine(
        &self,
        x: u64,
        y: u64,
        weights: u64,
        m: usize,
        used: usize,
        n: usize,
    ) -> Result<()> {
        let (grid, used, n) = ([n.div_ceil(256), m, 1], used as i32, n as i32);
        let (unit, name) = (Unit::Rows, c"combine");
        launch!(self, unit, name, grid, 256, 0, x, y, weights, used, n)
    }
}
