//! Strips times few tokens on 8-bit tiles: 16 outputs by 16 tokens by 32 inputs an instruction.
//!
//! A stretch of a strip is decoded to a panel, as for vectors, whose codes are weight tiles as they
//! lie. A tile product covers the inputs that share a scale; its integer sums go through memory
//! and are scaled and added up by vectors, in the order of the vector kernels, so that results are
//! theirs bit for bit.
//!
//! bf16 tiles need no such step, but every weight must become bf16, which costs about 14 cycles for
//! each 64; that pays with many tokens. Here they cost two or three, and each token's sums of a scale
//! a load, a conversion and two multiplications. Near tile instructions these have one port of the
//! core and not two (`docs/bench/2026-11-28-xeon-2c`), and storing a tile takes 16 cycles
//! of the other: so a product of 16 tokens, which the tile unit makes in 16 cycles, costs 60 to 100.

use std::marker::PhantomData;

use tegula_gguf::GgmlType;

use super::{
    matmul::SUMS_AT,
    panel::Decoders,
    tile::{self, TileConfig},
};
use crate::{
    acts::Q8_GROUP as GROUP,
    avx512::sparse,
    generic::{
        format::{self, Format, Shape, Visitor},
        lanes::Lanes,
        matmul::{self as generic, Panel, Panels, Tokens, tokens_at},
    },
    strip::{ROWS, kernels::StripArgs},
};
use std::arch::{
    asm,
    x86_64::{_MM_HINT_T0, _mm_prefetch},
};

/// Tile products that are on their way before the first one's sums are read; even, so that a
/// product's registers follow from its number's parity.
const LEAD: usize = 2;
/// Products whose sums have room.
const RING: usize = 4;

/// Integer sums of tile products, `[token][16]`, on their way from tiles to vectors.
#[repr(C, align(64))]
pub(crate) struct Sums([[i32; GROUP * ROWS]; RING]);

/// Strips times tokens in the q8 form.
///
/// # Safety
/// As `MatmulKernels::mul_strips`; AMX may be executed, the CPU has what `D` is compiled for, and
/// [`Sums`] have room behind the panel.
pub(super) unsafe fn mul_strips<D: Decoders>(args: &StripArgs<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match args.ty {
            GgmlType::S8 | GgmlType::S4 => {
                configure::<format::Plain>(args.acts.m);
                sparse::by_panels::<Bytes<D>>(args);
            }
            ty => format::visit(ty, OnBytes::<D>(args, PhantomData)),
        }
        tile::release();
    }
}

struct OnBytes<'a, D>(&'a StripArgs<'a>, PhantomData<D>);

impl<D: Decoders> Visitor for OnBytes<'_, D> {
    unsafe fn blocks<F: Format>(self) {
        // SAFETY: the caller's.
        unsafe {
            configure::<F::Shape>(self.0.acts.m);
            generic::by_panels::<Bytes<D>, F>(self.0);
        }
    }
    unsafe fn grids<S: Shape>(self) {
        // SAFETY: the caller's.
        unsafe {
            configure::<S>(self.0.acts.m);
            generic::from_grids::<Bytes<D>, S>(self.0);
        }
    }
}

/// Products of this module, decoded by `D`.
struct Bytes<D>(PhantomData<D>);

impl<D: Decoders> Panels for Bytes<D> {
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn decode<F: Format>(block: *const u8, blocks: usize, panel: &Panel) {
        // SAFETY: the caller's.
        unsafe { D::signed::<F>(block, blocks, panel) }
    }
    unsafe fn products<S: Shape>(panel: &Panel, args: &StripArgs<'_>, s: usize) {
        let (acts, mut panel) = (&args.acts, *panel);
        for base in (0..acts.m).step_by(GROUP) {
            let left = acts.m - base;
            // SAFETY: tokens of the view; the sums are behind the panel.
            unsafe {
                if acts.m > GROUP {
                    configure::<S>(left);
                }
                let x = Tokens {
                    tile: args.tile_of(s).add(base * ROWS),
                    ..tokens_at::<S>(acts, base, GROUP.min(left))
                };
                let sums = args.panel.add(SUMS_AT).cast();
                D::byte_products::<S>(&panel, &x, sums);
            }
            panel.next_bytes = 0;
        }
    }
}

