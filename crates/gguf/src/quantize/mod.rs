//! Quantising whole files: what `tegula quantize` does.

mod choose;
mod file_type;
mod importance;

use std::{ops::ControlFlow, path::Path};

use rayon::prelude::*;
use regex::Regex;

pub use choose::{Choice, choose, parse_tensor_type};
pub use file_type::{FileType, UnknownFileType};
pub use importance::{Importance, read_importance};

use crate::{Error, GgmlType, Gguf, TensorInfo, blocks, error::Result, writer::GgufWriter};

/// `general.quantization_version` of the block formats that this crate writes.
const QUANTIZATION_VERSION: u32 = 2;

/// Weights that are quantised between two writes, about: bounds memory.
const SLAB: u64 = 16 << 20;

/// Weights that one task takes, about.
const TASK: u64 = 32 << 10;

/// What to make of a model.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// The mix.
    pub file_type: FileType,
    /// All tensors that are quantised get the base type, without the mix's rules.
    pub pure: bool,
    /// Types for tensors whose name the expression is found in; the first match counts.
    /// See [`parse_tensor_type`].
    pub tensor_types: Vec<(Regex, GgmlType)>,
    /// The type of `output.weight`, or of the token embedding where it serves as output.
    pub output_tensor_type: Option<GgmlType>,
    /// The type of the token embedding.
    pub token_embedding_type: Option<GgmlType>,
    /// `output.weight` stays as it is.
    pub leave_output_tensor: bool,
    /// Tensors that are quantised already may be quantised again, at a loss.
    pub allow_requantize: bool,
    /// How much each input column's errors count; see [`read_importance`].
    pub importance: Option<Importance>,
}

impl QuantizeOptions {
    /// Nothing special.
    pub fn new(file_type: FileType) -> QuantizeOptions {
        QuantizeOptions {
            file_type,
            pure: false,
            tensor_types: Vec::new(),
            output_tensor_type: None,
            token_embedding_type: None,
            leave_output_tensor: false,
            allow_requantize: false,
            importance: None,
        }
    }
}

/// How far it is. Sent before each tensor and after each part of one.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor in work.
    pub tensor: &'a TensorInfo,
    /// The type that it gets.
    pub choice: Choice,
    /// Its number, from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// Bytes of the source that are done.
    pub done_bytes: u64,
    /// Bytes of all tensors of the source.
    pub total_bytes: u64,
}

/// What became of a model.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The choice for each tensor, in the model's order.
    pub choices: Vec<Choice>,
    /// Bytes of tensor data before and after.
    pub source_bytes: u64,
    /// Bytes of tensor data after.
    pub target_bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl Quantized {
    /// How many tensors got another type since their rows don't fit the type meant.
    pub fn fallbacks(&self) -> usize {
        self.choices
            .iter()
            .filter(|c| c.instead_of.is_some())
            .count()
    }
}

