//! Replays the fuzzers' committed corpus: the seeds, and whatever once crashed.

mod common;

use std::{fs, path::Path};

use tegula_gguf::{
    Bytes, ChatTemplate, Gguf, TemplateError,
    chat::{Message, RenderOptions},
    fuzz::{fuzz_read, fuzz_sparse, fuzz_template, fuzz_tokenizer},
    sparse::Sparse,
};

/// Runs `target` over its corpus, which must hold `seeds`.
fn replay(name: &str, seeds: &[(&str, Vec<u8>)], target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    // `TEGULA_BLESS=1 cargo test -p tegula-gguf` writes the seeds anew.
    if std::env::var_os("TEGULA_BLESS").is_some() {
        fs::create_dir_all(&corpus).unwrap();
        for (name, bytes) in seeds {
            fs::write(corpus.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in seeds {
        assert!(
            fs::read(corpus.join(name)).unwrap() == *bytes,
            "{name} is out of date"
        );
    }
    let mut files = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        target(&fs::read(entry.unwrap().path()).unwrap());
        files += 1;
    }
    assert!(files >= seeds.len());
}

#[test]
fn read() {
    let seeds = common::seeds();
    for (name, bytes) in &seeds {
        let read = Gguf::from_bytes(Bytes::from_vec(bytes.clone()), name);
        assert_eq!(read.is_ok(), *name != "part.gguf", "{name}");
    }
    replay("read", &seeds, fuzz_read);
}

#[test]
fn sparse() {
    let seeds = common::sparse_seeds();
    for (name, bytes) in &seeds {
        let read = Sparse::parse(bytes).and_then(|s| s.check());
        assert_eq!(read, Ok(()), "{name}");
    }
    replay("sparse", &seeds, fuzz_sparse);
}

#[test]
fn tokenizer() {
    replay("tokenizer", &common::tokenizer_seeds(), fuzz_tokenizer);
}

#[test]
fn template() {
    let seeds = common::template_seeds();
    for (name, bytes) in &seeds {
        let text = std::str::from_utf8(bytes).unwrap();
        let source = text.split('\0').nth(1).unwrap();
        let template: ChatTemplate = source.parse().expect(name);
        // All of the first one runs, up to the refusal at its end.
        let refused = template.render(&[Message::new("user", "hi")], &RenderOptions::default());
        match (*name, refused) {
            ("everything", Err(TemplateError::Refused(why))) => assert_eq!(why, "no"),
            ("everything", other) => panic!("{other:?}"),
            (_, rendered) => assert!(rendered.is_ok(), "{name}: {rendered:?}"),
        }
    }
    replay("template", &seeds, fuzz_template);
}
