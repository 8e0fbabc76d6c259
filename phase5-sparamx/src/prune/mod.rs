//! The pruner: makes weights zero by their magnitude, or by that and the norms of their inputs
//! (Wanda), without retraining, and packs what is sparse enough.
//!
//! Rows are pruned by themselves, as Wanda does: a row loses the same share of its weights as
//! any other, and all strips take about the same time.
//!
//! Inputs are measured layer by layer: those of a layer are what the layers before it make of the
//! text once they are pruned, as Wanda's own program has it. Tensors are pruned one after the other.
//! All of that takes the memory of one layer. Finished tensors, and what goes into the layer in work,
//! wait in a directory beside the result, so that an interrupted run goes on where it was; the result
//! appears when it is complete.

mod calibrate;
mod mask;
mod work;

use std::{
    collections::HashMap,
    fs, io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use regex::Regex;
use serde::Serialize;
use tegula_engine::Model;
use tegula_gguf::{
    Bytes, GgmlType, Gguf, TensorInfo,
    sparse::{Pattern, dense_data, pack_tensor},
    writer::GgufWriter,
};
use tegula_kernels::{Pool, Weights};

pub use calibrate::{Calibration, Norms, read_norms};
use calibrate::{Layers, layer_of};
pub use mask::{Target, can_prune, prune_rows};
pub use work::leftovers;
use work::{Finished, Work};

/// Why a model was not pruned. Nothing is left at the result's place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PruneError {
    /// A share of zeros that can't be.
    #[error("sparsity {0} is out of range: it must be from 0 to less than 1")]
    Sparsity(f64),
    /// No tensor of the model is to be pruned.
    #[error("{0}")]
    Nothing(String),
    /// A tensor can't be pruned.
    #[error("tensor `{tensor}`: {what}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        what: String,
    },
    /// Too little text to measure inputs with.
    #[error(
        "the calibration text has {tokens} tokens and {needed} are needed: give a longer one, or shorter windows (-c)"
    )]
    ShortText {
        /// What there is.
        tokens: usize,
        /// What is needed.
        needed: usize,
    },
    /// The model is in use.
    #[error("the model is in use: inputs are measured in one that nobody else holds")]
    Observed,
    /// The caller ended the work. Finished tensors wait for the next run.
    #[error("cancelled; the same command goes on where this one was")]
    Cancelled,
    /// The operating system refused something.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is bad or can't be written.
    #[error(transparent)]
    Gguf(#[from] tegula_gguf::Error),
    /// The model can't run.
    #[error(transparent)]
    Engine(#[from] tegula_engine::Error),
}

type Result<T, E = PruneError> = std::result::Result<T, E>;

/// What to make of a model.
#[derive(Debug, Default)]
pub struct PruneOptions {
    /// Share of every row's weights that becomes zero, 0 to less than 1. With a pattern it has
    /// no meaning.
    pub sparsity: f64,
    /// A constant pattern instead.
    pub pattern: Option<Pattern>,
    /// Tensors whose name this is found in; otherwise the matrices of attention and of
    /// feed-forward networks.
    pub tensors: Option<Regex>,
    /// Wanda: root mean squares of each tensor's inputs, `[experts][k]`. Otherwise magnitudes
    /// alone decide.
    pub norms: Option<HashMap<String, Vec<f32>>>,
    /// All tensors keep their dense type.
    pub dense: bool,
    /// A tensor is packed sparse if that takes this share of its bytes away.
    pub least_saving: f64,
}

/// How far it is; sent before each tensor.
#[derive(Clone, Copy, Debug)]
pub struct PruneProgress<'a> {
    /// The tensor in work.
    pub tensor: &'a str,
    /// Bytes of the source that are done.
    pub done_bytes: u64,
    /// Bytes of all tensors of the source.
    pub total_bytes: u64,
}

/// What became of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Pruned {
    /// Tensors pruned.
    pub tensors: usize,
    /// Tensors taken over from an interrupted run.
    pub resumed: usize,
    /// Weights of the pruned tensors.
    pub weights: u64,
    /// Those of them that are zero.
    pub zeros: u64,
    /// Tensors packed sparse.
    pub packed: usize,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// True for the matrices that are pruned unless others are named.
pub fn usual(name: &str) -> bool {
    let part = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'));
    part.is_some_and(|(_, part)| {
        let stem = part.strip_suffix(".weight").unwrap_or("");
        let stem = stem.strip_suffix("_exps").unwrap_or(stem);
        matches!(
            stem,
            "attn_q" | "attn_k" | "attn_v" | "attn_output" | "ffn_gate" | "ffn_up" | "ffn_down"
        )
    })
}