/// Quantises `model` into a file at `path`, which appears when it is complete; all processors
/// take part. Metadata are kept, but for the file type and a split.
///
/// `progress` ends the work by [`ControlFlow::Break`].
///
/// # Errors
/// [`Error::Cancelled`] after a break; [`Error::Unsupported`] for a type that can't be
/// written; [`Error::Tensor`] for weights that can't be quantised (not finite, or already
/// quantised without `allow_requantize`); [`Error::Io`] when the file can't be written.
/// Nothing is left behind then.
pub fn quantize(
    model: &Gguf,
    path: impl AsRef<Path>,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Quantized> {
    let path = path.as_ref();
    let choices = choose(model.metadata(), model.tensors(), options)?;
    let mut metadata = model.metadata().clone();
    metadata.retain(|key| !key.starts_with("split."));
    metadata.set("general.quantization_version", QUANTIZATION_VERSION);
    metadata.set("general.file_type", options.file_type.id());
    let mut writer = GgufWriter::new(metadata);
    for (t, choice) in model.tensors().iter().zip(&choices) {
        check(model, t, choice.ty, options)?;
        writer.add_tensor(&t.name, choice.ty, &t.shape)?;
    }
    let source_bytes = model.tensors().iter().map(|t| t.bytes).sum();
    let target_bytes = writer.tensors().iter().map(|t| t.bytes).sum();
    let file_bytes = writer.file_bytes()?;

    let mut out = writer.create(path)?;
    let mut buffer = Vec::new();
    let mut done_bytes = 0;
    for (index, (t, &choice)) in model.tensors().iter().zip(&choices).enumerate() {
        let mut report = |done_bytes| {
            let count = choices.len();
            let total_bytes = source_bytes;
            match progress(Progress {
                tensor: t,
                choice,
                index,
                count,
                done_bytes,
                total_bytes,
            }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(Error::Cancelled {
                    path: path.to_owned(),
                }),
            }
        };
        report(done_bytes)?;
        let source = model.bytes(t);
        if choice.ty == t.ty {
            // In parts, so that a break is heeded.
            for part in source.chunks(SLAB as usize) {
                out.write(part)?;
                done_bytes += part.len() as u64;
                report(done_bytes)?;
            }
        } else {
            let importance = options.importance.as_ref().and_then(|m| m.get(&t.name));
            let work = Work {
                model,
                t,
                ty: choice.ty,
                importance: importance.map(Vec::as_slice),
            };
            let slab_rows = (SLAB / t.row_len()).max(1);
            let mut row = 0;
            while row < t.rows() {
                let rows = slab_rows.min(t.rows() - row);
                work.run(&source, row, rows, &mut buffer)?;
                out.write(&buffer)?;
                row += rows;
                done_bytes += rows * t.row_bytes();
                report(done_bytes)?;
            }
        }
        source.release();
    }
    out.finish()?;
    Ok(Quantized {
        choices,
        source_bytes,
        target_bytes,
        file_bytes,
    })
}

/// Refuses what can't be done before anything is written.
fn check(model: &Gguf, t: &TensorInfo, ty: GgmlType, options: &QuantizeOptions) -> Result<()> {
    let fail = |what: String| Err(Error::tensor(model.metadata().origin(), &t.name, what));
    if ty == t.ty {
        return Ok(());
    }
    if !blocks::can_quantize(ty) {
        return Err(Error::Unsupported(format!(
            "tensor `{}` can't be quantised to {ty}, which can only be read; file types that can be written: {}",
            t.name,
            FileType::writable_names()
        )));
    }
    if t.ty.is_quantized() && !options.allow_requantize {
        return fail(format!(
            "is {} already; quantising it to {ty} would lose more (allow it with --allow-requantize)",
            t.ty
        ));
    }
    let factors = options.importance.as_ref().and_then(|m| m.get(&t.name));
    let experts = t.shape.get(2).copied().unwrap_or(1);
    if let Some(n) = factors
        .map(|f| f.len() as u64)
        .filter(|&n| n != t.row_len() * experts)
    {
        return fail(format!(
            "{n} importance factors, {} needed",
            t.row_len() * experts
        ));
    }
    Ok(())
}

/// One tensor to be converted.
struct Work<'a> {
    model: &'a Gguf,
    t: &'a TensorInfo,
    ty: GgmlType,
    importance: Option<&'a [f32]>,
}

impl Work<'_> {
    /// Converts `rows` rows from `first` on into `out`.
    fn run(&self, source: &[u8], first: u64, rows: u64, out: &mut Vec<u8>) -> Result<()> {
        // All of these describe data in memory, so they fit a usize.
        let len = self.t.row_len() as usize;
        let from_bytes = self.t.row_bytes() as usize;
        let to_bytes = len / self.ty.block_len() * self.ty.block_bytes();
        let task_rows = (TASK / self.t.row_len()).max(1) as usize;
        let experts_rows = self.t.shape.get(1).copied().unwrap_or(1);
        let source = &source[first as usize * from_bytes..][..rows as usize * from_bytes];
        out.clear();
        out.resize(rows as usize * to_bytes, 0);
        out.par_chunks_mut(to_bytes * task_rows)
            .zip(source.par_chunks(from_bytes * task_rows))
            .enumerate()
            .try_for_each_init(
                || vec![0.0; len],
                |weights, (task, (to, from))| {
                    let pairs = to
                        .chunks_exact_mut(to_bytes)
                        .zip(from.chunks_exact(from_bytes));
                    for (i, (to, from)) in pairs.enumerate() {
                        let row = first + (task * task_rows + i) as u64;
                        let importance = self.importance.map(|f| {
                            let expert = (row / experts_rows) as usize;
                            // Checked to be there for every expert; a fourth dimension starts over.
                            &f[expert * len % f.len()..][..len]
                        });
                        blocks::dequantize(self.t.ty, from, weights)
                            .and_then(|()| blocks::quantize(self.ty, weights, importance, to))
                            .map_err(|e| self.error(row, &e))?;
                    }
                    Ok(())
                },
            )
    }

    fn error(&self, row: u64, e: &blocks::BlockError) -> Error {
        Error::tensor(
            self.model.metadata().origin(),
            &self.t.name,
            format!("row {row}: {e}"),
        )
    }
}
