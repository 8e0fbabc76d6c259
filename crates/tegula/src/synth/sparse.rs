//! Random sparse strips, made as they lie in the file: bitmaps and values from the generator,
//! without dense rows between.

use super::blocks::{Filler, Random};
use half::f16;
use phase5_sparamx::prune::Target;
use tegula_gguf::{
    GgmlType,
    sparse::{BITMAP, GROUP, Header, Pattern, ROWS, bitmap, build_strip, pack_strip, unpack_strip},
};

/// Chances are multiples of one in so many.
const CHANCES: f64 = 65536.0;

/// Makes strips of one type, length of rows, and share of zeros.
#[derive(Clone, Debug)]
pub struct Strips {
    header: Header,
    zeros: Target,
    /// All ways to have a pattern's N values in M inputs, where they are not too many.
    ways: Vec<u32>,
    /// The f16 scale of all groups; of `S_BF16` nothing.
    scale: [u8; 2],
    /// Values of `S_BF16`.
    floats: Filler,
}

impl Strips {
    /// For strips of such a tensor, whose weights, zeros included, are to have this standard
    /// deviation.
    pub fn new(header: &Header, zeros: Target, deviation: f32) -> Strips {
        let kept = match zeros {
            Target::Sparsity(s) => 1.0 - s,
            Target::Pattern(p) => p.n() as f64 / p.m() as f64,
        };
        let ways = match zeros {
            Target::Pattern(p) if p.m() <= 8 => (0..1 << p.m())
                .filter(|way: &u32| way.count_ones() as usize == p.n())
                .collect(),
            _ => Vec::new(),
        };
        let deviation = deviation / (kept as f32).sqrt();
        let mut codes: Vec<u8> = (0..=255).collect();
        no_zeros(header.ty, &mut codes);
        let square = |code: &u8| match header.ty {
            GgmlType::S8 => (f32::from(*code) - 128.0).powi(2),
            _ => (f32::from(*code & 15) - 8.0).powi(2),
        };
        let unit = (codes.iter().map(square).sum::<f32>() / codes.len() as f32).sqrt();
        Strips {
            header: *header,
            zeros,
            ways,
            scale: f16::from_f32(deviation / unit).to_le_bytes(),
            floats: Filler::new(GgmlType::BF16, deviation),
        }
    }

    /// Appends strip `strip` and returns the number of its values. The same seed gives the same
    /// bytes.
    pub fn append(&self, strip: usize, seed: u64, out: &mut Vec<u8>) -> u64 {
        let Header { ty, k, pattern, .. } = self.header;
        let mut random = Random::new(!seed);
        let start = out.len();
        let count = self.build(seed, out, |bytes| match ty {
            GgmlType::S_BF16 => self.floats.fill(random.next(), bytes),
            _ => {
                random.fill(bytes);
                no_zeros(ty, bytes);
            }
        });
        if !self.ragged(strip) {
            return count;
        }
        // Rows and inputs that are not there have no values, or such as the format says.
        let row = ty.dense().bytes_for(k as u64).expect("whole blocks") as usize;
        let mut dense = vec![0; self.header.rows_of(strip).len() * row];
        let mut rows: Vec<&mut [u8]> = dense.chunks_exact_mut(row).collect();
        unpack_strip(ty, k, &out[start..], &mut rows);
        out.truncate(start);
        let rows: Vec<&[u8]> = dense.chunks_exact(row).collect();
        pack_strip(ty, k, &rows, pattern, out).expect("no more values than the pattern has")
    }

    /// The bytes of strip `strip`, and the number of its values, in most cases without making
    /// these.
    pub fn measure(&self, strip: usize, seed: u64, scratch: &mut Vec<u8>) -> (usize, u64) {
        scratch.clear();
        let values = match self.ragged(strip) {
            true => self.append(strip, seed, scratch),
            false => self.build(seed, scratch, |_| {}),
        };
        (scratch.len(), values)
    }

