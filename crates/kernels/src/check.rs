//! One call of a kernel held against scalar, the definition: what the checkasm tests use on
//! random data and a `check-kernels` build on every call of a whole run.
//!
//! Quantised products and quantised activations must be equal bit for bit: integer sums are
//! exact, and every tier adds the groups up in one order with the same roundings. Floats are
//! equal within the bounds stated here, because tiers may add them up in any order and have
//! exponentials of their own; products of floats, those of tiles among them, are held against
//! sums in f64. NaN equals NaN.

use half::bf16;

use crate::{
    acts::{Forms, Q8Dest},
    attn::{CHUNK, ChunkArgs},
    float::FloatOps,
    kv::pruned::Half,
    scalar, sparse,
    strip::{
        self, ROWS,
        kernels::{PANEL_BYTES, StripArgs},
    },
};
use tegula_gguf::blocks;

#[cfg(feature = "check-kernels")]
use crate::{acts::TILE_GROUP, attn::TileChunk, kv::KV_PAGE};

/// Share of `Σ |w · x|` by which products of float weights may differ.
pub const FLOAT_PRODUCTS: f32 = 2e-6;
/// Relative difference of a norm's values of at least 1e-3.
pub const RMS_NORM: f32 = 4e-6;
/// Relative difference of SwiGLU's values of at least 1e-6.
pub const SWIGLU: f32 = 2e-6;
/// Relative difference of softmax's values of at least 1e-6.
pub const SOFTMAX: f32 = 4e-6;
/// Relative difference of a chunk's largest score and sum of weights; more where scores are
/// large, since it is their absolute difference that counts.
pub const SCORES: f32 = 2e-5;
/// The same of a chunk's weighted values, of at least 1.
pub const ATTENTION: f32 = 5e-5;
/// The same of attention on tiles, where queries, keys, values and weights are bf16.
pub const TILE_ATTENTION: f32 = 4e-2;

/// A kernel's result that is not scalar's.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[error("{what}: {got} where scalar has {want}, at most {within:e} apart")]
pub struct Mismatch {
    /// The operation, its shape, and the position in the result.
    pub what: String,
    /// The tier's value.
    pub got: f32,
    /// Scalar's value.
    pub want: f32,
    /// The bound that was missed; 0 means equality.
    pub within: f32,
}

/// The first value of `got` that is not that of `want`. `within(i)` is the largest absolute
/// difference, `what(i)` names position `i`.
///
/// # Errors
/// The first value beyond its bound.
///
/// # Panics
/// When lengths differ.
pub fn equal(
    got: &[f32],
    want: &[f32],
    within: impl Fn(usize) -> f32,
    what: impl Fn(usize) -> String,
) -> Result<(), Mismatch> {
    assert_eq!(got.len(), want.len());
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        if got == want || got.is_nan() && want.is_nan() {
            continue;
        }
        let within = within(i);
        let near = within.is_finite() && (got - want).abs() <= within;
        if !near {
            return Err(Mismatch {
                what: what(i),
                got,
                want,
                within,
            });
        }
    }
    Ok(())
}

/// `relative` of each value, or of `floor` where that is more.
pub fn relative(want: &[f32], relative: f32, floor: f32) -> impl Fn(usize) -> f32 {
    move |i| relative * want[i].abs().max(floor)
}

/// Checks the tile that a kernel's `mul_strips` has written.
///
/// # Errors
/// The first product that is not scalar's.
///
/// # Safety
/// As `MatmulKernels::mul_strips`, and the tile holds the results.
pub unsafe fn mul_strips(args: &StripArgs<'_>) -> Result<(), Mismatch> {
    // SAFETY: the caller's.
    unsafe {
        if args.ty.is_sparse() {
            return with_dense(args, |args| mul_strips(args));
        }
        if !args.ty.is_quantized() {
            return float_products(args, &args.acts.to_f32(), |x| x);
        }
        let len = args.strips.len() * args.acts.m * ROWS;
        let (mut want, mut panel) = (vec![f32::NAN; len], vec![0; PANEL_BYTES]);
        (scalar::matmul::KERNELS.mul_strips)(&StripArgs {
            tile: want.as_mut_ptr(),
            panel: panel.as_mut_ptr(),
            ..*args
        });
        let got = std::slice::from_raw_parts(args.tile, len);
        equal(got, &want, |_| 0.0, name_product(args))
    }
}

