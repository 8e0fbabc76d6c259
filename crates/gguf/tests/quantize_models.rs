//! The quantiser's choices against llama.cpp's: every quantised model under `../shared` has
//! the tensor types that we would choose for its file type, and our own files have them in
//! fact. Marked as ignored where the models are absent.

mod common;

use std::{ops::ControlFlow, path::PathBuf};

use libtest_mimic::{Arguments, Failed, Trial};
use tegula_gguf::{
    Gguf, Metadata,
    quantize::{FileType, QuantizeOptions, choose, quantize},
};

/// Model, file type, and whether an importance matrix was used.
const FILES: [(&str, &str, bool); 12] = [
    ("ferrous-7m", "Q4_0", false),
    ("ferrous-7m", "Q4_1", false),
    ("ferrous-7m", "Q8_0", false),
    ("ferrous-7m", "Q4_K_M", false),
    ("ferrous-7m", "Q6_K", false),
    ("ferrous-7m", "IQ4_XS", false),
    ("ferrous-7m", "IQ3_S", true),
    ("ferrous-7m", "IQ2_XS", true),
    ("ferrous-moe-21m", "Q4_0", false),
    ("ferrous-moe-21m", "Q4_K_M", false),
    ("ferrous-moe-21m", "MXFP4_MOE", false),
    // Converted, not quantised, but the rules must leave it alone, too.
    ("ferrous-7m", "bf16", false),
];

fn path(model: &str, file_type: &str) -> PathBuf {
    common::shared()
        .join("models")
        .join(format!("{model}-{file_type}.gguf"))
}

fn check(model: &str, name: &str, importance: bool) -> Result<(), Failed> {
    let source = Gguf::open(path(model, "bf16"))?;
    let given = Gguf::open(path(model, name))?;
    let file_type: FileType = name.parse()?;
    let mut options = QuantizeOptions::new(file_type);
    options.importance = importance.then(Default::default);
    let choices = choose(source.metadata(), source.tensors(), &options)?;
    for (t, c) in source.tensors().iter().zip(&choices) {
        let theirs = given.require_tensor(&t.name)?;
        if theirs.ty != c.ty {
            return Err(format!("{}: {} here, {} there", t.name, c.ty, theirs.ty).into());
        }
    }
    if !file_type.can_write() {
        return Ok(());
    }

    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out.gguf");
    quantize(&source, &out, &options, &mut |_| ControlFlow::Continue(()))?;
    let ours = Gguf::open(&out)?;
    if ours.metadata().u32("general.file_type")? != Some(file_type.id()) {
        return Err("wrong general.file_type".into());
    }
    // The same keys and values, in whatever order, but for the importance matrix's.
    let sorted = |m: &Metadata| {
        let mut entries: Vec<String> = m.iter().map(|(k, v)| format!("{k}: {v:?}")).collect();
        entries.retain(|e| !e.starts_with("quantize.imatrix."));
        entries.sort();
        entries
    };
    // A converter's file has no quantisation version.
    if given.metadata().contains("general.quantization_version")
        && sorted(ours.metadata()) != sorted(given.metadata())
    {
        return Err("metadata differ".into());
    }
    // Formats without a search come out the same, byte for byte.
    let exact = matches!(name, "Q4_0" | "Q4_1" | "Q8_0" | "bf16");
    for t in ours.tensors() {
        let theirs = given.require_tensor(&t.name)?;
        if (t.ty, &t.shape) != (theirs.ty, &theirs.shape) {
            return Err(format!("{}: {} here, {} there", t.name, t.ty, theirs.ty).into());
        }
        if exact && t.ty.name() == name && ours.data(t) != given.data(theirs) {
            return Err(format!("{}: data differ", t.name).into());
        }
    }
    Ok(())
}

fn main() {
    let args = Arguments::from_args();
    let trials = FILES.map(|(model, name, importance)| {
        let absent = !path(model, name).exists() || !path(model, "bf16").exists();
        Trial::test(format!("{model}-{name}"), move || {
            check(model, name, importance)
        })
        .with_ignored_flag(absent)
    });
    libtest_mimic::run(&args, trials.into()).exit();
}
