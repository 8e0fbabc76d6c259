//! How each quantised format's strip blocks become codes and scales in lanes.
//!
//! The byte offsets are those of the Strip16 layouts in [`crate::strip`]: the fields of a
//! block in the order given there, each transposed over the 16 rows, so a dword of a field
//! is 64 bytes and an f16 is 32. What the bits mean is the raw format's business, see
//! `tegula_gguf::blocks`; results equal its `decode_codes` bit for bit, zero point apart.

// The formats keep ggml's names.
#![allow(non_camel_case_types)]

use super::lanes::Lanes;
use tegula_gguf::{GgmlType, blocks::grids};

/// What a format's products look like once its weights are codes and scales.
pub(crate) trait Shape {
    /// Two scales per 32 weights, not one.
    const HALVES: bool;
    /// A minimum beside every scale. Then there is no zero point.
    const MIN: bool;
    /// Codes use all eight bits, with the zero point 128.
    const FULL: bool;
}

macro_rules! shape {
    ($(#[$doc:meta])* $name:ident, $halves:literal, $min:literal, $full:literal) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl Shape for $name {
            const HALVES: bool = $halves;
            const MIN: bool = $min;
            const FULL: bool = $full;
        }
    };
}

shape!(
    /// A scale per 32.
    Plain, false, false, false
);
shape!(
    /// A scale and a minimum per 32.
    Affine, false, true, false
);
shape!(
    /// A scale per 32, eight-bit codes.
    Full, false, false, true
);
shape!(
    /// A scale per 16.
    PlainHalves, true, false, false
);
shape!(
    /// A scale and a minimum per 16.
    AffineHalves, true, true, false
);

/// A quantised format in strips.
///
/// # Safety
/// `block` is a whole strip block; otherwise as [`Lanes`].
pub(crate) trait Format {
    type Shape: Shape;
    /// Bytes of a strip block.
    const BYTES: usize;
    /// Groups of 32 weights of one row in a block.
    const GROUPS: usize;
    /// log2 of the codes' zero point. Unused with minima.
    const ZERO: u32;
    /// Codes are below 32.
    const SMALL: bool = !Self::Shape::FULL;
    /// The unsigned codes of group `g`: dword `e` holds weights `4e .. 4e + 4`.
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8];
    /// Which codes of group `g` are sixteen times as large in [`Format::codes_in_place`]: those of the
    /// first and of the last four dwords.
    #[inline(always)]
    fn sixteenfold(_g: usize) -> [bool; 2] {
        [false; 2]
    }
    /// Codes for [`Lanes::WIDE`] products: high nibbles need not be shifted down, but their sums.
    #[inline(always)]
    unsafe fn codes_in_place<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe { Self::codes(block, g) }
    }
    /// Scale `g` of the block, and minus the minimum as it is added, if the format has one.
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats);
}

/// Something to do with quantised weights of one type.
pub(crate) trait Visitor {
    /// A type of blocks.
    ///
    /// # Safety
    /// The visitor's.
    unsafe fn blocks<F: Format>(self);
    /// A type of codebook indices.
    ///
    /// # Safety
    /// The visitor's.
    unsafe fn grids<S: Shape>(self);
}

/// Shows the visitor the format of `ty`.
///
/// # Safety
/// The visitor's.
///
/// # Panics
/// When `ty` is not quantised, or sparse.
pub(crate) unsafe fn visit(ty: GgmlType, visitor: impl Visitor) {
    use GgmlType as T;
    // SAFETY: the caller's.
    unsafe {
        match ty {
            T::Q4_0 => visitor.blocks::<Q4_0>(),
            T::Q4_1 => visitor.blocks::<Q4_1>(),
            T::Q5_0 => visitor.blocks::<Q5_0>(),
            T::Q5_1 => visitor.blocks::<Q5_1>(),
            T::Q8_0 => visitor.blocks::<Q8_0>(),
            T::IQ4_NL => visitor.blocks::<IQ4_NL>(),
            T::MXFP4 => visitor.blocks::<MXFP4>(),
            T::NVFP4 => visitor.blocks::<NVFP4>(),
            T::Q2_K => visitor.blocks::<Q2_K>(),
            T::Q3_K => visitor.blocks::<Q3_K>(),
            T::Q4_K => visitor.blocks::<Q4_K>(),
            T::Q5_K => visitor.blocks::<Q5_K>(),
            T::Q6_K => visitor.blocks::<Q6_K>(),
            T::IQ4_XS => visitor.blocks::<IQ4_XS>(),
            T::IQ2_XXS | T::IQ3_XXS | T::IQ3_S | T::IQ1_S => visitor.grids::<Plain>(),
            T::IQ2_XS | T::IQ2_S | T::IQ1_M => visitor.grids::<PlainHalves>(),
            T::F32
            | T::F16
            | T::BF16
            | T::I8
            | T::I16
            | T::I32
            | T::I64
            | T::F64
            | T::S_BF16
            | T::S8
            | T::S4 => unreachable!("no quantised product takes {ty}"),
        }
    }
}

