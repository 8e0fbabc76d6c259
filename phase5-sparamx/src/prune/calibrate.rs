//! Activation norms: what Wanda weighs weights by, measured by the engine itself, layer by layer.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{BufReader, BufWriter, Read as _, Write as _},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tegula_engine::{Batch, Context, ContextOptions, Model, windows};
use tegula_gguf::{GgmlType, Gguf, Metadata, quantize::read_importance, writer::GgufWriter};
use tegula_kernels::{Pool, Weights, ops::Observer};

use super::{PruneError, Result, hash};

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
    pub fn save(&self, path: &Path) -> Result<()> {
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

impl Norms {
    /// Writes the sums as they are.
    fn keep(&self, path: &Path) -> Result<()> {
        let mut writer = GgufWriter::new(Metadata::default());
        let mut data: Vec<Vec<u8>> = Vec::new();
        for (name, (sums, counts)) in &self.sums {
            let shape = [sums.len() as u64];
            writer.add_tensor(&format!("{name}.sums"), GgmlType::F64, &shape)?;
            data.push(sums.iter().flat_map(|s| s.to_le_bytes()).collect());
            let shape = [counts.len() as u64];
            writer.add_tensor(&format!("{name}.counts"), GgmlType::I64, &shape)?;
            data.push(counts.iter().flat_map(|n| n.to_le_bytes()).collect());
        }
        let mut out = writer.create(path)?;
        data.iter().try_for_each(|data| out.write(data))?;
        out.finish()?;
        Ok(())
    }

    /// What [`Norms::keep`] wrote.
    fn kept(path: &Path) -> Option<Norms> {
        let file = Gguf::open(path).ok()?;
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
        Some(norms)
    }
}

/// Root mean squares by tensor, read from a file of `llama-imatrix` or of [`Norms::save`].
///
/// # Errors
/// When the file holds none, or wrong ones.
pub fn read_norms(file: &Gguf) -> Result<HashMap<String, Vec<f32>>> {
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
    /// Whether it listens now.
    on: AtomicBool,
    heard: Mutex<Norms>,
}

impl Listener {
    fn heard(&self) -> std::sync::MutexGuard<'_, Norms> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The layer of `blk.7.attn_q.weight`.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    let (number, _) = name.strip_prefix("blk.")?.split_once('.')?;
    number.parse().ok()
}

impl Observer for Listener {
    fn product(&self, weights: &Weights, expert: usize, x: &[f32]) {
        let Some(name) = self.names.get(&std::ptr::from_ref(weights).addr()) else {
            return;
        };
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let (k, experts) = (weights.k(), weights.experts());
        let mut heard = self.heard();
        let (sums, counts) = heard
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
pub struct Calibration {
    /// Tokens of a window.
    pub window: usize,
    /// Windows at most; 0: all.
    pub limit: usize,
    /// Tokens, of whole windows, that are in memory together.
    pub together: usize,
}

impl Default for Calibration {
    fn default() -> Self {
        Calibration {
            window: 512,
            limit: 0,
            together: 4096,
        }
    }
}

/// A text on its way through the layers of a model, one layer after the other. What goes into a
/// layer is in a file, so that memory has to have one layer and the tokens that run together, of
/// whatever text; and so that an interrupted run goes on with the layer where it was.
pub(super) struct Layers {
    model: Arc<Model>,
    listener: Arc<Listener>,
    windows: Vec<Vec<u32>>,
    options: ContextOptions,
    /// Where files are kept.
    dir: PathBuf,
}

/// Called before each part of the text.
pub(super) type Beat<'a> = dyn FnMut() -> ControlFlow<()> + 'a;

impl Layers {
    /// The windows of `text`, before the first layer.
    ///
    /// # Errors
    /// [`PruneError::ShortText`] when there are less than two windows, [`PruneError::Observed`] for
    /// a model that is observed already or that others hold.
    pub fn new(mut model: Arc<Model>, text: &str, how: &Calibration) -> Result<Layers> {
        if Arc::get_mut(&mut model).is_none() {
            return Err(PruneError::Observed);
        }
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
        let windows =
            windows(&tokens, window, how.limit, bos).map_err(|_| PruneError::ShortText {
                tokens: tokens.len(),
                needed: 2 * window.max(4),
            })?;
        let pass = (how.together / window).clamp(1, windows.len());
        let options = ContextOptions {
            context: window,
            batch: pass * window,
            // A window that is longer runs in parts.
            ubatch: (pass * window).min(how.together.max(1)),
            sequences: pass,
            ..ContextOptions::default()
        };
        let named = model.host_matrices();
        let names = named
            .iter()
            .map(|(name, w)| (std::ptr::from_ref(*w).addr(), name.clone()))
            .collect();
        let listener = Arc::new(Listener {
            names,
            on: AtomicBool::new(false),
            heard: Mutex::default(),
        });
        if !model.compute().observe(listener.clone()) {
            return Err(PruneError::Observed);
        }
        Ok(Layers {
            model,
            listener,
            windows,
            options,
            dir: PathBuf::new(),
        })
    }

    /// The model's threads.
    pub fn pool(&self) -> &Pool {
        &self.model.compute().pool
    }

    /// What decides the norms, besides the model.
    pub fn fingerprint(&self) -> String {
        let ids = self.windows.iter().flatten();
        let hash = hash(ids.flat_map(|id| id.to_le_bytes()));
        let (window, pass) = (self.options.context, self.options.sequences);
        format!("inputs of windows of {window} tokens, {pass} together, {hash:016x}\n")
    }

    /// Whether a matrix's inputs can be measured.
    pub fn measures(&self, tensor: &str) -> bool {
        layer_of(tensor).is_some() && self.listener.names.values().any(|name| name == tensor)
    }

    /// Goes on with what is kept in `dir`; returns the layer that comes next, and the norms of those
    /// before it.
    pub fn resume(&mut self, dir: &Path) -> (usize, Norms) {
        self.dir = dir.to_owned();
        let embd = self.model.config().embd;
        let tokens: usize = self.windows.iter().map(Vec::len).sum();
        let whole = |layer: &usize| {
            let bytes = fs::metadata(self.inputs(*layer)).map(|m| m.len());
            bytes.is_ok_and(|bytes| bytes == (4 * embd * tokens) as u64)
        };
        let next = (1..self.model.config().layers).rev().find(whole);
        let (layer, norms) = next.zip(Norms::kept(&self.norms())).unwrap_or_default();
        *self.listener.heard() = norms.clone();
        (layer, norms)
    }

    fn norms(&self) -> PathBuf {
        self.dir.join("norms.gguf")
    }

    /// The file of what goes into a layer but the first.
    fn inputs(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("inputs-{layer}.bin"))
    }

    /// The norms of what meets the matrices of a layer as they are, and of those before it.
    pub fn measure(&mut self, layer: usize, beat: &mut Beat<'_>) -> Result<Norms> {
        let of = |name: &String| layer_of(name) == Some(layer);
        // An interrupted run may have kept some.
        self.listener.heard().sums.retain(|name, _| !of(name));
        self.listener.on.store(true, Ordering::Relaxed);
        let run = self.run(layer, None, beat);
        self.listener.on.store(false, Ordering::Relaxed);
        run?;
        Ok(self.listener.heard().clone())
    }

    /// Brings the text through a layer with `pruned` matrices in place of the model's own, which
    /// are back afterwards.
    pub fn advance(
        &mut self,
        layer: usize,
        pruned: Vec<(String, Weights)>,
        beat: &mut Beat<'_>,
    ) -> Result<()> {
        let own = self.exchange(pruned)?;
        let next = self.inputs(layer + 1);
        let temporary = next.with_extension("tmp");
        let run = self.run(layer, Some(&temporary), beat);
        self.exchange(own)?;
        run?;
        // The embedding, too, has been read by then.
        self.model.gguf().release();
        // What is kept of this layer first: norms that are there twice are measured again.
        self.listener.heard().keep(&self.norms())?;
        fs::rename(&temporary, &next).map_err(|e| PruneError::io(&next, "write", e))?;
        let _ = fs::remove_file(self.inputs(layer));
        Ok(())
    }

    /// Puts matrices in their places and returns those that were there.
    fn exchange(&mut self, matrices: Vec<(String, Weights)>) -> Result<Vec<(String, Weights)>> {
        let model = Arc::get_mut(&mut self.model).ok_or(PruneError::Observed)?;
        let mut exchanged = Vec::new();
        for (name, mut weights) in matrices {
            let Some(place) = model.host_matrix_mut(&name) else {
                continue;
            };
            // What products are multiplied by is no part of a tensor's bytes.
            if !place.factors().is_empty() {
                let scaled = weights.scale_by(place.factors().to_vec());
                scaled.map_err(|e| PruneError::Tensor {
                    tensor: name.clone(),
                    what: e.to_string(),
                })?;
            }
            exchanged.push((name, std::mem::replace(place, weights)));
        }
        Ok(exchanged)
    }

    /// Runs a layer for all windows; what comes out goes to the file `out`, if there is one.
    fn run(&self, layer: usize, out: Option<&Path>, beat: &mut Beat<'_>) -> Result<()> {
        let embd = self.model.config().embd;
        let from = (layer > 0).then(|| self.inputs(layer));
        let open = |path: &PathBuf| File::open(path).map_err(|e| PruneError::io(path, "read", e));
        let mut from = match &from {
            Some(path) => Some((path, BufReader::new(open(path)?))),
            None => None,
        };
        let mut out = match out {
            Some(path) => {
                let file = File::create(path).map_err(|e| PruneError::io(path, "write", e))?;
                Some((path, BufWriter::new(file)))
            }
            None => None,
        };
        let mut ctx = Context::new(Arc::clone(&self.model), &self.options)?;
        let mut bytes = Vec::new();
        for together in self.windows.chunks(self.options.sequences) {
            if beat().is_break() {
                return Err(PruneError::Cancelled);
            }
            let mut batch = Batch::default();
            for (sequence, ids) in together.iter().enumerate() {
                ctx.truncate(sequence, 0)?;
                // Logits of all, so that the last layer sees all tokens, too.
                batch.tokens.extend(Batch::all_logits(sequence, ids).tokens);
            }
            let mut x = match &mut from {
                None => self.model.embed(&together.concat()),
                Some((path, file)) => {
                    bytes.resize(4 * embd * batch.tokens.len(), 0);
                    let read = file.read_exact(&mut bytes);
                    read.map_err(|e| PruneError::io(path, "read", e))?;
                    let floats = bytes.as_chunks::<4>().0.iter();
                    floats.map(|b| f32::from_le_bytes(*b)).collect()
                }
            };
            ctx.run_layer(layer, &batch, &mut x)?;
            if let Some((path, file)) = &mut out {
                bytes.clear();
                bytes.extend(x.iter().flat_map(|x| x.to_le_bytes()));
                let written = file.write_all(&bytes);
                written.map_err(|e| PruneError::io(path, "write", e))?;
            }
        }
        if let Some((path, file)) = out {
            let file = file.into_inner().map_err(|e| e.into_error());
            let synced = file.and_then(|file| file.sync_all());
            synced.map_err(|e| PruneError::io(path, "write", e))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_told_apart() {
        assert_eq!(layer_of("blk.1.attn_q.weight"), Some(1));
        assert_eq!(layer_of("blk.12.ffn_up.weight"), Some(12));
        assert_eq!(layer_of("output.weight"), None);
        assert_eq!(layer_of("blk.1"), None);
    }
}
