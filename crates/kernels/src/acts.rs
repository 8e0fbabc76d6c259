//! Activations in the forms that the matrix products multiply with.
//!
//! # The q8 form
//!
//! Activations that meet quantised weights are quantised themselves, 32 along k at a time:
//! with `a` the largest magnitude of the 32, the scale is `d = a / 127`, the codes are
//! `x * (127 / a)` rounded to the nearest integer, ties to even. A group with `a < 1e-30` is
//! all zero (`d = 0`); a group with a NaN or an infinity gets `d = NaN` and zero codes, so
//! that every product with it is NaN. Every tier computes exactly this.
//!
//! # Order in memory
//!
//! Tokens stand in groups, of [`Q8_GROUP`] in the q8 form, so that a group's 32 inputs are the rows
//! of a tile, too; the last group is as small as it must be. Inside a group the tokens are
//! interleaved along k: first the 32 codes of each token, then the next 32 of each, and so on, and
//! the same for scales and sums. One pointer then serves all
//! tokens of a group, and a single token is simply contiguous. All arrays are linear in the
//! number of tokens, so that a run of whole groups, or several independent segments (the
//! tokens of each expert), are slices.
//!
//! The f32 form and that of bf16 pairs have groups of [`GROUP`], and input by input, or pair by pair,
//! one value of each token. The tile form has groups of [`TILE_GROUP`], 32 bf16 of each token, then
//! the next 32 of each: the rows of a tile.

use std::{marker::PhantomData, ops::Range};

use half::bf16;

use crate::{
    mem::{self, AlignedVec, Number},
    strip::kernels::MatmulKernels,
};

/// Tokens that are interleaved in forms of floats.
pub const GROUP: usize = 8;

/// Tokens that are interleaved in the q8 form.
pub const Q8_GROUP: usize = TILE_GROUP;

/// Scales and scaled sums that may be read behind those of the last token: kernels take a group as
/// whole and throw away what its missing tokens give.
pub const SLACK: usize = Q8_GROUP - 1;

/// Tokens that are interleaved in the tile form: the rows of a tile.
pub const TILE_GROUP: usize = 16;

/// A set of activation forms.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Forms(u8);

impl Forms {
    /// No form.
    pub const NONE: Forms = Forms(0);
    /// 8-bit codes with a scale per 32; for quantised weights.
    pub const Q8: Forms = Forms(1);
    /// f32; for F32 and F16 weights, and BF16 ones where there is no bf16 dot product.
    pub const F32: Forms = Forms(2);
    /// Pairs of bf16, rounded to nearest even; for BF16 weights with `vdpbf16ps`.
    pub const BF16: Forms = Forms(4);
    /// bf16, rounded to nearest even, as rows of tiles.
    pub const TILES: Forms = Forms(8);

