//! Whole files: dense tensors to sparse ones and back.

use std::{
    borrow::Cow,
    ops::{ControlFlow, Range},
    path::Path,
};

use rayon::prelude::*;

use super::{Header, Pattern, ROWS, Sparse, SparseError, pack_strip, packed_strip, unpack_strip};
use crate::{Error, GgmlType, Gguf, TensorInfo, error::Result, writer::GgufWriter};

/// Bytes of dense rows that are packed between two writes, about: bounds memory.
const SLAB: usize = 32 << 20;

/// What [`sparsify`] packs.
pub struct Sparsify<'a> {
    /// The tensors in question: called for those of a type that has a sparse twin, with two or
    /// three dimensions.
    pub wanted: &'a (dyn Fn(&TensorInfo) -> bool + Sync),
    /// A tensor is packed if that takes this share of its bytes away, 0.1 for instance.
    pub least_saving: f64,
    /// Stores a constant number of values: tensors that do not fit are packed without.
    pub pattern: Option<Pattern>,
}

/// How far it is. Sent before each tensor and after each part of one.
#[derive(Clone, Copy, Debug)]
pub struct SparseProgress<'a> {
    /// The tensor in work.
    pub tensor: &'a TensorInfo,
    /// Bytes of the source that are done; both passes over a tensor count half of it.
    pub done_bytes: u64,
    /// Bytes of all tensors of the source.
    pub total_bytes: u64,
}

/// What became of a model.
#[derive(Clone, Debug, Default)]
pub struct Converted {
    /// Tensors that changed their type.
    pub tensors: usize,
    /// Tensors in question that stayed as they are: too little would be gained.
    pub kept: usize,
    /// Bytes of tensor data before.
    pub source_bytes: u64,
    /// Bytes of tensor data after.
    pub target_bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

type Report<'a> = dyn FnMut(SparseProgress<'_>) -> ControlFlow<()> + 'a;

/// The plan for one tensor.
enum Plan {
    Copy,
    Pack { header: Header, lengths: Vec<usize> },
    Unpack(GgmlType),
}

/// Packs zero-heavy dense tensors of `model` into a file at `path`, which appears when it is
/// complete; all processors take part. All else is kept.
///
/// # Errors
/// [`Error::Cancelled`] after `progress` breaks, [`Error::Io`] when the file can't be written,
/// [`Error::Tensor`] for a tensor that is too large. Nothing is left behind then.
pub fn sparsify(
    model: &Gguf,
    path: impl AsRef<Path>,
    options: &Sparsify<'_>,
    progress: &mut Report<'_>,
) -> Result<Converted> {
    let plan = |t: &TensorInfo| -> Result<(Plan, bool)> {
        let fail =
            |e: SparseError| Error::tensor(model.metadata().origin(), &t.name, e.to_string());
        let Some(ty) = t.ty.sparse().filter(|_| !t.ty.is_sparse()) else {
            return Ok((Plan::Copy, false));
        };
        if !matches!(t.shape.len(), 2 | 3) || !(options.wanted)(t) {
            return Ok((Plan::Copy, false));
        }
        let fits = options
            .pattern
            .filter(|p| t.row_len().is_multiple_of(p.m() as u64));
        let header = Header::new(ty, &t.shape, fits).map_err(fail)?;
        let packed = match measure(&header, model.data(t)) {
            Err(SparseError::Pattern { .. }) => measure(
                &Header {
                    pattern: None,
                    ..header
                },
                model.data(t),
            ),
            other => other,
        };
        let (header, lengths) = packed.map_err(fail)?;
        let bytes = tensor_bytes(&header, &lengths);
        if bytes as f64 > t.bytes as f64 * (1.0 - options.least_saving) {
            return Ok((Plan::Copy, true));
        }
        Ok((Plan::Pack { header, lengths }, false))
    };
    convert(model, path.as_ref(), &plan, progress)
}