/// Checks the tile that a tile kernel's `mul_strips` has written: on bf16 tiles the products of
/// weights and activations that are rounded to bf16 once, on 8-bit ones those of vectors.
///
/// # Errors
/// The first product that is another.
///
/// # Safety
/// As `Tiles::mul_strips`, and the tile holds the results.
pub unsafe fn tile_products(args: &StripArgs<'_>) -> Result<(), Mismatch> {
    // SAFETY: the caller's.
    unsafe {
        if !args.acts.forms.has(Forms::TILES) {
            return mul_strips(args);
        }
        if args.ty.is_sparse() {
            return with_dense(args, |args| tile_products(args));
        }
        float_products(args, &args.acts.to_f32(), round)
    }
}

/// Runs a check with dense strips in the place of sparse ones.
///
/// # Safety
/// As `MatmulKernels::mul_strips`, with sparse strips.
unsafe fn with_dense(
    args: &StripArgs<'_>,
    check: impl Fn(&StripArgs<'_>) -> Result<(), Mismatch>,
) -> Result<(), Mismatch> {
    let ty = args.ty.dense();
    let layout = strip::layout(ty).expect("a type that products take");
    let dense = |&strip: &*const u8| {
        let mut out = vec![0; layout.strip_bytes(args.k)];
        // SAFETY: the caller's.
        unsafe { sparse::expand(args.ty, args.k, strip, out.as_mut_ptr()) };
        out
    };
    let dense: Vec<Vec<u8>> = args.strips.iter().map(dense).collect();
    let strips: Vec<*const u8> = dense.iter().map(|s| s.as_ptr()).collect();
    check(&StripArgs {
        ty,
        strips: &strips,
        ..*args
    })
}

fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// Names an element of `[strips][tokens][16]` products.
fn name_product(args: &StripArgs<'_>) -> impl Fn(usize) -> String {
    let (ty, k, m, count) = (args.ty, args.k, args.acts.m, args.strips.len());
    move |i| {
        let (strip, token, row) = (i / ROWS / m, i / ROWS % m, i % ROWS);
        format!("{count} strips of {ty} x {k} by {m} tokens: strip {strip} token {token} row {row}")
    }
}

/// Checks products of the weights, each rounded by `round`, with `x`, `[m][k]`.
///
/// # Safety
/// Strips and tile are as `StripArgs` states.
unsafe fn float_products(
    args: &StripArgs<'_>,
    x: &[f32],
    round: impl Fn(f32) -> f32,
) -> Result<(), Mismatch> {
    let (m, k) = (args.acts.m, args.k);
    let len = args.strips.len() * m * ROWS;
    let (mut want, mut bounds) = (vec![0.0; len], vec![0.0; len]);
    for (s, &strip) in args.strips.iter().enumerate() {
        for row in 0..ROWS {
            // SAFETY: the caller's.
            let mut w = unsafe { strip_row(args, strip, row) };
            w.iter_mut().for_each(|w| *w = round(*w));
            for (t, x) in x.chunks_exact(k.max(1)).enumerate() {
                let terms = || w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let at = (s * m + t) * ROWS + row;
                want[at] = terms().sum::<f64>() as f32;
                let sum: f64 = terms().map(f64::abs).sum();
                // The bf16 dot products take subnormal numbers for zero.
                let lost = |(&w, &x): (&f32, &f32)| f64::from(w.abs() + x.abs() + 1.0);
                let lost: f64 = w.iter().zip(x).map(lost).sum();
                bounds[at] =
                    (f64::from(FLOAT_PRODUCTS) * sum + f64::from(f32::MIN_POSITIVE) * lost) as f32;
            }
        }
    }
    // SAFETY: the caller's.
    let got = unsafe { std::slice::from_raw_parts(args.tile, len) };
    equal(got, &want, |i| bounds[i], name_product(args))
}

/// The weights of a row of a strip: codes times scales with one rounding, or floats.
///
/// # Safety
/// The strip is whole.
unsafe fn strip_row(args: &StripArgs<'_>, strip: *const u8, row: usize) -> Vec<f32> {
    let (ty, k) = (args.ty, args.k);
    let layout = strip::layout(ty).expect("a type that products take");
    // SAFETY: the caller's.
    let strip = unsafe { std::slice::from_raw_parts(strip, layout.strip_bytes(k)) };
    let bytes = ty.bytes_for(k as u64).expect("whole blocks");
    let mut raw = vec![0; bytes as usize];
    strip::unpack_row(layout, k, strip, row, &mut raw);
    let mut out = vec![0.0; k];
    let Some(group) = blocks::group_len(ty) else {
        blocks::dequantize(ty, &raw, &mut out).expect("a row of floats");
        return out;
    };
    let groups = ty.block_len() / group;
    let mut codes = vec![0; ty.block_len()];
    let (mut scales, mut mins) = (vec![0.0; groups], vec![0.0; groups]);
    let mins_len = if blocks::has_min(ty) { groups } else { 0 };
    for (raw, out) in raw
        .chunks_exact(ty.block_bytes())
        .zip(out.chunks_exact_mut(ty.block_len()))
    {
        blocks::decode_codes(ty, raw, &mut codes, &mut scales, &mut mins[..mins_len])
            .expect("one block of a quantised type");
        for (i, (out, &code)) in out.iter_mut().zip(&codes).enumerate() {
            *out = f32::from(code).mul_add(scales[i / group], mins[i / group]);
        }
    }
    out
}

/// Checks what a tile kernel's `pack` has written for `x`: `step` elements between groups
/// of 32.
///
/// # Errors
/// The first value that is not `x` rounded to bf16.
///
/// # Safety
/// As `Tiles::pack`, and `out` holds the results.
pub unsafe fn pack(x: &[f32], out: *const u16, step: usize) -> Result<(), Mismatch> {
    // SAFETY: the caller's.
    let at = |i: usize| unsafe { *out.add(i / 32 * step + i % 32) };
    let got: Vec<_> = (0..x.len())
        .map(|i| bf16::from_bits(at(i)).to_f32())
        .collect();
    let want: Vec<_> = x.iter().copied().map(round).collect();
    // The conversion takes subnormal numbers for zero.
    let tiny = |_| f32::MIN_POSITIVE;
    equal(&got, &want, tiny, |i| format!("bf16 of {}: {i}", x.len()))
}

/// Checks what a kernel's `quantize_q8` has written for `x`.
///
/// # Errors
/// The first code, scale or sum that is not scalar's.
///
/// # Safety
/// As `MatmulKernels::quantize_q8`, and the destination holds the results.
pub unsafe fn quantize_q8(x: &[f32], dest: &Q8Dest) -> Result<(), Mismatch> {
    let groups = x.len() / 32;
    let mut q = vec![0i8; x.len()];
    let (mut d, mut nsum32, mut fsum32) = (vec![0.0; groups], vec![0; groups], vec![0.0; groups]);
    let (mut nsum16, mut fsum16) = (vec![0; 2 * groups], vec![0.0; 2 * groups]);
    let want = Q8Dest {
        tokens: 1,
        q: q.as_mut_ptr(),
        d: d.as_mut_ptr(),
        nsum32: nsum32.as_mut_ptr(),
        nsum16: nsum16.as_mut_ptr(),
        fsum32: fsum32.as_mut_ptr(),
        fsum16: fsum16.as_mut_ptr(),
    };
    // SAFETY: the vectors above hold one token; the destination is the caller's.
    unsafe {
        (scalar::matmul::KERNELS.quantize_q8)(x, &want);
        let (per, len) = (dest.tokens, x.len());
        let code = |i: usize| f32::from(*dest.q.add(i / 32 * 32 * per + i % 32));
        let codes: Vec<f32> = q.iter().map(|&q| f32::from(q)).collect();
        let ints = |v: &[i32]| v.iter().map(|&n| n as f32).collect::<Vec<_>>();
        let check = |name: &str, count: usize, got: &dyn Fn(usize) -> f32, want: &[f32]| {
            let got: Vec<f32> = (0..count).map(got).collect();
            let what = |i| format!("quantize_q8 of {len} values: {name} {i}");
            equal(&got, want, |_| 0.0, what)
        };
        check("code", len, &code, &codes)?;
        check("scale", groups, &|i| *dest.d.add(i * per), &d)?;
        let sums = |i: usize| *dest.nsum32.add(i * per) as f32;
        check("sum of 32", groups, &sums, &ints(&nsum32))?;
        let sums = |i: usize| *dest.nsum16.add(i * per) as f32;
        check("sum of 16", 2 * groups, &sums, &ints(&nsum16))?;
        let sums = |i: usize| *dest.fsum32.add(i * per);
        check("scaled sum of 32", groups, &sums, &fsum32)?;
        let sums = |i: usize| *dest.fsum16.add(i * per);
        check("scaled sum of 16", 2 * groups, &sums, &fsum16)
    }
}

const FLOAT: &FloatOps = &scalar::float::OPS;

/// Checks `got`, the result of `rms_norm`.
///
/// # Errors
/// The first value that is not scalar's.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, got: &[f32]) -> Result<(), Mismatch> {
    let mut want = vec![0.0; x.len()];
    // SAFETY: every CPU has the scalar tier. (Likewise below.)
    unsafe { (FLOAT.rms_norm)(x, w, eps, &mut want) };
    let within = relative(&want, RMS_NORM, 1e-3);
    equal(got, &want, within, |i| {
        format!("rms_norm of {}: {i}", x.len())
    })
}

