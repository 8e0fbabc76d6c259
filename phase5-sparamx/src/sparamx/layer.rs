//! SparAMX's layers: from their arrays to dense rows, and back.

use half::{bf16, f16};

use super::packed_order;

/// Rows of a tile along the inputs, and outputs that it has.
const LINES: usize = 16;

/// What the values are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Values {
    /// bf16.
    Bf16,
    /// 8-bit codes, with a factor per output by which weights were multiplied.
    Int8,
}

impl Values {
    /// Bytes of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Values::Bf16 => 2,
            Values::Int8 => 1,
        }
    }

    /// Inputs that stand side by side in a tile's row.
    const fn group(self) -> usize {
        4 / self.bytes()
    }

    /// Inputs of a tile.
    const fn tile_k(self) -> usize {
        LINES * self.group()
    }
}

/// Why a layer can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    #[error("{0} outputs and {1} words of bitmaps make no whole tiles")]
    Shape(usize, usize),
    #[error("the bitmaps count {said} values, {found} are there")]
    Count { said: usize, found: usize },
    #[error("thread {thread} is said to begin at value {said}; the tiles before it have {found}")]
    Start {
        thread: usize,
        said: i64,
        found: usize,
    },
    #[error("{threads} threads and {rows} rows of tiles: the packer could not have shared these")]
    Threads { threads: usize, rows: usize },
    #[error("{0} factors for {1} outputs")]
    Factors(usize, usize),
}

/// A linear layer as SparAMX keeps it.
#[derive(Clone, PartialEq, Debug)]
pub struct Layer {
    pub values: Values,
    pub outputs: usize,
    /// A bit for each weight, in the order of the tiles.
    pub bitmaps: Vec<u32>,
    /// The weights that are not zero, in the order of their bits, little-endian.
    pub data: Vec<u8>,
    /// The first value of each thread that it was packed for.
    pub starts: Vec<i64>,
    /// `[outputs]`, of 8 bits.
    pub factors: Vec<f32>,
}

