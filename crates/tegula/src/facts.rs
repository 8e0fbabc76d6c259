//! Facts about model files and the machine that several commands need.

use std::{collections::BTreeMap, fs};
use tegula_engine::{Model, plan::TileUse};
use tegula_gguf::{
    Gguf, TensorInfo,
    quantize::FileType,
    sparse::{Header, Sparse},
};

/// What runs the model: instruction sets, and the devices that hold weights.
pub fn isa(model: &Model) -> String {
    let table = model.compute().table;
    let mut names = vec![table.tier.to_string()];
    names.extend(table.amx.map(|amx| amx.name().to_owned()));
    names.extend(gpus(model));
    names.join(", ")
}

/// The devices that hold weights.
pub fn gpus(model: &Model) -> Vec<String> {
    let devices = model.plan().offload.devices.iter();
    let used = devices.filter(|d| d.weights > 0);
    used.map(|d| d.name.clone()).collect()
}

/// Says on stderr what the devices have to say of how they worked, once.
pub fn say_notes(model: &Model) {
    for note in model.device_notes() {
        say!("note: {note}");
    }
}

/// Where AMX was asked for: whether it is on, on how many threads, for which matrices.
pub fn amx(model: &Model) -> Option<String> {
    let compute = model.compute();
    let (on_tiles, matrices) = model.plan().on_tiles()?;
    let mode = match compute.table.amx?.is_emulated() {
        true => "amx: emulated",
        false => "AMX: on",
    };
    let threads = compute.pool.threads();
    let mut line =
        format!("{mode} (int8 and bf16 tiles), {threads} threads, {on_tiles}/{matrices} matrices");
    let mut others = BTreeMap::new();
    for p in &model.plan().placements {
        if let Some(TileUse::Never(why)) = p.tiles {
            *others.entry((&p.ty, why)).or_insert(0) += 1;
        }
    }
    for ((ty, why), n) in others {
        line += &format!("; not {n} of {ty}: {why}");
    }
    Some(line)
}

/// Weights of all tensors.
pub fn parameters(gguf: &Gguf) -> u64 {
    gguf.tensors().iter().map(|t| t.elements()).sum()
}

/// The file type that the metadata name, or the tensor type that takes the most bytes.
pub fn file_type(gguf: &Gguf) -> String {
    let stated = gguf.metadata().u32("general.file_type").ok().flatten();
    // It names the dense twin of a sparse file.
    let stated = stated.filter(|_| gguf.tensors().iter().all(|t| !t.ty.is_sparse()));
    if let Some(file) = stated.and_then(FileType::from_id) {
        return file.name().to_owned();
    }
    let mut bytes = BTreeMap::new();
    for t in gguf.tensors() {
        *bytes.entry(t.ty).or_insert(0) += t.bytes;
    }
    let largest = bytes.into_iter().max_by_key(|&(_, n)| n);
    largest.map_or_else(|| "no tensors".to_owned(), |(ty, _)| ty.name().to_owned())
}

/// What the system says new programs could take, in bytes.
pub fn available_memory() -> Option<u64> {
    Some(meminfo("MemAvailable")? * 1024)
}

/// A number of /proc/meminfo, in its unit: KiB or pages.
pub fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What a sparse tensor's header says, or `None` for a dense one.
pub fn sparse_header(gguf: &Gguf, t: &TensorInfo) -> Option<Header> {
    if !t.ty.is_sparse() {
        return None;
    }
    // It was read once when the file was opened.
    Sparse::parse(gguf.data(t)).ok().map(|s| *s.header())
}

/// Weights that have a value, of all weights in sparse tensors; `None` where there are none.
pub fn density(gguf: &Gguf) -> Option<f64> {
    let sparse = gguf.tensors().iter().filter_map(|t| sparse_header(gguf, t));
    let (values, weights) = sparse.fold((0.0, 0.0), |(values, weights), h| {
        let all = h.k as f64 * h.n as f64 * h.experts as f64;
        (values + h.density() * all, weights + all)
    });
    (weights > 0.0).then(|| values / weights)
}
