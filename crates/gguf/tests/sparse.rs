//! Sparse tensors: lossless in both directions, and every contradiction is an error.

mod common;

use std::{ops::ControlFlow, path::Path};

use proptest::prelude::*;
use tegula_gguf::{
    Bytes, GgmlType, Gguf, Metadata,
    fuzz::driver::Random,
    sparse::{
        self, Pattern, Sparse, SparseError, Sparsify, densify, pack_strip, pack_tensor,
        packed_strip, sparsify, unpack_strip,
    },
    writer::GgufWriter,
};

const TYPES: [GgmlType; 3] = [GgmlType::S_BF16, GgmlType::S8, GgmlType::S4];

/// Dense rows of the twin of `ty`; a weight has a value where `value(row, input)`.
fn dense(
    ty: GgmlType,
    rows: usize,
    k: usize,
    seed: u64,
    value: &dyn Fn(usize, usize) -> bool,
) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut out = Vec::new();
    for row in 0..rows {
        let mut codes: Vec<u16> = (0..k)
            .map(|i| match (value(row, i), ty) {
                (false, GgmlType::S4) => 8,
                (false, _) => 0,
                (true, GgmlType::S4) => (random.next_u64() % 15 + 9) as u16 % 16,
                (true, GgmlType::S8) => (random.next_u64() % 255 + 1) as u16,
                // −0.0 among them.
                (true, _) => 0x8000 | ((random.next_u64() % 7) as u16 * 0x0123),
            })
            .collect();
        match ty {
            GgmlType::S_BF16 => out.extend(codes.drain(..).flat_map(u16::to_le_bytes)),
            _ => {
                for codes in codes.chunks_exact(32) {
                    out.extend((random.next_u64() as u16).to_le_bytes());
                    match ty {
                        GgmlType::S8 => out.extend(codes.iter().map(|&c| c as u8)),
                        _ => out.extend((0..16).map(|j| (codes[j] | codes[j + 16] << 4) as u8)),
                    }
                }
            }
        }
    }
    out
}

/// The whole tensor of dense rows; strips are as long as they are measured.
fn pack(ty: GgmlType, shape: &[u64], pattern: Option<Pattern>, dense: &[u8]) -> Vec<u8> {
    let tensor = pack_tensor(ty, shape, pattern, dense).unwrap();
    let sparse = Sparse::parse(&tensor).unwrap();
    let h = sparse.header();
    let row_bytes = dense.len() / (h.n * h.experts);
    for s in 0..h.strips() {
        let rows: Vec<&[u8]> = h
            .rows_of(s)
            .map(|r| &dense[r * row_bytes..(r + 1) * row_bytes])
            .collect();
        let (bytes, values) = packed_strip(ty, h.k, &rows, pattern).unwrap();
        assert_eq!(
            (bytes, Ok(values)),
            (sparse.strip(s).len(), sparse.check_strip(s))
        );
    }
    tensor
}

fn unpack(bytes: &[u8]) -> Vec<u8> {
    let sparse = Sparse::parse(bytes).unwrap();
    sparse.check().unwrap();
    let h = sparse.header();
    let row_bytes = h.ty.dense().bytes_for(h.k as u64).unwrap() as usize;
    let mut out = Vec::new();
    for s in 0..h.strips() {
        let mut strip = vec![0xee; h.rows_of(s).len() * row_bytes];
        let mut rows: Vec<_> = strip.chunks_exact_mut(row_bytes).collect();
        unpack_strip(h.ty, h.k, sparse.strip(s), &mut rows);
        out.extend(strip);
    }
    out
}

fn value_count(bytes: &[u8]) -> u64 {
    Sparse::parse(bytes).unwrap().header().values
}

