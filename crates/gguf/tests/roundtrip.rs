//! What is written is what is read: values, tensors, alignment, parts, and nothing else left
//! in the directory.

mod common;

use std::{fs, path::Path};

use proptest::prelude::*;
use tegula_gguf::{
    Array, Bytes, Error, GgmlType, Gguf, Metadata, OpenOptions, Value, writer::GgufWriter,
};

fn parse(bytes: Vec<u8>) -> Gguf {
    Gguf::from_bytes(Bytes::from_vec(bytes), "sample").unwrap()
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn every_value_type_and_shape_comes_back() {
    let gguf = parse(common::sample());
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.metadata(), &common::every_value());
    let facts: Vec<String> = gguf
        .tensors()
        .iter()
        .map(|t| {
            assert!(t.offset.is_multiple_of(32));
            format!(
                "{} {} {:?} {} bytes at {}",
                t.name, t.ty, t.shape, t.bytes, t.offset
            )
        })
        .collect();
    insta::assert_snapshot!(facts.join("\n"));
    for (i, t) in gguf.tensors().iter().enumerate() {
        let want: Vec<u8> = (0..t.bytes as usize).map(|b| (b * 7 + i) as u8).collect();
        assert_eq!(gguf.data(t), want, "{}", t.name);
        assert_eq!(*gguf.bytes(t), *want);
        assert_eq!(gguf.tensor(&t.name), Some(t));
    }
    assert_eq!(gguf.tensor("absent"), None);
}

#[test]
fn version_2_reads_alike() {
    let mut bytes = common::sample();
    let v3 = parse(bytes.clone());
    bytes[4] = 2;
    let v2 = parse(bytes);
    assert_eq!(v2.version(), 2);
    assert_eq!(v2.metadata(), v3.metadata());
    assert_eq!(v2.tensors(), v3.tensors());
}

#[test]
fn alignment_key_places_the_data() {
    for alignment in [1, 8, 32, 64, 4096] {
        let bytes = common::with_alignment(alignment);
        let gguf = parse(bytes);
        for t in gguf.tensors() {
            assert!(
                t.offset.is_multiple_of(alignment.into()),
                "{} at {}",
                t.name,
                t.offset
            );
        }
        assert_eq!(gguf.data(&gguf.tensors()[1]), [1, 8, 15, 22]);
    }
}

#[test]
fn mapped_and_read_files_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    fs::write(&path, common::sample()).unwrap();
    let want = parse(common::sample());
    for mmap in [true, false] {
        for extra in [true, false] {
            let options = OpenOptions {
                mmap,
                populate: extra,
                mlock: extra,
                huge_pages: extra,
            };
            let gguf = Gguf::open_with(&path, &options).unwrap();
            assert_eq!(gguf.metadata(), want.metadata());
            assert_eq!(gguf.tensors(), want.tensors());
            assert_eq!(gguf.file_bytes(), common::sample().len() as u64);
            for t in gguf.tensors() {
                assert_eq!(gguf.data(t), want.data(t), "{} {options:?}", t.name);
                assert_eq!(gguf.bytes(t).is_mapped(), mmap);
            }
        }
    }
}

#[test]
fn released_pages_come_back_and_handles_outlive_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("big.gguf");
    let bytes = common::model(Metadata::default(), &[("w", GgmlType::F32, &[1 << 16, 4])]);
    fs::write(&path, bytes).unwrap();
    for mmap in [true, false] {
        let gguf = Gguf::open_with(
            &path,
            &OpenOptions {
                mmap,
                ..OpenOptions::default()
            },
        )
        .unwrap();
        let data = gguf.bytes(&gguf.tensors()[0]);
        let before = data.to_vec();
        drop(gguf);
        assert_eq!(data.release(), mmap);
        assert_eq!(*data, *before);
        assert!(!data.slice(1..100).release(), "under a page");
        assert_eq!(data.slice(5..9)[..], before[5..9]);
    }
}

