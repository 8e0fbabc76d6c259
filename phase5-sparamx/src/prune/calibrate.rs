//! Activation norms: what Wanda weighs weights by, measured by the engine itself.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    ops::ControlFlow,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tegula_engine::{Batch, Context, ContextOptions, Model, windows};
use tegula_gguf::{GgmlType, Gguf, Metadata, quantize::read_importance, writer::GgufWriter};
use tegula_kernels::{Weights, ops::Observer};

use super::{PruneError, hash, sources};

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

/// Metadata keys of norms that an interrupted measurement keeps: of which model and windows, and
/// how many of these are in it.
const KEPT_OF: &str = "tegula.norms.of";
const KEPT_WINDOWS: &str = "tegula.norms.windows";

impl Norms {
    /// Writes the sums as they are, `windows` of those that `of` names.
    fn keep(&self, path: &Path, of: &str, windows: usize) -> Result<(), PruneError> {
        let mut metadata = Metadata::default();
        metadata.set(KEPT_OF, of);
        metadata.set(KEPT_WINDOWS, windows as u32);
        let mut writer = GgufWriter::new(metadata);
        let mut data: Vec<Vec<u8>> = Vec::new();
        for (name, (sums, counts)) in &self.sums {
            let shape = [sums.len() as u64];
            writer.add_tensor(&format!("{name}.sums"), GgmlType::F64, &shape)?;
            data.push(sums.iter().flat_map(|s| s.to_le_bytes()).collect());
            let shape = [counts.len() as u64];
            writer.add_tensor(&format!("{name}.counts"), GgmlType::I64, &shape)?;
            data.push(counts.iter().flat_map(|n| n.to_le_bytes()).collect());
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| PruneError::io(dir, "create", e))?;
        }
        let mut out = writer.create(path)?;
        data.iter().try_for_each(|data| out.write(data))?;
        out.finish()?;
        Ok(())
    }

    /// What [`Norms::keep`] wrote for the same `of`, and how many windows are in it.
    fn kept(path: &Path, of: &str) -> Option<(Norms, usize)> {
        let file = Gguf::open(path).ok()?;
        let metadata = file.metadata();
        let same = metadata.get(KEPT_OF)?.as_str() == Some(of);
        let windows = metadata.get(KEPT_WINDOWS)?.as_int().filter(|_| same)?;
        let mut norms = Norms::default();
        for t in file.tensors() {
            let Some(name) = t.name.strip_suffix(".sums") else {
                continue;
            };
            let counts = file.require_tensor(&format!("{name}.counts")).ok()?;
            let eights = |t| file.data(t).as_chunks::<8>().0.iter();
            let sums: Vec<f64> = eights(t).map(|b| f64::from_le_bytes(*b)).collect();
            let counts: Vec<u64> = eights(counts).map(|b| u64::from_le_bytes(*b)).collect();
            if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
                return None;
            }
            norms.sums.insert(name.to_owned(), (sums, counts));
        }
        Some((norms, usize::try_from(windows).ok()?))
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

/// Adds up squares while a model runs, and gives back the pages of a mapped layer when the next
/// one begins.
struct Listener {
    /// The tensor of a matrix, by its address in the model.
    names: HashMap<usize, String>,
    model: Weak<Model>,
    heard: Mutex<Heard>,
}

#[derive(Default)]
struct Heard {
    norms: Norms,
    /// What the names of the tensors of the layer begin with that runs.
    layer: String,
}

impl Listener {
    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back the pages of the tensors whose names begin so.
    fn release(&self, layer: &str) {
        let Some(model) = self.model.upgrade().filter(|_| !layer.is_empty()) else {
            return;
        };
        let file = model.gguf();
        for t in file.tensors().iter().filter(|t| t.name.starts_with(layer)) {
            file.bytes(t).release();
        }
    }
}

/// `blk.7.` of `blk.7.attn_q.weight`.
fn layer_of(name: &str) -> Option<&str> {
    let number = name.strip_prefix("blk.")?.find('.')?;
    Some(&name[..number + "blk..".len()])
}