type Progress<'a> = dyn FnMut(PruneProgress<'_>) -> ControlFlow<()> + 'a;

/// Prunes `model` into a file at `path`, which appears when it is complete; all processors take
/// part.
///
/// # Errors
/// [`PruneError`]. The file at `path` is then as before.
pub fn prune(
    model: &Gguf,
    path: &Path,
    options: &PruneOptions,
    progress: &mut Progress<'_>,
) -> Result<Pruned> {
    let wanted = check(model, options)?;
    if let Some(norms) = &options.norms {
        check_norms(model, &wanted, norms)?;
    }
    let work = Work::open(path, &fingerprint(model, options)?)?;
    let mut run = Run::new(model, options, work, wanted, progress);
    for (i, t) in model.tensors().iter().enumerate() {
        let norms = options.norms.as_ref().and_then(|n| n.get(&t.name));
        run.tensor(i, norms.map(Vec::as_slice))?;
    }
    run.assemble(path)
}

/// Prunes by Wanda in sequence: the norms of a layer's inputs are those of `text` behind the layers
/// before it as they are pruned. `loaded` is `model` on the CPU, best mapped and not repacked; nobody
/// else may hold it. Norms of the options don't count. Otherwise as [`prune`]; returns the norms, too.
///
/// # Errors
/// As [`prune`]; [`PruneError::ShortText`] when `text` has less than two windows.
pub fn prune_in_sequence(
    model: &Gguf,
    loaded: Arc<Model>,
    (text, how): (&str, &Calibration),
    path: &Path,
    options: &PruneOptions,
    progress: &mut Progress<'_>,
) -> Result<(Pruned, Norms)> {
    let wanted = check(model, options)?;
    let count = loaded.config().layers;
    let mut layers = Layers::new(loaded, text, how)?;
    let tensors = model.tensors();
    if let Some(i) = (0..tensors.len()).find(|&i| wanted[i] && !layers.measures(&tensors[i].name)) {
        return Err(no_norms(&tensors[i]));
    }
    let fingerprint = fingerprint(model, options)? + &layers.fingerprint();
    let work = Work::open(path, &fingerprint)?;
    let (next, mut norms) = layers.resume(work.dir());
    let mut run = Run::new(model, options, work, wanted, progress);
    // Behind the last layer that is pruned there is nothing to measure.
    let last = (0..tensors.len()).filter(|&i| run.wanted[i]);
    let last = last.filter_map(|i| layer_of(&tensors[i].name)).max();
    for layer in 0..count {
        let of: Vec<usize> = (0..tensors.len())
            .filter(|&i| layer_of(&tensors[i].name) == Some(layer))
            .collect();
        let pruned: Vec<usize> = of.iter().copied().filter(|&i| run.wanted[i]).collect();
        let ahead = last.is_some_and(|last| layer < last);
        if layer >= next && !pruned.is_empty() {
            norms = layers.measure(layer, &mut || run.beat(&format!("inputs of layer {layer}")))?;
        }
        for &i in &of {
            run.tensor(i, norms.of(&tensors[i].name).as_deref())?;
        }
        if layer >= next && ahead {
            let matrices = pruned.iter().map(|&i| run.matrix(i, layers.pool()));
            let matrices = matrices.collect::<Result<Vec<_>>>()?;
            layers.advance(layer, matrices, &mut || {
                run.beat(&format!("outputs of layer {layer}"))
            })?;
        }
        model.release();
    }
    for i in (0..tensors.len()).filter(|&i| layer_of(&tensors[i].name).is_none()) {
        run.tensor(i, None)?;
    }
    Ok((run.assemble(path)?, norms))
}

/// A run of the pruner.
struct Run<'a, 'p> {
    model: &'a Gguf,
    options: &'a PruneOptions,
    work: Work,
    wanted: Vec<bool>,
    finished: Vec<Option<Finished>>,
    pruned: Pruned,
    done_bytes: u64,
    progress: &'a mut Progress<'p>,
}

impl<'a, 'p> Run<'a, 'p> {
    fn new(
        model: &'a Gguf,
        options: &'a PruneOptions,
        work: Work,
        wanted: Vec<bool>,
        progress: &'a mut Progress<'p>,
    ) -> Run<'a, 'p> {
        Run {
            model,
            options,
            work,
            finished: wanted.iter().map(|_| None).collect(),
            wanted,
            pruned: Pruned {
                source_bytes: model.tensors().iter().map(|t| t.bytes).sum(),
                ..Pruned::default()
            },
            done_bytes: 0,
            progress,
        }
    }

