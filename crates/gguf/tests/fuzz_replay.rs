//! Replays the fuzzers' committed corpus: the seeds, and whatever once crashed.

mod common;

use std::{fs, path::PathBuf};

use tegula_gguf::{Bytes, Gguf, fuzz::fuzz_read};

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/read")
}

#[test]
fn corpus_holds_the_seeds_and_runs_clean() {
    let seeds = common::seeds();
    // `TEGULA_BLESS=1 cargo test -p tegula-gguf` writes the seeds anew.
    if std::env::var_os("TEGULA_BLESS").is_some() {
        for (name, bytes) in &seeds {
            fs::write(corpus().join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in &seeds {
        assert!(
            fs::read(corpus().join(name)).unwrap() == *bytes,
            "{name} is out of date"
        );
        let read = Gguf::from_bytes(Bytes::from_vec(bytes.clone()), name);
        assert_eq!(read.is_ok(), *name != "part.gguf", "{name}");
    }
    let mut files = 0;
    for entry in fs::read_dir(corpus()).unwrap() {
        fuzz_read(&fs::read(entry.unwrap().path()).unwrap());
        files += 1;
    }
    assert!(files >= seeds.len());
}