/// Dword `i` of a field.
#[inline(always)]
unsafe fn dword<L: Lanes>(field: *const u8, i: usize) -> L {
    unsafe { L::load(field.add(64 * i)) }
}

/// The low nibbles of all bytes.
#[inline(always)]
unsafe fn low<L: Lanes>(x: L) -> L {
    unsafe { x.and(L::splat(0x0f0f_0f0f)) }
}

/// The high nibbles of all bytes, where they are.
#[inline(always)]
unsafe fn high_in_place<L: Lanes>(x: L) -> L {
    unsafe { x.and(L::splat(0xf0f0_f0f0_u32 as i32)) }
}

/// Low nibbles are weights 0 to 15, high nibbles, as `high` takes them out, 16 to 31.
#[inline(always)]
unsafe fn nibbles_by<L: Lanes>(qs: *const u8, high: impl Fn(L) -> L) -> [L; 8] {
    unsafe {
        let mut codes = [L::splat(0); 8];
        for e in 0..4 {
            let x = dword::<L>(qs, e);
            codes[e] = low(x);
            codes[e + 4] = high(x);
        }
        codes
    }
}

#[inline(always)]
unsafe fn nibbles<L: Lanes>(qs: *const u8) -> [L; 8] {
    unsafe {
        nibbles_by(
            qs,
            #[inline(always)]
            |x: L| low(x.shr(4)),
        )
    }
}

/// `nibbles` through a table.
#[inline(always)]
unsafe fn looked_up<L: Lanes>(qs: *const u8, table: &[i8; 16]) -> [L; 8] {
    unsafe {
        let mut codes = nibbles::<L>(qs);
        for c in &mut codes {
            *c = c.lookup(table);
        }
        codes
    }
}

/// `nibbles` with a fifth bit each, from a field that `Map::HighBits` ordered.
#[inline(always)]
unsafe fn five_bits<L: Lanes>(qs: *const u8, high: *const u8) -> [L; 8] {
    unsafe {
        let mut codes = nibbles::<L>(qs);
        let high = L::load(high);
        let bit = L::splat(0x0101_0101);
        for (e, c) in codes.iter_mut().enumerate() {
            *c = c.or(high.shr(e as u32).and(bit).shl(4));
        }
        codes
    }
}

#[inline(always)]
unsafe fn f16_scale<L: Lanes>(d: *const u8) -> (L::Floats, L::Floats) {
    unsafe { (L::load_f16(d), L::fsplat(0.0)) }
}

#[inline(always)]
unsafe fn f16_pair<L: Lanes>(d: *const u8) -> (L::Floats, L::Floats) {
    unsafe { (L::load_f16(d), L::load_f16(d.add(32))) }
}