/// Checks `got`, the result of adding `x` to `dst`.
///
/// # Errors
/// The first value that is not scalar's.
pub fn add_assign(dst: &[f32], x: &[f32], got: &[f32]) -> Result<(), Mismatch> {
    let mut want = dst.to_vec();
    // SAFETY: as above.
    unsafe { (FLOAT.add_assign)(&mut want, x) };
    equal(
        got,
        &want,
        |_| 0.0,
        |i| format!("add_assign of {}: {i}", x.len()),
    )
}

/// Checks `got`, the result of `swiglu`.
///
/// # Errors
/// The first value that is not scalar's.
pub fn swiglu(gate: &[f32], up: &[f32], got: &[f32]) -> Result<(), Mismatch> {
    let mut want = vec![0.0; gate.len()];
    // SAFETY: as above.
    unsafe { (FLOAT.swiglu)(gate, up, &mut want) };
    let within = relative(&want, SWIGLU, 1e-6);
    equal(got, &want, within, |i| {
        format!("swiglu of {}: {i}", gate.len())
    })
}

/// Checks what a tile kernel's `swiglu` has written: operands `[2][tokens][16]`, strips `step`
/// apart, results `[tokens][32]`.
///
/// # Errors
/// The first value that is not scalar's rounded to bf16.
pub fn tile_swiglu(
    gate: &[f32],
    up: &[f32],
    step: usize,
    tokens: usize,
    got: &[u16],
) -> Result<(), Mismatch> {
    let of = |x: &[f32]| -> Vec<f32> {
        let at = |i: usize| i % 32 / ROWS * step + i / 32 * ROWS + i % ROWS;
        (0..tokens * 32).map(|i| x[at(i)]).collect()
    };
    let (gate, up) = (of(gate), of(up));
    let mut want = vec![0.0; gate.len()];
    // SAFETY: as above.
    unsafe { (FLOAT.swiglu)(&gate, &up, &mut want) };
    let got: Vec<_> = got.iter().map(|&x| bf16::from_bits(x).to_f32()).collect();
    let within = relative(&want, 1.0 / 256.0 + SWIGLU, 1e-6);
    equal(&got, &want, within, |i| {
        format!("swiglu on tiles, {tokens} tokens: {i}")
    })
}

