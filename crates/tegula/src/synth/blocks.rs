//! Random blocks of every type: codes from the generator, scales that make the weights'
//! standard deviation what is asked for.

use bytemuck::Pod;
use half::f16;
use tegula_gguf::{
    GgmlType,
    blocks::{self, layout::*},
};

/// SplitMix64's finaliser (Steele, Lea, Flood 2014).
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A stream of random numbers; the same seed gives the same one.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(mix(seed))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub fn fill(&mut self, out: &mut [u8]) {
        let (words, rest) = out.as_chunks_mut::<8>();
        words
            .iter_mut()
            .for_each(|w| *w = self.next().to_le_bytes());
        let last = self.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Whether there are random weights of this type.
pub fn can_fill(ty: GgmlType) -> bool {
    blocks::can_dequantize(ty)
}

/// Weights that show a type's deviation well enough: a multiple of every block.
const SAMPLE: usize = 1 << 16;

/// Makes blocks of one type and deviation.
#[derive(Clone, Copy, Debug)]
pub struct Filler {
    ty: GgmlType,
    /// The blocks' common scale; for plain floats the exponent of all weights.
    scale: f32,
}

impl Filler {
    /// For weights of the given standard deviation; plain floats and MXFP4, whose scales are
    /// powers of two, and NVFP4, whose smallest are as far apart, come within a factor of the square root of 2.
    pub fn new(ty: GgmlType, deviation: f32) -> Filler {
        // What a scale of 1 would give, by trying.
        let unit = Filler { ty, scale: 1.0 };
        let mut sample = vec![0; ty.block_bytes() * (SAMPLE / ty.block_len())];
        unit.fill(1, &mut sample);
        let mut weights = vec![0.0; SAMPLE];
        let decoded = blocks::dequantize(ty, &sample, &mut weights);
        debug_assert!(decoded.is_ok());
        let sum: f32 = weights.iter().map(|w| w * w).sum();
        let unit = (sum / weights.len() as f32).sqrt();
        Filler {
            ty,
            scale: deviation / unit,
        }
    }

    /// Fills whole blocks; the same seed gives the same bytes.
    pub fn fill(&self, seed: u64, out: &mut [u8]) {
        Random::new(seed).fill(out);
        let s = self.scale;
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let d = half(s);
        match self.ty {
            GgmlType::F32 => with_exponent::<4>(out, s, 23, 127),
            GgmlType::F16 => with_exponent::<2>(out, s, 10, 15),
            GgmlType::BF16 => with_exponent::<2>(out, s, 7, 127),
            GgmlType::Q4_0 => stamp(out, |b: &mut Q4_0| b.d = d),
            // Types with minima: the minimum takes away the mean of the codes.
            GgmlType::Q4_1 => {
                let m = half(-7.5 * s);
                stamp(out, |b: &mut Q4_1| (b.d, b.m) = (d, m));
            }
            GgmlType::Q5_0 => stamp(out, |b: &mut Q5_0| b.d = d),
            GgmlType::Q5_1 => {
                let m = half(-15.5 * s);
                stamp(out, |b: &mut Q5_1| (b.d, b.m) = (d, m));
            }
            GgmlType::Q8_0 => stamp(out, |b: &mut Q8_0| b.d = d),
            GgmlType::MXFP4 => {
                let e = (127.0 + s.log2()).round().clamp(2.0, 254.0) as u8;
                stamp(out, |b: &mut MXFP4| b.e = e);
            }
            GgmlType::NVFP4 => {
                let d = blocks::to_ue4m3(s).max(1);
                stamp(out, |b: &mut NVFP4| b.d = [d; 4]);
            }
            GgmlType::IQ4_NL => stamp(out, |b: &mut IQ4_NL| b.d = d),
            GgmlType::Q2_K => {
                let dmin = half(1.5 * s);
                stamp(out, |b: &mut Q2_K| {
                    // Scale and minimum alike, 8 to 15.
                    b.scales = b.scales.map(|x| (8 | x & 7) * 0x11);
                    (b.d, b.dmin) = (d, dmin);
                });
            }
            GgmlType::Q3_K => stamp(out, |b: &mut Q3_K| b.d = d),
            GgmlType::Q4_K => {
                let dmin = half(7.5 * s);
                stamp(out, |b: &mut Q4_K| {
                    (b.d, b.dmin, b.scales) = (d, dmin, equal_scales_k4(b.scales));
                });
            }
            GgmlType::Q5_K => {
                let dmin = half(15.5 * s);
                stamp(out, |b: &mut Q5_K| {
                    (b.d, b.dmin, b.scales) = (d, dmin, equal_scales_k4(b.scales));
                });
            }
            GgmlType::Q6_K => stamp(out, |b: &mut Q6_K| b.d = d),
            GgmlType::IQ4_XS => stamp(out, |b: &mut IQ4_XS| b.d = d),
            GgmlType::IQ2_XXS => stamp(out, |b: &mut IQ2_XXS| b.d = d),
            GgmlType::IQ2_XS => stamp(out, |b: &mut IQ2_XS| b.d = d),
            GgmlType::IQ2_S => stamp(out, |b: &mut IQ2_S| b.d = d),
            GgmlType::IQ3_XXS => stamp(out, |b: &mut IQ3_XXS| b.d = d),
            GgmlType::IQ3_S => stamp(out, |b: &mut IQ3_S| b.d = d),
            GgmlType::IQ1_S => stamp(out, |b: &mut IQ1_S| b.d = d),
            GgmlType::IQ1_M => {
                // The scale lies in the high nibbles of the four 16-bit words of scales.
                let nibbles = [d[0] & 15, d[0] >> 4, d[1] & 15, d[1] >> 4];
                stamp(out, |b: &mut IQ1_M| {
                    for (i, nibble) in nibbles.into_iter().enumerate() {
                        let high = &mut b.scales[2 * i + 1];
                        *high = *high & 15 | nibble << 4;
                    }
                });
            }
            // Whole numbers are no weights, sparse ones no blocks; `can_fill` says so.
            GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 | GgmlType::F64 => {}
            GgmlType::S_BF16 | GgmlType::S8 | GgmlType::S4 => {}
        }
    }
}

fn stamp<B: Pod>(bytes: &mut [u8], block: impl Fn(&mut B)) {
    bytemuck::cast_slice_mut(bytes).iter_mut().for_each(block);
}

/// 8 scales from 32 to 63, each with a minimum of the same number.
fn equal_scales_k4(random: [u8; 12]) -> [u8; 12] {
    let scales = std::array::from_fn(|i| 32 | random[i] & 31);
    pack_scales_k4(&scales, &scales)
}

/// Keeps the random sign and mantissa of little-endian floats of `N` bytes and gives them
/// all the exponent of `scale`, which lies behind `mantissa` bits with this bias.
fn with_exponent<const N: usize>(bytes: &mut [u8], scale: f32, mantissa: u32, bias: i32) {
    let bits = 8 * N as u32;
    let largest = (1 << (bits - 1 - mantissa)) - 2;
    let exponent = (scale.log2().round() as i32 + bias).clamp(1, largest) as u32;
    let keep = 1 << (bits - 1) | ((1 << mantissa) - 1);
    let (floats, _) = bytes.as_chunks_mut::<N>();
    for float in floats {
        let mut wide = [0; 4];
        wide[..N].copy_from_slice(float);
        let value = u32::from_le_bytes(wide) & keep | exponent << mantissa;
        float.copy_from_slice(&value.to_le_bytes()[..N]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_the_deviation_asked_for_and_no_mean() {
        for &ty in GgmlType::ALL.iter().filter(|&&ty| can_fill(ty)) {
            for deviation in [1.0, 1.0 / 64.0, 1.0 / 128.0] {
                let blocks = (1 << 16) / ty.block_len();
                let mut bytes = vec![0; blocks * ty.block_bytes()];
                Filler::new(ty, deviation).fill(7, &mut bytes);
                let mut weights = vec![0.0f32; 1 << 16];
                blocks::dequantize(ty, &bytes, &mut weights).unwrap();
                let n = weights.len() as f32;
                let mean = weights.iter().sum::<f32>() / n;
                let got = (weights.iter().map(|w| w * w).sum::<f32>() / n).sqrt();
                let ratio = got / deviation;
                let slack = match ty {
                    GgmlType::F32
                    | GgmlType::F16
                    | GgmlType::BF16
                    | GgmlType::MXFP4
                    | GgmlType::NVFP4 => 1.42,
                    _ => 1.1,
                };
                assert!((1.0 / slack..slack).contains(&ratio), "{ty}: {ratio}");
                assert!(mean.abs() < 0.15 * deviation, "{ty}: mean {mean} of {got}");
                assert!(weights.iter().all(|w| w.is_finite()), "{ty}");
            }
        }
    }

    #[test]
    fn seeds_differ_and_repeat() {
        let make = |seed| {
            let mut bytes = vec![0; 34 * 10];
            Filler::new(GgmlType::Q8_0, 1.0).fill(seed, &mut bytes);
            bytes
        };
        assert_eq!(make(1), make(1));
        assert_ne!(make(1), make(2));
    }
}