#[test]
fn getters_convert_and_refuse() {
    let m = common::every_value();
    assert_eq!(m.require_str("text").unwrap(), "häuser ∮ 🦀");
    assert_eq!(m.u32("u8").unwrap(), Some(200));
    assert_eq!(m.u64("u64").unwrap(), Some(u64::MAX));
    assert_eq!(m.f32("f64").unwrap(), Some(-0.1));
    assert_eq!(m.bool("bool").unwrap(), Some(true));
    assert_eq!(m.i32s("a.i16").unwrap().unwrap(), [-5]);
    assert_eq!(m.strings("a.string").unwrap().unwrap().len(), 3);
    assert_eq!(m.f32s("a.f32").unwrap().unwrap(), [0.25, -8.0]);
    assert_eq!(m.u32("absent").unwrap(), None);
    let errors = [
        m.u32("i8").unwrap_err(),
        m.u32("text").unwrap_err(),
        m.str("bool").unwrap_err(),
        m.u32s("a.i32").unwrap_err(),
        m.require_f32("absent").unwrap_err(),
    ];
    insta::assert_snapshot!(errors.map(|e| e.to_string()).join("\n"));
}

#[test]
fn metadata_can_be_changed() {
    let mut m = common::every_value();
    let n = m.len();
    assert_eq!(m.set("u8", 1u8), Some(Value::U8(200)));
    assert_eq!(m.remove("general.architecture"), Some("llama".into()));
    assert_eq!(m.remove("general.architecture"), None);
    assert_eq!(m.len(), n - 1);
    assert_eq!(m.get("text").and_then(Value::as_str), Some("häuser ∮ 🦀"));
    m.retain(|k| k.starts_with("a."));
    m.set("z", true);
    assert_eq!(m.iter().next().unwrap().0, "a.u8");
    assert_eq!(m.iter().last().unwrap(), ("z", &Value::Bool(true)));
    assert_eq!(m.get("a.i8"), Some(&Value::from(vec![-1i8])));
}

#[test]
fn streams_in_pieces_into_a_file_that_appears_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let want = parse(common::sample());
    let mut stream = GgufWriter::like(&want).unwrap().create(&path).unwrap();
    assert_eq!(entries(dir.path()).len(), 1);
    assert!(!path.exists());
    for t in want.tensors() {
        for piece in want.data(t).chunks(7) {
            stream.write(piece).unwrap();
        }
    }
    assert_eq!(stream.tensors(), want.tensors());
    stream.finish().unwrap();
    assert_eq!(entries(dir.path()), ["out.gguf"]);
    assert_eq!(fs::read(&path).unwrap(), common::sample());
}

#[test]
fn an_unfinished_file_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    fs::write(&path, "old").unwrap();
    let model = parse(common::sample());

    let mut dropped = GgufWriter::like(&model).unwrap().create(&path).unwrap();
    dropped.write(&[0; 100]).unwrap();
    drop(dropped);

    let mut short = GgufWriter::like(&model).unwrap().create(&path).unwrap();
    short.write(&[0; 341]).unwrap();
    let e = short.finish().unwrap_err().to_string();
    assert!(
        e.contains("`blk.0.attn_q.weight`: 287 bytes of its data were not written"),
        "{e}"
    );

    let mut long = GgufWriter::new(Metadata::default()).create(&path).unwrap();
    assert!(matches!(long.write(&[1]), Err(Error::Tensor { .. })));
    drop(long);

    assert_eq!(entries(dir.path()), ["out.gguf"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn unwritable_outputs_are_errors_with_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let writer = GgufWriter::new(common::every_value());
    let e = writer
        .clone()
        .create(dir.path().join("no/such/dir.gguf"))
        .unwrap_err();
    assert!(
        matches!(&e, Error::Io { path, .. } if path.ends_with("no/such/dir.gguf")),
        "{e}"
    );
    let e = writer.clone().create(dir.path()).unwrap_err();
    assert!(
        matches!(&e, Error::Io { path, .. } if path == dir.path()),
        "{e}"
    );
    assert!(entries(dir.path()).is_empty());
}

/// `/dev/full` is a disk without space.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_with_the_path() {
    let mut writer = GgufWriter::new(Metadata::default());
    writer.add_tensor("w", GgmlType::F32, &[1 << 20]).unwrap();
    let mut stream = writer.create("/dev/full").unwrap();
    let e = stream.write(&vec![0; 4 << 20]).unwrap_err();
    assert!(matches!(&e, Error::Io { path, source, .. }
        if path == Path::new("/dev/full") && source.kind() == std::io::ErrorKind::StorageFull));
    // A file so small that it stays in the buffer fails at the end.
    let small = GgufWriter::new(Metadata::default())
        .create("/dev/full")
        .unwrap();
    assert!(matches!(small.finish(), Err(Error::Io { .. })));
    assert!(Path::new("/dev/full").exists());
}