/// Checks `got`, the result of gathering `sums`, added to `before` if there is anything.
///
/// # Errors
/// The first value that is not scalar's.
pub fn gather(
    sums: &[f32],
    step: usize,
    before: Option<&[f32]>,
    got: &[f32],
) -> Result<(), Mismatch> {
    let mut want = before.map_or(vec![0.0; got.len()], <[f32]>::to_vec);
    // SAFETY: as above.
    unsafe { (FLOAT.gather)(sums, step, &mut want, before.is_some()) };
    let what = |i| format!("sums of {} rows: {i}", got.len());
    equal(got, &want, |_| 0.0, what)
}

/// Checks `got`, the softmax of `x`.
///
/// # Errors
/// The first value that is not scalar's.
pub fn softmax(x: &[f32], got: &[f32]) -> Result<(), Mismatch> {
    let mut want = x.to_vec();
    // SAFETY: as above.
    unsafe { (FLOAT.softmax)(&mut want) };
    let within = relative(&want, SOFTMAX, 1e-6);
    equal(got, &want, within, |i| {
        format!("softmax of {}: {i}", x.len())
    })
}

/// Checks the results in `args` of a chunk of attention.
///
/// # Errors
/// The first value that is not scalar's.
pub fn chunk(args: &ChunkArgs<'_>) -> Result<(), Mismatch> {
    let (rows, dim) = (args.visible.len(), args.dim);
    let mut scores = vec![0.0; rows * CHUNK];
    let mut acc = vec![0.0; rows * dim];
    let (mut max, mut sum) = (vec![0.0; rows], vec![0.0; rows]);
    let mut want = ChunkArgs {
        scores: &mut scores,
        acc: &mut acc,
        max: &mut max,
        sum: &mut sum,
        ..*args
    };
    // SAFETY: as above.
    unsafe { scalar::attention::chunk(&mut want) };
    let what = |name: &'static str, per: usize| {
        let (k, v, visible) = (args.k_type, args.v_type, args.visible);
        move |i: usize| {
            let seen = visible[i / per];
            format!("attention dim {dim} {k:?}/{v:?}: {name} {i}, {seen} positions seen")
        }
    };
    let scale = |row: usize| max[row].abs().max(1.0);
    equal(args.max, &max, |r| SCORES * scale(r), what("max", 1))?;
    let within = |r: usize| SCORES * scale(r) * sum[r].max(1.0);
    equal(args.sum, &sum, within, what("sum", 1))?;
    let within = |i: usize| ATTENTION * scale(i / dim) * acc[i].abs().max(1.0);
    equal(args.acc, &acc, within, what("acc", dim))
}

