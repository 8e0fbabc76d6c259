//! Files that are cut off, damaged or malicious give errors: no panic, no absurd allocation.

mod common;

use std::fs;

use tegula_gguf::{Bytes, Error, Gguf, OpenOptions, fuzz::fuzz_read};

fn open(bytes: &[u8]) -> Result<Gguf, Error> {
    Gguf::from_bytes(Bytes::from_vec(bytes.to_vec()), "bad.gguf")
}

/// A header that is built field by field, for what the writer would not write.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(tensors: u64, entries: u64) -> Raw {
        Raw(b"GGUF\x03\0\0\0".to_vec()).u64(tensors).u64(entries)
    }

    fn u32(mut self, v: u32) -> Raw {
        self.0.extend(v.to_le_bytes());
        self
    }

    fn u64(mut self, v: u64) -> Raw {
        self.0.extend(v.to_le_bytes());
        self
    }

    fn str(self, s: &[u8]) -> Raw {
        let mut r = self.u64(s.len() as u64);
        r.0.extend(s);
        r
    }

    fn tensor(self, name: &str, shape: &[u64], ty: u32, offset: u64) -> Raw {
        let r = self.str(name.as_bytes()).u32(shape.len() as u32);
        shape.iter().fold(r, |r, &d| r.u64(d)).u32(ty).u64(offset)
    }

    /// `data` bytes of tensor data after the padding.
    fn data(mut self, data: usize) -> Raw {
        let end = self.0.len().next_multiple_of(32) + data;
        self.0.resize(end, 0);
        self
    }

    fn error(&self) -> String {
        open(&self.0).unwrap_err().to_string()
    }
}

#[test]
fn cut_off_anywhere_is_truncated() {
    let whole = common::sample();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    for len in 0..whole.len() {
        let e = open(&whole[..len]).unwrap_err();
        assert!(matches!(e, Error::Truncated { .. }), "{len} bytes: {e}");
        // Files go other ways, mapped and not; every length would take long.
        if len % 61 == 0 {
            fs::write(&path, &whole[..len]).unwrap();
            for mmap in [true, false] {
                let options = OpenOptions {
                    mmap,
                    ..OpenOptions::default()
                };
                let e = Gguf::open_with(&path, &options).unwrap_err();
                assert!(
                    matches!(e, Error::Truncated { .. }),
                    "{len} bytes, mmap {mmap}: {e}"
                );
            }
        }
    }
    assert!(open(&whole).is_ok());
}

#[test]
fn no_flipped_byte_panics() {
    let whole = common::sample();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        let patterns = (0..8)
            .map(|b| whole[at] ^ (1 << b))
            .chain([!whole[at], 0, 0x7f, 0x80, 0xff]);
        for byte in patterns {
            bytes[at] = byte;
            fuzz_read(&bytes);
        }
    }
}

#[test]
fn foreign_files_are_named() {
    let mut big = b"GGUF\0\0\0\x03".to_vec();
    big.resize(64, 0);
    let mut zip = b"PK\x03\x04".to_vec();
    zip.resize(64, 0);
    let errors = [
        open(&big),
        open(b"FUGG\0\0\0\x03"),
        open(b"GGUF\x01\0\0\0\0\0\0\0"),
        open(b"GGUF\x04\0\0\0\0\0\0\0"),
        open(b"GGUF\0\0\0\0\0\0\0\0"),
        open(&zip),
        open(b"lmgg\x01\0\0\0"),
        open(b"version https://git-lfs.github.com/spec/v1\n"),
        open(b"\x80\x04\0\0\0\0\0\0{\"__metadata__\""),
        open(b"<!DOCTYPE html>"),
        open(b"\xff\xfe"),
        open(b""),
        open(b"GG"),
    ]
    .map(|r| r.unwrap_err().to_string());
    insta::assert_snapshot!(errors.join("\n"));
}