#[cfg(unix)]
#[test]
fn a_link_keeps_pointing_to_the_new_file() {
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = (dir.path().join("real.gguf"), dir.path().join("link.gguf"));
    fs::write(&real, "old").unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    GgufWriter::new(common::every_value())
        .create(&link)
        .unwrap()
        .finish()
        .unwrap();
    assert!(link.is_symlink());
    assert_eq!(
        Gguf::open(&real).unwrap().metadata(),
        &common::every_value()
    );
}

#[test]
fn bad_declarations_are_refused() {
    let mut w = GgufWriter::new(Metadata::default());
    w.add_tensor("a", GgmlType::F32, &[4]).unwrap();
    let errors = [
        w.add_tensor("a", GgmlType::F32, &[4]).unwrap_err(),
        w.add_tensor("b", GgmlType::Q4_K, &[128]).unwrap_err(),
        w.add_tensor("c", GgmlType::F32, &[4, 0]).unwrap_err(),
        w.add_tensor("d", GgmlType::F32, &[1; 5]).unwrap_err(),
        w.add_tensor("e", GgmlType::F32, &[u64::MAX, 2])
            .unwrap_err(),
        w.to_bytes(&[&[0; 3]]).unwrap_err(),
    ];
    insta::assert_snapshot!(errors.map(|e| e.to_string()).join("\n"));
    let mut deep = Array::U8(vec![1]);
    for _ in 0..5 {
        deep = Array::Array(vec![deep]);
    }
    w.metadata_mut().set("deep", Value::Array(deep));
    assert!(matches!(w.file_bytes(), Err(Error::Unsupported(_))));
}

/// Writes a model of three parts called `NAME-0000?-of-00003.gguf`; part 2 has no tensors.
fn write_parts(dir: &Path, change: impl Fn(usize, &mut Metadata)) -> Vec<std::path::PathBuf> {
    let names: [&[&str]; 3] = [&["a", "b"], &[], &["c"]];
    (0..3)
        .map(|i| {
            let mut m = Metadata::default();
            if i == 0 {
                m.set("general.architecture", "llama");
            }
            m.set("split.no", i as u16);
            m.set("split.count", 3u16);
            m.set("split.tensors.count", 3i32);
            change(i, &mut m);
            let tensors: Vec<(&str, GgmlType, &[u64])> = names[i]
                .iter()
                .map(|&n| (n, GgmlType::F32, &[2][..]))
                .collect();
            let path = dir.join(format!("m-{:05}-of-00003.gguf", i + 1));
            fs::write(&path, common::model(m, &tensors)).unwrap();
            path
        })
        .collect()
}