/// Tiles 0 and 1 are sums of so many tokens, 4 their activations and 6 weights: the inputs that
/// share a scale.
const fn config(tokens: usize, halves: bool) -> TileConfig {
    let (bytes, rows) = if halves { (16, 4) } else { (32, 8) };
    let (tokens, none) = (tokens as u8, (0, 0));
    let sums = (tokens, 64);
    TileConfig::new([
        sums,
        sums,
        none,
        none,
        (tokens, bytes),
        none,
        (rows, 64),
        none,
    ])
}

/// For scales of 32 inputs and of 16, and 1 to [`GROUP`] tokens, less one.
static CONFIGS: [[TileConfig; GROUP]; 2] = {
    let mut all = [const { [const { config(1, false) }; GROUP] }; 2];
    let mut i = 0;
    while i < GROUP {
        all[0][i] = config(i + 1, false);
        all[1][i] = config(i + 1, true);
        i += 1;
    }
    all
};

/// For a tile of tokens, or as many as are left.
///
/// # Safety
/// AMX may be executed; there is a token.
unsafe fn configure<S: Shape>(left: usize) {
    // SAFETY: the caller's.
    unsafe { tile::load_config(&CONFIGS[usize::from(S::HALVES)][left.min(GROUP) - 1]) };
}

/// A tile instruction with an operand at `$at`, whose rows are `$row` bytes apart. What tiles hold
/// outlives it: nothing else uses them.
macro_rules! tile_op {
    ($instruction:expr, $at:expr, $row:literal) => {
        asm!(
            $instruction,
            at = in(reg) $at,
            row = in(reg) $row as usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

/// Adds a panel's products with up to [`GROUP`] tokens to their sums.
///
/// Sixteen sums are scaled whatever the tokens, so that there is one loop, in registers: those of
/// missing ones with what lies behind the last one's scales, and they are not kept.
///
/// # Safety
/// The panel is signed, all of its inputs are the view's, and [`configure`] was called for its
/// shape and these tokens.
#[inline(always)]
pub(super) unsafe fn products<L: Lanes, S: Shape>(panel: &Panel, x: &Tokens, sums: *mut Sums) {
    let tokens = x.stride;
    let first = panel.first * tokens;
    // SAFETY: the caller's.
    unsafe {
        let mut walk = Walk::<L, S> {
            panel,
            tokens,
            steps: panel.groups * Walk::<L, S>::PARTS,
            q: x.q.add(first * 32),
            d: x.d.add(first),
            fsum: x.fsum.add(first * Walk::<L, S>::PARTS),
            sums: sums.cast(),
            acc: [L::fsplat(0.0); GROUP],
            shape: PhantomData,
        };
        for (t, acc) in walk.acc.iter_mut().enumerate().take(tokens) {
            *acc = L::fload(x.tile.add(t * ROWS));
        }
        walk.begin::<false>(0);
        walk.weights(0);
        walk.multiply::<false>(0);
        walk.begin::<true>(1);
        walk.weights(1);
        walk.multiply::<true>(1);
        walk.store::<false>(0);
        for i in (0..walk.steps).step_by(2) {
            walk.step::<false, true>(i);
            if i + 1 < walk.steps {
                walk.step::<true, false>(i + 1);
            }
        }
        for (t, &acc) in walk.acc.iter().enumerate().take(tokens) {
            L::fstore(acc, x.tile.add(t * ROWS));
        }
    }
}

/// Tile products on their way through [`products`].
struct Walk<'a, L: Lanes, S> {
    panel: &'a Panel,
    tokens: usize,
    /// Tile products of the panel.
    steps: usize,
    /// Codes, scales and scaled sums of the panel's inputs.
    q: *const i8,
    d: *const f32,
    fsum: *const f32,
    sums: *mut i32,
    acc: [L::Floats; GROUP],
    shape: PhantomData<S>,
}

// SAFETY (all of the below): the caller's, who keeps the promises of `products`; they are inlined
// where the features are. Products that the panel does not have are left out.
impl<L: Lanes, S: Shape> Walk<'_, L, S> {
    /// Tile products of 32 inputs.
    const PARTS: usize = if S::HALVES { 2 } else { 1 };

    /// Where the sums of product `i` go.
    #[inline(always)]
    fn sums(&self, i: usize) -> *mut i32 {
        self.sums.wrapping_add(i % RING * GROUP * ROWS)
    }

    /// Begins product `i`, which is odd or not: loads its activations.
    #[inline(always)]
    unsafe fn begin<const ODD: bool>(&self, i: usize) {
        if i < self.steps {
            let (group, part) = (i / Self::PARTS, i % Self::PARTS);
            let at = self.q.wrapping_add(group * self.tokens * 32 + part * 16);
            // SAFETY: see above.
            unsafe {
                match ODD {
                    false => tile_op!("tilezero tmm0\ntileloadd tmm4, [{at} + {row}*1]", at, 32),
                    true => tile_op!("tilezero tmm1\ntileloadd tmm4, [{at} + {row}*1]", at, 32),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn weights(&self, i: usize) {
        if i < self.steps {
            let at = self.panel.codes.wrapping_add(i * 32 / Self::PARTS * ROWS);
            // SAFETY: see above.
            unsafe { tile_op!("tileloadd tmm6, [{at} + {row}*1]", at, 64) };
        }
    }

    #[inline(always)]
    unsafe fn multiply<const ODD: bool>(&self, i: usize) {
        if i < self.steps {
            // SAFETY: see above.
            unsafe {
                match ODD {
                    false => tile_op!("tdpbssd tmm0, tmm4, tmm6 /* {at} {row} */", 0usize, 0),
                    true => tile_op!("tdpbssd tmm1, tmm4, tmm6 /* {at} {row} */", 0usize, 0),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn store<const ODD: bool>(&self, i: usize) {
        if i < self.steps {
            let at = self.sums(i);
            // SAFETY: see above.
            unsafe {
                match ODD {
                    false => tile_op!("tilestored [{at} + {row}*1], tmm0", at, 64),
                    true => tile_op!("tilestored [{at} + {row}*1], tmm1", at, 64),
                }
            }
        }
    }

    /// Scales and adds the sums of product `i`. What later ones need stands between: all at once it
    /// would hold the others up, and they it.
    #[inline(always)]
    unsafe fn step<const ODD: bool, const EVEN: bool>(&mut self, i: usize) {
        // SAFETY: see above.
        unsafe {
            let (group, part) = (i / Self::PARTS, i % Self::PARTS);
            if part == 0 {
                let next = self.panel.next.wrapping_add(group * self.panel.next_bytes);
                for line in (0..self.panel.next_bytes).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(line).cast());
                }
            }
            let scale = L::fload(self.panel.scales.add(i * ROWS));
            let min = match S::MIN {
                true => L::fload(self.panel.mins.add(i * ROWS)),
                false => scale,
            };
            self.begin::<ODD>(i + LEAD);
            self.add::<0>(i, (scale, min));
            self.weights(i + LEAD);
            self.add::<4>(i, (scale, min));
            self.multiply::<ODD>(i + LEAD);
            self.add::<8>(i, (scale, min));
            self.store::<EVEN>(i + LEAD - 1);
            self.add::<12>(i, (scale, min));
        }
    }

    /// Four tokens' sums, as `add_group` of vectors adds them.
    #[inline(always)]
    unsafe fn add<const FIRST: usize>(&mut self, i: usize, (scale, min): (L::Floats, L::Floats)) {
        // SAFETY: see above.
        unsafe {
            let d = self.d.add(i / Self::PARTS * self.tokens);
            let fsum = self.fsum.add(i * self.tokens);
            for t in FIRST..FIRST + 4 {
                let sum = L::load(self.sums(i).add(t * ROWS).cast()).to_floats();
                let scale = L::fmul(scale, L::fbroadcast(d.add(t)));
                self.acc[t] = L::fma(sum, scale, self.acc[t]);
                if S::MIN {
                    self.acc[t] = L::fma(min, L::fbroadcast(fsum.add(t)), self.acc[t]);
                }
            }
        }
    }
}
