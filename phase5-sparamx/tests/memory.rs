//! The pruner takes the memory of a layer, not of a model. A program of its own: what is measured
//! is what all of the process has in memory.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use phase5_sparamx::prune::{Calibration, PruneOptions, prune_in_sequence};
use tegula_engine::{LoadOptions, Model, Shape, Source, shape::Fill};
use tegula_gguf::{GgmlType, Gguf, writer::GgufWriter};

const LAYERS: usize = 16;

/// A model of BF16 weights, nearly all of them in its layers.
fn model(dir: &Path) -> PathBuf {
    let shape = Shape {
        layers: LAYERS,
        embd: 512,
        ff: 2048,
        ..Shape::preset("llama").unwrap()
    };
    let mut writer = GgufWriter::new(shape.metadata());
    let tensors = shape.tensors();
    let float = |fill| matches!(fill, Fill::Constant(_));
    for t in &tensors {
        let ty = if float(t.fill) {
            GgmlType::F32
        } else {
            GgmlType::BF16
        };
        writer.add_tensor(&t.name, ty, &t.shape).unwrap();
    }
    let path = dir.join("model.gguf");
    let mut out = writer.create(&path).unwrap();
    let mut state = 1u32;
    for t in &tensors {
        let mut data: Vec<u8> = Vec::new();
        for _ in 0..t.weights() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match t.fill {
                Fill::Constant(x) => data.extend(x.to_le_bytes()),
                // Magnitudes from 1/64 to 1/32 of both signs.
                Fill::Random => data.extend((0x3c80 | (state >> 16) as u16 & 0x807f).to_le_bytes()),
            }
        }
        out.write(&data).unwrap();
    }
    out.finish().unwrap();
    path
}

/// Bytes that this process has in memory, files that it has mapped included.
fn resident() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find_map(|l| l.strip_prefix("Rss:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse().unwrap();
    kib << 10
}

#[test]
fn pruning_in_sequence_has_one_layer_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path());
    let source = Gguf::open(&path).unwrap();
    let bytes: u64 = source.tensors().iter().map(|t| t.bytes).sum();
    let layer = bytes / LAYERS as u64;
    let loaded = LoadOptions {
        threads: 2,
        repack: false,
        sparse_pack: false,
        ..LoadOptions::new(Source::Path(path))
    };
    let loaded = Arc::new(Model::load(&loaded, &mut |_| ()).unwrap());
    let text = "abc ".repeat(200);
    let how = Calibration {
        window: 16,
        limit: 4,
        together: 32,
    };
    let options = PruneOptions {
        sparsity: 0.5,
        least_saving: 0.1,
        ..PruneOptions::default()
    };
    let before = resident();
    let mut most = 0;
    let out = dir.path().join("out.gguf");
    let progress = &mut |_: phase5_sparamx::prune::PruneProgress<'_>| {
        most = most.max(resident());
        ControlFlow::Continue(())
    };
    let with = (text.as_str(), &how);
    let (pruned, _) = prune_in_sequence(&source, loaded, with, &out, &options, progress).unwrap();
    assert_eq!(pruned.tensors, 7 * LAYERS);
    // The layer's pages, its pruned matrices, and those of a tensor in work on its way from dense to
    // sparse; never what layers before it took.
    let more = most.saturating_sub(before);
    assert!(
        more < 4 * layer,
        "{more} bytes more, a layer has {layer} of {bytes}"
    );
}