#[test]
fn parts_are_joined_whichever_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_parts(dir.path(), |_, _| {});
    for path in &paths {
        for mmap in [true, false] {
            let gguf = Gguf::open_with(
                path,
                &OpenOptions {
                    mmap,
                    ..OpenOptions::default()
                },
            )
            .unwrap();
            assert_eq!(
                gguf.metadata().require_str("general.architecture").unwrap(),
                "llama"
            );
            assert_eq!(gguf.files().len(), 3);
            let places: Vec<_> = gguf
                .tensors()
                .iter()
                .map(|t| (t.name.as_str(), t.file))
                .collect();
            assert_eq!(places, [("a", 0), ("b", 0), ("c", 2)]);
            assert_eq!(
                gguf.data(&gguf.tensors()[1]),
                [1, 8, 15, 22, 29, 36, 43, 50]
            );
            let sum: u64 = paths.iter().map(|p| fs::metadata(p).unwrap().len()).sum();
            assert_eq!(gguf.file_bytes(), sum);
            assert!(
                !GgufWriter::like(&gguf)
                    .unwrap()
                    .metadata()
                    .contains("split.count")
            );
        }
    }
    let copy = fs::read(&paths[0]).unwrap();
    let e = Gguf::from_bytes(Bytes::from_vec(copy), "part").unwrap_err();
    assert!(matches!(e, Error::Split { .. }), "{e}");
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut errors = Vec::new();
    let mut check = |what: &str, change: &dyn Fn(usize, &mut Metadata)| {
        let paths = write_parts(dir.path(), change);
        let e = Gguf::open(&paths[0]).unwrap_err().to_string();
        errors.push(format!(
            "{what}: {}",
            e.replace(&*dir.path().to_string_lossy(), "DIR")
        ));
    };
    check("wrong count", &|i, m| {
        m.set("split.count", if i == 1 { 4u16 } else { 3 });
    });
    check("wrong number", &|i, m| {
        m.set("split.no", if i == 2 { 1u16 } else { i as u16 });
    });
    check("first says it is another", &|i, m| {
        m.set("split.no", (i + 1) as u16);
    });
    check("missing count", &|i, m| {
        if i == 1 {
            m.remove("split.count");
        }
    });
    check("tensors missing", &|_, m| {
        m.set("split.tensors.count", 9i32);
    });
    let paths = write_parts(dir.path(), |_, _| {});
    fs::copy(&paths[0], dir.path().join("renamed.gguf")).unwrap();
    let e = Gguf::open(dir.path().join("renamed.gguf"))
        .unwrap_err()
        .to_string();
    errors.push(format!(
        "renamed: {}",
        e.replace(&*dir.path().to_string_lossy(), "DIR")
    ));
    fs::remove_file(&paths[2]).unwrap();
    let e = Gguf::open(&paths[0]).unwrap_err().to_string();
    errors.push(format!(
        "part missing: {}",
        e.replace(&*dir.path().to_string_lossy(), "DIR")
    ));
    insta::assert_snapshot!(errors.join("\n"));
}

fn value() -> impl Strategy<Value = Value> {
    let array = prop_oneof![
        any::<Vec<u8>>().prop_map(Array::U8),
        any::<Vec<i64>>().prop_map(Array::I64),
        any::<Vec<bool>>().prop_map(Array::Bool),
        prop::collection::vec(-1e30f32..1e30, 0..9).prop_map(Array::F32),
        any::<Vec<String>>().prop_map(Array::String),
    ];
    let nested = array.prop_recursive(3, 16, 4, |inner| {
        prop::collection::vec(inner, 0..4).prop_map(Array::Array)
    });
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i64>().prop_map(Value::I64),
        (-1e300..1e300f64).prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
        nested.prop_map(Value::Array),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn whatever_is_written_is_read(
        entries in prop::collection::btree_map(".{0,20}", value(), 0..8),
        tensors in prop::collection::btree_map(
            "[a-z.]{1,12}",
            (prop::sample::select(GgmlType::ALL), 1u64..4, prop::collection::vec(1u64..4, 0..4)),
            0..6,
        ),
        shift in 0u32..8,
    ) {
        let mut metadata = Metadata::default();
        for (k, v) in &entries {
            metadata.set(k, v.clone());
        }
        metadata.set("general.alignment", 1u32 << shift);
        let mut writer = GgufWriter::new(metadata.clone());
        let mut data = Vec::new();
        for (name, (ty, blocks, rest)) in &tensors {
            let mut shape = vec![blocks * ty.block_len() as u64];
            shape.extend(rest.iter().take(3));
            writer.add_tensor(name, *ty, &shape).unwrap();
            let bytes = writer.tensors().last().unwrap().bytes;
            data.push((0..bytes).map(|i| (i ^ shape[0]) as u8).collect::<Vec<u8>>());
        }
        let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
        let bytes = writer.to_bytes(&slices).unwrap();
        prop_assert_eq!(bytes.len() as u64, writer.file_bytes().unwrap());
        let gguf = parse(bytes);
        prop_assert_eq!(gguf.metadata(), &metadata);
        prop_assert_eq!(gguf.tensors().len(), writer.tensors().len());
        for ((t, w), d) in gguf.tensors().iter().zip(writer.tensors()).zip(&data) {
            prop_assert_eq!((&t.name, t.ty, &t.shape, t.bytes), (&w.name, w.ty, &w.shape, w.bytes));
            prop_assert_eq!(gguf.data(t), d.as_slice());
        }
    }
}