    /// Says what is in work.
    fn beat(&mut self, what: &str) -> ControlFlow<()> {
        (self.progress)(PruneProgress {
            tensor: what,
            done_bytes: self.done_bytes,
            total_bytes: self.pruned.source_bytes,
        })
    }

    /// Prunes tensor `i`, if it is to be pruned and no earlier run has; `norms` are of its inputs.
    fn tensor(&mut self, i: usize, norms: Option<&[f32]>) -> Result<()> {
        let model = self.model;
        let t = &model.tensors()[i];
        if self.beat(&t.name).is_break() {
            return Err(PruneError::Cancelled);
        }
        if self.wanted[i] {
            let (done, resumed) = match self.work.finished(i)? {
                Some(done) => (done, true),
                None => {
                    let (ty, zeros, bytes) = prune_tensor(model, t, self.options, norms)?;
                    (self.work.finish(i, ty, zeros, &bytes)?, false)
                }
            };
            self.pruned.tensors += 1;
            self.pruned.resumed += usize::from(resumed);
            self.pruned.weights += t.elements();
            self.pruned.zeros += done.zeros;
            self.pruned.packed += usize::from(done.ty.is_sparse());
            self.finished[i] = Some(done);
            model.bytes(t).release();
        }
        self.done_bytes += t.bytes;
        Ok(())
    }

    /// The finished tensor `i` with its name, as the engine multiplies it.
    fn matrix(&self, i: usize, pool: &Pool) -> Result<(String, Weights)> {
        let t = &self.model.tensors()[i];
        let Some(done) = &self.finished[i] else {
            unreachable!("tensors are pruned before the text passes them");
        };
        let bytes = Bytes::from_vec(done.read()?);
        let extent = |i: usize| t.shape.get(i).map_or(1, |&n| n as usize);
        let (k, n, experts) = (extent(0), extent(1), extent(2));
        let weights = match done.ty.is_sparse() {
            true => Weights::sparse(done.ty, n, k, experts, bytes, pool),
            false => Weights::raw(done.ty, n, k, experts, bytes),
        };
        let weights = weights.map_err(|e| PruneError::Tensor {
            tensor: t.name.clone(),
            what: e.to_string(),
        })?;
        Ok((t.name.clone(), weights))
    }

    /// Puts finished tensors and those that stay together.
    fn assemble(mut self, path: &Path) -> Result<Pruned> {
        assemble(self.model, path, &self.finished, &mut self.pruned)?;
        self.work.remove()?;
        Ok(self.pruned)
    }
}

fn no_norms(t: &TensorInfo) -> PruneError {
    PruneError::Tensor {
        tensor: t.name.clone(),
        what: "the calibration has no norms of its inputs".into(),
    }
}

/// Refuses norms that are missing or of another shape.
fn check_norms(model: &Gguf, wanted: &[bool], norms: &HashMap<String, Vec<f32>>) -> Result<()> {
    for (t, _) in model.tensors().iter().zip(wanted).filter(|(_, w)| **w) {
        let need = t.row_len() * t.shape.get(2).copied().unwrap_or(1);
        let norms = norms.get(&t.name).ok_or_else(|| no_norms(t))?;
        if norms.len() as u64 != need {
            return Err(PruneError::Tensor {
                tensor: t.name.clone(),
                what: format!("{} norms of inputs, {need} needed", norms.len()),
            });
        }
    }
    Ok(())
}

/// Which tensors are to be pruned; refuses what can't be.
fn check(model: &Gguf, options: &PruneOptions) -> Result<Vec<bool>> {
    if options.pattern.is_none() && !(0.0..1.0).contains(&options.sparsity) {
        return Err(PruneError::Sparsity(options.sparsity));
    }
    let mut wanted = Vec::with_capacity(model.tensors().len());
    for t in model.tensors() {
        let chosen = match &options.tensors {
            Some(regex) => regex.is_match(&t.name) && matches!(t.shape.len(), 2 | 3),
            None => usual(&t.name),
        };
        wanted.push(chosen);
        if !chosen {
            continue;
        }
        let bad = |what: String| {
            Err(PruneError::Tensor {
                tensor: t.name.clone(),
                what,
            })
        };
        if !can_prune(t.ty) {
            return bad(format!(
                "{} has no zero that is exactly zero; prune a BF16, F16, Q8_0 or Q4_0 file and quantise it afterwards",
                t.ty
            ));
        }
        if let Some(p) = options.pattern
            && !t.row_len().is_multiple_of(p.m() as u64)
        {
            return bad(format!(
                "rows of {} are no multiple of {}",
                t.row_len(),
                p.m()
            ));
        }
    }
    if !wanted.contains(&true) {
        let all = match &options.tensors {
            Some(regex) => format!("no matrix has a name in which `{regex}` is found"),
            None => "the model has no matrices of attention or feed-forward networks".to_owned(),
        };
        return Err(PruneError::Nothing(all));
    }
    Ok(wanted)
}

