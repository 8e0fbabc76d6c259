//! Replays the fuzzers' committed corpus: the seeds, and whatever once crashed.

mod common;

use std::{fs, path::Path};

use tegula_gguf::{
    Bytes, Gguf,
    fuzz::{fuzz_read, fuzz_template, fuzz_tokenizer},
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
fn tokenizer() {
    replay("tokenizer", &common::tokenizer_seeds(), fuzz_tokenizer);
}

#[test]
fn template() {
    let talk =
        b"\0Be brief.\0Hi!\0[{\"function\": {\"name\": \"f\", \"arguments\": {}}}]\012 degrees";
    let with_talk = |source: &str| [source.as_bytes(), talk].concat();
    let file = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data/chat")
            .join(name);
        with_talk(&fs::read_to_string(path).unwrap())
    };
    let seeds = [
        ("chatml", file("chatml.jinja")),
        ("llama3", file("llama3.jinja")),
        ("qwen3", file("qwen3.jinja")),
        (
            "loop",
            with_talk(
                "{% for a in range(9999) %}{% for b in range(9999) %}{{ a ~ b }}{% endfor %}{% endfor %}",
            ),
        ),
        (
            "memory",
            with_talk(
                "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            ),
        ),
        (
            "methods",
            with_talk(
                "{{ messages[1].content.split(' ')[-1].strip('!').upper() | tojson(indent=2) }}{{ strftime_now('%Y') }}",
            ),
        ),
    ];
    replay("template", &seeds, fuzz_template);
}