    /// True if every form of `other` is in `self`.
    pub const fn has(self, other: Forms) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Forms {
    type Output = Forms;

    fn bitor(self, other: Forms) -> Forms {
        Forms(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for Forms {
    fn bitor_assign(&mut self, other: Forms) {
        self.0 |= other.0;
    }
}

/// Activations of `[m][k]` in one or more [`Forms`]. Reused from call to call, its buffers
/// grow to the largest batch and stay.
#[derive(Debug, Default)]
pub struct Acts {
    m: usize,
    k: usize,
    forms: Forms,
    q: AlignedVec<i8>,
    d: AlignedVec<f32>,
    nsum32: AlignedVec<i32>,
    nsum16: AlignedVec<i32>,
    fsum32: AlignedVec<f32>,
    fsum16: AlignedVec<f32>,
    floats: AlignedVec<f32>,
    pairs: AlignedVec<u32>,
    tiles: AlignedVec<u16>,
}

impl Acts {
    /// Empty activations.
    pub fn new() -> Acts {
        Acts::default()
    }

    /// Tokens.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Values per token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The forms held.
    pub fn forms(&self) -> Forms {
        self.forms
    }

    /// Makes room for `m` tokens of `k` values; what is held afterwards is unspecified until
    /// every token is written through the returned writer.
    ///
    /// # Panics
    /// When [`Forms::Q8`] or [`Forms::TILES`] is asked for and `k` is no multiple of 32.
    pub fn begin(&mut self, m: usize, k: usize, forms: Forms) -> ActsWriter<'_> {
        fn fit<T: Number>(v: &mut AlignedVec<T>, wanted: bool, len: usize) {
            if wanted {
                v.fit(len);
            }
        }
        let q8 = forms.has(Forms::Q8);
        let tiles = forms.has(Forms::TILES);
        assert!(
            !(q8 || tiles) || k.is_multiple_of(32),
            "q8 activations or tiles of {k} values: no multiple of 32"
        );
        let len = m.checked_mul(k).expect("activations fit the address space");
        self.m = m;
        self.k = k;
        self.forms = forms;
        fit(&mut self.q, q8, len);
        fit(&mut self.d, q8, len / 32 + SLACK);
        fit(&mut self.nsum32, q8, len / 32);
        fit(&mut self.nsum16, q8, len / 16);
        fit(&mut self.fsum32, q8, len / 32 + SLACK);
        fit(&mut self.fsum16, q8, len / 16 + SLACK);
        fit(&mut self.floats, forms.has(Forms::F32), len);
        fit(&mut self.pairs, forms.has(Forms::BF16), m * k.div_ceil(2));
        fit(&mut self.tiles, tiles, len);
        ActsWriter {
            m,
            k,
            forms,
            q: self.q.as_mut_ptr(),
            d: self.d.as_mut_ptr(),
            nsum32: self.nsum32.as_mut_ptr(),
            nsum16: self.nsum16.as_mut_ptr(),
            fsum32: self.fsum32.as_mut_ptr(),
            fsum16: self.fsum16.as_mut_ptr(),
            floats: self.floats.as_mut_ptr(),
            pairs: self.pairs.as_mut_ptr(),
            tiles: self.tiles.as_mut_ptr(),
            acts: PhantomData,
        }
    }

    /// All tokens as one segment.
    pub fn view(&self) -> ActsView<'_> {
        self.segment(0, self.m)
    }

    /// The segment of `m` tokens that was written at token `start`.
    pub(crate) fn segment(&self, start: usize, m: usize) -> ActsView<'_> {
        assert!(start + m <= self.m);
        let whole = ActsView {
            m: self.m,
            k: self.k,
            forms: self.forms,
            q: self.q.as_ptr(),
            d: self.d.as_ptr(),
            nsum32: self.nsum32.as_ptr(),
            nsum16: self.nsum16.as_ptr(),
            fsum32: self.fsum32.as_ptr(),
            fsum16: self.fsum16.as_ptr(),
            floats: self.floats.as_ptr(),
            pairs: self.pairs.as_ptr(),
            tiles: self.tiles.as_ptr(),
            acts: PhantomData,
        };
        whole.advance(start, m)
    }
}

/// A segment of activations as kernels see it: the arrays of [`Acts`] from the segment's
/// first token on.
#[derive(Clone, Copy)]
pub struct ActsView<'a> {
    /// Tokens of the segment.
    pub m: usize,
    /// Values per token.
    pub k: usize,
    /// The forms that are present; the other pointers must not be read.
    pub forms: Forms,
    /// Codes: per group `[k / 32][tokens][32]`.
    pub q: *const i8,
    /// Scales: per group `[k / 32][tokens]`. Like the scaled sums, with [`SLACK`] more behind them.
    pub d: *const f32,
    /// Minus the sums of 32 codes: per group `[k / 32][tokens]`.
    pub nsum32: *const i32,
    /// Minus the sums of 16 codes: per group `[k / 16][tokens]`.
    pub nsum16: *const i32,
    /// Sums of 32 codes times the scale, one rounding.
    pub fsum32: *const f32,
    /// Sums of 16 codes times the scale, one rounding.
    pub fsum16: *const f32,
    /// Values: per group `[k][tokens]`.
    pub floats: *const f32,
    /// Pairs of bf16, the even one low: per group `[⌈k / 2⌉][tokens]`.
    pub pairs: *const u32,
    /// bf16: per group of [`TILE_GROUP`] `[k / 32][tokens][32]`.
    pub tiles: *const u16,
    acts: PhantomData<&'a Acts>,
}