/// Type, zeros and bytes of a pruned tensor.
fn prune_tensor(
    model: &Gguf,
    t: &TensorInfo,
    options: &PruneOptions,
    norms: Option<&[f32]>,
) -> Result<(GgmlType, u64, Vec<u8>)> {
    let ty = t.ty.dense();
    let k = t.row_len() as usize;
    let n = t.shape.get(1).copied().unwrap_or(1) as usize;
    let mut rows = dense_data(model, t)?.into_owned();
    let target = match options.pattern {
        Some(p) => Target::Pattern(p),
        None => Target::Sparsity(options.sparsity),
    };
    // A stack's experts have norms of their own.
    let factors = |row: usize| norms.map(|norms| &norms[row / n * k..][..k]);
    let zeros = prune_rows(ty, k, &mut rows, target, factors);
    let sparse = ty.sparse().filter(|_| !options.dense);
    if let Some(sparse) = sparse {
        let packed = pack_tensor(sparse, &t.shape, options.pattern, &rows).map_err(|e| {
            PruneError::Tensor {
                tensor: t.name.clone(),
                what: e.to_string(),
            }
        })?;
        if packed.len() as f64 <= rows.len() as f64 * (1.0 - options.least_saving) {
            return Ok((sparse, zeros, packed));
        }
    }
    Ok((ty, zeros, rows))
}

/// What decides the result, besides the program.
fn fingerprint(model: &Gguf, options: &PruneOptions) -> Result<String> {
    let mut out = format!(
        "sparsity {} pattern {:?} tensors {:?} dense {} saving {}\n",
        options.sparsity,
        options.pattern,
        options.tensors.as_ref().map(Regex::as_str),
        options.dense,
        options.least_saving
    );
    out += &sources(model)?;
    if let Some(norms) = &options.norms {
        let mut names: Vec<_> = norms.iter().collect();
        names.sort_by_key(|(name, _)| *name);
        let bytes = names.into_iter().flat_map(|(name, norms)| {
            let bits = norms.iter().flat_map(|x| x.to_le_bytes());
            name.bytes().chain(bits)
        });
        let hash = hash(bytes);
        out += &format!("norms {hash:016x}\n");
    }
    Ok(out)
}

/// The model's files: names, sizes, times of their last change.
fn sources(model: &Gguf) -> Result<String> {
    let mut out = String::new();
    for file in model.files() {
        let path = Path::new(&file.name);
        let changed = fs::metadata(path)
            .and_then(|m| m.modified())
            .map_err(|e| PruneError::io(path, "inspect", e))?;
        let changed = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (s, ns) = (changed.as_secs(), changed.subsec_nanos());
        out += &format!("{} {} {s}.{ns}\n", file.name, file.bytes);
    }
    Ok(out)
}

/// FNV-1a.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Writes the result, finished tensors and those that stay.
fn assemble(
    model: &Gguf,
    path: &Path,
    types: &[Option<Finished>],
    pruned: &mut Pruned,
) -> Result<()> {
    let mut metadata = model.metadata().clone();
    metadata.retain(|key| !key.starts_with("split."));
    let mut writer = GgufWriter::new(metadata);
    for (t, done) in model.tensors().iter().zip(types) {
        let (ty, bytes) = done.as_ref().map_or((t.ty, t.bytes), |d| (d.ty, d.bytes));
        match ty.is_sparse() {
            true => writer.add_sparse(&t.name, ty, &t.shape, bytes)?,
            false => writer.add_tensor(&t.name, ty, &t.shape)?,
        }
    }
    pruned.bytes = writer.file_bytes()?;
    let mut out = writer.create(path)?;
    for (t, done) in model.tensors().iter().zip(types) {
        match done {
            Some(done) => done.copy(&mut |part| Ok(out.write(part)?))?,
            None => out.write(model.data(t))?,
        }
    }
    out.finish()?;
    Ok(())
}

impl PruneError {
    fn io(path: &Path, action: &'static str, source: io::Error) -> PruneError {
        PruneError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }
}
