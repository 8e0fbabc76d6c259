//! The same matrix product written in other ways than Tegula's own, to find out what each
//! idea is worth. Nothing that runs models uses this.
//!
//! Ways differ in three ideas, each on or off:
//!
//! - *interleaving*: rows stand side by side (16 in a strip), so one broadcast of four
//!   activations feeds 16 rows and no sum crosses lanes; or each row stands by itself, 32 of
//!   its weights fill a vector, and every dot product ends in a horizontal sum;
//! - *decode once*: what has been decoded multiplies up to eight tokens before the next
//!   weights are decoded; or it is decoded anew for each token;
//! - *byte activations*: codes meet activations that were quantised to bytes; or they become
//!   f32 and meet f32 activations.
//!
//! Upstream's classic products are row by row, decoded for each token. IQK's are interleaved
//! and decoded once. Tegula's own are IQK's with a panel: a stretch of 1,024 inputs is decoded
//! to the first-level cache and all tokens pass over it, eight at a time.

mod interleaved;
mod rowwise;
#[cfg(feature = "amx")]
mod staged;
#[cfg(feature = "amx")]
mod tiles;

#[cfg(feature = "amx")]
pub use staged::{StagedInputs, StagedMatrix, StagedType, multiply_staged};
#[cfg(feature = "amx")]
pub use tiles::{ByteInputs, ByteMatrix, multiply_bytes};

use crate::{
    acts::{Acts, ActsView, Forms},
    avx512::matmul::Avx512,
    disjoint::DisjointMut,
    generic::{
        format::{self, Shape},
        matmul::{Machine, Panel, Tokens},
    },
    mem::AlignedBuf,
    pool::Pool,
    strip::{self, ROWS, pack_strip},
    table::Kernels,
    tier::Tier,
};
use tegula_gguf::GgmlType;

/// A way to write the product.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Way {
    /// Row by row, decoded for each token.
    RowWise,
    /// Row by row, decoded once for eight tokens.
    RowWiseOnce,
    /// Interleaved, decoded for each token.
    InterleavedEach,
    /// Interleaved, decoded once for eight tokens.
    Interleaved,
    /// Interleaved, decoded once to f32, with f32 activations.
    InterleavedFloats,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 5] = [
        Way::RowWise,
        Way::RowWiseOnce,
        Way::InterleavedEach,
        Way::Interleaved,
        Way::InterleavedFloats,
    ];

    /// As records name it.
    pub const fn name(self) -> &'static str {
        match self {
            Way::RowWise => "row-wise",
            Way::RowWiseOnce => "row-wise, decoded once",
            Way::InterleavedEach => "interleaved, decoded each time",
            Way::Interleaved => "interleaved",
            Way::InterleavedFloats => "interleaved, f32 activations",
        }
    }

    /// Rows stand side by side.
    pub const fn interleaves(self) -> bool {
        !matches!(self, Way::RowWise | Way::RowWiseOnce)
    }

    /// Tokens that share what has been decoded, at most.
    pub const fn tokens(self) -> usize {
        match self {
            Way::RowWise | Way::InterleavedEach => 1,
            Way::RowWiseOnce | Way::Interleaved | Way::InterleavedFloats => 8,
        }
    }

    fn form(self) -> Forms {
        match self {
            Way::InterleavedFloats => Forms::F32,
            _ => Forms::Q8,
        }
    }
}

/// The formats that ways are written for.
pub const TYPES: [GgmlType; 5] = [
    GgmlType::Q4_0,
    GgmlType::Q8_0,
    GgmlType::Q4_K,
    GgmlType::Q6_K,
    GgmlType::IQ4_XS,
];

/// Multiplies 16 rows with all tokens of a view: `tile` receives `[m][16]`.
type Kernel = unsafe fn(rows: *const u8, k: usize, acts: &ActsView<'_>, tile: *mut f32);

/// How rows are given to threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chunks {
    /// 16 at a time, to whoever comes.
    Dynamic,
    /// An equal share each.
    Static,
}

/// A matrix `[n][k]` as a way wants it.
#[derive(Debug)]
pub struct Matrix {
    ty: GgmlType,
    n: usize,
    k: usize,
    /// Bytes of 16 rows.
    step: usize,
    data: AlignedBuf,
}