#[test]
fn unpacking_inverts_packing_at_every_sparsity_and_shape() {
    for ty in TYPES {
        let odd: &[(usize, u64)] = &[(100, 100), (17, 1), (5, 31), (1, 33), (33, 1025)];
        let odd = if ty == GgmlType::S_BF16 { odd } else { &[] };
        let shapes = [
            (16, 64),
            (48, 768),
            (17, 96),
            (100, 512),
            (1, 544),
            (31, 2048),
            (16, 14336),
        ];
        for &(n, k) in shapes.iter().chain(odd) {
            for percent in [0, 25, 50, 75, 90, 99, 100] {
                let value = |row: usize, i: usize| {
                    let mut random = Random::new((row as u64) << 32 | i as u64);
                    random.next_u64() % 100 >= percent
                };
                let raw = dense(ty, n, k as usize, percent, &value);
                let packed = pack(ty, &[k, n as u64], None, &raw);
                assert!(unpack(&packed) == raw, "{ty} {n}x{k} {percent} %");
                let wanted: usize = (0..n)
                    .map(|r| (0..k as usize).filter(|&i| value(r, i)).count())
                    .sum();
                assert_eq!(
                    value_count(&packed),
                    wanted as u64,
                    "{ty} {n}x{k} {percent} %"
                );
            }
        }
    }
}

#[test]
fn one_value_at_each_corner_is_where_it_was() {
    for ty in TYPES {
        let (n, k) = (19, 1056);
        for row in [0, 15, 16, 18] {
            for input in [0, 1, 3, 31, 32, 511, 512, 1023, 1024, 1055] {
                let raw = dense(ty, n, k, 3, &|r, i| (r, i) == (row, input));
                let packed = pack(ty, &[k as u64, n as u64], None, &raw);
                assert_eq!(value_count(&packed), 1);
                assert!(unpack(&packed) == raw, "{ty} row {row} input {input}");
            }
        }
    }
}

#[test]
fn sizes_are_what_the_format_says() {
    let half = |r: usize, i: usize| (r + i).is_multiple_of(2);
    let size = |ty| {
        let packed = pack(ty, &[4096, 256], None, &dense(ty, 256, 4096, 1, &half));
        packed.len() as f64 / (4096.0 * 256.0)
    };
    // Bytes per weight: values, bitmap, scales; table, header and filling are below 0.001.
    for (ty, bytes) in [
        (GgmlType::S_BF16, 1.0 + 0.125),
        (GgmlType::S8, 0.5 + 0.125 + 0.0625),
        (GgmlType::S4, 0.25 + 0.125 + 0.0625),
    ] {
        let found = size(ty);
        assert!(found >= bytes && found < bytes + 0.001, "{ty}: {found}");
    }
}

#[test]
fn with_a_pattern_all_strips_are_equally_long() {
    for ty in TYPES {
        for (pattern, other) in [("2:4", "1:4"), ("4:8", "3:8")] {
            let p: Pattern = pattern.parse().unwrap();
            // Some groups have fewer values than the pattern.
            let value =
                |r: usize, i: usize| i % p.m() < p.n() - usize::from((r + i).is_multiple_of(3));
            let raw = dense(ty, 40, 1056, 5, &value);
            let packed = pack(ty, &[1056, 40], Some(p), &raw);
            assert!(unpack(&packed) == raw, "{ty} {pattern}");
            let sparse = Sparse::parse(&packed).unwrap();
            let lengths: Vec<usize> = (0..3).map(|s| sparse.strip(s).len()).collect();
            assert_eq!(lengths, [lengths[0]; 3], "{ty} {pattern}");
            assert_eq!(sparse.header().values, 48 * 1056 / 2);

            let row_bytes = raw.len() / 40;
            let rows: Vec<&[u8]> = raw.chunks_exact(row_bytes).take(16).collect();
            let too_many = pack_strip(ty, 1056, &rows, other.parse().ok(), &mut Vec::new());
            assert!(
                matches!(too_many, Err(SparseError::Pattern { .. })),
                "{too_many:?}"
            );
        }
    }
    for bad in ["2", "4:4", "0:4", "2:3", "2:64", "a:b", ""] {
        assert!(bad.parse::<Pattern>().is_err(), "{bad}");
    }
}