/// Checks what a pruned page was unpacked to.
///
/// # Errors
/// The first byte that is not scalar's.
pub fn unpack(half: &Half, packed: &[u8], out: &[u8]) -> Result<(), Mismatch> {
    let mut want = vec![0; out.len()];
    half.unpack(packed, &mut want);
    let floats = |bytes: &[u8]| -> Vec<f32> { bytes.iter().map(|&b| f32::from(b)).collect() };
    equal(
        &floats(out),
        &floats(&want),
        |_| 0.0,
        |i| format!("unpacked {half:?}: byte {i}"),
    )
}

/// Rows as [`attention`](crate::attn) on tiles keeps them from chunk to chunk.
#[cfg(feature = "check-kernels")]
struct Running {
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

#[cfg(feature = "check-kernels")]
impl Running {
    fn of(args: &TileChunk<'_>) -> Running {
        let rows = args.visible.len();
        Running {
            acc: args.acc[..rows * args.dim].to_vec(),
            max: args.max.to_vec(),
            sum: args.sum.to_vec(),
        }
    }

    /// Adds what `part` saw.
    fn merge(&mut self, part: &Running, dim: usize) {
        for row in 0..self.max.len() {
            let max = self.max[row].max(part.max[row]);
            // What a sum counts for beside the other's largest score; nothing if it is empty.
            let weight = |of: f32| if of == max { 1.0 } else { (of - max).exp() };
            let (old, new) = (weight(self.max[row]), weight(part.max[row]));
            self.max[row] = max;
            self.sum[row] = self.sum[row] * old + part.sum[row] * new;
            let acc = &mut self.acc[row * dim..][..dim];
            for (acc, part) in acc.iter_mut().zip(&part.acc[row * dim..]) {
                *acc = *acc * old + part * new;
            }
        }
    }