#[test]
fn contradictions_are_named() {
    let kv = |r: Raw, key: &[u8]| r.str(key);
    let one = |ty: u32| Raw::new(0, 1).str(b"k").u32(ty);
    let nested = (0..6)
        .fold(one(9), |r, _| r.u32(9).u64(1))
        .u64(0)
        .u64(0)
        .u64(0)
        .u64(0)
        .u64(0);
    let aligned = |a: u32| Raw::new(0, 1).str(b"general.alignment").u32(4).u32(a);
    let long = [b'x'; 65_536];
    let cases = [
        ("metadata count", Raw::new(0, u64::MAX)),
        ("tensor count", Raw::new(u64::MAX / 24, 0)),
        ("key length", Raw::new(0, 1).u64(u64::MAX).u64(0)),
        ("long key", kv(Raw::new(0, 1), &long).u64(0)),
        (
            "key not UTF-8",
            kv(Raw::new(0, 1), b"\xff\x00").u32(0).u64(0),
        ),
        ("value type", one(13).u64(0)),
        ("array element type", one(9).u32(77).u64(0).u64(0)),
        ("array length", one(9).u32(4).u64(1 << 62).u64(0)),
        (
            "array length times size",
            one(9).u32(10).u64(1 << 61).u64(0),
        ),
        ("string length", one(8).u64(1 << 40).u64(0)),
        ("nesting", nested),
        (
            "duplicate key",
            Raw::new(0, 2)
                .str(b"k")
                .u32(4)
                .u32(1)
                .str(b"k")
                .u32(4)
                .u32(1),
        ),
        ("alignment 0", aligned(0)),
        ("alignment 33", aligned(33)),
        ("alignment 2^31", aligned(1 << 31)),
        (
            "alignment of another type",
            Raw::new(0, 1).str(b"general.alignment").u32(8).str(b"x"),
        ),
        ("dimensions", Raw::new(1, 0).str(b"t").u32(5).data(64)),
        (
            "dimension 0",
            Raw::new(1, 0).tensor("t", &[4, 0], 0, 0).data(64),
        ),
        (
            "elements",
            Raw::new(1, 0)
                .tensor("t", &[1 << 32, 1 << 32], 0, 0)
                .data(64),
        ),
        (
            "bytes",
            Raw::new(1, 0).tensor("t", &[1 << 62], 0, 0).data(64),
        ),
        (
            "type unknown",
            Raw::new(1, 0).tensor("t", &[32], 99, 0).data(64),
        ),
        (
            "type removed",
            Raw::new(1, 0).tensor("t", &[32], 31, 0).data(64),
        ),
        ("row", Raw::new(1, 0).tensor("t", &[48], 2, 0).data(64)),
        (
            "misaligned",
            Raw::new(1, 0).tensor("t", &[1], 0, 4).data(64),
        ),
        ("offset", Raw::new(1, 0).tensor("t", &[1], 0, 96).data(64)),
        (
            "offset overflow",
            Raw::new(1, 0).tensor("t", &[8], 0, u64::MAX - 31).data(64),
        ),
        ("size", Raw::new(1, 0).tensor("t", &[17], 0, 0).data(64)),
        (
            "same name",
            Raw::new(2, 0)
                .tensor("t", &[1], 0, 0)
                .tensor("t", &[1], 0, 32)
                .data(64),
        ),
        (
            "overlap",
            Raw::new(2, 0)
                .tensor("a", &[9], 0, 0)
                .tensor("b", &[1], 0, 32)
                .data(64),
        ),
    ];
    let errors = cases.map(|(what, raw)| format!("{what}: {}", raw.error()));
    insta::assert_snapshot!(errors.join("\n"));
}

#[test]
fn invalid_utf8_in_values_is_replaced() {
    let raw = Raw::new(0, 1).str(b"k").u32(8).str(b"a\xffb");
    let gguf = open(&raw.0).unwrap();
    assert_eq!(gguf.metadata().require_str("k").unwrap(), "a\u{fffd}b");
}

/// The file's size allows the counts, and still nothing near it is allocated. (A sparse file
/// takes no space on the disk.)
#[cfg(target_os = "linux")]
#[test]
fn huge_sparse_files_allocate_little() {
    fn peak_kib() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.gguf");
    let cases = [
        ("string", Raw::new(0, 1).str(b"k").u32(8).u64(1 << 39)),
        (
            "numbers",
            Raw::new(0, 1).str(b"k").u32(9).u32(10).u64(1 << 36),
        ),
        ("bools", Raw::new(0, 1).str(b"k").u32(9).u32(7).u64(1 << 39)),
        ("entries", Raw::new(0, 1 << 35)),
        ("tensors", Raw::new(1 << 35, 0)),
        ("name", Raw::new(1, 0).u64(1 << 39)),
    ];
    let before = peak_kib();
    let mut errors = Vec::new();
    for (what, raw) in cases {
        fs::write(&path, &raw.0).unwrap();
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(1 << 40)
            .unwrap();
        for mmap in [true, false] {
            let options = OpenOptions {
                mmap,
                ..OpenOptions::default()
            };
            let e = Gguf::open_with(&path, &options).unwrap_err().to_string();
            errors.push(format!(
                "{what}: {}",
                e.replace(&*path.to_string_lossy(), "FILE")
            ));
        }
    }
    let grown = peak_kib() - before;
    assert!(grown < 512 << 10, "{grown} KiB");
    insta::assert_snapshot!(errors.join("\n"));
}

#[test]
fn missing_files_and_directories_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().join("absent.gguf"), dir.path().to_owned()] {
        for mmap in [true, false] {
            let options = OpenOptions {
                mmap,
                ..OpenOptions::default()
            };
            let e = Gguf::open_with(&path, &options).unwrap_err();
            assert!(matches!(&e, Error::Io { path: p, .. } if *p == path), "{e}");
        }
    }
}
