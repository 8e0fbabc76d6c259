//! Importance matrices: how much the errors of each input column count.

use std::collections::HashMap;

use crate::{Error, GgmlType, Gguf, TensorInfo, blocks, error::Result};

/// Factors by the name of the tensor they are for: one per column, or per column of each
/// expert, one expert after the other.
pub type Importance = HashMap<String, Vec<f32>>;

/// Reads an importance matrix as llama.cpp's `llama-imatrix` writes it to GGUF: for each tensor
/// the sums of its inputs' squares (`NAME.in_sum2`) and how many inputs there were
/// (`NAME.counts`, one per expert). The factors are the means; experts that saw no input count
/// evenly.
///
/// # Errors
/// [`Error::Tensor`] for sums without counts, shapes that don't fit, and numbers that are not
/// finite or negative; [`Error::Unsupported`] for a file that holds no importance matrix.
pub fn read_importance(file: &Gguf) -> Result<Importance> {
    let mut out = Importance::new();
    for sums in file.tensors() {
        let Some(name) = sums.name.strip_suffix(".in_sum2") else {
            continue;
        };
        let counts = file.require_tensor(&format!("{name}.counts"))?;
        let mut factors = floats(file, sums)?;
        let counts = floats(file, counts)?;
        if counts.len() as u64 != sums.rows() {
            let what = format!("{} rows of sums have {} counts", sums.rows(), counts.len());
            return Err(Error::tensor(file.metadata().origin(), name, what));
        }
        // A tensor in memory has rows that fit a usize, and none is empty.
        for (row, &count) in factors
            .chunks_exact_mut(sums.row_len() as usize)
            .zip(&counts)
        {
            if count > 0.0 {
                row.iter_mut().for_each(|sum| *sum /= count);
            } else {
                row.fill(1.0);
            }
        }
        out.insert(name.to_owned(), factors);
    }
    if out.is_empty() {
        return Err(Error::Unsupported(format!(
            "{}: holds no importance matrix",
            file.metadata().origin()
        )));
    }
    Ok(out)
}

/// The numbers of an F32 tensor, which must be sensible as sums or counts.
fn floats(file: &Gguf, t: &TensorInfo) -> Result<Vec<f32>> {
    let fail = |what: String| Error::tensor(file.metadata().origin(), &t.name, what);
    if t.ty != GgmlType::F32 {
        return Err(fail(format!("is {}, not F32", t.ty)));
    }
    let mut out = vec![0.0; file.data(t).len() / 4];
    blocks::dequantize(t.ty, file.data(t), &mut out).map_err(|e| fail(e.to_string()))?;
    match out.iter().find(|x| !x.is_finite() || **x < 0.0) {
        Some(x) => Err(fail(format!("holds {x}"))),
        None => Ok(out),
    }
}
