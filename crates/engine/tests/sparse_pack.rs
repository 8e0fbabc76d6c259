//! Matrices that have many zeros are packed without them: where that is worth it, on every
//! tier that multiplies them so, and with the same logits bit for bit.

use std::{path::Path, sync::Arc};
use tegula_engine::{
    Batch, Context, ContextOptions, LoadOptions, Model, Source,
    plan::{Buffer, Encoding},
};
use tegula_gguf::{GgmlType, Gguf, writer::GgufWriter};
use tegula_kernels::{Kernels, Tier};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tegula/assets/ferrous-moe-21m-Q4_0.gguf"
);

/// The program's model with so many percent of zeros in the matrices of its layers.
fn with_zeros(path: &Path, percent: impl Fn(&str) -> u32) {
    let model = Gguf::open(MODEL).unwrap();
    let mut state = 1u32;
    let mut zero = |percent: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % 100 < percent
    };
    let mut writer = GgufWriter::like(&model).unwrap();
    let mut data = Vec::new();
    for t in model.tensors() {
        let mut bytes = model.data(t).to_vec();
        if t.ty == GgmlType::Q4_0 && t.name.starts_with("blk.") {
            let percent = percent(&t.name);
            for block in bytes.chunks_exact_mut(18) {
                for q in &mut block[2..] {
                    *q = if zero(percent) { *q & 0xf0 | 8 } else { *q };
                    *q = if zero(percent) { *q & 15 | 0x80 } else { *q };
                }
            }
        }
        data.push(bytes);
        if writer.tensors().iter().all(|w| w.name != t.name) {
            writer.add_tensor(&t.name, t.ty, &t.shape).unwrap();
        }
    }
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    std::fs::write(path, writer.to_bytes(&slices).unwrap()).unwrap();
}

fn load(path: &Path, set: impl FnOnce(&mut LoadOptions)) -> Arc<Model> {
    let mut options = LoadOptions::new(Source::Path(path.into()));
    options.threads = 2;
    set(&mut options);
    Arc::new(Model::load(&options, &mut |_| {}).unwrap())
}

fn logits(model: &Arc<Model>) -> Vec<u32> {
    let options = ContextOptions {
        context: 64,
        ..ContextOptions::default()
    };
    let mut ctx = Context::new(Arc::clone(model), &options).unwrap();
    let mut bits = Vec::new();
    // A prompt and a single token.
    for ids in [&(1..30).collect::<Vec<u32>>()[..], &[7]] {
        let out = ctx.decode(&Batch::all_logits(0, ids)).unwrap();
        bits.extend(
            (0..out.len())
                .flat_map(|i| out.logits(i).to_vec())
                .map(f32::to_bits),
        );
    }
    bits
}

/// Whether this machine multiplies 4-bit weights without their zeros.
fn can() -> bool {
    (Kernels::for_tier(Tier::detect_max()).matmul.sparse)(GgmlType::S4)
}

#[test]
fn zeros_are_left_out_where_it_is_worth_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zeros.gguf");
    // With 30 % of zeros more, 4-bit matrices stay above nine tenths; with 60 % they don't.
    with_zeros(&path, |name| if name.contains("attn") { 15 } else { 60 });
    let packed = load(&path, |_| {});
    let dense = load(&path, |o| o.sparse_pack = false);
    assert_eq!(logits(&packed), logits(&dense));
    let mut saved = 0;
    for (p, d) in packed
        .plan()
        .placements
        .iter()
        .zip(&dense.plan().placements)
    {
        assert_ne!(d.encoding, Encoding::Sparse16, "{}", d.tensor);
        if p.encoding != Encoding::Sparse16 {
            assert_eq!(
                (p.bytes, p.encoding, &p.reason),
                (d.bytes, d.encoding, &d.reason)
            );
            continue;
        }
        assert!(
            p.tensor.contains("ffn") && p.buffer == Buffer::Packed,
            "{}",
            p.tensor
        );
        assert!(p.bytes as f64 <= 0.9 * d.bytes as f64, "{}", p.tensor);
        assert!(
            p.reason.contains("are zero") && p.kernel.contains("S4"),
            "{p:?}"
        );
        saved += d.bytes - p.bytes;
    }
    assert_eq!(saved > 0, can());
    // What the plan says is what the matrices take, but for header and slack.
    for (name, w) in packed.host_matrices() {
        let place = packed.plan().get(&name).unwrap();
        if place.encoding == Encoding::Sparse16 {
            assert!(w.ty().is_sparse());
            let off = place.bytes.abs_diff(w.bytes() as u64);
            assert!(
                off < 64 + place.bytes / 50,
                "{name}: {} {}",
                place.bytes,
                w.bytes()
            );
        }
    }
}

#[test]
fn where_nothing_multiplies_them_so_zeros_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zeros.gguf");
    with_zeros(&path, |_| 70);
    let sparse = |model: &Model| {
        let places = model.plan().placements.iter();
        places.filter(|p| p.encoding == Encoding::Sparse16).count()
    };
    for tier in [Tier::Scalar, Tier::Avx2] {
        assert_eq!(sparse(&load(&path, |o| o.tier = tier)), 0, "{tier}");
    }
    assert_eq!(sparse(&load(&path, |o| o.repack = false)), 0);
    let cached = load(&path, |o| o.packed_cache = Some(dir.path().join("packed")));
    assert_eq!(sparse(&cached), 0, "the packed file holds dense strips");
    let all = sparse(&load(&path, |_| {}));
    assert_eq!(all > 0, can());
    // The program's own model has few zeros.
    assert_eq!(sparse(&load(Path::new(MODEL), |_| {})), 0);
}

#[test]
fn a_sample_decides_and_all_weights_are_counted() {
    use tegula_gguf::sparse::{pack_tensor, worth};
    let (k, n) = (512usize, 256usize);
    let shape = [k as u64, n as u64];
    let rows = |zero: &dyn Fn(usize) -> bool| -> Vec<u8> {
        let bits = |i| if zero(i) { 0u16 } else { 0x3f80 };
        (0..k * n).flat_map(|i| bits(i).to_le_bytes()).collect()
    };
    for (percent, expected) in [(0, false), (10, false), (20, true), (50, true), (100, true)] {
        let data = rows(&|i| i * 7919 % 100 < percent);
        let found = worth(GgmlType::BF16, &shape, &data, 0.1).unwrap();
        assert_eq!(found.is_some(), expected, "{percent} %");
        if let Some(found) = found {
            let packed = pack_tensor(GgmlType::S_BF16, &shape, None, &data).unwrap();
            assert_eq!(found.bytes, packed.len() as u64);
            assert!((found.zeros * 100.0 - percent as f64).abs() < 1.0);
        }
    }
    // Zeros only where the sample looks: counting all of them tells.
    let data = rows(&|i| i % 4096 < 1400);
    let found = worth(GgmlType::BF16, &shape, &data, 0.4).unwrap();
    assert_eq!(found, None);
    // Small tensors, and types without a sparse twin.
    let small = worth(GgmlType::BF16, &[2, 2], &[0; 8], 0.1);
    assert!(small.is_ok());
    assert_eq!(worth(GgmlType::F32, &[2, 2], &[0; 16], 0.1), Ok(None));
}