impl Layer {
    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.bitmaps.len() * 32 / self.outputs.max(1)
    }

    /// The tiles in their order, `(row of tiles, step along k)`, if these arrays can be a layer.
    fn tiles(&self) -> Result<Vec<(usize, usize)>, LayerError> {
        let (n, k) = (self.outputs, self.inputs());
        let whole = n > 0
            && n.is_multiple_of(LINES)
            && n * k == self.bitmaps.len() * 32
            && k.is_multiple_of(self.values.tile_k());
        if !whole {
            return Err(LayerError::Shape(n, self.bitmaps.len()));
        }
        let (rows, threads) = (n / LINES, self.starts.len());
        // Beyond one row of tiles for each thread the packer puts rows down in pairs.
        let pairs = rows > threads;
        if threads == 0 || !rows.is_multiple_of(threads) || (pairs && !rows.is_multiple_of(2)) {
            return Err(LayerError::Threads { threads, rows });
        }
        Ok(packed_order(rows, k / self.values.tile_k(), threads))
    }

    /// The layer's weights as dense rows `[outputs][inputs]` of values, zeros put back.
    ///
    /// # Errors
    /// For arrays that contradict each other.
    pub fn dense(&self) -> Result<Vec<u8>, LayerError> {
        let tiles = self.tiles()?;
        let (k, bytes, group) = (self.inputs(), self.values.bytes(), self.values.group());
        let said = self.bitmaps.iter().map(|w| w.count_ones() as usize).sum();
        if said * bytes != self.data.len() {
            return Err(LayerError::Count {
                said,
                found: self.data.len() / bytes,
            });
        }
        let words = LINES * group * LINES / 32;
        let share = tiles.len() / self.starts.len();
        let mut out = vec![0; self.outputs * k * bytes];
        let mut values = self.data.chunks_exact(bytes);
        let mut taken = 0;
        for (i, (&(row, step), bitmaps)) in tiles
            .iter()
            .zip(self.bitmaps.chunks_exact(words))
            .enumerate()
        {
            if i % share == 0 {
                let thread = i / share;
                let said = self.starts[thread];
                if usize::try_from(said) != Ok(taken) {
                    return Err(LayerError::Start {
                        thread,
                        said,
                        found: taken,
                    });
                }
            }
            for bit in 0..words * 32 {
                if bitmaps[bit / 32] >> (bit % 32) & 1 == 0 {
                    continue;
                }
                let (line, within) = (bit / (LINES * group), bit % (LINES * group));
                let output = row * LINES + within / group;
                let input = step * self.values.tile_k() + line * group + within % group;
                let at = (output * k + input) * bytes;
                let value = values.next().unwrap_or(&[]);
                out[at..at + bytes].copy_from_slice(value);
                taken += 1;
            }
        }
        Ok(out)
    }

    /// Dense rows of a type of ours: BF16 as they are; of 8 bits Q8_0 with the codes as they
    /// are, and the factors turned round as scales.
    ///
    /// # Errors
    /// As [`Layer::dense`], and for factors that are not one for each output.
    pub fn rows(&self) -> Result<Vec<u8>, LayerError> {
        let dense = self.dense()?;
        if self.values == Values::Bf16 {
            return Ok(dense);
        }
        if self.factors.len() != self.outputs {
            return Err(LayerError::Factors(self.factors.len(), self.outputs));
        }
        let mut out = Vec::with_capacity(dense.len() / 32 * 34);
        for (row, factor) in dense.chunks_exact(self.inputs()).zip(&self.factors) {
            let scale = f16::from_f32(1.0 / factor).to_bits().to_le_bytes();
            for codes in row.chunks_exact(32) {
                out.extend(scale);
                out.extend(codes);
            }
        }
        Ok(out)
    }

    /// Packs dense rows as SparAMX does for so many threads: to hold the reading against.
    ///
    /// # Errors
    /// For shapes that its packer does not take.
    pub fn pack(
        values: Values,
        (outputs, inputs): (usize, usize),
        dense: &[u8],
        threads: usize,
    ) -> Result<Layer, LayerError> {
        let mut layer = Layer {
            values,
            outputs,
            bitmaps: vec![0; outputs * inputs / 32],
            data: Vec::new(),
            starts: vec![0; threads],
            factors: Vec::new(),
        };
        let (bytes, group) = (values.bytes(), values.group());
        let tiles = layer.tiles()?;
        let words = LINES * group * LINES / 32;
        let share = tiles.len() / threads;
        for (i, (row, step)) in tiles.into_iter().enumerate() {
            if i % share == 0 {
                layer.starts[i / share] = (layer.data.len() / bytes) as i64;
            }
            for bit in 0..words * 32 {
                let (line, within) = (bit / (LINES * group), bit % (LINES * group));
                let output = row * LINES + within / group;
                let input = step * values.tile_k() + line * group + within % group;
                let at = (output * inputs + input) * bytes;
                let value = &dense[at..at + bytes];
                if value.iter().any(|b| *b != 0) {
                    layer.bitmaps[i * words + bit / 32] |= 1 << (bit % 32);
                    layer.data.extend(value);
                }
            }
        }
        Ok(layer)
    }

    /// Quantises rows of weights as SparAMX does: factors are never above 1, as bf16.
    pub fn int8_codes(weights: &[f32], inputs: usize) -> (Vec<u8>, Vec<f32>) {
        let mut factors = Vec::new();
        let mut codes = Vec::new();
        for row in weights.chunks_exact(inputs) {
            let largest = row.iter().fold(0.0f32, |most, w| most.max(w.abs()));
            let factor = super::int8_scale(largest);
            codes.extend(
                row.iter()
                    .map(|w| (w * factor).round_ties_even() as i8 as u8),
            );
            factors.push(bf16::from_f32(factor).to_f32());
        }
        (codes, factors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::dense_rows;
    use tegula_gguf::{GgmlType, blocks};

    fn bf16_rows(n: usize, k: usize) -> Vec<u8> {
        dense_rows(GgmlType::S_BF16, n, k, 50, 3)
    }

    #[test]
    fn layers_come_back_whatever_they_were_packed_for() {
        for (n, k, threads) in [
            (16, 32, 1),
            (64, 96, 4),
            (64, 64, 2),
            (128, 32, 2),
            (96, 64, 3),
        ] {
            let rows = bf16_rows(n, k);
            let layer = Layer::pack(Values::Bf16, (n, k), &rows, threads).unwrap();
            assert_eq!(layer.inputs(), k);
            assert!(
                layer.rows().unwrap() == rows,
                "{n}x{k} for {threads} threads"
            );
        }
    }

    #[test]
    fn codes_and_zeros_of_8_bits_are_kept() {
        let (n, k) = (32, 128);
        let weights: Vec<f32> = (0..n * k)
            .map(|i| {
                if i % 3 == 0 {
                    0.0
                } else {
                    (i as f32 * 0.7).sin() * 300.0
                }
            })
            .collect();
        let (codes, factors) = Layer::int8_codes(&weights, k);
        let layer = Layer {
            factors,
            ..Layer::pack(Values::Int8, (n, k), &codes, 1).unwrap()
        };
        let rows = layer.rows().unwrap();
        let mut back = vec![0.0; n * k];
        blocks::dequantize(GgmlType::Q8_0, &rows, &mut back).unwrap();
        for (i, (w, b)) in weights.iter().zip(&back).enumerate() {
            assert!((w - b).abs() < 2.0, "{i}: {w} {b}");
            assert!(*w != 0.0 || *b == 0.0, "{i}");
        }
        // Usual weights, well below a half, become nothing: the fault that check 5.1 shows.
        let small: Vec<f32> = weights.iter().map(|w| w * 1e-3).collect();
        assert!(Layer::int8_codes(&small, k).0.iter().all(|c| *c == 0));
    }

    #[test]
    fn arrays_that_contradict_each_other_are_refused() {
        let good = Layer::pack(Values::Bf16, (64, 64), &bf16_rows(64, 64), 2).unwrap();
        let refused = |change: &dyn Fn(&mut Layer)| {
            let mut layer = good.clone();
            change(&mut layer);
            layer.rows().unwrap_err()
        };
        let short = refused(&|l| l.data.truncate(l.data.len() - 2));
        assert!(matches!(short, LayerError::Count { .. }), "{short}");
        let start = refused(&|l| l.starts[1] += 1);
        assert!(
            matches!(start, LayerError::Start { thread: 1, .. }),
            "{start}"
        );
        let negative = refused(&|l| l.starts[0] = -1);
        assert!(matches!(negative, LayerError::Start { thread: 0, .. }));
        assert!(matches!(
            refused(&|l| l.starts.clear()),
            LayerError::Threads { .. }
        ));
        assert!(matches!(refused(&|l| l.outputs = 0), LayerError::Shape(..)));
        assert!(matches!(
            refused(&|l| l.outputs = 48),
            LayerError::Shape(..)
        ));
        let int8 = Layer::pack(Values::Int8, (16, 64), &[1; 16 * 64], 1).unwrap();
        assert_eq!(int8.rows(), Err(LayerError::Factors(0, 16)));
    }
}