// SAFETY: a view is a shared borrow of vectors of plain numbers.
unsafe impl Send for ActsView<'_> {}
// SAFETY: as above.
unsafe impl Sync for ActsView<'_> {}

impl<'a> ActsView<'a> {
    fn advance(self, start: usize, m: usize) -> ActsView<'a> {
        let k = self.k;
        // Absent forms have dangling pointers that nobody reads: hence wrapping arithmetic.
        ActsView {
            m,
            q: self.q.wrapping_add(start * k),
            d: self.d.wrapping_add(start * (k / 32)),
            nsum32: self.nsum32.wrapping_add(start * (k / 32)),
            nsum16: self.nsum16.wrapping_add(start * (k / 16)),
            fsum32: self.fsum32.wrapping_add(start * (k / 32)),
            fsum16: self.fsum16.wrapping_add(start * (k / 16)),
            floats: self.floats.wrapping_add(start * k),
            pairs: self.pairs.wrapping_add(start * k.div_ceil(2)),
            tiles: self.tiles.wrapping_add(start * k),
            ..self
        }
    }

    /// The values, `[m][k]`, as the most precise form holds them: f32, rounded to bf16, or
    /// codes times scales.
    ///
    /// # Safety
    /// The pointers of the forms that the view has are valid, as [`Acts::view`] makes them.
    pub(crate) unsafe fn to_f32(self) -> Vec<f32> {
        let k = self.k;
        let value = |base: usize, tokens: usize, t: usize, col: usize| {
            let block = col / 32 * tokens + t;
            // SAFETY: a column and a token of the view, in a form that it has.
            unsafe {
                if self.forms.has(Forms::F32) {
                    *self.floats.add(base * k + col * tokens + t)
                } else if self.forms.has(Forms::BF16) {
                    let at = base * k.div_ceil(2) + col / 2 * tokens + t;
                    let pair = *self.pairs.add(at);
                    bf16::from_bits((pair >> (col % 2 * 16)) as u16).to_f32()
                } else if self.forms.has(Forms::TILES) {
                    bf16::from_bits(*self.tiles.add(base * k + block * 32 + col % 32)).to_f32()
                } else {
                    assert!(self.forms.has(Forms::Q8), "activations in some form");
                    let code = *self.q.add(base * k + block * 32 + col % 32);
                    f32::from(code) * *self.d.add(base * (k / 32) + block)
                }
            }
        };
        let floats = self.forms.has(Forms::F32) || self.forms.has(Forms::BF16);
        self.by_groups(if floats { GROUP } else { TILE_GROUP }, value)
    }

    /// `[m][k]` values, `value(group's first token, tokens in it, token in it, column)` each.
    fn by_groups(
        &self,
        size: usize,
        value: impl Fn(usize, usize, usize, usize) -> f32,
    ) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.m * self.k);
        for t in 0..self.m {
            let base = t / size * size;
            let tokens = size.min(self.m - base);
            out.extend((0..self.k).map(|col| value(base, tokens, t - base, col)));
        }
        out
    }

    /// The view with one of its forms alone.
    pub(crate) fn only(self, form: Forms) -> ActsView<'a> {
        assert!(self.forms.has(form), "activations lack {form:?}");
        ActsView {
            forms: form,
            ..self
        }
    }

    /// Tokens `start .. start + m` of the segment; `start` must be a multiple of
    /// [`TILE_GROUP`], and the end too unless it is the segment's end.
    pub fn slice(self, start: usize, m: usize) -> ActsView<'a> {
        assert!(start.is_multiple_of(TILE_GROUP) && start + m <= self.m);
        assert!((start + m).is_multiple_of(TILE_GROUP) || start + m == self.m);
        self.advance(start, m)
    }
}