/// A model with a stack of experts, a matrix with few zeros, and things that can't be packed.
fn model() -> Gguf {
    let half = |r: usize, i: usize| (r * 7 + i * 3) % 5 < 2;
    let full = |_: usize, _: usize| true;
    let tensors = [
        (
            "token_embd.weight",
            GgmlType::BF16,
            vec![64, 9],
            dense(GgmlType::S_BF16, 9, 64, 1, &half),
        ),
        (
            "blk.0.ffn_up_exps.weight",
            GgmlType::Q8_0,
            vec![64, 17, 3],
            dense(GgmlType::S8, 51, 64, 2, &half),
        ),
        (
            "blk.0.attn_q.weight",
            GgmlType::Q4_0,
            vec![1024, 64],
            dense(GgmlType::S4, 64, 1024, 3, &half),
        ),
        (
            "blk.0.attn_k.weight",
            GgmlType::BF16,
            vec![101, 70],
            dense(GgmlType::S_BF16, 70, 101, 4, &half),
        ),
        (
            "blk.0.attn_v.weight",
            GgmlType::Q8_0,
            vec![64, 32],
            dense(GgmlType::S8, 32, 64, 5, &full),
        ),
        (
            "blk.0.attn_norm.weight",
            GgmlType::F32,
            vec![64],
            vec![1; 256],
        ),
    ];
    let mut metadata = Metadata::new("dense");
    metadata.set("general.architecture", "llama");
    let mut writer = GgufWriter::new(metadata);
    for (name, ty, shape, _) in &tensors {
        writer.add_tensor(name, *ty, shape).unwrap();
    }
    let data: Vec<&[u8]> = tensors.iter().map(|t| &t.3[..]).collect();
    Gguf::from_bytes(Bytes::from_vec(writer.to_bytes(&data).unwrap()), "dense").unwrap()
}

