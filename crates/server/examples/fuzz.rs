//! Fuzzing of requests with a stable compiler, without coverage:
//!
//! ```text
//! cargo run --release -p tegula-server --example fuzz -- --seconds 600 --seed 1
//! ```
//!
//! It mutates the committed corpus (`--corpus DIR` for another), mostly by what JSON is made of.
//! The libFuzzer target in `crates/server/fuzz` finds more per input; this one runs anywhere.

use std::{error::Error, path::PathBuf, process::ExitCode};

use tegula_gguf::fuzz::driver::{self, Random, Target};
use tegula_server::fuzz::fuzz_request;

/// What JSON, schemas and grammars are made of.
const WORDS: [&str; 40] = [
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1e400",
    "18446744073709551616",
    "0.1",
    "\"\"",
    "[]",
    "{}",
    "\"x\"",
    "[[]]",
    "\"\\ud800\"",
    "\"\\u0000\"",
    ",",
    ":",
    "{\"",
    "\"}",
    "[",
    "]",
    "\"type\":\"object\"",
    "\"type\":\"array\"",
    "\"type\":\"string\"",
    "\"type\":\"integer\"",
    "\"properties\":",
    "\"required\":",
    "\"items\":",
    "\"anyOf\":",
    "\"$ref\":\"#\"",
    "\"enum\":",
    "\"pattern\":\"(a|b)*\"",
    "\"minLength\":",
    "\"maxItems\":",
    "\"const\":",
    "root ::= ",
    "(a{1,9}){1,9}",
    "start: ",
    "\"role\":\"user\"",
    "\"content\":",
];

/// A change to a request.
fn mutate(data: &mut Vec<u8>, corpus: &[Vec<u8>], r: &mut Random) {
    let (at, some) = r.stretch(data, 40);
    let word = WORDS[r.below(WORDS.len())].bytes();
    match r.below(8) {
        0 | 1 => drop(data.splice(at..at + some, word)),
        2 => drop(data.splice(at..at, word)),
        _ => driver::mutate(data, corpus, r),
    }
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let target = Target {
        name: "request".to_owned(),
        run: fuzz_request,
        mutate,
        corpus: PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/request"),
    };
    let report = driver::run(target, std::env::args().skip(1))?;
    println!("{report}");
    Ok(report.exit_code())
}