impl Matrix {
    /// A matrix of raw rows `[n][k]`; `huge_pages` says on which pages it lies.
    ///
    /// # Panics
    /// When `n` is no multiple of 16, `k` none of 256, the type is none of [`TYPES`], or the
    /// bytes are not those of the rows.
    pub fn new(
        way: Way,
        (ty, n, k): (GgmlType, usize, usize),
        raw: &[u8],
        pool: &Pool,
        huge_pages: bool,
    ) -> Matrix {
        assert!(n.is_multiple_of(ROWS) && k.is_multiple_of(256) && TYPES.contains(&ty));
        let row = k / ty.block_len() * ty.block_bytes();
        assert_eq!(raw.len(), n * row);
        let step = row * ROWS;
        let mut data = match huge_pages {
            true => AlignedBuf::zeroed(n * row),
            false => AlignedBuf::zeroed_on_small_pages(n * row),
        };
        let layout = strip::layout(ty).expect("a type that products take");
        let out = DisjointMut::new(&mut data);
        pool.run(n / ROWS, &|s| {
            let raw = &raw[s * step..(s + 1) * step];
            // SAFETY: a strip belongs to one task.
            let out = unsafe { out.slice(s * step..(s + 1) * step) };
            if way.interleaves() {
                let rows: Vec<&[u8]> = raw.chunks_exact(row).collect();
                pack_strip(layout, k, &rows, out);
            } else {
                out.copy_from_slice(raw);
            }
        });
        Matrix {
            ty,
            n,
            k,
            step,
            data,
        }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }
}

/// Activations `[m][k]` as a way wants them.
#[derive(Debug)]
pub struct Inputs {
    m: usize,
    acts: Acts,
}

impl Inputs {
    /// Prepares them.
    ///
    /// # Panics
    /// When `x` has not `m * k` values, or `k` is no multiple of 32.
    pub fn new(way: Way, x: &[f32], m: usize, k: usize) -> Inputs {
        assert_eq!(x.len(), m * k);
        let mut acts = Acts::new();
        let form = way.form();
        let writer = acts.begin(m, k, form);
        let kernels = &Kernels::for_tier(Tier::detect_max()).matmul;
        for (t, x) in x.chunks_exact(k).enumerate() {
            // Row-wise products want each token by itself, the others tokens in groups.
            let (segment, t) = match way.interleaves() {
                true => ((0, m), t),
                false => ((t, 1), 0),
            };
            // SAFETY: one thread writes one token after the other.
            unsafe { writer.put(kernels, form, segment, t, 0, x) };
        }
        Inputs { m, acts }
    }
}

/// `y = x · wᵀ`, `[m][n]`, at a tier. False, and nothing done, where the CPU lacks the tier
/// or there is no vector code in it.
///
/// # Panics
/// When shapes disagree, or matrix or inputs were made for a way of another kind.
pub fn multiply(
    way: Way,
    tier: Tier,
    pool: &Pool,
    matrix: &Matrix,
    inputs: &Inputs,
    y: &mut [f32],
    chunks: Chunks,
) -> bool {
    let Some(kernel) = kernel(way, tier, matrix.ty) else {
        return false;
    };
    let (n, m) = (matrix.n, inputs.m);
    assert!(y.len() == n * m && inputs.acts.k() == matrix.k);
    assert!(inputs.acts.forms().has(way.form()));
    let strips = n / ROWS;
    let y = DisjointMut::new(y);
    let one = |s: usize, tile: &mut [f32]| {
        let rows = &matrix.data[s * matrix.step..(s + 1) * matrix.step];
        // SAFETY: 16 whole rows; the view holds the form; the tile is `[m][16]`; the CPU has
        // the tier.
        unsafe {
            kernel(
                rows.as_ptr(),
                matrix.k,
                &inputs.acts.view(),
                tile.as_mut_ptr(),
            )
        };
        for (t, sums) in tile.chunks_exact(ROWS).enumerate() {
            let at = t * n + s * ROWS;
            // SAFETY: a strip's columns belong to one task.
            unsafe { y.slice(at..at + ROWS) }.copy_from_slice(sums);
        }
    };
    match chunks {
        Chunks::Dynamic => pool.run(strips, &|s| one(s, &mut vec![0.0; m * ROWS])),
        Chunks::Static => {
            let threads = pool.threads().min(strips);
            pool.run(threads, &|thread| {
                let mut tile = vec![0.0; m * ROWS];
                for s in strips * thread / threads..strips * (thread + 1) / threads {
                    one(s, &mut tile);
                }
            });
        }
    }
    true
}

/// The code that multiplies 16 rows, if the CPU has the tier.
fn kernel(way: Way, tier: Tier, ty: GgmlType) -> Option<Kernel> {
    if !tier.available() {
        return None;
    }
    match (way, tier) {
        (_, Tier::Scalar) => None,
        (Way::RowWise | Way::RowWiseOnce, _) => rowwise::kernel(tier, ty, way.tokens()),
        (Way::InterleavedFloats, _) => interleaved::floats_kernel(tier, ty),
        (Way::InterleavedEach | Way::Interleaved, _) => interleaved::kernel(tier, ty, way.tokens()),
    }
}

/// Where the innermost code of a way lies in memory, for disassembly: what multiplies 16 rows
/// (or one) with as many tokens as share the decoded weights.
pub fn code_address(way: Way, tier: Tier, ty: GgmlType) -> Option<usize> {
    if !tier.available() {
        return None;
    }
    match way {
        Way::RowWise | Way::RowWiseOnce => rowwise::address(tier, ty, way.tokens()),
        Way::InterleavedFloats => interleaved::floats_address(tier, ty),
        Way::InterleavedEach | Way::Interleaved => interleaved::address(tier, ty, way.tokens()),
    }
}

