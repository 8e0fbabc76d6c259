//! Activation norms: what Wanda weighs weights by, measured by the engine itself.

use std::{
    collections::{BTreeMap, HashMap},
    ops::ControlFlow,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tegula_engine::{Batch, Context, ContextOptions, Model, windows};
use tegula_gguf::{GgmlType, Gguf, Metadata, quantize::read_importance, writer::GgufWriter};
use tegula_kernels::{Weights, ops::Observer};

use super::PruneError;

/// Mean squares of the inputs of each matrix: per column, of a stack per column of each expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Norms {
    /// Sums of squares, `[experts][k]`, and inputs counted, `[experts]`, by tensor.
    sums: BTreeMap<String, (Vec<f64>, Vec<u64>)>,
}

impl Norms {
    /// The root mean squares of a tensor's inputs, `[experts][k]`; those of an expert that saw
    /// no token are 1.
    pub fn of(&self, tensor: &str) -> Option<Vec<f32>> {
        let (sums, counts) = self.sums.get(tensor)?;
        let k = sums.len() / counts.len();
        let rows = sums.chunks_exact(k).zip(counts);
        let root = |(row, &count): (&[f64], &u64)| -> Vec<f32> {
            let mean = |&s: &f64| match count {
                0 => 1.0,
                n => (s / n as f64).sqrt() as f32,
            };
            row.iter().map(mean).collect()
        };
        Some(rows.flat_map(root).collect())
    }

    /// The sums of squares of a tensor's inputs, `[experts][k]`, and how many inputs there
    /// were, `[experts]`.
    pub fn counts(&self, tensor: &str) -> Option<(&[f64], &[u64])> {
        let (sums, counts) = self.sums.get(tensor)?;
        Some((sums, counts))
    }

    /// Those of all tensors, by name.
    pub fn all(&self) -> HashMap<String, Vec<f32>> {
        let names = self.sums.keys();
        names
            .filter_map(|name| Some((name.clone(), self.of(name)?)))
            .collect()
    }

    /// Experts that saw no token, over all tensors.
    pub fn unseen(&self) -> usize {
        let counts = self.sums.values().flat_map(|(_, counts)| counts);
        counts.filter(|&&n| n == 0).count()
    }

    /// Writes the sums as `llama-imatrix` does, so that `quantize --imatrix` reads them, too.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, path: &Path) -> Result<(), PruneError> {
        let mut metadata = Metadata::default();
        metadata.set("general.type", "imatrix");
        let mut writer = GgufWriter::new(metadata);
        let mut data: Vec<u8> = Vec::new();
        let mut put = |values: &mut dyn Iterator<Item = f32>| {
            data.extend(values.flat_map(f32::to_le_bytes));
            // Tensors begin where the alignment says; the stream pads.
            data.len()
        };
        let mut ends = vec![0];
        for (name, (sums, counts)) in &self.sums {
            let (k, experts) = (sums.len() / counts.len(), counts.len() as u64);
            writer.add_tensor(
                &format!("{name}.in_sum2"),
                GgmlType::F32,
                &[k as u64, experts],
            )?;
            ends.push(put(&mut sums.iter().map(|&s| s as f32)));
            writer.add_tensor(&format!("{name}.counts"), GgmlType::F32, &[1, experts])?;
            ends.push(put(&mut counts.iter().map(|&n| n as f32)));
        }
        let mut out = writer.create(path)?;
        for part in ends.windows(2) {
            out.write(&data[part[0]..part[1]])?;
        }
        out.finish()?;
        Ok(())
    }
}

/// Root mean squares by tensor, read from a file of `llama-imatrix` or of [`Norms::save`].
///
/// # Errors
/// When the file holds none, or wrong ones.
pub fn read_norms(file: &Gguf) -> Result<HashMap<String, Vec<f32>>, PruneError> {
    let mut all = read_importance(file)?;
    for factors in all.values_mut() {
        factors.iter_mut().for_each(|f| *f = f.sqrt());
    }
    Ok(all)
}

/// Adds up squares while a model runs.
struct Listener {
    /// The tensor of a matrix, by its address in the model.
    names: HashMap<usize, String>,
    norms: Mutex<Norms>,
}

impl Observer for Listener {
    fn product(&self, weights: &Weights, expert: usize, x: &[f32]) {
        let Some(name) = self.names.get(&std::ptr::from_ref(weights).addr()) else {
            return;
        };
        let (k, experts) = (weights.k(), weights.experts());
        let mut norms = self.norms.lock().unwrap_or_else(PoisonError::into_inner);
        let (sums, counts) = norms
            .sums
            .entry(name.clone())
            .or_insert_with(|| (vec![0.0; k * experts], vec![0; experts]));
        counts[expert] += (x.len() / k) as u64;
        let sums = &mut sums[expert * k..(expert + 1) * k];
        for row in x.chunks_exact(k) {
            for (sum, &v) in sums.iter_mut().zip(row) {
                *sum += f64::from(v) * f64::from(v);
            }
        }
    }
}

/// Runs `text` through the model, in windows of `window` tokens of which at most `limit` (0:
/// all), and returns the norms of all inputs of its matrices. Experts count the tokens that
/// are theirs. The model must lie on the CPU, and no other must have been observed in it.
///
/// # Errors
/// [`PruneError::ShortText`] when there are less than two windows, [`PruneError::Cancelled`]
/// after a break, or when the model can't run.
pub fn calibrate(
    model: Arc<Model>,
    text: &str,
    window: usize,
    limit: usize,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Norms, PruneError> {
    let tokenizer = model.tokenizer();
    let tokens = tokenizer.encode(
        text,
        tegula_gguf::tokenizer::EncodeOptions {
            add_special: true,
            parse_special: false,
        },
    );
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let parts = windows(&tokens, window, limit, bos).map_err(|_| PruneError::ShortText {
        tokens: tokens.len(),
        needed: 2 * window.max(4),
    })?;
    let named = model.host_matrices();
    let names = named
        .iter()
        .map(|(name, w)| (std::ptr::from_ref(*w).addr(), name.clone()))
        .collect();
    let listener = Arc::new(Listener {
        names,
        norms: Mutex::default(),
    });
    if !model.compute().observe(listener.clone()) {
        return Err(PruneError::Observed);
    }
    let options = ContextOptions {
        context: window,
        ..ContextOptions::default()
    };
    let mut ctx = Context::new(Arc::clone(&model), &options)?;
    for (done, tokens) in parts.iter().enumerate() {
        if progress(done, parts.len()).is_break() {
            return Err(PruneError::Cancelled);
        }
        ctx.truncate(0, 0)?;
        // Logits of all, so that the last layer sees all tokens, too.
        ctx.decode_hidden(&Batch::all_logits(0, tokens))?;
    }
    let norms = listener
        .norms
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    Ok(norms.clone())
}