/// Writes a model with all its sparse tensors unpacked: the dense file, bit for bit, that they
/// were packed from. Otherwise as [`sparsify`].
///
/// # Errors
/// As [`sparsify`]; [`Error::Tensor`] for a sparse tensor that contradicts itself.
pub fn densify(
    model: &Gguf,
    path: impl AsRef<Path>,
    progress: &mut Report<'_>,
) -> Result<Converted> {
    let plan = |t: &TensorInfo| {
        Ok(match t.ty.is_sparse() {
            true => (Plan::Unpack(t.ty.dense()), false),
            false => (Plan::Copy, false),
        })
    };
    convert(model, path.as_ref(), &plan, progress)
}

/// Packs the dense rows of a whole tensor of `shape` (ggml's order); `ty` is the sparse type.
///
/// # Errors
/// [`SparseError::Shape`] for a tensor that can't be sparse, [`SparseError::Pattern`] for rows
/// with more values than the pattern allows.
pub fn pack_tensor(
    ty: GgmlType,
    shape: &[u64],
    pattern: Option<Pattern>,
    rows: &[u8],
) -> Result<Vec<u8>, SparseError> {
    let mut header = Header::new(ty, shape, pattern)?;
    let want = ty
        .dense()
        .bytes_for(shape.iter().product())
        .filter(|&b| b == rows.len() as u64);
    if want.is_none() {
        let what = format!("{} bytes are not {} of {shape:?}", rows.len(), ty.dense());
        return Err(SparseError::Shape(what));
    }
    let strips: Vec<(Vec<u8>, u64)> = (0..header.strips())
        .into_par_iter()
        .map(|s| {
            let mut strip = Vec::new();
            let rows = dense_rows(&header, rows, s);
            let values = pack_strip(ty, header.k, &rows, pattern, &mut strip)?;
            Ok((strip, values))
        })
        .collect::<Result<_, SparseError>>()?;
    header.values = strips.iter().map(|s| s.1).sum();
    let lengths: Vec<usize> = strips.iter().map(|s| s.0.len()).collect();
    let mut out = header.encode(&lengths)?;
    out.extend(strips.iter().flat_map(|s| &s.0));
    out.extend([0; super::ALIGN]);
    Ok(out)
}

/// What a dense tensor would be without its zeros.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Worth {
    /// Share of its weights that are zero.
    pub zeros: f64,
    /// Bytes as a sparse tensor.
    pub bytes: u64,
}

/// Places of a tensor that are looked at first, then more of them, before all of it is.
const LOOKS: [usize; 2] = [2, 32];
/// Bytes of each.
const LOOK: usize = 2048;

/// Whether a dense tensor's bytes fall by the share `least_saving` if it is packed, and to how
/// many. Most tensors are known by a few thousand of their weights not to be worth it; only one
/// that may be is counted as a whole, by all processors.
///
/// # Errors
/// [`SparseError::Shape`] for a tensor that can't be sparse.
pub fn worth(
    ty: GgmlType,
    shape: &[u64],
    data: &[u8],
    least_saving: f64,
) -> Result<Option<Worth>, SparseError> {
    let (Some(sparse), false) = (ty.sparse(), ty.is_sparse()) else {
        return Ok(None);
    };
    let header = Header::new(sparse, shape, None)?;
    let weights = shape.iter().product::<u64>() as f64;
    // The values that may stay, were all of them in place.
    let heads = super::head_bytes(sparse) as f64 / (super::GROUP * ROWS) as f64;
    let value = match sparse {
        GgmlType::S_BF16 => 2.0,
        GgmlType::S8 => 1.0,
        _ => 0.5,
    };
    let dense = data.len() as f64 / weights;
    let needed = 1.0 - (dense * (1.0 - least_saving) - heads) / value;
    for (looks, share) in LOOKS.into_iter().zip([0.5, 0.9]) {
        let block = ty.block_bytes();
        let blocks = (LOOK / block).min(data.len() / block);
        let last = data.len() / block - blocks;
        let places = (0..looks).map(|i| i * last / (looks - 1) * block);
        let (zeros, seen) = places
            .map(|at| count_zeros(ty, &data[at..at + blocks * block]))
            .fold((0, 0), |(a, b), (zeros, seen)| (a + zeros, b + seen));
        if (zeros as f64) < share * needed * seen as f64 {
            return Ok(None);
        }
    }
    let (header, lengths) = measure(&header, data)?;
    let bytes = tensor_bytes(&header, &lengths);
    let worth = bytes as f64 <= data.len() as f64 * (1.0 - least_saving);
    Ok(worth.then_some(Worth {
        zeros: 1.0 - header.values as f64 / weights,
        bytes,
    }))
}