/// Where the engine's products of AVX-512 with decoded weights lie, for disassembly: of formats
/// without a minimum, by how their codes stand for weights.
pub fn panel_addresses() -> [usize; 2] {
    fn of<S: Shape>() -> usize {
        let product: unsafe fn(&Panel, &Tokens) = <Avx512 as Machine>::product::<S, 8>;
        product as usize
    }
    [of::<format::Plain>(), of::<format::Full>()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compute, PoolConfig, Weights};
    use tegula_gguf::Bytes;

    /// Small numbers that are the same everywhere.
    pub struct Numbers(pub u64);

    impl Numbers {
        pub fn bits(&mut self) -> u32 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as u32
        }

        pub fn float(&mut self) -> f32 {
            self.bits() as f32 / (1u32 << 30) as f32 - 1.0
        }
    }

    pub fn rows(ty: GgmlType, n: usize, k: usize, numbers: &mut Numbers) -> Vec<u8> {
        let weights: Vec<f32> = (0..n * k).map(|_| numbers.float()).collect();
        let mut raw = vec![0; n * k / ty.block_len() * ty.block_bytes()];
        tegula_gguf::blocks::quantize(ty, &weights, None, &mut raw).unwrap();
        raw
    }

    /// Every way against the scalar tier: the same codes and scales, added up in another
    /// order, or (with f32 activations) without their rounding.
    #[test]
    fn every_way_is_the_same_product() {
        let (n, k) = (48, 512);
        let pool = Pool::new(PoolConfig::new(2));
        let scalar = Compute::new(Tier::Scalar, PoolConfig::new(1));
        let mut numbers = Numbers(7);
        for ty in TYPES {
            let raw = rows(ty, n, k, &mut numbers);
            let weights = Weights::raw(ty, n, k, 1, Bytes::from(raw.clone())).unwrap();
            for m in [1, 2, 3, 8, 13, 40] {
                let x: Vec<f32> = (0..m * k).map(|_| numbers.float()).collect();
                let mut acts = Acts::new();
                scalar.prepare(&mut acts, &x, m, k, Forms::Q8);
                let mut want = vec![0.0; m * n];
                scalar.matmul(&weights, &acts, &mut want);
                for way in Way::ALL {
                    let matrix = Matrix::new(way, (ty, n, k), &raw, &pool, true);
                    let inputs = Inputs::new(way, &x, m, k);
                    for tier in [Tier::Avx2, Tier::Avx512] {
                        for chunks in [Chunks::Dynamic, Chunks::Static] {
                            let mut y = vec![f32::NAN; m * n];
                            let done = multiply(way, tier, &pool, &matrix, &inputs, &mut y, chunks);
                            assert_eq!(done, tier.available());
                            if !done {
                                continue;
                            }
                            // Sums of 512 products of about 0.3 each; activations rounded
                            // to 7 bits are wrong by 0.004.
                            let bound = match way {
                                Way::InterleavedFloats => 0.25,
                                _ => 1e-3,
                            };
                            for (i, (&y, &want)) in y.iter().zip(&want).enumerate() {
                                assert!(
                                    (y - want).abs() <= bound,
                                    "{ty} {tier} {} m={m} [{i}]: {y} {want}",
                                    way.name()
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    /// Ways that only differ in what is decoded when are the same bit for bit.
    #[test]
    fn decoding_once_changes_nothing() {
        let (n, k, m) = (32, 256, 13);
        let pool = Pool::new(PoolConfig::new(1));
        let mut numbers = Numbers(9);
        let x: Vec<f32> = (0..m * k).map(|_| numbers.float()).collect();
        for ty in TYPES {
            let raw = rows(ty, n, k, &mut numbers);
            for tier in [Tier::Avx2, Tier::Avx512]
                .into_iter()
                .filter(|t| t.available())
            {
                let product = |way| {
                    let matrix = Matrix::new(way, (ty, n, k), &raw, &pool, false);
                    let inputs = Inputs::new(way, &x, m, k);
                    let mut y = vec![0.0; m * n];
                    multiply(way, tier, &pool, &matrix, &inputs, &mut y, Chunks::Dynamic);
                    y
                };
                assert_eq!(
                    product(Way::RowWise),
                    product(Way::RowWiseOnce),
                    "{ty} {tier}"
                );
                assert_eq!(
                    product(Way::InterleavedEach),
                    product(Way::Interleaved),
                    "{ty}"
                );
            }
        }
    }

    #[test]
    fn all_code_has_its_place() {
        let mut seen = std::collections::BTreeSet::new();
        for way in Way::ALL {
            for ty in TYPES {
                assert_eq!(code_address(way, Tier::Scalar, ty), None);
                for tier in [Tier::Avx2, Tier::Avx512] {
                    let address = code_address(way, tier, ty);
                    assert_eq!(address.is_some(), tier.available());
                    if let Some(address) = address {
                        assert!(seen.insert(address), "{ty} {tier} {}", way.name());
                    }
                }
            }
        }
    }
}