fn to_sparse(model: &Gguf, path: &Path) -> sparse::Converted {
    let options = Sparsify {
        wanted: &|t| t.name != "token_embd.weight",
        least_saving: 0.1,
        pattern: None,
    };
    sparsify(model, path, &options, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn files_come_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (there, back) = (dir.path().join("sparse.gguf"), dir.path().join("back.gguf"));
    let dense = model();
    let converted = to_sparse(&dense, &there);
    assert_eq!((converted.tensors, converted.kept), (3, 1));
    let sparse = Gguf::open(&there).unwrap();
    assert_eq!(sparse.file_bytes(), converted.file_bytes);
    let types: Vec<_> = sparse.tensors().iter().map(|t| t.ty.name()).collect();
    assert_eq!(types, ["BF16", "S8", "S4", "S-BF16", "Q8_0", "F32"]);
    for (a, b) in dense.tensors().iter().zip(sparse.tensors()) {
        assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
    }
    // Whatever copies a model keeps its sparse tensors.
    let copied = GgufWriter::like(&sparse).unwrap();
    let data: Vec<&[u8]> = sparse.tensors().iter().map(|t| sparse.data(t)).collect();
    assert_eq!(
        copied.to_bytes(&data).unwrap(),
        std::fs::read(&there).unwrap()
    );

    densify(&sparse, &back, &mut |_| ControlFlow::Continue(())).unwrap();
    let back = Gguf::open(&back).unwrap();
    assert!(back.metadata().get(sparse::VERSION_KEY).is_none());
    for (a, b) in dense.tensors().iter().zip(back.tensors()) {
        assert_eq!((&a.name, a.ty, &a.shape), (&b.name, b.ty, &b.shape));
        assert!(dense.data(a) == back.data(b), "{}", a.name);
    }
}

#[test]
fn a_break_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let options = Sparsify {
        wanted: &|_| true,
        least_saving: 0.1,
        pattern: None,
    };
    for steps in 0..20 {
        let mut left = steps;
        let result = sparsify(&model(), dir.path().join("x"), &options, &mut |_| {
            left -= 1;
            if left < 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        assert!(matches!(result, Err(tegula_gguf::Error::Cancelled { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

/// What reading says of a model whose tensor `blk.0.attn_q.weight` was changed.
fn damaged(change: impl Fn(&mut Vec<u8>)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.gguf");
    to_sparse(&model(), &path);
    let good = Gguf::open(&path).unwrap();
    let mut metadata = good.metadata().clone();
    let mut writer = GgufWriter::default();
    let mut data: Vec<Vec<u8>> = Vec::new();
    for t in good.tensors() {
        let mut bytes = good.data(t).to_vec();
        if t.name == "blk.0.attn_q.weight" {
            change(&mut bytes);
        }
        writer
            .add_tensor(&t.name, GgmlType::I8, &[bytes.len() as u64])
            .unwrap();
        data.push(bytes);
    }
    list(&mut metadata, sparse::VERSION, &["blk.0.attn_q.weight"]);
    *writer.metadata_mut() = metadata;
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    match with_list(writer.to_bytes(&slices).unwrap()) {
        Err(e) => e,
        Ok(gguf) => {
            let t = gguf.require_tensor("blk.0.attn_q.weight").unwrap();
            match Sparse::parse(gguf.data(t)).unwrap().check() {
                Ok(()) => "right".to_owned(),
                Err(e) => e.to_string(),
            }
        }
    }
}

/// Names for the two keys that the writer leaves alone; [`with_list`] makes them the real ones.
const KEYS: [(&str, &str); 2] = [
    ("tegula.sparse.versio_", sparse::VERSION_KEY),
    ("tegula.sparse.tensor_", sparse::TENSORS_KEY),
];

fn list(metadata: &mut Metadata, version: u32, names: &[&str]) {
    metadata.set(KEYS[0].0, version);
    metadata.set(
        KEYS[1].0,
        names.iter().map(|n| n.to_string()).collect::<Vec<_>>(),
    );
}

/// Reads a file whose list is real.
fn with_list(mut file: Vec<u8>) -> Result<Gguf, String> {
    for (from, to) in KEYS {
        let at = file
            .windows(from.len())
            .position(|w| w == from.as_bytes())
            .unwrap();
        file[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
    Gguf::from_bytes(Bytes::from_vec(file), "bad.gguf").map_err(|e| e.to_string())
}

#[test]
fn contradictions_are_named() {
    insta::assert_snapshot!(contradictions().join("\n"));
}

fn contradictions() -> Vec<String> {
    let bytes = pack(
        GgmlType::S4,
        &[1024, 64],
        None,
        &dense(GgmlType::S4, 64, 1024, 3, &|r, i| (r * 7 + i * 3) % 5 < 2),
    );
    let say = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        match Sparse::parse(&bytes).and_then(|s| s.check()) {
            Ok(()) => "right".to_owned(),
            Err(e) => e.to_string(),
        }
    };
    let set = |at: usize, value: u8| say(&move |b| b[at] = value);
    let first = Sparse::parse(&bytes).unwrap().header().strips_at();
    vec![
        format!("as it is: {}", say(&|_| ())),
        format!("another magic: {}", set(0, b'X')),
        format!("newer: {}", set(8, 2)),
        format!("version 0: {}", set(8, 0)),
        format!("type: {}", set(10, 9)),
        format!("dimensions: {}", set(11, 1)),
        format!("pattern: {}", set(13, 4)),
        format!(
            "another pattern: {}",
            say(&|b| b[12..14].copy_from_slice(&[2, 4]))
        ),
        format!("reserved: {}", set(60, 1)),
        format!("k of no blocks: {}", set(16, 7)),
        format!("no rows: {}", set(24, 0)),
        format!("too many rows: {}", set(26, 1)),
        format!("two matrices: {}", set(32, 2)),
        format!("huge: {}", say(&|b| b[24..32].fill(0x7f))),
        format!("values: {}", set(40, 1)),
        format!("first strip: {}", set(64, 1)),
        format!("strips out of order: {}", set(68, 0xff)),
        format!("a strip too short: {}", say(&|b| b[68] -= 1)),
        format!("header cut: {}", say(&|b| b.truncate(63))),
        format!("table cut: {}", say(&|b| b.truncate(70))),
        format!("values cut: {}", say(&|b| b.truncate(first + 100))),
        format!("longer: {}", say(&|b| b.push(0))),
        // 16 scales, then the first bitmap.
        format!(
            "bits set: {}",
            say(&|b| b[first + 32..first + 96].fill(0xff))
        ),
        format!(
            "bits clear: {}",
            say(&|b| b[first + 32..first + 96].fill(0))
        ),
    ]
}

#[test]
fn bits_behind_the_last_input_are_refused() {
    let raw = dense(GgmlType::S_BF16, 16, 33, 1, &|_, _| true);
    let mut packed = pack(GgmlType::S_BF16, &[33, 16], None, &raw);
    let at = Sparse::parse(&packed).unwrap().header().strips_at();
    // Input 1 of row 0 in the second group, bit 1, is input 33.
    packed[at + 64] |= 2;
    let error = Sparse::parse(&packed).unwrap().check().unwrap_err();
    assert!(
        error.to_string().contains("behind the last of 33 inputs"),
        "{error}"
    );
}

#[test]
fn reading_refuses_bad_lists() {
    assert_eq!(damaged(|_| ()), "right");
    let cut = damaged(|b| b.truncate(b.len() - 64));
    assert!(
        cut.starts_with("bad.gguf: tensor `blk.0.attn_q.weight`: truncated"),
        "{cut}"
    );
    let foreign = damaged(|b| b[0] = 0);
    assert!(
        foreign.contains("does not begin with a sparse header"),
        "{foreign}"
    );

    let of = |version: u32, names: &[&str]| {
        let mut metadata = Metadata::default();
        list(&mut metadata, version, names);
        let tensors: [(&str, GgmlType, &[u64]); 2] =
            [("a", GgmlType::F32, &[3]), ("b", GgmlType::I8, &[64])];
        with_list(common::model(metadata, &tensors)).unwrap_err()
    };
    insta::assert_snapshot!([of(2, &[]), of(1, &["c"]), of(1, &["a"]), of(1, &["b"])].join("\n"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_is_packed_comes_back(
        ty in prop::sample::select(&TYPES[..]),
        groups in 1usize..40,
        tail in 0usize..32,
        n in 1usize..40,
        seed in any::<u64>(),
        percent in 0u64..=100,
    ) {
        let k = match ty {
            GgmlType::S_BF16 => groups * 32 - tail,
            _ => groups * 32,
        };
        let value = |r: usize, i: usize| {
            let mut random = Random::new(seed ^ ((r as u64) << 32 | i as u64));
            random.next_u64() % 100 < percent
        };
        let raw = dense(ty, n, k, seed, &value);
        let packed = pack(ty, &[k as u64, n as u64], None, &raw);
        prop_assert!(unpack(&packed) == raw);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(
        seed in any::<u64>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        ty in prop::sample::select(&TYPES[..]),
    ) {
        let raw = dense(ty, 20, 96, seed, &|r, i| (r + i) % 2 == 0);
        let mut packed = pack(ty, &[96, 20], None, &raw);
        for (at, value) in changes {
            let at = at.index(packed.len());
            packed[at] = value;
        }
        if let Ok(sparse) = Sparse::parse(&packed) && sparse.check().is_ok() {
            unpack(&packed);
        }
    }
}