macro_rules! blocks_of_32 {
    ($name:ident, $shape:ident, $raw:literal, zero $zero:literal,
     |$c:ident| $codes:expr, |$s:ident| $scale:expr $(, $nibbles:ident)?) => {
        pub(crate) struct $name;

        impl Format for $name {
            type Shape = $shape;
            const BYTES: usize = 16 * $raw;
            const GROUPS: usize = 1;
            const ZERO: u32 = $zero;

            #[inline(always)]
            unsafe fn codes<L: Lanes>($c: *const u8, _: usize) -> [L; 8] {
                unsafe { $codes }
            }
            #[inline(always)]
            unsafe fn scale<L: Lanes>($s: *const u8, _: usize) -> (L::Floats, L::Floats) {
                unsafe { $scale }
            }
            $(blocks_of_32!($nibbles);)?
        }
    };
    (nibbles) => {
        #[inline(always)]
        fn sixteenfold(_: usize) -> [bool; 2] {
            [false, true]
        }
        #[inline(always)]
        unsafe fn codes_in_place<L: Lanes>(block: *const u8, _: usize) -> [L; 8] {
            unsafe {
                nibbles_by(
                    block,
                    #[inline(always)]
                    |x: L| high_in_place(x),
                )
            }
        }
    };
}

const fn biased(table: [i8; 16], zero: i8) -> [i8; 16] {
    let mut out = table;
    let mut i = 0;
    while i < 16 {
        out[i] = out[i].wrapping_add(zero);
        i += 1;
    }
    out
}

/// Zero point 128.
const IQ4: [i8; 16] = biased(grids::IQ4, i8::MIN);
/// Zero point 16.
const TWICE_MXFP4: [i8; 16] = biased(grids::MXFP4, 16);

blocks_of_32!(Q4_0, Plain, 18, zero 3, |b| nibbles(b), |b| f16_scale::<L>(b.add(256)), nibbles);
blocks_of_32!(Q4_1, Affine, 20, zero 0, |b| nibbles(b), |b| f16_pair::<L>(b.add(256)), nibbles);
blocks_of_32!(Q5_0, Plain, 22, zero 4, |b| five_bits(b, b.add(256)), |b| f16_scale::<L>(
    b.add(320)
));
blocks_of_32!(Q5_1, Affine, 24, zero 0, |b| five_bits(b, b.add(256)), |b| f16_pair::<L>(
    b.add(320)
));
blocks_of_32!(IQ4_NL, Full, 18, zero 7, |b| looked_up(b, &IQ4), |b| f16_scale::<L>(b.add(256)));
blocks_of_32!(MXFP4, Plain, 17, zero 4, |b| looked_up(b, &TWICE_MXFP4), |b| e8m0::<L>(b.add(256)));
blocks_of_32!(Q8_0, Full, 34, zero 7, |b| eight_bits(b), |b| f16_scale::<L>(b.add(512)));

#[inline(always)]
unsafe fn eight_bits<L: Lanes>(qs: *const u8) -> [L; 8] {
    unsafe {
        let mut codes = [dword::<L>(qs, 0); 8];
        for (e, c) in codes.iter_mut().enumerate().skip(1) {
            *c = dword(qs, e);
        }
        codes
    }
}

/// Half of 2^(e - 127): the codes are doubled. The bits of a normal number are
/// `(e - 1) << 23`; the two subnormal ones, for e of 0 and 1, are larger than that.
#[inline(always)]
unsafe fn e8m0<L: Lanes>(e: *const u8) -> (L::Floats, L::Floats) {
    unsafe {
        let e = L::load_u8(e);
        let normal = e.add(L::splat(-1)).shl(23);
        let subnormal = e.min(L::splat(1)).shl(21).add(L::splat(0x0020_0000));
        (normal.max(subnormal).as_floats(), L::fsplat(0.0))
    }
}

pub(crate) struct NVFP4;

impl Format for NVFP4 {
    type Shape = PlainHalves;
    const BYTES: usize = 16 * 36;
    const GROUPS: usize = 2;
    const ZERO: u32 = 4;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe {
            let mask = L::splat(0x0f0f_0f0f);
            let mut codes = [mask; 8];
            for (e, c) in codes.iter_mut().enumerate() {
                // Each 16 weights are two dwords: low nibbles first.
                let x = dword::<L>(block.add(64), 4 * g + e / 4 * 2 + e % 2);
                *c = x.shr(4 * (e as u32 / 2 % 2)).and(mask).lookup(&TWICE_MXFP4);
            }
            codes
        }
    }

    /// Half of the E4M3 number: the codes are doubled. 127 is zero, and the eighth bit is ignored.
    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
        unsafe {
            let (x, one) = (byte::<L>(block, g), L::splat(1));
            let exponent = x.shr(3).and(L::splat(15));
            let mantissa = x.and(L::splat(7)).or(exponent.min(one).shl(3));
            // Sixteen, or zero for 127.
            let most = x.add(L::splat(-127)).and(L::splat(0xff)).min(one).shl(4);
            let power = exponent.max(one).add(L::splat(127 - 11)).shl(23);
            let scale = L::fmul(mantissa.min(most).to_floats(), power.as_floats());
            (scale, L::fsplat(0.0))
        }
    }
}

