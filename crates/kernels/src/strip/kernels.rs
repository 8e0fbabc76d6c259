//! The kernels of the matrix products, one set per tier.

use tegula_gguf::GgmlType;

use crate::{
    acts::{ActsView, Forms, Q8Dest},
    amx::Amx,
    strip::ROWS,
    tier::Tier,
    weights::Weights,
};

/// Values along k that are decoded to a panel at a time.
///
/// 16 rows × 1024 codes and their scales are 24 KiB at most: with the activations of one
/// token group they stay in the first-level cache.
pub const PANEL_K: usize = 1024;

/// Most strips of one call: with tiles, as many as share a pass over the activations.
pub const MAX_STRIPS: usize = 8;

/// Bytes of the scratch that [`MatmulKernels::mul_strips`] wants: codes, then scales and
/// minima of sub-blocks of 16.
pub const PANEL_BYTES: usize = PANEL_K * ROWS + 2 * (PANEL_K / 16) * ROWS * 4;

/// One call of [`MatmulKernels::mul_strips`].
pub struct StripArgs<'a> {
    /// The weights' type.
    pub ty: GgmlType,
    /// Weights per row.
    pub k: usize,
    /// Up to [`MAX_STRIPS`] strips of [`super::Layout::strip_bytes`]`(k)` bytes each; of a
    /// sparse type, checked strips with [`crate::sparse::SLACK`] readable bytes behind.
    pub strips: &'a [*const u8],
    /// Bytes of each strip, about; sparse ones differ. Memory is asked for by them.
    pub bytes: &'a [usize],
    /// As many strips that this thread multiplies after these, if it knows: their first bytes
    /// may be asked for.
    pub next: &'a [*const u8],
    /// How many bytes of the beginning of each strip memory has been asked for, and is to be asked
    /// for of `next`.
    pub asked: usize,
    /// Activations with the form [`MatmulKernels::form`]`(ty)` and, for tiles, no other.
    pub acts: ActsView<'a>,
    /// Receives `[strips][tokens][16]` products.
    pub tile: *mut f32,
    /// [`PANEL_BYTES`] of scratch, or [`Tiles::scratch`]; 64-byte aligned.
    pub panel: *mut u8,
}

impl StripArgs<'_> {
    /// The tile of strip `s`: `[tokens][16]`.
    pub(crate) fn tile_of(&self, s: usize) -> *mut f32 {
        self.tile.wrapping_add(s * self.acts.m * ROWS)
    }
}

/// The matrix-product kernels of one tier.
#[derive(Clone, Copy)]
pub struct MatmulKernels {
    /// The tier and its flags, for reports.
    pub name: &'static str,
    /// Quantises values (a multiple of 32) of one token to the q8 form.
    ///
    /// # Safety
    /// The destination is valid for `x.len()` values, and the CPU has the tier.
    pub quantize_q8: unsafe fn(x: &[f32], dest: &Q8Dest),
    /// Multiplies strips with all tokens of a segment.
    ///
    /// # Safety
    /// All pointers are valid for what [`StripArgs`] states, and the CPU has the tier.
    pub mul_strips: unsafe fn(args: &StripArgs<'_>),
    /// The form of activations that BF16 weights take.
    pub bf16_form: Forms,
    /// Whether `mul_strips` takes sparse strips of the type; otherwise they are made dense
    /// first.
    pub sparse: fn(ty: GgmlType) -> bool,
    /// Products on tiles, where their use was asked for.
    pub tiles: Option<Tiles>,
}

/// Matrix products on tile registers.
#[derive(Clone, Copy)]
pub struct Tiles {
    /// As reports name it.
    pub name: &'static str,
    /// Multiplies strips with all tokens of a segment, which has the [form](Tiles::form) and no
    /// other.
    ///
    /// # Safety
    /// As [`MatmulKernels::mul_strips`], with `panel` of `scratch` bytes.
    pub mul_strips: unsafe fn(args: &StripArgs<'_>),
    /// Writes values (a multiple of 32) of one token as bf16, each 32 `step` elements apart.
    ///
    /// # Safety
    /// `out` is valid for that, and the CPU has the tier.
    pub pack: unsafe fn(x: &[f32], out: *mut u16, step: usize),
    /// `gate * sigmoid(gate) * up` of two strips and up to a tile of tokens, rounded to bf16:
    /// operands are `[2][tokens][16]`, strips `step` values apart, `out` is `[tokens][32]`.
    ///
    /// # Safety
    /// The pointers are valid for that, and the CPU has the tier.
    pub swiglu:
        unsafe fn(gate: *const f32, up: *const f32, step: usize, tokens: usize, out: *mut u16),
    /// Bytes that `mul_strips` wants as panel.
    pub scratch: usize,
    /// From how many tokens on tiles are faster than vectors, or `None` for types that they
    /// don't take. Measured, see `docs/bench`.
    pub fewest_tokens: fn(ty: GgmlType) -> Option<usize>,
    /// Up to how many tokens 8-bit tiles are faster than bf16 ones. Measured likewise.
    pub most_byte_tokens: fn(ty: GgmlType) -> usize,
    /// Whether `mul_strips` takes sparse strips of the type; otherwise they are made dense
    /// first.
    pub sparse: fn(ty: GgmlType) -> bool,
}

impl Tiles {
    /// The form of activations that a product of weights of a type with `m` tokens takes.
    pub fn form(&self, ty: GgmlType, m: usize) -> Forms {
        match m <= (self.most_byte_tokens)(ty) {
            true => Forms::Q8,
            false => Forms::TILES,
        }
    }
}

impl MatmulKernels {
    /// The kernels of `tier`, which the CPU must have, with tiles if there is `amx`.
    pub fn for_tier(tier: Tier, amx: Option<Amx>) -> MatmulKernels {
        let kernels = match tier {
            Tier::Scalar => crate::scalar::matmul::KERNELS,
            Tier::Avx2 => crate::avx2::matmul::kernels(),
            Tier::Avx512 => crate::avx512::matmul::kernels(),
        };
        MatmulKernels {
            #[cfg(feature = "amx")]
            tiles: amx.and_then(|amx| crate::amx::products(amx, tier)),
            #[cfg(not(feature = "amx"))]
            tiles: amx.and(None),
            ..kernels
        }
    }

    /// The tile products, if they take `weights` and win with `m` tokens.
    pub fn tiles_for(&self, weights: &Weights, m: usize) -> Option<&Tiles> {
        let tiles = self.tiles.as_ref()?;
        let fewest = (tiles.fewest_tokens)(weights.ty())?;
        (weights.k().is_multiple_of(32) && m >= fewest).then_some(tiles)
    }

    /// The form of activations that a product of `weights` with `m` tokens takes.
    pub fn form(&self, weights: &Weights, m: usize) -> Forms {
        if let Some(tiles) = self.tiles_for(weights, m) {
            return tiles.form(weights.ty(), m);
        }
        match weights.ty().dense() {
            GgmlType::BF16 => self.bf16_form,
            ty => vector_form(ty),
        }
    }
}

/// The form of activations that products of a type take without tiles, whatever the tier; only
/// of BF16 may a tier have another ([`MatmulKernels::bf16_form`]).
pub fn vector_form(ty: GgmlType) -> Forms {
    match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => Forms::F32,
        _ => Forms::Q8,
    }
}