/// Weights of whole blocks that a sparse tensor would not store, and all of them.
fn count_zeros(ty: GgmlType, blocks: &[u8]) -> (usize, usize) {
    let zeros = match ty {
        GgmlType::BF16 => blocks
            .as_chunks::<2>()
            .0
            .iter()
            .filter(|b| **b == [0; 2])
            .count(),
        GgmlType::Q8_0 => {
            let blocks = blocks.as_chunks::<34>().0.iter();
            blocks
                .map(|b| b[2..].iter().filter(|q| **q == 0).count())
                .sum()
        }
        _ => {
            let blocks = blocks.as_chunks::<18>().0.iter();
            let nibbles = |q: &u8| usize::from(q & 15 == 8) + usize::from(q >> 4 == 8);
            blocks
                .map(|b| b[2..].iter().map(nibbles).sum::<usize>())
                .sum()
        }
    };
    (zeros, blocks.len() / ty.block_bytes() * ty.block_len())
}

/// The data of a tensor as rows of its dense type: its own, or what a sparse one unpacks to.
///
/// # Errors
/// [`Error::Tensor`] for a sparse tensor that contradicts itself.
pub fn dense_data<'a>(model: &'a Gguf, t: &TensorInfo) -> Result<Cow<'a, [u8]>> {
    if !t.ty.is_sparse() {
        return Ok(Cow::Borrowed(model.data(t)));
    }
    let fail = |e: SparseError| Error::tensor(model.metadata().origin(), &t.name, e.to_string());
    let sparse = Sparse::parse(model.data(t)).map_err(fail)?;
    let (values, rows) = unpack(&sparse, 0..sparse.header().strips()).map_err(fail)?;
    sparse.check_values(values).map_err(fail)?;
    Ok(Cow::Owned(rows))
}

/// The dense rows of some strips, and how many values these have.
fn unpack(sparse: &Sparse<'_>, strips: Range<usize>) -> Result<(u64, Vec<u8>), SparseError> {
    let h = sparse.header();
    let row_bytes = h.ty.dense().bytes_for(h.k as u64).expect("whole blocks") as usize;
    let one = |s: usize| {
        let values = sparse.check_strip(s)?;
        let mut out = vec![0; h.rows_of(s).len() * row_bytes];
        let mut rows: Vec<_> = out.chunks_exact_mut(row_bytes).collect();
        unpack_strip(h.ty, h.k, sparse.strip(s), &mut rows);
        Ok((values, out))
    };
    let unpacked: Vec<(u64, Vec<u8>)> = strips
        .into_par_iter()
        .map(one)
        .collect::<Result<_, SparseError>>()?;
    let values = unpacked.iter().map(|u| u.0).sum();
    Ok((values, unpacked.into_iter().flat_map(|u| u.1).collect()))
}

/// The lengths of all strips, and the header with its count of values.
fn measure(header: &Header, data: &[u8]) -> Result<(Header, Vec<usize>), SparseError> {
    let strips: Vec<(usize, u64)> = (0..header.strips())
        .into_par_iter()
        .map(|s| {
            packed_strip(
                header.ty,
                header.k,
                &dense_rows(header, data, s),
                header.pattern,
            )
        })
        .collect::<Result<_, _>>()?;
    let values = strips.iter().map(|s| s.1).sum();
    let lengths = strips.into_iter().map(|s| s.0).collect();
    Ok((Header { values, ..*header }, lengths))
}

fn tensor_bytes(header: &Header, lengths: &[usize]) -> u64 {
    (header.strips_at() + super::ALIGN) as u64 + lengths.iter().map(|&l| l as u64).sum::<u64>()
}

/// The dense rows of a strip.
fn dense_rows<'a>(header: &Header, data: &'a [u8], strip: usize) -> Vec<&'a [u8]> {
    let rows = header.rows_of(strip);
    let bytes = data.len() / (header.n * header.experts);
    rows.map(|r| &data[r * bytes..(r + 1) * bytes]).collect()
}