    /// Weighted means of the values, and logarithms of the sums of all weights, which do not
    /// depend on the largest score that a row happened to subtract.
    fn results(&self, dim: usize) -> (Vec<f32>, Vec<f32>) {
        let some = |sum: f32| if sum == 0.0 { 1.0 } else { sum };
        let mean = |(i, acc): (usize, &f32)| acc / some(self.sum[i / dim]);
        let log = |(max, sum): (&f32, &f32)| match *sum {
            0.0 => f32::NEG_INFINITY,
            sum => max + sum.ln(),
        };
        (
            self.acc.iter().enumerate().map(mean).collect(),
            self.max.iter().zip(&self.sum).map(log).collect(),
        )
    }
}

/// Checks what a tile kernel made of rows that were `before`.
///
/// # Errors
/// The first value that is not scalar's.
#[cfg(feature = "check-kernels")]
fn tile_chunk(before: Running, args: &TileChunk<'_>) -> Result<(), Mismatch> {
    let (rows, dim) = (args.visible.len(), args.dim);
    let query = |i: usize| {
        let (row, col) = (i / dim, i % dim);
        let group = row / TILE_GROUP * TILE_GROUP * dim;
        let at = group + (col / 32 * TILE_GROUP + row % TILE_GROUP) * 32 + col % 32;
        bf16::from_bits(args.q[at]).to_f32()
    };
    let q: Vec<f32> = (0..rows * dim).map(query).collect();
    let mut want = before;
    for (i, pages) in args.pages.chunks(CHUNK / KV_PAGE).enumerate() {
        let seen = |n: &usize| n.saturating_sub(i * CHUNK).min(CHUNK);
        let visible: Vec<usize> = args.visible.iter().map(seen).collect();
        let mut scores = vec![0.0; rows * CHUNK];
        let mut part = Running {
            acc: vec![0.0; rows * dim],
            max: vec![0.0; rows],
            sum: vec![0.0; rows],
        };
        // SAFETY: as above.
        unsafe {
            scalar::attention::chunk(&mut ChunkArgs {
                k_type: args.k_type,
                v_type: args.v_type,
                dim,
                q: &q,
                visible: &visible,
                pages,
                next: None,
                pruned: None,
                scores: &mut scores,
                acc: &mut part.acc,
                max: &mut part.max,
                sum: &mut part.sum,
            });
        }
        want.merge(&part, dim);
    }
    let ((got, got_logs), (want, logs)) = (Running::of(args).results(dim), want.results(dim));
    let what = |name: &'static str| {
        let (k, v) = (args.k_type, args.v_type);
        move |i: usize| format!("attention on tiles, dim {dim} {k:?}/{v:?}: {name} {i}")
    };
    let within = relative(&logs, TILE_ATTENTION, 1.0);
    equal(&got_logs, &logs, within, what("log of the sum"))?;
    equal(
        &got,
        &want,
        relative(&want, TILE_ATTENTION, 1.0),
        what("mean"),
    )
}