/// Where one token's q8 form goes: pointers to its first element of each array, and the
/// number of interleaved tokens.
#[derive(Clone, Copy)]
pub struct Q8Dest {
    /// Tokens in the group: the stride of the scales, and 1/32 of the stride of the codes.
    pub tokens: usize,
    /// Codes, 32 at a time, `32 * tokens` apart.
    pub q: *mut i8,
    /// Scales, `tokens` apart.
    pub d: *mut f32,
    /// Minus the sums of 32, `tokens` apart.
    pub nsum32: *mut i32,
    /// Minus the sums of 16, `tokens` apart.
    pub nsum16: *mut i32,
    /// Scaled sums of 32, `tokens` apart.
    pub fsum32: *mut f32,
    /// Scaled sums of 16, `tokens` apart.
    pub fsum16: *mut f32,
}

impl Q8Dest {
    /// Writes scale and sums of the 32 values at `kb` (in units of 32).
    ///
    /// # Safety
    /// The pointers are valid for `kb + 1` groups of 32.
    #[inline(always)]
    pub unsafe fn put_sums(&self, kb: usize, d: f32, low: i32, high: i32) {
        // SAFETY: the caller vouches for the range.
        unsafe {
            let at = kb * self.tokens;
            *self.d.add(at) = d;
            *self.nsum32.add(at) = -(low + high);
            *self.fsum32.add(at) = (low + high) as f32 * d;
            *self.nsum16.add(2 * at) = -low;
            *self.nsum16.add(2 * at + self.tokens) = -high;
            *self.fsum16.add(2 * at) = low as f32 * d;
            *self.fsum16.add(2 * at + self.tokens) = high as f32 * d;
        }
    }
}

/// Writes tokens of an [`Acts`], from several threads if need be.
pub struct ActsWriter<'a> {
    m: usize,
    k: usize,
    forms: Forms,
    q: *mut i8,
    d: *mut f32,
    nsum32: *mut i32,
    nsum16: *mut i32,
    fsum32: *mut f32,
    fsum16: *mut f32,
    floats: *mut f32,
    pairs: *mut u32,
    tiles: *mut u16,
    acts: PhantomData<&'a mut Acts>,
}

// SAFETY: `put` is unsafe and asks that concurrent calls write different tokens or columns.
unsafe impl Send for ActsWriter<'_> {}
// SAFETY: as above.
unsafe impl Sync for ActsWriter<'_> {}