/// Byte `i` of a field, as an unsigned dword.
#[inline(always)]
unsafe fn byte<L: Lanes>(field: *const u8, i: usize) -> L {
    unsafe {
        dword::<L>(field, i / 4)
            .shr(8 * (i % 4) as u32)
            .and(L::splat(0xff))
    }
}

/// `-(dmin * m)` for an integer `m`.
#[inline(always)]
unsafe fn negated_min<L: Lanes>(dmin: L::Floats, m: L) -> L::Floats {
    unsafe { L::fneg(L::fmul(dmin, m.to_floats())) }
}

pub(crate) struct Q2_K;

impl Format for Q2_K {
    type Shape = AffineHalves;
    const BYTES: usize = 16 * 84;
    const GROUPS: usize = 8;
    const ZERO: u32 = 0;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe { two_bits(block.add(320), g) }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
        unsafe {
            let (d, dmin) = f16_pair::<L>(block);
            let x = byte::<L>(block.add(64), g);
            let scale = L::fmul(d, x.and(L::splat(15)).to_floats());
            (scale, negated_min(dmin, x.shr(4)))
        }
    }
}

/// Bits `2 (g % 4)` of the 32 bytes of half `g / 4`.
#[inline(always)]
unsafe fn two_bits<L: Lanes>(qs: *const u8, g: usize) -> [L; 8] {
    unsafe {
        let mask = L::splat(0x0303_0303);
        let mut codes = [mask; 8];
        for (e, c) in codes.iter_mut().enumerate() {
            *c = dword::<L>(qs, g / 4 * 8 + e)
                .shr(2 * (g % 4) as u32)
                .and(mask);
        }
        codes
    }
}

pub(crate) struct Q3_K;

impl Format for Q3_K {
    type Shape = PlainHalves;
    const BYTES: usize = 16 * 110;
    const GROUPS: usize = 8;
    const ZERO: u32 = 2;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe {
            let mut codes = two_bits::<L>(block.add(512), g);
            let bit = L::splat(0x0101_0101);
            for (e, c) in codes.iter_mut().enumerate() {
                // The mask bit says that 4, the zero point, is not subtracted.
                *c = c.or(dword::<L>(block, e).shr(g as u32).and(bit).shl(2));
            }
            codes
        }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
        unsafe {
            let packed = block.add(1536);
            let low = byte::<L>(packed, g % 8)
                .shr(4 * (g / 8) as u32)
                .and(L::splat(15));
            let high = byte::<L>(packed, 8 + g % 4)
                .shr(2 * (g / 4) as u32)
                .and(L::splat(3));
            let scale = low.or(high.shl(4)).add(L::splat(-32));
            let d = L::load_f16(block.add(1728));
            (L::fmul(d, scale.to_floats()), L::fsplat(0.0))
        }
    }
}

/// Scale and minimum `g` of a Q4_K or Q5_K block: six bits each, those of the second four
/// split between the first eight bytes' top bits and the last four bytes. Four of each are put
/// together at once, which a loop over `g` does once per block.
#[inline(always)]
unsafe fn k4_scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
    unsafe {
        let (d, dmin) = f16_pair::<L>(block);
        let packed = block.add(64);
        let [a, b, c] = [0, 1, 2].map(|i| dword::<L>(packed, i));
        let (six, four, top) = (
            L::splat(0x3f3f_3f3f),
            L::splat(0x0f0f_0f0f),
            L::splat(0x3030_3030),
        );
        let first = (a.and(six), b.and(six));
        let second = (
            c.and(four).or(a.shr(2).and(top)),
            c.shr(4).and(four).or(b.shr(2).and(top)),
        );
        let (scales, mins) = if g < 4 { first } else { second };
        let of = |four: L| four.shr(8 * (g % 4) as u32).and(L::splat(0xff)).to_floats();
        (L::fmul(d, of(scales)), L::fmul(L::fneg(dmin), of(mins)))
    }
}

