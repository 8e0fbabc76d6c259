//! Products with weights, between addresses on the device.

use crate::{
    device::{CudaDevice, FEW, is_float, on_tensor_cores, rounded},
    launch::{Mat, Products, launch},
    modules::Unit,
};
use tegula_kernels::device::{Buffer, Matrix, Product, Result, planes};

/// Activations in the q8 form.
#[derive(Clone, Copy)]
pub(crate) struct Q8 {
    pub codes: u64,
    pub scales: u64,
    pub sums: u64,
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

    pub(crate) fn quantize(&self, x: u64, m: usize, k: usize) -> Result<Q8> {
        let groups = m * k / 32;
        let q8 = Q8 {
            codes: self.scratch("codes", m * k)?,
            scales: self.scratch("scales", 4 * groups)?,
            sums: self.scratch("sums", 8 * groups)?,
        };
        let grid = [groups.div_ceil(8), 1, 1];
        let count = groups as u64;
        launch!(
            self,
            Unit::Rows,
            "quantize",
            grid,
            256,
            0,
            x,
            count,
            q8.codes,
            q8.scales,
            q8.sums
        )?;
        Ok(q8)
    }

    pub(crate) fn round(&self, x: u64, len: usize) -> Result<u64> {
        let out = self.scratch("rounded", 2 * len)?;
        let pairs = (len / 2) as u64;
        let grid = [(len / 2).div_ceil(256), 1, 1];
        launch!(self, Unit::Rows, "round_bf16", grid, 256, 0, x, pairs, out)?;
        Ok(out)
    }

    /// One to three matrices of one type and k, by rows, with up to [`FEW`] tokens or floats.
    pub(crate) fn by_rows(
        &self,
        group: &[Product<'_>],
        x: u64,
        q8: Option<Q8>,
        m: usize,
    ) -> Result<()> {
        let (ty, k) = (group[0].w.ty, group[0].w.k);
        let mut p = Products {
            w: [self.mat(group[0].w); 3],
            out: [0; 3],
            bias: [0; 3],
            end: [0; 3],
            add: i32::from(group[0].add),
        };
        let mut rows = 0;
        for i in 0..3 {
            if let Some(product) = group.get(i) {
                p.w[i] = self.mat(product.w);
                p.out[i] = product.out.address();
                p.bias[i] = product.bias.map_or(0, Buffer::address);
                rows += product.w.n;
            }
            p.end[i] = rows as i32;
        }
        let grid = rows.div_ceil(4);
        let (unit, tokens) = (Unit::Mul(ty), m as i32);
        if is_float(ty) {
            let grid = [grid, m.div_ceil(8), 1];
            return launch!(self, unit, "mul_float", grid, 128, 0, p, x, tokens);
        }
        let q8 = match q8 {
            Some(q8) => q8,
            None => self.quantize(x, m, k)?,
        };
        let grid = [grid, 1, 1];
        if m == 1 {
            launch!(
                self,
                unit,
                "mul_vec_1",
                grid,
                128,
                0,
                p,
                q8.codes,
                q8.scales,
                q8.sums,
                tokens
            )
        } else {
            launch!(
                self,
                unit,
                "mul_vec_8",
                grid,
                128,
                0,
                p,
                q8.codes,
                q8.scales,
                q8.sums,
                tokens
            )
        }
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn by_tiles(
        &self,
        w: &Matrix,
        x: u64,
        m: usize,
        out: u64,
        bias: u64,
        add: bool,
        grouped: Option<(u64, u64, usize, usize)>,
    ) -> Result<()> {
        let (mat, tokens, add) = (self.mat(w), m as i32, i32::from(add));
        let unit = Unit::Mul(w.ty);
        let rows = w.n.div_ceil(128);
        match grouped {
            Some((tiles, order, most, share)) => {
                let (grid, share) = ([rows, most, 1], share as i32);
                launch!(
                    self,
                    unit,
                    "mul_mat_64",
                    grid,
                    256,
                    0,
                    mat,
                    x,
                    tokens,
                    out,
                    bias,
                    add,
                    tiles,
                    order,
                    share
                )
            }
            None => {
                let (none, share) = (0u64, 1i32);
                if m <= 64 || rows * m.div_ceil(128) < 132 {
                    let grid = [rows, m.div_ceil(64), 1];
                    launch!(
                        self,
                        unit,
                        "mul_mat_64",
                        grid,
                        256,
                        0,
                        mat,
                        x,
                        tokens,
                        out,
                        bias,
                        add,
                        none,
                        none,
                        share
                    )
                } else {
                    let grid = [rows, m.div_ceil(128), 1];
                    launch!(
                        self,
                        unit,
                        "mul_mat_128",
                        grid,
                        256,
                        0,
                        mat,
                        x,
                        tokens,
                        out,
                        bias,
                        add,
                        none,
                        none,
                        share
                    )
                }
            }
        }
    }

    /// `gate = silu(gate) * up`
    pub(crate) fn swiglu(&self, gate: u64, up: u64, len: usize) -> Result<()> {
        let (grid, len) = ([len.div_ceil(256), 1, 1], len as u64);
        launch!(self, Unit::Rows, "swiglu", grid, 256, 0, gate, up, len)
    }

    /// `out[pair] = w of the pair's expert · x[pair / share]`, by rows.
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
        let (mat, share) = (self.mat(w), share as i32);
        let grid = [w.n.div_ceil(4), pairs, 1];
        let unit = Unit::Mul(w.ty);
        if is_float(w.ty) {
            return launch!(
                self,
                unit,
                "experts_float",
                grid,
                128,
                0,
                mat,
                ids,
                share,
                x,
                out
            );
        }
        let q8 = self.quantize(x, rows, w.k)?;
        launch!(
            self,
            unit,
            "experts_mul",
            grid,
            128,
            0,
            mat,
            ids,
            share,
            q8.codes,
            q8.scales,
            q8.sums,
            out
        )
    }

    /// One product between addresses.
    pub(crate) fn single(&self, w: &Matrix, x: u64, m: usize, out: u64, add: bool) -> Result<()> {
        if m > FEW && on_tensor_cores(w.ty, w.k) {
            let x = self.round(x, m * w.k)?;
            return self.by_tiles(w, x, m, out, 0, add, None);
        }
        let mut p = Products {
            w: [self.mat(w); 3],
            out: [out; 3],
            bias: [0; 3],
            end: [w.n as i32; 3],
            add: i32::from(add),
        };
        p.out[0] = out;
        let (unit, tokens) = (Unit::Mul(w.ty), m as i32);
        let grid = w.n.div_ceil(4);
        if is_float(w.ty) {
            let grid = [grid, m.div_ceil(8), 1];
            return launch!(self, unit, "mul_float", grid, 128, 0, p, x, tokens);
        }
        let q8 = self.quantize(x, m, w.k)?;
        let grid = [grid, 1, 1];
        if m == 1 {
            launch!(
                self,
                unit,
                "mul_vec_1",
                grid,
                128,
                0,
                p,
                q8.codes,
                q8.scales,
                q8.sums,
                tokens
            )
        } else {
            launch!(
                self,
                unit,
                "mul_vec_8",
                grid,
                128,
                0,
                p,
                q8.codes,
                q8.scales,
                q8.sums,
                tokens
            )
        }
    }
}