impl Observer for Listener {
    fn product(&self, weights: &Weights, expert: usize, x: &[f32]) {
        let Some(name) = self.names.get(&std::ptr::from_ref(weights).addr()) else {
            return;
        };
        let (k, experts) = (weights.k(), weights.experts());
        let mut heard = self.heard();
        if let Some(layer) = layer_of(name).filter(|layer| *layer != heard.layer) {
            let before = std::mem::replace(&mut heard.layer, layer.to_owned());
            self.release(&before);
        }
        let (sums, counts) = heard
            .norms
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

/// How a text is run through a model.
#[derive(Clone, Copy, Debug)]
pub struct Calibration<'a> {
    /// Tokens of a window.
    pub window: usize,
    /// Windows at most; 0: all.
    pub limit: usize,
    /// Tokens, of whole windows, that go through a layer before the next layer begins.
    pub together: usize,
    /// Where an interrupted measurement is kept. The same call goes on with it.
    pub kept: Option<&'a Path>,
}

impl Default for Calibration<'_> {
    fn default() -> Self {
        Calibration {
            window: 512,
            limit: 0,
            together: 4096,
            kept: None,
        }
    }
}

/// Runs `text` through the model and returns the norms of all inputs of its matrices. Experts
/// count the tokens that are theirs. The model must lie on the CPU, and no other must have been
/// observed in it.
///
/// Layers run one after the other, each for many windows. Of a model whose weights are mapped and
/// not repacked each one's pages are given back behind it: the memory of one layer is enough,
/// beside what the windows take, and the file is read once for every [`Calibration::together`].
///
/// # Errors
/// [`PruneError::ShortText`] when there are less than two windows, [`PruneError::Cancelled`]
/// after a break, or when the model can't run or the norms can't be kept.
pub fn calibrate(
    model: Arc<Model>,
    text: &str,
    how: &Calibration<'_>,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Norms, PruneError> {
    let window = how.window;
    let tokenizer = model.tokenizer();
    let tokens = tokenizer.encode(
        text,
        tegula_gguf::tokenizer::EncodeOptions {
            add_special: true,
            parse_special: false,
        },
    );
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let parts = windows(&tokens, window, how.limit, bos).map_err(|_| PruneError::ShortText {
        tokens: tokens.len(),
        needed: 2 * window.max(4),
    })?;
    let pass = (how.together / window).clamp(1, parts.len());
    let mut done = 0;
    let mut heard = Heard::default();
    let mut of = String::new();
    if let Some(path) = how.kept {
        let ids = parts.iter().flatten().flat_map(|id| id.to_le_bytes());
        of = format!(
            "{}windows of {window} tokens, {pass} together, {:016x}",
            sources(model.gguf())?,
            hash(ids)
        );
        if let Some((norms, windows)) = Norms::kept(path, &of).filter(|k| k.1 <= parts.len()) {
            (heard.norms, done) = (norms, windows);
        }
    }
    let named = model.host_matrices();
    let names = named
        .iter()
        .map(|(name, w)| (std::ptr::from_ref(*w).addr(), name.clone()))
        .collect();
    let listener = Arc::new(Listener {
        names,
        model: Arc::downgrade(&model),
        heard: Mutex::new(heard),
    });
    if !model.compute().observe(listener.clone()) {
        return Err(PruneError::Observed);
    }
    let options = ContextOptions {
        context: window,
        batch: pass * window,
        // A window that is longer runs in parts.
        ubatch: (pass * window).min(how.together.max(1)),
        sequences: pass,
        ..ContextOptions::default()
    };
    let mut ctx = Context::new(Arc::clone(&model), &options)?;
    while done < parts.len() {
        if progress(done, parts.len()).is_break() {
            return Err(PruneError::Cancelled);
        }
        let together = &parts[done..parts.len().min(done + pass)];
        let mut batch = Batch::default();
        for (sequence, ids) in together.iter().enumerate() {
            ctx.truncate(sequence, 0)?;
            // Logits of all, so that the last layer sees all tokens, too.
            batch.tokens.extend(Batch::all_logits(sequence, ids).tokens);
        }
        ctx.decode_hidden(&batch)?;
        done += together.len();
        if let Some(path) = how.kept {
            listener.heard().norms.keep(path, &of, done)?;
        }
    }
    let norms = std::mem::take(&mut listener.heard().norms);
    Ok(norms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_told_apart() {
        assert_eq!(layer_of("blk.1.attn_q.weight"), Some("blk.1."));
        assert_eq!(layer_of("blk.12.ffn_up.weight"), Some("blk.12."));
        assert_eq!(layer_of("output.weight"), None);
        assert_eq!(layer_of("blk.1"), None);
    }
}