/// The kernels of `inner` with every call checked: what a `check-kernels` build runs.
#[cfg(feature = "check-kernels")]
pub(crate) use shims::checked;

#[cfg(feature = "check-kernels")]
mod shims {
    use std::sync::OnceLock;

    use super::*;
    use crate::{
        attn::{AttnOps, TileAttention},
        strip::kernels::{MatmulKernels, Tiles},
        table::Kernels,
        tier::Tier,
    };

    /// Tables that there can be: three of tiers, each plain, with AMX, and with its emulation.
    const TABLES: usize = 3 * Tier::ALL.len();

    /// The kernels behind the checked ones: function pointers capture nothing.
    static INNER: [OnceLock<Kernels>; TABLES] = [const { OnceLock::new() }; TABLES];

    fn inner<const TABLE: usize>() -> &'static Kernels {
        INNER[TABLE].get().expect("set by `checked`")
    }

    fn hold<const TABLE: usize>(result: Result<(), Mismatch>) {
        if let Err(e) = result {
            panic!("{} kernel, {e}", inner::<TABLE>().tier);
        }
    }

    /// A table of functions that call those of `inner` and then scalar.
    pub(crate) fn checked(inner: Kernels) -> Kernels {
        if inner.tier == Tier::Scalar {
            return inner;
        }
        let tables: [fn(Kernels) -> Kernels; TABLES] = [
            table::<0>, table::<1>, table::<2>, table::<3>, table::<4>, table::<5>, table::<6>,
            table::<7>, table::<8>,
        ];
        let amx = match inner.amx {
            None => 0,
            Some(amx) => 1 + usize::from(amx.is_emulated()),
        };
        tables[inner.tier as usize + Tier::ALL.len() * amx](inner)
    }

    fn table<const TABLE: usize>(inner: Kernels) -> Kernels {
        let inner = INNER[TABLE].get_or_init(|| inner);
        let tiles = |tiles| Tiles {
            mul_strips: tile_products::<TABLE>,
            pack: pack::<TABLE>,
            swiglu: tile_swiglu::<TABLE>,
            ..tiles
        };
        Kernels {
            tier: inner.tier,
            amx: inner.amx,
            matmul: MatmulKernels {
                mul_strips: mul_strips::<TABLE>,
                quantize_q8: quantize_q8::<TABLE>,
                tiles: inner.matmul.tiles.map(tiles),
                ..inner.matmul
            },
            float: FloatOps {
                rms_norm: rms_norm::<TABLE>,
                add_assign: add_assign::<TABLE>,
                swiglu: swiglu::<TABLE>,
                softmax: softmax::<TABLE>,
                gather: gather::<TABLE>,
            },
            attn: AttnOps {
                chunk: chunk::<TABLE>,
                unpack: unpack::<TABLE>,
                tiles: inner.attn.tiles.map(|tiles| TileAttention {
                    chunk: tile_chunk::<TABLE>,
                    ..tiles
                }),
            },
        }
    }

    // SAFETY (all of the below): the caller keeps the promises of the table's function, and
    // the checks ask for no others.

    unsafe fn mul_strips<const TABLE: usize>(args: &StripArgs<'_>) {
        // SAFETY: see above.
        unsafe {
            (inner::<TABLE>().matmul.mul_strips)(args);
            hold::<TABLE>(super::mul_strips(args));
        }
    }

    /// The tile kernels of a table that has them.
    fn tiles<const TABLE: usize>() -> &'static Tiles {
        let tiles = inner::<TABLE>().matmul.tiles.as_ref();
        tiles.expect("wrapped by `table`")
    }

    unsafe fn tile_products<const TABLE: usize>(args: &StripArgs<'_>) {
        // SAFETY: see above.
        unsafe {
            (tiles::<TABLE>().mul_strips)(args);
            hold::<TABLE>(super::tile_products(args));
        }
    }

    unsafe fn pack<const TABLE: usize>(x: &[f32], out: *mut u16, step: usize) {
        // SAFETY: see above.
        unsafe {
            (tiles::<TABLE>().pack)(x, out, step);
            hold::<TABLE>(super::pack(x, out, step));
        }
    }

    unsafe fn tile_swiglu<const TABLE: usize>(
        gate: *const f32,
        up: *const f32,
        step: usize,
        tokens: usize,
        out: *mut u16,
    ) {
        // SAFETY: see above.
        unsafe {
            (tiles::<TABLE>().swiglu)(gate, up, step, tokens, out);
            let of = |x| std::slice::from_raw_parts(x, step + tokens * ROWS);
            let out = std::slice::from_raw_parts(out, tokens * 32);
            hold::<TABLE>(super::tile_swiglu(of(gate), of(up), step, tokens, out));
        }
    }

    unsafe fn quantize_q8<const TABLE: usize>(x: &[f32], dest: &Q8Dest) {
        // SAFETY: see above.
        unsafe {
            (inner::<TABLE>().matmul.quantize_q8)(x, dest);
            hold::<TABLE>(super::quantize_q8(x, dest));
        }
    }

    unsafe fn rms_norm<const TABLE: usize>(x: &[f32], w: &[f32], eps: f32, dst: &mut [f32]) {
        // SAFETY: see above.
        unsafe { (inner::<TABLE>().float.rms_norm)(x, w, eps, dst) };
        hold::<TABLE>(super::rms_norm(x, w, eps, dst));
    }

    unsafe fn add_assign<const TABLE: usize>(dst: &mut [f32], x: &[f32]) {
        let before = dst.to_vec();
        // SAFETY: see above.
        unsafe { (inner::<TABLE>().float.add_assign)(dst, x) };
        hold::<TABLE>(super::add_assign(&before, x, dst));
    }

    unsafe fn swiglu<const TABLE: usize>(gate: &[f32], up: &[f32], dst: &mut [f32]) {
        // SAFETY: see above.
        unsafe { (inner::<TABLE>().float.swiglu)(gate, up, dst) };
        hold::<TABLE>(super::swiglu(gate, up, dst));
    }

    unsafe fn softmax<const TABLE: usize>(x: &mut [f32]) {
        let before = x.to_vec();
        // SAFETY: see above.
        unsafe { (inner::<TABLE>().float.softmax)(x) };
        hold::<TABLE>(super::softmax(&before, x));
    }

    unsafe fn gather<const TABLE: usize>(sums: &[f32], step: usize, dst: &mut [f32], adds: bool) {
        let before = adds.then(|| dst.to_vec());
        // SAFETY: see above.
        unsafe { (inner::<TABLE>().float.gather)(sums, step, dst, adds) };
        hold::<TABLE>(super::gather(sums, step, before.as_deref(), dst));
    }

    unsafe fn chunk<const TABLE: usize>(args: &mut ChunkArgs<'_>) {
        // SAFETY: see above.
        unsafe { (inner::<TABLE>().attn.chunk)(args) };
        hold::<TABLE>(super::chunk(args));
    }

    unsafe fn unpack<const TABLE: usize>(half: &Half, packed: &[u8], out: &mut [u8]) {
        // SAFETY: see above.
        unsafe { (inner::<TABLE>().attn.unpack)(half, packed, out) };
        hold::<TABLE>(super::unpack(half, packed, out));
    }

    unsafe fn tile_chunk<const TABLE: usize>(args: &mut TileChunk<'_>) {
        let before = Running::of(args);
        let tiles = inner::<TABLE>().attn.tiles.as_ref();
        // SAFETY: see above.
        unsafe { (tiles.expect("wrapped by `table`").chunk)(args) };
        hold::<TABLE>(super::tile_chunk(before, args));
    }
}