    /// Whether the strip has less than 16 rows, or its last group less than 32 inputs.
    fn ragged(&self, strip: usize) -> bool {
        self.header.rows_of(strip).len() < ROWS || !self.header.k.is_multiple_of(GROUP)
    }

    fn build(&self, seed: u64, out: &mut Vec<u8>, values: impl FnMut(&mut [u8])) -> u64 {
        let mut random = Random::new(seed);
        let head = |_, bytes: &mut [u8]| {
            let (scales, bits) = bytes.split_at_mut(bytes.len() - BITMAP);
            scales.as_chunks_mut::<2>().0.fill(self.scale);
            self.bits(&mut random, bits);
        };
        build_strip(self.header.ty, self.header.k, head, values, out)
    }

    /// Fills a group's bitmap.
    fn bits(&self, random: &mut Random, out: &mut [u8]) {
        match self.zeros {
            Target::Sparsity(s) => {
                let keep = ((1.0 - s) * CHANCES).round() as u32;
                let (words, _) = out.as_chunks_mut::<8>();
                words
                    .iter_mut()
                    .for_each(|w| *w = coins(random, keep).to_le_bytes());
            }
            Target::Pattern(p) => {
                let kept = std::array::from_fn(|_| choose(random, p, &self.ways));
                out.copy_from_slice(&bitmap(self.header.ty, &kept));
            }
        }
    }
}

/// 64 bits, each of them set with a chance of `keep` in 65536.
fn coins(random: &mut Random, keep: u32) -> u64 {
    if keep >= CHANCES as u32 {
        return u64::MAX;
    }
    // The digits of the chance from the last one that counts: each halves what is behind it, and
    // adds a half or nothing.
    (keep.trailing_zeros()..16).fold(0, |bits, digit| match keep >> digit & 1 {
        0 => bits & random.next(),
        _ => bits | random.next(),
    })
}

/// 32 bits, of every M of them N set: one of these `ways`, or drawn bit by bit.
fn choose(random: &mut Random, pattern: Pattern, ways: &[u32]) -> u32 {
    let m = pattern.m();
    // Below `n`, evenly but for what 32 bits can't divide.
    let mut below = |n: usize| (((random.next() >> 32) * n as u64) >> 32) as usize;
    let mut bits = 0;
    for first in (0..GROUP).step_by(m) {
        if !ways.is_empty() {
            bits |= ways[below(ways.len())] << first;
            continue;
        }
        let mut needed = pattern.n();
        for i in 0..m {
            // A chance of `needed` of those that are left.
            if below(m - i) < needed {
                bits |= 1 << (first + i);
                needed -= 1;
            }
        }
    }
    bits
}

