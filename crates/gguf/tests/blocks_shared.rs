//! Our quantisers against llama.cpp's on the models in `../shared`.
//!
//! Each tensor of each quantised file is quantised again from the bf16 file; the error
//! against the bf16 weights may be at most 1 % above the file's own.

mod common;

use libtest_mimic::{Arguments, Failed, Trial};
use tegula_gguf::{GgmlType, Gguf, TensorInfo, blocks};

/// Quantised file and the bf16 file that it was made of.
const FILES: [(&str, &str); 9] = [
    ("ferrous-7m-Q4_0", "ferrous-7m-bf16"),
    ("ferrous-7m-Q4_1", "ferrous-7m-bf16"),
    ("ferrous-7m-Q4_K_M", "ferrous-7m-bf16"),
    ("ferrous-7m-Q6_K", "ferrous-7m-bf16"),
    ("ferrous-7m-Q8_0", "ferrous-7m-bf16"),
    ("ferrous-7m-IQ4_XS", "ferrous-7m-bf16"),
    ("ferrous-moe-21m-Q4_0", "ferrous-moe-21m-bf16"),
    ("ferrous-moe-21m-Q4_K_M", "ferrous-moe-21m-bf16"),
    ("ferrous-moe-21m-MXFP4_MOE", "ferrous-moe-21m-bf16"),
];

/// Weights of a tensor that are looked at: whole rows from its start.
const ENOUGH: usize = 1 << 17;

fn weights(gguf: &Gguf, tensor: &TensorInfo, n: usize) -> Result<Vec<f32>, Failed> {
    let bytes = tensor.ty.bytes_for(n as u64).ok_or("ragged row")? as usize;
    let mut out = vec![0.0; n];
    blocks::dequantize(tensor.ty, &gguf.data(tensor)[..bytes], &mut out)?;
    Ok(out)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn compare(file: &str, original: &str) -> Result<(), Failed> {
    let models = common::shared().join("models");
    let given = Gguf::open(models.join(format!("{file}.gguf")))?;
    let original = Gguf::open(models.join(format!("{original}.gguf")))?;
    let mut compared = 0;
    for tensor in given
        .tensors()
        .iter()
        .filter(|t| blocks::can_quantize(t.ty))
    {
        let row = tensor.row_len() as usize;
        let n = (ENOUGH.div_ceil(row) * row).min(tensor.elements() as usize);
        let exact = weights(&original, original.require_tensor(&tensor.name)?, n)?;
        let theirs = distance(&exact, &weights(&given, tensor, n)?);
        let mut bytes = vec![0; tensor.ty.bytes_for(n as u64).ok_or("ragged row")? as usize];
        blocks::quantize(tensor.ty, &exact, None, &mut bytes)?;
        let mut ours = vec![0.0; n];
        blocks::dequantize(tensor.ty, &bytes, &mut ours)?;
        let ours = distance(&exact, &ours);
        if ours > 1.01 * theirs {
            return Err(format!(
                "{} {}: error {ours}, theirs {theirs}",
                tensor.name, tensor.ty
            )
            .into());
        }
        let rounds = matches!(
            tensor.ty,
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q8_0 | GgmlType::MXFP4
        );
        if rounds && bytes != given.data(tensor)[..bytes.len()] {
            return Err(format!("{} {}: bytes differ", tensor.name, tensor.ty).into());
        }
        compared += usize::from(tensor.ty.is_quantized());
    }
    if compared == 0 {
        Err("no quantised tensor".into())
    } else {
        Ok(())
    }
}

fn main() {
    let absent = !common::shared().join("models").is_dir();
    let trials = FILES
        .iter()
        .map(|&(file, original)| {
            Trial::test(format!("as_good_as::{file}"), move || {
                compare(file, original)
            })
            .with_ignored_flag(absent)
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