impl ActsWriter<'_> {
    /// Where 32 columns from `col` of the tokens that share a tile begin, `[tokens][32]`, and how
    /// many they are: `t` is the first. With a segment as [`ActsWriter::put`] takes it.
    ///
    /// # Panics
    /// When that is outside, `t` begins no tile, `col` is no multiple of 32 or there is no
    /// [`Forms::TILES`].
    pub(crate) fn tile(
        &self,
        (seg, seg_m): (usize, usize),
        t: usize,
        col: usize,
    ) -> (*mut u16, usize) {
        assert!(self.forms.has(Forms::TILES));
        assert!(t < seg_m && seg + seg_m <= self.m && col + 32 <= self.k);
        assert!(t.is_multiple_of(TILE_GROUP) && col.is_multiple_of(32));
        let (start, tokens, _) = place(TILE_GROUP, seg_m, t);
        let at = (seg + start) * self.k + col * tokens;
        // SAFETY: inside the vector that `begin` sized.
        (unsafe { self.tiles.add(at) }, tokens)
    }

    /// Asks for the places of columns of token `t`, as [`ActsWriter::put`] takes it, in the tile
    /// form: other threads have read them last.
    pub(crate) fn prefetch(&self, (seg, seg_m): (usize, usize), t: usize, columns: Range<usize>) {
        if !self.forms.has(Forms::TILES) {
            return;
        }
        let (start, tokens, t) = place(TILE_GROUP, seg_m, t);
        for col in columns.step_by(32) {
            let at = (seg + start) * self.k + col * tokens + t * 32;
            mem::prefetch_write(self.tiles.wrapping_add(at));
        }
    }

    /// Writes columns `col ..` of token `t` of the segment of `seg_m` tokens that starts at
    /// token `seg`, in the given forms. With one segment that is `(0, m)`.
    ///
    /// # Safety
    /// No two calls that overlap in time write the same token and column. Every token is
    /// written under one division into segments.
    ///
    /// # Panics
    /// When the range is outside, a form was not begun, or `col` or the length is no
    /// multiple of 32 with [`Forms::Q8`] or [`Forms::TILES`], or `col` is odd with
    /// [`Forms::BF16`].
    pub unsafe fn put(
        &self,
        kernels: &MatmulKernels,
        forms: Forms,
        (seg, seg_m): (usize, usize),
        t: usize,
        col: usize,
        x: &[f32],
    ) {
        let k = self.k;
        assert!(t < seg_m && seg + seg_m <= self.m && col + x.len() <= k);
        assert!(self.forms.has(forms));
        if forms.has(Forms::TILES) {
            assert!(col.is_multiple_of(32) && x.len().is_multiple_of(32));
            let tiles = kernels
                .tiles
                .as_ref()
                .expect("tiles only with tile products");
            let (start, tokens, t) = place(TILE_GROUP, seg_m, t);
            // SAFETY: as below.
            unsafe {
                let at = (seg + start) * k + col * tokens + t * 32;
                (tiles.pack)(x, self.tiles.add(at), tokens * 32);
            }
        }
        if forms.has(Forms::Q8) {
            let (start, tokens, t) = place(Q8_GROUP, seg_m, t);
            let start = seg + start;
            assert!(col.is_multiple_of(32) && x.len().is_multiple_of(32));
            let kb = col / 32;
            // SAFETY: `start + tokens <= m` and the columns are inside, so every offset is
            // inside the vectors that `begin` sized; the caller excludes overlapping writes.
            unsafe {
                let at32 = start * (k / 32) + kb * tokens + t;
                let at16 = start * (k / 16) + 2 * kb * tokens + t;
                let dest = Q8Dest {
                    tokens,
                    q: self.q.add(start * k + (kb * tokens + t) * 32),
                    d: self.d.add(at32),
                    nsum32: self.nsum32.add(at32),
                    nsum16: self.nsum16.add(at16),
                    fsum32: self.fsum32.add(at32),
                    fsum16: self.fsum16.add(at16),
                };
                (kernels.quantize_q8)(x, &dest);
            }
        }
        let (start, tokens, t) = place(GROUP, seg_m, t);
        let start = seg + start;
        if forms.has(Forms::F32) {
            for (i, &v) in x.iter().enumerate() {
                // SAFETY: as above.
                unsafe { *self.floats.add(start * k + (col + i) * tokens + t) = v };
            }
        }
        if forms.has(Forms::BF16) {
            assert!(col.is_multiple_of(2));
            assert!(x.len().is_multiple_of(2) || col + x.len() == k);
            for (i, pair) in x.chunks(2).enumerate() {
                let low = bf16::from_f32(pair[0]).to_bits();
                let high = pair.get(1).map_or(0, |&v| bf16::from_f32(v).to_bits());
                let at = start * k.div_ceil(2) + (col / 2 + i) * tokens + t;
                // SAFETY: as above.
                unsafe { *self.pairs.add(at) = u32::from(low) | u32::from(high) << 16 };
            }
        }
    }
}

/// Where token `t` of a segment of `m` stands among groups of `size`: the group's first
/// token, the tokens in it, and its place there.
fn place(size: usize, m: usize, t: usize) -> (usize, usize, usize) {
    let start = t / size * size;
    (start, size.min(m - start), t - start)
}