fn convert(
    model: &Gguf,
    path: &Path,
    plan: &dyn Fn(&TensorInfo) -> Result<(Plan, bool)>,
    progress: &mut Report<'_>,
) -> Result<Converted> {
    let total_bytes = model.tensors().iter().map(|t| t.bytes).sum();
    let mut done_bytes = 0;
    let mut report = |tensor: &TensorInfo, bytes: u64| {
        done_bytes += bytes;
        let state = SparseProgress {
            tensor,
            done_bytes,
            total_bytes,
        };
        match progress(state) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled {
                path: path.to_owned(),
            }),
        }
    };
    let mut converted = Converted {
        source_bytes: total_bytes,
        ..Converted::default()
    };
    let mut metadata = model.metadata().clone();
    metadata.retain(|key| !key.starts_with("split."));
    let mut writer = GgufWriter::new(metadata);
    let mut plans = Vec::with_capacity(model.tensors().len());
    for t in model.tensors() {
        report(t, 0)?;
        let (plan, kept) = plan(t)?;
        converted.kept += usize::from(kept);
        match &plan {
            Plan::Copy if t.ty.is_sparse() => {
                writer.add_sparse(&t.name, t.ty, &t.shape, t.bytes)?;
            }
            Plan::Copy => writer.add_tensor(&t.name, t.ty, &t.shape)?,
            Plan::Pack { header, lengths } => {
                let bytes = tensor_bytes(header, lengths);
                writer.add_sparse(&t.name, header.ty, &t.shape, bytes)?;
            }
            Plan::Unpack(ty) => writer.add_tensor(&t.name, *ty, &t.shape)?,
        }
        converted.tensors += usize::from(!matches!(plan, Plan::Copy));
        plans.push(plan);
        report(t, t.bytes / 2)?;
    }
    converted.target_bytes = writer.tensors().iter().map(|t| t.bytes).sum();
    converted.file_bytes = writer.file_bytes()?;

    let mut out = writer.create(path)?;
    for (t, plan) in model.tensors().iter().zip(plans) {
        let source = model.bytes(t);
        let fail =
            |e: SparseError| Error::tensor(model.metadata().origin(), &t.name, e.to_string());
        let rest = t.bytes - t.bytes / 2;
        match plan {
            Plan::Copy => {
                for part in source.chunks(SLAB) {
                    out.write(part)?;
                    report(t, 0)?;
                }
            }
            Plan::Pack { header, lengths } => {
                out.write(&header.encode(&lengths).map_err(fail)?)?;
                let per = slab_strips(&header);
                for first in (0..header.strips()).step_by(per) {
                    let strips = first..header.strips().min(first + per);
                    let packed: Vec<Vec<u8>> = strips
                        .into_par_iter()
                        .map(|s| {
                            let rows = dense_rows(&header, &source, s);
                            let mut out = Vec::with_capacity(lengths[s]);
                            pack_strip(header.ty, header.k, &rows, header.pattern, &mut out)?;
                            Ok(out)
                        })
                        .collect::<Result<_, _>>()
                        .map_err(fail)?;
                    for strip in packed {
                        out.write(&strip)?;
                    }
                    report(t, 0)?;
                }
                out.write(&[0; super::ALIGN])?;
            }
            Plan::Unpack(_) => {
                let sparse = Sparse::parse(&source).map_err(fail)?;
                let header = *sparse.header();
                let per = slab_strips(&header);
                let mut values = 0;
                for first in (0..header.strips()).step_by(per) {
                    let strips = first..header.strips().min(first + per);
                    let (count, rows) = unpack(&sparse, strips).map_err(fail)?;
                    values += count;
                    out.write(&rows)?;
                    report(t, 0)?;
                }
                sparse.check_values(values).map_err(fail)?;
            }
        }
        report(t, rest)?;
        source.release();
    }
    out.finish()?;
    Ok(converted)
}

/// Strips that are in work at a time.
fn slab_strips(header: &Header) -> usize {
    (SLAB / (ROWS * header.k * 2)).max(rayon::current_num_threads())
}