/// The bytes with the nibbles of group `g`: two groups share them, the even one low.
#[inline(always)]
unsafe fn k_bytes<L: Lanes>(qs: *const u8, g: usize) -> [L; 8] {
    unsafe { eight_bits(qs.add(g / 2 * 512)) }
}

#[inline(always)]
unsafe fn k_nibbles<L: Lanes>(qs: *const u8, g: usize) -> [L; 8] {
    unsafe {
        let mut codes = k_bytes::<L>(qs, g);
        for c in &mut codes {
            *c = low(c.shr(4 * (g % 2) as u32));
        }
        codes
    }
}

pub(crate) struct Q4_K;

impl Format for Q4_K {
    type Shape = Affine;
    const BYTES: usize = 16 * 144;
    const GROUPS: usize = 8;
    const ZERO: u32 = 0;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe { k_nibbles(block.add(256), g) }
    }

    #[inline(always)]
    fn sixteenfold(g: usize) -> [bool; 2] {
        [g % 2 == 1; 2]
    }

    #[inline(always)]
    unsafe fn codes_in_place<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe {
            let mut codes = k_bytes::<L>(block.add(256), g);
            for c in &mut codes {
                *c = match g % 2 {
                    0 => low(*c),
                    _ => high_in_place(*c),
                };
            }
            codes
        }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
        unsafe { k4_scale::<L>(block, g) }
    }
}

pub(crate) struct Q5_K;

impl Format for Q5_K {
    type Shape = Affine;
    const BYTES: usize = 16 * 176;
    const GROUPS: usize = 8;
    const ZERO: u32 = 0;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe {
            let mut codes = k_nibbles::<L>(block.add(768), g);
            let bit = L::splat(0x0101_0101);
            for (e, c) in codes.iter_mut().enumerate() {
                let high = dword::<L>(block.add(256), e);
                *c = c.or(high.shr(g as u32).and(bit).shl(4));
            }
            codes
        }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
        unsafe { k4_scale::<L>(block, g) }
    }
}

pub(crate) struct Q6_K;

impl Format for Q6_K {
    type Shape = PlainHalves;
    const BYTES: usize = 16 * 210;
    const GROUPS: usize = 8;
    const ZERO: u32 = 5;
    const SMALL: bool = false;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe {
            let (half, s) = (g / 4, g % 4);
            let (low, high) = (L::splat(0x0f0f_0f0f), L::splat(0x0303_0303));
            let mut codes = [low; 8];
            for (e, c) in codes.iter_mut().enumerate() {
                let ql = dword::<L>(block, half * 16 + s % 2 * 8 + e);
                let qh = dword::<L>(block.add(2048), half * 8 + e);
                let qh = qh.shr(2 * s as u32).and(high);
                *c = ql.shr(4 * (s / 2) as u32).and(low).or(qh.shl(4));
            }
            codes
        }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
        unsafe {
            let d = L::load_f16(block.add(3328));
            let scale = byte::<L>(block.add(3072), g).sign_extend_u8();
            (L::fmul(d, scale.to_floats()), L::fsplat(0.0))
        }
    }
}

pub(crate) struct IQ4_XS;

impl Format for IQ4_XS {
    type Shape = Full;
    const BYTES: usize = 16 * 136;
    const GROUPS: usize = 8;
    const ZERO: u32 = 7;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(block: *const u8, g: usize) -> [L; 8] {
        unsafe { looked_up(block.add(128 + 256 * g), &IQ4) }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, g: usize) -> (L::Floats, L::Floats) {
        unsafe {
            let high = L::load_u16(block.add(32))
                .shr(2 * g as u32)
                .and(L::splat(3));
            let low = L::load(block.add(64)).shr(4 * g as u32).and(L::splat(15));
            let scale = low.or(high.shl(4)).add(L::splat(-32));
            (
                L::fmul(L::load_f16(block), scale.to_floats()),
                L::fsplat(0.0),
            )
        }
    }
}