/// Values that stand for zero become the largest, which two's complement lacks.
fn no_zeros(ty: GgmlType, values: &mut [u8]) {
    let replace = |b: u8| match ty {
        GgmlType::S8 => b | if b == 0x80 { 0x7f } else { 0 },
        _ => {
            let low = if b & 0x0f == 0x08 { 0x07 } else { 0 };
            let high = if b & 0xf0 == 0x80 { 0x70 } else { 0 };
            b | low | high
        }
    };
    values.iter_mut().for_each(|b| *b = replace(*b));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_gguf::{blocks, sparse::check_strip};

    fn targets() -> Vec<Target> {
        let shares = [0.0, 0.05, 0.5, 0.7, 0.99].map(Target::Sparsity);
        let patterns = ["2:4", "4:8", "3:32"].map(|p| Target::Pattern(p.parse().unwrap()));
        shares.into_iter().chain(patterns).collect()
    }

    fn header(ty: GgmlType, shape: [u64; 2], zeros: Target) -> Header {
        let pattern = match zeros {
            Target::Sparsity(_) => None,
            Target::Pattern(p) => Some(p),
        };
        Header::new(ty, &shape, pattern).unwrap()
    }

    #[test]
    fn strips_have_the_zeros_and_the_deviation_asked_for() {
        for &ty in GgmlType::SPARSE {
            for zeros in targets() {
                let h = header(ty, [4096, 16], zeros);
                let deviation = 1.0 / 64.0;
                let strips = Strips::new(&h, zeros, deviation);
                let mut strip = Vec::new();
                let values = strips.append(0, 3, &mut strip);
                assert_eq!(check_strip(&h, &strip), Ok(values), "{ty} {zeros:?}");
                assert_eq!(
                    strips.measure(0, 3, &mut Vec::new()),
                    (strip.len(), values),
                    "{ty} {zeros:?}"
                );
                let row = ty.dense().bytes_for(4096).unwrap() as usize;
                let mut dense = vec![0; 16 * row];
                let mut rows: Vec<&mut [u8]> = dense.chunks_exact_mut(row).collect();
                unpack_strip(ty, 4096, &strip, &mut rows);
                let mut weights = vec![0.0f32; 16 * 4096];
                blocks::dequantize(ty.dense(), &dense, &mut weights).unwrap();
                let n = weights.len() as f64;
                // No value is a zero.
                let some = weights.iter().filter(|w| **w != 0.0).count();
                assert_eq!(some as u64, values, "{ty} {zeros:?}");
                let share = 1.0 - values as f64 / n;
                match zeros {
                    Target::Sparsity(s) => assert!((share - s).abs() < 0.01, "{ty} {s}: {share}"),
                    Target::Pattern(p) => {
                        for part in weights.chunks_exact(p.m()) {
                            let some = part.iter().filter(|w| **w != 0.0).count();
                            assert_eq!(some, p.n(), "{ty} {p}");
                        }
                    }
                }
                let mean = weights.iter().sum::<f32>() / n as f32;
                let got = (weights.iter().map(|w| w * w).sum::<f32>() / n as f32).sqrt();
                let slack = if ty == GgmlType::S_BF16 { 1.42 } else { 1.1 };
                let ratio = got / deviation;
                assert!(
                    (1.0 / slack..slack).contains(&ratio),
                    "{ty} {zeros:?}: {ratio}"
                );
                assert!(mean.abs() < 0.15 * deviation, "{ty} {zeros:?}: mean {mean}");
            }
        }
    }

    #[test]
    fn places_are_drawn_evenly() {
        // Every weight of a group, over many groups, is there as often as any other.
        let [some, many] = ["2:8", "8:32"].map(|p| Target::Pattern(p.parse().unwrap()));
        for zeros in [Target::Sparsity(0.75), some, many] {
            let h = header(GgmlType::S8, [32, 16], zeros);
            let strips = Strips::new(&h, zeros, 1.0);
            let mut counts = [0u32; 8 * BITMAP];
            let mut random = Random::new(1);
            for _ in 0..4000 {
                let mut bits = [0; BITMAP];
                strips.bits(&mut random, &mut bits);
                for (bit, count) in counts.iter_mut().enumerate() {
                    *count += u32::from(bits[bit / 8] >> (bit % 8) & 1);
                }
            }
            // 1000 expected, a deviation of 27.
            assert!(counts.iter().all(|c| (850..1150).contains(c)), "{counts:?}");
        }
    }

    #[test]
    fn ragged_strips_are_valid_and_end_with_nothing() {
        for &ty in GgmlType::SPARSE {
            for zeros in [
                Target::Sparsity(0.5),
                Target::Pattern("2:4".parse().unwrap()),
            ] {
                // The second strip has one row; rows of bf16 end within a group.
                let k = if ty == GgmlType::S_BF16 { 100 } else { 96 };
                let h = header(ty, [k, 17], zeros);
                let strips = Strips::new(&h, zeros, 1.0);
                for s in 0..2 {
                    let mut strip = Vec::new();
                    let values = strips.append(s, 9, &mut strip);
                    assert_eq!(check_strip(&h, &strip), Ok(values), "{ty} {zeros:?}");
                    let measured = strips.measure(s, 9, &mut Vec::new());
                    assert_eq!(measured, (strip.len(), values), "{ty} {zeros:?}");
                }
            }
        }
    }
}
